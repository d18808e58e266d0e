"""Loops that numba compiles, kept for the next process, which would else need 0.6 to 1.4 s for each."""

from collections.abc import Callable
from functools import wraps
from threading import Lock


def compiled(loop: Callable) -> Callable:
    """`loop`, compiled when it is first called, and run without Python's lock. A product and a sum may become one
    instruction, rounded once. numba, half a second's work, is loaded then.

    What was compiled is kept in the source's __pycache__, or where NUMBA_CACHE_DIR says, for the processes that come
    after. Where it cannot be kept or read back (a full disk, a damaged file), each compiles for itself.
    """
    made, making = None, Lock()

    def anew(**how) -> Callable:
        import numba

        return numba.njit(loop, nogil=True, fastmath={"contract"}, **how)

    @wraps(loop)
    def call(*arguments):
        nonlocal made
        with making:                                                            # threads share what the first makes
            try:
                made = made or anew(cache=True)
            except RuntimeError:                                                # no folder that may be written to
                made = anew()
        try:
            return made(*arguments)
        except Exception:                                                       # whatever a damaged file unpickles to
            made = anew()
            return made(*arguments)
    return call
