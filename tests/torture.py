"""make torture: what takes too long for the test suite. Prints one line of figures; exit code 1 unless all is well.

Kills of a training at random moments, each resumed, until every composer and loss has ended as if it had not been
killed; a checkpoint cut at every 4 KiB; and bad inputs, by hand and by hypothesis.
"""

import contextlib
import io
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from PIL import Image
from tqdm import tqdm

import main
from datasets import DATASETS
from img_text_composition_models import OF_TRIPLETS
from machine.errors import InputError
from machine.image_store import ImageStore
from torch_function import LOSSES
from training import checkpoint

from .conftest import WRITERS, Run, flags, run_main, write_fashion200k, write_fashion_iq, write_mitstates
from .test_bad_input import CASES
from .test_resume import ROOT, assert_same_run, stamps

KILLS_EACH = 9                          # of 6 runs
HANG = 120                              # seconds


def kill_and_resume(folder: Path, rng: random.Random) -> tuple[int, int]:
    """(kills, runs that did not end as the undisturbed one)."""
    kills = different = 0
    data = write_mitstates(folder / "mitstates")
    for model, loss in ((model, loss) for model in OF_TRIPLETS for loss in LOSSES):
        how = {"model": model, "loss": loss, "num_iters": 90, "save_frequency": 4, "eval_frequency": 7,
               "log_frequency": 3, "learning_rate_decay_frequency": 40, "resume": "auto"}
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            whole = run_main("mitstates", data, folder / f"whole_{model}_{loss}", **how)
        log_dir = folder / f"killed_{model}_{loss}"
        for _ in tqdm(range(KILLS_EACH), desc=f"kills, {model}, {loss}"):
            before, begun = stamps(log_dir), time.monotonic()
            words = [sys.executable, "main.py", *flags("mitstates", data, log_dir, **how,
                                                       loader_num_workers=rng.choice([0, 2]))]
            process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            patience = rng.choice([0, 1])                                       # some before, most after a checkpoint
            while process.poll() is None and stamps(log_dir) == before and time.monotonic() < begun + HANG and patience:
                time.sleep(0.01)
            time.sleep(rng.random() * (0.4 if patience else 5))
            kills += process.poll() is None
            process.kill()
            process.wait()
        process = subprocess.run(words, cwd=ROOT, capture_output=True, check=False, timeout=HANG)
        try:
            assert process.returncode == 0
            (run,) = (path.parent for path in log_dir.glob(f"*/{checkpoint.LATEST}"))  # others were killed before one
            assert_same_run(Run(run), whole)
        except (AssertionError, ValueError) as error:
            different += 1
            tqdm.write(f"{model}, {loss}: {error!r} {process.stderr.decode()[-300:]}")
        for made in (log_dir, folder / f"whole_{model}_{loss}"):
            shutil.rmtree(made)
    return kills, different


def truncations(folder: Path) -> tuple[int, int]:
    """(cuts, cuts that were not refused in one sentence)."""
    path = folder / "small.pth"
    torch.save({"it": 1, "opt": {}, "model_state_dict": {f"w{i}": torch.randn(64, 64) for i in range(40)}}, path)
    content, wrong = path.read_bytes(), 0
    checkpoint.load(path)
    lengths = range(0, len(content), 4096)
    for length in lengths:
        path.write_bytes(content[:length])
        try:
            checkpoint.load(path)
            wrong += 1
        except InputError as error:
            wrong += "\n" in str(error)
    return len(lengths), wrong


class BadInputs:
    """Counts what is tried and how it ends; a sentence of ours or success is well."""

    def __init__(self):
        self.tried, self.ends = 0, Counter()

    def attempt(self, work) -> None:
        self.tried, start = self.tried + 1, time.monotonic()
        try:
            work()
        except InputError as error:
            self.ends["more than a line"] += "\n" in str(error)
        except Exception as error:
            self.ends["traceback"] += 1
            tqdm.write(f"{type(error).__name__}: {error}")
        self.ends["hang"] += time.monotonic() - start > HANG


def by_hand(bad: BadInputs, folder: Path) -> None:
    """The test suite's table, through main itself."""
    for number, (name, (dataset, change, changed, _)) in enumerate(tqdm(CASES.items(), desc="bad inputs by hand")):
        path = WRITERS[dataset](folder / str(number) / dataset)
        if change:
            change(path)
        kept = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} if path.is_dir() else {}
        error = io.StringIO()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(error):
            try:
                code = main.main(flags(dataset, path, folder / str(number) / "logs", **changed))
            except SystemExit as stop:
                code = stop.code
            except Exception:
                code = 1
        bad.tried += 1
        bad.ends["traceback"] += code != 2 or "Traceback" in error.getvalue()
        bad.ends["data lost"] += any(file.read_bytes() != content for file, content in kept.items())
        tqdm.write(f"{name}: exit code {code}") if code != 2 else None


def by_hypothesis(bad: BadInputs, folder: Path) -> None:
    """Label lines, JSON and image files that no one would write."""
    fashion, triplets = write_fashion200k(folder / "fashion200k"), write_fashion_iq(folder / "fashionIQ")
    labels, captions = fashion / "labels/dress_train_detect_all.txt", triplets / "captions/cap.dress.train.json"
    good_labels, good_captions = labels.read_bytes(), json.loads(captions.read_text())
    jpeg = (fashion / "women/train/0/0_0.jpeg").read_bytes()
    path = st.one_of(st.text(max_size=30), st.sampled_from(["../../etc/passwd", "/etc/passwd", "women/..", "a\0b"]))
    line = st.one_of(st.binary(max_size=60), st.text().map(lambda text: text.encode("utf-8", "surrogatepass")),
                     st.tuples(path, st.text(max_size=5), st.text(max_size=40)).map(
                         lambda fields: "\t".join(fields).encode("utf-8", "surrogatepass")))
    value = st.recursive(st.none() | st.booleans() | st.floats() | st.text(max_size=8) | st.integers(), lambda inner:
                         st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
                             ["candidate", "target", "captions", "x"]), inner, max_size=4), max_leaves=8)
    tried = settings(max_examples=120, deadline=None, database=None, suppress_health_check=list(HealthCheck))

    @seed(1)
    @tried
    @given(st.lists(line, min_size=1, max_size=4), st.sampled_from([b"\n", b"\r\n", b"\r"]))
    def label_lines(lines, end):
        labels.write_bytes(good_labels + end.join(lines))
        bad.attempt(lambda: DATASETS["fashion200k"](fashion, "train"))

    @seed(2)
    @tried
    @given(value, st.booleans(), st.integers(0, 200))
    def caption_files(entry, whole, cut):
        text = json.dumps(entry if whole else [*good_captions, entry]).encode()
        captions.write_bytes(text[:-cut] if 0 < cut < 100 else text)
        bad.attempt(lambda: DATASETS["fashionIQ"](triplets, "train").training_texts())

    @seed(3)
    @tried
    @given(st.integers(0, len(jpeg)), st.lists(st.tuples(st.integers(0, len(jpeg) - 1), st.integers(0, 255))))
    def images(length, changes):
        content = bytearray(jpeg)
        for place, byte in changes:
            content[place] = byte
        file = folder / "image.jpg"
        file.write_bytes(content[:length])
        bad.attempt(lambda: ImageStore([str(file)], 32).batch([0]))
    for work in tqdm((label_lines, caption_files, images), desc="bad inputs by hypothesis"):
        work()
    endless = b"women/" + b"x" * 10_000_000 + b"\t1\tred dress\n"
    for content in (endless, b"women/x.jpeg\t1\t" + b"red " * 2_500_000 + b"\n", b"\0" * 10_000_000):
        labels.write_bytes(good_labels + content)
        bad.attempt(lambda: DATASETS["fashion200k"](fashion, "train"))
    for mode, ending in [("CMYK", "jpg"), ("I;16", "png"), ("P", "png"), ("LA", "png"), ("1", "png"), ("F", "tiff"),
                         ("RGBA", "webp"), ("L", "gif"), ("RGB", "bmp")]:
        file = folder / f"{mode.replace(';', '')}.{ending}"
        Image.new(mode, (50, 40)).save(file)
        shutil.move(file, folder / "named.jpg")                                 # misnamed, too
        bad.attempt(lambda: ImageStore([str(folder / "named.jpg")], 32).batch([0]))
    Image.new("1", (30_000, 30_000)).save(folder / "bomb.png")
    bad.attempt(lambda: ImageStore([str(folder / "bomb.png")], 32).batch([0]))


def torture() -> int:
    rng, bad = random.Random(7), BadInputs()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        by_hand(bad, folder / "by_hand")
        by_hypothesis(bad, folder / "by_hypothesis")
        cuts, taken = truncations(folder)
        kills, different = kill_and_resume(folder, rng)
    print(f"{kills} kills over {len(OF_TRIPLETS) * len(LOSSES)} runs, {different} of which ended differently; {cuts} "
          f"truncated checkpoints, {taken} not refused; {bad.tried} bad inputs: {bad.ends['traceback']} tracebacks, "
          f"{bad.ends['more than a line']} of more than a line, {bad.ends['hang']} hangs, {bad.ends['data lost']} with "
          "data lost")
    return int(kills < 50 or different or taken or any(bad.ends.values()) or bad.tried < 300)


if __name__ == "__main__":
    sys.exit(torture())
