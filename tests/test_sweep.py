"""A sweep: its grid, its runs, killed and resumed, and what goes wrong."""

from __future__ import annotations

import copy
import io
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from potstill.cli import app
from potstill.cli.sweep import _table
from potstill.errors import DataError, DivergedError, RecipeError, RunError, UserError
from potstill.evaluate.report.sweep import write_sweep_report
from potstill.evaluate.tradeoff import Limits
from potstill.runs import sweep as sweeping
from potstill.runs.sweep import grid, read_axes, sweep


@pytest.fixture
def values(recipe_values: dict[str, Any]) -> dict[str, Any]:
    recipe_values["train"]["max_steps"] = 2
    recipe_values["evaluate"] = {"baseline": False, "continuations": 0}
    return recipe_values


def quiet_sweep(values: dict[str, Any], vary: list[str], out: Path, **options: Any) -> Any:
    return sweep(copy.deepcopy(values), read_axes(vary), out, console=Console(file=io.StringIO()), **options)


VARY = ["student.design.hidden_size=4,8", "objective.0.temperature=1,2"]


def test_a_sweep_writes_its_files_and_summary(values: dict[str, Any], tmp_path: Path) -> None:
    found = quiet_sweep(values, VARY, tmp_path / "sweep")
    names = {path.name for path in found.directory.iterdir()}
    runs = {f"hidden_size-{size}-temperature-{t}" for size in (4, 8) for t in (1, 2)}
    assert names == {"sweep.json", "sweep.html", *runs}
    assert all((found.directory / run / "student" / "model.safetensors").exists() for run in runs)
    rows = found.summary["runs"]
    assert [row["values"] for row in rows] == [
        {"student.design.hidden_size": size, "objective.0.temperature": t} for size in (4, 8) for t in (1, 2)
    ]
    for row in rows:
        own = json.loads((found.directory / row["directory"] / "summary.json").read_text())
        assert row["loss"] == own["rows"]["student"]["loss"]
        assert row["parameters"] == own["rows"]["student"]["parameters"]
        assert row["latency_ms"] > 0
        own_rows = own["rows"]
        assert row["speed_up"] == own_rows["teacher"]["latency_ms"] / own_rows["student"]["latency_ms"]
        hidden, heads = row["values"]["student.design.hidden_size"], 2  # keys and values of each position, 2 bytes each
        assert row["memory_bytes"] == row["bytes"] + 32 * 2 * 2 * heads * (hidden // heads)
        assert own["name"].endswith(row["label"])
    assert rows[0]["parameters"] == rows[1]["parameters"] < rows[2]["parameters"]
    assert found.summary["teacher"]["parameters"] > rows[3]["parameters"]
    best = max(range(4), key=lambda i: rows[i]["quality"])
    assert best == min(range(4), key=lambda i: rows[i]["loss"])
    assert best in found.summary["fronts"]["parameters"]
    page = (found.directory / "sweep.html").read_text()
    assert "pareto-parameters" in page
    assert found.summary["recommended"]["why"].split(":")[0] in page
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")


def test_students_with_other_tokens_are_compared_by_text(values: dict[str, Any], toys: Path, tmp_path: Path) -> None:
    found = quiet_sweep(values, ["student.vocabulary.keep=data,270"], tmp_path / "sweep")
    summaries = [
        json.loads((found.directory / row["directory"] / "summary.json").read_text()) for row in found.summary["runs"]
    ]
    bits = [summary["rows"]["student"]["bits_per_byte"] for summary in summaries]
    sizes = [summary["data"]["eval_bytes_per_token"] for summary in summaries]
    assert sizes[0] > 1.02 * sizes[1]
    whole = summaries[0]["rows"]["whole_teacher"]
    teacher = found.summary["teacher"]
    assert teacher["parameters"] == whole["parameters"] > summaries[1]["rows"]["teacher"]["parameters"]
    assert teacher["loss"] == pytest.approx(whole["bits_per_byte"] * math.log(2) * teacher["bytes_per_token"], rel=1e-6)
    for row, of_byte in zip(found.summary["runs"], bits, strict=True):
        nats = math.log(2) * teacher["bytes_per_token"] * of_byte
        assert row["loss"] == pytest.approx(nats, rel=1e-6)
        assert row["quality"] == pytest.approx(math.exp(teacher["loss"] - nats), rel=1e-6)


def test_exported_files_are_compared_by_their_sizes_and_speeds(values: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: pip install 'potstill[export]'")
    values["export"] = [{"quantize": "f16"}, {"quantize": "q8_0"}]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    command = ["sweep", str(tmp_path / "recipe.yaml"), "--vary", "student.design.hidden_size=4,8"]
    printed = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "sweep")], catch_exceptions=False).stdout
    summary = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    files = [(file["run"], file["kind"]) for file in summary["files"]]
    assert files == [(0, "f16"), (0, "q8_0"), (1, "f16"), (1, "q8_0")]
    for file in summary["files"]:
        folder = tmp_path / "sweep" / summary["runs"][file["run"]]["directory"] / "export"
        assert file["bytes"] == (folder / file["file"]).stat().st_size and file["ms_per_token"] > 0
        assert abs(file["quality"] - summary["runs"][file["run"]]["quality"]) < 0.05
    for cost in ("bytes", "ms_per_token"):
        front = [summary["files"][place][cost] for place in summary["file_fronts"][cost]]
        assert front == sorted(front) and front[0] == min(file[cost] for file in summary["files"])
    page = (tmp_path / "sweep" / "sweep.html").read_text()
    assert "pareto-file-bytes" in page and "pareto-file-ms_per_token" in page and "student-q8_0.gguf" in page
    assert "exported files" in printed and "student-q8_0.gguf" in printed


def test_finished_runs_are_not_repeated_and_more_values_may_come(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet_sweep(values, ["objective.0.temperature=1,2"], tmp_path / "sweep")
    with pytest.raises(RecipeError, match=r"which holds a run.*--resume"):
        quiet_sweep(values, ["objective.0.temperature=1,2"], tmp_path / "sweep")
    began = []
    run = sweeping.run
    monkeypatch.setattr(sweeping, "run", lambda recipe, **more: began.append(recipe.output) or run(recipe, **more))
    again = quiet_sweep(values, ["objective.0.temperature=1,2,4"], tmp_path / "sweep", resume=True)
    assert [Path(output).name for output in began] == ["temperature-4"]
    assert len(again.summary["runs"]) == 3
    with pytest.raises(RecipeError, match="got another train"):
        quiet_sweep(
            values | {"train": values["train"] | {"max_steps": 3}},
            ["objective.0.temperature=1"],
            tmp_path / "sweep",
            resume=True,
        )


@pytest.mark.slow
def test_a_killed_sweep_goes_on_to_the_same_weights(values: dict[str, Any], tmp_path: Path) -> None:
    values["train"] |= {"max_steps": 12, "save_steps": 4}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    whole = quiet_sweep(values, ["seed=0,1"], tmp_path / "whole")
    command = [sys.executable, "-m", "potstill", "sweep", str(tmp_path / "recipe.yaml"), "--vary", "seed=0,1"]
    command += ["--out", str(tmp_path / "killed")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while process.poll() is None and not list(tmp_path.glob("killed/seed-1/checkpoints/student/checkpoint-*")):
        time.sleep(0.01)
    process.kill()
    process.wait()
    done = CliRunner().invoke(app, [*command[3:], "--resume"], catch_exceptions=False)
    assert done.exit_code == 0
    for run in ("seed-0", "seed-1"):
        one, two = (d / run / "student" / "model.safetensors" for d in (whole.directory, tmp_path / "killed"))
        assert one.read_bytes() == two.read_bytes()


def test_a_run_that_fails_leaves_the_others(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = sweeping.run

    def diverge(recipe: Any, **more: Any) -> Any:
        if recipe.seed == 1:
            raise DivergedError("training: expected finite numbers, got loss nan")
        return run(recipe, **more)

    monkeypatch.setattr(sweeping, "run", diverge)
    with pytest.raises(RunError, match=r"expected 2 runs to finish, got 1 that did not \(seed 1: training.*--resume"):
        quiet_sweep(values, ["seed=0,1"], tmp_path / "sweep")
    summary = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [row["label"] for row in summary["runs"]] == ["seed 0"]
    assert "got loss nan" in (tmp_path / "sweep" / "sweep.html").read_text()
    monkeypatch.setattr(sweeping, "run", run)
    assert len(quiet_sweep(values, ["seed=0,1"], tmp_path / "sweep", resume=True).summary["runs"]) == 2


def test_nothing_finished_is_a_page_too(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(recipe: Any, **more: Any) -> Any:
        raise DataError("data: expected rows, got none.")

    monkeypatch.setattr(sweeping, "run", refuse)
    with pytest.raises(RunError, match="expected 1 runs"):
        quiet_sweep(values, ["seed=0"], tmp_path / "sweep")
    assert "data: expected rows, got none." in (tmp_path / "sweep" / "sweep.html").read_text()


def test_limits_decide_and_the_report_is_written_again(values: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    few = quiet_sweep(values, ["student.design.hidden_size=4,8"], out, limits=Limits(max_parameters=10)).summary
    assert few["recommended"]["place"] is None
    assert "at most 10 parameters" in (out / "sweep.html").read_text()
    (out / "sweep.html").unlink()
    assert CliRunner().invoke(app, ["report", str(out)], catch_exceptions=False).exit_code == 0
    assert (out / "sweep.html").exists()


def test_the_table_fits_into_80_columns() -> None:
    row = {"loss": 3.1234, "quality": 0.8123, "parameters": 1.1e9, "bytes": 2.2e9, "latency_ms": 123.4, "speed_up": 2.5}
    labels = ("compression 2.5, temperature 2, weight 0.5", "compression 16, temperature 4, weight 0.25")
    runs = [row | {"label": label} for label in labels]
    fronts = {"parameters": [0, 1], "bytes": [0], "latency_ms": [0]}
    out = io.StringIO()
    table = _table({"name": "toy", "runs": runs, "fronts": fronts, "recommended": {"place": 0}})
    Console(file=out, width=80).print(table)
    text = " ".join(out.getvalue().split())
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    for cell in ("speed-up", "3.123", "81.2%", "1.1B", "2.2 GB", "123 ms", "2.5x", "p s l", "temperature"):
        assert cell in text


def test_names_tell_combinations_apart(values: dict[str, Any], tmp_path: Path) -> None:
    values["objective"] = [{"term": "logits"}, {"term": "logits", "divergence": "jsd"}]
    long = "student.design={hidden_size: 8, num_hidden_layers: 1},{hidden_size: 4, num_hidden_layers: 1}"
    axes = read_axes(["objective.0.temperature=1,2", "objective.1.temperature=1.5", long])
    points = grid(values, axes, tmp_path)
    assert points[0].label == "0.temperature 1, 1.temperature 1.5, design hidden_size 8 num_hidden_layers 1"
    assert len({point.directory for point in points}) == 4
    assert all(len(point.directory.name) < 100 for point in points)
    assert points[3].recipe.objective[0].temperature == 2
    assert points[3].recipe.student.design == {"hidden_size": 4, "num_hidden_layers": 1}
    del values["student"]
    data = grid(values, read_axes(["student.model=a/b,a-b"]), tmp_path)
    assert len({point.directory for point in data}) == 2


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        ([], "expected --vary KEY=VALUE,VALUE, got none"),
        (["train.max_steps"], "expected KEY=VALUE,VALUE such as .*, got train.max_steps"),
        (["=1,2"], "expected KEY=VALUE,VALUE"),
        (["seed=[1"], "Brackets and quotes must close"),
        (["seed=1", "seed=2"], "--vary seed: expected each key once"),
        (["output=a,b"], "Each run has a directory"),
        (["data.eval.path=a,b"], "same held-out text"),
        (["train.max_step=1,2"], "Did you mean max_steps"),
        (["student.compression=2,4"], "student.compression: unknown key"),
        (["seed=-1,-2"], "greater than or equal to 0"),
    ],
)
def test_what_cannot_be_varied_is_refused_before_anything_runs(
    values: dict[str, Any], tmp_path: Path, vary: list[str], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        quiet_sweep(values, vary, tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


def test_each_mistake_is_reported_once(values: dict[str, Any], tmp_path: Path) -> None:
    values["train"]["max_step"] = 1
    with pytest.raises(RecipeError) as caught:
        grid(values, read_axes(["seed=1,2", "objective.0.temperature=1,-1"]), tmp_path)
    assert str(caught.value).count("max_step:") == 2  # alone, and beside the other mistake
    assert str(caught.value).count("temperature:") == 1


def test_other_mistakes(values: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--engine: expected process or ray, got slurm"):
        quiet_sweep(values, ["seed=0"], tmp_path / "sweep", engine="slurm")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("")
    with pytest.raises(RecipeError, match=r"--out: expected a sweep's or a new directory, got .*holds a run"):
        quiet_sweep(values, ["seed=0"], tmp_path / "run")
    with pytest.raises(DataError, match="expected the summary of a sweep"):
        write_sweep_report(tmp_path)
    (tmp_path / "embedding.yaml").write_text("kind: embedding\noutput: x\n")
    with pytest.raises(UserError, match="expected a distillation recipe, got kind embedding"):
        CliRunner().invoke(app, ["sweep", str(tmp_path / "embedding.yaml"), "--vary", "seed=1"], catch_exceptions=False)


@pytest.mark.slow
def test_ray_gives_the_same_students(values: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("ray")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    for engine in ("process", "ray"):  # processes of their own: Ray's warnings are no concern of these tests
        command = [sys.executable, "-m", "potstill", "sweep", str(tmp_path / "recipe.yaml"), "--vary", "seed=0,1"]
        command += ["--out", str(tmp_path / engine), "--engine", engine]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    for run in ("seed-0", "seed-1"):
        one, two = (tmp_path / engine / run / "student" / "model.safetensors" for engine in ("process", "ray"))
        assert one.read_bytes() == two.read_bytes()
