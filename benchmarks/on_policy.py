"""Is on-policy distillation fast? Beside TRL, where it is installed: .venv/bin/python benchmarks/on_policy.py

A student of 4 layers of width 256, a teacher of 6 layers of width 512, 32,000 tokens, 8 prompts of 64 tokens and 128
new ones (but for one text in 250, which ends by chance), reverse KL, the same weights, prompts, AdamW and threads. Each
runs in a process of its own; with OMP_NUM_THREADS=1 the processor's seconds are counted. own_text.py
measures the benefit of on-policy samples.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from concurrent.futures.process import BrokenProcessPool
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
)

from measure import Peak, fresh, installed, keep, machine
from potstill import DistillationConfig, DistillationTrainer, Logits, ModelTeacher, ReverseKL, Sampling
from potstill.data.batches import PaddingCollator
from potstill.train.rollout import Rollout

VOCABULARY, PROMPTS, PROMPT, NEW = 32000, 8, 64, 128


def llama(width: int, layers: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    return LlamaForCausalLM(config)


def words() -> PreTrainedTokenizerFast:
    """Every token is a word of its own, so that TRL can have its prompts as text."""
    tokens = {"<end>": 0, "<pad>": 1, **{f"w{i}": i for i in range(2, VOCABULARY)}}
    made = Tokenizer(models.WordLevel(tokens, unk_token="<pad>"))
    made.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<pad>")


def prompts(steps: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, VOCABULARY, (PROMPTS * steps, PROMPT), generator=generator).tolist()


def common(directory: str, steps: int) -> dict[str, Any]:
    return {
        "output_dir": directory,
        "max_steps": steps,
        "per_device_train_batch_size": PROMPTS,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "report_to": "none",
        "bf16": False,
        "gradient_checkpointing": False,
    }


def now() -> float:
    """Seconds; of the processor where there is one thread, which other work on the machine does not change."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


class Clock(TrainerCallback):
    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.peak = Peak("cpu")
        self.ends.append(now())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(now())


def timed(owner: Any, name: str, spent: dict[str, float], key: str) -> None:
    """Count the seconds of a method."""
    call = getattr(owner, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        start = now()
        try:
            return call(*args, **kwargs)
        finally:
            spent[key] = spent.get(key, 0.0) + now() - start

    setattr(owner, name, counted)


def ours(directory: str, steps: int, spent: dict[str, float]) -> Trainer:
    rows = [{"input_ids": p + p[:1], "labels": [-100] * PROMPT + p[:1]} for p in prompts(steps)]
    student, teacher = llama(256, 4, 1), ModelTeacher(llama(512, 6, 2))
    rollout = Rollout(words(), Sampling(max_new_tokens=NEW), share=1.0)
    timed(rollout, "_generate", spent, "generation")
    trainer = DistillationTrainer(
        student,
        teacher,
        [Logits(ReverseKL())],
        DistillationConfig(**common(directory, steps)),
        rows,
        data_collator=PaddingCollator(1),
        rollout=rollout,
    )
    timed(trainer.distiller, "_ask", spent, "teacher")
    return trainer


def trl(directory: str, steps: int, spent: dict[str, float]) -> Trainer:
    from datasets import Dataset
    from trl import DistillationConfig as TheirConfig
    from trl import DistillationTrainer as TheirTrainer

    texts = [" ".join(f"w{i}" for i in p) for p in prompts(steps)]
    arguments = TheirConfig(**common(directory, steps), max_completion_length=NEW, temperature=1.0, beta=1.0)
    trainer = TheirTrainer(
        model=llama(256, 4, 1),
        teacher_model=llama(512, 6, 2),
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": texts}),
        processing_class=words(),
    )
    timed(trainer, "_generate", spent, "generation")
    return trainer


def measure(name: str, steps: int) -> dict[str, float | None]:
    """Seconds a step, by the median after the first two; those of its parts, by the mean; and peak bytes."""
    clock, spent = Clock(), dict[str, float]()
    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(sys.stderr):
        trainer = {"potstill": ours, "TRL": trl}[name](directory, steps, spent)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(clock)
        trainer.train()
    by_step = [end - start for start, end in pairwise(clock.ends[2:])]
    return {
        "seconds": statistics.median(by_step),
        **{f"{key}_seconds": value / steps for key, value in spent.items()},
        "peak_bytes": clock.peak.bytes(),
        "extra_bytes": clock.peak.extra(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--out", type=Path, help="also as JSON")
    args = parser.parse_args()
    results: dict[str, Any] = {}
    for name in ("potstill", "TRL"):
        if name == "TRL" and installed("trl") is None:
            results[name] = "not installed"
            continue
        try:
            results[name] = fresh(measure, name, args.steps)
        except BrokenProcessPool:
            results[name] = "out of memory"
        print(name, results[name], file=sys.stderr, flush=True)
    keep(args.out, {"command": " ".join(sys.argv), "machine": machine("cpu"), "results": results})
    print("\n".join(f"{key}: {value}" for key, value in machine("cpu").items()))
    for name, result in results.items():
        print(name, result)


if __name__ == "__main__":
    main()
