"""Several processes that train one model together, each on its share of every batch: torchrun's job.

    torchrun --nproc_per_node=4 main.py --dataset=... (docs/distributed.md)

Without torchrun there is one process, and everything here leaves things as they are. With it each process encodes its
share of the batch, `gather` shows the losses the features of all, and DistributedDataParallel averages the gradients;
a test's batches are dealt out by `share` and put together again by `collect`. The first process alone logs and saves.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from machine.device import random_numbers
from machine.processes import (  # noqa: F401  what needs no torch: of this module, too
    first,
    first_to_say,
    from_first,
    job,
    launch,
    launched,
    local_first,
    local_rank,
    local_world,
    machines_share,
    meet,
    noticing,
    rank,
    restarted,
    share,
    to_first,
    union,
    world,
)


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
