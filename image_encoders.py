"""Images to vectors: encoders of torchvision, timm and open_clip by name, their last layer made anew, and the weights
to start from; what that layer is given is the encoder's last features, or statistics of its stages too.

    resnet18                        a classifier of torchvision's
    timm:vit_small_patch16_224      a model of timm's; a tag after a dot names its pretrained weights
    open_clip:ViT-B-32/openai       the image tower of a CLIP model; the tag after the slash names its weights

timm and open_clip are imported where such a name is used.
"""

import difflib
import importlib
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from machine.device import send
from machine.downloads import fetched, from_hub
from machine.errors import InputError, first_line
from machine.image_store import IMAGENET_MEAN, IMAGENET_STD, normalize_images
from machine.stages import Stage, stages_of
from machine.tensor_files import counted, difference, fingerprint, read_weights

log = logging.getLogger(__name__)

# Of torchvision's classifiers, those that end in one linear layer and answer a tensor in training too.
ENCODERS = [name for name in torchvision.models.list_models(module=torchvision.models)
            if not name.startswith(("squeezenet", "inception", "googlenet"))]
OURS = "fc"                             # the last layer of what has none: see Headed
FEATURES = {"last": "an encoder's last features", "stages": "statistics of its stages beside them"}


LEAST_TEXT = {"context_length": 1, "vocab_size": 1, "width": 64, "heads": 1, "layers": 1}   # a tower for open_clip


@dataclass(frozen=True)
class Traits:
    """What goes with an encoder's name, and how it wants its images.

    head, width: the name of its last linear layer, and what that takes, W. size: side in pixels it is made for.
    resampling: Pillow's name of the filter. mean, std: of a channel, of 1. stages: whose statistics are among the W.
    """
    head: str
    width: int
    size: int = 224
    resampling: str = "bilinear"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    stages: tuple[Stage, ...] = ()


class Headed(nn.Module):
    """An encoder without a last linear layer, (B, 3, S, S) -> (B, W), and a layer of ours after it: -> (B, D).

    stages: whose statistics follow the encoder's features, and count among the W.
    """

    def __init__(self, backbone: nn.Module, size: int, stages: tuple[Stage, ...] = ()):
        super().__init__()
        self.backbone, self.fc, self.size, self.stages = backbone, nn.Identity(), size, stages
        self.given: dict[str, Tensor] = {}                                      # by the stages, in this forward pass
        for stage in stages:
            backbone.get_submodule(stage.module).register_forward_hook(partial(self.take, stage.module))

    def take(self, name: str, _module: nn.Module, _inputs: tuple, output: Tensor) -> None:
        self.given[name] = output

    def forward(self, images: Tensor) -> Tensor:
        features = self.backbone(images)
        if self.stages:
            told = [stage.statistics(self.given.pop(stage.module)) for stage in self.stages]
            features = torch.cat([features.float(), *told], dim=1)
        return self.fc(features)


class LastLayer(nn.Sequential):
    """Linear(W, D), the encoder's only layer of ours; dropout: the share of what it is given that it does without in
    training."""

    dropout = 0.0

    def forward(self, features: Tensor) -> Tensor:                              # (B, W) -> (B, D)
        return super().forward(F.dropout(features, self.dropout, self.training) if self.dropout else features)


class ImageSide(nn.Module):
    """What composers do with images, whatever they make of them: of a module with `img_model`, its name's `traits`,
    its `recipe`, and `a`, whose device and kind of numbers are the model's.

    bf16: whether the image encoder, nearly all of the work, computes in bfloat16; the rest stays float32.
    """

    bf16 = False

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) uint8 pixels, or `normalized` ones, or the (B, W) that `backbone` gives of them -> (B, D)."""
        with self.rounding(images.device):
            encode = self.img_model if images.ndim == 4 else self.last_layer
            return encode(self.normalized(images)).to(self.a.dtype)

    @property
    def last_layer(self) -> nn.Module:
        """The image encoder's, Linear(W, D); of one that is used as it is, nothing: W = D."""
        return self.img_model.get_submodule(self.traits.head)

    @torch.inference_mode()
    def backbone(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) uint8 -> (B, W) float32 on the CPU: what the encoder's last layer is given in a test."""
        self.img_model.eval()
        with self.rounding(self.a.device):
            return self.before_last_layer(send(images, self.a.device)).float().cpu()

    def before_last_layer(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) uint8 -> (B, W), normalization included, of tensors alone: so this is what can be traced."""
        given: list[Tensor] = []
        with self.last_layer.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0])):
            self.img_model(self.normalized(images))
        return given[0]

    def backbone_fingerprint(self) -> str:
        """Twelve digits that change with whatever `backbone` depends on, but for the pixels."""
        known, held = self.traits, self.img_model.state_dict()
        weights = {name: value for name, value in held.items() if not name.startswith(f"{known.head}.")}
        return fingerprint(weights, self.recipe.image_encoder, self.recipe.image_size, known.resampling, known.mean,
                           known.std, self.bf16, *known.stages)[:12]

    def normalized(self, images: Tensor) -> Tensor:
        """Pixels as the encoder wants them, float32; what is none is left as it is."""
        if images.dtype != torch.uint8:
            return images
        return normalize_images(images, self.traits.mean, self.traits.std)

    def rounding(self, device: torch.device) -> torch.autocast:
        """What images are encoded in: bfloat16 with `bf16`. Weights are rounded once in each outermost one."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.bf16)


# What is known of a name

@cache
def traits(name: str, features: str = "last") -> Traits:
    """features: what the last layer is given, of FEATURES. Raises InputError for a name that no library knows, and for
    an encoder whose stages cannot be looked at."""
    library, model = library_of(name)
    with torch.device("meta"), quiet():                                         # shapes alone
        known = library.traits(model)
    if features == "last":
        return known
    for context in (library.sketched, nullcontext):                             # some compute with what is no shape
        try:
            with context(), quiet(), torch.random.fork_rng(devices=[]):
                stages = stages_of(headless(library.encoder(model, known.size), known), known.size)
            return replace(known, head=OURS, width=known.width + sum(stage.width for stage in stages), stages=stages)
        except (ValueError, RuntimeError, AssertionError, TypeError, IndexError, AttributeError) as error:
            why = first_line(error)
    raise InputError(f"--image_features {features}: the stages of {name} cannot be looked at ({why}); pass "
                     "--image_features last")


def encoder_head(name: str, features: str = "last") -> tuple[str, int]:
    """The name of an encoder's last linear layer, and its width: ('fc', 512) for resnet18. Raises InputError."""
    known = traits(name, features)
    return known.head, known.width


def image_encoder(name: str, image_dim: int | None, image_size: int, features: str = "last") -> nn.Module:
    """The encoder of this name with random weights, its last layer Linear(width, image_dim); with None, none. features:
    as in `traits`.

    Raises InputError where it cannot take images of this size.
    """
    known, (library, model) = traits(name, features), library_of(name)
    try:
        with quiet():
            encoder = library.encoder(model, image_size)
        if known.stages:
            encoder = Headed(headless(encoder, traits(name)), image_size, known.stages)
        if name != "resnet18" or known.stages:                                  # which takes any
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                made = tuple(encoder.eval()(torch.zeros(1, 3, image_size, image_size)).shape)
            if len(made) != 2 or (isinstance(encoder, Headed) and made[1] != known.width):
                raise InputError(f"--image_encoder {name} makes {made} of an image, not one vector; choose another")
        last = nn.Identity() if image_dim is None else LastLayer(nn.Linear(known.width, image_dim))
        encoder.set_submodule(known.head, last)
    except (ValueError, RuntimeError, AssertionError, TypeError, IndexError) as error:
        raise InputError(f"--image_encoder {name} takes no images of {image_size} pixels "
                         f"({first_line(error)}); pass another --image_size") from None
    return encoder.train()


def headless(encoder: nn.Module, known: Traits) -> nn.Module:
    """What is before the last layer: (B, 3, S, S) -> (B, W)."""
    if isinstance(encoder, Headed):
        return encoder.backbone
    encoder.set_submodule(known.head, nn.Identity())
    return encoder


def load_image_weights(encoder: nn.Module, weights: str, name: str = "resnet18") -> None:
    """Put `weights` ('imagenet' for the library's own, 'none', or a file) into the encoder, but for its last layer.

    Raises InputError when the download fails or the file holds another model.
    """
    if weights == "none":
        return
    library, model = library_of(name)
    head = f"{OURS if isinstance(encoder, Headed) else traits(name).head}."
    elsewhere = f"pass --image_weights PATH (a file saved from {library.name}'s {model}) or --image_weights none"
    try:
        path = library.fetched(model) if weights == "imagenet" else Path(weights)
        with quiet(), torch.random.fork_rng(devices=[]):
            state = library.fitted(path, model, encoder)
        state = {weight: value for weight, value in state.items() if not weight.startswith(head)}
        wanted = {weight: value for weight, value in encoder.state_dict().items() if not weight.startswith(head)}
        put(encoder, state, wanted, model)
    except Exception as error:                                                  # torch.load raises a dozen types
        raise InputError(f"cannot load the image weights {weights!r} ({reason(error)}); {elsewhere}") from None
    if weights != "imagenet" and (remark := library.remark(model)):
        log.warning("note: %s", remark)


def put(module: nn.Module, state: dict[str, Tensor], wanted: dict[str, Tensor], model: str) -> None:
    """The weights that are wanted, into the module; counters of batch norm may be missing. Raises ValueError."""
    state = counted(state, wanted)
    if differing := difference(state, wanted):
        raise ValueError(f"its tensors are not those of a {model}: {differing}")
    whole = module.state_dict()                                                 # knows its version, as MNASNet wants
    whole.update(state)
    module.load_state_dict(whole)


def reason(error: Exception) -> str:
    """What an error says; of those that torch collects, the first."""
    lines = str(error).strip().splitlines()
    return lines[1].strip() if len(lines) > 1 and lines[0].startswith("Error(s) in loading") else first_line(error)


# Each library: what it knows of a model, the model with random weights, its weights' file, and how these fit

class Torchvision:
    name = "torchvision"
    sketched = staticmethod(lambda: Sketched())                                 # a context in which weights are shapes
    V1 = "IMAGENET1K_V1"                # the published weights, of most the only ones

    def traits(self, model: str) -> Traits:
        if model not in ENCODERS:
            raise InputError(f"--image_encoder {model}: torchvision has no classifier of this name that ends in one "
                             f"linear layer; the nearest are {nearest(model, ENCODERS, 'resnet18')}. timm's models are "
                             "named timm:NAME, open_clip's open_clip:MODEL/TAG")
        with torch.device("cpu"), Sketched():                                   # in place of `traits`' meta device
            layers = list(torchvision.models.get_model(model, weights=None).named_modules())
        of = torchvision.models.get_model_weights(model)
        wants = next((weights for weights in of if weights.name == self.V1), [*of][-1]).transforms()
        return next(Traits(layer, module.in_features, wants.crop_size[0], wants.interpolation.value, tuple(wants.mean),
                           tuple(wants.std))
                    for layer, module in reversed(layers) if isinstance(module, nn.Linear))

    def encoder(self, model: str, size: int) -> nn.Module:
        sized = {"image_size": size} if model.startswith("vit_") else {}
        return torchvision.models.get_model(model, weights=None, **sized)

    def fetched(self, model: str) -> Path:
        of = torchvision.models.get_model_weights(model)
        if self.V1 not in of.__members__:
            ways = "; ".join(f"{weights.url} for --image_size {weights.transforms().crop_size[0]}" for weights in of)
            raise ValueError(f"torchvision has none of this kind, but others: get one and pass it as a file: {ways}")
        return fetched(of[self.V1].url, hashed=True)

    def fitted(self, path: Path, model: str, encoder: nn.Module) -> dict[str, Tensor]:
        """As torchvision would load them: DenseNets of its first years renamed, a ViT's positions resized."""
        whole = encoder.backbone if isinstance(encoder, Headed) else encoder
        state = {re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)", r"\1\2", weight): value
                 for weight, value in read_weights(path).items()}
        if model.startswith("vit_"):
            state = torchvision.models.vision_transformer.interpolate_embeddings(
                whole.image_size, whole.patch_size, state)
        if whole is encoder:
            return state
        head = f"{traits(model).head}."
        return {f"backbone.{weight}": value for weight, value in state.items() if not weight.startswith(head)}

    def remark(self, _model: str) -> None:
        """What a user should know who gives a file."""


class Sketched(TorchFunctionMode):
    """Modules made in here have weights without memory. Tensors of other origin are real, unlike on the meta device:
    RegNet's constructor reads some."""

    MADE = torch.empty, torch.zeros, torch.ones                                 # what weights are made by

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **{**(kwargs or {}), **({"device": "meta"} if function in self.MADE else {})})


class Timm:
    name = "timm"
    sketched = staticmethod(lambda: torch.device("meta"))
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
        return Traits(OURS, getattr(made, "head_hidden_size", made.num_features), wants["input_size"][-1], resampling,
                      wants["mean"], wants["std"])

    def encoder(self, model: str, size: int) -> nn.Module:
        return Headed(self.timm.create_model(model, num_classes=0, **self.sized(model, size)), size)

    def sized(self, model: str, size: int) -> dict[str, int]:
        """What the model must be told to take images of this size: nothing, if it resizes them itself, as CrossViT."""
        known = self.timm.get_pretrained_cfg(model)
        if not known or not known.fixed_input_size or size == known.input_size[-1]:
            return {}
        try:
            with torch.device("meta"), torch.no_grad():
                self.timm.create_model(model, num_classes=0).eval()(torch.zeros(1, 3, size, size))
        except (ValueError, RuntimeError, AssertionError, TypeError, IndexError):
            return {"img_size": size}
        return {}

    def fetched(self, model: str) -> Path:
        """The file that timm's own loading would take: of a repository, the safe one first."""
        known = self.timm.get_pretrained_cfg(model)
        if not known or not (known.hf_hub_id or known.url):
            raise ValueError("timm has none of this model; name it with a tag")
        if not known.hf_hub_id:
            return fetched(known.url)
        name = known.hf_hub_filename or "pytorch_model.bin"
        safe = {"pytorch_model.bin": "model.safetensors"}.get(name, re.sub(r"\.bin$", ".safetensors", name))
        return from_hub(known.hf_hub_id, [*dict.fromkeys([safe, name])])

    def fitted(self, path: Path, model: str, encoder: Headed) -> dict[str, Tensor]:
        """As timm would load them: renamed where its model was, positions resized, without the classifier and what
        else goes with it."""
        own = {"file": str(path), "custom_load": True} if path.suffix == ".npz" else {
            "state_dict": read_weights(path), "num_classes": -1}                # never its own number: all may differ
        try:
            with nothing_loaded() as states:
                made = self.timm.create_model(model, num_classes=0, pretrained=True, pretrained_cfg_overlay=own,
                                              **self.sized(model, encoder.size))
        except OSError:                                                         # a hybrid's backbone would be fetched,
            states = [own["state_dict"]]                                        # whose weights are in the file, too
        with torch.device("meta"):                                              # names alone
            whole = self.timm.create_model(model, num_classes=1000).state_dict()
        classifier = whole.keys() - encoder.backbone.state_dict().keys()
        return {f"backbone.{weight}": value for weight, value in (states or [made.state_dict()])[-1].items()
                if weight not in classifier}

    def remark(self, _model: str) -> None:
        """What a user should know who gives a file."""


@contextmanager
def nothing_loaded() -> Iterator[list[dict[str, Tensor]]]:
    """What modules are given to load in here, which they do not: timm converts files on their way into its models, and
    does not say what did not fit."""
    states, loading = [], nn.Module.load_state_dict

    def note(_module: nn.Module, state: dict[str, Tensor], *_, **__):
        states.append(state)
        return nn.modules.module._IncompatibleKeys([], [])
    nn.Module.load_state_dict = note
    try:
        yield states
    finally:
        nn.Module.load_state_dict = loading


class OpenClip:
    """Its models are MODEL or MODEL/TAG, where the tag names pretrained weights; or hf-hub:NAME, local-dir:FOLDER."""

    name = "open_clip"
    sketched = staticmethod(lambda: torch.device("meta"))
    ELSEWHERE = "hf-hub:", "local-dir:"
    FILES = "open_clip_model.safetensors", "open_clip_pytorch_model.bin"

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

    def whole(self, model: str, size: int | None = None, text: bool = True) -> nn.Module:
        """Both towers with random weights, on the device that is set; of the text's, if not `text`, the least. Raises
        InputError."""
        plain, known = self.parts(model)
        if text:                                                                # by which it would ask "run its code?"
            imported("transformers.dynamic_module_utils", "transformers").TIME_OUT_REMOTE_CODE = 0
        made = self.open_clip.create_model(
            plain, load_weights=False, pretrained_text=False, device=torch.get_default_device(), force_image_size=size,
            force_quick_gelu=known.get("quick_gelu", False), **({} if text else {"text_cfg": dict(LEAST_TEXT)}))
        if hasattr(made.visual, "output_tokens"):
            made.visual.output_tokens = False                                   # CoCa's, for its captions
        return made

    def config(self, model: str) -> dict:
        return self.open_clip.get_model_config(self.parts(model)[0])

    def traits(self, model: str) -> Traits:
        try:
            tower, width = self.whole(model, text=False).visual, self.config(model)["embed_dim"]
        except (OSError, RuntimeError, ValueError) as error:                    # of another place's
            raise InputError(f"open_clip:{model}: {first_line(error)}") from None
        wants = {**tower.preprocess_cfg, **self.parts(model)[1], "size": tower.preprocess_cfg["size"]}
        size = wants["size"] if isinstance(wants["size"], int) else wants["size"][-1]
        return Traits(OURS, width, size, wants["interpolation"], tuple(wants["mean"]), tuple(wants["std"]))

    def encoder(self, model: str, size: int) -> nn.Module:
        return Headed(self.whole(model, size, text=False).visual, size)

    def fetched(self, model: str) -> Path:
        """The file that open_clip's own loading would take: of a repository, the safe one first."""
        plain, known = self.parts(model)
        place, _, name = plain.partition(":")
        if place == "local-dir":
            if here := next((file for file in self.FILES if (Path(name) / file).exists()), None):
                return Path(name) / here
            raise ValueError(f"{name} has none of {', '.join(self.FILES)}")
        if place == "hf-hub":
            return from_hub(name, self.FILES)
        if not known:
            tags = self.open_clip.list_pretrained_tags_by_model(plain)
            raise ValueError(f"the name says none: give it a tag, as in open_clip:{plain}/{(tags or ['TAG'])[0]}")
        repository, _, file = known["hf_hub"].rpartition("/")
        return from_hub(repository, [*dict.fromkeys([re.sub(r"\.(bin|pth)$", ".safetensors", file), file])]
                        if file else self.FILES)

    def state(self, path: Path, whole: nn.Module) -> dict[str, Tensor]:
        """The weights in a file as open_clip would load them into the whole model: other programs' converted, of its
        first years renamed, positions resized. A file of an image tower alone is one."""
        conversions, models = (imported(f"open_clip.{part}", "open_clip_torch") for part in ("convert", "model"))
        if path.suffix == ".npz":                                               # SigLIP's, of big_vision
            conversions.load_big_vision_weights(whole, str(path))
            return whole.state_dict()
        state = conversions.convert_state_dict(whole, named_as_open_clip(read_weights(path)))
        if not any(weight.startswith("visual.") for weight in state):
            state = {f"visual.{weight}": value for weight, value in state.items()}
        if "positional_embedding" in state and hasattr(whole, "text"):
            state = models.convert_to_custom_text_state_dict(state)
        models.resize_pos_embed(state, whole)
        for name, value in whole.named_parameters():
            if name in state and value.numel() == state[name].numel() == 1:     # a scale, which some files have as (1,)
                state[name] = state[name].reshape(value.shape)
        return state

    def fitted(self, path: Path, model: str, encoder: Headed) -> dict[str, Tensor]:
        """The image tower's, of a whole model's or of its own. timm's towers are resized after they were loaded."""
        of_timm = "timm_model_name" in self.config(model)["vision_cfg"]
        whole = self.whole(model, None if of_timm else encoder.size, text=path.suffix == ".npz")
        state = self.state(path, whole)
        tower = {weight.removeprefix("visual."): value for weight, value in state.items()
                 if weight.startswith("visual.")}
        if of_timm:
            put(whole.visual, tower, whole.visual.state_dict(), model)
            if encoder.size != traits(f"open_clip:{model}").size:
                whole.visual.set_input_size(encoder.size)
            tower = whole.visual.state_dict()
        return {f"backbone.{weight}": value for weight, value in tower.items()}

    def remark(self, model: str) -> str | None:
        """What a user should know who gives a file: its weights may want other statistics than a name without a tag."""
        plain, known = self.parts(model)
        if known or model.startswith(self.ELSEWHERE):
            return None
        usual = traits(f"open_clip:{plain}")
        others = [tag for tag in self.open_clip.list_pretrained_tags_by_model(plain)
                  if (of := traits(f"open_clip:{plain}/{tag}")).mean != usual.mean or of.std != usual.std]
        return others and (f"open_clip:{plain} names no weights, so its images get OpenAI's mean and deviation; "
                           f"{', '.join(others[:5])} want others: if the file is one of these, say so in the name, as "
                           f"open_clip:{plain}/{others[0]}")


# transformers' names of a CLIP model's parts, and OpenAI's and open_clip's of the same.
OF_TRANSFORMERS = (("text_model.embeddings.token_embedding.", "token_embedding."),
                   ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
                   ("text_model.final_layer_norm.", "ln_final."), ("text_projection.weight", "text_projection"),
                   ("text_model.encoder.layers.", "transformer.resblocks."),
                   ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
                   ("vision_model.embeddings.patch_embedding.weight", "visual.conv1.weight"),
                   ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
                   ("vision_model.pre_layrnorm.", "visual.ln_pre."),
                   ("vision_model.post_layernorm.", "visual.ln_post."),
                   ("visual_projection.weight", "visual.proj"),
                   ("vision_model.encoder.layers.", "visual.transformer.resblocks."))
OF_A_BLOCK = ((".self_attn.out_proj.", ".attn.out_proj."), (".layer_norm1.", ".ln_1."), (".layer_norm2.", ".ln_2."),
              (".mlp.fc1.", ".mlp.c_fc."), (".mlp.fc2.", ".mlp.c_proj."))
PROJECTIONS = "text_projection", "visual.proj"                                  # which the two have transposed


def named_as_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A CLIP model's weights as transformers has them, under open_clip's names; others as they are."""
    if not any(weight.startswith("text_model.encoder.layers.") for weight in state):
        return state
    named = {}
    for weight, value in state.items():
        if weight.endswith("position_ids"):                                     # older files' counting from 0
            continue
        for theirs, ours in OF_TRANSFORMERS:
            weight = ours + weight.removeprefix(theirs) if weight.startswith(theirs) else weight
        for theirs, ours in OF_A_BLOCK:
            weight = weight.replace(theirs, ours)
        named[weight] = value.T.contiguous() if weight in PROJECTIONS else value
    for query in [weight for weight in named if ".self_attn.q_proj." in weight]:
        parts = [named.pop(query.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
        named[query.replace(".self_attn.q_proj.", ".attn.in_proj_")] = torch.cat(parts)
    return named


LIBRARIES = {"timm": Timm(), "open_clip": OpenClip()}


def library_of(name: str) -> tuple[Torchvision | Timm | OpenClip, str]:
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
