"""Latency, throughput, memory and size of a model."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from potstill.models.locate import weight_files

WARM_UPS = 3
NEW_TOKENS = 8  # generated to time one


@dataclass(frozen=True)
class Speed:
    """Medians for one batch size and length."""

    rows: int  # batch size
    length: int  # tokens in each row
    latency_ms: float  # one forward pass over the batch
    tokens_per_second: float  # rows * length in that time
    first_token_ms: float | None  # time to the first new token of each row, after prompts of `length` tokens
    # each further token of all rows, with a cache; both None for a model that does not generate
    next_token_ms: float | None
    peak_bytes: int | None  # weights plus peak memory of a forward pass; None where that cannot be measured


@torch.no_grad()
def latency_ms(model: Any, length: int, repeats: int = 15, rows: int = 1) -> float:
    """Measure the median time of one forward pass over `rows` of `length` tokens, after 3 warm-up passes."""
    ids = _ids(model, rows, length)
    return _median_ms(lambda: model(input_ids=ids, use_cache=False), ids.device, repeats)


def speed(model: Any, rows: int, length: int, repeats: int = 5, *, generates: bool = True) -> Speed:
    """Time a model on one batch; arguments as `latency_ms`, and whether it is a causal model that generates text."""
    ids = _ids(model, rows, length)
    with torch.no_grad():
        extra = extra_bytes(lambda: model(input_ids=ids, use_cache=False), ids.device)
    latency = latency_ms(model, length, repeats, rows)

    def generation_ms(new: int) -> float:
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        mask = torch.ones_like(ids)
        return _median_ms(lambda: model.generate(ids, attention_mask=mask, **options), ids.device, repeats)

    first_ms = next_ms = None
    if generates:
        first_ms = generation_ms(1)
        next_ms = max(generation_ms(1 + NEW_TOKENS) - first_ms, 0.0) / NEW_TOKENS
    peak = None if extra is None else model.get_memory_footprint() + extra
    return Speed(rows, length, latency, 1000 * rows * length / latency, first_ms, next_ms, peak)


def extra_bytes(action: Callable[[], Any], device: torch.device) -> int | None:
    """Measure the peak memory of an action beyond what is allocated before it.

    On CUDA from torch's allocator; on Linux from the kernel's count for the process, to the page; else None.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        action()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # return freed memory, which would otherwise be reused without being counted
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
        before = _kernel_bytes("VmRSS")
        action()
        return max(_kernel_bytes("VmHWM") - before, 0)
    except (OSError, AttributeError):
        return None


def _kernel_bytes(name: str) -> int:
    """A line of /proc/self/status, which is in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def _ids(model: Any, rows: int, length: int) -> Tensor:
    """Arbitrary tokens for a model, which is put into evaluation mode."""
    device = next(model.eval().parameters()).device
    return (torch.arange(rows * length, device=device) % model.config.vocab_size).view(rows, length)


def _median_ms(action: Callable[[], Any], device: torch.device, repeats: int) -> float:
    times = []
    for _ in range(WARM_UPS + repeats):
        start = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[WARM_UPS:])


def bytes_on_disk(folder: Path, model: Any) -> int:
    """Size of a saved model, including an adapter's base; in memory if the weights are not on this disk."""
    adapter = getattr(model, "active_peft_config", None)
    own = 0 if adapter is None else weight_bytes(folder)
    base = folder if adapter is None else Path(adapter.base_model_name_or_path)
    return own + (weight_bytes(base) or int(model.get_memory_footprint()))


def weight_bytes(path: Path) -> int:
    """Size of a model's weights on this disk; 0 if there are none."""
    return sum(file.stat().st_size for file in weight_files(path))
