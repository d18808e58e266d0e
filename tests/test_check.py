"""data/check.py: what it finds in trees that were counted by hand, with trouble of every kind and without."""

import base64
import html
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from data import check
from machine.picture_files import decode
from training.pictures import QueryResults, sheet

from .conftest import DAMAGE, WRITERS, picture
from .test_bad_input import CASES

ONCE = "  texts             9 distinct of 9, 0 of them more than once, at most 1 times ('dress is darker by 0 and it ')"
FINE = ["files", "  missing or empty  0", "  broken            0", "  duplicates        0", "  in train and test 0"]
HOW_TO_DRAW = "--out check.html draws ten of its queries"


def write_triplets(root):
    for name in ("train/a", "train/b", "train/c", "train/d", "train/z", "test/e", "test/f", "test/g", "test/h"):
        picture(root / f"{name}.jpg")
    lines = [{"source_file_name": "a.jpg", "target_file_name": "b.jpg", "text": "is red"},
             {"source_file_name": "b.jpg", "target_file_names": ["c.jpg", "d.jpg"], "text": "is blue"}]
    (root / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (root / "test" / "metadata.csv").write_text("source_file_name,target_file_names,text\ne.jpg,f.jpg|g.jpg,is red\n"
                                                "f.jpg,e.jpg,is red\ng.jpg,e.jpg,赤い\n", "utf-8")
    return root


WRITE = {**WRITERS, "triplets": write_triplets}


@pytest.fixture
def checked(capsys):
    """Exit code and lines of a run."""
    def run(dataset, path, *words):
        code = check.main(["--dataset", dataset, "--dataset_path", str(path), *map(str, words)])
        captured = capsys.readouterr()
        assert unexpected(captured.err) == []
        return code, captured.out.splitlines()
    return run


def unexpected(error):
    """What a slow machine's progress does not explain."""
    return [line for line in error.splitlines() if not line.startswith("checking images: ")]


def files_below(path):
    return {str(file): file.is_file() and file.read_bytes() for file in path.rglob("*")}


CLEAN = {
    "mitstates": [
        "train split", "  images            10", "  training samples  10",
        "  texts             5 distinct of 10, 5 of them more than once, at most 2 times ('old bus')",
        "  vocabulary        5 words",
        "test split", "  images            10", "  queries           16",
        "  right answers     min 2, mean 2.0, max 2 a query",
        "  texts             3 distinct of 16, 3 of them more than once, at most 6 times ('ripe')",
        "  vocabulary        3 words, 2 of them not the train split's", *FINE,
        "  never used        4", "    images/adj dog/0.jpg", "    images/adj dog/1.jpg", "    images/unspaced/0.jpg",
        "    images/unspaced/1.jpg"],
    "fashion200k": [
        "train split", "  images            10", "  training samples  10",
        "  texts             5 distinct of 10, 5 of them more than once, at most 2 times ('red dress')",
        "  vocabulary        8 words",
        "test split", "  images            6", "  queries           2",
        "  right answers     min 2, mean 2.0, max 2 a query",
        "  texts             2 distinct of 2, 0 of them more than once, at most 1 times ('replace red with blue')",
        "  vocabulary        6 words, 3 of them not the train split's", *FINE, "  never used        0"],
    "fashionIQ": [
        "train split", "  images            12", "  training samples  9", ONCE, "  vocabulary        16 words",
        "test split", "  images            13", "  queries           9",
        "  right answers     min 1, mean 1.0, max 1 a query", ONCE, "  vocabulary        16 words", *FINE,
        "  never used        1", "    all_imgs/BOTHT1.jpg"],
    "triplets": [
        "train split", "  images            4", "  training samples  2",
        "  texts             2 distinct of 2, 0 of them more than once, at most 1 times ('is red')",
        "  vocabulary        3 words",
        "test split", "  images            4", "  queries           3",
        "  right answers     min 1, mean 1.3, max 2 a query",
        "  texts             2 distinct of 3, 1 of them more than once, at most 2 times ('is red')",
        "  vocabulary        2 words; 1 texts have none", *FINE, "  never used        1",
        "    train/z.jpg"]}
REMARKS = {"triplets": ["note: Hugging Face's imagefolder wants a list of target_file_names in each line, [] where "
                        "it is empty: {path}/train/metadata.jsonl, line 1, and 0 more, have none"]}


@pytest.mark.parametrize("dataset", CLEAN)
def test_a_whole_tree_is_counted_and_left_as_it_is(dataset, tmp_path, checked):
    path = WRITE[dataset](tmp_path / dataset)
    before = files_below(path)
    assert checked(dataset, path) == (0, [f"{dataset} in {path}", *CLEAN[dataset], *(
        line.format(path=path) for line in REMARKS.get(dataset, ())), "nothing is wrong", HOW_TO_DRAW])
    assert files_below(path) == before


def test_a_query_s_own_image_is_no_right_answer(fashion200k, checked):
    with open(fashion200k / "test_queries.txt", "a") as queries:
        queries.write("women/test/1/1_0.jpeg women/test/1/1_1.jpeg\n")          # of one caption
    assert "  right answers     min 1, mean 1.7, max 2 a query" in checked("fashion200k", fashion200k)[1]


def test_flags_are_those_of_a_run(mitstates, fashion_iq, checked):
    _, lines = checked("mitstates", mitstates, "--use_complete_text_query")
    assert "  texts             5 distinct of 16, 5 of them more than once, at most 4 times ('ripe tomato')" in lines
    _, lines = checked("fashionIQ", fashion_iq, "--validation", "0.5")
    splits = [lines.index(f"{split} split") for split in ("train", "validation", "test")]
    counts = [int(lines[start + 2].split()[-1]) for start in splits]
    assert counts[0] + counts[1] == 9 and 0 < counts[0] < 9 and counts[2] == 9
    _, lines = checked("fashionIQ", fashion_iq, "--category_to_train", "dress")
    assert lines[2:4] == ["  images            4", "  training samples  3"] and "  never used        18" in lines


def test_every_trouble_of_one_tree_is_seen_in_one_run(mitstates, checked):
    images = mitstates / "images"
    (images / "new dog").mkdir()
    picture(images / "old cat" / "0.jpg")
    DAMAGE["cut"](images / "wet dog" / "1.jpg", (images / "wet dog" / "1.jpg").read_bytes())
    DAMAGE["emptied"](images / "ripe fig" / "1.jpg", b"")
    for name in ("old dog/2.JPG", "ripe fig/2.JPG", "ripe fig/3.png"):
        picture(images / name)
    (images / "old dog" / "._0.jpg").touch()
    shutil.copy(images / "old bus" / "0.jpg", images / "old bus" / "1.jpg")
    shutil.copy(images / "young dog" / "0.jpg", images / "sliced fig" / "0.jpg")
    code, lines = checked("mitstates", mitstates)
    place = lines.index("files")
    assert code == 1 and lines[:4] == [
        f"mitstates in {mitstates}",
        f"wrong: {images}/new dog holds no .jpg (--any_suffix True reads others); put its images back, remove the "
        "folder, or pass --skip_bad_images True",
        f"wrong: the noun 'cat' has images of one adjective only under {images}, so no pair can be drawn for it; add a "
        "second state, remove the folder, or pass --skip_bad_images True", "train split"]
    assert "  passed over       1 empty folders, 1 hidden files, 1 files that do not end in .jpg, 1 nouns with one " \
        "adjective, 1 images of those nouns" in lines
    assert lines[place - 1] == "wrong: 3 files end in .JPG or .png, which the published protocol does not read; " \
        "--any_suffix True reads them"
    cut = lines.pop(place + 4)
    assert cut.startswith(f"    cannot read the image {images}/wet dog/1.jpg (")
    assert lines[place:] == [
        "files", "  missing or empty  1", "    images/ripe fig/1.jpg", "  broken            1",
        "  duplicates        2", "    images/old bus/0.jpg = images/old bus/1.jpg",
        "    images/young dog/0.jpg = images/sliced fig/0.jpg",
        "  in train and test 1", "    images/young dog/0.jpg = images/sliced fig/0.jpg",
        "  never used        8", "    images/adj dog/0.jpg", "    images/adj dog/1.jpg", "    images/old cat/0.jpg",
        "    images/old dog/2.JPG", "    images/ripe fig/2.JPG", "    ... and 3 more",
        "wrong: 1 images are missing or empty: put them back, or pass --skip_bad_images True to leave such images out",
        "wrong: 1 images are broken: put them back, or pass --skip_bad_images True to leave such images out",
        "--skip_bad_images True leaves out of the train split: 1 images, 1 empty folders, 1 hidden files, 1 files that "
        "do not end in .jpg, 1 nouns with one adjective, 1 images of those nouns",
        "--skip_bad_images True leaves out of the test split: 1 images, 2 files that do not end in .jpg",
        "5 wrong, see above: a run would stop there, leave something out or count it wrongly", HOW_TO_DRAW]


def test_what_any_suffix_reads_is_nothing_wrong(mitstates, checked):
    picture(mitstates / "images" / "old dog" / "2.JPG")
    assert checked("mitstates", mitstates)[0] == 1
    code, lines = checked("mitstates", mitstates, "--any_suffix", "True")
    assert code == 0 and lines[2:4] == ["  images            11", "  training samples  11"]


def test_where_a_split_cannot_be_read_the_other_and_all_pictures_are_looked_at(fashion200k, checked):
    (fashion200k / "labels" / "dress_train_detect_all.txt").write_text("no label\n")
    (fashion200k / "women" / "train" / "0" / "0_0.jpeg").write_bytes(b"GIF89a")
    (fashion200k / "women" / "test" / "0" / "0_0.jpeg").unlink()
    code, lines = checked("fashion200k", fashion200k)
    assert code == 1 and lines[1].startswith("wrong: ") and "line 1: expected 'path<TAB>" in lines[1]
    assert lines[2:5] == ["test split", "  images            6", "  queries           2"]
    assert "  never used        not known, as not every split can be read" in lines
    assert any("women/train/0/0_0.jpeg (" in line for line in lines) and "    women/test/0/0_0.jpeg" in lines
    assert "--skip_bad_images True leaves out of the test split: 1 images, 1 queries" in lines
    assert lines[-2] == "3 wrong, see above: a run would stop there, leave something out or count it wrongly"


def test_a_split_of_which_nothing_is_left_is_said(fashion200k, checked, tmp_path):
    (fashion200k / "test_queries.txt").write_text("women/test/0/0_0.jpeg women/test/1/1_0.jpeg\n")
    (fashion200k / "women" / "test" / "1" / "1_0.jpeg").unlink()
    code, lines = checked("fashion200k", fashion200k, "--out", tmp_path / "out.png")
    assert code == 1 and any("gives no test query" in line for line in lines)
    assert (tmp_path / "out.png").exists()                                      # of the train split


def test_a_triplet_without_its_image_and_no_test_split(tmp_path, checked):
    path = write_triplets(tmp_path / "triplets")
    (path / "test" / "g.jpg").unlink()
    code, lines = checked("triplets", path)
    assert code == 1 and [line for line in lines if line.startswith("wrong")] == [
        f"wrong: {path}/test/metadata.csv, line {line}: g.jpg is not in {path}/test; is h.jpg meant?; mend the line, "
        "put the picture there, or pass --skip_bad_images True to leave such lines out" for line in (2, 4)]
    assert "  queries           1" in lines and "  passed over       2 triplets whose images are missing" in lines
    shutil.rmtree(path / "test")
    code, lines = checked("triplets", path)
    assert code == 1 and "pass --validation 0.1" in lines[1] and lines[2:4] == ["train split", "  images            4"]


def test_all_lines_that_do_not_fit_are_named(tmp_path, checked):
    path = write_triplets(tmp_path / "triplets")
    with open(path / "test" / "metadata.csv", "a") as table:
        table.write("e.jpg,e.jpg,is red\nf.jpg,g.jpg,\ne.jpg,g.jpg|e.jpg,is blue\n")
    code, lines = checked("triplets", path)
    wrong = [line for line in lines if line.startswith("wrong: ")]
    assert code == 1 and [line.partition("metadata.csv, ")[2][:24] for line in wrong] == [
        "line 5: the target is th", "line 6: no text (it has ", "line 7: the target is th"]
    assert "  passed over       3 lines that do not fit" in lines
    assert "3 wrong, see above: a run would stop there, leave something out or count it wrongly" in lines


HEAD = "source_file_name,target_file_name,text\n"
ONE = HEAD + "a.jpg,b.jpg,is red\n"
HUGGING_FACE = {  # files to write and what is said of Hugging Face's imagefolder; as datasets 5.2.0 did it
    "semicolons": ({"metadata.csv": ONE.replace(",", ";")}, "it wants UTF-8, commas, and"),
    "a line that says the separator": ({"metadata.csv": "sep=,\n" + ONE}, "header in line 1"),
    "UTF-16": ({"metadata.csv": ONE.encode("utf-16")}, "it wants UTF-8"),
    "another ending": ({"metadata.ndjson": '{"source_file_name": "a.jpg", "target_file_name": "b.jpg", "text": "x"}'},
                       "metadata.ndjson, only metadata.csv and metadata.jsonl"),
    "a word for nothing": ({"metadata.csv": ONE + "b.jpg,a.jpg,n/a\na.jpg,b.jpg,NA\n"},
                           "in place of 2 texts: .*line 3, 'n/a'"),
    "a list that is null": ({"metadata.jsonl": "".join(
        f'{{"source_file_name": "a.jpg", "target_file_name": "b.jpg", "text": "x", "negative_file_names": {value}}}\n'
        for value in ('["a.jpg"]', "null"))}, "a list of negative_file_names in each line.*line 2, and 0 more, have"),
    "a folder's word": ({"metadata.csv": ONE, "to test/x.jpg": b"", "to test/y.jpg": b""},
                        "takes to test/x.jpg for a split by its name, with 1 more"),
    "a photo's word": ({"metadata.csv": ONE, "my_val-2.jpg": b""}, "takes my_val-2.jpg for a"),
    "neither": ({"metadata.csv": ONE, "contest.jpg": b"", "trained/x.jpg": b"",
                 "devout.jpg": b"", "Test/y.jpg": b""}, "")}


@pytest.mark.parametrize("case", HUGGING_FACE)
def test_what_hugging_face_makes_of_it_is_said(case, tmp_path, checked):
    files, said = HUGGING_FACE[case]
    for name in ("a.jpg", "b.jpg"):
        picture(tmp_path / name)
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        if name.endswith(".jpg"):
            picture(tmp_path / name)
        else:
            (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    _, lines = checked("triplets", tmp_path, "--validation", "0.5")
    notes = [line for line in lines if line.startswith("note: Hugging Face's imagefolder ")]
    assert len(notes) == bool(said) and all(re.search(said, note) for note in notes), lines


def test_one_picture_in_both_splits_is_said(tmp_path, checked):
    """b is: asked about in the one, and trained with. That a is in the gallery too is as it should be."""
    for name in "abc":
        picture(tmp_path / f"{name}.jpg")
    (tmp_path / "metadata.csv").write_text("split,source_file_name,target_file_name,text\ntrain,a.jpg,b.jpg,is red\n"
                                           "test,b.jpg,c.jpg,is red\n")
    code, lines = checked("triplets", tmp_path)
    place = lines.index("  in train and test 1")
    assert code == 0 and lines[place + 1] == "    b.jpg"


@pytest.mark.parametrize("case", [case for case, (_, damage, changes, _) in CASES.items() if damage and not changes])
def test_what_would_stop_a_run_is_said(case, tmp_path, capsys):
    dataset, damage, _, words = CASES[case]
    path = WRITERS[dataset](tmp_path / dataset)
    damage(path)
    code = check.main(["--dataset", dataset, "--dataset_path", str(path)])
    captured = capsys.readouterr()
    if path.is_dir():
        assert code == 1 and unexpected(captured.err) == [] and "wrong: " in captured.out
        assert all(word in captured.out for word in words), captured.out
    else:
        assert code == 2 and captured.err == f"data/check.py: error: {path} is no folder; check --dataset_path\n"


@pytest.mark.parametrize(("words", "said"), [
    (["--dataset", "coco"], "--dataset"), (["--keep_source", "maybe"], "'maybe'"),
    (["--validation", "2"], "--validation"), (["--out", "sheet.jpg"], ".html or .png"),
    (["--out", "nowhere/sheet.png"], "there is no folder nowhere")])
def test_a_wrong_flag_is_one_line(mitstates, capsys, words, said):
    with pytest.raises(SystemExit) as stop:
        check.main(["--dataset", "mitstates", "--dataset_path", str(mitstates), *words])
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == "" and captured.err.count("\n") == 1 and said in captured.err


@pytest.mark.parametrize("missing", ["--dataset", "--dataset_path"])
def test_a_flag_that_is_needed_is_asked_for(capsys, missing):
    with pytest.raises(SystemExit) as stop:
        check.main([f"{flag}=mitstates" for flag in ("--dataset", "--dataset_path") if flag != missing])
    assert stop.value.code == 2 and f"required: {missing};" in capsys.readouterr().err


def test_a_sheet_that_cannot_be_written_is_one_line(mitstates, capsys):
    (mitstates / "is.png").mkdir()
    assert check.main(["--dataset", "mitstates", "--dataset_path", str(mitstates), "--out",
                       str(mitstates / "is.png")]) == 2
    (line,) = unexpected(capsys.readouterr().err)
    assert line.startswith(f"data/check.py: error: cannot write --out {mitstates}/is.png (")


def test_the_sheet_shows_queries_with_their_right_answers(fashion200k, tmp_path, checked):
    def shown(name):
        return Image.fromarray(decode(fashion200k / "women" / "test" / f"{name}.jpeg", 128))
    assert checked("fashion200k", fashion200k, "--out", tmp_path / "sheet.png")[0] == 0
    expected = sheet([QueryResults(shown("0/0_0"), "+ replace red with blue", [shown("1/1_0"), shown("1/1_1")],
                                   [True, True], remark="2 right"),
                      QueryResults(shown("1/1_1"), "+ replace dress with skirt", [shown("2/2_0"), shown("2/2_1")],
                                   [True, True], remark="2 right")], 8, 128)
    assert (np.asarray(Image.open(tmp_path / "sheet.png")) == np.asarray(expected)).all()


def test_ten_queries_are_drawn_the_same_each_time(mitstates, tmp_path, checked):
    for name in ("a.png", "b.png"):
        checked("mitstates", mitstates, "--out", tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert Image.open(tmp_path / "a.png").height == 8 + 10 * (30 + 128 + 8 + 8)


@pytest.mark.parametrize("dataset", ["fashionIQ", "triplets"])
def test_the_others_are_drawn_too(dataset, tmp_path, checked):
    code, lines = checked(dataset, WRITE[dataset](tmp_path / dataset), "--out", tmp_path / "sheet.png")
    assert code == 0 and lines[-1] == "nothing is wrong"
    rows, lines = {"fashionIQ": (9, 9 + 6), "triplets": (3, 3)}[dataset]        # six long texts take two lines
    assert Image.open(tmp_path / "sheet.png").height == 8 + rows * (128 + 8 + 8) + lines * 30


def test_the_page_needs_no_other_file_and_takes_no_name_for_html(tmp_path, checked):
    path = WRITE["mitstates"](tmp_path / "<b>tree")
    _, lines = checked("mitstates", path, "--out", tmp_path / "page.HTML")
    page = (tmp_path / "page.HTML").read_text()
    assert "<b>" not in page and html.escape("\n".join(lines)) in page
    (source,) = re.findall(r'src="(.*?)"', page)
    assert source.startswith("data:image/png;base64,") and not re.search("http|href|url", page.replace(source, ""))
    checked("mitstates", path, "--out", tmp_path / "sheet.png")
    assert base64.b64decode(source.partition(",")[2]) == (tmp_path / "sheet.png").read_bytes()


@pytest.mark.long("a process")
def test_it_runs_from_anywhere(mitstates, tmp_path, checked):
    def run(*words):
        return subprocess.run([sys.executable, os.path.relpath(check.__file__, tmp_path), *words], cwd=tmp_path,
                              capture_output=True, text=True, check=False)
    done = run("--dataset=mitstates", "--dataset_path=mitstates")
    assert done.returncode == 0 and unexpected(done.stderr) == []
    assert done.stdout.startswith("mitstates in mitstates\ntrain split\n")
    done = run("--help")
    assert done.returncode == 0 and "exit code is 0 where nothing is wrong" in " ".join(done.stdout.split())
    done = run("--dataset=mitstates")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--dataset_path" in done.stderr
