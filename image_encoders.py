"""Images to vectors: encoders of torchvision, timm and open_clip by name, their last layer made anew, and the weights
to start from.

    resnet18                        a classifier of torchvision's
    timm:vit_small_patch16_224      a model of timm's; a tag after a dot names its pretrained weights
    open_clip:ViT-B-32/openai       the image tower of a CLIP model; the tag after the slash names its weights

timm and open_clip are imported where such a name is used.
"""

import difflib
import importlib
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
import torchvision
from torch import Tensor, nn

from machine.downloads import downloaded, hub_address, kept_at, reaching
from machine.errors import InputError, first_line
from machine.image_store import IMAGENET_MEAN, IMAGENET_STD
from machine.tensor_files import counted, difference, read_weights

# Of torchvision's classifiers, those that end in one linear layer and answer a tensor in training too.
ENCODERS = [name for name in torchvision.models.list_models(module=torchvision.models)
            if not name.startswith(("squeezenet", "inception", "googlenet"))]
OURS = "fc"                             # the last layer of what has none: see Headed


@dataclass(frozen=True)
class Traits:
    """What goes with an encoder's name, and how it wants its images.

    head, width: the name of its last linear layer, and what that takes, W. size: side in pixels it is made for.
    resampling: Pillow's name of the filter. mean, std: of a channel, of 1.
    """
    head: str
    width: int
    size: int = 224
    resampling: str = "bilinear"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


class Headed(nn.Module):
    """An encoder without a last linear layer, (B, 3, S, S) -> (B, W), and a layer of ours after it: -> (B, D)."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone, self.fc = backbone, nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.backbone(images))


# What is known of a name

@cache
def traits(name: str) -> Traits:
    """Raises InputError for a name that no library knows."""
    library, model = found(name)
    with torch.device("meta"), quiet():                                         # shapes alone
        return library.traits(model)


def encoder_head(name: str) -> tuple[str, int]:
    """The name of an encoder's last linear layer, and its width: ('fc', 512) for resnet18. Raises InputError."""
    return traits(name).head, traits(name).width


def image_encoder(name: str, image_dim: int, image_size: int) -> nn.Module:
    """The encoder of this name with random weights, its last layer Linear(width, image_dim).

    Raises InputError where it cannot take images of this size.
    """
    known, (library, model) = traits(name), found(name)
    try:
        with quiet():
            encoder = library.encoder(model, image_size)
        encoder.set_submodule(known.head, nn.Sequential(nn.Linear(known.width, image_dim)))
        if name != "resnet18":                                                  # which takes any
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                encoder.eval()(torch.zeros(1, 3, image_size, image_size))
    except (ValueError, RuntimeError, AssertionError, TypeError) as error:
        raise InputError(f"--image_encoder {name} takes no images of {image_size} pixels "
                         f"({first_line(error)}); pass another --image_size") from None
    return encoder.train()


def load_image_weights(encoder: nn.Module, weights: str, name: str = "resnet18") -> None:
    """Put `weights` ('imagenet' for the library's own, 'none', or a file) into the encoder, but for its last layer.

    Raises InputError when the download fails or the file holds another model.
    """
    if weights == "none":
        return
    head, (library, model) = f"{traits(name).head}.", found(name)
    elsewhere = f"pass --image_weights PATH (a file saved from {library.name}'s {model}) or --image_weights none"
    try:
        state = library.weights(model) if weights == "imagenet" else read_weights(weights)
        state = library.fitted(state, encoder, head)
        wanted = {weight: value for weight, value in encoder.state_dict().items() if not weight.startswith(head)}
        state = counted(state, wanted)
        if differing := difference(state, wanted):
            raise ValueError(f"the tensors in {weights} are not those of a {model}: {differing}")
        encoder.load_state_dict(state, strict=False)
    except Exception as error:                                                  # torch.load raises a dozen types
        raise InputError(f"cannot load the image weights {weights!r} ({first_line(error)}); {elsewhere}") from None


# Each library: what it knows of a model, the model with random weights, its weights, and how they fit

class Torchvision:
    name = "torchvision"

    def traits(self, model: str) -> Traits:
        if model not in ENCODERS:
            raise InputError(f"--image_encoder {model}: torchvision has no classifier of this name that ends in one "
                             f"linear layer; the nearest are {nearest(model, ENCODERS, 'resnet18')}. timm's models are "
                             "named timm:NAME, open_clip's open_clip:MODEL/TAG")
        layers = list(torchvision.models.get_model(model, weights=None).named_modules())
        return next(Traits(layer, module.in_features) for layer, module in reversed(layers)
                    if isinstance(module, nn.Linear))

    def encoder(self, model: str, size: int) -> nn.Module:
        sized = {"image_size": size} if model.startswith("vit_") else {}
        return torchvision.models.get_model(model, weights=None, **sized)

    def weights(self, model: str) -> dict[str, Tensor]:
        there = torchvision.models.get_model_weights(model)["IMAGENET1K_V1"]
        with reaching(there.url, kept_at(there.url)):
            return there.get_state_dict(progress=True)

    def fitted(self, state: dict[str, Tensor], _encoder: nn.Module, head: str) -> dict[str, Tensor]:
        return {weight: value for weight, value in state.items() if not weight.startswith(head)}


class Timm:
    name = "timm"
    FILTERS = ("bilinear", "bicubic", "lanczos", "nearest", "hamming", "box")

    @property
    def timm(self) -> ModuleType:
        return imported("timm", "timm")

    def traits(self, model: str) -> Traits:
        plain, _, tag = model.partition(".")
        if not self.timm.is_model(plain):
            raise InputError(f"--image_encoder timm:{model}: timm has no model of this name; the nearest are "
                             f"{nearest(plain, self.timm.list_models(), 'resnet18')}")
        if tag and model not in (tagged := self.timm.list_pretrained(f"{plain}.*")):
            raise InputError(f"--image_encoder timm:{model}: timm has no weights of this tag; of {plain} it has "
                             f"{', '.join(tagged) or 'none'}")
        made = self.timm.create_model(model, num_classes=0)
        wants = self.timm.data.resolve_data_config({}, model=made)
        resampling = wants["interpolation"] if wants["interpolation"] in self.FILTERS else "bicubic"
        return Traits(OURS, made.head_hidden_size, wants["input_size"][-1], resampling, wants["mean"], wants["std"])

    def encoder(self, model: str, size: int) -> nn.Module:
        known = self.timm.get_pretrained_cfg(model)
        sized = {"img_size": size} if known and known.fixed_input_size else {}
        return Headed(self.timm.create_model(model, num_classes=0, **sized))

    def weights(self, model: str) -> dict[str, Tensor]:
        known = self.timm.get_pretrained_cfg(model)
        if not known or known.custom_load or not (known.hf_hub_id or known.url):
            raise ValueError("timm has none of this model; name it with a tag")
        return downloaded(hub_address(known.hf_hub_id, known.hf_hub_filename or "model.safetensors")
                          if known.hf_hub_id else known.url)

    def fitted(self, state: dict[str, Tensor], encoder: nn.Module, _head: str) -> dict[str, Tensor]:
        """As timm would load them: renamed where its model was, positions resized, without the classifier."""
        backbone = encoder.backbone
        as_now = getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)
        state = as_now(state, backbone) if as_now else state
        classifier, kept = backbone.pretrained_cfg.get("classifier") or (), backbone.state_dict()
        dropped = tuple(f"{layer}." for layer in ((classifier,) if isinstance(classifier, str) else classifier))
        return {f"backbone.{weight}": value for weight, value in state.items()
                if weight in kept or not weight.startswith(dropped)}


class OpenClip:
    """Its models are MODEL or MODEL/TAG, where the tag names pretrained weights; or hf-hub:NAME, local-dir:FOLDER."""

    name = "open_clip"
    ELSEWHERE = "hf-hub:", "local-dir:"

    @property
    def open_clip(self) -> ModuleType:
        return imported("open_clip", "open_clip_torch")

    def parts(self, model: str) -> tuple[str, dict]:
        """The model without its tag, and what open_clip knows of the tag's weights. Raises InputError."""
        if model.startswith(self.ELSEWHERE):
            return model, {}
        plain, _, tag = model.partition("/")
        if plain not in (models := self.open_clip.list_models()):
            raise InputError(f"open_clip:{model}: open_clip has no model of this name; the nearest are "
                             f"{nearest(plain, models, 'ViT-B-32')}")
        known = self.open_clip.get_pretrained_cfg(plain, tag) if tag else {}
        if tag and not known:
            raise InputError(f"open_clip:{model}: open_clip has no weights of this tag; of {plain} it has "
                             f"{', '.join(self.open_clip.list_pretrained_tags_by_model(plain)) or 'none'}")
        return plain, known

    def whole(self, model: str, size: int | None = None) -> nn.Module:
        """Both towers with random weights, on the device that is set. Raises InputError."""
        plain, known = self.parts(model)
        return self.open_clip.create_model(
            plain, load_weights=False, pretrained_text=False, device=torch.get_default_device(), force_image_size=size,
            force_quick_gelu=known.get("quick_gelu", False))

    def traits(self, model: str) -> Traits:
        try:
            tower = self.whole(model).visual
        except (OSError, RuntimeError, ValueError) as error:                    # of another place's
            raise InputError(f"open_clip:{model}: {first_line(error)}") from None
        wants = {**tower.preprocess_cfg, **self.parts(model)[1], "size": tower.preprocess_cfg["size"]}
        size = wants["size"] if isinstance(wants["size"], int) else wants["size"][-1]
        return Traits(OURS, tower.output_dim, size, wants["interpolation"], tuple(wants["mean"]), tuple(wants["std"]))

    def encoder(self, model: str, size: int) -> nn.Module:
        return Headed(self.whole(model, size).visual)

    def weights(self, model: str) -> dict[str, Tensor]:
        plain, known = self.parts(model)
        if model.startswith(self.ELSEWHERE):
            with quiet():
                return self.open_clip.create_model(model).state_dict()
        if not known:
            tags = self.open_clip.list_pretrained_tags_by_model(plain)
            raise ValueError(f"the name says none: give it a tag, as in open_clip:{plain}/{(tags or ['TAG'])[0]}")
        repository, _, file = known.get("hf_hub", "").rpartition("/")
        return downloaded(hub_address(repository, file or "open_clip_model.safetensors")
                          if repository else known["url"])

    def fitted(self, state: dict[str, Tensor], encoder: nn.Module, _head: str) -> dict[str, Tensor]:
        """The image tower's, of a whole model's or of its own, positions resized."""
        whole = any(weight.startswith("visual.") for weight in state)
        named = {weight if whole else f"visual.{weight}": value for weight, value in state.items()}
        tower = nn.Module()
        tower.visual = encoder.backbone
        with quiet():
            imported("open_clip.model", "open_clip_torch").resize_pos_embed(named, tower)
        return {weight.replace("visual.", "backbone.", 1): value for weight, value in named.items()
                if weight.startswith("visual.")}


LIBRARIES = {"timm": Timm(), "open_clip": OpenClip()}


def found(name: str) -> tuple[Torchvision | Timm | OpenClip, str]:
    """Whose an encoder is, and what it is called there."""
    prefix, colon, model = name.partition(":")
    return (LIBRARIES[prefix], model) if colon and prefix in LIBRARIES else (Torchvision(), name)


def imported(module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"encoders named {module}:... need {module} ({error}): pip install {package}") from None


@contextmanager
def quiet() -> Iterator[None]:
    """open_clip warns of what we have asked it for."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def nearest(name: str, names: list[str], example: str) -> str:
    return ", ".join(difflib.get_close_matches(name, names, n=3, cutoff=0.4) or [example])
