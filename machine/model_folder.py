"""A model as a folder that other programs can read: weights as safetensors, the rest as JSON, one checksum for both."""

import json
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

from torch import Tensor

from machine.checksums import chunks_of, digest
from machine.folder_lock import write_whole
from machine.tensor_files import Unreadable, read_safetensors, regular
from machine.text_files import read_json

WEIGHTS, RECORD = "model.safetensors", "model.json"
FORMAT = "composed image retrieval 1"
LARGEST_RECORD = 2**26                  # bytes; a word of the vocabulary takes about 20


def write(folder: Path, weights: dict[str, Tensor], record: dict) -> None:
    """The record comes last: without it, a folder is no model. Raises OSError, and TypeError or ValueError where the
    record holds what JSON does not."""
    from safetensors.torch import save

    content = save({name: value.detach().clone().contiguous() for name, value in weights.items()})  # none shared
    record = {"format": FORMAT, **record}
    told = json.dumps({**record, "checksum": checksum(record, [content])}, indent=1, allow_nan=False)
    write_whole(folder / WEIGHTS, content)
    write_whole(folder / RECORD, f"{told}\n".encode())


def read(folder: str | Path, glance: bool = False) -> dict:
    """The record, and beside it the weights under `model_state_dict`. Raises Unreadable, and InputError for what is no
    JSON.

    glance: the record alone, its checksum not verified.
    """
    weights, told = (regular_or_unreadable(Path(folder) / name) for name in (WEIGHTS, RECORD))
    if told.stat().st_size > LARGEST_RECORD:
        raise Unreadable(f"its {RECORD} is larger than any model's")
    record = read_json(told)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise Unreadable(f"its {RECORD} is none of this program's")
    if glance:
        return record
    with open(weights, "rb", buffering=0) as file:
        if record.pop("checksum", None) != checksum(record, chunks_of(file)):
            raise Unreadable(f"it is damaged: {WEIGHTS} and {RECORD} are not what the checksum says")
    return {**record, "model_state_dict": read_safetensors(weights)}


def regular_or_unreadable(path: Path) -> Path:
    try:
        return regular(path)
    except FileNotFoundError:
        raise Unreadable(f"it is a folder without {path.name}") from None


def checksum(record: dict, weights: Iterable) -> str:
    """Of the record's content, however it is laid out, and every byte of the weights."""
    return digest(chain([json.dumps(record).encode()], weights))
