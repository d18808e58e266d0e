"""How answers are judged: recall@K and mAP@K of queries' ranks, by what is right for each."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np

RECALL_KS = (1, 5, 10, 50, 100)
MAP_KS = (5, 10, 25, 50)                # CIRCO's


class Judged:
    """What a metric makes of its queries' ranks, which `test_retrieval.ranks_of_right` finds.

    Recall@K is the share of queries with a right image among the first K. mAP@K is the mean over queries of
    AP@K = sum over the right images at places k <= K of (right ones among the first k) / k, divided by the number of
    right ones or K, the smaller (CIRCO's, arXiv 2303.15247).
    """

    name: str                           # recall_top{K}_{name}, map_top{K}_{name}
    ks: tuple[int, ...]
    map_ks: tuple[int, ...]
    among = candidates = None           # what is ranked: gallery positions for all queries, or for each; None = all
    pessimistic = False                 # whether a right image comes after all that score the same, else as they lie
    groups: Mapping[str, np.ndarray] = MappingProxyType({})     # {name: queries} whose mAP@K is averaged apart, too,
    group_ks: tuple[int, ...] = ()                              # for these K

    @property
    def depth(self) -> int:
        """Among how many first places all right images are looked for; 0 where the best one's rank is enough."""
        return max(self.map_ks, default=0)

    def correct(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        raise NotImplementedError

    def is_correct(self, query, positions) -> np.ndarray:
        raise NotImplementedError

    def ranked(self, own: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def right_ones(self, own: np.ndarray) -> np.ndarray:
        """(Q,) how many right images are ranked; own: as `ranked` takes it."""
        lost = (own >= 0) & self.is_correct(np.arange(len(own)), own)
        if self.among is not None:
            lost &= np.isin(own, self.among)
        return self.correct()[2] - lost

    def values(self, ranks: np.ndarray, own: np.ndarray) -> dict[str, float]:
        """{name: value} of (Q, W) 0-based ranks of right images, ascending, NEVER where there is no further one."""
        found = {f"recall_top{k}_{self.name}": float((ranks[:, 0] < k).mean()) for k in self.ks}
        if not self.map_ks:
            return found
        right = self.right_ones(own)
        for k in self.map_ks:
            each = average_precision(ranks, right, k)                           # (Q,)
            found |= {f"map_top{k}_{name}": float(each[of].mean()) for name, of in self.averaged(k).items()}
        return found

    def names(self) -> list[str]:
        """Of all that `values` gives."""
        return [f"recall_top{k}_{self.name}" for k in self.ks] + [
            f"map_top{k}_{name}" for k in self.map_ks for name in self.averaged(k)]

    def averaged(self, k: int) -> dict[str, np.ndarray | slice]:
        """{name: the queries that its mAP@k is the mean of}"""
        return {self.name: slice(None), **(self.groups if k in self.group_ks else {})}

    def chance(self, own: np.ndarray) -> dict[str, float]:
        """Expected recalls of a random order: 1 - C(N - m, K) / C(N, K) for a query with m correct among N."""
        total, correct, values = self.ranked(own), self.right_ones(own), {}
        for k in self.ks:
            miss = np.ones(len(own))
            for drawn in range(k):                                              # each draw misses all m once more
                left = np.maximum(total - drawn, 1)
                miss *= np.clip((left - correct) / left, 0, 1)
            values[f"recall_top{k}_{self.name}"] = float(1 - miss.mean())
        return values


def average_precision(ranks: np.ndarray, right: np.ndarray, k: int) -> np.ndarray:
    """(Q, W) 0-based ranks of right images, ascending, and how many there are, (Q,) -> (Q,) AP@k; 0 where none is."""
    precision = np.arange(1, ranks.shape[1] + 1) / (ranks + 1.0)                # (Q, W): of the list that ends there
    return np.where(ranks < k, precision, 0).sum(1) / np.clip(right, 1, k)


@dataclass
class Metric(Judged):
    """One way to count a query's hits: a gallery image is correct when its label equals the query's."""
    name: str
    query_labels: np.ndarray            # (Q,) ints
    gallery_labels: np.ndarray          # (N,) ints
    among: np.ndarray | None = None     # gallery positions that are ranked; None = all of them
    ks: tuple[int, ...] = RECALL_KS
    map_ks: tuple[int, ...] = ()

    def ranked(self, own: np.ndarray) -> np.ndarray:
        """(Q,) how many images are ranked; own: (Q,) gallery position of the one that is not, -1 for none."""
        among = np.arange(len(self.gallery_labels)) if self.among is None else self.among
        return len(among) - np.isin(own, among)

    def correct(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Each query's correct images, ascending, as places among those that are ranked: query q's are the counts[q]
        from first[q] on of `places`. Returns (places, first, counts)."""
        labels = self.gallery_labels if self.among is None else self.gallery_labels[self.among]
        places = np.argsort(labels, kind="stable")
        ordered = labels[places]
        first = np.searchsorted(ordered, self.query_labels, "left")             # (Q,)
        return places, first, np.searchsorted(ordered, self.query_labels, "right") - first

    def is_correct(self, query, positions) -> np.ndarray:
        """Whether images at these gallery positions are correct for a query, or for one query each."""
        return self.gallery_labels[positions] == self.query_labels[query]


@dataclass
class ListedMetric(Judged):
    """The same, where what is correct is listed for each query, as what it is to be found among can be."""
    name: str
    right: list[np.ndarray]             # Q times gallery positions, ascending
    gallery: int                        # N
    candidates: list[np.ndarray] | None = None  # Q times the gallery positions that are ranked; None = all
    ks: tuple[int, ...] = RECALL_KS
    map_ks: tuple[int, ...] = ()
    groups: dict[str, np.ndarray] = field(default_factory=dict)
    group_ks: tuple[int, ...] = ()

    def ranked(self, own: np.ndarray) -> np.ndarray:
        if self.candidates is None:
            return self.gallery - (own >= 0)
        return np.array([len(listed) - (mine in listed) for mine, listed in zip(own, self.candidates, strict=True)])

    def correct(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        counts = np.array([len(listed) for listed in self.right])
        return np.concatenate(self.right), np.cumsum(counts) - counts, counts

    def is_correct(self, query, positions) -> np.ndarray:
        queries, positions = np.broadcast_arrays(query, positions)
        pairs = zip(queries.tolist(), positions.tolist(), strict=True)
        return np.array([position in self.right[query] for query, position in pairs])


@dataclass
class OwnGalleryMetric(Judged):
    """Of queries that rank a gallery of their own each (`QuerySet.galleries`): the image that stands first there is
    right, and comes after all that score as high."""
    name: str
    sizes: np.ndarray                   # (Q,) of the galleries
    ks: tuple[int, ...] = RECALL_KS
    map_ks: tuple[int, ...] = ()
    pessimistic = True

    def ranked(self, own: np.ndarray) -> np.ndarray:
        return self.sizes

    def correct(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return np.zeros(1, int), np.zeros(len(self.sizes), int), np.ones(len(self.sizes), int)

    def is_correct(self, query, positions) -> np.ndarray:
        return np.broadcast_arrays(query, positions)[1] == 0
