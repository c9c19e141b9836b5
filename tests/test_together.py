"""What was built apart works in one recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conftest import quiet_run
from potstill.models.loading import load_model
from potstill.runs.config.run import Recipe
from potstill.runs.diagnose import diagnose
from reference_across import byte_level


def test_a_run_with_a_teacher_of_other_tokens_is_diagnosed(recipe_values: dict[str, Any], tmp_path: Path) -> None:
    byte_level(258).save_pretrained(tmp_path / "bytes")
    recipe_values["student"]["tokenizer"] = str(tmp_path / "bytes")
    recipe_values["data"]["max_length"] = 64
    recipe_values["objective"] = [{"term": "chunks"}, {"term": "labels"}]
    directory = quiet_run(recipe_values).directory
    found = diagnose(Recipe.parse(recipe_values), run=directory)
    assert found["distributions"] is None  # its distributions are over other tokens
    assert found["temperature"] is None
    assert set(found["losses"]) == {"baseline", "student"}


@pytest.mark.slow
def test_an_adapter_learns_on_its_own_text_from_an_ensemble_in_two_precisions(recipe_values: dict[str, Any]) -> None:
    model = recipe_values["teacher"]["model"]
    recipe_values["student"] = {"model": model, "adapter": "lora"}
    recipe_values["teacher"] = {"ensemble": [{"model": model}, {"model": model, "dtype": "int8"}], "weights": "learned"}
    recipe_values["rollout"] = {"on_policy_fraction": 0.5, "max_new_tokens": 8, "prompt_tokens": 8}
    recipe_values["data"]["packing"] = False
    recipe_values["objective"] = [{"term": "logits", "divergence": "reverse_kl"}, {"term": "labels", "weight": 0.1}]
    recipe_values["evaluate"] = {"baseline": True, "continuations": 1}
    result = quiet_run(recipe_values)
    assert set(result.summary["rows"]) == {"teacher", "baseline", "student"}
    assert (result.directory / "student" / "adapter_model.safetensors").exists()
    found = diagnose(Recipe.parse(recipe_values), run=result.directory)
    assert found["gradients"]["flow"]  # of the adapter alone, whose base is frozen
    assert found["distributions"] is not None


def test_virtual_tokens_learn_from_the_model_without_them_by_sampled_tokens(recipe_values: dict[str, Any]) -> None:
    recipe_values["student"] = {"model": recipe_values["teacher"]["model"], "adapter": "prompt"}
    recipe_values["teacher"] = {"adapter_off": True}
    recipe_values["rollout"] = {"on_policy_fraction": 1.0, "max_new_tokens": 8, "prompt_tokens": 8}
    recipe_values["data"]["packing"] = False
    recipe_values["objective"] = [{"term": "policy"}]
    recipe_values["evaluate"] = {"baseline": False}
    result = quiet_run(recipe_values)
    assert set(result.summary["rows"]) == {"student"}  # a teacher that is made of the student is not measured
    load_model(str(result.directory / "student"), "student")
