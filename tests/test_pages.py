"""Every block of every page runs, and every link leads somewhere.

A page whose blocks need more than the toys has a test of its own, which names it; all others run here.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import potstill
from conftest import make_llama
from pages import ROOT, all_blocks, blocks, run_commands, run_python, text
from potstill.runs.config.run import Recipe

PAGES = [str(path.relative_to(ROOT)) for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])]
OTHERS = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/test_*.py") if path != Path(__file__))
ELSEWHERE = re.compile(r"docs/from/")  # test_from.py runs these
HERE = [
    page
    for page in PAGES
    if "```" in text(page)
    and not ELSEWHERE.match(page)
    and not re.search(rf'["/]{re.escape(Path(page).name)}"', OTHERS)
]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
SHORT = ["train.max_steps=2", "train.warmup_steps=0", "evaluate.continuations=0"]


SLOW = {"docs/troubleshooting.md": pytest.mark.slow}


@pytest.mark.parametrize("page", [pytest.param(page, marks=SLOW.get(page, ())) for page in HERE])
def test_every_block_runs(page: str, toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(toys, tmp_path, dirs_exist_ok=True)
    make_llama(hidden_size=32, layers=4).save_pretrained(tmp_path / "teacher")  # the toys are too small for a budget
    monkeypatch.chdir(tmp_path)
    (recipe,) = blocks("README.md", "yaml")
    whole = yaml.safe_load(recipe)
    for number, (language, block) in enumerate(all_blocks(page)):
        if language == "yaml":
            values = yaml.safe_load(block)
            whole = values if "name" in values else whole
            Path("part.yaml").write_text(Recipe.parse(over(whole, values)).dump())
            run_commands(
                "potstill run part.yaml", *sets([*SHORT, "evaluate.baseline=false", f"output=runs/part{number}"])
            )
        elif language == "console":
            Path("recipe.yaml").write_text(Recipe.parse(whole, sets=SHORT).dump())
            run_commands(block)
        else:
            assert language == "python", f"{page}: a block that nobody runs: {language}"
            run_python(block)


def sets(values: list[str]) -> list[str]:
    return [word for value in values for word in ("--set", value)]


def over(base: dict[str, Any], fragment: dict[str, Any]) -> dict[str, Any]:
    """A recipe with a fragment's keys in place of its own."""
    inner = ("data", "train", "evaluate")  # of these the keys that the fragment leaves out stay
    return base | {key: base.get(key, {}) | value if key in inner else value for key, value in fragment.items()}


def test_the_commands_of_the_pages_are_there() -> None:
    makefile = text("Makefile")
    extras = tomllib.loads(text("pyproject.toml"))["project"]["optional-dependencies"]
    for page in PAGES:
        for line in "".join(blocks(page, "console")).replace("\\\n", " ").splitlines():
            program, *words = line.split() or [""]
            assert page not in HERE or program in ("potstill", "make"), f"{page}: {line}"
            assert program != "make" or f"\n{words[0]}:" in makefile, f"{page}: {line}"
        for names in re.findall(r"pip\s+install\s+'potstill\[([\w,-]+)\]'", text(page)):
            assert set(names.split(",")) <= set(extras), f"{page}: {names}"


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", FENCED.sub("", text(page))):
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), f"{page}: {target}#{anchor}"


def anchors(page: str) -> set[str]:
    """Of its headings, by GitHub's rule."""
    titles = re.findall(r"^#+ (.*)$", FENCED.sub("", page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_messages_that_troubleshooting_quotes_are_ours() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("src/**/*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # texts that go on in the next line
    quoted = re.findall(r"^> (.*)$", text("docs/troubleshooting.md"), flags=re.MULTILINE)
    assert len(quoted) > 10
    for message in quoted:
        for part in message.split("..."):
            assert part.strip() in source, part


def test_every_public_name_is_in_the_reference_once() -> None:
    pages = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("docs/api/*.rst"))
    named = re.findall(r"^\.\. auto\w+:: potstill\.(?:losses\.)?(\w+)$", pages, flags=re.MULTILINE)
    assert sorted(named) == sorted(potstill.__all__)


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    (line,) = re.findall(r"-m (sphinx .*) site$", text("Makefile"), flags=re.MULTILINE)
    subprocess.run([sys.executable, "-m", *line.split(), str(tmp_path)], cwd=ROOT, check=True)
    assert "docs/index.html" in (tmp_path / "index.html").read_text()
    for path in tmp_path.rglob("*"):
        if path.suffix == ".html":
            fetched = re.findall(
                r"<(?:script|link|img|iframe)\b[^>]*(?:src|href)=\"(?:https?:)?//[^>]*>", path.read_text()
            )
            assert not fetched, path
        elif path.suffix == ".css":
            assert not re.findall(r"(?:url\(|@import\s)[\"']?(?:https?:)?//", path.read_text()), path
