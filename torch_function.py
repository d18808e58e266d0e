"""Losses over features: feature normalization, the metric losses, and their weighted sum with a composer's own."""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def cosines(queries: Tensor, gallery: Tensor) -> Tensor:
    """Unit rows (B, D), (N, D) -> (B, N): what queries are compared with images by."""
    return queries @ gallery.T


class ByCosine:
    """How a composer's answers are ranked, of a class that has `image_dim`, D: a query is a unit vector, and cosines
    compare it with a gallery's. Others say all four."""

    frozen = False                      # whether it is made of a CLIP model's two towers, which stay as they are
    template = "{}"                     # what it puts a query's text into
    score = staticmethod(cosines)       # of what `as_query` gives, (B, Q), with unit rows (N, D): (B, N)

    @property
    def query_dim(self) -> int:
        """Q."""
        return self.image_dim

    def as_query(self, composed: Tensor) -> Tensor:
        """What `compose` gives -> (B, Q)."""
        return F.normalize(composed, dim=1)

    def meet(self, gallery: Tensor) -> None:
        """Before queries are composed that are to be ranked against a gallery, unit rows (N, D): what depends on it."""


class NormalizationLayer(nn.Module):
    """L2-normalize each row, then multiply by one learned scale (TIRG section 3.3; initial value 4)."""

    def __init__(self, initial_scale: float = 4.0):
        super().__init__()
        self.norm_s = nn.Parameter(torch.full((1,), initial_scale))

    def forward(self, features: Tensor) -> Tensor:                              # (B, D) -> (B, D)
        return self.norm_s * F.normalize(features, dim=1)


def draw_negatives(batch_size: int, count: int = 3, device=None) -> Tensor:
    """(2B, count) row numbers: for each row of (query, target) stacked, distinct random rows but itself and its twin.

    Where the batch has fewer than `count` such rows (B = 2), all of them are taken.
    """
    never = torch.eye(batch_size, dtype=torch.bool, device=device).repeat(2, 2)  # (2B, 2B): itself and its twin
    lots = torch.rand(never.shape, device=device).masked_fill_(never, -1)       # torch.multinomial waits for the device
    return lots.topk(min(count, 2 * batch_size - 2)).indices


def soft_triplet_loss(query: Tensor, target: Tensor, negatives: Tensor | None = None) -> Tensor:
    """mean log(1 + exp(d_pos - d_neg)) over 2B anchors and their negatives; d is the squared Euclidean distance.

    TIRG eq. 4 and 5 with soft-triplet kernel, M = 3. The published runs were tuned with a hand-written backward pass
    that returned HALF of this loss's gradient; so does this function, while its value is the whole loss.

    query, target: (B, D), B >= 2. negatives: (2B, n) row numbers into (query, target) stacked; drawn if not given.
    """
    rows = torch.cat([query, target])                                           # (2B, D)
    if negatives is None:
        negatives = draw_negatives(len(query), device=query.device)             # (2B, 3)
    positive = (query - target).square().sum(dim=1).repeat(2)                   # (2B,): the twin is the only positive
    negative = (rows[:, None] - rows[negatives]).square().sum(dim=2)            # (2B, 3)
    half = 0.5 * F.softplus(positive[:, None] - negative).mean()
    return half + half.detach()


def batch_based_classification_loss(query: Tensor, target: Tensor) -> Tensor:
    """Cross entropy over the batch: row i of query @ target^T should pick column i (ComposeAE eq. 8). (B, D) twice."""
    logits = query @ target.T                                                   # (B, B)
    return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))


def caption_aware_classification_loss(query: Tensor, target: Tensor, target_labels: Tensor | None = None) -> Tensor:
    """Cross entropy over the batch where row i may pick any target that is as right as its own. (B, D) twice.

    target_labels: (B,) ints, equal for targets that are right for one another's queries, as those of one caption are;
    without them each is right for its own query alone, as in batch_based_classification_loss.
    """
    if target_labels is None:
        target_labels = torch.arange(len(query), device=query.device)
    return multi_positive_losses(query @ target.T, target_labels[:, None] == target_labels).mean()


def multi_positive_losses(logits: Tensor, positive: Tensor) -> Tensor:
    """Cross entropy of each row, which may pick any of its positive columns, at least one. (B, C) twice -> (B,)."""
    return logits.logsumexp(1) - logits.masked_fill(~positive, -torch.inf).logsumexp(1)


def text_prediction_loss(predicted: Tensor, text: Tensor, text_labels: Tensor) -> Tensor:
    """Cross entropy over the batch's texts, where row i of `predicted` should pick text i or an equal one, less log 2
    and at least 0; scores are cosines times 10. (B, T) twice. So a row that gives its text half of the probability is
    done: to predict more would cost the image features what finds images (docs/experiments.md). The texts are targets
    alone: no gradient reaches them.

    text_labels: (B,) ints, equal for equal texts, whose vectors may differ, as an LSTM's do by dropout.
    """
    scores = 10 * F.normalize(predicted, dim=1) @ F.normalize(text.detach(), dim=1).T    # (B, B)
    return F.relu(multi_positive_losses(scores, text_labels[:, None] == text_labels) - math.log(2)).mean()


def both_ways_classification_loss(rows: Tensor, columns: Tensor) -> Tensor:
    """The mean of the two cross entropies over the batch, of the rows of rows @ columns^T and of its columns: CLIP's,
    as Pic2Word has it. One of the two has the scale on it. (B, e) twice."""
    logits = rows @ columns.T                                                   # (B, B)
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


LOSSES = {"soft_triplet": soft_triplet_loss, "batch_based_classification": batch_based_classification_loss,
          "caption_aware_classification": caption_aware_classification_loss}


def composition_losses(features: dict[str, Tensor], loss: str,
                       gather: Callable[[Tensor], Tensor] = lambda own: own,
                       target_labels: Tensor | None = None) -> dict[str, Tensor]:
    """{logged name: scalar} for what a composer's forward gave; a term is there when its two features are.

    `loss` names the metric loss, which judges query against target (weight 1) and, for ComposeAE, the conjugate
    composition against the source (0.01); the two reconstructions weigh 0.1 each (ComposeAE eq. 9 to 12).
    TransformerAE's text that is predicted from two images weighs 1. LinCIR and Pic2Word have a loss of their own each
    (zero_shot/), and neither query nor target.
    gather: (B, D) of this process -> (all, D): where several share a batch, every query meets the targets of all.
    target_labels: (B,) ints of this process, equal for targets of one caption; of the losses, one asks for them.
    """
    def metric_loss(query: Tensor, target: Tensor, **known: Tensor) -> Tensor:
        return LOSSES[loss](gather(query), gather(target), **known)

    def gathered(compare: Callable) -> Callable:
        return lambda own, other: compare(gather(own), gather(other))

    def text_prediction(predicted: Tensor, text: Tensor) -> Tensor:
        return text_prediction_loss(gather(predicted), gather(text), gather(features["text_labels"]))
    aware = target_labels is not None and LOSSES[loss] is caption_aware_classification_loss
    terms = {
        loss: (1.0, partial(metric_loss, target_labels=gather(target_labels)) if aware else metric_loss, "query",
               "target"),
        "L2_loss": (0.1, F.mse_loss, "decoded_image", "image"),
        "L2_loss_text": (0.1, F.mse_loss, "decoded_text", "text"),
        "rot_sym_loss": (0.01, metric_loss, "rotated_back", "source"),
        "told_text_loss": (1.0, text_prediction, "text_prediction", "text"),
        "said_anew_loss": (1.0, F.mse_loss, "said_anew", "caption"),
        "pictures_word_loss": (1.0, gathered(both_ways_classification_loss), "picture", "said_of_it"),
    }
    present = {name: term for name, term in terms.items() if term[2] in features}
    losses = {name: compare(features[a], features[b]) for name, (_, compare, a, b) in present.items()}
    losses["total training loss"] = sum(present[name][0] * value for name, value in losses.items())
    return losses
