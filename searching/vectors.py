"""An index's images as a table that databases and notebooks read: a Parquet file of ids, paths and unit vectors."""

from collections.abc import Callable
from pathlib import Path

from machine.errors import InputError, first_line
from machine.folder_lock import whole_file
from machine.tensor_files import fingerprint
from searching.gallery import check_model, printable
from searching.image_list import IMAGES, MODEL, Entry, ImageList, unpacked
from searching.metadata import Cells, columns_of, kept, metadata_of
from searching.ranking import unit
from training import checkpoint

OURS = ("id", "path", "vector")         # columns; a user's of that name has an underscore behind


def arrow():
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError("a table of vectors needs PyArrow: pip install -r requirements-export.txt") from None
    return pyarrow


def export(index: Path, out: Path, progress: Callable) -> int:
    """Write an index's table, some thousand images at a time, whole or not at all; returns how many there are.

    Its columns: id, path below the gallery, the metadata's, vector: float32, as many as the model's features have. Its
    own metadata say which model's they are and how many changes the list had seen, as `Qdrant` wants to know.
    """
    library = arrow()
    if missing := [name for name in (MODEL, IMAGES) if not (index / name).is_file()]:
        raise InputError(f"{index} is no index: it has no {missing[0]}; make it with search.py index")
    images, state = ImageList(index / IMAGES), checkpoint.load(index / MODEL)
    check_model(images, index / MODEL)
    dim, more, count = checkpoint.recipe(state, index / MODEL).image_dim, kinds(images), len(images)
    about = {"model": fingerprint(state["model_state_dict"]), "changes": str(images.state()[1])}
    types = {int: library.int64(), float: library.float64(), str: library.string()}
    schema = library.schema([("id", types[int]), ("path", types[str]), *(
        (name + "_" * (name in OURS), types[kind]) for name, kind in more.items()),
        ("vector", library.list_(library.float32(), dim))], about)
    try:
        with whole_file(out) as file, library.parquet.ParquetWriter(file, schema) as writer, progress(
                total=count, desc="writing", unit="image") as bar:
            for entries in images.parts():
                cells = metadata_of(images, [entry.path for entry in entries]) if more else {}
                writer.write_batch(library.record_batch(columns(entries, cells, more, dim), schema))
                bar.update(len(entries))
    except OSError as error:
        raise InputError(f"cannot write --vectors {out} ({first_line(error)}); choose another file") from None
    return count


def kinds(images: ImageList) -> dict[str, type]:
    """The metadata's columns, with what every value of theirs can be: int, float, or str."""
    found = {name: set() for name in columns_of(images)}
    for _, cells in kept(images):
        for name, value in cells.items():
            found[name].add(type(value))
    for types in found.values():
        types.discard(type(None))
    return {name: int if types == {int} else float if types and types <= {int, float} else str
            for name, types in found.items()}


def columns(entries: list[Entry], cells: dict[str, Cells], more: dict[str, type], dim: int) -> list:
    """Of some images, in the schema's order; bytes that are no text are replaced."""
    def values(name: str, kind: type) -> list:
        found = [cells.get(entry.path, {}).get(name) for entry in entries]
        return [value if value is None else printable(str(value)) if kind is str else kind(value) for value in found]
    vectors = arrow().FixedSizeListArray.from_arrays(unit(unpacked(entries, dim)).ravel(), dim)
    return [[entry.number for entry in entries], [printable(entry.path) for entry in entries],
            *(values(name, kind) for name, kind in more.items()), vectors]
