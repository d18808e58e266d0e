"""Checkpoints that rot and processes that are killed while they save: python -m tests.torture_checkpoints.

Prints a line of figures each; exit code 1 unless all is well.
"""

import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from img_text_composition_models import Recipe
from machine.errors import InputError
from machine.folder_lock import FolderLock
from training import checkpoint
from training.loop import make_optimizer

TINY = Recipe("tirg", "shufflenet_v2_x0_5", 32, 8, "lstm", 8, {"red": 0, "dress": 1})
PROGRESS = {"best": 0.5, "samples": 3, "steps": 0, "sums": {}, "tested": False}


def save(folder: Path, it: int, best: bool = False) -> Path:
    """A small checkpoint with momenta."""
    torch.manual_seed(0)
    model = TINY.build()
    optimizer = make_optimizer(model, 0.1, 0)
    for weight in model.parameters():
        optimizer.state[weight]["momentum_buffer"] = torch.randn_like(weight)
    checkpoint.save(folder, model, optimizer, it, {"comment": ""}, PROGRESS, best)
    return folder / checkpoint.LATEST


def equal(a, b) -> bool:
    """Bit for bit."""
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and \
            a.contiguous().view(-1).numpy().tobytes() == b.contiguous().view(-1).numpy().tobytes()
    return type(a) is type(b) and a == b


def bit_flips(count: int, seed: int = 0) -> tuple[int, int]:
    """(bits flipped, one at a time; how often something else than what was saved was believed). An eighth of them in
    the last 4 KB, where a zip says what is in it."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        path = save(Path(name), 7)
        expected, content, believed = checkpoint.load(path), bytearray(path.read_bytes()), 0
        for number in range(count):
            place = rng.randrange(len(content) - 4096 if number % 8 == 0 else 0, len(content))
            bit = 1 << rng.randrange(8)
            content[place] ^= bit
            path.write_bytes(content)
            content[place] ^= bit
            with contextlib.suppress(InputError):
                believed += not equal(checkpoint.load(path), expected)
        return count, believed


def saver(folder: Path, best: bool) -> int:
    """Starts a process that saves one checkpoint after the other; returns its number."""
    if child := os.fork():
        return child
    try:
        it = 0
        while True:
            it += 1
            save(folder, it, best)
    finally:
        os._exit(1)


def two_savers(kills: int, seed: int = 0) -> tuple[int, int]:
    """(kills of one of two processes that save into the same folder; how often a checkpoint was then unreadable)."""
    rng, unreadable = random.Random(seed), 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save(folder, 0, best=True)
        processes = [saver(folder, best) for best in (True, False)]
        try:
            for _ in range(kills):
                time.sleep(rng.random() * 0.2)
                number = rng.randrange(2)
                os.kill(processes[number], signal.SIGKILL)
                os.waitpid(processes[number], 0)
                for path in (folder / checkpoint.LATEST, folder / checkpoint.BEST):
                    try:
                        checkpoint.load(path)
                    except InputError:
                        unreadable += 1
                processes[number] = saver(folder, number == 0)
        finally:
            for process in processes:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
        with FolderLock() as lock:                                              # who comes next clears away
            lock.take(folder)
        unreadable += len(list(folder.glob("*.unfinished")))
    return kills, unreadable


def torture() -> int:
    tried, believed = bit_flips(500)
    print(f"{tried} flipped bits of a checkpoint, {believed} believed")
    kills, unreadable = two_savers(60)
    print(f"{kills} kills of two processes that save into one folder, {unreadable} checkpoints unreadable")
    return int(bool(believed or unreadable))


if __name__ == "__main__":
    sys.exit(torture())
