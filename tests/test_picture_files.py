"""Pictures from anybody: what they may be and cost, and that they are seen as a screen shows them."""

import os
import signal
import struct
import tracemalloc
import zlib
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin
from torchvision import transforms

from machine.errors import InputError
from machine.image_store import ImageStore
from machine.picture_files import LARGEST_FILE, TooLarge, decode
from machine.resizing import plain_square
from searching.encoder import read_picture
from training.pictures import thumbnail

from .torture_images import (
    chunk,
    damaged,
    flat,
    noise,
    overlapping,
    repeated_scans,
    rle_bmp,
    saved,
    tiled,
    with_chunks,
    with_segments,
)

WAYS = {"training": lambda file: decode(file, 32), "index": lambda file: decode(file, 32, upright=True),
        "query": lambda file: read_picture(file, 32), "thumbnail": thumbnail}


def written(folder, content, name="picture.jpg"):
    (folder / name).write_bytes(content)
    return folder / name


@contextmanager
def ended_within(seconds):
    """Else the process is ended by SIGALRM, which no hanging call outlasts."""
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "link to itself", "socket", "nothing", "empty"])
def test_only_regular_files_are_opened(tmp_path, way, kind):
    file = tmp_path / "picture.jpg"
    {"pipe": os.mkfifo, "folder": os.mkdir, "device": lambda path: os.symlink("/dev/zero", path),
     "link to itself": lambda path: os.symlink(path, path), "socket": lambda path: os.mknod(path, 0o140644),
     "nothing": lambda path: None, "empty": lambda path: path.touch()}[kind](file)
    with ended_within(60), pytest.raises(InputError, match=r"picture\.jpg") as error:
        WAYS[way](file)
    assert "\n" not in str(error.value)


BEYOND = {
    "201 scans": (lambda: repeated_scans(64, 64, 200), "scans"),
    "scans of a large picture": (lambda: repeated_scans(4000, 4000, 40), "scans"),
    "1 x 20,000": (lambda: saved(flat(1, 20_000), "PNG"), "times as long as wide"),
    "300,000 x 1": (lambda: saved(flat(300_000, 1), "PNG"), "times as long as wide"),
    "a million chunks": (lambda: with_chunks(chunk(b"aaAa") * 10**6), "parts"),
    "overlapping tags": (lambda: overlapping(60_000, 10**5), "parts"),
    "overlapping Exif": (lambda: with_segments(0xE1, b"Exif\0\0" + overlapping(100, 60_000)[:65_000], 2), "Exif"),
    "huge tiles": (lambda: tiled(20_000), "tiles"),
    "runs of one": (lambda: rle_bmp(2000, 2000, b""), "more than 0.5 megapixels"),
    "letters": (lambda: b"P3 2000 2000 255\n", "more than 0.5 megapixels"),
    "41 megapixels": (lambda: saved(flat(6500, 6350, "1"), "PNG"), "more than 40 megapixels"),
    "26 megapixels seen through": (lambda: saved(flat(5200, 5000, "RGBA"), "PNG", compress_level=1),
                                   "more than 25 megapixels"),
    "26 megapixels of a page": (lambda: saved(flat(5200, 5000), "WEBP", method=0), "more than 25 megapixels"),
}


@pytest.mark.parametrize("case", BEYOND)
def test_what_would_cost_too_much_is_refused_before_it_costs(tmp_path, case):
    make, said = BEYOND[case]
    file = written(tmp_path, make())
    for way in ("training", "query"):
        tracemalloc.start()
        try:
            with pytest.raises(TooLarge, match=said) as error:
                WAYS[way](file)
            assert tracemalloc.get_traced_memory()[1] < 100e6
        finally:
            tracemalloc.stop()
        assert "\n" not in str(error.value) and str(file) in str(error.value)


def test_a_file_larger_than_any_photograph_is_not_read(tmp_path):
    file = written(tmp_path, saved(flat(64, 64), "JPEG"))
    os.truncate(file, LARGEST_FILE + 1)                                         # sparse
    with pytest.raises(TooLarge, match="256 MB"):
        decode(file, 32)


@pytest.mark.parametrize("kind", ["EPS", "PDF", "ICO", "TGA", "JPEG2000", "PCX"])
def test_other_formats_are_not_opened_whatever_their_name(tmp_path, kind):
    file = written(tmp_path, saved(flat(64, 64), kind))
    with pytest.raises(InputError, match="no picture of a kind that is read"):
        decode(file, 32)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF", "MPO"])
def test_named_formats_are_opened_whatever_their_name(tmp_path, kind):
    file = written(tmp_path, saved(noise(80, 60), kind))
    expected = plain_square(Image.open(file).convert("RGB"), 32)
    for way in ("training", "index", "query"):
        assert np.array_equal(WAYS[way](file), expected)


@pytest.mark.parametrize(("width", "height"), [(3, 300), (300, 3), (8, 790), (790, 8), (100, 1), (1, 100)])
def test_long_pictures_have_the_published_pixels(tmp_path, width, height):
    file = written(tmp_path, saved(noise(width, height, coarse=1), "PNG"))
    published = transforms.CenterCrop(32)(transforms.Resize(32)(Image.open(file).convert("RGB")))
    for way in ("training", "index", "query"):
        assert np.array_equal(WAYS[way](file), np.asarray(published))


def test_progressive_photographs_are_read(tmp_path):
    picture = noise(3000, 2000)
    file = written(tmp_path, saved(picture, "JPEG", progressive=True, quality=95))
    assert decode(file, 32).shape == (32, 32, 3)
    several = saved(noise(64, 64), "JPEG") + bytes(100) + repeated_scans(64, 64, 300)  # a film behind a photograph
    assert decode(written(tmp_path, several), 32).shape == (32, 32, 3)


@pytest.mark.parametrize("number", range(0, 64, 5))
def test_damaged_files_end_in_pixels_or_a_sentence(tmp_path, number):
    name, content = list(damaged())[number]
    file = written(tmp_path, content)
    for way, work in WAYS.items():
        try:
            work(file)
        except InputError as error:
            assert "\n" not in str(error), (name, way)


def ramp(kind):
    """An 8-bit grey picture, and the same in another kind."""
    grey = np.linspace(0, 255, 60 * 80).reshape(60, 80).round().astype(np.uint8)
    wide = {"I;16": grey.astype(np.uint16) * 257, "I;16B": (grey.astype(np.uint16) * 257).astype(">u2"),
            "I": grey.astype(np.int32), "I of 16 bits": grey.astype(np.int32) * 257,
            "I of 32 bits": (grey.astype(np.int64) * (2**31 - 1) // 255).astype(np.int32),
            "F to 1": grey.astype(np.float32) / 255, "F to 255": grey.astype(np.float32),
            "F of any range": grey.astype(np.float32) * 3 - 1000}[kind]
    return Image.fromarray(grey), Image.fromarray(wide)


@pytest.mark.parametrize("kind", ["I;16", "I;16B", "I", "I of 16 bits", "I of 32 bits", "F to 1", "F to 255",
                                  "F of any range"])
def test_a_picture_of_more_bits_is_seen_as_its_8_bit_twin(tmp_path, kind):
    grey, wide = ramp(kind)
    twin, file = written(tmp_path, saved(grey, "TIFF"), "twin.tif"), written(tmp_path, saved(wide, "TIFF"))
    for way in ("index", "query"):
        assert np.abs(WAYS[way](file).astype(int) - WAYS[way](twin)).max() <= 1, way
    assert np.abs(np.asarray(thumbnail(file), int) - np.asarray(thumbnail(twin), int)).max() <= 1


def test_16_bit_pngs_are_seen_as_their_8_bit_twins_and_trained_on_as_published(tmp_path):
    grey, wide = ramp("I;16")
    twin, file = written(tmp_path, saved(grey, "PNG"), "twin.png"), written(tmp_path, saved(wide, "PNG"))
    assert np.array_equal(decode(file, 32, upright=True), decode(twin, 32))
    published = plain_square(Image.open(file).convert("RGB"), 32)
    assert np.array_equal(decode(file, 32), published) and not np.array_equal(published, decode(twin, 32))


def test_floats_that_are_no_numbers_are_black(tmp_path):
    values = np.full((64, 64), np.nan, np.float32)
    values[:, 32:] = 1
    values[:8, :32] = -np.inf
    pixels = decode(written(tmp_path, saved(Image.fromarray(values), "TIFF")), 64, upright=True)
    assert (pixels[:, :32] == 0).all() and (pixels[:, 32:] == 255).all()


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P"])
def test_transparency_is_white_where_it_is_looked_at(tmp_path, kind):
    picture = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    picture.paste((200, 200, 200, 255), (16, 16, 48, 48))
    picture.paste((0, 0, 0, 128), (0, 0, 64, 8))
    if kind == "P":
        picture = Image.new("P", (64, 64), 0)
        picture.putpalette([0, 0, 0, 200, 200, 200])
        picture.paste(1, (16, 16, 48, 48))
        picture.info["transparency"] = 0
    file = written(tmp_path, saved(picture if kind == "P" else picture.convert(kind), "PNG"))
    for way in ("index", "query"):
        pixels = decode(file, 64, upright=True)
        assert (pixels[32, 32] == 200).all() and (pixels[60, 60] == 255).all(), way
        assert kind == "P" or (pixels[2, 30] == 127).all()                      # half of black over white
    assert np.asarray(thumbnail(file))[60, 60].tolist() == [255] * 3
    assert (decode(file, 64)[60, 60] == 0).all()                                # as published


@pytest.mark.parametrize("number", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_pictures_are_turned_as_the_camera_noted(tmp_path, kind, number):
    from PIL import ImageOps
    note, options = Image.Exif(), {"WEBP": {"lossless": True}, "JPEG": {"quality": 95}}.get(kind, {})
    note[274] = number
    file = written(tmp_path, saved(noise(60, 40), kind, exif=note, **options))
    with Image.open(file) as image:
        expected = plain_square(ImageOps.exif_transpose(image).convert("RGB"), 32)
    assert np.array_equal(decode(file, 32, upright=True), expected)


def test_a_store_says_once_how_many_images_it_clips(tmp_path, caplog):
    grey, wide = ramp("I;16")
    clear = Image.new("RGBA", (40, 40), (9, 9, 9, 0))
    opaque = Image.new("RGBA", (40, 40), (9, 9, 9, 255))
    files = [written(tmp_path, saved(image, "PNG"), f"{number}.png")
             for number, image in enumerate([grey, wide, clear, opaque, wide])]
    store = ImageStore(list(map(str, files)), 32, tmp_path / "cache")
    assert store.unreadable() == {}
    store.batch(range(5))
    assert caplog.text.count("note:") == 1 and "3 of the images" in caplog.text and "1.png" in caplog.text
    caplog.clear()
    ImageStore(list(map(str, files)), 32).batch([0, 3])
    assert not caplog.records


def test_no_memory_is_one_line_and_not_the_images_fault(tmp_path, monkeypatch):
    file = written(tmp_path, saved(flat(64, 64), "PNG"))
    def full(*_):
        raise MemoryError
    with pytest.raises(OSError, match=r"no memory left to read the image.*picture\.jpg"):
        decode(file, 32, to_square=full)


def test_cuts_of_a_file_never_give_pixels_or_more_than_a_sentence(tmp_path):
    for kind in ("JPEG", "PNG", "WEBP", "GIF"):
        content = saved(noise(200, 150), kind)
        for length in np.linspace(1, len(content) // 2, 20).astype(int):
            with pytest.raises(InputError, match=r"cannot read the image") as error:
                decode(written(tmp_path, content[:length]), 32)
            assert "\n" not in str(error.value)


def test_a_picture_is_read_from_what_was_there_at_once(tmp_path):
    """A file cut short while it is read ends no process: nothing is mapped."""
    file = written(tmp_path, saved(noise(600, 600), "BMP"))
    from machine.picture_files import opened
    with opened(file) as image:
        os.truncate(file, 100)
        assert np.asarray(image.convert("RGB")).shape == (600, 600, 3)


# Colours

def primaries(colours, gamma):
    """An ICC profile of three colours, as their XYZ, and a gamma: as small as one can be."""
    def s15(*values):
        return b"".join(struct.pack(">i", round(value * 65536)) for value in values)
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    tags = {b"wtpt": b"XYZ \0\0\0\0" + s15(0.9642, 1, 0.8249), b"desc": b"desc\0\0\0\0\0\0\0\1\0" + b"\0" * 79}
    tags |= {name: b"XYZ \0\0\0\0" + s15(*xyz) for name, xyz in zip((b"rXYZ", b"gXYZ", b"bXYZ"), colours, strict=True)}
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    place, table, body = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += name + struct.pack(">II", place + len(body), len(content))
        body += content + b"\0" * (-len(content) % 4)
    head = b"\0\0\0\0\0\0\0\0\2\x40\0\0mntrRGB XYZ " + b"\0" * 12 + b"acsp" + b"\0" * 28 + s15(0.9642, 1, 0.8249)
    head = head.ljust(128, b"\0")
    return struct.pack(">I", place + len(body)) + head[4:] + table + body


ADOBE = primaries([(0.6097, 0.3111, 0.0195), (0.2053, 0.6257, 0.0609), (0.1492, 0.0632, 0.7446)], 2.2)
P3 = primaries([(0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841)], 2.2)
PROPHOTO = primaries([(0.7977, 0.2880, 0.0), (0.1352, 0.7119, 0.0), (0.0313, 0.0001, 0.8249)], 1.8)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
# What 200, 100, 50 of each is in sRGB, by hand: linear light by the primaries to XYZ, by those of sRGB back, its curve.
SEEN = {"Adobe": (ADOBE, (227, 100, 42)), "P3": (P3, (216, 92, 24)), "ProPhoto": (PROPHOTO, (255, 80, 47)),
        "sRGB": (SRGB, (200, 100, 50)), "damaged": (ADOBE[:200], (200, 100, 50)), "none": (None, (200, 100, 50)),
        "a printer's": (b"\0\0\x02\0lcms\2\x40\0\0prtrCMYKLab ".ljust(512, b"\0"), (200, 100, 50))}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("name", SEEN)
def test_colours_are_those_of_a_screen_where_pictures_are_looked_at_and_the_originals_in_training(tmp_path, kind, name):
    profile, colour = SEEN[name]
    how = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    file = written(tmp_path, saved(Image.new("RGB", (64, 48), (200, 100, 50)), kind, icc_profile=profile, **how))
    for way in ("index", "query"):
        assert np.abs(WAYS[way](file)[16, 16].astype(int) - colour).max() <= 3, WAYS[way](file)[16, 16]
    assert np.abs(np.asarray(thumbnail(file))[16, 16].astype(int) - colour).max() <= 3
    assert np.array_equal(WAYS["training"](file), plain_square(Image.open(file).convert("RGB"), 32))
    if colour == (200, 100, 50):
        assert np.array_equal(WAYS["index"](file), WAYS["training"](file))      # not a bit is moved without need


def test_grey_and_many_coloured_pictures_take_no_profile_of_others(tmp_path):
    for mode in ("L", "CMYK"):
        file = written(tmp_path, saved(noise(64, 64).convert(mode), "TIFF", icc_profile=ADOBE))
        assert np.array_equal(WAYS["index"](file), plain_square(Image.open(file).convert("RGB"), 32))


# Texts

def long_texts():
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * 3 * 2**20)
    text.add_text("prompt", "y" * 3 * 2**20, zip=True)
    text.add_itxt("XML:com.adobe.xmp", "z" * 3 * 2**20, zip=True)
    text.add_itxt("XML:com.adobe.xmp", "z" * 2**17)
    return text


@pytest.mark.parametrize("what", ["texts", "profile", "64 texts", "texts behind"])
def test_a_png_may_hold_any_texts_and_profiles(tmp_path, what):
    image, how = noise(80, 60), {}
    if what == "profile":
        how = {"icc_profile": SRGB + b"\0" * 3 * 2**20}
    elif what != "texts behind":
        how = {"pnginfo": long_texts()}
    content = saved(image, "PNG", **how)
    if what == "64 texts":
        content = content[:33] + 64 * chunk(b"tEXt", b"a\0" + b"b" * 2**21) + content[33:]
    elif what == "texts behind":
        content = content[:-12] + chunk(b"zTXt", b"a\0\0" + zlib.compress(b"b" * 2**21)) + content[-12:]
    file = written(tmp_path, content)
    for way in ("training", "index", "query"):
        assert np.array_equal(WAYS[way](file), plain_square(image, 32))


def test_how_the_camera_was_held_is_read_from_a_png_of_many_texts(tmp_path):
    image, note, text = noise(80, 60), Image.Exif(), long_texts()
    note[0x112] = 6
    plain = note.tobytes()
    text.add_text("Raw profile type exif", f"\nexif\n{len(plain)}\n{plain.hex()}\n", zip=True)
    file = written(tmp_path, saved(image, "PNG", pnginfo=text))
    assert np.array_equal(WAYS["index"](file), plain_square(image.transpose(Image.Transpose.ROTATE_270), 32))
