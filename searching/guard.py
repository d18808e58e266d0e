"""What stands before the page: who may ask, how much they may send, and what is left when the program ends.

Gradio serves many doors that this page does not use, and answers what is malformed with tracebacks: so everything comes
through one small layer, and what the layer does not know is refused there.
"""

import asyncio
import fcntl
import glob
import ipaddress
import logging
import os
import re
import secrets
import shutil
import socket
import tempfile
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import uvicorn
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from machine.errors import InputError

FOLDER = "search-page-"                                                         # begins the temporary folders' names
LARGEST_JSON = 2**20                    # bytes
LARGEST_UPLOAD = 50 * 2**20             # bytes of a file
FRAMING = 2**16                         # bytes that a form adds to its file
MOST_UPLOADS = 4 * LARGEST_UPLOAD       # bytes of all uploads, those on their way among them
KEPT_UPLOAD = 300                       # seconds that an upload waits to be looked at
PATIENCE = 60                           # seconds for the rest of a body that is refused
UPLOAD = "/gradio_api/upload"
# What the page and Gradio's client ask for, by method; Gradio has forty more, some of which fetch from other hosts.
DOORS = {
    "GET": re.compile(r"/|/(assets|static)/.+|/(config|theme\.css|favicon\.ico|manifest\.json|robots\.txt)/?"
                      r"|/gradio_api/(info|app_id|startup-events|theme\.css|queue/(data|status))/?"
                      r"|/gradio_api/(heartbeat/\w{1,100}|call/(v2/)?\w+/\w{1,100}|file=/.+)"),
    "POST": re.compile(r"/gradio_api/(upload|queue/join|call/(v2/)?\w+|cancel|reset)/?")}
DOORS["HEAD"] = DOORS["GET"]
# The browser itself keeps the page from other hosts, and others from framing it. Gradio needs what is 'unsafe'.
HEADERS = {"Content-Security-Policy": "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src "
                                      "'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'",
           "X-Content-Type-Options": "nosniff", "Referrer-Policy": "same-origin"}
SENT = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]

log = logging.getLogger(__name__)


class Refused(Exception):
    """An answer of 4xx or 503: the status, and a sentence."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


def listening(host: str, port: int) -> socket.socket:
    """A socket on the address; "::" takes IPv4 too. Raises InputError where the address cannot be had."""
    host = host.strip("[]")
    try:
        family = min(found[0] for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))     # IPv4 first
        return socket.create_server((host, port), family=family, backlog=2048,
                                    dualstack_ipv6=host == "::" and socket.has_dualstack_ipv6())
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot listen on {address(host, port)} ({reason}); choose another --port or "
                         "--host") from None


def address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder that goes with the program; those of programs that were killed go now."""
    for left in glob.glob(f"{glob.escape(tempfile.gettempdir())}/{FOLDER}*"):
        with suppress(OSError):                                                 # in use, or another user's
            handle = locked(left)
            shutil.rmtree(left, ignore_errors=True)
            os.close(handle)
    folder, handle = own_folder()
    try:
        yield Path(folder).resolve()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def own_folder() -> tuple[str, int]:
    """A new folder, and the handle that keeps it locked."""
    while True:
        folder = tempfile.mkdtemp(prefix=FOLDER)
        with suppress(FileNotFoundError, BlockingIOError):
            handle = locked(folder)
            if os.path.exists(folder):
                return folder, handle
            os.close(handle)                                                    # another took it for a dead one's


def locked(folder: str) -> int:
    """A handle of the folder, locked as long as it is open. Raises OSError where it is in use or another user's."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if os.fstat(handle).st_uid != os.geteuid():
            raise PermissionError(f"{folder} is another user's")
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return handle
    except OSError:
        os.close(handle)
        raise


class Names:
    """Which names the page goes by: its own addresses, this machine's name, and those given by --allow_host.

    Another site that has its name point here (DNS rebinding) is told apart by the Host that the browser sends, and
    another site's script by its Origin. Raises InputError where a given name is none.
    """

    FORM = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(:(?P<port>[0-9]{1,5}))?", re.IGNORECASE)

    def __init__(self, host: str, given: Iterable[str] = ()):
        self.given = {self.split(name)[0] for name in given}
        if None in self.given:
            raise InputError(f"--allow_host {' '.join(given)!r} is no host name; give one such as search.example.org")
        machine = socket.gethostname().lower()
        self.own = {"localhost", "127.0.0.1", "::1", host.strip("[]").lower(), machine, machine.split(".")[0]}

    def split(self, text: str) -> tuple[str | None, str | None]:
        """Name and port; no name where the text is no host's."""
        found = self.FORM.fullmatch(text)
        return (found["name"].strip("[]").rstrip(".").lower(), found["port"]) if found else (None, None)

    def check(self, headers: list[tuple[bytes, bytes]], reached: str) -> None:
        """reached: this machine's address that the visitor has connected to. Raises Refused."""
        own = self.own | {reached}
        values = {key: [value.decode("latin-1") for name, value in headers if name == key]
                  for key in (b"host", b"x-forwarded-host", b"origin")}
        hosts = [self.split(host) for host in values[b"host"]]
        for name, _ in hosts or [(None, None)]:
            if name not in own | self.given:
                raise Refused(403, f"this page does not go by the name {name!r} (--allow_host NAME names others)")
        for value in ",".join(values[b"x-forwarded-host"]).split(","):
            if value.strip() and self.split(value.strip())[0] not in own | self.given:
                raise Refused(403, "this page does not go by the name that a proxy forwards (--allow_host NAME)")
        for origin in values[b"origin"]:
            scheme, _, rest = origin.partition("://")
            name, port = self.split(rest)
            same = name in own and any(port == its for _, its in hosts)
            if scheme not in ("http", "https") or not (same or name in self.given):
                raise Refused(403, f"pages of {origin[:100]!r} may not use this one")


class Uploads:
    """Visitors' pictures on disk, each until it was looked at (remove), KEPT_UPLOAD seconds at most."""

    def __init__(self, folder: Path):
        self.folder = folder / "uploads"
        self.folder.mkdir()
        self.kept: dict[str, int] = {}                                          # path -> bytes, oldest first
        self.coming = 0                                                         # bytes
        self.lock = threading.Lock()

    def __contains__(self, path: str) -> bool:
        return path in self.kept

    async def take(self, request: Request) -> Response:
        """The route's answer: the paths under which the files are kept."""
        length = int(request.headers["content-length"])
        self.coming += length
        try:
            self.make_room()
            async with asyncio.timeout(KEPT_UPLOAD), request.form(max_files=10, max_fields=10) as form:
                files = [file for _, file in form.multi_items() if isinstance(file, UploadFile)]
                if not files:
                    raise Refused(400, "an upload without a file")
                paths = [await run_in_threadpool(self.keep, file) for file in files]
        except TimeoutError:
            raise Refused(408, "an upload took too long") from None
        finally:
            self.coming -= length
        for path in paths:
            asyncio.get_running_loop().call_later(KEPT_UPLOAD, self.remove, path)
        return JSONResponse(paths)

    def make_room(self) -> None:
        """The oldest go. Raises Refused where those that come are too many already."""
        if self.coming > MOST_UPLOADS:
            raise Refused(503, "too many uploads at once: try again")
        while self.kept and sum(self.kept.values()) + self.coming > MOST_UPLOADS:
            self.remove(next(iter(self.kept)))

    def keep(self, file: UploadFile) -> str:
        """The path of a copy in a folder of its own, so that none is another visitor's, under its own name."""
        name = re.sub(r"[/\0]", "_", file.filename or "").encode("utf-8", "replace")[:200].decode("utf-8", "ignore")
        path = self.folder / secrets.token_hex(16) / (name if name.strip(".") else "picture")
        try:
            path.parent.mkdir()
            with self.lock:
                self.kept[str(path)] = file.size
            with open(path, "xb") as copy:
                shutil.copyfileobj(file.file, copy)
        except OSError as error:
            self.remove(str(path))
            raise Refused(507, f"the upload cannot be kept ({error.strerror})") from None
        return str(path)

    def remove(self, path: str) -> None:
        """No other files than uploads."""
        with self.lock:
            kept = self.kept.pop(path, None)
        if kept is not None:
            shutil.rmtree(Path(path).parent, ignore_errors=True)


class Guard:
    """The app behind the checks (ASGI): names, doors, sizes. What it cannot take is answered 4xx, and logged."""

    def __init__(self, app: Callable, names: Names):
        self.app, self.names = app, names

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":                                             # the server's start and end
            return await self.app(scope, receive, send)
        started = failed = heard = False

        async def listen() -> dict:
            nonlocal heard
            message = await receive()
            heard = not message.get("more_body")
            return message

        async def answer(message: dict) -> None:
            nonlocal started, failed
            if message["type"] == "http.response.start":
                failed = message["status"] == 500                               # and its exception follows
                started = not failed
                message["headers"] = [*message.get("headers", ()), *SENT]
            if not failed:
                await send(message)

        try:
            self.check(scope)
            await self.app(scope, await self.body(scope, listen), answer)
            if not failed:
                return
            refused = Refused(400, "not understood")
        except Gone:
            return
        except Refused as error:
            refused = error
        except Exception as error:                                              # anything, for what no page sends
            refused = Refused(400, f"not understood: {in_one_line(error)}")
        log.warning("refused %s %r: %s", scope["method"], scope["path"][:200], refused)
        if started:                                                             # a stream, then: it ends here
            with suppress(Exception):
                await send({"type": "http.response.body"})
        else:
            if not heard:                                                       # who still sends would not hear it
                await drain(listen)
            await PlainTextResponse(f"{refused}\n", refused.status, HEADERS)(scope, listen, send)

    def check(self, scope: dict) -> None:
        """Raises Refused."""
        self.names.check(scope["headers"], plain((scope.get("server") or ("",))[0]))
        method, door = scope["method"], DOORS.get(scope["method"])
        if door is None:
            raise Refused(405, f"no {method[:20]} here")
        if not door.fullmatch(scope["path"]):
            raise Refused(404, "there is no such page")

    async def body(self, scope: dict, receive: Callable) -> Callable:
        """`receive` for the app. A body is read before the app is asked, but for an upload's. Raises Refused, Gone."""
        headers = dict(scope["headers"])
        length = int(headers.get(b"content-length", -1))
        if scope["path"].rstrip("/") == UPLOAD:
            if length < 0:
                raise Refused(411, "an upload without Content-Length")
            if length > LARGEST_UPLOAD + FRAMING:
                raise Refused(413, f"an upload of more than {LARGEST_UPLOAD // 2**20} MB")
            return receive
        if length > LARGEST_JSON:
            raise Refused(413, f"a request of more than {LARGEST_JSON // 2**20} MB")
        content = b""
        try:
            async with asyncio.timeout(PATIENCE):
                async for part in parts(receive):
                    content += part
                    if len(content) > LARGEST_JSON:
                        raise Refused(413, f"a request of more than {LARGEST_JSON // 2**20} MB")
        except TimeoutError:
            raise Refused(408, "the request does not come to an end") from None
        rest = iter([{"type": "http.request", "body": content, "more_body": False}])

        async def again() -> dict:
            return next(rest, None) or await receive()
        return again


class Gone(Exception):
    """The visitor has left: there is no one to answer."""


async def parts(receive: Callable) -> AsyncIterator[bytes]:
    """Of a request's body. Raises Gone."""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Gone
        yield message.get("body", b"")
        if not message.get("more_body"):
            return


async def drain(receive: Callable) -> None:
    """The rest of a body is read and kept nowhere."""
    with suppress(TimeoutError, Gone):
        async with asyncio.timeout(PATIENCE):
            async for _ in parts(receive):
                pass


def plain(host: str) -> str:
    """The address, IPv4 as such where an IPv6 socket has it."""
    with suppress(ValueError):
        found = ipaddress.ip_address(host)
        return str(getattr(found, "ipv4_mapped", None) or found)
    return host


def in_one_line(error: BaseException) -> str:
    """What it is and where it was raised, in place of a traceback."""
    where = traceback.extract_tb(error.__traceback__)[-1:]
    place = "".join(f" ({os.path.basename(frame.filename)}:{frame.lineno})" for frame in where)
    return f"{type(error).__name__} {str(error)[:200]!r}{place}"


@contextmanager
def running(app: Callable, listener: socket.socket) -> Iterator[threading.Thread]:
    """The app served by a thread, so that signals are heard as everywhere else."""
    server = uvicorn.Server(uvicorn.Config(app, ws="none", lifespan="on", log_config=None, log_level="warning",
                                           access_log=False, server_header=False, limit_concurrency=1000,
                                           timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    try:
        while thread.is_alive() and not server.started:
            thread.join(0.01)
        if not server.started:
            raise InputError("the page could not be started")
        yield thread
    finally:
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)           # open pages are cut off: no news
        server.should_exit = True
        thread.join(10)
