"""A folder of images as a gallery to search: the images nearest to a query, from an index that is checked first.

An index is a folder of four files: `model.pth`, the checkpoint without what only training needs; `networks.zip`, the
same model as networks that need no torch; `images.sqlite`, the list of the images, each with its id, the version of its
file and its feature, what a user's table says of them, and the checksums of all four files; and `index.faiss`, unit
features in half precision by image id, which ranks. The second and the last can be made again from the other two.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from threading import RLock

import numpy as np

from machine.checksums import file_digest
from machine.errors import InputError
from machine.picture_files import InMemory
from machine.progress import progress_bar
from searching import networks
from searching.encoder import Encoder
from searching.filter import Filter
from searching.hubness import Hubness
from searching.image_list import IMAGES, MODEL, ImageList, InvalidIndex
from searching.metadata import Cells, columns_of, metadata_of
from searching.networks import NETWORKS
from searching.ranking import RANKING, Ranking, ranking_of, read_ranking, unit

ROUNDING = 2**-11 + 2**-20              # half precision moves the product of two unit vectors by no more

log = logging.getLogger(__name__)


@dataclass
class Source:
    """A query's picture: its feature (D,), and its id if it is one of the gallery's."""
    feature: np.ndarray
    image: int | None = None


@dataclass
class Hit:
    """One of a query's results; path: whole, though only `Gallery.file` sees that it is there and leads nowhere else;
    score: the cosine of its feature and the query's, less what hubness takes off; metadata: {column: value}, empty
    where the index has none of it.
    """
    image: int
    path: Path
    score: float
    metadata: Cells = field(default_factory=dict)


def load_model(path: str | Path, device=None, where: dict | None = None, folder: Path | None = None,
               engine: str = "auto") -> Encoder:
    """The model of a run's checkpoint, or of a folder that search.py export wrote, by torch, to `compose` queries and
    `encode` galleries with; device: torch's or its name, a GPU where there is one, unless given. where, folder: of a
    sentence service, engine: of large galleries, see CheckpointEncoder. Raises InputError for what is neither, or not
    whole, and where torch is missing.
    """
    try:
        from searching.from_checkpoint import CheckpointEncoder
    except ModuleNotFoundError as error:
        raise InputError(f"{path} is computed by PyTorch, and there is no {error.name}: pip install -r "
                         "requirements.txt, or bring the index up to date with search.py index where that is "
                         "installed") from None
    return CheckpointEncoder(path, device, where, folder, engine)


def open_encoder(index: Path, images: ImageList, device=None, where: dict | None = None,
                 engine: str = "auto") -> Encoder:
    """An index's model: by the networks that it holds, on the CPU and without torch; by torch where it has none that
    can be used, where a device other than the CPU is given, and with the engine 'torch'.

    device: torch's or its name, or what is called to choose one; then torch's choice where it is not given. where: of
    the sentence service, by flag, what shall differ from the checkpoint's. Raises InputError.
    """
    on_cpu = device is None or callable(device) or str(device) == "cpu"
    if engine != "torch" and on_cpu and images.file_note(NETWORKS)[0]:
        try:
            return networks.read(index, images)
        except networks.Unusable as error:
            if engine != "auto":
                raise InputError(f"{index / NETWORKS} cannot be used ({error}); search.py index makes it "
                                 "anew") from None
            log.warning("note: %s cannot be used (%s), so torch computes; search.py index makes it anew",
                        index / NETWORKS, error)
    elif engine not in ("auto", "torch"):
        raise InputError(f"{index} holds no networks of {engine}, or --device is none of theirs: search.py index adds "
                         "them; or drop --engine")
    return load_model(index / MODEL, device, where, index, engine)


class Gallery:
    """An index, opened to be searched. Raises InputError where it is not whole.

    device, where, engine: as of `open_encoder`.

    images: the folder of the images, where they were moved since. follow_links: whether files that links lead out of
    it to are given out; the index may be a stranger's, so that it has no say in this. columns: of the metadata.
    ranking: makes, of the features' size and the model's fingerprint, what is asked in the place of the index's own.
    hubness: of composed queries, how much of `Hubness` is taken off the scores; computed here where it is not 0.
    One query at a time: several threads may ask.
    """

    def __init__(self, index: str | Path, device=None, where: dict | None = None, images: str | Path | None = None,
                 follow_links: bool = False, ranking: Callable | None = None, hubness: float = 0.0,
                 engine: str = "auto"):
        index = Path(index)
        if missing := [name for name in (MODEL, IMAGES, RANKING) if not (index / name).is_file()]:
            raise InputError(f"{index} is no finished index: it has no {missing[0]}; make it with search.py index, "
                             "which goes on where it stopped")
        self.images, self.lock = ImageList(index / IMAGES), RLock()
        self.changes, self.size, self.columns = self.images.state()[1], len(self.images), columns_of(self.images)
        self.folder, self.follow_links = self.place(images), follow_links
        check_model(self.images, index / MODEL)
        self.encoder = open_encoder(index, self.images, device, where, engine)
        self.ranking, self.ranked = self.open_ranking(index / RANKING, ranking)
        if self.ranked is None:
            log.warning("note: %s has no checksums, so that damage to it cannot be told; search.py index adds them",
                        index)
        elif self.ranked != self.changes:
            log.warning("note: %s was changed after its ranking was made, and is searched as far as that goes; %s",
                        index, "export and load it again" if ranking else "search.py index brings it up to date")
        self.compared = self.read_all() if self.encoder.query_dim != self.encoder.image_dim else None
        if self.compared and (hubness or ranking):
            raise InputError(f"--hubness and --qdrant do not go with {self.encoder.opt.get('model')}, which compares "
                             "every image with picture and text apart; leave them out")
        self.hubness = Hubness(self.images, self.encoder, hubness, progress_bar) if hubness else None

    def read_all(self) -> tuple[np.ndarray, np.ndarray]:
        """All images' ids, and their features as unit rows, (N, D), for a composer that compares each with a query in a
        way of its own: they are held in memory, and the composer is told of them."""
        parts = [*self.images.all_features(dim=self.encoder.image_dim)]
        numbers, features = (np.concatenate(rows) for rows in zip(*parts, strict=True))
        self.encoder.meet(unit(features))
        return numbers, unit(features)

    def place(self, images: str | Path | None) -> Path:
        """The folder of the images. Raises InputError where the one that is given is none."""
        if images is not None and not os.path.isdir(images):
            raise InputError(f"--images {images} is no folder")
        folder = self.images.folder_now() if images is None else Path(os.path.realpath(images))
        if not os.path.isdir(folder):
            log.warning("note: %s, the folder of the images, is not there; if it moved, pass --images NEWFOLDER; if it "
                        "was removed, remove %s too", folder, self.images.path.parent)
        return folder

    def open_ranking(self, path: Path, other: Callable | None) -> tuple:
        """The ranking, and how many changes the list had seen when it was made, None where that was never noted. One
        that cannot be believed is made again."""
        if other:
            found = other(self.encoder.image_dim, self.encoder.fingerprint())
            return found, found.changes
        noted, ranked = self.images.file_note(RANKING)
        dim, changes = self.encoder.image_dim, self.images.state()[1]
        try:
            if noted != (file_digest(path) if noted else None):
                raise InvalidIndex("it is not what its checksum says")
            return Ranking(read_ranking(path, dim)), ranked
        except InvalidIndex as doubt:
            log.warning("note: %s is damaged (%s), so it is made again from the list for now; search.py index does so "
                        "for good", path, doubt)
        return Ranking(ranking_of(self.images, dim, "exact", progress_bar)), changes

    def picture(self, path: str | Path | InMemory) -> Source:
        """Any picture as a query's."""
        pixels = self.encoder.read(path)
        with self.lock:
            return Source(self.encoder.images([pixels])[0])

    def own_picture(self, image: int) -> Source:
        """One of the gallery's, its feature taken from the index."""
        listed, features = self.images.features([image], self.encoder.image_dim)
        if not listed:
            raise InputError(f"the gallery has no image {image}")
        return Source(features[0].copy(), image)

    def file(self, image: int) -> Path:
        """Where one of the gallery's images lies. Raises InputError where it does not any more, or is behind a link
        out of the folder, unless these are followed."""
        path = self.images.path_of(image)
        if not path or not os.path.isfile(self.folder / path):
            raise InputError(f"{path or f'image {image}'} is no longer in {self.folder}; if the images moved, pass "
                             "--images NEWFOLDER; if it was removed, run search.py index again")
        if self.is_out(self.folder / path):
            raise InputError(f"{path} is behind a link that leads out of {self.folder}; pass --follow_links True")
        return self.folder / path

    def is_out(self, file: Path) -> bool:
        return not self.follow_links and not Path(os.path.realpath(file)).is_relative_to(self.folder)

    @cached_property
    def filter(self) -> Filter:
        return Filter(self.images)

    def changed(self) -> bool:
        """Whether the index was since it was opened."""
        return self.images.state()[1] != self.changes

    def metadata(self, image: int, where: str = "") -> Cells:
        """What the user's table says of an image: {column: value}; empty where it has no row. where: a condition, to be
        told what that is asked of, though the index may have changed."""
        if where.strip():
            return self.filter.cells([image]).get(image, {})
        path = self.images.path_of(image)
        return metadata_of(self.images, [path]).get(path, {}) if path else {}

    def search(self, picture: str | Path | Source, text: str, k: int = 20, leave_out: bool = False,
               where: str = "", nearness: float = 0.0) -> list[Hit]:
        """The k images (1 or more) nearest to the composed query, best first, equal ones by id. Without a text, those
        that look like the picture.

        picture: any file, or what `picture` or `own_picture` made of one. leave_out: whether one of the gallery's own
        is none of its results. where: a condition on `columns`, in SQL, which all results fulfil; whoever may search
        may write it. nearness: as the encoder's `query` has it. Raises InputError for a picture that cannot be read,
        for a text as the encoder's `unknown` does, which gives the words that are not known, for a condition that is
        none, and where the index is damaged.
        """
        if k < 1:
            raise InputError(f"k is {k}; ask for one result or more")
        among = self.filter.images(where) if where.strip() else None
        source = picture if isinstance(picture, Source) else self.picture(picture)
        with self.lock:
            query = self.encoder.query(source.feature, text, nearness)
        own = {source.image} if leave_out else set()
        hubness = self.hubness if text.strip() else None
        found = [(path, number, score) for number, score in self.nearest(query, k + len(own), among, hubness)
                 if number not in own and (path := self.images.path_of(number))][:k]    # none: taken out this moment
        if among is not None:                                                   # one answer comes of one state
            metadata = self.filter.cells([number for _, number, _ in found])
            return [Hit(number, self.folder / path, score, metadata.get(number, {})) for path, number, score in found]
        metadata = metadata_of(self.images, [path for path, *_ in found]) if self.columns else {}
        return [Hit(number, self.folder / path, score, metadata.get(path, {})) for path, number, score in found]

    def check_missing(self, numbers: np.ndarray) -> None:
        """Images that are ranked and not listed were taken out since, or else the list is damaged: raises InputError.
        """
        if len(numbers) and self.ranked == self.images.state()[1]:
            raise InputError(f"{self.images.path} is damaged: image {numbers[0]} is gone from it; remove "
                             f"{self.images.path.parent} and make it again with search.py index")

    def nearest(self, query: np.ndarray, k: int, among: list[int] | None = None,
                hubness: Hubness | None = None) -> list[tuple[int, float]]:
        """Ids and scores of the k nearest, of all or among some. Half precision finds them, or codes, the kept features
        rank them; more are looked at while, by half precision, one that was not could be among them."""
        if len(query) != self.ranking.d:
            return self.best_compared(query, k, among)
        doubt = ROUNDING - (hubness.least if hubness else 0)                    # others may score so much above `rough`
        most = self.ranking.ntotal if among is None else min(len(among), self.ranking.ntotal)
        k, asked = min(k, most), 0
        while k:
            asked = min(most, 2 * max(asked, k) + self.ranking.spare)
            rough, numbers = self.ranking.search(query, asked, among)
            listed, features = self.images.features(numbers[numbers >= 0], self.ranking.d)
            self.check_missing(np.setdiff1d(numbers[numbers >= 0], listed))
            scores = unit(features) @ query if listed else np.zeros(0, np.float32)
            if hubness:
                scores -= hubness.of(listed)
            best = np.argsort(-scores, kind="stable")[:k]
            complete = asked == most or numbers[-1] < 0
            if complete or (len(best) == k and rough[-1] < scores[best[-1]] - doubt):
                return [(listed[place], float(scores[place])) for place in best]
        return []

    def best_compared(self, query: np.ndarray, k: int, among: list[int] | None) -> list[tuple[int, float]]:
        """Ids and scores of the k best, of all or among some, by the model's own comparison."""
        numbers, features = self.compared
        scores = self.encoder.score(query, features)
        if among is not None:
            chosen = np.isin(numbers, among)
            numbers, scores = numbers[chosen], scores[chosen]
        best = np.lexsort((numbers, -scores))[:k]
        return [(int(numbers[place]), float(scores[place])) for place in best]


def check_model(images: ImageList, path: Path) -> None:
    """Raises InputError where an index's model is not the one that it was made with."""
    noted = images.file_note(MODEL)[0]
    if noted not in (None, file_digest(path)):
        raise InputError(f"{path} is damaged, or of another index: it is not what its checksum says; remove "
                         f"{path.parent} and make it again with search.py index")


def printable(text: str) -> str:
    """Text that can be shown and sent: a file's name may be any bytes, and a visitor's text may hold halves of
    characters."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
