"""What is said while it works: bars on a terminal, else lines now and then; of several processes in the first."""

import sys
import time
from collections.abc import Iterable, Iterator, Sized

from tqdm import tqdm

from machine import processes
from machine.streams import shown


class Lines:
    """In place of tqdm's bar where there is no terminal: a line once two seconds have passed, at every tenth from then
    on, and at the end."""

    PATIENCE = 2.0

    def __init__(self, items: Iterable | None = None, desc: str = "", total: int | None = None, unit: str = "",
                 initial: int = 0):
        self.items, self.what, self.unit, self.n, self.first = items, desc, unit, initial, initial
        self.total = total if total is not None else len(items) if isinstance(items, Sized) else 0
        self.start, self.told = time.monotonic(), -1                            # the tenth that was told last

    def __iter__(self) -> Iterator:
        with self:
            for item in self.items:
                yield item
                self.update()

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *reason) -> None:
        if self.told in range(10) and self.n >= self.total and reason[0] is None:
            self.tell()

    def update(self, count: int = 1) -> None:
        self.n += count
        tenth = 10 * self.n // self.total if self.total else 0
        if self.n < self.total and tenth > self.told and time.monotonic() - self.start >= self.PATIENCE:
            self.told = tenth
            self.tell()

    def tell(self) -> None:
        taken = time.monotonic() - self.start
        rate = (self.n - self.first) / taken
        left = f"{lasting((self.total - self.n) / rate)} left" if self.n < self.total else f"done in {lasting(taken)}"
        note(f"{self.what or 'progress'}: {self.n} of {self.total}, {rate:.3g} {self.unit or 'item'}s/s, {left}")

    def set_postfix(self, **_) -> None:
        """Of tqdm's."""


def lasting(seconds: float) -> str:
    """A time for people: '41 s', '12 min', '3 h 05 min'."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"


def on_terminal() -> bool:
    return bool(sys.stderr and sys.stderr.isatty())


def progress_bar(items: Iterable | None = None, leave: bool = False, smoothing: float = 0.3, lines: bool = True,
                 **how) -> "tqdm | Lines":
    """A bar over items, or over a total that `update` counts up to. lines: whether it says some without a terminal."""
    if not processes.first() or not (lines or on_terminal()):
        return tqdm(items, disable=True, **how)
    if not on_terminal():
        return Lines(items, **how)
    return tqdm(items, leave=leave, smoothing=smoothing, dynamic_ncols=True, **how)


def no_progress(items, **_):
    """In place of a bar, for whoever shows none."""
    return items


def say(text: str) -> None:
    """Print beside the bars; a name in it commands no terminal."""
    if processes.first():
        tqdm.write("\n".join(map(shown, text.split("\n"))))


def note(line: str) -> None:
    """One line for whoever watches, beside what is printed."""
    if processes.first() and sys.stderr:
        print(shown(line), file=sys.stderr, flush=True)
