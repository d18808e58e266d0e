"""Text files that people made: line by line, as JSON, or as a table of JSON lines or comma-separated values.

Whatever is wrong with one is an InputError that says where it stands.
"""

import csv
import json
from collections.abc import Iterator
from io import BufferedReader
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from machine.errors import InputError
from machine.regular_files import open_regular

LONGEST_LINE = 10_000                   # bytes of a label file's line; published ones have a few hundred
LONGEST_ROW = 2**20                     # of a table's, which may list many files
SEPARATORS = ",;\t"                     # of values; spreadsheets write the second in half of Europe


def opened(file: Path) -> BinaryIO:
    try:
        return open_regular(file)
    except OSError as error:
        raise InputError(f"cannot read {file} ({error.strerror}); it must be a file that this user may read") from None


def decoded(file: Path, longest: int) -> Iterator[tuple[int, str]]:
    """(line number, line with its end) of each line of UTF-8, which has so many bytes at most."""
    with BufferedReader(opened(file)) as lines:
        for number, line in enumerate(lines, start=1):
            if len(line) > longest:
                raise InputError(f"{file}, line {number}: {len(line)} bytes long, {longest} are the most; this is no "
                                 "such file, or it is damaged")
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise InputError(f"{file}, line {number}: not UTF-8 text; save the file as UTF-8 (in Excel: 'CSV "
                                 "UTF-8')") from None


def read_lines(file: Path, longest: int = LONGEST_LINE) -> Iterator[tuple[int, str]]:
    """(line number, line) of each line that is not blank."""
    for number, line in decoded(file, longest):
        if line.strip():
            yield number, line.strip("\r\n")


def read_json(file: Path):
    with opened(file) as content:
        text = content.read()
    try:
        return json.loads(text)                                                 # also with a byte-order mark
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not valid JSON ({error}); download it again") from None


def read_table(file: Path) -> Iterator[tuple[str, dict]]:
    """("FILE, line N", {column: value}) of each row that is not blank, by the file's ending: .jsonl, or .csv, whose
    values are strings and whose first line names the columns."""
    for number, row in (json_rows if file.suffix == ".jsonl" else csv_rows)(file):
        yield f"{file}, line {number}", row


def json_rows(file: Path) -> Iterator[tuple[int, dict]]:
    for number, line in read_lines(file, LONGEST_ROW):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{file}, line {number}: not a line of JSON ({error}); each line is one object, as "
                             '{"text": "is red", ...}') from None
        if not isinstance(row, dict):
            raise InputError(f"{file}, line {number}: expected one object, as {{\"text\": \"is red\", ...}}, got "
                             f"{line.strip()[:60]}")
        yield number, row


def csv_rows(file: Path) -> Iterator[tuple[int, dict]]:
    lines = (line for _, line in decoded(file, LONGEST_ROW))
    header = next(lines, "")
    separator = max(SEPARATORS, key=header.count)                               # of equally frequent ones the comma
    rows = csv.reader(chain([header], lines), delimiter=separator, strict=True)
    try:
        columns = [name.strip() for name in next(rows, [])]
        if twice := [name for name in columns if name and columns.count(name) > 1]:
            raise InputError(f"{file}, line 1: two columns are named {twice[0]!r}; rename one")
        after = rows.line_num
        for values in rows:
            number, after = after + 1, rows.line_num                            # where the row begins, and ends
            if not any(value.strip() for value in values):
                continue
            if len(values) != len(columns):
                raise InputError(f"{file}, line {number}: {len(values)} values for {len(columns)} columns; put a text "
                                 f"that holds a {separator!r} into quotes")
            yield number, dict(zip(columns, values, strict=True))
    except csv.Error as error:
        raise InputError(f"{file}, line {rows.line_num}: no comma-separated values ({error}); mend its quotes, or "
                         "save the table anew") from None
