"""Recipes of encoders, from the file to the report: masked tokens, classes, numbers, layers alone."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from conftest import mostly_slow
from potstill.data.sources import Source
from potstill.errors import DataError, ModelError, RecipeError
from potstill.evaluate.measures import QUALITY
from potstill.models.loading import load_model
from potstill.runs.build import build_run
from potstill.runs.check import check
from potstill.runs.config.run import Recipe
from potstill.runs.evaluate import EvaluationOptions, evaluate
from potstill.runs.run import RunResult, run
from potstill.train.callbacks import MetricsFile
from potstill.train.distiller import Distiller
from toy_encoders import CLASSES, make_encoder, save

RECIPES = {
    path.stem: path
    for path in sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))
    if "\ntask: " in path.read_text()
}
TASKS = {"masked": "masked", "classify": "classification", "regression": "regression", "encoder": "encoder"}
SMALL = ["train.max_steps=4", "train.per_device_train_batch_size=8", "train.warmup_steps=0", "data.max_length=32"]


def done(name: str, *changes: str, resume: bool = False) -> RunResult:
    return run(Recipe.load(RECIPES[name], [*SMALL, *changes]), console=Console(file=io.StringIO()), resume=resume)


def test_there_is_a_recipe_of_each_task() -> None:
    assert {name: Recipe.load(path).task for name, path in RECIPES.items()} == TASKS


@pytest.mark.parametrize("name", TASKS)
def test_a_recipe_runs_from_end_to_end(name: str, judged_rows: Path) -> None:
    task = TASKS[name]
    save(make_encoder("bert", task, seed=1), judged_rows / "teacher")
    result = done(name)
    rows = result.summary["rows"]
    assert set(rows) == {"teacher", "student"} | ({"baseline"} if task != "encoder" else set())
    for row in rows.values():
        assert all(row[measure.key] is not None for measure in QUALITY[task])
        assert row["latency_ms"] > 0
    assert result.summary["continuations"] == []
    assert result.summary["kl_by_position"] is None
    auto: Any = {"masked": AutoModelForMaskedLM, "encoder": AutoModel}.get(task, AutoModelForSequenceClassification)
    student, loading = auto.from_pretrained(result.directory / "student", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert student.config.num_hidden_layers == 2
    assert AutoTokenizer.from_pretrained(result.directory / "student").mask_token == "[MASK]"
    if task == "classification":
        assert student.config.label2id == CLASSES
    report = (result.directory / "report.html").read_text()
    card = (result.directory / "student" / "README.md").read_text()
    assert QUALITY[task][1].name in report
    assert ("erplexity" in report) is (task == "masked")
    assert f"import {auto.__name__}, AutoTokenizer" in card
    assert "How it writes" not in report
    lines = [json.loads(line) for line in (result.directory / "metrics.jsonl").read_text().splitlines()]
    label_loss = {"regression": "eval_squared_error", "encoder": "eval_hidden"}.get(task, "eval_cross_entropy")
    assert any(label_loss in line for line in lines)


def test_what_a_student_begins_with_is_its_teachers_head_too(judged_rows: Path) -> None:
    teacher = make_encoder("distilbert", "classification", seed=1)
    save(teacher, judged_rows / "teacher")
    built = build_run(Recipe.load(RECIPES["classify"], [*SMALL, "student.design={n_layers: 2}"]))
    student = built.new_student()
    assert not any("random" in note for note in built.notes)
    for name in ("classifier.weight", "pre_classifier.bias", "distilbert.embeddings.word_embeddings.weight"):
        assert torch.equal(student.get_parameter(name), teacher.get_parameter(name))
    layers = [f"distilbert.transformer.layer.{i}.ffn.lin1.weight" for i in (0, 1, 2)]
    assert torch.equal(student.get_parameter(layers[1]), teacher.get_parameter(layers[2]))


def test_a_student_without_a_head_gets_the_teachers_classes(judged_rows: Path) -> None:
    save(make_encoder("bert", "classification", seed=1), judged_rows / "teacher")
    save(make_encoder("distilbert", "encoder", seed=2), judged_rows / "student")
    recipe = Recipe.load(RECIPES["classify"], [*SMALL, "student={model: student}", "objective=[{term: logits}]"])
    first, second = (build_run(recipe).new_student() for _ in range(2))
    assert first.config.label2id == CLASSES
    assert torch.equal(first.classifier.weight, second.classifier.weight), "the same at every call"


# The same weights again


@pytest.mark.parametrize("name", mostly_slow(["masked", "encoder"], "masked"))
def test_a_resumed_run_ends_in_the_same_weights(name: str, judged_rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stops in the second epoch, where masks are others than in the first."""
    save(make_encoder("bert", TASKS[name], seed=1, hidden_dropout_prob=0.1), judged_rows / "teacher")
    changes = ["train.max_steps=10", "evaluate.baseline=false", "train.save_steps=3", "student.initialize=random"]
    whole = done(name, *changes, "output=whole")

    def killed(callback: MetricsFile, args: Any, state: Any, *_: Any, **__: Any) -> None:
        if state.global_step == 8:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MetricsFile, "on_step_end", killed)
        done(name, *changes, "output=killed")
    resumed = done(name, *changes, "output=killed", resume=True)
    one, other = ((each.directory / "student" / "model.safetensors").read_bytes() for each in (whole, resumed))
    assert one == other


# A sentence-transformers teacher


def test_a_student_gets_the_modules_of_a_sentence_transformers_teacher(judged_rows: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    save(make_encoder("bert", "encoder", seed=1), judged_rows / "teacher")
    (judged_rows / "teacher" / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    (judged_rows / "teacher" / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds.items())
    ]
    (judged_rows / "teacher" / "modules.json").write_text(json.dumps(modules))
    result = done("encoder")
    model = sentence_transformers.SentenceTransformer(str(result.directory / "student"), device="cpu")
    vectors = model.encode(["the cat", "a dog sits"])
    assert vectors.shape == (2, 16)
    assert abs((vectors**2).sum(-1) - 1).max() < 1e-5


# Measures


def test_what_is_measured_of_classes_is_the_formula() -> None:
    from potstill.evaluate.sequence import measure
    from test_tasks import make_batch

    teacher, student = make_encoder("bert", "classification", seed=1), make_encoder("bert", "classification", seed=2)
    batch = make_batch("classification", rows=12)
    found = measure("classification", teacher, {"student": student}, [batch])
    z = student.eval()(**{k: v for k, v in batch.items() if k != "labels"}).logits.double()
    t = teacher.eval()(**{k: v for k, v in batch.items() if k != "labels"}).logits.double()
    predicted, labels = z.argmax(-1), batch["labels"]
    f1 = []
    for k in range(3):
        tp = int(((predicted == k) & (labels == k)).sum())
        wrong = int(((predicted == k) != (labels == k)).sum())
        f1.append(2 * tp / (2 * tp + wrong))
    measured: Any = found["student"]
    assert measured.accuracy == pytest.approx((predicted == labels).double().mean().item())
    assert measured.f1_macro == pytest.approx(sum(f1) / 3)
    assert measured.agreement == pytest.approx((predicted == t.argmax(-1)).double().mean().item())
    kl = (t.softmax(-1) * (t.log_softmax(-1) - z.log_softmax(-1))).sum(-1).mean()
    assert measured.kl == pytest.approx(kl.item(), rel=1e-4)
    assert found["teacher"].kl == pytest.approx(0, abs=1e-6)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", TASKS)
def test_the_commands_measure_and_check(name: str, judged_rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task: Any = TASKS[name]
    save(make_encoder("bert", task, seed=1), judged_rows / "teacher")
    save(make_encoder("bert", task, seed=2, num_hidden_layers=2), judged_rows / "other")
    label = {"regression": "score"}.get(task)
    source = Source("eval.jsonl", field="text", label=label) if task != "masked" else Source("eval.jsonl", field="text")
    measures = EvaluationOptions(batch_sizes=(1,), lengths=(8,))
    found = evaluate("other", "teacher", source, max_length=32, options=measures, task=task)
    for measure in QUALITY[task]:
        assert found["models"]["student"]["quality"][measure.key] is not None
    assert found["models"]["student"]["speed"][0]["first_token_ms"] is None
    trains = []

    class Watched(Distiller):
        def step(self, batch: Any) -> Any:
            trains.append((self.student.training, self.teacher.model.training))
            return super().step(batch)

    monkeypatch.setattr("potstill.runs.check.Distiller", Watched)
    checked = check(Recipe.load(RECIPES[name], SMALL))
    assert {*trains} == {(True, False)}  # with dropout, as in the training; Reformer has no gradient otherwise
    assert bool(checked.built.vocabulary) is (task == "masked")
    assert len(checked.built.train.dataset) == 32


# What does not go together


@pytest.mark.parametrize(
    ("name", "changes", "messages"),
    [
        ("regression", ["objective=[{term: logits}, {term: bild}]"], ["objective.0: expected a term", "objective.1: "]),
        ("regression", ["objective=[{term: taid}]"], ["Use values for the teacher's number"]),
        (
            "encoder",
            ["objective=[{term: labels}]", "evaluate.baseline=true"],
            ["over layers", "evaluate.baseline"],
        ),
        ("encoder", ["objective=[{term: hidden, select_batches: 2}]"], ["Use a projection"]),
        ("classify", ["data.packing=true", "teacher={cache: kept}"], ["data.packing: ", "teacher.cache: "]),
        ("masked", ["data.train.label=label", "data.eval.pair=b"], ["data.train.label: ", "data.eval.pair: "]),
        ("classify", ["data.masked_share=0.3"], ["data.masked_share: "]),
        ("classify", ["data.train={path: a.jsonl, messages: chat}"], ["data.train.messages: expected field"]),
        ("masked", ["task=maskd"], ["task: "]),
        ("masked", ["objective=[{term: uld}]"], ["got uld. It is for the task causal"]),
        (
            "regression",
            ["teacher={ensemble: [{model: a}, {model: b}]}"],
            ["teacher.ensemble: expected teacher.model for the task regression"],
        ),
    ],
)
def test_what_does_not_go_with_a_task_is_refused_at_once(name: str, changes: list[str], messages: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.load(RECIPES[name], changes)
    for message in messages:
        assert message in str(caught.value)
    assert not any(line.strip().startswith(":") for line in str(caught.value).splitlines())


def test_heads_that_do_not_match_are_refused(judged_rows: Path) -> None:
    save(make_encoder("bert", "classification", seed=1), judged_rows / "teacher")
    save(make_encoder("bert", "regression", seed=1), judged_rows / "student")
    recipe = Recipe.load(RECIPES["classify"], [*SMALL, "student={model: student}"])
    with pytest.raises(RecipeError, match="expected the teacher's 3 classes, got 1"):
        build_run(recipe)
    shutil.rmtree(judged_rows / "student")
    turned = {name: 2 - i for name, i in CLASSES.items()}
    other = make_encoder("bert", "classification")
    other.config.label2id, other.config.id2label = turned, {i: name for name, i in turned.items()}
    save(other, judged_rows / "student")
    with pytest.raises(RecipeError, match="A class needs one id in both"):
        build_run(recipe)
    with pytest.raises(RecipeError, match="expected num_labels 1 in its config for the task regression, got 3"):
        build_run(Recipe.load(RECIPES["regression"], SMALL))


def test_a_teacher_whose_head_would_be_random_is_refused(judged_rows: Path) -> None:
    save(make_encoder("bert", "encoder", seed=1), judged_rows / "teacher")
    for name in ("masked", "classify"):
        with pytest.raises(ModelError, match=r"teacher\.model: expected .* got a model without weights for c"):
            build_run(Recipe.load(RECIPES[name], SMALL))


def test_the_error_for_a_classifier_without_its_task_names_its_class(tmp_path: Path) -> None:
    save(make_encoder("bert", "classification"), tmp_path / "model")
    for task in ("causal", "masked"):
        with pytest.raises(ModelError, match="It was saved as BertForSequenceClassification: name the task that this"):
            load_model(str(tmp_path / "model"), "student", task=task)  # type: ignore[arg-type]


def test_the_error_for_an_unknown_label_has_its_row(judged_rows: Path) -> None:
    save(make_encoder("bert", "classification", seed=1), judged_rows / "teacher")
    row = {"text": "the cat", "text_pair": "a dog", "label": "wild"}
    with (judged_rows / "train.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    with pytest.raises(DataError, match="expected a label of calm, lively, odd, or its number, got 'wild' in row 33"):
        build_run(Recipe.load(RECIPES["classify"], SMALL))


def test_robertas_positions_begin_behind_its_padding(judged_rows: Path) -> None:
    save(make_encoder("roberta", "masked", seed=1), judged_rows / "teacher")
    with pytest.raises(RecipeError, match="expected at most 39, the teacher's number of positions, got 40"):
        build_run(Recipe.load(RECIPES["masked"], [*SMALL, "data.max_length=40"]))
