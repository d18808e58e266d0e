"""Several processes that train one model together, each on its share of every batch: torchrun's job.

    torchrun --nproc_per_node=4 main.py --dataset=... (docs/distributed.md)

Without torchrun there is one process, and everything here leaves things as they are. With it each process encodes its
share of the batch, `gather` shows the losses the features of all, and DistributedDataParallel averages the gradients;
a test's batches are dealt out by `share` and put together again by `collect`. The first process alone logs and saves.
"""

import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from machine.device import random_numbers
from machine.errors import PeerLost

CPU = torch.device("cpu")
PATIENCE = timedelta(minutes=30)        # for a process that is alive and does not come; of a dead one all hear at once


rounds = 1                              # how often the job's processes were started, as far as its store knows
hosts: dist.ProcessGroup | None = None  # all processes, meeting without their GPUs; log2(world) rounds a barrier


def launched() -> bool:
    """Whether torchrun started this process."""
    return dist.is_torchelastic_launched()


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
def job(device: torch.device) -> Iterator[None]:
    """Meet the job's other processes, and part at the end. Raises PeerLost when one of them has ended before."""
    if not launched():
        yield
        return
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    with noticing():
        store, *_ = next(dist.rendezvous("env://", timeout=PATIENCE))
        store = dist.PrefixStore(this_round(store), store)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank(), world_size=world(),
                                timeout=PATIENCE)
        global hosts
        hosts = dist.new_group(backend="gloo")
        yield
        dist.destroy_process_group()                                            # after an error it could wait for ever


def this_round(store: dist.Store) -> str:
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
        if launched() and (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise PeerLost("another process of the job ended, see what it said") from None
        raise


def first_to_say(line: str) -> bool:
    """Whether no other process of the job has said this."""
    if world() == 1:
        return True
    try:
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
                              timeout=timedelta(seconds=5))
        return store.add(f"said {env_number('TORCHELASTIC_RESTART_COUNT', 0)} {line}", 1) == 1
    except (RuntimeError, KeyError):                                            # better twice than not at all
        return True


def meet() -> None:
    """Wait until every process is here, without waiting for a GPU."""
    if world() > 1:
        dist.barrier(hosts)


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
        dist.broadcast_object_list(held, device=CPU)
    return held[0]


# Dealing out and putting together

def share(items: Sequence) -> Sequence:
    """This process's part of the items: of N processes every N-th."""
    return items[rank()::world()]


def machines_share(items: Sequence) -> Sequence:
    """This process's part of what every machine does for itself."""
    return items[local_rank()::local_world()]


def collect(mine: Tensor, lengths: Sequence[int]) -> Tensor:
    """All rows, in order, in every process.

    mine: (n, ...) rows of this process's `share` of the items, one after the other. lengths: rows of each item, of all.
    """
    if world() == 1:
        return mine
    counts = [sum(lengths[each::world()]) for each in range(world())]
    padded = mine.new_zeros(max(counts), *mine.shape[1:])                       # all must send equally much
    padded[:len(mine)] = mine
    everyone = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(everyone, padded)
    parts = [iter(rows[:count].split(list(lengths[each::world()])))
             for each, (rows, count) in enumerate(zip(everyone, counts, strict=True))]
    return torch.cat([next(parts[item % world()]) for item in range(len(lengths))])


def to_first(mine) -> list:
    """What each process brings, by rank, in the first; nothing in the others."""
    if world() == 1:
        return [mine]
    everyone = [None] * world() if first() else None
    dist.gather_object(mine, everyone, group=hosts)
    return everyone or []


def union(mine: dict) -> dict:
    """The entries of all processes."""
    if world() == 1:
        return mine
    everyone: list = [None] * world()
    dist.all_gather_object(everyone, mine)
    return {key: value for entries in everyone for key, value in entries.items()}


# Training

class Gather(torch.autograd.Function):
    """(b, D) of each process -> (world * b, D), by rank, in all of them.

    Every process then computes the same loss of the same features, so what the others would send back is what this one
    has: the gradient of the sum over processes is `world` times its own, and DistributedDataParallel's mean over
    processes makes it that of one process with the whole batch. Nothing travels backward.
    """

    @staticmethod
    def forward(_context, features: Tensor) -> Tensor:
        everyone = [torch.empty_like(features, memory_format=torch.contiguous_format) for _ in range(world())]
        dist.all_gather(everyone, features.contiguous())
        return torch.cat(everyone)

    @staticmethod
    def backward(_context, gradient: Tensor) -> Tensor:
        return world() * gradient.chunk(world())[rank()]


def gather(features: Tensor) -> Tensor:
    """The features of the whole batch, (b, D) -> (world * b, D), with their gradients; all must have equally many."""
    return Gather.apply(features) if world() > 1 else features


def mean(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scalars averaged over the processes, where they stay on the device."""
    if world() == 1:
        return values
    together = torch.stack(list(values.values()))
    dist.all_reduce(together)
    return dict(zip(values, (together / world()).unbind(), strict=True))


@contextmanager
def same_random_numbers(device: torch.device) -> Iterator[None]:
    """What is drawn on the device inside is what the first process draws, whose own sequence goes on as if alone."""
    if world() == 1:
        yield
        return
    source = random_numbers(device)
    mine = source.get_rng_state()
    drawn = mine.clone()
    dist.broadcast(drawn, 0)                                                    # a few bytes, which never were on a GPU
    if first():
        yield
    else:
        source.set_rng_state(drawn)
        yield
        source.set_rng_state(mine)


def own_random_numbers(seed: int, it: int) -> None:
    """Dropout in the first process draws on from the seed, or from a checkpoint; in each other one from (seed, it,
    rank), so that a run goes on the same with no word of theirs in the checkpoint."""
    if not first():
        torch.manual_seed(hash((seed, it, rank())))                             # of integers: the same in every process


def averaging(model: nn.Module, sync_bn: bool) -> nn.Module:
    """The model as it is trained: with the first process's weights, and gradients averaged over the processes.

    sync_bn: batch norm takes the statistics of the whole batch in place of the process's share.
    """
    if world() == 1:
        return model
    if sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)                  # layers are replaced, weights kept
    device = next(model.parameters()).device
    return DistributedDataParallel(model, [device] if device.type == "cuda" else None, gradient_as_bucket_view=True)


def exchanging(model: nn.Module, now: bool):
    """Around a forward and backward pass: gradients are averaged in it, or left to the next that is `now`."""
    return nullcontext() if now or world() == 1 else model.no_sync()


def same_weights(model: nn.Module) -> None:
    """All of the model's as the first process has them."""
    if world() > 1:
        for value in model.state_dict().values():
            dist.broadcast(value, 0)


def same_buffers(model: nn.Module) -> None:
    """Batch norm's running statistics as the first process has them, which a checkpoint holds."""
    if world() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
