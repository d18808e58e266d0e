"""What a run leaves to look at: its folder, TensorBoard's numbers and pictures, the recall table, metrics.json."""

import json
import os
import re
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tensorboardX import SummaryWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from torch import Tensor

from checkpoint import FIXED_FLAGS
from composition_dataset import Judge, QuerySet
from machine.errors import InputError
from machine.folder_lock import FolderLock, write_whole
from machine.image_store import DeviceStore, ImageStore
from machine.progress import say
from machine.streams import shown
from pictures import Answer, feature_map, sheet
from test_retrieval import NEVER, CorrectImages
from text_model import spread


def check_log_dir(log_dir: str | Path, comment: str) -> None:
    """Raise InputError now, not after the data are read, where no run folder could be made."""
    if os.sep in comment:
        raise InputError(f"--comment {comment!r} ends a folder's name and cannot hold a {os.sep!r}")
    try:
        Path(log_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the log folder {log_dir} ({error.strerror}); choose another --log_dir") from None
    if not os.access(log_dir, os.W_OK | os.X_OK):
        raise InputError(f"cannot write to the log folder {log_dir}; choose another --log_dir")


def run_folder(log_dir: str | Path, comment: str, lock: FolderLock | None = None) -> Path:
    """A new folder <log_dir>/<Mon dd_HH-MM-SS>_<hostname><comment>, as tensorboardX names them, locked."""
    name = f"{datetime.now().strftime('%b%d_%H-%M-%S')}_{socket.gethostname()}{comment}"
    for attempt in range(1, 1000):                                              # several runs may start in one second
        folder = Path(log_dir) / (name if attempt == 1 else f"{name}-{attempt}")
        try:
            folder.mkdir(parents=True)
            if lock:
                lock.take(folder)
            return folder
        except FileExistsError:
            continue
    raise InputError(f"{log_dir} already holds a thousand runs named {name}; choose another --comment")


@dataclass
class Sighting:
    """What is worth looking at in the answers to one query set."""
    answers: list[Answer]
    ranks: dict[str, np.ndarray]        # by judge
    map: Image.Image


class Sightings(dict):
    """Judge name -> Sighting, of each query set of a test of a split, by its first judge: a `watch` for `evaluate`.

    store: gives the pixels. it: half of the queries shown are the same at each test, the others depend on this.
    """

    ROWS, RESULTS, POINTS = 8, 8, 1000

    def __init__(self, store: ImageStore | DeviceStore, it: int):
        super().__init__()
        self.store, self.it = store, it

    def __call__(self, asked: QuerySet, ids: np.ndarray, queries: Tensor, gallery: Tensor,
                 found: list[np.ndarray]) -> None:
        count, half = len(queries), self.ROWS // 2
        others = np.random.default_rng(self.it).choice(count, min(half, count), replace=False)
        chosen = np.union1d(spread(range(count), half), others)
        judge = asked.judges[0]
        ranks = {judge.name: rank for judge, rank in zip(asked.judges, found, strict=True)}
        self[judge.name] = Sighting(self.answers(asked, ids, queries, gallery, found[0], chosen), ranks,
                                    self.map(judge, queries, gallery))

    def answers(self, asked: QuerySet, ids: np.ndarray, queries: Tensor, gallery: Tensor, ranks: np.ndarray,
                chosen: np.ndarray) -> list[Answer]:
        """The chosen queries with their first results."""
        judge, own = asked.judges[0], asked.own[chosen]
        scores = rows_of(queries, chosen) @ gallery.T                           # (rows, N)
        masked = np.flatnonzero(own >= 0)
        scores[masked, own[masked]] = -torch.inf
        best = scores.topk(min(self.RESULTS, len(gallery)), dim=1).indices.cpu().numpy()
        return [Answer(self.picture(asked.sources[query]), f"+ {asked.texts[query]}",
                       [self.picture(ids[place]) for place in places],
                       judge.is_right(query, places),
                       verdict="none is right" if ranks[query] == NEVER else f"first right one: {ranks[query] + 1}")
                for query, places in zip(chosen, best, strict=True)]

    def map(self, judge: Judge, queries: Tensor, gallery: Tensor) -> Image.Image:
        """Some of the gallery, some queries, and the first correct image of each."""
        correct = CorrectImages(judge)
        chosen = np.array([query for query in spread(range(len(queries)), 200) if correct.counts[query]], int)
        targets = correct.places[correct.first[chosen]]
        shown = (gallery, spread(range(len(gallery)), self.POINTS)), (queries, chosen), (gallery, targets)
        return feature_map(*(rows_of(features, rows).cpu().numpy() for features, rows in shown))

    def picture(self, image: int) -> Image.Image:
        return Image.fromarray(self.store.picture(image))


def rows_of(features: Tensor, rows: Sequence[int]) -> Tensor:
    return features[torch.as_tensor(np.asarray(rows), device=features.device)]


@dataclass
class Tested:
    """A split's test: {way to answer: {metric: value}}, and what there is to look at."""
    ways: dict[str, dict[str, float]]
    seen: Sightings


class Report:
    """Logs one run. Results are {"train": {metric: value}, "test": {metric: value}}.

    after: the iteration after which a resumed run goes on; what was logged beyond it is taken back.
    """

    def __init__(self, folder: Path, flags: dict, after: int | None = None):
        self.folder, self.flags, self.results = folder, flags, {}
        self.writer = SummaryWriter(str(folder))
        # Written at once in this thread: tensorboardX's own would lose what waits in its queue when the process is
        # killed, and let the queue fill for ever on a full disk.
        self.events = self.writer.file_writer.event_writer
        self.events._worker.stop()                                              # at exit it cannot, from Python 3.12 on
        self.events.add_event = partial(self.on_disk, self.events._ev_writer.write_event)
        if after is not None:
            restart = SessionLog(status=SessionLog.START)                       # TensorBoard drops steps from here on
            self.writer.file_writer.add_event(Event(step=after + 1, session_log=restart))
            return
        rows = "\n".join(f"| {name} | {shown(value)} |" for name, value in sorted(flags.items()))
        self.writer.add_text("flags", f"| flag | value |\n| --- | --- |\n{rows}", 0)

    def scalars(self, values: dict[str, float], it: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, it)
        self.flush()                                                            # TensorBoard shows it now

    def metrics(self, results: dict[str, dict[str, float]], baselines: dict[str, dict[str, float]], it: int) -> str:
        """Log the recalls, write metrics.json, and return the table to print.

        baselines: {"test NAME": {metric: value}} of other ways to answer; logged and shown, not in the file.
        """
        self.results = results
        shown = {**results, **baselines}
        for split, values in shown.items():
            self.scalars({f"{split} {name}": value for name, value in values.items()}, it)
        write_whole(self.folder / "metrics.json", (json.dumps({"it": it, **results}, indent=1) + "\n").encode())
        return f"iteration {it}\n{recall_table(shown)}"

    def sightings(self, split: str, seen: Sightings, it: int) -> None:
        """Log sheets of results, maps of features, and histograms of ranks (log10: 0 is the first place)."""
        for name, sighting in seen.items():
            for what, picture in (("results", sheet(sighting.answers)), ("features", sighting.map)):
                self.writer.add_image(f"{split} {what} {name}", np.asarray(picture), it, dataformats="HWC")
            for judge, ranks in sighting.ranks.items():
                if len(known := ranks[ranks != NEVER]):
                    self.writer.add_histogram(f"{split} log10 rank {judge}", np.log10(known + 1.0), it)
        self.flush()

    def on_disk(self, write: Callable, *content) -> None:
        try:
            write(*content)
        except OSError as error:
            self.events._closed = True                                          # else tensorboardX tries again at exit
            raise InputError(f"cannot write the log in {self.folder} ({error.strerror or error}); make room, then pass "
                             "--resume auto") from None

    def flush(self) -> None:
        """What was logged so far is on disk. Raises InputError where it cannot be."""
        self.on_disk(self.writer.flush)

    def close(self) -> None:
        """Flags that make a difference beside final recalls, for TensorBoard's HPARAMS tab; the event file's end."""
        self.flush()
        if self.results:
            plain = {name: value if isinstance(value, bool | int | float | str) else str(value)
                     for name, value in self.flags.items() if name in (*FIXED_FLAGS, "num_iters")}
            final = {f"final {split} {name}": value for split, values in self.results.items()
                     for name, value in values.items()}
            self.writer.add_hparams(plain, final, name="hparams")
        self.writer.close()


class Silence(Report):
    """Logs nothing: the report of every process but the first."""

    def __init__(self, folder: Path, *_):
        self.folder = folder

    def scalars(self, *_) -> None:
        pass

    def metrics(self, *_) -> str:
        return ""

    def sightings(self, *_) -> None:
        pass

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def show_results(log: Report, tested: dict[str, Tested], it: int) -> dict[str, dict[str, float]]:
    """Print and log a test. Returns the model's results, {split: {metric: value}}."""
    results = {name: split.ways["model"] for name, split in tested.items()}
    baselines = {f"{name} {way}": metrics for name, split in tested.items() for way, metrics in split.ways.items()
                 if way != "model"}
    say(log.metrics(results, baselines, it))
    for name, split in tested.items():
        log.sightings(name, split.seen, it)
    return results


def recalls(results: dict[str, dict[str, float]]) -> tuple[dict[str, dict[int, float]], list[int], list[str]]:
    """{split and judge: {K: recall}}, all Ks, and a line for each metric that is no recall."""
    rows: dict[str, dict[int, float]] = {}
    others = []
    for split, values in results.items():
        for name, value in values.items():
            if match := re.fullmatch(r"recall_top(\d+)_(.+)", name):
                rows.setdefault(f"{split} {match[2]}", {})[int(match[1])] = value
            else:
                others.append(f"{split} {name}: {100 * value:.2f}")
    return rows, sorted({k for row in rows.values() for k in row}), others


def recall_table(results: dict[str, dict[str, float]]) -> str:
    """Rows split and judge, columns R@K in percent."""
    rows, ks, others = recalls(results)
    width = max(map(len, rows), default=0)
    lines = [" " * width + "".join(f"{f'R@{k}':>8}" for k in ks)]
    lines += [f"{name:<{width}}" + "".join(f"{100 * row[k]:8.2f}" if k in row else " " * 8 for k in ks)
              for name, row in rows.items()]
    return "\n".join(lines + others)
