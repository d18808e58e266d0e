"""What a model retrieves, drawn: a sheet with a row a query, and a map of features."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from sklearn.decomposition import PCA

from errors import InputError

INK, QUIET, PAPER = "#1f2933", "#7b8794", "white"
GREEN, RED = "#2f9e44", "#e03131"
TILE, GAP, WORDS, HEAD = 132, 12, 210, 40                                       # pixels; WORDS: the column of texts


@dataclass
class Answer:
    """A query and its results, best first; right says which are correct, None where nobody knows."""
    source: Image.Image | None
    text: str
    results: list[Image.Image]
    right: Sequence[bool | None] = field(default_factory=list)
    notes: Sequence[str] = ()                                                   # one a result, under its picture
    verdict: str = ""                                                           # under the query's text


def font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def sheet(answers: Sequence[Answer], per_row: int = 8) -> Image.Image:
    """A row a query: its image, its text, its results in frames: green for right ones, red for wrong."""
    shown = min(per_row, max((len(answer.results) for answer in answers), default=1))
    tall = TILE + GAP + 16 * any(answer.notes for answer in answers)
    heights = [tall * max(1, -(-len(answer.results) // shown)) for answer in answers]
    first = GAP + TILE + GAP + WORDS                                            # where the results begin
    picture = Image.new("RGB", (first + shown * (TILE + GAP), HEAD + sum(heights)), PAPER)
    draw = ImageDraw.Draw(picture)
    for x, title in ((GAP, "query image"), (GAP + TILE + GAP, "+ change"), (first, "results, best first")):
        draw.text((x, 12), title, QUIET, font(17))
    y = HEAD
    for answer, height in zip(answers, heights, strict=True):
        if answer.source is not None:
            framed(picture, answer.source, GAP, y, QUIET, 2)
        lines = wrapped(answer.text, WORDS - 2 * GAP, 20)
        for number, line in enumerate(lines):
            draw.text((GAP + TILE + GAP, y + 4 + 24 * number), line, INK, font(20))
        draw.text((GAP + TILE + GAP, y + 10 + 24 * len(lines)), answer.verdict, QUIET, font(16))
        for place, image in enumerate(answer.results):
            right = answer.right[place] if len(answer.right) else None
            hue = QUIET if right is None else GREEN if right else RED
            x, top = first + place % shown * (TILE + GAP), y + place // shown * tall
            framed(picture, image, x, top, hue, 2 if right is None else 6)
            if answer.notes:
                draw.text((x, top + TILE + 2), answer.notes[place], QUIET, font(13))
        y += height
    return picture


def framed(picture: Image.Image, image: Image.Image, x: int, y: int, hue: str, width: int) -> None:
    """The centre square of an image, in a frame."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    inner = TILE - 2 * width
    tile = image.convert("RGB").resize((inner, inner), Image.Resampling.BILINEAR,
                                       (left, top, left + side, top + side))
    ImageDraw.Draw(picture).rectangle((x, y, x + TILE - 1, y + TILE - 1), hue)
    picture.paste(tile, (x + width, y + width))


def wrapped(text: str, width: int, size: int, most: int = 4) -> list[str]:
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
    if len(gallery) < 3:
        return picture
    with np.errstate(invalid="ignore", divide="ignore"):                        # all features the same: no variance
        plane = PCA(2, random_state=0).fit(gallery)
    points = [plane.transform(rows) for rows in (gallery, queries, targets)]    # (n, 2) each
    low, high = (edge(np.concatenate(points), axis=0) for edge in (np.min, np.max))
    scale = (size - 80) / np.maximum(high - low, 1e-9).max()
    placed = [40 + (rows - low) * scale for rows in points]
    for x, y in placed[0]:
        draw.ellipse((x - 2, y - 2, x + 2, y + 2), "#c3ccd5")
    for query, target in zip(placed[1], placed[2], strict=True):
        draw.line((*query, *target), "#dbe9fb")
    for rows, hue in ((placed[2], GREEN), (placed[1], "#1c7ed6")):
        for x, y in rows:
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), hue)
    share = 100 * np.nan_to_num(plane.explained_variance_ratio_).sum()
    draw.text((10, 8), f"grey: gallery, blue: queries, green: their targets; {share:.0f} % of the variance", INK,
              font(15))
    return picture


def thumbnail(path: Path, side: int = 256) -> Image.Image:
    """The picture, upright, no side longer than `side`. Raises InputError where it cannot be read."""
    try:
        with Image.open(path) as image:
            image.draft("RGB", (side, side))                                    # a JPEG is decoded no finer than needed
            small = ImageOps.exif_transpose(image).convert("RGB")
            small.thumbnail((side, side))
            return small
    except Exception as error:                                                  # PIL's plugins raise anything at all
        raise InputError(f"cannot read the image {path} ({error})") from None
