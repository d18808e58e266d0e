"""LinCIR (arXiv 2312.01998): a picture becomes a word by a network that has learned from texts alone.

A caption's nouns and what belongs to them make way for one word, phi of the caption's own vector plus noise; the
sentence shall then say what the caption said. As a CLIP model's texts and pictures lie in one space, phi also takes
pictures' vectors: the noise covers the gap between the two.
"""

import torch
from torch import Tensor, nn

from zero_shot.composer import PseudoWord


class Phi(nn.Module):
    """(B, e) -> (B, w): three linear layers, 4 e wide between. Names as in the original's files."""

    def __init__(self, size: int, width: int, dropout: float = 0.5):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(size, 4 * size), nn.GELU(), nn.Dropout(dropout),
                                    nn.Linear(4 * size, 4 * size), nn.GELU(), nn.Dropout(dropout),
                                    nn.Linear(4 * size, width))

    def forward(self, vectors: Tensor) -> Tensor:
        return self.layers(vectors)


class LinCIR(PseudoWord):
    """phi of pictures' vectors as they are, not normalised; trained on captions' vectors."""

    learns_from, own_prompt = "texts", "lincir"

    def make_phi(self, size: int, width: int) -> nn.Module:
        return Phi(size, width)

    def forward(self, source: Tensor, texts: list[str], target: Tensor) -> dict[str, Tensor]:
        """source: (B, e) captions' vectors. texts: the captions with $ in place of what shall be said anew. Returns
        what those say, and what the captions did, (B, e) each."""
        ids = self.text_tower.ids(texts)                                        # (B, C)
        return self.features(source, ids.to(source.device), self.noise(source))

    def noise(self, vectors: Tensor) -> Tensor:
        """(B, e): normal, of a strength from 0 to 1 that each row has its own (section 3.3)."""
        strength = torch.rand(len(vectors), 1, device=vectors.device, dtype=vectors.dtype)     # (B, 1)
        return strength * torch.randn_like(vectors)

    def features(self, captions: Tensor, ids: Tensor, noise: Tensor) -> dict[str, Tensor]:
        words = self.phi(captions + noise)                                      # (B, w)
        said = self.text_tower.encode(ids, words, ids == self.text_tower.picture_id)
        return {"said_anew": said, "caption": captions}
