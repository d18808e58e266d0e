"""The training loop: an epoch's batches, one update, and a run of many with its tests, saves and stops."""

import math
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from tqdm import tqdm

from benchmarks.base import CompositionDataset, Epoch
from flags import plain
from img_text_composition_models import ImgTextCompositionBase
from machine import distributed
from machine.checksums import digest
from machine.device import send
from machine.errors import InputError, PeerLost
from machine.feature_store import FeatureStore
from machine.image_store import DeviceStore, ImageStore
from machine.progress import lasting, note, on_terminal, progress_bar
from machine.stopping import Stopped, Stopping
from machine.threads import prefetch
from text_model import SentenceTable, spread
from torch_function import composition_losses
from training import checkpoint, report


@dataclass
class Split:
    """A dataset with the pixels of its images, or a frozen encoder's features."""
    data: CompositionDataset
    store: ImageStore | DeviceStore | FeatureStore

    LOOKED_INTO = 256                   # images, of which the first 64 KB count

    def digests(self, seed: int) -> dict[str, str]:
        """{what: its digest}: of its images' names, their files' sizes and some of their content, in order, and of its
        texts and pairs, as far as a run's results depend on them. Times of change do not count."""
        name, paths = self.data.split, self.data.paths
        sizes = np.array([length for length, _ in self.store.versions], np.int64)
        heads = (head_of(path) for path in spread(paths, self.LOOKED_INTO))
        texts: list = list(self.data.training_texts())
        if name == "train":
            samples = Epoch(self.data, seed, 0)
            texts += [tuple(samples[i]) for i in spread(range(len(samples)), 2000)]
        else:
            texts += [(query_set.sources.tolist(), query_set.texts) for query_set in self.data.task(seed).query_sets]
        return {f"{name} images": digest([as_bytes(self.data.images), sizes, *heads]), f"{name} texts":
                digest([as_bytes(texts)])}


def as_bytes(values: list) -> bytes:
    """Strings and numbers, in lists, as bytes that differ where they do."""
    return repr(values).encode("utf-8", "surrogatepass")


def head_of(path: str) -> bytes:
    """The first 64 KB of a file, or nothing: what cannot be read is said by whoever needs all of it."""
    try:
        with open(path, "rb") as file:
            return file.read(2**16)
    except OSError:
        return b""


class Part(NamedTuple):
    """What of a batch goes through the model at once, in this process: images as the store gives them, and B texts.
    target_labels: (B,) ints, equal for targets that are equally right."""
    source: Tensor
    texts: list[str]
    target: Tensor
    target_labels: Tensor | None = None


def prepare(sentences: SentenceTable, texts: Iterable[str]) -> None:
    """Have the vectors of these texts, from the service or, in all processes but one of a machine, from its disk."""
    with distributed.local_first():
        sentences.prepare(texts, progress_bar)


def make_optimizer(model: ImgTextCompositionBase, rate: float, weight_decay: float,
                   kind: str = "sgd") -> torch.optim.Optimizer:
    """sgd: the published one. Fused: all weights of a group in one pass over them."""
    groups = model.parameter_groups(rate)
    if kind == "adamw":
        return torch.optim.AdamW(groups, weight_decay=weight_decay, betas=model.betas, eps=model.eps,
                                 fused=True)
    return torch.optim.SGD(groups, momentum=0.9, weight_decay=weight_decay, fused=True)


def rate_at(it: int, rate: float, schedule: str, decay: int, warmup: int, steps: int) -> float:
    """The learning rate after `it` of so many `steps`: a tenth after each `decay` of them, or a half cosine to 0; from
    near 0 to that over the first `warmup`."""
    if schedule == "cosine":
        rate *= (1 + math.cos(math.pi * min(it / steps, 1))) / 2
    else:
        for _ in range(min(it // decay, 400)):                                  # one by one, as published; in the end 0
            rate *= 0.1
    return rate * min(1.0, (it + 1) / (warmup + 1))


def check_shares(batch_size: int, parts: int, group_size: int) -> None:
    """Raise InputError unless a batch falls into equal shares of whole groups of `group_size` samples."""
    shares = distributed.world() * parts
    unit, least = shares * group_size, 2 * shares                               # batch norm needs two samples
    if shares > 1 and (batch_size % unit or batch_size < least):
        fits = max(least, batch_size // unit * unit)
        raise InputError(f"--batch_size {batch_size} is the whole batch, and cannot be shared by {distributed.world()} "
                         f"processes with --accumulate {parts}: pass {fits} or a larger multiple of {unit}")


def batches(train: Split, seed: int, epoch: int, size: int, workers: int, device: torch.device, done: int = 0,
            parts: int = 1) -> Iterator[list[Part]]:
    """An epoch's whole batches but the first `done`, of each this process's share, in so many parts; the images are on
    their way to the device. Which samples a batch has does not depend on how many processes share it."""
    samples = Epoch(train.data, seed, epoch)
    length = size // parts // distributed.world()                               # of a process's share of a part

    def share(start: int) -> Part:
        sources, targets, texts = zip(*(samples[i] for i in range(start, start + length)), strict=True)
        target_labels = torch.from_numpy(train.data.target_labels[list(targets)])   # (B,)
        return Part(train.store.batch(sources, device), list(texts), train.store.batch(targets, device),
                    send(target_labels, device))

    def batch(start: int) -> list[Part]:
        starts = range(start, start + size, length)                             # by part, and in it by process
        return [share(own) for own in starts[distributed.rank()::distributed.world()]]
    return prefetch(batch, range(done * size, len(samples) - size + 1, size), workers)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, loss: str, parts: list[Part],
               gather: bool = True) -> dict[str, Tensor]:
    """One update on a batch, without waiting for the device. Returns {name: detached scalar}, the means over its parts
    and the processes.

    model: as `distributed.averaging` gives it. Each part's queries meet the targets of that part alone, with `gather`
    those of all processes, else of this one.
    """
    optimizer.zero_grad()
    means: dict[str, Tensor] = {}
    for number, part in enumerate(parts, start=1):
        with distributed.exchanging(model, now=number == len(parts)):
            features = model(part.source, part.texts, part.target)
            with distributed.same_random_numbers(part.source.device) if gather else nullcontext():
                losses = composition_losses(features, loss, distributed.gather if gather else lambda own: own,
                                            part.target_labels)
            (losses["total training loss"] / len(parts)).backward()
        means = {name: value.detach() / len(parts) + means.get(name, 0) for name, value in losses.items()}
    optimizer.step()
    return distributed.mean(means)


class LossMeter:
    """Means of the losses since the last reading, summed on the device: reading is what waits for it."""

    def __init__(self, sums: dict[str, Tensor] | None = None, steps: int = 0):
        self.sums, self.steps = sums or {}, steps

    def add(self, losses: dict[str, Tensor]) -> None:
        self.sums, self.steps = {name: value + self.sums.get(name, 0) for name, value in losses.items()}, self.steps + 1

    def check(self, it: int) -> dict[str, float]:
        """The means; raises FloatingPointError when one is not a finite number."""
        means = {name: value.item() / self.steps for name, value in self.sums.items()}
        if not all(map(math.isfinite, means.values())):
            parts = ", ".join(f"{name} {value:g}" for name, value in means.items())
            raise FloatingPointError(f"the loss is not finite by iteration {it} ({parts}); lower --learning_rate")
        return means

    def read(self, it: int) -> dict[str, float]:
        means = self.check(it)
        self.sums, self.steps = {}, 0
        return means


def show(bar: tqdm, losses: dict[str, Tensor]) -> None:
    """One step further; a GPU's loss is not fetched, as that waits for it: the bar then shows the last logged."""
    if bar.update() and losses["total training loss"].device.type == "cpu":
        bar.set_postfix(loss=f"{losses['total training loss'].item():.4f}", refresh=False)


class Training:
    """A run of --num_iters steps: where it stands, and what is done between its steps.

    evaluate: tests the model as it is after so many iterations, {split: what was found}. of_run: what is in each of the
    run's checkpoints alike, beside its flags.
    """

    def __init__(self, args: Namespace, model: ImgTextCompositionBase, split: Split, log: report.Report,
                 evaluate: Callable[[int], dict[str, report.SplitResult]], stopping: Stopping,
                 of_run: dict | None = None):
        self.args, self.model, self.split, self.log, self.of_run = args, model, split, log, of_run or {}
        self.evaluate, self.stopping = evaluate, stopping
        self.shared = distributed.averaging(model, args.sync_bn)                # the same weights, trained by several
        self.optimizer = make_optimizer(model, args.learning_rate, args.weight_decay, args.optimizer)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]     # before any schedule
        self.epoch_steps = len(split.data) // args.batch_size
        self.schedule = checkpoint.Schedule(args.save_frequency)
        self.it, self.tested, self.best, self.meter = 0, False, -math.inf, LossMeter()
        self.results: dict[str, dict[str, float]] = {}                          # of the last test
        self.whole = True                                                       # not while several are in a step
        self.clock = 0, time.perf_counter()                                     # steps since then, and when that was
        self.set_rates()

    def set_rates(self) -> None:
        """Of the next step."""
        args = self.args
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate_at(self.it, rate, args.schedule, args.learning_rate_decay_frequency, args.warmup,
                                  args.num_iters)

    def resume(self, state: dict) -> None:
        """From where a checkpoint's run stood."""
        past = checkpoint.resume(state, self.optimizer, self.model.a.device)
        self.it, self.tested, self.best = state["it"], past["tested"], past["best"]
        self.results = state.get("results", {})
        sums = {name: value.to(self.model.a.device) for name, value in past["sums"].items()}
        self.meter = LossMeter(sums, past["steps"])
        self.set_rates()
        steps, before = self.args.num_iters, state["opt"].get("num_iters")
        if self.args.schedule == "cosine" and before != steps > self.it:
            note(f"note: --num_iters {steps} (before: {before}) has another cosine: after iteration {self.it} the "
                 f"learning rate is {self.optimizer.param_groups[0]['lr']:g} instead of {past['rate']:g}")

    def save(self, best: bool = False) -> None:
        """All that was logged, then the checkpoint: what a checkpoint's run has logged is on disk."""
        if not distributed.first():
            return
        self.meter.check(self.it)                                               # nothing that is not finite is saved
        self.log.flush()
        progress = {"tested": self.tested, "best": self.best, "sums": self.meter.sums, "steps": self.meter.steps,
                    "samples": len(self.split.data), **self.of_run}
        checkpoint.save(self.log.folder, self.model, self.optimizer, self.it, plain(self.args), progress, best,
                        self.results if self.tested else {})

    def test_is_due(self) -> bool:
        epoch, rest = divmod(self.it, self.epoch_steps)
        often = self.args.eval_frequency
        return self.it == self.args.num_iters or bool(epoch and not rest and often and epoch % often == 1 % often)

    def test(self) -> None:
        """Test, keep the best checkpoint, and the latest."""
        distributed.same_buffers(self.model)
        results = self.evaluate(self.it)
        with self.stopping.held():
            self.results = found = report.show_results(self.log, results, self.it)
            chosen_on = next(name for name in ("validation", "test", "train") if name in found)
            score = found[chosen_on][self.args.best_metric]
            self.tested, best, self.best = True, score > self.best, max(score, self.best)
            self.save(best)
        self.clock = 0, time.perf_counter()                                     # a test is no training

    def step(self, parts: list[Part], bar: tqdm) -> None:
        distributed.meet()                                                      # who has left was not in this step
        self.whole = distributed.world() == 1
        distributed.own_random_numbers(self.args.seed, self.it)
        losses = train_step(self.shared, self.optimizer, self.args.loss, parts, self.args.gather)
        self.it, self.tested, self.clock = self.it + 1, False, (self.clock[0] + 1, self.clock[1])
        self.set_rates()
        self.meter.add(losses)
        self.whole = True
        if self.it % self.args.log_frequency == 0 or self.it == self.args.num_iters:
            means = self.meter.read(self.it)
            bar.set_postfix(loss=f"{means['total training loss']:.4f}", refresh=False)
            rate = self.args.batch_size * self.clock[0] / (time.perf_counter() - self.clock[1])
            self.clock = 0, time.perf_counter()
            self.log.scalars({**means, **self.state(), "queries per second": rate, "images per second": 2 * rate},
                             self.it)
            if not on_terminal() and self.it < self.args.num_iters:
                left = lasting((self.args.num_iters - self.it) * self.args.batch_size / rate)
                note(f"step {self.it} of {self.args.num_iters}: loss {means['total training loss']:.4f}, {rate:.0f} "
                     f"queries/s, {left} left")
        show(bar, losses)

    def state(self) -> dict[str, float]:
        """What is worth watching beside the losses; the gradient is the last step's."""
        gradients = [weight.grad for weight in self.model.parameters() if weight.grad is not None]
        return {"learning_rate": self.optimizer.param_groups[0]["lr"],
                "gradient norm": get_total_norm(gradients).item(), **self.model.watched()}

    def epoch(self, bar: tqdm) -> None:
        """What is left of the epoch the run stands in."""
        number, done = divmod(self.it, self.epoch_steps)
        if self.model.sentence_vectors:                                         # new ones: Fashion200k's modifications
            prepare(self.model.sentence_vectors, self.split.data.sample_texts(self.args.seed, number))
        for batch in batches(self.split, self.args.seed, number, self.args.batch_size, self.args.loader_num_workers,
                             self.model.a.device, done, self.args.accumulate):
            with self.stopping.held():
                self.step(batch, bar)
            if self.it == self.args.num_iters:
                return
            if self.schedule.due(self.it) and not self.test_is_due():
                self.save()

    def run(self) -> None:
        """To the end, or to where it is stopped or cannot go on: there too all is saved, and the reason raised."""
        self.model.train()
        with progress_bar(total=self.args.num_iters, initial=self.it, unit="step", smoothing=0.05, leave=True,
                          lines=False) as bar:
            try:
                with distributed.noticing():
                    while self.it < self.args.num_iters or not self.tested:
                        if self.test_is_due() and not self.tested:
                            self.test()
                        else:
                            self.epoch(bar)
            except (Stopped, InputError, OSError, PeerLost) as reason:
                self.stopping.ending()
                if self.whole and distributed.first():
                    self.save()
                    reason.add_note(f"saved at iteration {self.it}, go on with --resume '{self.log.folder}'")
                raise


