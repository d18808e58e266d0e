"""What a run leaves to look at: its folder, TensorBoard's events, the recall table and metrics.json."""

import json
import os
import re
import socket
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path

from tensorboardX import SummaryWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from errors import InputError


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
