"""The one exception for what a user gave and can mend: a sentence saying what is wrong, where, and what to do."""


class InputError(Exception):
    """Raised by every module; `main.py` prints its sentence as one line and exits with code 2."""
