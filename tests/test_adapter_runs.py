"""Runs whose student is an adapter: what is optimised, kept, resumed, merged, measured and reported."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from conftest import make_llama, mostly_slow, quiet_run
from potstill.data.sources import Source
from potstill.errors import ModelError, RecipeError, UserError
from potstill.models.adapted import is_adapted, parameter_count
from potstill.models.adapters import Lora, adapt
from potstill.models.loading import load_config, load_model, suppress_warnings
from potstill.runs.build import build_run
from potstill.runs.check import check
from potstill.runs.config.run import Recipe
from potstill.runs.evaluate import EvaluationOptions, evaluate
from test_trainer import CHECKPOINTING, losses, trainer

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 2},
    "qlora": {"kind": "qlora", "rank": 2},
    "ia3": {"kind": "ia3"},
    "prompt": {"kind": "prompt", "virtual_tokens": 3, "text": "def f(a, b)"},
    "prefix": {"kind": "prefix", "virtual_tokens": 3},
}


@pytest.fixture
def values(recipe_values: dict[str, Any], toys: Path) -> dict[str, Any]:
    recipe_values["student"] = {"model": str(toys / "student"), "adapter": KINDS["lora"]}
    recipe_values["train"] |= {"max_steps": 4, "logging_steps": 2, "save_steps": 2, "eval_strategy": "no"}
    recipe_values["evaluate"] = {"baseline": False, "continuations": 1, "curve_rows": 2}
    return recipe_values


def adapter_of(one: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in one.distiller.student.parameters() if p.requires_grad])


@pytest.mark.parametrize("kind", mostly_slow(KINDS, "lora", "prompt"))
def test_a_run_keeps_the_adapter_alone(values: dict[str, Any], toys: Path, kind: str) -> None:
    values["student"]["adapter"] = KINDS[kind]
    values["evaluate"]["baseline"] = kind == "lora"
    result = quiet_run(values)
    folder = result.directory / "student"
    assert not list(folder.glob("model*.safetensors"))
    weights = load_file(folder / "adapter_model.safetensors")
    adapter_summary = result.summary["adapter"]
    assert adapter_summary["trained"] == sum(x.numel() for x in weights.values())
    assert adapter_summary["bytes"] == (folder / "adapter_model.safetensors").stat().st_size
    assert Path(adapter_summary["base"]) == (toys / "student").resolve()
    row = result.summary["rows"]["student"]
    assert row["parameters"] == parameter_count(load_model(str(folder), "student")).all
    assert row["bytes"] == adapter_summary["bytes"] + (toys / "student" / "model.safetensors").stat().st_size
    assert adapter_summary["share"] == pytest.approx(adapter_summary["trained"] / row["parameters"])
    (checkpoint,) = (result.directory / "checkpoints" / "student").glob("checkpoint-4")
    assert not list(checkpoint.glob("model*.safetensors"))
    moments = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    assert sum(one["exp_avg"].numel() for one in moments.values()) == adapter_summary["trained"]
    if kind == "lora":
        baseline = load_file(result.directory / "baseline" / "adapter_model.safetensors")
        assert {name: x.shape for name, x in baseline.items()} == {name: x.shape for name, x in weights.items()}
        assert any(not torch.equal(baseline[name], weights[name]) for name in weights)
    page = (result.directory / "report.html").read_text()
    assert f"{adapter_summary['trained']:,} parameters trained" in page
    assert "of its parameters trained" in page
    card = (folder / "README.md").read_text()
    assert "library_name: peft\n" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    space: dict[str, Any] = {}
    load = code.replace('"student"  #', f"{str(folder)!r}  #").partition("inputs =")[0]
    with suppress_warnings():
        exec(load, space)
    assert is_adapted(space["model"])
    found = evaluate(
        str(folder), str(toys / "teacher"), Source(values["data"]["eval"]["path"]), max_length=32, packing=True,
        options=EvaluationOptions(generations=1, new_tokens=2, batch_sizes=[1], lengths=[8]),
    )  # fmt: skip
    assert found["models"]["student"]["quality"]["loss"] == pytest.approx(row["loss"], rel=1e-5)
    assert found["models"]["student"]["parameters"] == row["parameters"]


def test_the_reports_continuations_are_the_students(values: dict[str, Any]) -> None:
    values["student"]["adapter"] = KINDS["prompt"]
    result = quiet_run(values)
    (sample,) = result.summary["continuations"]
    folder = str(result.directory / "student")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), load_model(folder, "student").eval()
    ids = tokenizer(sample["prompt"])["input_ids"]
    generated: list[int] = []
    while len(generated) < 5:
        row = torch.tensor([ids + generated])
        logits = model(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False).logits
        generated.append(int(logits[0, -1].argmax()))
    assert sample["student"].startswith(tokenizer.decode(generated))


@pytest.mark.parametrize("kind", mostly_slow(["lora", "ia3", "qlora"], "lora"))
def test_merged_it_is_a_plain_model(values: dict[str, Any], kind: str) -> None:
    values["student"]["adapter"] = KINDS[kind] | {"merge": True}
    whole = quiet_run(values)
    assert not (whole.directory / "student" / "adapter_config.json").exists()
    assert whole.summary["adapter"]["bytes"] is None
    values["student"]["adapter"] = KINDS[kind]
    values["output"] += "-apart"
    apart = quiet_run(values)
    plain = AutoModelForCausalLM.from_pretrained(whole.directory / "student")
    assert plain.num_parameters() == whole.summary["rows"]["student"]["parameters"]
    row = torch.arange(2, 22)[None]
    student = load_model(str(apart.directory / "student"), "student").eval()
    for layer in student.modules():
        if hasattr(layer, "compute_dtype"):
            layer.compute_dtype = torch.float32  # type: ignore[assignment]  # bfloat16 where the processor has it
    expected = student(input_ids=row).logits
    torch.testing.assert_close(plain(input_ids=row).logits, expected, rtol=1e-4, atol=1e-4)
    assert "merged" in (whole.directory / "student" / "README.md").read_text()


def test_a_design_with_the_teachers_weights_is_merged(values: dict[str, Any]) -> None:
    values["student"] = {
        "design": {"num_hidden_layers": 1},
        "initialize": "copy",
        "adapter": KINDS["lora"] | {"merge": True},
    }
    result = quiet_run(values)
    assert AutoModelForCausalLM.from_pretrained(result.directory / "student").config.num_hidden_layers == 1


def test_an_adapter_is_trained_further(values: dict[str, Any], toys: Path) -> None:
    first = quiet_run(values)
    values["student"] = {"model": str(first.directory / "student")}
    values["output"] += "-further"
    second = quiet_run(values)
    one, two = (load_file(each.directory / "student" / "adapter_model.safetensors") for each in (first, second))
    assert one.keys() == two.keys()
    assert any(not torch.equal(one[name], two[name]) for name in one)
    assert second.summary["adapter"]["base"] == first.summary["adapter"]["base"]
    values["student"]["adapter"] = KINDS["lora"]
    with pytest.raises(ModelError, match="expected a plain model to put it on"):
        build_run(Recipe.parse(values))


@pytest.mark.parametrize("kind", mostly_slow(KINDS, "lora", "prefix"))
def test_resumed_equals_uninterrupted(tmp_path: Path, toys: Path, values: dict[str, Any], kind: str) -> None:
    values["student"]["adapter"] = KINDS[kind]
    built = build_run(Recipe.parse(values))
    arguments: dict[str, Any] = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "per_device_train_batch_size": 4,
    }

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 3

    whole = trainer(tmp_path / "a", student=built.new_student(), **arguments)
    whole.train()
    stopped = trainer(tmp_path / "b", student=built.new_student(), **arguments)
    stopped.add_callback(Stop())
    stopped.train()
    for path in (tmp_path / "b").glob("checkpoint-3"):
        (path / "trainer_state.json").unlink()
    resumed = trainer(tmp_path / "b", student=built.new_student(), **arguments)
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(adapter_of(resumed), adapter_of(whole))


@pytest.mark.slow
def test_a_killed_run_ends_in_the_same_adapter(values: dict[str, Any], tmp_path: Path) -> None:
    values["train"] |= {"max_steps": 40, "save_steps": 5, "logging_steps": 5}
    whole = quiet_run(values)
    values["output"] = str(tmp_path / "killed")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "potstill", "run", str(tmp_path / "recipe.yaml"), "--resume"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline, seen = time.monotonic() + 200, tmp_path / "killed/checkpoints/student/checkpoint-10"
    while process.poll() is None and not seen.exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert re.search(r"adapter LoRA of rank 2: [\d,]+ parameters trained", done.stdout)
    one, two = (load_file(d / "student/adapter_model.safetensors") for d in (whole.directory, tmp_path / "killed"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    "changes",
    [{"bf16": True}, {CHECKPOINTING: True}, {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}}],
    ids=["bf16", "checkpointing", "reentrant"],
)
@pytest.mark.parametrize("kind", mostly_slow(["lora", "prompt"], "lora"))
def test_training_arguments_work(values: dict[str, Any], tmp_path: Path, changes: dict[str, Any], kind: str) -> None:
    values["student"]["adapter"] = KINDS[kind]
    built = build_run(Recipe.parse(values))
    plain, changed = (
        trainer(tmp_path / n, student=built.new_student(), **each) for n, each in (("a", {}), ("b", changes))
    )
    plain.train()
    changed.train()
    assert losses(changed) == pytest.approx(losses(plain), rel=2e-2 if "bf16" in changes else 1e-5)
    one, two = (adapter_of(each) for each in (plain, changed))
    assert not torch.equal(one, adapter_of(trainer(tmp_path, student=built.new_student())))
    if "bf16" not in changes:
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)


def test_check_counts_what_is_trained(values: dict[str, Any]) -> None:
    adapter = check(Recipe.parse(values))
    values["student"]["adapter"] |= {"merge": True}
    merged = check(Recipe.parse(values))
    values["student"]["adapter"] = KINDS["qlora"]
    rounded = check(Recipe.parse(values))
    del values["student"]["adapter"]
    whole = check(Recipe.parse(values))
    assert whole.built.size.trained == whole.built.size.all
    all_, trained = adapter.built.size.all, adapter.built.size.trained
    assert trained < 0.2 * all_ == pytest.approx(0.2 * (whole.built.size.all + trained))
    # Gradients and two moments of what is trained, and of nothing else.
    kept = [found.memory_bytes - found.batch_bytes for found in (whole, adapter, rounded)]
    assert kept[0] - kept[1] == 12 * (whole.built.size.trained - trained) - 4 * trained
    assert kept[2] < kept[1]
    assert adapter.disk_bytes == 7 * 4 * trained
    assert merged.disk_bytes == 6 * 4 * trained + 4 * all_


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ("lorra", r"student.adapter: expected a kind of lora, qlora, ia3, prompt, prefix"),
        ({"kind": "lora", "rank": 0}, "student.adapter.rank"),
        ({"kind": "lora", "ranks": 2}, r"student.adapter.ranks: unknown key. Did you mean rank\?"),
        ({"kind": "qlora", "bits": 3}, "student.adapter.bits"),
        ({"kind": "prompt", "merge": True}, "student.adapter: expected no merge, got one"),
        ({"kind": "prefix", "merge": True}, "student.adapter: expected no merge, got one"),
        ({"kind": "prompt", "rank": 2}, "student.adapter.rank: unknown key"),
        ({"kind": "ia3", "target_modules": []}, "student.adapter.target_modules"),
    ],
    ids=str,
)
def test_mistakes_in_an_adapter_are_named(values: dict[str, Any], adapter: Any, message: str) -> None:
    values["student"]["adapter"] = adapter
    with pytest.raises(RecipeError, match=message):
        Recipe.parse(values)


def test_an_adapter_needs_a_trained_base(values: dict[str, Any]) -> None:
    values["student"] = {"design": {"num_hidden_layers": 1}, "adapter": "lora"}
    with pytest.raises(RecipeError, match="design with random weights"):
        Recipe.parse(values)
    values["student"] |= {"initialize": "copy"}
    with pytest.raises(RecipeError, match="merge: true on a design"):
        Recipe.parse(values)


def test_a_prefix_does_not_go_with_checkpointing(values: dict[str, Any]) -> None:
    values["student"]["adapter"] = "prefix"
    values["train"][CHECKPOINTING] = True
    with pytest.raises(RecipeError, match=r"\n  student.adapter: expected no checkpointing.*the prefix is one"):
        Recipe.parse(values)


def test_virtual_tokens_take_positions(values: dict[str, Any]) -> None:
    values["student"]["adapter"] = KINDS["prompt"]
    values["data"]["max_length"] = 62
    with pytest.raises(RecipeError, match="expected at most 61, what 3 virtual tokens leave of the student's"):
        build_run(Recipe.parse(values))


def test_quantized_weights_are_not_trained(values: dict[str, Any], toys: Path, tmp_path: Path) -> None:
    load_model(str(toys / "student"), "student", bits=4).save_pretrained(tmp_path / "rounded")
    AutoTokenizer.from_pretrained(toys / "student").save_pretrained(tmp_path / "rounded")
    values["student"] = {"model": str(tmp_path / "rounded")}
    with pytest.raises(RecipeError, match="expected weights that can be trained"):
        build_run(Recipe.parse(values))
    values["student"]["adapter"] = KINDS["lora"]
    assert build_run(Recipe.parse(values)).size.trained > 0


def test_another_adapters_checkpoint_is_refused(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer(tmp_path, student=adapt(make_llama(hidden_size=8), Lora(rank=2)), **arguments).train()
    other = trainer(tmp_path, student=adapt(make_llama(hidden_size=8), Lora(rank=4)), **arguments)
    with pytest.raises(UserError, match="expected the weights of this adapter"):
        other.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("vocabulary", [None, {"keep": 280}])
def test_a_student_of_a_teacher_with_an_adapter_begins_with_both(
    recipe_values: dict[str, Any], toys: Path, tmp_path: Path, vocabulary: dict[str, Any] | None
) -> None:
    model = AutoModelForCausalLM.from_pretrained(toys / "teacher")
    adapted = adapt(model, Lora(rank=2), seed=0, tokenizer=AutoTokenizer.from_pretrained(toys / "teacher"))
    adapted.peft_config["default"].base_model_name_or_path = str(toys / "teacher")
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    adapted.save_pretrained(tmp_path / "adapted")
    recipe_values["teacher"] = {"model": str(tmp_path / "adapted")}
    start = {"method": "prune", "fit": False}
    recipe_values["student"] = {"design": {"num_hidden_layers": 2}, "initialize": start, "vocabulary": vocabulary}
    built = build_run(Recipe.parse(recipe_values))
    ids = torch.arange(8)[None] + 20
    with torch.no_grad():
        logits = [m.eval()(ids).logits.float() for m in (built.loaded.model, built.new_student())]
    assert torch.allclose(*logits, atol=1e-4)
    assert not any("random" in note for note in built.notes)
    assert load_config(str(tmp_path / "adapted"), "teacher").hidden_size == 16


def test_the_size_of_a_cut_teacher_with_an_adapter_is_in_its_bases_precision(
    recipe_values: dict[str, Any], toys: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(toys / "teacher")
    model = AutoModelForCausalLM.from_pretrained(toys / "teacher", dtype=torch.bfloat16)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "base")
    adapted = adapt(model, Lora(rank=2), seed=0, tokenizer=tokenizer).float()
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapted")
    recipe_values["teacher"] = {"model": str(tmp_path / "adapted")}
    recipe_values["student"]["vocabulary"] = {"keep": 280}
    recipe_values["train"]["max_steps"] = 1
    recipe_values["evaluate"] = {"continuations": 0}
    teacher = quiet_run(recipe_values).summary["rows"]["teacher"]
    assert teacher["bytes"] == 2 * teacher["parameters"]
