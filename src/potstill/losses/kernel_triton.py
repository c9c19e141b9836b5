"""Loss kernel for CUDA: one Triton program per row, in float32, which reads a row three times."""

# Triton decides the types of a kernel's arguments.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import linecache
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from potstill.losses.divergences import LOG_ZERO, Divergence
from potstill.losses.fused_chunks import ChunkBuffers, FusedInputs, LossKernel
from potstill.losses.kernel_formula import OPERATORS, Formula, trace_formula
from potstill.losses.kernel_torch import TorchKernel

LOWEST = tl.constexpr(LOG_ZERO)
INTERPRETED: bool = triton.knobs.runtime.interpret  # the kernels run on a CPU, slowly, for tests

OPERATIONS = OPERATORS | {
    "sign": "({0} > 0).to(tl.float32) - ({0} < 0).to(tl.float32)",
    "reciprocal": "1.0 / {}",
    "where": "tl.where({}, {}, {})",
}
OPERATIONS |= {name: f"tl.{name}({{}})" for name in ("exp", "log", "sqrt", "abs")}
OPERATIONS |= {name: f"tl.{name}({{}}, {{}})" for name in ("maximum", "minimum")}
OPERATIONS |= {"log1p": "log_one_plus({})", "expm1": "exp_minus_one({})", "logaddexp": "log_add_exp({}, {})"}


@triton.jit
def log_one_plus(x):
    """Compute log(1 + x), with Goldberg's correction for the rounding of 1 + x."""
    u = x + 1.0
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def exp_minus_one(x):
    """Compute exp(x) - 1, by a series where the difference would lose digits."""
    p = 1.0
    for k in tl.static_range(8, 1, -1):
        p = 1.0 + x * (1.0 / k) * p
    return tl.where(tl.abs(x) < 0.5, x * p, tl.exp(x) - 1.0)


@triton.jit
def log_add_exp(a, b):
    """Compute log(exp(a) + exp(b))."""
    return tl.maximum(a, b) + log_one_plus(tl.exp(-tl.abs(a - b)))


@triton.jit
def _load(row, start, V, inverse, BLOCK: tl.constexpr):
    """Load z / T of a block, LOWEST behind the row's end."""
    at = start + tl.arange(0, BLOCK)
    z = tl.load(row + at, mask=at < V, other=-float("inf")).to(tl.float32) * inverse
    return tl.where(z < LOWEST, LOWEST, z)  # not tl.maximum, which would hide NaN


@triton.jit
def _normalise(row, V, inverse, BLOCK: tl.constexpr):
    """Compute a row's largest z / T and the sum of exp(z / T - largest); LOWEST and 1 if every token is ruled out."""
    top = LOWEST + 0.0
    total = 0.0
    for start in range(0, V, BLOCK):
        z = _load(row, start, V, inverse, BLOCK)
        larger = tl.maximum(top, tl.max(z, 0))
        total = total * tl.exp(top - larger) + tl.sum(tl.exp(z - larger), 0)
        top = larger
    return top, tl.where(top <= LOWEST, 1.0, total)


@triton.jit
def _loss_and_gradient(
    student, teacher, scale, labels, divergence, cross_entropy,
    V, stride, temperature, label_weight,
    POINTWISE: tl.constexpr, HAS_LABELS: tl.constexpr, WITH_GRADIENT: tl.constexpr, ONE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """See `LossKernel`; ONE: the temperature is 1, so that one normaliser serves both losses."""
    row = tl.program_id(0).to(tl.int64)
    student += row * stride
    label = -1
    label_scale = 0.0
    hard_base, hard_log = 0.0, 0.0
    if HAS_LABELS:
        label = tl.load(labels + row)
        if POINTWISE is None or not ONE:
            hard_top, hard_total = _normalise(student, V, 1.0, BLOCK)
            hard_base, hard_log = tl.where(hard_top <= LOWEST, 0.0, hard_top), tl.log(hard_total)
    base, log_total, slopes = 0.0, 0.0, 0.0
    inverse = 1.0 / temperature
    if POINTWISE is not None:
        teacher += row * stride
        top, total = _normalise(student, V, inverse, BLOCK)
        base, log_total = tl.where(top <= LOWEST, 0.0, top), tl.log(total)
        teacher_top, teacher_total = _normalise(teacher, V, inverse, BLOCK)
        teacher_base, teacher_log = tl.where(teacher_top <= LOWEST, 0.0, teacher_top), tl.log(teacher_total)
        values = 0.0
        for start in range(0, V, BLOCK):
            log_q = _load(student, start, V, inverse, BLOCK) - base - log_total
            log_p = _load(teacher, start, V, inverse, BLOCK) - teacher_base - teacher_log
            value, slope = POINTWISE(log_q, log_p)
            inside = start + tl.arange(0, BLOCK) < V
            values += tl.sum(tl.where(inside, value, 0.0), 0)
            slopes += tl.sum(tl.where(inside, slope, 0.0), 0)
        tl.store(divergence + row, values)
        if ONE:
            hard_base, hard_log = base, log_total
    if HAS_LABELS:
        is_target = label >= 0
        z = tl.load(student + tl.where(is_target, label, 0)).to(tl.float32)
        z = tl.where(z < LOWEST, LOWEST, z)
        tl.store(cross_entropy + row, tl.where(is_target, hard_log - (z - hard_base), 0.0))
    if WITH_GRADIENT:
        weight = tl.load(scale + row)
        if HAS_LABELS:
            label_scale = tl.where(label >= 0, weight * label_weight, 0.0)
        for start in range(0, V, BLOCK):
            at = start + tl.arange(0, BLOCK)
            gradient = tl.zeros([BLOCK], tl.float32)
            if POINTWISE is not None:
                log_q = _load(student, start, V, inverse, BLOCK) - base - log_total
                log_p = _load(teacher, start, V, inverse, BLOCK) - teacher_base - teacher_log
                value, slope = POINTWISE(log_q, log_p)
                gradient = (slope - tl.exp(log_q) * slopes) * (weight * inverse)
            if HAS_LABELS:
                hard = tl.exp(_load(student, start, V, 1.0, BLOCK) - hard_base - hard_log)
                gradient += label_scale * (hard - tl.where(at == label, 1.0, 0.0))
            tl.store(student + at, gradient, mask=at < V)


@triton.jit
def _exponentials(logits, tops, totals, V, stride, BLOCK: tl.constexpr):
    """See `exponentials_`."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    top, total = _normalise(logits, V, 1.0, BLOCK)
    tl.store(tops + row, top)
    tl.store(totals + row, total)
    base = tl.where(top <= LOWEST, 0.0, top)
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(logits + at, tl.exp(_load(logits, start, V, 1.0, BLOCK) - base), mask=at < V)


class TritonKernel(LossKernel):
    takes_half = True  # half of the memory and traffic

    def __init__(self, pointwise: Any) -> None:
        self._pointwise = pointwise

    def __call__(self, chunk: ChunkBuffers, inputs: FusedInputs) -> None:
        rows, V = chunk.student.shape
        with torch.cuda.device_of(chunk.student):  # Triton launches on the current device
            _loss_and_gradient[(rows,)](
                *chunk[:6], V, chunk.student.stride(0), float(inputs.temperature), float(inputs.label_weight),
                POINTWISE=self._pointwise, HAS_LABELS=chunk.labels is not None, WITH_GRADIENT=chunk.scale is not None,
                ONE=inputs.divergence is None or inputs.temperature == 1, **_shape(V),
            )  # fmt: skip


def triton_exponentials_(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `exponentials_` in two passes over [N, V]."""
    rows, V = logits.shape
    top, total = logits.new_empty(2, rows, 1, dtype=torch.float32).unbind()
    with torch.cuda.device_of(logits):
        _exponentials[(rows,)](logits, top, total, V, logits.stride(0), **_shape(V))
    return top, total


@lru_cache(maxsize=256)
def triton_kernel(divergence: Divergence | None, sparse: bool) -> LossKernel | None:
    """Build the kernel for a divergence (None: cross-entropy alone); None if its formula is not elementary."""
    if sparse or divergence is None:
        return TorchKernel(triton_exponentials_) if sparse else TritonKernel(None)
    formula = trace_formula(divergence)
    return None if formula is None else TritonKernel(_triton_formula(formula))


def _shape(V: int) -> dict[str, int]:
    block = min(4096, triton.next_power_of_2(V))
    return {"BLOCK": block, "num_warps": max(1, min(8, block // 256))}


def _triton_formula(formula: Formula) -> Any:
    """Write the formula as a Triton function, from a source that Triton can read back."""
    lines = ["def pointwise(log_q, log_p):"]
    for operation, function, arguments in formula.operations:
        operands = [f"({x!r})" if isinstance(x, float) else x for x in arguments]
        lines.append(f"    {operation} = {OPERATIONS[function].format(*operands)}")
    source = "\n".join([*lines, f"    return {formula.value}, {formula.slope}", ""])
    name = f"<potstill divergence {hash(formula):x}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    names = dict(globals())
    exec(compile(source, name, "exec"), names)  # written above, from a fixed table
    return triton.jit(names["pointwise"])
