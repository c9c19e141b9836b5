"""Find the checkpoint to resume from, and restore states from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import load_file
from torch import Tensor

from potstill.errors import UserError
from potstill.models.checksums import CHECKSUMS, check_folder
from potstill.teachers.teacher import Teacher

TEACHER = "teacher.safetensors"  # in a checkpoint: the state of a teacher that changes in training


class Stateful(Protocol):
    """What has a state in checkpoints."""

    def state_dict(self) -> Mapping[str, Tensor]: ...
    def load_state_dict(self, state: Mapping[str, Tensor], /) -> Any: ...


def last_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint, or None: the trainer's state, and then checksums, are written last."""
    numbered = {int(path.name[11:]): path for path in directory.glob("checkpoint-*") if path.name[11:].isdigit()}
    for _, path in sorted(numbered.items(), reverse=True):
        if (path / CHECKSUMS).exists():
            return path
        with suppress(OSError, ValueError):
            json.loads((path / "trainer_state.json").read_text())
            return path
    return None


def restore(owner: Stateful, path: Path, advice: str) -> None:
    """Load a state from a file of a checkpoint, or raise UserError without it; nothing for an owner without state."""
    if not owner.state_dict():
        return
    if not path.exists():
        raise UserError(f"train: expected {path.name} in {path.parent}, got none{advice}")
    check_folder(path.parent, "checkpoint")
    owner.load_state_dict(load_file(path))


def restore_teacher(teacher: Teacher, checkpoint: Path) -> None:
    advice = ": the checkpoint was made with another teacher. Start again, or resume with that teacher."
    restore(teacher, checkpoint / TEACHER, advice)
