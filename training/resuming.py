"""Which run goes on: the one that is named, or the newest of a log folder with the same comment."""

import argparse
import glob
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from machine import distributed, tensor_files
from machine.errors import InputError
from machine.folder_lock import FolderLock
from training import checkpoint

PATIENCE = 60                           # seconds for a process that torchrun has replaced and that is still ending

log = logging.getLogger(__name__)


class RunSummary(NamedTuple):
    """A run as its latest checkpoint tells of it, without its tensors being read or its checksum verified."""
    path: Path
    comment: str | None                 # None where the file does not tell
    launch: str | None
    turn: int                           # its place in the sequence of the runs of a log folder, however clocks stand
    it: int
    modified: float
    damage: str                         # what is wrong with the file, or ''


def summary_of(path: Path) -> RunSummary:
    modified = path.stat().st_mtime
    try:
        state = tensor_files.read(path, glance=True)
        opt, progress = state["opt"], state.get("progress") or {}
        opt = vars(opt) if isinstance(opt, argparse.Namespace) else opt
        found = RunSummary(path, opt.get("comment"), state.get("launch"), progress.get("turn", 0), state.get("it", 0),
                       modified, "")
        if all(isinstance(number, int) for number in (found.turn, found.it)):
            return found
        reason = "what it holds is of the wrong kind"
    except (tensor_files.Unreadable, OSError, LookupError, TypeError, AttributeError) as error:
        reason = str(error) if isinstance(error, tensor_files.Unreadable) else "it is no checkpoint of this program"
    return RunSummary(path, None, None, 0, 0, modified, reason)


def runs_in(log_dir: Path, comment: str) -> list[RunSummary]:
    """The runs with a checkpoint that may be of this comment, the newest first. A run that is begun or resumed takes
    the turn after all of these; of older programs' runs, which took none, the file's time counts."""
    found = [summary_of(path) for path in Path(log_dir).glob(f"*{glob.escape(comment)}*/{checkpoint.LATEST}")]
    return sorted(found, key=lambda seen: (seen.turn, seen.turn and seen.it, seen.modified), reverse=True)


def is_named(folder: Path, comment: str) -> bool:
    """Whether a run's folder has the name that one of this comment is given; a host's name has no '_'."""
    return bool(re.fullmatch(rf"\w{{3}}\d\d_\d\d-\d\d-\d\d_[^_]+{re.escape(comment)}(-\d+)?", folder.name))


def newest_run(runs: Iterable[RunSummary], comment: str, launch: str | None = None) -> Path | None:
    """The latest checkpoint of the newest of these runs that has this comment and, if given, this launch.

    Raises InputError where just that one is damaged: neither an older run nor a new one is what was asked for. Damaged
    ones of other runs are left out with a note.
    """
    runs = [seen for seen in runs if launch in (None, seen.launch)]
    newest = next((seen for seen in runs if seen.comment == comment), None)
    for seen in runs:
        named = is_named(seen.path.parent, comment)
        damage = seen.damage or (named and seen.comment != comment and damage_of(seen.path))  # is its comment, too?
        if damage and named and (newest is None or seen.modified > newest.modified):
            raise damaged(seen.path, damage)
        if damage:
            log.warning("note: left out %s, which is damaged: %s", seen.path, damage)
    if newest and (damage := damage_of(newest.path)):
        raise damaged(newest.path, damage)
    return newest and newest.path


def damaged(path: Path, damage: str) -> InputError:
    return InputError(f"{path}, of the newest run of this --comment, is damaged: {damage}; {way_out(path.parent)}")


def damage_of(path: Path) -> str:
    """What is wrong with a checkpoint, '' where nothing is known to be."""
    try:
        tensor_files.is_whole(path)
    except (tensor_files.Unreadable, OSError) as error:
        return str(error)
    return ""


def way_out(folder: Path) -> str:
    """What to do about a run whose latest checkpoint is damaged."""
    away = f"move {folder} away to have --resume auto leave it out"
    try:
        it = checkpoint.load(folder / checkpoint.BEST)["it"]
        return f"go on from its best one, of iteration {it}, with --resume {folder / checkpoint.BEST}, or {away}"
    except InputError:
        return away


class Start(NamedTuple):
    """Where a run begins: the checkpoint of the run that it goes on with, if any; the one that its weights come from,
    which may be another run's; that one's content; and the run's turn among those of its log folder."""
    resumed: Path | None
    source: Path | str | None
    state: dict | None
    turn: int


def find_start(resume: str, other: str, log_dir: Path, comment: str, trains: bool, lock: FolderLock) -> Start:
    """Find it, and lock the folder of the run that goes on before its checkpoint is read.

    other: a checkpoint to start from where no run goes on. trains: so that a job that torchrun started again goes on
    with what it had begun.
    """
    runs, launch = runs_in(log_dir, comment) if trains else [], None
    restarted = distributed.restarted() and trains
    if restarted and not resume:                                                # what this launch itself has begun
        resume, launch = "auto", distributed.launch()
    resumed = newest_run(runs, comment, launch) if resume == "auto" else Path(resume) if resume else None
    if resumed and resumed.is_dir():
        resumed = resumed / checkpoint.LATEST
    if resumed and resumed.parent.is_dir():
        lock.take(resumed.parent, PATIENCE if restarted else 0)
    source = resumed or other or None
    state = checkpoint.load(source) if source else None
    turns = [seen.turn for seen in runs] + ([state["progress"].get("turn", 0)] if resumed and state["progress"] else [])
    return Start(resumed, source, state, 1 + max(turns, default=0))
