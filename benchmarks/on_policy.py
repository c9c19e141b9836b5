"""On-policy distillation: does it work, and is it fast?

    .venv/bin/python benchmarks/on_policy.py works   # a task with an exact check; minutes to an hour on one core
    .venv/bin/python benchmarks/on_policy.py speed   # beside TRL, where it is installed

`works`: strings of 4 to 8 letters are to be written backwards. The teacher (2 layers of width 128) learns until it
writes at least 99% of unseen strings right. Every student (2 layers of width 48) begins with the same weights for each
seed, has learnt from 500 rows for 500 steps (its beginning), and then makes the same number of updates, each of
32 rows, by one of:

    labels     cross-entropy with 500 strings and their answers
    data       forward KL to the teacher on those strings
    seqkd      cross-entropy with what the teacher writes behind those prompts
    mixed      forward KL on half data, half what the teacher writes
    gkd        JSD(0.5) on half data, half own text
    on_policy  reverse KL on own text alone
    policy     the policy gradient of sampled tokens on own text
    minillm    MiniLLM whole, with 0.2 of the teacher in what is drawn

Measured: the share of 500 unseen strings that the student writes right from beginning to end, greedily;
and the processor's seconds that the updates took. Results are kept as they come (--out),
and a run goes on where it was stopped.

`speed`: a student of 4 layers of width 256, a teacher of 6 layers of width 512, 32,000 tokens, 8 prompts of 64 tokens
and 128 new ones (but for one text in 250, which ends by chance), reverse KL, the same weights, prompts, AdamW and
threads. Each runs in a process of its own; with OMP_NUM_THREADS=1 the processor's seconds are counted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
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
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
)

from measure import Peak, fresh, installed, keep, machine, table
from potstill import (
    JSD,
    DistillationConfig,
    DistillationTrainer,
    ForwardKL,
    Labels,
    Logits,
    ModelTeacher,
    ReverseKL,
    Sampling,
)
from potstill.data import PaddingCollator
from potstill.engines.decode import write
from potstill.train import PolicyGradient, Rollout, teacher_mix

LETTERS = 16
END, PAD, ASK = LETTERS, LETTERS + 1, LETTERS + 2
VOCABULARY = LETTERS + 3
ROWS, UPDATES, BEGINNING, DATA = 32, 600, 500, 500
Row = dict[str, list[int]]


# The task.


def strings(count: int, seed: int) -> list[list[int]]:
    chance = random.Random(seed)
    return [[chance.randrange(LETTERS) for _ in range(chance.randint(4, 8))] for _ in range(count)]


def row(string: list[int], answer: list[int] | None = None) -> Row:
    prompt = [*string, ASK]
    answer = [*string[::-1], END] if answer is None else answer
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def words() -> PreTrainedTokenizerFast:
    tokens = {**{chr(97 + i): i for i in range(LETTERS)}, "<end>": END, "<pad>": PAD, "=": ASK}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(tokens, unk_token="<pad>")), eos_token="<end>", pad_token="<pad>"
    )


def llama(width: int, layers: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    return LlamaForCausalLM(config)


def right(model: LlamaForCausalLM, unseen: list[list[int]]) -> float:
    """The share of strings that a model writes backwards without a mistake."""
    greedy = Sampling(max_new_tokens=12, sampling_temperature=0)
    written = write(model, [[*s, ASK] for s in unseen], greedy, ends=frozenset({END}), batch_size=500)
    return sum(t.ids == [*s[::-1], END] for s, t in zip(unseen, written, strict=True)) / len(unseen)


def learn(
    student: LlamaForCausalLM,
    teacher: LlamaForCausalLM | None,
    objective: list[Any],
    rows: list[Row],
    steps: int,
    rate: float,
    seed: int,
    rollout: Rollout | None = None,
) -> float:
    """Train a student in place; the seconds that it took."""
    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(sys.stderr):
        trainer = DistillationTrainer(
            student,
            teacher,
            objective,
            DistillationConfig(
                output_dir=directory,
                max_steps=steps,
                per_device_train_batch_size=ROWS,
                learning_rate=rate,
                lr_scheduler_type="linear",
                warmup_steps=20,
                logging_steps=100,
                save_strategy="no",
                disable_tqdm=True,
                seed=seed,
                use_cpu=True,
            ),
            rows,
            data_collator=PaddingCollator(PAD),
            rollout=rollout,
        )
        trainer.remove_callback(PrinterCallback)
        start = time.process_time()
        trainer.train()
        return time.process_time() - start


def make_teacher(kept: Path, unseen: list[list[int]]) -> LlamaForCausalLM:
    if (kept / "config.json").exists():
        return LlamaForCausalLM.from_pretrained(kept).eval()
    teacher = llama(128, 2, 100)
    for round_ in range(12):
        learn(teacher, None, [Labels()], [row(s) for s in strings(64_000, 1000 + round_)], 500, 2e-3, round_)
        score = right(teacher, unseen)
        print(f"teacher after {500 * (round_ + 1)} steps: {score:.3f}", file=sys.stderr, flush=True)
        if score >= 0.99:
            break
    teacher.save_pretrained(kept)
    return teacher.eval()


METHODS = ("labels", "data", "seqkd", "mixed", "gkd", "on_policy", "policy", "minillm")


def one(method: str, seed: int, teacher: LlamaForCausalLM, unseen: list[list[int]], steps: int) -> dict[str, float]:
    """A student of a method: its score before and after, its KL on the data, and its seconds."""
    known = strings(DATA, 10 + seed)
    data = [row(s) for s in known]
    student = llama(48, 2, seed)
    learn(student, None, [Labels()], data, BEGINNING, 3e-3, seed)
    before = right(student, unseen)
    draws = Sampling(max_new_tokens=12, seed=seed)
    taught = []
    if method in ("seqkd", "mixed"):
        said = write(teacher, [[*s, ASK] for s in known], draws, ends=frozenset({END}), batch_size=300)
        taught = [row(s, text.ids) for s, text in zip(known, said, strict=True)]
    objective: list[Any] = {
        "labels": [Labels()],
        "data": [Logits(ForwardKL())],
        "seqkd": [Labels()],
        "mixed": [Logits(ForwardKL())],
        "gkd": [Logits(JSD(0.5))],
        "on_policy": [Logits(ReverseKL())],
        "policy": [PolicyGradient()],
        "minillm": [PolicyGradient(discount=1.0, single_step=True, length_normalization=True, whiten=True, clip=0.2)],
    }[method]
    share = {"gkd": 0.5, "on_policy": 1.0, "policy": 1.0, "minillm": 1.0}.get(method)
    guide = teacher_mix(teacher, 0.2) if method == "minillm" else None
    rollout = None if share is None else Rollout(words(), draws, share=share, seed=seed, guide=guide)
    rows = taught if method == "seqkd" else data + taught
    seconds = learn(student, teacher, objective, rows, steps, 2e-3, seed, rollout)
    return {"before": before, "after": right(student, unseen), "seconds": seconds}


def works(args: argparse.Namespace) -> None:
    unseen = strings(500, 1)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    teacher = make_teacher(args.out.with_suffix(".teacher"), unseen)
    results: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    results["teacher"] = right(teacher, unseen)
    for seed in range(args.seeds):
        for method in args.only:
            if f"{method} {seed}" not in results:
                results[f"{method} {seed}"] = one(method, seed, teacher, unseen, args.updates)
                print(method, seed, results[f"{method} {seed}"], file=sys.stderr, flush=True)
                args.out.write_text(json.dumps(results, indent=1))
    cells = []
    for method in METHODS:
        found = [results[key] for seed in range(args.seeds) if (key := f"{method} {seed}") in results]
        if found:
            after = [one["after"] for one in found]
            spread = f" ± {statistics.stdev(after):.3f}" if len(after) > 1 else ""
            before, seconds = (statistics.mean(one[key] for one in found) for key in ("before", "seconds"))
            match = f"{statistics.mean(after):.3f}{spread}"
            cells.append([method, f"{before:.3f}", match, f"{seconds:.0f}", str(len(found))])
    print("\n".join(f"{key}: {value}" for key, value in machine("cpu").items()))
    print(f"teacher: {results['teacher']:.3f}, {args.updates} updates of {ROWS} rows\n")
    print(table(["", "before", "exact match after", "seconds", "seeds"], cells))


# Beside TRL.

SPEED_VOCABULARY, PROMPTS, PROMPT, NEW = 32000, 8, 64, 128


def large(width: int, layers: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=SPEED_VOCABULARY,
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


def many_words() -> PreTrainedTokenizerFast:
    """Every token is a word of its own, so that TRL can have its prompts as text."""
    tokens = {"<end>": 0, "<pad>": 1, **{f"w{i}": i for i in range(2, SPEED_VOCABULARY)}}
    made = Tokenizer(models.WordLevel(tokens, unk_token="<pad>"))
    from tokenizers.pre_tokenizers import WhitespaceSplit

    made.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<pad>")


def prompts(steps: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, SPEED_VOCABULARY, (PROMPTS * steps, PROMPT), generator=generator).tolist()


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
    student, teacher = large(256, 4, 1), ModelTeacher(large(512, 6, 2))
    rollout = Rollout(many_words(), Sampling(max_new_tokens=NEW), share=1.0)
    timed(rollout, "_write", spent, "generation")
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
        model=large(256, 4, 1),
        teacher_model=large(512, 6, 2),
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": texts}),
        processing_class=many_words(),
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


def speed(args: argparse.Namespace) -> None:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    first = commands.add_parser("works")
    first.add_argument("--seeds", type=int, default=5)
    first.add_argument("--updates", type=int, default=UPDATES)
    first.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    first.add_argument("--out", type=Path, default=Path("runs/on_policy.json"))
    first.set_defaults(run=works)
    second = commands.add_parser("speed")
    second.add_argument("--steps", type=int, default=6)
    second.add_argument("--out", type=Path, help="also as JSON")
    second.set_defaults(run=speed)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
