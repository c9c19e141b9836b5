"""A teacher that reads more than the student: its own prompt before the same answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from potstill.errors import DataError
from potstill.losses.alignment import Alignment, causal_alignment
from potstill.teachers.teacher import Teacher, TeacherOutput

# In a batch and in its rows, beside the student's input_ids, attention_mask and labels.
OWN = ("teacher_input_ids", "teacher_attention_mask", "teacher_labels")


class PrivilegedTeacher(Teacher):
    """A teacher with a prompt of its own, in which it sees what the student must do without: a solution, an
    instruction.

    Its counting positions are the student's, one by one in their order, because they predict the same answer.

    Args:
        teacher: who reads: a model, or one made of the student.

    References:
        Snell et al. 2022 (context distillation), arXiv 2209.15189; "Self-Distilled Reasoner" 2026 (OPSD), arXiv
        2601.18734, for a student that teaches itself with the solution in view.
    """

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher
        self.of_student, self.max_length = teacher.of_student, teacher.max_length

    def __call__(self, batch: Mapping[str, Tensor], alignment: Alignment) -> TeacherOutput:
        if not set(OWN) <= set(batch):
            raise DataError(
                f"PrivilegedTeacher: expected batches with {', '.join(OWN)}, got {', '.join(batch)}. Name the column "
                "of the teacher's prompts: teacher_prompt beside the data's path."
            )
        own = {name.removeprefix("teacher_"): batch[name] for name in OWN}
        theirs = causal_alignment(own["labels"])
        if not torch.equal(theirs.labels, alignment.labels):
            raise DataError(
                f"PrivilegedTeacher: expected the student's {len(alignment)} answer tokens behind the teacher's "
                f"prompts, got {len(theirs)} tokens or others. Each position of one must be one of the other. Encode "
                "both with potstill.encode."
            )
        return self.teacher(own, theirs)

    def covers(self, dataset: Any) -> bool:
        """See `Teacher`: rows without a prompt for the teacher are none of its."""
        if not hasattr(dataset, "__len__"):
            return True  # a stream: what is missing is told when it comes
        return not len(dataset) or OWN[0] in dataset[0]

    def require(self, dataset: Any) -> None:
        """See `Teacher`."""
        if not self.covers(dataset):
            raise DataError(
                "PrivilegedTeacher: expected rows with a prompt for the teacher, got rows without. Name its column: "
                "teacher_prompt beside the data's path."
            )

    # All else is the teacher's own; what it has inside stands at other positions than the student's, and is closed.

    def attach(self, student: nn.Module) -> None:
        """See `Teacher`."""
        self.teacher.attach(student)

    def learn(self, said: TeacherOutput) -> None:
        """See `Teacher`."""
        self.teacher.learn(said)

    def after_step(self, step: int) -> None:
        """See `Teacher`."""
        self.teacher.after_step(step)

    def state_dict(self) -> dict[str, Tensor]:
        """See `Teacher`."""
        return self.teacher.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """See `Teacher`."""
        self.teacher.load_state_dict(state)

    def logs(self) -> dict[str, float]:
        """See `Teacher`."""
        return self.teacher.logs()
