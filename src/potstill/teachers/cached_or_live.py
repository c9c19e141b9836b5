"""A cache for what it holds, and the teacher itself for all else."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from potstill.losses.alignment import Alignment
from potstill.teachers.cached import CachedTeacher
from potstill.teachers.teacher import Teacher, TeacherOutput


class CachedOrLiveTeacher(Teacher):
    """Reads a cache for batches that it holds, and asks a teacher that is here about the others: those with text that
    the student has written.

    A batch is read or asked as a whole, because what a cache has kept and what a model says are different targets.

    Args:
        cached: what is read.
        live: who is asked.
    """

    def __init__(self, cached: CachedTeacher, live: Teacher) -> None:
        self.cached, self.live = cached, live

    def __call__(self, batch: Mapping[str, Tensor], alignment: Alignment) -> TeacherOutput:
        speaker = self.cached if self.cached.holds(batch, alignment) else self.live
        return speaker(batch, alignment)
