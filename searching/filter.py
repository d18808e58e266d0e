"""Which images a filter leaves: SQL of whoever asks, on what a user's table says of them.

A filter sees one table, a copy in memory, and can tell true from false and no more. SQLite puts all texts above all
numbers; here no comparison of a text with a number holds.
"""

import json
import re
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from threading import Lock
from typing import NamedTuple

from machine.errors import InputError, first_line
from machine.streams import shown
from searching.image_list import ImageList, InvalidIndex
from searching.metadata import Cells, kept
from searching.numbers import is_number

LONGEST_FILTER = 1000                   # characters
LONGEST_PATTERN = 200                   # bytes that LIKE and GLOB compare with
PATIENCE = 5                            # seconds that a filter may take
ID, CELLS = '" "', '"  "'               # an image's, and all of its; names that no column of a user's has
FUNCTIONS = frozenset(("abs", "coalesce", "glob", "ifnull", "instr", "length", "like", "lower", "ltrim", "max", "min",
                       "nullif", "round", "rtrim", "substr", "trim", "typeof", "upper"))
TOKENS = re.compile(r"""(?P<blank>\s+|--[^\n]*|/\*.*?\*/) | (?P<text>'(?:[^']|'')*')
                        | (?P<number>(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)
                        | (?P<name>"(?:[^"]|"")*"|`[^`]*`|\[[^]]*]|[^\W\d][\w$]*) | (?P<mark>[<>=!]=|<>|\|\||.)""",
                    re.VERBOSE | re.DOTALL | re.IGNORECASE)
ORDERED, EQUAL = {"<", "<=", ">", ">=", "<>", "!=", "between"}, {"=", "==", "is", "in"}
ANY = {"like", "glob", "isnull", "notnull", "not", "null"}                      # what is asked of numbers and of words
SUMS = {"+", "-", "*", "/", "%", "abs", "round"}
COUNTING, PASSING = {"abs", "round", "length", "instr"}, {"lower", "upper", "trim", "ltrim", "rtrim"}  # functions


class Kind(NamedTuple):
    """What a column holds: numbers, texts, or both; text: one of them."""
    numbers: bool
    text: str | None


class Token(NamedTuple):
    """kind: text, number, name, mark, or blank; word: in small letters, a name without its quotes."""
    kind: str
    word: str
    start: int
    end: int


A_NUMBER = Token("number", "", 0, 0)


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
        self.kinds = {name: kind_of(cells[name] for cells in rows.values()) for name in self.columns}
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
        with self.lock:
            end = time.monotonic() + PATIENCE
            self.database.set_progress_handler(lambda: time.monotonic() > end, 1000)
            self.database.set_authorizer(only_a_selection())
            try:
                asked = understood(where, self.kinds)
                return [number for number, in self.database.execute(f"SELECT {ID} FROM metadata WHERE (\n{asked}\n)")]
            except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
                why = f"it takes over {PATIENCE} s" if "interrupted" in str(error) else first_line(error)
                raise InputError(f"cannot filter by {shown(where)} ({shown(why)}); write it as price < 50 AND colour "
                                 f"= 'red', with the columns {shown(', '.join(self.columns))[:1000]}") from None

    def cells(self, images: Sequence[int]) -> dict[int, Cells]:
        """The metadata that is filtered by, though the list may have changed since."""
        with self.lock:
            self.database.set_authorizer(None)
            self.database.set_progress_handler(None, 0)
            asked = f"SELECT {CELLS} FROM metadata WHERE {ID} = ?"
            found = {image: self.database.execute(asked, (image,)).fetchone() for image in images}
            return {image: json.loads(row[0]) for image, row in found.items() if row}


def kind_of(values: Iterator) -> Kind:
    found = set(values) - {None}
    return Kind(any(map(is_number, found)), next((value for value in found if isinstance(value, str)), None))


def both(name: str) -> str:
    """The column of a column's numbers and words; no user's ends in a blank."""
    return name + " "


def understood(where: str, kinds: dict[str, Kind]) -> str:
    """The condition, with the words of a column of numbers where it is compared with texts. Raises ValueError where
    texts alone are compared with a number, or numbers alone with a text."""
    names, tokens, asked, last = {name.lower(): name for name in kinds}, list(read_tokens(where)), "", 0
    counted = {name for name, found in names.items() if kinds[found].numbers} | COUNTING
    for place, token in enumerate(tokens):
        name = names.get(token.word) if token.kind == "name" else None
        kind = kinds[name] if name else Kind(False, None)
        for operator, other in compared(tokens, place) if name else ():
            a_number = other.kind == "number" or (other.kind == "name" and other.word in counted)
            a_text = other.kind == "text" and (operator in EQUAL or not reads_as_number(other.word))
            if a_number and not kind.numbers and kind.text:
                raise ValueError(f"{name} holds texts, as {kind.text[:40]!r}, which no number can be compared with")
            if a_text and not kind.text and kind.numbers and not reads_as_number(other.word):
                raise ValueError(f"{name} holds numbers, which no text can be compared with")
            if kind.numbers and kind.text and (a_text or operator in ANY):
                asked, last = asked + where[last:token.start] + quoted(both(name)), token.end
                break
    return asked + where[last:]


def compared(tokens: list[Token], place: int) -> Iterator[tuple[str, Token]]:
    """What stands beside a column, with the operator between."""
    def at(place: int) -> Token:
        return tokens[place] if 0 <= place < len(tokens) else Token("", "", 0, 0)
    left, right = place - 1, place + 1
    while at(left).word == "(" and at(right).word == ")" and at(left - 1).word not in FUNCTIONS - PASSING:
        left, right = left - 1 - (at(left - 1).word in PASSING), right + 1
    if at(left).word in SUMS or (at(left).word == "(" and at(left - 1).word in SUMS):
        yield at(left).word, A_NUMBER
    elif at(left).word in ORDERED | EQUAL and at(left).kind == "mark":
        yield at(left).word, at(left - 1)
    right += at(right).word == "not" and at(right + 1).word != "null"
    operator, right = at(right).word, right + 1
    if operator in SUMS:
        yield operator, A_NUMBER
    elif operator == "in":
        while at(right).word not in ("", ")"):
            yield operator, at(right)
            right += 1
    elif operator in ORDERED | EQUAL:
        while at(right).word in ("(", "+", "-"):
            right += 1
        yield "null" if at(right).word in ("not", "null") else operator, at(right)
    elif operator in ANY:
        yield operator, at(right)


def reads_as_number(text: str) -> bool:
    """Whether SQLite takes a text, in its quotes, for a number beside one."""
    return re.fullmatch(r"'\s*[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?\s*'", text, re.ASCII | re.IGNORECASE) is not None


def read_tokens(where: str) -> Iterator[Token]:
    for found in TOKENS.finditer(where):
        if found.lastgroup != "blank":
            word = found[0].lower()
            word = word[1:-1].replace(word[0] * 2, word[0]) if word[0] in '"`[' else word
            yield Token(found.lastgroup, word, *found.span())


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
