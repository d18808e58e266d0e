"""Pictures of one's own: a table with a line for each query, and a folder of images, read and checked.

Its columns are named so that Hugging Face's `imagefolder` reads it too.
"""

import difflib
import os
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks import imagefolder
from benchmarks.base import AnnotatedDataset, Annotation, QuerySet, RetrievalTask, inside, require, texts_of
from benchmarks.metrics import MAP_KS, RECALL_KS, ListedMetric, Metric
from machine.errors import InputError
from machine.file_names import Named, spelled_out
from machine.picture_folder import Kind, Walk, why_not_listed
from machine.tables import ENDINGS, read_table
from machine.text_files import read_lines

SPLITS = dict.fromkeys(("train", "training"), "train") | dict.fromkeys(  # as Hugging Face's datasets has them
    ("validation", "valid", "val", "dev"), "validation") | dict.fromkeys(
        ("test", "testing", "eval", "evaluation"), "test")
UNFIT = "lines that do not fit"


class Triplets(AnnotatedDataset):
    """Pictures of one's own: train/metadata.jsonl and test/metadata.jsonl (or .csv, .xlsx, ...) beside their images, or
    one table at the top with a column `split`, or without it and a share held out. A table may also be called triplets.

    A line has source_file_name, text, and target_file_name or target_file_names, several being right; it may have
    negative_file_names, group and target_caption. File names count from the table's folder; but in JSON several stand
    in one value with | between them. Gallery: every image of the folder, also behind links, or those that its
    gallery.txt lists.
    """

    upright = is_ones_own = True
    title = "own triplets"
    MOST_GROUPS = 50
    held_out_of = "source images, held out, whose targets may be training's too"

    @classmethod
    def table(cls, folder: Path) -> Path | None:
        """A folder's table."""
        return table_in(folder, "triplets") or table_in(folder, "metadata")

    @classmethod
    def tables(cls, root: Path) -> dict[str, Path]:
        """{split: its table}, or {"": the one at the top}."""
        if not (found := tables_in(root, cls.table)):
            raise InputError(f"neither {root} nor {root / 'train'} has a metadata.jsonl or metadata.csv (or "
                             f"{', '.join(ENDINGS[2:])}); docs/your-own-pictures.md shows what it looks like")
        return found

    @classmethod
    def split_of(cls, where: str, row: dict) -> str:
        """Of a row of the table at the top; a blank cell is train's."""
        split = str(row.get("split") or "").strip().lower() or "train"
        if split not in SPLITS:
            raise InputError(f"{where}: split is {split[:40]!r}; expected train, validation, test")
        return SPLITS[split]

    @classmethod
    def rows(cls, root: Path, split: str) -> list[tuple[str, dict]]:
        """(where it stands, the row) of each row of a split."""
        tables = cls.tables(root)
        if "" in tables:
            return [(where, row) for where, row in read_table(tables[""]) if cls.split_of(where, row) == split]
        return list(read_table(tables[split])) if split in tables else []

    @classmethod
    def splits(cls, path: Path, held_out: float) -> list[str]:
        tables = cls.tables(path)
        found = {cls.split_of(*placed) for placed in read_table(tables[""])} if "" in tables else set(tables)
        if held_out and "validation" in found:
            raise InputError(f"{path} has a validation split of its own: drop --validation")
        if not held_out and found <= {"train"}:
            raise InputError(f"{path} has no test split, neither a folder test nor a column split: pass "
                             "--validation 0.1 to hold out a tenth of the source images and test on them")
        return ["train", *["validation"] * ("validation" in found or held_out > 0), *["test"] * ("test" in found)]

    @classmethod
    def remarks(cls, path: Path) -> list[str]:
        return list(imagefolder.remarks(path, cls.tables(path), Walk(path, follow_links=True).names()))

    def read(self) -> None:
        own = self.split
        rows = self.rows(self.root, own)
        if not rows and own == "validation":                                    # what is held out is train's
            own = "train"
            rows = self.rows(self.root, own)
        if not rows:
            raise InputError(f"{self.root} has no {own} split, neither a folder {own} with a table nor lines of it")
        tables = self.tables(self.root)
        self.look_into("" if "" in tables else f"{tables[own].parent.name}/")
        parsed = [(where, entry) for where, entry in self.entries(rows)
                  if (own == "validation" or self.has(entry.source)) and self.is_there(entry, where)]
        listed = self.listed()
        self.collect(parsed, self.named_by(parsed) if self.split == "train" else listed or self.there)
        if not self.annotations:
            raise InputError(f"no usable line of the {self.split} split in {self.table(self.walk.folder)}: " + (
                "--validation holds out by source image, give a larger share" if self.held_out else
                next(iter(self.amiss), "all of its images are broken")))
        if self.split != "train":
            self.tell(listed)

    def look_into(self, below: str) -> None:
        """Find the pictures of a folder below root, '' or one that ends in a slash."""
        self.below = below
        folder = self.root / below
        self.walk = Walk(folder, follow_links=True)
        self.there = self.walk.names()
        self.known = frozenset(self.there)
        self.named, self.unread = Named((name, name) for name in self.there), {folder: self.walk.unread}

    def entries(self, rows: Iterable[tuple[str, dict]]) -> Iterator[tuple[str, "Entry"]]:
        """The lines that can be read, each with where it stands."""
        for where, row in rows:
            try:
                yield where, self.parse(row, where)
            except InputError as error:
                self.refuse_or_drop(UNFIT, f"{error}; --skip_bad_images True leaves such lines out")

    def is_there(self, entry: "Entry", where: str) -> bool:
        """Whether all of a line's pictures are."""
        missing = next((name for name in entry.names if name not in self.known), None)
        if missing is not None:
            self.refuse_or_drop("triplets whose images are missing", self.not_there(missing, where))
        return missing is None

    @staticmethod
    def named_by(parsed: list[tuple[str, "Entry"]]) -> list[str]:
        return [name for _, entry in parsed for name in entry.names]

    def parse(self, row: dict, where: str) -> "Entry":
        def value(name: str) -> str:
            found = row.get(name) or ""
            if not isinstance(found, str):
                raise InputError(f"{where}: {name} is {str(found)[:40]!r}; expected a string")
            return found.strip()

        def files(name: str) -> list[str]:
            several = []
            for found in (row.get(name) or [], row.get(f"{name}s") or []):
                several += found.split("|") if isinstance(found, str) else found if isinstance(found, list) else [None]
                if not all(isinstance(file, str) for file in several):
                    raise InputError(f"{where}: {name}s is {str(found)[:40]!r}; expected a list of file names")
            names = [os.path.normpath(file.strip()) for file in several if file.strip()]
            return list(dict.fromkeys(self.meant(inside(file, where), where) for file in names))
        sources, targets, text = files("source_file_name"), files("target_file_name"), value("text")
        if self.complete_text and not value("target_caption"):
            raise InputError(f"{where}: no target_caption, which --use_complete_text_query asks with; add it, or drop "
                             "the flag")
        for name, found in (("source_file_name", sources), ("target_file_name", targets), ("text", text)):
            if not found:
                raise InputError(f"{where}: no {name} (it has {', '.join(map(str, row)) or 'no column'}); each line "
                                 "needs source_file_name, target_file_name and text")
        if len(sources) > 1:
            raise InputError(f"{where}: {len(sources)} sources; a query has one picture")
        if not self.keep_source and sources[0] in targets:
            raise InputError(f"{where}: the target is the source itself, which is left out of its ranking; mend the "
                             "line, or pass --keep_source True")
        negatives = files("negative_file_name")
        if twice := set(negatives) & set(targets):
            raise InputError(f"{where}: {twice.pop()} is both right and wrong; take it out of one list")
        return Entry(sources[0], targets, value("target_caption") if self.complete_text else text, negatives,
                     value("group"), value("target_caption"))

    def meant(self, name: str, where: str) -> str:
        """The picture of this name; else of one that looks the same; else the same file by way of another link."""
        alike = self.named.find(name)
        if len(alike) > 1:
            raise InputError(f"{where}: {name} is not in {self.walk.folder}, but {len(alike)} names that look the same "
                             f"({spelled_out(alike)}); rename one")
        if not alike and os.path.isfile(self.walk.folder / name):
            return self.by_file.get(os.path.realpath(self.walk.folder / name), name)
        return alike[0] if alike else name

    @cached_property
    def by_file(self) -> dict[str, str]:
        return {os.path.realpath(self.walk.folder / name): name for name in reversed(self.there)}

    def not_there(self, name: str, where: str) -> str:
        folder = self.walk.folder
        if os.path.exists(folder / name):
            return f"{where}: {name} {why_not_listed(folder, name)}"
        alike = [other for other in self.there if other.lower() == name.lower()]    # as IMG_1.JPG and img_1.jpg
        close = alike or difflib.get_close_matches(name, self.there, 1)
        nearest = f"; is {close[0]} meant?" if close else ""
        return (f"{where}: {name} is not in {folder}{nearest}; mend the line, put the picture there, or pass "
                "--skip_bad_images True to leave such lines out")

    def listed(self) -> list[str]:
        """The gallery's file names; empty where all of the folder's images are in it."""
        names, file = [], self.walk.folder / "gallery.txt"
        if self.split == "train" or not os.path.lexists(file):
            return names
        for number, line in read_lines(file):
            where = f"{file}, line {number}"
            name = self.meant(inside(os.path.normpath(line.strip()), where), where)
            if name in self.known:
                names.append(name)
            else:
                self.refuse_or_drop("lines of gallery.txt", self.not_there(name, where))
        return list(dict.fromkeys(names))

    def collect(self, parsed: list[tuple[str, "Entry"]], gallery: list[str]) -> None:
        """Ids for the gallery's images, then for sources that are not in it."""
        here = [name for name in dict.fromkeys(gallery) if self.below + name not in self.without]
        ids = {name: image for image, name in enumerate(here)}
        self.gallery, self.annotations, self.captions = len(here), [], {}
        for where, entry in parsed:
            if self.below + entry.source in self.without:
                self.drop("triplets whose images are broken")
                continue
            if lost := [name for name in (*entry.targets, *entry.negatives)
                        if name not in ids and self.below + name not in self.without]:
                self.refuse_or_drop(UNFIT, f"{where}: {lost[0]} is not in gallery.txt, so it can never be found; add "
                                           "it there, or mend the line")
                continue
            targets, negatives = ([ids[name] for name in dict.fromkeys(names) if name in ids]
                                  for names in (entry.targets, entry.negatives))
            if not targets:
                self.drop("triplets whose images are broken")
                continue
            source = ids.setdefault(entry.source, len(ids))
            self.annotations.append(Annotation(source, sorted(targets), entry.text, sorted(negatives), entry.group))
            self.captions.update(dict.fromkeys(targets, entry.caption) if entry.caption else {})
        self.images = [self.below + name for name in ids]
        groups = list(dict.fromkeys(line.group for line in self.annotations if line.group))
        if len(groups) > self.MOST_GROUPS:
            raise InputError(f"{len(groups)} groups, of which each is tested apart; {self.MOST_GROUPS} are the most. A "
                             "group is a category, as dress or shoe")
        self.groups = groups

    def tell(self, listed: list[str]) -> None:
        """Fill `about`."""
        right = [len(line.targets) for line in self.annotations]
        span = str(right[0]) if len(set(right)) == 1 else f"{min(right)} to {max(right)}"
        among = "those of gallery.txt" if listed else f"all of {self.walk.folder}"
        self.about = (f"{self.split} split: {len(self.annotations)} queries with {span} right of {self.gallery} images "
                      f"in the gallery, {among}; a query's source "
                      f"{'stays in' if self.keep_source else 'is left out of'} its ranking")
        if passed := self.walk.counted(Kind.PASSED_OVER, Kind.UNREADABLE_FOLDER, Kind.LINKED_FOLDER, Kind.HIDDEN):
            self.about += f"; passed over: {', '.join(passed)}"
        if self.split == "validation" and self.held_out:
            self.about += f"; these are the lines of a share of {self.held_out:g} of the {self.held_out_of}"

    @cached_property
    def target_labels(self) -> np.ndarray:
        """Images are equally right where they have the same target_caption."""
        labels = [self.captions.get(image, f"\0{image}") for image in range(len(self.images))]
        return np.unique(labels, return_inverse=True)[1]

    def test_task(self) -> RetrievalTask:
        """All queries in the whole gallery; those of a group among the images that its lines name; and those with
        negatives among these and what is right, as in CIRR's subsets."""
        def query_set(lines: list[Annotation], metric: Metric | ListedMetric) -> QuerySet:
            sources = np.array([line.source for line in lines])
            own = np.where((sources < self.gallery) & (not self.keep_source), sources, -1)
            return QuerySet(sources, texts_of(lines), own, [metric])

        def listed(name: str, lines: list[Annotation], candidates: list | None = None, ks=RECALL_KS) -> ListedMetric:
            return ListedMetric(name, [np.array(line.targets) for line in lines], self.gallery, candidates, ks)
        whole = ListedMetric("correct_composition", [np.array(line.targets) for line in self.annotations], self.gallery,
                             map_ks=MAP_KS)
        sets = [query_set(self.annotations, whole)]
        for group in self.groups:
            lines = [line for line in self.annotations if line.group == group]
            named = {image for line in lines for image in (line.source, *line.targets, *line.negatives)}
            own_gallery = np.array(sorted(image for image in named if image < self.gallery))
            sets.append(query_set(lines, listed(f"own_gallery_{group}", lines, [own_gallery] * len(lines))))
        if lines := [line for line in self.annotations if line.negatives]:
            candidates = [np.array(sorted({*line.targets, *line.negatives})) for line in lines]
            sets.append(query_set(lines, listed("among_negatives", lines, candidates, (1, 2, 3))))
        return RetrievalTask(np.arange(self.gallery), sets)


class Entry(NamedTuple):
    """A line of a table of triplets as it is read, with images by file name."""
    source: str
    targets: list[str]
    text: str
    negatives: list[str]
    group: str
    caption: str

    @property
    def names(self) -> list[str]:
        return [self.source, *self.targets, *self.negatives]


def table_in(folder: Path, stem: str) -> Path | None:
    """The table of this name, whatever kind of file it is."""
    names = [f"{stem}{ending}" for ending in ENDINGS]
    found = [name for name in os.listdir(folder) if name.lower() in names and (folder / name).is_file()]
    found.sort(key=lambda name: names.index(name.lower()))
    if len(found) > 1:
        raise InputError(f"{folder} has both {found[0]} and {found[1]}; remove the one that is not meant")
    return folder / found[0] if found else None


def tables_in(root: Path, find: Callable[[Path], Path | None]) -> dict[str, Path]:
    """{split: its table}, or {"": the one at the top}, or nothing. find: gives a folder's."""
    require(root, "folder")
    folders = [("", root)] + [(SPLITS[name.lower()], root / name) for name in sorted(os.listdir(root))
                              if name.lower() in SPLITS and (root / name).is_dir()]
    found: dict[str, Path] = {}
    for split, table in ((split, find(folder)) for split, folder in folders):
        if table and ("" in found or split in found):
            raise InputError(f"{found.get('') or found[split]} and {table} are two ways to say it; remove one")
        found |= {split: table} if table else {}
    return found
