"""The retrieval test: recall@K and mAP@K of composed queries against a gallery. Returns numbers; prints and writes
nothing.

Every image is encoded once. The rank of a correct image is one plus the number of gallery images that score above it,
so nothing is sorted and the queries x gallery table is only ever held a few rows at a time. Recall asks for the best
correct one's alone.
Where several processes test together, each takes its share of the batches, which are the same batches, so that all
numbers are those of one process.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.base import CompositionDataset, QuerySet, ways_of
from benchmarks.metrics import Judged
from machine import distributed
from machine.compiled import compiled
from machine.device import send
from machine.feature_store import FeatureStore
from machine.image_store import DeviceStore, ImageStore
from machine.progress import no_progress
from machine.threads import prefetch
from torch_function import cosines
from zero_shot.simple import beside

TEXTS_AT_ONCE = 1024
COMPOSED_AT_ONCE = {"cpu": 256, "cuda": 1024}                               # by each of a CPU's threads, or by a GPU
# Ranked at once by each of a CPU's threads, or by a GPU, and at most so many scores: 32 MiB a thread, or 128 in all.
QUERIES_AT_ONCE, SCORES_AT_ONCE = {"cpu": 256, "cuda": 4096}, {"cpu": 2**23, "cuda": 2**25}
NEVER = np.iinfo(np.int64).max          # the rank of what is not there, as a correct image: no hit at any K
IMAGE, TEXT, SOLVED = "source image alone", "text alone", "queries solved by"
OF_TWO_TOWERS = {"image": IMAGE, "text": TEXT, "sum": "image + text", "product": "image x text"}    # of one space

Store = ImageStore | DeviceStore | FeatureStore
Progress = Callable
Ask = Callable[[QuerySet, Tensor], Tensor]  # of a query set, and rows of its sources' features: what `score` takes
Score = Callable[[Tensor, Tensor], Tensor]  # (q, Q) queries, (N, D) unit rows -> (q, N), the higher the better
Watch = Callable[[QuerySet, np.ndarray, Tensor, Tensor, list[np.ndarray]], None]


def encoder_batch(device: torch.device, store: Store) -> int:
    """Images encoded at once, where the user does not say: what an encoder's caches hold, or fills a GPU; more of those
    that only its last layer is given."""
    if isinstance(store, FeatureStore):
        return 1024
    return 256 if device.type == "cuda" else 32


def in_parts(device: torch.device) -> tuple[str, Callable]:
    """Which of the sizes above count there, and what makes the parts."""
    return ("cpu", on_each_core) if device.type == "cpu" else ("cuda", map)


def encode_images(model, store: Store, ids: Sequence[int], batch_size: int, workers: int,
                  progress: Progress = no_progress) -> Tensor:
    """Features of the images with these ids, each read and encoded once: (len(ids), D)."""
    device = model.a.device
    batches = [ids[start:start + batch_size] for start in range(0, len(ids), batch_size)]
    mine = distributed.share(batches)
    pixels = prefetch(partial(store.batch, device=device), mine, workers)
    encoded = [model.encode_image(batch) for batch in progress(pixels, desc="encoding images", total=len(mine))]
    return distributed.collect(torch.cat([model.a.new_empty(0, model.image_dim), *encoded]), [*map(len, batches)])


@torch.inference_mode()
def compose_queries(model, images: Tensor, sources: Tensor, texts: list[str],
                    progress: Progress = no_progress) -> Tensor:
    """(N, D) features, (Q,) rows of the source images in it, Q texts -> (Q, D) unit query vectors, or what else the
    model's `score` takes; each distinct text is encoded once. A query of several ways is the mean of theirs."""
    ways = [ways_of(text) for text in texts]
    if any(len(each) > 1 for each in ways):
        counts = torch.tensor([*map(len, ways)], device=sources.device)         # (Q,)
        each = compose_queries(model, images, sources.repeat_interleave(counts), [*chain(*ways)], progress)
        query = torch.arange(len(ways), device=sources.device).repeat_interleave(counts)
        return model.as_query(each.new_zeros(len(ways), each.shape[1]).index_add_(0, query, each) / counts[:, None])
    def in_batches(make: Callable[[slice], Tensor], count: int, at_once: int, size: int, each_part: Callable,
                   what: str) -> Tensor:
        """(count, size), each process making its share of the batches."""
        parts = [slice(start, min(start + at_once, count)) for start in range(0, count, at_once)]
        mine, lengths = distributed.share(parts), [part.stop - part.start for part in parts]
        own = distributed.share(lengths)
        made = images.new_empty(sum(own), size)                                 # put together later, it would be copied

        def put(place: tuple[slice, Tensor]) -> None:
            part, rows = place
            rows.copy_(make(part))
        for _ in progress(each_part(put, zip(mine, made.split(own), strict=True)), desc=what, total=len(mine)):
            pass
        return distributed.collect(made, lengths)
    distinct = list(dict.fromkeys(texts))
    vectors = in_batches(lambda part: model.encode_text(distinct[part]), len(distinct), TEXTS_AT_ONCE, model.text_dim,
                         map, "encoding texts")
    row = {text: i for i, text in enumerate(distinct)}
    rows = torch.tensor([row[text] for text in texts], device=vectors.device)
    kind, each_part = in_parts(images.device)
    if hasattr(model, "compose_pairs"):                                         # does what it can once an image or text
        used = torch.zeros(len(images), dtype=torch.bool, device=images.device).index_fill_(0, sources, True)
        compose = model.compose_pairs(images[used], vectors)
        sources = (used.cumsum(0) - 1)[sources]
    else:
        def compose(image: Tensor, text: Tensor) -> Tensor:
            return model.compose(images[image], vectors[text])
    return in_batches(lambda part: model.as_query(compose(sources[part], rows[part])), len(texts),
                      COMPOSED_AT_ONCE[kind], model.query_dim, each_part, "composing queries")


class CorrectImages:
    """For a metric: which images are correct for a query, as places among those it looks at; and how many of their
    ranks are asked for, `width`, of those among the first `depth`."""

    def __init__(self, metric: Judged):
        self.among = metric.among
        self.places, self.first, self.counts = metric.correct()
        self.candidates, self.pessimistic, self.depth = metric.candidates, metric.pessimistic, metric.depth
        self.width = max(1, min(self.depth, int(self.counts.max(initial=0))))


@compiled
def rank_rows(scores, among, places, first, counts, width, depth, pessimistic):
    """0-based ranks of each row's best correct images, (q, N) -> (q, width) ints, ties going to the earlier image; or
    `pessimistic`, to all others.

    Of row q it looks at `among`, or at all; its correct images are places[first[q]:][:counts[q]] there, ascending.
    Past the last of them, masked ones not counted, and past the one that is not among the first `depth`, stands NEVER.
    For each rank it reads each score once: beside the product that made them it takes a tenth of its time, `rank_table`
    on a CPU one and a half times as long as the product.
    """
    found = np.full((len(scores), width), NEVER)
    for q in range(len(scores)):
        row = scores[q] if among is None else scores[q][among]
        right = places[first[q]:first[q] + counts[q]]
        best, leader = np.float32(np.inf), -1
        for nth in range(min(width, len(right))):
            last, before = best, leader                                         # the nth - 1 best ones end here
            best, leader = np.float32(-np.inf), 0
            for place in right:
                if row[place] > best and (row[place] < last or (row[place] == last and place > before)):
                    best, leader = row[place], place
            if best == -np.inf:
                break
            above = 0
            # Unsigned: places that might count from the end would keep vector instructions out.
            for place in range(np.uintp(leader)):
                above += row[place] >= best
            for place in range(np.uintp(leader), np.uintp(len(row))):
                above += row[place] > best
            if pessimistic:
                for place in range(np.uintp(leader + 1), np.uintp(len(row))):
                    above += row[place] == best
            found[q, nth] = above
            if above >= depth:
                break
    return found


def rank_table(scores: Tensor, among, places, first, counts, width: int = 1, depth: int = 0,
               pessimistic: bool = False) -> Tensor:
    """What `rank_rows` finds, by operations on the whole table, for a GPU: (q, N) -> (q, width) ints."""
    device = scores.device
    if among is not None:
        scores = scores[:, send(torch.as_tensor(among), device)]
    rows = np.repeat(np.arange(len(counts)), counts)                            # (P,) the correct images as pairs
    nth = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    rows, places = (send(torch.as_tensor(part), device) for part in (rows, places[np.repeat(first, counts) + nth]))
    correct, width_of_row = scores[rows, places], scores.shape[1]
    columns = torch.arange(width_of_row, device=device)
    best = scores.new_full((len(scores),), torch.inf)
    leader = torch.full_like(best, -1, dtype=torch.long)
    found = leader.new_full((len(scores), width), NEVER)
    for rank in range(width):
        is_left = (correct < best[rows]) | ((correct == best[rows]) & (places > leader[rows]))
        left = torch.where(is_left, correct, -torch.inf)
        best = torch.full_like(best, -torch.inf).scatter_reduce(0, rows, left, "amax")
        leader = torch.full_like(leader, width_of_row).scatter_reduce(
            0, rows, torch.where(left == best[rows], places, width_of_row), "amin")     # of equally good ones the first
        counts_ties = columns != leader[:, None] if pessimistic else columns < leader[:, None]
        higher = torch.where(counts_ties, scores >= best[:, None], scores > best[:, None])
        above = higher.sum(1, dtype=torch.int32).long()                         # else int64's whole table is summed up
        found[:, rank] = torch.where(best == -torch.inf, NEVER, above)
        if rank + 1 < width and not (found[:, rank] < depth).any():
            break
    return found


def ranks_in(scores: Tensor, images: CorrectImages, chunk: slice) -> Tensor:
    """Each row's ranks, the rows being the queries of `chunk`: (q, N) -> (q, width) ints."""
    if images.candidates is not None:                                           # all others are as if masked
        looked_at = images.candidates[chunk]
        rows = torch.as_tensor(np.repeat(np.arange(len(looked_at)), [len(listed) for listed in looked_at]))
        places = torch.as_tensor(np.concatenate(looked_at))
        rows, places = send(rows, scores.device), send(places, scores.device)
        scores = torch.full_like(scores, -torch.inf).index_put_((rows, places), scores[rows, places])
    correct = images.among, images.places, images.first[chunk], images.counts[chunk]
    asked = images.width, images.depth, images.pessimistic
    if scores.device.type == "cpu":
        return torch.from_numpy(rank_rows(scores.numpy(), *correct, *asked))
    return rank_table(scores, *correct, *asked)


def on_each_core(make: Callable, items: Iterable) -> Iterator:
    """make(item) for each item, in order; as many at a time as torch has threads, each computed by one.

    Faster than one at a time computed by all, which would wait for each other after every operation.
    """
    threads = torch.get_num_threads()

    @torch.inference_mode()
    def alone(item):
        torch.set_num_threads(1)                                                # this thread's
        return make(item)
    try:
        yield from prefetch(alone, items, threads)
    finally:
        torch.set_num_threads(threads)                                          # of threads that start from now on


@torch.inference_mode()
def ranks_of_right(queries: Tensor, gallery: Tensor, own: np.ndarray, metrics: Sequence[Judged],
                   progress: Progress = no_progress, galleries: np.ndarray | None = None,
                   score: Score = cosines) -> list[np.ndarray]:
    """For each metric, (Q, W) 0-based ranks of every query's right images, ascending, and NEVER past the last: of its
    best one, or where the metric has a depth of all that are so far ahead.

    queries: (Q, D) unit rows, or what `score` takes; gallery: (N, D), unit rows. own: (Q,) gallery position left out of
    a query's ranking, -1 for none. galleries: (Q, C) the gallery positions that each query ranks alone, -1 past its
    last.
    Raises FloatingPointError where features are not finite: every comparison with NaN is false, which would count
    as a perfect rank.
    """
    if not (queries.sum() + gallery.sum()).isfinite():
        raise FloatingPointError("the model's features are not finite, so nothing can be ranked: the training diverged")
    if not metrics:
        return []
    if queries.device.type == "mps":                                            # whose memory is the CPU's
        queries, gallery = queries.cpu(), gallery.cpu()
    kind, each_part = in_parts(queries.device)
    correct = [CorrectImages(metric) for metric in metrics]
    own = torch.as_tensor(own, device=queries.device)
    columns, held = (len(gallery), len(gallery)) if galleries is None else (
        galleries.shape[1], galleries.shape[1] * gallery.shape[1])              # of a query: scores, numbers at once
    galleries = None if galleries is None else torch.as_tensor(galleries, device=queries.device)
    step = max(1, min(QUERIES_AT_ONCE[kind], SCORES_AT_ONCE[kind] // held))
    at_once = torch.get_num_threads() if kind == "cpu" else 1
    tables = deque(queries.new_empty(step, columns) for _ in range(at_once))    # those not in use

    def rank(start: int) -> Tensor:
        """(q, sum of widths) ranks of a chunk of queries."""
        chunk, table = slice(start, start + step), tables.pop()
        asked, scores = queries[chunk], table[:len(queries[chunk])]
        if galleries is None:
            if score is cosines:
                torch.mm(asked, gallery.T, out=scores)                          # (q, N)
            else:
                scores.copy_(score(asked, gallery))
            masked = (own[chunk] >= 0).nonzero()[:, 0]
            scores[masked, own[chunk][masked]] = -torch.inf
        else:                                   # summed up alike in each column, so that an image listed twice is a tie
            listed = galleries[chunk]                                           # (q, C)
            near = gallery[listed.clamp(min=0)]                                 # (q, C, D)
            if score is cosines:
                torch.sum(near * asked[:, None], dim=2, out=scores)
            else:
                scores.copy_(torch.cat([score(one[None], rows) for one, rows in zip(asked, near, strict=True)]))
            scores[listed < 0] = -torch.inf
        found = [ranks_in(scores, images, chunk) for images in correct]
        tables.append(table)
        return torch.cat(found, 1)
    starts = range(0, len(queries), step)
    mine = distributed.share(starts)
    parts = progress(each_part(rank, mine), desc="ranking", total=len(mine))
    lengths, widths = [min(step, len(queries) - start) for start in starts], [images.width for images in correct]
    found = distributed.collect(torch.cat([own.new_empty(0, sum(widths)), *parts]), lengths)
    return [part.cpu().numpy() for part in found.split(widths, 1)]


def ranks(queries: Tensor, gallery: Tensor, own: np.ndarray, metrics: Sequence[Judged],
          progress: Progress = no_progress) -> list[np.ndarray]:
    """For each metric, the (Q,) 0-based rank of every query's best correct image; as `ranks_of_right`."""
    return [found[:, 0] for found in ranks_of_right(queries, gallery, own, metrics, progress)]


@torch.inference_mode()
def rankings(queries: Tensor, gallery: Tensor, own: np.ndarray, first: int | None = None,
             score: Score = cosines) -> Iterator[np.ndarray]:
    """Of each query all gallery positions but its own, or the `first` of them, the best first, of equally good ones the
    earlier; as `ranks_of_right`."""
    step = max(1, min(QUERIES_AT_ONCE["cpu"], SCORES_AT_ONCE["cpu"] // len(gallery)))
    for start in range(0, len(queries), step):
        scores = score(queries[start:start + step], gallery).cpu().numpy()      # (q, N)
        for row, mine in zip(scores, own[start:start + step], strict=True):
            places = np.arange(len(row))
            if first is not None and first + 1 < len(row):                      # all that score as high as the last one
                places = np.flatnonzero(row >= np.partition(row, -first - 1)[-first - 1])
            places = places[np.argsort(-row[places], kind="stable")]
            yield places[places != mine][:first]


def values_of(metrics: Sequence[Judged], found: Sequence[np.ndarray], own: np.ndarray) -> dict[str, float]:
    """{name: value} of what the metrics say, from each one's ranks."""
    return {name: value for metric, ranked in zip(metrics, found, strict=True)
            for name, value in metric.values(ranked, own).items()}


def recalls(queries: Tensor, gallery: Tensor, own: np.ndarray, metrics: Sequence[Judged],
            progress: Progress = no_progress, galleries: np.ndarray | None = None) -> dict[str, float]:
    """Recall@K, and what else the metrics say, of unit query vectors (Q, D) against a gallery of unit rows (N, D)."""
    return values_of(metrics, ranks_of_right(queries, gallery, own, metrics, progress, galleries), own)


@torch.inference_mode()
def evaluate(model, dataset: CompositionDataset, store: Store, batch_size: int = 0,
             workers: int = 2, seed: int = 0, progress: Progress = no_progress,
             baselines: bool = False, watch: Watch | None = None) -> dict[str, dict[str, float]]:
    """Test `model` on a split: {"model": {metric: value}}, and with `baselines` what needs no composing.

    batch_size: images the encoder takes at once; 0 leaves it to `encoder_batch`.
    "source image alone" ranks by the source image's feature, "text alone" composes every text with the gallery's
    mean feature; where both encoders are of one space, it ranks by the text's own, and the sum and the product of the
    two cosines are there, too. "chance" is the expected recall of a random order, and "queries solved by" counts those
    that the first two solve, as the dataset's `solved_at` says. Deterministic; the model's mode is restored.
    watch: called for each query set with it, the gallery's image ids, unit query vectors (Q, D), the unit gallery
    (N, D), and each metric's (Q,) ranks.
    """
    was_training = model.training
    model.eval()
    try:
        task = dataset.task(seed)
        used = np.unique(np.concatenate([task.gallery, *(queries.sources for queries in task.query_sets)]))
        batch_size = batch_size or encoder_batch(model.a.device, store)
        features = encode_images(model, store, used, batch_size, workers, progress)
        def rows(ids):
            return torch.as_tensor(np.searchsorted(used, ids), device=features.device)
        gallery = features[rows(task.gallery)]
        average = gallery.mean(0, keepdim=True)
        gallery = F.normalize(gallery, dim=1)
        model.meet(gallery)

        def composed_by(composer) -> Ask:
            return lambda query_set, sources: compose_queries(composer, features, sources, query_set.texts, progress)
        methods: dict[str, tuple[Ask, Score]] = {"model": (composed_by(model), model.score)}
        if baselines:
            methods |= {IMAGE: (lambda query_set, sources: F.normalize(features[sources], dim=1), cosines),
                        TEXT: (lambda query_set, sources: compose_queries(model, average, torch.zeros_like(sources),
                                                                          query_set.texts, progress), model.score),
                        **{OF_TWO_TOWERS[name]: (composed_by(composer), composer.score)
                           for name, composer in beside(model).items()}}
        found, hits = {method: {} for method in methods}, {method: [] for method in methods}
        for method, (ask, score) in methods.items():
            for query_set in task.query_sets:
                queries = ask(query_set, rows(query_set.sources))
                ranked = ranks_of_right(queries, gallery, query_set.excluded, query_set.metrics, progress,
                                        query_set.galleries, score)
                best = [each[:, 0] for each in ranked]
                if watch is not None and method == "model":
                    watch(query_set, task.gallery, queries, gallery, best)
                found[method] |= values_of(query_set.metrics, ranked, query_set.excluded)
                hits[method] += hits_of(dataset, query_set, best)
    finally:
        model.train(was_training)
    if baselines:
        found["chance"] = {name: value for query_set in task.query_sets for name, value in chance(query_set).items()}
    found = {method: dataset.with_means(metrics) for method, metrics in found.items()}
    return {**found, SOLVED: solved(hits)} if baselines else found


def hits_of(dataset: CompositionDataset, query_set: QuerySet, found: Sequence[np.ndarray]) -> list[np.ndarray]:
    """(Q,) whether each query is solved, by each metric of the dataset's `solved_at`; found: the metrics' ranks."""
    name, k = dataset.solved_at
    return [rank < k for metric, rank in zip(query_set.metrics, found, strict=True) if metric.name.startswith(name)]


def solved(hits: dict[str, list[np.ndarray]]) -> dict[str, int]:
    """How many queries one of the two methods that compose nothing solves, one of them at least, and none of them."""
    if not hits[IMAGE]:                                                         # its metrics have other names
        return {}
    image, text = np.concatenate(hits[IMAGE]), np.concatenate(hits[TEXT])
    either = image | text
    return {f"the {IMAGE}": int(image.sum()), f"the {TEXT}": int(text.sum()), "either": int(either.sum()),
            "neither": int((~either).sum())}


def chance(query_set: QuerySet) -> dict[str, float]:
    """Expected recalls of a random order."""
    return {name: value for metric in query_set.metrics for name, value in metric.chance(query_set.excluded).items()}
