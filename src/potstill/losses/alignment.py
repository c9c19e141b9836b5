"""Tasks of a model, and target positions of a batch: those whose label is not -100 (NaN for regression)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from potstill.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor  # the command line imports the tasks and should not wait for torch

IGNORE = -100  # PyTorch's ignored label; regression uses NaN
MOST_TOKENS = 1 << 24  # of a vocabulary; a larger id in a file or an answer is a mistake, or meant to fill the memory

# What a model predicts:
#     causal: the next token                labels [B, T], the tokens themselves, not shifted
#     masked: the token behind a mask       labels [B, T], -100 where there is no mask
#     classification: a class per row       labels [B]
#     regression: a number per row          labels [B], floating point, NaN where unknown
#     encoder: nothing (layers, no head)    labels [B], 0 for a row to learn from
Task = Literal["causal", "masked", "classification", "regression", "encoder"]
TASKS: frozenset[Task] = frozenset(get_args(Task))
DISTRIBUTION_TASKS = TASKS - {"regression", "encoder"}  # the head gives probabilities of tokens or classes
HEAD_TASKS = TASKS - {"encoder"}
TOKEN_TASKS = frozenset[Task](("causal", "masked"))
SEQUENCE_TASKS = frozenset[Task](("classification", "regression"))  # one label for each row


def task_hint(task: Task, tasks: frozenset[Task]) -> str:
    """Explain in an error why a term for `tasks` does not work for `task`.

    >>> task_hint("masked", frozenset({"causal"}))
    'It is for the task causal'
    """
    if task == "regression":
        return "A number has no distribution. Use values for the teacher's number, labels for the data's"
    if task == "encoder":
        return "There is no head. Use terms over layers: hidden, attention, relations, similarity"
    return f"It is for the task {', '.join(sorted(tasks))}"


def are_shifted(input_ids: Sequence[int], labels: Sequence[int]) -> bool:
    """Whether each label is the next token in place of the token itself: the shift would then be done twice.

    >>> are_shifted([5, 6, 7], [6, 7, -100]), are_shifted([5, 6, 7], [-100, 6, 7]), are_shifted([5, 5, 5], [5, 5, 5])
    (True, False, False)
    """
    places = [i for i, label in enumerate(labels) if label != IGNORE]
    following = all(i + 1 == len(input_ids) or labels[i] == input_ids[i + 1] for i in places)
    return following and any(labels[i] != input_ids[i] for i in places[:-1])


def check_unshifted(input_ids: Sequence[int], labels: Sequence[int], where: str) -> None:
    """Raise DataError where the labels of a row, which `where` names, are shifted already."""
    if are_shifted(input_ids, labels):
        raise DataError(
            f"data: expected labels that are the tokens themselves, got those of the next tokens in {where}. They are "
            "shifted later. Shift them back, or leave them out where all tokens are targets."
        )


# Columns [B, T] of a batch with on-policy samples, in nats: each sampled token's log-probability under the student, and
# under the distribution it was sampled from (temperature, top-p, an older student). NaN on all other tokens.
STUDENT_LOG_PROBS = "student_log_probs"
SAMPLER_LOG_PROBS = "sampler_log_probs"


@dataclass(frozen=True)
class Alignment:
    """Target positions of a batch, with their labels."""

    positions: Tensor  # [N] indices into the flattened [B * T]
    labels: Tensor  # [N] token ids; for sequence-level tasks classes or numbers
    length: int  # T; 1 where a row is one position
    weights: Tensor | None = None  # [N] weight of each in means over tokens; None for equal weights

    def __len__(self) -> int:
        return self.positions.shape[0]

    def select(self, states: Tensor) -> Tensor:
        """Return the rows [N, ...] of states [B, T, ...] at the target positions."""
        return states.flatten(0, 1).index_select(0, self.positions.to(states.device))

    def select_labels(self, values: Tensor) -> Tensor:
        """Return the values [N] of the predicted (next) tokens, from values [B, T] of all tokens."""
        return values.flatten().index_select(0, self.positions + 1)

    @property
    def row(self) -> Tensor:
        """[N] batch row of each target position."""
        return self.positions // self.length

    @property
    def column(self) -> Tensor:
        """[N] place in its row of each target position, 0 to T - 1."""
        return self.positions % self.length


def target_positions(labels: Tensor, task: Task = "causal") -> Tensor:
    """Find the positions whose prediction has a target, from labels [B, T], not shifted, or [B] (see `Task`).

    causal: position t if labels[t + 1] != -100: [B, T - 1] bool. masked: if labels[t] != -100: [B, T]. All others: the
    row if it has a label: [B, 1]. Only this function and `align` know the causal shift.
    """
    if task == "causal":
        return labels[:, 1:] != IGNORE
    if task == "masked":
        return labels != IGNORE
    rows = labels.unsqueeze(1)
    return ~rows.isnan() if task == "regression" else rows != IGNORE


def align(labels: Tensor, task: Task = "causal", weights: Tensor | None = None) -> Alignment:
    """Find a batch's `target_positions` and what each should predict; `weights` are not shifted either."""
    rows, columns = target_positions(labels, task).nonzero(as_tuple=True)
    if labels.ndim == 1:
        return Alignment(rows, labels[rows], 1, None if weights is None else weights[rows])
    length = labels.shape[1]
    targets = (rows, columns + int(task == "causal"))
    return Alignment(rows * length + columns, labels[targets], length, None if weights is None else weights[targets])


def causal_alignment(labels: Tensor) -> Alignment:
    return align(labels)


def attended_positions(batch: Mapping[str, Tensor], task: Task = "causal") -> Tensor:
    """Find the tokens whose layers are compared, [B, T] bool: all but padding and rows without a target."""
    return batch["attention_mask"].bool() & target_positions(batch["labels"], task).any(1, keepdim=True)
