"""Numbers that came out of the original release's own modules, and the weights and inputs they were made with.

Weights and inputs come from numpy's MT19937, seeded by the crc32 of a name, so they are the same on any machine.
`golden.json` holds names, shapes, losses, gradient norms, vocabulary and recalls; `golden.npz` the features.
`checkpoint.json` is what a run of ours saved, see test_old_checkpoints.py; `mining.json` has what the rules of TIRG and
CoVR make of some captions, see test_mining.py.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

VALUES = json.loads((Path(__file__).parent / "golden.json").read_text())
ARRAYS = np.load(Path(__file__).parent / "golden.npz")


def normal(name: str, *shape: int) -> np.ndarray:
    """Standard-normal values that depend on the name alone."""
    return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)


def fill(module: nn.Module) -> nn.Module:
    """Overwrite every weight and buffer by its name; the composer weights `a` and the scale keep their first values."""
    for name, tensor in module.state_dict().items():
        if name == "a" or name.endswith("norm_s"):
            continue
        if not tensor.is_floating_point():
            tensor.zero_()
            continue
        values = normal(name, *tensor.shape)
        if name.endswith("running_var"):
            values = 1.0 + 0.1 * np.abs(values)
        elif name.endswith("running_mean"):
            values = 0.1 * values
        elif tensor.ndim == 1:
            values = float(name.endswith("weight")) + 0.05 * values
        elif not name.endswith("embedding_layer.weight"):
            values = values / np.sqrt(np.prod(tensor.shape[1:]))
        tensor.copy_(torch.as_tensor(values, dtype=tensor.dtype))
    return module


def images(name: str) -> Tensor:
    """(6, 3, 64, 64) float32."""
    return torch.as_tensor(normal(name, VALUES["batch"], 3, VALUES["image_size"], VALUES["image_size"]),
                           dtype=torch.float32)


def sentence_vectors(texts: list[str], dim: int = 768) -> Tensor:
    """(B, 768) float32: what the stand-in sentence service answered."""
    return torch.as_tensor(np.stack([normal("bert:" + text, dim) for text in texts]), dtype=torch.float32)
