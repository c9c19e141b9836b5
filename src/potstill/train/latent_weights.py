"""Quantization-aware training: the student computes with weights on a grid, and latent ones beside them are trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from potstill.errors import UserError
from potstill.models.weight_grid import WeightGrid

LATENT = "latent.safetensors"  # in a checkpoint: the weights before rounding


class LatentWeights(TrainerCallback):
    """The weights that a training updates; those of the student are always these, rounded to their grids.

    They change places for the moment of an optimiser step: it applies the gradient at the rounded weights to the latent
    ones, which is the straight-through estimator (Bengio et al. 2013, arXiv 1308.3432).

    Args:
        grids: by the name of a weight of the student; shared weights under the first of their names.
    """

    def __init__(self, student: nn.Module, grids: Mapping[str, WeightGrid]) -> None:
        parameters = dict(student.named_parameters())
        self._grids = grids
        self._parameters = {name: parameters[name] for name in grids}
        for name, parameter in self._parameters.items():
            if parameter.dtype != torch.float32:
                raise UserError(f"grids: expected a student in float32, got {parameter.dtype} in {name}. Convert it.")
        self._latent = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self._round()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, parameter in self._parameters.items():
            parameter.data.copy_(self._latent[name])

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, parameter in self._parameters.items():
            self._latent[name] = self._latent[name].to(parameter.device).copy_(parameter.detach())
        self._round()

    def state_dict(self) -> dict[str, Tensor]:
        return self._latent

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for name, weight in state.items():
            self._latent[name].copy_(weight)
        self._round()

    def _round(self) -> None:
        for name, parameter in self._parameters.items():
            parameter.data.copy_(self._grids[name].round(self._latent[name]))
