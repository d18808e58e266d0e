"""Serve sentence vectors of a BERT-type model over ZeroMQ, for the unmodified bert-serving-client 1.10.0.

    python bert_server.py --model_dir bert-base-uncased

A sentence's vector is one encoder layer's output, pooled over its word pieces; the defaults are the features that
the published ComposeAE numbers were made from. One thread does everything, a batch at a time: requests that come
meanwhile wait in the sockets and share the next batches, so nothing is locked and nothing can be mixed up.
"""

import argparse
import hashlib
import inspect
import json
import logging
import math
import os
import signal
import sys
import time

if __name__ == "__main__":              # the imports take seconds, in which a stop should be no traceback either
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(0))

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import huggingface_hub
import numpy as np
import torch
import transformers
import zmq
from torch import Tensor

VERSION = "1.10.0"                      # the protocol's: the client refuses any other
LARGEST_FRAME = 64 * 2**20              # bytes; ZeroMQ closes the connection of who sends more
LARGEST_ANSWER = 2**30                  # bytes of vectors in one answer; a request for more is ignored
BACKLOG = 64 * 2**20                    # bytes of requests in line; beyond, more stay in the sockets, slowing senders
AT_ONCE = 100                           # requests taken before the next batch is encoded
HELD = 1000, 2**30                      # answers, and their bytes, that wait for their clients; beyond, the oldest go
CHARACTERS = 400                        # of a text are read for each word piece that is kept, so none takes for ever
JOINING, LEAVING = 2.0, 60.0            # seconds an answer waits for its client to subscribe, and to make room

log = logging.getLogger("bert_server")

Sentence = str | list[str]              # a text, or its word pieces


def masked_mean(states: Tensor, mask: Tensor) -> Tensor:
    """Mean over a sentence's own tokens, [CLS] and [SEP] among them: (B, T, D), (B, T) -> (B, D)."""
    weight = mask[:, :, None].to(states.dtype)
    return (states * weight).sum(1) / (weight.sum(1) + 1e-10)


def masked_max(states: Tensor, mask: Tensor) -> Tensor:
    """Largest value over a sentence's own tokens: (B, T, D), (B, T) -> (B, D)."""
    return states.masked_fill(mask[:, :, None] == 0, -torch.inf).amax(1)


def first_token(states: Tensor, mask: Tensor) -> Tensor:
    """The state of [CLS]: (B, T, D), (B, T) -> (B, D)."""
    return states[:, 0]


POOLING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "REDUCE_MEAN": masked_mean, "REDUCE_MAX": masked_max, "CLS_TOKEN": first_token}


class Sparing(logging.Filter):
    """Lets ten complaints a minute pass: a flood of bad requests must not fill a disk, or a pipe that no one reads."""

    def __init__(self):
        super().__init__()
        self.minute, self.count = 0, 0

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        minute = int(record.created // 60)
        self.count = self.count + 1 if minute == self.minute else 1
        self.minute = minute
        if self.count == 10:
            record.msg = f"{record.msg} (more will be counted, see SHOW_STATUS, but not shown before the next minute)"
        return self.count <= 10


class ModelError(Exception):
    """The model cannot be served; the message says what to do."""


class SentenceEncoder:
    """A BERT-type model in eval mode, float32: sentences to vectors.

    folder: a local folder or a hub name. layer: of the encoder, -1 the last. length: most tokens of a sentence,
    [CLS] and [SEP] included; None for as many as the model can take. Raises ModelError.
    """

    def __init__(self, folder: str, layer: int = -2, pooling: str = "REDUCE_MEAN", length: int | None = 25,
                 device: str = "cpu"):
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()                             # of reading weights, a second's work
        huggingface_hub.utils.enable_progress_bars()                            # of downloading them
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
            model, loading = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32,
                                                                    output_loading_info=True)
            layers = next(part for part in model.modules() if isinstance(part, torch.nn.ModuleList)
                          and len(part) == model.config.num_hidden_layers)
        except Exception as error:                                              # hub and file errors of many types
            raise ModelError(f"cannot load the model {folder!r} ({first_line(error)}); name a folder with config.json, "
                             "the weights and vocab.txt, or a model of the Hugging Face hub") from None
        if missing := sorted(name for name in loading["missing_keys"] if not name.startswith("pooler.")):
            raise ModelError(f"{folder!r} lacks {len(missing)} of its model's weights, first {missing[0]}; "
                             "download it again")
        self.check_vocabulary(folder, model.config.vocab_size)
        if not -len(layers) <= layer < len(layers):
            raise ModelError(f"-pooling_layer {layer}: the model has {len(layers)} layers, so give one from "
                             f"{-len(layers)} to -1")
        config, longest = model.config, min(model.config.max_position_embeddings, self.tokenizer.model_max_length)
        self.length, self.pool, self.dim = length or longest, POOLING[pooling], config.hidden_size
        # Some models of the type have no segments.
        self.segments = ("token_type_ids" in inspect.signature(model.forward).parameters
                         and getattr(config, "type_vocab_size", 2) >= 2)
        self.fingerprint = fingerprint(self.tokenizer, model)
        self.layer = 1 + layer % len(layers)                                    # hidden_states begin with the embedding
        try:
            self.model, self.device = model.eval().to(device), device
            self.drop_layers_above(layers)
        except (RuntimeError, AssertionError, IndexError) as error:
            raise ModelError(f"cannot use the model with -device {device} and -max_seq_len {self.length} (it has "
                             f"{config.max_position_embeddings} positions): {first_line(error)}") from None

    def drop_layers_above(self, layers: torch.nn.ModuleList) -> None:
        """They add nothing to the vector, unless the model treats its last layer's output apart, as some do."""
        word = self.tokenizer.unk_token_id or 0
        longest = [self.joined([word] * self.length)]
        expected, whole, above = self.encode(longest), self.layer, list(layers[self.layer:])
        del layers[self.layer:]
        self.layer = -1
        if not np.allclose(self.encode(longest), expected, rtol=1e-4, atol=1e-5):
            layers.extend(above)
            self.layer = whole

    def check_vocabulary(self, folder: str, known: int) -> None:
        """Without vocab.txt transformers makes an empty tokenizer and says nothing."""
        words = len(self.tokenizer)
        if not known / 2 < words <= known:
            raise ModelError(f"the tokenizer of {folder!r} has {words} word pieces, its model {known}: vocab.txt or "
                             "tokenizer.json is missing or another model's")
        if None in (self.tokenizer.cls_token_id, self.tokenizer.sep_token_id, self.tokenizer.pad_token_id):
            raise ModelError(f"the tokenizer of {folder!r} has no [CLS], [SEP] or [PAD]: it is no BERT-type model")

    def token_ids(self, sentences: Sequence[Sentence]) -> list[tuple[list[int], int]]:
        """For each sentence its ids, [CLS] first, and how many of them are the first segment's."""
        pairs = [split_pair(sentence) for sentence in sentences]
        ids = iter(self.plain_ids([part for pair in pairs for part in pair]))
        return [self.joined(*(next(ids) for _ in pair)) for pair in pairs]

    def plain_ids(self, parts: list[Sentence]) -> list[list[int]]:
        """Ids of texts, tokenized together, and of word pieces, among which an unknown one is [UNK]."""
        texts = [part[:CHARACTERS * self.length].encode("utf-8", "replace").decode()  # half a surrogate pair is no text
                 for part in parts if isinstance(part, str)]
        ids = iter(self.tokenizer(texts, add_special_tokens=False, truncation=False, padding=False,
                                  split_special_tokens=True).input_ids if texts else ())  # "[SEP]" in a text is text
        return [next(ids) if isinstance(part, str) else self.tokenizer.convert_tokens_to_ids(part[:self.length])
                for part in parts]

    def joined(self, first: list[int], second: Sequence[int] = ()) -> tuple[list[int], int]:
        """[CLS] first [SEP], or [CLS] first [SEP] second [SEP], cut on the right to `length`: the longer part first."""
        cls, sep = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        if not second:
            return [cls, *first[:self.length - 2], sep], min(len(first) + 2, self.length)
        room = self.length - 3
        kept = min(len(second), max(room // 2, room - len(first)))
        first = first[:room - kept]
        return [cls, *first, sep, *second[:kept], sep], len(first) + 2

    @torch.inference_mode()
    def encode(self, ids: Sequence[tuple[list[int], int]]) -> np.ndarray:
        """Results of `token_ids` -> (B, dim) float32."""
        longest = max(len(tokens) for tokens, _ in ids)
        padded = np.full((len(ids), longest), self.tokenizer.pad_token_id)     # (B, T)
        mask, segment = np.zeros_like(padded), np.zeros_like(padded)
        for row, (tokens, first) in enumerate(ids):
            padded[row, :len(tokens)], mask[row, :len(tokens)], segment[row, first:len(tokens)] = tokens, 1, 1
        inputs = {"input_ids": padded, "attention_mask": mask, **({"token_type_ids": segment} if self.segments else {})}
        inputs = {name: torch.from_numpy(values).to(self.device) for name, values in inputs.items()}
        states = self.model(**inputs, output_hidden_states=True).hidden_states[self.layer]  # (B, T, dim)
        return self.pool(states, inputs["attention_mask"]).float().cpu().numpy()

    def tokens(self, ids: tuple[list[int], int]) -> list[str]:
        return self.tokenizer.convert_ids_to_tokens(ids[0])


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def split_pair(sentence: Sentence) -> list[Sentence]:
    """A text with ' ||| ', or word pieces with '|||', is a pair of sentences."""
    if isinstance(sentence, str):
        first, _, second = sentence.strip().rpartition(" ||| ")
        return [first, second] if first else [second]
    place = sentence.index("|||") if "|||" in sentence else len(sentence)
    return [sentence[:place], *([sentence[place + 1:]] if place < len(sentence) else [])]


def fingerprint(tokenizer, model: torch.nn.Module) -> str:
    """Twelve digits that change with any weight or word: what a client may keep vectors under."""
    reading = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else str(tokenizer.init_kwargs)  # lower case?
    digest = hashlib.sha256(json.dumps([sorted(tokenizer.get_vocab().items()), reading, model.config.to_diff_dict()],
                                       default=str).encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:12]


@dataclass
class Request:
    """One request's way from its texts to its vectors."""
    client: bytes
    number: bytes
    sentences: list[Sentence]
    size: int                           # bytes
    vectors: np.ndarray                 # (N, dim)
    tokens: list[list[str] | None]      # N
    left: deque[int]                    # positions to encode yet, in order of length: so batches hold little padding


class BadRequest(Exception):
    """A request that is logged and ignored: the protocol has no error reply."""


def parse(payload: bytes, length: bytes, most: int) -> list[Sentence]:
    """The sentences of an encode request. Raises BadRequest."""
    try:
        sentences = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"neither a command nor JSON ({first_line(error)})") from None
    if not isinstance(sentences, list) or not sentences:
        raise BadRequest("not a list of sentences")
    if not length.isdigit() or length.lstrip(b"0") != b"%d" % len(sentences):
        raise BadRequest(f"{len(sentences)} sentences announced as {length[:20]!r}")
    if len(sentences) > most:
        raise BadRequest(f"{len(sentences)} sentences are over {most}; ask for them in several requests")
    for place, sentence in enumerate(sentences, start=1):
        parts = sentence if isinstance(sentence, list) and sentence else [sentence]
        if not all(isinstance(part, str) and part.strip() for part in parts):
            raise BadRequest(f"sentence {place} is neither a text nor a list of word pieces, or is blank")
    return sentences


class Server:
    """Requests in on one port, answers out on the other, each to the client that asked."""

    def __init__(self, encoder: SentenceEncoder, config: dict):
        """config: the flags by name, and whatever else SHOW_CONFIG tells. Raises zmq.ZMQError for a bad address."""
        self.encoder, self.config = encoder, config
        host = f"[{config['host'].strip('[]')}]" if ":" in config["host"] else config["host"]
        self.most = LARGEST_ANSWER // (4 * encoder.dim)
        self.context = zmq.Context()
        self.requests, self.answers = self.context.socket(zmq.PULL), self.context.socket(zmq.XPUB)
        for socket, port in ((self.requests, config["port"]), (self.answers, config["port_out"])):
            socket.linger, socket.maxmsgsize, socket.ipv6, socket.rcvhwm = 0, LARGEST_FRAME, ":" in host, 16
            if socket is self.answers:
                socket.setsockopt(zmq.XPUB_NODROP, 1)                           # says so where a client does not read
            socket.bind(f"tcp://{host}:{port}")
        self.waiting: deque[Request] = deque()
        self.backlog = 0                                                        # bytes of the requests in line
        self.held: deque[tuple[float, list]] = deque()                          # (since when, answer)
        self.subscribed: set[bytes] = set()
        self.counts, self.stopping = Counter(requests=0, texts=0, ignored=0, undelivered=0), False

    def run(self) -> None:
        """Serve until a TERMINATION comes from this machine."""
        poller = zmq.Poller()
        poller.register(self.answers, zmq.POLLIN)
        poller.register(self.requests, zmq.POLLIN)
        while not self.stopping:
            # In ms. Never without end: a signal that comes just before the wait is only acted on after it.
            timeout = 0 if self.waiting else 50 if self.held else 500
            ready = dict(poller.poll(timeout))
            if self.answers in ready:
                self.note_subscriptions()
            if self.requests in ready:
                self.take_requests()
            self.deliver_held()
            if self.waiting:
                self.encode_batch()

    def close(self) -> None:
        self.context.destroy(linger=0)

    def note_subscriptions(self) -> None:
        """Clients join by subscribing to their identity, and leave."""
        while self.answers.poll(0):
            message = self.answers.recv_multipart()[0]
            if message[:1] == b"\1":
                self.subscribed.add(message[1:])
            elif message[:1] == b"\0":
                self.subscribed.discard(message[1:])

    def take_requests(self) -> None:
        for _ in range(AT_ONCE):
            if self.stopping or self.backlog >= BACKLOG or not self.requests.poll(0):
                return
            frames = self.requests.recv_multipart(copy=False)
            sender = frames[0].get("Peer-Address")
            try:
                self.take([frame.bytes for frame in frames], sender)
            except Exception as error:                                          # no request may end the service
                self.counts["ignored"] += 1
                log.warning("ignored a request from %s: %s", sender, first_line(error))

    def take(self, frames: list[bytes], sender: str) -> None:
        """Answer a command, or put an encode request in line. Raises BadRequest."""
        if len(frames) != 4:
            raise BadRequest(f"{len(frames)} frames in place of 4")
        client, payload, number, length = frames
        if payload == b"TERMINATION":
            if not sender.startswith(("127.", "::1", "::ffff:127.")):
                raise BadRequest("TERMINATION is for this machine's own clients")
            self.stopping = True
            return
        self.check_identity(client)
        if not number.isdigit() or len(number) > 20:
            raise BadRequest(f"request id {number[:20]!r} is no number")
        if payload in (b"SHOW_CONFIG", b"SHOW_STATUS"):
            report = self.config if payload == b"SHOW_CONFIG" else {**self.config, **self.status()}
            self.answer([client, json.dumps(report).encode(), number])
            return
        sentences = parse(payload, length, self.most)
        count, by_length = len(sentences), sorted(range(len(sentences)), key=lambda place: len(sentences[place]))
        self.waiting.append(Request(client, number, sentences, len(payload), np.empty((count, self.encoder.dim),
                                    np.float32), [None] * count, deque(by_length)))
        self.backlog += len(payload)
        self.counts.update(requests=1, texts=count)

    def check_identity(self, client: bytes) -> None:
        """Answers go by prefix: an identity must not begin with another's, or be its beginning. Those of 36 bytes, as
        every client makes them, cannot. Raises BadRequest."""
        if not 1 <= len(client) <= 36:
            raise BadRequest(f"an identity of {len(client)} bytes in place of 36")
        if len(client) < 36:
            for other in self.subscribed - {client, b""}:
                if other.startswith(client) or client.startswith(other):
                    raise BadRequest(f"the identity {client!r} is not told apart from another client's")

    def status(self) -> dict:
        return {**self.counts, "waiting_requests": len(self.waiting), "subscribed_clients": len(self.subscribed)}

    def encode_batch(self) -> None:
        """One batch from the requests in line; a large request goes to the end of the line after its share."""
        shares: list[tuple[Request, list[int]]] = []
        room = self.config["max_batch_size"]
        while self.waiting and room:
            request = self.waiting.popleft()
            self.backlog -= request.size
            places = [request.left.popleft() for _ in range(min(room, len(request.left)))]
            shares.append((request, places))
            room -= len(places)
        try:
            self.encode_shares(shares)
        except Exception as error:                                              # out of a GPU's memory, say
            log.error("cannot encode %d texts at once (%s)", self.config["max_batch_size"] - room, first_line(error))
            shares = [share for share in shares if self.encodes_alone(share)]   # not for one request's fault all
        for request, _ in shares:
            if request.left:
                self.waiting.append(request)
                self.backlog += request.size
            else:
                self.finish(request)

    def encode_shares(self, shares: list[tuple[Request, list[int]]]) -> None:
        ids = self.encoder.token_ids([request.sentences[place] for request, places in shares for place in places])
        vectors, done = self.encoder.encode(ids), 0
        for request, places in shares:
            request.vectors[places] = vectors[done:done + len(places)]
            if self.config["show_tokens_to_client"]:
                for place, sentence_ids in zip(places, ids[done:done + len(places)], strict=True):
                    request.tokens[place] = self.encoder.tokens(sentence_ids)
            done += len(places)

    def encodes_alone(self, share: tuple[Request, list[int]]) -> bool:
        try:
            self.encode_shares([share])
        except Exception as error:                                              # no request may end the service
            self.counts["ignored"] += 1
            log.error("gave up request %s: cannot encode %d of its texts (%s); a lower --max_batch_size may do",
                      share[0].number.decode(), len(share[1]), first_line(error))
            return False
        return True

    def finish(self, request: Request) -> None:
        described = {"dtype": "float32", "shape": request.vectors.shape,
                     "tokens": request.tokens if self.config["show_tokens_to_client"] else ""}
        self.answer([request.client, json.dumps(described).encode(), request.vectors, request.number])

    def answer(self, frames: list) -> None:
        """Send to the client; what cannot be sent yet is held."""
        if not self.sent(frames, 0):
            self.held.append((time.monotonic(), frames))
            held = sum(frames[-2].nbytes for _, frames in self.held if len(frames) == 4)
            while len(self.held) > HELD[0] or held > HELD[1]:
                held -= self.drop(self.held.popleft()[1])

    def sent(self, frames: list, waited: float) -> bool:
        """Whether the answer is on its way; not before its client has subscribed: what comes earlier is lost."""
        joined = frames[0] in self.subscribed
        if not joined and (waited < 0.1 or not any(frames[0].startswith(topic) for topic in self.subscribed)):
            return False
        try:
            self.answers.send_multipart(frames, zmq.NOBLOCK, copy=False)
        except zmq.Again:                                                       # the client does not read
            return False
        return True

    def deliver_held(self) -> None:
        now = time.monotonic()
        for _ in range(len(self.held)):
            since, frames = self.held.popleft()
            if self.sent(frames, now - since):
                continue
            if now - since < (LEAVING if frames[0] in self.subscribed else JOINING):
                self.held.append((since, frames))
            else:
                self.drop(frames)

    def drop(self, frames: list) -> int:
        """Give an answer up; its bytes."""
        self.counts["undelivered"] += 1
        log.warning("dropped the answer to request %s: its client is gone or does not read", frames[-1].decode())
        return frames[-2].nbytes if len(frames) == 4 else 0


class Parser(argparse.ArgumentParser):
    """Wrong flags end in one line and exit code 2."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}; see --help\n")


def at_least(minimum: int, most: float = math.inf):
    def parse_number(text: str) -> int:
        if not text.isdigit() or not minimum <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {minimum}"
                                             f"{f' and at most {most}' if most < math.inf else ''}, got {text!r}")
        return int(text)
    return parse_number


def sequence_length(text: str) -> int | None:
    return None if text.upper() == "NONE" else at_least(3)(text)


def get_parser() -> Parser:
    parser = Parser(prog="bert_server.py", description=__doc__.split("\n")[0], allow_abbrev=False,
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                    epilog="One dash and two both work. The defaults are those of the published features.")

    def add(name: str, default, help: str, **how):
        parser.add_argument(f"--{name}", f"-{name}", default=default, help=help, **how)
    add("model_dir", argparse.SUPPRESS, "BERT-type model: a folder (config.json, weights, vocab.txt) or a name on the "
        "Hugging Face hub (required)", required=True, metavar="DIR|NAME")
    add("host", "127.0.0.1", "address to serve on; 0.0.0.0 for every one of this machine: no password is asked (the "
        "standard client speaks IPv4 only)")
    add("port", 5555, "port that takes texts", type=at_least(1, 65535), metavar="PORT")
    add("port_out", 5556, "port that answers", type=at_least(1, 65535), metavar="PORT")
    add("max_seq_len", 25, "most word pieces of a text, [CLS] and [SEP] among them; NONE for what the model can take",
        type=sequence_length, metavar="N")
    add("pooling_layer", -2, "encoder layer whose output is pooled, -1 the last", type=int, metavar="LAYER")
    add("pooling_strategy", "REDUCE_MEAN", "how a text's word pieces become one vector", choices=POOLING)
    add("max_batch_size", 256, "texts the model takes at once", type=at_least(1), metavar="N")
    add("show_tokens_to_client", False, "send word pieces along with the vectors", action="store_true")
    add("device", "auto", "auto takes a GPU where there is one", metavar="auto|cpu|cuda|cuda:N")
    return parser


def stop(*_) -> None:
    """Ctrl-C and SIGTERM end the service at once; more of them do not disturb its end."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> int:
    """Serve until told to stop. Returns the exit code: 0 when stopped, 2 for bad input."""
    logging.basicConfig(format="%(asctime)s %(message)s")
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)             # what it meets, our own line says
    log.setLevel(logging.INFO)
    log.filters[:] = [Sparing()]
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    server = None
    try:
        args = get_parser().parse_args(argv)
        log.info("loading %s", args.model_dir)
        device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        encoder = SentenceEncoder(args.model_dir, args.pooling_layer, args.pooling_strategy, args.max_seq_len, device)
        config = {**vars(args), "device": device, "server_version": VERSION, "dim": encoder.dim,
                  "fingerprint": encoder.fingerprint, "server_start_time": time.strftime("%Y-%m-%d %H:%M:%S"),
                  "python_version": sys.version.split()[0], "pyzmq_version": zmq.__version__,
                  "torch_version": torch.__version__, "transformers_version": transformers.__version__}
        server = Server(encoder, config)
        log.info("serving %d-d vectors of %s (%s) on %s, ports %d and %d; Ctrl-C stops", encoder.dim, args.model_dir,
                 device, args.host, args.port, args.port_out)
        server.run()
    except ModelError as error:
        print(f"bert_server.py: error: {error}", file=sys.stderr)
        return 2
    except zmq.ZMQError as error:
        print(f"bert_server.py: error: cannot serve on {args.host}, ports {args.port} and {args.port_out} ({error}); "
              "stop what uses them, or choose others with --port and --port_out", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        pass
    finally:
        if server:
            server.close()
    log.info("stopped")
    return 0


if __name__ == "__main__":
    code = main()
    logging.shutdown()
    sys.stderr.flush()
    os._exit(code)                      # at once: the interpreter would take over a second to fold torch away
