"""Ways in which an index's files can be wrong, for the tests and the torture: bits, and what a stranger writes."""

import os
import random
import shutil
import sqlite3
import zipfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import faiss
import numpy as np
import torch

from img_text_composition_models import Recipe
from machine.checksums import file_digest
from searching.image_list import ImageList, checksum, folder_checksum
from text_model import SimpleVocab

FILES = ("model.pth", "images.sqlite", "index.faiss", "networks.zip")


def same(found: list, right: list, spoilt: str) -> bool:
    """Whether results, (path, score) each, are the right ones: to the last bit, but where the networks were spoilt and
    torch stood in, which rounds otherwise."""
    def near() -> bool:
        return all(ours == theirs and abs(mine - score) < 1e-5
                   for (ours, mine), (theirs, score) in zip(found, right, strict=True))
    return found == right or (spoilt == "networks.zip" and len(found) == len(right) and near())


def write_model(path: Path) -> Path:
    """A checkpoint of random weights for pictures of 32 pixels, features of 24 values."""
    torch.manual_seed(0)
    recipe = Recipe("composeAE", "shufflenet_v2_x0_5", 32, 24, "lstm", 16, SimpleVocab.from_texts(["red"]).word2id)
    torch.save({"model_state_dict": recipe.build().eval().state_dict(), "recipe": recipe.plain(),
                "opt": {"image_size": 32, "model": "composeAE"}}, path)
    return path


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def execute(index: Path, *statements) -> None:
    with closing(sqlite3.connect(index / "images.sqlite")) as database, database:
        for statement in statements:
            database.execute(*([statement] if isinstance(statement, str) else statement))


def older(index: Path, schema: Sequence[str]) -> None:
    """Write the list as a program of that time did."""
    with closing(sqlite3.connect(index / "images.sqlite")) as database, database:
        for name in ("folder", "images", "files", "metadata"):
            database.execute(f"ALTER TABLE {name} RENAME TO newer_{name}")
        for table in schema:
            database.execute(table)
        rows = database.execute("SELECT id, path, bytes, modified_ns, feature FROM newer_images").fetchall()
        if len(schema) == 2:
            database.execute("INSERT INTO folder SELECT path FROM newer_folder")
            database.executemany("INSERT INTO images VALUES (?, ?, ?, ?, ?)", rows)
        else:
            path, changes = database.execute("SELECT path, changes FROM newer_folder").fetchone()
            database.execute("INSERT INTO folder VALUES (?, ?, ?)", (path, changes, folder_checksum(path, changes)))
            database.executemany("INSERT INTO images VALUES (?, ?, ?, ?, ?, ?)", [(*row, checksum(*row, None))
                                                                                 for row in rows])
            database.execute("INSERT INTO files SELECT * FROM newer_files")
        for name in ("folder", "images", "files", "metadata"):
            database.execute(f"DROP TABLE newer_{name}")


def rewrite(index: Path, **columns) -> None:
    """The first image's columns, with a checksum that fits."""
    names = ("id", "path", "bytes", "modified_ns", "feature", "content")
    with closing(sqlite3.connect(index / "images.sqlite")) as database, database:
        row = dict(zip(names, database.execute(f"SELECT {', '.join(names)} FROM images ORDER BY id").fetchone(),
                       strict=True))
        database.execute("DELETE FROM images WHERE id = ?", (row["id"],))
        row |= columns
        try:
            noted = checksum(*row.values())
        except (TypeError, ValueError):
            noted = "0" * 32
        database.execute(f"INSERT INTO images ({', '.join(names)}, checksum) VALUES (?, ?, ?, ?, ?, ?, ?)",
                         (*row.values(), noted))


def folder_is(index: Path, path: bytes) -> None:
    execute(index, ("UPDATE folder SET path = ?, changes = 1, beside = NULL, checksum = ?",
                    (path, folder_checksum(path, 1))))


def beside(index: Path, path: bytes, folder: bytes | None = None) -> None:
    """The folder's path from the index, and where it is said to have been."""
    folder = folder or os.fsencode(ImageList(index / "images.sqlite").folder())
    execute(index, ("UPDATE folder SET path = ?, changes = 1, beside = ?, checksum = ?",
                    (folder, path, folder_checksum(folder, 1, path))))


def note(index: Path, name: str) -> None:
    """Give a changed file the checksum that a stranger would."""
    images = ImageList(index / "images.sqlite")
    images.note_file(name, file_digest(index / name), images.state()[1])


def changed_ranking(index: Path, change) -> None:
    content = np.frombuffer((index / "index.faiss").read_bytes(), "u1").copy()
    change(content)
    (index / "index.faiss").write_bytes(content.tobytes())
    note(index, "index.faiss")


def other_ranking(index: Path, dim: int, kind=None) -> None:
    made = kind or faiss.IndexIDMap(faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_fp16,
                                                               faiss.METRIC_INNER_PRODUCT))
    features = np.ones((12, dim), np.float32)
    if kind is None:
        made.add_with_ids(features, np.arange(1, 13))
    else:
        made.add(features)
    faiss.write_index(made, str(index / "index.faiss"))
    note(index, "index.faiss")


def other_model(index: Path, change) -> None:
    state = torch.load(index / "model.pth", weights_only=True)
    change(state)
    torch.save(state, index / "model.pth")
    note(index, "model.pth")


def bomb(index: Path) -> None:
    """A model that unpacks to a hundred times its size."""
    with zipfile.ZipFile(index / "model.pth") as whole:
        content = {name: whole.read(name) for name in whole.namelist()}
    with zipfile.ZipFile(index / "model.pth", "w", zipfile.ZIP_DEFLATED) as packed:
        for name, part in content.items():
            packed.writestr(name, part + bytes(50 * 2**20) if name.endswith("data/0") else part)
    note(index, "model.pth")


def stretched(state: dict) -> None:
    """A weight that is one number seen ten billion times."""
    state["model_state_dict"]["a"] = torch.zeros(1).expand(10**5, 10**5)


def wide(state: dict) -> None:
    """An image feature of so many values that the model would take terabytes."""
    name = next(name for name in state["model_state_dict"] if name.startswith("img_model") and name.endswith("0.bias"))
    state["model_state_dict"][name] = torch.zeros(10**6)


def two_lines(index: Path) -> None:
    """The name of the list's own index has a line's end in it, which SQLite repeats."""
    path = index / "images.sqlite"
    path.write_bytes(path.read_bytes().replace(b"sqlite_autoindex_images_1", b"sqlite_autoindex_images\n1"))


def by_hand() -> dict:
    """Name -> what a stranger does to an index; every one has to end in one line, or the right answer."""
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n)"
    images = "CREATE TABLE images (id INTEGER PRIMARY KEY AUTOINCREMENT, path BLOB UNIQUE, bytes INT, feature BLOB)"
    return {
        "an endless view": lambda index: execute(index, "DROP TABLE images", f"CREATE VIEW images AS {endless} SELECT "
                                                 "i id, x'61' path, 1 bytes, 1 modified_ns, x'00' feature, '' checksum "
                                                 "FROM n"),
        "a view beside": lambda index: execute(index, f"CREATE VIEW v AS {endless} SELECT i FROM n"),
        "a trigger": lambda index: execute(index, "CREATE TRIGGER t DELETE ON images BEGIN SELECT 1; END"),
        "an index more": lambda index: execute(index, "CREATE INDEX i ON images (bytes)"),
        "another table": lambda index: execute(index, "DROP TABLE images", images),
        "a virtual table": lambda index: execute(index, "CREATE VIRTUAL TABLE v USING fts5(x)"),
        "no folder": lambda index: execute(index, "DELETE FROM folder"),
        "two folders": lambda index: execute(index, "INSERT INTO folder SELECT * FROM folder"),
        "the root": lambda index: folder_is(index, b"/"),
        "up and down": lambda index: folder_is(index, b"/tmp/../etc"),
        "a relative folder": lambda index: folder_is(index, b"etc"),
        "a folder with NUL": lambda index: folder_is(index, b"/tmp\0/x"),
        "a NUL beside": lambda index: beside(index, b"..\0"),
        "a text beside": lambda index: execute(index, "UPDATE folder SET beside = 'x'"),
        "far away": lambda index: beside(index, b"../" * 50),
        "a checksum of a number": lambda index: execute(index, "UPDATE images SET content = 7"),
        "another column": lambda index: execute(index, "ALTER TABLE metadata ADD COLUMN x"),
        "metadata of a view": lambda index: execute(index, "DROP TABLE metadata", f"CREATE VIEW metadata AS {endless} "
                                                    "SELECT x'61' path, '{}' cells, i checksum FROM n"),
        "no images": lambda index: execute(index, "DELETE FROM images"),
        "a name of two lines": two_lines,
        **{f"a path {path!r}": (lambda index, path=path: rewrite(index, path=path)) for path in
           (b"../0.jpg", b"/etc/passwd", b"/etc/x.jpg", b"a/../../x.jpg", b"a\0.jpg", b"passwd", "text.jpg", 7, None)},
        **{f"a feature {what}": (lambda index, feature=feature: rewrite(index, feature=feature)) for what, feature in
           (("of 7 bytes", bytes(7)), ("of none", b""), ("of 4", bytes(4)), ("of megabytes", bytes(2**22)),
            ("not finite", np.full(24, np.nan, "<f4").tobytes()), ("of text", "x" * 96), ("of a number", 1.5))},
        "a version of text": lambda index: rewrite(index, bytes="much"),
        "an id below zero": lambda index: rewrite(index, id=-5),
        "the last id": lambda index: rewrite(index, id=2**63 - 1),
        "another dimension": lambda index: other_ranking(index, 48),
        "a huge dimension": lambda index: other_ranking(index, 10**5),
        "another kind": lambda index: other_ranking(index, 24, faiss.IndexFlatL2(24)),
        "a graph": lambda index: other_ranking(index, 24, faiss.IndexHNSWFlat(24, 8)),
        "a packed model": bomb,
        "a stretched weight": lambda index: other_model(index, stretched),
        "a wide model": lambda index: other_model(index, wide),
        "an image size": lambda index: other_model(index, lambda state: state["opt"].update(image_size=10**6)),
        "no weights": lambda index: other_model(index, lambda state: state["model_state_dict"].clear()),
    }


def circles(index: Path) -> None:
    """A tree of the list whose inner page leads to one page four hundred times over."""
    content = bytearray((index / "images.sqlite").read_bytes())
    page = int.from_bytes(content[16:18], "big")
    for start in range(page, len(content), page):
        if content[start] == 5:                                                 # an inner page of a table
            count = int.from_bytes(content[start + 3:start + 5], "big")
            for cell in range(count):
                place = start + int.from_bytes(content[start + 12 + 2 * cell:start + 14 + 2 * cell], "big")
                content[place:place + 4] = (start // page + 1).to_bytes(4, "big")
    (index / "images.sqlite").write_bytes(content)


def generated(count: int, seed: int = 0):
    """So many (name, what a stranger does)."""
    rng, hand = random.Random(seed), {**by_hand(), "circles": circles}
    yield from list(hand.items())[:count]
    huge = [0, 1, 2**31, 2**33, 2**40, 2**62, 2**63 - 1, 2**64 - 1]
    for number in range(count - len(hand)):
        place, value = 8 * rng.randrange(15) + rng.randrange(8), rng.choice(huge).to_bytes(8, "little")

        def change(content, place=place, value=value):
            content[place:place + 8] = np.frombuffer(value, "u1")
        if number % 3:
            yield (f"a ranking with {value.hex()} at {place}",
                   lambda index, change=change: changed_ranking(index, change))
        else:
            places = [rng.random() for _ in range(20)]
            yield "a list with twenty bytes changed", lambda index, places=places: scatter(index, places)


def scatter(index: Path, places: list[float]) -> None:
    path = index / "images.sqlite"
    content = bytearray(path.read_bytes())
    for place in places:
        content[int(place * len(content))] ^= 0x55
    path.write_bytes(content)


def copied(index: Path, to: Path) -> Path:
    shutil.rmtree(to, ignore_errors=True)
    return shutil.copytree(index, to)
