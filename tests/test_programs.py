"""The programs beside main.py: toy data, benchmark, drawings."""

import filecmp
import json
import subprocess
import sys
from pathlib import Path

import pytest

import main
from datasets import DATASETS, MITSTATES_TEST_NOUNS, Epoch
from machine.image_store import ImageStore

from .conftest import WRITERS, flags

ROOT = Path(main.__file__).parent


def program(name, *words, **how):
    words = [sys.executable, str(ROOT / name), *map(str, words)]
    return subprocess.run(words, capture_output=True, text=True, check=False, **how)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "new" / "folder"
    done = program("data/make_toy.py", folder)
    assert done.returncode == 0, done.stderr
    return folder


def differing(comparison):
    return comparison.diff_files + comparison.left_only + comparison.right_only + [
        name for inner in comparison.subdirs.values() for name in differing(inner)]


@pytest.mark.long("a process")
def test_toy_data_are_the_same_bytes_each_time(toy, tmp_path):
    assert program("data/make_toy.py", tmp_path / "again", env={"PYTHONHASHSEED": "7"}).returncode == 0
    comparison = filecmp.dircmp(toy, tmp_path / "again")
    assert sorted(comparison.common_dirs) == ["fashion200k", "fashionIQ", "mitstates"] and differing(comparison) == []


@pytest.mark.long("draws all toy pictures")
def test_toy_data_hold_what_the_benchmarks_need(toy):
    for name in WRITERS:
        train, test = (DATASETS[name](toy / name, split) for split in ("train", "test"))
        assert len(Epoch(train, 0, 0)) >= 300 and min(len(part.texts) for part in test.task().query_sets) >= 50
        for part in (train, test):
            assert ImageStore(part.paths, 32).unreadable() == {}
    nouns = {caption.split()[1] for caption in DATASETS["mitstates"](toy / "mitstates", "test").captions}
    assert nouns <= MITSTATES_TEST_NOUNS and len(nouns) == 8
    marks = " ".join(DATASETS["fashion200k"](toy / "fashion200k", "train").captions)
    assert all(mark in marks for mark in ("andmark", "dotmark", "questionmark", "starmark"))


def test_toy_data_never_replace_a_folder_of_the_users(toy, tmp_path):
    mine = tmp_path / "mitstates" / "thesis.txt"
    mine.parent.mkdir()
    mine.write_text("irreplaceable")
    for words in ([tmp_path], [tmp_path, "--force"]):
        done = program("data/make_toy.py", *words)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and mine.read_text() == "irreplaceable"


@pytest.mark.rare("every measurement once")
def test_benchmark_runs_and_writes_its_rows(tmp_path):
    done = program("bench.py", "--quick", "--json", tmp_path / "rows.json")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert all(set(row) == {"what", "ours", "floor", "ratio", "goal", "met", "unit"} for row in rows)
    assert all(row["ratio"] == pytest.approx(row["ours"] / row["floor"]) for row in rows)
    assert all(row["met"] == (row["ratio"] <= row["goal"]) for row in rows)
    whats = "\n".join(row["what"] for row in rows)
    for part in ("fp32, composeAE", "bf16, tirg", "full test", "FashionIQ size", "memory",
                 "filling the image store", "first batch", "through the client", "from the host", "schedule"):
        assert part in whats


@pytest.mark.rare("minutes of processes")
@pytest.mark.avx
def test_benchmark_beside_another_version(tmp_path):
    """The same one: only that all of it runs."""
    done = program("bench.py", "--quick", "--beside", ROOT, "--json", tmp_path / "rows.json")
    assert done.returncode == 0, done.stderr
    whats = "\n".join(row["what"] for row in json.loads((tmp_path / "rows.json").read_text()))
    for part in ("lite0", "vit_small", "MiniLM", "search.py index", "search.py query on", "first answer", "memory",
                 "200 images", "TIRG", "composeAE", "main.py"):
        assert part in whats


@pytest.mark.long("three processes")
def test_benchmark_says_in_one_line_what_it_cannot_do(tmp_path):
    for words, said in ((["--device", "cuda"], "no usable CUDA GPU"),
                        (["--json", tmp_path / "none" / "rows.json"], "there is no folder"),
                        (["--beside", tmp_path], "there is no version of this program")):
        done = program("bench.py", *words)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.long("a run and a process")
def test_pictures_are_drawn_from_a_run(toy, tmp_path, monkeypatch):
    log_dir = tmp_path / "logs"
    assert main.main(flags("mitstates", toy / "mitstates", log_dir, num_iters=1)) == 0
    (run,) = log_dir.iterdir()
    done = program("static/draw.py", "--model_checkpoint", run / "latest_checkpoint.pth", "--dataset_path",
                   toy / "mitstates", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "sample.png").stat().st_size > 10_000 and (tmp_path / "model_en.png").stat().st_size > 10_000
