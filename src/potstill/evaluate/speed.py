"""How fast and how large a model is."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch


@torch.no_grad()
def latency_ms(model: Any, length: int, repeats: int = 15) -> float:
    """The median time of one forward pass over one row, in milliseconds.

    Args:
        model: a causal language model, in the precision and on the device where it is.
        length: tokens in the row.
        repeats: passes that are timed, after 3 that are not.
    """
    device = next(model.parameters()).device
    ids = torch.arange(length, device=device)[None] % model.config.vocab_size
    model.eval()
    times = []
    for _ in range(3 + repeats):
        start = time.perf_counter()
        model(input_ids=ids, use_cache=False)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[3:])


def weight_bytes(folder: Path) -> int:
    """What a saved model's weights take on disk."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
