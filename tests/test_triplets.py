"""Pictures of one's own from a table: every way to write it, recalls by hand, and what is wrong in one line."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import main
from benchmarks.base import CompositionDataset
from datasets import Epoch, Sample, Triplets
from machine.errors import InputError
from machine.image_store import ImageStore
from test_retrieval import chance, recalls

from .conftest import flags, picture, run_main

NAMES = [f"{letter}.jpg" for letter in "abcdefgh"]
LINES = [{"source_file_name": "a.jpg", "target_file_names": ["c.jpg", "h.jpg"], "text": "is red", "group": "hat"},
         {"source_file_name": "b.jpg", "target_file_name": "h.jpg", "text": "is blue", "group": "hat",
          "negative_file_names": ["c.jpg", "e.jpg"]},
         {"source_file_name": "c.jpg", "target_file_name": "d.jpg", "text": "is red", "group": "shoe",
          "target_caption": "a red shoe"},
         {"source_file_name": "d.jpg", "target_file_names": ["e.jpg"], "text": "has dots", "group": "shoe",
          "negative_file_names": ["f.jpg"]}]


def jsonl(lines):
    return "".join(json.dumps(line) + "\n" for line in lines)


def csv(lines, separator=","):
    """As a spreadsheet writes it."""
    columns = ["source_file_name", "target_file_names", "text", "group", "negative_file_names", "target_caption",
               "split"]
    rows = [columns]
    for line in lines:
        line = {**line, "target_file_names": line.get("target_file_names") or [line["target_file_name"]]}
        rows.append(["|".join(value) if isinstance(value := line.get(name, ""), list) else value for name in columns])
    return "\ufeff" + "".join(separator.join(f'"{value}"' for value in row) + "\r\n" for row in rows)


def write(root, tables, images=NAMES):
    """tables: {path below root: content}; the images lie beside each, or beside its split's."""
    for file, content in tables.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(content.encode() if isinstance(content, str) else content)
        for name in images:
            picture((root / file).parent / name)
    return root


@pytest.fixture
def shop(tmp_path):
    return write(tmp_path / "shop", {"train/metadata.jsonl": jsonl(LINES), "test/metadata.jsonl": jsonl(LINES)})


def turned(degrees):
    return torch.tensor([[math.cos(math.radians(angle)), math.sin(math.radians(angle))] for angle in degrees])


def found(data, degrees):
    """Recalls where a, b, ... h lie at 0, 10, ... 70 degrees and the queries at these."""
    gallery = turned([10 * NAMES.index(name.rpartition("/")[2]) for name in data.images])
    task, done = data.task(), {}
    for asked in task.query_sets:
        rows = [data.all_queries.index(next(line for line in data.all_queries if (line.source, line.text) == query))
                for query in zip(asked.sources.tolist(), asked.texts, strict=True)]
        done |= recalls(turned(degrees)[rows], gallery[torch.as_tensor(task.gallery)], asked.excluded, asked.metrics)
    return done


# Nearest first, the source out. 24 degrees: c d b e f g h; 36: e d f c g h a; 18: b d a e f g h; 58: g f h e c b a.
DEGREES = [24, 36, 18, 58]
# First right ones: c 0, h 5, d 1, e 3. Own galleries: hat names a c h b e, shoe c d e f: c 0; h after e and c, 2; d 0,
# as b is not in it; e after f, 1. Among negatives: h after e and c, 2; e after f, 1.
RECALLS = {"correct_composition": {1: 1 / 4, 5: 3 / 4, 10: 1}, "own_gallery_hat": {1: 1 / 2, 5: 1},
           "own_gallery_shoe": {1: 1 / 2, 5: 1}, "among_negatives": {1: 0, 2: 1 / 2, 3: 1}}
BY_HAND = {f"recall_top{k}_{metric}": value for metric, values in RECALLS.items() for k, value in values.items()}
WAYS = {"folders, jsonl": lambda lines: {"train/metadata.jsonl": jsonl(LINES), "test/metadata.jsonl": jsonl(lines)},
        "folders, csv": lambda lines: {"train/metadata.csv": csv(LINES), "test/metadata.csv": csv(lines)},
        "csv of a European spreadsheet": lambda lines: {"train/metadata.csv": csv(LINES, ";"),
                                                        "test/metadata.csv": csv(lines, ";")},
        "one table with splits": lambda lines: {"metadata.jsonl": jsonl(
            {**line, "split": split} for split in ("train", "test") for line in lines)},
        "one table with splits, csv": lambda lines: {"metadata.csv": csv(
            {**line, "split": split} for split in ("train", "test") for line in lines)},
        "UTF-16, tabs": lambda lines: {"metadata.csv": csv(
            ({**line, "split": split} for split in ("training", "Eval") for line in lines), "\t").encode("utf-16-le")},
        "carriage returns": lambda lines: {"metadata.CSV": csv(
            {**line, "split": split} for split in ("train", "test") for line in lines).replace("\r\n", "\r")},
        "a separator that is said": lambda lines: {"testing/metadata.csv": "sep=|\r\n" + csv(lines, "|")[1:]},
        "a list": lambda lines: {"Test/metadata.json": json.dumps(lines, indent=1)},
        "large letters": lambda lines: {"test/Metadata.JSONL": jsonl(lines)},
        "ndjson": lambda lines: {"test/metadata.ndjson": jsonl(lines)}}


@pytest.mark.parametrize("way", WAYS)
def test_recalls_are_those_by_hand_however_the_table_is_written(way, tmp_path):
    data = Triplets(write(tmp_path / "shop", WAYS[way](LINES)), "test")
    assert [name.rpartition("/")[2] for name in data.images] == NAMES
    recall = found(data, DEGREES)
    assert {name: recall[name] for name in BY_HAND} == pytest.approx(BY_HAND)
    assert set(recall) == set(data.metric_names())
    assert "4 queries with 1 to 2 right of 8 images in the gallery" in data.about and "left out" in data.about


def test_a_kept_source_takes_its_place(shop):
    """The third query at 24 degrees has its source c nearest, then d, which is right; the others as above."""
    degrees = [24, 36, 24, 58]
    assert found(Triplets(shop, "test"), degrees)["recall_top1_correct_composition"] == 2 / 4
    recall = found(Triplets(shop, "test", keep_source=True), degrees)
    assert [recall[f"recall_top{k}_correct_composition"] for k in (1, 5, 10)] == [1 / 4, 3 / 4, 1]


def test_a_gallery_file_says_what_is_found_among(shop):
    (shop / "test" / "gallery.txt").write_text("h.jpg\nc.jpg\n./d.jpg\ne.jpg\nf.jpg\n")
    data = Triplets(shop, "test")
    assert data.gallery == 5 and data.images == [f"test/{letter}.jpg" for letter in "hcdefab"]
    (asked, *_) = data.task().query_sets
    assert asked.excluded.tolist() == [-1, -1, 1, 2]                            # a and b are not in it
    assert found(data, DEGREES)["recall_top5_correct_composition"] == 1         # h: after e d f c
    assert "those of gallery.txt" in data.about
    (shop / "test" / "gallery.txt").write_text("c.jpg\n")
    with pytest.raises(InputError, match=r"line 1: h.jpg is not in gallery.txt"):
        Triplets(shop, "test")


def test_chance_counts_several_right_ones_and_few_candidates(shop):
    """Of 7 images without the source 2, 1, 1, 1 are right; of 3 and of 2 candidates one."""
    sets = Triplets(shop, "test").task().query_sets
    assert chance(sets[0])["recall_top1_correct_composition"] == pytest.approx((2 + 1 + 1 + 1) / 7 / 4)
    assert chance(sets[1])["recall_top1_own_gallery_hat"] == pytest.approx((2 / 4 + 1 / 4) / 2)
    assert chance(sets[-1])["recall_top1_among_negatives"] == pytest.approx((1 / 3 + 1 / 2) / 2)


def test_training_draws_among_the_right_answers(shop):
    data = Triplets(shop, "train")
    drawn = {data.sample(np.array([0]), 0, (0, epoch)) for epoch in range(30)}
    assert drawn == {Sample(data.images.index("train/a.jpg"), data.images.index(f"train/{name}.jpg"), "is red")
                     for name in "ch"}
    samples = Epoch(data, 0, 0)
    assert sorted(sample.text for sample in samples) == sorted(line["text"] for line in LINES)
    assert data.training_texts() == [line["text"] for line in LINES]


def test_a_share_of_the_source_images_is_held_out(tmp_path):
    lines = [{"source_file_name": f"{source}.jpg", "target_file_name": "z.jpg", "text": f"number {number}"}
             for source in range(40) for number in range(3)]
    root = write(tmp_path / "shop", {"metadata.jsonl": jsonl(lines)}, [f"{n}.jpg" for n in range(40)] + ["z.jpg"])
    assert Triplets.splits(root, 0.3) == ["train", "validation"]
    train, held = (Triplets(root, split, held_out=0.3) for split in ("train", "validation"))
    sources = [{data.images[line.source] for line in data.annotations} for data in (train, held)]
    assert not sources[0] & sources[1] and len(sources[0] | sources[1]) == 40 and 5 < len(sources[1]) < 20
    assert len(train.annotations) + len(held.annotations) == 120
    assert "of a share of 0.3 of the source images, held out" in held.about
    with pytest.raises(InputError, match=r"no test split.*pass --validation 0.1"):
        Triplets.splits(root, 0)


def test_whole_captions_are_asked_with_and_make_images_equally_right(shop):
    lines = [{**line, "target_caption": caption} for line, caption in zip(LINES, "x y x z".split(), strict=True)]
    write(shop, {"test/metadata.jsonl": jsonl(lines)})
    data = Triplets(shop, "test", complete_text=True)
    assert data.task().query_sets[0].texts == ["x", "y", "x", "z"]
    goals = dict(zip([name[5:6] for name in data.images], data.target_labels.tolist(), strict=True))
    assert goals["c"] == goals["d"] and len({goals[letter] for letter in "abcefgh"}) == 7    # x; h is y


def test_pictures_are_seen_upright_and_nothing_but_pictures_is_in_the_gallery(shop):
    note = Image.Exif()
    note[0x112] = 8                                                             # turned to the left
    Image.open(shop / "test" / "a.jpg").save(shop / "test" / "turned.jpg", exif=note, quality=90)
    for name in ("notes.txt", ".hidden.jpg", "image_cache/x.jpg", "below/i.PNG"):
        (shop / "test" / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 40)).save(shop / "test" / name, "PNG")
    data = Triplets(shop, "test")
    assert data.images == [*(f"test/{name}" for name in NAMES), "test/turned.jpg", "test/below/i.PNG"]
    with Image.open(shop / "test" / "turned.jpg") as stored:
        plain = stored.transpose(Image.Transpose.ROTATE_90)
    plain.save(shop / "plain.png")
    (one,), (other,) = (ImageStore([str(file)], 32, None, "bilinear", data.upright).batch([0])
                        for file in (shop / "test" / "turned.jpg", shop / "plain.png"))
    assert torch.equal(one, other)


def test_a_run_trains_tests_and_is_tested_again_from_its_test_split_alone(shop, tmp_path, capfd, caplog):
    run = run_main("triplets", shop, tmp_path / "logs", best_metric="recall_top1_among_negatives")
    assert set(run.metrics["test"]) == set(Triplets(shop, "test").metric_names())
    assert "test split: 4 queries with 1 to 2 right of 8 images" in capfd.readouterr().out
    for file in (shop / "train").iterdir():
        file.unlink()
    again = tmp_path / "again"
    assert main.main([f"--dataset_path={shop}", "--test_only=True", f"--model_checkpoint={run.checkpoint}",
                      f"--log_dir={again}"]) == 0
    (folder,) = again.iterdir()
    tested = json.loads((folder / "metrics.json").read_text())
    assert tested == {"it": 3, "test": pytest.approx(run.metrics["test"]),
                      "protocol": {"test": run.metrics["protocol"]["test"]}}
    assert "note: the train split is not tested" in caplog.text


def test_a_test_split_is_read_whatever_the_others_look_like(shop):
    (shop / "train" / "metadata.jsonl").write_text("no table")
    assert len(Triplets(shop, "test").annotations) == 4 and Triplets.splits(shop, 0) == ["train", "test"]
    with pytest.raises(InputError, match="not a line of JSON"):
        Triplets(shop, "train")


def test_what_is_held_out_is_what_the_best_checkpoint_is_chosen_by_where_there_is_no_test_split(tmp_path):
    lines = [{"source_file_name": name, "target_file_name": NAMES[number - 1], "text": f"is {number}"}
             for number, name in enumerate(NAMES)]
    root = write(tmp_path / "shop", {"metadata.csv": csv({**line, "split": "train"} for line in lines)})
    run = run_main("triplets", root, tmp_path / "logs", validation=0.2, baselines=True)
    assert list(run.metrics) == ["it", "train", "validation", "baselines", "protocol"]
    assert (run.folder / "best_checkpoint.pth").is_file()
    assert "recall/validation/composition@10/chance" in run.scalars()


def one(**changes):
    return jsonl([LINES[0] | changes])


def without(name):
    return jsonl([{key: value for key, value in LINES[2].items() if key != name}])


HEAD = "source_file_name,target_file_name,text\n"
TEST = "test/metadata.jsonl"
BAD = {  # what is wrong: (tables to write, arguments, parts of the line)
    "no table": ({"x/readme.txt": ""}, {}, ["metadata.jsonl or metadata.csv", "docs/your-own-pictures.md"]),
    "an empty table": ({TEST: ""}, {}, ["has no test split"]),
    "two tables": ({TEST: one(), "test/metadata.csv": csv(LINES)}, {}, ["both metadata.jsonl and metadata.csv"]),
    "tables at two places": ({TEST: one(), "metadata.jsonl": one()}, {}, ["two ways to say it"]),
    "no JSON": ({TEST: one() + "{'text': 1}\n"}, {}, [f"{TEST}, line 2", "not a line of JSON"]),
    "JSON that is no object": ({TEST: "\n[1]\n"}, {}, ["line 2", "expected one object", "[1]"]),
    "not UTF-8": ({TEST: one().encode() + b'{"text": "\xe9"}'}, {}, ["line 2", "not UTF-8", "CSV UTF-8"]),
    "a spreadsheet that is none": ({"test/metadata.xlsx": b"PK\3\4nonsense"}, {}, ["metadata.xlsx", "no spreadsheet"]),
    "no source": ({TEST: without("source_file_name")}, {}, ["line 1", "no source_file_name", "it has target"]),
    "no target": ({TEST: without("target_file_name")}, {}, ["line 1", "no target_file_name"]),
    "no text": ({TEST: without("text")}, {}, ["line 1", "no text"]),
    "a blank text": ({TEST: one(text="  ")}, {}, ["line 1", "no text"]),
    "a text that is a number": ({TEST: one(text=3)}, {}, ["line 1", "text is '3'", "expected a string"]),
    "targets that are no names": ({TEST: one(target_file_names=[1])}, {}, ["line 1", "expected a list of file names"]),
    "two sources": ({TEST: one(source_file_name=["a.jpg", "b.jpg"])}, {}, ["line 1", "2 sources"]),
    "a name that is almost there": ({TEST: one(source_file_name="A.jpg")}, {}, ["line 1", "A.jpg is not in",
                                                                              "is a.jpg meant?"]),
    "a picture that is not there": ({TEST: one(target_file_names=["c.jpg", "zebra.jpg"])}, {},
                                    ["line 1", "zebra.jpg is not in", "--skip_bad_images True"]),
    "a negative that is not there": ({TEST: one(negative_file_names=["zebra.jpg"])}, {}, ["zebra.jpg is not in"]),
    "what does not end as a picture": ({TEST: one(source_file_name="metadata.jsonl")}, {},
                                       ["does not end as a picture does"]),
    "a path that leads out": ({TEST: one(source_file_name="../train/a.jpg")}, {}, ["line 1", "no path inside"]),
    "an absolute path": ({TEST: one(source_file_name="/a.jpg")}, {}, ["line 1", "no path inside"]),
    "the source as its target": ({TEST: one(target_file_names=["a.jpg"])}, {}, ["line 1", "--keep_source True"]),
    "right and wrong": ({TEST: one(negative_file_names=["c.jpg"])}, {}, ["line 1", "c.jpg is both right and wrong"]),
    "no caption to ask with": ({TEST: one()}, {"complete_text": True}, ["line 1", "no target_caption"]),
    "too many groups": ({TEST: jsonl({**LINES[0], "group": f"{n}"} for n in range(51))}, {}, ["51 groups", "50 are"]),
    "a csv of no quotes": ({"test/metadata.csv": HEAD + "a.jpg,b.jpg,is red, with dots\n"}, {},
                           ["metadata.csv, line 2", "line 1 names no column for value 4", "quotes"]),
    "a csv with a quote that ends nowhere": ({"test/metadata.csv": HEAD + 'a.jpg,b.jpg,"is red\n'}, {},
                                             ["mend its quotes"]),
    "a csv of too few values": ({"test/metadata.csv": HEAD + "a.jpg,b.jpg\n"}, {}, ["line 2", "no text"]),
    "a csv with two columns of a name": ({"test/metadata.csv": "text,text\n"}, {}, ["line 1", "two columns", "'text'"]),
    "a csv with other columns": ({"test/metadata.csv": "source,target,text\na.jpg,b.jpg,red\n"}, {},
                                 ["line 2", "no source_file_name", "source, target, text"]),
    "an unknown split": ({"metadata.jsonl": one(split="spare")}, {}, ["line 1", "'spare'", "train, validation, test"]),
    "two folders of a split": ({"val/metadata.jsonl": one(), "dev/metadata.jsonl": one(), TEST: one()}, {},
                               ["dev/metadata.jsonl and", "val/metadata.jsonl are two ways to say it"]),
    "no header": ({"test/metadata.csv": "a.jpg,b.jpg,is red\nb.jpg,c.jpg,is blue\n"}, {},
                  ["metadata.csv, line 1 names no column, it has the picture a.jpg"]),
    "a padded title": ({"test/metadata.csv": "Queries;;\n\n" + (HEAD + "a.jpg,b.jpg,is red\n").replace(",", ";")}, {},
                       ["metadata.csv, line 1 names no column, line 3 does"]),
    "a gallery of what is not there": ({TEST: one(), "test/gallery.txt": "zebra.jpg\n"}, {}, ["gallery.txt, line 1"]),
    "a gallery that leads out": ({TEST: one(), "test/gallery.txt": "../a.jpg\n"}, {}, ["gallery.txt, line 1"]),
    "a table that is a folder": ({"test/metadata.jsonl/x": ""}, {}, ["metadata.jsonl or metadata.csv"]),
    "nothing held out": ({"metadata.jsonl": one()}, {"split": "validation", "held_out": 1e-9}, ["larger share"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_tables_are_one_line_that_says_where(case, tmp_path):
    tables, changes, parts = BAD[case]
    root = write(tmp_path / "shop", tables)
    with pytest.raises(InputError) as raised:
        Triplets(root, **{"split": "test", **changes})
    message = str(raised.value)
    assert "\n" not in message and all(part in message for part in parts), message


def test_a_bad_table_ends_a_run_in_one_line(shop, tmp_path, capfd):
    write(shop, {"train/metadata.jsonl": jsonl(LINES) + "{}\n"})
    assert main.main(flags("triplets", shop, tmp_path / "logs")) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("main.py: error")]
    assert "train/metadata.jsonl, line 5: no source_file_name" in line
    assert main.main(flags("triplets", shop, tmp_path / "logs", best_metric="recall_top1_own_gallery_cat")) == 2


def test_bad_images_are_left_out_with_their_lines(shop, tmp_path, capfd):
    """Of the test split b and c are none, and zebra.jpg is not there: three lines go with them, and one target."""
    for name in "bc":
        (shop / "test" / f"{name}.jpg").write_bytes(b"no picture")
    lines = [*LINES, {**LINES[3], "source_file_name": "zebra.jpg"}]
    (shop / "test" / "metadata.jsonl").write_text(jsonl(lines))
    run = run_main("triplets", shop, tmp_path / "logs", skip_bad_images=True)
    assert ("test split: left out 2 images, 1 triplets whose images are missing, 2 triplets whose images are broken"
            in capfd.readouterr().out)
    data = Triplets(shop, "test", without=frozenset({"test/b.jpg", "test/c.jpg"}))
    found = [(data.images[line.source], len(line.targets)) for line in data.annotations]
    assert found == [("test/a.jpg", 1), ("test/d.jpg", 1)]
    assert run.metrics["test"]["recall_top10_correct_composition"] == 1


def test_targets_of_both_columns_are_right(tmp_path):
    both = {"source_file_name": "a.jpg", "target_file_name": "b.jpg", "target_file_names": ["c.jpg", "b.jpg"]}
    lines = [{**both, "text": "is red"},
             {**both, "target_file_name": "", "target_file_names": "d.jpg|e.jpg", "text": "x"},
             {**both, "target_file_name": ["f.jpg"], "target_file_names": None, "text": "y"},
             {**both, "text": "z", "negative_file_name": "d.jpg", "negative_file_names": ["e.jpg"]}]
    data = Triplets(write(tmp_path / "shop", {"test/metadata.jsonl": jsonl(lines)}), "test")
    assert [[data.images[target][5:6] for target in line.targets] for line in data.annotations] == [
        ["b", "c"], ["d", "e"], ["f"], ["b", "c"]]
    assert [data.images[image] for image in data.annotations[3].negatives] == ["test/d.jpg", "test/e.jpg"]
    table = "source_file_name,target_file_name,target_file_names,text\na.jpg,b.jpg,c.jpg|d.jpg,is red\n"
    data = Triplets(write(tmp_path / "csv", {"test/metadata.csv": table}), "test")
    assert [data.images[target] for target in data.annotations[0].targets] == ["test/b.jpg", "test/c.jpg", "test/d.jpg"]


@pytest.mark.parametrize("name", ["val", "valid", "dev", "validation", "Val"])
def test_a_validation_folder_is_read_by_any_of_its_names(name, shop):
    write(shop, {f"{name}/metadata.jsonl": jsonl(LINES[:3])})
    assert Triplets.splits(shop, 0) == ["train", "validation", "test"]
    data = Triplets(shop, "validation")
    assert len(data.annotations) == 3 and data.images[0] == f"{name}/a.jpg" and data.gallery == 8
    with pytest.raises(InputError, match="has a validation split of its own: drop --validation"):
        Triplets.splits(shop, 0.1)


def test_lines_that_do_not_fit_are_left_out_and_all_of_them_named(shop):
    bad = [{**LINES[1], "target_file_name": "b.jpg"}, {**LINES[1], "negative_file_names": ["h.jpg"]},
           {**LINES[1], "text": " "}, {**LINES[1], "source_file_name": "../b.jpg"}]
    write(shop, {TEST: jsonl([LINES[0], *bad, LINES[1]])})
    with pytest.raises(InputError, match=r"line 2: the target is the source.*--skip_bad_images True leaves such lines"):
        Triplets(shop, "test")
    data = Triplets(shop, "test", without=frozenset())
    assert [line.text for line in data.annotations] == ["is red", "is blue"]
    assert data.dropped["lines that do not fit"] == 4 == len(data.amiss)
    said = ["line 2: the target is the source", "line 3: h.jpg is both right and wrong", "line 4: no text",
            "line 5: '../b.jpg' is no path inside"]
    assert all(part in line for part, line in zip(said, data.amiss, strict=True)), data.amiss
    (shop / "test" / "gallery.txt").write_text("c.jpg\nh.jpg\nb.jpg\n")
    write(shop, {TEST: jsonl([LINES[0], LINES[1]])})
    assert [line.text for line in Triplets(shop, "test", without=frozenset()).annotations] == ["is red"]
    write(shop, {TEST: jsonl(bad)})
    with pytest.raises(InputError, match=r"no usable line of the test split .*line 1: the target is the source"):
        Triplets(shop, "test", without=frozenset())


class Pairs(CompositionDataset):
    """One's own, of two methods: every image leads to the next."""

    def read(self):
        self.images = NAMES

    def queries(self):
        return [Sample(image, (image + 1) % len(NAMES), f"next of {name}") for image, name in enumerate(NAMES)]


def test_a_dataset_of_ones_own_is_read_and_queries_alone(shop):
    """The images at 0, 10, ... 70 degrees, the queries where they lead, but the last, from h to a, at 31: a is the last
    of seven."""
    data, train = Pairs(shop / "test", "test"), Pairs(shop / "test", "train")
    (asked,) = data.task().query_sets
    recall = recalls(turned([10, 20, 30, 40, 50, 60, 70, 31]), turned(range(0, 80, 10)), asked.excluded, asked.metrics)
    assert [recall[f"recall_top{k}_correct_composition"] for k in (1, 5, 10)] == [7 / 8, 7 / 8, 1]
    assert data.metric_names() == train.metric_names() and data.best_metric in data.metric_names()
    assert sorted(Epoch(train, 0, 0)) == sorted(train.queries()) and len(train) == 8
    assert set(train.sample_texts(0, 0)) == set(train.training_texts())
