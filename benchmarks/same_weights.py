"""Print checksums of the weights that three small runs end with, to show that a change of the code changes no training.

    OMP_NUM_THREADS=1 python benchmarks/same_weights.py OUT

Run it before and after the change, on one machine: hidden layers, on-policy samples and embeddings, on a CPU.
"""

from __future__ import annotations

import hashlib
import io
import sys
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from safetensors.numpy import load_file

import potstill
from task import stdlib_task

STUDENT = "student.design={hidden_size: 128, intermediate_size: 344, num_hidden_layers: 3, num_attention_heads: 2}"
SHORT = [
    "student.save_dtype=float32",
    "train.max_steps=12",
    "train.warmup_steps=2",
    "train.per_device_train_batch_size=4",
    "evaluate={baseline: false, continuations: 1, curve_rows: 16, time_limit: 20}",
    "data.max_length=48",
]
HIDDEN = """objective=[
    {term: logits, divergence: {kind: jsd, beta: 0.3}, temperature: {schedule: linear, start: 3, end: 1}},
    {term: labels, weight: 0.5}, {term: hidden, layers: uniform, weight: 0.2},
    {term: hidden, select_batches: 2, layers: {last_k: 1}}, {term: relations, weight: 0.1},
    {term: similarity, kind: distribution}, {term: attention, layers: [[0, 1], [-1, -1]]}]"""
SAMPLES = """objective=[
    {term: logits, divergence: reverse_kl}, {term: minillm, weight: 0.5}, {term: labels, weight: 0.1}]"""
ROLLOUT = "rollout={on_policy_fraction: 0.5, max_new_tokens: 8, prompt_tokens: 8, teacher_mix: 0.2, replay: {size: 16}}"


def checksum(folder: Path) -> str:
    """sha256 over all weights in a folder, by name."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        for name, weights in sorted(load_file(path).items()):
            digest.update(name.encode() + weights.tobytes())
    return digest.hexdigest()[:16]


def vectors(path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    low, up = torch.randn(600, 8, generator=generator), torch.randn(8, 48, generator=generator)
    np.save(path, (low @ up + 0.1 * torch.randn(600, 48, generator=generator)).numpy())


def main(out: Path) -> None:
    quiet = Console(file=io.StringIO())
    for name, sets in {"hidden layers": [HIDDEN], "on-policy samples": [SAMPLES, ROLLOUT]}.items():
        recipe = stdlib_task(out / name.replace(" ", "-"), [STUDENT, *SHORT, *sets])
        potstill.run(recipe, console=quiet)
        print(f"{name}: {checksum(Path(recipe.output) / 'student')}", flush=True)
    vectors(out / "vectors.npy")
    embedding = potstill.EmbeddingRecipe.parse(
        {
            "kind": "embedding",
            "name": "same",
            "teacher": {"vectors": str(out / "vectors.npy")},
            "student": {"head": "linear", "dimensions": 4},
            "train": {"epochs": 2, "batch_size": 64},
            "output": str(out / "embeddings"),
        }
    )
    potstill.run_embedding(embedding, console=quiet)
    print(f"embeddings: {checksum(Path(embedding.output) / 'student')}")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    main(folder)
