"""Files of the program's own inside folders of others: only regular files are written to, and through no link."""

import os
import stat
from pathlib import Path


def open_own(path: Path, flags: int = 0) -> int:
    """A descriptor to read and write a file with, made where there is none. Raises OSError where it is not our own."""
    check_own(path)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | flags, 0o644)
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
