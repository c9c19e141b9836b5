"""Exported files beside the model they are of: loss, agreement and KL in llama.cpp, sizes and speeds.

    python benchmarks/export.py --model ../models/smollm2 --data ../shared/data/gsm8k-train.jsonl --field question --out runs/export-smollm2

Files that are there are not written again. The table is printed as Markdown, and stands in docs/benchmarks.md.
"""  # noqa: E501

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from potstill import Source, export
from potstill.evaluate.exported import export_columns, export_rows, read_exports

KINDS = ("f16", "q8_0", "q5_1", "q4_1", "q4_0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", default="../shared/data/gsm8k-train.jsonl")
    parser.add_argument("--field", default="question")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    source = Source(args.data, field=args.field)
    for kind in args.kinds.split(","):
        exports = read_exports(args.out)
        if exports is None or kind not in {file.kind for file in exports.files}:
            options = {"data": source, "tokens": args.tokens, "out": args.out}
            export(args.model, quantize=(kind,), **options, console=Console(stderr=True))
    exports = read_exports(args.out)
    assert exports is not None
    print(f"{exports.tokens} held-out tokens\n")
    columns = export_columns(exports)
    print(f"| {' | '.join(columns)} |\n|---{'|---:' * (len(columns) - 1)}|")
    for row in export_rows(exports):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
