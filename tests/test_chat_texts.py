"""Conversations as texts to learn: what the assistant writes is a target, as the model would write it."""

from __future__ import annotations

from typing import Any

import pytest

from conftest import make_tokenizer
from potstill.data.chat_texts import ChatRenderer, ChatText, Conversation
from potstill.errors import DataError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Thoughts of earlier turns are dropped, and the last turn gets an empty thought, as Qwen 3 does.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if loop.last and m.role == 'assistant' %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}<|im_start|>assistant\n"
    "{{ m.content }}<|im_end|>{% endgeneration %}{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>"
    "{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}<|endoftext|>{% endif %}"
)
TOOLS = (
    "{% if tools %}<|im_start|>tools\n{% for t in tools %}{{ t.function.name }} {% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PARTS = CHATML.replace(
    "{{ m.content }}", "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"
)


def renderer(template: str, **special: str) -> ChatRenderer:
    tokenizer = make_tokenizer(**special or {"eos_token": "<|endoftext|>"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]})
    tokenizer.chat_template = template
    return ChatRenderer(tokenizer)


def user(content: Any, **keys: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **keys}


def assistant(content: Any, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **keys}


def call(name: str, arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def render(template: str, messages: list[Any], prompt_messages: int = 0, **options: Any) -> list[ChatText]:
    return renderer(template).render(Conversation(messages, "row 1 of data.jsonl", prompt_messages, options))


def targets(texts: list[ChatText]) -> list[list[str]]:
    return [[part.text[start:end] for start, end in part.targets] for part in texts]


TALK = [user("a"), assistant("b"), user("c"), assistant("d")]
THOUGHTS = [user("a"), assistant("b", reasoning_content="p"), user("c"), assistant("d", reasoning_content="q")]


def test_targets_end_with_the_token_that_ends_the_turn() -> None:
    (text,) = texts = render(CHATML, TALK)
    assert text.closed and text.layout == "whole"
    assert targets(texts) == [["b<|im_end|>", "d<|im_end|>"]]


def test_a_turn_that_names_its_end_token_ends_behind_it() -> None:
    assert targets(render(CHATML, [user("a"), assistant("b<|im_end|>c")])) == [["b<|im_end|>c<|im_end|>"]]


def test_a_template_that_rewrites_history_gives_a_text_for_each_turn() -> None:
    first, second = texts = render(FORGETFUL, THOUGHTS)
    assert targets(texts) == [["<think>\np\n</think>\n\nb<|im_end|>"], ["<think>\nq\n</think>\n\nd<|im_end|>"]]
    assert first.layout == second.layout == "turn" and first.followed and not second.followed
    assert second.text.startswith("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n")


def test_what_the_generation_prompt_opens_is_no_target() -> None:
    empty = [user("a"), assistant("b", reasoning_content="")]
    assert targets(render(FORGETFUL, empty, enable_thinking=False)) == [["b<|im_end|>"]]
    (text,) = texts = render(FORGETFUL, [user("a"), assistant("b", reasoning_content="p")], enable_thinking=False)
    assert targets(texts) == [["p\n</think>\n\nb<|im_end|>"]]
    assert text.opened is not None and "'\\n</think>\\n\\n'" in text.opened


def test_the_marks_of_a_template_are_its_targets() -> None:
    (text,) = texts = render(MARKED, TALK)
    assert text.layout == "marked" and targets(texts) == [["b<|im_end|>", "d<|im_end|>"]]
    answers = MARKED.replace(
        "{% generation %}<|im_start|>assistant\n{{ m.content }}",
        "<|im_start|>assistant\n{{ m.content[:1] }}{% generation %}{{ m.content[1:] }}",
    )
    assert targets(render(answers, [user("a"), assistant("bcd")])) == [["cd<|im_end|>"]]


def test_marks_that_drop_thoughts_of_earlier_turns_are_not_used() -> None:
    marked = FORGETFUL.replace("{% if loop.last", "{% generation %}{% if loop.last").replace(
        "{{ m.content }}<|im_end|>", "{{ m.content }}<|im_end|>{% endgeneration %}"
    )
    assert targets(render(marked, THOUGHTS)) == targets(render(FORGETFUL, THOUGHTS))


def test_a_template_that_ends_no_turn_is_not_closed() -> None:
    template = CHATML.replace("<|im_end|>\n", "")
    texts = render(template, TALK)
    assert [part.closed for part in texts] == [False, False] and targets(texts) == [["b"], ["d"]]


@pytest.mark.parametrize("template", [CHATML, PARTS])
def test_content_parts_are_read_as_text(template: str) -> None:
    parts = [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]
    for messages in ([user("a"), assistant(parts)], [user([{"type": "text", "text": "a"}]), assistant("bc")]):
        (text,) = texts = render(template, messages)
        assert text.text == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nbc<|im_end|>\n"
        assert targets(texts) == [["bc<|im_end|>"]]


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_parts_that_are_no_text_are_refused(role: str) -> None:
    image = {"role": role, "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
    with pytest.raises(DataError, match=r"expected content parts of type text, got image_url in message . of row 1"):
        render(CHATML, [user("a"), image, assistant("b")])


@pytest.mark.parametrize("arguments", [{"place": "Rome"}, '{"place": "Rome"}'])
def test_tool_calls_are_targets(arguments: Any) -> None:
    tools = [{"type": "function", "function": {"name": "sun", "parameters": {}}}]
    messages = [
        user("Sunny?"),
        assistant("", tool_calls=[call("sun", arguments)]),
        {"role": "tool", "content": "yes"},
        assistant("It is."),
    ]
    (text,) = texts = render(TOOLS, messages, tools=tools)
    assert text.text.startswith("<|im_start|>tools\nsun <|im_end|>\n")
    assert targets(texts) == [['<call>sun {"place": "Rome"}</call><|im_end|>', "It is.<|im_end|>"]]


LEFT_OUT = {
    "tool calls": (
        CHATML,
        [user("a"), assistant("", tool_calls=[call("sun", {})])],
        {},
        "renders the tool_calls of every",
    ),
    "a second call": (
        TOOLS.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]"),
        [user("a"), assistant("", tool_calls=[call("sun", {}), call("rain", {})])],
        {},
        "leaves out that of message 2 .assistant. in row 1 of data.jsonl: 'rain'",
    ),
    "arguments": (
        TOOLS.replace("{{ c.function.arguments | tojson }}", ""),
        [user("a"), assistant("", tool_calls=[call("sun", {"place": "Rome"})])],
        {},
        "renders the tool_calls of every .* 'Rome'",
    ),
    "thoughts": (CHATML, THOUGHTS, {}, "renders the reasoning_content of every .* message 2"),
    "thoughts in the content": (
        CHATML.replace("m.content", "m.content.split('</think>')[-1]"),
        [user("a"), assistant("<think>p</think>b")],
        {},
        "renders the content of every .* 'p'",
    ),
    "system": (
        CHATML.replace("for m in messages", "for m in messages if m.role != 'system'"),
        [{"role": "system", "content": "Be brief."}, *TALK],
        {},
        "renders the content of every .* message 1 .system.",
    ),
    "tools": (CHATML, TALK, {"tools": [{"name": "sun"}]}, "reads tools, got one that does not, in row 1"),
    "documents": (CHATML, TALK, {"documents": [{"text": "x"}]}, "reads documents, got one that does not"),
    "an argument that training sets": (CHATML, TALK, {"add_generation_prompt": True}, "reads add_generation_prompt"),
    "an argument": (CHATML, TALK, {"enable_thinking": False}, "reads enable_thinking, got one that does not"),
    "tools that it names": (
        CHATML + "{% if false and tools %}{% endif %}",
        TALK,
        {"tools": [{"name": "s"}]},
        "reads tools",
    ),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_a_template_leaves_out_is_refused(name: str) -> None:
    template, messages, options, message = LEFT_OUT[name]
    with pytest.raises(DataError, match=message):
        render(template, messages, **options)


def test_thoughts_are_given_by_the_name_that_the_template_reads() -> None:
    for name in ("thinking", "reasoning"):
        renamed = [user("a"), assistant("b", **{name: "p"})]
        assert targets(render(FORGETFUL, renamed)) == [["<think>\np\n</think>\n\nb<|im_end|>"]]


def test_messages_without_a_loss() -> None:
    assert targets(render(CHATML, TALK, prompt_messages=2)) == [["d<|im_end|>"]]
    for keys in ({"weight": 0}, {"train": False}, {"loss": False, "weight": None}):
        shown = CHATML.replace("{{ m.role }}", "{{ m.role }}{{ m.keys() | list | length }}")
        (text,) = texts = render(
            shown.replace("assistant\n{% endif", "assistant2\n{% endif"),
            [user("a"), assistant("b", **keys), user("c"), assistant("d", weight=1)],
        )
        assert targets(texts) == [["d<|im_end|>"]] and "assistant2" in text.text
        assert render(CHATML, [user("a"), assistant("b", **keys)]) == []
    with pytest.raises(DataError, match=r"weight of 0 or 1, .* got 0.5 in row 1"):
        render(CHATML, [user("a"), assistant("b", weight=0.5)])
