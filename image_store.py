"""Image files to pixels, decoded once: path -> the uint8 (3, S, S) that Resize(S) and CenterCrop(S) give, kept on disk.

The original transforms train and test images alike and without chance, so its pixels can be kept and reused exactly.
"""

import errno
import fcntl
import json
import logging
import os
import shutil
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

from errors import InputError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RECORD = np.dtype([("bytes", "u8"), ("modified_ns", "i8"), ("checksum", "u4"), ("filled", "u4")])

NOT_THE_IMAGES_FAULT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
RESERVE = 2 * 10**9                     # bytes of the disk that the cache leaves to checkpoints and logs

log = logging.getLogger(__name__)


def normalize_images(pixels: Tensor) -> Tensor:
    """(B, 3, S, S) uint8 -> float32, divided by 255 and normalized with ImageNet's statistics, channels last.

    Bit for bit what torchvision's ToTensor and Normalize give, on the device the pixels are on.
    """
    mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return pixels.to(torch.float32, memory_format=torch.channels_last).div_(255).sub_(mean).div_(std)


@cache
def resize_and_crop(size: int) -> transforms.Compose:
    return transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size), transforms.PILToTensor()])


def decode(path: str, size: int) -> np.ndarray:
    """(3, size, size) uint8: the file's RGB pixels, shorter side resized to `size`, the centre cut out."""
    try:
        with Image.open(path) as image:
            return resize_and_crop(size)(image.convert("RGB")).numpy()
    except Exception as error:                                                  # PIL's plugins raise anything at all
        if isinstance(error, MemoryError) or getattr(error, "errno", None) in NOT_THE_IMAGES_FAULT:
            raise
        reason = "the file is empty" if is_empty(path) else (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"cannot read the image {path} ({reason}); replace it, or pass --skip_bad_images True to "
                         "leave such images out") from None


def is_empty(path: str) -> bool:
    return os.path.exists(path) and os.path.getsize(path) == 0


def relative(paths: Sequence[str], folder: Path) -> list[str]:
    """The paths as seen from `folder`, so that a dataset may move with the cache inside it."""
    from_folder = cache(lambda directory: os.path.relpath(directory or ".", folder))  # slow: once a directory
    return [os.path.join(from_folder(os.path.dirname(path)), os.path.basename(path)) for path in paths]


def prefetch(make: Callable, items: Iterable, workers: int) -> Iterator:
    """make(item) for each item, in order, `workers` threads working ahead; 0 workers make each when it is asked for.

    Threads, not processes: decoding and copying run without Python's lock, and an error arrives as it was raised.
    """
    if workers == 0:
        yield from map(make, items)
        return
    pool, ahead = ThreadPoolExecutor(workers), deque()
    try:
        for item in items:
            ahead.append(pool.submit(make, item))
            if len(ahead) > 2 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


class PixelFile:
    """Decoded images of one size in one memory-mapped file, a slot a path, shared by any number of processes.

    FOLDER/images_S.paths lists the slots' paths (one JSON string a line, only ever appended to under a lock),
    images_S.pixels holds their pixels, images_S.records what each was made from. A slot counts only while its
    record agrees with the image file's size and time of change, and its checksum with path, pixels and Pillow's
    version; the record is written after the pixels. So a process killed at any moment leaves nothing that would be
    believed, two processes that fill a slot at once write the same bytes, and damage only costs decoding again.
    """

    def __init__(self, folder: Path, size: int, paths: Sequence[str]):
        """Raises OSError where the folder cannot be written or its disk has no room for the missing images."""
        self.shape, self.stride = (3, size, size), 3 * size * size
        folder.mkdir(parents=True, exist_ok=True)
        names, records, pixels = (folder / f"images_{size}.{kind}" for kind in ("paths", "records", "pixels"))
        paths = relative(paths, folder)
        self.seeds = [zlib.crc32(f"{PIL.__version__}:{path}".encode("utf-8", "surrogateescape")) for path in paths]
        with open(names, "a+b") as listing:
            fcntl.flock(listing, fcntl.LOCK_EX)                                 # the kernel frees it if we are killed
            slot_of = self.register(listing, paths)
            self.record_file = self.grown(records, len(slot_of) * RECORD.itemsize)
            self.pixel_file = self.grown(pixels, len(slot_of) * self.stride)
        self.records = np.memmap(records, RECORD, "r", shape=len(slot_of))
        self.pixels = np.asarray(np.memmap(pixels, np.uint8, "r", shape=(len(slot_of), *self.shape)))
        self.verified = np.zeros(len(slot_of), bool)                            # checksums are looked at once a process
        self.slots = np.array([slot_of[path] for path in paths])
        needed = int((self.records["filled"] == 0).sum()) * self.stride         # also for the other split's images
        free = shutil.disk_usage(folder).free
        if needed and needed > free - RESERVE:
            raise OSError(f"{needed / 1e9:.1f} GB are needed, and {free / 1e9:.1f} GB free, of which "
                          f"{RESERVE / 1e9:.0f} are left to checkpoints")

    @staticmethod
    def register(listing, paths: Sequence[str]) -> dict[str, int]:
        """Append the paths that are not listed yet; path -> slot for all."""
        listing.seek(0)
        whole = listing.read().rpartition(b"\n")[0]                             # a killed writer's half line is cut off
        try:
            slot_of = {json.loads(line): slot for slot, line in enumerate(whole.split(b"\n"))} if whole else {}
        except ValueError:                                                      # damaged: begin again
            whole, slot_of = b"", {}
        listing.truncate(len(whole) + bool(whole))
        new = [path for path in dict.fromkeys(paths) if path not in slot_of]
        listing.write(b"".join(json.dumps(path).encode() + b"\n" for path in new))
        return slot_of | {path: len(slot_of) + i for i, path in enumerate(new)}

    @staticmethod
    def grown(file: Path, length: int) -> int:
        """An open descriptor on the file, made at least `length` bytes long (sparse: room is taken as slots fill)."""
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        if os.fstat(descriptor).st_size < length:
            os.ftruncate(descriptor, length)
        return descriptor

    def holds(self, index: int, version: tuple[int, int]) -> bool:
        """Whether an image's slot is filled, from this version of its file; the checksum is for `read`."""
        record = self.records[self.slots[index]]
        return bool(record["filled"]) and (record["bytes"], record["modified_ns"]) == version

    def read(self, index: int, version: tuple[int, int], row: np.ndarray) -> bool:
        """Copy an image's pixels into `row`; False where they are not there, damaged, or of another version."""
        if not self.holds(index, version):
            return False
        slot = self.slots[index]
        row[:] = self.pixels[slot]
        if not self.verified[slot]:
            self.verified[slot] = zlib.crc32(row, self.seeds[index]) == self.records[slot]["checksum"]
        return bool(self.verified[slot])

    def write(self, index: int, version: tuple[int, int], row: np.ndarray) -> None:
        """Keep an image's pixels. Raises OSError on a full disk, where writing through the map would crash."""
        slot = int(self.slots[index])
        os.pwrite(self.record_file, bytes(RECORD.itemsize), slot * RECORD.itemsize)
        os.pwrite(self.pixel_file, row, slot * self.stride)
        record = np.array([(*version, zlib.crc32(row, self.seeds[index]), 1)], RECORD)
        os.pwrite(self.record_file, record, slot * RECORD.itemsize)


class ImageStore:
    """Pixels of a dataset's images by image id, from the cache folder where there is one, else decoded each time.

    paths: by image id. size: side S in pixels. cache: folder for the decoded images, or None.
    """

    def __init__(self, paths: Sequence[str], size: int = 224, cache: str | Path | None = None):
        self.paths, self.size = list(paths), size
        self.versions = [self.version(path) for path in self.paths]
        self.file, self.writable = None, True
        if cache is not None:
            try:
                self.file = PixelFile(Path(cache), size, self.paths)
            except OSError as error:
                log.warning("no image cache in %s (%s): images are decoded each time they are used", cache, error)

    @staticmethod
    def version(path: str) -> tuple[int, int]:
        """(bytes, time of change in ns); bytes is 0 for a missing file."""
        try:
            found = os.stat(path)
        except OSError:
            return 0, 0
        return found.st_size, found.st_mtime_ns

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, index: int, row: np.ndarray) -> None:
        """Put one image's pixels into `row` (3, S, S). Raises InputError for an image that cannot be read."""
        if self.file and self.file.read(index, self.versions[index], row):
            return
        row[:] = decode(self.paths[index], self.size)
        if self.file and self.writable:
            try:
                self.file.write(index, self.versions[index], row)
            except OSError as error:
                self.writable = False
                log.warning("the image cache takes no more (%s): further images are decoded each time", error)

    def batch(self, ids: Sequence[int]) -> Tensor:
        """(B, 3, S, S) uint8."""
        pixels = torch.empty((len(ids), 3, self.size, self.size), dtype=torch.uint8)
        for row, index in zip(pixels.numpy(), ids, strict=True):
            self.load(int(index), row)
        return pixels

    def missing(self) -> list[str]:
        """Paths that do not exist or are empty, found without opening anything."""
        return [path for path, (length, _) in zip(self.paths, self.versions, strict=True) if length == 0]

    def unreadable(self, progress=lambda items, **_: items) -> dict[int, str]:
        """Image id -> what is wrong, for every image that cannot be decoded; all others are in the cache afterwards."""
        def attempt(index: int) -> str | None:
            if self.file and self.file.holds(index, self.versions[index]):
                return None
            try:
                self.load(index, np.empty((3, self.size, self.size), np.uint8))
            except InputError as error:
                return str(error)
        with ThreadPoolExecutor(os.cpu_count()) as pool:                        # PIL decodes without Python's lock
            complaints = pool.map(attempt, range(len(self)))
            return {index: complaint for index, complaint in
                    enumerate(progress(complaints, desc="checking images", total=len(self))) if complaint}
