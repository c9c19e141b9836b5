"""How much each token of a row counts: by the span it stands in, by its row, or each by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NotRequired, TypedDict

from potstill.data.spans import Span, tokens_within
from potstill.errors import DataError

SPANS = ("reasoning_span", "answer_span")  # columns; where they overlap it is an answer
WEIGHING = {"weight", "weights", *SPANS}


class SpanWeights(TypedDict):
    """How much a token of the reasoning counts, one of the answer, and any other; None: as one of the answer."""

    reasoning: float
    answer: float
    other: NotRequired[float | None]


class Completion(NamedTuple):
    """Where a completion stands in a row.

    Args:
        length: of its text, in characters.
        offsets: of tokens, in characters.
        shift: where its text begins, in the same characters.
        first: the row's first token that has an offset.
    """

    length: int
    offsets: Sequence[Span]
    shift: int = 0
    first: int = 0


def token_weights(
    said: Mapping[str, Any], count: int, by_span: SpanWeights | None, completion: Completion | None, where: str
) -> list[float] | None:
    """How much each of a row's tokens counts; None where nothing says so.

    A token of a span, which it may reach out of, has the span's weight. All others have that of the answer, if there is
    none for them: the words before an answer and the end after it are learnt with it.

    Args:
        said: what the file says: weight, weights, reasoning_span, answer_span; not all need be there.
        count: tokens.
        by_span: see `Source`.
        completion: what the spans are places in, where there are any.
        where: the row, for messages.

    Raises:
        DataError: a span is not within the completion.
    """
    weights = said.get("weights") if by_span is None else _by_span(said, count, by_span, completion, where)
    if "weight" not in said:
        return weights
    return [weight * said["weight"] for weight in weights or [1.0] * count]


def _by_span(
    said: Mapping[str, Any], count: int, by_span: SpanWeights, completion: Completion | None, where: str
) -> list[float]:
    other = by_span.get("other")
    found = [by_span["answer"] if other is None else other] * count
    for column, weight in zip(SPANS, (by_span["reasoning"], by_span["answer"]), strict=True):
        if said[column] is None:
            continue
        assert completion is not None
        start, end = said[column]
        length, offsets, shift, first = completion
        if end > length:
            raise DataError(
                f"data: expected {column} within the {length} characters of its completion, got {start} to {end} in "
                f"{where}. Correct or remove the row."
            )
        begins, ends = tokens_within(offsets, (start + shift, end + shift))
        found[first + begins : first + ends] = [weight] * (ends - begins)
    return found
