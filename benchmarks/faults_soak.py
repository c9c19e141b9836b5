"""A soak: .venv/bin/python benchmarks/faults_soak.py --hours 6 [--out DIR]

Trains a toy on a cache of its teacher's signals and on-policy samples, with held-out evaluations, for so long. Memory
and open files are measured at every evaluation. A soak that is interrupted goes on from its last checkpoint: what each
process measured is compared within that process. Afterwards the first steps are compared with those of a short run.
Prints a Markdown table; the exit status is 1 where something grows or differs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import psutil
import yaml
from transformers import PrinterCallback, TrainerCallback

from fault_toys import is_time, make_toys, potstill
from potstill.runs.build import build_run
from potstill.runs.config.run import Recipe
from potstill.runs.steps import training_arguments
from potstill.train.callbacks import MetricsFile, logged_lines
from potstill.train.checkpoints import last_checkpoint, remove_incomplete
from potstill.train.trainer import DistillationTrainer

SHORT_STEPS = 100  # of the run that the beginning is compared with
EVERY = 25  # steps between evaluations, checkpoints and measurements
WARM = 0.25  # share of the soak after which memory is compared: allocators and caches have filled by then
LEAST = 20  # measurements of a process: one with fewer shows no trend
NOISE = 3.0  # standard errors of the slope of memory
MOST_GROWTH = 0.01  # of the memory, over the measured part


class Soak(TrainerCallback):
    """Measures the process at every evaluation, and ends the training when all processes have trained long enough."""

    def __init__(self, seconds: float, log: Path, out: Path) -> None:
        self.seconds, self.log, self.out, self.process = seconds, log, out, psutil.Process()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        earlier = logged_lines(self.out)
        self.number = earlier[-1]["process"] + 1 if earlier else 0
        self.start = time.monotonic() - (earlier[-1]["seconds"] if earlier else 0.0)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        line = {
            "process": self.number,
            "seconds": round(time.monotonic() - self.start, 1),
            "step": state.global_step,
            "resident": self.process.memory_info().rss,
            "files": self.process.num_fds(),
            "log": self.log.stat().st_size,
        }
        with self.out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if line["seconds"] > self.seconds:
            control.should_training_stop = True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=6.0)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-soak"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    toys = make_toys(args.out / "toys")
    if not (toys / "signals").exists():
        build = ("cache", "build", "run.yaml", "--codec", "top_k", "--top-k", "16", "--out", "signals")
        done = potstill(*build, folder=toys)
        assert done.status == 0, done.output
    measured = args.out / "soak.jsonl"
    short = train(toys, args.out / "short", SHORT_STEPS, [])
    log = args.out / "long" / "metrics.jsonl"
    long = train(toys, log.parent, 10**7, [Soak(3600 * args.hours, log, measured)])
    sys.exit(not report(logged_lines(measured), short, long))


def train(toys: Path, out: Path, steps: int, soak: list[Soak]) -> list[dict[str, Any]]:
    """Train up to so many steps at a constant rate, and return the lines of metrics.jsonl."""
    values = yaml.safe_load((toys / "run.yaml").read_text())
    values["teacher"] = {"model": str(toys / "teacher"), "cache": str(toys / "signals")}
    for part in ("train", "eval"):
        values["data"][part]["path"] = str(toys / f"{part}.jsonl")
    values["rollout"] = {"on_policy_fraction": 0.25, "max_new_tokens": 8}
    values["train"] |= {
        "max_steps": steps,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 10,
        "eval_steps": EVERY,
        "save_steps": EVERY,
    }
    values["output"] = str(out)
    out.mkdir(parents=True, exist_ok=True)
    built, metrics, checkpoints = build_run(Recipe.parse(values)), out / "metrics.jsonl", out / "checkpoints"
    remove_incomplete(checkpoints)
    checkpoint = last_checkpoint(checkpoints)
    trainer = DistillationTrainer(
        student=built.new_student(),
        teacher=built.teacher,
        objective=built.objective,
        args=training_arguments(built, "student", checkpoints),
        train_dataset=built.train.dataset,
        eval_dataset=built.curve,
        processing_class=built.tokenizer,
        vocabulary=built.vocabulary,
        rollout=built.new_rollout(),
        callbacks=[MetricsFile(metrics, "student"), *soak],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return logged_lines(metrics)


def report(lines: list[dict[str, Any]], short: list[dict[str, Any]], long: list[dict[str, Any]]) -> bool:
    """Print what the soak showed; return whether all of it is as it should be."""
    processes = [list(group) for _, group in groupby(lines, lambda line: line["process"])]
    processes = [process for process in processes if len(process) >= LEAST]
    rows = {"steps": (f"{lines[-1]['step']:,}", True), "hours": (f"{lines[-1]['seconds'] / 3600:.2f}", True)}
    for process in processes:
        name = f"resident memory of process {process[0]['process'] + 1}, MB"
        rows[name] = memory_of(process[int(WARM * len(process)) :])
    first, last = (max(process[i]["files"] for process in processes) for i in (0, -1))
    log_slope = [(b["log"] - a["log"]) / EVERY for each in processes for a, b in pairwise(each)]
    without_times = [[{k: v for k, v in line.items() if not is_time(k)} for line in run] for run in (short, long)]
    compared = [line for line in without_times[0] if line["step"] <= SHORT_STEPS and "epoch" in line][:-1]
    rows |= {
        "open files": (f"{min(x['files'] for x in lines)} to {max(x['files'] for x in lines)}", last <= first),
        "log, bytes a step": (
            f"{statistics.mean(log_slope):.1f}, at most {max(log_slope):.1f}",
            max(log_slope) < 1.25 * statistics.mean(log_slope),
        ),
        "lines of the first steps that equal those of a short run": (
            f"{sum(a == b for a, b in zip(compared, without_times[1], strict=False))} of {len(compared)}",
            compared == without_times[1][: len(compared)],
        ),
    }
    print("| | measured | as promised |\n|---|---|---|")
    for name, (text, held) in rows.items():
        print(f"| {name} | {text} | {'yes' if held else 'no'} |")
    return all(held for _, held in rows.values())


def memory_of(lines: list[dict[str, Any]]) -> tuple[str, bool]:
    """The memory of one process in words, and whether it stays."""
    steps, memory = [line["step"] for line in lines], [line["resident"] / 1e6 for line in lines]
    slope, error = trend(steps, memory)
    length = steps[-1] - steps[0]
    growth, noise = slope * length, NOISE * error * length
    text = f"{memory[0]:.1f} to {memory[-1]:.1f}, trend {growth:+.2f} (3 standard errors: {noise:.2f})"
    return text, growth < max(noise, MOST_GROWTH * memory[0])


def trend(x: list[int], y: list[float]) -> tuple[float, float]:
    """The slope of a line through points, and its standard error."""
    slope, intercept = statistics.linear_regression(x, y)
    residual = sum((b - intercept - slope * a) ** 2 for a, b in zip(x, y, strict=True))
    spread = sum((a - statistics.mean(x)) ** 2 for a in x)
    return slope, (residual / max(len(x) - 2, 1) / spread) ** 0.5


if __name__ == "__main__":
    main()
