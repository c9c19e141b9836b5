from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conftest import make_llama, make_tokenizer
from potstill.errors import DataError
from potstill.models.chat import end_token_ids, render_chat, set_chat_template, turn_end_id

TURN = "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|stop|>\n{% endfor %}"
THOUGHTS = TURN + "{% if add_generation_prompt %}{% if thinking %}<think>{% else %}plain{% endif %}{% endif %}"
USER = [{"role": "user", "content": "a"}]


def tokenizer_of(template: str | None) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|stop|>"]})
    tokenizer.chat_template = template
    return tokenizer


PARTS = TURN.replace("{{ m.content }}", "{% for part in m.content %}{{ part.text }}{% endfor %}")


@pytest.mark.parametrize("template", [TURN, TURN.replace("<|stop|>", "<end><|stop|>"), PARTS, TURN + "<end>"])
def test_the_end_of_a_turn_is_the_special_token_behind_the_answer(template: str) -> None:
    tokenizer = tokenizer_of(template)
    assert turn_end_id(tokenizer) == tokenizer.convert_tokens_to_ids("<|stop|>")
    assert end_token_ids(tokenizer) == {tokenizer.eos_token_id, turn_end_id(tokenizer)}


@pytest.mark.parametrize(
    "template",
    [None, "{% for m in messages %}<|start|>{{ m.content }}{% endfor %}", "{{ raise_exception('no') }}", "fixed"],
)
def test_no_end_of_a_turn_where_the_template_writes_none(template: str | None) -> None:
    assert turn_end_id(tokenizer_of(template)) is None


def test_ends_are_those_of_the_tokenizer_and_of_the_model() -> None:
    model, tokenizer = make_llama(), SimpleNamespace(eos_token_id=5)
    model.generation_config.eos_token_id = [3, 4]
    assert end_token_ids(tokenizer, model) == {3, 4, 5}  # type: ignore[arg-type]
    assert end_token_ids(None, model) == {3, 4}
    assert end_token_ids(None, SimpleNamespace()) == frozenset()


@pytest.mark.parametrize(
    ("value", "prompt"), [(True, "<think>"), (False, "plain"), (None, "plain"), ("it's", "<think>")]
)
def test_arguments_are_defaults_of_the_saved_template(value: Any, prompt: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(THOUGHTS)
    before = render_chat(tokenizer, USER, "row 1")
    set_chat_template(tokenizer, arguments={"thinking": value})
    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    assert render_chat(loaded, USER, "row 1") == before
    assert render_chat(loaded, USER, "row 1", add_generation_prompt=True) == before + prompt
    other = render_chat(loaded, USER, "row 1", add_generation_prompt=True, thinking=prompt == "plain")
    assert other == before + ("plain" if prompt == "<think>" else "<think>")


def test_a_template_comes_from_a_file(tmp_path: Path) -> None:
    tokenizer, file = tokenizer_of(None), tmp_path / "chat.jinja"
    with pytest.raises(DataError, match="expected a tokenizer with one chat template for thinking, got none"):
        set_chat_template(tokenizer, arguments={"thinking": True})
    with pytest.raises(DataError, match="expected a Jinja file"):
        set_chat_template(tokenizer, file)
    file.write_text(TURN, encoding="utf-8")
    set_chat_template(tokenizer, file)
    assert render_chat(tokenizer, USER, "row 1") == "<|start|>user\na<|stop|>\n"
