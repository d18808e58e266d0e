"""An index's images as a table that databases and notebooks read: a Parquet file of ids, paths and unit vectors."""

import os
from collections.abc import Callable
from pathlib import Path

import checkpoint
from machine.errors import InputError, first_line
from machine.folder_lock import unfinished
from machine.tensor_files import fingerprint
from searching.gallery import IMAGES, MODEL, check_model, printable
from searching.image_list import Entry, ImageList, unpacked
from searching.ranking import unit


def arrow():
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError("a table of vectors needs PyArrow: pip install -r requirements-export.txt") from None
    return pyarrow


def export(index: Path, out: Path, progress: Callable) -> int:
    """Write an index's table, some thousand images at a time, whole or not at all; returns how many there are.

    Its columns: id, path below the gallery, vector: float32, as many as the model's features have. Its own metadata say
    which model's they are and how many changes the list had seen, as `Qdrant` wants to know of a collection.
    """
    library = arrow()
    if missing := [name for name in (MODEL, IMAGES) if not (index / name).is_file()]:
        raise InputError(f"{index} is no index: it has no {missing[0]}; make it with search.py index")
    images, state = ImageList(index / IMAGES), checkpoint.load(index / MODEL)
    check_model(images, index / MODEL)
    dim, about = checkpoint.recipe(state, index / MODEL).image_dim, {
        "model": fingerprint(state["model_state_dict"]), "changes": str(images.state()[1])}
    schema = library.schema([("id", library.int64()), ("path", library.string()),
                             ("vector", library.list_(library.float32(), dim))], about)
    beside, count = unfinished(out), len(images)
    try:
        beside.unlink(missing_ok=True)                                          # a dead namesake's
        with open(beside, "xb") as file:
            with library.parquet.ParquetWriter(file, schema) as writer, progress(
                    total=count, desc="writing", unit="image") as bar:
                for entries in images.parts():
                    writer.write_batch(library.record_batch(columns(entries, dim), schema))
                    bar.update(len(entries))
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, out)
    except OSError as error:
        raise InputError(f"cannot write --vectors {out} ({first_line(error)}); choose another file") from None
    finally:
        beside.unlink(missing_ok=True)
    return count


def columns(entries: list[Entry], dim: int) -> list:
    """Of some images, in the schema's order; bytes of a path that are no text are replaced."""
    vectors = unit(unpacked(entries, dim)).ravel()
    return [[entry.number for entry in entries], [printable(entry.path) for entry in entries],
            arrow().FixedSizeListArray.from_arrays(vectors, dim)]
