"""CIRCO: queries with several right photographs among all of COCO 2017's unlabeled ones; and what its test server is
sent."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from benchmarks.base import CompositionDataset, QuerySet, RetrievalTask, Sample, inside, require
from benchmarks.metrics import MAP_KS, ListedMetric
from machine.errors import InputError
from machine.text_files import read_json


class CIRCO(CompositionDataset):
    """Captions of how a photograph differs (arXiv 2303.15247). The test split is the published validation split; of
    the published test split, here `served_test`, a server keeps the answers.

    Right for the mAP is any of a query's `gt_img_ids`, for recall the image alone that the caption was written for. The
    reference stays in the ranking. The mAP@10 is averaged apart for each of the semantic aspects that queries have.
    """

    title, tested_as, served, without_training = "CIRCO", "val", "served_test", True
    best_metric = "map_top5_correct_composition"
    headline = best_metric, "map_top10_correct_composition", "recall_top10_target"
    answers_served = 50
    GALLERY = Path("COCO2017_unlabeled")
    ASPECT_K = 10                       # of the semantic mAP

    @classmethod
    def splits(cls, path: Path, held_out: float) -> list[str]:
        return ["test"]

    @property
    def template(self) -> str:
        return "{shared_concept} {relative_caption}" if self.shared_concept else "{relative_caption}"

    def read(self) -> None:
        if self.complete_text:
            raise InputError("CIRCO has no captions of its targets: drop --use_complete_text_query")
        self.is_judged = self.split != self.served
        name = self.tested_as if self.is_judged else "test"
        self.file = require(self.root / "annotations" / f"{name}.json", "annotation file")
        entries = self.read_entries()
        places = self.read_gallery(require(self.root / self.GALLERY / "annotations" / "image_info_unlabeled2017.json",
                                           "list of images"))
        strangers = [image for entry in entries for image in images_of(entry) if image not in places]
        if strangers:
            self.refuse_or_drop("ids that have no picture", f"{len(strangers)} ids in {self.file} have no picture in "
                                f"COCO's list, first {strangers[0]}: one of the two is of another release; or pass "
                                "--skip_bad_images True to leave such images out", len(strangers))
        names = [name for name, place in places.items() if place not in self.without]
        self.images, self.names = [places[name] for name in names], names
        ids = {name: number for number, name in enumerate(names)}
        self.entries = []
        for entry in entries:
            right = {ids[image] for image in right_ones(entry) if image in ids}
            if entry["reference_img_id"] in ids and (right or not self.is_judged):
                self.entries.append({**entry, "source": ids[entry["reference_img_id"]], "right": sorted(right),
                                     "target": ids.get(entry.get("target_img_id"), -1)})
        if gone := len(entries) - len(self.entries):
            if not self.is_judged:
                raise InputError(f"{gone} of {len(entries)} queries in {self.file} have a reference that cannot be "
                                 "read, and the test server takes answers to all or none: put the images back")
            self.drop("queries", gone)
        if not self.entries:
            raise InputError(f"no usable query in {self.file}")
        self.about = (f"CIRCO, {name}: {len(self.entries)} queries, {len(self.images)} "
                      f"images; asked with the caption {'and' if self.shared_concept else 'alone, without'} the shared "
                      "concept")

    def read_entries(self) -> list[dict]:
        """The annotations, whose ids must be their places. Raises InputError."""
        entries = read_json(self.file)
        if not isinstance(entries, list):
            raise InputError(f"{self.file}: expected a JSON list of queries; download it again")
        for number, entry in enumerate(entries):
            where = f"{self.file}, entry {number + 1}"
            if not is_query(entry, self.is_judged):
                judged = "'target_img_id': id, 'gt_img_ids': [id, ...], " * self.is_judged
                raise InputError(f"{where}: expected {{'reference_img_id': id, {judged}'relative_caption': text, "
                                 f"'shared_concept': text, 'id': {number}}}, got {str(entry)[:80]!r}")
            if entry["id"] != number:
                raise InputError(f"{where}: its id is {entry['id']}, not {number}: queries are missing, twice there or "
                                 "in another order; download the file again")
            if self.is_judged and entry["target_img_id"] not in entry["gt_img_ids"]:
                raise InputError(f"{where}: the target is not among the right images; download the file again")
        return entries

    def read_gallery(self, file: Path) -> dict[int, str]:
        """COCO's image id -> path below root."""
        content = read_json(file)
        images = content.get("images") if isinstance(content, dict) else None
        if not isinstance(images, list) or not all(
                isinstance(image, dict) and is_id(image.get("id")) and isinstance(image.get("file_name"), str)
                for image in images):
            raise InputError(f"{file}: expected {{'images': [{{'id': number, 'file_name': name}}, ...]}}; it is COCO's "
                             "image_info_unlabeled2017.json")
        folder = f"{self.GALLERY}/unlabeled2017"
        return {image["id"]: f"{folder}/{inside(image['file_name'], str(file))}" for image in images}

    def text_of(self, entry: dict) -> str:
        return f"{entry['shared_concept']} {entry['relative_caption']}" if self.shared_concept else (
            entry["relative_caption"])

    def queries(self) -> list[Sample]:
        return [Sample(entry["source"], entry["target"], self.text_of(entry)) for entry in self.entries]

    def test_task(self) -> RetrievalTask:
        gallery = np.arange(len(self.images))
        asked = QuerySet(np.array([entry["source"] for entry in self.entries]), list(map(self.text_of, self.entries)),
                         np.full(len(self.entries), -1), self.metrics() if self.is_judged else [])
        return RetrievalTask(gallery, [asked])

    def metrics(self) -> list[ListedMetric]:
        right = [np.array(entry["right"]) for entry in self.entries]
        targets = [np.array([entry["target"]] if entry["target"] >= 0 else [], int) for entry in self.entries]
        aspects = sorted({aspect for entry in self.entries for aspect in entry.get("semantic_aspects", ())})
        groups = {f"semantic_{aspect}": np.array([number for number, entry in enumerate(self.entries)
                                    if aspect in entry.get("semantic_aspects", ())]) for aspect in aspects}
        size = len(self.images)
        return [ListedMetric("correct_composition", right, size, None, (), MAP_KS, groups, (self.ASPECT_K,)),
                ListedMetric("target", targets, size, ks=MAP_KS)]

    def submission(self, rankings: Iterable[np.ndarray]) -> dict[str, dict]:
        """The first 50 images of each query. Raises InputError where queries are missing."""
        answers = {str(entry["id"]): [self.names[image] for image in found[:self.answers_served]]
                   for entry, found in zip(self.entries, rankings, strict=True)}
        if list(answers) != [str(number) for number in range(len(answers))]:
            raise InputError(f"queries of {self.file} are missing, and the test server takes all or none")
        return {"circo_test.json": answers}


def is_id(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_query(entry, is_judged: bool) -> bool:
    """Whether an annotation has what it should."""
    if not isinstance(entry, dict) or not all(is_id(entry.get(name)) for name in ("id", "reference_img_id")):
        return False
    if not all(isinstance(entry.get(name), str) for name in ("relative_caption", "shared_concept")):
        return False
    aspects, right = entry.get("semantic_aspects", []), entry.get("gt_img_ids")
    if not isinstance(aspects, list) or not all(isinstance(aspect, str) for aspect in aspects):
        return False
    return not is_judged or (isinstance(right, list) and bool(right) and all(map(is_id, right))
                             and is_id(entry.get("target_img_id")))


def images_of(entry: dict) -> Iterable[int]:
    """All images that an annotation names."""
    return dict.fromkeys([entry["reference_img_id"], *right_ones(entry)])


def right_ones(entry: dict) -> list[int]:
    """None in the published test split."""
    return entry.get("gt_img_ids") or []
