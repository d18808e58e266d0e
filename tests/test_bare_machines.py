"""A machine without room for temporary files or shared memory, as a container with a read-only disk: each program does
what it can. Linux' namespaces take them away from a process; where they are not to be had, the tests are left out."""

import errno
import os
import subprocess
import sys

import pytest

from machine.errors import in_words
from machine.stopping import ending

from .conftest import flags, picture, some
from .index_faults import write_model
from .services import ROOT

pytestmark = pytest.mark.long("processes, each where something is missing")

OWN = ["unshare", "--map-root-user", "--mount", "sh", "-ec"]
READ_ONLY = """
mount --bind "$1" "$1"
for folder in /tmp /var/tmp "$PWD"; do mount --bind $folder $folder; done
mount --bind "$1" "$1"
for folder in /tmp /var/tmp "$PWD"; do mount -o remount,ro,bind $folder; done
shift
exec "$@"
"""
SHARED_MEMORY = {"read-only": "mount -t tmpfs -o ro none /dev/shm",
                 "full": "mount -t tmpfs -o size=4k none /dev/shm; head -c 4096 /dev/zero > /dev/shm/full",
                 "missing": 'mkdir "$1/dev"; for file in null zero random urandom; do touch "$1/dev/$file"; '
                            'mount --bind /dev/$file "$1/dev/$file"; done; mount --rbind "$1/dev" /dev'}


def has_namespaces():
    try:
        return subprocess.run([*OWN, "mount -t tmpfs none /dev/shm"], check=False, capture_output=True).returncode == 0
    except OSError:
        return False


own = pytest.mark.skipif(not has_namespaces(), reason="this system gives no namespaces to its users")


def run(script, folder, *words):
    ways_out = ("TMPDIR", "TEMP", "TMP", "TORCHINDUCTOR_CACHE_DIR")             # the last is set by torch itself, here
    environment = {name: value for name, value in os.environ.items() if name not in ways_out}
    done = subprocess.run([*OWN, script, "sh", folder, sys.executable, *map(str, words)], cwd=ROOT, text=True,
                          capture_output=True, check=False, env=environment)
    assert "Traceback" not in done.stderr
    return done


@own
def test_without_a_folder_for_temporary_files_all_is_done(tmp_path, mitstates):
    picture(tmp_path / "images" / "a.jpg")
    write_model(tmp_path / "model.pth")
    assert run(READ_ONLY, tmp_path, "-c", "import tempfile\ntry: tempfile.gettempdir()\nexcept OSError: exit(7)"
               ).returncode == 7                                                # there is none
    for words, said in (
            (["search.py", "index", "--model_checkpoint", tmp_path / "model.pth", "--images", tmp_path / "images",
              "--out", tmp_path / "out"], "1 images"),
            (["search.py", "query", "--index", tmp_path / "out", "--image", tmp_path / "images" / "a.jpg",
              "--keep_query", "True"], "a.jpg"),
            (["data/check.py", "--dataset", "mitstates", "--dataset_path", mitstates], "nothing is wrong"),
            (["main.py", *flags("mitstates", mitstates, tmp_path / "logs", num_iters=1)], "test correct_composition")):
        done = run(READ_ONLY, tmp_path, *words)
        assert done.returncode == 0 and said in done.stdout, done.stderr
    done = run(READ_ONLY, tmp_path, "bert_server.py", "-model_dir", tmp_path / "none")
    assert done.returncode == 2 and len(done.stderr.splitlines()) < 4


@own
@pytest.mark.parametrize("how", some(SHARED_MEMORY))
def test_a_run_needs_no_shared_memory(tmp_path, mitstates, how):
    done = run(f"{SHARED_MEMORY[how]}; shift; exec \"$@\"", tmp_path, "main.py",
               *flags("mitstates", mitstates, tmp_path / "logs", num_iters=1))
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "logs").iterdir()
    assert list(folder.glob("events.out.tfevents.*")) and (folder / "metrics.json").is_file()


@pytest.mark.parametrize(("number", "said"), [
    (errno.ENOSPC, "No space left on device (error 28 of the system, in test_bare_machines.py line"),
    (errno.EMFILE, "raise ulimit -n"), (errno.EROFS, "may only be read"),
    (errno.EBADF, "Bad file descriptor (error 9")])
def test_an_error_that_names_no_file_is_not_printed_bare(number, said, capsys):
    def work(_stopping):
        raise OSError(number, os.strerror(number))
    assert ending("x.py", work) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("x.py: error: ") and said in line and "[Errno" not in line


def test_an_error_that_says_what_it_is_about_stays_as_it_is():
    assert in_words(OSError("this system has no file locks")) == "this system has no file locks"
    assert in_words(OSError(errno.ENOSPC, "full", "/x")) == "[Errno 28] full: '/x'"
