"""FAISS's ranking of an index's images: unit features in half precision by image id, made from the list alone.

What can be made again is believed only where it is just what was written, and read within bounds, whoever wrote it.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from machine.checksums import file_digest
from machine.errors import InputError, first_line
from searching.image_list import Doubtful, ImageList

RANKING = "index.faiss"


def faiss():
    """The module, with as many threads as torch has."""
    try:
        import faiss
    except ImportError:
        raise InputError("searching needs FAISS: pip install -r requirements-search.txt") from None
    faiss.omp_set_num_threads(torch.get_num_threads())                          # of the OpenMP that torch uses, too
    return faiss


def unit(features: np.ndarray) -> np.ndarray:
    return F.normalize(torch.from_numpy(features.copy()), dim=1).numpy()


def rank(images: ImageList, out: Path, dim: int, ivf: bool, progress: Callable) -> None:
    """Write the index's ranking."""
    changes, path, unfinished = images.state()[1], out / RANKING, out / f"{RANKING}.unfinished"
    ranking = ranking_of(images, dim, ivf, progress)
    try:
        unfinished.unlink(missing_ok=True)                                      # never through a link
        faiss().write_index(ranking, str(unfinished))
        images.note_file(RANKING, file_digest(unfinished), changes)
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:
        raise InputError(f"cannot write {path} ({first_line(error)}); make room, then run it again") from None


def ranking_of(images: ImageList, dim: int, ivf: bool, progress: Callable):
    """Every image is compared with a query, or with `ivf` those of the nearest cells."""
    library, count = faiss(), len(images)
    half, product = library.ScalarQuantizer.QT_fp16, library.METRIC_INNER_PRODUCT
    if ivf:
        cells = max(1, min(int(4 * count**0.5), count // 39))                   # FAISS asks for 39 images a cell
        ranking = library.IndexIVFScalarQuantizer(library.IndexFlatIP(dim), dim, cells, half, product)
        ranking.nprobe, ranking.cp.min_points_per_centroid = max(1, cells // 16), 1        # 1: no warning of few
        sample = np.concatenate([features for _, features in images.all_features(max(1, count // (64 * cells)), dim)])
        ranking.train(unit(sample))
    else:
        ranking = library.IndexIDMap(library.IndexScalarQuantizer(dim, half, product))
    with progress(total=count, desc="ranking", unit="image") as bar:
        for numbers, features in images.all_features(dim=dim):
            ranking.add_with_ids(unit(features), numbers)
            bar.update(len(numbers))
    return ranking


def selection(ranking, numbers: Sequence[int]):
    """What has a ranking search among these ids alone, and all of them: also those in cells far away."""
    library = faiss()
    chosen = library.IDSelectorBatch(np.array(numbers, np.int64))
    if isinstance(ranking, library.IndexIVF):
        return library.SearchParametersIVF(sel=chosen, nprobe=ranking.nlist)
    return library.SearchParameters(sel=chosen)


def read_ranking(path: Path, dim: int):
    """A ranking of features of `dim` values from its file. Raises Doubtful where it is none of ours.

    FAISS is told that no part of it is longer than the file, and what it has read is looked at piece by piece.
    """
    library, length = faiss(), path.stat().st_size
    before = library.get_deserialization_vector_byte_limit(), library.get_deserialization_loop_limit()
    library.set_deserialization_vector_byte_limit(length)
    library.set_deserialization_loop_limit(length)
    try:
        ranking = library.read_index(str(path))
    except (RuntimeError, MemoryError) as error:
        raise Doubtful(first_line(error)) from None
    finally:
        library.set_deserialization_vector_byte_limit(before[0])
        library.set_deserialization_loop_limit(before[1])
    if not (is_exact if type(ranking) is library.IndexIDMap else is_ivf)(library, ranking, dim, length):
        raise Doubtful("its parts do not fit")
    return ranking


def is_exact(library, ranking, dim: int, length: int) -> bool:
    """Whether it is what `ranking_of` makes without `ivf`."""
    inner = library.downcast_index(ranking.index)
    return (type(inner) is library.IndexScalarQuantizer and is_half(library, inner, dim) and ranking.d == dim
            and ranking.metric_type == library.METRIC_INNER_PRODUCT
            and 0 < ranking.ntotal == inner.ntotal == ranking.id_map.size() <= length
            and inner.codes.size() == 2 * dim * ranking.ntotal)


def is_ivf(library, ranking, dim: int, length: int) -> bool:
    """Whether it is what `ranking_of` makes with `ivf`."""
    if type(ranking) is not library.IndexIVFScalarQuantizer or not is_half(library, ranking, dim):
        return False
    cells, lists = library.downcast_index(ranking.quantizer), ranking.invlists
    return (isinstance(cells, library.IndexFlat) and cells.d == dim and 0 < cells.ntotal == ranking.nlist == lists.nlist
            and cells.metric_type == library.METRIC_INNER_PRODUCT and cells.codes.size() == 4 * dim * cells.ntotal
            and 1 <= ranking.nprobe <= ranking.nlist <= length and ranking.by_residual
            and type(library.downcast_InvertedLists(lists)) is library.ArrayInvertedLists
            and lists.code_size == ranking.code_size == 2 * dim and ranking.direct_map.type == 0
            and sum(lists.list_size(cell) for cell in range(lists.nlist)) == ranking.ntotal > 0)


def is_half(library, part, dim: int) -> bool:
    """Whether it keeps vectors of `dim` values in half precision, to be compared by their product."""
    return (part.d == part.sq.d == dim and part.sq.qtype == library.ScalarQuantizer.QT_fp16 and part.is_trained
            and part.metric_type == library.METRIC_INNER_PRODUCT and part.sq.code_size == part.code_size == 2 * dim)
