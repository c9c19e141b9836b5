"""A whole training step beside its peers: tokens a second and peak memory.

    .venv/bin/python benchmarks/step.py          # some minutes and 11 GB on 2 cores
    .venv/bin/python benchmarks/step.py --quick  # smaller models and batches: does it run here?

TRL runs where it is installed (`.venv/bin/python -m pip install trl==1.16.0`); without it its row says so.

A student of 4 layers of width 256, a teacher of 6 layers of width 512, 32,000 tokens in the vocabulary, batches of
8 x 512 random tokens. The same weights, batches, AdamW, clipping and threads for all three, no gradient checkpointing
(which is TRL's default); with --bf16 student and teacher of both compute in it:

    labels    transformers.Trainer: the student alone, its own cross-entropy
    potstill  DistillationTrainer: JSD with beta 0.5, nothing else
    TRL       GKDTrainer, off-policy (lmbda 0), beta 0.5

Each runs in a process of its own. Every token has a label, so that 511 predictions of a row count; a token is one of
the 8 x 512 that go in, by the median step after the first ones. The peak is that of the whole process while it trains
(torch's own count on CUDA); beside it, what of that came after the start, when libraries, models and data were there.
The first step's loss shows that potstill and TRL compute the same thing.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from measure import Peak, fresh, has_bf16, installed, keep, machine, synchronize, table

VOCABULARY = 32000


@dataclass(frozen=True)
class Setting:
    """What all three share."""

    device: str
    bf16: bool
    steps: int
    skipped: int
    rows: int
    length: int
    student: tuple[int, int]  # width, layers
    teacher: tuple[int, int]


class Clock(TrainerCallback):
    """When each step ended."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.ends: list[float] = []  # from the beginning of the first

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.peak = Peak(self.device)
        self.ends.append(time.perf_counter())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        synchronize(self.device)
        self.ends.append(time.perf_counter())


def model(size: tuple[int, int], seed: int, vocabulary: int = VOCABULARY) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    width, layers = size
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
    )
    return LlamaForCausalLM(config)


def data(setting: Setting) -> Any:
    """Random tokens: nothing is padded and everything has a label."""
    from datasets import Dataset

    generator = torch.Generator().manual_seed(0)
    count = setting.steps * setting.rows
    ids = torch.randint(VOCABULARY, (count, setting.length), generator=generator).tolist()
    columns = {"input_ids": ids, "labels": ids, "attention_mask": [[1] * setting.length] * count}
    return Dataset.from_dict(columns)


def tokenizer() -> PreTrainedTokenizerFast:
    """GKDTrainer asks for one; it has nothing to do."""
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"<eos>": 0}, unk_token="<eos>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")


def options(setting: Setting, directory: str) -> dict[str, Any]:
    """The arguments of all three trainers."""
    return {
        "output_dir": directory,
        "max_steps": setting.steps,
        "per_device_train_batch_size": setting.rows,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "bf16": setting.bf16,
        "use_cpu": setting.device == "cpu",
        "dataloader_pin_memory": setting.device != "cpu",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "report_to": "none",
        "seed": 0,
    }


def labels(setting: Setting, directory: str) -> Trainer:
    arguments = TrainingArguments(**options(setting, directory))
    return Trainer(model(setting.student, 1), arguments, default_data_collator, data(setting))


def potstill(setting: Setting, directory: str) -> Trainer:
    from potstill import JSD, DistillationConfig, DistillationTrainer, Logits, ModelTeacher

    return DistillationTrainer(
        model(setting.student, 1),
        ModelTeacher(model(setting.teacher, 2), dtype=torch.bfloat16 if setting.bf16 else None),
        [Logits(JSD(0.5))],
        DistillationConfig(**options(setting, directory)),
        data(setting),
        data_collator=default_data_collator,
    )


def trl(setting: Setting, directory: str) -> Trainer:
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    without_teacher_text = {"lmbda": 0.0, "beta": 0.5, "gradient_checkpointing": False, "max_length": setting.length}
    arguments = GKDConfig(**options(setting, directory), **without_teacher_text)
    return GKDTrainer(
        model(setting.student, 1),
        model(setting.teacher, 2),
        arguments,
        default_data_collator,
        data(setting),
        processing_class=tokenizer(),
    )


TRAINERS = {"labels": labels, "potstill": potstill, "TRL": trl}


def train(name: str, setting: Setting) -> dict[str, float | None]:
    """Tokens a second, peak bytes, those after the start, and the first step's loss."""
    clock = Clock(setting.device)
    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(sys.stderr):
        trainer = TRAINERS[name](setting, directory)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(clock)
        trainer.train()
    by_step = [end - start for start, end in pairwise(clock.ends[setting.skipped :])]
    return {
        "tokens_per_second": setting.rows * setting.length / statistics.median(by_step),
        "peak_bytes": clock.peak.bytes(),
        "extra_bytes": clock.peak.extra(),
        "first_loss": next(line["loss"] for line in trainer.state.log_history if "loss" in line),
    }


def show(results: dict[str, dict[str, Any] | str]) -> str:
    """A line by trainer, its ratios to potstill's and to plain training's in brackets."""
    header = ["", "tokens/s (/ potstill, / labels)", "peak, GB (/ potstill)", "after the start, GB", "first loss"]
    cells = []
    for name, result in results.items():
        if isinstance(result, str):
            cells.append([name, result, "", "", ""])
            continue
        ratios = [ratio(result, results.get(other), "tokens_per_second") for other in ("potstill", "labels")]
        peak = f"{gb(result['peak_bytes'])} ({ratio(result, results.get('potstill'), 'peak_bytes')})"
        speed = f"{result['tokens_per_second']:,.0f} ({', '.join(ratios)})"
        cells.append([name, speed, peak, gb(result["extra_bytes"]), f"{result['first_loss']:.5f}"])
    return table(header, cells)


def ratio(result: dict[str, Any], to: dict[str, Any] | str | None, key: str) -> str:
    return f"{result[key] / to[key]:.2f}" if isinstance(to, dict) and to[key] and result[key] else "-"


def gb(size: int | None) -> str:
    return "not measured" if size is None else f"{size / 2**30:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--bf16", action="store_true", help="under bf16 autocast")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--skipped", type=int, default=2, help="first steps that are not timed")
    parser.add_argument("--only", nargs="+", choices=list(TRAINERS), default=list(TRAINERS))
    parser.add_argument("--quick", action="store_true", help="2 layers each, batches of 2 x 64")
    parser.add_argument("--out", type=Path, help="also as JSON")
    args = parser.parse_args()
    small = (2, 64, (64, 2), (128, 2))
    shape = small if args.quick else (8, 512, (256, 4), (512, 6))
    setting = Setting(args.device, args.bf16, args.steps, args.skipped, *shape)
    if args.bf16 and not has_bf16(args.device):
        print("bf16 without instructions for it: slower than float32 here", file=sys.stderr)

    results: dict[str, Any] = {}
    for name in args.only:
        if name == "TRL" and installed("trl") is None:
            results[name] = "not installed"
            continue
        try:
            results[name] = fresh(train, name, setting)
        except BrokenProcessPool:
            results[name] = "out of memory"
    system = machine(args.device)
    keep(args.out, {"command": " ".join(sys.argv), "machine": system, "setting": vars(setting), "results": results})
    print("\n".join(f"{key}: {value}" for key, value in system.items()))
    kind = "bf16" if setting.bf16 else "float32"
    print(f"{kind}, {setting.steps} steps, {setting.skipped} not timed\n\n{show(results)}")


if __name__ == "__main__":
    main()
