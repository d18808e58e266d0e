"""What papers report: CIRR's recalls and its test server's files, FashionIQ's two galleries, and queries that need no
composing; each by hand or by a slow loop."""

import itertools
import json
import re

import numpy as np
import pytest
import torch

import main
from datasets import CIRCO, CIRR, DATASETS, FashionIQ
from searching.gallery import load_model
from test_retrieval import evaluate, recalls
from torch_function import ByCosine

from .conftest import WRITERS, flags, picture, run_main, write_cirr
from .test_triplets import LINES, jsonl, write
from .zero_shot_trees import CIRCO_IDS, CIRCO_TEST, write_circo


def turned(degrees):
    """Unit vectors (len(degrees), 2)."""
    angles = torch.as_tensor(np.radians(degrees), dtype=torch.float32)
    return torch.stack([angles.cos(), angles.sin()], 1)


def write_json(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(json.dumps(content))
    return root


# CIRR

def write_pairs(root, pairs, count=60):
    """A validation split of so many images, without pictures; pairs: (reference, target, others of the set)."""
    entries = [{"pairid": number, "reference": f"dev-{source}", "target_hard": f"dev-{target}", "caption": str(number),
                "img_set": {"members": [f"dev-{image}" for image in (*others, target, source)]}}
               for number, (source, target, *others) in enumerate(pairs)]
    (root / "img_raw").mkdir(parents=True)
    return write_json(root, {"captions/cap.rc2.val.json": entries, "image_splits/split.rc2.val.json": {
        f"dev-{image}": f"./dev/dev-{image}.png" for image in range(count)}})


def test_cirr_leaves_the_reference_out_everywhere(tmp_path):
    """Image i lies at i degrees, all queries at -1, so that images come in order. Less the reference, the targets are
    the 1st, 5th, 10th and 50th of all; with it, each would be one too late. Of their sets they are the 1st, 2nd, 3rd
    and last."""
    root = write_pairs(tmp_path, [(0, 1, 10, 11, 12, 13), (3, 5, 4, 30, 31, 32), (7, 10, 8, 9, 40, 41),
                                  (20, 50, 21, 22, 23, 24)])
    data = CIRR(root, "test")
    (asked,) = data.task().query_sets
    found = data.with_means(recalls(turned([-1] * 4), turned(range(60)), asked.excluded, asked.metrics))
    whole, subset = {1: 1 / 4, 5: 2 / 4, 10: 3 / 4, 50: 1}, {1: 1 / 4, 2: 2 / 4, 3: 3 / 4}
    assert found == {**{f"recall_top{k}_correct_composition": share for k, share in whole.items()},
                     **{f"recall_top{k}_subset": share for k, share in subset.items()},
                     "recall_mean": (2 / 4 + 1 / 4) / 2}


SERVED = [("test1-3", "old bus", (3, 9, 20, 31, 40, 41)), ("test1-50", "wet", (1, 2, 50, 51, 52, 53)),
          ("test1-3", "white dog", (3, 9, 20, 31, 40, 41))]   # all known to `trained`: a search leaves out other words


def named(images):
    return [f"test1-{image}" for image in images]


def write_test1(root, count=56):
    entries = [{"pairid": 12063 + number, "reference": reference, "caption": caption,
                "img_set": {"id": 1, "members": named(members), "reference_rank": 3}}
               for number, (reference, caption, members) in enumerate(SERVED)]
    for image in range(count):
        picture(root / "img_raw" / "test1" / f"test1-{image}.png")
    return write_json(root, {"captions/cap.rc2.test1.json": entries, "image_splits/split.rc2.test1.json": {
        f"test1-{image}": f"./test1/test1-{image}.png" for image in range(count)}})


def test_a_submission_ranks_as_asking_one_by_one_does(trained, tmp_path, capsys):
    """With a model of other pictures, which tells these apart. Rounding may swap what is equally near to 1e-6."""
    root, logs = write_test1(write_cirr(tmp_path / "cirr")), tmp_path / "logs"
    assert main.main(["--test_only=True", f"--model_checkpoint={trained.checkpoint}", "--dataset=cirr", "--device=cpu",
                      f"--dataset_path={root}", f"--log_dir={logs}", "--write_submission=True"]) == 0
    (folder,), shown, model = logs.iterdir(), capsys.readouterr().out, load_model(trained.checkpoint, "cpu")
    files = {name: root / "img_raw" / "test1" / f"{name}.png" for name in named(range(56))}
    vectors = {name: model.encode([file])[0] for name, file in files.items()}
    for metric, most in (("recall_subset", 3), ("recall", 50)):
        file = folder / f"cirr_test1_{metric}.json"
        content = json.loads(file.read_text())
        assert f"{file}: 3 answers for the test server" in shown
        assert list(content) == ["version", "metric", "12063", "12064", "12065"]
        assert (content["version"], content["metric"]) == ("rc2", metric)
        for (reference, text, members), found in zip(SERVED, list(content.values())[2:], strict=True):
            query = model.compose(files[reference], text)
            scores = {name: float(vectors[name] @ query) for name in (files if most == 50 else named(members))
                      if name != reference}
            assert len(set(found)) == len(found) == most and set(found) <= set(scores)
            best = sorted(scores.values(), reverse=True)
            assert best[0] - best[most] > 1e-4
            assert [scores[name] for name in found] == pytest.approx(best[:most], abs=1e-6)
    assert content["12063"] != content["12065"]                                 # as only their texts differ


def test_circos_submission_ranks_as_asking_one_by_one_does(trained, tmp_path, capsys):
    """With a model of other pictures. The reference stays in."""
    root, logs = write_circo(tmp_path / "CIRCO"), tmp_path / "logs"
    assert main.main(["--test_only=True", f"--model_checkpoint={trained.checkpoint}", "--dataset=circo", "--device=cpu",
                      f"--dataset_path={root}", f"--log_dir={logs}", "--write_submission=True"]) == 0
    (folder,), shown, model = logs.iterdir(), capsys.readouterr().out, load_model(trained.checkpoint, "cpu")
    content = json.loads((folder / "circo_test.json").read_text())
    assert f"{folder / 'circo_test.json'}: 4 answers for the test server" in shown
    assert list(content) == ["0", "1", "2", "3"]
    files = {image: root / "COCO2017_unlabeled" / "unlabeled2017" / f"{image:012d}.jpg" for image in CIRCO_IDS}
    vectors = {image: model.encode([file])[0] for image, file in files.items()}
    for (source, text), found in zip(CIRCO_TEST, content.values(), strict=True):
        query = model.compose(files[CIRCO_IDS[source]], text)
        assert sorted(found) == CIRCO_IDS and all(type(image) is int for image in found)
        scores = [float(vectors[image] @ query) for image in found]
        assert all(first >= second - 1e-6 for first, second in itertools.pairwise(scores)) and scores[0] > scores[-1]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert list(metrics) == ["it", "test", "protocol"]
    assert set(metrics["test"]) == set(CIRCO(root, "test").metric_names())
    about = metrics["protocol"]["test"]
    lines = shown.splitlines()
    above = lines.index(f"CIRCO, val: 3 queries, gallery of 12 images, the source stays in its ranking; text: "
                        f"{{relative_caption}}; weights {about['weights']}, annotations {about['annotations']}")
    assert re.fullmatch(r"iteration \d+", lines[above + 1]) and "mAP@5  mAP@10  mAP@25  mAP@50" in shown
    assert "asked with the caption alone, without the shared concept" in shown


def test_a_run_writes_the_submission_of_its_last_weights(tmp_path):
    root = write_test1(write_cirr(tmp_path / "cirr"), count=54)
    run = run_main("cirr", root, tmp_path / "logs", batch_size=2, write_submission=True)
    content = json.loads((run.folder / "cirr_test1_recall_subset.json").read_text())
    assert [len(content[pair]) for pair in ("12063", "12064", "12065")] == [3, 3, 3]
    assert list(run.metrics) == ["it", "train", "test", "protocol"]
    first = (run.folder / "cirr_test1_recall.json").read_bytes()
    assert main.main(["--test_only=True", f"--model_checkpoint={run.checkpoint}", f"--dataset_path={root}",
                      f"--log_dir={tmp_path / 'again'}", "--write_submission=True", "--device=cpu"]) == 0
    assert next((tmp_path / "again").glob("*/cirr_test1_recall.json")).read_bytes() == first


def test_what_keeps_a_submission_from_being_written_is_one_line(tmp_path, capsys):
    cirr, mitstates = write_cirr(tmp_path / "cirr"), WRITERS["mitstates"](tmp_path / "mitstates")

    def refused(name, root, words):
        assert main.main(flags(name, root, tmp_path / "logs", batch_size=2, write_submission=True)) == 2
        line = capsys.readouterr().err
        assert words in line and line.count("\n") == 1 and "Traceback" not in line
    refused("mitstates", mitstates, "mitstates has no test server, as cirr has")
    refused("cirr", cirr, "split file not found at")
    write_test1(cirr)
    (cirr / "img_raw" / "test1" / "test1-7.png").unlink()
    refused("cirr", cirr, "1 of the test1 split's 56 images are missing or empty")
    captions = cirr / "captions" / "cap.rc2.test1.json"
    captions.write_text(captions.read_text().replace('"pairid": 12064, ', ""))
    refused("cirr", cirr, "entry 2: expected {'pairid': number, 'reference': id, 'caption': text,")
    captions.unlink()
    refused("cirr", cirr, "caption file not found at")


# FashionIQ

ANGLES = {"D": 0, "S": 100, "T": 150}                                           # degrees of a category's first image


def write_two_galleries(root):
    """Dresses D0 to D69, of which triplets name every fifth; shirts S0 to S9, one pair twice; tops T0 to T2 with
    a shirt."""
    pairs = {"dress": [(f"D{i}", f"D{i + 5}") for i in range(0, 70, 10)], "shirt": 2 * [("S0", "S5")],
             "toptee": [("T0", "T2")]}
    splits = {"dress": [f"D{i}" for i in range(70)], "shirt": [f"S{i}" for i in range(10)],
              "toptee": ["S7", "T0", "T1", "T2"]}
    (root / "all_imgs").mkdir(parents=True)
    for category, named_pairs in pairs.items():
        entries = [{"candidate": source, "target": target, "captions": ["is red", "is long"]}
                   for source, target in named_pairs]
        write_json(root, {f"captions/cap.{category}.val.json": entries,
                          f"image_splits/split.{category}.val.json": splits[category]})
    return root


def test_fashion_iq_ranks_in_both_galleries(tmp_path):
    """Image i of a category lies i degrees after its first, queries one degree before, the source stays in. The
    dresses' targets are those at 5, 15, ... 65 degrees: so many images come before them in the first gallery, and 1, 3,
    ... 13 in the second. S5 comes after 5 and 1; T2 after 2 and 1, as S7 is further off."""
    data = FashionIQ(write_two_galleries(tmp_path), "test")
    names = [image.removeprefix("all_imgs/").removesuffix(".jpg") for image in data.images]
    gallery = turned([ANGLES[name[0]] + int(name[1:]) for name in names])
    task, found = data.task(), {}
    for asked, angle in zip(task.query_sets, ANGLES.values(), strict=True):
        found |= recalls(turned([angle - 1] * len(asked.texts)), gallery, asked.excluded, asked.metrics)
    found = data.with_means(found)
    own, val = ({"dress": {10: r10, 50: r50}, "shirt": {10: 1, 50: 1}, "toptee": {10: 1, 50: 1}}
                for r10, r50 in ((1 / 7, 5 / 7), (5 / 7, 1)))
    for kind, expected in (("own_gallery", own), ("VAL_gallery", val)):
        expected["mean"] = {k: (expected["dress"][k] + 2) / 3 for k in (10, 50)}
        for what, shares in expected.items():
            assert {k: found[f"recall_top{k}_{kind}_{what}"] for k in shares} == pytest.approx(shares), (kind, what)
        assert found[f"recall_mean_{kind}"] == pytest.approx(sum(expected["mean"].values()) / 2)
    assert found["recall_top50_correct_dress"] == pytest.approx(5 / 7) and data.best_metric == "recall_mean_own_gallery"
    among = {metric.name: [names[i] for i in metric.among] for asked in task.query_sets for metric in asked.metrics[1:]}
    assert [len(among[f"{kind}_{what}"]) for what in ("dress", "shirt", "toptee")
            for kind in ("own_gallery", "VAL_gallery")] == [70, 14, 10, 2, 4, 2]
    assert set(among["VAL_gallery_toptee"]) == {"T0", "T2"}


def test_a_source_whose_target_is_broken_stays_in_the_second_gallery(tmp_path):
    data = FashionIQ(write_two_galleries(tmp_path), "test", without=frozenset({"all_imgs/D5.jpg"}))
    dress = data.task().query_sets[0]
    assert len(dress.texts) == 6 and [len(metric.among) for metric in dress.metrics[1:]] == [69, 13]


# Queries that need no composing

class ByAngle(ByCosine):
    """A model of images at known degrees, to which a text is the degrees it is `heard` as and the image nothing; and
    its own store."""

    image_dim = text_dim = 2
    training = False

    def __init__(self, degrees, heard):
        self.degrees, self.heard, self.a = np.asarray(degrees, float), heard, torch.zeros(1)

    def eval(self):
        return self

    def train(self, _):
        return self

    def batch(self, ids, device=None):
        return turned(self.degrees[list(ids)])

    def encode_image(self, images):
        return images

    def encode_text(self, texts):
        return turned([self.heard[text] for text in texts])

    def compose(self, images, texts):
        return texts


def test_queries_that_one_of_the_two_solves_are_counted(tmp_path):
    """Images at 0 to 59 degrees, the texts heard as 0, 10, ... 60; the target must be one of the first five but the
    source. From 0, image 5 is the fifth and 6 the sixth. Solved by both, none, none, the text, both, the
    image twice."""
    pairs = [(0, 5), (0, 6), (0, 50), (0, 32), (38, 40), (0, 3), (0, 4)]
    data = CIRR(write_pairs(tmp_path, [(*pair, 10, 11, 12, 13) for pair in pairs]), "test")
    model = ByAngle(range(60), {str(number): 10 * number for number in range(7)})
    found = evaluate(model, data, model, workers=0, baselines=True)
    assert found["queries solved by"] == {"the source image alone": 4, "the text alone": 3, "either": 5, "neither": 2}
    assert found["source image alone"]["recall_top5_correct_composition"] == pytest.approx(4 / 7)
    assert found["text alone"]["recall_top5_correct_composition"] == pytest.approx(3 / 7)


TREES = {**WRITERS, "cirr": write_cirr, "triplets": lambda root: write(root, {"test/metadata.jsonl": jsonl(LINES)})}
QUERIES = {"mitstates": 16, "fashion200k": 2, "fashionIQ": 9, "cirr": 2, "triplets": 4}


@pytest.mark.parametrize("name", QUERIES)
def test_every_benchmark_counts_each_query_once(name, tmp_path):
    data, rng = DATASETS[name](TREES[name](tmp_path), "test"), np.random.default_rng(3)
    data.solved_at = data.solved_at[0], 2                                         # so small are the trees
    task = data.task()
    degrees = rng.uniform(0, 360, len(data.images))
    heard = {text: rng.uniform(0, 360) for text in task.texts}
    image, text = set(), set()
    for number, asked in enumerate(task.query_sets):
        for metric in asked.metrics:
            if metric.name.startswith(data.solved_at[0]):
                for query, source in enumerate(asked.sources):
                    among = range(len(task.gallery)) if metric.among is None else metric.among
                    others = [place for place in among if place != asked.excluded[query]]
                    for solved, angle in ((image, degrees[source]), (text, heard[asked.texts[query]])):
                        nearest = sorted(others, key=lambda place: -np.cos(np.radians(degrees[place] - angle)))[:2]
                        if metric.is_correct(query, nearest).any():
                            solved.add((number, query))
    model = ByAngle(degrees, heard)
    counts = evaluate(model, data, model, workers=0, baselines=True)["queries solved by"]
    assert list(counts.values()) == [len(image), len(text), len(image | text), QUERIES[name] - len(image | text)]
