"""Text files that people made: line by line, or as JSON.

Whatever is wrong with one is an InputError that says where it stands.
"""

import json
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

from machine.errors import InputError
from machine.regular_files import open_regular

LONGEST_LINE = 10_000                   # bytes of a label file's line; published ones have a few hundred


def opened(file: Path) -> BinaryIO:
    try:
        return open_regular(file)
    except OSError as error:
        raise InputError(f"cannot read {file} ({error.strerror}); it must be a file that this user may read") from None


def read_lines(file: Path) -> Iterator[tuple[int, str]]:
    """(line number, line) of each line of UTF-8 that is not blank."""
    with BufferedReader(opened(file)) as lines:
        for number, line in enumerate(lines, start=1):
            if len(line) > LONGEST_LINE:
                raise InputError(f"{file}, line {number}: {len(line)} bytes long, {LONGEST_LINE} are the most; this is "
                                 "no such file, or it is damaged")
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise InputError(f"{file}, line {number}: not UTF-8 text; save the file as UTF-8") from None
            if text.strip():
                yield number, text.strip("\r\n")


def read_json(file: Path):
    with opened(file) as content:
        text = content.read()
    try:
        return json.loads(text)                                                 # also with a byte-order mark
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not valid JSON ({error}); download it again") from None


def read_entries(file: Path) -> Iterator[tuple[str, object]]:
    """("FILE, entry N", entry) of each entry of a JSON list, N from 1; what is no list is one entry."""
    content = read_json(file)
    for number, entry in enumerate(content if isinstance(content, list) else [content], start=1):
        yield f"{file}, entry {number}", entry
