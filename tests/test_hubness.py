"""--hubness against an obvious computation; and that what it takes off never hides an image that comes first."""

import json
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tqdm import tqdm

import search
from datasets import MITStates
from machine.errors import InputError
from searching.build import build
from searching.gallery import Gallery, load_model
from searching.hubness import NEAREST, Hubness
from training import checkpoint

from .conftest import picture
from .test_search import features_index

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for number in range(12):
        picture(folder / f"{number}.jpg", 40 + 9 * number, 36)
    return folder


@pytest.fixture(scope="module")
def index(trained, images, tmp_path_factory):
    out = tmp_path_factory.mktemp("index")
    build(trained.checkpoint, images, out, "exact", CPU, 5, 2, partial(tqdm, disable=True))
    return out


def test_what_is_near_to_many_queries_counts_less(trained, images, index, capsys):
    model = load_model(trained.checkpoint, CPU)
    state, paths = checkpoint.load(trained.checkpoint), [str(path) for path in images.iterdir()]
    texts, data = state["example_texts"], MITStates(state["opt"]["dataset_path"], "train")
    assert sorted(texts) == sorted({*data.sample_texts(0, 0)})
    asked = np.stack([model.compose(path, text) for path in paths for text in texts]).astype(float)
    rows = model.encode(paths).astype(float)
    crowd = [np.sort(asked @ row)[::-1][:NEAREST].mean() for row in rows]       # of each picture
    query = model.compose(paths[0], "wet")
    for weight in (0.5, 1):
        expected = {path: row @ query - weight * near for path, row, near in zip(paths, rows, crowd, strict=True)}
        words = ["query", "--index", index, "--image", paths[0], "--text", "wet", "--hubness", weight, "--json", "True",
                 "--keep_query", "True"]
        assert search.main([str(word) for word in words]) == 0
        found = json.loads(capsys.readouterr().out)["results"]
        assert [hit["score"] for hit in found] == pytest.approx(sorted(expected.values(), reverse=True), abs=2e-6)
        assert {hit["path"]: hit["score"] for hit in found} == pytest.approx(expected, abs=2e-6)


def test_without_a_text_nothing_is_taken_off(images, index):
    plain, other = (Gallery(index, CPU, hubness=weight).search(images / "0.jpg", "", 12) for weight in (0, 1))
    assert plain == other


@pytest.mark.parametrize("spread", [0.001, 1])
def test_the_best_are_found_however_far_away_they_are(tmp_path, spread):
    rng = np.random.default_rng(0)
    features = (rng.normal(size=48) + spread * rng.normal(size=(3000, 48))).astype(np.float32)
    opened = features_index(tmp_path, features)
    hubness = object.__new__(Hubness)
    hubness.numbers, hubness.taken_off = np.arange(1, 3001), rng.uniform(-1, 1, 3000).astype(np.float32)
    hubness.least = float(hubness.taken_off.min())
    unit = F.normalize(torch.from_numpy(features)).numpy()
    for query in unit[:5]:
        found = opened.nearest(query, 20, hubness=hubness)
        scores = unit.astype(float) @ query - hubness.taken_off
        assert [number - 1 for number, _ in found] == list(np.argsort(-scores)[:20])
        assert [score for _, score in found] == pytest.approx(list(np.sort(scores)[::-1][:20]), abs=1e-6)


def test_an_image_that_came_since_has_the_least_taken_off():
    hubness = object.__new__(Hubness)
    hubness.numbers, hubness.taken_off, hubness.least = np.array([2, 5]), np.float32([0.5, 0.25]), 0.25
    assert list(hubness.of([1, 2, 3, 5, 9])) == [0.25, 0.5, 0.25, 0.25, 0.25]


def test_a_model_that_names_no_texts_says_so(index):
    opened = Gallery(index, CPU)
    opened.encoder.examples = []
    with pytest.raises(InputError, match="names no texts"):
        Hubness(opened.images, opened.encoder, 0.5, tqdm)
