"""What is seen and kept of a training: a progress bar and a file of metrics."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from potstill.data.files import write_text
from potstill.train.rollout import Rollout
from potstill.train.samples import collapse


class Epochs(TrainerCallback):
    """Tells a dataset the epoch: accelerate does not where samplers are wrapped, on several ranks and on resuming."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The number is a fraction where an epoch is gone on with."""
        self.dataset.set_epoch(int((state.epoch or 0.0) + 1e-6))


class ProgressBar(TrainerCallback):
    """One line on the terminal: how far, the last loss, how long still."""

    def __init__(self, title: str, console: Console) -> None:
        self.progress = Progress(
            TextColumn("[bold]{task.description:<9}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self.task = self.progress.add_task(title, loss="-", start=False)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self.progress.reset(self.task, total=state.max_steps, completed=state.global_step, loss="-")
            self.progress.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.progress.update(self.task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "loss" in logs:
            self.progress.update(self.task, loss=f"{logs['loss']:.3f}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.progress.stop()


class MetricsFile(TrainerCallback):
    """Appends every logged line to a JSON Lines file: {"run", "step", "seconds", ...}.

    A resumed training drops the lines past its checkpoint first, so that each step stands there once.
    """

    def __init__(self, path: Path, run: str) -> None:
        self.path, self.run = path, run
        self._began = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        kept = _forget(self.path, self.run, state.global_step)
        self._began = time.monotonic() - seconds_of(kept, self.run)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and logs:
            seconds = round(time.monotonic() - self._began, 2)
            with self.path.open("a") as file:
                line = {"run": self.run, "step": state.global_step, "seconds": seconds, **logs}
                file.write(json.dumps(line) + "\n")


class OwnTextsFile(TrainerCallback):
    """Appends a text of the student's own to a JSON Lines file whenever something is logged, and says it when its texts
    have collapsed: {"run", "step", "prompt", "text"}.
    """

    def __init__(self, path: Path, run: str, rollout: Rollout, console: Console) -> None:
        self.path, self.run, self.rollout, self.console = path, run, rollout, console
        self._alarmed = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            _forget(self.path, self.run, state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs or "own_share" not in logs:
            return
        if self.rollout.latest:
            prompt, text = self.rollout.text(self.rollout.latest[0])
            line = {"run": self.run, "step": state.global_step, "prompt": prompt, "text": text}
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        said = collapse(logs)
        if said and not self._alarmed:
            self.console.print(f"step {state.global_step}: {said}", style="yellow", highlight=False, markup=False)
        self._alarmed = said is not None


def _forget(path: Path, run: str, step: int) -> list[dict[str, Any]]:
    """Drop what a run has logged past its checkpoint; what stays."""
    kept = [line for line in logged_lines(path) if line["run"] != run or line["step"] <= step]
    write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
    return kept


def logged_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line that a kill cut off is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def seconds_of(lines: list[dict[str, Any]], run: str) -> float:
    """How long a run has trained, by its last line."""
    return max((line["seconds"] for line in lines if line["run"] == run), default=0.0)
