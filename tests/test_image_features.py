"""Statistics of an encoder's stages beside its last features: as worked out slowly from the layers' own outputs, for
encoders of each library, and through everything that is made of a checkpoint."""

import copy
import json

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

import main
import search
from image_encoders import image_encoder, load_image_weights, traits
from img_text_composition_models import Recipe
from machine.errors import InputError
from searching import as_onnx
from training import checkpoint

from .conftest import flags, run_main, some, write_mitstates

STAGES = {"image_features": "stages", "model": "TransformerAE", "freeze_image_encoder": True}
# Modules' names and channels, of whose outputs the stages are statistics, and the tokens before the patches.
KNOWN = {
    "resnet18": [("relu", 64), ("layer1", 64), ("layer2", 128), ("layer3", 256), ("layer4", 512)],
    "mobilenet_v3_small": [("features.0", 16), ("features.1", 16), ("features.3", 24), ("features.8", 48),
                           ("features.12", 576)],
    "timm:tf_efficientnet_lite0": [("blocks.0", 16), ("blocks.1", 24), ("blocks.2", 40), ("blocks.4", 112),
                                   ("blocks.6", 320)],
    "timm:test_vit": [("blocks.1", 64), ("blocks.2", 64), ("blocks.4", 64), ("blocks.5", 64)],
    "vit_b_32": [(f"encoder.layers.encoder_layer_{i}", 768) for i in (2, 5, 8, 11)],
    "swin_t": [("features.1", 96), ("features.3", 192), ("features.5", 384), ("features.7", 768)],
    "vgg11": [("features.1", 64), ("features.4", 128), ("features.9", 256), ("features.14", 512), ("features.19", 512),
              ("features.20", 512)],
    "open_clip:ViT-B-32/openai": [(f"transformer.resblocks.{i}", 768) for i in (2, 5, 8, 11)],
    "open_clip:ViT-B-16-SigLIP/webli": [(f"trunk.blocks.{i}", 768) for i in (2, 5, 8, 11)],
}


@pytest.mark.parametrize("name", some(list(KNOWN), 4))
def test_the_stages_are_the_last_blocks_of_each_resolution_or_four_of_a_vits(name):
    known, last = traits(name, "stages"), traits(name)
    assert [(stage.module, stage.channels) for stage in known.stages] == KNOWN[name]
    assert {stage.prefix for stage in known.stages} == {int("vit" in name.lower() and "SigLIP" not in name)}
    parts = 3 if known.stages[0].prefix else 2
    assert known.width == last.width + parts * sum(channels for _, channels in KNOWN[name])
    assert (known.size, known.mean, known.resampling, known.head) == (last.size, last.mean, last.resampling, "fc")


def slowly(output, layout, prefix):
    """One picture's part of a feature, number by number."""
    places = {"BCHW": lambda: output.reshape(output.shape[0], -1).T, "BHWC": lambda: output.reshape(
        -1, output.shape[-1]), "BNC": lambda: output[prefix:]}[layout]()         # (places, C)
    mean = np.array([sum(channel) / len(channel) for channel in places.T])
    deviation = np.array([(sum((value - middle)**2 for value in channel) / len(channel) + 1e-6)**0.5
                          for channel, middle in zip(places.T, mean, strict=True)])
    parts = [mean, deviation, *([output[0]] if prefix else [])]
    return np.concatenate([(part - part.mean()) / np.sqrt(part.var() + 1e-5) for part in parts])


@pytest.mark.parametrize(("name", "layout"), [("resnet18", "BCHW"), ("timm:test_vit", "BNC"),
                                              ("timm:test_efficientnet", "BCHW"),
                                              pytest.param("swin_t", "BHWC", marks=pytest.mark.long("a larger one"))])
def test_features_are_the_last_ones_and_each_channels_mean_and_deviation(name, layout):
    torch.manual_seed(0)
    encoder, known = image_encoder(name, 8, 64, "stages").eval(), traits(name, "stages")
    encoder.fc = nn.Identity()
    images, given = torch.randn(2, 3, 64, 64), {}
    for stage in known.stages:
        encoder.backbone.get_submodule(stage.module).register_forward_hook(
            lambda _module, _inputs, output, name=stage.module: given.update({name: output.double().numpy()}))
    with torch.no_grad():
        found, last = encoder(images), encoder.backbone(images)
    expected = [np.concatenate([last[row].double().numpy(), *(slowly(given[stage.module][row], layout, stage.prefix)
                                                              for stage in known.stages)]) for row in range(2)]
    assert found.shape == (2, known.width)
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-3)


def test_a_torchvision_encoders_weights_are_the_files_and_its_last_features_the_ones_it_always_had(tmp_path):
    theirs = torchvision.models.resnet18(weights=None).eval()
    torch.save(theirs.state_dict(), tmp_path / "resnet.pth")
    encoder, plain = (image_encoder("resnet18", 8, 64, features) for features in ("stages", "last"))
    for each in (encoder, plain):
        load_image_weights(each, str(tmp_path / "resnet.pth"), "resnet18")
    encoder.fc = plain.fc = nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(encoder.eval()(images)[:, :512], plain.eval()(images))


def test_a_picture_of_one_colour_has_features_and_gradients_that_are_finite():
    encoder = image_encoder("mobilenet_v3_small", 8, 32, "stages")
    encoder(torch.zeros(2, 3, 32, 32)).square().sum().backward()
    assert all(weight.grad.isfinite().all() for weight in encoder.parameters())


@pytest.mark.long("an encoder of another size")
def test_an_encoder_without_stages_is_refused_in_one_line(mitstates, tmp_path, capsys):
    with pytest.raises(InputError, match=r"stages of timm:crossvit_9_240 cannot be looked at .*--image_features last$"):
        traits("timm:crossvit_9_240", "stages")
    words = flags("mitstates", mitstates, tmp_path / "logs", image_encoder="timm:crossvit_9_240",
                  image_features="stages")
    assert main.main(words) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.long("compiles and exports")
def test_what_looks_at_the_stages_can_be_copied_compiled_and_exported():
    torch.manual_seed(0)
    encoder, images = image_encoder("resnet18", 8, 32, "stages").eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = encoder(images)
        for other in (copy.deepcopy(encoder), torch.compile(encoder, backend="eager", fullgraph=True),
                      torch.export.export(encoder, (images,)).module()):
            torch.testing.assert_close(other(images), expected)


def test_features_have_a_file_for_each_kind(mitstates, tmp_path):
    made = [Recipe("tirg", "mobilenet_v3_small", 32, 12, "lstm", 8, {"<UNK>": 0}, features).build()
            for features in ("last", "stages", "stages")]
    pixels = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    weights = made[0].img_model.state_dict()
    for model in made[1:]:
        model.img_model.backbone.load_state_dict(weights, strict=False)         # all but its last layer's
    prints = [model.backbone_fingerprint() for model in made]
    assert prints[1] == prints[2] != prints[0]
    last, stages, _ = (model.backbone(pixels) for model in made)
    assert torch.equal(stages[:, :last.shape[1]], last) and stages.shape[1] == made[1].traits.width > last.shape[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two steps over a frozen encoder's stages."""
    root = tmp_path_factory.mktemp("stages")
    return write_mitstates(root / "data"), run_main("mitstates", root / "data", root / "logs", num_iters=2, **STAGES)


@pytest.mark.long("a run, a test and an index")
def test_a_run_over_stages_goes_on_and_is_tested_and_searched_with(run, tmp_path, capsys):
    data, trained = run
    state = torch.load(trained.checkpoint, weights_only=True)
    assert state["recipe"]["image_features"] == "stages"
    assert state["model_state_dict"]["img_model.fc.0.weight"].shape[1] == 1024 + 2 * (16 + 16 + 24 + 48 + 576)
    again = run_main("mitstates", data, tmp_path / "tests", test_only=True, model_checkpoint=trained.checkpoint,
                     image_features=None, model="TransformerAE")
    assert again.metrics == trained.metrics
    model = checkpoint.rebuild_model(trained.checkpoint)
    pixels = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(pixels), model.encode_image(model.backbone(pixels)))
    index, query = tmp_path / "index", next((data / "images").rglob("*.jpg"))
    assert search.main(["index", f"--model_checkpoint={trained.checkpoint}", f"--images={data / 'images'}",
                        f"--out={index}"]) == 0
    capsys.readouterr()
    assert search.main(["query", f"--index={index}", f"--image={query}", "--text=", "--json", "--keep_query"]) == 0
    assert json.loads(capsys.readouterr().out)["results"][0]["path"] == str(query)
    words = flags("mitstates", data, trained.folder.parent, num_iters=3, resume=trained.checkpoint,
                  **{**STAGES, "image_features": "last"})
    assert main.main(words) == 2 and "--image_features stages (now last)" in capsys.readouterr().err
    assert main.main(flags("mitstates", data, trained.folder.parent, num_iters=3, resume=trained.checkpoint,
                           **STAGES)) == 0
    assert torch.load(trained.checkpoint, weights_only=True)["it"] == 3


def test_an_older_checkpoint_has_the_last_features():
    old = Recipe("tirg", "mobilenet_v3_small", 32, 12, "lstm", 8, {"<UNK>": 0})
    told = old.plain()
    state = {"recipe": {name: value for name, value in told.items() if name != "image_features"},
             "model_state_dict": old.build().state_dict(), "opt": {}, "it": 0, "progress": None}
    assert checkpoint.well_formed(state) and checkpoint.recipe(state, "x") == old
    assert not checkpoint.well_formed({**state, "recipe": {**told, "more": 1}})
    with pytest.raises(InputError, match="not a checkpoint"):
        checkpoint.recipe({**state, "recipe": {**told, "image_features": "first"}}, "x")


@pytest.mark.long("an encoder that is trained, twice")
@pytest.mark.parametrize("changes", [{}, {"precision": "bf16"}])
def test_an_encoder_that_is_trained_gives_them_too(mitstates, tmp_path, changes):
    run = run_main("mitstates", mitstates, tmp_path / "logs", **{**STAGES, "freeze_image_encoder": False}, **changes)
    first = image_encoder("mobilenet_v3_small", 24, 32, "stages").state_dict()
    state = torch.load(run.checkpoint, weights_only=True)["model_state_dict"]
    assert {f"img_model.{name}" for name in first} <= state.keys()


@pytest.mark.long("torch's exporter takes seconds")
@pytest.mark.parametrize("name", ["timm:test_vit", pytest.param(
    "mobilenet_v3_small", marks=pytest.mark.rare("a larger one"))])
def test_onnx_files_answer_as_torch_does(name, tmp_path):
    from onnxruntime import InferenceSession

    torch.manual_seed(0)
    recipe = Recipe("TransformerAE", name, 32, 24, "service", 16, {"<UNK>": 0, "red": 1, "dress": 2}, "stages", True)
    model = recipe.build(lambda texts: torch.zeros(len(texts), 16)).eval()
    words = model.learned_words(model.learned_words.ids(["red"])).detach().numpy()
    differences = as_onnx.write(model, tmp_path)
    assert differences.keys() == {as_onnx.IMAGE_ENCODER, as_onnx.COMPOSER, as_onnx.WORDS}
    assert max(differences.values()) < as_onnx.TOLERANCE
    session = InferenceSession(tmp_path / as_onnx.WORDS)
    for ids in ([[1]], [[1, 0, 0, 0, 0, 0, 0]]):                                # of any length
        (found,) = session.run(None, {"words": np.array(ids)})
        np.testing.assert_allclose(found, words, atol=1e-5)
