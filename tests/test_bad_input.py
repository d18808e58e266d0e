"""What a user can get wrong, sorted: each ends in one line that names it and says what to do, and exit code 2."""

import argparse
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import main

from .conftest import WRITERS, flags, run_main

ROOT = Path(main.__file__).parent


def append(file, text):
    with open(file, "a") as out:
        out.write(text)


def remove_tree(path):
    for child in path.iterdir():
        remove_tree(child) if child.is_dir() else child.unlink()
    path.rmdir()


def edit_json(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def single_state(path):
    remove_tree(path / "images" / "wet bus")


def only_test_images(path):
    for folder in (path / "images").iterdir():
        if "tomato" not in folder.name and "fig" not in folder.name:
            remove_tree(folder)


LABELS, CAPTIONS = "labels/dress_train_detect_all.txt", "captions/cap.shirt.train.json"

# (dataset, what happens to its tree, changed flags, words the line must hold)
CASES = {
    "broken image": ("mitstates", lambda p: (p / "images/old dog/0.jpg").write_bytes(b"\xff\xd8no"), {},
                     ["old dog/0.jpg", "--skip_bad_images"]),
    "broken test image": ("fashion200k", lambda p: (p / "women/test/0/0_0.jpeg").write_bytes(b"GIF89a"), {},
                          ["0_0.jpeg", "--skip_bad_images"]),
    "empty image": ("mitstates", lambda p: (p / "images/old fig/0.jpg").parent.mkdir() or
                    (p / "images/old fig/0.jpg").write_bytes(b""), {}, ["old fig/0.jpg", "--skip_bad_images"]),
    "missing image": ("fashion200k", lambda p: (p / "women/train/0/0_1.jpeg").unlink(), {},
                      ["0_1.jpeg", "--skip_bad_images"]),
    "missing FashionIQ image": ("fashionIQ", lambda p: (p / "all_imgs/SV001.jpg").unlink(), {},
                                ["SV001.jpg", "--skip_bad_images"]),
    "missing dataset folder": ("mitstates", remove_tree, {}, ["mitstates", "not found", "--dataset_path"]),
    "dataset is a file": ("mitstates", lambda p: remove_tree(p) or p.write_text("x"), {}, ["mitstates"]),
    "missing image folder": ("mitstates", lambda p: remove_tree(p / "images"), {}, ["images", "not found"]),
    "no FashionIQ image folder": ("fashionIQ", lambda p: (p / "all_imgs").rename(p / "pictures"), {}, ["all_imgs, images"]),
    "empty dataset folder": ("fashionIQ", lambda p: remove_tree(p) or p.mkdir(), {}, ["not found", "data/README.md"]),
    "empty image folder": ("mitstates", lambda p: remove_tree(p / "images") or (p / "images").mkdir(), {},
                           ["images", "data/README.md"]),
    "empty state folder": ("mitstates", lambda p: (p / "images/new dog").mkdir(), {}, ["new dog", "no .jpg"]),
    "no train noun": ("mitstates", only_test_images, {}, ["train split"]),
    "noun with one adjective": ("mitstates", single_state, {}, ["'bus'", "one adjective"]),
    "missing label folder": ("fashion200k", lambda p: remove_tree(p / "labels"), {}, ["labels", "not found"]),
    "missing label file": ("fashion200k", lambda p: (p / LABELS).unlink(), {}, ["*train*.txt"]),
    "empty label file": ("fashion200k", lambda p: (p / LABELS).write_text("\n\n"), {}, ["no usable image"]),
    "label line without tabs": ("fashion200k", lambda p: append(p / LABELS, "women/a.jpg 0.9 red dress\n"), {},
                                [LABELS, "line 11"]),
    "label line without caption": ("fashion200k", lambda p: append(p / LABELS, "women/a.jpg\t0.9\t \n"), {}, ["line 11"]),
    "label line of 10 MB": ("fashion200k", lambda p: append(p / LABELS, "women/a.jpg\t1\t" + "red " * 2_500_000), {},
                            ["line 11", "10000014 bytes"]),
    "label line of another encoding": ("fashion200k", lambda p: (p / LABELS).write_bytes(b"a\t1\tcaf\xe9\n"), {},
                                       ["line 1", "UTF-8"]),
    "label path outside": ("fashion200k", lambda p: append(p / LABELS, "../../etc/passwd\t1\tred hat\n"), {},
                           ["line 11", "etc/passwd", "inside the dataset folder"]),
    "absolute label path": ("fashion200k", lambda p: append(p / LABELS, "/etc/passwd\t1\tred hat\n"), {}, ["line 11"]),
    "NUL in a label path": ("fashion200k", lambda p: append(p / LABELS, "a\0b\t1\tred hat\n"), {}, ["line 11"]),
    "no siblings": ("fashion200k", lambda p: (p / LABELS).write_text("women/train/0/0_0.jpeg\t1\tred dress\n"), {},
                    ["differ by one word"]),
    "missing query file": ("fashion200k", lambda p: (p / "test_queries.txt").unlink(), {}, ["test_queries.txt"]),
    "empty query file": ("fashion200k", lambda p: (p / "test_queries.txt").write_text(""), {}, ["no test query"]),
    "query line of three words": ("fashion200k", lambda p: append(p / "test_queries.txt", "a b c\n"), {},
                                  ["test_queries.txt", "line 3"]),
    "query of an unknown image": ("fashion200k", lambda p: append(p / "test_queries.txt",
                                  "women/test/0/0_0.jpeg nowhere.jpg\n"), {}, ["line 3", "nowhere.jpg"]),
    "missing captions": ("fashionIQ", lambda p: (p / CAPTIONS).unlink(), {}, ["cap.shirt.train.json", "not found"]),
    "missing split": ("fashionIQ", lambda p: (p / "image_splits/split.dress.val.json").unlink(), {}, ["split.dress.val"]),
    "invalid JSON": ("fashionIQ", lambda p: (p / CAPTIONS).write_text('[{"target": '), {}, ["shirt", "not valid JSON"]),
    "JSON of another encoding": ("fashionIQ", lambda p: (p / CAPTIONS).write_bytes(b'["\xe9"]'), {}, ["not valid JSON"]),
    "JSON nested without end": ("fashionIQ", lambda p: (p / CAPTIONS).write_text("[" * 100_000), {}, ["not valid JSON"]),
    "JSON of another shape": ("fashionIQ", lambda p: (p / CAPTIONS).write_text('{"a": 1}'), {}, ["entry 1"]),
    "split of another shape": ("fashionIQ", lambda p: (p / "image_splits/split.dress.train.json").write_text("[1, 2]"), {},
                               ["split.dress.train.json", "list of image ids"]),
    "annotation without target": ("fashionIQ", lambda p: edit_json(p / CAPTIONS, lambda c: c[1].pop("target")), {},
                                  ["cap.shirt.train.json", "entry 2"]),
    "annotation with numbers": ("fashionIQ", lambda p: edit_json(p / CAPTIONS, lambda c: c[0].update(captions=[1])), {},
                                ["entry 1"]),
    "annotation of an unknown image": ("fashionIQ", lambda p: edit_json(p / CAPTIONS, lambda c: c[2].update(target="X")),
                                       {}, ["entry 3", "'X'"]),
    "split with a path": ("fashionIQ", lambda p: edit_json(p / "image_splits/split.dress.val.json",
                          lambda c: c.append("../../x")), {}, ["split.dress.val.json", "../../x"]),
    "split with half a character": ("fashionIQ", lambda p: edit_json(p / "image_splits/split.dress.val.json",
                                    lambda c: c.append("\ud800")), {}, ["split.dress.val.json", r"'\ud800'"]),
    "batch larger than the data": ("mitstates", None, {"batch_size": 64}, ["--batch_size 64", "10 training samples"]),
    "batch of one": ("mitstates", None, {"batch_size": 1}, ["--batch_size", "at least 2"]),
    "unknown model": ("mitstates", None, {"model": "vit"}, ["--model", "composeAE"]),
    "unknown loss": ("mitstates", None, {"loss": "l2"}, ["--loss", "soft_triplet"]),
    "unknown dataset": ("mitstates", None, {"dataset": "coco"}, ["--dataset", "fashionIQ"]),
    "unknown category": ("fashionIQ", None, {"category_to_train": "hat"}, ["--category_to_train", "toptee"]),
    "unknown flag": ("mitstates", None, {"speed": 9}, ["--speed"]),
    "no dataset": ("mitstates", None, {"dataset": None}, ["--dataset"]),
    "number that is none": ("mitstates", None, {"num_iters": "many"}, ["--num_iters", "'many'"]),
    "negative number": ("mitstates", None, {"num_iters": -3}, ["--num_iters", "at least 1"]),
    "NaN rate": ("mitstates", None, {"learning_rate": "nan"}, ["--learning_rate"]),
    "boolean that is none": ("mitstates", None, {"use_bert": "maybe"}, ["--use_bert", "True or False"]),
    "no image weights there": ("mitstates", None, {"image_weights": "nowhere.pth"}, ["nowhere.pth", "--image_weights none"]),
    "no checkpoint there": ("mitstates", None, {"model_checkpoint": "nowhere.pth", "test_only": True},
                            ["nowhere.pth", "--model_checkpoint"]),
    "test without checkpoint": ("mitstates", None, {"test_only": True}, ["--model_checkpoint"]),
    "no GPU": ("mitstates", None, {"device": "cuda"}, ["--device cuda", "no usable CUDA GPU"]),
    "no device": ("mitstates", None, {"device": "gpu"}, ["--device", "'gpu'"]),
    "resume in a test": ("mitstates", None, {"test_only": True, "model_checkpoint": "x", "resume": "auto"}, ["--resume"]),
    "no sentence service": ("mitstates", None, {"use_bert": True, "bert_port": 1, "bert_port_out": 2, "bert_timeout": 0.5},
                            ["no sentence service at localhost:1"]),
    "port out of range": ("mitstates", None, {"use_bert": True, "bert_port": 70000}, ["--bert_port", "65535"]),
    "no host name": ("mitstates", None, {"use_bert": True, "bert_ip": "bad!host"}, ["bad!host", "--bert_ip"]),
    "enormous seed": ("mitstates", None, {"seed": "9" * 400}, ["--seed"]),
    "comment with a slash": ("mitstates", None, {"comment": "a/b"}, ["--comment", "'a/b'"]),
    "missing image in another folder": ("fashionIQ", lambda p: (p / "all_imgs/SV001.jpg").unlink() or
                                        (p / "all_imgs").rename(p / "img"), {}, ["img/SV001.jpg"]),
    "diverging training": ("mitstates", None, {"learning_rate": 1e18, "num_iters": 20}, ["not finite", "--learning_rate"]),
}


@pytest.mark.parametrize("case", CASES)
def test_one_line_and_exit_code_2(case, tmp_path, capsys):
    dataset, damage, changes, words = CASES[case]
    path = WRITERS[dataset](tmp_path / dataset)
    if damage:
        damage(path)
    try:
        code = main.main(flags(dataset, path, tmp_path / "logs", **changes))
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    errors = [line for line in captured.err.replace("\r", "\n").splitlines() if "error:" in line]
    assert code == 2 and "Traceback" not in captured.err
    assert len(errors) == 1 and captured.err.rstrip().endswith(errors[0]), captured.err
    assert all(word in errors[0] for word in words), errors[0]


def checkpoint_cases(tmp_path, trained):
    state = torch.load(trained.checkpoint, weights_only=True)
    renamed = {**state, "model_state_dict": {f"x.{k}": v for k, v in state["model_state_dict"].items()}}
    files = {"text": b"hello", "empty": b"", "cut": trained.checkpoint.read_bytes()[:5000],
             "pickle": pickle.dumps({"model_state_dict": {}, "run": print})}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    torch.save([1, 2], tmp_path / "list")
    for name, wrong in (("number", {"model_state_dict": 3}), ("opt", {"opt": 5}), ("words", {"word2id": {"a": 7}}),
                        ("it", {"it": "many"}), ("weights", {"model_state_dict": {"a": 1}})):
        torch.save({**state, **wrong}, tmp_path / name)
    torch.save(renamed, tmp_path / "renamed")
    return [*files, "list", "number", "opt", "words", "it", "weights", "renamed"]


def test_checkpoints_that_are_none_or_of_another_model(mitstates, tmp_path, capsys):
    trained = run_main("mitstates", mitstates, tmp_path / "logs", model="tirg")
    for name in checkpoint_cases(tmp_path, trained):
        capsys.readouterr()
        assert main.main(flags("mitstates", mitstates, tmp_path / "logs", model="tirg", test_only=True,
                               model_checkpoint=tmp_path / name)) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and str(tmp_path / name) in error, (name, error)
    for changes in ({"model": "composeAE"}, {"model": "tirg", "image_embed_dim": 12}):
        assert main.main(flags("mitstates", mitstates, tmp_path / "logs", test_only=True,
                               **{"model_checkpoint": trained.checkpoint, **changes})) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "--model tirg" in error and "does not fit" in error


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil-ran",)


@pytest.mark.parametrize("legacy", [True, False])
def test_a_checkpoint_never_runs_code(mitstates, tmp_path, monkeypatch, capsys, legacy):
    monkeypatch.chdir(tmp_path)
    torch.save({"model_state_dict": {"a": torch.ones(1)}, "opt": argparse.Namespace(x=Evil())}, tmp_path / "evil.pth",
               _use_new_zipfile_serialization=not legacy)
    assert main.main(flags("mitstates", mitstates, tmp_path / "logs", test_only=True, model_checkpoint="evil.pth")) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "evil-ran").exists()


def test_a_log_folder_that_cannot_be_written(mitstates, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main.main(flags("mitstates", mitstates, tmp_path / "file" / "logs")) == 2
    error = capsys.readouterr().err
    assert "log folder" in error and "--log_dir" in error and "Traceback" not in error


def test_bad_images_are_left_out_and_counted(benchmark_tree, tmp_path, capsys):
    name, path = benchmark_tree
    damaged = {"mitstates": ["images/old dog/0.jpg", "images/ripe fig/1.jpg"],
               "fashion200k": ["women/train/0/0_0.jpeg", "women/test/0/0_0.jpeg"],
               "fashionIQ": ["all_imgs/ST000.jpg", "all_imgs/DV001.jpg"]}[name]
    (path / damaged[0]).write_bytes((path / damaged[0]).read_bytes()[:-300])
    (path / damaged[1]).unlink() if name != "mitstates" else (path / damaged[1]).write_bytes(b"")
    run = run_main(name, path, tmp_path / "logs", skip_bad_images=True)
    shown = capsys.readouterr().out
    assert "train split: left out 1 images" in shown and "test split: left out 1 images" in shown
    assert ("1 queries" in shown) == (name == "fashion200k") and ("triplets" in shown) == (name == "fashionIQ")
    assert run.metrics["it"] == 3


@pytest.mark.long("two runs")
def test_skipping_changes_nothing_where_all_is_well(mitstates, tmp_path, capsys):
    plain, skipping = (run_main("mitstates", mitstates, tmp_path / "logs", comment=f"_{skip}", skip_bad_images=skip)
                       for skip in (False, True))
    assert plain.metrics == skipping.metrics and "left out nothing" in capsys.readouterr().out


@pytest.mark.long("processes")
def test_no_traceback_from_the_command_line(tmp_path):
    done = subprocess.run([sys.executable, "main.py", "--dataset=mitstates", "--dataset_path=nowhere"], cwd=ROOT,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1


@pytest.mark.parametrize("seed", range(5))
def test_fuzzed_label_lines_never_give_a_traceback(fashion200k, tmp_path, capsys, seed):
    rng = np.random.default_rng(seed)
    for file in (LABELS, "test_queries.txt"):
        content = bytearray((fashion200k / file).read_bytes())
        for place in rng.integers(0, len(content), 12):
            content[place] = rng.integers(256)
        (fashion200k / file).write_bytes(bytes(content))
    assert main.main(flags("fashion200k", fashion200k, tmp_path / "logs", num_iters=1)) in (0, 2)
    assert "Traceback" not in capsys.readouterr().err
