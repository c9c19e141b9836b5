"""The interface of every teacher, and the signals that it gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from potstill.errors import DataError, ModelError
from potstill.losses.alignment import Alignment
from potstill.losses.target_statistics import token_log_probs
from potstill.losses.targets import SparseTargets, Targets
from potstill.models.capture import ActivationRequest, Activations
from potstill.models.shapes import ModelShape
from potstill.teachers.byte_alignment import AlignedChunks, AlignmentStats

MISSING_ROWS = (
    "expected a cache that holds every row of the data, got one that lacks some. A row is found by its token ids and "
    "labels: another file, max_length, packing, tokenizer or chat template makes other rows. Build the cache from the "
    "same data and options."
)


@dataclass(frozen=True)
class TeacherOutput:
    """A teacher's signals for one batch, on the student's device."""

    targets: Targets  # over the N target positions
    label_log_probs: Tensor | None = None  # [N] of the labels in nats, where they are known apart from the targets
    inside: Activations = field(default_factory=Activations)  # what `Teacher.prepare` requested, over all positions
    chunks: AlignedChunks | None = None  # of bytes, from a teacher whose targets are over tokens of its own
    member_log_probs: Tensor | None = None  # [N, M] of the labels by member, from an ensemble that learns its weights

    def log_probs_of(self, labels: Tensor) -> Tensor | None:
        """The log-probabilities [N] of the labels; None without `label_log_probs` or full distributions."""
        if self.label_log_probs is not None or isinstance(self.targets, SparseTargets):
            return self.label_log_probs
        return token_log_probs(self.targets, labels.unsqueeze(-1)).squeeze(-1)


# Methods that most teachers need not implement are empty here, and not abstract.
# ruff: noqa: B027
class Teacher(ABC):
    """Anything that gives targets for every position of a batch.

    A teacher with hidden layers also has a `shape` and can `prepare` to return them. One that changes during training
    follows it (`attach`, `update`, `after_step`) and is saved in checkpoints (`state_dict`).
    """

    of_student: bool = False  # whether it is made from the student: it cannot be measured or cached before training
    max_length: int | None = None  # maximum number of tokens in a row, where known
    other_tokenizer: ClassVar[bool] = False  # whether its targets are over its own tokens: `TeacherOutput.chunks`
    needs_trial: ClassVar[bool] = True  # whether it may refuse rows or terms, so that a row is tried before training
    answers_samples_apart: ClassVar[bool] = False  # whether on-policy samples go to another teacher than rows of data
    without_own_prompts: ClassVar[str | None] = None  # what it is, where it cannot read prompts of its own
    missing_rows: ClassVar[str] = f"teacher: {MISSING_ROWS}"  # the error of `require`

    @abstractmethod
    def __call__(self, batch: Mapping[str, Tensor], alignment: Alignment) -> TeacherOutput:
        """Compute the teacher's signals for a batch at the N target positions of an alignment.

        The batch has input_ids and attention_mask, [B, T] each; token_type_ids where the tokenizer makes them; with
        packing also packed_length, a number, up to which a model may read rows side by side (`models.packing`).
        """

    def outline(self, batch: Mapping[str, Tensor], alignment: Alignment) -> TeacherOutput:
        """Give an output whose shapes, dtypes and head are those of a call; its other numbers need not be."""
        return self(batch, alignment)

    def precompute(self, batches: Callable[[], Iterable[Mapping[str, Tensor]]], folder: Path) -> Iterator[None]:
        """Compute ahead what calls with these batches read from a folder, in steps; most teachers compute in the call.

        What a killed process has computed into the same folder is used.
        """
        return iter(())

    def covers(self, dataset: Any) -> bool:
        """Whether the teacher has signals for every row of a dataset with input_ids and labels."""
        return True

    def require(self, dataset: Any) -> None:
        """Raise a DataError unless the teacher covers a dataset."""
        if not self.covers(dataset):
            raise DataError(self.missing_rows)

    def attach(self, student: nn.Module) -> None:
        """Connect to each student before its first batch; a ModelError where the teacher cannot be made from it."""

    def update(self, output: TeacherOutput) -> None:
        """Learn from an output of the teacher's own, once for each training batch."""

    def after_step(self, step: int) -> None:
        """Follow the student after its optimiser step `step`, counted from 1."""

    def state_dict(self) -> dict[str, Tensor]:
        """State that changes in training; empty where nothing does."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` gave."""

    def logs(self) -> dict[str, float]:
        """Values to log during training."""
        return {}

    @property
    def changes(self) -> bool:
        """Whether it changes in training, so that signals for the next batch cannot be computed yet."""
        return self.of_student or bool(self.state_dict())

    @property
    def member_weights(self) -> dict[str, float] | None:
        """Weights of an ensemble's members, by name; None for a single teacher."""
        return None

    def alignment_stats(self, rows: Iterable[Any]) -> AlignmentStats | None:
        """Count how much of some rows both tokenizers share; None for a teacher of the student's tokens."""
        return None

    @property
    def shape(self) -> ModelShape:
        """The shape of the model whose layers it gives; a ModelError where it gives none."""
        raise self._no_layers()

    @property
    def has_layers(self) -> bool:
        """Whether it gives hidden layers."""
        try:
            return bool(self.shape)
        except ModelError:
            return False

    def prepare(self, needs: ActivationRequest) -> None:
        """Return these activations with every later output; a ModelError where the teacher does not give them."""
        if needs:
            raise self._no_layers()

    def _no_layers(self) -> ModelError:
        return ModelError(
            f"{type(self).__name__}: expected a teacher with hidden states and attention, which terms of the objective "
            "need, got one with targets alone. Use a model as the teacher, or the terms logits and labels."
        )
