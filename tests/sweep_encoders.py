"""Every image encoder by name, on the meta device, in minutes: python -m tests.sweep_encoders [LIBRARY ...] [WORD ...]

Of each, what a user would meet: its width is that of the vector it makes; its size and statistics are its library's;
its own whole state_dict goes into it, the last layer left out; so it does at another size, or that is refused in one
line. A name may be refused, in one line; a traceback is wrong, and so is what differs. A test takes some of each.
"""

import functools
import sys
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import open_clip
import timm
import torch
import torchvision
from torch import nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

import image_encoders
from image_encoders import ENCODERS, LEAST_TEXT, Sketched, image_encoder, load_image_weights, quiet, traits
from machine.errors import InputError

NAMES = {"torchvision": ENCODERS, "timm": [f"timm:{name}" for name in timm.list_models()],
         "open_clip": [f"open_clip:{name}" for name in open_clip.list_models()]}
OTHER_SIZES = 32, -32                   # beside its own: the first that it takes


class Unfilled(TorchFunctionMode):
    """What fills a weight is left out on the meta device, where it does nothing, and was half the time."""

    FILLS = frozenset("normal_ uniform_ erfinv_ clamp_ mul_ add_ fill_ zero_".split())

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        filled = args[0] if args else kwargs.get("tensor")                      # as torch.nn.init passes it
        if getattr(function, "__name__", "") in self.FILLS and filled is not None and filled.is_meta:
            return filled
        return function(*args, **kwargs)


def own(name: str) -> tuple[nn.Module, int, tuple, tuple]:
    """The library's own model, with all that it has, and the size, mean and deviation it says."""
    kind, _, model = name.rpartition(":")
    if kind == "timm":
        made = timm.create_model(model)
        wants = timm.data.resolve_data_config({}, model=made)
        return made, wants["input_size"][-1], wants["mean"], wants["std"]
    if kind == "open_clip":
        made = open_clip.create_model(model, load_weights=False, device="meta", text_cfg=dict(LEAST_TEXT)).visual
        size, wants = made.image_size, made.preprocess_cfg
        return made, size if isinstance(size, int) else size[-1], wants["mean"], wants["std"]
    made = torchvision.models.get_model(model, weights=None)
    of = torchvision.models.get_model_weights(model)
    wants = of["IMAGENET1K_V1" if "IMAGENET1K_V1" in of.__members__ else "IMAGENET1K_SWAG_LINEAR_V1"].transforms()
    return made, wants.crop_size[0], wants.mean, wants.std


def sketched(name: str):
    return Sketched() if name.startswith("regnet_") else torch.device("meta")


def judge(name: str) -> str:
    """'right', 'refused: ...' or 'WRONG: ...'."""
    try:
        known = traits(name)
        with sketched(name):
            encoder = image_encoder(name, 8, known.size)
    except InputError as error:
        return f"refused: {error}"
    with sketched(name), quiet():
        theirs, size, mean, std = own(name)
    if (known.size, known.mean, known.std) != (size, tuple(mean), tuple(std)):
        return f"WRONG: size and statistics {known}, its library's {size} {mean} {std}"
    state = theirs.state_dict()
    if complaint := taken(encoder, state, name):
        return f"WRONG: its own state_dict: {complaint}"
    for step in OTHER_SIZES:
        try:
            with sketched(name):
                other = image_encoder(name, 8, known.size + step)
        except InputError as error:
            if "\n" in str(error):
                return f"WRONG: two lines: {error}"
        else:
            complaint = taken(other, state, name)
            return f"right, {known.size + step} pixels {'refused' if complaint else 'taken'}"
    return "right, at its own size alone"


def taken(encoder: nn.Module, state: dict, name: str) -> str | None:
    """Load the state as if a file held it; what is said against it."""
    try:
        with patch.object(image_encoders, "read_weights", lambda _: dict(state)), sketched(name):
            load_image_weights(encoder, "its own", name)
    except InputError as error:
        return str(error)


def main() -> int:
    words = sys.argv[1:]
    names = [name for library, of in NAMES.items() if not {*NAMES} & {*words} or library in words for name in of
             if not (some := [word for word in words if word not in NAMES]) or any(word in name for word in some)]
    results = Counter()
    image_encoders.traits = functools.cache(traits)                             # asked for many times of each
    image_encoders.Timm.sized = functools.cache(image_encoders.Timm.sized)
    for name in tqdm(names):
        try:
            with Unfilled():
                said = judge(name)
        except Exception as error:
            said = f"TRACEBACK: {error!r:.300}"
        results[said.partition(":")[0].partition(",")[0]] += 1
        if not said.startswith("right"):
            tqdm.write(f"{name} {said}")
    print(dict(results))
    return int(bool(results["WRONG"] + results["TRACEBACK"]))


if __name__ == "__main__":
    assert Path("main.py").exists(), "run it in the repository's root"
    sys.exit(main())
