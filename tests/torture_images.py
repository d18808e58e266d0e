"""Pictures made to cost much, of every kind: python -m tests.torture_images

Each is read in processes of its own: as a query's, as a training image, as a thumbnail. Prints one line of figures;
exit code 1 if one takes over 2 seconds of a core or 1 GB, or ends otherwise than as pixels or in a sentence of ours.
"""

import io
import os
import resource
import signal
import struct
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from machine.errors import InputError
from machine.picture_files import decode
from machine.resizing import plain_square
from training.pictures import thumbnail

SECONDS, BYTES = 2.0, 10**9             # a picture may take; seconds of processor time
HANG = 60                               # seconds after which one is stopped


def saved(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def flat(width: int, height: int, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (width, height))


def noise(width: int, height: int, mode: str = "RGB", coarse: int = 16) -> Image.Image:
    """Colours that change every few pixels."""
    shape = (-(-height // coarse), -(-width // coarse), len(mode))
    tile = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(tile.squeeze() if mode == "L" else tile).resize((width, height))


def repeated_scans(width: int, height: int, count: int) -> bytes:
    """A progressive JPEG whose last scan comes `count` times more."""
    whole = saved(flat(width, height), "JPEG", progressive=True)
    last = whole.rindex(b"\xff\xda")
    return whole[:-2] + whole[last:-2] * count + b"\xff\xd9"


def with_segments(marker: int, content: bytes, count: int) -> bytes:
    """A JPEG with `count` more segments before its picture."""
    whole = saved(flat(64, 64), "JPEG")
    return whole[:2] + (struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content) * count + whole[2:]


def chunk(name: bytes, content: bytes = b"") -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def with_chunks(chunks: bytes, at: int = 33) -> bytes:
    """A PNG with more chunks behind its header."""
    whole = saved(flat(64, 64), "PNG")
    return whole[:at] + chunks + whole[at:]


def png_of_size(width: int, height: int) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND")


def overlapping(entries: int, length: int) -> bytes:
    """A TIFF of tags that all name the same bytes."""
    head = [(256, 3, 1, 64), (257, 3, 1, 64), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8),
            (277, 3, 1, 1), (278, 3, 1, 64), (279, 4, 1, 4096)]
    tags = head + [(tag, 1, length, 8) for tag in range(1000, 1000 + entries)]
    table = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + max(length, 4096)) + bytes(max(length, 4096)) + table


def edited_tiff(content: bytes, changes: dict[int, int]) -> bytes:
    """A TIFF with other values of some tags, those of its first folder."""
    changed, (start,) = bytearray(content), struct.unpack_from("<I", content, 4)
    for place in range(start + 2, start + 2 + 12 * struct.unpack_from("<H", content, start)[0], 12):
        tag, kind = struct.unpack_from("<HH", content, place)
        if tag in changes:
            struct.pack_into("<I" if kind == 4 else "<H", changed, place + 8, changes[tag])
    return bytes(changed)


def tiled(side: int) -> bytes:
    """A TIFF of 64 x 64 pixels that says its tiles are of so many."""
    tags = [(256, 4, 1, 64), (257, 4, 1, 64), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1),
            (322, 4, 1, side), (323, 4, 1, side), (324, 4, 1, 8), (325, 4, 1, 5000)]
    table = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    return b"II*\0" + struct.pack("<I", 5008) + zlib.compress(bytes(5 * 10**6)).ljust(5000, b"\0")[:5000] + table


def folders_in_a_ring(count: int) -> bytes:
    """A TIFF of `count` pages, the last followed by the first."""
    page = saved(flat(8, 8, "L"), "TIFF")
    (start,) = struct.unpack_from("<I", page, 4)
    tags = page[start:start + 2 + 12 * struct.unpack_from("<H", page, start)[0]]
    places = [len(page) + number * (len(tags) + 4) for number in range(count)]
    ring = b"".join(tags + struct.pack("<I", places[(number + 1) % count]) for number in range(count))
    return page[:4] + struct.pack("<I", places[0]) + page[8:] + ring


def rle_bmp(width: int, height: int, code: bytes) -> bytes:
    """A run-length BMP whose pixels are all of one code."""
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, 0, 0, 0, 256, 0) + bytes(1024)
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, 14 + len(header)) + header + code


def jpegs() -> Iterator[tuple[str, bytes]]:
    for side, count in ((6000, 200), (6000, 2), (6000, 1), (64, 90), (64, 95), (64, 10**4), (64, 10**6), (2000, 91)):
        yield f"JPEG, {side} x {side}, its last scan {count} times more", repeated_scans(side, side, count)
    for width, height in ((8900, 8900), (9500, 9400), (12000, 9000), (13000, 13000), (65500, 655), (65500, 8)):
        yield f"JPEG, {width} x {height}", saved(flat(width, height), "JPEG")
    yield "JPEG, grey, 80 megapixels", saved(flat(8900, 8900, "L"), "JPEG")
    yield "JPEG, CMYK, 80 megapixels", saved(flat(8900, 8900, "CMYK"), "JPEG")
    yield "JPEG, 80 megapixels, progressive", saved(flat(8900, 8900), "JPEG", progressive=True, subsampling=0)
    yield "JPEG, 49 megapixels, progressive, noise", saved(noise(7000, 7000), "JPEG", progressive=True, subsampling=0)
    yield "JPEG, CMYK, 40 megapixels, progressive", saved(flat(6300, 6300, "CMYK"), "JPEG", progressive=True)
    yield "JPEG, 79 megapixels, noise", saved(noise(8800, 8900, coarse=8), "JPEG")
    for marker, size, count in ((0xE0, 2, 10**6), (0xE2, 65000, 2000), (0xFE, 0, 10**6), (0xE1, 40000, 300)):
        yield f"JPEG, {count} segments of {size} bytes", with_segments(marker, bytes(size), count)
    entries = overlapping(4900, 65000 - 12 * 4900)
    for count in (1, 2, 4000):
        yield f"JPEG, {count} Exif segments of overlapping entries", with_segments(0xE1, b"Exif\0\0" + entries[:65000],
                                                                                   count)
    yield "JPEG, padding", b"\xff\xd8" + b"\xff" * 10**7 + saved(flat(64, 64), "JPEG")[2:]
    size = saved(flat(64, 64), "JPEG").replace(struct.pack(">HH", 64, 64), b"\xff\xff\xff\xff", 1)
    yield "JPEG, that says it has 65535 x 65535", size


def pngs() -> Iterator[tuple[str, bytes]]:
    for width, height in ((1, 20_000), (20_000, 1), (1, 300_000), (300_000, 1), (1, 100), (100, 1), (3, 300),
                          (600, 60_000), (60_000, 600)):
        yield f"PNG, {width} x {height}", saved(flat(width, height), "PNG")
    for width, height in ((2**31 - 1, 2**31 - 1), (50_000, 50_000), (1, 2**31 - 1), (6300, 6300)):
        yield f"PNG, that says it has {width} x {height}", png_of_size(width, height)
    for mode in ("RGB", "RGBA", "LA", "L", "P", "1", "I;16"):
        yield f"PNG, {mode}, 40 megapixels", saved(flat(6300, 6300, mode), "PNG", compress_level=1)
    yield "PNG, P with transparency, 40 megapixels", saved(flat(6300, 6300, "P"), "PNG", transparency=0)
    yield "PNG, RGBA, 25 megapixels, noise", saved(noise(5000, 5000, "RGBA"), "PNG", compress_level=1)
    yield "PNG, 40 megapixels, noise", saved(noise(6300, 6300), "PNG", compress_level=1)
    bomb = zlib.compress(bytes(2**26))
    for name, start in ((b"zTXt", b"a\0\0"), (b"iCCP", b"a\0\0"), (b"iTXt", b"a\0\1\0\0\0")):
        for count in (1, 100):
            yield f"PNG, {count} {name.decode()} that inflate to 64 MB", with_chunks(chunk(name, start + bomb) * count)
    text = zlib.compress(bytes(2**20 - 10))
    yield "PNG, 1000 texts of 1 MB", with_chunks(b"".join(chunk(b"zTXt", b"%d\0\0" % i + text) for i in range(1000)))
    yield "PNG, a million chunks", with_chunks(chunk(b"aaAa") * 10**6)
    yield "PNG, a million chunks at its end", with_chunks(chunk(b"aaAa") * 10**6, at=-12)
    for count, length in ((60_000, 10**6), (5000, 65_000)):
        for at in (33, -12):
            yield f"PNG, Exif of {count} overlapping entries, at {at}", with_chunks(chunk(
                b"eXIf", overlapping(count, length)), at)
    yield "PNG, a million pixels a byte", with_chunks(b"")[:60]
    yield "PNG, 200 frames", saved(flat(1000, 1000), "PNG", save_all=True, append_images=[noise(1000, 1000)] * 5)


def gifs_and_pages() -> Iterator[tuple[str, bytes]]:
    whole = saved(flat(64, 64), "GIF")
    start = whole.index(b",")
    for blocks in (5000, 10**5):
        comment = b"\x21\xfe" + (b"\xff" + bytes(255)) * blocks + b"\0"
        yield f"GIF, a comment of {blocks} blocks", whole[:start] + comment + whole[start:]
    yield "GIF, a million comments", whole[:start] + b"\x21\xfe\x01a\0" * 10**6 + whole[start:]
    yield "GIF, 40 megapixels", saved(flat(6300, 6300), "GIF")
    yield "GIF, 40 megapixels, transparent", saved(flat(6300, 6300, "P"), "GIF", transparency=0)
    for width, height in ((65535, 65535), (65535, 600), (1, 65535)):
        large = struct.pack("<HH", width, height)
        yield f"GIF, a canvas of {width} x {height}", whole[:6] + large + whole[10:]
        yield f"GIF, a frame of {width} x {height}", whole[:start + 5] + large + whole[start + 9:]
    yield "GIF, 20 frames", saved(flat(300, 300), "GIF", save_all=True, append_images=[noise(300, 300)] * 20)
    for kind, most in (("WEBP", {"method": 0}), ("AVIF", {"speed": 10})):
        for mode in ("RGB", "RGBA"):
            yield f"{kind}, {mode}, 25 megapixels", saved(flat(5000, 5000, mode), kind, **most)
            yield f"{kind}, {mode}, 25 megapixels, noise", saved(noise(5000, 5000, mode), kind, **most)
        yield f"{kind}, 36 megapixels", saved(flat(6000, 6000), kind, **most)
        yield f"{kind}, 10 frames", saved(flat(100, 100), kind, save_all=True, append_images=[noise(100, 100)] * 10)
    yield "WebP, lossless, 25 megapixels", saved(noise(5000, 5000), "WEBP", lossless=True, method=0, quality=0)
    small = bytearray(saved(flat(64, 64), "WEBP", lossless=True))
    struct.pack_into("<I", small, small.index(b"VP8L") + 9, 0x3FFF | 0x3FFF << 14)
    yield "WebP, that says it has 16384 x 16384", bytes(small)


def tiffs() -> Iterator[tuple[str, bytes]]:
    for count, length in ((60_000, 10**6), (60_000, 1000), (1000, 10**5), (100, 10**7)):
        yield f"TIFF, {count} overlapping tags of {length} bytes", overlapping(count, length)
    for side in (2**10, 6000, 20_000, 46_000, 2**31):
        yield f"TIFF, tiles of {side} x {side}", tiled(side)
    for count in (3, 10**5):
        yield f"TIFF, {count} pages in a ring", folders_in_a_ring(count)
    for how in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "zstd", "lzma"):
        yield f"TIFF, {how}, 40 megapixels", saved(flat(6300, 6300), "TIFF", compression=how)
    yield "TIFF, group 4, 40 megapixels", saved(flat(6300, 6300, "1"), "TIFF", compression="group4")
    for mode in ("F", "I"):
        yield f"TIFF, {mode}, 20 megapixels", saved(flat(4400, 4500, mode), "TIFF", compression="tiff_adobe_deflate")
    for mode in ("F", "I", "I;16", "RGBA", "LA", "CMYK", "LAB"):
        yield f"TIFF, {mode}, 40 megapixels", saved(flat(6300, 6300, mode), "TIFF", compression="tiff_adobe_deflate")
    strange = np.array([[np.nan, np.inf], [-np.inf, 1e38]], np.float32)
    yield "TIFF, no numbers", saved(Image.fromarray(strange), "TIFF")
    small = saved(flat(640, 640), "TIFF", compression="tiff_lzw")
    for tag, value in ((278, 1), (256, 60_000), (257, 60_000), (277, 60_000), (258, 64), (279, 2**31), (273, 2**31)):
        yield f"TIFF, its tag {tag} is {value}", edited_tiff(small, {tag: value})
    yield "TIFF, two sides of 60000", edited_tiff(small, {256: 60_000, 257: 60_000})


def plain_formats() -> Iterator[tuple[str, bytes]]:
    for width, height in ((700, 700), (4400, 4500), (6300, 6300)):
        pixels = width * height
        yield f"BMP, runs of one, {width} x {height}", rle_bmp(width, height, b"\x01\x05" * pixels)
        yield f"BMP, jumps, {width} x {height}", rle_bmp(width, height, b"\0\x02\xff\xff" * 1000)
        yield f"PPM, in letters, {width} x {height}", b"P3 %d %d 255\n" % (width, height) + b"7 " * 3 * pixels
        yield f"PPM, of 100 shades, {width} x {height}", b"P6 %d %d 100\n" % (width, height) + bytes(3 * pixels)
        yield f"PGM, of 16 bits, {width} x {height}", b"P5 %d %d 65535\n" % (width, height) + bytes(2 * pixels)
        yield f"PFM, {width} x {height}", b"Pf %d %d -1.0\n" % (width, height) + bytes(4 * pixels)
    yield "BMP, huge", rle_bmp(2**31 - 1, 2**31 - 1, b"")
    yield "PPM, huge", b"P6 99999999 99999999 255\n"
    yield "PPM, a comment of 10 MB", b"P6 #" + b"a" * 10**7
    yield "PostScript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9999 9999\n{} loop\n"
    for kind in ("PDF", "ICO", "TGA", "SGI", "JPEG2000"):
        yield kind, saved(flat(64, 64), kind)
    yield "a page", b"<svg xmlns='http://www.w3.org/2000/svg' width='99999' height='99999'/>"


def damaged() -> Iterator[tuple[str, bytes]]:
    """Whole files with bytes changed: nobody knows what they cost."""
    rng = np.random.default_rng(0)
    kinds = {"JPEG": {"progressive": True}, "PNG": {}, "GIF": {}, "WEBP": {}, "TIFF": {"compression": "tiff_lzw"},
             "BMP": {}, "PPM": {}, "AVIF": {"speed": 10}}
    for kind, options in kinds.items():
        whole = saved(noise(300, 200), kind, **options)
        for number in range(8):
            content = bytearray(whole)
            for place in rng.integers(0, len(whole) if number % 2 else min(len(whole), 200), 1 + number):
                content[place] = rng.integers(256)
            yield f"{kind}, damaged, {number}", bytes(content)


def hostile() -> Iterator[tuple[str, bytes]]:
    for kind in (damaged, jpegs, pngs, gifs_and_pages, tiffs, plain_formats):
        yield from kind()


def no_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """What is no regular file, under a picture's name."""
    os.mkfifo(folder / "pipe.jpg")
    (folder / "folder.jpg").mkdir()
    (folder / "itself.jpg").symlink_to("itself.jpg")
    (folder / "endless.jpg").symlink_to("/dev/zero")
    (folder / "empty.jpg").touch()
    with open(folder / "sparse.jpg", "wb") as file:
        file.truncate(2**40)
    yield from ((name, folder / f"{name}.jpg") for name in ("pipe", "folder", "itself", "endless", "empty", "sparse"))


def cost(work: Callable[[], object]) -> tuple[float, int, str]:
    """Seconds of processor time, bytes, and how it ended, of some work done in a process of its own."""
    reading, writing = os.pipe()
    if not (child := os.fork()):
        signal.alarm(HANG)
        def used() -> resource.struct_rusage:
            return resource.getrusage(resource.RUSAGE_SELF)
        before, end = used(), "decoded"
        try:
            work()
        except InputError as error:
            end = "a sentence" if "\n" not in str(error) else f"several lines: {error}"
        except BaseException as error:
            end = f"{type(error).__name__}: {error}"
        after = used()
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        os.write(writing, f"{seconds} {1024 * (after.ru_maxrss - before.ru_maxrss)} {end}".encode())
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        said = pipe.read().decode()
    os.waitpid(child, 0)
    if not said:
        return HANG, 0, "crash or hang"
    seconds, taken, end = said.split(" ", 2)
    return float(seconds), int(taken), end


def main() -> int:
    decode_once = np.zeros((64, 64, 3), np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        Image.fromarray(decode_once).save(Path(folder) / "first.png")
        decode(Path(folder) / "first.png", 32)                                  # compiles `square`
        def files() -> Iterator[tuple[str, Path]]:
            file = Path(folder) / "picture.jpg"
            for name, content in hostile():
                file.write_bytes(content)
                yield name, file
            yield from no_files(Path(folder))
        ways = {"query": lambda file: decode(file, 224, upright=True, to_square=plain_square),
                "training": lambda file: decode(file, 224), "thumbnail": thumbnail}
        count, decoded, slowest, largest, wrong = 0, 0, (0.0, ""), (0, ""), []
        for name, file in files():
            count += 1
            for way, work in ways.items():
                seconds, taken, end = cost(lambda work=work, file=file: work(file))
                decoded += end == "decoded"
                slowest, largest = max(slowest, (seconds, name)), max(largest, (taken, name))
                if seconds > SECONDS or taken > BYTES or end not in ("decoded", "a sentence"):
                    wrong.append(f"{name}, {way}: {seconds:.2f} s, {taken / 1e6:.0f} MB, {end}")
                if "-v" in sys.argv:
                    print(f"{name}, {way}: {seconds:.2f} s, {taken / 1e6:.0f} MB, {end}", flush=True)
    print(f"{count} hostile images, each read in {len(ways)} ways (decoded {decoded} times, else refused in a line): "
          f"at most {slowest[0]:.2f} s ({slowest[1]}) and {largest[0] / 1e6:.0f} MB ({largest[1]}); {len(wrong)} over "
          f"{SECONDS:g} s or {BYTES / 1e9:g} GB, or not so", *wrong, sep="\n  ")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
