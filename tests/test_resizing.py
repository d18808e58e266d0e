"""The compiled resize against torchvision's, pixel for pixel, and by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms

from machine.resizing import BITS, plain_square, square, weights


def published(image, size):
    return np.asarray(transforms.CenterCrop(size)(transforms.Resize(size)(image)))


def noise(width, height, seed=0, values=256):
    """(height, width) of random colours; with 2 values, as sharp as a picture can be."""
    random = np.random.default_rng(seed).integers(0, values, (height, width, 3)) * (255 // (values - 1))
    return Image.fromarray(random.astype(np.uint8))


@settings(max_examples=400, deadline=None)
@given(st.integers(1, 500), st.integers(1, 500), st.integers(1, 256), st.integers(0, 9), st.sampled_from([2, 256]))
def test_pixels_are_those_of_the_published_transforms(width, height, size, seed, values):
    if size * max(width, height) > 20_000 * min(width, height):                 # Pillow would make a huge image of it
        height = width
    image = noise(width, height, seed, values)
    assert np.array_equal(square(image, size), published(image, size))


# In one piece of memory or in several; resized down first or across first, by Pillow 13 or its forerunners; left as it
# is; a white image, whose sums are the largest there are.
@pytest.mark.parametrize("image", [noise(2000, 1900), noise(2100, 2100), noise(80, 8100), noise(80, 161),
                                   noise(80, 160), noise(3, 301), noise(301, 3), noise(64, 64), noise(64, 80),
                                   Image.new("RGB", (1999, 1024), "white")],
                         ids=lambda image: f"{image.width}x{image.height}")
def test_every_shape_is_resized_as_published(image):
    assert np.array_equal(square(image, 64), published(image, 64))
    assert np.array_equal(plain_square(image, 64), published(image, 64))


def test_weights_by_hand():
    """4 -> 2: output 0 is centred on the edge of inputs 0 and 1, each half an input away, of two the triangle reaches;
    input 2 is one and a half away. 0.75, 0.75, 0.25 of 1.75. Output 1 is the mirror image."""
    starts, shares = weights(4, 2, 0, 2)
    whole = 1 << BITS
    assert starts.tolist() == [0, 1]
    assert shares.tolist() == [[round(whole * share) for share in row] for row in ([3/7, 3/7, 1/7], [1/7, 3/7, 3/7])]
    starts, shares = weights(4, 2, 1, 1)                                        # output 1 alone
    assert (starts.tolist(), shares.tolist()) == ([1], [[round(whole / 7), round(3 * whole / 7), round(3 * whole / 7)]])


def test_each_pass_is_rounded_to_a_byte():
    """0 1 / 0 0: across (0 + 1) / 2 rounds to 1, down (1 + 0) / 2 rounds to 1; their mean of a quarter would be 0."""
    image = Image.fromarray(np.array([[[0] * 3, [1, 0, 3]], [[0] * 3, [0] * 3]], np.uint8))
    assert square(image, 1).tolist() == [[[1, 0, 1]]]
