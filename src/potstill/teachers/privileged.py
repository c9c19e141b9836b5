"""A teacher with a prompt of its own before the same answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from potstill.errors import DataError
from potstill.losses.alignment import Alignment, causal_alignment
from potstill.models.packing import PACKED_LENGTH
from potstill.teachers.teacher import Teacher, TeacherOutput

# In a batch and in its rows, beside the student's input_ids, attention_mask and labels.
OWN = ("teacher_input_ids", "teacher_attention_mask", "teacher_labels")


class PrivilegedTeacher(Teacher):
    """A teacher whose prompt has privileged information: a solution, an instruction.

    Its target positions match the student's in order, because they predict the same answer. Its layers cannot be used:
    their positions differ from the student's. The teacher is a model, or made from the student.

    References:
        Snell et al. 2022 (context distillation), arXiv 2209.15189; "Self-Distilled Reasoner" 2026 (OPSD), arXiv
        2601.18734, for a student that teaches itself with the solution in its prompt.
    """

    missing_rows = (
        "PrivilegedTeacher: expected rows with a prompt for the teacher, got rows without. Name its column: "
        "teacher_prompt beside the data's path."
    )

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher
        self.of_student, self.max_length = teacher.of_student, teacher.max_length
        for name in ("attach", "update", "after_step", "state_dict", "load_state_dict", "logs"):
            setattr(self, name, getattr(teacher, name))  # training changes the inner teacher alone

    def __call__(self, batch: Mapping[str, Tensor], alignment: Alignment) -> TeacherOutput:
        if not set(OWN) <= set(batch):
            raise DataError(
                f"PrivilegedTeacher: expected batches with {', '.join(OWN)}, got {', '.join(batch)}. Name the column "
                "of the teacher's prompts: teacher_prompt beside the data's path."
            )
        names = (*OWN, PACKED_LENGTH) if PACKED_LENGTH in batch else OWN
        inner_batch = {name.removeprefix("teacher_"): batch[name] for name in names}
        inner = causal_alignment(inner_batch["labels"])
        if not torch.equal(inner.labels, alignment.labels):
            raise DataError(
                f"PrivilegedTeacher: expected the student's {len(alignment)} answer tokens behind the teacher's "
                f"prompts, got {len(inner)} tokens or others. Encode both with potstill.encode."
            )
        return self.teacher(inner_batch, inner)

    def covers(self, dataset: Any) -> bool:
        # In a stream, a missing prompt is an error when it comes.
        return not hasattr(dataset, "__len__") or not len(dataset) or OWN[0] in dataset[0]
