"""Recipes with a teacher of another tokenizer: what they do, report and refuse."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback
from typer.testing import CliRunner

from conftest import make_llama, make_tokenizer, quiet_run
from potstill.cli import app
from potstill.cli.run import show_result
from potstill.data.batches import in_batches
from potstill.errors import RecipeError, VocabularyError
from potstill.losses.alignment import causal_alignment
from potstill.runs.build import build_run
from potstill.runs.check import check
from potstill.runs.config.run import Recipe
from potstill.runs.steps import training_arguments
from potstill.train.trainer import DistillationTrainer
from reference_across import byte_level, llama_like, lower_case

EVERY = [
    {"term": "chunks", "temperature": 50, "divergence": "jsd"},
    {"term": "mapped_logits", "weight": 0.5, "top_k": 64},
    {"term": "uld", "weight": 0.1},
    {"term": "labels"},
]


@pytest.fixture
def values(recipe_values: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A student whose tokens are bytes."""
    byte_level(258).save_pretrained(tmp_path / "bytes")
    recipe_values["student"]["tokenizer"] = str(tmp_path / "bytes")
    recipe_values["data"]["max_length"] = 64
    recipe_values["objective"] = EVERY
    recipe_values["evaluate"] = {"baseline": True, "continuations": 1}
    return recipe_values


def test_a_run_reports_bits_per_byte(values: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    result = quiet_run(values)
    rows = result.summary["rows"]
    assert list(rows) == ["teacher", "baseline", "student"]
    built = build_run(Recipe.parse(values))
    num_bytes, nats, tokens = 0, 0.0, 0
    for batch in in_batches(built.eval.dataset, built.tokenizer, 4):
        across = built.teacher(batch, causal_alignment(batch["labels"])).chunks
        num_bytes += int(across.sizes.sum())
        nats -= float(across.log_probs.sum())
        tokens += int((across.student >= 0).sum())
    whole = built.teacher.alignment_stats(built.eval.dataset)
    assert whole.tokens == built.eval.tokens
    assert tokens > 0.9 * whole.tokens
    assert rows["teacher"]["loss"] == pytest.approx(nats / tokens, rel=1e-4)
    for row in rows.values():
        bits = row["loss"] * whole.tokens / whole.bytes / math.log(2)
        assert row["bits_per_byte"] == pytest.approx(bits)
    assert rows["teacher"]["bits_per_byte"] == pytest.approx(nats / num_bytes / math.log(2), rel=0.05)
    assert rows["teacher"]["parameters"] > rows["student"]["parameters"]
    assert rows["student"]["agreement"] is None
    assert rows["student"]["kl"] is None
    assert any("agreement and KL are left out" in note for note in result.summary["notes"])
    show_result(result)
    assert "Bits per byte" in capsys.readouterr().out
    report = (result.directory / "report.html").read_text()
    assert "Bits per byte" in report
    for missing in ("Top-1 agreement", "KL to the teacher", ">None<", "not a number"):
        assert missing not in report
    config = (result.directory / "student/config.json").read_text()
    assert '"vocab_size": 258' in config


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step == self.step


def test_a_run_goes_on_where_it_stopped(values: dict[str, Any]) -> None:
    values["evaluate"]["baseline"] = False
    whole = quiet_run(values)
    values["output"] += "-again"
    values["train"]["save_steps"] = 3
    built = build_run(Recipe.parse(values))
    half = DistillationTrainer(
        built.new_student(),
        built.teacher,
        built.objective,
        training_arguments(built, "student", Path(values["output"]) / "checkpoints" / "student"),
        built.train.dataset,
        built.curve,
        built.tokenizer,
        built.vocabulary,
        callbacks=[StopAt(3)],
    )
    half.train()
    assert half.state.global_step == 3
    quiet_run(values, resume=True)
    one, two = (load_file(Path(place) / "student/model.safetensors") for place in (whole.directory, values["output"]))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_student_with_a_tokenizer_of_its_own(values: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = llama_like(400)
    make_llama(vocab_size=max(tokenizer.get_vocab().values()) + 1, hidden_size=8).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    values["student"] = {"model": str(tmp_path / "other")}
    values["objective"] = [{"term": "chunks"}, {"term": "labels"}]
    values["evaluate"] = {"baseline": False, "continuations": 0}
    assert quiet_run(values).summary["rows"]["student"]["bits_per_byte"] > 0


def test_the_same_tokenizer_works_too(values: dict[str, Any]) -> None:
    del values["student"]["tokenizer"]
    built = build_run(Recipe.parse(values))
    assert built.alignment_stats is not None
    assert built.alignment_stats.chunks == built.alignment_stats.one_to_one
    assert built.alignment_stats.covered > 0.9 * built.alignment_stats.bytes


def test_check_reports_how_a_pair_is_compared(values: dict[str, Any], tmp_path: Path) -> None:
    found = check(Recipe.parse(values))
    assert found.built.alignment_stats is not None
    assert any("compared by bytes; 258 of the student's 258 tokens" in note for note in found.built.notes)
    (tmp_path / "recipe.yaml").write_text(Recipe.parse(values).dump())
    result = CliRunner().invoke(app, ["check", str(tmp_path / "recipe.yaml")])
    assert result.exit_code == 0, result.output
    assert "258 tokens, the student's own: compared by bytes" in " ".join(result.output.split())


def test_it_warns_where_little_aligns(values: dict[str, Any], tmp_path: Path) -> None:
    teacher = make_llama(seed=1)
    teacher.config.max_position_embeddings = 8
    teacher.save_pretrained(tmp_path / "short")
    make_tokenizer().save_pretrained(tmp_path / "short")
    values["teacher"]["model"] = str(tmp_path / "short")
    values["student"]["design"]["max_position_embeddings"] = 64
    notes = build_run(Recipe.parse(values)).notes
    assert any("the teacher has no targets for" in note and "too long for it" in note for note in notes)


@pytest.mark.parametrize(
    ("what", "kind", "message"),
    [
        ("logits", VocabularyError, "terms chunks or mapped_logits of a recipe in place of logits"),
        ("both", RecipeError, "without terms over tokens, got logits, hidden too"),
        ("cache", RecipeError, "teacher: expected a model alone for terms that compare bytes"),
        ("lossy", VocabularyError, "the student's tokenizer: expected one whose tokens stand for the bytes"),
        ("initialize", RecipeError, "expected random weights with a tokenizer of its own, got copy"),
        ("model", RecipeError, "expected tokenizer with a design alone"),
        ("threshold", RecipeError, "bias_threshold"),
    ],
)
def test_what_cannot_be_is_one_clear_line(
    values: dict[str, Any], toys: Path, tmp_path: Path, what: str, kind: Any, message: str
) -> None:
    if what == "logits":
        values["objective"] = [{"term": "logits"}]
    elif what == "both":
        values["objective"] = [{"term": "chunks"}, {"term": "logits"}, {"term": "hidden"}, {"term": "labels"}]
    elif what == "cache":
        del values["student"]["tokenizer"]
        plain = {**values, "objective": [{"term": "logits"}]}
        (tmp_path / "recipe.yaml").write_text(Recipe.parse(plain).dump())
        cache = str(tmp_path / "cache")
        built = CliRunner().invoke(app, ["cache", "build", str(tmp_path / "recipe.yaml"), "--out", cache])
        assert built.exit_code == 0, built.output
        values["teacher"] = {"cache": cache}
    elif what == "lossy":
        lower_case().save_pretrained(tmp_path / "lower")
        values["student"]["tokenizer"] = str(tmp_path / "lower")
    elif what == "initialize":
        values["student"]["initialize"] = "copy"
    elif what == "model":
        values["student"] = {"model": str(toys / "student"), "tokenizer": str(toys / "student")}
    elif what == "threshold":
        values["objective"] = [{"term": "chunks", "bias_threshold": 2}]
    with pytest.raises(kind, match=message) as caught:
        build_run(Recipe.parse(values))
    assert kind is RecipeError or "\n" not in str(caught.value)


def test_a_text_does_not_end_at_the_tokens_of_another_tokenizer(values: dict[str, Any]) -> None:
    built = build_run(Recipe.parse(values))
    assert built.loaded.model is not None
    built.loaded.model.generation_config.eos_token_id = 200
    assert built.new_student().generation_config.eos_token_id == built.tokenizer.eos_token_id
