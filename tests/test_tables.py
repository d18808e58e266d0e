"""Tables as spreadsheet programs and people write them: read whole, or refused in a line that says where."""

import datetime
import json
import os
import subprocess
import sys
import time

import openpyxl
import pytest

from machine.errors import InputError
from machine.tables import read_table
from searching.gallery import Gallery

from .conftest import picture, run_main
from .index_faults import write_model
from .services import ROOT
from .test_search import CPU, run


def rows(file, content):
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [(where.removeprefix(f"{file}, line "), row) for where, row in read_table(file)]


A, B = {"file_name": "a.jpg", "price": "1,5"}, {"file_name": "b.jpg", "price": ""}
A_LINE, B_LINE = map(json.dumps, (A, B))
READ = {  # file: (content, the lines of A and B)
    "plain.csv": ('file_name,price\na.jpg,"1,5"\nb.jpg,\n', "2 3"),
    "short rows.csv": ('file_name,price\na.jpg,"1,5"\nb.jpg\n', "2 3"),
    "spare columns.csv": ('file_name,price,,\na.jpg,"1,5",,\nb.jpg,,,,,,,\n', "2 3"),
    "an index column.csv": (',file_name,price\n0,a.jpg,"1,5"\n1,b.jpg,\n', "2 3"),
    "carriage returns.csv": ('file_name,price\ra.jpg,"1,5"\rb.jpg,\r', "2 3"),
    "both ends.csv": ('\ufefffile_name;price\r\na.jpg;1,5\r\nb.jpg;\r\n', "2 3"),
    "a separator that is said.csv": ("sep=;\r\nfile_name;price\r\na.jpg;1,5\r\nb.jpg;\r\n", "3 4"),
    "another that is said.txt": ('"SEP=|",,\nfile_name|price\na.jpg|1,5\nb.jpg\n', "3 4"),
    "a tab that is said.csv": ("sep=\t\nfile_name\tprice\na.jpg\t1,5\nb.jpg\t\n", "3 4"),
    "tabs.TSV": ("file_name\tprice\na.jpg\t1,5\nb.jpg\t\n", "2 3"),
    "blank lines.csv": ('\n,,\n"",\nfile_name,price\n\na.jpg,"1,5"\n,\n\nb.jpg,\n\n', "6 9"),
    "all in quotes.csv": ('"file_name","price"\n"a.jpg","1,5"\n"b.jpg",""\n', "2 3"),
    "little ends.csv": ("\ufefffile_name;price\na.jpg;1,5\nb.jpg;\n".encode("utf-16-le"), "2 3"),
    "big ends.csv": ("\ufefffile_name\tprice\r\na.jpg\t1,5\r\nb.jpg\t\r\n".encode("utf-16-be"), "2 3"),
    "no mark.csv": ("file_name;price\na.jpg;1,5\nb.jpg;\n".encode("utf-16-le"), "2 3"),
    "lines.jsonl": (f"{A_LINE}\n\n{B_LINE}\n", "1 3"), "LINES.JSONL": (f"{A_LINE}\r\n{B_LINE}", "1 2"),
    "lines.ndjson": (f"{A_LINE}\n{B_LINE}\n", "1 2"), "lines.json": (f"{A_LINE}\n{B_LINE}\n", "1 2"),
    "a list.json": (f"[\n {A_LINE},\n\n {B_LINE}\n]\n", "2 4"),
    "a printed list.json": (json.dumps([A, B], indent=2), "2 6"),
    "lines.of.utf-16.jsonl": (f"{A_LINE}\n{B_LINE}\n".encode("utf-16"), "1 2")}


@pytest.mark.parametrize("name", READ)
def test_a_table_is_read_however_it_was_written(name, tmp_path):
    content, lines = READ[name]
    assert rows(tmp_path / name, content) == list(zip(lines.split(), (A, B), strict=True))


def test_quotes_newlines_and_separators_in_texts_are_theirs(tmp_path):
    content = ('"file\nname",text,"Price, net"\na.jpg,"is red,\r\nand ""soft""",3" nail\n\nb.jpg,\'x,"y\n\nz"\n')
    assert rows(tmp_path / "t.csv", content) == [
        ("3", {"file name": "a.jpg", "text": 'is red,\nand "soft"', "Price, net": '3" nail'}),
        ("6", {"file name": "b.jpg", "text": "'x", "Price, net": "y\n\nz"})]
    assert rows(tmp_path / "empty.csv", "\ufeff\n\n") == rows(tmp_path / "head.csv", "a,b\n") == []


REFUSED = {  # file: (content, what is said)
    "a padded title.csv": ("Products,\nfile_name,price\na.jpg,5\n", "line 1 names no column, line 2 does; remove"),
    "a title.csv": ("Products of May\n\nfile_name;price\na.jpg;5\n", "line 1 names no column, line 3 does"),
    "a title above other names.csv": ("Products,,\nname,price,colour\na.jpg,5,red\n",
                                      "line 2: line 1 names no column for value 2, 'price'; write its name there"),
    "no header.csv": ("a/0.jpg,10,red\na/1.jpg,5,blue\n", "line 1 names no column, it has the picture a/0.jpg"),
    "a separator that is said, and a title.csv": ("sep=;\nProducts;;\nfile_name;price;colour\n",
                                                  "line 2 names no column, line 3 does"),
    "a missing name.csv": ("file_name,\na.jpg,5\n", "line 2: line 1 names no column for value 2, '5'"),
    "no quotes.csv": ("file_name,text\na.jpg,red\n\nb.jpg,red, dots, soft\n", "line 4: line 1 names no column for"),
    "a quote that ends nowhere.csv": ('f,b\na,1\nb,"x\nc,2\n', "line 4: no comma-separated values"),
    "quotes in a line of too many values.csv": ('f,b\na,3" nail,5" x\n', "line 2: no comma-separated values"),
    "a quote of two rows.csv": ('f,b\na,"is red\nb,"is blue"\nc,x\n', "line 3: no comma-separated values"),
    "two columns of a name.csv": ("a,b,b\n", "line 1: two columns are named 'b'"),
    "another encoding.csv": (b"f,b\r\na,1\r\nb,gr\xfcn\r\n", "line 3: not UTF-8 text"),
    "its carriage returns.csv": (b"f,b\ra,1\rb,gr\xfcn\r", "line 3: not UTF-8 text"),
    "many values.csv": ("f,b\n" + "," * 5000 + "\n", "a line of 5001 values, and 2 columns"),
    "half a spreadsheet.xlsx": (b"PK\3\4half", "no spreadsheet that can be read"),
    "an old one's half.xls": (b"\xd0\xcf\x11\xe0half", "no spreadsheet that can be read"),
    "no JSON.jsonl": ("{'text': 1}\n", "line 1: not a line of JSON"),
    "half a list.json": ('[{"a": 1},\n {"a": 2},\n', "line 3: not a line of JSON"),
    "a list of numbers.json": ('[{"a": 1},\n 3]', 'line 2: expected one object, as {"text": "is red", ...}, got 3'),
    "a deep one.jsonl": ('{"a": 1}\n' + '{"a": ' + "[" * 100_000, "line 2: not a line of JSON")}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_table_is_one_line_that_says_where(name, tmp_path):
    content, said = REFUSED[name]
    with pytest.raises(InputError) as raised:
        rows(tmp_path / name, content)
    message = str(raised.value)
    assert said in message and str(tmp_path / name) in message and "\n" not in message


@pytest.mark.long("a process")
def test_no_query_and_no_json_pays_for_the_library(tmp_path):
    """pandas takes half a second to import."""
    (tmp_path / "t.jsonl").write_text('{"a": 1}\n')
    code = ("import sys, search, main\nfrom pathlib import Path\nfrom machine.tables import read_table\n"
            "assert len(list(read_table(Path(sys.argv[1])))) == 1\nassert 'pandas' not in sys.modules")
    subprocess.run([sys.executable, "-c", code, tmp_path / "t.jsonl"], check=True, cwd=ROOT)


@pytest.mark.long("of that size")
def test_a_hundred_thousand_rows_are_read_in_seconds(tmp_path):
    lines = [f'dir/{n}.jpg;"{n},50";red;"some text, with ""quotes"" {n}";\n' for n in range(100_000)]
    (tmp_path / "t.csv").write_text("file_name;price;colour;text\n" + "".join(lines))
    list(read_table(tmp_path / "t.csv"))                                        # the library is imported
    start = time.process_time()
    *_, last = read_table(tmp_path / "t.csv")
    assert time.process_time() - start < 4
    assert last == (f"{tmp_path}/t.csv, line 100001", {
        "file_name": "dir/99999.jpg", "price": "99999,50", "colour": "red", "text": 'some text, with "quotes" 99999'})


# What LibreOffice 7.4 (locale de-DE) wrote of one sheet as CSV: separated by ; and in UTF-8, its cells as they are
# shown; and separated by tabs in UTF-16, all texts in quotes. The percent sign has a hard space before it.
SHEET = [["file_name", "Preis", "Netto", "Farbe", "Rabatt"], ["a/0.jpg", 100, 100, "rot; weich", 0.2],
         ["a/1.jpg", 9.99, 9.99, '3" Nagel', 0.05], ["a/2.jpg", 1299, 1299, None, None],
         ["b/3.jpg", "auf Anfrage", None, "grün\nhell", 0.1]]
AS_CSV = """file_name;Preis;Netto;Farbe;Rabatt
a/0.jpg;100,00 €;100,00;"rot; weich";20\u00a0%
a/1.jpg;9,99 €;9,99;"3"" Nagel";5\u00a0%
a/2.jpg;1.299,00 €;1.299,00;;
b/3.jpg;auf Anfrage;;"grün
hell";10\u00a0%
"""
AS_UTF_16 = b"\xff\xfe" + """"file_name"\t"Preis"\t"Netto"\t"Farbe"\t"Rabatt"
"a/0.jpg"\t100,00 €\t100,00\t"rot; weich"\t20\u00a0%
"a/1.jpg"\t9,99 €\t9,99\t"3"" Nagel"\t5\u00a0%
"a/2.jpg"\t1.299,00 €\t1.299,00\t\t
"b/3.jpg"\t"auf Anfrage"\t\t"grün
hell"\t10\u00a0%
""".encode("utf-16-le")
SAVED = {"Artikel.xlsx": None, "Artikel.csv": AS_CSV, "Artikel-utf16.csv": AS_UTF_16,
         "Windows.csv": "\ufeff" + AS_CSV.replace("\n", "\r\n")}


def spreadsheet(file, rows):
    book = openpyxl.Workbook()
    book.active.title = "Artikel"
    for row in rows:
        book.active.append(row)
    book.save(file)


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    root = tmp_path_factory.mktemp("tables")
    for path in ("a/0.jpg", "a/1.jpg", "a/2.jpg", "b/3.jpg"):
        picture(root / "images" / path)
    write_model(root / "model.pth")
    return root


@pytest.mark.parametrize("name", SAVED)
def test_a_spreadsheet_as_libreoffice_saves_it_is_indexed_and_filtered(name, gallery, tmp_path):
    table = tmp_path / name
    if SAVED[name] is None:
        spreadsheet(table, SHEET)
    else:
        table.write_bytes(SAVED[name] if isinstance(SAVED[name], bytes) else SAVED[name].encode())
    assert run("index", "--model_checkpoint", gallery / "model.pth", "--images", gallery / "images", "--out",
               tmp_path / "out", "--device", "cpu", "--engine", "torch", "--metadata", table) == 0
    opened = Gallery(tmp_path / "out", CPU)

    def found(where):
        return {os.path.relpath(hit.path, opened.folder)
                for hit in opened.search(gallery / "images" / "a" / "0.jpg", "", where=where)}
    assert opened.columns == ["Preis", "Netto", "Farbe", "Rabatt"]
    assert found("preis < 150") == {"a/0.jpg", "a/1.jpg"} and found("Preis > 150") == {"a/2.jpg"}
    assert found("preis = 'auf Anfrage'") == {"b/3.jpg"} == found("farbe LIKE 'gr%hell'")
    assert found("netto BETWEEN 9.99 AND 100") == {"a/0.jpg", "a/1.jpg"} and found("rabatt >= 0.2") >= {"a/0.jpg"}
    assert found("netto IS NULL") == {"b/3.jpg"} and found("farbe = '3\" Nagel'") == {"a/1.jpg"}
    with pytest.raises(InputError, match="Farbe holds texts"):
        found("farbe > 5")


HEADER = ["source_file_name", "target_file_names", "text", "group", "split"]
QUERIES = [[f"{a}.jpg", f"{b}.jpg|{c}.jpg", f"is {text}; soft, {a}", group, split] for a, b, c, text, group, split in (
    ("a", "b", "c", 'red "x"', "1", ""), ("b", "c", "d", "grün", "2", "train"), ("c", "d", "a", "1,5", "1", "test"),
    ("d", "a", "b", "99", "2", "test"), ("a", "c", "d", "x", "1", "train"), ("b", "a", "d", "y", "1", ""))]


def as_libreoffice(rows, separator):
    def cell(text):
        quoted = '"' + text.replace('"', '""') + '"'
        return quoted if any(mark in text for mark in f'{separator}"\n') else text
    return "".join(separator.join(map(cell, row)) + "\n" for row in rows)


@pytest.mark.parametrize("name", ["metadata.xlsx", "metadata.csv", "utf-16"])
def test_a_spreadsheet_as_libreoffice_saves_it_is_trained_from(name, tmp_path):
    """Of the last columns groups are numbers in a spreadsheet, and its first sheet is below blank lines."""
    root = tmp_path / "shop"
    root.mkdir()
    for letter in "abcd":
        picture(root / f"{letter}.jpg")
    if name == "metadata.xlsx":
        numbered = [[*row[:3], int(row[3]), row[4] or None] for row in QUERIES]
        spreadsheet(root / name, [[], [None, None], HEADER, *numbered])
    elif name == "utf-16":
        (root / "metadata.csv").write_bytes(as_libreoffice([HEADER, *QUERIES], "\t").encode("utf-16"))
    else:
        (root / name).write_text(as_libreoffice([HEADER, *QUERIES], ";"))
    done = run_main("triplets", root, tmp_path / "logs")
    assert set(done.metrics) == {"it", "protocol", "train", "test"}
    assert {"recall_top1_own_gallery_1", "recall_top1_own_gallery_2"} <= set(done.metrics["test"])


def test_a_sheet_beside_the_one_that_is_read_is_said(tmp_path, caplog):
    book = openpyxl.Workbook()
    book.active.title = "Empty"
    for title, row in (("Products", ["file_name", "new", "since"]), ("Notes", ["hello"])):
        book.create_sheet(title).append(row)
    book["Products"].append(["a.jpg", True, datetime.date(2026, 12, 1)])
    book.save(tmp_path / "t.xlsx")
    assert list(read_table(tmp_path / "t.xlsx")) == [(f"{tmp_path}/t.xlsx, line 2", {
        "file_name": "a.jpg", "new": "1", "since": "2026-12-01"})]
    list(read_table(tmp_path / "t.xlsx"))
    assert caplog.messages == [f"note: of {tmp_path}/t.xlsx the sheet 'Products' is read, not 'Notes'"]
