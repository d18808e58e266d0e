"""Whole runs through main([...]) on tiny trees: what is trained, tested, saved and logged, and that it repeats."""

import argparse
import itertools
import json
import re
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest
import torch
import torchvision

import main
from datasets import DATASETS
from img_text_composition_models import MODELS, OF_TRIPLETS
from machine.errors import InputError
from machine.image_store import ImageStore
from test_retrieval import evaluate
from text_model import SimpleVocab
from torch_function import LOSSES
from training import checkpoint
from training.writers import tag

from . import golden
from .conftest import WRITERS, Run, flags, run_main, some

ROOT = Path(main.__file__).parent
PUBLISHED = {
    "mitstates_tirg_original": "--dataset=mitstates --model=tirg --loss=soft_triplet "
        "--learning_rate_decay_frequency=50000 --num_iters=160000 --weight_decay=5e-5",
    "mitstates_tirg_complete_text_query": "--dataset=mitstates --model=tirg --loss=soft_triplet "
        "--learning_rate_decay_frequency=50000 --num_iters=160000 --weight_decay=5e-5 --use_complete_text_query True",
    "mitstates_tirg_bert": "--dataset=mitstates --model=tirg --loss=soft_triplet "
        "--learning_rate_decay_frequency=50000 --num_iters=160000 --weight_decay=5e-5 --use_bert True",
    "fashion200k_composeAE": "--dataset=fashion200k --model=composeAE --loss=batch_based_classification "
        "--learning_rate_decay_frequency=50000 --num_iters=160000 --use_bert True --use_complete_text_query True "
        "--weight_decay=5e-5",
    "fashionIQ_RealSpaceConcatAE": "--dataset=fashionIQ --model=RealSpaceConcatAE --loss=batch_based_classification "
        "--learning_rate_decay_frequency=8000 --num_iters=100000 --use_bert True --use_complete_text_query True",
}


def settings():
    """Benchmark, composer and loss: each benchmark, each composer and each loss once, then all others."""
    every = list(itertools.product(WRITERS, OF_TRIPLETS, LOSSES))
    first = [("mitstates", "tirg", "soft_triplet"), ("fashion200k", "composeAE", "batch_based_classification"),
             ("fashionIQ", "RealSpaceConcatAE", "batch_based_classification"),
             ("mitstates", "composeAE", "soft_triplet")]
    return [*first, *(one for one in every if one not in first)]


@pytest.mark.parametrize(("name", "model", "loss"), some(settings(), 4))
def test_every_composer_and_loss_trains_on_every_benchmark(tmp_path, name, model, loss, capsys):
    path = WRITERS[name](tmp_path / name)
    run = run_main(name, path, tmp_path / "logs", model=model, loss=loss, comment="_x")
    assert re.fullmatch(r"[A-Z][a-z]{2}\d\d_\d\d-\d\d-\d\d_.*_x", run.folder.name)
    assert list(run.metrics) == ["it", "train", "test", "protocol"] and run.metrics["it"] == 3
    for split in ("train", "test"):
        assert run.metrics[split].keys() == set(DATASETS[name](path, split).metric_names())
    assert all(0 <= value <= 1 for split in ("train", "test") for value in run.metrics[split].values())
    logged = run.scalars()
    extra = {"tirg": [], "TransformerAE": ["told_text_loss"], "RealSpaceConcatAE": ["L2_loss", "L2_loss_text"],
             "composeAE": ["L2_loss", "L2_loss_text", "rot_sym_loss"]}[model]
    for loss_name in [loss, *extra, "total"]:
        assert [step for step, _ in logged[f"loss/{loss_name}"]] == [1, 2, 3]
    assert all(value > 0 for _, value in logged["training/queries_per_second"])
    shown = {tag(f"{split} {metric}"): value for split in ("train", "test")
             for metric, value in run.metrics[split].items() if tag(f"{split} {metric}") in logged}
    assert {name for name in logged if name.startswith("recall/")} == shown.keys()
    assert {name.split("/")[1] for name in shown} == {"train", "test"}
    for place, value in shown.items():
        assert logged[place][-1] == (3, pytest.approx(value))
    table = capsys.readouterr().out
    assert "R@1" in table and all(f"{split} correct_" in table for split in ("train", "test"))


def test_metric_names_are_the_references(tmp_path):
    """Of the datasets; that a run's metrics have these names is seen in every run, of which `best_metric` is one."""
    mean_precisions = {f"map_top{k}_correct_composition" for k in (5, 10, 25, 50)}      # ours
    names = {"mitstates": {f"recall_top{k}_correct_{what}" for k in (1, 5, 10, 50, 100)
                           for what in ("composition", "adj", "noun")} | mean_precisions,
             "fashion200k": {f"recall_top{k}_correct_composition" for k in (1, 5, 10, 50, 100)} | mean_precisions,
             "fashionIQ": {f"recall_top{k}_correct_{what}" for k in (1, 5, 10, 50, 100)
                           for what in ("dress", "shirt", "toptee")}
             | {f"recall_top{k}_{kind}_{what}" for k in (10, 50) for kind in ("own_gallery", "VAL_gallery")
                for what in ("dress", "shirt", "toptee", "mean")}
             | {"recall_mean_own_gallery", "recall_mean_VAL_gallery"}}
    for name, expected in names.items():
        assert set(DATASETS[name](WRITERS[name](tmp_path / name), "test").metric_names()) == expected


def losses_of(run):
    return {name: points for name, points in run.scalars().items()
            if not name.startswith("recall/") and not name.endswith("per_second")}


@pytest.mark.parametrize("model", some(["composeAE", "tirg", "RealSpaceConcatAE"]))
def test_a_seed_repeats_to_the_last_digit_for_any_number_of_workers(mitstates, tmp_path, model):
    runs = [run_main("mitstates", mitstates, tmp_path / "logs", model=model, num_iters=3, loader_num_workers=workers,
                     image_cache=cache, comment=f"_{i}", seed=5)
            for i, (workers, cache) in enumerate([(0, "none"), (2, "none"), (2, "auto")])]
    for run in runs[1:]:
        assert losses_of(run) == losses_of(runs[0]) and run.metrics == runs[0].metrics
        first, other = (torch.load(r.checkpoint, weights_only=True)["model_state_dict"] for r in (runs[0], run))
        assert all(torch.equal(first[name], other[name]) for name in first)
    other_seed = run_main("mitstates", mitstates, tmp_path / "logs", model=model, num_iters=3, comment="_s", seed=6)
    assert losses_of(other_seed) != losses_of(runs[0])


def test_training_stops_exactly_and_tests_in_the_references_rhythm(mitstates, tmp_path):
    run = run_main("mitstates", mitstates, tmp_path / "logs", num_iters=11, eval_frequency=None)   # epochs of 2 steps
    logged = run.scalars()
    assert [step for step, _ in logged["loss/total"]] == list(range(1, 12))
    tests = [step for step, _ in logged["recall/test/composition@1"]]
    assert tests == [2, 8, 11]                                                  # before epochs 1 and 4, and at the end
    assert torch.load(run.checkpoint, weights_only=True)["it"] == 11
    every = run_main("mitstates", mitstates, tmp_path / "logs", num_iters=6, eval_frequency=1, comment="_1")
    assert [step for step, _ in every.scalars()["recall/test/composition@1"]] == [2, 4, 6]
    once = run_main("mitstates", mitstates, tmp_path / "logs", num_iters=6, comment="_0")
    assert [step for step, _ in once.scalars()["recall/test/composition@1"]] == [6]


def test_rates_fall_tenfold_after_every_multiple_of_the_decay_frequency(mitstates, tmp_path):
    run = run_main("mitstates", mitstates, tmp_path / "logs", num_iters=7, learning_rate_decay_frequency=3)
    rates = [rate for _, rate in run.scalars()["training/learning_rate"]]
    assert rates == pytest.approx([1e-4] * 2 + [1e-5] * 3 + [1e-6] * 2)


def test_parameter_groups_hold_every_weight_once():
    model = MODELS["composeAE"](SimpleVocab.from_texts(["a b"]), 8, 8)
    groups = model.parameter_groups(0.5)
    assert [group["lr"] for group in groups] == [0.5, 0.05, 0.5]
    assert groups[0]["params"] == list(model.img_model.fc.parameters())
    ids = [id(weight) for group in groups for weight in group["params"]]
    assert sorted(ids) == sorted(id(weight) for weight in model.parameters())


def test_logged_losses_are_means_over_the_steps_between(mitstates, tmp_path):
    every, third = (run_main("mitstates", mitstates, tmp_path / "logs", num_iters=6, log_frequency=k, comment=f"_{k}")
                    for k in (1, 3))
    values = [value for _, value in every.scalars()["loss/soft_triplet"]]
    assert third.scalars()["loss/soft_triplet"] == [(3, pytest.approx(sum(values[:3]) / 3)),
                                               (6, pytest.approx(sum(values[3:]) / 3))]


@pytest.mark.parametrize("name", some(WRITERS))
def test_test_only_gives_the_same_numbers_and_rebuilding_needs_no_flag(name, tmp_path):
    path = WRITERS[name](tmp_path / name)
    trained = run_main(name, path, tmp_path / "logs", comment="_train", use_complete_text_query=True, model="tirg",
                       text_embed_dim=24)
    assert main.main(["--test_only=True", f"--model_checkpoint={trained.checkpoint}", f"--dataset_path={path}",
                      f"--log_dir={tmp_path / 'tests'}"]) == 0
    (folder,) = (tmp_path / "tests").iterdir()
    tested = Run(folder)
    assert tested.metrics == trained.metrics
    assert {key for key in tested.scalars() if key.startswith("recall/test/")} == {
        tag(f"test {key}") for key in DATASETS[name].headline}
    assert not tested.checkpoint.exists()
    data = DATASETS[name](path, "test", complete_text=True)
    model = checkpoint.rebuild_model(trained.checkpoint).to(memory_format=torch.channels_last)  # to the last digit
    rebuilt = evaluate(model, data, ImageStore(data.paths, 32))["model"]
    assert rebuilt == pytest.approx(trained.metrics["test"])


def test_the_best_checkpoint_is_the_validations_where_there_is_one(mitstates, tmp_path):
    between = sum(int(sha256(noun).hexdigest()[:16], 16) / 16**16 for noun in (b"dog", b"bus")) / 2
    run = run_main("mitstates", mitstates, tmp_path / "logs", validation=between,
                   best_metric="recall_top1_correct_composition")
    assert run.metrics.keys() == {"it", "train", "validation", "test", "protocol"}
    best = torch.load(run.checkpoint, weights_only=True)["progress"]["best"]
    assert best == run.metrics["validation"]["recall_top1_correct_composition"]
    assert "recall/validation/composition@1" in run.scalars()
    tested = run_main("mitstates", mitstates, tmp_path / "logs", comment="_t", test_only=True, validation=between,
                      model_checkpoint=run.checkpoint)
    assert tested.metrics == run.metrics


def test_a_test_alone_needs_a_checkpoint_that_says_its_dataset(mitstates, tmp_path, capsys):
    torch.save({"model_state_dict": {"a": torch.zeros(4)}}, tmp_path / "bare.pth")
    for name, words in (("bare.pth", "does not say what it was trained on"), ("none.pth", "checkpoint not found")):
        assert main.main(["--test_only=True", f"--model_checkpoint={tmp_path / name}", f"--dataset_path={mitstates}",
                          f"--log_dir={tmp_path / 'logs'}"]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.long("two runs")
def test_training_starts_from_a_given_checkpoint(mitstates, tmp_path):
    first = run_main("mitstates", mitstates, tmp_path / "logs", comment="_a", num_iters=4)
    again = run_main("mitstates", mitstates, tmp_path / "logs", comment="_b", model_checkpoint=first.checkpoint,
                     num_iters=1, learning_rate=0)
    ours, theirs = (torch.load(run.checkpoint, weights_only=True)["model_state_dict"] for run in (first, again))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if "running" not in name and "num_b" not in name)


def test_flags_are_logged_as_text(mitstates, tmp_path):
    run = run_main("mitstates", mitstates, tmp_path / "logs")
    events = run.events()
    text = events.Tensors("flags/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| learning_rate | 0.0001 |" in text and "| model | composeAE |" in text


@pytest.mark.long("a run with each baseline")
def test_baselines_are_shown_beside_the_model(mitstates, tmp_path, capsys):
    run = run_main("mitstates", mitstates, tmp_path / "logs", baselines=True)
    shown = capsys.readouterr().out
    for way in ("source image alone", "text alone", "chance"):
        assert f"test {way} correct_composition" in shown
        assert run.scalars()[f"recall/test/composition@10/{way.replace(' ', '_')}"] == [
            (3, pytest.approx(run.metrics["baselines"][f"test {way}"]["recall_top10_correct_composition"]))]
    assert list(run.metrics) == ["it", "train", "test", "baselines", "protocol"]
    counts = run.metrics["baselines"]["test queries solved by"]
    assert list(counts) == ["the source image alone", "the text alone", "either", "neither"]
    for name, count in counts.items():
        assert f"\ntest queries solved by {name}: {count}\n" in shown


@pytest.mark.parametrize("text", ["True", "true", "1", None])
def test_booleans_are_what_they_say(text):
    needed = ["--dataset=mitstates", "--dataset_path=x"]
    bare = main.get_parser().parse_args([*needed, "--use_bert" if text is None else f"--use_bert={text}"])
    assert bare.use_bert is True
    assert main.get_parser().parse_args([*needed, "--use_bert", "False"]).use_bert is False
    assert main.get_parser().parse_args(needed).use_bert is False


def test_defaults_are_the_published_ones():
    args = vars(main.get_parser().parse_args(["--dataset=mitstates", "--dataset_path=x"]))
    reference = {"f": "", "comment": "", "model": "composeAE", "image_embed_dim": 512, "use_bert": False,
                 "use_complete_text_query": False, "learning_rate": 1e-2, "learning_rate_decay_frequency": 9999999,
                 "batch_size": 32, "weight_decay": 1e-6, "category_to_train": "all", "num_iters": 160000,
                 "loss": "soft_triplet", "loader_num_workers": 4, "log_dir": Path("../logs/"), "test_only": False,
                 "model_checkpoint": ""}
    assert {name: args[name] for name in reference} == reference


def test_help_explains_every_flag():
    actions = [action for action in main.get_parser()._actions if action.dest not in ("help", "f")]
    assert all(action.help and len(action.help) > 10 for action in actions)


@pytest.mark.parametrize(("comment", "command"), some(PUBLISHED.items()), ids=PUBLISHED)
def test_the_published_commands(comment, command, request, tmp_path):
    """As written, in a process of its own; changed are paths and ports, the number of steps and the size of images."""
    name = re.search(r"dataset=(\w+)", command)[1]
    WRITERS[name](tmp_path / name, *([8] if name != "fashionIQ" else [12]))
    weights = tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"        # where torchvision keeps ImageNet's
    weights.parent.mkdir(parents=True)
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), weights)
    words = [*command.split(), f"--comment={comment}", f"--dataset_path={tmp_path / name}/",
             f"--log_dir={tmp_path / 'logs'}/", "--num_iters=1", "--image_size=32"]
    if "--use_bert" in command:
        minilm = request.getfixturevalue("minilm")
        words += [f"--bert_port={minilm.port}", f"--bert_port_out={minilm.port_out}", "--bert_timeout=60"]
    done = subprocess.run([sys.executable, "main.py", *words], cwd=ROOT, capture_output=True, text=True,
                          env={"TORCH_HOME": str(tmp_path), "PATH": "", "OMP_NUM_THREADS": "1"}, check=False)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr and "Traceback" not in done.stderr
    (folder,) = (tmp_path / "logs").iterdir()
    assert folder.name.endswith(comment) and Run(folder).metrics["it"] == 1


@pytest.mark.parametrize("case", golden.VALUES["cases"])
def test_a_checkpoint_of_the_original_loads_strictly(case, tmp_path):
    shapes = golden.VALUES["cases"][case]["state_dict"]
    weights = {name: torch.full(shape, 3, dtype=torch.long) if name.endswith("tracked") else
               torch.as_tensor(golden.normal(name, *shape), dtype=torch.float32) for name, shape in shapes.items()}
    opt = argparse.Namespace(model=case.split("-")[0], use_bert="bert" in case, learning_rate=0.01)
    torch.save({"it": 7, "opt": opt, "model_state_dict": weights}, tmp_path / "latest_checkpoint.pth")
    state = checkpoint.load(tmp_path / "latest_checkpoint.pth")
    assert state["it"] == 7 and state["opt"]["model"] == case.split("-")[0]
    vocabulary = SimpleVocab.from_texts(golden.VALUES["texts_for_vocab"])
    model = MODELS[state["opt"]["model"]](vocabulary, 512, 768 if "bert" in case else 512)
    checkpoint.restore(model, state, "x")
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.long("several runs")
def test_a_checkpoint_says_what_it_was_trained_with(mitstates, tmp_path, capsys, caplog):
    trained = run_main("mitstates", mitstates, tmp_path / "logs", num_iters=1)
    run_main("mitstates", mitstates, tmp_path / "logs", comment="_2", test_only=True, image_size=40,
             model_checkpoint=trained.checkpoint)
    assert "trained with --image_size 32, this run has 40" in caplog.text
    state = torch.load(trained.checkpoint, weights_only=True)
    state["opt"]["use_bert"], state["recipe"]["text_encoder"] = True, "service"
    torch.save(state, tmp_path / "bert.pth")
    assert main.main(flags("mitstates", mitstates, tmp_path / "logs", test_only=True,
                           model_checkpoint=tmp_path / "bert.pth", use_bert=False)) == 2
    assert "trained with --use_bert True" in capsys.readouterr().err
    state["opt"].update({"bert_ip": "192.0.2.1", "bert_port": 9, "bert_port_out": 9, "bert_timeout": 1.0})
    torch.save(state, tmp_path / "bert.pth")                                    # a stranger's
    assert main.main(["--test_only=True", f"--model_checkpoint={tmp_path / 'bert.pth'}", f"--dataset_path={mitstates}",
                      f"--log_dir={tmp_path / 'logs'}"]) == 2
    assert "no sentence service at localhost:9" in capsys.readouterr().err
    with pytest.raises(InputError, match="needs a sentence service"):
        checkpoint.rebuild_model(tmp_path / "bert.pth")


def test_an_original_with_bert_loads_whatever_its_unused_vocabulary(tmp_path):
    model = MODELS["RealSpaceConcatAE"](SimpleVocab({str(i): i for i in range(37)}), 24, 16)
    torch.save({"it": 1, "opt": argparse.Namespace(use_bert=True), "model_state_dict": model.state_dict()},
               tmp_path / "x.pth")
    state = checkpoint.load(tmp_path / "x.pth")
    assert checkpoint.vocabulary(state) is None and len(checkpoint.vocabulary(state, lstm_used=False)) == 37
    checkpoint.restore(MODELS["RealSpaceConcatAE"](checkpoint.vocabulary(state, lstm_used=False), 24, 16), state, "x")


def test_metrics_file_is_json_of_plain_numbers(mitstates, tmp_path):
    run = run_main("mitstates", mitstates, tmp_path / "logs")
    content = json.loads((run.folder / "metrics.json").read_text())
    assert isinstance(content["it"], int) and all(type(value) is float for value in content["test"].values())
    assert sorted(path.name for path in run.folder.iterdir() if "events" not in path.name) == [
        "best_checkpoint.pth", "latest_checkpoint.pth", "log.jsonl", "metrics.json", "projector",
        "projector_config.pbtxt"]


def test_a_gpu_layout_changes_nothing_but_rounding():
    """Channels last, as main trains, against the layout of the golden numbers, in float64."""
    torch.manual_seed(0)
    model = MODELS["composeAE"](SimpleVocab.from_texts(["a b c"]), 16, 16).double().eval()
    images = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    expected = model(images, ["a", "b", "c", "a b"], images.flip(0))
    model.to(memory_format=torch.channels_last)
    found = model(images.contiguous(memory_format=torch.channels_last), ["a", "b", "c", "a b"], images.flip(0))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.rare("large encoders; the fast tier has timm's and open_clip's in test_encoders.py")
@pytest.mark.parametrize(("encoder", "width"), [("shufflenet_v2_x0_5", 1024), ("resnet50", 2048), ("resnet34", 512)])
def test_other_encoders_train_and_are_rebuilt_from_the_checkpoint_alone(mitstates, tmp_path, encoder, width):
    run = run_main("mitstates", mitstates, tmp_path / "logs", image_encoder=encoder, image_embed_dim=0, image_size=64)
    model = checkpoint.rebuild_model(run.checkpoint).to(memory_format=torch.channels_last)
    assert model.image_dim == width and checkpoint.load(run.checkpoint)["opt"]["image_embed_dim"] == width
    data = DATASETS["mitstates"](mitstates, "test")
    assert evaluate(model, data, ImageStore(data.paths, 64))["model"] == pytest.approx(run.metrics["test"])
    groups = model.parameter_groups(1.0)
    assert [weight.shape[0] for weight in groups[0]["params"]] == [width, width]
    again = flags("mitstates", mitstates, tmp_path / "logs", resume=run.checkpoint, image_embed_dim=0, image_size=64)
    assert main.main(again) == 2
