"""Train and test composed image retrieval: a source image plus a text finds the target image.

    python main.py --dataset=mitstates --dataset_path=../data/mitstates/ --model=composeAE --loss=soft_triplet
"""

import argparse
import logging
import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from tqdm import tqdm

import checkpoint
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

progress_bar = partial(tqdm, leave=False, dynamic_ncols=True, disable=None)     # disable=None: no bar into a file


@dataclass
class Split:
    """A dataset with the pixels of its images."""
    data: CompositionDataset
    store: ImageStore | DeviceStore


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
        bad = store.unreadable(progress_bar)
        data = read(without=frozenset(data.images[index] for index in bad))
        gone = ", ".join(f"{count} {what}" for what, count in data.dropped.items() if count)
        tqdm.write(f"{split} split: left out {gone or 'nothing'}")
        store = ImageStore(data.paths, args.image_size, cache_folder(args))
    elif missing := store.missing():
        raise InputError(f"{len(missing)} of the {split} split's {len(store)} images are missing or empty, first "
                         f"{missing[0]}; put them back, or pass --skip_bad_images True to leave such images out")
    return Split(data, store)


def hold_on_device(splits: dict[str, Split], device: torch.device, workers: int) -> None:
    """Move the splits' pixels into the device's memory, where there is room for them."""
    if not DeviceStore.fits([split.store for split in splits.values()], device):
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
    sentences.prepare(chain.from_iterable(asked), progress_bar)
    return sentences


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
    else:
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


def batches(train: Split, seed: int, epoch: int, size: int, workers: int, device: torch.device,
            done: int = 0) -> Iterator[tuple[Tensor, list[str], Tensor]]:
    """An epoch's whole batches but the first `done`: (B, 3, S, S) uint8 source images, B texts, and target images,
    the images on their way to the device."""
    samples = Epoch(train.data, seed, epoch)

    def batch(start: int) -> tuple[Tensor, list[str], Tensor]:
        sources, targets, texts = zip(*(samples[i] for i in range(start, start + size)), strict=True)
        return train.store.batch(sources, device), list(texts), train.store.batch(targets, device)
    return prefetch(batch, range(done * size, len(samples) - size + 1, size), workers)


def train_step(model: ImgTextCompositionBase, optimizer: torch.optim.Optimizer, loss: str, source: Tensor,
               texts: list[str], target: Tensor) -> dict[str, Tensor]:
    """One update on uint8 images and texts, without waiting for the device. Returns {name: detached scalar} on it."""
    losses = composition_losses(model(normalize_images(source), texts, normalize_images(target)), loss)
    optimizer.zero_grad()
    losses["total training loss"].backward()
    optimizer.step()
    return {name: value.detach() for name, value in losses.items()}


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
        self.optimizer = make_optimizer(model, args.learning_rate, args.weight_decay)
        self.epoch_steps = len(split.data) // args.batch_size
        self.schedule = checkpoint.Schedule(args.save_frequency)
        self.it, self.tested, self.best, self.meter = 0, False, -math.inf, LossMeter()
        self.clock = 0, time.perf_counter()                                     # steps since then, and when that was

    def go_on(self, state: dict) -> None:
        """From where a checkpoint's run stood."""
        past = checkpoint.resume(state, self.optimizer, self.model.a.device)
        self.it, self.tested, self.best = state["it"], past["tested"], past["best"]
        sums = {name: value.to(self.model.a.device) for name, value in past["sums"].items()}
        self.meter = LossMeter(sums, past["steps"])

    def save(self, best: bool = False) -> None:
        """All that was logged, then the checkpoint: what a checkpoint's run has logged is on disk."""
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
        results = self.judge(self.it)
        with self.stopping.held():
            score = show_results(self.log, results, self.it)["test"][self.args.best_metric]
            self.tested, best, self.best = True, score > self.best, max(score, self.best)
            self.save(best)
        self.clock = 0, time.perf_counter()                                     # a test is no training

    def step(self, batch: tuple[Tensor, list[str], Tensor], bar: tqdm) -> None:
        losses = train_step(self.model, self.optimizer, self.args.loss, *batch)
        self.it, self.tested, self.clock = self.it + 1, False, (self.clock[0] + 1, self.clock[1])
        if self.it % self.args.learning_rate_decay_frequency == 0:
            for group in self.optimizer.param_groups:
                group["lr"] *= 0.1
        self.meter.add(losses)
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
            self.model.sentence_vectors.prepare(self.split.data.sample_texts(self.args.seed, number), progress_bar)
        for batch in batches(self.split, self.args.seed, number, self.args.batch_size, self.args.loader_num_workers,
                             self.model.a.device, done):
            with self.stopping.held():
                self.step(batch, bar)
            if self.it == self.args.num_iters:
                return
            if self.schedule.due(self.it) and not self.test_is_due():
                self.save()

    def run(self) -> None:
        """To the end, or to where it is stopped or cannot go on: there too all is saved, and the reason raised."""
        self.model.train()
        with tqdm(total=self.args.num_iters, initial=self.it, unit="step", dynamic_ncols=True, smoothing=0.05) as bar:
            try:
                while self.it < self.args.num_iters or not self.tested:
                    if self.test_is_due() and not self.tested:
                        self.test()
                    else:
                        self.epoch(bar)
            except (Stopped, InputError, OSError) as reason:
                self.save()
                reason.add_note(f"saved at iteration {self.it}, go on with --resume '{self.log.folder}'")
                raise


def show_results(log: report.Report, tested: dict[str, Tested], it: int) -> dict[str, dict[str, float]]:
    """Print and log a test. Returns the model's results, {split: {metric: value}}."""
    results = {name: split.ways["model"] for name, split in tested.items()}
    baselines = {way: metrics for way, metrics in tested["test"].ways.items() if way != "model"}
    tqdm.write(log.metrics(results, baselines, it))
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


def run(args: argparse.Namespace, stopping: Stopping) -> None:
    """The whole program, in order."""
    if args.test_only and not args.model_checkpoint:
        raise InputError("--test_only needs the checkpoint to test: pass --model_checkpoint PATH")
    if args.test_only and args.resume:
        raise InputError("--test_only tests --model_checkpoint and resumes nothing: drop --resume")
    args.image_embed_dim = args.image_embed_dim or encoder_head(args.image_encoder)[1]
    device = choose_device(args.device)
    set_up(device, args.precision)
    seed_everything(args.seed)
    report.check_log_dir(args.log_dir, args.comment)
    resumed = checkpoint.find_run(args.resume, args.log_dir, args.comment) if args.resume else None
    source = resumed or args.model_checkpoint
    state = checkpoint.load(source) if source else None
    if state and not resumed:
        check_against_checkpoint(args, source, state["opt"])
    service = find_service(args, source, state) if args.use_bert else None
    splits = {name: open_split(args, name) for name in ("train", "test")}
    samples = len(splits["train"].data)
    if samples < args.batch_size and not args.test_only:
        raise InputError(f"--batch_size {args.batch_size} is more than the {samples} training samples; lower it")
    args.best_metric = choose_metric(args.best_metric, splits["test"].data)
    if resumed:
        checkpoint.check_same_run(state, resumed, plain(args), samples, service and service.features)
    if args.image_cache == "device":
        hold_on_device(splits, device, args.loader_num_workers)
    sentences = learn_texts(args, service, splits) if service else None
    model = build_model(args, source, state, splits["train"].data.training_texts(), sentences, device)
    model.example_texts = example_texts(splits["train"].data, args.seed)
    log = report.Report(resumed.parent if resumed else report.run_folder(args.log_dir, args.comment), plain(args),
                        state["it"] if resumed else None)
    tqdm.write(f"{args.model} on {args.dataset}, {device}: {samples} training samples, "
               f"{len(splits['test'].data.images)} test images; logs in {log.folder}"
               + (f", going on after iteration {state['it']}" if resumed else ""))

    def judge(it: int) -> dict[str, Tested]:
        tested = {}
        for name, split in splits.items():
            seen = report.Sightings(split.store, it)
            tested[name] = Tested(evaluate(
                model, split.data, split.store, args.test_batch_size or encoder_batch(device), args.loader_num_workers,
                args.seed, progress_bar, args.baselines and name == "test", seen), seen)
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
    logging.basicConfig(format="%(message)s")
    try:
        with Stopping() as stopping:
            run(get_parser().parse_args(argv), stopping)
    except (InputError, OSError, FloatingPointError) as error:
        print("main.py: error:", "; ".join([str(error), *getattr(error, "__notes__", ())]), file=sys.stderr)
        return 2
    except Stopped as stop:
        print("main.py:", "; ".join([str(stop), *getattr(stop, "__notes__", ())]), file=sys.stderr)
        return stop.code
    except KeyboardInterrupt:
        print("main.py: stopped at once; a run's folder holds its last whole checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
