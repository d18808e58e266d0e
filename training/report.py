"""What a run leaves to look at: its folder, numbers and pictures for its writers, the recall table, metrics.json."""

import json
import os
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.base import CompositionDataset, QuerySet
from machine.errors import InputError
from machine.folder_lock import FolderLock, write_whole
from machine.image_store import DeviceStore, ImageStore
from machine.progress import say
from machine.streams import shown
from test_retrieval import NEVER, CorrectImages, Score, chance, rankings
from text_model import spread
from torch_function import cosines
from training.pictures import QueryResults, feature_map, sheet
from training.writers import WRITERS, JsonLines, Points, markdown_table

KINDS = {"recall": "R", "map": "mAP", "precision": "P"}                         # of metrics at K, in a table
BENCHMARKS = "correct_"                 # begins the names of what a benchmark asks; others ask of groups, or of few


def check_log_dir(log_dir: str | Path) -> None:
    """Raise InputError now, not after the data are read, where no run folder could be made."""
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
class QualitativeResult:
    """What is worth looking at in the answers to one query set."""
    answers: list[QueryResults]
    ranks: np.ndarray                   # (Q,) by its first metric
    map: Image.Image
    points: Points | None               # of the benchmark's own metrics alone
    chance: dict[str, float]            # recalls of a random order


class QualitativeResults(dict):
    """Metric name -> QualitativeResult, of each query set of a split's test, by its first metric: a `watch` for
    `evaluate`.

    store: gives the pixels. it: half of the queries shown are the same at each test, the others depend on this.
    names: of the images. score: the model's, of queries with a gallery.
    """

    ROWS, RESULTS, POINTS, QUERIES = 8, 8, 1000, 200

    def __init__(self, store: ImageStore | DeviceStore, it: int, names: Sequence[str] = (), score: Score = cosines):
        super().__init__()
        self.store, self.it, self.names, self.score = store, it, names, score

    def __call__(self, query_set: QuerySet, ids: np.ndarray, queries: Tensor, gallery: Tensor,
                 found: list[np.ndarray]) -> None:
        drawn = queries[:, :gallery.shape[1]]                                   # of other queries the picture's part
        count, half = len(queries), self.ROWS // 2
        others = np.random.default_rng(self.it).choice(count, min(half, count), replace=False)
        chosen = np.union1d(spread(range(count), half), others)
        metric = query_set.metrics[0]
        self[metric.name] = QualitativeResult(self.answers(query_set, ids, queries, gallery, found[0], chosen),
                                              found[0], self.map(query_set, drawn, gallery),
                                              self.points(query_set, ids, drawn, gallery)
                                              if metric.name.startswith(BENCHMARKS) else None, chance(query_set))

    def answers(self, query_set: QuerySet, ids: np.ndarray, queries: Tensor, gallery: Tensor, ranks: np.ndarray,
                chosen: np.ndarray) -> list[QueryResults]:
        """The chosen queries with their first results."""
        metric, own = query_set.metrics[0], query_set.excluded[chosen]
        scores = self.score(rows_of(queries, chosen), gallery)                  # (rows, N)
        masked = np.flatnonzero(own >= 0)
        scores[masked, own[masked]] = -torch.inf
        if query_set.galleries is not None:                                     # and its columns are what is ranked
            listed = torch.as_tensor(query_set.galleries[chosen], device=scores.device)
            scores = scores.gather(1, listed.clamp(min=0)).masked_fill(listed < 0, -torch.inf)
        best = scores.topk(min(self.RESULTS, scores.shape[1]), dim=1).indices.cpu().numpy()
        best = [places[query_set.in_gallery(query, places) >= 0] for query, places in zip(chosen, best, strict=True)]
        return [QueryResults(self.picture(query_set.sources[query]), f"+ {query_set.texts[query]}",
                             [self.picture(image) for image in ids[query_set.in_gallery(query, places)]],
                             metric.is_correct(query, places),
                             remark="none is right" if ranks[query] == NEVER
                             else f"first right one: {ranks[query] + 1}")
                for query, places in zip(chosen, best, strict=True)]

    def map(self, query_set: QuerySet, queries: Tensor, gallery: Tensor) -> Image.Image:
        """Some of the gallery, some queries, and the first correct image of each."""
        correct = CorrectImages(query_set.metrics[0])
        few = spread(range(len(queries)), self.QUERIES)
        chosen = np.array([query for query in few if correct.counts[query]], int)
        targets = [query_set.in_gallery(query, correct.places[correct.first[query]]) for query in chosen]
        shown = (gallery, spread(range(len(gallery)), self.POINTS)), (queries, chosen), (gallery, targets)
        return feature_map(*(rows_of(features, rows).cpu().numpy() for features, rows in shown))

    def points(self, query_set: QuerySet, ids: np.ndarray, queries: Tensor, gallery: Tensor) -> Points:
        """Some of the gallery and some queries, these by the picture that they start from."""
        places, few = spread(range(len(gallery)), self.POINTS), spread(range(len(queries)), self.QUERIES)
        features = torch.cat([rows_of(gallery, places), rows_of(queries, few)]).cpu().numpy()
        images = [*ids[places], *query_set.sources[few]]
        labels = [(self.names[image] if self.names else str(image), "image") for image in ids[places]]
        labels += [(f"+ {query_set.texts[query]}", "query") for query in few]
        return Points(features, labels, lambda: [self.picture(image) for image in images])

    def picture(self, image: int) -> Image.Image:
        return Image.fromarray(self.store.picture(image))


def rows_of(features: Tensor, rows: Sequence[int]) -> Tensor:
    return features[torch.as_tensor(np.asarray(rows), device=features.device)]


class Submission:
    """What a benchmark's test server takes, into the run's folder: a `watch` for `evaluate`."""

    def __init__(self, folder: Path, data: CompositionDataset, score: Score = cosines):
        self.folder, self.data, self.score = folder, data, score

    def __call__(self, query_set: QuerySet, ids: np.ndarray, queries: Tensor, gallery: Tensor, _) -> None:
        answers = self.data.submission(ids[order] for order in rankings(queries, gallery, query_set.excluded,
                                                                        self.data.answers_served, self.score))
        for name, content in answers.items():
            write_whole(self.folder / name, json.dumps(content).encode())
            say(f"{self.folder / name}: {len(query_set.texts)} answers for the test server")


@dataclass
class SplitResult:
    """A split's test: {method: {metric: value}}, what there is to look at, what the numbers are of, and who asked."""
    results: dict[str, dict[str, float]]
    qualitative: QualitativeResults
    protocol: dict = field(default_factory=dict)
    asked: str = ""                     # whose queries these are, where they may be several kinds


class Report:
    """Logs one run. Results are {"train": {metric: value}, "test": {metric: value}}.

    after: the iteration after which a resumed run goes on; what was logged beyond it is taken back. headline: the
    metrics that say most, beside the one that chooses the best checkpoint. silent: nothing is logged, as by every
    process but the first. tabled: the kinds of metrics that its tables show; the others are numbers in its files.
    """

    def __init__(self, folder: Path, flags: dict, after: int | None = None, headline: Sequence[str] = (),
                 silent: bool = False, tabled: Sequence[str] = tuple(KINDS)):
        self.tabled = tabled
        self.folder, self.results, self.seen, self.chosen_by = folder, {}, {}, flags["best_metric"]
        self.headline = [*dict.fromkeys((*headline, self.chosen_by))]
        kinds = () if silent else (JsonLines, WRITERS[flags["report_to"]])
        self.writers = [kind(folder, flags, after) for kind in kinds]

    def scalars(self, values: dict[str, float], it: int) -> None:
        for writer in self.writers:
            writer.scalars(values, it)
        self.flush()                                                            # who looks on sees it now

    def metrics(self, results: dict[str, dict[str, float]], baselines: dict[str, dict[str, float]], it: int,
                protocols: dict[str, dict] | None = None) -> str:
        """Log the recalls, write metrics.json, and return the table to print.

        baselines: {"test NAME": {metric: value}} of other ways to answer, and numbers of queries. protocols: what the
        numbers of each split are of; the last one's stand above the table.
        """
        if not self.writers:
            return ""
        if not self.results:
            headline = [f"{list(results)[-1]} {name}" for name in self.headline]
            for writer in self.writers:
                writer.tested(list(results), headline)
        self.results = results
        every = {**results, **baselines}
        values = {f"{split} {name}": value for split, found in every.items() for name, value in found.items()}
        curves = [f"{split} {name}" for split, found in results.items() for name in self.headline if name in found]
        curves += [f"{way} {self.chosen_by}" for way, found in baselines.items() if self.chosen_by in found]
        above = in_a_line([*protocols.values()][-1]) if protocols else ""
        shown = {split: {name: value for name, value in found.items() if kind_of(name) in (None, *self.tabled)}
                 for split, found in every.items()}
        for writer in self.writers:
            writer.recalls(values, curves, f"{above}\n\n" * bool(above) + markdown_recalls(shown), it)
        self.flush()
        content = {"it": it, **results, **({"baselines": baselines} if baselines else {}),
                   **({"protocol": protocols} if protocols else {})}
        write_whole(self.folder / "metrics.json", (json.dumps(content, indent=1) + "\n").encode())
        return f"{above}\n" * bool(above) + f"iteration {it}\n{recall_table(shown)}"

    def qualitative(self, split: str, seen: QualitativeResults, it: int) -> None:
        """Log sheets of results, maps of features, and histograms of ranks (log10: 0 is the first place)."""
        for name, result in seen.items():
            results = sheet(result.answers)
            for writer in self.writers:
                writer.picture(f"{split} results {name}", results, it)
                writer.picture(f"{split} features {name}", result.map, it)
                if len(known := result.ranks[result.ranks != NEVER]):
                    writer.histogram(f"{split} log10 rank {name}", np.log10(known + 1.0), it)
        self.seen = seen
        self.flush()

    def flush(self) -> None:
        """What was logged so far is on disk. Raises InputError where it cannot be."""
        for writer in self.writers:
            writer.flush()

    def close(self) -> None:
        """The run has ended: the features of the split that was tested last, point by point."""
        for writer in self.writers:
            for name, result in self.seen.items():
                if result.points:
                    writer.points(name.removeprefix(BENCHMARKS), result.points)
            writer.close()


def show_results(log: Report, tested: dict[str, SplitResult], it: int) -> dict[str, dict[str, float]]:
    """Print and log a test. Returns the model's results, {split: {metric: value}}."""
    results = {name: split.results["model"] for name, split in tested.items()}
    baselines = {f"{name} {method}": metrics for name, split in tested.items()
                 for method, metrics in split.results.items() if method != "model"}
    protocols = {name: split.protocol for name, split in tested.items() if split.protocol}
    table = log.metrics(results, baselines, it, protocols)
    say("\n".join([table, *(f"{name}: {split.asked} queries" for name, split in tested.items() if split.asked)]))
    if note := chance_line(tested):
        say(note)
    for name, split in tested.items():
        log.qualitative(name, split.qualitative, it)
    return results


def chance_line(tested: dict[str, SplitResult]) -> str:
    """A line on what the table's rows are not to be compared with; nothing where no R@10 was seen."""
    found = {split: [result.chance[name] for metric, result in seen.qualitative.items() if metric.startswith(BENCHMARKS)
                     and (name := f"recall_top10_{metric}") in result.chance] for split, seen in tested.items()}
    if not all(found.values()):
        return ""
    chances = ", ".join(f"{split} {100 * np.mean(values):.2f}" for split, values in found.items())
    return (f"R@10 of a random order: {chances}" + "; train is asked among the targets of other training samples, not "
            "in the test's gallery, so its recalls can be the lower ones" * ("train" in found))


def in_a_line(protocol: dict) -> str:
    """What a table's numbers are of, to stand above it."""
    size, *larger = protocol["gallery"] if isinstance(protocol["gallery"], list) else [protocol["gallery"]]
    size = f"{size:,}" + "".join(f" to {most:,}" for most in larger)
    gallery = f"each a gallery of {size}" if protocol["galleries"] != "one" else f"gallery of {size} images"
    return (f"{protocol['benchmark']}, {protocol['split']}: {protocol['queries']:,} queries, {gallery}, the source "
            f"{protocol['source']}; text: {protocol['text']}; weights {protocol['weights']}, annotations "
            f"{protocol['annotations']}")


def kind_of(name: str) -> str | None:
    """recall of recall_top10_correct_composition; None of what is no metric at a K."""
    found = re.fullmatch(rf"({'|'.join(KINDS)})_top\d+_.+", name)
    return found and found[1]


def tables_of(results: dict[str, dict[str, float]]) -> tuple[dict[str, dict[str, dict[int, float]]], list[str]]:
    """{kind of metric: {split and metric: {K: value}}}, and a line for each number that is of none; numbers of queries
    as they are."""
    tables: dict[str, dict[str, dict[int, float]]] = {}
    others = []
    for split, values in results.items():
        for name, value in values.items():
            if kind := kind_of(name):
                k, metric = name.removeprefix(f"{kind}_top").split("_", 1)
                tables.setdefault(kind, {}).setdefault(f"{split} {metric}", {})[int(k)] = value
            else:
                others.append(f"{split} {name}: {value if isinstance(value, int) else f'{100 * value:.2f}'}")
    return {kind: tables[kind] for kind in KINDS if kind in tables}, others


def ks_of(rows: dict[str, dict[int, float]]) -> list[int]:
    return sorted({k for row in rows.values() for k in row})


def recall_table(results: dict[str, dict[str, float]]) -> str:
    """Rows split and metric, columns R@K in percent, then mAP@K and P@K where there are such."""
    tables, others = tables_of(results)
    width, lines = max((len(name) for rows in tables.values() for name in rows), default=0), []
    for kind, rows in tables.items():
        ks = ks_of(rows)
        lines.append(" " * width + "".join(f"{f'{KINDS[kind]}@{k}':>8}" for k in ks))
        lines += [f"{name:<{width}}" + "".join(f"{100 * row[k]:8.2f}" if k in row else " " * 8 for k in ks)
                  for name, row in rows.items()]
    return "\n".join(lines + others)


def markdown_recalls(results: dict[str, dict[str, float]]) -> str:
    """The same as tables in Markdown."""
    tables, others = tables_of(results)
    lines: list[str] = []
    for kind, rows in tables.items():
        ks = ks_of(rows)
        cells = [(name, *(f"{100 * row[k]:.2f}" if k in row else "" for k in ks)) for name, row in rows.items()]
        lines += [*markdown_table("| |" + "".join(f" {KINDS[kind]}@{k} |" for k in ks), cells), ""]
    return "\n".join([*lines, *(f"- {shown(line)}" for line in others)])
