"""Trainer callbacks: epochs, teacher updates, metrics file and on-policy samples file."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TrainerCallback

from potstill.errors import RunError
from potstill.files import write_text
from potstill.teachers.teacher import Teacher
from potstill.train.rollout import Rollout
from potstill.train.samples import collapse_warning


class FollowTraining(TrainerCallback):
    """Updates a teacher after every optimiser step, before checkpoints are written, and sets a dataset's epoch.

    accelerate does not set it where samplers are wrapped, on several ranks and on resuming.
    """

    def __init__(self, teacher: Teacher | None, dataset: Any) -> None:
        self.teacher, self.dataset = teacher, dataset

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(int((state.epoch or 0.0) + 1e-6))  # a fraction where a run resumes within an epoch

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.teacher is not None:
            self.teacher.after_step(state.global_step)


class _RunFile(TrainerCallback):
    """A JSON Lines file of the main process. A resumed run first drops the lines after its checkpoint."""

    def __init__(self, path: Path, run: str) -> None:
        self.path, self.run = path, run

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            lines, step = logged_lines(self.path), state.global_step
            kept = [line for line in lines if line["run"] != self.run or line["step"] <= step]
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
            self._start = time.monotonic() - seconds_of(kept, self.run)  # without the time between two processes

    def append(self, step: int, values: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"run": self.run, "step": step, **values}) + "\n")


class MetricsFile(_RunFile):
    """Appends every log line: {"run", "step", "seconds", ...}.

    Not the Trainer's last one, whose mean loss and speed are those of the steps of this process. The Trainer's own list
    of these lines, which would grow in memory and be written whole into every checkpoint, is emptied.
    """

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs and "train_runtime" not in logs:
            self.append(state.global_step, {"seconds": round(time.monotonic() - self._start, 2), **logs})
        state.log_history.clear()


class SamplesFile(_RunFile):
    """Appends an on-policy sample with every log line, {"run", "step", "prompt", "text"}, and warns of a collapse."""

    def __init__(self, path: Path, run: str, rollout: Rollout, console: Console) -> None:
        super().__init__(path, run)
        self.rollout, self.console, self._warned = rollout, console, False

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs or "own_share" not in logs:
            return
        if self.rollout.latest:
            prompt, text = self.rollout.decode(self.rollout.latest[0])
            self.append(state.global_step, {"prompt": prompt, "text": text})
        warning = collapse_warning(logs)
        if warning and not self._warned:
            self.console.print(f"step {state.global_step}: {warning}", style="yellow", highlight=False, markup=False)
        self._warned = warning is not None


def logged_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSON Lines file, without a last line that a kill cut off.

    Raises:
        RunError: a line is not JSON.
    """
    lines: list[dict[str, Any]] = []
    content = path.read_bytes() if path.exists() else b""
    for number, text in enumerate(content.split(b"\n")[:-1], 1):  # behind the last end of a line is nothing, or a part
        try:
            lines.append(json.loads(text))
        except ValueError:
            raise RunError(
                f"log: expected JSON in line {number} of {path}, got something else: it is damaged. Delete that line."
            ) from None
    return lines


def seconds_of(lines: list[dict[str, Any]], run: str) -> float:
    """How long a run has trained, by its last line."""
    return max((line.get("seconds", 0.0) for line in lines if line["run"] == run), default=0.0)
