"""Galleries that grow: their vectors elsewhere, codes in place of vectors, an index made by several processes."""

import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time

import numpy as np
import pytest
from pyarrow import parquet
from qdrant_client import QdrantClient, models

import bench
from machine.errors import InputError
from searching import image_list, qdrant
from searching.image_list import ImageList, InvalidIndex
from searching.metadata import keep
from searching.ranking import rank, read_ranking

from .conftest import picture, some
from .index_faults import copied, execute, write_model
from .services import ROOT, free_ports
from .test_search import asked, features_index, held, made, quiet, run

pytestmark = pytest.mark.long("thousands of pictures, and Qdrant")

DIM = 24


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("growing") / "model.pth")


@pytest.fixture(scope="module", params=some([2000, 10_000], why="the same with more images", mark=pytest.mark.rare))
def count(request):
    return request.param


@pytest.fixture(scope="module")
def large(trained, count, tmp_path_factory):
    """Pictures' folder, and an index of six of them and of `count` more images, of which there are features alone:
    about the pictures', and a hundred of them the same one, nearest to the first."""
    root = tmp_path_factory.mktemp("large")
    for number in range(6):
        picture(root / "images" / f"{number}.jpg")
    made(trained, root / "images", root / "index")
    listed = ImageList(root / "index" / "images.sqlite")
    (_, features), = listed.all_features()
    rng = np.random.default_rng(0)
    spread = rng.normal(1, 0.2, (count, DIM)).astype(np.float32)
    spread[500:600] = spread[500] / 10 + 0.9
    features = features[np.where(np.arange(count) // 100 == 5, 0, rng.integers(0, 6, count))] * spread
    listed.add([(f"made up/{number}.jpg", (1, 1)) for number in range(count)], features)
    keep(listed, {f"made up/{number}.jpg": {"price": number, "id": None if number % 2 else "A7", "weight": number / 2,
                                            "size": "S" if number % 3 else 38} for number in range(1000)})
    rank(listed, root / "index", DIM, "exact", quiet)
    return root


@pytest.fixture(scope="module")
def exported(large):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_list, "ROWS_AT_ONCE", 500)
        assert run("export", "--index", large / "index", "--vectors", large / "vectors.parquet") == 0
    return large / "vectors.parquet"


@pytest.fixture(scope="module")
def filled(exported):
    """A folder that is filled as docs/growing.md fills a server."""
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "growing.md").read_text(), re.S)
    folder = exported.with_name("qdrant")
    for told, here in (("vectors.parquet", str(exported)), ('url="http://localhost:6333"', f"path={str(folder)!r}")):
        assert block.count(told) == 1
        block = block.replace(told, here)
    connect, names = sqlite3.connect, {}

    def without_waiting(*where, **how):                                         # else for the disk, once a vector
        database = connect(*where, **how)
        database.execute("PRAGMA synchronous = OFF")
        return database
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sqlite3, "connect", without_waiting)
        exec(block, names)
    names["client"].close()
    return folder


def test_a_table_holds_every_image_with_its_unit_vector(large, count, exported):
    table = parquet.read_table(exported)
    listed = ImageList(large / "index" / "images.sqlite")
    entries = listed.entries("true")
    assert table.column_names == ["id", "path", "price", "id_", "weight", "size", "vector"]
    assert list(map(str, table.schema.types))[2:6] == ["int64", "string", "double", "string"]
    rows = table.select(["price", "id_", "weight", "size"]).to_pylist()
    assert rows[6 + 9] == {"price": 9, "id_": None, "weight": 4.5, "size": "38"}
    assert rows[6 + 10] == {"price": 10, "id_": "A7", "weight": 5.0, "size": "S"}
    assert rows[5] == rows[6 + 1000] == {"price": None, "id_": None, "weight": None, "size": None}
    assert table["id"].to_pylist() == [each.number for each in entries]
    assert table["path"].to_pylist() == [each.path for each in entries] and len(entries) == count + 6
    assert str(table.schema.field("vector").type) == "fixed_size_list<element: float>[24]"
    vectors = table["vector"].combine_chunks().flatten().to_numpy().reshape(-1, DIM)
    expected = np.frombuffer(b"".join(each.feature for each in entries), "<f4").reshape(-1, DIM)
    assert vectors == pytest.approx(expected / np.linalg.norm(expected, axis=1, keepdims=True), abs=1e-6)
    assert parquet.ParquetFile(exported).num_row_groups == count / 500 + 1      # a part at a time
    assert [path.name for path in exported.parent.iterdir() if "unfinished" in path.name] == []


def test_a_table_that_fails_leaves_the_earlier_one(large, count, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(image_list, "ROWS_AT_ONCE", 500)
    out = tmp_path / "out.parquet"
    out.write_bytes(b"earlier")
    spoilt = copied(large / "index", tmp_path / "index")
    execute(spoilt, ("UPDATE images SET bytes = 7 WHERE id = ?", (count,)))     # in the last part
    assert run("export", "--index", spoilt) == 2
    assert "with --index and --vectors" in capsys.readouterr().err
    for index, file, said in ((spoilt, out, "is damaged"), (large / "index", tmp_path / "no" / "out", "cannot write"),
                              (tmp_path, out, "is no index")):
        assert run("export", "--index", index, "--vectors", file) == 2
        err = capsys.readouterr().err
        assert said in err and len(err.splitlines()) == 1, err
        assert out.read_bytes() == b"earlier" and list(tmp_path.glob("*unfinished")) == []


def test_qdrant_ranks_as_faiss_does(large, filled, capsys):
    for number, text, where in ((0, "red", ""), (3, "", "price < 700")):
        words = ["--index", large / "index", "--image", large / "images" / f"{number}.jpg", "--text", text, "-k", 300,
                 "--where", where]
        ours, theirs = (asked(capsys, *words, *more)["results"] for more in ([], ["--qdrant", filled]))
        assert [hit["path"] for hit in theirs] == [hit["path"] for hit in ours] and len(ours) == 300
        assert [hit["score"] for hit in theirs] == pytest.approx([hit["score"] for hit in ours], abs=1e-5)


def test_equal_scores_from_qdrant_are_by_id(large, filled, capsys):
    listed = ImageList(large / "index" / "images.sqlite")
    path = large / "images" / "0.jpg"
    found = asked(capsys, "--index", large / "index", "--image", path, "-k", 120, "--qdrant", filled)["results"]
    numbers = {listed.id_of(os.path.relpath(hit["path"], large / "images")): hit["score"] for hit in found}
    same = {number: score for number, score in numbers.items() if 507 <= number < 607}
    assert list(same) == list(range(507, 607)) and len({*same.values()}) == 1


@pytest.fixture
def silent():
    """An address where a service takes questions and answers none."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.mark.parametrize(("where", "collection", "said"), [
    ("{none}", "pictures", "does not answer.*refused"), ("{silent}", "pictures", "does not answer.*timed out"),
    ("{empty}", "pictures", "neither http://HOST:PORT nor a folder"), ("{folder}", "others", "no collection others"),
    ("{folder}", "wide", "vectors of 48 values"), ("{folder}", "named", "vectors of several values"),
    ("{folder}", "far", "compared by Euclid"), ("{folder}", "strange", "another model's"),
    ("{folder}", "silent", "does not say whose"), ("{folder}", "empty", "is empty")])
def test_what_is_no_collection_of_the_index_is_one_line(others, silent, tmp_path, monkeypatch, where, collection, said):
    monkeypatch.setattr(qdrant, "PATIENCE", 1)
    where = where.format(none=f"http://127.0.0.1:{free_ports(1)[0]}", silent=silent, empty=tmp_path, folder=others)
    with pytest.raises(InputError, match=said) as raised:
        qdrant.Qdrant(where, collection, DIM, "our model")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("where", "port"), [("http://127.0.0.1", True), ("https://localhost/qdrant", True),
                                             ("http://127.0.0.1:6399", False), ("https://[::1]", True)])
def test_a_url_without_a_port_is_told_which_was_asked(where, port):
    with pytest.raises(InputError, match="does not answer") as raised:
        qdrant.Qdrant(where, "pictures", DIM, "our model")
    assert ("at port 6333, as the URL names none (behind a proxy it is :443 or :80)" in str(raised.value)) == port


def test_a_collection_of_another_model_is_no_collection_to_search(large, others, capsys):
    assert run("query", "--index", large / "index", "--image", large / "images" / "0.jpg", "--qdrant", others,
               "--collection", "empty") == 2
    err = capsys.readouterr().err
    assert "another model's vectors" in err and len(err.splitlines()) == 1, err


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """A folder of collections that are none of an index's."""
    about = {"model": "our model", "changes": "3"}
    kept = models.VectorParams(size=DIM, distance="Dot")
    wide, far = (models.VectorParams(size=size, distance=kind) for size, kind in ((48, "Dot"), (DIM, "Euclid")))
    folder = tmp_path_factory.mktemp("others")
    client = QdrantClient(path=str(folder))
    for name, vectors, metadata in (("wide", wide, about), ("named", {"a": kept}, about), ("far", far, about),
                                    ("strange", kept, {**about, "model": "no"}), ("silent", kept, None),
                                    ("empty", kept, about)):
        client.create_collection(name, vectors, metadata=metadata)
    client.close()
    return folder


def test_a_collection_older_than_the_index_is_searched_with_a_note(large, filled, tmp_path, caplog, capsys):
    out = copied(large / "index", tmp_path / "index")
    listed = ImageList(out / "images.sqlite")
    listed.remove([1, 2])
    found = asked(capsys, "--index", out, "--image", large / "images" / "0.jpg", "-k", 5, "--qdrant", filled)["results"]
    assert len(found) == 5 and not {hit["path"] for hit in found} & {str(large / "images" / f"{n}.jpg") for n in (0, 1)}
    assert "changed after its ranking was made" in caplog.text and "export and load it again" in caplog.text


@pytest.mark.parametrize(("package", "words"), [
    ("qdrant_client", ["query", "--image", "{image}", "--qdrant", "http://127.0.0.1:1", "--index"]),
    ("pyarrow", ["export", "--vectors", "{out}", "--index"])])
def test_a_package_that_is_missing_is_named_with_the_command(large, tmp_path, monkeypatch, capsys, package, words):
    monkeypatch.setitem(sys.modules, package, None)
    named = {"image": large / "images" / "0.jpg", "out": tmp_path / "out.parquet"}
    assert run(*(word.format(**named) for word in words), large / "index") == 2
    err = capsys.readouterr().err
    assert "pip install -r requirements-export.txt" in err and len(err.splitlines()) == 1


def test_codes_find_nearly_all_in_a_fraction_of_the_memory(tmp_path):
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(60, 16))
    features = (centres[rng.integers(0, 60, 10_000)] + 0.3 * rng.normal(size=(10_000, 16))).astype(np.float32)
    opened = features_index(tmp_path, features, "pq")
    assert read_ranking(tmp_path / "index.faiss", 16).pq.code_size == 2
    assert (tmp_path / "index.faiss").stat().st_size < 10_000 * (2 + 8 + 8)     # code, id, and what all share
    with pytest.raises(InvalidIndex):
        read_ranking(tmp_path / "index.faiss", 32)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    recalls = []
    for query in unit[:40]:
        found = opened.nearest(query, 10)
        places, scores = np.array([number - 1 for number, _ in found]), [score for _, score in found]
        assert scores == pytest.approx(unit[places] @ query, abs=1e-6)
        recalls.append(len({*places} & {*np.argsort(-(unit @ query))[:10]}) / 10)
    assert np.mean(recalls) > 0.9


def test_codes_of_few_images_are_no_codes(tmp_path):
    features = np.random.default_rng(0).normal(size=(200, 16)).astype(np.float32)
    opened = features_index(tmp_path, features, "pq")
    assert type(opened.ranking.made).__name__ == "IndexIVFScalarQuantizer"
    read_ranking(tmp_path / "index.faiss", 16)


def test_the_benchmark_measures_every_kind(tmp_path, capsys):
    assert bench.run(["--ranking_sizes", "0.002", "0.001", "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["images"], row["ranking"]) for row in rows] == [
        (count, kind) for count in (2000, 1000) for kind in ("exact", "ivf", "pq")]
    assert [row["recall@10"] for row in rows[::3]] == [1, 1] and min(row["recall@10"] for row in rows) > 0.3
    assert all(row["file MB"] * 1e6 > 1032 * row["images"] for row in rows)     # so few have no codes
    assert len(capsys.readouterr().out.splitlines()) == 6


# Several processes

def torchrun(trained, images, out, *words):
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "search.py", "index",
         "--model_checkpoint", trained, "--images", images, "--out", out, *words], cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def listing(out):
    return [(each.number, each.path, each.feature) for each in ImageList(out / "images.sqlite").entries("true")]


def test_two_processes_make_the_index_that_one_makes(trained, tmp_path):
    for number in range(17):
        picture(tmp_path / "images" / f"{number}.jpg")
    (tmp_path / "images" / "3.jpg").write_bytes(b"no picture")
    made(trained, tmp_path / "images", tmp_path / "one", batch_size=4)
    job = torchrun(trained, tmp_path / "images", tmp_path / "two", "--batch_size", "4")     # batches: three, and two
    out, err = job.communicate(timeout=300)
    assert job.returncode == 0 and out.count("16 images, 16 of them encoded now, 1 left out (1 broken image)") == 1, err
    assert listing(tmp_path / "two") == listing(tmp_path / "one")
    job = torchrun(trained, tmp_path / "images" / "none", tmp_path / "two")
    out, err = job.communicate(timeout=300)
    assert job.returncode and err.count("search.py: error: --images") == 1 and "is no folder" in err


@pytest.mark.rare("a job of two processes that is killed, and one that goes on")
def test_two_processes_that_are_killed_lose_no_more_than_a_round(trained, tmp_path):
    for number in range(400):
        picture(tmp_path / "images" / f"{number}.jpg")
    made(trained, tmp_path / "images", tmp_path / "one", batch_size=4)
    job = torchrun(trained, tmp_path / "images", tmp_path / "two", "--batch_size", "4")
    while not (tmp_path / "two" / "images.sqlite").exists() or held(tmp_path / "two") < 40:
        assert job.poll() is None, job.communicate()
        time.sleep(0.01)
    os.kill(json.loads((tmp_path / "two" / "run.lock").read_text())["process"], signal.SIGKILL)
    job.communicate(timeout=60)                                                 # and with it the other
    kept = listing(tmp_path / "two")
    assert kept == listing(tmp_path / "one")[:len(kept)] and 40 <= len(kept) < 400 and len(kept) % 4 == 0
    job = torchrun(trained, tmp_path / "images", tmp_path / "two", "--batch_size", "4")
    out, err = job.communicate(timeout=300)
    assert job.returncode == 0 and f"400 images, {400 - len(kept)} of them encoded now" in out, err
    assert listing(tmp_path / "two") == listing(tmp_path / "one")
