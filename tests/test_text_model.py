"""Vocabulary, LSTM text encoder, and what happens where no sentence service answers."""

import socket
import subprocess
import sys

import pytest
import torch

from machine.errors import InputError
from machine.vocabulary import tokenize
from text_model import SentenceService, SentenceTable, SimpleVocab, TextLSTMModel

from . import golden
from .conftest import run_main


def test_vocabulary_and_encodings_are_the_originals():
    vocabulary = SimpleVocab.from_texts(golden.VALUES["texts_for_vocab"])
    assert vocabulary.word2id == golden.VALUES["vocab"]
    assert [vocabulary.encode(text) for text in golden.VALUES["query_texts"]] == golden.VALUES["encoded"]


@pytest.mark.parametrize(("text", "words"), [
    ("A-line, café!", ["aline", "caf"]), ("  ", []), ("", []), ("日本", []), ("...", []),
    ("UPPER\tlower\n", ["upper", "lower"])])
def test_tokens(text, words):
    assert tokenize(text) == words


def test_unknown_and_empty_texts_are_the_unknown_word():
    vocabulary = SimpleVocab.from_texts(["red dress"])
    assert [vocabulary.encode(text) for text in ("green dress", "", "!?")] == [[0, 2], [0], [0]]


def test_a_padded_batch_gives_what_each_text_gives_alone():
    torch.manual_seed(0)
    model = TextLSTMModel(SimpleVocab.from_texts(["a b c d e f"]), 12).eval()
    texts = ["a", "a b c d e f", "", "f e", "unheard of"]
    with torch.no_grad():
        together = model(texts)
        alone = torch.cat([model([text]) for text in texts])
    torch.testing.assert_close(together, alone)
    assert together.shape == (5, 12)


@pytest.mark.long("a process")
def test_importing_contacts_nothing_and_needs_no_client():
    code = "import text_model, main, sys; sys.exit('zmq' in sys.modules or 'bert_serving' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_service_is_one_clear_line_within_the_timeout():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]                                            # nothing listens on it
    with pytest.raises(InputError, match=f"no sentence service at 127.0.0.1:{port}"):
        SentenceTable(SentenceService("127.0.0.1", port, port, timeout=0.5))


def test_what_an_lstm_cannot_read_is_listed():
    vocabulary = SimpleVocab.from_texts(["red dress", "blue A-line"])
    assert vocabulary.unread(["Red, aline!", "red café dress", "лук", "лук", "", "green caf"]) == (
        ["caf", "green"], ["лук", ""])


def test_a_run_says_once_what_its_lstm_cannot_read(fashion200k, tmp_path, caplog):
    run_main("fashion200k", fashion200k, tmp_path / "logs", num_iters=1)
    assert "the LSTM does not know 3 of the tests' words (replace, with, skirt), which are in" in caplog.text
    assert caplog.text.count("note: the LSTM") == 1 and "no word" not in caplog.text
