"""Look through a dataset before training on it: what it holds, which files are amiss, and what would stop a run.

    python data/check.py --dataset fashionIQ --dataset_path ../data/fashionIQ --out check.html
"""

import argparse
import base64
import hashlib
import html
import io
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from flags import Parser, a_path, add_dataset_flags, dataset_settings
from machine.errors import InputError, in_words
from machine.stopping import ending, starting

PROGRAM = "data/check.py"
RESULTS, TILE = 8, 128                  # right answers of each query that is drawn, and pixels of a picture
NAMED = 5                               # of what is amiss in one way
COMPLAINTS = 1000                       # of a split, that are said one by one
NEAR = 1                                # of 64 bits that two looks may differ in
SIDE = 32                               # pixels: an image is decoded whole, and made no larger than it takes


def get_parser() -> Parser:
    parser = Parser(
        prog=PROGRAM, usage="%(prog)s --dataset NAME --dataset_path DIR [flags]",
        description="Look through a dataset before training on it: what each split holds; which images are broken, "
        "missing, twice there or never used; and, in lines that begin with 'wrong:', what would stop a run or be left "
        "out of it. Nothing in the folder is changed.",
        epilog="Give it the flags that main.py will be given. The exit code is 0 where nothing is wrong, 1 where "
        "something is, 2 for a wrong flag or a folder that is none.")
    add_dataset_flags(parser, required=True)
    parser.add_argument("--out", type=a_sheet, metavar="FILE", default=argparse.SUPPRESS,
                        help="also draw ten queries with their right answers, of captions twenty mined ones, always "
                        "the same: a .png, or a .html with all that was said, which needs no other file (default: not "
                        "drawn)")
    return parser


def a_sheet(text: str) -> Path:
    path = a_path(text)
    if path.suffix.lower() not in (".html", ".png"):
        raise argparse.ArgumentTypeError(f"expected a file that ends in .html or .png, got {text!r}")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent}")
    return path


if __name__ == "__main__":                                                      # before the seconds that torch takes
    starting(get_parser())

import numpy as np
from PIL import Image

from benchmarks.base import CompositionDataset, QuerySet, note_passed_over
from datasets import DATASETS
from machine.cropping import square_of
from machine.device import usable_cores
from machine.image_store import file_version, prefetch
from machine.picture_files import decode
from machine.picture_folder import Kind, Walk
from machine.progress import progress_bar, say
from machine.streams import log_to_stderr, shown
from text_model import SimpleVocab
from training.pictures import QueryResults, sheet


class Report:
    """What is found: said line by line, and kept for the page."""

    def __init__(self):
        self.lines: list[str] = []
        self.wrong: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(shown(line))
        say(self.lines[-1])

    def row(self, what: str, found) -> None:
        self.say(f"  {what:<18}{found}")

    def count(self, what: str, lines: list[str]) -> None:
        """How many there are, and the first."""
        self.row(what, len(lines))
        for line in lines[:NAMED]:
            self.say(f"    {line}")
        if len(lines) > NAMED:
            self.say(f"    ... and {len(lines) - NAMED} more")

    def complain(self, line: str) -> None:
        """Of what several splits have in common once."""
        if line not in self.wrong:
            self.wrong.append(line)
            self.say(f"wrong: {line}")


def check(args: argparse.Namespace, report: Report) -> None:
    """The whole program, in order. Raises InputError where the folder is none, or --out cannot be written."""
    kind, root = DATASETS[args.dataset], args.dataset_path
    if not (root.is_dir() if kind.has_pictures else root.exists()):
        raise InputError(f"{root} is no folder; check --dataset_path")
    report.say(f"{args.dataset} in {root}")
    read = partial(kind, root, **dataset_settings(args))
    try:
        names, whole = kind.splits(root, args.validation), True
    except (InputError, OSError) as error:
        report.complain(in_words(error))
        names, whole = ["train"], False
    splits, known = {}, None
    for name in names:
        data = read_split(partial(read, name), report)
        if data is None:
            whole = False
            continue
        splits[name] = data
        words = describe(data, known, report)
        known = words if name == "train" else known
    if told := note_passed_over(splits.values()):
        report.complain(told)
    bad = look_at_files(root, kind.upright, splits, whole, report) if kind.has_pictures else set()
    for name, data in list(splits.items()):
        if gone := bad.intersection(data.images):
            try:
                splits[name] = read(name, without=gone)
                report.say(f"--skip_bad_images True leaves out of the {name} split: {left_out(splits[name])}")
            except (InputError, OSError) as error:
                del splits[name]
                report.complain(in_words(error))
    for remark in remarks(kind, root):
        report.say(f"note: {remark}")
    report.say(f"{len(report.wrong)} wrong, see above: a run would stop there, leave something out or count it wrongly"
               if report.wrong else "nothing is wrong")
    split, count, what = kind.shown
    if "out" not in args:
        report.say(f"--out check.html draws {what}")
    elif splits and kind.has_pictures:
        write(args.out, draw(splits.get(split) or splits[list(splits)[-1]], count), report)
    else:
        report.say(f"no query to draw, so {args.out} was not written")


def read_split(read: Callable, report: Report) -> CompositionDataset | None:
    """A split as it is trained on, else as with --skip_bad_images; None where it cannot be read at all."""
    for without in (None, frozenset()):
        try:
            data = read(without=without)
        except (InputError, OSError) as error:
            report.complain(in_words(error))
        else:
            for complaint in data.amiss[:COMPLAINTS]:
                report.complain(complaint)
            if len(data.amiss) > COMPLAINTS:
                report.complain(f"{len(data.amiss) - COMPLAINTS} more such lines of the {data.split} split")
            return data
    return None


def remarks(kind: type[CompositionDataset], root: Path) -> list[str]:
    """None of a folder that cannot be read, of which more was said."""
    with suppress(InputError, OSError):
        return kind.remarks(root)
    return []


def describe(data: CompositionDataset, known: SimpleVocab | None, report: Report) -> SimpleVocab:
    """Say what a split holds. known: the train split's words. Returns this one's."""
    report.say(f"{data.split} split")
    report.row("images", len(data.images))
    if data.split == "train":
        texts = data.training_texts()
        report.row("training samples", len(data))
    else:
        sets = query_sets_of(data)
        texts = [text for query_set in sets for text in query_set.texts]
        counts = [len(right) for query_set in sets for right in right_answers(query_set)]
        report.row("queries", len(texts))
        report.row("right answers", f"min {min(counts)}, mean {np.mean(counts):.1f}, max {max(counts)} a query")
    often = Counter(texts)
    text, most = often.most_common(1)[0] if often else ("", 0)
    report.row("texts", f"{len(often)} distinct of {len(texts)}, {sum(count > 1 for count in often.values())} of them "
                        f"more than once, at most {most} times ({text[:60]!r})")
    words = SimpleVocab.from_texts(texts)
    new, wordless = (known or words).unread(often)
    report.row("vocabulary", f"{len(words) - 1} words"                          # less the one for unknown words
               + f", {len(new)} of them not the train split's" * bool(new)
               + f"; {len(wordless)} texts have none" * bool(wordless))
    for what, found in data.described():
        report.row(what, found)
    if gone := left_out(data):
        report.row("passed over", gone)
    return words


def left_out(data: CompositionDataset) -> str:
    return ", ".join(f"{count} {what}" for what, count in data.dropped.items() if count)


def query_sets_of(data: CompositionDataset) -> list[QuerySet]:
    """Each query of a split once: what a group or few images are asked besides is named otherwise."""
    return [query_set for query_set in data.task().query_sets if query_set.metrics[0].name.startswith("correct_")]


def right_answers(query_set: QuerySet) -> Iterator[np.ndarray]:
    """Each query's right gallery positions, among those that are ranked."""
    places, first, counts = query_set.metrics[0].correct()
    for query, (own, start, count) in enumerate(zip(query_set.excluded, first, counts, strict=True)):
        right = query_set.in_gallery(query, places[start:start + count])
        yield right[right != own]


def look_at_files(root: Path, upright: bool, splits: dict[str, CompositionDataset], whole: bool,
                  report: Report) -> set[str]:
    """Say which files are amiss; returns the images that cannot be read. whole: whether these are all splits, without
    which it is not known what is used, and every picture is looked at."""
    users: dict[str, set[str]] = {}
    for name, data in splits.items():
        for image in data.images:
            users.setdefault(image, set()).add(name)
    used = set(map(os.path.normpath, users))
    walk = Walk(root, follow_links=True)
    unused = [image for image in walk.names() if image not in used]
    there = {image: file_version(f"{root}/{image}")[0] > 0 for image in users}
    missing = [image for image in users if not there[image]]
    looked = [image for image in users if there[image]] + ([] if whole else unused)
    found = prefetch(partial(look_at, root, upright), looked, usable_cores())
    found = progress_bar(found, desc="checking images", total=len(looked), unit="image")
    broken: dict[str, str] = {}
    same: dict[bytes, list[str]] = {}
    looks: dict[str, int] = {}
    for image, (complaint, digest, look) in zip(looked, found, strict=True):
        if complaint:
            broken[image] = complaint
        else:
            same.setdefault(digest, []).append(image)
            looks[image] = look
    report.say("files")
    if passed := walk.counted(Kind.PASSED_OVER, Kind.UNREADABLE_FOLDER):
        report.row("passed over", ", ".join(passed))
    report.count("missing or empty", missing)
    report.count("broken", list(broken.values()))
    report.count("duplicates", [" = ".join(images) for images in same.values() if len(images) > 1])
    named = {name: queried_images(splits[name]) if name in splits else set() for name in ("train", "test")}
    leaks = [[next((image for image in images if image in about), None) for about in named.values()]
             for images in same.values()]
    report.count("in train and test", [" = ".join(dict.fromkeys(pair)) for pair in leaks if None not in pair])
    if any(data.compares_splits for data in splits.values()):
        report.count("look the same", alike_across(splits, looks))
    check_duplicates(splits, same, report)
    if whole:
        report.count("never used", unused)
    else:
        report.row("never used", "not known, as not every split can be read")
    for images, what in ((missing, "missing or empty"), (broken, "broken")):
        if images:
            report.complain(f"{len(images)} images are {what}: put them back, or pass --skip_bad_images True to leave "
                            "such images out")
    return {*missing, *broken}


def alike_across(splits: dict[str, CompositionDataset], looks: dict[str, int]) -> list[str]:
    """Pictures of the train split that look like one of another split's: of 64 differences at most NEAR are others."""
    train, rest = ([image for image in images if image in looks] for images in (
        splits["train"].images if "train" in splits else [], dict.fromkeys(
            image for name, data in splits.items() if name != "train" for image in queried_images(data))))
    rest = [image for image in rest if image not in set(train)]
    theirs = np.array([looks[image] for image in rest], np.uint64)
    found = []
    for image in train if rest else ():
        near = np.flatnonzero(np.bitwise_count(theirs ^ np.uint64(looks[image])) <= NEAR)
        found += [f"{image} = {rest[place]}" for place in near[:1]]
    return found


def check_duplicates(splits: dict[str, CompositionDataset], same: dict[bytes, list[str]], report: Report) -> None:
    """Say which images of a gallery are the same picture as a right answer, and yet not right. same: by digest."""
    for name, data in splits.items():
        if name == "train":
            continue
        gallery = [data.images[image] for image in data.task().gallery]
        places = {image: place for place, image in enumerate(gallery)}
        twins = {places[image]: [places[other] for other in images if other in places]
                 for images in same.values() if len(images) > 1 for image in images if image in places}
        found = {place: answer for asked in query_sets_of(data)
                 for own, right in zip(asked.excluded, map(np.ndarray.tolist, right_answers(asked)), strict=True)
                 for answer in right if answer in twins
                 for place in twins[answer] if place != own and place not in right}
        lines = [f"{gallery[place]} = {gallery[answer]}" for place, answer in found.items()]
        if lines:
            report.count(f"{name} doubles", lines)
        if lines and data.is_ones_own:
            report.complain(f"{len(lines)} images of the {name} gallery are copies of right answers that count as "
                            f"wrong ones, first {lines[0]}: remove them, or name them as targets too")


def queried_images(data: CompositionDataset) -> set[str]:
    """The images that a split's queries come from or lead to; of the train split, all."""
    if data.split == "train":
        return set(data.images)
    gallery, sets = data.task().gallery, query_sets_of(data)
    ids = [ids for query_set in sets
           for ids in (query_set.sources, *(gallery[right] for right in right_answers(query_set)))]
    return {data.images[image] for image in np.concatenate(ids)}


def look_at(root: Path, upright: bool, image: str) -> tuple[str, bytes, int]:
    """(what is wrong with an image, as training reads it, its file's digest, how it looks)."""
    try:
        pixels = decode(f"{root}/{image}", SIDE, upright=upright)
    except InputError as error:
        return str(error), b"", 0
    with open(f"{root}/{image}", "rb") as file:
        return "", hashlib.file_digest(file, "sha256").digest(), look_of(pixels)


def look_of(pixels: np.ndarray) -> int:
    """64 bits, the same for pictures that look the same (dHash): whether each of 8 x 8 fields is brighter than the next
    one to the right. pixels: (SIDE, SIDE, 3)."""
    grey = Image.fromarray(pixels).convert("L").resize((9, 8), Image.Resampling.BOX)
    bits = np.diff(np.asarray(grey, int), axis=1) < 0                           # (8, 8)
    return int.from_bytes(np.packbits(bits).tobytes())


def draw(data: CompositionDataset, count: int) -> Image.Image:
    """So many queries drawn by a fixed seed, each with its first right answers, as training sees them."""
    def picture(image: int) -> Image.Image:
        crop = square_of(data.crops and data.crops[image])
        return Image.fromarray(decode(data.paths[image], TILE, upright=data.upright, to_square=crop))
    gallery, sets = data.task().gallery, query_sets_of(data)
    every = [(query_set, number) for query_set in sets for number in range(len(query_set.texts))]
    rights = (right for query_set in sets for right in right_answers(query_set))
    chosen = set(np.random.default_rng(0).choice(len(every), min(count, len(every)), replace=False).tolist())
    answers = []
    for place, ((query_set, number), right) in enumerate(zip(every, rights, strict=True)):
        if place in chosen:
            images = list(dict.fromkeys(gallery[right].tolist()))               # the train split's gallery repeats some
            answers.append(QueryResults(picture(query_set.sources[number]), f"+ {query_set.texts[number]}",
                                        [picture(image) for image in images[:RESULTS]], [True] * RESULTS,
                                        remark=f"{len(images)} right"))
    return sheet(answers, RESULTS, TILE)


def write(file: Path, picture: Image.Image, report: Report) -> None:
    """The picture, or a page with it and with what was said."""
    content = io.BytesIO()
    picture.save(content, "PNG")
    if file.suffix.lower() == ".html":
        lines = html.escape("\n".join(report.lines))
        page = f"""<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>{html.escape(report.lines[0])}</title>
<style>body {{ font: 16px system-ui, sans-serif; color: #1f2933; margin: 2rem }} pre {{ white-space: pre-wrap }}</style>
<pre>{lines}</pre>
<h2>Queries, each with its first right answers</h2>
<img alt="queries with their right answers" src="data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}">
</html>
"""
        content = io.BytesIO(page.encode("utf-8", "replace"))
    try:
        file.write_bytes(content.getvalue())
    except OSError as error:
        raise InputError(f"cannot write --out {file} ({error.strerror or error}); choose another file") from None


def main(argv: list[str] | None = None) -> int:
    """Run with these flags; returns the exit code: 1 where something is wrong, else as `ending` says."""
    log_to_stderr()
    report = Report()
    return ending(PROGRAM, lambda _stopping: check(get_parser().parse_args(argv), report)) or int(bool(report.wrong))


if __name__ == "__main__":
    sys.exit(main())
