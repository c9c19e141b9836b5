"""From the columns of a source to rows of ids and labels: one function a kind."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple, cast

import jinja2
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from potstill.data.disk_cache import BATCH
from potstill.data.readers import one_line
from potstill.data.sources import Kind
from potstill.data.spans import Span, places
from potstill.data.weighing import SPANS, Completion, SpanWeights, token_weights
from potstill.errors import DataError
from potstill.losses.alignment import IGNORE, Task
from potstill.models.loading import vocabulary_size


class Row(NamedTuple):
    """One example; and what the teacher reads instead, where that is something else.

    Neither labels are shifted nor weights, which say how much each token counts.
    """

    input_ids: list[int]
    labels: list[int] | int | float
    token_type_ids: list[int] | None = None
    teacher_input_ids: list[int] | None = None
    teacher_labels: list[int] | None = None
    weights: list[float] | None = None


@dataclass(frozen=True)
class Encoding:
    """What every kind needs, and the facts that it counts.

    Args:
        tokenizer: of the student.
        max_length: tokens of the longest row.
        packing: documents in one stream.
        file: its name, for messages.
        facts: `empty` rows that were skipped and `cut` rows are added to it, and the `teacher_longest` row is noted.
        task: what the model is asked for.
        classes: the numbers of classes by their names, for classification.
        span_weights: see `Source`.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    packing: bool
    file: str
    facts: Counter[str]
    task: Task = "causal"
    classes: Mapping[str, int] = field(default_factory=dict)
    span_weights: SpanWeights | None = None

    def rows(self, dataset: Dataset, kind: Kind) -> Iterator[Row]:
        """The encoded rows of a dataset that `load` gave.

        Raises:
            DataError: while iterating, when a row cannot be encoded.
        """
        if kind == "text":
            return _text_rows(dataset, self)
        own: Iterator[_Answered] | None = None
        columns = set(dataset.column_names)
        if kind == "completion":
            rows = _with_room(_completions(dataset, self), self)
            own = _completions(dataset, self, "teacher_prompt") if "teacher_prompt" in columns else None
        elif kind == "messages":
            rows = _with_room(_conversations(dataset, self), self)
            own = _conversations(dataset, self, "teacher_messages") if "teacher_messages" in columns else None
        else:
            rows = (self.cut(one.ids, one.labels, one.weights) for one in _given_ids(dataset, self))
            own = _given_ids(dataset, self, "teacher_") if "teacher_input_ids" in columns else None
        return rows if own is None else _beside(rows, own, self)

    def tokens(self, texts: list[str], *, special: bool) -> list[list[int]]:
        """The ids of texts, with or without the special tokens that the tokenizer adds."""
        return [ids for group in in_groups(texts) for ids in self._tokens(group, special)]

    def _tokens(self, texts: list[str], special: bool) -> list[list[int]]:
        encoded = self.tokenizer(
            texts,
            add_special_tokens=special,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return cast(list[list[int]], encoded["input_ids"])

    def closed(self, ids: list[int]) -> list[int]:
        """The ids with EOS at their end, once."""
        end = self.tokenizer.eos_token_id
        return ids if end is None or ids[-1:] == [end] else [*ids, end]

    def offsets(self, texts: list[str]) -> list[list[Span]]:
        """Where tokens stand in texts, where anything is said of spans."""
        return [[] for _ in texts] if self.span_weights is None else places(self.tokenizer, texts)

    def weighed(self, one: _Answered, said: Mapping[str, Any], completion: Completion | None = None) -> _Answered:
        """The row with how much each of its tokens counts, where the file says so. A weight of 0 is a label of -100."""
        weights = token_weights(said, len(one.ids), self.span_weights, completion, self.where(one.number))
        if weights is None:
            return one
        labels = [label if weight else IGNORE for label, weight in zip(one.labels, weights, strict=True)]
        return one._replace(labels=labels, weights=weights)

    def where(self, number: int) -> str:
        """What a row is called in messages."""
        return f"row {number} of {self.file}"

    def cut(self, ids: list[int], labels: list[int], weights: list[float] | None = None) -> Row:
        """The first max_length tokens."""
        self.facts["cut"] += len(ids) > self.max_length
        most = slice(self.max_length)
        return Row(ids[most], labels[most], weights=None if weights is None else weights[most])

    def maskable(self, rows: Iterator[Row]) -> Iterator[Row]:
        """The rows with labels for tokens of the text alone, and none for special ones."""
        special = {*self.tokenizer.all_special_ids}
        for row in rows:
            assert isinstance(row.labels, list)
            pairs = zip(row.input_ids, row.labels, strict=True)
            yield Row(row.input_ids, [IGNORE if i in special else label for i, label in pairs])

    def frame(self) -> tuple[list[int], list[int]]:
        """What the tokenizer itself puts before and after a text: [CLS] and [SEP], BOS, EOS."""
        (bare,), (whole,) = self.tokens(["a"], special=False), self.tokens(["a"], special=True)
        for start in range(len(whole) - len(bare) + 1):
            if bare and whole[start : start + len(bare)] == bare:
                return whole[:start], whole[start + len(bare) :]
        return [], []

    def filled(self, dataset: Dataset, column: str) -> Iterator[tuple[list[int], dict[str, list[Any]]]]:
        """Batches without the rows whose `column` is empty, and the rows' numbers in the file, from 1."""
        for number, batch in enumerate(dataset.iter(BATCH)):
            hollow = "[]" if column == "messages" else ""
            places = [i for i, value in enumerate(batch[column]) if value and value != hollow]
            self.facts["empty"] += len(batch[column]) - len(places)
            yield (
                [number * BATCH + i + 1 for i in places],
                {name: [values[i] for i in places] for name, values in batch.items()},
            )


def in_groups(texts: list[str], characters: int = 1 << 22) -> Iterator[list[str]]:
    """The texts in turn, some at a time: while a tokenizer works it holds a hundred bytes for each token."""
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


# text


def _text_rows(dataset: Dataset, encoding: Encoding) -> Iterator[Row]:
    if encoding.task == "masked" and not encoding.packing:
        return _framed_windows(dataset, encoding)
    arrange = packed if encoding.packing else windows
    return (Row(ids, ids) for ids in arrange(_documents(dataset, encoding), encoding.max_length))


def _documents(dataset: Dataset, encoding: Encoding) -> Iterator[list[int]]:
    for _, batch in encoding.filled(dataset, "text"):
        for ids in encoding.tokens(batch["text"], special=True):
            yield encoding.closed(ids)


def _framed_windows(dataset: Dataset, encoding: Encoding) -> Iterator[Row]:
    """Each document in windows that all have the special tokens around them, as masked language models know them."""
    before, after = encoding.frame()
    room = encoding.max_length - len(before) - len(after)
    if room < 1:
        raise DataError(
            f"data: expected max_length above {len(before) + len(after)}, the special tokens of a row, got "
            f"{encoding.max_length}. Raise max_length."
        )
    for _, batch in encoding.filled(dataset, "text"):
        for ids in encoding.tokens(batch["text"], special=False):
            for start in range(0, len(ids), room):
                row = [*before, *ids[start : start + room], *after]
                yield Row(row, row)


def packed(documents: Iterator[list[int]], length: int) -> Iterator[list[int]]:
    """All documents in one stream, in rows of `length`; the last may be shorter, but not a lone token."""
    stream: list[int] = []
    for ids in documents:
        stream += ids
        whole = len(stream) - len(stream) % length
        yield from (stream[start : start + length] for start in range(0, whole, length))
        stream = stream[whole:]
    if len(stream) > 1:
        yield stream


def windows(documents: Iterator[list[int]], length: int) -> Iterator[list[int]]:
    """Each document by itself, in windows of at most `length` that do not overlap."""
    for ids in documents:
        bounds = [*range(0, len(ids), length), len(ids)] if ids else [0, 0]
        # The first token of a row is never predicted, so a lone last one gets company from the window before.
        if len(bounds) > 2 and bounds[-1] - bounds[-2] == 1 and length > 2:
            bounds[-2] -= 1
        yield from (ids[start:end] for start, end in pairwise(bounds))


# prompt and completion, messages: rows with an answer, whose first token is at a known place


class _Answered(NamedTuple):
    number: int  # of the row in the file
    prompt: int  # tokens before the first that counts
    ids: list[int]
    labels: list[int]
    weights: list[float] | None = None


def _with_room(answered: Iterator[_Answered], encoding: Encoding) -> Iterator[Row]:
    """The rows cut at max_length, each of which must keep a token of its answer."""
    full: list[_Answered] = []
    for one in answered:
        if one.prompt >= encoding.max_length:
            full.append(one._replace(ids=[], labels=[], weights=None))
        yield encoding.cut(one.ids, one.labels, one.weights)
    if full:
        raise DataError(
            f"data: expected prompts shorter than max_length {encoding.max_length}, got {full[0].prompt} tokens "
            f"in row {full[0].number} of {encoding.file} ({len(full)} such in all). Nothing of the answer would "
            "be left. Raise max_length, or shorten or remove these rows."
        )


def _beside(rows: Iterator[Row], own: Iterator[_Answered], encoding: Encoding) -> Iterator[Row]:
    """Each row with what the teacher reads, up to the last token of the answer that is left of it."""
    for row, theirs in zip(rows, own, strict=True):
        assert isinstance(row.labels, list)
        answer = [label for label in row.labels[1:] if label != IGNORE]
        places = [i for i, label in enumerate(theirs.labels) if label != IGNORE and i][: len(answer)]
        if [theirs.labels[i] for i in places] != answer:
            raise DataError(
                f"data: expected the same answer tokens behind the student's and the teacher's prompt, got others in "
                f"row {theirs.number} of {encoding.file}. Each position of one must be one of the other. End both "
                "prompts with the same word or line."
            )
        end = places[-1] + 1 if places else 0
        encoding.facts["teacher_longest"] = max(encoding.facts["teacher_longest"], end)
        yield row._replace(teacher_input_ids=theirs.ids[:end], teacher_labels=theirs.labels[:end])


def _completions(dataset: Dataset, encoding: Encoding, column: str = "prompt") -> Iterator[_Answered]:
    _, closing = encoding.frame()
    for numbers, batch in encoding.filled(dataset, "completion"):
        prompts = encoding.tokens(batch[column], special=True)
        completions = encoding.tokens(batch["completion"], special=False)
        offsets = encoding.offsets(batch["completion"])
        for i, (number, prompt, completion) in enumerate(zip(numbers, prompts, completions, strict=True)):
            if closing and prompt[-len(closing) :] == closing:
                prompt = prompt[: -len(closing)]
            completion = encoding.closed(completion)
            labels = [IGNORE] * len(prompt) + completion
            said = {name: values[i] for name, values in batch.items()}
            place = Completion(len(said["completion"]), offsets[i], first=len(prompt))
            yield encoding.weighed(_Answered(number, len(prompt), prompt + completion, labels), said, place)


class _Written(NamedTuple):
    """A conversation as text, and for each turn of the assistant the text before it and up to its end."""

    number: int
    whole: str
    turns: list[tuple[str, str]]


def _conversations(dataset: Dataset, encoding: Encoding, before: str | None = None) -> Iterator[_Answered]:
    """Conversations, or what they are with the messages of a column before the assistant's first turn."""
    for numbers, batch in encoding.filled(dataset, "messages"):
        spoken = [json.loads(text) for text in batch["messages"]]
        if before is not None:
            first = [next((i for i, one in enumerate(each) if one["role"] == "assistant"), 0) for each in spoken]
            begun = [json.loads(text) for text in batch[before]]
            spoken = [start + each[i:] for start, each, i in zip(begun, spoken, first, strict=True)]
        written = [_write(each, number, encoding) for number, each in zip(numbers, spoken, strict=True)]
        texts = {one.whole for one in written} | {text for one in written for turn in one.turns for text in turn}
        ordered = sorted(texts)
        ids_of = dict(zip(ordered, encoding.tokens(ordered, special=False), strict=True))
        offsets = encoding.offsets([one.whole for one in written])
        for i, one in enumerate(written):
            ids = ids_of[one.whole]
            spans = [tuple(_agreement(ids_of[text], ids) for text in turn) for turn in one.turns]
            labels = [IGNORE] * len(ids)
            for start, end in spans:
                labels[start:end] = ids[start:end]
            said = {name: values[i] for name, values in batch.items()}
            place = None
            if any(said.get(name) is not None for name in SPANS):
                place = _last_turn(spoken[i], one, offsets[i], encoding.where(one.number))
            yield encoding.weighed(_Answered(one.number, spans[0][0], ids, labels), said, place)


def _last_turn(talk: list[dict[str, Any]], written: _Written, offsets: list[Span], where: str) -> Completion:
    """Where the text of the last message stands, which spans are places in."""
    last = talk[-1]
    text: str = last["content"] if last["role"] == "assistant" and isinstance(last.get("content"), str) else ""
    before, after = written.turns[-1]
    bare = text.strip()
    found = after.find(bare, len(before)) if bare else -1
    if found < 0:
        raise DataError(
            f"data: expected a last message of the assistant that the chat template leaves as it is, got another in "
            f"{where}. Its spans are places in it. Remove the row, use another template, or leave out span_weights."
        )
    return Completion(len(text), offsets, found - text.index(bare))


def _write(messages: list[dict[str, Any]], number: int, encoding: Encoding) -> _Written:
    where = encoding.where(number)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise DataError(
            f"data: expected a turn of the assistant in every conversation, got none in {where}. "
            "Only the assistant's tokens count. Remove the row, or call the role assistant."
        )
    if turns[0] == 0:
        raise DataError(
            f"data: expected a message before the assistant's first turn, got none in {where}. "
            "Begin the conversation with the user or the system."
        )
    whole = _render(messages, False, where, encoding)
    written = _Written(number, whole, [])
    for turn in turns:
        before = _render(messages[:turn], True, where, encoding)
        is_last = turn == len(messages) - 1
        after = whole if is_last else _render(messages[: turn + 1], False, where, encoding)
        if not (after.startswith(before) and whole.startswith(after)):
            raise DataError(
                f"data: expected a chat template that only appends, got one that rewrites what it wrote before, at "
                f"message {turn + 1} of {where}. The assistant's tokens cannot be told apart. Use another template, "
                "or end each conversation with its only turn of the assistant."
            )
        written.turns.append((before, after))
    return written


def _render(messages: list[dict[str, Any]], open_turn: bool, where: str, encoding: Encoding) -> str:
    try:
        text = encoding.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=open_turn)
    except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
        raise DataError(
            f"data: expected messages that the chat template takes, got {one_line(error)!r} in {where}. "
            "Correct the row, or use another chat template."
        ) from None
    return cast(str, text)


def _agreement(ids: list[int], whole: list[int]) -> int:
    """How many tokens two lists have in common at their start."""
    if whole[: len(ids)] == ids:
        return len(ids)
    # A token may reach over the end of the shorter text.
    return next((i for i, (a, b) in enumerate(zip(ids, whole, strict=False)) if a != b), min(len(ids), len(whole)))


# input_ids


def _given_ids(dataset: Dataset, encoding: Encoding, whose: str = "") -> Iterator[_Answered]:
    vocabulary = vocabulary_size(encoding.tokenizer)
    for numbers, batch in encoding.filled(dataset, "input_ids"):
        for i, number in enumerate(numbers):
            ids = batch[f"{whose}input_ids"][i]
            labels = batch[f"{whose}labels"][i] if f"{whose}labels" in batch else ids
            mask = batch["attention_mask"][i] if "attention_mask" in batch else []
            where = encoding.where(number)
            _check_ids(ids, labels, mask, vocabulary, where)
            said = {} if whose else {name: values[i] for name, values in batch.items()}
            _check_weights(ids, said.get("weights", ids), where)
            yield encoding.weighed(_Answered(number, 0, ids, labels), said)


def _check_weights(ids: list[int], weights: list[float], where: str) -> None:
    if len(weights) != len(ids):
        raise DataError(
            f"data: expected as many weights as input_ids, got {len(weights)} and {len(ids)} in {where}. "
            "Weight t belongs to token t. Correct the row."
        )


def _check_ids(ids: list[int], labels: list[int], mask: list[int], vocabulary: int, where: str) -> None:
    if len(labels) != len(ids):
        raise DataError(
            f"data: expected as many labels as input_ids, got {len(labels)} and {len(ids)} in {where}. "
            "Label t belongs to token t. Correct the row."
        )
    if 0 in mask:
        raise DataError(
            f"data: expected input_ids without padding, got an attention_mask with 0 in {where}. "
            "Batches are padded later. Remove the padding."
        )
    strange = [i for i in (set(labels) - {IGNORE}) | set(ids) if not 0 <= i < vocabulary]
    if strange:
        raise DataError(
            f"data: expected ids from 0 to {vocabulary - 1}, got {strange[0]} in {where}. "
            "Use the tokenizer that the ids were made with."
        )
