"""Train composers on the same data with the same flags, a few seeds each, and print a table of what they give.

    python runs/compare.py --on mitstates:data/toy/mitstates fashion200k:DIR --models tirg composeAE --seeds 0 1 2 \\
        -- --batch_size 128 --num_iters 1500 ...

What follows -- goes to main.py as it stands. Each run is a process of its own, with a folder of its own under --out;
what is finished there is not made again, so that a stopped comparison goes on when it is started again. Cells are
percent, means over the seeds ± their standard deviation. ms: a step's time, batches and all; weights: those that the
composer itself learns.
"""

import hashlib
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from datasets import DATASETS
from flags import Parser
from img_text_composition_models import OF_TRIPLETS
from machine.errors import InputError
from training import checkpoint
from training.writers import LINES

KS = 1, 5, 10, 50
METRICS = "correct_composition", "own_gallery_mean"                        # the first that a benchmark has


def results_of(folder: Path) -> dict | None:
    """What a run has given: {split: {metric: value}}, and its "ms" and "weights"; None where it has not ended."""
    for file in sorted(folder.glob("*/metrics.json"), reverse=True):
        state, results = checkpoint.load(file.with_name(checkpoint.LATEST)), json.loads(file.read_text())
        it, *_ = (results.pop(name, None) for name in ("it", "baselines", "protocol"))
        if it == state["opt"]["num_iters"]:
            own = [value.numel() for name, value in state["model_state_dict"].items()
                   if not name.startswith(("img_model.", "text_model."))]
            return {"splits": results, "weights": sum(own),
                    "ms": 1000 * state["opt"]["batch_size"] / speed(file.with_name(LINES))}
    return None


def speed(log: Path) -> float:
    """Median queries a second; not a number of a run from before there was such a file."""
    lines = map(json.loads, log.read_text().splitlines() if log.exists() else ())
    found = [line["queries per second"] for line in lines if "queries per second" in line]
    return statistics.median(found or [math.nan])


def run(dataset: str, model: str, seed: int, more: list[str], out: Path) -> dict:
    """Train, unless that was done; raises InputError where it fails."""
    name, _, path = dataset.partition(":")
    flags = [f"--dataset={name}", f"--dataset_path={path}", f"--model={model}", f"--seed={seed}", *more]
    folder = out / f"{Path(path).name}_{model}_{seed}_{hashlib.sha256(repr(flags).encode()).hexdigest()[:12]}"
    if not (result := results_of(folder)):
        folder.mkdir(parents=True, exist_ok=True)
        print("main.py", *flags, file=sys.stderr, flush=True)
        command = [sys.executable, "-W", "ignore", ROOT / "main.py", *flags, f"--log_dir={folder}", "--resume=auto"]
        if subprocess.run(command, stdout=subprocess.DEVNULL).returncode or not (result := results_of(folder)):
            raise InputError(f"the run in {folder} did not end; what it said stands above")
    return result


def rows(dataset: str, model: str, results: list[dict]) -> Iterator[str]:
    """A line for each split that is tested, but for the train split."""
    for split in results[0]["splits"]:
        if split == "train":
            continue
        cells, tests = [], [result["splits"][split] for result in results]
        metric = next(metric for metric in METRICS if f"recall_top10_{metric}" in tests[0])
        for k in KS:
            if (name := f"recall_top{k}_{metric}") not in tests[0]:
                cells.append("")
                continue
            values = [100 * test[name] for test in tests]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        ms, weights = statistics.median(result["ms"] for result in results), results[0]["weights"]
        yield f"| {Path(dataset).name} {split} | {model} | {' | '.join(cells)} | {ms:.1f} | {weights / 1e6:.1f} M |"


def main() -> int:
    parser = Parser(prog="compare.py", description=__doc__.split("\n")[0], usage="%(prog)s --on DATASET:DIR ... "
                    "[--models NAME ...] [--seeds N ...] [--out DIR] -- [main.py's flags]")
    parser.add_argument("--on", nargs="+", required=True, metavar="DATASET:DIR", help=f"of {', '.join(DATASETS)}")
    parser.add_argument("--models", nargs="+", default=list(OF_TRIPLETS),
                        metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("logs/compare"), help="folder of the runs")
    words = sys.argv[1:]
    mine, more = (words[:words.index("--")], words[words.index("--") + 1:]) if "--" in words else (words, [])
    args = parser.parse_args(mine)
    print("| data | composer |", " | ".join(f"R@{k}" for k in KS), "| ms | weights |\n|" + " --- |" * (len(KS) + 4))
    try:
        for dataset in args.on:
            for model in args.models:
                results = [run(dataset, model, seed, more, args.out) for seed in args.seeds]
                print(*rows(dataset, model, results), sep="\n", flush=True)
    except (InputError, OSError) as error:
        print(f"compare.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
