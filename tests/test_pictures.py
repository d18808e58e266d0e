"""What a test leaves to look at: the sheet of results, ranks and features, as TensorBoard itself reads them."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from datasets import Metric, QuerySet
from machine.image_store import DeviceStore
from test_retrieval import NEVER
from training import pictures
from training.pictures import GAP, GREEN, LINE, QUIET, RED, TILE, QueryResults, feature_map, sheet, wrapped
from training.report import QualitativeResults

from .conftest import run_main

FIRST = 4 * GAP + TILE                          # x of the first result
ROW = LINE + TILE + 2 * GAP


def plain(colour):
    return Image.new("RGB", (50, 40), colour)


def test_a_sheet_shows_source_results_and_frames():
    answers = [QueryResults(plain("blue"), "+ red", [plain("red"), plain("yellow"), plain("black")],
                            [True, False, None]),
               QueryResults(None, "only words", [plain("white")])]
    picture = sheet(answers)
    assert picture.size == (FIRST + 3 * (TILE + GAP), GAP + 2 * ROW)
    def at(x, y):
        return picture.getpixel((x, y))
    middle = GAP + LINE + TILE // 2
    assert at(GAP + TILE // 2, middle) == (0, 0, 255)
    for place, (inside, frame) in enumerate([((255, 0, 0), GREEN), ((255, 255, 0), RED), ((0, 0, 0), QUIET)]):
        x = FIRST + place * (TILE + GAP)
        assert at(x + TILE // 2, middle) == inside and at(x, middle) == ImageColor.getrgb(frame)
    for top in (GAP, GAP + ROW):
        words = np.asarray(picture.crop((GAP, top, FIRST, top + LINE)))
        assert (words < 128).any()
    assert at(GAP + TILE // 2, middle + ROW) == (255, 255, 255)


@pytest.mark.parametrize("text", ["", "short", "is " * 5000, "x" * 10_000, "a longer hem and it is of a darker blue"])
def test_texts_stay_in_their_column(text):
    lines = wrapped(text, 180, 20)
    assert len(lines) <= 2 and all(pictures.font(20).getlength(line.removesuffix(" ...")) <= 180 for line in lines)
    if len(text) < 100:
        assert " ".join(lines) == text


def hand_made():
    """Five gallery images on the axes, image i of grey 40 i; query 0 points at image 2 and 1, query 1 at 4."""
    store = DeviceStore(torch.stack([torch.full((32, 32, 3), 40 * i, dtype=torch.uint8) for i in range(6)]))
    gallery, ids = torch.eye(5), np.array([1, 2, 3, 4, 5])                      # position p shows image p + 1
    queries = torch.nn.functional.normalize(torch.tensor([[0, 0.5, 1, 0.2, 0.1], [0.9, 0, 0, 0.1, 1.0]]), dim=1)
    metric = Metric("correct_composition", np.array([7, 9]), np.array([0, 7, 3, 7, 3]))
    asked = QuerySet(np.array([0, 5]), ["wet", "old"], np.array([-1, 4]), [metric])
    return store, asked, ids, queries, gallery


def test_results_are_the_best_and_marked_right_or_wrong():
    store, asked, ids, queries, gallery = hand_made()
    seen = QualitativeResults(store, 0)
    seen(asked, ids, queries, gallery, [np.array([1, NEVER])])
    (sighting,) = seen.values()
    first, second = sighting.answers
    def shown(answer):
        return [image.getpixel((0, 0))[0] // 40 for image in answer.results]
    assert shown(first) == [3, 2, 4, 5, 1] and list(first.right) == [False, True, True, False, False]
    assert first.text == "+ wet" and first.remark == "first right one: 2"
    assert first.source.getpixel((9, 9)) == (0, 0, 0)
    assert shown(second)[:2] == [1, 4] and shown(second)[-1] == 5               # its own image comes last
    assert not any(second.right) and second.remark == "none is right"
    assert list(seen) == ["correct_composition"] and sighting.map.size == (640, 640)


def test_half_of_the_queries_stay_from_test_to_test():
    rng = np.random.default_rng(0)
    queries, gallery = (torch.tensor(rng.normal(size=(n, 4)), dtype=torch.float32) for n in (300, 40))
    store = DeviceStore(torch.zeros(40, 32, 32, 3, dtype=torch.uint8))
    metric = Metric("correct_composition", rng.integers(0, 5, 300), rng.integers(0, 5, 40))
    asked = QuerySet(rng.integers(0, 40, 300), [f"text {i}" for i in range(300)], np.full(300, -1), [metric])
    texts = []
    for it in (1000, 1000, 2000):
        seen = QualitativeResults(store, it)
        seen(asked, np.arange(40), queries, gallery, [np.zeros(300, int)])
        texts.append({answer.text for answer in seen["correct_composition"].answers})
    assert texts[0] == texts[1] and len(texts[0]) == 8 and 4 <= len(texts[0] & texts[2]) < 8


def test_a_map_places_like_beside_like():
    rng = np.random.default_rng(0)
    left, right = rng.normal(-5, 0.1, (30, 8)), rng.normal(5, 0.1, (30, 8))
    picture = np.asarray(feature_map(np.concatenate([left, right]), left[:5], left[5:10])).astype(int)
    blue, grey = (np.argwhere((picture == ImageColor.getrgb(hue)).all(-1))[:, 1] for hue in ("#1c7ed6", "#c3ccd5"))
    groups = [side for side in (grey[grey < 320], grey[grey >= 320]) if len(side)]
    assert len(groups) == 2 and np.ptp(blue) < 60                               # all queries within one of two groups
    for shape in ((2, 4), (1, 4), (4, 1), (5, 3)):                              # no variance, no plane
        assert feature_map(np.zeros(shape), *2 * [np.zeros((0, shape[1]))]).size == (640, 640)


def test_a_maps_plane_is_that_of_plain_principal_components():
    """Seen from the distances on the map, which no turn or mirror image changes."""
    rng = np.random.default_rng(1)
    gallery = (rng.normal(size=(40, 6)) * (9, 5, 2, 1, 1, 1)).astype(np.float32)
    centred = gallery - gallery.mean(0)
    points = centred @ np.linalg.svd(centred)[2][:2].T
    picture = np.asarray(feature_map(gallery, gallery[:1], gallery[1:2])).astype(int)
    query, target = (np.argwhere((picture == ImageColor.getrgb(hue)).all(-1)).mean(0) for hue in ("#1c7ed6", GREEN))
    spread = max(np.ptp(points[:, 0]), np.ptp(points[:, 1]))
    assert np.linalg.norm(query - target) == pytest.approx(np.linalg.norm(points[0] - points[1]) * 480 / spread, abs=3)


def test_tensorboard_reads_pictures_ranks_and_weights(benchmark_tree, tmp_path):
    dataset, path = benchmark_tree
    run = run_main(dataset, path, tmp_path / "logs", learning_rate=0.0, num_iters=2)
    events = run.events()
    names = ("dress", "shirt", "toptee") if dataset == "fashionIQ" else ("composition",)
    sets = [f"correct_{name}" for name in names]
    assert len(events.Tags()["images"]) == 2 * 2 * len(sets)
    for split in ("train", "test"):
        for name, what, least in ((name, *kind) for name in sets for kind in (("results", 500), ("features", 640))):
            (image,) = events.Images(f"retrieval/{what}/{split}/{name.removeprefix('correct_')}")
            picture = Image.open(io.BytesIO(image.encoded_image_string))
            assert image.step == 2 and picture.width >= least
        assert [tag for tag in events.Tags()["histograms"] if f"/{split}/" in tag] == [
            f"retrieval/log10_rank/{split}/{name}" for name in names]
    scalars = run.scalars()
    assert [scalars[f"training/a_{i}"][-1] for i in range(4)] == [(2, 1.0), (2, 10.0), (2, 1.0), (2, 1.0)]
    assert scalars["training/scale"][-1] == (2, 4.0) and scalars["training/gradient_norm"][-1][1] > 0
    rates = [[value for _, value in scalars[f"training/{what}_per_second"]] for what in ("queries", "images")]
    assert rates[1] == pytest.approx([2 * rate for rate in rates[0]])
