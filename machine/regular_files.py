"""Files in folders of others: only regular ones are read, and written to only those of the program's own."""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """The file, open to be read, unbuffered; a pipe or a device is not waited for. Raises OSError where it is none."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "no regular file", os.fspath(path))
    return os.fdopen(descriptor, "rb", buffering=0)


def open_own(path: Path, flags: int = 0) -> int:
    """A descriptor to read and write a file with, made where there is none, for whom the user's umask lets. Raises
    OSError where it is not our own."""
    check_own(path)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | flags, 0o666)
    try:
        check(path, os.fstat(descriptor))                                       # it may have changed hands meanwhile
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def check_own(path: Path) -> None:
    """Raise OSError for a link, or what has a second name elsewhere, or is no regular file; nothing there is well."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    check(path, found)


def check(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        raise OSError(f"{path} is a link or no regular file, and is not written to; remove it")
