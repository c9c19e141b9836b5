r"""Quantized after training against trained quantized, at equal tokens, measured in the file: benchmarks/quantize.py

    python benchmarks/quantize.py --out runs/bench-quantize
    python benchmarks/quantize.py --model models/smollm2 --texts models --kinds q4_0 --rates 1e-4 --tokens 50_000 \
        --out runs/bench-quantize-smollm2

Kinds of GGUF are measured in llama.cpp, int8 and int4 as ONNX in onnxruntime.
The demo's teacher pruned to half is trained plainly, and for each kind of file. A model (`--model`) needs no plain
training: it learns quantized from itself in full precision, and its own files are those that are quantized after
training. Learning rates are compared on texts of their own (`dev_kl`); all files are measured on the same held-out
tokens. What was measured goes to OUT/rows.jsonl as it is measured, and is not
measured again. Prints a Markdown table of all that is there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoConfig

from measure import Record
from potstill import export, run
from potstill.data.sources import Source
from potstill.demo.corpus import write_jsonl
from potstill.evaluate.harness import Harness
from potstill.models.loading import has_bfloat16, load_tokenizer
from potstill.runs.config.run import Recipe
from potstill.runs.export import evaluate_files
from potstill.runs.formats.graphs import CausalGraph
from potstill.runs.formats.llama_cpp import LlamaCpp
from potstill.runs.formats.loaded import LoadedFile
from potstill.runs.formats.measure import CausalFile
from potstill.runs.formats.onnx_runtime import open_onnx
from potstill.runs.formats.table import FORMATS
from real import EXAMPLES, read, tasks, write
from task import stdlib_task

ROW_TOKENS, ROWS = 128, 8  # of a step
DEV, HELD_OUT = 48, 346  # texts of --texts before the last ones, and the last ones
ONNX = ("f32", "int8", "int4")  # kinds of files in onnxruntime


def recipe_of(args: argparse.Namespace, arm: str, tokens: int, rate: float) -> Recipe:
    """The recipe of one training: `arm` is "plain" or a kind of file."""
    out, steps = args.out / f"{arm}-{tokens}-{rate:g}", tokens // (ROW_TOKENS * ROWS)
    sets = [
        *(f"train.max_steps={steps}", f"train.warmup_steps={steps // 10}", f"data.max_length={ROW_TOKENS}"),
        *(f"train.per_device_train_batch_size={ROWS}", f"train.learning_rate={rate}"),
        f"train.bf16={str(has_bfloat16()).lower()}",
        "evaluate={baseline: false, continuations: 0, curve_rows: 4, time_limit: 1}",  # the files are measured
    ]
    if args.model:
        sets += [f"teacher={{model: {args.model}, dtype: auto}}", f"student={{model: {args.model}}}"]
        sets += [f"data.train.path={args.out / 'train.jsonl'}", f"data.eval.path={args.out / 'dev.jsonl'}"]
    else:
        sets += ["student={design: {compression: 2, keep: balanced}, initialize: prune}"]
    if arm != "plain":
        sets.append(f"student.quantize={arm}")
    return stdlib_task(out, sets)


def write_texts(args: argparse.Namespace) -> None:
    """Write the texts that models learn from, and those that they are measured on."""
    if not args.model:
        write_jsonl(args.out / "held-out.jsonl", "heldout", args.held_out_characters)
        return
    texts = [{"text": row["text"]} for row in read(args.texts / "wiki.jsonl")]
    write(args.out / "train.jsonl", texts[: -HELD_OUT - DEV])
    write(args.out / "dev.jsonl", texts[-HELD_OUT - DEV : -HELD_OUT])
    write(args.out / "held-out.jsonl", texts[-HELD_OUT:])


class Files:
    """Files of students, each written and measured once."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.record = args, Record(args.out / "rows.jsonl")
        self.harness = Harness([str(path) for path in tasks(args.texts, args.out)]) if args.tasks else None

    def measure(self, student: str, out: Path, teacher: str, kinds: Sequence[str], **row: Any) -> None:
        """Export a student to some kinds, and measure the files in their programs beside the teacher."""
        missing = [kind for kind in kinds if not self.record.has(kind=kind, **row)]
        files, console = out / "files", Console(stderr=True)
        data = Source(str(self.args.out / "held-out.jsonl"), field="text")
        options: dict[str, Any] = {"max_length": ROW_TOKENS, "tokens": self.args.held_out, "console": console}
        for kind in missing:
            to: Any = "onnx" if kind in ONNX else "gguf"
            quantize: Any = [kind]
            export(student, to, quantize, out=files, console=console)
            exports = evaluate_files([files / FORMATS[to].file.format(kind)], data, teacher, **options)
            (file,) = exports.files
            scores = self.scores(student, files / file.file)
            figures = file.model_dump(include={"bytes", "tokens", "loss", "teacher_kl"})
            self.record.add(kind=file.kind, **row, **figures, teacher_loss=exports.teacher_loss, **scores)

    def scores(self, student: str, path: Path) -> dict[str, float]:
        """Accuracy on PIQA and BoolQ, in the file's program."""
        if self.harness is None:
            return {}
        tokenizer, scores = load_tokenizer(student, "student"), {}
        for task in self.harness.tasks:
            with LlamaCpp(path, 2048) if path.is_file() else CausalGraph(open_onnx, path) as loaded:
                of = self.harness.scores(_Scored(loaded, student), tokenizer, task, examples=EXAMPLES[task])
            scores[task.removeprefix("real_")] = round(next(iter(of.values()))["acc_norm,none"], 4)
        return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a model that learns from itself; default: the demo's teacher, cut")
    parser.add_argument("--texts", type=Path, help="folder with wiki.jsonl for --model, and for --tasks")
    parser.add_argument("--tasks", action="store_true", help="measure PIQA and BoolQ of --texts too: minutes a file")
    parser.add_argument("--tokens", default="50_000,200_000", help="of training")
    parser.add_argument("--kinds", default="q4_0,q8_0")
    parser.add_argument("--rates", default="3e-3", help="learning rates")
    parser.add_argument("--held-out", type=int, default=8192, help="tokens to measure on")
    parser.add_argument("--held-out-characters", type=int, default=120_000)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-quantize"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    write_texts(args)
    files, kinds = Files(args), args.kinds.split(",")
    arms = kinds if args.model else ["plain", *kinds]
    measured = sorted({*("f32" if kind in ONNX else "f16" for kind in kinds)}) + kinds
    for tokens, rate, arm in product(map(int, args.tokens.split(",")), map(float, args.rates.split(",")), arms):
        recipe = recipe_of(args, arm, tokens, rate)
        folder, teacher = Path(recipe.output), str(recipe.teacher.model_path)
        if not (folder / "report.html").exists():
            run(recipe, resume=True, console=Console(stderr=True))
        dev = json.loads((folder / "summary.json").read_text())["rows"]["student"]
        row = {"trained": "plainly" if arm == "plain" else f"for {arm}", "training_tokens": tokens}
        row |= {"rate": rate, "dev_kl": dev["kl"]}
        files.measure(str(folder / "student"), folder, teacher, measured if arm == "plain" else (arm,), **row)
    if args.model:
        files.measure(args.model, args.out, args.model, measured, trained="plainly", training_tokens=0)
    print_table(files.record.lines)


def print_table(lines: list[dict[str, Any]]) -> None:
    print("| trained | tokens | rate | file | size | loss | KL to the teacher | of the loss regained | of the KL "
          "| KL on dev | PIQA | BoolQ |")  # fmt: skip
    print("|---|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    plain = {(line["training_tokens"], line["kind"]): line for line in lines if line["trained"] == "plainly"}
    for line in lines:
        beside = [
            plain.get((line["training_tokens"], kind)) or plain.get((0, kind)) or line
            for kind in ("f32" if line["kind"] in ONNX else "f16", line["kind"])
        ]
        regained = [_regained(key, *beside, line) for key in ("loss", "teacher_kl")]
        cells = [line["trained"], f"{line['training_tokens']:,}", f"{line.get('rate', '')}", line["kind"]]
        cells += [f"{line['bytes'] / 1e6:.1f} MB", f"{line['loss']:.4f}", f"{line['teacher_kl']:.5f}", *regained]
        cells += [f"{line[key]:.4f}" if key in line else "" for key in ("dev_kl", "piqa", "boolq")]
        print(f"| {' | '.join(cells)} |")


def _regained(key: str, whole: dict[str, Any], quantized: dict[str, Any], line: dict[str, Any]) -> str:
    lost = quantized[key] - whole[key]
    return f"{(quantized[key] - line[key]) / lost:.0%}" if line["trained"] != "plainly" and lost > 0 else "–"


class _Scored(CausalFile):
    """A file with what lm-eval asks of a model beside its logits."""

    device = torch.device("cpu")

    def __init__(self, loaded: LoadedFile, student: str) -> None:
        super().__init__(loaded)
        self.config = AutoConfig.from_pretrained(student)

    def tie_weights(self) -> None:
        """Do nothing: a file has its weights."""


if __name__ == "__main__":
    main()
