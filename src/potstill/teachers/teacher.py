"""What every teacher is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from potstill.errors import DataError, ModelError
from potstill.taps import Anatomy, Inside, Needs
from potstill.targets import Alignment, Targets

NOT_COVERED = (
    "teacher: expected a cache that holds every row of the data, got one that lacks some. A row is found by its token "
    "ids and by which of them count: another file, max_length, packing, tokenizer or chat template makes other rows. "
    "Build the cache from the same data and options."
)


@dataclass(frozen=True)
class TeacherOutput:
    """What a teacher says about a batch.

    Args:
        targets: over the N counting positions, on the student's device.
        label_log_probs: [N] what the teacher gives the data's own tokens there, nats, where it is known: the only
            measure of a teacher that is no model here.
        inside: what `Teacher.prepare` asked for, over all positions, on the student's device.
    """

    targets: Targets
    label_log_probs: Tensor | None = None
    inside: Inside = field(default_factory=Inside)


class Teacher(ABC):
    """Anything that can say something at every position of a batch.

    All give targets. One that can be looked into also has an `anatomy` and can `prepare` for it.

    Attributes:
        of_student: whether it is made of the student that is trained.
    """

    of_student: bool = False

    @abstractmethod
    def __call__(self, batch: Mapping[str, Tensor], alignment: Alignment) -> TeacherOutput:
        """Speak about a batch.

        Args:
            batch: input_ids and attention_mask, [B, T] each.
            alignment: the N positions that are asked for; see `potstill.targets`.
        """

    def covers(self, dataset: Any) -> bool:
        """Whether the teacher can speak about every row of a dataset with input_ids and labels."""
        return True

    def require(self, dataset: Any) -> None:
        """See that the teacher can speak about every row of a dataset.

        Raises:
            DataError: it cannot.
        """
        if not self.covers(dataset):
            raise DataError(NOT_COVERED)

    @property
    def anatomy(self) -> Anatomy:
        """The shape of the model that is looked into.

        Raises:
            ModelError: there is none.
        """
        raise self._closed()

    def prepare(self, needs: Needs) -> None:
        """From now on every answer holds this too, beside the targets and what was asked for before.

        Raises:
            ModelError: the teacher does not give it.
        """
        if needs:
            raise self._closed()

    def _closed(self) -> ModelError:
        return ModelError(
            f"{type(self).__name__}: expected a teacher with hidden states and attention, which terms of the objective "
            "ask for, got one that gives targets alone. Use a model as the teacher, or the terms logits and labels."
        )
