"""Small commands of every kind for the parts of `faults.py`: what they read and leave, and forks that run them."""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))  # whose toys these are

# The process of `faults.py` itself imports little: its forks have everything.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["potstill.runs.run", "potstill.runs.embedding", "potstill.cli", "torch._dynamo", "conftest", "fault_toys"]
)
SECONDS = 600  # that a fork may take

TRAIN = {"max_steps": 6, "save_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
EVALUATE = {"baseline": True, "time_limit": 1e-6, "continuations": 1, "curve_rows": 8}


@dataclass(frozen=True)
class Command:
    """A command of potstill in a folder of toys, and the files that it leaves, which are always the same bytes."""

    arguments: tuple[str, ...]
    results: tuple[str, ...]  # globs
    resume: tuple[str, ...] = ()


COMMAND = {
    "run": Command(("run", "run.yaml"), ("run/student/*", "run/baseline/*", "run/metrics.jsonl"), ("--resume",)),
    "cache": Command(
        ("cache", "build", "--teacher", "teacher", "--data", "train.jsonl", "--max-length", "32", "--out", "signals"),
        ("signals/**/*",),
    ),
    "generate": Command(("generate", "generate.yaml"), ("texts/*.jsonl",), ("--resume",)),
    "embedding": Command(("run", "embedding.yaml"), ("vectors/student/*", "vectors/metrics.jsonl"), ("--resume",)),
    "export": Command(("export", "finished", "--to", "gguf", "--quantize", "f16,q8_0"), ("finished/export/*.gguf",)),
    "sweep": Command(
        ("sweep", "run.yaml", "--vary", "train.learning_rate=1e-2,2e-2", "--set", "evaluate.baseline=false"),
        ("run-sweep/*/student/*", "run-sweep/*/metrics.jsonl"),
        ("--resume",),
    ),
}


def make_toys(folder: Path) -> Path:
    """Make the folder that commands are run in a copy of, unless it is there."""
    _preload(folder.parent)
    if (folder / "finished").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    assert in_fork(_make_models, (folder,)) == 0
    data = {"train": {"path": "train.jsonl"}, "eval": {"path": "eval.jsonl"}, "max_length": 32, "packing": True}
    run = {
        "name": "toy",
        "teacher": {"model": "teacher"},
        "student": {"design": {"hidden_size": 32, "num_hidden_layers": 1}},
        "data": data,
        "objective": [{"term": "logits"}, {"term": "labels", "weight": 0.5}],
        "train": TRAIN,
        "evaluate": EVALUATE,
        "output": "run",
    }
    generate = {
        "kind": "generate",
        "name": "sums",
        "teacher": {"model": "teacher"},
        "task": {
            "task": "chain_of_thought",
            "questions": {"path": "questions.jsonl", "answer": "answer"},
            "template": "Q: {question}\nA:",
        },
        "sampling": {"max_new_tokens": 8, "samples": 2},
        "filter": {"cut": False, "scripts": [], "repetition": None},
        "batch_size": 3,
        "output": "texts",
    }
    embedding = {
        "kind": "embedding",
        "name": "toy",
        "teacher": {"vectors": "vectors.npy"},
        "student": {"head": "linear", "dimensions": 3},
        "train": {"epochs": 3, "batch_size": 64},
        "output": "vectors",
    }
    for name, values in {"run": run, "generate": generate, "embedding": embedding}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    questions = [{"question": f"What is {i} plus {i}?", "answer": f"Add.\n#### {2 * i}"} for i in range(10)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    done = potstill("run", "run.yaml", "--set", "output=finished", folder=folder)
    assert done.status == 0, done.output
    return folder


def _make_models(folder: Path) -> None:
    import numpy as np

    import conftest

    tokenizer = conftest.make_tokenizer()
    model = conftest.make_llama(hidden_size=32, seed=1)  # llama.cpp quantizes in blocks of 32
    model.save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    for name, texts in (("train", conftest.TEXT[:40]), ("eval", conftest.TEXT[40:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    np.save(folder / "vectors.npy", np.random.default_rng(0).standard_normal((400, 24), dtype=np.float32))


def in_fork(function: Callable[..., object], arguments: tuple[Any, ...] = ()) -> int:
    """Call a function in a fork of a process that has imported everything; return its exit status."""
    process = FORKS.Process(target=function, args=arguments, daemon=True)
    process.start()
    process.join(SECONDS)
    if process.exitcode is None:
        process.kill()
        process.join()
    assert process.exitcode is not None
    return process.exitcode


class Done(NamedTuple):
    """A command that has ended."""

    status: int
    output: str

    @property
    def one_line(self) -> bool:
        """Whether it failed with status 1 or 2 and, behind its notes, one line of advice; no traceback."""
        last = self.output.strip().splitlines()[-1:]
        return self.status in (1, 2) and "Traceback" not in self.output and bool(last) and last[0].endswith(".")


def potstill(
    *arguments: str, folder: Path, before: Callable[..., object] | None = None, given: tuple[Any, ...] = ()
) -> Done:
    """Run a command in a fork; `before(*given)` brings the fault into it."""
    output = folder.parent / f"{folder.name}.output"
    status = in_fork(_main, (arguments, folder, output, before, given))
    return Done(status, output.read_text(errors="replace"))


def _main(arguments: tuple[str, ...], folder: Path, output: Path, before: Any, given: tuple[Any, ...]) -> None:
    import datasets

    from potstill.cli import main
    from potstill.runs import cache

    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    datasets.config.HF_DATASETS_CACHE = folder / "datasets"
    cache.SHARD_TOKENS = 300  # several shards
    if before is not None:
        before(*given)
    sys.argv = ["potstill", *arguments]
    try:
        main()
    finally:
        calls = ctypes.CDLL(os.environ["LD_PRELOAD"]).failing_disk_calls()
        fail_disk(folder, 0, 0, 0, False)
        with suppress(OSError):  # where no file can be opened; the count is of undisturbed commands
            output.with_suffix(".calls").write_text(str(calls))


def results(folder: Path, command: Command) -> dict[str, bytes]:
    """What a command left, without times."""
    files = sorted(file for pattern in command.results for file in folder.glob(pattern) if file.is_file())
    return {file.relative_to(folder).as_posix(): _without_times(file) for file in files}


def _without_times(file: Path) -> bytes:
    content = file.read_bytes()
    if file.name == "README.md":
        return b""  # with times
    if file.name not in ("metrics.jsonl", "texts.jsonl"):
        return content
    try:  # values: a flipped bit may write an escape's letters in upper case
        lines = [json.loads(line) for line in content.splitlines()]
    except ValueError:
        return content
    return json.dumps([{k: v for k, v in line.items() if not is_time(k)} for line in lines]).encode()


def is_time(name: str) -> bool:
    """Also what transformers averages over the steps of the last process alone."""
    return name.endswith(("seconds", "runtime", "per_second")) or name == "train_loss"


# Faults


def _preload(folder: Path) -> None:
    """Compile failing_disk.c, and have it in all commands that are started from here on."""
    if "LD_PRELOAD" not in os.environ:
        target, source = folder.resolve() / "failing_disk.so", Path(__file__).with_name("failing_disk.c")
        subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", str(target), str(source), "-ldl"], check=True)
        os.environ["LD_PRELOAD"] = str(target)


def fail_disk(folder: Path, kinds: int, number: int, code: int, sticky: bool) -> None:
    """Let the number-th call of some kinds on files in a folder fail."""
    ctypes.CDLL(os.environ["LD_PRELOAD"]).failing_disk(f"{folder}/".encode(), kinds, number, code, int(sticky))


def limit_files(more: int) -> None:
    """Allow some more open files than there are."""
    now = len([*Path("/proc/self/fd").iterdir()])
    resource.setrlimit(resource.RLIMIT_NOFILE, (now + more, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
