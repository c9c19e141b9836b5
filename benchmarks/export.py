"""Exported files beside the model they are of: loss, agreement and KL in their program, sizes, speeds and memory.

    python benchmarks/export.py --model models/smollm2 --data models/wiki.jsonl --out runs/export-smollm2

GGUF files are measured in llama.cpp, ONNX files in onnxruntime, and graphs for OpenVINO there. Files that exist are not
written again. The table is printed as Markdown, and stands in docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from potstill import Source, export
from potstill.evaluate.exported import export_table, read_exports
from potstill.runs.formats.table import FORMATS

KINDS = {"gguf": "f16,q8_0,q5_1,q4_k_m,q4_0", "onnx": "f32,int8", "openvino": "f32,int8"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--field", default="text")
    parser.add_argument("--tokens", type=int, default=2048)
    for to, kinds in KINDS.items():
        parser.add_argument(f"--{to}", default=kinds, help="kinds of files; empty for none")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    print(f"{torch.get_num_threads()} threads")
    options: dict[str, Any] = {"data": Source(args.data, field=args.field), "tokens": args.tokens, "out": args.out}
    for to in KINDS:
        kinds = [kind for kind in getattr(args, to).split(",") if kind]
        exports = read_exports(args.out)
        there = set() if exports is None else {file.file for file in exports.files}
        missing = [kind for kind in kinds if FORMATS[to].file.format(kind) not in there]
        if missing:
            export(args.model, to, missing, **options, console=Console(stderr=True))  # type: ignore[arg-type]
    exports = read_exports(args.out)
    assert exports is not None
    print(f"{exports.tokens} held-out tokens\n")
    columns, rows = export_table(exports)
    print(f"| {' | '.join(columns)} |\n|---{'|---:' * (len(columns) - 1)}|")
    for row in rows:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
