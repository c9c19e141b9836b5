"""Rows that say what another row has said: near-duplicates, and texts of a benchmark's test set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potstill.data.readers import open_table, reading
from potstill.errors import DataError
from potstill.generation.filters import Pair, words

SHINGLE = 5  # words that are compared as one
PERMUTATIONS = 128  # of a MinHash: more find more of the pairs near the threshold


@dataclass(frozen=True)
class NearDuplicates:
    """Rows whose prompt and whose completion are both nearly those of an earlier row.

        J(a, b) = |a and b| / |a or b|,   a, b the sets of each text's runs of 5 words

    The whole text is compared, found by MinHash and then counted exactly. Runs that stand in more than a tenth of the
    prompts are a template and do not count (with 50 prompts or more). Rows whose numbers differ are never duplicates:
    another number is another question.

    Args:
        threshold: the J of prompt and completion from which on a row is a duplicate, in (0, 1].

    References:
        Broder 1997, On the resemblance and containment of documents.
    """

    threshold: float = 0.9
    name = "near-duplicate"

    def reasons(self, pairs: Sequence[Pair]) -> Iterator[str | None]:
        """For each row which earlier one it repeats, counted from 1 among those that came here.

        Raises:
            DataError: datasketch is not installed.
        """
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
        # A little below the threshold, because the whole text may be less alike than each of its parts.
        index = MinHashLSH(threshold=max(self.threshold - 0.1, 0.1), num_perm=PERMUTATIONS)
        for row, pair in enumerate(pairs):
            # A text that is nothing but template is compared as it is.
            whole = (_shingles(pair.prompt) | _shingles(pair.completion)) - template or _shingles(pair.prompt)
            sketch = MinHash(num_perm=PERMUTATIONS, seed=1)
            sketch.update_batch(["\0".join(shingle).encode(errors="replace") for shingle in sorted(whole)])
            twins = ((self._likeness(pair, pairs[other], template), other) for other in sorted(index.query(sketch)))
            likeness, twin = max(twins, key=lambda found: found[0], default=(0.0, 0))
            if likeness >= self.threshold:
                yield f"{likeness:.2f} like row {twin + 1}"
            else:
                index.insert(row, sketch)
                yield None

    def _likeness(self, one: Pair, other: Pair, template: set[tuple[str, ...]]) -> float:
        """The smaller J of both parts; 0 where the numbers differ."""
        if _numbers(one) != _numbers(other):
            return 0.0
        return min(_jaccard(_shingles(a) - template, _shingles(b) - template) for a, b in zip(one, other, strict=True))


def _shingles(text: str) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[i : i + SHINGLE]) for i in range(max(len(found) - SHINGLE + 1, 1))}


def _template(pairs: Sequence[Pair]) -> set[tuple[str, ...]]:
    """The runs of words that are in more than a tenth of the distinct prompts: several answers to one are one."""
    prompts = {pair.prompt for pair in pairs}
    if len(prompts) < 50:
        return set()
    counts = Counter(shingle for prompt in prompts for shingle in _shingles(prompt))
    return {shingle for shingle, count in counts.items() if count > len(prompts) / 10}


def _numbers(pair: Pair) -> list[str]:
    return sorted(word for text in pair for word in words(text) if word[0].isdigit())


def _jaccard(one: set[Any], other: set[Any]) -> float:
    return len(one & other) / len(one | other) if one | other else 1.0


@dataclass(frozen=True)
class Contamination:
    """Rows that share a run of words with a test file.

    Args:
        files: the test files, in any format that a recipe reads; all texts in their rows count, lists and objects too.
        length: words of the run. A text of the test that is shorter counts as a whole, if it has at least 5 words.

    References:
        Brown et al. 2020, arXiv 2005.14165, appendix C (13 words).
    """

    files: tuple[str, ...]
    length: int = 13
    name = "contamination"

    def reasons(self, pairs: Sequence[Pair]) -> Iterator[str | None]:
        """For each row the test file and row that it shares words with.

        Raises:
            DataError: a test file cannot be read.
        """
        index: dict[tuple[str, ...], str] = {}
        for file in self.files:
            for where, text in _texts(Path(file).expanduser()):
                found = words(text)
                if len(found) >= min(SHINGLE, self.length):
                    for run in _runs(found, min(self.length, len(found))):
                        index.setdefault(run, where)
        lengths = sorted({len(run) for run in index})
        for pair in pairs:
            yield self._found(pair, index, lengths)

    def _found(self, pair: Pair, index: dict[tuple[str, ...], str], lengths: list[int]) -> str | None:
        for text in pair:
            found = words(text)
            for length in lengths:
                for run in _runs(found, length):
                    if run in index:
                        return f"{length} words of {index[run]}: {' '.join(run)!r}"
        return None


def _runs(found: Sequence[str], length: int) -> Iterator[tuple[str, ...]]:
    return (tuple(found[i : i + length]) for i in range(len(found) - length + 1))


def _texts(path: Path) -> Iterator[tuple[str, str]]:
    if not path.exists():
        raise DataError(f"filter: expected a test file, got {path}, which does not exist. Correct the path.")
    number = 0
    with reading(path):
        table = open_table(path)
        for batch in table.read(table.columns):
            for row in zip(*batch.values(), strict=True):
                number += 1
                for text in _strings(row):
                    yield f"row {number} of {path.name}", text


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _strings(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)
