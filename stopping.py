"""Being asked to stop: Ctrl-C, SIGTERM, and the SIGUSR1 that Slurm sends before a time limit."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 143}


class Stopped(BaseException):
    """Raised where the program is when it is asked to stop, or at the end of what must not be cut in two.

    Not an Exception: nothing on the way shall take it for a fault.
    """

    def __init__(self, number: int):
        self.code = EXIT_CODES[number]
        super().__init__(f"stopped by {'Ctrl-C' if number == signal.SIGINT else signal.Signals(number).name}")


class Stopping:
    """Within it the three signals raise Stopped, once; a second Ctrl-C raises KeyboardInterrupt at once."""

    def __init__(self):
        self.asked: int | None = None
        self.is_held = False

    def __enter__(self) -> "Stopping":
        heard = EXIT_CODES if threading.current_thread() is threading.main_thread() else ()  # no other may listen
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
