"""Compare on-policy distillation with distillation on data, on a task with an exact check.

    OMP_NUM_THREADS=1 python benchmarks/own_text.py
    python benchmarks/own_text.py --report  # print the table of the saved results; measure nothing

A prompt is 4 to 8 different letters out of 16; a correct answer has all of them, each once, in any order. There are up
to 40,320 correct answers. The teacher (2 layers of width 128) is trained to give each with the same frequency, until at
least 99% of its samples are correct. Students (2 layers of width 32) are too small for that. Every student starts from
the same weights for each seed, is first trained on the labels of the data for 250 steps of 64 rows, and then makes the
same number of updates of 32 rows, by one of METHODS. The data are 4,000 prompts with one answer each.

Measured on 500 unseen prompts: the share of correct answers, greedy and sampled at temperature 1; the length of the
samples with their end token (7 is correct on average), and the share of tokens that occurred earlier in the sample; on
answers of the teacher, KL(teacher || student) and the expected calibration error, per token; and CPU seconds. `--split
dev` measures on other prompts, for development. Results are saved as they are computed (--out, and a folder of the
same name), and an interrupted run resumes.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from measure import keep, machine, spread, table, train
from potstill import JSD, ForwardKL, Labels, Logits, ReverseKL, Sampling
from potstill.data.batches import PaddingCollator
from potstill.engines.decode import generate_tokens
from potstill.evaluate.quality import compare
from potstill.train.rollout import Rollout, teacher_mix
from potstill.train.terms.policy import PolicyGradient

LETTERS = 16
END, PAD, ASK = LETTERS, LETTERS + 1, LETTERS + 2
ROWS, BEGINNING, DATA, NEW = 32, 250, 4000, 12
STUDENT = (32, 2)  # width and layers
ENDS = frozenset({END})
Row = dict[str, list[int]]


@dataclass(frozen=True)
class Method:
    """How a student learns.

    Args:
        term: the objective.
        own: the share of rows that the student writes itself.
        texts: whose answers the others are: the data's, the teacher's to the same prompts, or both.
        guide: the teacher's part in each token that is drawn.
        times: as many updates as the others make.
    """

    term: Any
    own: float = 0.0
    texts: str = "data"
    guide: float = 0.0
    times: int = 1


MINILLM = PolicyGradient(discount=1.0, single_step=True, length_normalization=True, whiten=True, clip=0.2)
METHODS = {
    "labels": Method(Labels()),
    "data, forward KL": Method(Logits(ForwardKL())),
    "data, forward KL, three times as long": Method(Logits(ForwardKL()), times=3),
    "SeqKD": Method(Labels(), texts="teacher"),
    "data and teacher samples, forward KL": Method(Logits(ForwardKL()), texts="both"),
    "GKD: half on-policy samples, JSD": Method(Logits(JSD(0.5)), own=0.5),
    "on-policy samples, forward KL": Method(Logits(ForwardKL()), own=1.0),
    "on-policy samples, JSD": Method(Logits(JSD(0.5)), own=1.0),
    "on-policy samples, reverse KL": Method(Logits(ReverseKL()), own=1.0),
    "on-policy samples, policy gradient": Method(PolicyGradient(), own=1.0),
    "MiniLLM": Method(MINILLM, own=1.0, guide=0.2),
    "MiniLLM without length normalisation": Method(replace(MINILLM, length_normalization=False), own=1.0, guide=0.2),
    "MiniLLM without teacher-mixed sampling": Method(MINILLM, own=1.0),
}


# The task.


def questions(count: int, seed: str) -> list[list[int]]:
    chance = random.Random(seed)
    return [chance.sample(range(LETTERS), chance.randint(4, 8)) for _ in range(count)]


def row(question: list[int], answer: list[int]) -> Row:
    prompt = [*question, ASK]
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def answered(prompts: list[list[int]], seed: int) -> list[Row]:
    """Each with one of its right answers."""
    chance = random.Random(seed)
    return [row(one, [*chance.sample(one, len(one)), END]) for one in prompts]


def sample_texts(
    model: LlamaForCausalLM, prompts: list[list[int]], temperature: float, seed: int = 0
) -> list[list[int]]:
    drawn = Sampling(max_new_tokens=NEW, sampling_temperature=temperature, seed=seed)
    return [
        text.ids
        for text in generate_tokens(model, [[*one, ASK] for one in prompts], drawn, eos_ids=ENDS, batch_size=500)
    ]


def right(prompts: list[list[int]], texts: list[list[int]]) -> float:
    return statistics.mean(
        text[-1] == END and sorted(text[:-1]) == sorted(one) for one, text in zip(prompts, texts, strict=True)
    )


def repeated(text: list[int]) -> float:
    return 1 - len(set(text)) / len(text)


def words() -> PreTrainedTokenizerFast:
    tokens = {**{chr(97 + i): i for i in range(LETTERS)}, "<end>": END, "<pad>": PAD, "=": ASK}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(tokens, unk_token="<pad>")), eos_token="<end>", pad_token="<pad>"
    )


def llama(width: int, layers: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=LETTERS + 3,
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


# Teacher and students.


def learn(
    student: LlamaForCausalLM,
    teacher: LlamaForCausalLM | None,
    term: Any,
    rows: list[Row],
    *,
    steps: int,
    rate: float,
    seed: int,
    batch: int = ROWS,
    rollout: Rollout | None = None,
) -> float:
    """Train a student in place; the processor's seconds that it took."""
    settings = {
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "learning_rate": rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": 20,
        "logging_steps": 100,
        "seed": seed,
        "use_cpu": True,
    }
    return train(student, teacher, [term], rows, settings, data_collator=PaddingCollator(PAD), rollout=rollout)


def make_teacher(kept: Path) -> LlamaForCausalLM:
    if (kept / "config.json").exists():
        return LlamaForCausalLM.from_pretrained(kept).eval()
    teacher, dev = llama(128, 2, 100), questions(500, "teacher")
    for round_ in range(10):
        rows = answered(questions(64_000, f"teacher {round_}"), round_)
        learn(teacher, None, Labels(), rows, steps=500, rate=3e-3 * 0.75**round_, seed=round_, batch=4 * ROWS)
        share = right(dev, sample_texts(teacher, dev, 1.0))
        print(f"teacher after {500 * (round_ + 1)} steps: {share:.3f}", file=sys.stderr, flush=True)
        if share >= 0.99:
            break
    teacher.save_pretrained(kept)
    return teacher.eval()


def measured(model: LlamaForCausalLM, teacher: LlamaForCausalLM, prompts: list[list[int]]) -> dict[str, float]:
    drawn = sample_texts(model, prompts, 1.0)
    rows = [row(one, text) for one, text in zip(prompts, sample_texts(teacher, prompts, 1.0, seed=1), strict=True)]
    found = compare(teacher, {"student": model}, [PaddingCollator(PAD)(rows)])["student"]
    return {
        "greedy": right(prompts, sample_texts(model, prompts, 0.0)),
        "drawn": right(prompts, drawn),
        "length": statistics.mean(map(len, drawn)),
        "repeated": statistics.mean(map(repeated, drawn)),
        "KL": found.kl or 0.0,
        "ECE": found.ece,
    }


def beginning(kept: Path, data: list[Row], seed: int) -> LlamaForCausalLM:
    """The student that all methods begin with."""
    if not (kept / "config.json").exists():
        student = llama(*STUDENT, seed)
        learn(student, None, Labels(), data, steps=BEGINNING, rate=3e-3, seed=seed, batch=2 * ROWS)
        student.save_pretrained(kept)
    return LlamaForCausalLM.from_pretrained(kept)


def one(
    name: str, seed: int, teacher: LlamaForCausalLM, prompts: list[list[int]], updates: int, folder: Path
) -> dict[str, float]:
    """A student of a method: what it is like, and its seconds."""
    known = questions(DATA, f"train {seed}")
    data = answered(known, seed)
    student = beginning(folder / f"beginning-{seed}", data, seed)
    if name == "(before)":
        return {"seconds": 0.0, **measured(student, teacher, prompts)}
    method = METHODS[name]
    rows = data
    if method.texts != "data":
        teacher_rows = [
            row(one, text) for one, text in zip(known, sample_texts(teacher, known, 1.0, seed), strict=True)
        ]
        rows = teacher_rows if method.texts == "teacher" else data + teacher_rows
    guide = teacher_mix(teacher, method.guide) if method.guide else None
    draws = Sampling(max_new_tokens=NEW)
    rollout = Rollout(words(), draws, share=method.own, seed=seed, guide=guide) if method.own else None
    steps = updates * method.times
    seconds = learn(student, teacher, method.term, rows, steps=steps, rate=2e-3, seed=seed, rollout=rollout)
    return {"seconds": seconds, **measured(student, teacher, prompts)}


def report(results: dict[str, Any], names: list[str]) -> None:
    columns = ("greedy", "drawn", "length", "repeated", "KL", "ECE", "seconds")
    cells = [["teacher", *(f"{results['teacher'][column]:.3f}" for column in columns[:-1]), "", ""]]
    for name in names:
        found = [value for key, value in results["students"].items() if key.rpartition(" ")[0] == name]
        if found:
            values = [spread([one[column] for one in found]) for column in columns[:-1]]
            seconds = statistics.mean(one["seconds"] for one in found)
            cells.append([name, *values, f"{seconds:.0f}", str(len(found))])
    print(results["settings"])
    print("\n".join(f"{key}: {value}" for key, value in results["machine"].items()), end="\n\n")
    names = ["sampled" if column == "drawn" else column for column in columns[:-1]]
    print(table(["training", *names, "CPU seconds", "seeds"], cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/own_text.json"))
    parser.add_argument("--split", choices=("dev", "test"), default="test")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=400)
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    args = parser.parse_args()
    results: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    names = ["(before)", *args.only]
    if not args.report:
        settings = {"split": args.split, "updates": args.updates, "student": list(STUDENT)}
        if results.setdefault("settings", settings) != settings:
            parser.error(f"--out: expected results with {settings}, got some with {results['settings']}.")
        folder = args.out.with_suffix("")
        folder.mkdir(parents=True, exist_ok=True)
        results["machine"] = machine("cpu")
        prompts, teacher = questions(500, args.split), make_teacher(folder / "teacher")
        results["teacher"] = measured(teacher, teacher, prompts)
        students = results.setdefault("students", {})
        for seed in range(args.seeds):
            for name in names:
                if f"{name} {seed}" not in students:
                    students[f"{name} {seed}"] = one(name, seed, teacher, prompts, args.updates, folder)
                    print(name, seed, students[f"{name} {seed}"], file=sys.stderr, flush=True)
                    keep(args.out, results)
    report(results, names)


if __name__ == "__main__":
    main()
