"""What is shown works: every recipe trains two steps, every block of the README runs, the docs are up to date."""

from __future__ import annotations

import io
import json
import runpy
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from conftest import TEXT, make_llama, make_tokenizer
from pages import blocks, run_commands, run_python
from potstill.runs.config.run import Recipe
from potstill.runs.run import run

ROOT = Path(__file__).parent.parent
RECIPES = sorted([*(ROOT / "recipes").glob("*.yaml"), ROOT / "benchmarks/stdlib.yaml"])
OTHERS = ("kind: embedding", "\ntask: ")  # tests/test_embedding_run.py, tests/test_encoder_run.py
RECIPES = [path for path in RECIPES if not any(word in path.read_text() for word in OTHERS)]
README, SIGNALS = "README.md", "docs/signals.md"
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}<end>{% endif %}{% endfor %}"
CHAT += "{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.fixture
def workplace(toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the README's reader has it: teacher/, student/, train.jsonl, eval.jsonl."""
    shutil.copytree(toys, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_trains_two_steps(path: Path, workplace: Path) -> None:
    recipe = Recipe.load(path)
    source = {name: value for name, value in vars(recipe.data.train).items() if isinstance(value, str)}
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT
    for name, seed in (("teacher", 1), ("student", 2)):
        make_llama(seed=seed).save_pretrained(workplace / name)
        tokenizer.save_pretrained(workplace / name)
    for split in ("train", "eval"):
        rows = []
        for text in TEXT[:20]:
            chat = [{"role": "user", "content": text[:9]}, {"role": "assistant", "content": text[9:30]}]
            values = {"field": text, "prompt": text[:9], "completion": text[9:30], "messages": chat}
            rows.append({column: values[key] for key, column in source.items() if key != "path"})
        (workplace / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = ["data.max_length=48", "train.max_steps=2", "train.warmup_steps=0", "evaluate.continuations=0"]
    small += ["train.gradient_accumulation_steps=2"] if "gradient_accumulation_steps" in recipe.train else []
    if recipe.student.design:
        small.append("student.design={hidden_size: 8, num_hidden_layers: 1, num_attention_heads: 2}")
    result = run(Recipe.load(path, small), console=Console(file=io.StringIO()))
    assert result.summary["training"]["steps"] == 2
    assert set(result.summary["rows"]) == {"teacher", "baseline", "student"}


def test_the_python_of_the_readme_runs(workplace: Path) -> None:
    for code in blocks(README, "python"):
        assert len(code.splitlines()) <= 16
        run_python(code)
    assert (workplace / "runs/mine/student/model.safetensors").exists()


def test_the_recipe_and_the_commands_of_the_readme_run(workplace: Path) -> None:
    (workplace / "recipe.yaml").write_text(*blocks(README, "yaml"))
    commands = "".join(blocks(README, "console"))
    named = [shlex.split(line)[1] for line in commands.splitlines() if line.startswith("potstill")]
    assert named == ["init", "check", "data", "run", "run", "report", "schema"]
    run_commands(commands)


@pytest.mark.slow
def test_the_page_on_signals_runs(workplace: Path) -> None:
    for code in blocks(SIGNALS, "python"):
        run_python(code)
    (recipe,) = blocks(README, "yaml")
    base = {key: value for key, value in yaml.safe_load(recipe).items() if key != "objective"}
    for i, block in enumerate(blocks(SIGNALS, "yaml")):
        sets = [f"output=signals{i}", "train.max_steps=2", "train.warmup_steps=0", "evaluate.continuations=0"]
        values = Recipe.parse({**base, **yaml.safe_load(block)}, sets=[*sets, "evaluate.baseline=false"])
        assert run(values, console=Console(file=io.StringIO())).summary["training"]["steps"] == 2


@pytest.mark.parametrize("name", ["recipe.md", "recipes.md"])
def test_the_pages_that_are_made_are_up_to_date(name: str) -> None:
    page = runpy.run_path(str(ROOT / "docs/reference.py"))["PAGES"][name]()
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == page, "run make docs"
