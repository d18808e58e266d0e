"""What the cells of a table's column are: numbers, as people write them, or texts.

A column is numbers where all of its cells that have a digit are written in one way that reads in one way.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

PLAIN = re.compile(r"[+-]?((0|[1-9]\d*)(\.\d*)?|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)    # 007 is a name
SPACES = str.maketrans("\u00a0\u2009\u202f\u2212\u2019", "   -'")               # and a minus, an apostrophe
UNIT = ("(?:[A-Z]{0,2}[$¢£¥₠-⃏]|(?:AED|AUD|BGN|BRL|CAD|CHF|CLP|CNY|COP|CZK|DKK|EUR|GBP|HKD|HUF|IDR|ILS|INR|JPY|KRW|MXN|"
        "MYR|NOK|NZD|PHP|PLN|RON|RSD|RUB|SAR|SEK|SGD|THB|TRY|TWD|UAH|USD|VND|ZAR)|Kč|kr|zł|Ft|Rs|%|‰)")
SPELLED = {mark: re.compile(rf"(?P<sign>[+-]?)(?P<before>{UNIT})? ?(?P<minus>-?)(?P<whole>0|[1-9]\d*|[1-9]\d{{0,2}}"
                            rf"(?:(?P<group>[{groups}])\d{{3}})(?:(?P=group)\d{{3}})*)(?:[{mark}](?P<part>\d+))?"
                            rf" ?(?P<behind>{UNIT})?", re.ASCII) for mark, groups in ((".", ", '"), (",", ". '"))}
# Of a column of numbers; in one of texts they are words.
NOTHING = {"-", "--", "---", "–", "—", ".", "?", "n/a", "n.a.", "na", "#n/a", "#na", "<na>", "null", "#null!", "none",
           "nil", "nan", "empty", "#value!", "#ref!", "#div/0!", "#num!", "#name?"}

Cell = str | int | float | None


class Column(NamedTuple):
    """note: what is to be said of how the cells were read; empty where nothing is."""
    cells: list[Cell]
    note: str


class Kind(NamedTuple):
    """What a column holds: numbers, texts, or both; text: one of them."""
    numbers: bool
    text: str | None

    @classmethod
    def of(cls, cells: Iterable[Cell]) -> "Kind":
        found = set(cells) - {None}
        return cls(any(map(is_number, found)), next((value for value in found if isinstance(value, str)), None))


def is_number(value) -> bool:
    """Whether it is one that SQLite and JSON keep as it is."""
    return (type(value) is int and -2**63 <= value < 2**63) or (type(value) is float and math.isfinite(value))


def plain(text: str) -> int | float | None:
    """As programs write it; None where it is none."""
    if not PLAIN.fullmatch(text):
        return None
    value = int(text) if text.lstrip("+-").isdigit() else float(text)
    return value if is_number(value) else None


def spelled(text: str, mark: str) -> tuple[int | float, str, str] | None:
    """A number with this decimal mark and others between thousands, and the units around it."""
    found = SPELLED[mark].fullmatch(text.translate(SPACES))
    if not found or (found["sign"] and found["minus"]):
        return None
    whole = found["sign"] + found["minus"] + re.sub(r"[,. ']", "", found["whole"])
    value = float(f"{whole}.{found['part']}") if found["part"] else int(whole)
    return (value, found["before"] or "", found["behind"] or "") if is_number(value) else None


def read_column(name: str, values: Sequence[Cell]) -> Column:
    """What a column's values are that are texts without blanks around them, numbers, or None."""
    texts, given = Counter(value for value in values if isinstance(value, str)), [*filter(is_number, values)]
    written = [text for text in texts if any(map(str.isdigit, text))]
    words = [text for text in texts if not any(map(str.isdigit, text)) and text.lower() not in NOTHING]
    if len(given) + sum(texts[text] for text in written) <= sum(texts[text] for text in words):
        return as_texts(values)
    numbers, notes = {text: plain(text) for text in written}, []
    if None in numbers.values():
        readings = [*filter(None, (reading(written, mark, bool(given)) for mark in SPELLED))]
        if not readings:
            return as_texts(values)
        numbers = readings[0]
        if text := next((text for text in written if numbers[text] != readings[-1][text]), None):
            return as_texts(values, f"{name} stays texts: {text} may be {numbers[text]} or {readings[-1][text]}; write "
                                    "it without a mark between thousands")
        text = next(text for text in written if plain(text) is None)
        notes.append(f"{name} is read as numbers: {text} is {numbers[text]}")
    if words:
        several = f" and {len(words) - 1} others" if len(words) > 1 else ""
        notes.append(f"{name} holds {words[0]!r}{several} among its numbers; no comparison with a number holds of that")
    words = {text: text for text in words}
    return Column([value if is_number(value) else numbers.get(value, words.get(value)) for value in values],
                  "; ".join(notes))


def as_texts(values: Sequence[Cell], note: str = "") -> Column:
    return Column([None if value is None else str(value) for value in values], note)


def reading(written: list[str], mark: str, given: bool) -> dict[str, int | float] | None:
    """All of these with this decimal mark and one unit, which there is none of beside numbers that are given as such;
    None where one does not fit."""
    found, units = {}, {("", "")} if given else set()
    for text in written:
        if not (read := spelled(text, mark)) or len(units := units | {read[1:]}) > 1:
            return None
        found[text] = read[0]
    return found
