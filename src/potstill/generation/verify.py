"""Compare answers, and vote among several.

Numbers are compared as numbers: fractions, percent, thousands separators, currency and units are ways to write one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple


def same_answer(one: str | None, other: str | None) -> bool:
    r"""Whether two answers are equivalent.

    - Numbers are equal when their values are: 1/2, 0.5, 50%, \frac{1}{2} and 0.50000000001 are one number, as are
      1,234 and 1234.00, $5 and 5 dollars. 50% is also 50: answers "in percent" are often written without the sign.
    - A decimal with two or more places equals a fraction that rounds to it: 3.33 is 10/3.
    - Units that measure the same are converted (50 cents, $0.50; 1.5 km, 1500 m); those that do not, differ; other
      words beside a number are ignored (72 clips).
    - Everything else is compared as text, without case, spaces, quotes and LaTeX's markup.

    None equals nothing, not even None.
    """
    if one is None or other is None:
        return False
    a, b = number(one), number(other)
    if a is None or b is None:
        return a is b and _plain(one) == _plain(other) != ""
    return any(_equal(x, y) for x in a.readings() for y in b.readings())


class Vote(NamedTuple):
    """The most frequent answer, and its share of all answers."""

    answer: str | None
    share: float


def vote(answers: Sequence[str | None]) -> Vote:
    """Find the most frequent answer (self-consistency); of equals, the first. None is no answer, but lowers the share.

    References:
        Wang et al. 2022, arXiv 2203.11171.
    """
    groups: list[list[str]] = []
    for answer in (answer for answer in answers if answer is not None):
        group = next((group for group in groups if same_answer(group[0], answer)), [])
        group.append(answer)
        if len(group) == 1:
            groups.append(group)
    best = max(groups, key=len, default=None)
    return Vote(best[0], len(best) / len(answers)) if best else Vote(None, 0.0)


class ParsedNumber(NamedTuple):
    """A number as it was written."""

    value: Fraction  # in the base unit of its kind
    places: int | None  # digits after the point that were written; None for a fraction
    percent: bool  # whether a percent sign follows; `value` is the number before it
    kind: str | None  # what its unit measures

    def readings(self) -> list[ParsedNumber]:
        """All values that it may have: 50% is 50 and 1/2."""
        if not self.percent:
            return [self]
        places = None if self.places is None else self.places + 2
        return [self, ParsedNumber(self.value / 100, places, False, self.kind)]


def number(text: str) -> ParsedNumber | None:
    """Read the number of an answer; None where it holds none, several, or a formula."""
    text = _unformatted(text).rpartition("=")[2]  # "x = 5", "24 + 48 = 72 clips": the result stands last
    matches = [*_NUMBER.finditer(text)]
    if len(matches) != 1:
        return None
    match = matches[0]
    before, after = text[: match.start()], text[match.end() :]
    unit, value = _unit(after), _value(match)
    if value is None or _OPERATORS.search(before + after) or (_GLUED.match(after) and unit is None):
        return None
    places = None if match["denominator"] else len((match["decimals"] or "").lstrip("."))
    scale = _SCALES.get((re.findall(r"[a-z]+", after.lower()) or [""])[0], 1)
    factor, kind = unit or (Fraction(1), _SIGNS.get(match["currency"]))
    percent = bool(re.match(r"\s*(%|percent\b|per cent\b)", after, re.IGNORECASE))
    exact = places if scale == 1 and factor == 1 else None
    return ParsedNumber(value * scale * factor, exact, percent, kind)


def _equal(a: ParsedNumber, b: ParsedNumber) -> bool:
    if a.kind and b.kind and a.kind != b.kind:
        return False
    difference = abs(a.value - b.value)
    if difference <= max(abs(a.value), abs(b.value)) / 10**9:  # a program's 0.30000000000000004
        return True
    if (a.places is None) == (b.places is None):
        return False
    places = a.places if b.places is None else b.places
    return places is not None and places >= 2 and difference <= Fraction(1, 2 * 10**places)


# A number in a text

_NUMBER = re.compile(
    r"(?P<sign>(?<![\w.)])[-+])?[ ]?(?P<currency>[$€£¥])?[ ]?(?<![\w.])"
    r"(?:(?P<whole_of_mixed>\d+)[ ](?=\d+/\d))?"
    r"(?P<whole>\d{1,3}(?:[,_\u00a0\u202f]\d{3})+(?!\d)|\d+(?=\D|$)|(?=\.\d))(?P<decimals>\.\d+)?"
    r"(?P<exponent>[eE][-+]?\d{1,3}(?!\w))?"
    r"(?:\s*/\s*(?P<denominator>\d+(?:\.\d+)?))?"
)
_OPERATORS = re.compile(r"[-+*/^=<>~\\{}\[\]|]|\d")
_GLUED = re.compile(r"[A-Za-z]")  # a letter right behind a number: 3x, unless it is a unit
_FRACTIONS = {"½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅛": "1/8"}
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}


def _value(match: re.Match[str]) -> Fraction | None:
    if len(match[0]) > 4000:  # more digits than Python reads; as texts they can still be compared
        return None
    digits = re.sub(r"\D", "", match["whole"])
    value = Fraction((digits or "0") + (match["decimals"] or ""))
    if match["exponent"]:
        value *= Fraction(10) ** int(match["exponent"][1:])
    if match["denominator"]:
        below = Fraction(match["denominator"])
        if below == 0:
            return None
        value /= below
    if match["whole_of_mixed"]:
        value += int(match["whole_of_mixed"])
    return -value if match["sign"] == "-" else value


# What a unit measures, its spellings, and its factor to a base unit.
_UNIT_TABLE = (
    ("length", "mm millimeter millimetre", "1/1000"),
    ("length", "cm centimeter centimetre", "1/100"),
    ("length", "m meter metre", "1"),
    ("length", "km kilometer kilometre", "1000"),
    ("mass", "mg milligram", "1/1000"),
    ("mass", "g gram", "1"),
    ("mass", "kg kilogram kilo", "1000"),
    ("time", "second s sec", "1"),
    ("time", "minute min", "60"),
    ("time", "hour h hr", "3600"),
    ("time", "day", "86400"),
    ("volume", "ml milliliter millilitre", "1/1000"),
    ("volume", "l liter litre", "1"),
    ("money", "cent ¢", "1/100"),
    ("money", "dollar usd", "1"),
    ("euros", "euro eur", "1"),
    ("imperial", "inch inches", "1/12"),
    ("imperial", "foot ft feet", "1"),
    ("imperial", "yard", "3"),
)
_UNITS = {word: (Fraction(factor), kind) for kind, words, factor in _UNIT_TABLE for word in words.split()}
_SIGNS = {"$": "money", "€": "euros", "£": "pounds", "¥": "yen"}


def _unit(after: str) -> tuple[Fraction, str] | None:
    """The factor and the kind of the unit that follows a number; None where it is no known unit.

    Units of areas and rates are no units of lengths: m^2 and km/h have an operator and never come here.
    """
    word = re.match(r"\s*([A-Za-z]+|¢)(?!\s+per\b)", after)
    name = word[1].lower() if word else ""
    return _UNITS.get(name) or _UNITS.get(name.removesuffix("s"))


# Texts


def _unformatted(text: str) -> str:
    """Remove LaTeX and Markdown, and unify minus signs, fractions and separators."""
    text = re.sub(r"\\(?:text|mathrm|mathbf|textbf|mbox)\s*\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(r"\\[dt]?frac\s*\{([^{}]+)\}\s*\{([^{}]+)\}", r" \1/\2", text)
    text = re.sub(r"\\[dt]?frac\s*(\d)\s*(\d)", r" \1/\2", text)
    text = re.sub(r"<<[^<>]*>>", "", text)  # GSM8K's notes to a calculator
    text = re.sub(r"\\left|\\right|\\[!;:]|\^\\circ|\^\{\\circ\}|°|\\(?=[$%#&_])|\*\*", "", text)
    text = text.replace("{,}", ",").replace("\\,", ",").replace("−", "-").replace("–", "-")
    text = re.sub(r"(?<=\d)([½⅓⅔¼¾⅕⅛])", r" \1", text)
    for sign, written in _FRACTIONS.items():
        text = text.replace(sign, written)
    text = re.sub(r"^\$(.*)\$$", r"\1", text.strip(), flags=re.DOTALL)
    return " ".join(text.replace("\u00a0", "_").replace("\u202f", "_").split()).rstrip(".")


def _plain(text: str) -> str:
    return re.sub(r"[\s\"'`“”‘’()$]+", "", _unformatted(text)).casefold().strip(".,:;!")
