"""search.py: an index of a folder against an obvious search, and what becomes of bad input."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import faiss
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import search
from machine.engine import AGREES
from machine.errors import InputError
from machine.image_store import decode, normalize_images
from machine.stopping import Stopped
from searching.build import build
from searching.encoder import read_picture
from searching.gallery import Gallery, load_model
from searching.image_list import ImageList
from searching.ranking import Ranking, rank
from training import checkpoint

from .conftest import picture, run_main, some, write_mitstates
from .services import ROOT, serving, write_bert

CPU = torch.device("cpu")
quiet = partial(tqdm, disable=True)


@pytest.fixture(scope="module")
def trained(trained):
    return trained.checkpoint


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Twelve pictures in nested folders, beside files that are no pictures."""
    root = tmp_path_factory.mktemp("images")
    for number in range(4):
        for folder in (root, root / "a b", root / "a b" / "<i>c"):
            picture(folder / f"{number}.jpg", 40 + 9 * number, 36)
    (root / "notes.txt").write_text("no picture")
    (root / ".hidden.jpg").write_text("no picture")
    return root


@pytest.fixture(scope="module")
def index(trained, images, tmp_path_factory):
    out = tmp_path_factory.mktemp("index") / "made" / "here"
    with_networks(trained, images, out)
    return out


def made(source, folder, out, kind="exact", progress=quiet, batch_size=5, workers=2, engine="torch"):
    return build(source, folder, out, kind, CPU, batch_size, workers, progress, engine_name=engine)


with_networks = partial(made, engine="auto")


def run(*words):
    return search.main([str(word) for word in words])


def asked(capsys, *words):
    """What a query prints as JSON."""
    assert run("query", *words, "--json", "--keep_query", "True") == 0
    return json.loads(capsys.readouterr().out)


@torch.no_grad()
def plain_search(source, paths, image, text, nearness=0):
    """(path, cosine) of all, best first: one image at a time, no index."""
    model, size = checkpoint.rebuild_model(source), checkpoint.load(source)["opt"]["image_size"]

    def feature(path):
        pixels = torch.from_numpy(decode(str(path), size).copy()).permute(2, 0, 1)[None]
        return model.encode_image(normalize_images(pixels))[0]
    own = query = feature(image)
    if text:
        query = model.compose(own[None], model.encode_text([text]))[0]
    query = query / query.norm() + nearness * own / own.norm()
    return sorted(((str(path), F.cosine_similarity(query, feature(path), dim=0).item()) for path in paths),
                  key=lambda found: -found[1])


@pytest.fixture(scope="module")
def by_torch(trained, images, tmp_path_factory):
    out = tmp_path_factory.mktemp("by_torch")
    made(trained, images, out)
    return out


@pytest.mark.parametrize("way", ["by_torch", "index"])
@pytest.mark.parametrize(("text", "nearness"), some(
    [("wet", 0), ("old dog wet bus", 0.3), ("", 0), ("", 0.3), ("old dog wet bus", 1)], 3))
def test_a_query_finds_what_a_plain_search_finds(request, trained, images, way, capsys, text, nearness):
    index, off = request.getfixturevalue(way), {"by_torch": 2e-6, "index": AGREES["f32"]}[way]
    paths = [path for path in images.rglob("*.jpg") if not path.name.startswith(".")]
    image = images / "a b" / "1.jpg"
    expected = plain_search(trained, paths, image, text, nearness)
    assert expected[0][1] - expected[-1][1] > 0.1
    found = asked(capsys, "--index", index, "--image", image, "--text", text, "-k", 7, "--nearness", nearness)["results"]
    assert [hit["rank"] for hit in found] == [1, 2, 3, 4, 5, 6, 7]
    assert [hit["score"] for hit in found] == pytest.approx([score for _, score in expected[:7]], abs=off)
    assert [hit["score"] for hit in found] == pytest.approx([dict(expected)[hit["path"]] for hit in found], abs=off)
    if not text:
        assert found[0]["path"] == str(image) and found[0]["score"] == pytest.approx(1)


def test_the_querys_own_file_is_no_result_unless_it_is_asked_for(images, index, tmp_path, capsys):
    kept = asked(capsys, "--index", index, "--image", images / "a b" / "1.jpg", "-k", 5)["results"]
    (tmp_path / "link.jpg").symlink_to(images / "a b" / "1.jpg")
    for image in (images / "a b" / ".." / "a b" / "1.jpg", tmp_path / "link.jpg"):
        assert run("query", "--index", index, "--image", image, "-k", 4, "--json") == 0
        found = json.loads(capsys.readouterr().out)["results"]
        assert [hit["path"] for hit in found] == [hit["path"] for hit in kept[1:]]
        assert [hit["rank"] for hit in found] == [1, 2, 3, 4]
    copy = shutil.copy(images / "a b" / "1.jpg", tmp_path)
    assert run("query", "--index", index, "--image", copy, "-k", 1) == 0
    assert str(images / "a b" / "1.jpg") in capsys.readouterr().out             # another file


def test_more_results_than_images_are_all_of_them(images, index, capsys):
    found = asked(capsys, "--index", index, "--image", images / "0.jpg", "--text", "wet", "-k", 1000)["results"]
    assert len({hit["path"] for hit in found}) == len(found) == 12


def features_index(folder, features, kind="exact"):
    images = ImageList(folder / "images.sqlite")
    images.create(folder)
    images.add([(f"{number}.jpg", (1, 1)) for number in range(len(features))], features)
    rank(images, folder, features.shape[1], kind, quiet)
    opened = object.__new__(Gallery)
    opened.images, opened.ranking = images, Ranking(faiss.read_index(str(folder / "index.faiss")))
    return opened


@pytest.mark.parametrize("spread", [1, 1e-3, 1e-6, 0])
def test_the_order_is_that_of_float32_also_where_half_precision_cannot_tell(tmp_path, spread):
    rng = np.random.default_rng(0)
    features = (rng.normal(size=48) + spread * rng.normal(size=(3000, 48))).astype(np.float32)
    opened = features_index(tmp_path, features)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    for query in unit[:5]:
        best = opened.nearest(query, 20)
        scores = np.sort(unit.astype(np.float64) @ query)[::-1][:20]
        assert [score for _, score in best] == pytest.approx(list(scores), abs=3e-7)
        assert len({number for number, _ in best}) == 20


def test_ivf_looks_at_some_cells_and_finds_nearly_all(tmp_path):
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(60, 16))
    features = (centres[rng.integers(0, 60, 20_000)] + 0.2 * rng.normal(size=(20_000, 16))).astype(np.float32)
    opened = features_index(tmp_path, features, "ivf")
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    assert opened.ranking.ntotal == 20_000 and opened.ranking.made.nprobe < opened.ranking.made.nlist / 10
    recalls = []
    for query in unit[:40]:
        best = {number - 1 for number, _ in opened.nearest(query, 10)}
        recalls.append(len(best & set(np.argsort(-(unit @ query))[:10])) / 10)
    assert np.mean(recalls) > 0.9


@pytest.mark.parametrize(("count", "kind"), [(1537, "ivf"), (1537, "pq"), (200, "ivf"), (12_000, "pq")])
def test_cells_give_as_many_results_as_are_asked_for(tmp_path, count, kind):
    """Where the nearest cells run out, further ones are looked at, up to all: then the best are exactly the best."""
    features = np.random.default_rng(0).normal(size=(count, 16)).astype(np.float32)
    opened = features_index(tmp_path, features, kind)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    for k in (100, 200, 500, count - 1, count, count + 5):
        found = opened.nearest(unit[7], k)
        assert len({number for number, _ in found}) == len(found) == min(k, count)
        assert found[0][0] == 8 and [score for _, score in found] == sorted((score for _, score in found), reverse=True)
    assert [number - 1 for number, _ in found] == list(np.argsort(-(unit @ unit[7]), kind="stable"))
    assert len(opened.nearest(unit[7], 150, list(range(1, 161)))) == 150        # as among ids it always did


@pytest.mark.long("processes that are killed")
def test_indexing_goes_on_where_it_was_stopped(trained, images, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "stopped"
    made(trained, images, whole)

    class Stops(tqdm):
        def update(self, n=1):
            super().update(n)
            if self.n == 10 and self.desc == "encoding images":
                raise Stopped(signal.SIGINT)
    with pytest.raises(Stopped):
        made(trained, images, out, progress=partial(Stops, file=io.StringIO()))
    with pytest.raises(InputError, match=r"no finished index: it has no index\.faiss.*goes on"):
        Gallery(out, CPU)
    assert made(trained, images, out).new == 2
    ours, theirs = (Gallery(folder, CPU).images.all_features() for folder in (out, whole))
    for (_, a), (_, b) in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, abs=1e-6)


@pytest.mark.long("a thousand images, half of them in a process that is killed")
def test_a_killed_index_process_loses_no_more_than_a_batch(trained, tmp_path):
    for number in range(1000):
        picture(tmp_path / "images" / f"{number}.jpg")
    words = [sys.executable, "search.py", "index", "--model_checkpoint", trained, "--images", tmp_path / "images",
             "--out", tmp_path / "out", "--batch_size", "8"]
    process = subprocess.Popen(list(map(str, words)), cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    while not (tmp_path / "out" / "images.sqlite").exists() or held(tmp_path / "out") < 100:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.communicate()
    kept = held(tmp_path / "out")
    assert 100 <= kept < 1000
    built = made(trained, tmp_path / "images", tmp_path / "out", batch_size=64)
    assert (built.images, built.new, built.broken) == (1000, 1000 - kept, {})


def held(out):
    try:
        return len(ImageList(out / "images.sqlite"))
    except InputError:                                                          # not yet made
        return 0


def test_an_index_takes_in_what_changed_in_the_folder(trained, images, tmp_path, capsys):
    folder, out = tmp_path / "images", tmp_path / "out"
    shutil.copytree(images, folder)
    assert made(trained, folder, out).new == 12
    (folder / "0.jpg").unlink()
    Image.new("RGB", (50, 50), "red").save(folder / "1.jpg")
    picture(folder / "new.jpg")
    assert made(trained, folder, out).new == 2
    found = asked(capsys, "--index", out, "--image", folder / "1.jpg", "-k", 12)["results"]
    assert found[0]["path"] == str(folder / "1.jpg") and found[0]["score"] == pytest.approx(1)
    assert str(folder / "0.jpg") not in {hit["path"] for hit in found} and len(found) == 12
    assert str(folder / "new.jpg") in {hit["path"] for hit in found}


def test_an_image_gone_since_is_no_result_of_a_ranking_that_holds_it_still(trained, images, tmp_path):
    made(trained, images, tmp_path / "out")
    opened = Gallery(tmp_path / "out", CPU)
    opened.images.remove([opened.images.id_of("0.jpg")])
    hits = opened.search(images / "0.jpg", "", 20)
    assert len(hits) == 11 and images / "0.jpg" not in {hit.path for hit in hits}


@pytest.mark.long("two indexes")
def test_broken_images_are_listed_and_no_more(trained, tmp_path, capfd):
    folder = tmp_path / "images"
    for name in ("good.jpg", "half.jpg"):
        picture(folder / name)
    content = (folder / "half.jpg").read_bytes()
    (folder / "half.jpg").write_bytes(content[:len(content) // 2])
    (folder / "empty.png").touch()
    (folder / "text.jpeg").write_text("no picture")
    picture(tmp_path / "secret.jpg")
    (folder / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (folder / "inner.jpg").symlink_to("good.jpg")
    (folder / "dangling.jpg").symlink_to("nothing.jpg")
    assert run("index", "--model_checkpoint", trained, "--images", folder, "--out", tmp_path / "out") == 0
    out, err = capfd.readouterr()
    assert "2 images, 2 of them encoded now, 5 left out" in out
    for name in ("half.jpg", "empty.png", "text.jpeg", "link.jpg: a link that leads out", "dangling.jpg"):
        assert f"left out {name}" in err


def test_phone_pictures_are_seen_upright(tmp_path):
    upright = Image.fromarray(np.arange(60 * 40 * 3, dtype=np.uint8).reshape(60, 40, 3))
    upright.save(tmp_path / "upright.png")
    turned, note = upright.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    note[274] = 6
    turned.save(tmp_path / "turned.png", exif=note)
    assert np.array_equal(read_picture(tmp_path / "turned.png", 32), read_picture(tmp_path / "upright.png", 32))
    assert np.array_equal(decode(str(tmp_path / "turned.png"), 32), decode(str(tmp_path / "upright.png"), 32)) is False


def test_the_index_needs_nothing_but_itself_and_the_images(trained, images, tmp_path, capsys):
    copy = tmp_path / "model.pth"
    shutil.copy(trained, copy)
    made(copy, images, tmp_path / "out")
    copy.unlink()
    slim = torch.load(tmp_path / "out" / "model.pth", weights_only=True)
    assert "optimizer_state_dict" not in slim and sorted(slim["example_texts"]) == ["old", "wet", "white"]
    os.rename(tmp_path / "out", tmp_path / "moved")
    assert asked(capsys, "--index", tmp_path / "moved", "--image", images / "0.jpg")["results"]


@pytest.mark.parametrize(("words", "said"), [
    (["find"], "invalid choice"),
    (["index", "--model_checkpoint", "{nothing}", "--images", "{images}", "--out", "{new}"], "checkpoint not found"),
    (["index", "--model_checkpoint", "{image}", "--images", "{images}", "--out", "{new}"], "not a readable checkpoint"),
    (["index", "--model_checkpoint", "{trained}", "--images", "{nothing}", "--out", "{new}"], "is no folder"),
    (["index", "--model_checkpoint", "{trained}", "--images", "{empty}", "--out", "{new}"], "no image that can be read"),
    (["index", "--model_checkpoint", "{trained}", "--images", "{empty}", "--out", "{index}"], "index of .*own --out"),
    (["index", "--model_checkpoint", "{other}", "--images", "{images}", "--out", "{index}"], "another model"),
    (["index", "--model_checkpoint", "{trained}", "--images", "{images}", "--out", "{images}"], "holds other files"),
    (["index", "--model_checkpoint", "{trained}", "--images", "{images}", "--out", "{image}/x"], "cannot make the index"),
    (["query", "--index", "{nothing}", "--image", "{image}"], "no finished index"),
    (["query", "--index", "{index}", "--image", "{nothing}"], "error: there is no file "),
    (["query", "--index", "{index}", "--image", "{images}/notes.txt"], "no picture that can be read"),
    (["query", "--index", "{index}", "--image", "{images}"], "no picture that can be read"),
    (["query", "--index", "{index}", "--image", "{huge}"], "more than 40 megapixels"),
    (["query", "--index", "{index}", "--image", "{bomb}"], "more than 40 megapixels"),
    (["query", "--index", "{index}", "--image", "{image}", "--text", "wet " * 2500], r"10,000 characters.*1,000"),
    (["query", "--index", "{index}", "--image", "{image}", "--text", "zebra xylophone"], "knows none.*old"),
    (["query", "--index", "{index}", "--image", "{image}", "--text", "!?"], "knows none"),
    (["query", "--index", "{index}", "--image", "{image}", "-k", "0"], "at least 1"),
    (["query", "--index", "{index}", "--image", "{image}", "-k", "1001"], "at most 1000"),
    (["query", "--index", "{index}", "--image", "{image}", "--html", "{nothing}/x.html"], "cannot write --html"),
    (["query", "--index", "{index}", "--image", "{image}", "--png", "{images}"], "cannot write --png"),
    (["serve", "--index", "{index}", "--port", "70000"], "at most 65535"),
    (["serve", "--index", "{images}"], "no finished index"),
])
def test_bad_input_is_one_line_and_code_2(trained, images, index, tmp_path, capsys, words, said):
    (tmp_path / "empty").mkdir()
    for name, size in (("huge", (8000, 6300)), ("bomb", (20_000, 20_000))):     # 50 and 400 megapixels
        if f"{{{name}}}" in words:
            Image.new("1", size).save(tmp_path / f"{name}.png")
    if "{other}" in words:
        run_main("mitstates", write_mitstates(tmp_path / "data"), tmp_path / "logs", seed=1, num_iters=1)
    named = {"nothing": tmp_path / "nothing", "empty": tmp_path / "empty", "new": tmp_path / "new", "index": index,
             "images": images, "image": images / "0.jpg", "trained": trained, "huge": tmp_path / "huge.png",
             "bomb": tmp_path / "bomb.png", "other": next(tmp_path.glob("logs/*/latest_checkpoint.pth"), "")}
    before = sorted(images.rglob("*"))
    capsys.readouterr()
    try:
        code = run(*(word.format(**named) for word in words))
    except SystemExit as end:                                                   # argparse
        code = end.code
    err = capsys.readouterr().err
    assert code == 2 and re.search(said, err) and len(err.splitlines()) == 1, err
    assert sorted(images.rglob("*")) == before


@pytest.mark.parametrize("damaged", ["model.pth", "images.sqlite"])            # of index.faiss: test_index_safety
@pytest.mark.parametrize("content", [b"", b"nonsense" * 1000])
def test_a_damaged_index_is_one_line(index, images, tmp_path, capsys, damaged, content):
    shutil.copytree(index, tmp_path / "out")
    (tmp_path / "out" / damaged).write_bytes(content)
    assert run("query", "--index", tmp_path / "out", "--image", images / "0.jpg") == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and str(tmp_path / "out") in err, err


def test_words_that_are_not_known_are_said_and_left_out(index, images, capsys):
    words = ["query", "--index", index, "--image", images / "0.jpg", "--text"]
    assert run(*words, "wet old") == 0
    plain = capsys.readouterr()
    assert run(*words, "make it WET <zebra> old, please!") == 0
    out, err = capsys.readouterr()
    assert out == plain.out and len(out.splitlines()) == 12 and plain.err == ""
    assert "so left out: make, it, zebra, please" in err and "wet" not in err


def test_sheets_hold_the_results_and_no_text_is_taken_for_html(index, images, tmp_path, capfd):
    evil = "wet <script>alert(1)</script> \" onerror=x"
    assert run("query", "--index", index, "--image", images / "0.jpg", "--text", evil, "-k", 12, "--html",
               tmp_path / "found.html", "--png", tmp_path / "found.png") == 0
    page = (tmp_path / "found.html").read_text()
    assert page.count("<img ") == 12 and page.count("data:image/jpeg;base64,") == 12
    assert "<script" not in page and "&lt;script&gt;" in page and "<i>c" not in page
    with Image.open(tmp_path / "found.png") as sheet:
        assert sheet.width > 1000 and len(sheet.getcolors(10**6)) > 1000


def test_an_image_that_was_removed_leaves_its_place_in_the_sheets(trained, images, tmp_path, capsys):
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    made(trained, folder, tmp_path / "out")
    (folder / "1.jpg").unlink()
    assert run("query", "--index", tmp_path / "out", "--image", folder / "0.jpg", "--png", tmp_path / "found.png") == 0
    assert "1 of the 11 results are no longer in" in capsys.readouterr().err and (tmp_path / "found.png").exists()


@pytest.mark.long("three processes")
def test_the_whole_command_line_as_a_user_types_it_with_a_file_name_that_is_no_text(trained, images, tmp_path):
    images = shutil.copytree(images, tmp_path / "images")
    os.rename(images / "3.jpg", os.fsencode(images / "n") + b"\xff.jpg")
    def program(*words):
        return subprocess.run([sys.executable, "search.py", *map(str, words)], cwd=ROOT, capture_output=True,
                              check=False)
    done = program("index", "--model_checkpoint", trained, "--images", images, "--out", tmp_path / "out", "--ivf")
    assert done.returncode == 0 and b"12 images, 12 of them encoded now" in done.stdout, done.stderr
    done = program("query", "--index", tmp_path / "out", "--image", images / "0.jpg", "-k", 12)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines[0].split() == [b"rank", b"score", b"image"] and len(lines) == 12
    assert any(line.endswith(b"/n\xff.jpg") for line in lines)
    done = program("query", "--index", tmp_path / "nothing", "--image", images / "0.jpg")
    assert done.returncode == 2 and b"Traceback" not in done.stderr


@pytest.mark.long("three services of its own")
def test_a_model_of_a_sentence_service_indexes_without_it_and_asks_it_for_texts(mitstates, images, tmp_path, capsys):
    with serving(write_bert(tmp_path / "bert", size=16)) as service, \
            serving(write_bert(tmp_path / "other", size=16, seed=1)) as other:
        trained = run_main("mitstates", mitstates, tmp_path / "logs", **service.flags).checkpoint
        made(trained, images, tmp_path / "out")
        words = ["--index", tmp_path / "out", "--image", images / "0.jpg"]
        capsys.readouterr()
        assert asked(capsys, *words, "--text", "wet dog")["unknown_words"] == []
        found = asked(capsys, *words, "--text", "red")["results"]
        service.kill()
        assert run("query", *words, "--text", "blue", "--bert_timeout", 0.5) == 2
        assert "no sentence service" in capsys.readouterr().err
        assert asked(capsys, *words)["results"]                                 # no text: none is asked
        assert run("query", *words, "--text", "red", "--bert_port", other.port, "--bert_port_out", other.port_out) == 2
        assert "other vectors" in capsys.readouterr().err
    with serving(tmp_path / "bert") as again:
        assert asked(capsys, *words, "--text", "red", "--bert_port", again.port, "--bert_port_out",
                     again.port_out)["results"] == found


@pytest.mark.long("a process that loads torch")
def test_readmes_python_runs_as_printed(trained, images, index, tmp_path, capsys):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    assert len(blocks) == 2
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "RUN").symlink_to(trained.parent)
    (tmp_path / "INDEX").symlink_to(index)
    for number, name in enumerate(("dress", "a", "b")):
        shutil.copy(images / f"{number}.jpg", tmp_path / f"{name}.jpg")
    done = subprocess.run([sys.executable, "-c", "import sys\nfor block in sys.argv[1:]: exec(block, {})", *blocks],
                          cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr
    *hits, cosines = done.stdout.splitlines()
    paths, scores = zip(*(hit.rsplit(" ", 1) for hit in hits), strict=True)
    found = asked(capsys, "--index", index, "--image", tmp_path / "dress.jpg", "--text", "is white", "-k", 5)
    assert list(paths) == [hit["path"] for hit in found["results"]] and all(map(os.path.isfile, paths))
    assert found["unknown_words"] == ["is"]
    assert list(map(float, scores)) == pytest.approx([hit["score"] for hit in found["results"]], abs=2e-6)
    expected = dict(plain_search(trained.with_name("best_checkpoint.pth"), [tmp_path / "a.jpg", tmp_path / "b.jpg"],
                                 tmp_path / "dress.jpg", "white"))             # "is" is not known
    assert list(map(float, cosines.strip("[]").split())) == pytest.approx(
        [expected[str(tmp_path / f"{name}.jpg")] for name in "ab"], abs=2e-6)


def test_a_model_without_an_index_gives_the_vectors_that_an_index_ranks(trained, images, index, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")                                       # with which programs set no threads
    threads = torch.get_num_threads()
    hits, model = Gallery(index).search(images / "0.jpg", "old wet dog"), load_model(trained)
    query, gallery = model.compose(images / "0.jpg", "old wet dog"), model.encode([hit.path for hit in hits] * 3)
    assert len(hits) == 12 and hits[0].score - hits[-1].score > 0.1 and torch.get_num_threads() == threads
    assert (query.shape, gallery.shape, model.encode([]).shape) == ((24,), (36, 24), (0, 24))
    assert query.dtype == gallery.dtype == np.float32
    assert np.linalg.norm([query, *gallery], axis=1) == pytest.approx(np.ones(37), abs=1e-6)
    assert gallery @ query == pytest.approx([hit.score for hit in hits] * 3, abs=1e-3)


def test_bad_input_from_python_is_one_line(trained, images, index):
    opened, model, image = Gallery(index, CPU), load_model(trained, "cpu"), images / "0.jpg"
    for call, said in ((lambda: Gallery(images), "no finished index"),
                       (lambda: opened.search(images / "notes.txt", "wet"), "no picture that can be read"),
                       (lambda: opened.search(image, "zebra"), "knows none"),
                       (lambda: load_model(image), "not a readable checkpoint"),
                       (lambda: model.compose(str(image), "zebra"), "knows none"),
                       (lambda: model.encode([image, "nothing.jpg"]), r"there is no file nothing\.jpg")):
        with pytest.raises(InputError, match=rf"^.*{said}.*$") as raised:
            call()
        assert "\n" not in str(raised.value)


def test_missing_faiss_says_how_to_install_it(trained, images, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert run("index", "--model_checkpoint", trained, "--images", images, "--out", tmp_path / "out") == 2
    assert "pip install -r requirements-search.txt" in capsys.readouterr().err
