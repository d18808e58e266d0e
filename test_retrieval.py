"""The retrieval test: recall@K of composed queries against a gallery. Returns numbers; prints and writes nothing.

Every image is encoded once. A query's rank is one plus the number of gallery images that score above its best
correct one, so nothing is sorted and the queries x gallery table is only ever held a few rows at a time.
Where several processes test together, each takes its share of the batches, which are the same batches, so that all
numbers are those of one process.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import distributed
from datasets import CompositionDataset, Judge, QuerySet
from image_store import DeviceStore, ImageStore, normalize_images, prefetch

COMPOSED_AT_ONCE = 1024                 # texts encoded, or queries composed
QUERIES_AT_ONCE = 512                   # fewer make slower products
SCORES_AT_ONCE = 2**24                  # of the queries x gallery table, at most: 64 MiB
NEVER = torch.iinfo(torch.long).max     # the rank of a query without a correct image: no hit at any K

Progress = Callable
Watch = Callable[[QuerySet, np.ndarray, Tensor, Tensor, list[np.ndarray]], None]


def no_progress(items, **_):
    return items


def encode_images(model, store: ImageStore | DeviceStore, ids: Sequence[int], batch_size: int, workers: int,
                  progress: Progress = no_progress) -> Tensor:
    """Features of the images with these ids, each read and encoded once: (len(ids), D)."""
    device = model.a.device
    batches = [ids[start:start + batch_size] for start in range(0, len(ids), batch_size)]
    mine = distributed.share(batches)
    pixels = prefetch(partial(store.batch, device=device), mine, workers)
    encoded = [model.encode_image(normalize_images(batch))
               for batch in progress(pixels, desc="encoding images", total=len(mine))]
    return distributed.collect(torch.cat([model.a.new_empty(0, model.image_dim), *encoded]), [*map(len, batches)])


def compose_queries(model, images: Tensor, texts: list[str]) -> Tensor:
    """(Q, D) source features, Q texts -> (Q, D) unit query vectors; each distinct text is encoded once."""
    def in_batches(make: Callable[[slice], Tensor], count: int, size: int) -> Tensor:
        """(count, size), each process making its share of the batches."""
        starts = range(0, count, COMPOSED_AT_ONCE)
        made = [make(slice(start, start + COMPOSED_AT_ONCE)) for start in distributed.share(starts)]
        lengths = [min(COMPOSED_AT_ONCE, count - start) for start in starts]
        return distributed.collect(torch.cat([images.new_empty(0, size), *made]), lengths)
    distinct = list(dict.fromkeys(texts))
    vectors = in_batches(lambda part: model.encode_text(distinct[part]), len(distinct), model.text_dim)
    row = {text: i for i, text in enumerate(distinct)}
    rows = torch.tensor([row[text] for text in texts], device=vectors.device)
    composed = in_batches(lambda part: model.compose(images[part], vectors[rows[part]]), len(texts), model.image_dim)
    return F.normalize(composed, dim=1)


class CorrectImages:
    """For a judge: which gallery positions are correct for a query, as flat (row, column) pairs of a chunk."""

    def __init__(self, judge: Judge, device):
        self.among = None if judge.among is None else torch.as_tensor(judge.among, device=device)
        labels = judge.gallery_labels if judge.among is None else judge.gallery_labels[judge.among]
        self.columns = torch.as_tensor(np.argsort(labels, kind="stable"), device=device)
        ordered = np.sort(labels, kind="stable")
        self.first = np.searchsorted(ordered, judge.query_labels, "left")       # (Q,) where a query's correct ones
        self.counts = np.searchsorted(ordered, judge.query_labels, "right") - self.first  # begin, and how many they are

    def pairs(self, chunk: slice) -> tuple[Tensor, Tensor]:
        first, counts = self.first[chunk], self.counts[chunk]
        rows = np.repeat(np.arange(len(counts)), counts)
        offsets = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        places = torch.as_tensor(np.repeat(first, counts) + offsets, device=self.columns.device)
        return torch.as_tensor(rows, device=self.columns.device), self.columns[places]


def count(compare: Callable, scores: Tensor, threshold: Tensor, room: Tensor) -> Tensor:
    """How many of each row's scores compare so with the row's threshold: (q, N), (q,) -> (q,) ints.

    Written as floats into `room` and summed by a matrix product: ten times as fast as summing booleans, exact to 2^24.
    """
    flags = room[:scores.numel()].view_as(scores)
    compare(scores, threshold[:, None], out=flags)
    return (flags @ flags.new_ones(scores.shape[1])).long()


def rank_of_best(scores: Tensor, rows: Tensor, columns: Tensor, room: Tensor) -> Tensor:
    """0-based rank of each row's best correct image, ties going to the earlier column: (q, N) -> (q,) ints.

    rows, columns: the correct images as pairs. A row with none, or with none but masked ones, gets NEVER.
    room: scratch of at least q * N floats.
    """
    correct = scores[rows, columns]
    best = scores.new_full((len(scores),), -torch.inf).scatter_reduce(0, rows, correct, "amax")
    above = count(torch.gt, scores, best, room)
    is_shared = count(torch.ge, scores, best, room) - above > 1                 # others score the same: rare
    shared = is_shared.nonzero()[:, 0]
    if len(shared):
        width, held = scores.shape[1], is_shared[rows].nonzero()[:, 0]
        rows, columns, correct = rows[held], columns[held], correct[held]       # of those rows alone
        leading = torch.where(correct == best[rows], columns, width)            # of equally good ones the first
        first = torch.full_like(best, width, dtype=torch.long).scatter_reduce(0, rows, leading, "amin")[shared, None]
        tied = scores[shared] == best[shared, None]
        above[shared] += (tied & (torch.arange(width, device=scores.device) < first)).sum(1)
    return torch.where(best == -torch.inf, NEVER, above)


@torch.inference_mode()
def ranks(queries: Tensor, gallery: Tensor, own: np.ndarray, judges: Sequence[Judge]) -> list[np.ndarray]:
    """For each judge, the (Q,) 0-based rank of every query's best correct image.

    queries: (Q, D), gallery: (N, D), unit rows. own: (Q,) gallery position left out of a query's ranking, -1 for none.
    Raises FloatingPointError where features are not finite: every comparison with NaN is false, which would count
    as a perfect rank.
    """
    if not all(part.isfinite().all() for rows in (queries, gallery) for part in rows.split(1024)):  # whole: a copy more
        raise FloatingPointError("the model's features are not finite, so nothing can be ranked: the training diverged")
    correct = [CorrectImages(judge, queries.device) for judge in judges]
    own = torch.as_tensor(own, device=queries.device)
    found: list[list[Tensor]] = [[own.new_empty(0)] for _ in judges]
    step = max(1, min(QUERIES_AT_ONCE, SCORES_AT_ONCE // len(gallery)))
    table, room = queries.new_empty(step, len(gallery)), queries.new_empty(step * len(gallery))
    starts = range(0, len(queries), step)
    for start in distributed.share(starts):
        chunk = slice(start, start + step)
        scores = torch.mm(queries[chunk], gallery.T, out=table[:len(queries[chunk])])  # (q, N)
        masked = (own[chunk] >= 0).nonzero()[:, 0]
        scores[masked, own[chunk][masked]] = -torch.inf
        for judge_ranks, images in zip(found, correct, strict=True):
            ranked = scores if images.among is None else scores[:, images.among]
            judge_ranks.append(rank_of_best(ranked, *images.pairs(chunk), room))
    lengths = [min(step, len(queries) - start) for start in starts]
    return [distributed.collect(torch.cat(parts), lengths).cpu().numpy() for parts in found]


def shares(judges: Sequence[Judge], found: Sequence[np.ndarray]) -> dict[str, float]:
    """{recall_top{K}_{judge}: share of the queries with a correct image among the first K}, from each judge's ranks."""
    return {f"recall_top{k}_{judge.name}": float((rank < k).mean())
            for judge, rank in zip(judges, found, strict=True) for k in judge.ks}


def recalls(queries: Tensor, gallery: Tensor, own: np.ndarray, judges: Sequence[Judge]) -> dict[str, float]:
    """Recall@K of unit query vectors (Q, D) against a gallery of unit rows (N, D)."""
    return shares(judges, ranks(queries, gallery, own, judges))


@torch.inference_mode()
def evaluate(model, dataset: CompositionDataset, store: ImageStore | DeviceStore, batch_size: int = 32,
             workers: int = 2, seed: int = 0, progress: Progress = no_progress,
             baselines: bool = False, watch: Watch | None = None) -> dict[str, dict[str, float]]:
    """Test `model` on a split: {"model": {metric: value}}, and with `baselines` three more ways to answer.

    "source image alone" ranks by the source image's feature, "text alone" composes every text with the gallery's
    mean feature, "chance" is the expected recall of a random order. Deterministic; the model's mode is restored.
    watch: called for each query set with it, the gallery's image ids, unit query vectors (Q, D), the unit gallery
    (N, D), and each judge's (Q,) ranks.
    """
    was_training = model.training
    model.eval()
    try:
        task = dataset.task(seed)
        used = np.unique(np.concatenate([task.gallery, *(queries.sources for queries in task.query_sets)]))
        features = encode_images(model, store, used, batch_size, workers, progress)
        def rows(ids):
            return features[torch.as_tensor(np.searchsorted(used, ids), device=features.device)]
        gallery = rows(task.gallery)
        average = gallery.mean(0, keepdim=True)
        gallery = F.normalize(gallery, dim=1)

        def judged(asked: QuerySet, source: Tensor) -> dict[str, float]:
            queries = compose_queries(model, source, asked.texts)
            found = ranks(queries, gallery, asked.own, asked.judges)
            if watch is not None:
                watch(asked, task.gallery, queries, gallery, found)
            return shares(asked.judges, found)
        ways: dict[str, Callable[[QuerySet, Tensor], dict]] = {"model": judged}
        if baselines:
            ways["source image alone"] = lambda asked, source: recalls(
                F.normalize(source, dim=1), gallery, asked.own, asked.judges)
            ways["text alone"] = lambda asked, source: recalls(
                compose_queries(model, average.expand_as(source), asked.texts), gallery, asked.own, asked.judges)
            ways["chance"] = lambda asked, source: chance(asked)
        return {way: dataset.with_means({name: value for asked in task.query_sets
                                         for name, value in answer(asked, rows(asked.sources)).items()})
                for way, answer in ways.items()}
    finally:
        model.train(was_training)


def chance(asked: QuerySet) -> dict[str, float]:
    """Expected recalls of a random order: 1 - C(N - m, K) / C(N, K) for a query with m correct among N."""
    values = {}
    for judge in asked.judges:
        images = CorrectImages(judge, "cpu")
        own = asked.own
        total = len(judge.gallery_labels if judge.among is None else judge.among) - (own >= 0)
        own_is_correct = (own >= 0) & (judge.gallery_labels[own] == judge.query_labels)
        correct = images.counts - own_is_correct
        for k in judge.ks:
            miss = np.ones(len(own))
            for drawn in range(k):                                              # each draw misses all m once more
                left = np.maximum(total - drawn, 1)
                miss *= np.clip((left - correct) / left, 0, 1)
            values[f"recall_top{k}_{judge.name}"] = float(1 - miss.mean())
    return values
