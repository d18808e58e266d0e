"""A part of a picture: a box, with some of what is around it, on a square of black."""

from collections.abc import Callable

import numpy as np
from PIL import Image

from machine.errors import InputError
from machine.resizing import square

MARGIN = 0.7                            # of a box's width and height, taken in beside it


def around(box: tuple[float, ...], width: int, height: int) -> tuple[float, float, float, float]:
    """(x, y, w, h) of a box in an image of this size -> left, top, right, bottom of what is cut out, in pixels.

    As GeneCIS cuts (arXiv 2306.07969, its published code): the margin comes off the left and the top, and right and
    bottom are counted from there, so that a box grows to the left and up alone, but at the image's border.
    """
    x, y, w, h = box
    left, top = max(0, x - MARGIN * w), max(0, y - MARGIN * h)
    return left, top, min(width, left + (1 + MARGIN) * w), min(height, top + (1 + MARGIN) * h)


def on_black(image: Image.Image) -> Image.Image:
    """An RGB image in the middle of a black square as large as its longer side."""
    side = max(image.size)
    padded = Image.new("RGB", (side, side))
    padded.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return padded


def cut_out(image: Image.Image, box: tuple[float, ...]) -> Image.Image:
    """The box of an RGB image, with what is around it, on a square. Raises InputError where nothing of it is there."""
    left, top, right, bottom = map(round, around(box, *image.size))             # as Pillow's crop does
    if left >= right or top >= bottom:
        raise InputError(f"the box {list(box)} is not in it, it has {image.width} x {image.height} pixels")
    return on_black(image.crop((left, top, right, bottom)))


def square_of(box: tuple[float, ...] | None) -> Callable:
    """What makes an image's pixels of it, as resizing.square, of the box alone, where there is one."""
    if box is None:
        return square

    def cut(image: Image.Image, size: int, resampling: str = "bilinear") -> np.ndarray:
        return square(cut_out(image, box), size, resampling)
    return cut
