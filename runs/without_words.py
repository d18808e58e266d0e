"""A data set without some words: a folder of links to all of it but the training images whose captions have them.

    python runs/without_words.py mitstates:data/toy/mitstates OUT red gold
    runs/frozen.sh mitstates:OUT

So the test split asks for words that training never saw: what a text encoder makes of them shows. For the layouts of
MIT-States and Fashion200k.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from datasets import MITSTATES_TEST_NOUNS
from flags import Parser
from machine.errors import InputError


def mitstates(source: Path, out: Path, words: set[str]) -> int:
    """Returns how many folders of images were left out."""
    (out / "images").mkdir(parents=True)
    left = 0
    for folder in sorted((source / "images").iterdir()):
        adjective, _, noun = folder.name.replace("_", " ", 1).partition(" ")
        if noun not in MITSTATES_TEST_NOUNS and not words.isdisjoint((adjective, *noun.split())):
            left += 1
        else:
            (out / "images" / folder.name).symlink_to(folder)
    return left


def fashion200k(source: Path, out: Path, words: set[str]) -> int:
    """Returns how many training images were left out."""
    (out / "labels").mkdir(parents=True)
    left = 0
    for entry in sorted(source.iterdir()):
        if entry.name not in ("labels", "image_cache"):
            (out / entry.name).symlink_to(entry)
    for file in sorted((source / "labels").glob("*.txt")):
        lines = file.read_text().splitlines(keepends=True)
        kept = [line for line in lines
                if "train" not in file.name or words.isdisjoint(line.rpartition("\t")[2].split())]
        (out / "labels" / file.name).write_text("".join(kept))
        left += len(lines) - len(kept)
    return left


LAYOUTS = {"mitstates": mitstates, "fashion200k": fashion200k}


def main() -> int:
    parser = Parser(prog="without_words.py", description=__doc__.split("\n")[0],
                    usage="%(prog)s DATASET:DIR OUT WORD ...")
    parser.add_argument("dataset", metavar="DATASET:DIR", help=f"of {', '.join(LAYOUTS)}")
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("words", nargs="+", metavar="WORD")
    args = parser.parse_args()
    name, _, path = args.dataset.partition(":")
    try:
        if name not in LAYOUTS or not os.path.isdir(path):
            raise InputError(f"{args.dataset}: name a folder in the layout of {' or '.join(LAYOUTS)}, as mitstates:DIR")
        left = LAYOUTS[name](Path(path).resolve(), args.out, set(args.words))
    except (InputError, OSError) as error:
        print(f"without_words.py: error: {error}", file=sys.stderr)
        return 2
    print(f"left {left} out of {args.out}'s training")
    return 0


if __name__ == "__main__":
    sys.exit(main())
