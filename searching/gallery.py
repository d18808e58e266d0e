"""A folder of images as a gallery to search: the images nearest to a query, from an index that is checked first.

An index is a folder of three files: `model.pth`, the checkpoint without what only training needs; `images.sqlite`, the
list of the images, each with its id, the version of its file and its feature, what a user's table says of them, and the
checksums of all three files; and `index.faiss`, unit features in half precision by image id, which ranks and can be
made again from the other two.
"""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from threading import RLock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from img_text_composition_models import MODELS
from machine.checksums import file_digest
from machine.device import choose_device
from machine.errors import InputError, first_line
from machine.picture_files import InMemory, TooLarge, decode
from machine.progress import progress_bar
from machine.resizing import plain_square
from machine.tensor_files import bytes_of, fingerprint
from searching.filter import Filter
from searching.hubness import Hubness
from searching.image_list import ImageList, InvalidIndex
from searching.metadata import Cells, columns_of, metadata_of
from searching.ranking import RANKING, Ranking, ranking_of, read_ranking, unit
from text_encoders import sentence_source, text_encoder_of
from text_model import SentenceTable, spread, tokenize
from training import checkpoint

MODEL, IMAGES = "model.pth", "images.sqlite"
LONGEST_TEXT = 1000                     # characters
LARGEST_SIDE = 4096                     # pixels of the images that a model sees
ENCODED_AT_ONCE = 32                    # pictures
ROUNDING = 2**-11 + 2**-20              # half precision moves the product of two unit vectors by no more

log = logging.getLogger(__name__)


@dataclass
class Source:
    """A query's picture: its feature (D,), and its id if it is one of the gallery's."""
    feature: Tensor
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


def read_picture(path: str | Path | InMemory, size: int, resampling: str = "bilinear") -> np.ndarray:
    """(size, size, 3) uint8 of a query's picture. Raises InputError where it is none, or beyond the bounds of
    picture_files.py, within which no picture needs a time limit."""
    try:
        return decode(path, size, resampling, upright=True, to_square=plain_square)
    except TooLarge:
        raise
    except InputError:
        raise InputError(f"{path} is no picture that can be read; give a JPEG, PNG or WebP file") from None


class Sentences:
    """The sentence service or text encoder of a checkpoint's flags, met when the first text is asked for.

    where: of the service, by flag, what shall differ from the checkpoint's; its host is this machine unless named here,
    for a stranger's checkpoint would be told every text.
    """

    def __init__(self, state: dict, where: dict, folder: Path):
        given = {name: value for name, value in where.items() if value is not None}
        self.flags, self.features = {**state["opt"], "bert_ip": "localhost", **given}, state.get("sentences")
        self.dim, self.folder = checkpoint.text_dim(state), folder

    @cached_property
    def table(self) -> SentenceTable:
        try:
            check_service(self.flags)
            source = sentence_source(self.flags)
        except (LookupError, TypeError, ValueError, OverflowError) as error:
            raise InputError(f"the checkpoint's flags of its text encoder are none of this program's "
                             f"({first_line(error)})") from None
        if source.dim != self.dim or self.features not in (None, source.features):
            raise source.complaint(f"has other vectors (size {source.dim}, {source.features}) than the model was "
                                   f"trained with (size {self.dim}, {self.features})")
        return SentenceTable(source, self.folder)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        return self.table(texts)


def check_service(flags: dict) -> None:
    """Raises ValueError for what no flag of a sentence service can be."""
    ports, patience = [flags.get(name, 1) for name in ("bert_port", "bert_port_out")], flags.get("bert_timeout", 1)
    if not all(isinstance(port, int) and 0 < port < 2**16 for port in ports):
        raise ValueError(f"ports {ports}")
    if not (isinstance(patience, int | float) and 0 < patience <= 24 * 3600):
        raise ValueError(f"bert_timeout {patience!r}")


class Encoder:
    """The model of a checkpoint and what goes with it: image size, vocabulary, texts' kind.

    device: a GPU where there is one, unless given. where: of the sentence service, by flag, what shall differ from the
    checkpoint's. folder: keeps its vectors. Raises InputError for what is no whole checkpoint.
    """

    def __init__(self, path: str | Path, device: str | torch.device | None = None, where: dict | None = None,
                 folder: Path | None = None):
        self.state, self.device, self.path = checkpoint.load(path), device or choose_device("auto"), path
        self.opt = self.state["opt"]
        own = text_encoder_of(self.opt) == "lstm" or MODELS[checkpoint.recipe(self.state, path).composer].frozen
        sentences = None if own else Sentences(self.state, where or {}, folder)
        self.check(sentences)
        self.model = checkpoint.rebuild(self.state, path, sentences).to(device, memory_format=torch.channels_last)
        self.size, self.resampling = self.model.recipe.image_size, self.model.traits.resampling
        self.vocabulary = self.model.vocabulary
        self.examples = [text for text in self.state.get("example_texts", []) if text.strip()]

    def check(self, sentences: "Sentences | None") -> None:
        """Before memory is taken for it: raises InputError for a model that is larger than its weights' bytes, and for
        images larger than any model sees."""
        recipe = checkpoint.recipe(self.state, self.path)
        size = self.opt.get("image_size", 224)
        if not all(isinstance(side, int) and 0 < side <= LARGEST_SIDE for side in (size, recipe.image_size)):
            raise InputError(f"{self.path} is none of this program's checkpoints: images of {size!r} pixels")
        with torch.device("meta"):
            weights = recipe.build(sentences).state_dict()                      # shapes alone
        if sum(weight.numel() for weight in weights.values()) > bytes_of(self.state["model_state_dict"]):
            raise InputError(f"{self.path} is none of this program's checkpoints: it holds less than its model has")

    def fingerprint(self) -> str:
        return fingerprint(self.state["model_state_dict"])

    def compose(self, picture: str | Path, text: str) -> np.ndarray:
        """A query's picture and text -> the unit vector (D,) float32 to search with: without a text, the picture's own.

        Raises InputError for a picture that cannot be read, and for a text as `unknown` does.
        """
        return self.query(self.images([self.read(picture)])[0], text).numpy()

    def encode(self, pictures: Sequence[str | Path]) -> np.ndarray:
        """A gallery's N pictures -> unit rows (N, D) float32, whose products with a composed query are cosines.

        Raises InputError for a picture that cannot be read.
        """
        parts = [self.images([self.read(picture) for picture in pictures[start:start + ENCODED_AT_ONCE]])
                 for start in range(0, len(pictures), ENCODED_AT_ONCE)]
        return F.normalize(torch.cat([torch.empty(0, self.model.image_dim), *parts]), dim=1).numpy()

    def read(self, picture: str | Path | InMemory) -> np.ndarray:
        """(S, S, 3) uint8, as the model sees it."""
        return read_picture(picture, self.size, self.resampling)

    @torch.inference_mode()
    def images(self, pixels: Sequence[np.ndarray]) -> Tensor:
        """B arrays (S, S, 3) uint8 -> (B, D) on the CPU. Raises InputError where they are not finite."""
        batch = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)          # (B, 3, S, S)
        features = self.model.encode_image(batch.to(self.device)).cpu()
        if not features.isfinite().all():
            raise InputError(f"the model of {self.path} gives features that are not finite: its training diverged")
        return features

    @torch.inference_mode()
    def query(self, image: Tensor, text: str, nearness: float = 0.0) -> Tensor:
        """(D,), a text -> the unit vector (D,) to search with: without a text, the image's own; or, of a composer whose
        `score` takes something else, that. Words that the model does not know are left out, as read they would be
        noise.

        nearness: so much of the image's direction is added to the composed one, which things profit from that the model
        was not trained with (docs/experiments.md).

        Raises InputError for a text as `unknown` does, for nearness where the query is no such vector, and where it is
        not finite.
        """
        if unknown := self.unknown(text):                                       # which refuses what cannot be read
            text = " ".join(word for word in tokenize(text) if word not in unknown)
        own = composed = F.normalize(image[None].to(self.device), dim=1)        # (1, D)
        if text.strip():
            composed = self.model.as_query(self.model.compose(image[None].to(self.device),
                                                              self.model.encode_text([text])))
        if nearness and text.strip():
            if composed.shape != own.shape:
                raise InputError(f"--nearness does not go with {self.model.recipe.composer}, which compares an image "
                                 "with picture and text apart; leave it out")
            composed = F.normalize(composed + nearness * own, dim=1)
        query = composed[0].cpu()
        if not query.isfinite().all():
            raise InputError("the model's answer to this query is not finite: its training diverged")
        return query

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


def load_model(path: str | Path, device: str | torch.device | None = None) -> Encoder:
    """The model of a run's checkpoint, or of a folder that search.py export wrote, to `compose` queries and `encode`
    galleries with; device: a GPU where there is one, unless given. Raises InputError for what is neither, or not whole.
    """
    return Encoder(path, device)


class Gallery:
    """An index, opened to be searched; device: a GPU where there is one, unless given. Raises InputError where it is
    not whole.

    images: the folder of the images, where they were moved since. follow_links: whether files that links lead out of
    it to are given out; the index may be a stranger's, so that it has no say in this. columns: of the metadata.
    ranking: makes, of the features' size and the model's fingerprint, what is asked in the place of the index's own.
    hubness: of composed queries, how much of `Hubness` is taken off the scores; computed here where it is not 0.
    One query at a time: several threads may ask.
    """

    def __init__(self, index: str | Path, device: str | torch.device | None = None, where: dict | None = None,
                 images: str | Path | None = None, follow_links: bool = False, ranking: Callable | None = None,
                 hubness: float = 0.0):
        index = Path(index)
        if missing := [name for name in (MODEL, IMAGES, RANKING) if not (index / name).is_file()]:
            raise InputError(f"{index} is no finished index: it has no {missing[0]}; make it with search.py index, "
                             "which goes on where it stopped")
        self.images, self.lock = ImageList(index / IMAGES), RLock()
        self.changes, self.size, self.columns = self.images.state()[1], len(self.images), columns_of(self.images)
        self.folder, self.follow_links = self.place(images), follow_links
        check_model(self.images, index / MODEL)
        self.encoder = Encoder(index / MODEL, device, where, index)
        self.ranking, self.ranked = self.open_ranking(index / RANKING, ranking)
        if self.ranked is None:
            log.warning("note: %s has no checksums, so that damage to it cannot be told; search.py index adds them",
                        index)
        elif self.ranked != self.changes:
            log.warning("note: %s was changed after its ranking was made, and is searched as far as that goes; %s",
                        index, "export and load it again" if ranking else "search.py index brings it up to date")
        encoder = self.encoder
        self.compared = self.read_all() if encoder.model.query_dim != encoder.model.image_dim else None
        if self.compared and (hubness or ranking):
            raise InputError(f"--hubness and --qdrant do not go with {encoder.model.recipe.composer}, which compares "
                             "every image with picture and text apart; leave them out")
        self.hubness = Hubness(self.images, encoder.model, encoder.examples, hubness, progress_bar) if hubness else None

    def read_all(self) -> tuple[np.ndarray, Tensor]:
        """All images' ids, and their features as unit rows, (N, D), for a composer that compares each with a query in a
        way of its own: they are held in memory, and the composer is told of them."""
        dim, model = self.encoder.model.image_dim, self.encoder.model
        parts = [*self.images.all_features(dim=dim)]
        numbers = np.concatenate([part for part, _ in parts])
        features = F.normalize(torch.from_numpy(np.concatenate([rows for _, rows in parts])), dim=1).to(model.a.device)
        model.meet(features)
        return numbers, features

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
            found = other(self.encoder.model.image_dim, self.encoder.fingerprint())
            return found, found.changes
        noted, ranked = self.images.file_note(RANKING)
        dim, changes = self.encoder.model.image_dim, self.images.state()[1]
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
        listed, features = self.images.features([image], self.encoder.model.image_dim)
        if not listed:
            raise InputError(f"the gallery has no image {image}")
        return Source(torch.from_numpy(features[0].copy()), image)

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
            query = self.encoder.query(source.feature, text, nearness).numpy()
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

    @torch.inference_mode()
    def best_compared(self, query: np.ndarray, k: int, among: list[int] | None) -> list[tuple[int, float]]:
        """Ids and scores of the k best, of all or among some, by the model's own comparison."""
        numbers, features = self.compared
        scores = self.encoder.model.score(torch.from_numpy(query)[None].to(features.device), features)[0].cpu().numpy()
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
