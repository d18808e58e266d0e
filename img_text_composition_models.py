"""The composers: (source image, text) -> one vector near the target image's; and the record of what a model is made of.

Sizes are letters: B rows, D image feature size (image_dim), T text feature size (text_dim).
Module names are those of the original release, so that its checkpoints load.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from image_encoders import ImageSide, image_encoder, load_image_weights, traits
from machine.device import send
from machine.pooled_convolution import in_one_pass, pooled_convolution
from machine.progress import no_progress
from text_model import LearnedWords, SimpleVocab, TextLSTMModel
from torch_function import ByCosine, NormalizationLayer
from zero_shot import simple
from zero_shot.basic import BASIC
from zero_shot.lincir import LinCIR
from zero_shot.pic2word import Pic2Word

SentenceVectors = Callable[[list[str]], Tensor]


class Layers(nn.Sequential):
    """(B, size_in) -> (B, size_out). Or of P batches, (P, B, size_in): as one after the other, for batch norm takes
    each by itself; but a linear layer reads its weights once, and their gradients need no adding up."""

    def forward(self, rows: Tensor) -> Tensor:
        for layer in self:
            by_itself = rows.ndim == 3 and isinstance(layer, nn.modules.batchnorm._BatchNorm)
            rows = torch.stack([*map(layer, rows)]) if by_itself else layer(rows)
        return rows


def mlp(size_in: int, hidden: int, size_out: int) -> Layers:
    """Batch norm, ReLU, linear, ReLU, linear: the shape of every mapping and decoder here."""
    return Layers(nn.BatchNorm1d(size_in), nn.ReLU(), nn.Linear(size_in, hidden),
                  nn.ReLU(), nn.Linear(hidden, size_out))


class Concat(nn.Module):
    """[(B, D), (B, T)] -> (B, D + T)."""

    def forward(self, parts: list[Tensor]) -> Tensor:
        return torch.cat(parts, dim=1)


class Fusion(nn.Sequential):
    """Layers of [(B, D), (B, T)] that begin with Concat, batch norm, ReLU and Linear."""

    def of_pairs(self, images: Tensor, texts: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """(N, D), (M, T) -> a function of rows of the two, (B,) each, that gives what these layers give, in eval mode.

        Image and text do not meet before the linear layer's sum, so until then each is taken once, not once a pair.
        """
        norm, relu, linear = self[1:4]

        def part(values: Tensor, at: slice) -> Tensor:                          # (N, size of `at`) -> (N, hidden)
            normed = F.batch_norm(values, norm.running_mean[at], norm.running_var[at], norm.weight[at], norm.bias[at],
                                  eps=norm.eps)
            return relu(normed) @ linear.weight[:, at].T
        size, further = images.shape[1], self[4:]
        of_image, of_text = part(images, slice(size)), part(texts, slice(size, None)) + linear.bias
        parts = torch.cat([of_image, of_text])                                  # (N + M, hidden)

        def of_rows(image: Tensor, text: Tensor) -> Tensor:
            pairs = torch.stack([image, text + len(images)], dim=1)             # (B, 2): the parts to be added up
            return further(F.embedding_bag(pairs, parts, mode="sum"))           # in one pass over memory
        return of_rows


class ImgTextCompositionBase(ImageSide, ByCosine):
    """Encoders, feature normalization and the training forward that all composers share.

    vocabulary: of the LSTM. sentence_vectors: texts -> (B, T) without gradient; where given, they are used in place
    of the LSTM, which is still built (at size T) because the original's checkpoints hold it.
    encoder: a name that image_encoders.py knows; image_size: S, which some of them are built for; image_features: what
    its last layer is given, of FEATURES there.
    learn_words: whether words that learn are read beside the sentence vectors; T is then of the two together.
    example_texts: some that it is trained with, for whoever searches with it.
    """

    is_of_vectors = True                # whether it composes of nothing but an image's and a text's vector
    learns_from = "triplets"            # what kind of dataset it is trained on
    betas, eps = (0.9, 0.999), 1e-8     # of AdamW
    about = ""                          # what a test says of it, where its name does not
    example_texts: Sequence[str] = ()
    recipe: "Recipe"                                                            # as `Recipe.build` made it

    def __init__(self, vocabulary: SimpleVocab, image_dim: int = 512, text_dim: int = 512,
                 sentence_vectors: SentenceVectors | None = None, encoder: str = "resnet18", image_size: int = 224,
                 image_features: str = "last", learn_words: bool = False):
        super().__init__()
        self.image_dim, self.sentence_vectors = image_dim, sentence_vectors
        self.normalization_layer = NormalizationLayer()
        self.img_model = image_encoder(encoder, image_dim, image_size, image_features)
        self.traits = traits(encoder, image_features)
        self.text_model = TextLSTMModel(vocabulary, text_dim).requires_grad_(sentence_vectors is None)
        self.learned_words = LearnedWords(vocabulary) if learn_words else None
        self.text_dim = text_dim + (LearnedWords.size if learn_words else 0)
        self.a = nn.Parameter(torch.tensor([1.0, 10.0, 1.0, 1.0]))              # weights of a composer's two branches

    @classmethod
    def of(cls, recipe: "Recipe", sentence_vectors: SentenceVectors | None) -> "ImgTextCompositionBase":
        """Of a record, with random weights."""
        return cls(SimpleVocab(recipe.words), recipe.image_dim, recipe.text_dim, sentence_vectors,
                   recipe.image_encoder, recipe.image_size, recipe.image_features, recipe.learn_words)

    def load_weights(self, weights: str, progress: Callable = no_progress) -> None:
        """To start from: as `load_image_weights` takes them."""
        load_image_weights(self.img_model, weights, self.recipe.image_encoder)

    @property
    def vocabulary(self) -> SimpleVocab | None:
        """All words that it can read; None where it can read any."""
        return self.text_model.vocabulary if self.sentence_vectors is None else None

    def watched(self) -> dict[str, float]:
        """What is worth watching in training beside the losses."""
        return {"scale": self.normalization_layer.norm_s.item(),
                **{f"a {i}": value for i, value in enumerate(self.a.tolist())}}

    def parameter_groups(self, rate: float) -> list[dict]:
        """Every weight in one of three groups: the encoder's new last layer, its pretrained rest (0.1 x), all others.
        """
        def group(name: str) -> str:
            if name.startswith(f"img_model.{self.traits.head}."):
                return "head"
            return "backbone" if name.startswith("img_model.") else "rest"
        named = list(self.named_parameters())
        return [{"params": [weight for name, weight in named if group(name) == key], "lr": factor * rate}
                for key, factor in (("head", 1.0), ("backbone", 0.1), ("rest", 1.0))]

    def encode_images(self, source: Tensor, target: Tensor) -> Sequence[Tensor]:
        """Both as `encode_image`, one after the other, for batch norm sees each apart; but what is left of a frozen
        encoder, a linear layer, takes them at once."""
        if source.ndim == 2:
            return self.encode_image(torch.cat([source, target])).chunk(2)
        return self.encode_image(source), self.encode_image(target)

    def freeze_backbone(self) -> None:
        """Of the image encoder only the last layer learns."""
        self.img_model.requires_grad_(False)
        self.last_layer.requires_grad_(True)

    def encode_text(self, texts: list[str]) -> Tensor:
        """B texts -> (B, T)."""
        if self.sentence_vectors is None:
            return self.text_model(texts)
        vectors = send(self.sentence_vectors(texts), self.a.device)
        if self.learned_words is None:
            return vectors
        return torch.cat([vectors, self.learned_words(send(self.learned_words.ids(texts), self.a.device))], dim=1)

    def compose(self, image: Tensor, text: Tensor) -> Tensor:
        """(B, D), (B, T) -> (B, D): where in image-feature space the query points."""
        raise NotImplementedError

    def forward(self, source: Tensor, texts: list[str], target: Tensor) -> dict[str, Tensor]:
        """Features by name, as `composition_losses` reads them: query and target, (B, D), normalized and scaled."""
        return self.features(self.normalized(source), self.encode_text(texts), self.normalized(target))

    def features(self, source: Tensor, text: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The same of normalized images and encoded texts, (B, T): tensors alone, so this is what can be compiled."""
        with self.rounding(source.device):
            image, target = self.encode_images(source, target)                  # (B, D) each
        return {**self.compositions(image, text, target), "target": self.normalization_layer(target)}

    def compositions(self, image: Tensor, text: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The query, and what the composer's own loss terms compare, of (B, D), (B, T) and the target's (B, D)."""
        composed = self.compose(image, text)                                    # (B, D)
        return {"query": self.normalization_layer(composed), **self.further_features(image, text, composed, target)}

    def further_features(self, image: Tensor, text: Tensor, composed: Tensor, target: Tensor) -> dict[str, Tensor]:
        """What the composer's own loss terms compare; none here."""
        return {}


class Part(nn.Module):
    """What one of a model's methods computes of tensors, as a module of its own, to be traced or exported."""

    def __init__(self, model: ImgTextCompositionBase, method: str):
        super().__init__()
        self.model, self.method = model, method

    def forward(self, *inputs: Tensor) -> Tensor:
        return getattr(self.model, self.method)(*inputs)


class TIRG(ImgTextCompositionBase):
    """Text Image Residual Gating (arXiv 1812.07119, section 3.2): a gated image plus a residual."""

    def __init__(self, *args, **sizes):
        super().__init__(*args, **sizes)
        both = self.image_dim + self.text_dim
        self.gated_feature_composer = Fusion(Concat(), nn.BatchNorm1d(both), nn.ReLU(), nn.Linear(both, self.image_dim))
        self.res_info_composer = Fusion(Concat(), *mlp(both, both, self.image_dim))

    def fusions(self) -> list[Fusion]:
        """All through which a text comes in; `composed` takes what they give, (B, D) each, in this order."""
        return [self.gated_feature_composer, self.res_info_composer]

    def composed(self, image: Tensor, gate: Tensor, residual: Tensor) -> Tensor:    # (B, D) each -> (B, D)
        return torch.sigmoid(gate) * image * self.a[0] + residual * self.a[1]

    def compose(self, image: Tensor, text: Tensor) -> Tensor:
        return self.composed(image, *(fusion([image, text]) for fusion in self.fusions()))

    def compose_pairs(self, images: Tensor, texts: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """(N, D), (M, T) -> what composes rows of the two, (B,) each: (B, D), as `compose` but for rounding. In eval
        mode: for many pairs of few images and texts."""
        fusions = [fusion.of_pairs(images, texts) for fusion in self.fusions()]
        return lambda image, text: self.composed(images[image], *(fusion(image, text) for fusion in fusions))


class ComplexProjection(nn.Module):
    """Image and text into complex space, the text as a rotation (ComposeAE eq. 2 to 4): v * exp(+-i delta)."""

    def __init__(self, image_dim: int, text_dim: int):
        super().__init__()
        self.bert_features = Layers(nn.BatchNorm1d(text_dim), nn.Linear(text_dim, image_dim),
                                    nn.ReLU(), nn.Linear(image_dim, image_dim))
        self.image_features = Layers(nn.BatchNorm1d(image_dim), nn.Linear(image_dim, image_dim),
                                     nn.Dropout(0.5), nn.ReLU(), nn.Linear(image_dim, image_dim))

    def kept(self, images: Tensor) -> Tensor:
        """What dropout multiplies the hidden layer of images by, drawn now: of their shape."""
        return self.image_features[2](torch.ones_like(images))

    def forward(self, image: Tensor, text: Tensor, sign: float | Tensor, kept: Tensor) -> list[Tensor]:
        """(P, B, D), (B, T) -> v, delta, the raw image feature, real and imaginary part: (P, B, D) each."""
        hidden = self.image_features[:2](image) * kept
        for _ in image[1:]:
            self.bert_features[0](text)                                         # its running statistics: once a batch
        return self.rotated(self.image_features[3:](hidden), self.bert_features(text), image, sign)

    def rotated(self, magnitude: Tensor, angle: Tensor, image: Tensor, sign: float | Tensor = 1.0) -> list[Tensor]:
        real, imaginary = magnitude * angle.cos(), sign * magnitude * angle.sin()
        return [magnitude, angle.expand_as(magnitude), image, real, imaginary]

    def of_pairs(self, images: Tensor, texts: Tensor) -> Callable[[Tensor, Tensor], list[Tensor]]:
        """(N, D), (M, T) -> a function of rows of the two, (B,) each, that gives what `forward` gives, in eval mode."""
        magnitudes, angles = self.image_features(images), self.bert_features(texts)
        return lambda image, text: self.rotated(magnitudes[image], angles[text], images[image])


class LinearMapping(nn.Module):
    """The paper's rho: (..., B, size_in) -> (..., B, D)."""

    def __init__(self, size_in: int, image_dim: int):
        super().__init__()
        self.mapping = mlp(size_in, image_dim, image_dim)

    def forward(self, features: Tensor) -> Tensor:
        return self.mapping(features)


class ConvMapping(nn.Module):
    """The paper's rho_conv: a convolution along the feature axis, pooled to about `size_in` values, then a mapping."""

    def __init__(self, channels: int, size_in: int, image_dim: int, conv_name: str, filters: int = 64):
        super().__init__()
        windows = max(1, size_in // filters)                                    # 16 for 2 * 512, 20 for 512 + 768
        self.conv_name = conv_name                                              # the original's two releases of a name
        self.add_module(conv_name, nn.Conv1d(channels, filters, kernel_size=3, padding=1))
        self.pool = nn.AdaptiveMaxPool1d(windows)
        self.mapping = mlp(filters * windows, image_dim, image_dim)

    def forward(self, features: Tensor) -> Tensor:                              # (..., B, channels, length)
        conv, windows, rows = getattr(self, self.conv_name), self.pool.output_size, features.flatten(0, -3)
        if in_one_pass(rows, windows):
            pooled = pooled_convolution(rows, conv.weight, conv.bias, windows)  # (P * B, 64, windows)
        else:
            pooled = self.pool(conv(rows))
        return self.mapping(pooled.reshape(*features.shape[:-2], -1))           # (..., B, D)


class AutoencoderComposition(ImgTextCompositionBase):
    """Two encoders, weighted by `a`, and two decoders that give image and text back from the composition."""

    def __init__(self, *args, **sizes):
        super().__init__(*args, **sizes)
        self.decoder = mlp(self.image_dim, self.image_dim, self.image_dim)
        self.txtdecoder = mlp(self.image_dim, self.text_dim, self.text_dim)

    def further_features(self, image: Tensor, text: Tensor, composed: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"decoded_image": self.decoder(composed), "image": image,
                "decoded_text": self.txtdecoder(composed), "text": text}


class ComposeAE(AutoencoderComposition):
    """ComposeAE (arXiv 2006.11149, section 3): composition in complex space with rotational symmetry."""

    def __init__(self, *args, **sizes):
        super().__init__(*args, **sizes)
        dim, text_dim = self.image_dim, self.text_dim
        self.encoderLinear = nn.Sequential(ComplexProjection(dim, text_dim), LinearMapping(2 * dim, dim))
        self.encoderWithConv = nn.Sequential(ComplexProjection(dim, text_dim), ConvMapping(5, 2 * dim, dim, "conv"))

    def compose(self, image: Tensor, text: Tensor, sign: float | Tensor = 1.0) -> Tensor:
        """(B, D), (B, T) -> (B, D). Or of P batches with one text, (P, B, D), as in turn; sign: (P, 1, 1)."""
        projections, batches = self.projections(), image if image.ndim == 3 else image[None]    # (P, B, D)
        # In the original's order: of a batch for both projections, then of the next.
        drawn = [[project.kept(batch) for project in projections] for batch in batches]
        kept = [torch.stack(each) for each in zip(*drawn, strict=True)]         # (P, B, D) each
        return self.composed(*(project(batches, text, sign, own)
                               for project, own in zip(projections, kept, strict=True))).view_as(image)

    def projections(self) -> list[ComplexProjection]:
        """One for each mapping, not shared."""
        return [self.encoderLinear[0], self.encoderWithConv[0]]

    def composed(self, projected: list[Tensor], projected_conv: list[Tensor]) -> Tensor:    # (..., B, D)
        rho, rho_conv = self.encoderLinear[1], self.encoderWithConv[1]
        complex_parts, signals = torch.cat(projected[3:], -1), torch.stack(projected_conv, -2)
        return rho(complex_parts) * self.a[1] + rho_conv(signals) * self.a[0]   # of (..., B, 2 D), (..., B, 5, D)

    def compose_pairs(self, images: Tensor, texts: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """As TIRG's."""
        projections = [project.of_pairs(images, texts) for project in self.projections()]
        return lambda image, text: self.composed(*(project(image, text) for project in projections))

    def compositions(self, image: Tensor, text: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Also the target turned back by the same text, which should land on the source (rotational symmetry)."""
        back_too = torch.linspace(1, -1, 2, device=image.device)[:, None, None]     # signs, without waiting for a GPU
        composed, rotated_back = self.compose(torch.stack([image, target]), text, back_too)
        return {"query": self.normalization_layer(composed), **self.further_features(image, text, composed, target),
                "rotated_back": self.normalization_layer(rotated_back), "source": self.normalization_layer(image)}


class RealSpaceConcatAE(AutoencoderComposition):
    """The paper's ablation 'concatenation in real space': the same encoders and decoders without the rotation."""

    def __init__(self, *args, **sizes):
        super().__init__(*args, **sizes)
        both = self.image_dim + self.text_dim
        self.encoderLinear = nn.Sequential(Concat(), LinearMapping(both, self.image_dim))
        self.encoderWithConv = nn.Sequential(Concat(), ConvMapping(1, both, self.image_dim, "conv1"))

    def compose(self, image: Tensor, text: Tensor) -> Tensor:
        concat, rho_conv = self.encoderWithConv
        convolved = rho_conv(concat([image, text])[:, None])                    # (B, 1, D + T) -> (B, D)
        return self.encoderLinear([image, text]) * self.a[1] + convolved * self.a[0]


class TextPredictor(nn.Module):
    """Tells the text from the two images that it lies between: a transformer layer over two tokens, from unit vectors.
    (B, D) twice -> (B, T)."""

    def __init__(self, image_dim: int, text_dim: int, width: int = 256, heads: int = 4):
        super().__init__()
        self.tokens = nn.Linear(image_dim, width)
        self.places = nn.Parameter(0.02 * torch.randn(2, width))                # which of the two is the source
        self.layer = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0.0, activation="gelu",
                                                batch_first=True, norm_first=True)
        self.text = nn.Sequential(nn.LayerNorm(width), nn.Flatten(), nn.Linear(2 * width, text_dim))

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        pair = F.normalize(torch.stack([source, target], dim=1), dim=2) * source.shape[1] ** 0.5    # (B, 2, D)
        return self.text(self.layer(self.tokens(pair) + self.places))           # (B, 2, width) -> (B, T)


class TransformerAE(TIRG):
    """Ours: TIRG's composition beside the image with a change of its own, and a transformer that gives the text back.

    The query is the sum of two unit vectors. TIRG's soon learns what the text asks for. The other starts as the source
    image itself, by a last layer of zeros, and stays near it, as its change counts 0.3 times and so learns slowly: that
    is what unseen things profit from. In training a transformer has to tell the text from (source, target), so that the
    image features keep what texts speak of.
    docs/experiments.md has what was tried before, docs/results.md what it gives.
    """

    def __init__(self, *args, **sizes):
        super().__init__(*args, **sizes)
        both = self.image_dim + self.text_dim
        self.change = Fusion(Concat(), *mlp(both, both, self.image_dim))
        nn.init.zeros_(self.change[-1].weight)
        nn.init.zeros_(self.change[-1].bias)
        with torch.no_grad():
            self.a[2] = 0.3
        self.change_reader = TextPredictor(self.image_dim, self.text_dim)

    def fusions(self) -> list[Fusion]:
        return [*super().fusions(), self.change]

    def composed(self, image: Tensor, gate: Tensor, residual: Tensor, change: Tensor) -> Tensor:   # (B, D) each
        slowly = self.a[2].detach()                                             # 1 in checkpoints of before it was 0.3
        modified, near = super().composed(image, gate, residual), image + slowly * change              # (B, D), (B, D)
        return F.normalize(modified, dim=1) + F.normalize(near, dim=1)

    def forward(self, source: Tensor, texts: list[str], target: Tensor) -> dict[str, Tensor]:
        """Also "text_labels": (B,) ints, equal for equal texts, in every process."""
        text_labels = torch.tensor([zlib.crc32(text.encode("utf-8", "surrogatepass")) for text in texts])
        return {**super().forward(source, texts, target), "text_labels": send(text_labels, self.a.device)}

    def further_features(self, image: Tensor, text: Tensor, composed: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"text_prediction": self.change_reader(image, target), "text": text}


MODELS = {"tirg": TIRG, "composeAE": ComposeAE, "RealSpaceConcatAE": RealSpaceConcatAE, "TransformerAE": TransformerAE,
          "image": simple.ImageAlone, "text": simple.TextAlone, "sum": simple.Sum, "product": simple.Product,
          "Pic2Word": Pic2Word, "LinCIR": LinCIR, "BASIC": BASIC}
OF_TRIPLETS = {name: kind for name, kind in MODELS.items() if kind.learns_from == "triplets"}


@dataclass(frozen=True)
class Recipe:
    """What a model is made of, in plain values: made of the flags once, kept in its checkpoints, and all that building
    it needs.

    composer: of MODELS. image_encoder: as image_encoders.py names them. image_size: S in pixels. image_dim, text_dim:
    D, T. text_encoder: 'lstm', or 'service' for sentence vectors that come from outside. words: the LSTM's vocabulary,
    word to id. image_features: what the encoder's last layer is given, of image_encoders.py's FEATURES. learn_words:
    whether words that learn, of the same vocabulary, are read beside the sentence vectors, whose size T is. prompt:
    what a zero-shot composer puts a text into. corpora: BASIC's subjects and its styles. expansion, contexts,
    given: BASIC's, too, as its class says. What has a default is not in older checkpoints, which are as it says.
    """
    composer: str
    image_encoder: str
    image_size: int
    image_dim: int
    text_encoder: str
    text_dim: int
    words: dict[str, int]
    image_features: str = "last"
    learn_words: bool = False
    prompt: str = "auto"
    corpora: list[list[str]] = field(default_factory=list)
    expansion: int = 25
    contexts: int = 100
    given: dict[str, int] = field(default_factory=dict)

    def build(self, sentence_vectors: SentenceVectors | None = None) -> ImgTextCompositionBase:
        """The model with random weights, knowing its recipe. Raises InputError for an encoder that takes no such
        images, or is none that the composer takes."""
        model = MODELS[self.composer].of(self, sentence_vectors)
        sizes = {"image_dim": model.image_dim, "text_dim": model.text_dim} if model.frozen else {}
        model.recipe = replace(self, **sizes)
        return model

    def plain(self) -> dict:
        return asdict(self)
