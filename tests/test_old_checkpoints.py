"""What a checkpoint of 2026-11-29 held, before the files it is read with were moved: it still loads, is tested, resumes
and is searched with. golden/checkpoint.json has all but its tensors, of which it says type and shape."""

import json
from pathlib import Path

import pytest
import torch

import main
import search
from machine.errors import InputError
from training import checkpoint

from . import golden
from .conftest import Run, flags, write_mitstates

OLD = json.loads((Path(golden.__file__).parent / "checkpoint.json").read_text())
SINCE = {"attributes", "caption_form", "contexts", "dataset_path", "engine", "expansion", "f", "feature_dropout",
         "image_features", "learn_words", "log_dir", "pictures_mean", "product", "prompt", "same", "same_product",
         "shared_concept", "span", "styles", "subjects", "synthetic", "templates", "two_changes",
         "written"}                                                     # flags that a checkpoint holds


def tensor(name, kind, *shape):
    """Small, and of a variance what batch norm can divide by."""
    if kind != "float32":
        return torch.zeros(shape, dtype=getattr(torch, kind))
    return torch.as_tensor(0.05 * golden.normal(name, *shape) + name.endswith("running_var"), dtype=torch.float32)


@pytest.fixture
def old(tmp_path):
    """The run's folder, with its checkpoint."""
    write_mitstates(tmp_path / "data")
    weights = {name: tensor(name, *what) for name, what in OLD["weights"].items()}
    momenta = {int(number): {"momentum_buffer": torch.zeros(what[1:])} for number, what in OLD["momenta"].items()}
    state = {name: OLD[name] for name in ("it", "opt", "progress", "recipe", "example_texts", "results", "launch")}
    (folder := tmp_path / "logs" / "old").mkdir(parents=True)
    torch.save({**state, "model_state_dict": weights, "random": {"cpu": torch.get_rng_state()},
                "optimizer_state_dict": {"state": momenta, "param_groups": OLD["param_groups"]}},
               folder / "latest_checkpoint.pth")
    return folder


def test_it_is_tested_and_resumed(old, tmp_path):
    file = old / "latest_checkpoint.pth"
    model = checkpoint.rebuild_model(file)
    assert {name: [str(value.dtype).removeprefix("torch."), *value.shape] for name, value in
            model.state_dict().items()} == OLD["weights"]
    assert main.main(["--test_only", f"--model_checkpoint={file}", f"--dataset_path={tmp_path / 'data'}",
                      "--device=cpu", f"--log_dir={tmp_path / 'tests'}"]) == 0
    (tested,) = (tmp_path / "tests").iterdir()
    since = {f"map_top{k}_correct_composition" for k in (5, 10, 25, 50)}
    assert {split: values.keys() | since for split, values in OLD["results"].items()} == {
        split: values.keys() for split, values in Run(tested).metrics.items() if split not in ("it", "protocol")}
    assert main.main(flags("mitstates", tmp_path / "data", tmp_path / "logs", num_iters=5, resume=old)) == 0
    state = checkpoint.load(file)
    assert state["it"] == 5 and state["opt"].keys() - OLD["opt"].keys() == SINCE
    assert state["progress"].keys() - OLD["progress"].keys() == {"data"}
    with pytest.raises(InputError, match=r"--batch_size 4 \(now 5\)"):
        main.run(*main.settle(flags("mitstates", tmp_path / "data", tmp_path / "logs", batch_size=5, resume=old),
                              torch.device("cpu"), main.FolderLock()), main.Stopping(), torch.device("cpu"), None)


@pytest.mark.long("an index of its own")
def test_it_is_searched_with(old, tmp_path, capsys):
    index, image = tmp_path / "index", next((tmp_path / "data" / "images").rglob("*.jpg"))
    assert search.main(["index", f"--model_checkpoint={old / 'latest_checkpoint.pth'}",
                        f"--images={tmp_path / 'data' / 'images'}", f"--out={index}"]) == 0
    capsys.readouterr()
    assert search.main(["query", f"--index={index}", f"--image={image}", "--text=old dog", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["results"]) > 5
