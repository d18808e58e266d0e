"""Serve sentence vectors of a BERT-type or CLIP model over ZeroMQ, for the unmodified bert-serving-client 1.10.0.

    python bert_server.py --model_dir bert-base-uncased

A sentence's vector is one encoder layer's output, pooled over its word pieces; the defaults are the features that
the published ComposeAE numbers were made from. One thread does everything, a batch at a time, so nothing is locked
and nothing can be mixed up. Every client has its own line, and each batch holds a share of every line: what one asks,
sends or leaves unread costs the others no more than that.
"""

import argparse
import contextlib
import difflib
import json
import logging
import math
import os
import re
import signal
import socket
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

VERSION = "1.10.0"                      # the protocol's: the client refuses any other
POOLINGS = ("REDUCE_MEAN", "REDUCE_MAX", "CLS_TOKEN")


class Parser(argparse.ArgumentParser):
    """Wrong flags end in one line, with the name that is nearest to a wrong one, and exit code 2; none in the help."""

    def parse_known_args(self, args: list[str] | None = None, namespace=None):
        if not (sys.argv[1:] if args is None else args):
            self.print_help(sys.stderr)
            self.exit(2)
        return super().parse_known_args(args, namespace)

    def error(self, message: str):
        wrong = re.match(r"unrecognized arguments: (?:.* )?(--?\w+)|.*invalid choice: '(\w+)'", message)
        word = wrong[1] or wrong[2].upper() if wrong else ""
        near = difflib.get_close_matches(word, [*self._option_string_actions, *POOLINGS], 1)
        self.exit(2, f"{self.prog}: error: {message}; {f'did you mean {near[0]}?' if near else 'see --help'}\n")


def at_least(minimum: int, most: float = math.inf):
    def parse_number(text: str) -> int:
        if not text.isdigit() or not minimum <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {minimum}"
                                             f"{f' and at most {most}' if most < math.inf else ''}, got {text!r}")
        return int(text)
    return parse_number


def true_or_false(text: str) -> bool:
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}")
    return values[text.lower()]


def sequence_length(text: str) -> int | None:
    return None if text.upper() == "NONE" else at_least(3)(text)


class Ignored(argparse.Action):
    """What old command lines have and this server does not need: noted in `needless`."""

    def __call__(self, parser, namespace, values, option_string=None):
        namespace.needless = [*getattr(namespace, "needless", []), option_string]


class Refused(argparse.Action):
    """What would give other vectors than these, or nothing, without a word: `metavar` says why. `const`, its old
    default, is well."""

    def __call__(self, parser, namespace, values, option_string=None):
        if self.const is None or values != self.const:
            raise argparse.ArgumentError(self, self.metavar)


class OneLayer(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        if len(values) > 1:
            raise argparse.ArgumentError(self, f"expected one layer, got {len(values)}: vectors of several, one behind "
                                               "the other, are not served")
        setattr(namespace, self.dest, values[0])


class FirstGpu(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        if namespace.device != "cpu":                                           # -cpu said so
            namespace.device = f"cuda:{values[0]}"


def pooling(text: str) -> str:
    return "CLS_TOKEN" if text == "FIRST_TOKEN" else text                       # another name of it


# Of bert-serving-server 1.10.0: flag -> how it is written; flag -> why it is refused, and what of it is not.
NEEDLESS = {"num_worker": {"type": at_least(1)}, "prefetch_size": {"type": at_least(0)},
            "priority_batch_size": {"type": at_least(0)}, "gpu_memory_fraction": {"type": float},
            "graph_tmp_dir": {}, "cors": {}, "http_max_connect": {"type": at_least(1)}, "xla": {"nargs": 0},
            "verbose": {"nargs": 0}, "fixed_embed_length": {"nargs": 0}}
WEIGHTS = "the weights and config.json of --model_dir are served; make what you mean a folder of its own, and drop it"
REFUSED = {"fp16": ("vectors are float32; drop it", 0), "tuned_model_dir": (WEIGHTS, None),
           "ckpt_name": (WEIGHTS, "bert_model.ckpt"), "config_name": (WEIGHTS, "bert_config.json"),
           "cased_tokenization": ("whether capitals are kept is said by the model's own files (do_lower_case in "
                                  "tokenizer_config.json); drop it", 0),
           "mask_cls_sep": ("[CLS] and [SEP] are among what is pooled, as in the published features; drop it", 0),
           "no_special_token": ("every text has its [CLS] and [SEP], as in the published features; drop it", 0),
           "no_position_embeddings": ("position embeddings are part of the model; drop it", 0),
           "http_port": ("no HTTP is served; ask with bert-serving-client, and drop it", None)}


def get_parser() -> Parser:
    parser = Parser(prog="bert_server.py", description=__doc__.split("\n")[0], allow_abbrev=False,
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                    epilog="One dash and two both work. The defaults are those of the published features. Old command "
                    "lines are taken: what this server does not need is without effect, and what would change vectors "
                    "is refused.")

    def add(name: str, default, help: str, *others: str, **how):
        names = [f"{dashes}{each}" for each in (name, *others) for dashes in ("--", "-")]
        parser.add_argument(*names, default=default, help=help, **how)
    add("model_dir", argparse.SUPPRESS, "BERT-type model: a folder (config.json, weights, vocab.txt) or a name on the "
        "Hugging Face hub (required)", required=True, metavar="DIR|NAME")
    add("host", "127.0.0.1", "address to serve on; 0.0.0.0 for every one of this machine: no password is asked (the "
        "standard client speaks IPv4 only)")
    add("port", 5555, "port that takes texts", "port_in", "port_data", type=at_least(1, 65535), metavar="PORT")
    add("port_out", 5556, "port that answers", "port_result", type=at_least(1, 65535), metavar="PORT")
    add("max_seq_len", 25, "most word pieces of a text, [CLS] and [SEP] among them; NONE for what the model can take",
        type=sequence_length, metavar="N")
    add("pooling_layer", -2, "encoder layer whose output is pooled, -1 the last; CLIP has its own", type=int,
        nargs="+", action=OneLayer, metavar="LAYER")
    add("pooling_strategy", "REDUCE_MEAN", "how a text's word pieces become one vector", type=pooling, choices=POOLINGS)
    add("max_batch_size", 256, "texts the model takes at once", type=at_least(1), metavar="N")
    add("show_tokens_to_client", False, "send word pieces along with the vectors", type=true_or_false, nargs="?",
        const=True, metavar="True|False")
    add("device", "auto", "auto takes a GPU where there is one", metavar="auto|cpu|cuda|cuda:N")
    add("engine", "torch", "what computes on a CPU: torch; or openvino, faster and the same to 1e-5 of the largest "
        "value, which auto takes where it is installed and takes the model", choices=("auto", "torch", "openvino"))
    add("cpu", "auto", "the same as --device cpu", action="store_const", const="cpu", dest="device")
    add("device_map", argparse.SUPPRESS, "the same as --device cuda:N", type=at_least(0), nargs="+", action=FirstGpu,
        metavar="N")
    for name, how in NEEDLESS.items():
        add(name, argparse.SUPPRESS, argparse.SUPPRESS, action=Ignored, **how)
    for name, (why, fine) in REFUSED.items():
        how = {"nargs": 0} if fine == 0 else {"const": fine}
        add(name, argparse.SUPPRESS, argparse.SUPPRESS, action=Refused, metavar=why, **how)
    parser.add_argument("--version", "-version", action="version", version=f"%(prog)s, the protocol of bert-serving "
                        f"{VERSION}", help="print the version of what it speaks and exit")
    return parser


if __name__ == "__main__":              # the imports take seconds: flags first, and a stop in them is no traceback
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(0))
    get_parser().parse_args()
    try:
        tempfile.gettempdir()
    except OSError:                     # torch wants a folder for temporary files, and writes none
        tempfile.tempdir = os.environ.get("TMPDIR", "/tmp")

import numpy as np
import torch
import transformers
import zmq

from machine import engine
from machine.errors import first_line
from machine.sentence_encoder import ModelError, SentenceEncoder, sentence_encoder
from machine.word_pieces import CHARACTERS, Sentence

IDENTITY = re.compile(rb"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")  # as every client makes its own: a uuid4
LARGEST_FRAME = 64 * 2**20              # bytes; ZeroMQ closes the connection of who sends more
LARGEST_REQUEST = 32 * 2**20            # bytes, of
MOST_TEXTS = 2**16                      # texts, and
MOST_PARTS = 2**21                      # commas and brackets: what JSON is made of takes many times its bytes
LINE = 128 * 2**20                      # bytes of requests in line, an equal share for each client
UNREAD = 16 * 2**20                     # bytes of answers on their way to a client; beyond, it is not worked for
ANSWERS = 2**30                         # bytes of large answers in all, those in work and those on their way
OVERHEAD = 1024                         # bytes that a message takes besides its content, about
AT_ONCE = 100                           # messages taken before the next batch is encoded
READ_AT_ONCE = 2**18                    # characters in a batch: half a second's
JOINING = 2.0                           # seconds that requests wait for their client to subscribe
READING = 10.0                          # seconds that a large answer may lie unread when others need its memory

log = logging.getLogger("bert_server")

class RateLimit(logging.Filter):
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


@dataclass(frozen=True)
class Connection:
    """A client's end of a TCP connection. Its number is used again once it is closed, its address hardly ever."""
    number: int
    address: tuple

    @classmethod
    def of(cls, frame: zmq.Frame) -> "Connection | None":
        """By which a message came; None where it is closed."""
        try:
            number = frame.get(zmq.SRCFD)
        except zmq.ZMQError:                                                    # it comes from ZeroMQ itself
            return None
        address = cls.address_of(number)
        return address and cls(number, address)

    @staticmethod
    def address_of(number: int) -> tuple | None:
        """The other end's address; None where that has closed."""
        try:
            with socket.socket(fileno=os.dup(number)) as end:
                try:
                    ended = end.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
                except BlockingIOError:
                    ended = False
                return None if ended else end.getpeername()
        except OSError:
            return None

    def open(self) -> bool:
        return self.address_of(self.number) == self.address

    def close(self) -> None:
        """A standard client that is still there connects and subscribes again, a tenth of a second later."""
        with contextlib.suppress(OSError):                                      # it can close at any moment by itself
            if self.open():
                with socket.socket(fileno=os.dup(self.number)) as end:
                    end.shutdown(socket.SHUT_RDWR)


class BadRequest(Exception):
    """A message that is logged and ignored: the protocol has no error reply."""


@dataclass(eq=False)
class Request:
    """One request's way from its bytes to its vectors; they take memory only once its turn has come."""
    client: "Client"
    number: bytes
    payload: bytes
    count: int                                                                  # N, as announced
    sentences: Sequence[Sentence] = ()
    vectors: np.ndarray | None = None                                           # (N, dim)
    tokens: Sequence[list[str] | None] = ()                                     # N
    left: deque[int] = field(default_factory=deque)                             # positions to encode yet

    @property
    def size(self) -> int:
        return len(self.payload) + OVERHEAD

    def begin(self, dim: int) -> None:
        """Raises BadRequest."""
        self.sentences, self.payload = parse(self.payload, self.count), b""
        # In order of length: so batches hold little padding.
        self.left.extend(sorted(range(self.count), key=lambda place: len(self.sentences[place])))
        self.vectors, self.tokens = np.empty((self.count, dim), np.float32), [None] * self.count


@dataclass
class Sent:
    """An answer that ZeroMQ may still hold: bytes, and since when, in seconds."""
    tracker: zmq.MessageTracker
    size: int
    since: float


@dataclass(eq=False)
class Client:
    """Who asks, who reads the answers, and what waits: for its turn, and to be read."""
    identity: bytes
    since: float                                                                # in seconds: when it was first heard of
    writer: Connection | None = None                                            # the only one that may ask in its name
    reader: Connection | None = None                                            # None until it has subscribed
    questions: deque[tuple[bytes, bytes]] = field(default_factory=deque)        # (command, request id)
    line: deque[Request] = field(default_factory=deque)
    size: int = 0                                                               # bytes of questions and line
    current: Request | None = None                                              # begun, with texts left
    working: int = 0                                                            # bytes of vectors of requests begun
    unread: deque["Sent"] = field(default_factory=deque)                        # answers, the oldest first
    unread_size: int = 0                                                        # their bytes

    def unread_bytes(self) -> int:
        """Of its answers, what ZeroMQ still holds."""
        while self.unread and self.unread[0].tracker.done:
            self.unread_size -= self.unread.popleft().size
        return self.unread_size

    def reads(self) -> bool:
        """Whether it is there, and takes its answers."""
        return self.reader is not None and self.unread_bytes() <= UNREAD

    def waits(self) -> bool:
        return bool(self.line or self.questions or self.current)


def parse(payload: bytes, count: int) -> list[Sentence]:
    """The sentences of an encode request. Raises BadRequest."""
    if sum(map(payload.count, (b",", b"[", b"{"))) > MOST_PARTS:
        raise BadRequest(f"over {MOST_PARTS} commas and brackets; ask in several requests")
    try:
        sentences = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"neither a command nor JSON ({first_line(error)})") from None
    if not isinstance(sentences, list) or not sentences:
        raise BadRequest("not a list of sentences")
    if len(sentences) != count:
        raise BadRequest(f"{len(sentences)} sentences announced as {count}")
    for place, sentence in enumerate(sentences, start=1):
        parts = sentence if isinstance(sentence, list) and sentence else [sentence]
        if not all(isinstance(part, str) and part.strip() for part in parts):
            raise BadRequest(f"sentence {place} is neither a text nor a list of word pieces, or is blank")
    return sentences


class Server:
    """Requests in on one port, answers out on the other, each to the client that asked.

    Answers go to the connections whose topic is their first frame. A client's topic is its whole identity, 36 bytes
    that nobody else can guess; the server subscribes for it (XPUB_MANUAL), so that no one gets another's answers by
    asking for everything, or for a beginning. An identity belongs to the first connection that subscribed to it, and to
    the first that asked in its name, for as long as they are open.
    """

    def __init__(self, encoder: SentenceEncoder, config: dict):
        """config: the flags by name, and whatever else SHOW_CONFIG tells. Raises zmq.ZMQError for a bad address."""
        self.encoder, self.config = encoder, config
        host = f"[{config['host'].strip('[]')}]" if ":" in config["host"] else config["host"]
        self.context = zmq.Context()
        self.requests, self.answers = self.context.socket(zmq.PULL), self.context.socket(zmq.XPUB)
        self.requests.maxmsgsize, self.requests.rcvhwm = LARGEST_FRAME, 2
        self.answers.maxmsgsize = 1024                                          # room for a subscription
        self.answers.sndhwm = 0                                                 # we count ourselves: see Client.reads
        self.answers.setsockopt(zmq.XPUB_MANUAL, 1)
        for end, port in ((self.requests, config["port"]), (self.answers, config["port_out"])):
            end.linger, end.ipv6 = 0, ":" in host
            end.tcp_keepalive, end.tcp_keepalive_idle, end.tcp_keepalive_intvl, end.tcp_keepalive_cnt = 1, 60, 10, 3
            end.bind(f"tcp://{host}:{port}")
        self.clients: dict[bytes, Client] = {}                                  # who had a turn goes to the end
        self.speaks: dict[Connection, Client] = {}                              # a connection's latest client
        self.aligned = True                                                     # see note_subscriptions
        self.counts = Counter(requests=0, texts=0, ignored=0, undelivered=0, refused=0)
        self.stopping = False

    def run(self) -> None:
        """Serve until a TERMINATION comes from this machine."""
        poller = zmq.Poller()
        poller.register(self.answers, zmq.POLLIN)
        poller.register(self.requests, zmq.POLLIN)
        busy = False
        while not self.stopping:
            waiting = any(client.waits() for client in self.clients.values())
            # In ms. Never without end: a signal that comes just before the wait is only acted on after it.
            poller.poll(0 if busy else 20 if waiting else 500)
            self.note_subscriptions()
            self.take_requests()
            self.serve_waiting()
            busy = self.encode_batch()

    def close(self) -> None:
        self.context.destroy(linger=0)

    # Who is there

    def note_subscriptions(self) -> None:
        """Clients join by subscribing to their identity, and leave.

        ZeroMQ subscribes the connection of the message that was read last, but counts wrongly as soon as one is read
        that is no subscription, until it has none left: none is believed meanwhile.
        """
        for _ in range(AT_ONCE):
            if not self.answers.poll(0):
                self.aligned = True
                return
            frame = self.answers.recv(copy=False)
            kind, topic, connection = frame.bytes[:1], frame.bytes[1:], Connection.of(frame)
            if kind == b"\0":
                self.note_leaving(topic, connection)
                continue
            try:
                self.aligned &= kind == b"\1"
                self.join(topic, connection)
                self.answers.subscribe(topic)
            except BadRequest as error:
                self.counts["refused"] += 1
                log.warning("refused a subscription: %s", error)
                if connection:
                    connection.close()

    def join(self, topic: bytes, connection: Connection | None) -> None:
        """Raises BadRequest for what is not to be subscribed."""
        if not self.aligned:
            raise BadRequest("something else came with it")
        if connection is None:
            raise BadRequest("its connection is closed")
        if not IDENTITY.fullmatch(topic):
            raise BadRequest(f"{topic[:40]!r} is not the identity of a client")
        client = self.clients.get(topic) or Client(topic, time.monotonic())
        if client.reader not in (None, connection) and client.reader.open():
            raise BadRequest("another connection has subscribed to that client's answers")
        if any(other.reader == connection for other in self.clients.values() if other is not client):
            raise BadRequest("a connection has one client")
        client.reader, self.clients[topic] = connection, client

    def note_leaving(self, topic: bytes, connection: Connection | None) -> None:
        """A connection that is closed is not named: it may be one that was refused."""
        client = self.clients.get(topic)
        if client is None or client.reader is None:
            return
        if client.reader == connection:
            connection.close()                                                  # no standard client does so
            self.forget(client)
        elif not client.reader.open():
            self.forget(client)

    def serve_waiting(self) -> None:
        """Answer questions that had to wait; give up who does not subscribe."""
        for client in list(self.clients.values()):
            if client.reader is None and time.monotonic() - client.since > JOINING:
                self.forget(client)
            self.answer_questions(client)

    def forget(self, client: Client) -> None:
        """It is gone, with all that it waited for."""
        del self.clients[client.identity]
        if self.speaks.get(client.writer) is client:
            del self.speaks[client.writer]
        lost = len(client.line) + len(client.questions) + bool(client.current and client.current.left)
        self.counts["undelivered"] += lost
        if lost:
            log.warning("dropped %d requests: their client is gone", lost)

    # What they ask

    def take_requests(self) -> None:
        for _ in range(AT_ONCE):
            if self.stopping or not self.requests.poll(0):
                return
            frames = self.requests.recv_multipart(copy=False)
            address = frames[0].get("Peer-Address")
            try:
                self.take(frames, address, Connection.of(frames[0]))
            except Exception as error:                                          # no request may end the service
                self.ignore(address, error)

    def ignore(self, who: str, error: Exception) -> None:
        self.counts["ignored"] += 1
        log.warning("ignored a request from %s: %s", who, first_line(error))

    def take(self, frames: list[zmq.Frame], address: str, connection: Connection | None) -> None:
        """Answer a command, or put an encode request in its client's line. Raises BadRequest."""
        if len(frames) != 4:
            raise BadRequest(f"{len(frames)} frames in place of 4")
        size = sum(map(len, frames))
        if size > LARGEST_REQUEST:
            raise BadRequest(f"{size} bytes are over {LARGEST_REQUEST}; ask in several requests")
        identity, payload, number, length = (frame.bytes for frame in frames)
        if payload == b"TERMINATION":
            if not address.startswith(("127.", "::1", "::ffff:127.")):
                raise BadRequest("TERMINATION is for this machine's own clients")
            self.stopping = True
            return
        if not number.isdigit() or len(number) > 20:
            raise BadRequest(f"request id {number[:20]!r} is no number")
        client = self.client_of(identity, connection)
        if client.size and client.size + size > LINE // len(self.clients):
            raise BadRequest(f"its client has {len(client.line)} requests of {client.size} bytes in line already")
        if payload in (b"SHOW_CONFIG", b"SHOW_STATUS"):
            client.questions.append((payload, number))
            client.size += OVERHEAD
            self.answer_questions(client)
        else:
            request = Request(client, number, payload, announced(length))
            client.line.append(request)
            client.size += request.size

    def client_of(self, identity: bytes, connection: Connection | None) -> Client:
        """The client in whose name this connection asks. Raises BadRequest where it is not its own."""
        if not IDENTITY.fullmatch(identity):
            raise BadRequest(f"an identity of {len(identity)} bytes that is no uuid")
        if connection is None:
            raise BadRequest("its client is gone")
        client = self.clients.get(identity) or Client(identity, time.monotonic())
        owner = client.writer if self.speaks.get(client.writer) is client else None
        if owner not in (None, connection):
            if owner.open():
                raise BadRequest("it is in the name of a client that has another connection")
            del self.speaks[owner]
        before = self.speaks.get(connection)
        if before not in (None, client) and before.reader is None:              # or one could make up any number
            self.forget(before)
        client.writer, self.speaks[connection], self.clients[identity] = connection, client, client
        return client

    def status(self) -> dict:
        clients = self.clients.values()
        waiting = sum(len(client.line) + bool(client.current and client.current.left) for client in clients)
        return {**self.counts, "waiting_requests": waiting,
                "subscribed_clients": sum(client.reader is not None for client in clients)}

    # What they get

    def encode_batch(self) -> bool:
        """One batch, an equal share for each client with texts in line; what is left of it, for any. Whether there was
        anything to do."""
        ready = [client for client in self.clients.values() if (client.line or client.current) and client.reads()]
        batch = Batch(self.config["max_batch_size"], READ_AT_ONCE)
        for count in (max(1, len(ready)), 1):
            texts, characters = max(1, batch.room // count), batch.characters // count
            for client in ready:
                self.fill(batch, client, texts, characters)
        if not batch.places:
            return False
        for client in {request.client: None for request in batch.places}:
            if client.identity in self.clients:
                self.clients[client.identity] = self.clients.pop(client.identity)
        encoded = list(batch.places)
        try:
            self.encode_places(batch.places)
        except Exception as error:                                              # out of a GPU's memory, say
            log.error("cannot encode %d texts at once (%s)", sum(map(len, batch.places.values())), first_line(error))
            encoded = [request for request, places in batch.places.items() if self.encodes_alone(request, places)]
        self.note_subscriptions()
        for request in encoded:
            if not request.left:
                self.finish(request)
        return True

    def fill(self, batch: "Batch", client: Client, texts: int, characters: int) -> None:
        """Put up to so many texts of a client, one at least, into a batch with room."""
        characters = min(characters, batch.characters)
        while texts > 0 and characters > 0 and batch.room and (request := self.next_request(client)):
            place = request.left.popleft()
            batch.places.setdefault(request, []).append(place)
            length = min(len(request.sentences[place]), CHARACTERS * self.encoder.length)
            texts, characters = texts - 1, characters - length
            batch.room, batch.characters = batch.room - 1, batch.characters - length

    def next_request(self, client: Client) -> Request | None:
        """The client's first request with texts left; None where there is none, or no room for its answer."""
        while not (client.current and client.current.left):
            client.current = None
            if not client.line or not self.make_room(client):
                return None
            request = client.line.popleft()
            client.size -= request.size
            try:
                request.begin(self.encoder.dim)
            except Exception as error:                                          # no request may end the service
                self.ignore(client.writer.address[0], error)
                continue
            self.counts.update(requests=1, texts=request.count)
            client.current = request
            client.working += request.vectors.nbytes
        return client.current

    def make_room(self, client: Client) -> bool:
        """Whether the next answer may take its memory. A large one waits until others' are made and read; who leaves
        one unread for long meanwhile loses its connection."""
        needed = 4 * self.encoder.dim * client.line[0].count
        if needed <= UNREAD:
            return True
        others = [other for other in self.clients.values() if other is not client]
        held = sum(other.working + other.unread_bytes() for other in others)
        if held == 0 or held + needed <= ANSWERS:
            return True
        earlier = time.monotonic() - READING
        slow = [other for other in others if other.unread and other.unread[0].since < earlier]
        if slow:
            slowest = max(slow, key=lambda other: other.unread_size)
            self.counts["undelivered"] += len(slowest.unread)
            log.warning("closed a client's connection: it does not read its answers, and others need the room")
            slowest.reader.close()
            self.forget(slowest)
        return False

    def encode_places(self, places: dict[Request, list[int]]) -> None:
        ids = self.encoder.token_ids([request.sentences[place] for request, own in places.items() for place in own])
        vectors, done = self.encoder.encode(ids), 0
        for request, own in places.items():
            request.vectors[own] = vectors[done:done + len(own)]
            if self.config["show_tokens_to_client"]:
                for place, sentence_ids in zip(own, ids[done:done + len(own)], strict=True):
                    request.tokens[place] = self.encoder.tokens(sentence_ids)
            done += len(own)

    def encodes_alone(self, request: Request, places: list[int]) -> bool:
        """Not for one request's fault all."""
        try:
            self.encode_places({request: places})
        except Exception as error:                                              # no request may end the service
            self.counts["ignored"] += 1
            log.error("gave up request %s: cannot encode %d of its texts (%s); a lower --max_batch_size may do",
                      request.number.decode(), len(places), first_line(error))
            request.left.clear()
            request.client.working -= request.vectors.nbytes
            return False
        return True

    def finish(self, request: Request) -> None:
        request.client.working -= request.vectors.nbytes
        described = {"dtype": "float32", "shape": request.vectors.shape,
                     "tokens": request.tokens if self.config["show_tokens_to_client"] else ""}
        self.answer(request.client, [json.dumps(described).encode(), request.vectors], request.number)

    def answer_questions(self, client: Client) -> None:
        while client.questions and client.reads():
            command, number = client.questions.popleft()
            client.size -= OVERHEAD
            report = self.config if command == b"SHOW_CONFIG" else {**self.config, **self.status()}
            self.answer(client, [json.dumps(report).encode()], number)

    def answer(self, client: Client, parts: list, number: bytes) -> None:
        """Send it, and keep count of what ZeroMQ holds until the client has read it."""
        if self.clients.get(client.identity) is not client:
            self.counts["undelivered"] += 1
            log.warning("dropped the answer to request %s: its client is gone", number.decode())
            return
        last = zmq.Frame(parts[-1], track=True, copy=False, copy_threshold=0)
        size = sum(memoryview(part).nbytes for part in parts) + OVERHEAD
        self.answers.send_multipart([client.identity, *parts[:-1], last, number], copy=False)
        client.unread.append(Sent(last.tracker, size, time.monotonic()))
        client.unread_size += size


def announced(length: bytes) -> int:
    """How many sentences a request says it has. Raises BadRequest."""
    if not length.isdigit() or len(length) > 20:
        raise BadRequest(f"its number of sentences is {length[:20]!r}")
    if int(length) > MOST_TEXTS:
        raise BadRequest(f"{int(length)} sentences are over {MOST_TEXTS}; ask for them in several requests")
    return int(length)


@dataclass
class Batch:
    """Which texts of which requests are encoded together."""
    room: int                                                                   # texts
    characters: int
    places: dict[Request, list[int]] = field(default_factory=dict)


def stop(*_) -> None:
    """Ctrl-C and SIGTERM end the service at once, from wherever it is: an exception could be caught on its way."""
    with contextlib.suppress(OSError):
        os.write(2, f"{time.strftime('%Y-%m-%d %H:%M:%S')} stopped\n".encode())
    os._exit(0)


def computed_by(encoder: SentenceEncoder, name: str, device: str) -> str:
    """What computes: the engine that is asked for; torch on a GPU and where it refuses, which is said."""
    if name == "torch":
        return name
    try:
        if device != "cpu":
            raise engine.Refused("it is for a CPU")
        encoder.compute_by_engine()
    except engine.Refused as why:
        log.info("--engine %s: %s; torch computes", name, why)
        return "torch"
    return engine.NAME


def main(argv: list[str] | None = None) -> int:
    """Serve until told to stop. Returns the exit code: 0 when stopped, 2 for bad input."""
    logging.basicConfig(format="%(asctime)s %(message)s")
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)             # what it meets, our own line says
    log.setLevel(logging.INFO)
    log.filters[:] = [RateLimit()]
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    server = None
    try:
        args = get_parser().parse_args(argv)
        if needless := vars(args).pop("needless", []):
            log.info("%s: not needed any more, and without effect: one process serves all", ", ".join(needless))
        log.info("loading %s", args.model_dir)
        device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        encoder = sentence_encoder(args.model_dir, args.pooling_layer, args.pooling_strategy, args.max_seq_len, device)
        config = {**vars(args), "device": device, "engine": computed_by(encoder, args.engine, device),
                  "server_version": VERSION, "dim": encoder.dim,
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
