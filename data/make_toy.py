"""Draw three small toy data sets in the published layouts of MIT-States, Fashion200k and FashionIQ, or a small shop.

Every picture is a drawn object under a visible state, so that the whole program (reading, training, retrieval) can
be tried in minutes without a download. The same program and Pillow version always write the same bytes: each picture
is seeded by its own file name. Two exact commands, from the root of the repository:

    python data/make_toy.py /tmp/toy
    python data/make_toy.py /tmp/toy --shop
"""

import cmath
import colorsys
import csv
import functools
import io
import itertools
import json
import math
import random
import shutil
import sys
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flags import Parser

# Silhouettes in a square from -100 to 100 (y points down), drawn one primitive after the other:
# poly x y ..., box x0 y0 x1 y1, oval x0 y0 x1 y1, line WIDTH x y ..., arc WIDTH x0 y0 x1 y1 FROM TO (degrees).
# "both" adds the mirror image (left and right), "cut" takes the primitive out of what was drawn so far.
TRAIN_NOUNS = {
    "airplane": "oval -15 -98 15 85; both poly 0 -40 98 20 98 42 0 15; both poly 0 55 42 82 42 98 0 85",
    "anchor": "arc 15 -24 -98 24 -50 0 360; line 24 0 -48 0 80; line 20 -45 -22 45 -22; arc 24 -78 -50 78 85 5 175;"
              "both poly 50 12 98 30 98 -25",
    "arrow": "poly -95 -24 10 -24 10 -72 98 0 10 72 10 24 -95 24",
    "boat": "poly -98 42 98 42 62 90 -62 90; poly -4 -98 -4 28 -80 28; poly 10 -75 10 28 75 28",
    "bottle": "box -22 -98 22 -45; poly -22 -54 22 -54 54 -8 54 96 -54 96 -54 -8",
    "butterfly": "both poly 0 -9 48 -78 98 -92 92 -9 48 9 84 38 62 92 0 40; line 20 0 0 0 66; both line 8 0 0 24 -94",
    "cactus": "line 42 0 -72 0 90; line 28 0 38 -66 38 -66 -18; line 28 0 8 66 8 66 -50",
    "car": "poly -98 45 -98 2 -58 -6 -32 -55 38 -55 64 -6 98 6 98 45; both oval 22 14 78 70;"
           "cut poly -40 -8 -24 -40 0 -40 0 -8; cut poly 12 -8 12 -40 32 -40 46 -8; cut both oval 39 31 61 53",
    "cat": "oval -82 -55 82 90; both poly 80 15 80 -98 10 -50; cut both oval 24 -12 50 24; cut poly -14 40 14 40 0 58",
    "chair": "box -62 -98 -36 98; box -62 6 62 32; box 36 6 62 98",
    "cloud": "oval -98 -8 -15 65; oval -62 -62 28 40; oval -5 -42 72 40; oval 20 -10 98 65; box -58 10 60 65",
    "crown": "both poly 0 80 0 -80 48 8 96 -48 82 80; oval -14 -98 14 -70; both oval 82 -68 108 -42",
    "cup": "poly -88 -62 38 -62 30 80 -80 80; arc 20 6 -38 92 46 -110 110",
    "flower": "oval -40 -98 40 -18; both oval 15 -56 95 24; both oval -6 12 74 92; cut oval -27 -27 27 27",
    "hammer": "box -13 -50 13 98; box -70 -92 50 -38; poly 50 -92 92 -52 92 -38 50 -38",
    "hat": "box -56 -85 56 45; oval -98 22 98 78; cut box -56 2 56 18",
    "heart": "both oval -96 -82 4 18; poly -85 2 0 92 85 2 0 -50",
    "house": "poly 0 -92 98 -8 68 -8 68 88 -68 88 -68 -8 -98 -8; box 34 -88 56 -30; cut box -20 30 20 94",
    "key": "arc 28 -98 -45 -14 39 0 360; line 22 -14 -3 95 -3; line 20 52 0 52 42; line 20 88 0 88 42",
    "ladder": "both line 18 -46 -92 -46 92; line 18 -46 -56 46 -56; line 18 -46 0 46 0; line 18 -46 56 46 56",
    "moon": "oval -98 -96 94 96; cut oval -28 -98 130 60",
    "star": "poly 0 -98 24 -32 96 -30 38 13 60 84 0 41 -60 84 -38 13 -96 -30 -24 -32",
    "tree": "poly 0 -98 44 -42 22 -42 62 8 32 8 80 62 -80 62 -32 8 -62 8 -22 -42 -44 -42; box -16 62 16 98",
    "umbrella": "oval -98 -88 98 88; cut box -100 0 100 100; cut both oval 36 -20 98 20; cut oval -31 -20 31 20;"
                "line 14 0 -20 0 75; arc 14 0 52 46 96 0 180",
}
# Readers of MIT-States hold these nouns out for testing by name.
TEST_NOUNS = {
    "castle": "both poly 0 90 0 -10 34 -10 34 -78 56 -78 56 -58 70 -58 70 -78 92 -78 92 90; box -13 -30 13 0;"
              "cut box -18 48 18 96; cut oval -18 28 18 66; cut both box 55 -30 71 0",
    "clock": "oval -76 -62 76 90; both oval 22 -96 84 -38; both line 20 40 70 62 94; cut line 16 0 -36 0 14 36 32",
    "fish": "oval -98 -52 48 52; poly 22 0 96 -62 78 0 96 62; poly -40 -40 -5 -84 20 -35; cut oval -72 -24 -52 -4",
    "glass": "poly -62 -98 62 -98 52 -38 12 2 12 74 52 86 52 98 -52 98 -52 86 -12 74 -12 2 -52 -38",
    "lightning": "poly 30 -98 -66 18 -8 18 -34 98 70 -30 10 -30 58 -98",
    "table": "box -98 -58 98 -30; both box 64 -30 88 78",
    "wheel": "arc 26 -96 -96 96 96 0 360; line 16 -80 0 80 0; line 16 0 -80 0 80; oval -26 -26 26 26",
    "window": "box -78 -98 78 98; cut both box 10 -80 60 -10; cut both box 10 10 60 80",
}

COLOURS = {"red": (216, 26, 32), "blue": (24, 62, 214), "green": (22, 150, 48), "yellow": (250, 214, 10),
           "purple": (128, 40, 160), "black": (34, 34, 38)}
PATTERNS = ("plain", "striped", "dotted", "checked")
SLEEVES = ("sleeveless", "short-sleeve", "long-sleeve")
LENGTHS = ("mini", "midi", "maxi")
MARKER = ".written-by-make-toy"

# What the shop sells, by category. Products of TEST_NOUNS are its test split: no photo of theirs is trained with.
SHOP = {"home": "bottle chair cup hammer key ladder umbrella clock glass table",
        "toys": "airplane anchor boat butterfly car cat house castle fish wheel",
        "decor": "cactus cloud crown flower heart moon star tree lightning window"}
PHOTOS, ASKED = (3, 2, 1, 1, 1, 1, 1), 30  # of each article of a product; lines of the table about each product
SIZES = {"small": {"scale": 0.45, "jitter": 0.08}, "large": {"scale": 0.95, "jitter": 0.06}}
# How people say what changes: as a word, of the thing, and as what they look for.
SAID = {**{colour: (colour, f"is {colour}", f"in {colour}") for colour in COLOURS},
        "plain": ("plain", "has no pattern", "without a pattern"),
        "striped": ("striped", "has stripes", "with stripes"),
        "dotted": ("dotted", "has dots", "with dots"),
        "checked": ("checked", "is checked", "with checks"),
        "small": ("smaller", "is smaller", "smaller"), "large": ("bigger", "is bigger", "larger")}
WORDINGS = ((0, ", ", "{}"), (1, " and ", "{}"), (2, " and ", "the same but {}"), (2, " and ", "do you have it {}?"),
            (0, " and ", "this one, {}"))


class Look(NamedTuple):
    """How an object is painted; a colour of None is drawn at random, among muted ones only."""

    colour: str | None = None
    pattern: str = "plain"
    scale: float = 0.74
    jitter: float = 0.15
    finish: str = ""


# The sizes of tiny, plain and huge objects do not overlap: 0.32-0.38, 0.63-0.85 and 1.05-1.25 of the shorter side.
ADJECTIVES = {
    **{colour: Look(colour=colour) for colour in ("red", "blue", "green", "yellow")},
    **{pattern: Look(pattern=pattern) for pattern in PATTERNS[1:]},
    **{finish: Look(finish=finish) for finish in ("sliced", "cracked", "dark")},
    **{"tiny": Look(scale=0.35, jitter=0.08), "huge": Look(scale=1.15, jitter=0.09)},
}
# Garments differ in length, which only tells if they are drawn at nearly one size.
WORN = {"scale": 0.84, "jitter": 0.07}


def generator(name):
    """A random generator that depends on nothing but the name (hash() differs from run to run)."""
    return random.Random(zlib.crc32(name.encode()))


@functools.cache
def parse(shapes):
    """Turn the text of a silhouette into (take out, points as complex numbers, stroke width or 0) primitives."""
    primitives = []
    for text in filter(str.strip, shapes.split(";")):
        words = text.split()
        flags = [words.pop(0) for _ in range(2) if words[0] in ("cut", "both")]
        kind, numbers = words[0], [float(word) for word in words[1:]]
        width = numbers.pop(0) if kind in ("line", "arc") else 0
        if kind in ("oval", "arc"):
            left, top, right, bottom, *span = numbers
            angles = np.radians(np.linspace(*(span or (0, 360)), 48))
            points = (right - left) / 2 * np.cos(angles) + 1j * (bottom - top) / 2 * np.sin(angles)
            points += complex(left + right, top + bottom) / 2
        else:
            if kind == "box":
                left, top, right, bottom = numbers
                numbers = [left, top, right, top, right, bottom, left, bottom]
            points = np.array(numbers[::2]) + 1j * np.array(numbers[1::2])
        for side in (points, -points.conj())[: 1 + ("both" in flags)]:
            primitives.append(("cut" in flags, side / 100, width / 100))
    return primitives


def draw_mask(shapes, size, centre, radius, angle):
    """Draw a silhouette as a grey mask, at twice the size and then halved, for smooth edges."""
    mask = Image.new("L", (2 * size[0], 2 * size[1]))
    pen = ImageDraw.Draw(mask)
    for take_out, points, width in parse(shapes):
        placed = 2 * (centre + points * radius * cmath.exp(1j * angle))
        corners = list(zip(placed.real.tolist(), placed.imag.tolist(), strict=True))
        fill = 0 if take_out else 255
        if not width:
            pen.polygon(corners, fill=fill)
            continue
        stroke = 2 * radius * width
        pen.line(corners, fill=fill, width=max(1, round(stroke)), joint="curve")
        for x, y in (corners[0], corners[-1]):
            pen.ellipse((x - stroke / 2, y - stroke / 2, x + stroke / 2, y + stroke / 2), fill=fill)
    return mask.reduce(2)


def centre_of(mask):
    """The centre of gravity of a mask, as a complex number: unlike the frame's middle, it lies amid the object."""
    weights = np.asarray(mask, dtype=float)
    across, down = weights.sum(axis=0), weights.sum(axis=1)
    return complex(across @ np.arange(across.size), down @ np.arange(down.size)) / max(weights.sum(), 1)


def distance_along(size, direction):
    """How far each pixel lies from the top left corner along a direction, as a picture of numbers."""
    columns, rows = np.arange(size[0], dtype=np.float32)[None, :], np.arange(size[1], dtype=np.float32)[:, None]
    return columns * direction.real + rows * direction.imag


def grey(values):
    """An array of numbers from 0 to 1 as a grey picture; what lies outside is cut off."""
    return Image.fromarray((np.clip(values, 0, 1) * 255).astype(np.uint8))


def pull_apart(mask, radius, chance):
    """Cut the mask in two along a slanted line and move the halves away from each other."""
    along = cmath.exp(1j * chance.choice((-1, 1)) * chance.uniform(0.4, 1.1))
    across, centre, halves = along * 1j, centre_of(mask), Image.new("L", mask.size)
    depth = distance_along(mask.size, across) - (centre * across.conjugate()).real
    for sign in (-1, 1):
        half = ImageChops.multiply(mask, grey(sign * depth))
        shift = sign * radius * (0.18 * across + 0.14 * along)
        halves.paste(255, (round(shift.real), round(shift.imag)), half)
    return halves


def draw_cracks(picture, mask, radius, chance):
    """Draw jagged black cracks that run from the middle of the object to its edges, and over nothing else."""
    layer, centre, turn = Image.new("L", mask.size), centre_of(mask), chance.uniform(0, 2 * math.pi)
    for ray in range(5):
        direction = radius * cmath.exp(1j * (turn + ray * 2 * math.pi / 5 + chance.uniform(-0.3, 0.3)))
        bends = [centre + direction * (step * 0.24 + 0.15j * (-1) ** step * chance.uniform(0.5, 1.2) * (step > 0))
                 for step in range(7)]
        corners = [(bend.real, bend.imag) for bend in bends]
        ImageDraw.Draw(layer).line(corners, fill=255, width=max(2, round(radius * 0.1)))
    picture.paste((8, 8, 8), mask=ImageChops.multiply(layer, mask))


def second_colour_share(pattern, size, chance):
    """How much of the second colour each pixel gets, for a pattern turned by a random angle."""
    pace = 2 * math.pi / chance.uniform(15, 18) * cmath.exp(1j * chance.uniform(-0.5, 0.5))
    first, second = (distance_along(size, way) + chance.uniform(0, 2 * math.pi) for way in (pace, pace * 1j))
    if pattern == "striped":
        strength = np.sin(chance.choice((first, second)))
    elif pattern == "dotted":
        strength = np.sin(first) + np.sin(second) - 0.75
    else:
        strength = 2 * np.sin(0.55 * first) * np.sin(0.55 * second)
    return grey(strength * 3 + 0.5)


def muted(chance, saturation, value):
    """A random colour that nobody would call red, blue, green or yellow."""
    shade = colorsys.hsv_to_rgb(chance.random(), chance.uniform(*saturation), chance.uniform(*value))
    return tuple(round(255 * part) for part in shade)


def paint(mask, look, chance):
    """Colour the object, with a dark rim that keeps it apart from any ground, over a soft light gradient."""
    size, slope = mask.size, cmath.exp(1j * chance.uniform(0, 2 * math.pi)) / max(mask.size)
    blend = 0.5 + distance_along(size, slope) - (complex(*size) / 2 * slope.conjugate()).real
    grounds = [Image.new("RGB", size, muted(chance, (0.02, 0.16), (0.78, 0.98))) for _ in range(2)]
    picture = Image.composite(*grounds, grey(blend))
    shift = chance.randint(-14, 14)
    first = COLOURS[look.colour] if look.colour else muted(chance, (0.05, 0.28), (0.42, 0.66))
    first = tuple(min(255, max(0, part + shift)) for part in first)
    rim = mask.filter(ImageFilter.BoxBlur(1)).point([min(255, 3 * level) for level in range(256)])
    picture.paste(tuple(part // 3 for part in first), mask=rim)
    picture.paste(first, mask=mask)
    if look.pattern != "plain":
        second = (244, 244, 244) if look.colour else muted(chance, (0.05, 0.3), (0.86, 0.98))
        share = second_colour_share(look.pattern, size, chance)
        picture.paste(second, mask=ImageChops.multiply(share, mask))
    return Image.blend(picture, Image.new("RGB", size, (0, 0, 20)), 0.64) if look.finish == "dark" else picture


def draw(folder, path, shapes, look):
    """Draw one picture and write it as a JPEG below folder; everything random comes from its path."""
    chance = generator(path)
    size = chance.randint(132, 156), chance.randint(112, 128)
    radius = min(size) / 2 * look.scale * chance.uniform(1 - look.jitter, 1 + look.jitter)
    # What does not fill the frame may lie anywhere near its middle, and small things a little further away.
    play = 0.06 + 0.12 * (look.scale < 0.5)
    centre = complex(*(side * chance.uniform(0.5 - play, 0.5 + play) for side in size))
    mask = draw_mask(shapes, size, centre, radius, math.radians(chance.uniform(-12, 12)))
    if look.finish == "sliced":
        mask = pull_apart(mask, radius, chance)
    result = paint(mask, look, chance)
    if look.finish == "cracked":
        draw_cracks(result, mask, radius, chance)
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    result.save(folder / path, "JPEG", quality=90)


def garment(kind, sleeve, length):
    """The silhouette of a dress, skirt, shirt or top; every word that a caption may use about it is visible."""
    reach = LENGTHS.index(length)
    if kind == "skirt":
        hem, half = (0, 45, 92)[reach], (62, 72, 82)[reach]
        return f"both poly 0 -85 40 -85 {half} {hem} 0 {hem}; cut box -48 -68 48 -60"
    if kind == "dress":
        hem, half = (30, 62, 98)[reach], (48, 58, 68)[reach]
        body = f"both poly 0 -70 14 -98 36 -94 30 -55 22 -22 {half} {hem} 0 {hem}"
        arms = ("", "both poly 26 -97 66 -62 50 -42 22 -66", "both poly 26 -97 96 14 74 26 22 -62")
    else:
        hem = (20, 50, 85)[reach]
        body = f"both poly 0 -62 20 -82 50 -80 46 -20 48 {hem} 0 {hem}"
        arms = ("", "both poly 42 -81 88 -30 66 -8 38 -40", "both poly 42 -81 99 48 74 58 38 -36")
    collar = f"; both poly 4 -58 18 -96 34 -84 16 -44; cut line 5 0 -48 0 {hem}" if kind == "shirt" else ""
    return f"{body}; {arms[SLEEVES.index(sleeve)]}{collar}"


def plan_mitstates(_files):
    """Yield (path, silhouette, look) for MIT-States, with one "adj" folder that readers must skip."""
    nouns = {**TRAIN_NOUNS, **TEST_NOUNS}
    yield "mitstates/images/adj house/0.jpg", nouns["house"], Look()
    for (adjective, look), (noun, shapes), number in itertools.product(ADJECTIVES.items(), nouns.items(), range(4)):
        yield f"mitstates/images/{adjective} {noun}/{number}.jpg", shapes, look


def fashion200k_captions(kind):
    """Every caption of a kind with its silhouette and look: colour, pattern and cut, each told by one word."""
    # The published captions hold these marks, and readers must bring them through.
    maker = {"dress": "toy & co.", "skirt": "why?", "top": "new*"}[kind]
    for colour, pattern, cut in itertools.product(COLOURS, PATTERNS, LENGTHS if kind == "skirt" else SLEEVES):
        shapes = garment(kind, "", cut) if kind == "skirt" else garment(kind, cut, "midi")
        ending = f" {maker}" if (colour, pattern) == ("purple", "plain") else ""
        yield f"{colour} {pattern} {cut} {kind}{ending}", shapes, Look(colour, pattern, **WORN)


def plan_fashion200k(files):
    """Yield the pictures of Fashion200k, and add its labels and test queries to files, a dict of path and text."""
    serial, queries = itertools.count(51000000), []
    folders = {"dress": "dresses/casual_and_day_dresses", "skirt": "skirts/knee_length_skirts", "top": "tops/blouses"}
    for kind, split in itertools.product(folders, ("train", "test")):
        chance, lines, words_of = generator(f"{kind} {split}"), [], {}
        for caption, shapes, look in chance.sample(list(fashion200k_captions(kind)), 66 if split == "train" else 27):
            for _ in range(chance.choice((2, 3))):
                number = next(serial)
                path = f"women/{folders[kind]}/{number}/{number}_0.jpeg"
                words_of[path] = caption.split()
                lines.append(f"{path}\t{chance.uniform(0.6, 0.99):.6f}\t{caption}\n")
                yield f"fashion200k/{path}", shapes, look
        files[f"fashion200k/labels/{kind}_{split}_detect_all.txt"] = "".join(lines)
        if split == "test":
            pairs = [f"{source} {target}\n" for source, target in itertools.permutations(words_of, 2)
                     if sum(old != new for old, new in itertools.zip_longest(words_of[source], words_of[target])) == 1]
            queries += chance.sample(pairs, 50)
    files["fashion200k/test_queries.txt"] = "".join(queries)


def relative_captions(source, target):
    """Two wordings of what changes from one (colour, pattern, sleeve, length) to another."""
    sleeves, hem = ("longer" if words.index(target[place]) > words.index(source[place]) else "shorter"
                    for place, words in ((2, SLEEVES), (3, LENGTHS)))
    phrases = (
        (f"is {target[0]} instead of {source[0]}", f"is more {target[0]} in color"),
        (f"is {target[1]} and not {source[1]}", f"has a {target[1]} fabric"),
        ("has no sleeves" if target[2] == "sleeveless" else f"has {sleeves} sleeves", f"has a {target[2]} cut"),
        (f"is {hem}", f"has a {hem} hem"),
    )
    told = [phrase for phrase, old, new in zip(phrases, source, target, strict=True) if old != new]
    return [" and ".join(wordings) for wordings in zip(*told, strict=True)]


def plan_fashioniq(files):
    """Yield the pictures of FashionIQ, and add its captions and splits to files, a dict of path and text."""
    serial, every_look = itertools.count(), list(itertools.product(COLOURS, PATTERNS, SLEEVES, LENGTHS))
    for split, images, triplets in (("train", 100, 120), ("val", 60, 50)):
        shared = {}
        for kind in ("dress", "shirt", "toptee"):
            chance = generator(f"{kind} {split}")
            # No two pictures of a split look alike, so that no target has a double that would be as right.
            looks_of = dict(shared) if kind == "toptee" else {}
            fresh = [look for look in every_look if look not in looks_of.values()]
            for look in chance.sample(fresh, images - len(looks_of)):
                name = f"B000TOY{next(serial):03d}"
                looks_of[name] = look
                yield f"fashionIQ/all_imgs/{name}.jpg", garment(kind, *look[2:]), Look(*look[:2], **WORN)
            # A few pictures are listed both as shirt and as toptee, as in the published splits.
            shared = dict(itertools.islice(looks_of.items(), 5)) if kind == "shirt" else {}
            pairs = [(source, target) for source, target in itertools.permutations(looks_of, 2)
                     if 1 <= sum(map(str.__ne__, looks_of[source], looks_of[target])) <= 2]
            entries = [{"target": target, "candidate": source,
                        "captions": relative_captions(looks_of[source], looks_of[target])}
                       for source, target in chance.sample(pairs, triplets)]
            if (kind, split) == ("dress", "train"):
                entries[0]["captions"][1] = ""  # the published captions hold blank ones
            files[f"fashionIQ/captions/cap.{kind}.{split}.json"] = json.dumps(entries, indent=1)
            files[f"fashionIQ/image_splits/split.{kind}.{split}.json"] = json.dumps(list(looks_of), indent=1)


def plan_shop(files):
    """Yield a shop's photos, whose names say nothing, and add two tables to files: of the photos, as a shop has it, and
    of hand-written queries. A line of these asks by a photo for another article of the same product, whose photos are
    all right; what it does not speak of stays as it is."""
    count = sum(PHOTOS) * sum(len(nouns.split()) for nouns in SHOP.values())
    names, lines, stock = [f"photos/IMG_{number:04}.jpg" for number in range(1, count + 1)], [], []
    generator("shop").shuffle(names)
    for group, noun in ((group, noun) for group, nouns in SHOP.items() for noun in nouns.split()):
        chance, shapes = generator(f"shop {noun}"), {**TRAIN_NOUNS, **TEST_NOUNS}[noun]
        articles = chance.sample(list(itertools.product(COLOURS, PATTERNS, SIZES)), len(PHOTOS))
        photos = {article: [names.pop() for _ in range(number)]
                  for article, number in zip(articles, PHOTOS, strict=True)}
        for number, ((colour, pattern, size), taken) in enumerate(photos.items(), start=1):
            article = (f"{noun}-{number}", f"{size} {pattern} {colour} {noun}", noun, colour, pattern, size,
                       f"{generator(f'{noun} {number}').uniform(5, 90):.2f}", "test" if noun in TEST_NOUNS else "train")
            stock += [(name, *article) for name in taken]
            yield from ((f"shop/{name}", shapes, Look(colour, pattern, **SIZES[size])) for name in taken)
        pairs = [(source, old, new) for old, new in itertools.permutations(photos, 2) for source in photos[old]]
        chance.shuffle(pairs)
        for source, old, new in sorted(pairs, key=lambda pair: sum(map(str.__ne__, *pair[1:])))[:ASKED]:
            form, joint, whole = chance.choice(WORDINGS)
            text = whole.format(joint.join(SAID[now][form] for was, now in zip(old, new, strict=True) if was != now))
            others = [name for article in photos if article != new for name in photos[article] if name != source]
            wrong = chance.sample(others, 3) if chance.random() < 0.25 else []
            lines.append((source, "|".join(photos[new]), text, group, f"{new[2]} {new[1]} {new[0]} {noun}",
                          "|".join(wrong), "test" if noun in TEST_NOUNS else "train"))
    queries = "source_file_name target_file_names text group target_caption negative_file_names split"
    for name, columns, rows in (("metadata", queries, lines),
                                ("captions", "file_name product caption kind colour pattern size price split", stock)):
        sheet = csv.writer(table := io.StringIO(), lineterminator="\n")
        sheet.writerow(columns.split())
        sheet.writerows(sorted(rows))
        files[f"shop/{name}.csv"] = table.getvalue()


PUBLISHED = {"mitstates": plan_mitstates, "fashion200k": plan_fashion200k, "fashionIQ": plan_fashioniq}
OWN = {"shop": plan_shop}


def clear_place(folder, names, force):
    """Make room for the data sets below folder; only what carries this program's marker is ever removed."""
    places = [folder / name for name in names]
    filled = [place for place in places if place.is_symlink() or (place.exists() and any(place.iterdir()))]
    for place in filled:  # all of them are judged before the first is removed
        if not force:
            raise OSError(f"{place} exists and is not empty (--force replaces what this program wrote there)")
        if place.is_symlink() or not (place / MARKER).is_file():
            raise OSError(f"{place} is left alone: this program did not write it (it is a link or holds no {MARKER})")
    for place in filled:
        shutil.rmtree(place)
    for place in places:
        place.mkdir(parents=True, exist_ok=True)
        (place / MARKER).write_text("data/make_toy.py --force may remove this folder.\n", encoding="utf-8")


def write_datasets(folder, plans, force):
    """Write these data sets below folder, and say what each came to."""
    clear_place(folder, plans, force)
    for name, plan in plans.items():
        files = {}
        pictures = list(plan(files))  # a plan fills in files as it goes, so it is run to its end first
        for picture in pictures:
            draw(folder, *picture)
        for path, text in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text, encoding="utf-8", newline="\n")
        print(f"{folder / name}: {len(pictures)} images, {len(files)} label files", flush=True)


def main():
    """Read the command line, write the data sets, and turn what goes wrong into one line."""
    parser = Parser(prog="make_toy.py", description="Write three small drawn data sets in their published layouts, or "
                    "a small shop's photos and spreadsheet.")
    parser.add_argument("folder", metavar="OUT", type=Path, help="folder that receives " + ", ".join(PUBLISHED))
    for flag, help in (("--shop", "write OUT/shop instead, for --dataset captions and triplets"),
                       ("--force", "replace what an earlier run of this program wrote")):
        parser.add_argument(flag, action="store_true", help=help)               # no True|False: OUT may follow
    options, started = parser.parse_args(), time.perf_counter()
    dataset, name = ("captions", "shop") if options.shop else ("mitstates", "mitstates")
    try:
        write_datasets(options.folder, OWN if options.shop else PUBLISHED, options.force)
    except OSError as error:
        print(f"make_toy.py: {error}", file=sys.stderr)
        return 2
    print(f"done in {time.perf_counter() - started:.1f} s; for example:\n"
          f"python main.py --dataset {dataset} --dataset_path {options.folder / name} "
          "--image_weights none --image_size 64")
    return 0


if __name__ == "__main__":
    sys.exit(main())
