"""Imports point down only: programs, searching, a run, services, the paper, further benchmarks, the machine."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = (                              # from the top
    {"main", "search", "bert_server", "bench", "data", "runs", "static"},
    {"searching"},
    {"training"},
    {"flags", "test_retrieval"},
    {"datasets", "text_model", "text_encoders", "image_encoders", "img_text_composition_models", "torch_function",
     "zero_shot"},
    {"benchmarks"},
    {"machine"},
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path
         for room in FLOOR for path in sorted(ROOT.glob(f"{room}.py")) + sorted(ROOT.glob(f"{room}/*.py"))}


def imported(path: Path) -> set[str]:
    """Files of ours that a file imports anywhere, also inside a function, as training.loop."""
    named = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            named |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, path                                        # programs know the root by its place
            named |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
    return named & set(FILES)


def room(file: str) -> str:
    return file.partition(".")[0]


ARROWS = [(file, other) for file, path in FILES.items() for other in sorted(imported(path))]


def test_every_file_has_its_room():
    assert {path.stem for path in ROOT.glob("*.py")} == {name for name in FLOOR if (ROOT / f"{name}.py").exists()}
    assert len(list(ROOT.glob("*.py"))) == 12
    wings = {path.parent.name for path in ROOT.glob("*/*.py") if not path.parent.name.startswith((".", "tests"))}
    assert wings == {name for name in FLOOR if (ROOT / name).is_dir()}


def test_zero_shot_composers_know_encoders_and_losses_and_no_other_composer():
    allowed = {"zero_shot", "image_encoders", "text_encoders", "torch_function", "machine"}
    assert {room(other) for file, other in ARROWS if room(file) == "zero_shot"} <= allowed


def test_no_import_points_upward():
    assert len(ARROWS) > 100
    assert [arrow for arrow in ARROWS if FLOOR[room(arrow[0])] > FLOOR[room(arrow[1])]] == []


def test_there_is_no_circle():
    graph = TopologicalSorter({file: set() for file in FILES})
    for file, other in ARROWS:
        if other != room(file):                                                 # a wing's own __init__ comes with it
            graph.add(file, other)
    graph.prepare()                                                             # raises CycleError, which names it


@pytest.mark.parametrize(("wing", "allowed"), [("machine", {"machine"}), ("benchmarks", {"benchmarks", "machine"}),
                                               ("bert_server", {"machine"})])
def test_these_know_only(wing, allowed):
    assert {room(other) for file, other in ARROWS if room(file) == wing} <= allowed
    assert any(room(file) == wing for file in FILES)
