"""A cache from a teacher that does not fit into memory: layer by layer (--stream) and offloaded to the disk.

    .venv/bin/python benchmarks/streamed.py              # about 4 GB of weights on the disk of OUT, removed at the end
    .venv/bin/python benchmarks/streamed.py --dry        # a small model, seconds

The teachers are Llamas of random numbers in bfloat16, in files of about 400 MB. `large` is the proof that the memory is
bounded, with few rows; `rows` has more rows and fewer weights, for the cost. Each cache is built in a fresh process:
its own CPU time, the bytes of weights that it took from files, and the most memory that it had (getrusage), all
libraries and mapped files included. The caches must be the same, byte for byte.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import OffloadedWeightsLoader
from rich.console import Console
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from measure import fresh, keep, machine, table
from potstill.data.sources import Source
from potstill.demo.recipe import TEACHER
from potstill.models.loading import load_tokenizer
from potstill.runs.cache import CacheRequest, build
from potstill.teachers.model import ModelSource
from potstill.teachers.streamed import StreamedTeacher

FILE_BYTES = 400_000_000
# width, layers, rows, tokens of a row, rows of a batch, and the memory for weights of the teacher that is offloaded
CASES = {"large": (2048, 40, 4, 16, 4, "300MiB"), "rows": (512, 8, 64, 128, 8, "20MiB")}
DRY = {"large": (128, 6, 4, 16, 4, "3MiB"), "rows": (64, 4, 16, 32, 4, "2MiB")}


def write_teacher(folder: Path, width: int, layers: int) -> int:
    """Save a Llama of random weights, a few layers in memory at a time; return its bytes."""
    tokenizer = load_tokenizer(str(TEACHER))
    sizes = {"hidden_size": width, "intermediate_size": 11 * width // 4, "num_attention_heads": width // 64}
    config = LlamaConfig(
        vocab_size=len(tokenizer), num_hidden_layers=layers, tie_word_embeddings=False, dtype="bfloat16", **sizes
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in LlamaForCausalLM(config).state_dict().items()}
    weights: dict[str, torch.Tensor] = {}
    index: dict[str, str] = {}
    generator = torch.Generator().manual_seed(0)
    numbers = {shape: torch.randn(shape, generator=generator).bfloat16() * 0.02 for shape in sorted({*shapes.values()})}
    total = file_bytes = 0

    def write() -> None:
        name = f"model-{len({*index.values()}) + 1:05d}-of-99999.safetensors"
        save_file(weights, folder / name, {"format": "pt"})
        index.update(dict.fromkeys(weights, name))
        weights.clear()

    for name, shape in shapes.items():
        values = torch.ones(shape, dtype=torch.bfloat16) if len(shape) == 1 else numbers[shape]
        weights[name] = values.roll(len(index) + len(weights))  # each its own, at little cost
        total, file_bytes = total + weights[name].nbytes, file_bytes + weights[name].nbytes
        if file_bytes > FILE_BYTES:
            write()
            file_bytes = 0
    if weights:
        write()
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return total


def write_rows(path: Path, rows: int, tokens: int) -> None:
    chosen = random.Random(0)
    lines = [json.dumps({"input_ids": [chosen.randrange(10, 1000) for _ in range(tokens)]}) for _ in range(rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def run_build(way: str, folder: Path, batch_rows: int, memory: str) -> dict[str, float]:
    """Build a cache in this process, and measure what it cost."""
    took = 0

    def count(self: Any, name: str) -> Any:
        nonlocal took
        weight = read(self, name)
        took += weight.nbytes
        return weight

    read = OffloadedWeightsLoader.__getitem__
    OffloadedWeightsLoader.__getitem__ = count  # type: ignore[method-assign]
    place: dict[str, Any] = {}
    if way == "offloaded":
        place = {"device_map": "auto", "max_memory": {"cpu": memory}, "offload_folder": str(folder / "offload")}
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    began, clock = time.process_time(), time.perf_counter()
    source = ModelSource(str(folder / "teacher"), "bfloat16", "cpu" if way == "streamed" else None, **place)
    out, rows = folder / way, [Source(str(folder / "rows.jsonl"))]
    precompute = StreamedTeacher.precompute

    def counted(self: StreamedTeacher, *arguments: Any) -> Any:
        nonlocal took
        yield from precompute(self, *arguments)
        took = self.parts.bytes_read

    StreamedTeacher.precompute = counted  # type: ignore[method-assign]
    request = CacheRequest(source, rows, 128, False, "top_k", {"k": 16}, out, batch_rows, stream=way == "streamed")
    build(request, console=Console(quiet=True))
    return {
        "cpu_seconds": time.process_time() - began,
        "seconds": time.perf_counter() - clock,
        "bytes": took,
        "start": start,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def signals(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "shards").iterdir()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--dry", action="store_true", help="small models")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-streamed"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"machine": machine("cpu")}
    cells = []
    for case in args.cases:
        width, layers, rows, tokens, batch_rows, memory = (DRY if args.dry else CASES)[case]
        folder = args.out / case
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "teacher").mkdir(parents=True)
        total = fresh(write_teacher, folder / "teacher", width, layers)  # getrusage counts what the parent had
        write_rows(folder / "rows.jsonl", rows, tokens)
        for way in ("streamed", "offloaded"):
            found = fresh(run_build, way, folder, batch_rows, memory)
            results[f"{case} {way}"] = found
            keep(args.out / "results.json", results)
            amounts = [f"{found[name] / 1e9:.2f}" for name in ("bytes", "start", "peak")]
            cells.append(
                [f"{total / 1e9:.2f} GB, {rows} x {tokens} tokens", way, f"{found['cpu_seconds']:.0f}", *amounts]
            )
            print(cells[-1], flush=True)
        same = signals(folder / "streamed") == signals(folder / "offloaded")
        shutil.rmtree(folder)
        print(f"{case}: the signals are {'the same' if same else 'not the same'}", flush=True)
    header = ["teacher, rows", "way", "CPU, s", "weights taken from files, GB", "memory at the start, GB", "most, GB"]
    print(table(header, cells))


if __name__ == "__main__":
    main()
