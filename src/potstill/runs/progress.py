"""Progress of a command's parts: bars on a terminal; lines in a log, as of nohup, SLURM or CI."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from potstill.evaluate.formatting import duration

LINE_SECONDS = 10.0  # at least, between two lines of a log
LINE_GROWTH = 0.05  # of the time so far: a day's work does not fill the log


@contextmanager
def part(console: Console, title: str) -> Iterator[None]:
    """Show what a command does until it is done: on a terminal with its time afterwards, in a log before it begins."""
    if not console.is_terminal:
        console.print(title, style="dim", highlight=False, markup=False)
        yield
        return
    start = time.monotonic()
    with console.status(title):
        yield
    console.print(f"{title}: {duration(time.monotonic() - start)}", style="dim", highlight=False, markup=False)


class PartProgress:
    """Steps of one part that are done, its last loss and the time left. Nothing is shown before `start`."""

    def __init__(self, console: Console, title: str) -> None:
        self.console, self.title, self.done = console, title, 0
        self._total: int | None = None
        self._loss: float | None = None
        self._start: tuple[float, int] | None = None  # time, and steps that were done before
        self._last_line = (0.0, -1)  # time, and steps
        name, loss = TextColumn("[bold]{task.description:<9}"), TextColumn("{task.fields[loss]}")
        times = TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()
        self._bar = Progress(name, BarColumn(), MofNCompleteColumn(), loss, *times, console=console)
        self._task = self._bar.add_task(title, loss="", start=False, total=None)

    def start(self, done: int = 0, total: int | None = None) -> Self:
        self._start, self.done, self._total = (time.monotonic(), done), done, total
        if self.console.is_terminal:
            self._bar.reset(self._task, completed=done, total=total, loss="")
            self._bar.start()
        return self

    def update(self, done: int, total: int | None = None, loss: float | None = None, *, logged: bool = False) -> None:
        """Show how far the part is. A log has a line where the step is `logged`, and at intervals."""
        if self._start is None:
            return
        self.done, self._total = done, self._total if total is None else total
        self._loss = self._loss if loss is None else loss
        if self.console.is_terminal:
            text = "" if self._loss is None else f"loss {self._loss:.3f}"
            self._bar.update(self._task, completed=done, total=self._total, loss=text)
            return
        now, start, last = time.monotonic(), self._start[0], self._last_line[0]
        if logged or now - max(last, start) >= LINE_SECONDS + LINE_GROWTH * (now - start):
            self._print_line()

    def _print_line(self) -> None:
        assert self._start is not None
        now, (start, before) = time.monotonic(), self._start
        self._last_line = now, self.done
        facts = [f"{self.done:,}" if self._total is None else f"{self.done:,}/{self._total:,}"]
        if self._loss is not None:
            facts.append(f"loss {self._loss:.3f}")
        if self._total is not None and before < self.done < self._total:
            facts.append(f"{duration((now - start) * (self._total - self.done) / (self.done - before))} left")
        elif self.done == self._total:
            facts.append(f"took {duration(now - start)}")
        self.console.print(f"{self.title}: {', '.join(facts)}", highlight=False, markup=False, soft_wrap=True)

    def stop(self) -> None:
        """End the part; a log has a last line."""
        if self.console.is_terminal:
            self._bar.stop()
        elif self._start is not None and self.done not in (0, self._last_line[1]):
            self._print_line()

    def __enter__(self) -> Self:
        return self.start() if self._start is None else self

    def __exit__(self, *exception: object) -> None:
        self.stop()
