"""One process at a time in a run's folder, whoever it is, and however the one before it ended."""

import errno
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import main
from flags import get_parser
from machine import folder_lock
from machine.errors import InputError
from machine.folder_lock import FolderLock, write_whole
from machine.stopping import EXIT_CODES, Stopped, Stopping
from training import checkpoint, loop

from .conftest import flags

ROOT = Path(main.__file__).parent
QUICK = {"eval_frequency": 0, "model": "tirg"}


def holder(folder, then="import time; time.sleep(600)"):
    """A process, without torch, that has locked the folder."""
    words = ("import pathlib, sys; from machine.folder_lock import FolderLock; lock = FolderLock(); "
             f"lock.take(pathlib.Path({str(folder)!r})); print('locked', flush=True); {then}")
    process = subprocess.Popen([sys.executable, "-c", words], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    return process


def test_the_second_process_is_told_who_has_the_folder_and_a_dead_one_has_none(tmp_path):
    process = holder(tmp_path)
    try:
        with pytest.raises(InputError, match=f"in use by process {process.pid} on {re.escape(socket.gethostname())}"):
            FolderLock().take(tmp_path)
    finally:
        process.kill()
        process.communicate()
    left = tmp_path / "latest_checkpoint.pth.host-1.unfinished"
    left.write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    with FolderLock() as lock:
        lock.take(tmp_path)
        assert json.loads((tmp_path / folder_lock.NAME).read_text())["process"] == os.getpid()
        assert not left.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_process_that_dies_slowly_is_waited_for(tmp_path):
    """As after a restart by torchrun: it goes 0.5 s after it was asked to."""
    process = holder(tmp_path, "sys.stdin.read()")
    timer = threading.Timer(0.5, process.kill)
    timer.start()
    with FolderLock() as lock:
        lock.take(tmp_path, patience=60)
        assert lock.file is not None
    process.communicate()


def test_two_locks_in_turn_never_hold_one_folder_together(tmp_path):
    """The file goes with its holder, and a waiting process must not keep the one that is gone."""
    first, second, third = FolderLock(), FolderLock(), FolderLock()
    first.take(tmp_path)
    waiting = threading.Thread(target=second.take, args=(tmp_path, 60))
    waiting.start()
    first.release()
    waiting.join(60)
    with pytest.raises(InputError, match="in use by process"):
        third.take(tmp_path)
    second.release()


@pytest.mark.parametrize("kind", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_a_note(tmp_path, monkeypatch, caplog, kind):
    def flock(*_):
        raise OSError(kind, os.strerror(kind))
    monkeypatch.setattr(fcntl, "flock", flock)
    with FolderLock() as lock:
        lock.take(tmp_path)
    assert "has no locks" in caplog.text


def test_a_link_in_place_of_the_lock_is_refused_and_untouched(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / folder_lock.NAME).symlink_to(tmp_path / "notes.txt")
    with pytest.raises(InputError, match="cannot write to"):
        FolderLock().take(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_file_is_what_it_was_or_all_of_the_new(tmp_path):
    write_whole(tmp_path / "x", b"old")

    def fail(_written):
        raise OSError(errno.ENOSPC, "full")
    with pytest.raises(OSError, match="full"):
        write_whole(tmp_path / "x", b"new", fail)
    assert (tmp_path / "x").read_bytes() == b"old" and [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.long("two runs")
def test_the_readmes_line_started_twice(mitstates, tmp_path, capsys, monkeypatch):
    """The second start comes while the first is in its third step, which is told of a lost terminal afterwards."""
    words = flags("mitstates", mitstates, tmp_path / "logs", resume="auto", num_iters=100, save_frequency=1, **QUICK)
    second = []

    def step(run, batch, bar):
        original(run, batch, bar)
        if run.it == 3:
            done = subprocess.run([sys.executable, "main.py", *words], cwd=ROOT, capture_output=True, text=True,
                                  check=False, timeout=300)
            second.append(done)
            os.kill(os.getpid(), signal.SIGHUP)
    original = loop.Training.step
    monkeypatch.setattr(loop.Training, "step", step)
    assert main.main(words) == EXIT_CODES[signal.SIGHUP] == 129
    (folder,) = (tmp_path / "logs").iterdir()
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"stopped by SIGHUP; saved at iteration 3, go on with --resume '{folder}'" in said
    (done,) = second
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"in use by process {os.getpid()} on {socket.gethostname()}" in done.stderr
    assert checkpoint.load(folder / checkpoint.LATEST)["it"] == 3
    assert not [path.name for path in folder.iterdir() if path.name.endswith((".unfinished", ".lock"))]


def test_sighup_stops_as_sigterm_does_but_not_under_nohup():
    with Stopping(), pytest.raises(Stopped, match="SIGHUP") as stop:
        os.kill(os.getpid(), signal.SIGHUP)
    assert stop.value.code == 129
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stopping() as stopping:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stopping.asked is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_every_path_flag_expands_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    names = ("dataset_path", "image_cache", "image_weights", "model_checkpoint", "resume", "log_dir")
    args = get_parser().parse_args(["--dataset=mitstates", *(f"--{name}=~/x" for name in names)])
    assert {str(getattr(args, name)) for name in names} == {"/home/me/x"}
    args = get_parser().parse_args(["--dataset=mitstates", "--dataset_path", "a~/b", "--resume", "auto"])
    assert (str(args.dataset_path), args.resume, args.image_cache, args.image_weights) == (
        "a~/b", "auto", "auto", "imagenet")
    import search
    for words in (["index", "--model_checkpoint=~/x", "--images=~/x", "--out=~/x"],
                  ["query", "--index=~/x", "--image=~/x", "--html=~/x", "--png=~/x"], ["serve", "--index=~/x"]):
        args = vars(search.get_parser().parse_args(words))
        assert {str(args[word[2:].partition("=")[0]]) for word in words[1:]} == {"/home/me/x"}


@pytest.mark.parametrize(("changes", "words"), [
    ({"image_size": 100_000, "image_encoder": "resnet18"}, ["--image_size 100000", "GB of memory", "are free"]),
    ({"image_embed_dim": 100_000}, ["--image_embed_dim 100000", "GB of memory", "are free"]),
    ({"text_embed_dim": 2147483648}, ["--text_embed_dim 2147483648", "more memory than any machine has"]),
    ({"image_size": 2**40}, ["--image_size", "more memory than any machine has"]),
    ({"batch_size": 10**12}, ["--batch_size 1000000000000", "GB of memory"])])
def test_sizes_that_no_machine_holds_are_said_before_any_work(mitstates, tmp_path, capsys, changes, words):
    assert main.main(flags("mitstates", mitstates, tmp_path / "logs", **{**QUICK, **changes})) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("main.py: error:") and all(word in line for word in words), line
    assert not list((tmp_path / "logs").glob("*"))
