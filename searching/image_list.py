"""The list of an index's images: an SQLite file, checked before it is believed, whoever made it.

Its schema is exactly ours, no row is believed that its checksum does not fit, and whoever only asks cannot change it.
A process killed at any moment leaves whole entries.
"""

import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from machine.checksums import digest
from machine.errors import InputError
from machine.file_names import looks
from machine.picture_files import ALWAYS, HEIF
from machine.regular_files import open_own
from machine.streams import shown

MODEL, IMAGES = "model.pth", "images.sqlite"                                    # of an index's files
ROWS_AT_ONCE = 10_000                   # of features, in reading them all
SMALLEST_ROW = 16                       # bytes of the file that an image takes at the very least
SUPER_JOURNAL = bytes.fromhex("d9d505f920a163d7")                               # ends a journal that names another file
# folder: one row; path: where the images were last; changes: of the list so far; beside: the path from the index.
# images: content: the checksum of the file.
SCHEMA = ("CREATE TABLE folder (path BLOB, changes INT, checksum TEXT, beside BLOB)",
          "CREATE TABLE images (id INTEGER PRIMARY KEY AUTOINCREMENT, path BLOB UNIQUE, bytes INT, modified_ns INT, "
          "feature BLOB, checksum TEXT, content TEXT)",
          # The index's other files; changes: of the list, when they were made.
          "CREATE TABLE files (name TEXT PRIMARY KEY, checksum TEXT, changes INT)",
          # What a user's table says of images; cells: JSON, the same columns in every row.
          "CREATE TABLE metadata (path BLOB PRIMARY KEY, cells TEXT, checksum TEXT)")
SINCE_METADATA = (SCHEMA[3], "ALTER TABLE folder ADD COLUMN beside BLOB", "ALTER TABLE images ADD COLUMN content TEXT")
BEFORE_METADATA = ("CREATE TABLE folder (path BLOB, changes INT, checksum TEXT)", "CREATE TABLE images (id INTEGER "
                   "PRIMARY KEY AUTOINCREMENT, path BLOB UNIQUE, bytes INT, modified_ns INT, feature BLOB, checksum "
                   "TEXT)", SCHEMA[2])
BEFORE_CHECKSUMS = ("CREATE TABLE folder (path BLOB)", "CREATE TABLE images (id INTEGER PRIMARY KEY AUTOINCREMENT, "
                    "path BLOB UNIQUE, bytes INT, modified_ns INT, feature BLOB)")


class Columns(NamedTuple):
    """What older lists lack."""
    checksums: bool
    metadata: bool                      # and all else of SINCE_METADATA


class FolderRow(NamedTuple):
    """The list's folder, how many changes it has seen, and the folder's path from the index, None in older lists."""
    path: bytes
    changes: int
    beside: bytes | None


class InvalidIndex(ValueError):
    """A row that is not what was written, or nothing that we would write."""


@dataclass
class Entry:
    """An image: its path below the folder, its file's version (bytes, time of change in ns), its feature's bytes, its
    file's checksum, None where that was never noted."""
    number: int
    path: str
    version: tuple[int, int]
    feature: bytes
    content: str | None


class Held(NamedTuple):
    """What says whether an image's file is still the one that was encoded."""
    number: int
    version: tuple[int, int]
    content: str | None


@cache
def schema(tables: Sequence[str]) -> frozenset[tuple]:
    """What SQLite notes of these tables."""
    with closing(sqlite3.connect(":memory:")) as database:
        for table in tables:
            database.execute(table)
        return frozenset(database.execute("SELECT type, name, tbl_name, sql FROM sqlite_master"))


def checksum(number: int, path: bytes, length: int, modified: int, feature: bytes, content: str | None) -> str:
    return digest([b"%d %d %d " % (number, length, modified), path, b"\0", feature, (content or "").encode()])


def folder_checksum(path: bytes, changes: int, beside: bytes | None = None) -> str:
    return digest([path, b"\0%d" % changes, b"" if beside is None else b"\0" + beside])


def lies_below(path: bytes) -> bool:
    """Whether it could be an image's below a folder: neither absolute nor leading out, with an image's ending."""
    return (not path.startswith(b"/") and b"\0" not in path and b".." not in path.split(b"/")
            and path.lower().endswith(tuple(map(str.encode, ALWAYS + HEIF))))


def checked(row: tuple) -> Entry:
    """(id, path, bytes, modified_ns, feature, content, checksum or None where there are none) as an entry. Raises
    InvalidIndex."""
    number, path, length, modified, feature, content, noted = row
    kinds = [type(value) for value in row[:5]]
    if (kinds != [int, bytes, int, int, bytes] or number < 1 or len(feature) % 4 or not feature
            or not isinstance(content, str | None)):
        raise InvalidIndex("an entry is of the wrong kind")
    if not lies_below(path):
        raise InvalidIndex(f"its path {os.fsdecode(path)!r} is none of an image in the folder")
    if noted is not None and noted != checksum(number, path, length, modified, feature, content):
        raise InvalidIndex("an entry is not what its checksum says")
    return Entry(number, os.fsdecode(path), (length, modified), feature, content)


class ImageList:
    """The images of an index. All that is asked raises InputError where the file is damaged, or none of ours.

    An id is never given twice, so that a ranking older than the list names no wrong image.
    """

    def __init__(self, path: Path):
        self.path = path

    @contextmanager
    def opened(self, mode: str = "ro") -> Iterator[tuple[sqlite3.Connection, Columns]]:
        """A connection to the list, with its schema checked, and what it has; mode: ro, rw, or rwc to make a new
        one."""
        address = f"{self.path.absolute().as_uri()}?mode={mode}"
        with (self.errors_in_one_line(),
              closing(sqlite3.connect(address, timeout=30, uri=True, isolation_level=None)) as database):
            database.execute("PRAGMA trusted_schema = OFF")
            found = frozenset(database.execute("SELECT type, name, tbl_name, sql FROM sqlite_master LIMIT 20"))
            if mode == "rwc" and not found:
                with database:
                    database.execute("BEGIN IMMEDIATE")
                    for table in SCHEMA:
                        database.execute(table)
                found = schema(SCHEMA)
            if found not in (schema(SCHEMA), schema(BEFORE_METADATA), schema(BEFORE_CHECKSUMS)):
                raise InvalidIndex("its tables are none of ours")
            yield database, Columns(found != schema(BEFORE_CHECKSUMS), found == schema(SCHEMA))

    @contextmanager
    def errors_in_one_line(self) -> Iterator[None]:
        """What SQLite complains of, and what is doubtful, in a user's words."""
        try:
            yield
        except InvalidIndex as doubt:
            raise InputError(f"{self.path} is damaged, or none of this program's ({doubt}); remove "
                             f"{self.path.parent} and make it again with search.py index") from None
        except sqlite3.Error as error:
            kind = getattr(error, "sqlite_errorname", None) or ""
            if kind.startswith("SQLITE_BUSY"):
                said = f"{self.path} is being changed by another process; try it again"
            elif kind == "SQLITE_READONLY_ROLLBACK" or (kind.startswith("SQLITE_CANTOPEN") and self.journal().exists()):
                said = f"{self.path} is in the middle of a change that was stopped; search.py index goes on"
            elif kind.startswith(("SQLITE_FULL", "SQLITE_IOERR", "SQLITE_READONLY", "SQLITE_CANTOPEN")):
                said = f"cannot use {self.path} ({shown(error)}); make room, or see that it may be read and written"
            else:
                said = (f"{self.path} is damaged ({shown(error)}); remove {self.path.parent} and make it again with "
                        "search.py index")
            raise InputError(said) from None

    def journal(self) -> Path:
        return Path(f"{self.path}-journal")

    @contextmanager
    def changing(self, folder: Path | None = None) -> Iterator[sqlite3.Connection]:
        """A transaction that changes the list, whole or not at all; folder: where the images lie from now on."""
        with self.opened("rw") as (database, has), database:
            database.execute("BEGIN IMMEDIATE")
            row = self.folder_row(database, has)
            self.note_folder(database, FolderRow(os.fsencode(folder) if folder else row.path, row.changes + 1,
                                                 self.beside(folder) if folder else row.beside))
            yield database

    @staticmethod
    def note_folder(database: sqlite3.Connection, row: FolderRow) -> None:
        database.execute("DELETE FROM folder")
        database.execute("INSERT INTO folder (path, changes, beside, checksum) VALUES (?, ?, ?, ?)",
                         (*row, folder_checksum(*row)))

    def beside(self, folder: Path) -> bytes:
        """The folder's path from the index, which stays as it is where both are moved together."""
        return os.fsencode(os.path.relpath(folder, os.path.realpath(self.path.parent)))

    def create(self, folder: Path) -> bool:
        """Make the list where there is none, of this folder; add to an older one what it lacks. Whether it had no
        checksums. Raises InputError where it may not be written to.
        """
        if self.journal().exists() and self.journal().read_bytes()[-8:] == SUPER_JOURNAL:
            raise InputError(f"{self.journal()} is none of this program's; remove it")
        try:
            os.close(open_own(self.path))                                       # SQLite lets none but its user write
        except OSError as error:
            raise InputError(f"cannot use {self.path} ({error.strerror or error}); see that it may be written "
                             "to") from None
        with self.opened("rwc") as (database, has), database:
            database.execute("BEGIN IMMEDIATE")
            if not has.checksums:
                self.add_checksums(database)
            elif not has.metadata:
                for change in SINCE_METADATA:
                    database.execute(change)
            if not database.execute("SELECT 1 FROM folder").fetchone():
                self.note_folder(database, FolderRow(os.fsencode(folder), 0, self.beside(folder)))
        return not has.checksums

    def add_checksums(self, database: sqlite3.Connection) -> None:
        """To a list that was made before there were any."""
        row = self.folder_row(database, Columns(False, False))
        last = database.execute("SELECT seq FROM sqlite_sequence WHERE name = 'images'").fetchone()
        database.execute("DROP TABLE folder")
        database.execute("ALTER TABLE images RENAME TO older")
        for table in SCHEMA:
            database.execute(table)
        self.note_folder(database, row)
        for row in database.execute("SELECT id, path, bytes, modified_ns, feature, NULL, NULL FROM older ORDER BY id"):
            checked(row)
            self.insert(database, row[:6])
        database.execute("DROP TABLE older")
        if last and isinstance(last[0], int):
            database.execute("UPDATE sqlite_sequence SET seq = max(seq, ?) WHERE name = 'images'", last)

    @staticmethod
    def insert(database: sqlite3.Connection, row: tuple) -> None:
        """(id, path, bytes, modified_ns, feature, content), in the place of an earlier one of its id."""
        database.execute("INSERT OR REPLACE INTO images (id, path, bytes, modified_ns, feature, content, checksum) "
                         "VALUES (?, ?, ?, ?, ?, ?, ?)", (*row, checksum(*row)))

    @staticmethod
    def folder_row(database: sqlite3.Connection, has: Columns) -> FolderRow:
        """Raises InvalidIndex."""
        columns = f"path, {'changes' if has.checksums else '0'}, {'beside' if has.metadata else 'NULL'}"
        noted = "checksum" if has.checksums else "NULL"
        rows = database.execute(f"SELECT {columns}, {noted} FROM folder LIMIT 2").fetchall()
        if len(rows) != 1 or [type(value) for value in rows[0][:2]] != [bytes, int]:
            raise InvalidIndex("it does not say its folder")
        *values, noted = rows[0]
        row = FolderRow(*values)
        if not isinstance(row.beside, bytes | None) or (has.checksums and noted != folder_checksum(*row)):
            raise InvalidIndex("its folder is not what its checksum says")
        if (not row.path.startswith(b"/") or b"\0" in row.path + (row.beside or b"")
                or set(row.path.split(b"/")[1:]) & {b"", b"..", b"."}):
            raise InvalidIndex(f"its folder {os.fsdecode(row.path)!r} is none that could be indexed")
        return row

    def row(self) -> FolderRow:
        with self.opened() as (database, has):
            return self.folder_row(database, has)

    def state(self) -> tuple[Path, int]:
        """Where the images were when the index was made or last brought up to date, and how many changes the list has
        seen."""
        row = self.row()
        return Path(os.fsdecode(row.path)), row.changes

    def folder(self) -> Path:
        return self.state()[0]

    def folder_now(self) -> Path:
        """The same folder, or the one in its place if index and images were moved together."""
        row = self.row()
        near = os.path.realpath(os.path.join(os.fsencode(self.path.parent), row.beside or b""))
        moved = row.beside and not os.path.isdir(row.path) and os.path.isdir(near) and near != b"/"
        return Path(os.fsdecode(near if moved else row.path))

    def note_file(self, name: str, content: str, changes: int | None = None) -> None:
        """Keep the checksum of another of the index's files, made when the list had seen so many changes."""
        with self.opened("rw") as (database, _), database:
            database.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?)", (name, content, changes))

    def file_note(self, name: str) -> tuple[str | None, int | None]:
        """The checksum of another of the index's files, and the changes of the list when it was made; None where that
        was never noted."""
        with self.opened() as (database, has):
            asked = "SELECT checksum, changes FROM files WHERE name = ?"
            return (has.checksums and database.execute(asked, (name,)).fetchone()) or (None, None)

    def rows(self, where: str, values: Sequence = ()) -> Iterator[tuple]:
        """Rows as `checked` takes them; ids rise, or the file is damaged: so a file that leads in circles is left."""
        with self.opened() as (database, has):
            columns = (f"id, path, bytes, modified_ns, feature, {'content' if has.metadata else 'NULL'}, "
                       f"{'checksum' if has.checksums else 'NULL'}")
            last = 0
            for row in database.execute(f"SELECT {columns} FROM images WHERE {where} ORDER BY id", values):
                if has.checksums and row[6] is None:
                    row = (*row[:6], "")
                if not isinstance(row[0], int) or row[0] <= last:
                    raise InvalidIndex("its ids are in no order")
                last = row[0]
                yield row

    def entries(self, where: str, values: Sequence = ()) -> list[Entry]:
        with self.errors_in_one_line():
            return [checked(row) for row in self.rows(where, values)]

    def held(self) -> tuple[dict[str, Held], list[int]]:
        """All entries by path, and the ids of damaged ones."""
        whole, damaged = {}, []
        for row in self.rows("true"):
            try:
                entry = checked(row)
                if entry.path in whole:
                    raise InvalidIndex("an image is listed twice")
                whole[entry.path] = Held(entry.number, entry.version, entry.content)
            except InvalidIndex:
                damaged.append(row[0])
        return whole, damaged

    def __len__(self) -> int:
        with self.opened() as (database, _):
            return database.execute("SELECT count(*) FROM (SELECT 1 FROM images LIMIT ?)", (self.most(),)).fetchone()[0]

    def most(self) -> int:
        """More images than a file of this size can hold."""
        return self.path.stat().st_size // SMALLEST_ROW

    def add(self, entries: list[tuple[str, tuple[int, int]]], features: np.ndarray,
            contents: Sequence[str | None] | None = None) -> None:
        """Images with their files' versions and checksums, each in the place of an earlier one of its path."""
        with self.changing() as database:
            last = database.execute("SELECT max(coalesce((SELECT max(id) FROM images), 0), coalesce((SELECT seq FROM "
                                    "sqlite_sequence WHERE name = 'images'), 0))").fetchone()[0]
            paths = [os.fsencode(path) for path, _ in entries]
            database.executemany("DELETE FROM images WHERE path = ?", [(path,) for path in paths])
            for number, (path, (_, version), row, content) in enumerate(
                    zip(paths, entries, features, contents or [None] * len(paths), strict=True), start=last + 1):
                self.insert(database, (number, path, *version, row.astype("<f4").tobytes(), content))

    def move(self, folder: Path, versions: dict[str, tuple[int, int]]) -> None:
        """Note where the images lie now, and by path the versions of files that are the same at another time."""
        row = self.row()
        if not versions and (row.path, row.beside) == (os.fsencode(folder), self.beside(folder)):
            return
        with self.changing(folder) as database:
            for path, version in versions.items():
                number, feature, content = database.execute("SELECT id, feature, content FROM images WHERE path = ?",
                                                            (os.fsencode(path),)).fetchone()
                self.insert(database, (number, os.fsencode(path), *version, feature, content))

    def remove(self, numbers: Sequence[int]) -> None:
        with self.changing() as database:
            database.executemany("DELETE FROM images WHERE id = ?", [(number,) for number in numbers])

    def features(self, numbers: Sequence[int], dim: int | None = None) -> tuple[list[int], np.ndarray]:
        """Those of these ids that are listed, in order, and their features (n, D); dim: what D has to be."""
        found = []
        for start in range(0, len(numbers), ROWS_AT_ONCE):
            part = sorted({int(number) for number in numbers[start:start + ROWS_AT_ONCE]})
            found += self.entries(f"id IN ({','.join('?' * len(part))})", part)
        with self.errors_in_one_line():
            return [entry.number for entry in found], unpacked(found, dim)

    def all_features(self, every: int = 1, dim: int | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Ids (n,) and features (n, D) of all images, or of about one in `every`, some thousand at a time."""
        for part in self.parts(every):
            with self.errors_in_one_line():
                yield np.array([entry.number for entry in part]), unpacked(part, dim)

    def parts(self, every: int = 1) -> Iterator[list[Entry]]:
        """The same of the entries, in the order of their ids."""
        rows, part = self.rows("id % ? = 0", (every,)), []
        with self.errors_in_one_line():
            for row in rows:
                part.append(checked(row))
                if len(part) == ROWS_AT_ONCE:
                    yield part
                    part = []
            if part:
                yield part

    def path_of(self, number: int) -> str | None:
        found = self.entries("id = ?", (number,))
        return found[0].path if found else None

    def paths(self, numbers: Sequence[int]) -> dict[int, str]:
        """By id, of those of these that are listed."""
        found = self.entries(f"id IN ({','.join('?' * len(numbers))})", numbers)
        return {entry.number: entry.path for entry in found}

    def id_of(self, path: str) -> int | None:
        """Of the image of this path, else of the one whose path looks the same; one that is no text has none that a
        program could ask for."""
        if found := self.entries("path = ?", (path.encode("utf-8", "surrogatepass"),)):
            return found[0].number
        alike = [number for number, other in self.paths(self.ids(path)).items() if looks(other) == looks(path)]
        return alike[0] if len(alike) == 1 else None

    def ids(self, part: str = "") -> list[int]:
        """Of the images whose paths hold this text, or what looks the same, in capitals or not; in the order of their
        paths."""
        with self.opened() as (database, _):
            asked, part = "SELECT id FROM images ORDER BY path LIMIT ?", looks(part).casefold()
            if part:
                database.create_function("fits", 1, lambda path: part in looks(os.fsdecode(path)).casefold())
                asked = "SELECT id FROM (SELECT id, path FROM images ORDER BY path LIMIT ?) WHERE fits(path)"
            return [number for number, in database.execute(asked, (self.most(),))]


def unpacked(entries: Sequence[Entry], dim: int | None) -> np.ndarray:
    """Their features (n, D). Raises InvalidIndex where they are of several sizes or of another, or not finite."""
    sizes = {len(entry.feature) // 4 for entry in entries}
    if len(sizes | {dim or size for size in sizes}) > 1:
        raise InvalidIndex(f"features of {' and '.join(map(str, sorted(sizes)))} values" + f", not {dim}" * bool(dim))
    features = np.frombuffer(b"".join(entry.feature for entry in entries), "<f4")
    if not np.isfinite(features).all():
        raise InvalidIndex("features that are not finite")
    return features.reshape(len(entries), -1 if entries else 0)
