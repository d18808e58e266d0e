"""A table that people made, row by row: comma-separated values, a spreadsheet program's own file, or JSON.

pandas reads the first two, imported where there is such a table; whatever is wrong with one is an InputError that says
where it stands.
"""

import io
import json
import logging
import re
import warnings
import zipfile
from bisect import bisect_right
from collections.abc import Iterator
from functools import cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from machine.errors import InputError, first_line
from machine.picture_files import SUFFIXES
from machine.streams import shown
from machine.text_files import opened

ENDINGS = (".jsonl", ".csv", ".tsv", ".ndjson", ".json", ".xlsx", ".ods", ".xls")
SPREADSHEETS = (b"PK\3\4", b"\xd0\xcf\x11\xe0")                                # how they begin, whatever they end in
LARGEST = 2**30                         # bytes; a spreadsheet's, too, unpacked or not
SEPARATORS = ",;\t"                     # of values; spreadsheets write the second in half of Europe
SEPARATOR_LINE = re.compile('"?sep=(.)"?[ ,;\t]*\n', re.IGNORECASE)            # of Excel's, above the header
QUOTED = re.compile('"[^"]*"')
BEYOND = 1000                           # values that a line may have more than the header; they must be blank
KEYS = {"file_name", "source_file_name"}                                        # one of which a header of ours has
INDEX = re.compile(r"\s*[0-9]*\s*")     # what pandas and R write into a first column without a name

log = logging.getLogger(__name__)


class Line(NamedTuple):
    """number: of the line, or spreadsheet's row, from 1, where the values begin."""
    number: int
    values: list[str]


def read_table(file: Path) -> Iterator[tuple[str, dict]]:
    """("FILE, line N", {column: value}) of each row that is not blank. Of a .json, .jsonl or .ndjson values are as they
    are there; of all else they are strings, and the first line that is not blank names the columns."""
    with opened(file) as content:
        start = content.read(4)
        if len(held := start + content.read(LARGEST)) > LARGEST:
            raise InputError(f"{file} has over {LARGEST // 2**20} MB; it is no such table, or split it")
    if file.suffix.lower() in (".json", ".jsonl", ".ndjson"):
        rows = json_rows(file, text_of(file, held))
    else:
        rows = named(file, sheet_lines(file, held) if start in SPREADSHEETS else text_lines(file, text_of(file, held)))
    for number, row in rows:
        yield f"{file}, line {number}", row


def text_of(file: Path, content: bytes) -> str:
    """UTF-8 or UTF-16, whose lines end in newlines, in carriage returns or in both, with newlines alone."""
    encoding = ("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-16-le" if content[1:4:2] == b"\0\0"
                else "utf-16-be" if content[0:3:2] == b"\0\0" else "utf-8-sig")
    try:
        return io.StringIO(content.decode(encoding), newline=None).read()
    except UnicodeDecodeError as error:
        before = content[:error.start].decode(encoding, "replace")
        raise InputError(f"{file}, line {len(io.StringIO(before + '.', newline=None).readlines())}: not UTF-8 text; "
                         "save the file as UTF-8 (in Excel: 'CSV UTF-8')") from None


def json_rows(file: Path, text: str) -> Iterator[tuple[int, dict]]:
    """Of objects that follow each other, or of one list of them."""
    lines = [newline.end() for newline in re.finditer("\n", text)]
    listed = file.suffix.lower() == ".json" and text.lstrip().startswith("[")
    decoder, between = json.JSONDecoder(), re.compile(r"[\s,\]]*" if listed else r"\s*")
    start = between.match(text, text.index("[") + 1 if listed else 0).end()
    try:
        if listed:
            json.loads(text)                                                    # that it is whole
        while start < len(text):
            row, end = decoder.raw_decode(text, start)
            number = bisect_right(lines, start) + 1
            if not isinstance(row, dict):
                raise InputError(f'{file}, line {number}: expected one object, as {{"text": "is red", ...}}, got '
                                 f"{shown(text[start:end][:60])}")
            yield number, row
            start = between.match(text, end).end()
    except (ValueError, RecursionError) as error:
        number = bisect_right(lines, getattr(error, "pos", start)) + 1
        raise InputError(f"{file}, line {number}: not a line of JSON ({first_line(error)}); each is one object, as "
                         '{"text": "is red", ...}') from None


def text_lines(file: Path, text: str) -> Iterator[Line]:
    """The lines of comma-separated values, or of those that another separator is between."""
    said = SEPARATOR_LINE.match(text)
    text = text[said.end():] if said else text
    number = 1 + bool(said)
    plain = QUOTED.sub("q", text).split("\n")
    header = next((line for line in plain if line.strip(" ,;\t")), "")
    if not header:
        return
    separator = said[1] if said else max(SEPARATORS, key=lambda each: (header.count(each), text.count(each)))
    widest, width = (1 + max(line.count(separator) for line in some) for some in (plain, [header]))
    if widest > width + BEYOND:
        raise InputError(f"{file} has a line of {widest} values, and {width} columns; put texts that hold a separator "
                         "into quotes")
    lines, pandas = CountedLines(text), library()
    try:                                # its other engine takes what follows a closing quote for the text's
        with warnings.catch_warnings(action="error", category=pandas.errors.ParserWarning):         # it cuts values off
            table = pandas.read_csv(lines, sep=separator, header=None, names=range(widest), index_col=False,
                                    dtype=object, na_filter=False, skip_blank_lines=False, engine="python")
    except (ValueError, pandas.errors.ParserWarning) as error:                  # a ParserError is the first
        raise InputError(f"{file}, line {lines.read + number - 1}: no comma-separated values ({first_line(error)}); "
                         "mend its quotes, or save the table anew") from None
    for values in table.where(table.notna(), "").values.tolist():               # a short line's last ones are none
        yield Line(number, values)
        number += 1 + "".join(values).count("\n")


def library():
    try:
        import pandas
        import python_calamine  # noqa: F401, by which it reads spreadsheets
    except ImportError:
        raise InputError("a table needs pandas and python-calamine: pip install -r requirements.txt") from None
    return pandas


class CountedLines(io.StringIO):
    """read: how many were."""
    read = 0

    def __next__(self) -> str:
        line = super().__next__()
        self.read += 1
        return line


def sheet_lines(file: Path, content: bytes) -> Iterator[Line]:
    """The rows of a spreadsheet's first sheet that has any."""
    pandas = library()
    try:
        if zipfile.is_zipfile(io.BytesIO(content)):
            with zipfile.ZipFile(io.BytesIO(content)) as parts:
                if sum(part.file_size for part in parts.infolist()) > LARGEST:
                    raise ValueError(f"over {LARGEST // 2**20} MB unpacked")
        sheets = pandas.read_excel(io.BytesIO(content), sheet_name=None, header=None, dtype=object, na_filter=False,
                                   engine="calamine")
    except Exception as error:                                                  # there is no end to what may be in one
        raise InputError(f"{file}: no spreadsheet that can be read ({first_line(error)}); save it anew as .xlsx, or as "
                         "CSV UTF-8") from None
    filled = [name for name, sheet in sheets.items() if len(sheet)]
    if len(filled) > 1:
        say(f"note: of {file} the sheet {filled[0]!r} is read, not {', '.join(map(repr, filled[1:]))}")
    for number, values in enumerate(sheets[filled[0]].values.tolist() if filled else (), start=1):
        yield Line(number, list(map(cell_text, values)))


def cell_text(value) -> str:
    """A spreadsheet's cell as a table of text has it: a date as 2026-12-01, true as 1."""
    return str(int(value) if isinstance(value, bool) else value).removesuffix(" 00:00:00")


@cache
def say(line: str) -> None:
    """Once, though a run reads a table several times."""
    log.warning("%s", line)


def named(file: Path, lines: Iterator[Line]) -> Iterator[tuple[int, dict]]:
    """The rows, {column: value}, below the first line that is not blank, which names the columns. One without a name
    has no values, but where it comes first and counts the rows."""
    lines = (line for line in lines if any(map(str.strip, line.values)))
    head, first = next(lines, Line(1, [])), next(lines, None)
    columns = [" ".join(name.split()) for name in head.values]
    known, where = list(filter(None, columns)), f"{file}, line {head.number}"
    if twice := [name for name in known if known.count(name) > 1]:
        raise InputError(f"{where}: two columns are named {shown(twice[0])!r}; rename one")
    if picture := [name for name in known if name.lower().endswith(SUFFIXES)]:
        raise InputError(f"{where} names no column, it has the picture {shown(picture[0])}; write the columns' names "
                         "above it")
    if first and KEYS.intersection(first.values) and not KEYS.intersection(known):
        raise InputError(f"{where} names no column, line {first.number} does; remove what is above that")
    nameless = [place for place, name in enumerate(columns) if not name]
    for number, values in chain([first] if first else (), lines):
        for place in nameless:
            if values[place].strip() and not (place == 0 and INDEX.fullmatch(values[0])):
                raise InputError(f"{file}, line {number}: line {head.number} names no column for value {place + 1}, "
                                 f"{shown(values[place])[:40]!r}; write its name there, or put a text that holds a "
                                 "separator into quotes")
        yield number, {name: value for name, value in zip(columns, values, strict=True) if name}
