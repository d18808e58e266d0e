"""What a person sees: TensorBoard on a run, and search.py's page, in headless Chromium.

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
from contextlib import contextmanager, suppress

import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from .conftest import picture, run_main, some
from .services import ROOT, free_ports

pytestmark = pytest.mark.long("a browser")

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


def test_tensorboard_shows_scalars_and_the_pictures_of_results(trained, tab):
    (port,) = free_ports(1)

    def opened(part):
        tab.goto("about:blank")                                                 # what is open sets the address back
        tab.goto(f"http://127.0.0.1:{port}/#{part}")
    with program(port, "-m", "tensorboard.main", "--logdir", trained.folder.parent, "--port", port, "--bind_all"):
        opened("timeseries")
        sections = tab.locator("metrics-card-group-toolbar .group-title")
        expect(sections).to_have_text(["loss", "recall", "retrieval", "training"])
        opened("images")
        shown = tab.locator("img[src*='individualImage'], tf-image-loader img")
        expect(shown.first).to_be_visible()
        sizes = [shown.nth(number).evaluate("image => [image.naturalWidth, image.naturalHeight, image.clientWidth]")
                 for number in range(shown.count())]
        assert any(width > 600 and height > 500 for width, height, _ in sizes), sizes
        opened("hparams")
        cells = tab.locator("tf-hparams-main vaadin-grid-cell-content")
        expect(cells.filter(has_text=trained.folder.name)).to_have_count(1)     # one entry a run
        for title in ("batch_size", "image_encoder", "learning_rate", "loss", "model", "recall/test/composition@10"):
            expect(cells.get_by_text(title, exact=True)).to_have_count(1)


def test_tensorboards_first_screen_is_thirty_cards_at_most_and_all_recalls_are_one_text(mitstates, tmp_path, tab):
    run = run_main("mitstates", mitstates, tmp_path / "logs", num_iters=2, model="TransformerAE", baselines=True)
    (port,) = free_ports(1)
    with program(port, "-m", "tensorboard.main", "--logdir", run.folder.parent, "--port", port, "--bind_all"):
        tab.goto(f"http://127.0.0.1:{port}/#timeseries")
        counts = tab.locator("metrics-card-group-toolbar .group-card-count")
        expect(counts).to_have_text(["3 cards", "9 cards", "6 cards", "9 cards"])  # loss, recall, retrieval, training
        tab.goto("about:blank")
        tab.goto(f"http://127.0.0.1:{port}/#text")
        table = tab.locator("table table", has_text="R@10")                     # the outer one is TensorBoard's
        expect(table).to_have_count(1)
        expect(table.locator("tbody tr")).to_have_count(3 * 5)                  # of train, test and three baselines
        recall = run.metrics["baselines"]["test chance"]["recall_top10_correct_adj"]
        expect(table.locator("tr", has_text="test chance correct_adj")).to_contain_text(f"{100 * recall:.2f}")


@pytest.fixture
def address(web_page):
    return web_page.address


SIZES = {"desk": (1280, 800), "phone": (390, 844)}
STATUS, PICK, MORE, RANK = "#status", "#grid .pick", "#grid .more", "#grid .rank"


def opened(tab, address, path="/"):
    """The page, which asks no other host for anything."""
    tab.on("request", lambda request: request.url.startswith((address, "blob:")) or tab.wrong.append(request.url))
    tab.goto(address + path)
    return tab


def started(tab, address):
    opened(tab, address)
    expect(tab.locator(PICK)).to_have_count(12)
    return tab


def shows(tab, what, count=8):
    """Results, all of the query that the page says."""
    expect(tab.locator(STATUS)).to_contain_text(what)
    expect(tab.locator(RANK)).to_have_count(count)
    expect(tab.locator("#heading")).to_have_text("Results")
    expect(tab.locator("body")).not_to_have_class(re.compile("stale"))
    return tab.locator("#grid .name").all_inner_texts()


def ask(tab, text):
    tab.fill("#text", text)
    tab.keyboard.press("Enter")


@pytest.mark.parametrize("size", some(SIZES))
def test_choose_say_search_go_on_and_come_back_by_button_reload_and_link(tab, address, size):
    tab.set_viewport_size(dict(zip(("width", "height"), SIZES[size], strict=True)))
    started(tab, address)
    assert tab.locator("h1").count() == 1
    chosen = tab.locator("#grid .name").nth(3).inner_text()
    tab.locator(PICK).nth(3).click()
    similar = shows(tab, f"The 8 nearest of 12 pictures to {chosen}.")
    assert chosen not in similar
    ask(tab, "wet")
    wet = shows(tab, f"to {chosen} plus “wet”")
    assert wet != similar and tab.locator(RANK).all_text_contents() == [f"rank {rank}" for rank in range(1, 9)]
    tab.locator(PICK).nth(7).scroll_into_view_if_needed()
    tab.locator(PICK).nth(7).click()
    further = shows(tab, f"to {wet[7]}.")
    expect(tab.locator("#text")).to_have_value("")
    expect(tab.locator("#picture img")).to_have_attribute("alt", wet[7])
    assert tab.evaluate("scrollY") == 0 and tab.locator("#picture img").is_visible()
    expect(tab.locator("#steps li")).to_have_count(3)
    link = tab.url
    tab.go_back()
    assert shows(tab, f"to {chosen} plus “wet”") == wet
    expect(tab.locator("#text")).to_have_value("wet")
    tab.reload()
    assert shows(tab, f"to {chosen} plus “wet”") == wet
    tab.locator("#steps button").first.click()
    assert shows(tab, f"to {chosen}.") == similar
    tab.go_back()
    tab.go_back()
    tab.go_back()
    expect(tab.locator("#heading")).to_have_text("The gallery")
    tab.goto("about:blank")
    tab.goto(link)
    assert shows(tab, f"to {wet[7]}.") == further
    tab.select_option("#k", "10")
    shows(tab, "The 10 nearest", 10)
    assert "k=10" in tab.url and tab.evaluate("document.documentElement.scrollWidth") == SIZES[size][0]
    if size == "phone":
        tab.evaluate("scrollTo(0, 9999)")
        assert tab.evaluate("scrollY") > 300 and tab.locator("#query").bounding_box()["y"] == 0


def test_nothing_but_keys(tab, address):
    started(tab, address)
    keys = tab.keyboard

    def focused():
        return tab.evaluate("document.activeElement.innerText || document.activeElement.id").strip()

    def tab_to(what):
        for _ in range(60):
            keys.press("Tab")
            outline = tab.evaluate("getComputedStyle(document.activeElement.matches('#file') ? document.querySelector("
                                   "'#choose') : document.activeElement).outlineStyle")
            assert outline == "solid", focused()                                # it is seen where one is
            if focused().startswith(what):
                return
        raise AssertionError(what)
    tab_to("Skip")
    keys.press("Enter")
    assert focused() == "The gallery"
    tab_to("Search from")
    keys.press("Enter")
    shows(tab, "The 8 nearest")
    assert focused() == "Results"
    tab_to("Enlarge")
    opener = focused()
    keys.press("Enter")
    name = tab.locator("#large-name")
    first = name.inner_text()
    assert opener == f"Enlarge {first}"
    keys.press("ArrowRight")
    expect(name).not_to_have_text(first)
    keys.press("ArrowLeft")
    expect(name).to_have_text(first)
    keys.press("Escape")
    expect(tab.locator("#large")).not_to_be_visible()
    assert focused() == opener
    keys.press("Enter")
    tab_to("Search from here")
    keys.press("Enter")
    shows(tab, f"to {first}.")
    tab.reload()
    shows(tab, f"to {first}.")
    for _ in range(60):
        keys.press("Tab")
        if focused() == "text":
            break
    keys.type("wet")
    keys.press("Enter")
    shows(tab, f"to {first} plus “wet”")
    assert focused() == "text"


@pytest.mark.parametrize("looks", some(["desk light, phone dark", "desk dark, phone light"]))
def test_no_state_of_it_has_an_accessibility_violation(tab, address, tmp_path, looks):
    """By axe-core. Colours go with the scheme, places with the size."""
    (tmp_path / "text.jpg").write_text("no picture")

    def check(state):
        for size, scheme in map(str.split, looks.split(", ")):
            tab.set_viewport_size(dict(zip(("width", "height"), SIZES[size], strict=True)))
            tab.emulate_media(color_scheme=scheme, reduced_motion="reduce")
            found = tab.evaluate("axe.run({resultTypes: ['violations']})")
            assert found["passes"] and not found["violations"], (state, size, scheme, found["violations"])
    started(tab, address)
    tab.evaluate(Axe().axe_script)
    check("start")
    tab.locator(PICK).nth(3).click()
    shows(tab, "The 8 nearest")
    ask(tab, "wet please")
    shows(tab, "plus “wet please”")
    check("results, with a word that is not known")
    tab.set_input_files("#file", tmp_path / "text.jpg")
    expect(tab.locator("#problem")).to_contain_text("no picture")
    check("error")
    tab.locator(MORE).first.click()
    check("enlarged")
    tab.keyboard.press("Escape")
    with held_up(tab):
        tab.fill("#text", "old")
        tab.click("#go")
        expect(tab.locator("#go")).to_have_text("Searching…")
        check("searching")
    shows(tab, "plus “old”")


@contextmanager
def held_up(tab):
    """Searches get no answer meanwhile."""
    held = []
    tab.route("**/api/search*", lambda route: held.append(route))
    yield held
    tab.unroute("**/api/search*")
    for route in held:
        with suppress(Exception):                                               # the page has given it up
            route.continue_()


def test_what_is_shown_belongs_together_and_only_the_last_answer_is_shown(tab, address):
    started(tab, address)
    tab.locator(PICK).nth(0).click()
    first = shows(tab, "The 8 nearest")
    with held_up(tab) as held:
        ask(tab, "wet")
        expect(tab.locator("#go")).to_have_attribute("aria-disabled", "true")
        expect(tab.locator("#heading")).to_have_text("Results of the query before")
        expect(tab.locator(STATUS)).to_contain_text("Searching from")
        expect(tab.locator("body")).to_have_class(re.compile("stale"))
        assert tab.locator("#grid .name").all_inner_texts() == first
        tab.keyboard.press("Enter")                                             # the button rests
        tab.locator(PICK).nth(2).click()                                        # and another question is the last one
        tab.wait_for_function("document.querySelector('#status').innerText.includes(arguments)".replace(
            "arguments", json.dumps(first[2])))
        assert len(held) == 2
    assert shows(tab, f"to {first[2]}.") != first
    tab.fill("#text", "old")                                                    # typed, not yet asked
    expect(tab.locator("#heading")).to_have_text("Results of the query before")
    tab.fill("#text", "")
    shows(tab, f"to {first[2]}.")
    tab.route("**/api/search*", lambda route: route.abort())
    ask(tab, "old")
    expect(tab.locator("#problem")).to_have_text(re.compile("The server does not answer: is search.py still running"))
    expect(tab.locator("#heading")).to_have_text("Results of the query before")


def test_words_complete_what_is_typed_and_those_not_known_are_struck_through(tab, address):
    started(tab, address)
    assert sorted(tab.locator("#words button").all_inner_texts()) == ["old", "wet", "white"]
    tab.fill("#text", "w")
    expect(tab.locator("#words button")).to_have_text(["wet", "white"])
    tab.locator("#words button").nth(1).click()
    expect(tab.locator("#text")).to_have_value("white ")
    tab.keyboard.type("Zebra, w")
    tab.locator("#words button").first.click()
    expect(tab.locator("#text")).to_have_value("white Zebra, wet ")
    expect(tab.locator("#reading")).to_have_text("Read as: white zebra (left out) wet ")
    expect(tab.locator("#reading s")).to_have_text(["zebra"])
    tab.locator(PICK).nth(3).click()                                            # what was typed belongs to it
    shows(tab, "plus “white Zebra, wet”")
    expect(tab.locator(STATUS)).to_contain_text("Not known to the model, so left out: zebra.")
    ask(tab, "zebra")
    expect(tab.locator("#problem")).to_contain_text("The model knows none of these words")


def test_what_a_table_says_is_shown_and_filtered_by(tab, address):
    started(tab, address)
    tab.locator(PICK).nth(3).click()
    shows(tab, "The 8 nearest")
    tab.fill("#where", "price in (2, 3)")
    tab.keyboard.press("Enter")
    shows(tab, "The 2 nearest", 2)
    assert sorted(tab.locator("#grid .facts").all_inner_texts()) == ["<b>red · 2", "blue · 3"] and "where=" in tab.url
    tab.locator(MORE).first.click()
    assert tab.locator("#large dl").inner_text().split() in (["colour", "<b>red", "price", "2"],
                                                             ["colour", "blue", "price", "3"])
    tab.keyboard.press("Escape")
    tab.reload()
    shows(tab, "The 2 nearest", 2)
    tab.fill("#where", "size = 1")
    tab.keyboard.press("Enter")
    expect(tab.locator("#problem")).to_contain_text("no such column: size")
    tab.fill("#where", "price = 99")
    tab.keyboard.press("Enter")
    expect(tab.locator(STATUS)).to_contain_text("No picture fulfils price = 99")

    def without_columns(route):
        route.fulfill(json={**route.fetch().json(), "columns": []})
    tab.route("**/api/model", without_columns)
    started(tab, address)
    tab.locator(PICK).nth(3).click()
    shows(tab, "The 8 nearest")
    expect(tab.locator("#where")).not_to_be_visible()


def test_how_near_the_picture_stands_in_the_address_and_moves_the_results(tab, address, gallery):
    started(tab, address)
    tab.locator(PICK).nth(3).click()
    shows(tab, "The 8 nearest")
    ask(tab, "wet")
    shows(tab, "wet")
    slider, trained = tab.locator("#nearness"), tab.url
    def cosines():
        return tab.locator("#grid .rank").evaluate_all("ranks => ranks.map(rank => rank.title)")
    plain = cosines()
    slider.focus()
    tab.keyboard.press("End")
    tab.wait_for_url("**nearness=1**")
    shows(tab, "wet")
    expect(tab.locator("#grid .rank").first).not_to_have_attribute("title", plain[0])
    near = cosines()
    tab.reload()
    shows(tab, "wet")
    assert slider.input_value() == "1" and cosines() == near != plain
    tab.go_back()
    tab.wait_for_url(trained)
    shows(tab, "wet")
    expect(tab.locator("#grid .rank").first).to_have_attribute("title", plain[0])
    assert slider.input_value() == "0" and cosines() == plain


def test_examples_names_and_a_pictures_ways_on(tab, address, gallery):
    started(tab, address)
    tab.locator("#examples button").nth(1).click()
    shows(tab, "The 8 nearest")
    tab.click("#all")
    tab.fill("#part", "/7.JPG")
    tab.keyboard.press("Enter")
    expect(tab.locator(PICK)).to_have_count(1)
    expect(tab.locator(STATUS)).to_have_text("1 picture with “/7.JPG” in the name.")
    tab.locator(MORE).click()
    expect(tab.locator("#large-name")).to_have_text("<b>x/7.jpg")
    with tab.expect_download() as download:
        tab.click("#download")
    assert download.value.suggested_filename == "7.jpg"
    content = (gallery / "<b>x" / "7.jpg").read_bytes()
    with open(download.value.path(), "rb") as got:
        assert got.read() == content
    tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
    tab.click("#copy")
    expect(tab.locator("#copy")).to_have_text("Copied")
    assert tab.evaluate("navigator.clipboard.readText()") == "<b>x/7.jpg"
    tab.click("#here")
    shows(tab, "to <b>x/7.jpg.")
    tab.click("#all")
    tab.fill("#part", "' OR 1=1 --")
    tab.keyboard.press("Enter")
    expect(tab.locator(STATUS)).to_contain_text("No picture has “' OR 1=1 --” in its name.")


def test_pictures_of_ones_own_are_searched_with_reloaded_and_once_gone_it_is_said(tab, address, tmp_path):
    started(tab, address)
    ask(tab, "wet")
    expect(tab.locator("#problem")).to_have_text("Choose a picture first: one of the gallery, or one of yours.")
    picture(tmp_path / "fine.jpg")
    tab.set_input_files("#file", tmp_path / "fine.jpg")
    found = shows(tab, "to fine.jpg plus “wet”")
    tab.wait_for_function("document.querySelector('#picture img').naturalWidth > 10")
    tab.reload()
    assert shows(tab, "to fine.jpg plus “wet”") == found
    tab.goto(f"{address}/?image=u{'0' * 32}&text=wet")
    expect(tab.locator("#problem")).to_contain_text("not kept any more; choose or drop it in again.")
    expect(tab.locator(PICK)).to_have_count(12)                                 # not blank: the gallery to choose from
    expect(tab.locator("#text")).to_have_value("wet")
    tab.locator(PICK).first.click()
    shows(tab, "The 8 nearest")


def test_what_cannot_be_searched_with_is_said_once_and_nothing_is_executed(tab, address, tmp_path):
    started(tab, address)
    tab.locator(PICK).nth(3).click()
    found = shows(tab, "The 8 nearest")
    Image.new("1", (8000, 6300)).save(tmp_path / "huge.png")                    # 50 megapixels
    (tmp_path / "<img src=x onerror=alert(1)>.jpg").write_text("no picture")
    for file, said in (("huge.png", "huge.png has more than 40 megapixels"),
                       ("<img src=x onerror=alert(1)>.jpg", "<img src=x onerror=alert(1)>.jpg is no picture")):
        tab.set_input_files("#file", tmp_path / file)
        expect(tab.locator("#problem")).to_contain_text(said)
        assert tab.get_by_text(said).count() == 1 and shows(tab, "The 8 nearest") == found   # which are still its
    for text, said in (("<img src=x onerror=alert(1)>", "knows none of these words"), ("wet " * 300, None)):
        ask(tab, text)
        expect(tab.locator("#problem")).to_contain_text(said) if said else shows(tab, "plus “wet wet")
    ask(tab, "wet <script>alert(1)</script> **dog** ![x](http://evil.example/2)")
    shows(tab, "plus “wet <script>alert(1)</script> **dog** ![x](http://evil.example/2)”")
    expect(tab.locator("#steps")).to_contain_text("<script>alert(1)</script> **dog** ![x](http://evil.example/2)")
    tab.click("#all")
    tab.fill("#part", "evil")
    tab.keyboard.press("Enter")
    expect(tab.locator(PICK)).to_have_count(1)
    tab.locator(PICK).click()
    shows(tab, "to <b>x/![x](http:/evil.example/x.png).jpg.")
    assert tab.locator("img[src='x'], [src*='evil.example'], [href*='evil.example'], main script").count() == 0
