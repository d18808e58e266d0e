"""What stands before the page: by which names it goes, how much may be sent, and that no answer is a traceback."""

import asyncio
import ipaddress
import logging
import os
import re
import socket
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

import uvicorn
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from machine.errors import InputError
from searching.gallery import printable

LARGEST_UPLOAD = 50 * 2**20             # bytes of a file
FRAMING = 2**16                         # bytes that a form adds to its file
MOST_UPLOADS = 4 * LARGEST_UPLOAD       # bytes of all bodies on their way, or being looked at
SLOWEST = 300                           # seconds that a body may take
PATIENCE = 60                           # seconds for the rest of a body that is refused
# The browser itself keeps the page from other hosts, from scripts that are not its own, and others from framing it.
HEADERS = {"Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
                                      "img-src 'self' blob:; base-uri 'none'; form-action 'self'; "
                                      "frame-ancestors 'self'",
           "X-Content-Type-Options": "nosniff", "Referrer-Policy": "same-origin", "Cache-Control": "no-cache"}

log = logging.getLogger(__name__)


class Refused(HTTPException):
    """An answer of 4xx or 503: the status, and a sentence."""

    def __str__(self) -> str:
        return self.detail


def refusal(scope: dict, status: int, reason: str) -> JSONResponse:
    """What is answered in place of what was asked for; one line in the log."""
    log.warning("refused %s %r: %s", scope["method"][:20], scope["path"][:200], printable(reason))
    return JSONResponse({"error": printable(reason)}, status)


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
                raise Refused(403, f"pages of {origin[:100]!r} may not use this one; where it is this page "
                              "behind a proxy, start it with --allow_host NAME, its name there")


class Body:
    """A request's body on its way to the app, within bounds."""

    def __init__(self, headers: dict[bytes, bytes], receive: Callable):
        self.receive, self.heard = receive, False
        self.deadline = asyncio.get_running_loop().time() + SLOWEST
        self.has_length = b"content-length" in headers
        self.length = int(headers.get(b"content-length", 0))                    # the server has seen that it is one
        self.is_there = self.length > 0 or b"transfer-encoding" in headers

    def check(self, coming: int) -> None:
        """coming: bytes of all bodies, this one's among them. Raises Refused."""
        if self.is_there and not self.has_length:
            raise Refused(411, "a request with a body needs a Content-Length")
        if self.length > LARGEST_UPLOAD + FRAMING:
            raise Refused(413, f"the file has more than {LARGEST_UPLOAD // 2**20} MB; make it smaller")
        if self.length and coming > MOST_UPLOADS:
            raise Refused(503, "too many uploads at once; try again in a moment")

    async def listen(self) -> dict:
        """The next part, or that the visitor has left. Raises Refused."""
        if self.heard:
            return await self.receive()
        try:
            async with asyncio.timeout_at(self.deadline):
                message = await self.receive()
        except TimeoutError:
            self.heard = True                                                   # as much as will be
            raise Refused(408, "the request does not come to an end") from None
        self.heard = message["type"] != "http.request" or not message.get("more_body")
        return message

    async def drain(self) -> None:
        """The rest is read and kept nowhere: who still sends would not hear the answer."""
        with suppress(TimeoutError, Refused):
            async with asyncio.timeout(PATIENCE):
                while self.is_there and not self.heard:
                    await self.listen()


class Guard:
    """The app behind the checks (ASGI): names and sizes before it, headers behind it. What it fails on is one line in
    the log.

    root_path: where a reverse proxy has it, "" or as "/find"; the proxy may take that off what it passes on, or not.
    """

    def __init__(self, app: Callable, names: Names, root_path: str = ""):
        self.app, self.names, self.root_path, self.coming = app, names, root_path, 0

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":                                             # the server's start and end
            return await self.app(scope, receive, send)
        body = Body(dict(scope["headers"]), receive)
        scope = {**scope, "root_path": self.root_path}                          # the app takes it off

        async def answer(message: dict) -> None:
            if message["type"] == "http.response.start":
                await body.drain()
                given = {name for name, _ in message["headers"]}
                message["headers"] += [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()
                                       if name.lower().encode() not in given]
            await send(message)

        self.coming += body.length
        try:
            self.names.check(scope["headers"], plain((scope.get("server") or ("",))[0]))
            body.check(self.coming)
            await self.app(scope, body.listen, answer)
        except Refused as error:
            await refusal(scope, error.status_code, str(error))(scope, receive, answer)
        except Exception as error:                                              # answered by the app's own handler
            log.warning("failed %s %r: %s", scope["method"][:20], scope["path"][:200], in_one_line(error))
        finally:
            self.coming -= body.length


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
