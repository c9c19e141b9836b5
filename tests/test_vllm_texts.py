"""Data from a real vLLM: where it or Potstill is killed, no row is lost or there twice. Run by make test-server."""

from __future__ import annotations

import json
import time
from collections import Counter
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import PreTrainedTokenizerFast

import processes
from conftest import make_served
from real_vllm import Served, free_port, serve

pytestmark = [pytest.mark.server, pytest.mark.timeout(1800)]
QUESTIONS, SAMPLES = 36, 2


@pytest.fixture
def values(vllm: Served, tmp_path: Path) -> dict[str, Any]:
    return values_of(vllm, tmp_path)


def values_of(vllm: Served, tmp_path: Path) -> dict[str, Any]:
    questions = [{"question": f"{i} + {i}?"} for i in range(QUESTIONS)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    return {
        "kind": "generate",
        "name": "sums",
        "teacher": {"server": {"url": vllm.url, "model": "toy", "concurrency": 4}, "tokenizer": str(vllm.folder)},
        "task": {"task": "responses", "prompts": {"path": str(tmp_path / "questions.jsonl"), "field": "question"}},
        "sampling": {"max_new_tokens": 40, "samples": SAMPLES, "stop": ["\n\n\n"]},
        "filter": {"cut": False, "repetition": None, "min_characters": 0, "refusals": False},
        "batch_size": 3,
    }


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def generated(recipe: Path, *options: str, kill_at: int | None = None) -> int:
    """The exit status of `potstill generate`, killed as soon as so many requests are answered."""
    process = generating(recipe, *options, until=0 if kill_at is None else kill_at)
    if kill_at is not None:
        process.kill()
    return processes.finish(process)


def generating(recipe: Path, *options: str, until: int) -> BaseProcess:
    """A process of `potstill generate` that has answered more than so many requests, or has ended."""
    folder = Path(yaml.safe_load(recipe.read_text())["output"])
    process = processes.potstill("generate", str(recipe), *options, printed=recipe.with_suffix(".log"))
    while process.exitcode is None and len(lines_of(folder / "texts.jsonl")) <= until:
        time.sleep(0.01)
    return process


def lines_of(journal: Path) -> list[bytes]:
    return journal.read_bytes().splitlines() if journal.exists() else []


def test_killed_twice_no_row_is_lost_or_doubled(values: dict[str, Any], tmp_path: Path) -> None:
    recipes = {}
    for name in ("whole", "killed"):
        recipes[name] = tmp_path / f"{name}.yaml"
        recipes[name].write_text(yaml.safe_dump(values | {"output": str(tmp_path / name)}))
    assert generated(recipes["whole"]) == 0, recipes["whole"].with_suffix(".log").read_text()

    assert generated(recipes["killed"], kill_at=9) == -9
    first = lines_of(tmp_path / "killed" / "texts.jsonl")
    assert 9 < len(first) < QUESTIONS
    assert generated(recipes["killed"], "--resume", kill_at=21) == -9
    second = lines_of(tmp_path / "killed" / "texts.jsonl")
    assert second[: len(first)] == first  # what was there is not written again
    assert 21 < len(second) < QUESTIONS
    assert generated(recipes["killed"], "--resume") == 0, recipes["killed"].with_suffix(".log").read_text()

    journal = lines(tmp_path / "killed" / "texts.jsonl")[1:]
    assert [one["ask"] for one in journal] == list(range(QUESTIONS))
    assert all(len(one["texts"]) == SAMPLES for one in journal)
    for name in recipes:  # random weights write little that passes the filters: the others are rows too
        rows = [row for file in ("train", "dropped") for row in lines(tmp_path / name / f"{file}.jsonl")]
        places = Counter((row["provenance"]["row"], row["provenance"]["sample"]) for row in rows)
        assert len(places) == QUESTIONS * SAMPLES and set(places.values()) == {1}
    # Each request has the seed of the run that was not killed; what a server writes for it may differ by the
    # rounding of what it does beside, so that the same text is no demand.
    whole = lines(tmp_path / "whole" / "texts.jsonl")[1:]
    assert [one["seed"] for one in journal] == [one["seed"] for one in whole]
    same = sum(one == other for one, other in zip(journal, whole, strict=True))
    print(f"{same} of {QUESTIONS} requests have the very texts of the run that was not killed")


def test_rows_of_a_server_that_is_killed_and_started_again(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    make_served().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    port, recipes = free_port(), {}
    with serve(tmp_path, "--no-enable-prefix-caching", port=port) as vllm:
        values = values_of(vllm, tmp_path)
        values["teacher"]["server"]["concurrency"] = 1  # rows that are computed together are rounded in other ways
        for name in ("whole", "disturbed"):
            recipes[name] = tmp_path / f"{name}.yaml"
            recipes[name].write_text(yaml.safe_dump(values | {"output": str(tmp_path / name)}))
        assert generated(recipes["whole"]) == 0, recipes["whole"].with_suffix(".log").read_text()
        process = generating(recipes["disturbed"], until=9)
    # The server is killed here. It takes longer to start than the client waits for it.
    printed = recipes["disturbed"].with_suffix(".log")
    assert processes.finish(process) == 1 and "Check that the server runs" in printed.read_text()
    answered = len(lines_of(tmp_path / "disturbed" / "texts.jsonl"))
    assert 9 < answered < QUESTIONS
    with serve(tmp_path, "--no-enable-prefix-caching", port=port):
        assert generated(recipes["disturbed"], "--resume") == 0, printed.read_text()
    for name in ("texts", "train", "dropped"):
        whole, disturbed = (lines_of(tmp_path / folder / f"{name}.jsonl") for folder in recipes)
        assert disturbed == whole
