"""What is known of images beside their pixels: a user's table, kept in the index's list, shown and filtered by.

A filter is SQL of whoever asks. It sees one table, a copy in memory, and can tell true from false and no more.
"""

import json
import math
import os
import re
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from threading import Lock

from machine.checksums import digest
from machine.errors import InputError, first_line
from machine.file_names import Named, told_apart
from machine.streams import shown
from machine.text_files import read_table
from searching.image_list import ROWS_AT_ONCE, Doubtful, ImageList

FILE_NAME = "file_name"                 # the column of the images' names; where there is none, the first
LONGEST_CELL, MOST_COLUMNS = 1000, 100  # characters, also of a column's name
LONGEST_FILTER = 1000                   # characters
LONGEST_PATTERN = 200                   # bytes that LIKE and GLOB compare with
PATIENCE = 5                            # seconds that a filter may take
NUMBER = re.compile(r"[+-]?((0|[1-9]\d*)(\.\d*)?|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)  # 007 is a name
HALVES = re.compile("[\ud800-\udfff]")                                        # of characters
ID = '" "'                              # of images; a name that no column of a user's has
FUNCTIONS = frozenset(("abs", "coalesce", "glob", "ifnull", "instr", "length", "like", "lower", "ltrim", "max", "min",
                       "nullif", "round", "rtrim", "substr", "trim", "typeof", "upper"))

Cells = dict[str, str | int | float | None]


def read_metadata(file: Path) -> dict[str, Cells]:
    """File name -> {column: value} of each row, all with the same columns. Raises InputError."""
    rows, columns = {}, {}
    for where, row in read_table(file):
        named = FILE_NAME if FILE_NAME in row else next(iter(row), FILE_NAME)
        name = os.path.normpath(str(row.pop(named, "")).strip())
        if name in (".", "None"):
            raise InputError(f"{where}: no file name in the column {named}")
        if name in rows:
            raise InputError(f"{where}: a second row of {name}; remove one")
        rows[name] = {column: cell(value, f"{where}: {column}") for column, value in row.items() if column}
        columns |= dict.fromkeys(rows[name])
    if not rows:
        raise InputError(f"{file} has no row below the columns' names")
    if wrong := wrong_column(columns):
        raise InputError(f"{file} {wrong}")
    return {name: {**dict.fromkeys(columns), **row} for name, row in rows.items()}


def cell(value, where: str) -> str | int | float | None:
    """A table's value: a number where it is one, None where it is empty. Raises InputError."""
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, str):
        value = value.strip()
        if NUMBER.fullmatch(value) and is_cell(number := number_of(value)):
            return number
    value = None if value == "" else value
    if not is_cell(value):
        raise InputError(f"{where} is {str(value)[:40]!r}; expected a number, or a text of at most {LONGEST_CELL} "
                         "characters")
    return value


def number_of(text: str) -> int | float:
    return int(text) if text.lstrip("+-").isdigit() else float(text)


def is_cell(value) -> bool:
    """Whether it is one that SQLite and JSON keep as it is."""
    kind = type(value)
    return (value is None or (kind is str and len(value) <= LONGEST_CELL and not HALVES.search(value))
            or (kind is int and -2**63 <= value < 2**63) or (kind is float and math.isfinite(value)))


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
        if len(meant) == 1 and meant[0] not in found:
            found[meant[0]] = rows[name]
        else:
            left_out[name] = ("no image has this name" if not meant else f"another row is of {meant[0]}"
                              if len(meant) == 1 else f"several images have this name ({told_apart(meant[:2])})")
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
                raise Doubtful("its metadata's columns are none of ours")
            if number <= last or list(cells) != columns:
                raise Doubtful("its metadata's rows do not fit each other")
            last = number
            yield path, cells


def checked(path, content, noted) -> tuple[str, Cells]:
    """A row as it was written. Raises Doubtful."""
    if [type(path), type(content)] != [bytes, str] or noted != checksum(path, content):
        raise Doubtful("a row of its metadata is not what its checksum says")
    try:
        cells = json.loads(content)
    except (ValueError, RecursionError):
        raise Doubtful("a row of its metadata is no JSON") from None
    if not isinstance(cells, dict) or not all(map(is_cell, cells.values())):
        raise Doubtful("a row of its metadata is none of ours")
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


class Filter:
    """The metadata of all images, to be filtered; those without a row are NULL in every column.

    Several threads may ask, one at a time.
    """

    def __init__(self, images: ImageList):
        held, damaged = images.held()
        with images.telling():
            if damaged:
                raise Doubtful("an entry is not what its checksum says")
        rows = dict(kept(images))
        self.columns, self.lock = list(next(iter(rows.values()), ())), Lock()
        self.database = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
        texts = {name for name in self.columns if all(isinstance(cells[name], str | None) for cells in rows.values())}
        # A column of texts alone keeps them as they are, as 007; in another '12' is a number, however it is written.
        columns = "".join(f", {quoted(name)} {'TEXT' if name in texts else 'NUMERIC'}" for name in self.columns)
        self.database.execute(f"CREATE TABLE metadata ({ID} INTEGER PRIMARY KEY{columns})")
        none = dict.fromkeys(self.columns)
        self.database.execute("BEGIN")
        self.database.executemany(f"INSERT INTO metadata VALUES (?{', ?' * len(self.columns)})",
                                  ((number, *rows.get(path, none).values()) for path, (number, *_) in held.items()))
        self.database.execute("COMMIT")
        self.database.setlimit(sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, LONGEST_PATTERN)

    def images(self, where: str) -> list[int]:
        """Ids of those for which an SQL expression holds. Raises InputError for what is none, or may not be asked."""
        if not self.columns:
            raise InputError("this index has no metadata to filter by; search.py index --metadata FILE adds it")
        if len(where) > LONGEST_FILTER:
            raise InputError(f"the filter has {len(where):,} characters; shorten it to {LONGEST_FILTER:,}")
        with self.lock:
            end = time.monotonic() + PATIENCE
            self.database.set_progress_handler(lambda: time.monotonic() > end, 1000)
            self.database.set_authorizer(only_a_selection())
            try:
                return [number for number, in self.database.execute(f"SELECT {ID} FROM metadata WHERE (\n{where}\n)")]
            except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
                why = f"it takes over {PATIENCE} s" if "interrupted" in str(error) else first_line(error)
                raise InputError(f"cannot filter by {shown(where)} ({shown(why)}); write it as price < 50 AND colour "
                                 f"= 'red', with the columns {shown(', '.join(self.columns))[:1000]}") from None


def quoted(name: str) -> str:
    """A column's name in SQL."""
    return '"' + name.replace('"', '""') + '"'


def only_a_selection() -> Callable[..., int]:
    """What SQLite asks, as it reads a statement, of everything this would do: one selection from the table, with
    functions that cost nothing; no second selection, within or behind."""
    selections = []

    def allowed(action: int, first: str | None, second: str | None, *_) -> int:
        if action == sqlite3.SQLITE_SELECT:
            selections.append(action)
        fine = {sqlite3.SQLITE_SELECT: len(selections) == 1, sqlite3.SQLITE_READ: first == "metadata",
                sqlite3.SQLITE_FUNCTION: second in FUNCTIONS}.get(action, False)
        return sqlite3.SQLITE_OK if fine else sqlite3.SQLITE_DENY
    return allowed
