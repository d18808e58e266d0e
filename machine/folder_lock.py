"""A folder that one process at a time may work in, and files and folders that are written whole or not at all."""

import errno
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from machine.errors import InputError

try:
    import fcntl
except ImportError:                     # a system without file locks: two processes are not kept apart
    fcntl = None

log = logging.getLogger(__name__)

NAME = "run.lock"
UNFINISHED = ".unfinished"
NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EROFS)


class FolderLock:
    """The right to write into one folder. The kernel takes it back when the process ends, however it ends.

    Where a file system has no locks, a note says so and two processes are not kept apart.
    otherwise: the flag that gives this program another folder.
    """

    def __init__(self, otherwise: str = "--comment"):
        self.file: int | None = None
        self.path: Path | None = None
        self.otherwise = otherwise

    def take(self, folder: Path, patience: float = 0) -> None:
        """Lock the folder, waiting so many seconds for a process that is still ending, and clear away what processes
        killed in it have left half-written. Raises InputError naming who has it."""
        self.path, until = folder / NAME, time.monotonic() + patience
        while self.file is None:
            try:
                file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            except OSError as error:
                raise InputError(f"cannot write to {folder} ({error.strerror or error}); choose another, or "
                                 f"remove {self.path} if it is not a plain file") from None
            try:
                lock(file)
            except OSError as error:
                os.close(file)
                if error.errno in NO_LOCKS_HERE:
                    log.warning("note: the file system of %s has no locks (%s): see to it that no other process works "
                                "in this folder", folder, error.strerror)
                    return
                if time.monotonic() >= until:
                    raise InputError(f"{folder} is in use by {self.holder()}: wait for it or stop it, or give "
                                     f"another {self.otherwise}") from None
                time.sleep(0.1)
                continue
            if is_still(file, self.path):
                self.file = file
            else:                                                               # its holder ended and took it away
                os.close(file)
        os.ftruncate(self.file, 0)
        os.pwrite(self.file, json.dumps({"host": socket.gethostname(), "process": os.getpid()}).encode(), 0)
        for left in folder.glob(f"*{UNFINISHED}"):                              # of no living process
            if not left.is_dir():
                left.unlink(missing_ok=True)

    def holder(self) -> str:
        """Who has the folder, in words."""
        try:
            with open(self.path, "rb") as file:
                held = json.loads(file.read(1000))
            return f"process {int(held['process'])} on {held['host']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"

    def release(self) -> None:
        if self.file is not None:
            if is_still(self.file, self.path):
                self.path.unlink(missing_ok=True)
            os.close(self.file)
            self.file = None

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *_) -> None:
        self.release()


def lock(file: int) -> None:
    """Raises OSError where another process has it, or the system has no locks."""
    if not fcntl:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_still(file: int, path: Path) -> bool:
    """Whether an open file is the one that lies there now."""
    try:
        there, ours = os.lstat(path), os.fstat(file)
    except OSError:
        return False
    return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)


def unfinished(path: Path) -> Path:
    """Where this process writes what shall become `path`: no other writes there."""
    return path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}{UNFINISHED}")


def write_whole(path: Path, content, before: Callable[[Path], None] | None = None) -> None:
    """Make `path` a file of these bytes, as `whole_file` does."""
    with whole_file(path, before) as file:
        file.write(content)


@contextmanager
def whole_file(path: Path, before: Callable[[Path], None] | None = None) -> Iterator[BinaryIO]:
    """A file beside `path` to write into, which is safely on disk in the end and becomes `path`: that is what it was or
    all of this; a link is replaced, never written through. Raises OSError.

    before: called with the written file before it is renamed.
    """
    beside = unfinished(path)
    try:
        beside.unlink(missing_ok=True)                                          # a dead namesake's
        with open(beside, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if before:
            before(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` to write into, which in the end becomes `path`, where there is none or an empty one; where
    that is not reached, nothing is left. Raises OSError."""
    beside = unfinished(path)
    shutil.rmtree(beside, ignore_errors=True)                                   # a dead namesake's
    try:
        beside.mkdir(parents=True)
        yield beside
        os.replace(beside, path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
