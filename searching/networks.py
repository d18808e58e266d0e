"""A model as an index holds it for its own searching: networks of machine/engine.py, and what goes with them, in one
file that needs no torch to be read.

The file is a zip, nothing in it compressed: `networks.json`, the record; of each network NAME.xml and NAME.bin; and
`tokenizer.json` where texts are read by a model of word pieces. It is believed where it is what the index's list says.
"""

import io
import json
import os
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from machine import engine
from machine.checksums import digest
from machine.errors import InputError, first_line
from machine.vocabulary import SimpleVocab
from machine.word_pieces import WordPieces, by_length, read_tokenizer
from searching.encoder import LARGEST_SIDE, Encoder
from searching.image_list import MODEL, ImageList

NETWORKS = "networks.zip"
FORMAT = "composed image retrieval networks 1"
RECORD, TOKENIZER = "networks.json", "tokenizer.json"
IMAGE, TEXT, WORDS, COMPOSER = "image", "text", "words", "composer"
COMPOSED_AT_ONCE = 512                  # queries


class Unusable(ValueError):
    """Says why an index's networks cannot be used."""


@dataclass(frozen=True)
class Record:
    """What goes with a model's networks. model_file, model: the digests of the index's own file of it and of its
    weights. made_of: the digest of the checkpoint that it was made of, if a file was.
    words: the LSTM's. pieces: the plain facts of `WordPieces`. segments: whether the text's network is told how many
    pieces are the first segment's. learned: words that are read beside a sentence's vector. opt: of the
    run's flags, those that a page tells."""
    model_file: str
    model: str
    image_dim: int
    image_size: int
    resampling: str
    text_encoder: str
    made_of: str | None = None
    words: dict[str, int] | None = None
    pieces: dict | None = None
    segments: bool = False
    learned: dict[str, int] | None = None
    examples: list[str] = field(default_factory=list)
    opt: dict = field(default_factory=dict)

    @classmethod
    def of(cls, content: dict[str, bytes]) -> "Record":
        """The one in a file's content. Raises Unusable for what is none of ours, whoever wrote it."""
        try:
            told = json.loads(content[RECORD])
            if told.pop("format", None) != FORMAT:
                raise Unusable("it is of another version")
            return cls(**told).check()
        except Unusable:
            raise
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise Unusable(f"its record is none of this program's ({first_line(error)})") from None

    def check(self) -> "Record":
        known = [words for words in (self.words, self.learned) if words is not None]
        if not (all(isinstance(side, int) and 0 < side <= LARGEST_SIDE for side in (self.image_dim, self.image_size))
                and all(isinstance(value, str) for value in (self.model_file, self.model, self.resampling,
                                                               self.text_encoder))
                and all(isinstance(words, dict) and sorted(map(str, words.values())) == sorted(
                    map(str, range(len(words)))) for words in known)
                and isinstance(self.opt, dict) and isinstance(self.examples, list)
                and all(isinstance(text, str) for text in self.examples)
                and (self.words is not None) == (self.text_encoder == "lstm")
                and isinstance(self.pieces, dict | None) and isinstance(self.segments, bool)):
            raise Unusable("its record is none of this program's")
        return self


class NetworkEncoder(Encoder):
    """A model by the networks that an index holds; path: of their file, for what is said of it. Raises Unusable."""

    def __init__(self, path: Path, content: dict[str, bytes]):
        self.record = record = Record.of(content)
        try:
            self.networks = {name: engine.read(content[f"{name}.xml"], content[f"{name}.bin"])
                             for name in (IMAGE, TEXT, COMPOSER, *[WORDS] * (record.learned is not None))}
            self.pieces = WordPieces(read_tokenizer(content[TOKENIZER]), **record.pieces) if record.pieces else None
        except (KeyError, TypeError, ValueError, InputError) as error:
            raise Unusable(first_line(error)) from None
        self.path, self.opt, self.size, self.resampling = path, record.opt, record.image_size, record.resampling
        self.image_dim = self.query_dim = record.image_dim
        self.text_encoder, self.examples = record.text_encoder, record.examples
        self.vocabulary = None if record.words is None else SimpleVocab(record.words)
        self.learned = None if record.learned is None else SimpleVocab(record.learned)

    def fingerprint(self) -> str:
        return self.record.model

    def encode_pixels(self, pixels: np.ndarray) -> np.ndarray:
        return self.networks[IMAGE](pixels.transpose(0, 3, 1, 2))

    def encode_texts(self, texts: list[str]) -> np.ndarray:
        words = self.vocabulary
        read = [(words.encode(text), 0) for text in texts] if words else self.pieces.ids(texts)
        vectors = self.read_by(TEXT, read, self.record.segments)
        if not self.learned:
            return vectors
        beside = self.read_by(WORDS, [(self.learned.encode(text), 0) for text in texts], False)
        return np.concatenate([vectors, beside], axis=1)

    def read_by(self, network: str, read: Sequence[tuple[list[int], int]], segments: bool) -> np.ndarray:
        """Ids of texts, and how many are the first segment's -> (B, T): those of one length together."""
        ids, first = zip(*read, strict=True)
        return by_length(ids, self.networks[network], *[first] * segments)

    def composed(self, images: np.ndarray, texts: np.ndarray) -> np.ndarray:
        return np.concatenate([self.networks[COMPOSER](images[start:start + COMPOSED_AT_ONCE],
                                                       texts[start:start + COMPOSED_AT_ONCE])
                               for start in range(0, len(images), COMPOSED_AT_ONCE)])


# The file

def packed(record: Record, networks: dict[str, engine.Network], tokenizer: bytes | None, folder: Path) -> bytes:
    """The file's content. folder: where some of it may be written meanwhile. Raises OSError."""
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive, tempfile.TemporaryDirectory(
            prefix=f".{NETWORKS}.", suffix=".unfinished", dir=folder) as scratch:
        def put(name: str, content: bytes) -> None:
            archive.writestr(zipfile.ZipInfo(name), content)
        put(RECORD, json.dumps({"format": FORMAT, **asdict(record)}).encode())
        for name, network in networks.items():
            for kind, content in zip(("xml", "bin"), network.kept(Path(scratch)), strict=True):
                put(f"{name}.{kind}", content)
        if tokenizer:
            put(TOKENIZER, tokenizer)
    return written.getvalue()


def unpacked(content: bytes) -> dict[str, bytes]:
    """By name. Raises Unusable."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if any(member.compress_type or member.file_size > len(content) for member in archive.infolist()):
                raise Unusable("it is none of this program's")
            return {member.filename: archive.read(member) for member in archive.infolist()}
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError, EOFError, RuntimeError) as error:
        raise Unusable(first_line(error)) from None


def read(index: Path, images: ImageList) -> NetworkEncoder:
    """The model in an index's networks, which are what its list says. Raises Unusable."""
    return NetworkEncoder(index / NETWORKS, contents(index, images))


def record_of(index: Path, images: ImageList) -> Record | None:
    """What goes with them, without their being made ready to compute; None where they cannot be used."""
    try:
        return Record.of(contents(index, images))
    except Unusable:
        return None


def contents(index: Path, images: ImageList) -> dict[str, bytes]:
    """By name, of networks that are this index's and its model's. Raises Unusable."""
    noted, model = (images.file_note(name)[0] for name in (NETWORKS, MODEL))
    path = index / NETWORKS
    try:
        content = path.read_bytes() if path.is_file() else None
    except OSError as error:
        raise Unusable(error.strerror or str(error)) from None
    if content is None or noted is None:
        raise Unusable("it is not there" if content is None else "the index's list does not know it")
    if digest([content]) != noted:
        raise Unusable("it is not what its checksum says")
    found = unpacked(content)
    if Record.of(found).model_file != model:
        raise Unusable("it is of another model than the index's")
    return found


def discard(folder: Path) -> None:
    """What a process that was killed left of writing networks."""
    import shutil

    for left in folder.glob(f".{NETWORKS}.*.unfinished"):
        if not os.path.islink(left):
            shutil.rmtree(left, ignore_errors=True)
