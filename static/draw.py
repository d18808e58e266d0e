"""Draw the README's two pictures: the architecture, and what a trained toy model finds.

    python static/draw.py --model_checkpoint logs/RUN/latest_checkpoint.pth --dataset_path data/toy/mitstates
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from datasets import MITStates
from flags import Parser
from machine.image_store import ImageStore
from searching.from_checkpoint import CheckpointEncoder
from test_retrieval import compose_queries, encode_images
from training.pictures import GREEN, INK, PAPER, QUIET, RED, QueryResults, font, sheet

IMAGE_HUE, TEXT_HUE, BOTH_HUE = "#dbe9fb", "#fdebd0", "#e3f5e1"
RESULTS = 6


@torch.no_grad()
def sample(model, path: Path, rows: int, size: int) -> Image.Image:
    """Random test queries, one a noun: source image, text, the first results framed by right and wrong."""
    data = MITStates(path, "test")
    features, queries = encode(model, data, size), one_query_a_noun(data, rows)
    sources, texts = [query.source for query in queries], [query.text for query in queries]
    asked = compose_queries(model, features, torch.tensor(sources), texts)     # (rows, D)
    scores = asked @ F.normalize(features, dim=1).T                             # (rows, N)
    scores[torch.arange(len(queries)), sources] = -torch.inf
    best = scores.topk(RESULTS, dim=1).indices.tolist()

    def picture(image: int) -> Image.Image:
        with Image.open(data.paths[image]) as opened:
            return opened.convert("RGB")
    return sheet([QueryResults(picture(query.source), f"+ {query.text}", [picture(image) for image in found],
                               [data.captions[image] == data.captions[query.target] for image in found])
                  for query, found in zip(queries, best, strict=True)], tile=128)


def encode(model, data: MITStates, size: int) -> torch.Tensor:
    store = ImageStore(data.paths, size, resampling=model.traits.resampling)
    return encode_images(model, store, np.arange(len(data.images)), 64, 2)


def one_query_a_noun(data: MITStates, rows: int) -> list:
    """Drawn by a fixed seed, not chosen."""
    rng, chosen = np.random.default_rng(0), {}
    for i in rng.permutation(len(data.test_queries)):
        query = data.test_queries[i]
        chosen.setdefault(data.captions[query.source].partition(" ")[2], query)
    return list(chosen.values())[:rows]


def architecture() -> Image.Image:
    """TransformerAE from left to right, at twice the size for sharp screens."""
    picture = Image.new("RGB", (1960, 900), PAPER)
    draw = ImageDraw.Draw(picture)

    def box(x: int, y: int, width: int, title: str, detail: str, hue: str, height: int = 110) -> None:
        draw.rounded_rectangle((x, y, x + width, y + height), 14, hue, INK, 2)
        draw.text((x + width / 2, y + height / 2 - 15), title, INK, font(27), anchor="mm")
        draw.text((x + width / 2, y + height / 2 + 20), detail, QUIET, font(20), anchor="mm")

    def arrow(*points: tuple[int, int], hue: str = INK) -> None:
        draw.line(points, hue, 3, joint="curve")
        (x0, y0), (x, y) = points[-2:]
        along = np.array([x - x0, y - y0]) / np.hypot(x - x0, y - y0)
        across = np.array([-along[1], along[0]])
        tip = np.array([x, y])
        draw.polygon([tuple(tip), tuple(tip - 14 * along + 7 * across), tuple(tip - 14 * along - 7 * across)], hue)

    box(40, 120, 230, "source image", "S x S pixels", IMAGE_HUE)
    box(330, 120, 250, "image encoder", "feature z, D", IMAGE_HUE)
    box(40, 370, 230, "text", "what should change", TEXT_HUE)
    box(330, 370, 250, "text encoder", "feature q, T", TEXT_HUE)
    box(40, 620, 230, "target image", "in training", IMAGE_HUE)
    box(330, 620, 250, "image encoder", "the same", IMAGE_HUE)
    box(720, 120, 420, "TIRG", "sigmoid(gate(z, q)) z + 10 residual(z, q)", BOTH_HUE)
    box(720, 370, 420, "the source, changed", "z + 0.3 MLP(z, q), whose last layer starts at 0", BOTH_HUE)
    box(720, 620, 420, "transformer layer", "source and target as two tokens", BOTH_HUE)
    box(1250, 245, 280, "query", "the two unit vectors' sum", BOTH_HUE)
    box(1640, 245, 280, "gallery", "nearest by cosine", IMAGE_HUE)
    box(1250, 620, 280, "told text", "must be the batch's q", TEXT_HUE)
    for y in (175, 425, 675):
        arrow((270, y), (328, y))
    arrow((580, 175), (718, 175))
    arrow((620, 175), (620, 400), (718, 400))
    arrow((580, 425), (660, 425), (660, 450), (718, 450))
    arrow((660, 425), (660, 205), (718, 205))
    arrow((620, 400), (620, 650), (718, 650))
    arrow((580, 690), (718, 690))
    for y in (175, 425):
        arrow((1140, y), (1195, y), (1195, 300), (1248, 300))
    arrow((1530, 300), (1638, 300), hue=GREEN)
    arrow((1140, 675), (1248, 675))
    draw.text((1390, 400), "metric loss with the target", GREEN, font(22), anchor="mm")
    draw.text((1390, 775), "cross entropy over the batch's texts, until p = 1/2", RED, font(22), anchor="mm")
    draw.text((40, 40), "TransformerAE: TIRG's direction plus that of the changed source; the text has to be told from "
              "two images", INK, font(34), anchor="lm")
    draw.text((40, 850), "The upper path learns what is asked for; the lower one stays near the source, which unseen "
              "things profit from. The transformer works in training alone.", QUIET, font(24), anchor="lm")
    return picture


def run() -> None:
    parser = Parser(prog="draw.py", description=__doc__.split("\n")[0])
    parser.add_argument("--model_checkpoint", required=True, help="of a run on the toy MIT-States")
    parser.add_argument("--dataset_path", default=str(ROOT / "data" / "toy" / "mitstates"), help="the toy MIT-States")
    parser.add_argument("--rows", type=int, default=6, help="queries shown")
    parser.add_argument("--out", type=Path, default=ROOT / "static" / "images", help="folder for the two pictures")
    args = parser.parse_args()
    architecture().save(args.out / "model_en.png", optimize=True)
    encoder = CheckpointEncoder(Path(args.model_checkpoint), torch.device("cpu"))
    sample(encoder.model, Path(args.dataset_path), args.rows, encoder.size).save(args.out / "sample.png", optimize=True)


if __name__ == "__main__":
    run()
