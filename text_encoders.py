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
from torch import Tensor, nn

from image_encoders import LIBRARIES, quiet
from machine import engine
from machine.errors import InputError, first_line
from machine.offline import offline
from machine.tensor_files import fingerprint
from machine.word_pieces import CLEANINGS, by_length, byte_pairs
from text_model import SentenceService

OWN = "own"                             # of a flag: as the model's folder says
BERTS = -2, 25                          # else: layer and most tokens, as BERT-as-service has them
AT_ONCE = 64                            # texts that a CLIP model's tower is given, of all its places each
# Texts with which a network is compared: of one length, by any tokenizer, and of many.
OF_ONE_LENGTH = ["a red dress", "a red shirt", "a blue dress"]
COMPARED = ["red", "is red and has a longer hem", "of a darker blue, and with two pockets more " * 9, "!"]


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
    """A text encoder in this process, asked as a sentence service is. features: what its vectors depend on. engine:
    what computes them, in float32, torch at first."""

    name: str
    features: dict
    dim: int
    engine = "torch"
    at_once = 512                       # texts that it encodes, so that many are of one length

    def vectors(self, texts: list[str]) -> np.ndarray:
        """(N, dim) float32."""
        raise NotImplementedError

    def compute_by(self, name: str) -> None:
        """From now on with this engine, which was compared with torch. Raises Refused; then torch still computes."""
        if name != "torch":
            self.convert()
            self.engine = name

    # What a network of it is made of

    segments = False                    # whether its module is told how many of a text's ids are the first segment's

    def convert(self) -> None:
        """Have a network compute in torch's place. Raises Refused."""
        raise NotImplementedError

    def module(self) -> tuple[nn.Module, list[Tensor]]:
        """Ids (B, n) of texts of one length -> (B, T), with rows to try it on."""
        raise NotImplementedError

    def word_pieces(self, texts: list[str]) -> list[list[int]]:
        """Those ids."""
        raise NotImplementedError

    def tokenizer_file(self) -> tuple[bytes, dict]:
        """How texts become ids without torch: tokenizer.json, and what `WordPieces` has to know beside it. Raises
        Refused."""
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

    def convert(self) -> None:
        self.encoder.compute_by_engine()

    @property
    def segments(self) -> bool:
        return self.encoder.segments

    def module(self) -> tuple[nn.Module, list[Tensor]]:
        return self.encoder.module(), self.encoder.rows()

    def word_pieces(self, texts: list[str]) -> list[list[int]]:
        return self.encoder.word_pieces(texts)

    def tokenizer_file(self) -> tuple[bytes, dict]:
        if not self.encoder.tokenizer.is_fast:
            raise engine.Refused(f"the texts of {self.name} are read by Python's code")
        return self.encoder.tokenizer.backend_tokenizer.to_str().encode(), self.encoder.facts()


class ClipTower(InProcess):
    """A CLIP model's text tower and its projection. weights: 'imagenet' for the name's own, or a file of them."""

    def __init__(self, model: str, weights: str):
        plain, _ = LIBRARIES["open_clip"].parts(model)
        self.tower = loaded_clip(model, weights)
        self.tokenizer = clip_tokenizer(model, plain)
        self.name, self.features = f"open_clip:{model}", {"text_encoder": "open_clip", "model": plain,
                                                          "fingerprint": fingerprint(self.tower.state_dict())[:12]}
        self.network: engine.Network | None = None
        self.dim = self.vectors(["size"]).shape[1]

    def vectors(self, texts: list[str]) -> np.ndarray:
        ids = self.ids(texts)
        if self.network:
            return by_length(self.cut(ids), self.network)
        with torch.inference_mode():
            return np.concatenate([self.tower.encode_text(part).float().numpy() for part in ids.split(AT_ONCE)])

    def ids(self, texts: Sequence[str]) -> Tensor:
        """(N, C) ids, padded to as many as the tower knows."""
        return self.tokenizer([text.encode("utf-8", "replace").decode() for text in texts])  # half a surrogate pair

    def cut(self, ids: Tensor) -> list[list[int]]:
        """Rows of ids as the tower's module takes them: where it is causal, up to their end."""
        ends = ids.argmax(1) + 1 if is_causal(self.tower) else [None] * len(ids)
        return [row[:end].tolist() for row, end in zip(ids, ends, strict=True)]

    def word_pieces(self, texts: list[str]) -> list[list[int]]:
        return self.cut(self.ids(texts))

    def tokenizer_file(self) -> tuple[bytes, dict]:
        words, plain = self.tokenizer, isinstance(self.tokenizer, LIBRARIES["open_clip"].open_clip.SimpleTokenizer)
        clean = plain and words.clean_fn.__name__.removeprefix("_clean_")
        if not plain or words.reduction_fn or clean not in CLEANINGS:
            raise engine.Refused(f"the texts of {self.name} are read by {type(words).__name__} of open_clip")
        special = [words.decoder[number] for number in words.all_special_ids]
        causal = is_causal(self.tower)
        return byte_pairs(words.encoder, list(words.bpe_ranks), special), {
            "start": words.sot_token_id, "end": words.eot_token_id, "between": None, "length": words.context_length,
            "special": True, "clean": clean, "padded": not causal, "until_end": causal}

    def module(self) -> tuple[nn.Module, list[Tensor]]:
        if not is_causal(self.tower):
            return WholeTexts(self.tower), [self.ids(OF_ONE_LENGTH)]
        return CausalTexts(self.tower), [torch.tensor(self.cut(self.ids(OF_ONE_LENGTH)))]

    def convert(self) -> None:
        theirs = self.vectors(COMPARED)
        module, rows = self.module()
        self.network = engine.made(module, rows, any_length=is_causal(self.tower))
        try:
            engine.check(self.vectors(COMPARED), theirs)
        except engine.Refused:
            self.network = None
            raise


class WholeTexts(nn.Module):
    """Any tower: padded ids (B, C) -> (B, T)."""

    def __init__(self, tower: nn.Module):
        super().__init__()
        self.tower = tower

    def forward(self, ids: Tensor) -> Tensor:
        return self.tower.encode_text(ids)


class CausalTexts(nn.Module):
    """A tower that reads from left to right, so that nothing after a text's end tells: ids (B, n) of B texts of one
    length, the end last -> (B, T)."""

    def __init__(self, tower: nn.Module):
        super().__init__()
        self.tower = tower

    def forward(self, ids: Tensor) -> Tensor:
        text, length = text_part(self.tower), ids.shape[1]
        words = text.token_embedding(ids) + text.positional_embedding[:length]  # (B, n, w)
        states = text.transformer(words, attn_mask=text.attn_mask[:length, :length])
        ends, projection = text.ln_final(states[:, -1]), text.text_projection
        return projection(ends) if isinstance(projection, nn.Module) else ends @ projection


def text_part(tower: nn.Module) -> nn.Module:
    """What has a tower's layers: of open_clip's models some are their text tower, others hold one."""
    return getattr(tower, "text", tower)


def is_causal(tower: nn.Module) -> bool:
    """Whether it is CLIP's own kind, whose end is the largest id; others are only asked as a whole."""
    text = text_part(tower)
    return (all(hasattr(text, part) for part in ("token_embedding", "transformer", "ln_final", "text_projection"))
            and getattr(text, "attn_mask", None) is not None and getattr(text, "cls_emb", None) is None
            and not getattr(text, "use_pad_mask", False)
            and (getattr(text, "pool_type", None) or getattr(text, "text_pool_type", "argmax")) == "argmax")


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


def clip_tokenizer(model: str, plain: str) -> Callable[[list[str]], Tensor]:
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
