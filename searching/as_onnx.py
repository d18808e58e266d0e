"""A model's parts as ONNX, for programs without torch: each is compared with torch as soon as it is written.

    image_encoder.onnx      pixels (B, 3, S, S) uint8, RGB, normalized within -> feature (B, D) float32
    composer.onnx           image (B, D), text (B, T) float32 features -> query (B, D) float32, unit rows
    words.onnx              words (B, L) int64 ids, 0 for none -> (B, T') float32: where a model learned words beside a
                            sentence encoder's vectors, the end of what composer.onnx takes as text
"""

import importlib
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from image_encoders import quiet
from img_text_composition_models import ImgTextCompositionBase
from machine.errors import InputError, first_line
from machine.streams import shown
from searching.as_networks import image_and_composer

NEEDED = "onnx", "onnxscript", "onnxruntime"
IMAGE_ENCODER, COMPOSER, WORDS = "image_encoder.onnx", "composer.onnx", "words.onnx"
FILES = (IMAGE_ENCODER, ["pixels"], "feature"), (COMPOSER, ["image", "text"], "query")  # names of inputs and output
TOLERANCE = 1e-4                        # of the largest number that torch gives


class SlicedMax(nn.Module):
    """nn.AdaptiveMaxPool1d, bit for bit, of a length that is known: ONNX has none whose windows differ in length."""

    def __init__(self, output_size: int):
        super().__init__()
        self.output_size = output_size

    def forward(self, features: Tensor) -> Tensor:                              # (B, channels, length)
        length, count = features.shape[-1], self.output_size
        windows = [features[..., i * length // count:-(-(i + 1) * length // count)] for i in range(count)]
        return torch.stack([window.amax(-1) for window in windows], dim=-1)     # (B, channels, count)


def check_packages() -> None:
    """Raise InputError where one that is needed is missing."""
    for name in NEEDED:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise InputError(f"--onnx needs {name} ({error}): pip install -r requirements-export.txt") from None


@torch.no_grad()
def write(model: ImgTextCompositionBase, folder: Path) -> dict[str, float]:
    """All files of a model on the CPU, in eval mode, which is no more to be used. Returns {file: the largest
    difference from torch, of TOLERANCE's kind}. Raises InputError where one cannot be written, or differs by more.
    """
    if not model.is_of_vectors or model.query_dim != model.image_dim:
        raise InputError(f"--onnx: {model.recipe.composer} makes no vector of a picture's and a text's alone that is "
                         "compared with a gallery's, so that there is no such file of it; leave --onnx out")
    for module in list(model.modules()):
        if isinstance(getattr(module, "pool", None), nn.AdaptiveMaxPool1d):
            module.pool = SlicedMax(module.pool.output_size)
    parts = image_and_composer(model)
    found = {file: written(part, dict(zip(inputs, rows, strict=True)), output, folder / file)
             for (file, inputs, output), (part, rows) in zip(FILES, parts.values(), strict=True)}
    if model.learned_words is not None:
        words = torch.randint(len(model.learned_words.vocabulary), (3, 5), generator=torch.Generator().manual_seed(0))
        found[WORDS] = written(model.learned_words, {"words": words}, "text", folder / WORDS, ("batch", "length"))
    return found


def written(module: nn.Module, inputs: dict[str, Tensor], output: str, file: Path,
            any_number: tuple[str, ...] = ("batch",)) -> float:
    """The largest difference of the file's answer to these inputs from torch's; it takes any number of rows, and of
    whatever else `any_number` names, the inputs' first dimensions."""
    from onnxruntime import InferenceSession

    module.eval()
    theirs = module(*inputs.values())                                           # first: what is kept from a first call,
    try:                                                                        # as `channels`, shall be no traced one
        with quiet(), warnings.catch_warnings(action="ignore"):
            torch.onnx.export(module, tuple(value[:2] for value in inputs.values()), file, dynamo=True, verbose=False,
                              external_data=False, input_names=list(inputs), output_names=[output],
                              dynamic_shapes=[{place: torch.export.Dim(name) for place, name in
                                               enumerate(any_number)}] * len(inputs))
        (ours,) = InferenceSession(file, providers=["CPUExecutionProvider"]).run(
            None, {name: value.numpy() for name, value in inputs.items()})
    except OSError:
        raise
    except Exception as error:                                                  # torch.onnx raises a dozen types
        raise InputError(f"this model cannot be written as {file.name} ({shown(first_line(error))}); export it "
                         "without --onnx") from None
    difference = ((torch.from_numpy(ours) - theirs).abs().max() / theirs.abs().max()).item()
    if not difference <= TOLERANCE:
        raise InputError(f"{file.name} gives other numbers than torch (by {difference:.1e} of the largest, "
                         f"{TOLERANCE:g} is allowed); export the model without --onnx")
    return difference
