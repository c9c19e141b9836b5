"""Quantized after training against trained quantized, at equal tokens, measured in llama.cpp: benchmarks/quantize.py

    python benchmarks/quantize.py --out runs/bench-quantize
    python benchmarks/quantize.py --size smollm2 --model ../shared/models/smollm2 --out runs/bench-quantize-smollm2

Each size has one start. It is trained plainly, and for each kind of file; all are exported, and measured on the same
held-out tokens. demo: the demo's teacher pruned to half. smollm2: the model learns from itself in full precision, for
which it needs hours on two cores. Runs that are there are not repeated. The table is printed as Markdown.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from potstill import export, run
from potstill.data.sources import Source
from potstill.demo.corpus import write_jsonl
from potstill.evaluate.exported import ExportedFile
from potstill.runs.config.run import Recipe
from task import stdlib_task

ROW_TOKENS, ROWS = 128, 8  # of a step
KINDS = ("q4_0", "q8_0")


def recipe_of(args: argparse.Namespace, arm: str, tokens: int) -> Recipe:
    steps = tokens // (ROW_TOKENS * ROWS)
    sets = [
        *(f"train.max_steps={steps}", f"train.warmup_steps={steps // 10}", f"data.max_length={ROW_TOKENS}"),
        f"train.per_device_train_batch_size={ROWS}",
        "evaluate={baseline: false, continuations: 0, curve_rows: 4, time_limit: 1}",  # the files are measured
    ]
    if args.size == "demo":
        sets += ["student={design: {compression: 2}, initialize: prune}"]
    else:
        sets += [f"teacher.model={args.model}", f"student={{model: {args.model}}}", "train.learning_rate=2e-5"]
    if arm != "plain":
        sets.append(f"student.quantize={arm}")
    return stdlib_task(args.out / f"{arm}-{tokens}", sets)


def measured(args: argparse.Namespace, arm: str, tokens: int) -> dict[str, ExportedFile]:
    """Train and export what is not there; the files of an arm by their kinds."""
    recipe, console = recipe_of(args, arm, tokens), Console(stderr=True)
    folder = Path(recipe.output)
    if not (folder / "report.html").exists():
        run(recipe, resume=True, console=console)
    held_out = args.out / "held-out.jsonl"
    if not held_out.exists():
        write_jsonl(held_out, "heldout", args.held_out_characters)
    kinds: Any = ("f16", *KINDS) if arm == "plain" else (arm,)
    options: dict[str, Any] = {"max_length": ROW_TOKENS, "tokens": args.held_out, "out": folder / "export"}
    options |= {"data": Source(str(held_out), field="text"), "teacher": recipe.teacher.model_path}
    missing = [kind for kind in kinds if not (folder / "export" / f"student-{kind}.gguf").exists()]
    exports = export(folder / "student", quantize=missing or kinds[:1], **options, console=console)
    return {file.kind: file for file in exports.files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["demo", "smollm2"], default="demo")
    parser.add_argument("--model", default="../shared/models/smollm2")
    parser.add_argument("--tokens", default="50_000,200_000", help="of training")
    parser.add_argument("--held-out", type=int, default=8192, help="tokens to measure on")
    parser.add_argument("--held-out-characters", type=int, default=120_000)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-quantize"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    print("| tokens | file | trained | loss | KL to the teacher | KL to its student | of the loss recovered |")
    print("|---:|---|---|---:|---:|---:|---:|")
    for tokens in map(int, args.tokens.split(",")):
        plain = measured(args, "plain", tokens)
        write_row(tokens, plain["f16"], "plainly")
        for kind in KINDS:
            write_row(tokens, plain[kind], "plainly")
            aware = measured(args, kind, tokens)[kind]
            lost = float(plain[kind].loss or 0) - float(plain["f16"].loss or 0)
            regained = float(plain[kind].loss or 0) - float(aware.loss or 0)
            write_row(tokens, aware, f"for {kind}", f"{regained / lost:.0%}" if lost > 0 else "nothing was lost")


def write_row(tokens: int, file: ExportedFile, trained: str, recovered: str = "–") -> None:
    figures = f"{file.loss:.4f} | {file.teacher_kl:.4f} | {file.kl:.5f}"
    print(f"| {tokens:,} | {file.kind} | {trained} | {figures} | {recovered} |", flush=True)


if __name__ == "__main__":
    main()
