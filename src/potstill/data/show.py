"""What a model is trained on: the tokens of encoded rows, which of them are targets, and their weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerBase

from potstill.losses.alignment import IGNORE

LINE_END = "⏎\n"  # what a line feed is shown as


@dataclass(frozen=True)
class ShownToken:
    """A token of a row. The first token of a row is never predicted and so never a target."""

    id: int
    text: str
    target: bool
    weight: float = 1.0


@dataclass(frozen=True)
class ShownRow:
    """A row as the student reads it, and as the teacher does where that is different."""

    number: int  # among the encoded rows, from 1
    tokens: tuple[ShownToken, ...]
    label: float | None = None  # the class or number of a row, for classification and regression
    teacher: tuple[ShownToken, ...] | None = None

    @property
    def title(self) -> str:
        """The row's number and lengths."""
        targets = sum(token.target for token in self.tokens)
        learnt = f"{targets} targets" if self.label is None else f"label {self.label:g}"
        return f"row {self.number}: {len(self.tokens)} tokens, {learnt}"


def shown_rows(
    dataset: Any, tokenizer: PreTrainedTokenizerBase, count: int, teacher: PreTrainedTokenizerBase | None = None
) -> list[ShownRow]:
    """Show the first rows of an encoded dataset; `teacher` is the tokenizer of a teacher that has one of its own."""
    return [_shown_row(i + 1, dataset[i], tokenizer, teacher) for i in range(min(count, len(dataset)))]


def _shown_row(
    number: int, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase | None
) -> ShownRow:
    ids, labels = row["input_ids"], row["labels"]
    if not isinstance(labels, Sequence):
        return ShownRow(number, _tokens(ids, [IGNORE] * len(ids), tokenizer), float(labels))
    of_teacher = None
    if "teacher_input_ids" in row:
        of_teacher = _tokens(row["teacher_input_ids"], row["teacher_labels"], tokenizer)
    elif teacher is not None:
        own = teacher(str(tokenizer.decode(ids)), add_special_tokens=False)["input_ids"]
        of_teacher = _tokens(own, [IGNORE] * len(own), teacher)
    return ShownRow(number, _tokens(ids, labels, tokenizer, row.get("weights")), teacher=of_teacher)


def _tokens(
    ids: Sequence[int],
    labels: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    weights: Sequence[float] | None = None,
) -> tuple[ShownToken, ...]:
    texts = _texts(ids, tokenizer)
    targets = [i > 0 and label != IGNORE for i, label in enumerate(labels)]
    return tuple(map(ShownToken, ids, texts, targets, weights or [1.0] * len(ids)))


def _texts(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """The text of each token behind the one before it; the token's name where it is a part of a character."""
    before = ""
    for i, token in enumerate(ids):
        both = str(tokenizer.decode(list(ids[max(i - 1, 0) : i + 1]), clean_up_tokenization_spaces=False))
        text = both[len(before) :] if both.startswith(before) else ""
        before = str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
        whole = text and "\N{REPLACEMENT CHARACTER}" not in text
        yield text if whole else str(tokenizer.convert_ids_to_tokens(token))


def runs(tokens: Sequence[ShownToken]) -> list[tuple[bool, float, list[str]]]:
    """Group tokens that are targets or not, and have one weight: the texts of each group."""
    groups = groupby(tokens, key=lambda token: (token.target, token.weight))
    return [
        (target, weight, [token.text.replace("\n", LINE_END) for token in group]) for (target, weight), group in groups
    ]


def marked_text(tokens: Sequence[ShownToken]) -> str:
    """Write tokens as plain text: | between them, targets in « », weights other than 1 before their targets."""
    parts = []
    for target, weight, texts in runs(tokens):
        text = "|".join(texts)
        parts.append(f"«{'' if weight == 1 else f'{weight:g}: '}{text}»" if target else text)
    return "".join(parts)
