"""A folder of images as a gallery to search: their features kept on disk, and the images nearest to a query.

An index is a folder of three files: `model.pth`, the checkpoint without what only training needs; `images.sqlite`, the
list of the images, each with its id, the version of its file and its feature; and `index.faiss`, unit features in half
precision by image id, which ranks and can be made again from the other two.
"""

import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from threading import RLock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import checkpoint
from machine.device import usable_cores
from machine.errors import InputError
from machine.image_store import decode, file_version, prefetch
from machine.resizing import plain_square
from machine.weights import fingerprint
from text_encoders import sentence_source, text_encoder_of
from text_model import SentenceTable, spread, tokenize

MODEL, IMAGES, RANKING = "model.pth", "images.sqlite", "index.faiss"
SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif")
LONGEST_TEXT = 1000                     # characters
LARGEST_PICTURE = 40 * 10**6            # pixels of a query's picture
ROWS_AT_ONCE = 10_000                   # of features, in reading them all
ROUNDING = 2**-11 + 2**-20              # half precision moves the product of two unit vectors by no more
FOR_TRAINING = ("optimizer_state_dict", "random", "progress")                   # of a checkpoint


@dataclass
class Source:
    """A query's picture: its feature (D,), and its id if it is one of the gallery's."""
    feature: Tensor
    image: int | None = None


@dataclass
class Hit:
    """One of a query's results; score: the cosine of its feature and the query's; path: below the gallery's folder."""
    image: int
    path: str
    score: float


@dataclass
class Listing:
    """What there is to do for an index to hold what a folder holds; paths are below the folder."""
    new: list[tuple[str, tuple[int, int]]] = field(default_factory=list)        # with their files' versions
    gone: list[int] = field(default_factory=list)                               # ids
    outside: list[str] = field(default_factory=list)                            # links that lead out of the folder
    kept: int = 0


def faiss():
    """The module, on all cores."""
    try:
        import faiss
    except ImportError:
        raise InputError("searching needs FAISS: pip install -r requirements-search.txt") from None
    faiss.omp_set_num_threads(usable_cores())
    return faiss


class ImageList:
    """The images of an index: an SQLite file, so that a process killed at any moment leaves whole entries.

    An id is never given twice, so that a ranking older than the list names no wrong image.
    """

    def __init__(self, path: Path):
        self.path = path

    def connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, timeout=30)

    def create(self, folder: Path) -> None:
        """Raises InputError where the list is another folder's."""
        with closing(self.connect()) as database, database:
            database.execute("CREATE TABLE IF NOT EXISTS folder (path BLOB)")
            database.execute("CREATE TABLE IF NOT EXISTS images (id INTEGER PRIMARY KEY AUTOINCREMENT, path BLOB "
                             "UNIQUE, bytes INT, modified_ns INT, feature BLOB)")
            if not database.execute("SELECT 1 FROM folder").fetchone():
                database.execute("INSERT INTO folder VALUES (?)", (os.fsencode(folder),))
        if self.folder() != folder:
            raise InputError(f"{self.path.parent} is the index of {self.folder()}; give another folder's its own --out")

    def folder(self) -> Path:
        return Path(os.fsdecode(self.ask("SELECT path FROM folder")[0][0]))

    def ask(self, question: str, values: Sequence = ()) -> list[tuple]:
        with closing(self.connect()) as database:
            return database.execute(question, values).fetchall()

    def __len__(self) -> int:
        return self.ask("SELECT count(*) FROM images")[0][0]

    def compare(self, found: Iterator[tuple[str, bool]]) -> Listing:
        """With the images found in the folder, each with whether it truly lies in it."""
        held = {os.fsdecode(path): (number, (length, modified)) for number, path, length, modified in
                self.ask("SELECT id, path, bytes, modified_ns FROM images")}
        listing, folder = Listing(), self.folder()
        for path, inside in found:
            if not inside:
                listing.outside.append(path)
                continue
            version = file_version(str(folder / path))
            if path in held and held[path][1] == version:
                del held[path]
                listing.kept += 1
            else:
                listing.new.append((path, version))
        listing.gone = [number for number, _ in held.values()]
        return listing

    def add(self, entries: list[tuple[str, tuple[int, int]]], features: np.ndarray) -> None:
        rows = [(os.fsencode(path), *version, row.astype("<f4").tobytes())
                for (path, version), row in zip(entries, features, strict=True)]
        with closing(self.connect()) as database, database:
            database.executemany("INSERT OR IGNORE INTO images (path, bytes, modified_ns, feature) VALUES (?, ?, ?, ?)",
                                 rows)

    def remove(self, numbers: list[int]) -> None:
        with closing(self.connect()) as database, database:
            database.executemany("DELETE FROM images WHERE id = ?", [(number,) for number in numbers])

    def features(self, numbers: Sequence[int]) -> tuple[list[int], np.ndarray]:
        """Those of these ids that are listed, in order, and their features (n, D)."""
        rows = []
        for start in range(0, len(numbers), ROWS_AT_ONCE):
            part = sorted(int(number) for number in numbers[start:start + ROWS_AT_ONCE])
            marks = ",".join("?" * len(part))
            rows += self.ask(f"SELECT id, feature FROM images WHERE id IN ({marks}) ORDER BY id", part)
        return [number for number, _ in rows], unpacked([feature for _, feature in rows])

    def all_features(self, every: int = 1) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Ids (n,) and features (n, D) of all images, or of about one in `every`, some thousand at a time."""
        with closing(self.connect()) as database:
            rows = database.execute("SELECT id, feature FROM images WHERE id % ? = 0 ORDER BY id", (every,))
            while part := rows.fetchmany(ROWS_AT_ONCE):
                yield np.array([number for number, _ in part]), unpacked([feature for _, feature in part])

    def path_of(self, number: int) -> str | None:
        found = self.ask("SELECT path FROM images WHERE id = ?", (number,))
        return os.fsdecode(found[0][0]) if found else None

    def id_of(self, path: str) -> int | None:
        """Of the image of this path; one that is no text has none that a program could ask for."""
        found = self.ask("SELECT id FROM images WHERE path = ?", (path.encode("utf-8", "surrogatepass"),))
        return found[0][0] if found else None

    def some(self, count: int, part: str = "") -> list[int]:
        """Ids of some images, drawn anew each time, whose paths hold this text."""
        return [number for number, in self.ask("SELECT id FROM images WHERE instr(path, ?) ORDER BY random() LIMIT ?",
                                               (part.encode("utf-8", "surrogatepass"), count))]

    def ids(self) -> list[int]:
        """Of all images, in the order of their paths."""
        return [number for number, in self.ask("SELECT id FROM images ORDER BY path")]


def unpacked(features: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(features), "<f4").reshape(len(features), -1 if features else 0)


def unit(features: np.ndarray) -> np.ndarray:
    return F.normalize(torch.from_numpy(features.copy()), dim=1).numpy()


def images_below(folder: Path) -> Iterator[tuple[str, bool]]:
    """Paths below the folder of the files with an image's suffix, in order, and whether they lie in it, links
    followed."""
    for where, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                path = Path(where) / name
                yield str(path.relative_to(folder)), not path.is_symlink() or path.resolve().is_relative_to(folder)


def read_picture(path: str | Path, size: int, resampling: str = "bilinear") -> np.ndarray:
    """(size, size, 3) uint8 of a query's picture. Raises InputError where it is none, or a huge one."""
    try:
        with Image.open(path) as image:
            pixels = image.width * image.height
    except Exception as error:                                                  # PIL's plugins raise anything at all
        if isinstance(error, Image.DecompressionBombError):
            pixels = LARGEST_PICTURE + 1
        else:
            raise InputError(f"{path} is no picture that can be read; give a JPEG, PNG or WebP file") from None
    if pixels > LARGEST_PICTURE:
        raise InputError(f"{path} has more than {LARGEST_PICTURE // 10**6} megapixels; make it smaller: {size} pixels "
                         "a side are looked at")
    return decode(str(path), size, resampling, upright=True, to_square=plain_square)


class Sentences:
    """The sentence service or text encoder of a checkpoint's flags, met when the first text is asked for."""

    def __init__(self, state: dict, where: dict, folder: Path):
        opt = {**state["opt"], **{name: value for name, value in where.items() if value is not None}}
        self.flags, self.features = opt, state.get("sentences")
        self.dim, self.folder = checkpoint.text_dim(state), folder

    @cached_property
    def table(self) -> SentenceTable:
        source = sentence_source(self.flags)
        if source.dim != self.dim or self.features not in (None, source.features):
            raise source.complaint(f"has other vectors (size {source.dim}, {source.features}) than the model was "
                                   f"trained with (size {self.dim}, {self.features})")
        return SentenceTable(source, self.folder)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        return self.table(texts)


class Encoder:
    """The model of a checkpoint and what goes with it: image size, vocabulary, texts' kind.

    where: of the sentence service, by flag, what shall differ from the checkpoint's. folder: keeps its vectors.
    """

    def __init__(self, path: Path, device: torch.device, where: dict | None = None, folder: Path | None = None):
        self.state, self.device, self.path = checkpoint.load(path), device, path
        self.opt = self.state["opt"]
        sentences = Sentences(self.state, where or {}, folder) if text_encoder_of(self.opt) != "lstm" else None
        self.model = checkpoint.rebuild(self.state, path, sentences).to(device, memory_format=torch.channels_last)
        self.size, self.resampling = self.model.recipe.image_size, self.model.traits.resampling
        self.vocabulary = None if sentences else self.model.text_model.vocabulary
        self.examples = [text for text in self.state.get("example_texts", []) if text.strip()]

    def fingerprint(self) -> str:
        return fingerprint(self.state["model_state_dict"])

    @torch.inference_mode()
    def images(self, pixels: Sequence[np.ndarray]) -> Tensor:
        """B arrays (S, S, 3) uint8 -> (B, D) on the CPU."""
        batch = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)          # (B, 3, S, S)
        return self.model.encode_image(batch.to(self.device)).cpu()

    @torch.inference_mode()
    def query(self, image: Tensor, text: str) -> Tensor:
        """(D,), a text -> the unit vector (D,) to search with: without a text, the image's own."""
        composed = image[None].to(self.device)
        if text.strip():
            composed = self.model.compose(composed, self.model.encode_text([text]))
        return F.normalize(composed, dim=1)[0].cpu()

    def unknown(self, text: str) -> list[str]:
        """The words that the model was not trained with. A sentence service knows all.

        Raises InputError for a text that is too long, or of which nothing is known.
        """
        if len(text) > LONGEST_TEXT:
            raise InputError(f"the text has {len(text):,} characters; shorten it to {LONGEST_TEXT:,}")
        if self.vocabulary is None or not text.strip():
            return []
        words = list(dict.fromkeys(tokenize(text)))
        unknown = [word for word in words if word not in self.vocabulary.word2id]
        if len(unknown) == len(words):
            known = ", ".join(spread([word for word in self.vocabulary.word2id if word.isalpha()], 8))
            raise InputError(f"the model knows none of these words; it was trained with words as {known}")
        return unknown


class Gallery:
    """An index, opened to be searched. Raises InputError where it is not whole.

    One query at a time: several threads may ask.
    """

    def __init__(self, index: str | Path, device: torch.device, where: dict | None = None):
        index = Path(index)
        if missing := [name for name in (MODEL, IMAGES, RANKING) if not (index / name).is_file()]:
            raise InputError(f"{index} is no finished index: it has no {missing[0]}; make it with search.py index, "
                             "which goes on where it stopped")
        self.encoder, self.lock = Encoder(index / MODEL, device, where, index), RLock()
        self.images = ImageList(index / IMAGES)
        try:
            self.folder, self.size = self.images.folder(), len(self.images)
            self.ranking = faiss().read_index(str(index / RANKING))
        except (sqlite3.Error, IndexError, RuntimeError) as error:
            raise InputError(f"{index} is damaged ({first_line(error)}); remove it and make it again with search.py "
                             "index") from None
        if self.ranking.d != self.encoder.model.image_dim:
            raise InputError(f"{index} is damaged: features of {self.ranking.d} values, a model of "
                             f"{self.encoder.model.image_dim}; remove it and make it again with search.py index")

    def picture(self, path: str | Path) -> Source:
        """Any picture as a query's."""
        pixels = read_picture(path, self.encoder.size, self.encoder.resampling)
        with self.lock:
            return Source(self.encoder.images([pixels])[0])

    def own_picture(self, image: int) -> Source:
        """One of the gallery's, its feature taken from the index."""
        listed, features = self.images.features([image])
        if not listed:
            raise InputError(f"the gallery has no image {image}")
        return Source(torch.from_numpy(features[0].copy()), image)

    def file(self, image: int) -> Path:
        """Where one of the gallery's images lies. Raises InputError where it does not any more."""
        path = self.images.path_of(image)
        file = path and self.folder / path
        if not file or not file.is_file() or not file.resolve().is_relative_to(self.folder):
            raise InputError(f"{path or f'image {image}'} is no more in {self.folder}; run search.py index again")
        return file

    def search(self, source: Source, text: str, k: int = 20, leave_out: bool = False) -> tuple[list[Hit], list[str]]:
        """The k images nearest to the composed query, best first, equal ones by id; and the words not known.

        leave_out: whether the query's own picture is none of its results.
        """
        unknown = self.encoder.unknown(text)
        with self.lock:
            query = self.encoder.query(source.feature, text).numpy()
        if not np.isfinite(query).all():
            raise InputError("the model's answer to this query is not finite: its training diverged")
        own = {source.image} if leave_out else set()
        found = [(number, score) for number, score in self.nearest(query, k + len(own)) if number not in own][:k]
        return [Hit(number, self.images.path_of(number), score) for number, score in found], unknown

    def nearest(self, query: np.ndarray, k: int) -> list[tuple[int, float]]:
        """Ids and scores of the k nearest. Half precision finds them, the kept features rank them; more are looked at
        while one that was not could be among them."""
        k, asked = min(k, self.ranking.ntotal), 0
        while True:
            asked = min(self.ranking.ntotal, 2 * max(asked, k) + 16)
            rough, numbers = (rows[0] for rows in self.ranking.search(query[None], asked))
            listed, features = self.images.features(numbers[numbers >= 0])
            scores = unit(features) @ query if listed else np.zeros(0, np.float32)
            best = np.argsort(-scores, kind="stable")[:k]
            complete = asked == self.ranking.ntotal or numbers[-1] < 0
            if complete or (len(best) == k and rough[-1] < scores[best[-1]] - ROUNDING):
                return [(listed[place], float(scores[place])) for place in best]


@dataclass
class Built:
    """What making an index came to."""
    images: int
    new: int
    broken: dict[str, str]              # path -> why it was left out


def build(source: Path, folder: Path, out: Path, ivf: bool, device: torch.device, batch_size: int, workers: int,
          progress: Callable) -> Built:
    """Make `out` the index of the images below `folder` by a checkpoint's model. What it already holds is kept:
    so it goes on where it was stopped, and takes in what has changed since."""
    faiss()                                                                     # missing? said before the work
    if not folder.is_dir():
        raise InputError(f"--images {folder} is no folder")
    encoder = Encoder(source, device)
    prepare(out, encoder, source)
    images = ImageList(out / IMAGES)
    try:
        images.create(folder.resolve())
        listing = images.compare(progress(images_below(folder.resolve()), desc="looking for images", unit="image"))
        images.remove(listing.gone)
        broken = dict.fromkeys(listing.outside, "a link that leads out of the folder")
        read = partial(attempt, folder.resolve(), encoder)
        parts = [listing.new[start:start + batch_size] for start in range(0, len(listing.new), batch_size)]
        with progress(total=listing.kept + len(listing.new), initial=listing.kept, desc="encoding images",
                      unit="image") as bar:
            for part, pixels in zip(parts, prefetch(lambda part: list(map(read, part)), parts, workers), strict=True):
                broken |= {path: why for (path, _), why in zip(part, pixels, strict=True) if isinstance(why, str)}
                whole = [place for place, row in enumerate(pixels) if not isinstance(row, str)]
                if whole:
                    features = encoder.images([pixels[place] for place in whole]).numpy()
                    if not np.isfinite(features).all():
                        raise InputError(f"the model of {source} gives features that are not finite: its training "
                                         "diverged")
                    images.add([part[place] for place in whole], features)
                bar.update(len(part))
        if not len(images):
            raise InputError(f"no image that can be read below {folder}"
                             + "".join(f"; {path}: {why}" for path, why in list(broken.items())[:1]))
        rank(images, out, encoder.model.image_dim, ivf, progress)
    except sqlite3.Error as error:
        raise InputError(f"cannot use {images.path} ({error}); make room, or remove {out} to begin again") from None
    return Built(len(images), len(listing.new) - len(broken) + len(listing.outside), broken)


def prepare(out: Path, encoder: Encoder, source: Path) -> None:
    """The folder with the model in it. Raises InputError where it is not free, or another model's index."""
    if (out / MODEL).is_file():
        if Encoder(out / MODEL, encoder.device).fingerprint() != encoder.fingerprint():
            raise InputError(f"{out} is the index of another model than {source}; give this one's its own --out")
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(name != f"{MODEL}.unfinished" for name in os.listdir(out)):
            raise InputError(f"{out} holds other files; give the index a folder of its own with --out")
        kept = {name: value for name, value in encoder.state.items() if name not in FOR_TRAINING}
        torch.save(kept, out / f"{MODEL}.unfinished")
        os.replace(out / f"{MODEL}.unfinished", out / MODEL)
    except (OSError, RuntimeError) as error:                                    # torch's, where it cannot write
        raise InputError(f"cannot make the index {out} ({first_line(error)}); choose another --out") from None


def attempt(folder: Path, encoder: Encoder, entry: tuple[str, tuple[int, int]]) -> np.ndarray | str:
    """An image's pixels, or why there are none."""
    try:
        return decode(str(folder / entry[0]), encoder.size, encoder.resampling, upright=True)
    except InputError as error:
        return str(error)


def rank(images: ImageList, out: Path, dim: int, ivf: bool, progress: Callable) -> None:
    """Write the index's ranking: every image is compared with a query, or with `ivf` those of the nearest cells."""
    library, count = faiss(), len(images)
    half, product = library.ScalarQuantizer.QT_fp16, library.METRIC_INNER_PRODUCT
    if ivf:
        cells = max(1, min(int(4 * count**0.5), count // 39))                   # FAISS asks for 39 images a cell
        ranking = library.IndexIVFScalarQuantizer(library.IndexFlatIP(dim), dim, cells, half, product)
        ranking.nprobe, ranking.cp.min_points_per_centroid = max(1, cells // 16), 1        # 1: no warning of few
        sample = np.concatenate([features for _, features in images.all_features(max(1, count // (64 * cells)))])
        ranking.train(unit(sample))
    else:
        ranking = library.IndexIDMap(library.IndexScalarQuantizer(dim, half, product))
    with progress(total=count, desc="ranking", unit="image") as bar:
        for numbers, features in images.all_features():
            ranking.add_with_ids(unit(features), numbers)
            bar.update(len(numbers))
    try:
        library.write_index(ranking, str(out / f"{RANKING}.unfinished"))
        os.replace(out / f"{RANKING}.unfinished", out / RANKING)
    except (OSError, RuntimeError) as error:
        raise InputError(f"cannot write {out / RANKING} ({first_line(error)}); make room, then run it again") from None


def printable(text: str) -> str:
    """Text that can be shown and sent: a file's name may be any bytes, and a visitor's text may hold halves of
    characters."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
