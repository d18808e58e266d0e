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
from image_encoders import load_image_weights, traits
from img_text_composition_models import ImgTextCompositionBase, Recipe
from machine import distributed
from machine.device import choose_device, compiled, seed_everything, set_up
from machine.downloads import stay_offline
from machine.folder_lock import FolderLock
from machine.progress import progress_bar, say
from machine.streams import log_to_stderr
from test_retrieval import evaluate
from text_encoders import text_encoder_of
from text_model import SimpleVocab, spread
from training import checkpoint, report
from training.data import Data, make_data, place_images, tell_of_unread
from training.loop import Training
from training.resuming import find_start
from training.sizes import check_sizes, check_test_size
from training.writers import WRITERS

# The model

def make_model(args: argparse.Namespace, data: Data, source: str | Path, state: dict | None,
               device: torch.device) -> ImgTextCompositionBase:
    """The composer with a checkpoint's, ImageNet's or random weights, ready to be trained on the device."""
    words = state and checkpoint.vocabulary(state, lstm_used=data.sentences is None)
    if not words and not data.train:
        raise InputError(f"the checkpoint {source} has no vocabulary, so that of its train split is needed to test it")
    words = words or SimpleVocab.from_texts(data.train.training_texts())
    recipe = Recipe(args.model, args.image_encoder, args.image_size, args.image_embed_dim,
                    args.text_encoder, data.sentences.dim if data.sentences else args.text_embed_dim, words.word2id)
    model = recipe.build(data.sentences)
    if state:
        checkpoint.restore(model, state, source)
    elif distributed.first():                                                   # whose weights all take in `averaging`
        load_image_weights(model.img_model, args.image_weights, args.image_encoder)
    if data.train:
        samples = Epoch(data.train, args.seed, 0)
        texts = dict.fromkeys(samples[i].text for i in spread(range(len(samples)), 2048))
        model.example_texts = spread([*texts], 256)
    return ready(model, device, args.precision, args.compile)


def ready(model: ImgTextCompositionBase, device: torch.device, precision: str, fast: bool) -> ImgTextCompositionBase:
    """The model on the device, channels last, in this precision, its training forward compiled if `fast`."""
    model.bf16 = precision == "bf16"
    if fast:
        model.features = compiled(model.features)
    return model.to(device, memory_format=torch.channels_last)


# The run

def run(args: argparse.Namespace, stopping: Stopping, device: torch.device, lock: FolderLock) -> None:
    """The whole program, in order. lock: of the run's folder, which the first process takes."""
    if args.test_only and not args.model_checkpoint:
        raise InputError("--test_only needs the checkpoint to test: pass --model_checkpoint PATH")
    if args.test_only and args.resume:
        raise InputError("--test_only tests --model_checkpoint and resumes nothing: drop --resume")
    args.image_embed_dim = args.image_embed_dim or traits(args.image_encoder).width
    if args.sync_bn and device.type != "cuda":
        raise InputError("--sync_bn True: torch's synchronized batch norm is for CUDA GPUs alone; drop it")
    args.text_encoder = text_encoder_of(plain(args))
    args.use_bert = args.text_encoder == "service"
    set_up(device, args.precision, distributed.local_world())
    seed_everything(args.seed)
    if distributed.first():
        report.check_log_dir(args.log_dir, args.comment)
        WRITERS[args.report_to].check()
    resumed, source, state, turn = distributed.from_first(partial(
        find_start, args.resume, args.model_checkpoint, args.log_dir, args.comment, not args.test_only, lock))
    if not args.dataset:
        raise InputError(f"{args.model_checkpoint} does not say what it was trained on: pass --dataset NAME")
    args.image_size = args.image_size or checkpoint.image_size(state) or traits(args.image_encoder).size
    check_sizes(args, device)
    if state and not resumed:
        checkpoint.check_flags(plain(args), source, state["opt"])
    data = make_data(args, device, source, state, bool(resumed))
    check_test_size(args, max(len(split.store) for split in data.every.values()), device)
    model = make_model(args, data, source, state, device)
    if data.sentences is None and distributed.first():
        tell_of_unread(model.text_model.vocabulary, data, args.seed)
    place_images(args, data.every, model)
    folder = resumed.parent if resumed else distributed.from_first(
        partial(report.run_folder, args.log_dir, args.comment, lock))
    first = distributed.first()
    log = (report.Report if first else report.Silence)(folder, plain(args), state["it"] if resumed else None,
                                                       data.test.headline)
    for split in data.splits.values():
        if split.data.about:
            say(split.data.about)
    say(f"{args.model} on {args.dataset}, {device}: {len(data.train or ())} training samples, "
        f"{len(data.test.images)} test images; logs in {folder}"
        + (f", going on after iteration {state['it']}" if resumed else "")
        + (f"; {distributed.world()} processes" if distributed.world() > 1 else ""))

    def judge(it: int) -> dict[str, report.Tested]:
        tested = {}
        for name, split in data.splits.items():
            seen = report.Sightings(split.store, it, split.data.images)
            tested[name] = report.Tested(evaluate(
                model, split.data, split.store, args.test_batch_size, args.loader_num_workers, args.seed, progress_bar,
                args.baselines and split.data is data.test, seen if distributed.first() else None), seen)
        return tested
    if args.test_only:
        report.show_results(log, judge(state["it"]), state["it"])
    else:
        training = Training(args, model, data.splits["train"], log, judge, stopping,
                            {"turn": turn, "data": data.digests})
        if resumed:
            training.go_on(state)
        training.run()
    for split in data.served.values():
        evaluate(model, split.data, split.store, args.test_batch_size, args.loader_num_workers, args.seed, progress_bar,
                 watch=report.Submission(folder, split.data) if first else None)
    log.close()


def main(argv: list[str] | None = None) -> int:
    """Run with these flags; returns the exit code, as `ending` says."""
    log_to_stderr(logging.WARNING if distributed.local_rank() == 0 else logging.ERROR)

    def work(stopping: Stopping) -> None:
        parser = get_parser()
        args = parser.parse_args(argv)
        device = choose_device(args.device, distributed.local_rank() if distributed.launched() else None)
        with distributed.job(device), FolderLock() as lock:
            if args.test_only and args.model_checkpoint:
                stay_offline()
                told = distributed.from_first(partial(checkpoint.flags_of, args.model_checkpoint))
                args = parser.parse_args([*told, *(sys.argv[1:] if argv is None else argv)])
            run(args, stopping, device, lock)
    return ending("main.py", work)


if __name__ == "__main__":
    sys.exit(main())
