"""What fewer tokens cost a real model before any training: .venv/bin/python benchmarks/vocabulary.py

The tokens are chosen on the first texts, the model is measured on later ones: parameters, bits per byte, tokens per
byte, with all tokens and with the kept ones. A row is appended to the file of `--out` when it is measured, and what
stands there is not measured again. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from potstill.data.sources import Source
from potstill.evaluate.formatting import percent
from potstill.evaluate.held_out import text_bytes
from potstill.models.loading import load_model, load_tokenizer, suppress_warnings
from potstill.models.size import size_of
from potstill.models.trimming import trim_model, trim_tokenizer
from potstill.runs.vocabulary import bits_per_byte, tokens_of

HELD_OUT = 346  # the last texts: of them the first ones that are short enough
TEXTS, LONGEST = 40, 200  # held-out texts, and their tokens at most


def read_texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def rows_of(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Dataset:
    rows = tokenizer(texts)["input_ids"]
    return Dataset.from_list([{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids} for ids in rows])


def measure(arguments: argparse.Namespace, keep: int | None) -> dict[str, float]:
    """Measure the model with its most frequent tokens, or with all."""
    tokenizer = load_tokenizer(str(arguments.model), "--model")
    texts = read_texts(arguments.data)
    short = [text for text in texts[-HELD_OUT:] if len(tokenizer(text)["input_ids"]) < LONGEST][:TEXTS]
    model = load_model(str(arguments.model), "--model", "float32", "causal").eval()
    if keep is not None:
        source = Source(arguments.data, field="text", limit=len(texts) - HELD_OUT)
        kept = tokens_of(source, tokenizer, keep, max_length=LONGEST)
        tokenizer = trim_tokenizer(tokenizer, kept)
        trim_model(model, kept)
    rows, size = rows_of(short, tokenizer), size_of(model.config, 1)
    return {
        "tokens": len(tokenizer.get_vocab()),
        "parameters": size.parameters,
        "token_parameters": size.token_parameters,
        "bits_per_byte": bits_per_byte(model, rows, tokenizer),
        "tokens_per_byte": sum(map(len, rows["input_ids"])) / text_bytes(rows, tokenizer),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("../shared/real/gemma3"))
    parser.add_argument("--data", type=Path, default=Path("../shared/real/wiki.jsonl"))
    parser.add_argument("--keep", type=int, nargs="*", default=[65536, 32768, 16384])
    parser.add_argument("--out", type=Path, default=Path("runs/vocabulary.jsonl"))
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.touch()
    rows = {row["keep"]: row for row in map(json.loads, arguments.out.read_text(encoding="utf-8").splitlines())}
    with suppress_warnings():
        for keep in (None, *arguments.keep):
            if keep not in rows:
                rows[keep] = {"keep": keep, **measure(arguments, keep)}
                with arguments.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(rows[keep]) + "\n")
    print("| tokens | parameters | of embeddings and head | bits per byte | | tokens per byte |")
    print("|---|---|---|---|---|---|")
    whole = rows[None]["bits_per_byte"]
    for keep in (None, *arguments.keep):
        row = rows[keep]
        sizes = f"{row['tokens']:,} | {row['parameters']:,} | {row['token_parameters']:,}"
        worse = percent(row["bits_per_byte"] / whole - 1, 1) if keep else ""
        print(f"| {sizes} | {row['bits_per_byte']:.4f} | {worse} | {row['tokens_per_byte']:.4f} |")


if __name__ == "__main__":
    main()
