"""Images that lie near queries of every kind, and so are found in the place of those that are meant.

Things that a model was trained with draw queries about others to themselves. Cross-domain similarity local scaling
(CSLS, arXiv 1710.04087, section 2.3) takes off a score how near an image is to the queries that are nearest to it.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from machine.errors import InputError
from searching.image_list import ImageList
from searching.ranking import unit
from test_retrieval import compose_queries
from text_model import spread

QUERIES = 8192                          # at most, that images are compared with
NEAREST = 10
IMAGES_AT_ONCE = 512                    # whose cosines with the queries take 16 MiB


class Hubness:
    """What is taken off each listed image's cosine: `weight` times its mean cosine with the NEAREST nearest to it of
    the queries that can be asked here: every text of the model's that its checkpoint names, of pictures from first to
    last. CSLS has a weight of 1/2.

    model, texts: of the checkpoint. Raises InputError where it names no texts.
    """

    def __init__(self, images: ImageList, model, texts: list[str], weight: float, progress: Callable):
        if not texts:
            raise InputError("the model names no texts that it was trained with, as --hubness needs; leave that out")
        dim, numbers, means = model.image_dim, [], []
        pictures = sources(images, max(1, QUERIES // len(texts)), dim).to(model.a.device)               # (S, D)
        each = torch.arange(len(pictures), device=pictures.device).repeat(len(texts))
        asked = compose_queries(model, pictures, each, [text for text in texts for _ in pictures]).cpu()    # (T S, D)
        with progress(total=len(images), desc="hubness", unit="image") as bar:
            for part, features in images.all_features(dim=dim):
                means += [(rows @ asked.T).topk(min(NEAREST, len(asked))).values.mean(1)
                          for rows in torch.from_numpy(unit(features)).split(IMAGES_AT_ONCE)]
                numbers.append(part)
                bar.update(len(part))
        self.numbers, self.taken_off = np.concatenate(numbers), weight * torch.cat(means).numpy()
        self.least = float(self.taken_off.min())

    def of(self, numbers: list[int]) -> np.ndarray:
        """(n,) float32; of an image that was listed since, the least."""
        places = np.searchsorted(self.numbers, numbers).clip(max=len(self.numbers) - 1)
        return np.where(self.numbers[places] == numbers, self.taken_off[places], np.float32(self.least))


def sources(images: ImageList, count: int, dim: int) -> Tensor:
    """(S, D) features of `count` of the images, or all, from first to last."""
    found = np.concatenate([features for _, features in images.all_features(max(1, len(images) // count), dim)])
    return torch.from_numpy(found[spread(range(len(found)), count)])
