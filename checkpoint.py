"""Checkpoints: written whole or not at all, read without running code, turned back into a model without any flag.

A file holds the original's keys (`it`, `opt`, `model_state_dict`) and ours; `opt` is the flags by name.
"""

import argparse
import os
import warnings
from pathlib import Path

import torch

from errors import InputError
from img_text_composition_models import MODELS, ImgTextCompositionBase, SentenceVectors
from text_model import SimpleVocab


def save(path: Path, model: ImgTextCompositionBase, optimizer: torch.optim.Optimizer, it: int, flags: dict) -> None:
    """Write to a file beside `path`, then rename: a crash leaves the previous checkpoint."""
    state = {"it": it, "opt": flags, "model_state_dict": model.state_dict(),
             "optimizer_state_dict": optimizer.state_dict(), "word2id": model.text_model.vocabulary.word2id}
    if model.sentence_vectors is not None:
        state["sentences"] = model.sentence_vectors.features
    unfinished = path.with_name(path.name + ".unfinished")
    with open(unfinished, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


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
    words = state.get("word2id", {})
    well_formed = (isinstance(state["it"], int) and isinstance(state["opt"], dict) and isinstance(words, dict)
                   and isinstance(state.get("sentences", {}), dict)
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


def vocabulary(state: dict, lstm_used: bool = True) -> SimpleVocab | None:
    """The vocabulary the checkpoint was trained with; None for the original's, which hold none.

    Where sentence vectors are used in place of the LSTM, any vocabulary of its size will do.
    """
    if "word2id" in state:
        return SimpleVocab(state["word2id"])
    embedding = state["model_state_dict"].get("text_model.embedding_layer.weight")
    if lstm_used or embedding is None:
        return None
    return SimpleVocab({f"word {i}": i for i in range(len(embedding))})


def text_dim(state: dict) -> int | None:
    """The size of the text features a checkpoint was trained with."""
    bias = state["model_state_dict"].get("text_model.fc_output.1.bias")
    return None if bias is None else len(bias)


def rebuild_model(path: str | Path, sentence_vectors: SentenceVectors | None = None) -> ImgTextCompositionBase:
    """The model of a checkpoint of ours, in eval mode, from the file alone."""
    state = load(path)
    words = vocabulary(state)
    if state["opt"].get("use_bert") and sentence_vectors is None:
        raise InputError(f"{path} was trained with --use_bert: it needs a sentence service's vectors")
    if words is None or state["opt"].get("model") not in MODELS:
        raise InputError(f"{path} does not say its vocabulary and model: it was not written by this program")
    image_dim, text_dim = (int(state["model_state_dict"][name].shape[0])
                           for name in ("img_model.fc.0.bias", "text_model.fc_output.1.bias"))
    model = MODELS[state["opt"]["model"]](words, image_dim, text_dim, sentence_vectors=sentence_vectors)
    restore(model, state, path)
    return model.eval()
