"""Which images a filter leaves: SQL of whoever asks, on what a user's table says of them.

A filter sees one table, a copy in memory, and can tell true from false and no more. SQLite puts all texts above all
numbers; here no comparison of a text with a number holds.
"""

import json
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from threading import Lock

from machine.errors import InputError, first_line
from machine.streams import shown
from searching.image_list import ImageList, InvalidIndex
from searching.metadata import Cells, kept
from searching.numbers import Kind, is_number

LONGEST_FILTER = 1000                   # characters
LONGEST_PATTERN = 200                   # bytes that LIKE and GLOB compare with
PATIENCE = 5                            # seconds that a filter may take
ID, CELLS = '" "', '"  "'               # an image's, and all of its; names that no column of a user's has
FUNCTIONS = frozenset(("abs", "coalesce", "glob", "ifnull", "instr", "length", "like", "lower", "ltrim", "max", "min",
                       "nullif", "round", "rtrim", "substr", "trim", "typeof", "upper"))


class Filter:
    """The metadata of all images, to be filtered; those without a row are NULL in every column.

    A column of numbers that holds a few words has them in a column of its own, beside its numbers: no comparison with a
    number sees them. Several threads may ask, one at a time.
    """

    def __init__(self, images: ImageList):
        held, damaged = images.held()
        with images.errors_in_one_line():
            if damaged:
                raise InvalidIndex("an entry is not what its checksum says")
        rows = dict(kept(images))
        self.columns, self.lock = list(next(iter(rows.values()), ())), Lock()
        self.kinds = {name: Kind.of(cells[name] for cells in rows.values()) for name in self.columns}
        self.database = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
        # A column of texts alone keeps them as they are, as 007; in another '12' is a number, however it is written.
        columns = "".join(f", {quoted(name)} {'NUMERIC' if kind.numbers else 'TEXT'}, {quoted(both(name))} NUMERIC"
                          for name, kind in self.kinds.items())
        self.database.execute(f"CREATE TABLE metadata ({ID} INTEGER PRIMARY KEY, {CELLS} TEXT{columns})")
        self.database.execute("BEGIN")
        self.database.executemany(f"INSERT INTO metadata VALUES (?, ?{', ?, ?' * len(self.columns)})",
                                  ((number, *self.row(rows.get(path))) for path, (number, *_) in held.items()))
        self.database.execute("COMMIT")
        self.database.setlimit(sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, LONGEST_PATTERN)

    def row(self, cells: Cells | None) -> Iterator:
        yield json.dumps(cells or {})
        for name, kind in self.kinds.items():
            value = (cells or {}).get(name)
            yield value if is_number(value) or not kind.numbers else None
            yield value if kind.numbers and kind.text else None

    def images(self, where: str) -> list[int]:
        """Ids of those for which an SQL expression holds. Raises InputError for what is none, or may not be asked."""
        if not self.columns:
            raise InputError("this index has no metadata to filter by; search.py index --metadata FILE adds it")
        if len(where) > LONGEST_FILTER:
            raise InputError(f"the filter has {len(where):,} characters; shorten it to {LONGEST_FILTER:,}")
        understood = reader()
        with self.lock:
            end = time.monotonic() + PATIENCE
            self.database.set_progress_handler(lambda: time.monotonic() > end, 1000)
            try:
                self.selected(where, "EXPLAIN")                                 # SQLite says what is wrong with it
                asked = understood(where, self.kinds, lambda name: quoted(both(name)))
                return [number for number, in self.selected(asked)]
            except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
                why = f"it takes over {PATIENCE} s" if "interrupted" in str(error) else first_line(error)
                raise InputError(f"cannot filter by {shown(where)} ({shown(why)}); write it as price < 50 AND colour "
                                 f"= 'red', with the columns {shown(', '.join(self.columns))[:1000]}") from None

    def selected(self, where: str, before: str = "") -> sqlite3.Cursor:
        self.database.set_authorizer(only_a_selection())
        return self.database.execute(f"{before} SELECT {ID} FROM metadata WHERE (\n{where}\n)")

    def cells(self, images: Sequence[int]) -> dict[int, Cells]:
        """The metadata that is filtered by, though the list may have changed since."""
        with self.lock:
            self.database.set_authorizer(None)
            self.database.set_progress_handler(None, 0)
            asked = f"SELECT {CELLS} FROM metadata WHERE {ID} = ?"
            found = {image: self.database.execute(asked, (image,)).fetchone() for image in images}
            return {image: json.loads(row[0]) for image, row in found.items() if row}


def reader() -> Callable[..., str]:
    """Of conditions, imported where there is one: it takes a quarter of a second."""
    try:
        from searching.condition import understood
    except ImportError:
        raise InputError("a filter needs sqlglot: pip install -r requirements-search.txt") from None
    return understood


def both(name: str) -> str:
    """The column of a column's numbers and words; no user's ends in a blank."""
    return name + " "


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
