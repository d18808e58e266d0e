"""An image file to pixels, whoever asks, and whoever made the file: what reading it may cost is known before.

Read are regular files of the formats below; not PostScript, which starts a program, nor others that no camera, shop or
page gives. Each bound is more than a photograph has, and together they keep any file below 2 seconds and 1 GB.
"""

import errno
import io
import os
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from machine.errors import InputError
from machine.regular_files import open_regular
from machine.resizing import square

try:
    import pillow_heif  # not of ours: phones' pictures are read where it is installed
    pillow_heif.register_heif_opener()
    EXTRA = ("HEIF",)
except ImportError:
    EXTRA = ()

HEIF = (".heic", ".heif", ".hif")
ALWAYS = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff",
          ".ppm", ".pgm", ".pbm", ".pnm", ".avif")
SUFFIXES = ALWAYS + HEIF * bool(EXTRA)
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "AVIF", *EXTRA)   # JPEG is also MPO
BEGINNING = re.compile(rb"\xff\xd8\xff|\x89PNG\r\n|GIF8|RIFF....WEBP|II\*\0|MM\0\*|....ftyp(avi[fs]|hei[cfmsx]|mif1)",
                       re.DOTALL)
MEGA = 10**6
LARGEST_FILE = 256 * MEGA               # bytes: 40 megapixels of three times 16 bits have 240 million
LARGEST_PICTURE = 40 * MEGA             # pixels; those of a page's formats are slower, and take 20 bytes each:
LARGEST_OF_PAGES = {"WEBP": 25 * MEGA, "AVIF": 25 * MEGA, "HEIF": 25 * MEGA}
LARGEST_WITH_ALPHA = 25 * MEGA          # pixels of four bytes, which are painted on white besides
LARGEST_OF_MEASUREMENTS = 20 * MEGA     # pixels of 32-bit integers and floats, which are looked through for their range
LARGEST_JPEG = 80 * MEGA                # pixels that are decoded, of 12 bytes at most; where a picture is only looked
                                        # at, larger ones are decoded by halves
MOST_PASSED = 500 * MEGA                # pixels of a JPEG times its scans: each scan passes over all
MOST_SCANS = 100                        # of a JPEG; encoders make 10 or so
LARGEST_IN_PYTHON = MEGA // 2           # pixels of what Pillow decodes in Python, a pixel or a few at a time:
IN_PYTHON = ("bmp_rle", "ppm", "ppm_plain")
LONGEST = 100                           # times as long as wide: it is made S x 100 S before it is cut to S x S
LARGEST_EXIF = 2**16                    # bytes: one segment of a JPEG; its entries may overlap, and each is kept
LARGEST_PROFILE = 2**22                 # bytes; those of printers have the most

NOT_THE_IMAGES_FAULT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
JPEG_MARKER = re.compile(rb"\xff([\xc0-\xcf\xd9-\xfe])")                        # but restarts, and what is no marker
SOS, EOI, APP1 = 0xDA, 0xD9, 0xE1
ORIENTATION = 0x112
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
         5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}                                          # by Exif's number
# Of a PNG's texts those in which programs keep what a camera noted; Pillow refuses a file of others that are long.
TEXTS, READ_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP"), (b"Raw profile type exif", b"XML:com.adobe.xmp")
COLOURS = np.stack(np.meshgrid(*[np.arange(0, 256, 15, np.uint8)] * 3, indexing="ij"), -1).reshape(18, -1, 3)
MANY_PARTS = "is a file of more parts than a picture has; save it anew"
LEAST_SHIFT = 3                         # of 255: a profile that moves no colour by more is sRGB, as programs make it
EIGHT_OF_SIXTEEN = ((np.arange(2**16) + 128) // 257).astype(np.uint8)

warnings.filterwarnings("ignore", module=r"PIL\.")                              # what is wrong is said in our own line


class TooLarge(InputError):
    """A picture, maybe, but beyond the bounds."""


@dataclass
class InMemory:
    """A file that is on no disk, read as one in a path's place: what it is called, and what it holds."""
    name: str
    content: bytes

    def __str__(self) -> str:
        return self.name


def decode(path: str | os.PathLike | InMemory, size: int, resampling: str = "bilinear", upright: bool = False,
           to_square: Callable = square, told: Callable[[str], None] = lambda path: None) -> np.ndarray:
    """(size, size, 3) uint8: the file's RGB pixels, shorter side resized to `size`, the centre cut out.

    resampling: Pillow's filter, by name. upright: as it is looked at, see `seen`. Training on the published data reads
    what the original did: not turned, transparency forgotten, 16 bits clipped to 8; `told` then hears the path.
    to_square: of resizing.py.
    Raises InputError for what is no whole image, or one beyond the bounds; OSError where the machine is at its end.
    """
    with opened(path, upright) as image:
        if upright:
            pixels = to_square(seen(image), size, resampling)
            return np.asarray(in_srgb(Image.fromarray(pixels), image)) if to_srgb_of(image) else pixels
        if is_more_than_rgb(image):
            told(str(path))
        return to_square(image if image.mode == "RGB" else image.convert("RGB"), size, resampling)


@contextmanager
def opened(path: str | os.PathLike | InMemory, halved: bool = False) -> Iterator[Image.Image]:
    """The first picture in a file, its pixels not yet decoded.

    halved: a huge JPEG may be decoded at a half or a quarter of its size. Raises as `decode` does, now and within.
    """
    content = b""
    try:
        content = read(path)
        scans = scans_of(content) if content.startswith(b"\xff\xd8") else 0
        content = without_texts(content) if content.startswith(b"\x89PNG") else content
        with Image.open(Metered(content), formats=FORMATS) as image:
            check(image, content, scans, halved)
            yield image
    except TooLarge as error:
        raise TooLarge(f"{path} {error}") from None
    except Image.DecompressionBombError:                                        # at 179 megapixels, by Pillow
        raise TooLarge(f"{path} has more than {LARGEST_PICTURE // MEGA} megapixels; make it smaller") from None
    except MemoryError:
        raise OSError(errno.ENOMEM, "no memory left to read the image", str(path)) from None
    except Exception as error:                                                  # PIL's plugins raise anything at all
        if getattr(error, "errno", None) in NOT_THE_IMAGES_FAULT:
            raise
        raise InputError(f"cannot read the image {path} ({reason(error, content)})") from None


def reason(error: Exception, content: bytes) -> str:
    if isinstance(error, UnidentifiedImageError):                               # Pillow's text names no file
        if content[4:8] == b"ftyp" and content[8:11] in (b"hei", b"mif") and not EXTRA:
            return "a HEIC picture, whatever its name says: pip install pillow-heif, and it is read"
        return "no picture of a kind that is read: JPEG, PNG, WebP, BMP, GIF, TIFF, PPM, AVIF"
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]


def begins_as_one(path: str | os.PathLike) -> bool:
    """Whether a regular file begins as a picture does; a pipe or a device is not waited for."""
    try:
        with open_regular(path) as file:
            return bool(BEGINNING.match(file.read(16)))
    except OSError:
        return False


def read(path: str | os.PathLike | InMemory) -> bytes:
    """A regular file's content; of a pipe or a device nothing is waited for."""
    if isinstance(path, InMemory):
        content = path.content
    else:
        with open_regular(path) as file:
            if (length := os.fstat(file.fileno()).st_size) > LARGEST_FILE:
                raise TooLarge(f"has more than {LARGEST_FILE // MEGA} MB; make it smaller")
            content = file.read(length)
    if not content:
        raise InputError("the file is empty")
    return content


class Metered(io.BytesIO):
    """A file's content, that may be read a few times over, but not in crumbs: Pillow takes up a file's parts one by
    one, in Python, and keeps parts that overlap as often as they are named. A GIF's text it copies at each part."""

    def __init__(self, content: bytes):
        super().__init__(content)
        more = 0 if content.startswith(b"GIF") else len(content) // 500
        self.reads, self.bytes = 10_000 + more, MEGA + 4 * len(content)         # that are left

    def read(self, count: int | None = -1) -> bytes:
        part = super().read(count)
        self.reads, self.bytes = self.reads - 1, self.bytes - len(part)
        if self.reads < 0 or self.bytes < 0:
            raise TooLarge(MANY_PARTS)
        return part


def check(image: Image.Image, content: bytes, scans: int, halved: bool) -> None:
    """Raise TooLarge for a picture that is."""
    most, (width, height) = LARGEST_OF_PAGES.get(image.format, LARGEST_PICTURE), image.size
    if max(width, height) > LONGEST * min(width, height):
        raise TooLarge(f"is over {LONGEST} times as long as wide ({width} x {height} pixels); cut a part out of it")
    if image.format in ("JPEG", "MPO"):
        most = LARGEST_JPEG
        if scans > MOST_SCANS or scans * width * height > MOST_PASSED:
            raise TooLarge(f"is a JPEG of {scans} scans or more, {width} x {height} pixels; save it not progressive")
        if halved and scans == 1 and width * height > LARGEST_PICTURE:
            parts = 2 if width * height <= 4 * LARGEST_PICTURE else 4
            image.draft(None, (width // parts, height // parts))
            width, height = image.size
    elif image.format == "TIFF":
        check_tiff(image, content)
    if any(tile[0] in IN_PYTHON for tile in getattr(image, "tile", ())):
        most = LARGEST_IN_PYTHON
    elif image.mode in ("I", "F"):
        most = LARGEST_OF_MEASUREMENTS
    elif "A" in image.getbands():
        most = min(most, LARGEST_WITH_ALPHA)
    if width * height > most:
        raise TooLarge(f"has more than {most / MEGA:g} megapixels ({width} x {height}); make it smaller")


def scans_of(content: bytes) -> int:
    """How many scans a JPEG's first picture has, MOST_SCANS + 1 for more. Raises TooLarge for too much Exif."""
    place, scans, exif = 2, 0, 0
    while scans <= MOST_SCANS and (found := JPEG_MARKER.search(content, place)):
        marker, place = found[1][0], found.end()
        if marker == EOI:
            break
        length = int.from_bytes(content[place:place + 2], "big")
        if marker == APP1 and content.startswith(b"Exif\0\0", place + 2):
            exif += length
        if exif > LARGEST_EXIF:
            raise TooLarge("has more Exif than a JPEG may have; save it anew")
        scans, place = scans + (marker == SOS), place + length
        if scans == 1 and content.find(b"\xff\xda", place) < 0:                 # most often: no need to look further
            break
    return scans


def check_tiff(image: Image.Image, content: bytes) -> None:
    """Raise TooLarge for tiles larger than any picture, and for JPEGs of several scans within."""
    tile = [image.tag_v2.get(side, 0) for side in (322, 323)]
    if not all(isinstance(side, int) for side in tile) or tile[0] * tile[1] > LARGEST_PICTURE:
        raise TooLarge("is a TIFF of huge tiles; save it anew")
    if image.tag_v2.get(259) in (6, 7) and (b"\xff\xc2" in content or (
            len(image.getbands()) > 1 and b"\xff\xda\x00\x08\x01" in content)):
        raise TooLarge("is a TIFF of progressive JPEGs; save it anew")


def without_texts(content: bytes) -> bytes:
    """A PNG without its texts and profiles, but for the first of each kind that is looked at, and not too long. Raises
    TooLarge for one of too many parts."""
    parts, place, kept, seen_before = [], 8, 0, set()
    for _ in range((10_000 + len(content) // 500) // 3):                        # as Metered has it, of three reads each
        if place + 12 > len(content):
            return b"".join([*parts, content[kept:]]) if parts else content
        length, kind = struct.unpack_from(">I4s", content, place)
        end = place + 12 + length
        if kind in TEXTS:
            data = content[place + 8:end - 4]
            name = kind if kind == b"iCCP" else data.partition(b"\0")[0][:80]
            if name in seen_before or not is_looked_at(kind, name, data):
                parts.append(content[kept:place])
                kept = end
            seen_before.add(name)
        place = end
    raise TooLarge(MANY_PARTS)


def is_looked_at(kind: bytes, name: bytes, data: bytes) -> bool:
    """Whether a part of a PNG is a text or profile that is looked at, and no longer than Pillow takes."""
    rest = data.partition(b"\0")[2]
    if kind != b"iCCP" and (name not in READ_TEXTS or len(data) > 2 * LARGEST_EXIF):
        return False
    if kind == b"tEXt" or (kind == b"iTXt" and rest[:1] != b"\1"):
        return True
    try:
        unpacking = zlib.decompressobj()
        unpacking.decompress(rest[2:].split(b"\0", 2)[-1] if kind == b"iTXt" else rest[1:], 2**20)
        return not unpacking.unconsumed_tail
    except zlib.error:                                                          # Pillow takes it for none
        return True


def is_more_than_rgb(image: Image.Image) -> bool:
    """Whether an RGB image of 8 bits loses something of it: more bits, or transparency that is used. Decodes it."""
    if image.mode.startswith(("I", "F")):
        return True
    return image.has_transparency_data and image.convert("RGBA").getextrema()[3][0] < 255


def seen(image: Image.Image) -> Image.Image:
    """An RGB image as a screen shows it: turned as the camera noted, on white, of more than 8 bits the upper 8.

    16-bit grey is scaled from 0 ... 65535, integers of 32 bits and floats as `eight_bits` says.
    """
    image.load()
    if image.mode.startswith("I;16"):
        image_seen = Image.fromarray(EIGHT_OF_SIXTEEN[np.asarray(image)]).convert("RGB")
    elif image.mode in ("I", "F"):
        image_seen = Image.fromarray(eight_bits(np.asarray(image))).convert("RGB")
    elif image.has_transparency_data:
        layer = image if image.mode == "RGBA" else image.convert("RGBA")
        image_seen = Image.new("RGB", image.size, "white")
        image_seen.paste(layer, mask=layer)
    else:
        image_seen = image if image.mode == "RGB" else image.convert("RGB")
    turn = TURNS.get(orientation(image))
    return image_seen if turn is None else image_seen.transpose(turn)


def to_srgb_of(image: Image.Image) -> ImageCms.ImageCmsTransform | None:
    """From the colours that an opened image's file is in, to sRGB; None where they are that, or it does not say."""
    profile = image.info.get("icc_profile")
    return to_srgb(profile) if profile and len(profile) <= LARGEST_PROFILE and image.getbands()[0] in "RP" else None


@lru_cache(64)
def to_srgb(profile: bytes) -> ImageCms.ImageCmsTransform | None:
    try:
        given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if given.profile.xcolor_space.strip() != "RGB":
            return None
        transform = ImageCms.buildTransform(given, ImageCms.createProfile("sRGB"), "RGB", "RGB")
        moved = np.asarray(ImageCms.applyTransform(Image.fromarray(COLOURS), transform)).astype(int) - COLOURS
    except Exception:                                                           # damaged, or built without LittleCMS
        return None
    return transform if np.abs(moved).max() > LEAST_SHIFT else None


def in_srgb(small: Image.Image, image: Image.Image) -> Image.Image:
    """An RGB image that was made of an opened one, in sRGB. Small ones: it takes 10 ns a pixel or more."""
    transform = to_srgb_of(image)
    return ImageCms.applyTransform(small, transform) if transform else small


def orientation(image: Image.Image) -> int | None:
    """Exif's number of how the camera was held; None where none is noted, or the block is no camera's."""
    hexadecimal = image.info.get("Raw profile type exif", "")
    noted = max(len(image.info.get("exif") or b""), len(hexadecimal) // 2)
    try:
        return image.getexif().get(ORIENTATION) if noted <= LARGEST_EXIF else None
    except Exception:                                                           # damaged: PIL raises anything at all
        return None


def eight_bits(values: np.ndarray) -> np.ndarray:
    """(H, W) uint8 of grey values in whichever of the customary ranges holds them all, the first: for floats 0 ... 1,
    then 0 ... 255, 0 ... 65535, else from their least to their largest. What is no number is black."""
    whole = values.dtype.kind == "i"
    values = values.astype(np.float32)
    np.nan_to_num(values, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    if low >= 0 and high <= 2**16 - 1:
        low, high = 0.0, next(top for top in (1.0, 255.0, 65535.0) if high <= top and not (whole and top == 1.0))
    values -= low
    values *= 255 / max(high - low, np.finfo(np.float32).tiny)
    values += 0.5
    return values.astype(np.uint8)
