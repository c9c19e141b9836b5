"""potstill check and potstill schema accept every kind of recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from potstill.cli import app
from potstill.embedding.teachers import EmbedderTeacher, TextEncoder, model_encoder
from potstill.errors import RecipeError, UserError
from potstill.runs.build import build_run
from potstill.runs.compute import training_flops
from potstill.runs.config.run import Recipe


def checked(values: dict[str, Any], *more: str) -> str:
    Path("recipe.yaml").write_text(yaml.safe_dump(values))
    before = set(Path().rglob("*"))
    done = CliRunner().invoke(app, ["check", "recipe.yaml", *more], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert set(Path().rglob("*")) == before  # nothing is written
    return " ".join(done.output.split())


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def embedding() -> dict[str, Any]:
    np.save("x.npy", torch.randn(400, 12).numpy())
    return {
        "kind": "embedding",
        "name": "toy",
        "teacher": {"vectors": "x.npy"},
        "student": {"head": "linear", "dimensions": 4},
        "train": {"epochs": 3, "batch_size": 64},
        "output": "run",
    }


def test_an_embedding_recipe_is_checked(embedding: dict[str, Any]) -> None:
    output = checked(embedding)
    assert "teacher 12 dimensions" in output
    assert "student 4 dimensions" in output
    assert "train 360 vectors eval 40 vectors steps 18" in output
    assert "time about" in output
    assert "encoding" not in output
    more = {"train": {**embedding["train"], "temperature": {"stages": 2}}, "evaluate": {"front": True}}
    assert "steps 108" in checked(embedding | more)
    with pytest.raises(UserError, match="dimension"):
        checked(embedding, "--set", "student.dimensions=40")
    with pytest.raises(RecipeError, match="unknown key"):
        checked(embedding, "--set", "student.dimension=4")


class StubModel:
    """A sentence-transformers model with `encode` alone."""

    def encode(self, texts: list[str], **_: Any) -> np.ndarray:
        generator = np.random.default_rng(0)
        return generator.standard_normal((len(texts), 12)).astype("f4")


def test_a_teacher_that_reads_text_encodes_some_and_is_timed(
    embedding: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def encode(texts: Any) -> Any:
        sizes.append(len(texts))
        return model_encoder(StubModel())(texts)

    monkeypatch.setattr(EmbedderTeacher, "load", lambda self: TextEncoder(encode, "toy"))
    Path("train.jsonl").write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(1000)))
    embedding |= {"teacher": {"embedder": "there"}, "data": {"train": {"path": "train.jsonl"}}}
    output = checked(embedding)
    assert "train 900 vectors eval 100 vectors steps 45" in output
    assert "encoding about" in output
    assert sum(sizes) < 200


def test_a_generate_recipe_is_checked(toys: Path) -> None:
    rows = [{"question": f"{i} + {i}?"} for i in range(3)] + [{"question": ""}]
    Path("questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "kind": "generate",
        "name": "toy",
        "teacher": {"model": str(toys / "teacher")},
        "task": {
            "task": "chain_of_thought",
            "questions": {"path": "questions.jsonl", "field": "question"},
            "template": "{question}",
        },
        "sampling": {"samples": 2, "max_new_tokens": 4},
        "skip_bad_rows": True,
        "output": "rows",
    }
    output = checked(values)
    assert "prompts 3 texts 6 of at most 4 new tokens left out 1 rows" in output
    assert "as completion, to rows" in output
    with pytest.raises(UserError, match="positions"):
        checked(values, "--set", "sampling.max_new_tokens=4000")


def test_an_unknown_kind_is_refused() -> None:
    Path("recipe.yaml").write_text("kind: embeding\n")
    with pytest.raises(RecipeError, match=r"distillation, embedding, generate, got embeding. Did you mean embedding"):
        CliRunner().invoke(app, ["check", "recipe.yaml"], catch_exceptions=False)


@pytest.mark.parametrize(
    ("arguments", "title", "key"),
    [
        ([], "Recipe", "objective"),
        (["distillation"], "Recipe", "objective"),
        (["embedding"], "EmbeddingRecipe", "focus"),
        (["generate"], "GenerateRecipe", "sampling"),
    ],
)
def test_each_kind_has_a_schema(arguments: list[str], title: str, key: str) -> None:
    done = CliRunner().invoke(app, ["schema", *arguments], catch_exceptions=False)
    found = json.loads(done.output)
    assert found["title"] == title
    assert key in found["properties"]


def test_no_such_schema() -> None:
    with pytest.raises(UserError, match="expected one of distillation, embedding, generate, got embeding"):
        CliRunner().invoke(app, ["schema", "embeding"], catch_exceptions=False)


def test_the_compute_of_a_run_is_what_its_models_count(recipe_values: dict[str, Any]) -> None:
    recipe_values["data"]["packing"] = False  # rows of several lengths
    recipe_values["student"]["design"]["intermediate_size"] = 24
    built = build_run(Recipe.parse(recipe_values))
    student, teacher = built.new_student(), built.loaded.model
    assert teacher is not None
    for model in (student, teacher):
        model.set_attn_implementation("eager")

    def counted(model: Any, ids: torch.Tensor, *, backward: bool) -> float:
        """Of a row; eager attention computes all pairs of positions, of which a causal one needs (T + 1) / 2T."""
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
            logits = model(input_ids=ids, use_cache=False).logits
            if backward:
                logits.sum().backward()
        counts = counter.get_flop_counts()["Global"]
        return counts[torch.ops.aten.mm] + counts[torch.ops.aten.bmm] * (ids.shape[1] + 1) / (2 * ids.shape[1])

    rows = [torch.tensor([row["input_ids"]]) for row in built.train.dataset]
    assert len({row.shape for row in rows}) > 3
    share = built.plan.steps * built.plan.rows_per_step / len(rows)
    trained = share * sum(counted(student, row, backward=True) for row in rows)
    read = share * sum(counted(teacher, row, backward=False) for row in rows)
    flops = training_flops(built, student)
    assert flops["baseline"] == pytest.approx(trained, rel=0.01)
    assert flops["student"] == pytest.approx(trained + read, rel=0.01)
