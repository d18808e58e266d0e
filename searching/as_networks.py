"""A model's parts as modules of tensors alone, of which an index's networks are made, and ONNX files for others.

    image       pixels (B, 3, S, S) uint8, RGB, normalized within -> feature (B, D) float32
    composer    image (B, D), text (B, T) float32 features -> query (B, D) float32, unit rows
    text        ids (B, n) of B texts of one length -> (B, T) float32
    words       the same of words that learn beside a text encoder's vectors

An index has OpenVINO's own files, made in seconds and without packages that only an export needs; ONNX is what other
programs read.
"""

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from img_text_composition_models import ImgTextCompositionBase
from machine import engine
from machine.checksums import digest
from searching import networks
from searching.encoder import Encoder
from searching.from_checkpoint import CheckpointEncoder
from searching.image_list import MODEL, ImageList
from searching.networks import COMPOSER, IMAGE, NETWORKS, TEXT, WORDS, NetworkEncoder, Record, Unusable
from text_model import TextLSTMModel

TOLD = "model", "use_complete_text_query"                                       # of a run's flags, on a page
COMPARED = 3                            # pictures, made up
# Texts that a tokenizer has to read as transformers does, letter for letter.
TEXTS = ("is white, with a ribbon", "A-line, CAFÉ naïve Straße", "[CLS] [SEP] [MASK] <s> </s> <|endoftext|>",
         "\u82b1\u67c4\u306e\u30c9\u30ec\u30b9", "\U0001f457\U0001f3fd dress", "a ||| b", "x" * 300,
         "1,234.50 EUR\t(50%)\n- new", "don't  it's   they'll", "\u200bzero\u00adsoft", "\ufb01t \uff26\uff35 \u00bd",
         "\u0645\u0631\u062d\u0628\u0627", "same " * 90, "\x00\x07bell", "unaffordable antidisestablishmentarianism",
         "black &amp;amp; white, sch\u00c3\u00b6n \u201cquoted\u201d", "<start_of_text> a_b  <end_of_text>", "2024 1st")


class ImageEncoder(nn.Module):
    """(B, 3, S, S) uint8 -> (B, D)."""

    def __init__(self, model: ImgTextCompositionBase):
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:                                # by its name: as torch.export needs it
        return self.model.encode_image(pixels)


class Composer(nn.Module):
    """(B, D), (B, T) -> (B, D), unit rows."""

    def __init__(self, model: ImgTextCompositionBase):
        super().__init__()
        self.model = model

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        return self.model.as_query(self.model.compose(image, text))


class LSTMTexts(nn.Module):
    """What TextLSTMModel gives of texts of one length, by their words' ids: (B, n) -> (B, T)."""

    def __init__(self, texts: TextLSTMModel):
        super().__init__()
        self.texts = texts

    def forward(self, ids: Tensor) -> Tensor:
        outputs, _ = self.texts.lstm(self.texts.embedding_layer(ids.T))         # (n, B, T)
        return self.texts.fc_output(outputs[-1])


def image_and_composer(model: ImgTextCompositionBase) -> dict[str, tuple[nn.Module, list[Tensor]]]:
    """Of a model on the CPU: the two as modules, each with rows to try it on."""
    numbers, size = torch.Generator().manual_seed(0), model.recipe.image_size
    pixels = torch.from_numpy(pictures(size)).permute(0, 3, 1, 2)               # (B, 3, S, S)
    image = torch.randn(COMPARED, model.image_dim, generator=numbers)
    text = torch.randn(COMPARED, model.text_dim, generator=numbers)
    return {IMAGE: (ImageEncoder(model), [pixels]), COMPOSER: (Composer(model), [image, text])}


def pictures(size: int) -> np.ndarray:
    """(COMPARED, size, size, 3) uint8: soft spots, which are nearer to photographs than noise is."""
    coarse = np.random.default_rng(0).integers(0, 256, (COMPARED, 6, 6, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(each).resize((size, size), Image.Resampling.BICUBIC))
                     for each in coarse])


def text_part(encoder: CheckpointEncoder) -> tuple[nn.Module, list[Tensor], dict, bytes | None]:
    """What reads texts: as a module, with ids to try it on; what `Record` says of it; and its tokenizer's file.

    Raises Refused where it cannot be had without torch.
    """
    numbers = torch.Generator().manual_seed(0)
    if encoder.vocabulary:
        ids = torch.randint(len(encoder.vocabulary), (COMPARED, 5), generator=numbers)
        return LSTMTexts(encoder.model.text_model), [ids], {"words": dict(encoder.vocabulary.word2id)}, None
    if encoder.text_encoder == "service":
        raise engine.Refused("its texts are read by a sentence service")
    source = encoder.sentences.table.service
    tokenizer, facts = source.tokenizer_file()
    learned = encoder.model.learned_words
    told = {} if learned is None else {"learned": dict(learned.vocabulary.word2id)}
    return *source.module(), {"pieces": facts, "segments": source.segments, **told}, tokenizer


def write(encoder: CheckpointEncoder, images: ImageList, out: Path, made_of: str | None) -> NetworkEncoder:
    """An index's networks, of a model on the CPU, compared with it; the index's list knows their checksum. made_of: as
    of `Record`. Raises Refused and Unusable where they cannot be made, OSError where they cannot be written."""
    networks.discard(out)
    if encoder.model.frozen:
        raise engine.Refused(f"{encoder.model.recipe.composer} reads a text within its prompt, by its own text tower")
    parts = image_and_composer(encoder.model.eval())
    module, ids, told, tokenizer = text_part(encoder)
    made = {name: engine.made(part, rows) for name, (part, rows) in parts.items()}
    made[TEXT] = engine.made(module, ids, any_length=True)
    if (words := encoder.model.learned_words) is not None:
        made[WORDS] = engine.made(words, [torch.arange(3 * COMPARED).view(COMPARED, 3) % len(words.vocabulary)],
                                  any_length=True)
    record = Record(images.file_note(MODEL)[0], encoder.fingerprint(), encoder.image_dim, encoder.size,
                    encoder.resampling, encoder.text_encoder, made_of, examples=encoder.examples,
                    opt={name: encoder.opt[name] for name in TOLD if name in encoder.opt}, **told)
    content = networks.packed(record, made, tokenizer, out)
    written = NetworkEncoder(out / NETWORKS, networks.unpacked(content))
    compare(written, encoder)
    unfinished = out / f"{NETWORKS}.unfinished"
    unfinished.unlink(missing_ok=True)                                          # never through a link
    with open(unfinished, "xb") as file:
        file.write(content)
    images.note_file(NETWORKS, digest([content]))
    os.replace(unfinished, out / NETWORKS)
    return written


def compare(ours: NetworkEncoder, theirs: CheckpointEncoder) -> None:
    """The whole way, as searching goes it. Raises Unusable where they differ by more than rounding."""
    texts = [*theirs.examples[:8], *(TEXTS if ours.pieces else list(theirs.vocabulary.word2id)[:3])]
    texts = [text for text in texts if text.strip()]
    if ours.pieces:
        read = theirs.sentences.table.service.word_pieces(texts)
        if wrong := [text for text, right, (ids, _) in zip(texts, read, ours.pieces.ids(texts), strict=True)
                     if ids != right]:
            raise Unusable(f"{wrong[0]!r} is read otherwise")

    def made(by: Encoder) -> dict[str, np.ndarray]:
        images, read = by.encode_pixels(pictures(by.size)), by.encode_texts(texts)
        return {"images": images, "texts": read, "queries": by.composed(np.repeat(images[:1], len(read), 0), read)}
    of_torch = made(theirs)
    for what, values in made(ours).items():
        if not (off := engine.difference(values, of_torch[what])) <= engine.AGREES["f32"]:
            raise Unusable(f"{what} are off by {off:.1e} of the largest")
