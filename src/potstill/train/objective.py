"""What is minimised: a weighted sum of terms."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from potstill.errors import ShapeError
from potstill.losses.alignment import ANSWERS, DISTRIBUTIONS, IGNORE, TASKS, Alignment, Task, instead
from potstill.losses.divergences import Divergence
from potstill.losses.linear import FusedLoss, linear_divergence
from potstill.losses.reduce import token_mean
from potstill.losses.schedule import Schedule
from potstill.losses.targets import DenseTargets, HeadTargets, Targets
from potstill.losses.teacher_weights import teacher_confidence, teacher_entropy, top_share, top_tokens
from potstill.losses.token import label_loss, token_divergence
from potstill.models.capture import ActivationRequest, Activations, Anatomy
from potstill.teachers.teacher import TeacherOutput

Text = Literal["all", "data", "own"]  # which tokens a term is about: the student's own, or the others
Number = float | Schedule  # every weight and temperature: fixed, or a function of the optimiser step

# How much more than the logits the labels may weigh where both go through the head together: their gradient may be in
# half precision before it is weighted, and must stay within its range.
MAX_LABEL_WEIGHT_RATIO = 10.0


# Logs of own text against data: sums over such tokens, and how many they are, both divided by all tokens.
OWN_TOKENS, DATA_TOKENS = "own_tokens", "data_tokens"
OF_TEXT = {"_own": OWN_TOKENS, "_data": DATA_TOKENS}


def value_at(number: Number, step: int) -> float:
    """The number at an optimiser step."""
    return number(step) if callable(number) else number


@dataclass(frozen=True)
class Own:
    """What is known of the tokens that the student has written itself.

    Args:
        tokens: [N] bool: is it the student's own?
        rows: [N] the row of each token.
        log_probs: [N] what the student gave it when it wrote it, nats; NaN on others.
        sampler_log_probs: [N] what the distribution gave it that it was drawn from, nats; NaN on others.
    """

    tokens: Tensor
    rows: Tensor
    log_probs: Tensor
    sampler_log_probs: Tensor


@dataclass(frozen=True)
class Signals:
    """All that a term may look at: N counting positions of one batch, and what went on inside.

    Args:
        student: what the student says, in the form in which teachers speak: its last hidden states [N, H] and its head,
            or its logits [N, V] where the head is not plain. With gradient. `student.dense()` makes logits of both.
        labels: [N] token ids or classes; floating point where they are numbers.
        teacher: what the teacher said, or None where no term asks for it.
        normalizer: what every mean over tokens divides by, or None for N, or for the sum of the weights.
        step: the optimiser step, from 0.
        inside: what terms have asked of the student's layers, over all positions. With gradient.
        attended: [B, T] bool, the positions that terms over layers count; see `positions.attended`.
        attended_normalizer: what means over attended positions divide by, or None for their number.
        alignment: where the counting positions are, and how much each counts.
        own: of the tokens that the student has written itself; None where there are none.
    """

    student: HeadTargets | DenseTargets
    labels: Tensor
    teacher: TeacherOutput | None
    normalizer: Tensor | float | None
    step: int
    inside: Activations = field(default_factory=Activations)
    attended: Tensor | None = None
    attended_normalizer: Tensor | float | None = None
    alignment: Alignment | None = None
    own: Own | None = None

    def only(self, text: Text) -> Tensor | None:
        """[N] 1 on tokens of such text and 0 on others; None for ones."""
        if text == "all" or (text == "data" and self.own is None):
            return None
        if self.own is None:
            return torch.zeros(len(self.labels), device=self.labels.device)
        return (self.own.tokens if text == "own" else ~self.own.tokens).float()

    @property
    def label_loss(self) -> str | None:
        """What the logs call the distance from the labels; None where a model without a head says nothing."""
        if not self.student.vocabulary:
            return None
        return "squared_error" if self.labels.is_floating_point() else "cross_entropy"

    @property
    def weights(self) -> Tensor | None:
        """[N] how much each token counts in every mean over tokens; None where all count the same."""
        return None if self.alignment is None else self.alignment.weights

    @property
    def divisor(self) -> Tensor | float:
        """The normaliser, or what it is for this batch alone."""
        if self.normalizer is not None:
            return self.normalizer
        return max(len(self.labels), 1) if self.weights is None else or_one(self.weights.sum())

    def mean(self, values: Tensor) -> Tensor:
        """The weighted mean of values [N] over the tokens of the optimiser step."""
        return token_mean(values, self.weights, self.divisor)

    def attended_mean(self, values: Tensor) -> Tensor:
        """The mean of values [A], of the attended positions, over those of the optimiser step."""
        return token_mean(values, normalizer=self.attended_normalizer)

    def batch_mean(self, value: Tensor) -> Tensor:
        """The mean of a quantity of batches over those of the optimiser step, weighted by their counting tokens."""
        return self.mean(value.expand(len(self.labels)))

    def compare(
        self,
        divergence: Divergence | None,
        *,
        temperature: float = 1.0,
        label_weight: float | None = None,
        targets: Targets | None = None,
        token_weights: Tensor | None = None,
    ) -> FusedLoss:
        """How far the student is from the teacher, from the labels, or from both in one pass through its head.

            mean over tokens of w * (D + label_weight * CE)

        Args:
            divergence: from the teacher; None to leave it out.
            temperature: of the divergence.
            label_weight: of the cross-entropy, with 0 it is only reported; None to leave it out.
            targets: the teacher's; None for those that it gave.
            token_weights: [N], w, without gradient, beside the weights of the data; None for ones. The mean does not
                divide by them.
        """
        if targets is None and divergence is not None and self.teacher is not None:
            targets = self.teacher.targets
        labels = None if label_weight is None else self.labels
        if labels is not None and self.own is not None:
            labels = labels.masked_fill(self.own.tokens, IGNORE)  # what the student wrote is no truth
        if isinstance(self.student, HeadTargets):
            return linear_divergence(
                self.student.hidden,
                self.student.head,
                targets,
                divergence,
                temperature=temperature,
                token_weights=self.weights if token_weights is None else _weighted(token_weights, self.weights),
                normalizer=self.divisor,
                labels=labels,
                label_weight=label_weight or 0.0,
            )
        logits = self.student.logits
        apart = entropy = None
        parts = []
        with torch.autocast(logits.device.type, enabled=False):  # a teacher's head keeps its own precision
            if targets is not None and divergence is not None:
                apart = token_divergence(logits, targets, divergence, temperature=temperature)
                parts.append(self.mean(_weighted(apart, token_weights)))
            if labels is not None:
                entropy = label_loss(logits, labels)
                parts += [label_weight * self.mean(_weighted(entropy, token_weights))] if label_weight else []
        return FusedLoss(
            torch.stack(parts).sum(),
            None if apart is None else apart.detach(),
            None if entropy is None else entropy.detach(),
        )


def _weighted(values: Tensor, weights: Tensor | None) -> Tensor:
    return values if weights is None else values * weights


def _times(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a * b


def or_one(total: Tensor) -> Tensor:
    """A sum of weights to divide by: 1 where nothing counts."""
    return total.masked_fill(total == 0, 1)


class Term(ABC):
    """One summand of an objective.

    A term that trains something of its own is an nn.Module as well.
    """

    name: str
    needs_teacher: bool
    weight: Number
    looks_inside: ClassVar[bool] = False  # at layers, of the student and of the teacher that it needs
    tasks: ClassVar[frozenset[Task]] = TASKS  # for which it makes sense
    other_tokenizer: ClassVar[bool] = False  # it compares bytes, with a teacher that has tokens of its own
    over: Literal["counting", "attended"] = "counting"  # the positions whose mean it is

    @abstractmethod
    def __call__(self, signals: Signals) -> Tensor:
        """The term's scalar, without its weight."""

    def fit(self, student: Anatomy, teacher: Anatomy) -> tuple[ActivationRequest, ActivationRequest]:
        """Settle on layers and widths, for a term that looks inside: what it needs of the student and of the teacher.

        Raises:
            UserError: it does not go with these models.
        """
        return ActivationRequest(), ActivationRequest()


@dataclass(frozen=True)
class Logits(Term):
    """The divergence between the teacher's and the student's next-token distributions.

        T^2 * mean over tokens of w D(p, q) at temperature T

    T^2 keeps the gradient's size when T changes (Hinton et al. 2015, arXiv 1503.02531, section 2.1).

    Args:
        divergence: any `Divergence`.
        weight: >= 0.
        temperature: > 0.
        tokens: which count how much: all the same; the share of a batch at which the teacher's entropy is largest
            (entropy) or its likeliest token most likely (confident), the others not at all; or by the probability of
            its likeliest token (confidence). The mean is over all tokens, so that a share of them makes a smaller loss.
        share: of the tokens, in [0, 1], for entropy and confident: a schedule makes a curriculum.
        top_k: compare with the teacher's likeliest tokens alone, all others being one event (`SparseTargets`).
        text: own: on what the student has written alone; data: on all else alone. The mean is over all tokens.
    """

    divergence: Divergence
    weight: Number = 1.0
    temperature: Number = 1.0
    tokens: Literal["all", "entropy", "confident", "confidence"] = "all"
    share: Number = 0.5
    top_k: int | None = None
    text: Text = "all"
    name = "logits"
    needs_teacher = True
    tasks = DISTRIBUTIONS

    def __post_init__(self) -> None:
        if self.tokens not in ("all", "entropy", "confident", "confidence"):
            raise ShapeError(f"Logits: expected tokens of all, entropy, confident, confidence, got {self.tokens!r}.")

    @property
    def weighs_tokens(self) -> bool:
        """Whether tokens count differently."""
        return self.tokens != "all" or self.text != "all"

    def __call__(self, signals: Signals) -> Tensor:
        return self.with_labels(signals, None).loss

    def with_labels(self, signals: Signals, label_weight: float | None) -> FusedLoss:
        """The term plus label_weight times Labels, and both of them by token; None leaves the labels out."""
        temperature = value_at(self.temperature, signals.step)
        factor = temperature**2
        weight = None if label_weight is None else label_weight / factor
        assert signals.teacher is not None
        targets = signals.teacher.targets
        weights = _times(self._token_weights(targets, signals.step), signals.only(self.text))
        if self.top_k is not None:
            targets = top_tokens(targets, self.top_k, temperature)
        found = signals.compare(
            self.divergence, temperature=temperature, label_weight=weight, targets=targets, token_weights=weights
        )
        assert found.divergence is not None
        by_token = factor * _weighted(found.divergence, weights)
        return FusedLoss(factor * found.loss, by_token, found.cross_entropy)

    def _token_weights(self, targets: Targets, step: int) -> Tensor | None:
        if self.tokens == "all":
            return None
        if self.tokens == "entropy":
            return top_share(teacher_entropy(targets), value_at(self.share, step))
        sure = teacher_confidence(targets)
        return sure if self.tokens == "confidence" else top_share(sure, value_at(self.share, step))


@dataclass(frozen=True)
class Labels(Term):
    """Cross-entropy with the tokens or classes of the data; the squared error where labels are numbers.

    What the student has written itself adds nothing.
    """

    weight: Number = 1.0
    name = "labels"
    needs_teacher = False
    tasks = ANSWERS

    def __call__(self, signals: Signals) -> Tensor:
        return signals.compare(None, label_weight=1.0).loss


class Objective(nn.Module):
    """The weighted sum of terms.

    A module, so that what a term trains beside the student is optimised, moved and saved with it.

    Args:
        terms: at least one.

    Raises:
        ShapeError: there is no term.
    """

    def __init__(self, terms: Sequence[Term]) -> None:
        super().__init__()
        if not terms:
            raise ShapeError("Objective: expected at least one term, got none. Add Logits(...) or Labels().")
        self.terms = list(terms)
        names = [term.name for term in terms]
        # Two terms of one kind are told apart in the logs by their place.
        self.names = [f"{n}_{i}" if names.count(n) > 1 else n for i, n in enumerate(names)]
        self.needs_teacher = any(term.needs_teacher for term in terms)
        self.looks_inside = any(term.looks_inside for term in terms)
        self.looks_into_teacher = any(term.looks_inside and term.needs_teacher for term in terms)
        self.trained = nn.ModuleList(term for term in terms if isinstance(term, nn.Module))

    def fit(self, student: Anatomy, teacher: Anatomy | None) -> tuple[ActivationRequest, ActivationRequest]:
        """Settle on layers and widths: what all terms together need of the student and of the teacher.

        A term that needs no teacher learns from the student itself. None stands for a teacher that no term looks into.

        Raises:
            UserError: a term does not go with these models.
        """
        of_student, of_teacher = ActivationRequest(), ActivationRequest()
        for term in self.terms:
            mine, theirs = term.fit(student, teacher if term.needs_teacher and teacher else student)
            of_student, of_teacher = of_student | mine, of_teacher | theirs
        return of_student, of_teacher

    def suits(self, task: Task) -> None:
        """Look that every term makes sense for what the models are asked.

        Raises:
            ShapeError: one does not.
        """
        for term in self.terms:
            if task not in term.tasks:
                raise ShapeError(
                    f"Objective: expected terms for the task {task}, got {term.name}. {instead(task, term.tasks)}."
                )

    def total(self, means: Mapping[str, float], step: int) -> float:
        """The loss that the terms' means make at an optimiser step; that of the labels where no teacher spoke."""
        if self.needs_teacher and not set(self.names) <= set(means):
            return next(means[name] for name in ("cross_entropy", "squared_error") if name in means)
        return sum(value_at(term.weight, step) * means[name] for term, name in zip(self.terms, self.names, strict=True))

    def forward(self, signals: Signals) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar loss, and every term's value without its weight, detached; in evaluation mode also the distance
        from the labels, as cross_entropy or squared_error.

        The first Logits and the first Labels go through the student's head together: its products are most of the work.
        """
        if self.needs_teacher and signals.teacher is None:  # held-out rows that it cannot speak about
            held_out = Labels()(signals).detach()
            return held_out, {str(signals.label_loss): held_out}
        weights = [value_at(term.weight, signals.step) for term in self.terms]
        summands: list[Tensor] = []
        values: dict[int, Tensor] = {}
        entropy: Tensor | None = None
        by_text: dict[str, Tensor] = {}
        logits, labels = self._first(Logits), self._first(Labels)
        joined = labels
        if (
            logits is None
            or labels is None
            or weights[logits] <= 0
            or weights[labels] > MAX_LABEL_WEIGHT_RATIO * weights[logits]
        ):
            joined = None
        elif cast(Logits, self.terms[logits]).weighs_tokens:
            joined = None  # they would share its tokens' weights
        if logits is not None:
            ratio = 0.0 if joined is None else weights[joined] / weights[logits]
            asked = joined is not None or not self.training
            found = cast(Logits, self.terms[logits]).with_labels(signals, ratio if asked else None)
            summands.append(weights[logits] * found.loss)
            values[logits] = signals.mean(cast(Tensor, found.divergence))
            if signals.own is not None:
                by_text = _by_text(self.names[logits], cast(Tensor, found.divergence), signals)
            if found.cross_entropy is not None:
                entropy = signals.mean(found.cross_entropy)
                values |= {} if joined is None else {joined: entropy}
        for i, term in enumerate(self.terms):
            if i not in values:
                value = term(signals)
                summands.append(weights[i] * value)
                values[i] = value.detach()
        logs = {name: values[i] for i, name in enumerate(self.names)} | by_text
        if not self.training and signals.label_loss is not None:
            if entropy is None:
                entropy = Labels()(signals).detach() if labels is None else values[labels]
            logs[signals.label_loss] = entropy
        return torch.stack(summands).sum(), logs

    def _first(self, kind: type[Term]) -> int | None:
        return next((i for i, term in enumerate(self.terms) if isinstance(term, kind)), None)


def _by_text(name: str, values: Tensor, signals: Signals) -> dict[str, Tensor]:
    """Parts of a term's mean: of own tokens and of the data's, beside how much of the tokens they are."""
    assert signals.own is not None
    own = signals.own.tokens.to(values.dtype)
    parts = {"_own": own, "_data": 1 - own}
    return {name + part: signals.mean(values * of) for part, of in parts.items()} | {
        OF_TEXT[part]: signals.mean(of) for part, of in parts.items()
    }
