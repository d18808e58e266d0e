"""A network that does not change, at this CPU's own speed: OpenVINO's, made of a torch module or read from a file.

OpenVINO, of the libraries that do so: it is made in 2 s where an ONNX file takes 17, was the fastest on Intel and AMD
alike (docs/performance.md), and runs on ARM and macOS too. What runs a kept network imports no torch.

A network gives what torch gives to 1e-5 of the largest value, or is not taken: `Refused` says why.
"""

import logging
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np

from machine.errors import InputError, first_line
from machine.threads import threads_to_use

NAME = "openvino"
ENGINES = "auto", "torch", NAME
AGREES = {"f32": 1e-5, "bf16": 0.05}    # of the largest value that torch gives in float32
TRACED = 2                              # rows of the example; a batch of another size is what is compared


class Refused(InputError):
    """The engine is missing, or does not take this network; says why."""


@cache
def openvino() -> ModuleType:
    """The library. Raises Refused. It would report its use to its makers, through a package that is kept out."""
    if not has_avx():
        raise Refused("OpenVINO is for processors with AVX")
    sys.modules.setdefault("openvino_telemetry", None)                          # whose import then fails, as it may
    try:
        import openvino
    except ImportError as error:
        raise Refused(f"OpenVINO is not there ({first_line(error)}): pip install openvino") from None
    return openvino


def has_avx(told: str | None = None) -> bool:
    """Whether OpenVINO computes rightly here, which it does not look at: on x86 it needs AVX, which the processor may
    lack, or oneDNN's variable, which it heeds, forbid. told: what Linux says of the processor, else read."""
    if "SSE41" in (os.environ.get(name, "").upper() for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")):
        return False
    try:
        told = Path("/proc/cpuinfo").read_text() if told is None else told
    except OSError:                                                             # no Linux: none without is supported
        return True
    flags = re.search(r"^flags\s*:(.*)$", told, re.MULTILINE)                   # ARM's have Features
    return not flags or "avx" in flags[1].split()


def is_there() -> bool:
    try:
        return bool(openvino())
    except Refused:
        return False


@cache
def core():
    return openvino().Core()


def has_bf16() -> bool:
    """Whether this processor computes in bfloat16. Raises Refused."""
    return "BF16" in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


class Network:
    """Arrays (B, ...) -> an array (B, ...) float32; several threads may ask.

    model: OpenVINO's. bf16: computed in bfloat16; else in float32, which has to be said: where a processor has
    bfloat16, OpenVINO takes it by itself. Raises Refused.
    """

    def __init__(self, model, bf16: bool = False):
        how = {"INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32", "PERFORMANCE_HINT": "LATENCY",
               "INFERENCE_NUM_THREADS": threads_to_use(), "ENABLE_CPU_PINNING": False}     # others have cores, too
        self.model, self.lock = model, threading.Lock()
        try:
            compiled = core().compile_model(model, "CPU", how)
            self.precision = str(compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name())
            self.request = compiled.create_infer_request()
        except RuntimeError as error:
            raise Refused(first_line(error)) from None
        if (self.precision == "bf16") != bf16:
            raise Refused(f"it computes in {self.precision}")

    def __call__(self, *inputs: np.ndarray) -> np.ndarray:
        with self.lock:
            return self.request.infer([*map(np.ascontiguousarray, inputs)], share_inputs=True)[0]

    def kept(self, scratch: Path) -> tuple[bytes, bytes]:
        """The network as `read` takes it: what it computes, as XML, and its weights. scratch: a folder, where OpenVINO
        writes it first. Raises OSError."""
        file = scratch / "network.xml"
        try:
            openvino().save_model(self.model, file, compress_to_fp16=False)
        except RuntimeError as error:
            raise OSError(first_line(error)) from None
        return file.read_bytes(), file.with_suffix(".bin").read_bytes()


def read(program: bytes, weights: bytes) -> Network:
    """A network that was `kept`. Raises Refused."""
    try:
        return Network(core().read_model(model=program, weights=weights))
    except (RuntimeError, ValueError) as error:
        raise Refused(first_line(error)) from None


def made(module: Callable, inputs: Sequence, bf16: bool = False, any_length: bool = False) -> Network:
    """The network of a torch module, put into eval mode: tensors (B, ...) on the CPU -> one (B, ...), for any B.

    inputs: some real rows, more than TRACED, with which it is compared with torch. any_length: whether rows may be of
    any length, (B, n). Raises Refused.
    """
    import torch

    module.eval()
    with torch.inference_mode():                                                # first: what a first call keeps, as
        theirs = module(*inputs).float().numpy()                                # constants, shall be no traced one's
    try:
        with quietly(), torch.no_grad():
            example = tuple(value[:TRACED] for value in inputs)
            traced = torch.jit.trace(module, example, check_trace=False)
            shapes = [openvino().PartialShape([-1, *([-1] * (value.ndim - 1) if any_length else value.shape[1:])])
                      for value in inputs]
            model = openvino().convert_model(traced, example_input=example, input=shapes)
        network = Network(model, bf16)
        ours = network(*(value.numpy() for value in inputs))
    except Refused:
        raise
    except Exception as error:                                                  # tracing and converting raise any
        raise Refused(f"OpenVINO does not take it ({first_line(error)})") from None
    check(ours, theirs, bf16)
    return network


def check(ours: np.ndarray, theirs: np.ndarray, bf16: bool = False) -> None:
    """Raises Refused where a network's numbers are not torch's."""
    if not (off := difference(ours, theirs)) <= AGREES["bf16" if bf16 else "f32"]:
        raise Refused(f"OpenVINO's numbers are off by {off:.1e} of the largest")


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest between the two, of the largest value of the second; NaN where one is."""
    if ours.shape != theirs.shape:
        return float("inf")
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@contextmanager
def quietly() -> Iterator[None]:
    """Tracing and converting warn of what is meant, and set up the root logger anew."""
    root, disabled = logging.getLogger(), logging.root.manager.disable
    handlers, level = root.handlers[:], root.level
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(disabled)
        root.handlers[:] = handlers
        root.setLevel(level)
