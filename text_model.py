"""Text to vectors: the vocabulary, the LSTM trained with the composer, and the vectors of a sentence service, kept."""

import hashlib
import json
import logging
import os
import sqlite3
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from machine.device import send
from machine.errors import InputError
from machine.regular_files import check_own, open_own
from machine.vocabulary import SimpleVocab, spread

log = logging.getLogger(__name__)


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
        last = send(torch.tensor([len(words) - 1 for words in ids]), device)
        padded = send(nn.utils.rnn.pad_sequence(ids), device)                   # (T, B)
        outputs, _ = self.lstm(self.embedding_layer(padded))                    # (T, B, D): padding is after the last
        return self.fc_output(outputs[last, torch.arange(len(texts), device=device)])  # (B, D)


class LearnedWords(nn.Module):
    """Words that learn beside a sentence vector: texts to (B, `size`), the largest that each of so many filters over
    three neighbouring words' vectors gives (Kim, "Convolutional Neural Networks for Sentence Classification", 2014).

    A word that is unknown has the vector 0, and a text without any known word 0 too. In training every tenth word and
    every second text is made unknown, so that what composes learns to do without, with the sentence vector alone.
    """

    size = 128                          # of words' vectors and of what comes of a text
    unknown_words, unknown_texts = 0.1, 0.5

    def __init__(self, vocabulary: SimpleVocab):
        super().__init__()
        self.vocabulary = vocabulary
        self.embedding_layer = nn.Embedding(len(vocabulary), self.size, padding_idx=0)
        # All windows with a word in them, so that those of a text do not depend on how long the others beside it are.
        self.filters = nn.Conv1d(self.size, self.size, kernel_size=3, padding=2, bias=False)

    def ids(self, texts: list[str]) -> Tensor:
        """(B, longest) word ids, 0 after a text's end."""
        return nn.utils.rnn.pad_sequence([torch.tensor(self.vocabulary.encode(text)) for text in texts], True)

    def forward(self, ids: Tensor) -> Tensor:                                   # (B, longest)
        if self.training:
            words, texts = torch.rand_like(ids, dtype=torch.float32), torch.rand(len(ids), 1, device=ids.device)
            ids = ids * (words >= self.unknown_words) * (texts >= self.unknown_texts)
        words = self.embedding_layer(ids).transpose(1, 2)                       # (B, size, longest)
        return self.filters(words).relu().amax(2)                               # (B, size)


class SentenceService:
    """A running BERT-as-service, asked through its standard client; nothing is contacted before the first question.

    timeout: seconds within which a question must be answered; it is asked again where no answer comes, or a wrong one.
    Raises InputError where that does not help.
    """

    FIRST, LARGEST = 16, 4096           # texts in the first request, and at most in any
    engine = "torch"                    # what computes its vectors, as far as it tells
    # What of a service's configuration its vectors depend on. Our server's fingerprint stands for the model's files.
    FEATURES = ("pooling_layer", "pooling_strategy", "max_seq_len", "fingerprint", "model_dir", "ckpt_name",
                "config_name", "tuned_model_dir", "cased_tokenization", "do_lower_case", "mask_cls_sep",
                "no_special_token", "fixed_embed_length", "fp16")

    def __init__(self, ip: str = "localhost", port: int = 5555, port_out: int = 5556, timeout: float = 10.0):
        self.ip, self.port, self.port_out, self.timeout = ip, port, port_out, timeout
        self.features: dict | None = None                                       # as the service told them
        self.started = None                                                     # and when it was started
        self.size: int | None = None                                            # of its vectors

    @contextmanager
    def connected(self) -> Iterator:
        """The standard client, once the service has answered it; always closed: left to the garbage it can hang."""
        import zmq  # only here: importing this module needs no service
        from bert_serving.client import BertClient

        try:
            client = BertClient(self.ip, self.port, self.port_out, ignore_all_checks=True)
            client.sender.sndtimeo = 1000                                       # ms; with no server its queue fills
        except zmq.ZMQError as error:
            raise InputError(f"{self.ip}:{self.port} is no address of a sentence service ({error}); check --bert_ip, "
                             "--bert_port and --bert_port_out") from None
        try:
            self.meet(client, self.timeout)
            yield client
        finally:
            client.close()

    def meet(self, client, seconds: float) -> None:
        """Hear what the service's vectors depend on, and that it is what it was."""
        try:
            config = self.configuration(client, time.monotonic() + seconds)
        except TimeoutError:
            raise InputError(
                f"no sentence service at {self.ip}:{self.port} (answers on {self.port_out}) within {self.timeout:g} s; "
                "start one with 'python bert_server.py --model_dir bert-base-uncased', name another with --bert_ip and "
                "--bert_port, or drop --use_bert") from None
        except Exception as error:                                              # the client trusts what it receives
            raise self.complaint(f"does not describe itself as BERT-as-service does ({error!r})") from None
        if not isinstance(config, dict):
            raise self.complaint(f"does not describe itself as BERT-as-service does ({str(config)[:80]})")
        features = {name: config[name] for name in self.FEATURES if name in config}
        if "fingerprint" in features:
            features.pop("model_dir", None)                                     # a model's folder may move
        if self.features not in (None, features):
            raise self.complaint(f"now has other vectors: {features} in place of {self.features}")
        self.features, self.started = features, config.get("server_start_time")
        self.engine = str(config.get("engine", "torch"))

    @staticmethod
    def configuration(client, deadline: float):
        """The service's description, asked for every second: an answer before one has subscribed is lost."""
        while True:
            left = deadline - time.monotonic()
            client.timeout = 1 + int(1000 * min(1.0, max(left, 0)))
            try:
                return client.server_config
            except TimeoutError:
                if left <= 1:
                    raise

    def complaint(self, what: str) -> InputError:
        return InputError(f"the sentence service at {self.ip}:{self.port} {what}; look at its log, start it again, or "
                          "give it longer with --bert_timeout")

    def ask(self, client, texts: list[str]) -> np.ndarray:
        """The vectors of these texts, (N, dim) float32."""
        deadline = time.monotonic() + self.timeout
        while (left := deadline - time.monotonic()) > 0:
            try:
                answer = self.answer(client, texts, time.monotonic() + max(left / 2, min(left, 1.0)))
                wrong = self.fault(answer, len(texts))
                if not wrong:
                    self.meet(client, self.timeout)                             # if started anew, is it the same?
                    self.size = answer.shape[1]
                    return answer
            except TimeoutError:
                wrong = "gave no answer"
            except InputError:
                raise
            except Exception as error:                                          # the client trusts what it receives
                wrong = f"gave an answer that cannot be read ({error!r})"
            time.sleep(min(0.1, self.timeout / 10))
        raise self.complaint(f"{wrong} to {len(texts)} texts within {self.timeout:g} s")

    def answer(self, client, texts: list[str], deadline: float) -> np.ndarray:
        """Ask once, and again only if the service has been started anew since. Raises TimeoutError at the deadline."""
        import zmq

        while True:
            client.encode(texts, blocking=False)
            number, asked_of = client.request_id, self.started
            while self.started == asked_of:
                left = deadline - time.monotonic()
                client.receiver.rcvtimeo = 1 + int(1000 * min(1.0, max(left, 0)))
                client.pending_request.add(number)                              # which a wait in vain has it forget
                try:
                    return np.array(client._recv_ndarray(number).embedding, dtype=np.float32)  # a copy: it is read-only
                except zmq.Again:
                    if left <= 0:
                        raise TimeoutError from None
                self.meet(client, max(left, 0))                                 # what comes meanwhile, the client keeps

    def fault(self, answer: np.ndarray, count: int) -> str | None:
        """What is wrong with an answer to `count` texts."""
        if answer.ndim != 2 or len(answer) != count or answer.shape[1] == 0:
            return f"answered an array of shape {answer.shape}"
        if answer.shape[1] != (self.size or answer.shape[1]):
            return f"answered vectors of size {answer.shape[1]}, before of {self.size},"
        return None if np.isfinite(answer).all() else "answered vectors with NaN or infinite values"

    def __str__(self) -> str:
        return f"the service at {self.ip}:{self.port}"

    @property
    def dim(self) -> int:
        """Size of the service's vectors, as it answers: 768 for BERT-Base."""
        if self.size is None:
            with self.connected() as client:
                self.ask(client, ["size"])
        return self.size

    def encode(self, texts: Sequence[str], progress: Callable) -> Iterator[tuple[list[str], np.ndarray]]:
        """Some of the texts and their (n, dim) vectors, a request at a time; one takes about a tenth of the timeout."""
        with self.connected() as client:
            chunk, size = [], self.FIRST
            for place, text in enumerate(progress(texts, desc="sentence vectors", unit="text"), start=1):
                chunk.append(text)
                if len(chunk) < size and place < len(texts):
                    continue
                start = time.monotonic()
                yield chunk, self.ask(client, chunk)
                rate = len(chunk) / (time.monotonic() - start)                  # texts a second, keeping them included
                chunk, size = [], int(min(max(self.FIRST, rate * self.timeout / 10), 4 * size, self.LARGEST))


class SentenceFile:
    """Sentence vectors on disk, of one model as it is served: an SQLite file, so any number of processes may use it,
    and be killed in doing so. Where it cannot be used that is said once, and the vectors are asked for in each run.

    folder: None for no file. features: what the vectors depend on; other features have another file. dim: their size.
    """

    def __init__(self, folder: Path | None, features: dict, dim: int):
        digest = hashlib.sha256(json.dumps([features, dim], sort_keys=True).encode()).hexdigest()[:12]
        self.path, self.dim = folder and folder / f"sentences_{digest}.sqlite", dim

    def attempt(self, work: Callable[[sqlite3.Connection], None]) -> None:
        """Do work(database) as one transaction, or not at all."""
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            for kind in ("", "-journal", "-wal", "-shm"):                       # SQLite's own beside it
                check_own(Path(f"{self.path}{kind}"))
            if not self.path.exists():                                          # SQLite lets none but its user write
                os.close(open_own(self.path))
            with closing(sqlite3.connect(self.path, timeout=5)) as database, database:
                database.execute("CREATE TABLE IF NOT EXISTS vectors (text BLOB PRIMARY KEY, vector BLOB, crc INT)")
                work(database)
        except (sqlite3.Error, OSError) as error:
            log.warning("sentence vectors cannot be kept in %s (%s): they are asked for", self.path, error)
            damaged = type(error) is sqlite3.DatabaseError                      # its subclasses are of other causes
            try:
                if damaged:
                    self.path.unlink(missing_ok=True)                           # begun anew with the next answer
            except OSError:
                damaged = False
            if not damaged:
                self.path = None

    def read(self, texts: Sequence[str], vectors: np.ndarray) -> None:
        """Fill the rows of `vectors` (N, dim) whose texts are kept."""
        def work(database: sqlite3.Connection) -> None:
            for row, text in enumerate(texts):
                held = database.execute("SELECT vector, crc FROM vectors WHERE text = ?", (self.key(text),)).fetchone()
                if held and isinstance(held[0], bytes) and self.checksum(text, held[0]) == held[1]:
                    vectors[row] = np.frombuffer(held[0], "<f4")
        self.attempt(work)

    def write(self, texts: Sequence[str], vectors: np.ndarray) -> None:
        held = [row.astype("<f4").tobytes() for row in vectors]
        rows = [(self.key(text), vector, self.checksum(text, vector)) for text, vector in zip(texts, held, strict=True)]
        self.attempt(lambda database: database.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?, ?)", rows))

    def forget(self) -> None:
        self.attempt(lambda database: database.execute("DELETE FROM vectors"))

    def checksum(self, text: str, vector: bytes) -> int:
        return zlib.crc32(vector, zlib.crc32(self.key(text)))

    @staticmethod
    def key(text: str) -> bytes:
        return text.encode("utf-8", "surrogatepass")                            # half a surrogate pair may come in JSON


class SentenceTable:
    """Texts to (B, dim) float32 on the CPU: a service's vectors, each text asked for once, and kept in `folder`.

    A blank text, which the service refuses, has the zero vector.
    """

    PROBES = 8                          # kept vectors that are asked for again: does the service still give the same?

    def __init__(self, service: SentenceService, folder: str | Path | None = None):
        self.service, self.dim, self.features = service, service.dim, service.features
        made_by = {} if service.engine == "torch" else {"engine": service.engine}
        self.file = SentenceFile(folder and Path(folder), {**self.features, **made_by}, self.dim)
        self.row_of: dict[str, int] = {}
        self.vectors = torch.zeros(1, self.dim)                                 # (N, dim), row 0 for blank texts

    def __call__(self, texts: Sequence[str]) -> Tensor:
        self.prepare(texts)
        return self.vectors[torch.tensor([self.row_of[text] for text in texts])]  # (B, dim)

    def prepare(self, texts: Iterable[str], progress: Callable = lambda items, **_: items) -> None:
        """Take in these texts, from disk or else from the service; it is not needed for them again."""
        new = [text for text in dict.fromkeys(texts) if text not in self.row_of]
        self.row_of |= {text: 0 for text in new if not text.strip()}
        if not (new := [text for text in new if text.strip()]):
            return
        vectors = np.full((len(new), self.dim), np.nan, np.float32)             # (new, dim)
        self.file.read(new, vectors)
        unknown = np.flatnonzero(~self.still_true(new, vectors))
        if len(unknown):
            with closing(self.service.encode([new[row] for row in unknown], progress)) as answers:
                for texts, answer in answers:
                    vectors[unknown[:len(texts)]], unknown = answer, unknown[len(texts):]
                    self.file.write(texts, answer)
        self.row_of |= {text: row for row, text in enumerate(new, start=len(self.vectors))}
        self.vectors = torch.cat([self.vectors, torch.from_numpy(vectors)])

    def still_true(self, texts: list[str], vectors: np.ndarray) -> np.ndarray:
        """(N,) whether there is a kept vector, not NaN, that may be used: all may or none.

        Raises InputError where the service answers otherwise than it did earlier in this run.
        """
        known = ~np.isnan(vectors[:, 0])
        earlier = [(text, row) for text, row in self.row_of.items() if row]
        held = [(text, self.vectors[row].numpy()) for text, row in spread(earlier, self.PROBES)]
        kept = [(texts[place], vectors[place]) for place in spread(np.flatnonzero(known), self.PROBES)]
        if held and not known.all() and not self.agrees(held):
            raise self.service.complaint("now gives other vectors than earlier in this run")
        if kept and not self.agrees(kept):
            log.warning("the sentence vectors kept in %s are not this service's: it is asked anew", self.file.path)
            self.file.forget()
            known[:] = False
        return known

    def agrees(self, probes: list[tuple[str, np.ndarray]]) -> bool:
        """Whether the service still gives these texts these vectors."""
        texts, vectors = zip(*probes, strict=True)
        with self.service.connected() as client:
            answer = self.service.ask(client, list(texts))
        return bool(np.linalg.norm(answer - np.stack(vectors)) < 1e-3 * np.linalg.norm(answer))
