"""What BASIC depends on beside its towers, of files or of a checkpoint."""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from img_text_composition_models import MODELS
from machine import tensor_files
from machine.errors import InputError
from machine.text_files import read_lines
from training import checkpoint
from zero_shot.basic import GIVEN, MEAN, PICTURES, TEXTS

SYNTHETIC = {PICTURES: "image_features", TEXTS: "text_features"}                # the original's names for them


def texts_and_vectors(args: argparse.Namespace, source: str | Path,
                      state: dict | None) -> tuple[list[list[str]], dict[str, Tensor]]:
    """What BASIC depends on beside its towers, of files, or the checkpoint's: two lists of texts, and what is given of
    what else is estimated."""
    files = {name: getattr(args, name) for name in ("subjects", "styles", "pictures_mean", "synthetic")}
    if checkpoint.lacks_towers(state, MODELS[args.model]):
        texts = [Path(files[name]) for name in ("subjects", "styles") if files[name]]
        return ([list(dict.fromkeys(line.strip() for _, line in read_lines(file))) for file in texts],
                read_given(args.pictures_mean, args.synthetic))
    if told := [f"--{name}" for name, file in files.items() if file]:
        raise InputError(f"{source} has what {', '.join(told)} would give, of the files that it was made with: leave "
                         "them out, or make another with --image_encoder in place of --model_checkpoint")
    weights = state["model_state_dict"]
    return state.get("recipe", {}).get("corpora", []), {name: weights[name] for name in GIVEN if name in weights}


def read_given(mean: str | Path, synthetic: str | Path) -> dict[str, Tensor]:
    """What two files hold of GIVEN, by name, (M, e) float32 each; '' for none.

    mean: of one tensor, or array. synthetic: of two, by the names of SYNTHETIC. Raises InputError for any other.
    """
    found = {}
    if mean:
        held = list(arrays(mean).values())
        if len(held) != 1 or held[0].dim() > 2 or held[0].numel() != held[0].shape[-1]:
            raise InputError(f"{mean} holds not one vector, the mean of pictures' unit vectors")
        found[MEAN] = held[0].reshape(1, -1)
    if synthetic:
        held = arrays(synthetic)
        if not all(name in held and held[name].dim() == 2 and len(held[name]) for name in SYNTHETIC.values()):
            raise InputError(f"{synthetic} holds not {' and '.join(SYNTHETIC.values())}, a row each of made-up "
                             "pictures and texts")
        found |= {ours: held[theirs] for ours, theirs in SYNTHETIC.items()}
    if wrong := next((name for name, rows in found.items() if not rows.isfinite().all()), None):
        raise InputError(f"{mean if wrong == MEAN else synthetic} holds numbers that are not finite")
    return {name: rows if name == MEAN else F.normalize(rows, dim=1) for name, rows in found.items()}


def arrays(path: str | Path) -> dict[str, Tensor]:
    """The arrays of numbers in a file by name, one without a name as '': torch's, .safetensors, .npy or .npz. Raises
    InputError for what is none."""
    try:
        if Path(path).suffix in (".npy", ".npz"):
            read = np.load(path, allow_pickle=False)
            content = dict(read) if Path(path).suffix == ".npz" else {"": read}
            content = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in content.items()}
        else:
            content = tensor_files.read(path)
    except FileNotFoundError:
        raise InputError(f"there is no file {path} of arrays; give one that is there") from None
    except (OSError, ValueError, TypeError) as error:                           # Unreadable is a ValueError
        why = str(error).split("\n")[0]
        raise InputError(f"{path} holds no arrays that can be read ({why}); docs/zero-shot.md says how a pickled file "
                         "of the original becomes one") from None
    content = {"": content} if isinstance(content, Tensor) else content
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise InputError(f"{path} holds other things than arrays of numbers")
    return {name: value.float() for name, value in content.items()}
