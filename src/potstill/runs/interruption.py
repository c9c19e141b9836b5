"""SIGINT and SIGTERM during a training: it ends behind the current step, with a checkpoint."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from accelerate import PartialState
from rich.console import Console
from transformers import TrainerCallback

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption(TrainerCallback):
    """Ends a training of one process behind the step in which a signal arrives; a second signal ends it at once.

    An exception in the midst of a step can get lost, where a library calls Python from C and clears its errors.
    """

    def __init__(self, console: Console) -> None:
        self.console, self.signal = console, 0

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """Wait for signals; where one arrived, raise KeyboardInterrupt or SystemExit behind the training.

        Ranks of one training would end at different steps: they keep the handlers that they have.
        """
        if threading.current_thread() is not threading.main_thread() or PartialState().num_processes > 1:
            yield
            return
        handlers = {number: signal.getsignal(number) for number in SIGNALS}
        handled = [number for number in SIGNALS if handlers[number] is not signal.SIG_IGN]  # as nohup ignores some
        for number in handled:
            signal.signal(number, self._receive)
        try:
            yield
        finally:
            for number in handled:
                signal.signal(number, handlers[number])
        if self.signal:
            self._end()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            self._end()
        self.signal = number
        self.console.print("ending behind this step, with a checkpoint; a second signal ends it at once", style="dim")

    def _end(self) -> None:
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + self.signal)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.signal:
            control.should_save = control.should_training_stop = True
