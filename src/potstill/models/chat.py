"""Chat templates: rendering conversations, defaults of a template's arguments, and the tokens that end a turn."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from potstill.errors import DataError, one_line
from potstill.models.generation_settings import make_savable
from potstill.models.template_limit import TemplateLimitError, limited_rendering

Message = dict[str, Any]

THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # names of one thing: a template reads one or two of them
LOSS_KEYS = ("weight", "train", "loss")  # of a message, for its loss; no template sees them
TEXT_PARTS = ("text", "input_text", "output_text")  # types of content parts
_SET = ("messages", "conversation", "add_generation_prompt", "continue_final_message", "tokenize")
_CONTENT = "potstill"  # of a message: no template trims or changes it
_CALL = "potstill_call"
_NEXT: Message = {"role": "user", "content": "next"}


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    where: str,
    expected: str = "data: expected messages that the chat template takes",
    **options: Any,
) -> str:
    """Render messages by the chat template; a DataError that begins with `expected` where it fails.

    Content parts are joined to text, or text is given as a part to a template that reads parts alone. Arguments of tool
    calls are given as an object where the template would quote their text, and thoughts by the name that it reads.
    """
    return render_messages(tokenizer, messages, where, expected, **options)[1]


def render_messages(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    where: str,
    expected: str = "data: expected messages that the chat template takes",
    **options: Any,
) -> tuple[list[Message], str]:
    """As `render_chat`; return the messages in the form that was given to the template, and the text."""
    rendered: tuple[list[Message], str] | None = None
    failure: Exception | None = None
    for form in _forms(_plain_messages(messages, tokenizer, where)):
        try:
            with limited_rendering():
                text = str(tokenizer.apply_chat_template(form, tokenize=False, **options))
        except TemplateLimitError:
            raise
        except Exception as error:  # a template is a program, which may fail in any way
            failure = failure or error
            continue
        if not _quotes_arguments(form, text):
            return form, text
        rendered = rendered or (form, text)
    if rendered is not None:
        return rendered
    assert failure is not None
    raise DataError(
        f"{expected}, got {one_line(failure, 200)!r} in {where}. Correct the row, or use another chat template."
    ) from None


def generation_spans(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], **options: Any
) -> list[tuple[int, int]]:
    """Find the characters that the template marks by {% generation %}, of messages from `render_messages`."""
    arguments: dict[str, Any] = {**tokenizer.special_tokens_map, **options, "return_assistant_tokens_mask": True}
    template = tokenizer.get_chat_template(tools=options.get("tools"))
    with limited_rendering():
        rendered: Any = render_jinja_template(conversations=[messages], chat_template=template, **arguments)
    return [(start, end) for start, end in rendered[1][0]]


def marks_generation(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template marks what the assistant writes by {% generation %}."""
    return re.search(r"\{%-?\s*generation\b", _template_text(tokenizer)) is not None


def names_argument(tokenizer: PreTrainedTokenizerBase, name: str) -> bool:
    """Whether the chat template reads an argument that can be given; some are set wherever it renders."""
    return name not in _SET and re.search(rf"\b{re.escape(name)}\b", _template_text(tokenizer)) is not None


def unread_keys(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> list[str]:
    """The keys of messages that have a value and that the chat template does not name."""
    template = _template_text(tokenizer)
    known = {"role", "content", "tool_calls", *THOUGHTS, *LOSS_KEYS}
    keys = (key for message in messages for key, value in message.items() if value not in (None, "", [], {}))
    return [key for key in dict.fromkeys(keys) if key not in known and not _reads_key(template, key)]


def _template_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template's text; of several templates all of them."""
    template = getattr(tokenizer, "chat_template", None)
    return "\n".join(template.values()) if isinstance(template, dict) else template or ""


def _plain_messages(messages: list[Message], tokenizer: PreTrainedTokenizerBase, where: str) -> list[Message]:
    """Join content parts, name thoughts as the template does, and remove the keys of the loss."""
    plain, template = [], _template_text(tokenizer)
    parts_alone = _reads_parts_alone(template)
    for number, message in enumerate(messages, 1):
        message = {key: value for key, value in message.items() if key not in LOSS_KEYS and value is not None}
        if isinstance(content := message.get("content"), list):
            message["content"] = "".join(_part_text(part, f"message {number} of {where}") for part in content)
        if parts_alone and "content" in message:
            message["content"] = [{"type": "text", "text": message["content"]}]
        for name in THOUGHTS:
            if name in message and not _reads_key(template, name):
                other = next((key for key in THOUGHTS if _reads_key(template, key)), None)
                if other is not None and other not in message:
                    message[other] = message.pop(name)
        plain.append(message)
    return plain


@lru_cache(maxsize=64)
def _reads_parts_alone(template: str) -> bool:
    """Whether a template leaves out content that is text, and renders it as a list of parts."""
    renders = []
    for content in (_CONTENT, [{"type": "text", "text": _CONTENT}]):
        messages = [{"role": role, "content": content} for role in ("user", "assistant")]
        special: dict[str, Any] = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "")
        try:
            with limited_rendering():
                rendered: Any = render_jinja_template(conversations=[messages], chat_template=template, **special)
        except TemplateLimitError:
            raise
        except Exception:  # as above
            rendered = [[""]]
        renders.append(rendered[0][0].count(_CONTENT) == 2)
    return renders == [False, True]


def _part_text(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type", "text") in TEXT_PARTS and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type", "no text") if isinstance(part, dict) else type(part).__name__
    raise DataError(
        f"data: expected content parts of type text, got {kind} in {where}. Text alone is read. Remove the row, or "
        "that part."
    )


@lru_cache(maxsize=1024)
def _reads_key(template: str, name: str) -> bool:
    return re.search(rf"\.{re.escape(name)}\b|['\"]{re.escape(name)}['\"]", template) is not None


def _forms(messages: list[Message]) -> Iterator[list[Message]]:
    """Yield the messages as they are, and in other forms that templates ask for."""
    yield messages
    if any(message.get("tool_calls") for message in messages):
        yield [_with_arguments(message, as_object) for message in messages]
        yield [_with_arguments(message, _as_text) for message in messages]
    if any("content" not in message for message in messages):
        yield from _forms([{"content": "", **message} for message in messages])


def _with_arguments(message: Message, convert: Any) -> Message:
    calls = message.get("tool_calls")
    if not calls:
        return message
    converted = []
    for call in calls:
        function = call.get("function", call)
        function = {**function, "arguments": convert(function.get("arguments"))}
        converted.append({**call, "function": function} if "function" in call else function)
    return {**message, "tool_calls": converted}


def as_object(arguments: Any) -> Any:
    """Read the arguments of a tool call, which are an object or its JSON text."""
    try:
        return json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return arguments


def _as_text(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _quotes_arguments(messages: list[Message], text: str) -> bool:
    """Whether a rendered text has arguments of a tool call, which are JSON, as a quoted string."""
    calls = [call.get("function", call) for message in messages for call in message.get("tool_calls", ())]
    arguments = [call["arguments"] for call in calls if isinstance(call.get("arguments"), str)]
    return any(
        json.dumps(value, ensure_ascii=ascii_only) in text for value in arguments for ascii_only in (True, False)
    )


def set_chat_template(
    tokenizer: PreTrainedTokenizerBase,
    template: str | Path | None = None,
    arguments: Mapping[str, Any] | None = None,
    part: str = "data",
) -> None:
    """Give a tokenizer the chat template of a file, and its template defaults for arguments.

    The defaults are written into the template's text. So they are saved with the tokenizer, and hold wherever it
    renders, until a caller gives the argument itself.

    Args:
        template: the path of a Jinja file; None keeps the tokenizer's own.
        arguments: values by name, such as {"enable_thinking": False}.
        part: of the recipe, for messages.
    """
    if template is not None:
        try:
            tokenizer.chat_template = Path(template).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"{part}.chat_template: expected a Jinja file, got {template} ({one_line(error, 99)}). Name one."
            ) from None
    if not arguments:
        return
    text = tokenizer.chat_template
    if not isinstance(text, str):
        raise DataError(
            f"{part}.chat_template_kwargs: expected a tokenizer with one chat template for {', '.join(arguments)}, got "
            f"{'none' if text is None else 'several'}. Name a file in {part}.chat_template."
        )
    if unknown := [name for name in arguments if not names_argument(tokenizer, name)]:
        raise DataError(
            f"{part}.chat_template_kwargs: expected arguments that the chat template reads, got {', '.join(unknown)}. "
            f"Correct the name, or name another template in {part}.chat_template."
        )
    for name, value in arguments.items():
        text = f"{{%- if {name} is not defined %}}{{%- set {name} = {value!r} %}}{{%- endif %}}{text}"
    tokenizer.chat_template = text


def end_token_ids(tokenizer: PreTrainedTokenizerBase | None, model: Any = None) -> frozenset[int]:
    """Find the tokens that end a generated text: EOS, those of the generation config, and the ends of chat turns."""
    config = getattr(model, "generation_config", None)
    ids = None if config is None else config.eos_token_id
    ends = {*(ids if isinstance(ids, list) else [ids])}
    if tokenizer is not None:
        ends |= {tokenizer.eos_token_id, turn_end_id(tokenizer), call_end_id(tokenizer)}
    return frozenset(ends - {None})


def set_end_tokens(model: Any, ends: frozenset[int], eos_token_id: int | None) -> None:
    """Let a model's own generation end at these tokens; they are saved with it, EOS first."""
    if ends and getattr(model, "generation_config", None) is not None:
        ids = sorted(ends, key=lambda i: (i != eos_token_id, i))
        model.generation_config.eos_token_id = ids if len(ids) > 1 else ids[0]
        make_savable(model.generation_config)


def turn_end_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Find the special token that the chat template ends an assistant's turn with, such as `<|im_end|>`.

    It is the last of those that follow the message at once, whether the conversation ends there or goes on: behind
    Cohere's `<|END_RESPONSE|>` the turn is not over, and EOS behind the last turn alone is not its end.
    """
    talk: list[Message] = [{"role": role, "content": _CONTENT} for role in ("user", "assistant")]
    last, other = (_ids_behind(tokenizer, messages, _CONTENT) for messages in (talk, [*talk, _NEXT]))
    last, other = ([*takewhile(_special(tokenizer).__contains__, ids)] if ids else [] for ids in (last, other))
    shared = [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(last, other, strict=False))]
    return next(iter((shared or last)[::-1]), None)


def call_end_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Find the special token that ends a turn with a tool call, such as `<|call|>`, where the template ends turns.

    It is the last token, unless it stands behind each of two calls.
    """
    function = {"name": _CALL, "arguments": {_CONTENT: _CONTENT}}
    calls = [{"type": "function", "id": f"call0000{i}", "function": function} for i in range(2)]
    call: Message = {"role": "assistant", "content": "", "tool_calls": calls}
    messages: list[Message] = [{"role": "user", "content": _CONTENT}, call]
    ids = _ids_behind(tokenizer, messages, _CALL)
    ended = ids and ids[-1] in _special(tokenizer) and ids.count(ids[-1]) == 1 and turn_end_id(tokenizer) is not None
    return ids[-1] if ended else None


def _special(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    return {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}


def _ids_behind(tokenizer: PreTrainedTokenizerBase, messages: list[Message], mark: str) -> list[int]:
    """The tokens that the template writes behind a mark in messages; none where it does not write the mark."""
    if getattr(tokenizer, "chat_template", None) is None:
        return []
    try:
        text = render_chat(tokenizer, messages, "a conversation of two turns")
    except TemplateLimitError:
        raise
    except DataError:
        return []
    _, found, closing = text.partition(mark) if mark == _CALL else text.rpartition(mark)
    ids: list[int] = tokenizer(closing.strip(), add_special_tokens=False)["input_ids"] if found else []
    return ids
