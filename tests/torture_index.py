"""python -m tests.torture_index: bits flipped in an index's files, and indexes that a stranger could send. A line of
figures each; exit code 1 unless nothing wrong was believed, and all ended in time in one line or the right answer."""

import logging
import random
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from machine.errors import InputError
from searching.build import build
from searching.gallery import Gallery

from .conftest import picture
from .index_faults import FILES, copied, flip, generated, same, write_model

SLOW = 5                                # seconds
CPU = torch.device("cpu")


def prepared(folder: Path) -> tuple[Path, Path]:
    """An index of twelve pictures, and one of the pictures."""
    for number in range(12):
        picture(folder / "images" / f"{number}.jpg")
    build(write_model(folder / "model.pth"), folder / "images", folder / "index", "exact", CPU, 12, 0,
          partial(tqdm, disable=True))
    return folder / "index", folder / "images" / "0.jpg"


def answer(index: Path, image: Path) -> list:
    opened = Gallery(index, CPU)
    return [(hit.path, hit.score) for hit in opened.search(image, "", 12)]


def outcome(index: Path, image: Path, right: list, spoilt: str = "") -> str:
    """How asking an index ends, of which this file was spoilt."""
    start = time.monotonic()
    try:
        end = "right" if same(answer(index, image), right, spoilt) else "believed"
    except InputError as error:
        end = "more than a line" if "\n" in str(error) else "refused"
    except Exception as error:
        end = "traceback"
        tqdm.write(f"{type(error).__name__}: {error}")
    return "slow" if time.monotonic() - start > SLOW else end


def bit_flips(count: int, folder: Path) -> Counter:
    """A random bit each, in the files in turn."""
    (index, image), rng, ends = prepared(folder), random.Random(3), Counter()
    right = answer(index, image)
    for number in tqdm(range(count), desc="bits of an index"):
        name = FILES[number % len(FILES)]
        spoilt = copied(index, folder / "spoilt")
        flip(spoilt / name, rng.randrange(8 * (spoilt / name).stat().st_size))
        ends[outcome(spoilt, image, right, name)] += 1
    return ends


def hostile_indexes(count: int, folder: Path) -> Counter:
    """A stranger's choice of features and paths is not to be told from ours; all else is refused or answered right."""
    (index, image), ends = prepared(folder), Counter()
    right = answer(index, image)
    for name, spoil in tqdm(generated(count), total=count, desc="hostile indexes"):
        spoilt = copied(index, folder / "spoilt")
        try:
            spoil(spoilt)
        except sqlite3.Error as error:
            tqdm.write(f"{name}: {error}")
            continue
        end = outcome(spoilt, image, right)
        tqdm.write(f"{name}: {end}") if end not in ("right", "refused") else None
        ends[end] += 1
    return ends


def torture() -> int:
    logging.disable(logging.WARNING)                                            # a note for each that is made again
    wrong = 0
    for what, work, count in (("bits flipped in an index", bit_flips, 510), ("hostile indexes", hostile_indexes, 150)):
        with tempfile.TemporaryDirectory() as folder:
            ends = work(count, Path(folder))
        print(f"{ends.total()} {what}: {ends['refused']} refused in one line, {ends['right']} answered right, "
              f"{ends['believed']} believed, {ends['more than a line'] + ends['traceback']} of more than a line, "
              f"{ends['slow']} over {SLOW} s")
        wrong += ends.total() - ends["refused"] - ends["right"]
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(torture())
