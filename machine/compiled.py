"""Loops that numba compiles, kept for the next process, which would else need 0.6 to 1.4 s for each."""

from collections.abc import Callable
from functools import partial, wraps

import numba


def compiled(loop: Callable) -> Callable:
    """`loop`, compiled when it is first called, and run without Python's lock. A product and a sum may become one
    instruction, rounded once.

    What was compiled is kept in the source's __pycache__, or where NUMBA_CACHE_DIR says, for the processes that come
    after. Where it cannot be kept or read back (a full disk, a damaged file), each compiles for itself.
    """
    compile_anew = partial(numba.njit, loop, nogil=True, fastmath={"contract"})
    try:
        made = compile_anew(cache=True)
    except RuntimeError:                                                        # no folder that may be written to
        return compile_anew()

    @wraps(loop)
    def call(*arguments):
        nonlocal made
        try:
            return made(*arguments)
        except Exception:                                                       # whatever a damaged file unpickles to
            made = compile_anew()
            return made(*arguments)
    return call
