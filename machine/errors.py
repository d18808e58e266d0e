"""The exceptions that end a program in one line, and others' words in ours."""


class InputError(Exception):
    """What a user gave and can mend: a sentence saying what is wrong, where, and what to do. Exit code 2."""


class PeerLost(Exception):
    """Another process of the job has ended, so nothing can be done together any more."""


def first_line(error: Exception) -> str:
    """What an error says, or what it is called where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
