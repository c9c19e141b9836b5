"""Progress of a training; apart from other parts' progress, as transformers' callbacks take seconds to import."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from transformers import TrainerCallback

from potstill.runs.progress import PartProgress


class TrainingProgress(TrainerCallback):
    """Shows the steps of a training of transformers."""

    def __init__(self, title: str, console: Console) -> None:
        self.progress = PartProgress(console, title)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.progress.start(state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not control.should_log:  # else on_log follows, with the loss
            self.progress.update(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.progress.update(state.global_step, loss=logs["loss"], logged=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.stop()
