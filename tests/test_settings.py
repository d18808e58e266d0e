"""Flags are settled once: wrong combinations are refused before torch is loaded, and nothing assigns to them later."""

import re
import subprocess
import sys

import pytest

from flags import get_parser, refuse
from machine.errors import InputError
from training.settings import filled

from .test_imports import FILES, ROOT

NEEDED = "--dataset=mitstates", "--dataset_path=x"
WRONG = {
    "--test_only": "--test_only needs the checkpoint to test",
    "--test_only --model_checkpoint=x --resume=auto": "drop --resume",
    "--sync_bn --device=cpu": "is for CUDA GPUs alone; drop it",
    "--write_submission": "mitstates has no test server, as cirr has; drop it",
    "--comment=a/b": "--comment 'a/b'",
}
WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = None                     # its import fails
sys.argv = ["main.py", *sys.argv[1:]]
runpy.run_path("main.py", run_name="__main__")
"""


@pytest.mark.parametrize("words", WRONG)
def test_flags_that_do_not_go_together_are_refused_before_torch_is_loaded(words):
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *NEEDED, *words.split()], cwd=ROOT, check=False,
                          capture_output=True, text=True)
    assert done.returncode == 2 and WRONG[words] in done.stderr and done.stderr.count("\n") == 1


def test_what_auto_comes_to_decides_too():
    args = get_parser().parse_args([*NEEDED, "--sync_bn"])
    refuse(args, "cuda")
    with pytest.raises(InputError, match="CUDA GPUs alone"):
        refuse(args, "mps")


@pytest.mark.parametrize(("words", "opt", "settled"), [
    ("", {}, {"image_size": 224, "image_embed_dim": 512, "text_encoder": "lstm", "use_bert": False,
              "best_metric": "recall_top10_correct_composition"}),
    ("--image_embed_dim=0 --image_encoder=resnet50", {"image_size": 64}, {"image_size": 64, "image_embed_dim": 2048}),
    ("--image_size=96 --use_bert", {"image_size": 64}, {"image_size": 96, "text_encoder": "service", "use_bert": True}),
    ("--text_encoder=service", {}, {"text_encoder": "service", "use_bert": True}),
    ("--dataset=fashionIQ", {}, {"best_metric": "recall_mean_own_gallery"}),
    ("--best_metric=recall_top1_correct_noun", {}, {"best_metric": "recall_top1_correct_noun"})])
def test_what_was_left_open_is_filled_in_and_the_flags_stay_as_they_were(words, opt, settled):
    args = get_parser().parse_args([*NEEDED, *words.split()])
    before, found = dict(vars(args)), vars(filled(args, opt))
    assert {name: found[name] for name in settled} == settled and vars(args) == before
    assert {name: value for name, value in found.items() if name not in (
        "image_size", "image_embed_dim", "text_encoder", "use_bert", "best_metric")}.items() <= before.items()


def test_nothing_assigns_to_flags():
    assert [name for name, path in FILES.items() if re.search(r"\bargs\.\w+ = ", path.read_text())] == []
