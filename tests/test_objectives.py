"""Terms of a recipe: built, checked before training, and run."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from conftest import make_batch, make_llama
from potstill.cli import app
from potstill.errors import ModelError, RecipeError, ShapeError, UserError
from potstill.losses import schedule
from potstill.losses.alignment import attended_positions, target_positions
from potstill.models.layer_map import LayerMap
from potstill.runs.build import build_run
from potstill.runs.check import check
from potstill.runs.config.run import Recipe
from potstill.runs.run import run
from potstill.teachers.dimensions import important_dimensions
from potstill.teachers.model import ModelTeacher
from potstill.train.distiller import Distiller
from potstill.train.objective import Objective
from potstill.train.terms.layers import Attention, Hidden
from potstill.train.terms.logits import Labels, Logits

EVERY = [
    {"term": "logits", "tokens": "entropy", "share": {"schedule": "linear", "start": 0.2, "end": 1.0}, "top_k": 20},
    {"term": "labels", "weight": 0.5},
    {"term": "bild"},
    {"term": "adaptive_kl"},
    {"term": "taid"},
    {"term": "hidden", "layers": "uniform", "projection": "mlp", "distance": "cosine"},
    {"term": "hidden", "layers": [[-1, -1]], "select_batches": 2},
    {"term": "hidden", "layers": {"skip": 2}, "distance": "cka"},
    {"term": "attention", "layers": {"last_k": 1}, "divergence": "jsd", "heads": "learned"},
    {"term": "relations", "of": ["values"], "heads": 4},
    {"term": "similarity", "kind": "distribution", "temperature": 0.2, "divergence": "reverse_kl"},
]


def recipe(values: dict[str, Any], objective: list[Any]) -> Recipe:
    return Recipe.parse({**values, "objective": objective, "evaluate": {"baseline": False, "continuations": 0}})


def test_every_term_runs_from_a_recipe(recipe_values: dict[str, Any]) -> None:
    result = run(recipe(recipe_values, EVERY), console=Console(file=io.StringIO()))
    assert (result.directory / "student/model.safetensors").exists()
    assert not (result.directory / "student/objective.safetensors").exists()
    objective = result.summary["objective"]
    assert "select_batches 2" in objective
    assert "relations" in objective
    assert check(recipe({**recipe_values, "output": recipe_values["output"] + "2"}, EVERY)).seconds > 0


@pytest.mark.parametrize(
    ("term", "message"),
    [
        ({"term": "hidden", "layers": [[0, 7]]}, r"objective\.1: LayerMap: .* teacher has 2 layers, got 7"),
        ({"term": "attention", "layers": {"last_k": 2}}, r"objective\.1: LayerMap: .* student has 1 layers, got -2"),
        ({"term": "hidden", "projection": "none"}, r"objective\.1: Projection: expected equal widths"),
        ({"term": "relations", "heads": 99}, r"objective\.1: Relations: expected heads in 1\.\.8"),
        ({"term": "hidden", "layers": [[0, 7]], "select_batches": 1}, "teacher has 2 layers, got 7"),
    ],
)
def test_terms_that_do_not_fit_are_refused_before_training(
    recipe_values: dict[str, Any], term: dict[str, Any], message: str
) -> None:
    with pytest.raises((RecipeError, ShapeError), match=message):
        build_run(recipe(recipe_values, [{"term": "logits"}, term]))


def test_important_dimensions_are_those_of_the_loss() -> None:
    model, batches = make_llama(seed=1).requires_grad_(False), [make_batch(seed=s) for s in (0, 1)]
    picked = important_dimensions(model, batches, [-1, 0], 5)
    assert list(picked) == [1, 0]
    total = torch.zeros(16)
    for batch in batches:
        states = model.model.embed_tokens(batch["input_ids"]).requires_grad_()
        inputs = {"inputs_embeds": states, "attention_mask": batch["attention_mask"]}
        kept: list[torch.Tensor] = []

        def keep(_: Any, __: Any, output: torch.Tensor, kept: list[torch.Tensor] = kept) -> None:
            kept.append(output)

        handle = model.model.layers[0].register_forward_hook(keep)
        there = target_positions(batch["labels"])
        logits = model(**inputs).logits[:, :-1][there]
        handle.remove()
        loss = torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:][there], reduction="sum")
        (gradient,) = torch.autograd.grad(loss, kept)
        total += gradient[attended_positions(batch)].abs().sum(0)
    assert picked[0].tolist() == sorted(total.topk(5).indices.tolist())
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(ShapeError, match="as the teacher has 2 layers, got 2"):
        important_dimensions(model, batches, [2], 5)
    with pytest.raises(ShapeError, match=r"count in 1\.\.16"):
        important_dimensions(model, batches, [0], 17)


@pytest.mark.parametrize(
    ("term", "message"),
    [
        ({"term": "hidden"}, "cache: expected one with the layers that terms .* need, got one with targets alone"),
        ({"term": "bild"}, "bild: expected the teacher's whole distributions, got a few tokens"),
    ],
)
def test_terms_that_need_more_than_a_cache_holds_are_refused(
    recipe_values: dict[str, Any], tmp_path: Path, term: dict[str, Any], message: str
) -> None:
    recipe_values["teacher"]["cache"] = str(tmp_path / "cache")
    (tmp_path / "recipe.yaml").write_text(Recipe.parse(recipe_values).dump())
    built = CliRunner().invoke(app, ["cache", "build", str(tmp_path / "recipe.yaml"), "--codec", "top_k"])
    assert built.exit_code == 0, built.output
    with pytest.raises(UserError, match=message):
        build_run(recipe(recipe_values, [term]))
    weighed = [{"term": "logits", "tokens": "confident"}, {"term": "labels"}]
    assert run(recipe(recipe_values, weighed), console=Console(file=io.StringIO())).summary["rows"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Logits("reverse_kl"), r"Logits\.divergence: expected a Divergence such as ForwardKL\(\.\.\.\)"),
        (lambda: Hidden({0: 1}), r"Hidden\.layers: expected a LayerMap such as Uniform\(\.\.\.\), got \{0: 1\}"),
        (lambda: Attention(divergence="kl"), r"Attention\.divergence: expected a Divergence"),
        (lambda: Logits(weight="0.5"), r"Logits\.weight: expected a number >= 0, got '0\.5'"),
        (lambda: Distiller(make_llama(), make_llama(), Logits()), "Objective: expected a list of .* got one by itself"),
        (lambda: Distiller(make_llama(), [make_llama()], [Logits()]), "Distiller: expected a Teacher, .* got a list"),
        (lambda: Distiller(make_llama(), "teacher", [Logits()]), "Distiller: expected a Teacher, .* got a str"),
        (
            lambda: Distiller("student", make_llama(), [Logits()]),
            "Distiller: expected a model as the student, got a str",
        ),
        (lambda: Distiller(*[make_llama()] * 2, [Logits()]), "Distiller: expected another model .* got the student"),
        (lambda: Objective([Logits]), "Objective: expected a list of at least one term, got <class"),
        (lambda: Objective({"logits": 0.5}), "Objective: expected a list of at least one term, got 'logits'"),
        (lambda: ModelTeacher("teacher"), "ModelTeacher: expected a model, got a str"),
        (lambda: ModelTeacher(make_llama(), device="gpu"), r"teacher\.device: expected a device of this .* got gpu"),
        (lambda: ModelTeacher(make_llama(), device="cuda:99"), r"teacher\.device: expected a device of .* got cuda:99"),
        (lambda: Attention(normalize="no"), r"Attention\.normalize: expected true or false, got 'no'"),
        (lambda: Attention(heads=[0, 1]), r"Attention\.heads: expected pairs such as \[\(0, 1\), \(1, 3\)\], got 0"),
        (lambda: LayerMap.explicit([3, 7]), r"Explicit\.layers: expected pairs such as .* got 3"),
        (lambda: LayerMap.explicit([(0, 1, 2)]), r"Explicit\.layers: expected pairs such as .* got \(0, 1, 2\)"),
        (lambda: LayerMap.explicit([(0, 1.0)]).pairs(2, 2), r"expected teacher layers in -2\.\.1, .* got 1\.0"),
        (lambda: schedule.linear("4", 1.0, 10), r"Linear\.start: expected a number, got '4'"),
    ],
)
def test_what_a_term_or_a_distiller_cannot_take_is_refused_in_python(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_an_objective_takes_terms_from_a_generator() -> None:
    assert Objective(term for term in [Logits(), Labels()]).names == ["logits", "labels"]


def test_a_teacher_that_is_spread_over_devices_is_not_moved() -> None:
    model = make_llama()
    model.hf_device_map = {"model": 0, "lm_head": "cpu"}
    for options in ({"device": "cpu"}, {"dtype": torch.bfloat16}):
        with pytest.raises(ModelError, match="expected no device or dtype for a model that is spread, got one"):
            ModelTeacher(model, **options)
