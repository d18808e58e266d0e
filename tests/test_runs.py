"""runs/: the published commands as the README has them, and the comparison's table."""

import re
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import main
from datasets import Fashion200k, MITStates

from .conftest import Run, flags, write_fashion200k, write_mitstates

ROOT = Path(main.__file__).parent
PUBLISHED = ("mitstates-tirg", "mitstates-tirg-bert", "mitstates-tirg-complete", "fashion200k-composeae",
             "fashioniq-concat")


def asked_for(script, *more, folder):
    """The command that a script ends in, by a python that only says what it was told."""
    (fake := folder / "python").write_text('#!/bin/sh\n[ "$1" = -c ] && exec echo minilm\n'
                                           'for word; do printf "%s\\0" "$word"; done\n')
    fake.chmod(0o755)
    done = subprocess.run([ROOT / "runs" / script, *more], capture_output=True, check=True, cwd="/",
                          env={"PATH": "/usr/bin:/bin", "PYTHON": str(fake)})
    return done.stdout.decode().split("\0")[:-1]


def test_the_published_runs_are_the_readmes_commands(tmp_path):
    commands = re.findall(r"^python (-W ignore main\.py .*)$", (ROOT / "README.md").read_text(), re.M)
    assert len(commands) == len(PUBLISHED)
    found = [asked_for(f"{name}.sh", folder=tmp_path) for name in PUBLISHED]
    assert found == [shlex.split(command) for command in commands]
    assert asked_for(f"{PUBLISHED[0]}.sh", "--seed", "1 2", folder=tmp_path)[-2:] == ["--seed", "1 2"]


def test_other_runs_are_flags_that_main_takes(tmp_path):
    program, *words = asked_for("laptop.sh", "fashionIQ", "a folder", "--seed=3", folder=tmp_path)
    assert Path(program).resolve() == ROOT / "main.py"
    args = main.get_parser().parse_args(words)
    assert (args.dataset, str(args.dataset_path), args.seed, args.freeze_image_encoder) == (
        "fashionIQ", "a folder", 3, True)


def without_words(*words):
    return subprocess.run([sys.executable, ROOT / "runs/without_words.py", *map(str, words)], capture_output=True,
                          text=True)


def test_a_data_set_without_words_asks_for_them_and_learns_none_of_them(tmp_path):
    tree, fashion = write_mitstates(tmp_path / "tree"), write_fashion200k(tmp_path / "fashion")
    shutil.copytree(tree / "images" / "wet bus", tree / "images" / "young bus")
    done = without_words(f"mitstates:{tree}", tmp_path / "out", "old")
    assert done.returncode == 0, done.stderr
    (train, test), (_, whole) = ([MITStates(path, split) for split in ("train", "test")]
                                 for path in (tmp_path / "out", tree))
    assert test.captions == whole.captions and any(caption.startswith("old ") for caption in test.captions)
    assert not any("old" in caption.split() for caption in train.captions) and train.captions
    before = Fashion200k(fashion, "train").captions
    word = "jacket"
    assert without_words(f"fashion200k:{fashion}", tmp_path / "less", word).returncode == 0
    after = Fashion200k(tmp_path / "less", "train").captions
    assert after == [caption for caption in before if word not in caption.split()] and len(after) < len(before)
    again = without_words(f"mitstates:{tree}", tmp_path / "out", "old")
    assert again.returncode == 2 and again.stderr.count("\n") == 1
    assert without_words("cirr:x", tmp_path / "x", "old").returncode == 2


def compare(*words):
    return subprocess.run([sys.executable, ROOT / "runs/compare.py", *map(str, words)], capture_output=True, text=True)


@pytest.mark.long("four runs, each a process")
def test_a_comparison_is_means_and_deviations_of_its_runs_and_goes_on_where_it_was(tmp_path):
    tree, out = write_mitstates(tmp_path / "tree"), tmp_path / "out"
    given = flags("mitstates", tree, "x", num_iters=3, log_frequency=1)
    more = [word for word in given if not word.startswith(("--dataset", "--log_dir", "--model="))]
    words = ["--on", f"mitstates:{tree}", "--models", "tirg", "composeAE", "--seeds", 0, 1, "--out", out, "--", *more]
    table = compare(*words)
    assert table.returncode == 0, table.stderr
    runs = {(model, seed): Run(next(out.glob(f"tree_{model}_{seed}_*/*/metrics.json")).parent)
            for model in ("tirg", "composeAE") for seed in (0, 1)}
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.stdout.splitlines()]
    assert rows[0] == ["data", "composer", "R@1", "R@5", "R@10", "R@50", "ms", "weights"]
    for row, model in zip(rows[2:], ("tirg", "composeAE"), strict=True):
        found = [100 * runs[model, seed].metrics["test"]["recall_top5_correct_composition"] for seed in (0, 1)]
        assert row[:2] == ["tree test", model]
        assert row[3] == f"{statistics.mean(found):.1f} ± {statistics.stdev(found):.1f}"
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*")}
    assert compare(*words).stdout == table.stdout
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*")} == before


@pytest.mark.long("two processes that load torch")
def test_a_comparison_that_fails_is_one_line(tmp_path):
    failed = compare("--on", f"mitstates:{tmp_path / 'nowhere'}", "--models", "tirg", "--out", tmp_path)
    assert failed.returncode == 2 and failed.stderr.count("error") == 2 and "Traceback" not in failed.stderr


def test_a_frozen_comparison_takes_further_flags_after_its_own(tmp_path):
    (program, *words), (_, *plain) = (asked_for("frozen.sh", "mitstates:a b", *more, folder=tmp_path)
                                      for more in (["--seeds", "4", "--", "--num_iters", "7"], []))
    assert Path(program).name == "compare.py" and words[:5] == ["--on", "mitstates:a b", "--seeds", "4", "--"]
    assert words[-2:] == ["--num_iters", "7"] and words[5:-2] == plain[3:]
    args = main.get_parser().parse_args(["--dataset=mitstates", "--dataset_path=x", *words[5:]])
    assert (args.num_iters, args.learning_rate, args.freeze_image_encoder) == (7, 0.03, True)
