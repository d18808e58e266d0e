"""FAISS's ranking of an index's images: unit features in half precision, or coded, by image id, made from the list
alone.

What can be made again is believed only where it is just what was written, and read within bounds, whoever wrote it.
"""

import math
import os
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np

from machine.checksums import file_digest
from machine.errors import InputError, first_line
from machine.threads import threads_to_use
from searching.image_list import ImageList, InvalidIndex

RANKING = "index.faiss"
MOST_CELLS = 4096                       # with more, filling them takes hours at tens of millions
KERNELS = {"avx512f": "SkylakeX", "avx2": "Haswell"}                            # of OpenBLAS, best first
FEWEST_CODED = 39 * 256                 # images: FAISS asks for 39 to learn each of a code's 256 values from


def faiss():
    """The module, with as many threads as torch has, or would. Its package's OpenBLAS, of 2021, takes a newer processor
    for one of 2004 and is a fifth as fast, unless told."""
    if kernels := next((KERNELS[name] for name in KERNELS if name in processor()), None):
        os.environ.setdefault("OPENBLAS_CORETYPE", kernels)
    try:
        import faiss
    except ImportError:
        raise InputError("searching needs FAISS: pip install -r requirements-search.txt") from None
    faiss.omp_set_num_threads(threads_to_use())                                 # of the OpenMP that torch uses, too
    return faiss


@cache
def processor() -> frozenset[str]:
    """What Linux says that the first core can; nothing elsewhere."""
    try:
        return frozenset(re.search(r"^flags\s*:(.*)", Path("/proc/cpuinfo").read_text(), re.M)[1].split())
    except (OSError, TypeError):
        return frozenset()


def unit(features: np.ndarray) -> np.ndarray:
    """(..., D) -> rows of length 1, float32; of zeros stay zeros."""
    lengths = np.linalg.norm(features, axis=-1, keepdims=True)
    return np.asarray(features / np.maximum(lengths, 1e-12), np.float32)


def rank(images: ImageList, out: Path, dim: int, kind: str, progress: Callable) -> None:
    """Write the index's ranking."""
    changes, path, unfinished = images.state()[1], out / RANKING, out / f"{RANKING}.unfinished"
    ranking = ranking_of(images, dim, kind, progress)
    try:
        unfinished.unlink(missing_ok=True)                                      # never through a link
        faiss().write_index(ranking, str(unfinished))
        images.note_file(RANKING, file_digest(unfinished), changes)
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:
        raise InputError(f"cannot write {path} ({first_line(error)}); make room, then run it again") from None


def ranking_of(images: ImageList, dim: int, kind: str, progress: Callable):
    """Every image is compared with a query ("exact"), or those of the nearest cells ("ivf"), these by codes of a byte
    for eight values ("pq"; of too few images to learn codes from "ivf")."""
    library, count = faiss(), len(images)
    half, product = library.ScalarQuantizer.QT_fp16, library.METRIC_INNER_PRODUCT
    if kind == "exact":
        ranking = library.IndexIDMap(library.IndexScalarQuantizer(dim, half, product))
    else:
        cells = max(1, min(int(4 * count**0.5), count // 39, MOST_CELLS))       # FAISS asks for 39 images a cell
        if kind == "pq" and count >= FEWEST_CODED:
            ranking = library.IndexIVFPQ(library.IndexFlatIP(dim), dim, cells, parts_of(dim), 8, product)
        else:
            ranking = library.IndexIVFScalarQuantizer(library.IndexFlatIP(dim), dim, cells, half, product)
        ranking.nprobe, ranking.cp.min_points_per_centroid = max(1, cells // 16), 1        # 1: no warning of few
        sample = np.concatenate([features for _, features in images.all_features(max(1, count // (64 * cells)), dim)])
        ranking.train(unit(sample))
    with progress(total=count, desc="ranking", unit="image") as bar:
        for numbers, features in images.all_features(dim=dim):
            ranking.add_with_ids(unit(features), numbers)
            bar.update(len(numbers))
    return ranking


def parts_of(dim: int) -> int:
    """Of how many bytes a code is."""
    return dim // math.gcd(dim, 8)


class Ranking:
    """What FAISS has made of an index's images, as it is asked for the nearest of them.

    d: size of the vectors. ntotal: how many there are. spare: how many more than twice those that are wanted are to be
    asked for, as their order is a rough one.
    """

    def __init__(self, made):
        self.made, self.d, self.ntotal = made, made.d, made.ntotal
        self.spare = 512 if hasattr(made, "pq") else 16

    def search(self, query: np.ndarray, k: int, among: Sequence[int] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(D,) -> scores and ids (k,) of the nearest, best first, of all or among these ids; where there are fewer, ids
        of -1. Cells far away are looked at, too, among ids, and where the nearest hold less than k."""
        cells = getattr(self.made, "nlist", 1)
        looked_at = getattr(self.made, "nprobe", 1) if among is None else cells
        scores, numbers = self.made.search(query[None], k, params=self.within(looked_at, among))
        while numbers[0, -1] < 0 and looked_at < cells:
            looked_at = min(4 * looked_at, cells)
            scores, numbers = self.made.search(query[None], k, params=self.within(looked_at, among))
        return scores[0], numbers[0]

    def within(self, cells: int, among: Sequence[int] | None):
        """What FAISS is told of how many cells to look at, and among which ids."""
        library = faiss()
        chosen = {} if among is None else {"sel": library.IDSelectorBatch(np.array(among, np.int64))}
        if isinstance(self.made, library.IndexIVF):
            return library.SearchParametersIVF(nprobe=cells, **chosen)
        return library.SearchParameters(**chosen)


def read_ranking(path: Path, dim: int):
    """A ranking of features of `dim` values from its file. Raises InvalidIndex where it is none of ours.

    FAISS is told that no part of it is longer than the file, and what it has read is looked at piece by piece.
    """
    library, length = faiss(), path.stat().st_size
    table = 1024 * MOST_CELLS * parts_of(dim)                                   # counted, though made for L2 alone
    before = library.get_deserialization_vector_byte_limit(), library.get_deserialization_loop_limit()
    library.set_deserialization_vector_byte_limit(length + table)
    library.set_deserialization_loop_limit(length)
    try:
        ranking = library.read_index(str(path))
    except (RuntimeError, MemoryError) as error:
        raise InvalidIndex(first_line(error)) from None
    finally:
        library.set_deserialization_vector_byte_limit(before[0])
        library.set_deserialization_loop_limit(before[1])
    if not (is_exact if type(ranking) is library.IndexIDMap else is_ivf)(library, ranking, dim, length):
        raise InvalidIndex("its parts do not fit")
    return ranking


def is_exact(library, ranking, dim: int, length: int) -> bool:
    """Whether it is what `ranking_of` makes as "exact"."""
    inner = library.downcast_index(ranking.index)
    return (type(inner) is library.IndexScalarQuantizer and is_half(library, inner, dim) and ranking.d == dim
            and ranking.metric_type == library.METRIC_INNER_PRODUCT
            and 0 < ranking.ntotal == inner.ntotal == ranking.id_map.size() <= length
            and inner.codes.size() == 2 * dim * ranking.ntotal)


def is_ivf(library, ranking, dim: int, length: int) -> bool:
    """Whether it is what `ranking_of` makes as "ivf" or "pq"."""
    fits = {library.IndexIVFScalarQuantizer: is_half, library.IndexIVFPQ: is_coded}.get(type(ranking))
    if not fits or not fits(library, ranking, dim):
        return False
    cells, lists = library.downcast_index(ranking.quantizer), ranking.invlists
    return (isinstance(cells, library.IndexFlat) and cells.d == dim and 0 < cells.ntotal == ranking.nlist == lists.nlist
            and cells.metric_type == library.METRIC_INNER_PRODUCT and cells.codes.size() == 4 * dim * cells.ntotal
            and 1 <= ranking.nprobe <= ranking.nlist <= length and ranking.by_residual
            and type(library.downcast_InvertedLists(lists)) is library.ArrayInvertedLists
            and lists.code_size == ranking.code_size and ranking.direct_map.type == 0
            and sum(lists.list_size(cell) for cell in range(lists.nlist)) == ranking.ntotal > 0)


def is_half(library, part, dim: int) -> bool:
    """Whether it keeps vectors of `dim` values in half precision, to be compared by their product."""
    return (part.d == part.sq.d == dim and part.sq.qtype == library.ScalarQuantizer.QT_fp16 and part.is_trained
            and part.metric_type == library.METRIC_INNER_PRODUCT and part.sq.code_size == part.code_size == 2 * dim)


def is_coded(library, ranking, dim: int) -> bool:
    """Whether it keeps codes of vectors of `dim` values, to be compared by their product."""
    codes = ranking.pq
    return (ranking.d == codes.d == dim and codes.M == codes.code_size == ranking.code_size == parts_of(dim)
            and codes.nbits == 8 and codes.centroids.size() == 256 * dim and ranking.is_trained
            and ranking.metric_type == library.METRIC_INNER_PRODUCT and ranking.polysemous_ht == 0)
