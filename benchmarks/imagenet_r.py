"""Domain conversion: the same kind of thing as in a photograph, but drawn, folded, as a toy or a sculpture."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.base import CompositionDataset, QuerySet, RetrievalTask, Sample, inside, require
from benchmarks.metrics import Metric
from machine.errors import InputError
from machine.text_files import read_lines

DOMAINS = "cartoon", "origami", "toy", "sculpture"                              # by number; 6 are the photographs
EACH = 1000                             # a label is a class plus so much times the domain's number
KS = (1, 5, 10, 50, 100, 200)
EPSILON = 1e-5                          # added to how many images are right: the published numbers have it


@dataclass
class ShareFound(Metric):
    """R@K here is the share of a query's right images among the first K, P@K the share of those that are right, of
    Pic2Word's published code; a query without a right image counts as 0. `*_answerable`, ours: the means over queries
    that have one."""

    ks: tuple[int, ...] = KS

    @property
    def depth(self) -> int:
        return max(self.ks)

    def values(self, ranks: np.ndarray, own: np.ndarray) -> dict[str, float]:
        right, ranked = self.right_ones(own), self.ranked(own)
        found: dict[str, float] = {}
        for k in self.ks:
            hits = (ranks < k).sum(1)                                           # (Q,)
            each = {"recall": hits / (right + EPSILON), "precision": hits / np.minimum(k, ranked)}
            for kind, shares in each.items():
                found[f"{kind}_top{k}_{self.name}"] = float(shares.mean())
                found[f"{kind}_top{k}_{self.name}_answerable"] = float(shares[right > 0].mean()) if right.any() else 0.0
        return found

    def names(self) -> list[str]:
        return [f"{kind}_top{k}_{self.name}{which}" for k in self.ks for kind in ("recall", "precision")
                for which in ("", "_answerable")]

    def chance(self, own: np.ndarray) -> dict[str, float]:
        right, ranked = self.right_ones(own), self.ranked(own)
        return {f"recall_top{k}_{self.name}": float((np.minimum(k, ranked) * right / ranked / (right + EPSILON)).mean())
                for k in self.ks}


class ImageNetR(CompositionDataset):
    """Photographs of 200 of ImageNet's classes, each asked once a domain (Pic2Word, arXiv 2302.03084): right is its
    class in that domain. The gallery is ImageNet-R's images of the four domains and all the photographs, the query's
    own among them. The text is the domain's name.
    """

    title, without_training, template = "ImageNet-R", True, "{domain}"
    best_metric = "recall_top10_mean"
    headline = "recall_top10_mean", "recall_top50_mean"
    solved_at = "correct", 10
    QUERIES, TARGETS = "imgnet_real_query.txt", "imgnet_targets.txt"

    @classmethod
    def splits(cls, path: Path, held_out: float) -> list[str]:
        return ["test"]

    def read(self) -> None:
        if self.complete_text:
            raise InputError("ImageNet-R has no captions of its targets: drop --use_complete_text_query")
        self.below = "" if (self.root / self.TARGETS).exists() else "imgnet/"   # where the paths' own imgnet/ is
        asked, ranked = ([line for line in self.lines(name) if line[0] not in self.without]
                         for name in (self.QUERIES, self.TARGETS))
        self.images = [*dict.fromkeys(image for image, _ in (*ranked, *asked))]
        ids = {image: number for number, image in enumerate(self.images)}
        self.gallery = np.array([ids[image] for image, _ in ranked])            # (N,)
        self.labels = np.array([label for _, label in ranked])
        self.sources = np.array([ids[image] for image, _ in asked])             # (Q,)
        self.classes = np.array([label for _, label in asked])
        there = set((self.labels // EACH).tolist())
        self.domains = {name: number for number, name in enumerate(DOMAINS) if number in there}
        if not asked or not self.domains:
            raise InputError(f"{self.root / self.below} gives no query: {self.QUERIES} or {self.TARGETS} names no "
                             "usable image")
        without = [f"{int((~np.isin(self.classes + EACH * number, self.labels)).sum()):,} of {name}"
                   for name, number in self.domains.items()]
        self.about = (f"ImageNet-R: {len(asked):,} photographs, {len(ranked):,} images in the gallery; queries without "
                      f"a right image, which count as 0: {', '.join(without)}")

    def lines(self, name: str) -> list[tuple[str, int]]:
        """(path below root, label) of each line of a list."""
        found, file = [], require(self.root / self.below / name, "list of images")
        for number, line in read_lines(file):
            path, _, label = line.strip().rpartition(" ")
            if not path or not label.isdecimal():
                raise InputError(f"{file}, line {number}: expected 'path label', got {line[:80]!r}")
            path = inside(path.strip(), f"{file}, line {number}").removeprefix("imgnet/")
            found.append((self.below + path, int(label)))
        return found

    def queries(self) -> list[Sample]:
        return [Sample(int(source), -1, domain) for domain in self.domains for source in self.sources]

    def test_task(self) -> RetrievalTask:
        return RetrievalTask(self.gallery, [
            QuerySet(self.sources, [name] * len(self.sources), np.full(len(self.sources), -1),
                     [ShareFound(f"correct_{name}", self.classes + EACH * number, self.labels)])
            for name, number in self.domains.items()])

    def with_means(self, metrics: dict[str, float]) -> dict[str, float]:
        """The plain means over the domains."""
        found = dict(metrics)
        for k in KS:
            for kind in ("recall", "precision"):
                values = [metrics.get(f"{kind}_top{k}_correct_{name}") for name in self.domains]
                if None not in values:
                    found[f"{kind}_top{k}_mean"] = sum(values) / len(values)
        return found
