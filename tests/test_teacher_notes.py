"""A teacher that cannot teach is reported before the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import make_llama, make_tokenizer
from potstill.errors import ModelError
from potstill.models.loading import load_model
from potstill.runs.build import build_run
from potstill.runs.config.run import Recipe
from toy_encoders import make_bert_tokenizer, make_encoder

SAME, GUESS = "teacher: its predictions are the same whatever it reads", "that of a uniform guess"


def notes(values: dict[str, Any]) -> list[str]:
    return [note for note in build_run(Recipe.parse(values)).notes if note.startswith("teacher: ")]


def scaled_head(values: dict[str, Any], folder: Path, factor: float) -> dict[str, Any]:
    """The recipe with a teacher whose logits are so many times as large, in a folder of its own."""
    model = make_llama(seed=1)
    model.lm_head.weight.data.mul_(factor)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return values | {"teacher": {"model": str(folder)}}


def test_language_models(recipe_values: dict[str, Any], tmp_path: Path) -> None:
    same = notes(scaled_head(recipe_values, tmp_path / "same", 0.0))
    assert any(SAME in note for note in same)
    (worse,) = notes(scaled_head(recipe_values, tmp_path / "worse", 20.0))
    assert GUESS in worse
    assert "tokens of the training data" in worse


@pytest.mark.parametrize(("weight", "bias", "expected"), [(0.0, 1.0, SAME), (50.0, 0.0, GUESS)])
def test_classifiers(judged_rows: Path, weight: float, bias: float, expected: str) -> None:
    teacher = make_encoder("bert", "classification")
    teacher.classifier.weight.data.mul_(weight)
    teacher.classifier.bias.data.add_(torch.arange(len(teacher.classifier.bias)) * bias)
    teacher.save_pretrained("teacher")
    make_bert_tokenizer().save_pretrained("teacher")
    values: dict[str, Any] = {
        "name": "classes",
        "task": "classification",
        "teacher": {"model": "teacher"},
        "student": {"design": {"num_hidden_layers": 1}},
        "data": {"train": {"path": "train.jsonl"}, "eval": {"path": "eval.jsonl"}, "max_length": 32},
        "objective": [{"term": "logits"}],
        "train": {"max_steps": 2},
        "output": "run",
    }
    assert any(expected in note for note in notes(values))


def test_classifiers_of_several_classes_a_text_are_refused(tmp_path: Path) -> None:
    teacher = make_encoder("bert", "classification")
    teacher.config.problem_type = "multi_label_classification"
    teacher.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"teacher.model: expected a classifier of one class a text, .* Name another"):
        load_model(str(tmp_path), "teacher.model", task="classification")
