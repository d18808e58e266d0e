"""A frozen encoder: features encoded once and kept, what is trained on them, what damage and a full disk cost."""

import logging
import math
import os
import shutil

import pytest
import torch

import main
import search
from datasets import DATASETS
from img_text_composition_models import Recipe
from machine.errors import InputError
from machine.feature_store import FeatureStore
from machine.folder_lock import FolderLock
from machine.image_store import ImageStore
from test_retrieval import evaluate
from training import checkpoint
from training.loop import make_optimizer, rate_at

from .conftest import DAMAGE, WRITERS, flags, picture, run_main, some

FROZEN = {"freeze_image_encoder": True, "eval_frequency": 0}
HEAD = "img_model.classifier.3."        # of conftest's encoder


class Bar:
    def __init__(self, *_, **__):
        self.count = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def update(self, count):
        self.count += count


@pytest.fixture
def paths(tmp_path):
    for i in range(7):
        picture(tmp_path / "pictures" / f"{i}.jpg")
    return [str(path) for path in sorted((tmp_path / "pictures").iterdir())]


def means(seen=None):
    """An encoder whose features can be worked out by hand: each channel's mean."""
    def encode(pixels):
        if seen is not None:
            seen.append(len(pixels))
        return pixels.float().mean((2, 3))
    return encode


def store_of(paths, cache, encode=None, made_by="by hand"):
    return FeatureStore(ImageStore(paths, 32, cache), encode or means(), 3, made_by, cache)


def test_each_image_is_encoded_once_for_all_stores_and_runs(paths, tmp_path):
    seen, cache = [], tmp_path / "cache"
    expected = ImageStore(paths, 32).batch(range(7)).float().mean((2, 3))
    store = store_of(paths, cache, means(seen))
    store.fill(3, 2, Bar)
    assert seen == [3, 3, 1]
    for again in (store, store_of(paths, cache, means(seen)), store_of(paths[::-1], cache, means(seen))):
        again.fill(3, 0, Bar)
    assert torch.equal(store.batch([5, 0, 5]), expected[[5, 0, 5]])
    assert torch.equal(store_of(paths[::-1], cache, means(seen)).batch([1, 6]), expected[[5, 0]])
    assert seen == [3, 3, 1]
    store_of(paths, cache, means(seen), "other weights").batch([2])
    assert seen == [3, 3, 1, 1]


def test_processes_share_the_work_and_see_each_others(paths, tmp_path):
    seen = [], []
    stores = [store_of(paths, tmp_path / "cache", means(each)) for each in seen]
    for number, store in enumerate(stores):
        store.fill(2, 0, Bar, lambda parts, number=number: parts[number::2])
    for store in stores:
        store.fill(2, 0, Bar)
    assert sum(map(sum, seen)) == 7
    assert torch.equal(stores[0].batch(range(7)), stores[1].batch(range(7)))


@pytest.mark.parametrize("kind", ["paths", "records", "features"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_made_again(paths, tmp_path, kind, damage):
    cache = tmp_path / "cache"
    store_of(paths, cache).fill(4, 0, Bar)
    file = cache / f"features_by hand.{kind}"
    DAMAGE[damage](file, file.read_bytes())
    expected = ImageStore(paths, 32).batch(range(7)).float().mean((2, 3))
    for _ in range(2):
        assert torch.equal(store_of(paths, cache).batch(range(7)), expected)


def test_a_changed_image_is_encoded_again(paths, tmp_path):
    seen = []
    store_of(paths, tmp_path / "cache").fill(4, 0, Bar)
    shutil.copy(paths[1], paths[0])
    os.utime(paths[0], ns=(1, 1))
    store = store_of(paths, tmp_path / "cache", means(seen))
    store.fill(4, 0, Bar)
    assert seen == [1] and torch.equal(*store.batch([0, 1]))


def test_a_write_that_was_cut_short_is_not_believed(paths, tmp_path, monkeypatch):
    """As a process killed between the row and its record leaves it."""
    store, seen, write = store_of(paths, tmp_path / "cache"), [], os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, content, place: None if len(content) and any(bytes(content))
                        and file == store.file.record_file else write(file, content, place))
    store.fill(4, 0, Bar)
    monkeypatch.undo()
    store_of(paths, tmp_path / "cache", means(seen)).fill(4, 0, Bar)
    assert sum(seen) == 7


def test_a_full_disk_costs_memory_only(paths, tmp_path, monkeypatch, caplog):
    seen, store = [], None
    expected = ImageStore(paths, 32).batch(range(7)).float().mean((2, 3))
    store = FeatureStore(ImageStore(paths, 32), means(seen), 3, "by hand", tmp_path / "cache")
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "pwrite", full)
    with caplog.at_level(logging.WARNING):
        store.fill(4, 0, Bar)
    assert caplog.text.count("No space left") == 1
    for _ in range(2):
        assert torch.equal(store.batch(range(7)), expected)
    assert seen == [4, 3]
    without = FeatureStore(ImageStore(paths, 32), means(seen), 3, "by hand", None)
    without.fill(4, 0, Bar)
    assert torch.equal(without.batch(range(7)), expected) and seen == [4, 3, 4, 3]


@pytest.mark.parametrize(("most", "read_again"), [(None, 0), (3, 4), (0, 7)])
def test_what_was_read_is_held_as_far_as_memory_goes(paths, tmp_path, most, read_again):
    """Seen by what has to be encoded anew once the file has nothing left."""
    cache, seen = tmp_path / "cache", []
    store_of(paths, cache).fill(4, 0, Bar)
    store = store_of(paths, cache, means(seen))
    assert store.most_held > 7                                                  # a quarter of what any machine has
    if most is not None:
        store.most_held = most
    expected = ImageStore(paths, 32).batch(range(7)).float().mean((2, 3))
    assert torch.equal(store.batch(range(7)), expected) and not seen
    os.truncate(cache / "features_by hand.features", 0)
    assert torch.equal(store.batch(range(7)), expected) and sum(seen) == read_again


def test_features_that_are_not_finite_are_refused(paths, tmp_path):
    with pytest.raises(InputError, match="not finite"):
        store_of(paths, tmp_path / "cache", lambda pixels: torch.full((len(pixels), 3), torch.nan)).fill(4, 0, Bar)
    assert not store_of(paths, tmp_path / "cache").has(0)


@pytest.mark.parametrize("encoder", ["resnet18", "mobilenet_v3_small", "timm:test_vit"])
def test_features_through_the_last_layer_are_the_whole_encoders(encoder, paths):
    torch.manual_seed(0)
    model = Recipe("tirg", encoder, 64, 12, "lstm", 8, {"<UNK>": 0}).build().train()
    pixels = ImageStore(paths, 64, None, model.traits.resampling).batch(range(7))
    features = model.backbone(pixels)
    assert features.shape == (7, model.traits.width)
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(features), model.eval().encode_image(pixels))


def encoded(monkeypatch):
    """How many images each store encodes, from now on."""
    seen, keep = [], FeatureStore.keep
    monkeypatch.setattr(FeatureStore, "keep", lambda self, ids, rows: seen.append(len(ids)) or keep(self, ids, rows))
    return seen


def backbone_of(path):
    state = torch.load(path, weights_only=True)["model_state_dict"]
    return {name: value for name, value in state.items() if name.startswith("img_model.") and not name.startswith(HEAD)}


@pytest.mark.long("two runs")
@pytest.mark.parametrize("dataset", some(["mitstates", "fashion200k", "fashionIQ"]))
def test_a_frozen_run_learns_all_but_the_backbone_and_encodes_once(dataset, tmp_path, monkeypatch):
    path = WRITERS[dataset](tmp_path / dataset)
    seen = encoded(monkeypatch)
    run = run_main(dataset, path, tmp_path / "logs", **FROZEN)
    count = sum(seen)
    splits = [DATASETS[dataset](path, split) for split in ("train", "test")]
    assert count == len({path for split in splits for path in split.paths})
    short = run_main(dataset, path, tmp_path / "logs", **{**FROZEN, "num_iters": 1, "comment": "_1"})
    assert sum(seen) == count                                                   # all kept
    first, last = (torch.load(each.checkpoint, weights_only=True)["model_state_dict"] for each in (short, run))
    moved = {name for name in first if not torch.equal(first[name], last[name])}
    assert not any(name in moved for name in backbone_of(run.checkpoint))
    assert {f"{HEAD}0.weight", "a", "normalization_layer.norm_s"} <= moved
    model = checkpoint.rebuild_model(run.checkpoint)
    found = evaluate(model, splits[1], ImageStore(splits[1].paths, 32))["model"]
    assert found == pytest.approx(run.metrics["test"], abs=0.03)                # the whole encoder, of pixels


@pytest.mark.long("four runs")
def test_a_resumed_frozen_run_ends_as_one_that_was_not_stopped(mitstates, tmp_path, monkeypatch):
    changes = {**FROZEN, "optimizer": "adamw", "schedule": "cosine", "warmup": 2, "num_iters": 6}
    whole = run_main("mitstates", mitstates, tmp_path / "logs", comment="_whole", **changes)
    part = run_main("mitstates", mitstates, tmp_path / "logs", comment="_part", save_frequency=3, **changes)
    state = torch.load(whole.checkpoint, weights_only=True)
    saved = checkpoint.save

    def stop(folder, model, optimizer, it, *rest):
        saved(folder, model, optimizer, it, *rest)
        if it == 3:
            raise OSError("stopped here")
    monkeypatch.setattr(checkpoint, "save", stop)
    with FolderLock() as lock, pytest.raises(OSError, match="stopped here"):
        words = flags("mitstates", mitstates, tmp_path / "logs", comment="_stopped", save_frequency=3, **changes)
        main.run(*main.settle(words, torch.device("cpu"), lock), main.Stopping(), torch.device("cpu"), lock)
    monkeypatch.undo()
    (stopped,) = (tmp_path / "logs").glob("*_stopped")
    assert main.main(flags("mitstates", mitstates, tmp_path / "logs", comment="_stopped", resume="auto",
                           save_frequency=3, **changes)) == 0
    ended = torch.load(stopped / "latest_checkpoint.pth", weights_only=True)
    assert all(torch.equal(value, ended["model_state_dict"][name])
               for name, value in state["model_state_dict"].items())
    assert part.metrics == whole.metrics


@pytest.mark.long("a run, an index and a test")
def test_a_frozen_runs_model_is_tested_and_searched_without_any_flag_of_it(mitstates, tmp_path, capsys, caplog):
    run = run_main("mitstates", mitstates, tmp_path / "logs", **FROZEN)
    index, query = tmp_path / "index", next((mitstates / "images").rglob("*.jpg"))
    assert search.main(["index", f"--model_checkpoint={run.checkpoint}", f"--images={mitstates / 'images'}",
                        f"--out={index}"]) == 0
    capsys.readouterr()
    assert search.main(["query", f"--index={index}", f"--image={query}", "--text=old"]) == 0
    assert "rank   score  image" in capsys.readouterr().out


@pytest.mark.long("two runs")
def test_a_checkpoint_trained_whole_may_be_frozen_and_that_is_said(mitstates, tmp_path, caplog):
    whole = run_main("mitstates", mitstates, tmp_path / "logs", **{**FROZEN, "freeze_image_encoder": False})
    with caplog.at_level(logging.WARNING):
        run = run_main("mitstates", mitstates, tmp_path / "logs", model_checkpoint=whole.checkpoint, comment="_2",
                       **FROZEN)
    assert "--freeze_image_encoder False, this run has True" in caplog.text
    before, after = backbone_of(whole.checkpoint), backbone_of(run.checkpoint)
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_rates_by_schedule_and_warmup():
    steps = [rate_at(it, 0.01, "step", 3, 0, 9) for it in range(9)]
    assert steps == [0.01] * 3 + [0.01 * 0.1] * 3 + [0.01 * 0.1 * 0.1] * 3
    cosine = [rate_at(it, 2.0, "cosine", 3, 0, 8) for it in range(9)]
    assert cosine == pytest.approx([1 + math.cos(math.pi * it / 8) for it in range(9)])
    assert [rate_at(it, 1.0, "step", 100, 3, 9) for it in range(5)] == [0.25, 0.5, 0.75, 1, 1]
    assert rate_at(10**6, 1.0, "step", 1, 0, 9) == 0


def test_adamw_has_the_groups_and_rates_of_sgd():
    model = Recipe("tirg", "mobilenet_v3_small", 32, 12, "lstm", 8, {"<UNK>": 0}).build()
    adamw, sgd = (make_optimizer(model, 0.01, 1e-4, kind) for kind in ("adamw", "sgd"))
    assert isinstance(adamw, torch.optim.AdamW) and isinstance(sgd, torch.optim.SGD)
    for ours, theirs in zip(adamw.param_groups, sgd.param_groups, strict=True):
        assert ours["params"] == theirs["params"] and ours["lr"] == theirs["lr"] and ours["weight_decay"] == 1e-4


def test_the_last_layer_does_without_a_share_of_its_features_in_training_alone():
    model = Recipe("tirg", "mobilenet_v3_small", 32, 12, "lstm", 8, {"<UNK>": 0}).build().train()
    features, layer = torch.ones(2000, model.traits.width), model.last_layer
    with torch.no_grad():
        whole = layer(features)
        layer.dropout = 0.25
        layer[0].weight.fill_(1 / model.traits.width)
        layer[0].bias.zero_()
        found = layer(features)[:, 0]
        assert found.mean().item() == pytest.approx(1, abs=0.01)
        assert found.std().item() == pytest.approx((0.25 / 0.75 / model.traits.width) ** 0.5, rel=0.1)
        layer.eval()
        assert torch.equal(layer(features), layer(features)) and layer(features)[0, 0].item() == pytest.approx(1)
    assert torch.equal(whole[0], whole[1]) and "img_model.classifier.3.0.weight" in model.state_dict()


@pytest.mark.long("three runs")
def test_feature_dropout_changes_a_run_and_is_kept_by_one_that_goes_on(mitstates, tmp_path, capsys):
    runs = [run_main("mitstates", mitstates, tmp_path / "logs", comment=f"_{share}", **FROZEN, feature_dropout=share)
            for share in (0.0, 0.5)]
    weights = [torch.load(run.checkpoint, weights_only=True)["model_state_dict"][f"{HEAD}0.weight"] for run in runs]
    assert not torch.equal(*weights)
    assert main.main(flags("mitstates", mitstates, tmp_path / "logs", resume=runs[1].checkpoint, **FROZEN)) == 2
    assert "--feature_dropout 0.5 (now 0.0)" in capsys.readouterr().err
