"""Galleries that grow: their vectors elsewhere, codes in place of vectors, an index made by several processes."""

import json
import re
import sqlite3
import sys
import textwrap

import numpy as np
import pytest
from pyarrow import parquet
from qdrant_client import QdrantClient, models

import search
from machine.errors import InputError
from searching.gallery import Gallery
from searching.image_list import ImageList
from searching.ranking import rank, read_ranking, unit

from .conftest import picture
from .index_faults import copied, write_model
from .services import ROOT, free_ports
from .test_search import CPU, asked, features_index, made, quiet, run

DIM = 24


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("growing") / "model.pth")


@pytest.fixture(scope="module")
def large(trained, tmp_path_factory):
    """Pictures' folder, and an index of six of them and of 10,000 more images, of which there are features alone: near
    the pictures', and a hundred of them the same one."""
    root = tmp_path_factory.mktemp("large")
    for number in range(6):
        picture(root / "images" / f"{number}.jpg")
    made(trained, root / "images", root / "index")
    listed = ImageList(root / "index" / "images.sqlite")
    (_, features), = listed.all_features()
    rng = np.random.default_rng(0)
    features = features[rng.integers(0, 6, 10_000)] * rng.normal(1, 0.2, (10_000, DIM)).astype(np.float32)
    features[500:600] = features[500]
    listed.add([(f"made up/{number}.jpg", (1, 1)) for number in range(10_000)], features)
    rank(listed, root / "index", DIM, "exact", quiet)
    return root


@pytest.fixture(scope="module")
def exported(large):
    assert run("export", "--index", large / "index", "--vectors", large / "vectors.parquet") == 0
    return large / "vectors.parquet"


@pytest.fixture(scope="module")
def qdrant(exported):
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


def test_a_table_holds_every_image_with_its_unit_vector(large, exported):
    table = parquet.read_table(exported)
    listed = ImageList(large / "index" / "images.sqlite")
    entries = listed.entries("true")
    assert table.column_names == ["id", "path", "vector"] and table["id"].to_pylist() == [each.number for each in entries]
    assert table["path"].to_pylist() == [each.path for each in entries] and len(entries) == 10_006
    assert str(table.schema.field("vector").type) == "fixed_size_list<element: float>[24]"
    vectors = table["vector"].combine_chunks().flatten().to_numpy().reshape(-1, DIM)
    expected = np.frombuffer(b"".join(each.feature for each in entries), "<f4").reshape(-1, DIM)
    assert vectors == pytest.approx(expected / np.linalg.norm(expected, axis=1, keepdims=True), abs=1e-6)
    assert parquet.ParquetFile(exported).num_row_groups == 2                    # some thousand at a time
    assert [path.name for path in exported.parent.iterdir() if "unfinished" in path.name] == []


def test_a_table_that_fails_leaves_the_earlier_one(large, exported, tmp_path, capsys):
    out = tmp_path / "out.parquet"
    out.write_bytes(b"earlier")
    spoilt = copied(large / "index", tmp_path / "index")
    content = bytearray((spoilt / "images.sqlite").read_bytes())
    content[-2000] ^= 1                                                         # of the last thousand rows
    (spoilt / "images.sqlite").write_bytes(content)
    for index, file, said in ((spoilt, out, "is damaged"), (large / "index", tmp_path / "no" / "out", "cannot write"),
                              (tmp_path, out, "is no index")):
        assert run("export", "--index", index, "--vectors", file) == 2
        err = capsys.readouterr().err
        assert said in err and len(err.splitlines()) == 1, err
        assert out.read_bytes() == b"earlier" and list(tmp_path.glob("*unfinished")) == []


def test_qdrant_ranks_as_faiss_does(large, qdrant, capsys):
    for number, text in ((0, "red"), (1, ""), (2, "red")):
        words = ["--index", large / "index", "--image", large / "images" / f"{number}.jpg", "--text", text, "-k", 300]
        ours = asked(capsys, *words)["results"]
        theirs = asked(capsys, *words, "--qdrant", qdrant)["results"]
        assert [hit["path"] for hit in theirs] == [hit["path"] for hit in ours] and len(ours) == 300
        assert [hit["score"] for hit in theirs] == pytest.approx([hit["score"] for hit in ours], abs=1e-5)
    same = [int(re.search(r"up/(\d+)", hit["path"])[1]) for hit in ours if 500 <= int("0" + "".join(re.findall(
        r"up/(\d+)", hit["path"]))) < 600]
    assert same == sorted(same)
