"""GeneCIS: what a picture is like is asked by a word or two, and each query ranks a small gallery of its own."""

import math
import os
from pathlib import Path

import numpy as np

from benchmarks.base import CompositionDataset, QuerySet, RetrievalTask, Sample, require
from benchmarks.metrics import OwnGalleryMetric
from machine.errors import InputError
from machine.text_files import read_entries

TASKS = "focus_attribute", "change_attribute", "focus_object", "change_object"
Instance = tuple[str, tuple[float, ...] | None]                                 # path below root, and what is cut out


class GeneCIS(CompositionDataset):
    """Four tasks (arXiv 2306.07969): a reference, a condition as "color" or "bus", a target and 9 to 14 others. At K
    the target is found if fewer than K others of its gallery score as high: some galleries hold their target twice.

    Of objects, images are whole photographs of COCO's; of attributes, boxes of Visual Genome's.
    """

    title, without_training = "GeneCIS", True
    best_metric = "recall_top1_mean"
    headline = tuple(f"recall_top{k}_mean" for k in (1, 2, 3))
    solved_at = "correct", 1
    KS = (1, 2, 3)
    template = "{condition}"
    # Where people keep the pictures.
    COCO = "val2017", "coco2017/val2017", "COCO/val2017", "coco/val2017"
    GENOME = "VG_100K_all", "VG_100K", "VG_100K_2", "VG_All", "."

    @classmethod
    def splits(cls, path: Path, held_out: float) -> list[str]:
        return ["test"]

    def read(self) -> None:
        if self.complete_text:
            raise InputError("GeneCIS has no captions of its targets: drop --use_complete_text_query")
        annotated = self.root / "genecis" if (self.root / "genecis").is_dir() else self.root
        self.files: dict[str, str] = {}                                         # name of a picture -> path below root
        for folder in dict.fromkeys((*self.COCO, *self.GENOME)):
            if (self.root / folder).is_dir():
                for name in self.visible(os.listdir(self.root / folder)):
                    self.files.setdefault(name, name if folder == "." else f"{folder}/{name}")
        found = {task: annotated / f"{task}.json" for task in TASKS if (annotated / f"{task}.json").exists()}
        if not found:
            require(annotated / f"{TASKS[0]}.json", "task file")
        self.asked = {task: self.read_task(file) for task, file in found.items()}
        every = [instance for queries in self.asked.values() for _, *listed in queries for instance in listed]
        gone = {instance for instance in every if instance[0] in self.without}
        instances = [instance for instance in dict.fromkeys(every) if instance not in gone]
        self.ids = {instance: number for number, instance in enumerate(instances)}
        self.images, self.crops = [path for path, _ in instances], [box for _, box in instances]
        for task, queries in self.asked.items():
            whole = [query for query in queries if gone.isdisjoint(query[1:])]
            if len(whole) < len(queries):                                       # a smaller gallery would be easier
                self.drop("queries", len(queries) - len(whole))
            self.asked[task] = whole
        self.asked = {task: queries for task, queries in self.asked.items() if queries}
        if not self.asked:
            raise InputError(f"no usable query in the task files of {annotated}")
        if lacking := [task for task in TASKS if task not in self.asked]:       # and no mean is the published one
            self.title = f"GeneCIS without {', '.join(lacking)}"
        self.about = f"{self.title}: " + ", ".join(f"{len(queries)} queries of {task}"
                                                   for task, queries in self.asked.items())

    def read_task(self, file: Path) -> list[tuple]:
        """(condition, reference, target, *others) of each query, images as paths and boxes."""
        known, read, unknown = set(self.files.values()), [], {}
        for where, entry in read_entries(file):
            listed = entry.get("gallery") if isinstance(entry, dict) else None
            images = [entry.get("reference"), entry.get("target"), *listed] if isinstance(listed, list) else []
            if not images or not isinstance(entry.get("condition"), str) or not all(map(is_image, images)):
                raise InputError(f"{where}: expected {{'condition': text, 'reference': image, 'target': image, "
                                 "'gallery': [image, ...]}, an image being {'val_image_id': id} or {'image_id': id, "
                                 f"'instance_bbox': [x, y, width, height]}}, got {str(entry)[:80]!r}")
            instances = [self.instance(image) for image in images]
            unknown |= {path: where for path, _ in instances if path not in known}
            read.append((entry["condition"], *instances))
        self.look_for(file, unknown)
        missing = set(unknown) if self.lenient else set()
        kept = [query for query in read if missing.isdisjoint(path for path, _ in query[1:])]
        if len(kept) < len(read):
            self.drop("queries", len(read) - len(kept))
        return kept

    def look_for(self, file: Path, unknown: dict[str, str]) -> None:
        """Say how many of a task's images have no picture. unknown: {path: where it is named}."""
        if unknown:
            path, where = next(iter(unknown.items()))
            self.refuse_or_drop("ids that have no picture", f"{where}: {len(unknown)} images that {file.name} names "
                                f"have no picture below {self.root}, first {path}: COCO's lie in {self.COCO[0]}, "
                                f"Visual Genome's in {self.GENOME[0]}; or pass --skip_bad_images True to leave their "
                                "queries out", len(unknown))

    def instance(self, image: dict) -> Instance:
        if "val_image_id" in image:
            name, folder, box = f"{int(image['val_image_id']):012d}.jpg", self.COCO[0], None
        else:
            name, folder = f"{int(image['image_id'])}.jpg", self.GENOME[0]
            box = tuple(map(float, image["instance_bbox"]))
        return self.files.get(name, f"{folder}/{name}"), box

    def queries(self) -> list[Sample]:
        return [Sample(self.ids[query[1]], self.ids[query[2]], query[0]) for queries in self.asked.values()
                for query in queries]

    def test_task(self) -> RetrievalTask:
        sets = []
        for task, queries in self.asked.items():
            listed = [[self.ids[instance] for instance in query[2:]] for query in queries]  # the target first
            sizes = np.array([len(ids) for ids in listed])
            galleries = np.array([ids + [-1] * (sizes.max() - len(ids)) for ids in listed])
            sets.append(QuerySet(np.array([self.ids[query[1]] for query in queries]), [query[0] for query in queries],
                                 np.full(len(queries), -1), [OwnGalleryMetric(f"correct_{task}", sizes, self.KS)],
                                 galleries))
        return RetrievalTask(np.arange(len(self.images)), sets)

    def with_means(self, metrics: dict[str, float]) -> dict[str, float]:
        """Papers' summary: each recall's plain mean over the tasks."""
        means = {f"recall_top{k}_mean": [metrics.get(f"recall_top{k}_correct_{task}") for task in self.asked]
                 for k in self.KS}
        return {**metrics, **{name: sum(values) / len(values) for name, values in means.items() if None not in values}}


def is_image(image) -> bool:
    """Whether it is an image as a task file names it."""
    if not isinstance(image, dict):
        return False
    name = image.get("val_image_id", image.get("image_id"))
    if isinstance(name, bool) or not str(name).isascii() or not str(name).isdecimal():
        return False
    box = image.get("instance_bbox")
    return "val_image_id" in image or (isinstance(box, list) and len(box) == 4 and all(
        isinstance(value, int | float) and math.isfinite(value) for value in box) and min(box[2:]) > 0)
