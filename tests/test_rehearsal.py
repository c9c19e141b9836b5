"""A run fails before its training in all that could fail after it, and `check` finds the same."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from conftest import make_llama, quiet_run
from potstill.errors import ModelError, RecipeError, RunError
from potstill.models.capture import ActivationCapture
from potstill.models.placement import device_bytes
from potstill.runs import map_memory, steps
from potstill.runs.build import build_run, piece
from potstill.runs.check import check
from potstill.runs.config.run import Recipe


def refused_before_training(values: dict[str, Any], kind: type[Exception], message: str) -> None:
    """Check and run raise the same error, and nothing is left of either."""
    output = Path(values["output"])
    before = set(output.parent.iterdir())
    for attempt in (check, quiet_run):
        with pytest.raises(kind, match=message):
            attempt(Recipe.parse(values) if attempt is check else values)  # type: ignore[arg-type]
        assert set(output.parent.iterdir()) == before


@pytest.mark.parametrize("place", range(len(steps.STEPS)), ids=[step.name for step in steps.STEPS])
def test_each_step_is_tried_before_the_training(
    place: int, recipe_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise KeyError("injected")

    step = steps.STEPS[place]
    broken = (*steps.STEPS[:place], step._replace(do=fail), *steps.STEPS[place + 1 :])
    monkeypatch.setattr(steps, "STEPS", broken)
    refused_before_training(recipe_values, RunError, f"the step '{step.name}' to work .* KeyError: 'injected'")


# What the steps call, by the module that calls it.
CALLED = [
    "train.hf_trainer.save_student",  # checkpoints and the student
    "train.hf_trainer.restore",  # resuming
    "train.checkpoints.load_file",  # reading what a checkpoint has beside the student
    "runs.steps.merged",
    "runs.measure.load_model",  # reading back what was saved
    "runs.measure.restore_teacher",
    "runs.measure.measure_rows",
    "runs.measure.latencies",
    "runs.measure.bytes_on_disk",
    "runs.measure.parameter_count",
    "runs.measure.continuation",
    "runs.measure.versions",
    "runs.steps.write_summary",
    "runs.steps.write_student_card",
    "runs.steps.write_report",
    "evaluate.report.page.pictures.curves",
    "evaluate.report.page.verdict",
]


@pytest.mark.parametrize("name", CALLED)
def test_a_failure_in_a_later_step_is_found_before_the_training(
    name: str, recipe_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise ValueError("injected")

    recipe_values["evaluate"] = {"baseline": False, "continuations": 1}
    if name == "runs.steps.merged":
        recipe_values["student"] = {
            "model": recipe_values["teacher"]["model"],
            "adapter": {"kind": "lora", "merge": True},
        }
    if name == "train.checkpoints.load_file":  # a term that trains a projection
        recipe_values["objective"].append({"term": "hidden", "layers": {"last_k": 1}})
    holder, _, attribute = f"potstill.{name}".rpartition(".")
    try:
        owner = importlib.import_module(holder)
    except ModuleNotFoundError:
        parent, _, inner = holder.rpartition(".")
        owner = getattr(importlib.import_module(parent), inner)
    monkeypatch.setattr(owner, attribute, fail)
    refused_before_training(recipe_values, RunError, "got ValueError: injected. Nothing was trained")


def test_the_rehearsal_changes_nothing_of_the_run(
    recipe_values: dict[str, Any], toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = [{"model": str(toys / "teacher")}, {"model": str(toys / "student")}]
    recipe_values["teacher"] = {"ensemble": members, "weights": "learned"}
    recipe_values["student"] = {"model": str(toys / "student")}
    recipe_values["objective"].append({"term": "hidden", "layers": {"last_k": 1}})  # trains a projection
    recipe_values["rollout"] = {"max_new_tokens": 8, "replay": {"size": 4}}
    recipe_values["evaluate"]["baseline"] = False
    rehearsed = quiet_run(recipe_values)
    monkeypatch.setattr("potstill.runs.run.rehearse", lambda built, student: [])
    alone = quiet_run(recipe_values | {"output": str(tmp_path / "alone")})
    assert rehearsed.summary["teacher_weights"] == alone.summary["teacher_weights"]
    weights, expected = (load_file(done.directory / "student" / "model.safetensors") for done in (rehearsed, alone))
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


def test_a_learning_rate_that_is_too_high_is_left_to_the_training(recipe_values: dict[str, Any]) -> None:
    recipe_values["train"] |= {"learning_rate": 1e30, "max_grad_norm": 0.0, "optim": "sgd"}
    assert check(Recipe.parse(recipe_values)).seconds > 0


def test_an_output_that_cannot_be_written_is_found_by_check(recipe_values: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    recipe_values["output"] = str(tmp_path / "file")
    with pytest.raises(RecipeError, match=r"output: expected a directory to write to, got .*Not a directory"):
        check(Recipe.parse(recipe_values))


def test_a_rehearsal_is_not_reported_to_trackers(
    recipe_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    class Tracker(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(state.global_step)

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tracker", Tracker)
    recipe_values["evaluate"]["baseline"] = False
    recipe_values["train"] |= {"report_to": "tracker", "max_steps": 2}
    check(Recipe.parse(recipe_values))
    assert not seen
    quiet_run(recipe_values)
    assert {*seen} == {1, 2}
    recipe_values["train"]["report_to"] = "no_such_tracker"
    with pytest.raises(
        RecipeError, match=r"train\.report_to: expected trackers that are installed, got no_such_tracker"
    ):
        check(Recipe.parse(recipe_values | {"output": recipe_values["output"] + "2"}))


def test_a_teacher_that_lacks_a_head_is_an_error_of_its_own(recipe_values: dict[str, Any]) -> None:
    recipe_values["teacher"]["model"] = "./nowhere"
    with pytest.raises(ModelError, match=r"teacher\.model"):
        check(Recipe.parse(recipe_values))


def test_pieces_of_rows_have_targets() -> None:
    row = {"input_ids": [*range(100)], "labels": [-100] * 70 + [*range(30)]}
    short = piece(row, 32)
    assert short["input_ids"] == [*range(54, 86)]
    assert short["labels"][16:] == [*range(16)]
    plain = {"input_ids": [*range(100)], "labels": [*range(100)]}
    assert piece(plain, 32)["input_ids"] == [*range(32)]
    assert piece({name: values[:9] for name, values in plain.items()}, 32)["input_ids"] == [*range(9)]


def test_a_time_limit_ends_the_measurement_with_a_note_in_the_report(recipe_values: dict[str, Any]) -> None:
    recipe_values["evaluate"] = {"baseline": False, "time_limit": 1e-6, "continuations": 3}
    result = quiet_run(recipe_values)
    data, latency = result.summary["data"], result.summary["latency"]
    assert 0 < data["eval_measured"] < data["eval_examples"]
    assert latency["teacher"]["passes"] == latency["student"]["passes"] == 1
    (note,) = [note for note in result.summary["notes"] if "evaluate.time_limit" in note]
    rows = f"{data['eval_measured']} of {data['eval_examples']} held-out rows"
    assert rows in note
    assert "1 of 15 passes for the latency" in note
    assert "1 of 3 continuations" in note
    page = (result.directory / "report.html").read_text()
    assert rows in page
    assert "the median and the middle half of 1 passes with the models in turn" in page


def test_models_are_timed_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    from potstill.evaluate.speed import latencies

    order: list[str] = []
    models = {"teacher": make_llama(), "student": make_llama(hidden_size=8)}
    for name, model in models.items():
        model.register_forward_pre_hook(lambda *_, name=name: order.append(name))
    found = latencies(models, 8, repeats=5)
    assert order == ["teacher", "student"] * 8
    assert found["teacher"].passes == 5
    assert found["teacher"].low_ms <= found["teacher"].median_ms <= found["teacher"].high_ms


@pytest.mark.parametrize("term", ["attention", "relations"])
def test_maps_that_memory_cannot_hold_are_refused(
    recipe_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, term: str
) -> None:
    values = recipe_values | {"objective": [{"term": "logits"}, {"term": term, "layers": {"last_k": 1}}]}
    built = build_run(Recipe.parse(values))
    shapes = ActivationCapture(built.new_student()).shape, built.teacher.shape
    heads = sum(shape.heads for shape in shapes) if term == "attention" else 3 * 2 * shapes[1].heads
    rows, tokens = built.plan.batch_rows, values["data"]["max_length"]
    needed = 4 * heads * rows * tokens**2
    monkeypatch.setattr(map_memory, "device_bytes", lambda device: needed)
    map_memory.check_map_memory(built, built.new_student())
    monkeypatch.setattr(map_memory, "device_bytes", lambda device: needed - 1)
    message = rf"objective\.1: .* got at least [\d.]+ [kM]B for a batch of {rows} x {tokens} tokens, .* Lower data.max_"
    refused_before_training(values, RecipeError, message)


def test_the_memory_of_this_machine() -> None:
    assert device_bytes(torch.device("meta")) is None
    assert (device_bytes(torch.device("cpu")) or 2**30) >= 2**30
