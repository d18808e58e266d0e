"""Recall@K by counting against the original's recalls, a full sort, and scikit-learn's neighbours."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import test_retrieval
from datasets import DATASETS, Metric, QuerySet, integer_labels
from img_text_composition_models import MODELS
from machine.image_store import ImageStore
from test_retrieval import CorrectImages, chance, evaluate, rank_table, ranks, recalls
from text_model import SimpleVocab

from . import golden

V, ARRAYS = golden.VALUES, golden.ARRAYS


def unit(name):
    return F.normalize(torch.tensor(ARRAYS[name]), dim=1)


def metric(name, query_values, gallery_values, **how):
    return Metric(name, *integer_labels(query_values, gallery_values), **how)


def test_mitstates_and_fashion200k_recalls_are_the_originals():
    goals, captions = V["retrieval_target_captions"], V["retrieval_captions"]
    metrics = [metric("correct_composition", goals, captions)] + [
        metric(f"correct_{name}", [text.split()[part] for text in goals], [text.split()[part] for text in captions])
        for part, name in enumerate(("adj", "noun"))]
    found = recalls(unit("retrieval/queries"), unit("retrieval/gallery"), np.array(V["retrieval_source_ids"]), metrics)
    assert found == V["retrieval_mitstates"]
    assert {name: value for name, value in found.items() if "composition" in name} == V["retrieval_fashion200k"]


def test_fashion_iq_recalls_are_the_exact_ones():
    ids, categories = V["fashionIQ_target_ids"], [text.split()[0] for text in V["fashionIQ_target_captions"]]
    names = list(dict.fromkeys(V["fashionIQ_gallery_ids"]))                     # an id of two categories stands once
    gallery = unit("fashionIQ/gallery")[[V["fashionIQ_gallery_ids"].index(name) for name in names]]
    found = {}
    for category in ("dress", "shirt", "toptee"):
        rows = [i for i, name in enumerate(categories) if name == category]
        asked = metric(f"correct_{category}", [ids[i] for i in rows], names)
        found |= recalls(unit("fashionIQ/queries")[rows], gallery, np.full(len(rows), -1), [asked])
    assert found == V["retrieval_fashionIQ_exact"]


def sorted_ranks(scores, own, metric):
    """The obvious way: mask, sort stably, look for the first correct one."""
    found = []
    for q, row in enumerate(scores):
        columns = np.arange(scores.shape[1]) if metric.among is None else metric.among
        order = [c for c in columns[np.argsort(-row[columns], kind="stable")] if c != own[q]]
        hits = [r for r, c in enumerate(order) if metric.gallery_labels[c] == metric.query_labels[q]]
        found.append(hits[0] if hits else test_retrieval.NEVER)
    return found


@pytest.mark.parametrize("seed", range(12))
def test_counting_matches_a_full_sort_with_ties_and_masked_sources(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    monkeypatch.setitem(test_retrieval.SCORES_AT_ONCE, "cpu", int(rng.integers(1, 400)))
    n, q = int(rng.integers(1, 40)), int(rng.integers(1, 60))
    gallery, queries = (torch.tensor(rng.integers(-1, 2, (size, 3)), dtype=torch.float32) for size in (n, q))
    own = rng.integers(-1, n, q)
    everything = Metric("all", rng.integers(0, 6, q), rng.integers(0, 5, n))     # label 5 has no correct image
    part = Metric("part", rng.integers(0, 6, q), rng.integers(0, 5, n), among=np.flatnonzero(rng.random(n) < 0.7))
    metrics = [everything, part] if len(part.among) else [everything]
    scores = queries @ gallery.T
    expected = [sorted_ranks(scores.numpy(), own, judged) for judged in metrics]
    assert [found.tolist() for found in ranks(queries, gallery, own, metrics)] == expected
    asking = np.flatnonzero(own >= 0)
    scores[asking, own[asking]] = -torch.inf                                    # and as a GPU does it
    for images, wanted in zip(map(CorrectImages, metrics), expected, strict=True):
        assert rank_table(scores, images.among, images.places, images.first, images.counts)[:, 0].tolist() == wanted


def threads_of_a_new_thread():
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.get_num_threads).result()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_number_of_threads_gives_the_same_ranks_and_is_left_as_it_was(threads):
    torch.manual_seed(0)
    gallery, queries = F.normalize(torch.randn(200, 16), dim=1), F.normalize(torch.randn(1500, 16), dim=1)
    asked = Metric("x", np.arange(1500) % 40, np.arange(200) % 40)
    expected = sorted_ranks((queries @ gallery.T).numpy(), np.full(1500, -1), asked)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert ranks(queries, gallery, np.full(1500, -1), [asked])[0].tolist() == expected
        assert torch.get_num_threads() == threads_of_a_new_thread() == threads
        with pytest.raises(IndexError):                                         # of an image that is not there
            ranks(queries, gallery, np.full(1500, 200), [asked])
        assert torch.get_num_threads() == threads_of_a_new_thread() == threads
    finally:
        torch.set_num_threads(before)


def test_counting_matches_scikit_learn():
    from sklearn.neighbors import NearestNeighbors  # two seconds, which no other test has need of

    torch.manual_seed(0)
    gallery, queries = F.normalize(torch.randn(300, 16), dim=1), F.normalize(torch.randn(50, 16), dim=1)
    labels, goals = np.arange(300) % 40, np.arange(50) % 40
    neighbours = NearestNeighbors(n_neighbors=100, metric="cosine").fit(gallery.numpy())
    order = neighbours.kneighbors(queries.numpy(), return_distance=False)
    found = recalls(queries, gallery, np.full(50, -1), [Metric("x", goals, labels)])
    for k in (1, 5, 10, 50, 100):
        assert found[f"recall_top{k}_x"] == np.mean([(labels[order[q, :k]] == goals[q]).any() for q in range(50)])


def test_a_collapsed_model_gets_no_gift_and_a_diverged_one_no_answer():
    gallery = torch.ones(200, 4)
    found = recalls(torch.ones(10, 4), gallery, np.full(10, -1), [Metric("x", np.full(10, 150), np.arange(200))])
    assert set(found.values()) == {0.0}                                         # all tied: the 151st of 200
    with pytest.raises(FloatingPointError, match="not finite"):
        recalls(torch.full((1, 4), torch.nan), gallery, np.array([-1]), [Metric("x", np.array([0]), np.arange(200))])


def test_a_query_without_a_correct_image_is_never_a_hit():
    gallery, own = torch.eye(3), np.array([0, -1])
    asked = Metric("x", np.array([1, 9]), np.array([1, 2, 3]))                   # its own image alone is right; none is
    assert set(recalls(torch.eye(3)[:2], gallery, own, [asked]).values()) == {0.0}
    assert set(chance(QuerySet(np.array([0, 1]), ["", ""], own, [asked])).values()) == {0.0}


def test_a_tie_counts_also_beside_a_query_without_a_correct_image():
    gallery = torch.tensor([[1.0, 0], [1, 0], [0, 1]])
    asked = Metric("x", np.array([7, 9]), np.array([1, 7, 2]))
    assert ranks(torch.eye(2), gallery, np.array([-1, -1]), [asked])[0].tolist() == [1, test_retrieval.NEVER]


def test_own_gallery_means(fashion_iq):
    metrics = {f"recall_top{k}_own_gallery_{c}": v for k, values in ((10, (0.1, 0.2, 0.6)), (50, (0.5, 0.6, 1.0)))
               for c, v in zip(("dress", "shirt", "toptee"), values, strict=True)}
    means = DATASETS["fashionIQ"](fashion_iq, "test").with_means({**metrics, "recall_top10_correct_dress": 0.9})
    assert means["recall_top10_own_gallery_mean"] == pytest.approx(0.3)
    assert means["recall_top50_own_gallery_mean"] == pytest.approx(0.7)
    assert means["recall_mean_own_gallery"] == pytest.approx(0.5)


def test_chance_is_what_random_orders_give(mitstates):
    dataset = DATASETS["mitstates"](mitstates, "test")
    (asked,) = dataset.task().query_sets
    generator, trials = torch.Generator().manual_seed(0), []
    for _ in range(400):
        gallery = F.normalize(torch.randn(len(dataset.images), 4, generator=generator), dim=1)
        queries = F.normalize(torch.randn(len(asked.texts), 4, generator=generator), dim=1)
        trials.append(recalls(queries, gallery, asked.excluded, asked.metrics))
    for name, value in chance(asked).items():
        assert value == pytest.approx(np.mean([trial[name] for trial in trials]), abs=0.02), name


def test_every_image_is_encoded_exactly_once(benchmark_tree):
    name, path = benchmark_tree
    torch.manual_seed(0)
    for split in ("train", "test"):
        dataset = DATASETS[name](path, split)
        model = MODELS["tirg"](SimpleVocab.from_texts(dataset.training_texts()), 16, 16).train()
        encoded, forward = [], model.img_model.forward
        model.img_model.forward = lambda x, forward=forward, encoded=encoded: encoded.append(len(x)) or forward(x)
        store = ImageStore(dataset.paths, 32)
        first = evaluate(model, dataset, store, batch_size=4, workers=0)
        task = dataset.task()
        used = {int(i) for ids in (task.gallery, *(asked.sources for asked in task.query_sets)) for i in ids}
        assert sum(encoded) == len(used)
        assert model.training and evaluate(model, dataset, store, batch_size=4, workers=2) == first
        assert evaluate(model, dataset, store, batch_size=4, baselines=True)["model"] == first["model"]


@pytest.mark.parametrize("composer", ["composeAE", "tirg"])                     # the second composes pairs
def test_evaluation_equals_the_original_way_of_asking(composer, mitstates):
    """One query at a time: encode its source image, compose, compare with every gallery image, sort."""
    dataset = DATASETS["mitstates"](mitstates, "test")
    torch.manual_seed(0)
    model = MODELS[composer](SimpleVocab.from_texts(dataset.captions), 24, 16).eval()
    store = ImageStore(dataset.paths, 32)
    found = evaluate(model, dataset, store, batch_size=3)["model"]
    with torch.no_grad():
        encode = lambda i: model.encode_image(store.batch([i]))  # noqa: E731
        gallery = F.normalize(torch.cat([encode(i) for i in range(len(dataset.images))]), dim=1)
        hits = []
        for query in dataset.queries():
            composed = F.normalize(model.compose(encode(query.source), model.encode_text([query.text])), dim=1)
            order = [i for i in (-(composed @ gallery.T))[0].argsort(stable=True).tolist() if i != query.source]
            hits.append([dataset.captions[i] == dataset.captions[query.target] for i in order])
    for k in (1, 5, 10):
        assert found[f"recall_top{k}_correct_composition"] == pytest.approx(np.mean([any(row[:k]) for row in hits]))
