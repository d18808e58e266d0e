"""The web page of search.py: choose a picture, say what should change, look, go on from what was found.

A visitor's session is a plain value; every event changes it and shows it whole, so there is one way to draw the page.
"""

import html
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, wraps
from pathlib import Path

# The page asks nobody on the network; Gradio, as it is imported, would look at the proxies that are set.
os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "no_proxy": "*", "NO_PROXY": "*"}

import gradio as gr
from fastapi import FastAPI
from gradio import processing_utils, queueing, routes
from PIL import Image

from flags import MOST_RESULTS
from machine.errors import InputError
from pictures import thumbnail
from searching.gallery import Gallery, Hit, Source, printable
from searching.guard import (
    LARGEST_UPLOAD,
    UPLOAD,
    Guard,
    Names,
    Uploads,
    address,
    in_one_line,
    listening,
    running,
    temporary_folder,
)
from text_model import spread

OFFERED, EXAMPLES, LONGEST_TRAIL = 12, 6, 30
SESSIONS = 200                          # that are remembered, each of some megabytes
log = logging.getLogger(__name__)
STYLE = """
.gradio-container { width: 100% !important; max-width: 1240px !important; margin: auto !important }
.pictures .grid-wrap { height: auto !important; max-height: none !important; min-height: 0 !important; padding: 0 }
.pictures .grid-container { grid-template-columns: repeat(auto-fill, minmax(120px, 1fr)) !important; gap: 8px }
#examples .grid-container, #choice .grid-container
  { grid-template-columns: repeat(auto-fill, minmax(76px, 1fr)) !important }
#trail .grid-container { display: flex !important; overflow-x: auto }
#trail .grid-container > * { flex: 0 0 92px }
.pictures .caption-label { font-size: 12px; max-width: 100%; padding: 1px 6px }
.pictures .thumbnail-item.selected { border-color: transparent; box-shadow: none }
@media (max-width: 700px) {  /* one column: what was found comes before what else could be chosen */
  #board { flex-direction: column } #board > .column { display: contents } #board > .column > * { width: 100% }
  #offers { order: 9 }
}
"""
TO_RESULTS = "() => { if (window.innerWidth < 700) document.getElementById('status').scrollIntoView() }"


@dataclass
class Step:
    """A query that was asked, and its results."""
    source: Source
    picture: Image.Image
    text: str
    hits: list[Hit]


@dataclass
class Session:
    """What one visitor sees: the query's picture, the steps so far, and which images are offered to choose from."""
    source: Source | None = None
    picture: Image.Image | None = None
    text: str = ""
    hits: list[Hit] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    offered: list[int] = field(default_factory=list)

    def take(self, source: Source, picture: Image.Image) -> None:
        """As the next query's picture."""
        self.source, self.picture, self.text = source, picture, ""

    def open(self, step: Step) -> None:
        self.source, self.picture, self.text, self.hits = step.source, step.picture, step.text, step.hits


def told(handler: Callable) -> Callable:
    """The handler, (page, session, ...) -> what to say, followed by the session shown whole. A user's error is said."""
    @wraps(handler)
    def handled(page: "Page", session: Session, *inputs):
        try:
            message = printable(handler(page, session, *inputs))
        except InputError as error:
            message = printable(str(error))
            gr.Warning(html.escape(message), title="Sorry")
        return page.shown(session, message)
    return handled


class Page:
    """The page of one gallery; k: how many results it shows; uploads: visitors' pictures, looked at once."""

    def __init__(self, gallery: Gallery, k: int, uploads: Uploads):
        self.gallery, self.k, self.uploads = gallery, k, uploads
        self.dropped = lru_cache(SESSIONS)(self.look_at)
        texts = spread(gallery.encoder.examples, EXAMPLES)
        pictures = spread(gallery.images.ids(), len(texts) + 2)[1:-1]
        self.examples = list(zip(pictures, texts, strict=False))
        self.small = lru_cache(500)(self.thumbnail)

    def thumbnail(self, image: int) -> Image.Image:
        """Of one of the gallery's images; grey where it is gone."""
        try:
            return thumbnail(self.gallery.file(image))
        except InputError:
            return Image.new("RGB", (256, 256), "#d0d5da")

    def shown(self, session: Session, message: str) -> tuple:
        """Values of: session, picture, text, status, results, trail, choice."""
        results = [(self.small(hit.image), f"{rank} · {hit.score:.3f}")
                   for rank, hit in enumerate(session.hits, start=1)]
        trail = [(step.picture, f"{number}. {step.text or 'looks like it'}")
                 for number, step in enumerate(session.steps, start=1)]
        choice = [self.small(image) for image in session.offered]
        return (session, session.picture, session.text, html.escape(message), pictures(results), pictures(trail),
                pictures(choice))

    @told
    def start(self, session: Session) -> str:
        session.offered = spread(self.gallery.images.ids(), OFFERED)
        return "Choose a picture or drop one in, then say what should change."

    @told
    def offer(self, session: Session, part: str | None) -> str:
        """Other images to choose from, whose paths hold this text."""
        part = (part or "").strip()
        session.offered = self.gallery.images.some(OFFERED, part)
        return "" if session.offered else f"no picture of the gallery has {part[:100]!r} in its path"

    def choose(self, session: Session, image: int) -> str:
        session.take(self.gallery.own_picture(image), self.small(image))
        return f"The query's picture is {self.gallery.images.path_of(image)}: now say what should change."

    @told
    def choose_offered(self, session: Session, event: gr.SelectData) -> str:
        return self.choose(session, at(session.offered, event))

    @told
    def go_on(self, session: Session, event: gr.SelectData) -> str:
        """From a result: it is the next query's picture."""
        return self.choose(session, at(session.hits, event).image)

    @told
    def reopen(self, session: Session, event: gr.SelectData) -> str:
        session.open(at(session.steps, event))
        return f"Step {event.index + 1} again."

    @told
    def example(self, session: Session, event: gr.SelectData) -> str:
        image, text = at(self.examples, event)
        self.choose(session, image)
        return self.ask(session, text)

    @told
    def upload(self, session: Session, path: str | None) -> str:
        session.source = session.picture = None
        if path is None:
            return "Choose a picture or drop one in."
        session.take(*self.dropped(path))
        return "Now say what should change."

    def look_at(self, path: str) -> tuple[Source, Image.Image]:
        """An upload, after which it is removed; what is said of it names it as the visitor does."""
        if path not in self.uploads:
            raise InputError("this upload is no more there: drop the picture in again")
        try:
            return self.gallery.picture(path), thumbnail(Path(path))
        except InputError as error:
            raise InputError(str(error).replace(path, Path(path).name)) from None
        finally:
            self.uploads.remove(path)

    @told
    def find(self, session: Session, text: str | None) -> str:
        return self.ask(session, printable(text or ""))

    def ask(self, session: Session, text: str) -> str:
        session.text = text
        if session.source is None:
            raise InputError("choose a picture first, or drop one in")
        start = time.perf_counter()
        hits = self.gallery.search(session.source, text, self.k, leave_out=True)
        taken = time.perf_counter() - start
        session.hits = hits
        session.steps = [*session.steps, Step(session.source, session.picture, text.strip(), hits)][-LONGEST_TRAIL:]
        unknown = self.gallery.encoder.unknown(text)
        note = f" Not known to the model: {', '.join(unknown)}." if unknown else ""
        return (f"The best {len(hits)} of {self.gallery.size:,} images, in {1000 * taken:.0f} ms, with their cosine to "
                f"the query. Click one to go on from it.{note}")

    def search_by_file(self, image: gr.FileData, text: str = "", k: int = 20) -> list[dict]:
        """The k images nearest to an uploaded picture plus a change: [{"rank", "score", "image"}], best first; image is
        a path below the gallery's folder."""
        path = image.get("path") if isinstance(image, dict) else None
        if not isinstance(path, str):
            raise gr.Error("give the picture as a file: gradio_client.handle_file(PATH)", print_exception=False)
        return self.answer(lambda: self.dropped(path)[0], text, k)

    def search_by_path(self, path: str, text: str = "", k: int = 20) -> list[dict]:
        """The same for one of the gallery's own images, named by its path below the gallery's folder."""
        def source() -> Source:
            image = self.gallery.images.id_of(str(path))
            if image is None:
                raise InputError("the gallery has no image of this path")
            return self.gallery.own_picture(image)
        return self.answer(source, text, k)

    def answer(self, source: Callable[[], Source], text: str, k: int) -> list[dict]:
        if not isinstance(text, str) or not isinstance(k, int) or not 1 <= k <= MOST_RESULTS:
            raise gr.Error(f"text is a string, k a number from 1 to {MOST_RESULTS}", print_exception=False)
        try:
            hits = self.gallery.search(source(), printable(text), k)
        except InputError as error:
            raise gr.Error(html.escape(printable(str(error))), print_exception=False) from None
        # Not "path": Gradio's client takes what has one for a file to download.
        return [{"rank": rank, "score": hit.score, "image": printable(str(hit.path.relative_to(self.gallery.folder)))}
                for rank, hit in enumerate(hits, start=1)]

    def build(self) -> gr.Blocks:
        opt = self.gallery.encoder.opt
        hint = "what you look for" if opt.get("use_complete_text_query") else "what should change"
        such = f", such as: {self.gallery.encoder.examples[0]}" if self.gallery.encoder.examples else ""
        with gr.Blocks(title="A picture plus a change", fill_width=True, delete_cache=(300, 3600)) as blocks:
            session = gr.State(Session(), time_to_live=86400)
            blocks.queue(max_size=200)
            gr.Markdown("## A picture plus a change")
            gr.HTML(html.escape(f"{opt.get('model', 'model')} over {self.gallery.size:,} images"))
            with gr.Row(elem_id="board"):
                with gr.Column(scale=2, min_width=300):
                    picture = gr.Image(label="Picture", sources=["upload", "clipboard"], type="filepath", height=230,
                                       buttons=[], elem_id="picture", format="jpeg")
                    picture.preprocess = path_of                                # Gradio would open it itself, and fail
                    text = gr.Textbox(label="Change", placeholder=hint + such, elem_id="change", max_lines=3,
                                      info="empty: images that look like the picture")
                    button = gr.Button("Search", variant="primary", elem_id="search")
                    with gr.Column(elem_id="offers"):
                        if self.examples:
                            gr.Markdown("**Examples**: click one")
                        examples = picture_grid("examples", [(self.small(image), words)
                                                             for image, words in self.examples])
                        gr.Markdown("**From the gallery**: click one")
                        choice = picture_grid("choice")
                        with gr.Row():
                            part = gr.Textbox(show_label=False, container=False, placeholder="part of a file's path",
                                              elem_id="part", scale=2, min_width=120)
                            others = gr.Button("Show others", size="sm", elem_id="others", scale=1, min_width=100)
                with gr.Column(scale=5, min_width=320):
                    status = gr.HTML(elem_id="status")
                    trail = picture_grid("trail")
                    results = picture_grid("results")
            outputs = [session, picture, text, status, results, trail, choice]
            listen = {"outputs": outputs, "api_visibility": "private", "show_progress": "hidden"}
            blocks.load(self.start, session, **listen)
            gr.on([button.click, text.submit], self.find, [session, text], **listen).then(None, js=TO_RESULTS)
            gr.on([others.click, part.submit], self.offer, [session, part], **listen)
            gr.on([picture.upload, picture.clear], self.upload, [session, picture], **listen)
            for grid, handler in ((choice, self.choose_offered), (results, self.go_on), (trail, self.reopen),
                                  (examples, self.example)):
                grid.select(handler, session, **listen)
            gr.api(self.search_by_file, api_name="search")
            gr.api(self.search_by_path, api_name="search_gallery")
        return blocks


def at(items: list, event: gr.SelectData):
    """The item clicked on. Raises InputError where there is none: a page may be older than what it shows."""
    if not isinstance(event.index, int) or not 0 <= event.index < len(items):
        raise InputError("that is no more there: search again")
    return items[event.index]


def path_of(payload) -> str | None:
    """Of the file that was dropped in."""
    return payload.path if payload else None


def pictures(items: list) -> gr.Gallery:
    """New content of a grid, nothing in it selected; no empty grid is shown."""
    return gr.Gallery(items, selected_index=None, visible=bool(items))


def picture_grid(name: str, items: Sequence = ()) -> gr.Gallery:
    """Pictures to click on."""
    return gr.Gallery(list(items), elem_id=name, elem_classes="pictures", show_label=False, container=False,
                      allow_preview=False, buttons=[], format="jpeg", object_fit="cover", interactive=False,
                      visible=bool(items))


@contextmanager
def serving(gallery: Gallery, k: int, host: str, port: int, allowed: Iterable[str] = ()) -> Iterator[str]:
    """The page, served meanwhile; yields its address. allowed: other names it goes by. Raises InputError where the
    address cannot be had."""
    names = Names(host, allowed)
    with listening(host, port) as listener, temporary_folder() as folder:
        os.environ["GRADIO_TEMP_DIR"] = routes.DEFAULT_TEMP_DIR = str(folder)   # or it leaves a folder "gradio"
        uploads = Uploads(folder)
        app, blocks = FastAPI(openapi_url=None), Page(gallery, k, uploads).build()
        app.add_route(UPLOAD, uploads.take, methods=["POST"])                   # in place of Gradio's
        gr.mount_gradio_app(app, blocks, "/", show_error=False, max_file_size=LARGEST_UPLOAD, ssr_mode=False, css=STYLE,
                            theme=gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
                            footer_links=["api"], run_history=False, enable_monitoring=False, pwa=False,
                            mcp_server=False)
        blocks.has_launched, blocks.state_session_capacity = True, SESSIONS     # launched: it checks paths it is sent
        with running(Guard(app, names), listener):
            yield f"http://{address(host.strip('[]'), port)}"


def open_page(gallery: Gallery, k: int, host: str, port: int, allowed: Iterable[str] = ()) -> None:
    """Serve the page until the program is stopped."""
    with serving(gallery, k, host, port, allowed) as url:
        print(f"The page is at {url} (Ctrl-C ends it)", flush=True)
        threading.Event().wait()


async def nothing_from_outside(url: str, cache_dir: str) -> str:
    raise gr.Error("give a file, not an address", print_exception=False)


class OneLine:
    """In place of the module traceback where Gradio prints what a request has raised."""

    @staticmethod
    def print_exc() -> None:
        log.warning("a request failed: %s", in_one_line(sys.exception()))


processing_utils.async_ssrf_protected_download = nothing_from_outside
queueing.traceback = OneLine
