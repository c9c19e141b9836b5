"""Choose the kind of a source's rows and the columns that are read, by the keys of the source or by usual names."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from potstill.data.conversations import Dialogue
from potstill.data.right_padding import BOUNDARIES, NUMBERS
from potstill.data.sources import (
    TEACHER_ID_COLUMNS,
    TEACHER_PROMPT_COLUMNS,
    WRITTEN_COLUMNS,
    Source,
    SourceKind,
    listed,
)
from potstill.data.token_weights import SPAN_COLUMNS
from potstill.errors import DataError, nearest
from potstill.losses.alignment import SEQUENCE_TASKS, Task

COLUMNS: dict[SourceKind, tuple[str, ...]] = {  # by which a kind is recognised first
    "text": ("text",),
    "completion": ("prompt", "completion"),
    "messages": ("messages",),
    "input_ids": ("input_ids",),
}
_MAIN_KEYS = {kind: ("field",) if kind == "text" else names for kind, names in COLUMNS.items()}  # of a Source
_KINDS = {keys[0]: kind for kind, keys in _MAIN_KEYS.items()}
_EXTRA_KEYS: dict[str, tuple[SourceKind, ...]] = {
    "system": ("completion", "messages"),
    "history": ("completion",),
    "chat": ("completion",),
}
CONVERSATIONS = ("conversations", "conversation")  # other usual names of messages
PAIRS = [  # usual names of a question and its answer
    *(("instruction", "output"), ("instruction", "response"), ("question", "answer"), ("question", "response")),
    *(("query", "answer"), ("query", "response"), ("problem", "solution"), ("prompt", "response")),
    *(("prompt", "answer"), ("input", "output")),
]
INPUTS = ("input", "context")  # that an instruction or a question is about
SYSTEM = ("system", "system_prompt")
CONTEXT_COLUMNS = ("tools", "documents", "chat_template_kwargs")  # read with messages where the file has them
GENERATED_COLUMNS: dict[SourceKind, tuple[str, ...]] = {  # of generated rows
    "messages": ("num_prompt_messages", *WRITTEN_COLUMNS),
    "completion": WRITTEN_COLUMNS,
}
OPTIONAL_ID_COLUMNS = ("labels", "attention_mask", "weights")  # read with input_ids where the file has them
TRIVIAL_ID_COLUMNS = ("position_ids", "token_type_ids", *NUMBERS)  # read with input_ids; they must say nothing

# Columns that would change what a model reads or learns, but are not read in rows of a kind -> what to do with them.
_JOIN = "Name it in prompt, as in `prompt: [{prompt}, {column}]`"
_MESSAGES = "Give messages, or set chat to true"
_LABELS = "Write it as labels, with -100 where a token has no loss"
_WEIGHTS = "Weights of tokens are read with input_ids, from the column weights"
_TEXT_ALONE = "Models of text alone can be distilled"
_MEDIA = dict.fromkeys(("image", "images", "audio", "audios", "video", "videos"), _TEXT_ALONE)
_TOOLS = dict.fromkeys(("functions", "available_tools", "tool_definitions"), "Call the column tools")
_LOSS_MASK = re.compile(r"(.+_)?masks?")
_WEIGHT = re.compile(r"((loss|token|sample|example|row)_)?weights?")
_TOKEN_MASKS = ("attention_mask", "special_tokens_mask")  # which say nothing of the loss
UNREAD: dict[SourceKind, dict[str, str]] = {
    "text": _MEDIA,
    "completion": {
        **dict.fromkeys((*INPUTS, "passage", "document", "choices", "options"), _JOIN),
        **dict.fromkeys(SYSTEM, "Name it as system"),
        "history": "Name it as history",
        "label": "Remove the rows with a bad completion",  # where it is true or false
        **dict.fromkeys((*CONTEXT_COLUMNS, *_TOOLS), _MESSAGES),
        **_MEDIA,
    },
    "messages": {
        **dict.fromkeys(SYSTEM, "Name it as system"),
        **dict.fromkeys(("context", "passage", "document"), "Put it into a message"),
        **dict.fromkeys(("enable_thinking", "thinking_mode", "reasoning_effort"), "Put it into chat_template_kwargs"),
        **_TOOLS,
        **_MEDIA,
    },
    "input_ids": {
        **dict.fromkeys(("seq_lengths", *BOUNDARIES), "Give each text of a packed row as a row of its own"),
        **dict.fromkeys(("inputs_embeds", "pixel_values", "input_features"), _TEXT_ALONE),
        **dict.fromkeys(TEACHER_ID_COLUMNS, "Give both teacher_input_ids and teacher_labels"),
        **_MEDIA,
    },
    "labelled": _MEDIA,
}
PAIRED = {  # the usual names of a first text, and those of the second
    "sentence1": ("sentence2",),
    "premise": ("hypothesis",),
    "question1": ("question2",),
    "text1": ("text2",),
    "text_a": ("text_b",),
    "query": ("passage", "document", "text"),
    "question": ("sentence", "passage", "context"),
    "anchor": ("positive",),
}


@dataclass(frozen=True)
class ColumnChoice:
    """What is read of a file.

    Args:
        kind: of the rows.
        names: standard column -> the file's own.
        dialogue: further standard columns, each of several of the file's own.
        empty: columns that must hold nothing, because rows of this kind do not read them -> what to do with them.
        unused: all other columns.
    """

    kind: SourceKind
    names: dict[str, str]
    dialogue: Dialogue | None
    empty: dict[str, str]
    unused: tuple[str, ...]

    @property
    def columns(self) -> list[str]:
        """The file's columns that are read."""
        composed = self.dialogue.columns if self.dialogue else []
        return list(dict.fromkeys([*self.names.values(), *composed, *self.empty]))


def choose_columns(
    source: Source, columns: list[str], first: Callable[[str], Any], task: Task, has_template: bool
) -> ColumnChoice:
    """Choose what is read of a file with these columns.

    Args:
        first: gives the value of a column in the first row.
        has_template: whether conversations can be rendered; questions and answers are plain text if not.
    """
    file = source.title
    _require_columns(source.ignore, columns, file)
    columns = [name for name in columns if name not in source.ignore]
    dialogue = None
    if task in SEQUENCE_TASKS:
        kind, names = _labelled(source, columns)
        prompt = None
    else:
        keys = (_named_keys(source) or _recognised(columns, file)) | _extra_keys(source)
        kind, prompt = next(_KINDS[key] for key in keys if key in _KINDS), keys.get("prompt")
        _check_keys(source, kind)
        _require_columns(_tuple(prompt), columns, file)
        dialogue = _dialogue(source, keys, first, has_template)
        if dialogue is None:
            names = {"text" if key == "field" else key: keys[key] for key in _MAIN_KEYS[kind]}
        else:
            kind, names = ("messages" if dialogue.chat else "completion"), {}
        names |= _further_columns(source, kind, columns, dialogue)
    _require_columns([*names.values(), *(dialogue.columns if dialogue else [])], columns, file)
    choice = ColumnChoice(kind, names, dialogue, {}, ())
    rest = [name for name in columns if name not in choice.columns]
    unread = UNREAD["completion" if prompt else kind]
    fixes = {name: fix for name in rest if (fix := unread.get(name) or _loss_fix(name, kind))}
    empty = {name: fix.format(column=name, prompt=", ".join(_tuple(prompt))) for name, fix in fixes.items()}
    return replace(choice, empty=empty, unused=tuple(name for name in rest if name not in empty or name == "label"))


def chooses_loss(column: str) -> bool:
    """Whether a column of this name says which tokens have a loss, or how much it weighs.

    >>> [name for name in ("completion_mask", "attention_mask", "loss_weights", "birth_weight") if chooses_loss(name)]
    ['completion_mask', 'loss_weights']
    """
    is_mask = _LOSS_MASK.fullmatch(column) and column not in _TOKEN_MASKS
    return bool(is_mask or _WEIGHT.fullmatch(column))


def _loss_fix(column: str, kind: SourceKind) -> str | None:
    """What to do with a column that says what has a loss and is not read; None if it says no such thing."""
    if not chooses_loss(column) or kind == "labelled":
        return None
    if not _WEIGHT.fullmatch(column):
        return _LABELS if kind == "input_ids" else "Which tokens have a loss is read with input_ids, as labels of -100"
    return _WEIGHTS if kind == "text" else f"{_WEIGHTS}, those of rows by name, as in `weight: {{column}}`"


def recognise(columns: Sequence[str]) -> list[dict[str, Any]]:
    """Find the ways to read columns of usual names, as keys of a Source. Standard names go before all others."""
    ways = [
        dict(zip(_MAIN_KEYS[kind], names, strict=True)) for kind, names in COLUMNS.items() if {*names} <= {*columns}
    ]
    if not ways:
        pairs = [pair for pair in PAIRS if {*pair} <= {*columns}]
        if len(pairs) > 1 and "instruction" in columns:
            pairs = [pair for pair in pairs if pair != ("input", "output")]
        ways = [{"messages": name} for name in CONVERSATIONS if name in columns]
        ways += [_question_and_answer(*pair, columns) for pair in pairs]
    system = [name for name in SYSTEM if name in columns]
    return [{**way, "system": system[0]} if system and "messages" in way else way for way in ways]


def _question_and_answer(prompt: str, completion: str, columns: Sequence[str]) -> dict[str, Any]:
    inputs = [name for name in INPUTS if prompt != "input" and name in columns]
    usual = {"system": SYSTEM, "history": ("history",)}
    extras = {key: name for key, names in usual.items() for name in reversed(names) if name in columns}
    return {"prompt": (prompt, *inputs), "completion": completion, "chat": None, **extras}


def _recognised(columns: list[str], file: str) -> dict[str, Any]:
    ways = recognise(columns)
    if len(ways) == 1:
        return ways[0]
    if not ways:
        raise DataError(
            f"data: expected a column text, messages or input_ids, or both prompt and completion, in {file}, got "
            f"{listed(columns)}. Name the one to read, as in `field: {columns[0] if columns else 'text'}`."
        )
    names = dict.fromkeys(name for way in ways for value in way.values() for name in _tuple(value))
    raise DataError(
        f"data: expected columns of one kind in {file}, got {listed(list(names))}. "
        "Name those to read: field, prompt with completion, messages or input_ids."
    )


def _named_keys(source: Source) -> dict[str, Any]:
    """The keys that name the columns of one kind of rows, all of them; none if the source names no columns."""
    named = {kind: {key: getattr(source, key) for key in keys} for kind, keys in _MAIN_KEYS.items()}
    kinds = [kind for kind, values in named.items() if any(value is not None for value in values.values())]
    if not kinds:
        return {}
    if len(kinds) > 1:
        raise DataError(
            f"data: expected columns of one kind for {source.title}, got "
            f"{' and '.join(kind.replace('text', 'field') for kind in kinds)}. Name one of field, prompt with "
            "completion, messages or input_ids."
        )
    absent = [key for key, value in named[kinds[0]].items() if value is None]
    if absent:
        raise DataError(
            f"data: expected both prompt and completion for {source.title}, got no {absent[0]}. Name its column too."
        )
    return named[kinds[0]]


def _extra_keys(source: Source) -> dict[str, Any]:
    return {key: value for key in _EXTRA_KEYS if (value := getattr(source, key)) is not None}


def _check_keys(source: Source, kind: SourceKind) -> None:
    """Check that the keys beside the main ones have a meaning for rows of this kind."""
    for key in _extra_keys(source):
        if kind not in _EXTRA_KEYS[key]:
            kinds = " or ".join(f"rows of {kind}" for kind in _EXTRA_KEYS[key])
            raise DataError(f"data: expected {kinds} beside {key}, got {kind} in {source.title}. Leave out {key}.")


def _dialogue(source: Source, keys: dict[str, Any], first: Callable[[str], Any], has_template: bool) -> Dialogue | None:
    """What puts rows together, where they are not simply read: conversations, and prompts of several columns."""
    system, prompt = keys.get("system"), keys.get("prompt")
    if "messages" in keys and system is not None:
        return Dialogue(messages=keys["messages"], system=system)
    if prompt is None:
        return None
    chat = keys.get("chat", False)
    chat = (has_template if chat is None else chat) or isinstance(first(_tuple(prompt)[0]), list)
    extras = {"system": system, "history": keys.get("history")}
    if isinstance(prompt, str) and not chat and not any(extras.values()):
        return None
    teacher_prompt = source.teacher_prompt
    return Dialogue(_tuple(prompt), keys["completion"], teacher_prompt=teacher_prompt, chat=chat, **extras)


def _further_columns(source: Source, kind: SourceKind, columns: list[str], dialogue: Dialogue | None) -> dict[str, str]:
    """The columns that are read beside those that make a row, standard name -> the file's own."""
    optional = {"input_ids": OPTIONAL_ID_COLUMNS + TRIVIAL_ID_COLUMNS, "messages": CONTEXT_COLUMNS}.get(kind, ())
    names = {name: name for name in (*optional, *GENERATED_COLUMNS.get(kind, ())) if name in columns}
    if kind == "input_ids":
        names |= {name: name for name in TEACHER_ID_COLUMNS if set(TEACHER_ID_COLUMNS) <= set(columns)}
    if source.teacher_prompt is not None and not (dialogue and dialogue.teacher_prompt):
        if kind not in TEACHER_PROMPT_COLUMNS:
            raise DataError(
                f"data: expected answers for the teacher's own prompts in {source.title}, got {kind}. Both read one "
                "answer behind prompts of their own. Give prompt and completion, or messages."
            )
        names[TEACHER_PROMPT_COLUMNS[kind]] = source.teacher_prompt
    if source.weight is not None:
        if kind == "text":
            raise DataError(
                f"data: expected rows that are no plain text for a column of weights, got text in {source.title}. "
                "Give prompt and completion, messages or input_ids."
            )
        names["weight"] = source.weight
    if source.span_weights is not None:
        if kind not in ("completion", "messages"):
            raise DataError(
                f"data: expected prompt and completion, or messages, for span_weights, got {kind} in {source.title}. "
                "Spans are places in a completion."
            )
        names |= {name: name for name in SPAN_COLUMNS}
    return names


def _labelled(source: Source, columns: list[str]) -> tuple[SourceKind, dict[str, str]]:
    names = {"text": source.field or "text"}
    if source.label is not False:
        names["label"] = source.label or "label"
    second = next((name for name in PAIRED.get(names["text"], ()) if name in columns), None)
    if source.pair or "text_pair" in columns:
        names["text_pair"] = source.pair or "text_pair"
    elif second is not None:
        raise DataError(
            f"data: expected both texts of a pair in {source.title}, got {names['text']} and not {second}. Name it as "
            f"pair, as in `pair: {second}`, or in ignore."
        )
    return "labelled", names


def _require_columns(names: Sequence[str], columns: list[str], file: str) -> None:
    for name in names:
        if name not in columns:
            raise DataError(
                f"data: expected a column {name!r} in {file}, got {listed(columns)}.{nearest(name, columns)} "
                "Name one of these."
            )


def _tuple(names: str | Sequence[str] | None) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names or ())
