"""Draw the README's two pictures: the architecture, and what a trained toy model finds.

    python static/draw.py --model_checkpoint logs/RUN/latest_checkpoint.pth --dataset_path data/toy/mitstates
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from datasets import MITStates
from machine.image_store import ImageStore
from pictures import GREEN, INK, PAPER, QUIET, RED, Answer, font, sheet
from searching.gallery import Encoder
from test_retrieval import compose_queries, encode_images

IMAGE_HUE, TEXT_HUE, BOTH_HUE = "#dbe9fb", "#fdebd0", "#e3f5e1"
RESULTS = 6


@torch.no_grad()
def sample(model, path: Path, rows: int, size: int) -> Image.Image:
    """Random test queries, one a noun: source image, text, the first results framed by right and wrong."""
    data = MITStates(path, "test")
    features, queries = encode(model, data, size), one_query_a_noun(data, rows)
    sources, texts = [query.source for query in queries], [query.text for query in queries]
    scores = compose_queries(model, features[sources], texts) @ F.normalize(features, dim=1).T  # (rows, N)
    scores[torch.arange(len(queries)), sources] = -torch.inf
    best = scores.topk(RESULTS, dim=1).indices.tolist()

    def picture(image: int) -> Image.Image:
        with Image.open(data.paths[image]) as opened:
            return opened.convert("RGB")
    return sheet([Answer(picture(query.source), f"+ {query.text}", [picture(image) for image in found],
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
    """ComposeAE from left to right, at twice the size for sharp screens."""
    picture = Image.new("RGB", (1960, 860), PAPER)
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

    box(40, 120, 230, "source image", "3 x 224 x 224", IMAGE_HUE)
    box(330, 120, 250, "ResNet-18", "image feature z, 512", IMAGE_HUE)
    box(40, 370, 230, "text", "what should change", TEXT_HUE)
    box(330, 370, 250, "LSTM or BERT", "text feature q, 512 or 768", TEXT_HUE)
    box(660, 245, 320, "complex projection", "v = f(z), angle d = g(q)", BOTH_HUE)
    draw.text((820, 385), "v cos d + i v sin d", INK, font(24), anchor="mm")
    box(1060, 150, 250, "rho", "MLP on re, im", BOTH_HUE)
    box(1060, 340, 250, "rho conv", "conv over 5 channels", BOTH_HUE)
    box(1400, 245, 240, "composed", "10 rho + 1 rho conv", BOTH_HUE)
    box(1400, 620, 240, "target image", "the same ResNet-18", IMAGE_HUE)
    box(1720, 120, 200, "image decoder", "back to z", IMAGE_HUE)
    box(1720, 370, 200, "text decoder", "back to q", TEXT_HUE)
    for y in (175, 425):
        arrow((270, y), (328, y))
        arrow((580, y), (620, y), (620, 300), (658, 300))
    arrow((980, 280), (1020, 280), (1020, 205), (1058, 205))
    arrow((980, 320), (1020, 320), (1020, 395), (1058, 395))
    for y in (205, 395):
        arrow((1310, y), (1355, y), (1355, 300), (1398, 300))
    for y in (175, 425):
        arrow((1640, 300), (1680, 300), (1680, y), (1718, y))
    arrow((1520, 357), (1520, 618), hue=GREEN)
    draw.text((1536, 480), "metric loss", GREEN, font(24), anchor="lm")
    arrow((1398, 675), (820, 675), (820, 410), hue=RED)
    draw.text((1010, 705), "rotational symmetry: the target turned back by -d must meet the source", RED, font(22),
              anchor="mm")
    draw.text((40, 40), "ComposeAE: text as a rotation of the image in complex space", INK, font(34), anchor="lm")
    draw.text((40, 800), "TIRG replaces the middle by sigmoid(gate) * z + 10 * residual; RealSpaceConcatAE by "
              "rho and rho conv on the concatenated z, q.", QUIET, font(22), anchor="lm")
    return picture


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model_checkpoint", required=True, help="of a run on the toy MIT-States")
    parser.add_argument("--dataset_path", default=str(ROOT / "data" / "toy" / "mitstates"), help="the toy MIT-States")
    parser.add_argument("--rows", type=int, default=6, help="queries shown")
    parser.add_argument("--out", type=Path, default=ROOT / "static" / "images", help="folder for the two pictures")
    args = parser.parse_args()
    architecture().save(args.out / "model_en.png", optimize=True)
    encoder = Encoder(Path(args.model_checkpoint), torch.device("cpu"))
    sample(encoder.model, Path(args.dataset_path), args.rows, encoder.size).save(args.out / "sample.png", optimize=True)


if __name__ == "__main__":
    run()
