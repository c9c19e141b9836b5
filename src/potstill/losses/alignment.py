"""What models are asked for, and which positions of a batch count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from torch import Tensor  # the command line knows the tasks, and does not wait for torch

IGNORE = -100  # a label that does not count, as everywhere in PyTorch; NaN where labels are numbers

# What models are asked for, and so which positions count:
#     causal: the next token                        labels [B, T] of the tokens themselves
#     masked: the token behind a mask               labels [B, T], -100 where there is no mask
#     classification: one of some classes           labels [B]
#     regression: a number                          labels [B], floating point, NaN where unknown
#     encoder: nothing, it has layers and no head   labels [B], 0 for a row that counts
Task = Literal["causal", "masked", "classification", "regression", "encoder"]
TASKS: frozenset[Task] = frozenset(get_args(Task))
DISTRIBUTIONS = TASKS - {"regression", "encoder"}  # a model's answer is a probability of each token or class
ANSWERS = TASKS - {"encoder"}  # there is an answer, by a head
OF_TOKENS = frozenset[Task](("causal", "masked"))  # the answer is one of the vocabulary
SEQUENCE_TASKS = frozenset[Task](("classification", "regression"))  # data have a label for each row


def instead(task: Task, tasks: frozenset[Task]) -> str:
    """For the error that a term of some tasks is not for another: why, and which are.

    >>> instead("masked", frozenset({"causal"}))
    'It is for the task causal'
    """
    if task == "regression":
        return "A number has no distribution. Use values for the teacher's number, labels for the data's"
    if task == "encoder":
        return "There is no head. Use terms over layers: hidden, attention, relations, similarity"
    return f"It is for the task {', '.join(sorted(tasks))}"


# Columns of a batch in which the student has written some rows itself: what it gave each of its tokens then, and what
# the distribution gave it that it was drawn from. [B, T] in nats; NaN on all other tokens.
OWN_LOG_PROBS = "own_log_probs"
SAMPLER_LOG_PROBS = "sampler_log_probs"


@dataclass(frozen=True)
class Alignment:
    """The positions of a batch whose prediction counts, and what should have been predicted there.

    Args:
        positions: [N] into the flattened [B * T].
        labels: [N] token ids; classes or numbers where rows are judged.
        length: T; 1 where a row is one position.
        weights: [N] how much each counts in means over tokens; None where all count the same.
    """

    positions: Tensor
    labels: Tensor
    length: int
    weights: Tensor | None = None

    def __len__(self) -> int:
        return self.positions.shape[0]

    def select(self, states: Tensor) -> Tensor:
        """The rows [N, ...] of states [B, T, ...] at the counting positions."""
        return states.flatten(0, 1).index_select(0, self.positions.to(states.device))

    def select_labels(self, values: Tensor) -> Tensor:
        """The values [N] of what should have been predicted there, of values [B, T] of all tokens."""
        return values.flatten().index_select(0, self.positions + 1)

    @property
    def row(self) -> Tensor:
        """[N] the row of each position, 0 to B - 1."""
        return self.positions // self.length

    @property
    def column(self) -> Tensor:
        """[N] the place of each position in its row, 0 to T - 1."""
        return self.positions % self.length


def counting(labels: Tensor, task: Task = "causal") -> Tensor:
    """Which positions count. This and `align` are the only places that know the causal shift.

    causal: t does when the label at t + 1 is not -100. masked: t does when its own label is not. All others: the row
    does when its label is there.

    Args:
        labels: [B, T], not shifted: labels[t] is the token at t; [B] where rows are judged. See `Task`.
        task: what the model is asked for.

    Returns:
        [B, T - 1] bool, for positions 0 to T - 2; [B, T] for masked; [B, 1] for rows.
    """
    if task == "causal":
        return labels[:, 1:] != IGNORE
    if task == "masked":
        return labels != IGNORE
    rows = labels.unsqueeze(1)
    return ~rows.isnan() if task == "regression" else rows != IGNORE


def align(labels: Tensor, task: Task = "causal", weights: Tensor | None = None) -> Alignment:
    """The counting positions of a batch of labels, and what should have been said there; see `counting`.

    Args:
        labels: [B, T] or [B].
        task: what the model is asked for.
        weights: of the labels' shape, shifted as little as they are: how much each counts; None for all the same.
    """
    rows, columns = counting(labels, task).nonzero(as_tuple=True)
    if labels.ndim == 1:
        return Alignment(rows, labels[rows], 1, None if weights is None else weights[rows])
    length, shift = labels.shape[1], int(task == "causal")
    said = (rows, columns + shift)
    return Alignment(rows * length + columns, labels[said], length, None if weights is None else weights[said])


def causal_alignment(labels: Tensor) -> Alignment:
    """`align` for what is causal alone: caches and servers."""
    return align(labels)


def attended(batch: Mapping[str, Tensor], task: Task = "causal") -> Tensor:
    """Which positions of a batch have hidden states and attention to learn from: [B, T] bool.

    All that are no padding, prompts too: what a token's states are depends on nothing that comes after it. In a row
    without a counting position none is: such rows only fill up batches.

    Args:
        batch: attention_mask [B, T] and labels.
        task: what the model is asked for.
    """
    return batch["attention_mask"].bool() & counting(batch["labels"], task).any(1, keepdim=True)
