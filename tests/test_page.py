"""The JSON API of search.py's page, asked over HTTP as programs ask it."""

import json
import re
import threading
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
from PIL import Image

from searching import page
from searching.gallery import IMAGES, Gallery
from searching.image_list import ImageList
from searching.metadata import keep

from .conftest import picture
from .index_faults import copied
from .services import free_ports
from .test_page_security import SEARCH, answer, form


def read(url):
    with urlopen(url) as answered:
        return json.load(answered)


def get(web_page, door, expected=200, **asked):
    status, _, content = answer(web_page.port, "GET", f"{door}?{urlencode(asked)}")
    assert status == expected, content
    return json.loads(content)


def post(web_page, file, **fields):
    body, kind = form((file.name, file.read_bytes()), **fields)
    status, _, content = answer(web_page.port, "POST", SEARCH, body, Content_Type=kind)
    assert status == 200, content
    return json.loads(content)


def ranks(found):
    return [(hit["rank"], hit["image"], hit["path"], pytest.approx(hit["score"], abs=1e-6)) for hit in found["results"]]


@pytest.fixture(scope="module")
def opened(gallery_index):
    return Gallery(gallery_index, "cpu")


def test_by_id_by_path_and_by_file_the_answer_is_the_gallerys_own(web_page, opened, gallery):
    own = opened.images.id_of("<b>x/5.jpg")
    expected = [(rank, hit.image, pytest.approx(hit.score, abs=1e-5)) for rank, hit in
                enumerate(opened.search(opened.own_picture(own), "wet", 5, leave_out=True), start=1)]
    by_id = get(web_page, SEARCH, image=own, text="wet", k=5)
    assert [(hit["rank"], hit["image"], hit["score"]) for hit in by_id["results"]] == expected
    assert (by_id["image"], by_id["path"], by_id["warnings"], by_id["unknown_words"]) == (own, "<b>x/5.jpg", [], [])
    assert ranks(get(web_page, SEARCH, path="<b>x/5.jpg", text="wet", k=5)) == ranks(by_id)
    by_file = post(web_page, gallery / "<b>x" / "5.jpg", text="wet", k="12")
    assert re.fullmatch("u[0-9a-f]{32}", by_file["image"]) and by_file["path"] == "5.jpg"
    assert len(by_file["results"]) == 12
    again = get(web_page, SEARCH, image=by_file["image"], text="wet", k=12)
    assert ranks(again) == ranks(by_file) and again["path"] == "5.jpg"
    assert [hit for hit in by_file["results"] if hit["image"] != own][:5][0]["image"] == expected[0][1]


def test_the_querys_own_picture_is_left_out_unless_it_is_to_be_kept(web_page, opened):
    own = opened.images.id_of("<b>x/5.jpg")
    without, kept = (get(web_page, SEARCH, image=own, k=12, keep=keep)["results"] for keep in ("false", "true"))
    assert len(without) == 11 and own not in {hit["image"] for hit in without}
    assert kept[0]["image"] == own and kept[0]["score"] == pytest.approx(1) and kept[1:] == [
        {**hit, "rank": hit["rank"] + 1} for hit in without]
    assert len(get(web_page, SEARCH, image=own)["results"]) == 11                # 20 unless asked otherwise


def test_results_have_what_the_table_says_and_a_condition_leaves_some(web_page, opened):
    own = opened.images.id_of("<b>x/5.jpg")
    everything, red = (get(web_page, SEARCH, image=own, where=where)
                       for where in ("", "colour = '<b>red' AND price > 1"))
    assert everything["metadata"] == red["metadata"] == {"colour": "blue", "price": 5}
    assert {hit["path"]: hit["metadata"] for hit in red["results"]} == {
        "<b>x/2.jpg": {"colour": "<b>red", "price": 2}, "<b>x/4.jpg": {"colour": "<b>red", "price": 4}}
    assert [hit["image"] for hit in everything["results"] if hit["path"] in ("<b>x/2.jpg", "<b>x/4.jpg")] == [
        hit["image"] for hit in red["results"]]
    offered = get(web_page, "/api/images", name="/4.jpg")["images"]
    assert [image["metadata"] for image in offered] == [{"colour": "<b>red", "price": 4}]


def test_a_page_whose_index_was_changed_says_so_and_answers_of_one_state(gallery_index, tmp_path):
    out = copied(gallery_index, tmp_path / "out")
    images, opened = ImageList(out / IMAGES), Gallery(out, "cpu")
    (own, *paths) = images.paths(images.ids()).values()
    keep(images, {path: {"price": 90} for path in (own, *paths)})
    opened = Gallery(out, "cpu")
    with page.serving(opened, 20, "127.0.0.1", 0) as url:
        asked = {"path": own, "k": 12}
        door = f"{url}{SEARCH}?{urlencode(asked)}"
        assert read(door)["warnings"] == read(f"{door}&where=price+%3C+100")["warnings"] == []
        keep(images, {path: {"price": 2000} for path in (own, *paths)})
        cheap, all_of_them = read(f"{door}&where=price+%3C+100"), read(door)
    said = ["The index was changed since this page was started: start it again to search what it holds now"]
    assert cheap["warnings"] == all_of_them["warnings"] == said
    assert {found["metadata"]["price"] for found in (cheap, *cheap["results"])} == {90} and len(cheap["results"]) == 11
    assert {found["metadata"]["price"] for found in (all_of_them, *all_of_them["results"])} == {2000}


def test_how_near_the_picture_is_the_askers_word_or_else_the_servers(web_page, opened):
    own = opened.images.id_of("<b>x/5.jpg")
    expected = {nearness: [(hit.image, pytest.approx(hit.score, abs=1e-5)) for hit in opened.search(
        opened.own_picture(own), "wet", 5, leave_out=True, nearness=nearness)] for nearness in (0, 0.5, 1)}
    for nearness, hits in expected.items():
        found = get(web_page, SEARCH, image=own, text="wet", k=5, nearness=nearness)["results"]
        assert [(hit["image"], hit["score"]) for hit in found] == hits
    question = page.OwnPicture(image=str(own), text="wet", k=5)
    for server in (0, 0.5):
        found = page.Page(opened, 5, server).search(question).results
        assert [(hit.image, hit.score) for hit in found] == expected[server]
    for wrong in ("-0.1", "1.1", "nan", "inf", "near"):
        assert "nearness" in get(web_page, SEARCH, 400, image=own, text="wet", nearness=wrong)["error"]


def test_words_that_are_not_known_are_left_out_and_said(web_page):
    plain, noisy = (get(web_page, SEARCH, image=1, text=text) for text in ("wet old", "Make it WET, please: old!"))
    assert ranks(noisy) == ranks(plain) and plain["warnings"] == []
    assert noisy["unknown_words"] == ["make", "it", "please"]
    assert noisy["warnings"] == ["Not known to the model, so left out: make, it, please"]
    assert ranks(get(web_page, SEARCH, image=1, text="old wet")) != ranks(plain)


def test_what_a_page_needs_to_know_of_the_model(web_page):
    model = get(web_page, "/api/model")
    assert model["words"] == sorted(model["words"]) and {"old", "wet", "white", "dog", "bus"} <= set(model["words"])
    assert "<UNK>" not in model["words"] and (model["images"], model["k"], model["most"]) == (12, 8, 1000)
    assert sorted(model["texts"]) == ["old", "wet", "white"] and model["columns"] == ["colour", "price"]
    assert [example["text"] for example in model["examples"]] == model["texts"]


def test_images_are_found_by_their_names_in_capitals_or_not(web_page):
    def found(name, **asked):
        offer = get(web_page, "/api/images", name=name, **asked)
        return offer["count"], [image["path"] for image in offer["images"]]
    assert found("X/7.JPG") == found("x/7.jpg") == (1, ["<b>x/7.jpg"])
    count, paths = found("")
    assert count == len(set(paths)) == 12 and paths == sorted(paths) and "<b>x/11\ufffd.jpg" in paths
    assert found("", k=3) == (12, [paths[0], paths[5], paths[11]])
    assert found("' OR 1=1 --") == found("%") == (0, [])
    assert len({tuple(found("", k=3, shuffle="true")[1]) for _ in range(20)}) > 1


def test_pictures_come_as_they_are_and_small_and_only_once(web_page, opened, gallery, tmp_path):
    own = opened.images.id_of("<b>x/5.jpg")
    status, headers, content = answer(web_page.port, "GET", f"/images/{own}")
    assert (status, headers["content-type"]) == (200, "image/jpeg")
    assert content == (gallery / "<b>x" / "5.jpg").read_bytes()
    Image.new("RGB", (3000, 1500), "red").save(tmp_path / "large.png")
    number = post(web_page, tmp_path / "large.png")["image"]
    for path, size in ((f"/thumbnails/{own}", None), (f"/thumbnails/{own}?large=true", None),
                       (f"/thumbnails/{number}", (640, 320))):
        status, headers, content = answer(web_page.port, "GET", path)
        assert (status, headers["content-type"], headers["cache-control"]) == (200, "image/jpeg", "private, no-cache")
        (tmp_path / "got.jpg").write_bytes(content)
        with Image.open(tmp_path / "got.jpg") as got:
            assert got.size == (size or got.size)
        status, again, content = answer(web_page.port, "GET", path, If_None_Match=headers["etag"])
        assert (status, again["etag"], content) == (304, headers["etag"], b"")
        assert answer(web_page.port, "GET", path, If_None_Match='"other"')[0] == 200


def test_a_small_copy_is_made_anew_when_its_file_changes(opened, gallery, tmp_path):
    served = page.Page(opened, 8)
    picture(tmp_path / "a.jpg")
    copies = []
    for colour in ("red", "blue"):
        Image.new("RGB", (40, 40), colour).save(tmp_path / "a.jpg")
        copies += [served.copy(tmp_path / "a.jpg", 320, colour) for _ in range(2)]
    assert copies[0] == copies[1] != copies[2] == copies[3] and served.small.cache_info().hits == 2


def test_the_api_is_described_and_nothing_in_it_comes_from_elsewhere(web_page):
    described = get(web_page, "/openapi.json")
    assert {path: sorted(how) for path, how in described["paths"].items()} == {
        "/api/model": ["get"], "/api/images": ["get"], "/api/search": ["get", "post"], "/images/{image}": ["get"],
        "/thumbnails/{image}": ["get"]}
    names = {each["name"] for each in described["paths"]["/api/search"]["get"]["parameters"]}
    assert names == {"image", "path", "text", "k", "where", "nearness", "keep"}
    fields = described["components"]["schemas"]["AnyPicture"]["properties"]
    assert set(fields) == {"file", "text", "k", "where", "nearness", "keep"}
    assert "multipart/form-data" in described["paths"]["/api/search"]["post"]["requestBody"]["content"]


@pytest.mark.parametrize("root_path", ["/find", "/a/b/"])
def test_below_a_path_whether_the_proxy_takes_it_off_or_not(opened, root_path):
    (port,), root = free_ports(1), root_path.rstrip("/")
    with page.serving(opened, 8, "127.0.0.1", port, ["search.example.org"], root_path):
        for path in ("/", "/static/page.js", "/api/model", "/images/1", "/thumbnails/1", "/openapi.json"):
            contents = [answer(port, "GET", begin + path, Host="search.example.org") for begin in (root, "")]
            assert [status for status, _, _ in contents] == [200, 200] and contents[0][2] == contents[1][2]
        status, headers, _ = answer(port, "GET", root, Host="search.example.org")
        assert status == 307 and headers["location"] == f"http://search.example.org{root}/"
        assert answer(port, "GET", f"{root}x/api/model")[0] == 404
        assert json.loads(answer(port, "GET", "/openapi.json")[2])["servers"] == [{"url": root}]
    html = "".join((page.FOLDER / name).read_text() for name in page.STATIC)
    assert not re.search(r"""(href|src|fetch|url)\W{1,3}/""", html)              # all addresses are relative


@pytest.mark.long("fifty visitors")
def test_fifty_visitors_at_once_get_what_each_alone_gets(web_page, gallery):
    file = gallery / "<b>x" / "5.jpg"
    expected = {text: ranks(get(web_page, SEARCH, image=2, text=text)) for text in ("wet", "old", "")}
    by_file, wrong = ranks(post(web_page, file, text="wet")), []

    def visit(number):
        text = ("wet", "old", "")[number % 3]
        try:
            assert ranks(get(web_page, SEARCH, image=2, text=text)) == expected[text]
            assert answer(web_page.port, "GET", f"/thumbnails/{1 + number % 12}")[0] == 200
            assert number % 5 or ranks(post(web_page, file, text="wet")) == by_file
        except Exception as error:
            wrong.append(error)
    visitors = [threading.Thread(target=visit, args=(number,)) for number in range(50)]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join(120)
    assert not wrong


def test_names_are_sent_as_they_are(web_page, gallery, tmp_path):
    name = "<img src=x onerror=alert(1)> **ü**.jpg"
    (tmp_path / name).write_bytes((gallery / "<b>x" / "5.jpg").read_bytes())
    assert post(web_page, tmp_path / name)["path"] == name
    markdown = "<b>x/![x](http:/evil.example/x.png).jpg"
    assert get(web_page, SEARCH, path=markdown)["path"] == markdown
