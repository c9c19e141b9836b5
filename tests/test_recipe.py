"""The recipe: strict, typed, all mistakes at once."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter

from potstill.errors import OTHER_NAMES, RecipeError
from potstill.losses.divergences import JSD, AlphaBeta, Divergence, ReverseKL
from potstill.losses.schedule import Schedule
from potstill.runs.config import inputs
from potstill.runs.config.document import _paths
from potstill.runs.config.embedding import EmbeddingRecipe
from potstill.runs.config.run import Recipe

MINIMAL = """
name: toy
teacher: {model: a}
student: {model: b}
data: {train: {path: t.jsonl}, eval: {path: e.jsonl}}
objective: [{term: logits, divergence: {kind: jsd, beta: 0.3}, temperature: {schedule: linear, start: 4.0, end: 1.0}}]
train: {max_steps: 600, learning_rate: 2e-3}
output: runs/toy
"""


def read_schedule(values: dict[str, Any]) -> Schedule:
    return TypeAdapter(Schedule).validate_python(values)


def mistakes(change: dict[str, Any]) -> str:
    values = yaml.safe_load(MINIMAL) | change
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(values)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": True}, "seed: expected a number, got true."),
        ({"train": {"max_steps": True}}, "train.max_steps: expected int, got True."),
        (
            {"student": {"model": "b", "vocabulary": {"keep": True}}},
            "student.vocabulary.keep: expected a number, got true.",
        ),
        ({"objective": [{"term": "logits", "weight": False}]}, "objective.0.weight: expected a number, got false."),
        (
            {"student": {"model": "b", "vocabulary": {"keep": "x"}}},
            "student.vocabulary.keep: expected 'data', 'auto' or a valid integer, got 'x'.",
        ),
        (
            {"student": {"model": "b", "vocabulary": {"keep": 0}}},
            "student.vocabulary.keep: expected 'data', 'auto' or a number >= 1, got 0.",
        ),
        (
            {"student": {"model": "b", "vocabulary": "data"}},
            "student.vocabulary: expected a mapping of keys, got 'data'.",
        ),
    ],
)
def test_a_mistake_is_one_line_with_the_key_of_the_recipe(change: dict[str, Any], message: str) -> None:
    assert mistakes(change) == f"recipe: 1 mistake\n  {message}"


def test_a_run_is_resumed_with_the_files_that_it_began_with(tmp_path: Path) -> None:
    words, run = tmp_path / "words.txt", tmp_path / "run"
    words.write_text("a")
    values = {"kind": "embedding", "name": "x", "teacher": {"embedder": "x"}, "output": str(run)}
    recipe = EmbeddingRecipe.parse(values | {"student": {"static": {"words": str(words)}, "dimensions": 8}})
    recipe.start(run)
    (run / "metrics.jsonl").touch()
    recipe.check_directory(run, resume=True)
    words.write_text("b")
    with pytest.raises(
        RecipeError, match=r"output: expected .*words\.txt as it was when the run in .* began, got another"
    ):
        recipe.check_directory(run, resume=True)
    (run / "inputs.json").unlink()  # without them nothing is compared
    recipe.check_directory(run, resume=True)


@pytest.mark.parametrize("path", ["rows", "rows/*.jsonl"])
def test_a_run_is_resumed_with_the_folders_that_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    rows, run = tmp_path / "rows", tmp_path / "rows" / "run"
    rows.mkdir()
    (rows / "a.jsonl").write_text("a" * 50_000 * 64)
    monkeypatch.setattr(inputs, "SAMPLED_BYTES", 2**20)
    data = {"train": {"path": path}, "eval": {"path": "e.jsonl"}}
    recipe = Recipe.parse(yaml.safe_load(MINIMAL) | {"data": data, "output": str(run)})
    recipe.start(run)
    (run / "metrics.jsonl").touch()
    (rows / "README.md").touch()
    recipe.check_directory(run, resume=True)
    (rows / "b.jsonl").touch()
    with pytest.raises(RecipeError, match=re.escape(f"output: expected {path} as it was when the run in")):
        recipe.check_directory(run, resume=True)
    (rows / "b.jsonl").unlink()
    recipe.check_directory(run, resume=True)
    for changed in ("b" * 50_000 * 64, "a" * 50_000 * 63):  # of the same size, and another
        (rows / "a.jsonl").write_text(changed)
        with pytest.raises(RecipeError, match="got another content"):
            recipe.check_directory(run, resume=True)


def test_a_file_with_the_name_of_a_field_is_none_of_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("a")
    (tmp_path / "rows.jsonl").write_text("a")
    train = {"path": "rows.jsonl", "field": "text"}
    Recipe.parse(yaml.safe_load(MINIMAL) | {"data": {"train": train, "eval": {"path": "e.jsonl"}}}).start(
        tmp_path / "run"
    )
    assert [*json.loads((tmp_path / "run" / "inputs.json").read_text())] == ["rows.jsonl"]


def test_several_sources_and_rows_without_labels() -> None:
    parts = [
        {"path": "a.jsonl", "share": 3},
        {"path": "b", "split": "train", "share": 1, "prompt": ["i", "j"], "completion": "k"},
    ]
    recipe = Recipe.parse(yaml.safe_load(MINIMAL) | {"data": {"train": parts, "eval": {"path": "e.jsonl"}}})
    first, second = recipe.data.train
    assert (first.share, second.prompt) == (3, ("i", "j"))
    assert Recipe.parse(recipe.model_dump(mode="json")) == recipe
    assert "data.train.0.share: expected a number in (0, inf)" in mistakes(
        {"data": {"train": [{"path": "a", "share": 0}], "eval": {"path": "e"}}}
    )
    without = {"path": "a", "label": False}
    found = mistakes(
        {
            "task": "classification",
            "data": {"train": without, "eval": without},
            "objective": [{"term": "labels"}],
            "evaluate": {"baseline": True},
        }
    )
    for key in (
        "data.eval.label: ",
        "objective.0: expected labels in data.train",
        "evaluate.baseline: expected labels",
    ):
        assert key in found


def test_a_random_start_is_compared_with_a_start_from_the_teacher() -> None:
    design = {"student": {"design": {"num_hidden_layers": 1}}, "evaluate": {"random_start": True}}
    rollout = {"rollout": {"on_policy_fraction": 0.5}}
    for wrong in (design, {"evaluate": {"random_start": True}, "student": {"model": "s"}}):
        assert "evaluate.random_start: expected a design, without an adapter, that starts from the weights" in mistakes(
            wrong
        )
    design["student"] |= {"initialize": "prune"}
    assert "evaluate.random_start: expected no rollout with it" in mistakes(design | rollout)
    assert Recipe.parse(yaml.safe_load(MINIMAL) | design).evaluate.trained == ("student", "random")


def test_a_file_is_read_and_written_back(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(MINIMAL)
    recipe = Recipe.load(path)
    assert recipe.train["learning_rate"] == 2e-3
    assert recipe.objective[0].divergence == JSD(0.3)
    assert recipe.objective[0].temperature.over(6)(3) == 2.5
    path.write_text(recipe.dump())
    assert Recipe.load(path) == recipe


def test_sets_change_any_key(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(MINIMAL)
    changes = [
        "train.max_steps=5",
        "objective.0.divergence=reverse_kl",
        "evaluate.baseline=true",
        "train.max_grad_norm=1e-1",
    ]
    recipe = Recipe.load(path, changes)
    assert recipe.train["max_steps"] == 5
    assert recipe.objective[0].divergence == ReverseKL()
    assert recipe.evaluate.baseline
    assert recipe.train["max_grad_norm"] == 0.1
    for wrong in ("train.max_steps", "objective.3.weight=1", "objective.x=1", "name.first=1"):
        with pytest.raises(RecipeError, match="--set"):
            Recipe.load(path, [wrong])


def test_all_mistakes_are_reported_at_once_with_the_nearest_key() -> None:
    text = mistakes(
        {
            "nmae": "x",
            "teacher": {"modle": "a"},
            "student": {"model": "a", "design": {"hidden_size": 3}},
            "data": {"train": {"path": "t"}, "eval": {"path": "e", "feild": "x"}, "max_length": 1},
            "train": {"max_step": 5, "warmup_steps": "many", "seed": 3},
            "objective": [
                {
                    "term": "logits",
                    "divergence": "forwardkl",
                    "layers": [[0, 1]],
                    "temperature": {"schedule": "linear", "start": 1},
                }
            ],
        }
    )
    for expected in (
        "recipe: 11 mistakes",
        "nmae: unknown key. Did you mean name?",
        "teacher: expected one of adapter_off, cache, ema, ensemble, model, server, got modle. Did you mean model?",
        "student: expected initialize (prune, copy, truncate or selective) with model and design",
        "data.eval.feild: unknown key. Did you mean field?",
        "data.max_length: input should be greater than or equal to 2, got 1",
        "train.max_step: unknown key. Did you mean max_steps?",
        "train.warmup_steps: expected float, got 'many'",
        "train.seed: expected it not to be set here",
        "objective.0.layers: unknown key. It is a key of hidden, attention, relations, similarity, router_match, deep",
        "objective.0.divergence: expected a kind of forward_kl",
        "got forwardkl. Did you mean forward_kl?",
        "objective.0.temperature.end: expected a value, got none",
    ):
        assert expected in text, text


def test_keys_that_other_tools_have_are_known_by_their_meaning() -> None:
    at_top = {"epochs": "train.num_train_epochs", "batch_size": "train.per_device_train_batch_size"}
    at_top |= {"learning_rate": "train.learning_rate", "max_length": "data.max_length", "alpha": "objective.weight"}
    at_top |= {"lora_r": "student.adapter.rank", "lambda_gkd": "rollout.on_policy_fraction", "output_dir": "output"}
    in_train = {
        "lr": "learning_rate",
        "gradient_accumulation": "gradient_accumulation_steps",
        "epochs": "num_train_epochs",
    }
    in_train |= {"evaluation_strategy": "eval_strategy", "temperature": "objective.temperature"}
    text = mistakes(dict.fromkeys([*at_top, "qqq"], 1) | {"train": dict.fromkeys(in_train, 1)})
    keys = at_top | {f"train.{name}": meant for name, meant in in_train.items()}
    for name, meant in keys.items():
        assert f"  {name}: unknown key. Did you mean {meant}?" in text.splitlines()
    assert "  qqq: unknown key." in text.splitlines()
    known = {*Recipe.mapping_keys(), *_paths(Recipe)}
    assert {*OTHER_NAMES.values()} <= known


def test_a_teacher_without_a_value_is_named() -> None:
    text = mistakes({"teacher": {"ema": None}})
    assert "server, got ema without a value." in text


LOGITS = {"term": "logits"}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"objective": []}, "objective: list should have at least 1 item"),
        ({"objective": [{"term": "logit"}]}, "objective.0: expected a term of logits, labels"),
        ({"objective": [{"term": "labels", "weight": -1.0}]}, "objective.0.weight: expected a number >= 0"),
        ({"objective": [LOGITS | {"temperature": 0}]}, "objective.0.temperature: expected a number > 0"),
        ({"objective": [LOGITS | {"temperature": "hot"}]}, "objective.0.temperature: input should be a valid"),
        ({"objective": [LOGITS | {"divergence": {"kind": "jsd", "beta": 1}}]}, "open interval (0, 1), got 1"),
        ({"objective": [LOGITS | {"divergence": {"kind": "jsd", "alpha": 1}}]}, "divergence.alpha: unknown key"),
        ({"objective": [LOGITS | {"divergence": "alpha_beta"}]}, "divergence.alpha: expected a value, got none"),
        ({"objective": [LOGITS | {"weight": {"schedule": "linear", "start": 1, "ende": 2}}]}, "Did you mean end?"),
        ({"objective": [{"term": "hidden", "layers": {"skip": 2, "last_k": 1}}]}, "pairs, got skip, last_k"),
        ({"objective": [{"term": "hidden", "layers": {"pair": [[0, 1]]}}]}, "layers: expected a kind of uniform"),
        ({"objective": [{"term": "taid", "share": 1.5}]}, "objective.0.share: expected a number in [0, 1], got 1.5"),
        ({"objective": [{"term": "bild", "top_k": 1}]}, "objective.0.top_k: expected a number >= 2, got 1"),
        ({"objective": [{"term": "hidden", "layers": {"last_k": 0}}]}, "layers.k: expected a number >= 1, got 0"),
        ({"objective": [{"term": "hidden", "distance": "cka", "projection": "mlp"}]}, "no projection with cka"),
        ({"objective": [{"term": "relations", "of": ["query"]}]}, "objective.0.of.0: input should be 'queries'"),
        ({"objective": [{"term": "similarity", "temperature": 0}]}, "objective.0.temperature: expected a number > 0"),
        ({"objective": [{"term": "attention", "heads": "best"}]}, "objective.0.heads: input should be 'overlap'"),
        ({"objective": [{"term": "attention", "heads": [[0]]}]}, "objective.0.heads"),
        ({"train": "fast"}, "train: expected a mapping"),
        ({"student": {}}, "student: expected model or design, got neither"),
        ({"objective": [{"term": "logits", "temperature": {"schedule": "linear", "start": 4.0, "end": 0.0}}]},
         "objective.0.temperature: expected a number > 0, got 0.0"),
        ({"objective": [{"term": "logits", "temperature": {"schedule": "constant", "value": 2.0, "warmup": 2}}]},
         "objective.0.temperature: expected a number > 0, got 0.0 from its warm-up: give warmup_start"),
        ({"objective": [{"term": "labels", "weight": {"schedule": "constant", "value": 1.0, "warmup_start": 0.5}}]},
         "objective.0.weight: expected warmup, its steps, beside warmup_start, got 0.5 alone"),
        ({"output": ""}, "output: string should have at least 1 character"),
    ],
)  # fmt: skip
def test_each_mistake_names_its_key(change: dict[str, Any], expected: str) -> None:
    assert expected in mistakes(change)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: a\nname: b", "the key name stands twice"),
        ("name: [", "expected YAML"),
        ("- a", "expected a mapping of keys, got list"),
        ("", "expected a mapping of keys, got NoneType"),
    ],
)
def test_files_that_are_not_recipes(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError, match=expected):
        Recipe.load(tmp_path / "r.yaml")


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(MINIMAL)
    with pytest.raises(RecipeError, match=r"not there\. Did you mean recipe\.yaml\?"):
        Recipe.load(tmp_path / "recipes.yaml")


@pytest.mark.parametrize(
    "values",
    [
        {"schedule": "constant", "value": 1.0},
        {"schedule": "cosine", "start": 1.0, "end": 0.0},
        {"schedule": "exponential", "start": 1.0, "end": 0.1, "steps": 5},
        {"schedule": "piecewise", "values": [1.0, 0.5], "boundaries": [5]},
        {"schedule": "stages", "start": 4.0, "end": 0.5, "stages": 5},
        {"schedule": "linear", "start": 1.0, "end": 0.0, "warmup": 3},
    ],
    ids=lambda values: values["schedule"],
)
def test_every_schedule_builds(values: dict[str, Any]) -> None:
    built = read_schedule(values).over(10)
    assert all(isinstance(built(step), float) for step in range(12))


def test_a_schedule_is_as_long_as_the_run() -> None:
    built = read_schedule({"schedule": "linear", "start": 4.0, "end": 1.0, "warmup": 2}).over(12)
    assert [built(0), built(2), built(7), built(12)] == [0.0, 4.0, 2.5, 1.0]


def test_a_warm_up_starts_at_the_given_value() -> None:
    rising = read_schedule({"schedule": "linear", "start": 4.0, "end": 1.0, "warmup": 2, "warmup_start": 1.0}).over(12)
    assert [rising(0), rising(1), rising(2), rising(12)] == [1.0, 2.5, 4.0, 1.0]
    held = read_schedule({"schedule": "linear", "start": 0.9, "end": 0.1, "warmup": 4, "warmup_start": 0.9}).over(8)
    assert [held(0), held(3), held(6), held(8)] == pytest.approx([0.9, 0.9, 0.5, 0.1])


def test_every_divergence_has_a_name() -> None:
    read = TypeAdapter(Divergence).validate_python
    assert read({"kind": "alpha_beta", "alpha": 0.2, "beta": 0.7}) == AlphaBeta(0.2, 0.7)
    assert all(read(name) == kind() for name, kind in Divergence.kinds.items() if kind is not AlphaBeta)


def test_the_schema_describes_every_key() -> None:
    schema = Recipe.model_json_schema()
    assert set(schema["properties"]) == set(Recipe.model_fields)
    assert schema["additionalProperties"] is False


def test_the_home_folder_may_be_named_by_its_sign(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Recipe.parse(yaml.safe_load(MINIMAL) | {"output": "~/runs/toy"}).output == str(tmp_path / "runs/toy")
    assert Recipe.parse(yaml.safe_load(MINIMAL)).output == "runs/toy"
