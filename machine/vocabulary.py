"""Texts to words, and words to ids."""

import string
from collections.abc import Iterable, Sequence

import numpy as np

UNKNOWN = "<UNK>"
DELETE_PUNCTUATION = str.maketrans("", "", string.punctuation)


def tokenize(text: str) -> list[str]:
    """Lower-case ASCII words without punctuation: 'A-line, café' -> ['aline', 'caf']."""
    ascii_text = text.encode("ascii", "ignore").decode("ascii")
    return ascii_text.lower().translate(DELETE_PUNCTUATION).split()


class SimpleVocab:
    """Words to ids: 0 is unknown, then in order of first appearance."""

    def __init__(self, word2id: dict[str, int] | None = None):
        self.word2id = dict(word2id) if word2id else {UNKNOWN: 0}

    @classmethod
    def from_texts(cls, texts: Iterable[str]) -> "SimpleVocab":
        vocabulary = cls()
        for text in dict.fromkeys(texts):                                       # each distinct text once, in order
            for word in tokenize(text):
                vocabulary.word2id.setdefault(word, len(vocabulary.word2id))
        return vocabulary

    def __len__(self) -> int:
        return len(self.word2id)

    def encode(self, text: str) -> list[int]:
        """Word ids, at least one: a text without any word reads as a single unknown word."""
        return [self.word2id.get(word, 0) for word in tokenize(text)] or [0]

    def unread(self, texts: Iterable[str]) -> tuple[list[str], list[str]]:
        """The distinct words of these texts that are unknown, and the texts without any word that can be read."""
        distinct = {text: tokenize(text) for text in texts}
        words = dict.fromkeys(word for words in distinct.values() for word in words if word not in self.word2id)
        return list(words), [text for text, words in distinct.items() if not words]


def spread(items: Sequence, count: int) -> list:
    """At most `count` of the items, from first to last."""
    places = np.unique(np.linspace(0, len(items) - 1, min(count, len(items))).astype(int))
    return [items[place] for place in places]
