"""Students of a mixture of experts, dense and of fewer experts, by their start: .venv/bin/python benchmarks/experts.py

Trains a Mixtral of 8 experts, 2 for each token, on the teacher's split of the demo's corpus with the demo's tokenizer,
and keeps it in OUT/teacher. Students learn from it on the transfer split by forward KL: a dense one, as wide as the
experts of a token together, and one of 4 experts, from random weights, pruned (fitted or not) or merged. Held-out loss
and KL to the teacher, before and after training, go to OUT/rows.jsonl; what is there is not trained again. Prints a
Markdown table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, set_seed

from potstill import Distiller, ForwardKL, Labels, Logits, RouterBalance
from potstill.data.batches import in_batches
from potstill.demo.corpus import write_jsonl
from potstill.demo.recipe import TEACHER
from potstill.evaluate.sequence import measure
from potstill.models.loading import has_bfloat16
from potstill.models.size import count_parameters
from potstill.runs.build import BuiltRun, build_run
from potstill.runs.config.run import Recipe
from potstill.teachers.model import ModelTeacher

LENGTH, BATCH, CALIBRATION = 128, 8, 64
SIZES: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 4, "num_local_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 2 * LENGTH,
    "tie_word_embeddings": True, "bos_token_id": None,
}  # fmt: skip
DENSE, FEWER = {"model_type": "mistral"}, {"num_local_experts": 4}
STUDENTS: dict[str, tuple[dict[str, Any], Any]] = {  # design and start, by name
    "dense, random": (DENSE, "random"),
    "dense, pruned": (DENSE, {"method": "prune", "fit": False, "calibration_rows": CALIBRATION}),
    "dense, pruned and fitted": (DENSE, {"method": "prune", "calibration_rows": CALIBRATION}),
    "4 experts, random": (FEWER, "random"),
    "4 experts, pruned": (FEWER, {"method": "prune", "fit": False, "calibration_rows": CALIBRATION}),
    "4 experts, merged": (
        FEWER,
        {"method": "prune", "fit": False, "experts": "merge", "calibration_rows": CALIBRATION},
    ),
}


def recipe(args: argparse.Namespace, split: str, student: dict[str, Any], seed: int) -> Recipe:
    """The run on one split of the corpus."""
    paths = {name: args.out / f"{name}.jsonl" for name in ("teacher", "transfer", "heldout")}
    return Recipe.parse({
        "name": "experts", "teacher": {"model": str(args.out / "teacher")}, "student": student, "seed": seed,
        "data": {"train": {"path": str(paths[split])}, "eval": {"path": str(paths["heldout"])},
                 "max_length": LENGTH, "packing": True},
        "objective": [{"term": "logits"}], "output": str(args.out / "run"),
        "train": {"max_steps": args.steps, "per_device_train_batch_size": BATCH, "learning_rate": args.rate},
    })  # fmt: skip


def train(
    built: BuiltRun, model: Any, teacher: ModelTeacher | None, terms: list[Any], steps: int, rate: float, seed: int
) -> None:
    """Train a model on random rows, with 5% of warm-up and a linear decay."""
    distiller = Distiller(model, teacher, terms, vocabulary=built.vocabulary if teacher else None)
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=rate, weight_decay=0.0)
    warmup = max(1, steps // 20)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for step in range(steps):
        if len(order) < BATCH:
            order += torch.randperm(len(built.train.dataset), generator=generator).tolist()
        chosen, order = order[:BATCH], order[BATCH:]
        (batch,) = in_batches(built.train.dataset.select(chosen), built.tokenizer, BATCH)
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
        distiller.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16()):
            loss = distiller.step(batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(distiller.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"  step {step}: {float(loss.detach()):.3f}", flush=True)


def make_teacher(args: argparse.Namespace) -> None:
    """Train the teacher, unless it is there."""
    folder = args.out / "teacher"
    if (folder / "config.json").exists():
        return
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    set_seed(0)
    ends = {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = AutoModelForCausalLM.from_config(MixtralConfig(**SIZES, **ends))
    begun = args.out / "begun"  # the teacher before training, for the run that reads the data
    model.save_pretrained(begun)
    tokenizer.save_pretrained(begun)
    values = recipe(args, "teacher", {"model": str(begun)}, 0).model_dump(mode="json")
    values["teacher"] = {"model": str(begun)}
    built = build_run(Recipe.parse(values))
    train(built, model, None, [Labels(), RouterBalance(weight=0.01)], args.teacher_steps, args.teacher_rate, 0)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-experts"))
    parser.add_argument("--teacher-steps", type=int, default=1500)
    parser.add_argument("--teacher-rate", type=float, default=3e-3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for split, characters in (("teacher", 1_500_000), ("transfer", 500_000), ("heldout", 40_000)):
        path = args.out / f"{split}.jsonl"
        if not path.exists():
            write_jsonl(path, split, characters)
    make_teacher(args)
    path = args.out / "rows.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for seed in range(args.seeds):
        for name, (design, start) in STUDENTS.items():
            if any((row["student"], row["seed"]) == (name, seed) for row in rows):
                continue
            built = build_run(recipe(args, "transfer", {"design": design, "initialize": start}, seed))
            student, teacher = built.new_student(), built.teacher
            assert isinstance(teacher, ModelTeacher)
            row = {"student": name, "seed": seed, "parameters": count_parameters(student.config)}
            began = time.process_time()
            for when in ("start", "end"):
                if when == "end":
                    train(built, student, teacher, [Logits(ForwardKL())], args.steps, args.rate, seed)
                batches = list(in_batches(built.eval.dataset, built.tokenizer, 16))
                quality: Any = measure("causal", teacher.model, {name: student}, batches, vocabulary=built.vocabulary)
                row |= {f"{when} loss": quality[name].loss, f"{when} kl": quality[name].kl}
                row["teacher loss"] = quality["teacher"].loss
            row |= {"seconds": round(time.process_time() - began), "notes": list(built.notes)}
            rows.append(row)
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print({key: value for key, value in row.items() if key != "notes"}, flush=True)
    print_table(rows)


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print means over seeds; of three or more, with the standard deviation."""
    measures = ("start loss", "start kl", "end loss", "end kl")
    print(f"\nteacher: held-out loss {rows[0]['teacher loss']:.3f}\n")
    print("| student | parameters | loss at the start | KL at the start | loss at the end | KL at the end |")
    print("|---|---:|---:|---:|---:|---:|")
    for name in STUDENTS:
        own = [row for row in rows if row["student"] == name]
        cells = []
        for key in measures:
            values = [row[key] for row in own]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 2 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}" if values else "")
        if own:
            print(f"| {name} | {own[0]['parameters']:,} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
