"""Where what a run reports goes: lines of JSON in its folder, always; and TensorBoard, Weights & Biases, or neither."""

import html
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.summary import custom_scalars, histogram, hparams, image, text

from machine.errors import InputError
from machine.folder_lock import write_whole
from machine.streams import shown

LINES = "log.jsonl"
# What stands under HPARAMS, where TensorBoard ticks five by itself; the TEXT tab has all flags.
HEADLINE_FLAGS = ("model", "loss", "learning_rate", "batch_size", "image_encoder", "text_encoder", "seed")
WATCHED = re.compile(r"learning_rate|gradient norm|scale|a \d+|(queries|images) per second")  # beside the losses


def tag(name: str) -> str:
    """Where TensorBoard shows what is logged as `name`: test recall_top10_correct_adj is recall/test/adj@10. Its
    sections stand in the alphabet's order, so that loss and recall come first."""
    if found := re.fullmatch(r"(\w+) (?:(.+) )?(recall|map|precision)_(?:top(\d+)_)?(.+)", name):
        split, way, kind, k, metric = found.groups()
        place = f"{kind}/{split}/{metric.removeprefix('correct_')}{f'@{k}' if k else ''}{f'/{way}' if way else ''}"
    elif found := re.fullmatch(r"(\w+) (results|features|log10 rank) (.+)", name):
        split, what, metric = found.groups()
        place = f"retrieval/{what}/{split}/{metric.removeprefix('correct_')}"
    elif WATCHED.fullmatch(name):
        place = f"training/{name}"
    else:
        place = f"loss/{'total' if name == 'total training loss' else name}"
    return place.replace(" ", "_")


def markdown_table(header: str, rows: Iterable[Sequence]) -> list[str]:
    """Its lines; header: as Markdown has it."""
    return [header, "|" + " --- |" * (header.count("|") - 1),
            *(f"| {' | '.join(shown(cell).replace('|', chr(92) + '|') for cell in row)} |" for row in rows)]


class Points(NamedTuple):
    """Features to look at one by one."""
    features: np.ndarray                # (n, D)
    labels: list[tuple[str, str]]       # n times its name or text, and what it is
    pictures: Callable[[], list[Image.Image]]   # n


class Writer:
    """Takes what a run reports, and does nothing with it: what others leave out. Names are those of `tag`'s argument.

    folder: the run's. after: the iteration after which a resumed run goes on; what was logged beyond it is taken back.
    Raises InputError where something cannot be written.
    """

    def __init__(self, folder: Path, flags: dict, after: int | None):
        self.folder, self.flags, self.after = folder, flags, after

    @staticmethod
    def check() -> None:
        """Raise InputError where this machine lacks what it needs."""

    def scalars(self, values: dict[str, float], it: int) -> None:
        pass

    def recalls(self, values: dict[str, float], curves: Sequence[str], table: str, it: int) -> None:
        """All numbers of a test, the names of those that are worth a curve, and all as Markdown."""
        self.scalars({name: values[name] for name in curves}, it)
        self.text("recalls", table, it)

    def text(self, name: str, content: str, it: int) -> None:
        """content: Markdown."""

    def picture(self, name: str, picture: Image.Image, it: int) -> None:
        pass

    def histogram(self, name: str, values: np.ndarray, it: int) -> None:
        pass

    def points(self, name: str, points: Points) -> None:
        pass

    def tested(self, splits: Sequence[str], headline: Sequence[str]) -> None:
        """Told before a process's first recalls of which splits there are, and which of them say most."""

    def flush(self) -> None:
        """What was logged so far is on disk."""

    def close(self) -> None:
        """The run has ended as it should."""

    def on_disk(self, write: Callable, *content) -> None:
        try:
            write(*content)
        except OSError as error:
            raise InputError(f"cannot write the log in {self.folder} ({error.strerror or error}); make room, then pass "
                             "--resume auto") from None


class JsonLines(Writer):
    """A line of log.jsonl for each call of `scalars`: {"it": ..., name: value}."""

    def __init__(self, *what):
        super().__init__(*what)
        if self.after is not None and (file := self.folder / LINES).exists():
            kept = [line for line in file.read_bytes().splitlines(keepends=True) if self.stays(line)]
            self.on_disk(write_whole, file, b"".join(kept))

    def stays(self, line: bytes) -> bool:
        """Whether a resumed run keeps it: the last one may be half a line."""
        try:
            return json.loads(line)["it"] <= self.after and line.endswith(b"\n")
        except (ValueError, LookupError, TypeError):
            return False

    def scalars(self, values: dict[str, float], it: int) -> None:
        self.on_disk(self.append, json.dumps({"it": it, **values}) + "\n")

    def recalls(self, values: dict[str, float], curves: Sequence[str], table: str, it: int) -> None:
        self.scalars(values, it)

    def append(self, line: str) -> None:
        with open(self.folder / LINES, "a", encoding="utf-8") as file:
            file.write(line)


class TensorBoard(Writer):
    """Event files in the run's folder, for one entry under HPARAMS, and files of the embedding projector."""

    SIDE = 32                           # pixels of a point's picture
    STEPS = 1e-12 * 1.1 ** np.arange(775)                                       # of a histogram, up to 1e20
    BINS = np.concatenate([-STEPS[::-1], [0], STEPS])

    def __init__(self, *what):
        super().__init__(*what)
        # Files are named by the second of their making: one of the same second would be written over.
        before = len([*self.folder.glob("events.out.tfevents.*")])
        # Written at once in this thread: tensorboardX's own would lose what waits in its queue when the process is
        # killed, let the queue fill for ever on a full disk, and needs shared memory for it.
        self.events: EventsWriter | None = None
        self.on_disk(self.open, f".{before}" if before else "")
        self.ending: Summary | None = None
        self.projected = ""                                                     # what the projector is told
        if self.after is not None:                                              # TensorBoard drops steps from here on
            self.add(self.after + 1, session_log=SessionLog(status=SessionLog.START))
            return
        self.text("flags", "\n".join(markdown_table("| flag | value |", sorted(self.flags.items()))), 0)

    def open(self, suffix: str) -> None:
        self.events = EventsWriter(str(self.folder / "events"), suffix)

    def add(self, it: int = 0, **what) -> None:
        """An event of this content."""
        self.on_disk(self.events.write_event, Event(wall_time=time.time(), step=it, **what))

    def scalars(self, values: dict[str, float], it: int) -> None:
        """Not by tensorboardX's, which would make a _ of the @."""
        found = [Summary.Value(tag=tag(name), simple_value=value) for name, value in values.items()]
        self.add(it, summary=Summary(value=found))

    def text(self, name: str, content: str, it: int) -> None:
        self.add(it, summary=text(name, content))

    def picture(self, name: str, picture: Image.Image, it: int) -> None:
        self.add(it, summary=image(tag(name), np.asarray(picture), dataformats="HWC"))

    def histogram(self, name: str, values: np.ndarray, it: int) -> None:
        self.add(it, summary=histogram(tag(name), values, self.BINS))

    def points(self, name: str, points: Points) -> None:
        """Some 7 bytes for a number and 3 KB for a picture. Not by add_embedding, whose sheet of pictures ends in
        whatever is in memory, and which keeps those of every earlier time."""
        columns = math.ceil(math.sqrt(len(points.labels)))
        sheet = Image.new("RGB", (columns * self.SIDE, columns * self.SIDE), "white")
        for place, picture in enumerate(points.pictures()):
            corner = place % columns * self.SIDE, place // columns * self.SIDE
            sheet.paste(picture.resize((self.SIDE, self.SIDE)), corner)
        labels = [("name", "kind"), *points.labels]
        files = f"projector/{name}"
        self.projected += (f'embeddings {{\n tensor_name: "{name}"\n tensor_path: "{files}.tsv"\n'
                           f' metadata_path: "{files}_names.tsv"\n sprite {{ image_path: "{files}.png" '
                           f'single_image_dim: {self.SIDE} single_image_dim: {self.SIDE} }}\n}}\n')

        def write() -> None:
            (self.folder / "projector").mkdir(exist_ok=True)
            np.savetxt(self.folder / f"{files}.tsv", points.features, "%.4f", "\t")
            (self.folder / f"{files}_names.tsv").write_text(
                "".join("\t".join(map(shown, label)) + "\n" for label in labels), encoding="utf-8")
            sheet.save(self.folder / f"{files}.png")
            (self.folder / "projector_config.pbtxt").write_text(self.projected)
        self.on_disk(write)

    def tested(self, splits: Sequence[str], headline: Sequence[str]) -> None:
        """A chart for the recalls of each split, the test's first, and one for the loss; one entry under HPARAMS, with
        the last recalls that are logged."""
        charts = {split: ["Multiline", [f"recall/{split}/"]] for split in reversed(splits)}
        self.add(summary=custom_scalars({"loss": {"all parts": ["Multiline", ["loss/"]]}, "recall": charts}))
        # Not by add_hparams, which would make a run of its own of them.
        told = {name: self.flags[name] for name in HEADLINE_FLAGS}
        experiment, start, self.ending = hparams(told, dict.fromkeys(map(tag, headline)))
        for summary in (experiment, start):
            self.add(summary=summary)

    def flush(self) -> None:
        self.on_disk(self.events.flush)

    def close(self) -> None:
        if self.ending:
            self.add(summary=self.ending)
        self.on_disk(self.events.close)


class WandB(Writer):
    """Weights & Biases, by its own package; WANDB_MODE=offline keeps all in the run's folder."""

    @staticmethod
    def check() -> None:
        try:
            import wandb  # noqa: F401
        except ImportError:
            raise InputError("--report_to wandb needs a package of its own: pip install wandb") from None

    def __init__(self, *what):
        super().__init__(*what)
        import wandb
        self.wandb = wandb
        name = self.folder.name
        try:
            self.run = wandb.init(dir=self.folder, project="composed-image-retrieval", name=name, resume="allow",
                                  id=re.sub(r"[^\w-]", "-", name), config=self.flags,
                                  settings=wandb.Settings(console="off"))
        except wandb.Error as error:
            reason = str(error).partition("\n")[0].rstrip(".")
            raise InputError(f"--report_to wandb: {reason}; or set WANDB_MODE=offline") from None

    def scalars(self, values: dict[str, float], it: int) -> None:
        self.run.log({tag(name): value for name, value in values.items()}, step=it)

    def text(self, name: str, content: str, it: int) -> None:
        self.run.log({name: self.wandb.Html(f"<pre>{html.escape(content)}</pre>")}, step=it)

    def picture(self, name: str, picture: Image.Image, it: int) -> None:
        self.run.log({tag(name): self.wandb.Image(picture)}, step=it)

    def histogram(self, name: str, values: np.ndarray, it: int) -> None:
        self.run.log({tag(name): self.wandb.Histogram(values)}, step=it)

    def close(self) -> None:
        self.run.finish()


WRITERS = {"tensorboard": TensorBoard, "wandb": WandB, "none": Writer}
