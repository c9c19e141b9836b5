"""Loss weights of tokens: by the span that a token stands in, by row, or given for each token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from potstill.errors import DataError, ShapeError
from potstill.losses.alignment import IGNORE
from potstill.losses.declared import Range, Record

if TYPE_CHECKING:  # a recipe is read without transformers
    from transformers import PreTrainedTokenizerBase

SPAN_COLUMNS = ("reasoning_span", "answer_span")  # where they overlap it is an answer
WEIGHT_COLUMNS = {"weight", "weights", *SPAN_COLUMNS}

Span = tuple[int, int]
TokenWeight = Annotated[float, Range(ge=0, lt=float("inf"))]


@dataclass(frozen=True)
class SpanWeights(Record):
    """Weights of tokens in means over tokens, by the spans of their row: the columns reasoning_span and answer_span, as
    `potstill generate` writes them. Only the ratio matters; with 0 a token has no loss.

    Args:
        reasoning: weight of a token of the reasoning.
        answer: weight of a token of the answer.
        other: weight of all other tokens of completions; by default they belong to the answer.
        per: token, or span: the weights are those of the means over each span of a row, whatever its length. A row
            counts by its tokens, times the weights of the spans that it has.
    """

    reasoning: TokenWeight
    answer: TokenWeight
    other: TokenWeight | None = None
    per: Literal["token", "span"] = "token"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.reasoning or self.answer or self.other):
            raise ShapeError("expected a weight above 0, got 0 for all tokens")

    def of_tokens(self, spans: Sequence[str], labels: Sequence[int]) -> list[float]:
        """Compute the weight of each token of a row from the name of its span, or other."""
        of_span = dict(zip((*SPAN_COLUMNS, "other"), (self.reasoning, self.answer, self.other or 0.0), strict=True))
        if self.per == "span":
            pairs = zip(spans[1:], labels[1:], strict=True)  # a row's first token is never predicted
            targets = Counter(span for span, label in pairs if label != IGNORE)
            of_span |= {span: of_span[span] * targets.total() / number for span, number in targets.items()}
        return [of_span[span] for span in spans]


def token_weights(
    columns: Mapping[str, Any],
    labels: Sequence[int],
    span_weights: SpanWeights | None,
    completion: tuple[int, Sequence[Span]],
    where: str,
) -> list[float] | None:
    """Compute the weight of each token of a row with labels; None where the file gives no weights.

    A token that overlaps a span has the span's weight. All others have that of the answer, if there is none for them:
    the words before an answer and the end after it are learnt with it. `completion` has the length of its text, and
    where in that text each token stands.
    """
    weights: list[float] | None = columns.get("weights")
    if weights is None and "weights" in columns:  # other rows have some
        weights = [1.0] * len(labels)
    if span_weights is not None:
        length, offsets = completion
        spans = ["answer_span" if span_weights.other is None else "other"] * len(labels)
        for name in SPAN_COLUMNS:
            if (span := columns[name]) is not None:
                if span[1] > length:
                    raise DataError(
                        f"data: expected {name} within the {length} characters of its completion, got {span[0]} to "
                        f"{span[1]} in {where}. Correct or remove the row."
                    )
                start, end = _tokens_within(offsets, span)
                spans[start:end] = [name] * (end - start)
        weights = span_weights.of_tokens(spans, labels)
    if "weight" not in columns:
        return weights
    return [weight * columns["weight"] for weight in weights or [1.0] * len(labels)]


def span_tokens(tokenizer: PreTrainedTokenizerBase, text: str, span: Span) -> Span:
    """Find the tokens of a text that overlap a span of characters, as start and end among the tokens; (0, 0) for none.

    The text is encoded alone, without special tokens.
    """
    return _tokens_within(token_offsets(tokenizer, [text])[0], span)


def token_offsets(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[Span]]:
    """Find where the tokens of texts stand in them, in characters; without special tokens."""
    if not tokenizer.is_fast:
        raise DataError("spans: expected a fast tokenizer, got a slow one, which has no offsets.")
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets: list[list[Span]] = encoded["offset_mapping"]
    return offsets


def _tokens_within(offsets: Sequence[Span], span: Span) -> Span:
    inside = [i for i, (start, end) in enumerate(offsets) if start < span[1] and end > span[0]]
    return (inside[0], inside[-1] + 1) if inside else (0, 0)
