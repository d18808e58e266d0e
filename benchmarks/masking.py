"""Which words of a caption make way for one: each run of nouns, adjectives and determiners, as LinCIR has it.

The tags are spaCy's where it and its model en_core_web_sm are installed (pip install spacy, python -m spacy download
en_core_web_sm), else of a rule of ours: a word is a noun or an adjective unless it is listed in OTHERS, has a digit, or
ends as adverbs and verbs do (-ly, -ing, -ed of more than four letters). The rule takes some verbs for nouns; nothing of
it is random.
"""

import re
from collections.abc import Callable
from functools import cache

import numpy as np

PLACE = "$"                             # what stands for the words that made way; captions themselves have none
MODEL = "en_core_web_sm"
OF_A_RUN = frozenset(("NOUN", "PROPN", "ADJ", "DET"))
DETERMINERS = frozenset("a an the this that these those some any each every no another both all".split())
OTHERS = frozenset("""
i you he she it we they me him her us them who what which whose there here
my your his its our their and or but nor so if while as than because though although when where how why
of in on at by for with from to into onto over under above below behind beside besides between among through across
along around near off up down out inside outside against toward towards upon without within during before after about
is are was were be been being am do does did done has have had having can could will would shall should may might must
not very too also just only more most less much many few several quite really still again then now never always often
one two three four five six seven eight nine ten eleven twelve
look looks looking wear wears wearing sit sits stand stands run runs walk walks hold holds play plays show shows make
makes made take takes taken get gets go goes come comes lie lies lay see seen eat eats ride rides fly flies
""".split())

Tagged = list[tuple[int, int, str]]     # where each word of a text begins and ends, and its part of speech


@cache
def tagger() -> tuple[str, Callable[[str], Tagged]]:
    """What tags words here: its name, and the function."""
    try:
        import spacy

        model = spacy.load(MODEL, disable=["parser", "ner", "lemmatizer"])
    except (ImportError, OSError):
        return "by the rule of benchmarks/masking.py", by_rule
    return f"by spaCy's {MODEL} {model.meta.get('version', '')}", lambda text: [
        (word.idx, word.idx + len(word), word.pos_) for word in model(text) if not word.is_space]


def by_rule(text: str) -> Tagged:
    """Parts of speech, as far as a list of words and endings tells them; all else is a noun."""
    return [(found.start(), found.end(), tag_of(found[0].lower())) for found in re.finditer(r"[\w'’-]+|[^\w\s]", text)]


def tag_of(word: str) -> str:
    if word in DETERMINERS:
        return "DET"
    if not word[0].isalpha() or any(map(str.isdigit, word)) or word in OTHERS:
        return "X"
    return "X" if word.endswith(("ly", "ing")) or (word.endswith("ed") and len(word) > 4) else "NOUN"


def runs(tagged: Tagged) -> list[tuple[int, int]]:
    """Where each longest run of nouns and of what belongs to them begins and ends, in order."""
    found: list[tuple[int, int]] = []
    goes_on = False
    for start, end, tag in tagged:
        if tag in OF_A_RUN:
            found.append((found.pop()[0] if goes_on else start, end))
        goes_on = tag in OF_A_RUN
    return found


def masked(text: str, tagged: Tagged, rng: np.random.Generator) -> str:
    """The text with PLACE for each run; where there is none, for a word by chance; of an empty text PLACE alone."""
    places = runs(tagged)
    if not places:
        words = [found.span() for found in re.finditer(r"\S+", text)]
        if not words:
            return PLACE
        places = [words[rng.integers(len(words))]]
    for start, end in reversed(places):
        text = text[:start] + PLACE + text[end:]
    return text
