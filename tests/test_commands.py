"""Every command that the pages print: its flags are the programs', and what needs neither hours nor a network runs."""

import re
import shlex

import pytest

import bert_server
import main
import search

from .conftest import write_mitstates
from .services import ROOT
from .test_tutorial import like_the_repository, type_in

PAGES = ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "data" / "README.md", *sorted(ROOT.glob("docs/*.md"))
PARSERS = {"main.py": main.get_parser, "search.py": search.get_parser, "bert_server.py": bert_server.get_parser}
NOT_RUN = {r"make ": "installs, or takes minutes: .ci/run, and by hand",
           r"\. \.venv": "the environment of the test is another",
           r"python -W ignore main\.py ": "the published ones: test_main.py, on small trees",
           r"python bert_server\.py ": "downloads a model; test_bert_server.py starts it with one that is here",
           r"python search\.py serve ": "serves until it is stopped: test_tutorial.py, test_browser.py",
           r"((python )?runs/|python main\.py )": "minutes: test_tutorial.py and test_runs.py, shortened",
           r"torchrun ": "several GPUs or machines: test_distributed.py and test_growing.py, on this one's cores",
           r"pip install ": "installs: the tests' environment has it",
           r"python search\.py .* --qdrant ": "asks a server: test_growing.py, without one",
           r".* \.\.\. ": "flags that were said above it",
           r"python -c .*pickle": "opens files of others: test_zero_shot.py, made-up ones",
           r"python static/draw\.py": "draws the README's picture with the demo's model"}


def printed(language):
    """{page: commands or blocks of this language}"""
    found = {page: re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S) for page in PAGES}
    return {page.relative_to(ROOT).as_posix(): blocks for page, blocks in found.items() if blocks}


def commands(page):
    text = "".join(printed("sh")[page]).replace("\\\n", " ")
    return [line for line in text.splitlines() if not line.startswith("#")]


def why_not_run(command):
    return next((why for start, why in NOT_RUN.items() if re.match(start, command)), None)


def test_each_reason_not_to_run_a_command_is_some_commands():
    every = [command for page in printed("sh") for command in commands(page)]
    assert all(any(re.match(start, command) for command in every) for start in NOT_RUN)
    assert [command for command in every if command.startswith("    ")] == []


@pytest.mark.parametrize("page", printed("sh"))
def test_the_flags_are_the_programs(page):
    for command in commands(page):
        words = shlex.split(command, comments=True)
        for program in PARSERS.keys() & {*words}:
            given = words[words.index(program) + 1:]
            if "..." not in command and "MODEL" not in given:
                PARSERS[program]().parse_args(given)


def run(command, place):
    """search.py's in this process, which has loaded torch; others as a shell does."""
    words = shlex.split(command, comments=True)
    if words[:2] == ["python", "search.py"]:
        assert search.main(words[2:]) == 0
    else:
        type_in(place, command)


@pytest.mark.long("a model that is trained, and processes")
@pytest.mark.parametrize("page", [page for page in printed("sh") if page != "docs/your-own-pictures.md"
                                  and not all(map(why_not_run, commands(page)))])
def test_the_commands_run_as_printed(page, trained, tmp_path, monkeypatch):
    place = like_the_repository(tmp_path / "repository")
    images = write_mitstates(tmp_path / "data" / "mitstates") / "images"
    (place / "logs").mkdir()
    (place / "logs" / "RUN").symlink_to(trained.folder)
    for name in ("FOLDER", "NEW"):
        (place / name).symlink_to(images)
    for name in ("dress", "a", "b"):
        (place / f"{name}.jpg").symlink_to(images / "old dog" / "0.jpg")
    (place / "products.csv").write_text("file_name,price,colour\nold dog/1.jpg,49.5,red\nwet bus/0.jpg,80,red\n")
    type_in(place, "python data/make_toy.py data/toy --shop", "ln -s data/toy/shop shop")
    monkeypatch.chdir(place)
    for command in commands(page):
        if not why_not_run(command):
            run(command, place)
    for block in printed("python").get(page, ()) if page != "docs/growing.md" else ():  # which asks a server
        exec(block, {})
