"""Checkpoints: written whole or not at all, read without running code, turned back into a model without any flag, or
into the very run that wrote them.

A file holds the original's keys (`it`, `opt`, `model_state_dict`) and ours; `opt` is the flags by name.
"""

import argparse
import logging
import os
import shutil
import time
from dataclasses import MISSING, fields, replace
from functools import cache, partial
from pathlib import Path

import torch

from benchmarks.mining import Mining
from image_encoders import FEATURES, encoder_head
from img_text_composition_models import MODELS, ImgTextCompositionBase, Recipe, SentenceVectors
from machine import distributed, model_folder, tensor_files
from machine.device import random_numbers
from machine.errors import InputError
from machine.folder_lock import unfinished, write_whole
from machine.tensor_files import packed
from text_encoders import text_encoder_of
from text_model import SimpleVocab

log = logging.getLogger(__name__)

LATEST, BEST = "latest_checkpoint.pth", "best_checkpoint.pth"
PROGRESS, PROGRESS_SINCE = {"best", "samples", "steps", "sums", "tested"}, {"turn", "data"}  # older ones lack these
RECIPE = {field.name for field in fields(Recipe)}
RECIPE_SINCE = {field.name for field in fields(Recipe)
                if field.default is not MISSING or field.default_factory is not MISSING}
# What a test depends on: a checkpoint's are taken where none is given.
TESTED_FLAGS = ("dataset", "category_to_train", "use_complete_text_query", "validation", "keep_source", "any_suffix",
                "shared_concept", "caption_form", "skip_bad_images", "image_size", "model", "image_encoder",
                "image_embed_dim", "text_embed_dim", "use_bert", "text_encoder", "freeze_image_encoder", "precision",
                "image_features", "learn_words", "prompt", "expansion", "contexts", "attributes", "same", "product",
                "same_product", "span", "two_changes", "templates")
# Not a service's host: a stranger's checkpoint would be told every text.
WHERE_TEXTS_ARE_READ = ("image_weights", "pooling_layer", "max_seq_len", "bert_port", "bert_port_out", "bert_timeout")
# A run goes on only with the values of these that it was started with: others would give other results.
FIXED_FLAGS = (*TESTED_FLAGS, "loss", "batch_size", "learning_rate", "learning_rate_decay_frequency", "weight_decay",
               "seed", "compile", "accumulate", "gather", "sync_bn", "optimizer", "schedule", "warmup",
               "feature_dropout", "written", "engine")
# What older checkpoints' runs did.
BEFORE_THEIR_FLAGS = {"precision": "fp32", "compile": False, "image_encoder": "resnet18", "accumulate": 1,
                      "gather": True, "sync_bn": False, "freeze_image_encoder": False, "optimizer": "sgd",
                      "schedule": "step", "warmup": 0, "validation": 0.0, "keep_source": False, "any_suffix": False,
                      "shared_concept": False, "image_features": "last", "learn_words": False, "feature_dropout": 0.0,
                      "prompt": "auto", "expansion": 25, "contexts": 100, "caption_form": "published",
                      "engine": "torch", **Mining()._asdict()}


def save(folder: Path, model: ImgTextCompositionBase, optimizer: torch.optim.Optimizer, it: int, flags: dict,
         progress: dict, best: bool = False, results: dict | None = None) -> None:
    """Write LATEST, and as BEST too: each beside it, then renamed, so that it is the previous checkpoint or this one.

    progress: what else the run needs to go on, of plain types and tensors. results: {split: {metric: value}} of this
    model's test, if there was one. Raises FloatingPointError where a weight or a momentum is not finite, InputError
    where the file cannot be written.
    """
    state = {**content_for_tests(model, it, flags, results or {}), "progress": progress,
             "optimizer_state_dict": optimizer.state_dict(), "launch": distributed.launch(),
             "random": random_states(model.a.device)}
    weights = {f"weight {name}": value for name, value in state["model_state_dict"].items()}
    if wrong := not_finite({**weights, **momenta(state["optimizer_state_dict"])}):
        raise FloatingPointError(f"the {wrong} is not finite at iteration {it}, so nothing was saved; go on from the "
                                 "checkpoint before with a lower --learning_rate")
    try:                                                                        # BEST first: LATEST tells of it
        write_whole(folder / LATEST, packed(state), partial(keep, folder / BEST) if best else None)
    except OSError as error:
        raise InputError(f"cannot write a checkpoint to {folder} ({error.strerror or error}); the one written before, "
                         "if any, is whole: make room, then pass --resume auto") from None


def content_for_tests(model: ImgTextCompositionBase, it: int, flags: dict, results: dict) -> dict:
    """What a checkpoint of it holds, but for what only training needs."""
    sentences = {} if model.sentence_vectors is None else {"sentences": model.sentence_vectors.features}
    return {"it": it, "opt": flags, "model_state_dict": model.state_dict(), "recipe": model.recipe.plain(),
            "example_texts": list(model.example_texts), "results": results, **sentences}


def save_untrained(folder: Path, model: ImgTextCompositionBase, flags: dict, results: dict) -> Path:
    """Write BEST of a model that was never trained here, for search.py. Raises InputError where it cannot be."""
    try:
        write_whole(folder / BEST, packed(content_for_tests(model, 0, flags, results)))
    except OSError as error:
        raise InputError(f"cannot write a checkpoint to {folder} ({error.strerror or error}); make room") from None
    return folder / BEST


def keep(path: Path, written: Path) -> None:
    """Have `path` be what was written, too."""
    beside = unfinished(path)
    beside.unlink(missing_ok=True)
    try:
        try:
            os.link(written, beside)
        except OSError:                                                         # a file system without links
            shutil.copyfile(written, beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def momenta(optimizer_state: dict) -> dict[str, torch.Tensor]:
    """What an optimizer keeps of each weight, by a name for people."""
    return {f"{name} of weight {number}": value for number, kept in optimizer_state["state"].items()
            for name, value in kept.items() if isinstance(value, torch.Tensor)}


def not_finite(tensors: dict[str, torch.Tensor]) -> str | None:
    """The name of the first that holds a number that is not finite."""
    return next((name for name, value in tensors.items() if value.is_floating_point() and not value.isfinite().all()),
                None)


def random_states(device: torch.device) -> dict:
    """Where torch's sequences of random numbers stand, on the CPU and on the device."""
    of_gpu = {} if device.type == "cpu" else {device.type: [random_numbers(device).get_rng_state()]}
    return {"cpu": torch.get_rng_state(), **of_gpu}


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


def check_flags(flags: dict, source: str | Path, opt: dict) -> None:
    """A model needs the text encoder it was trained with; what else differs may be meant, but is said."""
    if "use_bert" in opt and (text_encoder_of(opt) == "lstm") != (flags["text_encoder"] == "lstm"):
        name = text_encoder_of(opt)
        how = f"--text_encoder {name}" if ":" in name else f"--use_bert {opt['use_bert']}"
        raise InputError(f"the checkpoint {source} was trained with {how}; pass the same")
    for name in TESTED_FLAGS if flags["test_only"] else ("dataset", "category_to_train", "use_complete_text_query",
                                                         "image_size", "freeze_image_encoder"):
        if name in opt and opt[name] != flags[name]:
            log.warning("note: the checkpoint was trained with --%s %s, this run has %s", name, opt[name], flags[name])


def flags_to_test(opt: dict) -> list[str]:
    """What main.py was told of all that a test depends on, when it wrote a checkpoint: ["--dataset=mitstates", ...]."""
    told = {name: opt.get(name) for name in TESTED_FLAGS + WHERE_TEXTS_ARE_READ}
    return [f"--{name}={value}" for name, value in told.items() if isinstance(value, bool | int | float | str)]


def check_same_run(state: dict, path: Path, flags: dict, samples: int, features: dict | None,
                   data: dict[str, str] | None = None) -> None:
    """Raise InputError unless a run with these flags, training samples, sentence vectors and data would be the same.

    data: {what: its digest}, where it is to be compared.
    """
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
    if data and "data" not in progress:
        log.warning("note: %s is of an older version and does not say which images and texts its run had: whether they "
                    "are the same now was not checked", path)
    elif data and not differing:                                                # else they differ as the flags do
        differing += [f"other {what}" for what, digest in data.items() if progress["data"].get(what) != digest]
    if differing:
        raise InputError(f"the run of {path} had {', '.join(differing)}; give it the same, or start a new one from it "
                         "with --model_checkpoint")


def resume(state: dict, optimizer: torch.optim.Optimizer, device: torch.device) -> dict:
    """Put back rates, momenta and random numbers, as after the iteration of the checkpoint. Returns its progress, and
    as its `rate` that of the first weights' next step."""
    try:
        if wrong := not_finite(momenta(state["optimizer_state_dict"])):
            raise InputError(f"the checkpoint's {wrong} is not finite, so that its run cannot go on at any "
                             "--learning_rate; start a new one from its weights with --model_checkpoint, or go on from "
                             "the run's best_checkpoint.pth")
        optimizer.load_state_dict(state["optimizer_state_dict"])
        torch.set_rng_state(state["random"]["cpu"])
        if device.type != "cpu" and (of_gpu := state["random"].get(device.type)):
            random_numbers(device).set_rng_state(of_gpu[0])
        return {**state["progress"], "rate": float(optimizer.param_groups[0]["lr"])}
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise InputError(f"the checkpoint's run cannot go on: its optimizer or random numbers do not fit ({error!r}); "
                         "start a new one with --model_checkpoint") from None


def content_of(path: str | Path, glance: bool = False):
    """What is in a checkpoint, or in a folder of `search.py export`. Raises as `tensor_files.read` does, or InputError.
    """
    return (model_folder if Path(path).is_dir() else tensor_files).read(path, glance)


def load(path: str | Path) -> dict:
    """The content of a checkpoint or of a folder of `search.py export`, on the CPU, `opt` as a dict, its weights under
    `model_state_dict`. Raises InputError for anything that is not one, or not as it was written.

    Only tensors, plain types and numbers are unpickled, and the argparse.Namespace of the original's checkpoints.
    """
    try:
        sealed = Path(path).is_dir() or tensor_files.is_whole(path)
        content = content_of(path)
        weights = tensor_files.weights(content)
    except FileNotFoundError:
        raise InputError(f"checkpoint not found at {path}; check --model_checkpoint") from None
    except (tensor_files.Unreadable, OSError) as error:
        raise InputError(f"{path} is not a readable checkpoint ({error}); name a latest_checkpoint.pth, or a folder "
                         "that search.py export wrote") from None
    if weights is None:
        raise InputError(f"{path} is not a checkpoint of this program: it has no model_state_dict of tensors")
    if not sealed:
        say_once(f"note: {path} has no checksum, so whether it is as it was written was not checked")
    wrapped = any(isinstance(content.get(name), dict) for name in tensor_files.WRAPPERS)
    of_phi = next((name for name in tensor_files.OF_PHI if name in content), None)
    state = content if wrapped and not of_phi else {}                           # else it is the weights alone
    opt = state.get("opt", {})
    state = {"it": 0, "progress": None, **state, "model_state_dict": weights,
             "opt": vars(opt) if isinstance(opt, argparse.Namespace) else opt}
    if not well_formed(state):
        raise InputError(f"{path} is not a checkpoint of this program: what it holds is of the wrong kind")
    return state


@cache
def say_once(note: str) -> None:
    log.warning("%s", note)


def well_formed(state: dict) -> bool:
    """Whether what a checkpoint holds beside its weights is of the right kinds."""
    made_of, progress = state.get("recipe", {}), state["progress"] or {}
    words = made_of.get("words", {}) if isinstance(made_of, dict) else None
    words = state.get("word2id", words)                                         # where older ones held it
    return (isinstance(state["it"], int) and isinstance(state["opt"], dict) and isinstance(words, dict)
            and ("recipe" not in state or RECIPE - RECIPE_SINCE <= made_of.keys() <= RECIPE)
            and isinstance(made_of.get("prompt", ""), str) and are_corpora(made_of.get("corpora", []))
            and all(isinstance(made_of.get(name, 0), int) and made_of.get(name, 0) >= 0 for name in (
                "expansion", "contexts"))
            and isinstance(made_of.get("given", {}), dict) and all(
                rows == len(state["model_state_dict"].get(name, ())) for name, rows in made_of.get("given", {}).items())
            and isinstance(state["opt"].get("text_encoder", ""), str)
            and isinstance(state.get("sentences", {}), dict) and are_results(state.get("results", {}))
            and isinstance(state.get("example_texts", []), list)
            and all(isinstance(text, str) for text in state.get("example_texts", []))
            and isinstance(progress, dict) and (not progress or progress.keys() - PROGRESS_SINCE == PROGRESS)
            and isinstance(progress.get("turn", 0), int) and isinstance(progress.get("data", {}), dict)
            and all(isinstance(word, str) for word in words)
            and sorted(map(str, words.values())) == sorted(map(str, range(len(words)))))


def are_corpora(found) -> bool:
    """Whether it is lists of texts."""
    return isinstance(found, list) and all(
        isinstance(texts, list) and all(isinstance(text, str) for text in texts) for texts in found)


def are_results(found) -> bool:
    """Whether it is {split: {metric: value}}."""
    return isinstance(found, dict) and all(
        isinstance(values, dict) and all(isinstance(name, str) for name in [split, *values])
        and all(isinstance(value, int | float) for value in values.values()) for split, values in found.items())


def restore(model: ImgTextCompositionBase, state: dict, path: str | Path) -> None:
    """Put a checkpoint's weights into `model`, every one of them. Raises InputError where name or shape differs."""
    ours = model.state_dict()
    theirs = tensor_files.counted(state["model_state_dict"], ours)
    if lacks_towers(state, model):                                              # which it was given before
        theirs = {**ours, **{f"phi.{name}": value for name, value in theirs.items()}}
    if differing := tensor_files.difference(theirs, ours):
        if lacks_towers(state, model):
            raise InputError(f"{path} holds no network that fits --model {model.recipe.composer} of these towers: "
                             f"{differing}; it is of another CLIP model, or of another composer")
        raise InputError(f"the checkpoint {path} (--model {state['opt'].get('model', 'unknown')}) does not fit this "
                         f"run: {differing}; use the flags and the dataset it was trained with")
    ours.update(theirs)                                                         # `ours` knows its version, too
    model.load_state_dict(ours)


def lacks_towers(state: dict | None, model: ImgTextCompositionBase) -> bool:
    """Whether a model starts from nothing, or from a published network alone, that makes pictures words."""
    return not state or (model.frozen and not any(name.startswith("img_model.") for name in state["model_state_dict"]))


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
    if (not isinstance(found.composer, str) or found.composer not in MODELS or not isinstance(found.image_encoder, str)
            or not isinstance(found.image_size, int) or not isinstance(found.image_features, str)
            or found.image_features not in FEATURES or not isinstance(found.learn_words, bool)):
        raise InputError(f"{path} is not a checkpoint of this program: its model is {found.composer!r}, its image "
                         f"encoder {found.image_encoder!r}, for images of {found.image_size!r} pixels")
    try:
        head, _ = encoder_head(found.image_encoder, found.image_features)
    except InputError as error:
        raise InputError(f"the model of {path} cannot be built here: {error}") from None
    if MODELS[found.composer].frozen:                                           # its sizes are its towers' own
        return found
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
    if not (made_of.text_encoder == "lstm" or MODELS[made_of.composer].frozen) and sentence_vectors is None:
        raise InputError(f"{path} was trained with --text_encoder {made_of.text_encoder}: it needs a sentence "
                         "service's or such an encoder's vectors")
    model = made_of.build(sentence_vectors)
    restore(model, state, path)
    return model.eval()
