"""Texts where others have images: by id, with what a feature store asks of its images."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SIDE, LINE = 224, 34                    # pixels of a text that is to be looked at, and letters of its lines


class TextStore:
    """Texts by id. folder: where what is made of them is kept, or None; a text goes there by its content alone."""

    upright = False

    def __init__(self, texts: Sequence[str], folder: Path | None):
        self.texts = texts
        names = (hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32] for text in texts)
        self.names = self.paths = [f"{folder}/{name}" for name in names]
        self.versions = [(1, 0)] * len(self.paths)

    def __len__(self) -> int:
        return len(self.paths)

    def batch(self, ids: Sequence[int], device=None) -> list[str]:
        return [self.texts[int(index)] for index in ids]

    def picture(self, index: int) -> np.ndarray:
        """(S, S, 3) uint8: the text, written out."""
        text = self.texts[index]
        sheet = Image.new("RGB", (SIDE, SIDE), "white")
        lines = "\n".join(text[start:start + LINE] for start in range(0, min(len(text), 16 * LINE), LINE))
        ImageDraw.Draw(sheet).text((8, 8), lines.encode("latin-1", "replace").decode("latin-1"), fill="black")
        return np.asarray(sheet)

    def missing(self) -> list[str]:
        return []

    def unreadable(self, *_) -> dict[int, str]:
        return {}
