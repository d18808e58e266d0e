"""The benchmarks, and pictures of one's own: which images, captions and queries there are, and how a training pair is
drawn.

A dataset opens no image and knows no model. Image ids are positions in `images`; a training sample depends on
(seed, epoch, position) alone, so any number of loader workers draws the same ones.
"""

import difflib
import fnmatch
import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from machine.errors import InputError
from machine.picture_files import SUFFIXES
from machine.regular_files import open_regular
from machine.tables import read_table

RECALL_KS = (1, 5, 10, 50, 100)
OWN_GALLERY_KS = (10, 50)               # what later papers report on FashionIQ
TEST_EPOCH = 2**32 - 1
LONGEST_LINE = 10_000                   # bytes of a label file's line; published ones have a few hundred
TRAIN_QUERIES = 9600                    # the train split is judged on this many random samples (TIRG's protocol)


class Sample(NamedTuple):
    """One training example: two image ids and the text that leads from one to the other."""
    source: int
    target: int
    text: str


@dataclass
class Judge:
    """One way to count a query's hits: a gallery image is correct when its label equals the query's."""
    name: str                           # recall_top{K}_{name}
    query_labels: np.ndarray            # (Q,) ints
    gallery_labels: np.ndarray          # (N,) ints
    among: np.ndarray | None = None     # gallery positions that are ranked; None = all of them
    ks: tuple[int, ...] = RECALL_KS

    def ranked(self, own: np.ndarray) -> np.ndarray:
        """(Q,) how many images are ranked; own: (Q,) gallery position of the one that is not, -1 for none."""
        among = np.arange(len(self.gallery_labels)) if self.among is None else self.among
        return len(among) - np.isin(own, among)

    def correct(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Each query's correct images, ascending, as places among those that are ranked: query q's are the counts[q]
        from first[q] on of `places`. Returns (places, first, counts)."""
        labels = self.gallery_labels if self.among is None else self.gallery_labels[self.among]
        places = np.argsort(labels, kind="stable")
        ordered = labels[places]
        first = np.searchsorted(ordered, self.query_labels, "left")             # (Q,)
        return places, first, np.searchsorted(ordered, self.query_labels, "right") - first

    def is_right(self, query, positions) -> np.ndarray:
        """Whether images at these gallery positions are correct for a query, or for one query each."""
        return self.gallery_labels[positions] == self.query_labels[query]


@dataclass
class ListedJudge:
    """The same where what is correct is listed for each query, as what it may be found among can be."""
    name: str
    right: list[np.ndarray]             # Q times gallery positions, ascending
    gallery: int                        # N
    candidates: list[np.ndarray] | None = None  # Q times the gallery positions that are ranked; None = all
    ks: tuple[int, ...] = RECALL_KS
    among = None

    def ranked(self, own: np.ndarray) -> np.ndarray:
        if self.candidates is None:
            return self.gallery - (own >= 0)
        return np.array([len(listed) - (mine in listed) for mine, listed in zip(own, self.candidates, strict=True)])

    def correct(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        counts = np.array([len(listed) for listed in self.right])
        return np.concatenate(self.right), np.cumsum(counts) - counts, counts

    def is_right(self, query, positions) -> np.ndarray:
        queries, positions = np.broadcast_arrays(query, positions)
        pairs = zip(queries.tolist(), positions.tolist(), strict=True)
        return np.array([position in self.right[query] for query, position in pairs])


@dataclass
class QuerySet:
    """Queries that are judged alike."""
    sources: np.ndarray                 # (Q,) image ids
    texts: list[str]                    # Q
    own: np.ndarray                     # (Q,) gallery position taken out of the query's ranking; -1 = nothing is
    judges: list[Judge | ListedJudge]


@dataclass
class RetrievalTask:
    """What the retrieval test of a split asks."""
    gallery: np.ndarray                 # (N,) image ids; the train split's may repeat
    query_sets: list[QuerySet]

    @property
    def texts(self) -> list[str]:
        return [text for queries in self.query_sets for text in queries.texts]


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

    path: the benchmark's folder. split: 'train', 'test', or 'validation', the share `held_out` of what is published to
    train on, which 'train' then lacks: whole nouns, products or source images. category: of FashionIQ, 'all' or one of
    its three.
    complete_text: queries say the whole target caption in place of the modification.
    keep_source: a query's own image stays in its ranking, where the benchmark does not say whether it does.
    any_suffix: images are read whatever kind of picture they end as, where the benchmark reads one ending alone.
    without: images to leave out, with all that refers to them; `dropped` then counts what went. None is the strict
    reading: anything amiss raises InputError, with file and line.
    """

    images: list[str]                   # paths below `root`, by image id
    upright = False                     # whether pictures are turned as the camera noted; the published are not
    about = ""                          # what is tested, where the benchmark's name does not say it
    together = 1                        # consecutive samples of an epoch that belong in one batch
    best_metric = "recall_top10_correct_composition"  # by which a run's best checkpoint is chosen

    def __init__(self, path: str | Path, split: str, complete_text: bool = False, category: str = "all",
                 without: frozenset[str] | None = None, held_out: float = 0.0, keep_source: bool = False,
                 any_suffix: bool = False):
        self.keep_source, self.any_suffix = keep_source, any_suffix
        self.root, self.split, self.complete_text, self.category = Path(path), split, complete_text, category
        self.published, self.held_out = "test" if split == "test" else "train", held_out
        self.lenient, self.without = without is not None, without or frozenset()
        self.dropped = {"images": len(self.without)}
        self.passed_over: Counter[str] = Counter()                              # endings of what any_suffix would read
        require(self.root, f"{type(self).__name__} folder")
        self.read()

    @classmethod
    def splits(cls, path: Path, held_out: float) -> list[str]:
        """The splits that a run reads, the one it trains on first."""
        return ["train", *["validation"] * bool(held_out), "test"]

    @cached_property
    def goals(self) -> np.ndarray:
        """(images,) ints, equal for images that are equally right as a target: here each only for itself."""
        return np.arange(len(self.images))

    def has(self, group: str) -> bool:
        """Whether a group of the published split is in this one: which are held out depends on their names alone."""
        if self.published == "test" or not self.held_out:
            return self.split != "validation"
        lot = int.from_bytes(hashlib.sha256(group.encode("utf-8", "surrogatepass")).digest()[:8]) / 2**64
        return (lot < self.held_out) == (self.split == "validation")

    @property
    def paths(self) -> list[str]:
        return [f"{self.root}/{image}" for image in self.images]

    def read(self) -> None:
        """Fill `images` and whatever the split's samples or queries need."""
        raise NotImplementedError

    def queries(self) -> list[Sample]:
        """What the split asks; of the train split, its training samples."""
        raise NotImplementedError

    @cached_property
    def asked(self) -> list[Sample]:
        return self.queries()

    def __len__(self) -> int:
        """Training samples in an epoch."""
        return len(self.asked)

    def sample(self, order: np.ndarray, position: int, key: tuple[int, ...]) -> Sample:
        """The training sample at `position` of an epoch that visits indices in `order`; `key` seeds its choices.

        Further numbers on the key count from 1: a trailing 0 says nothing to numpy, and is the order's own.
        """
        return self.asked[order[position]]

    def training_texts(self) -> list[str]:
        """The captions the vocabulary is built from, in order."""
        return texts_of(self.asked)

    def sample_texts(self, seed: int, epoch: int) -> Iterable[str]:
        """At least every text that a training sample of the epoch has; one may come often."""
        return texts_of(Epoch(self, seed, epoch))

    def task(self, seed: int = 0) -> RetrievalTask:
        """What the retrieval test asks: the benchmark's queries, or for the train split random training samples."""
        return self.training_task(seed) if self.split == "train" else self.test_task()

    def test_task(self) -> RetrievalTask:
        """Every query against every image; the target is right."""
        sources, targets = (np.array([query[place] for query in self.asked]) for place in (0, 1))
        gallery = np.arange(len(self.images))
        own = np.full(len(sources), -1) if self.keep_source else sources
        return RetrievalTask(gallery, [QuerySet(sources, texts_of(self.asked), own,
                                                [Judge("correct_composition", targets, gallery)])])

    def training_task(self, seed: int) -> RetrievalTask:
        """Random training samples against their targets, which are right for each other's queries where they are the
        same image."""
        samples = self.training_samples(seed)
        sources, targets = (np.array([sample[place] for sample in samples]) for place in (0, 1))
        return RetrievalTask(targets, [QuerySet(sources, texts_of(samples), np.full(len(samples), -1),
                                                [Judge("correct_composition", targets, targets)])])

    def training_samples(self, seed: int) -> list[Sample]:
        """The same random samples at every test of a run, from an epoch that no training reaches."""
        epoch = Epoch(self, seed, TEST_EPOCH)
        return [epoch[i] for i in range(min(TRAIN_QUERIES, len(epoch)))]

    def with_means(self, metrics: dict[str, float]) -> dict[str, float]:
        """The retrieval test's metrics, and with them whatever averages the benchmark's papers report."""
        return metrics

    def metrics(self) -> list[str]:
        """Names of what the retrieval test gives."""
        return list(self.with_means({f"recall_top{k}_{judge.name}": 0.0 for asked in self.task().query_sets
                                     for judge in asked.judges for k in judge.ks}))

    def visible(self, names: Iterable[str]) -> list[str]:
        """The names in order, but hidden ones, as the `._0.jpg` that a Mac puts beside 0.jpg: those are counted."""
        names = sorted(names)
        shown = [name for name in names if not name.startswith(".")]
        if len(shown) < len(names):
            self.drop("hidden files", len(names) - len(shown))
        return shown

    def drop(self, what: str, count: int = 1) -> None:
        self.dropped[what] = self.dropped.get(what, 0) + count

    def refuse_or_drop(self, what: str, complaint: str, count: int = 1) -> None:
        """Bad data: an error, or with `without` given a number in `dropped`."""
        if not self.lenient:
            raise InputError(complaint)
        self.drop(what, count)


class CaptionedDataset(CompositionDataset):
    """A benchmark with one caption an image; a hit is any gallery image with the target caption."""

    captions: list[str]                 # by image id

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.test_queries = self.queries() if self.split != "train" else []     # now: a bad one must not wait
        if self.split != "train" and not self.test_queries:
            raise InputError(f"{self.root} gives no {self.split} query; see data/README.md for what the split needs")

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def goals(self) -> np.ndarray:
        return np.unique(self.captions, return_inverse=True)[1]

    def training_texts(self) -> list[str]:
        return self.captions

    def judges(self, query_captions: list[str], gallery_captions: list[str]) -> list[Judge]:
        return [Judge("correct_composition", *integer_labels(query_captions, gallery_captions))]

    def test_task(self) -> RetrievalTask:
        sources = np.array([query.source for query in self.test_queries])
        judges = self.judges([self.captions[query.target] for query in self.test_queries], self.captions)
        # The gallery is every image, so a query's own image stands at its id, and is taken out.
        asked = QuerySet(sources, texts_of(self.test_queries), sources, judges)
        return RetrievalTask(np.arange(len(self.images)), [asked])

    def training_task(self, seed: int) -> RetrievalTask:
        samples = self.training_samples(seed)
        goals = [self.captions[sample.target] for sample in samples]
        query_set = QuerySet(np.array([sample.source for sample in samples]), texts_of(samples),
                             np.full(len(samples), -1), self.judges(goals, goals))
        return RetrievalTask(np.array([sample.target for sample in samples]), [query_set])


MITSTATES_TEST_NOUNS = frozenset("""
armor bracelet bush camera candy castle ceramic cheese clock clothes coffee fan fig fish foam forest fruit furniture
garden gate glass horse island laptop lead lightning mirror orange paint persimmon plastic plate potato road rubber
sand shell sky smoke steel stream table tea tomato vacuum wax wheel window wool
""".split())


class MITStates(CaptionedDataset):
    """images/<adjective> <noun>/*.jpg; the text is the target's adjective, the split goes by noun."""

    together = 2                        # one source, two targets

    def read(self) -> None:
        self.images, self.captions = [], []
        for folder in self.visible(os.listdir(require(self.root / "images", "image folder"))):
            adjective, _, noun = folder.partition(" ")
            published = "test" if noun in MITSTATES_TEST_NOUNS else "train"
            if not noun or adjective == "adj" or published != self.published or not self.has(noun):
                continue
            if not (self.root / "images" / folder).is_dir():
                self.drop("files beside the folders of images")
                continue
            names = self.pictures(self.visible(os.listdir(self.root / "images" / folder)))
            if not names:
                kind = "image" if self.any_suffix else ".jpg (--any_suffix True reads others)"
                self.refuse_or_drop("empty folders", f"{self.root / 'images' / folder} holds no {kind}; put its images "
                                    "back, remove the folder, or pass --skip_bad_images True")
            kept = [image for name in names if (image := f"images/{folder}/{name}") not in self.without]
            self.images += kept
            self.captions += [folder] * len(kept)
        self.index()
        if self.split == "train" and (single := [noun for noun, states in self.states.items() if len(states) < 2]):
            self.drop_single_state_nouns(single)
        if not self.images:
            raise InputError(f"no '<adjective> <noun>' folder of the {self.split} split with a usable image under "
                             f"{self.root / 'images'}; data/README.md shows the expected tree")

    def pictures(self, names: list[str]) -> list[str]:
        """The names that end in .jpg, or with `any_suffix` as any picture does; others are counted."""
        pictures = [name for name in names if name.lower().endswith(SUFFIXES)]
        kept = pictures if self.any_suffix else [name for name in names if name.endswith(".jpg")]
        if len(kept) < len(names):
            self.drop(f"files that do not end {'as pictures do' if self.any_suffix else 'in .jpg'}",
                      len(names) - len(kept))
        self.passed_over.update(os.path.splitext(name)[1] for name in set(pictures).difference(kept))
        return kept

    def index(self) -> None:
        """noun -> adjective -> image ids."""
        self.states: dict[str, dict[str, list[int]]] = {}
        for image, caption in enumerate(self.captions):
            adjective, _, noun = caption.partition(" ")
            self.states.setdefault(noun, {}).setdefault(adjective, []).append(image)

    def drop_single_state_nouns(self, nouns: list[str]) -> None:
        self.refuse_or_drop("nouns with one adjective", f"the noun {nouns[0]!r} has images of one adjective only under "
                            f"{self.root / 'images'}, so no pair can be drawn for it; add a second state, remove the "
                            "folder, or pass --skip_bad_images True", len(nouns))
        gone = set(nouns)
        kept = [i for i, caption in enumerate(self.captions) if caption.partition(" ")[2] not in gone]
        self.drop("images of those nouns", len(self.images) - len(kept))
        self.images, self.captions = [self.images[i] for i in kept], [self.captions[i] for i in kept]
        self.index()

    def text(self, target_caption: str) -> str:
        return target_caption if self.complete_text else target_caption.partition(" ")[0]

    def sample(self, order: np.ndarray, position: int, key: tuple[int, ...]) -> Sample:
        """Consecutive positions form a pair: one source, two targets of its noun with different adjectives."""
        source = int(order[position - position % 2])
        rng = np.random.default_rng((*key, 1 + position // 2))
        states = list(self.states[self.captions[source].partition(" ")[2]].values())
        first, second = rng.integers(len(states)), rng.integers(len(states) - 1)
        chosen = (states[first], states[second + (second >= first)])            # a target may have the source's state
        target = [pick(rng, images) for images in chosen][position % 2]         # both drawn: each knows of the other
        return Sample(source, target, self.text(self.captions[target]))

    def sample_texts(self, seed: int, epoch: int) -> Iterable[str]:
        return map(self.text, dict.fromkeys(self.captions))

    def queries(self) -> list[Sample]:
        """Every image with every other adjective of its noun."""
        queries = []
        for source, caption in enumerate(self.captions):
            adjective, _, noun = caption.partition(" ")
            queries += [Sample(source, images[0], self.text(f"{other} {noun}"))
                        for other, images in self.states[noun].items() if other != adjective]
        return queries

    def judges(self, query_captions: list[str], gallery_captions: list[str]) -> list[Judge]:
        """Also the adjective and the noun alone."""
        words = [[[caption.partition(" ")[part] for caption in captions] for part in (0, 2)]
                 for captions in (query_captions, gallery_captions)]
        return [*super().judges(query_captions, gallery_captions),
                *(Judge(f"correct_{name}", *integer_labels(words[0][part], words[1][part]))
                  for part, name in enumerate(("adj", "noun")))]


class Fashion200k(CaptionedDataset):
    """Captions that become equal once a word is dropped are siblings; the text is 'replace A with B'."""

    def read(self) -> None:
        self.images, self.captions = [], []
        names = fnmatch.filter(os.listdir(require(self.root / "labels", "label folder")), f"*{self.published}*.txt")
        labels = [self.root / "labels" / name for name in self.visible(names)]
        if not labels:
            raise InputError(f"no label file *{self.published}*.txt in {self.root / 'labels'}; data/README.md shows "
                             "the expected tree")
        for file in labels:
            for number, line in read_lines(file):
                image, caption = self.parse_label(line, f"{file}, line {number}")
                if image not in self.without and self.has(product(image)):
                    self.images.append(image)
                    self.captions.append(caption)
        if not self.images:
            raise InputError(f"the label files *{self.published}*.txt in {self.root / 'labels'} name no usable image "
                             f"of the {self.split} split")
        if self.published == "train":
            self.find_siblings()

    @staticmethod
    def parse_label(line: str, where: str) -> tuple[str, str]:
        fields = line.split("\t")
        if len(fields) != 3 or not fields[2].strip():
            raise InputError(f"{where}: expected 'path<TAB>detection score<TAB>caption', got {line[:80]!r}; mend the "
                             "line or remove it")
        return inside(fields[0].strip(), where), clean_caption(fields[2])

    def find_siblings(self) -> None:
        """Parents with at least two children -> those; captions -> such parents; captions -> image ids."""
        self.images_of: dict[str, list[int]] = {}
        for image, caption in enumerate(self.captions):
            self.images_of.setdefault(caption, []).append(image)
        self.children: dict[str, list[str]] = {}
        eldest: dict[str, str] = {}                                             # most parents never have a second child
        for caption in self.images_of:
            for parent in parent_captions(caption):
                if (first := eldest.setdefault(parent, caption)) is not caption:
                    self.children.setdefault(parent, [first]).append(caption)
        self.parents: dict[str, list[str]] = {}
        for parent, children in self.children.items():
            for child in children:
                self.parents.setdefault(child, []).append(parent)
        self.modifiable = [image for image, caption in enumerate(self.captions) if caption in self.parents]
        if not self.modifiable:
            raise InputError(f"no two captions of the {self.split} split in {self.root / 'labels'} differ by one "
                             "word, so no pair can be drawn")

    def text(self, source: str, target: str) -> str:
        """The whole target caption, or the first word of either caption that the other one has not."""
        if self.complete_text:
            return target
        old, new = source.split(), target.split()
        removed = next((word for word in old if word not in new), old[-1])
        added = next((word for word in new if word not in old), new[-1])
        return f"replace {removed} with {added}"

    def sample(self, order: np.ndarray, position: int, key: tuple[int, ...]) -> Sample:
        """The source at this position, or a random modifiable one in its place, to a random sibling's random image."""
        rng, source = np.random.default_rng((*key, 1 + position)), int(order[position])
        if self.captions[source] not in self.parents:
            source = pick(rng, self.modifiable)
        caption = self.captions[source]
        sibling = caption
        while sibling == caption:                                               # both drawn anew, as the original does
            sibling = pick(rng, self.children[pick(rng, self.parents[caption])])
        target = pick(rng, self.images_of[sibling])
        return Sample(source, target, self.text(self.captions[source], self.captions[target]))

    def sample_texts(self, seed: int, epoch: int) -> Iterable[str]:
        """All captions that can be a target; but of 'replace A with B' those drawn, as the possible are millions."""
        return self.parents if self.complete_text else texts_of(Epoch(self, seed, epoch))

    def queries(self) -> list[Sample]:
        """The lines of test_queries.txt; of the validation split, a training sample from each of its images."""
        if self.split == "validation":
            sources = np.array(self.modifiable[:TRAIN_QUERIES])
            return [self.sample(sources, position, (0, TEST_EPOCH)) for position in range(len(sources))]
        file, ids = self.root / "test_queries.txt", {image: i for i, image in enumerate(self.images)}
        queries = []
        for number, line in read_lines(require(file, "query file")):
            pair = line.split()
            if len(pair) != 2:
                raise InputError(f"{file}, line {number}: expected 'source_path target_path', got {line[:80]!r}")
            for image in pair:
                if image not in ids and image not in self.without:
                    raise InputError(f"{file}, line {number}: {image} is in no label file of the test split; mend the "
                                     "line or the labels")
            if all(image in ids for image in pair):
                source, target = ids[pair[0]], ids[pair[1]]
                queries.append(Sample(source, target, self.text(self.captions[source], self.captions[target])))
            else:
                self.drop("queries")
        return queries


class Triplet(NamedTuple):
    """A FashionIQ annotation."""
    category: str
    source: int
    target: int
    text: str


class FashionIQ(CompositionDataset):
    """Annotated triplets; the test split is the published validation split, a hit is the target image itself.

    The text is the two captions joined, which is also what the original calls the target caption.
    """

    CATEGORIES = ("dress", "shirt", "toptee")
    best_metric = "recall_mean_own_gallery"
    FOLDERS, ENDINGS = ("all_imgs", "images", "img"), (".jpg", ".png", ".jpeg")

    def read(self) -> None:
        self.categories = self.CATEGORIES if self.category == "all" else (self.category,)
        self.split_ids = {category: self.read_split(category) for category in self.categories}
        annotations = [entry for category in self.categories for entry in self.read_captions(category)
                       if self.has(entry[1])]
        used = [name for _, source, target, _ in annotations for name in (source, target)]
        # Training needs the annotated images only (25,136 of the published 45,429); the test ranks all of its split.
        names = used if self.published == "train" else [name for ids in self.split_ids.values() for name in ids]
        folder, files = self.image_files()
        kept = [(name, image) for name in dict.fromkeys(names)
                if (image := files.get(name, f"{folder}/{name}.jpg")) not in self.without]
        self.images = [image for _, image in kept]
        self.ids = {name: i for i, (name, _) in enumerate(kept)}
        whole = [entry for entry in annotations if entry[1] in self.ids and entry[2] in self.ids]
        if self.lenient:
            self.drop("triplets", len(annotations) - len(whole))
        self.triplets = [Triplet(category, self.ids[source], self.ids[target], text)
                         for category, source, target, text in whole]
        if not self.triplets:
            raise InputError(f"no usable triplet of the {self.split} split in the cap.*.{self.files}.json files of "
                             f"{self.root / 'captions'}")

    @property
    def files(self) -> str:
        """What the published files of this split are called by."""
        return "val" if self.published == "test" else "train"

    def image_files(self) -> tuple[str, dict[str, str]]:
        """The first of the three customary folders that is there, and id -> path below root of what all of them hold,
        also in folders of their own, as images/dress/; of several images of an id the first."""
        there = [name for name in self.FOLDERS if (self.root / name).is_dir()]
        if not there:
            raise InputError(f"no image folder under {self.root}: expected one of {', '.join(self.FOLDERS)}; "
                             "data/README.md shows the expected tree")
        files: dict[str, str] = {}
        for top in there:
            folders = [top]
            for folder in folders:                                              # the first of them finds the others
                for name in self.visible(os.listdir(self.root / folder)):
                    stem, ending = os.path.splitext(name)
                    if ending.lower() in self.ENDINGS:
                        files.setdefault(stem, f"{folder}/{name}")
                    elif folder == top and (self.root / folder / name).is_dir():
                        folders.append(f"{folder}/{name}")
        return there[0], files

    def read_split(self, category: str) -> list[str]:
        file = self.root / "image_splits" / f"split.{category}.{self.files}.json"
        ids = read_json(require(file, "split file"))
        if not isinstance(ids, list) or not all(isinstance(name, str) for name in ids):
            raise InputError(f"{file}: expected a JSON list of image ids")
        return [inside(name, str(file)) for name in dict.fromkeys(ids)]

    def read_captions(self, category: str) -> Iterator[tuple[str, str, str, str]]:
        """(category, source id, target id, text) of each annotation."""
        file = self.root / "captions" / f"cap.{category}.{self.files}.json"
        entries, known = read_json(require(file, "caption file")), set(self.split_ids[category])
        for number, entry in enumerate(entries if isinstance(entries, list) else [entries], start=1):
            where = f"{file}, entry {number}"
            if not is_annotation(entry):
                raise InputError(f"{where}: expected {{'candidate': id, 'target': id, 'captions': [text, text]}}, got "
                                 f"{str(entry)[:80]!r}")
            for name in (entry["candidate"], entry["target"]):
                if name not in known:
                    raise InputError(f"{where}: image {name!r} is not in split.{category}.{self.files}.json")
            if self.category == "all":
                text = f"{category} " + " and it ".join(entry["captions"])
            else:
                text = " ".join(entry["captions"])
            yield category, entry["candidate"], entry["target"], text.lower()

    def __len__(self) -> int:
        return len(self.triplets)

    def sample(self, order: np.ndarray, position: int, key: tuple[int, ...]) -> Sample:
        return Sample(*self.triplets[order[position]][1:])

    def training_texts(self) -> list[str]:
        return texts_of(self.triplets)

    def sample_texts(self, seed: int, epoch: int) -> Iterable[str]:
        return texts_of(self.triplets)

    def test_task(self) -> RetrievalTask:
        positions = {category: np.array([self.ids[name] for name in self.split_ids[category] if name in self.ids])
                     for category in self.categories}
        return self.triplet_task(self.triplets, np.arange(len(self.images)), positions)

    def training_task(self, seed: int) -> RetrievalTask:
        epoch = Epoch(self, seed, TEST_EPOCH)
        triplets = [self.triplets[index] for index in epoch.order[:TRAIN_QUERIES]]
        positions = {category: np.array([i for i, triplet in enumerate(triplets) if triplet.category == category])
                     for category in self.categories}
        return self.triplet_task(triplets, np.array([triplet.target for triplet in triplets]), positions)

    def triplet_task(self, triplets: list[Triplet], gallery: np.ndarray, positions: dict) -> RetrievalTask:
        """Each category judged in the merged gallery (the paper) and in its own (later papers); the source stays in."""
        query_sets = []
        for category in self.categories:
            asked = [triplet for triplet in triplets if triplet.category == category]
            if not asked:
                continue
            targets = np.array([triplet.target for triplet in asked])
            judges = [Judge(f"correct_{category}", targets, gallery),
                      Judge(f"own_gallery_{category}", targets, gallery, among=positions[category],
                            ks=OWN_GALLERY_KS)]
            query_sets.append(QuerySet(np.array([triplet.source for triplet in asked]), texts_of(asked),
                                       np.full(len(asked), -1), judges))
        return RetrievalTask(gallery, query_sets)


    def with_means(self, metrics: dict[str, float]) -> dict[str, float]:
        """Later papers' summary: own-gallery R@10 and R@50 averaged over the categories, and the mean of the two."""
        means = {f"recall_top{k}_own_gallery_mean": float(np.mean([
            value for name, value in metrics.items() if name.startswith(f"recall_top{k}_own_gallery_")]))
            for k in OWN_GALLERY_KS}
        return {**metrics, **means, "recall_mean_own_gallery": float(np.mean(list(means.values())))}


class CIRR(CompositionDataset):
    """Annotated pairs of NLVR2's photographs (arXiv 2108.04024), release rc2; the test split is the published
    validation split.

    Queries are judged among all of the split's images but the reference, and among the five others of its set of six
    alike images; `recall_mean` is that of the former's R@5 and the latter's R@1, by which models are ranked.
    """

    best_metric = "recall_mean"
    FOLDERS = "img_raw", "images", "."                                          # where the split file's paths start
    KS, SUBSET_KS = (1, 5, 10, 50), (1, 2, 3)

    def read(self) -> None:
        if self.complete_text:
            raise InputError("CIRR has no captions of its targets: drop --use_complete_text_query")
        self.files = "val" if self.published == "test" else "train"
        places, entries = self.read_split(), [entry for entry in self.read_captions() if self.has(entry["reference"])]
        used = [name for entry in entries for name in (entry["reference"], entry["target_hard"])]
        names = dict.fromkeys(used if self.published == "train" else places)
        kept = {name: places[name] for name in names if places[name] not in self.without}
        self.images, ids = list(kept.values()), {name: image for image, name in enumerate(kept)}
        whole = [entry for entry in entries if entry["reference"] in ids and entry["target_hard"] in ids]
        if self.lenient:
            self.drop("pairs", len(entries) - len(whole))
        self.lines = [Line(ids[entry["reference"]], [ids[entry["target_hard"]]], entry["caption"],
                           sorted({ids[name] for name in entry["img_set"]["members"] if name in ids}
                                  - {ids[entry["reference"]], ids[entry["target_hard"]]}), "") for entry in whole]
        if not self.lines:
            raise InputError(f"no usable pair of the {self.split} split in {self.root / 'captions'}")

    def read_split(self) -> dict[str, str]:
        """Image id -> path below root."""
        file = self.root / "image_splits" / f"split.rc2.{self.files}.json"
        places = read_json(require(file, "split file"))
        if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
            raise InputError(f"{file}: expected a JSON object of image ids and paths")
        folder = next(name for name in self.FOLDERS if (self.root / name).is_dir())
        return {name: os.path.normpath(f"{folder}/{inside(os.path.normpath(place), str(file))}")
                for name, place in places.items()}

    def read_captions(self) -> list[dict]:
        file = self.root / "captions" / f"cap.rc2.{self.files}.json"
        entries, known = read_json(require(file, "caption file")), self.read_split()
        for number, entry in enumerate(entries if isinstance(entries, list) else [entries], start=1):
            where = f"{file}, entry {number}"
            if not is_pair(entry):
                raise InputError(f"{where}: expected {{'reference': id, 'target_hard': id, 'caption': text, 'img_set': "
                                 f"{{'members': [id, ...]}}}}, got {str(entry)[:80]!r}")
            for name in (entry["reference"], entry["target_hard"], *entry["img_set"]["members"]):
                if name not in known:
                    raise InputError(f"{where}: image {name[:80]!r} is not in split.rc2.{self.files}.json")
        return entries

    def queries(self) -> list["Line"]:
        return self.lines

    def sample(self, order: np.ndarray, position: int, key: tuple[int, ...]) -> Sample:
        line = self.lines[order[position]]
        return Sample(line.source, line.targets[0], line.text)

    def sample_texts(self, seed: int, epoch: int) -> Iterable[str]:
        return texts_of(self.lines)

    def test_task(self) -> RetrievalTask:
        sources, gallery = np.array([line.source for line in self.lines]), len(self.images)
        right = [np.array(line.targets) for line in self.lines]
        subsets = [np.array(sorted([*line.targets, *line.negatives])) for line in self.lines]
        judges = [ListedJudge("correct_composition", right, gallery, None, self.KS),
                  ListedJudge("subset", right, gallery, subsets, self.SUBSET_KS)]
        return RetrievalTask(np.arange(gallery), [QuerySet(sources, texts_of(self.lines), sources, judges)])

    def with_means(self, metrics: dict[str, float]) -> dict[str, float]:
        parts = [metrics.get(name) for name in ("recall_top5_correct_composition", "recall_top1_subset")]
        return metrics if None in parts else {**metrics, "recall_mean": sum(parts) / 2}


class Line(NamedTuple):
    """A line of a table of triplets, with images by id."""
    source: int
    targets: list[int]                  # any of them is right
    text: str
    negatives: list[int]                # images that should come after all of those
    group: str


class Triplets(CompositionDataset):
    """Pictures of one's own: train/metadata.jsonl and test/metadata.jsonl (or .csv) beside their images, or one table
    at the top with a column `split`, or without it and a share held out.

    A line has source_file_name, text, and target_file_name or target_file_names, several being right; it may have
    negative_file_names, group and target_caption. File names count from the table's folder; in a .csv several stand
    in one value with | between them. Gallery: every image of the folder, or those that its gallery.txt lists.
    """

    upright = True
    TABLES = "metadata.jsonl", "metadata.csv"
    CACHE, MOST_GROUPS = "image_cache", 50

    @classmethod
    def table(cls, folder: Path) -> Path | None:
        found = [folder / name for name in cls.TABLES if (folder / name).is_file()]
        if len(found) > 1:
            raise InputError(f"{folder} has both {' and '.join(cls.TABLES)}; remove the one that is not meant")
        return found[0] if found else None

    @classmethod
    def rows(cls, root: Path) -> dict[str, list[tuple[Path, str, dict]]]:
        """{split: [(folder of the table, where a line stands, its row)]}."""
        require(root, "folder")
        names = "train", "validation", "test"
        tables = {split: cls.table(root / split) for split in names}
        top, found = cls.table(root), {}
        if top and any(tables.values()):
            raise InputError(f"{top} and {next(filter(None, tables.values()))} are two ways to say it; remove one")
        for split, table in tables.items():
            if table:
                found[split] = [(root / split, where, row) for where, row in read_table(table)]
        for where, row in read_table(top) if top else ():
            split = str(row.get("split") or "train").strip().lower()            # a blank cell is train's
            if split not in names:
                raise InputError(f"{where}: split is {split[:40]!r}; expected {', '.join(names)}")
            found.setdefault(split, []).append((root, where, row))
        if not found:
            raise InputError(f"neither {root} nor {root / 'train'} has a {' or '.join(cls.TABLES)} with a line in it; "
                             "docs/your-own-pictures.md shows what it looks like")
        return found

    @classmethod
    def splits(cls, path: Path, held_out: float) -> list[str]:
        found = cls.rows(path)
        if held_out and "validation" in found:
            raise InputError(f"{path} has a validation split of its own: drop --validation")
        if not held_out and found.keys() == {"train"}:
            raise InputError(f"{path} has no test split, neither a folder test nor a column split: pass "
                             "--validation 0.1 to hold out a tenth of the source images and test on them")
        return ["train", *["validation"] * ("validation" in found or held_out > 0), *["test"] * ("test" in found)]

    def read(self) -> None:
        rows = self.rows(self.root)
        own = self.split if self.split in rows else self.published              # what is held out is train's
        lines = rows.get(own, [])
        if not lines:
            raise InputError(f"{self.root} has no {own} split, neither a folder {own} with a table nor lines of it")
        folder = lines[0][0]
        self.below = "" if folder == self.root else f"{folder.name}/"
        self.there = images_below(folder, self.CACHE)
        known, parsed = set(self.there), []
        for _, where, row in lines:
            entry = self.parse(row, where)
            if own == self.split == "validation" or self.has(entry.source):
                if missing := [name for name in (entry.source, *entry.targets, *entry.negatives) if name not in known]:
                    self.refuse_or_drop("triplets whose images are missing", self.not_there(folder, missing[0], where))
                else:
                    parsed.append((where, entry))
        listed = self.listed(folder, known)
        self.collect(parsed, listed)
        if not self.lines:
            raise InputError(f"no usable line of the {self.split} split in {self.table(folder)}" + (
                ": --validation holds out by source image, give a larger share" if self.held_out else ""))
        if self.split != "train":
            self.tell(folder, listed)

    def parse(self, row: dict, where: str) -> "Entry":
        def value(name: str) -> str:
            found = row.get(name) or ""
            if not isinstance(found, str):
                raise InputError(f"{where}: {name} is {str(found)[:40]!r}; expected a string")
            return found.strip()

        def files(name: str) -> list[str]:
            found = row.get(f"{name}s") or row.get(name) or []
            several = found.split("|") if isinstance(found, str) else found
            if not isinstance(several, list) or not all(isinstance(file, str) for file in several):
                raise InputError(f"{where}: {name}s is {str(found)[:40]!r}; expected a list of file names")
            return [inside(os.path.normpath(file.strip()), where) for file in several if file.strip()]
        sources, targets, text = files("source_file_name"), files("target_file_name"), value("text")
        if self.complete_text and not value("target_caption"):
            raise InputError(f"{where}: no target_caption, which --use_complete_text_query asks with; add it, or drop "
                             "the flag")
        for name, found in (("source_file_name", sources), ("target_file_name", targets), ("text", text)):
            if not found:
                raise InputError(f"{where}: no {name} (it has {', '.join(map(str, row)) or 'no column'}); each line "
                                 "needs source_file_name, target_file_name and text")
        if len(sources) > 1:
            raise InputError(f"{where}: {len(sources)} sources; a query has one picture")
        if not self.keep_source and sources[0] in targets:
            raise InputError(f"{where}: the target is the source itself, which is left out of its ranking; mend the "
                             "line, or pass --keep_source True")
        negatives = files("negative_file_name")
        if twice := set(negatives) & set(targets):
            raise InputError(f"{where}: {twice.pop()} is both right and wrong; take it out of one list")
        return Entry(sources[0], targets, value("target_caption") if self.complete_text else text, negatives,
                     value("group"), value("target_caption"))

    def not_there(self, folder: Path, name: str, where: str) -> str:
        if os.path.exists(folder / name):
            return (f"{where}: {name} does not end as a picture does ({', '.join(SUFFIXES)}); save it as one of these")
        alike = [other for other in self.there if other.lower() == name.lower()]    # as IMG_1.JPG and img_1.jpg
        close = alike or difflib.get_close_matches(name, self.there, 1)
        nearest = f"; is {close[0]} meant?" if close else ""
        return (f"{where}: {name} is not in {folder}{nearest}; mend the line, put the picture there, or pass "
                "--skip_bad_images True to leave such lines out")

    def listed(self, folder: Path, known: set[str]) -> list[str]:
        """The gallery's file names; empty where all of the folder's images are in it."""
        names, file = [], folder / "gallery.txt"
        if self.split == "train" or not os.path.lexists(file):
            return names
        for number, line in read_lines(file):
            where = f"{file}, line {number}"
            name = inside(os.path.normpath(line.strip()), where)
            if name in known:
                names.append(name)
            else:
                self.refuse_or_drop("lines of gallery.txt", self.not_there(folder, name, where))
        return list(dict.fromkeys(names))

    def collect(self, parsed: list[tuple[str, "Entry"]], listed: list[str]) -> None:
        """Ids for the gallery's images, then for sources that are not in it; of the train split, for what is used."""
        used = [name for _, entry in parsed for name in (entry.source, *entry.targets, *entry.negatives)]
        gallery = used if self.split == "train" else listed or self.there
        here = [name for name in dict.fromkeys(gallery) if self.below + name not in self.without]
        ids = {name: image for image, name in enumerate(here)}
        self.gallery, self.lines, self.captions = len(here), [], {}
        for where, entry in parsed:
            if self.below + entry.source in self.without:
                self.drop("triplets whose images are broken")
                continue
            for name in (*entry.targets, *entry.negatives):
                if name not in ids and self.below + name not in self.without:
                    raise InputError(f"{where}: {name} is not in gallery.txt, so it can never be found; add it there, "
                                     "or mend the line")
            targets, negatives = ([ids[name] for name in dict.fromkeys(names) if name in ids]
                                  for names in (entry.targets, entry.negatives))
            if not targets:
                self.drop("triplets whose images are broken")
                continue
            source = ids.setdefault(entry.source, len(ids))
            self.lines.append(Line(source, sorted(targets), entry.text, sorted(negatives), entry.group))
            self.captions.update(dict.fromkeys(targets, entry.caption) if entry.caption else {})
        self.images = [self.below + name for name in ids]
        groups = list(dict.fromkeys(line.group for line in self.lines if line.group))
        if len(groups) > self.MOST_GROUPS:
            raise InputError(f"{len(groups)} groups, of which each is tested apart; {self.MOST_GROUPS} are the most. A "
                             "group is a category, as dress or shoe")
        self.groups = groups

    def tell(self, folder: Path, listed: list[str]) -> None:
        """Fill `about`."""
        right = [len(line.targets) for line in self.lines]
        span = str(right[0]) if len(set(right)) == 1 else f"{min(right)} to {max(right)}"
        self.about = (f"{self.split} split: {len(self.lines)} queries with {span} right of {self.gallery} images in "
                      f"the gallery, {'those of gallery.txt' if listed else f'all of {folder}'}; a query's "
                      f"source {'stays in' if self.keep_source else 'is left out of'} its ranking")
        if self.split == "validation" and self.held_out:
            self.about += (f"; these are the lines of a share of {self.held_out:g} of the source images, held out, "
                           "whose targets may be training's too")

    def queries(self) -> list[Line]:
        return self.lines

    @cached_property
    def goals(self) -> np.ndarray:
        """Images are equally right where they have the same target_caption."""
        labels = [self.captions.get(image, f"\0{image}") for image in range(len(self.images))]
        return np.unique(labels, return_inverse=True)[1]

    def sample(self, order: np.ndarray, position: int, key: tuple[int, ...]) -> Sample:
        """A line with one of its targets."""
        line = self.lines[order[position]]
        return Sample(line.source, pick(np.random.default_rng((*key, 1 + position)), line.targets), line.text)

    def sample_texts(self, seed: int, epoch: int) -> Iterable[str]:
        return texts_of(self.lines)

    def test_task(self) -> RetrievalTask:
        """All queries in the whole gallery; those of a group among the images that its lines name; and those with
        negatives among these and what is right, as in CIRR's subsets."""
        def asked(lines: list[Line], judge: Judge | ListedJudge) -> QuerySet:
            sources = np.array([line.source for line in lines])
            own = np.where((sources < self.gallery) & (not self.keep_source), sources, -1)
            return QuerySet(sources, texts_of(lines), own, [judge])

        def listed(name: str, lines: list[Line], candidates: list | None = None, ks=RECALL_KS) -> ListedJudge:
            return ListedJudge(name, [np.array(line.targets) for line in lines], self.gallery, candidates, ks)
        sets = [asked(self.lines, listed("correct_composition", self.lines))]
        for group in self.groups:
            lines = [line for line in self.lines if line.group == group]
            named = {image for line in lines for image in (line.source, *line.targets, *line.negatives)}
            own_gallery = np.array(sorted(image for image in named if image < self.gallery))
            sets.append(asked(lines, listed(f"own_gallery_{group}", lines, [own_gallery] * len(lines))))
        if lines := [line for line in self.lines if line.negatives]:
            candidates = [np.array(sorted({*line.targets, *line.negatives})) for line in lines]
            sets.append(asked(lines, listed("among_negatives", lines, candidates, (1, 2, 3))))
        return RetrievalTask(np.arange(self.gallery), sets)


class Entry(NamedTuple):
    """A line of a table of triplets as it is read, with images by file name."""
    source: str
    targets: list[str]
    text: str
    negatives: list[str]
    group: str
    caption: str


def images_below(folder: Path, but: str) -> list[str]:
    """Names, below the folder, of all files that end as pictures do, in order; not hidden ones, nor a folder `but`."""
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != but)
        start = os.path.relpath(place, folder)
        found += [os.path.normpath(os.path.join(start, name)) for name in sorted(files)
                  if not name.startswith(".") and name.lower().endswith(SUFFIXES)]
    return found


DATASETS = {"mitstates": MITStates, "fashion200k": Fashion200k, "fashionIQ": FashionIQ, "cirr": CIRR,
            "triplets": Triplets}


def tell_of_passed_over(splits: Iterable[CompositionDataset]) -> str:
    """What to say of pictures that these splits' benchmark does not read; nothing where there are none."""
    endings = sum((data.passed_over for data in splits), Counter())
    return (f"{endings.total()} files end in {' or '.join(sorted(endings))}, which the published protocol does not "
            "read; --any_suffix True reads them") if endings else ""


def texts_of(queries) -> list[str]:
    return [query.text for query in queries]


def pick(rng: np.random.Generator, choices: list):
    return choices[rng.integers(len(choices))]


def integer_labels(query_values: list[str], gallery_values: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The same small integer for the same value in both lists."""
    number: dict[str, int] = {}
    return tuple(np.array([number.setdefault(value, len(number)) for value in values])
                 for values in (query_values, gallery_values))


def clean_caption(caption: str) -> str:
    """Marks for the four characters that Fashion200k's captions use as words."""
    for character, word in ((".", "dotmark"), ("?", "questionmark"), ("&", "andmark"), ("*", "starmark")):
        caption = caption.replace(character, word)
    return caption.strip()


def product(image: str) -> str:
    """What a Fashion200k image shows, by its folder: 51727804 of women/dresses/day_dresses/51727804/51727804_0.jpeg."""
    return image.split("/")[-2:][0]


def parent_captions(caption: str) -> list[str]:
    """The caption less each of its words in turn.

    A word goes wherever its letters stand, also inside longer words: that defines the published training pairs.
    """
    return list(dict.fromkeys(caption.replace(word, "").replace("  ", " ").strip() for word in caption.split()))


def is_annotation(entry) -> bool:
    """Whether a FashionIQ caption file's entry has what it should."""
    if not isinstance(entry, dict) or not isinstance(entry.get("captions"), list):
        return False
    return all(isinstance(text, str) for text in (entry.get("candidate"), entry.get("target"), *entry["captions"]))


def is_pair(entry) -> bool:
    """Whether a CIRR caption file's entry has what it should."""
    if not isinstance(entry, dict) or not isinstance(entry.get("img_set"), dict):
        return False
    members = entry["img_set"].get("members")
    return isinstance(members, list) and all(isinstance(text, str) for text in (
        entry.get("reference"), entry.get("target_hard"), entry.get("caption"), *members))


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


def opened(file: Path) -> BinaryIO:
    try:
        return open_regular(file)
    except OSError as error:
        raise InputError(f"cannot read {file} ({error.strerror}); it must be a file that this user may read") from None


def read_lines(file: Path) -> Iterator[tuple[int, str]]:
    """(line number, line) of each line that is not blank."""
    with io.BufferedReader(opened(file)) as lines:
        for number, line in enumerate(lines, start=1):
            if len(line) > LONGEST_LINE:
                raise InputError(f"{file}, line {number}: {len(line)} bytes long, which no label is; download the file "
                                 "again")
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip("\r\n")
            except UnicodeDecodeError:
                raise InputError(f"{file}, line {number}: not UTF-8 text; save the file as UTF-8") from None
            if text.strip():
                yield number, text


def read_json(file: Path):
    with opened(file) as content:
        text = content.read()
    try:
        return json.loads(text)                                                 # also with a byte-order mark
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not valid JSON ({error}); download it again") from None
