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
    shifted, and divided by the first's size, both: so it was published; then they are at least 0, so that an image of
    which both are 0 comes before one of which one alone is."""
    if least is not None:
        of_image, of_text = ((similar - own) / abs(least[0])
                             for similar, own in zip((of_image, of_text), least, strict=True))
    of_image, of_text = of_image.clamp(min=0), of_text.clamp(min=0)
    return of_text * of_image - ONE_ALONE * (of_text + of_image).square()


def in_context(text: str, words: Sequence[str]) -> list[str]:
    """The sentences that stand for a text: beside each of the words, after it and before it."""
    return [*(f"{word} {text}" for word in words), *(f"{text} {word}" for word in words)]


class BASIC(ZeroShot):
    """corpora: texts of subjects, as `dog`, and of styles, as `a cartoon`, both made vectors when weights are loaded:
    `subjects`, (A, e), and `projection`, (e, e), are kept with the model.

    The images' mean and the least similarities are the gallery's that is searched, which `meet` is told of. The
    original has them of a million pictures of the web and of synthetic ones, which are not to be had.
    """

    is_of_vectors = False               # but of the gallery's, too

    def __init__(self, *towers, **how):
        super().__init__(*towers, **how)
        self.words = self.corpora[0] if self.corpora else []
        self.register_buffer("subjects", torch.zeros(max(len(self.words), 1), self.image_dim))
        self.register_buffer("projection", torch.eye(self.image_dim))
        self.about = (f"BASIC: {len(self.words)} subjects, the first {len(self.words[:CONTEXTS])} of them read beside "
                      "each text; the pictures' mean and the least similarities are estimated from the gallery that is "
                      "ranked")
        self.gallery = self.mean = None                                         # (N, e) centred, (e,)
        self.least = (-1.0, -1.0)

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

    @torch.inference_mode()
    def encode_text(self, texts: list[str]) -> Tensor:
        """B texts -> (B, e): each the mean of the sentences that it stands in."""
        words = self.words[:CONTEXTS]
        return torch.stack([F.normalize(self.text_vectors(in_context(text, words) or [text]), dim=1).mean(0)
                            for text in texts])

    def meet(self, gallery: Tensor) -> None:
        self.mean = gallery.mean(0)
        self.gallery = gallery - self.mean
        some = self.gallery[torch.linspace(0, len(gallery) - 1, min(SAMPLES, len(gallery)), device=gallery.device)
                            .long()]
        texts = self.subjects - self.subjects.mean(0)
        self.least = float((some @ some.T).min()), float((texts @ some.T).min())

    def compose(self, image: Tensor, text: Tensor) -> Tensor:                   # (B, e), (B, e) -> (B, 2 e + 2)
        image = F.normalize(image, dim=1) - self.mean
        image = expanded(image, image @ self.projection @ self.gallery.T, self.gallery) @ self.projection
        text = F.normalize(text, dim=1) - self.subjects.mean(0)
        return torch.cat([image, text, image @ self.mean[:, None], text @ self.mean[:, None]], dim=1)

    def as_query(self, composed: Tensor) -> Tensor:
        return composed

    def score(self, queries: Tensor, gallery: Tensor) -> Tensor:
        image, text, image_of_mean, text_of_mean = queries.split([self.image_dim, self.image_dim, 1, 1], dim=1)
        return combined(image @ gallery.T - image_of_mean, text @ gallery.T - text_of_mean, self.least)
