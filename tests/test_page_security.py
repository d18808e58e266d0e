"""What a stranger may do to search.py's page: a real process asked over real connections, and its parts alone."""

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

import search
from machine.errors import InputError
from searching import guard

from .services import ROOT, free_ports, serving_page

JSON = {"Content-Type": "application/json"}
JOIN = "/gradio_api/queue/join"


def answer(port, method, path, body=None, host="127.0.0.1", **headers):
    """Status, headers and content; `_` in a header's name is a dash."""
    connection = http.client.HTTPConnection(host, port, timeout=120)
    with contextlib.closing(connection):
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()


def form(*files, boundary="x"):
    """A form's body with (name, content) each, and its header."""
    parts = [b'--%b\r\nContent-Disposition: form-data; name="files"; filename="%b"\r\n\r\n%b\r\n'
             % (boundary.encode(), name.encode(), content) for name, content in files]
    return b"".join([*parts, b"--%b--\r\n" % boundary.encode()]), f"multipart/form-data; boundary={boundary}"


def upload(port, name, content):
    body, kind = form((name, content))
    status, _, paths = answer(port, "POST", guard.UPLOAD, body, Content_Type=kind)
    assert status == 200, paths
    return json.loads(paths)[0]


def call(page, name, *data):
    """A program's question: the event stream's text."""
    _, _, event = answer(page.port, "POST", f"/gradio_api/call/{name}", json.dumps({"data": data}), **JSON)
    return answer(page.port, "GET", f"/gradio_api/call/{name}/{json.loads(event)['event_id']}")[2].decode()


@pytest.mark.parametrize("host", ["evil.example", "evil.example:{port}", "localhost.evil.example:{port}", "", "a b",
                                  "127.0.0.1@evil.example", "8.8.8.8:{port}", "localhost/.evil.example",
                                  "[::2]:{port}"])
def test_a_name_that_is_not_the_pages_is_refused(web_page, host):
    host = host.format(port=web_page.port)
    for method, path in (("GET", "/"), ("GET", "/config"), ("POST", JOIN), ("OPTIONS", JOIN), ("POST", guard.UPLOAD)):
        status, headers, _ = answer(web_page.port, method, path, Host=host)
        assert status == 403 and not any(name.startswith("access-control") for name in headers)
    assert answer(web_page.port, "GET", "/", X_Forwarded_Host=host)[0] == (403 if host else 200)
    assert answer(web_page.port, "GET", "/", Host=host, Upgrade="websocket", Connection="Upgrade",
                  Sec_WebSocket_Version="13", Sec_WebSocket_Key="AAAAAAAAAAAAAAAAAAAAAA==")[0] == 403


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost:1", "https://127.0.0.1", "",
                                    "file://", "http://127.0.0.1:{port}.evil.example", "chrome-extension://x"])
def test_a_page_of_another_origin_may_neither_ask_nor_read(web_page, origin):
    origin = origin.format(port=web_page.port)
    for method, path in (("GET", "/"), ("GET", "/gradio_api/heartbeat/x"), ("GET", "/gradio_api/queue/data"),
                         ("POST", JOIN), ("POST", guard.UPLOAD), ("OPTIONS", JOIN)):
        status, headers, _ = answer(web_page.port, method, path, Origin=origin,
                                    Access_Control_Request_Method="POST")
        assert status == 403 and not any(name.startswith("access-control") for name in headers)


def test_the_pages_own_names_and_those_given_are_served(web_page):
    port = web_page.port
    for name in (f"127.0.0.1:{port}", f"localhost:{port}", f"LOCALHOST:{port}", f"[::1]:{port}", "search.example.org",
                 f"{socket.gethostname()}:{port}"):
        assert answer(port, "GET", "/", Host=name)[0] == 200, name
        assert answer(port, "GET", "/", Host=name, Origin=f"http://{name}")[0] == 200, name
    assert answer(port, "GET", "/", Origin="https://search.example.org")[0] == 200      # by a proxy
    assert answer(port, "GET", "/", X_Forwarded_Host="search.example.org")[0] == 200


def test_a_wildcard_goes_by_the_address_that_was_reached():
    names = guard.Names("0.0.0.0")
    names.check([(b"host", b"192.168.7.5:7860"), (b"origin", b"http://192.168.7.5:7860")], "192.168.7.5")
    for reached in ("192.168.7.6", ""):
        with pytest.raises(guard.Refused):
            names.check([(b"host", b"192.168.7.5:7860")], reached)
    assert guard.plain("::ffff:192.168.7.5") == "192.168.7.5" and guard.plain("0:0::1") == "::1"


def test_the_browser_is_told_to_ask_no_other_host(web_page):
    _, headers, content = answer(web_page.port, "GET", "/")
    policy = headers["content-security-policy"]
    assert "default-src 'self'" in policy and "frame-ancestors 'self'" in policy
    assert "http:" not in policy and "https:" not in policy and "*" not in policy
    assert b"fonts.g" not in content and b"cdnjs" not in content


MALFORMED = [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 500_000, b"{}", b'{"data": 5}', b'{"data": []}',
             *(json.dumps({"session_hash": "x", "data": [], **more}).encode() for more in (
                 {"fn_index": 999}, {"fn_index": -1}, {"fn_index": "a"}, {"fn_index": None}, {"session_hash": []},
                 {"fn_index": 1, "trigger_id": "x"}, {"fn_index": 10**400}))]


@pytest.mark.parametrize("body", MALFORMED, ids=lambda body: body[:40].decode("latin-1"))
def test_a_malformed_request_is_answered_4xx(web_page, body):
    before = len(web_page.output().splitlines())
    for path in (JOIN, "/gradio_api/call/nothing"):
        assert 400 <= answer(web_page.port, "POST", path, body, **JSON)[0] < 500
    assert len(web_page.output().splitlines()) - before <= 2 and "Traceback" not in web_page.output()


def test_what_fails_in_a_handler_is_one_line_and_no_traceback(web_page):
    for index in range(11):
        for data in ([], [None], [None, 5], [None, {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}],
                     [None, {"path": "http://127.0.0.1:1/x", "meta": {"_type": "gradio.FileData"}}], [[[]]] * 3):
            for event in (None, {}, {"index": "x"}, {"index": [10**9]}):
                body = {"session_hash": f"s{index}", "fn_index": index, "data": data, "event_data": event}
                assert answer(web_page.port, "POST", JOIN, json.dumps(body), **JSON)[0] == 200
    assert "rank" in call(web_page, "search_gallery", "<b>x/5.jpg", "", 3)                  # all others are done by now
    assert "Traceback" not in web_page.output() and "ConnectError" not in web_page.output()


@pytest.mark.parametrize("path", [
    "/gradio_api/proxy=http://127.0.0.1:1/", "/gradio_api/file=http://127.0.0.1:1/", "/gradio_api/deep_link",
    "/gradio_api/runs", "/gradio_api/run-history/buckets", "/monitoring", "/docs", "/openapi.json", "/login",
    "/gradio_api/stream/x/y/1/playlist.m3u8", "/gradio_api/dev/reload", "/gradio_api/vibe-code", "/%00", "/gradio_api",
    "/gradio_api/custom_component/x/client/y/z"])
def test_doors_that_the_page_does_not_use_are_shut(web_page, path):
    assert answer(web_page.port, "GET", path)[0] == 404
    assert answer(web_page.port, "POST", path, b"{}", **JSON)[0] == 404
    assert answer(web_page.port, "DELETE", path)[0] == 405


def test_bodies_are_bounded(web_page):
    large = b'{"data": ["' + b"a" * 2**20 + b'"]}'
    for path in (JOIN, "/gradio_api/call/search", "/gradio_api/cancel"):
        assert answer(web_page.port, "POST", path, large, **JSON)[0] == 413
        assert answer(web_page.port, "POST", path, iter([large] * 20), **JSON)[0] == 413    # chunked: no length is told
    body, kind = form(("a.jpg", bytes(guard.LARGEST_UPLOAD + 2**20)))
    assert answer(web_page.port, "POST", guard.UPLOAD, body, Content_Type=kind)[0] == 413
    assert answer(web_page.port, "POST", guard.UPLOAD, iter([b"x"]), Content_Type=kind)[0] == 411
    for body, kind in ((b"x", "multipart/form-data"), (b"x", "multipart/form-data; boundary=y"), (b"x", "text/plain"),
                       form()):
        assert answer(web_page.port, "POST", guard.UPLOAD, body, Content_Type=kind)[0] == 400


def test_uploads_are_bounded_in_total_and_removed_when_looked_at(web_page, gallery, monkeypatch):
    def kept():
        return sum(file.stat().st_size for file in web_page.temporary.glob("*/uploads/*/*"))
    large = bytes(guard.LARGEST_UPLOAD - 2**10)
    paths = [upload(web_page.port, "large.jpg", large) for _ in range(6)]
    assert kept() <= guard.MOST_UPLOADS and os.path.exists(paths[-1]) and not os.path.exists(paths[0])
    for path in paths:
        assert "event: error" in call(web_page, "search", {"path": path}, "", 3)
        assert not os.path.exists(path)
    assert kept() == 0
    path = upload(web_page.port, "mine.jpg", (gallery / "<b>x" / "5.jpg").read_bytes())
    for text in ("", "wet", "wet"):                                             # one upload answers many questions
        assert '"rank": 1' in call(web_page, "search", {"path": path}, text, 3)
    assert not os.path.exists(path)
    for name in ("../../x", "..", ".", "", "a\0b", "/etc/passwd", "é" * 300):
        path = upload(web_page.port, name, b"text")
        assert os.path.dirname(os.path.dirname(path)).endswith("/uploads") and os.path.isfile(path)
        assert "picture" in call(web_page, "search", {"path": path}, "", 3)
    assert kept() == 0


def test_an_upload_that_breaks_off_leaves_nothing(web_page):
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", web_page.port), timeout=60) as broken:
            body, kind = form(("broken.jpg", bytes(2**21)))
            broken.sendall(f"POST {guard.UPLOAD} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9000000\r\n"
                           f"Content-Type: {kind}\r\n\r\n".encode() + body)
    path = upload(web_page.port, "whole.jpg", b"text")
    assert [str(file) for file in web_page.temporary.glob("*/uploads/*/*")] == [path]
    call(web_page, "search", {"path": path}, "", 3)


@pytest.mark.long("waits for the time")
def test_an_upload_nobody_asks_about_is_removed_in_time(gallery_index, tmp_path, monkeypatch):
    """And an address of IPv6 is an address, in this process."""
    from searching import page
    monkeypatch.setattr(guard, "KEPT_UPLOAD", 0.5)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (port,), opened = free_ports(1), search.open_index(search.get_parser().parse_args(["serve", "--index",
                                                                                       str(gallery_index)]))
    with page.serving(opened, 8, "::", port) as url:
        assert url == f"http://[::]:{port}"
        for host in ("::1", "127.0.0.1"):
            assert answer(port, "GET", "/", host=host)[0] == 200
            assert answer(port, "GET", "/", host=host, Host="evil.example")[0] == 403
        path = upload(port, "a.jpg", b"text")
        end = time.monotonic() + 60
        while os.path.exists(path):
            assert time.monotonic() < end
            time.sleep(0.05)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("host", "said"), [
    ("192.0.2.1", "Cannot assign requested address"), ("no-such-host.invalid", "not known|failure in name"),
    ("127.0.0.1", "Address already in use"), ("a" * 300, "too long|not known"), ("2001:db8::1", "Cannot assign")])
def test_an_address_that_cannot_be_had_is_said_as_it_is(host, said):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(InputError, match=f"({said}).*--port"):
        guard.listening(host, taken.getsockname()[1])


def test_a_port_in_use_is_one_line_and_nothing_is_left_behind(gallery_index, tmp_path, web_page, capfd, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert search.main(["serve", "--index", str(gallery_index), "--port", str(web_page.port)]) == 2
    said = capfd.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "Address already in use" in said[0] and "choose another --port" in said[0]
    assert search.main(["serve", "--index", str(gallery_index), "--allow_host", "http://x/"]) == 2
    assert "is no host name" in capfd.readouterr().err and list(tmp_path.iterdir()) == []


@pytest.mark.long("two more pages")
def test_a_killed_page_leaves_a_folder_that_the_next_start_removes(gallery_index, tmp_path):
    """The folder of a living one is left; IPv6 and SIGTERM as they come."""
    (port,) = free_ports(1)
    holding = ("import time; from searching.guard import temporary_folder\nwith temporary_folder() as folder:\n"
               " (folder / 'file').touch(); print(folder, flush=True); time.sleep(600)")
    held = [subprocess.Popen([sys.executable, "-c", holding], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                             env={**os.environ, "TMPDIR": str(tmp_path)}) for _ in range(2)]
    try:
        killed, living = (process.stdout.readline().strip() for process in held)
        held[0].kill()
        held[0].wait(60)
        assert os.path.exists(killed) and os.path.exists(living)
        (tmp_path / f"{guard.FOLDER}link").symlink_to("/tmp")
        with serving_page(gallery_index, port, tmp_path, "--host", "::1") as page:
            assert f"http://[::1]:{port}" in page.output()
            assert answer(port, "GET", "/", host="::1")[0] == 200
            assert not os.path.exists(killed) and os.path.exists(living) and os.path.exists(f"{living}/file")
            heartbeat = urllib.request.urlopen(f"http://[::1]:{port}/gradio_api/heartbeat/x", timeout=60)
            upload_left = upload_to(port)
            assert os.path.exists(upload_left)
        heartbeat.close()
        assert page.process.returncode == 143 and "Traceback" not in page.output()
        assert {entry.name for entry in tmp_path.iterdir()} == {os.path.basename(living), f"{guard.FOLDER}link"}
    finally:
        for process in held:
            process.kill()
            process.wait(60)


def upload_to(port):
    body, kind = form(("left.jpg", b"text"))
    return json.loads(answer(port, "POST", guard.UPLOAD, body, host="::1", Content_Type=kind)[2])[0]
