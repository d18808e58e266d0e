"""How a program starts and ends: wrong flags at once, faults and signals in one line, each with its exit code.

Heard are Ctrl-C, SIGTERM, SIGHUP (the terminal or the ssh session is gone; not under nohup, which asks to go on), and
where the platform has it the SIGUSR1 that Slurm sends before a time limit.
"""

import os
import signal
import sys
import tempfile
import threading
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from machine.errors import InputError, PeerLost, in_words
from machine.streams import prepare_streams, shown

EXIT_CODES = {getattr(signal, name): code for name, code in
              (("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129), ("SIGUSR1", 143)) if hasattr(signal, name)}
# What torch and Python say where there is not enough memory; most of it has no type of its own.
NO_MEMORY = ("DefaultCPUAllocator", "out of memory", "can't allocate memory", "bad_alloc", "Storage size calculation "
             "overflowed", "numel: integer multiplication overflow")


class Stopped(BaseException):
    """Raised where the program is when it is asked to stop, or at the end of what must not be cut in two.

    Not an Exception: nothing on the way shall take it for a fault.
    """

    def __init__(self, number: int):
        self.code = EXIT_CODES[number]
        super().__init__(f"stopped by {name_of(number)}")


def name_of(number: int) -> str:
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def signals() -> list[int]:
    """Those that a program heeds."""
    return [number for number in EXIT_CODES
            if signal.Signals(number).name != "SIGHUP" or signal.getsignal(number) is not signal.SIG_IGN]


class Stopping:
    """Within it the signals raise Stopped, once; a second Ctrl-C raises KeyboardInterrupt at once."""

    def __init__(self):
        self.asked: int | None = None
        self.is_held = False

    def __enter__(self) -> "Stopping":
        heard = signals() if threading.current_thread() is threading.main_thread() else ()  # no other may listen
        self.before = {number: signal.signal(number, self.receive) for number in heard}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number: int, _frame) -> None:
        if self.asked is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.asked = number
        if not self.is_held:
            raise Stopped(number)

    def ending(self) -> None:
        """From here on signals raise nothing, but for a second Ctrl-C: what is left to do is done."""
        self.is_held = True

    @contextmanager
    def held(self) -> Iterator[None]:
        """What is begun here is finished first."""
        self.is_held = True
        try:
            yield
        finally:
            self.is_held = False
        if self.asked is not None:
            raise Stopped(self.asked)


def one_of_several() -> bool:
    """Whether torchrun started this process, and so perhaps others."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def starting(parser: ArgumentParser) -> None:
    """For a program's first line, before it loads what takes seconds: wrong flags and --help are answered at once, a
    stop is one line, and who looks on is told what takes so long."""
    if os.name == "nt":
        parser.exit(2, f"{parser.prog}: error: Windows itself is not supported; run it in WSL (wsl --install, then as "
                       "on Linux)\n")
    prepare_streams()
    without_temporary_files()

    def leave(number: int, _frame) -> None:
        if not one_of_several():                                                # else torchrun says what ended it
            print(f"{parser.prog}: stopped by {name_of(number)}", file=sys.stderr, flush=True)
        os._exit(EXIT_CODES[number])                                            # half-loaded libraries end badly
    for number in signals():
        signal.signal(number, leave)
    try:
        parser.parse_args()
    except InputError as error:                                                 # good ones, that do not go together
        parser.error(str(error))
    if sys.stderr.isatty():
        print("loading torch ...", end="\r", file=sys.stderr, flush=True)       # the next line takes its place


def without_temporary_files() -> None:
    """Where no folder takes temporary files torch cannot be loaded, though all but --compile does without any."""
    try:
        tempfile.gettempdir()
    except OSError:
        tempfile.tempdir = os.environ.get("TMPDIR", "/tmp")                     # what needs one there will name it


def ending(program: str, work: Callable[[Stopping], None]) -> int:
    """Do the work; returns the exit code: 0, 2 for bad input, 129 for SIGHUP, 130 for Ctrl-C, 143 for SIGTERM."""
    try:
        with Stopping() as stopping:
            try:
                work(stopping)
            except (AssertionError, RuntimeError) as error:                     # of what was torn apart by a stop, as
                if stopping.asked is None or stopping.is_held:                  # torch's `with device` can be
                    raise
                raise Stopped(stopping.asked) from error
            if sys.stdout:
                sys.stdout.flush()                                              # now: a full disk can still be said
    except (InputError, OSError, FloatingPointError, PeerLost) as error:
        complain(error, f"{program}: error:")
        return 2
    except (MemoryError, OverflowError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in NO_MEMORY):
            raise
        complain(out_of_memory(error), f"{program}: error:")
        return 2
    except Stopped as stop:
        complain(stop, f"{program}:")
        return stop.code
    except KeyboardInterrupt:
        complain(KeyboardInterrupt("stopped at once; a run's folder holds its last whole checkpoint"), f"{program}:")
        return 130
    return 0


def out_of_memory(error: Exception) -> InputError:
    """The same in words, with what was said to someone on the way."""
    reason = (str(error) or type(error).__name__).splitlines()[0]
    said = InputError(f"there is not enough memory for this ({reason:.200}); lower the batch size, image size or "
                      "the sizes of the features")
    for note in getattr(error, "__notes__", []):
        said.add_note(note)
    return said


def complain(reason: BaseException, before: str) -> None:
    """Say in one line why the program ends, of several processes one, and what the first of them has saved."""
    from machine import processes  # here: it may load torch, which wrong flags do not wait for

    follows = isinstance(reason, Stopped | PeerLost)                            # from what others say too
    said = in_words(reason)
    new = processes.first() if follows else processes.first_to_say(said)
    if line := [said] * new + getattr(reason, "__notes__", []):
        print(before, shown("; ".join(line)), file=sys.stderr)
