"""Search any folder of images by a picture plus a change, with a trained model.

    python search.py index --model_checkpoint logs/RUN/best_checkpoint.pth --images FOLDER --out INDEX
    python search.py query --index INDEX --image dress.jpg --text "is white, with a ribbon"
    python search.py serve --index INDEX
    python search.py export --model_checkpoint logs/RUN/best_checkpoint.pth --out FOLDER
    python search.py export --index INDEX --vectors FILE.parquet
"""

import argparse
import base64
import html
import io
import json
import logging
import os
import sys
import time
import warnings
from functools import partial
from pathlib import Path

from flags import DEVICES, MOST_RESULTS, Parser, a_path, add, at_least, port_number
from machine.errors import InputError
from machine.file_names import on_disk
from machine.stopping import ending, starting
from machine.streams import log_to_stderr, shown, shown_name

SHOWN_BROKEN = 20
TILE = 128                              # pixels of a picture on a sheet
EXAMPLES = """examples:
  python search.py index --model_checkpoint logs/RUN/best_checkpoint.pth --images FOLDER --out INDEX
  python search.py query --index INDEX --image dress.jpg --text "is white, with a ribbon"
  python search.py serve --index INDEX

search.py COMMAND --help explains each command's flags."""


def image_path(text: str) -> Path:
    return on_disk(a_path(text))


def get_parser() -> Parser:
    parser = Parser(prog="search.py", description="Search any folder of images by a picture plus a change, with a "
                    "trained model.\nThe checkpoint alone says which model, texts and image size.", epilog=EXAMPLES)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    def command(name: str, help: str) -> Parser:
        return commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")

    def add_device_flag(made: Parser) -> None:
        made.add_argument("--device", default="auto", choices=DEVICES, help="where the model runs, if torch computes "
                          "it; auto takes a GPU where there is one")
        made.add_argument("--engine", default="auto", choices=("auto", "torch", "openvino"), help="what computes the "
                          "model: openvino, on the CPU and without PyTorch, by the networks that an index holds, or "
                          "torch; auto takes openvino where they can be used")

    def add_index_flags(made: Parser) -> None:
        add_device_flag(made)
        made.add_argument("--index", required=True, type=a_path, metavar="DIR", default=argparse.SUPPRESS,
                          help="folder made by search.py index (required)")
        made.add_argument("--images", type=a_path, metavar="DIR", default=argparse.SUPPRESS, help="folder where the "
                          "images are now, if they were moved; the index stays as it is")
        add(made, "--follow_links", False, "show files, too, that links in that folder lead out of it to")
        service = made.add_argument_group("sentence service, for a model trained with --use_bert; where a flag is not "
                                          "given, as the training had it")
        for flag, kind, metavar, help in (
                ("--bert_ip", str, "HOST", "its host (IPv4); this machine unless given"),
                ("--bert_port", port_number, "PORT", "port it takes texts on"),
                ("--bert_port_out", port_number, "PORT", "port it answers on"),
                ("--bert_timeout", at_least(0.1, float, 86400), "SECONDS", "how long to wait for it")):
            service.add_argument(flag, type=kind, metavar=metavar, default=argparse.SUPPRESS, help=help)

    def add_score_flags(made: Parser) -> None:
        made.add_argument("--nearness", type=at_least(0, float, 1), default=0.0, metavar="W", help="from 0, as the "
                          "model was trained, to 1: how much results shall look like the picture besides; for things "
                          "that it was not trained with")
        made.add_argument("--hubness", type=at_least(0, float, 1), default=0.0, metavar="W", help="from 0 to 1: how "
                          "much less those images count that are near to queries of every kind; where a model's texts "
                          "are a fixed set, as states or colours (docs/searching.md)")

    index = command("index", "make an index of a folder of images, or bring one up to date; stopped, the same command "
                    "goes on")
    add_device_flag(index)
    index.add_argument("--model_checkpoint", type=a_path, metavar="PATH", default=argparse.SUPPRESS,
                       help="a run's best_checkpoint.pth, or a folder that `export` wrote (required for a new index; "
                       "else its own model is taken)")
    index.add_argument("--images", required=True, type=a_path, metavar="DIR", default=argparse.SUPPRESS,
                       help="folder with images, in it and below it (required)")
    index.add_argument("--out", required=True, type=a_path, metavar="DIR", default=argparse.SUPPRESS,
                       help="folder for the index (required)")
    add(index, "--follow_links", False, "take in linked folders of images, and files that links lead out of --images "
        "to")
    add(index, "--ivf", False, "for millions of images: a query is compared with those of the nearest cells of the "
        "gallery alone, so that a few of its results may be missed")
    add(index, "--pq", False, "for more than memory holds: as --ivf, and an image takes 72 bytes in place of 1,032")
    add(index, "--prune", False, "take out all images that are no more there; without it, those whose folder is gone "
        "or empty stay, and if more than a tenth (and more than 5) are gone, or in another folder than the last time "
        "any is, nothing is changed")
    index.add_argument("--metadata", type=a_path, metavar="FILE", default=argparse.SUPPRESS, help="a table, .csv, "
                       ".xlsx or .jsonl, of what is known of the images: their paths below --images or bare names in "
                       "the column file_name, or else in the first, and any other columns; in the place of an earlier "
                       "table, which stays without it")
    index.add_argument("--batch_size", type=at_least(1), default=32, metavar="B", help="images encoded at once")
    index.add_argument("--loader_num_workers", type=at_least(0), default=4, metavar="N", help="threads that read "
                       "images")
    query = command("query", "find the images nearest to a picture plus a change")
    add_index_flags(query)
    query.add_argument("--image", required=True, type=image_path, metavar="PATH", default=argparse.SUPPRESS,
                       help="the query's picture, any file (required)")
    query.add_argument("--text", default="", help="what to change, as the model was trained to be told; empty: images "
                       "that look like the picture")
    add_score_flags(query)
    query.add_argument("-k", type=at_least(1, most=MOST_RESULTS), default=20, metavar="K", help="how many results")
    query.add_argument("--qdrant", metavar="URL", default=argparse.SUPPRESS, help="search in a Qdrant database that "
                       "holds the exported vectors: http://HOST:PORT, or a folder of its local mode; its key is taken "
                       "from QDRANT_API_KEY")
    query.add_argument("--collection", default="pictures", help="of --qdrant, which")
    add(query, "--keep_query", False, "where the picture is one of the gallery's own files, it may be a result, too")
    query.add_argument("--where", default="", metavar="CONDITION", help="only images whose metadata fulfil it, as "
                       "\"price < 50 AND colour = 'red'\", in SQL")
    add(query, "--json", False, "print JSON in place of a table")
    query.add_argument("--html", type=a_path, metavar="FILE", default=argparse.SUPPRESS, help="write the results as a "
                       "page that needs no other file")
    query.add_argument("--png", type=a_path, metavar="FILE", default=argparse.SUPPRESS, help="write the results as a "
                       "picture")
    serve = command("serve", "open a web page to search on, and to go on from what was found")
    add_index_flags(serve)
    add_score_flags(serve)
    serve.add_argument("-k", type=at_least(1, most=100), default=20, metavar="K", help="how many results it shows")
    serve.add_argument("--host", default="127.0.0.1", help="address it listens on; no password is asked, so name "
                       "another only in a network you trust")
    serve.add_argument("--port", type=port_number, default=7860, help="port it listens on")
    serve.add_argument("--root_path", default="", metavar="PATH", help="path below which a reverse proxy has it, such "
                       "as /find")
    serve.add_argument("--allow_host", action="append", default=[], metavar="NAME", help="another name it goes by, "
                       "such as a reverse proxy's; may be given again")
    export = command("export", "write a model into a folder of its own: weights as safetensors, its record as JSON, a "
                     "card to read; taken wherever a checkpoint is; or an index's images into a table: ids, paths, "
                     "metadata and unit vectors")
    export.add_argument("--model_checkpoint", type=a_path, metavar="PATH", default=argparse.SUPPRESS,
                        help="a run's best_checkpoint.pth; with --out")
    export.add_argument("--out", type=a_path, metavar="DIR", default=argparse.SUPPRESS, help="a new folder")
    add(export, "--onnx", False, "also its image encoder and its composer as ONNX, compared with torch; needs "
        "requirements-export.txt")
    export.add_argument("--index", type=a_path, metavar="DIR", default=argparse.SUPPRESS,
                        help="folder made by search.py index; with --vectors")
    export.add_argument("--vectors", type=a_path, metavar="FILE", default=argparse.SUPPRESS,
                        help="the Parquet file to write, replaced when all of it is written; needs "
                        "requirements-export.txt")
    return parser


if __name__ == "__main__":                                                      # before the seconds that torch takes
    starting(get_parser())

from PIL import Image
from tqdm import tqdm

from machine import processes
from machine.progress import progress_bar
from searching.build import build
from searching.gallery import Gallery, Hit
from searching.qdrant import Qdrant
from training.pictures import NOTE, QueryResults, sheet, thumbnail, wrapped


def open_index(args: argparse.Namespace) -> Gallery:
    where = {name: value for name, value in vars(args).items() if name.startswith("bert_")}
    ranking = partial(Qdrant, args.qdrant, args.collection) if "qdrant" in args else None
    return Gallery(args.index, device_of(args), where, getattr(args, "images", None), args.follow_links, ranking,
                   args.hubness, args.engine)


def device_of(args: argparse.Namespace):
    """Where torch computes, if it has to: it is loaded when that is asked, unless a GPU or torchrun want it."""
    started = partial(start_device, args)
    return started if args.device in ("auto", "cpu") and not processes.launched() else started()


def start_device(args: argparse.Namespace):
    from machine.device import choose_device, set_up  # only here: it needs torch

    device = choose_device(args.device, processes.local_rank() if processes.launched() else None)
    set_up(device, "fp32", processes.local_world())
    return device


def index(args: argparse.Namespace) -> None:
    start, device = time.perf_counter(), device_of(args)
    kind = "pq" if args.pq else "ivf" if args.ivf else "exact"
    with processes.job(device):
        built = build(getattr(args, "model_checkpoint", None), args.images, args.out, kind, device, args.batch_size,
                      args.loader_num_workers, progress_bar, args.prune, getattr(args, "metadata", None),
                      args.follow_links, args.engine)
    if not built:                                                               # by the first of several processes
        return
    for path, reason in list(built.left_out.items())[:SHOWN_BROKEN]:
        tqdm.write(shown(f"left out {path}: {reason}"), file=sys.stderr)
    if len(built.left_out) > SHOWN_BROKEN:
        tqdm.write(f"... and {len(built.left_out) - SHOWN_BROKEN} more", file=sys.stderr)
    if built.not_followed:
        print(f"note: {len(built.not_followed)} links to other folders were not followed, the first of them "
              f"{shown_name(built.not_followed[0])}; pass --follow_links True to take in the images that they lead to",
              file=sys.stderr)
    out = shown_name(args.out)
    print(f"{out}: {built.images} images, {built.new} of them encoded now, {built.summary}; "
          f"{time.perf_counter() - start:.1f} s; search it with: python search.py serve --index {out}"
          + " --follow_links True" * args.follow_links)


def query(args: argparse.Namespace) -> None:
    gallery = open_index(args)
    hits = gallery.search(args.image, args.text, args.k + (not args.keep_query), where=args.where,
                          nearness=args.nearness)
    if not args.keep_query:
        own = os.path.realpath(args.image)
        hits = [hit for hit in hits if os.path.realpath(hit.path) != own][:args.k]
    if unknown := gallery.encoder.unknown(args.text):
        words = shown(", ".join(unknown))
        print(f"note: not known to the model, so left out: {words}", file=sys.stderr)
    if args.where and not hits:
        print("note: no image has metadata of which --where holds", file=sys.stderr)
    missing = tell_missing(gallery, hits)
    if args.json:
        print(json.dumps({"image": str(args.image), "text": args.text, "unknown_words": unknown, "results": [
            {"rank": rank, "score": hit.score, "path": str(hit.path),
             **({"metadata": hit.metadata} if hit.metadata else {}),
             **({"missing": True} if hit.image in missing else {})}
            for rank, hit in enumerate(hits, start=1)]}, indent=1))
    else:
        print("rank   score  image")
        for rank, hit in enumerate(hits, start=1):
            print(f"{rank:4}  {hit.score:6.4f}  {shown_name(hit.path)}" + f"  {shown(known(hit))}" * bool(hit.metadata))
    if "png" in args:
        shown_hits = QueryResults(thumbnail(args.image), words_of(args.text), [result(gallery, hit) for hit in hits],
                                  notes=[note(rank, hit) for rank, hit in enumerate(hits, start=1)])
        picture = sheet([shown_hits], tile=TILE)
        write(args.png, "--png", png(picture))
    if "html" in args:
        write(args.html, "--html", page_of(gallery, args, hits).encode("utf-8", "replace"))


def tell_missing(gallery: Gallery, hits: list[Hit]) -> set[int]:
    """Of the results, those whose files are not there; says so once, and how to mend it."""
    missing = {hit.image for hit in hits if not os.path.isfile(hit.path)}
    out = sum(gallery.is_out(hit.path) for hit in hits if hit.image not in missing)
    folder = shown_name(gallery.folder)
    if missing and os.path.isdir(gallery.folder):                               # else it was said at opening
        print(f"note: {len(missing)} of the {len(hits)} results are no longer in {folder}; if the images moved, pass "
              "--images NEWFOLDER; if they were removed, run search.py index, which takes them out of the index",
              file=sys.stderr)
    if out:
        print(f"note: {out} of the {len(hits)} results are behind links that lead out of {folder}; pass "
              "--follow_links True to have them shown", file=sys.stderr)
    return missing


def words_of(text: str) -> str:
    return f"+ {text}" if text.strip() else "(no change: images that look like it)"


def known(hit: Hit) -> str:
    """Its metadata, what is not empty."""
    return ", ".join(f"{column}: {value}" for column, value in hit.metadata.items() if value is not None)


def note(rank: int, hit: Hit) -> str:
    """Under its picture on a sheet: of its metadata's values as many as there is room for."""
    values = " ".join(str(value) for value in hit.metadata.values() if value is not None)
    return "\n".join([f"{rank}.  {hit.score:.4f}", *wrapped(values, TILE, NOTE, most=1)])


def result(gallery: Gallery, hit: Hit) -> Image.Image:
    """A result's picture, grey where it cannot be read any more."""
    try:
        return thumbnail(gallery.file(hit.image))
    except InputError as error:
        if os.path.isfile(hit.path) and not gallery.is_out(hit.path):           # else it was said
            logging.warning("%s", error)
        return Image.new("RGB", (256, 256), "#d0d5da")


def png(picture: Image.Image) -> bytes:
    content = io.BytesIO()
    picture.save(content, "PNG", optimize=True)
    return content.getvalue()


def page_of(gallery: Gallery, args: argparse.Namespace, hits: list[Hit]) -> str:
    """The results as HTML with the pictures inside; no text of a user's or a file's is taken for HTML."""
    def figure(picture: Image.Image, words: str, title: str = "") -> str:
        content = io.BytesIO()
        picture.save(content, "JPEG", quality=88)
        data = base64.b64encode(content.getvalue()).decode()
        return (f'<figure><img src="data:image/jpeg;base64,{data}" alt="{html.escape(title)}" '
                f'title="{html.escape(title)}"><figcaption>{html.escape(words)}</figcaption></figure>')
    results = "\n".join(figure(result(gallery, hit), f"{rank}. {hit.score:.4f} {known(hit)}".strip(), str(hit.path))
                        for rank, hit in enumerate(hits, start=1))
    return f"""<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html.escape(words_of(args.text))}</title>
<style>
body {{ font: 16px system-ui, sans-serif; color: #1f2933; margin: 2rem auto; max-width: 70rem; padding: 0 1rem }}
div {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: 1rem }}
figure {{ margin: 0 }} img {{ width: 100%; aspect-ratio: 1; object-fit: cover; border-radius: 6px }}
.query {{ max-width: 12rem }} figcaption {{ color: #52606d; overflow-wrap: anywhere }}
</style>
<div class="query">{figure(thumbnail(args.image), words_of(args.text), str(args.image))}</div>
<h2>{len(hits)} results, best first, with their scores</h2>
<div>
{results}
</div>
</html>
"""


def write(path: Path, flag: str, content: bytes) -> None:
    try:
        path.write_bytes(content)
    except OSError as error:
        raise InputError(f"cannot write {flag} {path} ({error.strerror or error}); choose another file") from None


def serve(args: argparse.Namespace) -> None:
    gallery = open_index(args)
    try:
        from searching import page
    except ModuleNotFoundError as error:
        raise InputError(f"the page needs {error.name}: pip install -r requirements-search.txt") from None
    page.open_page(gallery, args.k, args.host, args.port, args.allow_host, args.root_path, args.nearness)


def export(args: argparse.Namespace) -> None:
    if "model_checkpoint" in args and "out" in args:
        export_model(args)
    elif "index" in args and "vectors" in args:
        from searching import vectors

        count = vectors.export(args.index, args.vectors, progress_bar)
        print(f"{shown_name(args.vectors)}: {count} images, each with its unit vector")
    else:
        raise InputError("export a model, with --model_checkpoint and --out, or an index's images, with --index and "
                         "--vectors")


def export_model(args: argparse.Namespace) -> None:
    from searching.export import export

    differences = export(args.model_checkpoint, args.out, args.onnx)
    files = [f"{file.name} ({file.stat().st_size / 1e6:.1f} MB)" for file in sorted(args.out.iterdir())]
    print(f"{shown_name(args.out)}: {', '.join(files)}; it is taken wherever a checkpoint is")
    for name, difference in differences.items():
        print(f"{name}: differs from torch by {difference:.1e} of the largest number at most")


def main(argv: list[str] | None = None) -> int:
    """Run with these flags; returns the exit code, as `ending` says."""
    log_to_stderr(logging.WARNING if processes.local_rank() == 0 else logging.ERROR)
    warnings.filterwarnings("ignore", module="PIL")

    def work(_stopping) -> None:
        args = get_parser().parse_args(argv)
        {"index": index, "query": query, "serve": serve, "export": export}[args.command](args)
    return ending("search.py", work)


if __name__ == "__main__":
    sys.exit(main())
