"""From a teacher's text to the message of a row: one that is encoded as the tokens that the teacher wrote."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from potstill.engines.sampling import Completion, Prompt
from potstill.errors import DataError
from potstill.generation.requests import GenerationRequest, Message
from potstill.models.chat import end_token_ids, render_chat, turn_end_id
from potstill.models.prompts import CONTEXT, prompt_ids

RowFormat = Literal["completion", "messages"]
_OPENED = re.compile(r"<[\w:]+>\s*\Z")  # a tag at the end of a prompt, such as <think>, which the model closes
_PLACES = {"content": "potstill0", "reasoning_content": "potstill1"}


class WrittenTurn(NamedTuple):
    """The assistant's message; and the tokens of prompt and completion, where its row would be encoded as others."""

    message: Message
    token_ids: tuple[list[int], list[int]] | None = None


@dataclass(frozen=True)
class TurnReader:
    """Makes messages of texts, for rows of one form that are encoded with the teacher's tokenizer."""

    tokenizer: PreTrainedTokenizerBase | None
    row_format: RowFormat

    def read(self, request: GenerationRequest, prompt: Prompt, completion: Completion) -> WrittenTurn:
        """Find a message whose row is encoded as the tokens of prompt and completion.

        Where there is none, the row needs these tokens: templates may drop or strip a part of what they render, text
        has more than one tokenization, and a text that was cut has no end.
        """
        tokenizer, plain = self.tokenizer, _message(content=completion.text)
        is_chat = tokenizer is not None and tokenizer.chat_template is not None
        if tokenizer is None or is_chat != (self.row_format == "messages"):  # the row's prompt is not the teacher's
            return WrittenTurn(plain)
        ids = prompt_ids(tokenizer, prompt) if isinstance(prompt, str) else [*prompt]
        tokens = ids, _written(tokenizer, completion)
        if not is_chat:
            whole = prompt_ids(tokenizer, request.messages[0]["content"] + completion.text)
            exact = [*whole, tokenizer.eos_token_id] == tokens[0] + tokens[1]
            return WrittenTurn(plain, None if exact else tokens)
        turn = _ChatTurn(tokenizer, request, *tokens)
        inline, by_template = [*turn.inline(completion.text)], []
        for message in inline:
            if turn.is_encoded(message):
                return WrittenTurn(message)
        for message in turn.by_template(completion.text):
            if turn.is_encoded(message):
                return WrittenTurn(message)
            by_template.append(message)
        return WrittenTurn([*by_template, *inline][0], tokens)


@dataclass(frozen=True)
class _ChatTurn:
    """One turn that a chat template renders: the tokens before it, and those of the teacher."""

    tokenizer: PreTrainedTokenizerBase
    request: GenerationRequest
    prompt: list[int]
    written: list[int]

    def is_encoded(self, message: Message) -> bool:
        """Whether the template renders the conversation with this message as the tokens, and no target behind them."""
        text = self._render(message)
        ids = [] if text is None else list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        length = len(self.prompt) + len(self.written)
        ends = self.written[-1] in end_token_ids(self.tokenizer) or not str(self.tokenizer.decode(ids[length:])).strip()
        return ends and ids[:length] == self.prompt + self.written

    def inline(self, text: str) -> Iterator[Message]:
        """Messages with the whole text as their content: thoughts and calls of tools too."""
        if opened := _OPENED.search(str(self.tokenizer.decode(self.prompt[-CONTEXT:]))):
            yield _message(content=opened[0] + text)
        yield _message(content=text)

    def by_template(self, text: str) -> Iterator[Message]:
        """Messages of the parts of the text, as the template itself sets them: content alone, or with thoughts."""
        if (schema := getattr(self.tokenizer, "response_template", None)) is not None:
            prefix = self.tokenizer.decode(self.prompt)
            yield self.tokenizer.parse_response(text, schema, prefix=prefix, tools=self.request.chat.get("tools"))
        before = self._render(None) or ""
        end = turn_end_id(self.tokenizer)
        for keys in (["content"], ["content", "reasoning_content"]):
            places = {key: _PLACES[key] for key in keys}
            rendered = self._render(_message(**places)) or ""
            turn = rendered.removeprefix(before)
            if end is not None:
                turn = turn.rpartition(str(self.tokenizer.decode([end])))[0]
            if rendered.startswith(before) and all(turn.count(place) == 1 for place in places.values()):
                pattern = re.escape(turn)
                for key, place in places.items():
                    pattern = pattern.replace(place, f"(?P<{key}>.*)")
                if match := re.fullmatch(pattern, text, re.DOTALL):
                    yield _message(**match.groupdict())

    def _render(self, message: Message | None) -> str | None:
        """The conversation with this message, or with the opening of one; None where the template refuses it."""
        messages = [*self.request.messages, *([] if message is None else [message])]
        options = {**self.request.template_arguments, "add_generation_prompt": message is None}
        try:
            return render_chat(self.tokenizer, messages, "", **options)
        except DataError:
            return None


def _message(**parts: str) -> Message:
    return {"role": "assistant", **parts}


def _written(tokenizer: PreTrainedTokenizerBase, completion: Completion) -> list[int]:
    """The tokens of a completion with its end; those of its text, where the engine gave none."""
    if completion.ids:
        return [*completion.ids]
    end = turn_end_id(tokenizer)
    ids: Sequence[int] = tokenizer(completion.text, add_special_tokens=False)["input_ids"]
    ends = [tokenizer.eos_token_id if end is None else end] if completion.ended else []
    return [*ids, *(token for token in ends if token is not None)]
