"""The recipe's `teacher`: all kinds, and the keys that only a member of an ensemble has."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator

from potstill.teachers.cached import CacheSource as CacheSource
from potstill.teachers.ensemble import EnsembleSource as EnsembleSource
from potstill.teachers.model import ModelSource as ModelSource
from potstill.teachers.self_taught import EMASource as EMASource
from potstill.teachers.served import ServerSource as ServerSource
from potstill.teachers.source import TeacherSource


def _without_weight(source: TeacherSource) -> TeacherSource:
    if getattr(source, "weight", None) is not None:
        raise ValueError(f"expected weight for members of an ensemble alone, got it with {source.name}")
    return source


RecipeTeacher = Annotated[TeacherSource, AfterValidator(_without_weight)]
