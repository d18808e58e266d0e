"""What a folder holds: its pictures, and of everything else how much there is and why it is left out.

Passed over, whoever asks, is what its user did not put there: hidden files and folders, and a system's own folders, as
the thumbnails and bins of NAS and desktops, which hold the same pictures again.
"""

import errno
import fnmatch
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from enum import Enum
from pathlib import Path

from machine.picture_files import HEIF, SUFFIXES, begins_as_one

OUR_CACHE = "image_cache"               # made by us, no picture in it, and so not counted
# By name, or by their parent's and theirs, in small letters: of Synology, QNAP, Buffalo and other NAS; of Windows, Mac
# and Linux, and what they put onto others' disks; of Nextcloud; of programs that keep smaller copies of photos.
SYSTEMS_OWN = re.compile("|".join(map(fnmatch.translate, (
    "@eadir", "@syno*", "@recycle", "@recently-snapshot", "@__thumb", "@sharebin", "@transcode", "#recycle",
    "#snapshot", "~snapshot", "trashbox", "network recycle bin*", "[$]recycle.bin", "recycler/s-1-5-*",
    "system volume information", "__macosx", "network trash folder", "temporary items", "lost+found",
    "files_trashbin", "files_versions", "appdata_oc*", "*.lrdata", "*.photoslibrary/resources",
    "*.photoslibrary/scopes", "*.photolibrary/thumbnails", "*.photolibrary/previews", "*.aplibrary/thumbnails",
    "*.aplibrary/previews"))))
# Pictures that are not read, by ending, and what helps.
CONVERTED = "save as JPEG or PNG"
UNREAD = {
    **dict.fromkeys(HEIF, "pip install pillow-heif, and they are read"),
    **dict.fromkeys(""".3fr .arw .cr2 .cr3 .crw .dcr .dng .erf .fff .gpr .iiq .kdc .mef .mos .mrw .nef .nrw .orf .pef
                       .raf .raw .rw2 .rwl .sr2 .srf .srw .x3f""".split(),
                    "as a camera's raw files they are no pictures yet; save as JPEG with darktable, RawTherapee "
                    "or the camera's own program"),
    **dict.fromkeys(""".ai .bpg .cdr .cin .cur .dcm .dds .djvu .dpx .eps .exr .fits .flif .hdr .icns .ico .j2c .j2k .jp2
                       .jpf .jpm .jpx .jxl .jxr .pcx .psb .psd .qoi .sgi .svg .svgz .tga .wdp .wmf .emf .xbm .xcf
                       .xpm""".split(), CONVERTED)}
NO_ENDING = "a name without a picture's ending"
NOT_QUITE = re.compile(rf".*({'|'.join(map(re.escape, SUFFIXES))})([^a-z0-9.].*|\.\d+)", re.DOTALL)  # .jpg~, .jpg.1


def is_systems_own(path: str) -> bool:
    """Whether a folder of this path is one."""
    parts = path.lower().split("/")[-2:]
    return any(SYSTEMS_OWN.fullmatch("/".join(parts[start:])) for start in range(len(parts)))


def is_passed_over(path: str) -> bool:
    """Whether a file or folder is, for its own name, wherever it lies."""
    return os.path.basename(path).startswith(".") or is_systems_own(path)


class Kind(Enum):
    """Why something is left out; as it is counted, one and several."""
    BROKEN = "broken image", "broken images"
    BROKEN_LINK = "broken link", "broken links"
    LEADS_OUT = "link out of the folder", "links out of the folder"
    NOT_REGULAR = "not a regular file", "not regular files"
    LINKED_FOLDER = "linked folder not followed", "linked folders not followed"
    UNREADABLE_FOLDER = "unreadable folder", "unreadable folders"
    PASSED_OVER = "folder that is hidden or the system's own", "folders that are hidden or the system's own"
    UNREAD = "image of a kind that is not read", "images of a kind that is not read"
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
    passed_over: the folders that are hidden or a system's own. unread: how many pictures of a kind that is not read
    there are, by ending.
    filled: the folders in which there is anything at all; one without may be a disk that is not there.
    """

    def __init__(self, folder: Path, follow_links: bool = False):
        self.folder, self.follow_links = folder, follow_links
        self.left_out: dict[str, tuple[Kind, str]] = {}
        self.counts: Counter[Kind] = Counter()
        self.passed_over: dict[str, None] = {}                                  # in order
        self.unread: Counter[str] = Counter()
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
            left += [path for name in folders if self.is_entered(path := os.path.join(below, name))][::-1]

    def names(self) -> list[str]:
        """Paths below the folder of all that has an image's name, in order; then of those whose file is none, for
        whoever wants each image that is named to be there."""
        found = [path for path, _ in self.images()]
        return found + [path for path, (kind, _) in self.left_out.items() if kind.is_image()]

    def is_entered(self, path: str) -> bool:
        """Whether a folder is looked into."""
        if passed := is_passed_over(path):
            self.passed_over[path] = None
        return not passed and os.path.basename(path) != OUR_CACHE

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
            if not self.follow_links and not is_passed_over(path):
                return self.leave_out(path, Kind.LINKED_FOLDER, "a linked folder, not followed")
            return self.links.append(path) if self.is_entered(path) else None
        if not entry.name.lower().endswith(SUFFIXES) or entry.name.startswith("."):
            return self.count(entry)
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

    def count(self, entry: os.DirEntry) -> None:
        """One of those that are too many to be listed."""
        if entry.name.startswith("."):
            self.counts[Kind.HIDDEN if entry.name.lower().endswith(SUFFIXES) else Kind.OTHER] += 1
        elif ending := unread_ending(entry.path):
            self.counts[Kind.UNREAD] += 1
            self.unread[ending] += 1
        else:
            self.counts[Kind.OTHER] += 1

    def leave_out(self, path: str, kind: Kind, reason: str) -> None:
        self.left_out[path] = kind, reason

    def is_gone(self, path: str) -> bool:
        """Whether an image that was not found was truly removed: its folder is there, not empty, and holds nothing of
        its name; or one that is passed over holds it. Of a kind that this installation does not read none is gone."""
        there = os.path.dirname(path) in self.filled or any(folder in self.passed_over for folder in above(path))
        return there and path not in self.left_out and path.lower().endswith(SUFFIXES)

    def is_out_of_sight(self, path: str) -> bool:
        """Whether an image that was not found may well be there: it, or a folder above it, cannot be read."""
        return any(self.left_out.get(name, (None,))[0] in (Kind.UNREADABLE_FOLDER, Kind.BROKEN)
                   for name in (".", *above(path), path))

    def not_followed(self) -> list[str]:
        """The links that `follow_links` would have followed."""
        return [] if self.follow_links else [path for path, (kind, _) in self.left_out.items()
                                             if kind in (Kind.LINKED_FOLDER, Kind.LEADS_OUT)]

    def summary(self) -> str:
        """All that was left out, by kind."""
        images = [kind for kind in Kind if kind.is_image()]
        left_out = sum(kind in images for kind, _ in self.left_out.values())
        by_kind = f" ({', '.join(self.counted(*images))})" * bool(left_out)
        return ", ".join([f"{left_out} left out{by_kind}",
                          *self.counted(*(kind for kind in Kind if kind not in images))])

    def counted(self, *kinds: Kind) -> list[str]:
        """How much of these kinds was left out, and of folders that were passed over which is the first."""
        counts = Counter(kind for kind, _ in self.left_out.values()) + self.counts
        counts[Kind.PASSED_OVER] = len(self.passed_over)
        first = {Kind.PASSED_OVER: f" ({next(iter(self.passed_over), '')})"}
        return [kind.counted(counts[kind]) + first.get(kind, "") for kind in kinds if counts[kind]]


def above(path: str) -> list[str]:
    """The folders of a path below one, the outermost first."""
    return [path[:place] for place, letter in enumerate(path) if letter == "/"]


def why_not_listed(folder: Path, path: str) -> str:
    """Why a file that is there is none of a folder's pictures, and what to do."""
    if passed := next((part for part in [*above(path), path] if is_passed_over(part)), ""):
        return f"is passed over, as {passed} is hidden or the system's own: move or rename it"
    if os.path.isdir(folder / path):
        return "is a folder; name a picture"
    if ending := unread_ending(os.path.join(folder, path)):
        return f"is a picture of a kind that is not read; {tell_of_unread(Counter([ending]))}"
    return f"does not end as a picture does ({', '.join(SUFFIXES)}); save it as one of these"


def unread_ending(path: str) -> str:
    """The ending of a picture of a kind that is not read; NO_ENDING for one whose name does not say it; else nothing.
    """
    name = os.path.basename(path).lower()
    ending = os.path.splitext(name)[1]
    if ending in UNREAD:
        return ending
    return NO_ENDING if (not ending or NOT_QUITE.fullmatch(name)) and begins_as_one(path) else ""


def tell_of_unread(unread: Counter[str]) -> str:
    """What to say of pictures of kinds that are not read, by ending; nothing where there are none."""
    by_help: dict[str, Counter] = {}
    for ending in sorted(unread):
        help = "give them the ending .jpg" if ending == NO_ENDING else UNREAD.get(ending, CONVERTED)
        by_help.setdefault(help, Counter())[ending] = unread[ending]
    return "; ".join(f"{endings.total()} {'file has' if endings.total() == 1 else 'files have'} {NO_ENDING}: {help}"
                     if NO_ENDING in endings else
                     f"{endings.total()} {'file ends' if endings.total() == 1 else 'files end'} in "
                     f"{' or '.join(endings)}: {help}" for help, endings in by_help.items())
