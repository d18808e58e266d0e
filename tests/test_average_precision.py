"""mAP@K, and ranks of all right answers: against the originals' own numbers (CIRCO, GeneCIS, ImageNet-R, CIRR), by
hand, and against slow loops."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import test_retrieval
from benchmarks.imagenet_r import ShareFound
from benchmarks.metrics import ListedMetric, Metric, OwnGalleryMetric, average_precision
from datasets import Triplets
from test_retrieval import NEVER, CorrectImages, rank_table, rankings, ranks_of_right, recalls

from .test_benchmarks import turned
from .test_triplets import jsonl, write

FOLDER = Path(__file__).parent / "golden" / "zero_shot"
V, ARRAYS = json.loads((FOLDER / "benchmarks.json").read_text()), np.load(FOLDER / "benchmarks.npz")


def unit(name):
    return F.normalize(torch.tensor(ARRAYS[name]), dim=-1)


def exactly(values):
    return pytest.approx(values, rel=1e-4, abs=1e-9)


# The originals' numbers

def test_circos_numbers_are_the_originals():
    """From the published form of a submission: of each query the first 50, all others behind them."""
    goals, asked = V["circo"], V["circo"]["annotations"]
    named = [image for found in goals["predictions"].values() for image in found]
    named += [image for query in asked for image in (query["reference_img_id"], *query["gt_img_ids"])]
    place = {image: number for number, image in enumerate(dict.fromkeys(named))}
    scores = torch.zeros(len(asked), len(place))
    for query in asked:
        for rank, image in enumerate(goals["predictions"][str(query["id"])]):
            scores[query["id"], place[image]] = 1 - rank / 100
        for image in set(query["gt_img_ids"]).difference(goals["predictions"][str(query["id"])]):
            scores[query["id"], place[image]] = -1                              # after all others
    right = [np.array(sorted(place[image] for image in query["gt_img_ids"])) for query in asked]
    aspects = {name: np.array([query["id"] for query in asked if name in query["semantic_aspects"]])
               for name in goals["semantic_mAP_at_10"]}
    aspects = {name: queries for name, queries in aspects.items() if len(queries)}
    whole = ListedMetric("all", right, len(place), None, (), tuple(goals["ks"]), aspects, (10,))
    target = ListedMetric("target", [np.array([place[query["target_img_id"]]]) for query in asked], len(place),
                          ks=tuple(goals["ks"]))
    own = np.full(len(asked), -1)
    found = recalls(scores, torch.eye(len(place)), own, [whole, target])
    assert found == exactly({
        **{f"map_top{k}_all": value for k, value in goals["mAP"].items()},
        **{f"recall_top{k}_target": value for k, value in goals["recall"].items()},
        **{f"map_top10_{name}": value for name, value in goals["semantic_mAP_at_10"].items() if value is not None}})
    (ranked,) = ranks_of_right(scores, torch.eye(len(place)), own, [whole])
    for k in goals["ks"]:
        each = average_precision(ranked, whole.correct()[2], k)
        assert each == exactly([goals["AP_by_query_id"][str(query["id"])][str(k)] for query in asked])


@pytest.mark.parametrize("task", V["genecis"]["tasks"])
def test_genecis_recalls_are_the_mended_originals_and_theirs_without_ties(task):
    """Its own baseline: image and text, not normalised before they are added up."""
    goals = V["genecis"]["tasks"][task]
    reference, text, gallery = (torch.tensor(ARRAYS[f"genecis.{task}.{part}"]) for part in (
        "reference", "text", "gallery"))
    queries = F.normalize(0.5 * reference + 0.5 * text, dim=1)
    count, size = gallery.shape[:2]
    galleries = np.arange(count * size).reshape(count, size)
    metric = OwnGalleryMetric("x", np.full(count, size), (1, 2, 3))
    features = F.normalize(gallery, dim=2).flatten(0, 1)
    own = np.full(count, -1)
    (ranked,) = ranks_of_right(queries, features, own, [metric], galleries=galleries)
    assert (ranked[:, 0] + 1).tolist() == goals["rank_pessimistic"]
    found = recalls(queries, features, own, [metric], galleries=galleries)
    assert found == exactly({f"recall_top{k}_x": value for k, value in goals["recall_pessimistic"].items()})
    untied = [query for query in range(count) if query not in goals["queries_with_ties_at_the_target"]]
    metric = OwnGalleryMetric("x", np.full(len(untied), size), (1, 2, 3))
    found = recalls(queries[untied], features, own[untied], [metric], galleries=galleries[untied])
    assert found == exactly({f"recall_top{k}_x": value
                             for k, value in goals["recall_reference_raw_without_ties"].items()})


@pytest.mark.parametrize("domain", V["domain"]["runs"])
def test_domain_conversions_numbers_are_the_originals(domain):
    run, labels = V["domain"]["runs"][domain], np.array(V["domain"]["target_labels"])
    asked = np.array(run["query_labels"])
    found = recalls(unit(f"domain.query{domain}"), unit("domain.gallery"), np.full(len(asked), -1),
                    [ShareFound("x", asked, labels)])
    kinds = {"R": "recall", "P": "precision"}
    assert {name: found[f"{kinds[name[0]]}_top{name[2:]}_x"] for name in run["metrics"]} == exactly(run["metrics"])
    answerable = len(asked) - len(run["queries_without_a_right_image"])
    for name, value in run["metrics"].items():
        mean = found[f"{kinds[name[0]]}_top{name[2:]}_x_answerable"]
        assert mean == exactly(value * len(asked) / answerable)


def test_cirrs_recalls_are_the_originals():
    goals, entries = V["cirr"]["metrics_percent"], V["cirr"]["entries"]
    place = {name: number for number, name in enumerate(V["cirr"]["gallery_names"])}
    own = np.array([place[entry["reference"]] for entry in entries])
    right = [np.array([place[entry["target_hard"]]]) for entry in entries]
    subsets = [np.array(sorted(place[name] for name in entry["members"] if name != entry["reference"]))
               for entry in entries]
    found = recalls(unit("cirr.query"), unit("cirr.gallery"), own, [
        ListedMetric("recall", right, len(place), ks=(1, 5, 10, 50)),
        ListedMetric("subset", right, len(place), subsets, (1, 2, 3))])
    for name, percent in goals.items():
        kind, k = name.split("_")
        assert 100 * found[f"recall_top{k}_{kind}"] == exactly(percent)


# By hand, and against slow loops

def test_average_precision_by_hand():
    """Right at the places 1, 3 and 10 of all, of four right images: (1/1 + 2/3) / 4 at 5, 1/1 at 1. One that comes
    late, none, and two that come first."""
    ranks = np.array([[0, 2, 9], [7, NEVER, NEVER], [NEVER, NEVER, NEVER], [0, 1, NEVER]])
    right = np.array([4, 1, 0, 2])
    assert average_precision(ranks, right, 1) == pytest.approx([1, 0, 0, 1])
    assert average_precision(ranks, right, 5) == pytest.approx([(1 + 2 / 3) / 4, 0, 0, 1])
    assert average_precision(ranks, right, 10) == pytest.approx([(1 + 2 / 3 + 3 / 10) / 4, 1 / 8, 0, 1])


def test_all_right_answers_of_ones_own_lines_count(tmp_path):
    """Pictures at 0, 10, ... 70 degrees, the source left out. From 21 on they come as c, d, (b), e, a, f: of the right
    ones d and f the places are 2 and 5. From 52 on as f, (g), e, h, d: e alone is right, the 2nd."""
    lines = [{"source_file_name": "b.jpg", "target_file_names": ["f.jpg", "d.jpg"], "text": "is red"},
             {"source_file_name": "g.jpg", "target_file_name": "e.jpg", "text": "is blue"}]
    data = Triplets(write(tmp_path, {"test/metadata.jsonl": jsonl(lines)}), "test")
    assert data.images == [f"test/{letter}.jpg" for letter in "abcdefgh"]
    (asked,) = data.task().query_sets
    gallery, queries = (turned(degrees) for degrees in (range(0, 80, 10), [21, 52]))
    found = data.with_means(recalls(queries, gallery, asked.excluded, asked.metrics))
    first = (1 / 2 + 2 / 5) / 2
    assert {name: value for name, value in found.items() if name.startswith("map")} == pytest.approx(
        {f"map_top{k}_correct_composition": np.mean([first, 1 / 2]) for k in (5, 10, 25, 50)})
    assert set(found) == set(data.metric_names())


def slow_average_precision(is_right, count, k):
    """Of a whole ranking, as the definition has it."""
    hits = [sum(is_right[:place]) / place for place in range(1, min(k, len(is_right)) + 1) if is_right[place - 1]]
    return sum(hits) / min(count, k) if count else 0


@pytest.mark.parametrize("seed", range(12))
def test_all_ranks_and_the_map_are_a_full_sorts_with_ties_and_masked_sources(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    monkeypatch.setitem(test_retrieval.SCORES_AT_ONCE, "cpu", int(rng.integers(1, 400)))
    n, q, ks = int(rng.integers(1, 40)), int(rng.integers(1, 40)), (1, 3, 8)
    gallery, queries = (torch.tensor(rng.integers(-1, 2, (size, 3)), dtype=torch.float32) for size in (n, q))
    own, labels, goals = rng.integers(-1, n, q), rng.integers(0, 3, n), rng.integers(0, 4, q)
    right = [np.flatnonzero(labels == goal) for goal in goals]
    metrics = [Metric("labels", goals, labels, map_ks=ks), ListedMetric("listed", right, n, map_ks=ks)]
    among = np.flatnonzero(rng.random(n) < 0.7)
    if len(among):
        metrics.append(Metric("part", goals, labels, among, map_ks=ks))
    scores = (queries @ gallery.T).numpy()
    found = recalls(queries, gallery, own, metrics)
    every = ranks_of_right(queries, gallery, own, metrics)
    for metric, ranked in zip(metrics, every, strict=True):
        columns = np.arange(n) if metric.among is None else metric.among
        expected = {k: [] for k in ks}
        for query in range(q):
            order = [c for c in columns[np.argsort(-scores[query][columns], kind="stable")] if c != own[query]]
            is_right = [labels[c] == goals[query] for c in order]
            places = np.flatnonzero(is_right)
            assert ranked[query][ranked[query] < 8].tolist() == places[places < 8].tolist()
            assert (ranked[query, 0] == places[0]) if len(places) else ranked[query, 0] == NEVER
            for k in ks:
                expected[k].append(slow_average_precision(is_right, len(places), k))
        for k in ks:
            assert found[f"map_top{k}_{metric.name}"] == pytest.approx(np.mean(expected[k]))
        assert set(metric.names()) <= set(found)
        asking, table = np.flatnonzero(own >= 0), torch.tensor(scores)          # and as a GPU does it
        table[asking, own[asking]] = -torch.inf
        images = CorrectImages(metric)
        correct = images.among, images.places, images.first, images.counts
        on_gpu = rank_table(table, *correct, images.width, images.depth).numpy()
        assert np.minimum(on_gpu, 8).tolist() == np.minimum(ranked, 8).tolist()


@pytest.mark.parametrize("seed", range(6))
def test_own_galleries_rank_as_one_by_one_does_the_target_last_of_its_equals(seed):
    rng = np.random.default_rng(seed)
    n, q, most = 30, 25, 6
    gallery, queries = (torch.tensor(rng.integers(-1, 2, (size, 3)), dtype=torch.float32) for size in (n, q))
    sizes = rng.integers(1, most + 1, q)
    galleries = np.array([[*rng.integers(0, n, size), *[-1] * (most - size)] for size in sizes])    # some twice
    (ranked,) = ranks_of_right(queries, gallery, np.full(q, -1), [OwnGalleryMetric("x", sizes)], galleries=galleries)
    for query in range(q):
        scores = [float(queries[query] @ gallery[image]) for image in galleries[query, :sizes[query]]]
        assert ranked[query].tolist() == [sum(score >= scores[0] for score in scores[1:])]
    table = (queries[:, None] * gallery[torch.tensor(galleries)]).sum(2)        # and as a GPU does it
    table[torch.tensor(galleries < 0)] = -torch.inf
    correct = OwnGalleryMetric("x", sizes).correct()
    assert rank_table(table, None, *correct, pessimistic=True).tolist() == ranked.tolist()


def test_an_image_that_a_gallery_has_twice_is_a_tie_whatever_its_size_rounds_to():
    """The same image in the first column and in each other one: sums of 515 numbers in another order would differ."""
    torch.manual_seed(0)
    gallery, queries = F.normalize(torch.randn(40, 515), dim=1), F.normalize(torch.randn(40, 515), dim=1)
    for column in range(1, 15):
        galleries = np.stack([np.r_[image, np.full(14, (image + 1) % 40)] for image in range(40)])
        galleries[:, column] = galleries[:, 0]
        (ranked,) = ranks_of_right(queries, gallery, np.full(40, -1), [OwnGalleryMetric("x", np.full(40, 15))],
                                   galleries=galleries)
        assert (ranked >= 1).all()


def test_the_first_of_a_ranking_are_those_of_the_whole_one():
    rng = np.random.default_rng(0)
    gallery, queries = (torch.tensor(rng.integers(-1, 2, (size, 3)), dtype=torch.float32) for size in (60, 40))
    own = rng.integers(-1, 60, 40)
    whole = [*rankings(queries, gallery, own)]
    scores = (queries @ gallery.T).numpy()
    for order, row, mine in zip(whole, scores, own, strict=True):
        assert order.tolist() == [place for place in np.argsort(-row, kind="stable") if place != mine]
    for first in (1, 7, 58, 59, 60, 100):
        assert [found.tolist() for found in rankings(queries, gallery, own, first)] == [
            order[:first].tolist() for order in whole]
