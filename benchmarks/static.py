"""Static students of all-MiniLM-L6-v2, made of its vocabulary alone or with texts: the figures of docs/benchmarks.md.

    pip install 'potstill[bench]'
    HF_HUB_OFFLINE=1 python benchmarks/static.py --texts FOLDER [--split test]

FOLDER has boolq.jsonl (question, passage) and wiki.jsonl (title, text). Measured on STS-B, on finding the passage of a
BoolQ question, and on finding the summary of a Wikipedia title: test is BoolQ's first 1,500 rows and 1,000 summaries,
dev is the others of BoolQ and 1,000 more summaries. The students learn sentences of the summaries that remain. Rows are
appended to results.jsonl in --work as they are measured, and those that are there are not measured again; the teacher's
vectors are kept there too.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn.functional import normalize

from embedding import sentences, teacher_folder
from potstill.embedding.encoders import TextStudent, load_embedder
from potstill.embedding.heads import VectorHead
from potstill.embedding.static import TokenTable, fit_tokens, reduce_tokens, static_student, token_table
from potstill.embedding.teachers import TextEncoder, encode_texts, model_encoder

KINDS = ("tokens alone", "with texts")
HELD_OUT = 1000  # summaries of each split


def read_rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def split_summaries(rows: list[dict[str, str]]) -> dict[str, list[dict[str, str]]]:
    rows = list(rows)
    random.Random(0).shuffle(rows)
    return {"dev": rows[:HELD_OUT], "test": rows[HELD_OUT : 2 * HELD_OUT], "train": rows[2 * HELD_OUT :]}


def training_sentences(rows: Sequence[dict[str, str]], number: int) -> list[str]:
    pieces = [piece.strip() for row in rows for piece in re.split(r"(?<=[.!?])\s+", row["text"])]
    pieces = [piece for piece in pieces if len(piece) > 20]
    random.Random(1).shuffle(pieces)
    return pieces[:number]


def recall(queries: Tensor, answers: Tensor) -> dict[str, float]:
    """The share of queries whose own answer is the nearest, and is among the ten nearest."""
    similarity = normalize(queries, dim=-1) @ normalize(answers, dim=-1).T
    nearer = (similarity > similarity.diagonal()[:, None]).sum(1)
    return {"1": float((nearer < 1).float().mean()), "10": float((nearer < 10).float().mean())}


def measure(args: argparse.Namespace, student: TextStudent) -> dict[str, float]:
    def encode(texts: list[str]) -> Tensor:
        return torch.from_numpy(student.model.encode(texts, show_progress_bar=False))

    texts, (first, second, scores) = sentences(args.data, args.split)
    vectors = normalize(encode(texts), dim=-1)
    boolq = read_rows(args.texts / "boolq.jsonl")
    boolq = boolq[:1500] if args.split == "test" else boolq[1500:]
    summaries = split_summaries(read_rows(args.texts / "wiki.jsonl"))[args.split]
    passages = recall(*(encode([row[name] for row in boolq]) for name in ("question", "passage")))
    titles = recall(*(encode([row[name] for row in summaries]) for name in ("title", "text")))
    return {
        "STS-B": float(spearmanr((vectors[first] * vectors[second]).sum(1), scores).statistic),
        **{f"BoolQ recall@{k}": value for k, value in passages.items()},
        **{f"title recall@{k}": value for k, value in titles.items()},
    }


def read_tokens(work: Path, model: Any) -> TokenTable:
    path = work / "tokens.pt"
    if not path.exists():
        began, cpu = time.perf_counter(), time.process_time()
        tokens = token_table(model, model.tokenizer)
        print(f"tokens: {time.perf_counter() - began:.0f} s, {time.process_time() - cpu:.0f} s of CPU", flush=True)
        torch.save(tokens._replace(tokenizer=None)._asdict(), path)
    return TokenTable(**torch.load(path, weights_only=True) | {"tokenizer": model.tokenizer})


def make_student(kind: str, dimensions: int, tokens: TokenTable, texts: list[str], vectors: Tensor) -> TextStudent:
    if kind == "tokens alone":
        return static_student(tokens.tokenizer, tokens.table(reduce_tokens(tokens, dimensions)))
    head = VectorHead.from_pca(vectors, dimensions, start="centred")
    start = torch.from_numpy(head.transform(vectors))
    return static_student(tokens.tokenizer, tokens.table(fit_tokens(tokens, texts, start, head.map.weight.detach().T)))


def main(args: argparse.Namespace) -> None:
    args.work.mkdir(parents=True, exist_ok=True)
    results = args.work / "results.jsonl"
    measured = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    done = {(row["kind"], row["dimensions"], row["split"], row["sentences"]) for row in measured}
    model = load_embedder(teacher_folder(), "teacher")
    tokens = read_tokens(args.work, model)
    summaries = split_summaries(read_rows(args.texts / "wiki.jsonl"))["train"]
    texts = training_sentences(summaries, args.sentences)
    encoded = encode_texts(texts, TextEncoder(model_encoder(model), "all-MiniLM-L6-v2"), args.work)
    vectors = encoded.read(0, encoded.rows)
    for kind in KINDS:
        for dimensions in args.dimensions:
            name = {"kind": kind, "dimensions": dimensions, "split": args.split, "sentences": args.sentences}
            if tuple(name.values()) in done:
                continue
            began = time.perf_counter()
            student = make_student(kind, dimensions, tokens, texts, vectors)
            row = name | {"seconds": time.perf_counter() - began} | measure(args, student)
            with results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(" | ".join(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/static-benchmark"))
    parser.add_argument("--split", choices=["dev", "test"], default="test")
    parser.add_argument("--dimensions", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--sentences", type=int, default=5000)
    main(parser.parse_args())
