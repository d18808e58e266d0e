"""Whether a file of tensors declares no more than it holds, looked at before memory is taken for it."""

import os
import zipfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from machine.errors import InputError


def check_zip(path: str | Path) -> None:
    """Raises InputError for a zip file that unpacks to more than it is; other files are left to who reads them."""
    try:
        with open(path, "rb") as file:
            if file.read(2) != b"PK":
                return
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except OSError:                                                             # the reader says it better
        return
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise InputError(f"{path} is not a readable checkpoint ({error})") from None
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise InputError(f"{path} is none of this program's checkpoints: its content is compressed")
    if sum(entry.file_size for entry in entries) > os.path.getsize(path):
        raise InputError(f"{path} is none of this program's checkpoints: it declares more than it holds")


def check_tensors(tensors: Iterable[Tensor], path: str | Path) -> None:
    """Raises InputError where these, read from the file, are more than plain arrays of at most its size: a view can
    repeat a single number a million times."""
    total = 0
    for tensor in tensors:
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized or tensor.is_nested:
            raise InputError(f"{path} is none of this program's checkpoints: its weights are no plain arrays")
        total += tensor.numel() * tensor.element_size()
    if total > os.path.getsize(path):
        raise InputError(f"{path} is none of this program's checkpoints: it declares more than it holds")
