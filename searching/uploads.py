"""Visitors' pictures: looked at in memory, and remembered by their content for a while, so that a page can be reloaded.

No file is written. What is kept of a picture is its feature and a small copy, of the newest ones, for an hour at most.
"""

import hashlib
import io
import threading
import time
from dataclasses import dataclass

from machine.errors import InputError
from machine.picture_files import InMemory
from searching.gallery import Gallery, Source
from training.pictures import thumbnail

REMEMBERED = 200                        # pictures, of some 100 kB each
SECONDS = 3600                          # that one is remembered after it was asked about
SMALL, LARGE = 320, 1280                # pixels of a small copy's longer side, and of an enlarged one's


@dataclass
class Upload:
    """A visitor's picture: its name there, what is searched with, a JPEG of it, and when it was last asked about."""
    name: str
    source: Source
    small: bytes
    asked: float


class Uploads:
    """Of one gallery's page; several threads may ask."""

    def __init__(self, gallery: Gallery):
        self.gallery, self.lock = gallery, threading.Lock()
        self.kept: dict[str, Upload] = {}                                       # by id, the one last asked about last

    def take(self, name: str, content: bytes) -> str:
        """The picture's id, the same for the same file. Raises InputError where it cannot be read."""
        number = "u" + hashlib.sha256(name.encode() + b"\0" + content).hexdigest()[:32]
        if number not in self.kept:
            file = InMemory(name, content)
            upload = Upload(name, self.gallery.picture(file), jpeg(file, LARGE // 2), time.monotonic())
            with self.lock:
                self.kept[number] = upload
        self.find(number)
        return number

    def find(self, number: str) -> Upload:
        """Raises InputError where it is not remembered any more."""
        with self.lock:
            now = time.monotonic()
            if found := self.kept.pop(number, None):
                found.asked = now
                self.kept[number] = found
            for old in list(self.kept)[:-REMEMBERED]:
                del self.kept[old]
            for old in [key for key, upload in self.kept.items() if now - upload.asked > SECONDS]:
                del self.kept[old]
        if not found:
            raise InputError("this picture was uploaded and is not kept any more; choose or drop it in again")
        return found


def jpeg(path, side: int) -> bytes:
    """A small copy of a picture, as a file's content. Raises InputError where it cannot be read."""
    content = io.BytesIO()
    thumbnail(path, side).save(content, "JPEG", quality=85)
    return content.getvalue()
