"""What a filter's condition compares with what.

SQLite puts all texts above all numbers, so that colour > 50 has an answer. Here no text is compared with a number; and
a column of numbers among which there are words stands for its numbers where it is compared with numbers, for both where
it is compared with texts.
"""

import re
from collections.abc import Callable, Iterator
from itertools import product
from typing import NamedTuple

import sqlglot
from sqlglot import exp

from searching.numbers import Kind

EQUAL = exp.EQ, exp.NEQ, exp.Is, exp.NullSafeEQ, exp.NullSafeNEQ, exp.Nullif
ORDERED = exp.LT, exp.LTE, exp.GT, exp.GTE
SUMS = exp.Add, exp.Sub, exp.Mul, exp.Div, exp.Mod, exp.Neg, exp.Abs, exp.Round
OF_TEXTS = exp.Lower, exp.Upper, exp.Trim, exp.Substring, exp.DPipe             # which are texts, too
ANY = exp.Like, exp.Glob, exp.Length, exp.StrPosition, *OF_TEXTS                # are asked of numbers and of words
A_NUMBER = exp.Literal.number(0)


class Value(NamedTuple):
    """What an expression may be: `of` is a column, a literal, or what computes it; name: the column's, else empty."""
    of: exp.Expression
    kind: Kind
    name: str = ""


def understood(where: str, kinds: dict[str, Kind], with_words: Callable[[str], str]) -> str:
    """The condition, with `with_words` of a column of numbers where its words are meant as well. Raises ValueError
    where texts alone are compared with a number, or numbers alone with a text."""
    try:
        condition = sqlglot.parse_one(where, dialect="sqlite", into=exp.Condition)
    except (sqlglot.errors.SqlglotError, RecursionError):
        raise ValueError("it is not understood; put columns' names into double quotes, or write it simpler") from None
    columns, found = {name.lower(): (kind, name) for name, kind in kinds.items()}, {}
    for node in condition.walk():
        for left, right, equal in compared(node):
            for one, other in product(values(left, columns), values(right, columns)):
                refuse(one, other, right)
                refuse(other, one, left)
                found |= {id(each.of): each.of for each, beside in ((one, other), (other, one))
                          if mixed(each) and (is_text(beside) if equal else is_word(beside))}
        if isinstance(node, ANY) or (isinstance(node, exp.Is) and isinstance(node.expression, exp.Null)):
            found |= {id(each.of): each.of for child in node.iter_expressions() for each in values(child, columns)
                      if mixed(each)}
    for column in sorted(found.values(), key=lambda column: -column.this.meta["start"]):
        start, end = column.this.meta["start"], column.this.meta["end"] + 1
        where = where[:start] + with_words(column.name) + where[end:]
    return where


def compared(node: exp.Expression) -> Iterator[tuple[exp.Expression, exp.Expression, bool]]:
    """What a node compares with what, and whether for being equal; what is computed with is compared with a number."""
    if isinstance(node, SUMS):
        yield from ((child, A_NUMBER, False) for child in node.iter_expressions())
    elif isinstance(node, exp.Case) and node.this:
        yield from ((node.this, each.this, True) for each in node.args["ifs"])
    elif isinstance(node, exp.In):
        yield from ((node.this, each, True) for each in node.expressions)
    elif isinstance(node, exp.Between):
        yield from ((node.this, node.args[end], False) for end in ("low", "high"))
    elif isinstance(node, EQUAL + ORDERED):
        yield node.this, node.expression, isinstance(node, EQUAL)


def values(node: exp.Expression, columns: dict[str, tuple[Kind, str]]) -> list[Value]:
    """All that an expression may be, but NULL, of which no comparison holds."""
    if isinstance(node, exp.Null):
        return []
    if isinstance(node, exp.Paren | exp.Collate | exp.Nullif):
        return values(node.this, columns)
    if isinstance(node, exp.Coalesce | exp.Greatest | exp.Least):
        return [value for each in node.iter_expressions() for value in values(each, columns)]
    if isinstance(node, exp.Case):
        branches = [each.args["true"] for each in node.args["ifs"]] + [node.args.get("default") or exp.null()]
        return [value for branch in branches for value in values(branch, columns)]
    if isinstance(node, exp.Column) and node.name.lower() in columns:
        return [Value(node, *columns[node.name.lower()])]
    if isinstance(node, OF_TEXTS):
        texts = [value for value in values(node.this, columns) if is_text(value)]
        return texts or [Value(node, Kind(False, node.sql()))]
    text = isinstance(node, exp.Column | exp.Typeof) or (isinstance(node, exp.Literal) and node.is_string)
    return [Value(node, Kind(not text, node.sql() if text else None))]          # "red" is a text where no column is


def mixed(value: Value) -> bool:
    return value.kind.numbers and value.kind.text is not None


def is_text(value: Value) -> bool:
    return not value.kind.numbers and value.kind.text is not None


def is_word(value: Value) -> bool:
    """Whether it is a text that SQLite does not take for a number beside a column of numbers."""
    number = isinstance(value.of, exp.Literal) and re.fullmatch(
        r"\s*[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?\s*", value.of.name, re.ASCII | re.IGNORECASE)
    return is_text(value) and not number


def refuse(text: Value, number: Value, beside: exp.Expression) -> None:
    """Raises ValueError for a text beside what is a number, but for one that reads as a number beside a column."""
    if not is_text(text) or not number.kind.numbers:
        return
    if text.name:
        raise ValueError(f"{text.name} holds texts, as {text.kind.text[:40]!r}, which no number can be compared with")
    if not mixed(number) and not (number.of is beside.unnest() and number.name and not is_word(text)):
        raise ValueError(f"{number.name} holds numbers, which no text can be compared with" if number.name else
                         f"{text.of.sql()[:40]} is a text, which no number can be compared with")
