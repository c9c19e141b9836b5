"""Find the checkpoint to resume from, and restore the teacher's state."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file

from potstill.errors import UserError
from potstill.teachers.teacher import Teacher

TEACHER = "teacher.safetensors"  # in a checkpoint: the state of a teacher that changes in training


def last_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint, or None.

    The trainer's state is the last file of a checkpoint: where it is complete, so is everything before it.
    """
    numbered = {int(path.name[11:]): path for path in directory.glob("checkpoint-*") if path.name[11:].isdigit()}
    return next((numbered[step] for step in sorted(numbered, reverse=True) if _is_complete(numbered[step])), None)


def _is_complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return True


def restore_teacher(teacher: Teacher, checkpoint: Path) -> None:
    """Load the teacher's state from a checkpoint; does nothing for a teacher without one.

    Raises:
        UserError: the checkpoint has none.
    """
    if not teacher.state_dict():
        return
    if not (checkpoint / TEACHER).exists():
        raise UserError(
            f"train: expected {TEACHER} in {checkpoint}, got none: the checkpoint was made with another teacher. "
            "Start again, or resume with that teacher."
        )
    teacher.load_state_dict(load_file(checkpoint / TEACHER))
