"""What the zero-shot composers share: both towers of one CLIP model, within the model and never trained, so that a
picture's and a text's vectors lie in one space from the beginning.

Sizes are letters: B rows, e the size of that space, w of a word's vector, C the places of a row of ids.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from image_encoders import ImageSide, image_encoder, load_image_weights, traits
from machine.device import send
from machine.errors import InputError
from machine.progress import no_progress
from torch_function import ByCosine
from zero_shot.prompts import template_of, with_word, without_word
from zero_shot.tower import TextTower


class ZeroShot(ImageSide, ByCosine):
    """Two frozen towers. encoder: open_clip:MODEL/TAG, of both. image_size: S. prompt: a name of PROMPTS, 'auto' for
    the composer's own, or a text with {}. corpora: texts that it depends on, see BASIC.

    Raises InputError for other encoders and prompts.
    """

    is_of_vectors = True                # whether it composes of nothing but an image's and a text's vector
    frozen = True
    learns_from = ""                    # what kind of dataset it is trained on; '' if it learns nothing
    own_prompt = "text"
    betas, eps = (0.9, 0.999), 1e-8     # of AdamW
    about = ""                          # what a test says of it, where its name does not
    example_texts: Sequence[str] = ()
    sentence_vectors = vocabulary = learned_words = None                        # of the trained composers

    def __init__(self, encoder: str, image_size: int, prompt: str = "auto",
                 corpora: Sequence[Sequence[str]] = ()):
        super().__init__()
        self.text_tower, self.traits, self.corpora = TextTower(encoder), traits(encoder), corpora
        self.img_model = image_encoder(encoder, None, image_size).requires_grad_(False)
        self.image_dim = self.traits.width                                      # e
        try:
            self.template = template_of(prompt, self.own_prompt)
        except ValueError as error:
            raise InputError(f"--prompt {error}") from None
        self.img_model.eval()

    @classmethod
    def of(cls, recipe, _sentence_vectors=None) -> "ZeroShot":
        """Of a record, with random weights. Raises InputError for towers of two models."""
        if recipe.image_encoder != recipe.text_encoder:
            raise InputError(f"--model {recipe.composer} needs both towers of one CLIP model, not --image_encoder "
                             f"{recipe.image_encoder} and --text_encoder {recipe.text_encoder}; pass --image_encoder "
                             "open_clip:MODEL/TAG and the same as --text_encoder")
        return cls(recipe.image_encoder, recipe.image_size, **cls.settings(recipe))

    @classmethod
    def settings(cls, recipe) -> dict:
        """What a composer is told beside its towers."""
        return {"prompt": recipe.prompt, "corpora": recipe.corpora}

    def load_weights(self, weights: str, progress: Callable = no_progress) -> None:
        """Of both towers: 'imagenet' for the name's own, 'none' for random ones, or a file. Raises InputError."""
        load_image_weights(self.img_model, weights, self.recipe.image_encoder)
        self.text_tower.load(weights)

    def give(self, given: dict[str, Tensor]) -> None:
        """Put in what was read for a composer that depends on more than its towers. Raises InputError."""
        raise InputError(f"--pictures_mean and --synthetic are BASIC's: leave them out with {self.recipe.composer}")

    def train(self, mode: bool = True) -> "ZeroShot":
        super().train(mode)
        self.img_model.eval()
        self.text_tower.eval()
        return self

    @property
    def a(self) -> Tensor:
        """The model's own scale of cosines, as a logarithm; what says where the model is."""
        return self.text_tower.clip.logit_scale

    @property
    def text_dim(self) -> int:
        """T, of what `encode_text` gives."""
        return self.image_dim

    def freeze_backbone(self) -> None:
        """Nothing of it learns anyway."""

    def parameter_groups(self, rate: float) -> list[dict]:
        return [{"params": [weight for weight in self.parameters() if weight.requires_grad], "lr": rate}]

    def watched(self) -> dict[str, float]:
        """What is worth watching in training beside the losses."""
        return {}

    def text_vectors(self, texts: Sequence[str]) -> Tensor:
        """B texts -> (B, e), not normalised: the prompt with each, without a picture's word."""
        ids = self.text_tower.ids([without_word(self.template, text) for text in texts])
        return self.text_tower.encode(send(ids, self.a.device)).to(self.a.dtype)

    def encode_text(self, texts: list[str]) -> Tensor:
        """B texts -> (B, T), as `compose` takes them: here vectors."""
        return self.text_vectors(texts)

    def encode_captions(self, captions: Sequence[str]) -> Tensor:
        """B texts as they are -> (B, e) float32 on the CPU, not normalised."""
        with torch.inference_mode():
            return self.text_tower.encode(send(self.text_tower.ids(captions), self.a.device)).float().cpu()

    def caption_fingerprint(self) -> str:
        """Twelve digits that change with whatever `encode_captions` depends on."""
        return self.text_tower.fingerprint()

    def compose(self, image: Tensor, text: Tensor) -> Tensor:
        """(B, e), (B, T) -> (B, Q): what `score` takes."""
        raise NotImplementedError

    def forward(self, source: Tensor, texts: list[str], target: Tensor) -> dict[str, Tensor]:
        raise InputError("this composer learns nothing: test it, with --test_only True")


class PseudoWord(ZeroShot):
    """A picture becomes a word of the text tower: phi of its vector stands where the prompt has $."""

    is_of_vectors = False               # but of a text's ids
    phi: Callable[[Tensor], Tensor]     # (B, e) -> (B, w)

    def __init__(self, *towers, **how):
        super().__init__(*towers, **how)
        self.text_tower.check()
        if "$" not in self.template:
            raise InputError(f"--prompt {self.template!r}: it has no $, which stands for the picture's word; give one, "
                             "as in 'a photo of $ that {}'")
        self.phi = self.make_phi(self.image_dim, self.text_tower.width)

    @property
    def text_dim(self) -> int:
        return self.text_tower.context                                          # C

    def make_phi(self, size: int, width: int) -> nn.Module:
        """(B, size) -> (B, width), with random weights, its names those of the original's files."""
        raise NotImplementedError

    def encode_text(self, texts: list[str]) -> Tensor:
        """B texts -> (B, C): the ids of the prompt with each, as whole numbers of the model's kind."""
        tower = self.text_tower
        rows = [with_word(self.template, tower.fitting(self.template, text)) for text in texts]
        return send(tower.ids(rows), self.a.device).to(self.a.dtype)            # under 2**24: exact

    def compose(self, image: Tensor, text: Tensor) -> Tensor:
        ids = text.long()                                                       # (B, C)
        return self.text_tower.encode(ids, self.phi(image), ids == self.text_tower.picture_id)  # (B, e)
