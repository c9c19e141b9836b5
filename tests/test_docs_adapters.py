"""The blocks of docs/adapters.md run."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from pages import blocks, run_commands, run_python, text
from potstill.errors import ModelError
from potstill.models.adapters import Adapter
from potstill.models.loading import suppress_warnings
from potstill.runs.config.student import StudentPart

PAGE = "docs/adapters.md"


@pytest.mark.slow
def test_the_page_runs(toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(toys, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    (recipe,) = blocks(PAGE, "yaml")
    short = recipe.replace("max_steps: 500", "max_steps: 2").replace("adapter: lora", "adapter: {kind: lora, rank: 2}")
    Path("recipe.yaml").write_text(short)
    run_commands(*blocks(PAGE, "console"))
    figures = json.loads(Path("figures.json").read_text())["models"]["student"]
    summary = json.loads(Path("runs/adapted/summary.json").read_text())
    assert figures["quality"]["loss"] == pytest.approx(summary["rows"]["student"]["loss"], rel=1e-4)
    for code in blocks(PAGE, "python"):
        with suppress_warnings():
            run_python(code)
    assert Path("plain/model.safetensors").exists()
    assert Path("loop/student/adapter_model.safetensors").exists()


def test_the_options_that_the_page_names_exist() -> None:
    parts = {each["properties"]["kind"]["const"]: each["properties"] for each in kinds()}
    for kind, options, merges in re.findall(
        r"^\| `(\w+)` \|.*?\| (.*?) \| (yes|no) \|$", text(PAGE), flags=re.MULTILINE
    ):
        for option in re.findall(r"`(\w+)`", options):
            assert option in parts[kind] or option == "lora"
        assert can_merge(kind) == (merges == "yes")


def can_merge(kind: str) -> bool:
    try:
        return Adapter.kinds[kind](merge=True).merge
    except ModelError:
        return False


def kinds() -> list[dict]:
    definitions = StudentPart.model_json_schema()["$defs"]
    return [each for each in definitions.values() if "const" in each["properties"].get("kind", {})]
