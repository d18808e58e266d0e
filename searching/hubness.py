"""Images that lie near queries of every kind, and so are found in the place of those that are meant.

Things that a model was trained with draw queries about others to themselves. Cross-domain similarity local scaling
(CSLS, arXiv 1710.04087, section 2.3) takes off a score how near an image is to the queries that are nearest to it.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from machine.errors import InputError
from searching.image_list import ImageList
from text_model import spread

QUERIES = 8192                          # at most, that images are compared with
NEAREST = 10
IMAGES_AT_ONCE = 512


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
        asked = queries(model, sources(images, max(1, QUERIES // len(texts)), dim), texts)
        with progress(total=len(images), desc="hubness", unit="image") as bar:
            for part, features in images.all_features(dim=dim):
                rows = F.normalize(torch.from_numpy(features.copy()), dim=1)    # (n, D)
                means += [(few @ asked.T).topk(min(NEAREST, len(asked))).values.mean(1)
                          for few in rows.split(IMAGES_AT_ONCE)]
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


@torch.inference_mode()
def queries(model, pictures: Tensor, texts: list[str]) -> Tensor:
    """(S, D), T texts -> (T S, D) unit vectors on the CPU: each text asked of each picture."""
    pictures = pictures.to(model.a.device)
    composed = [model.compose(pictures, text.expand(len(pictures), -1)) for text in model.encode_text(texts)]
    return F.normalize(torch.cat(composed), dim=1).cpu()
