"""Conversations from the shapes in which data sets have them: messages of Hugging Face templates, ShareGPT, prompts and
completions in columns of their own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]

TURNS = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "chatbot", "model", "ai"), "assistant"),
}
ROLES = {  # of ShareGPT; roles that are none of TURNS are left to the chat template
    **TURNS,
    "system": "system",
    **dict.fromkeys(("tool", "observation", "tool_response", "function_response", "function"), "tool"),
}
CALL_SENDERS = ("function_call", "tool_call")  # senders whose text is the JSON of a call


def read_messages(value: Any) -> list[Message]:
    """Read a conversation as messages with role and content, from such a list, a ShareGPT one, or its JSON text.

    Other keys of messages are kept. Messages of ShareGPT have `from` and `value`; its senders become roles, and the
    JSON of a function_call becomes tool_calls.

    Raises:
        TypeError, ValueError: the value is no conversation.
    """
    messages = json.loads(value) if isinstance(value, str) else value
    if not isinstance(messages, list):
        raise TypeError
    return [_message(message) for message in messages]


def _message(message: Any) -> Message:
    if not isinstance(message, dict):
        raise TypeError
    sender, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    if not isinstance(sender, str) or not isinstance(content, str | list | None):
        raise TypeError
    others = {key: value for key, value in message.items() if key not in ("role", "from", "content", "value")}
    if (calls := others.get("tool_calls")) is not None:
        _check_calls(calls)
    name = sender.lower()
    if name in CALL_SENDERS and isinstance(content, str):
        return {"role": "assistant", "content": "", "tool_calls": _calls(content), **others}
    if isinstance(call := others.get("function_call"), dict):  # of one call, before there were several
        _check_calls([call])
        others = {key: others[key] for key in others if key != "function_call"}
        others["tool_calls"] = [{"type": "function", "function": call}]
    if "role" in message:
        given = {"content": content} if "content" in message or "value" in message else {}
        return {"role": TURNS.get(name, sender), **given, **others}
    if content is None or name not in ROLES:
        raise ValueError
    return {"role": ROLES[name], "content": content, **others}


def _calls(text: Any) -> list[dict[str, Any]]:
    calls = json.loads(text)
    calls = calls if isinstance(calls, list) else [calls]
    _check_calls(calls)
    return [{"type": "function", "function": call.get("function", call)} for call in calls]


def _check_calls(calls: Any) -> None:
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise TypeError
    functions = [call.get("function", call) for call in calls]
    if not all(isinstance(function, dict) and isinstance(function.get("name"), str) for function in functions):
        raise TypeError


def read_objects(value: Any) -> list[dict[str, Any]] | None:
    """Read a list of objects (tools, documents), or its JSON text; None for an empty one."""
    objects = json.loads(value) if isinstance(value, str) and value.strip() else value
    if not objects:
        return None
    if not isinstance(objects, list) or not all(isinstance(item, dict) for item in objects):
        raise TypeError
    return objects


def read_tools(value: Any) -> list[dict[str, Any]] | None:
    """Read tools; a bare function gets the wrapper that chat templates expect."""
    tools = read_objects(value)
    if tools is None:
        return None
    return [
        {"type": "function", "function": tool} if "name" in tool and "function" not in tool else tool for tool in tools
    ]


def read_object(value: Any) -> dict[str, Any] | None:
    """Read an object, or its JSON text; None for an empty one."""
    content = json.loads(value) if isinstance(value, str) and value.strip() else value
    if not content:
        return None
    if not isinstance(content, dict):
        raise TypeError
    return content


class ColumnError(ValueError):
    """A value that does not fit, by its column."""

    def __init__(self, column: str, expected: str, value: Any) -> None:
        super().__init__(column)
        self.column, self.expected, self.value = column, expected, value


@dataclass(frozen=True)
class Dialogue:
    """Columns that are put together as one conversation, or as one prompt and its completion in plain text.

    Args:
        prompt: columns whose texts are joined by blank lines; or one of messages.
        completion: a column of text, or of messages behind those of prompt.
        messages: in place of prompt and completion, a column of whole conversations.
        system: the column of system prompts.
        history: the column of turns before the prompt, as [user, assistant] pairs or messages.
        teacher_prompt: the column of what the teacher reads in place of the prompt.
        chat: make messages and no plain text.
    """

    prompt: tuple[str, ...] = ()
    completion: str | None = None
    messages: str | None = None
    system: str | None = None
    history: str | None = None
    teacher_prompt: str | None = None
    chat: bool = True

    @property
    def columns(self) -> list[str]:
        """The columns that are read."""
        names = (*self.prompt, self.completion, self.messages, self.system, self.history, self.teacher_prompt)
        return [name for name in names if name is not None]

    @property
    def made(self) -> list[str]:
        """The standard columns that come of them."""
        if not self.chat:
            return ["prompt", "completion", *(["teacher_prompt"] if self.teacher_prompt else [])]
        names = ["messages", *(["teacher_messages"] if self.teacher_prompt else [])]
        return names if self.messages else [*names, "num_prompt_messages"]

    def make(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Make the values of a row, without their JSON.

        Raises:
            ColumnError: a value does not fit.
        """
        system = [] if self.system is None else _system(row, self.system)
        if self.messages is not None:
            return {"messages": self._opened(system, _conversation(row, self.messages))}
        assert self.completion is not None
        history = [*self._history(row)]
        if not self.chat:
            before = [self._plain(message) for message in (*system, *history)]
            return {
                "completion": _text(row, self.completion),
                **{name: _separated([*before, *_texts(row, columns)]) for name, columns in self._prompts.items()},
            }
        prompts = {name: self._opened(system, history + _turn(row, names)) for name, names in self._prompts.items()}
        if self.teacher_prompt and any(message["role"] == "assistant" for message in prompts["prompt"]):
            raise ColumnError(
                self.teacher_prompt, "no prompt of the teacher's beside earlier answers", row[self.teacher_prompt]
            )
        messages = {"messages" if name == "prompt" else "teacher_messages": turns for name, turns in prompts.items()}
        messages["messages"] = prompts["prompt"] + _answer(row, self.completion)
        return {**messages, "num_prompt_messages": len(prompts["prompt"])}

    @property
    def _prompts(self) -> dict[str, tuple[str, ...]]:
        return {"prompt": self.prompt, **({"teacher_prompt": (self.teacher_prompt,)} if self.teacher_prompt else {})}

    def _opened(self, system: list[Message], messages: list[Message]) -> list[Message]:
        """Put the system prompt of a column before messages that have none, or the same."""
        if not system or not messages or messages[0]["role"] != "system":
            return system + messages
        if messages[0] != system[0]:
            raise ColumnError(str(self.system), "no system prompt beside that of the messages", system[0]["content"])
        return messages

    def _plain(self, message: Message) -> str:
        if not isinstance(message.get("content"), str):
            raise ColumnError(str(self.history), "turns of text", message.get("content"))
        return str(message["content"])

    def _history(self, row: Mapping[str, Any]) -> Iterator[Message]:
        if self.history is None or not row[self.history]:
            return
        value = row[self.history]
        try:
            turns = json.loads(value) if isinstance(value, str) else value
            if all(isinstance(turn, dict) for turn in turns):
                yield from read_messages(turns)
                return
            for user, assistant in turns:
                if not isinstance(user, str) or not isinstance(assistant, str):
                    raise TypeError
                yield from ({"role": "user", "content": user}, {"role": "assistant", "content": assistant})
        except (TypeError, ValueError):
            raise ColumnError(self.history, "a list of [user, assistant] pairs", value) from None


MESSAGES = "a list of messages with role and content (or from and value)"


def _conversation(row: Mapping[str, Any], column: str) -> list[Message]:
    try:
        return read_messages(row[column])
    except (TypeError, ValueError, AttributeError):
        raise ColumnError(column, MESSAGES, row[column]) from None


def _answer(row: Mapping[str, Any], column: str) -> list[Message]:
    if isinstance(row[column], list):
        return _conversation(row, column)
    return [{"role": "assistant", "content": _text(row, column)}]


def _system(row: Mapping[str, Any], column: str) -> list[Message]:
    text = _text(row, column) if row[column] is not None else ""
    return [{"role": "system", "content": text}] if text.strip() else []


def _turn(row: Mapping[str, Any], columns: tuple[str, ...]) -> list[Message]:
    """The messages of a prompt; texts are one message of the user."""
    if len(columns) == 1 and not isinstance(row[columns[0]], str):
        return _conversation(row, columns[0])
    return [{"role": "user", "content": "\n\n".join(_texts(row, columns))}]


def _separated(pieces: list[str]) -> str:
    """Follow each piece by a blank line: the completion comes behind the last."""
    return "".join(f"{piece}\n\n" for piece in pieces)


def _texts(row: Mapping[str, Any], columns: tuple[str, ...]) -> list[str]:
    """The texts of columns; of several, those that are not empty, and the first is required."""
    first, *others = columns
    texts = [_text(row, first), *(_text(row, name) for name in others if row[name] is not None)]
    return [text for text in texts if text.strip()] if others else texts


def _text(row: Mapping[str, Any], column: str) -> str:
    if not isinstance(row[column], str):
        raise ColumnError(column, "text", row[column])
    return str(row[column])
