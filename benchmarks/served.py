"""Text from a vLLM server and from the local engine: how many rows a second?

    VLLM_CPU_KVCACHE_SPACE=1 .venv-server/bin/python -m vllm.entrypoints.openai.api_server --enforce-eager \
        --model src/potstill/demo/teacher --served-model-name demo --dtype float32 --max-model-len 512 --port 8000 &
    .venv/bin/python benchmarks/served.py --url http://127.0.0.1:8000 --pid $!

Both write 64 tokens behind each of 32 prompts of 32 tokens with the demo's teacher of 5.3M parameters in float32, at
temperature 1; the end of text is as unlikely in both. The server gets as many requests at once as the local
engine has rows in a batch. The best of two rounds after one that is not counted. `--pid` is the server's process: the
processor's seconds are then counted for it and its children, which are what counts where other work runs beside.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from measure import machine, table
from potstill.engines.local import LocalEngine
from potstill.engines.sampling import Sampling
from potstill.engines.server import ModelServer
from potstill.models.loading import load_model, load_tokenizer

TEACHER = Path(__file__).parents[1] / "src/potstill/demo/teacher"
PROMPTS, PROMPT, NEW, ROUNDS = 32, 32, 64, 2
AT_ONCE = (8, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", default="demo", help="the name under which it is served")
    parser.add_argument("--pid", type=int, help="of the server")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(str(TEACHER), "teacher")
    model = load_model(str(TEACHER), "teacher", "float32")
    draw = random.Random(0)
    prompts = [[draw.randrange(8, len(tokenizer)) for _ in range(PROMPT)] for _ in range(PROMPTS)]
    rows = []
    for at_once in AT_ONCE:
        server = ModelServer(options.url, options.model, concurrency=at_once, timeout_s=600.0)
        engines: dict[str, tuple[Any, Callable[[], float] | None]] = {
            "local": (LocalEngine(model, tokenizer, at_once), time.process_time),
            "vLLM": (server, None if options.pid is None else lambda: _processor_s(options.pid)),
        }
        for name, (engine, processor) in engines.items():
            spent = [_round(engine, prompts, processor, seed) for seed in range(ROUNDS + 1)][1:]
            clock, own = (min(each) for each in zip(*spent, strict=True))
            rates = [f"{PROMPTS / clock:.1f}", "" if processor is None else f"{PROMPTS / own:.1f}"]
            rows.append([name, str(at_once), *rates])
            print(rows[-1], flush=True)
    print(table(["engine", "batch size", "rows per second", "rows per CPU second"], rows))
    print(machine("cpu"))


def _round(engine: Any, prompts: list[list[int]], processor: Callable[[], float] | None, seed: int) -> list[float]:
    """Seconds of the clock and of the processor."""
    processor = processor or (lambda: 0.0)
    before, start = processor(), time.perf_counter()
    texts = engine.complete(prompts, Sampling(max_new_tokens=NEW, seed=seed))
    assert len(texts) == len(prompts)
    return [time.perf_counter() - start, processor() - before]


def _processor_s(pid: int) -> float:
    """Of a process and all that it has started."""
    stats = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = file.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
        stats[int(file.parent.name)] = (int(fields[1]), (int(fields[11]) + int(fields[12])) / 100)
    family = {pid}
    while more := {one for one, (parent, _) in stats.items() if parent in family} - family:
        family |= more
    return sum(stats[one][1] for one in family if one in stats)


if __name__ == "__main__":
    main()
