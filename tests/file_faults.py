"""Kills at the very change of a file: before the n-th change, or when a file has grown to so many bytes.

Python reports what it opens, renames and removes to audit hooks, and the kernel ends a process that makes a file larger
than it may: that catches the writes of torch, safetensors, Arrow and llama.cpp too. Nothing in `potstill` knows of it.
"""

from __future__ import annotations

import os
import re
import resource
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink"}


@dataclass(frozen=True)
class FileFault:
    """A signal to the process that arms it, by default SIGKILL, at a change of a file in a folder.

    Args:
        folder: changes elsewhere do not count.
        before: the change, by its number from 0 or by a pattern of "operation path"; None only counts.
        number: the signal.
        size: if given, the process is ended instead by the first file of any folder that then grows beyond so many
            bytes, with so many of them written.
        log: a file with a line for each change.
    """

    folder: Path
    before: int | str | None = None
    number: int = signal.SIGKILL
    size: int | None = None
    log: Path | None = None

    def arm(self) -> None:
        """Let the fault happen in this process, which cannot be undone."""
        changes, done, folder = 0, False, f"{self.folder.absolute()}{os.sep}"
        log = None if self.log is None else os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

        def audit(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal changes, done
            if event not in _CHANGES or isinstance(arguments[0], int):
                return
            if event == "open" and not (arguments[2] or 0) & _WRITES:
                return
            # shutil.rmtree names files relative to the folder that it holds open.
            relative = event in ("os.remove", "os.rmdir") and arguments[1] != -1
            path = str(Path(os.fsdecode(arguments[1 if event == "os.rename" else 0])).absolute())
            if not relative and not path.startswith(folder):
                return
            change = f"{event} {path.removeprefix(folder)}"
            here = re.fullmatch(self.before, change) if isinstance(self.before, str) else changes == self.before
            changes += 1
            if here and not done:
                done = True
                self._end()
            if log is not None:
                os.write(log, f"{change}\n".encode())

        sys.addaudithook(audit)

    def _end(self) -> None:
        if self.size is None:
            os.kill(os.getpid(), self.number)
            return
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.RLIM_INFINITY))
