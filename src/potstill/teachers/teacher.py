"""What every teacher is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from potstill.targets import Alignment, Targets


@dataclass(frozen=True)
class TeacherOutput:
    """What a teacher says about a batch.

    Args:
        targets: over the N counting positions, on the student's device.
        label_log_probs: [N] what the teacher gives the data's own tokens there, nats, where it is known: the only
            measure of a teacher that is no model here.
    """

    targets: Targets
    label_log_probs: Tensor | None = None


class Teacher(ABC):
    """Anything that can say something at every position of a batch."""

    @abstractmethod
    def __call__(self, batch: Mapping[str, Tensor], alignment: Alignment) -> TeacherOutput:
        """Speak about a batch.

        Args:
            batch: input_ids and attention_mask, [B, T] each.
            alignment: the N positions that are asked for; see `potstill.targets`.
        """
