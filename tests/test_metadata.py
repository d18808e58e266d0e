"""What a user's table says of images: kept in the index, shown with results, filtered by, whoever writes the filter."""

import json
import random
import re
import sqlite3
import time

import numpy as np
import pytest

from machine.errors import InputError
from searching import metadata
from searching.gallery import Gallery
from searching.image_list import BEFORE_METADATA, ImageList
from searching.metadata import Filter, cell

from .conftest import picture
from .index_faults import copied, execute, older, write_model
from .test_search import CPU, features_index, run

TABLE = """colour,file_name,price,sku,note
red,a/0.jpg,10,007,"<b>warm</b>, soft"
red,a/1.jpg,49.5,012,
blue,a/2.jpg,50,0130,x
red,3.jpg,,1,
blue,b/4.jpg,-1e1,A5,
green,gone.jpg,1,2,
green,5.jpg,1,2,
"""
PATHS = ("a/0.jpg", "a/1.jpg", "a/2.jpg", "a/3.jpg", "b/4.jpg", "a/5.jpg", "b/5.jpg", "b/6.jpg")


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A folder of eight pictures, a table of five of them, and the index."""
    root = tmp_path_factory.mktemp("metadata")
    for path in PATHS:
        picture(root / "images" / path)
    (root / "products.csv").write_text("\ufeff" + TABLE)
    write_model(root / "model.pth")
    assert index(root, root / "out", "--metadata", root / "products.csv") == 0
    return root


def index(root, out, *more):
    return run("index", "--model_checkpoint", root / "model.pth", "--images", root / "images", "--out", out, "--device",
               "cpu", *more)


@pytest.fixture(scope="module")
def opened(first):
    return Gallery(first / "out", CPU)


@pytest.fixture
def asked(first, capsys):
    """A query's results, as JSON."""
    def ask(*words, out=first / "out"):
        capsys.readouterr()
        assert run("query", "--index", out, "--image", first / "products.png", "--device", "cpu", "--json", *words) == 0
        return json.loads(capsys.readouterr().out)["results"]
    picture(first / "products.png")
    return ask


def found(results):
    return {hit["path"].split("/images/")[1] for hit in results}


def test_results_have_what_the_table_says_of_them(first, opened, asked):
    said = {hit["path"].split("/images/")[1]: hit.get("metadata") for hit in asked()}
    assert said == {"a/0.jpg": {"colour": "red", "price": 10, "sku": "007", "note": "<b>warm</b>, soft"},
                    "a/1.jpg": {"colour": "red", "price": 49.5, "sku": "012", "note": None},
                    "a/2.jpg": {"colour": "blue", "price": 50, "sku": "0130", "note": "x"},
                    "a/3.jpg": {"colour": "red", "price": None, "sku": 1, "note": None},
                    "b/4.jpg": {"colour": "blue", "price": -10.0, "sku": "A5", "note": None},
                    "a/5.jpg": None, "b/5.jpg": None, "b/6.jpg": None}
    image = opened.images.id_of("a/0.jpg")
    assert opened.columns == ["colour", "price", "sku", "note"] and opened.metadata(image)["price"] == 10
    assert opened.metadata(opened.images.id_of("b/6.jpg")) == opened.metadata(99) == {}
    assert [hit.metadata for hit in opened.search(first / "products.png", "", 8, where="price = 10")] == [
        said["a/0.jpg"]]


@pytest.mark.parametrize(("where", "paths"), [
    ("price < 50 and colour = 'red'", {"a/0.jpg", "a/1.jpg"}),
    ("PRICE <= 50", {"a/0.jpg", "a/1.jpg", "a/2.jpg", "b/4.jpg"}),
    ("price IS NULL", {"a/3.jpg", "a/5.jpg", "b/5.jpg", "b/6.jpg"}), ("price <> 10", {"a/1.jpg", "a/2.jpg", "b/4.jpg"}),
    ("colour IS NOT NULL AND price IS NULL", {"a/3.jpg"}), ("colour LIKE 'R%' AND note NOT NULL", {"a/0.jpg"}),
    ("colour IN ('blue', 'green')", {"a/2.jpg", "b/4.jpg"}), ("sku = 'A5' OR sku = '1'", {"a/3.jpg", "b/4.jpg"}),
    ("length(coalesce(note, '')) = 1 -- one", {"a/2.jpg"}), ("colour = 'none'", set()),
    ("price BETWEEN 9 AND 11", {"a/0.jpg"}), ("1", set(PATHS)), (" ", set(PATHS))])
def test_a_filter_leaves_what_it_says(first, opened, where, paths):
    hits = opened.search(first / "images" / "a" / "0.jpg", "", where=where)
    assert {str(hit.path.relative_to(first / "images")) for hit in hits} == paths


@pytest.mark.parametrize("kind", ["exact", "ivf"])
def test_the_best_of_those_that_pass_are_those_of_a_slow_loop(tmp_path, kind):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(4000, 16)).astype(np.float32)
    opened = features_index(tmp_path, features, kind)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    for share in (0, 1, 5, 40, 2000, 4000):
        among = sorted(random.Random(share).sample(range(4000), share))
        for query in unit[:4]:
            slow = sorted(((float(unit[place] @ query), place) for place in among), reverse=True)[:7]
            best = opened.nearest(query, 7, [place + 1 for place in among])
            assert [number - 1 for number, _ in best] == [place for _, place in slow]
            assert [score for _, score in best] == pytest.approx([score for score, _ in slow], abs=1e-6)


HOSTILE = ["1) UNION SELECT 1 --", "1) UNION SELECT sql FROM sqlite_master --", "1); DELETE FROM metadata; --", "?",
           ":a", "(SELECT count(*) FROM metadata, metadata) > 1", "EXISTS (SELECT 1)",
           "price IN (SELECT price FROM metadata)",
           "(SELECT sql FROM sqlite_master) = 'x'", "1 IN pragma_database_list", "price IN sqlite_master",
           "load_extension('x')", "randomblob(1000000000) = 1", "zeroblob(1000000000) = 1", "printf('%1000000000d', 1)",
           "1; ATTACH 'x' AS y", "writefile('x', 'y')", "readfile('/etc/passwd') NOT NULL", "replace(colour, 'e', 'x')",
           "hex(colour)", "price REGEXP 'x'", "price MATCH 'x'", "colour -> 'x'", "date('now') = 1", "raise(FAIL, 'x')",
           "colour LIKE '" + "%a" * 150 + "'", "(" * 400 + "1" + ")" * 400, "price = \0", "price = '\ud800'", "price <",
           "count(*) = 1", "1)", "nonsense = 'red'", "(VALUES (1)) = 1", "price = 1 " * 200,
           "1) AND 1 IN (WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n"]


@pytest.mark.parametrize("where", HOSTILE, ids=lambda where: where[:30].encode("ascii", "replace").decode())
def test_a_hostile_filter_is_one_line_and_changes_nothing(first, opened, where, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = (first / "out" / "images.sqlite").read_bytes()
    with pytest.raises(InputError, match=r"^[^\n]*(with the columns colour, price, sku, note|shorten)[^\n]*$"):
        opened.search(first / "images" / "a" / "0.jpg", "", where=where)
    assert (first / "out" / "images.sqlite").read_bytes() == before and list(tmp_path.iterdir()) == []
    assert len(opened.filter.images("price NOT NULL")) == 4


def test_a_wrong_filter_is_one_line_and_code_2(first, capsys):
    words = ["query", "--index", first / "out", "--image", first / "images" / "a" / "0.jpg", "--where"]
    assert run(*words, "prize < 50") == 2
    assert re.fullmatch(r"search.py: error: cannot filter by prize < 50 \(no such column: prize\); write it as .*"
                        "columns colour, price, sku, note\n", capsys.readouterr().err)


def test_a_filter_is_not_waited_for_long(monkeypatch):
    monkeypatch.setattr(metadata, "PATIENCE", 0.2)
    opened = object.__new__(Filter)
    opened.columns, opened.lock = ["a"], metadata.Lock()
    opened.database = sqlite3.connect(":memory:", check_same_thread=False)
    opened.database.execute('CREATE TABLE metadata (" " INTEGER PRIMARY KEY, "a" TEXT)')
    opened.database.executemany("INSERT INTO metadata VALUES (?, ?)", ((None, "a" * 1000) for _ in range(30_000)))
    start = time.monotonic()
    with pytest.raises(InputError, match=r"it takes over 0\.2 s"):
        opened.images(" AND ".join(["a NOT LIKE '%a%a%a%a%a%a%ab'"] * 30))
    assert time.monotonic() - start < 20
    assert len(opened.images("a = 'b'")) == 0                                   # the next one has its own time


def test_the_table_stays_until_another_takes_its_place(first, tmp_path, caplog):
    out = copied(first / "out", tmp_path / "out")
    assert index(first, out) == 0
    assert len(Filter(ImageList(out / "images.sqlite")).images("colour = 'blue'")) == 2 and not caplog.text
    (tmp_path / "other.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in (
        {"name": "6.jpg", "size": 3, "new": True}, {"name": "a/0.jpg"}, {"name": "b/6.jpg"}, {"name": "gone.jpg"},
        {"name": "5.jpg"}, {"name": "0.jpg"})))
    assert index(first, out, "--metadata", tmp_path / "other.jsonl") == 0
    assert re.findall("note: .*", caplog.text) == ["note: 4 of the 6 rows of --metadata are of no image: 6.jpg, "
                                                   "another row is of b/6.jpg, ..."]
    assert metadata.columns_of(ImageList(out / "images.sqlite")) == ["size", "new"]
    assert Filter(ImageList(out / "images.sqlite")).images("size IS NULL AND new IS NULL") == list(range(1, 9))


def test_sheets_and_tables_show_it_and_no_text_is_taken_for_html(first, tmp_path, capsys):
    assert run("query", "--index", first / "out", "--image", first / "images" / "a" / "0.jpg", "--where", "price = 10",
               "--html", tmp_path / "found.html", "--png", tmp_path / "found.png", "--keep_query", True) == 0
    assert capsys.readouterr().out.endswith("a/0.jpg  colour: red, price: 10, sku: 007, note: <b>warm</b>, soft\n")
    page = (tmp_path / "found.html").read_text()
    assert "price: 10" in page and "&lt;b&gt;warm" in page and "<b>" not in page
    assert (tmp_path / "found.png").stat().st_size > 1000
    assert run("query", "--index", first / "out", "--image", first / "images" / "a" / "0.jpg", "--where", "price > 99",
               "--png", tmp_path / "none.png") == 0
    out, err = capsys.readouterr()
    assert out == "rank   score  image\n" and err == "note: no image has metadata of which --where holds\n"


@pytest.mark.parametrize(("content", "said"), [
    ("", "has no row"), ("file_name,price\n", "has no row"), ("a,b\nx.jpg,1\n", "no row of --metadata names an image"),
    ("f,b,B\na/0.jpg,1,2\n", "two columns 'B'"), ("f,b\na/0.jpg,1\na/0.jpg,2\n", "line 3: a second row of a/0.jpg"),
    ("f,b\n,1\n", "line 2: no file name in the column f"), ("f,b\na/0.jpg\n", "1 values for 2 columns"),
    ("f,b\na/0.jpg," + "x" * 1001 + "\n", "line 2: b is 'xxx.*at most 1000"), ("f,a\x01b\na/0.jpg,1\n", "a column 'a"),
    ("f," + ",".join(f"c{number}" for number in range(101)) + "\na/0.jpg" + ",1" * 101 + "\n", "101 columns; 100")])
def test_a_wrong_table_is_one_line_and_the_earlier_one_stays(first, tmp_path, capsys, content, said):
    out = copied(first / "out", tmp_path / "out")
    (tmp_path / "table.csv").write_text(content)
    assert index(first, out, "--metadata", tmp_path / "table.csv") == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and re.search(said, err), err
    assert metadata.columns_of(ImageList(out / "images.sqlite")) == ["colour", "price", "sku", "note"]


def test_an_index_from_before_has_no_columns_and_says_so(first, tmp_path, capsys, asked):
    out = copied(first / "out", tmp_path / "out")
    older(out, BEFORE_METADATA)
    assert len(asked(out=out)) == 8
    assert run("query", "--index", out, "--image", first / "products.png", "--where", "price < 50") == 2
    assert "no metadata to filter by; search.py index --metadata" in capsys.readouterr().err
    assert index(first, out, "--metadata", first / "products.csv") == 0
    assert "8 images, 0 of them encoded now" in capsys.readouterr().out
    assert len(asked("--where", "price < 50", out=out)) == 3


SPOILT = {"a cell": "UPDATE metadata SET cells = replace(cells, '10', '11')",
          "a path": "UPDATE metadata SET path = path || 'x'",
          "no checksum": "UPDATE metadata SET checksum = NULL", "a number": "UPDATE metadata SET cells = 1"}


@pytest.mark.parametrize("content", [
    *SPOILT, "[1]", "{", '{"a": [1]}', '{"a": 1e999}', '{"a": NaN}', '{"a": "\\ud800"}', '{"": 1}', "[" * 9999,
    f'{{"a": {2**63}}}', '{"a\\u0000b": 1}', '{"colour": "red"}', '{"A": 1, "a": 2}'])
def test_metadata_that_is_damaged_or_a_strangers_is_one_line(first, tmp_path, content):
    out = copied(first / "out", tmp_path / "out")
    path = b"a/0.jpg"
    execute(out, SPOILT.get(content) or ("UPDATE metadata SET cells = ?, checksum = ? WHERE path = ?",
                                         (content, metadata.checksum(path, content), path)))
    with pytest.raises(InputError, match=r"^.*images\.sqlite is damaged[^\n]*$"):
        Filter(ImageList(out / "images.sqlite"))


def test_a_cell_is_a_number_where_it_is_written_as_one():
    numbers = {"1": 1, "-2.50": -2.5, ".5": 0.5, "5.": 5.0, "1e3": 1000.0, "0": 0, "0.1": 0.1, " 7 ": 7, "+3": 3,
               str(2**63 - 1): 2**63 - 1, True: 1, "": None, "  ": None, None: None}
    texts = ("007", "1_000", "nan", "inf", "1e999", "1,5", "٣", str(2**63), "-", ".")
    for given, value in (numbers | {text: text for text in texts}).items():
        assert cell(given, "here") == value and type(cell(given, "here")) is type(value), given
