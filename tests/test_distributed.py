"""Several processes, started by torchrun as a user starts them: the same losses, gradients, samples and metrics as one
process has, and jobs that lose a process."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import main
from machine import distributed
from machine.device import usable_cores
from machine.errors import InputError
from training import checkpoint, loop

from . import together
from .conftest import WRITERS, Run, flags, run_main, some, write_mitstates
from .services import free_ports
from .test_resume import assert_same_run, saved_at, wait_for

pytestmark = pytest.mark.long("jobs of several processes")

ROOT = Path(main.__file__).parent


def torchrun(processes, *words, restarts=0):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
            f"--max-restarts={restarts}", *map(str, words)]


def run(*command, code=0):
    """What the program's own lines on standard error say."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert bool(done.returncode) == bool(code), done.stderr
    return [line for line in done.stderr.splitlines() if line.startswith("main.py:")]


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trees")
    for name, write in WRITERS.items():
        write(folder / name)
    return folder


@pytest.fixture(scope="module")
def alone(trees):
    return together.steps(trees)


def results(processes, trees, out):
    """What each process of a job found: {what: its result}."""
    run(*torchrun(processes, "-m", "tests.together", trees, out))
    return [torch.load(out / f"{rank}.pt", weights_only=False) for rank in range(processes)]


@pytest.fixture(scope="module")
def two(trees, tmp_path_factory):
    """What each of two processes found."""
    return results(2, trees, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module", params=some([2, 1, 4], mark=pytest.mark.rare))
def found(request, trees, tmp_path_factory):
    """What each of one, two and four processes found."""
    if request.param == 2:
        return request.getfixturevalue("two")
    return results(request.param, trees, tmp_path_factory.mktemp("found"))


def test_the_machines_cores_are_shared(found):
    alone = len(found) == 1                                                     # then it is as the user says: 1, here
    assert [each["threads"] for each in found] == [1 if alone else max(1, usable_cores() // len(found))] * len(found)


def assert_same_step(found, expected):
    for what in ("losses", "gradients", "weights"):
        assert found[what].keys() == expected[what].keys()
        for name, value in expected[what].items():
            torch.testing.assert_close(found[what][name], value, rtol=1e-7, atol=1e-12,
                                       msg=lambda message, name=name: f"{name}: {message}")


def test_losses_gradients_and_samples_are_those_of_one_process(alone, found):
    """For each composer and each loss, batch norm's statistics held fixed."""
    steps = [each["steps"] for each in found]
    samples = [sample for each in steps for sample in each["samples"]]
    assert [text for text, *_ in samples] == [text for text, *_ in alone["samples"]]
    for (_, *ours), (_, *theirs) in zip(samples, alone["samples"], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    for each in steps:
        sources = [source for _, source, _ in each["samples"]]
        assert len(sources) == 8 // len(found)
        assert all(torch.equal(a, b) for a, b in zip(sources[::2], sources[1::2], strict=True))     # pairs are whole
        for kind in together.KINDS:
            assert_same_step(each[kind], alone[kind])
    assert all(alone[kind]["gradients"]["img_model.features.0.0.weight"].norm() > 0 for kind in together.KINDS)


def halves(trees, kinds):
    """The mean over two half batches of what each gives by itself, of the loss that draws no random numbers."""
    split = together.open_split(trees, "mitstates", "train")
    found = {}
    for name, loss in kinds:
        parts = []
        for half in next(loop.batches(split, 5, 0, 8, 0, together.CPU, parts=2)):
            model = together.exact(together.a_model(name, split.data))
            optimizer = loop.make_optimizer(model, 0, 0)
            losses = loop.train_step(model, optimizer, loss, [half])
            parts.append((losses, {key: weight.grad for key, weight in model.named_parameters()}))
        found[name, loss] = [{key: (first[key] + second[key]) / 2 for key in first}
                             for first, second in zip(*parts, strict=True)]
    return found


def test_without_gather_each_process_has_its_own_negatives(trees, alone, two):
    expected = halves(trees, together.ONE)
    for each in (process["apart"] for process in two):
        for kind, (losses, gradients) in expected.items():
            assert_same_step({**each[kind], "weights": {}}, {"losses": losses, "gradients": gradients, "weights": {}})
            assert each[kind]["losses"]["total training loss"] < 0.9 * alone[kind]["losses"]["total training loss"]


def test_accumulated_parts_are_as_steps_of_their_own(trees, alone):
    expected, found = halves(trees, together.EACH), together.steps(trees, parts=2, kinds=together.EACH)
    assert [text for text, *_ in found["samples"]] == [text for text, *_ in alone["samples"]]
    for kind, (losses, gradients) in expected.items():
        assert_same_step({**found[kind], "weights": {}}, {"losses": losses, "gradients": gradients, "weights": {}})


def test_tests_give_exactly_one_processs_metrics_and_decode_each_image_once(trees, found, tmp_path):
    expected = together.tests(trees, tmp_path)
    for each in (process["tests"] for process in found):
        for key, value in expected.items():
            if key not in ("composed",) and key[-1] != "queries":
                assert each[key] == value, key
        for name in WRITERS:
            for mine, theirs in zip(each[name, "test", "queries"], expected[name, "test", "queries"], strict=True):
                assert torch.equal(mine, theirs)
        assert len(each["decoded"]) == len(set(each["decoded"]))
        assert sum(each["composed"]) == expected["composed"][0] and min(each["composed"]) > 0


def test_a_trained_model_is_tested_by_several_as_by_one(mitstates, tmp_path):
    """Through the program, where the batch size need not suit the processes."""
    trained = run_main("mitstates", mitstates, tmp_path / "one", num_iters=2)
    how = {"test_only": True, "model_checkpoint": trained.checkpoint, "test_batch_size": 3}
    words = flags("mitstates", mitstates, tmp_path / "two", batch_size=5, **how)
    one = run_main("mitstates", mitstates, tmp_path / "three", **how)
    run(*torchrun(2, "main.py", *words))
    assert only_run(tmp_path / "two").metrics == one.metrics


def test_several_processes_train_on_sentence_vectors(fashion200k, tmp_path, minilm):
    """Of modifications, which are new in each epoch, kept in one file; nothing trains the LSTM."""
    words = flags("fashion200k", fashion200k, tmp_path / "logs", **minilm.flags, num_iters=3, batch_size=8,
                  learn_words=True)
    run(*torchrun(2, "main.py", *words))
    found = only_run(tmp_path / "logs")
    assert found.metrics["it"] == 3 and len(list((fashion200k / "image_cache").glob("sentences_*.sqlite"))) == 1
    trained = checkpoint.load(found.checkpoint)["optimizer_state_dict"]["state"]
    names = [name for name, _ in checkpoint.rebuild_model(found.checkpoint, lambda texts: None).named_parameters()]
    assert len(trained) == sum(not name.startswith("text_model.") for name in names)
    assert "learned_words.filters.weight" in names


@pytest.mark.parametrize(("features", "head"), [("last", "img_model.classifier.3."), ("stages", "img_model.fc.")])
def test_several_processes_train_on_features_and_encode_each_image_once(features, head, mitstates, tmp_path):
    """Filled by both, then found by one that trains alone; nobody moves the frozen layers."""
    frozen = {"freeze_image_encoder": True, "num_iters": 2, "batch_size": 8, "image_features": features}
    run(*torchrun(2, "main.py", *flags("mitstates", mitstates, tmp_path / "two", **frozen)))
    shared, cache = only_run(tmp_path / "two"), mitstates / "image_cache"
    kept = {file: file.read_bytes() for file in cache.glob("features_*.features")}
    assert len(kept) == 1
    alone = run_main("mitstates", mitstates, tmp_path / "one", **frozen)
    assert {file: file.read_bytes() for file in cache.glob("features_*.features")} == kept
    weights = [checkpoint.load(each.checkpoint)["model_state_dict"] for each in (shared, alone)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items()
               if name.startswith("img_model.") and not name.startswith(head))
    assert shared.metrics["it"] == 2 and not torch.equal(*(each[f"{head}0.weight"] for each in weights))


def test_what_does_not_fall_into_equal_shares_is_refused(monkeypatch):
    monkeypatch.setattr(distributed, "world", lambda: 4)
    loop.check_shares(32, 1, 2)
    loop.check_shares(32, 4, 2)
    loop.check_shares(12, 1, 1)
    for batch, parts, group, fits in ((32, 3, 2, 24), (36, 2, 2, 32), (4, 1, 1, 8), (30, 1, 2, 24)):
        with pytest.raises(InputError, match=f"pass {fits} or"):
            loop.check_shares(batch, parts, group)
    monkeypatch.setattr(distributed, "world", lambda: 1)
    loop.check_shares(33, 1, 2)                                                 # as ever


def workers(process):
    """{rank: process id} of a job's processes."""
    found = {}
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        try:
            environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        found |= {int(entry[5:]): int(child) for entry in environment if entry.startswith(b"RANK=")}
    return found


# Two of MIT-States' pairs a process: one alone has one source image, twice, in which batch norm finds no variance, and
# what is divided by nearly nothing, layer after layer, is no training.
SETTINGS = {"num_iters": 24, "batch_size": 8, "save_frequency": 4, "eval_frequency": 7, "loader_num_workers": 2}


def start(command, **how):
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **how)


def only_run(log_dir):
    (folder,) = log_dir.iterdir()
    return Run(folder)


@pytest.mark.rare("three jobs' starts")
def test_a_job_that_loses_a_process_starts_again_and_ends_as_if_it_had_not(mitstates, tmp_path):
    """kill -9 of each process in turn; dropout is on, and batch norm each process's own."""
    run(*torchrun(2, "main.py", *flags("mitstates", mitstates, tmp_path / "whole", **SETTINGS)))
    words = flags("mitstates", mitstates, tmp_path / "killed", **SETTINGS)
    job = start(torchrun(2, "main.py", *words, restarts=2))
    for rank, it in ((1, 4), (0, 12)):
        wait_for(lambda it=it: saved_at(tmp_path / "killed") >= it, job)
        os.kill(workers(job)[rank], signal.SIGKILL)
    said = job.communicate(timeout=600)[1]
    assert job.returncode == 0, said
    assert_same_run(only_run(tmp_path / "killed"), only_run(tmp_path / "whole"))


@pytest.mark.rare("two jobs' starts, twice")
def test_two_machines_find_together_again(mitstates, tmp_path):
    """Two torchruns as on two machines, of which one loses its process: their counts of restarts then differ."""
    endpoint = f"127.0.0.1:{free_ports(1)[0]}"
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--max-restarts=1",
               "--rdzv_backend=c10d", "--rdzv_id=two", f"--rdzv_endpoint={endpoint}", "main.py",
               *flags("mitstates", mitstates, tmp_path / "logs", **SETTINGS)]
    machines = [start(command, env={**os.environ, "OMP_NUM_THREADS": "1"}) for _ in range(2)]
    wait_for(lambda: saved_at(tmp_path / "logs") >= 4, machines[0])
    (lost,) = [found[0] for found in map(workers, machines) if 0 in found]
    os.kill(lost, signal.SIGKILL)
    said = [machine.communicate(timeout=600)[1] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    found = only_run(tmp_path / "logs")
    assert found.metrics["it"] == 24
    assert [step for step, _ in found.scalars()["loss/soft_triplet"]] == list(range(1, 25))


@pytest.mark.rare("three jobs")
def test_a_run_goes_on_with_more_and_with_fewer_processes(tmp_path):
    path = write_mitstates(tmp_path / "data", images=6)
    settings = {**SETTINGS, "model": "tirg", "batch_size": 16, "eval_frequency": 0, "resume": "auto"}
    for processes, num_iters in ((2, 3), (4, 6), (1, 9)):
        words = flags("mitstates", path, tmp_path / "logs", **settings | {"num_iters": num_iters})
        run(*torchrun(processes, "main.py", *words))
    found = only_run(tmp_path / "logs")
    assert found.metrics["it"] == 9
    assert [step for step, _ in found.scalars()["loss/soft_triplet"]] == list(range(1, 10))


def test_a_lost_process_ends_the_job_with_its_reason(mitstates, tmp_path):
    job = start(torchrun(2, "main.py", *flags("mitstates", mitstates, tmp_path / "logs", **SETTINGS | {
        "num_iters": 100_000})))
    wait_for(lambda: saved_at(tmp_path / "logs") >= 4, job)
    lost = workers(job)[1]
    os.kill(lost, signal.SIGKILL)
    said = job.communicate(timeout=600)[1]
    assert job.returncode != 0
    assert f"Signal 9 (SIGKILL) received by PID {lost}" in said
    # the other finds its connection broken, or torchrun, which ends it then, is quicker
    assert re.search("main.py: (error: another process of the job ended|stopped by SIGTERM)", said), said
    assert checkpoint.load(next((tmp_path / "logs").iterdir()) / checkpoint.LATEST)["it"] >= 4


def test_asked_to_stop_all_stop_in_one_step_and_one_saves(mitstates, tmp_path):
    words = flags("mitstates", mitstates, tmp_path / "logs", **SETTINGS | {"num_iters": 100_000})
    job = start(torchrun(2, "main.py", *words))
    wait_for(lambda: saved_at(tmp_path / "logs") >= 4, job)
    job.send_signal(signal.SIGTERM)
    said = job.communicate(timeout=600)[1]
    lines = [line for line in said.splitlines() if line.startswith("main.py:")]
    assert len(lines) == 1 and re.fullmatch(r"main.py: .*; saved at iteration (\d+), go on with --resume .*", lines[0])
    assert f"saved at iteration {saved_at(tmp_path / 'logs')}," in lines[0]


def test_bad_input_is_said_once(mitstates, tmp_path):
    words = flags("mitstates", mitstates, tmp_path / "logs", image_cache="none")
    assert len(run(*torchrun(2, "main.py", *words, "--loss=none"), code=2)) == 1
    assert len(run(*torchrun(2, "main.py", *words, "--batch_size=6", "--gather=False"), code=2)) == 1
    (tmp_path / "empty").mkdir()
    assert len(run(*torchrun(2, "main.py", *words, f"--dataset_path={tmp_path / 'empty'}"), code=2)) == 1


def test_a_broken_image_ends_a_job_in_its_line_after_a_checkpoint(mitstates, tmp_path):
    (mitstates / "images" / "old dog" / "1.jpg").write_bytes(b"no image")
    words = flags("mitstates", mitstates, tmp_path / "logs", image_cache="none", num_iters=100, eval_frequency=0)
    lines = run(*torchrun(2, "main.py", *words), code=2)
    assert sum("cannot read the image" in line for line in lines) == 1 and len(lines) <= 2
    assert sum("saved at iteration" in line for line in lines) == 1
    assert checkpoint.load(next((tmp_path / "logs").iterdir()) / checkpoint.LATEST)["it"] >= 0
    lines = run(*torchrun(2, "main.py", *words, "--skip_bad_images", "--num_iters=2", "--comment=_s"))
    assert lines == []
