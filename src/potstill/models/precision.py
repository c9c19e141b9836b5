"""The precision in which a model's weights are saved."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import torch
from safetensors import safe_open

from potstill.models.locate import weight_files

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def saved_dtype(folder: Path) -> torch.dtype | None:
    """The precision of most of a saved model's weights that are not quantized; None without weights."""
    sizes: Counter[torch.dtype] = Counter()
    for file in weight_files(folder):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118  # it is no mapping
                part = weights.get_slice(name)
                if part.get_dtype() in DTYPES:
                    sizes[DTYPES[part.get_dtype()]] += math.prod(part.get_shape())
    return max(sizes, key=sizes.__getitem__, default=None)
