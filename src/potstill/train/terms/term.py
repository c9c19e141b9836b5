"""Base class of all terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from torch import Tensor

from potstill.errors import ShapeError
from potstill.losses.alignment import TASKS, Task, task_hint
from potstill.losses.declared import Declared, in_words
from potstill.losses.schedule import Weight
from potstill.models.capture import ActivationRequest
from potstill.models.layer_map import LayerMap
from potstill.models.structure import ModelShape
from potstill.train.signals import Signals

# (layers, number of batches) -> teacher layer -> ids of its most important dimensions
SelectDimensions = Callable[[LayerMap, int], Mapping[int, Tensor]]


@dataclass(frozen=True)
class FittedTerm:
    """A term for two models.

    Args:
        compute: its value on a batch, without its weight; an nn.Module where it trains parameters of its own.
        student: activations that it reads of the student.
        teacher: activations that it reads of the teacher.
    """

    compute: Callable[[Signals], Tensor]
    student: ActivationRequest = ActivationRequest()
    teacher: ActivationRequest = ActivationRequest()


class Term(Declared):
    """One summand of an objective.

    A subclass is a frozen dataclass with a `name` and a `weight`. It implements `__call__`, or `fit` where it reads
    layers or trains parameters.

    Attributes:
        needs_teacher: whether it compares with the teacher's output.
        reads_layers: whether it reads activations of layers; see `fit`.
        other_tokenizer: whether it takes a teacher with another tokenizer, and only such a teacher.
        tasks: tasks for which it is defined.
        over: positions that its mean is over: target positions, or all attended ones.
        needs_samples: whether it is defined on on-policy samples alone.
        needs_sampler: whether it needs the log-probabilities under which samples were drawn.
    """

    key = "term"
    needs_teacher: ClassVar[bool] = True
    reads_layers: ClassVar[bool] = False
    other_tokenizer: ClassVar[bool] = False
    tasks: ClassVar[frozenset[Task]] = TASKS
    weight: Weight

    @property
    def over(self) -> Literal["target", "attended"]:
        """See the class."""
        return "target"

    @property
    def needs_samples(self) -> bool:
        """See the class."""
        return False

    @property
    def needs_sampler(self) -> bool:
        """See the class."""
        return False

    def task_mistake(self, task: Task) -> str | None:
        """Explain why the term is not defined for a task, behind its key; None where it is."""
        if task in self.tasks:
            return None
        return f": expected a term for the task {task}, got {self.name}. {task_hint(task, self.tasks)}."

    def describe(self) -> str:
        """Name the term, the fields that differ from their defaults, and its weight, for reports."""
        return ", ".join([self.name, *self.changed(but=("weight",)), f"weight {in_words(self.weight)}"])

    def __call__(self, signals: Signals) -> Tensor:
        """Compute the term's scalar, without its weight."""
        raise ShapeError(f"{self.name}: expected a term fitted to two models, got its declaration. Call fit.")

    def fit(self, student: ModelShape, teacher: ModelShape) -> FittedTerm:
        """Choose layers and widths for two models, and make what is trained with the student.

        Raises:
            UserError: the term cannot be computed for these models.
        """
        return FittedTerm(self)

    def select(self, dimensions: SelectDimensions) -> Self:
        """Return the term with what it takes from the teacher's gradients on the training data; most take nothing."""
        return self
