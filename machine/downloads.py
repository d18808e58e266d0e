"""Files of weights from elsewhere, fetched once."""

import os
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from machine.errors import first_line
from machine.tensor_files import read_weights


def stay_offline() -> None:
    """From here on, what a file names that may be a stranger's is looked for on this machine alone, unless the user has
    set HF_HUB_OFFLINE=0. To be called before huggingface_hub is first imported, which reads it."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on")


def downloaded(address: str) -> dict[str, Tensor]:
    """The weights at this address, kept where torch keeps such files. Raises ValueError where it cannot be reached, or
    nothing is to be: HF_HUB_OFFLINE counts for all that a name stands for."""
    path = kept_at(address)
    if not path.exists():
        if offline():
            raise ValueError(f"HF_HUB_OFFLINE is set: get {address} and put it at {path}")
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
