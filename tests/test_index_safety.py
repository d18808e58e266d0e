"""An index loses nothing to a failure, and believes nothing that is damaged or a stranger's."""

import os
import random
import re
import shutil
import sqlite3

import pytest

import search
from machine.errors import InputError
from machine.folder_lock import FolderLock
from searching.gallery import Gallery
from searching.image_list import BEFORE_CHECKSUMS, ImageList

from .conftest import picture, some
from .index_faults import (
    FILES,
    beside,
    by_hand,
    circles,
    copied,
    execute,
    flip,
    folder_is,
    older,
    other_model,
    same,
    write_model,
)
from .test_search import CPU, quiet  # noqa: F401
from .test_search import with_networks as made


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("safety") / "model.pth")


@pytest.fixture(scope="module")
def first(trained, tmp_path_factory):
    """Twelve pictures in three folders, and their index."""
    root = tmp_path_factory.mktemp("first")
    for number in range(4):
        for folder in ("", "a", "a/b"):
            picture(root / "images" / folder / f"{number}.jpg")
    made(trained, root / "images", root / "out")
    return root


@pytest.fixture(scope="module")
def right(first):
    return answer(first / "out", first / "images" / "0.jpg")


@pytest.fixture
def both(first, tmp_path):
    """A folder and its index, to be spoilt."""
    folder = shutil.copytree(first / "images", tmp_path / "images", copy_function=shutil.copy2)
    copied(first / "out", tmp_path / "out")
    folder_is(tmp_path / "out", os.fsencode(folder.resolve()))
    return folder, tmp_path / "out"


def paths(out):
    images = ImageList(out / "images.sqlite")
    return {images.path_of(number) for number in images.ids()}


def answer(out, image):
    opened = Gallery(out, CPU)
    return [(hit.path, hit.score) for hit in opened.search(image, "", 12)]


@pytest.mark.long("several indexes")
@pytest.mark.parametrize("gone", ["everything", "most"])
def test_an_index_is_not_emptied_by_a_disk_that_is_not_there(trained, both, gone, capsys):
    folder, out = both
    before = paths(out)
    for path in list(folder.iterdir()):
        if path.is_dir():
            shutil.rmtree(path)
        elif gone == "everything" or path.name != "0.jpg":
            path.unlink()
    if gone == "most":
        for number in range(4):
            picture(folder / "a" / f"new{number}.jpg")
        (folder / "a" / "b").mkdir()
        picture(folder / "a" / "b" / "new.jpg")
    words = ["index", "--model_checkpoint", trained, "--images", folder, "--out", out]
    assert search.main([str(word) for word in words]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and re.search("is empty.*stay" if gone == "everything" else "--prune", err), err
    assert paths(out) == before
    if gone == "most":
        assert search.main([str(word) for word in [*words, "--prune"]]) == 0
        assert paths(out) == {"0.jpg", "a/b/new.jpg", *(f"a/new{number}.jpg" for number in range(4))}


@pytest.mark.parametrize("how", some(["gone", "empty", "linked"]))
def test_a_folder_that_is_not_there_for_a_moment_costs_nothing(trained, both, tmp_path, how, caplog):
    folder, out = both
    before = paths(out)
    (folder / "a").rename(tmp_path / "elsewhere")
    if how == "empty":
        (folder / "a").mkdir()
    elif how == "linked":
        (folder / "a").symlink_to(tmp_path / "elsewhere")
    built = made(trained, folder, out)
    assert paths(out) == before and built.new == 0 and "8 images are not to be found, but stay" in caplog.text
    assert ("1 linked folder not followed" in built.summary) == (how == "linked")
    made_again = search.main(["index", "--model_checkpoint", str(trained), "--images", str(folder), "--out", str(out),
                              "--prune"])
    assert made_again == 0 and paths(out) == {f"{number}.jpg" for number in range(4)}


def test_a_few_images_removed_on_purpose_go_and_a_broken_change_keeps_the_old_feature(trained, both, caplog):
    folder, out = both
    (folder / "a" / "0.jpg").unlink()
    (folder / "a" / "1.jpg").unlink()
    (folder / "2.jpg").write_bytes(b"half a picture")
    built = made(trained, folder, out)
    assert built.images == 10 and "its earlier feature stays" in built.broken["2.jpg"]
    assert "a/0.jpg" not in paths(out) and "2.jpg" in paths(out)


@pytest.mark.long("several indexes")
def test_all_that_is_left_out_is_counted_by_kind(trained, tmp_path):
    folder = tmp_path / "images"
    for name in ("good.jpg", ".hidden.jpg", "._good.jpg"):
        picture(folder / name)
    picture(tmp_path / "outside" / "x.jpg")
    (folder / "half.png").write_bytes(b"half")
    (folder / "notes.txt").touch()
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / "out.jpg").symlink_to(tmp_path / "outside" / "x.jpg")
    (folder / "linked").symlink_to(tmp_path / "outside")
    os.mkfifo(folder / "pipe.jpg")
    built = made(trained, folder, tmp_path / "out")
    assert built.summary == ("4 left out (1 broken image, 1 broken link, 1 link out of the folder, 1 not a regular "
                             "file), 1 linked folder not followed, 2 hidden images, 1 other file")
    assert built.left_out["loop.jpg"] == "a link to itself" and built.images == 1


def test_nothing_is_written_through_links(trained, first, tmp_path):
    out = copied(first / "out", tmp_path / "out")
    (tmp_path / "mine").write_text("mine")
    (out / "index.faiss.unfinished").symlink_to(tmp_path / "mine")
    with pytest.raises(InputError, match="not a regular file"):
        made(trained, first / "images", out)
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.avx
def test_one_process_at_a_time_works_on_an_index(trained, first, tmp_path):
    out = copied(first / "out", tmp_path / "out")
    with FolderLock() as lock:
        lock.take(out)
        with pytest.raises(InputError, match=rf"in use by process {os.getpid()} .*another --out"):
            made(trained, first / "images", out)
    assert made(trained, first / "images", out).images == 12
    assert sorted(path.name for path in out.iterdir()) == sorted(FILES)


@pytest.mark.parametrize("name", [pytest.param(name, marks={
    "images.sqlite": [pytest.mark.long("opened eight times")],
    "networks.zip": [pytest.mark.avx, pytest.mark.long("opened eight times")]}.get(name, [])) for name in FILES])
def test_no_flipped_bit_is_believed(first, right, tmp_path, name, caplog):
    rng = random.Random(1)
    length = (first / "out" / name).stat().st_size
    for _ in range(8):
        out = copied(first / "out", tmp_path / "out")
        flip(out / name, rng.randrange(8 * length))
        caplog.clear()
        try:
            assert same(answer(out, first / "images" / "0.jpg"), right, name)
            assert name == "images.sqlite" or re.search("made again from the list|torch computes", caplog.text)
        except InputError as error:
            assert "\n" not in str(error) and name not in ("index.faiss", "networks.zip")


@pytest.mark.long("several indexes")
def test_an_index_without_checksums_opens_with_a_note_and_is_given_them(trained, both, caplog):
    folder, out = both
    right = answer(out, folder / "0.jpg")
    older(out, BEFORE_CHECKSUMS)
    assert answer(out, folder / "0.jpg") == right and caplog.text.count("has no checksums") == 1
    assert made(trained, folder, out).new == 0
    caplog.clear()
    assert answer(out, folder / "0.jpg") == right and not caplog.text
    flip(out / "index.faiss", 1000)
    assert answer(out, folder / "0.jpg") == right and "made again" in caplog.text


def test_an_id_below_the_list_lost_to_damage_is_no_image_that_was_removed(first, tmp_path):
    out = copied(first / "out", tmp_path / "out")
    execute(out, "DELETE FROM images WHERE id = 3")
    with pytest.raises(InputError, match="image 3 is gone"):
        answer(out, first / "images" / "0.jpg")


@pytest.mark.parametrize("name", some(["circles", *list(by_hand())[::2], *list(by_hand())[1::2]], 20))
def test_a_strangers_index_ends_in_one_line_or_the_right_answer(first, right, tmp_path, name):
    out = copied(first / "out", tmp_path / "out")
    try:
        {**by_hand(), "circles": circles}[name](out)
    except sqlite3.Error as error:                                              # this SQLite makes no such thing
        pytest.skip(str(error))
    try:
        assert answer(out, first / "images" / "0.jpg") == right
    except InputError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(("flags", "said"), some([
    ({"text_encoder": "hf:evil.example/model", "pooling_layer": -2, "max_seq_len": 25}, "HF_HUB_OFFLINE=0"),
    ({"text_encoder": "hf:evil.example/model", "pooling_layer": "own", "max_seq_len": "own"}, "HF_HUB_OFFLINE=0"),
    ({"text_encoder": "open_clip:ViT-B-32/openai", "image_encoder": "x", "image_weights": "none"},
     "get https.* and put it at .*HF_HUB_OFFLINE=0"),
    ({"text_encoder": "hf:evil.example/model"}, "none of this program's"),
    ({"text_encoder": "service", "bert_port": "x"}, "none of this program's"),
    ({"text_encoder": "service", "bert_timeout": 1e9}, "none of this program's"),
    ({"text_encoder": "service", "bert_ip": "192.0.2.1", "bert_timeout": 1.0, "bert_port": 9, "bert_port_out": 9},
     "localhost:9")], 3))
def test_a_strangers_index_has_no_other_host_asked(first, tmp_path, monkeypatch, flags, said):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    def change(state):
        state["opt"].update(flags)
        state["recipe"]["text_encoder"] = flags["text_encoder"]
    out = copied(first / "out", tmp_path / "out")
    other_model(out, change)
    opened = Gallery(out, CPU)
    with pytest.raises(InputError, match=said):
        opened.search(first / "images" / "0.jpg", "red", 12)


def test_the_whole_machine_is_no_folder_of_images(first, tmp_path):
    out = copied(first / "out", tmp_path / "out")
    beside(out, b"../" * 50, folder=b"/nowhere")
    assert str(Gallery(out, CPU).folder) == "/nowhere"


def test_a_query_cannot_write_to_the_list(first):
    with pytest.raises(InputError), ImageList(first / "out" / "images.sqlite").opened() as (database, _):
        database.execute("DELETE FROM images")
    assert len(paths(first / "out")) == 12
