"""The flags of main.py: names, defaults (the published settings), and help; and what all programs' have in common.
Nothing here loads torch."""

import argparse
import ast
import difflib
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path

from benchmarks.base import CAPTION_FORMS
from benchmarks.mining import Mining, Templates
from datasets import DATASETS, FashionIQ
from machine.errors import InputError
from machine.stopping import one_of_several
from machine.streams import shown
from zero_shot.prompts import PROMPTS, UNTRAINED

VERSION = "0.1.0"                       # of all programs; none was released yet
DEVICES = ("auto", "cpu", "cuda", "mps")
MOST_RESULTS = 1000                                                             # of a search
DESCRIPTION = "Train and test composed image retrieval: a source image plus a text finds the target image."


EXAMPLES = """examples:
  python main.py --dataset mitstates --dataset_path data/toy/mitstates --image_weights none --num_iters 200
  python main.py --dataset fashionIQ --dataset_path ../data/fashionIQ --model tirg --text_encoder hf:bert-base-uncased
  python main.py --test_only True --model_checkpoint logs/RUN/best_checkpoint.pth --dataset_path ../data/fashionIQ
  tensorboard --logdir ../logs

The defaults are the published settings; README.md has the five published commands."""


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults, and examples as they are to be typed."""


class Parser(argparse.ArgumentParser):
    """Wrong flags end in one line, with the name that is nearest to a wrong one, and exit code 2. Who gives none where
    some are needed gets the help."""

    def __init__(self, *what, **how):
        super().__init__(*what, **{"formatter_class": Help, **how})
        self.add_argument("--version", action="version", version=f"%(prog)s {VERSION}",
                          help="print the version and exit")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace=None):
        if not (sys.argv[1:] if args is None else args) and any(action.required for action in self._actions):
            self.print_help(sys.stderr)
            self.exit(2)
        return super().parse_known_args(args, namespace)

    def _check_value(self, action: argparse.Action, value) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += meant(value, action.choices)
            raise

    def names(self) -> list[str]:
        """Of its flags, and of its commands'."""
        commands = [made for action in self._actions if isinstance(action, argparse._SubParsersAction)
                    for made in action.choices.values()]
        return [*self._option_string_actions, *(name for made in commands for name in made.names())]

    def error(self, message: str):
        if found := re.match(r"unrecognized arguments: (?:.* )?(--?\w+)", message):
            message += meant(found[1], self.names())
        hint = "" if message.endswith("?") else "; see --help"
        line = f"{self.prog}: error: {shown(message)}{hint}\n"
        self.exit(2, line if not one_of_several() or first_to_say(line) else None)


def meant(word: str, names: Iterable[str]) -> str:
    """The end of a complaint about a word: the name that is nearest to it, if one is near."""
    written = {str(name).lower(): name for name in names}
    near = difflib.get_close_matches(word.lower(), written, 1)
    return f"; did you mean {written[near[0]]}?" if near else ""


class TrainingParser(Parser):
    """Of main.py. Which dataset must be given, unless a checkpoint may say it. Raises InputError for flags that do not
    go together."""

    def parse_args(self, *given):
        args = argparse.Namespace(**{"dataset": "", **vars(super().parse_args(*given))})
        if not args.dataset and not args.test_only:
            self.error("the following arguments are required: --dataset")
        refuse(args, args.device)
        return args


def refuse(args: argparse.Namespace, device: str) -> None:
    """Raise InputError for flags of main.py that do not go together. device: as asked for, or the kind that it is."""
    if args.test_only and not args.model_checkpoint and args.model not in UNTRAINED:
        raise InputError("--test_only needs the checkpoint to test: pass --model_checkpoint PATH")
    if args.test_only and args.resume:
        raise InputError("--test_only tests --model_checkpoint and resumes nothing: drop --resume")
    if args.sync_bn and device not in ("auto", "cuda"):
        raise InputError("--sync_bn True: torch's synchronized batch norm is for CUDA GPUs alone; drop it")
    if args.learn_words and args.text_encoder == "lstm" and not args.use_bert:
        raise InputError("--learn_words True is for words beside a text encoder that does not learn, and the LSTM "
                         "learns its own: drop it, or pass --text_encoder")
    if args.write_submission and args.dataset and not DATASETS[args.dataset].served:
        having = next(name for name, kind in DATASETS.items() if kind.served)
        raise InputError(f"--write_submission: {args.dataset} has no test server, as {having} has; drop it")
    if os.sep in args.comment:
        raise InputError(f"--comment {args.comment!r} ends a folder's name and cannot hold a {os.sep!r}")


def first_to_say(line: str) -> bool:
    from machine import processes  # here: it may load torch

    return processes.first_to_say(line)


@cache
def registered(file: str, registry: str) -> tuple[str, ...]:
    """The keys of a registry, a dict written out in one of our files, read from its text: importing it would load
    torch, for seconds, before a wrong flag is answered."""
    lines = ast.parse((Path(__file__).parent / file).read_text()).body
    table = next(line.value for line in lines if isinstance(line, ast.Assign) and line.targets[0].id == registry)
    return tuple(key.value for key in table.keys)


def a_path(text: str) -> Path:
    """A path flag's value; a shell leaves the ~ of --flag=~/x as it is."""
    return Path(os.path.expanduser(text))


def path_or_word(text: str) -> str:
    """The same of a flag that takes a word, too."""
    return os.path.expanduser(text)


def true_or_false(text: str) -> bool:
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}")
    return values[text.lower()]


def at_least(minimum: float, kind: type = int, most: float = 2**62):
    """A number parser that refuses what is smaller, larger, infinite or not a number."""
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not minimum <= value <= most:
            raise argparse.ArgumentTypeError(f"expected {'an integer' if kind is int else 'a number'} of at least "
                                             f"{minimum}{f' and at most {most}' if most < 2**62 else ''}, got {text!r}")
        return value
    return parse


def or_own(kind: Callable[[str], object]) -> Callable[[str], object]:
    """The same, or the word own."""
    def parse(text: str):
        try:
            return text if text == "own" else kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected an integer or own, got {text!r}") from None
    return parse


def template_shares(text: str) -> str:
    try:
        Templates(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def save_frequency(text: str) -> str:
    if not re.fullmatch(r"0*[1-9]\d{0,8}m?", text):
        raise argparse.ArgumentTypeError(f"expected iterations, as 500, or minutes, as 10m, got {text!r}")
    return text


def image_side(text: str) -> int:
    return 0 if text == "0" else at_least(32)(text)


port_number = at_least(1, most=65535)


def add(group, flag: str, default, help: str, **how) -> None:
    """A flag; one whose default is a bool takes True or False."""
    if isinstance(default, bool):
        how = {"type": true_or_false, "nargs": "?", "const": True, "metavar": "True|False"}
    group.add_argument(flag, default=default, help=help, **how)


def add_dataset_flags(data, required: bool) -> None:
    """What says which samples and queries a run has. required: whether --dataset is."""
    data.add_argument("--dataset", choices=DATASETS, required=required, default=argparse.SUPPRESS,
                      help=f"benchmark to train and test on (required{'' if required else ', but by --test_only'})")
    data.add_argument("--dataset_path", required=True, type=a_path, metavar="DIR", default=argparse.SUPPRESS,
                      help="folder with the benchmark's published tree, see data/README.md (required)")
    add(data, "--category_to_train", "all", "FashionIQ: all three categories, or this one alone",
        choices=("all", *FashionIQ.CATEGORIES))
    add(data, "--caption_form", "published", "FashionIQ: how a query's two captions are put together, for zero-shot "
        "composers: and ('C1 and C2'), reversed ('C2 and C1', Pic2Word's), or both orders, the query being their mean "
        "(LinCIR's)", choices=CAPTION_FORMS)
    add(data, "--use_complete_text_query", False, "queries say the whole target caption, not only what changes")
    add(data, "--validation", 0.0, "share of the train split's nouns, products or source images to hold out and test "
        "on too; best_checkpoint.pth is then the best on these. Published: 0, the best on the test split",
        type=at_least(0, float, 0.9), metavar="SHARE")
    add(data, "--keep_source", False, "triplets, captions: a query's own picture stays in its ranking, as FashionIQ "
        "has it")
    add(data, "--shared_concept", False, "CIRCO: queries also say what their two pictures have in common, which makes "
        "them easier. Published by most: the caption alone")
    add(data, "--any_suffix", False, "MIT-States: read images that end in .JPG, .png and the like, too. Published: in "
        ".jpg alone")
    add_mining_flags(data)


def add_mining_flags(data) -> None:
    """How triplets are mined from captions and attributes."""
    own = Mining()
    add(data, "--attributes", own.attributes, "captions: columns of the table to mine beside the captions, as "
        "colour,pattern,category; where there are no captions and none is named, all of words that recur",
        metavar="NAMES")
    add(data, "--same", own.same, "captions: columns in which source and target have the same, as category",
        metavar="NAMES")
    add(data, "--product", own.product, "captions: which pictures show one product, none of which is another's "
        "target, and which no split cuts in two: a column's name, or a regular expression for file names with the "
        r"product in brackets, as '(.+)_\d+'; auto for the column product or group, else each picture is one",
        metavar="auto|COLUMN|RULE")
    add(data, "--same_product", own.same_product, "captions: a product's other pictures may be targets, too")
    add(data, "--span", own.span, "captions: words in a row in which two captions may differ; 0 for one word in place "
        "of another alone", type=at_least(0, most=20), metavar="WORDS")
    add(data, "--two_changes", own.two_changes, "captions: share of the samples from attributes that may differ in two "
        "of them", type=at_least(0, float, 1), metavar="SHARE")
    add(data, "--templates", own.templates, "captions: shares of the ways to say what changes, of those that fit: in "
        "B; replace A with B; B instead of A; with B; without A; covr, the nine of CoVR; named: of attributes, with "
        "their column's name. What is not in the list has none", type=template_shares, metavar="SHARES")
    add(data, "--written", own.written, "captions: share of the training samples that are hand-written triplets, where "
        "there are any beside the table", type=at_least(0, float, 1), metavar="SHARE")


def dataset_settings(args: argparse.Namespace) -> dict:
    """What of these flags a dataset is told, by name."""
    return {"complete_text": args.use_complete_text_query, "category": args.category_to_train,
            "held_out": args.validation, "keep_source": args.keep_source, "any_suffix": args.any_suffix,
            "shared_concept": args.shared_concept, "caption_form": args.caption_form,
            "mining": mining_of(args)}


def mining_of(args: argparse.Namespace) -> Mining:
    return Mining(*(getattr(args, name) for name in Mining._fields))


def get_parser() -> TrainingParser:
    parser = TrainingParser(
        prog="main.py", usage="%(prog)s --dataset NAME --dataset_path DIR [flags]", description=DESCRIPTION,
        epilog=EXAMPLES)

    data = parser.add_argument_group("data")
    add_dataset_flags(data, required=False)
    add(data, "--skip_bad_images", False, "check every image first and leave out broken and missing ones, with what "
        "refers to them, and lines of your own table that do not fit, in place of stopping at the first")
    add(data, "--image_size", 0, "side in pixels of the square images the encoder sees; 0 for its own, or a "
        "checkpoint's. Published: 224, which is resnet18's own", type=image_side, metavar="S")
    add(data, "--image_cache", "auto", "folder that keeps the decoded images (3*S*S bytes each) and sentence vectors, "
        "'none' to make them anew in each run, 'auto' for DATASET_PATH/image_cache, 'device' for that and all images "
        "in the memory of the GPU (or CPU) too, if it has room", type=path_or_word,
        metavar="auto|none|device|DIR")
    add(data, "--loader_num_workers", 4, "threads that prepare batches ahead; results do not depend on it",
        type=at_least(0), metavar="N")

    model = parser.add_argument_group("model")
    add(model, "--model", "composeAE", "composer of image and text: composeAE turns the image's features by the "
        "text's, as complex numbers, RealSpaceConcatAE only joins the two; tirg gates the image's and adds to them; "
        "TransformerAE, our own, is tirg beside a change that stays near the image. Of a frozen CLIP model, zero-shot: "
        "image, text, sum, product and BASIC learn nothing; LinCIR and Pic2Word make the picture a word of its text "
        "tower, and learn that from --dataset texts or pictures",
        choices=registered("img_text_composition_models.py", "MODELS"))
    add(model, "--image_encoder", "resnet18", "what encodes images, a last layer Linear(width, D) on it: a classifier "
        "of torchvision's, timm:NAME, or open_clip:MODEL/TAG, whose tag names its weights. Published: resnet18",
        metavar="NAME")
    add(model, "--image_features", "last", "what its last layer is given: its last features, or stages: beside them of "
        "four to six of its stages each channel's mean and deviation over the picture, which tell colours and textures",
        choices=registered("image_encoders.py", "FEATURES"))
    add(model, "--image_embed_dim", 512, "size of image features and of the composed query; 0 for the encoder's own "
        "width, which is 512 for resnet18", type=at_least(0), metavar="D")
    add(model, "--text_embed_dim", 512, "size of the LSTM's words and states; other text encoders have their own",
        type=at_least(1), metavar="T")
    add(model, "--image_weights", "imagenet", "weights of the encoder to start from: 'imagenet' for its library's "
        "own, downloaded once, 'none' (random), or a file of such a model's tensors: .pth, .safetensors, .npz",
        type=path_or_word, metavar="imagenet|none|PATH")
    add(model, "--freeze_image_encoder", False, "keep the image encoder as it is, but for its last layer: what it "
        "makes of an image is computed once and kept beside the decoded images")
    add(model, "--engine", "auto", "what computes on a CPU what does not learn, a frozen image encoder, and texts' "
        "of hf: and open_clip: torch, or openvino, far faster and the same to 1e-5 of the largest value, which auto "
        "takes where it is installed. A run that goes on keeps its own; a GPU, x86 without AVX, and what learns, are "
        "torch's",
        choices=("auto", "torch", "openvino"))
    add(model, "--text_encoder", "lstm", "what reads texts: lstm, which is trained; service, as --use_bert True; "
        "hf:NAME or hf:FOLDER, a BERT-type model in this process; open_clip:MODEL/TAG, a CLIP model's text tower. "
        "Published: lstm and service", metavar="NAME")
    add(model, "--prompt", "auto", "zero-shot: what a query's text is put into, {} being the text and $ the picture's "
        f"word: {', '.join(PROMPTS)}, or your own as 'a photo of $ that {{}}'; auto: the composer's own",
        metavar="NAME|TEXT")
    add(model, "--subjects", "", "BASIC: file of texts of what pictures show, one a line", type=path_or_word,
        metavar="FILE")
    add(model, "--styles", "", "BASIC: file of texts of how they show it, one a line", type=path_or_word,
        metavar="FILE")
    add(model, "--contexts", 100, "BASIC: so many of the subjects are read beside each text; 0: the text alone",
        type=at_least(0), metavar="N")
    add(model, "--expansion", 25, "BASIC: so many of the gallery's images most like a query's picture are averaged "
        "with it; 0: none", type=at_least(0), metavar="N")
    add(model, "--pictures_mean", "", "BASIC: file of a vector, the mean of many pictures' unit vectors, in place of "
        "the gallery's: .pt, .safetensors, .npy", type=path_or_word, metavar="FILE")
    add(model, "--synthetic", "", "BASIC: file of made-up pictures' and texts' vectors, image_features and "
        "text_features, of which the least similarities are, in place of the gallery's: .pt, .safetensors, .npz",
        type=path_or_word, metavar="FILE")
    add(model, "--learn_words", False, "words that learn are read beside the vectors of a text encoder that does not, "
        "which has what is known of words that training never saw")
    add(model, "--pooling_layer", "own", "hf: layer whose tokens are averaged, -1 the last; own: what a folder of "
        "sentence-transformers says, else -2", type=or_own(int), metavar="L|own")
    add(model, "--max_seq_len", "own", "hf: most tokens of a text; own: what such a folder says, else 25",
        type=or_own(at_least(4)), metavar="N|own")
    add(model, "--use_bert", False, "sentence vectors from a running BERT-as-service in place of the LSTM")
    add(model, "--bert_ip", "localhost", "host of the sentence service (IPv4)", metavar="HOST")
    add(model, "--bert_port", 5555, "port the service takes texts on", type=port_number, metavar="PORT")
    add(model, "--bert_port_out", 5556, "port the service answers on", type=port_number, metavar="PORT")
    add(model, "--bert_timeout", 10.0, "seconds to wait for the service", type=at_least(0.1, float, 86400),
        metavar="SECONDS")

    training = parser.add_argument_group("training")
    add(training, "--loss", "soft_triplet", "metric loss between query and target; the last counts the batch's "
        "other targets of one's caption as right",
        choices=registered("torch_function.py", "LOSSES"))
    add(training, "--num_iters", 160000, "training steps", type=at_least(1), metavar="N")
    add(training, "--batch_size", 32, "queries a step, each with its target; several processes share them",
        type=at_least(2), metavar="B")
    add(training, "--optimizer", "sgd", "sgd has momentum 0.9", choices=("sgd", "adamw"))
    add(training, "--learning_rate", 1e-2, "the rate; the image encoder's pretrained layers learn at a tenth of it",
        type=at_least(0, float, 1e30), metavar="RATE")
    add(training, "--learning_rate_decay_frequency", 9999999, "steps after which all rates are multiplied by 0.1",
        type=at_least(1), metavar="N")
    add(training, "--schedule", "step", "how the rates fall: in steps, see above, or as a cosine to 0 at --num_iters",
        choices=("step", "cosine"))
    add(training, "--warmup", 0, "steps in which the rates rise from near 0", type=at_least(0), metavar="N")
    add(training, "--weight_decay", 1e-6, "SGD's L2 penalty, AdamW's decay", type=at_least(0, float, 1e30),
        metavar="RATE")
    add(training, "--feature_dropout", 0.0, "share of what the image encoder's last layer is given that it does "
        "without in each step, so that it does not rely on a few of many features", type=at_least(0, float, 0.9),
        metavar="SHARE")
    add(training, "--seed", 0, "of weights, pairs, order and dropout", type=at_least(0), metavar="N")
    add(training, "--device", "auto", "where the model runs; auto takes a GPU where there is one",
        choices=DEVICES)
    add(training, "--precision", "fp32", "fp32: as published; tf32: coarser convolutions, faster on a GPU; bf16: the "
        "image encoder in bfloat16, far faster on GPUs and CPUs that have it. Losses and ranks are float32 in each",
        choices=("fp32", "tf32", "bf16"))
    add(training, "--compile", False, "compile the training step for this machine: a minute or so at start, then "
        "faster, most of all on a GPU")

    several = parser.add_argument_group("several processes (torchrun) and large batches, see docs/distributed.md")
    add(several, "--gather", True, "each query meets the targets of the whole batch; False: only those of its own "
        "process, as in plain data-parallel training")
    add(several, "--accumulate", 1, "parts in which a batch goes through the model, for less memory; a query meets the "
        "targets of its own part alone, and so does batch norm", type=at_least(1), metavar="N")
    add(several, "--sync_bn", False, "on GPUs, batch norm takes the statistics of the whole batch, else of each "
        "process's share")

    testing = parser.add_argument_group("testing and logs")
    add(testing, "--test_only", False, "no training: test --model_checkpoint on both splits. Of the "
        "other flags, --dataset_path is needed: what is not given is as the checkpoint's training was told")
    add(testing, "--model_checkpoint", "", "checkpoint to test, or to start training from; or a folder "
        "that search.py export wrote",
        type=path_or_word, metavar="PATH")
    add(testing, "--eval_frequency", 3, "epochs between tests (epochs 1, 4, 7, ... by default) besides the one at the "
        "end; 0 for that one only", type=at_least(0), metavar="EPOCHS")
    add(testing, "--test_batch_size", 0, "images the encoder takes at once in a test; 0 for 32 on a CPU, 256 on a GPU",
        type=at_least(0), metavar="B")
    add(testing, "--baselines", False, "tests also judge, on the test split, the source image alone, the text "
        "alone, and chance, and count the queries that one of the first two solves")
    add(testing, "--write_submission", False, "in the end, also write into the run's folder what the benchmark's test "
        "server takes: CIRR's of the split test1, CIRCO's of the split test")
    add(testing, "--best_metric", "auto", "metric of the test split, or with --validation of that one, by which "
        "best_checkpoint.pth is kept; auto takes R@10 of the composition, on FashionIQ the mean over each category's "
        "own gallery", metavar="NAME")
    add(testing, "--save_frequency", "10m", "iterations (500) or minutes (10m) between checkpoints, besides those at "
        "tests and at the end", type=save_frequency, metavar="N|Nm")
    add(testing, "--resume", "", "go on with a stopped run, exactly as if it had not been: its folder, its checkpoint, "
        "or auto for the newest run with the same --comment, if there is one", type=path_or_word, metavar="auto|PATH")
    add(testing, "--log_frequency", 100, "steps between logged losses, which are means over those steps",
        type=at_least(1), metavar="N")
    add(testing, "--report_to", "tensorboard", "where numbers and pictures go besides log.jsonl and metrics.json: "
        "tensorboard, wandb (pip install wandb; offline with WANDB_MODE=offline) or none",
        choices=registered("training/writers.py", "WRITERS"))
    add(testing, "--log_dir", Path("../logs/"), "folder under which the run's own folder is made", type=a_path,
        metavar="DIR")
    add(testing, "--comment", "", "end of the run folder's name", metavar="TEXT")
    parser.add_argument("-f", default="", help=argparse.SUPPRESS)               # what a notebook passes to any script
    return parser


def plain(args: argparse.Namespace) -> dict:
    """The flags as plain values."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
