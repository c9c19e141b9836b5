"""Base class of all terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar, Literal, NamedTuple, Self

from torch import Tensor

from potstill.errors import ShapeError
from potstill.losses.alignment import TASKS, Task, task_hint
from potstill.losses.declared import Declared, in_words
from potstill.losses.schedule import Weight
from potstill.models.capture import ActivationRequest
from potstill.models.layer_map import Layer, LayerMap
from potstill.models.shapes import ModelShape
from potstill.train.signals import Signals

# (layers, number of batches) -> teacher layer -> ids of its most important dimensions
SelectDimensions = Callable[[LayerMap, int], Mapping[Layer, Tensor]]


class FittedTerm(NamedTuple):
    """A term for two models."""

    compute: Callable[[Signals], Tensor]  # its value without its weight; an nn.Module where it trains parameters
    student: ActivationRequest = ActivationRequest()  # what it reads of the student
    teacher: ActivationRequest = ActivationRequest()


class Term(Declared):
    """One summand of an objective.

    A subclass is a frozen dataclass with a `name` and a `weight`. It implements `__call__`, or `fit` where it reads
    layers or trains parameters.

    Args:
        weight: >= 0.
    """

    key = "term"
    needs_teacher: ClassVar[bool] = True  # whether it compares with the teacher's output
    needs_labels: ClassVar[bool] = False  # whether it compares with the labels of the data
    reads_layers: ClassVar[bool] = False  # whether it reads activations of layers; see `fit`
    other_tokenizer: ClassVar[bool] = False  # whether it takes a teacher with another tokenizer, and no other teacher
    tasks: ClassVar[frozenset[Task]] = TASKS  # for which it is defined
    over: ClassVar[Literal["target", "attended"]] = "target"  # positions that its mean is over
    needs_samples: ClassVar[bool] = False  # whether it is defined on on-policy samples alone
    needs_sampler: ClassVar[bool] = False  # whether it needs the log-probabilities under which samples were drawn
    weight: Weight

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
        """Choose layers and widths for two models, and make what is trained; raises UserError where that fails."""
        return FittedTerm(self)

    def map_bytes(self, student: ModelShape, teacher: ModelShape, tokens: int) -> int:
        """Count the bytes of the maps [tokens, tokens] that a row needs in memory at once, at least; most need none."""
        return 0

    def select(self, dimensions: SelectDimensions) -> Self:
        """Return the term with what it takes from the teacher's gradients on the training data; most take nothing."""
        return self
