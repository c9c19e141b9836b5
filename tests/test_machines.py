"""Work that Ray spreads: no row lost or doubled, and mistakes reported in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from potstill.errors import UserError
from potstill.runs.ray import start_ray

# Ray makes its processes nicer than all others, so that they starve where cores are shared.
ENVIRONMENT = {**os.environ, "RAY_worker_niceness": "0"}


def generate(recipe: Path, *more: str) -> subprocess.Popen[str]:
    """The command in a process of its own: Ray's warnings are no concern of these tests."""
    command = [sys.executable, "-m", "potstill", "generate", str(recipe), *more]
    return subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def request_numbers(journal: Path) -> list[int]:
    """The numbers of the requests in the journal's whole lines, in their order."""
    if not journal.exists():
        return []
    whole = journal.read_bytes().rpartition(b"\n")[0]
    return [json.loads(line)["ask"] for line in whole.splitlines()[1:]]


@pytest.fixture
def recipe(toys: Path, tmp_path: Path) -> Path:
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"def f{i}("}) + "\n" for i in range(60)))
    values: dict[str, Any] = {
        "kind": "generate",
        "name": "spread",
        "teacher": {"model": str(toys / "teacher")},
        "task": {"task": "responses", "prompts": {"path": str(tmp_path / "prompts.jsonl"), "field": "prompt"}},
        "sampling": {"max_new_tokens": 40, "samples": 2},
        "filter": {"cut": False, "repetition": None},
        "batch_size": 2,
        "output": str(tmp_path / "alone"),
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "recipe.yaml"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ray_killed_and_resumed_writes_what_one_process_writes(recipe: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    spread = ("--engine", "ray", "--set", f"output={tmp_path / 'many'}")
    journal = tmp_path / "many" / "texts.jsonl"
    killed = generate(recipe, *spread)
    while len(request_numbers(journal)) < 4:
        assert killed.poll() is None, killed.communicate()[1]
        time.sleep(0.05)
    killed.kill()
    killed.communicate()
    assert 4 <= len(request_numbers(journal)) < 60
    for more in ((*spread, "--resume"), ()):
        one = generate(recipe, *more)
        stderr = one.communicate()[1]
        assert one.returncode == 0, stderr
    assert sorted(request_numbers(journal)) == list(range(60))
    alone, many = ((tmp_path / name / "train.jsonl").read_bytes() for name in ("alone", "many"))
    assert alone == many


@pytest.mark.slow
@pytest.mark.parametrize("where", ["a row", "the start"])
def test_a_mistake_there_is_one_line_here(where: str) -> None:
    pytest.importorskip("ray")
    script = (
        "from potstill.errors import PotstillError, UserError\n"
        "from potstill.runs.ray import map_rows\n"
        "def begin(request):\n"
        "    def do(row):\n"
        "        raise UserError(f'{request}: expected this, got that.')\n"
        "    return do if request == 'a row' else do(request)\n"
        "try:\n"
        f"    list(map_rows('work', [{{'n': 1}}], begin, {where!r}))\n"
        "except PotstillError as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == f"UserError {where}: expected this, got that.", done.stderr


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        UserError, match=r"generate: expected Ray for --engine ray, got none. pip install 'potstill\[ray\]'"
    ):
        start_ray("generate")
