"""Whether a model keeps the rows apart that are packed side by side, tried on a few tokens before the training."""

from __future__ import annotations

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
# Relative differences that are rounding: of 30 layers 6e-7 in float32, and 0.05 in bfloat16 with units of 0.008.
TOLERANCE, ROUNDING_UNITS = 1e-5, 20


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
        difference = _difference(model, split)
    except Exception as error:
        return f"{name}, which fails on packed rows: {one_line(error, 100)}"
    if not difference <= max(TOLERANCE, ROUNDING_UNITS * max(map(_eps, model.parameters()))):
        return f"{name}, whose predictions for a row change by {100 * difference:.2g}% with the rows beside it"
    return None


def _eps(weight: Tensor) -> float:
    """The unit of rounding of what is computed with a weight: of a quantized one that of bfloat16."""
    return torch.finfo(weight.dtype if weight.is_floating_point() else torch.bfloat16).eps


def _difference(model: Any, split: SplitModel | None) -> float:
    """The largest relative difference of a row's logits between packed and padded rows."""
    embeddings = model.get_input_embeddings().weight
    ids = (3 + 5 * torch.arange(sum(ROWS), device=embeddings.device) % 37) % len(embeddings)
    rows = ids.split(ROWS)
    batch = {
        "input_ids": pad_sequence(rows, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
    }
    tokens = align(pad_sequence(rows, batch_first=True, padding_value=-100), "masked")  # predictions behind each token

    def logits(of: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return forward_targets(model, split, of, tokens).dense().double().cpu().split(ROWS)

    with undisturbed(model):
        pairs = zip(logits(batch), logits({**batch, PACKED_LENGTH: torch.tensor(PROBE_LENGTH)}), strict=True)
        return max(float((packed - padded).norm() / padded.norm()) for padded, packed in pairs)
