"""Processes for tests, forked from one that has imported everything: imports are most of what a new one costs.

What is killed or interrupted here is a process like any other. That the command starts from nothing is another test's.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from file_faults import FileFault

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["potstill.runs.run", "potstill.cli", "torch._dynamo", "conftest"])


def start(printed: Path, function: Callable[..., Any], *arguments: Any, **environment: str) -> BaseProcess:
    """A function of a module of the tests in a process of its own.

    Args:
        printed: the file that its output goes to.
        function: at a module's top.
        arguments: that can be pickled.
        environment: variables for it.
    """
    process = CONTEXT.Process(target=_begin, args=(printed, environment, function, arguments), daemon=True)
    process.start()
    return process


def _begin(
    printed: Path, environment: dict[str, str], function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    with printed.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= environment
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which is ignored where the tests run in the background
    function(*arguments)


def finish(process: BaseProcess, seconds: float = 300) -> int:
    """Its exit status; it is killed where it takes longer."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
    assert process.exitcode is not None
    return process.exitcode


def potstill(
    *arguments: str, printed: Path, folder: Path | None = None, fault: FileFault | None = None, **environment: str
) -> BaseProcess:
    """`potstill` with these arguments, in a folder, killed by a fault."""
    return start(printed, potstill_here, arguments, folder, fault, **environment)


def potstill_here(arguments: Sequence[str], folder: Path | None, fault: FileFault | None) -> None:
    """`potstill` in this process, which does not come back."""
    from potstill.cli import main

    if folder is not None:
        os.chdir(folder)
    if fault is not None:
        fault.arm()
    sys.argv = ["potstill", *arguments]
    main()


def start_ranks(folder: Path, function: Callable[..., Any], *arguments: Any, **environment: str) -> list[BaseProcess]:
    """A function in two processes that torch.distributed joins by gloo, as `torchrun` would start them; what they print
    goes to `rank-0` and `rank-1` in the folder.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    each = [{**together, "RANK": str(rank), "LOCAL_RANK": str(rank), **environment} for rank in range(2)]
    return [
        start(folder / f"rank-{rank}", _rank, function, arguments, **variables) for rank, variables in enumerate(each)
    ]


def two_ranks(folder: Path, function: Callable[..., Any], *arguments: Any, status: int = 0, **environment: str) -> None:
    """A function on two ranks, both of which end with the exit status."""
    ranks = start_ranks(folder, function, *arguments, **environment)
    statuses = [finish(rank) for rank in ranks]
    outputs = [(folder / f"rank-{rank}").read_text()[-3000:] for rank in range(2)]
    assert statuses == [status, status], "\n".join([str(statuses), *outputs])


def shard_on_cpu() -> None:
    """Let FSDP shard in this process. On a CPU accelerate trains whole copies without a warning."""
    begin = AcceleratorState.__init__

    def begin_sharded(self: AcceleratorState, *arguments: Any, **named: Any) -> None:
        begin(self, *arguments, **named)
        self.fsdp_plugin = named.get("fsdp_plugin") or getattr(self, "fsdp_plugin", None)
        if self.fsdp_plugin is not None:
            self.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = begin_sharded


def _rank(function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        function(*arguments)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads now and then crash a process that destroys its group or ends as usual
