"""What is not worth learning from, and why: each filter gives a reason for each row that it would drop.

Nothing is deleted here: `sift` says which rows stay, and for the others which filter dropped them and why.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol


class Pair(NamedTuple):
    """What filters see of a row: what was asked, and what was said."""

    prompt: str
    completion: str


class Filter(Protocol):
    """Finds what should be dropped."""

    @property
    def name(self) -> str:
        """How reports call it."""

    def reasons(self, pairs: Sequence[Pair]) -> Iterable[str | None]:
        """For each row, in order, why it should go; None where it may stay."""


class Dropped(NamedTuple):
    """A row that goes.

    Args:
        row: its place among the rows.
        filter: the name of the filter.
        reason: in words, with the figures.
    """

    row: int
    filter: str
    reason: str


class Sifted(NamedTuple):
    """The places of the rows that stay, and those that go, each in order."""

    kept: list[int]
    dropped: list[Dropped]


def sift(pairs: Sequence[Pair], filters: Iterable[Filter]) -> Sifted:
    """Pass rows through filters, one after the other; each sees what the one before let through."""
    kept = list(range(len(pairs)))
    dropped: list[Dropped] = []
    for one in filters:
        reasons = list(one.reasons([pairs[row] for row in kept]))
        found = [Dropped(row, one.name, why) for row, why in zip(kept, reasons, strict=True) if why is not None]
        dropped += found
        gone = {drop.row for drop in found}
        kept = [row for row in kept if row not in gone]
    return Sifted(kept, sorted(dropped))


@dataclass(frozen=True)
class Length:
    """Completions that are too short or too long, in characters without the space around them."""

    minimum: int = 1
    maximum: int | None = None
    name = "length"

    def reasons(self, pairs: Sequence[Pair]) -> Iterator[str | None]:
        for pair in pairs:
            length = len(pair.completion.strip())
            if length < self.minimum:
                yield f"{length} characters, fewer than {self.minimum}"
            elif self.maximum is not None and length > self.maximum:
                yield f"{length} characters, more than {self.maximum}"
            else:
                yield None


@dataclass(frozen=True)
class Repetition:
    """Completions that say the same again and again: zlib makes them more than `maximum` times smaller.

    Prose of some hundred characters shrinks 1.5 to 2 times, long worked solutions up to 4, a text that is caught in a
    loop 10 times and more. The last 1,000 characters are judged by themselves too, because loops come last. It works in
    every language; texts under 100 bytes are too short to tell.
    """

    maximum: float = 5.0
    name = "repetition"

    def reasons(self, pairs: Sequence[Pair]) -> Iterator[str | None]:
        for pair in pairs:
            shrinks = max(_shrinks(pair.completion), _shrinks(pair.completion[-1000:]))
            yield f"shrinks {shrinks:.1f} times, more than {self.maximum:g}" if shrinks > self.maximum else None


def _shrinks(text: str) -> float:
    raw = text.encode(errors="replace")
    return len(raw) / len(zlib.compress(raw)) if len(raw) >= 100 else 1.0


@dataclass(frozen=True)
class Charset:
    """Completions with too many letters of other scripts, or with characters that no text has.

    Args:
        scripts: what letters may be, as Unicode names them: latin, greek, cyrillic, cjk, hiragana, arabic, ...;
            empty for all of them.
        other: the share of the letters that may be of other scripts.
    """

    scripts: tuple[str, ...] = ()
    other: float = 0.1
    name = "charset"

    def reasons(self, pairs: Sequence[Pair]) -> Iterator[str | None]:
        allowed = {script.upper() for script in self.scripts}
        for pair in pairs:
            broken = [sign for sign in pair.completion if _is_broken(sign)]
            found = Counter(_script(sign) for sign in pair.completion if sign.isalpha()) if allowed else Counter()
            foreign = {script: count for script, count in found.items() if script not in allowed}
            if broken:
                yield f"holds U+{ord(broken[0]):04X}, which no text has"
            elif sum(foreign.values()) > self.other * found.total():
                share = sum(foreign.values()) / found.total()
                yield f"{share:.0%} of the letters are {max(foreign, key=lambda s: foreign[s]).lower()}"
            else:
                yield None


def _is_broken(sign: str) -> bool:
    """What is left of bytes that were no UTF-8, control characters, halves of a surrogate pair."""
    return sign == "\ufffd" or (unicodedata.category(sign) in ("Cc", "Cs") and sign not in "\n\r\t")


def _script(letter: str) -> str:
    return unicodedata.name(letter, "UNKNOWN").partition(" ")[0]


_REFUSAL = re.compile(
    r"\W*(?:i(?:['’]m|\s+am)\s+(?:very\s+|really\s+|so\s+)?sorry\b|(?:my\s+)?apologies\b|sorry,\s+(?:but\s+)?i\b|i\s+apologi[sz]e\b"
    r"|(?:unfortunately,?\s+)?(?:but\s+)?i(?:\s+simply)?\s+(?:can(?:['’]t|not|\s+not)|won['’]t|will\s+not|am\s+(?:not\s+able|unable)|['’]m\s+(?:not\s+able|unable))"
    r"(?:\s+to)?\s+(?:assist|help|answer|provide|fulfil|comply|discuss|do\s+that|create|generate|give|offer|respond|support|engage)"
    r"|as\s+an?\s+(?:ai|artificial\s+intelligence|(?:large\s+)?language\s+model)\b|i(?:['’]m|\s+am)\s+(?:just\s+)?an?\s+(?:ai|language\s+model)\b)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Refusals:
    """Completions that begin with a refusal or an apology, in English."""

    name = "refusal"

    def reasons(self, pairs: Sequence[Pair]) -> Iterator[str | None]:
        for pair in pairs:
            found = _REFUSAL.match(pair.completion)
            yield f"begins with {found[0].strip()!r}" if found else None


def words(text: str) -> list[str]:
    """The words of a text in lower case; a number is one, and so is each sign of the scripts that put no spaces."""
    return _WORDS.findall(text.lower())


_WORDS = re.compile(r"\d+(?:[.,]\d+)*|[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\d]+")
