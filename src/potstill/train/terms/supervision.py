"""Deep supervision: a student's earlier layers learn from its own last one. No teacher is needed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from potstill.errors import ModelError, ShapeError
from potstill.losses.divergences import Divergence, ForwardKL
from potstill.losses.linear import linear_divergence
from potstill.losses.targets import HeadTargets
from potstill.models.capture import ActivationRequest, Anatomy
from potstill.models.layer_map import layer_index
from potstill.train.objective import Number, Signals, Term, value_at


class DeepSupervision(Term):
    """Earlier layers, read through the student's own last norm and head, learn from its final distribution.

        T^2 * mean over layers and tokens of D(p, q_layer) at temperature T,   p of the last layer, without gradient

    This is the distillation loss of Zhang et al. from the deepest classifier to the shallow ones, where a language
    model's exits share its norm and head, and so train them too. Their cross-entropy of the shallow classifiers and
    their hint loss are left out: the labels reach the exits through the last layer. Each layer costs one more pass
    through the head.

    Args:
        layers: of the student, from 0, each before the last; negative ones count from the end.
        divergence: any `Divergence`.
        weight: >= 0.
        temperature: > 0.

    Raises:
        ShapeError: no layer is named.

    References:
        Zhang et al. 2019 (Be Your Own Teacher), arXiv 1905.08094, section 3; Elhoushi et al. 2024 (LayerSkip), arXiv
        2404.16710, for exits that share the head.
    """

    name = "deep_supervision"
    needs_teacher = False
    looks_inside = True
    tasks = frozenset({"causal"})  # whose norm and head are all there is behind a layer

    def __init__(
        self,
        layers: Sequence[int],
        divergence: Divergence | None = None,
        *,
        weight: Number = 1.0,
        temperature: Number = 1.0,
    ) -> None:
        if not layers:
            raise ShapeError("DeepSupervision: expected at least one layer, got none.")
        self.layers = tuple(layers)
        self.divergence = divergence or ForwardKL()
        self.weight, self.temperature = weight, temperature
        self.exits: tuple[int, ...] = ()

    def fit(self, student: Anatomy, teacher: Anatomy) -> tuple[ActivationRequest, ActivationRequest]:
        """See `Term`."""
        self.exits = tuple(layer_index("student", layer, student.layers) for layer in self.layers)
        if student.layers - 1 in self.exits:
            raise ShapeError(
                f"DeepSupervision: expected layers before the last, which is {student.layers - 1}, got it too. The "
                "last layer is what the others learn from. Leave it out."
            )
        return ActivationRequest(exits=frozenset(self.exits)), ActivationRequest()

    def __call__(self, signals: Signals) -> Tensor:
        last, alignment = signals.student, signals.alignment
        if not isinstance(last, HeadTargets):
            raise ModelError(
                "DeepSupervision: expected a student with a plain head, through which its layers are read, got one "
                "that gives whole logits. Leave the term out, or what is on the head: an adapter, FSDP or ZeRO-3."
            )
        assert alignment is not None
        temperature = value_at(self.temperature, signals.step)
        target = HeadTargets(last.hidden.detach(), last.head)
        losses = [
            linear_divergence(
                alignment.select(signals.inside.exits[layer]).to(last.hidden.dtype),
                last.head,
                target,
                self.divergence,
                temperature=temperature,
                token_weights=signals.weights,
                normalizer=signals.divisor,
            ).loss
            for layer in self.exits
        ]
        return temperature**2 * torch.stack(losses).mean()
