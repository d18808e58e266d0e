"""The stages of a network of images: which of its blocks they are, and statistics of what each gives.

Colours and textures are in the first stages' channels, of which a network's last features have little.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Stage:
    """A block of an encoder, by its module's name, that gives C `channels` of each place in the picture.

    layout: of what it gives: BCHW, BHWC, or tokens, BNC or NBC, of which the patches are a square and come last.
    prefix: tokens before them, the class token first.
    """
    module: str
    channels: int
    layout: str
    prefix: int = 0

    @property
    def width(self) -> int:
        return self.channels * (3 if self.prefix else 2)

    def statistics(self, given: Tensor) -> Tensor:
        """What it gives -> (B, width): the channels' mean and standard deviation over the picture, and the class token
        where there is one, each normalized to mean 0 and variance 1 over its C numbers. In float32."""
        if self.layout == "BCHW":
            parts = mean_and_deviation(given.float(), (2, 3))
        elif self.layout == "BHWC":
            parts = mean_and_deviation(given.float(), (1, 2))
        else:
            tokens = (given if self.layout == "BNC" else given.transpose(0, 1)).float()     # (B, N, C)
            parts = [*mean_and_deviation(tokens[:, self.prefix:], (1,)), *([tokens[:, 0]] if self.prefix else [])]
        return torch.cat([F.layer_norm(part, (self.channels,)) for part in parts], dim=1)


def mean_and_deviation(values: Tensor, dims: tuple[int, ...]) -> list[Tensor]:
    variance, mean = torch.var_mean(values, dims, correction=0)
    return [mean, (variance + 1e-6).sqrt()]                                     # at 0 a root has no gradient


def stages_of(backbone: nn.Module, size: int) -> tuple[Stage, ...]:
    """Of the blocks that follow one another the last of each resolution; where all have the same one, as a ViT's,
    four, at a quarter of the way each. They are those that timm says, else the parts of the encoder's trunk. size: of
    the pictures it is made for, so that the stages are the same whatever it is given. Raises ValueError where there
    are none."""
    found: dict[str, tuple[int, Stage]] = {}                                    # of all modules, in the order of calls

    def take(_module: nn.Module, _inputs: tuple, output: object, name: str) -> None:
        if isinstance(output, Tensor) and (seen := stage_of(name, tuple(output.shape))):
            found[name] = seen
    hooks = [module.register_forward_hook(partial(take, name=name)) for name, module in backbone.named_modules()]
    with torch.no_grad():
        backbone.eval()(torch.zeros(3, 3, size, size, device=next(backbone.parameters()).device))
    for hook in hooks:
        hook.remove()
    by_side: dict[int, list[Stage]] = {}
    for name in blocks_of(backbone, found):
        side, stage = found[name]
        by_side.setdefault(side, []).append(stage)
    if not by_side:
        raise ValueError("none of its blocks gives a map or tokens")
    if len(by_side) > 1:
        return tuple(stages[-1] for stages in by_side.values())
    stages, = by_side.values()
    return tuple(stages[place] for place in dict.fromkeys(-(-len(stages) * part // 4) - 1 for part in (1, 2, 3, 4)))


def blocks_of(backbone: nn.Module, maps: Collection[str]) -> list[str]:
    """Those modules that follow one another, of the ones that give maps or tokens: timm's own list, else the parts of
    the trunk, which is the first list of modules within what holds nearly all of the encoder."""
    for name, module in backbone.named_modules():
        if isinstance(told := getattr(module, "feature_info", None), list) and told and "module" in told[0]:
            return [block for info in told if (block := f"{name}.{info['module']}".lstrip(".")) in maps]

    def leaves(module: nn.Module, name: str) -> int:
        return sum(f"{name}.{part}".strip(".") in maps for part, layer in module.named_modules()
                   if not any(layer.children()))
    name, trunk = "", backbone
    while not isinstance(trunk, nn.Sequential | nn.ModuleList):
        parts = {f"{name}.{part}".lstrip("."): layer for part, layer in trunk.named_children()}
        most = max(parts, key=lambda part: leaves(parts[part], part))
        if not any(parts[most].children()) or leaves(parts[most], most) <= 0.8 * leaves(trunk, name):
            break
        name, trunk = most, parts[most]
    return [block for part, _ in trunk.named_children() if (block := f"{name}.{part}".lstrip(".")) in maps]


def stage_of(name: str, shape: tuple[int, ...]) -> tuple[int, Stage] | None:
    """Places to a side of a block's output, of three pictures, and the block; None where it is no map nor tokens, or
    has one place."""
    if len(shape) == 4 and shape[2] == shape[3] > 1:
        return shape[2], Stage(name, shape[1], "BCHW")
    if len(shape) == 4 and shape[1] == shape[2] > 1:
        return shape[1], Stage(name, shape[3], "BHWC")
    if len(shape) == 3 and 3 in shape[:2] and max(shape[:2]) > 3:
        layout, count = ("BNC", shape[1]) if shape[0] == 3 else ("NBC", shape[0])
        side = math.isqrt(count)
        return side, Stage(name, shape[2], layout, count - side**2)
    return None
