"""What a run's flags come to, with what its checkpoint says and what this machine has: settled once, here."""

import argparse
import logging
from functools import partial

import torch

from datasets import DATASETS
from flags import get_parser, plain, refuse
from image_encoders import traits
from img_text_composition_models import MODELS
from machine import distributed, engine
from machine.errors import InputError
from machine.folder_lock import FolderLock
from machine.offline import stay_offline
from text_encoders import OWN, text_encoder_of
from training import checkpoint, report
from training.resuming import Start, find_start
from training.writers import WRITERS

log = logging.getLogger(__name__)


def settle(words: list[str], device: torch.device, lock: FolderLock) -> tuple[argparse.Namespace, Start]:
    """The flags as the whole run takes them, nothing left open, and where it begins. Nothing assigns to them later.

    With --test_only, what is not given is as the checkpoint's training was told. lock: takes the folder of a run that
    goes on. Raises InputError for flags that do not go together, or not with the checkpoint or the device.
    """
    args = get_parser().parse_args(words)
    if distributed.first():
        report.check_log_dir(args.log_dir)
        WRITERS[args.report_to].check()
    start = distributed.from_first(partial(
        find_start, args.resume, args.model_checkpoint, args.log_dir, args.comment, not args.test_only, lock))
    opt = start.state["opt"] if start.state else {}
    if args.test_only and opt:
        stay_offline()                                                          # the checkpoint may be a stranger's
        args = get_parser().parse_args([*checkpoint.flags_to_test(opt), *words])
    if not args.dataset:
        raise InputError(f"{args.model_checkpoint} does not say what it was trained on: pass --dataset NAME")
    refuse(args, device.type)
    check_teaching(args)
    settled = filled(args, opt)
    chosen = distributed.from_first(partial(engine_of, settled, device.type, start.resumed and opt))
    settled = argparse.Namespace(**{**vars(settled), "engine": chosen})
    if start.state and not start.resumed:
        checkpoint.check_flags(plain(settled), start.source, opt)
    return settled, start


def check_teaching(args: argparse.Namespace) -> None:
    """Raise InputError for a composer that learns nothing of what the dataset has, or cannot be tested on it."""
    kind, teaches = MODELS[args.model], DATASETS[args.dataset].teaches
    others = ", ".join(name for name, data in DATASETS.items() if data.teaches == kind.learns_from)
    if not args.test_only and not kind.learns_from:
        raise InputError(f"--model {args.model} learns nothing: pass --test_only True")
    if not args.test_only and kind.learns_from != teaches:
        raise InputError(f"--model {args.model} learns from {kind.learns_from}, not from what --dataset {args.dataset} "
                         f"has: choose one of {others}")
    if teaches == "texts" and not kind.frozen:
        raise InputError(f"--dataset {args.dataset} has no pictures for --model {args.model}; choose one of {others}")


def filled(args: argparse.Namespace, opt: dict | None = None) -> argparse.Namespace:
    """The flags with values in place of 0 and auto: a checkpoint's, `opt`, or the encoder's and the dataset's own. How
    texts become vectors is own only where a checkpoint says nothing else."""
    known, text_encoder, kind = traits(args.image_encoder), text_encoder_of(plain(args)), MODELS[args.model]
    read = {name: (opt or {}).get(name, OWN) if getattr(args, name) == OWN else getattr(args, name)
            for name in ("pooling_layer", "max_seq_len")}
    return argparse.Namespace(**{
        **vars(args), **read, "text_encoder": text_encoder, "use_bert": text_encoder == "service",
        "image_embed_dim": known.width if kind.frozen else args.image_embed_dim or known.width,
        "freeze_image_encoder": args.freeze_image_encoder or kind.frozen,
        "image_size": args.image_size or (opt or {}).get("image_size") or known.size,
        "best_metric": DATASETS[args.dataset].best_metric if args.best_metric == "auto" else args.best_metric})


def engine_of(args: argparse.Namespace, device: str, opt: dict | None = None) -> str:
    """What computes what a run has frozen, images' encoder or texts': 'torch' or 'openvino'. opt: of the run that goes
    on, whose own it is.

    Raises InputError where OpenVINO is asked for and is not there, or not for this run.
    """
    if args.engine == "auto" and opt:
        return opt.get("engine", "torch")                                       # older runs had no other
    frozen = args.freeze_image_encoder or text_encoder_of(plain(args)) not in ("lstm", "service")
    if args.engine == "torch" or (args.engine == "auto" and not (frozen and device == "cpu" and engine.is_there())):
        return "torch"
    if not frozen:
        raise InputError("--engine openvino computes encoders that do not learn: add --freeze_image_encoder True or "
                         "--text_encoder hf:NAME, or drop --engine")
    if device != "cpu":
        raise InputError("--engine openvino is for a CPU: drop it, or pass --device cpu")
    try:
        if args.precision != "bf16" or not args.freeze_image_encoder or engine.has_bf16():
            return engine.NAME
    except engine.Refused as error:
        raise InputError(f"--engine openvino: {error}, or drop --engine") from None
    if args.engine == "auto":
        log.warning("note: this processor has no bfloat16, so with --precision bf16 torch computes what is frozen, in "
                    "place of OpenVINO; --precision fp32 is faster here")
        return "torch"
    raise InputError("--engine openvino --precision bf16: this processor has no bfloat16; pass --precision fp32")
