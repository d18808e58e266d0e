"""Files of weights as the world has them, not as this program or today's torch would write them."""

import re
import shlex

import numpy as np
import pytest
import timm
import torch
import torchvision

from image_encoders import Torchvision, image_encoder, load_image_weights
from img_text_composition_models import Recipe
from machine.errors import InputError
from machine.tensor_files import read_weights
from training import checkpoint

from .conftest import Run, some, write_fashion200k, write_mitstates
from .services import ROOT
from .sweep_encoders import judge
from .test_commands import commands
from .test_tutorial import type_in

PUBLISHED = [command for command in commands("README.md") if command.startswith("python -W ignore main.py ")]


def without_counters(state):
    """As files of torch before 0.4.1 are, and what was saved anew from them."""
    return {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The folder where torch keeps its downloads: an empty one."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def resnet18(hub):
    """torchvision's file of ResNet-18 by its name: random weights, 102 tensors, as many as the published one has."""
    torch.manual_seed(1)
    state = without_counters(torchvision.models.resnet18().state_dict())
    assert len(state) == 102
    torch.save(state, hub / "resnet18-f37072fd.pth")
    return state


def test_weights_without_batch_norms_counters_are_taken(resnet18):
    encoder = image_encoder("resnet18", 512, 64)
    load_image_weights(encoder, "imagenet")
    taken = encoder.state_dict()
    assert all(torch.equal(taken[name], value) for name, value in resnet18.items() if not name.startswith("fc."))
    assert encoder.bn1.num_batches_tracked == 0


def test_a_checkpoint_without_counters_is_taken(tmp_path):
    recipe = Recipe("tirg", "resnet18", 32, 8, "lstm", 8, {"red": 0})
    theirs = recipe.build()
    torch.save({"model_state_dict": without_counters(theirs.state_dict())}, tmp_path / "old.pth")
    ours = recipe.build()
    checkpoint.restore(ours, checkpoint.load(tmp_path / "old.pth"), "old.pth")
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in theirs.state_dict().items())


def test_what_does_not_fit_is_named(tmp_path):
    state, encoder = torchvision.models.resnet18().state_dict(), image_encoder("resnet18", 512, 64)
    for changed, words in (({"conv1.weight": torch.zeros(64, 3, 3, 3)}, r"first conv1.weight: \(64, 3, 3, 3\) there, "
                            r"\(64, 3, 7, 7\) here"),
                           ({"extra.bias": torch.zeros(1)}, r"1 weights differ, first extra.bias: \(1,\) there"),
                           ({"bn1.bias": torch.zeros(64, dtype=torch.int64)}, r"\(64,\) of int64 there, \(64,\) here"),
                           ({"bn1.bias": torch.zeros(64, dtype=torch.complex64)}, "of complex64 there")):
        torch.save({**state, **changed}, tmp_path / "other.pth")
        with pytest.raises(InputError, match=words):
            load_image_weights(encoder, str(tmp_path / "other.pth"))
    torch.save({name: value.half() if value.is_floating_point() else value for name, value in state.items()},
               tmp_path / "half.pth")
    load_image_weights(encoder, str(tmp_path / "half.pth"))
    assert torch.equal(encoder.conv1.weight, state["conv1.weight"].half().float())


FAMILIES = ("mnasnet0_5", "regnet_y_400mf", "timm:test_vit", "timm:levit_128s", "open_clip:ViT-B-16-SigLIP",
            "densenet121", "vit_b_16", "swin_v2_t", "timm:crossvit_9_240", "timm:caformer_s18", "open_clip:RN50",
            "open_clip:coca_ViT-B-32", "open_clip:MobileCLIP-S1", "open_clip:roberta-ViT-B-32")


@pytest.mark.parametrize("name", some(FAMILIES, 2, "seconds each"))
def test_some_of_each_family_are_right(name):
    """python -m tests.sweep_encoders does all."""
    assert judge(name).startswith("right")


@pytest.mark.parametrize("name", some(["densenet121", "densenet161"]))
def test_densenets_of_torchvisions_first_years(name, hub):
    encoder, theirs = image_encoder(name, 8, 64), getattr(torchvision.models, name)()
    address = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"].url
    old = {re.sub(r"(denselayer\d+\.(?:norm|relu|conv))([12])", r"\1.\2", weight): value
           for weight, value in without_counters(theirs.state_dict()).items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    torch.save(old, hub / address.rpartition("/")[2], _use_new_zipfile_serialization=False)
    load_image_weights(encoder, "imagenet", name)
    assert same_images(encoder.features, theirs.features, 64)


def same_images(ours, theirs, size):
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return torch.allclose(ours.eval()(images), theirs.eval()(images), atol=1e-5)


WRAPPED = {
    "legacy": (".pth", lambda state: state),
    "named otherwise": (".safetensors", lambda state: state),                   # a torch file, whatever its name says
    "in training": (".pth.tar", lambda state: {"state_dict": {name: value * 0 for name, value in state.items()},
                                               "state_dict_ema": state, "epoch": 3, "arch": "test_resnet"}),
    "averaged": (".pth", lambda state: {"model": {}, "model_ema": {
        "n_averaged": torch.tensor(7), **{f"module.{name}": value for name, value in state.items()}}}),
    "Lightning's": (".ckpt", lambda state: {"state_dict": {f"model.{name}": value for name, value in state.items()},
                                            "pytorch-lightning_version": "2.5.0"}),
    "no counters": (".pt", without_counters)}


@pytest.mark.parametrize("way", WRAPPED)
def test_files_of_other_programs_are_taken(way, tmp_path):
    suffix, wrap = WRAPPED[way]
    theirs = timm.create_model("test_resnet")
    torch.save(wrap(theirs.state_dict()), tmp_path / f"w{suffix}", _use_new_zipfile_serialization=way != "legacy")
    encoder = image_encoder("timm:test_resnet", 8, 64)
    load_image_weights(encoder, str(tmp_path / f"w{suffix}"), "timm:test_resnet")
    theirs.reset_classifier(0)
    assert same_images(encoder.backbone, theirs, 64)


@pytest.mark.parametrize(("model", "size"), some([
    ("levit_128s", 224), ("repvit_m0_9", 64), ("vit_tiny_patch16_224", 64), ("levit_384_s8", 224), ("caformer_s18", 64),
    ("efficientvit_m0", 224), ("shvit_s1", 64), ("crossvit_9_240", 120)], 3, "seconds each"))
def test_timms_own_state_is_taken_whatever_goes_with_its_classifier(model, size, tmp_path):
    torch.save(timm.create_model(model).state_dict(), tmp_path / "weights.pth")
    encoder = image_encoder(f"timm:{model}", 8, size)
    load_image_weights(encoder, str(tmp_path / "weights.pth"), f"timm:{model}")
    theirs = timm.create_model(model, pretrained=True, num_classes=0, pretrained_cfg_overlay={
        "file": str(tmp_path / "weights.pth")}, **({"img_size": size} if model == "vit_tiny_patch16_224" else {}))
    assert same_images(encoder.backbone, theirs, size)


def as_augreg(model):
    """A ViT's weights as the files of its first training in JAX have them."""
    def flax(weight):                                                           # (out, in) -> (in, out)
        return weight.detach().numpy().T
    heads, state = model.blocks[0].attn.num_heads, model.state_dict()
    width = model.embed_dim
    found = {"embedding/kernel": model.patch_embed.proj.weight.permute(2, 3, 1, 0), "embedding/bias":
             model.patch_embed.proj.bias, "cls": model.cls_token, "Transformer/posembed_input/pos_embedding":
             model.pos_embed, "Transformer/encoder_norm/scale": model.norm.weight, "Transformer/encoder_norm/bias":
             model.norm.bias, "head/kernel": flax(model.head.weight), "head/bias": model.head.bias}
    for number in range(len(model.blocks)):
        place, ours = f"Transformer/encoderblock_{number}/", f"blocks.{number}."
        for there, here in (("LayerNorm_0", "norm1"), ("LayerNorm_2", "norm2")):
            found |= {f"{place}{there}/scale": state[f"{ours}{here}.weight"],
                      f"{place}{there}/bias": state[f"{ours}{here}.bias"]}
        attention = f"{place}MultiHeadDotProductAttention_1/"
        for part, name in enumerate(("query", "key", "value")):
            weight, bias = (state[f"{ours}attn.qkv.{kind}"].chunk(3)[part] for kind in ("weight", "bias"))
            found |= {f"{attention}{name}/kernel": flax(weight).reshape(width, heads, -1),
                      f"{attention}{name}/bias": bias.reshape(heads, -1)}
        found |= {f"{attention}out/kernel": flax(state[f"{ours}attn.proj.weight"]).reshape(heads, -1, width),
                  f"{attention}out/bias": state[f"{ours}attn.proj.bias"]}
        for dense in (0, 1):
            found |= {f"{place}MlpBlock_3/Dense_{dense}/kernel": flax(state[f"{ours}mlp.fc{dense + 1}.weight"]),
                      f"{place}MlpBlock_3/Dense_{dense}/bias": state[f"{ours}mlp.fc{dense + 1}.bias"]}
    return {name: np.asarray(torch.as_tensor(value).detach()) for name, value in found.items()}


def test_a_vit_of_jax_is_taken(tmp_path):
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=64)
    np.savez(tmp_path / "Ti_16.npz", **as_augreg(theirs))
    encoder = image_encoder("timm:vit_tiny_patch16_224", 8, 64)
    load_image_weights(encoder, str(tmp_path / "Ti_16.npz"), "timm:vit_tiny_patch16_224")
    theirs.reset_classifier(0)
    assert same_images(encoder.backbone, theirs, 64)


def test_a_name_of_several_forms_of_weights_says_which_there_are(hub):
    with pytest.raises(ValueError, match=r"vit_h_14_swag-\w+\.pth for --image_size 518; .* for --image_size 224"):
        Torchvision().fetched("vit_h_14")


@pytest.mark.long("a process at the published sizes")
@pytest.mark.parametrize("number", [0, 3])
def test_a_published_command_starts_from_torchvisions_own_file(number, resnet18, tmp_path, request):
    """As printed, but for paths and ports, as far as its first step."""
    words = [word for word in shlex.split(PUBLISHED[number]) if "path" not in word]
    place = words.index("--log_dir")
    del words[place:place + 2]
    write, service = ((write_mitstates, {}), (write_fashion200k, "minilm"))[number == 3]
    if service:
        service = request.getfixturevalue(service).flags
    data = write(tmp_path / "data", images=7)
    flags = {"dataset_path": data, "log_dir": tmp_path / "logs", "num_iters": 1, **service}
    type_in(ROOT, shlex.join([*words, *(f"--{name}={value}" for name, value in flags.items())]))
    (folder,) = (tmp_path / "logs").iterdir()
    weights = read_weights(Run(folder).checkpoint)
    name = "layer1.0.conv1.weight"
    torch.testing.assert_close(weights[f"img_model.{name}"], resnet18[name], atol=0.01, rtol=0)
