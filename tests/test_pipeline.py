"""A whole run as a user would make it: the directory, killed and resumed, and what goes wrong."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import processes
from conftest import make_llama, make_tokenizer, mostly_slow, quiet_run
from potstill.errors import DataError, ModelError, PotstillError, RecipeError, RunError, VocabularyError
from potstill.evaluate.speed import latencies
from potstill.models.loading import load_model
from potstill.runs.build import build_run
from potstill.runs.check import check
from potstill.runs.config.run import Recipe
from potstill.runs.progress import PartProgress
from potstill.runs.run import run
from processes import finish


class Done(NamedTuple):
    status: int
    printed: str


def potstill(*arguments: str, folder: Path) -> Done:
    printed = folder / "printed"
    return Done(finish(processes.potstill(*arguments, printed=printed, folder=folder)), printed.read_text())


def written(values: dict[str, Any], folder: Path) -> str:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return str(folder / "recipe.yaml")


def test_a_run_writes_its_files_and_summary(recipe_values: dict[str, Any]) -> None:
    result = quiet_run(recipe_values)
    names = {path.name for path in result.directory.iterdir()}
    assert names == {
        "recipe.yaml", "inputs.json", "metrics.jsonl", "rows.json", "summary.json", "checkpoints", "student",
        "baseline", "report.html",
    }  # fmt: skip
    rows = result.summary["rows"]
    assert list(rows) == ["teacher", "baseline", "student"]
    for row in rows.values():
        assert set(row) == {
            *("loss", "perplexity", "agreement", "kl", "parameters", "bytes", "saved_as", "latency_ms"),
        }
    assert rows["teacher"]["kl"] == pytest.approx(0, abs=1e-6)
    assert rows["teacher"]["agreement"] == 1
    assert rows["student"]["parameters"] == rows["baseline"]["parameters"] < rows["teacher"]["parameters"]
    gap = rows["baseline"]["loss"] - rows["teacher"]["loss"]
    if gap > 0:
        closed = (rows["baseline"]["loss"] - rows["student"]["loss"]) / gap
        assert result.summary["gap_closed"] == pytest.approx(closed)
    assert len(result.summary["continuations"]) == 3
    lines = [json.loads(line) for line in (result.directory / "metrics.jsonl").read_text().splitlines()]
    for name in ("student", "baseline"):
        assert [line["step"] for line in lines if line["run"] == name and "loss" in line] == [
            1,
            2,
            3,
            4,
            5,
            6,
        ]
    assert Recipe.load(result.directory / "recipe.yaml") == Recipe.parse(recipe_values)
    model = AutoModelForCausalLM.from_pretrained(result.directory / "student")
    assert model.num_parameters() == rows["student"]["parameters"]
    assert AutoTokenizer.from_pretrained(result.directory / "student").get_vocab()
    assert f"{rows['student']['loss']:.3f}" in (result.directory / "student" / "README.md").read_text()


def test_both_runs_begin_with_the_same_weights_and_see_the_same_data(recipe_values: dict[str, Any]) -> None:
    recipe_values["objective"] = [{"term": "labels"}]
    result = quiet_run(recipe_values)
    student, baseline = (load_file(result.directory / n / "model.safetensors") for n in ("student", "baseline"))
    assert all(torch.equal(student[key], baseline[key]) for key in student)
    assert result.summary["rows"]["student"]["loss"] == result.summary["rows"]["baseline"]["loss"]


def test_an_existing_student_is_taken_as_it_is(recipe_values: dict[str, Any], toys: Path) -> None:
    recipe_values["student"] = {"model": str(toys / "student")}
    recipe_values["train"] = {"num_train_epochs": 1, "per_device_train_batch_size": 16}
    recipe_values["evaluate"] = {"baseline": False, "continuations": 0}
    summary = quiet_run(recipe_values).summary
    assert list(summary["rows"]) == ["teacher", "student"]
    assert summary["gap_closed"] is None
    assert summary["continuations"] == []
    assert summary["training"]["steps"] == -(-summary["data"]["train_examples"] // 16)


def test_a_finished_directory_is_not_overwritten(recipe_values: dict[str, Any]) -> None:
    first = quiet_run(recipe_values)
    with pytest.raises(RecipeError, match="which holds a run"):
        quiet_run(recipe_values)
    before = (first.directory / "student" / "model.safetensors").stat().st_mtime_ns
    again = quiet_run(recipe_values, resume=True)
    assert (again.directory / "student" / "model.safetensors").stat().st_mtime_ns == before
    assert again.summary["rows"]["student"]["loss"] == first.summary["rows"]["student"]["loss"]
    with pytest.raises(RecipeError, match="got another train"):
        quiet_run(recipe_values | {"train": recipe_values["train"] | {"max_steps": 7}}, resume=True)


def test_killed_and_resumed_equals_uninterrupted(recipe_values: dict[str, Any], tmp_path: Path) -> None:
    recipe_values["train"] |= {"max_steps": 40, "save_steps": 5, "logging_steps": 5}
    whole = quiet_run(recipe_values)
    recipe_values["output"] = str(tmp_path / "killed")
    path = written(recipe_values, tmp_path)
    kills = 0
    for wanted in ("student/checkpoint-10", "baseline/checkpoint-10"):
        process = processes.potstill("run", path, "--resume", printed=tmp_path / "printed")
        deadline = time.monotonic() + 120
        seen = tmp_path / "killed" / "checkpoints" / wanted
        while process.is_alive() and not seen.exists() and time.monotonic() < deadline:
            time.sleep(0.002)
        kills += process.is_alive()
        process.kill()
        assert finish(process) == -signal.SIGKILL
    assert kills == 2
    done = potstill("run", path, "--resume", folder=tmp_path)
    assert done.status == 0, done.printed
    for name in ("student", "baseline"):
        one, two = (load_file(d / name / "model.safetensors") for d in (whole.directory, tmp_path / "killed"))
        assert all(torch.equal(one[key], two[key]) for key in one)
    lines = [json.loads(line) for line in (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()]
    steps = [(line["run"], line["step"]) for line in lines if "loss" in line]
    assert len(steps) == len(set(steps)) == 16


def test_killed_after_the_last_checkpoint_it_takes_no_step_more(recipe_values: dict[str, Any]) -> None:
    recipe_values["evaluate"]["baseline"] = False
    recipe_values["train"]["lr_scheduler_type"] = "constant"  # a step too many would be seen
    first = quiet_run(recipe_values)
    assert first.summary["training"]["steps"] % (first.summary["data"]["train_examples"] // 4)  # within an epoch
    before = load_file(first.directory / "student" / "model.safetensors")
    shutil.rmtree(first.directory / "student")
    again = quiet_run(recipe_values, resume=True)
    after = load_file(again.directory / "student" / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(x, after[name]) for name, x in before.items())


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_prints_how_to_resume(
    recipe_values: dict[str, Any], tmp_path: Path, number: int, status: int
) -> None:
    recipe_values["train"] |= {"max_steps": 100_000, "save_steps": 100_000, "eval_strategy": "no"}
    process = processes.potstill("run", written(recipe_values, tmp_path), printed=tmp_path / "printed")
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, number)
    assert finish(process, 60) == status
    printed = (tmp_path / "printed").read_text()
    assert "interrupted: saved work is kept" in printed
    assert "Traceback" not in printed
    assert list(tmp_path.glob("run/checkpoints/student/checkpoint-*"))


@pytest.mark.parametrize("number", mostly_slow([signal.SIGINT, signal.SIGTERM], signal.SIGTERM))
def test_a_signal_ends_the_training_behind_its_step(
    recipe_values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    recipe_values["train"] |= {"save_steps": 100, "logging_steps": 100}
    whole = quiet_run(recipe_values)
    recipe_values["output"] = str(tmp_path / "interrupted")
    update = PartProgress.update

    def interrupted(progress: PartProgress, done: int, *arguments: Any, **named: Any) -> None:
        if done == 3 and progress.title == "student":
            signal.raise_signal(number)
        update(progress, done, *arguments, **named)

    monkeypatch.setattr(PartProgress, "update", interrupted)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        quiet_run(recipe_values)
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    assert [path.name for path in tmp_path.glob("interrupted/checkpoints/student/*")] == ["checkpoint-3"]
    monkeypatch.undo()
    again = quiet_run(recipe_values, resume=True)
    one, two = (load_file(result.directory / "student" / "model.safetensors") for result in (whole, again))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_check_trains_nothing(recipe_values: dict[str, Any]) -> None:
    found = check(Recipe.parse(recipe_values))
    assert found.built.plan.steps == 6
    assert found.built.vocabulary == 300
    parameters = found.built.size.all
    assert parameters < found.built.loaded.model.num_parameters()
    assert found.memory_bytes > 16 * parameters
    assert found.seconds > 0
    assert not Path(recipe_values["output"]).exists()


def broken(values: dict[str, Any], toys: Path, tmp_path: Path, what: str) -> dict[str, Any]:
    data = values["data"]
    if what == "teacher path":
        values["teacher"]["model"] = str(toys / "teachr")
    elif what == "not a model":
        (tmp_path / "empty").mkdir()
        values["teacher"]["model"] = str(tmp_path / "empty")
    elif what == "pickled weights":
        model = make_llama()
        model.save_pretrained(tmp_path / "pickled")
        make_tokenizer().save_pretrained(tmp_path / "pickled")
        torch.save(model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
        (tmp_path / "pickled" / "model.safetensors").unlink()
        values["teacher"]["model"] = str(tmp_path / "pickled")
    elif what == "data field":
        data["train"]["field"] = "txt"
    elif what == "data path":
        data["train"]["path"] = str(toys / "trian.jsonl")
    elif what == "empty data":
        (tmp_path / "empty.jsonl").write_text("")
        data["eval"]["path"] = str(tmp_path / "empty.jsonl")
    elif what == "design field":
        values["student"]["design"]["hiden_size"] = 8
    elif what == "design shape":
        values["student"]["design"]["num_attention_heads"] = 3
    elif what == "other tokenizer":
        make_llama(vocab_size=310).save_pretrained(tmp_path / "other")
        make_tokenizer(310).save_pretrained(tmp_path / "other")
        values["student"] = {"model": str(tmp_path / "other")}
    elif what == "same size, other tokens":
        make_llama().save_pretrained(tmp_path / "moved")
        tokenizer = make_tokenizer()
        tokenizer.save_pretrained(tmp_path / "moved")
        path = tmp_path / "moved" / "tokenizer.json"
        state = json.loads(path.read_text())
        vocab = state["model"]["vocab"]
        vocab["A"], vocab["B"] = vocab["B"], vocab["A"]
        path.write_text(json.dumps(state))
        values["student"] = {"model": str(tmp_path / "moved")}
    elif what == "too long":
        data["max_length"] = 1000
    elif what == "output":
        (tmp_path / "file").write_text("")
        values["output"] = str(tmp_path / "file")
    elif what == "arguments":
        values["train"] |= {"load_best_model_at_end": True, "eval_strategy": "no"}
    elif what == "NaN":
        values["train"] |= {"learning_rate": 1e30, "max_grad_norm": 0.0, "optim": "sgd", "save_steps": 1}
    return values


@pytest.mark.parametrize(
    ("what", "kind", "message"),
    [
        ("teacher path", ModelError, "Did you mean .*teacher"),
        ("not a model", ModelError, "teacher.model: expected a model's config.json"),
        ("pickled weights", ModelError, "safetensors"),
        ("data field", DataError, "text"),
        ("data path", DataError, "train.jsonl"),
        ("empty data", DataError, "empty"),
        ("design field", ModelError, "Did you mean hidden_size"),
        ("design shape", ModelError, "student.design"),
        ("other tokenizer", VocabularyError, "300 and 310 tokens, 10 only the student has.*cross-tokenizer"),
        ("same size, other tokens", VocabularyError, "2 under another id"),
        ("too long", RecipeError, "data.max_length: expected at most 64"),
        ("output", RecipeError, "output: expected a directory to write to"),
        ("arguments", RecipeError, "train: expected arguments that go together"),
        ("NaN", PotstillError, "optimiser step .*last good checkpoint"),
    ],
)
def test_bad_input_is_one_clear_line(
    recipe_values: dict[str, Any],
    toys: Path,
    tmp_path: Path,
    what: str,
    kind: type[PotstillError],
    message: str,
) -> None:
    values = broken(recipe_values, toys, tmp_path, what)
    with pytest.raises(kind, match=message) as caught:
        quiet_run(values)
    assert "\n" not in str(caught.value)
    if what != "NaN":  # a mistake corrected, the same command works: nothing stands in its way
        assert not Path(values["output"]).exists() or not (Path(values["output"]) / "metrics.jsonl").exists()


def test_a_padded_teacher_head_is_sliced_with_a_note(recipe_values: dict[str, Any], tmp_path: Path) -> None:
    make_llama(vocab_size=320, seed=1).save_pretrained(tmp_path / "padded")
    make_tokenizer().save_pretrained(tmp_path / "padded")
    recipe_values["teacher"]["model"] = str(tmp_path / "padded")
    result = quiet_run(recipe_values)
    assert any("vocabulary: 300 tokens" in note and "teacher 320" in note for note in result.summary["notes"])


def test_a_tokenizer_without_pad_uses_its_eos_with_a_note(recipe_values: dict[str, Any], tmp_path: Path) -> None:
    make_llama(seed=1).save_pretrained(tmp_path / "padless")
    make_tokenizer(eos_token="<end>").save_pretrained(tmp_path / "padless")
    recipe_values["teacher"]["model"] = str(tmp_path / "padless")
    recipe_values["data"]["packing"] = False
    result = quiet_run(recipe_values)
    assert any("pad" in note and "<end>" in note for note in result.summary["notes"])


def test_the_command_line(recipe_values: dict[str, Any], tmp_path: Path) -> None:
    path = written(recipe_values, tmp_path)
    command = [sys.executable, "-m", "potstill", "check", path]  # from nothing, as a user starts it
    checked = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert checked.returncode == 0, checked.stderr
    assert "pip install" not in checked.stderr, checked.stderr  # nor what other packages advise on some CPUs
    assert "300 tokens, the same for both" in checked.stdout
    options = ["--set", "train.max_steps=2", "--set", "evaluate.continuations=1"]
    done = potstill("run", path, *options, folder=tmp_path)
    assert done.status == 0, done.printed
    assert "student" in done.printed
    report = Path(recipe_values["output"]) / "report.html"
    report.unlink()
    assert potstill("report", recipe_values["output"], folder=tmp_path).status == 0
    assert report.exists()
    assert "potstill demo" in potstill("--help", folder=tmp_path).printed
    assert json.loads(potstill("schema", folder=tmp_path).printed)["title"] == "Recipe"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["run", "nowhere.yaml"], 2, "recipe: expected a file, got nowhere.yaml"),
        (["run", "recipe.yaml", "--set", "train.max_step=1"], 2, "Did you mean max_steps?"),
        (["report", "."], 2, "report: expected"),
        (["rum"], 2, "No such command"),
    ],
)
def test_the_command_line_prints_the_error(
    recipe_values: dict[str, Any], tmp_path: Path, arguments: list[str], status: int, message: str
) -> None:
    written(recipe_values, tmp_path)
    done = potstill(*arguments, folder=tmp_path)
    assert done.status == status, done.printed
    assert message in done.printed
    assert "Traceback" not in done.printed
    if arguments[0] == "run":
        assert "Traceback" in potstill(*arguments, "--debug", folder=tmp_path).printed


def test_bfloat16_is_left_out_where_a_cpu_has_no_instructions_for_it(
    recipe_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    teacher = make_llama(seed=1).bfloat16()
    teacher.save_pretrained(tmp_path / "half")
    make_tokenizer().save_pretrained(tmp_path / "half")
    recipe_values["teacher"]["model"] = str(tmp_path / "half")
    recipe_values["train"]["bf16"] = True
    for has in (False, True):
        monkeypatch.setattr("potstill.models.loading.multiplies_bfloat16", lambda has=has: has)
        built = build_run(Recipe.parse(recipe_values))
        assert built.loaded.model.dtype == (torch.bfloat16 if has else torch.float32)
        assert built.plan.bf16 is has
        assert any("train.bf16" in note for note in built.notes) is not has


@pytest.mark.parametrize("has", [False, True])
def test_no_cpu_computes_float16_weights_as_such(has: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Which is several times slower than float32, and more than ten times slower than bfloat16."""
    make_llama(seed=1).half().save_pretrained(tmp_path / "half")
    monkeypatch.setattr("potstill.models.loading.multiplies_bfloat16", lambda: has)
    assert load_model(str(tmp_path / "half"), "teacher").dtype == torch.float32
    assert load_model(str(tmp_path / "half"), "teacher", "float16").dtype == torch.float16


def test_all_models_are_timed_in_the_teachers_precision(
    recipe_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe_values["teacher"]["dtype"] = "bfloat16"
    timed = {}

    def note(models: Any, *arguments: Any, **options: Any) -> Any:
        timed.update({name: model.dtype for name, model in models.items()})
        return latencies(models, *arguments, **options)

    monkeypatch.setattr("potstill.runs.measure.latencies", note)
    rows = quiet_run(recipe_values).summary["rows"]
    assert timed == dict.fromkeys(("teacher", "baseline", "student"), torch.bfloat16)
    assert rows["student"]["saved_as"] == "float32"


def test_a_full_disk_is_reported_as_one(recipe_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 1659136 vs 1659028")

    usage = shutil.disk_usage(recipe_values["output"].rpartition("/")[0])
    recipe = Recipe.parse(recipe_values | {"evaluate": {"baseline": False}})
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(RuntimeError, match="inline_container"):  # there is room: it is something else
            run(recipe, console=Console(file=io.StringIO()))
        patch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=100))
        with pytest.raises(
            RunError, match=r"output: expected room for 0\.\d MB on the disk of .*, got 0\.0 MB\. .*--resume"
        ):
            run(recipe, resume=True, console=Console(file=io.StringIO()))
    assert run(recipe, resume=True, console=Console(file=io.StringIO())).summary["training"]["steps"] == 6
