"""The exceptions that end a program in one line, and others' words in ours."""

import errno
import os
import traceback

# What helps where the system names no file with what it refuses.
HELP = {errno.ENOSPC: "a disk is full, or /dev/shm: df -h shows which; make room there",
        errno.EDQUOT: "your share of a disk is used up: make room there",
        errno.EROFS: "a disk may only be read; give a folder that may be written to",
        errno.EMFILE: "too many files are open: raise ulimit -n",
        errno.ENFILE: "too many files are open on this machine",
        errno.ENOMEM: "there is not enough memory", errno.EIO: "a disk fails, or is not there any more",
        errno.ESTALE: "a network disk was lost: mount it again", errno.ENOSYS: "the system lacks what this needs"}


class InputError(Exception):
    """What a user gave and can mend: a sentence saying what is wrong, where, and what to do. Exit code 2."""


class PeerLost(Exception):
    """Another process of the job has ended, so nothing can be done together any more."""


def first_line(error: Exception) -> str:
    """What an error says, or what it is called where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def in_words(error: BaseException) -> str:
    """An error as a user is told it; where the system names no file, with the place in the program and what helps."""
    if not isinstance(error, OSError) or error.errno is None or error.filename is not None:
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)[-1:]
    place = "".join(f", in {os.path.basename(frame.filename)} line {frame.lineno}" for frame in frames)
    help = HELP.get(error.errno, "")
    return f"{error.strerror or error} (error {error.errno} of the system{place})" + f": {help}" * bool(help)
