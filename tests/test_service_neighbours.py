"""What one client of the sentence service can do to another: the real server on real sockets, with an encoder that
costs nothing, so that what is asked and left unread can be large."""

import json
import socket
import struct
import threading
import time
import uuid

import numpy as np
import pytest
import zmq
from bert_serving.client import BertClient

import bert_server

from .services import Raw, free_ports

SECONDS = 60                            # that anything may take on a busy machine


class LengthEncoder:
    """A text's vector is its length, again and again."""
    dim, length = 1024, 25

    def __init__(self):
        self.batches = []                                                       # the texts of each
        self.seconds = 0.0                                                      # that a batch takes

    def token_ids(self, sentences):
        return list(sentences)

    def encode(self, ids):
        self.batches.append(list(ids))
        time.sleep(self.seconds)
        return np.repeat(np.array([[len(text)] for text in ids], np.float32), self.dim, axis=1)


class Running:
    """A server in a thread of this process, whose insides can be looked at."""

    def __init__(self):
        self.encoder = LengthEncoder()
        self.port, self.port_out = free_ports()
        self.server = bert_server.Server(self.encoder, {
            "host": "127.0.0.1", "port": self.port, "port_out": self.port_out, "max_batch_size": 32,
            "show_tokens_to_client": False, "server_version": "1.10.0", "max_seq_len": 25})
        self.failure = None
        self.thread = threading.Thread(target=self.run)

    def run(self):
        try:
            self.server.run()
        except BaseException as error:
            self.failure = error

    def client(self):
        return BertClient(port=self.port, port_out=self.port_out, timeout=1000 * SECONDS, check_length=False)

    def joined(self, identity):
        client = self.server.clients.get(identity)
        return client is not None and client.reader is not None

    def stop(self):
        self.server.stopping = True
        if self.thread.ident:
            self.thread.join(SECONDS)
        self.server.close()


@pytest.fixture
def idle(monkeypatch):
    """Bound to its ports, but not yet running; it complains as often as it likes."""
    monkeypatch.setattr(bert_server.log, "filters", [])
    running = Running()
    yield running
    running.stop()
    assert running.failure is None


@pytest.fixture
def service(idle):
    idle.thread.start()
    return idle


def eventually(condition):
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it never came about"
        time.sleep(0.01)


def is_correct(frames, texts):
    return np.array_equal(np.frombuffer(frames[2], np.float32).reshape(len(texts), -1)[:, 0], list(map(len, texts)))


def payload(texts):
    return json.dumps(texts).encode()


# Eavesdroppers

def test_who_asks_for_everything_gets_nothing_and_stops_nobody(service):
    context = zmq.Context()
    with Raw(service) as victim:
        eventually(lambda: service.joined(victim.identity))
        greedy = []
        for topics in ([b""], [victim.identity[:1]], [victim.identity[:35]], [victim.identity], [b"\0", b"\1"],
                       [str(uuid.uuid4()).encode(), b""], [victim.identity + b"-"]):
            stranger = context.socket(zmq.SUB)
            stranger.rcvhwm = 1
            for topic in topics:
                stranger.subscribe(topic)
            stranger.connect(f"tcp://127.0.0.1:{service.port_out}")
            greedy.append(stranger)
        eventually(lambda: service.server.counts["refused"] >= len(greedy))
        for number in range(1, 101):                                            # 13 MB, more than sockets hold
            texts = ["a" * number] * 32
            victim.send(payload(texts), b"%d" % number, b"32")
            assert is_correct(victim.answer(SECONDS), texts)
        assert not any(stranger.poll(0) for stranger in greedy)
    context.destroy(linger=0)


def test_a_topic_stays_its_first_subscribers_until_that_leaves(service):
    with Raw(service) as first:
        eventually(lambda: service.joined(first.identity))
        with Raw(service, first.identity) as second:
            eventually(lambda: not second.sub.poll(1) and service.server.counts["refused"] >= 3)  # again and again
            first.send(payload(["red"]))
            assert is_correct(first.answer(SECONDS), ["red"]) and second.answer(0.2) is None
        first.send(payload(["blue"]), b"2")
        assert is_correct(first.answer(SECONDS), ["blue"])                        # though the second has left
        later = Raw(service, first.identity)
    with later:
        eventually(lambda: not later.sub.poll(1) and service.joined(later.identity))    # as it reads, it comes again
        later.send(payload(["green"]))
        assert is_correct(later.answer(SECONDS), ["green"])


def test_subscriptions_that_come_with_something_else_are_not_believed(idle):
    """ZeroMQ would give the next connection's topic to the one after it."""
    context = zmq.Context()
    stranger = context.socket(zmq.XSUB)
    stranger.connect(f"tcp://127.0.0.1:{idle.port_out}")
    eventually(lambda: stranger.poll(0, zmq.POLLOUT))
    stranger.send(b"no subscription")
    assert idle.server.answers.poll(1000 * SECONDS)
    with Raw(idle) as victim, Raw(idle, victim.identity) as thief:
        victim.push.poll(200), thief.push.poll(200)
        time.sleep(0.5)                                                         # both may be there; more are no harm
        idle.server.note_subscriptions()
        assert not idle.server.clients
        idle.thread.start()
        eventually(lambda: not victim.sub.poll(1) and idle.joined(victim.identity))  # as it reads, it comes again
    context.destroy(linger=0)


def test_a_connection_has_one_topic_and_floods_of_them_end_it(service):
    context = zmq.Context()
    stranger = context.socket(zmq.SUB)
    for _ in range(2000):
        stranger.subscribe(str(uuid.uuid4()))
    stranger.connect(f"tcp://127.0.0.1:{service.port_out}")
    eventually(lambda: service.server.counts["refused"] > 100)
    with service.client() as client:
        assert client.encode(["red"])[0, 0] == 3
    assert len(service.server.clients) < 20
    context.destroy(linger=0)
    eventually(lambda: not service.server.clients)


def test_who_resets_a_connection_while_it_is_being_closed_does_no_harm(monkeypatch):
    """A look finds it open, and a moment later it no longer is."""
    look = bert_server.Connection.open

    def look_then_reset(connection):
        assert look(connection)
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))     # closing is a reset
        theirs.close()
        with pytest.raises(ConnectionResetError):
            ours.recv(1)                                                        # waits until it has come
        return True
    monkeypatch.setattr(bert_server.Connection, "open", look_then_reset)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        theirs = socket.create_connection(listening.getsockname())
        ours, address = listening.accept()
    with ours:
        bert_server.Connection(ours.fileno(), address).close()


# Forgers

def test_nobody_asks_in_anothers_name(service):
    with Raw(service) as victim, Raw(service) as forger:
        victim.send(payload(["red"]))
        assert is_correct(victim.answer(SECONDS), ["red"])
        ignored = service.server.counts["ignored"]
        forger.push.send_multipart([victim.identity, payload(["forged"]), b"2", b"1"])
        forger.push.send_multipart([victim.identity, b"SHOW_CONFIG", b"3", b"0"])
        eventually(lambda: service.server.counts["ignored"] == ignored + 2)
        victim.send(payload(["blue!"]), b"2")
        answer = victim.answer(SECONDS)
        assert answer[-1] == b"2" and is_correct(answer, ["blue!"]) and victim.answer(0.2) is None


def test_who_connects_anew_keeps_its_name(service):
    """As libzmq does by itself when a connection breaks: the old one is closed, so it owns nothing any more."""
    with Raw(service) as victim:
        victim.send(payload(["red"]))
        assert victim.answer(SECONDS)
        victim.push.close(linger=0)
        victim.push = victim.context.socket(zmq.PUSH)
        victim.push.connect(f"tcp://127.0.0.1:{service.port}")
        answer = None
        while not answer:                                                       # until the server sees that it is gone
            victim.send(payload(["blue"]), b"2")
            answer = victim.answer(1)
        assert is_correct(answer, ["blue"])


@pytest.mark.long("seconds of waiting")
def test_names_without_subscribers_cost_no_work_and_no_memory(service):
    context = zmq.Context()
    push = context.socket(zmq.PUSH)
    push.connect(f"tcp://127.0.0.1:{service.port}")
    for _ in range(500):
        push.send_multipart([str(uuid.uuid4()).encode(), payload(["a"]), b"1", b"1"])
    eventually(lambda: service.server.counts["undelivered"] == 500)
    assert service.encoder.batches == [] and not service.server.clients and not service.server.speaks
    context.destroy(linger=0)


# Slow readers

def at_rest(count):
    """What it is when it has not changed for two seconds."""
    since, last = time.monotonic(), count()
    while time.monotonic() - since < 2:
        time.sleep(0.05)
        if count() != last:
            since, last = time.monotonic(), count()
    return last


def slow_reader(service):
    slow = Raw(service, unread=1)
    eventually(lambda: service.joined(slow.identity))
    return slow


@pytest.mark.long("waits for who does not read")
def test_who_does_not_read_is_not_worked_for_and_others_are(service, monkeypatch):
    monkeypatch.setattr(bert_server, "UNREAD", 2**20)
    with slow_reader(service) as slow, service.client() as client:
        for number in range(1, 101):                                            # 100 answers of 4 MB
            slow.send(payload(["a"] * 1024), b"%d" % number, b"1024")
        held = service.server.clients[slow.identity]
        eventually(lambda: held.unread_bytes() > 2**20)
        made = at_rest(lambda: len(service.encoder.batches))                    # the system's own buffers are full, too
        for _ in range(100):
            assert client.encode(["red"])[0, 0] == 3
        assert len(service.encoder.batches) <= made + 100 + 64                  # what it had begun, at most
        assert held.line and held.unread_bytes() + held.working < 2**20 + 3 * 2**22
        numbers = [slow.answer(SECONDS)[-1] for _ in range(100)]                # once it reads, it gets all
        assert numbers == [b"%d" % number for number in range(1, 101)]


@pytest.mark.long("answers of 28 MB")
def test_large_answers_share_a_bounded_memory_and_the_unread_give_way(service, monkeypatch):
    monkeypatch.setattr(bert_server, "UNREAD", 2**20)
    monkeypatch.setattr(bert_server, "ANSWERS", 2**25)
    monkeypatch.setattr(bert_server, "READING", 0.5)
    with slow_reader(service) as slow, service.client() as client:
        for number in range(1, 6):                                              # of 28 MB each, where 32 may be held
            slow.send(payload(["a"] * 7000), b"%d" % number, b"7000")
        made = len(service.encoder.batches)
        held = service.server.clients[slow.identity]
        eventually(lambda: len(held.unread) == 1 and time.monotonic() - held.unread[0].since > 1)
        assert len(service.encoder.batches) < made + 5 * 7000 / 32 and held.line
        assert client.encode(["red"] * 4000).shape == (4000, 1024)
        assert service.server.counts["undelivered"] >= 2 and slow.identity not in service.server.clients


# Large requests

def test_a_large_request_lets_a_small_one_pass_within_a_batch_or_two(service):
    service.encoder.seconds = 0.005
    with Raw(service) as one, Raw(service) as two, Raw(service) as three, Raw(service) as small:
        for greedy in (one, two, three):
            for number in range(20):
                greedy.send(payload(["a"] * 2000), b"%d" % number, b"2000")
        eventually(lambda: len(service.encoder.batches) > 20)
        for number in range(50):
            before = len(service.encoder.batches)
            small.send(payload(["red"]), b"%d" % number)
            assert is_correct(small.answer(SECONDS), ["red"])
            place = next(i for i, texts in enumerate(service.encoder.batches[before:]) if "red" in texts)
            assert place <= 20                                                  # on its way, a busy machine may wait
        assert service.server.clients[one.identity].line
        shares = [sum("red" in texts for texts in service.encoder.batches),
                  max(len(texts) for texts in service.encoder.batches)]
        assert shares == [50, 32]


def test_every_client_has_a_share_of_each_batch(idle):
    """Without a wire between: what waits is laid down first, then one batch is made."""
    server = idle.server
    clients = [bert_server.Client(b"%036d" % number, 0.0) for number in range(5)]
    for client, texts in zip(clients, (
            [["a"] * 500] * 2, [["b"] * 500], [["c"]], [["d"], ["d"] * 3], [["e" * 9000] * 9]), strict=True):
        client.reads = lambda: True
        server.clients[client.identity] = client
        for own in texts:
            client.line.append(bert_server.Request(client, b"1", payload(own), len(own)))
            client.size += client.line[-1].size
    assert server.encode_batch()
    (batch,) = idle.encoder.batches
    counts = {letter: sum(text[0] == letter for text in batch) for letter in "abcde"}
    assert sum(counts.values()) == 32 and counts["c"] == 1 and counts["d"] == 4
    assert counts["b"] == 6 and counts["e"] == 6 and counts["a"] == 15          # a fifth each; the rest is the first's


def test_long_texts_make_small_batches(idle, monkeypatch):
    monkeypatch.setattr(bert_server, "READ_AT_ONCE", 30_000)
    client = bert_server.Client(b"0" * 36, 0.0)
    client.reads = lambda: True
    idle.server.clients[client.identity] = client
    client.line.append(bert_server.Request(client, b"1", payload(["e" * 50_000] * 9), 9))
    assert idle.server.encode_batch() and [len(texts) for texts in idle.encoder.batches] == [3]


TOO_MUCH = {
    "bytes": (lambda: payload(["a" * 33 * 2**20]), 1, "bytes are over"),
    "texts": (lambda: payload(["a"] * 70_000), 70_000, "sentences are over"),
    "texts that are not announced": (lambda: b"[" + b'"a",' * 2**22 + b'"a"]', 1, "commas and brackets"),
    "word pieces": (lambda: b'[[' + b'"a",' * 2**22 + b'"a"]]', 1, "commas and brackets"),
    "empty lists": (lambda: b"[" + b"[]" * 2**22 + b"]", 1, "commas and brackets"),
}


@pytest.mark.parametrize(("made", "count", "said"), TOO_MUCH.values(), ids=TOO_MUCH)
def test_a_request_of_too_much_is_refused_before_it_is_read(service, made, count, said, monkeypatch, caplog):
    read = []
    monkeypatch.setattr(bert_server.json, "loads", lambda text, loads=json.loads: read.append(len(text)) or loads(text))
    with Raw(service) as greedy:
        eventually(lambda: service.joined(greedy.identity))
        greedy.send(made(), b"1", b"%d" % count)
        eventually(lambda: service.server.counts["ignored"] == 1)
        greedy.send(payload(["red"]), b"2")
        assert greedy.answer(SECONDS)[-1] == b"2"
    assert said in caplog.text and caplog.text.count("ignored a request") == 1
    assert max(read) < 100


@pytest.mark.long("eight seconds of waiting")
def test_what_a_client_has_in_line_is_bounded_by_its_share(service, monkeypatch, caplog):
    monkeypatch.setattr(bert_server, "LINE", 2**20)
    service.encoder.seconds = 0.2
    with Raw(service) as greedy, service.client() as client:
        eventually(lambda: service.joined(greedy.identity))
        for number in range(100):
            greedy.send(payload(["a" * 1000] * 300), b"%d" % number, b"300")    # 300 KB
        eventually(lambda: service.server.counts["ignored"] > 50)
        assert service.server.clients[greedy.identity].size < 2**20
        assert client.encode(["red"] * 400)[0, 0] == 3
    assert "in line already" in caplog.text


def test_the_trainers_largest_request_is_far_from_every_bound():
    from text_model import SentenceService
    texts = ["replace the long red dress with a shorter, darker one and its belt by a ribbon"] * SentenceService.LARGEST
    assert 8 * SentenceService.LARGEST <= bert_server.MOST_TEXTS
    assert 8 * len(payload(texts)) < bert_server.LARGEST_REQUEST
    assert 8 * payload(texts).count(b",") < bert_server.MOST_PARTS
    assert 8 * 4 * 1024 * len(texts) < bert_server.ANSWERS
