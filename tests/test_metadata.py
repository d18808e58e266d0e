"""What a user's table says of images: kept in the index, shown with results, filtered by, whoever writes the filter."""

import json
import random
import re
import sqlite3
import sys
import time

import numpy as np
import pytest

from machine.errors import InputError
from searching import filter, metadata
from searching.condition import understood
from searching.filter import Filter
from searching.gallery import Gallery
from searching.image_list import BEFORE_METADATA, ImageList
from searching.numbers import Kind, read_column

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
               "cpu", "--engine", "torch", *more)


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
                    "a/3.jpg": {"colour": "red", "price": None, "sku": "1", "note": None},
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


def test_a_column_with_a_name_of_sqls_is_filtered_by_in_quotes():
    kinds = {"inner": Kind(True, "none")}
    with pytest.raises(ValueError, match="double quotes"):
        understood("inner > 3", kinds, str.upper)
    assert understood("\"inner\" > 3 OR lower([inner]) = 'none'", kinds, str.upper) == (
        "\"inner\" > 3 OR lower(INNER) = 'none'")


def test_missing_sqlglot_costs_filters_alone(first, monkeypatch, capsys):
    for name in ("sqlglot", "searching.condition"):
        monkeypatch.setitem(sys.modules, name, None)
    words = ["query", "--index", first / "out", "--image", first / "images" / "a" / "0.jpg"]
    assert run(*words) == 0 and run(*words, "--where", "price < 50") == 2
    assert capsys.readouterr().err == ("search.py: error: a filter needs sqlglot: pip install -r "
                                       "requirements-search.txt\n")


def test_a_filter_is_not_waited_for_long(monkeypatch):
    monkeypatch.setattr(filter, "PATIENCE", 0.2)
    opened = object.__new__(Filter)
    opened.columns, opened.kinds, opened.lock = ["a"], {}, filter.Lock()
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
    assert re.findall("note: .*", caplog.text) == ["note: 3 of the 6 rows of --metadata are of no image: 6.jpg, "
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
    ("f,b\n,1\n", "line 2: no file name in the column f"),
    ("f,b\na/0.jpg,1,2\n", "line 2: line 1 names no column for value 3, '2'"),
    ("f,b\na/0.jpg,1\n0.jpg,1\na/1.jpg,1\na/0.jpg,2\na/0.jpg,1\na/1.jpg,7\n",
     "line 5: a second row of a/0.jpg, which differs, and 1 more such rows, as .*line 7; keep one of each"),
    ("f,b\na/0.jpg," + "x" * 1001 + "\n", "line 2: b is 'xxx.*at most 1000"), ("f,a\x01b\na/0.jpg,1\n", "a column 'a"),
    ("f," + ",".join(f"c{number}" for number in range(101)) + "\na/0.jpg" + ",1" * 101 + "\n", "101 columns; 100")])
def test_a_wrong_table_is_one_line_and_the_earlier_one_stays(first, tmp_path, capsys, content, said):
    out = copied(first / "out", tmp_path / "out")
    (tmp_path / "table.csv").write_text(content)
    assert index(first, out, "--metadata", tmp_path / "table.csv") == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and re.search(said, err), err
    assert metadata.columns_of(ImageList(out / "images.sqlite")) == ["colour", "price", "sku", "note"]


@pytest.mark.long("an index of its own")
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


@pytest.mark.parametrize(("cells", "numbers", "said"), [
    # As programs write them: nothing is said.
    ("1|-2.50|.5|5.|1e3|0|+3", [1, -2.5, 0.5, 5.0, 1000.0, 0, 3], ""), (str(2**63 - 1), [2**63 - 1], ""),
    ("1.299|2.050", [1.299, 2.05], ""),
    # As people do.
    ("100,00|9,99", [100.0, 9.99], "100,00 is 100.0"), ("1,5|2", [1.5, 2], "1,5 is 1.5"),
    ("$1,299.00|$9.99", [1299.0, 9.99], "$1,299.00 is 1299.0"), ("49.90 EUR|50.00 EUR", [49.9, 50.0], "49.90 EUR is"),
    ("20 %|5 %", [20, 5], "20 % is 20"), ("20\u00a0%|5\u00a0%", [20, 5], "is 20"),
    ("1.234,50 €|9,00 €", [1234.5, 9.0], "1.234,50 € is 1234.5"), ("1\u202f234,50|7", [1234.5, 7], "is 1234.5"),
    ("1'299.50|3", [1299.5, 3], "is 1299.5"), ("-$5.00|$-6.50|$7", [-5.0, -6.5, 7], "-$5.00 is -5.0"),
    ("1,234,567|999", [1234567, 999], "is 1234567"), ("\u22123,5|4", [-3.5, 4], "is -3.5"),
    ("CHF 5|CHF 6.50", [5, 6.5], "CHF 5 is 5"), ("€0,99|€1.299,00", [0.99, 1299.0], "€0,99 is 0.99"),
    # Words for nothing, and others.
    ("5|n/a|#N/A|-|NULL||None|7", [5, None, None, None, None, None, None, 7], ""),
    ("5|on request|7|8", [5, "on request", 7, 8], "holds 'on request' among its numbers"),
    ("$5|on request|$7|sold out|$8", [5, "on request", 7, "sold out", 8], "holds 'on request' and 1 others"),
    # Texts.
    ("007|5", None, ""), ("1_000", None, ""), ("nan|inf", None, ""), ("1e999|5", None, ""), ("٣|5", None, ""),
    (str(2**63), None, ""), ("36|M|L", None, ""), ("5|A5", None, ""), ("-|n/a", None, ""), ("$5|€6", None, ""),
    ("49,90|12.50", None, ""), ("1.299,00|1,299.00", None, ""), ("5|5 EUR", None, ""), ("10-20|5", None, ""),
    ("1,00,000|5", None, ""), ("Dune|1984", None, ""), ("none|red|na", None, ""),
    ("1,299|999", None, "1,299 may be 1299 or 1.299")])
def test_a_column_is_numbers_where_all_of_it_reads_in_one_way(cells, numbers, said):
    cells = [cell or None for cell in cells.split("|")]
    column = read_column("price", cells)
    assert column.cells == (cells if numbers is None else numbers)
    assert [*map(type, column.cells)] == [*map(type, cells if numbers is None else numbers)]
    assert said in column.note and bool(said) == bool(column.note)


def test_numbers_that_are_given_as_such_go_with_texts_of_no_unit():
    assert read_column("a", [5, "1,5", None]).cells == [5, 1.5, None]
    assert read_column("a", [5, "$7"]).cells == ["5", "$7"] and read_column("a", [5, 38, "M"]).cells == [5, 38, "M"]


AS_WRITTEN = """file_name;price;net;off;size;colour
a/0.jpg;100,00 €;$1,299.00;20 %;38;red
a/1.jpg;9,99 €;$9.99;5 %;40;n/a
a/2.jpg;on request;;n/a;42;-
3.jpg;n/a;$50.00;100 %;M;blue
b/4.jpg;1.299,00 €;;;;12
"""


@pytest.fixture(scope="module")
def as_written(first):
    (first / "written.csv").write_text(AS_WRITTEN)
    assert index(first, first / "written", "--metadata", first / "written.csv") == 0
    return Gallery(first / "written", CPU)


@pytest.mark.parametrize(("where", "paths"), [
    ("price < 50", {"a/1.jpg"}), ("price > 50", {"a/0.jpg", "b/4.jpg"}), ("50 > price", {"a/1.jpg"}),
    ("price <> 9.99", {"a/0.jpg", "b/4.jpg"}), ("NOT price > 50", {"a/1.jpg"}), ("abs(price) < 50", {"a/1.jpg"}),
    ("price * 2 < 50", {"a/1.jpg"}), ("price BETWEEN 0 AND 2000", {"a/0.jpg", "a/1.jpg", "b/4.jpg"}),
    ("price > 500 OR price = 'on request'", {"a/2.jpg", "b/4.jpg"}), ("price IN ('on request', 100)",
                                                                     {"a/0.jpg", "a/2.jpg"}),
    ("price LIKE 'on %'", {"a/2.jpg"}), ("net >= 50 AND off <= 20", {"a/0.jpg"}), ("off = 100", {"a/3.jpg"}),
    ("price IS NULL", {"a/3.jpg", "a/5.jpg", "b/5.jpg", "b/6.jpg"}), ("'9.99' = price", {"a/1.jpg"}),
    ("[size] > 38 AND (\"Price\") < 50 /* size > 'x' */", {"a/1.jpg"}), ("size = 'M' or size = 40",
                                                                         {"a/1.jpg", "a/3.jpg"}),
    ("colour = '12' OR colour IN ('n/a', '-')", {"a/1.jpg", "a/2.jpg", "b/4.jpg"}),
    ("length(colour) < 3 AND lower(colour) <> 'x'", {"a/2.jpg", "b/4.jpg"}),
    ("colour || 'x' = 'redx' OR colour = ' 9 < colour'", {"a/0.jpg"}), ("colour = '-' OR colour = '('", {"a/2.jpg"}),
    ("\"colour\" = 'red' -- > 5", {"a/0.jpg"}), ("coalesce(price, 0) < 50", {*PATHS} - {"a/0.jpg", "b/4.jpg"}),
    ("coalesce(price, 'none') = 'on request'", {"a/2.jpg"}), ("nullif(price, 'on request') > 500", {"b/4.jpg"}),
    ("CASE WHEN price < 50 THEN price ELSE off END = 20", {"a/0.jpg"}),
    ("CASE price WHEN 'on request' THEN 1 ELSE 0 END", {"a/2.jpg"}), ("max(price, off) BETWEEN 5 AND 50", {"a/1.jpg"}),
    ("lower(price) LIKE 'ON%' OR length(price) = 10", {"a/2.jpg"}), ("price IS NOT 'on request' AND price > 1000",
                                                                     {"b/4.jpg"}),
    ("off < '6'", {"a/1.jpg"}), ("colour COLLATE nocase = 'RED'", {"a/0.jpg"}),
    ("metadata.price = 'on request'", {"a/2.jpg"})])
def test_numbers_are_filtered_by_as_people_wrote_them(first, as_written, where, paths):
    hits = as_written.search(first / "images" / "a" / "0.jpg", "", where=where)
    assert {str(hit.path.relative_to(first / "images")) for hit in hits} == paths


@pytest.mark.parametrize(("where", "said"), [
    *((where, "colour holds texts, as '") for where in (
        "colour < 50", "colour = 12", "50 <= colour", "colour IN ('red', 12)", "COLOUR BETWEEN 1 AND 2",
        "(colour) > -1", "colour + 0 < 5", "abs(colour) = 1", "colour < price", "lower(colour) < 5",
        "colour NOT IN (1)", "- colour > 1", "coalesce(colour, 'x') > 5", "CASE WHEN off THEN colour ELSE '' END < 5",
        "CASE colour WHEN 3 THEN 1 END", "nullif(colour, 3) IS NULL", "(colour COLLATE nocase) > 5",
        "colour || 'x' > 5", "max(colour, 'x') < net", "substr(colour, 1, 2) = 12")),
    ("coalesce(net, 'none') > 5", "'none' is a text"), ("length(size) = '2'", "'2' is a text"),
    ("lower(net) > 5", r"LOWER\(net\) is a text"),
    ("net = 'cheap'", "net holds numbers"), ("off < '20 %'", "off holds numbers")])
def test_texts_are_not_compared_with_a_number(first, as_written, where, said):
    with pytest.raises(InputError, match=rf"^cannot filter by [^\n]*{said}[^\n]*$"):
        as_written.search(first / "images" / "a" / "0.jpg", "", where=where)


def test_how_numbers_were_read_is_said_at_indexing_and_results_show_words(first, as_written, tmp_path, caplog):
    assert index(first, copied(first / "out", tmp_path / "out"), "--metadata", first / "written.csv") == 0
    (said,) = [line for line in caplog.messages if "price" in line]
    assert said == (f"note: {first}/written.csv: price is read as numbers: 100,00 € is 100.0; price holds 'on request' "
                    "among its numbers; no comparison with a number holds of that")
    shown = [as_written.metadata(as_written.images.id_of(f"a/{number}.jpg"))["price"] for number in range(4)]
    assert shown == [100.0, 9.99, "on request", None]


def test_an_older_index_of_numbers_among_texts_is_filtered_too(first, tmp_path):
    """Each cell was a number or none by itself."""
    out = copied(first / "out", tmp_path / "out")
    metadata.keep(ImageList(out / "images.sqlite"), {
        "a/0.jpg": {"price": "100,00", "sku": 7, "size": 38}, "a/1.jpg": {"price": "9,99", "sku": "A5", "size": None},
        "a/2.jpg": {"price": None, "sku": "012", "size": 40.5}})
    older = Filter(ImageList(out / "images.sqlite"))
    assert older.images("sku = 'A5' OR sku = '7'") == [1, 2] and older.images("sku = '012'") == [3]
    assert older.images("sku > 1") == [1] and older.images("size > 38") == [3]
    with pytest.raises(InputError, match="price holds texts, as '"):
        older.images("price < 50")


@pytest.mark.long("several openings of an index")
def test_an_answer_is_of_one_state_though_the_table_changes(first, tmp_path):
    out = copied(first / "out", tmp_path / "out")
    opened = Gallery(out, CPU)
    picture = first / "images" / "a" / "0.jpg"
    assert len(opened.search(picture, "", where="price < 50")) == 3 and not opened.changed()
    (tmp_path / "new.csv").write_text("file_name,price\na/0.jpg,2000\na/1.jpg,1\n")
    assert index(first, out, "--metadata", tmp_path / "new.csv") == 0
    hits = opened.search(picture, "", where="price < 50")
    assert len(hits) == 3 and all(hit.metadata["price"] < 50 for hit in hits) and opened.changed()
    image = opened.images.id_of("a/0.jpg")
    assert opened.metadata(image, "price < 50")["price"] == 10 and opened.metadata(image)["price"] == 2000
    assert [hit.metadata["price"] for hit in Gallery(out, CPU).search(picture, "", where="price > 50")] == [2000]
