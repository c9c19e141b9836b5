"""Notes on chats before training, and the end tokens that a student is saved with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

from conftest import make_llama, make_tokenizer
from potstill.errors import DataError
from potstill.runs.build import build_run
from potstill.runs.config.run import Recipe
from potstill.train.arguments import DistillationConfig
from potstill.train.terms.logits import Labels
from potstill.train.trainer import DistillationTrainer

CHAT = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{% if think and m.role == 'assistant' %}<think>{% endif %}"
    "{{ m.content }}<|stop|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% if think %}<think>{% endif %}{% endif %}"
)


@pytest.fixture
def chats(recipe_values: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A recipe with a teacher of chats, which ends all that it reads at once, and its conversations."""
    tokenizer, teacher = make_tokenizer(), make_llama(vocab_size=302, seed=1)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|stop|>"]})
    tokenizer.chat_template = CHAT
    stop = tokenizer.convert_tokens_to_ids("<|stop|>")
    with torch.no_grad():
        teacher.model.norm.weight.zero_()[0] = 1
        teacher.lm_head.weight.zero_()
        teacher.model.embed_tokens.weight[:, 0] = 1
        teacher.lm_head.weight[stop, 0] = 1
    teacher.generation_config = GenerationConfig(eos_token_id=[0, 7])
    for part in (teacher, tokenizer):
        part.save_pretrained(tmp_path / "teacher")
    talk = [{"role": "user", "content": "def a"}, {"role": "assistant", "content": "return b"}]
    rows = {"chats": [{"messages": talk}] * 4, "plain": [{"prompt": "def a", "completion": "return b"}] * 4}
    for name, values in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in values))
    source = {"path": str(tmp_path / "chats.jsonl")}
    recipe_values["teacher"] = {"model": str(tmp_path / "teacher")}
    recipe_values["student"] = {"design": {"num_hidden_layers": 1}}
    recipe_values["data"] = {"train": source, "eval": source, "max_length": 48}
    return recipe_values


def notes_of(recipe: dict[str, Any]) -> str:
    return "\n".join(build_run(Recipe.parse(recipe)).notes)


@pytest.mark.parametrize("arguments", [{}, {"day": "1 Jan"}])
def test_a_template_that_writes_the_date_is_noted(
    chats: dict[str, Any], tmp_path: Path, arguments: dict[str, str]
) -> None:
    day = "{% if day is not defined %}{% set day = strftime_now('%d %b') %}{% endif %}<|start|>{{ day }}<|stop|>\n"
    (tmp_path / "dated.jinja").write_text(day + CHAT)
    chats["data"] |= {"chat_template": str(tmp_path / "dated.jinja"), "chat_template_kwargs": arguments}
    assert ("chat template: it writes the date into each row" in notes_of(chats)) is not bool(arguments)


def test_the_student_ends_where_teacher_and_template_do(chats: dict[str, Any]) -> None:
    built = build_run(Recipe.parse(chats))
    stop = built.tokenizer.convert_tokens_to_ids("<|stop|>")
    assert built.new_student().generation_config.eos_token_id == [0, 7, stop]
    assert "plain text" not in "\n".join(built.notes)


@pytest.mark.parametrize("of_teacher", [None, 5])
def test_a_designed_student_pads_as_its_teacher_does(chats: dict[str, Any], of_teacher: int | None) -> None:
    built = build_run(Recipe.parse(chats))
    built.tokenizer.pad_token_id = 4
    assert built.new_student.design is not None
    built.new_student.design.pad_token_id = None
    built.loaded.model.generation_config.pad_token_id = of_teacher
    assert built.new_student().generation_config.pad_token_id == (of_teacher or 4)


SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1, "stop_strings": ["def"]}


@pytest.mark.parametrize(
    ("start", "other_tokens"), [("copy", False), ("prune", False), ("random", False), ("random", True)]
)
def test_a_designed_student_samples_as_its_teacher_does(
    chats: dict[str, Any], tmp_path: Path, start: str, other_tokens: bool
) -> None:
    settings = SAMPLING | {"eos_token_id": [0, 7], "bad_words_ids": [[20, 30], [301]]}
    GenerationConfig(**settings).save_pretrained(tmp_path / "teacher")
    chats["student"]["initialize"] = start
    if other_tokens:
        chats["student"]["tokenizer"] = str(tmp_path / "other")
        other = make_tokenizer()
        other.chat_template = CHAT.replace("<|stop|>", "<end>")
        other.save_pretrained(tmp_path / "other")
        chats["objective"] = [{"term": "chunks"}]
    else:
        chats["student"]["vocabulary"] = {"keep": 270}
    built = build_run(Recipe.parse(chats))
    generation = built.new_student().generation_config
    assert {name: getattr(generation, name) for name in SAMPLING} == SAMPLING
    if other_tokens:
        assert (generation.bad_words_ids, generation.eos_token_id) == (None, built.tokenizer.eos_token_id)
    else:
        ids = built.tokenizer.get_vocab()
        names = AutoTokenizer.from_pretrained(tmp_path / "teacher").convert_ids_to_tokens([20, 30, 301, 7])
        kept = [[ids[name] for name in words] for words in (names[:2], names[2:3]) if {*words} <= {*ids}]
        assert generation.bad_words_ids == kept
        assert ids[names[3]] in generation.eos_token_id
    generation.save_pretrained(tmp_path / "student")


@pytest.mark.parametrize(
    ("settings", "saved"),
    [
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, {"do_sample": True, "temperature": 0.6}),
        ({"temperature": 0.0}, {"do_sample": True, "temperature": None, "top_k": 1}),
        ({"length_penalty": 2.0, "pad_token_id": -1}, {"do_sample": None, "length_penalty": None}),
    ],
)
@pytest.mark.parametrize("designed", [False, True])
def test_settings_that_transformers_refuses_to_save_are_resolved(
    chats: dict[str, Any], tmp_path: Path, settings: dict[str, Any], saved: dict[str, Any], designed: bool
) -> None:
    (tmp_path / "teacher" / "generation_config.json").write_text(json.dumps(settings))
    if not designed:
        chats["student"] = {"model": str(tmp_path / "teacher")}
    student = build_run(Recipe.parse(chats)).new_student()
    student.save_pretrained(tmp_path / "student")
    generation = GenerationConfig.from_pretrained(tmp_path / "student")
    assert {name: getattr(generation, name) for name in saved} == saved


def test_the_trainer_saves_the_end_of_turns(chats: dict[str, Any], tmp_path: Path) -> None:
    built = build_run(Recipe.parse(chats))
    student = make_llama(vocab_size=302)
    arguments = DistillationConfig(output_dir=str(tmp_path / "out"), use_cpu=True)
    trainer = DistillationTrainer(student, None, [Labels()], arguments, processing_class=built.tokenizer)
    trainer.save_model(str(tmp_path / "student"))
    stop = built.tokenizer.convert_tokens_to_ids("<|stop|>")
    assert GenerationConfig.from_pretrained(tmp_path / "student").eos_token_id == [0, stop]


def test_arguments_of_the_template_are_kept_in_the_tokenizer(chats: dict[str, Any]) -> None:
    chats["data"]["chat_template_kwargs"] = {"think": True}
    built = build_run(Recipe.parse(chats))
    text = built.tokenizer.decode(built.train.dataset[0]["input_ids"])
    assert "assistant\n<think>return b<|stop|>" in text
    prompt = built.tokenizer.apply_chat_template(
        [{"role": "user", "content": "a"}], add_generation_prompt=True, tokenize=False
    )
    assert prompt.endswith("assistant\n<think>")
    chats["data"]["chat_template_kwargs"] = {"enable_thinking": True}
    with pytest.raises(DataError, match="expected arguments that the chat template reads, got enable_thinking"):
        build_run(Recipe.parse(chats))


def test_plain_prompts_for_a_teacher_of_chats_are_noted(chats: dict[str, Any], tmp_path: Path) -> None:
    plain = {"path": str(tmp_path / "plain.jsonl")}
    chats["data"] |= {"train": plain, "eval": plain}
    notes = notes_of(chats)
    assert "it has a chat template, and the prompts are plain text" in notes
    assert "the most likely first token of 3 is <|stop|>" in notes and "Set chat: true" in notes


def test_turns_may_be_opened_by_bos_and_ended_by_eos(chats: dict[str, Any], tmp_path: Path) -> None:
    """As in SmolLM2, whose tokenizer puts neither around a text."""
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "teacher")
    tokenizer.bos_token, tokenizer.eos_token = "<|start|>", "<|stop|>"
    tokenizer.save_pretrained(tmp_path / "teacher")
    chats["data"]["max_length"] = 22  # in the midst of the answer
    assert "plain text" not in notes_of(chats)


def test_templates_that_differ_are_noted(chats: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|stop|>"]})
    tokenizer.chat_template = CHAT.replace("{{ m.role }}", "{{ m.role | upper }}")
    tokenizer.save_pretrained(tmp_path / "student")
    chats["student"]["tokenizer"] = str(tmp_path / "student")
    notes = notes_of(chats)
    assert "chat templates: the teacher's renders row 1 of the held-out data with" in notes
    assert "user" in notes and "USER" in notes
