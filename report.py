"""What a run leaves to look at: its folder, TensorBoard's numbers and pictures, the recall table, metrics.json."""

import json
import os
import re
import socket
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tensorboardX import SummaryWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from torch import Tensor

from datasets import Judge, QuerySet
from errors import InputError
from image_store import DeviceStore, ImageStore
from pictures import Answer, feature_map, sheet
from test_retrieval import NEVER


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


def run_folder(log_dir: str | Path, comment: str) -> Path:
    """A new folder <log_dir>/<Mon dd_HH-MM-SS>_<hostname><comment>, as tensorboardX names them."""
    name = f"{datetime.now().strftime('%b%d_%H-%M-%S')}_{socket.gethostname()}{comment}"
    for attempt in range(1, 1000):                                              # several runs may start in one second
        folder = Path(log_dir) / (name if attempt == 1 else f"{name}-{attempt}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
    raise InputError(f"{log_dir} already holds a thousand runs named {name}; choose another --comment")


class Sightings:
    """What is worth looking at in a test of a split: some queries with their results, all ranks, some features.

    store: gives the pixels. it: half of the queries are the same at each test, the others depend on this.
    """

    ROWS, RESULTS, POINTS = 8, 8, 1000

    def __init__(self, store: ImageStore | DeviceStore, it: int):
        self.store, self.it = store, it
        self.answers: list[Answer] = []
        self.ranks: dict[str, np.ndarray] = {}
        self.map: Image.Image | None = None

    def __call__(self, asked: QuerySet, ids: np.ndarray, queries: Tensor, gallery: Tensor,
                 found: list[np.ndarray]) -> None:
        """See one query set; of several, each is shown with fewer queries."""
        self.ranks |= {judge.name: ranks for judge, ranks in zip(asked.judges, found, strict=True)}
        judge, ranks = asked.judges[0], found[0]
        rows = self.ROWS if judge.name == "correct_composition" else self.ROWS // 2
        fixed = np.unique(np.linspace(0, len(queries) - 1, rows // 2).astype(int))
        others = np.random.default_rng(self.it).choice(len(queries), min(rows // 2, len(queries)), replace=False)
        chosen = np.unique(np.concatenate([fixed, others]))
        scores = queries[torch.as_tensor(chosen, device=queries.device)] @ gallery.T  # (rows, N)
        for row, own in enumerate(asked.own[chosen]):
            if own >= 0:
                scores[row, own] = -torch.inf
        best = scores.topk(min(self.RESULTS, len(gallery)), dim=1).indices.cpu().numpy()
        for query, places in zip(chosen, best, strict=True):
            rank = "none is right" if ranks[query] > len(gallery) else f"first right one: {ranks[query] + 1}"
            self.answers.append(Answer(self.picture(asked.sources[query]), f"+ {asked.texts[query]}",
                                       [self.picture(ids[place]) for place in places],
                                       judge.gallery_labels[places] == judge.query_labels[query], verdict=rank))
        if self.map is None:
            targets = first_right(judge, chosen := spread(len(queries), 200))
            chosen, targets = chosen[targets >= 0], targets[targets >= 0]
            self.map = feature_map(*(features[torch.as_tensor(rows, device=features.device)].cpu().numpy() for
                                     features, rows in ((gallery, spread(len(gallery), self.POINTS)), (queries, chosen),
                                                        (gallery, targets))))

    def picture(self, image: int) -> Image.Image:
        return Image.fromarray(self.store.batch([image])[0].permute(1, 2, 0).numpy())


def spread(count: int, most: int) -> np.ndarray:
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(int))


def first_right(judge: Judge, queries: np.ndarray) -> np.ndarray:
    """The first correct gallery position of each query, -1 where there is none."""
    labels, first = np.unique(judge.gallery_labels, return_index=True)
    wanted = judge.query_labels[queries]
    place = np.minimum(np.searchsorted(labels, wanted), len(labels) - 1)
    return np.where(labels[place] == wanted, first[place], -1)


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
        self.events.add_event = partial(self.on_disk, self.events._ev_writer.write_event)
        if after is not None:
            restart = SessionLog(status=SessionLog.START)                       # TensorBoard drops steps from here on
            self.writer.file_writer.add_event(Event(step=after + 1, session_log=restart))
            return
        rows = "\n".join(f"| {name} | {value} |" for name, value in sorted(flags.items()))
        self.writer.add_text("flags", f"| flag | value |\n| --- | --- |\n{rows}", 0)

    def scalars(self, values: dict[str, float], it: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, it)
        self.flush()                                                            # TensorBoard shows it now

    def metrics(self, results: dict[str, dict[str, float]], baselines: dict[str, dict[str, float]], it: int) -> str:
        """Log the recalls, write metrics.json, and return the table to print.

        baselines: {name: {metric: value}} of other ways to answer the test split; logged and shown, not in the file.
        """
        self.results = results
        shown = {**results, **{f"test {name}": values for name, values in baselines.items()}}
        for split, values in shown.items():
            self.scalars({f"{split} {name}": value for name, value in values.items()}, it)
        unfinished = self.folder / "metrics.json.unfinished"
        unfinished.write_text(json.dumps({"it": it, **results}, indent=1) + "\n")
        os.replace(unfinished, self.folder / "metrics.json")
        return f"iteration {it}\n{recall_table(shown)}"

    def sightings(self, split: str, seen: Sightings, it: int) -> None:
        """Log the sheet of results, the histograms of ranks (log10: 0 is the first place) and the map of features."""
        for name, picture in (("retrieval", sheet(seen.answers)), ("features", seen.map)):
            self.writer.add_image(f"{split} {name}", np.asarray(picture), it, dataformats="HWC")
        for name, ranks in seen.ranks.items():
            known = ranks[ranks < NEVER]
            if len(known):
                self.writer.add_histogram(f"{split} log10 rank {name}", np.log10(known + 1.0), it)
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
        """Flags beside final recalls, for TensorBoard's HPARAMS tab, and the end of the event file."""
        self.flush()
        if self.results:
            plain = {name: value if isinstance(value, bool | int | float | str) else str(value)
                     for name, value in self.flags.items()}
            final = {f"final {split} {name}": value for split, values in self.results.items()
                     for name, value in values.items()}
            self.writer.add_hparams(plain, final, name="hparams")
        self.writer.close()


def recall_table(results: dict[str, dict[str, float]]) -> str:
    """Rows split and judge, columns R@K in percent."""
    rows: dict[str, dict[int, float]] = {}
    others = []
    for split, values in results.items():
        for name, value in values.items():
            if match := re.fullmatch(r"recall_top(\d+)_(.+)", name):
                rows.setdefault(f"{split} {match[2]}", {})[int(match[1])] = value
            else:
                others.append(f"{split} {name}: {100 * value:.2f}")
    ks = sorted({k for row in rows.values() for k in row})
    width = max(map(len, rows), default=0)
    lines = [" " * width + "".join(f"{f'R@{k}':>8}" for k in ks)]
    lines += [f"{name:<{width}}" + "".join(f"{100 * row[k]:8.2f}" if k in row else " " * 8 for k in ks)
              for name, row in rows.items()]
    return "\n".join(lines + others)
