"""Every block of docs/scale.md that can run on two processes of a CPU does."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from pages import blocks
from potstill.cli import app
from potstill.runs import cache as caching
from potstill.runs.config.run import Recipe
from potstill.teachers.cache.store import Cache

PAGE = "docs/scale.md"


@pytest.fixture
def workplace(toys: Path, recipe_values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the page's reader has it, with recipes of other pages."""
    shutil.copytree(toys, tmp_path, dirs_exist_ok=True)
    (tmp_path / "cache.sh").write_text(*blocks(PAGE, "bash"))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_values | {"output": "runs/toy"}))
    questions = {
        "kind": "generate",
        "name": "questions",
        "teacher": {"model": "teacher"},
        "task": {"task": "responses", "prompts": {"path": "train.jsonl", "field": "text"}},
        "sampling": {"max_new_tokens": 4},
        "filter": {"cut": False},
        "output": "answers",
    }
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": f"def f{i}("}) + "\n" for i in range(200)))
    (tmp_path / "questions.yaml").write_text(yaml.safe_dump(questions))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_recipe_of_fsdp_is_one(recipe_values: dict[str, Any]) -> None:
    (fsdp,) = (yaml.safe_load(block) for block in blocks(PAGE, "yaml") if block.startswith("train"))
    recipe_values["train"] |= fsdp["train"]
    assert Recipe.parse(recipe_values).train["fsdp"] is True


def test_the_parts_of_an_array_make_a_whole_cache(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching, "SHARD_TOKENS", 256)
    command = (workplace / "cache.sh").read_text().splitlines()[-1]
    array = next(line for line in (workplace / "cache.sh").read_text().splitlines() if "--array" in line)
    assert array.endswith("0-3")
    for task in (2, 0, 3, 1):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
        assert not (workplace / "cache/manifest.json").exists()
        done = CliRunner().invoke(app, shlex.split(os.path.expandvars(command))[1:], catch_exceptions=False)
        assert done.exit_code == 0, done.output
    assert len(Cache(workplace / "cache").manifest.shards) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("block", blocks(PAGE, "console"), ids=lambda block: block.split()[0])
def test_the_commands_run(workplace: Path, block: str) -> None:
    if "--engine ray" in block:
        pytest.importorskip("ray")
    here = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": here, "RAY_worker_niceness": "0"}
    for line in block.splitlines():
        done = subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stderr[-3000:]}"
