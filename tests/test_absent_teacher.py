"""A teacher whose model is not here: what can be measured of it is, and what cannot is left out."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console
from torch import Tensor

from potstill.cli.run import show_result
from potstill.losses.alignment import Alignment
from potstill.losses.target_statistics import top_tokens
from potstill.losses.targets import DenseTargets
from potstill.runs import check as preflight
from potstill.runs import run as pipeline
from potstill.runs.build import build_run
from potstill.runs.config.run import Recipe
from potstill.teachers.teacher import Teacher, TeacherOutput


class Absent(Teacher):
    """Another teacher, with the log-probabilities of the labels or with a few tokens of each distribution alone."""

    def __init__(self, teacher: Teacher, has_label_log_probs: bool) -> None:
        self.teacher, self.has_label_log_probs = teacher, has_label_log_probs

    def __call__(self, batch: Mapping[str, Tensor], alignment: Alignment) -> TeacherOutput:
        logits = self.teacher(batch, alignment).targets.dense()
        label_log_probs = logits.log_softmax(-1).gather(-1, alignment.labels[:, None])[:, 0]
        if self.has_label_log_probs:
            return TeacherOutput(DenseTargets(logits), label_log_probs)
        return TeacherOutput(top_tokens(DenseTargets(logits), 8))


@pytest.fixture(params=[True, False], ids=["label log-probs", "top 8"])
def has_label_log_probs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Every recipe is prepared with a teacher that is not here."""

    def absent(recipe: Recipe) -> Any:
        built = build_run(recipe)
        return replace(built, teacher=Absent(built.teacher, request.param), loaded=replace(built.loaded, model=None))

    for module in (pipeline, preflight):
        monkeypatch.setattr(module, "build_run", absent)
    return bool(request.param)


def test_a_run_reports_what_it_can_measure(
    recipe_values: dict[str, Any], toys: Any, has_label_log_probs: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe_values["student"] = {"model": str(toys / "student")}
    console = Console(file=io.StringIO())
    result = pipeline.run(Recipe.parse(recipe_values), console=console)
    rows = result.summary["rows"]
    assert rows["student"]["loss"] > 0
    for row in rows.values():
        assert row["agreement"] is None
        assert row["kl"] is None
    assert result.summary["kl_by_position"] is None
    assert list(result.summary["continuations"][0]) == ["prompt", "truth", "baseline", "student"]
    assert ("teacher" in rows) == has_label_log_probs
    if has_label_log_probs:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipeline, "build_run", build_run)
            live = pipeline.run(Recipe.parse(recipe_values | {"output": recipe_values["output"] + "-live"}))
        expected = live.summary["rows"]["teacher"]["loss"]
        assert rows["teacher"] == dict.fromkeys(rows["student"]) | {"loss": pytest.approx(expected, rel=1e-6)}
        curves = [summary["curve"]["teacher_loss"] for summary in (result.summary, live.summary)]
        assert curves[0] == pytest.approx(curves[1], rel=1e-6)
    show_result(result)
    assert "None" not in capsys.readouterr().out
    report = (result.directory / "report.html").read_text()
    assert "Held-out loss" in report
    for missing in ("Top-1 agreement", "KL to the teacher", ">None<", "nan"):
        assert missing not in report


def test_check_needs_no_local_teacher(recipe_values: dict[str, Any], toys: Any, has_label_log_probs: bool) -> None:
    recipe_values["student"] = {"model": str(toys / "student")}
    found = preflight.check(Recipe.parse(recipe_values))
    assert found.built.loaded.model is None
    assert found.memory_bytes > 0
