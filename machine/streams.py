"""What a program says, and to whom: any text on any stream, whether anyone reads it or not.

A stream that is closed (2>&-), a reader that leaves (| head), a terminal that is gone, an encoding that lacks a
character: none of them ends a program. And no file's name commands a terminal: what is not ours is `shown`.
"""

import codecs
import errno
import io
import logging
import os
import sys

JOINERS = "\u200c\u200d"                # not printable to Python, and part of words
NOBODY_THERE = (errno.EPIPE, errno.EIO, errno.ENXIO)                            # EIO: a terminal that was closed


def shown(text) -> str:
    """A name or message of others on one line: control characters, halves of characters and the like as \\x1b."""
    return "".join(character if character.isprintable() or character in JOINERS else
                   character.encode("unicode_escape").decode() for character in str(text))


def shown_name(path) -> str:
    """The same of a file's name that another program may read from a pipe: bytes that are no text stay as they are."""
    return "".join(character if "\udc80" <= character <= "\udcff" else shown(character) for character in str(path))


def as_bytes_or_escaped(error: UnicodeError) -> tuple[str | bytes, int]:
    """A codec's error handler: bytes of a file's name that are no text as they were, other characters as \\u4e2d."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeEncodeError:
        return codecs.lookup_error("backslashreplace")(error)


codecs.register_error("bytes_or_escaped", as_bytes_or_escaped)


class Stream(io.TextIOWrapper):
    """Standard output or error, that nobody need read."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self.without_reader(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self.without_reader(error)

    def without_reader(self, error: OSError) -> None:
        """From here on all goes nowhere. Results that a full disk does not take are an error all the same."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
        if self.fileno() == 1 and error.errno not in NOBODY_THERE:
            raise error


def prepare_streams() -> None:
    """For a program's first line."""
    while (opened := os.open(os.devnull, os.O_RDWR)) <= 2:                      # else a file of ours would get it
        os.set_inheritable(opened, True)
    os.close(opened)
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if isinstance(stream, Stream):
            continue
        if stream is None:                                                      # it was closed
            stream = io.TextIOWrapper(io.BufferedWriter(io.FileIO(number, "w", closefd=False)), "utf-8")
        # To a terminal nothing but text; a file or a pipe gets a name's bytes.
        errors = "backslashreplace" if stream.isatty() else "bytes_or_escaped"
        how = {"encoding": stream.encoding, "line_buffering": stream.line_buffering,
               "write_through": stream.write_through}
        guarded = Stream(stream.detach(), errors=errors, **how)
        setattr(sys, name, guarded)
        setattr(sys, f"__{name}__", guarded)


class OneLine(logging.Formatter):
    """A message is one line, whatever file's name is in it."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return shown(super().formatMessage(record))


def log_to_stderr(level: int = logging.WARNING) -> None:
    """Notes and warnings go to standard error, a line each."""
    handler = logging.StreamHandler()
    handler.setFormatter(OneLine("%(message)s"))
    logging.basicConfig(level=level, handlers=[handler])
