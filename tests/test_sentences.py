"""The trainer's side of the sentence service: what it asks, what it keeps, and what it does when answers fail."""

import itertools
import sqlite3
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

import main
from datasets import DATASETS, Epoch
from machine.errors import InputError
from machine.image_store import ImageStore
from test_retrieval import evaluate
from text_model import SentenceFile, SentenceService, SentenceTable
from training import checkpoint

from . import golden
from .conftest import WRITERS, Run, flags, run_main, some
from .services import ROOT, Misbehaving, Service, free_ports, hashed, serving, write_bert

NAN = np.full((1, 8), np.nan, np.float32)


@pytest.fixture(scope="module")
def tiny768(tmp_path_factory):
    with serving(write_bert(tmp_path_factory.mktemp("models") / "tiny")) as running:
        yield running


def table_of(service, folder=None, timeout=30.0):
    return SentenceTable(SentenceService("127.0.0.1", service.port, service.port_out, timeout), folder)


@pytest.mark.long("runs with a real model's service")
@pytest.mark.parametrize(("name", "model", "loss", "complete"), some([
    ("fashion200k", "tirg", "soft_triplet", False),
    ("mitstates", "tirg", "soft_triplet", False),
    ("fashion200k", "composeAE", "batch_based_classification", True),
    ("fashionIQ", "RealSpaceConcatAE", "batch_based_classification", True)]))
def test_a_second_run_finds_the_vectors_on_disk_and_repeats(minilm, tmp_path, monkeypatch, name, model, loss, complete):
    """In 4 epochs, so that Fashion200k's modifications come in late."""
    monkeypatch.setattr(SentenceTable, "PROBES", 1)
    path = WRITERS[name](tmp_path / name)
    settings = {"model": model, "loss": loss, "use_complete_text_query": complete, "num_iters": 8, **minilm.flags}
    before = minilm.status()["texts"]
    first = run_main(name, path, tmp_path / "logs", comment="_1", **settings)
    asked = minilm.status()["texts"]
    second = run_main(name, path, tmp_path / "logs", comment="_2", **settings)
    closed = complete or name == "mitstates"                                    # else an epoch's probes, old and new
    assert minilm.status()["texts"] - asked <= 1 + (1 if closed else 2 * 4)
    assert asked - before >= (10 if name == "fashionIQ" else 3)
    assert first.metrics == second.metrics
    states = [torch.load(run.checkpoint, weights_only=True) for run in (first, second)]
    assert all(torch.equal(value, states[1]["model_state_dict"][key])
               for key, value in states[0]["model_state_dict"].items())
    assert states[0]["model_state_dict"]["text_model.fc_output.1.bias"].shape == (384,)
    assert set(states[0]["sentences"]) == {"fingerprint", "pooling_layer", "pooling_strategy", "max_seq_len"}
    tested = run_main(name, path, tmp_path / "logs", comment="_t", **settings | {
        "test_only": True, "model_checkpoint": first.checkpoint, "image_cache": "none"})
    assert tested.metrics == first.metrics
    data = DATASETS[name](path, "test", complete_text=complete)
    model = checkpoint.rebuild_model(first.checkpoint, table_of(minilm, path / "image_cache"))
    rebuilt = evaluate(model.to(memory_format=torch.channels_last), data, ImageStore(data.paths, 32))["model"]
    assert rebuilt == pytest.approx(first.metrics["test"])


@pytest.mark.long("a service of its own")
@pytest.mark.parametrize("model", ["composeAE", "RealSpaceConcatAE", "tirg"])
def test_the_published_sizes_are_the_originals(tiny768, mitstates, tmp_path, model):
    run = run_main("mitstates", mitstates, tmp_path / "logs", model=model, image_encoder="resnet18",
                   image_embed_dim=512, num_iters=1, loss="batch_based_classification", **tiny768.flags)
    shapes = golden.VALUES["cases"][f"{model}-bert768"]["state_dict"]
    held = torch.load(run.checkpoint, weights_only=True)["model_state_dict"]
    assert held.keys() == shapes.keys()
    assert all(list(held[name].shape) == shape for name, shape in shapes.items() if "embedding" not in name)


def test_gradients_do_not_enter_the_sentence_vectors(minilm):
    table = table_of(minilm, timeout=30)
    vectors = table(["red dress", "a", "red dress"])
    assert vectors.shape == (3, 384) and not vectors.requires_grad and torch.equal(vectors[0], vectors[2])
    with minilm.client() as client:
        np.testing.assert_allclose(vectors.numpy()[:2], client.encode(["red dress", "a"]), rtol=1e-5, atol=1e-6)


def test_the_size_is_the_services_and_a_checkpoint_keeps_it(minilm, tiny768, mitstates, tmp_path, capsys, caplog):
    trained = run_main("mitstates", mitstates, tmp_path / "logs", num_iters=1, **minilm.flags)
    again = {"num_iters": 1, "comment": "_2", "model_checkpoint": trained.checkpoint}
    assert main.main(flags("mitstates", mitstates, tmp_path / "logs", **again, **tiny768.flags)) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "of size 384" in line and "answers 768" in line and "model it was trained with" in line
    state = torch.load(trained.checkpoint, weights_only=True)
    state["sentences"]["fingerprint"] = "another"
    torch.save(state, tmp_path / "other.pth")
    run_main("mitstates", mitstates, tmp_path / "logs", **again | {"model_checkpoint": tmp_path / "other.pth"},
             **minilm.flags)
    assert "trained with the sentence vectors of" in caplog.text


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("complete", [False, True])
def test_every_text_of_a_run_is_known_before_it(name, complete, tmp_path):
    path = WRITERS[name](tmp_path / name, 4)
    train, test = (DATASETS[name](path, split, complete_text=complete) for split in ("train", "test"))
    for epoch in range(5):
        drawn = {sample.text for sample in Epoch(train, 3, epoch)}
        assert drawn <= set(train.sample_texts(3, epoch))
    for data in (train, test):
        assert set(data.task(3).texts) == {text for part in data.task(3).query_sets for text in part.texts}
        assert len(data.task(3).texts) == sum(len(part.sources) for part in data.task(3).query_sets) > 0
    if complete or name != "fashion200k":
        assert set(train.sample_texts(3, 0)) == set(train.sample_texts(9, 7))


def test_each_distinct_text_is_asked_once_in_large_requests():
    texts = [f"text {i % 3000}" for i in range(9000)] + ["", "  \n"]
    with Misbehaving([hashed]) as service:
        table = table_of(service)
        table.prepare(texts)
        found = table(texts)
        asked = [len(request) for request in service.asked[1:]]                 # the first asks for the size
    assert sum(asked) == 3000 and asked[0] == 16 and len(asked) <= 8
    np.testing.assert_array_equal(found[:9000].numpy(), hashed(texts[:9000]))


@pytest.mark.long("waits for seconds")
def test_a_question_that_takes_seconds_is_asked_once():
    with Misbehaving([hashed], seconds=2.5) as service:
        found = table_of(service, timeout=20.0)(["a", "b"])
        assert service.asked == [["size"], ["a", "b"]]
    np.testing.assert_array_equal(found.numpy(), hashed(["a", "b"]))


@pytest.mark.parametrize("blank", ["", " ", "\t\n", "\u3000"])
def test_a_blank_text_is_the_zero_vector_and_never_asked(blank):
    with Misbehaving([hashed]) as service:
        found = table_of(service)([blank, "red"])
        assert torch.equal(found[0], torch.zeros(8)) and found[1].abs().sum() > 0
        assert all(text.strip() for request in service.asked for text in request)


def test_blank_captions_train_and_test(minilm, fashion_iq, tmp_path):
    """One category, whose text then is the captions alone: the first triplet of each has none but blanks."""
    file = fashion_iq / "captions/cap.dress.train.json"
    file.write_text(file.read_text().replace("is Darker by 0", " "))
    run_main("fashionIQ", fashion_iq, tmp_path / "logs", category_to_train="dress", batch_size=3, **minilm.flags)


MISBEHAVIOUR = {
    "too few vectors": (lambda texts: hashed(texts)[:-1], "shape"),
    "another size": (lambda texts: hashed(texts, 5), "size 5"),
    "not a number": (lambda texts: np.vstack([hashed(texts)[:-1], NAN]), "NaN"),
    "no JSON": ([b"[", b""], "cannot be read"),
    "too many": (lambda texts: hashed([*texts, "x"]), "shape"),
    "one number a text": (lambda texts: hashed(texts)[:, 0], "shape"),
    "infinite": (lambda texts: hashed(texts) / 0, "NaN"),
    "no shape": ([b'{"dtype": "float32"}', b""], "cannot be read"),
    "another type": ([b'{"dtype": "pear", "shape": [2, 8]}', bytes(64)], "cannot be read"),
    "too few bytes": ([b'{"dtype": "float32", "shape": [2, 8]}', bytes(60)], "cannot be read"),
    "nothing": (None, "no answer"),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("answer", "said"), some(MISBEHAVIOUR.values(), 2), ids=MISBEHAVIOUR)
def test_wrong_answers_are_asked_again_and_then_told_in_one_line(answer, said):
    with Misbehaving([hashed, answer, answer, hashed]) as service:
        table = table_of(service, timeout=8.0)                                  # half of it is waited for no answer
        np.testing.assert_array_equal(table(["a", "b"]).numpy(), hashed(["a", "b"]))
        assert len(service.asked) == 4
    with Misbehaving([hashed, hashed, answer]) as service:
        table = table_of(service, timeout=1.0)
        table(["a", "b"])
        with pytest.raises(InputError, match=said) as caught:
            table(["c", "d"])
        assert "--bert_timeout" in str(caught.value)
        assert "\n" not in str(caught.value)
        torch.testing.assert_close(table(["b"]), torch.from_numpy(hashed(["b"])))  # what was known still is


@pytest.mark.parametrize("config", [b"[", b"[1]", b'"x"', b"null", b"\xff"])
def test_a_service_that_does_not_describe_itself_is_one_line(config):
    with Misbehaving([hashed]) as service:
        service.config = config
        with pytest.raises(InputError, match="does not describe itself"):
            table_of(service, timeout=1.0)


def test_another_model_in_the_middle_of_a_run_is_refused():
    with Misbehaving([hashed], {"fingerprint": "one"}) as service:
        table = table_of(service)
        table(["a"])
        service.config["fingerprint"] = "two"
        with pytest.raises(InputError, match="now has other vectors"):
            table(["b"])


def test_vectors_are_kept_by_what_they_depend_on(tmp_path):
    with Misbehaving([hashed], {"pooling_layer": -2}) as service:
        table_of(service, tmp_path)(["a", "b", "\ud800 c"])
        count = len(service.asked)
        again = table_of(service, tmp_path)
        np.testing.assert_array_equal(again(["b", "\ud800 c"]).numpy(), hashed(["b", "\ud800 c"]))
        assert service.asked[count:] == [["size"], ["b", "\ud800 c"]]            # the probe alone
        service.config["pooling_layer"] = -1
        table_of(service, tmp_path)(["b"])
        assert service.asked[-1] == ["b"] and len(list(tmp_path.glob("sentences_*.sqlite"))) == 2


def test_kept_vectors_of_another_model_under_the_same_name_are_noticed(tmp_path, caplog):
    with Misbehaving([hashed]) as service:
        table_of(service, tmp_path)(["a", "b"])
    with Misbehaving([lambda texts: -hashed(texts)]) as service:
        found = table_of(service, tmp_path)(["a", "b", "c"])
        np.testing.assert_array_equal(found.numpy(), -hashed(["a", "b", "c"]))
        assert "not this service's" in caplog.text
        np.testing.assert_array_equal(table_of(service, tmp_path)(["b"]).numpy(), -hashed(["b"]))


@pytest.mark.parametrize("damage", ["cut", "overwritten", "other tables", "bit", "empty", "a folder"])
def test_a_damaged_file_costs_asking_again_and_nothing_else(tmp_path, damage, caplog):
    texts = [f"text {i}" for i in range(400)]
    with Misbehaving([hashed]) as service:
        table_of(service, tmp_path)(texts)
        (file,) = tmp_path.glob("*.sqlite")
        content = file.read_bytes()
        if damage == "other tables":
            with sqlite3.connect(file) as database:
                database.execute("DROP TABLE vectors")
                database.execute("CREATE TABLE vectors (weight REAL)")
            database.close()
        elif damage == "a folder":
            file.unlink()
            file.mkdir()
        else:
            place = content.index(hashed(["text 7"]).tobytes())
            file.write_bytes({"cut": content[:len(content) // 2], "overwritten": b"no database" * 1000, "empty": b"",
                              "bit": content[:place] + bytes([content[place] ^ 1]) + content[place + 1:]}[damage])
        for _ in range(2):                                                      # the second run may find it mended
            np.testing.assert_array_equal(table_of(service, tmp_path)(texts).numpy(), hashed(texts))


def test_a_folder_that_cannot_be_used_is_said_once(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with Misbehaving([hashed]) as service:
        table = table_of(service, tmp_path / "file" / "cache")
        for text in "abc":
            table([text])
    assert caplog.text.count("sentence vectors cannot be kept") == 1


def test_several_processes_may_fill_one_file(tmp_path):
    def fill(part):
        file = SentenceFile(tmp_path, {"x": 1}, 8)
        for start in range(0, 200, 10):
            texts = [f"{part if start % 20 else 'both'} {start + i}" for i in range(10)]
            file.write(texts, hashed(texts))
    threads = [threading.Thread(target=fill, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    texts = [f"{part} {start + i}" for part, start, i in itertools.product(range(4), range(10, 200, 20), range(10))]
    vectors = np.full((len(texts), 8), np.nan, np.float32)
    SentenceFile(tmp_path, {"x": 1}, 8).read(texts, vectors)
    np.testing.assert_array_equal(vectors, hashed(texts))


@pytest.mark.long("two services of its own")
def test_a_killed_server_that_is_started_again_within_the_timeout_goes_unnoticed(tmp_path):
    model = write_bert(tmp_path / "model", size=32)
    ports = free_ports()
    service = Service(model, ports=ports)
    with service.client():
        pass
    table = table_of(service, timeout=240)
    table(["a"])
    service.kill()
    with pytest.raises(InputError, match=f"no sentence service at 127.0.0.1:{ports[0]}.*bert_server.py"):
        table_of(service, timeout=0.5)
    answer = {}
    asking = threading.Thread(target=lambda: answer.update(found=table(["red dress"])))
    asking.start()
    with serving(model, ports=ports):
        asking.join(240)
    assert answer["found"].shape == (1, 32)


def start_training(name, path, log_dir, service, **changes):
    settings = {"num_iters": 100_000, "eval_frequency": 0, "save_frequency": 5, **service.flags, "bert_timeout": 5}
    words = flags(name, path, log_dir, **settings | changes)
    process = subprocess.Popen([sys.executable, "main.py", *words], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while not list(log_dir.glob("*/latest_checkpoint.pth")):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.05)
    return process, next(log_dir.iterdir()) / "latest_checkpoint.pth"


@pytest.mark.long("a service and a training of its own")
def test_training_outlives_the_service(tmp_path):
    """kill -9 after the first epoch: all texts are known, so the run goes on to its end, tests included."""
    path = WRITERS["mitstates"](tmp_path / "mitstates")
    service = Service(write_bert(tmp_path / "model", size=32))
    with service.client():
        pass
    process, saved = start_training("mitstates", path, tmp_path / "logs", service, num_iters=60)
    service.kill()
    assert process.wait(600) == 0, process.stderr.read()
    assert Run(saved.parent).metrics["it"] == 60


@pytest.mark.long("a service and a training of its own")
def test_a_service_gone_while_new_texts_are_needed_ends_in_one_line_and_a_checkpoint(tmp_path):
    """Fashion200k's modifications are drawn: an epoch's new ones are asked for before it begins."""
    path = WRITERS["fashion200k"](tmp_path / "fashion200k", 8)
    labels = path / "labels/dress_train_detect_all.txt"
    lines = labels.read_text().splitlines()
    labels.write_text("\n".join(line.rpartition("\t")[0] + f"\tdress number{i}" for i, line in enumerate(lines)) + "\n")
    service = Service(write_bert(tmp_path / "model", size=32))
    with service.client():
        pass
    process, saved = start_training("fashion200k", path, tmp_path / "logs", service)
    service.kill()
    assert process.wait(600) == 2
    line = process.stderr.read().strip().splitlines()[-1]
    assert line.startswith("main.py: error: no sentence service at") and "Traceback" not in line
    assert checkpoint.load(saved)["it"] >= 10
