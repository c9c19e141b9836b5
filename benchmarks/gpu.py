"""What only a GPU can measure, in one command of nine minutes that goes on where it ended:

    PYTHONPATH=src python benchmarks/gpu.py --out runs/bench-gpu                  # on an H200 (or a GPU with 100 GB)
    PYTHONPATH=src python benchmarks/gpu.py --out runs/bench-gpu --models models  # with SmolLM2, see benchmarks/real.py
    PYTHONPATH=src python benchmarks/gpu.py --dry                                 # in tiny sizes on a CPU: does it run?

Needs torch with Triton, transformers, accelerate, peft and pyarrow. What a part needs beside them is checked first, and
a part without it is left out. A machine that reaches no registry gets these wheels, each without its dependencies:

    cached step   pydantic pydantic-core annotated-types typing-inspection
    smollm2       these, and datasets dill multiprocess httpx2 httpcore2 truststore
    int4          bitsandbytes
    loss          the columns of peers: trl==1.16.0 liger-kernel==0.8.5

Parts, in this order: `kernels` has every divergence against float64; `loss` fused losses beside the matrix products
alone, an eager loss, TRL and Liger (benchmarks/losses.py says what each is) at N = 8192 and widths 2048 <- 4096;
`memory` by the number of tokens; `step` an optimizer step on labels, with a live teacher, and with one that runs a
batch ahead in a stream of its own; then a step from a cache, on packed rows, with a teacher in 4 bits, and with one
that is spread over the GPU and memory; `smollm2` half of its layers, distilled on 5 million tokens, and on labels
alone.

Measured lines go to OUT/rows.jsonl as they are measured. A part that may not fit into what is left of --minutes is left
for the next run, and a part that was measured to its end is not measured again. Prints a Markdown table of everything
that is there, which is also in OUT/table.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import losses
from measure import Record, backends, checks, machine, mb, ms, steps, table

ROOT = Path(__file__).parents[1]
PYDANTIC = ("pydantic", "pydantic_core", "annotated_types", "typing_inspection")
RUNS = (*PYDANTIC, "datasets", "dill", "multiprocess", "httpx2", "httpcore2", "truststore")

Lines = Iterator[dict[str, Any]]


@dataclass(frozen=True)
class Sizes:
    """What is measured: on a GPU, or to see whether it runs."""

    device: str
    cases: dict[str, tuple[int, int, int, int]]  # of losses: tokens, widths of student and teacher, vocabulary
    rounds: int
    checked: tuple[str, ...]  # divergences
    checked_tokens: int
    growth: tuple[tuple[int, int, int, int], ...]
    student: tuple[int, int]  # width, layers
    teacher: tuple[int, int]
    vocabulary: int
    batch: tuple[int, int]  # rows, tokens in each
    steps: int
    skipped: int
    tokens: int  # of the training of smollm2, of `batch` rows of 512
    models: Path | None = None
    problems: Path | None = None
    out: Path = Path()

    @property
    def home(self) -> int | str:
        """The device as accelerate names it."""
        return 0 if self.device == "cuda" else "cpu"


GPU = Sizes(
    "cuda",
    losses.SIZES["cuda"],
    rounds=10,
    checked=tuple(losses.Divergence.kinds),
    checked_tokens=300,
    growth=losses.GROWTH_N,
    student=(2048, 8),
    teacher=(4096, 8),
    vocabulary=128256,
    batch=(4, 2048),
    steps=10,
    skipped=3,
    tokens=5_000_000,
)
DRY = Sizes(
    "cpu",
    {name: (8, 16, 32, 200 + number) for number, name in enumerate(losses.SIZES["cuda"])},
    rounds=1,
    checked=("jsd",),
    checked_tokens=4,
    growth=((4, 16, 16, 200), (8, 16, 16, 200)),
    student=(64, 2),
    teacher=(128, 2),
    vocabulary=300,
    batch=(2, 32),
    steps=2,
    skipped=1,
    tokens=2_000,
)


def kernels(at: Sizes) -> Lines:
    """The tests of the kernels, and every divergence against float64."""
    if find_spec("pytest"):
        options = ["-q", "-c", os.devnull, "--noconftest", "-p", "no:cacheprovider", "-k", "on_a_gpu"]
        command = [sys.executable, "-m", "pytest", *options, str(ROOT / "tests/test_kernels.py")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        yield {"case": "tests/test_kernels.py", "remark": (done.stdout.strip() or done.stderr).splitlines()[-1]}
        if done.returncode:
            raise RuntimeError(done.stdout[-2000:])
    for line in checks(at.device, at.checked, at.checked_tokens):
        case = f"{line['backend']}, {line['dtype']}, {line['targets']} targets"
        remark = (
            f"ok: {line['ok']}; worst relative error {line['worst']:.1e} ({line['where']}), eager {line['eager']:.1e}"
        )
        yield {"case": case, "remark": remark}


def loss(case: str, at: Sizes) -> Lines:
    """Time, memory and error of the fused loss and its peers."""
    for divergence in ("JSD 0.5", "forward KL"):
        dtype = "bf16" if at.device == "cuda" else "float32"
        row = losses.Row(case, *at.cases[case], divergence, dtype, at.device, ("TRL", "Liger", "eager"))
        spent, errors = losses.times(row, at.rounds), losses.errors(row)
        for name, found in spent.items():
            line: dict[str, Any] = {"case": f"V = {row.V:,}, {divergence}: {name}"}
            if isinstance(found, str):
                if found != "left out":
                    yield line | {"remark": found}
                continue
            remarks = [f"{found / floor:.2f} of the floor"] if isinstance(floor := spent["floor"], float) else []
            if isinstance(error := errors.get(name), list):
                remarks.append(f"errors of hidden, weight {error[0]:.1e}, {error[1]:.1e}")
            extra = losses.once(row, name)[0] if name != "floor" else None
            yield line | {"seconds": found, "bytes": extra, "remark": "; ".join(remarks)}


def memory(at: Sizes) -> Lines:
    """Extra memory of the loss by the number of tokens."""
    for N, Hs, Ht, V in at.growth:
        dtype = "bf16" if at.device == "cuda" else "float32"
        row = losses.Row("growth", N, Hs, Ht, V, "forward KL", dtype, at.device)
        for name in (*backends(at.device), "eager"):
            extra, spent = losses.once(row, name)
            case = f"{N:,} tokens, {name}"
            yield {"case": case, "remark": extra} if isinstance(extra, str) else {
                "case": case, "seconds": spent, "bytes": extra,
            }  # fmt: skip


# Training steps.


def model(at: Sizes, size: tuple[int, int], seed: int) -> Any:
    from step import model

    with torch.device(at.device):
        return model(size, seed, at.vocabulary)


def teacher_model(at: Sizes) -> Any:
    return model(at, at.teacher, 2).to(torch.bfloat16).eval()


def batches(at: Sizes, count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(at.vocabulary, at.batch, generator=generator).to(at.device) for _ in range(count)]
    return [{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": x} for x in ids]


def train(
    at: Sizes, teacher: Any, given: list[dict[str, Tensor]] | None = None, **options: Any
) -> tuple[dict[str, Any], list[float]]:
    """What a few steps of a student take, and their losses."""
    from potstill import JSD, Distiller, Labels, Logits

    given = given or batches(at, at.steps)
    objective = [Labels()] if teacher is None else [Logits(JSD(0.5))]
    distiller = Distiller(model(at, at.student, 1), teacher, objective, **options).train()
    found = steps(distiller, given, at.device, skipped=at.skipped, bf16=True)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in given[at.skipped :]) / len(given[at.skipped :])
    line = {"seconds": found["seconds"], "bytes": found["peak_bytes"], "speed": tokens / found["seconds"]}
    return line | {"remark": f"first loss {found['losses'][0]:.5f}"}, found["losses"]


def step(at: Sizes) -> Lines:
    """An optimizer step on labels, and with a live teacher; the teacher on its own stream gives the same."""
    yield {"case": "labels alone", **train(at, None)[0]}
    teacher = teacher_model(at)
    line, plain = train(at, teacher)
    yield {"case": "live teacher", **line}
    line, ahead = train(at, teacher, prefetch=True)
    furthest = max(abs(a - b) for a, b in zip(plain, ahead, strict=True))
    yield {"case": "live teacher, one batch ahead", **line, "remark": f"losses differ by at most {furthest:.1e}"}


@torch.no_grad()
def cached_step(at: Sizes) -> Lines:
    """An optimizer step from the 64 likeliest tokens of a teacher, packed as in a cache."""
    from potstill import ModelTeacher
    from potstill.losses.alignment import causal_alignment
    from potstill.teachers.cache.codec import TopK
    from recorded import Recorded

    (batch,), teacher = batches(at, 1), ModelTeacher(teacher_model(at))
    rows, codec = at.batch[0], TopK(at.vocabulary, 64)
    start = time.perf_counter()
    alone = ({name: column[row : row + 1] for name, column in batch.items()} for row in range(rows))
    recorded = Recorded(codec, [teacher(row, causal_alignment(row["labels"])).targets for row in alone])
    spent, size = time.perf_counter() - start, sum(len(row) for row, _ in recorded.rows)
    written = f"{size / (rows * (at.batch[1] - 1)):.0f} bytes a token"
    yield {"case": "writing top-k 64", "seconds": spent, "speed": batch["input_ids"].numel() / spent, "remark": written}
    del teacher
    with torch.enable_grad():
        yield {"case": "step from a cache, top-k 64", **train(at, recorded, [batch] * at.steps)[0]}


def packing(at: Sizes) -> Lines:
    """Steps on the same rows of many lengths, padded and packed."""
    generator = torch.Generator().manual_seed(0)
    rows, longest = 2 * at.batch[0], at.batch[1]
    given = []
    for batch in batches(replace(at, batch=(rows, longest)), at.steps):
        lengths = (longest * torch.rand(rows, generator=generator) ** 2).long().clamp_min(2).to(at.device)
        mask = (torch.arange(longest, device=at.device) < lengths[:, None]).long()
        labels = batch["input_ids"].masked_fill(mask == 0, -100)
        given.append({"input_ids": batch["input_ids"], "attention_mask": mask, "labels": labels})
    share = float(torch.stack([batch["attention_mask"].float().mean() for batch in given]).mean())
    teacher = model(at, at.student, 2).to(torch.bfloat16).eval()
    line, plain = train(at, teacher, given)
    yield {"case": "rows of many lengths, padded", **line, "remark": f"{share:.0%} of the positions are tokens"}
    line, packed = train(at, teacher, given, packed_length=longest)
    furthest = max(abs(a - b) for a, b in zip(plain, packed, strict=True))
    yield {"case": "the same rows, packed", **line, "remark": f"losses differ by at most {furthest:.1e}"}


@contextmanager
def saved_teacher(at: Sizes) -> Iterator[str]:
    from potstill.models.loading import suppress_warnings

    with tempfile.TemporaryDirectory() as folder, suppress_warnings():
        teacher_model(replace(at, teacher=(at.teacher[0] // 2, at.teacher[1]))).save_pretrained(folder)
        yield folder


@torch.no_grad()
def compared(at: Sizes, whole: Any, other: Any) -> str:
    """KL to the whole model, and the memory of both."""
    from potstill import ForwardKL, token_divergence
    from potstill.losses.alignment import causal_alignment
    from potstill.models.placement import resident_bytes

    (batch,) = batches(replace(at, batch=(1, min(at.batch[1], 512))), 1)
    alignment = causal_alignment(batch["labels"])
    p, q = (teacher(batch, alignment).targets for teacher in (whole, other))
    kl = float(token_divergence(q.dense().float(), p, ForwardKL()).mean())
    sizes = (f"{mb(resident_bytes(teacher.model))} MB" for teacher in (other, whole))
    return f"KL to bfloat16 on one device {kl:.1e}; weights {' against '.join(sizes)}"


def quantized(at: Sizes) -> Lines:
    """A teacher in 4 bits beside itself in bfloat16."""
    from potstill import ModelTeacher
    from potstill.models.loading import load_model

    with saved_teacher(at) as folder:
        whole = ModelTeacher(load_model(folder, "teacher", "bfloat16").to(at.device))
        yield {"case": "teacher in bfloat16", **train(at, whole)[0]}
        other = ModelTeacher(load_model(folder, "teacher", "bfloat16", bits=4))
        yield {"case": "teacher in int4", **train(at, other)[0], "remark": compared(at, whole, other)}


def spread(at: Sizes) -> Lines:
    """A teacher of which half is on the GPU, the rest in memory (without a GPU: in memory, and on the disk)."""
    from potstill import ModelTeacher
    from potstill.models.loading import load_model

    with saved_teacher(at) as folder:
        whole = ModelTeacher(load_model(folder, "teacher", "bfloat16").to(at.device))
        half = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors")) * 6 // 10
        room = {at.home: half} | ({"cpu": "60GiB"} if at.device == "cuda" else {})
        placement = {"device_map": "auto", "max_memory": room, "offload_folder": f"{folder}/offload"}
        other = ModelTeacher(load_model(folder, "teacher", "bfloat16", placement=placement))
        places = sorted({str(place) for place in (getattr(other.model, "hf_device_map", None) or {}).values()})
        remark = f"on {', '.join(places)}; {compared(at, whole, other)}"
        yield {"case": "teacher spread by device_map", **train(at, other)[0], "remark": remark}


def smollm2(at: Sizes) -> Lines:
    """Half of the layers, distilled and on labels alone; every figure is of held-out text."""
    from rich.console import Console

    from potstill import Recipe, run
    from potstill.demo.recipe import TEACHER

    texts = [json.loads(line)["text"] for line in (at.models / "wiki.jsonl").read_text().splitlines()] if at.models \
        else (ROOT / "docs/recipe.md").read_text().split("\n\n")  # fmt: skip
    held_out, rows = texts[-48:], texts[:-48]
    if at.problems and at.problems.exists():
        solved = map(json.loads, at.problems.read_text().splitlines())
        rows += [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in solved]
    out = at.out / "smollm2"
    out.mkdir(parents=True, exist_ok=True)
    for name, those in (("train", rows), ("eval", held_out)):
        (out / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in those))
    length, batch = (512, 32) if at.models else (64, 4)
    dtype = "bfloat16" if at.device == "cuda" else "float32"
    teacher = str(at.models / "smollm2") if at.models else str(TEACHER)
    layers = 15 if at.models else 2
    recipe = Recipe.parse({
        "name": "smollm2", "teacher": {"model": teacher, "dtype": dtype},
        "student": {"design": {"num_hidden_layers": layers}, "initialize": {"method": "copy", "fit": bool(at.models)}},
        "data": {"train": {"path": str(out / "train.jsonl"), "field": "text"},
                 "eval": {"path": str(out / "eval.jsonl"), "field": "text"}, "max_length": length, "packing": True},
        "objective": [{"term": "logits", "weight": 0.5}, {"term": "labels", "weight": 0.5}],
        "train": {"max_steps": math.ceil(at.tokens / length / batch), "per_device_train_batch_size": batch,
                  "learning_rate": 5e-4, "lr_scheduler_type": "cosine", "warmup_steps": 0.05,
                  "bf16": at.device == "cuda"},
        "evaluate": {"baseline": True, "continuations": 0, "curve_rows": 8}, "output": str(out / "run"),
    })  # fmt: skip
    start = time.perf_counter()
    summary = run(recipe, resume=(out / "run").exists(), console=Console(quiet=True)).summary
    spent = time.perf_counter() - start
    for name, row in summary["rows"].items():
        kl = "" if row.get("kl") is None else f", KL to the teacher {row['kl']:.3f}"
        yield {"case": name, "remark": f"held-out loss {row['loss']:.3f}{kl}"}
    yield {"case": "the whole run", "seconds": spent, "remark": f"2 trainings of {at.tokens:,} tokens, and measuring"}


# The command.


class Part(NamedTuple):
    measure: Callable[[Sizes], Lines]
    budget: int  # seconds that it should take on an H200, start and compilation included
    needs: tuple[str, ...] = ()


PARTS = {
    "kernels": Part(kernels, 75),
    "loss, V of Llama": Part(partial(loss, "llama"), 60),
    "loss, V of Qwen": Part(partial(loss, "qwen"), 60),
    "memory": Part(memory, 15),
    "step": Part(step, 40, ("transformers", "accelerate")),
    "cached step": Part(cached_step, 30, ("transformers", "accelerate", "pyarrow", *PYDANTIC)),
    "packing": Part(packing, 30, ("transformers", "accelerate")),
    "int4": Part(quantized, 35, ("transformers", "accelerate", "bitsandbytes")),
    "device_map": Part(spread, 35, ("transformers", "accelerate")),
    "smollm2": Part(smollm2, 135, ("transformers", "accelerate", "pyarrow", *RUNS)),
}


def done(record: Record, name: str) -> bool:
    return any(line["part"] == name and "done" in line for line in record.lines)


def measure(name: str, at: Sizes, record: Record) -> None:
    """Measure a part to its end, or write down why it failed."""
    start = time.perf_counter()
    try:
        for line in PARTS[name].measure(at):
            record.add(part=name, **line)
    except Exception as error:
        traceback.print_exc()
        record.add(part=name, case="failed", remark=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    else:
        record.add(part=name, done=round(time.perf_counter() - start, 1))
    print(f"{name}: {time.perf_counter() - start:.0f} s of {PARTS[name].budget} s", flush=True)
    gc.collect()
    if at.device == "cuda":
        torch.cuda.empty_cache()


def show(record: Record, waiting: dict[str, str]) -> str:
    """A line for each measurement, the last of each case."""
    found = {(line["part"], line["case"]): line for line in record.lines if "case" in line}
    cells = []
    for name in PARTS:
        for (part, case), line in found.items():
            if part == name and not (case == "failed" and done(record, name)):
                spent = ms(line["seconds"]) if line.get("seconds") is not None else ""
                size = mb(line["bytes"]) if line.get("bytes") is not None else ""
                speed = f"{line['speed']:,.0f}" if "speed" in line else ""
                cells.append([name, case, spent, size, speed, line.get("remark", "")])
        if name in waiting:
            cells.append([name, "not measured", "", "", "", waiting[name]])
    return table(["part", "case", "ms", "memory, MB", "tokens/s", "remarks"], cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="in tiny sizes on the CPU, with Triton's interpreter")
    parser.add_argument("--minutes", type=float, default=9.0, help="a part that may take longer waits for the next run")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART")
    parser.add_argument("--models", type=Path, help="a folder with smollm2/ and wiki.jsonl, see benchmarks/real.py")
    parser.add_argument("--problems", type=Path, default=Path("../shared/data/gsm8k-train.jsonl"), help="more text")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-gpu"))
    args = parser.parse_args()
    start = time.perf_counter()
    if args.dry:
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which nothing has done yet
    elif not torch.cuda.is_available():
        sys.exit("gpu.py: expected a CUDA device, got none. Rehearse without one: --dry.")
    at = replace(DRY if args.dry else GPU, models=args.models, problems=args.problems, out=args.out)
    args.out.mkdir(parents=True, exist_ok=True)
    record, waiting = Record(args.out / "rows.jsonl"), {}
    for name in args.parts:
        part, left = PARTS[name], args.minutes * 60 - (time.perf_counter() - start)
        missing = [package for package in part.needs if find_spec(package) is None]
        if done(record, name):
            continue
        if missing:
            waiting[name] = f"needs {', '.join(missing)}"
        elif name == "smollm2" and not (args.models or args.dry):
            waiting[name] = "needs --models DIR"
        elif part.budget > left:
            waiting[name] = f"left for the next run: {part.budget} s may be more than the {left:.0f} s that are left"
        else:
            measure(name, at, record)
            continue
        print(f"{name}: {waiting[name]}", flush=True)
    lines = [f"{key}: {value}" for key, value in machine(at.device).items()]
    page = "\n".join([*lines, "", show(record, waiting), ""])
    (args.out / "table.md").write_text(page)
    print(page)
    if failed := [name for name in args.parts if name not in waiting and not done(record, name)]:
        sys.exit(f"Failed: {', '.join(failed)}. Run it again to repeat them.")


if __name__ == "__main__":
    main()
