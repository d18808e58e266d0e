"""What a stranger may do to search.py's page: a real process asked over real connections, and its parts alone."""

import contextlib
import http.client
import json
import re
import socket
import time
from urllib.parse import quote

import pytest

import search
from machine.errors import InputError
from searching import guard, page, uploads
from searching.gallery import Gallery

from .conftest import picture
from .services import free_ports

SEARCH = "/api/search"


def answer(port, method, path, body=None, host="127.0.0.1", **headers):
    """Status, headers and content; `_` in a header's name is a dash."""
    connection = http.client.HTTPConnection(host, port, timeout=120)
    with contextlib.closing(connection):
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()


def form(*files, boundary="x", **fields):
    """A form's body with (name, content) of each file, and its header."""
    parts = [b'--%b\r\nContent-Disposition: form-data; name="file"; filename="%b"\r\n\r\n%b\r\n'
             % (boundary.encode(), name.encode(), content) for name, content in files]
    parts += [b'--%b\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n'
              % (boundary.encode(), name.encode(), value.encode("utf-8", "surrogateescape"))
              for name, value in fields.items()]
    return b"".join([*parts, b"--%b--\r\n" % boundary.encode()]), f"multipart/form-data; boundary={boundary}"


@pytest.fixture(scope="module")
def opened(gallery_index):
    return Gallery(gallery_index, "cpu")


@contextlib.contextmanager
def served(opened, **how):
    """The page in this process; yields its port."""
    (port,) = free_ports(1)
    with page.serving(opened, 8, "127.0.0.1", port, **how):
        yield port


@pytest.mark.parametrize("host", ["evil.example", "evil.example:{port}", "localhost.evil.example:{port}", "", "a b",
                                  "127.0.0.1@evil.example", "8.8.8.8:{port}", "localhost/.evil.example",
                                  "[::2]:{port}"])
def test_a_name_that_is_not_the_pages_is_refused(web_page, host):
    host = host.format(port=web_page.port)
    for method, path in (("GET", "/"), ("GET", "/api/model"), ("GET", "/images/1"), ("POST", SEARCH),
                         ("OPTIONS", SEARCH)):
        status, headers, _ = answer(web_page.port, method, path, Host=host)
        assert status == 403 and not any(name.startswith("access-control") for name in headers)
    assert answer(web_page.port, "GET", "/", X_Forwarded_Host=host)[0] == (403 if host else 200)
    assert answer(web_page.port, "GET", "/", Host=host, Upgrade="websocket", Connection="Upgrade",
                  Sec_WebSocket_Version="13", Sec_WebSocket_Key="AAAAAAAAAAAAAAAAAAAAAA==")[0] == 403


def test_an_upload_behind_a_proxy_that_hides_its_name_is_told_the_flag(web_page):
    """The proxy passes on 127.0.0.1 as its Host; the browser says where the page came from."""
    for origin in ("https://pictures.example.org", "http://10.0.0.9:8080"):
        status, _, body = answer(web_page.port, "POST", "/api/search", Origin=origin)
        assert status == 403 and b"may not use this one" in body and b"--allow_host NAME" in body


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost:1", "https://127.0.0.1", "",
                                    "file://", "http://127.0.0.1:{port}.evil.example", "chrome-extension://x"])
def test_a_page_of_another_origin_may_neither_ask_nor_read(web_page, origin):
    origin = origin.format(port=web_page.port)
    for method, path in (("GET", "/"), ("GET", f"{SEARCH}?image=1"), ("GET", "/thumbnails/1"), ("POST", SEARCH),
                         ("OPTIONS", SEARCH)):
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


def test_the_browser_is_told_to_run_and_ask_nothing_but_the_pages_own(web_page):
    for path in ("/", "/static/page.js", "/api/model", "/images/1", "/nothing"):
        _, headers, _ = answer(web_page.port, "GET", path)
        policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
        assert policy.pop("img-src") == "'self' blob:" and set(policy.values()) == {"'self'", "'none'"}
        assert policy["default-src"] == "'none'" and policy["frame-ancestors"] == "'self'"
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "same-origin"
    for path in ("/", "/openapi.json", *(f"/static/{name}" for name in page.STATIC)):
        status, _, content = answer(web_page.port, "GET", path)
        assert status == 200 and b"//" not in content.replace(b"http://www.w3.org", b"").replace(b"// ", b""), path
        assert not re.search(b"<style|innerHTML|outerHTML|insertAdjacent|eval\\(| style=| on[a-z]+=", content), path


FORMS = [form(), form(("", b"")), form(("a.jpg", b"text"), k="0"), form(("a.jpg", b"text"), k="many"),
         form(text="wet"), form(file="no file"), form(("a.jpg", b"text"), text="\udc80")]
MALFORMED = [("", b""), ("application/json", b"{"), ("application/json", b'{"image": 1}'), ("text/plain", b"x"),
             ("multipart/form-data", b"x"), ("multipart/form-data; boundary=y", b"x"),
             ("multipart/form-data; boundary=", b"--\r\n"), *[(kind, body) for body, kind in FORMS],
             (form()[1], form(("a.jpg", b"text"))[0][:-9]), (form()[1], b"--x\r\n" * 10_000)]


@pytest.mark.parametrize(("kind", "body"), MALFORMED, ids=range(len(MALFORMED)))
def test_a_malformed_request_is_answered_4xx_and_one_line(web_page, kind, body):
    before = len(web_page.output().splitlines())
    status, _, content = answer(web_page.port, "POST", SEARCH, body, Content_Type=kind)
    assert 400 <= status < 500 and list(json.loads(content)) == ["error"], content
    assert len(web_page.output().splitlines()) - before <= 1 and "Traceback" not in web_page.output()


@pytest.mark.parametrize("asked", [
    "", "image=", "image=0", "image=-1", "image=1.5", "image=9999999999999999999", "image=99999999999999999", "image=x",
    "image=u123", "image=u" + "0" * 32, "image=%00", "image=%ff", "path=nothing", "path=../secret.jpg",
    "path=/etc/passwd", "path=<b>x/../<b>x/5.jpg", "path=%00", "image=1&k=0", "image=1&k=1001", "image=1&k=x",
    "image=1&keep=perhaps", "image=1&text=zebra", "image=1&text=%ed%a0%80", "image=1&where=wet", "image=1&where=%00",
    "image=1&where=1;DROP TABLE images", f"image=1&text={'wet+' * 2500}"])
def test_a_question_that_cannot_be_answered_is_a_sentence(web_page, asked):
    status, _, content = answer(web_page.port, "GET", f"{SEARCH}?{asked.replace(' ', '+')}")
    assert status == 400 and list(json.loads(content)) == ["error"], content


def test_what_fails_is_one_line_and_no_traceback(opened, monkeypatch, caplog):
    monkeypatch.setattr(type(opened), "search", lambda *_: 1 / 0)
    with served(opened) as port:
        status, headers, content = answer(port, "GET", f"{SEARCH}?image=1")
        assert status == 500 and "says where" in json.loads(content)["error"] and "ZeroDivision" not in content.decode()
        assert "content-security-policy" in headers
        assert answer(port, "GET", "/")[0] == 200
    (line,) = caplog.messages
    assert re.fullmatch(r"failed GET '/api/search': ZeroDivisionError 'division by zero' \(.*\.py:\d+\)", line)


@pytest.mark.parametrize("path", [
    "/docs", "/redoc", "/gradio_api/info", "/config", "/static/", "/static/page.py", "/static/..%2fpage.py", "/%00",
    "//x", "/static/../page.py", "/api", "/api/search/x", "/images", "/images/0", "/images/99999", "/thumbnails/99999",
    "/favicon.ico", "/login"])
def test_doors_that_the_page_does_not_use_are_shut(web_page, path):
    status, _, content = answer(web_page.port, "GET", path)
    assert status == 404 and list(json.loads(content)) == ["error"] and b"/tmp" not in content
    assert answer(web_page.port, "POST", path, b"{}")[0] in (404, 405)
    for method in ("DELETE", "PUT", "TRACE"):
        assert answer(web_page.port, method, path)[0] in (404, 405)


def test_nothing_outside_the_gallery_is_served(web_page, gallery, tmp_path):
    picture(tmp_path / "secret.jpg")
    for path in (tmp_path / "secret.jpg", gallery / "<b>x" / "5.jpg", "/etc/passwd", "../../../../etc/passwd", "1/..",
                 "x"):
        for door in ("images", "thumbnails"):
            for named in (quote(str(path)), quote(str(path), safe="")):
                assert answer(web_page.port, "GET", f"/{door}/{named}")[0] in (400, 404)


def test_bodies_are_bounded(web_page):
    body, kind = form(("a.jpg", bytes(guard.LARGEST_UPLOAD + 2**20)))
    assert answer(web_page.port, "POST", SEARCH, body, Content_Type=kind)[0] == 413
    for method, path in (("POST", SEARCH), ("POST", "/nothing"), ("GET", "/api/model")):
        assert answer(web_page.port, method, path, iter([bytes(2**20)] * 20), Content_Type=kind)[0] == 411    # chunked
        assert answer(web_page.port, method, path, body, Content_Type=kind)[0] == 413
    body, _ = form(("a.jpg", bytes(guard.LARGEST_UPLOAD)))                      # the largest is read, and no picture
    status, _, content = answer(web_page.port, "POST", SEARCH, body, Content_Type=kind)
    assert status == 400 and "a.jpg is no picture" in content.decode()
    assert list(web_page.temporary.iterdir()) == []


def test_uploads_are_bounded_in_total_and_in_time(opened, monkeypatch):
    monkeypatch.setattr(guard, "MOST_UPLOADS", 3000)
    monkeypatch.setattr(guard, "SLOWEST", 0.3)
    body, kind = form(("a.jpg", bytes(1500)))
    head = f"POST {SEARCH} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2000\r\nContent-Type: {kind}\r\n\r\n"
    start = head.encode() + body[:1000]
    with served(opened) as port, socket.create_connection(("127.0.0.1", port), timeout=60) as slow:
        slow.sendall(start)
        (said := http.client.HTTPResponse(slow)).begin()
        assert said.status == 408 and b"does not come to an end" in said.read()
        monkeypatch.setattr(guard, "SLOWEST", 60)
        with socket.create_connection(("127.0.0.1", port), timeout=60) as held:
            held.sendall(start)
            end = time.monotonic() + 60
            while answer(port, "POST", SEARCH, body, Content_Type=kind)[0] != 503:
                assert time.monotonic() < end                                   # until the first is there
        end = time.monotonic() + 60
        while answer(port, "POST", SEARCH, body, Content_Type=kind)[0] != 400:
            assert time.monotonic() < end                                       # that broke off: there is room again


def test_uploads_are_forgotten_the_oldest_first_and_in_time(opened, gallery, monkeypatch):
    kept, names = uploads.Uploads(opened), sorted(gallery.rglob("*.jpg"))[:3]
    monkeypatch.setattr(uploads, "REMEMBERED", 2)
    numbers = [kept.take(path.name, path.read_bytes()) for path in names]
    assert kept.take(names[2].name, names[2].read_bytes()) == numbers[2] and len(set(numbers)) == 3
    assert list(kept.kept) == numbers[1:] and kept.find(numbers[1]).name == names[1].name
    renamed = kept.take("another's name", names[1].read_bytes())                # which no one else is told
    assert list(kept.kept) == [numbers[1], renamed]
    monkeypatch.setattr(uploads, "SECONDS", 0)
    with pytest.raises(InputError, match="not kept any more; choose or drop it in again"):
        kept.find(numbers[2])
    assert kept.kept == {}


@pytest.mark.parametrize(("host", "said"), [
    ("192.0.2.1", "Cannot assign requested address"), ("no-such-host.invalid", "not known|failure in name"),
    ("127.0.0.1", "Address already in use"), ("a" * 300, "too long|not known"), ("2001:db8::1", "Cannot assign")])
def test_an_address_that_cannot_be_had_is_said_as_it_is(host, said):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(InputError, match=f"({said}).*--port"):
        guard.listening(host, taken.getsockname()[1])


def test_what_it_cannot_listen_on_or_go_by_is_one_line(gallery_index, web_page, capfd):
    assert search.main(["serve", "--index", str(gallery_index), "--port", str(web_page.port)]) == 2
    said = capfd.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "Address already in use" in said[0] and "choose another --port" in said[0]
    assert search.main(["serve", "--index", str(gallery_index), "--allow_host", "http://x/"]) == 2
    assert "is no host name" in capfd.readouterr().err
    for path in ("find", "/find?x", "http://x/find", "/a//b", "/a b"):
        with pytest.raises(InputError, match="is no path; give one such as /find"), page.serving(
                None, 8, "127.0.0.1", web_page.port, root_path=path):
            pass


def test_ipv6_is_an_address_too(opened):
    (port,) = free_ports(1)
    with page.serving(opened, 8, "::", port) as url:
        assert url == f"http://[::]:{port}"
        for host in ("::1", "127.0.0.1"):
            assert answer(port, "GET", "/", host=host)[0] == 200
            assert answer(port, "GET", "/", host=host, Host="evil.example")[0] == 403
