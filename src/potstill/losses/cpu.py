"""Instructions of this CPU."""

from __future__ import annotations

from functools import cache

import torch


@cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16: AVX512-BF16 or AMX on x86, as PyTorch reports it."""
    return any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
