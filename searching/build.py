"""Making the index of a folder, and bringing it up to date without losing anything that may still be there."""

import logging
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from machine import engine, processes
from machine.checksums import chunks_of, digest, file_digest
from machine.errors import InputError, first_line
from machine.folder_lock import NAME as LOCK
from machine.folder_lock import FolderLock
from machine.picture_files import LARGEST_FILE, decode
from machine.picture_folder import Kind, Walk, tell_of_unread
from machine.regular_files import open_regular
from machine.threads import prefetch
from searching import networks
from searching.encoder import Encoder
from searching.gallery import check_model, load_model, open_encoder
from searching.image_list import IMAGES, MODEL, Held, ImageList
from searching.metadata import Cells, keep, placed, read_metadata
from searching.networks import NETWORKS
from searching.ranking import RANKING, faiss, rank

FOR_TRAINING = ("optimizer_state_dict", "random", "progress")                   # of a checkpoint
HANDFUL, SHARE = 5, 0.1                 # more images than both are taken out of an index only with --prune

log = logging.getLogger(__name__)


@dataclass
class Built:
    """What making an index came to."""
    images: int
    new: int
    left_out: dict[str, str]            # path -> why, of folders too
    summary: str                        # of all that was left out, by kind
    not_followed: list[str]             # links that lead to other folders, or to files in them
    broken: dict[str, str] = field(default_factory=dict)                        # path -> why, of images


@dataclass
class Update:
    """What there is to do for an index to hold what its folder holds."""
    new: list[tuple[str, tuple[int, int]]]                                      # paths, with their files' versions
    paths: set[str]                     # of all images, those that are not to be found among them
    changed: set[str]                   # of the new ones, the paths that are listed already
    again: dict[str, tuple[int, int]]   # versions of files that are the same at another time, as copies are
    kept: int
    gone: list[int]                     # ids


def build(source: Path | None, folder: Path, out: Path, kind: str, device, batch_size: int, workers: int,
          progress: Callable, prune: bool = False, metadata: Path | None = None, follow_links: bool = False,
          engine_name: str = "auto") -> Built | None:
    """Make `out` the index of the images below `folder` by a checkpoint's model. What it already holds is kept: so it
    goes on where it was stopped, and takes in what has changed since. What is no more there is taken out at the very
    end; prune: even where it is much, or only its folder is known to be gone. metadata: a table of what is known of
    the images, in the place of an earlier one. follow_links: as of Walk. Of several processes the first does it, the
    others encode their share, and return nothing.

    The folder may be another than the last time, if it holds the same images: none of them is encoded again.
    source: None for the index's own model. device, engine_name: as of `open_encoder`.
    """
    faiss()                                                                     # missing? said before the work
    if not folder.is_dir():
        raise InputError(f"--images {folder} is no folder")
    folder = Path(os.path.realpath(folder))
    if folder == folder.parent:
        raise InputError(f"--images {folder} is the whole machine; name a folder in it")
    rows = read_metadata(metadata) if metadata else {}
    encoder = model_for(source, out, device, engine_name)
    if not processes.first():
        return helped(encoder, folder, batch_size, workers)
    with FolderLock("--out") as lock:
        prepare(out, encoder, source, lock)
        images = ImageList(out / IMAGES)
        if images.create(folder):
            log.warning("note: %s had no checksums; what it holds is taken as it is, and has them from now on", out)
        if images.file_note(MODEL)[0] is None:
            images.note_file(MODEL, file_digest(out / MODEL))
        if engine_name != "torch":
            encoder = with_networks(encoder, images, out, source)
        return brought_up_to_date(encoder, images, folder, out, kind, batch_size, workers, progress, prune, rows,
                                  follow_links)


def model_for(source: Path | None, out: Path, device, engine_name: str) -> Encoder:
    """What encodes: the index's own model where it is the checkpoint's, or none is given; else the checkpoint's, by
    torch. Raises InputError."""
    own = (out / MODEL).is_file() and (out / IMAGES).is_file()
    if source is None and not own:
        raise InputError(f"{out} is no index yet: pass --model_checkpoint PATH to make one")
    images = ImageList(out / IMAGES)
    if own and source:
        record = networks.record_of(out, images)
        own = record and record.made_of == made_of(source)
    if own and processes.world() == 1:
        check_model(images, out / MODEL)
        return open_encoder(out, images, device, engine=engine_name)
    return load_model(source or out / MODEL, device)


def made_of(source: Path | None) -> str | None:
    """The digest of a checkpoint's file, by which it is known again without being read."""
    return file_digest(source) if source and source.is_file() else None


def with_networks(encoder: Encoder, images: ImageList, out: Path, source: Path | None) -> Encoder:
    """Give the index networks for searching without torch, if it has none that are whole. Returns what is to encode
    pictures: these, on a CPU and of one process. Raises InputError where they cannot be written."""
    if isinstance(encoder, networks.NetworkEncoder):
        return encoder
    on_cpu = encoder.device.type == "cpu"
    try:
        made = networks.read(out, images)
    except networks.Unusable:
        from searching.as_networks import write  # only here: it needs torch

        try:
            made = write(encoder if on_cpu else load_model(out / MODEL, "cpu"), images, out, made_of(source))
        except (engine.Refused, networks.Unusable) as why:
            log.warning("note: searching %s will need PyTorch, as it has no networks: %s", out, why)
            return encoder
        except OSError as error:
            raise InputError(f"cannot make the index {out} ({first_line(error)}); make room, or choose another "
                             "--out") from None
    return made if on_cpu and processes.world() == 1 else encoder


def brought_up_to_date(encoder: Encoder, images: ImageList, folder: Path, out: Path, kind: str, batch_size: int,
                       workers: int, progress: Callable, prune: bool, rows: dict[str, Cells],
                       follow_links: bool) -> Built:
    """The index in `out`, which is this process's own and holds the encoder's model, of what is below `folder`; rows:
    metadata by file name, if there is any that is new."""
    walk = Walk(folder, follow_links)
    update = compare(images, walk, progress, prune)
    images.move(folder, update.again)
    if rows:
        keep_metadata(images, rows, update.paths)
    with progress(total=update.kept + len(update.new), initial=update.kept, desc="encoding images",
                  unit="image") as bar:
        for part, made in encoded(encoder, folder, update.new, batch_size, workers):
            for (path, _), (why, _) in zip(part, made, strict=True):
                if isinstance(why, str):
                    walk.leave_out(path, Kind.BROKEN, why + "; its earlier feature stays" * (path in update.changed))
            add(images, part, made)
            bar.update(len(part))
    broken = {path: why for path, (kind, why) in walk.left_out.items() if kind.is_image()}
    unread = tell_of_unread(walk.unread)
    if not len(images):
        raise InputError(f"no image that can be read below {folder}" + f"; {unread}" * bool(unread)
                         + "".join(f"; {path}: {why}" for path, why in list(broken.items())[:1]))
    if unread:
        log.warning("note: %s", unread)
    if update.gone:
        images.remove(update.gone)
    rank(images, out, encoder.image_dim, kind, progress)
    tried = {path for path, _ in update.new}
    return Built(len(images), len(tried - broken.keys()), {path: why for path, (_, why) in walk.left_out.items()},
                 walk.summary(), walk.not_followed(), broken)


def encoded(encoder: Encoder, folder: Path, new: list | None, batch_size: int, workers: int) -> Iterator[tuple]:
    """Batches of the images (path, version) that are new, in order, each with what was made of them, as `features` has
    it. Of several processes the first alone knows what is new, and gets all; each encodes its share."""
    new = processes.from_first(lambda: new)
    parts = [new[start:start + batch_size] for start in range(0, len(new), batch_size)]
    mine, read = processes.share(parts), partial(attempt, folder, encoder)
    pixels = prefetch(lambda part: list(map(read, part)), mine, workers)
    for start in range(0, len(parts), processes.world()):                     # in rounds: none gets far ahead
        rows = processes.to_first(features(encoder, next(pixels, [])))
        yield from zip(parts[start:start + len(rows)], rows, strict=False)      # of the last few, one may have had none


def features(encoder: Encoder, read: list[tuple[np.ndarray | str, str | None]]) -> list[tuple]:
    """Of images as `attempt` gives them: (feature (D,), checksum of the file); of one that cannot be read, as it is."""
    pixels = [row for row, _ in read if not isinstance(row, str)]
    rows = iter(encoder.images(pixels) if pixels else ())
    return [(row if isinstance(row, str) else next(rows), content) for row, content in read]


def helped(encoder: Encoder, folder: Path, batch_size: int, workers: int) -> None:
    """The part of a process that is not the first."""
    for _ in encoded(encoder, folder, None, batch_size, workers):
        pass


def keep_metadata(images: ImageList, rows: dict[str, Cells], paths: set[str]) -> None:
    """Of these images. Raises InputError where the rows name none of them."""
    found, left_out = placed(rows, paths)
    if not found:
        raise InputError(f"no row of --metadata names an image: the first is of {next(iter(rows))}, and an image is "
                         f"{min(paths, default='not there')}; name each by its path below --images")
    if left_out:
        name, why = next(iter(left_out.items()))
        log.warning("note: %d of the %d rows of --metadata are of no image: %s, %s%s", len(left_out), len(rows), name,
                    why, ", ..." * (len(left_out) > 1))
    keep(images, found)


def attempt(folder: Path, encoder: Encoder, entry: tuple[str, tuple[int, int]]) -> tuple[np.ndarray | str, str | None]:
    """An image's pixels, or why there are none, and its file's checksum. This is taken first: of a file that changes
    meanwhile it must not be the later one's."""
    content = content_of(folder / entry[0])
    try:
        return decode(str(folder / entry[0]), encoder.size, encoder.resampling, upright=True), content
    except InputError as error:
        return str(error), None


def content_of(file: Path) -> str | None:
    """The checksum of an image's file; None where it cannot be read."""
    with suppress(OSError), open_regular(file) as opened:
        return digest(chunks_of(opened, LARGEST_FILE))
    return None


def add(images: ImageList, part: list[tuple], made: list[tuple]) -> None:
    """Those of a batch (path, version) that could be read."""
    if read := [(entry, *row) for entry, row in zip(part, made, strict=True) if not isinstance(row[0], str)]:
        entries, features, contents = zip(*read, strict=True)
        images.add(list(entries), np.stack(features), contents)


def compare(images: ImageList, walk: Walk, progress: Callable, prune: bool) -> Update:
    """What the index holds with what is found in its folder, or in another that has its images. Raises InputError
    where so much is missing that it is rather a failure than what the user wants."""
    (held, damaged), out, last = images.held(), images.path.parent, images.folder()
    new, again, kept = looked_at(walk, held, progress)
    found = kept | dict(new).keys()
    if last != walk.folder and 2 * len(kept) < len(held):
        raise InputError(f"{out} is the index of {last}, and {walk.folder} has {len(kept)} of its {len(held)} images; "
                         "give another folder's its own --out")
    if held and not found:
        raise InputError(f"{why_nothing(walk)}: the {len(held)} images that {out} lists stay in it; see that the disk "
                         "is there")
    missing = [path for path in held if path not in found]
    gone = [path for path in missing if walk.is_gone(path) or (prune and not walk.is_out_of_sight(path))]
    if len(gone) > (max(HANDFUL, SHARE * len(held)) if last == walk.folder else 0) and not prune:
        raise InputError(f"{len(gone)} of the {len(held)} images of {out} are no more in {walk.folder}"
                         f"{', or in folders that are passed over' * bool(walk.passed_over)}; if that is "
                         "meant, pass --prune to take them out: nothing was changed")
    if damaged:
        log.warning("note: %d entries of %s are damaged, and made again", len(damaged), images.path)
        images.remove(damaged)
    unsure = sorted(set(missing) - set(gone))
    if unsure:
        log.warning("note: %d images are not to be found, but stay in %s, as their folder is gone, empty, linked or "
                    "unreadable, or their file is no image's now: %s%s; --prune takes out all but what is unreadable",
                    len(unsure), out, unsure[0], ", ..." * (len(unsure) > 1))
    return Update(new, held.keys() | found, held.keys() & dict(new), again, len(kept),
                  [held[path].number for path in gone])


def looked_at(walk: Walk, held: dict[str, Held], progress: Callable) -> tuple[list, dict, set[str]]:
    """Of the folder's images: those to be encoded, with their versions; the versions of listed ones at another time;
    and the paths of all listed ones that are still the same."""
    new, again, kept = [], {}, set()
    for path, version in progress(walk.images(), desc="looking for images", unit="image"):
        if path in held and held[path].version == version:
            kept.add(path)
        elif path in held and is_same(walk.folder / path, version, held[path]):
            kept.add(path)
            again[path] = version
        else:
            new.append((path, version))
    return new, again, kept


def is_same(file: Path, version: tuple[int, int], held: Held) -> bool:
    """Whether a file is the listed one at another time: it has as many bytes, and the same."""
    return version[0] == held.version[0] and held.content is not None and content_of(file) == held.content


def why_nothing(walk: Walk) -> str:
    if "." in walk.left_out:
        return f"{walk.folder} cannot be read"
    unread = tell_of_unread(walk.unread)
    return f"{walk.folder} {'holds no image' if walk.filled else 'is empty'}" + f" ({unread})" * bool(unread)


def prepare(out: Path, encoder: Encoder, source: Path | None, lock: FolderLock) -> None:
    """The folder, locked, with the model in it. Raises InputError where it is not free, or another model's index, or
    holds links in the place of our files, which would be written through."""
    unfinished = f"{MODEL}.unfinished"
    ours = (MODEL, IMAGES, f"{IMAGES}-journal", RANKING, f"{RANKING}.unfinished", unfinished, NETWORKS,
            f"{NETWORKS}.unfinished")
    for path in (out / name for name in ours):
        if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
            raise InputError(f"{path} is not a regular file; remove it, or choose another --out")
    if (out / MODEL).is_file():
        lock.take(out)
        if (out / IMAGES).is_file():
            check_model(ImageList(out / IMAGES), out / MODEL)
        if Path(encoder.path).parent != out and load_model(out / MODEL, "cpu").fingerprint() != encoder.fingerprint():
            raise InputError(f"{out} is the index of another model than {source}; give this one's its own --out")
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(name not in (unfinished, LOCK) for name in os.listdir(out)):
            raise InputError(f"{out} holds other files; give the index a folder of its own with --out")
        lock.take(out)
        from machine.tensor_files import packed  # only here: it needs torch

        content = {name: value for name, value in encoder.state.items() if name not in FOR_TRAINING}
        (out / unfinished).write_bytes(packed(content))
        os.replace(out / unfinished, out / MODEL)
    except (OSError, RuntimeError) as error:
        raise InputError(f"cannot make the index {out} ({first_line(error)}); choose another --out") from None
