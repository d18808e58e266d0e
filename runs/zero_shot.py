"""Train a small CLIP model on drawn pictures and their captions, then LinCIR and Pic2Word on it, and print a table of
how they find the toy set's pictures, beside what composes nothing.

    python data/make_toy.py data/toy
    python runs/zero_shot.py --toy data/toy --seeds 0 1 2

The CLIP model sees none of the toy set's own pictures: others of the same things are drawn for it. Its captions name a
state and a noun. LinCIR then learns from captions alone. Pic2Word learns from pictures alone, drawn ones of the same
things in no state; with --states True in all of them, so that its word also says in which, whatever the text asks for.
Each is trained for several numbers of steps, of which the one that finds most of a validation split, nouns of the toy
set's train split, is tested. What is finished under --out is not made again. Cells are percent, means over the seeds ±
their standard deviation.
"""

import json
import random
import statistics
import subprocess
import sys
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from benchmarks.pictures import Pictures
from data import make_toy
from flags import Parser, add, at_least
from image_encoders import LIBRARIES, quiet, traits
from machine.errors import InputError
from machine.image_store import ImageStore, normalize_images
from machine.progress import progress_bar
from text_encoders import clip_tokenizer
from torch_function import both_ways_classification_loss

SIDE = 64
CONFIG = {"model_cfg": {"embed_dim": 64, "vision_cfg": {"image_size": SIDE, "layers": [1, 1, 1, 1], "width": 16},
                        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 2}},
          "preprocess_cfg": {"size": SIDE}}
EACH, PLAIN = 6, 48                     # pictures of a state of a noun, and of a noun in none
WAYS = ("a photo of a {a} {n}", "a {a} {n}", "a photo of a {n} that is {a}", "a {n} that is {a}", "a photo of a {n}")
KS = 1, 5, 10
R1 = "recall_top1_correct_composition"
VALIDATION = 0.34                       # of the train split's nouns
PUBLISHED = ("--optimizer=adamw", "--learning_rate=1e-4", "--loader_num_workers=2", "--eval_frequency=0",
             "--log_frequency=100")     # of both; LinCIR's weight decay is 0.01, Pic2Word's 0.1
ASKED = "a photo of a {} $"


def drawn(folder: Path) -> Path:
    """Pictures of every state of every noun, none of them the toy set's: a picture depends on its file's name."""
    done = folder / "all-drawn"
    if not done.exists():
        for noun, shapes in progress_bar({**make_toy.TRAIN_NOUNS, **make_toy.TEST_NOUNS}.items(), desc="drawing",
                                         total=len(make_toy.TRAIN_NOUNS) + len(make_toy.TEST_NOUNS)):
            for adjective, look in make_toy.ADJECTIVES.items():
                (folder / f"{adjective} {noun}").mkdir(parents=True, exist_ok=True)
                for number in range(EACH):
                    make_toy.draw(folder, f"{adjective} {noun}/for CLIP {number}.jpg", shapes, look)
        done.touch()
    return folder


def plain(folder: Path) -> Path:
    """Pictures of every noun, of some dull colour, in none of the states."""
    done = folder / "all-drawn"
    if not done.exists():
        for noun, shapes in {**make_toy.TRAIN_NOUNS, **make_toy.TEST_NOUNS}.items():
            (folder / noun).mkdir(parents=True, exist_ok=True)
            for number in range(PLAIN):
                make_toy.draw(folder, f"{noun}/plain {number}.jpg", shapes, make_toy.Look())
        done.touch()
    return folder


def captions(chance: random.Random, name: str) -> str:
    adjective, noun = name.split("/")[0].split(" ")
    return chance.choice(WAYS).format(a=adjective, n=noun)


def clip_model(folder: Path, pictures: Path, seed: int, steps: int, batch: int) -> Path:
    """A folder that open_clip:local-dir: reads, of a model trained on these pictures with CLIP's loss."""
    if (folder / "open_clip_model.safetensors").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(CONFIG, indent=1))
    name = f"local-dir:{folder}"
    torch.manual_seed(seed)
    with quiet():
        model, tokens = LIBRARIES["open_clip"].whole(name).train(), clip_tokenizer(name, name)
    data, wants = Pictures(pictures, "train"), traits(f"open_clip:{name}")
    store, chance = ImageStore(data.paths, SIDE, folder.parent, wants.resampling, upright=True), random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.1)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    rng = np.random.default_rng(seed)
    for _ in (bar := progress_bar(range(steps), desc="CLIP", total=steps)):
        chosen = rng.choice(len(data.images), batch, replace=False)
        images = normalize_images(store.batch(chosen), wants.mean, wants.std)
        texts = tokens([captions(chance, data.images[index]) for index in chosen])
        image, text = (F.normalize(rows, dim=1) for rows in (model.encode_image(images), model.encode_text(texts)))
        loss = both_ways_classification_loss(model.logit_scale.exp().clamp(max=100) * image, text)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    save_file({weight: value.contiguous() for weight, value in model.state_dict().items()},
              folder / "open_clip_model.safetensors")
    return folder


def run(folder: Path, *words: str) -> Path:
    """main.py with these flags, unless that was done: the folder of its run."""
    if not (found := sorted(folder.glob("*/metrics.json"))):
        print("main.py", *words, file=sys.stderr, flush=True)
        command = [sys.executable, "-W", "ignore", ROOT / "main.py", *words, f"--log_dir={folder}"]
        if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
            raise InputError(f"the run in {folder} did not end; what it said stands above")
        found = sorted(folder.glob("*/metrics.json"))
    return found[-1].parent


def results(out: Path, toy: Path, pictures: Path, seed: int, args) -> tuple[dict, dict]:
    """Of composers that learn {composer: {steps: {split: {metric: value}}}}, of others {composer: {metric: value}} of
    the test split."""
    tower = f"open_clip:local-dir:{clip_model(out / f'clip-{seed}', pictures, seed, args.clip_steps, 128)}"
    towers = f"--image_encoder={tower}", f"--text_encoder={tower}", f"--image_size={SIDE}"
    (texts := out / "captions.txt").write_text("".join(
        f"{way.format(a=adjective, n=noun)}\n" for noun in [*make_toy.TRAIN_NOUNS, *make_toy.TEST_NOUNS]
        for adjective in make_toy.ADJECTIVES for way in WAYS))
    shown = pictures if args.states else plain(out / "plain")
    learned, others = {}, {}
    for (model, dataset, path, decay), steps in product((
            ("LinCIR", "texts", texts, 0.01), ("Pic2Word", "pictures", shown, 0.1)), args.steps):
        name = f"{model}-{path.stem}-{seed}-{steps}"
        trained = run(out / name, f"--model={model}", f"--dataset={dataset}", f"--dataset_path={path}", *towers,
                      *PUBLISHED, f"--weight_decay={decay}", f"--num_iters={steps}", "--batch_size=128",
                      f"--seed={seed}", f"--prompt={ASKED}")
        tested = run(out / f"{name}-test", "--test_only=True", "--baselines=True", "--dataset=mitstates",
                     f"--validation={VALIDATION}", f"--model_checkpoint={trained / 'latest_checkpoint.pth'}",
                     f"--dataset_path={toy / 'mitstates'}")
        content = json.loads((tested / "metrics.json").read_text())
        learned.setdefault(model, {})[steps] = content
        others |= {name.removeprefix("test "): values for name, values in content["baselines"].items() if R1 in values}
    return learned, others


def main() -> int:
    parser = Parser(prog="zero_shot.py", description=__doc__.split("\n")[0])
    parser.add_argument("--toy", type=Path, default=ROOT / "data" / "toy", help="folder of data/make_toy.py")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=ROOT / "logs" / "zero_shot", help="folder of all that is made")
    parser.add_argument("--clip_steps", type=at_least(1), default=1500, metavar="N", help="of the CLIP model")
    parser.add_argument("--steps", nargs="+", type=at_least(1), default=[100, 200, 300], metavar="N",
                        help="of LinCIR and Pic2Word, to choose from")
    add(parser, "--states", False, "Pic2Word learns from pictures in all states")
    args = parser.parse_args()
    try:
        out = args.out.resolve()
        pictures = drawn(out / "pictures")
        tests = [results(out, args.toy.resolve(), pictures, seed, args) for seed in args.seeds]
    except (InputError, OSError) as error:
        print(f"zero_shot.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    learned, others = zip(*tests, strict=True)
    validated = {name: [[each[name][steps]["validation"][R1] for each in learned] for steps in args.steps]
                 for name in learned[0]}
    table("validation, R@1", [f"{steps} steps" for steps in args.steps], validated)
    chosen = {name: max(zip(map(sum, cells), args.steps, strict=True))[1] for name, cells in validated.items()}
    tested = {**{name: [each[name] for each in others] for name in others[0]},
              **{f"{name}, {steps} steps": [each[name][steps]["test"] for each in learned]
                 for name, steps in chosen.items()}}
    table("test", [f"R@{k}" for k in KS], {
        name: [[test[f"recall_top{k}_correct_composition"] for test in of_seeds] for k in KS]
        for name, of_seeds in tested.items()})
    return 0


def table(title: str, columns: list[str], rows: dict[str, list[list[float]]]) -> None:
    """Of a share for each seed in each cell."""
    print(f"\n| {title} | {' | '.join(columns)} |\n|{' --- |' * (len(columns) + 1)}")
    for name, cells in rows.items():
        told = [f"{100 * statistics.mean(values):.1f}" + (f" ± {100 * statistics.stdev(values):.1f}"
                                                          if len(values) > 1 else "") for values in cells]
        print(f"| {name} | {' | '.join(told)} |")


if __name__ == "__main__":
    sys.exit(main())
