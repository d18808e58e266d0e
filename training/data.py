"""What a run learns and is tested from: its splits, where their images come from, and its texts' vectors."""

import argparse
import logging
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.base import CompositionDataset, note_passed_over
from datasets import DATASETS
from flags import dataset_settings, plain
from image_encoders import traits
from img_text_composition_models import MODELS, ImgTextCompositionBase, Part
from machine import distributed, engine
from machine.errors import InputError
from machine.feature_store import FeatureStore
from machine.image_store import DeviceStore, ImageStore
from machine.progress import progress_bar, say
from machine.text_store import TextStore
from machine.vocabulary import tokenize
from test_retrieval import encoder_batch
from text_encoders import InProcess, sentence_source
from text_model import SentenceService, SentenceTable, SimpleVocab
from training import checkpoint
from training.loop import Split, check_shares, prepare
from training.resuming import Start

log = logging.getLogger(__name__)

COMPARED = 8                            # images, of an engine with torch


@dataclass
class Data:
    """What is made of the flags to learn and to test from: {"train": ..., "test": ...}, with "validation" beside or in
    place of the last; the texts' vectors where they come from a sentence service; and the split that a test server
    judges, where it is to be answered."""
    splits: dict[str, Split]
    sentences: SentenceTable | None
    digests: dict[str, str] = field(default_factory=dict)                       # of images and texts, of each split
    served: dict[str, Split] = field(default_factory=dict)

    @property
    def every(self) -> dict[str, Split]:
        return {**self.splits, **self.served}

    @property
    def train(self) -> CompositionDataset | None:
        """None where there is none to be tested on."""
        return self.splits["train"].data if "train" in self.splits else None

    @property
    def test(self) -> CompositionDataset:
        """What is not trained with: the test split, or what is held out where there is none."""
        return self.splits[list(self.splits)[-1]].data


def make_data(args: argparse.Namespace, start: Start) -> Data:
    """Both splits, their images and sentence vectors; start: whose checkpoint they must go with."""
    if DATASETS[args.dataset].without_training and not args.test_only:
        raise InputError(f"--dataset {args.dataset} is published to test on alone: train on another, then pass "
                         f"--test_only True --model_checkpoint PATH --dataset {args.dataset}")
    service = find_source(args, start.source, start.state)                      # before anything that takes long
    names = DATASETS[args.dataset].splits(args.dataset_path, args.validation)
    splits = {name: split for name in names if (split := open_split(args, name))}
    if told := note_passed_over(split.data for split in splits.values()):
        logging.warning("note: %s", told)
    digests = {what: found for split in splits.values() for what, found in split.digests(args.seed).items()}
    data = Data(splits, None, {} if args.test_only else digests, open_served(args))
    samples = len(data.train) if data.train else 0
    if not args.test_only:
        if samples < args.batch_size:
            raise InputError(f"--batch_size {args.batch_size} is more than the {samples} training samples; lower it")
        check_shares(args.batch_size, args.accumulate, data.train.group_size)
    if args.best_metric not in data.test.metric_names():
        raise InputError(f"--best_metric {args.best_metric}: choose one of {', '.join(data.test.metric_names())}")
    if start.resumed:
        checkpoint.check_same_run(start.state, start.source, plain(args), samples, service and service.features,
                                  data.digests)
    if service:
        data.sentences = learn_texts(args, service, data)
    return data


def open_served(args: argparse.Namespace) -> dict[str, Split]:
    """The split that a test server judges, if it is to be answered."""
    name = DATASETS[args.dataset].served
    return {name: read_split(args, name)} if args.write_submission else {}


def cache_folder(args: argparse.Namespace) -> Path | None:
    """Where decoded images and sentence vectors are kept."""
    in_dataset = DATASETS[args.dataset].folder(args.dataset_path) / "image_cache"
    return {"none": None, "auto": in_dataset, "device": in_dataset}.get(args.image_cache, Path(args.image_cache))


def open_split(args: argparse.Namespace, split: str) -> Split | None:
    """A split to train on or to test. None for a train split that was only to be tested, and is not there."""
    try:
        return read_split(args, split)
    except InputError as error:
        if not (args.test_only and split == "train"):
            raise
        logging.warning("note: the train split is not tested (%s)", error)
        return None


def read_split(args: argparse.Namespace, split: str) -> Split:
    """Read a split; with --skip_bad_images decode all of it first and read it again without what is broken."""
    read = partial(DATASETS[args.dataset], args.dataset_path, split, **dataset_settings(args))

    def open_store(data: CompositionDataset) -> ImageStore | TextStore:
        if not data.has_pictures:
            return TextStore(data.images, cache_folder(args))
        return ImageStore(data.paths, args.image_size, cache_folder(args), traits(args.image_encoder).resampling,
                          data.upright, data.crops)
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


def find_source(args: argparse.Namespace, source: str | Path, state: dict | None) -> SentenceService | InProcess | None:
    """Where sentence vectors come from, met; a checkpoint goes with one size of them. None where the model reads."""
    if args.text_encoder == "lstm" or MODELS[args.model].frozen:
        return None
    service = sentence_source(plain(args))
    if state and checkpoint.text_dim(state) not in (None, service.dim):
        raise InputError(f"the checkpoint {source} was trained with sentence vectors of size "
                         f"{checkpoint.text_dim(state)}, {service} answers {service.dim}; "
                         "serve the model it was trained with")
    if state and state.get("sentences", service.features) != service.features:
        logging.warning("note: the checkpoint was trained with the sentence vectors of %s, %s has %s",
                        state["sentences"], service, service.features)
    if isinstance(service, InProcess):
        try:
            service.compute_by(args.engine)
        except engine.Refused as why:
            log.warning("note: --engine %s: %s; torch computes the text encoder", args.engine, why)
    return service


def learn_texts(args: argparse.Namespace, service: SentenceService | InProcess, data: Data) -> SentenceTable:
    """Vectors of every text of the tests and of the first epoch; with all but Fashion200k's modifications, of all."""
    sentences = SentenceTable(service, cache_folder(args))
    asked = [data.train.sample_texts(args.seed, 0)] if not args.test_only else []
    asked += [split.data.task(args.seed).texts for split in data.every.values()]
    prepare(sentences, chain.from_iterable(asked))
    return sentences


def note_unread_words(words: SimpleVocab, data: Data, seed: int) -> None:
    """Say what of the tests' texts the LSTM does not read."""
    texts = [text for split in data.every.values() for text in split.data.task(seed).texts]
    unknown, wordless = map(dict.fromkeys, words.unread(texts))
    if unknown:
        asked = sum(not set(tokenize(text)).isdisjoint(unknown) for text in texts)
        logging.warning("note: the LSTM does not know %s of the tests' words (%s), which are in %s of %s queries: "
                        "it was given none of them to learn", len(unknown), ", ".join([*unknown][:5]), asked,
                        len(texts))
    if wordless:
        asked = sum(text in wordless for text in texts)
        logging.warning("note: %s of %s queries have no word that the LSTM can read, which reads ASCII letters and "
                        "digits alone (%r)", asked, len(texts), next(iter(wordless)))


def place_images(args: argparse.Namespace, splits: dict[str, Split], model: ImgTextCompositionBase) -> None:
    """Where batches come from: decoded images, on disk or on the device; or a frozen encoder's features, made here."""
    device = model.a.device
    if args.freeze_image_encoder:
        distributed.same_weights(model if model.frozen else model.img_model)
        model.freeze_backbone()
        pixels = {name: split.store for name, split in splits.items()}
        refused = place_features(args, splits, Backbone(model, args.engine))
        if refused:
            log.warning("note: --engine %s: %s; torch computes the image encoder", args.engine, refused)
            for name, split in splits.items():
                split.store = pixels[name]
            place_features(args, splits, Backbone(model, "torch"))
    elif args.image_cache == "device":
        hold_on_device(splits, device, args.loader_num_workers)


class Backbone:
    """A frozen encoder but for its last layer, (B, 3, S, S) uint8 -> (B, W) float32, by an engine, which is compared
    with torch on the first images. Raises Refused where it does not take the encoder.

    made_by: names all that the features depend on beside the pixels; torch's as it was before there was an engine.
    """

    def __init__(self, model: ImgTextCompositionBase, name: str):
        self.model, self.name, self.network = model, name, None
        by = f"_{name}" + "_bf16" * model.bf16
        self.made_by = model.backbone_fingerprint() + by * (name != "torch")

    def __call__(self, images: Tensor) -> Tensor:
        if self.name == "torch":
            return self.model.backbone(images)
        if not self.network:
            rows = images[torch.arange(max(len(images), COMPARED)) % len(images)][:COMPARED]
            training = self.model.training
            try:
                self.network = engine.made(Part(self.model, "before_last_layer"), [rows], self.model.bf16)
            finally:
                self.model.train(training)
        return torch.from_numpy(self.network(images.numpy()))


def place_features(args: argparse.Namespace, splits: dict[str, Split], encode: Backbone) -> str | None:
    """Features in the place of pixels, all of them encoded. Returns why the engine refused to, in any process."""
    model, refused = encode.model, {}
    for split in splits.values():
        at_once = args.test_batch_size or encoder_batch(model.a.device, split.store)
        made_by, by = ((encode.made_by, encode) if split.data.has_pictures else
                       (model.caption_fingerprint(), model.encode_captions))
        split.store = FeatureStore(split.store, by, model.traits.width, made_by, cache_folder(args),
                                   distributed.local_world())
        for share in (distributed.machines_share, list):                        # then what another could not keep
            try:
                split.store.fill(at_once, args.loader_num_workers, progress_bar, share)
            except engine.Refused as error:
                refused[distributed.rank()] = str(error)
            distributed.meet()
    return next(iter(distributed.union(refused).values()), None)
