"""A search of shapes: what is compared, in which order, and what of it a recipe gets."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, PretrainedConfig

from conftest import make_llama
from potstill.errors import RecipeError
from potstill.models.budget import Budget
from potstill.models.candidates import SIZES, Candidates, next_shape
from potstill.models.design import TOLERANCE, design
from potstill.models.shapes import design_shape
from potstill.models.size import count_parameters, size_of
from potstill.runs import build_student, search
from potstill.runs.build import build_run
from potstill.runs.config.run import Recipe
from potstill.runs.run import run, settle_student
from potstill.runs.search import plan_search, search_shape
from reference_students import sizes

TEACHER = LlamaConfig(**sizes(500, 256, 704, 6, 4, 2))
BUDGET = 2_000_000
QUIET = Console(file=io.StringIO())


def distance(one: Any, other: Any) -> float:
    return sum(abs(math.log(getattr(one, size) / getattr(other, size))) for size in SIZES)


@cache
def some_candidates() -> Candidates:
    return Candidates(TEACHER, design(TEACHER, BUDGET), "balanced")


def test_candidates_have_the_budget_and_differ_in_all_sizes() -> None:
    first, candidates = design(TEACHER, BUDGET), some_candidates()
    assert candidates.shapes[0] == design_shape(first)
    counts = [count_parameters(candidates.config(shape)) for shape in candidates.shapes]
    assert all(abs(count / counts[0] - 1) < TOLERANCE for count in counts)
    for size in SIZES:
        assert len({getattr(shape, size) for shape in candidates.shapes}) > 1, size
    whole = design_shape(TEACHER)
    for shape in candidates.shapes:
        assert shape.heads % shape.kv_heads == 0
        assert shape.head_size == whole.head_size
        assert all(getattr(shape, size) <= getattr(whole, size) for size in SIZES)


@pytest.mark.parametrize("limit", ["memory_gb", "latency_ms"])
def test_shapes_that_are_measured_meet_limits_on_cost_too(limit: str) -> None:
    def seconds(config: PretrainedConfig, tokens: int) -> float:
        assert tokens == 512
        return size_of(config, tokens).flops_per_token / 1e9

    def cost(config: PretrainedConfig) -> float:
        return 1000 * seconds(config, 512) if limit == "latency_ms" else size_of(config, 512).serve_bytes / 1e9

    most = 0.5 * cost(TEACHER)
    budget = Budget(**{limit: most}, context=512)  # type: ignore[arg-type]  # both are numbers
    candidates = Candidates(TEACHER, budget.student(TEACHER, seconds=seconds), "balanced")
    over = [*candidates.shapes]
    allows = partial(budget.allows, teacher=TEACHER, seconds=seconds)
    search_ = search._Search(*[cast(Any, None)] * 2, candidates, allows, *[cast(Any, None)] * 2)
    measured: dict[Any, float] = {}
    while shape := search_.next_shape(measured, len(over)):
        measured[shape] = 1.0
    costs = {shape: cost(candidates.config(shape)) for shape in over}
    assert max(costs.values()) > most
    assert {*measured} == {shape for shape in over if shape == over[0] or costs[shape] <= most}
    assert 1 < len(measured) < len(over)


def test_shapes_are_spread_at_first_and_then_near_the_best() -> None:
    shapes = some_candidates().shapes
    assert next_shape(shapes, {}, 6) == shapes[0]
    second = next_shape(shapes, {shapes[0]: 2.0}, 6)
    assert second is not None
    assert distance(second, shapes[0]) == max(distance(shape, shapes[0]) for shape in shapes)
    losses = {shapes[0]: 2.0, second: 1.0}
    third = next_shape(shapes, losses, 4)
    assert third is not None
    assert third not in losses
    assert distance(third, second) <= distance(third, shapes[0])
    assert next_shape(shapes[:2], dict.fromkeys(shapes[:2], 1.0), 4) is None


def test_the_best_are_trained_in_rounds() -> None:
    assert plan_search(8, 1000).rounds == ((4, 30), (2, 60))
    assert plan_search(2, 10).rounds == ((2, 8),)
    assert plan_search(3, 10**6).rounds == ((2, 50),)


@pytest.fixture
def searched(recipe_values: dict[str, Any]) -> dict[str, Any]:
    recipe_values["student"] = {"design": {"params": 6500, "search": 2}, "initialize": "prune"}
    recipe_values["evaluate"] = {"continuations": 0}
    return recipe_values


@pytest.mark.slow
def test_a_run_takes_the_best_shape_and_a_killed_search_goes_on(
    searched: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, directory = Recipe.parse(searched), Path(searched["output"])
    measured: list[tuple[Any, int]] = []
    losses = search._Search._loss

    def pruned(self: Any, shape: Any) -> float:
        measured.append((shape, 0))
        if len(measured) == 2:
            raise KeyboardInterrupt
        return losses(self, self.student(shape)())

    monkeypatch.setattr(search._Search, "pruned_loss", pruned)
    with pytest.raises(KeyboardInterrupt):
        search_shape(recipe, directory, QUIET)
    result = run(recipe, resume=True, console=QUIET)
    assert [shape for shape, _ in measured].count(measured[0][0]) == 1
    record = json.loads((directory / "search.json").read_text())
    assert len(record["shapes"]) == 2
    final = [
        row for row in record["shapes"] if row["losses"][-1][0] == max(r["losses"][-1][0] for r in record["shapes"])
    ]
    assert len(final) == 2
    chosen = record["shapes"][record["chosen"]]
    assert chosen["losses"][-1][1] == min(row["losses"][-1][1] for row in final)
    config = json.loads((directory / "student" / "config.json").read_text())
    assert {name: config[name] for name in chosen["design"]} == chosen["design"]
    assert result.summary["rows"]["student"]["parameters"] == chosen["parameters"]
    (note,) = (note for note in result.summary["notes"] if note.startswith("student.design.search:"))
    assert note.count("layers of width") == 2
    assert "<svg" in (directory / "search.html").read_text()
    assert not (directory / "search-parts.json").exists()
    run(recipe, resume=True, console=QUIET)
    assert len(measured) == 3


def test_a_finished_search_is_of_its_data_and_of_steps_of_as_many_rows(
    searched: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {"design": {"num_hidden_layers": 1}, "parameters": 1, "losses": [(0, 1.0)], **vars(design_shape(TEACHER))}
    searches = list[Any]()

    def found(recipe: Recipe, directory: Path, request: Any, console: Console) -> dict[str, Any]:
        searches.append(request)
        return {"request": request, "rows": 1, "chosen": 0, "shapes": [shape]}

    monkeypatch.setattr(search, "_search", found)
    monkeypatch.setattr(search, "write_search_report", lambda directory: None)
    directory, data = Path(searched["output"]), Path(searched["output"]).with_name("train.jsonl")
    data.write_text(Path(searched["data"]["train"]["path"]).read_text())
    searched["data"]["train"]["path"] = str(data)
    directory.mkdir()
    search_shape(Recipe.parse(searched), directory, QUIET)
    searched["train"] |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    os.utime(data, (0, 0))  # as in a copy on another machine
    search_shape(Recipe.parse(searched), directory, QUIET)
    assert len(searches) == 1
    data.write_text(data.read_text() + json.dumps({"text": "another row"}) + "\n")
    search_shape(Recipe.parse(searched), directory, QUIET)
    assert len(searches) == 2


def test_a_search_gives_losses_of_the_same_step() -> None:
    sizes = vars(design_shape(TEACHER))
    rows = [{**sizes, "parameters": 9, "losses": losses} for losses in ([(0, 6.0), (8, 7.5)], [(0, 7.0)])]
    note = search._note({"chosen": 0, "rows": 4, "shapes": rows})
    assert "7.500 after 8 steps, 9 parameters" in note
    assert note.endswith(": 7.000 pruned (6.000).")  # at the end it has more than that


def test_importance_is_measured_once_and_gives_the_student_of_a_plain_recipe(
    searched: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    measure = search.measure_importance
    monkeypatch.setattr(search, "measure_importance", lambda *a: (calls.append(1), measure(*a))[1])
    found = search._Search.build(Recipe.parse(searched))
    shapes = found.candidates.shapes[:2]
    students = [found.student(shape)() for shape in shapes]
    assert len(calls) == 1
    searched["student"]["design"] = found.design(shapes[1])
    plain = build_run(Recipe.parse(searched)).new_student()
    assert plain.config.to_dict() == students[1].config.to_dict()
    assert not {*map(str, found.train["input_ids"])} & {*map(str, found.scored["input_ids"])}
    with torch.no_grad():
        loss = found.pruned_loss(shapes[0])
        rows = [torch.tensor([row["input_ids"]]) for row in found.scored]
        nats = [students[0].eval().double()(ids, labels=ids).loss * (ids.shape[1] - 1) for ids in rows]
    assert loss == pytest.approx(float(sum(nats)) / sum(ids.shape[1] - 1 for ids in rows), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"initialize": "random"}, "expected initialize: prune with design.search, got random"),
        ({"initialize": {"method": "prune", "layers": [0]}}, "expected a choice of layers such as importance"),
    ],
)
def test_a_search_without_weights_or_with_fixed_layers_is_refused(
    searched: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    searched["student"] |= changes
    with pytest.raises(RecipeError, match=message):
        Recipe.parse(searched)


def test_fewer_shapes_than_requested_are_reported(searched: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    searched["student"]["design"]["search"] = 50
    shown = io.StringIO()
    for name in ("pruned_loss", "trained_loss"):
        monkeypatch.setattr(search._Search, name, lambda *_: 1.0)
    search_shape(Recipe.parse(searched), Path(searched["output"]), Console(file=shown, width=200))
    assert "student.design.search: 2 shapes have this size, fewer than 50." in shown.getvalue()


def test_a_teacher_of_several_models_is_refused(searched: dict[str, Any], toys: Path) -> None:
    searched["teacher"] = {"ensemble": [{"model": str(toys / "teacher")}, {"model": str(toys / "teacher")}]}
    with pytest.raises(RecipeError, match=r"student\.design\.search: expected a teacher that is one model"):
        search_shape(Recipe.parse(searched), Path(searched["output"]), QUIET)


def test_a_search_is_of_the_files_that_it_read(
    searched: dict[str, Any], toys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed one goes on with the same alone, and so does a run whose search is done."""
    calls: list[Any] = []
    monkeypatch.setattr(search._Search, "pruned_loss", lambda self, shape: calls.append(shape) or 1.0)
    monkeypatch.setattr(search._Search, "trained_loss", lambda self, shape, steps: 1.0)
    directory = Path(searched["output"])
    rows = directory.parent / "train.jsonl"
    shutil.copy(toys / "train.jsonl", rows)
    searched["data"]["train"]["path"] = str(rows)
    for _ in range(2):
        search_shape(Recipe.parse(searched), directory, QUIET)
        assert len(calls) == 2
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[1:]))
    search_shape(Recipe.parse(searched), directory, QUIET)
    assert len(calls) == 4


def test_a_timed_shape_is_kept_for_a_run_that_goes_on(
    searched: dict[str, Any], toys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speed = 1e-9  # seconds of a parameter

    def seconds(config: PretrainedConfig, tokens: int) -> float:
        assert tokens == 32
        return count_parameters(config) * speed

    monkeypatch.setattr(build_student, "forward_seconds", seconds)
    searched["student"]["design"] = {"latency_ms": 7e-3, "context": 32}
    recipe, directory = Recipe.parse(searched), Path(searched["output"])
    assert any(note.startswith("student.design.latency_ms: ") for note in build_run(recipe).notes)
    settled, notes = settle_student(recipe, directory, QUIET, resume=False)
    assert notes[0].startswith("student.design.latency_ms: ")
    assert "took at most 0.007 ms" in notes[0]
    student = build_run(settled).new_student()
    assert 6300 <= count_parameters(student.config) <= 7000
    speed = 1.2e-9  # another machine
    teacher = Path(shutil.copytree(toys / "teacher", directory.parent / "teacher"))
    changed = Recipe.parse({**searched, "teacher": {"model": str(teacher)}})
    first, _ = settle_student(changed, directory.parent / "changed", QUIET, resume=False)
    make_llama(layers=1, seed=1).save_pretrained(teacher)
    assert settle_student(changed, directory.parent / "changed", QUIET, resume=False)[0].student != first.student
    again, _ = settle_student(recipe, directory, QUIET, resume=True)
    assert again.student == settled.student
    other, _ = settle_student(recipe, directory / "other", QUIET, resume=False)
    assert other.student != settled.student
