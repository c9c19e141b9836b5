"""Published chat templates: the targets are what the model has to write, with the token that ends it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chat_templates import CASES, outcome, table, template_files, tokenizer_of
from potstill.data.batches import encode
from potstill.data.chat_texts import ChatRenderer
from potstill.data.sources import Source
from potstill.losses.alignment import IGNORE
from potstill.models.chat import end_token_ids, render_chat

TEMPLATES = template_files()
if not TEMPLATES:
    pytest.skip("the package trl, which has the templates, is not installed", allow_module_level=True)

# What a template has no place for; anything else that it leaves out is a fault of ours.
REFUSED = (
    "the tool_calls of every message",
    "the reasoning_content of every",
    "reads tools",
    "System role not supported",
)


@pytest.mark.parametrize("name", TEMPLATES)
def test_targets_are_what_the_model_writes(name: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(name, TEMPLATES[name].read_text(encoding="utf-8"))
    renderer, rows, expected = ChatRenderer(tokenizer), [], []
    for case, (messages, options) in CASES.items():
        texts = outcome(renderer, case)
        if isinstance(texts, str):
            assert case not in ("one turn", "two turns"), texts
            assert any(part in texts for part in REFUSED), texts
            continue
        rows.append({"messages": messages} | options)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        written = [_written(part.text, part.targets) for part in texts]
        joined = "".join(written)
        for i in turns:  # every turn is learnt once, and in order
            place = joined.find(messages[i]["content"])
            assert place >= 0
            for thought in filter(None, [messages[i].get("reasoning_content")]):
                assert joined.count(thought) == 1 and joined.find(thought) < place
        for part, text in zip(texts, written, strict=True):
            assert not part.closed or text.endswith(tuple(renderer.ends))
            first = turns[0] if len(texts) == 1 else part.turn
            if part.opened is None:  # the prompt is that of generation
                prompt = render_chat(tokenizer, messages[:first], "row 1", add_generation_prompt=True, **options)
                assert part.text.startswith(prompt) and part.targets[0][0] >= len(prompt)
            expected.append(text if part.closed else text + str(tokenizer.eos_token))
    learnt = _learnt(rows, tokenizer, tmp_path / "rows.jsonl")
    assert learnt == expected


def _written(text: str, targets: list[tuple[int, int]]) -> str:
    return "".join(text[start:end] for start, end in targets)


def _learnt(rows: list[dict[str, Any]], tokenizer: Any, path: Path) -> list[str]:
    """The text of the target tokens of encoded rows; the last of them ends generation."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    targets = [
        [label for label in row["labels"] if label != IGNORE]
        for row in encode(Source(path), tokenizer, max_length=4096).dataset
    ]
    assert {ids[-1] for ids in targets} <= end_token_ids(tokenizer)
    return [tokenizer.decode(ids) for ids in targets]


def test_the_page_has_the_table_of_templates() -> None:
    page = (Path(__file__).parents[1] / "docs" / "chats.md").read_text(encoding="utf-8")
    assert table() in page, f"put this table into docs/chats.md:\n{table()}"
