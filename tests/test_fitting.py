"""Layers that are fitted to the teacher's hidden states: nothing where nothing is wrong, else the least squares."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, LlamaConfig, LlamaForSequenceClassification

from conftest import make_batch
from potstill.models.design import student_config
from potstill.models.fitting import HELD_OUT, RIDGES, fit_layers
from potstill.models.initialize import Initialization, plan_initialization
from potstill.models.pruning import whole_layers
from potstill.models.shapes import design_shape
from potstill.models.structure import find_structure, is_transposed
from potstill.runs import build_student
from test_initialize import BATCH, KINDS, LAYERS, SIZES, logits, model

ADDING = ["llama", "llama, tied", "qwen2", "qwen3", "gpt2", "gemma2"]  # families whose layers end in a sum
BATCHES = [{k: v for k, v in make_batch(4, 12, 60, seed=seed).items() if k != "labels"} for seed in range(16)]


def planned(
    teacher: Any, method: Any = "copy", fit: bool = True, batches: Any = BATCHES, **changes: Any
) -> Initialization:
    config = student_config(teacher.config, changes, 60)
    return plan_initialization(teacher, config, method, layers="uniform", fit=fit, calibration=lambda: batches)


def divergence(teacher: torch.Tensor, student: torch.Tensor) -> float:
    kept = BATCH["attention_mask"].bool()
    of_teacher, of_student = teacher.log_softmax(-1)[kept], student.log_softmax(-1)[kept]
    return float((of_teacher.exp() * (of_teacher - of_student)).sum(-1).mean())


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_of_the_teachers_function_stays_as_it_is(kind: str) -> None:
    teacher = model(kind)
    plan = planned(teacher, "prune")
    assert not plan.changed
    assert torch.equal(logits(plan.student(teacher, 0)), logits(teacher))


@pytest.mark.parametrize("kind", ADDING)
def test_fitted_layers_are_nearer_to_the_teacher(kind: str) -> None:
    teacher = model(kind)
    fewer = {LAYERS.get(kind, "num_hidden_layers"): 3}
    fitted, copied = planned(teacher, **fewer), planned(teacher, fit=False, **fewer)
    assert "are fitted to the larger model's hidden states: on held-out rows the student's KL to it" in fitted.notes[-1]
    assert len(fitted.changed) >= 1
    of_teacher = logits(teacher)
    before, after = (divergence(of_teacher, logits(plan.student(teacher, 0))) for plan in (copied, fitted))
    assert after < 0.8 * before


def builder_of(source: Any, **train: Any) -> Any:
    recipe = SimpleNamespace(train=train, teacher=SimpleNamespace(model_device=torch.device("cpu")))
    return SimpleNamespace(recipe=recipe, source=source)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_layers_are_fitted_in_half_precision(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(build_student, "has_bfloat16", lambda: True)
    teacher = model(kind)
    fewer = {LAYERS.get(kind, "num_hidden_layers"): 3}
    whole = planned(teacher, "prune", **fewer)
    with build_student.calibration_precision(builder_of(teacher, bf16=True)):
        half, same = planned(teacher, "prune", **fewer), planned(teacher, "prune")
    assert not same.changed
    assert {weight.dtype for weight in half.changed.values()} == {torch.float32}
    of_teacher = logits(teacher)
    first, second = (divergence(of_teacher, logits(plan.student(teacher, 0))) for plan in (whole, half))
    assert second == pytest.approx(first, rel=0.02)
    assert any(not torch.equal(weight, whole.changed[name]) for name, weight in half.changed.items())


def test_experts_and_other_trainings_are_calibrated_in_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_student, "has_bfloat16", lambda: True)
    experts = SimpleNamespace(config=CONFIG_MAPPING["mixtral"](num_local_experts=4))
    for builder in builder_of(model("llama")), builder_of(experts, bf16=True):
        with build_student.calibration_precision(builder):
            assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_first_layer_is_the_weighted_least_squares_solution(kind: str) -> None:
    teacher = model(kind)
    name = LAYERS.get(kind, "num_hidden_layers")
    copied, fitted = (planned(teacher, fit=fit, **{name: 3}).student(teacher, 0).eval() for fit in (False, True))
    structure, after = find_structure(copied), find_structure(fitted)
    matrix, changed = (x.layers[0].get_submodule(x.matrices.down) for x in (structure, after))

    def regression(batches: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Features and errors of the first layer, relative to the teacher's state in front of its layer 2."""
        features, errors = [], []
        for batch in batches:
            seen: list[torch.Tensor] = []
            with torch.no_grad(), matrix.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0])):
                target = teacher(**batch, output_hidden_states=True).hidden_states[2]
                output = copied(**batch, output_hidden_states=True).hidden_states[1]
            kept = batch["attention_mask"].bool()
            size = target[kept].norm(dim=-1, keepdim=True)
            features.append(seen[0][kept] / size)
            errors.append((target - output)[kept] / size)
        return torch.cat(features).double(), torch.cat(errors).double()

    held_out = [batch for i, batch in enumerate(BATCHES) if i % HELD_OUT == HELD_OUT - 1]
    x, y = regression([batch for i, batch in enumerate(BATCHES) if i % HELD_OUT != HELD_OUT - 1])
    x_out, y_out = regression(held_out)
    solutions = []
    for ridge in RIDGES:
        penalty = (ridge * x.square().sum(0).mean()).sqrt() * torch.eye(x.shape[1], dtype=torch.float64)
        zeros = y.new_zeros(x.shape[1], y.shape[1])
        solutions.append(torch.linalg.lstsq(torch.cat([x, penalty]), torch.cat([y, zeros])).solution)
    best = min(solutions, key=lambda change: float((y_out - x_out @ change).square().sum()))
    actual = changed.weight - matrix.weight
    assert torch.allclose((actual if is_transposed(matrix) else actual.T).double(), best, atol=2e-4)


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_a_norm_behind_the_sum_is_not_fitted(kind: str) -> None:
    assert not planned(model(kind), **{LAYERS.get(kind, "num_hidden_layers"): 3}).changed


def test_units_that_do_nothing_leave_nothing_to_fit() -> None:
    teacher = model("llama")
    structure = find_structure(teacher)
    with torch.no_grad():
        for layer in structure.layers:
            layer.get_submodule("mlp.up_proj").weight[16:] = 0
    plan = planned(teacher, "prune", intermediate_size=16)
    assert torch.allclose(logits(plan.student(teacher, 0)), logits(teacher), atol=1e-4)


def test_one_batch_is_too_little_to_fit() -> None:
    assert not planned(model("llama"), batches=BATCHES[:1], num_hidden_layers=3).changed


def test_the_teacher_is_left_as_it_was() -> None:
    teacher = model("llama").train()
    before = logits(teacher)
    teacher.train()
    planned(teacher, num_hidden_layers=3)
    assert teacher.training and "forward" not in vars(find_structure(teacher).layers[0])
    assert torch.equal(logits(teacher), before)


def test_a_teacher_with_nan_is_left_to_its_own_message() -> None:
    teacher = model("llama")
    with torch.no_grad():
        find_structure(teacher).layers[1].get_submodule("mlp.up_proj").weight[0, 0] = torch.nan
    assert not planned(teacher, num_hidden_layers=3).changed


@pytest.mark.parametrize("classes", [1, 3])
def test_classifiers_are_fitted_too(classes: int) -> None:
    config = LlamaConfig(**SIZES, num_labels=classes)
    torch.manual_seed(0)
    teacher = LlamaForSequenceClassification(config).eval()
    for parameter in teacher.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    student = LlamaForSequenceClassification(student_config(config, {"num_hidden_layers": 3}, 60)).eval()
    parts = whole_layers(design_shape(config), [0, 2, 4])
    found = fit_layers(teacher, student, parts, BATCHES)
    assert found is not None
    assert found.errors[1] < found.errors[0]
    assert (found.kl is None) == (classes == 1)


def test_long_rows_are_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_student, "CALIBRATION_TOKENS", 1000)
    part = SimpleNamespace(calibration_rows=40)
    recipe = SimpleNamespace(student=SimpleNamespace(initialize=part), teacher=SimpleNamespace(model_device="cpu"))
    source = SimpleNamespace(to=lambda device: None)
    builder: Any = SimpleNamespace(recipe=recipe, source=source, tokenizer=None)
    monkeypatch.setattr(build_student, "in_batches", lambda rows, *_: [*rows])
    numbers = {}
    for length in (10, 50, 500):
        train: Any = [{"input_ids": [0] * length}] * 60
        numbers[length] = len(build_student.calibration_batches(builder, train))  # type: ignore[arg-type]
    assert numbers == {10: 40, 50: 20, 500: 16}
