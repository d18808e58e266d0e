"""Pictures of one's own with captions or attributes, from which triplets are mined; hand-written ones are welcome.

The table is read as that of triplets.py, a row a picture; which rows are paired, and what is said, is mining.py's.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.base import TEST_EPOCH, TRAIN_QUERIES, Epoch, QuerySet, RetrievalTask, Sample, inside, pick, texts_of
from benchmarks.metrics import ListedMetric, Metric
from benchmarks.mining import Drawn, Miner, Templates, Values, Words, words_of
from benchmarks.triplets import Entry, Triplets, table_in, tables_in
from machine.errors import InputError
from machine.tables import ENDINGS, read_table

UNFIT = "rows that do not fit"
OURS = ("file_name", "caption", "split")  # columns that are no attributes
PRODUCTS = "product", "group"           # the column that says which pictures are of one product, where none is named
BETWEEN = re.compile("[;|]")            # values of a cell that has several
ALL_DIFFER, MANY = 0.9, 20              # values a product that are as good as another in each, of so many products
RANK = {"train": 0, "validation": 1, "test": 2}


class Told(NamedTuple):
    """A row as it is read. split: '' where nothing says it; below: the folder of its table, below root."""
    where: str
    row: dict
    split: str
    below: str


class Picture(NamedTuple):
    """A row of the table of captions."""
    where: str
    name: str                           # below the folder of its split
    image: str                          # below root
    caption: str
    values: dict[str, Values]           # by column
    same: tuple[Values, ...]            # of the columns that are to be the same
    product: str
    split: str


class Captions(Triplets):
    """Pictures of one's own with captions, attributes or both: metadata.csv or captions.csv (or .jsonl, .xlsx, ...) at
    the top or in train/ and test/, a row a picture, with file_name, caption, product, split and any other columns.

    A training sample is two pictures that differ in little, drawn anew in each epoch, and what differs; in a share of
    the samples a line of the hand-written triplets, where there are any in triplets.csv beside (or in metadata.csv,
    where captions.csv is the other). A test asks the split's hand-written lines as Triplets does; where there are none,
    mined ones among the split's own pictures. No product is in two splits.
    """

    held_out_of = "products"
    shown = "train", 20, "twenty mined triplets"
    compares_splits = True
    DESCRIBED = 2000                    # draws that are counted

    @classmethod
    def table(cls, folder: Path) -> Path | None:
        return table_in(folder, "captions") or table_in(folder, "metadata")

    @classmethod
    def written_table(cls, folder: Path) -> Path | None:
        """A folder's table of hand-written triplets."""
        return table_in(folder, "triplets") or (table_in(folder, "captions") and table_in(folder, "metadata"))

    @classmethod
    def tables(cls, root: Path) -> dict[str, Path]:
        if not (found := tables_in(root, cls.table)):
            raise InputError(f"neither {root} nor {root / 'train'} has a metadata.csv or captions.csv (or "
                             f"{', '.join(ending for ending in ENDINGS if ending != '.csv')}) with file_name and "
                             "caption; docs/your-own-pictures.md shows what it looks like")
        return found

    @classmethod
    def written_tables(cls, root: Path) -> dict[str, Path]:
        found, beside = tables_in(root, cls.written_table), cls.tables(root)
        if found and ("" in found) != ("" in beside):
            raise InputError(f"{next(iter(found.values()))} and {next(iter(beside.values()))} do not stand in the same "
                             "folder; put the triplets beside the captions")
        return found

    @classmethod
    def told(cls, tables: dict[str, Path]) -> Iterator[Told]:
        for split, table in tables.items():
            rows, below = list(read_table(table)), split and f"{table.parent.name}/"
            says = any("split" in row for _, row in rows)
            yield from (Told(where, row, split or (cls.split_of(where, row) if says else ""), below)
                        for where, row in rows)

    @classmethod
    def splits(cls, path: Path, held_out: float) -> list[str]:
        found = {told.split for tables in (cls.tables(path), cls.written_tables(path)) for told in cls.told(tables)}
        if held_out and "validation" in found:
            raise InputError(f"{path} has a validation split of its own: drop --validation")
        if not held_out and found <= {"train", ""}:
            raise InputError(f"{path} has no test split, neither a folder test nor a column split: pass "
                             "--validation 0.1 to hold out a tenth of the products and test on them")
        return ["train", *["validation"] * ("validation" in found or held_out > 0), *["test"] * ("test" in found)]

    def read(self) -> None:
        tables, written = self.tables(self.root), self.written_tables(self.root)
        held_out = self.split == "validation" and self.held_out > 0
        own = "" if "" in tables else "train" if held_out else self.split
        if own and own not in {**tables, **written}:
            raise InputError(f"{self.root} has no {own} split, no folder {own} with a table")
        self.look_into(own and f"{({**written, **tables})[own].parent.name}/")
        rows = list(self.told(tables))
        self.columns = self.choose_columns(tables, rows)
        lines = self.lines({split: table for split, table in written.items() if split == own})
        pictures = self.in_one_split(list(self.pictures(rows)), lines)
        parsed = [(where, entry) for where, entry in self.of_split(lines, pictures) if self.is_there(entry, where)]
        self.rows_here = [picture for picture in pictures if picture.split == self.split and self.usable(picture)]
        self.templates, self.mined = Templates(self.mining.templates), None
        if self.split != "train":
            listed = self.listed()
            self.collect(parsed, listed or self.there)
            if self.annotations:
                self.asked = "hand-written"
                return self.tell(listed)
        return self.mine(parsed if self.mining.written else [])

    # The table

    def choose_columns(self, tables: dict[str, Path], rows: list[Told]) -> list[str]:
        """The attributes' columns. Fills `says`, what there is to say of the others, `single`, those of one value, and
        `product_by`."""
        table, found = next(iter(tables.values())), dict.fromkeys(name for told in rows for name in told.row)
        if not rows:
            raise InputError(f"{table} has no row below the columns' names")
        if "file_name" not in found:
            instead = "; --dataset triplets reads such a table" if "source_file_name" in found else ""
            raise InputError(f"{rows[0].where}: no file_name (it has {', '.join(map(str, found)) or 'no column'}); "
                             f"each row needs file_name, and caption or columns of attributes{instead}")
        self.product_by = self.rule_of_products(found, table)
        named, self.same = (listed(names) for names in (self.mining.attributes, self.mining.same))
        for flag, names in (("--attributes", named), ("--same", self.same)):
            if wrong := [name for name in names if name not in found or name in OURS]:
                raise InputError(f"{flag}: {table} has no column {wrong[0]!r} of attributes; it has "
                                 f"{', '.join(column for column in found if column not in OURS) or 'none'}")
        captioned = any(told.row.get("caption") for told in rows)
        others = [name for name in found if name not in (*OURS, self.product_by, *self.same)]
        chosen = named or ([] if captioned else [name for name in others if not is_of_numbers(rows, name)])
        self.says, self.single = [], []
        kept = []
        for name in chosen:
            values, of = self.spread_of(rows, name)
            if values >= (ALL_DIFFER * of if of > MANY else of) and of > 1:
                self.says.append(f"{name} is another in every row, as a price or an article number is, so it is not "
                                 "mined")
            else:
                kept.append(name)
                self.single += [name] * (values == 1)
        if left := [name for name in others if name not in chosen]:
            self.says.append(f"not read: {', '.join(left)} (--attributes names columns to mine)")
        if not captioned and not kept:
            raise InputError(f"{table} has neither a caption nor an attribute to mine: it needs a column caption, or "
                             f"columns of attributes, as colour, whose values recur{'; ' * bool(self.says)}"
                             f"{'; '.join(self.says)}")
        return kept

    def rule_of_products(self, found: Iterable[str], table: Path) -> str | re.Pattern | None:
        """The column that says which product a picture is of, or the rule of file names; None where each is its own."""
        rule = self.mining.product
        if rule == "auto":
            return next((name for name in PRODUCTS if name in found), None)
        if rule in found:
            return rule
        if "(" not in rule:
            raise InputError(f"--product: {table} has no column {rule!r}; it has {', '.join(found)}. A rule of file "
                             r"names is a regular expression with the product in brackets, as '(.+)_\d+'")
        try:
            return re.compile(rule)
        except re.error as error:
            raise InputError(f"--product {rule!r} is no regular expression ({error})") from None

    def product_of(self, name: str, row: dict, below: str) -> str:
        """Its name; the picture's own where nothing says what it shows."""
        if isinstance(self.product_by, re.Pattern):
            match = self.product_by.search(name)
            found = match and match[1]
        else:
            found = str(row.get(self.product_by) or "").strip()
        return found or f"{below}{name}"

    def spread_of(self, rows: list[Told], column: str) -> tuple[int, int]:
        """How many values a column has, and how many products have one."""
        values, products = set(), set()
        for where, row, _, below in rows:
            if found := values_of(row.get(column), f"{where}: {column}"):
                values.update(found)
                products.add(self.product_of(str(row.get("file_name")), row, below))
        return len(values), len(products)

    def pictures(self, rows: list[Told]) -> Iterator[Picture]:
        """Of all splits, as far as they can be read; what is wrong with another folder's is said when that is read."""
        for where, row, split, below in rows:
            try:
                name = row.get("file_name")
                if not isinstance(name, str) or not name.strip():
                    raise InputError(f"{where}: no file_name")
                name = inside(os.path.normpath(name.strip()), where)
                name = self.meant(name, where) if below == self.below else name
                product = self.product_of(name, row, below)
                same = tuple(values_of(row.get(column), f"{where}: {column}") for column in self.same)
                values = {column: values_of(row.get(column), f"{where}: {column}") for column in self.columns}
                for caption in captions_of(row.get("caption"), where) or [""]:
                    yield Picture(where, name, below + name, caption, values, same, product, split)
            except InputError as error:
                if below == self.below:
                    self.refuse_or_drop(UNFIT, f"{error}; --skip_bad_images True leaves such rows out")

    def lines(self, tables: dict[str, Path]) -> list[tuple[str, Entry, str]]:
        """(where, line, its split or '') of each hand-written line of this folder."""
        rows = list(self.told(tables))
        splits = {told.where: told.split for told in rows}
        return [(where, entry, splits[where]) for where, entry in self.entries(told[:2] for told in rows)]

    # The splits

    def in_one_split(self, pictures: list[Picture], lines: list[tuple[str, Entry, str]]) -> list[Picture]:
        """The pictures with the split each is of in the end: what the table says of its product; else what hand-written
        lines say that name it; else train; and of that a share, by product, is held out."""
        first: dict[str, Picture] = {}
        for picture in pictures:
            seen = first.setdefault(picture.product, picture)
            if seen.split != picture.split:
                self.refuse_or_drop("rows whose product is in two splits",
                                    f"{picture.where}: {picture.image} is of the {picture.split or 'train'} split, and "
                                    f"{seen.image}, of the same product, of the {seen.split or 'train'} split "
                                    f"({seen.where}); a product must be in one")
                first[picture.product] = max(seen, picture, key=lambda each: RANK[each.split or "train"])
        of_image = {picture.image: picture.product for picture in pictures}
        by_lines: dict[str, str] = {}
        if not any(picture.split for picture in pictures):
            for _, entry, split in lines:
                for product in filter(None, (of_image.get(self.below + name) for name in entry.names)):
                    by_lines[product] = max(by_lines.get(product, "train"), split or "train", key=RANK.get)
        final = {}
        for product, picture in first.items():
            split = picture.split or by_lines.get(product, "train")
            held_out = split == "train" and self.held_out and self.is_held_out(product)
            final[product] = "validation" if held_out else split
        return [picture._replace(split=final[picture.product]) for picture in pictures
                if (picture.split or "train") == (first[picture.product].split or "train")]

    def of_split(self, lines: list[tuple[str, Entry, str]], pictures: list[Picture]) -> Iterator[tuple[str, Entry]]:
        """The hand-written lines of this split: all of their pictures' products are. What says another split is wrong,
        what leads from one into another is of none."""
        split_of, says = ({picture.image: value(picture) for picture in pictures}
                          for value in (lambda picture: picture.split, lambda picture: picture.where))
        for where, entry, said in lines:
            known = {self.below + name: split_of[self.below + name] for name in entry.names
                     if self.below + name in split_of}
            splits = {*known.values()} or {"validation" if said in ("", "train") and self.held_out and self.is_held_out(
                entry.source) else said or "train"}
            if said in ("validation", "test") and (wrong := [image for image, split in known.items() if split != said]):
                self.refuse_or_drop("hand-written lines of another split than their pictures",
                                    f"{where}: the line is of the {said} split, and {wrong[0]} of the "
                                    f"{known[wrong[0]]} split ({says[wrong[0]]}); say the same of both")
            elif len(splits) > 1:
                if self.split == "train":
                    self.drop("hand-written lines from one split into another")
            elif splits == {self.split}:
                yield where, entry

    def usable(self, picture: Picture) -> bool:
        if picture.image in self.without:
            self.drop("rows whose images are broken")
        elif picture.name not in self.known:
            self.refuse_or_drop("rows whose images are missing", self.not_there(picture.name, picture.where))
        else:
            return True
        return False

    # What is mined

    def mine(self, written: list[tuple[str, Entry]]) -> None:
        """Fill `images`, and what is drawn from."""
        self.collect(written, [picture.name for picture in self.rows_here] + self.named_by(written))
        rows, ids = self.rows_here, {image: number for number, image in enumerate(self.images)}
        self.image_of = [ids[picture.image] for picture in rows]                # of each row
        products: dict[str, int] = {}
        numbers = self.image_of if self.mining.same_product else [
            products.setdefault(picture.product, len(products)) for picture in rows]
        words: dict[str, Words] = {}
        same: dict[tuple[Values, ...], int] = {}
        self.mined = Miner([words.setdefault(picture.caption, words_of(picture.caption)) for picture in rows],
                           [tuple(picture.values[column] for column in self.columns) for picture in rows], numbers,
                           [same.setdefault(picture.same, len(same)) for picture in rows], self.columns, self.mining)
        if not self.mined.sources:
            instead = ("--dataset triplets trains on the hand-written lines alone" if self.annotations else
                       "give --validation a larger share" if self.held_out else "docs/your-own-pictures.md says how")
            nothing = (f"no two of the {len(rows)} rows of the {self.split} split in {self.root} differ in "
                       f"{self.differ_in()} alone, so that no triplet can be mined")
            raise InputError("; ".join([nothing, *self.says, instead]))
        self.asked = "mined" if not self.annotations else "mined and hand-written"
        self.about = "; ".join(self.tell_of_mined(len(products)))

    def tell_of_mined(self, products: int) -> Iterator[str]:
        """The parts of `about`."""
        rows, sources = len(self.rows_here), len(self.mined.sources)
        of = f" of {products} products" * bool(self.product_by and products)
        yield (f"{self.split} split: triplets are mined from {rows} rows{of}, which differ in {self.differ_in()}; "
               f"{rows - sources} of them lead nowhere")
        yield from self.says
        if self.annotations:
            yield (f"a share of {self.mining.written:g} of the samples is of the {len(self.annotations)} hand-written "
                   "lines")
        if self.split != "train":
            yield (f"no hand-written line is of this split, so {len(self.all_queries)} mined queries are asked of the "
                   f"{len(self.images)} images of these rows")

    def differ_in(self) -> str:
        captions = any(picture.caption for picture in self.rows_here)
        return " or ".join([*["a word or a run of words of their captions"] * captions,
                            *[f"one or two of {', '.join(self.columns)}"] * bool(self.columns)]
                           ) + f", with the same {', '.join(self.same)}" * bool(self.same)

    def __len__(self) -> int:
        return len(self.mined.sources) if self.mined else len(self.annotations)

    def sample(self, order: np.ndarray, position: int, key: tuple[int, ...]) -> Sample:
        """A hand-written line in place of the source at this position, in their share; else where that leads."""
        rng = np.random.default_rng((*key, 1 + position))
        if self.annotations and rng.random() < self.mining.written:
            line = pick(rng, self.annotations)
            return Sample(line.source, pick(rng, line.targets), line.text)
        return self.draw(self.mined.sources[order[position]], rng)[0]

    def draw(self, row: int, rng: np.random.Generator) -> tuple[Sample, Drawn]:
        drawn = self.mined.draw(row, rng)
        text = self.whole_caption(drawn.target) if self.complete_text else self.templates.say(drawn.changes, rng)
        return Sample(self.image_of[row], self.image_of[drawn.target], text), drawn

    def whole_caption(self, row: int) -> str:
        picture = self.rows_here[row]
        return picture.caption or " ".join(value for values in picture.values.values() for value in values)

    def sample_texts(self, seed: int, epoch: int) -> Iterable[str]:
        return texts_of(Epoch(self, seed, epoch))

    def training_texts(self) -> list[str]:
        """All words that there can be: of captions, attributes, templates and hand-written lines."""
        rows = [[picture.caption, *(value for values in picture.values.values() for value in values)]
                for picture in self.rows_here]
        return [*map(" ".join, rows), *self.templates.words(self.columns), *texts_of(self.annotations)]

    def queries(self) -> list[Sample]:
        """Hand-written, or of the split's rows that lead somewhere one mined query each."""
        if not self.mined:
            return self.annotations
        return [sample for sample, _ in self.mined_queries]

    @cached_property
    def mined_queries(self) -> list[tuple[Sample, Drawn]]:
        return [self.draw(row, np.random.default_rng((0, TEST_EPOCH, 1 + place)))
                for place, row in enumerate(self.mined.sources[:TRAIN_QUERIES])]

    def test_task(self) -> RetrievalTask:
        if not self.mined:
            return super().test_task()
        right = [np.unique(np.array(self.image_of)[rows]) for rows in self.mined.right(
            [(row, drawn) for row, (_, drawn) in zip(self.mined.sources, self.mined_queries, strict=False)])]
        sources = np.array([sample.source for sample, _ in self.mined_queries])
        own = np.full(len(sources), -1) if self.keep_source else sources
        metric = ListedMetric("correct_composition", right, len(self.images))
        return RetrievalTask(np.arange(len(self.images)),
                             [QuerySet(sources, texts_of(self.all_queries), own, [metric])])

    def training_task(self, seed: int) -> RetrievalTask:
        """A target is right for another's query where it looks the same by the table."""
        samples = self.training_samples(seed)
        targets = np.array([sample.target for sample in samples])
        labels = self.target_labels[targets]
        return RetrievalTask(targets, [QuerySet(np.array([sample.source for sample in samples]), texts_of(samples),
                                                np.full(len(samples), -1),
                                                [Metric("correct_composition", labels, labels)])])

    @cached_property
    def target_labels(self) -> np.ndarray:
        """Images are equally right where caption and attributes are the same."""
        if not self.mined:
            return super().target_labels
        labels = [f"\0{image}" for image in range(len(self.images))]
        for image, words, values in zip(self.image_of, self.mined.captions, self.mined.attributes, strict=True):
            if labels[image][0] == "\0":
                labels[image] = repr((sorted(words), values))
        return np.unique(labels, return_inverse=True)[1]

    def described(self) -> list[tuple[str, str]]:
        """What some draws change and how they say it."""
        if not self.mined:
            return []
        changed, ways = Counter(), Counter()
        for place, row in enumerate(self.mined.sources[:self.DESCRIBED]):
            rng = np.random.default_rng((0, 0, 1 + place))
            for change in self.mined.draw(row, rng).changes:
                changed[change.column or "caption"] += 1
                ways[self.templates.pick(change, rng)[0]] += 1
        lost = [self.rows_here[row].where for row in {*range(len(self.rows_here))}.difference(self.mined.sources)]
        return [("changes", ", ".join(f"{name} {count}" for name, count in changed.most_common())),
                ("templates", ", ".join(f"{name} {count}" for name, count in ways.most_common())),
                ("without partner", f"{len(lost)} rows{''.join(f', first {where}' for where in lost[:1])}"),
                *[("of one value", ", ".join(self.single))] * bool(self.single),
                *[("hand-written", f"{len(self.annotations)} lines")] * bool(self.annotations)]


def listed(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def captions_of(value, where: str) -> list[str]:
    found = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(caption, str) for caption in found):
        raise InputError(f"{where}: caption is {str(value)[:40]!r}; expected a string")
    return [caption.strip() for caption in found if caption.strip()]


def values_of(value, where: str) -> Values:
    """A cell's values, in small letters and in order, each once: of a list, or with ; or | between them."""
    found = value if isinstance(value, list) else [value]
    if any(isinstance(each, dict | list) for each in found):
        raise InputError(f"{where} is {str(value)[:40]!r}; expected a text, a number, or a list of them")
    texts = [part for each in found if each is not None for part in BETWEEN.split(str(each))]
    return tuple(sorted({" ".join(text.lower().split()) for text in texts} - {""}))


def is_of_numbers(rows: Sequence[Told], column: str) -> bool:
    """Whether most of a column's values are: it is no attribute then, unless it is named as one."""
    values = [str(told.row[column]).strip() for told in rows if told.row.get(column) not in (None, "")]
    return 2 * sum(value[:1].isdigit() or value[:1] in "-+€$£" for value in values) > len(values)
