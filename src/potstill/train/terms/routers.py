"""Terms over the routers of mixtures of experts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from potstill.errors import ShapeError
from potstill.losses.schedule import Weight
from potstill.models.capture import ActivationRequest
from potstill.models.layer_map import Layer
from potstill.models.shapes import ModelShape
from potstill.train.signals import Signals
from potstill.train.terms.layers import LayerTerm
from potstill.train.terms.term import FittedTerm, Term


@dataclass(frozen=True)
class RouterBalance(Term):
    """Balance the load of the student's experts: the auxiliary loss of the Switch Transformer and its successors.

        E * sum over experts of f_e P_e

    Over all layers with a router and the attended positions, f_e is how often an expert is among the chosen ones and
    P_e its mean probability. It is the number of experts for a token where the load is even. As in transformers it is a
    quantity of the batch; it is averaged over the batches of the optimiser step by their target tokens.

    References:
        Fedus et al. 2021 (Switch Transformer), arXiv 2101.03961, equations 4 to 6.
    """

    weight: Weight = 0.001
    name = "router_balance"
    needs_teacher: ClassVar[bool] = False
    reads_layers: ClassVar[bool] = True

    def fit(self, student: ModelShape, teacher: ModelShape) -> FittedTerm:
        if not student.experts_per_token:
            raise ShapeError(
                "RouterBalance: expected a student of a family that balances its experts by a loss, as Mixtral and "
                "Qwen3-MoE do, got one without. Leave the term out."
            )
        layers = frozenset(range(student.layers))
        return FittedTerm(partial(self.balance, student.experts_per_token), ActivationRequest(routers=layers))

    @staticmethod
    def balance(experts_per_token: int, signals: Signals) -> Tensor:
        """Compute the loss from the logits of all routers."""
        assert signals.attended is not None
        attended = signals.attended.flatten()
        layers = [logits[:, attended].flatten(0, 1).float() for logits in signals.inside.routers.values()]
        probabilities = torch.cat(layers).softmax(-1)
        tokens, experts = max(len(probabilities), 1), probabilities.shape[1]
        chosen = probabilities.topk(experts_per_token).indices.flatten().bincount(minlength=experts)
        return signals.batch_mean(experts * (chosen / tokens * probabilities.sum(0) / tokens).sum())


@dataclass(frozen=True)
class RouterMatch(LayerTerm):
    """Match the teacher's choice of experts, where both models are mixtures of as many experts.

    A mean over pairs of layers, their routers and the attended positions of KL(p || q), in nats, p and q the softmax of
    the teacher's and the student's router logits, [E] each.

    Args:
        layers: which teacher layer each student layer learns from; all of them have a router.
    """

    name = "router_match"
    activations = "routers"

    def check_heads(self, *models: ModelShape) -> None:
        """Check nothing: routers need no attention heads."""

    def compare(self, signals: Signals, student: Layer, teacher: Layer, trained: Any) -> Tensor:
        assert signals.teacher is not None
        assert signals.attended is not None
        sides = {"student": (signals.inside, student), "teacher": (signals.teacher.inside, teacher)}
        log_probs = []
        for whose, (inside, layer) in sides.items():
            if layer not in inside.routers:
                raise ShapeError(
                    f"RouterMatch: expected layers with a router, got layer {layer} of the {whose}, which has none. "
                    "Name pairs that have one with layers."
                )
            logits = inside.routers[int(layer)][:, signals.attended.flatten()]  # [R, A, E]
            log_probs.append(logits.float().log_softmax(-1))
        q, p = log_probs
        if q.shape != p.shape:
            got = f"{q.shape[-1]} in student layer {student} and {p.shape[-1]} in teacher layer {teacher}"
            raise ShapeError(f"RouterMatch: expected as many experts in both, got {got}. Leave the term out.")
        return signals.attended_mean((p.exp() * (p - q)).sum(-1).mean(0))
