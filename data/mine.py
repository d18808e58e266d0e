"""Write the triplets that a training on captions would draw, as a table to look at, to edit, or to train on elsewhere.

    python data/mine.py --dataset_path shop --out shop/mined.csv
"""

import argparse
import csv
import io
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from flags import Parser, a_path, add, add_mining_flags, at_least, mining_of
from machine.errors import InputError
from machine.stopping import ending, starting

PROGRAM = "data/mine.py"
COLUMNS = "source_file_name", "target_file_names", "text", "split"


def get_parser() -> Parser:
    parser = Parser(
        prog=PROGRAM, usage="%(prog)s --dataset_path DIR --out FILE|FOLDER [flags]",
        description="Write the triplets that main.py --dataset captions would draw of these pictures, hand-written "
        "ones in their share included: a table that --dataset triplets reads. Nothing that is there is written over.",
        epilog="A table stands in the folder of the pictures or above it. Edited, it is trained with as triplets.csv "
        "beside the captions, or, in a folder that was made, by --dataset triplets.")
    parser.add_argument("--dataset_path", required=True, type=a_path, metavar="DIR", default=argparse.SUPPRESS,
                        help="folder with the pictures and their table (required)")
    parser.add_argument("--out", required=True, type=a_path, metavar="FILE|FOLDER", default=argparse.SUPPRESS,
                        help="a .csv or .jsonl to write; or a folder to make: a metadata.jsonl a split, with the "
                        "pictures it names, as Hugging Face's imagefolder reads it (required)")
    add(parser, "--epochs", 1, "how often each picture is a source", type=at_least(1), metavar="N")
    add(parser, "--seed", 0, "that of main.py, with which it draws the same", type=at_least(0), metavar="N")
    add(parser, "--validation", 0.0, "share of the products to hold out", type=at_least(0, float, 0.9), metavar="SHARE")
    add_mining_flags(parser)
    return parser


if __name__ == "__main__":
    starting(get_parser())

from benchmarks.base import Epoch
from datasets import Captions
from machine.progress import progress_bar, say
from machine.streams import log_to_stderr

Line = tuple[str, list[str], str, str]  # source, targets, text, split


def mine(args: argparse.Namespace) -> None:
    """The whole program, in order."""
    if args.out.exists():
        raise InputError(f"{args.out} is there already; remove it, or name another")
    if args.out.suffix.lower() not in ("", ".csv", ".jsonl"):
        raise InputError(f"--out {args.out} ends in neither .csv nor .jsonl, nor is it a folder's name")
    lines, names = [], ["train"]
    with suppress(InputError):          # without a test split, train alone; what else is wrong is said below
        names = Captions.splits(args.dataset_path, args.validation)
    for name in names:
        data = Captions(args.dataset_path, name, held_out=args.validation, mining=mining_of(args))
        say(data.about)
        lines += dict.fromkeys(trained_with(data, args.seed, args.epochs)) if name == "train" else asked(data)
    lines = [(source, list(targets), text, split) for source, targets, text, split in lines]
    if args.out.suffix:
        write_table(args.out, args.dataset_path, lines)
    else:
        write_folder(args.out, args.dataset_path, lines)
    say(f"{args.out}: {len(lines)} triplets")


def trained_with(data: Captions, seed: int, epochs: int) -> Iterator[tuple[str, tuple[str, ...], str, str]]:
    for number in progress_bar(range(epochs), desc="drawing", total=epochs, unit="epoch"):
        yield from ((data.images[source], (data.images[target],), text, data.split)
                    for source, target, text in Epoch(data, seed, number))


def asked(data: Captions) -> Iterator[tuple[str, tuple[str, ...], str, str]]:
    query_set = data.task().query_sets[0]
    for source, text, right in zip(query_set.sources, query_set.texts, query_set.metrics[0].right, strict=True):
        yield data.images[source], tuple(data.images[image] for image in right if image != source), text, data.split


def write_table(file: Path, root: Path, lines: list[Line]) -> None:
    """One table; names count from its folder."""
    below = os.path.relpath(root, file.parent)
    if below.split(os.sep)[0] == os.pardir:
        raise InputError(f"--out {file} is neither in {root} nor above it, and file names count from a table's folder; "
                         "name such a place, or a folder to make, for the pictures, too")
    def placed(name: str) -> str:
        return os.path.normpath(f"{below}/{name}")
    rows = [(placed(source), [*map(placed, targets)], *rest) for source, targets, *rest in lines]
    if file.suffix.lower() == ".csv":
        if bar := next((name for source, targets, *_ in rows for name in (source, *targets) if "|" in name), ""):
            raise InputError(f"{bar} has a | in its name, which is between names in a .csv; write a .jsonl")
        sheet = csv.writer(content := io.StringIO(), lineterminator="\n")
        sheet.writerow(COLUMNS)
        sheet.writerows((source, "|".join(targets), *rest) for source, targets, *rest in rows)
        text = content.getvalue()
    else:
        text = "".join(json.dumps(dict(zip(COLUMNS, row, strict=True)), ensure_ascii=False) + "\n" for row in rows)
    save(file, text)


def write_folder(folder: Path, root: Path, lines: list[Line]) -> None:
    """A folder a split, of its table and the pictures that it names."""
    for split in dict.fromkeys(line[-1] for line in lines):
        own = [line for line in lines if line[-1] == split]
        below = f"{split}/" if all(source.startswith(f"{split}/") for source, *_ in own) else ""    # as they lay before
        for image in dict.fromkeys(name for source, targets, *_ in own for name in (source, *targets)):
            place = folder / split / image.removeprefix(below)
            place.parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(root / image, place)
        rows = [{"source_file_name": source.removeprefix(below),
                 "target_file_names": [target.removeprefix(below) for target in targets], "text": text}
                for source, targets, text, _ in own]
        save(folder / split / "metadata.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def link_or_copy(picture: Path, place: Path) -> None:
    try:
        os.link(os.path.realpath(picture), place)
    except OSError:
        shutil.copyfile(picture, place)


def save(file: Path, text: str) -> None:
    with open(file, "x", encoding="utf-8", newline="\n") as content:
        content.write(text)


def write_or_refuse(args: argparse.Namespace) -> None:
    try:
        mine(args)
    except OSError as error:
        raise InputError(f"cannot write --out {args.out} ({error.strerror or error})") from None


def main(argv: list[str] | None = None) -> int:
    log_to_stderr()
    return ending(PROGRAM, lambda _stopping: write_or_refuse(get_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
