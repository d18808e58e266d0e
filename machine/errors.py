"""The exceptions that end a program in one line."""


class InputError(Exception):
    """What a user gave and can mend: a sentence saying what is wrong, where, and what to do. Exit code 2."""


class PeerLost(Exception):
    """Another process of the job has ended, so nothing can be done together any more."""
