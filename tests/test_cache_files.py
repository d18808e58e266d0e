"""The files in a dataset's image_cache: written through no link, read from what is there, whoever cuts it short."""

import os
import sqlite3

import numpy as np
import pytest
import torch

from machine.feature_store import FeatureStore
from machine.image_store import ImageStore
from searching.image_list import ImageList
from text_model import SentenceFile

from .conftest import picture

NAMES = ("images_32.paths", "images_32.records", "images_32.pixels")


@pytest.fixture
def paths(tmp_path):
    for number in range(6):
        picture(tmp_path / "pictures" / f"{number}.jpg")
    return [str(path) for path in sorted((tmp_path / "pictures").iterdir())]


@pytest.fixture
def cache(tmp_path):
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


def pixels(paths):
    return ImageStore(paths, 32).batch(range(len(paths)))


def link(kind, file, notes):
    {"link": lambda: file.symlink_to(notes), "second name": lambda: os.link(notes, file),
     "link to nothing": lambda: file.symlink_to(notes.parent / "made"), "link to itself": lambda: file.symlink_to(file),
     "pipe": lambda: os.mkfifo(file), "folder": file.mkdir}[kind]()


KINDS = ["link", "second name", "link to nothing", "link to itself", "pipe", "folder"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_written_through_a_link(paths, cache, tmp_path, caplog, name, kind):
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    link(kind, cache / name, notes)
    store = ImageStore(paths, 32, cache)
    assert torch.equal(store.batch(range(6)), pixels(paths))
    assert notes.read_text() == "mine" and not (tmp_path / "made").exists()
    assert caplog.text.count("no image cache") == 1 and name in caplog.text and "remove it" in caplog.text


def test_the_cache_folder_itself_may_be_a_link(paths, cache, tmp_path, caplog):
    (tmp_path / "linked").symlink_to(cache)
    ImageStore(paths, 32, tmp_path / "linked").batch(range(6))
    assert {file.name for file in cache.iterdir()} == set(NAMES) and not caplog.records


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ending", ["", "-journal", "-wal"])
def test_sentence_vectors_are_written_through_no_link(cache, tmp_path, caplog, kind, ending):
    path, notes = SentenceFile(cache, {"a": 1}, 4).path, tmp_path / "notes.txt"
    sqlite3.connect(notes).close()
    notes.write_bytes(b"")                                                      # which SQLite would take for its own
    link(kind, path.with_name(path.name + ending), notes)
    file = SentenceFile(cache, {"a": 1}, 4)
    for _ in range(2):
        file.write(["red"], np.ones((1, 4), np.float32))
    assert notes.read_bytes() == b"" and not (tmp_path / "made").exists()
    assert caplog.text.count("cannot be kept") == 1


def test_sentence_vectors_are_kept_in_a_file_of_ones_own(cache):
    SentenceFile(cache, {"a": 1}, 4).write(["red"], np.ones((1, 4), np.float32))
    vectors = np.zeros((1, 4), np.float32)
    SentenceFile(cache, {"a": 1}, 4).read(["red"], vectors)
    assert (vectors == 1).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", [0, 100, 3 * 32 * 32 * 3 + 50])
def test_a_file_cut_short_while_in_use_costs_decoding_alone(paths, cache, name, length):
    """Of a mapped file this would end the process: SIGBUS."""
    ImageStore(paths, 32, cache).batch(range(6))
    store = ImageStore(paths, 32, cache)
    store.batch(range(6))                                                       # all verified
    os.truncate(cache / name, length)
    for _ in range(2):
        assert torch.equal(store.batch([5, 0, 1, 2, 3, 4]), pixels(paths)[[5, 0, 1, 2, 3, 4]])
    assert store.unreadable() == {}
    assert torch.equal(ImageStore(paths, 32, cache).batch(range(6)), pixels(paths))


def test_a_file_cut_short_and_grown_again_is_not_believed(paths, cache):
    """Where it is grown, as by another process that fills the last slot, it holds zeros."""
    store = ImageStore(paths, 32, cache)
    for _ in range(2):
        store.batch(range(6))
    file = cache / "images_32.pixels"
    for length in (0, 32 * 32 * 3 + 1000):
        os.truncate(file, length)
        os.truncate(file, 6 * 32 * 32 * 3)
        assert torch.equal(store.batch(range(6)), pixels(paths))


def test_a_removed_cache_is_no_matter_to_who_uses_it(paths, cache):
    store = ImageStore(paths, 32, cache)
    for name in NAMES:
        (cache / name).unlink()
    for _ in range(2):
        assert torch.equal(store.batch(range(6)), pixels(paths))


@pytest.mark.parametrize(("umask", "mode"), [(0o002, 0o664), (0o022, 0o644), (0o077, 0o600)])
def test_who_may_write_to_what_is_kept_is_said_by_the_umask(tmp_path, umask, mode):
    """So a group with umask 002 has one cache of decoded images, features and sentences, and one index."""
    picture(tmp_path / "a" / "0.jpg")
    before = os.umask(umask)
    try:
        images = ImageStore([str(tmp_path / "a" / "0.jpg")], 32, tmp_path / "cache")
        features = FeatureStore(images, lambda pixels: pixels.float().mean((2, 3)), 3, "x", tmp_path / "cache")
        features.batch([0])
        SentenceFile(tmp_path / "cache", {}, 3).write(["a"], np.ones((1, 3), np.float32))
        ImageList(tmp_path / "cache" / "images.sqlite").create(tmp_path)
    finally:
        os.umask(before)
    found = {file.name: oct(file.stat().st_mode & 0o777) for file in (tmp_path / "cache").iterdir()}
    assert len(found) == 3 + 3 + 1 + 1 and set(found.values()) == {oct(mode)}, found
