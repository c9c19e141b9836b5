"""How fast and how large a model is."""

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

WARM_UPS = 3
NEW_TOKENS = 8  # that are generated to time one


@dataclass(frozen=True)
class Speed:
    """Medians for one batch size and length.

    Args:
        rows: in the batch.
        length: tokens in each row.
        latency_ms: one forward pass over the batch.
        tokens_per_second: rows * length in that time.
        first_token_ms: from prompts of `length` tokens to the first new token of each row.
        next_token_ms: each further token of all rows, with a cache; both None for a model that writes no text.
        peak_bytes: the weights, and what a forward pass takes beside them; None where that cannot be seen.
    """

    rows: int
    length: int
    latency_ms: float
    tokens_per_second: float
    first_token_ms: float | None
    next_token_ms: float | None
    peak_bytes: int | None


@torch.no_grad()
def latency_ms(model: Any, length: int, repeats: int = 15, rows: int = 1) -> float:
    """The median time of one forward pass, in milliseconds.

    Args:
        model: a language model, in the precision and on the device where it is.
        length: tokens in each row.
        repeats: passes that are timed, after 3 that are not.
        rows: in the batch.
    """
    ids = _ids(model, rows, length)
    model.eval()
    return _median_ms(lambda: model(input_ids=ids, use_cache=False), ids.device, repeats)


def speed(model: Any, rows: int, length: int, repeats: int = 5, *, writes: bool = True) -> Speed:
    """Time a model on one batch; arguments as `latency_ms`, and whether it is a causal one, which writes text."""
    ids = _ids(model, rows, length)
    model.eval()
    with torch.no_grad():
        beside = extra_bytes(lambda: model(input_ids=ids, use_cache=False), ids.device)
    latency = latency_ms(model, length, repeats, rows)

    def generate(new: int) -> Callable[[], Any]:
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        return lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **options)

    first = further = None
    if writes:
        first = _median_ms(generate(1), ids.device, repeats)
        whole = _median_ms(generate(1 + NEW_TOKENS), ids.device, repeats)
        further = max(whole - first, 0.0) / NEW_TOKENS
    return Speed(
        rows=rows,
        length=length,
        latency_ms=latency,
        tokens_per_second=1000 * rows * length / latency,
        first_token_ms=first,
        next_token_ms=further,
        peak_bytes=None if beside is None else model.get_memory_footprint() + beside,
    )


def extra_bytes(action: Callable[[], Any], device: torch.device) -> int | None:
    """The most memory that an action takes beside what is held before it.

    On CUDA what torch's tensors take; on Linux what the kernel counts for the process, to the page; else None.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        action()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back first, else it is used again unseen
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is held now
        held = _kernel_bytes("VmRSS")
        action()
        return max(_kernel_bytes("VmHWM") - held, 0)
    except (OSError, AttributeError):
        return None


def _kernel_bytes(name: str) -> int:
    """A line of /proc/self/status, which is in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def _ids(model: Any, rows: int, length: int) -> Tensor:
    device = next(model.parameters()).device
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
    """What a saved model takes, an adapter with its base; in memory where the weights are on no disk here."""
    own = weight_bytes(folder)
    adapter = getattr(model, "active_peft_config", None)
    if adapter is None:
        return own or int(model.get_memory_footprint())
    return own + (weight_bytes(Path(adapter.base_model_name_or_path)) or int(model.get_memory_footprint()))


def weight_bytes(folder: Path) -> int:
    """What a saved model's weights take on disk."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
