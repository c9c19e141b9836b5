"""Every block of docs/on-policy.md runs, and every recipe of its table is one."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from potstill.cli import app
from potstill.pipeline import run
from potstill.recipe import Recipe
from toy_student_server import ToyStudentServer

PAGE = (Path(__file__).parent.parent / "docs/on-policy.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture
def workplace(toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(toys, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_recipe_and_commands_run(workplace: Path) -> None:
    recipe, _ = blocks("yaml")
    (workplace / "own.yaml").write_text(recipe)
    for line in blocks("console")[0].splitlines():
        done = CliRunner().invoke(app, shlex.split(line)[1:], catch_exceptions=False)
        assert done.exit_code == 0, done.output


def test_a_server_writes(workplace: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    recipe, part = map(yaml.safe_load, blocks("yaml"))
    served = shlex.split(blocks("console")[1])
    assert [served[place + 1] for place in (2, served.index("--served-model-name"))] == ["student", "student"]
    server = ToyStudentServer(tokenizer)
    server.name = "student"
    try:
        part["rollout"]["server"]["url"] = server.url
        run(Recipe.parse(recipe | part), console=Console(quiet=True))
        assert server.lent
    finally:
        server.close()


def test_the_table_says_recipes() -> None:
    base, _ = blocks("yaml")
    table = PAGE[PAGE.index("| method |") : PAGE.index("- `policy` needs")]
    lines = [line.split(" | ") for line in table.strip().splitlines()[2:]]
    assert len(lines) == 6
    for _, objective, rollout in lines:
        terms = [yaml.safe_load(term) for term in re.findall(r"`(\{.*?\}+)`", objective)]
        (keys, *_) = re.findall(r"`(.*?)`", rollout)
        Recipe.parse(yaml.safe_load(base) | {"objective": terms, "rollout": yaml.safe_load(f"{{{keys}}}")})


def test_the_python_runs(workplace: Path) -> None:
    (code,) = blocks("python")
    (workplace / "example.py").write_text(code)
    runpy.run_path(str(workplace / "example.py"))
