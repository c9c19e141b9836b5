"""Ranks of one run, as torchrun starts them: how long they wait for each other, and what a lost one causes.

And what is of a whole process: one run at a time.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from potstill.errors import RecipeError, RunError, UserError, one_line
from potstill.files import lock_folder

WAIT_S = 1800  # the Trainer's default of ddp_timeout
_KINDS = {"RuntimeError", "DistBackendError", "DistNetworkError"}  # by name: torch may be built without the others
_LOST = re.compile(r"gloo|nccl|c10d|TCPStore|ProcessGroup|Connection (closed|reset) by peer|Timed out waiting", re.I)

_training = threading.RLock()  # of the thread that trains


@contextmanager
def alone_in_process() -> Iterator[None]:
    """Refuse a training beside that of another thread: they would share random numbers and the Trainer's state.

    Raises:
        UserError: another thread of this process is in this context.
    """
    if not _training.acquire(blocking=False):
        raise UserError(
            "run: expected one run at a time in a process, got another in a thread beside it. Start it in a process of "
            "its own."
        )
    try:
        yield
    finally:
        _training.release()


def join_ranks(train: Mapping[str, Any]) -> PartialState:
    """Join the ranks of a run, which then wait for each other for `ddp_timeout` seconds, of a recipe's `train`.

    The Trainer would set it too late: the ranks are joined before it is made.
    """
    seconds = train.get("ddp_timeout", WAIT_S)
    wait = timedelta(seconds=seconds if isinstance(seconds, int | float) else WAIT_S)  # the Trainer refuses others
    # Asked without `cpu`, accelerate looks for GPUs alone: without one each rank would be the first.
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=wait)


@contextmanager
def lock_for_ranks(directory: Path, key: str = "output") -> Iterator[None]:
    """Lock a run directory for all ranks of this run: the main process holds the lock, and all raise its error."""
    with ExitStack() as lock:
        refusals = [""]
        if PartialState().is_main_process:
            try:
                lock.enter_context(lock_folder(directory, key))
            except RecipeError as error:
                refusals = [str(error)]
        broadcast_object_list(refusals)
        if refusals[0]:
            raise RecipeError(refusals[0])
        yield


@contextmanager
def explain_lost_rank() -> Iterator[None]:
    """Raise a RunError in place of what torch.distributed raises where another rank does not answer."""
    try:
        yield
    except Exception as error:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        ranks = torch.distributed.get_world_size() if distributed else 1
        if ranks == 1 or (cause := _cause(error)) is None:
            raise
        raise RunError(
            f"run: expected all {ranks} ranks to answer, got no answer from one of them: {one_line(cause, 200)}. It "
            "was killed, is out of memory or hangs: see its output. Saved work is kept; continue with --resume."
        ) from error


def _cause(error: BaseException) -> BaseException | None:
    """The error of torch.distributed behind another one, if there is one."""
    cause: BaseException | None = error
    while cause is not None and (type(cause).__name__ not in _KINDS or not _LOST.search(str(cause))):
        cause = cause.__cause__ or cause.__context__
    return cause
