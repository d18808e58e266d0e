"""LaSCo: 389,305 queries on COCO's photographs, made of questions and answers about alike ones."""

import os

from benchmarks.base import PairDataset, inside, require
from machine.errors import InputError
from machine.text_files import read_entries, read_json


class LaSCo(PairDataset):
    """Annotated pairs (arXiv 2303.09429); the test split is the published validation split. The gallery is the
    published corpus of that, from which no query's own image is taken out.
    """

    title, tested_as, template = "LaSCo", "val", "{query-text}"
    FOLDERS = ".", "coco", "COCO", "images"                                     # where train2014/ and val2014/ lie

    def read(self) -> None:
        if self.complete_text:
            raise InputError("LaSCo has no captions of its targets: drop --use_complete_text_query")
        annotated = self.root / "downloads" if (self.root / "downloads").is_dir() else self.root
        self.top = next((name for name in self.FOLDERS if any(
            (self.root / name / part).is_dir() for part in ("train2014", "val2014"))), self.FOLDERS[0])
        name = "val" if self.published == "test" else "train"
        file = require(annotated / f"lasco_{name}.json", "annotation file")
        pairs = [pair for pair in self.read_pairs(file) if self.has(pair[0])]
        named = dict.fromkeys(place for source, target, _ in pairs for place in (source, target))
        if self.published == "test":
            corpus = require(annotated / "lasco_val_corpus.json", "corpus")
            listed = dict.fromkeys(self.read_corpus(corpus))
            if strangers := [place for place in named if place not in listed]:
                self.refuse_or_drop("images that are not in the corpus", f"{len(strangers)} images that {file} names "
                                    f"are not in {corpus.name}, first {strangers[0]}: one of the two is of another "
                                    "release; or pass --skip_bad_images True to leave their queries out",
                                    len(strangers))
            named = listed
        self.take(pairs, named, file)

    def place(self, path: str, where: str) -> str:
        """The path below root of val2014/x.jpg, which the corpus calls val/val2014/x.jpg."""
        folder, name = os.path.split(inside(os.path.normpath(path), where))
        return os.path.normpath(f"{self.top}/{os.path.basename(folder)}/{name}")

    def read_pairs(self, file) -> list[tuple[str, str, str]]:
        """(source, target, text) of each query, images by path."""
        pairs = []
        for where, entry in read_entries(file):
            ends = [entry.get(end) for end in ("query-image", "target-image")] if isinstance(entry, dict) else [None]
            if not all(isinstance(end, list) and len(end) == 2 and isinstance(end[1], str) for end in ends) or (
                    not isinstance(entry.get("query-text"), str)):
                raise InputError(f"{where}: expected {{'query-image': [id, path], 'query-text': text, 'target-image': "
                                 f"[id, path]}}, got {str(entry)[:80]!r}")
            pairs.append((*(self.place(path, where) for _, path in ends), entry["query-text"]))
        return pairs

    def read_corpus(self, file) -> list[str]:
        entries = read_json(file)
        if not isinstance(entries, list) or not all(
                isinstance(entry, dict) and isinstance(entry.get("path"), str) for entry in entries):
            raise InputError(f"{file}: expected a JSON list of {{'id': number, 'path': path}}")
        return [self.place(entry["path"], str(file)) for entry in entries]
