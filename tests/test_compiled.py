"""Loops that are compiled once and kept: another process finds them, and what is kept wrongly costs time alone."""

import subprocess
import sys

import pytest

from .conftest import some

pytestmark = pytest.mark.long("processes that compile")

LOOP = """
import sys
sys.path.insert(0, {root!r})
import numpy as np
from machine.compiled import compiled

@compiled
def doubled(given, made):
    for i in range(len(given)):
        made[i] = 2 * given[i]

made = np.empty(3)
doubled(np.arange(3.0), made)
doubled(made.copy(), made)
print(made.tolist(), doubled.__name__)
"""


@pytest.fixture
def answer(tmp_path, pytestconfig, monkeypatch):
    """Runs the loop in a process of its own, with what it keeps in tmp_path / "kept"."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "kept"))
    source = tmp_path / "loop.py"
    source.write_text(LOOP.format(root=str(pytestconfig.rootpath)))

    def run(*flags: str) -> str:
        given = source.read_text() if flags else source
        done = subprocess.run([sys.executable, *flags, given], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout
    return run


def kept(tmp_path):
    return sorted(file for file in (tmp_path / "kept").rglob("*") if file.suffix in (".nbc", ".nbi"))


def test_the_next_process_finds_what_one_compiled(answer, tmp_path):
    first = answer()
    assert first == "[0.0, 4.0, 8.0] doubled\n"
    files = {file: file.stat().st_mtime_ns for file in kept(tmp_path)}
    assert len(files) == 2
    assert answer() == first and {file: file.stat().st_mtime_ns for file in kept(tmp_path)} == files


@pytest.mark.parametrize(("suffix", "damage"), some([(".nbc", b"\x80\x04junk"), (".nbi", b"")]))
def test_a_damaged_file_costs_time_only(answer, tmp_path, suffix, damage):
    first = answer()
    for file in kept(tmp_path):
        if file.suffix == suffix:
            file.write_bytes(damage)
    assert answer() == first


@pytest.mark.parametrize("command", [["-c"], []])
def test_where_nothing_can_be_kept(answer, tmp_path, command):
    """What a source that is no file makes has no folder to go to; else the one that was named is a file."""
    (tmp_path / "kept").write_text("a file where a folder should be")
    assert answer(*command) == "[0.0, 4.0, 8.0] doubled\n"
