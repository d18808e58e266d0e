"""Checkpoints on disk: whole or refused, chosen by what is in them; those of others, read without running anything."""

import io
import os
import pickle
import shutil
import time
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import image_encoders
import main
from datasets import DATASETS
from img_text_composition_models import Recipe
from machine import checksums, distributed, processes, tensor_files
from machine.errors import InputError
from machine.folder_lock import FolderLock
from machine.image_store import ImageStore
from training import checkpoint, loop, resuming

from .conftest import flags, run_main
from .torture_checkpoints import bit_flips, two_savers

TINY = Recipe("tirg", "shufflenet_v2_x0_5", 32, 8, "lstm", 8, {"red": 0, "dress": 1})
PROGRESS = {"best": 0.5, "samples": 3, "steps": 0, "sums": {}, "tested": False}
ENCODER = "shufflenet_v2_x0_5"


@pytest.fixture(scope="module")
def tiny():
    """A model and its optimizer, with momenta."""
    torch.manual_seed(0)
    model = TINY.build()
    optimizer = loop.make_optimizer(model, 0.1, 0)
    for weight in model.parameters():
        optimizer.state[weight]["momentum_buffer"] = torch.full_like(weight, 0.5)
    return model, optimizer


def saved(tiny, folder, comment="", best=False, **progress):
    """A run's folder with a checkpoint of iteration 7, and the checkpoint's path."""
    folder.mkdir(parents=True, exist_ok=True)
    opt = {"comment": comment, "model": "tirg"}
    checkpoint.save(folder, *tiny, 7, opt, {**PROGRESS, **progress}, best)
    return folder / checkpoint.LATEST


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)



def test_a_digest_is_of_the_bytes_however_they_are_divided():
    assert checksums.digest([b"abc", b"", memoryview(b"def")]) == checksums.digest([b"abcdef"])
    assert checksums.digest([b"abcdef"]) != checksums.digest([b"abcdeg"]) and len(checksums.digest([])) == 32


def test_no_flipped_bit_is_believed():
    assert bit_flips(60) == (60, 0)


@pytest.mark.long("many processes")
def test_two_savers_killed_in_one_folder_leave_a_whole_checkpoint():
    assert two_savers(8) == (8, 0)


def test_what_is_saved_is_read_by_torch_alone_and_every_cut_is_refused(tiny, tmp_path):
    path = saved(tiny, tmp_path / "run", best=True)
    assert set(torch.load(path, weights_only=True)) >= {"it", "opt", "model_state_dict", "optimizer_state_dict"}
    assert checkpoint.load(tmp_path / "run" / checkpoint.BEST)["it"] == 7
    content = path.read_bytes()
    for less in [*range(1, 70), len(content) // 2]:
        (tmp_path / "cut.pth").write_bytes(content[:-less])
        with pytest.raises(InputError, match="not a readable checkpoint"):
            checkpoint.load(tmp_path / "cut.pth")


def test_an_older_file_without_checksum_is_read_with_one_note(tiny, tmp_path, caplog):
    path = saved(tiny, tmp_path / "run")
    assert checkpoint.load(path)["it"] == 7 and "checksum" not in caplog.text
    torch.save(torch.load(path, weights_only=True), tmp_path / "old.pth")
    assert [checkpoint.load(tmp_path / "old.pth")["it"] for _ in range(3)] == [7, 7, 7]
    assert caplog.text.count("no checksum") == 1


def test_momenta_that_are_not_finite_are_neither_saved_nor_gone_on_with(tiny, tmp_path):
    model, optimizer = tiny
    path = saved(tiny, tmp_path / "run")
    before, (weight, *_) = path.read_bytes(), model.parameters()
    held = optimizer.state[weight]["momentum_buffer"]
    optimizer.state[weight]["momentum_buffer"] = torch.full_like(held, torch.nan)
    try:
        with pytest.raises(FloatingPointError, match=r"momentum_buffer of weight .* not finite at iteration 7"):
            saved(tiny, tmp_path / "run")
    finally:
        optimizer.state[weight]["momentum_buffer"] = held
    assert path.read_bytes() == before and [file.name for file in path.parent.iterdir()] == [path.name]
    state = checkpoint.load(path)
    state["optimizer_state_dict"]["state"][3]["momentum_buffer"].flatten()[0] = -torch.inf
    with pytest.raises(InputError, match=r"momentum_buffer of weight 3 is not finite.*at any.*--model_checkpoint"):
        checkpoint.resume(state, optimizer, torch.device("cpu"))


def test_a_link_in_place_of_a_checkpoint_is_replaced_not_written_through(tiny, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / checkpoint.LATEST).symlink_to(tmp_path / "notes.txt")
    path = saved(tiny, tmp_path / "run")
    assert (tmp_path / "notes.txt").read_text() == "mine" and not path.is_symlink()


# Which run goes on

def start(log_dir, comment, resume="auto"):
    with FolderLock() as lock:
        return resuming.find_start(resume, "", log_dir, comment, True, lock)


@pytest.mark.long("runs")
def test_the_newest_run_is_told_by_its_turn_when_the_clock_went_back(tiny, tmp_path):
    older = saved(tiny, tmp_path / "a_x", "_x", turn=1)
    newer = saved(tiny, tmp_path / "b_x", "_x", turn=2)
    saved(tiny, tmp_path / "c_x", "_other_x", turn=9)
    os.utime(newer, (10**9, 10**9))
    found = start(tmp_path, "_x")
    assert found.resumed == newer and found.turn == 10
    assert start(tmp_path, "_x", str(older.parent))[::3] == (older, 10)         # named: it goes on, and is newest then
    for path in (older, newer):                                                 # of an older program: the files' times
        saved(tiny, path.parent, "_x")
    os.utime(newer, (10**9, 10**9))
    assert start(tmp_path, "_x").resumed == older and start(tmp_path, "_none").resumed is None


def test_a_damaged_checkpoint_stops_its_own_run_alone(tiny, tmp_path, caplog):
    whole = saved(tiny, tmp_path / "Nov25_10-00-00_host_x", "_x", turn=1)
    other = saved(tiny, tmp_path / "Nov25_11-00-00_host_y_x", "_y_x", turn=2)
    other.write_bytes(other.read_bytes()[:5000])                                # so that it does not tell its comment
    assert start(tmp_path, "_x").resumed == whole and f"left out {other}" in caplog.text
    newest = saved(tiny, tmp_path / "Nov25_12-00-00_host_x", "_x", best=True, turn=3)
    best = newest.with_name(checkpoint.BEST)
    shutil.copyfile(newest, tmp_path / "copy")                                  # they are one file with two names
    os.replace(tmp_path / "copy", newest)
    for damage in (lambda: flip(newest, 100_000), lambda: newest.write_bytes(b"")):
        damage()
        with pytest.raises(InputError, match=f"newest run of this --comment, is damaged.*n 7, with --resume {best}"):
            start(tmp_path, "_x")
    assert start(tmp_path, "_x", str(best)).state["it"] == 7
    saved(tiny, tmp_path / "Nov25_13-00-00_host_x", "_x", turn=4)               # of an older run it matters no more
    assert start(tmp_path, "_x").resumed.parent.name == "Nov25_13-00-00_host_x"


def test_a_restarted_job_looks_only_for_what_it_began_itself(tiny, tmp_path, monkeypatch):
    saved(tiny, tmp_path / "Nov25_10-00-00_host_x", "_x", turn=1)
    monkeypatch.setattr(processes, "rounds", 2)
    monkeypatch.setattr(distributed, "launch", lambda: "another launch")
    assert start(tmp_path, "_x", "").resumed is None
    path = saved(tiny, tmp_path / "Nov25_11-00-00_host_x", "_x", turn=2)
    assert start(tmp_path, "_x", "").resumed == path


# The same data

@pytest.mark.long("several runs")
def test_resume_notices_other_images_and_texts_but_not_other_times(mitstates, tmp_path, capsys, caplog):
    how = {"model": "tirg", "learning_rate": 1e-3, "eval_frequency": 0, "num_iters": 1}
    run = run_main("mitstates", mitstates, tmp_path / "logs", **how)
    wet, bus = mitstates / "images" / "wet dog" / "0.jpg", mitstates / "images" / "old bus" / "0.jpg"
    for path in (wet, bus):
        os.utime(path, (10**9, 10**9))

    def resumed():
        code = main.main(flags("mitstates", mitstates, tmp_path / "logs", resume=run.folder, **how))
        return code, capsys.readouterr().err
    assert resumed() == (0, "")
    content = wet.read_bytes()
    wet.rename(wet.with_name("2.jpg"))
    code, said = resumed()
    assert code == 2 and "had other train images" in said and "--model_checkpoint" in said and said.count("\n") == 1
    wet.with_name("2.jpg").rename(wet)
    wet.write_bytes(content[:-2] + b"\xff\xd9" if content[-2:] != b"\xff\xd9" else content[:-12] + bytes(12))
    assert "had other train images" in resumed()[1]                             # of the same size
    wet.write_bytes(content)
    state = torch.load(run.checkpoint, weights_only=True)
    del state["progress"]["data"], state["progress"]["turn"]
    torch.save(state, run.checkpoint)
    assert resumed()[0] == 0 and "was not checked" in caplog.text


def test_digests_tell_texts_from_images_and_are_quick(fashion_iq, monkeypatch):
    def digests(split="train"):
        data = DATASETS["fashionIQ"](fashion_iq, split)
        return loop.Split(data, ImageStore(data.paths, 32)).digests(0)
    before = digests()
    captions = fashion_iq / "captions" / "cap.shirt.train.json"
    captions.write_text(captions.read_text().replace("is Darker by 2", "is Darker by 3"))
    after = digests()
    assert before["train images"] == after["train images"] and before["train texts"] != after["train texts"]
    entries = captions.read_text().replace('"ST001"', '"swap"').replace('"ST002"', '"ST001"').replace("swap", "ST002")
    captions.write_text(entries)
    assert digests() != after                                                   # the same, otherwise paired
    assert list(digests("test")) == ["test images", "test texts"]
    begun = time.process_time()
    loop.as_bytes([f"women/dresses/casual_dresses/{i}/{i}_0.jpeg" for i in range(172_049)])
    assert time.process_time() - begun < 30


# Files of others

def foreign(tiny):
    """What others save of the same model, by kind."""
    weights = tiny[0].state_dict()
    parallel = {f"module.{name}": value for name, value in weights.items()}
    return {"state_dict": {"state_dict": weights, "epoch": np.int64(3), "lr": np.float32(0.5)},
            "module": {"model_state_dict": parallel, "it": np.int64(7), "opt": {"rate": np.float64(0.1)}},
            "compiled": {"model": {f"_orig_mod.{name}": value for name, value in parallel.items()}},
            "bare": weights, "bare module": parallel}


def test_weights_are_found_under_the_names_that_others_give_them(tiny, tmp_path):
    for kind, content in foreign(tiny).items():
        torch.save(content, tmp_path / kind)
        state = checkpoint.load(tmp_path / kind)
        checkpoint.restore(TINY.build(), state, kind)
        assert all(torch.equal(value, state["model_state_dict"][name]) for name, value in tiny[0].state_dict().items())
    state = checkpoint.load(tmp_path / "module")
    assert state["it"] == 7 and type(state["it"]) is int and state["opt"]["rate"] == 0.1


@pytest.mark.parametrize("kind", ["plain", "state_dict", "module", "safetensors"])
def test_encoder_weights_are_read_from_any_customary_file(kind, tmp_path):
    torch.manual_seed(1)
    theirs = image_encoders.image_encoder(ENCODER, 8, 32).state_dict()
    file = tmp_path / f"weights.{kind}"
    parallel = {"state_dict": {f"module.{name}": value for name, value in theirs.items()}, "best": np.float64(69.5)}
    if kind == "safetensors":
        save_file(theirs, file)
    else:
        torch.save({"plain": theirs, "state_dict": {"state_dict": theirs}, "module": parallel}[kind], file)
    ours = image_encoders.image_encoder(ENCODER, 8, 32)
    image_encoders.load_image_weights(ours, str(file), ENCODER)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.state_dict().items() if "fc." not in name)


class Trap:
    def __reduce__(self):
        return os.system, ("touch ran",)


def test_a_refused_file_says_what_it_is_in_words_of_ours(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    objects, scripted = io.BytesIO(), io.BytesIO()
    torch.save({"model_state_dict": {"a": torch.ones(1)}, "opt": Trap()}, objects)
    with warnings.catch_warnings(action="ignore"):
        torch.jit.save(torch.jit.trace(torch.nn.Linear(1, 1), torch.ones(1, 1)), scripted)
    view = io.BytesIO()
    torch.save({"model_state_dict": {"a": torch.ones(1).expand(10**9)}}, view)
    array = io.BytesIO()
    torch.save({"model_state_dict": {"a": torch.ones(1)}, "opt": {"b": np.ones(3)}}, array)
    for content, said in ((b"", "it is empty"), (b"<!DOCTYPE html>", "a web page"), (b"\x89HDF\r\n", "HDF5"),
                          (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"), (b"hello", "torch.save"),
                          (pickle.dumps({"a": Trap()}), "Python object"), (objects.getvalue(), "system, which could"),
                          (scripted.getvalue(), "TorchScript"), (view.getvalue(), "no model_state_dict"),
                          (array.getvalue(), "numpy"), ((5).to_bytes(8, "little") + b'{"a":', "safetensors")):
        (tmp_path / "x.pth").write_bytes(content)
        with pytest.raises(InputError, match=said) as error:
            checkpoint.load(tmp_path / "x.pth")
        assert not any(word in str(error.value) for word in ("\x1b", "\n", "weights_only", "pytorch.org", "allowlist"))
        with pytest.raises(InputError) as error:
            image_encoders.load_image_weights(image_encoders.image_encoder(ENCODER, 8, 32), "x.pth", ENCODER)
        assert "weights_only" not in str(error.value) and "--image_weights" in str(error.value)
    os.mkfifo(tmp_path / "pipe")
    for path, said in ((tmp_path / "pipe", "no plain file"), (tmp_path, "a folder")):
        with pytest.raises(InputError, match=said):
            checkpoint.load(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("value", [np.float64(0.1), np.float32(-2.5), np.int64(-7), np.uint8(200), np.float16(0.5)])
def test_numbers_of_numpy_are_read_as_plain_ones(value, tmp_path):
    torch.save({"value": value}, tmp_path / "x")
    read = tensor_files.read(tmp_path / "x")["value"]
    assert read == value.item() and type(read) is type(value.item())
