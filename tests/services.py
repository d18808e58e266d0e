"""Sentence services for the tests: real server processes, small models made here, and one that misbehaves on order."""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import deque
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import transformers
import zmq
from bert_serving.client import BertClient

ROOT = Path(__file__).resolve().parent.parent
WORDS = ("a", "red", "blue", "green", "dress", "shirt", "old", "wet", "dog", "bus", "ripe", "tomato", "replace", "with",
         "is", "darker", "longer", "has", "hem", "##s", "##er", "cafe", "!", ",", ".", "[", "]", "sep", "|", "1", "2")


# A hundred of its own for each process that tests, below those that systems give to outgoing connections: a port that
# was free a moment ago is taken by nobody else.
PORTS = itertools.cycle(range(first := 10_000 + os.getpid() % 200 * 100, first + 100))


def free_ports(count=2):
    return list(itertools.islice(filter(is_free, PORTS), count))


def is_free(port):
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


def write_bert(folder, size=768, layers=3, seed=0):
    """A random BERT-type model with a vocabulary of a few words, as a folder that transformers can load."""
    folder.mkdir(parents=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *"bcdefghijklmnopqrstuvwxyz"]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    torch.manual_seed(seed)
    config = transformers.BertConfig(vocab_size=len(vocabulary), hidden_size=size, num_hidden_layers=layers,
                                     num_attention_heads=4, intermediate_size=64, max_position_embeddings=64,
                                     initializer_range=0.05)
    transformers.BertModel(config).save_pretrained(folder)
    return folder


class Service:
    """A bert_server.py process on free ports."""

    def __init__(self, model, *words, ports=None):
        self.port, self.port_out = ports or free_ports()
        self.words = [sys.executable, "bert_server.py", "-model_dir", str(model), "-port", str(self.port),
                      "--port_out", str(self.port_out), *map(str, words)]
        self.log = tempfile.TemporaryFile("w+")                                 # noqa: SIM115
        self.process = subprocess.Popen(self.words, cwd=ROOT, stdout=self.log, stderr=subprocess.STDOUT)

    @property
    def flags(self):
        return {"use_bert": True, "bert_port": self.port, "bert_port_out": self.port_out, "bert_timeout": 60}

    def client(self, **how):
        """The unmodified client, which does not warn of long texts; made once the server has answered."""
        return BertClient(port=self.port, port_out=self.port_out, timeout=120_000, check_length=False, **how)

    def status(self):
        with self.client() as client:
            return client.server_status

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)

    def stop(self, number=signal.SIGTERM):
        """The exit code and the log."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            self.process.wait(30)
        finally:
            self.process.kill()
        self.log.seek(0)
        return self.process.returncode, self.log.read()


class Raw:
    """The two sockets of a client, frame by frame."""

    def __init__(self, service, identity=None, unread=1000):
        self.identity = identity or str(uuid.uuid4()).encode()
        self.context = zmq.Context()
        self.push, self.sub = self.context.socket(zmq.PUSH), self.context.socket(zmq.SUB)
        self.sub.rcvhwm = unread                                            # answers that it takes before they are read
        self.sub.subscribe(self.identity)
        self.push.connect(f"tcp://127.0.0.1:{service.port}")
        self.sub.connect(f"tcp://127.0.0.1:{service.port_out}")

    def send(self, payload, number=b"1", length=b"1"):
        self.push.send_multipart([self.identity, payload, number, length])

    def answer(self, seconds=20.0):
        return self.sub.recv_multipart() if self.sub.poll(1000 * seconds) else None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.context.destroy(linger=0)


@contextmanager
def serving(model, *words, **how):
    """A server that has answered; it must end cleanly."""
    service = Service(model, *words, **how)
    try:
        with service.client():
            pass
        yield service
    finally:
        code, output = service.stop()
    assert code in (0, -signal.SIGKILL) and "Traceback" not in output, output


class WebPage:
    """A process of search.py serve, its output kept; temporary: the folder it takes for temporary files."""

    def __init__(self, index, port, temporary, *words, **environment):
        self.port, self.temporary, self.address = port, temporary, f"http://127.0.0.1:{port}"
        self.log = tempfile.TemporaryFile("w+")                                 # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "search.py", "serve", "--index", index, "--port", str(port), *map(str, words)], cwd=ROOT,
            stdout=self.log, stderr=subprocess.STDOUT, env={**os.environ, **environment, "TMPDIR": str(temporary)})

    def output(self):
        self.log.seek(0)
        return self.log.read()

    def wait_until(self, what):
        """Until it has said this."""
        end = time.monotonic() + 180
        while what not in self.output():
            assert self.process.poll() is None and time.monotonic() < end, self.output()
            time.sleep(0.05)


@contextmanager
def serving_page(index, port, temporary, *words, **environment):
    """A page that answers; ended by SIGTERM."""
    page = WebPage(index, port, temporary, *words, **environment)
    try:
        page.wait_until("The page is at")
        yield page
        page.process.terminate()
        page.process.wait(60)
    finally:
        page.process.kill()
        page.process.wait()


class Misbehaving:
    """Speaks the protocol on free ports, and answers each encode request with the next of `answers`: a function of
    the texts that returns an array, raw frames, or None for no answer. The last one is used again.

    seconds: that it works on a request, meanwhile telling its configuration to who asks."""

    def __init__(self, answers, config=None, seconds=0.0):
        self.port, self.port_out = free_ports()
        self.answers, self.asked = list(answers), []
        self.seconds, self.late = seconds, deque()
        self.config = {"server_version": "1.10.0", "max_seq_len": 25, "show_tokens_to_client": False,
                       "model_dir": "m", **(config or {})}
        self.context, self.done = zmq.Context(), False
        self.requests, self.replies = self.context.socket(zmq.PULL), self.context.socket(zmq.XPUB)
        self.requests.bind(f"tcp://127.0.0.1:{self.port}")
        self.replies.bind(f"tcp://127.0.0.1:{self.port_out}")
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()

    def serve(self):
        subscribed = set()
        while not self.done:
            while self.late and self.late[0][0] <= time.monotonic():
                self.replies.send_multipart(self.late.popleft()[1])
            if not self.requests.poll(20):
                continue
            client, payload, number, _ = self.requests.recv_multipart()
            while client not in subscribed and self.replies.poll(1000):
                subscribed.add(self.replies.recv()[1:])
            if payload == b"SHOW_CONFIG":
                content = self.config if isinstance(self.config, bytes) else json.dumps(self.config).encode()
                self.replies.send_multipart([client, content, number])
                continue
            texts = json.loads(payload)
            self.asked.append(texts)
            answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
            answer = answer(texts) if callable(answer) else answer
            if isinstance(answer, np.ndarray):
                info = {"dtype": "float32", "shape": answer.shape, "tokens": ""}
                answer = [json.dumps(info).encode(), answer.tobytes()]
            if answer is not None:
                self.late.append((time.monotonic() + self.seconds, [client, *answer, number]))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.done = True
        self.thread.join()
        self.context.destroy(linger=0)


def hashed(texts, size=8):
    """A vector for each text, from its bytes alone."""
    return np.stack([np.random.default_rng(list(text.encode("utf-8", "surrogatepass"))).normal(size=size)
                     for text in texts]).astype(np.float32)
