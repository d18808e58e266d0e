"""Precision, compilation, threads and the store in the device's memory: faster ways, the same results."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import main
from img_text_composition_models import MODELS, OF_TRIPLETS
from machine import device, image_store
from machine.image_store import DeviceStore, ImageStore
from text_model import SimpleVocab
from torch_function import LOSSES, composition_losses
from training import loop

from .conftest import Run, flags, run_main, some, write_mitstates

ROOT = Path(main.__file__).parent
TEXTS = ["old dog", "wet", "old bus", "wet bus"]


@pytest.fixture(autouse=True)
def backend_flags_as_before():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.get_num_threads()
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before[:2]
    torch.set_num_threads(before[2])


@pytest.mark.parametrize(("quota", "cores"), [("max 100000", 5), ("200000 100000", 2), ("150000 100000", 1),
                                              ("50000 100000", 1), ("9900000 100000", 5), ("nonsense", 5), (None, 5)])
def test_no_more_threads_than_the_machine_gives(tmp_path, monkeypatch, quota, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2, 5, 7})
    if quota:
        (tmp_path / "cpu.max").write_text(f"{quota}\n")
    assert device.usable_cores(tmp_path / "cpu.max") == cores


@pytest.mark.long("two processes")
def test_threads_are_the_affinitys_unless_the_user_says():
    program = ("import torch; from machine import device; device.set_up(torch.device('cpu'), 'fp32'); "
               "print(torch.get_num_threads())")
    plain = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    def threads(**more):
        words = ["taskset", "-c", "0", sys.executable, "-c", program]
        return int(subprocess.run(words, env=plain | more, capture_output=True, text=True, check=True).stdout)
    assert threads() == 1 and threads(OMP_NUM_THREADS="2") == 2


@pytest.mark.parametrize(("precision", "coarse"), [("fp32", False), ("tf32", True), ("bf16", False)])
def test_only_convolutions_are_ever_coarse_and_only_if_asked(precision, coarse):
    device.set_up(torch.device("cpu"), precision)
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (False, coarse)


@pytest.mark.long("seconds on a processor without bfloat16")
@pytest.mark.parametrize("name", some(OF_TRIPLETS))
def test_bfloat16_is_near_float32_and_leaves_it_to_the_encoder(name):
    torch.manual_seed(0)
    model = MODELS[name](SimpleVocab.from_texts(TEXTS), 24, 16).eval()
    images = torch.randn(4, 3, 48, 48)
    whole = model(images, TEXTS, images.flip(0))
    model.bf16 = True
    coarse = model(images, TEXTS, images.flip(0))
    for feature in whole.keys() - {"text_labels"}:                              # whole numbers: which texts are equal
        value = whole[feature]
        assert coarse[feature].dtype == torch.float32
        assert torch.equal(coarse[feature], value) == (feature == "text")       # it did compute otherwise
        assert (coarse[feature] - value).norm() < 0.03 * value.norm()
    losses = composition_losses(coarse, "batch_based_classification")
    losses["total training loss"].backward()
    assert losses["total training loss"].dtype == torch.float32
    assert all(weight.grad.dtype == torch.float32 for weight in model.img_model.parameters())


class Operations(TorchDispatchMode):
    """Names of the operations done inside, each with its first argument's shape."""

    def __init__(self):
        super().__init__()
        self.done = []

    @property
    def names(self):
        return {name for name, _ in self.done}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.done.append((function.overloadpacket.__name__, getattr(args[0], "shape", None) if args else None))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", some(OF_TRIPLETS))
def test_in_bfloat16_a_step_rounds_each_weight_once(name):
    model = MODELS[name](SimpleVocab.from_texts(TEXTS), 24, 16).train()
    model.bf16 = True
    images = torch.randn(4, 3, 64, 64)
    with Operations() as seen:
        model(images, TEXTS, images.flip(0))
    shape = model.img_model.conv1.weight.shape                                  # which no other weight has
    assert seen.done.count(("_to_copy", shape)) == 1


@pytest.mark.parametrize("loss", some(LOSSES, 2))
@pytest.mark.parametrize("name", some(["composeAE", "TransformerAE", "tirg", "RealSpaceConcatAE"]))
def test_a_step_asks_nothing_of_the_device(name, loss):
    """No operation whose result the host must know, which on a GPU would wait for all that was started."""
    model = MODELS[name](SimpleVocab.from_texts(TEXTS), 24, 16).train()
    optimizer = loop.make_optimizer(model, 0.01, 1e-6)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    parts = [loop.Part(images, TEXTS, images)]
    loop.train_step(model, optimizer, loss, parts)                                  # the optimizer's state is made
    meter = loop.LossMeter()
    with Operations() as seen:
        for _ in range(2):
            meter.add(loop.train_step(model, optimizer, loss, parts))
    assert {"convolution", "_fused_sgd_"} <= seen.names
    assert not {"_local_scalar_dense", "nonzero", "multinomial", "unique_dim", "_unique2"} & seen.names


@pytest.mark.parametrize("workers", [0, 3])
def test_a_store_on_the_device_gives_the_same_pixels(mitstates, tmp_path, workers):
    paths = [str(path) for path in sorted((mitstates / "images").glob("*/*.jpg"))]
    store = ImageStore(paths, 32, tmp_path / "cache")
    held = DeviceStore.of(store, torch.device("cpu"), workers)
    ids = [3, 0, 3, len(paths) - 1]
    assert torch.equal(held.batch(ids), store.batch(ids)) and len(held) == len(store)
    assert held.batch(ids).is_contiguous(memory_format=torch.channels_last)


def logged(run):
    return {name: values for name, values in run.scalars().items() if not name.endswith("per_second")}


@pytest.mark.long("two runs")
def test_images_on_the_device_change_nothing(mitstates, tmp_path):
    runs = [run_main("mitstates", mitstates, tmp_path / cache, image_cache=cache) for cache in ("auto", "device")]
    assert logged(runs[0]) == logged(runs[1]) and runs[0].metrics == runs[1].metrics


def test_where_the_device_has_no_room_the_cache_folder_serves(mitstates, tmp_path, monkeypatch, caplog):
    # 10 training images of 3 * 32 * 32 bytes and 10 of the test split: twice their bytes, less one
    monkeypatch.setattr(image_store, "free_memory", lambda device: 2 * 20 * 3 * 32 * 32 - 1)
    held = []
    monkeypatch.setattr(DeviceStore, "of", lambda *args: held.append(args))
    run = run_main("mitstates", mitstates, tmp_path / "logs", image_cache="device")
    assert run.metrics["it"] == 3 and not held
    assert caplog.text.count("more than half of the memory") == 1


@pytest.mark.long("two runs")
def test_the_program_trains_in_bfloat16(tmp_path):
    """Of an encoder without batch norm, which would make much of a rounding; bfloat16 has 8 bits, so 0.4 % a number."""
    path = write_mitstates(tmp_path / "mitstates", images=4)
    runs = [run_main("mitstates", path, tmp_path / name, precision=name, num_iters=1, batch_size=16,
                     image_encoder="timm:test_vit", image_size=160) for name in ("fp32", "bf16")]
    ours, coarse = (logged(run)["loss/total"] for run in runs)
    assert ours != coarse and coarse == [(1, pytest.approx(ours[0][1], rel=0.01))]


def program(mitstates, log_dir, environment=None, **changes):
    """The program in a process of its own: torch's compiler gives warnings, which are errors in this one."""
    words = [sys.executable, main.__file__, *flags("mitstates", mitstates, log_dir, compile=True, **changes)]
    return subprocess.run(words, env=os.environ | (environment or {}), capture_output=True, text=True, check=False)


COMPILED = """
import torch
from img_text_composition_models import MODELS
from machine.device import compiled
from text_model import SimpleVocab
from torch_function import composition_losses

torch.manual_seed(0)
model = MODELS["composeAE"](SimpleVocab.from_texts(["a b c"]), 24, 16).double().eval()
images, text = torch.randn(2, 4, 3, 64, 64, dtype=torch.float64), torch.randn(4, 16, dtype=torch.float64)
found = []
for features in (model.features, compiled(model.features)):
    model.zero_grad()
    losses = composition_losses(features(images[0], text, images[1]), "batch_based_classification")
    losses["total training loss"].backward()
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    found.append(torch.cat([*(value.detach().view(1) for value in losses.values()), *map(torch.flatten, gradients)]))
torch.testing.assert_close(*found, rtol=1e-7, atol=1e-10)
print(len(found[0]), "numbers are the same")
"""


@pytest.mark.rare("compiles a step")
def test_a_compiled_step_is_the_same_step():
    """Losses and gradients, in float64 with batch norm's statistics held fixed, where rounding cannot grow."""
    done = subprocess.run([sys.executable, "-c", COMPILED], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "numbers are the same" in done.stdout, done.stderr


@pytest.mark.rare("compiles a step")
def test_the_program_trains_compiled(mitstates, tmp_path):
    """One step: later ones draw other random numbers."""
    how = {"model": "tirg", "loss": "batch_based_classification", "num_iters": 1, "image_encoder": "resnet18",
           "image_size": 64}
    plain = run_main("mitstates", mitstates, tmp_path / "plain", **how)
    done = program(mitstates, tmp_path / "fast", **how)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "fast").iterdir()
    losses = [logged(run)["loss/total"] for run in (plain, Run(folder))]
    assert losses[1] == [(1, pytest.approx(losses[0][0][1], rel=1e-2))]


@pytest.mark.rare("traces a step")
def test_no_compiler_is_said_in_one_line(mitstates, tmp_path):
    nowhere = {"CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = program(mitstates, tmp_path / "logs", nowhere, freeze_image_encoder=True, model="tirg")
    assert done.returncode == 2 and "--compile True" in done.stderr and "Traceback" not in done.stderr
