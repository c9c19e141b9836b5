"""Every block of docs/text.md runs."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from potstill.cli import app
from potstill.engines.sampling import Completion, Prompt, Sampling
from potstill.errors import UserError
from potstill.generation import sandbox
from potstill.runs import generate as generation

PAGE = (Path(__file__).parent.parent / "docs/text.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture
def workplace(toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the page's reader has it."""
    shutil.copytree(toys, tmp_path, dirs_exist_ok=True)
    rows = [{"question": f"{i} + {i}?", "answer": str(2 * i)} for i in range(4)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "eval.jsonl").write_text('{"prompt": "1 + 1?", "completion": "Answer: 2"}\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Adder:
    def complete(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Completion]]:
        sums = [2 * int(str(prompt)[0]) for prompt in prompts]
        return [[Completion(f"Add them.\nAnswer: {x + i % 2}", True) for i in range(sampling.samples)] for x in sums]


def test_the_recipes_and_commands_run(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "_engine", lambda *_: Adder())
    for name, recipe in zip(("reasoning", "student", "weighed"), blocks("yaml"), strict=True):
        (workplace / f"{name}.yaml").write_text(recipe)
    commands = [shlex.split(line)[1:] for block in blocks("console") for line in block.splitlines()]
    assert [command[0] for command in commands] == ["generate", "generate", "run", "init", "check", "run"]
    for command in (each for each in commands if each[0] == "run"):  # the toy's memory is short
        command += ["--set", "data.max_length=64", "--set", "evaluate.continuations=0"]
    for command in commands:
        done = CliRunner().invoke(app, command, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        shorter = workplace / "out/train.jsonl"
        rows = [json.loads(line) for line in shorter.read_text().splitlines()]
        assert len(rows) == 8
        for row in rows:  # the template alone fills the toy's memory
            row["prompt"] = row["question"]
        shorter.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("sums", "weighed"):
        assert (workplace / f"runs/{name}/student/model.safetensors").exists()


def test_the_keys_that_the_page_names_exist() -> None:
    schema = json.dumps(generation.GenerateRecipe.model_json_schema())
    table = PAGE[PAGE.index("## Filters") : PAGE.index("`near_duplicates` needs")]
    named = re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE)
    for key in re.findall(r"`(\w+)`", " ".join(named)):
        assert f'"{key}"' in schema
    (limits,) = re.findall(r"`(programs: \{.*?\})`", PAGE, flags=re.DOTALL)
    assert vars(sandbox.ProgramLimits()) == yaml.safe_load(limits)["programs"]


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_the_python_runs(number: int, workplace: Path) -> None:
    code = blocks("python")[number]
    if "run_program" in code:
        try:
            sandbox.require_sandbox()
        except UserError as error:
            pytest.skip(str(error))
    (workplace / "example.py").write_text(code)
    runpy.run_path(str(workplace / "example.py"))
