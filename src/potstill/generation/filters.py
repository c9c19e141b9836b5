"""Filters of generated texts: each gives a reason for each text that it drops."""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

from potstill.data.duplicates import words
from potstill.data.locate import locate
from potstill.data.sources import Source
from potstill.errors import DataError
from potstill.losses.declared import NonEmpty, Range, Record

SHINGLE = 5  # words that are compared as one
PERMUTATIONS = 128  # of a MinHash: more of them find more of the pairs near the threshold

CompressionRatio = Annotated[float, Range(gt=1)]
Similarity = Annotated[float, Range(gt=0, le=1)]
Share = Annotated[float, Range(gt=0, lt=1)]


class TextPair(NamedTuple):
    """A prompt and its completion, as filters read them."""

    prompt: str
    completion: str


class Filter(Record):
    """A filter; its `name` stands in reports."""

    name: ClassVar[str]

    def reasons(self, pairs: Sequence[TextPair]) -> Iterable[str | None]:
        """Give for each pair, in order, the reason to drop it; None to keep it."""
        return map(self.reason, pairs)

    def reason(self, pair: TextPair) -> str | None:
        """The same for one pair, where a filter needs no other."""
        return None


class DroppedText(NamedTuple):
    """The index of a dropped pair, the name of its filter, and the reason."""

    row: int
    filter: str
    reason: str


class FilterResult(NamedTuple):
    """The indices of the pairs to keep, and the pairs that are dropped, each in order."""

    kept: list[int]
    dropped: list[DroppedText]


def apply_filters(pairs: Sequence[TextPair], filters: Iterable[Filter]) -> FilterResult:
    """Apply filters one after the other; each reads what the one before kept."""
    kept = list(range(len(pairs)))
    dropped: list[DroppedText] = []
    for rule in filters:
        reasons = dict(zip(kept, rule.reasons([pairs[row] for row in kept]), strict=True))
        dropped += [DroppedText(row, rule.name, reason) for row, reason in reasons.items() if reason is not None]
        kept = [row for row, reason in reasons.items() if reason is None]
    return FilterResult(kept, sorted(dropped))


@dataclass(frozen=True)
class Length(Filter):
    """Completions that are too short or too long, in characters without the space around them."""

    min_characters: int = 1
    max_characters: int | None = None
    name = "length"

    def reason(self, pair: TextPair) -> str | None:
        length = len(pair.completion.strip())
        if length < self.min_characters:
            return f"{length} characters, fewer than {self.min_characters}"
        if self.max_characters is not None and length > self.max_characters:
            return f"{length} characters, more than {self.max_characters}"
        return None


@dataclass(frozen=True)
class Charset(Filter):
    """Completions with too many letters of other scripts, or with characters that no text has.

    Args:
        scripts: the scripts of letters, by their Unicode names: latin, greek, cyrillic, cjk, hiragana, arabic, ...;
            empty for all of them.
        max_other: the largest fraction of the letters that may be of other scripts.
    """

    scripts: tuple[str, ...] = ()
    max_other: float = 0.1
    name = "charset"

    def reason(self, pair: TextPair) -> str | None:
        broken = next((sign for sign in pair.completion if _is_broken(sign)), None)
        if broken is not None:
            return f"holds U+{ord(broken):04X}, which no text has"
        if not self.scripts:
            return None
        letters = filter(str.isalpha, pair.completion)
        counts = Counter(unicodedata.name(letter, "UNKNOWN").partition(" ")[0] for letter in letters)
        total = counts.total()
        foreign = counts - Counter({script.upper(): total for script in self.scripts})
        if foreign.total() <= self.max_other * total:
            return None
        return f"{foreign.total() / total:.0%} of the letters are {max(foreign, key=lambda s: foreign[s]).lower()}"


def _is_broken(sign: str) -> bool:
    """Whether it is left over from bytes that were no UTF-8, a control character or half of a surrogate pair."""
    return sign == "\ufffd" or (unicodedata.category(sign) in ("Cc", "Cs") and sign not in "\n\r\t")


_REFUSAL = re.compile(
    r"\W*(?:i(?:['’]m|\s+am)\s+(?:very\s+|really\s+|so\s+)?sorry\b|(?:my\s+)?apologies\b|sorry,\s+(?:but\s+)?i\b|i\s+apologi[sz]e\b"
    r"|(?:unfortunately,?\s+)?(?:but\s+)?i(?:\s+simply)?\s+(?:can(?:['’]t|not|\s+not)|won['’]t|will\s+not|am\s+(?:not\s+able|unable)|['’]m\s+(?:not\s+able|unable))"
    r"(?:\s+to)?\s+(?:assist|help|answer|provide|fulfil|comply|discuss|do\s+that|create|generate|give|offer|respond|support|engage)"
    r"|as\s+an?\s+(?:ai|artificial\s+intelligence|(?:large\s+)?language\s+model)\b|i(?:['’]m|\s+am)\s+(?:just\s+)?an?\s+(?:ai|language\s+model)\b)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Refusals(Filter):
    """Completions that begin with a refusal or an apology, in English."""

    name = "refusal"

    def reason(self, pair: TextPair) -> str | None:
        match = _REFUSAL.match(pair.completion)
        return f"begins with {match[0].strip()!r}" if match else None


@dataclass(frozen=True)
class Repetition(Filter):
    """Completions that repeat themselves: zlib makes them more than `max_ratio` times smaller.

    Prose of some hundred characters shrinks 1.5 to 2 times, long worked solutions up to 4, a text in a loop 10 times
    and more. The last 1,000 characters are also tested by themselves, because loops come last. It works in every
    language. Texts under 100 bytes are always kept.
    """

    max_ratio: CompressionRatio = 5.0
    name = "repetition"

    def reason(self, pair: TextPair) -> str | None:
        ratio = max(_compression_ratio(pair.completion), _compression_ratio(pair.completion[-1000:]))
        return f"shrinks {ratio:.1f} times, more than {self.max_ratio:g}" if ratio > self.max_ratio else None


@dataclass(frozen=True)
class FewWords(Filter):
    """Completions of more than 10 words whose last 100 words have too small a share of different ones.

    It finds loops in texts that are too short for `Repetition`. Good answers of 100 words have a share of 0.5 and more.
    """

    min_share: Share = 0.3
    name = "few-words"

    def reason(self, pair: TextPair) -> str | None:
        last = words(pair.completion)[-100:]
        share = len(set(last)) / max(len(last), 1)
        return f"{share:.0%} of its words are different" if len(last) > 10 and share < self.min_share else None


def _compression_ratio(text: str) -> float:
    raw = text.encode(errors="replace")
    return len(raw) / len(zlib.compress(raw)) if len(raw) >= 100 else 1.0


def _word_runs(tokens: Sequence[str], length: int) -> Iterator[tuple[str, ...]]:
    return (tuple(tokens[i : i + length]) for i in range(len(tokens) - length + 1))


def _shingles(text: str) -> set[tuple[str, ...]]:
    tokens = words(text)
    return {*_word_runs(tokens, SHINGLE)} or {tuple(tokens)}


@dataclass(frozen=True)
class NearDuplicates(Filter):
    """Rows whose prompt and whose completion are both nearly those of an earlier row.

        J(a, b) = |a and b| / |a or b|,   a, b the sets of each text's runs of 5 words

    Candidates are found by MinHash over the whole text and then compared exactly. Runs that stand in more than a tenth
    of the prompts are a template and are ignored (with 50 prompts or more). Rows whose numbers differ are never
    duplicates.

    Args:
        threshold: the J of prompt and completion from which on a row is a duplicate, in (0, 1].

    References:
        Broder 1997, On the resemblance and containment of documents.
    """

    threshold: Similarity = 0.9
    name = "near-duplicate"

    def reasons(self, pairs: Sequence[TextPair]) -> Iterator[str | None]:
        """Give for each row the earlier one that it repeats, counted from 1 among those that this filter reads."""
        if not pairs:
            return
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError:
            raise DataError(
                "filter: expected the package datasketch for near-duplicates, got none. Install it: "
                "pip install 'potstill[data]'."
            ) from None
        template = _template(pairs)
        # A little below the threshold, because the whole text may be less similar than each of its parts.
        index = MinHashLSH(threshold=max(self.threshold - 0.1, 0.1), num_perm=PERMUTATIONS)
        for row, pair in enumerate(pairs):
            # A text that is nothing but template is compared as it is.
            shingles = (_shingles(pair.prompt) | _shingles(pair.completion)) - template or _shingles(pair.prompt)
            sketch = MinHash(num_perm=PERMUTATIONS, seed=1)
            sketch.update_batch(["\0".join(shingle).encode(errors="replace") for shingle in sorted(shingles)])
            similarities = {other: _similarity(pair, pairs[other], template) for other in sorted(index.query(sketch))}
            match = max(similarities, key=similarities.__getitem__, default=0)
            if (similarity := similarities.get(match, 0.0)) >= self.threshold:
                yield f"{similarity:.2f} like row {match + 1}"
            else:
                index.insert(row, sketch)
                yield None


@dataclass(frozen=True)
class RepeatedResponses(NearDuplicates):
    """Rows whose completion is nearly that of an earlier row, whatever the prompts.

    Short right answers repeat too, such as a number or a name: it is for tasks whose answers are long.
    """

    name = "repeated-response"

    def reasons(self, pairs: Sequence[TextPair]) -> Iterator[str | None]:
        """See NearDuplicates."""
        return super().reasons([pair._replace(prompt="") for pair in pairs])


def _template(pairs: Sequence[TextPair]) -> set[tuple[str, ...]]:
    """The runs of words in more than a tenth of the distinct prompts: a prompt with several answers counts once."""
    prompts = {pair.prompt for pair in pairs}
    if len(prompts) < 50:
        return set()
    counts = Counter(shingle for prompt in prompts for shingle in _shingles(prompt))
    return {shingle for shingle, count in counts.items() if count > len(prompts) / 10}


def _similarity(pair: TextPair, other: TextPair, template: set[tuple[str, ...]]) -> float:
    """The smaller J of prompt and completion; 0 where the numbers differ."""
    numbers = [sorted(word for text in texts for word in words(text) if word[0].isdigit()) for texts in (pair, other)]
    if numbers[0] != numbers[1]:
        return 0.0
    shingles = [(_shingles(a) - template, _shingles(b) - template) for a, b in zip(pair, other, strict=True)]
    return min(len(a & b) / len(a | b) if a | b else 1.0 for a, b in shingles)


@dataclass(frozen=True)
class Contamination(Filter):
    """Rows that share a run of words with a test file.

    Args:
        files: the test files, in any format that a recipe reads; all texts in their rows are compared, in lists and
            objects too.
        words: length of the run, >= 5. A text of the test that is shorter is compared whole, if it has at least 5.

    References:
        Brown et al. 2020, arXiv 2005.14165, appendix C (13 words).
    """

    files: Annotated[tuple[str, ...], NonEmpty()]
    words: Annotated[int, Range(ge=SHINGLE)] = 13
    name = "contamination"

    def reasons(self, pairs: Sequence[TextPair]) -> Iterator[str | None]:
        """Give for each row the test file and row that it shares words with."""
        index: dict[tuple[str, ...], str] = {}
        for where, text in chain.from_iterable(map(_test_texts, self.files)):
            tokens = words(text)
            if len(tokens) >= SHINGLE:
                for shared in _word_runs(tokens, min(self.words, len(tokens))):
                    index.setdefault(shared, where)
        lengths = sorted({len(run) for run in index})
        for pair in pairs:
            runs = (run for text in pair for length in lengths for run in _word_runs(words(text), length))
            run = next((run for run in runs if run in index), None)
            yield None if run is None else f"{len(run)} words of {index[run]}: {' '.join(run)!r}"


def _test_texts(file: str) -> Iterator[tuple[str, str]]:
    path = Path(file).expanduser()
    if not path.exists():
        raise DataError(f"filter: expected a test file, got {path}, which does not exist. Correct the path.")
    for number, row in enumerate(locate(Source(path)).rows(), 1):
        yield from ((f"row {number} of {path.name}", text) for text in _strings(row))


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


@dataclass(frozen=True)
class FilterOptions(Record):
    """Filters of generated texts; null or false switches one off.

    Args:
        cut: drop texts that max_new_tokens cut off.
        min_characters: drop shorter completions.
        max_characters: drop longer completions.
        repetition: drop texts that zlib makes more than so many times smaller.
        distinct_words: drop texts of more than 10 words with a smaller share of different words; 0.3 finds short loops.
        scripts: scripts that letters may be of, such as latin; empty for all.
        refusals: drop texts that begin with a refusal, in English.
        near_duplicates: drop rows that are so similar to an earlier one; 0.9 is strict.
        repeated_responses: drop rows whose completion alone is so similar to that of an earlier one.
        contamination: drop rows that share a run of words with test files.
    """

    cut: bool = True
    min_characters: Annotated[int, Range(ge=0)] = 1
    max_characters: Annotated[int | None, Range(ge=1)] = None
    repetition: CompressionRatio | None = 5.0
    distinct_words: Share | None = None
    scripts: tuple[str, ...] = ()
    refusals: bool = True
    near_duplicates: Similarity | None = None
    repeated_responses: Similarity | None = None
    contamination: Contamination | None = None

    def filters(self) -> list[Filter]:
        """Build the filters, cheap ones first; duplicates are looked for among what is left."""
        chosen = (
            Length(self.min_characters, self.max_characters),
            Charset(self.scripts),
            Refusals() if self.refusals else None,
            None if self.repetition is None else Repetition(self.repetition),
            None if self.distinct_words is None else FewWords(self.distinct_words),
            None if self.near_duplicates is None else NearDuplicates(self.near_duplicates),
            None if self.repeated_responses is None else RepeatedResponses(self.repeated_responses),
            self.contamination,
        )
        return [rule for rule in chosen if rule is not None]
