"""What every teacher is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from potstill.errors import DataError, ModelError
from potstill.losses.alignment import Alignment
from potstill.losses.target_statistics import token_log_probs
from potstill.losses.targets import SparseTargets, Targets
from potstill.models.capture import ActivationRequest, Activations
from potstill.models.structure import ModelShape
from potstill.teachers.byte_alignment import Across

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
        of_members: [N, M] the same log-probabilities by member, of an ensemble that learns how to weigh them.
        across: where a teacher with another tokenizer meets the student; its targets are over tokens of its own.
    """

    targets: Targets
    label_log_probs: Tensor | None = None
    inside: Activations = field(default_factory=Activations)
    across: Across | None = None
    of_members: Tensor | None = None

    def of_labels(self, labels: Tensor) -> Tensor | None:
        """The log-probabilities [N] of the data's own tokens: as it told, or from whole distributions; None where
        neither is there.
        """
        if self.label_log_probs is not None or isinstance(self.targets, SparseTargets):
            return self.label_log_probs
        return token_log_probs(self.targets, labels.unsqueeze(-1)).squeeze(-1)


# What most teachers have nothing to do for is an empty method here, and no abstract one.
# ruff: noqa: B027
class Teacher(ABC):
    """Anything that can say something at every position of a batch.

    All give targets. One that can be looked into also has a `shape` and can `prepare` for it. One that changes while
    the student trains is told what happens (`attach`, `learn`, `after_step`), and what it has become is kept in
    checkpoints (`state_dict`).

    Attributes:
        of_student: whether it is made of the student: there is nothing to measure or to keep before training.
        max_length: tokens in a row at most, where that is known.
    """

    of_student: bool = False
    max_length: int | None = None

    other_tokenizer: ClassVar[bool] = False  # its targets are over tokens of its own; see `TeacherOutput.across`

    @abstractmethod
    def __call__(self, batch: Mapping[str, Tensor], alignment: Alignment) -> TeacherOutput:
        """Speak about a batch.

        Args:
            batch: input_ids and attention_mask, [B, T] each; token_type_ids where the tokenizer makes them.
            alignment: the N positions that are asked for; see `potstill.losses.alignment`.
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

    def attach(self, student: nn.Module) -> None:
        """Meet the student, before the first batch; again for every student that is trained.

        Raises:
            ModelError: the teacher cannot be made of it.
        """

    def learn(self, said: TeacherOutput) -> None:
        """Take note of an answer that a student learns from, once for each batch of training."""

    def after_step(self, step: int) -> None:
        """Follow the student, after its `step`-th optimiser step, from 1."""

    def state_dict(self) -> dict[str, Tensor]:
        """What has become of the teacher in training; empty where nothing changes."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Become what `state_dict` gave."""

    def logs(self) -> dict[str, float]:
        """What a training should log of it."""
        return {}

    @property
    def shape(self) -> ModelShape:
        """The shape of the model that is looked into.

        Raises:
            ModelError: there is none.
        """
        raise self._closed()

    def prepare(self, needs: ActivationRequest) -> None:
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
