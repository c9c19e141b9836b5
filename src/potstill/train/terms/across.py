"""Terms between a student and a teacher with another tokenizer; see `potstill.CrossTokenizerTeacher`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from potstill.errors import ShapeError
from potstill.losses.chunk import chunk_divergence, chunk_log_probs, sorted_distance
from potstill.losses.divergences import Divergence, ForwardKL
from potstill.losses.linear import linear_cross_entropy
from potstill.losses.targets import DenseTargets, HeadTargets
from potstill.losses.token import token_cross_entropy
from potstill.teachers.byte_alignment import Across
from potstill.train.objective import Number, Signals, Term, value_at


class AcrossTerm(Term):
    """A term that compares what both say of the same bytes. Its mean is over the student's counting tokens."""

    needs_teacher = True
    other_tokenizer = True
    tasks = frozenset({"causal"})  # chunks are of text that is read from left to right


@dataclass(frozen=True)
class Chunks(AcrossTerm):
    """Match how likely each chunk of bytes is (ALM): the sum over chunks, divided by the counting tokens.

    A chunk ends where both have a boundary. Where the teacher keeps more than `bias_threshold` of a chunk's probability
    for longer tokens that the student does not have, the likelihoods do not compare: such a chunk is left out, or taken
    together with the next one.

    Args:
        weight: >= 0.
        temperature: > 0, of `potstill.chunk_divergence`, which keeps the size of the loss when it changes.
        divergence: over the two events that a chunk comes, or does not.
        bias_threshold: in [0, 1]; 1 keeps every chunk as it is.
        biased: drop; or merge with the next chunk, as far as there is one in the same text.

    References:
        Minixhofer et al. 2025 (ALM), arXiv 2503.20083.
    """

    weight: Number = 1.0
    temperature: Number = 100.0
    divergence: Divergence = field(default_factory=ForwardKL)
    bias_threshold: float = 0.1
    biased: Literal["drop", "merge"] = "drop"
    name = "chunks"

    def __post_init__(self) -> None:
        if not 0 <= self.bias_threshold <= 1:
            raise ShapeError(f"Chunks: expected bias_threshold in [0, 1], got {self.bias_threshold}.")
        if self.biased not in ("merge", "drop"):
            raise ShapeError(f"Chunks: expected biased drop or merge, got {self.biased!r}.")

    def __call__(self, signals: Signals) -> Tensor:
        across = meeting_of(signals)
        chunk, chunks = self._kept(across)  # of the chunks where both meet -> what is compared
        log_p = chunk_log_probs(across.log_probs, chunk, chunks)
        of_token = torch.cat([chunk, chunk.new_tensor([-1])])[across.student]  # -1 stays -1
        there = (of_token >= 0).nonzero()[:, 0]
        log_q = chunk_log_probs(_label_log_probs(signals, there), of_token[there], chunks)
        temperature = value_at(self.temperature, signals.step)
        apart = chunk_divergence(log_q, log_p.to(log_q.dtype), self.divergence, temperature=temperature)
        return _chunk_mean(signals, apart, there, of_token[there])

    def _kept(self, across: Across) -> tuple[Tensor, int]:
        """[C] which compared chunk each belongs to, or -1, and how many are compared."""
        biased = across.bias() > self.bias_threshold if self.bias_threshold < 1 else torch.zeros_like(across.goes_on)
        if self.biased == "drop":
            kept = ~biased
            return torch.where(kept, kept.cumsum(0) - 1, -1), int(kept.sum())
        joined = biased & across.goes_on  # with the next
        begins = torch.cat([joined.new_ones(1), ~joined[:-1]])[: len(joined)]
        group = begins.cumsum(0) - 1
        good = ~(biased & ~across.goes_on)  # nothing follows
        last = group.new_zeros(int(begins.sum())).scatter_reduce(0, group, good.long(), "amin", include_self=False)
        kept = last.bool()[group]
        number = torch.where(last.bool(), last.cumsum(0) - 1, -1)
        return torch.where(kept, number[group], -1), int(last.sum())


@dataclass(frozen=True)
class MappedLogits(AcrossTerm):
    """Match next-token distributions in the student's tokens, where both begin a token at the same byte.

        T^2 * D(p, q),   p(s) = sum of P_teacher(t) over the teacher's tokens t that begin with the student's token s

    A token that both have stands for itself. With one tokenizer this is `Logits`. Exact where the student's tokens are
    never longer than the teacher's, as bytes are; else a longer token of the student counts for the shorter ones by
    which the teacher would say it.

    Args:
        divergence: any `Divergence`.
        weight: >= 0.
        temperature: > 0.
        top_k: of the student's tokens, those that the teacher finds likeliest; the others are one event.
    """

    divergence: Divergence = field(default_factory=ForwardKL)
    weight: Number = 1.0
    temperature: Number = 1.0
    top_k: int = 256
    name = "mapped_logits"

    def __call__(self, signals: Signals) -> Tensor:
        across = meeting_of(signals)
        mine, theirs = (places[~across.spaced] for places in across.first())
        temperature = value_at(self.temperature, signals.step)
        targets = across.mapped(theirs, self.top_k, temperature)
        found = _at(signals, mine).compare(self.divergence, temperature=temperature, targets=targets)
        return temperature**2 * found.loss


@dataclass(frozen=True)
class ULD(AcrossTerm):
    """Match the probabilities in falling order, whatever they are of, where both begin a token at the same byte.

    In the memory of both models' logits. A baseline: it is 0 for the right probabilities on wrong tokens.

    Args:
        weight: >= 0.
        temperature: > 0.

    References:
        Boizard et al. 2024 (ULD), arXiv 2402.12030. There positions are paired by their number.
    """

    weight: Number = 1.0
    temperature: Number = 1.0
    name = "uld"

    def __call__(self, signals: Signals) -> Tensor:
        across = meeting_of(signals)
        mine, theirs = across.first()
        signals = _at(signals, mine)
        student = signals.student.dense()
        with torch.autocast(student.device.type, enabled=False):
            temperature = value_at(self.temperature, signals.step)
            return signals.mean(sorted_distance(student, across.logits(theirs), temperature=temperature))


def meeting_of(signals: Signals) -> Across:
    """Where student and teacher meet."""
    assert signals.teacher is not None
    assert signals.teacher.across is not None  # the Distiller has seen to it
    return signals.teacher.across


def _at(signals: Signals, places: Tensor) -> Signals:
    """The same at some of the counting positions; means are over all of them still."""
    alignment = signals.alignment
    if alignment is not None:
        weights = None if alignment.weights is None else alignment.weights[places]
        alignment = replace(
            alignment, positions=alignment.positions[places], labels=alignment.labels[places], weights=weights
        )
    student, labels = _some(signals.student, places), signals.labels[places]
    return replace(signals, student=student, labels=labels, normalizer=signals.divisor, alignment=alignment)


def _chunk_mean(signals: Signals, values: Tensor, places: Tensor, chunk: Tensor) -> Tensor:
    """The sum of values of chunks over the counting tokens of the optimiser step.

    A chunk counts as much as the tokens at its places do in the mean.
    """
    if signals.weights is not None:
        zeros = signals.weights.new_zeros(len(values))
        total = zeros.index_add(0, chunk, signals.weights[places])
        values = values * (total / zeros.index_add(0, chunk, torch.ones_like(signals.weights[places])))
    return replace(signals, normalizer=signals.divisor, alignment=None).mean(values)


def _some(student: HeadTargets | DenseTargets, places: Tensor) -> HeadTargets | DenseTargets:
    """What the student says at some of the counting positions."""
    if isinstance(student, HeadTargets):
        return HeadTargets(student.hidden[places], student.head)
    return DenseTargets(student.logits[places])


def _label_log_probs(signals: Signals, places: Tensor) -> Tensor:
    """The student's log-probabilities of the data's own tokens, with gradient."""
    some, labels = _some(signals.student, places), signals.labels[places]
    if isinstance(some, HeadTargets):
        return -linear_cross_entropy(some.hidden, some.head, labels, reduction="none").loss
    with torch.autocast(some.logits.device.type, enabled=False):
        return -token_cross_entropy(some.logits, labels)
