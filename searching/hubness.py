"""Images that lie near queries of every kind, and so are found in the place of those that are meant.

Things that a model was trained with draw queries about others to themselves. Cross-domain similarity local scaling
(CSLS, arXiv 1710.04087, section 2.3) takes off a score how near an image is to the queries that are nearest to it.
"""

from collections.abc import Callable

import numpy as np

from machine.errors import InputError
from machine.threads import prefetch, threads_to_use
from machine.vocabulary import spread
from searching.encoder import Encoder
from searching.image_list import ImageList
from searching.ranking import unit

QUERIES = 8192                          # at most, that images are compared with
NEAREST = 10
IMAGES_AT_ONCE = 512                    # whose cosines with the queries take 16 MiB


class Hubness:
    """What is taken off each listed image's cosine: `weight` times its mean cosine with the NEAREST nearest to it of
    the queries that can be asked here: every text of the model's that its checkpoint names, of pictures from first to
    last. CSLS has a weight of 1/2.

    encoder: with its examples of texts. Raises InputError where it has none.
    """

    def __init__(self, images: ImageList, encoder: Encoder, weight: float, progress: Callable):
        texts = encoder.examples
        if not texts:
            raise InputError("the model names no texts that it was trained with, as --hubness needs; leave that out")
        dim, numbers, means = encoder.image_dim, [], []
        pictures = sources(images, max(1, QUERIES // len(texts)), dim)          # (S, D)
        asked = np.concatenate([encoder.composed(pictures, np.repeat(text[None], len(pictures), 0))
                                for text in encoder.encode_texts(texts)])       # (T S, D)
        asked = unit(asked)

        def mean(rows: np.ndarray) -> np.ndarray:                               # (n, D) -> (n,)
            nearest = min(NEAREST, len(asked))
            return np.partition(rows @ asked.T, -nearest, axis=1)[:, -nearest:].mean(1)
        with progress(total=len(images), desc="hubness", unit="image") as bar:
            for part, features in images.all_features(dim=dim):
                parts = np.split(unit(features), range(IMAGES_AT_ONCE, len(part), IMAGES_AT_ONCE))
                means += prefetch(mean, parts, threads_to_use())
                numbers.append(part)
                bar.update(len(part))
        self.numbers, self.taken_off = np.concatenate(numbers), np.float32(weight) * np.concatenate(means)
        self.least = float(self.taken_off.min())

    def of(self, numbers: list[int]) -> np.ndarray:
        """(n,) float32; of an image that was listed since, the least."""
        places = np.searchsorted(self.numbers, numbers).clip(max=len(self.numbers) - 1)
        return np.where(self.numbers[places] == numbers, self.taken_off[places], np.float32(self.least))


def sources(images: ImageList, count: int, dim: int) -> np.ndarray:
    """(S, D) features of `count` of the images, or all, from first to last."""
    found = np.concatenate([features for _, features in images.all_features(max(1, len(images) // count), dim)])
    return found[spread(range(len(found)), count)]
