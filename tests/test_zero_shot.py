"""Zero-shot composers in the program: what they read, train, are tested, searched and exported as, and what is refused.
Towers are small random ones, saved to a file, which goes through the same loading as any."""

import json
import pickle
import re
import shlex
import subprocess
import sys

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import main
import search
from benchmarks.masking import by_rule, masked
from benchmarks.pictures import Pictures
from benchmarks.texts import Texts
from data import check
from img_text_composition_models import MODELS, Recipe
from machine.errors import InputError
from searching.gallery import Gallery, load_model
from test_retrieval import ranks_of_right
from training import checkpoint
from training.corpora import read_given
from zero_shot import prompts

from .conftest import TOWER, flags, picture, run_main, some, write_cirr, write_fashion_iq, write_mitstates
from .services import ROOT
from .test_distributed import only_run, run, torchrun
from .test_text_encoders import clip_flags
from .zero_shot_trees import TREES

CAPTIONS = ["a red dog runs on the grass", "Two blue buses, parked.", "an old <PERSON> with $5", "the snow", "running"]
ADAMW = {"optimizer": "adamw", "learning_rate": 1e-3, "weight_decay": 0.01}


@pytest.fixture(scope="module")
def world(tmp_path_factory, tower):
    """A data set, captions and corpora; and what makes a model of these towers."""
    root = tmp_path_factory.mktemp("world")
    write_mitstates(root / "mitstates")
    (root / "captions.txt").write_text("\n".join(CAPTIONS * 3) + "\n")
    (root / "subjects.txt").write_text("dog\nbus\ntomato\nfig\n")
    (root / "styles.txt").write_text("a cartoon\nin snow\nold\n")
    for number in range(10):
        picture(root / "pictures" / f"{number}.jpg")
    return root


@pytest.fixture(scope="module")
def made(tower):
    def make(name, **how):
        model = Recipe(name, "open_clip:two-towers", 32, 0, "open_clip:two-towers", 0, {}, **how).build()
        model.load_weights(str(tower[0]))
        return model.eval()
    return make


def changes(tower, **more):
    return {**clip_flags(tower[0]), "image_size": 32, "batch_size": 4, **more}


# The text tower

def test_a_row_cut_after_its_end_says_the_same(made, tower):
    texts = ["a dog", "a much longer text about a red bus in snow", ""]
    ours = made("text").text_tower
    with torch.no_grad():
        expected = tower[1].encode_text(open_clip.get_tokenizer("two-towers")(texts))
        torch.testing.assert_close(ours.encode(ours.ids(texts)), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.encode(ours.ids(texts[:1])), expected[:1], rtol=1e-4, atol=1e-5)


def test_each_row_has_its_own_placeholders(made):
    """One, two, at other places, and a row without any: each as if it were asked alone with its word put in."""
    model = made("LinCIR")
    reader, texts = model.text_tower, ["a photo of $ that is red", "$ on $", "no picture here"]
    words = torch.randn(3, reader.width, generator=torch.Generator().manual_seed(0))
    ids = reader.ids(texts)
    together = reader.encode(ids, words, ids == reader.picture_id)
    table = reader.text.token_embedding
    for row, word in enumerate(words):
        kept = table.weight[reader.picture_id].clone()
        with torch.no_grad():
            table.weight[reader.picture_id] = word
            alone = reader.encode(ids[row:row + 1])[0]
            table.weight[reader.picture_id] = kept
        torch.testing.assert_close(together[row], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("text", ["costs $5 and $ 5", "a * star", "$", "**$$"])
def test_a_users_dollar_is_no_placeholder(made, text):
    model = made("LinCIR")
    ids = model.encode_text([text])
    assert (ids == model.text_tower.picture_id).sum() == 1


def test_a_users_text_does_not_end_the_sentence_before_the_pictures_word(made):
    model = made("LinCIR", prompt="a {} $")
    ids = [model.encode_text([text]).tolist() for text in ("red <END_of_text>", "<start_of_text>red", "red")]
    assert ids[0] == ids[1] == ids[2]


def test_a_long_text_keeps_the_pictures_word_and_the_end(made):
    model = made("Pic2Word", prompt="a {} of $")
    ids = model.encode_text(["word " * 100, "x" * 4000, "short"]).long()
    assert ids.shape == (3, 16) and (ids == model.text_tower.picture_id).sum(1).tolist() == [1, 1, 1]
    assert (ids.max(1).values == 49407).all()
    assert made("sum").encode_text(["word " * 100]).isfinite().all()


def test_prompts_by_name_and_of_ones_own():
    assert prompts.with_word(prompts.template_of("auto", "lincir"), "is $ red") == "a photo of $ that is red"
    assert prompts.with_word(prompts.template_of("pic2word", "lincir"), "is red") == "a photo of $ , is red"
    assert prompts.without_word(prompts.template_of("pic2word_domain", "text"), "cartoon") == "a cartoon of"
    assert prompts.with_word("a photo of $ that {}", " ") == "a photo of $"
    assert prompts.with_word("see {} {0} {", "a {} b") == prompts.with_word("see {} {0} {", "a {} b")
    for wrong in ("no place", "{} {}"):
        with pytest.raises(ValueError, match="in which one"):
            prompts.template_of(wrong, "text")
    assert set(prompts.UNTRAINED) == {name for name, kind in MODELS.items() if not kind.learns_from}


# What they compose

def test_the_four_are_the_cosines_by_hand(made):
    numbers = torch.Generator().manual_seed(1)
    images, gallery = torch.randn(3, 24, generator=numbers), F.normalize(torch.randn(7, 24, generator=numbers), dim=1)
    for name, rule in {"image": lambda i, t: i, "text": lambda i, t: t, "sum": lambda i, t: i + t,
                       "product": lambda i, t: max(i, 0) * max(t, 0)}.items():
        model = made(name)
        with torch.no_grad():
            text = model.encode_text(["is red", "", "old dog"])
            scores = model.score(model.as_query(model.compose(images, text)), gallery)
        for q in range(3):
            cosine = [[float(F.cosine_similarity(vector, other, dim=0)) for other in gallery]
                      for vector in (images[q], text[q])]
            by_hand = [rule(*pair) for pair in zip(*cosine, strict=True)]
            assert scores[q].argsort(stable=True).tolist() == torch.tensor(by_hand).argsort(stable=True).tolist()


def test_basic_ranks_few_images_as_step_by_step(made, world):
    """Fewer images than neighbours: all are taken. The query vector's score is that of the steps, one by one."""
    corpora = [(world / f"{name}.txt").read_text().split("\n")[:-1] for name in ("subjects", "styles")]
    model = made("BASIC", corpora=corpora)
    numbers = torch.Generator().manual_seed(2)
    image, gallery = torch.randn(1, 24, generator=numbers), F.normalize(torch.randn(5, 24, generator=numbers), dim=1)
    with torch.no_grad():
        model.meet(gallery)
        text = model.encode_text(["is red"])
        found = model.score(model.as_query(model.compose(image, text)), gallery)[0]
        sentences = [f"{word} is red" for word in corpora[0]] + [f"is red {word}" for word in corpora[0]]
        context = torch.stack([F.normalize(model.encode_captions([sentence])[0], dim=0) for sentence in sentences])
        mean, subjects = gallery.mean(0), F.normalize(model.encode_captions(corpora[0]), dim=1)
        asked = F.normalize(image[0], dim=0) - mean
        near = torch.cat([gallery - mean, asked[None]])
        similar = torch.cat([(gallery - mean) @ (model.projection @ asked), torch.ones(1)])
        grown = model.projection @ ((0.1 * similar).exp() / (0.1 * similar).exp().sum() @ near)
        told = F.normalize(context.mean(0), dim=0) - subjects.mean(0)
        least = [((gallery - mean) @ (rows - rows_mean).T).min() for rows, rows_mean in (
            (gallery, mean), (subjects, subjects.mean(0)))]
        of_image = (((gallery - mean) @ grown - least[0]) / least[0].abs()).clamp(min=0)
        of_text = (((gallery - mean) @ told - least[1]) / least[0].abs()).clamp(min=0)
    torch.testing.assert_close(found, of_image * of_text - 0.1 * (of_image + of_text) ** 2, rtol=1e-4, atol=1e-4)


def test_basic_ranks_one_image_or_equal_ones(made):
    model = made("BASIC", corpora=[["dog", "bus"], ["red", "old"]])
    with torch.no_grad():
        for count in (1, 3):
            gallery = F.normalize(torch.ones(count, 24), dim=1)
            model.meet(gallery)
            query = model.as_query(model.compose(torch.ones(1, 24), model.encode_text(["is red"])))
            assert model.score(query, gallery).isfinite().all()


def test_ranks_by_a_models_own_score(made):
    """Ties go to the earlier image, as ever: the product's zeros."""
    from benchmarks.metrics import Metric

    gallery = F.normalize(torch.tensor([[1.0, -1.0], [-1.0, 1.0], [1.0, 1.0], [-1.0, -1.0]]), dim=1)
    query = torch.tensor([[1.0, 0.0, 0.0, 1.0]])                                # along x, and along y
    metric = Metric("m", np.array([3]), np.arange(4))

    def product(queries, images):
        return MODELS["product"].score(None, queries, images)
    assert ranks_of_right(query, gallery, np.array([-1]), [metric], score=product)[0].tolist() == [[3]]
    assert ranks_of_right(query, gallery, np.array([0]), [metric], score=product)[0].tolist() == [[2]]
    own, listed = np.array([-1]), np.array([[3, 0, 2, -1]])                     # a gallery of its own: columns
    assert ranks_of_right(query, gallery, own, [Metric("m", np.array([0]), np.arange(4))], score=product,
                          galleries=listed)[0].tolist() == [[1]]


# Masking

@pytest.mark.parametrize(("caption", "expected"), [
    ("a red dog runs on the grass", "$ runs on $"), ("two blue buses, parked.", "two $, parked."),
    ("the snow", "$"), ("a cat is sleeping quietly in a big box", "$ is sleeping quietly in $"),
    ("art of a cart", "$ of $"), ("", "$"), ("an e-mail  from grandma's 2 cats", "$  from $ 2 $")])
def test_the_rule_where_spacy_is_not(caption, expected):
    assert masked(caption, by_rule(caption), np.random.default_rng(0)) == expected


def test_without_a_noun_a_word_by_chance_makes_way():
    found = {masked("running  slowly", by_rule("running  slowly"), np.random.default_rng(seed)) for seed in range(20)}
    assert found == {"$  slowly", "running  $"}


def test_captions_are_cleaned_and_drawn_the_same_again(world):
    data = Texts(world / "captions.txt", "train")
    assert data.images[:3] == ["a red dog runs on the grass", "two blue buses, parked.", "an old person with 5"]
    order = np.arange(len(data))
    assert [data.sample(order, 4, (0, 1)).text for _ in range(3)] == ["$"] * 3
    train, held = (Texts(world / "captions.txt", split, held_out=0.7) for split in ("train", "validation"))
    assert not set(train.images) & set(held.images) and set(train.images) | set(held.images) == set(data.images)


def test_pictures_are_found_in_folders_below(tmp_path):
    for name in ("a.jpg", "b/c.png", "b/._d.jpg"):
        picture(tmp_path / name)
    assert Pictures(tmp_path, "train").images == ["a.jpg", "b/c.png"]
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="no picture"):
        Pictures(tmp_path / "none", "train")


# Runs

@pytest.mark.long("two runs and a test")
def test_lincir_learns_from_captions_goes_on_and_is_tested(world, tower, tmp_path, capsys):
    logs = tmp_path / "logs"
    how = {**changes(tower), **ADAMW, "model": "LinCIR"}
    run = run_main("texts", world / "captions.txt", logs, **how, num_iters=6)
    said = capsys.readouterr()
    assert "15 captions, masked by" in said.out + said.err
    state = torch.load(run.checkpoint, weights_only=True)
    first, weights = tower[1].state_dict(), state["model_state_dict"]
    assert all(torch.equal(weights[f"text_tower.clip.{name}"], value) for name, value in first.items()
               if not name.startswith("visual."))
    assert all(torch.equal(weights[f"img_model.backbone.{name.removeprefix('visual.')}"], value)
               for name, value in first.items() if name.startswith("visual."))
    half = run_main("texts", world / "captions.txt", tmp_path / "half", **how, num_iters=3)
    assert main.main(flags("texts", world / "captions.txt", tmp_path / "half", **how, num_iters=6,
                           resume=half.checkpoint)) == 0
    again = torch.load(half.checkpoint, weights_only=True)["model_state_dict"]
    assert all(torch.equal(again[name], value) for name, value in weights.items())
    tested = run_main("mitstates", world / "mitstates", tmp_path / "tests", test_only=True, baselines=True,
                      model_checkpoint=run.checkpoint, image_size=None, image_weights=None, image_encoder=None)
    methods = set(tested.metrics["baselines"])
    assert {"test source image alone", "test text alone", "test image + text", "test image x text"} <= methods
    assert (world / "image_cache").is_dir()                                     # captions' vectors are kept there


def test_pic2word_learns_from_pictures(world, tower, tmp_path):
    run = run_main("pictures", world / "pictures", tmp_path / "logs", **changes(tower), **ADAMW, model="Pic2Word",
                   num_iters=4, validation=0.3)
    lines = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    assert any("pictures_word_loss" in line for line in lines) and "validation" in run.metrics


@pytest.mark.parametrize("name", some(["product", "BASIC", "sum", "image", "text"], 2))
def test_what_learns_nothing_is_tested_kept_searched_and_exported(name, world, tower, tmp_path, caplog):
    more = {"subjects": world / "subjects.txt", "styles": world / "styles.txt"} if name == "BASIC" else {}
    run_logs = tmp_path / "logs"
    assert main.main(flags("mitstates", world / "mitstates", run_logs, **changes(tower), **more, model=name,
                           test_only=True)) == 0
    (folder,) = run_logs.iterdir()
    metrics, kept = json.loads((folder / "metrics.json").read_text()), folder / "best_checkpoint.pth"
    again = run_main("mitstates", world / "mitstates", tmp_path / "again", test_only=True, model_checkpoint=kept,
                     image_size=None, image_weights=None, image_encoder=None)
    assert again.metrics["test"] == metrics["test"]
    index, out = tmp_path / "index", tmp_path / "model"
    assert search.main(["index", f"--model_checkpoint={kept}", f"--images={world / 'pictures'}", f"--out={index}"]) == 0
    assert f"as it has no networks: {name} reads a text within its prompt" in caplog.text
    gallery = Gallery(index, "cpu")
    hits = gallery.search(world / "pictures" / "3.jpg", "is red", 6)
    assert len(hits) == 6 and [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert gallery.search(world / "pictures" / "3.jpg", "", 1)[0].path.name == "3.jpg"
    assert search.main(["export", f"--model_checkpoint={kept}", f"--out={out}"]) == 0
    theirs, ours = (load_model(path, "cpu").encode([world / "pictures" / "3.jpg"]) for path in (kept, out))
    assert np.array_equal(theirs, ours)
    if name == "product":
        with pytest.raises(InputError, match="leave it out"):
            gallery.search(world / "pictures" / "3.jpg", "is red", 6, nearness=0.5)
        model = gallery.encoder.model
        features = torch.from_numpy(load_model(kept, "cpu").encode([hit.path for hit in hits]))
        query = torch.from_numpy(load_model(kept, "cpu").compose(world / "pictures" / "3.jpg", "is red"))
        by_hand = (features @ query[:24]).clamp(min=0) * (features @ query[24:]).clamp(min=0)
        assert [hit.score for hit in hits] == pytest.approx(by_hand.tolist(), abs=1e-6)
        assert model.query_dim == 48


@pytest.fixture(scope="module")
def local(tower, tmp_path_factory):
    """A folder of the same model in open_clip's form, which other processes know, too."""
    folder = tmp_path_factory.mktemp("local")
    preprocessing = {"size": 32, "mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": TOWER, "preprocess_cfg": preprocessing}))
    save_file({name: value.contiguous() for name, value in tower[1].state_dict().items()},
              folder / "open_clip_model.safetensors")
    name = f"open_clip:local-dir:{folder}"
    return {"image_encoder": name, "text_encoder": name, "image_size": 32, "image_weights": "imagenet"}


def kept(run_logs):
    return max(run_logs.glob("*/best_checkpoint.pth"), key=lambda path: path.stat().st_mtime_ns)


@pytest.mark.long("torch.onnx takes seconds")
def test_sum_is_written_as_onnx_and_what_is_no_vector_is_refused(world, local, tmp_path, capsys):
    import onnxruntime

    def untrained(name):
        logs = tmp_path / name
        assert main.main(flags("mitstates", world / "mitstates", logs, **local, model=name, test_only=True)) == 0
        return kept(logs)
    out = tmp_path / "out"
    assert search.main(["export", f"--model_checkpoint={untrained('sum')}", f"--out={out}", "--onnx"]) == 0
    model, rows = load_model(out, "cpu").model, torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(0))
    (query,) = onnxruntime.InferenceSession(out / "composer.onnx").run(
        None, {"image": rows[0].numpy(), "text": rows[1].numpy()})
    by_hand = F.normalize(sum(F.normalize(each, dim=1) for each in rows), dim=1)
    np.testing.assert_allclose(query, by_hand.numpy(), atol=1e-5)
    pixels = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    (feature,) = onnxruntime.InferenceSession(out / "image_encoder.onnx").run(None, {"pixels": pixels.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(feature, model.encode_image(pixels).numpy(), atol=1e-4)
    assert "text tower is not among them" in (out / "README.md").read_text()
    capsys.readouterr()
    assert search.main(["export", f"--model_checkpoint={untrained('product')}", f"--out={tmp_path / 'no'}",
                        "--onnx"]) == 2
    assert "leave --onnx out" in capsys.readouterr().err and not (tmp_path / "no").exists()


@pytest.mark.rare("jobs of two processes")
def test_several_processes_train_and_test_as_one(world, local, tmp_path):
    """LinCIR's towers stay the file's; the test of BASIC, whose corpora the first process alone reads, is that of one
    process."""
    def shared(dataset, place, logs, **how):
        run(*torchrun(2, "main.py", *flags(dataset, place, logs, batch_size=4, **how)))
        return only_run(logs)
    trained = shared("texts", world / "captions.txt", tmp_path / "trained", **local, **ADAMW, model="LinCIR",
                     num_iters=3)
    weights = torch.load(trained.checkpoint, weights_only=True)["model_state_dict"]
    alone = Recipe("LinCIR", local["image_encoder"], 32, 0, local["text_encoder"], 0, {}).build()
    alone.load_weights("imagenet")
    assert all(torch.equal(value, weights[name]) == (not name.startswith("phi."))
               for name, value in alone.state_dict().items())
    two, one = (make("mitstates", world / "mitstates", tmp_path / make.__name__, **local, model="BASIC", test_only=True,
                     subjects=world / "subjects.txt", styles=world / "styles.txt") for make in (shared, run_main))
    assert two.metrics["test"] == one.metrics["test"]


def given_files(folder, rows=5, width=24):
    """What BASIC may be given: a mean of pictures, and made-up vectors."""
    numbers = np.random.default_rng(0)
    mean, made_up = 0.1 * numbers.normal(size=width), numbers.normal(size=(2, rows, width)).astype("float32")
    np.save(folder / "mean.npy", mean)
    torch.save({"laion_1m_mean": torch.from_numpy(mean).float()[None]}, folder / "mean.pt")
    np.savez(folder / "made_up.npz", image_features=made_up[0], text_features=made_up[1])
    return mean, made_up


def test_what_basic_is_given_stays_with_it(world, tower, tmp_path, capsys):
    """The mean and the least similarities are those of the files, whichever kind, not the gallery's; the checkpoint has
    them, an index and an export, too."""
    mean, made_up = given_files(tmp_path)
    how = {**changes(tower), "model": "BASIC", "test_only": True, "subjects": world / "subjects.txt",
           "styles": world / "styles.txt", "expansion": 0, "contexts": 0}

    def tested(**more):
        assert main.main(flags("mitstates", world / "mitstates", tmp_path / "logs", **how, **more)) == 0
        said = capsys.readouterr()
        return (said.out + said.err), max((tmp_path / "logs").glob("*/best_checkpoint.pth"),
                                          key=lambda path: path.stat().st_mtime_ns)
    said, file = tested(pictures_mean=tmp_path / "mean.pt", synthetic=tmp_path / "made_up.npz")
    assert "4 subjects, none of them read beside a text; queries averaged with no image; nothing estimated" in said
    model = checkpoint.rebuild_model(file)
    gallery, other = F.normalize(torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(0)), dim=2)
    model.meet(gallery)
    pictures, texts = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in made_up)
    texts_mean = model.subjects.mean(0).numpy()
    assert model.least == pytest.approx((((pictures - mean) @ (pictures - mean).T).min(),
                                         ((texts - texts_mean) @ (pictures - mean).T).min()), rel=1e-5)
    with torch.no_grad():
        image, text = other[:2], model.encode_text(["is red", "old"])
        found = model.score(model.as_query(model.compose(image, text)), gallery)
    torch.testing.assert_close(text, F.normalize(model.encode_captions(["is red", "old"]), dim=1))  # of no word beside
    centred = gallery - torch.from_numpy(mean).float()
    by_hand = [((other[:2] - torch.from_numpy(mean).float()) @ model.projection @ centred.T, model.least[0]),
               ((text - model.subjects.mean(0)) @ centred.T, model.least[1])]
    of_image, of_text = (((rows - least) / abs(model.least[0])).clamp(min=0) for rows, least in by_hand)
    torch.testing.assert_close(found, of_image * of_text - 0.1 * (of_image + of_text) ** 2, rtol=1e-4, atol=1e-5)
    assert search.main(["index", f"--model_checkpoint={file}", f"--images={world / 'pictures'}",
                        f"--out={tmp_path / 'index'}"]) == 0
    assert torch.equal(Gallery(tmp_path / "index", "cpu").encoder.model.given_pictures, model.given_pictures)
    again, _ = tested(pictures_mean=tmp_path / "mean.npy")
    assert "averaged with no image; the least similarities estimated from the gallery" in again
    how = {name: value for name, value in how.items() if name in ("test_only", "subjects")}
    assert main.main(flags("mitstates", world / "mitstates", tmp_path / "logs", **how, model_checkpoint=file,
                           image_encoder=None, image_weights=None, image_size=None)) == 2
    assert "leave them out" in capsys.readouterr().err


@pytest.mark.parametrize(("flag", "content", "told"), [
    ("pictures_mean", {"mean": torch.zeros(2, 24)}, "not one vector"),
    ("pictures_mean", {"mean": torch.zeros(1, 30)}, "30 numbers, this model's have 24"),
    ("pictures_mean", {"mean": torch.full((1, 24), torch.nan)}, "not finite"),
    ("synthetic", {"image_features": torch.zeros(3, 24)}, "image_features and text_features"),
    ("synthetic", {"image_features": [1.0], "text_features": [1.0]}, "other things than arrays"),
    ("synthetic", None, "a pickled file of the original"), ("pictures_mean", None, "a pickled file of the original")])
def test_vectors_that_do_not_fit_are_one_line(flag, content, told, world, tower, tmp_path, capsys):
    file = tmp_path / ("x.pt" if content else "x.npy")
    if content:
        torch.save(content, file)
    else:                                                                       # as the original's is
        np.save(file, {"image_features": np.zeros((3, 24)), "text_features": np.zeros((3, 24))}, allow_pickle=True)
    assert main.main(flags("mitstates", world / "mitstates", tmp_path / "logs", **changes(tower), **{
        "model": "BASIC", "test_only": True, "subjects": world / "subjects.txt", "styles": world / "styles.txt",
        flag: file})) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("main.py: error: ") and told in error and "Traceback" not in error


@pytest.mark.long("two processes")
def test_the_originals_pickles_are_made_files_of_arrays_as_the_page_says(tmp_path):
    _, made_up = given_files(tmp_path)
    mean = torch.load(tmp_path / "mean.pt", weights_only=True)
    (tmp_path / "laion_1m_mean_clip.pkl").write_bytes(pickle.dumps(mean))
    content = {"image_features": made_up[0], "text_features": made_up[1], "prompts": ["a dog"]}
    np.save(tmp_path / "dataset_1_sd_clip.pkl.npy", content, allow_pickle=True)
    for line in re.findall(r"^python -c .*$", (ROOT / "docs" / "zero-shot.md").read_text(), re.M):
        subprocess.run([sys.executable, *shlex.split(line)[1:]], check=True, cwd=tmp_path)
    found = read_given(tmp_path / "mean.npy", tmp_path / "synthetic.npz")
    torch.testing.assert_close(found["given_mean"], mean["laion_1m_mean"])
    torch.testing.assert_close(found["given_texts"], F.normalize(torch.from_numpy(made_up[1]), dim=1))


def released(kind, path, width=32):
    """A file as the original's training writes it."""
    from zero_shot import lincir, pic2word

    if kind == "LinCIR":
        content = {"epoch": 3, "Phi": lincir.Phi(24, width).state_dict()}
    else:
        phi = {f"module.{name}": value for name, value in pic2word.Phi(24, width).state_dict().items()}
        content = {"epoch": 3, "name": "x", "state_dict": {"module.visual.proj": torch.zeros(2, 2)},
                   "state_dict_img2text": phi, "optimizer": {"state": {}, "param_groups": []}}
    torch.save(content, path)
    return content


@pytest.mark.parametrize("kind", some(["LinCIR", "Pic2Word"]))
def test_the_originals_files_load(kind, world, tower, tmp_path, capsys):
    content = released(kind, tmp_path / "phi.pt")
    how = {**changes(tower), "model": kind, "test_only": True, "model_checkpoint": tmp_path / "phi.pt"}
    assert main.main(flags("mitstates", world / "mitstates", tmp_path / "logs", **how)) == 0
    (folder,) = (tmp_path / "logs").iterdir()
    whole = checkpoint.load(folder / "best_checkpoint.pth")["model_state_dict"]
    theirs = content.get("Phi") or {name.removeprefix("module."): value
                                    for name, value in content["state_dict_img2text"].items()}
    assert all(torch.equal(whole[f"phi.{name}"], value) for name, value in theirs.items())
    released(kind, tmp_path / "phi.pt", width=40)
    capsys.readouterr()
    assert main.main(flags("mitstates", world / "mitstates", tmp_path / "logs", **how)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "(40" in error and "another CLIP model" in error


# What is refused, in one line

@pytest.mark.parametrize(("dataset", "how", "told"), [
    ("mitstates", {"model": "sum"}, "learns nothing: pass --test_only True"),
    ("pictures", {"model": "LinCIR"}, "learns from texts"),
    ("mitstates", {"model": "Pic2Word"}, "choose one of pictures"),
    ("texts", {"model": "tirg"}, "learns from triplets"),
    ("mitstates", {"model": "sum", "test_only": True, "text_encoder": "lstm"}, "both towers of one CLIP model"),
    ("mitstates", {"model": "sum", "test_only": True, "image_encoder": "mobilenet_v3_small"}, "both towers"),
    ("mitstates", {"model": "BASIC", "test_only": True}, "--subjects FILE"),
    ("mitstates", {"model": "text", "test_only": True, "prompt": "a photo"}, "one {}"),
    ("texts", {"model": "LinCIR", "prompt": "a photo that {}"}, "has no $")])
def test_what_does_not_go_together_is_refused(dataset, how, told, world, tower, tmp_path, capsys):
    place = {"texts": "captions.txt"}.get(dataset, dataset)
    capsys.readouterr()
    assert main.main(flags(dataset, world / place, tmp_path / "logs", **{**changes(tower), **how})) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert told in error[-1] and "Traceback" not in "".join(error)


def test_weights_of_transformers_load(tmp_path, tower):
    """A CLIP model of transformers, as it saves one, and open_clip's of the same sizes: the same vectors."""
    from transformers import CLIPConfig, CLIPModel

    text, vision = {"hidden_act": "quick_gelu", "intermediate_size": 128, "hidden_size": 32, "num_attention_heads": 2,
                    "num_hidden_layers": 1}, {"image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    theirs = CLIPModel(CLIPConfig(text_config={**text, "max_position_embeddings": 16, "vocab_size": 49408,
                                               "eos_token_id": 49407},
                                  vision_config={**text, **vision}, projection_dim=24)).eval()
    theirs.save_pretrained(tmp_path / "clip")
    (tmp_path / "quick-towers.json").write_text(json.dumps({**TOWER, "quick_gelu": True}))
    open_clip.add_model_config(tmp_path / "quick-towers.json")
    model = Recipe("sum", "open_clip:quick-towers", 32, 0, "open_clip:quick-towers", 0, {}).build()
    model.load_weights(str(tmp_path / "clip" / "model.safetensors"))
    ids = model.text_tower.ids(["a red dog", "snow"])
    pixels = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        close = {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(model.text_tower.encode(ids), vectors(theirs.get_text_features(ids)), **close)
        torch.testing.assert_close(model.eval().encode_image(pixels),
                                   vectors(theirs.get_image_features(model.normalized(pixels))), **close)


def vectors(answer):
    """transformers 5 wraps them."""
    return answer if isinstance(answer, torch.Tensor) else answer.pooler_output


@pytest.mark.parametrize(("dataset", "place", "told"), [("texts", "captions.txt", 15), ("pictures", "pictures", 10)])
def test_check_says_what_such_data_hold(dataset, place, told, world, tmp_path, capsys):
    out = tmp_path / "check.html"
    assert check.main(["--dataset", dataset, "--dataset_path", str(world / place), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"training samples  {told}" in said and "nothing is wrong" in said and out.exists() == (dataset != "texts")


@pytest.mark.parametrize(("dataset", "name"), some([("genecis", "product"), ("circo", "BASIC"), ("imagenet_r", "sum"),
                                                    ("shoes", "product"), ("lasco", "text"), ("fashionIQ", "LinCIR"),
                                                    ("cirr", "product")]))
def test_every_benchmark_is_asked(dataset, name, world, tower, tmp_path, capsys):
    """Of GeneCIS each query has a gallery of its own, which a composer scores in its own way."""
    trees = {**TREES, "cirr": write_cirr, "fashionIQ": write_fashion_iq}
    root, more = trees[dataset](tmp_path / "data") or tmp_path / "data", {"test_only": True, "model": name}
    if name == "BASIC":
        more |= {"subjects": world / "subjects.txt", "styles": world / "styles.txt"}
    if name == "LinCIR":
        released(name, tmp_path / "phi.pt")
        more |= {"model_checkpoint": tmp_path / "phi.pt", "caption_form": "both"}
    run = run_main(dataset, root, tmp_path / "logs", **changes(tower), **more)
    assert all(0 <= value <= 1 for value in run.metrics["test"].values()) and run.metrics["test"]
    assert run.metrics["protocol"]["test"]["text"]
