"""CIRR: annotated pairs of photographs, read and checked; and what its test server is sent."""

import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np

from benchmarks.base import AnnotatedDataset, Annotation, QuerySet, RetrievalTask, inside, require, texts_of
from benchmarks.metrics import ListedMetric
from machine.errors import InputError
from machine.text_files import read_entries, read_json


class CIRR(AnnotatedDataset):
    """Annotated pairs of NLVR2's photographs (arXiv 2108.04024), release rc2; the test split is the published
    validation split. Of the published test split, test1, a server keeps the answers.

    Queries are judged among all of the split's images but the reference, and among the five others of its set of six
    alike images; `recall_mean` is that of the former's R@5 and the latter's R@1, by which models are ranked.
    """

    title, tested_as, template = "CIRR rc2", "val", "{caption}"
    best_metric = "recall_mean"
    headline = "recall_top5_correct_composition", "recall_top1_subset", best_metric
    solved_at = "correct_composition", 5
    FOLDERS = "img_raw", "images", "."                                          # where the split file's paths start
    KS, SUBSET_KS = (1, 5, 10, 50), (1, 2, 3)
    served = "test1"

    @property
    def ends(self) -> tuple[str, ...]:
        """Where an entry says which images its pair has; of test1 the target is not annotated."""
        return ("reference",) if self.split == self.served else ("reference", "target_hard")

    def read(self) -> None:
        if self.complete_text:
            raise InputError("CIRR has no captions of its targets: drop --use_complete_text_query")
        annotated = self.root / "cirr" if (self.root / "cirr" / "captions").is_dir() else self.root
        name = f"rc2.{self.split if self.split == self.served else 'val' if self.split == 'test' else 'train'}.json"
        places = self.read_split(require(annotated / "image_splits" / f"split.{name}", "split file"))
        captions = require(annotated / "captions" / f"cap.{name}", "caption file")
        entries = [entry for entry in self.read_captions(captions, places) if self.has(entry["reference"])]
        used = [entry[end] for entry in entries for end in self.ends]
        names = dict.fromkeys(used if self.published == "train" else places)
        kept = [image for image in names if places[image] not in self.without]
        self.images, ids = [places[image] for image in kept], {image: number for number, image in enumerate(kept)}
        whole = [entry for entry in entries if all(entry[end] in ids for end in self.ends)]
        if self.lenient:
            self.drop("pairs", len(entries) - len(whole))
        self.names, self.pairs, self.annotations = kept, [entry.get("pairid") for entry in whole], []
        for entry in whole:
            source, *targets = (ids[entry[end]] for end in self.ends)
            others = {ids[image] for image in entry["img_set"]["members"] if image in ids} - {source, *targets}
            self.annotations.append(Annotation(source, targets, entry["caption"], sorted(others), ""))
        if not self.annotations:
            raise InputError(f"no usable pair of the {self.split} split in {captions}")

    def read_split(self, file: Path) -> dict[str, str]:
        """Image id -> path below root."""
        places = read_json(file)
        if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
            raise InputError(f"{file}: expected a JSON object of image ids and paths")
        folder = next(name for name in self.FOLDERS if (self.root / name).is_dir())
        there = cache(lambda place: (self.root / folder / place).is_dir())      # some hundred, of many thousand images

        def found(place: str) -> str:
            """NLVR2's train/12/x.png, or train/x.png where its hundred folders were made one."""
            above, name = os.path.split(place)
            flat = f"{os.path.dirname(above)}/{name}"
            return flat if os.path.dirname(above) and not there(above) and there(os.path.dirname(above)) else place
        return {name: os.path.normpath(f"{folder}/{found(inside(os.path.normpath(place), str(file)))}")
                for name, place in places.items()}

    def read_captions(self, file: Path, known: dict[str, str]) -> list[dict]:
        entries = []
        for where, entry in read_entries(file):
            if not is_pair(entry, self.ends):
                ends = ", ".join(f"'{end}': id" for end in self.ends)
                raise InputError(f"{where}: expected {{'pairid': number, {ends}, 'caption': text, 'img_set': "
                                 f"{{'members': [id, ...]}}}}, got {str(entry)[:80]!r}")
            for name in (*(entry[end] for end in self.ends), *entry["img_set"]["members"]):
                if name not in known:
                    raise InputError(f"{where}: image {name[:80]!r} is not in the split's file")
            entries.append(entry)
        return entries

    def test_task(self) -> RetrievalTask:
        sources, gallery = np.array([line.source for line in self.annotations]), len(self.images)
        if self.split == self.served:
            return RetrievalTask(np.arange(gallery), [QuerySet(sources, texts_of(self.annotations), sources, [])])
        right = [np.array(line.targets) for line in self.annotations]
        subsets = [np.array(sorted([*line.targets, *line.negatives])) for line in self.annotations]
        metrics = [ListedMetric("correct_composition", right, gallery, None, self.KS),
                  ListedMetric("subset", right, gallery, subsets, self.SUBSET_KS)]
        return RetrievalTask(np.arange(gallery), [QuerySet(sources, texts_of(self.annotations), sources, metrics)])

    def with_means(self, metrics: dict[str, float]) -> dict[str, float]:
        parts = [metrics.get(name) for name in ("recall_top5_correct_composition", "recall_top1_subset")]
        return metrics if None in parts else {**metrics, "recall_mean": sum(parts) / 2}

    def submission(self, rankings: Iterable[np.ndarray]) -> dict[str, dict]:
        """The first of all images, and the first of the set's five others."""
        whole, subset = ({"version": "rc2", "metric": metric} for metric in ("recall", "recall_subset"))
        for pair, line, order in zip(self.pairs, self.annotations, rankings, strict=True):
            alike = order[np.isin(order, line.negatives)]
            for answers, found, most in ((whole, order, max(self.KS)), (subset, alike, max(self.SUBSET_KS))):
                answers[str(pair)] = [self.names[image] for image in found[:most]]
        return {"cirr_test1_recall.json": whole, "cirr_test1_recall_subset.json": subset}


def is_pair(entry, ends: tuple[str, ...]) -> bool:
    """Whether a caption file's entry has what it should, its images being named at `ends`."""
    if not isinstance(entry, dict) or not isinstance(entry.get("img_set"), dict):
        return False
    if "target_hard" not in ends and not isinstance(entry.get("pairid"), int):  # by which its server knows it
        return False
    members = entry["img_set"].get("members")
    return isinstance(members, list) and all(isinstance(text, str) for text in (
        *map(entry.get, ends), entry.get("caption"), *members))
