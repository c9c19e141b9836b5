"""Loss kernel for the CPU: kernel_native.c, compiled with the divergence's own formula."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from potstill.losses.divergences import Divergence
from potstill.losses.fused_chunks import ChunkBuffers, FusedInputs, LossKernel
from potstill.losses.kernel_formula import OPERATORS, Formula, trace_formula
from potstill.losses.kernel_torch import TorchKernel

FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")


class NativeKernel(LossKernel):
    def __init__(self, library: ctypes.CDLL) -> None:
        self._on_rows = _function_on_rows(library, "loss_and_gradient", pointers=6, numbers=2)

    def __call__(self, chunk: ChunkBuffers, inputs: FusedInputs) -> None:
        self._on_rows(chunk[:6], inputs.temperature, inputs.label_weight)


@lru_cache(maxsize=256)
def native_kernel(divergence: Divergence | None, sparse: bool) -> LossKernel | None:
    """Compile kernel_native.c; None without a C compiler, or for a formula that is more than elementary arithmetic."""
    formula = None if divergence is None or sparse else trace_formula(divergence)
    if formula is None and divergence is not None and not sparse:
        return None
    path = _build(Path(__file__).with_suffix(".c").read_text().replace("    POINTWISE", _c_formula(formula)))
    if path is None:
        return None
    library = ctypes.CDLL(str(path))
    if not sparse:
        return NativeKernel(library)
    on_rows = _function_on_rows(library, "exponentials", pointers=3, numbers=0)

    def exponentials(logits: Tensor) -> tuple[Tensor, Tensor]:
        top, total = torch.empty(2, len(logits), 1).unbind()
        on_rows((logits, top, total))
        return top, total

    return TorchKernel(exponentials)


def _function_on_rows(library: ctypes.CDLL, name: str, pointers: int, numbers: int) -> Callable[..., None]:
    """Return a C function that is called on all rows of the first tensor [C, V], in as many threads as torch uses."""
    function = library[name]
    function.restype = None
    function.argtypes = [ctypes.c_void_p] * pointers + [ctypes.c_long] * 3 + [ctypes.c_float] * numbers

    def on_rows(tensors: Sequence[Any], *numbers: float) -> None:
        (C, V), stride = tensors[0].shape, tensors[0].stride(0)
        threads = torch.get_num_threads()
        step = -(-C // (4 * threads)) if threads > 1 else C  # four pieces each: none waits long for the slowest

        def call(start: int) -> None:
            addresses = [None if x is None else x[start:].data_ptr() for x in tensors]
            function(*addresses, min(step, C - start), V, stride, *numbers)

        starts = range(0, C, step)
        list((_pool(threads).map if len(starts) > 1 else map)(call, starts))

    return on_rows


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="potstill-kernel")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork


def _c_formula(formula: Formula | None) -> str:
    """Write the body of the C function `pointwise`."""
    if formula is None:
        return "    *value = *slope = splat(0);"
    lines = []
    for name, function, arguments in formula.operations:
        # A function of kernel_native.c takes vectors; an operator takes a number too.
        literal = "({!r}f)" if function in OPERATORS else "splat({!r}f)"
        operands = [literal.format(x) if isinstance(x, float) else x for x in arguments]
        of_log = function == "exp" and arguments[0] in ("log_q", "log_p")
        call = f"{'exponential_below_88' if of_log else f'op_{function}'}({', '.join(operands)})"
        kind = "vi" if function in ("lt", "gt") else "vf"
        lines.append(f"    const {kind} {name} = {OPERATORS.get(function, call).format(*operands)};")
    return "\n".join([*lines, f"    *value = {formula.value};", f"    *slope = {formula.slope};"])


def _build(source: str) -> Path | None:
    """Compile a source to a shared library, cached by source, compiler and processor; None if that fails."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    key = hashlib.sha256("\n".join([source, compiler, *FLAGS, _processor()]).encode()).hexdigest()[:24]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "potstill"
    target = folder / f"kernel-{key}.so"
    if target.exists():
        return target
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            code, built = Path(scratch) / "kernel.c", Path(scratch) / "kernel.so"
            code.write_text(source)
            command = [*compiler.split(), *FLAGS, str(code), "-o", str(built), "-lm"]
            subprocess.run(command, check=True, capture_output=True)
            built.replace(target)  # atomic, whatever other process builds it too
    except (OSError, subprocess.CalledProcessError):
        return None
    return target


def _processor() -> str:
    """Describe what -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {platform.processor()} {flags}"
