"""What Linux has and others lack is taken away: a Mac's ways are tried here, though not on a Mac."""

import importlib.util
import math
import os
import signal
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

import numpy as np
import pytest
import torch

import bench
from machine import device, image_store, processes, stopping
from machine.errors import InputError
from training import checkpoint

from .conftest import flags, picture
from .services import ROOT

MAC = """
import os, signal, sys
for name in ("sched_getaffinity", "sched_setaffinity"):
    delattr(os, name)
del signal.SIGUSR1, os.sysconf_names["SC_AVPHYS_PAGES"]
sysconf = os.sysconf
def macs(name):
    if name == "SC_AVPHYS_PAGES":
        raise ValueError("unrecognized configuration name")
    return sysconf(name)
os.sysconf = macs
asked = []
def absent(event, words):
    hidden = event == "open" and isinstance(words[0], str) and words[0].startswith(("/proc/", "/sys/"))
    if hidden and words[0] != "/proc/self/maps":  # threadpoolctl's, which does otherwise on a Mac
        asked.append(words[0])
        raise FileNotFoundError(2, "No such file or directory", words[0])
sys.addaudithook(absent)
import main
code = main.main(sys.argv[1:])
assert any("cgroup" in name for name in asked), asked
sys.exit(code)
"""


def anew(module):
    """The module as it is loaded on the machine that a test has made of this one."""
    spec = importlib.util.spec_from_file_location(f"{module.__name__}_anew", module.__file__)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.mark.long("a process")
def test_a_run_needs_nothing_that_a_mac_lacks(mitstates, tmp_path):
    words = flags("mitstates", mitstates, tmp_path / "logs", num_iters=1, image_cache="device")
    alone = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}  # else none counts cores
    done = subprocess.run([sys.executable, "-c", MAC, *words], cwd=ROOT, capture_output=True, text=True, check=False,
                          env=alone)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert list(tmp_path.glob("logs/*/latest_checkpoint.pth"))


def test_cores_are_the_machines_where_there_is_no_affinity(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert device.usable_cores(tmp_path / "none") == 7
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert device.usable_cores(tmp_path / "none") == 1


def test_free_memory_is_half_of_all_where_no_more_is_told(monkeypatch):
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    asked, sysconf = [], os.sysconf

    def macs(name):
        asked.append(name)
        if name == "SC_AVPHYS_PAGES":
            raise ValueError("unrecognized configuration name")
        return sysconf(name)
    monkeypatch.setattr(os, "sysconf", macs)
    monkeypatch.setattr(device, "Path", lambda path: Path("/nowhere" + path))
    assert device.free_memory(torch.device("cpu")) == whole // 2 and "SC_AVPHYS_PAGES" in asked


def test_without_file_locks_each_image_is_decoded_anew(tmp_path, monkeypatch, caplog):
    picture(tmp_path / "a" / "0.jpg")
    monkeypatch.setitem(sys.modules, "fcntl", None)                             # its import fails
    store = anew(image_store).ImageStore([str(tmp_path / "a" / "0.jpg")], 32, tmp_path / "cache")
    assert np.array_equal(store.batch([0]).permute(0, 2, 3, 1)[0], image_store.decode(store.paths[0], 32))
    assert "no file locks" in caplog.text and not list(tmp_path.glob("cache/*"))


def test_without_sigusr1_the_other_signals_are_heard(monkeypatch):
    monkeypatch.delattr(signal, "SIGUSR1")
    here = anew(stopping)
    assert here.EXIT_CODES == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
    with pytest.raises(here.Stopped, match="SIGTERM"), here.Stopping():
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_launch_has_its_name_without_proc(monkeypatch):
    monkeypatch.setattr(processes, "launched", lambda: True)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    name = processes.launch()
    assert name.split()[0] == str(os.getppid()) and len(name.split()) == 2
    monkeypatch.setattr(processes, "Path", lambda path: Path("/nowhere" + path))
    assert processes.launch().split() == [str(os.getppid())]


def test_the_benchmark_leaves_out_what_is_not_told(tmp_path, monkeypatch):
    with bench.peak_memory(bench.CPU) as peak:
        held = np.ones(10**7)                                                   # 80 MB
        assert peak() > 70 and held.all()
    assert bench.sent() >= 0
    monkeypatch.setattr(bench, "PROC", tmp_path)
    monkeypatch.delattr(os, "sched_setaffinity")
    with bench.peak_memory(bench.CPU) as peak:
        assert math.isnan(peak())
    assert math.isnan(bench.sent()) and bench.scaling_rows(tmp_path, 4, 32, 1) == []


def test_a_row_that_is_not_measured_is_not_shown(monkeypatch, capsys):
    rows = [bench.row("a step", 2.0, 1.0, 1.5), bench.row("its memory", math.nan, 1.0, 1.5, "MB")]
    monkeypatch.setattr(bench, "cpu_rows", lambda folder, quick: rows)
    assert bench.run([]) == 0
    shown = capsys.readouterr().out
    assert "a step" in shown and "its memory" not in shown and "1 rows" in shown


def test_windows_is_told_of_wsl_in_one_line(monkeypatch, capsys):
    with monkeypatch.context() as windows:
        windows.setattr(stopping.os, "name", "nt")
        with pytest.raises(SystemExit) as end:
            stopping.starting(ArgumentParser("main.py"))
    said = capsys.readouterr().err
    assert end.value.code == 2 and "WSL" in said and said.count("\n") == 1


# A Mac's GPU, as far as it can be tried without one

MPS = torch.device("mps")


@pytest.fixture
def macs_gpu(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)


def test_a_macs_gpu_is_taken_by_one_process_and_by_no_several(macs_gpu):
    assert device.choose_device("auto") == device.choose_device("mps") == MPS
    assert device.choose_device("auto", 0) == torch.device("cpu")               # torchrun's: Gloo knows no MPS
    with pytest.raises(InputError, match="one process alone"):
        device.choose_device("mps", 1)


def test_a_macs_gpu_has_its_random_numbers_kept(monkeypatch):
    held = [torch.arange(5, dtype=torch.uint8)]
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: held[0])
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda state: held.__setitem__(0, state))
    states = checkpoint.random_states(MPS)
    assert torch.equal(states["cpu"], torch.get_rng_state()) and torch.equal(states["mps"][0], held[0])
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    held[0] = torch.zeros(5, dtype=torch.uint8)
    kept = {"random": states, "optimizer_state_dict": optimizer.state_dict(), "progress": {}}
    checkpoint.resume(kept, optimizer, MPS)
    assert torch.equal(held[0], torch.arange(5, dtype=torch.uint8))
    del states["mps"]                                                           # of a run on another device
    checkpoint.resume(kept, optimizer, MPS)
    assert "mps" not in checkpoint.random_states(torch.device("cpu"))


def test_a_macs_gpu_is_among_what_torch_can_do():
    """What the training asks of any device: the fused optimizer, and bfloat16 inside autocast."""
    from torch.utils._foreach_utils import _get_fused_kernels_supported_devices
    assert "mps" in _get_fused_kernels_supported_devices()
    assert torch.amp.is_autocast_available("mps")
    assert torch.autocast("mps", torch.bfloat16, enabled=False).device == "mps"
