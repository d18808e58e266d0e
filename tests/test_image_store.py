"""The store against the plain PIL pipeline, bit for bit, and what it does to changed, damaged and unwritable files."""

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from machine import image_store
from machine.errors import InputError
from machine.image_store import ImageStore, normalize_images
from machine.threads import prefetch

from .conftest import DAMAGE, picture, some


@pytest.fixture
def paths(tmp_path):
    sizes = [(40, 36), (36, 40), (33, 32), (200, 31), (31, 200), (32, 32), (301, 299)]
    for i, (width, height) in enumerate(sizes):
        picture(tmp_path / "pictures" / f"{i}.jpg", width, height)
    extras = {"grey.png": Image.new("L", (50, 40), 99), "palette.gif": Image.new("P", (50, 40), 7),
              "clear.png": Image.new("RGBA", (50, 40), (9, 8, 7, 60)),
              "cmyk.jpg": Image.new("CMYK", (50, 40), (9, 8, 7, 6))}
    for name, image in extras.items():
        image.save(tmp_path / "pictures" / name)
    return [str(path) for path in sorted((tmp_path / "pictures").iterdir())]


def plain(path, size):
    """What the original's transform does before ToTensor."""
    image = transforms.CenterCrop(size)(transforms.Resize(size)(Image.open(path).convert("RGB")))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.mark.parametrize("size", [32, 37, 224])
@pytest.mark.parametrize("cached", [True, False])
def test_pixels_are_those_of_the_plain_pipeline(paths, tmp_path, size, cached):
    store = ImageStore(paths, size, tmp_path / "cache" if cached else None)
    expected = torch.stack([plain(path, size) for path in paths])
    for _ in range(2):                                                          # decoded, then kept
        assert torch.equal(store.batch(range(len(paths))), expected)
    assert torch.equal(ImageStore(paths, size, tmp_path / "cache").batch([3, 0, 3]), expected[[3, 0, 3]])


def test_normalization_is_torchvisions_bit_for_bit(paths):
    images = [transforms.CenterCrop(40)(transforms.Resize(40)(Image.open(path).convert("RGB"))) for path in paths]
    original = transforms.Compose([transforms.ToTensor(), transforms.Normalize(image_store.IMAGENET_MEAN,
                                                                               image_store.IMAGENET_STD)])
    assert torch.equal(normalize_images(ImageStore(paths, 40).batch(range(len(paths)))),
                       torch.stack([original(image) for image in images]))


def decoded(monkeypatch):
    """The list of paths decoded from now on."""
    seen, decode = [], image_store.decode
    monkeypatch.setattr(image_store, "decode", lambda path, *how, **told: seen.append(path) or decode(path, *how,
                                                                                                       **told))
    return seen


def test_each_image_is_decoded_once_for_all_stores_on_a_cache(paths, tmp_path, monkeypatch):
    seen = decoded(monkeypatch)
    train, test = ImageStore(paths[:6], 32, tmp_path / "cache"), ImageStore(paths[4:], 32, tmp_path / "cache")
    for _ in range(2):
        train.batch(range(6))
        test.batch(range(len(test)))
    assert sorted(seen) == sorted(paths)


def test_a_changed_image_is_decoded_again(paths, tmp_path, monkeypatch):
    ImageStore(paths, 32, tmp_path / "cache").batch(range(len(paths)))
    shutil.copy(paths[1], paths[0])
    os.utime(paths[0], ns=(1, 1))
    seen = decoded(monkeypatch)
    store = ImageStore(paths, 32, tmp_path / "cache")
    assert torch.equal(store.batch([0])[0], plain(paths[1], 32)) and seen == [paths[0]]


@pytest.mark.parametrize("kind", ["paths", "records", "pixels"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_made_again(paths, tmp_path, kind, damage):
    ImageStore(paths, 32, tmp_path / "cache").batch(range(len(paths)))
    file = tmp_path / "cache" / f"images_32.{kind}"
    DAMAGE[damage](file, file.read_bytes())
    expected = torch.stack([plain(path, 32) for path in paths])
    for _ in range(2):
        assert torch.equal(ImageStore(paths, 32, tmp_path / "cache").batch(range(len(paths))), expected)


def test_a_moved_dataset_keeps_its_cache_and_another_pillow_does_not(paths, tmp_path, monkeypatch):
    ImageStore(paths, 32, tmp_path / "pictures" / "cache").batch(range(len(paths)))
    (tmp_path / "pictures").rename(tmp_path / "elsewhere")
    moved, seen = [path.replace("pictures", "elsewhere") for path in paths], decoded(monkeypatch)
    ImageStore(moved, 32, tmp_path / "elsewhere" / "cache").batch(range(len(paths)))
    assert seen == []
    monkeypatch.setattr(image_store.PIL, "__version__", "another")
    ImageStore(moved, 32, tmp_path / "elsewhere" / "cache").batch([1])
    assert seen == [moved[1]]


def test_slots_that_change_hands_are_not_believed(paths, tmp_path):
    for path in paths:
        os.utime(path, ns=(5, 5))                                               # all of one time; below, of one size
    twins = [paths[0], str(tmp_path / "twin.jpg")]
    Image.open(paths[0]).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(twins[1], quality=90)
    longest = max(os.path.getsize(path) for path in twins)
    for path in twins:
        with open(path, "ab") as file:
            file.write(bytes(longest - os.path.getsize(path)))                  # JPEG readers stop at the end marker
        os.utime(path, ns=(5, 5))
    ImageStore(twins, 32, tmp_path / "cache").batch([0, 1])
    (tmp_path / "cache" / "images_32.paths").write_bytes(b"")
    swapped = ImageStore(twins[::-1], 32, tmp_path / "cache").batch([0, 1])
    assert torch.equal(swapped, torch.stack([plain(path, 32) for path in twins[::-1]]))


def test_without_room_or_permission_images_are_decoded_each_time(paths, tmp_path, monkeypatch, caplog):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with caplog.at_level(logging.WARNING):
        store = ImageStore(paths, 32, tmp_path / "cache")
    assert "decoded each time" in caplog.text and "GB free" in caplog.text
    assert torch.equal(store.batch([2])[0], plain(paths[2], 32))
    (tmp_path / "file").write_text("")
    assert torch.equal(ImageStore(paths, 32, tmp_path / "file" / "cache").batch([2])[0], plain(paths[2], 32))


def test_a_disk_that_fills_up_costs_speed_only(paths, tmp_path, monkeypatch, caplog):
    store = ImageStore(paths, 32, tmp_path / "cache")
    store.batch([0])
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "pwrite", full)
    seen = decoded(monkeypatch)
    for _ in range(2):
        assert torch.equal(store.batch([0, 1, 2]), torch.stack([plain(paths[i], 32) for i in (0, 1, 2)]))
    assert seen == [paths[1], paths[2]] * 2                                     # what was kept before is still used
    assert caplog.text.count("No space left") == 1


FILL = """
import sys
from machine.image_store import ImageStore
from machine.threads import prefetch
store = ImageStore(sys.argv[2:], 224, sys.argv[1])
print("ready", flush=True)
for i in range(len(store)): store.batch([i])
"""


@pytest.mark.long("processes")
@pytest.mark.parametrize("delays", some([[0.004], [0.0, 0.004, 0.015]], mark=pytest.mark.rare))
def test_killed_and_simultaneous_writers_leave_a_good_cache(paths, tmp_path, delays):
    many = paths * 3 + [str(path) for path in sorted((tmp_path / "pictures").iterdir())]
    for delay in delays:
        writers = [subprocess.Popen([sys.executable, "-c", FILL, tmp_path / "cache", *many], stdout=subprocess.PIPE)
                   for _ in range(2)]
        for writer in writers:
            writer.stdout.readline()
        time.sleep(delay)
        for writer in writers:
            writer.send_signal(signal.SIGKILL)
            writer.communicate()
    store = ImageStore(paths, 224, tmp_path / "cache")
    assert torch.equal(store.batch(range(len(paths))), torch.stack([plain(path, 224) for path in paths]))


def test_unreadable_images_are_named_and_the_rest_is_kept(paths, tmp_path, monkeypatch):
    cut = tmp_path / "pictures" / "cut.jpg"
    cut.write_bytes(Path(paths[0]).read_bytes()[:200])
    empty = tmp_path / "pictures" / "empty.jpg"
    empty.write_bytes(b"")
    store = ImageStore([*paths, str(cut), str(empty), "absent.jpg"], 32, tmp_path / "cache")
    bad = store.unreadable()
    assert sorted(bad) == [len(paths), len(paths) + 1, len(paths) + 2]
    assert "cut.jpg" in bad[len(paths)] and "empty" in bad[len(paths) + 1]
    assert store.missing() == [str(empty), "absent.jpg"]
    seen = decoded(monkeypatch)
    store.batch(range(len(paths)))
    assert seen == []
    with pytest.raises(InputError, match=r"cut\.jpg.*--skip_bad_images"):
        store.batch([len(paths)])


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_prefetch_keeps_order_stops_early_and_raises_what_was_raised(workers):
    assert list(prefetch(lambda x: x * x, range(20), workers)) == [x * x for x in range(20)]
    started = []
    ahead = prefetch(lambda x: started.append(x) or x, range(10_000), workers)
    assert [next(ahead) for _ in range(3)] == [0, 1, 2]
    ahead.close()
    assert len(started) < 100
    def fail(x):
        raise InputError(f"no {x}")
    with pytest.raises(InputError, match="no 0"):
        next(prefetch(fail, range(3), workers))
