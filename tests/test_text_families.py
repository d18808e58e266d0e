"""Families of text models as transformers has them: each gives the vectors of a plain computation, whatever is encoded
beside, or is refused in one line. `python -m tests.sweep_texts` tries all of them."""

import json
import os
import pty
import shutil
import subprocess
import sys

import huggingface_hub
import pytest
import torch
import transformers

from machine import sentence_encoder as encoders
from machine.errors import InputError
from text_encoders import sentence_source

from .services import ROOT, write_bert
from .sweep_texts import FAMILIES, tokenizer, verdict, write


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """family, which of several -> its folder, made once."""
    made = {}

    def folder(family, which=0):
        if (family, which) not in made:
            made[family, which] = tmp_path_factory.mktemp("models") / family
            write(family, FAMILIES[family][which], made[family, which])
        return made[family, which]
    return folder


@pytest.mark.parametrize(("family", "which", "layer", "length"), [
    ("bert", 0, -2, 25), ("convbert", 0, -2, 25), ("fnet", 0, -2, 25), ("mobilebert", 0, -2, 25),
    ("mobilebert", 1, -1, 25), ("nystromformer", 0, -2, None), ("yoso", 0, -2, 25), ("albert", 0, -2, 25),
    ("albert", 1, -2, None), ("roberta", 0, -2, None), ("camembert", 0, -2, None), ("mpnet", 0, -1, None),
    ("xlm", 0, -1, 25), ("flaubert", 0, -2, 25), ("funnel", 0, -1, 25), ("big_bird", 1, -2, 25), ("tapas", 0, -1, 25)])
def test_a_vector_is_the_models_own_whatever_is_encoded_beside(folders, family, which, layer, length):
    found, more = verdict(folders(family, which), layer, length)
    assert found == "right", more


@pytest.mark.parametrize(("family", "which", "length", "said"), [
    ("bart", 0, 25, "of the type bart, which has a decoder"), ("led", 0, 25, "has a decoder"),
    ("siglip2", 0, 25, "of the type siglip2, for images and texts"), ("canine", 0, 25, "of the type canine; name a"),
    ("xlnet", 0, 25, "<sep> <cls>"), ("gpt2", 0, 25, r"no \[CLS\]"), ("bros", 0, 25, "bbox"),
    ("luke", 0, 25, "takes no plain texts"), ("big_bird", 1, None, "with a lower -max_seq_len"),
    ("funnel", 0, None, "-max_seq_len NONE")])
def test_what_is_no_bert_is_refused_in_one_line(folders, family, which, length, said):
    with pytest.raises(encoders.ModelError, match=said) as caught:
        encoders.sentence_encoder(str(folders(family, which)), length=length)
    assert "\n" not in str(caught.value)


def test_an_encoder_of_t5_alone_is_not_called_damaged(tmp_path):
    words = tokenizer("t5")
    words.save_pretrained(tmp_path)
    config = transformers.T5Config(vocab_size=len(words), d_model=16, d_ff=16, d_kv=4, num_layers=1, num_heads=2)
    transformers.T5EncoderModel(config).save_pretrained(tmp_path)
    with pytest.raises(encoders.ModelError, match=r"of the type t5 .* no \[SEP\]"):
        encoders.sentence_encoder(str(tmp_path))


def test_a_pair_is_joined_as_its_tokenizer_joins_it(folders):
    for family, between in (("roberta", 2), ("bert", 1)):
        folder = folders(family)
        encoder = encoders.SentenceEncoder(str(folder))
        own = transformers.AutoTokenizer.from_pretrained(folder)("red", "old dog").input_ids
        ids, _ = encoder.token_ids(["red ||| old dog"])[0]
        assert ids == own and ids[1:-1].count(encoder.tokenizer.sep_token_id) == between
        for first in range(30):
            for second in range(1, 30):
                assert len(encoder.joined([9] * first, [9] * second)[0]) <= 25


def test_vectors_that_were_others_once_are_kept_under_another_name(folders):
    for family, again in (("bert", True), ("convbert", False)):
        folder = folders(family)
        model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32)
        words = transformers.AutoTokenizer.from_pretrained(folder)
        name = encoders.fingerprint(words, model)
        assert encoders.SentenceEncoder(str(folder)).fingerprint == name     # before and after it was used
        encoders.OTHER_BEFORE, before = (), encoders.OTHER_BEFORE
        try:
            assert (encoders.fingerprint(words, model) == name) == again
        finally:
            encoders.OTHER_BEFORE = before


@pytest.mark.parametrize(("family", "files"), [
    ("bert", "tokenizer.json or vocab.txt"), ("roberta", "tokenizer.json or vocab.json and merges.txt"),
    ("modernbert", "a folder with tokenizer.json")])
def test_a_missing_tokenizer_is_called_by_its_files(folders, tmp_path, family, files):
    shutil.copytree(folders(family), tmp_path / "model")
    for path in (tmp_path / "model").glob("*token*"):
        path.unlink()
    with pytest.raises(encoders.ModelError, match=files):
        encoders.sentence_encoder(str(tmp_path / "model"))


CODE = "open({path!r}, 'w').close()\nfrom transformers import BertConfig as Ours, BertTokenizer as OurTokenizer\n"


@pytest.mark.long("a process")
@pytest.mark.parametrize("part", ["config.json", "tokenizer_config.json"])
def test_a_folder_with_code_is_not_asked_about_and_its_code_not_run(tmp_path, part):
    """The program's input is a terminal on which a hasty user has said yes."""
    folder, ran = write_bert(tmp_path / "model", size=16), tmp_path / "ran"
    (folder / "ours.py").write_text(CODE.format(path=str(ran)))
    settings = {} if part != "config.json" else json.loads((folder / part).read_text()) | {"model_type": "ours"}
    settings |= {"auto_map": {"AutoConfig": "ours.Ours", "AutoModel": "ours.Ours",
                              "AutoTokenizer": ["ours.OurTokenizer", None]}, "tokenizer_class": "OurTokenizer"}
    (folder / part).write_text(json.dumps(settings))
    user, program = pty.openpty()
    try:
        os.write(user, b"y\ny\n")
        done = subprocess.run([sys.executable, "bert_server.py", "-model_dir", str(folder)], cwd=ROOT, stdin=program,
                              capture_output=True, text=True, check=False, timeout=60,
                              env={**os.environ, "HF_HOME": str(tmp_path / "home")})
    finally:
        os.close(user)
        os.close(program)
    lines = [line for line in done.stderr.splitlines() if "loading" not in line]
    assert done.returncode == 2 and not done.stdout and not ran.exists(), done
    assert len(lines) == 1, lines
    assert ("no such code is run" if part == "config.json" else "cannot load the tokenizer of") in lines[0]


@pytest.mark.parametrize(("name", "hint"), [("of/nobody", True), ("nobody", True), ("/no", False), ("./no", False)])
def test_only_what_is_to_be_fetched_is_said_to_be(name, hint, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError) as caught:
        sentence_source({"text_encoder": f"hf:{name}", "pooling_layer": -2, "max_seq_len": 25})
    assert ("HF_HUB_OFFLINE=0" in str(caught.value)) == hint


def test_a_folder_at_hand_is_not_said_to_be_fetched(folders, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for changes in ({"pooling_layer": -9, "max_seq_len": 25}, {"pooling_layer": -2, "max_seq_len": 65}):
        with pytest.raises(InputError) as caught:
            sentence_source({"text_encoder": f"hf:{folders('bert')}", **changes})
        assert "HF_HUB_OFFLINE" not in str(caught.value)
