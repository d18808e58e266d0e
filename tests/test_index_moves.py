"""An index whose images are elsewhere now: found again, told apart from another folder's, and none encoded twice."""

import json
import os
import re
import shutil

import pytest

from machine.errors import InputError
from searching.gallery import Gallery
from searching.image_list import BEFORE_METADATA

from .conftest import picture, some
from .index_faults import copied, older, write_model
from .test_index_safety import paths
from .test_search import CPU, run

PATHS = [f"{folder}{number}.jpg" for folder in ("", "a/", "a/b/") for number in range(4)]


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """Twelve pictures, their index beside them, and a query's picture."""
    root = tmp_path_factory.mktemp("moves")
    for path in PATHS:
        picture(root / "shop" / "images" / path)
    picture(root / "query.jpg")
    write_model(root / "model.pth")
    assert run("index", "--model_checkpoint", root / "model.pth", "--images", root / "shop" / "images", "--out",
               root / "shop" / "out", "--device", "cpu", "--engine", "torch") == 0
    return root


@pytest.fixture
def shop(first, tmp_path):
    """A copy of the pictures, with their times, and of the index, which knows of the first ones alone."""
    shutil.copytree(first / "shop", tmp_path / "shop")
    (tmp_path / "shop" / "out").rename(tmp_path / "out")
    return tmp_path / "shop" / "images"


@pytest.fixture
def indexed(first, tmp_path, capsys):
    """Bring the copy up to date: how many were encoded, or what the one line of the refusal says."""
    def index(folder, *more):
        before = (tmp_path / "out" / "images.sqlite").read_bytes()
        capsys.readouterr()
        code = run("index", "--model_checkpoint", first / "model.pth", "--images", folder, "--out", tmp_path / "out",
                   "--device", "cpu", "--engine", "torch", *more)
        out, err = capsys.readouterr()
        if code == 0:
            return int(re.search(r"images, (\d+) of them encoded now", out)[1])
        assert code == 2 and len(err.splitlines()) == 1
        assert (tmp_path / "out" / "images.sqlite").read_bytes() == before      # nothing lost
        return err
    return index


def answer(first, capsys, out, folder, *words):
    """A query's scores by path below the folder that is expected, what was noted, and which are missing."""
    capsys.readouterr()
    assert run("query", "--index", out, "--image", first / "query.jpg", "--device", "cpu", "--json", *words) == 0
    said, err = capsys.readouterr()
    found = {os.path.relpath(hit["path"], folder): hit for hit in json.loads(said)["results"]}
    # Features are summed in another order where there are more of them.
    return ({path: pytest.approx(hit["score"], abs=2e-6) for path, hit in found.items()}, err,
            [path for path, hit in found.items() if "missing" in hit])


@pytest.fixture
def asked(first, tmp_path, capsys):
    return lambda folder, *words, out=tmp_path / "out": answer(first, capsys, out, folder, *words)


@pytest.fixture(scope="module")
def right(first):
    hits = Gallery(first / "shop" / "out", CPU).search(first / "query.jpg", "")
    assert sorted(os.path.relpath(hit.path, first / "shop" / "images") for hit in hits) == sorted(PATHS)
    return {os.path.relpath(hit.path, first / "shop" / "images"): hit.score for hit in hits}


@pytest.mark.long("several indexes")
def test_a_query_is_told_where_the_images_are_and_the_index_stays_as_it_is(shop, right, tmp_path, asked):
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert asked(shop, "--images", shop) == (right, "", [])
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    opened = Gallery(tmp_path / "out", CPU, images=str(shop / ".." / "images"))
    assert opened.file(opened.images.id_of("a/0.jpg")) == shop / "a" / "0.jpg"


@pytest.mark.long("several indexes")
@pytest.mark.parametrize("how", some([shutil.copyfile, shutil.copy2]))
def test_moved_images_are_recognized_and_not_encoded_again(shop, right, tmp_path, indexed, asked, how):
    new = shutil.copytree(shop, tmp_path / "new", copy_function=how)
    assert indexed(new) == 0
    shutil.rmtree(shop)
    assert asked(new) == (right, "", [])
    content = bytearray((new / "0.jpg").read_bytes())
    content[60] ^= 1                                                            # in a table of quantities
    (new / "0.jpg").write_bytes(content)                                        # another picture of as many bytes
    os.utime(new / "0.jpg", ns=(1, 1))
    picture(new / "more.jpg")
    assert indexed(new) == 2


def test_another_folder_is_refused(shop, tmp_path, indexed):
    other = tmp_path / "other"
    for path in PATHS:
        picture(other / path, 50, 50)                                           # the same names
    for path in PATHS[:5]:
        shutil.copy(shop / path, other / path)                                  # and less than half of the pictures
    assert re.search(f"is the index of .*/images, and {other} has 5 of its 12 images; give .* own --out",
                     indexed(other, "--prune"))


@pytest.mark.parametrize("gone", some([["a/0.jpg"], ["0.jpg", "a/0.jpg", "a/2.jpg", "a/b/1.jpg"]]), ids=len)
def test_of_half_moved_images_none_leaves_the_index_unless_it_is_said(shop, tmp_path, indexed, gone):
    new = shutil.copytree(shop, tmp_path / "new")
    for path in gone:
        (new / path).unlink()
    assert f"{len(gone)} of the 12 images of {tmp_path / 'out'} are no more in {new}; if that is" in indexed(new)
    assert indexed(new, "--prune") == 0
    assert paths(tmp_path / "out") == set(PATHS) - set(gone)


@pytest.mark.long("several indexes")
def test_a_folder_that_is_still_to_be_moved_costs_nothing(shop, tmp_path, indexed, asked, right):
    new = shutil.copytree(shop, tmp_path / "new", ignore=shutil.ignore_patterns("b"))
    assert indexed(new) == 0
    scores, err, missing = asked(new)
    assert right == scores and sorted(missing) == [path for path in PATHS if path.startswith("a/b/")]
    assert re.fullmatch(rf"note: 4 of the 12 results are no longer in {new}; if the images moved, pass --images "
                        r"NEWFOLDER; if they were removed, run search\.py index, .*\n", err)
    shutil.copytree(shop / "a" / "b", new / "a" / "b")
    assert indexed(new) == 0


def test_a_folder_that_is_gone_is_said_once(first, shop, tmp_path, capsys, caplog):
    out = copied(first / "shop" / "out", tmp_path / "elsewhere")
    moved = (first / "shop" / "images").rename(first / "shop" / "renamed")
    try:
        assert run("query", "--index", out, "--image", first / "query.jpg", "--png", tmp_path / "found.png") == 0
    finally:
        moved.rename(first / "shop" / "images")
    said, err = capsys.readouterr()
    assert len(said.splitlines()) == 13 and not err
    assert re.fullmatch(rf".*note: {first}/shop/images, the folder of the images, is not there; if it moved, pass "
                        rf"--images NEWFOLDER; if it was removed, remove {out} too\n", caplog.text)
    assert run("query", "--index", out, "--image", first / "query.jpg", "--images", tmp_path / "nothing") == 2
    assert "nothing is no folder" in capsys.readouterr().err


def test_an_index_moved_with_its_images_finds_them(first, tmp_path, asked, right):
    for root in ("before", "after"):
        (tmp_path / root).mkdir()
    shutil.copytree(first / "shop", tmp_path / "before" / "shop")
    assert run("index", "--model_checkpoint", first / "model.pth", "--images", tmp_path / "before/shop/images", "--out",
               tmp_path / "before/shop/out", "--engine", "torch") == 0
    (tmp_path / "before" / "shop").rename(tmp_path / "after" / "shop")
    assert asked(tmp_path / "after/shop/images", out=tmp_path / "after/shop/out") == (right, "", [])


@pytest.mark.long("two more moves, of which other tests have each part")
def test_a_link_that_leads_to_another_copy_is_followed(shop, tmp_path, indexed, asked, right):
    link, new = tmp_path / "link", shutil.copytree(shop, tmp_path / "new", copy_function=shutil.copyfile)
    for folder in (shop, new):
        link.unlink(missing_ok=True)
        link.symlink_to(folder)
        assert indexed(link) == 0 and asked(folder) == (right, "", [])


@pytest.mark.long("three more moves")
def test_an_index_from_before_moves_where_the_times_are_kept(shop, tmp_path, indexed, asked, right):
    older(tmp_path / "out", BEFORE_METADATA)
    assert asked(shop, "--images", shop) == (right, "", [])
    new, copy = shop.rename(tmp_path / "new"), tmp_path / "copy"
    assert indexed(new) == 0 and asked(new) == (right, "", [])
    shutil.copytree(new, copy, copy_function=shutil.copyfile)
    assert "has 0 of its 12 images" in indexed(copy)                            # what was in them was never noted


@pytest.fixture
def linked(shop, tmp_path):
    """Links to a folder and to a file outside, to folders that are taken already, and in circles."""
    for path in ("shop/beside.jpg", "shared/x.jpg", "shared/deep/y.jpg", "single/z.jpg"):
        picture(tmp_path / path)
    for link, to in (("0linked", "shared"), ("a/twice", "shared"), ("a/inner", "shared/deep"), ("a/up", "shop"),
                     ("shared/back", "shop/images"), ("shared/deep/loop", "shared"), ("z.jpg", "single/z.jpg"),
                     ("0a", "shop/images/a"), ("nothing", "not there")):
        place = tmp_path / link if link.startswith("shared") else shop / link
        place.symlink_to(tmp_path / to)
    return shop


@pytest.mark.long("several indexes")
def test_linked_folders_are_followed_where_it_is_asked_for(linked, first, tmp_path, indexed, asked, right, capsys):
    assert indexed(linked, "--follow_links", "True") == 3
    scores, err, missing = asked(linked, "--follow_links", "True")
    assert sorted(scores.keys() - right.keys()) == ["0linked/deep/y.jpg", "0linked/x.jpg", "z.jpg"] and not err
    assert right == {path: scores[path] for path in right} and not missing
    scores, err, missing = asked(linked)
    assert len(scores) == 15 and not missing
    assert err == (f"note: 3 of the 15 results are behind links that lead out of {linked}; pass --follow_links True to "
                   "have them shown\n")
    opened = Gallery(tmp_path / "out", CPU)
    for path in ("0linked/x.jpg", "z.jpg"):
        with pytest.raises(InputError, match=f"{path} is behind a link that leads out"):
            opened.file(opened.images.id_of(path))
    followed = Gallery(tmp_path / "out", CPU, follow_links=True)
    assert followed.file(followed.images.id_of("z.jpg")) == linked / "z.jpg"


@pytest.mark.long("four indexes, of which test_index_safety.py has the first")
def test_links_that_are_not_followed_are_named_and_cost_nothing(linked, first, tmp_path, indexed, asked, capsys):
    def index(*flags):
        assert run("index", "--model_checkpoint", first / "model.pth", "--images", linked, "--out", tmp_path / "out",
                   "--engine", "torch", *flags) == 0
        return capsys.readouterr()
    out, err = index()
    assert "note: 6 links to other folders were not followed, the first of them 0a; pass --follow_links True" in err
    assert "12 images, 0 of them encoded now, 1 left out (1 link out of the folder), 5 linked folders not" in out
    out, err = index("--follow_links", "True")
    assert "15 images, 3 of them encoded now" in out and "were not followed" not in err
    assert out.endswith("--follow_links True\n")
    assert "15 images, 0 of them encoded now" in index()[0]
    assert "12 images, 0 of them encoded now" in index("--prune")[0]
