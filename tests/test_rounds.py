"""A student that is cut from a model of its own, and one that is cut in rounds with short trainings between."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import LlamaForSequenceClassification

from conftest import make_llama, make_tokenizer
from potstill.errors import RecipeError
from potstill.models.loading import load_model
from potstill.models.shapes import DesignShape
from potstill.runs import rounds
from potstill.runs.build import build_run
from potstill.runs.build_student import StudentBuilder
from potstill.runs.check import check
from potstill.runs.config.run import Recipe
from potstill.runs.rounds import prune_in_rounds, shapes_between
from potstill.runs.run import run
from potstill.runs.search import search_shape
from potstill.runs.steps import write_recipe

QUIET = Console(file=io.StringIO())


@pytest.fixture
def cut(recipe_values: dict[str, Any], tmp_path: Path, tokenizer: Any) -> dict[str, Any]:
    """A recipe whose student is the last two layers of a model that is not the teacher."""
    make_llama(hidden_size=24, layers=3, seed=5).save_pretrained(tmp_path / "larger")
    tokenizer.save_pretrained(tmp_path / "larger")
    start = {"method": "copy", "layers": [1, 2], "fit": False}
    student = {"model": str(tmp_path / "larger"), "design": {"num_hidden_layers": 2}, "initialize": start}
    return recipe_values | {"student": student, "evaluate": {"continuations": 0}}


def test_a_student_is_cut_from_a_model_that_does_not_teach(cut: dict[str, Any]) -> None:
    built = build_run(Recipe.parse(cut))
    student, larger = built.new_student(), load_model(cut["student"]["model"], "student", "float32", "causal")
    assert student.config.num_hidden_layers == 2
    assert student.config.hidden_size == 24 != built.loaded.model.config.hidden_size  # type: ignore[union-attr]
    weights = larger.state_dict()
    for name, value in student.state_dict().items():
        for layer in (1, 0):
            name = name.replace(f"layers.{layer}.", f"layers.{layer + 1}.")
        assert torch.equal(value, weights[name]), name
    assert built.save_dtype == torch.float32
    assert any("the larger model's layers 1, 2 of 3 (as given), complete" in note for note in built.notes)


def test_its_shares_and_fitted_layers_are_of_that_model(cut: dict[str, Any]) -> None:
    cut["student"] |= {"design": {"compression": 1.5}, "initialize": "prune"}
    built = build_run(Recipe.parse(cut))
    larger = load_model(cut["student"]["model"], "student", "float32", "causal")
    assert built.size.all == pytest.approx(larger.num_parameters() / 1.5, rel=0.05)
    assert any("fitted to the larger model's hidden states" in note for note in built.notes)


def test_a_student_of_a_model_that_was_saved_by_a_training_generates_with_a_cache(cut: dict[str, Any]) -> None:
    path = Path(cut["student"]["model"]) / "config.json"
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | {"use_cache": False}))
    try:
        student = build_run(Recipe.parse(cut)).new_student()
    finally:
        path.write_text(before)
    assert student.generation_config.use_cache is not False


def test_a_vocabulary_is_cut_once_from_both_models(cut: dict[str, Any]) -> None:
    cut["student"]["vocabulary"] = {"keep": 290}
    built = build_run(Recipe.parse(cut))
    rows = len(built.tokenizer.get_vocab())
    student = built.new_student()
    assert rows == 290
    assert len(student.get_input_embeddings().weight) == rows
    assert len(built.loaded.model.get_input_embeddings().weight) == rows  # type: ignore[union-attr]
    larger = load_model(cut["student"]["model"], "student", "float32", "causal").get_input_embeddings().weight
    assert all((larger == row).all(1).any() for row in student.get_input_embeddings().weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"initialize": "random"}, r"expected initialize \(prune, copy, .* got random weights"),
        ({"design": None}, "expected initialize with a design, got it beside a model that keeps its shape"),
        ({"model": None, "design": None, "initialize": "random"}, "expected model or design, got neither"),
        ({"initialize": {"method": "selective", "rounds": 2}}, "expected prune, copy or truncate with rounds"),
        ({"initialize": {"method": "prune", "rounds": 2, "layers": [0, 1]}}, "expected a choice of layers .* rounds"),
        ({"initialize": {"method": "prune", "rounds": 2}, "vocabulary": {"keep": "data"}}, "rounds without vocabulary"),
        ({"initialize": {"method": "prune", "rounds": 2}, "adapter": {"kind": "lora", "merge": True}}, "an adapter"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(cut: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    cut["student"] |= changes
    with pytest.raises(RecipeError, match=message):
        Recipe.parse(cut)


def test_what_is_cut_is_a_whole_model(cut: dict[str, Any], tmp_path: Path) -> None:
    from peft import LoraConfig

    LoraConfig(base_model_name_or_path="base").save_pretrained(tmp_path / "larger")
    with pytest.raises(RecipeError, match=r"student\.model: expected a whole model, to be cut .*, got an adapter"):
        build_run(Recipe.parse(cut))


def test_the_way_of_a_shape() -> None:
    first, last = DesignShape(12, 512, 8, 8, 64, 2048), DesignShape(3, 256, 4, 4, 64, 700)
    way = shapes_between(first, last, 3)
    assert [(x.layers, x.hidden, x.heads, x.kv_heads) for x in way] == [(8, 384, 6, 6), (5, 320, 5, 5)]
    bert = DesignShape(12, 96, 12, 12, 8, 384), DesignShape(6, 48, 6, 6, 8, 192)
    assert all(x.hidden == x.heads * x.head_size for x in shapes_between(*bert, 4))
    for before, after in zip([first, *way], [*way, last], strict=True):
        assert all(getattr(before, size) >= getattr(after, size) for size in vars(last))
    assert all(x.heads % x.kv_heads == 0 for x in shapes_between(first, DesignShape(3, 256, 8, 2, 64, 700), 4))
    assert shapes_between(DesignShape(3, 8, 2, 2, 4, 8), DesignShape(2, 8, 2, 2, 4, 8), 5) == []
    none = DesignShape(4, 8, 0, 0, 0, 0)
    assert shapes_between(none, DesignShape(1, 8, 0, 0, 0, 0), 2) == [DesignShape(2, 8, 0, 0, 0, 0)]


def test_a_run_cuts_in_rounds_and_goes_on_after_a_kill(cut: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    cut["student"]["design"] = {"num_hidden_layers": 1}
    cut["student"]["initialize"] = {"method": "copy", "rounds": 2}
    make_llama(hidden_size=24, layers=3, seed=5).bfloat16().save_pretrained(cut["student"]["model"])
    recipe, directory, walked = Recipe.parse(cut), Path(cut["output"]), []
    walk = rounds.walk

    def killed(steps: Any, built: Any, folder: Path, console: Console) -> None:
        walked.append(built)
        if len(walked) == 1:
            raise KeyboardInterrupt
        walk(steps, built, folder, console)

    monkeypatch.setattr(rounds, "walk", killed)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, console=QUIET)
    folder = directory / "rounds" / "1"
    write_recipe(walked[0], folder, QUIET)
    (folder / "metrics.jsonl").touch()
    with pytest.raises(RecipeError, match=r"expected no earlier rounds in .*rounds, or with --resume"):
        run(recipe, console=QUIET)
    result = run(recipe, resume=True, console=QUIET)
    between = load_model(str(directory / "rounds" / "1" / "student"), "student", "float32", "causal")
    assert between.config.num_hidden_layers == 2
    assert walked[1].plan.steps == 1  # a fifth of the run's six
    assert result.summary["rows"]["student"]["parameters"] < between.num_parameters()
    assert any(
        note.startswith("student.initialize.rounds: 1 before this one, with 1 steps")
        for note in result.summary["notes"]
    )
    assert result.summary["rows"]["student"]["saved_as"] == "bfloat16"  # as its source, not as the rounds between
    final, note = prune_in_rounds(recipe, directory, QUIET, resume=True)
    assert len(walked) == 2  # finished rounds are kept
    builder = build_run(final).new_student
    assert isinstance(builder, StudentBuilder)
    assert builder.source is not None
    assert torch.equal(builder.source.get_input_embeddings().weight, between.get_input_embeddings().weight)
    assert Recipe.load(directory / "recipe.yaml") == final
    assert note in result.summary["notes"]


@pytest.mark.slow
def test_a_searched_shape_is_cut_from_a_model_of_its_own(cut: dict[str, Any]) -> None:
    make_llama(seed=5).save_pretrained(cut["student"]["model"])
    cut["student"] |= {"design": {"params": 6500, "search": 2}, "initialize": "prune"}
    recipe, _ = search_shape(Recipe.parse(cut), Path(cut["output"]), QUIET)
    assert recipe.student.model == cut["student"]["model"]
    assert build_run(recipe).size.all > 0


def test_check_counts_the_rounds_and_the_fit(cut: dict[str, Any]) -> None:
    cut["student"] |= {"initialize": {"method": "copy", "rounds": 2}}
    rounds_too = check(Recipe.parse(cut))
    assert rounds_too.seconds / rounds_too.batch.seconds == pytest.approx(7)  # six steps, and a fifth of them
    assert rounds_too.fit_seconds > 0
    assert (
        "student.initialize.rounds: these are figures of one cut; potstill run makes several." in rounds_too.built.notes
    )
    del cut["student"]["model"]
    cut["student"] |= {"design": {"num_hidden_layers": 1}, "initialize": {"method": "copy", "fit": False}}
    once = check(Recipe.parse(cut))
    assert once.fit_seconds == 0
    assert once.seconds / once.batch.seconds == pytest.approx(6)


def test_a_head_that_the_model_lacks_is_random_alike_and_noted(cut: dict[str, Any], toys: Path) -> None:
    (Path(cut["output"]).parent / "rows.jsonl").write_text(
        '{"text": "one two", "label": 0}\n{"text": "a", "label": 1}\n'
    )
    rows = {"path": str(Path(cut["output"]).parent / "rows.jsonl"), "field": "text", "label": "label"}
    teacher = LlamaForSequenceClassification(make_llama().config)
    teacher.save_pretrained(Path(cut["output"]).parent / "classifier")
    make_tokenizer().save_pretrained(Path(cut["output"]).parent / "classifier")
    cut |= {"task": "classification", "teacher": {"model": str(Path(cut["output"]).parent / "classifier")}}
    cut |= {"data": {"train": rows, "eval": rows, "max_length": 16}, "objective": [{"term": "labels"}]}
    cut["student"]["initialize"] = {"method": "prune", "fit": False}
    built = [build_run(Recipe.parse(cut)) for _ in range(2)]
    heads = [one.new_student().score.weight for one in built]
    assert torch.equal(*heads)
    assert any("score.weight: they start at random" in note for note in built[0].notes)
