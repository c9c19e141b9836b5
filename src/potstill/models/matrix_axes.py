"""Rows and columns of a teacher's weight matrices that those of a student's layer are made of."""

from __future__ import annotations

import torch
from torch import Tensor

from potstill.models.feed_forward import Mixture
from potstill.models.pruning import SelectedParts
from potstill.models.shapes import DesignShape
from potstill.models.structure import LayerMatrices, LayerStructure


def matrix_axes(
    structure: LayerStructure | Mixture, parts: SelectedParts, layer: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """By matrix of a student's layer, the teacher's rows [out, m], averaged over m, and columns [in]."""
    matrices = structure.attention if isinstance(structure, Mixture) else structure.matrices
    assert matrices is not None, "heads are selected"
    shape, channels = structure.shape, parts.channels
    heads, kv_heads, units = parts.heads[layer].unsqueeze(1), parts.kv_heads[layer], parts.units[layer]
    queries, keys = _head_rows(heads, shape.head_size), _head_rows(kv_heads, shape.head_size)
    axes = {
        **dict.fromkeys((matrices.key, matrices.value), (keys, channels)),
        matrices.query: (queries, channels),
        matrices.output: (channels.unsqueeze(1), queries.squeeze(1)),
    }
    if isinstance(matrices, LayerMatrices):
        of_units = torch.cat([units, units + shape.ffn]) if matrices.fused_gate else units
        axes |= dict.fromkeys(matrices.up, (of_units.unsqueeze(1), channels))
        axes[matrices.down] = channels.unsqueeze(1), units
    if matrices.fused:
        axes[matrices.query] = (
            _head_rows(fused_heads(heads, kv_heads, shape, matrices.grouped), shape.head_size),
            channels,
        )
    return axes


def fused_heads(heads: Tensor, kv_heads: Tensor, teacher: DesignShape, grouped: bool) -> Tensor:
    """The teacher's places [n, m] of a student's query heads [A, 1], keys and values [K, m] in one fused module."""
    queries = heads.expand(-1, kv_heads.shape[1])
    if not grouped:
        return torch.cat([queries, teacher.heads + kv_heads, teacher.heads + teacher.kv_heads + kv_heads])
    group = teacher.heads // teacher.kv_heads
    queries = queries // group * (group + 2) + queries % group
    keys = (kv_heads * (group + 2) + group).unsqueeze(1)
    return torch.cat([queries.unflatten(0, (len(kv_heads), -1)), keys, keys + 1], dim=1).flatten(0, 1)


def _head_rows(heads: Tensor, size: int) -> Tensor:
    """The rows [n * size, m] of heads [n, m]."""
    return (heads.unsqueeze(1) * size + torch.arange(size)[None, :, None]).flatten(0, 1)
