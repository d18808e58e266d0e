"""What is said while a program works: bars and lines, of several processes in the first."""

from functools import partial

from tqdm import tqdm

from machine import distributed
from machine.streams import shown

NO_BAR = None if distributed.first() else True                                  # None: where it would go into a file
progress_bar = partial(tqdm, leave=False, dynamic_ncols=True, disable=NO_BAR)


def no_progress(items, **_):
    """In place of a bar, for whoever shows none."""
    return items


def say(text: str) -> None:
    """Print beside the bars; a name in it commands no terminal."""
    if distributed.first():
        tqdm.write("\n".join(map(shown, text.split("\n"))))
