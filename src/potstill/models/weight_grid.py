"""Weights on the grid of a quantized file, bit for bit: blocks of 32 with a scale in half precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

BLOCK = 32
GridKind = Literal["q4_0", "q8_0", "f16"]


@dataclass(frozen=True)
class WeightGrid:
    """The values that a weight can have in a file, which holds it times `scale`, and transposed."""

    kind: GridKind
    scale: float = 1.0
    transposed: bool = False

    def round(self, weight: Tensor) -> Tensor:
        """Return the weight of the grid that the file has for a float32 weight."""
        stored = weight.T if self.transposed else weight
        rounded = _ROUND[self.kind](stored * self.scale) / self.scale
        return rounded.T if self.transposed else rounded


def _round_q4_0(weight: Tensor) -> Tensor:
    """Round to -8..7 times a scale, by which the entry of largest magnitude is -8."""
    blocks = weight.unflatten(-1, (-1, BLOCK))
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scale = largest / -8
    whole = (blocks * _inverse(scale) + 8.5).trunc().clamp(0, 15) - 8
    return (whole * scale.half().float()).flatten(-2)


def _round_q8_0(weight: Tensor) -> Tensor:
    """Round to -127..127 times a scale, halves away from zero."""
    blocks = weight.unflatten(-1, (-1, BLOCK))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    scaled = blocks * _inverse(scale)
    floored = scaled.abs().floor()
    whole = scaled.sign() * (floored + (2 * (scaled.abs() - floored)).floor())
    return (whole * scale.half().float()).flatten(-2)


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0.0, 1 / scale)


def _round_f16(weight: Tensor) -> Tensor:
    return weight.half().float()


_ROUND = {"q4_0": _round_q4_0, "q8_0": _round_q8_0, "f16": _round_f16}
