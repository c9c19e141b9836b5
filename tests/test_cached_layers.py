"""Hidden states of chosen layers in a cache: terms that look inside learn from it as from the live teacher."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from conftest import make_llama
from potstill.cli import app
from potstill.data.batches import PaddingCollator, encode
from potstill.data.sources import Source
from potstill.errors import ModelError, ShapeError, UserError
from potstill.losses.alignment import causal_alignment
from potstill.losses.divergences import ForwardKL
from potstill.models.capture import ActivationRequest
from potstill.models.layer_map import Layer, LayerMap
from potstill.models.loading import load_tokenizer
from potstill.runs.cache import CacheRequest, build
from potstill.runs.check import check
from potstill.runs.config.run import Recipe
from potstill.runs.run import run
from potstill.teachers.cache.store import CachedLayers
from potstill.teachers.cached import CachedTeacher
from potstill.teachers.model import ModelSource, ModelTeacher
from potstill.train.distiller import Distiller
from potstill.train.terms.layers import Attention, Hidden, Relations
from potstill.train.terms.logits import Logits

QUIET = Console(quiet=True)


def request(
    toys: Path, out: Path, layers: tuple[Layer, ...], attentions: tuple[int, ...] = (), **teacher: Any
) -> CacheRequest:
    source_model = ModelSource(model=str(toys / "teacher"), **teacher)
    source = Source(str(toys / "train.jsonl"))
    return CacheRequest(
        source_model, [source], 32, False, "hidden", {}, out, batch_rows=4, layers=layers, attentions=attentions
    )


@pytest.fixture(scope="module")
def kept(toys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of hidden states with both layers of the toys' teacher, its embeddings, and maps of its last layer."""
    out = tmp_path_factory.mktemp("kept") / "cache"
    assert build(request(toys, out, ("embeddings", -1, 0), (-1,)), console=QUIET) is not None
    return out


def live(toys: Path) -> ModelTeacher:
    return ModelTeacher(AutoModelForCausalLM.from_pretrained(toys / "teacher", dtype=torch.float32))


def some_batch(toys: Path, tokenizer: Any) -> dict[str, torch.Tensor]:
    """Rows of unequal length, in an order of their own, one of them without a token that counts."""
    rows = encode(Source(str(toys / "train.jsonl")), tokenizer, max_length=32).dataset
    blank = {"input_ids": [5, 6, 7], "labels": [-100] * 3}
    return PaddingCollator(1)([rows[7], blank, rows[2], rows[11]])


TERMS = {
    "mse": lambda: Hidden(),
    "last": lambda: Hidden(LayerMap.last_k(1), "cosine"),
    "embeddings": lambda: Hidden(LayerMap.explicit([("embeddings", "embeddings")])),
    "attention": lambda: Attention(LayerMap.last_k(1), heads="entropy"),
}


@pytest.mark.parametrize("term", TERMS.values(), ids=TERMS)
def test_a_step_from_it_is_a_step_from_the_live_teacher(toys: Path, kept: Path, tokenizer: Any, term: Any) -> None:
    batch, found = some_batch(toys, tokenizer), []
    for teacher in (live(toys), CachedTeacher(kept)):
        torch.manual_seed(3)  # of the projections
        student = make_llama(hidden_size=8, layers=1)
        distiller = Distiller(student, teacher, [Logits(ForwardKL()), term()])
        output = distiller.step(batch)
        output.loss.backward()
        found.append((output.logs, torch.cat([p.grad.flatten() for p in distiller.parameters()])))
    for name, value in found[0][0].items():
        torch.testing.assert_close(found[1][0][name], value, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-6, rtol=1e-4)


def test_states_are_kept_as_they_are(toys: Path, kept: Path, tokenizer: Any) -> None:
    batch = some_batch(toys, tokenizer)
    alignment = causal_alignment(batch["labels"])
    teachers = live(toys), CachedTeacher(kept)
    for teacher in teachers:
        assert not teacher(batch, alignment).inside.hidden
        teacher.prepare(ActivationRequest(hidden=frozenset([0, 1])))
    true, found = (teacher(batch, alignment).inside.hidden for teacher in teachers)
    there = batch["attention_mask"].bool() & torch.tensor([[True], [False], [True], [True]])
    for layer in (0, 1):
        torch.testing.assert_close(found[layer][there], true[layer][there], atol=1e-5, rtol=1e-5)
        assert (found[layer][~there] == 0).all() and found[layer].shape == true[layer].shape
    assert teachers[0].shape == teachers[1].shape
    blank = {name: value[1:2] for name, value in batch.items()}
    nothing = teachers[1](blank, causal_alignment(blank["labels"]))
    assert nothing.targets.leading == (0,) and nothing.inside.hidden[1].abs().sum() == 0


def test_maps_are_kept_as_they_are(toys: Path, kept: Path, tokenizer: Any) -> None:
    batch = some_batch(toys, tokenizer)
    alignment = causal_alignment(batch["labels"])
    teachers = live(toys), CachedTeacher(kept)
    for teacher in teachers:
        teacher.prepare(ActivationRequest(hidden=frozenset(["embeddings"]), attentions=frozenset([1])))
    true, found = (teacher(batch, alignment).inside for teacher in teachers)
    there = batch["attention_mask"].bool() & torch.tensor([[True], [False], [True], [True]])
    torch.testing.assert_close(found.hidden["embeddings"][there], true.hidden["embeddings"][there])
    maps, expected = (x.attentions[1].transpose(1, 2) for x in (found, true))
    assert maps.shape == expected.shape and (maps[~there] == 0).all()
    torch.testing.assert_close(maps[there], expected[there], atol=1e-6, rtol=1e-5)


def test_layers_that_the_disk_has_no_room_for_are_refused(
    toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = encode(Source(str(toys / "train.jsonl")), load_tokenizer(str(toys / "teacher"), ""), max_length=32).dataset
    lengths = [len(row["input_ids"]) for row in rows]
    layers = CachedLayers([1, "embeddings"], 2, 16, 2, 16, "float32", [0])
    largest = sum(4 * (2 * n * 16 + 2 * n * (n + 1) // 2) for n in lengths)
    assert sum(map(layers.bytes_of_row, lengths)) == largest
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=largest // 2))  # beside the lock file
    with pytest.raises(UserError, match=r"for the layers of all rows, got .* in .*c\. Store fewer layers"):
        build(request(toys, tmp_path / "c", (1, "embeddings"), (0,)), console=QUIET)


def test_half_precision_stays_half_precision(toys: Path, tmp_path: Path, tokenizer: Any) -> None:
    build(request(toys, tmp_path / "c", (1,), dtype="bfloat16"), console=QUIET)
    teacher = CachedTeacher(tmp_path / "c")
    teacher.prepare(ActivationRequest(hidden=frozenset([1])))
    batch = some_batch(toys, tokenizer)
    states = teacher(batch, causal_alignment(batch["labels"])).inside.hidden[1]
    assert states.dtype == torch.bfloat16 and states[0].abs().sum() > 0


def test_what_is_not_kept_is_refused(toys: Path, kept: Path, tmp_path: Path) -> None:
    build(request(toys, tmp_path / "one", (0,)), console=QUIET)
    build(request(toys, tmp_path / "none", ()), console=QUIET)
    student = make_llama(hidden_size=8, layers=1)
    for directory, terms, expected in (
        (tmp_path / "one", [Hidden()], "the hidden states of layers 1, got one with the hidden states of layers 0"),
        (tmp_path / "none", [Hidden()], "got one with targets alone.* Build it with --layers"),
        (
            kept,
            [Attention(LayerMap.explicit([(0, 0)]))],
            r"attention maps of layers 0, got one with .* of layers 0, 1, embeddings and .* layers 1\.",
        ),
        (
            tmp_path / "one",
            [Attention()],
            "attention maps of layers 1, got one with the hidden states of layers 0. Build",
        ),
        (kept, [Relations()], "the queries, keys and values of layers 1, got one with"),
    ):
        with pytest.raises(ModelError, match=expected):
            Distiller(student, CachedTeacher(directory), terms)
    with pytest.raises(ShapeError, match="teacher layer"):
        build(request(toys, tmp_path / "deep", (2,)), console=QUIET)


def test_a_run_from_it_is_the_run_from_the_teacher(recipe_values: dict[str, Any], tmp_path: Path) -> None:
    recipe_values["objective"] += [{"term": "hidden", "weight": 0.1}]
    recipe_values["evaluate"] = {"baseline": False}
    (tmp_path / "recipe.yaml").write_text(Recipe.parse(recipe_values).dump())
    out = str(tmp_path / "cache")
    command = ["cache", "build", str(tmp_path / "recipe.yaml"), "--codec", "hidden", "--layers", "-1", "--out", out]
    shown = CliRunner().invoke(app, command, catch_exceptions=False).output
    assert "1 of 2: hidden states in float32" in shown
    info = json.loads(CliRunner().invoke(app, ["cache", "info", out, "--json"]).output)
    assert info["layers"]["kept"] == [1]
    rows = []
    for name, teacher in (("live", recipe_values["teacher"]), ("cached", {"cache": out})):
        values = recipe_values | {"teacher": teacher, "output": str(tmp_path / name)}
        rows.append(run(Recipe.parse(values), console=QUIET).summary["rows"]["student"]["loss"])
    assert rows[0] == pytest.approx(rows[1], rel=1e-4)
    values["objective"] = [{"term": "hidden", "layers": [[0, 0]]}]
    with pytest.raises(ModelError, match="of layers 0, got one with the hidden states of layers 1"):
        check(Recipe.parse(values | {"output": str(tmp_path / "other")}))


def test_layers_that_are_no_numbers_are_refused(toys: Path, tmp_path: Path) -> None:
    command = ["cache", "build", "--teacher", str(toys / "teacher"), "--data", str(toys / "train.jsonl")]
    result = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "c"), "--layers", "1;2"])
    assert isinstance(
        result.exception, UserError
    ) and "--layers: expected layers from 0, such as 1,3,-1,embeddings,last_hidden_state, got 1;2" in str(
        result.exception
    )
