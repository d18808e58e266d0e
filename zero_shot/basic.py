"""BASIC (arXiv 2510.25387, "training-free scoring"): what a picture shows and what a text asks for, each compared with
the gallery by itself, and an image is right if both say so.

A picture's vector is centred and projected to the directions in which things differ, and not styles: those of the
covariance of subjects' texts less a part of that of styles' texts. A text's vector is the mean of many sentences that
it can stand in. Both similarities are shifted by the least that occurs, and multiplied, less what one alone can do.
All vectors are unit rows before anything else. Sizes are letters: B queries, N images, e a vector's.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from machine.errors import InputError
from machine.progress import no_progress
from zero_shot.composer import ZeroShot

STYLES_WEIGHT, COMPONENTS = 0.2, 250
NEIGHBOURS, NEIGHBOURS_SCALE = 25, 0.1  # of the expansion
ONE_ALONE = 0.1                         # what is taken off for one similarity without the other: Harris' lambda
CONTEXTS = 100                          # subjects that a text is read beside, before and after it
SAMPLES = 100                           # images of the gallery, from which the least similarity is taken
AT_ONCE = 256                           # texts of a corpus
# What else than a gallery can tell the pictures' mean, (1, e), and the least similarities: made-up pictures' vectors
# and texts', (M, e) each, as the model makes them.
GIVEN = MEAN, PICTURES, TEXTS = "given_mean", "given_pictures", "given_texts"


def contrast(subjects: Tensor, styles: Tensor, weight: float = STYLES_WEIGHT) -> Tensor:
    """Unit rows of A subjects' and B styles' texts, (A, e), (B, e), at least two each -> (e, e): the covariance of the
    first less so much of the second's. Both are centred by the subjects' mean, and each entry is 1e-5 too large: so it
    was published."""
    mean = subjects.mean(0)
    parts = [(rows - mean).T @ (rows - mean) / (len(rows) - 1) for rows in (subjects, styles)]
    return (1 - weight) * parts[0] - weight * parts[1] + 1e-5


def projection(matrix: Tensor, components: int = COMPONENTS) -> Tensor:
    """(e, e) symmetric -> (e, e): onto the eigenvectors of its largest eigenvalues, so many, and positive ones alone.

    Raises ValueError for less than one: a share of the energy was never what that gave.
    """
    if components < 1:
        raise ValueError(f"{components} components: a number from 1 is wanted, a share of the energy is not known")
    values, vectors = torch.linalg.eigh(matrix.double())                        # ascending
    kept = vectors[:, values > 0][:, -int(components):]
    return (kept @ kept.T).to(matrix.dtype)


def expanded(image: Tensor, similar: Tensor, gallery: Tensor, neighbours: int = NEIGHBOURS) -> Tensor:
    """Queries' centred vectors (B, e), their similarities (B, N) to centred images (N, e) -> (B, e): the mean of each
    query and of the images that are most similar to it, of all where there are fewer, weighted by similarity."""
    best, places = similar.topk(min(neighbours, len(gallery)), dim=1)           # (B, n)
    weights = (NEIGHBOURS_SCALE * torch.cat([best, torch.ones_like(best[:, :1])], 1)).softmax(1)
    near = torch.cat([gallery[places], image[:, None]], 1)                      # (B, n + 1, e)
    return (weights[:, :, None] * near).sum(1)


def combined(of_image: Tensor, of_text: Tensor, least: tuple[float, float] | None) -> Tensor:
    """Two similarities of one shape -> one. least: that of a picture and of a text with any image, by which they are
    shifted, and divided by the first's size, both: so it was published (a size of 0, of a gallery of equal images, by
    nothing); then they are at least 0, so that an image of which both are 0 comes before one of which one alone is."""
    if least is not None:
        of_image, of_text = ((similar - own) / (abs(least[0]) or 1.0)
                             for similar, own in zip((of_image, of_text), least, strict=True))
    of_image, of_text = of_image.clamp(min=0), of_text.clamp(min=0)
    return of_text * of_image - ONE_ALONE * (of_text + of_image).square()


def in_context(text: str, words: Sequence[str]) -> list[str]:
    """The sentences that stand for a text: beside each of the words, after it and before it."""
    return [*(f"{word} {text}" for word in words), *(f"{text} {word}" for word in words)]


class BASIC(ZeroShot):
    """corpora: texts of subjects, as `dog`, and of styles, as `a cartoon`, both made vectors when weights are loaded:
    `subjects`, (A, e), and `projection`, (e, e), are kept with the model.

    The images' mean and the least similarities are the gallery's that is searched, which `meet` is told of, unless
    they are given (GIVEN), as the original has them: of a million pictures of the web and of synthetic ones.
    """

    is_of_vectors = False               # but of the gallery's, too
    given_mean: Tensor                  # (1, e), or (0, e) if it is the gallery's
    given_pictures: Tensor              # (M, e), (M', e) unit rows, or (0, e)
    given_texts: Tensor

    def __init__(self, *towers, expansion: int = NEIGHBOURS, contexts: int = CONTEXTS,
                 given: dict[str, int] | None = None, **how):
        """expansion: images that a query is averaged with, contexts: subjects that a text is read beside, 0 for none
        each. given: how many rows there are of each of GIVEN."""
        super().__init__(*towers, **how)
        self.words, self.expansion, self.contexts = self.corpora[0] if self.corpora else [], expansion, contexts
        self.register_buffer("subjects", torch.zeros(max(len(self.words), 1), self.image_dim))
        self.register_buffer("projection", torch.eye(self.image_dim))
        for name in GIVEN:
            rows = (given or {}).get(name, 0)
            self.register_buffer(name, torch.zeros(rows, self.image_dim), persistent=rows > 0)
        self.gallery = self.mean = None                                         # (N, e) centred, (e,)
        self.least = (-1.0, -1.0)

    @classmethod
    def settings(cls, recipe) -> dict:
        return {**super().settings(recipe), "expansion": recipe.expansion, "contexts": recipe.contexts,
                "given": recipe.given}

    @property
    def about(self) -> str:
        beside = f"the first {len(self.words[:self.contexts])} of them read beside each text" if self.contexts else (
            "none of them read beside a text")
        near = f"queries averaged with {self.expansion} images" if self.expansion else "queries averaged with no image"
        estimated = [what for what, rows in (("the pictures' mean", self.given_mean),
                                             ("the least similarities", self.given_pictures)) if not len(rows)]
        told = (f"{' and '.join(estimated)} estimated from the gallery that is ranked" if estimated else
                "nothing estimated from the gallery that is ranked")
        return f"BASIC: {len(self.words)} subjects, {beside}; {near}; {told}"

    @property
    def query_dim(self) -> int:
        return 2 * self.image_dim + 2

    def load_weights(self, weights: str, progress: Callable = no_progress) -> None:
        """As the others', and what the corpora give. Raises InputError where these are not two texts each."""
        if len(self.corpora) != 2 or min(map(len, self.corpora)) < 2:
            raise InputError("--model BASIC needs texts of what pictures show and of how: pass --subjects FILE and "
                             "--styles FILE, of two lines at least, a text each")
        super().load_weights(weights)
        vectors = []
        for texts in self.corpora:
            parts = [texts[start:start + AT_ONCE] for start in range(0, len(texts), AT_ONCE)]
            vectors.append(torch.cat([F.normalize(self.encode_captions(part), dim=1)
                                      for part in progress(parts, desc="corpus", total=len(parts))]).to(self.a.device))
        self.subjects, self.projection = vectors[0], projection(contrast(*vectors))

    def give(self, given: dict[str, Tensor]) -> None:
        for name, rows in given.items():
            if rows.shape[1] != self.image_dim:
                raise InputError(f"--{'pictures_mean' if name == MEAN else 'synthetic'}: its vectors have "
                                 f"{rows.shape[1]} numbers, this model's have {self.image_dim}; they are of another "
                                 "CLIP model")
        self.load_state_dict(given, strict=False)

    @torch.inference_mode()
    def encode_text(self, texts: list[str]) -> Tensor:
        """B texts -> (B, e): each the mean of the sentences that it stands in."""
        words = self.words[:self.contexts]
        return torch.stack([F.normalize(self.text_vectors(in_context(text, words) or [text]), dim=1).mean(0)
                            for text in texts])

    def meet(self, gallery: Tensor) -> None:
        self.mean = self.given_mean[0] if len(self.given_mean) else gallery.mean(0)
        self.gallery = gallery - self.mean
        pictures, texts = self.given_pictures, self.given_texts                 # (M, e), (M', e)
        if not len(pictures):
            some = torch.linspace(0, len(gallery) - 1, min(SAMPLES, len(gallery)), device=gallery.device).long()
            pictures, texts = gallery[some], self.subjects
        pictures, texts = pictures - self.mean, texts - self.subjects.mean(0)
        self.least = float((pictures @ pictures.T).min()), float((texts @ pictures.T).min())

    def compose(self, image: Tensor, text: Tensor) -> Tensor:                   # (B, e), (B, e) -> (B, 2 e + 2)
        image = F.normalize(image, dim=1) - self.mean
        if self.expansion:
            image = expanded(image, image @ self.projection @ self.gallery.T, self.gallery, self.expansion)
        image = image @ self.projection
        text = F.normalize(text, dim=1) - self.subjects.mean(0)
        return torch.cat([image, text, image @ self.mean[:, None], text @ self.mean[:, None]], dim=1)

    def as_query(self, composed: Tensor) -> Tensor:
        return composed

    def score(self, queries: Tensor, gallery: Tensor) -> Tensor:
        image, text, image_of_mean, text_of_mean = queries.split([self.image_dim, self.image_dim, 1, 1], dim=1)
        return combined(image @ gallery.T - image_of_mean, text @ gallery.T - text_of_mean, self.least)
