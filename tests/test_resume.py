"""Runs that are killed, stopped, out of disk or diverging: what is left, and that going on gives the same run."""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import main
from img_text_composition_models import OF_TRIPLETS
from machine.errors import InputError
from machine.stopping import Stopped, Stopping, ending
from torch_function import LOSSES
from training import checkpoint, loop
from training.writers import tag

from .conftest import Run, flags, run_main, some

ROOT = Path(main.__file__).parent


def weights(path):
    return torch.load(path, weights_only=True)["model_state_dict"]


def logged(run):
    return {name: points for name, points in run.scalars().items() if not name.endswith("per_second")}


def assert_same_run(found, expected):
    """Bit for bit: weights of both checkpoints, every logged loss and recall, each step once, and metrics.json."""
    for name in (checkpoint.LATEST, checkpoint.BEST):
        ours, theirs = weights(found.folder / name), weights(expected.folder / name)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert logged(found) == logged(expected)
    assert (found.folder / "metrics.json").read_bytes() == (expected.folder / "metrics.json").read_bytes()


def start(words, **how):
    return subprocess.Popen([sys.executable, "main.py", *words], cwd=ROOT, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True, **how)


def wait_for(condition, process, seconds=240):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.01)


def saved_at(log_dir):
    """The iteration of the one run's latest checkpoint, 0 before the first."""
    return max((checkpoint.load(path)["it"] for path in log_dir.glob(f"*/{checkpoint.LATEST}")), default=0)


def stamps(log_dir):
    """What changes with each checkpoint."""
    return [path.stat().st_mtime_ns for path in log_dir.glob(f"*/{checkpoint.LATEST}")]


KINDS = [("composeAE", "soft_triplet"), *(("composeAE", loss) for loss in LOSSES if loss != "soft_triplet"),
         *((model, "batch_based_classification") for model in OF_TRIPLETS if model != "composeAE")]  # each, no pair


@pytest.mark.long("five runs")
@pytest.mark.parametrize(("model", "loss"), some(KINDS, 2, mark=pytest.mark.rare))
def test_a_run_in_three_parts_is_the_run_in_one(mitstates, tmp_path, model, loss):
    """Parts end inside epochs of 2 steps, between logs of 3, on a rate's decay, and where a test had been made."""
    settings = {"model": model, "loss": loss, "learning_rate_decay_frequency": 5, "log_frequency": 3,
                "eval_frequency": 2, "image_cache": "none"}
    whole = run_main("mitstates", mitstates, tmp_path / "whole", num_iters=11, **settings)
    for stop, workers in ((1, 0), (5, 2), (11, 0), (11, 0)):                    # the last has nothing left to do
        words = flags("mitstates", mitstates, tmp_path / "parts", num_iters=11, resume="auto", save_frequency=1,
                      **settings | {"loader_num_workers": workers})
        assert stopped_after(stop, words) == (0 if stop == 11 else 143)
    (folder,) = (tmp_path / "parts").iterdir()
    assert_same_run(Run(folder), whole)


def stopped_after(it, words, number=signal.SIGTERM):
    """main(words), which is sent a signal within its step number `it`, a run's last step excepted."""
    def step(run, batch, bar):
        original(run, batch, bar)
        if run.it == it < run.args.num_iters:
            os.kill(os.getpid(), number)
    original = loop.Training.step
    loop.Training.step = step
    try:
        return main.main(words)
    finally:
        loop.Training.step = original


@pytest.mark.long("three processes")
def test_a_killed_run_goes_on_as_if_it_had_not_been(mitstates, tmp_path):
    settings = {"num_iters": 24, "save_frequency": 4, "eval_frequency": 3, "loader_num_workers": 2}
    whole = run_main("mitstates", mitstates, tmp_path / "whole", **settings)
    words = flags("mitstates", mitstates, tmp_path / "parts", **settings, resume="auto")
    rng = random.Random(0)
    for _ in range(2):
        before = stamps(tmp_path / "parts")
        process = start(words)
        wait_for(lambda before=before: stamps(tmp_path / "parts") != before, process)
        time.sleep(rng.random() * 0.2)                                          # anywhere in the steps that follow
        process.kill()
        process.communicate()
    assert main.main(words) == 0
    (folder,) = (tmp_path / "parts").iterdir()
    assert_same_run(Run(folder), whole)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 143)])
def test_signals_finish_the_step_save_and_say_how_to_go_on(mitstates, tmp_path, capsys, number, code):
    words = flags("mitstates", mitstates, tmp_path / "logs", num_iters=100_000)
    assert stopped_after(4, words, number) == code
    said = capsys.readouterr().err.splitlines()[-1]
    (folder,) = (tmp_path / "logs").iterdir()
    assert saved_at(tmp_path / "logs") == 4 and f"saved at iteration 4, go on with --resume '{folder}'" in said
    assert not list(folder.glob("*.unfinished"))


@pytest.mark.long("a process")
def test_a_process_that_is_told_to_stop_saves_and_ends_with_the_signals_code(mitstates, tmp_path):
    process = start(flags("mitstates", mitstates, tmp_path / "logs", num_iters=100_000, save_frequency=1))
    wait_for(lambda: stamps(tmp_path / "logs"), process)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[1].splitlines()[-1]
    assert process.returncode == 143 and f"saved at iteration {saved_at(tmp_path / 'logs')}, go on" in said


def test_a_second_ctrl_c_ends_at_once_and_other_signals_wait():
    with Stopping() as stopping:
        reached = []
        with pytest.raises(Stopped, match="SIGTERM") as stop, stopping.held():
            for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
                os.kill(os.getpid(), number)
            reached.append("the end")
        assert reached == ["the end"] and stop.value.code == 143
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with Stopping(), pytest.raises(Stopped, match="Ctrl-C") as stop:
        os.kill(os.getpid(), signal.SIGINT)
    assert stop.value.code == 130


@pytest.mark.parametrize("saving", [False, True])
def test_a_stop_that_tears_something_apart_is_one_line_but_not_a_fault_of_saving(saving, capsys):
    class Fragile:
        def __enter__(self):
            pass

        def __exit__(self, *_):
            raise AssertionError("torn apart")

    def work(stopping):
        if saving:
            stopping.ending()
        with Fragile():
            os.kill(os.getpid(), signal.SIGTERM)
    if saving:
        with pytest.raises(AssertionError):
            ending("x.py", work)
    else:
        assert ending("x.py", work) == 143
        assert capsys.readouterr().err == "x.py: stopped by SIGTERM\n"


@pytest.mark.long("processes that load torch")
def test_a_stop_before_training_is_one_line(mitstates, tmp_path):
    """While it loads torch, and while it waits for a service that is not there."""
    for reached in (lambda: None, (tmp_path / "logs").exists):
        process = start(flags("mitstates", mitstates, tmp_path / "logs", use_bert=True, bert_port=1, bert_timeout=600))
        wait_for(lambda process=process, reached=reached: ready_to_stop(process) and reached() is not False, process)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=120)[1]
        assert said == "main.py: stopped by SIGTERM\n" and process.returncode == 143


def ready_to_stop(process):
    """Whether the process has handlers for SIGTERM, by the kernel's word."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return int(caught, 16) >> (signal.SIGTERM - 1) & 1


@pytest.mark.long("three runs")
def test_auto_takes_the_newest_run_of_the_same_comment_and_else_begins(mitstates, tmp_path, capsys):
    log_dir = tmp_path / "logs"
    for comment in ("_a", "_b_a", "_a[1]"):
        run_main("mitstates", mitstates, log_dir, comment=comment, num_iters=1, resume="auto")
    first = next(folder for folder in log_dir.iterdir() if folder.name.endswith("_a[1]"))
    before = set(log_dir.iterdir())
    assert len(before) == 3
    assert main.main(flags("mitstates", mitstates, log_dir, comment="_a[1]", num_iters=2, resume="auto")) == 0
    assert set(log_dir.iterdir()) == before and checkpoint.load(first / checkpoint.LATEST)["it"] == 2
    assert main.main(flags("mitstates", mitstates, log_dir, comment="_c", num_iters=3, resume=first)) == 0
    assert checkpoint.load(first / checkpoint.LATEST)["it"] == 3
    assert "going on after iteration 2" in capsys.readouterr().out
    assert main.main(flags("mitstates", mitstates, log_dir, num_iters=3, resume=first / checkpoint.LATEST)) == 0


def test_a_run_goes_on_only_as_the_same_run(mitstates, tmp_path, capsys):
    run = run_main("mitstates", mitstates, tmp_path / "logs", num_iters=2)
    content = run.checkpoint.read_bytes()
    capsys.readouterr()

    def refused(**changes):
        assert main.main(flags("mitstates", mitstates, tmp_path / "logs", resume=run.folder, **changes)) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line
    line = refused(learning_rate=0.5, seed=3)
    assert "--learning_rate 0.0001 (now 0.5), --seed 0 (now 3)" in line and "--model_checkpoint" in line
    assert "--model composeAE (now tirg)" in refused(model="tirg")
    assert "--any_suffix False (now True)" in refused(any_suffix=True)
    assert "--precision fp32 (now bf16)" in refused(precision="bf16")
    state = torch.load(run.checkpoint, weights_only=True)
    for name in ("precision", "compile", "any_suffix"):                         # of a version without these flags
        del state["opt"][name]
    torch.save(state, run.checkpoint)
    assert "--precision fp32 (now bf16)" in refused(precision="bf16")
    checkpoint.check_same_run(checkpoint.load(run.checkpoint), run.checkpoint, {
        **state["opt"], "precision": "fp32", "compile": False, "any_suffix": False}, 10, None)
    run.checkpoint.write_bytes(content)
    (mitstates / "images" / "wet dog" / "0.jpg").unlink()
    assert "10 training samples (now 9)" in refused()
    (mitstates / "images" / "wet dog" / "1.jpg").rename(mitstates / "images" / "wet dog" / "0.jpg")
    assert run.checkpoint.read_bytes() == content


def about_cosines(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if "another cosine" in line]


@pytest.mark.long("several runs")
def test_a_cosine_that_ends_elsewhere_says_both_rates(mitstates, tmp_path, capsys):
    run = run_main("mitstates", mitstates, tmp_path / "logs", num_iters=2, schedule="cosine")

    def said(num_iters):
        assert main.main(flags("mitstates", mitstates, tmp_path / "logs", num_iters=num_iters, schedule="cosine",
                               resume=run.folder)) == 0
        return about_cosines(capsys)
    assert said(4) == ["note: --num_iters 4 (before: 2) has another cosine: after iteration 2 the learning rate is "
                       "5e-05 instead of 0"]
    assert [rate for _, rate in run.scalars()[tag("learning_rate")]] == pytest.approx(
        [5e-5, 0, 1e-4 * (1 - 0.5**0.5) / 2, 0], rel=1e-6, abs=1e-12)
    assert said(4) == said(3) == []                                             # nothing is left to do
    assert len(said(8)) == 1 and said(8) == []                                  # by then it is the run's own


@pytest.mark.long("several runs")
def test_a_cosine_cut_shorter_says_both_rates_too_and_one_that_was_stopped_says_none(mitstates, tmp_path, capsys):
    def words(num_iters):
        return flags("mitstates", mitstates, tmp_path, num_iters=num_iters, schedule="cosine", resume="auto")
    assert stopped_after(2, words(8)) == stopped_after(4, words(8)) == 143
    assert about_cosines(capsys) == []
    assert main.main(words(6)) == 0
    (line,) = about_cosines(capsys)
    assert line.endswith("after iteration 4 the learning rate is 2.5e-05 instead of 5e-05")  # cosine of 120, of 90


@pytest.mark.long("two runs")
def test_a_rate_that_falls_in_steps_goes_on_as_it_was(mitstates, tmp_path, capsys):
    words = {"warmup": 3, "learning_rate_decay_frequency": 3}
    run = run_main("mitstates", mitstates, tmp_path / "logs", num_iters=2, **words)
    assert main.main(flags("mitstates", mitstates, tmp_path / "logs", num_iters=4, resume=run.folder, **words)) == 0
    assert "instead of" not in capsys.readouterr().err
    assert [rate for _, rate in run.scalars()[tag("learning_rate")]] == pytest.approx([5e-5, 7.5e-5, 1e-5, 1e-5])


def test_checkpoints_without_a_run_to_go_on_with(mitstates, tmp_path, capsys):
    run = run_main("mitstates", mitstates, tmp_path / "logs", num_iters=1)
    state = torch.load(run.checkpoint, weights_only=True)
    capsys.readouterr()
    for change, said in (({"progress": None}, "does not say how"), ({"progress": {"it": 1}}, "not a checkpoint"),
                         ({"optimizer_state_dict": {}}, "do not fit"), ({"random": {}}, "do not fit")):
        torch.save({**state, **change}, tmp_path / "x.pth")
        assert main.main(flags("mitstates", mitstates, tmp_path / "logs", resume=tmp_path / "x.pth")) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
    assert main.main(flags("mitstates", mitstates, tmp_path / "logs", resume=tmp_path / "none")) == 2
    assert "checkpoint not found" in capsys.readouterr().err


@pytest.mark.long("eight tests")
def test_the_best_checkpoint_is_of_the_best_test(mitstates, tmp_path, capsys):
    metric = "recall_top1_correct_noun"
    run = run_main("mitstates", mitstates, tmp_path / "logs", num_iters=8, eval_frequency=1, best_metric=metric)
    scores = run.scalars()[tag(f"test {metric}")]
    best = max(score for _, score in scores)
    state = checkpoint.load(run.folder / checkpoint.BEST)
    assert state["it"] == next(step for step, score in scores if score == best)
    assert state["progress"]["best"] == pytest.approx(best)
    tested = run_main("mitstates", mitstates, tmp_path / "logs", comment="_t", test_only=True,
                      model_checkpoint=run.folder / checkpoint.BEST)
    assert tested.metrics["test"][metric] == pytest.approx(best)
    assert main.main(flags("mitstates", mitstates, tmp_path / "logs", best_metric="recall")) == 2
    assert "choose one of recall_top1_correct_composition" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0", "-1", "10s", "m", "1.5", "", "1e3"])
def test_save_frequency_is_iterations_or_minutes(text, mitstates, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main.main(flags("mitstates", mitstates, tmp_path, save_frequency=text))
    assert "500" in capsys.readouterr().err
    assert [checkpoint.Schedule("3").due(it) for it in range(1, 7)] == [False, False, True] * 2
    now = checkpoint.Schedule("10m")
    assert not now.due(1)
    now.last -= 601
    assert now.due(2) and not now.due(3)


@pytest.mark.long("processes")
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stands(mitstates, tmp_path):
    """A limit on the size of files stands for the full disk."""
    run = run_main("mitstates", mitstates, tmp_path / "logs", num_iters=2)
    content = run.checkpoint.read_bytes()

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))
    process = start(flags("mitstates", mitstates, tmp_path / "logs", num_iters=50, save_frequency=5, resume="auto"),
                    preexec_fn=limit)
    said = process.communicate(timeout=240)[1].splitlines()
    assert process.returncode == 2 and not any("Traceback" in line for line in said)
    assert said[-1].startswith("main.py: error: cannot write a checkpoint") and "is whole" in said[-1]
    assert run.checkpoint.read_bytes() == content and not list(run.folder.glob("*.unfinished"))


@pytest.mark.long("a process")
def test_a_log_that_cannot_be_written_is_one_line(mitstates, tmp_path):
    """Events go beyond the limit before any checkpoint does: the run must neither hang nor go on without a log."""
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
    words = flags("mitstates", mitstates, tmp_path / "logs", num_iters=200, image_cache="none")
    process = start(words, preexec_fn=limit)
    said = process.communicate(timeout=240)[1]
    assert process.returncode == 2 and "Traceback" not in said and "main.py: error:" in said.splitlines()[-1]


def test_nothing_that_is_not_finite_is_saved(mitstates, tmp_path, capsys):
    run = run_main("mitstates", mitstates, tmp_path / "logs", num_iters=2)
    state = torch.load(run.checkpoint, weights_only=True)
    for held in state["optimizer_state_dict"]["state"].values():                # so the next step's weights are none
        held["momentum_buffer"][:] = torch.inf
    torch.save(state, run.checkpoint)
    content = run.checkpoint.read_bytes()
    assert main.main(flags("mitstates", mitstates, tmp_path / "logs", num_iters=20, save_frequency=1, resume="auto",
                           log_frequency=1000)) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "not finite" in line and "--learning_rate" in line
    assert run.checkpoint.read_bytes() == content


def test_a_checkpoint_cut_short_anywhere_is_refused(mitstates, tmp_path, capsys):
    run = run_main("mitstates", mitstates, tmp_path / "logs", num_iters=1)
    content = run.checkpoint.read_bytes()
    for length in [0, 1, 100, *range(4096, len(content), len(content) // 40), len(content) - 1]:
        (tmp_path / "cut.pth").write_bytes(content[:length])
        with pytest.raises(InputError, match="not a readable checkpoint"):
            checkpoint.load(tmp_path / "cut.pth")


@pytest.mark.long("a process")
def test_a_bad_image_met_in_training_saves_first(mitstates, tmp_path):
    words = flags("mitstates", mitstates, tmp_path / "logs", num_iters=100_000, image_cache="none", save_frequency=1)
    process = start(words)
    wait_for(lambda: stamps(tmp_path / "logs"), process)
    for image in (mitstates / "images" / "old dog").iterdir():
        image.write_bytes(b"broken")
    said = process.communicate(timeout=240)[1].splitlines()[-1]
    assert process.returncode == 2 and "cannot read the image" in said and "--resume" in said
    it = saved_at(tmp_path / "logs")
    assert f"saved at iteration {it}" in said
