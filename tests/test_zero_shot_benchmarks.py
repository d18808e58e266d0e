"""CIRCO, GeneCIS, ImageNet-R, Shoes and LaSCo read from small trees of their published form: metrics by hand, bad
files, whole runs, and what is sent to CIRCO's test server."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import main
from benchmarks.genecis import TASKS
from data import check
from datasets import CIRCO, DATASETS, GeneCIS, ImageNetR, LaSCo, Shoes
from machine.cropping import cut_out
from machine.errors import InputError
from machine.image_store import ImageStore
from test_retrieval import chance, recalls
from training.report import in_a_line

from .conftest import flags, run_main, write_mitstates
from .test_average_precision import V
from .test_benchmarks import turned
from .zero_shot_trees import (
    CIRCO_IDS,
    GENECIS,
    TREES,
    coco,
    genome,
    write_circo,
    write_genecis,
    write_imagenet_r,
    write_lasco,
    write_shoes,
)


def asked_at(data, degrees, queries):
    """All that a test says where the images lie at these degrees, by id, and the queries at those, of all sets."""
    task, found, at = data.task(), {}, 0
    gallery = turned(degrees)[torch.as_tensor(task.gallery)]
    for asked in task.query_sets:
        vectors = turned(queries[at:at + len(asked.texts)])
        at += len(asked.texts)
        found |= recalls(vectors, gallery, asked.excluded, asked.metrics, galleries=asked.galleries)
    found = data.with_means(found)
    assert set(found) == set(data.metric_names()) and data.best_metric in found and {*data.headline} <= set(found)
    return found


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A run on other pictures."""
    root = tmp_path_factory.mktemp("small")
    return run_main("mitstates", write_mitstates(root / "data"), root / "logs")


def to_test(run, name, root, logs):
    return ["--test_only=True", f"--model_checkpoint={run.checkpoint}", f"--dataset={name}", f"--dataset_path={root}",
            f"--log_dir={logs}", "--device=cpu"]


# CIRCO

def test_circos_metrics_are_those_by_hand(tmp_path):
    """Image i at 10 i degrees. At 21 the right ones 2, 5 and 9 are the 1st, 6th and 10th. At 31 the reference is first
    and 4 is second. At 53 they come as 5, 6, 4, 7, 3, 8, 2, 9, 1: the target, 8, is the 6th, and 1 the 9th."""
    data = CIRCO(write_circo(tmp_path, pictures=False), "test")
    assert data.images[:2] == ["COCO2017_unlabeled/unlabeled2017/000000000007.jpg",
                               "COCO2017_unlabeled/unlabeled2017/000000000107.jpg"] and len(data.images) == 12
    (asked,) = data.task().query_sets
    assert asked.texts == ["old 0", "old 1", "old 2"] and asked.sources.tolist() == [0, 3, 6]
    found = asked_at(data, 10 * np.arange(12), [21, 31, 53])
    at_5, at_10 = (1 / 3, 1 / 2, 0), ((1 + 2 / 6 + 3 / 10) / 3, 1 / 2, (1 / 6 + 2 / 9) / 2)
    assert found == pytest.approx({
        "map_top5_correct_composition": np.mean(at_5),
        **{f"map_top{k}_correct_composition": np.mean(at_10) for k in (10, 25, 50)},
        "map_top10_semantic_addition": at_10[0], "map_top10_semantic_negation": np.mean(at_10[:2]),
        "recall_top5_target": 2 / 3, "recall_top10_target": 1, "recall_top25_target": 1, "recall_top50_target": 1})
    with_concept = CIRCO(tmp_path, "test", shared_concept=True)
    assert with_concept.task().texts[0] == "a dog old 0" and with_concept.fingerprint() != data.fingerprint()
    for read, words in ((data, "the caption alone, without the shared concept"),
                        (with_concept, "the caption and the shared concept")):
        assert read.about == f"CIRCO, val: 3 queries, 12 images; asked with {words}"


def test_a_release_without_aspects_is_read(tmp_path):
    file = write_circo(tmp_path, pictures=False) / "annotations" / "val.json"
    entries = json.loads(file.read_text())
    file.write_text(json.dumps([{name: value for name, value in entry.items() if name != "semantic_aspects"}
                                for entry in entries]))
    assert not [name for name in CIRCO(tmp_path, "test").metric_names() if "semantic" in name]


def test_only_the_first_fifty_are_sent(tmp_path):
    data = CIRCO(write_circo(tmp_path, pictures=False), "served_test")
    data.names = list(range(1000, 1060))
    content = data.submission(np.arange(60) for _ in range(4))
    assert content == {"circo_test.json": {str(number): list(range(1000, 1050)) for number in range(4)}}


def circo_without(tmp_path, change, name="test"):
    root = write_circo(tmp_path, pictures=False)
    file = root / "annotations" / f"{name}.json"
    entries = json.loads(file.read_text())
    change(entries)
    file.write_text(json.dumps(entries))
    return root


@pytest.mark.parametrize(("change", "words"), [
    (lambda entries: entries.pop(1), "entry 2: its id is 2, not 1: queries are missing"),
    (lambda entries: entries.append(entries[0]), "entry 5: its id is 0, not 4"),
    (lambda entries: entries[2].update(reference_img_id=5), r"1 ids in .* have no picture in COCO's list, first 5"),
    (lambda entries: entries[2].update(relative_caption=None), "entry 3: expected")])
def test_a_submission_that_would_lack_queries_is_refused_before_anything_is_written(
        small, tmp_path, capsys, change, words):
    root, logs = circo_without(tmp_path / "CIRCO", change), tmp_path / "logs"
    with pytest.raises(InputError, match=words):
        CIRCO(root, "served_test")
    if "have no picture" in words:                                              # nor where such are left out
        with pytest.raises(InputError, match=r"1 of 4 queries .* takes answers to all or none"):
            CIRCO(root, "served_test", without=frozenset())
        for image in CIRCO_IDS:
            (root / "COCO2017_unlabeled" / "unlabeled2017").mkdir(exist_ok=True)
            Image.new("RGB", (40, 40)).save(root / "COCO2017_unlabeled" / "unlabeled2017" / f"{image:012d}.jpg")
        assert main.main([*to_test(small, "circo", root, logs), "--write_submission=True",
                          "--skip_bad_images=True"]) == 2
        assert not [*logs.glob("*/*")] and capsys.readouterr().err.count("main.py: error") == 1


@pytest.mark.parametrize(("change", "words"), [
    (lambda entries: [entry.update(gt_img_ids=[*entry["gt_img_ids"], 5, 6]) for entry in entries],
     r"6 ids in .* have no picture in COCO's list, first 5: one of the two is of another release"),
    (lambda entries: entries[0].update(target_img_id=CIRCO_IDS[11]), "entry 1: the target is not among the right"),
    (lambda entries: entries[0].update(gt_img_ids=[]), "entry 1: expected"),
    (lambda entries: entries[0].update(semantic_aspects=[1]), "entry 1: expected"),
    (lambda entries: entries[0].update(id=True), "entry 1: expected"),
    (lambda entries: entries.clear(), "no usable query")])
def test_annotations_of_circo_that_do_not_fit_are_one_line(tmp_path, change, words):
    with pytest.raises(InputError, match=words) as refused:
        CIRCO(circo_without(tmp_path, change, "val"), "test")
    assert "\n" not in str(refused.value)


def test_ids_without_a_picture_are_counted_and_left_out(tmp_path):
    root = circo_without(tmp_path, lambda entries: [
        entries[0].update(gt_img_ids=[CIRCO_IDS[2], 5]), entries[1].update(reference_img_id=5)], "val")
    data = CIRCO(root, "test", without=frozenset())
    assert data.dropped == {"images": 0, "ids that have no picture": 2, "queries": 1}
    assert [entry["right"] for entry in data.entries] == [[2], [1, 8]]


# GeneCIS

def test_genecis_recalls_are_those_by_hand(tmp_path):
    """Of images by id: the boxes of picture 61 at 0 and 10 degrees, and so on. The second of focus_object has its
    target twice in its gallery, and so never as the first."""
    data = GeneCIS(write_genecis(tmp_path), "test")
    whole = [image for image, box in zip(data.images, data.crops, strict=True) if box is None]
    assert sorted(whole) == [f"val2017/{number:012d}.jpg" for number in range(1, 6)]
    boxes = {(image, box) for image, box in zip(data.images, data.crops, strict=True) if box}
    assert len(boxes) == 6 and ("VG_100K_all/61.jpg", (4.0, 5.0, 10.0, 8.0)) in boxes
    at = {instance: 10 * number for number, instance in enumerate(data.ids)}

    def of(number):
        return at[f"val2017/{number:012d}.jpg", None]
    box = {name: at[f"VG_100K_all/{name[0]}.jpg", tuple(map(float, name[1:]))] for name in (
        (61, 20, 10, 6, 6), (63, 3, 3, 20, 20))}
    angles = {"focus_attribute": [box[61, 20, 10, 6, 6] + 1], "change_attribute": [box[63, 3, 3, 20, 20] + 180],
              "focus_object": [of(2) + 1, of(4) + 1], "change_object": [of(4) + 4]}     # 4, then 5
    assert [*data.asked] == [*TASKS]
    found = asked_at(data, list(at.values()), [angle for task in TASKS for angle in angles[task]])
    expected = {"focus_attribute": (1, 1, 1), "change_attribute": (0, 0, 1), "focus_object": (1 / 2, 1, 1),
                "change_object": (0, 1, 1)}
    for k in (1, 2, 3):
        for task, values in expected.items():
            assert found[f"recall_top{k}_correct_{task}"] == values[k - 1]
        assert found[f"recall_top{k}_mean"] == pytest.approx(np.mean([values[k - 1] for values in expected.values()]))
    sets = dict(zip(TASKS, data.task().query_sets, strict=True))
    assert [sets[task].texts for task in TASKS] == [[query[0] for query in GENECIS[task]] for task in TASKS]
    assert chance(sets["focus_object"])["recall_top1_correct_focus_object"] == pytest.approx(1 / 3)
    assert data.protocol()["gallery"] == [2, 4] and data.protocol()["source"] == "is in no gallery"
    assert in_a_line({**data.protocol(), "weights": "x"}).startswith(
        "GeneCIS, test: 5 queries, each a gallery of 2 to 4, the source is in no gallery; text: {condition}; weights x")


@pytest.mark.parametrize("crop", V["genecis"]["crops"], ids=str)
def test_boxes_are_cut_out_as_the_original_does(crop):
    """A picture whose red is a pixel's column and whose green is its row, counted from 1."""
    width, height = crop["image_width_height"]
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.meshgrid(np.arange(1, width + 1), np.arange(1, height + 1))
    found = np.asarray(cut_out(Image.fromarray(pixels), tuple(crop["instance_bbox"])))
    side, (left, top, right, bottom) = crop["output_side"], crop["picture_in_output_left_top_right_bottom"]
    x, y = crop["source_pixel_xy_of_its_first"]
    assert found.shape == (side, side, 3)
    expected = np.zeros((side, side, 3), np.uint8)
    expected[top:bottom, left:right] = pixels[y:y + bottom - top, x:x + right - left]
    assert np.array_equal(found, expected)


def test_boxes_of_one_picture_are_kept_apart_from_it_and_from_each_other(tmp_path):
    (tmp_path / "x").mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x" / "1.png")
    boxes = [None, (40.0, 30.0, 20.0, 10.0), (5.0, 8.0, 30.0, 20.0)]
    stores = [ImageStore([str(tmp_path / "x" / "1.png")] * 3, 24, tmp_path / "cache", crops=boxes) for _ in range(2)]
    first = stores[0].batch([0, 1, 2])
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[1], first[2])
    assert all(stores[1].file.holds(index, stores[1].versions[index]) for index in range(3))
    assert torch.equal(stores[1].batch([0, 1, 2]), first)
    for index, box in enumerate(boxes[1:], start=1):
        cut_out(Image.fromarray(pixels), box).save(tmp_path / f"{index}.png")
        assert torch.equal(ImageStore([str(tmp_path / f"{index}.png")], 24).batch([0])[0], first[index])


@pytest.mark.parametrize(("change", "words"), [
    ({"focus_object": [("bus", coco(1), coco(2), [coco(3), coco(77)])]},
     r"focus_object.json, entry 1: 1 images that .* names have no picture .* first val2017/000000000077.jpg"),
    ({"focus_object": [("bus", coco(1), coco(2), "x")]}, "focus_object.json, entry 1: expected"),
    ({"focus_object": [(3, coco(1), coco(2), [coco(3)])]}, "entry 1: expected"),
    ({"focus_object": [("bus", coco("../x"), coco(2), [coco(3)])]}, "entry 1: expected"),
    ({"focus_attribute": [("color", genome(61, 1, 2, 3), coco(1), [])]}, "entry 1: expected"),
    ({"focus_attribute": [("color", genome(61, 1, 2, 0, 3), coco(1), [])]}, "entry 1: expected"),
    ({"focus_object": []}, "no usable query"), ({}, "task file not found")])
def test_task_files_that_do_not_fit_are_one_line(tmp_path, change, words):
    root = write_genecis(tmp_path, change)
    (root / "genecis").mkdir(exist_ok=True)
    with pytest.raises(InputError, match=words) as refused:
        GeneCIS(root, "test")
    assert "\n" not in str(refused.value)


def test_a_box_beside_its_picture_is_one_line_and_its_queries_are_left_out(tmp_path):
    beside = ("wet", coco(1), coco(2), [genome(62, 90, 90, 5, 5)])
    tasks = {"focus_attribute": [*GENECIS["focus_attribute"], beside],
             "focus_object": [("bus", coco(1), coco(77), [coco(3)])]}
    data = GeneCIS(write_genecis(tmp_path, tasks), "test", without=frozenset())
    assert data.title == "GeneCIS without change_attribute, focus_object, change_object"
    assert data.dropped["queries"] == 1
    store = ImageStore(data.paths, 24, crops=data.crops)
    (complaint,) = store.unreadable().values()
    assert "the box [90.0, 90.0, 5.0, 5.0] is not in it, it has 40 x 36 pixels" in complaint
    assert len(GeneCIS(tmp_path, "test", without=frozenset({"VG_100K_all/63.jpg"})).all_queries) == 2


def test_visual_genomes_two_folders_are_found_as_they_are_downloaded(tmp_path):
    root = write_genecis(tmp_path)
    before = sorted(GeneCIS(root, "test").images)
    for folder, number in (("VG_100K", 61), ("VG_100K", 62), ("VG_100K_2", 63)):
        (root / folder).mkdir(exist_ok=True)
        (root / "VG_100K_all" / f"{number}.jpg").rename(root / folder / f"{number}.jpg")
    (root / "VG_100K_all").rmdir()
    (root / "coco2017").mkdir()
    (root / "val2017").rename(root / "coco2017" / "val2017")
    data = GeneCIS(root, "test")
    assert sorted(image.rpartition("/")[2] for image in data.images) == sorted(
        image.rpartition("/")[2] for image in before)
    assert not ImageStore(data.paths, 24, crops=data.crops).missing()


# ImageNet-R

@pytest.mark.parametrize("above", [False, True])
def test_domain_conversions_metrics_are_those_by_hand(tmp_path, above):
    """Gallery at 0, 10, ... 70 degrees: two cartoons of class 2, a toy of 5, two toys of 2, then the photographs. From
    1 degree all in order, from 41 as 4, 5, 3, 6, 2, 7, 1, 0."""
    folder = write_imagenet_r(tmp_path)
    data = ImageNetR(tmp_path if above else folder, "test")
    assert data.domains == {"cartoon": 0, "toy": 2} and data.task().texts == ["cartoon"] * 3 + ["toy"] * 3
    assert data.about.endswith("queries without a right image, which count as 0: 1 of cartoon, 0 of toy")
    assert len(data.images) == 8 and not ImageStore(data.paths, 24).missing()
    found = asked_at(data, 10 * np.arange(8), [1, 41, 1, 41, 1, 41])
    share = {1: (1 / 2, 0, 0), 5: (2 / 2, 0, 0), 10: (2 / 2, 2 / 2, 0)}         # of two cartoons; none is of class 5
    toys = {1: (1 / 2, 0, 0), 5: (2 / 2, 2 / 2, 1), 10: (1, 1, 1)}              # of class 2, 2 and 5
    for k in (1, 5, 10):
        for name, values, right in (("cartoon", share[k], (2, 2, 0)), ("toy", toys[k], (2, 2, 1))):
            hits = np.array(values) * right
            assert found[f"recall_top{k}_correct_{name}"] == pytest.approx(np.mean(values), rel=1e-4)
            assert found[f"precision_top{k}_correct_{name}"] == pytest.approx(np.mean(hits / min(k, 8)))
    assert found["recall_top1_correct_cartoon_answerable"] == pytest.approx(1 / 4, rel=1e-4)
    assert found["recall_top10_mean"] == pytest.approx((2 / 3 + 1) / 2, rel=1e-4)
    expected = chance(data.task().query_sets[0])["recall_top1_correct_cartoon"]
    assert expected == pytest.approx(2 / 3 / 8, rel=1e-4)
    assert data.protocol()["source"] == "stays in its ranking"


@pytest.mark.parametrize(("line", "words"), [
    ("imgnet/real/x.JPEG", "expected 'path label'"), ("a b", "expected 'path label'"),
    ("imgnet/../../x.JPEG 3", "no path inside")])
def test_lists_that_do_not_fit_are_one_line(tmp_path, line, words):
    file = write_imagenet_r(tmp_path) / "imgnet_real_query.txt"
    before = file.read_text()
    file.write_text(f"{before}{line}\n")
    with pytest.raises(InputError, match=f"line 4: .*{words}"):
        ImageNetR(tmp_path, "test")
    file.write_text(before)
    (tmp_path / "imgnet" / "imgnet_targets.txt").unlink()
    with pytest.raises(InputError, match="list of images not found"):
        ImageNetR(tmp_path, "test")


# Shoes

def test_shoes_pairs_of_one_picture_are_tested_but_not_trained_on(tmp_path):
    """Pictures at 0, 10, 20 and 30 degrees; asked at 1, 22 and 34: the target is second, first and first."""
    train, test = (Shoes(write_shoes(tmp_path), split) for split in ("train", "test"))
    assert [(line.source, line.targets, line.text) for line in train.annotations] == [
        (0, [1], "has a heel"), (1, [2], "is red")]
    assert train.about == "Shoes, train: 2 pairs, less 1 that have one picture as reference and target"
    assert test.about == "Shoes, test: 3 pairs, of which 1 have one picture as reference and target, as published"
    assert train.images == ["womens_boots/0/img_womens_boots_1.jpg", "womens_boots/1/img_womens_boots_2.jpg",
                            "womens_clogs/0/img_womens_clogs_3.jpg"] and len(test.images) == 4
    found = asked_at(test, [0, 10, 20, 30], [1, 22, 34])
    assert found == {"recall_top1_correct_composition": 2 / 3, "recall_top10_correct_composition": 1,
                     "recall_top50_correct_composition": 1}


def test_shoes_may_lie_deeper_and_what_is_in_no_list_is_counted(tmp_path):
    root = write_shoes(tmp_path)
    before = len(Shoes(root, "test").images)
    (root / "attributedata").mkdir()
    for folder in sorted(root.glob("womens_*")):
        folder.rename(root / "attributedata" / folder.name)
    data = Shoes(root, "test")
    assert len(data.images) == before and not ImageStore(data.paths, 24).missing()
    file = root / "eval_im_names.txt"
    file.write_text("".join(f"{line}\n" for line in file.read_text().splitlines()[:-1]))
    with pytest.raises(InputError, match=r"1 pictures that .* names are in neither .* first img_womens_flats_7.jpg"):
        Shoes(root, "test")
    assert len(Shoes(root, "test", without=frozenset()).annotations) == 2


# LaSCo

def test_lascos_recalls_are_those_by_hand(tmp_path):
    """The corpus, 1 to 6, at 0, 10, ... 50 degrees; image 4 asked at 24 comes second, 1 at 4 first."""
    data = LaSCo(write_lasco(tmp_path), "test")
    assert data.images[0] == "coco/val2014/COCO_val2014_000000000001.jpg" and len(data.images) == 6
    assert data.task().texts == ["The dog is wet", "A bus"] and not ImageStore(data.paths, 24).missing()
    found = asked_at(data, 10 * np.arange(6), [24, 4])
    assert found["recall_top1_correct_composition"] == 1 / 2 and found["recall_top5_correct_composition"] == 1
    train = LaSCo(tmp_path, "train")
    assert [(line.source, line.targets) for line in train.annotations] == [(0, [1]), (1, [2])]
    assert len(train.images) == 3


def test_a_corpus_of_another_release_is_one_line(tmp_path):
    root = write_lasco(tmp_path)
    file = root / "lasco_val_corpus.json"
    file.write_text(json.dumps(json.loads(file.read_text())[1:]))
    with pytest.raises(InputError, match=r"1 images that .* are not in lasco_val_corpus.json, first coco/val2014/COCO"):
        LaSCo(root, "test")
    with pytest.raises(InputError, match="no usable pair"):
        LaSCo(root, "test", without=frozenset())
    (root / "lasco_val.json").write_text('[{"query-image": 3}]')
    with pytest.raises(InputError, match=r"entry 1: expected \{'query-image'"):
        LaSCo(root, "test")


# All of them

@pytest.mark.parametrize("name", [name for name in TREES if name != "circo"])
def test_each_is_tested_by_a_run(name, small, tmp_path, capsys):
    root, logs = TREES[name](tmp_path / name), tmp_path / "logs"
    assert main.main([*to_test(small, name, root, logs), "--baselines=True"]) == 0
    (folder,) = logs.iterdir()
    metrics, data = json.loads((folder / "metrics.json").read_text()), DATASETS[name](root, "test")
    assert set(metrics["test"]) == set(data.metric_names())
    assert all(0 <= value <= 1 for value in metrics["test"].values())
    assert metrics["protocol"]["test"].items() >= data.protocol().items()
    assert in_a_line(metrics["protocol"]["test"]) in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("name", TREES)
def test_what_there_is_of_each_is_said(name, tmp_path, capsys):
    root = TREES[name](tmp_path / name)
    assert check.main(["--dataset", name, "--dataset_path", str(root), "--out", str(tmp_path / "x.html")]) == 0
    assert "nothing is wrong" in capsys.readouterr().out and (tmp_path / "x.html").stat().st_size > 1000


@pytest.mark.parametrize("name", ["circo", "genecis", "imagenet_r"])
def test_what_is_published_to_test_on_alone_is_not_trained_on(name, tmp_path, capsys):
    assert main.main(flags(name, TREES[name](tmp_path / name), tmp_path / "logs")) == 2
    assert f"--dataset {name} is published to test on alone" in capsys.readouterr().err


@pytest.mark.long("trainings")
@pytest.mark.parametrize("name", ["shoes", "lasco"])
def test_what_has_a_train_split_is_trained_on(name, tmp_path):
    run = run_main(name, TREES[name](tmp_path / name), tmp_path / "logs", batch_size=2)
    assert list(run.metrics) == ["it", "train", "test", "protocol"]


@pytest.mark.parametrize("name", TREES)
def test_a_whole_target_caption_is_asked_of_none(name, tmp_path):
    with pytest.raises(InputError, match="drop --use_complete_text_query"):
        DATASETS[name](TREES[name](tmp_path / name), "test", complete_text=True)
