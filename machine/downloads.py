"""Files of weights from elsewhere, fetched once: an address's into the folder where torch keeps such files, a Hugging
Face repository's into that library's cache, which other programs share."""

import hashlib
import http.client
import os
import re
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from machine.errors import first_line
from machine.offline import offline
from machine.tensor_files import SHARDS, parts

HASH = re.compile(r"-([a-f0-9]{8,})\.")         # of torchvision's file names: how their SHA-256 begins


def fetched(address: str, hashed: bool = False) -> Path:
    """The file at this address, kept where torch keeps such files. hashed: its name tells how its SHA-256 begins.

    Raises ValueError where it cannot be reached, breaks off, is not what its name says, or nothing is to be fetched:
    HF_HUB_OFFLINE counts for all that a name stands for.
    """
    path = kept_at(urllib.parse.urlparse(address).path.rpartition("/")[2])
    if path.exists():
        return path
    if offline():
        raise ValueError(f"HF_HUB_OFFLINE is set: get {address} and put it at {path}")
    begins = HASH.search(path.name) if hashed else None
    with download_errors(address, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(address, str(path), begins and begins[1], progress=True)
        if not begins and (size := path.stat().st_size) != size_at(address, size):  # torch believes what broke off
            path.unlink()
            raise RuntimeError("it broke off")
    return path


def size_at(address: str, unless_told: int) -> int:
    """Bytes of the file at this address."""
    with urllib.request.urlopen(urllib.request.Request(address, method="HEAD")) as answer:
        return int(answer.headers.get("Content-Length") or unless_told)


@contextmanager
def download_errors(address: str, path: Path) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:                                               # torch's, of another hash
        raise ValueError(f"what came from {address} is cut short or another file ({first_line(error)}): try again, or "
                         f"get it elsewhere and put it at {path}") from None
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(f"{first_line(error)}: get {address} elsewhere and put it at {path}") from None


def kept_at(name: str) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / name


def from_hub(repository: str, names: Sequence[str]) -> Path:
    """The first of these files that a repository has, whole or as the list of its parts, which then lie beside it.

    repository: OWNER/NAME, or OWNER/NAME@REVISION. As huggingface_hub has it: HF_ENDPOINT names another hub, HF_TOKEN
    opens what is gated, HF_HOME is where files are kept. A file put by hand where torch keeps its own, as
    OWNER--NAME--FILE, is taken too. Raises ValueError with what to do.
    """
    by_hand = kept_at(f"{repository.partition('@')[0].replace('/', '--')}--{names[0]}")
    if by_hand.exists():
        return by_hand
    for file in (form for name in names for form in (name, name + SHARDS)):
        if path := from_repository(repository, file, by_hand):
            for part in parts(path) if file.endswith(SHARDS) else ():
                if not from_repository(repository, part, by_hand):
                    raise ValueError(f"{repository} lacks {part}, a part of its {file}")
            return path
    raise ValueError(f"{address_of(repository)} has none of {', '.join(names)}"
                     + ("; HF_HUB_OFFLINE is set, so only this machine was searched" if offline() else "")
                     + f": get {address_of(repository, names[0])} and put it at {by_hand}")


def from_repository(repository: str, name: str, by_hand: Path) -> Path | None:
    """A file of a repository, by its checksum; None where it has none of this name."""
    import huggingface_hub
    from huggingface_hub import errors

    where, _, revision = repository.partition("@")

    def get(anew: bool = False) -> Path:
        return Path(huggingface_hub.hf_hub_download(where, name, revision=revision or None, local_files_only=offline(),
                                                    force_download=anew))
    elsewhere = f"or get {address_of(repository, name)} elsewhere and put it at {by_hand}"
    try:
        path = get()
        whole = matches_its_digest(path) or (not offline() and matches_its_digest(path := get(anew=True)))
    except errors.RemoteEntryNotFoundError:
        return None
    except errors.LocalEntryNotFoundError as error:
        if offline():
            return None
        raise ValueError(f"the hub cannot be reached ({first_line(error.__cause__ or error)}): try again, "
                         f"{elsewhere}") from None
    except errors.GatedRepoError:
        raise ValueError(f"{repository} is gated: accept its terms at {address_of(repository)}, then set HF_TOKEN to a "
                         f"token of yours, {elsewhere}") from None
    except errors.RepositoryNotFoundError:
        raise ValueError(f"the hub has no {repository}, or it is private: set HF_TOKEN to a token that may read it") \
            from None
    except Exception as error:                                                  # httpx', the file system's, xet's
        raise ValueError(f"{repository}/{name} did not arrive ({first_line(error)}): try again, {elsewhere}") from None
    if not whole:
        raise ValueError(f"{path} is damaged, its SHA-256 is not the hub's: remove it and try again, {elsewhere}")
    return path


def matches_its_digest(path: Path) -> bool:
    """Whether a file of the hub's cache is what its checksum says: large files lie there under their SHA-256."""
    digest = path.resolve().name
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        return True
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == digest


def address_of(repository: str, name: str = "") -> str:
    """Where a person finds a repository, or a file of it."""
    where, _, revision = repository.partition("@")
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    return f"{hub}/{where}" + (f"/resolve/{revision or 'main'}/{name}" if name else "")
