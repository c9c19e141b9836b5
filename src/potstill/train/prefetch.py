"""The teacher speaks about the next batch while the student still learns from this one."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields, is_dataclass
from itertools import islice
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from potstill.errors import ModelError
from potstill.losses.alignment import Alignment
from potstill.teachers.teacher import Teacher, TeacherOutput

T = TypeVar("T")
Question = tuple[Mapping[str, Tensor], Alignment]


class Prefetch:
    """Asks a teacher in a thread of its own, one batch ahead; on CUDA in a stream of its own.

    What is said is the same. A batch is known by its very tensor of input_ids: one that was foretold has its answer
    made before it is needed, and any other (held out, or written by the student) is asked on the spot. Never more than
    one answer waits, and the teacher is never asked twice at once. What goes wrong comes up where the answer is needed.

    The first question is asked in the caller's thread, because a teacher may then probe its model, which must not run
    beside the student's random numbers.

    Args:
        teacher: one that does not change while the student trains.

    Raises:
        ModelError: it does: its answers about the next batch would be those of an earlier step.
    """

    def __init__(self, teacher: Teacher) -> None:
        if teacher.changes:
            raise ModelError(
                f"prefetch: expected a teacher that does not change in training, got {type(teacher).__name__}, which "
                "does. What it says of the next batch is known after this step. Leave prefetch out."
            )
        self.teacher = teacher
        self._coming: deque[Question] = deque()
        self._begun: tuple[Tensor, Future[TeacherOutput]] | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._stream: torch.cuda.Stream | None = None
        self._has_spoken = False

    def prefetch(self, coming: Sequence[Question]) -> None:
        """Say which batches come, in order. What was foretold before and does not come any more is forgotten."""
        self._coming = deque(coming)
        if self._begun is not None and not self._skip_to(self._begun[0]):
            self._begun[1].cancel()
            self._begun = None
        self._go_on()

    @torch.compiler.disable
    def __call__(self, batch: Mapping[str, Tensor], alignment: Alignment) -> TeacherOutput:
        """See `Teacher`. The next batch is begun."""
        ids = batch["input_ids"]
        if self._begun is not None and self._begun[0] is ids:
            answer, self._begun = self._begun[1], None
            said = self._take(answer, ids.device)
        elif self._has_spoken:
            self._skip_to(ids)
            said = self._take(self._ask(batch, alignment), ids.device)
        else:
            self._skip_to(ids)
            said = self.teacher(batch, alignment)
            self._has_spoken = True
        self._go_on()
        return said

    def close(self) -> None:
        """Forget what was foretold, and end the thread when it has said what it is saying."""
        self.prefetch(())
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def _skip_to(self, ids: Tensor) -> bool:
        """Forget what comes before a batch, and that batch itself; whether it was foretold."""
        place = next((i for i, (batch, _) in enumerate(self._coming) if batch["input_ids"] is ids), None)
        if place is None:
            return False
        for _ in range(place + 1):
            self._coming.popleft()
        return True

    def _go_on(self) -> None:
        if self._has_spoken and self._begun is None and self._coming:
            batch, alignment = self._coming.popleft()
            self._begun = batch["input_ids"], self._ask(batch, alignment)

    def _ask(self, batch: Mapping[str, Tensor], alignment: Alignment) -> Future[TeacherOutput]:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="teacher")
        device = batch["input_ids"].device
        if device.type == "cuda":
            self._stream = self._stream or torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))  # until the batch is there
        return self._pool.submit(self._speak, batch, alignment, torch.is_grad_enabled())

    def _speak(self, batch: Mapping[str, Tensor], alignment: Alignment, graded: bool) -> TeacherOutput:
        with torch.set_grad_enabled(graded), torch.cuda.stream(self._stream):
            return self.teacher(batch, alignment)

    def _take(self, answer: Future[TeacherOutput], device: torch.device) -> TeacherOutput:
        said = answer.result()
        if self._stream is not None:
            here = torch.cuda.current_stream(device)
            here.wait_stream(self._stream)
            for tensor in tensors_of(said):
                tensor.record_stream(here)  # else its memory would be free for the teacher's next answer
        return said


class Peek(Generic[T]):
    """An iterator that can be looked into, one element ahead."""

    def __init__(self, source: Iterator[T]) -> None:
        self.source = source
        self._seen: list[T] = []

    def __iter__(self) -> Peek[T]:
        return self

    def __next__(self) -> T:
        return self._seen.pop() if self._seen else next(self.source)

    def ahead(self) -> list[T]:
        """The next element; empty at the end."""
        if not self._seen:
            self._seen = list(islice(self.source, 1))
        return self._seen[:]


def tensors_of(said: Any) -> Iterator[Tensor]:
    """Every tensor in dataclasses, mappings and sequences."""
    if isinstance(said, Tensor):
        yield said
    elif is_dataclass(said):
        for one in fields(said):
            yield from tensors_of(getattr(said, one.name))
    elif isinstance(said, Mapping):
        yield from tensors_of([*said.values()])
    elif isinstance(said, list | tuple):
        for each in said:
            yield from tensors_of(each)
