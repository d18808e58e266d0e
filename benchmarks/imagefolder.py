"""What Hugging Face's `imagefolder` makes of a folder of triplets, where it is something else than we do.

As its library `datasets` 5.2.0 does it, which says nothing of most of this.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from machine.tables import KEYS, read_table
from machine.text_files import opened

WORD = "(?:train|training|validation|valid|dev|val|test|testing|eval|evaluation)"
OF_FOLDER = re.compile(rf"(?:.*/)?(?:[^/]*[-._ 0-9])?{WORD}(?:[-._ 0-9][^/]*)?/.*")
OF_FILE = re.compile(rf"(?:.*/)?(?:[^/]*[-._ 0-9])?{WORD}[-._ 0-9][^/]*")
NULL = {"#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA",
        "NULL", "NaN", "None", "n/a", "nan", "null"}                            # pandas' words for nothing


def remarks(root: Path, tables: dict[str, Path], images: Sequence[str]) -> Iterator[str]:
    """A sentence each. tables: as Triplets has them; images: their paths below root."""
    for kind in (OF_FOLDER, OF_FILE):
        if "" in tables and (named := [image for image in images if kind.fullmatch(image)]):
            yield (f"Hugging Face's imagefolder takes {named[0]} for a split by its name, with {len(named) - 1} more, "
                   "and sees neither the table nor the other pictures; rename what has train, test, val, dev, eval or "
                   "the like as a word of its name")
            break
    for table in tables.values():
        yield from remarks_on(table)


def remarks_on(table: Path) -> Iterator[str]:
    if table.name not in ("metadata.csv", "metadata.jsonl"):
        yield f"Hugging Face's imagefolder does not read {table}, only metadata.csv and metadata.jsonl"
    elif table.suffix == ".csv":
        with opened(table) as content:
            header = content.read(2**16).partition(b"\n")[0].decode("utf-8-sig", "replace")
        if not KEYS.intersection(name.strip(' "\r') for name in header.split(",")):
            yield f"Hugging Face's imagefolder does not read {table}: it wants UTF-8, commas, and the header in line 1"
        if nulls := [(where, value) for where, row in read_table(table) for value in row.values() if value in NULL]:
            yield (f"Hugging Face's imagefolder has nothing in place of {len(nulls)} texts: {nulls[0][0]}, "
                   f"{nulls[0][1]!r}")
    else:
        rows = list(read_table(table))
        for name in dict.fromkeys(name for _, row in rows for name, value in row.items()
                                  if name.endswith("file_names") and isinstance(value, list)):
            if missing := [where for where, row in rows if row.get(name) is None]:
                yield (f"Hugging Face's imagefolder wants a list of {name} in each line, [] where it is empty: "
                       f"{missing[0]}, and {len(missing) - 1} more, have none")
