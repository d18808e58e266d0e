"""Images to vectors: torchvision's classifiers by name, their last layer made anew, and the weights to start from."""

import difflib
from functools import cache

import torch
import torchvision
from torch import nn

from machine import tensor_files
from machine.errors import InputError

# Of torchvision's classifiers, those that end in one linear layer and answer a tensor in training too.
ENCODERS = [name for name in torchvision.models.list_models(module=torchvision.models)
            if not name.startswith(("squeezenet", "inception", "googlenet"))]


@cache
def encoder_head(name: str) -> tuple[str, int]:
    """The name of a torchvision classifier's last linear layer, and its width: ('fc', 512) for resnet18.

    Raises InputError for a name that is none of ENCODERS.
    """
    if name not in ENCODERS:
        near = difflib.get_close_matches(name, ENCODERS, n=3, cutoff=0.4) or ["resnet18"]
        raise InputError(f"--image_encoder {name}: torchvision has no classifier of this name that ends in one linear "
                         f"layer; the nearest are {', '.join(near)}")
    with torch.device("meta"):                                                  # shapes alone
        layers = list(torchvision.models.get_model(name, weights=None).named_modules())
    return next((layer, module.in_features) for layer, module in reversed(layers) if isinstance(module, nn.Linear))


def image_encoder(name: str, image_dim: int, image_size: int) -> nn.Module:
    """torchvision's model of this name, its last linear layer replaced by Linear(width, image_dim).

    Raises InputError where it cannot take images of this size.
    """
    sized = {"image_size": image_size} if name.startswith("vit_") else {}
    head, width = encoder_head(name)
    try:
        encoder = torchvision.models.get_model(name, weights=None, **sized)
        encoder.set_submodule(head, nn.Sequential(nn.Linear(width, image_dim)))
        if name != "resnet18":                                                  # which takes any
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                encoder.eval()(torch.zeros(1, 3, image_size, image_size))
    except (ValueError, RuntimeError, AssertionError) as error:
        raise InputError(f"--image_encoder {name} takes no images of {image_size} pixels "
                         f"({str(error).splitlines()[0]}); pass another --image_size") from None
    return encoder.train()


def weights_of(path: str) -> dict[str, torch.Tensor]:
    """The tensors of a file by name. Raises InputError, saying what it is, where it holds none."""
    try:
        tensor_files.is_whole(path)
        if found := tensor_files.weights(tensor_files.read(path)):
            return found
    except tensor_files.Unreadable as error:
        raise InputError(str(error)) from None
    except FileNotFoundError:
        raise InputError("there is no such file") from None
    raise InputError("it holds no tensors by name")


def load_image_weights(encoder: nn.Module, weights: str, name: str = "resnet18") -> None:
    """Put `weights` ('imagenet', 'none' or a file of torchvision's model `name`) into the encoder, but for its head.

    Raises InputError when the download fails or the file holds another model.
    """
    if weights == "none":
        return
    head = f"{encoder_head(name)[0]}."
    elsewhere = f"pass --image_weights PATH (a file saved from torchvision's {name}) or --image_weights none"
    try:
        if weights == "imagenet":
            state = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"].get_state_dict(progress=True)
        else:
            state = weights_of(weights)
        backbone = {weight: value for weight, value in state.items() if not weight.startswith(head)}
        missing, unexpected = encoder.load_state_dict(backbone, strict=False)
        if unexpected or any(not weight.startswith(head) for weight in missing):
            raise InputError(f"the tensors in {weights} are not those of a {name}")
    except Exception as error:                                                  # torch.load raises a dozen types
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"cannot load the image weights {weights!r} ({reason}); {elsewhere}") from None
