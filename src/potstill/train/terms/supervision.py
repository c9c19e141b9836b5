"""Deep supervision: earlier layers of the student learn from its last one, without a teacher."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from typing import Annotated

import torch
from torch import Tensor

from potstill.errors import ModelError, ShapeError
from potstill.losses.declared import NonEmpty
from potstill.losses.divergences import Divergence, ForwardKL
from potstill.losses.schedule import Temperature, Weight, value_at
from potstill.losses.targets import HeadTargets
from potstill.models.capture import ActivationRequest
from potstill.models.layer_map import layer_index
from potstill.models.shapes import ModelShape
from potstill.train.signals import Signals
from potstill.train.terms.term import FittedTerm, Term


@dataclass(frozen=True)
class DeepSupervision(Term):
    """Match the student's final distribution in its earlier layers, read through its own last norm and head.

        T^2 * mean over layers and tokens of D(p, q_layer) at temperature T,   p of the last layer, without gradient

    This is the distillation loss of Zhang et al. from the deepest classifier to the shallow ones, where a language
    model's exits share its norm and head, and so train them too. Their cross-entropy of the shallow classifiers and
    their hint loss are left out: the labels reach the exits through the last layer. Each layer costs one more pass
    through the head.

    Args:
        layers: of the student, before its last; from 0, or -2 and so on.
        divergence: any divergence.
        temperature: softmax temperature, > 0.

    References:
        Zhang et al. 2019 (Be Your Own Teacher), arXiv 1905.08094, section 3; Elhoushi et al. 2024 (LayerSkip), arXiv
        2404.16710, for exits that share the head.
    """

    layers: Annotated[tuple[int, ...], NonEmpty()]
    divergence: Divergence = ForwardKL()
    _: KW_ONLY
    weight: Weight = 1.0
    temperature: Temperature = 1.0
    name = "deep_supervision"
    needs_teacher = False
    reads_layers = True
    tasks = frozenset({"causal"})  # whose layers have nothing behind them but the norm and the head

    def __call__(self, signals: Signals) -> Tensor:
        raise ShapeError(
            "deep_supervision: expected a term that was fitted to its models, got a declaration. Call fit."
        )

    def fit(self, student: ModelShape, teacher: ModelShape) -> FittedTerm:
        exits = [layer_index("student", layer, student.layers) for layer in self.layers]
        if student.layers - 1 in exits:
            raise ShapeError(
                f"DeepSupervision: expected layers before the last, got {student.layers - 1} too, which is the last. "
                "Leave it out."
            )
        return FittedTerm(partial(self._compute, exits), ActivationRequest(exits=frozenset(exits)))

    def _compute(self, exits: list[int], signals: Signals) -> Tensor:
        last = signals.student
        if not isinstance(last, HeadTargets):
            raise ModelError(
                "DeepSupervision: expected a student with a plain linear head, through which its layers are read, got "
                "another. Leave the term out, or what wraps the head: an adapter, FSDP or ZeRO-3."
            )
        temperature = value_at(self.temperature, signals.step)
        target = HeadTargets(last.hidden.detach(), last.head)
        losses = []
        for layer in exits:
            hidden = signals.alignment.select(signals.inside.exits[layer]).to(last.hidden.dtype)
            exit_signals = replace(signals, student=HeadTargets(hidden, last.head))
            losses.append(exit_signals.compare(self.divergence, temperature=temperature, targets=target).loss)
        return temperature**2 * torch.stack(losses).mean()
