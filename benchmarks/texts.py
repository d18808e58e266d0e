"""Captions alone, a line each, to train a composer that learns from texts (LinCIR): no picture is looked at."""

import os
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np

from benchmarks.base import CompositionDataset, QuerySet, RetrievalTask, Sample
from benchmarks.masking import PLACE, masked, tagger
from benchmarks.metrics import Metric
from machine.errors import InputError
from machine.text_files import read_lines

PROBES = 1000                           # captions that a test asks about


class Texts(CompositionDataset):
    """A .txt file of captions, or a folder of such files. What stands where others have images is the captions.

    As the original cleans them: <PERSON> is person, all is lower case, and `$` goes out. A training sample says the
    caption with a word in place of its nouns; in a test a caption's vector, made a word, shall find the caption.
    """

    teaches = "texts"
    has_pictures = False
    is_ones_own = True

    @classmethod
    def splits(cls, path: Path, held_out: float) -> list[str]:
        return ["train", *["validation"] * bool(held_out)]

    @classmethod
    def folder(cls, path: Path) -> Path:
        return path if path.is_dir() else path.parent

    def read(self) -> None:
        files = [self.root] if self.root.is_file() else [
            self.root / name for name in self.visible(os.listdir(self.root)) if name.endswith(".txt")]
        if not files:
            raise InputError(f"{self.root} holds no .txt file of captions, a line each")
        lines = (clean(line) for file in files for _, line in read_lines(file))
        self.images = [caption for caption in lines if caption and self.has(caption)]
        if not self.images:
            raise InputError(f"{self.root} has no caption of the {self.split} split; write one a line")
        self.about = f"{self.split} split: {len(self.images)} captions, masked {tagger()[0]}"

    @property
    def paths(self) -> list[str]:
        return []

    @property
    def captions(self) -> list[str]:
        return self.images

    def __len__(self) -> int:
        return len(self.images)

    def training_texts(self) -> list[str]:
        return self.images

    def sample(self, order: np.ndarray, position: int, key: tuple[int, ...]) -> Sample:
        """A caption, itself, and what it says with a word in place of its nouns."""
        index = int(order[position])
        caption = self.images[index]
        text = masked(caption, tagger()[1](caption), np.random.default_rng((*key, 1 + position)))
        return Sample(index, index, text)

    def sample_texts(self, seed: int, epoch: int) -> Iterable[str]:
        return self.images

    @cached_property
    def target_labels(self) -> np.ndarray:
        return np.unique(self.images, return_inverse=True)[1]

    def test_task(self) -> RetrievalTask:
        return self.training_task(0)

    def training_task(self, seed: int) -> RetrievalTask:
        return of_themselves(self.target_labels, seed)


def of_themselves(labels: np.ndarray, seed: int) -> RetrievalTask:
    """Some of what a dataset holds, each to be found by itself, made a word, with no text. labels: equal for what is
    equally right."""
    some = np.sort(np.random.default_rng((seed, PROBES)).permutation(len(labels))[:PROBES])
    metric = Metric("correct_composition", labels[some], labels[some])
    return RetrievalTask(some, [QuerySet(some, [""] * len(some), np.full(len(some), -1), [metric])])


def clean(caption: str) -> str:
    return caption.replace("<PERSON>", "person").lower().replace(PLACE, "").strip()
