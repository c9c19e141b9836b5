"""Encode the columns of a source as rows of token ids and labels: one function for each kind of source."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from heapq import merge
from itertools import chain
from operator import itemgetter
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from potstill.data.chat_texts import ChatRenderer, ChatText, Conversation
from potstill.data.disk_cache import BATCH
from potstill.data.sources import TEACHER_PROMPT_COLUMNS, LongRows, SourceKind
from potstill.data.token_places import LocatedTokens, locate
from potstill.data.token_weights import SPAN_COLUMNS, Span, SpanWeights, token_weights
from potstill.data.windows import IdsAndLabels, bounds, packed, windows
from potstill.errors import DataError
from potstill.losses.alignment import IGNORE, Task, check_unshifted
from potstill.models.chat import end_token_ids, render_chat, unread_keys
from potstill.models.loading import vocabulary_size
from potstill.models.prompts import CONTEXT, prompt_ids, surrounding_tokens


class EncodedRow(NamedTuple):
    """One example. Labels and weights are not shifted. A prompt of the teacher's own adds its ids and labels."""

    input_ids: list[int]
    labels: Any  # a list of int; one number for classification and regression
    token_type_ids: list[int] | None = None
    teacher_input_ids: list[int] | None = None
    teacher_labels: list[int] | None = None
    weights: list[float] | None = None


SAMPLED_TEXTS = 16  # with which it is tried whether the tokenizer keeps what it reads

# Before truncation: the row's number in the file, from 1; tokens before its first target token; all of it.
AnswerRow = tuple[int, int, EncodedRow]
AnswerRows = Iterator[AnswerRow]


@dataclass(frozen=True)
class RowEncoder:
    """Encodes rows of one source, and counts those that it skips or truncates.

    The counts are `empty` rows that were skipped, rows longer than max_length that were `cut`, `drop` and `split`,
    `teacher_longest`, the tokens of the longest row of the teacher's own, and what `potstill.data.encoding_notes` has
    sentences for; `examples` has the first of each of those.
    """

    tokenizer: PreTrainedTokenizerBase  # of the student
    max_length: int
    packing: bool
    file: str  # its name, for messages
    counts: Counter[str]
    task: Task
    classes: Mapping[str, int]  # their numbers by their names, for classification
    span_weights: SpanWeights | None
    long_rows: LongRows | None = None
    examples: dict[str, str] = field(default_factory=dict)
    sample: list[str] = field(default_factory=list)  # the first texts

    def rows(self, dataset: Dataset, kind: SourceKind) -> Iterator[EncodedRow]:
        """Encode a dataset of `load` for a language model; raises DataError while iterating."""
        if kind == "text":
            return _text_rows(dataset, self)
        encode, prompt, teacher_prompt = _ANSWER_ENCODERS[kind]
        rows = _shortened(encode(dataset, self, prompt), self)
        if teacher_prompt not in dataset.column_names:
            return chain.from_iterable(rows)
        uncounted = replace(self, counts=Counter(), examples={})  # the student's rows count what is empty
        return _with_teacher_rows(rows, encode(dataset, uncounted, teacher_prompt), self)

    def texts(self, documents: Iterator[list[int]], limit: int) -> Iterator[IdsAndLabels]:
        """Cut plain texts of more than so many tokens, or leave them out, where that is asked for.

        A text that is cut does not end: where others follow in its row, the EOS between them is no target.
        """
        closing = self.with_eos([]) if self.packing else []
        for ids in documents:
            way = self.long_rows if len(ids) > limit else None
            if way is not None:
                self.counts[way] += 1
            if way == "cut":
                yield [*ids[:limit], *closing], [*ids[:limit], *[IGNORE] * len(closing)]
            elif way != "drop":
                yield ids, ids

    def tokens(self, texts: list[str], *, special: bool) -> list[list[int]]:
        """Tokenize texts, with or without the special tokens that the tokenizer adds."""
        self.sample.extend(texts[: max(0, SAMPLED_TEXTS - len(self.sample))])
        options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
        groups = (self.tokenizer(group, add_special_tokens=special, **options) for group in in_groups(texts))
        return [ids for encoded in groups for ids in encoded["input_ids"]]

    def with_eos(self, ids: list[int]) -> list[int]:
        """Append EOS, unless the ids end with it."""
        eos = self.tokenizer.eos_token_id
        return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]

    def located(self, texts: list[str], *, special: bool) -> Iterator[LocatedTokens]:
        """Tokenize texts, and find where in them each token stands."""
        self.sample.extend(texts[: max(0, SAMPLED_TEXTS - len(self.sample))])
        for group in in_groups(texts):
            yield from locate(self.tokenizer, group, special=special)

    def note(self, name: str, example: str) -> None:
        """Count something that a note reports, with its first example."""
        self.counts[name] += 1
        self.examples.setdefault(name, example)

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """The tokens that end a text."""
        return end_token_ids(self.tokenizer)

    @cached_property
    def chat(self) -> ChatRenderer:
        return ChatRenderer(self.tokenizer)

    def weighted(
        self, row: EncodedRow, columns: Mapping[str, Any], number: int, completion: tuple[int, list[Span]] = (0, [])
    ) -> EncodedRow:
        """Add the weights of the row's tokens, where the file gives some. A weight of 0 is a label of -100."""
        weights = token_weights(columns, row.labels, self.span_weights, completion, self.where(number))
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
            pairs = zip(row.input_ids, row.labels, strict=True)
            yield row._replace(labels=[IGNORE if i in special else label for i, label in pairs])

    def special_tokens(self) -> tuple[list[int], list[int]]:
        """Find what the tokenizer itself puts before and after a text: [CLS] and [SEP], BOS, EOS."""
        return surrounding_tokens(self.tokenizer)

    def nonempty(self, dataset: Dataset, column: str) -> Iterator[dict[int, dict[str, Any]]]:
        """Yield batches of rows by their numbers in the file, from 1, without those whose `column` is empty."""
        empty = "[]" if column == "messages" else ""
        for batch_number, batch in enumerate(dataset.iter(BATCH)):
            values = enumerate(zip(*batch.values(), strict=True), batch_number * BATCH + 1)
            rows = {number: dict(zip(batch, row, strict=True)) for number, row in values}
            filled = {number: row for number, row in rows.items() if row[column] and row[column] != empty}
            self.counts["empty"] += len(rows) - len(filled)
            if filled:
                yield filled


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
    length, framed = encoder.max_length, encoder.task == "masked" and not encoder.packing
    documents = (
        ids
        for rows in encoder.nonempty(dataset, "text")
        for ids in encoder.tokens([row["text"] for row in rows.values()], special=not framed)
    )
    if not framed:
        split = packed if encoder.packing else windows
        texts = encoder.texts(map(encoder.with_eos, documents), length)
        return (EncodedRow(*part) for part in split(texts, length))
    # Each window has the special tokens around it, as masked language models know them.
    before, after = encoder.special_tokens()
    room = length - len(before) - len(after)
    if room < 1:
        raise DataError(
            f"data: expected max_length above {length - room}, the special tokens of a row, got {length}. "
            "Raise max_length."
        )
    texts = encoder.texts(documents, room)
    parts = (ids[start : start + room] for ids, _ in texts for start in range(0, len(ids), room))
    return (EncodedRow(ids, ids) for ids in ([*before, *part, *after] for part in parts))


# Rows with an answer


def _shortened(rows: AnswerRows, encoder: RowEncoder) -> Iterator[list[EncodedRow]]:
    """What each row becomes: itself where it is short enough, else what `long_rows` says.

    A row that is cut must keep a token of its answer; of several rows of a conversation the first. The parts of a row
    that is split share a token, because the first of each is never predicted: no target is lost.
    """
    limit, last_number, way = encoder.max_length, 0, encoder.long_rows or "cut"
    shared = int(encoder.task == "causal")
    full: list[tuple[int, int]] = []
    for number, prompt_length, row in rows:
        if way == "cut" and prompt_length >= limit and number != last_number:
            full.append((number, prompt_length))
        last_number, tokens = number, len(row.input_ids)
        encoder.counts[way] += tokens > limit
        parts = bounds(tokens, limit, shared=shared) if way == "split" and tokens > limit else [(0, limit)]
        yield [_part(row, start, end) for start, end in parts] if way != "drop" or tokens <= limit else []
    if full:
        number, length = full[0]
        raise DataError(
            f"data: expected prompts shorter than max_length {limit}, got {length} tokens in {encoder.where(number)} "
            f"({len(full)} such in all). Raise max_length, or shorten or remove these rows."
        )


def _part(row: EncodedRow, start: int, end: int) -> EncodedRow:
    weights = None if row.weights is None else row.weights[start:end]
    return EncodedRow(row.input_ids[start:end], row.labels[start:end], weights=weights)


def _with_teacher_rows(
    rows: Iterator[list[EncodedRow]], teacher_rows: AnswerRows, encoder: RowEncoder
) -> Iterator[EncodedRow]:
    """Add what the teacher reads, up to the last token of the answer that the student's row holds."""
    pairs = zip(rows, teacher_rows, strict=True)
    for row, (number, _, teacher) in ((row, other) for kept, other in pairs for row in kept):
        answer = [label for label in row.labels[1:] if label != IGNORE]
        places = [i for i, label in enumerate(teacher.labels) if label != IGNORE and i][: len(answer)]
        if [teacher.labels[i] for i in places] != answer:
            raise DataError(
                f"data: expected the same answer tokens behind the student's and the teacher's prompt, got others in "
                f"{encoder.where(number)}. End both prompts with the same word or line."
            )
        end = places[-1] + 1 if places else 0
        encoder.counts["teacher_longest"] = max(encoder.counts["teacher_longest"], end)
        yield row._replace(teacher_input_ids=teacher.input_ids[:end], teacher_labels=teacher.labels[:end])


def _completions(dataset: Dataset, encoder: RowEncoder, prompt_column: str) -> AnswerRows:
    """Prompts and completions, each pair tokenized as one text.

    A token over the border of both belongs to the completion.
    """
    _, closing = encoder.special_tokens()
    for rows in encoder.nonempty(dataset, "completion"):
        texts = [columns[prompt_column] + columns["completion"] for columns in rows.values()]
        for (number, columns), tokens in zip(rows.items(), encoder.located(texts, special=True), strict=True):
            prompt_text = prompt_ids(encoder.tokenizer, columns[prompt_column]) if columns.get("prompt_ids") else []
            if written := _as_written(columns, encoder, prompt_text, columns["completion"]):
                yield number, len(prompt_text), encoder.weighted(written, columns, number)
                continue
            border = len(columns[prompt_column])
            ids = tokens.ids[: -len(closing)] if closing and tokens.ids[-len(closing) :] == closing else tokens.ids
            prompt = min(tokens.before(border), len(ids))
            _note_border(encoder, tokens, border, number)
            if ids and ids[-1] not in encoder.end_ids:
                ids = encoder.with_eos(ids)
            row = EncodedRow(ids, [IGNORE] * prompt + ids[prompt:])
            place = len(columns["completion"]), tokens.shifted(border) if encoder.span_weights else []
            yield number, prompt, encoder.weighted(row, columns, number, place)


def _note_border(encoder: RowEncoder, tokens: LocatedTokens, border: int, number: int) -> None:
    """Note a token that stands on both sides of a border."""
    if (over := tokens.over(border)) is not None:
        encoder.note("over_border", f"{encoder.tokenizer.decode([over])!r} in {encoder.where(number)}")


# Conversations


def _conversations(dataset: Dataset, encoder: RowEncoder, column: str) -> AnswerRows:
    """Conversations; what stands before the assistant's first turn comes from `column`."""
    for rows in encoder.nonempty(dataset, "messages"):
        written = {n: row for n, columns in rows.items() if (row := _written_turn(columns, encoder, n)) is not None}
        others = {n: columns for n, columns in rows.items() if n not in written}
        yield from merge(written.values(), _rendered(others, encoder, column), key=itemgetter(0))


def _rendered(rows: dict[int, dict[str, Any]], encoder: RowEncoder, column: str) -> AnswerRows:
    end = encoder.tokenizer.eos_token_id
    rendered = {n: _chat_texts(columns, encoder, column, encoder.where(n)) for n, columns in rows.items()}
    encoder.counts["left_out"] += sum(not parts for parts in rendered.values())
    texts = [(number, part) for number, parts in rendered.items() for part in parts]
    located = encoder.located([part.text for _, part in texts], special=False)
    for (number, part), tokens in zip(texts, located, strict=True):
        ids = tokens.ids
        columns: Mapping[str, Any] = rows[number]
        spans = [(tokens.before(start), tokens.before(stop)) for start, stop in part.targets]
        labels = [IGNORE] * len(ids)
        for start, stop in spans:
            labels[start:stop] = ids[start:stop]
        if not part.closed and end is not None:
            ids, labels = [*ids, end], [*labels, end]
        _note_layout(encoder, part, number)
        _note_border(encoder, tokens, part.targets[0][0], number)
        place: tuple[int, list[Span]] = (0, [])
        if any(columns.get(name) is not None for name in SPAN_COLUMNS):
            columns, place = _with_spans(columns, part, tokens, encoder.where(number))
        yield number, spans[0][0], encoder.weighted(EncodedRow(ids, labels), columns, number, place)


def _chat_texts(columns: Mapping[str, Any], encoder: RowEncoder, column: str, where: str) -> list[ChatText]:
    """Render a conversation behind the student's or the teacher's prompt: both as one text, or as one for each turn."""

    def talk(name: str) -> Conversation:
        return Conversation.read(columns, where, None if name == "messages" else json.loads(columns[name]))

    texts = encoder.chat.render(talk(column))
    if column == "messages":
        _note_messages(encoder, talk(column))
    others = [name for name in ("messages", "teacher_messages") if name in columns and name != column]
    if all(len(encoder.chat.render(talk(other))) == len(texts) for other in others):
        return texts
    return encoder.chat.render(talk(column), by_turn=True)


def _note_messages(encoder: RowEncoder, talk: Conversation) -> None:
    """Note what a template does not read of messages, and ends of turns that they have in their text."""
    for key in unread_keys(encoder.tokenizer, talk.messages):
        encoder.note(f"unread {key}", talk.where)
    if (end := encoder.chat.end_within(talk)) is not None:
        encoder.note("end_within", f"{end} in {talk.where}")


def _note_layout(encoder: RowEncoder, part: ChatText, number: int) -> None:
    """Note what differs from one text to which the template only appends."""
    if part.layout != "whole":
        encoder.note(part.layout, encoder.where(number))
    if part.opened is not None:
        encoder.note("opened", part.opened)
    if not part.closed:
        encoder.note("unclosed", encoder.where(number))


def _with_spans(
    columns: Mapping[str, Any], part: ChatText, tokens: LocatedTokens, where: str
) -> tuple[Mapping[str, Any], tuple[int, list[Span]]]:
    """The columns with the spans of a text, and the length of the last message with where in it each token stands.

    The spans are places in the conversation's last message.
    """
    if part.followed:
        return {**columns, **dict.fromkeys(SPAN_COLUMNS)}, (0, [])
    last = json.loads(columns["messages"])[-1]
    content: str = last["content"] if last["role"] == "assistant" and isinstance(last.get("content"), str) else ""
    bare = content.strip()
    start = part.text.rfind(bare, 0, part.targets[-1][1]) if bare else -1
    if start < 0:
        raise DataError(
            f"data: expected a last message of the assistant that the chat template does not change, got another in "
            f"{where}. Remove the row, use another template, or leave out span_weights."
        )
    return columns, (len(content), tokens.shifted(start - content.index(bare)))


# Rows that a teacher wrote


def _as_written(
    columns: Mapping[str, Any], encoder: RowEncoder, prompt: list[int], completion: str
) -> EncodedRow | None:
    """The tokens that a teacher wrote, if they stand behind the tokens of this prompt, and still are this text.

    They are not with another tokenizer or template. Spans are places in the text, and need its own tokens.
    """
    ids = columns.get("completion_ids")
    if not ids or any(columns.get(name) is not None for name in (*SPAN_COLUMNS, *TEACHER_PROMPT_COLUMNS.values())):
        return None
    if columns["prompt_ids"] != prompt or completion not in encoder.tokenizer.decode(prompt[-CONTEXT:] + ids):
        encoder.counts["retokenized"] += 1
        return None
    encoder.counts["written"] += 1
    return EncodedRow(prompt + ids, [IGNORE] * len(prompt) + ids)


def _written_turn(columns: Mapping[str, Any], encoder: RowEncoder, number: int) -> AnswerRow | None:
    if not columns.get("completion_ids"):
        return None
    talk = Conversation.read(columns, encoder.where(number))
    options = {**talk.options, "add_generation_prompt": True}
    text = render_chat(encoder.tokenizer, talk.messages[:-1], talk.where, **options)
    (prompt,) = encoder.tokens([text], special=False)
    row = _as_written(columns, encoder, prompt, talk.messages[-1].get("content") or "")
    return None if row is None else (number, len(prompt), encoder.weighted(row, columns, number))


# Token ids


def _given_ids(dataset: Dataset, encoder: RowEncoder, column: str) -> AnswerRows:
    owner = column.removesuffix("input_ids")
    vocabulary = vocabulary_size(encoder.tokenizer)
    for rows in encoder.nonempty(dataset, "input_ids"):
        for number, columns in rows.items():
            labels = columns.get(f"{owner}labels")
            row = EncodedRow(columns[column], columns[column] if labels is None else labels)
            if owner:
                columns = {"attention_mask": columns.get("attention_mask")}
            _check_ids(row, columns, vocabulary, encoder.where(number))
            yield number, 0, encoder.weighted(row, columns, number)


def _check_ids(row: EncodedRow, columns: Mapping[str, Any], vocabulary: int, where: str) -> None:
    ids = row.input_ids
    mask = columns.get("attention_mask")
    for name, values in (("label", row.labels), ("weight", columns.get("weights")), ("mask value", mask)):
        if values is not None and len(values) != len(ids):
            raise DataError(
                f"data: expected as many {name}s as input_ids, got {len(values)} and {len(ids)} in {where}. "
                f"{name.capitalize()} t belongs to token t. Correct the row."
            )
    if others := set(mask or ()) - {1}:
        raise DataError(
            f"data: expected input_ids of one text without padding, got an attention_mask with {min(others)} in "
            f"{where}. Batches are padded later. Remove the padding, and give each text a row."
        )
    check_unshifted(ids, row.labels, where)
    unknown = [i for i in (set(row.labels) - {IGNORE}) | set(ids) if not 0 <= i < vocabulary]
    if unknown:
        raise DataError(
            f"data: expected ids from 0 to {vocabulary - 1}, got {unknown[0]} in {where}. "
            "Use the tokenizer that the ids were made with."
        )


# For each kind with an answer: its encoder, and the columns of the student's and of the teacher's prompt.
_ANSWER_ENCODERS: dict[SourceKind, tuple[Callable[[Dataset, RowEncoder, str], AnswerRows], str, str]] = {
    "completion": (_completions, "prompt", "teacher_prompt"),
    "messages": (_conversations, "messages", "teacher_messages"),
    "input_ids": (_given_ids, "input_ids", "teacher_input_ids"),
}
