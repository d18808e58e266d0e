"""Which of several processes this is, and how they meet: torchrun's job, without which there is one.

torch is loaded where there are several.
"""

import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from machine.errors import PeerLost

if TYPE_CHECKING:
    import torch

PATIENCE = timedelta(minutes=30)        # for a process that is alive and does not come; of a dead one all hear at once


rounds = 1                              # how often the job's processes were started, as far as its store knows
hosts = None                            # all processes, meeting without their GPUs; log2(world) rounds a barrier


def dist() -> ModuleType:
    import torch.distributed

    return torch.distributed


def launched() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def env_number(name: str, otherwise: int) -> int:
    """A number that torchrun told this process."""
    return int(os.environ[name]) if launched() else otherwise


def rank() -> int:
    """Which of the job's processes this is, from 0."""
    return env_number("RANK", 0)


def world() -> int:
    """How many processes the job has, on all machines."""
    return env_number("WORLD_SIZE", 1)


def local_rank() -> int:
    """Which of this machine's processes this is, from 0."""
    return env_number("LOCAL_RANK", 0)


def local_world() -> int:
    """How many processes this machine has."""
    return env_number("LOCAL_WORLD_SIZE", 1)


def first() -> bool:
    """Whether this is the process that logs and saves."""
    return rank() == 0


def restarted() -> bool:
    """Whether torchrun started the job's processes again, as one of them had ended; the first process knows."""
    return rounds > 1 or env_number("TORCHELASTIC_RESTART_COUNT", 0) > 0


def launch() -> str:
    """A name for this launch of torchrun, the same after a restart."""
    if not launched() or os.environ["TORCHELASTIC_RUN_ID"] != "none":
        return os.environ.get("TORCHELASTIC_RUN_ID", "")
    try:
        started = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:                                                             # no /proc, as on a Mac
        started = ""
    return f"{os.getppid()} {started}"                                          # torchrun itself: process and start


@contextmanager
def job(device: "torch.device") -> Iterator[None]:
    """Meet the job's other processes, and part at the end. Raises PeerLost when one of them has ended before."""
    if not launched():
        yield
        return
    import torch

    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    with noticing():
        store, *_ = next(dist().rendezvous("env://", timeout=PATIENCE))
        store = dist().PrefixStore(this_round(store), store)
        dist().init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank(),
                                  world_size=world(), timeout=PATIENCE)
        global hosts
        hosts = dist().new_group(backend="gloo")
        yield
        dist().destroy_process_group()                                          # after an error it could wait for ever


def this_round(store: "torch.distributed.Store") -> str:
    """A name for this start of the job's processes, the same in all of them and never used before.

    torchrun's store outlives a restart, and with it the addresses of processes that are gone, to which a new one would
    wait to connect; and its count of restarts may differ by machine. So the first process answers every other by a name
    that only the living can know, until all have taken its answer.
    """
    if first():
        global rounds
        rounds = store.add("rounds", 1)
        made = uuid.uuid4().hex
        while store.add(f"taken {made}", 0) < world() - 1:
            for each in range(1, world()):
                store.set(f"round for {store.get(f'process {each}').decode()}", made)
            time.sleep(0.05)
        return made
    own = uuid.uuid4().hex
    store.set(f"process {rank()}", own)
    made = store.get(f"round for {own}").decode()                               # waits for it
    store.add(f"taken {made}", 1)
    return made


@contextmanager
def noticing() -> Iterator[None]:
    """Turn what a broken connection raises into PeerLost: Gloo's errors have no type of their own."""
    try:
        yield
    except RuntimeError as error:
        if launched() and (isinstance(error, dist().DistError) or "gloo" in str(error)):
            raise PeerLost("another process of the job ended, see what it said") from None
        raise


def first_to_say(line: str) -> bool:
    """Whether no other process of the job has said this."""
    if world() == 1:
        return True
    try:
        store = dist().TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
                              timeout=timedelta(seconds=5))
        return store.add(f"said {env_number('TORCHELASTIC_RESTART_COUNT', 0)} {line}", 1) == 1
    except (RuntimeError, KeyError):                                            # better twice than not at all
        return True


def meet() -> None:
    """Wait until every process is here, without waiting for a GPU."""
    if world() > 1:
        dist().barrier(hosts)


@contextmanager
def local_first() -> Iterator[None]:
    """What the body leaves on a machine's disk, the machine's other processes find there."""
    if local_rank() > 0:
        meet()
    yield
    if local_rank() == 0:
        meet()


def from_first(make: Callable):
    """What make() returns in the first process, in all of them."""
    held = [make() if first() else None]
    if world() > 1:
        import torch

        dist().broadcast_object_list(held, device=torch.device("cpu"))
    return held[0]


# Dealing out, and what any object can do

def share(items: Sequence) -> Sequence:
    """This process's part of the items: of N processes every N-th."""
    return items[rank()::world()]


def machines_share(items: Sequence) -> Sequence:
    """This process's part of what every machine does for itself."""
    return items[local_rank()::local_world()]


def to_first(mine) -> list:
    """What each process brings, by rank, in the first; nothing in the others."""
    if world() == 1:
        return [mine]
    everyone = [None] * world() if first() else None
    dist().gather_object(mine, everyone, group=hosts)
    return everyone or []


def union(mine: dict) -> dict:
    """The entries of all processes."""
    if world() == 1:
        return mine
    everyone: list = [None] * world()
    dist().all_gather_object(everyone, mine)
    return {key: value for entries in everyone for key, value in entries.items()}
