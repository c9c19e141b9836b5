"""The tail of a chunk on a CPU, compiled: tail.c with the divergence's own formula in it."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from potstill.losses.chunked import Chunk, Job, Tail
from potstill.losses.divergences import Divergence
from potstill.losses.tail import TorchTail
from potstill.losses.token import Row
from potstill.losses.trace import Program, program

FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")

OPERATIONS = {
    "add": "{} + {}",
    "sub": "{} - {}",
    "mul": "{} * {}",
    "div": "{} / {}",
    "neg": "-{}",
    "exp": "exponential({})",
    "log": "logarithm({})",
    "log1p": "log1p_any({})",
    "expm1": "expm1_any({})",
    "sqrt": "root({})",
    "abs": "absolute({})",
    "sign": "signum({})",
    "square": "{0} * {0}",
    "reciprocal": "1.0f / {}",
    "logaddexp": "log_add_exp({}, {})",
    "maximum": "larger({}, {})",
    "minimum": "smaller({}, {})",
    "where": "pick({}, {}, {})",
    "lt": "{} < {}",
    "gt": "{} > {}",
}


class NativeTail:
    """tail.c, compiled for one divergence."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._tail = _function(library, "tail", pointers=6, numbers=2)

    def buffer_dtype(self, products: torch.dtype) -> torch.dtype:
        """float32."""
        return torch.float32

    def __call__(self, chunk: Chunk, job: Job) -> tuple[Tensor | None, Tensor | None]:
        """See `Tail`."""
        divergence, cross_entropy = torch.empty(2, len(chunk.student)).unbind()
        labels = None if chunk.labels is None else chunk.labels.to(torch.int64).contiguous()
        scale = None if chunk.scale is None else chunk.scale.float().contiguous()
        rows = (chunk.student, chunk.teacher, scale, labels, divergence, cross_entropy)
        _each_row(self._tail, rows, job.temperature, job.label_weight)
        return (None if job.divergence is None else divergence, None if labels is None else cross_entropy)


@lru_cache(maxsize=256)
def native_tail(divergence: Divergence | None, sparse: bool) -> Tail | None:
    """The tail for a divergence (None: cross-entropy alone) and dense or sparse targets.

    None where there is no C compiler, or the formula is no elementary arithmetic.
    """
    steps = None if divergence is None or sparse else program(divergence)
    if steps is None and divergence is not None and not sparse:
        return None
    source = (Path(__file__).parent / "tail.c").read_text().replace("    POINTWISE", _pointwise(steps))
    path = _build(source)
    if path is None:
        return None
    library = ctypes.CDLL(str(path))
    if not sparse:
        return NativeTail(library)
    function = _function(library, "exponentials", pointers=3, numbers=0)

    def exponentials(logits: Tensor) -> Row:
        top, total = torch.empty(2, len(logits), 1).unbind()
        _each_row(function, (logits, top, total))
        return Row(top, total)

    return TorchTail(exponentials)


def _function(library: ctypes.CDLL, name: str, pointers: int, numbers: int) -> Any:
    function = library[name]
    function.restype = None
    function.argtypes = [ctypes.c_void_p] * pointers + [ctypes.c_long] * 3 + [ctypes.c_float] * numbers
    return function


def _each_row(function: Any, tensors: Sequence[Tensor | None], *numbers: float) -> None:
    """Call a function of tail.c on all rows, which the first tensor [C, V] has, by as many threads as torch uses."""
    C, V = tensors[0].shape  # type: ignore[union-attr]
    stride = tensors[0].stride(0)  # type: ignore[union-attr]

    def rows(start: int) -> None:
        pointers = [None if x is None else x[start:].data_ptr() for x in tensors]
        function(*pointers, min(step, C - start), V, stride, *numbers)

    threads = torch.get_num_threads()
    step = -(-C // (4 * threads)) if threads > 1 else C  # four pieces each: none waits long for the slowest
    starts = range(0, C, step)
    if len(starts) > 1:
        list(_pool(threads).map(rows, starts))
    else:
        rows(0)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="potstill-tail")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not live on in a fork


def _pointwise(steps: Program | None) -> str:
    """The body of the C function."""
    if steps is None:
        return "    *value = *slope = splat(0);"
    lines = []
    for step in steps.steps:
        operation = OPERATIONS[step.operation]
        if step.operation == "exp" and step.arguments[0] in ("log_q", "log_p"):
            operation = "exponential_below_88({})"
        whole = "(" in operation  # a function wants vectors, an operator takes a number too
        arguments = [_literal(x, whole) if isinstance(x, float) else x for x in step.arguments]
        kind = "vi" if step.operation in ("lt", "gt") else "vf"
        lines.append(f"    const {kind} {step.name} = {operation.format(*arguments)};")
    return "\n".join([*lines, f"    *value = {steps.value};", f"    *slope = {steps.slope};"])


def _literal(number: float, whole: bool) -> str:
    return f"splat({number!r}f)" if whole else f"({number!r}f)"


def _build(source: str) -> Path | None:
    """The shared library of a source; built once for each processor and compiler, and kept."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    key = hashlib.sha256("\n".join([source, compiler, *FLAGS, _processor()]).encode()).hexdigest()[:24]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "potstill"
    target = folder / f"tail-{key}.so"
    if target.exists():
        return target
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            code, built = Path(scratch) / "tail.c", Path(scratch) / "tail.so"
            code.write_text(source)
            subprocess.run(
                [*compiler.split(), *FLAGS, str(code), "-o", str(built), "-lm"], check=True, capture_output=True
            )
            built.replace(target)  # whole or not at all, whoever else builds it
    except (OSError, subprocess.CalledProcessError):
        return None
    return target


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {platform.processor()} {flags}"
