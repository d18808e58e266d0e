"""How many threads this process may use, and work that is done ahead on some of them."""

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def usable_cores(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Cores this process may run on: those of its affinity, and no more than a container's quota pays for."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        allowed, period = quota.read_text().split()
        return max(1, min(cores, int(allowed) // int(period)))
    except (OSError, ValueError):                                               # no such file, or "max": no quota
        return cores


def threads_to_use() -> int:
    """For computing: as many as torch has where it is loaded; else as OMP_NUM_THREADS says, or one a core."""
    if torch := sys.modules.get("torch"):
        return torch.get_num_threads()
    told = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]              # one number a level of nesting
    return int(told) if told.isdecimal() and int(told) else usable_cores()


def prefetch(make: Callable, items: Iterable, workers: int) -> Iterator:
    """make(item) for each item, in order, `workers` threads working ahead; 0 workers make each when it is asked for.

    Threads, not processes: decoding and copying run without Python's lock, and an error arrives as it was raised.
    """
    if workers == 0:
        yield from map(make, items)
        return
    pool, ahead = ThreadPoolExecutor(workers), deque()
    try:
        for item in items:
            ahead.append(pool.submit(make, item))
            if len(ahead) > 2 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
