"""What trackers (W&B, MLflow, TensorBoard, trackio) show of a distillation beside the arguments of the training."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

from potstill.losses.declared import Declared
from potstill.teachers.teacher import Teacher
from potstill.train.terms.term import Term

GROUP = "WANDB_RUN_GROUP"  # an environment variable of W&B


def facts(teacher: Teacher | None, terms: Sequence[Term]) -> dict[str, Any]:
    """Describe teacher and objective by flat names, such as objective.0.weight."""
    model = getattr(getattr(teacher, "model", None), "config", None)
    name = "none" if teacher is None else type(teacher).__name__
    source = getattr(model, "_name_or_path", "")
    return {"teacher": f"{name} {source}".strip(), **flat({"objective": terms})}


def flat(values: Mapping[Any, Any]) -> dict[str, Any]:
    """Join the keys of nested mappings, the places of lists and the fields of declarations by dots, for trackers."""
    named: dict[str, Any] = {}
    for key, value in values.items():
        if (inner := _entries(value)) is not None:
            named |= {f"{key}.{name}": entry for name, entry in flat(inner).items()}
        else:
            named[str(key)] = value if isinstance(value, str | int | float | None) else type(value).__name__
    return named


def _entries(value: Any) -> Mapping[Any, Any] | None:
    """The entries of a value that has some."""
    if isinstance(value, list | tuple):
        return dict(enumerate(value))
    if is_dataclass(value) and not isinstance(value, type):
        kind = {value.key: value.name} if isinstance(value, Declared) else {}
        return kind | {field.name: getattr(value, field.name) for field in fields(value)}
    return value if isinstance(value, Mapping) else None


@contextmanager
def own_run(trackers: str | Sequence[str] | None, group: str) -> Iterator[None]:
    """Give a training its own run in W&B, in a group; the other trackers end theirs with the training."""
    if "wandb" not in (trackers or ()):
        yield
        return
    import wandb

    if wandb.run is not None:  # begun by the user
        yield
        return
    given = GROUP in os.environ
    os.environ.setdefault(GROUP, group)
    try:
        yield
    finally:
        wandb.finish()
        if not given:
            del os.environ[GROUP]
