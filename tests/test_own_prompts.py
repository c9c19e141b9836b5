"""Data in which the teacher has prompts of its own: one answer, behind two prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import make_tokenizer
from potstill.data.batches import PaddingCollator, encode
from potstill.data.sources import Source
from potstill.errors import DataError, ModelError, RecipeError, VocabularyError
from potstill.losses.alignment import causal_alignment
from potstill.runs.build import build_run
from potstill.runs.config.run import Recipe
from potstill.teachers.ensemble import EnsembleTeacher
from potstill.teachers.privileged import PrivilegedTeacher
from potstill.teachers.self_taught import EMATeacher
from reference_across import byte_level

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def completions(n: int = 5) -> list[dict[str, Any]]:
    return [
        {
            "prompt": f"def f{i}(a):",
            "hint": f"class C{i}: it adds {i}.\ndef f{i}(a):",
            "completion": f"\n    return a + {i}",
        }
        for i in range(n)
    ]


def conversations(n: int = 5) -> list[dict[str, Any]]:
    rows = []
    for i in range(n):
        question = {"role": "user", "content": f"{i} + {i}?"}
        answer = {"role": "assistant", "content": f"It is {2 * i}."}
        more = [{"role": "user", "content": "And?"}, {"role": "assistant", "content": "No more."}]
        hint = {"role": "system", "content": f"The answer is {2 * i}."}
        rows.append({"messages": [question, answer, *more], "hint": [hint, question]})
    return rows


@pytest.mark.parametrize(
    ("kind", "max_length"), [("completion", 64), ("completion", 18), ("messages", 128), ("messages", 40)]
)
def test_positions_align_one_by_one(kind: str, max_length: int, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    rows = completions() if kind == "completion" else conversations()
    path = written(tmp_path / "rows.jsonl", rows)
    plain = encode(Source(path), tokenizer, max_length=max_length)
    found = encode(Source(path, teacher_prompt="hint"), tokenizer, max_length=max_length)
    assert [row["input_ids"] for row in found.dataset] == [row["input_ids"] for row in plain.dataset]
    assert found.tokens == plain.tokens and plain.teacher_longest == 0
    assert found.teacher_longest == max(len(row["teacher_input_ids"]) for row in found.dataset)
    for row, given in zip(found.dataset, rows, strict=True):
        text = tokenizer.decode(row["teacher_input_ids"])
        assert text.startswith(given["hint"] if kind == "completion" else f"<system>{given['hint'][0]['content']}")
    batch = PaddingCollator(1)(list(found.dataset))
    student, teacher = (causal_alignment(batch[name]) for name in ("labels", "teacher_labels"))
    assert torch.equal(student.labels, teacher.labels) and len(student) == found.tokens
    assert set(PaddingCollator(1)(list(plain.dataset))) == {"input_ids", "attention_mask", "labels"}


def test_token_ids_bring_their_own(tmp_path: Path) -> None:
    row = {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}
    own = {"teacher_input_ids": [9, 9, 9, 7, 8], "teacher_labels": [-100, -100, -100, 7, 8]}
    path = written(tmp_path / "ids.jsonl", [row | own])
    (found,) = encode(Source(path), make_tokenizer(), max_length=3).dataset
    assert found["labels"] == [-100, -100, 7]
    assert found["teacher_input_ids"] == [9, 9, 9, 7] and found["teacher_labels"] == [-100, -100, -100, 7]
    path = written(tmp_path / "other.jsonl", [row | own | {"teacher_labels": [-100, -100, -100, 6, 8]}])
    with pytest.raises(DataError, match=r"expected the same answer tokens .* in row 1 of other.jsonl"):
        encode(Source(path), make_tokenizer(), max_length=4)


def test_prompts_that_cannot_be(tmp_path: Path) -> None:
    path = written(tmp_path / "text.jsonl", [{"text": "a", "hint": "b"}])
    with pytest.raises(DataError, match=r"expected answers for the teacher's own prompts in text.jsonl, got text"):
        encode(Source(path, teacher_prompt="hint"), make_tokenizer(), max_length=8)
    path = written(tmp_path / "rows.jsonl", completions())
    with pytest.raises(DataError, match=r"expected a column 'hints' .*Did you mean hint"):
        encode(Source(path, teacher_prompt="hints"), make_tokenizer(), max_length=64)


# Recipes.


def test_recipes_build_their_teachers(recipe_values: dict[str, Any], toys: Path, tmp_path: Path) -> None:
    model = {"model": str(toys / "teacher")}
    recipe_values |= {"student": {"model": str(toys / "student")}, "teacher": {"ema": {"decay": 0.9}}}
    assert isinstance(build_run(Recipe.parse(recipe_values)).teacher, EMATeacher)
    recipe_values["teacher"] = {"ensemble": [model | {"weight": 3}, model | {"weight": 1}], "of": "log_probs"}
    built = build_run(Recipe.parse(recipe_values))
    assert isinstance(built.teacher, EnsembleTeacher) and built.teacher.of == "log_probs"
    assert built.teacher.weights.tolist() == [0.75, 0.25] and built.teacher.names == ["teacher_0", "teacher_1"]
    assert len(built.loaded.models.values()) == 2 and built.loaded.model is None
    recipe_values["teacher"] = {"adapter_off": True}
    with pytest.raises(ModelError, match="expected a student with an adapter"):
        build_run(Recipe.parse(recipe_values))
    hinted = {"path": str(written(tmp_path / "rows.jsonl", completions())), "teacher_prompt": "hint"}
    recipe_values |= {"teacher": model, "data": {"train": hinted, "eval": hinted, "max_length": 32}}
    assert isinstance(build_run(Recipe.parse(recipe_values)).teacher, PrivilegedTeacher)
    recipe_values["teacher"] = {"ensemble": [model, model]}
    with pytest.raises(RecipeError, match="expected a teacher that reads its own prompts, got an ensemble"):
        build_run(Recipe.parse(recipe_values))
    byte_level(258).save_pretrained(tmp_path / "bytes")
    recipe_values["teacher"] = model
    recipe_values["student"] = {"design": {"hidden_size": 8}, "tokenizer": str(tmp_path / "bytes")}
    recipe_values["objective"] = [{"term": "chunks"}]
    with pytest.raises(RecipeError, match="its own prompts, got one with another tokenizer"):
        build_run(Recipe.parse(recipe_values))


def test_a_member_with_another_tokenizer_is_refused(recipe_values: dict[str, Any], toys: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(toys / "teacher", tmp_path / "other")
    make_tokenizer(290).save_pretrained(tmp_path / "other")
    members = [{"model": str(toys / "teacher")}, {"model": str(tmp_path / "other")}]
    recipe_values["teacher"] = {"ensemble": members}
    with pytest.raises(VocabularyError, match=r"^teacher.ensemble.1: expected the token -> id map of "):
        build_run(Recipe.parse(recipe_values))


KINDS = "adapter_off, cache, ema, ensemble, model, server"
MISTAKES = {
    "an ensemble of one": ({"ensemble": [{"model": "a"}]}, "expected two members or more, got 1"),
    "two teachers": ({"model": "a", "ema": {}}, f"teacher: expected one of {KINDS}, got ema and model"),
    "two others": ({"adapter_off": True, "ema": {}}, f"teacher: expected one of {KINDS}, got adapter_off and ema"),
    "a server and more": (
        {"server": {"url": "u", "model": "m"}, "model": "a"},
        "expected one of .*, got model and server",
    ),
    "no teacher": ({}, f"expected one of {KINDS}, got none"),
    "weights without an ensemble": (
        {"model": "a", "weights": "learned"},
        "expected weights with ensemble alone, got it with model",
    ),
    "weights of some": (
        {"ensemble": [{"model": "a", "weight": 1}, {"model": "b"}]},
        "expected a weight for every member of the ensemble or for none, got 1",
    ),
    "no weight": (
        {"ensemble": [{"model": "a", "weight": 0}, {"model": "b", "weight": 0}]},
        "weights that are not negative nor all 0",
    ),
    "learned log-probs": (
        {"ensemble": [{"model": "a"}, {"model": "b"}], "of": "log_probs", "weights": "learned"},
        "expected of: probabilities where weights are learned",
    ),
    "a member with both": (
        {"ensemble": [{"model": "a", "cache": "c"}, {"model": "b"}]},
        "teacher: .* got both in member 0",
    ),
    "an average that stands still": (
        {"ema": {"decay": 1.0}},
        r"teacher.ema.decay: expected a number in \[0, 1\), got 1.0",
    ),
    "an unknown key": ({"ema": {"decy": 0.9}}, "teacher.ema.decy: unknown key. Did you mean decay"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_in_a_recipe(name: str, recipe_values: dict[str, Any]) -> None:
    teacher, message = MISTAKES[name]
    with pytest.raises(RecipeError, match=message):
        Recipe.parse(recipe_values | {"teacher": teacher})


def test_a_design_needs_a_teacher_that_is_not_the_student(recipe_values: dict[str, Any]) -> None:
    for key in ({"ema": {}}, {"adapter_off": True}):
        with pytest.raises(RecipeError, match=r"expected student.model, got a design"):
            build_run(Recipe.parse(recipe_values | {"teacher": key}))
