"""Train and test composed image retrieval: a source image plus a text finds the target image.

    python main.py --dataset=mitstates --dataset_path=../data/mitstates/ --model=composeAE --loss=soft_triplet
"""

import argparse
import logging
import math
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from tqdm import tqdm

import checkpoint
import distributed
import report
from datasets import DATASETS, CompositionDataset, Epoch
from device import choose_device, compiled, set_up
from errors import InputError
from flags import get_parser
from image_store import DeviceStore, ImageStore, normalize_images, prefetch
from img_text_composition_models import MODELS, ImgTextCompositionBase, encoder_head, load_image_weights
from stopping import Stopped, Stopping
from test_retrieval import evaluate
from text_model import SentenceService, SentenceTable, SimpleVocab, spread
from torch_function import composition_losses

NO_BAR = None if distributed.first() else True                                  # None: where it would go into a file
progress_bar = partial(tqdm, leave=False, dynamic_ncols=True, disable=NO_BAR)


def say(text: str) -> None:
    """Print beside the bars, of several processes in the first."""
    if distributed.first():
        tqdm.write(text)


@dataclass
class Split:
    """A dataset with the pixels of its images."""
    data: CompositionDataset
    store: ImageStore | DeviceStore


class Part(NamedTuple):
    """What of a batch goes through the model at once, in this process: (B, 3, S, S) uint8 images, and B texts."""
    source: Tensor
    texts: list[str]
    target: Tensor


@dataclass
class Tested:
    """A split's test: {way to answer: {metric: value}}, and what there is to look at."""
    ways: dict[str, dict[str, float]]
    seen: report.Sightings


def cache_folder(args: argparse.Namespace) -> Path | None:
    """Where decoded images and sentence vectors are kept."""
    in_dataset = args.dataset_path / "image_cache"
    return {"none": None, "auto": in_dataset, "device": in_dataset}.get(args.image_cache, Path(args.image_cache))


def open_split(args: argparse.Namespace, split: str) -> Split:
    """Read a split; with --skip_bad_images decode all of it first and read it again without what is broken."""
    read = partial(DATASETS[args.dataset], args.dataset_path, split, complete_text=args.use_complete_text_query,
                   category=args.category_to_train)
    data = read(without=frozenset() if args.skip_bad_images else None)
    store = ImageStore(data.paths, args.image_size, cache_folder(args))
    if args.skip_bad_images:
        bad = distributed.union(store.unreadable(progress_bar, distributed.machines_share))
        data = read(without=frozenset(data.images[index] for index in bad))
        gone = ", ".join(f"{count} {what}" for what, count in data.dropped.items() if count)
        say(f"{split} split: left out {gone or 'nothing'}")
        store = ImageStore(data.paths, args.image_size, cache_folder(args))
    elif missing := store.missing():
        raise InputError(f"{len(missing)} of the {split} split's {len(store)} images are missing or empty, first "
                         f"{missing[0]}; put them back, or pass --skip_bad_images True to leave such images out")
    return Split(data, store)


def hold_on_device(splits: dict[str, Split], device: torch.device, workers: int) -> None:
    """Move the splits' pixels into the device's memory, where there is room for them."""
    copies = distributed.local_world() if device.type == "cpu" else 1           # a GPU has one process
    if not DeviceStore.fits([split.store for split in splits.values()], device, copies):
        logging.warning("note: the images would take more than half of the memory free on the %s; they are read from "
                        "the cache folder, as with --image_cache auto", device)
        return
    for split in splits.values():
        split.store = DeviceStore.of(split.store, device, workers, progress_bar)


def check_against_checkpoint(args: argparse.Namespace, source: str | Path, opt: dict) -> None:
    """A model needs the text encoder it was trained with; what else differs may be meant, but is said."""
    if "use_bert" in opt and (opt["use_bert"] is True) != args.use_bert:
        raise InputError(f"the checkpoint {source} was trained with --use_bert {opt['use_bert']}; pass the same")
    for name in ("dataset", "category_to_train", "use_complete_text_query", "image_size"):
        if name in opt and opt[name] != getattr(args, name):
            logging.warning("note: the checkpoint was trained with --%s %s, this run has %s", name, opt[name],
                            getattr(args, name))


def find_service(args: argparse.Namespace, source: str | Path, state: dict | None) -> SentenceService:
    """The sentence service, met before anything that takes long; a checkpoint goes with one size of vectors."""
    service = SentenceService(args.bert_ip, args.bert_port, args.bert_port_out, args.bert_timeout)
    if state and checkpoint.text_dim(state) not in (None, service.dim):
        raise InputError(f"the checkpoint {source} was trained with sentence vectors of size "
                         f"{checkpoint.text_dim(state)}, the service at {args.bert_ip}:{args.bert_port} answers "
                         f"{service.dim}; serve the model it was trained with")
    if state and state.get("sentences", service.features) != service.features:
        logging.warning("note: the checkpoint was trained with the sentence vectors of %s, the service has %s",
                        state["sentences"], service.features)
    return service


def learn_texts(args: argparse.Namespace, service: SentenceService, splits: dict[str, Split]) -> SentenceTable:
    """Vectors of every text of the tests and of the first epoch; with all but Fashion200k's modifications, of all."""
    sentences = SentenceTable(service, cache_folder(args))
    asked = [splits["train"].data.sample_texts(args.seed, 0)] if not args.test_only else []
    asked += [split.data.task(args.seed).texts for split in splits.values()]
    prepare(sentences, chain.from_iterable(asked))
    return sentences


def prepare(sentences: SentenceTable, texts: Iterable[str]) -> None:
    """Have the vectors of these texts, from the service or, in all processes but one of a machine, from its disk."""
    with distributed.a_machines_first_goes_first():
        sentences.prepare(texts, progress_bar)


def example_texts(train: CompositionDataset, seed: int, most: int = 8) -> list[str]:
    """Texts as training draws them."""
    samples = Epoch(train, seed, 0)
    return list(dict.fromkeys(text for _, _, text in map(samples.__getitem__, spread(range(len(samples)), most))))


def build_model(args: argparse.Namespace, source: str | Path, state: dict | None, texts: list[str],
                sentences: SentenceTable | None, device: torch.device) -> ImgTextCompositionBase:
    """The composer with a checkpoint's, ImageNet's or random weights, channels last, on the device."""
    words = (state and checkpoint.vocabulary(state, lstm_used=sentences is None)) or SimpleVocab.from_texts(texts)
    text_dim = sentences.dim if sentences else args.text_embed_dim
    model = MODELS[args.model](words, args.image_embed_dim, text_dim, sentences, args.image_encoder, args.image_size)
    if state:
        checkpoint.restore(model, state, source)
    elif distributed.first():                                                   # whose weights all take in `averaging`
        load_image_weights(model.img_model, args.image_weights, args.image_encoder)
    return ready(model, device, args.precision, args.compile)


def ready(model: ImgTextCompositionBase, device: torch.device, precision: str, fast: bool) -> ImgTextCompositionBase:
    """The model on the device, channels last, in this precision, its training forward compiled if `fast`."""
    model.bf16 = precision == "bf16"
    if fast:
        model.features = compiled(model.features)
    return model.to(device, memory_format=torch.channels_last)


def parameter_groups(model: ImgTextCompositionBase, rate: float) -> list[dict]:
    """Every weight in one of three groups: the encoder's new last layer, its pretrained rest (0.1 x), all others."""
    def group(name: str) -> str:
        if name.startswith(f"img_model.{model.image_head}."):
            return "head"
        return "backbone" if name.startswith("img_model.") else "rest"
    named = list(model.named_parameters())
    return [{"params": [weight for name, weight in named if group(name) == key], "lr": factor * rate}
            for key, factor in (("head", 1.0), ("backbone", 0.1), ("rest", 1.0))]


def encoder_batch(device: torch.device) -> int:
    """Images the encoder takes at once in a test, where the user does not say: what its caches hold, or fills a GPU."""
    return 256 if device.type == "cuda" else 32


def make_optimizer(model: ImgTextCompositionBase, rate: float, weight_decay: float) -> torch.optim.SGD:
    """The published one; fused: all weights of a group in one pass over them."""
    return torch.optim.SGD(parameter_groups(model, rate), momentum=0.9, weight_decay=weight_decay, fused=True)


def check_shares(batch_size: int, parts: int, together: int) -> None:
    """Raise InputError unless a batch falls into equal shares of whole groups of `together` samples."""
    shares = distributed.world() * parts
    unit, least = shares * together, 2 * shares                                 # batch norm needs two samples
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
        return Part(train.store.batch(sources, device), list(texts), train.store.batch(targets, device))

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
            features = model(normalize_images(part.source), part.texts, normalize_images(part.target))
            with distributed.same_random_numbers(part.source.device) if gather else nullcontext():
                losses = composition_losses(features, loss, distributed.gather if gather else lambda own: own)
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

    judge: tests the model as it is after so many iterations, {split: what was found}.
    """

    def __init__(self, args: argparse.Namespace, model: ImgTextCompositionBase, split: Split, log: report.Report,
                 judge: Callable[[int], dict[str, Tested]], stopping: Stopping):
        self.args, self.model, self.split, self.log = args, model, split, log
        self.judge, self.stopping = judge, stopping
        self.shared = distributed.averaging(model, args.sync_bn)                # the same weights, trained by several
        self.optimizer = make_optimizer(model, args.learning_rate, args.weight_decay)
        self.epoch_steps = len(split.data) // args.batch_size
        self.schedule = checkpoint.Schedule(args.save_frequency)
        self.it, self.tested, self.best, self.meter = 0, False, -math.inf, LossMeter()
        self.whole = True                                                       # not while several are in a step
        self.clock = 0, time.perf_counter()                                     # steps since then, and when that was

    def go_on(self, state: dict) -> None:
        """From where a checkpoint's run stood."""
        past = checkpoint.resume(state, self.optimizer, self.model.a.device)
        self.it, self.tested, self.best = state["it"], past["tested"], past["best"]
        sums = {name: value.to(self.model.a.device) for name, value in past["sums"].items()}
        self.meter = LossMeter(sums, past["steps"])

    def save(self, best: bool = False) -> None:
        """All that was logged, then the checkpoint: what a checkpoint's run has logged is on disk."""
        if not distributed.first():
            return
        self.meter.check(self.it)                                               # nothing that is not finite is saved
        self.log.flush()
        progress = {"tested": self.tested, "best": self.best, "sums": self.meter.sums, "steps": self.meter.steps,
                    "samples": len(self.split.data)}
        checkpoint.save(self.log.folder, self.model, self.optimizer, self.it, plain(self.args), progress, best)

    def test_is_due(self) -> bool:
        epoch, rest = divmod(self.it, self.epoch_steps)
        often = self.args.eval_frequency
        return self.it == self.args.num_iters or bool(epoch and not rest and often and epoch % often == 1 % often)

    def test(self) -> None:
        """Test, keep the best checkpoint, and the latest."""
        distributed.same_buffers(self.model)
        results = self.judge(self.it)
        with self.stopping.held():
            score = show_results(self.log, results, self.it)["test"][self.args.best_metric]
            self.tested, best, self.best = True, score > self.best, max(score, self.best)
            self.save(best)
        self.clock = 0, time.perf_counter()                                     # a test is no training

    def step(self, parts: list[Part], bar: tqdm) -> None:
        distributed.meet()                                                      # who has left was not in this step
        self.whole = distributed.world() == 1
        distributed.own_random_numbers(self.args.seed, self.it)
        losses = train_step(self.shared, self.optimizer, self.args.loss, parts, self.args.gather)
        self.it, self.tested, self.clock = self.it + 1, False, (self.clock[0] + 1, self.clock[1])
        if self.it % self.args.learning_rate_decay_frequency == 0:
            for group in self.optimizer.param_groups:
                group["lr"] *= 0.1
        self.meter.add(losses)
        self.whole = True
        if self.it % self.args.log_frequency == 0 or self.it == self.args.num_iters:
            means = self.meter.read(self.it)
            bar.set_postfix(loss=f"{means['total training loss']:.4f}", refresh=False)
            rate = self.args.batch_size * self.clock[0] / (time.perf_counter() - self.clock[1])
            self.clock = 0, time.perf_counter()
            self.log.scalars({**means, **self.state(), "queries per second": rate, "images per second": 2 * rate},
                             self.it)
        show(bar, losses)

    def state(self) -> dict[str, float]:
        """What is worth watching beside the losses; the gradient is the last step's."""
        gradients = [weight.grad for weight in self.model.parameters() if weight.grad is not None]
        weights = {f"a {i}": value for i, value in enumerate(self.model.a.tolist())}
        scale = self.model.normalization_layer.norm_s.item()
        return {"learning_rate": self.optimizer.param_groups[0]["lr"], "scale": scale,
                "gradient norm": get_total_norm(gradients).item(), **weights}

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
        with progress_bar(total=self.args.num_iters, initial=self.it, unit="step", smoothing=0.05, leave=True) as bar:
            try:
                with distributed.noticing():
                    while self.it < self.args.num_iters or not self.tested:
                        if self.test_is_due() and not self.tested:
                            self.test()
                        else:
                            self.epoch(bar)
            except (Stopped, InputError, OSError, distributed.PeerLost) as reason:
                self.stopping.ending()
                if self.whole and distributed.first():
                    self.save()
                    reason.add_note(f"saved at iteration {self.it}, go on with --resume '{self.log.folder}'")
                raise


def show_results(log: report.Report, tested: dict[str, Tested], it: int) -> dict[str, dict[str, float]]:
    """Print and log a test. Returns the model's results, {split: {metric: value}}."""
    results = {name: split.ways["model"] for name, split in tested.items()}
    baselines = {way: metrics for way, metrics in tested["test"].ways.items() if way != "model"}
    say(log.metrics(results, baselines, it))
    for name, split in tested.items():
        log.sightings(name, split.seen, it)
    return results


def choose_metric(name: str, data: CompositionDataset) -> str:
    if name != "auto" and name not in data.metrics():
        raise InputError(f"--best_metric {name}: choose one of {', '.join(data.metrics())}")
    return data.best_metric if name == "auto" else name


def plain(args: argparse.Namespace) -> dict:
    """The flags as plain values."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def find_start(args: argparse.Namespace) -> tuple[Path | None, str | Path, dict | None]:
    """The checkpoint of the run to go on with, if there is one; the one to start from, which may be another run's; its
    content."""
    resume, launch = args.resume, None
    if distributed.restarted() and not (args.resume or args.test_only):         # what this launch itself has begun
        resume, launch = "auto", distributed.launch()
    resumed = checkpoint.find_run(resume, args.log_dir, args.comment, launch) if resume else None
    source = resumed or args.model_checkpoint
    return resumed, source, checkpoint.load(source) if source else None


def run(args: argparse.Namespace, stopping: Stopping, device: torch.device) -> None:
    """The whole program, in order."""
    if args.test_only and not args.model_checkpoint:
        raise InputError("--test_only needs the checkpoint to test: pass --model_checkpoint PATH")
    if args.test_only and args.resume:
        raise InputError("--test_only tests --model_checkpoint and resumes nothing: drop --resume")
    args.image_embed_dim = args.image_embed_dim or encoder_head(args.image_encoder)[1]
    if args.sync_bn and device.type == "cpu":
        raise InputError("--sync_bn True: torch's synchronized batch norm is for GPUs alone; drop it")
    set_up(device, args.precision, distributed.local_world())
    seed_everything(args.seed)
    if distributed.first():
        report.check_log_dir(args.log_dir, args.comment)
    resumed, source, state = distributed.from_first(partial(find_start, args))
    if state and not resumed:
        check_against_checkpoint(args, source, state["opt"])
    service = find_service(args, source, state) if args.use_bert else None
    splits = {name: open_split(args, name) for name in ("train", "test")}
    samples = len(splits["train"].data)
    if samples < args.batch_size and not args.test_only:
        raise InputError(f"--batch_size {args.batch_size} is more than the {samples} training samples; lower it")
    if not args.test_only:
        check_shares(args.batch_size, args.accumulate, splits["train"].data.together)
    args.best_metric = choose_metric(args.best_metric, splits["test"].data)
    if resumed:
        checkpoint.check_same_run(state, resumed, plain(args), samples, service and service.features)
    if args.image_cache == "device":
        hold_on_device(splits, device, args.loader_num_workers)
    sentences = learn_texts(args, service, splits) if service else None
    model = build_model(args, source, state, splits["train"].data.training_texts(), sentences, device)
    model.example_texts = example_texts(splits["train"].data, args.seed)
    folder = resumed.parent if resumed else distributed.from_first(
        partial(report.run_folder, args.log_dir, args.comment))
    first = distributed.first()
    log = (report.Report if first else report.Silence)(folder, plain(args), state["it"] if resumed else None)
    say(f"{args.model} on {args.dataset}, {device}: {samples} training samples, {len(splits['test'].data.images)} test "
        f"images; logs in {folder}" + (f", going on after iteration {state['it']}" if resumed else "")
        + (f"; {distributed.world()} processes" if distributed.world() > 1 else ""))

    def judge(it: int) -> dict[str, Tested]:
        tested = {}
        for name, split in splits.items():
            seen = report.Sightings(split.store, it)
            tested[name] = Tested(evaluate(
                model, split.data, split.store, args.test_batch_size or encoder_batch(device), args.loader_num_workers,
                args.seed, progress_bar, args.baselines and name == "test", seen if first else None), seen)
        return tested
    if args.test_only:
        show_results(log, judge(state["it"]), state["it"])
    else:
        training = Training(args, model, splits["train"], log, judge, stopping)
        if resumed:
            training.go_on(state)
        training.run()
    log.close()


def main(argv: list[str] | None = None) -> int:
    """Run with these flags; returns the exit code: 0, 2 for bad input, 130 for Ctrl-C, 143 for SIGTERM."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING if distributed.local_rank() == 0 else logging.ERROR)
    try:
        with Stopping() as stopping:
            args = get_parser().parse_args(argv)
            device = choose_device(args.device, distributed.local_rank() if distributed.launched() else None)
            with distributed.job(device):
                run(args, stopping, device)
    except (InputError, OSError, FloatingPointError, distributed.PeerLost) as error:
        complain(error, "main.py: error:")
        return 2
    except Stopped as stop:
        complain(stop, "main.py:")
        return stop.code
    except KeyboardInterrupt:
        complain(KeyboardInterrupt("stopped at once; a run's folder holds its last whole checkpoint"), "main.py:")
        return 130
    return 0


def complain(reason: BaseException, before: str) -> None:
    """Say in one line why the program ends, of several processes one, and what the first of them has saved."""
    follows = isinstance(reason, Stopped | distributed.PeerLost)                # from what others say too
    new = distributed.first() if follows else distributed.first_to_say(str(reason))
    if line := [str(reason)] * new + getattr(reason, "__notes__", []):
        print(before, "; ".join(line), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
