"""Prefetching of teacher outputs: the teacher reads the next batch while the student trains on this one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from potstill.errors import ModelError
from potstill.losses.alignment import Alignment
from potstill.losses.torch_compile import disable_compile
from potstill.teachers.teacher import Teacher, TeacherOutput

TeacherInput = tuple[Mapping[str, Tensor], Alignment]


class Prefetch:
    """Runs a teacher one batch ahead, in a thread of its own; on CUDA in a stream of its own. Its outputs are the same.

    A batch is recognised by the identity of its input_ids: an announced one is computed before it is needed, any other
    (held out, or on-policy) at once. At most one output waits, the teacher never runs twice at a time, and its errors
    are raised where the output is needed. The first batch runs in the caller's thread: a teacher may then probe its
    model, which must not run beside the student's random numbers.
    """

    def __init__(self, teacher: Teacher) -> None:
        if teacher.changes:
            raise ModelError(
                f"prefetch: expected a teacher that does not change in training, got {type(teacher).__name__}, which "
                "does. Leave prefetch out."
            )
        self.teacher = teacher
        self._announced: list[TeacherInput] = []
        self._running: tuple[Tensor, Future[TeacherOutput]] | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._stream: torch.cuda.Stream | None = None
        self._probed = False

    def prefetch(self, batches: Sequence[TeacherInput]) -> None:
        """Announce the next batches, in place of those before; no batch ends the thread after its current one."""
        self._announced = [*batches]
        if self._running is not None and not self._skip_to(self._running[0]):
            self._running[1].cancel()
            self._running = None
        if not batches and self._pool is not None:
            self._pool.shutdown()
            self._pool = None
        self._start_next()

    @disable_compile
    def __call__(self, batch: Mapping[str, Tensor], alignment: Alignment) -> TeacherOutput:
        """See `Teacher`; starts the next batch."""
        ids = batch["input_ids"]
        if self._running is not None and self._running[0] is ids:
            future, self._running = self._running[1], None
            output = self._receive(future, ids.device)
        else:
            self._skip_to(ids)
            if not self._probed:
                output, self._probed = self.teacher(batch, alignment), True
            else:
                output = self._receive(self._submit(batch, alignment), ids.device)
        self._start_next()
        return output

    def _skip_to(self, ids: Tensor) -> bool:
        """Drop the announced batches up to the one with these ids; return whether it was announced."""
        for i, (batch, _) in enumerate(self._announced):
            if batch["input_ids"] is ids:
                self._announced = self._announced[i + 1 :]
                return True
        return False

    def _start_next(self) -> None:
        if self._probed and self._running is None and self._announced:
            batch, alignment = self._announced.pop(0)
            self._running = batch["input_ids"], self._submit(batch, alignment)

    def _submit(self, batch: Mapping[str, Tensor], alignment: Alignment) -> Future[TeacherOutput]:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="teacher")
        device = batch["input_ids"].device
        if device.type == "cuda":
            self._stream = self._stream or torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))  # until the batch is on the device
        return self._pool.submit(self._run, batch, alignment, torch.is_grad_enabled())

    def _run(self, batch: Mapping[str, Tensor], alignment: Alignment, grad_enabled: bool) -> TeacherOutput:
        with torch.set_grad_enabled(grad_enabled), torch.cuda.stream(self._stream):
            return self.teacher(batch, alignment)

    def _receive(self, future: Future[TeacherOutput], device: torch.device) -> TeacherOutput:
        output = future.result()
        if self._stream is not None:
            stream = torch.cuda.current_stream(device)
            stream.wait_stream(self._stream)
            for tensor in tensors_of(output):
                tensor.record_stream(stream)  # else its memory would be free for the teacher's next output
        return output


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Every tensor in dataclasses, mappings and sequences."""
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors_of(getattr(value, field.name))
    elif isinstance(value, Mapping | list | tuple):
        for entry in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_of(entry)
