"""A student is saved in the precision of the checkpoint that it comes from, and measured as it is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from conftest import make_llama, make_tokenizer, quiet_run
from potstill.models.adapted import convert_saved
from potstill.models.loading import load_model
from potstill.models.precision import describe_precision, saved_dtype
from potstill.runs.build import build_run
from potstill.runs.check import check
from potstill.runs.config.run import Recipe
from test_locate import write_gguf

TINY = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "eval_strategy": "no", "save_steps": 2}


def save_half(folder: Path, **options: Any) -> str:
    make_llama(**options).bfloat16().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def short_run(values: dict[str, Any]) -> Any:
    values["train"], values["evaluate"] = TINY, {"baseline": False, "continuations": 0, "curve_rows": 2}
    return quiet_run(values)


def dtypes(folder: Path) -> set[torch.dtype]:
    return {weight.dtype for file in folder.glob("*.safetensors") for weight in load_file(file).values()}


def test_a_designed_student_has_its_teachers_precision(recipe_values: dict[str, Any], tmp_path: Path) -> None:
    recipe_values["teacher"]["model"] = save_half(tmp_path / "half", seed=1)
    result = short_run(recipe_values)
    folder, rows = result.directory / "student", result.summary["rows"]
    assert dtypes(folder) == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(folder).config.dtype == torch.bfloat16
    assert rows["student"]["saved_as"] == rows["teacher"]["saved_as"] == "bfloat16"
    for row in rows.values():  # beside a header
        assert row["bytes"] == pytest.approx(2 * row["parameters"], abs=4000)
    (checkpoint,) = (result.directory / "checkpoints" / "student").glob("checkpoint-*")
    trained, saved = load_file(checkpoint / "model.safetensors"), load_file(folder / "model.safetensors")
    assert {weight.dtype for weight in trained.values()} == {torch.float32}
    assert all(torch.equal(weight.bfloat16(), saved[name]) for name, weight in trained.items())
    assert "bfloat16" in (folder / "README.md").read_text()
    built = build_run(Recipe.parse(recipe_values | {"output": str(tmp_path / "other")}))
    student, total, tokens = load_model(str(folder), "student"), 0.0, 0
    for row in built.eval.dataset:
        ids = torch.tensor([row["input_ids"]])
        total += float(student(ids, labels=ids).loss.detach()) * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    assert rows["student"]["loss"] == pytest.approx(total / tokens, rel=1e-4)


def test_the_recipe_decides_otherwise(recipe_values: dict[str, Any], tmp_path: Path) -> None:
    recipe_values["teacher"]["model"] = save_half(tmp_path / "half", seed=1)
    recipe_values["student"]["save_dtype"] = "float32"
    assert dtypes(short_run(recipe_values).directory / "student") == {torch.float32}


def test_check_counts_the_bytes_that_are_saved(recipe_values: dict[str, Any]) -> None:
    recipe_values["evaluate"] = {"baseline": False}
    needs = []
    for dtype in ("float32", "bfloat16"):
        recipe_values["student"]["save_dtype"] = dtype
        needs.append(check(Recipe.parse(recipe_values)))
    assert needs[0].disk_bytes - needs[1].disk_bytes == 2 * needs[0].built.size.all


def test_an_existing_student_keeps_its_own_precision(recipe_values: dict[str, Any], tmp_path: Path) -> None:
    recipe_values["student"] = {"model": save_half(tmp_path / "half", hidden_size=8, layers=1)}
    rows = short_run(recipe_values).summary["rows"]
    assert (rows["student"]["saved_as"], rows["teacher"]["saved_as"]) == ("bfloat16", "float32")


@pytest.mark.parametrize("merge", [False, True])
def test_adapters_stay_as_trained_and_merged_students_do_not(
    recipe_values: dict[str, Any], tmp_path: Path, merge: bool
) -> None:
    adapter = {"kind": "lora", "rank": 2, "dtype": "float32", "merge": merge}
    half = save_half(tmp_path / "half", hidden_size=8, layers=1)
    recipe_values["student"] = {"model": half, "adapter": adapter}
    assert dtypes(short_run(recipe_values).directory / "student") == {torch.bfloat16 if merge else torch.float32}


def test_an_adapter_in_half_precision_is_loaded_again(recipe_values: dict[str, Any], toys: Path) -> None:
    adapter = {"kind": "lora", "rank": 2}
    recipe_values["student"] = {"model": str(toys / "student"), "adapter": adapter, "save_dtype": "bfloat16"}
    result = short_run(recipe_values)
    assert dtypes(result.directory / "student") == {torch.bfloat16}
    assert result.summary["rows"]["student"]["loss"] > 0


def test_the_config_names_the_precision_of_the_checkpoint(tmp_path: Path) -> None:
    model = load_model(save_half(tmp_path), "teacher.model", "float32")
    assert model.dtype == torch.float32
    assert model.config.dtype == torch.bfloat16  # students designed after it are saved so


def test_weights_that_stay_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["input_layernorm"])
    make_llama().save_pretrained(tmp_path)
    convert_saved(tmp_path, torch.bfloat16, "causal")
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name for name, weight in weights.items() if weight.dtype == torch.float32}
    assert kept == {name for name in weights if "input_layernorm" in name}
    assert saved_dtype(tmp_path) == torch.bfloat16


def test_sharded_students_are_converted_as_a_whole(tmp_path: Path) -> None:
    model = make_llama(seed=3)
    model.save_pretrained(tmp_path, max_shard_size="20kB")
    assert len([*tmp_path.glob("model-*-of-*.safetensors")]) > 1
    convert_saved(tmp_path, torch.float16, "causal")
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == torch.float16
    assert not [*tmp_path.glob("*.index.json")]
    for name, weight in again.named_parameters():
        assert torch.equal(weight, model.get_parameter(name).half())


def test_weights_that_would_overflow_stay_as_they_are(tmp_path: Path) -> None:
    make_llama().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.norm.weight"] += 1e6
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    convert_saved(tmp_path, torch.float16, "causal")
    assert describe_precision(tmp_path) == "float32"


def test_a_student_of_a_gguf_teacher_is_saved_in_half_precision(recipe_values: dict[str, Any], tmp_path: Path) -> None:
    write_gguf(make_llama(seed=1), tmp_path / "teacher.gguf")
    recipe_values["teacher"]["model"] = str(tmp_path / "teacher.gguf")
    recipe_values["student"] = {"design": {"num_hidden_layers": 1}, "initialize": "copy"}
    rows = short_run(recipe_values).summary["rows"]
    assert (rows["student"]["saved_as"], rows["teacher"]["saved_as"]) == ("bfloat16", "GGUF")
    assert rows["teacher"]["bytes"] == (tmp_path / "teacher.gguf").stat().st_size
