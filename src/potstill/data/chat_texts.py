"""Render conversations as texts to learn, and find in them what the assistant writes."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from potstill.data.token_places import common_prefix
from potstill.data.token_weights import Span
from potstill.errors import DataError, one_line
from potstill.models.chat import (
    LOSS_KEYS,
    THOUGHTS,
    Message,
    as_object,
    end_token_ids,
    generation_spans,
    marks_generation,
    names_argument,
    render_chat,
    render_messages,
)

CHECKED_ROWS = 3  # in which it is tried whether the template reads tools and documents
END_OF_THOUGHTS = "</think>"


class Conversation(NamedTuple):
    """Messages, and what else the chat template reads."""

    messages: list[Message]
    where: str  # the row, for errors
    prompt_messages: int  # leading messages without a loss
    options: dict[str, Any]  # tools, documents and arguments of the template

    @classmethod
    def read(cls, columns: Mapping[str, Any], where: str, teacher_prompt: list[Message] | None = None) -> Conversation:
        """Read the columns of a row; a prompt of the teacher's stands in place of all before the first answer."""
        messages = json.loads(columns["messages"])
        options = {name: json.loads(columns[name]) for name in ("tools", "documents") if columns.get(name)}
        arguments = json.loads(columns.get("chat_template_kwargs") or "{}")
        prompt_messages = columns.get("num_prompt_messages") or 0
        if teacher_prompt is not None:
            first = next((i for i, message in enumerate(messages) if message["role"] == "assistant"), 0)
            messages = teacher_prompt + messages[first:]
            prompt_messages += len(teacher_prompt) - first
        return cls(messages, where, prompt_messages, options | arguments)

    def turns(self) -> list[int]:
        """The assistant's messages that have a loss."""
        turns = [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]
        if not turns:
            raise DataError(
                f"data: expected a turn of the assistant in every conversation, got none in {self.where}. "
                "Remove the row, or call the role assistant."
            )
        turns = [i for i in turns if i >= self.prompt_messages and self._has_loss(self.messages[i])]
        if turns[:1] == [0]:
            raise DataError(
                f"data: expected a message before the assistant's first turn, got none in {self.where}. "
                "Begin the conversation with the user or the system."
            )
        return turns

    def _has_loss(self, message: Message) -> bool:
        values = {key: message[key] for key in LOSS_KEYS if message.get(key) is not None}
        for key, value in values.items():
            if value not in (0, 1):
                raise DataError(
                    f"data: expected a message's {key} of 0 or 1, or false or true, got {value!r} in {self.where}. "
                    "Weigh rows by a column (weight), or spans by span_weights."
                )
        return all(values.values())


class ChatText(NamedTuple):
    """A text to learn, and where in it the assistant writes, in characters: each turn to the end of its end token."""

    text: str
    targets: list[Span]
    turn: int  # the index of the last message that is a target
    followed: bool  # whether the assistant has later turns, in texts of their own
    closed: bool  # whether the text has an end token behind it
    layout: str = "whole"  # turn: the turn alone is a target; marked: the template marks the targets
    opened: str | None = None  # what the template opens for the assistant and renders otherwise, as an example


@dataclass(frozen=True)
class ChatRenderer:
    """Renders conversations as texts to learn.

    A conversation is one text where the template only appends to it. Where it rewrites earlier turns (drops their
    thoughts, closes the last turn otherwise), it is one text where {% generation %} marks show the same targets in it,
    else one for each turn of the assistant, each as the model reads it when it writes that turn.

    What the generation prompt opens for the assistant is no target (`<think>`, or an empty thought).
    """

    tokenizer: PreTrainedTokenizerBase
    checked: Counter[str] = field(default_factory=Counter)

    @cached_property
    def ends(self) -> list[str]:
        """The tokens that end generation."""
        return [str(self.tokenizer.convert_ids_to_tokens(i)) for i in sorted(end_token_ids(self.tokenizer))]

    @cached_property
    def marks(self) -> bool:
        return marks_generation(self.tokenizer)

    def end_within(self, talk: Conversation) -> str | None:
        """Find a token that ends a text in what the messages themselves say; the model reads it as that token."""
        contents = [part for message in talk.messages for _, part in _parts(message)]
        return next((end for end in self.ends if any(end in part for part in contents)), None)

    def render(self, talk: Conversation, *, by_turn: bool = False) -> list[ChatText]:
        """Render a conversation; none where no message has a loss. `by_turn` asks for a text for each turn."""
        self._check_options(talk)
        texts = [self._turn(talk, turn) for turn in talk.turns()]
        if not texts:
            return []
        last = texts[-1]
        whole = last.text
        if last.closed and last.turn < len(talk.messages) - 1:
            whole = self._text(talk, len(talk.messages))
        self._check_others(talk, last.turn, whole)
        by_turns = [part._replace(followed=part is not last) for part in texts]
        if by_turn:
            return by_turns
        if all(whole.startswith(part.text) for part in texts) and all(part.closed for part in texts[:-1]):
            opened = next((part.opened for part in texts if part.opened), None)
            targets = [target for part in texts for target in part.targets]
            return [last._replace(text=whole, targets=targets, layout="whole", opened=opened)]
        marked = self._marked(talk, texts) if self.marks else None
        return by_turns if marked is None else [marked]

    def _text(self, talk: Conversation, count: int, **options: Any) -> str:
        return render_chat(self.tokenizer, talk.messages[:count], talk.where, **talk.options, **options)

    def _turn(self, talk: Conversation, turn: int) -> ChatText:
        """Render a conversation up to a turn of the assistant, which is what it has to write."""
        before = self._text(talk, turn, add_generation_prompt=True)
        form, text = render_messages(self.tokenizer, talk.messages[: turn + 1], talk.where, **talk.options)
        start, opened = len(before), None
        if not text.startswith(before):
            start = common_prefix(before, text)
            if start < len(self._text(talk, turn).rstrip()):
                raise DataError(
                    "data: expected a chat template that renders a turn of the assistant behind its generation prompt, "
                    f"got one that changes what is before, at message {turn + 1} of {talk.where}. Name another "
                    "template in data.chat_template."
                )
            opened = f"{before[start:]!r}, and renders {text[start : start + 20]!r} in {talk.where}"
        end, closed = self._end(form[-1], text, start)
        targets = [(start, end)]
        if self.marks:
            spans = generation_spans(self.tokenizer, form, **talk.options)
            inside = [(max(begin, start), min(stop, end)) for begin, stop in spans if begin < end and stop > start]
            if inside and text[inside[-1][1] : end] in ("", *self.ends):
                targets = [*inside[:-1], (inside[-1][0], end)]
        self._check_turn(talk, turn, text, start)
        return ChatText(text, targets, turn, False, closed, "turn", opened)

    def _end(self, message: Message, text: str, start: int) -> tuple[int, bool]:
        """Find the end of the first end token behind all that a message says; the end of the text without one."""
        parts = [part for _, part in _parts(message) if part in text[start:]]
        for match in re.compile("|".join(map(re.escape, self.ends)) or "(?!)").finditer(text, start):
            if all(part in text[start : match.start()] for part in parts):
                return match.end(), True
        return len(text), False

    def _marked(self, talk: Conversation, turns: list[ChatText]) -> ChatText | None:
        """Find the targets of all turns in one text, within the spans that the template marks; None if they differ."""
        form, text = render_messages(self.tokenizer, talk.messages, talk.where, **talk.options)
        spans = generation_spans(self.tokenizer, form, **talk.options)
        targets: list[Span] = []
        for turn in turns:
            for start, end in turn.targets:
                begin = text.find(turn.text[start:end], targets[-1][1] if targets else 0)
                stop = begin + end - start
                if begin < 0 or not any(a <= begin and (stop <= b or text[b:stop] in self.ends) for a, b in spans):
                    return None
                targets.append((begin, stop))
        return turns[-1]._replace(text=text, targets=targets, layout="marked")

    def _check_turn(self, talk: Conversation, turn: int, text: str, start: int) -> None:
        """Check that all that the assistant says in a turn is in its text."""
        for key, part in _parts(talk.messages[turn]):
            if not _stands_in(part, text[start:]):
                self._check_reads(talk, turn, turn, key, part)

    def _check_others(self, talk: Conversation, last_turn: int, text: str) -> None:
        """Check that what others say before the last turn is in the text."""
        for i, message in enumerate(talk.messages[:last_turn]):
            if message["role"] != "assistant":
                for key, part in _parts(message):
                    if not _stands_in(part, text):
                        self._check_reads(talk, i, last_turn, key, part)

    def _check_reads(self, talk: Conversation, i: int, last: int, key: str, part: str) -> None:
        """Check that the template reads a part of message i, where the text up to the last message has it otherwise."""
        messages = talk.messages.copy()
        parted = key == "content" and isinstance(messages[i]["content"], list)
        messages[i] = {**messages[i], "content": "another text"} if parted else _with_other(messages[i], part)
        if not self._differ(talk, talk._replace(messages=messages), last + 1):
            raise DataError(
                f"data: expected a chat template that renders the {key} of every message, got one that leaves out that "
                f"of message {i + 1} ({messages[i]['role']}) in {talk.where}: {one_line(part, 40)!r}. Remove it, or "
                "name another template in data.chat_template."
            )

    def _check_options(self, talk: Conversation) -> None:
        """Check that the template reads its arguments, and tools and documents in the first rows that have some."""
        for name in talk.options:
            reads = names_argument(self.tokenizer, name)
            if reads and name in ("tools", "documents") and self.checked[name] < CHECKED_ROWS:
                self.checked[name] += 1
                others = {key: value for key, value in talk.options.items() if key != name}
                reads = self._differ(talk, talk._replace(options=others), len(talk.messages))
            if not reads:
                raise DataError(
                    f"data: expected a chat template that reads {name}, got one that does not, in {talk.where}. Remove "
                    "it from the row, or name another template in data.chat_template."
                )

    def _differ(self, talk: Conversation, other: Conversation, count: int) -> bool:
        """Whether the template renders the first messages of two conversations differently, or refuses the other."""
        text = self._text(talk, count)
        try:
            return self._text(other, count) != text
        except DataError:
            return True


def _parts(message: Message) -> Iterator[tuple[str, str]]:
    """Yield what a message says, each with its key: content, thoughts, and names and arguments of tool calls."""
    content = message.get("content") or ""
    if isinstance(content, list):
        content = "".join(part if isinstance(part, str) else part.get("text") or "" for part in content)
    thoughts, end, answer = content.rpartition(END_OF_THOUGHTS)
    if message["role"] == "assistant" and end:
        yield "content", thoughts.rpartition("<think>")[2].strip()
        yield "content", answer.strip()
    else:
        yield "content", content.strip()
    yield from ((name, message[name].strip()) for name in THOUGHTS if isinstance(message.get(name), str))
    for call in message.get("tool_calls") or ():
        function = call.get("function", call)
        yield "tool_calls", function["name"]
        yield from (("tool_calls", text) for text in _strings(as_object(function.get("arguments"))))


def _strings(value: Any) -> Iterator[str]:
    """Yield all strings within a value of JSON, without keys."""
    if isinstance(value, str):
        yield value.strip()
    elif isinstance(value, Mapping | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(item)


def _with_other(value: Any, part: str) -> Any:
    """Put another text in the place of a part, in all strings of a value of JSON."""
    if isinstance(value, str):
        return value.replace(part, "another text")
    if isinstance(value, Mapping):
        return {key: value[key] if key == "role" else _with_other(value[key], part) for key in value}
    return [_with_other(item, part) for item in value] if isinstance(value, list) else value


def _stands_in(part: str, text: str) -> bool:
    """Whether a text has a part, as it is or as within a string of JSON."""
    return part in text or any(json.dumps(part, ensure_ascii=ascii_only)[1:-1] in text for ascii_only in (False, True))
