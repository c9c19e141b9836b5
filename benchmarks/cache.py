"""Teacher signals on disk: size, speed, steps, quality and scale. One command, or a part of it:

    .venv/bin/python benchmarks/cache.py                        # everything: about an hour on 2 cores
    .venv/bin/python benchmarks/cache.py --parts bytes encode step scale
    .venv/bin/python benchmarks/cache.py --parts quality --seeds 0 1 2

bytes    bytes a token, and tokens a second packed and unpacked on one core. The teacher is synthetic: a Zipf prior
         over the vocabulary and a random context, made so that 50 draws hold about 12 tokens, as published for text.
encode   the time of packing beside the teacher's own forward pass, at V = 151,936.
step     one optimiser step: labels alone, from caches, from live teachers 10 and 30 times the student's size.
quality  the demo's task: held-out KL to the teacher after training from the live teacher and from caches.
scale    a cache of many tokens: time to open, to verify, and memory while it is read at random.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from measure import keep, machine, mb, own_bytes, table
from potstill import Distiller, ForwardKL, Labels, Logits, ModelTeacher
from potstill.losses.alignment import causal_alignment
from potstill.losses.targets import DenseTargets
from potstill.models.split import forward_targets, split_model
from potstill.runs.cache import CacheRequest, build
from potstill.runs.config.run import Recipe
from potstill.runs.run import run
from potstill.teachers.cache.codec import Codec, Dense, Sampled, TopK
from potstill.teachers.cache.store import (
    COMPRESSION,
    FORMAT,
    MANIFEST,
    Cache,
    CachedRow,
    CachePlan,
    Manifest,
    manifest_text,
    write_shard,
)
from potstill.teachers.teacher import Teacher
from recorded import Recorded, language_like_logits
from task import stdlib_task

QUIET = Console(quiet=True)
VOCABULARIES = (32_000, 151_936)
LEARN_FROM: dict[str, dict[str, int] | None] = {"live": None, "sampled": {"draws": 50}, "top_k": {"k": 64}}


def timed(call: Callable[[], Any], rounds: int = 5) -> float:
    """The median of several calls after one that does not count: seconds of the processor, which others may use too."""
    call()
    spent = []
    for _ in range(rounds):
        start = time.process_time()
        call()
        spent.append(time.process_time() - start)
    return statistics.median(spent)


def bytes_part(_: argparse.Namespace) -> tuple[list[str], list[list[str]]]:
    torch.set_num_threads(1)
    cells = []
    for vocabulary in VOCABULARIES:
        logits, labels = language_like_logits(256, vocabulary), torch.randint(vocabulary, (256,))
        for codec in (Sampled(vocabulary), TopK(vocabulary), Dense(vocabulary)):
            row = codec.encode(DenseTargets(logits), 0, labels=labels)
            packed = COMPRESSION.compress(row, asbytes=True)
            rows = 1 if codec.name == "dense" else 40  # a batch of 10,240 tokens

            def unpack(codec: Codec = codec, packed: bytes = packed, size: int = len(row), rows: int = rows) -> None:
                signals = [COMPRESSION.decompress(packed, size, asbytes=True) for _ in range(rows)]
                codec.decode(signals, [256] * rows)

            def pack(codec: Codec = codec, logits: torch.Tensor = logits, labels: torch.Tensor = labels) -> None:
                COMPRESSION.compress(codec.encode(DenseTargets(logits), 0, labels=labels))

            cells.append(
                [
                    f"{vocabulary:,}",
                    codec.name,
                    f"{len(packed) / 256:,.1f}",
                    f"{256 / timed(pack):,.0f}",
                    f"{256 * rows / timed(unpack):,.0f}",
                ]
            )
    return ["V", "codec", "bytes a token", "packed, tokens/s", "unpacked, tokens/s"], cells


def llama(width: int, layers: int, vocabulary: int, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    heads = width // 64
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def batch_of(rows: int, length: int, vocabulary: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


@torch.no_grad()
def encode_part(_: argparse.Namespace) -> tuple[list[str], list[list[str]]]:
    """A teacher of Qwen2.5-0.5B's size and vocabulary."""
    vocabulary = VOCABULARIES[1]
    teacher = llama(896, 24, vocabulary).eval()
    batch = batch_of(1, 257, vocabulary)
    alignment, how = causal_alignment(batch["labels"]), split_model(teacher)
    logits = forward_targets(teacher, how, batch, alignment).dense()
    forward = timed(lambda: forward_targets(teacher, how, batch, alignment).dense(), 3)
    cells = []
    for codec in (Sampled(vocabulary), TopK(vocabulary)):
        spent = timed(lambda codec=codec: COMPRESSION.compress(codec.encode(DenseTargets(logits), 0)), 3)
        cells.append([codec.name, f"{1000 * forward:,.0f}", f"{1000 * spent:,.0f}", f"{spent / forward:.1%}"])
    parameters = sum(each.numel() for each in teacher.parameters())
    return ["codec", f"forward of {parameters / 1e6:,.0f}M parameters, ms", "packing, ms", "share"], cells


def step_part(_: argparse.Namespace) -> tuple[list[str], list[list[str]]]:
    vocabulary, rows, length = 32_000, 8, 512
    student = llama(256, 4, vocabulary)
    batch = batch_of(rows, length, vocabulary)
    stored = [DenseTargets(language_like_logits(length - 1, vocabulary, seed)) for seed in range(rows)]
    teachers: dict[str, Teacher | None] = {
        "labels": None,
        "cache, sampled": Recorded(Sampled(vocabulary), stored),
        "cache, top_k": Recorded(TopK(vocabulary), stored),
        "live, 10 times": ModelTeacher(llama(1024, 6, vocabulary)),
        "live, 30 times": ModelTeacher(llama(1536, 9, vocabulary)),
    }
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)

    def step(distiller: Distiller) -> None:
        distiller.step(batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    steps = {
        name: Distiller(student, teacher, [Labels()] if teacher is None else [Logits(ForwardKL())])
        for name, teacher in teachers.items()
    }
    spent: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(4):  # the contestants take turns; the first round does not count
        for name, distiller in steps.items():
            start = time.perf_counter()
            step(distiller)
            if turn:
                spent[name].append(time.perf_counter() - start)
    times = {name: statistics.median(each) for name, each in spent.items()}
    student_parameters = sum(each.numel() for each in student.parameters())
    cells = []
    for name, teacher in teachers.items():
        of_teacher = sum(p.numel() for p in teacher.model.parameters()) if isinstance(teacher, ModelTeacher) else 0
        size = f"{of_teacher / student_parameters:.1f}" if of_teacher else ""
        cells.append([name, size, f"{times[name]:.2f}", f"{times[name] / times['labels']:.2f}"])
    return ["teacher", "times the student's size", "s per step", "relative to labels only"], cells


def quality_part(args: argparse.Namespace) -> tuple[list[str], list[list[str]]]:
    """KL to the teacher on all held-out files, by what the student learnt from."""
    found: dict[str, list[float]] = {}
    for seed in args.seeds:
        out = args.out / f"seed{seed}"
        live = stdlib_task(
            out / "live", [f"seed={seed}", "evaluate.baseline=false", "evaluate.continuations=0", *args.set]
        )
        for name in args.learn_from:
            parameters = LEARN_FROM[name]
            values = live.model_dump(exclude_none=True)
            if parameters is not None:
                cache = args.out / f"cache-{name}"
                sources = [live.data.train]
                build(CacheRequest(live.teacher, sources, 128, True, name, parameters, cache), console=QUIET)
                values["teacher"]["cache"] = str(cache)
                values["output"] = str(out / name)
            summary = run(Recipe.parse(values), resume=True, console=QUIET).summary
            found.setdefault(name, []).append(summary["rows"]["student"]["kl"])
    means = {name: statistics.mean(each) for name, each in found.items()}
    cells = [
        [
            name,
            *(f"{kl:.4f}" for kl in each),
            f"{means[name]:.4f}",
            f"{means[name] / means['live'] - 1:+.1%}" if "live" in means else "",
        ]
        for name, each in found.items()
    ]
    return ["trained from", *(f"seed {seed}" for seed in args.seeds), "mean KL", "relative to live"], cells


def scale_part(args: argparse.Namespace) -> tuple[list[str], list[list[str]]]:
    """Synthetic signals: 512-token rows that repeat, under keys that do not."""
    rows, per_shard = args.tokens // 512, 512
    codec = Sampled(32_000)
    signals = [codec.encode(DenseTargets(language_like_logits(512, 32_000, seed)), seed) for seed in range(8)]
    keys = np.random.default_rng(0).bytes(16 * rows)
    plan = CachePlan(
        format=FORMAT,
        teacher="synthetic",
        weights="",
        tokenizer="",
        vocabulary=32_000,
        codec=codec.record(),
        alignment="",
        sources=[("synthetic", rows, 512 * rows, "")],
        shard_rows=per_shard,
        batch_rows=8,
        versions={},
    )
    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        directory = Path(folder)
        shards = []
        for start in range(0, rows, per_shard):
            shard_rows = range(start, min(start + per_shard, rows))
            content = (CachedRow(keys[16 * row : 16 * row + 16], 512, signals[row % 8]) for row in shard_rows)
            shards.append(write_shard(directory / "shards" / f"{start:08d}.arrow", content))
        manifest = Manifest(plan=plan, shards=shards, files={})
        (directory / MANIFEST).write_text(manifest_text(asdict(manifest)), encoding="utf-8")
        size = sum(path.stat().st_size for path in (directory / "shards").iterdir())
        opening = timed(lambda: Cache(directory, verify=False), 3)
        verifying = timed(lambda: Cache(directory), 1)
        cache, order = Cache(directory, verify=False), np.random.default_rng(1).permutation(rows)
        before = own_bytes()
        start_time = time.perf_counter()
        wanted = order[: min(rows, 20_000)]
        for first in range(0, len(wanted), 8):
            some = wanted[first : first + 8]
            found = cache.find([keys[16 * row : 16 * row + 16] for row in some])
            codec.decode(*cache.signals(found))
        spent = time.perf_counter() - start_time
        grown = own_bytes() - before
    cells = [
        [
            f"{512 * rows:,}",
            mb(size),
            f"{opening:.2f}",
            f"{verifying:.1f}",
            f"{512 * len(wanted) / spent:,.0f}",
            mb(max(grown, 0)),
        ]
    ]
    header = ["tokens", "MB on disk", "opened, s", "verified, s", "read at random, tokens/s", "own memory grown by, MB"]
    return header, cells


PARTS: dict[str, Callable[[argparse.Namespace], tuple[list[str], list[list[str]]]]] = {
    "bytes": bytes_part,
    "encode": encode_part,
    "step": step_part,
    "quality": quality_part,
    "scale": scale_part,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--learn-from", nargs="+", choices=list(LEARN_FROM), default=list(LEARN_FROM))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="changes to the demo's recipe")
    parser.add_argument("--tokens", type=int, default=100_000_000, help="of scale")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-cache"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"machine": machine("cpu")}
    for part in args.parts:
        header, cells = PARTS[part](args)
        results[part] = [dict(zip(header, row, strict=True)) for row in cells]
        keep(args.out / "results.json", results)
        print(f"\n{part}\n\n{table(header, cells)}", flush=True)


if __name__ == "__main__":
    main()
