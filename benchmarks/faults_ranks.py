"""Two ranks of one training, joined by gloo: one is killed, stopped or out of memory, and what the other one does."""

from __future__ import annotations

import functools
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import faults_kills as kills
from drill import Case, Drill

sys.path.append(str(Path(__file__).parent.parent / "tests"))
import processes

WAIT_S = 20  # train.ddp_timeout: how long a rank waits for the others
BOUND_S = 300.0  # from the fault to the end of the other rank
ONE_LINE = re.compile(r"^run: expected all 2 ranks to answer, got .*$", re.MULTILINE)


def _prepare(drill: Drill, case: Case) -> Path:
    out = drill.folder.parent.absolute()
    kills.warm(out)
    write_recipe(out, case.folder)
    return case.folder.absolute()


def write_recipe(out: Path, folder: Path, **train: Any) -> None:
    """A training in two ranks, four rows each."""
    values = {"max_steps": 12, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
    values |= {"save_steps": 3, "eval_steps": 6, "ddp_timeout": WAIT_S}
    kills.recipe(kills.toys(out), folder, train=values | train, evaluate={"continuations": 0})


def start(folder: Path, run_out: float | None = None) -> list[BaseProcess]:
    """Start `potstill run --resume` on both ranks; each forward of the second fails after `run_out` seconds."""
    return processes.start_ranks(folder, _begin, folder, run_out)


def _begin(folder: Path, run_out: float | None) -> None:
    if run_out is not None and os.environ["RANK"] == "1":
        timer = threading.Timer(run_out, _run_out_of_memory)
        timer.daemon = True
        timer.start()
    try:
        kills.begin(("run", "recipe.yaml", "--resume"), folder, None)
    except SystemExit as end:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else 1)  # gloo's threads may crash a process that ends as usual


def _run_out_of_memory() -> None:
    import torch
    from transformers import LlamaModel

    def failing(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    LlamaModel.forward = failing


def whole(out: Path) -> tuple[dict[str, str], float]:
    """The result of two ranks that were left alone, and their seconds."""
    with kills.LOCK:
        return _whole(out)


@functools.cache
def _whole(out: Path) -> tuple[dict[str, str], float]:
    folder = out / "whole" / "ranks"
    for _ in range(2):  # the first pays for what is imported late
        kills.empty(folder)
        write_recipe(out, folder)
        ranks = start(folder)
        _await_begin(folder)
        begun = time.monotonic()
        statuses = [processes.finish(rank, kills.SECONDS) for rank in ranks]
        seconds = time.monotonic() - begun
        if any(statuses):
            raise RuntimeError(f"ranks: exit statuses {statuses}: {printed(folder)}")
    return kills.result(folder), seconds


def _await_begin(folder: Path) -> None:
    """Wait until a rank begins the command."""
    while not (folder / "printed-begun").exists():
        time.sleep(0.001)


def printed(folder: Path) -> list[str]:
    return [path.read_text()[-1500:] for path in sorted(folder.glob("rank-*"))]


def lose_a_rank(drill: Drill, fault: str, count: int) -> None:
    """One rank fails at a random moment; the other one must end soon, with one line; both then go on to the end."""
    for case in drill.cases(count):
        folder = _prepare(drill, case)
        result, seconds = whole(drill.folder.parent.absolute())
        moment, lost = case.rng.uniform(0, seconds), case.rng.randrange(2)
        ranks = start(folder, run_out=moment if fault == "memory" else None)
        if fault == "memory":
            lost = 1
        else:
            _await_begin(folder)
            time.sleep(moment)
            process = ranks[lost].pid
            assert process is not None, "it was started"
            with suppress(ProcessLookupError):  # it may be done
                os.kill(process, signal.SIGKILL if fault == "killed" else signal.SIGSTOP)
        begun = time.monotonic()
        status = processes.finish(ranks[1 - lost], BOUND_S + (moment if fault == "memory" else 0))
        waited = time.monotonic() - begun
        if fault == "hung":
            ranks[lost].kill()
        lost_status = processes.finish(ranks[lost], BOUND_S)
        words = printed(folder)
        survived = status == 0  # the other rank had nothing to wait for any more
        line = ONE_LINE.search(words[1 - lost])
        lines = survived or (status == 1 and line is not None and "Traceback" not in words[1 - lost])
        again = [processes.finish(rank, kills.SECONDS) for rank in start(folder)]
        differ = {} if any(again) else kills.differences(result, kills.result(folder))
        held = lines and not any(again) and not differ
        facts = {
            "moment": round(moment / seconds, 2),
            "status": status,
            "lost": lost_status,
            "waited": round(waited, 1),
            "line": line and line.group()[:200],
        }
        drill.note(case.number, held, **facts, again=again, differ=differ, printed=None if held else words)


PARTS: dict[str, Callable[[Drill], None]] = {
    f"rank-{fault}": functools.partial(lose_a_rank, fault=fault, count=count)
    for fault, count in {"killed": 12, "hung": 6, "memory": 6}.items()
}
