"""The four ways to ask a CLIP model without composing anything: its picture, its text, the sum and the product of both.

In Pic2Word (arXiv 2302.03084, section 4) the first three are the baselines, in BASIC (arXiv 2510.25387) all four.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from zero_shot.composer import ZeroShot


class ImageAlone(ZeroShot):
    """The picture, whatever the text."""

    def compose(self, image: Tensor, text: Tensor) -> Tensor:
        return image


class TextAlone(ZeroShot):
    """The text, whatever the picture."""

    def compose(self, image: Tensor, text: Tensor) -> Tensor:
        return text


class Sum(ZeroShot):
    """The sum of the cosines with the picture and with the text."""

    def compose(self, image: Tensor, text: Tensor) -> Tensor:
        return F.normalize(image, dim=1) + F.normalize(text, dim=1)


class Product(ZeroShot):
    """The product of the two cosines, each at least 0: equal for all images that one of them has nothing of."""

    @property
    def query_dim(self) -> int:
        return 2 * self.image_dim

    def compose(self, image: Tensor, text: Tensor) -> Tensor:                   # (B, e), (B, e) -> (B, 2 e)
        return torch.cat([F.normalize(image, dim=1), F.normalize(text, dim=1)], dim=1)

    def as_query(self, composed: Tensor) -> Tensor:
        return composed

    def score(self, queries: Tensor, gallery: Tensor) -> Tensor:
        """(B, 2 e), (N, e) -> (B, N)."""
        image, text = queries.chunk(2, dim=1)
        return (image @ gallery.T).clamp_(min=0).mul_((text @ gallery.T).clamp_(min=0))


SIMPLE = {"image": ImageAlone, "text": TextAlone, "sum": Sum, "product": Product}


def beside(model) -> dict[str, ZeroShot]:
    """The four by name, of another zero-shot composer's towers and prompt; none beside one whose image and text are not
    of one space."""
    made = {name: copy.copy(model) for name in SIMPLE} if model.frozen else {}
    for name, other in made.items():
        other.__class__ = SIMPLE[name]
    return made
