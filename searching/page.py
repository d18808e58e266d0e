"""search.py's web page and its JSON API: one way to ask, for people and for programs.

The page is plain files in static/; all that it shows comes from the API below, and the address of the page holds what
is asked, so that here no visitor is remembered but for the pictures that are dropped in.
"""

import logging
import mimetypes
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from random import sample
from typing import Annotated, Any

from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from fastapi import FastAPI, Query, Request, Response, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.params import Form
from fastapi.responses import FileResponse, JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartParser

from flags import MOST_RESULTS
from machine.errors import InputError
from machine.vocabulary import UNKNOWN, spread
from searching.gallery import Gallery, Source, printable
from searching.guard import LARGEST_UPLOAD, Guard, Names, Refused, address, listening, refusal, running
from searching.metadata import metadata_of
from searching.uploads import LARGE, SMALL, Uploads, jpeg

EXAMPLES = 6
SMALL_COPIES = 3000                     # of the gallery's pictures that are kept, of some 15 kB each
STATIC = {"page.html": "text/html", "page.css": "text/css", "page.js": "text/javascript", "large.js": "text/javascript",
          "parts.js": "text/javascript", "icon.svg": "image/svg+xml"}
FOLDER = Path(__file__).parent / "static"

MultiPartParser.spool_max_size = LARGEST_UPLOAD                                 # bytes: uploads touch no disk
logging.getLogger("python_multipart").setLevel(logging.CRITICAL)                # what is refused is said once


class Question(BaseModel):
    """What is asked of a picture."""
    text: str = Field("", description="what should change, or what is looked for, as the model was trained to be told; "
                      "empty: images that look like the picture")
    k: int = Field(20, ge=1, le=MOST_RESULTS, description="how many results")
    where: str = Field("", description="a condition on the gallery's columns, in SQL")
    nearness: float | None = Field(None, ge=0, le=1, description="how much results shall look like the picture "
                                   "besides; as the server was started with unless given")
    keep: bool = Field(False, description="whether a picture of the gallery may be among its own results")


class OwnPicture(Question):
    """Of a picture that the server knows, by its id or, if it is the gallery's, by its path."""
    image: str = Field("", description="an image's id, or that of an uploaded picture as the answer to it told it")
    path: str = Field("", description="in place of the id: the image's path below the gallery's folder")


class AnyPicture(Question):
    """Of a picture that is sent."""
    file: UploadFile = Field(description="the picture, JPEG, PNG, WebP or another common format, of 50 MB at most")


class Image(BaseModel):
    """One of the gallery's images; path: below its folder."""
    image: int
    path: str
    metadata: dict[str, Any] = {}


class Result(Image):
    """score: the cosine of its feature and the query's, 1 at most, less what `--hubness` takes off."""
    rank: int
    score: float


class SearchResponse(BaseModel):
    """image: the id of the query's picture, with which it can be asked about again; path: its, or an upload's name."""
    image: int | str
    path: str
    metadata: dict[str, Any] = {}
    results: list[Result]
    warnings: list[str] = Field(description="sentences about what was not read as it was given")
    unknown_words: list[str] = Field(description="words that the model does not know, left out of the query")
    seconds: float


class GalleryPage(BaseModel):
    """Some of the gallery's images; count: how many there are to choose from."""
    images: list[Image]
    count: int


class Example(Image):
    """A query to try."""
    text: str


class Model(BaseModel):
    """words: that it knows, in order; null where it can read any. texts: such as it was trained with."""
    model: str
    images: int
    columns: list[str]
    words: list[str] | None
    texts: list[str]
    examples: list[Example]
    looks_for: bool = Field(description="whether a text says what is looked for, and not what should change")
    k: int
    most: int
    nearness: float


class Failure(BaseModel):
    """A sentence that says what is wrong, and what to do."""
    error: str


class Page:
    """What is answered, of one gallery; k, nearness: how many results the page asks for and how near the picture,
    unless a visitor wants others."""

    def __init__(self, gallery: Gallery, k: int, nearness: float = 0.0):
        self.gallery, self.uploads = gallery, Uploads(gallery)
        self.at_work = CapacityLimiter(os.cpu_count() or 1)                     # pictures decoded at once
        self.small = lru_cache(SMALL_COPIES)(lambda file, side, version: jpeg(file, side))
        encoder = gallery.encoder
        texts = spread(encoder.examples, EXAMPLES)
        pictures = self.described(spread(gallery.images.ids(), len(texts) + 2)[1:-1])
        self.about = Model(
            model=encoder.opt.get("model", "model"), images=gallery.size, k=k, most=MOST_RESULTS, nearness=nearness,
            columns=gallery.columns, texts=texts, looks_for=bool(encoder.opt.get("use_complete_text_query")),
            words=encoder.vocabulary and sorted(encoder.vocabulary.word2id.keys() - {UNKNOWN}),
            examples=[Example(**dict(picture), text=text) for picture, text in zip(pictures, texts, strict=False)])

    def warm_up(self) -> None:
        """A text encoder in this process is loaded with the first text: before a visitor has to wait for it."""
        if ":" in self.gallery.encoder.text_encoder:
            with suppress(InputError):                                          # said where a visitor asks
                self.gallery.search(self.gallery.own_picture(self.gallery.images.ids()[0]), "warm up", 1)

    def model(self) -> Model:
        """The model, the gallery, and what one may ask."""
        return self.about

    def images(self, name: Annotated[str, Query(description="part of their paths, in capitals or not")] = "",
               k: Annotated[int, Query(ge=1, le=MOST_RESULTS, description="how many")] = 60,
               shuffle: Annotated[bool, Query(description="others each time, in place of some from first to last")] =
               False) -> GalleryPage:
        """Images of the gallery to choose from."""
        found = self.gallery.images.ids(name.strip())
        chosen = sample(found, min(k, len(found))) if shuffle else spread(found, k)
        return GalleryPage(images=self.described(chosen), count=len(found))

    def described(self, images: list[int]) -> list[Image]:
        """Those that are still listed, in this order."""
        paths = self.gallery.images.paths(images)
        metadata = metadata_of(self.gallery.images, list(paths.values())) if self.gallery.columns else {}
        return [Image(image=image, path=printable(path), metadata=metadata.get(path, {}))
                for image in images if (path := paths.get(image))]

    def search(self, question: Annotated[OwnPicture, Query()]) -> SearchResponse:
        """The images nearest to a picture that the server knows plus a change, best first."""
        if question.image.startswith("u"):
            upload = self.uploads.find(question.image)
            return self.answer(question, upload.source, question.image, upload.name)
        image = self.gallery.images.id_of(question.path) if question.path else number_of(question.image)
        if image is None:
            raise InputError("the gallery has no image of this path")
        source = self.gallery.own_picture(image)
        return self.answer(question, source, image, printable(self.gallery.images.path_of(image) or ""))

    async def search_by_file(
            self, question: Annotated[AnyPicture, Form(media_type="multipart/form-data")]) -> SearchResponse:
        """The same for any picture. The answer tells an id, by which it can be asked about again for an hour."""
        if question.file.size > LARGEST_UPLOAD:
            raise Refused(413, f"the file has more than {LARGEST_UPLOAD // 2**20} MB; make it smaller")
        content, name = await question.file.read(), printable(question.file.filename or "the picture")
        number = await run_sync(self.uploads.take, name, content, limiter=self.at_work)
        upload = self.uploads.find(number)
        return await run_sync(self.answer, question, upload.source, number, name)

    def answer(self, question: Question, source: Source, image: int | str, path: str) -> SearchResponse:
        start, text = time.perf_counter(), printable(question.text)
        nearness = self.about.nearness if question.nearness is None else question.nearness
        hits = self.gallery.search(source, text, question.k, not question.keep, question.where, nearness)
        unknown = self.gallery.encoder.unknown(text)
        warnings = [f"Not known to the model, so left out: {', '.join(unknown)}"] if unknown else []
        if self.gallery.changed():
            warnings.append("The index was changed since this page was started: start it again to search what it holds "
                            "now")
        results = [Result(rank=rank, score=hit.score, image=hit.image, metadata=hit.metadata,
                          path=printable(str(hit.path.relative_to(self.gallery.folder))))
                   for rank, hit in enumerate(hits, start=1)]
        return SearchResponse(image=image, path=path, results=results, warnings=warnings, unknown_words=unknown,
                      metadata=self.gallery.metadata(image, question.where) if isinstance(image, int) else {},
                      seconds=time.perf_counter() - start)

    def original(self, image: int) -> Response:
        """The file of one of the gallery's images."""
        file = self.file(image)
        kind = "image/jpeg" if file.suffix.lower() == ".jfif" else mimetypes.guess_type(file.name)[0] or ""
        return FileResponse(file, media_type=kind if kind.startswith("image/") else "application/octet-stream")

    async def thumbnail(self, image: str, request: Request,
                        large: Annotated[bool, Query(description=f"{LARGE} in place of {SMALL} pixels")] = False
                        ) -> Response:
        """A small copy, as a JPEG, of one of the gallery's images or of an uploaded picture."""
        if image.startswith("u"):
            upload = self.uploads.find(image)
            return await unless_held(request, image, "image/jpeg", lambda: upload.small)
        file = await run_sync(self.file, number_of(image))
        found, side = file.stat(), LARGE if large else SMALL
        version = f"{image}-{found.st_size:x}-{found.st_mtime_ns:x}-{side}"
        return await unless_held(request, version, "image/jpeg", lambda: self.copy(file, side, version), self.at_work)

    def copy(self, file: Path, side: int, version: str) -> bytes:
        return jpeg(file, side) if side == LARGE else self.small(file, side, version)

    def file(self, image: int) -> Path:
        """Raises Refused where it is none of the gallery's, or is gone."""
        try:
            return self.gallery.file(image)
        except InputError:                                                      # which names the whole path
            raise Refused(404, "this image is no longer where it was; run search.py index again") from None

    def app(self) -> FastAPI:
        app = FastAPI(title="A picture plus a change", description=self.__doc__, version="1", docs_url=None,
                      redoc_url=None, exception_handlers=HANDLERS)
        failures = {status: {"model": Failure} for status in ("4XX", "5XX")}
        app.get("/api/model", responses=failures)(self.model)
        app.get("/api/images", responses=failures)(self.images)
        app.get("/api/search", responses=failures)(self.search)
        app.post("/api/search", responses=failures)(self.search_by_file)
        app.get("/images/{image}", response_class=FileResponse, responses=failures)(self.original)
        app.get("/thumbnails/{image}", response_class=Response, responses=failures)(self.thumbnail)
        app.get("/static/{name}", include_in_schema=False)(static)
        app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)(start)
        return app


async def start(request: Request) -> Response:
    return await static("page.html", request)


async def static(name: str, request: Request) -> Response:
    """One of the page's own files."""
    if name not in STATIC:
        raise Refused(404, "there is no such file")
    file = FOLDER / name
    return await unless_held(request, f"{file.stat().st_mtime_ns:x}", STATIC[name], file.read_bytes)


async def unless_held(request: Request, version: str, kind: str, content: Callable[[], bytes],
                      limiter: CapacityLimiter | None = None) -> Response:
    """The content, or that the browser has it in this version already."""
    headers = {"ETag": f'"{version}"', "Cache-Control": "private, no-cache"}
    if headers["ETag"] in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(await run_sync(content, limiter=limiter), media_type=kind, headers=headers)


def number_of(image: str) -> int:
    """Of one of the gallery's images. Raises InputError."""
    if not re.fullmatch("[0-9]{1,18}", image):
        raise InputError(f"{image[:100]!r} is no image's id" if image else "say which: image=ID or path=PATH")
    return int(image)


async def mendable(request: Request, error: InputError) -> Response:
    """What the visitor can mend."""
    return JSONResponse({"error": printable(str(error))}, 400)


async def refused(request: Request, error: HTTPException) -> Response:
    return refusal(request.scope, error.status_code, error.detail)


async def not_understood(request: Request, error: RequestValidationError) -> Response:
    """What is wrong with the first of the parameters that are."""
    wrong = error.errors()[0]
    return refusal(request.scope, 400, f"{'.'.join(map(str, wrong['loc'][1:]))[:100]}: {wrong['msg']}")


async def failed(request: Request, error: Exception) -> Response:
    """A fault of this program, of which the guard logs a line."""
    return JSONResponse({"error": "this failed, and the program's log says where"}, 500)


HANDLERS = {InputError: mendable, HTTPException: refused, RequestValidationError: not_understood, Exception: failed}


@contextmanager
def serving(gallery: Gallery, k: int, host: str, port: int, allowed: Iterable[str] = (),
            root_path: str = "", nearness: float = 0.0) -> Iterator[str]:
    """The page, served meanwhile; yields its address. allowed: other names it goes by; root_path: where a proxy has it;
    port: 0 for any that is free. Raises InputError where the address cannot be had."""
    if not re.fullmatch(r"(/[\w.~-]+)*/?", root_path, re.ASCII):
        raise InputError(f"--root_path {root_path!r} is no path; give one such as /find")
    names = Names(host, allowed)
    page = Page(gallery, k, nearness)
    with listening(host, port) as listener, running(Guard(page.app(), names, root_path.rstrip("/")), listener):
        threading.Thread(target=page.warm_up, daemon=True).start()
        yield f"http://{address(host.strip('[]'), listener.getsockname()[1])}"


def open_page(gallery: Gallery, k: int, host: str, port: int, allowed: Iterable[str] = (), root_path: str = "",
              nearness: float = 0.0) -> None:
    """Serve the page until the program is stopped."""
    with serving(gallery, k, host, port, allowed, root_path, nearness) as url:
        print(f"The page is at {url} (Ctrl-C ends it)", flush=True)
        threading.Event().wait()
