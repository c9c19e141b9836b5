"""What a command shows of its progress, on a terminal and in a log."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments

from potstill.runs import progress
from potstill.runs.progress import PartProgress, part
from potstill.runs.training_progress import TrainingProgress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, as the first entry."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def log() -> tuple[io.StringIO, Console]:
    out = io.StringIO()
    return out, Console(file=out, width=80)


def training(
    folder: Path, step: int, steps: int
) -> tuple[io.StringIO, TrainingProgress, tuple[TrainingArguments, TrainerState, TrainerControl]]:
    """A training that begins behind a step, with its progress in a log."""
    out, console = log()
    shown = TrainingProgress("student", console)
    args = TrainingArguments(output_dir=str(folder), use_cpu=True)
    state = TrainerState(global_step=step, max_steps=steps, is_world_process_zero=True)
    shown.on_train_begin(args, state, control := TrainerControl())
    return out, shown, (args, state, control)


def test_a_log_has_a_line_for_each_logged_step_with_loss_and_time_left(tmp_path: Path, clock: list[float]) -> None:
    out, shown, (args, state, control) = training(tmp_path, step=2, steps=6)
    for step in (3, 4, 5, 6):
        clock[0] += 2.0
        state.global_step = step
        shown.on_step_end(args, state, control)
        if step in (4, 6):
            shown.on_log(args, state, control, {"loss": 1.2345})
    shown.on_train_end(args, state, control)
    assert out.getvalue().splitlines() == [
        "student: 4/6, loss 1.234, 4.0 s left",  # of the steps since it resumed
        "student: 6/6, loss 1.234, took 8.0 s",
    ]


def test_a_slow_step_that_is_logged_has_one_line(tmp_path: Path, clock: list[float]) -> None:
    out, shown, (args, state, control) = training(tmp_path, step=0, steps=4)
    for step in (1, 2):
        clock[0] += 60.0
        state.global_step, control.should_log = step, step == 2
        shown.on_step_end(args, state, control)
    shown.on_log(args, state, control, {"loss": 1.2345})
    lines = out.getvalue().splitlines()
    assert [line.split(" min")[0] for line in lines] == ["student: 1/4, 3", "student: 2/4, loss 1.234, 2"]


def test_only_the_first_rank_shows_progress(tmp_path: Path) -> None:
    out, console = log()
    shown = TrainingProgress("student", console)
    state = TrainerState(max_steps=4, is_world_process_zero=False)
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    shown.on_train_begin(args, state, TrainerControl())
    shown.on_log(args, state, TrainerControl(), {"loss": 1.0})
    shown.on_train_end(args, state, TrainerControl())
    assert out.getvalue() == ""


def test_a_log_has_fewer_and_fewer_lines_of_quick_steps_and_always_the_last(clock: list[float]) -> None:
    out, console = log()
    with PartProgress(console, "shards").start(total=10_000) as shown:
        for done in range(1, 10_001):
            clock[0] += 1.0
            shown.update(done)
    lines = out.getvalue().splitlines()
    assert lines[0] == "shards: 11/10,000, 2 h 46 min left"
    assert 30 < len(lines) < 120
    assert lines[-1] == "shards: 10,000/10,000, took 2 h 46 min"


def test_a_terminal_has_a_bar(tmp_path: Path) -> None:
    out = io.StringIO()
    with PartProgress(Console(file=out, width=100, force_terminal=True), "held-out rows") as shown:
        shown.update(3, 4, 1.5)
    assert "held-out rows" in out.getvalue()
    assert "3/4" in out.getvalue()
    assert "loss 1.500" in out.getvalue()


def test_a_part_without_steps_is_named_before_it_begins() -> None:
    out, console = log()
    with part(console, "latency"):
        assert out.getvalue() == "latency\n"
