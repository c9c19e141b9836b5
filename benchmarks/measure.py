"""What the benchmarks share: new processes, the clock, peak memory, trainings, checks against float64, tables."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from potstill.errors import PotstillError
from potstill.losses.divergences import AlphaBeta, Divergence
from potstill.losses.fused_linear import linear_divergence
from potstill.losses.targets import DenseTargets, HeadTargets, LMHead, SparseTargets, Targets

T = TypeVar("T")

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
LIMITS = {"float32": 2e-5, "bf16": 2e-2}  # of the relative errors in the checks
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def fresh(task: Callable[..., T], *arguments: Any) -> T:
    """The task's result from a new process, which shares no memory, caches or peaks with another one.

    Raises:
        BrokenProcessPool: the system killed it, as it does where memory ends.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(task, *arguments).result()


def backends(device: str) -> tuple[str, ...]:
    """The backends that are measured, "ours" first; where Triton interprets its kernels, as on a GPU."""
    return ("triton", "chunked") if device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1" else ("auto",)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(call: Callable[[], Any], device: str) -> float:
    """The time of one call, to the end of its last kernel.

    On a CPU with one thread the processor's time, which is the call's own on a busy machine too; else the clock's.
    """
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    synchronize(device)
    start = clock()
    call()
    synchronize(device)
    return clock() - start


def train(
    student: Any, teacher: Any, objective: list[Any], rows: Any, settings: dict[str, Any], **options: Any
) -> float:
    """Train a student in place, and keep nothing on disk; the processor's seconds that it took.

    The settings are those of `DistillationConfig`, the options those of `DistillationTrainer`.
    """
    from transformers import PrinterCallback  # here, as the losses are measured where there is torch alone

    from potstill import DistillationConfig, DistillationTrainer

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        arguments = DistillationConfig(output_dir=folder, save_strategy="no", disable_tqdm=True, **settings)
        trainer = DistillationTrainer(student, teacher, objective, arguments, rows, **options)
        trainer.remove_callback(PrinterCallback)
        start = time.process_time()
        trainer.train()
        return time.process_time() - start


def steps(distiller: Any, batches: Sequence[Any], device: str, *, skipped: int, bf16: bool = False) -> dict[str, Any]:
    """Train by a loop over `Distiller.step`, with AdamW: the median step after the first ones, peaks and losses.

    Under autocast with `bf16`. A distiller that prefetches is given the next batch before each step.
    """
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-4)
    peak, times, losses = Peak(device), [], []
    for number, batch in enumerate(batches):

        def step(number: int = number, batch: Any = batch) -> None:
            distiller.prefetch(batches[number : number + 2])
            with torch.autocast(device, torch.bfloat16, enabled=bf16):
                loss = distiller.step(batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())

        times.append(seconds(step, device))
    distiller.prefetch(())
    return {
        "seconds": statistics.median(times[skipped:]),
        "peak_bytes": peak.bytes(),
        "extra_bytes": peak.extra(),
        "losses": [float(loss) for loss in losses],
    }


class Peak:
    """The most bytes in use since this was made, and what was in use then.

    On CUDA what torch's tensors take. On a CPU the memory of the whole process that the kernel counts (VmHWM, reset
    through /proc/self/clear_refs), libraries' own buffers included; None where the kernel does not count it.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        gc.collect()
        self.start: int | None
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
        else:
            self.start = _resident() if _reset_peak() else None

    def bytes(self) -> int | None:
        """The most since then, all that was there before included."""
        if self.device == "cuda":
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated()
        return None if self.start is None else _status("VmHWM")

    def extra(self) -> int | None:
        """The most since then, above what was in use then."""
        peak = self.bytes()
        return None if peak is None or self.start is None else peak - self.start


def _status(key: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024


def own_bytes() -> int:
    """The memory of this process without the pages of mapped files, which the system takes back when it needs them."""
    return _status("RssAnon")


def _resident() -> int:
    return _status("VmRSS")


def _reset_peak() -> bool:
    """Whether the kernel counts the peak anew from here. What was freed goes back to it first."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        CLEAR.write_text("5")
    except (OSError, AttributeError):
        return False
    return _status("VmHWM") - _resident() < 2**20


def _cpu() -> tuple[str, set[str]]:
    """The processor's name and its flags, lower case; both empty where /proc/cpuinfo does not say."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    facts = {key.strip().lower(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return facts.get("model name", ""), set((facts.get("flags") or facts.get("features") or "").lower().split())


def has_bf16(device: str) -> bool:
    """Whether bf16 products have instructions of their own."""
    if device == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    return bool(_cpu()[1] & {"amx_bf16", "avx512_bf16", "bf16"})


def machine(device: str) -> dict[str, str]:
    """What figures depend on."""
    name, flags = _cpu()
    has = [text for flag, text in (("avx512f", "AVX-512"), ("avx512_bf16", "AVX-512 bf16")) if flag in flags]
    has += ["AMX bf16"] if "amx_bf16" in flags else []
    facts = {
        "cpu": f"{name or platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads, {' and '.join(has) or 'neither AVX-512 nor bf16 instructions'}"
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts["gpu"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    packages = ("torch", "triton", "transformers", "trl", "liger-kernel")
    facts["software"] = f"Python {platform.python_version()}, " + ", ".join(
        f"{package} {found}" for package in packages if (found := installed(package))
    )
    return facts


def installed(package: str) -> str | None:
    """Its version, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def spread(values: Sequence[float]) -> str:
    """The mean over seeds, and how far they are from each other."""
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def keep(path: Path | None, result: dict[str, Any]) -> None:
    """Write the result as JSON, if a path was given. Called after every row: an interruption costs one."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")


class Record:
    """What was measured, a line of JSON for each, written as soon as it is measured."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def has(self, **keys: Any) -> bool:
        return any(keys.items() <= line.items() for line in self.lines)

    def add(self, **line: Any) -> None:
        self.lines.append(line)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(line, flush=True)


def ms(spent: float | str, by: float | None = None) -> str:
    return spent if isinstance(spent, str) else f"{spent * 1e3:,.1f}" + (f" ({spent / by:.2f})" if by else "")


def mb(extra: int | str | None) -> str:
    return extra if isinstance(extra, str) else "not measured" if extra is None else f"{extra / 2**20:,.1f}"


def attempt(call: Callable[..., T], *arguments: Any) -> T | str:
    """What the call gives; or "none" where a backend cannot do it, "no C compiler" where Triton has none, or "out of
    memory".
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*has no Triton kernel")  # another backend would be measured
            return call(*arguments)
    except torch.OutOfMemoryError:
        pass
    except RuntimeError as error:
        if "C compiler" not in str(error):
            raise
        return "no C compiler"
    except (PotstillError, UserWarning) as error:
        if not any(word in str(error) for word in ("expected backend", 'backend "triton"', "no Triton kernel")):
            raise
        return "none"
    torch.cuda.empty_cache()
    return "out of memory"


def distance(got: Tensor, to: Tensor) -> float:
    """||got - to|| / ||to||, a piece at a time: these are large."""
    pieces = zip(got.split(4096), to.split(4096), strict=True)
    return math.sqrt(sum(float((a.to(b) - b).square().sum()) for a, b in pieces)) / float(to.norm())


# Every divergence against float64 on small inputs.


def checks(device: str, kinds: Iterable[str] = Divergence.kinds, tokens: int = 300) -> list[dict[str, Any]]:
    """The worst relative errors of loss and gradients, by dtype, targets and backend.

    In bf16 some gradients are worse than any fixed limit (total variation jumps where p = q): there they may be no
    worse than those of the eager backend in the same dtype.
    """
    numbers = {"alpha_beta": AlphaBeta(0.5, 0.7)}
    lines = []
    for dtype, kind in product(LIMITS, ("head", "dense", "sparse")):
        far: dict[str, list[tuple[float, float, str]]] = {backend: [] for backend in backends(device)}
        for name, more in product(kinds, (False, True)):
            divergence = numbers.get(name) or Divergence.kinds[name]()
            true = small(divergence, kind, more, dtype, "cpu", "eager", torch.float64, tokens)
            eager = furthest(small(divergence, kind, more, dtype, "cpu", "eager", None, tokens), true)
            for backend, found in far.items():
                got = attempt(small, divergence, kind, more, dtype, device, backend, None, tokens)
                if not isinstance(got, str):
                    found.append((furthest(got, true), eager, name + ", with everything" * more))
        for backend, found in far.items():
            worst, eager, where = max(found, default=(math.nan, math.nan, "does not run"))
            ok = all(error <= max(LIMITS[dtype], 1.2 * usual) for error, usual, _ in found)
            line = {"backend": backend, "dtype": dtype, "targets": kind, "worst": worst, "where": where}
            lines.append(line | {"eager": eager, "ok": ("yes" if ok else "NO") if found else "-"})
    return lines


def furthest(got: list[Tensor], true: list[Tensor]) -> float:
    return max(distance(a.cpu().flatten(), b.flatten()) for a, b in zip(got, true, strict=True))


def small(
    divergence: Divergence,
    kind: str,
    more: bool,
    dtype: str,
    device: str,
    backend: Any,
    wide: Any = None,
    N: int = 300,
) -> list[Tensor]:
    """Loss and gradients of small inputs, rounded to dtype and computed in `wide`.

    `more` is all that a head and a loss can have: padding, bias, scale, soft cap; temperature, weights, labels.
    """
    torch.manual_seed(1)
    H, V, temperature = 64, 1003, 2.0 if more else 1.0

    def draw(scale: float, *shape: int) -> Tensor:
        return (torch.randn(*shape) * scale).to(DTYPES[dtype]).to(device, wide)

    leaves = [x.requires_grad_() for x in (draw(1, N, H), draw(0.3, V + 5, H), draw(1, V + 5))]
    head = LMHead(leaves[1], leaves[2], logit_scale=0.7, softcap=8.0, size=V) if more else LMHead(leaves[1], size=V)
    targets: Targets = HeadTargets(draw(1, N, 96), LMHead(draw(0.2, V, 96)))
    log_probs, ids = torch.log_softmax(torch.randn(N, V) * 2, -1).topk(16)
    if kind == "dense":
        targets = DenseTargets(draw(2, N, V))
    elif kind == "sparse":
        targets = SparseTargets(ids.to(device), log_probs.to(device, wide), temperature=temperature)
    options: dict[str, Any] = {"temperature": temperature, "backend": backend}
    weights, labels = torch.rand(N), torch.randint(V, (N,)).masked_fill_(torch.rand(N) < 0.1, -100)
    if more:
        options |= {"token_weights": weights.to(device), "labels": labels.to(device), "label_weight": 0.5}
    loss = linear_divergence(leaves[0], head, targets, divergence, **options).loss
    loss.backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]
