"""A table that a person made, of JSON lines or comma-separated values, row by row with where each stands."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path

from machine.errors import InputError
from machine.regular_files import open_regular

LARGEST = 2**30                         # bytes
SEPARATORS = ",;\t"                     # of values; spreadsheets write the second in half of Europe


def read_table(file: Path) -> Iterator[tuple[str, dict]]:
    """("FILE, line N", {column: value}) of each row that is not blank, by the file's ending: .jsonl, or .csv, whose
    values are strings and whose first line names the columns. Raises InputError."""
    rows = json_rows if file.suffix == ".jsonl" else csv_rows
    for number, row in rows(file, text_of(file)):
        yield f"{file}, line {number}", row


def text_of(file: Path) -> str:
    try:
        with open_regular(file) as opened:
            content = opened.read(LARGEST + 1)
    except OSError as error:
        raise InputError(f"cannot read {file} ({error.strerror}); it must be a file that this user may read") from None
    if len(content) > LARGEST:
        raise InputError(f"{file} has more than {LARGEST >> 20} MB, which no such table has")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{file}, line {line}: not UTF-8 text; save it as UTF-8 (in Excel: 'CSV UTF-8')") from None


def json_rows(file: Path, text: str) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{file}, line {number}: not a line of JSON ({error}); each line is one object, as "
                             '{"text": "is red", ...}') from None
        if not isinstance(row, dict):
            raise InputError(f"{file}, line {number}: expected one object, as {{\"text\": \"is red\", ...}}, got "
                             f"{line.strip()[:60]}")
        yield number, row


def csv_rows(file: Path, text: str) -> Iterator[tuple[int, dict]]:
    header = text.partition("\n")[0]
    separator = max(SEPARATORS, key=header.count)                               # of equally frequent ones the comma
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        columns = [name.strip() for name in next(lines, [])]
        if twice := [name for name in columns if name and columns.count(name) > 1]:
            raise InputError(f"{file}, line 1: two columns are named {twice[0]!r}; rename one")
        after = lines.line_num
        for values in lines:
            number, after = after + 1, lines.line_num                           # where the row begins, and ends
            if not any(value.strip() for value in values):
                continue
            if len(values) != len(columns):
                raise InputError(f"{file}, line {number}: {len(values)} values for {len(columns)} columns; put a text "
                                 f"that holds a {separator!r} into quotes")
            yield number, dict(zip(columns, values, strict=True))
    except csv.Error as error:
        raise InputError(f"{file}, line {lines.line_num}: no comma-separated values ({error}); mend its quotes, or "
                         "save the table anew") from None
