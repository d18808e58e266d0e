"""Any folder of pictures, to train a composer that learns from pictures alone (Pic2Word): no text is read."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from benchmarks.base import CompositionDataset, RetrievalTask, Sample
from benchmarks.texts import of_themselves
from machine.errors import InputError
from machine.picture_folder import Walk


class Pictures(CompositionDataset):
    """All pictures in a folder and below it. A sample is a picture and itself; in a test a picture, made a word, shall
    find the picture."""

    teaches = "pictures"
    upright = is_ones_own = True

    @classmethod
    def splits(cls, path: Path, held_out: float) -> list[str]:
        return ["train", *["validation"] * bool(held_out)]

    def read(self) -> None:
        walk = Walk(self.root, follow_links=True)
        self.images = [name for name in walk.names() if name not in self.without and self.has(name)]
        self.unread = {self.root: walk.unread}
        if not self.images:
            raise InputError(f"{self.root} holds no picture of the {self.split} split, in it or below it")
        self.about = f"{self.split} split: {len(self.images)} pictures"

    def __len__(self) -> int:
        return len(self.images)

    def training_texts(self) -> list[str]:
        return []

    def sample(self, order: np.ndarray, position: int, key: tuple[int, ...]) -> Sample:
        return Sample(int(order[position]), int(order[position]), "")

    def sample_texts(self, seed: int, epoch: int) -> Iterable[str]:
        return [""]

    def test_task(self) -> RetrievalTask:
        return self.training_task(0)

    def training_task(self, seed: int) -> RetrievalTask:
        return of_themselves(self.target_labels, seed)
