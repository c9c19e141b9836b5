"""Weights on the grid of a quantized file, bit for bit: blocks of 32 with a scale each, for GGUF in half precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

BLOCK = 32
GridKind = Literal["q4_0", "q8_0", "f16", "int8", "int4"]  # int8 and int4 are those of onnxruntime


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


def _round_int(weight: Tensor, lowest: int) -> Tensor:
    """Round to lowest..-lowest - 1 times a float32 scale, by which the entry of largest magnitude is `lowest`."""
    width = weight.shape[-1]
    blocks = nn.functional.pad(weight, (0, -width % BLOCK)).unflatten(-1, (-1, BLOCK))
    high, low = blocks.amax(-1, keepdim=True), blocks.amin(-1, keepdim=True)
    scale = torch.where(high.abs() > low.abs(), high, low) / lowest
    whole = (blocks * _inverse(scale) - lowest + 0.5).floor().clamp(0, -2 * lowest - 1) + lowest
    return (whole * scale).flatten(-2)[..., :width]


def _inverse(scale: Tensor) -> Tensor:
    inverse = 1 / scale  # infinite below 3e-39 too, where a file has the scale 0
    return torch.where(inverse.isfinite(), inverse, 0.0)


def _round_f16(weight: Tensor) -> Tensor:
    return weight.half().float()


_ROUND: dict[GridKind, Callable[[Tensor], Tensor]] = {
    "q4_0": _round_q4_0,
    "q8_0": _round_q8_0,
    "f16": _round_f16,
    "int8": partial(_round_int, lowest=-128),
    "int4": partial(_round_int, lowest=-8),
}
