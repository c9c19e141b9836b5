"""Terms between a student and a teacher with another tokenizer; see `potstill.CrossTokenizerTeacher`."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from torch import Tensor

from potstill.losses.alignment import Alignment
from potstill.losses.cross_tokenizer import chunk_divergence, chunk_log_probs, sorted_distance
from potstill.losses.declared import Range
from potstill.losses.divergences import Divergence, ForwardKL
from potstill.losses.schedule import Temperature, Weight, value_at
from potstill.losses.token_losses import token_mean
from potstill.teachers.byte_alignment import AlignedChunks
from potstill.train.signals import Signals
from potstill.train.terms.policy import student_log_probs
from potstill.train.terms.term import Term


class AcrossTerm(Term):
    """A term that compares both models on the same bytes. Its mean is over the student's target tokens."""

    other_tokenizer = True
    tasks = frozenset({"causal"})  # chunks are of text that is read from left to right

    def __call__(self, signals: Signals) -> Tensor:
        assert signals.teacher is not None
        assert signals.teacher.chunks is not None  # the Distiller checks it
        return self.compare(signals, signals.teacher.chunks)

    @abstractmethod
    def compare(self, signals: Signals, across: AlignedChunks) -> Tensor:
        """Compute the term's scalar."""


@dataclass(frozen=True)
class Chunks(AcrossTerm):
    """Match the likelihood of each chunk of bytes, whatever the tokenizers (ALM).

    The sum over chunks, divided by the target tokens. A chunk ends where both tokenizations have a boundary. Where the
    teacher gives more than `bias_threshold` of a chunk's probability to longer tokens that the student does not have,
    the likelihoods are not comparable: such a chunk is dropped, or merged with the next one.

    Args:
        temperature: of a chunk's probability, > 0; see `potstill.chunk_divergence`. The loss keeps its size.
        divergence: over the two events that the chunk follows, or does not.
        bias_threshold: probability in [0, 1] that the teacher may give to longer tokens; 1 keeps every chunk.
        biased: drop chunks beyond it, or merge them with the next chunk of the text.

    References:
        Minixhofer et al. 2025 (ALM), arXiv 2503.20083.
    """

    weight: Weight = 1.0
    temperature: Temperature = 100.0
    divergence: Divergence = ForwardKL()
    bias_threshold: Annotated[float, Range(ge=0, le=1)] = 0.1
    biased: Literal["drop", "merge"] = "drop"
    name = "chunks"

    def compare(self, signals: Signals, across: AlignedChunks) -> Tensor:
        """Sum over chunks, each with the mean weight of its tokens; divide by the target tokens."""
        chunk, num_chunks = self._compared(across)
        log_p = chunk_log_probs(across.log_probs, chunk, num_chunks)
        of_token = torch.cat([chunk, chunk.new_tensor([-1])])[across.student]  # -1 stays -1
        places = (of_token >= 0).nonzero()[:, 0]
        of_place = of_token[places]
        log_q = student_log_probs(signals.student.rows(places), signals.labels[places])
        log_q = chunk_log_probs(log_q, of_place, num_chunks)
        temperature = value_at(self.temperature, signals.step)
        values = chunk_divergence(log_q, log_p.to(log_q.dtype), self.divergence, temperature=temperature)
        if signals.weights is not None:
            weights, zeros = signals.weights[places], signals.weights.new_zeros(num_chunks)
            total = zeros.index_add(0, of_place, weights)
            values = values * (total / zeros.index_add(0, of_place, torch.ones_like(weights)))
        return token_mean(values, normalizer=signals.divisor)

    def _compared(self, across: AlignedChunks) -> tuple[Tensor, int]:
        """Return the index [C] of the compared chunk that each chunk belongs to, or -1, and how many are compared."""
        biased = across.bias() > self.bias_threshold if self.bias_threshold < 1 else torch.zeros_like(across.continues)
        if self.biased == "drop":
            group, kept = torch.arange(len(biased), device=biased.device), ~biased
        else:
            joined = biased & across.continues  # with the next
            begins = torch.cat([joined.new_ones(1), ~joined[:-1]])[: len(joined)]
            group = begins.cumsum(0) - 1
            good = ~(biased & ~across.continues)  # nothing follows
            last = group.new_zeros(int(begins.sum())).scatter_reduce(0, group, good.long(), "amin", include_self=False)
            kept = last.bool()
        return torch.where(kept, kept.cumsum(0) - 1, -1)[group], int(kept.sum())


@dataclass(frozen=True)
class MappedLogits(AcrossTerm):
    """Match next-token distributions over the student's tokens, where both models start a token at the same byte.

        T^2 * D(p, q),   p(s) = sum of P_teacher(t) over the teacher's tokens t that begin with the student's token s

    A token of both vocabularies maps to itself. With one tokenizer this is `Logits`. Exact where the student's tokens
    are never longer than the teacher's, as bytes are; otherwise a longer token of the student takes the probability of
    the shorter tokens that it begins with.

    Args:
        divergence: any divergence.
        temperature: softmax temperature, > 0.
        top_k: the student's tokens that the teacher finds most likely; all others are one event.
    """

    divergence: Divergence = ForwardKL()
    weight: Weight = 1.0
    temperature: Temperature = 1.0
    top_k: Annotated[int, Range(ge=1)] = 256
    name = "mapped_logits"

    def compare(self, signals: Signals, across: AlignedChunks) -> Tensor:
        student, teacher = (places[~across.spaced] for places in across.first())
        temperature = value_at(self.temperature, signals.step)
        targets = across.mapped(teacher, self.top_k, temperature)
        loss = _at(signals, student).compare(self.divergence, temperature=temperature, targets=targets)
        return temperature**2 * loss.loss


@dataclass(frozen=True)
class ULD(AcrossTerm):
    """Match sorted probabilities, whatever tokens they belong to, where both start a token at the same byte (ULD).

    Builds the logits of both models. A baseline: it is 0 for the right probabilities on the wrong tokens.

    Args:
        temperature: softmax temperature, > 0.

    References:
        Boizard et al. 2024 (ULD), arXiv 2402.12030. There positions are paired by their number.
    """

    weight: Weight = 1.0
    temperature: Temperature = 1.0
    name = "uld"

    def compare(self, signals: Signals, across: AlignedChunks) -> Tensor:
        student, teacher = across.first()
        signals = _at(signals, student)
        logits = signals.student.dense()
        with torch.autocast(logits.device.type, enabled=False):
            temperature = value_at(self.temperature, signals.step)
            return signals.mean(sorted_distance(logits, across.logits(teacher), temperature=temperature))


def _at(signals: Signals, places: Tensor) -> Signals:
    """Select some target positions; means are still over all of them."""
    whole, weights = signals.alignment, None if signals.weights is None else signals.weights[places]
    alignment = Alignment(whole.positions[places], whole.labels[places], whole.length, weights)
    return replace(signals, student=signals.student.rows(places), normalizer=signals.divisor, alignment=alignment)
