"""What is known of images beside their pixels: a user's table, kept in the index's list."""

import json
import logging
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from machine import processes
from machine.checksums import digest
from machine.errors import InputError
from machine.file_names import Named, spelled_out
from machine.streams import shown
from machine.tables import read_table
from searching.image_list import ROWS_AT_ONCE, ImageList, InvalidIndex
from searching.numbers import Cell, is_number, read_column

FILE_NAME = "file_name"                 # the column of the images' names; where there is none, the first
LONGEST_CELL, MOST_COLUMNS = 1000, 100  # characters, also of a column's name
HALVES = re.compile("[\ud800-\udfff]")                                        # of characters
Cells = dict[str, Cell]

log = logging.getLogger(__name__)


def read_metadata(file: Path) -> dict[str, Cells]:
    """File name -> {column: value} of each row, all with the same columns. Raises InputError."""
    placed_rows, columns = defaultdict(list), {}
    for where, row in read_table(file):
        named = FILE_NAME if FILE_NAME in row else next(iter(row), FILE_NAME)
        name = os.path.normpath(str(row.pop(named, "")).strip())
        if name in (".", "None"):
            raise InputError(f"{where}: no file name in the column {named}")
        cells = {column: cell(value, f"{where}: {column}") for column, value in row.items() if column}
        placed_rows[name].append((where, cells))
        columns |= dict.fromkeys(cells)
    if not placed_rows:
        raise InputError(f"{file} has no row below the columns' names")
    if wrong := wrong_column(columns):
        raise InputError(f"{file} {wrong}")
    rows = {name: several[0][1] for name, several in placed_rows.items()}
    if others := [(where, name) for name, several in placed_rows.items() for where, cells in several[1:]
                  if any(cells.get(column) != rows[name].get(column) for column in columns)]:
        more = f", and {len(others) - 1} more such rows, as {others[1][0]}" if len(others) > 1 else ""
        raise InputError(f"{others[0][0]}: a second row of {others[0][1]}, which differs{more}; keep one of each")
    read = {name: read_column(name, [cells.get(name) for cells in rows.values()]) for name in columns}
    for column in read.values():
        if column.note and processes.first():
            log.warning("note: %s: %s", file, column.note)
    return {name: {column: found.cells[number] for column, found in read.items()} for number, name in enumerate(rows)}


def cell(value, where: str) -> Cell:
    """A table's value, without blanks around it; None where it is empty. Raises InputError."""
    value = value.strip() or None if isinstance(value, str) else int(value) if isinstance(value, bool) else value
    if not is_cell(value):
        raise InputError(f"{where} is {str(value)[:40]!r}; expected a number, or a text of at most {LONGEST_CELL} "
                         "characters")
    return value


def is_cell(value) -> bool:
    """Whether it is one that SQLite and JSON keep as it is."""
    return value is None or is_number(value) or (
        type(value) is str and len(value) <= LONGEST_CELL and not HALVES.search(value))


def wrong_column(columns: Iterable[str]) -> str:
    """What is wrong with the columns' names; empty where nothing is."""
    if len(folded := [name.lower() for name in columns]) > MOST_COLUMNS:
        return f"has {len(folded)} columns; {MOST_COLUMNS} are the most"
    for number, name in enumerate(columns):
        if not name.isprintable() or name != name.strip() or not 0 < len(name) <= LONGEST_CELL:
            return f"has a column {shown(name)[:40]!r}; give it a name of letters"
        if folded[number] in folded[:number]:
            return f"has two columns {name!r}, large and small letters being the same; rename one"
    return ""


def placed(rows: dict[str, Cells], paths: Iterable[str]) -> tuple[dict[str, Cells], dict[str, str]]:
    """Of a gallery's paths, those that a row names: by the path, or by the bare name where one image alone has it, or
    by what looks the same as either; and the other rows' names, with why they are left out."""
    paths = list(paths)
    whole, bare = (Named((name(path), path) for path in paths) for name in (str, os.path.basename))
    found = {path: rows[path] for path in paths if path in rows}
    left_out = {}
    for name in [name for name in rows if name not in found]:
        meant = whole.find(name) or bare.find(name)
        if len(meant) == 1 and found.setdefault(meant[0], rows[name]) == rows[name]:
            continue
        left_out[name] = ("no image has this name" if not meant else f"another row is of {meant[0]}"
                          if len(meant) == 1 else f"several images have this name ({spelled_out(meant[:2])})")
    return found, left_out


def checksum(path: bytes, content: str) -> str:
    return digest([path, b"\0", content.encode()])


def keep(images: ImageList, rows: dict[str, Cells]) -> None:
    """In the place of what the list held."""
    texts = [(os.fsencode(path), json.dumps(cells)) for path, cells in rows.items()]
    with images.changing() as database:
        database.execute("DELETE FROM metadata")
        database.executemany("INSERT INTO metadata VALUES (?, ?, ?)", [(*row, checksum(*row)) for row in texts])


def kept(images: ImageList, where: str = "true", values: Sequence = ()) -> Iterator[tuple[str, Cells]]:
    """Path and metadata of each row. Raises InputError where the list is damaged."""
    with images.opened() as (database, has):
        last, columns = 0, None
        for number, *row in database.execute(f"SELECT rowid, path, cells, checksum FROM metadata WHERE {where} ORDER "
                                             "BY rowid", values) if has.metadata else ():
            path, cells = checked(*row)
            if columns is None and wrong_column(columns := list(cells)):
                raise InvalidIndex("its metadata's columns are none of ours")
            if number <= last or list(cells) != columns:
                raise InvalidIndex("its metadata's rows do not fit each other")
            last = number
            yield path, cells


def checked(path, content, noted) -> tuple[str, Cells]:
    """A row as it was written. Raises InvalidIndex."""
    if [type(path), type(content)] != [bytes, str] or noted != checksum(path, content):
        raise InvalidIndex("a row of its metadata is not what its checksum says")
    try:
        cells = json.loads(content)
    except (ValueError, RecursionError):
        raise InvalidIndex("a row of its metadata is no JSON") from None
    if not isinstance(cells, dict) or not all(map(is_cell, cells.values())):
        raise InvalidIndex("a row of its metadata is none of ours")
    return os.fsdecode(path), cells


def columns_of(images: ImageList) -> list[str]:
    return next((list(cells) for _, cells in kept(images, "rowid = (SELECT min(rowid) FROM metadata)")), [])


def metadata_of(images: ImageList, paths: Sequence[str]) -> dict[str, Cells]:
    """Of those of these images that have a row."""
    found, names = {}, [os.fsencode(path) for path in paths]
    for start in range(0, len(names), ROWS_AT_ONCE):
        part = names[start:start + ROWS_AT_ONCE]
        found |= kept(images, f"path IN ({','.join('?' * len(part))})", part)
    return found
