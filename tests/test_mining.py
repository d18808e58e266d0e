"""Mining: the published rules' golden numbers, and ours against every pair looked at one by one."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from benchmarks.mining import (
    FIT,
    TEMPLATES,
    Change,
    Miner,
    Mining,
    Siblings,
    Templates,
    attribute_changes,
    attribute_entries,
    caption_change,
    caption_entries,
    words_of,
)
from datasets import Fashion200k

from .conftest import LABEL

GOLDEN = json.loads((Path(__file__).parent / "golden" / "mining.json").read_text())
ONE_WORD = GOLDEN["one_word"]


def siblings(entries, products):
    return Siblings(entries, np.arange(len(products)), np.array(products))


def said(changes, templates="replace=1", seed=0):
    return Templates(templates).say(changes, np.random.default_rng(seed))


def test_one_word_by_whole_words_is_the_golden_one():
    captions = [words_of(caption) for caption in dict.fromkeys(ONE_WORD["captions"])]
    found = siblings(caption_entries(captions, 0), range(len(captions)))
    texts = {" ".join(words): {" ".join(captions[other]): said([caption_change(words, captions[other], 0)])
                               for other in found.partners(number)} for number, words in enumerate(captions)}
    assert texts == ONE_WORD["texts_by_whole_words"]
    assert [found.leads(number) for number in range(len(captions))] == [*map(bool, texts.values())]


def test_fashion200k_keeps_the_published_rule(tmp_path):
    (tmp_path / "labels").mkdir()
    lines = [LABEL.format(image=f"women/x/{number}/{number}_0.jpeg", caption=caption)
             for number, caption in enumerate(ONE_WORD["captions"])]
    (tmp_path / "labels" / "dress_train_detect_all.txt").write_text("".join(lines))
    data = Fashion200k(tmp_path, "train")
    assert data.children == ONE_WORD["parents_with_two_children_or_more"]
    found = {caption: sorted({child for parent in data.parents.get(caption, ()) for child in data.children[parent]}
                             - {caption}) for caption in data.images_of}
    assert found == ONE_WORD["siblings"]
    assert {caption: {other: data.text(caption, other) for other in others}
            for caption, others in found.items()} == ONE_WORD["texts"]


def test_covr_s_templates_are_the_golden_ones():
    """Where its captions differ in one word at one place; of the other two, A and B are shifted or there are none."""
    for number in ("0", "1", "3", "5"):
        change = caption_change(*map(words_of, GOLDEN["templates"]["pairs"][int(number)]), 0)
        texts = [form.format(old=change.old, new=change.new) for form in TEMPLATES["covr"]]
        assert texts == GOLDEN["templates"]["edits_by_template"][number]["meant"]
    shifted, none = (caption_change(*map(words_of, GOLDEN["templates"]["pairs"][number]), 3) for number in (4, 2))
    assert (shifted, none) == (Change("a", ""), Change("in snow", ""))
    drawn = {said([Change("red", "blue")], "covr=1", seed) for seed in range(200)}
    assert drawn == set(GOLDEN["templates"]["edits_by_template"]["1"]["meant"])


@pytest.mark.parametrize("span", [0, 1, 2, 3])
def test_captions_are_paired_as_by_looking_at_every_pair(span):
    chance = random.Random(span)
    for _ in range(15):
        letters = "abcd"[:chance.randint(2, 4)]
        drawn = [tuple(chance.choices(letters, k=chance.randint(0, 6))) for _ in range(chance.randint(1, 40))]
        captions = [*{tuple(sorted(words)): words for words in drawn}.values()]
        products = [chance.randint(0, 4) for _ in captions]
        found = siblings(caption_entries(captions, span), products)
        for one, words in enumerate(captions):
            slow = {other for other, others in enumerate(captions)
                    if products[one] != products[other] and slow_change(words, others, span)}
            assert found.partners(one) == slow and found.leads(one) == bool(slow), (words, span)
            if slow:
                assert found.draw(one, np.random.default_rng(one)) in slow


def slow_change(source, target, span):
    """Any run of words replaced by any other, and any word taken out of both."""
    runs = [(words[:start], words[start:end], words[end:]) for words in (source, target)
            for start in range(len(words) + 1) for end in range(start, min(start + span, len(words)) + 1)]
    half = sum(1 for start in range(len(source) + 1) for _ in range(start, min(start + span, len(source)) + 1))
    by_run = any(before == others[0] and after == others[2] and before + after and run != others[1]
                 for before, run, after in runs[:half] for others in runs[half:])
    return by_run or any(source[:i] + source[i + 1:] == target[:j] + target[j + 1:] and source[i] != target[j]
                         for i in range(len(source)) for j in range(len(target)))


@pytest.mark.parametrize("lists", [False, True])
def test_attributes_are_paired_as_by_looking_at_every_pair(lists):
    chance = random.Random(lists)
    values = [(), ("a",), ("b",), ("c",)] + [("a", "b"), ("a", "b", "c")] * lists
    for _ in range(30):
        columns = "wxyz"[:chance.randint(1, 4)]
        rows = [*dict.fromkeys(tuple(chance.choice(values) for _ in columns) for _ in range(chance.randint(1, 40)))]
        products = [chance.randint(0, 4) for _ in rows]
        one, two = (siblings(attribute_entries(rows, most), products) for most in (1, 2))
        for number, row in enumerate(rows):
            changes = {other: attribute_changes(row, others, columns, 2) for other, others in enumerate(rows)
                       if products[other] != products[number]}
            assert one.partners(number) == {other for other, found in changes.items() if found and len(found) == 1}
            both = {other for other, found in changes.items() if found and len(found) == 2 and len(columns) > 2}
            assert both <= two.partners(number) and all(changes[other] for other in two.partners(number))
            assert len(columns) > 2 or not two.partners(number)                 # nothing would stay


CHANGES = {  # of attributes, by column: what one row becomes in the other
    "exchanged": (("red",), ("blue",), Change("red", "blue", "main colour")),
    "added": (("red",), ("blue", "red"), Change("", "blue", "main colour")),
    "removed": (("blue", "red"), ("red",), Change("blue", "", "main colour")),
    "one of several": (("blue", "red"), ("green", "red"), Change("blue", "green", "main colour")),
    "not known": ((), ("red",), None), "no longer known": (("red",), (), None), "the same": (("red",), ("red",), None),
    "two of several": (("blue", "red"), ("green", "pink"), None), "one for two": (("blue",), ("green", "pink"), None)}


@pytest.mark.parametrize("case", CHANGES)
def test_what_changes_of_an_attribute(case):
    old, new, change = CHANGES[case]
    found = attribute_changes((old, ("hat",)), (new, ("hat",)), ["Main_colour", "kind"], 1)
    assert found == (change and [change])


CAPTIONS = {("red dress", "blue dress"): ("red", "blue"), ("red dress", "dark blue dress"): ("red", "dark blue"),
            ("dress", "red dress"): ("", "red"), ("red long dress", "dress"): ("red long", ""),
            ("A red dress.", "a Blue dress"): ("red", "blue"), ("wool hat", "hat box"): ("wool", "box"),
            ("dress", "skirt"): ("dress", "skirt"), ("rotes Kleid", "blaues Kleid"): ("rotes", "blaues"),
            ("the “old” hat", "the new hat"): ("old", "new")}


@pytest.mark.parametrize("pair", CAPTIONS)
def test_what_changes_of_a_caption(pair):
    source, target = map(words_of, pair)
    assert caption_change(source, target, 3) == Change(*CAPTIONS[pair])
    assert caption_change(source, source, 3) is None


@pytest.mark.parametrize(("source", "target"), [
    ("red dress", "hat box"), ("a b c d e", "e d c b a"), ("red wool hat", "hat"), ("red long dress", "long red dress"),
    ("a b c x", "d e f g x"), ("", "red")])
def test_what_is_more_than_a_change(source, target):
    assert caption_change(words_of(source), words_of(target), 1) is None


SAID = {"in": {"in blue", "in colour blue"}, "replace": {"replace red with blue", "replace colour red with blue"},
        "instead": {"blue instead of red", "colour blue instead of red"}, "with": {"with blue", "with colour blue"}}


@pytest.mark.parametrize("name", SAID)
def test_each_template_says_it(name):
    drawn = {said([Change("red", "blue", "colour")], f"{name}=1,named=0.5", seed) for seed in range(40)}
    assert drawn == SAID[name]
    assert {said([Change("red", "blue")], f"{name}=1,named=1", seed) for seed in range(9)} == {min(SAID[name], key=len)}


def test_what_is_added_or_removed_is_said_by_what_fits_it():
    assert {said([Change("", "blue")], "in=1,replace=5,without=5", seed) for seed in range(20)} == {"in blue"}
    assert {said([Change("red", "")], "in=1,without=1", seed) for seed in range(20)} == {"without red"}
    assert said([Change("red", "", "colour")], "in=1,named=1") == "without colour red"     # though it has no share
    assert {said([Change("", "blue")], "without=1", seed) for seed in range(40)} == {"in blue", "with blue"}
    two = [Change("red", "blue", "colour"), Change("wool", "silk", "material")]
    assert said(two, "replace=1,named=1") == "replace colour red with blue and replace material wool with silk"


def test_templates_are_drawn_by_their_shares():
    drawn = [said([Change("red", "blue")], "in=3,with=1", seed) for seed in range(1000)]
    assert {*drawn} == {"in blue", "with blue"} and 700 < drawn.count("in blue") < 800
    assert set(FIT) == {"exchanged", "added", "removed"} and {name for names in FIT.values() for name in names} == {
        *TEMPLATES}


@pytest.mark.parametrize(("text", "part"), [
    ("on=1", "there is no template 'on'; they are in, replace"), ("in", "the share of in is ''; expected a number"),
    ("in=x", "'x'; expected"), ("in=-1", "from 0 on"), ("in=nan", "from 0 on"), ("in=1,named=2", "at most 1")])
def test_shares_that_are_none(text, part):
    with pytest.raises(ValueError, match=part):
        Templates(text)


def test_a_column_s_name_is_no_format():
    assert said([Change("red", "blue", "{old}")], "in=1,named=1") == "in {old} blue"


def miner(captions, attributes=None, products=None, same=None, **settings):
    captions = [words_of(caption) for caption in captions]
    attributes = attributes or [()] * len(captions)
    columns = [f"column {number}" for number in range(len(attributes[0]))]
    return Miner(captions, attributes, products or range(len(captions)), same or [0] * len(captions),
                 columns, Mining(**settings))


def test_rows_lead_to_rows_of_other_products():
    """Of product 0 two pictures are blue, and its own red one leads to neither."""
    found = miner(["red hat", "blue hat", "blue hat", "blue hat", ""], products=[0, 0, 0, 1, 2])
    assert found.sources == [0, 3]
    assert {found.draw(0, np.random.default_rng(seed)).target for seed in range(40)} == {3}
    assert {found.draw(3, np.random.default_rng(seed)).target for seed in range(40)} == {0}
    back, there = (found.draw(row, np.random.default_rng(0)) for row in (3, 0))
    assert [rows.tolist() for rows in found.right([(3, back), (0, there), (4, there)])] == [[0], [3], [1, 2, 3]]


def test_what_is_to_be_the_same_is():
    found = miner(["red", "blue", "red", "green", "pink"], same=[0, 0, 1, 1, 2])
    assert found.sources == [0, 1, 2, 3]
    for source, target in ((0, 1), (1, 0), (2, 3), (3, 2)):
        assert {found.draw(source, np.random.default_rng(seed)).target for seed in range(20)} == {target}
    drawn = found.draw(1, np.random.default_rng(0))
    assert [rows.tolist() for rows in found.right([(1, drawn)])] == [[0]]


def test_captions_in_another_order_are_the_same():
    found = miner(["red long hat", "long red hat", "blue long hat"])
    assert {found.draw(0, np.random.default_rng(seed)).target for seed in range(40)} == {2}
    assert {found.draw(2, np.random.default_rng(seed)).target for seed in range(40)} == {0, 1}
    assert found.changes(2, 1, "captions") == [Change("blue", "red")]


def test_two_changes_are_drawn_in_their_share():
    rows = [((a,), (b,), ("hat",)) for a in "ab" for b in "cd"]
    def drawn(share):
        found = miner([""] * 4, rows, two_changes=share)
        return [len(found.draw(0, np.random.default_rng(seed)).changes) for seed in range(200)]
    assert drawn(0).count(2) == 0 < drawn(0.5).count(2) < drawn(1).count(2) < 200   # it is one in nine at most


def test_a_row_that_leads_nowhere_is_no_source():
    found = miner(["red hat", "blue hat", "a green coat with four large buttons", ""])
    assert found.sources == [0, 1]
    assert miner(["red hat"] * 5).sources == [] and miner(["", ""]).sources == []


def test_long_captions_and_many_alike():
    long = " ".join(f"word{number}" for number in range(300))
    found = miner([long, long.replace("word150", "other"), *["red hat"] * 400, "blue hat"])
    assert found.draw(0, np.random.default_rng(0)).changes == [Change("word150", "other")]
    assert len(found.sources) == 403 and found.draw(402, np.random.default_rng(0)).target in range(2, 402)
