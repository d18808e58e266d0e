"""Sentences to vectors by a BERT-type model, or by a CLIP model's text tower, that is not trained."""

import contextlib
import hashlib
import inspect
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import huggingface_hub
import numpy as np
import torch
import transformers
from torch import Tensor, nn

from machine import engine
from machine.errors import first_line
from machine.tensor_files import fingerprint as weights_fingerprint
from machine.word_pieces import Sentence, by_length, joined, of_one_length, readable, split_pair

HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
LONGEST = 2**20                         # tokens; a tokenizer says more where it knows of no bound
CLIP = ("clip", "clip_text_model")      # what configurations call it
# Whose vectors were others once, by the texts beside them or segments that they do not have, and may be kept so.
OTHER_BEFORE = ("convbert", "flaubert", "fnet", "mobilebert", "nystromformer", "xlm", "yoso")

POOLING: dict[str, Callable[[Tensor], Tensor]] = {                              # (B, T, D) -> (B, D), no padding in it
    "REDUCE_MEAN": lambda states: states.mean(1), "REDUCE_MAX": lambda states: states.amax(1),
    "CLS_TOKEN": lambda states: states[:, 0]}


class ModelError(Exception):
    """The model cannot be served; the message says what to do."""


class Texts(nn.Module):
    """What one of these encoders gives of texts of one length, as a module: ids (B, n) and, if it has segments, how
    many of each text's are the first segment's (B,) -> (B, T)."""

    def __init__(self, encoder):
        super().__init__()
        self.model, self.told = encoder.model, [encoder]

    def forward(self, ids: Tensor, *first: Tensor) -> Tensor:
        encoder, = self.told
        return encoder.vectors(encoder.told_apart(ids, *first))


class ByEngine:
    """What these encoders share: a network may compute in torch's place."""

    network: engine.Network | None = None
    COMPARED, LONGEST = 3, 64           # made-up texts with which a network is compared, and their most tokens

    def rows(self, length: int = 9) -> list[Tensor]:
        """Made-up texts of so many tokens, as `Texts` takes them."""
        ids = [self.trial(min(length, self.length), turn)[0] for turn in range(self.COMPARED)]
        return [torch.tensor(ids), *[torch.full((self.COMPARED,), 4)] * self.segments]

    def module(self) -> nn.Module:
        return Texts(self)

    def word_pieces(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of texts that the model is given."""
        return [ids for ids, _ in self.token_ids(texts)]

    def compute_by_engine(self) -> None:
        """From now on a network computes, which was compared with torch, long texts and short. Raises Refused."""
        module = self.module()
        network = engine.made(module, self.rows(), any_length=True)
        for length in (3, self.LONGEST):
            rows = self.rows(length)
            with torch.inference_mode():
                theirs = module(*rows).float().numpy()
            engine.check(network(*(values.numpy() for values in rows)), theirs)
        self.network = network


class SentenceEncoder(ByEngine):
    """A BERT-type model in eval mode, float32: sentences to vectors.

    folder: a local folder or a hub name. layer: of the encoder, -1 the last. length: most tokens of a sentence,
    [CLS] and [SEP] included; None for as many as the model can take. Raises ModelError.
    """

    def __init__(self, folder: str, layer: int = -2, pooling: str = "REDUCE_MEAN", length: int | None = 25,
                 device: str = "cpu"):
        self.tokenizer, model = loaded(folder, transformers.AutoModel)
        self.fingerprint = fingerprint(self.tokenizer, model)                   # before it is used: it keeps how it was
        longest = min(positions(model), self.tokenizer.model_max_length)
        if not length and longest > LONGEST:
            raise ModelError(f"-max_seq_len NONE: the model {folder!r} says no longest text; give a number")
        self.length, self.pool, self.layer = length or longest, POOLING[pooling], layer
        self.between = self.separators(folder)
        # Some models of the type have no segments, and some take something else by that name.
        self.segments = ("token_type_ids" in inspect.signature(model.forward).parameters
                         and getattr(model.config, "type_vocab_size", 0) >= 2)
        kind = f"{folder!r} (of the type {model.config.model_type})"
        try:
            self.model, self.device = model.eval().to(device), device
            self.choose_layer(kind)
            self.check_alone(kind)
        except ModelError:
            raise
        except Exception as error:                                              # from within any of a hundred models
            raise ModelError(f"cannot use {kind} with -device {device} and -max_seq_len {self.length} (it has "
                             f"{positions(model)} positions): {first_line(error)}") from None

    def separators(self, folder: str) -> list[int]:
        """Between the two texts of a pair. Raises ModelError where the tokenizer's way is not [CLS] text [SEP]."""
        cls, sep = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        try:
            plain, = self.plain_ids(["a"])
            single, pair = self.tokenizer("a").input_ids, self.tokenizer("a", "a").input_ids
        except (TypeError, ValueError) as error:                                # some want more than a text
            raise ModelError(f"the tokenizer of {folder!r} takes no plain texts ({first_line(error)})") from None
        if single != [cls, *plain, sep]:
            raise ModelError(f"the tokenizer of {folder!r} does not put [CLS] before and [SEP] after a text, but makes "
                             f"{' '.join(self.tokenizer.convert_ids_to_tokens(single))!r} of 'a': it is no BERT-type "
                             "model")
        between = pair[1 + len(plain):-1 - len(plain)]
        return between if between and set(between) == {sep} else [sep]

    def choose_layer(self, kind: str) -> None:
        """Where in hidden_states, which begin with the embedding, the layer is; the layers above it are dropped. Raises
        ModelError where it has no such layer."""
        longest = self.trial(self.length)
        with torch.inference_mode():
            states = getattr(self.model(**self.inputs([longest]), output_hidden_states=True), "hidden_states", None)
        layers = len(states or ()) - 1
        if layers < 1:
            raise ModelError(f"{kind} shows no states of its layers: it is no BERT-type model")
        if not -layers <= self.layer < layers:
            raise ModelError(f"-pooling_layer {self.layer}: the model has {layers} layers, so give one from "
                             f"{-layers} to -1")
        self.layer = 1 + self.layer % layers
        if states[self.layer].shape[:2] != (1, len(longest[0])):
            raise ModelError(f"{kind} has other states in this layer than one for each word piece: it is no BERT-type "
                             "model")
        self.dim = states[self.layer].shape[2]
        self.drop_layers_above(layers, longest, self.pool(states[self.layer]).cpu().numpy())

    def drop_layers_above(self, count: int, longest: tuple[list[int], int], expected: np.ndarray) -> None:
        """They add nothing to the vector, unless the model treats its last layer's output apart, as some do, or goes
        through its layers by number."""
        whole = self.layer
        for layers in self.model.modules():
            if isinstance(layers, torch.nn.ModuleList) and len(layers) == count:
                above = list(layers[whole:])
                del layers[whole:]
                self.layer = -1
                with contextlib.suppress(Exception):                            # from within any of a hundred models
                    if np.allclose(self.encode([longest]), expected, rtol=1e-4, atol=1e-5):
                        return
                layers.extend(above)
                self.layer = whole

    def check_alone(self, kind: str) -> None:
        """Raises ModelError where a text's vector depends on those beside it, on those before it, or on chance."""
        texts = [self.trial(self.length), *(self.trial(min(length, self.length), turn) for length in (12, 3)
                                            for turn in (0, 1))]
        alone = np.concatenate([self.encode([text]) for text in texts])
        together = self.encode(texts)
        if not np.abs(together - alone).max() <= 1e-3 * np.abs(alone).max():    # nor where it is no number
            raise ModelError(f"{kind} does not give a text the same vector each time, so it cannot be used; with a "
                             "lower -max_seq_len it may do")

    def trial(self, length: int, turn: int = 0) -> tuple[list[int], int]:
        """So many tokens of no text."""
        special = {self.tokenizer.pad_token_id, *self.tokenizer.all_special_ids}
        words = [word for word in range(min(len(self.tokenizer), 1000)) if word not in special] or [0]
        return self.joined([words[(7 * place + turn) % len(words)] for place in range(length - 2)])

    def token_ids(self, sentences: Sequence[Sentence]) -> list[tuple[list[int], int]]:
        """For each sentence its ids, [CLS] first, and how many of them are the first segment's."""
        pairs = [split_pair(sentence) for sentence in sentences]
        ids = iter(self.plain_ids([part for pair in pairs for part in pair]))
        return [self.joined(*(next(ids) for _ in pair)) for pair in pairs]

    def plain_ids(self, parts: list[Sentence]) -> list[list[int]]:
        """Ids of texts, tokenized together, and of word pieces, among which an unknown one is [UNK]."""
        texts = [readable(part, self.length) for part in parts if isinstance(part, str)]
        ids = iter(self.tokenizer(texts, add_special_tokens=False, truncation=False, padding=False,
                                  split_special_tokens=True).input_ids if texts else ())  # "[SEP]" in a text is text
        return [next(ids) if isinstance(part, str) else self.tokenizer.convert_tokens_to_ids(part[:self.length])
                for part in parts]

    def joined(self, first: list[int], second: Sequence[int] = ()) -> tuple[list[int], int]:
        cls, sep = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        return joined(first, second, cls, sep, self.between, self.length)

    def encode(self, ids: Sequence[tuple[list[int], int]]) -> np.ndarray:
        """Results of `token_ids` -> (B, dim) float32."""
        tokens, first = zip(*ids, strict=True)
        if self.network:
            return by_length(tokens, self.network, *[first] * self.segments)
        batches = list(of_one_length(tokens))
        with torch.inference_mode():
            found = torch.cat([self.alike_to_vectors([ids[place] for place in places]) for places in batches])
        found = found.float().cpu().numpy()
        vectors = np.empty_like(found)
        vectors[np.concatenate(batches)] = found
        return vectors

    def inputs(self, ids: Sequence[tuple[list[int], int]]) -> dict[str, Tensor]:
        """Of sentences of one length, each (B, n)."""
        tokens, first = (torch.tensor(values, device=self.device) for values in zip(*ids, strict=True))
        return self.told_apart(tokens, first)

    def told_apart(self, tokens: Tensor, first: Tensor | None = None) -> dict[str, Tensor]:
        """The same of ids (B, n), and how many of each sentence's are the first segment's (B,)."""
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        if self.segments:
            inputs["token_type_ids"] = (torch.arange(tokens.shape[1], device=tokens.device) >= first[:, None]).long()
        return inputs

    def alike_to_vectors(self, ids: Sequence[tuple[list[int], int]]) -> Tensor:
        """Sentences of one length to (B, dim)."""
        return self.vectors(self.inputs(ids))

    def vectors(self, inputs: dict[str, Tensor]) -> Tensor:
        """What `inputs` gives to (B, dim)."""
        return self.pool(self.model(**inputs, output_hidden_states=True).hidden_states[self.layer])     # (B, n, dim)

    def facts(self) -> dict:
        """What WordPieces has to know beside the tokenizer's file."""
        return {"start": self.tokenizer.cls_token_id, "end": self.tokenizer.sep_token_id, "between": self.between,
                "length": self.length}

    def tokens(self, ids: tuple[list[int], int]) -> list[str]:
        return self.tokenizer.convert_ids_to_tokens(ids[0])


class ClipTexts(SentenceEncoder):
    """A CLIP model's text tower and its projection, in eval mode, float32: sentences to vectors of its joint space.

    folder: a local folder or a hub name. length: most tokens of a sentence, its start and end included; None for as
    many as the model can take. Layers and pooling are the tower's own, and it knows no pairs. Raises ModelError.
    """

    segments = False

    def __init__(self, folder: str, length: int | None = 25, device: str = "cpu"):
        self.tokenizer, model = loaded(folder, transformers.CLIPTextModelWithProjection)
        longest = model.config.max_position_embeddings
        self.length, self.dim = min(length or longest, longest), model.config.projection_dim
        self.fingerprint = fingerprint(self.tokenizer, model)
        try:
            self.model, self.device = model.eval().to(device), device
        except (RuntimeError, AssertionError) as error:
            raise ModelError(f"cannot use the model with -device {device}: {first_line(error)}") from None

    def token_ids(self, sentences: Sequence[Sentence]) -> list[tuple[list[int], int]]:
        """For each sentence its ids from start to end, and how many they are."""
        first, last = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        whole = ([first, *ids[:self.length - 2], last] for ids in self.plain_ids(sentences))
        return [(ids, len(ids)) for ids in whole]

    def vectors(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.model(**inputs).text_embeds

    def facts(self) -> dict:
        return {"start": self.tokenizer.bos_token_id, "end": self.tokenizer.eos_token_id, "between": None,
                "length": self.length}

    def trial(self, length: int, turn: int = 0) -> tuple[list[int], int]:
        """So many tokens of no text."""
        ids = [self.tokenizer.bos_token_id, *range(10 + turn, 8 + turn + length), self.tokenizer.eos_token_id]
        return ids, len(ids)


class OwnWay(ByEngine):
    """A folder of sentence-transformers', whose files say how its vectors are made, by that library: what follows the
    last layer, the most tokens of a text, a prompt. In eval mode, float32.

    folder: a local folder or a hub name. length: most tokens of a text; None for what the folder says. Raises
    ModelError.
    """

    def __init__(self, folder: str, length: int | None = None, device: str = "cpu"):
        quieten()
        try:
            from sentence_transformers import SentenceTransformer  # only here: it takes seconds

            self.model = SentenceTransformer(folder, device=device, trust_remote_code=False).float().eval()
        except ImportError as error:
            raise ModelError(f"{folder!r} is a folder of sentence-transformers ({error}): pip install "
                             "sentence-transformers, or give a -pooling_layer") from None
        except Exception as error:                                              # hub and file errors of many types
            raise not_loaded(folder, error) from None
        if length:
            self.model.max_seq_length = length
        self.length = self.model.max_seq_length or LONGEST
        try:
            alone = np.concatenate([self.encode([text]) for text in OF_ALL_LENGTHS])
            together = self.encode(OF_ALL_LENGTHS)
        except Exception as error:                                              # from within any of a hundred models
            raise ModelError(f"cannot use {folder!r} as its modules.json says ({first_line(error)}); -pooling_layer -2 "
                             "takes a mean of its tokens instead") from None
        if not np.abs(together - alone).max() <= 1e-3 * np.abs(alone).max():    # nor where it is no number
            raise ModelError(f"{folder!r} does not give a text the same vector each time, so it cannot be used")
        self.dim = together.shape[1]
        self.rule = {"modules": [type(step).__name__ for step in self.model], "max_seq_len": self.length}
        self.fingerprint = weights_fingerprint(self.model.state_dict(), repr(self.model), self.model.prompts,
                                               self.model.default_prompt_name, sorted(self.model.tokenizer.get_vocab()
                                                                                      .items()))[:12]

    segments = False

    @property
    def tokenizer(self):
        return self.model.tokenizer

    def facts(self) -> dict:
        return {"start": self.tokenizer.cls_token_id, "end": self.tokenizer.sep_token_id, "between": None,
                "length": self.length, "special": True}

    def trial(self, length: int, turn: int = 0) -> tuple[list[int], int]:
        """So many tokens of no text."""
        words = [(1000 + turn + place) % len(self.tokenizer) for place in range(length - 2)]
        return [self.tokenizer.cls_token_id, *words, self.tokenizer.sep_token_id], 0

    def told_apart(self, tokens: Tensor) -> dict[str, Tensor]:
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}

    def vectors(self, inputs: dict[str, Tensor]) -> Tensor:
        """Ids of texts of one length, each (B, n), to (B, dim)."""
        return self.model(inputs)["sentence_embedding"]

    def token_ids(self, sentences: Sequence[str]) -> list[str]:
        """What `encode` takes: the texts, which the library tokenizes."""
        return [readable(text, self.length) for text in sentences]

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """(B, dim) float32."""
        if self.network:
            return by_length(self.word_pieces(texts), self.network)
        return self.model.encode([*texts], batch_size=64, show_progress_bar=False, convert_to_numpy=True)

    def word_pieces(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids that the library reads in texts: with its prompt before them, cut, without padding."""
        prompt = self.model.prompts.get(self.model.default_prompt_name) or ""
        read = self.model.preprocess([prompt + text for text in texts])
        return [ids[mask.bool()].tolist() for ids, mask in zip(read["input_ids"], read["attention_mask"], strict=True)]

    def compute_by_engine(self) -> None:
        """As of ByEngine; of texts, too, which the library also puts a prompt before. Raises Refused."""
        theirs = self.encode(OF_ALL_LENGTHS)
        super().compute_by_engine()
        try:
            engine.check(self.encode(OF_ALL_LENGTHS), theirs)
        except engine.Refused:
            self.network = None
            raise


OF_ALL_LENGTHS = ["red", "is red and has a longer hem", "of a darker blue, and with two pockets more " * 3]


def has_own_way(folder: str) -> bool:
    """Whether a folder, or a model of the hub, is one of sentence-transformers'."""
    missing = {f"_raise_exceptions_for_{what}": False for what in
               ("gated_repo", "missing_entries", "connection_errors")}
    try:
        return transformers.utils.cached_file(folder, "modules.json", **missing) is not None
    except (OSError, ValueError):                                               # no such folder: said when it is loaded
        return False


def sentence_encoder(folder: str, layer: int = -2, pooling: str = "REDUCE_MEAN", length: int | None = 25,
                     device: str = "cpu") -> SentenceEncoder:
    """Whichever the model is for. Raises ModelError."""
    if configuration(folder).model_type in CLIP:
        return ClipTexts(folder, length, device)
    return SentenceEncoder(folder, layer, pooling, length, device)


def loaded(folder: str, kind: type) -> tuple[transformers.PreTrainedTokenizerBase, torch.nn.Module]:
    """The tokenizer and the model in a folder, whole. No code that comes with it is run. Raises ModelError."""
    quieten()
    config = configuration(folder)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False)
    except Exception as error:                                                  # hub and file errors of many types
        raise not_loaded(folder, error, "tokenizer of", "tokenizer.json") from None
    check_tokenizer(folder, tokenizer, config)
    try:
        model, loading = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True,
                                              **({} if config.model_type in CLIP else {"config": config}),
                                              trust_remote_code=False)
    except Exception as error:
        raise not_loaded(folder, error) from None
    check_whole(folder, loading)
    return tokenizer, model


def configuration(folder: str) -> transformers.PreTrainedConfig:
    """A model's, if it is of a type that is served. Folders of BERT's first years have one that does not say so. Raises
    ModelError."""
    files = [path for name in ("config.json", "bert_config.json") if (path := Path(folder, name)).is_file()]
    try:
        if not files or "model_type" in json.loads(files[0].read_text()):
            config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        elif [*Path(folder).glob("*.bin"), *Path(folder).glob("*.safetensors")]:
            config = transformers.BertConfig.from_json_file(files[0])
        else:
            raise ModelError(f"{folder!r} holds no weights of PyTorch, but perhaps TensorFlow's: Google's models are "
                             "on the Hugging Face hub, as bert-base-uncased is, or converted with transformers 4 by "
                             "python -m transformers.models.bert.convert_bert_original_tf_checkpoint_to_pytorch")
    except ModelError:
        raise
    except Exception as error:                                                  # hub and file errors of many types
        raise not_loaded(folder, error) from None
    if config.model_type in CLIP:
        return config
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{folder!r} is of the type {config.model_type}, which has a decoder; name a BERT-type model, "
                         "which only reads, as bert-base-uncased")
    if hasattr(config, "text_config") or hasattr(config, "vision_config"):
        raise ModelError(f"{folder!r} is of the type {config.model_type}, for images and texts: of those only CLIP's "
                         "own is served; the trainer has many more, as --text_encoder open_clip:MODEL/TAG")
    if not all(hasattr(config, name) for name in ("vocab_size", "hidden_size", "num_hidden_layers")):
        raise ModelError(f"{folder!r} is of the type {config.model_type}; name a BERT-type model, as bert-base-uncased")
    return config


def quieten() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()                                 # of reading weights, a second's work
    huggingface_hub.utils.enable_progress_bars()                                # of downloading them


def not_loaded(folder: str, error: Exception, part: str = "model",
               files: str = "config.json, the weights and vocab.txt") -> ModelError:
    if "trust_remote_code" in str(error):
        return ModelError(f"the {part} of {folder!r} is made by code that comes with it, and no such code is run here; "
                          "name a model of a type that transformers has, as bert-base-uncased")
    fetched = (huggingface_hub.constants.HF_HUB_OFFLINE and isinstance(error, OSError) and not Path(folder).exists()
               and HUB_NAME.fullmatch(folder))
    hint = "; HF_HUB_OFFLINE=0 has it fetched" if fetched else ""
    return ModelError(f"cannot load the {part} {folder!r} ({first_line(error)}); name a folder with {files}, or a "
                      f"model of the Hugging Face hub{hint}")


def check_tokenizer(folder: str, tokenizer, config: transformers.PreTrainedConfig) -> None:
    """Without its files transformers makes an empty tokenizer and says nothing. Raises ModelError."""
    words, known = len(tokenizer), config.get_text_config().vocab_size
    if not known / 2 < words <= known:
        raise ModelError(f"the tokenizer of {folder!r} has {words} word pieces, its model {known}: get the model's "
                         f"{files_of(type(tokenizer))}, which is missing or another model's")
    if config.model_type not in CLIP and None in (tokenizer.cls_token_id, tokenizer.sep_token_id):
        raise ModelError(f"{folder!r} is of the type {config.model_type} and its tokenizer has no [CLS] or no [SEP]; "
                         "name a BERT-type model, as bert-base-uncased")


def files_of(tokenizer: type) -> str:
    """Which files make a tokenizer of this class."""
    names = getattr(tokenizer, "vocab_files_names", {})
    others = " and ".join(name for kind, name in names.items() if kind != "tokenizer_file")
    return " or ".join(filter(None, (names.get("tokenizer_file"), others))) or "tokenizer.json"


def positions(model: torch.nn.Module) -> int | float:
    """How many tokens a model has places for; those of RoBERTa's kind number them from one beyond padding's."""
    padding = [place.padding_idx + 1 for name, place in model.named_modules() if name.endswith("position_embeddings")
               and getattr(place, "padding_idx", None) is not None]
    return getattr(model.config, "max_position_embeddings", math.inf) - max(padding, default=0)


def check_whole(folder: str, loading: dict) -> None:
    """Raises ModelError where the files lack weights that count."""
    if missing := sorted(name for name in loading["missing_keys"] if not name.startswith("pooler.")):
        raise ModelError(f"{folder!r} lacks {len(missing)} of its model's weights, first {missing[0]}; "
                         "download it again")


def fingerprint(tokenizer, model: torch.nn.Module) -> str:
    """Twelve digits that change with any weight or word: what a client may keep vectors under."""
    reading = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else str(tokenizer.init_kwargs)  # lower case?
    digest = hashlib.sha256(json.dumps([sorted(tokenizer.get_vocab().items()), reading, model.config.to_diff_dict()],
                                       default=str).encode())
    if model.config.model_type in OTHER_BEFORE:
        digest.update(b"alone")
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:12]
