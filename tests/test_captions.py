"""Pictures with captions or attributes: what is drawn and asked of small tables worked out by hand, every way to write
them, and what is wrong in one line."""

import json
import shutil

import numpy as np
import pytest
import torch

import main
from benchmarks.mining import Mining
from data import check, mine
from datasets import Captions, Epoch, Triplets
from machine.errors import InputError
from test_retrieval import recalls

from .conftest import flags, run_main
from .test_triplets import NAMES, csv, jsonl, write

LOOKS = "red hat", "blue hat", "green hat", "red coat", "blue coat", "green coat", "a scarf of wool", ""
ROWS = [{"file_name": name, "caption": caption} for name, caption in zip(NAMES, LOOKS, strict=True)]
SIBLINGS = {"a": "bcd", "b": "ace", "c": "abf", "d": "aef", "e": "bdf", "f": "cde"}    # of one word


def table(rows, separator=","):
    columns = [*dict.fromkeys(name for row in rows for name in row)]
    cells = [columns, *([str(row.get(name, "")) for name in columns] for row in rows)]
    return "".join(separator.join(f'"{value}"' for value in line) + "\n" for line in cells)


def of(rows, **more):
    return [{**row, **more} for row in rows]


def shop(tmp_path, rows=ROWS, name="metadata.csv", images=NAMES, **tables):
    return write(tmp_path / "shop", {name: table(rows) if name.endswith(".csv") else jsonl(rows), **tables}, images)


def drawn(data, epochs=20):
    """{source: targets}, by letters."""
    found: dict[str, set[str]] = {}
    for epoch in range(epochs):
        for sample in Epoch(data, 0, epoch):
            source, target = (data.images[image].rpartition("/")[2][0] for image in sample[:2])
            found.setdefault(source, set()).add(target)
    return {source: "".join(sorted(targets)) for source, targets in sorted(found.items())}


WAYS = {"csv": ("metadata.csv", table(ROWS)), "a European spreadsheet's": ("metadata.csv", table(ROWS, ";")),
        "jsonl": ("metadata.jsonl", jsonl(ROWS)), "captions.csv": ("captions.csv", table(ROWS)),
        "a list": ("captions.json", json.dumps(ROWS)), "UTF-16": ("captions.csv", table(ROWS).encode("utf-16")),
        "a folder a split": ("train/metadata.csv", table(ROWS)),
        "with splits": ("metadata.csv", table([*of(ROWS, split="train"), *of(ROWS[:2], file_name="x.jpg")][:8]))}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_drawn_is_that_by_hand_however_the_table_is_written(way, tmp_path):
    name, content = WAYS[way]
    data = Captions(write(tmp_path / "shop", {name: content}), "train", mining=Mining(span=0))
    assert drawn(data) == SIBLINGS and len(data) == 6 and len(data.images) == 8
    assert "8 rows" in data.about and "2 of them lead nowhere" in data.about
    texts = {sample.text for epoch in range(20) for sample in Epoch(data, 0, epoch) if sample[:2] == (0, 1)}
    assert texts == {"in blue", "with blue", "replace red with blue", "blue instead of red"}


def test_samples_depend_on_seed_epoch_and_position_alone(tmp_path):
    data = Captions(shop(tmp_path), "train")
    one, again, other = Epoch(data, 3, 1), Epoch(Captions(data.root, "train"), 3, 1), Epoch(data, 3, 2)
    assert [*one] == [*again] and [one[4], one[2]] == [again[4], again[2]] and [*one] != [*other]
    assert set(data.sample_texts(3, 1)) == {sample.text for sample in one}


def test_words_of_every_sample_are_the_vocabulary_s(tmp_path):
    rows = [{**row, "Main_colour": "pink", "kind": row["caption"][:3]} for row in ROWS]
    data = Captions(shop(tmp_path, rows), "train", mining=Mining(
        attributes="Main_colour,kind", templates="in=1,covr=1,without=1,named=1"))
    words = {word for text in data.training_texts() for word in text.lower().split()}
    texts = {text for epoch in range(20) for text in data.sample_texts(0, epoch)}
    assert {word for text in texts for word in text.split()} <= words and "kind" in words


def test_attributes_are_mined_as_columns_say(tmp_path):
    columns = ([*"red blue red;blue red blue green".split(), "", "red"], "hat hat hat coat coat coat hat scarf".split())
    rows = [{"file_name": name, "colour": colour, "kind": kind, "price": price, "brand": "x"}
            for price, (name, colour, kind) in enumerate(zip(NAMES, *columns, strict=True))]
    root = shop(tmp_path, rows)
    data = Captions(root, "train", mining=Mining(attributes="colour,kind,price", two_changes=0))
    assert drawn(data, 60) == {"a": "bcdh", "b": "ace", "c": "ab", "d": "aefh", "e": "bdf", "f": "de", "h": "ad"}
    assert "price is another in every row" in data.about and "not read: brand (--attributes" in data.about
    found = {(sample[:2], sample.text) for epoch in range(60) for sample in Epoch(data, 0, epoch)}
    assert {text for pair, text in found if pair == (0, 2)} == {"in blue", "with blue", "in colour blue",
                                                               "with colour blue"}
    assert {text for pair, text in found if pair == (2, 0)} == {"without blue", "without colour blue"}
    alone = Captions(root, "train", mining=Mining(two_changes=0))               # no caption: the words that recur
    assert alone.columns == ["colour", "kind", "brand"] and drawn(alone, 60) == drawn(data, 60)
    assert alone.single == ["brand"] and "not read: price" in alone.about


def test_a_product_s_own_pictures_are_no_targets(tmp_path):
    """a and b are one product, as d and e: of their siblings each other's are left out."""
    rows = [{**row, "product": product} for row, product in zip(ROWS, "xxyzzwvu", strict=True)]
    apart = {"a": "cd", "b": "ce", "c": "abf", "d": "af", "e": "bf", "f": "cde"}
    assert drawn(Captions(shop(tmp_path, rows), "train", mining=Mining(span=0))) == apart
    for column, rule in (("sku", "sku"), ("group", "auto")):
        named = [{**row, column: product} for row, product in zip(ROWS, "xxyzzwvu", strict=True)]
        root = shop(tmp_path / column, named)
        assert drawn(Captions(root, "train", mining=Mining(span=0, product=rule))) == apart
    names = [f"{name[0]}-{product}_1.jpg" for name, product in zip(NAMES, "xxyzzwvu", strict=True)]
    by_name = [{**row, "file_name": name} for row, name in zip(ROWS, names, strict=True)]
    root = shop(tmp_path / "names", by_name, images=names)
    assert drawn(Captions(root, "train", mining=Mining(span=0, product=r"-(\w)_\d+"))) == apart
    own = Captions(tmp_path / "shop", "train", mining=Mining(span=0, same_product=True))
    assert drawn(own) == SIBLINGS


def test_several_captions_of_a_picture_do_not_lead_to_itself(tmp_path):
    rows = [{"file_name": "a.jpg", "caption": ["red hat", "a crimson hat"]}, {**ROWS[1]},
            {"file_name": "a.jpg", "caption": "green hat"}]
    data = Captions(shop(tmp_path, rows, "metadata.jsonl"), "train")
    assert drawn(data) == {"a": "b", "b": "a"} and len(data.images) == 2 and len(data) == 4


def split_rows(column="split"):
    return [*of(ROWS, **{column: "train"}), *({**row, "file_name": f"{row['file_name'][0]}2.jpg", column: "test"}
                                              for row in ROWS)]


TWICE = [*NAMES, *(f"{letter}2.jpg" for letter in "abcdefgh")]


def test_mined_queries_are_asked_of_the_split_s_own_rows(tmp_path):
    data = Captions(shop(tmp_path, split_rows(), images=TWICE), "test", mining=Mining(span=0))
    (asked,) = data.task().query_sets
    assert data.asked == "mined" and len(asked.texts) == 6 and len(data.task().gallery) == 8
    assert "no hand-written line is of this split, so 6 mined queries are asked of the 8 images" in data.about
    for query, right in zip(data.all_queries, asked.metrics[0].right, strict=True):
        source, target = (data.images[image][0] for image in query[:2])
        assert target in SIBLINGS[source] and right.tolist() == [query.target]
    rows = [{**row, "caption": "red hat" if row["file_name"][0] in "acde" else row["caption"]} for row in split_rows()]
    data = Captions(shop(tmp_path, rows, images=TWICE), "test", mining=Mining(span=0))
    (asked,) = data.task().query_sets
    right = {data.images[source][0]: "".join(data.images[image][0] for image in images)
             for source, images in zip(asked.sources, asked.metrics[0].right, strict=True)}
    assert right == {"a": "b", "b": "acde", "c": "b", "d": "b", "e": "b"}
    assert asked.excluded.tolist() == asked.sources.tolist()


LINES = [{"source_file_name": "a.jpg", "target_file_names": ["b.jpg", "c.jpg"], "text": "is not red"},
         {"source_file_name": "d.jpg", "target_file_names": ["e.jpg"], "text": "do you have it in blue?"}]


def test_hand_written_lines_are_trained_with_in_their_share(tmp_path):
    root = shop(tmp_path, **{"triplets.csv": csv(LINES)})
    data = Captions(root, "train", mining=Mining(span=0, written=0.3))
    samples = [sample for epoch in range(100) for sample in Epoch(data, 0, epoch)]
    written = [sample for sample in samples if sample.text in ("is not red", "do you have it in blue?")]
    assert 0.2 < len(written) / len(samples) < 0.4
    assert {sample[:2] for sample in written} == {(0, 1), (0, 2), (3, 4)}
    assert "a share of 0.3 of the samples is of the 2 hand-written lines" in data.about
    assert {"is not red", "do you have it in blue?"} < {*data.training_texts()}
    alone = Captions(root, "train", mining=Mining(span=0, written=0))
    assert drawn(alone) == SIBLINGS and "hand-written" not in alone.about
    rest = [sample for sample in samples if sample not in written]
    assert {sample.target for sample in rest} == {*range(6)}


@pytest.mark.parametrize("names", [("metadata.csv", "triplets.csv"), ("captions.csv", "metadata.csv"),
                                   ("captions.jsonl", "triplets.jsonl")])
def test_a_test_on_hand_written_lines_is_that_of_triplets(names, tmp_path):
    lines = [{**line, "split": split, "source_file_name": line["source_file_name"].replace(".", f"{end}."),
              "target_file_names": [name.replace(".", f"{end}.") for name in line["target_file_names"]]}
             for split, end in (("train", ""), ("test", "2")) for line in LINES]
    content = jsonl(lines) if names[1].endswith("jsonl") else csv(lines)
    root = shop(tmp_path, split_rows(), names[0], TWICE, **{names[1]: content})
    data, theirs = Captions(root, "test"), Triplets(root, "test")
    assert data.asked == "hand-written" and data.images == theirs.images and data.about == theirs.about
    gallery, queries = torch.nn.functional.normalize(torch.randn(2, 16, 8, generator=torch.manual_seed(0)), dim=2)
    found = [{name: value for asked in split.task().query_sets for name, value in recalls(
        queries[:2], gallery, asked.excluded, asked.metrics).items()} for split in (data, theirs)]
    assert found[0] == found[1] and Captions.splits(root, 0) == Triplets.splits(root, 0) == ["train", "test"]
    assert len(Captions(root, "train").annotations) == 2 and Captions(root, "train").asked == "mined and hand-written"


def test_products_that_hand_written_test_lines_name_are_not_trained_with(tmp_path):
    """Where the table says nothing of splits: d and e are tested on, so no mined pair has them."""
    lines = [{**LINES[0], "split": "train"}, {**LINES[1], "split": "test"}]
    data = Captions(shop(tmp_path, **{"triplets.csv": csv(lines)}), "train", mining=Mining(span=0, written=0))
    assert drawn(data) == {"a": "bc", "b": "ac", "c": "abf", "f": "c"}
    assert [line.text for line in Captions(data.root, "test").annotations] == ["do you have it in blue?"]


def test_whole_products_are_held_out(tmp_path):
    names = [f"{number}.jpg" for number in range(60)]
    rows = [{"file_name": name, "caption": f"{'red blue green'.split()[number % 3]} hat", "product": f"p{number // 3}"}
            for number, name in enumerate(names)]
    lines = [{"source_file_name": f"{number}.jpg", "target_file_names": [f"{number + 1}.jpg"], "text": f"line {number}"}
             for number in range(59)]
    root = shop(tmp_path, rows, images=names)
    assert Captions.splits(root, 0.3) == ["train", "validation"]
    with pytest.raises(InputError, match=r"no test split.*--validation 0.1 to hold out a tenth of the products"):
        Captions.splits(root, 0)
    train, held = (Captions(root, split, held_out=0.3) for split in ("train", "validation"))
    products = [{picture.product for picture in data.rows_here} for data in (train, held)]
    assert not products[0] & products[1] and len(products[0] | products[1]) == 20 and 2 < len(products[1]) < 12
    assert held.asked == "mined" and len(train.images) + len(held.images) == 60
    write(root, {"triplets.csv": csv(lines)}, [])
    train, held = (Captions(root, split, held_out=0.3) for split in ("train", "validation"))
    for data, own in ((train, products[0]), (held, products[1])):
        named = {data.images[image] for line in data.annotations for image in (line.source, *line.targets)}
        assert named and {f"p{int(name[:-4]) // 3}" for name in named} <= own
    assert train.dropped["hand-written lines from one split into another"] == (
        59 - len(train.annotations) - len(held.annotations)) > 0
    assert "a share of 0.3 of the products" in held.about


def test_whole_captions_are_asked_with(tmp_path):
    data = Captions(shop(tmp_path), "train", complete_text=True)
    assert {(sample.target, sample.text) for sample in Epoch(data, 0, 0)} <= {*enumerate(LOOKS)}


def test_equal_rows_are_equally_right(tmp_path):
    rows = [{**row, "caption": row["caption"].replace("green", "red")} for row in ROWS]
    data = Captions(shop(tmp_path, rows), "train")
    labels = dict(zip("abcdefgh", data.target_labels.tolist(), strict=True))
    assert labels["a"] == labels["c"] and labels["d"] == labels["f"] and len({*labels.values()}) == 6


def test_a_run_says_what_its_test_asked(tmp_path, capfd):
    root = shop(tmp_path, split_rows(), images=TWICE)
    run = run_main("captions", root, tmp_path / "logs", span=0)
    said = capfd.readouterr().out
    assert "test split: triplets are mined from 8 rows" in said and "\ntest: mined queries\n" in said
    assert set(run.metrics["test"]) == {f"recall_top{k}_correct_composition" for k in (1, 5, 10, 50, 100)}
    line = {**LINES[0], "source_file_name": "a2.jpg", "target_file_names": ["b2.jpg"]}
    write(root, {"triplets.csv": csv([line])}, [])
    again = tmp_path / "again"
    assert main.main([f"--dataset_path={root}", "--test_only=True", f"--model_checkpoint={run.checkpoint}",
                      f"--log_dir={again}"]) == 0
    assert "\ntest: hand-written queries\n" in capfd.readouterr().out


@pytest.mark.long("two runs")
def test_a_resumed_run_knows_an_edited_table(tmp_path, capfd):
    root = shop(tmp_path, split_rows(), images=TWICE)
    run = run_main("captions", root, tmp_path / "logs")
    text = (root / "metadata.csv").read_text()
    (root / "metadata.csv").write_text(text.replace("a scarf of wool", "a scarf of silk"))
    words = flags("captions", root, tmp_path / "logs", num_iters=5, resume=run.folder)
    assert main.main(words) == 2 and "had other train texts" in capfd.readouterr().err
    (root / "metadata.csv").write_text(text)
    assert main.main([*words, "--written=0.25"]) == 2 and "--written 0.75 (now 0.25)" in capfd.readouterr().err
    assert main.main(words) == 0


def test_broken_and_missing_pictures_are_left_out(tmp_path, capfd):
    root = shop(tmp_path, split_rows(), images=TWICE)
    (root / "a.jpg").write_bytes(b"no picture")
    (root / "b.jpg").unlink()
    with pytest.raises(InputError, match=r"metadata.csv, line 3: b.jpg is not in"):
        Captions(root, "train")
    run_main("captions", root, tmp_path / "logs", skip_bad_images=True)
    assert ("train split: left out 1 images, 1 rows whose images are broken, 1 rows whose images are missing"
            in capfd.readouterr().out)


HEAD = "file_name,caption\n"
BAD = {  # what is wrong: (tables, settings, parts of the line)
    "no table": ({"x/readme.txt": ""}, {}, ["metadata.csv or captions.csv", "docs/your-own-pictures.md"]),
    "an empty table": ({"metadata.csv": HEAD}, {}, ["metadata.csv has no row"]),
    "triplets": ({"metadata.csv": csv(LINES)}, {}, ["line 2: no file_name", "--dataset triplets reads such a table"]),
    "neither captions nor attributes": ({"metadata.csv": "file_name,price\na.jpg,3\nb.jpg,4\n"}, {},
                                        ["neither a caption nor an attribute", "not read: price"]),
    "file names alone": ({"metadata.csv": "file_name,caption\na.jpg,\nb.jpg,\n"}, {}, ["neither a caption nor"]),
    "an attribute that differs in each": ({"metadata.csv": "file_name,number\na.jpg,x1\nb.jpg,x2\n"}, {},
                                          ["number is another in every row", "not mined"]),
    "a column that is not there": ({"metadata.csv": table(of(ROWS, colour="red"))}, {"attributes": "coulour"},
                                   ["--attributes", "no column 'coulour'", "it has colour"]),
    "a product that is not there": ({"metadata.csv": table(ROWS)}, {"product": "sku"}, ["--product", "no column 'sku'",
                                                                                    "regular expression"]),
    "a rule that is none": ({"metadata.csv": table(ROWS)}, {"product": "(("}, ["--product '(('", "no regular"]),
    "a row without a name": ({"metadata.jsonl": jsonl([ROWS[0], {"caption": "x"}])}, {}, ["line 2: no file_name"]),
    "a caption that is a number": ({"metadata.jsonl": jsonl([{**ROWS[0], "caption": 3}])}, {}, ["caption is '3'"]),
    "an attribute that is an object": ({"metadata.jsonl": jsonl(of(ROWS[:2], colour={"a": 1}))}, {
        "attributes": "colour"}, ["line 1: colour is", "expected a text"]),
    "a name that leads out": ({"metadata.csv": HEAD + "../a.jpg,red hat\n"}, {}, ["line 2", "no path inside"]),
    "a picture that is not there": ({"metadata.csv": HEAD + "A.jpg,red hat\n"}, {}, ["line 2", "is a.jpg meant?"]),
    "one caption for all": ({"metadata.csv": table(of(ROWS, caption="red hat"))}, {}, ["no two of the 8 rows"]),
    "nothing in common": ({"metadata.csv": HEAD + "a.jpg,a red hat of wool\nb.jpg,zwei blaue Kleider\n"}, {},
                          ["no two of the 2 rows"]),
    "a product in two splits": ({"metadata.csv": table([*of(ROWS[:3], split="train", product="p"), {
        **ROWS[3], "split": "test", "product": "p"}])}, {}, [
            "line 5: d.jpg is of the test split, and a.jpg, of the same product, of the train split", "line 2"]),
    "a product in two folders": ({"train/metadata.csv": table(of(ROWS, product="p")),
                                  "test/metadata.csv": table(of(ROWS, product="p"))}, {}, [
        "metadata.csv, line 2", "a product must be in one"]),
    "a line of another split": ({"metadata.csv": table(split_rows()), "triplets.csv": csv(of(LINES, split="test"))}, {},
                                ["triplets.csv, line 2", "a.jpg of the train split", "metadata.csv, line 2"]),
    "tables in other folders": ({"metadata.csv": table(ROWS), "test/triplets.csv": csv(LINES)}, {}, [
        "do not stand in the same folder"]),
    "a bad hand-written line": ({"metadata.csv": table(ROWS), "triplets.csv": csv(of(LINES, text=""))}, {}, [
        "triplets.csv, line 2: no text"]),
    "an unknown split": ({"metadata.csv": table(of(ROWS, split="spare"))}, {}, ["line 2", "'spare'"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_tables_are_one_line_that_says_where(case, tmp_path):
    tables, settings, parts = BAD[case]
    root = write(tmp_path / "shop", tables, TWICE)
    with pytest.raises(InputError) as raised:
        Captions(root, "train", mining=Mining(**settings))
    message = str(raised.value)
    assert "\n" not in message and all(part in message for part in parts), message


def test_rows_that_do_not_fit_are_left_out_and_named(tmp_path):
    rows = [*of(ROWS[:4], split="train", product=""), {"file_name": "", "caption": "x"}, {**ROWS[4], "split": "train",
            "product": "p"}, {**ROWS[5], "split": "test", "product": "p"}]
    data = Captions(shop(tmp_path, rows), "train", without=frozenset(), mining=Mining(span=0))
    assert drawn(data) == {"a": "bcd", "b": "ac", "c": "ab", "d": "a"}
    assert data.dropped["rows that do not fit"] == 1 and data.dropped["rows whose product is in two splits"] == 1
    assert [part in line for part, line in zip(["line 6: no file_name", "line 8: f.jpg"], data.amiss, strict=True)] == [
        True, True]


def test_empty_cells_and_two_languages_lead_where_they_can(tmp_path):
    captions = "red hat", "blue hat", "roter Hut", "blauer Hut", "", " ", "红帽子", "蓝帽子"
    rows = [{**row, "caption": caption} for row, caption in zip(ROWS, captions, strict=True)]
    assert drawn(Captions(shop(tmp_path, rows), "train")) == dict(zip("abcdgh", "badchg", strict=True))


@pytest.mark.long("of that size")
def test_forty_thousand_rows_of_one_caption(tmp_path):
    """They are one caption: what differs from it finds them, and they it; reading takes no pairs of them."""
    rows = [*({"file_name": f"{number % 7}.jpg", "caption": "red hat"} for number in range(40_000)),
            {"file_name": "7.jpg", "caption": "blue hat"}]
    data = Captions(shop(tmp_path, rows, images=[f"{number}.jpg" for number in range(8)]), "train")
    assert len(data) == 40_001 and len(data.images) == 8
    assert Epoch(data, 0, 0)[0].target == 7
    assert data.draw(40_000, np.random.default_rng(0))[0].target < 7


def test_other_names_of_the_table_are_the_triplets_(tmp_path):
    """What was there before reads as before: metadata.csv alone."""
    root = write(tmp_path / "shop", {"metadata.csv": csv(of(LINES, split="test"))})
    assert len(Triplets(root, "test").annotations) == 2
    shutil.copy(root / "metadata.csv", root / "triplets.csv")
    write(root, {"metadata.csv": table(ROWS)}, [])
    assert len(Triplets(root, "test").annotations) == 2


def test_what_would_be_drawn_is_written_as_a_table_of_triplets(tmp_path, capsys):
    root = shop(tmp_path, split_rows(), images=TWICE, **{"triplets.csv": csv(of(LINES, split="train"))})
    file = root / "mined.csv"
    words = ["--dataset_path", str(root), "--span", "0", "--epochs", "3", "--seed", "5", "--written", "0.2"]
    assert mine.main([*words, "--out", str(file)]) == 0
    shutil.copy(file, tmp_path / "mined.csv")
    (root / "triplets.csv").unlink()
    file.rename(root / "triplets.csv")
    written = {split: [(data.images[line.source], [data.images[image] for image in line.targets], line.text)
                       for line in data.annotations]
               for split, data in ((split, Triplets(root, split)) for split in ("train", "test"))}
    write(root, {"triplets.csv": csv(of(LINES, split="train"))}, [])
    data = Captions(root, "train", mining=Mining(span=0, written=0.2))
    expected = dict.fromkeys(sample for epoch in range(3) for sample in Epoch(data, 5, epoch))
    assert written["train"] == [(data.images[source], [data.images[target]], text) for source, target, text in expected]
    asked = Captions(root, "test", mining=Mining(span=0))
    assert written["test"] == [(asked.images[source], [asked.images[target]], text)
                               for source, target, text in asked.all_queries]
    assert mine.main([*words, "--out", str(root / "triplets.csv")]) == 2
    assert "is there already; remove it" in capsys.readouterr().err
    assert mine.main([*words, "--out", str(tmp_path / "other" / "mined.csv")]) == 2
    assert "neither in" in capsys.readouterr().err
    assert mine.main([*words, "--out", str(tmp_path / "mined.txt")]) == 2 and not (tmp_path / "mined.txt").exists()
    assert mine.main([*words, "--out", str(tmp_path / "up.jsonl")]) == 0
    assert json.loads((tmp_path / "up.jsonl").read_text().splitlines()[0])["source_file_name"].startswith("shop/")


def test_what_would_be_drawn_is_a_folder_that_can_be_handed_on(tmp_path):
    """As imagefolder has it: a table a split beside its pictures, every row with the same columns, lists as lists."""
    root = shop(tmp_path, split_rows(), images=TWICE)
    assert mine.main(["--dataset_path", str(root), "--span", "0", "--out", str(tmp_path / "made")]) == 0
    assert Triplets.splits(tmp_path / "made", 0) == ["train", "test"]
    for split in ("train", "test"):
        theirs, data = Triplets(tmp_path / "made", split), Captions(root, split, mining=Mining(span=0))
        found = {(theirs.images[source].rpartition("/")[2], theirs.images[targets[0]].rpartition("/")[2], text)
                 for source, targets, text, *_ in theirs.annotations}
        samples = data.all_queries if split == "test" else Epoch(data, 0, 0)
        assert found == {(data.images[source], data.images[target], text) for source, target, text in samples}
        rows = [json.loads(line) for line in (tmp_path / "made" / split / "metadata.jsonl").read_text().splitlines()]
        assert all([*row] == ["source_file_name", "target_file_names", "text"] for row in rows)
    assert Triplets.remarks(tmp_path / "made") == []


def test_check_says_what_is_mined(tmp_path, capsys):
    rows = [{**row, "colour": row["caption"].partition(" ")[0], "brand": "x"} for row in split_rows()]
    root = shop(tmp_path, rows, images=TWICE)
    shutil.copy(root / "a.jpg", root / "c2.jpg")
    words = ["--dataset", "captions", "--dataset_path", str(root), "--attributes", "colour,brand", "--two_changes", "0"]
    assert check.main([*words, "--out", str(tmp_path / "sheet.html")]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = lines.index("train split")
    told = {line[2:20].strip(): line[20:] for line in lines[start:lines.index("test split")] if line.startswith("  ")}
    assert told["images"] == "8"
    changes = dict(each.split() for each in told["changes"].split(", "))
    assert set(changes) == {"caption", "colour"} and sum(map(int, changes.values())) == int(told["training samples"])
    assert sum(int(each.split()[1]) for each in told["templates"].split(", ")) == int(told["training samples"])
    assert told["of one value"] == "brand" and told["without partner"].startswith("1 rows, first")
    assert "  in train and test 1" in lines and "    a.jpg = c2.jpg" in lines and any(
        line.startswith("  look the same     1") for line in lines)
    assert lines[-1] == "nothing is wrong" and (tmp_path / "sheet.html").stat().st_size > 5000
