"""docs/data.md: each row that it shows becomes the text that stands below it."""

from __future__ import annotations

import json
import re
from itertools import groupby
from pathlib import Path

import pytest
import yaml
from transformers import PreTrainedTokenizerFast

from potstill.data.batches import encode
from potstill.data.sources import Source
from potstill.runs.config.run import DataPart
from test_data import PLAIN

PAGE = (Path(__file__).parents[1] / "docs/data.md").read_text(encoding="utf-8")
SHAPES = re.findall(r"### ([^\n]*)\n```json\n([^\n]*)\n```\n```text\n(.*?)\n```", PAGE, flags=re.DOTALL)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    made = PreTrainedTokenizerFast(tokenizer_object=PLAIN.backend_tokenizer, eos_token="<eos>", pad_token="<pad>")
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = CHATML
    return made


def test_every_shape_is_shown():
    assert [name for name, *_ in SHAPES] == [
        *("Text", "Prompt and completion", "Question and answer", "Alpaca", "Messages", "ShareGPT"),
        "Prompt and completion of messages",
    ]


@pytest.mark.parametrize(("row", "text"), [shape[1:] for shape in SHAPES], ids=[name for name, *_ in SHAPES])
def test_rows_are_rendered_as_shown(row, text, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "rows.jsonl").write_text(row)
    (example,) = encode(Source(tmp_path / "rows.jsonl"), tokenizer, max_length=500).dataset
    runs = groupby(zip(example["input_ids"], example["labels"], strict=True), key=lambda pair: pair[1] != -100)
    parts = [(learnt, tokenizer.decode([token for token, _ in run])) for learnt, run in runs]
    assert "".join(f"«{part}»" if learnt else part for learnt, part in parts) == text


def test_its_recipe_is_valid():
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)
    DataPart.model_validate(yaml.safe_load(block)["data"])
    assert json.loads(re.findall(r"### Token ids\n```json\n(.*)\n```", PAGE)[0])["labels"][0] == -100
