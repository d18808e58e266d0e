"""Texts to the ids of word pieces, as a BERT-type model or a CLIP model's text tower reads them."""

import html
import string
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import numpy as np

from machine.errors import InputError, first_line

AT_ONCE = 2**14                         # word pieces that go through a model at once
CHARACTERS = 400                        # of a text are read for each word piece that is kept, so none takes for ever

Sentence = str | list[str]              # a text, or its word pieces


def readable(text: str, length: int) -> str:
    """What of a text is read to keep so many of its word pieces; half a surrogate pair is no text."""
    return text[:CHARACTERS * length].encode("utf-8", "replace").decode()


def split_pair(sentence: Sentence) -> list[Sentence]:
    """A text with ' ||| ', or word pieces with '|||', is a pair of sentences."""
    if isinstance(sentence, str):
        first, _, second = sentence.strip().rpartition(" ||| ")
        return [first, second] if first else [second]
    place = sentence.index("|||") if "|||" in sentence else len(sentence)
    return [sentence[:place], *([sentence[place + 1:]] if place < len(sentence) else [])]


def joined(first: list[int], second: Sequence[int], start: int, end: int, between: list[int],
           length: int) -> tuple[list[int], int]:
    """Ids of [CLS] first [SEP], or [CLS] first [SEP] second [SEP], cut on the right to `length`, the longer part first;
    and how many of them are the first segment's. between: what is put between the two."""
    if not second:
        return [start, *first[:length - 2], end], min(len(first) + 2, length)
    room = max(0, length - 2 - len(between))
    kept = min(len(second), max(room // 2, room - len(first)))
    first = first[:room - kept]
    return [start, *first, *between, *second[:kept], end], len(first) + 2


def of_one_length(rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Places of rows of ids, those of one length together, as many as a model takes at once. So nothing is padded: it
    would take time, and not every model is blind to it."""
    def length(place: int) -> int:
        return len(rows[place])
    for size, same in groupby(sorted(range(len(rows)), key=length), key=length):
        places, most = list(same), max(1, AT_ONCE // size)
        yield from (places[start:start + most] for start in range(0, len(places), most))


def by_length(rows: Sequence[Sequence[int]], network: Callable, *beside: Sequence[int]) -> np.ndarray:
    """N rows of ids -> (N, T) float32: what a network gives of those of one length, (b, n). beside: further numbers of
    each row, of which it is given (b,)."""
    found: dict[int, np.ndarray] = {}
    for places in of_one_length(rows):
        part = (np.array([values[place] for place in places], np.int64) for values in (rows, *beside))
        found |= zip(places, network(*part), strict=True)
    return np.stack([found[place] for place in range(len(rows))])


def in_lines(text: str) -> str:
    """ftfy's and HTML's repairs, single spaces: what each of `CLEANINGS` does first."""
    return " ".join(html.unescape(html.unescape(ftfy().fix_text(text))).split())


# What open_clip does to a text before it is split.
CLEANINGS: dict[str, Callable[[str], str]] = {
    "whitespace": in_lines, "lower": lambda text: in_lines(text).lower(),
    "canonicalize": lambda text: " ".join(in_lines(text).replace("_", " ").translate(
        str.maketrans("", "", string.punctuation)).lower().split())}


def ftfy():
    """The library. Raises InputError."""
    try:
        import ftfy
    except ImportError:
        raise InputError("this model's texts are read by ftfy: pip install -r requirements-serve.txt") from None
    return ftfy


class WordPieces:
    """Texts to ids by a tokenizer of the library tokenizers, without transformers and torch.

    start, end: of [CLS] and [SEP], or what stands for them. between: of what is put between the texts of a pair, None
    for models that know no pairs. length: most ids of a text. special: whether a text that says "[SEP]" has that token
    there, as sentence-transformers reads it, and not a text. clean: of CLEANINGS, what is done to texts first. padded:
    whether ids are followed by zeros up to `length`. until_end: whether a text ends at the first `end` in it, which it
    may say itself with `special`.
    """

    def __init__(self, tokenizer, start: int, end: int, between: list[int] | None, length: int, special: bool = False,
                 clean: str | None = None, padded: bool = False, until_end: bool = False):
        if not (all(isinstance(number, int) for number in (start, end, length, *(between or ()))) and length > 2):
            raise ValueError("a tokenizer's facts are of the wrong kind")
        self.clean, self.padded, self.until_end = CLEANINGS[clean] if clean else str, padded, until_end
        if clean:
            ftfy()                                                              # missing? said before the first text
        self.tokenizer, self.start, self.end, self.between, self.length = tokenizer, start, end, between, length
        tokenizer.encode_special_tokens = not special

    def ids(self, texts: Sequence[str]) -> list[tuple[list[int], int]]:
        """For each text its ids, and how many of them are the first segment's."""
        pairs = [split_pair(text) if self.between is not None else [text] for text in texts]
        parts = [self.clean(readable(part, self.length)) for pair in pairs for part in pair]
        found = iter(self.tokenizer.encode_batch(parts, add_special_tokens=False))
        ids = [joined(*[next(found).ids for _ in pair], *[()] * (2 - len(pair)), self.start, self.end,
                      self.between or [], self.length) for pair in pairs]
        if self.until_end:
            ids = [(row[:row.index(self.end) + 1], first) for row, first in ids]
        return [(row + [0] * (self.length - len(row)), first) for row, first in ids] if self.padded else ids


def byte_pairs(vocabulary: dict[str, int], merges: list[tuple[str, str]], special: list[str]) -> bytes:
    """tokenizer.json of CLIP's byte pairs: words, single digits, runs of signs; a word's last piece ends in </w>.
    special: which of the vocabulary stand for themselves in a text."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

    words = Regex(r"(?i:'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+)")
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(words, "removed", invert=True), pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.add_special_tokens([AddedToken(each, normalized=False) for each in special])
    return tokenizer.to_str().encode()


def read_tokenizer(content: bytes):
    """Of tokenizer.json. Raises InputError."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise InputError("this model's texts are read by tokenizers: pip install -r requirements-serve.txt") from None
    try:
        tokenizer = Tokenizer.from_str(content.decode())
    except Exception as error:                                                  # tokenizers raises bare Exceptions
        raise InputError(f"its {first_line(error)}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
