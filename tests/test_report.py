"""What a run reports, read back as TensorBoard reads it; and help: near names, examples, switches, versions."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from google.protobuf import text_format
from PIL import Image
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

import main
import search
from benchmarks.base import QuerySet
from benchmarks.metrics import Metric
from data import check
from flags import VERSION, Parser, add, meant
from machine.image_store import DeviceStore
from training import report
from training.report import QualitativeResult, QualitativeResults, chance_line
from training.writers import LINES, JsonLines, TensorBoard, tag

from .conftest import flags, run_main, write_fashion_iq, write_mitstates

ROOT, KS = Path(main.__file__).parent, (1, 5, 10, 50, 100)


@pytest.fixture(scope="module")
def stopped_and_resumed(tmp_path_factory):
    """A run of two steps that went on to four."""
    root = tmp_path_factory.mktemp("reports")
    path = write_mitstates(root / "data")
    run = run_main("mitstates", path, root / "logs", num_iters=2, model="tirg")
    assert main.main(flags("mitstates", path, root / "logs", num_iters=4, model="tirg", resume=run.folder)) == 0
    run.metrics = json.loads((run.folder / "metrics.json").read_text())
    return run


@pytest.mark.parametrize(("name", "place"), [
    ("soft_triplet", "loss/soft_triplet"), ("total training loss", "loss/total"), ("L2_loss_text", "loss/L2_loss_text"),
    ("learning_rate", "training/learning_rate"), ("gradient norm", "training/gradient_norm"),
    ("scale", "training/scale"), ("a 3", "training/a_3"), ("queries per second", "training/queries_per_second"),
    ("test recall_top10_correct_composition", "recall/test/composition@10"),
    ("train recall_top1_correct_adj", "recall/train/adj@1"),
    ("test recall_top50_own_gallery_mean", "recall/test/own_gallery_mean@50"),
    ("test recall_mean_own_gallery", "recall/test/mean_own_gallery"), ("test recall_mean", "recall/test/mean"),
    ("validation recall_top1_own_gallery_toy cars", "recall/validation/own_gallery_toy_cars@1"),
    ("test source image alone recall_top5_correct_noun", "recall/test/noun@5/source_image_alone"),
    ("validation chance recall_mean", "recall/validation/mean/chance"),
    ("test results correct_dress", "retrieval/results/test/dress"),
    ("train features correct_composition", "retrieval/features/train/composition"),
    ("test log10 rank correct_adj", "retrieval/log10_rank/test/adj"),
    ("test log10 rank subset", "retrieval/log10_rank/test/subset")])
def test_what_is_logged_is_in_groups(name, place):
    assert tag(name) == place


def test_a_run_is_one_entry_under_hparams_with_its_headline(stopped_and_resumed):
    folder = stopped_and_resumed.folder
    runs = EventMultiplexer().AddRunsFromDirectory(str(folder.parent)).Reload()
    assert list(runs.Runs()) == [folder.name]
    found = {name.removeprefix("_hparams_/"): HParamsPluginData.FromString(content) for name, content in
             runs.GetAccumulator(folder.name).PluginTagToContent("hparams").items()}
    assert found.keys() == {"experiment", "session_start_info", "session_end_info"}
    told = found["session_start_info"].session_start_info.hparams
    assert {name: getattr(value, value.WhichOneof("kind")) for name, value in told.items()} == {
        "model": "tirg", "loss": "soft_triplet", "learning_rate": 0.0001, "batch_size": 4, "seed": 0,
        "image_encoder": "mobilenet_v3_small", "text_encoder": "lstm"}
    metrics = [metric.name.tag for metric in found["experiment"].experiment.metric_infos]
    assert metrics == [f"recall/test/composition@{k}" for k in (1, 5, 10)]
    logged = stopped_and_resumed.scalars()
    assert [logged[name][-1] for name in metrics] == [(4, pytest.approx(
        stopped_and_resumed.metrics["test"][f"recall_top{k}_correct_composition"])) for k in (1, 5, 10)]


def test_the_recalls_of_a_split_are_one_chart(stopped_and_resumed):
    events = stopped_and_resumed.events()
    layout = Layout.FromString(events.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for category in layout.category for chart in category.chart}
    assert [*charts.items()] == [("all parts", ["loss/"]), ("test", ["recall/test/"]), ("train", ["recall/train/"])]
    tags = events.Tags()["scalars"]
    assert {name.split("/")[0] for name in tags} == {"loss", "recall", "training"}
    assert [name for name in tags if re.match("recall/test/", name)] == [
        f"recall/test/composition@{k}" for k in (1, 5, 10)]


def test_the_projector_has_every_point_with_its_picture(stopped_and_resumed):
    folder = stopped_and_resumed.folder
    config = text_format.Parse((folder / "projector_config.pbtxt").read_text(), ProjectorConfig())
    (shown,) = config.embeddings                                                # of the last test
    features = np.loadtxt(folder / shown.tensor_path, delimiter="\t")
    head, *labels = (folder / shown.metadata_path).read_text().splitlines()
    assert head == "name\tkind" and len(labels) == len(features) == 10 + 16     # images and queries
    assert np.linalg.norm(features, axis=1) == pytest.approx(1, abs=1e-3)
    assert labels[0] == "images/old tomato/0.jpg\timage" and re.fullmatch(r"\+ \w+\tquery", labels[-1])
    with Image.open(folder / shown.sprite.image_path) as sprite:
        assert sprite.size == (6 * 32, 6 * 32) and list(shown.sprite.single_image_dim) == [32, 32]
        found = np.asarray(sprite)
    drawn = found.reshape(6, 32, 6, 32, 3).swapaxes(1, 2).reshape(36, -1)       # row after row
    assert (drawn[26:] == 255).all() and (drawn[:26].std(1) > 1).all()


def test_what_the_projector_gets_is_bounded():
    store = DeviceStore(torch.zeros(4000, 32, 32, 3, dtype=torch.uint8))
    rows = torch.nn.functional.normalize(torch.randn(4000, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    metric = Metric("correct_composition", np.arange(4000), np.arange(4000))
    seen = QualitativeResults(store, 0)
    seen(QuerySet(np.arange(4000), ["wet\ttwo"] * 4000, np.full(4000, -1), [metric]), np.arange(4000), rows, rows,
         [np.zeros(4000, int)])
    points = seen["correct_composition"].points
    assert points.features.shape == (1200, 4) and len(points.labels) == 1200 and len(points.pictures()) == 1200
    assert points.labels[1000] == ("+ wet\ttwo", "query")


def test_lines_of_json_hold_what_tensorboard_shows_and_every_recall(stopped_and_resumed):
    lines = [json.loads(line) for line in (stopped_and_resumed.folder / LINES).read_text().splitlines()]
    assert [line.pop("it") for line in lines] == [1, 2, 2, 3, 4, 4]             # at 2 and 4 a test, too
    found = {}
    for it, line in zip([1, 2, 2, 3, 4, 4], lines, strict=True):
        for name, value in line.items():
            found.setdefault(tag(name), []).append((it, pytest.approx(value, rel=1e-6)))
    shown = stopped_and_resumed.scalars()
    assert shown == {name: found[name] for name in shown} and len(found) == len(shown) + 2 * 16  # of two splits' 19
    assert lines[-1] == {f"{split} {name}": value for split in ("train", "test")
                         for name, value in stopped_and_resumed.metrics[split].items()}


def test_a_runs_first_screen_is_its_losses_recalls_and_results_and_no_more(mitstates, tmp_path):
    """What TensorBoard makes a card of, by its plugins: every scalar, picture and histogram."""
    run = run_main("mitstates", mitstates, tmp_path / "logs", num_iters=2, eval_frequency=1, baselines=True)
    tags = run.events().Tags()
    cards = sorted([*tags["scalars"], *tags["images"], *tags["histograms"]])
    assert cards == [
        *(f"loss/{name}" for name in ("L2_loss", "L2_loss_text", "rot_sym_loss", "soft_triplet", "total")),
        "recall/test/composition@1", "recall/test/composition@10",
        *(f"recall/test/composition@10/{way}" for way in ("chance", "source_image_alone", "text_alone")),
        "recall/test/composition@5",
        *(f"recall/train/composition@{k}" for k in (1, 10, 5)),
        *(f"retrieval/{what}/{split}/composition" for what in ("features", "log10_rank", "results")
          for split in ("test", "train")),
        *(f"training/{name}" for name in ("a_0", "a_1", "a_2", "a_3", "gradient_norm", "images_per_second",
                                          "learning_rate", "queries_per_second", "scale"))]
    assert len(cards) == 29


def test_all_recalls_of_a_test_are_one_table(mitstates, tmp_path):
    run = run_main("mitstates", mitstates, tmp_path / "logs", num_iters=4, eval_frequency=1, baselines=True)
    tables = run.events().Tensors("recalls/text_summary")
    assert [table.step for table in tables] == [2, 4]
    lines = tables[-1].tensor_proto.string_val[0].decode().splitlines()
    above = ("MIT-States, test: 16 queries, gallery of 10 images, the source is left out of its ranking; text: "
             f"{{adjective}}; weights {run.metrics['protocol']['test']['weights']}, annotations "
             f"{run.metrics['protocol']['test']['annotations']}")
    assert lines[:2] == [above, ""]
    lines = lines[2:]
    assert lines[:2] == ["| | R@1 | R@5 | R@10 | R@50 | R@100 |", "| --- | --- | --- | --- | --- | --- |"]
    results = {split: run.metrics[split] for split in ("train", "test")} | run.metrics["baselines"]
    assert all("map_top10_correct_composition" in run.metrics[split] for split in ("train", "test"))  # no row
    counts = results.pop("test queries solved by")
    assert lines[2:-5] == [" ".join([f"| {split} correct_{metric} |", *(
        f"{100 * recalls[f'recall_top{k}_correct_{metric}']:.2f} |" for k in KS)])
        for split, recalls in results.items() for metric in ("composition", "adj", "noun")]
    assert lines[-5:] == ["", *(f"- test queries solved by {name}: {count}" for name, count in counts.items())]


def test_the_metric_that_chooses_the_best_checkpoint_has_curves_too(tmp_path):
    run = run_main("fashionIQ", write_fashion_iq(tmp_path / "data"), tmp_path / "logs", num_iters=1, baselines=True,
                   best_metric="recall_top50_VAL_gallery_dress")
    recalls = {name.removeprefix("recall/") for name in run.scalars() if name.startswith("recall/")}
    headline = {f"{split}/{name}" for split in ("train", "test")
                for name in ("own_gallery_mean@10", "own_gallery_mean@50", "mean_own_gallery")}
    ways = {f"test/VAL_gallery_dress@50/{way}" for way in ("chance", "source_image_alone", "text_alone")}
    assert recalls == headline | {"test/VAL_gallery_dress@50"} | ways


def test_what_goes_on_within_a_second_writes_over_nothing(tmp_path):
    for after in range(5):
        writer = TensorBoard(tmp_path, {}, after or None)
        writer.scalars({"scale": 4.0 + after}, after + 1)
        writer.close()
    read = EventMultiplexer().AddRunsFromDirectory(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in read.Scalars(".", "training/scale")] == [
        (after + 1, 4.0 + after) for after in range(5)]


def test_lines_beyond_the_checkpoint_and_half_a_line_are_taken_back(tmp_path):
    whole = b'{"it": 1, "scale": 4.0}\n{"it": 2, "scale": 5.0}\n'
    (tmp_path / LINES).write_bytes(whole + b'{"it": 3, "scale": 6.0}\n[]\n{"it": 2, "sc')
    JsonLines(tmp_path, {}, 2).scalars({"scale": 7.0}, 3)
    assert (tmp_path / LINES).read_bytes() == whole + b'{"it": 3, "scale": 7.0}\n'


def test_without_tensorboard_the_lines_and_the_metrics_stay(mitstates, tmp_path):
    run = run_main("mitstates", mitstates, tmp_path / "logs", num_iters=1, report_to="none")
    assert sorted(path.name for path in run.folder.iterdir()) == [
        "best_checkpoint.pth", "latest_checkpoint.pth", LINES, "metrics.json"]


def test_a_package_that_is_not_there_is_one_line_before_anything_else(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main.main(flags("mitstates", tmp_path / "nowhere", tmp_path / "logs", report_to="wandb")) == 2
    assert capsys.readouterr().err == ("main.py: error: --report_to wandb needs a package of its own: pip install "
                                       "wandb\n")


def test_the_table_is_told_what_chance_is():
    def tested(value):
        sightings = QualitativeResults(None, 0)
        sightings["correct_x"] = QualitativeResult([], np.zeros(0), None, None, {"recall_top10_correct_x": value})
        return report.SplitResult({}, sightings)
    assert chance_line({"train": tested(0.004), "test": tested(0.125)}) == (
        "R@10 of a random order: train 0.40, test 12.50; train is asked among the targets of other training samples, "
        "not in the test's gallery, so its recalls can be the lower ones")
    assert chance_line({"test": tested(0.125)}) == "R@10 of a random order: test 12.50"
    assert chance_line({"test": report.SplitResult({}, QualitativeResults(None, 0))}) == ""


NEAR = [(main, "--dataset=mitstate --dataset_path=x", "did you mean mitstates?"),
        (main, "--dataset=mitstates --dataset_path=x --model TIRG", "did you mean tirg?"),
        (main, "--dataset=mitstates --dataset_path=x --modle tirg", "did you mean --model?"),
        (main, "--dataset=mitstates --dataset_path=x --zzz", "--zzz; see --help"),
        (search, "qurey", "did you mean query?"),
        (search, "query --index x --image y --jsn", "did you mean --json?"),
        (search, "serve --index x --device CPU", "did you mean cpu?"),
        (check, "--dataset mitstates --dataset_path x --categroy_to_train all", "did you mean --category_to_train?")]


@pytest.mark.parametrize(("program", "words", "said"), NEAR)
def test_a_wrong_name_is_told_the_nearest(program, words, said, capsys):
    with pytest.raises(SystemExit) as stop:
        program.main(words.split())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.endswith(f"{said}\n") and error.count("\n") == 1


def test_only_what_is_near_is_meant():
    assert meant("composeae", ["tirg", "composeAE"]) == "; did you mean composeAE?" and meant("x", ["tirg"]) == ""


@pytest.mark.parametrize(("program", "words", "said"), [
    (main, [], "examples:"), (search, [], "examples:"), (search, ["query"], "--image PATH"), (check, [], "--out FILE")])
def test_no_flags_where_some_are_needed_are_the_help(program, words, said, capsys):
    with pytest.raises(SystemExit) as stop:
        program.main(words)
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == "" and said in captured.err and "error" not in captured.err


@pytest.mark.parametrize("run", [main.main, search.main, check.main])
def test_programs_say_their_version(run, capsys):
    with pytest.raises(SystemExit) as stop:
        run(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out.split()[-1] == VERSION


def test_the_server_does_the_same_by_itself():
    def said(*words):
        done = subprocess.run([sys.executable, "-S", "-I", ROOT / "bert_server.py", *words], capture_output=True,
                              text=True, check=False)
        return done.returncode, done.stdout or done.stderr
    code, text = said()
    assert code == 2 and text.startswith("usage: bert_server.py")
    assert said("--version") == (0, "bert_server.py, the protocol of bert-serving 1.10.0\n")
    for words, near in ((["--prt", "6"], "--port"), (["-pooling_strategy", "reduce_men"], "REDUCE_MEAN")):
        code, text = said("-model_dir", "x", *words)
        assert code == 2 and text.endswith(f"did you mean {near}?\n") and text.count("\n") == 1


@pytest.mark.parametrize(("words", "expected"), [
    ([], False), (["--json"], True), (["--json", "True"], True), (["--json=no"], False), (["--json", "False"], False)])
def test_a_switch_is_alike_in_all_programs(words, expected):
    asked = search.get_parser().parse_args(["query", "--index=x", "--image=y", *words, "--text", "wet"])
    parser = Parser()
    add(parser, "--json", False, "help")
    assert asked.json is parser.parse_args(words).json is expected
