"""Bounds of time and memory for rendering a chat template: Jinja's sandbox keeps it from files, not from endless loops.

Both are limits of the kernel for this process. They hold on Linux, and where the main thread renders. The kernel
limits no single thread's memory: all threads share the gibibyte meanwhile. Potstill renders before a training, when
none of its own threads loads a model or computes.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from potstill.errors import DataError

SECONDS = 5  # of processor time; the longest conversations take thousandths of one
MEMORY_BYTES = 1 << 30  # more than before


class TemplateLimitError(DataError):
    """A chat template takes more than its time or memory."""


@contextmanager
def limited_rendering() -> Iterator[None]:
    """End a rendering that takes too long or too much memory.

    Raises:
        TemplateLimitError: it did.
    """
    if not sys.platform.startswith("linux") or threading.current_thread() is not threading.main_thread():
        yield
        return
    start = time.thread_time()

    def stop(number: int, frame: Any) -> None:
        if time.thread_time() - start >= SECONDS:  # the timer counts all threads
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            raise TemplateLimitError(_message(f"{SECONDS} seconds of processor time"))

    handler = signal.signal(signal.SIGVTALRM, stop)
    limits = _limit_memory()
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS, SECONDS / 10)
    try:
        yield
    except MemoryError:
        raise TemplateLimitError(_message(f"{MEMORY_BYTES >> 20} MiB")) from None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, handler)
        _set_limits(limits)


def _message(bound: str) -> str:
    return (
        f"chat_template: expected a template that renders a conversation within {bound}, got one that does not. Use "
        "another chat template."
    )


def _limit_memory() -> tuple[int, int]:
    import resource  # which Windows does not have

    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY_BYTES
    _set_limits((most if limits[0] < 0 else min(most, limits[0]), limits[1]))
    return limits


def _set_limits(limits: tuple[int, int]) -> None:
    import resource

    with suppress(ValueError):  # a hard limit that was lowered meanwhile
        resource.setrlimit(resource.RLIMIT_AS, limits)
