"""What a teacher wrote, and the message that is encoded as it: templates of all habits, and those that trl carries."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, pre_tokenizers

from conftest import make_tokenizer
from potstill.data.batches import encode
from potstill.data.sources import Source
from potstill.engines.sampling import Completion
from potstill.errors import DataError
from potstill.generation.journal import render
from potstill.generation.judge import GeneratedText, rows_of
from potstill.generation.requests import GenerationRequest
from potstill.generation.turns import TurnReader, WrittenTurn
from potstill.losses.alignment import IGNORE
from potstill.models.chat import end_token_ids, render_chat, turn_end_id
from potstill.models.prompts import completion_text

USER = {"role": "user", "content": "Two and two?"}
# As most tokenizers of today do: a line break does not merge with the text behind it.
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def tokenizer_of(template: str | None, *added: str) -> Any:
    tokenizer = make_tokenizer()
    split = pre_tokenizers.Split(Regex(WORDS), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": [*added]})
    tokenizer.chat_template = template
    return tokenizer


def request_of(*messages: Any, **chat: Any) -> GenerationRequest:
    return GenerationRequest(1, "responses", "none", [*messages] or [USER], {}, chat=chat)


def written_turn(tokenizer: Any, text: str, end: str | None = "<|im_end|>", request: Any = None) -> WrittenTurn:
    """The message of a text and its end, which a teacher wrote."""
    request = request or request_of()
    ids = tokenizer(text + (end or ""), add_special_tokens=False)["input_ids"]
    prompt, ends = render(request, tokenizer), end_token_ids(tokenizer)
    completion = Completion(completion_text(tokenizer, prompt, ids, ends), end is not None, tuple(ids))
    turn = TurnReader(tokenizer, "messages").read(request, prompt, completion)
    if turn.token_ids is not None:
        assert turn.token_ids == (prompt, ids)
    return turn


OPEN = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
CLOSE = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
PLAIN = OPEN + "{{ m.content }}" + CLOSE
STRIPS = OPEN + "{{ m.content | trim }}" + CLOSE
OPENS = OPEN + "{{ m.content }}" + CLOSE.replace("assistant\n", "assistant\n<think>\n")
DROPS = OPEN + "{{ m.content.split('</think>')[-1] }}" + CLOSE.replace("assistant\n", "assistant\n<think>\n")
NAMES = OPEN + "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}" + CLOSE
NAMES = NAMES.replace(
    "{{ m.content }}", "{% if '<think>' in m.content %}{{ raise_exception('no') }}{% endif %}{{ m.content }}"
)
CHANNELS = "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'user' %}: {% else %}"
CHANNELS += (
    "{% if m.thinking %}<|channel|>thoughts: {{ m.thinking }}<|end|><|start|>assistant{% endif %}<|channel|>text: "
)
CHANNELS += (
    "{% endif %}{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|channel|>")


@pytest.mark.parametrize(
    ("template", "text", "message"),
    [
        (PLAIN, " Four.\n", {"content": " Four.\n"}),
        (PLAIN, "<think>\nAdd.\n</think>\n\nFour.", {"content": "<think>\nAdd.\n</think>\n\nFour."}),
        (
            PLAIN,
            '<tool_call>\n{"name": "add"}\n</tool_call>',
            {"content": '<tool_call>\n{"name": "add"}\n</tool_call>'},
        ),
        (STRIPS, "Four.", {"content": "Four."}),
        (OPENS, "Add.\n</think>\n\nFour.", {"content": "<think>\nAdd.\n</think>\n\nFour."}),
        (NAMES, "<think>Add.</think>Four.", {"content": "Four.", "reasoning_content": "Add."}),
        (CHANNELS, "<|channel|>text: Four.", {"content": "Four."}),
        (
            CHANNELS,
            "<|channel|>thoughts: Add.<|end|><|start|>assistant<|channel|>text: Four.",
            {"content": "Four.", "reasoning_content": "Add."},
        ),
    ],
)
def test_a_message_renders_as_what_was_written(template: str, text: str, message: dict[str, str]) -> None:
    assert written_turn(tokenizer_of(template, *SPECIAL), text) == ({"role": "assistant", **message}, None)


@pytest.mark.parametrize(
    ("template", "text", "end", "content"),
    [
        (STRIPS, "Four.\n", "<|im_end|>", "Four.\n"),  # the template takes the line's end away
        (DROPS, "Add.\n</think>\n\nFour.", "<|im_end|>", "<think>\nAdd.\n</think>\n\nFour."),  # and here the thoughts
        (PLAIN, "Four.", "<end>", "Four."),  # another end than the template's
        (PLAIN, "Four", None, "Four"),  # no end
        (PLAIN.replace("<|im_end|>", ""), "Four.", "<end>", "Four."),  # a template without one
    ],
)
def test_where_no_message_does_the_tokens_are_kept(template: str, text: str, end: str | None, content: str) -> None:
    turn = written_turn(tokenizer_of(template, *SPECIAL), text, end)
    assert turn.message == {"role": "assistant", "content": content}
    assert turn.token_ids is not None


def test_another_tokenization_keeps_its_tokens() -> None:
    tokenizer, request = tokenizer_of(PLAIN, *SPECIAL), request_of()
    prompt = render(request, tokenizer)
    letters = [i for letter in "return" for i in tokenizer(letter, add_special_tokens=False)["input_ids"]]
    ids = [*letters, turn_end_id(tokenizer)]
    turn = TurnReader(tokenizer, "messages").read(request, prompt, Completion("return", True, tuple(ids)))
    assert turn == ({"role": "assistant", "content": "return"}, (prompt, ids))


def test_a_server_without_token_ids_has_those_of_its_text() -> None:
    tokenizer, request = tokenizer_of(STRIPS, *SPECIAL), request_of()
    prompt = render(request, tokenizer)
    reader = TurnReader(tokenizer, "messages")
    assert reader.read(request, prompt, Completion("Four.", True)).token_ids is None
    turn = reader.read(request, prompt, Completion("Four. ", True))
    assert turn.token_ids is not None
    assert tokenizer.decode(turn.token_ids[1]) == "Four. <|im_end|>"


def test_plain_texts() -> None:
    tokenizer, request = tokenizer_of(None), request_of()
    prompt, reader = tokenizer("Two and two?")["input_ids"], TurnReader(tokenizer, "completion")
    assert render(request, tokenizer) == "Two and two?"
    ids = tokenizer(" Four.")["input_ids"]
    assert reader.read(request, prompt, Completion(" Four.", True, (*ids, 0))).token_ids is None
    cut = Completion(" Four.", False, tuple(ids))
    assert reader.read(request, "Two and two?", cut).token_ids == (prompt, ids)
    without_tokenizer = TurnReader(None, "completion").read(request, USER["content"], Completion(" Four.", True))
    assert without_tokenizer == ({"role": "assistant", "content": " Four."}, None)


def test_the_parser_of_a_tokenizer_is_used() -> None:
    template = PLAIN.replace(
        "{{ m.content }}", "{% if m.calls %}<call>{{ m.calls[0].name }}</call>{% endif %}{{ m.content | trim }}"
    )
    tokenizer = tokenizer_of(template, *SPECIAL)
    tokenizer.response_template = {}
    parsed = {"role": "assistant", "content": "", "calls": [{"name": "add"}]}
    tokenizer.parse_response = lambda text, schema, prefix, tools: parsed
    assert written_turn(tokenizer, "<call>add</call>\n") == (parsed, written_turn(tokenizer, "<call>add</call>\n")[1])


def encoded(tokenizer: Any, path: Path, row: dict[str, Any], **source: Any) -> tuple[list[int], list[int], str]:
    """The ids and labels of a row, and the notes on it."""
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    examples = encode(Source(path, **source), tokenizer, max_length=500)
    (example,) = examples.dataset
    return example["input_ids"], example["labels"], " ".join(examples.notes)


def generated_row(tokenizer: Any, text: str, **options: Any) -> dict[str, Any]:
    turn = written_turn(tokenizer, text, **options)
    row = rows_of(GeneratedText(request_of(), 0, 0, turn, True), "messages", "chain", {})[0]
    return dict(json.loads(json.dumps(row)))


def test_rows_with_tokens_are_learnt_as_these(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(DROPS, *SPECIAL)
    row = generated_row(tokenizer, "Add.\n</think>\n\nFour.")
    ids, labels, notes = encoded(tokenizer, tmp_path / "rows.jsonl", row)
    assert tokenizer.decode([label for label in labels if label != IGNORE]) == "Add.\n</think>\n\nFour.<|im_end|>"
    assert (ids, labels.count(IGNORE)) == (row["prompt_ids"] + row["completion_ids"], len(row["prompt_ids"]))
    assert "1 row learnt as the token ids that their teacher wrote" in notes
    cut = generated_row(tokenizer_of(PLAIN, *SPECIAL), "Fo", end=None)
    _, labels, _ = encoded(tokenizer_of(PLAIN, *SPECIAL), tmp_path / "cut.jsonl", cut)
    assert tokenizer.decode([label for label in labels if label != IGNORE]) == "Fo"  # no end that was not written


@pytest.mark.parametrize("change", ["text", "prompt", "template"])
def test_tokens_of_another_text_prompt_or_template_are_not_used(change: str, tmp_path: Path) -> None:
    row = generated_row(tokenizer_of(STRIPS, *SPECIAL), "Four.\n")
    if change != "template":
        row["messages"][-1 if change == "text" else 0] |= {"content": "Five."}
    template = f"A chat. {PLAIN}" if change == "template" else STRIPS
    tokenizer = tokenizer_of(template, *SPECIAL)
    ids, labels, notes = encoded(tokenizer, tmp_path / "rows.jsonl", row)
    assert ids != row["prompt_ids"] + row["completion_ids"]
    answer = {"text": "Five.", "prompt": "Four.", "template": "Four.\n"}[change]
    assert tokenizer.decode([label for label in labels if label != IGNORE]) == f"{answer}<|im_end|>"
    assert "1 row tokenized anew" in notes


def test_plain_rows_with_tokens(tmp_path: Path) -> None:
    tokenizer, request = tokenizer_of(None), request_of()
    prompt = tokenizer("Two and two?")["input_ids"]
    letters = [i for letter in " Four" for i in tokenizer(letter)["input_ids"]]
    turn = TurnReader(tokenizer, "completion").read(request, prompt, Completion(" Four", True, (*letters, 0)))
    (row,) = rows_of(GeneratedText(request, 0, 0, turn, True), "completion", "chain", {})
    ids, labels, _ = encoded(tokenizer, tmp_path / "rows.jsonl", row)
    assert (ids, labels) == ([*prompt, *letters, 0], [IGNORE] * len(prompt) + [*letters, 0])
    spans = {"reasoning_span": [0, 2], "answer_span": [2, 5]}
    weighted = {"span_weights": {"reasoning": 1.0, "answer": 2.0}}  # spans need the tokens of the text
    ids, _, _ = encoded(tokenizer, tmp_path / "spans.jsonl", row | spans, **weighted)
    assert ids == [*tokenizer("Two and two? Four")["input_ids"], 0]


# All templates that trl carries

TRL = importlib.util.find_spec("trl")  # not imported
FOLDER = Path(TRL.submodule_search_locations[0]) / "chat_templates" if TRL else Path()  # type: ignore[index]
NAMES_OF_TEMPLATES = sorted(path.stem for path in FOLDER.glob("*.jinja")) if TRL else []
SPECIAL_TOKENS = re.compile(
    r"<\|[^|<>{}']+\|>|<｜[^｜]+｜>|\[/?[A-Z_]+\]|<(?:end_of_turn|start_of_turn|/s)>|<\|[a-z_]+>|<[a-z_]+\|>"
)
TOOL = {"name": "sun", "description": "Is it sunny?"}
TOOL["parameters"] = {
    "type": "object",
    "properties": {"day": {"type": "string", "description": "d"}},
    "required": ["day"],
}
CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "sun", "arguments": {"day": "Monday"}}}
FOUR = {"role": "assistant", "content": "Four."}
SCRIPTS: dict[str, tuple[GenerationRequest, dict[str, Any]]] = {
    "plain": (request_of(), FOUR),
    "spaces": (request_of(), {**FOUR, "content": " Four.\n"}),
    "thoughts": (request_of(), {**FOUR, "reasoning_content": "I add."}),
    "system": (request_of({"role": "system", "content": "Be brief."}, USER), FOUR),
    "turns": (request_of(USER, FOUR, USER), {**FOUR, "content": "Four again."}),
    "tools": (
        request_of(tools=[{"type": "function", "function": TOOL}]),
        {**FOUR, "content": "", "tool_calls": [CALL]},
    ),
}


def script(tokenizer: Any, request: GenerationRequest, message: dict[str, Any]) -> tuple[list[int], list[int]]:
    """The tokens of a prompt, and those that a model of this template writes for a message."""
    prompt = render_chat(tokenizer, request.messages, "", add_generation_prompt=True, **request.template_arguments)
    whole = render_chat(tokenizer, [*request.messages, message], "", **request.template_arguments)
    thoughts = "I add.\n</think>\n\n" if prompt.endswith("<think>\n") else ""
    text = whole[len(prompt) :] if whole.startswith(prompt) else thoughts + message["content"]
    ids, ends = tokenizer(text, add_special_tokens=False)["input_ids"], end_token_ids(tokenizer)
    length = next((i for i, token in enumerate(ids, 1) if token in ends), None)
    end = turn_end_id(tokenizer)
    written = ids[:length] if length else [*ids, tokenizer.eos_token_id if end is None else end]
    return render(request, tokenizer), written


@pytest.mark.skipif(TRL is None, reason="trl, whose chat templates are tried, is not installed")
@pytest.mark.parametrize("name", NAMES_OF_TEMPLATES)
def test_the_round_trip_of_published_templates(name: str, tmp_path: Path) -> None:
    """Rows are encoded as the tokens that the teacher read and wrote, with a loss on the latter."""
    template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    tokenizer = tokenizer_of(template, *dict.fromkeys(SPECIAL_TOKENS.findall(template)))
    rows, expected = [], []
    for request, message in SCRIPTS.values():
        try:
            prompt, written = script(tokenizer, request, message)
        except DataError:  # no tools, or no system prompt
            continue
        text = completion_text(tokenizer, prompt, written, end_token_ids(tokenizer))
        completion = Completion(text, True, tuple(written))
        turn = TurnReader(tokenizer, "messages").read(request, prompt, completion)
        generated = GeneratedText(request, 0, 0, turn, True)
        rows += rows_of(generated, "messages", "chain", {})
        expected.append(([*prompt, *written], [IGNORE] * len(prompt) + written))
    assert rows
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    dataset = encode(Source(path, messages="messages"), tokenizer, max_length=5000).dataset
    for row, (ids, labels) in zip(dataset, expected, strict=True):
        assert row["input_ids"][: len(ids)] == ids
        assert row["labels"] == labels + [IGNORE] * (len(row["labels"]) - len(labels))
