"""Latency, throughput, memory and size of a model."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import PretrainedConfig

from potstill.evaluate.time_limit import TimeLimit
from potstill.models.locate import weight_files
from potstill.models.size import build

WARM_UPS = 3
PASSES = 15  # that are timed, of each model
NEW_TOKENS = 8  # generated to time one

_TIMED: dict[tuple[str, int], float] = {}  # seconds of a config's model: one answer for all that asks in a process


@dataclass(frozen=True)
class Latency:
    """Times of forward passes: their median, and the quarters below and above which a quarter of them is."""

    median_ms: float
    low_ms: float
    high_ms: float
    passes: int


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


def latencies(
    models: Mapping[str, Any], length: int, *, repeats: int = PASSES, rows: int = 1, limit: TimeLimit | None = None
) -> dict[str, Latency]:
    """Time forward passes over `rows` of `length` tokens, after 3 warm-up passes.

    The models take turns (A B A B), so that other work of the machine slows all of them down. Where the time limit ends
    it early there are fewer warm-up and timed passes, at least one of each.
    """
    passes: dict[str, Callable[[], Any]] = {}
    for name, model in models.items():
        ids = _ids(model, rows, length)
        passes[name] = _awaited(partial(model, input_ids=ids, use_cache=False), ids.device)
    times = _times_in_turn(passes, repeats, limit or TimeLimit())
    return {name: _latency(values) for name, values in times.items()}


def latency_ms(model: Any, length: int, repeats: int = PASSES, rows: int = 1) -> float:
    """Measure the median time of one forward pass of one model; see `latencies`."""
    return latencies({"": model}, length, repeats=repeats, rows=rows)[""].median_ms


def forward_seconds(config: PretrainedConfig, tokens: int) -> float:
    """Time a forward pass of a config's model, with random weights, over one row; each config once in a process."""
    key = config.to_json_string(), tokens
    if key not in _TIMED:
        _TIMED[key] = latency_ms(build(config).to(PartialState().device), tokens, repeats=3) / 1000
    return _TIMED[key]


def speed(
    model: Any, rows: int, length: int, repeats: int = 5, *, generates: bool = True, limit: TimeLimit | None = None
) -> Speed:
    """Time a model on one batch; arguments as `latencies`, and whether it is a causal model that generates text."""
    ids, limit = _ids(model, rows, length), limit or TimeLimit()
    with torch.no_grad():
        extra = extra_bytes(lambda: model(input_ids=ids, use_cache=False), ids.device)
    latency = latencies({"": model}, length, repeats=repeats, rows=rows, limit=limit.share(0.3))[""].median_ms

    def generation(new: int) -> Callable[[], None]:
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        return _awaited(partial(model.generate, ids, attention_mask=torch.ones_like(ids), **options), ids.device)

    first_ms = next_ms = None
    if generates:  # in turn: on a busy machine one of both would have the slow moments
        times = _times_in_turn({"one": generation(1), "more": generation(1 + NEW_TOKENS)}, repeats, limit)
        first_ms = statistics.median(times["one"])
        further = [more - one for one, more in zip(times["one"], times["more"], strict=True)]
        next_ms = max(statistics.median(further), 0.0) / NEW_TOKENS
    peak = None if extra is None else model.get_memory_footprint() + extra
    return Speed(rows, length, latency, 1000 * rows * length / latency, first_ms, next_ms, peak)


def extra_bytes(action: Callable[[], Any], device: torch.device) -> int | None:
    """Measure the peak memory of an action beyond what is allocated before it.

    On CUDA from torch's allocator; on a CPU under Linux from the kernel's count for the process, to the page; else None
    (Metal's allocator keeps no peak).
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        action()
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        return None
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
    """Rows of arbitrary tokens for a model, which is put into evaluation mode.

    None is padding, as there is no mask for it. All rows are the same: some heads want as many end tokens in each.
    """
    device = next(model.eval().parameters()).device
    vocabulary = model.get_input_embeddings().weight.shape[0]  # configs of several models have no vocab_size
    ids = torch.arange(length, device=device) % vocabulary
    padding = getattr(model.config, "pad_token_id", None)
    if padding is not None:
        ids = ids.where(ids != padding, (ids + 1) % vocabulary)
    return ids.repeat(rows, 1)


def _awaited(action: Callable[[], Any], device: torch.device) -> Callable[[], None]:
    """Run an action to its end: a GPU works on while Python goes on."""

    def run() -> None:
        action()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    return run


@torch.no_grad()
def _times_in_turn(actions: Mapping[str, Callable[[], Any]], repeats: int, limit: TimeLimit) -> dict[str, list[float]]:
    """Milliseconds of each action in each of `repeats` rounds after the warm-up."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(WARM_UPS + repeats):
        if number > 1 and limit.over:
            break
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: values[min(WARM_UPS, len(values) // 2) :] for name, values in times.items()}


def _latency(times: list[float]) -> Latency:
    quarters = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else 3 * times
    return Latency(quarters[1], quarters[0], quarters[2], len(times))


def bytes_on_disk(folder: Path, model: Any) -> int:
    """Size of a saved model, including an adapter's base; in memory if the weights are not on this disk."""
    adapter = getattr(model, "active_peft_config", None)
    own = 0 if adapter is None else weight_bytes(folder)
    base = folder if adapter is None else Path(adapter.base_model_name_or_path)
    return own + (weight_bytes(base) or int(model.get_memory_footprint()))


def weight_bytes(path: Path) -> int:
    """Size of a model's weights on this disk; 0 if there are none."""
    return sum(file.stat().st_size for file in weight_files(path))
