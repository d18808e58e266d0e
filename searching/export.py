"""A trained model as a folder for others: its weights, its record, a card to read, and, if asked for, ONNX.

What is in it, and what takes it: docs/exporting.md.
"""

import os
import shlex
from pathlib import Path

from flags import get_parser, plain
from machine import model_folder
from machine.errors import InputError, first_line
from machine.folder_lock import whole_folder
from machine.streams import shown
from searching import as_onnx
from searching.from_checkpoint import CheckpointEncoder
from training.report import markdown_recalls
from training.writers import markdown_table

CARD = "README.md"
RECORDED = "it", "opt", "example_texts", "sentences", "results"                 # of a checkpoint, beside the recipe
NOT_TYPED_ANEW = "resume", "test_only", "f"


def export(source: Path, out: Path, onnx: bool) -> dict[str, float]:
    """Make `out`, a new or empty folder, of a checkpoint's model. Returns the ONNX files' differences from torch.

    Raises InputError for what is no checkpoint, and where the folder cannot be written.
    """
    if onnx:
        as_onnx.check_packages()
    out = Path(os.path.realpath(out))
    try:
        if os.path.lexists(out) and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"{out} is there already; name a new folder with --out")
        encoder = CheckpointEncoder(source, "cpu")
        with whole_folder(out) as folder:
            differences = as_onnx.write(encoder.model, folder) if onnx else {}
            record = record_of(encoder, differences)
            (folder / CARD).write_text(card(encoder, record), "utf-8", "backslashreplace")
            write_model(encoder, record, folder)
        return differences
    except OSError as error:
        raise InputError(f"cannot write {out} ({error.strerror or error}); choose another --out") from None


def write_model(encoder: CheckpointEncoder, record: dict, folder: Path) -> None:
    try:
        model_folder.write(folder, encoder.state["model_state_dict"], record)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{encoder.path} holds what JSON does not ({first_line(error)}): it was not written by this "
                         "program") from None


def record_of(encoder: CheckpointEncoder, differences: dict[str, float]) -> dict:
    """All that `checkpoint.load` gives of a model but its weights, and how to feed its ONNX files."""
    told = {name: encoder.state[name] for name in RECORDED if name in encoder.state}
    record = {**told, "recipe": encoder.model.recipe.plain()}
    if differences:
        record["onnx"] = {"preprocessing": {
            "upright": "as EXIF says", "colors": "RGB", "shorter_side": encoder.size, "resampling": encoder.resampling,
            "crop": "centre square", "layout": "B, 3, S, S", "type": "uint8", "normalized_within": {
                "divided_by": 255, "mean": encoder.model.traits.mean, "std": encoder.model.traits.std}},
            "largest_difference_from_torch": differences}
    return record


# The card

def card(encoder: CheckpointEncoder, record: dict) -> str:
    """What the model is, what it is worth, and how to use it, in Markdown; FOLDER stands for where it lies."""
    made_of, opt, text = encoder.model.recipe, encoder.opt, (encoder.examples or ["is white"])[0]
    dataset = opt.get("dataset", "data that it does not tell")
    return "\n".join([
        shown(f"# {made_of.composer}, trained on {dataset}"), "",
        "A model for composed image retrieval: a picture and a text that says what to change, into one vector near "
        "those of the pictures that are meant.", "",
        *markdown_table("| | |", [("composer", made_of.composer), *encoders(encoder),
                                  ("data set", dataset), ("steps", record["it"])]),
        "", "## Recalls", "", *measured(record.get("results", {}), record["it"], dataset),
        "", "## Trained with", "", *indented(command(opt)),
        "", "## Use", "", "In the folder of the program that wrote this one, `FOLDER` being this one:", "",
        *indented("from searching.gallery import load_model", "", 'model = load_model("FOLDER")',
                  f'query = model.compose("picture.jpg", {text!r})    # a unit vector, ({made_of.image_dim},)',
                  f'images = model.encode(["a.jpg", "b.jpg"])    # unit rows, (2, {made_of.image_dim})',
                  "print(images @ query)    # cosines"), "",
        *indented("python search.py index --model_checkpoint FOLDER --images PICTURES --out INDEX",
                  "python main.py --test_only True --model_checkpoint FOLDER --dataset_path DIR",
                  "python main.py --model_checkpoint FOLDER --dataset NAME --dataset_path DIR   # on from it"),
        *(onnx_section(encoder, record["onnx"]) if "onnx" in record else []), ""])


def encoders(encoder: CheckpointEncoder) -> list[tuple[str, str]]:
    made_of, opt = encoder.model.recipe, encoder.opt
    whole = encoder.model.frozen
    frozen = ", as it is" if whole else ", of which only the last layer was trained" * bool(
        opt.get("freeze_image_encoder"))
    read_by = (f"{made_of.text_encoder}, its text tower, which is in this folder" if whole else
               f"an LSTM, trained with it, of {len(made_of.words):,} words" if encoder.vocabulary else
               f"{made_of.text_encoder}, which is not in this folder")
    if made_of.learn_words:
        read_by += f", and {len(made_of.words):,} words that learned beside it"
    given = "last features" if made_of.image_features == "last" else "last features and statistics of its stages"
    return [("image encoder", f"{made_of.image_encoder}{frozen}: {made_of.image_size} x {made_of.image_size} pixels "
             f"to D = {made_of.image_dim} numbers, by its {given}"),
            ("texts", f"{read_by}: T = {encoder.model.text_dim} numbers")]


def measured(results: dict, it: int, dataset: str) -> list[str]:
    """The run's recalls as a table, and where they are from."""
    if not results:
        return ["The checkpoint does not tell any; the second command below measures them."]
    return [markdown_recalls(results), "",
            shown(f"R@K: percent of the queries with a right image among the first K. Measured by the run that trained "
                  f"it, after step {it}, on the splits of {dataset} that the rows name; it learned from train.")]


def command(opt: dict) -> str:
    """What main.py was told, typed anew: each flag whose value is not the default."""
    defaults = plain(get_parser().parse_args(["--dataset", "mitstates", "--dataset_path", "."]))
    defaults |= {"dataset": None, "dataset_path": None}
    told = [f"--{name}={value}" for name, value in opt.items()
            if name in defaults and name not in NOT_TYPED_ANEW and value != defaults[name]]
    return shlex.join(["python", "main.py", *told])


def onnx_section(encoder: CheckpointEncoder, told: dict) -> list[str]:
    made_of, differences = encoder.model.recipe, told["largest_difference_from_torch"]
    reader = "LSTM" if encoder.vocabulary else "text tower" if encoder.model.frozen else ""
    features = (f"the {reader} is not among them: `model.model.encode_text([...])` gives it" if reader else
                f"the vector of {made_of.text_encoder}")
    words = []
    if made_of.learn_words:
        features += (f", and after it what {as_onnx.WORDS} gives of the text's words: their numbers in model.json's "
                     "`words`, each lower-case and without punctuation, 0 where there is none")
        words = [(as_onnx.WORDS, "`words` (B, L) int64", f"`text` (B, {encoder.model.text_dim - made_of.text_dim})",
                  f"{differences[as_onnx.WORDS]:.1e}")]
    return ["", "## ONNX", "", *markdown_table("| file | inputs | output | largest difference from torch |", [
        (as_onnx.IMAGE_ENCODER, f"`pixels` (B, 3, {made_of.image_size}, {made_of.image_size}) uint8",
         f"`feature` (B, {made_of.image_dim})", f"{differences[as_onnx.IMAGE_ENCODER]:.1e}"),
        (as_onnx.COMPOSER, f"`image` (B, {made_of.image_dim}), `text` (B, {encoder.model.text_dim})",
         f"`query` (B, {made_of.image_dim}), unit rows", f"{differences[as_onnx.COMPOSER]:.1e}"), *words]), "",
        f"Any number B of rows; float32 but for the pixels. Pixels: the picture upright, RGB, its shorter side resized "
        f"to {made_of.image_size} with Pillow's {encoder.resampling} filter, the square in its centre; they are "
        "normalized within. `image` is the encoder's `feature` as it is, `text` the text's feature: "
        f"{shown(features)}. A gallery's features, divided by their lengths, times `query` are cosines. The difference "
        "is of the largest number, on random pixels, as found when the files were written."]


def indented(*lines: str) -> list[str]:
    return [f"    {shown(line)}".rstrip() for line in lines]
