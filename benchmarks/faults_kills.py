"""Kills and signals: a command is ended at some moment and started again until it is done.

What it then leaves must be what a command that was left alone leaves: the same files, byte for byte, but for times. The
models are toys, and each process is forked from one that has imported everything, so that a case takes seconds.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import yaml

from drill import Case, Drill

sys.path.append(str(Path(__file__).parent.parent / "tests"))
import processes
from file_faults import FileFault

SECONDS = 900.0  # at most, for a process that is not killed, on a busy machine
TIMES = re.compile(
    r"seconds|runtime|per_second|latency|speed_up|created|_ms$|peak_bytes"
)  # keys of what differs each time
PAGES = {"report.html", "sweep.html"}
_TEMPORARY = re.compile(r"\.[0-9a-f]{8}-\d+-[0-9a-f]{8}\.partial")
OPAQUE = {"training_args.bin", "potstill_checksums.json"}  # of paths and times; checked files are compared themselves


@dataclass(frozen=True)
class Command:
    """A command to be killed: what stands in an empty folder before it, and its arguments, which also resume it."""

    prepare: Callable[[Path, Path], None]  # of the folder with the toys, and the case's
    arguments: tuple[str, ...]


LOCK = threading.RLock()  # of what parts share, several of which may be tried at a time


def toys(out: Path) -> Path:
    """A folder with a teacher, a student, texts and vectors, made once."""
    folder = (out / "toys-killed").absolute()
    if not folder.exists():
        import numpy as np

        from conftest import TEXT, make_llama, make_tokenizer
        from test_embedding_training import TRAIN

        partial = folder.with_name("toys.partial")
        for name, model in (("teacher", make_llama(seed=1)), ("student", make_llama(hidden_size=8, layers=1))):
            model.save_pretrained(partial / name)
            make_tokenizer().save_pretrained(partial / name)
        for name, texts in (("train", TEXT[:40]), ("eval", TEXT[40:])):
            (partial / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        questions = [{"question": f"What is {i} plus {i}?", "answer": f"#### {2 * i}"} for i in range(24)]
        (partial / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
        np.save(partial / "embeddings.npy", TRAIN.numpy())
        partial.rename(folder)
    return folder


def recipe(toys: Path, folder: Path, **changes: Any) -> None:
    """Write the recipe of a small training into a folder."""
    from conftest import toy_recipe

    values = toy_recipe(toys, "run") | {"evaluate": {"baseline": True, "continuations": 0}}
    values["train"] |= {"max_steps": 12, "save_steps": 3, "eval_steps": 6}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values | changes))


def _sweep(toys: Path, folder: Path) -> None:
    train = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
    recipe(toys, folder, train=train, evaluate={"continuations": 0})


def _generate(toys: Path, folder: Path) -> None:
    values = {
        "kind": "generate",
        "name": "sums",
        "teacher": {"model": str(toys / "teacher")},
        "task": {
            "task": "chain_of_thought",
            "questions": {"path": str(toys / "questions.jsonl"), "answer": "answer"},
            "template": "Q: {question}\nA:",
        },
        "sampling": {"max_new_tokens": 8, "samples": 2},
        "filter": {"cut": False, "scripts": [], "repetition": None},
        "batch_size": 2,
        "output": "run",
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))


def _embedding(toys: Path, folder: Path) -> None:
    values = {
        "kind": "embedding",
        "name": "toy",
        "teacher": {"vectors": str(toys / "embeddings.npy")},
        "student": {"head": "mlp", "hidden": 8, "dimensions": 3},
        "train": {"epochs": 4, "batch_size": 32, "temperature": {"start": 4.0, "end": 1.0, "stages": 3}},
        "output": "run",
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))


def _model(toys: Path, folder: Path) -> None:
    shutil.copytree(toys / "student", folder / "model")
    for name in ("train", "eval"):
        shutil.copy(toys / f"{name}.jsonl", folder)
    (folder / "teacher").symlink_to(toys / "teacher")


_CACHE = ("cache", "build", "--teacher", "teacher", "--data", "train.jsonl", "--out", "run", "--max-length", "32")
_EXPORT = ("export", "model", "--data", "eval.jsonl", "--teacher", "teacher", "--max-length", "32", "--tokens", "100")

_EVALUATE = ("evaluate", "model", "--data", "eval.jsonl", "--teacher", "teacher", "--max-length", "32")

COMMANDS = {
    "train": Command(recipe, ("run", "recipe.yaml", "--resume")),
    "cache": Command(_model, (*_CACHE, "--codec", "hidden", "--batch-size", "4")),
    "generate": Command(_generate, ("generate", "recipe.yaml", "--resume")),
    "sweep": Command(_sweep, ("sweep", "recipe.yaml", "--vary", "seed=0,1", "--out", "run", "--resume")),
    "export": Command(_model, (*_EXPORT, "--quantize", "f16,q8_0")),
    "embedding": Command(_embedding, ("run", "recipe.yaml", "--resume")),
    "evaluate": Command(_model, (*_EVALUATE, "--length", "16", "--out", "out.json")),
}

# Processes


def start(command: Command, folder: Path, fault: FileFault | None = None) -> BaseProcess:
    """Start a command in the folder of a case; what it prints goes to `printed` there."""
    return processes.start(folder / "printed", begin, command.arguments, folder, fault)


def begin(arguments: tuple[str, ...], folder: Path, fault: FileFault | None) -> None:
    """The command, in this process."""
    import gc

    import datasets
    import torch

    from potstill.runs import cache

    gc.freeze()  # collecting what was imported would copy the memory of the process that this one is forked from
    torch.set_num_threads(1)
    datasets.config.HF_DATASETS_CACHE = folder / "datasets"
    cache.SHARD_TOKENS = 150
    (folder / "printed-begun").touch()
    processes.potstill_here(arguments, folder, fault)


def warm(out: Path) -> None:
    """Let processes be forked from one that has imported what the commands need; make the toys."""
    with LOCK:
        toys(out)
    preload = ["runs.run", "cli", "runs.cache", "runs.generate", "runs.sweep", "runs.export", "runs.embedding"]
    modules = [*(f"potstill.{name}" for name in preload), "torch._dynamo", "gguf", "xllamacpp", "conftest"]
    processes.CONTEXT.set_forkserver_preload(modules)
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def finish(command: Command, folder: Path) -> str | None:
    """Start a command until it is done; what went wrong, if anything."""
    if status := processes.finish(start(command, folder), SECONDS):
        return f"exit status {status}: {(folder / 'printed').read_text()[-2000:]}"
    return None


# Results


def result(folder: Path) -> dict[str, str]:
    """All files of a case, by name: a digest of what is in them, without times."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() or not any(path.iterdir())):
        name = path.relative_to(folder).as_posix()
        # A killed process leaves the file of its lock, which the next command there takes and removes.
        if not name.startswith(("printed", "rank-", "teacher/")) and path.name != ".potstill.lock":
            found[name] = "folder" if path.is_dir() else hashlib.sha256(_content(path)).hexdigest()[:16]
    return found


def _content(path: Path) -> bytes:
    if path.name in OPAQUE:
        return b""
    if path.name.endswith(".pt.sha256"):
        return b""
    if path.name.startswith("stage-"):  # its pickle depends on which objects are the same one
        import torch

        return repr(_values(torch.load(path, weights_only=True))).encode()
    if path.suffix == ".json":
        return json.dumps(_timeless(json.loads(path.read_text()))).encode()
    if path.name == "metrics.jsonl":
        return "\n".join(json.dumps(_timeless(json.loads(line))) for line in path.read_text().splitlines()).encode()
    of_head = (path.parent / "head.safetensors").exists()  # an embedding student's card has no times
    if path.name in PAGES or (path.parts[-2:] == ("student", "README.md") and not of_head):
        return b"current" if _page(path) == path.read_bytes() else b"not what its inputs give"
    return path.read_bytes()


def _values(content: Any) -> Any:
    """What torch loaded, with lists in place of tensors."""
    if isinstance(content, dict):
        return {key: _values(item) for key, item in content.items()}
    if isinstance(content, list | tuple):
        return [_values(item) for item in content]
    return content.tolist() if hasattr(content, "tolist") else content


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if not TIMES.search(key)}
    if isinstance(value, str):
        return re.sub(r"[\d.,]+ ms\b", "", value)
    return [_timeless(item) for item in value] if isinstance(value, list) else value


def _page(path: Path) -> bytes:
    """Write a page once more from the files that it is made of."""
    with LOCK:  # threads that import torch at the same time fail
        return _page_again(path)


def _page_again(path: Path) -> bytes:
    from potstill.evaluate.report.embedding import write_embedding_report
    from potstill.evaluate.report.page import write_report, write_student_card
    from potstill.evaluate.report.sweep import write_sweep_report

    directory = path.parent.parent if path.name == "README.md" else path.parent
    summary = json.loads((directory / ("sweep.json" if path.name == "sweep.html" else "summary.json")).read_text())
    reports = {"sweep": write_sweep_report, "embedding": write_embedding_report}
    write = write_student_card if path.name == "README.md" else reports.get(summary.get("kind"), write_report)
    before = path.read_bytes()
    write(directory)
    again = path.read_bytes()
    path.write_bytes(before)
    return again


def differences(whole: dict[str, str], other: dict[str, str]) -> dict[str, str]:
    """The files in which two results differ."""
    names = sorted(whole.keys() | other.keys())
    words = {(True, False): "missing", (False, True): "left over", (True, True): "different"}
    return {name: words[name in whole, name in other] for name in names if whole.get(name) != other.get(name)}


@dataclass(frozen=True)
class Whole:
    """A command that was left alone: its result, its seconds, and its changes of files."""

    result: dict[str, str]
    sizes: dict[str, int]  # of the files that the command made
    seconds: float
    changes: list[str]


def empty(folder: Path) -> None:
    """Make an empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def whole(name: str, out: Path) -> Whole:
    """Run a command in a folder, once, and leave it alone."""
    with LOCK:
        return _whole(name, out)


@functools.cache
def _whole(name: str, out: Path) -> Whole:
    folder, log = out / "whole" / name, out / "whole" / f"{name}.changes"
    command = COMMANDS[name]
    for _ in range(2):  # the first pays for what is imported late
        empty(folder)
        log.unlink(missing_ok=True)
        command.prepare(toys(out), folder)
        given = result(folder)
        begun = time.monotonic()
        status = processes.finish(start(command, folder, FileFault(folder, log=log.absolute())), SECONDS)
        seconds = time.monotonic() - begun
        if status:
            raise RuntimeError(f"{name}: exit status {status}: {(folder / 'printed').read_text()}")
    made = {name: kind for name, kind in result(folder).items() if name not in given}
    sizes = {name: (folder / name).stat().st_size for name, kind in made.items() if kind != "folder"}
    return Whole(result(folder), sizes, seconds, log.read_text().splitlines())


def _prepared(drill: Drill, name: str, count: int) -> Iterator[tuple[Case, Command, Whole]]:
    out = drill.folder.parent.absolute()
    for case in drill.cases(count):
        COMMANDS[name].prepare(toys(out), case.folder)
        yield case, COMMANDS[name], whole(name, out)


# Parts


def kill_anytime(drill: Drill, name: str, count: int) -> None:
    """SIGKILL at random moments, up to three times, then once more to the end."""
    warm(drill.folder.parent.absolute())
    for case, command, alone in _prepared(drill, name, count):
        folder, kills = case.folder.absolute(), list[str]()
        for _ in range(case.rng.randint(1, 3)):
            process = start(command, folder)
            process.join(case.rng.uniform(0, alone.seconds))
            if process.exitcode is not None:
                break
            process.kill()
            process.join()
            kills.append(_reached(folder))
        wrong = finish(command, folder)
        differ = differences(alone.result, result(folder)) if wrong is None else {}
        drill.note(case.number, not wrong and not differ, kills=kills, wrong=wrong, differ=differ)


def _reached(folder: Path) -> str:
    """The last line that a process printed."""
    lines = (folder / "printed").read_text().splitlines() if (folder / "printed").exists() else []
    return lines[-1][:80] if lines else "nothing"


def kill_at_writes(drill: Drill, name: str) -> None:
    """A kill before each change of a file, and two in the midst of writing each file; in random order."""
    out = drill.folder.parent.absolute()
    warm(out)
    points = _write_points(whole(name, out), drill.seed)
    for case, command, alone in _prepared(drill, name, len(points)):
        folder = case.folder.absolute()
        change, size, kind = points[case.number]
        status = processes.finish(start(command, folder, FileFault(folder, change, size=size)), SECONDS)
        wrong = finish(command, folder) if status else None
        differ = differences(alone.result, result(folder)) if wrong is None else {}
        held = not wrong and not differ and status in (-signal.SIGKILL, -signal.SIGXFSZ, 0)
        drill.note(case.number, held, point=[change, size, kind], status=status, wrong=wrong, differ=differ)


def _write_points(alone: Whole, seed: int) -> list[tuple[int, int | None, str]]:
    """The number of a change, bytes behind which a file of this name is cut or None, and what it is; shuffled."""
    rng = random.Random(f"points {seed}")
    # A rehearsal changes hundreds of files of one folder, which is removed as a whole: each is tried once.
    kinds = {_TEMPORARY.sub(".partial", line): number for number, line in enumerate(alone.changes)}
    points: list[tuple[int, int | None, str]] = [(n, None, line) for line, n in kinds.items()]
    folders = [line.partition(" ")[2].rpartition("/")[0] for line in alone.changes]
    for name, size in alone.sizes.items():
        near = [n for n, folder in enumerate(folders) if name.startswith(folder)]
        points += [(rng.choice(near), rng.randrange(size), f"cut {name}") for _ in range(2) if near and size]
    rng.shuffle(points)
    return points


# Commands that are started at about the same time in one folder, and the command alone that leaves the same.
PAIRS = {
    "export": [(*_EXPORT, "--quantize", kind) for kind in ("f16", "q8_0")],
    "cache": [(*COMMANDS["cache"].arguments, "--shard", part) for part in ("0/2", "1/2")],
    "train": [COMMANDS["train"].arguments] * 2,
    "embedding": [COMMANDS["embedding"].arguments] * 2,
}


def side_by_side(drill: Drill, count: int) -> None:
    """Start two commands in one folder; one that is refused starts again once the other has ended."""
    warm(drill.folder.parent.absolute())
    for case in drill.cases(count):
        name = [*PAIRS][case.number % len(PAIRS)]
        out, folder = drill.folder.parent.absolute(), case.folder.absolute()
        COMMANDS[name].prepare(toys(out), folder)
        alone, offset = whole(name, out), case.rng.uniform(0, 1)
        pair = [Command(COMMANDS[name].prepare, arguments) for arguments in PAIRS[name]]
        printed = [folder / "printed-0", folder / "printed-1"]
        started = []
        for command, path in zip(pair, printed, strict=True):
            started.append(processes.start(path, begin, command.arguments, folder, None))
            time.sleep(offset * alone.seconds)
        statuses = [processes.finish(process, SECONDS) for process in started]
        busy = ["which another process is writing" in path.read_text() for path in printed]
        held = all(status == (2 if refused else 0) for status, refused in zip(statuses, busy, strict=True))
        wrong = [finish(command, folder) for command, refused in zip(pair, busy, strict=True) if refused]
        found = result(folder)
        differ = differences(alone.result, found)
        differ.pop("model/export/export.json", None)  # its files are in the order in which they were written
        held = held and not any(wrong) and not differ and not [*folder.rglob("*.partial")]
        drill.note(case.number, held, command=name, statuses=statuses, busy=busy, wrong=wrong, differ=differ)


def signals(drill: Drill, count: int) -> None:
    """SIGTERM or Ctrl-C at a random moment of each command: its exit status, one line, nothing unfinished left."""
    warm(drill.folder.parent.absolute())
    for case in drill.cases(count):
        name = [*COMMANDS][case.number % len(COMMANDS)]
        number = (signal.SIGTERM, signal.SIGINT)[case.number // len(COMMANDS) % 2]
        out, folder, command = drill.folder.parent.absolute(), case.folder.absolute(), COMMANDS[name]
        command.prepare(toys(out), folder)
        alone = whole(name, out)
        process = start(command, folder)
        while not (folder / "printed-begun").exists():
            time.sleep(0.001)
        process.join(case.rng.uniform(0.02, alone.seconds))
        if process.exitcode is None:
            os.kill(process.pid or 0, number)
        status, printed, last = processes.finish(process, SECONDS), (folder / "printed").read_text(), _reached(folder)
        left = [path.name for path in folder.rglob("*.partial")] if status else []
        line = printed.count("interrupted: saved work is kept") == 1 and "Traceback" not in printed
        wrong = finish(command, folder)
        differ = differences(alone.result, result(folder)) if wrong is None else {}
        held = not wrong and not differ and not left and (status == 0 or (status == 128 + number and line))
        facts = {"command": name, "signal": number, "status": status, "left": left, "last": last}
        drill.note(case.number, held, **facts, printed=None if held else printed[-2000:], wrong=wrong, differ=differ)


ANYTIME = {"train": 60, "cache": 60, "generate": 60, "sweep": 20, "export": 20, "embedding": 40, "evaluate": 20}

PARTS: dict[str, Callable[[Drill], None]] = {
    **{f"kill-{name}": functools.partial(kill_anytime, name=name, count=count) for name, count in ANYTIME.items()},
    **{f"write-{name}": functools.partial(kill_at_writes, name=name) for name in COMMANDS},
    "signals": functools.partial(signals, count=98),
    "side-by-side": functools.partial(side_by_side, count=24),
}
