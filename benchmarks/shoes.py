"""Shoes: pairs of a shop's pictures, and a sentence on how they differ."""

import os
from pathlib import Path

from benchmarks.base import PairDataset, inside, require
from machine.errors import InputError
from machine.picture_folder import Walk
from machine.text_files import read_entries, read_lines

LISTS = {"train": "train_im_names.txt", "test": "eval_im_names.txt"}


class Shoes(PairDataset):
    """Relative captions (Guo et al., arXiv 1805.00145) on pictures of the attribute discovery data (Berg et al., 2010).

    The gallery is all of the list of the split, the reference stays in it, as in VAL and later papers. Some pairs have
    one picture as reference and target: they are tested, as published, but not trained on.
    """

    title, template = "Shoes", "{caption}"
    ks = (1, 10, 50)
    headline = tuple(f"recall_top{k}_correct_composition" for k in ks)
    CAPTIONS = "relative_captions_shoes.json"

    def read(self) -> None:
        if self.complete_text:
            raise InputError("Shoes has no captions that go with its pairs: drop --use_complete_text_query")
        lists = {split: self.read_list(self.root / name) for split, name in LISTS.items()}
        listed, elsewhere = lists[self.published], {name for names in lists.values() for name in names}
        file = require(self.root / self.CAPTIONS, "caption file")
        entries = self.read_captions(file)
        used = [entry for entry in entries if entry[0] in listed and entry[1] in listed and self.has(entry[0])]
        if strangers := [name for entry in entries for name in entry[:2] if name not in elsewhere]:
            self.refuse_or_drop("pairs of pictures in no list", f"{len(strangers)} pictures that {file} names are in "
                                f"neither {' nor '.join(LISTS.values())}, first {strangers[0]}: the files are of "
                                "different releases; or pass --skip_bad_images True to leave their pairs out",
                                len(strangers))
        alike = sum(source == target for source, target, _ in used)
        if self.published == "train":
            used = [entry for entry in used if entry[0] != entry[1]]
        named = dict.fromkeys(name for entry in used for name in entry[:2])
        names = named if self.published == "train" else listed
        files: dict[str, str] = {}
        for path in Walk(self.root, follow_links=True).names():                 # womens_boots/0/img_womens_boots_1.jpg
            files.setdefault(os.path.basename(path), path)
        places = {name: files.get(name, name) for name in names}
        self.take([(places[source], places[target], text) for source, target, text in used], places.values(), file)
        self.about = f"Shoes, {self.split}: {len(self.annotations)} pairs, " + (
            f"less {alike} that have one picture as reference and target" if self.published == "train" else
            f"of which {alike} have one picture as reference and target, as published")

    @staticmethod
    def read_list(file: Path) -> dict[str, None]:
        return dict.fromkeys(inside(line.strip(), f"{file}, line {number}")
                             for number, line in read_lines(require(file, "list of pictures")))

    @staticmethod
    def read_captions(file: Path) -> list[tuple[str, str, str]]:
        """(reference, target, text) of each pair."""
        read, names = [], ("ReferenceImageName", "ImageName", "RelativeCaption")
        for where, entry in read_entries(file):
            if not isinstance(entry, dict) or not all(isinstance(entry.get(name), str) for name in names):
                raise InputError(f"{where}: expected {{'ReferenceImageName': name, 'ImageName': name, "
                                 f"'RelativeCaption': text}}, got {str(entry)[:80]!r}")
            source, target, text = map(entry.get, names)
            read.append((source, target, text.strip()))
        return read
