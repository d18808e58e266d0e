"""An RGB image to the square in its centre: torchvision's Resize(S) and CenterCrop(S), pixel for pixel.

Pillow resizes the whole image, of which the square is then cut out. `square` computes the square alone, by Pillow's
formula (libImaging/Resample.c): an output pixel is a weighted mean of inputs, the weights a triangle that reaches one
output pixel to each side, or one input pixel where the image grows, in 22 bits; first across, then down, each rounded
to a byte. It runs without Python's lock and on Pillow's own memory. What it leaves to Pillow are tall and large images,
and other filters. To decode a JPEG of 600 x 400 and resize it to 224 takes 1.6 ms of a core's time in place of 2.8, one
of 153 x 116 0.44 in place of 0.85.
"""

from functools import lru_cache

import numpy as np
from PIL import Image

from machine.compiled import compiled

BITS = 22                                   # of a weight, so that 255 times an output's weights fit into 32
TALL = 2                                    # times as high as wide: Pillow 13 resizes higher ones down first, older
                                            # Pillows those of over 100 times, which differs by rounding


def placed(width: int, height: int, size: int) -> tuple[int, int, int, int]:
    """(width, height) of the image resized to a shorter side of `size`, and (left, top) of its centre square."""
    short = min(width, height)
    width, height = int(size * width / short), int(size * height / short)
    return width, height, round((width - size) / 2), round((height - size) / 2)


def plain_square(image: Image.Image, size: int, resampling: str = "bilinear") -> np.ndarray:
    """(size, size, 3) uint8 of an RGB image by Pillow itself: for a single image, not worth the time `square` needs to
    be compiled or loaded, and for Pillow's other filters, by name."""
    width, height, left, top = placed(*image.size, size)
    return np.asarray(image.resize((width, height), Image.Resampling[resampling.upper()])
                      .crop((left, top, left + size, top + size)))


def square(image: Image.Image, size: int, resampling: str = "bilinear") -> np.ndarray:
    """(size, size, 3) uint8 of an RGB image: what `plain_square` gives, with 'bilinear' in half the time.

    Raises what Pillow does for a file that cannot be decoded.
    """
    if resampling != "bilinear" or image.height > TALL * image.width:
        return plain_square(image, size, resampling)
    image.load()                                                                # raises what is wrong with the file
    try:
        import nanoarrow  # only here: a server has it not, nor
        import numba  # noqa: F401                                              # numba, and takes twice the time

        held = nanoarrow.c_array(image).child(0).view().buffer(1)
    except (ImportError, ValueError):                                           # over 4 megapixels: in several pieces
        return plain_square(image, size)
    width, height, left, top = placed(*image.size, size)
    made = np.empty((size, size, 3), np.uint8)
    resample(np.frombuffer(held, np.uint8).reshape(image.height, -1), *weights(image.width, width, left, size),
             *weights(image.height, height, top, size), made.reshape(size, -1))
    return made


@lru_cache(1024)
def weights(length: int, resized: int, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Where outputs first, ..., first + count - 1 of `length` inputs made `resized` begin, and their inputs' weights.

    Returns (count,) int32 and (count, taps) int32, the weights in units of 2^-BITS.
    """
    scale = length / resized
    reach = max(scale, 1.0)
    centres = (np.arange(first, first + count) + 0.5) * scale
    starts = np.maximum((centres - reach + 0.5).astype(np.int32), 0)
    ends = np.minimum((centres + reach + 0.5).astype(np.int32), length)
    taps = (ends - starts).max()
    starts = np.minimum(starts, length - taps)                                  # the inputs added to one weigh 0
    inputs = starts[:, None] + np.arange(taps)
    heights = np.maximum(1 - np.abs((inputs - centres[:, None] + 0.5) * (1 / reach)), 0)
    shares = heights / heights.cumsum(1)[:, -1:]                                # cumsum adds in Pillow's order
    return starts, (0.5 + shares * (1 << BITS)).astype(np.int32)


@compiled
def resample(pixels, starts, across, tops, down, made):
    """Fill `made`, (S, 3 S) bytes, from `pixels`, (H, 4 W), each fourth one unused: weighted sums across, then down.

    starts, across: `weights` of the columns; tops, down: of the rows. Each is (S,) and (S, taps).
    """
    half, first = np.int32(1 << (BITS - 1)), tops[0]
    between = np.empty((tops[-1] + down.shape[1] - first, made.shape[1]), np.uint8)
    # Unsigned places: those that might count from the end cost a comparison each.
    for y in range(len(between)):
        row, narrow = pixels[first + y], between[y]
        for x in range(len(starts)):
            red = green = blue = half
            place = np.uintp(4 * starts[x])
            for tap in range(across.shape[1]):
                weight = across[x, tap]
                red += np.int32(row[place]) * weight
                green += np.int32(row[place + np.uintp(1)]) * weight
                blue += np.int32(row[place + np.uintp(2)]) * weight
                place += np.uintp(4)
            out = np.uintp(3 * x)
            narrow[out], narrow[out + np.uintp(1)], narrow[out + np.uintp(2)] = red >> BITS, green >> BITS, blue >> BITS
    sums = np.empty(made.shape[1], np.int32)
    for y in range(len(made)):
        sums[:] = half
        for tap in range(down.shape[1]):
            row, weight = between[tops[y] - first + tap], down[y, tap]
            for x in range(len(sums)):
                sums[x] += np.int32(row[x]) * weight
        for x in range(len(sums)):
            made[y, x] = sums[x] >> BITS
