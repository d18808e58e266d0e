"""Image files to what a frozen encoder makes of them, encoded once: path -> (W,) float32, kept beside the pixels.

A store of features stands wherever one of pixels does: its batches are (B, W) in place of (B, 3, S, S).
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from machine.device import free_memory, send
from machine.errors import InputError
from machine.image_store import CPU, ImageStore, RowFile
from machine.threads import prefetch

log = logging.getLogger(__name__)


class FeatureStore:
    """Features of a dataset's images by image id, from the cache folder where there is one, else held in memory.

    images: their pixels. encode: (B, 3, S, S) uint8 on the CPU -> (B, W) float32. made_by: names all that the features
    depend on beside the pixels; each has its own file. cache: folder for the features, or None. processes: of this
    machine that have such stores.
    What was read is held in memory too, as long as it takes less than a quarter of what is free: a composer's step
    would wait for some hundred reads.
    """

    def __init__(self, images: ImageStore, encode: Callable[[Tensor], Tensor], width: int, made_by: str,
                 cache: str | Path | None = None, processes: int = 1):
        self.images, self.encode, self.width = images, encode, width
        self.held: dict[int, np.ndarray] = {}                                   # and whatever no file keeps
        self.most_held = free_memory(CPU) // (4 * processes * width * np.dtype(np.float32).itemsize)
        self.file, self.writable = None, True
        if cache is not None:
            try:
                made_by += "_upright" * images.upright
                self.file = RowFile(Path(cache), f"features_{made_by}", "features", images.names, (width,), np.float32,
                                    made_by + ":sRGB" * images.upright)
            except OSError as error:
                log.warning("no features are kept in %s (%s): every run encodes the images anew", cache, error)

    def __len__(self) -> int:
        return len(self.images)

    def has(self, index: int) -> bool:
        return index in self.held or bool(self.file and self.file.holds(index, self.images.versions[index]))

    def fill(self, batch_size: int, workers: int, progress: Callable, share: Callable = lambda items: items) -> None:
        """Encode every image that is not kept yet. share: this process's part of the work, of a list.

        Raises InputError for an image that cannot be read.
        """
        new = [index for index in range(len(self)) if not self.has(index)]
        parts = share([new[start:start + batch_size] for start in range(0, len(new), batch_size)])
        with progress(total=sum(map(len, parts)), desc="image features, once", unit="image") as bar:
            for part, pixels in zip(parts, prefetch(self.images.batch, parts, workers), strict=True):
                self.keep(part, self.encode(pixels).numpy())
                bar.update(len(part))

    def keep(self, ids: Sequence[int], features: np.ndarray) -> None:
        """Raises InputError where features are not finite."""
        if not np.isfinite(features).all():
            raise InputError("the image encoder gives features that are not finite; give it other --image_weights")
        for index, row in zip(ids, np.ascontiguousarray(features), strict=True):
            try:
                if not self.file:
                    raise OSError("no file")
                self.file.write(index, self.images.versions[index], row)
            except OSError as error:
                if self.file and self.writable:
                    log.warning("the features' cache takes no more (%s): further ones are held in memory", error)
                self.writable, self.held[index] = False, row

    def row(self, index: int) -> np.ndarray:
        """One image's features, (W,). Raises InputError for an image that cannot be read."""
        if index in self.held:
            return self.held[index]
        row = np.empty(self.width, np.float32)
        if not self.file or not self.file.read(index, self.images.versions[index], row):
            row[:] = self.encode(self.images.batch([index])).numpy()[0]
            self.keep([index], row[None])
        if len(self.held) < self.most_held:
            self.held[index] = row
        return row

    def batch(self, ids: Sequence[int], device: torch.device = CPU) -> Tensor:
        """(B, W) float32 on the device, of at least one image."""
        features = torch.empty((len(ids), self.width), pin_memory=device.type == "cuda")
        np.concatenate([self.row(int(index)) for index in ids], out=features.numpy().reshape(-1))
        return send(features, device)

    def picture(self, index: int) -> np.ndarray:
        """(S, S, 3) uint8, to be looked at."""
        return self.images.picture(index)
