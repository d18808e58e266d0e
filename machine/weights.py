"""Files of weights: read without running code, and fetched once."""

import argparse
import hashlib
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

WRAPPERS = "state_dict", "model", "model_state_dict"
SCALAR = np._core.multiarray.scalar     # what numpy's scalars are pickled as
# What else may lie in a file of weights: old timm checkpoints hold numpy's scalars and their run's flags.
HARMLESS = [argparse.Namespace, SCALAR, (SCALAR, "numpy.core.multiarray.scalar"), np.dtype,
            *{type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"}]


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of one that torch saved, by name. No code in it is run.

    A wrapping `state_dict` or `model` is taken off, and DistributedDataParallel's `module.`.
    """
    if str(path).endswith(".safetensors"):
        from safetensors.torch import load_file  # only here: few runs need it

        return load_file(path)
    with torch.serialization.safe_globals(HARMLESS):
        state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise ValueError("it holds no weights by name")
    state = next((state[key] for key in WRAPPERS if isinstance(state.get(key), dict)), state)
    state = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    wrapped = all(name.startswith("module.") for name in state)
    return {name.removeprefix("module.") if wrapped else name: value for name, value in state.items()}


def fingerprint(weights: dict[str, Tensor], *facts: object) -> str:
    """Digits that change with any weight, its name, or a fact."""
    digest = hashlib.sha256(repr(facts).encode())
    for name, value in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def downloaded(address: str) -> dict[str, Tensor]:
    """The weights at this address, kept where torch keeps such files. Raises ValueError where it cannot be reached."""
    path = kept_at(address)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with reaching(address, path):
            torch.hub.download_url_to_file(address, str(path), progress=True)
    return read_weights(path)


def hub_address(repository: str, file: str) -> str:
    return f"https://huggingface.co/{repository}/resolve/main/{file}"


def kept_at(address: str) -> Path:
    """Where a download lies; the hub's files are all of one name, so there the repository's is put before it."""
    parts = urllib.parse.urlparse(address).path.split("/")                      # ["", owner, repository, ..., file]
    name = "--".join([*parts[1:3], parts[-1]]) if "huggingface.co" in address else parts[-1]
    return Path(torch.hub.get_dir()) / "checkpoints" / name


@contextmanager
def reaching(address: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(f"{first_line(error)}: get {address} elsewhere and put it at {path}") from None


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
