"""Train and test composed image retrieval: a source image plus a text finds the target image.

    python main.py --dataset=mitstates --dataset_path=../data/mitstates/ --model=composeAE --loss=soft_triplet
"""

import argparse
import logging
import sys
from functools import partial
from pathlib import Path

from flags import get_parser, plain
from machine.errors import InputError
from machine.stopping import Stopping, ending, starting

if __name__ == "__main__":                                                      # before the seconds that torch takes
    starting(get_parser())

import torch

from benchmarks.base import Epoch
from img_text_composition_models import MODELS, ImgTextCompositionBase, Recipe
from machine import distributed
from machine.device import choose_device, compiled, seed_everything, set_up
from machine.folder_lock import FolderLock
from machine.progress import progress_bar, say
from machine.streams import log_to_stderr
from machine.tensor_files import fingerprint
from test_retrieval import evaluate
from text_model import SimpleVocab, spread
from training import checkpoint, report
from training.corpora import texts_and_vectors
from training.data import Data, make_data, note_unread_words, place_images
from training.loop import Split, Training
from training.resuming import Start
from training.settings import settle
from training.sizes import check_sizes, check_test_size

# The model

def make_model(args: argparse.Namespace, data: Data, source: str | Path, state: dict | None,
               device: torch.device) -> ImgTextCompositionBase:
    """The composer with a checkpoint's, ImageNet's or random weights, ready to be trained on the device."""
    if MODELS[args.model].frozen:
        corpora, given = texts_and_vectors(args, source, state)
        recipe = Recipe(args.model, args.image_encoder, args.image_size, args.image_embed_dim, args.text_encoder, 0, {},
                        prompt=args.prompt, corpora=corpora, expansion=args.expansion, contexts=args.contexts,
                        given={name: len(rows) for name, rows in given.items()})
    else:
        given = {}
        recipe = Recipe(args.model, args.image_encoder, args.image_size, args.image_embed_dim, args.text_encoder,
                        data.sentences.dim if data.sentences else args.text_embed_dim,
                        words_of(args, data, source, state), args.image_features, args.learn_words)
    model = recipe.build(data.sentences)
    model.last_layer.dropout = args.feature_dropout
    if checkpoint.lacks_towers(state, model) and distributed.first():           # whose weights all take in `averaging`
        model.load_weights(args.image_weights, progress_bar)
        if given:
            model.give(given)
    if state:
        checkpoint.restore(model, state, source)
    if data.train and data.train.teaches == "triplets":                        # else its texts are no queries
        samples = Epoch(data.train, args.seed, 0)
        texts = dict.fromkeys(samples[i].text for i in spread(range(len(samples)), 2048))
        model.example_texts = spread([*texts], 256)
    return ready(model, device, args.precision, args.compile)


def words_of(args: argparse.Namespace, data: Data, source: str | Path, state: dict | None) -> dict[str, int]:
    """The LSTM's vocabulary: the checkpoint's, or of the train split."""
    words = state and checkpoint.vocabulary(state, lstm_used=data.sentences is None or args.learn_words)
    if not words and not data.train:
        raise InputError(f"the checkpoint {source} has no vocabulary, so that of its train split is needed to test it")
    return (words or SimpleVocab.from_texts(data.train.training_texts())).word2id


def ready(model: ImgTextCompositionBase, device: torch.device, precision: str, fast: bool) -> ImgTextCompositionBase:
    """The model on the device, channels last, in this precision, its training forward compiled if `fast`."""
    model.bf16 = precision == "bf16"
    if fast:
        model.features = compiled(model.features)
    return model.to(device, memory_format=torch.channels_last)


# The run

def run(args: argparse.Namespace, start: Start, stopping: Stopping, device: torch.device, lock: FolderLock) -> None:
    """The whole program, in order. args, start: as `settle` gives them. lock: of the run's folder, which the first
    process takes."""
    set_up(device, args.precision, distributed.local_world())
    seed_everything(args.seed)
    check_sizes(args, device)
    data = make_data(args, start)
    check_test_size(args, max(len(split.store) for split in data.every.values()), device)
    model = make_model(args, data, start.source, start.state, device)
    if model.vocabulary and distributed.first():
        note_unread_words(model.vocabulary, data, args.seed)
    place_images(args, data.every, model)
    log = open_log(args, start, data, lock)
    introduce(args, start, data, model, device, log.folder)
    test = partial(evaluate_splits, args, model, data)
    if args.test_only:
        it = start.state["it"] if start.state else 0
        results = report.show_results(log, test(it), it)
        if checkpoint.lacks_towers(start.state, model) and distributed.first():
            file = checkpoint.save_untrained(log.folder, model, plain(args), results)
            say(f"{file}: this model, as search.py and --model_checkpoint take it")
    else:
        training = Training(args, model, data.splits["train"], log, test, stopping,
                            {"turn": start.turn, "data": data.digests})
        if start.resumed:
            training.resume(start.state)
        training.run()
    for split in data.served.values():
        evaluate_split(args, model, split,
                       watch=report.Submission(log.folder, split.data, model.score) if distributed.first() else None)
    log.close()


def open_log(args: argparse.Namespace, start: Start, data: Data, lock: FolderLock) -> report.Report:
    """In the folder of the run that goes on, or in a new one; of all processes the first alone logs."""
    folder = start.resumed.parent if start.resumed else distributed.from_first(
        partial(report.run_folder, args.log_dir, args.comment, lock))
    return report.Report(folder, plain(args), start.state["it"] if start.resumed else None, data.test.headline,
                         silent=not distributed.first(), tabled=data.test.tabled)


def introduce(args: argparse.Namespace, start: Start, data: Data, model: ImgTextCompositionBase, device: torch.device,
              folder: Path) -> None:
    """Say what is run, on what and where."""
    for split in data.splits.values():
        if split.data.about:
            say(split.data.about)
    if model.about:
        say(model.about)
    say(f"{args.model} on {args.dataset}, {device}: {len(data.train or ())} training samples, "
        f"{len(data.test.images)} test images; logs in {folder}"
        + (f", going on after iteration {start.state['it']}" if start.resumed else "")
        + (f"; {distributed.world()} processes" if distributed.world() > 1 else ""))


def evaluate_split(args: argparse.Namespace, model: ImgTextCompositionBase, split: Split, **how) -> dict:
    return evaluate(model, split.data, split.store, args.test_batch_size, args.loader_num_workers, args.seed,
                    progress_bar, **how)


def evaluate_splits(args: argparse.Namespace, model: ImgTextCompositionBase, data: Data,
                it: int) -> dict[str, report.SplitResult]:
    """The retrieval test of each split, and what is to be seen of it, after so many iterations."""
    tested, weights = {}, fingerprint(model.state_dict(), data.sentences and data.sentences.features)[:12]
    for name, split in data.splits.items():
        seen = report.QualitativeResults(split.store, it, split.data.images, model.score)
        tested[name] = report.SplitResult(evaluate_split(
            args, model, split, baselines=args.baselines and split.data is data.test,
            watch=seen if distributed.first() else None), seen,
            {**split.data.protocol(args.seed, model.template), "weights": weights}, split.data.asked)
    return tested


def main(argv: list[str] | None = None) -> int:
    """Run with these flags; returns the exit code, as `ending` says."""
    log_to_stderr(logging.WARNING if distributed.local_rank() == 0 else logging.ERROR)
    words = sys.argv[1:] if argv is None else argv

    def work(stopping: Stopping) -> None:
        wanted = get_parser().parse_args(words).device
        device = choose_device(wanted, distributed.local_rank() if distributed.launched() else None)
        with distributed.job(device), FolderLock() as lock:
            run(*settle(words, device, lock), stopping, device, lock)
    return ending("main.py", work)


if __name__ == "__main__":
    sys.exit(main())
