"""Every family of text models that transformers has, as a tiny random folder: the vectors of bert_server.py beside a
plain computation, one text at a time and unpadded, or one line that refuses it. Minutes: python -m tests.sweep_texts"""

import copy
import inspect
import json
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from machine.sentence_encoder import ModelError, sentence_encoder

TEXTS = ["red", "is darker and has a longer hem than the one before, with a ribbon at its end and no belt", "old dog",
         "a wet dog on a red bus", "ripe tomato", "replace red with blue", "red " * 70]
WORDS = sorted({word for text in TEXTS for word in text.replace(",", " ,").split()})
LETTERS = "abcdefghijklmnopqrstuvwxyz,"
WAYS = [(-2, 25), (-1, 25), (-2, None)]                                         # layer, length

# Sizes, under whichever of these names a family's configuration has.
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8,
         "intermediate_size": 48, "embedding_size": 32, "max_position_embeddings": 64, "n_positions": 64, "d_ff": 48,
         "d_kv": 8, "num_layers": 2, "num_decoder_layers": 2, "encoder_layers": 2, "decoder_layers": 2,
         "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
# What else each takes. A list: several of a family.
ALIKE = {family: [{}] for family in (
    "bert camembert convbert data2vec-text deberta deberta-v2 distilbert electra ernie esm eurobert flaubert fnet "
    "gte ibert jina_embeddings_v3 layoutlm megatron-bert modernbert modernbert-decoder "
    "mpnet mra nomic_bert nystromformer rembert roberta-prelayernorm roformer splinter squeezebert tapas "
    "ultrabert xlm-roberta xlm-roberta-xl xmod yoso bros dpr bert-generation gpt2 "
    "openai-gpt llama bart mbart mvp plbart led pegasus bigbird_pegasus marian m2m_100 t5 mt5 umt5").split()}
WITH_IMAGES = ("siglip", "siglip2", "altclip", "chinese_clip", "blip", "flava", "bridgetower")  # no weights are made of
FAMILIES = {
    **ALIKE, **{family: [{}] for family in WITH_IMAGES},
    "albert": [{}, {"num_hidden_groups": 3}],
    "big_bird": [{"attention_type": "original_full"}, {"block_size": 4, "num_random_blocks": 1}],
    "canine": [{"num_hash_buckets": 64}],
    "funnel": [{"block_sizes": [1, 1], "block_repeats": [1, 1], "d_model": 32, "n_head": 4, "d_head": 8,
                "d_inner": 48}],
    "layoutlmv3": [{"coordinate_size": 6, "shape_size": 4, "visual_embed": False}],
    "lilt": [{"hidden_size": 48, "channel_shrink_ratio": 2}],
    "longformer": [{"attention_window": 8}],
    "luke": [{"entity_vocab_size": 9, "entity_emb_size": 8}],
    "mobilebert": [{"intra_bottleneck_size": 16, "true_hidden_size": 16}, {"normalization_type": "layer_norm"},
                   {"use_bottleneck": False, "intra_bottleneck_size": 32}],
    "perceiver": [{"d_latents": 32, "d_model": 32, "num_latents": 8, "num_self_attends_per_block": 2}],
    "prophetnet": [{"num_encoder_layers": 2, "num_decoder_layers": 2}],
    "reformer": [{"axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16], "attn_layers": ["local", "lsh"] * 2}],
    "roberta": [{}],
    "roc_bert": [{"pronunciation_vocab_size": 9, "shape_vocab_size": 9}],
    "xlm": [{}],
    "xlnet": [{"d_head": 8, "d_inner": 48}],
}
OF_OTHERS = {"camembert": "XLMRobertaTokenizer", "roformer": "BertTokenizer"}  # its own class does not take these words
FIXED = {("funnel", "num_hidden_layers"), ("prophetnet", "num_hidden_layers"), ("xlnet", "max_position_embeddings")}


def byte_pairs(cls: type) -> transformers.PreTrainedTokenizerBase:
    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *bytes_to_unicode().values()]
    return cls(vocab={word: number for number, word in enumerate(words)}, merges=[])


def unigram(cls: type) -> transformers.PreTrainedTokenizerBase:
    special = ("<s> <pad> </s> <unk> [CLS] [SEP] [PAD] [UNK] <sep> <cls> [MASK] <mask>").split()
    plain = ["\u2581", *(f"\u2581{word}" for word in WORDS), *LETTERS]
    where = {"unk_id": 3} if "unk_id" in inspect.signature(cls).parameters else {}
    return cls(vocab=[*((word, 0.0) for word in special), *((word, -float(len(plain))) for word in plain)], **where)


def word_pieces(cls: type, **how) -> transformers.PreTrainedTokenizerBase:
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"], ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    roberta = inspect.signature(cls).parameters["cls_token"].default == "<s>"
    words = [*special[not roberta], *special[roberta], *WORDS, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    return cls(vocab={word: number for number, word in enumerate(words)}, **how)


def tokenizer(family: str) -> transformers.PreTrainedTokenizerBase:
    """Of the family's own class, where that can be made of a few words without further packages."""
    cls = getattr(transformers, OF_OTHERS.get(family) or TOKENIZER_MAPPING_NAMES.get(family) or "BertTokenizer")
    takes = inspect.signature(cls).parameters
    if cls in (transformers.CanineTokenizer, transformers.PerceiverTokenizer):
        return cls()
    if family in ("flaubert", "tapas", "xlm"):                                  # no segments, or others
        return word_pieces(transformers.BertTokenizer, model_input_names=["input_ids", "attention_mask"])
    if cls.__name__ == "TokenizersBackend" or "vocab" not in takes:
        return word_pieces(transformers.BertTokenizer)
    if "merges" in takes:
        return byte_pairs(cls)
    return word_pieces(cls) if "dict[" in str(takes["vocab"].annotation) else unigram(cls)


def configuration(family: str, extra: dict, words: transformers.PreTrainedTokenizerBase):
    cls = transformers.CONFIG_MAPPING[family]
    usual = cls()
    sizes = {name: value for name, value in SIZES.items() if hasattr(usual, name) and (family, name) not in FIXED}
    ids = {name: getattr(words, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id",
                                                   "sep_token_id") if getattr(words, name, None) is not None}
    return cls(**{**sizes, **extra}, **ids, **({"vocab_size": len(words)} if hasattr(usual, "vocab_size") else {}))


def write(family: str, extra: dict, folder: Path) -> None:
    """A tiny random model of a family, every weight of which tells, as a folder."""
    words = tokenizer(family)
    words.save_pretrained(folder)
    torch.manual_seed(0)
    settings = configuration(family, extra, words)
    if family in WITH_IMAGES:
        settings.save_pretrained(folder)
        return
    settings.architectures = ["FunnelModel"] if family == "funnel" else None    # of its two
    model = transformers.AutoModel.from_config(settings)
    with torch.no_grad():
        for value in model.parameters():
            if value.dim() > 1 and value.is_floating_point():
                value.normal_(0, 0.3)
    model.save_pretrained(folder)


@torch.no_grad()
def plainly(folder: Path, texts: list[str], layer: int, length: int) -> np.ndarray:
    """As transformers has it: (N, D)."""
    words = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = transformers.AutoModel.from_pretrained(folder, trust_remote_code=False, dtype=torch.float32).eval()
    vectors = []
    for text in texts:
        fresh = copy.deepcopy(model)                                            # BigBird goes by what it has read
        inputs = words(text, truncation=True, max_length=length, return_tensors="pt")
        vectors.append(fresh(**inputs, output_hidden_states=True).hidden_states[layer][0].mean(0))
    return torch.stack(vectors).numpy()


def farthest(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest relative difference of two vectors."""
    if found.shape != expected.shape:
        return float("inf")
    return float(max(np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)))


def verdict(folder: Path, layer: int, length: int | None) -> tuple[str, str]:
    """What becomes of a folder, and more of it in words."""
    try:
        encoder = sentence_encoder(str(folder), layer, length=length)
        ids = encoder.token_ids(TEXTS)
        alone = np.concatenate([encoder.encode([one]) for one in reversed(ids)])[::-1]
        together = encoder.encode(ids)
    except ModelError as error:
        return ("refused" if "\n" not in str(error) else "wrong"), str(error)
    except Exception:
        return "traceback", traceback.format_exc(limit=-1).strip().splitlines()[-1]
    expected = plainly(folder, TEXTS, layer, encoder.length)
    apart = [farthest(vectors, expected) for vectors in (alone, together)]
    return ("right" if max(apart) < 1e-4 else "wrong"), f"{apart[0]:.1e} alone, {apart[1]:.1e} in a batch"


def main(families: list[str] | None = None) -> int:
    """Prints what becomes of each; the number of those that are wrong or end in a traceback."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)                                                    # more would only wait for each other
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    counts = Counter()
    for family in families or FAMILIES:
        for extra in FAMILIES[family]:
            with tempfile.TemporaryDirectory() as folder:
                write(family, extra, Path(folder))
                said = [(way, *verdict(Path(folder), *way)) for way in WAYS]
            for (layer, length), what, more in said:
                counts[what] += 1
                more = more.replace(folder, "FOLDER")
                name = f"{family} {json.dumps(extra) if extra else ''}"
                print(f"{name:60} layer {layer}, length {length}: {what}: {more}", flush=True)
    print(f"{len(families or FAMILIES)} families of text models, {sum(counts.values())} cases: {dict(counts)}")
    return counts["wrong"] + counts["traceback"]


if __name__ == "__main__":
    sys.exit(bool(main(sys.argv[1:])))
