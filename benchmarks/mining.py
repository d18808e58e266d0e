"""Which pictures differ in little, by their captions or attributes, and how that is said: triplets mined from a table.

Two captions are paired where one word of one is another in the other, wherever the words stand (TIRG's rule, arXiv
1812.07119, with whole words taken out one place at a time), or where all but one run of words is the same. Two rows of
attributes are paired where one value differs, or two do. Nothing here goes through pairs: what is left of a caption or
row when something is taken out is its parent, and those that share a parent are siblings.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

MARKS = ".,;:!?\"'()[]{}«»„“”‘’…"       # around a word they are none of it
BRACES = str.maketrans({"{": "{{", "}": "}}"})
TRIES = 8                               # random siblings, before all of a parent's are looked through
# Each template, as it says that `old` has become `new`. covr: those of CoVR (arXiv 2308.14746), of which its released
# code has one twice.
TEMPLATES = {
    "in": ("in {new}",),
    "replace": ("replace {old} with {new}",),
    "instead": ("{new} instead of {old}",),
    "with": ("with {new}",),
    "without": ("without {old}",),
    "covr": ("remove {old}", "take out {old} and add {new}", "change {old} for {new}", "replace {old} with {new}",
             "replace {old} by {new}", "replace {old} with {new}", "make the {old} into {new}", "add {new}",
             "change it to {new}"),
}
# Which fit a change; "in" and "with" say of an exchange what is new.
FIT = {"exchanged": ("in", "replace", "instead", "with", "covr"), "added": ("in", "with"), "removed": ("without",)}

Words = tuple[str, ...]
Values = tuple[str, ...]                # of one attribute, in order; () where it is not known
Row = tuple[Values, ...]


class Mining(NamedTuple):
    """How triplets are mined, as the flags of these names say it."""
    attributes: str = ""
    same: str = ""
    product: str = "auto"
    same_product: bool = False
    span: int = 3
    two_changes: float = 0.5
    templates: str = "in=1,replace=1,instead=1,with=1,without=1,named=0.25"
    written: float = 0.75


class Change(NamedTuple):
    """What became what, as words; one of both may be empty. column: the attribute's name, '' for a caption's words."""
    old: str
    new: str
    column: str = ""

    @property
    def kind(self) -> str:
        return "exchanged" if self.old and self.new else "added" if self.new else "removed"


def words_of(caption: str) -> Words:
    """In small letters, without the marks around them."""
    return tuple(filter(None, (word.strip(MARKS) for word in caption.lower().split())))


def caption_change(source: Words, target: Words, span: int) -> Change | None:
    """What changes between two captions: one run of at most `span` words each, where anything stays; or one word, also
    for one that stands elsewhere. None where it is more, or nothing."""
    if source == target:
        return None
    shorter = min(len(source), len(target))
    before = next((place for place in range(shorter) if source[place] != target[place]), shorter)
    after = next((place for place in range(shorter - before) if source[-1 - place] != target[-1 - place]),
                 shorter - before)
    old, new = source[before:len(source) - after], target[before:len(target) - after]
    if before + after and max(len(old), len(new)) <= span:
        return Change(" ".join(old), " ".join(new))
    gone, come = Counter(source) - Counter(target), Counter(target) - Counter(source)
    if gone.total() != 1 or come.total() != 1:
        return None
    (old,), (new,) = gone, come
    left = {without(source, place) for place, word in enumerate(source) if word == old}
    found = any(without(target, place) in left for place, word in enumerate(target) if word == new)
    return Change(old, new) if found else None


def without(words: Words, place: int) -> Words:
    return words[:place] + words[place + 1:]


def attribute_changes(source: Row, target: Row, columns: Sequence[str], most: int) -> list[Change] | None:
    """What changes between two rows of attributes: one value of one attribute, or with `most` 2 each of two. What is
    not known did not change. None where it is more, or nothing."""
    places = [place for place, values in enumerate(source) if values != target[place]]
    if not 0 < len(places) <= most:
        return None
    changes = []
    for old, new, column in ((source[place], target[place], columns[place]) for place in places):
        gone, come = ([value for value in some if value not in others] for some, others in ((old, new), (new, old)))
        longest = max(len(gone), len(come)) if len(places) == 1 else max(len(old), len(new))
        if not old or not new or longest > 1:
            return None
        changes.append(Change("".join(gone), "".join(come), spoken(column)))
    return changes


def spoken(column: str) -> str:
    return column.replace("_", " ").lower()


class Templates:
    """The templates by their shares, among those that fit a change; where none of these has a share, each is as likely.
    named: the share of an attribute's changes that say its name, too."""

    def __init__(self, text: str):
        """text: as "in=1,replace=0.5,named=0.25"; what it does not name has none. Raises ValueError."""
        shares = dict.fromkeys((*TEMPLATES, "named"), 0.0)
        for part in filter(str.strip, text.split(",")):
            name, _, share = map(str.strip, part.partition("="))
            if name not in shares:
                raise ValueError(f"there is no template {name!r}; they are {', '.join(TEMPLATES)}, and named")
            try:
                shares[name] = float(share)
            except ValueError:
                raise ValueError(f"the share of {name} is {share!r}; expected a number") from None
            if not 0 <= shares[name] <= 1e6:
                raise ValueError(f"the share of {name} is {share}; expected a number from 0 on")
        self.named = shares.pop("named")
        if self.named > 1:
            raise ValueError(f"named is {self.named:g}; it is the share of an attribute's changes, at most 1")
        self.shares = shares
        self.chances = {}                                                       # of a kind's templates
        for kind, names in FIT.items():
            chances = np.array([shares[name] for name in names]) if any(shares[name] for name in names) else np.ones(
                len(names))
            self.chances[kind] = chances / chances.sum()

    def say(self, changes: Sequence[Change], rng: np.random.Generator) -> str:
        return " and ".join(self.say_one(change, rng) for change in changes)

    def pick(self, change: Change, rng: np.random.Generator) -> tuple[str, str]:
        """The name of a template, and the template."""
        names = FIT[change.kind]
        name = names[rng.choice(len(names), p=self.chances[change.kind])]
        forms = TEMPLATES[name]
        return name, forms[rng.integers(len(forms))] if len(forms) > 1 else forms[0]

    def say_one(self, change: Change, rng: np.random.Generator) -> str:
        _, form = self.pick(change, rng)
        if change.column and rng.random() < self.named:                         # "replace colour red with blue"
            form = form.replace("{", f"{change.column.translate(BRACES)} {{", 1)
        return form.format(old=change.old, new=change.new)

    def words(self, columns: Sequence[str]) -> list[str]:
        """All that the templates in use may say beside what changes, for a vocabulary."""
        said = [form.format(old="", new="") for kind, names in FIT.items()
                for name, chance in zip(names, self.chances[kind], strict=True) if chance for form in TEMPLATES[name]]
        return [*dict.fromkeys(said), "and", *(spoken(column) for column in columns if self.named)]


class Entries(NamedTuple):
    """Which of some distinct captions, or rows of attributes, have a parent in common: (E,) each, in the order of the
    parents, each of which has two members at least."""
    parent: np.ndarray
    member: np.ndarray


def shared(keys: np.ndarray, members: np.ndarray) -> Entries:
    """Those whose key another member has too; keys: (E,) ints, which come to parents from 0 on."""
    order = np.lexsort((members, keys))
    keys, members = keys[order], members[order]
    first = np.ones(len(keys), bool)
    first[1:] = (keys[1:] != keys[:-1]) | (members[1:] != members[:-1])         # a word that stands twice is one child
    keys, members = keys[first], members[first]
    _, parent, counts = np.unique(keys, return_inverse=True, return_counts=True)
    several = counts[parent] > 1
    renumbered = np.cumsum(counts > 1) - 1
    return Entries(renumbered[parent[several]].astype(np.int32), members[several].astype(np.int32))


def joined(parts: Sequence[Entries]) -> Entries:
    """Several, each with parents of its own."""
    parents, count = [], 0
    for part in parts:
        parents.append(part.parent + np.int32(count))
        count += int(part.parent[-1]) + 1 if len(part.parent) else 0
    empty = Entries(np.zeros(0, np.int32), np.zeros(0, np.int32))
    parts = [*(part._replace(parent=parent) for part, parent in zip(parts, parents, strict=True)), empty]
    return Entries(*map(np.concatenate, zip(*parts, strict=True)))


def caption_entries(captions: Sequence[Words], span: int) -> Entries:
    """captions: distinct ones, of other words, not only in another order. Two share a parent if and only if
    `caption_change` tells what changes between them, but for a chance of about 2**-64 a pair."""
    lengths = np.array([len(words) for words in captions], np.int64)            # (C,)
    starts = np.cumsum(lengths) - lengths
    ids: dict[str, int] = {}
    flat = np.array([ids.setdefault(word, len(ids)) for words in captions for word in words], np.int64)     # (words,)
    parts = [one_word(flat, starts, lengths, len(ids))]
    if span:
        parts += spans(flat, starts, lengths, span)
    return joined([part for part in parts if len(part.parent)])


def one_word(flat: np.ndarray, starts: np.ndarray, lengths: np.ndarray, vocabulary: int) -> Entries:
    """Parents are captions less one word, by a hash of the words that stay."""
    rng = np.random.default_rng(0)
    value, base = rng.integers(1, 2**64, vocabulary, np.uint64), rng.integers(1, 2**63, 1, np.uint64) * 2 + 1
    longest = int(lengths.max(initial=0))
    powers = np.cumprod(np.concatenate([np.ones(1, np.uint64), np.repeat(base, longest)]))  # all of it modulo 2**64
    whole, alive = np.zeros(len(lengths), np.uint64), np.arange(len(lengths))
    for place in range(longest):
        alive = alive[lengths[alive] > place]
        whole[alive] = whole[alive] * base + value[flat[starts[alive] + place]]
    keys, members = [], []
    before, alive = np.zeros(len(lengths), np.uint64), np.arange(len(lengths))
    for place in range(longest):
        alive = alive[lengths[alive] > place]
        through = before[alive] * base + value[flat[starts[alive] + place]]
        power = powers[lengths[alive] - place - 1]
        keys.append(before[alive] * power + whole[alive] - through * power)     # what is before, then what comes after
        members.append(alive)
        before[alive] = through
    if not keys:
        return joined([])
    keys, members = np.concatenate(keys), np.concatenate(members)
    return shared(keys, members)


def spans(flat: np.ndarray, starts: np.ndarray, lengths: np.ndarray, span: int) -> Iterator[Entries]:
    """Parents are what stands before a run of at most `span` words and what stands after it: for each number of words
    before it on its own, which bounds the memory."""
    count, longest = len(lengths), int(lengths.max(initial=0))
    after = suffixes(flat, starts, lengths)
    before, alive = np.zeros(count, np.int64), np.arange(count)                 # of so many words: which these are
    for place in range(longest + 1):
        alive = alive[lengths[alive] >= place]
        if place:
            last = flat[starts[alive] + place - 1]
            before[alive] = np.unique(before[alive] * (int(flat.max()) + 1) + last, return_inverse=True)[1]
        keys, members = [], []
        for length in range(span + 1):
            fit = alive[(lengths[alive] >= place + length) & (lengths[alive] > length)]     # something stays
            ends = starts[fit] + place + length
            follows = np.where(place + length < lengths[fit], after[np.minimum(ends, len(after) - 1)] + 1, 0)
            keys.append(before[fit] * (len(flat) + 1) + follows)
            members.append(fit)
        yield shared(np.concatenate(keys), np.concatenate(members))


def suffixes(flat: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """(words,) a number for what stands from each word to its caption's end, the same for the same words."""
    after = np.zeros(len(flat), np.int64)
    known, alive = 0, np.arange(len(lengths))
    for length in range(1, int(lengths.max(initial=0)) + 1):
        alive = alive[lengths[alive] >= length]
        places = starts[alive] + lengths[alive] - length
        rest = after[places + 1] + 1 if length > 1 else np.zeros(len(alive), np.int64)
        _, found = np.unique(rest * (int(flat.max()) + 1) + flat[places], return_inverse=True)
        after[places] = known + found
        known += int(found.max(initial=-1)) + 1
    return after


def attribute_entries(rows: Sequence[Row], most: int) -> Entries:
    """rows: distinct. With `most` 1 two share a parent if and only if `attribute_changes` tells what changes between
    them, but for a chance of about 2**-64 a pair. With 2 those do that differ in two attributes, or in one of the two,
    where there is a third; a row has one value of each."""
    rng, columns = np.random.default_rng(0), [*zip(*rows, strict=True)]
    numbers = [{values: number for number, values in enumerate(dict.fromkeys(column))} for column in columns]
    codes = [np.array([known[values] for values in column]) for known, column in zip(numbers, columns, strict=True)]
    hashes = [rng.integers(0, 2**64, len(known), np.uint64)[code] for known, code in zip(numbers, codes, strict=True)]
    whole = np.sum(hashes, axis=0, dtype=np.uint64)                             # (rows,), modulo 2**64
    parts = []
    if most == 1:
        for known, code, own in zip(numbers, codes, hashes, strict=True):
            parts.append(one_value(list(known), code, whole - own, rng))
    elif len(columns) > 2:                                                      # one stays
        single = [np.array([len(values) == 1 for values in known])[code]
                  for known, code in zip(numbers, codes, strict=True)]
        for one in range(len(columns)):
            for other in range(one):
                fit = np.flatnonzero(single[one] & single[other])
                parts.append(shared((whole - hashes[one] - hashes[other])[fit], fit))
    return joined([part for part in parts if len(part.parent)])


def one_value(known: Sequence[Values], codes: np.ndarray, others: np.ndarray, rng: np.random.Generator) -> Entries:
    """Parents are rows less one value of an attribute; and whole rows, where some have several values of it.

    known: what there is in the attribute; codes: (rows,) which of it a row has; others: (rows,) a hash of what else.
    """
    several = any(len(values) > 1 for values in known)
    left = [[values[:place] + values[place + 1:] for place in range(len(values))] + [values] * several if values else []
            for values in known]
    hashes = {rest: rng.integers(0, 2**64, dtype=np.uint64) for rests in left for rest in rests}
    keys, members = [], []
    for number in range(max(map(len, left), default=0)):
        own = np.array([hashes[rests[number]] if number < len(rests) else 0 for rests in left], np.uint64)
        fit = np.flatnonzero(np.array([number < len(rests) for rests in left])[codes])
        keys.append(others[fit] + own[codes[fit]])
        members.append(fit)
    return shared(np.concatenate(keys), np.concatenate(members)) if keys else joined([])


class Siblings:
    """Who may be a triplet's target for whom. A unit is all pictures of one product with one caption, or one row of
    attributes: units are paired where these are siblings, the products differ, and what is to be the same is.

    classes, products, same: (U,) of each unit, which caption or row, which product, which of what is to be the same.
    """

    def __init__(self, entries: Entries, classes: np.ndarray, products: np.ndarray, same: np.ndarray | int = 0):
        self.classes, self.products = classes, products
        by_class = np.argsort(classes, kind="stable").astype(np.int32)
        counts = np.bincount(classes, minlength=1)
        first = np.cumsum(counts) - counts
        each = counts[entries.member]                                           # (E,) units of each member
        within = np.arange(each.sum()) - np.repeat(np.cumsum(each) - each, each)
        unit, parent = by_class[np.repeat(first[entries.member], each) + within], np.repeat(entries.parent, each)
        apart = parent.astype(np.int64) * (int(np.max(same, initial=0)) + 1) + np.broadcast_to(same, len(classes))[unit]
        order = np.argsort(apart, kind="stable")
        self.unit, self.parent = unit[order], np.unique(apart, return_inverse=True)[1][order].astype(np.int32)  # (E',)
        self.first = np.searchsorted(self.parent, np.arange(int(self.parent.max(initial=-1)) + 2))
        leads = np.flatnonzero(self.others() > 0)                               # entries from which there is a way
        self.ways = leads[np.argsort(self.unit[leads], kind="stable")].astype(np.int32)
        self.way = np.searchsorted(self.unit[self.ways], np.arange(len(classes) + 1))

    def others(self) -> np.ndarray:
        """(E',) how many entries of other classes and products each entry's parent has: all, less those of its class,
        less those of its product, and once more what is of both, itself."""
        total = np.bincount(self.parent, minlength=1)[self.parent] if len(self.parent) else self.parent
        for what in (self.classes, self.products):
            together = self.parent.astype(np.int64) * (int(what.max(initial=0)) + 1) + what[self.unit]
            _, places, counts = np.unique(together, return_inverse=True, return_counts=True)
            total = total - counts[places]
        return total + 1

    def leads(self, unit: int) -> bool:
        return bool(self.way[unit] < self.way[unit + 1])

    def fits(self, unit: int, others: np.ndarray) -> np.ndarray:
        """Whether each of these units may be the target of that one, whose parent they have."""
        return (self.classes[others] != self.classes[unit]) & (self.products[others] != self.products[unit])

    def draw(self, unit: int, rng: np.random.Generator) -> int:
        """A target's unit: of a random parent, a random child. Only of a unit that leads somewhere."""
        parent = self.parent[self.ways[rng.integers(self.way[unit], self.way[unit + 1])]]
        first, end = self.first[parent], self.first[parent + 1]
        found = self.unit[rng.integers(first, end, TRIES)]
        fit = found[self.fits(unit, found)]
        if len(fit):
            return int(fit[0])
        fit = (children := self.unit[first:end])[self.fits(unit, children)]
        return int(fit[rng.integers(len(fit))])

    def partners(self, unit: int) -> set[int]:
        """All that can be drawn."""
        found: set[int] = set()
        for parent in self.parent[self.ways[self.way[unit]:self.way[unit + 1]]]:
            children = self.unit[self.first[parent]:self.first[parent + 1]]
            found.update(children[self.fits(unit, children)].tolist())
        return found


class Kind(NamedTuple):
    """One way in which rows are paired: by their captions, or by their attributes."""
    siblings: Siblings
    unit: np.ndarray                    # (R,) of each row; -1 where it has no caption, or no attribute
    rows: list[list[int]]               # of each unit
    share: float                        # of the draws, among the ways that a row has
    by: str                             # "captions", "attributes"


def kind_of(units: tuple[np.ndarray, list[list[int]], np.ndarray], entries: Entries, share: float, by: str) -> Kind:
    """units: as Miner has them; entries: of the distinct captions, or rows of attributes, in order."""
    unit, rows, numbers = units
    return Kind(Siblings(entries, *numbers), unit, rows, share, by)


class Drawn(NamedTuple):
    target: int                         # a row
    changes: list[Change]
    kind: int


class Miner:
    """What leads from one row of a table to another. captions: of each row its words, () for none; attributes: of each
    row the values, by column; products, same: of each row a number, of its product and of what is to be the same."""

    def __init__(self, captions: Sequence[Words], attributes: Sequence[Row], products: Sequence[int],
                 same: Sequence[int], columns: Sequence[str], mining: Mining):
        self.captions, self.attributes, self.columns, self.span = captions, attributes, columns, mining.span
        self.products, self.same = np.array(products, np.int64), np.array(same, np.int64)
        kinds = []
        bags = [tuple(sorted(words)) for words in captions]                     # another order is no other caption
        if any(bags):
            first: dict[Words, Words] = {}
            for bag, words in zip(bags, captions, strict=True):
                first.setdefault(bag, words)
            first.pop((), None)
            kinds.append(kind_of(self.units(bags), caption_entries([*first.values()], mining.span), 1.0, "captions"))
            self.spoken = first
        rows = [row if any(row) else () for row in attributes]
        if distinct := [row for row in dict.fromkeys(rows) if row]:
            units = self.units(rows)
            for most, share in ((1, 1 - mining.two_changes), (2, mining.two_changes)):
                if share and len((entries := attribute_entries(distinct, most)).parent):
                    kinds.append(kind_of(units, entries, share, "attributes"))
        self.kinds = [kind for kind in kinds if len(kind.siblings.ways)]
        leads = np.zeros(len(captions), bool)
        for kind in self.kinds:
            found = np.diff(kind.siblings.way) > 0
            leads |= (kind.unit >= 0) & found[kind.unit]
        self.sources = np.flatnonzero(leads).tolist()                           # rows that lead somewhere

    def units(self, classes: Sequence[tuple]) -> tuple[np.ndarray, list[list[int]], np.ndarray]:
        """classes: of each row its caption or attributes, () for none. Returns (R,) each row's unit, each unit's rows,
        and (3, U) each unit's class, a number in order, its product, and what is to be the same."""
        numbers = {found: number for number, found in enumerate(dict.fromkeys(filter(None, classes)))}
        units: dict[tuple[int, int, int], int] = {}
        unit = np.full(len(classes), -1, np.int32)
        rows: list[list[int]] = []
        for row, (found, *of) in enumerate(zip(classes, self.products.tolist(), self.same.tolist(), strict=True)):
            if found:
                unit[row] = number = units.setdefault((numbers[found], *of), len(units))
                if number == len(rows):
                    rows.append([])
                rows[number].append(row)
        return unit, rows, np.array([*units], np.int64).reshape(-1, 3).T

    def ways(self, row: int) -> list[int]:
        return [number for number, kind in enumerate(self.kinds)
                if kind.unit[row] >= 0 and kind.siblings.leads(kind.unit[row])]

    def draw(self, row: int, rng: np.random.Generator) -> Drawn:
        """Where a source may lead: in a way by the ways' shares, to a random sibling's random row."""
        ways = self.ways(row)
        shares = np.array([self.kinds[number].share for number in ways])
        number = ways[rng.choice(len(ways), p=shares / shares.sum())] if len(ways) > 1 else ways[0]
        kind = self.kinds[number]
        rows = kind.rows[kind.siblings.draw(int(kind.unit[row]), rng)]
        target = rows[rng.integers(len(rows))]
        return Drawn(target, self.changes(row, target, kind.by), number)

    def changes(self, source: int, target: int, by: str) -> list[Change]:
        if by == "attributes":
            return attribute_changes(self.attributes[source], self.attributes[target], self.columns, 2)
        old, new = (self.spoken[tuple(sorted(self.captions[row]))] for row in (source, target))
        return [caption_change(old, new, self.span)]

    def right(self, drawn: Sequence[tuple[int, Drawn]]) -> Iterator[np.ndarray]:
        """Of each source with what was drawn, the rows that are as right: of the same caption, or attributes, by what
        was spoken of, with the same where that is asked for, and of another product than the source."""
        known: dict[tuple[int, int], np.ndarray] = {}
        for source, (target, _, number) in drawn:
            kind = self.kinds[number]
            found = int(kind.siblings.classes[kind.unit[target]])
            if (number, found) not in known:
                known[number, found] = np.concatenate([kind.rows[unit] for unit in np.flatnonzero(
                    kind.siblings.classes == found)])
            rows = known[number, found]
            others = (self.products[rows] != self.products[source]) & (self.same[rows] == self.same[source])
            yield rows if others.all() else rows[others]
