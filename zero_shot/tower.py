"""A CLIP model's text tower, which also reads words that are vectors: the pseudo-words that pictures become.

Rows of ids are start, the text's, end, and then padding. The tower is causal, so a row says the same cut after its end:
captions of a dozen words need a sixth of the work of the 77 places that they are padded to.
"""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from image_encoders import LIBRARIES, quiet
from machine.errors import InputError
from machine.tensor_files import fingerprint
from text_encoders import clip_tokenizer, is_causal, loaded_clip, text_part
from zero_shot.prompts import PICTURE


class TextTower(nn.Module):
    """open_clip's model of this name without its images' tower, with random weights; it never learns.

    name: open_clip:MODEL/TAG. Raises InputError for another, or one that no library knows.
    """

    def __init__(self, name: str):
        super().__init__()
        kind, _, self.model = name.partition(":")
        if kind != "open_clip" or not self.model:
            raise InputError(f"--image_encoder {name}: this composer needs both towers of one CLIP model; pass "
                             "--image_encoder open_clip:MODEL/TAG and --text_encoder open_clip:MODEL/TAG")
        with quiet(), torch.random.fork_rng(devices=[]):
            self.clip = LIBRARIES["open_clip"].whole(self.model)
        self.clip.visual = None
        self.requires_grad_(False).eval()

    def load(self, weights: str) -> None:
        """Its weights: 'imagenet' for the name's own, 'none' for random ones, or a file. Raises InputError."""
        if weights != "none":
            self.clip.load_state_dict(loaded_clip(self.model, weights).state_dict())

    @property
    def text(self) -> nn.Module:
        return text_part(self.clip)

    @property
    def width(self) -> int:
        """w, of a word's vector."""
        return self.text.token_embedding.embedding_dim

    @property
    def context(self) -> int:
        """C, the most places of a row."""
        return self.text.positional_embedding.shape[0]

    @property
    def is_causal(self) -> bool:
        """Whether it is CLIP's own kind, which `encode` knows; others only read texts."""
        return is_causal(self.clip)

    @cached_property
    def tokenizer(self):
        return clip_tokenizer(self.model, LIBRARIES["open_clip"].parts(self.model)[0])

    def check(self) -> None:
        """Raise InputError for a tower that cannot read a word that is a vector."""
        if not (self.is_causal and hasattr(self.tokenizer, "encoder")):
            raise InputError(f"open_clip:{self.model}: its text tower is not of CLIP's own kind, so that a picture "
                             "cannot become a word of it; choose another, or --model sum")

    @cached_property
    def picture_id(self) -> int:
        """The id that stands for the picture's word: 259 of CLIP's."""
        (found,) = self.tokenizer.encode(PICTURE)
        return found

    def fingerprint(self) -> str:
        """Twelve digits that change with whatever it makes of a text."""
        return fingerprint(self.clip.state_dict(), self.model)[:12]

    def ids(self, texts: Sequence[str]) -> Tensor:
        """N texts -> (N, C) ids on the CPU; what is too long is cut, its end is kept."""
        readable = [text.encode("utf-8", "replace").decode() for text in texts]  # half a surrogate pair is no text
        return self.tokenizer(readable)

    def fitting(self, template: str, text: str) -> str:
        """So much of a text, from its start, that the template with it keeps all of its own words."""
        over = len(self.tokenizer.encode(template.replace("{}", text))) - (self.context - 2)
        if over > 0:
            text = self.tokenizer.decode(self.tokenizer.encode(text)[:-over]).strip()
        return text

    def states(self, ids: Tensor, words: Tensor | None = None, places: Tensor | None = None) -> Tensor:
        """(B, C) ids -> (B, L, w) after the last block, up to the last end, L <= C places. words: (B, w), which stand
        at the `places`, (B, C) bools, of their rows."""
        text, length = self.text, int(ids.argmax(1).max()) + 1
        vectors = text.token_embedding(ids[:, :length])                         # (B, L, w)
        if words is not None:
            vectors = torch.where(places[:, :length, None], words[:, None], vectors)
        vectors = vectors + text.positional_embedding[:length]
        return text.transformer(vectors, attn_mask=text.attn_mask[:length, :length].to(vectors))

    def encode(self, ids: Tensor, words: Tensor | None = None, places: Tensor | None = None) -> Tensor:
        """(B, C) ids -> (B, e), not normalised. words, places: as `states` has them. The end is the largest id."""
        if not self.is_causal:
            return self.clip.encode_text(ids)
        rows = torch.arange(len(ids), device=ids.device)
        ends = self.text.ln_final(self.states(ids, words, places)[rows, ids.argmax(1)])  # (B, w)
        projection = self.text.text_projection
        return projection(ends) if isinstance(projection, nn.Module) else ends @ projection
