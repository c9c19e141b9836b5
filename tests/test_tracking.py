"""What trackers show of a distillation: one run for each training, with teacher, objective and schedules."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from potstill.runs.config.run import Recipe
from potstill.runs.run import run
from potstill.train.tracking import own_run


@pytest.fixture
def recipe(recipe_values: dict[str, Any]) -> Recipe:
    linear = {"schedule": "linear", "start": 4.0, "end": 1.0, "steps": 4}
    recipe_values["objective"] = [
        {"term": "logits", "divergence": {"kind": "jsd", "beta": 0.3}, "temperature": linear},
        {"term": "labels", "weight": 0.5},
    ]
    recipe_values["train"] |= {"report_to": "tracker", "max_steps": 4}
    return Recipe.parse(recipe_values)


def test_each_training_is_a_run_with_its_teacher_objective_and_schedules(
    recipe: Recipe, toys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: dict[str, tuple[dict[str, Any], list[dict[str, float]]]] = {}

    class Tracker(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            runs[args.run_name] = args.to_dict(), []

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            runs[args.run_name][1].append(logs)

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tracker", Tracker)
    run(recipe, console=Console(file=io.StringIO()))
    assert list(runs) == ["toy student", "toy baseline"]
    config, logs = runs["toy student"]
    assert config["teacher"] == f"ModelTeacher {toys / 'teacher'}"
    assert (config["objective.0.term"], config["objective.0.divergence.beta"]) == ("logits", 0.3)
    assert (config["objective.0.temperature.end"], config["objective.1.weight"]) == (1.0, 0.5)
    assert config["data.train.path"] == str(toys / "train.jsonl")
    assert config["student.design.hidden_size"] == 8
    assert config["learning_rate"] == 1e-2
    assert [line["logits_temperature"] for line in logs if "loss" in line] == [4.0, 3.25, 2.5, 1.75]
    config, logs = runs["toy baseline"]
    assert config["teacher"] == "none"
    assert config["objective.0.term"] == "labels"
    assert "objective.1.term" not in config
    assert not any("temperature" in name for line in logs for name in line)


def test_a_training_has_its_own_run_of_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = SimpleNamespace(run=None, finish=lambda: finished.append(os.environ["WANDB_RUN_GROUP"]))
    finished: list[str] = []
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.delenv("WANDB_RUN_GROUP", raising=False)
    with own_run(["wandb"], "toy"):
        pass
    assert finished == ["toy"]
    assert "WANDB_RUN_GROUP" not in os.environ
    monkeypatch.setenv("WANDB_RUN_GROUP", "given")
    with own_run(["wandb"], "toy"):
        pass
    assert finished == ["toy", "given"]
    assert os.environ["WANDB_RUN_GROUP"] == "given"
    wandb.run = object()
    with own_run(["wandb"], "toy"):  # the user's own run goes on
        pass
    assert len(finished) == 2
