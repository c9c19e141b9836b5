"""Whether a model keeps the rows apart that are packed side by side, tried on a few tokens before the training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from potstill.errors import one_line
from potstill.losses.alignment import align
from potstill.models.packing import PACKED_LENGTH
from potstill.models.shapes import text_config
from potstill.models.split import SplitModel, forward_targets, undisturbed

ROWS = (6, 1, 4, 5)  # tokens of the rows that are packed: three in a packed row, one with padding behind it
PROBE_LENGTH = sum(ROWS[:-1])
CHANGED_ROWS = 2  # the first rows, whose tokens must not matter to the others
# Relative differences that are rounding: of 30 layers 6e-7 in float32, and 0.05 in bfloat16 with units of 0.008.
TOLERANCE, ROUNDING_UNITS = 1e-5, 20
NOISE_FACTOR = 4  # experts and int8 compute a row with roundings that depend on the batch, padded rows too


def packing_mistake(model: nn.Module, split: SplitModel | None, length: int) -> str | None:
    """Say why a model cannot read rows packed into longer ones of `length` tokens; None where it can.

    Models that carry a state along a row, or whose attention does not look at position_ids, let one row see another.
    """
    name = type(model).__name__
    adapters = [*getattr(model, "peft_config", {}).values()]
    if any(getattr(adapter, "num_virtual_tokens", None) for adapter in adapters):
        return f"{name}, whose adapter puts virtual tokens in front of a whole packed row"
    if any(getattr(adapter, "alora_invocation_tokens", None) for adapter in adapters):
        return f"{name}, whose adapter is switched on once for a whole packed row"
    config: Any = text_config(model.config)
    if getattr(config, "attn_temperature_tuning", False) and length >= (
        scale := getattr(config, "floor_scale", length)
    ):
        return f"{name}, which scales attention by the place in a packed row from {scale} tokens on"
    try:
        difference = _difference(model, split, max(map(_eps, model.parameters())))
    except Exception as error:
        return f"{name}, which fails on packed rows: {one_line(error, 100)}"
    if difference:
        return f"{name}, whose predictions for a row change by {100 * difference:.2g}% with the rows beside it"
    return None


def _eps(weight: Tensor) -> float:
    """The unit of rounding of what is computed with a weight: of a quantized one that of bfloat16."""
    return torch.finfo(weight.dtype if weight.is_floating_point() else torch.bfloat16).eps


def _difference(model: Any, split: SplitModel | None, eps: float) -> float:
    """The largest relative difference of a row's logits between packed and padded rows; 0 where it is rounding.

    In half precision a row that sees others may change by less than by rounding. There packed rows are compared with
    packed rows of the same lengths beside other ones, which are computed alike to the last bit.
    """
    embeddings = model.get_input_embeddings().weight
    ids = (3 + 5 * torch.arange(sum(ROWS), device=embeddings.device) % 37) % len(embeddings)
    others = ids.clone()
    others[: sum(ROWS[:CHANGED_ROWS])] = (ids[: sum(ROWS[:CHANGED_ROWS])] + 1) % len(embeddings)
    with undisturbed(model):
        padded, packed = (_logits(model, split, ids, packed) for packed in (False, True))
        difference = _largest(packed, padded)
        if not difference <= max(TOLERANCE, ROUNDING_UNITS * eps):
            return difference
        if ROUNDING_UNITS * eps <= TOLERANCE:
            return 0.0
        leak = _largest(packed[CHANGED_ROWS:], _logits(model, split, others, True)[CHANGED_ROWS:])
        if leak <= TOLERANCE:
            return 0.0
        noise = _largest(padded[CHANGED_ROWS:], _logits(model, split, others, False)[CHANGED_ROWS:])
        return 0.0 if leak <= NOISE_FACTOR * noise else leak


def _logits(model: Any, split: SplitModel | None, ids: Tensor, packed: bool) -> tuple[Tensor, ...]:
    """The logits of each of the probe's rows."""
    rows = ids.split(ROWS)
    batch = {
        "input_ids": pad_sequence(rows, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
    }
    if packed:
        batch[PACKED_LENGTH] = torch.tensor(PROBE_LENGTH)
    tokens = align(pad_sequence(rows, batch_first=True, padding_value=-100), "masked")  # predictions behind each token
    return forward_targets(model, split, batch, tokens).dense().double().cpu().split(ROWS)


def _largest(logits: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """The largest relative difference of a row's logits."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(logits, expected, strict=True))
