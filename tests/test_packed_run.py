"""Packed rows in a run: notes on them before it, and caches and samples beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import families
from conftest import TEXT, make_tokenizer
from potstill.data.packing import row_lengths
from potstill.data.sources import Source
from potstill.errors import ModelError, RecipeError, UserError
from potstill.runs.build import build_run
from potstill.runs.cache import CacheRequest, build
from potstill.runs.check import check
from potstill.runs.config.run import Recipe
from potstill.runs.run import run
from potstill.teachers.model import ModelSource


@pytest.fixture
def packed_values(recipe_values: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A recipe over prompts and completions of many lengths, in rows of at most 64 tokens."""
    lengths = np.random.default_rng(0).integers(1, 40, (2, 48))
    for name, texts, ends in (("train", TEXT[:40], lengths[0]), ("eval", TEXT[40:], lengths[1])):
        rows = [
            {"prompt": text[:6], "completion": text[6 : 6 + int(end)]} for text, end in zip(texts, ends, strict=False)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        recipe_values["data"][name] = {"path": str(tmp_path / f"{name}.jsonl")}
    recipe_values["data"]["max_length"] = 64
    recipe_values["evaluate"] = {"continuations": 0}
    return recipe_values


def test_bins_are_built_once_and_reported(packed_values: dict[str, Any]) -> None:
    packed_values["train"] |= {"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 2}
    built = build_run(Recipe.parse(packed_values))
    assert built.packed is not None
    bins, tokens = len(built.packed), row_lengths(built.train.dataset).sum()
    assert built.plan.steps == 2 * -(-bins // 2)
    assert built.plan.rows_per_step == pytest.approx(2 * 40 / bins)
    (note,) = [note for note in built.notes if note.startswith("data.packing")]
    assert f"40 rows in {bins} of at most 64 tokens" in note
    assert sum(len(row["input_ids"]) for row in built.first_batch) > 1.5 * tokens / bins


def test_joined_text_is_not_packed_again(recipe_values: dict[str, Any], packed_values: dict[str, Any]) -> None:
    text = dict(recipe_values, data=recipe_values["data"] | {"max_length": 64})
    text["data"]["train"] = [{"path": packed_values["data"]["train"]["path"], "field": "completion"}] * 2
    built = build_run(Recipe.parse(text))
    assert built.packed is None
    assert [len(row["input_ids"]) for row in built.train.dataset][:-1].count(64) == len(built.train.dataset) - 2


def test_a_student_that_carries_a_state_along_is_refused_before_the_training(
    packed_values: dict[str, Any], tmp_path: Path
) -> None:
    for name in ("mamba", "teacher"):
        families.model("mamba", vocab_size=300, seed=name == "teacher").save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    teacher, packed_values["teacher"] = packed_values["teacher"], {"model": str(tmp_path / "teacher")}
    built = build_run(Recipe.parse(packed_values))
    assert any("reads padded rows: it is MambaForCausalLM" in note for note in built.notes)
    packed_values |= {"teacher": teacher, "student": {"model": str(tmp_path / "mamba")}}
    with pytest.raises(ModelError, match=r"apart, got MambaForCausalLM.* Set data\.packing to false"):
        check(Recipe.parse(packed_values))


@pytest.mark.slow
def test_a_cache_and_samples_beside_packed_rows(packed_values: dict[str, Any], toys: Path, tmp_path: Path) -> None:
    data = packed_values["data"]
    sources = [Source(data[name]["path"]) for name in ("train", "eval")]
    teacher = packed_values["teacher"]["model"]
    build(
        CacheRequest(ModelSource(teacher), sources, 64, True, "dense", {}, tmp_path / "cache"),
        console=Console(quiet=True),
    )
    losses = []
    for name, source in (("live", {}), ("cached", {"cache": str(tmp_path / "cache")})):
        values = packed_values | {"teacher": {"model": teacher} | source, "output": str(tmp_path / name)}
        result = run(Recipe.parse(values), console=Console(quiet=True))
        lines = [json.loads(line) for line in (result.directory / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)  # the cache is in half precision
    rollout = {"on_policy_fraction": 0.5, "max_new_tokens": 8}
    result = run(
        Recipe.parse(packed_values | {"rollout": rollout, "output": str(tmp_path / "own")}), console=Console(quiet=True)
    )
    assert (result.directory / "own_texts.jsonl").read_text()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"task": "classification"}, RecipeError, "data.packing: expected false for the task classification"),
        ({"train": {"train_sampling_strategy": "group_by_length"}}, UserError, "train_sampling_strategy"),
    ],
)
def test_what_cannot_be_packed_is_refused_early(
    changes: dict[str, Any], error: type, message: str, packed_values: dict[str, Any]
) -> None:
    with pytest.raises(error, match=message):
        check(Recipe.parse(packed_values | changes))
