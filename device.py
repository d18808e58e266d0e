"""Where the program computes: device, cores, precision of products, and how tensors get to the device."""

import ctypes
import logging
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from errors import InputError

log = logging.getLogger(__name__)

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4   # of malloc.h
PRECISIONS = ("fp32", "tf32", "bf16")


def choose_device(name: str, number: int | None = None) -> torch.device:
    """'auto' takes a GPU where there is one; number: which one, where each process has its own.

    Raises InputError where there is none and one is asked for.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: this machine has no usable CUDA GPU; pass --device cpu or auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if number is not None and number >= torch.cuda.device_count():
        raise InputError(f"this machine has {torch.cuda.device_count()} GPUs and each process takes one: lower "
                         "torchrun's --nproc_per_node, or pass --device cpu")
    return torch.device("cuda", number)


def usable_cores(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Cores this process may run on: those of its affinity, and no more than a container's quota pays for."""
    cores = len(os.sched_getaffinity(0))
    try:
        allowed, period = quota.read_text().split()
        return max(1, min(cores, int(allowed) // int(period)))
    except (OSError, ValueError):                                               # no such file, or "max": no quota
        return cores


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
    if precision == "tf32" and device.type == "cpu":
        log.warning("note: --precision tf32 is a GPU's; on this CPU it is fp32")
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise InputError("--precision bf16: this GPU has no bfloat16; pass --precision fp32")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.benchmark = True                                       # shapes stay the same for hours


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
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """To the device without waiting for it: for a GPU through pinned memory, else the copy would wait."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()                                            # nothing to do where it is already
    return tensor.to(device, non_blocking=True)


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
