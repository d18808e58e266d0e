"""Networks by an engine: the same numbers as torch's, given back to torch where not, and no mix of their features."""

import logging
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import main
from img_text_composition_models import OF_TRIPLETS, Part, Recipe
from machine import engine
from machine.errors import InputError
from searching import from_checkpoint
from searching.gallery import load_model
from training.data import Backbone
from training.settings import engine_of, filled

from .conftest import flags, picture, run_main
from .index_faults import write_model
from .services import ROOT

NEEDED = "--dataset=mitstates", "--dataset_path=x"


def pixels(rows, size=64):
    return torch.randint(256, (rows, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(rows))


def model_of(composer="tirg", encoder="mobilenet_v3_small", size=64, words=9):
    torch.manual_seed(0)
    return Recipe(composer, encoder, size, 12, "lstm", 8, {f"word{i}": i for i in range(words)}).build().eval()


@pytest.mark.parametrize(("encoder", "size"), [("mobilenet_v3_small", 64), ("timm:test_vit", 160)])
@pytest.mark.avx
def test_an_encoder_gives_what_torch_gives_for_any_number_of_rows(encoder, size):
    model = model_of(encoder=encoder, size=size)
    network = engine.made(Part(model, "before_last_layer"), [pixels(8, size)])
    for rows in (1, 3, 11):
        ours, theirs = network(pixels(rows, size).numpy()), model.backbone(pixels(rows, size)).numpy()
        assert ours.dtype == np.float32 and engine.difference(ours, theirs) < 1e-5


@pytest.mark.parametrize("composer", OF_TRIPLETS)
@pytest.mark.avx
def test_a_composer_does_too(composer):
    model = model_of(composer)
    rows = torch.randn(5, 12), torch.randn(5, 8)
    network = engine.made(Part(model, "compose"), rows)
    with torch.inference_mode():
        assert engine.difference(network(*(row.numpy() for row in rows)), model.compose(*rows).numpy()) < 1e-5


class TwoRows(nn.Module):
    """A trace of two rows takes their number for a constant."""

    def forward(self, rows):
        return rows / int(rows.shape[0])


class OwnWay(nn.Module):
    """What no library of this kind can have: values decide how the computation goes on."""

    def forward(self, rows):
        return rows.sort(stable=True).values.to_sparse().to_dense() if rows.sum() > 0 else rows.cos()


@pytest.mark.parametrize(("module", "why"), [(TwoRows(), "off by"), (OwnWay(), "does not take it")])
@pytest.mark.avx
def test_what_would_give_other_numbers_is_refused(module, why):
    with pytest.raises(engine.Refused, match=why):
        engine.made(module.eval(), [torch.ones(3, 4)])


@pytest.mark.avx
def test_the_root_logger_stays_as_it_is():
    root, handler = logging.getLogger(), logging.NullHandler()
    root.addHandler(handler)
    before = root.handlers[:], root.level
    engine.made(nn.Linear(3, 2), [torch.ones(3, 3)])
    assert (root.handlers, root.level) == before and logging.root.manager.disable == 0
    root.removeHandler(handler)


@pytest.mark.long("a process of its own")
def test_nothing_is_reported_to_anyone():
    code = ("import sys, torch; from machine import engine; engine.made(torch.nn.Linear(3, 2), [torch.ones(3, 3)]);"
            "print(sys.modules['openvino_telemetry'], [name for name in sys.modules if 'telemetry' in name])")
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert told.startswith("None ") and "ga4" not in told


@pytest.mark.parametrize(("told", "fit"), [
    ("processor : 0\nflags\t\t: fpu sse4_1 sse4_2\n", False), ("flags\t\t: fpu sse4_2 avx avx2\n", True),
    ("processor : 0\nFeatures\t: fp asimd sve\n", True)])
def test_openvino_is_for_processors_on_which_it_is_right(told, fit, monkeypatch):
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    assert engine.has_avx(told) == fit


@pytest.mark.long("processes")
def test_where_it_would_be_wrong_torch_computes(tmp_path, mitstates):
    """As on a processor without AVX; oneDNN's variable forbids it to both."""
    write_model(tmp_path / "model.pth")
    words = ("search.py", "index", "--model_checkpoint", tmp_path / "model.pth", "--images", mitstates / "images",
             "--out", tmp_path / "out")
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "DNNL_MAX_CPU_ISA": "SSE41"})
    assert done.returncode == 0 and "processors with AVX" in done.stderr, done.stderr
    assert not (tmp_path / "out" / "networks.zip").exists()


@pytest.mark.parametrize(("words", "opt", "settled"), [
    ("--engine=auto", None, "torch"),
    pytest.param("--freeze_image_encoder --engine=auto", None, "openvino", marks=pytest.mark.avx),
    pytest.param("--freeze_image_encoder", None, "openvino", marks=pytest.mark.avx),
    ("--freeze_image_encoder --engine=torch", None, "torch"),
    ("--freeze_image_encoder --engine=auto", {"comment": ""}, "torch"),         # an older run that goes on
    ("--freeze_image_encoder --engine=auto", {"engine": "openvino"}, "openvino"),
    pytest.param("--text_encoder=hf:x", None, "openvino", marks=pytest.mark.avx),
    pytest.param("--text_encoder=open_clip:x", None, "openvino", marks=pytest.mark.avx),
    ("--use_bert", None, "torch"),
    ("--engine=openvino", None, "drop --engine")])
def test_which_engine_a_run_has(words, opt, settled):
    args = filled(main.get_parser().parse_args([*NEEDED, *words.split()]))
    if settled.startswith("drop"):
        with pytest.raises(InputError, match=settled):
            engine_of(args, "cpu", opt)
    else:
        assert engine_of(args, "cpu", opt) == settled
    frozen = filled(main.get_parser().parse_args([*NEEDED, "--freeze_image_encoder", "--engine=auto"]))
    assert engine_of(frozen, "cuda") == "torch"


def test_one_that_is_missing_is_said_where_it_was_asked_for(monkeypatch):
    monkeypatch.setattr(engine, "openvino", lambda: (_ for _ in ()).throw(engine.Refused("OpenVINO is not there")))
    args = filled(main.get_parser().parse_args([*NEEDED, "--freeze_image_encoder", "--engine=auto"]))
    assert engine_of(args, "cpu") == "torch"
    asked = filled(main.get_parser().parse_args([*NEEDED, "--freeze_image_encoder", "--engine=openvino"]))
    monkeypatch.setattr(engine, "has_bf16", lambda: engine.openvino())
    asked.precision = "bf16"
    with pytest.raises(InputError, match="OpenVINO is not there, or drop --engine"):
        engine_of(asked, "cpu")


@pytest.mark.long("three runs")
@pytest.mark.parametrize(("words", "has", "settled"), [
    ("--freeze_image_encoder", True, "openvino"), ("--freeze_image_encoder", False, "torch"),
    ("--freeze_image_encoder --engine=openvino", True, "openvino"),
    ("--freeze_image_encoder --engine=openvino", False, "no bfloat16; pass --precision fp32"),
    ("--text_encoder=hf:x", False, "openvino"),                                 # whose vectors are float32
    ("", False, "torch")])
@pytest.mark.avx
def test_bfloat16_is_the_engines_where_the_processor_has_it(words, has, settled, monkeypatch, caplog):
    monkeypatch.setattr(engine, "has_bf16", lambda: has)
    args = filled(main.get_parser().parse_args([*NEEDED, "--precision=bf16", *words.split()]))
    if "pass" in settled:
        with pytest.raises(InputError, match=settled):
            engine_of(args, "cpu")
        return
    assert engine_of(args, "cpu") == settled
    assert caplog.text.count("this processor has no bfloat16") == ("freeze" in words and not has)


@pytest.mark.avx
def test_a_network_in_bfloat16_on_either_kind_of_processor():
    """Where there is none, it is refused and not computed in float32 in silence; and the file says which it is."""
    model = model_of()
    model.bf16 = True
    encode = Backbone(model, "openvino")
    assert encode.made_by.endswith("_openvino_bf16")
    rows = pixels(8)
    if not engine.has_bf16():
        with pytest.raises(engine.Refused, match="computes in f32"):
            encode(rows)
        return
    ours = encode(rows).numpy()
    assert encode.network.precision == "bf16"
    model.bf16 = False
    theirs = model.backbone(rows).numpy()
    assert 1e-5 < engine.difference(ours, theirs) < 0.05


@pytest.mark.avx
def test_a_large_gallery_is_encoded_by_a_network(tmp_path, monkeypatch, caplog):
    write_model(tmp_path / "model.pth")
    paths = [tmp_path / f"{number}.jpg" for number in range(6)]
    for path in paths:
        picture(path)
    monkeypatch.setattr(from_checkpoint, "CONVERTED", 5)
    ours, theirs = (load_model(tmp_path / "model.pth", "cpu", engine=name) for name in ("auto", "torch"))
    expected = theirs.encode(paths)
    assert np.array_equal(ours.encode(paths[:4]), expected[:4]) and not ours.network    # few are not worth it
    found = ours.encode(paths)
    assert ours.network and not theirs.network
    assert not np.array_equal(found, expected) and engine.difference(found, expected) < 1e-5
    def refuse(*_, **__):
        raise engine.Refused("it has an operation of its own")
    monkeypatch.setattr(engine, "made", refuse)
    refused = load_model(tmp_path / "model.pth", "cpu")
    for _ in range(2):
        assert np.array_equal(refused.encode(paths), expected)
    assert caplog.text.count("it has an operation of its own; torch encodes the pictures") == 1


@pytest.mark.avx
def test_a_runs_features_are_one_engines(mitstates, tmp_path, monkeypatch, caplog):
    frozen = {"freeze_image_encoder": True, "num_iters": 1, "model": "tirg", "engine": "auto"}
    def files():
        return sorted(path.name for path in (mitstates / "image_cache").glob("features_*.features"))
    run_main("mitstates", mitstates, tmp_path / "logs", comment="_torch", **{**frozen, "engine": "torch"})
    (torchs,) = files()
    run = run_main("mitstates", mitstates, tmp_path / "logs", comment="_auto", **frozen)
    assert files() == [torchs, torchs.replace(".features", "_openvino.features")]
    assert torch.load(run.checkpoint, weights_only=True)["opt"]["engine"] == "openvino"
    theirs, ours = (np.fromfile(mitstates / "image_cache" / name, np.float32) for name in files())
    assert theirs.any() and engine.difference(ours, theirs) < 1e-5

    def refuse(*_):
        raise engine.Refused("it has an operation of its own")
    monkeypatch.setattr(engine, "made", refuse)
    run_main("mitstates", mitstates, tmp_path / "logs", comment="_kept", **frozen)  # all are, so nothing is converted
    (mitstates / "image_cache" / files()[1]).with_suffix(".records").unlink()
    run_main("mitstates", mitstates, tmp_path / "logs", comment="_refused", **frozen)
    assert caplog.text.count("it has an operation of its own; torch computes the image encoder") == 1
    assert main.main(flags("mitstates", mitstates, tmp_path / "logs", comment="_auto", resume="auto",
                           **{**frozen, "engine": "torch"})) == 2
