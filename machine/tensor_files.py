"""Files of tensors, anyone's: what torch.save or safetensors wrote, read without running anything that they hold."""

import argparse
import io
import re
import warnings
import zipfile
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from machine.checksums import Damaged, digest, seal_zip, zip_is_sealed
from machine.errors import InputError
from machine.streams import shown
from machine.text_files import read_json

# Keys under which weights are found. The first two are LinCIR's and Pic2Word's of the network that they train, beside
# which theirs may hold a CLIP model; the next two are what timm's training takes of its own checkpoints.
OF_PHI = "Phi", "state_dict_img2text"
WRAPPERS = *OF_PHI, "state_dict_ema", "model_ema", "model_state_dict", "state_dict", "model"
SHARDS = ".index.json"                  # ends the name of a list of the files that weights are divided into
BEGINNINGS = {b"<": "a web page", b"version https://git-lfs": "a Git LFS pointer, not the file itself: git lfs pull",
              b"\x89HDF": "an HDF5 file, as Keras writes", b"\x93NUMPY": "a NumPy array", b"\x1f\x8b": "a gzip archive"}


class Unreadable(ValueError):
    """Says what a file is, where it is none of tensors that can be read."""


class NumberKind:
    """Stands for numpy.dtype in a file: the kind of one plain number, and nothing else."""

    def __init__(self, name: str, *_):
        if not re.fullmatch(r"[biuf][1248]|c(8|16)", name):
            raise Unreadable(f"it holds a NumPy value of the kind {name!r:.40}")
        self.kind = np.dtype(name)

    def __setstate__(self, state: tuple) -> None:
        self.kind = self.kind.newbyteorder(state[1])


def number(kind: NumberKind, content: bytes):
    """Stands for NumPy's own maker of scalars: the plain number."""
    return np.frombuffer(content, kind.kind, 1)[0].item()


# All that a file may name beside what torch itself allows. NumPy's own functions are not among it.
NAMES = [argparse.Namespace, (NumberKind, "numpy.dtype"), (number, "numpy.core.multiarray.scalar"),
         (number, "numpy._core.multiarray.scalar")]


def packed(content: dict) -> memoryview:
    """What torch.save writes of it, with a checksum over every byte."""
    written = io.BytesIO()
    torch.save(content, written)
    seal_zip(written)
    return written.getbuffer()


def is_whole(path: str | Path) -> bool:
    """Whether the file's checksum says that it is as it was written; False where it has none.

    Raises Unreadable where the checksum does not fit, FileNotFoundError.
    """
    try:
        return zip_is_sealed(regular(path))
    except Damaged as error:
        raise Unreadable(f"it is damaged: {error}") from None


def read(path: str | Path, glance: bool = False):
    """What a file holds, on the CPU. Raises Unreadable with what it is otherwise, FileNotFoundError.

    glance: the tensors are not read, but lie in the file: for who looks only at the rest, and soon lets go of it.
    """
    path = regular(path)
    with open(path, "rb") as file:
        head = file.read(100)
    if not head:
        raise Unreadable("it is empty")
    if is_safetensors(path, head):
        return read_safetensors(path)
    zipped = head.startswith(b"PK")
    if zipped:
        check_zip(path)
    try:
        with torch.serialization.safe_globals(NAMES), warnings.catch_warnings(action="ignore"):
            in_file = glance and zipped and shown(path) == str(path)            # torch maps no name that is not text
            if path.suffix != ".safetensors":                                   # by which torch goes, whatever it is
                return torch.load(path, map_location="cpu", weights_only=True, mmap=in_file)
            with open(path, "rb") as file:
                return torch.load(file, map_location="cpu", weights_only=True)
    except Unreadable:
        raise
    except Exception as error:                                                  # torch.load raises a dozen types
        raise Unreadable(what_it_is(head, str(error))) from None


def regular(path: str | Path) -> Path:
    """The path, of a plain file: a pipe could be waited for without end."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(path)
    if not path.is_file():
        raise Unreadable("it is a folder" if path.is_dir() else "it is no plain file")
    return path


def check_zip(path: Path) -> None:
    """Raise Unreadable for a zip that unpacks to more than it is, as torch's never do, or that is cut off."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError, EOFError):
        raise Unreadable("it is damaged, or cut short") from None
    if any(Path(member.filename).name == "constants.pkl" for member in members):
        raise Unreadable("it is a TorchScript program; save its state_dict() with torch.save")
    if sum(member.file_size for member in members) > path.stat().st_size:
        raise Unreadable("it is a compressed archive, which torch.save does not write")


def what_it_is(head: bytes, complaint: str) -> str:
    """In words: a file with this beginning of which torch complains so."""
    if named := re.search(r"GLOBAL ([\w.]+)", complaint):
        return (f"it holds a Python object, {named[1]}, which could run code; save tensors and plain values alone, as "
                "model.state_dict() gives them")
    for beginning, words in BEGINNINGS.items():
        if head.startswith(beginning):
            return f"it is {words}"
    if head.startswith((b"PK", b"\x80")):
        return "it is damaged, cut short, or holds Python objects other than tensors and plain values"
    return "it is no file that torch.save wrote"


def is_safetensors(path: Path, head: bytes) -> bool:
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= path.stat().st_size


def read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(path.read_bytes())
    except (SafetensorError, ValueError, KeyError, OSError):
        raise Unreadable("it is a damaged safetensors file, or one of kinds of numbers that torch does not have") \
            from None


def weights(content) -> dict[str, Tensor] | None:
    """Name -> tensor of what a file holds: bare, or under a name customary for it, and without what DataParallel,
    torch.compile, a moving average and Lightning put before every name; None where there are none."""
    if not isinstance(content, dict):
        return None
    found = next((content[key] for key in WRAPPERS if isinstance(content.get(key), dict)), content)
    if not found or not all(isinstance(name, str) and is_plain(value) for name, value in found.items()):
        return None
    if "n_averaged" in found:                                                   # torch's AveragedModel counts
        found = {name: value for name, value in found.items() if name != "n_averaged"}
    for prefix in ("_orig_mod.", "module.", "_orig_mod.", "model."):
        if all(name.startswith(prefix) for name in found):
            found = {name.removeprefix(prefix): value for name, value in found.items()}
    return found


def counted(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights found, and of those wanted the counters of batch norm that they lack: files of torch before 0.4.1
    have none, nor what was saved anew from them. No statistic depends on them here."""
    return {**{name: value for name, value in wanted.items() if name.endswith("num_batches_tracked")}, **found}


def difference(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> str | None:
    """In words: which tensors are not of the name, shape and kind that is wanted; None where all are."""
    told = [{name: described(value) for name, value in tensors.items()} for tensors in (found, wanted)]
    differs = [name for name in sorted(wanted.keys() | found.keys()) if told[0].get(name) != told[1].get(name)]
    if not differs:
        return None
    there, here = (tensors.get(differs[0], "none") for tensors in told)
    return f"{len(differs)} weights differ, first {differs[0]}: {there} there, {here} here"


def described(value: Tensor) -> str:
    """Its shape; and its kind of numbers, but of the floating-point ones, which are turned into each other."""
    kind = "" if value.is_floating_point() else f" of {str(value.dtype).removeprefix('torch.')}"
    return f"{tuple(value.shape)}{kind}"


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The weights in a file, which is as it was written if it has a checksum; or in the files of a list of them. Raises
    Unreadable."""
    if str(path).endswith(SHARDS):
        return {name: value for part in parts(path) for name, value in read_weights(Path(path).parent / part).items()}
    try:
        is_whole(path)
        if found := weights(read(path)):
            return found
    except FileNotFoundError:
        raise Unreadable("there is no such file") from None
    raise Unreadable("it holds no tensors by name")


def parts(path: str | Path) -> list[str]:
    """The names of the files that a list of weights divides them into, all of its folder. Raises Unreadable."""
    try:
        named = sorted(set(read_json(path)["weight_map"].values()))
    except (InputError, KeyError, TypeError, AttributeError):
        named = []
    if not named or not all(isinstance(name, str) and Path(name).name == name for name in named):
        raise Unreadable("it is no list of the files that weights are divided into")
    return named


def fingerprint(tensors: dict[str, Tensor], *facts: object) -> str:
    """Digits that change with any tensor, its name, or a fact."""
    named = ((name.encode(), value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
             for name, value in sorted(tensors.items()))
    return digest([repr(facts).encode(), *chain.from_iterable(named)])


def bytes_of(tensors: dict[str, Tensor]) -> int:
    """What they take; what several share counts once."""
    held = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in tensors.values()}
    return sum(held.values())


def is_plain(value) -> bool:
    """Whether it is a tensor, every number of which lies in the file: no view that is larger than what it shows."""
    return (isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized
            and value.numel() * value.element_size() <= value.untyped_storage().nbytes())
