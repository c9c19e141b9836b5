"""Which checkpoint a training goes on from, and what has become of its teacher by then."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file

from potstill.errors import UserError
from potstill.teachers.teacher import Teacher

TEACHER = "teacher.safetensors"  # likewise: what has become of a teacher that changes


def last_checkpoint(directory: Path) -> Path | None:
    """The newest checkpoint that was written to its end, or None.

    The trainer's state is the last file of a checkpoint: where it is whole, so is everything before it.
    """
    numbered = [path for path in directory.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    found = sorted(numbered, key=lambda path: int(path.name.rpartition("-")[2]))
    return next((path for path in reversed(found) if _is_complete(path)), None)


def _is_complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return True


def restore_teacher(teacher: Teacher, checkpoint: Path) -> None:
    """What has become of a teacher until a checkpoint; nothing, for one that does not change.

    Raises:
        UserError: the checkpoint does not know.
    """
    if not teacher.state_dict():
        return
    file = checkpoint / TEACHER
    if not file.exists():
        raise UserError(
            f"train: expected {TEACHER} in {checkpoint}, got none. The teacher changes in training, and this "
            "checkpoint is of another one. Begin anew, or resume with the teacher that it is of."
        )
    teacher.load_state_dict(load_file(file))
