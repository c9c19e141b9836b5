"""What a model is trained on, shown: every token, which of them are targets, and their weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from typer.testing import CliRunner

from conftest import make_tokenizer
from potstill.cli import app
from potstill.data.batches import encode
from potstill.data.show import ShownToken, marked_text, shown_rows
from potstill.data.sources import Source
from reference_across import byte_level

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ROW = {"messages": [{"role": "user", "content": "def a"}, {"role": "assistant", "content": "return é"}]}


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_targets_and_weights_are_marked() -> None:
    words = [("a\n", False, 1), ("b", True, 1), ("c", True, 1), ("d", True, 0.5)]
    tokens = [ShownToken(i, text, target, weight) for i, (text, target, weight) in enumerate(words)]
    assert marked_text(tokens) == "a⏎\n«b|c»«0.5: d»"


def test_the_shown_tokens_are_the_text(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT
    examples = encode(Source(written(tmp_path / "rows.jsonl", [ROW])), tokenizer, max_length=64)
    (row,) = shown_rows(examples.dataset, tokenizer, 3, byte_level(258))
    assert [token.id for token in row.tokens] == examples.dataset[0]["input_ids"]
    whole = "".join(token.text for token in row.tokens if token.text.isascii())
    assert whole.startswith("<user>def a<end>\n<assistant>return ") and whole.endswith("<end>\n")
    targets = [token.text for token in row.tokens if token.target]
    assert targets[-1] == "<end>" and "".join(targets).startswith("return ")
    assert row.title == f"row 1: {len(row.tokens)} tokens, {len(targets)} targets"
    assert row.teacher is not None and len(row.teacher) > len(row.tokens)


def test_the_command_shows_rows_and_ends(recipe_values: dict[str, Any], toys: Path, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    source = {"path": written(tmp_path / "rows.jsonl", [ROW])}
    recipe_values["student"] = {"design": {"hidden_size": 8}, "tokenizer": str(tmp_path / "tokenizer")}
    recipe_values["data"] = {"train": source, "eval": source, "max_length": 64}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_values))
    result = CliRunner().invoke(app, ["data", "show", str(path), "--ids"])
    assert result.exit_code == 0, result.output
    assert "row 1: " in result.output and "a text ends at <end>" in result.output
    assert "<end>»⏎" in result.output.replace("|", "")
    shown = json.loads(CliRunner().invoke(app, ["data", "show", str(path), "--json"]).output)
    (row,) = shown["rows"]
    assert shown["ends"] == ["<end>"] and any(token["target"] for token in row["tokens"])
    template = tmp_path / "chat.jinja"
    template.write_text(
        CHAT.replace("<assistant>", "<model>").replace(
            "<{{ m.role }}>", "<{{ 'model' if m.role == 'assistant' else m.role }}>"
        )
    )
    other = CliRunner().invoke(app, ["data", "show", str(path), "--set", f"data.chat_template={template}"])
    assert "model" in other.output.replace("|", "")
