"""Encode the columns of a source as rows of token ids and labels: one function for each kind of source."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple, cast

import jinja2
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from potstill.data.disk_cache import BATCH
from potstill.data.sources import SourceKind
from potstill.data.token_weights import SPAN_COLUMNS, CompletionOffsets, Span, SpanWeights, token_offsets, token_weights
from potstill.errors import DataError, one_line
from potstill.losses.alignment import IGNORE, Task
from potstill.models.loading import vocabulary_size


class EncodedRow(NamedTuple):
    """One example. Labels and weights are not shifted. A prompt of the teacher's own adds its ids and labels."""

    input_ids: list[int]
    labels: list[int] | int | float
    token_type_ids: list[int] | None = None
    teacher_input_ids: list[int] | None = None
    teacher_labels: list[int] | None = None
    weights: list[float] | None = None


class _AnswerRow(NamedTuple):
    """A row before truncation whose answer begins at a known token.

    Args:
        number: of the row in the file, from 1.
        prompt_length: tokens before the first target token.
        ids: all tokens.
        labels: their labels.
        weights: their loss weights, where the file gives some.
    """

    number: int
    prompt_length: int
    ids: list[int]
    labels: list[int]
    weights: list[float] | None = None


@dataclass(frozen=True)
class RowEncoder:
    """Encodes rows of one source, and counts those that it skips or truncates.

    Args:
        tokenizer: of the student.
        max_length: tokens of the longest row.
        packing: whether documents are concatenated.
        file: its name, for messages.
        counts: `empty` rows that were skipped, rows `cut` at max_length, and `teacher_longest`, the tokens of the
            longest row of the teacher's own.
        task: of the model.
        classes: the numbers of classes by their names, for classification.
        span_weights: see `Source`.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    packing: bool
    file: str
    counts: Counter[str]
    task: Task = "causal"
    classes: Mapping[str, int] = field(default_factory=dict)
    span_weights: SpanWeights | None = None

    def rows(self, dataset: Dataset, kind: SourceKind) -> Iterator[EncodedRow]:
        """Encode a dataset of `load` for a language model.

        Raises:
            DataError: while iterating, when a row cannot be encoded.
        """
        if kind == "text":
            return _text_rows(dataset, self)
        encode, prompt, teacher_prompt = _ANSWER_ENCODERS[kind]
        rows = _truncated(encode(dataset, self, prompt), self)
        if teacher_prompt not in dataset.column_names:
            return rows
        uncounted = replace(self, counts=Counter())  # the student's rows count what is empty
        return _with_teacher_rows(rows, encode(dataset, uncounted, teacher_prompt), self)

    def tokens(self, texts: list[str], *, special: bool) -> list[list[int]]:
        """Tokenize texts, with or without the special tokens that the tokenizer adds."""
        ids: list[list[int]] = []
        for group in in_groups(texts):
            encoded = self.tokenizer(
                group,
                add_special_tokens=special,
                padding=False,
                truncation=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )
            ids += cast(list[list[int]], encoded["input_ids"])
        return ids

    def with_eos(self, ids: list[int]) -> list[int]:
        """Append EOS, unless the ids end with it."""
        eos = self.tokenizer.eos_token_id
        return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]

    def offsets(self, texts: list[str]) -> list[list[Span]]:
        """Find where tokens stand in texts, where there are weights of spans."""
        return [[] for _ in texts] if self.span_weights is None else token_offsets(self.tokenizer, texts)

    def weighted(
        self, row: _AnswerRow, columns: Mapping[str, Any], completion: CompletionOffsets | None = None
    ) -> _AnswerRow:
        """Add the weights of the row's tokens, where the file gives some. A weight of 0 is a label of -100."""
        weights = token_weights(columns, len(row.ids), self.span_weights, completion, self.where(row.number))
        if weights is None:
            return row
        labels = [label if weight else IGNORE for label, weight in zip(row.labels, weights, strict=True)]
        return row._replace(labels=labels, weights=weights)

    def where(self, number: int) -> str:
        """Name a row in messages."""
        return f"row {number} of {self.file}"

    def maskable(self, rows: Iterator[EncodedRow]) -> Iterator[EncodedRow]:
        """Remove the labels of special tokens, which are never masked."""
        special = {*self.tokenizer.all_special_ids}
        for row in rows:
            assert isinstance(row.labels, list)
            pairs = zip(row.input_ids, row.labels, strict=True)
            yield EncodedRow(row.input_ids, [IGNORE if i in special else label for i, label in pairs])

    def special_tokens(self) -> tuple[list[int], list[int]]:
        """Find what the tokenizer itself puts before and after a text: [CLS] and [SEP], BOS, EOS."""
        (bare,), (whole,) = self.tokens(["a"], special=False), self.tokens(["a"], special=True)
        for start in range(len(whole) - len(bare) + 1):
            if bare and whole[start : start + len(bare)] == bare:
                return whole[:start], whole[start + len(bare) :]
        return [], []

    def nonempty(self, dataset: Dataset, column: str) -> Iterator[tuple[list[int], dict[str, list[Any]]]]:
        """Yield batches without the rows whose `column` is empty, with the rows' numbers in the file, from 1."""
        for number, batch in enumerate(dataset.iter(BATCH)):
            empty = "[]" if column == "messages" else ""
            places = [i for i, value in enumerate(batch[column]) if value and value != empty]
            self.counts["empty"] += len(batch[column]) - len(places)
            yield (
                [number * BATCH + i + 1 for i in places],
                {name: [values[i] for i in places] for name, values in batch.items()},
            )


def in_groups(texts: list[str], characters: int = 1 << 22) -> Iterator[list[str]]:
    """Split texts into groups: while a tokenizer works it holds a hundred bytes for each token."""
    group: list[str] = []
    size = 0
    for text in texts:
        if group and size + len(text) > characters:
            yield group
            group, size = [], 0
        group.append(text)
        size += len(text)
    if group:
        yield group


# Text


def _text_rows(dataset: Dataset, encoder: RowEncoder) -> Iterator[EncodedRow]:
    if encoder.task == "masked" and not encoder.packing:
        return _framed_windows(dataset, encoder)
    split = packed if encoder.packing else windows
    documents = (
        encoder.with_eos(ids)
        for _, batch in encoder.nonempty(dataset, "text")
        for ids in encoder.tokens(batch["text"], special=True)
    )
    return (EncodedRow(ids, ids) for ids in split(documents, encoder.max_length))


def _framed_windows(dataset: Dataset, encoder: RowEncoder) -> Iterator[EncodedRow]:
    """Windows of each document that all have the special tokens around them, as masked language models know them."""
    before, after = encoder.special_tokens()
    room = encoder.max_length - len(before) - len(after)
    if room < 1:
        raise DataError(
            f"data: expected max_length above {len(before) + len(after)}, the special tokens of a row, got "
            f"{encoder.max_length}. Raise max_length."
        )
    for _, batch in encoder.nonempty(dataset, "text"):
        for ids in encoder.tokens(batch["text"], special=False):
            for start in range(0, len(ids), room):
                row = [*before, *ids[start : start + room], *after]
                yield EncodedRow(row, row)


def packed(documents: Iterator[list[int]], length: int) -> Iterator[list[int]]:
    """Concatenate documents and split them into rows of `length`; the last may be shorter, but not a lone token."""
    stream: list[int] = []
    for ids in documents:
        stream += ids
        whole = len(stream) - len(stream) % length
        yield from (stream[start : start + length] for start in range(0, whole, length))
        stream = stream[whole:]
    if len(stream) > 1:
        yield stream


def windows(documents: Iterator[list[int]], length: int) -> Iterator[list[int]]:
    """Split each document into windows of at most `length` that do not overlap."""
    for ids in documents:
        bounds = [*range(0, len(ids), length), len(ids)] if ids else [0, 0]
        # The first token of a row is never predicted, so a lone last one gets company from the window before.
        if len(bounds) > 2 and bounds[-1] - bounds[-2] == 1 and length > 2:
            bounds[-2] -= 1
        yield from (ids[start:end] for start, end in pairwise(bounds))


# Rows with an answer


def _truncated(rows: Iterator[_AnswerRow], encoder: RowEncoder) -> Iterator[EncodedRow]:
    """Truncate rows, each of which must keep a token of its answer."""
    limit = encoder.max_length
    full: list[tuple[int, int]] = []
    for row in rows:
        if row.prompt_length >= limit:
            full.append((row.number, row.prompt_length))
        encoder.counts["cut"] += len(row.ids) > limit
        yield EncodedRow(row.ids[:limit], row.labels[:limit], weights=row.weights and row.weights[:limit])
    if full:
        number, length = full[0]
        raise DataError(
            f"data: expected prompts shorter than max_length {limit}, got {length} tokens in {encoder.where(number)} "
            f"({len(full)} such in all). Raise max_length, or shorten or remove these rows."
        )


def _with_teacher_rows(
    rows: Iterator[EncodedRow], teacher_rows: Iterator[_AnswerRow], encoder: RowEncoder
) -> Iterator[EncodedRow]:
    """Add what the teacher reads, up to the last token of the answer that the student's row holds."""
    for row, teacher in zip(rows, teacher_rows, strict=True):
        assert isinstance(row.labels, list)
        answer = [label for label in row.labels[1:] if label != IGNORE]
        places = [i for i, label in enumerate(teacher.labels) if label != IGNORE and i][: len(answer)]
        if [teacher.labels[i] for i in places] != answer:
            raise DataError(
                f"data: expected the same answer tokens behind the student's and the teacher's prompt, got others in "
                f"{encoder.where(teacher.number)}. End both prompts with the same word or line."
            )
        end = places[-1] + 1 if places else 0
        encoder.counts["teacher_longest"] = max(encoder.counts["teacher_longest"], end)
        yield row._replace(teacher_input_ids=teacher.ids[:end], teacher_labels=teacher.labels[:end])


# Prompt and completion


def _completions(dataset: Dataset, encoder: RowEncoder, prompt_column: str) -> Iterator[_AnswerRow]:
    _, closing = encoder.special_tokens()
    for numbers, batch in encoder.nonempty(dataset, "completion"):
        prompts = encoder.tokens(batch[prompt_column], special=True)
        completions = encoder.tokens(batch["completion"], special=False)
        offsets = encoder.offsets(batch["completion"])
        for i, (number, prompt, completion) in enumerate(zip(numbers, prompts, completions, strict=True)):
            if closing and prompt[-len(closing) :] == closing:
                prompt = prompt[: -len(closing)]
            completion = encoder.with_eos(completion)
            columns = {name: values[i] for name, values in batch.items()}
            row = _AnswerRow(number, len(prompt), prompt + completion, [IGNORE] * len(prompt) + completion)
            place = CompletionOffsets(len(columns["completion"]), offsets[i], first=len(prompt))
            yield encoder.weighted(row, columns, place)


# Conversations


class _Conversation(NamedTuple):
    """A rendered conversation, and for each turn of the assistant the text before it and the text up to its end."""

    messages: list[dict[str, Any]]
    text: str
    turns: list[tuple[str, str]]


def _conversations(dataset: Dataset, encoder: RowEncoder, column: str) -> Iterator[_AnswerRow]:
    """Conversations; what stands before the assistant's first turn comes from `column`."""
    for numbers, batch in encoder.nonempty(dataset, "messages"):
        conversations = []
        for number, text, begin in zip(numbers, batch["messages"], batch[column], strict=True):
            messages = json.loads(text)
            if column != "messages":
                first = next((i for i, message in enumerate(messages) if message["role"] == "assistant"), 0)
                messages = json.loads(begin) + messages[first:]
            conversations.append(_render_turns(messages, encoder.where(number), encoder))
        texts = {
            text for talk in conversations for text in (talk.text, *(part for turn in talk.turns for part in turn))
        }
        ordered = sorted(texts)
        ids_of = dict(zip(ordered, encoder.tokens(ordered, special=False), strict=True))
        offsets = encoder.offsets([talk.text for talk in conversations])
        for i, (number, talk) in enumerate(zip(numbers, conversations, strict=True)):
            ids = ids_of[talk.text]
            spans = [[_common_prefix(ids_of[text], ids) for text in turn] for turn in talk.turns]
            labels = [IGNORE] * len(ids)
            for start, end in spans:
                labels[start:end] = ids[start:end]
            columns = {name: values[i] for name, values in batch.items()}
            place = None
            if any(columns.get(name) is not None for name in SPAN_COLUMNS):
                place = _last_message(talk, offsets[i], encoder.where(number))
            yield encoder.weighted(_AnswerRow(number, spans[0][0], ids, labels), columns, place)


def _last_message(talk: _Conversation, offsets: list[Span], where: str) -> CompletionOffsets:
    """Where the text of the last message stands, in which spans are places."""
    last = talk.messages[-1]
    content: str = last["content"] if last["role"] == "assistant" and isinstance(last.get("content"), str) else ""
    before, after = talk.turns[-1]
    bare = content.strip()
    start = after.find(bare, len(before)) if bare else -1
    if start < 0:
        raise DataError(
            f"data: expected a last message of the assistant that the chat template does not change, got another in "
            f"{where}. Remove the row, use another template, or leave out span_weights."
        )
    return CompletionOffsets(len(content), offsets, start - content.index(bare))


def _render_turns(messages: list[dict[str, Any]], where: str, encoder: RowEncoder) -> _Conversation:
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise DataError(
            f"data: expected a turn of the assistant in every conversation, got none in {where}. "
            "Remove the row, or call the role assistant."
        )
    if turns[0] == 0:
        raise DataError(
            f"data: expected a message before the assistant's first turn, got none in {where}. "
            "Begin the conversation with the user or the system."
        )
    whole = _render(messages, False, where, encoder)
    texts = []
    for turn in turns:
        before = _render(messages[:turn], True, where, encoder)
        after = whole if turn == len(messages) - 1 else _render(messages[: turn + 1], False, where, encoder)
        if not (after.startswith(before) and whole.startswith(after)):
            raise DataError(
                f"data: expected a chat template that only appends, got one that changes earlier turns, at message "
                f"{turn + 1} of {where}. Use another template, or end each conversation with its only turn of the "
                "assistant."
            )
        texts.append((before, after))
    return _Conversation(messages, whole, texts)


def _render(messages: list[dict[str, Any]], open_turn: bool, where: str, encoder: RowEncoder) -> str:
    try:
        text = encoder.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=open_turn)
    except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
        raise DataError(
            f"data: expected messages that the chat template takes, got {one_line(error, 200)!r} in {where}. "
            "Correct the row, or use another chat template."
        ) from None
    return cast(str, text)


def _common_prefix(ids: list[int], whole: list[int]) -> int:
    """The number of tokens that both lists begin with: a token may reach over the end of the shorter text."""
    if whole[: len(ids)] == ids:
        return len(ids)
    return next((i for i, (a, b) in enumerate(zip(ids, whole, strict=False)) if a != b), min(len(ids), len(whole)))


# Token ids


def _given_ids(dataset: Dataset, encoder: RowEncoder, column: str) -> Iterator[_AnswerRow]:
    owner = column.removesuffix("input_ids")
    vocabulary = vocabulary_size(encoder.tokenizer)
    for numbers, batch in encoder.nonempty(dataset, "input_ids"):
        for i, number in enumerate(numbers):
            columns = {name: values[i] for name, values in batch.items()}
            ids = columns[column]
            row = _AnswerRow(number, 0, ids, columns.get(f"{owner}labels", ids))
            if owner:
                columns = {"attention_mask": columns.get("attention_mask", [])}
            _check_ids(row, columns, vocabulary, encoder.where(number))
            yield encoder.weighted(row, columns)


def _check_ids(row: _AnswerRow, columns: Mapping[str, Any], vocabulary: int, where: str) -> None:
    for name, values in (("label", row.labels), ("weight", columns.get("weights", row.ids))):
        if len(values) != len(row.ids):
            raise DataError(
                f"data: expected as many {name}s as input_ids, got {len(values)} and {len(row.ids)} in {where}. "
                f"{name.capitalize()} t belongs to token t. Correct the row."
            )
    if 0 in columns.get("attention_mask", []):
        raise DataError(
            f"data: expected input_ids without padding, got an attention_mask with 0 in {where}. "
            "Batches are padded later. Remove the padding."
        )
    unknown = [i for i in (set(row.labels) - {IGNORE}) | set(row.ids) if not 0 <= i < vocabulary]
    if unknown:
        raise DataError(
            f"data: expected ids from 0 to {vocabulary - 1}, got {unknown[0]} in {where}. "
            "Use the tokenizer that the ids were made with."
        )


# For each kind with an answer: its encoder, and the columns of the student's and of the teacher's prompt.
_ANSWER_ENCODERS: dict[SourceKind, tuple[Callable[[Dataset, RowEncoder, str], Iterator[_AnswerRow]], str, str]] = {
    "completion": (_completions, "prompt", "teacher_prompt"),
    "messages": (_conversations, "messages", "teacher_messages"),
    "input_ids": (_given_ids, "input_ids", "teacher_input_ids"),
}
