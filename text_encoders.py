"""Which text encoder a run has, and those that are not trained: a sentence service, or a model in this process.

    lstm                            trained with the composer: text_model.py
    service                         BERT-as-service, the same as --use_bert True
    hf:NAME_OR_FOLDER               a BERT-type model in this process: bert_server.py's vectors without a server, or
                                    what a folder of sentence-transformers says
    open_clip:MODEL/TAG             the text tower of a CLIP model, in one space with its images
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import nn

from image_encoders import LIBRARIES, quiet
from machine.errors import InputError, first_line
from machine.offline import offline
from machine.tensor_files import fingerprint
from text_model import SentenceService

OWN = "own"                             # of a flag: as the model's folder says
BERTS = -2, 25                          # else: layer and most tokens, as BERT-as-service has them


def text_encoder_of(flags: dict) -> str:
    """The text encoder that flags ask for, older checkpoints' too. Raises InputError where they ask for two."""
    name = flags.get("text_encoder", "lstm")
    if flags.get("use_bert") is not True:
        return name
    if name not in ("lstm", "service"):
        raise InputError(f"--use_bert True is --text_encoder service, and --text_encoder {name} another; drop one")
    return "service"


def sentence_source(flags: dict) -> "SentenceService | InProcess":
    """Where the vectors of these flags' texts come from. Raises InputError for a name that stands for nothing."""
    kind, colon, name = text_encoder_of(flags).partition(":")
    if kind == "service" and not colon:
        return SentenceService(flags.get("bert_ip", "localhost"), flags.get("bert_port", 5555),
                               flags.get("bert_port_out", 5556), flags.get("bert_timeout", 10.0))
    if kind == "hf" and name:
        return HuggingFace(name, flags["pooling_layer"], flags["max_seq_len"])
    if kind == "open_clip" and name:
        same = flags["image_encoder"] == flags["text_encoder"]                  # so its images' weights are its own
        return ClipTower(name, flags["image_weights"] if same else "imagenet")
    raise InputError(f"--text_encoder {kind}{colon}{name}: choose lstm, service, hf:NAME_OR_FOLDER or "
                     "open_clip:MODEL/TAG")


class InProcess:
    """A text encoder in this process, asked as a sentence service is. features: what its vectors depend on."""

    name: str
    features: dict
    dim: int
    at_once = 64                        # texts that it encodes

    def vectors(self, texts: list[str]) -> np.ndarray:
        """(N, dim) float32."""
        raise NotImplementedError

    def connected(self) -> AbstractContextManager:
        return nullcontext(self)

    def ask(self, _client: object, texts: list[str]) -> np.ndarray:
        return self.vectors(texts)

    def encode(self, texts: Sequence[str], progress: Callable) -> Iterator[tuple[list[str], np.ndarray]]:
        """Some of the texts and their (n, dim) vectors, a batch at a time."""
        chunk: list[str] = []
        for place, text in enumerate(progress(texts, desc="sentence vectors", unit="text"), start=1):
            chunk.append(text)
            if len(chunk) == self.at_once or place == len(texts):
                yield chunk, self.vectors(chunk)
                chunk = []

    def complaint(self, what: str) -> InputError:
        return InputError(f"--text_encoder {self.name} {what}; start the run again")

    def __str__(self) -> str:
        return f"--text_encoder {self.name}"


class HuggingFace(InProcess):
    """A model of the Hugging Face hub's kind: of a folder of sentence-transformers' the vectors that its files say, of
    others, or of a given layer, the mean over a text's tokens, as bert_server.py serves them; of a CLIP model what its
    text tower gives.

    layer, length: as the flags --pooling_layer and --max_seq_len say, OWN for what the folder says, else BERT's.
    """

    at_once = 256                       # so that many are of one length

    def __init__(self, folder: str, layer: int | str, length: int | str):
        from machine.sentence_encoder import ModelError, OwnWay, has_own_way, sentence_encoder  # transformers: seconds

        self.name, (bert_layer, bert_length) = f"hf:{folder}", BERTS
        try:
            if layer == OWN and has_own_way(folder):
                self.encoder = OwnWay(folder, None if length == OWN else length)
                how = self.encoder.rule
            else:
                layer, length = (bert if given == OWN else given for given, bert in
                                 ((layer, bert_layer), (length, bert_length)))
                self.encoder = sentence_encoder(folder, layer, length=length)
                how = {"pooling_layer": layer, "pooling_strategy": "REDUCE_MEAN", "max_seq_len": length}
        except ModelError as error:
            said = re.sub("-(pooling|max_seq)", r"--\1", str(error))
            raise InputError(f"--text_encoder hf:{folder}: {said}") from None
        self.dim = self.encoder.dim
        self.features = {"text_encoder": "hf", "fingerprint": self.encoder.fingerprint, **how}

    def vectors(self, texts: list[str]) -> np.ndarray:
        return self.encoder.encode(self.encoder.token_ids(texts))


class ClipTower(InProcess):
    """A CLIP model's text tower and its projection. weights: 'imagenet' for the name's own, or a file of them."""

    def __init__(self, model: str, weights: str):
        plain, _ = LIBRARIES["open_clip"].parts(model)
        self.tower = loaded_clip(model, weights)
        self.tokenizer = clip_tokenizer(model, plain)
        self.name, self.features = f"open_clip:{model}", {"text_encoder": "open_clip", "model": plain,
                                                          "fingerprint": fingerprint(self.tower.state_dict())[:12]}
        self.dim = self.vectors(["size"]).shape[1]

    @torch.inference_mode()
    def vectors(self, texts: list[str]) -> np.ndarray:
        readable = [text.encode("utf-8", "replace").decode() for text in texts]  # half a surrogate pair is no text
        return self.tower.encode_text(self.tokenizer(readable)).float().numpy()


def loaded_clip(model: str, weights: str) -> nn.Module:
    """open_clip's model without its images' tower. weights: as of `ClipTower`. Raises InputError where they cannot be
    loaded, or lack the text tower's."""
    library = LIBRARIES["open_clip"]
    if weights == "none":
        raise InputError(f"--text_encoder open_clip:{model} learns nothing, so it needs weights: pass "
                         "--image_weights imagenet or PATH")
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            tower = library.whole(model).eval()
            path = library.fetched(model) if weights == "imagenet" else Path(weights)
            missing, _ = tower.load_state_dict(library.state(path, tower), strict=False)
    except Exception as error:                                              # torch.load raises a dozen types
        raise InputError(f"--text_encoder open_clip:{model}: cannot load its weights {weights!r} "
                         f"({first_line(error)}){to_fetch(error)}") from None
    if missing := [name for name in missing if not name.startswith(("visual.", "logit_"))]:
        raise InputError(f"--text_encoder open_clip:{model}: {weights} lacks its text tower's weights, first "
                         f"{missing[0]}")
    tower.visual = None
    return tower


def clip_tokenizer(model: str, plain: str) -> Callable[[list[str]], torch.Tensor]:
    """Texts to (N, context length) ids. Raises InputError; some have files of their own on the hub."""
    open_clip = LIBRARIES["open_clip"].open_clip
    try:
        with quiet():
            return open_clip.get_tokenizer(plain)
    except Exception as error:                                                  # hub and file errors of many types
        known = (open_clip.get_model_config(plain) or {}).get("text_cfg", {})
        where = f"https://huggingface.co/{known['hf_tokenizer_name']}" if "hf_tokenizer_name" in known else plain
        raise InputError(f"--text_encoder open_clip:{model}: cannot load its tokenizer ({first_line(error)}); get "
                         f"tokenizer.json of {where} into the Hugging Face cache{to_fetch(error)}") from None


def to_fetch(error: Exception) -> str:
    """What to add where something was to be fetched, and all that is missing is the permission."""
    asked = any(word in str(error) for word in ("OFFLINE is set", "offline", "cache"))
    return "; HF_HUB_OFFLINE=0 has it fetched" if asked and offline() else ""
