"""The pages in docs/from describe how to do here what other projects do. Each page is tested for this:

1. Its first table has the columns There and Here. Each row of Here names at least one thing in backticks, a Python
   name, a `potstill` command, a key or a piece of a recipe, or a file (`named.py` says how); all of it exists.
2. There holds everything that tests/promised/PAGE.txt lists: what that project's document describes. A line is a name,
   or a name and what belongs to it (`DistillationType: LOGIT, FEATURE`), which stands in its row or in the rows below
   that begin with "its".
3. Its blocks run, in order (`pages.py` says how), in a folder with teacher/, student/, train.jsonl and eval.jsonl
   (`text`), questions.jsonl (`prompt`, `completion`), embedder/, embeddings.npy and teacher.pt.
4. Its table of defaults that differ has those of the code.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from named import default_of, exists
from pages import run_page

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs/from").glob("*.md"))
named = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def table(page: Path) -> list[tuple[str, str]]:
    """The rows of its first table."""
    lines = page.read_text(encoding="utf-8").splitlines()
    first = next(place for place, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        there, here = (cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1])
        rows.append((there, here))
    assert rows[0] == ("There", "Here")
    assert set("".join(rows[1])) <= set("-:")
    return rows[2:]


def in_backticks(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


@named
def test_everything_has_a_counterpart_that_exists(page: Path) -> None:
    missing = []
    for there, here in table(page):
        named = in_backticks(here)
        missing += [f"{there}: {name}" for name in named if not exists(name)]
        missing += [] if named else [f"{there}: nothing in backticks"]
    assert not missing, "\n".join(missing)


def holds(text: str, name: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text) is not None


def topics(page: Path) -> list[tuple[str, str]]:
    """What stands in backticks in There: in each row that does not begin with "its", and there with the rows below."""
    found: list[tuple[str, str]] = []
    for there, _ in table(page):
        names = " ".join(in_backticks(there))
        if there.startswith("its "):
            head, others = found.pop()
            found.append((head, f"{others} {names}"))
        else:
            found.append((names, names))
    return found


@named
def test_everything_in_the_list_of_the_page_exists(page: Path) -> None:
    promised = (ROOT / f"tests/promised/{page.stem}.txt").read_text(encoding="utf-8").splitlines()
    assert len(promised) > 5
    missing = []
    for line in promised:
        owner, _, owned = line.partition(": ")
        texts = " ".join(text for head, text in topics(page) if not owned or holds(head, owner))
        missing += [f"{owner}: {name}" for name in (owned.split(", ") if owned else [owner]) if not holds(texts, name)]
    assert not missing, "\n".join(missing)


@named
def test_defaults_that_differ_are_those_of_the_code(page: Path) -> None:
    section = page.read_text(encoding="utf-8").partition("## Defaults that differ\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (\S+) \| `([\w.]+)` \| (\S+) \|$", section, flags=re.MULTILINE)
    assert len(rows) == section.count("\n| `") > 1
    for there, default, here, own in rows:
        assert default_of(here) == _value(own) != _value(default), here
        assert re.search(rf"`[^`]*\b{there}\b", page.read_text(encoding="utf-8")), there


def _value(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return "no" if text == "no" else yaml.safe_load(text)


@pytest.mark.slow
@named
def test_the_page_runs(page: Path, workplace: Path) -> None:
    run_page(str(page.relative_to(ROOT)))


@named
def test_its_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert target.startswith("http") or (page.parent / target).exists(), target


@pytest.mark.parametrize(
    "text",
    [
        *("Logits", "schedule.linear", "Logits.temperature", "potstill.hidden_mse", "transformers.Trainer"),
        *("Logits(JSD(0.5), temperature=2.0)", "Distiller(student, teacher, terms).step(batch)", "Projection"),
        *("DistillationConfig.warmup_steps", "potstill cache build --codec sampled --out DIR", "potstill check"),
        *("seed", "student.adapter.rank", "objective.temperature", "train.fp16", "student.static"),
        *("temperature: {schedule: linear, start: 4.0, end: 1.0}", "{term: hidden, distance: cosine}", "focus: local"),
        "recipes/text.yaml",
    ],
)
def test_what_exists_is_found(text: str) -> None:
    assert exists(text)


@pytest.mark.parametrize(
    "text",
    [
        *("Logit", "schedule.lineal", "Logits.temperatur", "Logits(JSD(0.5), temp=2.0)", "potstill.losses.nothing"),
        *("Distiller(student, teacher, terms).walk(batch)", "potstill cache bake", "potstill check --fast", "sead"),
        *("student.adapter.ranks", "train.fp17", "{term: hidden, distance: cosin}", "{term: hiden}", "recipes/no.yaml"),
        *("temperature: {schedule: linear, begin: 4.0}", "Logits(Jensen(0.5))", "a plain sentence", "0.5", "json"),
    ],
)
def test_what_does_not_exist_is_not(text: str) -> None:
    assert not exists(text)


@pytest.fixture
def workplace(toys: Path, embedder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the pages' reader has it."""
    shutil.copytree(toys, tmp_path, dirs_exist_ok=True)
    shutil.copytree(embedder, tmp_path / "embedder")
    rows = [{"prompt": f"{i} + {i} =", "completion": f" {2 * i}"} for i in range(20)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    vectors = torch.randn(400, 12) @ torch.randn(12, 1536)
    np.save(tmp_path / "embeddings.npy", vectors.numpy())
    torch.save({"embeddings": vectors, "model_state": {}}, tmp_path / "teacher.pt")
    monkeypatch.chdir(tmp_path)
    return tmp_path
