"""What a folder holds for an index: its images, and of everything else how much there is and why it is left out."""

import errno
import os
import stat
from collections import Counter
from collections.abc import Iterator
from enum import Enum
from pathlib import Path

from machine.picture_files import SUFFIXES


class Kind(Enum):
    """Why something is left out; as it is counted, one and several."""
    BROKEN = "broken image", "broken images"
    BROKEN_LINK = "broken link", "broken links"
    LEADS_OUT = "link out of the folder", "links out of the folder"
    NOT_REGULAR = "not a regular file", "not regular files"
    LINKED_FOLDER = "linked folder not followed", "linked folders not followed"
    UNREADABLE_FOLDER = "unreadable folder", "unreadable folders"
    HIDDEN = "hidden image", "hidden images"
    OTHER = "other file", "other files"

    def counted(self, number: int) -> str:
        return f"{number} {self.value[number != 1]}"

    def is_image(self) -> bool:
        """Whether it would have been an image of the index."""
        return self in (Kind.BROKEN, Kind.BROKEN_LINK, Kind.LEADS_OUT, Kind.NOT_REGULAR)


class Walk:
    """A folder looked through once. follow_links: linked folders, too, after all others, each real one once; and files
    that a link leads out of the folder to.

    left_out: path -> kind and reason, of what has an image's name and of folders. counts: by kind, of the rest.
    filled: the folders in which there is anything at all; one without may be a disk that is not there.
    """

    def __init__(self, folder: Path, follow_links: bool = False):
        self.folder, self.follow_links = folder, follow_links
        self.left_out: dict[str, tuple[Kind, str]] = {}
        self.counts: Counter[Kind] = Counter()
        self.filled: set[str] = set()
        self.links: list[str] = []                                              # linked folders that are left to do
        self.seen: set[tuple[int, int]] = set()                                 # real folders

    def images(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Paths below the folder of the images in it, in order, with their files' versions (bytes, ns)."""
        left = [""]
        while left or self.links:
            below = left.pop() if left else self.links.pop(0)
            try:
                if self.follow_links and self.is_again(below):
                    continue
                with os.scandir(self.folder / below) as found:
                    entries = sorted(found, key=lambda entry: entry.name)
                folders = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
            except OSError as error:
                self.leave_out(below or ".", Kind.UNREADABLE_FOLDER, f"it cannot be read ({error.strerror})")
                continue
            if entries:
                self.filled.add(below)
            for entry in entries:
                path = os.path.join(below, entry.name)
                if entry.name not in folders and (version := self.version(entry, path)):
                    yield path, version
            left += [os.path.join(below, name) for name in reversed(folders)]

    def is_again(self, below: str) -> bool:
        """Whether a folder was seen before, or would lead in circles."""
        found = os.stat(self.folder / below)
        if below and self.folder.is_relative_to(os.path.realpath(self.folder / below)):
            self.leave_out(below, Kind.LINKED_FOLDER, "a linked folder that this one is part of")
        elif (found.st_dev, found.st_ino) in self.seen:
            if os.path.islink(self.folder / below):
                self.leave_out(below, Kind.LINKED_FOLDER, "a linked folder whose images are taken already")
        else:
            self.seen.add((found.st_dev, found.st_ino))
            return False
        return True

    def version(self, entry: os.DirEntry, path: str) -> tuple[int, int] | None:
        """Of an image's file; None where it is left out."""
        if entry.is_symlink() and os.path.isdir(entry.path):
            if not self.follow_links:
                return self.leave_out(path, Kind.LINKED_FOLDER, "a linked folder, not followed")
            return self.links.append(path)
        if not entry.name.lower().endswith(SUFFIXES) or entry.name.startswith("."):
            self.counts[Kind.HIDDEN if entry.name.lower().endswith(SUFFIXES) else Kind.OTHER] += 1
            return None
        try:
            found = os.stat(entry.path)
        except OSError as error:
            if entry.is_symlink() and error.errno in (errno.ENOENT, errno.ELOOP):
                reason = "a link to itself" if error.errno == errno.ELOOP else "a link to nothing"
                return self.leave_out(path, Kind.BROKEN_LINK, reason)
            return self.leave_out(path, Kind.BROKEN, f"it cannot be read ({error.strerror})")
        if not stat.S_ISREG(found.st_mode):
            return self.leave_out(path, Kind.NOT_REGULAR, "not a regular file")
        if not self.follow_links and entry.is_symlink() and not (
                Path(os.path.realpath(entry.path)).is_relative_to(self.folder)):
            return self.leave_out(path, Kind.LEADS_OUT, "a link that leads out of the folder")
        return found.st_size, found.st_mtime_ns

    def leave_out(self, path: str, kind: Kind, reason: str) -> None:
        self.left_out[path] = kind, reason

    def is_gone(self, path: str) -> bool:
        """Whether an image that was not found was truly removed: its folder is there, not empty, and holds nothing of
        its name."""
        return path not in self.left_out and os.path.dirname(path) in self.filled

    def is_out_of_sight(self, path: str) -> bool:
        """Whether an image that was not found may well be there: it, or a folder above it, cannot be read."""
        above = [path[:place] for place, letter in enumerate(path) if letter == "/"]
        return any(self.left_out.get(name, (None,))[0] in (Kind.UNREADABLE_FOLDER, Kind.BROKEN)
                   for name in (".", *above, path))

    def not_followed(self) -> list[str]:
        """The links that `follow_links` would have followed."""
        return [] if self.follow_links else [path for path, (kind, _) in self.left_out.items()
                                             if kind in (Kind.LINKED_FOLDER, Kind.LEADS_OUT)]

    def summary(self) -> str:
        """All that was left out, by kind."""
        counts = Counter(kind for kind, _ in self.left_out.values()) + self.counts
        images = [kind for kind in Kind if counts[kind] and kind.is_image()]
        by_kind = ", ".join(kind.counted(counts[kind]) for kind in images)
        others = [kind.counted(counts[kind]) for kind in Kind if counts[kind] and kind not in images]
        return ", ".join([f"{sum(counts[kind] for kind in images)} left out{f' ({by_kind})' * bool(images)}", *others])
