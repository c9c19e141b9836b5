"""Chat templates: rendering conversations, defaults of a template's arguments, and the tokens that end a turn."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from potstill.errors import DataError, one_line

_CONTENT = "potstill"  # of a message: no template trims or changes it


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    where: str,
    expected: str = "data: expected messages that the chat template takes",
    **options: Any,
) -> str:
    """Render messages by the chat template; a DataError that begins with `expected` where it fails."""
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
        raise DataError(
            f"{expected}, got {one_line(error, 200)!r} in {where}. Correct the row, or use another chat template."
        ) from None


def set_chat_template(
    tokenizer: PreTrainedTokenizerBase, template: str | Path | None = None, arguments: Mapping[str, Any] | None = None
) -> None:
    """Give a tokenizer the chat template of a file, and its template defaults for arguments.

    The defaults are written into the template's text. So they are saved with the tokenizer, and hold wherever it
    renders, until a caller gives the argument itself.

    Args:
        template: the path of a Jinja file; None keeps the tokenizer's own.
        arguments: values by name, such as {"enable_thinking": False}.
    """
    if template is not None:
        try:
            tokenizer.chat_template = Path(template).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"data.chat_template: expected a Jinja file, got {template} ({one_line(error, 100)}). Correct the path."
            ) from None
    if not arguments:
        return
    text = tokenizer.chat_template
    if not isinstance(text, str):
        raise DataError(
            f"data.chat_template_kwargs: expected a tokenizer with one chat template for {', '.join(arguments)}, got "
            f"{'none' if text is None else 'several'}. Name a file in data.chat_template."
        )
    for name, value in arguments.items():
        text = f"{{%- if {name} is not defined %}}{{%- set {name} = {value!r} %}}{{%- endif %}}{text}"
    tokenizer.chat_template = text


def end_token_ids(tokenizer: PreTrainedTokenizerBase | None, model: Any = None) -> frozenset[int]:
    """Find the tokens that end a generated text: EOS, those of the generation config, and the end of a chat turn."""
    config = getattr(model, "generation_config", None)
    ids = None if config is None else config.eos_token_id
    ends = {*(ids if isinstance(ids, list) else [ids])}
    if tokenizer is not None:
        ends |= {tokenizer.eos_token_id, turn_end_id(tokenizer)}
    return frozenset(ends - {None})


def turn_end_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Find the special token that the chat template ends an assistant's turn with, such as `<|im_end|>`.

    It is the last of those that follow the message at once: behind Cohere's `<|END_RESPONSE|>` the turn still goes on.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        return None
    for content in (_CONTENT, [{"type": "text", "text": _CONTENT}]):  # the template of some models takes parts alone
        messages = [{"role": role, "content": content} for role in ("user", "assistant")]
        try:
            _, message, closing = render_chat(tokenizer, messages, "a conversation of two turns").rpartition(_CONTENT)
        except DataError:
            continue
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        ids = tokenizer(closing.lstrip(), add_special_tokens=False)["input_ids"] if message else []
        if ends := [*takewhile(special.__contains__, ids)]:
            return int(ends[-1])
    return None
