"""What each kind of adapter costs and keeps, beside full training: .venv/bin/python benchmarks/adapters.py

A student that was distilled on Python's standard library learns another domain, the plays of Shakespeare, from a
teacher that was trained on them: with all of its weights, or with an adapter over them, each at its own learning rate.
Held-out loss and KL are of that run. Memory and time are of three steps on a larger model with random weights, whose
weights outweigh its activations; each in a process of its own. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from potstill.evaluate.formatting import percent, size
from potstill.evaluate.speed import extra_bytes
from potstill.models.adapted import parameter_count
from potstill.models.adapters import adapt
from potstill.models.loading import load_model, load_tokenizer, suppress_warnings
from potstill.runs.config.run import Recipe
from potstill.runs.config.student import StudentPart
from potstill.runs.run import run
from potstill.train.distiller import Distiller
from potstill.train.terms.logits import Labels
from task import stdlib_task

HELD_OUT = 0.05  # of the text, its end
ROW = 2000  # characters
# What is trained, and the learning rate: adapters want larger ones the fewer their parameters are.
WAYS: dict[str, tuple[dict[str, Any] | None, float]] = {
    "full training": (None, 1e-3),
    "LoRA, rank 16": ({"kind": "lora"}, 3e-3),
    "QLoRA, 4 bits": ({"kind": "qlora"}, 3e-3),
    "QLoRA, 8 bits": ({"kind": "qlora", "bits": 8}, 3e-3),
    "IA3": ({"kind": "ia3"}, 1e-2),
    "prefix, 20 tokens": ({"kind": "prefix"}, 1e-2),
    "prompt, 20 tokens": ({"kind": "prompt"}, 1e-2),
}
LARGE = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8}
ROWS, LENGTH = 2, 64  # of a step that is measured


def write_plays(source: Path, out: Path) -> dict[str, Any]:
    """The part `data` of a recipe over a text: its beginning to learn from, its end held out."""
    text = source.read_text(encoding="utf-8")
    cut = round(len(text) * (1 - HELD_OUT))
    out.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", text[:cut]), ("eval", text[cut:])):
        rows = (json.dumps({"text": part[i : i + ROW]}) + "\n" for i in range(0, len(part), ROW))
        (out / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")
    places = {name: {"path": str(out / f"{name}.jsonl"), "field": "text"} for name in ("train", "eval")}
    return {**places, "max_length": 128, "packing": True}


def learn(
    name: str, out: Path, teacher: str, student: dict[str, Any], data: dict[str, Any], **more: Any
) -> dict[str, Any]:
    """The summary of a run on the plays; one that is there is not run again."""
    train = {"per_device_train_batch_size": 8, "lr_scheduler_type": "cosine", **more.pop("train")}
    train["warmup_steps"] = train["max_steps"] // 10
    few = {"continuations": 0, "curve_rows": 16}
    values = {"name": name, "teacher": {"model": teacher}, "student": student, "data": data, "evaluate": few, **more}
    return run(Recipe.parse({**values, "train": train, "output": str(out)}), resume=True).summary


def qualities(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Rows of the table: teacher, the student before, and after each way."""
    data = write_plays(args.text, args.out / "data")
    base = stdlib_task(
        args.out / "base", [f"train.max_steps={args.base_steps}", "train.warmup_steps=60", "evaluate={baseline: false}"]
    )
    run(base, resume=True)
    origin, before = str(base.teacher.model), str(args.out / "base" / "student")
    learn("teacher", args.out / "teacher", origin, {"model": origin}, data, objective=[{"term": "labels"}],
          train={"max_steps": args.teacher_steps, "learning_rate": 5e-4})  # fmt: skip
    teacher = str(args.out / "teacher" / "student")
    rows: dict[str, dict[str, Any]] = {}
    for name in args.ways:
        adapter, rate = WAYS[name]
        student = {"model": before} | ({} if adapter is None else {"adapter": adapter})
        folder = args.out / name.replace(",", "").replace(" ", "-")
        rows[name] = learn(name, folder, teacher, student, data, objective=[{"term": "logits"}],
                           train={"max_steps": args.steps, "learning_rate": rate})  # fmt: skip
    none = {"max_steps": 1, "learning_rate": 0.0}
    still = learn(
        "before", args.out / "before", teacher, {"model": before}, data, objective=[{"term": "logits"}], train=none
    )
    return {"before": still, **rows}


def measure(name: str, out: Path) -> dict[str, Any]:
    """The memory and the time of three steps on the large model."""
    adapter, _ = WAYS[name]
    with suppress_warnings():
        part = StudentPart.model_validate({"model": str(out), "adapter": adapter})
        model = load_model(str(out), "large", "float32", bits=getattr(part.adapter, "bits", None))
        if part.adapter is not None:
            model = adapt(model, part.adapter, tokenizer=load_tokenizer(str(out), "large"))
        ids = torch.randint(2048, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        distiller = Distiller(model, None, [Labels()]).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        times = []

        def steps() -> None:
            for _ in range(3):
                start = time.process_time()
                distiller.step(batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                times.append(time.process_time() - start)

        with torch.no_grad():
            distiller(batch)  # weights are mapped from their file, and first here when they are read
        beside = extra_bytes(steps, torch.device("cpu"))
        held = model.get_memory_footprint()
    return {"held": held, "beside": beside, "seconds": min(times), "trained": parameter_count(model).trained}


def costs(args: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each way and what it takes, one after the other."""
    folder = args.out / "large"
    if not folder.exists():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(vocab_size=2048, tie_word_embeddings=True, **LARGE)).save_pretrained(folder)
        load_tokenizer(str(stdlib_task(args.out / "base").teacher.model), "teacher").save_pretrained(folder)
    torch.set_num_threads(1)
    for name in args.ways:
        # A process of its own for each, whose peak is its own; forked, because the imports take longer than the steps.
        with multiprocessing.get_context("fork").Pool(1) as alone:
            yield name, alone.apply(measure, (name, folder))


def show_costs(spent: Iterable[tuple[str, dict[str, Any]]]) -> None:
    print("| method | trained | memory: weights | above weights | CPU time per step |")
    print("|---|---|---|---|---|")
    for name, cost in spent:
        beside = "" if cost["beside"] is None else size(cost["beside"])
        print(
            f"| {name} | {cost['trained']:,} | {size(cost['held'])} | {beside} | {cost['seconds']:.2f} s |", flush=True
        )


def show_qualities(learnt: dict[str, dict[str, Any]]) -> None:
    print("\n| method | held-out loss | KL to the teacher | trained | file size |")
    print("|---|---|---|---|---|")
    for name, summary in learnt.items():
        row, adapter = summary["rows"]["student"], summary["adapter"]
        trained = "" if name == "before" else "100%" if adapter is None else percent(adapter["share"], 2)
        file = size(row["bytes"] if adapter is None else adapter["bytes"])
        print(f"| {name} | {row['loss']:.3f} | {row['kl']:.3f} | {trained} | {file} |")
    print(f"\nteacher {next(iter(learnt.values()))['rows']['teacher']['loss']:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=["costs", "quality"], default=["costs", "quality"])
    parser.add_argument("--ways", nargs="+", choices=[*WAYS], default=[*WAYS], metavar="WAY")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--base-steps", type=int, default=600)
    parser.add_argument("--teacher-steps", type=int, default=200)
    parser.add_argument("--text", type=Path, default=Path("../shared/data/tinyshakespeare.txt"))
    parser.add_argument("--out", type=Path, default=Path("runs/bench-adapters"))
    args = parser.parse_args()
    if "costs" in args.parts:
        show_costs(costs(args))
    if "quality" in args.parts:
        show_qualities(qualities(args))


if __name__ == "__main__":
    main()
