"""Train and test composed image retrieval: a source image plus a text finds the target image.

    python main.py --dataset=mitstates --dataset_path=../data/mitstates/ --model=composeAE --loss=soft_triplet
"""

import argparse
import logging
import sys
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

from flags import get_parser, plain
from machine.errors import InputError
from machine.stopping import Stopping, ending, starting

if __name__ == "__main__":                                                      # before the seconds that torch takes
    starting(get_parser())

import torch

import checkpoint
import report
from datasets import DATASETS, CompositionDataset, Epoch
from image_encoders import load_image_weights, traits
from img_text_composition_models import ImgTextCompositionBase, Recipe
from machine import distributed
from machine.device import choose_device, compiled, seed_everything, set_up
from machine.feature_store import FeatureStore
from machine.image_store import DeviceStore, ImageStore
from machine.progress import progress_bar, say
from test_retrieval import encoder_batch, evaluate
from text_encoders import InProcess, sentence_source, text_encoder_of
from text_model import SentenceService, SentenceTable, SimpleVocab, spread
from training import Split, Training, check_shares, prepare


@dataclass
class Data:
    """What is made of the flags to learn and to test from: {"train": ..., "test": ...}, and the texts' vectors where
    they come from a sentence service."""
    splits: dict[str, Split]
    sentences: SentenceTable | None

    @property
    def train(self) -> CompositionDataset:
        return self.splits["train"].data

    @property
    def test(self) -> CompositionDataset:
        return self.splits["test"].data


# The data

def make_data(args: argparse.Namespace, device: torch.device, source: str | Path, state: dict | None,
              resumed: bool) -> Data:
    """Both splits, their images and sentence vectors; source, state: a checkpoint's that they must go with."""
    service = find_source(args, source, state)                                  # before anything that takes long
    data = Data({name: open_split(args, name) for name in ("train", "test")}, None)
    samples = len(data.train)
    if samples < args.batch_size and not args.test_only:
        raise InputError(f"--batch_size {args.batch_size} is more than the {samples} training samples; lower it")
    if not args.test_only:
        check_shares(args.batch_size, args.accumulate, data.train.together)
    args.best_metric = choose_metric(args.best_metric, data.test)
    if resumed:
        checkpoint.check_same_run(state, source, plain(args), samples, service and service.features)
    if service:
        data.sentences = learn_texts(args, service, data)
    return data


def cache_folder(args: argparse.Namespace) -> Path | None:
    """Where decoded images and sentence vectors are kept."""
    in_dataset = args.dataset_path / "image_cache"
    return {"none": None, "auto": in_dataset, "device": in_dataset}.get(args.image_cache, Path(args.image_cache))


def open_split(args: argparse.Namespace, split: str) -> Split:
    """Read a split; with --skip_bad_images decode all of it first and read it again without what is broken."""
    read = partial(DATASETS[args.dataset], args.dataset_path, split, complete_text=args.use_complete_text_query,
                   category=args.category_to_train)

    def open_store(data: CompositionDataset) -> ImageStore:
        return ImageStore(data.paths, args.image_size, cache_folder(args), traits(args.image_encoder).resampling)
    data = read(without=frozenset() if args.skip_bad_images else None)
    store = open_store(data)
    if args.skip_bad_images:
        bad = distributed.union(store.unreadable(progress_bar, distributed.machines_share))
        data = read(without=frozenset(data.images[index] for index in bad))
        gone = ", ".join(f"{count} {what}" for what, count in data.dropped.items() if count)
        say(f"{split} split: left out {gone or 'nothing'}")
        store = open_store(data)
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


def choose_metric(name: str, data: CompositionDataset) -> str:
    if name != "auto" and name not in data.metrics():
        raise InputError(f"--best_metric {name}: choose one of {', '.join(data.metrics())}")
    return data.best_metric if name == "auto" else name


def find_source(args: argparse.Namespace, source: str | Path, state: dict | None) -> SentenceService | InProcess | None:
    """Where sentence vectors come from, met; a checkpoint goes with one size of them. None where the LSTM reads."""
    if args.text_encoder == "lstm":
        return None
    service = sentence_source(plain(args))
    if state and checkpoint.text_dim(state) not in (None, service.dim):
        raise InputError(f"the checkpoint {source} was trained with sentence vectors of size "
                         f"{checkpoint.text_dim(state)}, {service} answers {service.dim}; "
                         "serve the model it was trained with")
    if state and state.get("sentences", service.features) != service.features:
        logging.warning("note: the checkpoint was trained with the sentence vectors of %s, %s has %s",
                        state["sentences"], service, service.features)
    return service


def learn_texts(args: argparse.Namespace, service: SentenceService | InProcess, data: Data) -> SentenceTable:
    """Vectors of every text of the tests and of the first epoch; with all but Fashion200k's modifications, of all."""
    sentences = SentenceTable(service, cache_folder(args))
    asked = [data.train.sample_texts(args.seed, 0)] if not args.test_only else []
    asked += [split.data.task(args.seed).texts for split in data.splits.values()]
    prepare(sentences, chain.from_iterable(asked))
    return sentences


# The model

def make_model(args: argparse.Namespace, data: Data, source: str | Path, state: dict | None,
               device: torch.device) -> ImgTextCompositionBase:
    """The composer with a checkpoint's, ImageNet's or random weights, ready to be trained on the device."""
    words = state and checkpoint.vocabulary(state, lstm_used=data.sentences is None)
    words = words or SimpleVocab.from_texts(data.train.training_texts())
    recipe = Recipe(args.model, args.image_encoder, args.image_size, args.image_embed_dim,
                    args.text_encoder, data.sentences.dim if data.sentences else args.text_embed_dim, words.word2id)
    model = recipe.build(data.sentences)
    if state:
        checkpoint.restore(model, state, source)
    elif distributed.first():                                                   # whose weights all take in `averaging`
        load_image_weights(model.img_model, args.image_weights, args.image_encoder)
    samples = Epoch(data.train, args.seed, 0)
    model.example_texts = list(dict.fromkeys(samples[i].text for i in spread(range(len(samples)), 8)))
    return ready(model, device, args.precision, args.compile)


def ready(model: ImgTextCompositionBase, device: torch.device, precision: str, fast: bool) -> ImgTextCompositionBase:
    """The model on the device, channels last, in this precision, its training forward compiled if `fast`."""
    model.bf16 = precision == "bf16"
    if fast:
        model.features = compiled(model.features)
    return model.to(device, memory_format=torch.channels_last)


def place_images(args: argparse.Namespace, splits: dict[str, Split], model: ImgTextCompositionBase) -> None:
    """Where batches come from: decoded images, on disk or on the device; or a frozen encoder's features, made here."""
    device, workers = model.a.device, args.loader_num_workers
    if args.freeze_image_encoder:
        distributed.same_weights(model.img_model)
        model.freeze_backbone()
        for split in splits.values():
            split.store = FeatureStore(split.store, model.backbone, model.traits.width, model.backbone_fingerprint(),
                                       cache_folder(args))
            for share in (distributed.machines_share, list):                    # then what another could not keep
                split.store.fill(args.test_batch_size or encoder_batch(device), workers, progress_bar, share)
                distributed.meet()
    elif args.image_cache == "device":
        hold_on_device(splits, device, workers)


# The run

def run(args: argparse.Namespace, stopping: Stopping, device: torch.device) -> None:
    """The whole program, in order."""
    if args.test_only and not args.model_checkpoint:
        raise InputError("--test_only needs the checkpoint to test: pass --model_checkpoint PATH")
    if args.test_only and args.resume:
        raise InputError("--test_only tests --model_checkpoint and resumes nothing: drop --resume")
    args.image_embed_dim = args.image_embed_dim or traits(args.image_encoder).width
    if args.sync_bn and device.type == "cpu":
        raise InputError("--sync_bn True: torch's synchronized batch norm is for GPUs alone; drop it")
    args.text_encoder = text_encoder_of(plain(args))
    args.use_bert = args.text_encoder == "service"
    set_up(device, args.precision, distributed.local_world())
    seed_everything(args.seed)
    if distributed.first():
        report.check_log_dir(args.log_dir, args.comment)
    resumed, source, state = distributed.from_first(partial(
        checkpoint.find_start, args.resume, args.model_checkpoint, args.log_dir, args.comment, not args.test_only))
    args.image_size = args.image_size or checkpoint.image_size(state) or traits(args.image_encoder).size
    if state and not resumed:
        checkpoint.check_flags(plain(args), source, state["opt"])
    data = make_data(args, device, source, state, bool(resumed))
    model = make_model(args, data, source, state, device)
    place_images(args, data.splits, model)
    folder = resumed.parent if resumed else distributed.from_first(
        partial(report.run_folder, args.log_dir, args.comment))
    reporting = report.Report if distributed.first() else report.Silence
    log = reporting(folder, plain(args), state["it"] if resumed else None)
    say(f"{args.model} on {args.dataset}, {device}: {len(data.train)} training samples, {len(data.test.images)} test "
        f"images; logs in {folder}" + (f", going on after iteration {state['it']}" if resumed else "")
        + (f"; {distributed.world()} processes" if distributed.world() > 1 else ""))

    def judge(it: int) -> dict[str, report.Tested]:
        tested = {}
        for name, split in data.splits.items():
            seen = report.Sightings(split.store, it)
            tested[name] = report.Tested(evaluate(
                model, split.data, split.store, args.test_batch_size, args.loader_num_workers, args.seed, progress_bar,
                args.baselines and name == "test", seen if distributed.first() else None), seen)
        return tested
    if args.test_only:
        report.show_results(log, judge(state["it"]), state["it"])
    else:
        training = Training(args, model, data.splits["train"], log, judge, stopping)
        if resumed:
            training.go_on(state)
        training.run()
    log.close()


def main(argv: list[str] | None = None) -> int:
    """Run with these flags; returns the exit code: 0, 2 for bad input, 130 for Ctrl-C, 143 for SIGTERM."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING if distributed.local_rank() == 0 else logging.ERROR)

    def work(stopping: Stopping) -> None:
        args = get_parser().parse_args(argv)
        device = choose_device(args.device, distributed.local_rank() if distributed.launched() else None)
        with distributed.job(device):
            run(args, stopping, device)
    return ending("main.py", work)


if __name__ == "__main__":
    sys.exit(main())
