"""Whatever becomes of a program's output, and whatever a file is named: no traceback, no command to the terminal."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

import main
from machine.stopping import ending
from machine.streams import shown

from .conftest import flags

ROOT = Path(main.__file__).parent
# A program as ours start, without torch: its first line, then what it says.
PROGRAM = ("import argparse, sys, os; from machine.stopping import starting, ending; parser = argparse.ArgumentParser("
           "prog='it'); starting(parser); sys.exit(ending('it', lambda stopping: ({})))")


def program(body, redirect="", **environment):
    """A shell's word for it: exit code, what went to standard output and error."""
    words = f"{sys.executable} -c \"$PROGRAM\" {redirect}; echo code $?"
    done = subprocess.run(["bash", "-c", words], cwd=ROOT, capture_output=True, check=False, timeout=120, env={
        **os.environ, **environment, "PROGRAM": PROGRAM.format(body)})
    before, _, code = done.stdout.rpartition(b"code ")
    return int(code), before, done.stderr


def test_names_are_shown_on_one_line_and_command_nothing():
    assert shown("a\x1b[2Jb\nc\r\x9b\x7f") == r"a\x1b[2Jb\nc\r\x9b\x7f"
    assert shown("é 中 मे\u200dरा ok") == "é 中 मे\u200dरा ok" and shown("n\udcff") == r"n\udcff"
    assert shown(Path("x\u202e")) == r"x\u202e"


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_ends_no_program_and_lends_no_file_its_number(closed, tmp_path):
    body = (f"print('said'), print('also', file=sys.stderr), print(open({str(tmp_path / 'mine')!r}, 'w').fileno() > 2, "
            f"file=open({str(tmp_path / 'result')!r}, 'w'))")
    code, out, error = program(body, closed)
    assert code == 0 and (tmp_path / "result").read_text() == "True\n" and b"Traceback" not in error
    assert out == (b"said\n" if closed == "2>&-" else b"") and error == (b"also\n" if closed == ">&-" else b"")
    assert (tmp_path / "mine").read_bytes() == b""


@pytest.mark.long("processes")
def test_bad_input_with_a_closed_error_stream_has_its_exit_code():
    assert program("open('/nowhere/x')", "2>&-") == (2, b"", b"")


def test_a_reader_that_leaves_is_no_error(tmp_path):
    body = ("[print('x' * 999) for _ in range(2000)], sys.stdout.flush(), "
            f"print('went on', file=open({str(tmp_path / 'end')!r}, 'w'))")
    code, out, error = program(body, "| head -1; test ${PIPESTATUS[0]} = 0")
    assert (code, out, error) == (0, b"x" * 999 + b"\n", b"") and (tmp_path / "end").read_text() == "went on\n"


@pytest.mark.long("a process")
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the full disk is a Linux device")
def test_results_that_a_full_disk_does_not_take_are_said():
    code, _, error = program("print('result')", "> /dev/full")
    assert code == 2 and b"No space left" in error and error.count(b"\n") == 1


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_text_goes_to_any_encoding(encoding):
    code, out, error = program(r"print('caf\u00e9 \u4e2d \udcff'), print('\u4e2d', file=sys.stderr)",
                               PYTHONIOENCODING=encoding)
    assert code == 0 and b"Traceback" not in error
    expected = {"ascii": b"caf\\xe9 \\u4e2d \xff\n", "latin-1": b"caf\xe9 \\u4e2d \xff\n",
                "utf-8": "caf\u00e9 \u4e2d ".encode() + b"\xff\n"}
    assert out == expected[encoding]


def test_a_terminal_gets_text_alone():
    """Bytes of a name that are no text are commands to some terminals."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", PROGRAM.format(r"print('n\udc9b')")], cwd=ROOT, stdin=theirs,
                               stdout=theirs, stderr=subprocess.DEVNULL)
    assert process.wait(120) == 0
    assert os.read(ours, 100) == b"n\\udc9b\r\n"
    os.close(ours), os.close(theirs)


def test_the_reason_a_program_ends_is_one_line_whatever_is_in_it(capsys):
    def work(_stopping):
        raise OSError("cannot read \x1b[2Jx\ny.jpg")
    assert ending("it", work) == 2 and capsys.readouterr().err == "it: error: cannot read \\x1b[2Jx\\ny.jpg\n"


@pytest.mark.parametrize("error", [MemoryError(), OverflowError("too large"), RuntimeError(
    "[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")])
def test_no_memory_is_one_line(error, capsys):
    def work(_stopping):
        raise error
    assert ending("it", work) == 2
    said = capsys.readouterr().err
    assert said.startswith("it: error: there is not enough memory") and said.count("\n") == 1


def test_other_faults_are_not_hidden():
    def work(_stopping):
        raise RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        ending("it", work)


def test_a_log_folder_whose_name_is_no_text(mitstates, tmp_path, capsys):
    """And commands in it, too."""
    log_dir = Path(os.fsdecode(os.fsencode(tmp_path) + b"/l\xff\x1b[2J"))
    assert main.main(flags("mitstates", mitstates, log_dir, model="tirg", learning_rate=1e-3, num_iters=1)) == 0
    captured = capsys.readouterr()
    assert r"l\udcff\x1b[2J" in captured.out and "\x1b" not in captured.out + captured.err
    (folder,) = log_dir.iterdir()
    assert (folder / "latest_checkpoint.pth").exists() and (folder / "metrics.json").exists()
    assert main.main(flags("mitstates", mitstates, log_dir, model="tirg", learning_rate=1e-3, num_iters=1,
                           resume="auto")) == 0
