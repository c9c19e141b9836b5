"""Static students of all-MiniLM-L6-v2, made of its vocabulary alone or with texts: the figures of docs/benchmarks.md.

    pip install 'potstill[bench]'
    HF_HUB_OFFLINE=1 python benchmarks/static.py --texts FOLDER [--split test]
    HF_HUB_OFFLINE=1 python benchmarks/static.py --texts FOLDER --parts outputs budget teacher

FOLDER has boolq.jsonl (question, passage) and wiki.jsonl (title, text). Measured on STS-B, on finding the passage of a
BoolQ question, on finding the summary of a Wikipedia title, and by a linear probe of what a summary is about: test is
BoolQ's first 1,500 rows and 1,000 summaries, dev is the others of BoolQ and 1,000 more summaries. The students learn
sentences of the summaries that remain, 20,000 of them, which a seed draws. Rows are appended to results.jsonl in
--work as they are measured, and those that are there are not measured again; the teacher's vectors are kept there too.

model2vec's rows (--parts model2vec) are of the folders that benchmarks/static_model2vec.py, which runs in an
environment of its own, makes of the same sentences and vectors.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import normalize

from embedding import sentences, teacher_folder
from potstill.embedding.encoders import load_embedder
from potstill.embedding.static import TokenTable, reduce_rows, spread_tokens, token_table
from potstill.embedding.students import StaticStudent, TokenVectors
from potstill.embedding.token_fit import fit_tokens

PARTS = ("no text", "with text", "outputs", "budget", "model2vec", "teacher")
HELD_OUT = 1000  # summaries of each split
TOPICS = {
    "person": "politician actor actress singer writer author poet philosopher scientist physicist mathematician "
    "composer painter player king emperor president musician monk saint",
    "place": "city town village country island river mountain lake region capital state province county sea peninsula",
    "organism": "species genus plant bird mammal fish tree insect breed",
    "work": "film album song novel book series game magazine newspaper painting play",
    "science": "theorem chemical compound element theory mathematics physics equation algorithm particle molecule "
    "protein mineral star galaxy",
    "history": "war battle empire dynasty treaty revolution conflict kingdom",
}


def read_rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def split_summaries(rows: list[dict[str, str]]) -> dict[str, list[dict[str, str]]]:
    rows = list(rows)
    random.Random(0).shuffle(rows)
    return {"dev": rows[:HELD_OUT], "test": rows[HELD_OUT : 2 * HELD_OUT], "train": rows[2 * HELD_OUT :]}


def training_sentences(rows: Sequence[dict[str, str]]) -> list[str]:
    pieces = [piece.strip() for row in rows for piece in re.split(r"(?<=[.!?])\s+", row["text"])]
    pieces = [piece for piece in pieces if len(piece) > 20]
    random.Random(1).shuffle(pieces)
    return pieces


def topic_rows(rows: Sequence[dict[str, str]]) -> tuple[list[str], list[str]]:
    """Summaries without their first sentence, and the topic that this sentence names, where it names one alone."""
    texts, topics = [], []
    for row in rows:
        first, *rest = re.split(r"(?<=[.!?])\s+", row["text"])
        definition = re.search(r"\b(?:is|was|are|were)\b(.*)", first)
        words = {*re.findall(r"\w+", definition[1].lower())[:12]} if definition else set()
        named = [topic for topic, nouns in TOPICS.items() if words & {*nouns.split()}]
        if len(named) == 1 and len(rest) > 1:
            texts.append(" ".join(rest))
            topics.append(named[0])
    return texts, topics


class Evaluation:
    """Everything that students are measured on."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.pairs, (self.first, self.second, self.scores) = sentences(args.data, args.split)
        boolq = read_rows(args.texts / "boolq.jsonl")
        boolq = boolq[:1500] if args.split == "test" else boolq[1500:]
        self.summaries = split_summaries(read_rows(args.texts / "wiki.jsonl"))
        held_out = self.summaries[args.split]
        self.boolq = [row["question"] for row in boolq], [row["passage"] for row in boolq]
        self.titles = [row["title"] for row in held_out], [row["text"] for row in held_out]
        self.topics = topic_rows(self.summaries["train"]), topic_rows(held_out)

    def __call__(self, encode: Callable[[list[str]], Tensor]) -> dict[str, float]:
        vectors = normalize(encode(self.pairs), dim=-1)
        (fitted, labels), (held_out, answers) = self.topics
        probe = LogisticRegression(max_iter=1000).fit(probe_inputs(encode(fitted)), labels)
        return {
            "STS-B": float(spearmanr((vectors[self.first] * vectors[self.second]).sum(1), self.scores).statistic),
            **{f"BoolQ recall@{k}": value for k, value in recall(*map(encode, self.boolq)).items()},
            **{f"title recall@{k}": value for k, value in recall(*map(encode, self.titles)).items()},
            "topic accuracy": float(probe.score(probe_inputs(encode(held_out)), answers)),
        }


def probe_inputs(vectors: Tensor) -> np.ndarray:
    return (normalize(vectors, dim=-1) * vectors.shape[1] ** 0.5).numpy()  # coordinates of variance 1


def recall(queries: Tensor, answers: Tensor) -> dict[str, float]:
    """The share of queries whose own answer is the nearest, and is among the ten nearest.

    Of other answers that are exactly as near, half are nearer; equal answers (some questions share one) are one.
    """
    queries, answers = normalize(queries, dim=-1), normalize(answers, dim=-1)
    ahead = queries @ answers.T
    ahead -= ahead.diagonal()[:, None].clone()
    other = answers @ answers.T < 1 - 1e-5
    nearer = ((ahead > 1e-6) & other).sum(1) + ((ahead.abs() <= 1e-6) & other).sum(1) / 2
    return {"1": float((nearer < 1).float().mean()), "10": float((nearer < 10).float().mean())}


def outputs(queries: Tensor, answers: Tensor) -> Iterator[tuple[str, int, dict[str, float]]]:
    """Recall of shorter and of quantized vectors: (how, bytes of a stored vector, recall)."""
    queries, answers = normalize(queries, dim=-1), normalize(answers, dim=-1)
    width = queries.shape[1]
    yield "float32", 4 * width, recall(queries, answers)
    step = answers.abs().amax(0) / 127
    yield "int8, one scale a dimension", width, recall(queries, (answers / step).round() * step)
    yield "1 bit, both sides", width // 8, recall(queries.sign(), answers.sign())
    yield "1 bit, the passage alone", width // 8, recall(queries, answers.sign())
    for prefix in (128, 64, 32):
        if prefix < width:
            yield f"first {prefix}", 4 * prefix, recall(queries[:, :prefix], answers[:, :prefix])


def read_tokens(work: Path, model: Any) -> TokenTable:
    path = work / "tokens.pt"
    if not path.exists():
        began, cpu = time.perf_counter(), time.process_time()
        tokens = token_table(model, model.tokenizer)
        print(f"tokens: {time.perf_counter() - began:.0f} s, {time.process_time() - cpu:.0f} s of CPU", flush=True)
        torch.save(tokens._replace(tokenizer=None)._asdict(), path)
    return TokenTable(**torch.load(path, weights_only=True) | {"tokenizer": model.tokenizer})


@torch.no_grad()
def encode_sentences(work: Path, model: Any, texts: Sequence[str]) -> np.ndarray:
    """The teacher's vectors, in bfloat16; and, for model2vec, the means of its last states without special tokens."""
    paths = [work / "vectors.npy", work / "means.npy"]
    if not all(path.exists() for path in paths):
        (work / "sentences.json").write_text(json.dumps(texts))
        model = model.to(torch.bfloat16)
        rows: list[list[np.ndarray]] = [[], []]
        for start in range(0, len(texts), 64):
            features = model(model.preprocess(list(texts[start : start + 64])))
            states, mask = features["token_embeddings"].float(), features["attention_mask"].clone()
            mask[:, 0] = 0
            mask *= torch.arange(mask.shape[1]) < mask.sum(1, keepdim=True)  # the last token is special too
            means = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)
            for part, vectors in zip(rows, (features["sentence_embedding"].float(), means), strict=True):
                part.append(vectors.numpy())
        model.float()
        for path, part in zip(paths, rows, strict=True):
            np.save(path, np.concatenate(part))
    return np.load(paths[0])


def drawn(seed: int, number: int, total: int) -> list[int]:
    """Rows of the sentences that a seed draws."""
    return sorted(random.Random(seed).sample(range(total), min(number, total)))


class Students:
    """Makes the students; what several rows need is made once, when it is needed."""

    def __init__(self, args: argparse.Namespace, summaries: Sequence[dict[str, str]]) -> None:
        self.args, self.summaries = args, summaries
        self.teacher = cache(lambda: load_embedder(teacher_folder(), "teacher"))
        self.tokens = cache(lambda: read_tokens(args.work, self.teacher()))
        self.texts = cache(lambda: training_sentences(summaries))
        self.fitted = cache(self._fit)

    def _fit(self, seed: int) -> tuple[Tensor, list[str]]:
        texts = self.texts()
        vectors = encode_sentences(self.args.work, self.teacher(), texts)
        rows = drawn(seed, self.args.sentences, len(texts))
        chosen = [texts[row] for row in rows]
        began = time.process_time()
        fitted = fit_tokens(self.tokens(), chosen, torch.from_numpy(vectors[rows]))
        print(f"fit to {len(chosen):,} sentences: {time.process_time() - began:.0f} s of CPU", flush=True)
        return fitted, chosen

    def make(self, dimensions: int, seed: int | None = None, **kept: Any) -> Any:
        rows, texts = (spread_tokens(self.tokens()), []) if seed is None else self.fitted(seed)
        table = self.tokens().table(reduce_rows(rows, dimensions))
        student = StaticStudent(dimensions=dimensions, static=TokenVectors(**kept))
        return student.from_table(self.tokens().tokenizer, table, texts).model

    def model2vec(self, folder: Path) -> Any:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import StaticEmbedding

        table = load_file(folder / "model.safetensors")["embeddings"].float()
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        if (unknown := tokenizer.token_to_id("[UNK]")) is not None:
            table[unknown] = 0  # model2vec leaves it out
        return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=table)], device="cpu")


def encoder(model: Any) -> Callable[[list[str]], Tensor]:
    return lambda texts: torch.from_numpy(model.encode(texts, show_progress_bar=False))


def size_and_speed(model: Any, texts: list[str]) -> dict[str, float]:
    """MB on disk, and texts per second of CPU time, the median of three."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, create_model_card=False)
        size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    times = []
    for _ in range(4):
        began = time.process_time()
        model.encode(texts, batch_size=64, show_progress_bar=False)
        times.append(time.process_time() - began)
    return {"MB": size / 1e6, "texts/s": len(texts) / statistics.median(times[1:])}


def cases(args: argparse.Namespace, students: Students) -> Iterator[tuple[dict[str, Any], Callable[[], Any]]]:
    """Every row: its name, and how its student is made."""
    for dimensions in args.dimensions:
        name, make = {"dimensions": dimensions}, partial(students.make, dimensions)
        if "no text" in args.parts:
            yield {"kind": "no text", **name}, make
        if "with text" in args.parts:
            for seed in args.seeds:
                yield {"kind": "with text", **name, "seed": seed}, partial(make, seed)
        if "budget" in args.parts:
            for size in (dimensions // 32, dimensions // 16):  # about a quarter and a half
                yield {"kind": f"with text, {size} MB", **name, "seed": 0}, partial(make, 0, max_mb=size)
            yield {"kind": "with text, tokens of the text", **name, "seed": 0}, partial(make, 0, vocabulary="data")
        if "model2vec" in args.parts:
            for folder in sorted(args.work.glob(f"model2vec-*-{dimensions}*")):
                yield {"kind": folder.name, **name}, partial(students.model2vec, folder)
    if "teacher" in args.parts:
        yield {"kind": "teacher", "dimensions": 384}, lambda: students.teacher().to(torch.bfloat16)


def main(args: argparse.Namespace) -> None:
    args.work.mkdir(parents=True, exist_ok=True)
    evaluation = Evaluation(args)
    students = Students(args, evaluation.summaries["train"])
    results = args.work / "results.jsonl"
    done = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []

    def write(row: dict[str, Any]) -> None:
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(
            " | ".join(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()), flush=True
        )

    def is_done(name: dict[str, Any]) -> bool:
        return any(name.items() <= row.items() for row in done)

    for name, make in cases(args, students):
        name |= {"split": args.split, "sentences": args.sentences}
        if not is_done(name):
            model = make()
            write(name | evaluation(encoder(model)) | size_and_speed(model, evaluation.boolq[1][:1000]))
    if "outputs" in args.parts:
        for dimensions in args.dimensions:
            for seed in (None, 0):
                name = {"kind": "outputs", "dimensions": dimensions, "seed": seed, "split": args.split}
                if not is_done(name):
                    encode = encoder(students.make(dimensions, seed))
                    for how, size, shares in outputs(*map(encode, evaluation.boolq)):
                        write(
                            name | {"output": how, "bytes": size} | {f"BoolQ recall@{k}": v for k, v in shares.items()}
                        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/static-benchmark"))
    parser.add_argument("--split", choices=["dev", "test"], default="test")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS[:2])
    parser.add_argument("--dimensions", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sentences", type=int, default=20_000)
    main(parser.parse_args())
