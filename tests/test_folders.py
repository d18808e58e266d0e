"""What lies in people's folders beside their photos, how its names are written, and what is behind links."""

import json
import os
import shutil
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from PIL import Image

import search
from benchmarks.triplets import Triplets
from data import check
from machine.errors import InputError
from machine.picture_files import EXTRA, decode
from machine.picture_folder import Walk, is_systems_own
from machine.resizing import square
from searching.image_list import ImageList
from searching.metadata import placed

from .conftest import picture
from .index_faults import write_model
from .services import ROOT
from .test_search import made, quiet  # noqa: F401


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "model.pth")


def shop(root, lines, *names):
    for name in names:
        picture(root / name)
    (root / "metadata.jsonl").write_text("".join(json.dumps(
        {"source_file_name": source, "target_file_name": target, "text": "is red", "split": "test"}) + "\n"
        for source, target in lines))
    return root


def indexed(model, folder, tmp_path):
    built = made(model, folder, tmp_path / "out")
    images = ImageList(tmp_path / "out" / "images.sqlite")
    return built, sorted(images.paths(images.ids()).values())


# A system's own folders

SYSTEMS = ["@eaDir/a.jpg/SYNOPHOTO_THUMB_XL.jpg", "#recycle/old.jpg", "$RECYCLE.BIN/S-1-5-21/$R1.jpg",
           ".Trash-1000/files/a.jpg", ".@__thumb/a.jpg", "__MACOSX/a.jpg", "System Volume Information/a.jpg",
           "trip/@eaDir/b.jpg/SYNOPHOTO_THUMB_M.jpg", "@Recycle/a.jpg", "My.photoslibrary/resources/derivatives/a.jpg",
           ".thumbnails/a.jpg", "RECYCLER/S-1-5-21-1/a.jpg", "appdata_oc1x/preview/a.jpg", "#snapshot/daily/a.jpg"]


@pytest.mark.parametrize("below", SYSTEMS)
def test_a_systems_own_folder_is_in_no_gallery(below, tmp_path):
    root = shop(tmp_path / "nas", [("a.jpg", "b.jpg")], "a.jpg", "b.jpg")
    (root / below).parent.mkdir(parents=True)
    shutil.copy(root / "a.jpg", root / below)
    walk = Walk(root)
    assert [path for path, _ in walk.images()] == Triplets(root, "test").images == ["a.jpg", "b.jpg"]
    assert "1 folder that is hidden or the system's own (" in walk.summary()


def test_users_own_folders_are_in_the_gallery(tmp_path):
    names = ["@summer/a.jpg", "#1/a.jpg", "$5 shirts/a.jpg", "recycled/a.jpg", "recycle bin/a.jpg", "thumbnails/a.jpg",
             "My.photoslibrary/originals/0/a.jpg", "2024.lightroom/a.jpg"]
    for name in names:
        picture(tmp_path / name)
    assert [path for path, _ in Walk(tmp_path).images()] == sorted(names)
    assert not any(map(is_systems_own, ("eaDir", "recycle", "bin", "x.photoslibrary", "S-1-5-21")))


def test_index_and_training_agree_and_say_it_in_one_line(model, tmp_path):
    """README's NAS: two photos, of which a thumbnail lies in each folder."""
    names = "a.jpg", "b.jpg", "trip/c.jpg"
    root = shop(tmp_path / "nas", [("a.jpg", "b.jpg")], *names, ".hidden/h.jpg", "@eaDir/a.jpg/S.jpg",
                "trip/@eaDir/c.jpg")
    built, listed = indexed(model, root, tmp_path)
    data = Triplets(root, "test")
    assert listed == sorted(data.images) == sorted(names)
    said = "3 folders that are hidden or the system's own (.hidden)"
    assert built.summary == f"0 left out, {said}, 1 other file" and f"; passed over: {said}" in data.about


@pytest.mark.long("two indexes")
def test_what_an_older_index_has_of_them_leaves_it(model, tmp_path):
    folder = tmp_path / "nas"
    for number in range(12):
        picture(folder / f"{number}.jpg")
    picture(folder / "eaDir" / "S.jpg")
    assert "eaDir/S.jpg" in indexed(model, folder, tmp_path)[1]
    (folder / "eaDir").rename(folder / "@eaDir")
    images = ImageList(tmp_path / "out" / "images.sqlite")
    with images.changing() as database:                                         # as if it had been taken in there
        row = images.entries("path = ?", (b"eaDir/S.jpg",))[0]
        database.execute("DELETE FROM images WHERE path = ?", (b"eaDir/S.jpg",))
        images.insert(database, (row.number, b"@eaDir/S.jpg", *row.version, row.feature, row.content))
    assert [name for name in indexed(model, folder, tmp_path)[1] if "/" in name] == []


def test_a_table_that_names_one_of_them_is_told_so(tmp_path):
    root = shop(tmp_path, [("a.jpg", ".photos/b.jpg")], "a.jpg", ".photos/b.jpg")
    with pytest.raises(InputError, match=r"line 1: .photos/b.jpg is passed over, as .photos is hidden.*rename it"):
        Triplets(root, "test")


def test_published_datasets_pass_over_them_too(mitstates, fashion_iq):
    from datasets import FashionIQ, MITStates
    before = MITStates(mitstates, "train").images, FashionIQ(fashion_iq, "test").images
    for name in ("@eaDir/0.jpg", "System Volume Information/0.jpg", "$RECYCLE.BIN/0.jpg"):
        picture(mitstates / "images" / name)
        (fashion_iq / "all_imgs" / name).mkdir(parents=True)                    # as Synology's, a folder a picture
    data = MITStates(mitstates, "train")
    assert (data.images, FashionIQ(fashion_iq, "test").images) == before
    assert data.dropped["folders of the system's own"] == 3


# The same picture twice

@pytest.mark.parametrize(("targets", "wrong"), [("b.jpg", 1), ("b.jpg|copy.jpg", 0)])
def test_a_double_of_a_right_answer_that_counts_as_wrong_is_wrong(tmp_path, capsys, targets, wrong):
    root = shop(tmp_path, [("a.jpg", targets), ("c.jpg", "a.jpg")], "a.jpg", "b.jpg", "c.jpg")
    (root / "metadata.jsonl").write_text("".join(json.dumps(
        {"source_file_name": "a.jpg", "target_file_names": targets.split("|"), "text": "is red", "split": split}) + "\n"
        for split in ("train", "test")))
    shutil.copy(root / "b.jpg", root / "copy.jpg")
    code = check.main(["--dataset", "triplets", "--dataset_path", str(root)])
    said = capsys.readouterr().out
    assert code == wrong
    assert ("wrong: 1 images of the test gallery are copies of right answers that count as wrong ones, first copy.jpg "
            "= b.jpg" in said) == bool(wrong)


# Names that look the same

NFC, NFD = "café.jpg", unicodedata.normalize("NFD", "café.jpg")
MAC, PLAIN = "Screenshot 2024-01-02 at 3.04.05\u202fPM.png", "Screenshot 2024-01-02 at 3.04.05 PM.png"
LOOKS = [(NFD, NFC), (NFC, NFD), (MAC, PLAIN), ("a b.jpg", "a\u00a0b.jpg"), ("a\u200bb.jpg", "ab.jpg"),
         ("\u202aa.jpg", "a.jpg"), ("a\u2011b.jpg", "a-b.jpg"), ("Å.jpg", "\u212b.jpg"), ("a\u3000b.jpg", "a b.jpg")]


@pytest.mark.parametrize(("on_disk", "written"), LOOKS)
def test_a_name_that_looks_the_same_is_the_one_that_is_meant(model, tmp_path, on_disk, written):
    root = shop(tmp_path / "shop", [(written, "x.jpg"), ("x.jpg", f"./{written}")], on_disk, "x.jpg")
    data = Triplets(root, "test")
    assert [data.images[line.source] for line in data.annotations] == [on_disk, "x.jpg"]
    assert [data.images[line.targets[0]] for line in data.annotations] == ["x.jpg", on_disk]
    (root / "gallery.txt").write_text(f"{written}\nx.jpg\n", "utf-8")
    assert sorted(Triplets(root, "test").images) == sorted([on_disk, "x.jpg"])
    assert placed({written: {"price": 1}}, [f"below/{on_disk}", "x.jpg"]) == ({f"below/{on_disk}": {"price": 1}}, {})
    words = ["query", "--index", "x", "--image", f"{root}/{written}"]
    assert search.get_parser().parse_args(words).image == root / on_disk
    indexed(model, root, tmp_path)
    images = ImageList(tmp_path / "out" / "images.sqlite")
    assert images.paths(images.ids(written[:-4].upper())) == {images.id_of(on_disk): on_disk}
    assert images.id_of(written) == images.id_of(on_disk) is not None


def test_the_very_name_comes_first_and_of_several_others_it_is_said_in_what_they_differ(tmp_path):
    root = shop(tmp_path, [(NFC, NFD)], NFC, NFD)
    (line,), images = Triplets(root, "test").annotations, Triplets(root, "test").images
    assert [images[line.source], images[line.targets[0]]] == [NFC, NFD]
    assert placed({NFC: {}, NFD: {"x": 1}}, [NFC, NFD]) == ({NFC: {}, NFD: {"x": 1}}, {})
    names = ["a\u00a0b.jpg", "a\u202fb.jpg"]
    shop(tmp_path, [("a b.jpg", NFC)], *names)
    with pytest.raises(InputError, match=r"line 1: a b.jpg is not in .*\('a\\xa0b.jpg', 'a\\u202fb.jpg'\); rename one"):
        Triplets(tmp_path, "test")
    left = placed({"a b.jpg": {}}, names)[1]["a b.jpg"]
    assert left == r"several images have this name ('a\xa0b.jpg', 'a\u202fb.jpg')"


# Pictures of kinds that are not read

without_heif = pytest.mark.skipif(bool(EXTRA), reason="run by the test below, which hides pillow-heif")


@pytest.mark.long("a process that runs tests")
def test_all_is_said_where_pillow_heif_is_missing(tmp_path):
    (tmp_path / "pillow_heif.py").write_text("raise ImportError")
    words = "-n", "0", "tests/test_folders.py", "-k", "counted_by_ending or told_what_helps"
    done = subprocess.run([sys.executable, "-m", "pytest", *words], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0 and "6 passed" in done.stdout and "skipped" not in done.stdout, done.stdout


@without_heif
def test_pictures_that_are_not_read_are_counted_by_ending_with_what_helps(model, tmp_path, caplog):
    for number in range(40):
        (tmp_path / "shop" / f"{number}.HEIC").parent.mkdir(exist_ok=True)
        (tmp_path / "shop" / f"{number}.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(InputError, match=r"no image.*40 files end in .heic: pip install pillow-heif"):
        made(model, tmp_path / "shop", tmp_path / "out")
    root = shop(tmp_path / "shop", [("a.jpg", "b.jpg")], "a.jpg", "b.jpg", "c.jpg")
    for name in ("x.CR2", "y.nef", "z.psd", "notes.txt"):
        (root / name).write_bytes(b"II*\0")
    (root / "c.jpg").rename(root / "IMG_0001")
    (root / "empty").touch()
    shutil.copy(root / "a.jpg", root / "d.jpg_large")
    built = made(model, root, tmp_path / "out")
    said = ("40 files end in .heic: pip install pillow-heif, and they are read; 2 files end in .cr2 or .nef: as a "
            "camera's raw files they are no pictures yet; save as JPEG with darktable, RawTherapee or the camera's "
            "own program; 1 file ends in .psd: save as JPEG or PNG; 2 files have a name without a picture's "
            "ending: give them the ending .jpg")
    assert built.summary == "0 left out, 45 images of a kind that is not read, 3 other files" and built.images == 2
    (note,) = [record.message for record in caplog.records if "files end" in record.message]
    assert sorted(note.removeprefix("note: ").split("; ")) == sorted(said.split("; "))
    from benchmarks.base import note_passed_over
    assert note_passed_over([Triplets(root, "test")]) == note.removeprefix("note: ")


@without_heif
@pytest.mark.parametrize(("name", "said"), [
    ("x.heic", "1 file ends in .heic: pip install pillow-heif"), ("x.dng", "darktable"), ("x", "give them the ending"),
    ("x.jpg.1", "give them the ending .jpg"), ("x.txt", "does not end as a picture does")])
def test_a_table_that_names_one_is_told_what_helps(tmp_path, name, said):
    root = shop(tmp_path, [("a.jpg", "b.jpg"), ("a.jpg", name)], "a.jpg", "b.jpg")
    shutil.copy(root / "a.jpg", root / name)
    with pytest.raises(InputError, match=f"line 2: {name} .*{said}"):
        Triplets(root, "test")


def test_every_ending_of_what_is_read_is_one(tmp_path, model):
    names = [f"a{ending}" for ending in (".jpe", ".JPE", ".pgm", ".dib", ".mpo", ".jfif")]
    for name in names:
        picture(tmp_path / "shop" / "a.jpg")
        (tmp_path / "shop" / "a.jpg").rename(tmp_path / "shop" / name)
    assert indexed(model, tmp_path / "shop", tmp_path)[1] == sorted(names)


# Links

def test_triplets_photos_behind_links_are_the_gallerys_each_once(tmp_path):
    for name in ("photos/a.jpg", "photos/b.jpg"):
        picture(tmp_path / "big" / name)
    root = shop(tmp_path / "shop", [("photos/a.jpg", "c.jpg"), ("more/b.jpg", "photos/a.jpg"), ("one.jpg", "c.jpg")],
                "c.jpg")
    (root / "photos").symlink_to(tmp_path / "big" / "photos")
    (root / "more").symlink_to(tmp_path / "big" / "photos")                     # the same folder again
    (root / "round").symlink_to(root)
    (root / "one.jpg").symlink_to(root / "c.jpg")
    data = Triplets(root, "test")
    assert data.images[:data.gallery] == ["c.jpg", "one.jpg", "more/a.jpg", "more/b.jpg"]
    assert [(data.images[line.source], data.images[line.targets[0]]) for line in data.annotations] == [
        ("more/a.jpg", "c.jpg"), ("more/b.jpg", "more/a.jpg"), ("one.jpg", "c.jpg")]
    assert "; passed over: 2 linked folders not followed" in data.about
    assert check.main(["--dataset", "triplets", "--dataset_path", str(root)]) == 1
    shutil.rmtree(tmp_path / "big")
    with pytest.raises(InputError, match=r"photos/a.jpg is not in"):
        Triplets(root, "test")


def test_phones_pictures_are_read_where_pillow_heif_is_installed(tmp_path, model):
    picture(tmp_path / "shop" / "a.jpg")
    with Image.open(tmp_path / "shop" / "a.jpg") as image:
        turned = Image.Exif()
        turned[0x112] = 6
        image.save(tmp_path / "shop" / "b.HEIC", exif=turned.tobytes(), quality=95)
        plain = np.asarray(image.transpose(Image.Transpose.ROTATE_270))
    root = shop(tmp_path / "shop", [("a.jpg", "b.HEIC")], "a.jpg")
    listed = indexed(model, root, tmp_path)[1]
    assert listed == ["a.jpg", "b.HEIC"] and Triplets(root, "test").images == listed
    assert np.abs(decode(root / "b.HEIC", 32, upright=True).astype(int)
                  - square(Image.fromarray(plain), 32, "bilinear")).mean() < 8
