"""What else lies in a dataset's folder: a Mac's hidden files, byte-order marks, pipes, links to themselves."""

import json
import os

import pytest

from datasets import DATASETS
from machine.errors import InputError

from .conftest import WRITERS, write_fashion_iq

BOM = b"\xef\xbb\xbf"


def hidden_twins(root):
    """Beside each file and in each folder what a Mac leaves; how many there are."""
    files = [file for file in root.rglob("*") if file.is_file()]
    for file in files:
        (file.parent / f"._{file.name}").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X        ")
    folders = {root, *(file for file in root.rglob("*") if file.is_dir())}
    for folder in folders:
        (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    return len(files) + len(folders)


def content(dataset):
    return dataset.images, dataset.training_texts(), dataset.task().texts


@pytest.mark.parametrize("split", ["train", "test"])
def test_hidden_files_are_neither_labels_nor_images(benchmark_tree, split):
    name, path = benchmark_tree
    before = content(DATASETS[name](path, split))
    hidden_twins(path)
    dataset = DATASETS[name](path, split)
    assert content(dataset) == before
    assert dataset.dropped["hidden files"] > 0


def test_hidden_files_are_counted_by_the_folders_that_are_read(mitstates):
    (mitstates / "images" / ".DS_Store").touch()
    for name in ("._0.jpg", "._1.jpg", ".hidden.jpg"):
        (mitstates / "images" / "old dog" / name).touch()
    (mitstates / "images" / "._old dog").touch()
    (mitstates / "images" / ".old cat").mkdir()
    dataset = DATASETS["mitstates"](mitstates, "train", without=frozenset())
    assert dataset.dropped == {"images": 0, "hidden files": 6}


def test_files_of_other_kinds_are_counted(mitstates):
    for name in ("note.txt", "2.JPG", "3.png"):
        (mitstates / "images" / "old dog" / name).touch()
    (mitstates / "images" / "a note.txt").touch()
    (mitstates / "images" / "loop dog").symlink_to("loop dog")
    dataset = DATASETS["mitstates"](mitstates, "train")
    assert dataset.dropped == {"images": 0, "files that do not end in .jpg": 3, "files beside the folders of images": 2}
    assert len(dataset.images) == 10


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_byte_order_mark_is_no_part_of_the_first_line(benchmark_tree, split):
    name, path = benchmark_tree
    before = content(DATASETS[name](path, split))
    marked = [file for kind in ("*.txt", "*.json") for file in path.rglob(kind)]
    for file in marked:
        file.write_bytes(BOM + file.read_bytes())
    assert content(DATASETS[name](path, split)) == before
    assert marked or name == "mitstates"


def test_a_byte_order_mark_moves_no_line_number(fashion200k):
    file = fashion200k / "labels" / "dress_train_detect_all.txt"
    file.write_bytes(BOM + b"women/train/0/0_0.jpeg\t1\tred dress\nno label\n")
    with pytest.raises(InputError, match=r"dress_train_detect_all\.txt, line 2: expected"):
        DATASETS["fashion200k"](fashion200k, "train")
    file.write_bytes(BOM + b"no label\n")
    with pytest.raises(InputError, match=r"line 1: expected .*got 'no label'"):
        DATASETS["fashion200k"](fashion200k, "train")


@pytest.mark.parametrize(("dataset", "name"), [("fashion200k", "labels/dress_train_detect_all.txt"),
                                               ("fashion200k", "test_queries.txt"),
                                               ("fashionIQ", "captions/cap.dress.train.json"),
                                               ("fashionIQ", "image_splits/split.dress.val.json")])
@pytest.mark.parametrize("kind", ["pipe", "folder", "link to itself"])
def test_what_is_no_regular_file_ends_in_one_sentence(tmp_path, dataset, name, kind):
    path = WRITERS[dataset](tmp_path / dataset)
    file = path / name
    file.unlink()
    if kind == "link to itself":
        file.symlink_to(file.name)
    else:
        os.mkfifo(file) if kind == "pipe" else file.mkdir()
    split = "train" if "train" in name else "test"
    with pytest.raises(InputError, match=rf"{file.name}") as error:
        DATASETS[dataset](path, split)
    assert "\n" not in str(error.value)


def test_fashion_iq_finds_its_images_whatever_lies_beside_them(fashion_iq, tmp_path):
    plain = DATASETS["fashionIQ"](write_fashion_iq(tmp_path / "plain"), "test")
    for name in ("._DV000.png", ".DV001.jpg", "notes.txt"):
        (fashion_iq / "all_imgs" / name).touch()
    splits = fashion_iq / "image_splits" / "split.dress.val.json"
    splits.write_bytes(BOM + json.dumps(json.loads(splits.read_text()), indent=1).encode())
    dataset = DATASETS["fashionIQ"](fashion_iq, "test")
    assert dataset.images == plain.images and dataset.dropped == {"images": 0, "hidden files": 2}
