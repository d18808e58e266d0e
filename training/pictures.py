"""What a model retrieves, drawn: a sheet with a row a query, and a map of features."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from machine.picture_files import InMemory, in_srgb, opened, seen

INK, QUIET, PAPER = "#1f2933", "#7b8794", "white"
GREEN, RED = "#2f9e44", "#e03131"
# In pixels. TensorBoard shows a picture 350 wide: a sheet of eight results at half its size, where TEXT is still read.
TILE, GAP, LINE, TEXT, NOTE = 72, 8, 30, 24, 16


@dataclass
class QueryResults:
    """A query and its results, best first; right says which are correct, None where nobody knows."""
    source: Image.Image | None
    text: str
    results: list[Image.Image]
    right: Sequence[bool | None] = field(default_factory=list)
    notes: Sequence[str] = ()                                                   # one a result, of some lines, under it
    remark: str = ""                                                            # at the end of the query's text


def font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def sheet(answers: Sequence[QueryResults], per_row: int = 8, tile: int = TILE) -> Image.Image:
    """A row a query: its text, below it its image, then its results in frames: green for right ones, red for wrong."""
    shown = max(1, min(per_row, max((len(answer.results) for answer in answers), default=1)))
    first = 4 * GAP + tile                                                      # where the results begin
    width = max(first + shown * (tile + GAP), 4 * tile)
    texts = [wrapped(answer.text, int(width - 4 * GAP - font(TEXT).getlength(answer.remark)), TEXT)
             for answer in answers]
    rows = [tile + GAP + (NOTE + GAP) * max((1 + note.count("\n") for note in answer.notes), default=0)
            for answer in answers]
    heights = [LINE * max(1, len(lines)) + row * max(1, -(-len(answer.results) // shown)) + GAP
               for answer, row, lines in zip(answers, rows, texts, strict=True)]
    picture = Image.new("RGB", (width, GAP + sum(heights)), PAPER)
    draw, y = ImageDraw.Draw(picture), GAP
    for answer, row, lines, height in zip(answers, rows, texts, heights, strict=True):
        for number, line in enumerate(lines):
            draw.text((GAP, y + LINE * number), line, INK, font(TEXT))
        draw.text((width - GAP, y), answer.remark, QUIET, font(TEXT), anchor="ra")
        top = y + LINE * max(1, len(lines))
        if answer.source is not None:
            framed(picture, answer.source, (GAP, top), tile, QUIET, 2)
        for place, image in enumerate(answer.results):
            right = answer.right[place] if len(answer.right) else None
            hue = QUIET if right is None else GREEN if right else RED
            corner = first + place % shown * (tile + GAP), top + place // shown * row
            framed(picture, image, corner, tile, hue, 2 if right is None else 2 + tile // 24)
            if answer.notes:
                draw.text((corner[0], corner[1] + tile + 2), answer.notes[place], QUIET, font(NOTE))
        y += height
    return picture


def framed(picture: Image.Image, image: Image.Image, corner: tuple[int, int], tile: int, hue: str, width: int) -> None:
    """The centre square of an image, in a frame `width` thick, `tile` wide."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    x, y = corner
    small = image.convert("RGB").resize((tile - 2 * width,) * 2, Image.Resampling.BILINEAR,
                                        (left, top, left + side, top + side))
    ImageDraw.Draw(picture).rectangle((x, y, x + tile - 1, y + tile - 1), hue)
    picture.paste(small, (x + width, y + width))


def wrapped(text: str, width: int, size: int, most: int = 2) -> list[str]:
    """The text in lines of at most `width` pixels, cut with dots after `most` of them."""
    letters, lines = font(size), [""]
    for word in text[:1000].split():
        if letters.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] = f"{lines[-1]} {word}".strip()
        else:
            while letters.getlength(f"{word}...") > width and len(word) > 1:
                word = word[:-1]
            lines.append(word)
    lines = [line for line in lines if line]
    return lines if len(lines) <= most else [*lines[:most - 1], f"{lines[most - 1]} ..."]


def feature_map(gallery: np.ndarray, queries: np.ndarray, targets: np.ndarray, size: int = 640) -> Image.Image:
    """Gallery features (N, D), query features (Q, D) and, joined to each, its target's (Q, D), in the gallery's two
    principal directions."""
    picture = Image.new("RGB", (size, size), PAPER)
    draw = ImageDraw.Draw(picture)
    if min(gallery.shape) < 2:                                                  # there is no plane
        return picture
    variances, directions = np.linalg.eigh(np.cov(gallery, rowvar=False, dtype=np.float64))
    plane = directions[:, :-3:-1]                                               # (D, 2), of the largest variances
    plane = plane * np.sign(plane[np.abs(plane).argmax(0), [0, 1]])             # else either of two mirror images
    points = [rows @ plane for rows in (gallery, queries, targets)]             # (n, 2) each
    low, high = (edge(np.concatenate(points), axis=0) for edge in (np.min, np.max))
    scale = (size - 160) / np.maximum(high - low, 1e-9).max()
    placed = [(40, 120) + (rows - low) * scale for rows in points]
    for x, y in placed[0]:
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), "#c3ccd5")
    for query, target in zip(placed[1], placed[2], strict=True):
        draw.line((*query, *target), "#cfe2fa", 2)
    for rows, hue in ((placed[2], GREEN), (placed[1], "#1c7ed6")):
        for x, y in rows:
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), hue)
    share = 100 * variances[-2:].sum() / max(variances.sum(), 1e-30)            # all features the same: no variance
    draw.text((10, 8), f"grey: gallery, blue: queries,\ngreen: their targets; {share:.0f} % of the variance", INK,
              font(TEXT))
    return picture


def thumbnail(path: Path | InMemory, side: int = 256) -> Image.Image:
    """The picture, upright, no side longer than `side`. Raises InputError where it cannot be read."""
    with opened(path, halved=True) as image:
        image.draft("RGB", (side, side))                                        # a JPEG is decoded no finer than needed
        small = seen(image)
        small.thumbnail((side, side))
        return in_srgb(small, image)
