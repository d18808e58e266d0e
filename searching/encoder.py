"""Pictures, texts and queries as vectors: what searching asks of a model, whatever computes it.

A model is a checkpoint's, computed by torch (searching/from_checkpoint.py), or one that an index holds as networks,
which need no torch (searching/networks.py).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from machine.errors import InputError
from machine.picture_files import InMemory, TooLarge, decode
from machine.resizing import plain_square
from machine.vocabulary import SimpleVocab, spread, tokenize
from searching.ranking import unit

LONGEST_TEXT = 1000                     # characters
LARGEST_SIDE = 4096                     # pixels of the images that a model sees
ENCODED_AT_ONCE = 32                    # pictures


def read_picture(path: str | Path | InMemory, size: int, resampling: str = "bilinear") -> np.ndarray:
    """(size, size, 3) uint8 of a query's picture. Raises InputError where it is none, or beyond the bounds of
    picture_files.py, within which no picture needs a time limit."""
    try:
        return decode(path, size, resampling, upright=True, to_square=plain_square)
    except TooLarge:
        raise
    except InputError:
        if isinstance(path, str | Path) and not Path(path).exists():
            raise InputError(f"there is no file {path}") from None
        raise InputError(f"{path} is no picture that can be read; give a JPEG, PNG or WebP file") from None


class Encoder:
    """A model as searching has it; arrays are NumPy's.

    path: where it is from. opt: the flags of its run, as far as they are known. size: S in pixels, of the images it
    sees, and Pillow's name of the filter. image_dim: D. query_dim: of what is searched with, D
    but of a composer that compares an image with picture and text apart. vocabulary: the words that it can read, None
    where it can read any. text_encoder: as --text_encoder names it. examples: texts that it was trained with.
    """

    path: str | Path
    opt: dict
    size: int
    resampling: str
    image_dim: int
    query_dim: int
    vocabulary: SimpleVocab | None
    text_encoder: str
    examples: list[str]

    def fingerprint(self) -> str:
        """Digits that change with any of its weights."""
        raise NotImplementedError

    def encode_pixels(self, pixels: np.ndarray) -> np.ndarray:
        """(B, S, S, 3) uint8 -> (B, D) float32."""
        raise NotImplementedError

    def encode_texts(self, texts: list[str]) -> np.ndarray:
        """B texts -> (B, T) float32."""
        raise NotImplementedError

    def composed(self, images: np.ndarray, texts: np.ndarray) -> np.ndarray:
        """(B, D), (B, T) -> (B, query_dim): where that is D, unit rows."""
        raise NotImplementedError

    def meet(self, gallery: np.ndarray) -> None:
        """Tell a composer of its own comparison all images' unit features, (N, D)."""
        raise NotImplementedError

    def score(self, query: np.ndarray, gallery: np.ndarray) -> np.ndarray:
        """Its comparison: (query_dim,), (N, D) -> (N,)."""
        raise NotImplementedError

    def compose(self, picture: str | Path, text: str) -> np.ndarray:
        """A query's picture and text -> the unit vector (D,) float32 to search with: without a text, the picture's own.

        Raises InputError for a picture that cannot be read, and for a text as `unknown` does.
        """
        return self.query(self.images([self.read(picture)])[0], text)

    def encode(self, pictures: Sequence[str | Path]) -> np.ndarray:
        """A gallery's N pictures -> unit rows (N, D) float32, whose products with a composed query are cosines.

        Raises InputError for a picture that cannot be read.
        """
        parts = [self.images([self.read(picture) for picture in pictures[start:start + ENCODED_AT_ONCE]])
                 for start in range(0, len(pictures), ENCODED_AT_ONCE)]
        return unit(np.concatenate([np.empty((0, self.image_dim), np.float32), *parts]))

    def read(self, picture: str | Path | InMemory) -> np.ndarray:
        """(S, S, 3) uint8, as the model sees it."""
        return read_picture(picture, self.size, self.resampling)

    def images(self, pixels: Sequence[np.ndarray]) -> np.ndarray:
        """B arrays (S, S, 3) uint8 -> (B, D). Raises InputError where they are not finite."""
        features = self.encode_pixels(np.stack(pixels))
        if not np.isfinite(features).all():
            raise InputError(f"the model of {self.path} gives features that are not finite: its training diverged")
        return features

    def query(self, image: np.ndarray, text: str, nearness: float = 0.0) -> np.ndarray:
        """(D,), a text -> the unit vector (D,) to search with: without a text, the image's own; or, of a composer whose
        `score` takes something else, that. Words that the model does not know are left out, as read they would be
        noise.

        nearness: so much of the image's direction is added to the composed one, which things profit from that the model
        was not trained with (docs/experiments.md).

        Raises InputError for a text as `unknown` does, for nearness where the query is no such vector, and where it is
        not finite.
        """
        if unknown := self.unknown(text):                                       # which refuses what cannot be read
            text = " ".join(word for word in tokenize(text) if word not in unknown)
        own = query = unit(image)
        if text.strip():
            (query,) = self.composed(image[None], self.encode_texts([text]))
            if nearness and query.shape != own.shape:
                raise InputError(f"--nearness does not go with {self.opt.get('model')}, which compares an image with "
                                 "picture and text apart; leave it out")
            if nearness:
                query = unit(query + np.float32(nearness) * own)
        if not np.isfinite(query).all():
            raise InputError("the model's answer to this query is not finite: its training diverged")
        return query

    def unknown(self, text: str) -> list[str]:
        """The words that the model was not trained with. A sentence service knows all.

        Raises InputError for a text that is too long, or of which nothing is known.
        """
        if len(text) > LONGEST_TEXT:
            raise InputError(f"the text has {len(text):,} characters; shorten it to {LONGEST_TEXT:,}")
        if self.vocabulary is None or not text.strip():
            return []
        words = list(dict.fromkeys(tokenize(text)))
        unknown = [word for word in words if word not in self.vocabulary.word2id]
        if len(unknown) == len(words):
            known = ", ".join(spread([word for word in self.vocabulary.word2id if word.isalpha()], 8))
            raise InputError(f"the model knows none of these words; it was trained with words as {known}")
        return unknown
