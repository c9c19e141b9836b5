"""What a step of distillation costs on a real model, beside plain fine-tuning: .venv/bin/python benchmarks/real_step.py

A student of a third of the feed-forward units of models/smollm2 (--teacher), batches of 4 x 256 tokens, AdamW, products
in bfloat16 where the machine has instructions for it. *Labels* is the student's own loss as transformers computes it;
*live* is forward KL and labels beside the teacher, *cached* the same from stored signals. The floor is the matrix
products of the linear layers and heads alone, in the shapes that occur: three for each of the student's, one for each
of the teacher's where it runs. Each is measured in a process of its own, by the median step after the first ones, of
the processor's time where there is one thread. --profile NAME prints where the time of one goes.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

import measure
from measure import fresh, machine, table
from potstill import Distiller
from potstill.data.batches import in_batches
from potstill.data.sources import in_parts
from potstill.models.loading import has_bfloat16, load_model
from potstill.runs import cache
from potstill.runs.build import BuiltRun, build_run
from potstill.runs.cache import CacheRequest
from potstill.runs.config.run import Recipe
from real import HALF, read, write

BATCH, LENGTH, SKIPPED = 4, 256, 3
DTYPE = torch.bfloat16 if has_bfloat16() else torch.float32
LABELS = [{"term": "labels"}]
WAYS = {
    "labels": (LABELS, None),
    "live": (HALF, None),
    "cached: 64 likeliest tokens": (HALF, {"codec": "top_k", "k": 64}),
    "cached: 50 samples": (HALF, {"codec": "sampled", "draws": 50}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, default=Path("models/smollm2"))
    parser.add_argument("--data", type=Path, default=Path("models/wiki.jsonl"))
    parser.add_argument("--units", type=int, default=512)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--profile", choices=[*WAYS])
    args = parser.parse_args()
    if args.profile:
        fresh(profile, args.profile, args)
        return
    floors = fresh(floor, args)
    rows = []
    for name in WAYS:
        got = fresh(train, name, args)
        least = floors["student"] + (floors["teacher"] if name == "live" else 0)
        cells = f"{got['seconds']:.2f}", f"{least:.2f}", f"{got['seconds'] / least:.2f}"
        rows.append([name, *cells, f"{BATCH * LENGTH / got['seconds']:,.0f}", f"{got['peak_bytes'] / 2**30:.2f}"])
        print(*rows[-1], flush=True)
    print(*(f"{key}: {value}" for key, value in machine("cpu").items()), sep="\n")
    print(table(["", "step, s", "floor, s", "of floor", "tokens a second", "peak, GB"], rows))


def built_run(name: str, args: Any, folder: Path) -> BuiltRun:
    """A run whose teacher is live or stored, on as many rows as the steps need."""
    objective, codec = WAYS[name]
    write(folder / "text.jsonl", read(args.data)[: 3 * BATCH * args.steps])
    teacher = {"model": str(args.teacher), "dtype": str(DTYPE).removeprefix("torch.")}
    data = {"train": {"path": str(folder / "text.jsonl")}, "max_length": LENGTH, "packing": True}
    recipe = Recipe.parse({
        "name": "step", "teacher": teacher | ({"cache": str(folder / "cache")} if codec else {}),
        "student": {"design": {"intermediate_size": args.units}},
        "data": data | {"eval": {"path": str(folder / "text.jsonl")}},
        "objective": objective, "output": str(folder / "run"),
        "train": {"num_train_epochs": 1, "per_device_train_batch_size": BATCH},
    })  # fmt: skip
    if codec:
        parameters = {key: value for key, value in codec.items() if key != "codec"}
        out = folder / "cache"
        sources = [*in_parts(recipe.data.train)]
        request = CacheRequest(recipe.teacher, sources, LENGTH, True, codec["codec"], parameters, out)
        cache.build(request, console=Console(quiet=True))
    return build_run(recipe)


def prepare(name: str, args: Any, folder: Path) -> tuple[Any, list[Any]]:
    """A distiller and its batches, each of BATCH full rows."""
    built = built_run(name, args, folder)
    rows = built.train.dataset.filter(lambda row: len(row["input_ids"]) == LENGTH)
    batches = list(in_batches(rows.select(range(BATCH * args.steps)), built.tokenizer, BATCH))
    student = built.new_student()
    if name == "labels":
        return Plain(student), batches
    return Distiller(student, built.teacher, built.objective, vocabulary=built.vocabulary), batches


class Plain(nn.Module):
    """A model that computes its own loss, with the methods of a distiller."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.train()

    def prefetch(self, batches: Any) -> None:
        pass

    def step(self, batch: Any) -> Any:
        return self.model(**{key: batch[key] for key in ("input_ids", "attention_mask", "labels")})


def train(name: str, args: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        distiller, batches = prepare(name, args, Path(folder))
        return measure.steps(distiller, batches, "cpu", skipped=SKIPPED, bf16=has_bfloat16())


def profile(name: str, args: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        distiller, batches = prepare(name, args, Path(folder))
        measure.steps(distiller, batches[:SKIPPED], "cpu", skipped=0, bf16=has_bfloat16())
        with torch.profiler.profile() as trace:
            measure.steps(distiller, batches[SKIPPED : SKIPPED + 2], "cpu", skipped=0, bf16=has_bfloat16())
        print(trace.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))


def floor(args: Any) -> dict[str, float]:
    """Seconds of the products of a step: the student's, forward and backward, and the teacher's forward."""
    with tempfile.TemporaryDirectory() as folder:
        student = built_run("labels", args, Path(folder)).new_student()
    teacher = load_model(str(args.teacher), "teacher", "float32", "causal")
    return {"student": products(student, True), "teacher": products(teacher, False)}


def products(model: nn.Module, backward: bool) -> float:
    shapes: dict[tuple[int, int], int] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear):
            shape = module.out_features, module.in_features
            shapes[shape] = shapes.get(shape, 0) + 1
    total = 0.0
    for (outputs, inputs), count in shapes.items():
        x, w = torch.randn(BATCH * LENGTH, inputs).to(DTYPE), torch.randn(outputs, inputs).to(DTYPE)
        y = x @ w.T

        def run(x: Any = x, w: Any = w, y: Any = y) -> None:
            x @ w.T
            if backward:
                y @ w
                y.T @ x

        times = [measure.seconds(run, "cpu") for _ in range(7)]
        total += count * sorted(times)[3]
    return total


if __name__ == "__main__":
    main()
