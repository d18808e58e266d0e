"""What every dataset is: one split's images, training samples and queries.

A dataset opens no image and knows no model. Image ids are positions in `images`; a training sample depends on
(seed, epoch, position) alone, so any number of loader workers draws the same ones.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.metrics import RECALL_KS, Judged, Metric
from benchmarks.mining import Mining
from machine.checksums import digest
from machine.errors import InputError
from machine.picture_folder import is_passed_over, tell_of_unread

TEST_EPOCH = 2**32 - 1
CAPTION_FORMS = "published", "and", "reversed", "both"
TRAIN_QUERIES = 9600                    # the train split is judged on this many random samples (TIRG's protocol)


class Sample(NamedTuple):
    """One training example: two image ids and the text that leads from one to the other."""
    source: int
    target: int
    text: str


class Ways(str):
    """A text that says one thing in several ways: the query is the mean of theirs. As a text it is the first."""

    def __new__(cls, *ways: str):
        made = super().__new__(cls, ways[0])
        made.ways = ways
        return made


def ways_of(text: str) -> tuple[str, ...]:
    return getattr(text, "ways", (text,))


@dataclass
class QuerySet:
    """Queries that are judged alike."""
    sources: np.ndarray                 # (Q,) image ids
    texts: list[str]                    # Q
    excluded: np.ndarray                # (Q,) gallery position taken out of the query's ranking; -1 = nothing is
    metrics: list[Judged]
    galleries: np.ndarray | None = None     # (Q, C) gallery positions that each query ranks, -1 past its last; None =
                                            # all rank all. The metrics' positions are then columns of this

    def in_gallery(self, query: int, positions: np.ndarray) -> np.ndarray:
        """Gallery positions of what the metrics call so."""
        return positions if self.galleries is None else self.galleries[query][positions]


@dataclass
class RetrievalTask:
    """What the retrieval test of a split asks."""
    gallery: np.ndarray                 # (N,) image ids; the train split's may repeat
    query_sets: list[QuerySet]

    @property
    def texts(self) -> list[str]:
        return [way for queries in self.query_sets for text in queries.texts for way in ways_of(text)]


class Epoch(Sequence):
    """The training samples of one pass in random order; sample i depends on (seed, number, i) alone."""

    def __init__(self, dataset: "CompositionDataset", seed: int, number: int):
        self.dataset, self.key = dataset, (seed, number)
        self.order = np.random.default_rng((*self.key, 0)).permutation(len(dataset))

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: int) -> Sample:
        return self.dataset.sample(self.order, position, self.key)


class CompositionDataset:
    """One split of a benchmark. One's own needs `read` and `queries`; the other methods then do.

    path: the benchmark's folder. split: 'train', 'test', `served`, or 'validation', the share `held_out` of what is
    published to train on, which 'train' then lacks: whole nouns, products or source images. category: of FashionIQ,
    'all' or one of its three.
    complete_text: queries say the whole target caption in place of the modification.
    keep_source: a query's own image stays in its ranking, where the benchmark does not say whether it does.
    caption_form: of CAPTION_FORMS, how several captions of one query are put together.
    any_suffix: images are read whatever kind of picture they end as, where the benchmark reads one ending alone.
    shared_concept: CIRCO's queries also say what the two pictures have in common.
    mining: how triplets are made of captions, where the benchmark has none.
    without: images to leave out, with all that refers to them; `dropped` then counts what went, and `amiss` says it.
    None is the strict reading: anything amiss raises InputError, with file and line.
    """

    images: list[str]                   # paths below `root`, by image id
    teaches = "triplets"                # what composers can learn from it: these, "texts" or "pictures"
    has_pictures = True                 # else what stands in `images` is captions
    upright = False                     # whether pictures are turned as the camera noted; the published are not
    is_ones_own = False                 # whether who runs it can change it; the published are as they are
    about = ""                          # what is tested, where the benchmark's name does not say it
    asked = ""                          # whose queries these are, where they may be several kinds
    served = ""                         # the split, where there is one, whose answers a test server alone knows
    answers_served: int | None = None   # how many of a query's first images its server takes; None = it depends
    group_size = 1                      # consecutive samples of an epoch that belong in one batch
    best_metric = "recall_top10_correct_composition"  # by which a run's best checkpoint is chosen
    solved_at = "correct_composition", 10  # how its metrics' names begin, and K, by which a query counts as solved
    shown = "", 10, "ten of its queries"  # of which split, how many queries data/check.py draws; '' is the last
    compares_splits = False             # whether pictures of train and test may not look the same, either
    headline = tuple(f"recall_top{k}_correct_composition" for k in (1, 5, 10))  # what papers report of it
    tabled: tuple[str, ...] = ("recall", "map", "precision")  # kinds of metrics that the table shows
    title = ""                          # the benchmark's name and release, in the line above a table of results
    tested_as = "test"                  # what the published files call the split `test`
    without_training = False            # whether nothing is published to train on
    crops: list[tuple[float, ...] | None] | None = None     # by image id, the box (x, y, width, height) that is cut
                                        # out, with what is around it (machine/cropping.py); None = the whole picture

    def __init__(self, path: str | Path, split: str, complete_text: bool = False, category: str = "all",
                 without: frozenset[str] | None = None, held_out: float = 0.0, keep_source: bool = False,
                 any_suffix: bool = False, shared_concept: bool = False, caption_form: str = "published",
                 mining: Mining | None = None):
        self.keep_source, self.any_suffix, self.shared_concept = keep_source, any_suffix, shared_concept
        self.caption_form, self.mining = caption_form, mining or Mining()
        self.root, self.split, self.complete_text, self.category = Path(path), split, complete_text, category
        self.published, self.held_out = "test" if split in ("test", self.served) else "train", held_out
        self.lenient, self.without = without is not None, without or frozenset()
        self.dropped, self.amiss = {"images": len(self.without)}, []
        self.passed_over: Counter[str] = Counter()                              # endings of what any_suffix would read
        self.unread: dict[Path, Counter[str]] = {}                              # of what nothing here reads, by folder
        self.tasks: dict[int, RetrievalTask] = {}                               # by seed
        require(self.root, f"{type(self).__name__} folder")
        self.read()

    @classmethod
    def splits(cls, path: Path, held_out: float) -> list[str]:
        """The splits that a run reads, the one it trains on first."""
        return ["train", *["validation"] * bool(held_out), "test"]

    @classmethod
    def folder(cls, path: Path) -> Path:
        """Where what was made of it may be kept."""
        return path

    @classmethod
    def remarks(cls, path: Path) -> list[str]:
        """What a user may want to know of the folder, though nothing of it is wrong here."""
        return []

    @cached_property
    def target_labels(self) -> np.ndarray:
        """(images,) ints, equal for images that are equally right as a target: here each only for itself."""
        return np.arange(len(self.images))

    def has(self, group: str) -> bool:
        """Whether a group of the published split is in this one: which are held out depends on their names alone."""
        if self.published == "test" or not self.held_out:
            return self.split != "validation"
        return self.is_held_out(group) == (self.split == "validation")

    def is_held_out(self, group: str) -> bool:
        lot = int.from_bytes(hashlib.sha256(group.encode("utf-8", "surrogatepass")).digest()[:8]) / 2**64
        return lot < self.held_out

    @property
    def template(self) -> str:
        """What a query's text is made of."""
        return "{target_caption}" if self.complete_text else "{text}"

    def protocol(self, seed: int = 0, prompt: str = "{}") -> dict:
        """What the numbers of a test are of, in plain values: with another protocol they would be others. prompt: what
        the model puts a text into, as {}."""
        task = self.task(seed)
        listed = [query_set.galleries for query_set in task.query_sets if query_set.galleries is not None]
        sizes = np.concatenate([(galleries >= 0).sum(1) for galleries in listed]) if listed else [len(task.gallery)]
        least, most = int(min(sizes)), int(max(sizes))
        split = {"test": self.tested_as, self.served: self.served.removeprefix("served_")}.get(self.split, self.split)
        return {"benchmark": self.title or type(self).__name__, "split": split,
                "queries": sum(len(query_set.texts) for query_set in task.query_sets),
                "gallery": least if least == most else [least, most], "galleries": "one a query" if listed else "one",
                "source": self.source_in(task), "text": prompt.replace("{}", self.template),
                "annotations": self.fingerprint(seed)[:12]}

    @staticmethod
    def source_in(task: RetrievalTask) -> str:
        """Where a query's own image is when it is ranked."""
        if any((query_set.excluded >= 0).any() for query_set in task.query_sets):
            return "is left out of its ranking"
        in_it = [np.isin(query_set.sources, task.gallery) if query_set.galleries is None else
                 (query_set.galleries == query_set.sources[:, None]).any(1) for query_set in task.query_sets]
        return "stays in its ranking" if np.concatenate(in_it).any() else "is in no gallery"

    def fingerprint(self, seed: int = 0) -> str:
        """Hexadecimal digits of what a test asks: its images' names, queries, and right answers."""
        task = self.task(seed)
        parts = [repr([self.images[image] for image in task.gallery])]
        for query_set in task.query_sets:
            sources = [self.images[image] for image in query_set.sources]
            parts.append(repr((sources, query_set.texts, query_set.excluded.tolist())))
            parts.append(repr(None if query_set.galleries is None else query_set.galleries.tolist()))
            for metric in query_set.metrics:
                among = None if metric.among is None else metric.among.tolist()
                looked_at = metric.candidates and [listed.tolist() for listed in metric.candidates]
                parts.append(repr((metric.name, among, looked_at, *(part.tolist() for part in metric.correct()))))
        return digest(part.encode("utf-8", "surrogatepass") for part in [repr(self.crops), *parts])

    @property
    def paths(self) -> list[str]:
        return [f"{self.root}/{image}" for image in self.images]

    def described(self) -> list[tuple[str, str]]:
        """What else there is to say of the split, line by line."""
        return []

    def read(self) -> None:
        """Fill `images` and whatever the split's samples or queries need."""
        raise NotImplementedError

    def queries(self) -> list[Sample]:
        """What the split asks; of the train split, its training samples."""
        raise NotImplementedError

    @cached_property
    def all_queries(self) -> list[Sample]:
        return self.queries()

    def __len__(self) -> int:
        """Training samples in an epoch."""
        return len(self.all_queries)

    def sample(self, order: np.ndarray, position: int, key: tuple[int, ...]) -> Sample:
        """The training sample at `position` of an epoch that visits indices in `order`; `key` seeds its choices.

        Further numbers on the key count from 1: a trailing 0 says nothing to numpy, and is the order's own.
        """
        return self.all_queries[order[position]]

    def training_texts(self) -> list[str]:
        """The captions the vocabulary is built from, in order."""
        return texts_of(self.all_queries)

    def sample_texts(self, seed: int, epoch: int) -> Iterable[str]:
        """At least every text that a training sample of the epoch has; one may come often."""
        return texts_of(Epoch(self, seed, epoch))

    def task(self, seed: int = 0) -> RetrievalTask:
        """What the retrieval test asks, the same at every test: the benchmark's queries, or for the train split random
        training samples."""
        if seed not in self.tasks:
            self.tasks[seed] = self.training_task(seed) if self.split == "train" else self.test_task()
        return self.tasks[seed]

    def test_task(self) -> RetrievalTask:
        """Every query against every image; the target is right."""
        sources, targets = (np.array([query[place] for query in self.all_queries]) for place in (0, 1))
        gallery = np.arange(len(self.images))
        own = np.full(len(sources), -1) if self.keep_source else sources
        return RetrievalTask(gallery, [QuerySet(sources, texts_of(self.all_queries), own,
                                                [Metric("correct_composition", targets, gallery)])])

    def training_task(self, seed: int) -> RetrievalTask:
        """Random training samples against their targets, which are right for each other's queries where they are the
        same image."""
        samples = self.training_samples(seed)
        sources, targets = (np.array([sample[place] for sample in samples]) for place in (0, 1))
        return RetrievalTask(targets, [QuerySet(sources, texts_of(samples), np.full(len(samples), -1),
                                                [Metric("correct_composition", targets, targets)])])

    def training_samples(self, seed: int) -> list[Sample]:
        """The same random samples at every test of a run, from an epoch that no training reaches."""
        epoch = Epoch(self, seed, TEST_EPOCH)
        return [epoch[i] for i in range(min(TRAIN_QUERIES, len(epoch)))]

    def with_means(self, metrics: dict[str, float]) -> dict[str, float]:
        """The retrieval test's metrics, and with them whatever averages the benchmark's papers report."""
        return metrics

    def metric_names(self) -> list[str]:
        """Names of what the retrieval test gives."""
        return list(self.with_means({name: 0.0 for query_set in self.task().query_sets
                                     for metric in query_set.metrics for name in metric.names()}))

    def submission(self, rankings: Iterable[np.ndarray]) -> dict[str, dict]:
        """Of the split `served`: {file name: what its test server takes}. rankings: of each query the images' ids, the
        best first, without its own."""
        raise NotImplementedError

    def visible(self, names: Iterable[str]) -> list[str]:
        """The names in order, but those that are passed over, as the `._0.jpg` that a Mac puts beside 0.jpg and a
        NAS's `@eaDir`: those are counted."""
        names = sorted(names)
        shown = [name for name in names if not is_passed_over(name)]
        if hidden := sum(name.startswith(".") for name in names):
            self.drop("hidden files", hidden)
        if len(shown) + hidden < len(names):
            self.drop("folders of the system's own", len(names) - len(shown) - hidden)
        return shown

    def drop(self, what: str, count: int = 1) -> None:
        self.dropped[what] = self.dropped.get(what, 0) + count

    def refuse_or_drop(self, what: str, complaint: str, count: int = 1) -> None:
        """Bad data: an error, or with `without` given a number in `dropped` and a line in `amiss`."""
        if not self.lenient:
            raise InputError(complaint)
        self.drop(what, count)
        self.amiss.append(complaint)


class Annotation(NamedTuple):
    """A query that somebody wrote, with images by id."""
    source: int
    targets: list[int]                  # any of them is right
    text: str
    negatives: list[int]                # images that should come after all of those
    group: str


class AnnotatedDataset(CompositionDataset):
    """One whose queries were written one by one: `read` fills `lines`, from which it is trained and tested."""

    annotations: list[Annotation]

    def queries(self) -> list[Annotation]:
        return self.annotations

    def sample(self, order: np.ndarray, position: int, key: tuple[int, ...]) -> Sample:
        """A line with one of its targets."""
        line = self.annotations[order[position]]
        return Sample(line.source, pick(np.random.default_rng((*key, 1 + position)), line.targets), line.text)

    def sample_texts(self, seed: int, epoch: int) -> Iterable[str]:
        return texts_of(self.annotations)


class PairDataset(AnnotatedDataset):
    """One of published pairs, a source and its only target. The gallery is all images, the source stays among them."""

    ks = RECALL_KS

    def take(self, pairs: Sequence[tuple[str, str, str]], images: Iterable[str], file: Path) -> None:
        """Fill `images` and `annotations`, less what is to be left out. pairs: (source, target, text) by path below
        root. file: where they stand, for InputError where none is left."""
        self.images = [image for image in images if image not in self.without]
        ids = {image: number for number, image in enumerate(self.images)}
        self.annotations = [Annotation(ids[source], [ids[target]], text, [], "") for source, target, text in pairs
                            if source in ids and target in ids]
        if self.lenient:
            self.drop("pairs", len(pairs) - len(self.annotations))
        if not self.annotations:
            raise InputError(f"no usable pair of the {self.split} split in {file}")

    def test_task(self) -> RetrievalTask:
        sources = np.array([line.source for line in self.annotations])
        targets, gallery = np.array([line.targets[0] for line in self.annotations]), np.arange(len(self.images))
        metric = Metric("correct_composition", targets, gallery, ks=self.ks)
        return RetrievalTask(gallery, [QuerySet(sources, texts_of(self.annotations), np.full(len(sources), -1),
                                                [metric])])


def note_passed_over(splits: Iterable[CompositionDataset]) -> str:
    """What to say of pictures that these splits' benchmark does not read; nothing where there are none."""
    splits = list(splits)
    endings = sum((data.passed_over for data in splits), Counter())
    told = (f"{endings.total()} files end in {' or '.join(sorted(endings))}, which the published protocol does not "
            "read; --any_suffix True reads them") if endings else ""
    unread = {folder: found for data in splits for folder, found in data.unread.items()}    # several have one folder
    return "; ".join(filter(None, (told, tell_of_unread(sum(unread.values(), Counter())))))


def texts_of(queries) -> list[str]:
    return [query.text for query in queries]


def pick(rng: np.random.Generator, choices: list):
    return choices[rng.integers(len(choices))]


def require(path: Path, what: str) -> Path:
    if not path.exists():
        raise InputError(f"{what} not found at {path}; check --dataset_path, data/README.md shows the expected tree")
    return path


def inside(image: str, where: str) -> str:
    """An image path of a label file, refused where it would leave the dataset folder."""
    if not image or image[0] == "/" or "\0" in image or (".." in image and ".." in image.split("/")):
        raise InputError(f"{where}: {image[:80]!r} is no path inside the dataset folder")
    try:
        os.fsencode(image)
    except UnicodeEncodeError:                                                  # JSON can hold half a character
        raise InputError(f"{where}: {image[:80]!r} is no name that a file can have") from None
    return image
