"""Shapes and first weights of students, and how models are read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, Gemma3TextConfig, GPT2Config, LlamaConfig, Qwen3Config

import families
from conftest import make_llama, make_tokenizer
from potstill.data.vocabulary import shared_vocabulary
from potstill.errors import ModelError, VocabularyError
from potstill.models.design import student_config
from potstill.models.initialize import random_student
from potstill.models.loading import load_model, load_tokenizer


def test_a_student_is_of_the_teachers_kind() -> None:
    teacher = LlamaConfig(vocab_size=320, hidden_size=64, num_attention_heads=8, num_hidden_layers=6)
    config = student_config(teacher, {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}, 300)
    assert (config.vocab_size, config.num_key_value_heads, config.head_dim) == (300, 4, 8)
    assert teacher.hidden_size == 64
    assert random_student(config, 0).num_parameters() > 0


def test_layer_types_follow_the_number_of_layers() -> None:
    teacher = Qwen3Config(num_hidden_layers=4, vocab_size=300)
    assert len(student_config(teacher, {"num_hidden_layers": 2}, 300).layer_types) == 2


def test_a_kind_without_these_fields_works_too() -> None:
    config = student_config(GPT2Config(vocab_size=300), {"n_embd": 32, "n_head": 2, "n_layer": 1}, 300)
    assert random_student(config, 0).config.n_embd == 32


def test_every_field_of_the_family_can_be_given(tmp_path: Path) -> None:
    llama, gemma = make_llama().config, Gemma3TextConfig(num_hidden_layers=4)
    cases: list[tuple[Any, dict[str, Any], dict[str, Any]]] = [
        (llama, {"rope_theta": 5e4, "rms_norm_eps": 1e-3}, {"rope_theta": 5e4, "rope_type": "default"}),
        (llama, {"rope_parameters": {"rope_theta": 7.0}}, {"rope_theta": 7.0, "rope_type": "default"}),
        (
            llama,
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            {"rope_theta": llama.rope_parameters["rope_theta"], "rope_type": "linear", "factor": 2.0},
        ),
        (
            gemma,
            {"rope_parameters": {"full_attention": {"rope_theta": 3e4}}, "query_pre_attn_scalar": 64},
            gemma.rope_parameters | {"full_attention": {"rope_theta": 3e4, "rope_type": "default"}},
        ),
    ]
    for number, (teacher, changes, rotary) in enumerate(cases):
        student_config(teacher, changes, 300).save_pretrained(tmp_path / str(number))
        student = AutoConfig.from_pretrained(tmp_path / str(number))
        assert student.rope_parameters == rotary
        for name in ("rms_norm_eps", "query_pre_attn_scalar"):
            assert name not in changes or getattr(student, name) == changes[name]
    assert student_config(GPT2Config(), {"num_hidden_layers": 3}, 300).n_layer == 3
    lists = student_config(gemma, {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}, 300)
    assert lists.layer_types == ["full_attention"] * 2


def test_key_and_value_heads_keep_their_proportion() -> None:
    for heads, kv_heads, changed, expected in ((8, 2, 4, 1), (8, 2, 12, 3), (9, 3, 8, 2), (8, 8, 4, 4), (8, 1, 4, 1)):
        teacher = LlamaConfig(hidden_size=72 * 4, num_attention_heads=heads, num_key_value_heads=kv_heads)
        student = student_config(teacher, {"num_attention_heads": changed}, 300)
        assert (student.num_attention_heads, student.num_key_value_heads) == (changed, expected)


def test_a_field_that_may_differ_by_layer_can_be_given() -> None:
    assert student_config(families.small("gemma4_text"), {"head_dim": 16}, 128).to_dict()["head_dim"] == 16


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (LlamaConfig(), {"rope_teta": 1e4}, "got rope_teta. Did you mean rope_theta?"),
        (LlamaConfig(), {"rope_parameters": {"rope_teta": 1e4}}, "got rope_teta. Did you mean rope_theta?"),
        (LlamaConfig(), {"rms_norm_epsilon": 1e-5}, "got rms_norm_epsilon. Did you mean rms_norm_eps?"),
        (GPT2Config(), {"rope_theta": 1e4}, "expected a field of GPT2Config, got rope_theta."),
        (GPT2Config(), {"n_layer": 2, "num_hidden_layers": 2}, "expected n_layer once"),
        (
            Gemma3TextConfig(),
            {"rope_theta": 1e4},
            "expected sliding_attention, full_attention, got rope_theta. Such as rope_parameters: {sliding_attention: "
            "{rope_theta: ...}}.",
        ),
        (LlamaConfig(), {"hidden_size": "64"}, "student.design.hidden_size: expected a whole number >= 1, got '64'."),
        (GPT2Config(), {"num_hidden_layers": 1.5}, "student.design.n_layer: expected a whole number >= 1, got 1.5."),
        (LlamaConfig(), {"num_attention_heads": 0}, "expected a whole number >= 1, got 0."),
        (LlamaConfig(), {"dtype": "float16"}, "expected a field of LlamaConfig, got dtype."),
        (
            LlamaConfig(),
            {"model_type": "gpt2"},
            "expected llama for a teacher of llama, got gpt2. Leave model_type out.",
        ),
        (LlamaConfig(), {"rope_theta": 0}, "expected rope_theta > 0, got 0."),
        (LlamaConfig(), {"rope_theta": "1e6"}, "expected rope_theta > 0, got '1e6'."),
        (LlamaConfig(), {"factor": 2.0}, "got factor. Leave it out, or name a rope_type that reads it."),
        (LlamaConfig(), {"partial_rotary_factor": 0.5}, "rope_type default read (rope_theta, rope_type), got partial"),
        (LlamaConfig(), {"rope_parameters": 5}, "expected a mapping such as {rope_theta: 10000.0}, got 5."),
        (LlamaConfig(), {"rope_theta": 1.0, "rope_parameters": {"rope_theta": 2.0}}, "got it beside them. Move it"),
    ],
)
def test_fields_that_the_family_does_not_have(config: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=re.escape(message)):
        student_config(config, changes, 300)


def test_the_same_seed_gives_the_same_weights() -> None:
    config = make_llama().config
    one, two, other = (next(random_student(config, seed).parameters()) for seed in (3, 3, 4))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"hiden_size": 8}, "Did you mean hidden_size"), ({"hidden_size": 9, "num_attention_heads": 2}, "student.design")],
)
def test_shapes_that_cannot_be(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        student_config(make_llama().config, changes, 300)


def test_models_are_read_in_the_precision_asked_for(toys: Path) -> None:
    assert load_model(str(toys / "teacher"), "teacher.model", "bfloat16").dtype == torch.bfloat16
    assert load_model(str(toys / "teacher"), "teacher.model").dtype == torch.float32
    assert load_tokenizer(str(toys / "teacher"), "teacher.model").eos_token == "<end>"


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_path_that_is_not_there(toys: Path, load) -> None:
    with pytest.raises(ModelError, match=r"student\.model: expected a folder .* Did you mean .*student\?"):
        load(str(toys / "studnt"), "student.model")


def test_a_bare_name_near_a_folder_is_not_looked_up_on_the_hub(toys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(toys)
    with pytest.raises(ModelError, match=r"Did you mean teacher\?"):
        load_model("teachers", "teacher.model")


def test_heads_must_have_a_row_for_each_token() -> None:
    tokenizer = make_tokenizer()
    assert shared_vocabulary(tokenizer, tokenizer, {"teacher": 320, "student": 300}) == 300
    with pytest.raises(VocabularyError, match="student head with a row for each of 300 tokens, got 299"):
        shared_vocabulary(tokenizer, tokenizer, {"teacher": 320, "student": 299})
