"""What each process of a job does for test_distributed.py; called in one process it gives what they are compared with.

    torchrun --nproc_per_node=2 -m tests.together TREES OUT
"""

import sys
from pathlib import Path

import torch

import test_retrieval
from datasets import DATASETS
from img_text_composition_models import MODELS, OF_TRIPLETS
from machine import distributed, image_store
from machine.device import set_up
from text_model import SimpleVocab
from torch_function import LOSSES
from training import loop

CPU = torch.device("cpu")
CLASSIFICATION = "batch_based_classification"                                   # draws no random numbers
ONE, EACH = [("composeAE", CLASSIFICATION)], [(name, CLASSIFICATION) for name in OF_TRIPLETS]
KINDS = [*EACH, *(("composeAE", loss) for loss in LOSSES if loss != CLASSIFICATION)]    # each composer, and each loss


def a_model(name, data):
    torch.manual_seed(3)
    return MODELS[name](SimpleVocab.from_texts(data.training_texts()), 24, 16, encoder="mobilenet_v3_small",
                        image_size=32)


def exact(model):
    """In float64 and with batch norm's statistics held fixed: what several processes add up in another order then
    differs by far less than anything that could be wrong."""
    model.img_model.register_forward_pre_hook(lambda _, pixels: (pixels[0].double(),))
    return model.double().eval()


def open_split(trees, name, split, cache=None):
    data = DATASETS[name](trees / name, split)
    return loop.Split(data, image_store.ImageStore(data.paths, 32, cache))


def steps(trees, gather=True, parts=1, kinds=KINDS):
    """For composers and losses the losses, gradients and weights of one step, batch norm's statistics held fixed; and
    the samples it was made on."""
    split = open_split(trees, "mitstates", "train")
    batch = next(loop.batches(split, 5, 0, 8, 0, CPU, parts=parts))
    found = {"samples": [(text, part.source[i], part.target[i])
                         for part in batch for i, text in enumerate(part.texts)]}
    for name, loss in kinds:
        model = exact(a_model(name, split.data))
        optimizer = loop.make_optimizer(model, 0.1, 1e-3)
        torch.manual_seed(7 + 100 * distributed.rank())                         # of the negatives: the first's count
        found_losses = loop.train_step(distributed.averaging(model, False), optimizer, loss, batch, gather)
        found[name, loss] = {
            "losses": found_losses, "weights": model.state_dict(),
            "gradients": {key: weight.grad for key, weight in model.named_parameters()}}
    return found


def tests(trees, cache):
    """Metrics on each benchmark's splits, in batches so small that every process has some; how many images were
    decoded, and how often a composed query was made, in all processes together."""
    sizes = test_retrieval.QUERIES_AT_ONCE, test_retrieval.COMPOSED_AT_ONCE
    test_retrieval.QUERIES_AT_ONCE, test_retrieval.COMPOSED_AT_ONCE = {"cpu": 3}, {"cpu": 2}
    decoded, composed = [], []
    decode, compose = image_store.decode, MODELS["composeAE"].composed
    image_store.decode = lambda path, *size, **told: decoded.append(path) or decode(path, *size, **told)
    MODELS["composeAE"].composed = lambda model, *parts: composed.append(len(parts[0])) or compose(model, *parts)
    try:
        found = {}
        for name in sorted(tree.name for tree in trees.iterdir()):
            for split in ("train", "test"):
                opened = open_split(trees, name, split, cache / name)
                watched = []
                metrics = test_retrieval.evaluate(a_model("composeAE", opened.data), opened.data, opened.store, 2, 1,
                                                  baselines=True, watch=lambda *seen, into=watched: into.append(seen))
                found[name, split] = metrics
                found[name, split, "ranks"] = [[rank.tolist() for rank in ranks] for *_, ranks in watched]
                found[name, split, "queries"] = [queries for _, _, queries, *_ in watched]
    finally:
        image_store.decode, MODELS["composeAE"].composed = decode, compose
        test_retrieval.QUERIES_AT_ONCE, test_retrieval.COMPOSED_AT_ONCE = sizes
    everyone = distributed.union({distributed.rank(): (decoded, sum(composed))})
    found["decoded"] = sorted(path for paths, _ in everyone.values() for path in paths)
    found["composed"] = [count for _, count in everyone.values()]
    return found


def threads():
    """How many the process computes with, as main.py sets them."""
    set_up(CPU, "fp32", distributed.local_world())
    return torch.get_num_threads()


if __name__ == "__main__":
    trees, out = Path(sys.argv[1]), Path(sys.argv[2])
    with distributed.job(CPU):
        found = {"threads": threads()}
        torch.set_num_threads(1)
        found |= {"steps": steps(trees), "apart": steps(trees, gather=False, kinds=ONE),
                  "tests": tests(trees, out / "cache")}
    torch.save(found, out / f"{distributed.rank()}.pt")
