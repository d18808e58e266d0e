"""Where the program computes: device, cores, precision of products, and how tensors get to the device."""

import ctypes
import logging
import os
import random
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from machine.errors import InputError
from machine.threads import usable_cores

log = logging.getLogger(__name__)

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4   # of malloc.h


def choose_device(name: str, number: int | None = None) -> torch.device:
    """'auto' takes a CUDA GPU where there is one, else a Mac's, else the CPU; number: which GPU, where each process has
    its own.

    Raises InputError where there is none and one is asked for, or a Mac's for each of several processes, which cannot
    exchange what is on it.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto" and number is not None:
        del there["mps"]
    if name == "auto":
        name = next(kind for kind, usable in there.items() if usable)
    if not there[name]:
        kind = {"cuda": "CUDA GPU", "mps": "Apple GPU"}[name]
        raise InputError(f"--device {name}: this machine has no usable {kind}; pass --device cpu or auto")
    if name == "mps" and number is not None:
        raise InputError("--device mps is for one process alone: start it without torchrun, or pass --device cpu")
    if name != "cuda":
        return torch.device(name)
    if number is not None and number >= torch.cuda.device_count():
        raise InputError(f"this machine has {torch.cuda.device_count()} GPUs and each process takes one: lower "
                         "torchrun's --nproc_per_node, or pass --device cpu")
    return torch.device("cuda", number)


def set_up(device: torch.device, precision: str, processes: int = 1) -> None:
    """Threads from the machine, which so many processes share, and with 'tf32' a GPU's convolutions in TF32, which
    torch would else always do. Matrix products, which make losses and ranks, are never rounded so. 'bf16' is the
    model's own affair, see its `bf16`.

    Raises InputError for a GPU that cannot do what is asked.
    """
    if device.type == "cpu":
        keep_freed_memory()
    # torchrun sets it to 1 for several processes where the user has not set it.
    if os.environ.get("OMP_NUM_THREADS") in (None, "1" if processes > 1 else None):
        torch.set_num_threads(max(1, usable_cores() // processes))
    if precision == "tf32" and device.type != "cuda":
        log.warning("note: --precision tf32 is a CUDA GPU's; on the %s it is fp32", device.type)
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise InputError("--precision bf16: this GPU has no bfloat16; pass --precision fp32")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.benchmark = True                                       # shapes stay the same for hours


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_numbers(device: torch.device) -> ModuleType:
    """Of the device: a module of torch's with `get_rng_state` and `set_rng_state`."""
    return torch if device.type == "cpu" else torch.get_device_module(device)


def keep_freed_memory() -> None:
    """Have the C library keep what is freed for what is asked for next. A step at batch 32 takes and frees 3 GB, and
    to fetch them from the kernel anew, 4 KB at a time, is a sixth of a step on a CPU."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)                       # glibc's; others have none
    if mallopt:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)                                           # never, mallopt(3)


def free_memory(device: torch.device) -> int:
    """Bytes that could be taken on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:                                                                        # Linux: what it would give up, too
        told = dict(line.split()[:2] for line in Path("/proc/meminfo").read_text().splitlines())
        return min(1024 * int(told["MemAvailable:"]), free_in_container())
    except (OSError, KeyError, ValueError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except ValueError:                                                          # a Mac tells only what it has: half
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def free_in_container(folder: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes that a container's limit leaves, of which files that are merely kept in memory count as free."""
    try:
        limit, taken = (int((folder / f"memory.{name}").read_text()) for name in ("max", "current"))
        kept = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return max(0, limit - taken + int(kept["inactive_file"]))
    except (OSError, ValueError, KeyError):                                     # no such files, or "max": no limit
        return float("inf")


def check_room(needed: float, what: str, advice: str, device: torch.device) -> None:
    """Raise InputError where so many bytes are more than are free on the device, and on a CPU more than that with all
    of the swap space."""
    free = free_memory(device)
    if needed > free + (swap_space() if device.type == "cpu" else 0):
        amount = "more memory than any machine has" if needed > 2**60 else f"at least {in_gb(needed)} GB of memory"
        raise InputError(f"{what} needs {amount}, {in_gb(free)} GB are free; {advice}")


def in_gb(count: float) -> str:
    return f"{count / 1e9:,.0f}" if count > 10e9 else f"{count / 1e9:.1f}"


def swap_space() -> int:
    try:
        told = dict(line.split()[:2] for line in Path("/proc/meminfo").read_text().splitlines())
        return 1024 * int(told["SwapFree:"])
    except (OSError, KeyError, ValueError):
        return 0


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """To the device, to and from a CUDA GPU without waiting for it: through pinned memory, else the copy would wait."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()                                            # nothing to do where it is already
    return tensor.to(device, non_blocking="mps" not in (device.type, tensor.device.type))  # which might not be whole


def compiled(function: Callable) -> Callable:
    """The function compiled for its device at its first call, which takes a minute or so.

    That call raises InputError where this machine has no working compiler.
    """
    fast = torch.compile(function, dynamic=False)

    def call(*inputs):
        try:
            return fast(*inputs)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"--compile True: torch cannot compile here ({reason}); install a C++ compiler (g++), or "
                             "drop --compile") from None
    return call
