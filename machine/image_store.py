"""Image files to pixels, decoded once: path -> the uint8 (3, S, S) that Resize(S) and CenterCrop(S) give, kept on disk.

The original transforms train and test images alike and without chance, so its pixels can be kept and reused exactly.
They lie channels last, as PIL gives them and as the encoder is fastest with: (S, S, 3) in memory, seen as (3, S, S).
"""

import json
import logging
import math
import os
import shutil
import struct
import weakref
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path

import numpy as np
import PIL
import torch
from torch import Tensor

from machine.cropping import square_of
from machine.device import free_memory, send
from machine.errors import InputError
from machine.picture_files import decode
from machine.regular_files import open_own
from machine.threads import prefetch, usable_cores

try:
    import fcntl
except ImportError:                     # a system without file locks: nothing is kept
    fcntl = None

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RECORD = np.dtype([("bytes", "u8"), ("modified_ns", "i8"), ("checksum", "u4"), ("filled", "u4")])
FIELDS = struct.Struct("=QqII")         # of one record

CPU = torch.device("cpu")
RESERVE = 2 * 10**9                     # bytes of the disk that the cache leaves to checkpoints and logs

log = logging.getLogger(__name__)


def normalize_images(pixels: Tensor, mean: tuple[float, ...] = IMAGENET_MEAN,
                     std: tuple[float, ...] = IMAGENET_STD) -> Tensor:
    """(B, 3, S, S) uint8 -> float32, divided by 255 and normalized with these statistics, channels last.

    Bit for bit what torchvision's ToTensor and Normalize give, on the device the pixels are on.
    """
    mean, std = (channels(values, pixels.device) for values in (mean, std))
    return pixels.to(torch.float32, memory_format=torch.channels_last).div_(255).sub_(mean).div_(std)


@cache
@torch.inference_mode(False)
def channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """A value a channel, (3, 1, 1); sent to the device once, as sending them waits for it."""
    return torch.tensor(values, device=device)[:, None, None]


def file_version(path: str) -> tuple[int, int]:
    """(bytes, time of change in ns); bytes is 0 for a missing file."""
    try:
        found = os.stat(path)
    except OSError:
        return 0, 0
    return found.st_size, found.st_mtime_ns


def relative(paths: Sequence[str], folder: Path) -> list[str]:
    """The paths as seen from `folder`, so that a dataset may move with the cache inside it."""
    shared = os.path.commonprefix(paths)  # noqa: RUF071 cut to whole folders in the next line
    shared = shared[:shared.rfind("/") + 1]
    start = os.path.relpath(shared or ".", folder)                              # slow: once for all
    return [f"{start}/{path[len(shared):]}" for path in paths]


class RowFile:
    """What was made of images, pixels or features, in one file, a slot a path, shared by any number of processes.

    FOLDER/NAME.paths lists the slots' paths (one JSON string a line, only ever appended to under a lock),
    NAME.KIND holds their rows, NAME.records what each was made from. A slot counts only while its record agrees with
    the image file's size and time of change, and its checksum with path, row and `made_by`, which names whatever else
    the row depends on; the record is written after the row. So a process killed at any moment leaves nothing that
    would be believed, two processes that fill a slot at once write the same, and damage only costs making it again.
    The files are read, not mapped: one cut short meanwhile would else end the process.
    """

    def __init__(self, folder: Path, name: str, kind: str, paths: Sequence[str], shape: tuple[int, ...], dtype: type,
                 made_by: str):
        """Raises OSError where the folder cannot be written, one of the three is no file of our own, the disk has no
        room for the missing rows, or the system no file locks."""
        if not fcntl:
            raise OSError("this system has no file locks")
        self.stride, self.made_by = math.prod(shape) * np.dtype(dtype).itemsize, made_by
        folder.mkdir(parents=True, exist_ok=True)
        names, records, rows = (folder / f"{name}.{part}" for part in ("paths", "records", kind))
        self.paths = paths = relative(paths, folder)
        with open(open_own(names, os.O_APPEND), "a+b") as listing:
            fcntl.flock(listing, fcntl.LOCK_EX)                                 # the kernel frees it if we are killed
            slot_of = self.register(listing, paths)
            self.record_file = self.grown(records, len(slot_of) * RECORD.itemsize)
            self.row_file = self.grown(rows, len(slot_of) * self.stride)
        for descriptor in (self.record_file, self.row_file):
            weakref.finalize(self, os.close, descriptor)
        self.verified = np.zeros(len(slot_of), bool)                            # checksums are looked at once a process
        self.slots = np.array([slot_of[path] for path in paths])
        records = np.fromfile(records, RECORD, len(slot_of))
        needed = int((records["filled"] == 0).sum()) * self.stride              # also for the other split's images
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
            held = json.loads(b"[" + whole.replace(b"\n", b",") + b"]")         # at once: ten times as fast as by line
            slot_of = {path: slot for slot, path in enumerate(held)}
        except (ValueError, TypeError, RecursionError):                         # damaged: begin again
            whole, slot_of = b"", {}
        listing.truncate(len(whole) + bool(whole))
        new = [path for path in dict.fromkeys(paths) if path not in slot_of]
        listing.write(b"".join(json.dumps(path).encode() + b"\n" for path in new))
        return slot_of | {path: len(slot_of) + i for i, path in enumerate(new)}

    @staticmethod
    def grown(file: Path, length: int) -> int:
        """An open descriptor on the file, made at least `length` bytes long (sparse: room is taken as slots fill)."""
        descriptor = open_own(file)
        if os.fstat(descriptor).st_size < length:
            os.ftruncate(descriptor, length)
        return descriptor

    def checksum(self, index: int, row: np.ndarray) -> int:
        seed = zlib.crc32(f"{self.made_by}:{self.paths[index]}".encode("utf-8", "surrogateescape"))
        return zlib.crc32(row, seed)

    def holds(self, index: int, version: tuple[int, int]) -> bool:
        """Whether an image's slot is filled, from this version of its file; the checksum is for `read`."""
        return self.recorded(index, version) is not None

    def recorded(self, index: int, version: tuple[int, int]) -> int | None:
        """The checksum in an image's record, if its slot is filled, from this version of its file."""
        record = os.pread(self.record_file, RECORD.itemsize, int(self.slots[index]) * RECORD.itemsize)
        length, modified, checksum, filled = FIELDS.unpack(record.ljust(RECORD.itemsize, b"\0"))
        return checksum if filled and (length, modified) == version else None

    def read(self, index: int, version: tuple[int, int], row: np.ndarray) -> bool:
        """Copy an image's row into `row`; False where they are not there, damaged, or of another version."""
        if (checksum := self.recorded(index, version)) is None:
            return False
        slot = int(self.slots[index])
        if os.preadv(self.row_file, [row], slot * self.stride) != self.stride:
            return False
        if not self.verified[slot] or not row.reshape(-1).view(np.uint8)[-1]:   # 0: maybe cut short and grown again
            self.verified[slot] = self.checksum(index, row) == checksum
        return bool(self.verified[slot])

    def write(self, index: int, version: tuple[int, int], row: np.ndarray) -> None:
        """Keep an image's row. Raises OSError on a full disk, where writing through the map would crash."""
        slot = int(self.slots[index])
        os.pwrite(self.record_file, bytes(RECORD.itemsize), slot * RECORD.itemsize)
        os.pwrite(self.row_file, row, slot * self.stride)
        record = np.array([(*version, self.checksum(index, row), 1)], RECORD)
        os.pwrite(self.record_file, record, slot * RECORD.itemsize)


class ImageStore:
    """Pixels of a dataset's images by image id, from the cache folder where there is one, else decoded each time.

    paths: by image id. size: side S in pixels. cache: folder for the decoded images, or None. resampling: Pillow's
    filter, by name; each has its own file there. upright: images as they are looked at, see picture_files.decode.
    crops: by image id, the box that is cut out of it, see cropping.py, or None.
    """

    def __init__(self, paths: Sequence[str], size: int = 224, cache: str | Path | None = None,
                 resampling: str = "bilinear", upright: bool = False,
                 crops: Sequence[tuple[float, ...] | None] | None = None):
        self.crops = crops or [None] * len(paths)
        self.names = [path if box is None else f"{path}#{','.join(map(repr, box))}"     # each is kept by itself
                      for path, box in zip(paths, self.crops, strict=True)]
        self.paths, self.size, self.resampling, self.upright = list(paths), size, resampling, upright
        self.versions = [file_version(path) for path in self.paths]
        self.file, self.writable = None, True
        self.more_than_rgb: list[str] = []                                      # paths, of which is told once
        self.has_told = False
        if cache is not None:
            try:
                name = f"images_{size}" + f"_{resampling}" * (resampling != "bilinear") + "_upright" * upright
                self.file = RowFile(Path(cache), name, "pixels", self.names, (size, size, 3), np.uint8,
                                    f"{PIL.__version__}:channels last" + ":sRGB" * upright)
            except OSError as error:
                log.warning("no image cache in %s (%s): images are decoded each time they are used", cache, error)

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, index: int, row: np.ndarray) -> None:
        """Put one image's pixels into `row` (S, S, 3). Raises InputError for an image that cannot be read."""
        if not self.file or not self.file.read(index, self.versions[index], row):
            row[:] = self.decode(index)

    def decode(self, index: int) -> np.ndarray:
        """One image's pixels (S, S, 3) from its file, kept in the cache. Raises InputError."""
        try:
            pixels = decode(self.paths[index], self.size, self.resampling, self.upright, square_of(self.crops[index]),
                            self.more_than_rgb.append)
        except InputError as error:
            raise InputError(f"{error}; replace it, or pass --skip_bad_images True to leave such images out") from None
        if self.file and self.writable:
            try:
                self.file.write(index, self.versions[index], pixels)
            except OSError as error:
                self.writable = False
                log.warning("the image cache takes no more (%s): further images are decoded each time", error)
        return pixels

    def batch(self, ids: Sequence[int], device: torch.device = CPU) -> Tensor:
        """(B, 3, S, S) uint8, channels last, on the device."""
        pixels = torch.empty((len(ids), self.size, self.size, 3), dtype=torch.uint8, pin_memory=device.type == "cuda")
        for row, index in zip(pixels.numpy(), ids, strict=True):
            self.load(int(index), row)
        self.tell()
        return send(pixels, device).permute(0, 3, 1, 2)

    def picture(self, index: int) -> np.ndarray:
        """(S, S, 3) uint8, to be looked at."""
        return self.batch([index])[0].permute(1, 2, 0).numpy()

    def tell(self) -> None:
        """Say, once, that images hold more than is read of them."""
        if self.more_than_rgb and not self.has_told:
            self.has_told = True
            log.warning("note: %d of the images read now have 16 bits or transparency, first %s; they are read as the "
                        "original did: clipped, on black", len(self.more_than_rgb), min(self.more_than_rgb))

    def missing(self) -> list[str]:
        """Paths that do not exist or are empty, found without opening anything."""
        return [path for path, (length, _) in zip(self.paths, self.versions, strict=True) if length == 0]

    def unreadable(self, progress=lambda items, **_: items, share=lambda items: items) -> dict[int, str]:
        """Image id -> what is wrong, for every image that cannot be decoded; all others are in the cache afterwards.

        share: this process's part of the work, of a list.
        """
        def attempt(part: range) -> dict[int, str]:
            complaints = {}
            for index in part:
                try:
                    if not self.file or not self.file.holds(index, self.versions[index]):
                        self.decode(index)
                except InputError as error:
                    complaints[index] = str(error)
            return complaints
        # PIL decodes without Python's lock; a task an image would spend a fifth of the time on handing over tasks.
        parts = share([range(start, min(start + 8, len(self))) for start in range(0, len(self), 8)])
        with ThreadPoolExecutor(usable_cores()) as pool:
            found = {}
            for complaints in progress(pool.map(attempt, parts), desc="checking images", total=len(parts)):
                found |= complaints
        self.tell()
        return found


class DeviceStore:
    """Pixels in a device's memory: a batch of them is one gather there. pixels: (N, S, S, 3) uint8."""

    def __init__(self, pixels: Tensor):
        self.pixels, self.size = pixels, pixels.shape[1]

    @classmethod
    def of(cls, store: ImageStore, device: torch.device, workers: int,
           progress=lambda items, **_: items) -> "DeviceStore":
        """All of a store's images, read by `workers` threads. Raises InputError for one that cannot be read."""
        pixels = torch.empty((len(store), store.size, store.size, 3), dtype=torch.uint8, device=device)
        parts = [range(start, min(start + 256, len(store))) for start in range(0, len(store), 256)]
        batches = prefetch(partial(store.batch, device=device), parts, workers)
        for part, batch in zip(parts, progress(batches, desc="images to the device", total=len(parts)), strict=True):
            pixels[part.start:part.stop] = batch.permute(0, 2, 3, 1)
        return cls(pixels)

    @staticmethod
    def fits(stores: Iterable[ImageStore], device: torch.device, processes: int = 1) -> bool:
        """Whether these take at most half of what is free, as so many processes each hold them: the rest is for
        training."""
        return processes * sum(3 * len(store) * store.size**2 for store in stores) <= free_memory(device) / 2

    def __len__(self) -> int:
        return len(self.pixels)

    def batch(self, ids: Sequence[int], device: torch.device = CPU) -> Tensor:
        """(B, 3, S, S) uint8, channels last, on the device."""
        rows = send(torch.as_tensor(np.asarray(ids)), self.pixels.device)
        return send(self.pixels[rows].permute(0, 3, 1, 2), device)

    def picture(self, index: int) -> np.ndarray:
        """(S, S, 3) uint8, to be looked at."""
        return self.batch([index])[0].permute(1, 2, 0).numpy()
