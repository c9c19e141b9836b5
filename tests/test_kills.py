"""Commands that are killed in the midst of changing each kind of file, or interrupted in each phase, and start again.

benchmarks/faults.py tries every change of a file, and random moments.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import processes
from conftest import make_llama
from file_faults import FileFault
from potstill import files
from potstill.errors import RunError, UserError
from potstill.files import atomic_path, temporary_path
from potstill.models.checksums import write_checksums
from potstill.models.size import build
from potstill.runs import ranks
from potstill.train.checkpoints import check_ranks, remove_incomplete

RUN = ("run", "recipe.yaml", "--resume")


@pytest.fixture
def folder(recipe_values: dict[str, Any], toys: Path, tmp_path: Path) -> Path:
    """What the commands need, and the folder in which they work."""
    recipe_values["train"] |= {"max_steps": 4, "save_steps": 2}
    recipe_values |= {"output": "run", "evaluate": {"continuations": 0}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_values))
    questions = [{"question": f"What is {i} plus {i}?", "answer": f"#### {2 * i}"} for i in range(4)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    values = {
        "kind": "generate",
        "name": "sums",
        "teacher": {"model": str(toys / "teacher")},
        "task": {
            "task": "chain_of_thought",
            "questions": {"path": "questions.jsonl", "answer": "answer"},
            "template": "Q: {question}\nA:",
        },
        "sampling": {"max_new_tokens": 4},
        "filter": {"cut": False, "scripts": [], "repetition": None},
        "batch_size": 1,
        "output": "texts",
    }
    (tmp_path / "generate.yaml").write_text(yaml.safe_dump(values))
    shutil.copytree(toys / "student", tmp_path / "model")
    (tmp_path / "teacher").symlink_to(toys / "teacher")
    for name in ("train", "eval"):
        shutil.copy(toys / f"{name}.jsonl", tmp_path)
    return tmp_path


def ended(folder: Path, command: tuple[str, ...], **fault: Any) -> int:
    """The exit status of a command, with a fault if one is given."""
    at = FileFault(folder, **fault) if fault else None
    return processes.finish(processes.potstill(*command, printed=folder / "printed", folder=folder, fault=at))


def unfinished(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if "partial" in path.name]


CACHE = ("cache", "build", "--teacher", "teacher", "--data", "train.jsonl", "--out", "cache", "--max-length", "32")
KILLED: dict[str, tuple[tuple[str, ...], list[dict[str, Any]], list[str]]] = {
    "train": (
        RUN,
        [
            {"before": "open run/checkpoints/student/checkpoint-2/trainer_state.json"},
            {"before": "os.mkdir run/checkpoints/student/checkpoint-4", "size": 3000},
            {"before": "os.rename run/student"},
            {"before": "os.rename run/report.html"},
        ],
        ["run/student/model.safetensors", "run/student/config.json", "run/student/generation_config.json"],
    ),
    "cache": (
        CACHE,
        [{"before": "os.rename cache/shards/00000.arrow"}, {"before": "os.rename cache/manifest.json"}],
        ["cache/manifest.json", "cache/shards/00000.arrow"],
    ),
    "generate": (
        ("generate", "generate.yaml", "--resume"),
        [{"before": "open texts/texts.jsonl", "size": 300}, {"before": "os.rename texts/train.jsonl"}],
        ["texts/texts.jsonl", "texts/train.jsonl", "texts/README.md"],
    ),
    "export": (
        ("export", "model", "--quantize", "f16"),
        [
            {"before": "open model/export/student-f16.gguf.*", "size": 5000},
            {"before": "os.rename model/export/student-f16.gguf"},
        ],
        ["model/export/student-f16.gguf"],
    ),
}


@pytest.mark.parametrize("name", KILLED)
def test_killed_at_the_change_of_a_file_it_goes_on_to_the_same_bytes(name: str, folder: Path) -> None:
    command, faults, results = KILLED[name]
    if name == "export":
        pytest.importorskip("xllamacpp")
    for fault in faults:
        expected = -signal.SIGXFSZ if "size" in fault else -signal.SIGKILL
        assert ended(folder, command, **fault) == expected, (fault, (folder / "printed").read_text())
    assert ended(folder, command) == 0, (folder / "printed").read_text()
    killed = {path: (folder / path).read_bytes() for path in results}
    if name == "train":
        steps = [json.loads(line)["step"] for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        assert steps == sorted(steps) and len(steps) == 4 + 4  # a line for each step, and one for each evaluation
    assert not unfinished(folder)
    for path in ("run", "cache", "texts", "model/export"):
        shutil.rmtree(folder / path, ignore_errors=True)
    assert ended(folder, command) == 0
    assert killed == {path: (folder / path).read_bytes() for path in results}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("command", [CACHE, KILLED["generate"][0], RUN], ids=["cache", "generate", "report"])
def test_an_interrupt_outside_training_prints_one_line(command: tuple[str, ...], number: int, folder: Path) -> None:
    before = {"cache": "open cache/plan.json.*", "generate": "open texts/texts.jsonl", "run": "open run/summary.json.*"}
    assert ended(folder, command, before=before[command[0]], number=number) == 128 + number
    printed = (folder / "printed").read_text()
    assert printed.splitlines()[-1].startswith("interrupted: saved work is kept.") and "Traceback" not in printed
    assert not unfinished(folder)


def test_what_killed_processes_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "getpid", lambda: 2**22 + 1)  # no process has this number
        left = [temporary_path(tmp_path / name) for name in ("same.json", "other.json", "folder")]
    others = [temporary_path(tmp_path / "same.json"), tmp_path / "same.json.partial"]
    for path in (*left[:2], *others):
        path.touch()
    left[2].mkdir()
    with atomic_path(tmp_path / "same.json") as partial:
        partial.touch()
        assert sorted(tmp_path.iterdir()) == sorted([*others, partial])


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until another folder takes its place, the one that is there has all its files."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").touch()
    monkeypatch.setattr(files.shutil, "rmtree", lambda path, **_: pytest.fail(f"{path}") if path.name == "model" else 0)
    with atomic_path(tmp_path / "model") as partial:
        partial.mkdir()
        (partial / "new").touch()
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["new"]


def test_a_config_is_not_shared_by_the_models_that_are_built_of_it() -> None:
    config = make_llama().config
    one, two = build(config, "meta"), build(config, "meta")
    one.config.use_cache = False  # as a Trainer does
    assert two.config.use_cache and config.use_cache


# Ranks


def test_a_checkpoint_is_resumed_by_as_many_ranks(tmp_path: Path) -> None:
    check_ranks(tmp_path, 3)  # a checkpoint of weights alone
    for rank in range(2):
        (tmp_path / f"rng_state_{rank}.pth").touch()
    check_ranks(tmp_path, 2)
    with pytest.raises(UserError, match=r"--resume: expected as many processes as wrote .*, which is 2, got 1\. Start"):
        check_ranks(tmp_path, 1)


def test_what_a_kill_left_of_a_checkpoint_is_removed(tmp_path: Path) -> None:
    for step, state in ((2, "{}"), (4, "{"), (6, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    remove_incomplete(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_what_a_kill_left_of_an_older_checkpoint_is_removed(tmp_path: Path) -> None:
    for step in (2, 4):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in ("trainer_state.json", "model.safetensors"):
            (folder / name).write_text("{}")
        write_checksums(folder)
        (folder / "model.safetensors").unlink()
    remove_incomplete(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"], "of the newest one it is damage"


def _wait_for_a_lost_rank(fault: str) -> None:
    """On rank 1 the fault; on rank 0 the error that follows."""
    state = ranks.join_ranks({"ddp_timeout": 3})
    if state.process_index == 1:
        os.kill(os.getpid(), signal.SIGKILL if fault == "killed" else signal.SIGSTOP)
    message = r"^run: expected all 2 ranks to answer, got .*--resume\.$"
    with pytest.raises(RunError, match=message), ranks.explain_lost_rank():
        try:
            torch.distributed.all_reduce(torch.ones(1))
        except RuntimeError as error:
            raise RunError("run: expected the step to work") from error
    os._exit(7)


@pytest.mark.parametrize("fault", ["killed", "hung"])
def test_a_lost_rank_is_named_as_the_cause(fault: str, tmp_path: Path) -> None:
    one, other = processes.start_ranks(tmp_path, _wait_for_a_lost_rank, fault)
    assert processes.finish(one, 60) == 7, (tmp_path / "rank-0").read_text()
    other.kill()
    assert processes.finish(other) == -signal.SIGKILL
