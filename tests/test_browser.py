"""What a person sees: TensorBoard on a run, and search.py's page, in headless Chromium and by Gradio's own client.

Debian's packages: apt-get install chromium. Where there is no Chromium these tests are left out, in CI they fail.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

import pytest
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from .conftest import picture
from .services import ROOT, free_ports

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WAIT = 30_000                                                                   # ms


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM and not os.environ.get("CI"):
        pytest.skip("no Chromium on this machine")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def tab(browser):
    """A new page, on which nothing may go wrong unseen."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(WAIT)
    expect.set_options(timeout=WAIT)
    page.wrong = wrong = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: (wrong.append(f"dialog {dialog.message}"), dialog.dismiss()))
    yield page
    page.close()
    assert not wrong


@contextmanager
def program(address, *words):
    """A server process that answers at `address` (from the port on)."""
    process = subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)
    try:
        for _ in range(600):
            assert process.poll() is None, process.communicate()[0]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{address}", timeout=5).close()
                break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.1)
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=20)


@pytest.mark.long("TensorBoard and a run of its own")
def test_tensorboard_shows_scalars_and_the_pictures_of_results(trained, tab):
    (port,) = free_ports(1)
    with program(port, "-m", "tensorboard.main", "--logdir", trained.folder.parent, "--port", port, "--bind_all"):
        tab.goto(f"http://127.0.0.1:{port}/#timeseries")
        sections = tab.locator("metrics-card-group-toolbar .group-title")
        expect(sections).to_have_text(["loss", "model", "optimizer", "pictures", "ranks", "recall", "speed"])
        tab.goto(f"http://127.0.0.1:{port}/#images")
        tab.reload()
        shown = tab.locator("img[src*='individualImage'], tf-image-loader img")
        expect(shown.first).to_be_visible()
        sizes = [shown.nth(number).evaluate("image => [image.naturalWidth, image.naturalHeight, image.clientWidth]")
                 for number in range(shown.count())]
        assert any(width > 600 and height > 500 for width, height, _ in sizes), sizes
        tab.goto(f"http://127.0.0.1:{port}/#hparams")
        tab.reload()
        cells = tab.locator("tf-hparams-main vaadin-grid-cell-content")
        expect(cells.filter(has_text=trained.folder.name)).to_have_count(1)     # one entry a run
        for title in ("batch_size", "image_encoder", "learning_rate", "loss", "model", "recall/test/composition@10"):
            expect(cells.get_by_text(title, exact=True)).to_have_count(1)


@pytest.fixture
def address(web_page):
    return web_page.address


def opened(tab, address):
    """The page, which asks no other host for anything."""
    tab.on("request", lambda request: request.url.startswith((address, "data:", "blob:"))
           or tab.wrong.append(request.url))
    tab.goto(address)
    expect(grid(tab, "choice")).to_have_count(12)
    return tab


def grid(tab, name):
    return tab.locator(f"#{name} button img")


def says(tab, what):
    expect(tab.locator("#status")).to_contain_text(re.compile(what))


def ask(tab, text):
    tab.fill("#change textarea", text)
    tab.click("button#search")


def test_pick_type_search_click_a_result_search_again_and_go_back(tab, address):
    opened(tab, address)
    grid(tab, "choice").nth(3).click()
    says(tab, "picture is <b>x/11\ufffd.jpg")
    ask(tab, "wet")
    expect(grid(tab, "results")).to_have_count(8)
    says(tab, "best 8 of 12 images")
    first = [tab.locator("#results .caption-label").nth(place).inner_text() for place in range(8)]
    scores = [float(caption.split("·")[1]) for caption in first]
    assert scores == sorted(scores, reverse=True) and first[0].startswith("1 ")
    grid(tab, "results").nth(2).click()
    says(tab, "now say what should change")
    expect(tab.locator("#change textarea")).to_have_value("")
    tab.fill("#change textarea", "old")
    tab.keyboard.press("Enter")
    expect(grid(tab, "trail")).to_have_count(2)
    grid(tab, "trail").nth(0).click()
    says(tab, "Step 1 again")
    expect(tab.locator("#change textarea")).to_have_value("wet")
    expect(tab.locator("#results .caption-label").first).to_have_text(first[0])
    ask(tab, "")
    expect(grid(tab, "trail")).to_have_count(3)
    expect(tab.locator("#trail")).to_contain_text("looks like it")


def test_examples_and_other_pictures_are_a_click_away(tab, address):
    opened(tab, address)
    grid(tab, "examples").nth(1).click()
    says(tab, "best 8 of 12")
    expect(grid(tab, "trail")).to_have_count(1)
    tab.fill("#part textarea, #part input", "/7.jpg")
    tab.click("button#others")
    expect(grid(tab, "choice")).to_have_count(1)
    tab.fill("#part textarea, #part input", "' OR 1=1 --")
    tab.click("button#others")
    says(tab, "no picture of the gallery")


def test_what_cannot_be_searched_with_is_said_and_nothing_is_executed(tab, address, tmp_path):
    opened(tab, address)
    ask(tab, "wet")
    says(tab, "choose a picture first")
    Image.new("1", (8000, 6300)).save(tmp_path / "huge.png")                    # 50 megapixels
    (tmp_path / "<img src=x onerror=alert(1)>.jpg").write_text("no picture")
    for file, said in (("huge.png", r"huge\.png has more than 40 megapixels"),
                       ("<img src=x onerror=alert(1)>.jpg", "no picture that can be read")):
        tab.set_input_files("#picture input[type=file]", tmp_path / file)
        says(tab, said)
    picture(tmp_path / "fine.jpg")
    tab.set_input_files("#picture input[type=file]", tmp_path / "fine.jpg")
    says(tab, "Now say what should change")
    for text, said in (("<img src=x onerror=alert(1)>", "knows none of these words"), ("wet " * 2500, "10,000 char"),
                       ("wet <script>alert(1)</script>", "Not known to the model: scriptalert1script")):
        ask(tab, text)
        says(tab, said)
    expect(grid(tab, "results")).to_have_count(8)
    assert tab.locator("img[src='x']").count() == 0


def test_names_and_texts_are_neither_markdown_nor_html(tab, address, tmp_path):
    opened(tab, address)
    tab.fill("#part textarea, #part input", "evil")
    tab.click("button#others")
    expect(grid(tab, "choice")).to_have_count(1)
    grid(tab, "choice").nth(0).click()
    expect(tab.locator("#status")).to_contain_text("picture is <b>x/![x](http:/evil.example/x.png).jpg: now")
    ask(tab, "wet <img src=//evil.example/1> ![x](http://evil.example/2) **dog**")
    expect(grid(tab, "results")).to_have_count(8)
    expect(tab.locator("#trail")).to_contain_text("<img src=//evil.example/1> ![x](http://evil.example/2) **dog**")
    name = "![x](http:&#47;&#47;evil.example&#47;3) **d** <b>b.jpg"
    (tmp_path / name).write_text("no picture")
    tab.set_input_files("#picture input[type=file]", tmp_path / name)
    expect(tab.locator("#status")).to_contain_text(name)
    expect(tab.locator(".toast-body, [data-testid=toast-body]").last).to_contain_text(name)
    assert tab.locator("[src*='evil.example'], [href*='evil.example']").count() == 0


def test_an_upload_is_removed_when_it_has_been_looked_at(tab, address, web_page, tmp_path):
    opened(tab, address)
    Image.new("RGB", (300, 200), "red").save(tmp_path / "fine.png")
    tab.set_input_files("#picture input[type=file]", tmp_path / "fine.png")
    says(tab, "Now say what should change")
    expect(tab.locator("#picture img")).to_be_visible()
    tab.wait_for_function("document.querySelector('#picture img').naturalWidth == 256")     # the small copy
    assert list(web_page.temporary.glob("*/uploads/*")) == []
    for text, count in (("wet", 1), ("old", 2)):                                # asked about again and again
        ask(tab, text)
        expect(grid(tab, "trail")).to_have_count(count)


def test_the_page_fits_a_phone(tab, address):
    tab.set_viewport_size({"width": 390, "height": 844})
    opened(tab, address)
    grid(tab, "choice").nth(0).click()
    ask(tab, "wet")
    expect(grid(tab, "results")).to_have_count(8)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    tops = [tab.locator(name).bounding_box()["y"] for name in ("#picture", "#change", "button#search", "#results",
                                                              "#choice")]
    assert tops == sorted(tops)
    for name in ("#picture", "#results"):
        box = tab.locator(name).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 390


def post(address, name, *data):
    """What a program that is not Gradio's client gets: the event stream's text."""
    def request(path, content=None):
        with urllib.request.urlopen(urllib.request.Request(f"{address}/gradio_api/call/{path}", content, {
                "Content-Type": "application/json"}), timeout=20) as answer:
            return answer.read().decode()
    event = json.loads(request(name, json.dumps({"data": data}).encode()))["event_id"]
    return request(f"{name}/{event}")


def test_programs_ask_by_file_and_by_path(address, gallery, tmp_path):
    asking = f"""
import json, sys
from gradio_client import Client, handle_file
client = Client({address!r}, verbose=False)
answers = [client.predict(handle_file(sys.argv[1]), "wet", 3, api_name="/search"),
           client.predict("<b>x/5.jpg", "wet", 3, api_name="/search_gallery"),
           client.predict(handle_file(sys.argv[1]), api_name="/search")]
for words in ((handle_file(sys.argv[2]), "wet", 3), (handle_file(sys.argv[1]), "zebra", 3),
              (handle_file(sys.argv[1]), "wet", 0), (handle_file(sys.argv[1]), ["wet"], 3), (None, "", 3)):
    try:
        answers.append(client.predict(*words, api_name="/search"))
    except Exception as error:
        answers.append(str(error))
print(json.dumps(answers))
"""
    (tmp_path / "text.jpg").write_text("no picture")
    done = subprocess.run([sys.executable, "-c", asking, gallery / "<b>x" / "5.jpg", tmp_path / "text.jpg"],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    by_file, by_path, similar, *refused = json.loads(done.stdout)
    assert [hit["rank"] for hit in by_file] == [1, 2, 3]
    assert [hit["image"] for hit in by_path] == [hit["image"] for hit in by_file]
    assert similar[0]["image"] == "<b>x/5.jpg" and similar[0]["score"] == pytest.approx(1) and len(similar) == 12
    said = ("text.jpg is no picture", "knows none of these words", "k a number from 1", "text is a string",
            "give the picture as a file")
    assert all(words in answer for words, answer in zip(said, refused, strict=True)), refused


def test_nothing_outside_the_gallery_is_served(address, gallery, tmp_path):
    picture(tmp_path / "secret.jpg")
    for path in (tmp_path / "secret.jpg", gallery / "<b>x" / "5.jpg", "/etc/passwd", ROOT / "README.md",
                 "../../../../etc/passwd"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{address}/gradio_api/file={urllib.request.quote(str(path))}", timeout=20)
        assert refused.value.code in (403, 404)
    secret = str(tmp_path / "secret.jpg")
    for given in ({"path": secret}, {"path": secret, "meta": {"_type": "gradio.FileData"}}, secret, [secret]):
        answer = post(address, "search", given, "", 3)
        assert "event: error" in answer and "rank" not in answer
    for path in ("../secret.jpg", secret, "/etc/passwd", "<b>x/../<b>x/5.jpg", "", "\ud800", 5, None, ["<b>x/5.jpg"]):
        answer = post(address, "search_gallery", path, "", 3)
        assert "event: error" in answer and "no image of this path" in answer


def test_what_only_a_program_can_send_is_answered_too(address):
    hits = json.loads(post(address, "search_gallery", "<b>x/5.jpg", "wet \ud800", 12).split("data: ")[1])
    assert "<b>x/11\ufffd.jpg" in [hit["image"] for hit in hits[0]]
    assert "knows none of these words" in post(address, "search_gallery", "<b>x/5.jpg", "\ud800", 12)
