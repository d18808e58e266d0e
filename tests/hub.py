"""A stand-in for a model hub on 127.0.0.1, which huggingface_hub asks where HF_ENDPOINT names it."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """repositories: {"owner/name": {file: bytes}}. What is asked stands in `asked` as (method, path, token or None).

    ways: {path below the hub: what goes wrong there}: "cut" breaks off in the middle of a file, each time; "cut once"
    the first time; "wrong hash" says another SHA-256; a number is answered with that status. gated: {repository: what
    its reader's Authorization must be}.
    """

    def __init__(self, repositories):
        self.repositories, self.ways, self.gated, self.asked, self.address = repositories, {}, {}, [], ""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(False)

    def do_GET(self):
        self.answer(True)

    def answer(self, body):
        hub, path = self.server.hub, urlsplit(self.path).path
        token = self.headers.get("Authorization")
        hub.asked.append((self.command, path, token))
        way = hub.ways.get(path)
        if isinstance(way, int):
            return self.refuse(way, "")
        repository, slash, rest = path.removeprefix("/").partition("/resolve/")
        if path.startswith("/api/models/"):
            return self.api(path.removeprefix("/api/models/"))
        if repository not in hub.repositories or not slash:
            return self.refuse(401, "RepoNotFound")
        if hub.gated.get(repository, token) != token:
            return self.refuse(403 if token else 401, "GatedRepo")
        content = hub.repositories[repository].get(rest.partition("/")[2])
        if content is None:
            return self.refuse(404, "EntryNotFound")
        digest = hashlib.sha256(content).hexdigest()
        if way == "wrong hash":
            digest = "0" * 64
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if start else 200)
        for name, value in {"X-Repo-Commit": COMMIT, "ETag": f'"{digest}"', "X-Linked-Etag": f'"{digest}"',
                            "X-Linked-Size": len(content), "Content-Length": len(content) - start,
                            "Accept-Ranges": "bytes"}.items():
            self.send_header(name, str(value))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if not body:
            return None
        if way in ("cut", "cut once"):
            if way == "cut once":
                del hub.ways[path]
            self.wfile.write(content[start:start + max(1, (len(content) - start) // 2)])
            self.wfile.flush()
            self.connection.close()
            self.close_connection = True
            return None
        self.wfile.write(content[start:])
        return None

    def api(self, what):
        """What is in a repository, as its users' programs ask before they fetch."""
        repository = "/".join(what.split("/")[:2])
        files = self.server.hub.repositories.get(repository)
        if files is None:
            return self.refuse(401, "RepoNotFound")
        tree = [{"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in files.items()]
        told = tree if "/tree/" in what else {"id": repository, "sha": COMMIT, "siblings": [
            {"rfilename": name} for name in files]}
        content = json.dumps(told).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)
        return None

    def refuse(self, status, code):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", "refused")
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextmanager
def serving(repositories):
    """A hub that serves these; its address is `hub.address`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.hub = hub = Hub(repositories)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
