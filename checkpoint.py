"""Checkpoints: written whole or not at all, read without running code, turned back into a model without any flag, or
into the very run that wrote them.

A file holds the original's keys (`it`, `opt`, `model_state_dict`) and ours; `opt` is the flags by name.
"""

import argparse
import glob
import io
import logging
import os
import shutil
import time
import warnings
from dataclasses import fields, replace
from pathlib import Path

import torch

from image_encoders import encoder_head
from img_text_composition_models import MODELS, ImgTextCompositionBase, Recipe, SentenceVectors
from machine import distributed
from machine.errors import InputError
from text_encoders import text_encoder_of
from text_model import SimpleVocab

log = logging.getLogger(__name__)

LATEST, BEST = "latest_checkpoint.pth", "best_checkpoint.pth"
PROGRESS = ["best", "samples", "steps", "sums", "tested"]
# A run goes on only with the values of these that it was started with: others would give other results.
FIXED_FLAGS = ("dataset", "category_to_train", "use_complete_text_query", "skip_bad_images", "image_size", "model",
               "image_encoder", "image_embed_dim", "text_embed_dim", "use_bert", "loss", "batch_size", "learning_rate",
               "learning_rate_decay_frequency", "weight_decay", "seed", "precision", "compile", "accumulate", "gather",
               "sync_bn", "text_encoder", "freeze_image_encoder", "optimizer", "schedule", "warmup")
# What older checkpoints' runs did.
BEFORE_THEIR_FLAGS = {"precision": "fp32", "compile": False, "image_encoder": "resnet18", "accumulate": 1,
                      "gather": True, "sync_bn": False, "freeze_image_encoder": False, "optimizer": "sgd",
                      "schedule": "step", "warmup": 0}


def save(folder: Path, model: ImgTextCompositionBase, optimizer: torch.optim.Optimizer, it: int, flags: dict,
         progress: dict, best: bool = False) -> None:
    """Write LATEST, and as BEST too: each beside it, then renamed, so that it is the previous checkpoint or this one.

    progress: what else the run needs to go on, of plain types and tensors. Raises FloatingPointError where a weight
    is not finite, InputError where the file cannot be written.
    """
    state = {"it": it, "opt": flags, "model_state_dict": model.state_dict(), "progress": progress,
             "optimizer_state_dict": optimizer.state_dict(), "recipe": model.recipe.plain(),
             "example_texts": list(model.example_texts), "launch": distributed.launch(),
             "random": random_states(model.a.device)}
    for name, value in state["model_state_dict"].items():
        if value.is_floating_point() and not value.isfinite().all():
            raise FloatingPointError(f"the weight {name} is not finite at iteration {it}, so nothing was saved; go on "
                                     "from the checkpoint before with a lower --learning_rate")
    if model.sentence_vectors is not None:
        state["sentences"] = model.sentence_vectors.features
    content = io.BytesIO()                                                      # torch hides why it cannot write a file
    torch.save(state, content)
    unfinished, link = folder / f"{LATEST}.unfinished", folder / f"{BEST}.unfinished"
    try:
        with open(unfinished, "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        if best:                                                                # first: LATEST tells of the best so far
            link.unlink(missing_ok=True)
            try:
                os.link(unfinished, link)
            except OSError:                                                     # a file system without links
                shutil.copyfile(unfinished, link)
            os.replace(link, folder / BEST)
        os.replace(unfinished, folder / LATEST)
    except OSError as error:
        for path in (unfinished, link):
            path.unlink(missing_ok=True)
        raise InputError(f"cannot write a checkpoint to {folder} ({error.strerror or error}); the one written before, "
                         "if any, is whole: make room, then pass --resume auto") from None


def random_states(device: torch.device) -> dict:
    """Where torch's sequences of random numbers stand, on the CPU and on the device."""
    of_gpu = [torch.cuda.get_rng_state()] if device.type == "cuda" else []
    return {"cpu": torch.get_rng_state(), "cuda": of_gpu}


class Schedule:
    """When to save: every so many iterations ('500') or minutes ('10m')."""

    def __init__(self, frequency: str):
        self.minutes, self.every, self.last = frequency.endswith("m"), float(frequency.rstrip("m")), time.monotonic()

    def due(self, it: int) -> bool:
        if not self.minutes:
            return it % self.every == 0
        if time.monotonic() - self.last < 60 * self.every:
            return False
        self.last = time.monotonic()
        return True


def find_run(resume: str, log_dir: Path, comment: str, launch: str | None = None) -> Path | None:
    """The checkpoint to go on from: that of a path to it or its folder, or with 'auto' the newest run's with the
    same comment, None where there is none. launch: that runs must have, if given."""
    if resume != "auto":
        return Path(resume) / LATEST if Path(resume).is_dir() else Path(resume)
    found = sorted(Path(log_dir).glob(f"*{glob.escape(comment)}*/{LATEST}"), key=os.path.getmtime, reverse=True)
    for path in found:
        state = load(path)
        if state["opt"].get("comment") == comment and launch in (None, state.get("launch")):
            return path
    return None


def find_start(resume: str, other: str, log_dir: Path, comment: str, restartable: bool) -> tuple:
    """The checkpoint of the run to go on with, if there is one; the one to start from, which may be another run's; its
    content.

    other: a checkpoint to start from where no run goes on. restartable: whether a job that torchrun started again goes
    on with what it had begun.
    """
    launch = None
    if distributed.restarted() and restartable and not resume:                  # what this launch itself has begun
        resume, launch = "auto", distributed.launch()
    resumed = find_run(resume, log_dir, comment, launch) if resume else None
    source = resumed or other
    return resumed, source, load(source) if source else None


def check_flags(flags: dict, source: str | Path, opt: dict) -> None:
    """A model needs the text encoder it was trained with; what else differs may be meant, but is said."""
    if "use_bert" in opt and (text_encoder_of(opt) == "lstm") != (flags["text_encoder"] == "lstm"):
        name = text_encoder_of(opt)
        how = f"--text_encoder {name}" if ":" in name else f"--use_bert {opt['use_bert']}"
        raise InputError(f"the checkpoint {source} was trained with {how}; pass the same")
    for name in ("dataset", "category_to_train", "use_complete_text_query", "image_size", "freeze_image_encoder"):
        if name in opt and opt[name] != flags[name]:
            log.warning("note: the checkpoint was trained with --%s %s, this run has %s", name, opt[name], flags[name])


def check_same_run(state: dict, path: Path, flags: dict, samples: int, features: dict | None) -> None:
    """Raise InputError unless a run with these flags, training samples and sentence vectors would be the same one."""
    encoder = {"text_encoder": text_encoder_of(state["opt"])}
    theirs, progress = {**BEFORE_THEIR_FLAGS, **encoder, **state["opt"]}, state.get("progress")
    if not progress:
        raise InputError(f"{path} does not say how its run was to go on; start a new one with --model_checkpoint")
    differing = [f"--{name} {theirs.get(name)} (now {flags[name]})" for name in FIXED_FLAGS
                 if theirs.get(name) != flags[name]]
    if progress["samples"] != samples:
        differing.append(f"{progress['samples']} training samples (now {samples})")
    if state.get("sentences") != features:
        differing.append(f"the sentence vectors of {state.get('sentences')} (now {features})")
    if differing:
        raise InputError(f"the run of {path} had {', '.join(differing)}; give it the same, or start a new one from it "
                         "with --model_checkpoint")


def resume(state: dict, optimizer: torch.optim.Optimizer, device: torch.device) -> dict:
    """Put back rates, momenta and random numbers, as after the iteration of the checkpoint. Returns its progress."""
    try:
        optimizer.load_state_dict(state["optimizer_state_dict"])
        torch.set_rng_state(state["random"]["cpu"])
        if device.type == "cuda" and state["random"]["cuda"]:
            torch.cuda.set_rng_state(state["random"]["cuda"][0])
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise InputError(f"the checkpoint's run cannot go on: its optimizer or random numbers do not fit ({error!r}); "
                         "start a new one with --model_checkpoint") from None
    return state["progress"]


def load(path: str | Path) -> dict:
    """The checkpoint's content on the CPU, `opt` as a dict. Raises InputError for anything that is not one.

    Only tensors and plain types are unpickled, and the argparse.Namespace of the original's checkpoints.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings(action="ignore"):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"checkpoint not found at {path}; check --model_checkpoint") from None
    except Exception as error:                                                  # torch.load raises a dozen types
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{path} is not a readable checkpoint ({reason}); name a latest_checkpoint.pth") from None
    if not isinstance(state, dict) or not isinstance(state.get("model_state_dict"), dict):
        raise InputError(f"{path} is not a checkpoint of this program: it has no model_state_dict")
    opt = state.get("opt", {})
    state = {"it": 0, **state, "opt": vars(opt) if isinstance(opt, argparse.Namespace) else opt}
    made_of = state.get("recipe", {})
    words = made_of.get("words", {}) if isinstance(made_of, dict) else None
    words = state.get("word2id", words)                                         # where older ones held it
    well_formed = (isinstance(state["it"], int) and isinstance(state["opt"], dict) and isinstance(words, dict)
                   and ("recipe" not in state or {field.name for field in fields(Recipe)} == made_of.keys())
                   and isinstance(state.get("sentences", {}), dict)
                   and isinstance(state.get("example_texts", []), list)
                   and all(isinstance(text, str) for text in state.get("example_texts", []))
                   and (not state.get("progress") or sorted(state["progress"]) == PROGRESS)
                   and all(isinstance(word, str) for word in words)
                   and sorted(map(str, words.values())) == sorted(map(str, range(len(words))))
                   and all(isinstance(value, torch.Tensor) for value in state["model_state_dict"].values()))
    if not well_formed:
        raise InputError(f"{path} is not a checkpoint of this program: what it holds is of the wrong kind")
    return state


def restore(model: ImgTextCompositionBase, state: dict, path: str | Path) -> None:
    """Put a checkpoint's weights into `model`, every one of them. Raises InputError where name or shape differs."""
    ours, theirs = model.state_dict(), state["model_state_dict"]
    differs = [name for name in sorted(ours.keys() | theirs.keys())
               if getattr(ours.get(name), "shape", None) != getattr(theirs.get(name), "shape", None)]
    if differs:
        name = differs[0]
        held, wanted = (f"{tuple(tensors[name].shape)}" if name in tensors else "none" for tensors in (theirs, ours))
        raise InputError(f"the checkpoint {path} (--model {state['opt'].get('model', 'unknown')}) does not fit this "
                         f"run: {len(differs)} weights differ, first {name}: {held} there, {wanted} here; use the "
                         "flags and the dataset it was trained with")
    model.load_state_dict(theirs)


def image_size(state: dict | None) -> int | None:
    """In pixels, of the images a checkpoint was trained with."""
    return state["opt"].get("image_size") if state else None


def text_dim(state: dict) -> int | None:
    """The size of the text features a checkpoint was trained with."""
    bias = state["model_state_dict"].get("text_model.fc_output.1.bias")
    return None if bias is None else bias.numel()


def vocabulary(state: dict, lstm_used: bool = True) -> SimpleVocab | None:
    """The vocabulary the checkpoint was trained with; None for the original's, which hold none.

    Where sentence vectors are used in place of the LSTM, any vocabulary of its size will do.
    """
    if words := state.get("recipe", {}).get("words") or state.get("word2id"):
        return SimpleVocab(words)
    embedding = state["model_state_dict"].get("text_model.embedding_layer.weight")
    if lstm_used or embedding is None:
        return None
    return SimpleVocab({f"word {i}": i for i in range(embedding.shape[0] if embedding.ndim else 1)})


def recipe(state: dict, path: str | Path) -> Recipe:
    """What a checkpoint's model is made of; of one older than the record, what its flags and weights say.

    Raises InputError where it does not say, or says what no model is.
    """
    if "recipe" in state:
        found = Recipe(**state["recipe"])
    else:
        opt, words = {"image_encoder": "resnet18", "image_size": 224, **state["opt"]}, vocabulary(state)
        if words is None or opt.get("model") not in MODELS:
            raise InputError(f"{path} does not say its vocabulary and model: it was not written by this program")
        found = Recipe(opt["model"], opt["image_encoder"], opt["image_size"], 0,
                       text_encoder_of(opt), 0, words.word2id)
    if (found.composer not in MODELS or not isinstance(found.image_encoder, str)
            or not isinstance(found.image_size, int)):
        raise InputError(f"{path} is not a checkpoint of this program: its model is {found.composer!r}, its image "
                         f"encoder {found.image_encoder!r}, for images of {found.image_size!r} pixels")
    try:
        head, _ = encoder_head(found.image_encoder)
    except InputError as error:
        raise InputError(f"the model of {path} cannot be built here: {error}") from None
    biases = [state["model_state_dict"].get(name) for name in
              (f"img_model.{head}.0.bias", "text_model.fc_output.1.bias")]
    if any(bias is None or bias.ndim != 1 for bias in biases):
        raise InputError(f"{path} is not a checkpoint of this program: it holds no image or no text encoder")
    image_dim, text_dim = map(len, biases)
    return replace(found, image_dim=image_dim, text_dim=text_dim)


def rebuild_model(path: str | Path, sentence_vectors: SentenceVectors | None = None) -> ImgTextCompositionBase:
    """The model of a checkpoint of ours, in eval mode, from the file alone."""
    return rebuild(load(path), path, sentence_vectors)


def rebuild(state: dict, path: str | Path, sentence_vectors: SentenceVectors | None = None) -> ImgTextCompositionBase:
    """The same of a checkpoint's content; `path` is for what is said about it."""
    made_of = recipe(state, path)
    if made_of.text_encoder != "lstm" and sentence_vectors is None:
        raise InputError(f"{path} was trained with --text_encoder {made_of.text_encoder}: it needs its vectors")
    model = made_of.build(sentence_vectors)
    restore(model, state, path)
    return model.eval()
