"""Train and test composed image retrieval: a source image plus a text finds the target image.

    python main.py --dataset=mitstates --dataset_path=../data/mitstates/ --model=composeAE --loss=soft_triplet
"""

import argparse
import logging
import math
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import checkpoint
import report
from datasets import DATASETS, CompositionDataset, Epoch, FashionIQ
from errors import InputError
from image_store import ImageStore, normalize_images, prefetch
from img_text_composition_models import MODELS, ImgTextCompositionBase, load_image_weights
from test_retrieval import evaluate
from text_model import SentenceService, SentenceTable, SimpleVocab
from torch_function import LOSSES, composition_losses

progress_bar = partial(tqdm, leave=False, dynamic_ncols=True, disable=None)     # disable=None: no bar into a file


class Parser(argparse.ArgumentParser):
    """Wrong flags end in one line and exit code 2."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}; see --help\n")


def true_or_false(text: str) -> bool:
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}")
    return values[text.lower()]


def at_least(minimum: float, kind: type = int, most: float = 2**62):
    """A number parser that refuses what is smaller, larger, infinite or not a number."""
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not minimum <= value <= most:
            raise argparse.ArgumentTypeError(f"expected {'an integer' if kind is int else 'a number'} of at least "
                                             f"{minimum}{f' and at most {most}' if most < 2**62 else ''}, got {text!r}")
        return value
    return parse


port_number = at_least(1, most=65535)


def get_parser() -> Parser:
    parser = Parser(prog="main.py", usage="%(prog)s --dataset NAME --dataset_path DIR [flags]",
                    description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                    epilog="The defaults are the published settings; README.md has the five published commands.")

    def add(group, flag: str, default, help: str, **how):
        if isinstance(default, bool):
            how = {"type": true_or_false, "nargs": "?", "const": True, "metavar": "True|False"}
        group.add_argument(flag, default=default, help=help, **how)

    data = parser.add_argument_group("data")
    data.add_argument("--dataset", required=True, choices=DATASETS, default=argparse.SUPPRESS,
                      help="benchmark to train and test on (required)")
    data.add_argument("--dataset_path", required=True, type=Path, metavar="DIR", default=argparse.SUPPRESS,
                      help="folder with the benchmark's published tree, see data/README.md (required)")
    add(data, "--category_to_train", "all", "FashionIQ: all three categories, or this one alone",
        choices=("all", *FashionIQ.CATEGORIES))
    add(data, "--use_complete_text_query", False, "queries say the whole target caption, not only what changes")
    add(data, "--skip_bad_images", False, "check every image first and leave out broken and missing ones, with what "
        "refers to them, in place of stopping at the first")
    add(data, "--image_size", 224, "side in pixels of the square images the encoder sees", type=at_least(32),
        metavar="S")
    add(data, "--image_cache", "auto", "folder that keeps the decoded images (3*S*S bytes each), 'none' to decode them "
        "each time, 'auto' for DATASET_PATH/image_cache", metavar="DIR")
    add(data, "--loader_num_workers", 4, "threads that prepare batches ahead; results do not depend on it",
        type=at_least(0), metavar="N")

    model = parser.add_argument_group("model")
    add(model, "--model", "composeAE", "composer of image and text", choices=MODELS)
    add(model, "--image_embed_dim", 512, "size of image features and of the composed query", type=at_least(1),
        metavar="D")
    add(model, "--text_embed_dim", 512, "size of the LSTM's words and states; with --use_bert the service decides",
        type=at_least(1), metavar="T")
    add(model, "--image_weights", "imagenet", "ResNet-18 to start from: 'imagenet' (downloaded once by torchvision), "
        "'none' (random), or a file saved from torchvision's resnet18", metavar="imagenet|none|PATH")
    add(model, "--use_bert", False, "sentence vectors from a running BERT-as-service in place of the LSTM")
    add(model, "--bert_ip", "localhost", "host of the sentence service", metavar="HOST")
    add(model, "--bert_port", 5555, "port the service takes texts on", type=port_number, metavar="PORT")
    add(model, "--bert_port_out", 5556, "port the service answers on", type=port_number, metavar="PORT")
    add(model, "--bert_timeout", 10.0, "seconds to wait for the service", type=at_least(0.1, float), metavar="SECONDS")

    training = parser.add_argument_group("training")
    add(training, "--loss", "soft_triplet", "metric loss between query and target", choices=LOSSES)
    add(training, "--num_iters", 160000, "training steps", type=at_least(1), metavar="N")
    add(training, "--batch_size", 32, "queries a step, each with its target", type=at_least(2), metavar="B")
    add(training, "--learning_rate", 1e-2, "SGD's rate; the image encoder's pretrained layers learn at a tenth of it",
        type=at_least(0, float), metavar="RATE")
    add(training, "--learning_rate_decay_frequency", 9999999, "steps after which all rates are multiplied by 0.1",
        type=at_least(1), metavar="N")
    add(training, "--weight_decay", 1e-6, "SGD's L2 penalty", type=at_least(0, float), metavar="RATE")
    add(training, "--seed", 0, "of weights, pairs, order and dropout", type=at_least(0), metavar="N")
    add(training, "--device", "auto", "where the model runs; auto takes a GPU where there is one",
        choices=("auto", "cpu", "cuda"))

    testing = parser.add_argument_group("testing and logs")
    add(testing, "--test_only", False, "no training: test --model_checkpoint on both splits")
    add(testing, "--model_checkpoint", "", "checkpoint to test, or to start training from", metavar="PATH")
    add(testing, "--eval_frequency", 3, "epochs between tests (epochs 1, 4, 7, ... by default) besides the one at the "
        "end; 0 for that one only", type=at_least(0), metavar="EPOCHS")
    add(testing, "--test_batch_size", 64, "images the encoder takes at once in a test", type=at_least(1), metavar="B")
    add(testing, "--baselines", False, "tests also judge, on the test split, the source image alone, the text "
        "alone, and chance")
    add(testing, "--log_frequency", 100, "steps between logged losses, which are means over those steps",
        type=at_least(1), metavar="N")
    add(testing, "--log_dir", Path("../logs/"), "folder under which the run's own folder is made", type=Path,
        metavar="DIR")
    add(testing, "--comment", "", "end of the run folder's name", metavar="TEXT")
    parser.add_argument("-f", default="", help=argparse.SUPPRESS)               # what a notebook passes to any script
    return parser


@dataclass
class Split:
    """A dataset with the pixels of its images."""
    data: CompositionDataset
    store: ImageStore


def cache_folder(args: argparse.Namespace) -> Path | None:
    """Where decoded images and sentence vectors are kept."""
    return {"none": None, "auto": args.dataset_path / "image_cache"}.get(args.image_cache, Path(args.image_cache))


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


def check_against_checkpoint(args: argparse.Namespace, opt: dict) -> None:
    """A model needs the text encoder it was trained with; what else differs may be meant, but is said."""
    if "use_bert" in opt and bool(opt["use_bert"]) != args.use_bert:
        raise InputError(f"the checkpoint {args.model_checkpoint} was trained with --use_bert {bool(opt['use_bert'])}; "
                         "pass the same")
    for name in ("dataset", "category_to_train", "use_complete_text_query", "image_size"):
        if name in opt and opt[name] != getattr(args, name):
            logging.warning("note: the checkpoint was trained with --%s %s, this run has %s", name, opt[name],
                            getattr(args, name))


def find_service(args: argparse.Namespace, state: dict | None) -> SentenceService:
    """The sentence service, met before anything that takes long; a checkpoint goes with one size of vectors."""
    service = SentenceService(args.bert_ip, args.bert_port, args.bert_port_out, args.bert_timeout)
    if state and checkpoint.text_dim(state) not in (None, service.dim):
        raise InputError(f"the checkpoint {args.model_checkpoint} was trained with sentence vectors of size "
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


def build_model(args: argparse.Namespace, state: dict | None, texts: list[str], sentences: SentenceTable | None,
                device: torch.device) -> ImgTextCompositionBase:
    """The composer with a checkpoint's, ImageNet's or random weights, channels last, on the device."""
    words = (state and checkpoint.vocabulary(state, lstm_used=sentences is None)) or SimpleVocab.from_texts(texts)
    text_dim = sentences.dim if sentences else args.text_embed_dim
    model = MODELS[args.model](words, args.image_embed_dim, text_dim, sentence_vectors=sentences)
    if state:
        checkpoint.restore(model, state, args.model_checkpoint)
    else:
        load_image_weights(model.img_model, args.image_weights)
    return model.to(device, memory_format=torch.channels_last)


def parameter_groups(model: ImgTextCompositionBase, rate: float) -> list[dict]:
    """Every weight in one of three groups: the encoder's new last layer, its pretrained rest (0.1 x), all others."""
    def group(name: str) -> str:
        return "head" if name.startswith("img_model.fc.") else "backbone" if name.startswith("img_model.") else "rest"
    named = list(model.named_parameters())
    return [{"params": [weight for name, weight in named if group(name) == key], "lr": factor * rate}
            for key, factor in (("head", 1.0), ("backbone", 0.1), ("rest", 1.0))]


def batches(train: Split, seed: int, epoch: int, size: int, workers: int) -> Iterator[tuple[Tensor, list[str], Tensor]]:
    """One epoch's whole batches: (B, 3, S, S) uint8 source images, B texts, (B, 3, S, S) uint8 target images."""
    samples = Epoch(train.data, seed, epoch)

    def batch(start: int) -> tuple[Tensor, list[str], Tensor]:
        sources, targets, texts = zip(*(samples[i] for i in range(start, start + size)), strict=True)
        return train.store.batch(sources), list(texts), train.store.batch(targets)
    return prefetch(batch, range(0, len(samples) - size + 1, size), workers)


def train_step(model: ImgTextCompositionBase, optimizer: torch.optim.Optimizer, loss: str, source: Tensor,
               texts: list[str], target: Tensor) -> dict[str, Tensor]:
    """One update on uint8 images and texts. Returns {name: detached scalar}, still on the device."""
    device = model.a.device
    source, target = (normalize_images(images.to(device, non_blocking=True)) for images in (source, target))
    losses = composition_losses(model(source, texts, target), loss)
    optimizer.zero_grad()
    losses["total training loss"].backward()
    optimizer.step()
    return {name: value.detach() for name, value in losses.items()}


class LossMeter:
    """Means of the losses since the last reading, summed on the device: reading is what waits for it."""

    def __init__(self):
        self.sums, self.steps = {}, 0

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
    """One step further; the loss is fetched from the device only when the bar is drawn again."""
    if bar.update():
        bar.set_postfix(loss=f"{losses['total training loss'].item():.4f}", refresh=False)


def train(args: argparse.Namespace, model: ImgTextCompositionBase, split: Split, log: report.Report, test) -> None:
    """Exactly --num_iters steps; `test(it)` every --eval_frequency epochs and a checkpoint each, both at the end."""
    optimizer = torch.optim.SGD(parameter_groups(model, args.learning_rate), momentum=0.9,
                                weight_decay=args.weight_decay)
    save = partial(checkpoint.save, log.folder / "latest_checkpoint.pth", model, optimizer, flags=plain(args))
    meter, it, epoch = LossMeter(), 0, 0
    model.train()
    with tqdm(total=args.num_iters, unit="step", dynamic_ncols=True, smoothing=0.05) as bar:
        while it < args.num_iters:
            if epoch and args.eval_frequency and epoch % args.eval_frequency == 1 % args.eval_frequency:
                test(it)
            if model.sentence_vectors:                                          # new ones: Fashion200k's modifications
                model.sentence_vectors.prepare(split.data.sample_texts(args.seed, epoch), progress_bar)
            for batch in batches(split, args.seed, epoch, args.batch_size, args.loader_num_workers):
                losses = train_step(model, optimizer, args.loss, *batch)
                it += 1
                if it % args.learning_rate_decay_frequency == 0:
                    for group in optimizer.param_groups:
                        group["lr"] *= 0.1
                meter.add(losses)
                if it % args.log_frequency == 0 or it == args.num_iters:
                    log.scalars({**meter.read(it), "learning_rate": optimizer.param_groups[0]["lr"],
                                 "queries per second": args.batch_size * (bar.format_dict["rate"] or 0)}, it)
                show(bar, losses)
                if it == args.num_iters:
                    break
            epoch += 1
            meter.check(it)                                                     # nothing that is not finite is saved
            save(it=it)
    test(it)


def plain(args: argparse.Namespace) -> dict:
    """The flags as plain values."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


def choose_device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: this machine has no usable CUDA GPU; pass --device cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def run(args: argparse.Namespace) -> None:
    """The whole program, in order."""
    if args.test_only and not args.model_checkpoint:
        raise InputError("--test_only needs the checkpoint to test: pass --model_checkpoint PATH")
    device = choose_device(args.device)
    seed_everything(args.seed)
    report.check_log_dir(args.log_dir, args.comment)
    state = checkpoint.load(args.model_checkpoint) if args.model_checkpoint else None
    if state:
        check_against_checkpoint(args, state["opt"])
    service = find_service(args, state) if args.use_bert else None
    splits = {name: open_split(args, name) for name in ("train", "test")}
    samples = len(splits["train"].data)
    if samples < args.batch_size and not args.test_only:
        raise InputError(f"--batch_size {args.batch_size} is more than the {samples} training samples; lower it")
    sentences = learn_texts(args, service, splits) if service else None
    model = build_model(args, state, splits["train"].data.training_texts(), sentences, device)
    log = report.Report(report.run_folder(args.log_dir, args.comment), plain(args))
    tqdm.write(f"{args.model} on {args.dataset}, {device}: {samples} training samples, "
               f"{len(splits['test'].data.images)} test images; logs in {log.folder}")

    def test(it: int) -> None:
        ways = {name: evaluate(model, split.data, split.store, args.test_batch_size, args.loader_num_workers, args.seed,
                               progress_bar, args.baselines and name == "test") for name, split in splits.items()}
        baselines = {way: metrics for way, metrics in ways["test"].items() if way != "model"}
        tqdm.write(log.metrics({name: found["model"] for name, found in ways.items()}, baselines, it))

    if args.test_only:
        test(state["it"])
    else:
        train(args, model, splits["train"], log, test)
    log.close()


def main(argv: list[str] | None = None) -> int:
    """Run with these flags; returns the exit code: 0, 2 for bad input, 130 for Ctrl-C."""
    logging.basicConfig(format="%(message)s")
    try:
        run(get_parser().parse_args(argv))
    except (InputError, OSError, FloatingPointError) as error:
        print(f"main.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("main.py: stopped; the run's folder holds the checkpoint of its last whole epoch", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
