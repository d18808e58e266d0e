"""CIRR read from a hand-written tree: pairs, recalls by hand, bad files."""

import json
import os

import numpy as np
import pytest
import torch

from datasets import CIRR, Epoch
from machine.errors import InputError
from test_retrieval import recalls

from .conftest import run_main


def test_recalls_are_those_by_hand(cirr):
    """Images at 0, 10, ... 70 degrees. dev-3 is asked at 46, wanting dev-6, after 5 and 4; of its set 4 is none. dev-1
    is asked at 24, wanting dev-2, the nearest."""
    data = CIRR(cirr, "test")
    assert data.images == [f"img_raw/dev/dev-{i}.png" for i in range(8)]
    (asked,) = data.task().query_sets
    assert asked.sources.tolist() == asked.excluded.tolist() == [3, 1]
    assert asked.texts == ["is Seen from above", "two of them"]
    angles = np.radians([10 * i for i in range(8)]), np.radians([46, 24])
    gallery, queries = (torch.tensor(np.stack([np.cos(at), np.sin(at)], 1), dtype=torch.float32) for at in angles)
    found = data.with_means(recalls(queries, gallery, asked.excluded, asked.metrics))
    whole = {f"recall_top{k}_correct_composition": share for k, share in ((1, 0.5), (5, 1), (10, 1), (50, 1))}
    assert found == whole | {"recall_top1_subset": 0.5, "recall_top2_subset": 1, "recall_top3_subset": 1,
                             "recall_mean": 0.75}
    assert set(found) == set(data.metric_names()) and data.best_metric in found


def test_training_reads_its_pairs_and_their_images_alone(cirr):
    data = CIRR(cirr, "train")
    assert sorted(Epoch(data, 0, 0)) == [(0, 1, "is red"), (1, 2, "is blue")]
    assert data.images == [f"img_raw/train/12/train-{i}.png" for i in range(3)]                 # 4 are listed
    gone = CIRR(cirr, "train", without=frozenset({"img_raw/train/12/train-2.png"}))
    assert len(gone.annotations) == 1 and gone.dropped["pairs"] == 1


def test_the_annotations_may_lie_in_a_folder_beside_the_images(cirr):
    before = CIRR(cirr, "test").images
    (cirr / "cirr").mkdir()
    for name in ("captions", "image_splits"):
        (cirr / name).rename(cirr / "cirr" / name)
    (cirr / "img_raw" / "dev").rename(cirr / "dev")
    (cirr / "img_raw" / "train").rename(cirr / "train")
    (cirr / "img_raw").rmdir()
    assert [f"img_raw/{image}" for image in CIRR(cirr, "test").images] == before


def test_a_run_ends_with_the_mean(cirr, tmp_path):
    run = run_main("cirr", cirr, tmp_path / "logs", batch_size=2)
    test = run.metrics["test"]
    mean = (test["recall_top5_correct_composition"] + test["recall_top1_subset"]) / 2
    assert test["recall_mean"] == pytest.approx(mean) and "recall_mean" not in run.metrics["train"]


def test_bad_files_are_one_line(cirr):
    captions, split = cirr / "captions" / "cap.rc2.val.json", cirr / "image_splits" / "split.rc2.val.json"
    entries = json.loads(captions.read_text())
    for content, words in (([{**entries[0], "caption": 3}], "entry 1: expected"), ([*entries, {}], "entry 3: expected"),
                           ([{**entries[0], "target_hard": "dev-99"}], "image 'dev-99' is not in the split's file"),
                           ([], "no usable pair"), ("{", "not valid JSON")):
        captions.write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(InputError, match=words):
            CIRR(cirr, "test")
    split.write_text(json.dumps({"dev-0": "../../dev-0.png"}))
    with pytest.raises(InputError, match="no path inside"):
        CIRR(cirr, "test")
    with pytest.raises(InputError, match="drop --use_complete_text_query"):
        CIRR(cirr, "test", complete_text=True)


@pytest.mark.parametrize("folder", ["img_raw", "images", "."])
def test_pictures_are_found_where_nlvr2s_hundred_folders_were_made_one(cirr, folder):
    before = {split: CIRR(cirr, split).images for split in ("train", "test")}
    for file in (cirr / "img_raw" / "train" / "12").iterdir():
        file.rename(cirr / "img_raw" / "train" / file.name)
    (cirr / "img_raw" / "train" / "12").rmdir()
    if folder == ".":
        for part in ("train", "dev"):
            (cirr / "img_raw" / part).rename(cirr / part)
        (cirr / "img_raw").rmdir()
    else:
        (cirr / "img_raw").rename(cirr / folder)
    top = "" if folder == "." else f"{folder}/"
    assert CIRR(cirr, "train").images == [f"{top}train/{os.path.basename(image)}" for image in before["train"]]
    assert CIRR(cirr, "test").images == [image.replace("img_raw/", top) for image in before["test"]]
    assert all(os.path.isfile(path) for split in ("train", "test") for path in CIRR(cirr, split).paths)
