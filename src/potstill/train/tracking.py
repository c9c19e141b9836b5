"""What trackers (W&B, MLflow, TensorBoard, trackio) show of a distillation beside the arguments of the training."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from pydantic import TypeAdapter

from potstill.teachers.teacher import Teacher
from potstill.train.terms.term import Term

GROUP = "WANDB_RUN_GROUP"  # an environment variable of W&B


def facts(teacher: Teacher | None, terms: Sequence[Term]) -> dict[str, Any]:
    """Describe teacher and objective by flat names, such as objective.0.weight."""
    model = getattr(getattr(teacher, "model", None), "config", None)
    name = "none" if teacher is None else type(teacher).__name__
    source = getattr(model, "_name_or_path", "")
    values = TypeAdapter(list[Term]).dump_python(list(terms), mode="json", fallback=str)
    return {"teacher": f"{name} {source}".strip(), **flat({"objective": values})}


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Join the keys of nested mappings and the places of lists by dots, as trackers sort and filter them."""
    named: dict[str, Any] = {}
    for key, value in values.items():
        inner = dict(enumerate(value)) if isinstance(value, list) else value
        if isinstance(inner, Mapping):
            named |= {f"{key}.{name}": entry for name, entry in flat({str(k): v for k, v in inner.items()}).items()}
        else:
            named[key] = value
    return named


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
