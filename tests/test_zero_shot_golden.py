"""Zero-shot composers against what the originals' own functions gave: tests/golden/zero_shot, made with transformers'
CLIP in float32. All within 1e-4 of their size."""

import json
import zlib
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F

from benchmarks.masking import masked
from benchmarks.texts import clean
from image_encoders import quiet
from img_text_composition_models import Recipe
from torch_function import composition_losses
from training.loop import make_optimizer
from zero_shot import basic, lincir, pic2word, simple

FOLDER = Path(__file__).parent / "golden" / "zero_shot"
VALUES, ARRAYS = json.loads((FOLDER / "composers.json").read_text()), np.load(FOLDER / "composers.npz")
SIZES = VALUES["tower"]
CONFIG = {"embed_dim": SIZES["projection"], "quick_gelu": True,
          "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
          "text_cfg": {"context_length": SIZES["context"], "vocab_size": SIZES["vocabulary"], "width": SIZES["width"],
                       "heads": SIZES["heads"], "layers": SIZES["layers"]}}


def array(name):
    return torch.from_numpy(ARRAYS[name].astype(np.float32))


def close(found, name):
    expected = array(name) if isinstance(name, str) else torch.as_tensor(name, dtype=torch.float32)
    torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def filled(module, item):
    """Its weights by the golden set's rule."""
    for name, tensor in module.state_dict().items():
        if tensor.ndim:
            drawn = np.random.RandomState(zlib.crc32(f"zs:{item}.{name}".encode())).standard_normal(tensor.shape)
            rule = (drawn * np.sqrt(1 / np.prod(tensor.shape[1:])) if tensor.ndim > 1 else
                    0.05 * drawn + name.endswith("weight"))
            tensor.copy_(torch.from_numpy(rule.astype(np.float32)))
    return module


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of a CLIP model whose text tower is the golden set's."""
    folder = tmp_path_factory.mktemp("golden")
    (folder / "golden-tower.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(folder / "golden-tower.json")
    with quiet():
        state = open_clip.create_model("golden-tower").state_dict()
    text = {name: state[name] for name in SIZES["state_dict"]}
    assert {name: list(value.shape) for name, value in text.items()} == SIZES["state_dict"]
    filled(type("Named", (), {"state_dict": lambda _: text})(), "tower")
    assert {name: float(value.sum()) for name, value in text.items()} == pytest.approx(SIZES["sums"], rel=1e-4)
    torch.save(state, folder / "tower.pt")
    return folder / "tower.pt"


@pytest.fixture
def composer(weights):
    def made(name, **how):
        model = Recipe(name, "open_clip:golden-tower", 32, 0, "open_clip:golden-tower", 0, {}, **how).build()
        model.load_weights(str(weights))
        return model.eval()
    return made


def ids(rows):
    return torch.tensor(rows, dtype=torch.float32)


def test_the_towers_vectors_with_and_without_words(composer):
    tower, found = composer("LinCIR").text_tower, VALUES["lincir"]
    close(tower.encode(ids(found["caption_ids"]).long()), "lincir.text_embeddings")
    masked_ids = ids(found["masked_ids"]).long()
    places = masked_ids == SIZES["words"]["$"]
    states = tower.states(masked_ids, array("lincir.pseudo_tokens"), places)
    close(tower.text.ln_final(states), array("lincir.masked_last_states")[:, :states.shape[1]])
    close(tower.encode(masked_ids, array("lincir.pseudo_tokens"), places), "lincir.masked_embeddings")


def test_lincir_asks_as_the_original(composer):
    model, found = composer("LinCIR"), VALUES["lincir"]
    filled(model.phi, "lincir.phi")
    assert {name: list(value.shape) for name, value in model.phi.state_dict().items()} == found["phi_state_dict"]
    close(model.phi(array("lincir.images")), "lincir.phi_of_images")
    queries = found["queries"]
    raw = model.compose(array("lincir.images")[queries["image_of_each"]], ids(queries["ids"]))
    close(raw, "lincir.query_raw")
    close(model.as_query(raw), "lincir.query")


def test_lincir_trains_as_the_original(composer):
    model, found = composer("LinCIR"), VALUES["lincir"]
    filled(model.phi, "lincir.phi")
    optimizer = make_optimizer(model, found["learning_rate"], found["weight_decay"], "adamw")
    losses, captions = [], array("lincir.text_embeddings")
    for step in range(3):
        noise = array("lincir.u")[step][:, None] * array("lincir.n")[step]
        if step == 0:
            close(captions + noise, "lincir.noisy_input_of_step_0")
            close(model.phi(captions + noise), "lincir.estimated_tokens_of_step_0")
        said = model.features(captions, ids(found["masked_ids"]).long(), noise)
        loss = composition_losses(said, "soft_triplet")["total training loss"]
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        if f"gradient_norms_of_step_{step}" in found:
            norms = {name: weight.grad.norm().item() for name, weight in model.phi.named_parameters()}
            assert norms == pytest.approx(found[f"gradient_norms_of_step_{step}"], rel=2e-4)
        optimizer.step()
    assert losses == pytest.approx(found["losses_of_steps_0_1_2"], rel=1e-4)
    norms = {name: weight.norm().item() for name, weight in model.phi.named_parameters()}
    assert norms == pytest.approx(found["weight_norms_after_3_steps"], rel=1e-4)


def test_phi_of_the_published_size():
    with torch.device("meta"):
        phi = lincir.Phi(768, 768)
    assert {name: list(value.shape) for name, value in phi.state_dict().items()} == \
        VALUES["lincir"]["phi_state_dict_of_ViT_L_14"]
    assert sum(value.numel() for value in phi.parameters()) == VALUES["lincir"]["phi_weights_of_ViT_L_14"]
    ours = pic2word.Phi(24, 32).state_dict()
    assert {name: list(value.shape) for name, value in ours.items()} == \
        VALUES["pic2word"]["phi_state_dict_of_middle_512"]
    assert next(iter(ours)) == "fc_out.weight"


def test_pic2word_asks_and_trains_as_the_original(composer):
    model, found, images = composer("Pic2Word"), VALUES["pic2word"], array("pic2word.images")
    model.phi = filled(pic2word.Phi(24, 32, found["middle_dim"]), "pic2word.phi").eval()
    close(model.phi(images), "pic2word.phi_of_images")
    queries = found["queries"]
    asked = ids(queries["ids"])
    asked[asked == SIZES["words"]["*"]] = SIZES["words"]["$"]
    raw = model.compose(images[queries["image_of_each"]], asked)
    close(raw, "pic2word.query_raw")
    close(model.as_query(raw), "pic2word.query")
    bare = found["training_ids_before_the_token_goes_in"]
    end = bare.index(SIZES["end"])
    row = ids([[*bare[:end], SIZES["words"]["$"], *bare[end:-1]]]).long()
    assert row.argmax() == found["end_place_after"]
    said = model.text_tower.encode(row.expand(4, -1), model.phi(images), (row == SIZES["words"]["$"]).expand(4, -1))
    close(said, "pic2word.training_text")
    with torch.no_grad():
        model.a.fill_(np.log(found["logit_scale_after_exp"]))
    features = model.features(images, row)
    losses = composition_losses(features, "soft_triplet")
    assert losses["total training loss"].item() == pytest.approx(found["loss"], rel=1e-4)
    losses["total training loss"].backward()
    norms = {name: weight.grad.norm().item() for name, weight in model.phi.named_parameters()}
    assert norms == pytest.approx(found["gradient_norms"], rel=1e-4)
    decays = {id(weight): group.get("weight_decay", 0.1) for group in model.parameter_groups(1e-4)
              for weight in group["params"]}
    assert sorted(name for name, weight in model.phi.named_parameters() if not decays[id(weight)]) == \
        found["no_weight_decay"]


# BASIC, and the four that compose nothing

def units(name):
    return F.normalize(array(f"basic.{name}"), dim=1)


def test_the_four_that_compose_nothing():
    image, text, gallery = units("image"), units("text"), units("gallery")

    def scores(kind):
        self = type("Towers", (kind,), {"__init__": lambda self: None})()
        return self.score(self.compose(image, text), gallery)
    for name, kind in simple.SIMPLE.items():
        close(scores(kind), f"basic.{name}.scores")


def of_basic(variant):
    """The steps of a variant, by name."""
    settings = {**VALUES["basic"]["settings"], **VALUES["basic"]["variants"][variant]["changed"]}
    positive, gallery = units("positive"), units("gallery")
    mean = array("basic.other_mean")[0] if settings["use_laion_mean"] else gallery.mean(0)
    found = {"mean_image": mean[None], "mean_text": positive.mean(0)[None],
             "contrast_matrix": basic.contrast(positive, units("negative"))}
    project = (basic.projection(found["contrast_matrix"], settings["num_principal_components_for_projection"])
               if settings["project_features"] else torch.eye(len(mean)))
    text_mean = positive.mean(0)
    image, text, centred = units("image") - mean, units("text") - text_mean, gallery - mean
    before = image @ project
    if settings["do_query_expansion"]:
        image = basic.expanded(image, before @ centred.T, centred)
    found |= {"projection": project, "projected_images_before_expansion": before, "projected_images": image @ project}
    of_image, of_text = image @ project @ centred.T, text @ centred.T
    pictures, texts = units("synthetic_image") - mean, units("synthetic_text") - text_mean
    least = float((pictures @ pictures.T).min()), float((texts @ pictures.T).min())
    return {**found, "image_scores_raw": of_image, "text_scores_raw": of_text, "least": least,
            "scores": basic.combined(of_image, of_text, least if settings["normalize_similarities"] else None)}


@pytest.mark.parametrize("variant", [name for name in VALUES["basic"]["variants"] if name not in simple.SIMPLE])
def test_basic_scores_as_the_original(variant):
    found, known = of_basic(variant), VALUES["basic"]["variants"][variant]
    for step, values in found.items():
        if f"basic.{variant}.{step}" in ARRAYS:
            close(values, f"basic.{variant}.{step}")
    if known.get("components_kept"):
        assert torch.linalg.matrix_rank(found["projection"], tol=1e-3) == known["components_kept"]
    if "image_minimum" in known:
        assert found["least"] == pytest.approx((known["image_minimum"], known["text_minimum"]), rel=1e-4)
    if "ranks" in known:
        assert found["scores"].argsort(dim=1, descending=True, stable=True).tolist() == known["ranks"]


class OfGolden(basic.BASIC):
    """BASIC of the golden vectors, with no towers: what it would have read and made of corpora."""

    def __init__(self, variant):
        torch.nn.Module.__init__(self)
        settings = {**VALUES["basic"]["settings"], **VALUES["basic"]["variants"][variant].get("changed", {})}
        self.image_dim, self.expansion = units("gallery").shape[1], 25 * settings["do_query_expansion"]
        for name, rows in {"subjects": units("positive"),
                           "projection": basic.projection(basic.contrast(units("positive"), units("negative")),
                                                          settings["num_principal_components_for_projection"]),
                           "given_mean": array("basic.other_mean")[:int(settings["use_laion_mean"])],
                           "given_pictures": units("synthetic_image"), "given_texts": units("synthetic_text")}.items():
            self.register_buffer(name, rows)


@pytest.mark.parametrize("variant", [
    name for name, told in VALUES["basic"]["variants"].items() if name not in simple.SIMPLE
    and not {"normalize_similarities", "project_features", "standardize_features"} & told.get("changed", {}).keys()])
def test_the_composer_scores_as_the_original_of_what_it_is_given(variant):
    model, gallery = OfGolden(variant), units("gallery")
    model.meet(gallery)
    close(model.score(model.as_query(model.compose(array("basic.image"), array("basic.text"))), gallery),
          f"basic.{variant}.scores")


def test_a_text_in_context():
    told = VALUES["basic"]["contextualised"]
    vector = dict(zip(told["text_table"], F.normalize(array("basic.text_table"), dim=1), strict=True))
    words = told["corpus_rows"][:told["number"]]
    found = torch.stack([torch.stack([vector[text] for text in basic.in_context(text, words)]).mean(0)
                         for text in told["texts"]])
    close(found, "basic.contextualised")


def test_less_than_one_component_is_refused():
    with pytest.raises(ValueError, match="share of the energy"):
        basic.projection(torch.eye(3), 0.9)


# Captions

def placed(words, tags, text):
    """Where each word of a text begins and ends, with its tag."""
    found, at = [], 0
    for word, tag in zip(words, tags, strict=True):
        at = text.index(word, at)
        found.append((at, at + len(word), tag))
        at += len(word)
    return found


@pytest.mark.parametrize("told", VALUES["lincir"]["masking"], ids=lambda told: told["caption"] or "empty")
def test_whole_runs_make_way_each_at_its_own_place(told):
    text = clean(told["caption"])
    assert text == told["cleaned"]
    found = masked(text, placed(told["words"], told["tags"], text), np.random.default_rng(0))
    if told["masked_whole_words"] is not None:
        assert found == told["masked_whole_words"].replace("[$]", "$")
    else:                                                                       # one word, by chance
        words = told["words"]
        ways = [" ".join([*words[:i], "$", *words[i + 1:]]) for i in range(len(words))] or ["$"]
        assert " ".join(found.split()) in ways


def test_fashion_iqs_captions_in_both_orders(composer):
    """FashionIQ's two captions, stripped, joined either way, and the mean of the two unit queries."""
    from datasets import FashionIQ
    from test_retrieval import compose_queries

    model, found = composer("LinCIR"), VALUES["lincir"]
    filled(model.phi, "lincir.phi")
    asked = found["fashioniq_queries"]
    words = {"is": 27, "darker": 28, "has": 29, "longer": 30, "sleeves": 31, "no": 32, "collar": 33, "blue": 20,
             **{word: SIZES["words"][word] for word in SIZES["words"]}}

    def row(text):
        """As the golden set's made-up words are numbered."""
        told = model.template.replace("{}", text).split()
        return [SIZES["start"], *(words[word] for word in told), SIZES["end"]]
    model.encode_text = lambda texts: ids([(row(text) + [0] * SIZES["context"])[:SIZES["context"]] for text in texts])
    data = FashionIQ.__new__(FashionIQ)
    data.caption_form, data.category = "both", "all"
    texts = [data.text("dress", captions) for captions in asked["captions"]]
    found = compose_queries(model, array("lincir.images"), torch.tensor(asked["image_of_each"]), texts)
    close(found, "lincir.fashioniq_query")
