"""The compiled loss kernels against the one in torch: the same numbers, and no less exact."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from potstill.losses import kernel_native
from potstill.losses.divergences import JSD, Divergence, ForwardKL
from potstill.losses.fused_chunks import ROUND, ChunkBuffers, FusedInputs, LossKernel
from potstill.losses.fused_linear import linear_cross_entropy, linear_divergence
from potstill.losses.kernel_formula import trace_formula
from potstill.losses.kernel_native import native_kernel
from potstill.losses.kernel_torch import TorchKernel
from potstill.losses.targets import DenseTargets, LMHead
from potstill.losses.token_losses import compute_dtype, exponentials_
from reference import DIVERGENCES

every_divergence = pytest.mark.parametrize("divergence", [None, *DIVERGENCES], ids=str)


def randn(*shape: int) -> Tensor:
    return 3 * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def through(
    kernel: LossKernel,
    dtype: torch.dtype,
    divergence: Divergence | None,
    temperature: float,
    labels: bool,
    V: int,
    rows: int = 5,
) -> list[Tensor]:
    """Divergence, cross-entropy and gradient of a chunk, float64."""
    scale = torch.rand(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    logits = [torch.empty(rows, -(-V // ROUND) * ROUND, dtype=dtype)[:, :V] for _ in range(2)]
    for each, values in zip(logits, randn(2, rows, V), strict=True):
        each.copy_(values)
    ids = torch.randint(0, V, (rows,), generator=torch.Generator().manual_seed(2)).index_fill_(0, torch.tensor(4), -100)
    job = FusedInputs(torch.empty(0, 1), LMHead(torch.empty(V, 1)), None, divergence, temperature, None, 0.3)
    losses = [torch.zeros(rows, dtype=compute_dtype(dtype)) if x else None for x in (divergence, labels)]
    chunk = ChunkBuffers(
        logits[0], logits[1] if divergence else None, scale.to(compute_dtype(dtype)), ids if labels else None, *losses
    )
    kernel(chunk, job)
    return [x.double() for x in (*losses, chunk.student) if x is not None]


def worst_error(found: list[Tensor], exact: list[Tensor]) -> float:
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))


@pytest.fixture(scope="module")
def compiler() -> None:
    if native_kernel(ForwardKL(), False) is None:
        pytest.skip("there is no C compiler")


@pytest.mark.usefixtures("compiler")
@every_divergence
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("labels", [True, False])
def test_the_native_kernel_is_no_less_exact_than_torch(divergence, temperature, labels):
    if divergence is None and not labels:
        return
    kernels = (
        (TorchKernel(), torch.float64),
        (TorchKernel(), torch.float32),
        (native_kernel(divergence, False), torch.float32),
    )
    exact, plain, found = (through(*each, divergence, temperature, labels, V=1003, rows=100) for each in kernels)
    for truth, torchs, ours in zip(exact, plain, found, strict=True):
        assert worst_error([ours], [truth]) <= 2 * worst_error([torchs], [truth]) + 1e-7


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("V", [1, 2, 7, 8, 15, 16, 17, 63, 64, 1023, 1024, 1025])
def test_every_length_of_a_row(V):
    exact = through(TorchKernel(), torch.float64, JSD(0.3), 2.0, True, V)
    found = through(native_kernel(JSD(0.3), False), torch.float32, JSD(0.3), 2.0, True, V)
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("V", [5, 64, 3001])
def test_native_exponentials(V):
    logits = torch.empty(4, -(-V // ROUND) * ROUND)[:, :V].copy_(randn(4, V))
    logits[1] = -math.inf
    logits[2, 1:] = -math.inf
    expected, found = logits.double(), logits
    row = native_kernel(None, True)._exponentials(found)
    exact = exponentials_(expected)
    for a, b in ((found, expected), *zip(row, exact, strict=True)):
        torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=1e-7)


@pytest.mark.usefixtures("compiler")
def test_a_nan_is_not_hidden():
    hidden, weight = torch.ones(3, 4), torch.randn(70, 4)
    hidden[1, 2] = math.nan
    teacher = DenseTargets(torch.randn(3, 70))
    for divergence in DIVERGENCES:
        found = linear_divergence(hidden, LMHead(weight), teacher, divergence, labels=torch.tensor([0, 1, 2]))
        assert found.divergence.isnan().tolist() == found.cross_entropy.isnan().tolist() == [False, True, False]


@pytest.mark.usefixtures("compiler")
def test_threads_do_not_change_a_number(monkeypatch):
    hidden, head, labels = torch.randn(37, 8), LMHead(torch.randn(90, 8).requires_grad_()), torch.arange(37)
    found = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        loss = linear_cross_entropy(hidden, head, labels).loss
        found.append((loss, *torch.autograd.grad(loss, head.weight)))
    for one, three in zip(*found, strict=True):
        assert torch.equal(one, three)


def test_without_a_compiler_the_plain_kernel_is_used(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", str(tmp_path / "no-such-compiler"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernel_native.native_kernel.cache_clear()
    try:
        assert native_kernel(JSD(), False) is None
        hidden, head = torch.randn(5, 4), LMHead(torch.randn(9, 4))
        found = linear_divergence(hidden, head, DenseTargets(torch.randn(5, 9)), JSD())
        assert found.loss > 0
    finally:
        kernel_native.native_kernel.cache_clear()


def test_what_is_built_is_kept_whole_and_for_its_owner_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = kernel_native._build("int one(void) { return 1; }")
    if path is None:
        pytest.skip("there is no C compiler")
    assert [each.name for each in (tmp_path / "potstill").iterdir()] == [path.name]
    assert (tmp_path / "potstill").stat().st_mode & 0o077 == 0
    assert kernel_native._build("int one(void) { return 1; }") == path
    assert kernel_native._build("this is no C") is None


# Tracing.


@every_divergence
def test_every_divergence_can_be_traced(divergence):
    assert divergence is None or trace_formula(divergence) is not None


@dataclass(frozen=True)
class Unusual(Divergence):
    """Forward KL beyond what compiled kernels can express."""

    how: str

    def pointwise(self, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        p = log_p.exp()
        if self.how == "in place":
            p.mul_(1.0)
        elif self.how == "branch" and p.sum() < 0:
            return p, p
        elif self.how == "reduction":
            p = p / p.sum(-1, keepdim=True)
        elif self.how == "constant":
            p = p * torch.ones(())
        elif self.how == "keyword":
            p = torch.add(p, p, alpha=0)
        return p * (log_p - log_q), -p


@pytest.mark.parametrize("how", ["in place", "branch", "reduction", "constant", "keyword"])
def test_what_cannot_be_traced_runs_in_torch(how):
    assert trace_formula(Unusual(how)) is None
    hidden, head, teacher = torch.randn(5, 4), LMHead(torch.randn(9, 4)), DenseTargets(torch.randn(5, 9))
    expected = linear_divergence(hidden, head, teacher, ForwardKL())
    torch.testing.assert_close(linear_divergence(hidden, head, teacher, Unusual(how)).loss, expected.loss)


@dataclass(frozen=True)
class EveryOperation(Divergence):
    """Not a divergence; it goes through all that can be traced, in each way of writing it."""

    def pointwise(self, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        p, q = torch.exp(log_p), log_q.exp()
        a = torch.sqrt(p) + q.sqrt() * 0.5 + (1 + p).log() + torch.log1p(q) + torch.expm1(0.3 * p) + (q - p).expm1()
        b = torch.maximum(p, q) - torch.minimum(p, q) + (p - q).abs() + abs(q - p) + (p - q).sign() * p
        c = torch.where(p < q, p, 2 * q) + p.where(p > 0.01, q) + p.clamp_min(1e-3) - q.clamp_max(0.5)
        d = torch.logaddexp(log_p, log_q).exp() + p**2 + q.square() + p * (q + 1).reciprocal() - (-p) / (2 + q)
        return (a + b) * p, (c + d) * q + 1 / (1 + p) * p


@pytest.mark.usefixtures("compiler")
def test_every_operation_means_in_c_what_it_means_in_torch():
    assert trace_formula(EveryOperation()) is not None
    exact, plain = (
        through(TorchKernel(), dtype, EveryOperation(), 1.0, False, 500) for dtype in (torch.float64, torch.float32)
    )
    found = through(native_kernel(EveryOperation(), False), torch.float32, EveryOperation(), 1.0, False, 500)
    assert worst_error(found, exact) <= 2 * worst_error(plain, exact) + 1e-6


# Triton: its interpreter in a process of its own, because it is chosen before the kernels are read.

INTERPRETED = """
import warnings
warnings.filterwarnings("ignore", category=RuntimeWarning)  # NumPy's, in branches that are not taken
import torch
import test_kernels as here
from potstill.losses.kernel_triton import triton_kernel, triton_exponentials_
from potstill.losses.targets import SparseTargets

for divergence in [None, *here.DIVERGENCES, here.EveryOperation()]:
    for temperature, labels in ((1.0, True), (4.0, False)):
        if divergence is None and not labels:
            continue
        V = 5003 if divergence in (None, here.JSD()) else 301
        exact, plain = (
            here.through(here.TorchKernel(), dtype, divergence, temperature, labels, V)
            for dtype in (torch.float64, torch.float32)
        )
        found = here.through(triton_kernel(divergence, False), torch.float32, divergence, temperature, labels, V)
        error, allowed = here.worst_error(found, exact), 2 * here.worst_error(plain, exact) + 1e-6
        assert error <= allowed, (divergence, temperature, labels, error, allowed)
        if V == 301 and temperature == 1:
            continue
        half = here.through(triton_kernel(divergence, False), torch.bfloat16, divergence, temperature, labels, V)
        assert here.worst_error(half, exact) <= 0.1, (divergence, here.worst_error(half, exact))

logits = here.randn(3, 5003).float()
logits[1] = -torch.inf
expected, found = logits.double(), logits.clone()
row, exact = triton_exponentials_(found), here.exponentials_(expected)
for a, b in ((found, expected), *zip(row, exact, strict=True)):
    torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=1e-7)

hidden, weight = torch.randn(7, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
ids = torch.rand(7, 50).argsort(-1)[:, :6]
sparse = SparseTargets(ids, torch.randn(7, 50).log_softmax(-1).gather(1, ids))
for targets in (here.DenseTargets(torch.randn(7, 50)), sparse):
    found = {}
    for backend in ("eager", "triton"):
        loss = here.linear_divergence(
            hidden, here.LMHead(weight, softcap=9.0), targets, here.JSD(), labels=torch.arange(7), label_weight=0.5,
            backend=backend, chunk_tokens=3,
        ).loss
        found[backend] = (loss, *torch.autograd.grad(loss, (hidden, weight)))
    torch.testing.assert_close(found["triton"], found["eager"])

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("default")
    for _ in range(3):
        here.linear_divergence(hidden, here.LMHead(weight), targets=here.DenseTargets(torch.randn(7, 50)),
                               divergence=here.Unusual("reduction"), backend="triton")
assert [str(each.message) for each in caught] == [
    "linear_divergence: Unusual has no Triton kernel; the chunked backend is used."
], caught
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import test_kernels as here
from potstill.losses import kernel_triton as kernels

types = dict(student="*bf16", teacher="*bf16", scale="*fp32", labels="*i64", divergence="*fp32", cross_entropy="*fp32",
             V="i32", stride="i32", temperature="fp32", label_weight="fp32")
def compiles(kernel, constants, types):
    names = kernel.arg_names
    source = ASTSource(fn=kernel, signature={name: types.get(name, "constexpr") for name in names},
                       constexprs={(names.index(name),): value for name, value in constants.items()})
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8}).asm["cubin"]

def of_kernel(divergence, labels, gradient, one):
    given = {"teacher": divergence, "scale": gradient or None, "labels": labels or None}
    absent = {name: None for name, value in given.items() if value is None}
    constants = dict(POINTWISE=kernels.triton_kernel(divergence, False)._pointwise, HAS_LABELS=labels,
                     WITH_GRADIENT=gradient, ONE=one, BLOCK=4096, **absent)
    compiles(kernels._loss_and_gradient, constants, {name: kind for name, kind in types.items() if name not in absent})

of_kernel(here.JSD(), True, True, False)
of_kernel(here.EveryOperation(), True, True, False)
of_kernel(here.JSD(), False, False, True)  # evaluation
of_kernel(None, True, True, True)  # cross-entropy alone
rows = dict(logits="*bf16", tops="*fp32", totals="*fp32", V="i32", stride="i32")
compiles(kernels._exponentials, {"BLOCK": 4096}, rows)
"""


def run_with_triton(program: str, **environment: str) -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow  # the tests of linear_divergence run it too
def test_the_triton_kernel_through_its_interpreter():
    run_with_triton(INTERPRETED, TRITON_INTERPRET="1")


def test_the_triton_kernel_compiles_for_a_gpu_that_is_not_here(tmp_path):
    if sys.platform != "linux":
        pytest.skip("Triton's compiler for CUDA comes with Linux only")
    run_with_triton(COMPILED, TRITON_CACHE_DIR=str(tmp_path), TRITON_DEFAULT_FP_FUSION="1", TRITON_INTERPRET="0")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@every_divergence
def test_the_triton_kernel_on_a_gpu(divergence):
    from potstill.losses.kernel_triton import triton_kernel

    exact = through(TorchKernel(), torch.float64, divergence, 1.0, True, 5003)
    torch.set_default_device("cuda")
    try:
        found = through(triton_kernel(divergence, False), torch.float32, divergence, 1.0, True, 5003)
    finally:
        torch.set_default_device("cpu")
    assert worst_error([x.cpu() for x in found], exact) < 1e-5
