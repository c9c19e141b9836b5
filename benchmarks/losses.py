"""The fused loss, forward and backward: time, extra memory and error. One command does all of it on a machine:

    .venv/bin/python benchmarks/losses.py --out runs/bench-losses.json  # a CPU: hours on 2 cores, up to 12 GB
    .venv/bin/python benchmarks/losses.py --device cuda                 # a GPU with 100 GB, or "out of memory" columns
    .venv/bin/python benchmarks/losses.py --quick --cases tiny          # in small: does it run here?
    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/losses.py             # beside other work: the processor's time

Beside ours run the peers where they are installed; without them their columns say so:

    .venv/bin/python -m pip install trl==1.16.0 triton
    .venv/bin/python -m pip install --no-deps liger-kernel==0.8.5

Ours alone needs torch, and Triton on a GPU: `PYTHONPATH=src python benchmarks/losses.py --device cuda`.

What is timed: the mean loss over N tokens and its backward pass, from the last hidden states and the heads of student
and teacher to the gradients of the student's hidden states and weight. All columns of a row take turns in one process;
a figure is the median of the rounds after a first one that does not count.

    floor      the matrix products alone, each whole, into buffers that are there already
    eager      the formula in torch's own functions over whole logits in float32, with autograd
    reference  potstill's backend="eager"
    TRL        trl.kernels.chunked_divergence.ChunkedDivergenceFunction, called as its DistillationTrainer does
    Liger      liger_kernel.chunked_loss.LigerFusedLinearJSDLoss at its defaults (compiled), hard loss switched off

Extra memory is the peak of a step above what is there at its end: the inputs and two gradients. An error is the
distance to the float64 gradient of the same inputs over its norm, on the first 512 tokens.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from measure import (
    DTYPES,
    Peak,
    attempt,
    backends,
    checks,
    distance,
    fresh,
    has_bf16,
    installed,
    keep,
    machine,
    mb,
    ms,
    seconds,
    table,
)
from potstill.losses.divergences import JSD, Divergence, ForwardKL, ReverseKL, SkewForwardKL
from potstill.losses.fused_linear import linear_divergence
from potstill.losses.targets import HeadTargets, LMHead, SparseTargets

SPARSE = "sparse K=64, forward KL"
DIVERGENCES: dict[str, Divergence] = {
    "forward KL": ForwardKL(),
    "reverse KL": ReverseKL(),
    "JSD 0.5": JSD(0.5),
    "skew forward KL 0.1": SkewForwardKL(0.1),
    SPARSE: ForwardKL(),
}
PEER_BETA = {"forward KL": 0.0, "reverse KL": 1.0, "JSD 0.5": 0.5}  # what TRL and Liger call them
OTHERS = ("TRL", "Liger", "reference", "eager")
SIZES = {  # N tokens, widths of student and teacher, vocabulary
    "cpu": {"qwen": (1024, 896, 1536, 151936), "smol": (2048, 576, 960, 49152), "tiny": (4096, 256, 512, 32000)},
    "cuda": {"llama": (8192, 2048, 4096, 128256), "qwen": (8192, 2048, 4096, 151936)},
}
GROWTH_N = tuple((1024 * 2**i, 64, 64, 151936) for i in range(6))
GROWTH_V = tuple((4096, 64, 64, V) for V in (8192, 32768, 151936, 262144))
ERROR_TOKENS = 512


@dataclass(frozen=True)
class Row:
    case: str
    N: int
    Hs: int
    Ht: int
    V: int
    divergence: str
    dtype: str
    device: str
    others: tuple[str, ...] = OTHERS  # what is measured beside ours


@dataclass(frozen=True)
class Inputs:
    """The student's hidden states [N, Hs] and weight [V, Hs], both with gradient, and the teacher's targets."""

    hidden: Tensor
    weight: Tensor
    targets: HeadTargets | SparseTargets
    divergence: str

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None


def make(row: Row) -> Inputs:
    """Random inputs; the logits of student and teacher are independent, with a standard deviation of 2."""
    torch.manual_seed(0)

    def side(width: int) -> tuple[Tensor, Tensor]:
        hidden, weight = (torch.randn(size, width, device=row.device) for size in (row.N, row.V))
        return hidden.to(DTYPES[row.dtype]), weight.mul_(2 / math.sqrt(width)).to(DTYPES[row.dtype])

    outputs, head = side(row.Ht)
    targets: HeadTargets | SparseTargets = HeadTargets(outputs, LMHead(head))
    if row.divergence == SPARSE:
        logits = (LMHead(head).logits(piece).float() for piece in outputs.split(64))
        values, ids = zip(*(torch.log_softmax(z, -1).topk(64) for z in logits), strict=True)
        targets = SparseTargets(torch.cat(ids), torch.cat(values))
    hidden, weight = side(row.Hs)
    return Inputs(hidden.requires_grad_(), weight.requires_grad_(), targets, row.divergence)


# Who is compared: from inputs to their mean loss.

Loss = Callable[[Inputs], Tensor]


def contestants(row: Row) -> dict[str, Loss | str]:
    """By column: the loss, or why there is none."""
    found: dict[str, Loss | str] = {name: partial(ours, name) for name in backends(row.device)}
    beta = PEER_BETA.get(row.divergence)
    for name, package, peer in (("TRL", "trl", trl), ("Liger", "liger-kernel", liger)):
        there = installed(package)
        try:
            found[name] = "not installed" if there is None else "none" if beta is None else peer(beta)
        except ImportError as error:
            found[name] = f"needs {error.name}"
    found |= {"reference": partial(ours, "eager"), "eager": plain}
    return {name: loss if name in (*backends(row.device), *row.others) else "left out" for name, loss in found.items()}


def ours(backend: Any, x: Inputs) -> Tensor:
    return linear_divergence(x.hidden, LMHead(x.weight), x.targets, DIVERGENCES[x.divergence], backend=backend).loss


def trl(beta: float) -> Loss:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def loss(x: Inputs) -> Tensor:
        assert isinstance(x.targets, HeadTargets)
        student, teacher = (x.hidden, x.weight, None), (x.targets.hidden, x.targets.head.weight, None)
        by_token, _ = ChunkedDivergenceFunction.apply(*student, *teacher, beta, 1.0, 1.0, None, 1.0, None)
        return by_token.sum() / len(x.hidden)

    return loss


def liger(beta: float) -> Loss:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    torch._dynamo.reset()  # what was compiled for another row counts towards the limit above which nothing is compiled
    torch._dynamo.config.suppress_errors = True  # where it cannot be compiled it runs as it is, with a warning
    fused = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta)

    def loss(x: Inputs) -> Tensor:
        assert isinstance(x.targets, HeadTargets)
        labels = torch.zeros(len(x.hidden), dtype=torch.int64, device=x.hidden.device)
        result: Tensor = fused(x.hidden, x.weight, x.targets.hidden, x.targets.head.weight, labels)
        return result

    return loss


def plain(x: Inputs) -> Tensor:
    """The formulas once more, in the functions that torch has for them."""
    kl = partial(F.kl_div, reduction="sum", log_target=True)  # kl(a, b) is KL(b || a)
    logits = x.hidden @ x.weight.t()
    log_q = F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
    if isinstance(x.targets, SparseTargets):
        kept = (log_q.gather(-1, x.targets.ids), x.targets.log_probs)
        log_q, log_p = (torch.cat([a, torch.log1p(-a.exp().sum(-1, keepdim=True))], -1) for a in kept)
    else:
        log_p = F.log_softmax(x.targets.dense().to(log_q.dtype), -1)
    if x.divergence == "reverse KL":
        total = kl(log_p, log_q)
    elif x.divergence == "JSD 0.5":
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        total = 0.5 * kl(log_m, log_p) + 0.5 * kl(log_m, log_q)
    elif x.divergence == "skew forward KL 0.1":
        total = kl(torch.logaddexp(log_p + math.log(0.1), log_q + math.log(0.9)), log_p)
    else:
        total = kl(log_q, log_p)
    return total / len(x.hidden)


def floor(x: Inputs) -> Callable[[], None]:
    """The products that no exact loss can do without, as a call."""
    hidden, weight = x.hidden.detach(), x.weight.detach()
    logits, outputs = (hidden.new_empty(len(hidden), len(weight)) for _ in range(2))
    d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def run() -> None:
        torch.mm(hidden, weight.t(), out=logits)
        if isinstance(x.targets, HeadTargets):
            torch.mm(x.targets.hidden, x.targets.head.weight.t(), out=outputs)
        torch.mm(logits, weight, out=d_hidden)
        torch.mm(logits.t(), hidden, out=d_weight)

    return run


# What is measured; on a CPU each call of these has a process of its own.


def step(loss: Loss, x: Inputs) -> None:
    loss(x).backward()


def times(row: Row, rounds: int) -> dict[str, float | str]:
    """Seconds by column, the median of the rounds, or why there is none."""
    x = make(row)
    found = contestants(row)
    calls: dict[str, Callable[[], None]] = {"floor": floor(x)}
    calls |= {name: partial(step, loss, x) for name, loss in found.items() if not isinstance(loss, str)}
    kept: dict[str, list[float]] = {name: [] for name in calls}
    results: dict[str, float | str] = {name: why for name, why in found.items() if isinstance(why, str)}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            spent = attempt(seconds, call, row.device) if name not in results else ""
            x.clear()
            if isinstance(spent, float) and turn:
                kept[name].append(spent)
            elif isinstance(spent, str) and spent:
                results[name] = spent
    return {name: statistics.median(values) for name, values in kept.items() if values} | results


def once(row: Row, name: str) -> tuple[int | str | None, float]:
    """The extra bytes of one column's second step, or why there is none; and its seconds."""
    loss = contestants(row)[name]
    if isinstance(loss, str):
        return loss, math.nan
    x = make(row)
    why = attempt(step, loss, x)
    if why is not None:
        return why, math.nan
    x.clear()
    peak = Peak(row.device)
    spent = seconds(partial(step, loss, x), row.device)
    extra = peak.extra()
    return None if extra is None else max(0, extra - x.hidden.nbytes - x.weight.nbytes), spent


def errors(row: Row) -> dict[str, list[float] | str]:
    """The relative errors of the gradients of hidden states and weight, by column."""
    x = make(replace(row, N=min(row.N, ERROR_TOKENS)))
    true = exact_gradients(x)
    results: dict[str, list[float] | str] = {}
    for name, loss in contestants(row).items():
        if name in (*backends(row.device), "eager") and not isinstance(loss, str):
            why = attempt(step, loss, x)
            both = zip((x.hidden.grad, x.weight.grad), true, strict=True)
            results[name] = why or [distance(got, to) for got, to in both if got is not None]
            x.clear()
    return results


def exact_gradients(x: Inputs) -> tuple[Tensor, Tensor]:
    """In float64, 64 tokens at a time, of the same inputs."""
    hidden, weight = (a.detach().double().requires_grad_() for a in (x.hidden, x.weight))
    head = LMHead(x.targets.head.weight.double()) if isinstance(x.targets, HeadTargets) else None
    for part in (slice(start, start + 64) for start in range(0, len(hidden), 64)):
        outputs: Any = x.targets
        outputs = (
            HeadTargets(outputs.hidden[part].double(), head)
            if head is not None
            else SparseTargets(outputs.ids[part], outputs.log_probs[part].double())
        )
        piece = Inputs(hidden[part], weight, outputs, x.divergence)
        (plain(piece) * (len(piece.hidden) / len(hidden))).backward()
    assert hidden.grad is not None and weight.grad is not None
    return hidden.grad, weight.grad


# What is printed.


def checks_table(lines: list[dict[str, Any]]) -> str:
    header = ["backend", "dtype", "targets", "where", "ok", "worst", "eager"]
    cells = [[*(line[key] for key in header[:5]), *(f"{line[key]:.1e}" for key in header[5:])] for line in lines]
    return table([*header[:5], "worst relative error", "eager's there"], cells)


def rows_tables(rows: list[dict[str, Any]]) -> str:
    """Time; memory and errors."""
    measured_backends = backends(rows[0]["device"])
    shown, judged = (*measured_backends, *OTHERS), (*measured_backends, "eager")
    title = {name: f"ours ({name})" if name in measured_backends else name for name in shown}
    time_cells, memory_cells = [], []
    for row in rows:
        spent, extra, far = row["seconds"], row["extra_bytes"], row["errors"]
        runs = next((name for name in measured_backends if not isinstance(spent[name], str)), None)
        best = None if runs is None else spent[runs]
        first = [row["case"], row["divergence"], row["dtype"]]
        by_column = (ms(spent[name], spent["floor"] if name in measured_backends else best) for name in shown)
        time_cells.append([*first, ms(spent["floor"]), *by_column])
        pair = (extra["eager"], extra.get(runs))
        ratio = f"{pair[0] / max(pair[1], 1):.1f}" if all(isinstance(each, int) for each in pair) else "-"
        known = [far.get(name, "left out") for name in judged]
        digits = [each if isinstance(each, str) else ", ".join(f"{e:.1e}" for e in each) for each in known]
        memory_cells.append([*first, *(mb(extra[name]) for name in shown), ratio, *digits])
    first = ["case", "divergence", "dtype"]
    columns = [f"{title[name]}, ms (/ {'floor' if name in measured_backends else 'ours'})" for name in shown]
    times_table = table([*first, "floor, ms", *columns], time_cells)
    columns = [*(f"{title[name]}, MB" for name in shown), "eager / ours", *(f"{title[name]}: error" for name in judged)]
    return f"{times_table}\n\nExtra memory; errors of hidden, weight:\n\n{table([*first, *columns], memory_cells)}"


def growth_table(lines: list[dict[str, Any]]) -> str:
    header = ["backend", "dtype", "N", "V", "ms", "us / token", "extra, MB"]
    cells = []
    for x in lines:
        by_token = f"{x['seconds'] / x['N'] * 1e6:,.2f}"
        sizes = (x["backend"], x["dtype"], f"{x['N']:,}", f"{x['V']:,}")
        cells.append([*sizes, ms(x["seconds"]), by_token, mb(x["extra_bytes"])])
    return table(header, cells)


PARTS: dict[str, Callable[[list[dict[str, Any]]], str]] = {
    "checks": checks_table,
    "rows": rows_tables,
    "growth": growth_table,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(SIZES), default="cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), nargs="+", help="default: those with instructions")
    parser.add_argument("--cases", nargs="+", metavar="NAME")
    parser.add_argument("--divergences", nargs="+", choices=list(DIVERGENCES), default=list(DIVERGENCES))
    parser.add_argument("--others", nargs="*", choices=OTHERS, default=OTHERS, help="what is measured beside ours")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--rounds", type=int, help="default: 3, on CUDA 10")
    parser.add_argument("--quick", action="store_true", help="a sixteenth of the tokens and of the vocabulary")
    parser.add_argument("--out", type=Path, help="also as JSON")
    args = parser.parse_args()
    device = args.device
    quick = 16 if args.quick else 1
    dtypes = args.dtype or (["bf16"] if device == "cuda" else ["float32", *["bf16"] * has_bf16(device)])
    # torch counts a GPU's bytes itself; a CPU's are counted by process. There a new one also starts without leftovers.
    apart: Callable[..., Any] = fresh if device == "cpu" else lambda task, *arguments: task(*arguments)
    result: dict[str, Any] = {"command": " ".join(sys.argv), "machine": machine(device)}

    def note(part: str, line: Any) -> None:
        result.setdefault(part, []).append(line)
        keep(args.out, result)
        print(line, file=sys.stderr)

    if "checks" in args.parts:
        result["checks"] = apart(checks, device)
    for (name, sizes), divergence, dtype in product(SIZES[device].items(), args.divergences, dtypes):
        if "rows" not in args.parts or name not in (args.cases or SIZES[device]):
            continue
        N, Hs, Ht, V = sizes
        row = Row(name, N // quick, Hs, Ht, V // quick, divergence, dtype, device, tuple(args.others))
        try:
            spent = apart(times, row, args.rounds or (10 if device == "cuda" else 3))
            extra = {other: spent[other] for other in spent if isinstance(spent[other], str)}
            extra |= {other: apart(once, row, other)[0] for other in spent if other not in ("floor", *extra)}
            note("rows", asdict(row) | {"seconds": spent, "extra_bytes": extra, "errors": apart(errors, row)})
        except BrokenProcessPool:
            print(f"{row}: killed, as where memory ends", file=sys.stderr)
    for N, Hs, Ht, V in (*GROWTH_N, *GROWTH_V) if "growth" in args.parts else ():
        row = Row("growth", N // quick, Hs, Ht, V // quick, "forward KL", dtypes[0], device)
        for backend in backends(device):
            extra_bytes, spent = apart(once, row, backend)
            if not isinstance(extra_bytes, str):
                note("growth", asdict(row) | {"backend": backend, "seconds": spent, "extra_bytes": extra_bytes})

    print("\n".join(f"{key}: {value}" for key, value in result["machine"].items()))
    if not args.dtype and "bf16" not in dtypes:
        print("bf16: not timed, this CPU has no bf16 instructions")
    for part, show in PARTS.items():
        if part in result:
            print(f"\n{show(result[part])}")
    if any(line["ok"] == "NO" for line in result.get("checks", [])):
        sys.exit("A check failed: see NO above.")


if __name__ == "__main__":
    main()
