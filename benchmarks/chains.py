"""Compare training targets: answers, chains of thought, verified chains, chains with programs, and chains with logits.

    OMP_NUM_THREADS=1 python benchmarks/chains.py
    python benchmarks/chains.py --report  # print the table of the saved results; measure nothing

The task is that of word_problems.py. The teacher (3 layers of width 128) is trained on worked solutions and programs,
500 updates at a time, until its chains answer 97% of the dev problems correctly. It then writes two chains for each of
the students' questions with `potstill generate`, at the first temperature at which at least 12% of 200 chains are
wrong; two programs, which run in the sandbox; and two chains at a temperature at which at least 40% are wrong. Every
student (2 layers of width 64) starts from the same weights for each seed, and makes the same number of updates of 32
rows, by one of these methods:

    answers                     cross-entropy with the known answers only: no teacher
    chains                      all chains of the teacher (choose: all)
    verified                    the chains with a correct answer (choose: verified)
    both                        the same, with their answers as a second task of about equal weight (target: both)
    mixed                       chains and programs that agree with the majority of the four; answers are not checked
    chains + logits             the chains, and forward KL from the teacher
    high-temperature chains     all chains written at the higher temperature
    high-temperature verified   those of them with a correct answer

Measured: the share of unseen problems that the student answers correctly with greedy decoding, by number of steps for
known templates, and for held-out templates. A student trained on two kinds of output is measured with both. `--split
dev` measures on other problems, for development. Results are saved as they are computed (--out, and a folder of the
same name), and an interrupted run resumes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from measure import keep, machine, spread, table, train
from potstill import ForwardKL, Labels, LocalEngine, Logits, Sampling
from potstill.data.batches import encode
from potstill.data.sources import Source
from potstill.generation.reasoning import fill, parse
from potstill.generation.sandbox import run_program
from potstill.generation.verify import same_answer
from potstill.runs.config.generate import GenerateRecipe
from potstill.runs.generate import generate
from word_problems import ANSWER_PROMPT, PROGRAM_PROMPT, PROMPT, STEPS, Problem, Split, problems, tokenizer

ROWS, ROUND, ROUNDS = 32, 500, 12
METHODS = (
    "answers",
    "chains",
    "verified",
    "both",
    "mixed",
    "chains + logits",
    "high-temperature chains",
    "high-temperature verified",
)
WRONG = {"sampled": 0.12, "sampled at high temperature": 0.4}
WAYS = {"chains": PROMPT, "answers alone": ANSWER_PROMPT, "programs": PROGRAM_PROMPT}
LEARNT = {"answers": ["answers alone"], "both": ["chains", "answers alone"], "mixed": ["chains", "programs"]}
TEMPLATES = "held-out templates"
# Methods that select from the texts of another method.
WRITTEN = {"verified": "chains", "both": "chains", "high-temperature verified": "high-temperature chains"}


def llama(width: int, layers: int, seed: int, words: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=192,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    model: LlamaForCausalLM = LlamaForCausalLM._from_config(config, attn_implementation="eager")
    return model


def learn(
    student: LlamaForCausalLM,
    teacher: LlamaForCausalLM | None,
    objective: list[Any],
    source: Source,
    words: PreTrainedTokenizerFast,
    *,
    steps: int,
    rate: float,
    seed: int,
) -> float:
    """Train a student in place; the processor's seconds that it took."""
    rows = encode(source, words, max_length=128).dataset
    settings = {
        "max_steps": steps,
        "per_device_train_batch_size": ROWS,
        "learning_rate": rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": steps // 20,
        "adam_beta2": 0.98,
        "seed": seed,
        "use_cpu": True,
    }
    return train(student, teacher, objective, rows, settings, processing_class=words)


def right(
    model: LlamaForCausalLM,
    words: PreTrainedTokenizerFast,
    examples: list[Problem],
    way: str = "chains",
    temperature: float = 0.0,
) -> float:
    """The share of problems that a model answers right, in one of WAYS."""
    prompts = [fill(WAYS[way], one.question) for one in examples]
    drawn = Sampling(max_new_tokens=48, sampling_temperature=temperature, seed=0)
    texts = [text.text for (text,) in LocalEngine(model, words, 256).complete(prompts, drawn)]
    answers = list(map(READ[way], texts))
    return statistics.mean(same_answer(text, one.answer) for text, one in zip(answers, examples, strict=True))


READ: dict[str, Callable[[str], str | None]] = {
    "chains": lambda text: parse(text).answer,
    "answers alone": lambda text: text,
    "programs": lambda text: run_program(text).output.strip(),
}


def unseen(split: Split, count: int) -> dict[str, list[Problem]]:
    """Problems of known templates by level, and half as many of held-out templates."""
    known = problems(count, split, 0)
    by_level = {level: [one for one in known if one.level == level] for level in STEPS}
    return by_level | {TEMPLATES: problems(count // 2, split, 0, held_out=True)}


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# The teacher, and what it writes.


def make_teacher(folder: Path, results: dict[str, Any], words: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    rounds: list[dict[str, float]] = results.setdefault("teacher rounds", [])
    teacher = (
        LlamaForCausalLM.from_pretrained(folder / "teacher", attn_implementation="eager")
        if rounds
        else llama(128, 3, 100, words)
    )
    dev = problems(300, "dev", 1)
    while not rounds or (rounds[-1]["right"] < 0.97 and len(rounds) < ROUNDS):
        solved = problems(ROUND * ROWS, "train", 1000 + len(rounds))
        pairs = [(PROGRAM_PROMPT, one.program) if i % 2 else (PROMPT, one.chain) for i, one in enumerate(solved)]
        rows = [
            {"prompt": fill(prompt, one.question), "completion": text}
            for one, (prompt, text) in zip(solved, pairs, strict=True)
        ]
        source = Source(written(folder / "solved.jsonl", rows), prompt="prompt", completion="completion")
        seconds = learn(teacher, None, [Labels()], source, words, steps=ROUND, rate=3e-3, seed=len(rounds))
        teacher.save_pretrained(folder / "teacher")
        words.save_pretrained(folder / "teacher")
        rounds.append({"right": right(teacher, words, dev), "seconds": seconds})
        print(f"teacher, round {len(rounds)}: {rounds[-1]}", file=sys.stderr, flush=True)
        keep(folder.with_suffix(".json"), results)
    return teacher.eval()


def choose_temperature(teacher: LlamaForCausalLM, words: PreTrainedTokenizerFast, share: float) -> dict[str, float]:
    """The first one at which so many of its chains are wrong, on problems of the kind that students learn from."""
    examples = problems(200, "train", 1)
    for temperature in (0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.6, 1.8, 2.0):
        wrong = 1 - right(teacher, words, examples, temperature=temperature)
        if wrong >= share:
            break
    return {"temperature": temperature, "wrong": wrong}


def make_data(
    folder: Path, questions: int, temperature: float, wild: float
) -> tuple[dict[str, Source], dict[str, int]]:
    """What each method learns from, and how many rows that is: chains are written once, then judged anew."""
    examples = problems(questions, "train", 0)
    file = written(folder / "questions.jsonl", [{"question": one.question, "answer": one.answer} for one in examples])
    alone = [{"prompt": fill(ANSWER_PROMPT, one.question), "completion": f" {one.answer}"} for one in examples]
    files, counts = {"answers": written(folder / "answers.jsonl", alone)}, {"answers": questions}
    chain = {"task": "chain_of_thought", "template": PROMPT}
    for name, task in {
        "chains": {**chain, "choose": "all"},
        "high-temperature chains": {**chain, "choose": "all"},
        "verified": {**chain, "choose": "verified"},
        "high-temperature verified": {**chain, "choose": "verified"},
        # A chain has about 28 tokens, an answer two, ends included: each task has half of the loss.
        "both": {**chain, "choose": "verified", "target": "both", "task_weights": {"chain": 1, "answer": 14}},
        "mixed": {"task": "mixed", "template": PROMPT, "program_template": PROGRAM_PROMPT, "choose": "majority"},
    }.items():
        known = {"answer": "answer"} if name != "mixed" else {}
        recipe = {
            "kind": "generate",
            "name": name,
            "teacher": {"model": str(folder / "teacher"), "dtype": "float32"},
            "task": {"questions": {"path": str(file), **known}, **task},
            "sampling": {
                "samples": 2,
                "sampling_temperature": wild if name.startswith("high-temperature") else temperature,
                "top_p": 1.0,
                "max_new_tokens": 48,
            },
            "batch_size": 128,
            "output": str(folder / name),
        }
        if name in WRITTEN:
            (folder / name).mkdir(exist_ok=True)
            shutil.copy(folder / WRITTEN[name] / "texts.jsonl", folder / name)
        made = generate(GenerateRecipe.parse(recipe), resume=True)
        files[name], counts[name] = made.rows, made.counts["rows"]
    sources = {name: Source(path, prompt="prompt", completion="completion") for name, path in files.items()}
    sources["both"] = replace(sources["both"], weight="weight")
    return sources | {"chains + logits": sources["chains"]}, counts


# The comparison.


def one(
    method: str,
    seed: int,
    teacher: LlamaForCausalLM,
    source: Source,
    words: PreTrainedTokenizerFast,
    updates: int,
    sets: dict[str, list[Problem]],
) -> dict[str, float]:
    """A student of a method: its seconds, and what it answers right in each set, in each way that it has learnt."""
    student = llama(64, 2, seed, words)
    beside = method == "chains + logits"
    objective = [Labels(), Logits(ForwardKL())] if beside else [Labels()]
    seconds = learn(student, teacher if beside else None, objective, source, words, steps=updates, rate=4e-3, seed=seed)
    shares = {
        f"{name}, {way}": right(student, words, examples, way)
        for way in LEARNT.get(method, ["chains"])
        for name, examples in sets.items()
    }
    return {"seconds": seconds, "student parameters": student.num_parameters(), **shares}


def measure(args: argparse.Namespace, results: dict[str, Any]) -> None:
    words, folder, file = tokenizer(), args.out.with_suffix(""), args.out
    folder.mkdir(parents=True, exist_ok=True)
    teacher = make_teacher(folder, results, words)
    sets = unseen(args.split, args.problems)
    if "teacher" not in results:
        shares = {
            f"{name}, {way}": right(teacher, words, examples, way)
            for way in LEARNT["mixed"]
            for name, examples in sets.items()
        }
        results["teacher"] = {"parameters": teacher.num_parameters(), **shares}
        keep(file, results)
    for name, share in WRONG.items():
        results[name] = results.get(name) or choose_temperature(teacher, words, share)
    sources, results["rows"] = make_data(folder, args.questions, *(results[name]["temperature"] for name in WRONG))
    students = results.setdefault("students", {})
    for seed in range(args.seeds):
        for method in METHODS:
            if f"{method} {seed}" not in students:
                students[f"{method} {seed}"] = one(method, seed, teacher, sources[method], words, args.updates, sets)
                print(method, seed, students[f"{method} {seed}"], file=sys.stderr, flush=True)
                keep(file, results)


def report(results: dict[str, Any]) -> None:
    names = (*STEPS, TEMPLATES)
    cells = [
        ["teacher", way, "", *(f"{results['teacher'][f'{name}, {way}']:.3f}" for name in names), "", ""]
        for way in LEARNT["mixed"]
    ]
    for method in METHODS:
        found = [value for key, value in results["students"].items() if key.rpartition(" ")[0] == method]
        for way in LEARNT.get(method, ["chains"]) if found else []:
            shares = [[run[f"{name}, {way}"] for run in found] for name in names]
            seconds = statistics.mean(run["seconds"] for run in found)
            rows = str(results["rows"][method.removesuffix(" + logits")])
            cells.append([method, way, rows, *map(spread, shares), f"{seconds:.0f}", str(len(found))])
    print(f"{results['settings']}\nteacher: {results['teacher']['parameters']:,} parameters")
    print("\n".join(f"{name}: {results[name]}" for name in WRONG))
    print("\n".join(f"{key}: {value}" for key, value in results["machine"].items()), end="\n\n")
    print(table(["", "output", "rows", *names, "CPU seconds", "seeds"], cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/chains.json"))
    parser.add_argument("--split", choices=("dev", "test"), default="test")
    parser.add_argument("--questions", type=int, default=2000, help="that students learn from")
    parser.add_argument("--problems", type=int, default=600, help="that are measured on")
    parser.add_argument("--updates", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--report", action="store_true", help="measure nothing")
    args = parser.parse_args()
    results: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    if not args.report:
        settings = {name: getattr(args, name) for name in ("split", "questions", "problems", "updates")}
        if results.setdefault("settings", settings) != settings:
            parser.error(f"--out: expected results with {settings}, got some with {results['settings']}.")
        results["machine"] = machine("cpu")
        measure(args, results)
    report(results)


if __name__ == "__main__":
    main()
