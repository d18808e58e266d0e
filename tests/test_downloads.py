"""Weights by name, fetched from a stand-in hub on this machine that serves made-up repositories in the form of real
ones; the programs' own code and the hub's library in a process of their own."""

import hashlib
import io
import json
import os
import subprocess
import sys

import numpy as np
import open_clip
import pytest
import timm
import torch
from safetensors.torch import save
from transformers import BertModel

from machine.downloads import fetched
from machine.sentence_encoder import SentenceEncoder
from machine.tensor_files import fingerprint

from . import hub as stand_in
from .services import ROOT, write_bert
from .test_encoders import TOWER

pytestmark = pytest.mark.long("processes, and a server that they ask")

TAGS = "single", "bin", "sharded", "named", "gated", "private", "cut", "cut_once", "wrong", "busy", "empty", "never"
ASKED = """
import json, sys
import open_clip, open_clip.pretrained, torch
import image_encoders, text_encoders
from machine.errors import InputError
from machine.tensor_files import fingerprint
open_clip.add_model_config(sys.argv[1])
open_clip.pretrained._PRETRAINED["tiny-tower"] = {
    tag: open_clip.pretrained._pcfg(hf_hub=f"made-up/{tag}/" + ("weights.bin" if tag == "named" else ""))
    for tag in json.loads(sys.argv[2])}
for line in sys.stdin:
    kind, name, size = json.loads(line)
    try:
        if kind == "image":
            encoder = image_encoders.image_encoder(name, 8, size)
            image_encoders.load_image_weights(encoder, "imagenet", name)
            said = fingerprint(encoder.backbone.state_dict())
        else:
            source = text_encoders.sentence_source({"text_encoder": name, "pooling_layer": -2, "max_seq_len": 25,
                                                    "image_encoder": name, "image_weights": "imagenet"})
            said = source.vectors(["a red dress"]).tolist()
    except InputError as error:
        said = {"refused": str(error)}
    print(json.dumps(said), flush=True)
"""


def saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def other_names(state):
    """As of BERT's first years: a model with heads, and normalization's weights called gamma and beta."""
    old = ("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")
    renamed = {f"bert.{name}".replace(*old[0]).replace(*old[1]): value for name, value in state.items()}
    return {**renamed, "cls.predictions.bias": torch.zeros(7), "cls.seq_relationship.weight": torch.zeros(2, 48)}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The models that the repositories hold: {name: module}, and the towers' configuration."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "tiny-tower.json").write_text(json.dumps(TOWER))
    open_clip.add_model_config(folder / "tiny-tower.json")
    write_bert(folder / "bert", 48)
    return {"resnet": timm.create_model("test_resnet"), "vit": timm.create_model("test_vit"),
            "tower": open_clip.create_model("tiny-tower").eval(), "config": folder / "tiny-tower.json",
            "bert": folder / "bert"}


@pytest.fixture(scope="module")
def hub(made):
    tower = made["tower"].state_dict()
    names = sorted(tower)
    shards = {"model-1-of-2.safetensors": names[::2], "model-2-of-2.safetensors": names[1::2]}
    index = {"metadata": {}, "weight_map": {name: file for file, of in shards.items() for name in of}}
    bert = {file.name: file.read_bytes() for file in made["bert"].iterdir() if file.suffix != ".safetensors"}
    state = BertModel.from_pretrained(made["bert"]).state_dict()
    whole = {"open_clip_model.safetensors": save(tower), "config.json": b"{}"}
    with stand_in.serving({
            "timm/test_resnet.r160_in1k": {"model.safetensors": save(made["resnet"].state_dict())},
            "timm/test_vit.r160_in1k": {"pytorch_model.bin": saved(made["vit"].state_dict())},
            "made-up/bin": {"open_clip_pytorch_model.bin": saved(tower)},
            "made-up/named": {"weights.bin": saved(tower)},
            "made-up/sharded": {"open_clip_model.safetensors.index.json": json.dumps(index).encode(),
                                **{file: save({name: tower[name] for name in of}) for file, of in shards.items()}},
            "made-up/empty": {"README.md": b"soon"},
            "made-up/bert": {**bert, "pytorch_model.bin": saved(other_names(state))},
            **{f"made-up/{tag}": whole for tag in ("single", "gated", "cut", "cut_once", "wrong", "busy")}}) as hub:
        hub.gated["made-up/gated"] = "Bearer hf_made_up"
        file = "resolve/main/open_clip_model.safetensors"
        hub.ways.update({f"/made-up/cut/{file}": "cut", f"/made-up/cut_once/{file}": "cut once",
                         f"/made-up/wrong/{file}": "wrong hash", f"/made-up/busy/{file}": 503})
        yield hub


@pytest.fixture(scope="module")
def ask(hub, made, tmp_path_factory):
    """Ask a process that knows this hub alone: what it makes of a name, or how it refuses."""
    home = tmp_path_factory.mktemp("home")
    environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HOME": str(home / "hf"), "TORCH_HOME": str(home / "t"),
                   "HF_HUB_DISABLE_XET": "1"}
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "https_proxy", "http_proxy"):
        environment.pop(name, None)
    processes = {}

    def ask(kind, name, size=48, **more):
        key = tuple(sorted(more.items()))
        if key not in processes:
            processes[key] = subprocess.Popen(
                [sys.executable, "-c", ASKED, str(made["config"]), json.dumps(TAGS)], cwd=ROOT, text=True,
                env={**environment, **more}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        process = processes[key]
        process.stdin.write(json.dumps([kind, name, size]) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())
    yield ask
    for process in processes.values():
        process.stdin.close()
        process.wait(20)


TOWER_FILE = "open_clip_model.safetensors"


def image(ask, tag, **more):
    return ask("image", f"open_clip:tiny-tower/{tag}", **more)


def test_each_form_of_repository_gives_its_weights(ask, hub, made):
    """Whichever file there is: safetensors, alone or in parts, PyTorch's, and of a name of its own."""
    tower = fingerprint(made["tower"].visual.state_dict())
    assert [image(ask, tag) for tag in ("single", "bin", "sharded", "named")] == [tower] * 4
    asked = [path.rpartition("/")[2] for _, path, _ in hub.asked if "/made-up/bin/" in path]
    assert asked[0] == TOWER_FILE and asked[-1] == "open_clip_pytorch_model.bin"  # the safe one is looked for first
    for name in ("resnet", "vit"):
        theirs = made[name].state_dict()
        kept = {weight: value for weight, value in theirs.items() if not weight.startswith(("fc.", "head."))}
        assert ask("image", f"timm:test_{name}.r160_in1k", 160) == fingerprint(kept)


def test_a_text_tower_and_a_bert_of_the_first_years_give_their_vectors(ask, made):
    tokenizer = open_clip.get_tokenizer("tiny-tower")
    with torch.no_grad():
        expected = made["tower"].encode_text(tokenizer(["a red dress"]))
    torch.testing.assert_close(torch.tensor(ask("text", "open_clip:tiny-tower/single")), expected)
    served = SentenceEncoder(str(made["bert"]))
    np.testing.assert_allclose(ask("text", "hf:made-up/bert"), served.encode(served.token_ids(["a red dress"])),
                               atol=1e-5)


def test_a_fetched_file_is_not_fetched_again(ask, hub):
    image(ask, "single")
    before = len(hub.asked)
    image(ask, "single")
    assert [method for method, _, _ in hub.asked[before:]] == ["HEAD"]          # only whether it is the newest


def test_a_file_that_broke_off_goes_on(ask, hub, made):
    assert image(ask, "cut_once") == fingerprint(made["tower"].visual.state_dict())
    gets = [path for method, path, _ in hub.asked if method == "GET" and "/cut_once/" in path]
    assert len(gets) == 2


@pytest.mark.parametrize(("tag", "words"), [
    ("gated", "accept its terms at HUB/made-up/gated, then set HF_TOKEN"),
    ("private", "set HF_TOKEN to a token that may read it"),
    ("wrong", "is damaged, its SHA-256 is not the hub's"),
    ("empty", "HUB/made-up/empty has none of open_clip_model.safetensors, open_clip_pytorch_model.bin"),
    ("cut", "did not arrive (peer closed connection"),
    pytest.param("busy", "the hub cannot be reached (Server error '503", marks=pytest.mark.rare("waits longer"))])
def test_what_cannot_be_fetched_is_one_line_that_says_what_to_do(ask, hub, tag, words):
    said = image(ask, tag)["refused"]
    assert words.replace("HUB", hub.address) in said and "\n" not in said
    assert "pass --image_weights PATH" in said


def test_a_token_opens_what_is_gated_and_offline_asks_nobody(ask, hub, made):
    tower = fingerprint(made["tower"].visual.state_dict())
    assert image(ask, "gated", HF_TOKEN="hf_made_up") == image(ask, "single") == tower
    before = len(hub.asked)
    assert image(ask, "single", HF_HUB_OFFLINE="1") == tower                    # it was fetched
    assert "HF_HUB_OFFLINE is set, so only this machine was searched" in image(ask, "never", HF_HUB_OFFLINE="1")[
        "refused"]
    assert len(hub.asked) == before


def test_a_file_of_torchvisions_is_checked_by_the_hash_in_its_name(tmp_path, monkeypatch):
    content = b"weights" * 1000
    right = hashlib.sha256(content).hexdigest()[:8]
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with stand_in.serving({"o/r": {f"net-{right}.pth": content, "net-0123abcd.pth": content,
                                   "net-plain.pth": content}}) as hub:
        address = f"{hub.address}/o/r/resolve/main/net-"
        assert fetched(f"{address}{right}.pth", hashed=True).read_bytes() == content
        for way in ("another file", "cut"):
            if way == "cut":
                hub.ways["/o/r/resolve/main/net-0123abcd.pth"] = "cut"
            with pytest.raises(ValueError, match=r"is cut short or another file .*net-0123abcd.pth"):
                fetched(f"{address}0123abcd.pth", hashed=True)
        hub.ways["/o/r/resolve/main/net-plain.pth"] = "cut once"
        with pytest.raises(ValueError, match=r"is cut short or another file \(it broke off\): try again"):
            fetched(f"{address}plain.pth")
        assert fetched(f"{address}plain.pth").read_bytes() == content
        with pytest.raises(ValueError, match=r"404.*: get .* elsewhere and put it at .*/net-1.pth"):
            fetched(f"{address}1.pth")
    assert {file.name for file in (tmp_path / "torch" / "hub" / "checkpoints").iterdir()} == {
        f"net-{right}.pth", "net-plain.pth"}
