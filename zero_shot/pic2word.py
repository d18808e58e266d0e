"""Pic2Word (arXiv 2302.03084): a picture becomes a word by a network that has learned from pictures alone.

"a photo of" and the word shall say what the picture shows, and not what the batch's others show.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from machine.device import send
from zero_shot.composer import PseudoWord
from zero_shot.prompts import BARE


class Phi(nn.Module):
    """(B, e) -> (B, w): two blocks of a linear layer, dropout and ReLU, and a last layer. Names as in the original's
    files."""

    def __init__(self, size: int, width: int, middle: int = 512, blocks: int = 2, dropout: float = 0.1):
        super().__init__()
        self.fc_out = nn.Linear(middle, width)                                  # first in the original's files
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(size if block == 0 else middle, middle),
                                                    nn.Dropout(dropout), nn.ReLU()) for block in range(blocks)))

    def forward(self, vectors: Tensor) -> Tensor:
        return self.fc_out(self.layers(vectors))


class Pic2Word(PseudoWord):
    """phi of pictures' vectors as they are, not normalised; its scale of cosines is the CLIP model's, not learned."""

    learns_from, own_prompt = "pictures", "pic2word"
    betas, eps = (0.9, 0.98), 1e-6

    def make_phi(self, size: int, width: int) -> nn.Module:
        return Phi(size, width)

    def parameter_groups(self, rate: float) -> list[dict]:
        """Of phi; its biases do not decay."""
        named = [(name, weight) for name, weight in self.named_parameters() if weight.requires_grad]
        return [{"params": [weight for name, weight in named if not name.endswith("bias")], "lr": rate},
                {"params": [weight for name, weight in named if name.endswith("bias")], "lr": rate,
                 "weight_decay": 0.0}]

    def forward(self, source: Tensor, texts: list[str], target: Tensor) -> dict[str, Tensor]:
        """source: (B, e) pictures' vectors, or their pixels. Returns pictures and what their words say, (B, e) each:
        unit rows, of which one has the scale of the cosines on it."""
        return self.features(self.encode_image(source), send(self.text_tower.ids([BARE]), self.a.device))

    def features(self, pictures: Tensor, ids: Tensor) -> dict[str, Tensor]:     # (B, e), (1, C)
        ids = ids.expand(len(pictures), -1)                                     # (B, C)
        said = self.text_tower.encode(ids, self.phi(pictures), ids == self.text_tower.picture_id)
        return {"picture": self.a.exp() * F.normalize(pictures, dim=1), "said_of_it": F.normalize(said, dim=1)}
