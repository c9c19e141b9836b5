"""Every block of docs/on-policy.md runs, and every recipe of its table is one."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from pages import blocks, run_commands, run_python, text
from potstill.runs.config.run import Recipe
from potstill.runs.run import run
from toy_student_server import ToyStudentServer

PAGE = "docs/on-policy.md"


@pytest.fixture
def workplace(toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(toys, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_recipe_and_commands_run(workplace: Path) -> None:
    (workplace / "own.yaml").write_text(blocks(PAGE, "yaml")[0])
    run_commands(blocks(PAGE, "console")[0])


def test_a_server_writes(workplace: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    recipe, part = map(yaml.safe_load, blocks(PAGE, "yaml"))
    served = shlex.split(blocks(PAGE, "console")[1])
    assert [served[place + 1] for place in (2, served.index("--served-model-name"))] == ["student", "student"]
    server = ToyStudentServer(tokenizer)
    server.name = "student"
    try:
        part["rollout"]["server"]["url"] = server.url
        run(Recipe.parse(recipe | part), console=Console(quiet=True))
        assert server.received
    finally:
        server.close()


def test_the_rows_of_the_table_are_recipes() -> None:
    base, _ = blocks(PAGE, "yaml")
    page = text(PAGE)
    table = page[page.index("| method |") : page.index("- `policy` needs")]
    lines = [line.split(" | ") for line in table.strip().splitlines()[2:]]
    assert len(lines) == 6
    for _, objective, rollout in lines:
        terms = [yaml.safe_load(term) for term in re.findall(r"`(\{.*?\}+)`", objective)]
        (keys, *_) = re.findall(r"`(.*?)`", rollout)
        Recipe.parse(yaml.safe_load(base) | {"objective": terms, "rollout": yaml.safe_load(f"{{{keys}}}")})


def test_the_python_runs(workplace: Path) -> None:
    run_python(*blocks(PAGE, "python"))
