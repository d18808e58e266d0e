"""Text to vectors: the vocabulary, the LSTM trained with the composer, and the vectors of a sentence service."""

import string
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from errors import InputError

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


class TextLSTMModel(nn.Module):
    """Embedding -> one-layer LSTM -> its output at the last word -> dropout, linear: texts to (B, dim)."""

    def __init__(self, vocabulary: SimpleVocab, dim: int = 512):
        super().__init__()
        self.vocabulary = vocabulary
        self.embedding_layer = nn.Embedding(len(vocabulary), dim)
        self.lstm = nn.LSTM(dim, dim)
        self.fc_output = nn.Sequential(nn.Dropout(0.1), nn.Linear(dim, dim))

    def forward(self, texts: list[str]) -> Tensor:
        device = self.embedding_layer.weight.device
        ids = [torch.tensor(self.vocabulary.encode(text)) for text in texts]
        last = torch.tensor([len(words) - 1 for words in ids]).to(device, non_blocking=True)
        padded = nn.utils.rnn.pad_sequence(ids).to(device, non_blocking=True)   # (T, B)
        outputs, _ = self.lstm(self.embedding_layer(padded))                    # (T, B, D): padding is after the last
        return self.fc_output(outputs[last, torch.arange(len(texts), device=device)])  # (B, D)


class SentenceService:
    """Sentence vectors of a running BERT-as-service; each distinct text is asked for once and kept.

    Nothing is contacted before the first text. Raises InputError when no service answers within `timeout` seconds.
    """

    REQUEST = 256                       # texts asked for at once: the service's own batch size

    def __init__(self, ip: str = "localhost", port: int = 5555, port_out: int = 5556, timeout: float = 10.0):
        self.ip, self.port, self.port_out, self.timeout = ip, port, port_out, timeout
        self.client = None
        self.vectors: dict[str, Tensor] = {}

    def connect(self):
        """The standard client, once the service has answered it."""
        import zmq  # only here: importing this module needs no service
        from bert_serving.client import BertClient

        try:
            client = BertClient(self.ip, self.port, self.port_out, ignore_all_checks=True,
                                timeout=int(1000 * self.timeout))
        except zmq.ZMQError as error:
            raise InputError(f"{self.ip}:{self.port} is no address of a sentence service ({error}); check --bert_ip, "
                             "--bert_port and --bert_port_out") from None
        try:
            client.server_config                                                # noqa: B018 (the answer is the point)
        except TimeoutError:
            client.close()                                                      # left to the garbage it can hang
            raise InputError(
                f"no sentence service at {self.ip}:{self.port} (answers on {self.port_out}) within {self.timeout:g} s; "
                "start a BERT-as-service there, name another with --bert_ip and --bert_port, or drop --use_bert"
            ) from None
        return client

    def ask(self, texts: list[str]) -> None:
        """Put the service's vectors of these texts into the table."""
        self.client = self.client or self.connect()
        try:
            answer = np.array(self.client.encode(texts), dtype=np.float32)      # a copy: the answer is read-only
        except TimeoutError:
            raise InputError(f"the sentence service at {self.ip}:{self.port} did not answer {len(texts)} texts within "
                             f"{self.timeout:g} s; start it again, or allow more with --bert_timeout") from None
        if answer.ndim != 2 or len(answer) != len(texts) or not np.isfinite(answer).all():
            raise InputError(f"the sentence service at {self.ip}:{self.port} answered {answer.shape} values, some "
                             f"perhaps not finite, to {len(texts)} texts; check its log and start it again")
        self.vectors.update(zip(texts, torch.from_numpy(answer), strict=True))

    @property
    def dim(self) -> int:
        """Size of the service's vectors, as it answers: 768 for BERT-Base."""
        return self(["size"]).shape[1]

    def __call__(self, texts: list[str]) -> Tensor:
        """(B, dim) float32 on the CPU. A blank text has the zero vector: the service refuses blank strings."""
        missing = [text for text in dict.fromkeys(texts) if text.strip() and text not in self.vectors]
        for start in range(0, len(missing), self.REQUEST):
            self.ask(missing[start:start + self.REQUEST])
        blank = torch.zeros(len(next(iter(self.vectors.values()))) if self.vectors else self.dim)
        return torch.stack([self.vectors.get(text, blank) for text in texts])
