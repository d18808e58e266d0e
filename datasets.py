"""The benchmarks: which images, captions and queries they hold, and how a training pair is drawn; and all datasets by
name.
"""

import fnmatch
import os
from collections.abc import Iterable, Iterator
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from benchmarks.base import (
    TEST_EPOCH,
    TRAIN_QUERIES,
    CompositionDataset,
    Epoch,
    QuerySet,
    RetrievalTask,
    Sample,
    Ways,
    inside,
    pick,
    require,
    texts_of,
)
from benchmarks.captions import Captions
from benchmarks.circo import CIRCO
from benchmarks.cirr import CIRR
from benchmarks.genecis import GeneCIS
from benchmarks.imagenet_r import ImageNetR
from benchmarks.lasco import LaSCo
from benchmarks.metrics import MAP_KS, Metric
from benchmarks.pictures import Pictures
from benchmarks.shoes import Shoes
from benchmarks.texts import Texts
from benchmarks.triplets import Triplets
from machine.errors import InputError
from machine.picture_files import SUFFIXES
from machine.text_files import read_entries, read_json, read_lines

OWN_GALLERY_KS = (10, 50)               # what later papers report on FashionIQ
OWN_GALLERIES = ("own_gallery", "VAL_gallery")


class CaptionedDataset(CompositionDataset):
    """A benchmark with one caption an image; a hit is any gallery image with the target caption."""

    captions: list[str]                 # by image id
    tabled = ("recall",)                # as its papers; metrics.json has the mAP too

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.test_queries = self.queries() if self.split != "train" else []     # now: a bad one must not wait
        if self.split != "train" and not self.test_queries:
            raise InputError(f"{self.root} gives no {self.split} query; see data/README.md for what the split needs")

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def target_labels(self) -> np.ndarray:
        return np.unique(self.captions, return_inverse=True)[1]

    def training_texts(self) -> list[str]:
        return self.captions

    def metrics(self, query_captions: list[str], gallery_captions: list[str]) -> list[Metric]:
        return [Metric("correct_composition", *integer_labels(query_captions, gallery_captions), map_ks=MAP_KS)]

    def test_task(self) -> RetrievalTask:
        sources = np.array([query.source for query in self.test_queries])
        metrics = self.metrics([self.captions[query.target] for query in self.test_queries], self.captions)
        # The gallery is every image, so a query's own image stands at its id, and is taken out.
        query_set = QuerySet(sources, texts_of(self.test_queries), sources, metrics)
        return RetrievalTask(np.arange(len(self.images)), [query_set])

    def training_task(self, seed: int) -> RetrievalTask:
        samples = self.training_samples(seed)
        captions = [self.captions[sample.target] for sample in samples]
        query_set = QuerySet(np.array([sample.source for sample in samples]), texts_of(samples),
                             np.full(len(samples), -1), self.metrics(captions, captions))
        return RetrievalTask(np.array([sample.target for sample in samples]), [query_set])


MITSTATES_TEST_NOUNS = frozenset("""
armor bracelet bush camera candy castle ceramic cheese clock clothes coffee fan fig fish foam forest fruit furniture
garden gate glass horse island laptop lead lightning mirror orange paint persimmon plastic plate potato road rubber
sand shell sky smoke steel stream table tea tomato vacuum wax wheel window wool
""".split())


class MITStates(CaptionedDataset):
    """images/<adjective> <noun>/*.jpg, or <adjective>_<noun>/; the text is the target's adjective, the split goes by
    noun."""

    group_size = 2                      # one source, two targets
    title = "MIT-States"

    @property
    def template(self) -> str:
        return "{adjective} {noun}" if self.complete_text else "{adjective}"

    def read(self) -> None:
        self.images, self.captions = [], []
        names = self.visible(os.listdir(require(self.root / "images", "image folder")))
        # Some have made _ of each space: the caption is what it was, and so is the order.
        for caption, folder in sorted((name if " " in name else name.replace("_", " ", 1), name) for name in names):
            adjective, _, noun = caption.partition(" ")
            published = "test" if noun in MITSTATES_TEST_NOUNS else "train"
            if not (noun and adjective) or adjective == "adj" or published != self.published or not self.has(noun):
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
            self.captions += [caption] * len(kept)
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
        self.targets = lru_cache(64)(self.draw_targets)                         # a pair's other is asked for next

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
        target = self.targets(source, (*key, 1 + position // 2))[position % 2]
        return Sample(source, target, self.text(self.captions[target]))

    def draw_targets(self, source: int, key: tuple[int, ...]) -> list[int]:
        """Both of a pair: each knows of the other."""
        rng = np.random.default_rng(key)
        states = list(self.states[self.captions[source].partition(" ")[2]].values())
        first, second = rng.integers(len(states)), rng.integers(len(states) - 1)
        chosen = (states[first], states[second + (second >= first)])            # a target may have the source's state
        return [pick(rng, images) for images in chosen]

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

    def metrics(self, query_captions: list[str], gallery_captions: list[str]) -> list[Metric]:
        """Also the adjective and the noun alone."""
        words = [[[caption.partition(" ")[part] for caption in captions] for part in (0, 2)]
                 for captions in (query_captions, gallery_captions)]
        return [*super().metrics(query_captions, gallery_captions),
                *(Metric(f"correct_{name}", *integer_labels(words[0][part], words[1][part]))
                  for part, name in enumerate(("adj", "noun")))]


class Fashion200k(CaptionedDataset):
    """Captions that become equal once a word is dropped are siblings; the text is 'replace A with B'."""

    @property
    def template(self) -> str:
        return "{target_caption}" if self.complete_text else "replace {word} with {word}"

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

    The text is the two captions joined, which is also what the original calls the target caption. Later papers judge
    each category in a gallery of its own: all images of its split file (own_gallery), or those alone that its test
    triplets name as source or target (VAL_gallery, after the paper VAL).
    """

    CATEGORIES = ("dress", "shirt", "toptee")
    tested_as = "val"
    best_metric = "recall_mean_own_gallery"
    solved_at = OWN_GALLERIES[0], OWN_GALLERY_KS[0]
    headline = (*(f"recall_top{k}_own_gallery_mean" for k in OWN_GALLERY_KS), best_metric)
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
        self.named = {category: dict.fromkeys(name for own, *ends, _ in annotations if own == category for name in ends)
                      for category in self.categories}
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
    def template(self) -> str:
        joined = "{category} {caption} and it {caption}" if self.category == "all" else "{caption} {caption}"
        return {"published": joined, "and": "{caption} and {caption}", "reversed": "{second caption} and {first}",
                "both": "{caption} and {caption}, in both orders"}[self.caption_form]

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
        known = set(self.split_ids[category])
        for where, entry in read_entries(require(file, "caption file")):
            if not is_annotation(entry):
                raise InputError(f"{where}: expected {{'candidate': id, 'target': id, 'captions': [text, text]}}, got "
                                 f"{str(entry)[:80]!r}")
            for name in (entry["candidate"], entry["target"]):
                if name not in known:
                    raise InputError(f"{where}: image {name!r} is not in split.{category}.{self.files}.json")
            yield category, entry["candidate"], entry["target"], self.text(category, entry["captions"])

    def text(self, category: str, captions: list[str]) -> str:
        """As the paper joins the captions, or as zero-shot composers are asked: LinCIR in both orders, their ends
        stripped, Pic2Word in the second alone."""
        orders = [" and ".join(caption.strip(".?, ") for caption in order) for order in (captions, captions[::-1])]
        if self.caption_form == "published":
            joined = f"{category} " + " and it ".join(captions) if self.category == "all" else " ".join(captions)
            return joined.lower()
        return {"and": orders[0], "both": Ways(*orders), "reversed": " and ".join(captions[::-1])}[self.caption_form]

    def __len__(self) -> int:
        return len(self.triplets)

    def sample(self, order: np.ndarray, position: int, key: tuple[int, ...]) -> Sample:
        return Sample(*self.triplets[order[position]][1:])

    def training_texts(self) -> list[str]:
        return texts_of(self.triplets)

    def sample_texts(self, seed: int, epoch: int) -> Iterable[str]:
        return texts_of(self.triplets)

    def test_task(self) -> RetrievalTask:
        galleries = {kind: {category: np.array([self.ids[name] for name in names[category] if name in self.ids])
                            for category in self.categories}
                     for kind, names in zip(OWN_GALLERIES, (self.split_ids, self.named), strict=True)}
        return self.triplet_task(self.triplets, np.arange(len(self.images)), galleries)

    def training_task(self, seed: int) -> RetrievalTask:
        epoch = Epoch(self, seed, TEST_EPOCH)
        triplets = [self.triplets[index] for index in epoch.order[:TRAIN_QUERIES]]
        positions = {category: np.array([i for i, triplet in enumerate(triplets) if triplet.category == category])
                     for category in self.categories}
        return self.triplet_task(triplets, np.array([triplet.target for triplet in triplets]),
                                 {OWN_GALLERIES[0]: positions})

    def triplet_task(self, triplets: list[Triplet], gallery: np.ndarray, galleries: dict) -> RetrievalTask:
        """Each category judged in the merged gallery (the paper) and in its own (later papers); the source stays in.

        galleries: {kind: {category: positions in the merged one}}.
        """
        query_sets = []
        for category in self.categories:
            chosen = [triplet for triplet in triplets if triplet.category == category]
            if not chosen:
                continue
            targets = np.array([triplet.target for triplet in chosen])
            metrics = [Metric(f"correct_{category}", targets, gallery),
                      *(Metric(f"{kind}_{category}", targets, gallery, positions[category], OWN_GALLERY_KS)
                        for kind, positions in galleries.items())]
            query_sets.append(QuerySet(np.array([triplet.source for triplet in chosen]), texts_of(chosen),
                                       np.full(len(chosen), -1), metrics))
        return RetrievalTask(gallery, query_sets)

    def with_means(self, metrics: dict[str, float]) -> dict[str, float]:
        """Later papers' summary: own-gallery R@10 and R@50 averaged over the categories, and the mean of the two."""
        found = dict(metrics)
        for kind in OWN_GALLERIES:
            means = {f"recall_top{k}_{kind}_mean": float(np.mean(values)) for k in OWN_GALLERY_KS if (values := [
                value for name, value in metrics.items() if name.startswith(f"recall_top{k}_{kind}_")])}
            if means:
                found |= {**means, f"recall_mean_{kind}": float(np.mean(list(means.values())))}
        return found


DATASETS = {"mitstates": MITStates, "fashion200k": Fashion200k, "fashionIQ": FashionIQ, "cirr": CIRR,
            "circo": CIRCO, "genecis": GeneCIS, "imagenet_r": ImageNetR, "shoes": Shoes, "lasco": LaSCo,
            "triplets": Triplets, "captions": Captions, "texts": Texts, "pictures": Pictures}


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
