"""A checkpoint's model, computed by torch, as searching has it."""

import logging
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from img_text_composition_models import MODELS, Part
from machine import engine
from machine.device import choose_device
from machine.errors import InputError, first_line
from machine.tensor_files import bytes_of, fingerprint
from searching.encoder import LARGEST_SIDE, Encoder
from text_encoders import sentence_source, text_encoder_of
from text_model import SentenceTable
from training import checkpoint

log = logging.getLogger(__name__)

COMPOSED_AT_ONCE = 512                  # queries
CONVERTED, COMPARED = 128, 8            # pictures that are worth the seconds of a network's making; and compared with


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


class CheckpointEncoder(Encoder):
    """The model of a checkpoint and what goes with it: image size, vocabulary, texts' kind. What it has of torch: the
    checkpoint's content as `state`, the model as `model`. A large gallery is encoded by `engine` on a CPU: 'auto' where
    one is there, or 'torch'.

    device: a GPU where there is one, unless given, or what is called to choose one. where: of the sentence service, by
    flag, what shall differ from the checkpoint's. folder: keeps its vectors. Raises InputError for what is no whole
    checkpoint.
    """

    def __init__(self, path: str | Path, device: str | torch.device | Callable | None = None, where: dict | None = None,
                 folder: Path | None = None, engine: str = "auto"):
        self.engine, self.network = engine, None
        self.device = torch.device(device() if callable(device) else device or choose_device("auto"))
        self.state, self.path = checkpoint.load(path), path
        self.opt = self.state["opt"]
        self.text_encoder = text_encoder_of(self.opt)
        own = self.text_encoder == "lstm" or MODELS[checkpoint.recipe(self.state, path).composer].frozen
        self.sentences = None if own else Sentences(self.state, where or {}, folder)
        self.check(self.sentences)
        self.model = checkpoint.rebuild(self.state, path, self.sentences).to(
            self.device, memory_format=torch.channels_last)
        self.size, self.resampling = self.model.recipe.image_size, self.model.traits.resampling
        self.image_dim, self.query_dim = self.model.image_dim, self.model.query_dim
        self.vocabulary = self.model.vocabulary
        self.examples = [text for text in self.state.get("example_texts", []) if text.strip()]

    def check(self, sentences: Sentences | None) -> None:
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

    def encode(self, pictures: Sequence[str | Path]) -> np.ndarray:
        """As of Encoder."""
        if len(pictures) >= CONVERTED and self.engine != "torch" and self.device.type == "cpu" and not self.network:
            self.convert(np.stack([self.read(picture) for picture in pictures[:COMPARED]]))
        return super().encode(pictures)

    def convert(self, pixels: np.ndarray) -> None:
        """Have a network encode pictures, if there is an engine, and it takes the encoder. pixels: some pictures', with
        which it is compared, (B, S, S, 3)."""
        if not engine.is_there():
            return
        try:
            self.network = engine.made(Part(self.model, "encode_image"), [torch.from_numpy(pixels).permute(0, 3, 1, 2)])
        except engine.Refused as why:
            self.engine = "torch"
            log.warning("note: %s; torch encodes the pictures", why)

    @torch.inference_mode()
    def encode_pixels(self, pixels: np.ndarray) -> np.ndarray:
        if self.network:
            return self.network(pixels.transpose(0, 3, 1, 2))
        batch = torch.from_numpy(pixels).permute(0, 3, 1, 2)                    # (B, 3, S, S)
        return self.model.encode_image(batch.to(self.device)).cpu().numpy()

    @torch.inference_mode()
    def encode_texts(self, texts: list[str]) -> np.ndarray:
        return self.model.encode_text(texts).cpu().numpy()

    @torch.inference_mode()
    def composed(self, images: np.ndarray, texts: np.ndarray) -> np.ndarray:
        parts = [(torch.from_numpy(np.ascontiguousarray(rows[start:start + COMPOSED_AT_ONCE])).to(self.device)
                  for rows in (images, texts)) for start in range(0, len(images), COMPOSED_AT_ONCE)]
        return torch.cat([self.model.as_query(self.model.compose(*part)) for part in parts]).cpu().numpy()

    @torch.inference_mode()
    def meet(self, gallery: np.ndarray) -> None:
        self.model.meet(torch.from_numpy(gallery).to(self.device))

    @torch.inference_mode()
    def score(self, query: np.ndarray, gallery: np.ndarray) -> np.ndarray:
        rows = (torch.from_numpy(values).to(self.device) for values in (query[None], gallery))
        return self.model.score(*rows)[0].cpu().numpy()
