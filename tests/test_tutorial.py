"""docs/your-own-pictures.md: the toy shop is what it says, and its commands run as typed."""

import csv
import http.client
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from PIL import Image

import main
import search
from benchmarks.mining import Mining
from datasets import Captions, Triplets

from .services import ROOT, free_ports, serving_page
from .test_runs import asked_for

PAGE = (ROOT / "docs" / "your-own-pictures.md").read_text()
COMMANDS, OTHERS = ("".join(re.findall(r"^```sh\n(.*?)^```", part, re.M | re.S)).splitlines()
                    for part in PAGE.split("\n## With your photos\n"))
PROGRAMS = "*.py", "benchmarks/*.py", "data/*.py", "machine/*.py", "runs/*", "searching/*.py", "training/*.py", \
    "zero_shot/*.py"
FEWER_STEPS = " --num_iters 20"         # the one thing that is not as typed


def like_the_repository(folder):
    """The folder, with the programs in it."""
    for file in (file for pattern in PROGRAMS for file in ROOT.glob(pattern) if file.is_file()):
        (copy := folder / file.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copy(file, copy)
    return folder


def type_in(place, *lines):
    """What these lines say, typed into a shell there."""
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    done = subprocess.run(["sh", "-e", "-c", "\n".join(lines)], cwd=place, env={**os.environ, "PATH": path},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    type_in(place := like_the_repository(tmp_path_factory.mktemp("repository")), COMMANDS[0])
    return place / "data" / "toy" / "shop"


@pytest.mark.long("draws 600 photos")
def test_the_shop_is_the_same_bytes_each_time(shop, tmp_path):
    again = f"PYTHONHASHSEED=7 {sys.executable} {ROOT / 'data/make_toy.py'} {tmp_path} --shop"
    type_in(tmp_path, again, f"{again} --force")
    there, here = ({file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
                   for folder in (shop, tmp_path / "shop"))
    assert there == here and len(there) == 303                                  # photos, two tables, the marker


def test_the_shop_is_what_the_page_says(shop, tmp_path):
    stock, lines = ((shop / f"{name}.csv").read_text().splitlines() for name in ("captions", "metadata"))
    quoted = re.findall(r"^ {4}((?:(?:source_)?file_name,|photos/\S+?,).*)$", PAGE, re.M)
    assert quoted[:2] == stock[:2] and quoted[2] == lines[0] and len(quoted) == 5 and {*quoted[2:]} < {*lines}
    mined = [Captions(shop, split, mining=Mining(attributes="colour,pattern,size", same="kind", written=0))
             for split in ("train", "test")]
    assert len(stock) == 301 and len(mined[0]) == 220 and mined[1].asked == "hand-written"
    train, test = (Triplets(shop, split) for split in ("train", "test"))
    assert f"{len(train)} lines to train with and {len(test)} to test with" in " ".join(PAGE.split())
    assert f"There are {test.gallery} photos" in PAGE and {*train.groups} == {*test.groups} == {"home", "toys", "decor"}
    assert {len(line.targets) for line in test.annotations} == {1, 2, 3}
    assert any(line.negatives for line in test.annotations)
    named = [{split.images[image] for line in split.annotations
              for image in (line.source, *line.targets, *line.negatives)}
             for split in (train, test)]
    assert not named[0] & named[1]


def test_held_out_by_photo_it_is_what_the_page_says(shop, tmp_path):
    shutil.copytree(shop / "photos", tmp_path / "photos")
    with open(shop / "metadata.csv", newline="") as table, open(tmp_path / "metadata.csv", "w", newline="") as without:
        csv.writer(without).writerows(row[:-1] for row in csv.reader(table))
    assert f"source photos | {len(Triplets(tmp_path, 'validation', held_out=0.2))} |" in PAGE


def test_the_commands_have_flags_that_the_programs_take(tmp_path):
    assert len(COMMANDS) == 10 and len(OTHERS) == 5
    for program, *words in map(shlex.split, [*COMMANDS, *OTHERS]):
        if program == "runs/shop.sh":
            words = asked_for("shop.sh", *words, folder=tmp_path)
        if words and words[0].endswith("main.py"):
            main.get_parser().parse_args(words[1:])
        elif words and words[0] == "search.py":
            search.get_parser().parse_args(words[1:])
        else:
            assert program.startswith("run=") or (ROOT / words[0]).exists()


@pytest.mark.long("seven processes that load torch")
def test_the_commands_run_as_typed(tmp_path_factory, tmp_path):
    place, said, assigned = like_the_repository(tmp_path_factory.mktemp("repository")), {}, []
    for command in COMMANDS[:-1]:
        if command.startswith("run="):
            assigned.append(command)
        else:
            said[command] = type_in(place, *assigned, command + FEWER_STEPS * command.startswith("runs/shop.sh"))
    trained, tested, indexed, found = list(said.values())[-4:]
    rows = [re.search(r"^test correct_composition .*$", output, re.M)[0].split() for output in (trained, tested)]
    assert len(rows[0]) == 7 and rows[0] == rows[1] and "\ntest: hand-written queries\n" in trained
    assert (place / "data/toy/shop/mined.csv").read_text().startswith("source_file_name,target_file_names,text,split\n")
    assert all(f"\ntest {row} " in trained for row in ("own_gallery_toys", "among_negatives", "text alone correct_"
                                                       "composition", "chance correct_composition"))
    assert ": 300 images, 300 of them encoded now, 0 left out" in indexed
    heading, *results = found.splitlines()
    assert heading.split() == ["rank", "score", "image"] and [line.split()[0] for line in results] == [*"12345678"]
    assert {os.path.dirname(line.split()[-1]) for line in results} == {f"{place}/data/toy/shop/photos"}
    with Image.open(place / "found.png") as picture:
        assert picture.format == "PNG"
    assert COMMANDS[-1] == 'python search.py serve --index "$run/index"'
    (index,), (port,) = place.glob("logs/*_shop/index"), free_ports(1)
    with serving_page(index, port, tmp_path):
        (connection := http.client.HTTPConnection("127.0.0.1", port, timeout=60)).request("GET", "/")
        assert (answer := connection.getresponse()).status == 200 and b"<html" in answer.read()
        connection.close()
