"""Disks that fill up, become read-only or fail, and file handles that are used up, at any call of each command.

A command with such a fault ends with one line, or as if nothing had happened; once the fault is mended, `--resume` (or
the same command) leaves what an undisturbed command does, byte for byte.
"""

from __future__ import annotations

import errno
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from drill import Case, Drill
from fault_toys import COMMAND, Done, fail_disk, limit_files, make_toys, potstill, results

OPEN, WRITE, SYNC, RENAME, READ = 1, 2, 4, 8, 16  # of failing_disk.c
WRITING = OPEN | WRITE | SYNC | RENAME
# How often each command is drawn: in proportion to its writes, and to how quick it is.
DRAWN = ["run"] * 3 + ["cache"] * 5 + ["generate"] * 4 + ["embedding"] * 4 + ["export"] * 2 + ["sweep"]
BLOCK = 4096

Reference = tuple[int, dict[str, bytes], int]  # calls that write, results, bytes in the folder


def disk_full(drill: Drill) -> None:
    """Let every call that writes fail with ENOSPC, from one on."""
    _at_a_call(drill, 120, WRITING, errno.ENOSPC, lambda case: True)


def disk_read_only(drill: Drill) -> None:
    """Let every call that writes fail with EROFS, from one on."""
    _at_a_call(drill, 60, WRITING, errno.EROFS, lambda case: True)


def disk_errors(drill: Drill) -> None:
    """Let one call, or every one from it on, fail with EIO, those that read too."""
    _at_a_call(drill, 60, WRITING | READ, errno.EIO, lambda case: case.rng.random() < 0.5)


def disk_small(drill: Drill) -> None:
    """Run each command on a file system that is too small, and again when it has grown."""
    for case in drill.cases(60):
        name = case.rng.choice(DRAWN)
        work = case.folder / "work"
        work.mkdir()
        toys, needed = make_toys(drill.folder.parent / "toys"), _reference(drill, name, WRITING)[2]
        room = _size(toys) + case.rng.randrange(max(needed - _size(toys), BLOCK))
        with _mounted(work, room // BLOCK * BLOCK):
            shutil.copytree(toys, work, dirs_exist_ok=True)
            first = potstill(*COMMAND[name].arguments, folder=work)
            subprocess.run(["mount", "-o", "remount,size=1g", str(work)], check=True)
            _note(drill, case, name, work, first, WRITING, room=room)


def file_handles(drill: Drill) -> None:
    """Allow a command only so many open files."""
    for case in drill.cases(60):
        name, more = case.rng.choice(DRAWN), case.rng.randrange(24)
        work = _copy(drill, case)
        first = potstill(*COMMAND[name].arguments, folder=work, before=limit_files, given=(more,))
        _note(drill, case, name, work, first, WRITING, more=more)


def _at_a_call(drill: Drill, count: int, kinds: int, code: int, sticky: Callable[[Case], bool]) -> None:
    for case in drill.cases(count):
        name, forever = case.rng.choice(DRAWN), sticky(case)
        number = case.rng.randint(1, _reference(drill, name, kinds)[0])
        work = _copy(drill, case)
        given = (work.resolve(), kinds, number, code, forever)
        first = potstill(*COMMAND[name].arguments, folder=work, before=fail_disk, given=given)
        _note(drill, case, name, work, first, kinds, call=number, forever=forever)


def _note(drill: Drill, case: Case, name: str, work: Path, first: Done, kinds: int, **facts: Any) -> None:
    """Go on without the fault, and compare with an undisturbed command."""
    command = COMMAND[name]
    second = potstill(*command.arguments, *command.resume, folder=work)
    found, wanted = results(work, command), _reference(drill, name, kinds)[1]
    other = sorted(file for file in found.keys() | wanted.keys() if found.get(file) != wanted.get(file))
    left = [str(path.relative_to(work)) for path in work.rglob("*.partial")]
    held = (first.status == 0 or first.one_line) and second.status == 0 and not other and not left
    last = first.output.strip().splitlines()[-1:]
    facts |= {"command": name, "status": first.status, "line": last[0] if last else ""}
    if not held:
        facts |= {"again": second.status, "again_line": second.output.strip()[-300:], "other": other, "left": left}
    drill.note(case.number, held, **facts)


_references: dict[tuple[str, int], Reference] = {}


def _reference(drill: Drill, name: str, kinds: int) -> Reference:
    """What an undisturbed command does."""
    if (name, kinds) not in _references:
        folder, command = drill.folder / f"undisturbed-{name}", COMMAND[name]
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(make_toys(drill.folder.parent / "toys"), folder)
        given = (folder.resolve(), kinds, 0, 0, False)  # counts calls
        done = potstill(*command.arguments, folder=folder, before=fail_disk, given=given)
        assert done.status == 0, done.output
        calls = int((folder.parent / f"{folder.name}.calls").read_text())
        _references[name, kinds] = calls, results(folder, command), _size(folder)
    return _references[name, kinds]


def _copy(drill: Drill, case: Case) -> Path:
    work = case.folder / "work"
    shutil.copytree(make_toys(drill.folder.parent / "toys"), work)
    return work


def _size(folder: Path) -> int:
    """The bytes of a folder on a file system of blocks."""
    return sum(-(-path.stat().st_size // BLOCK) * BLOCK + BLOCK for path in folder.rglob("*"))


@contextmanager
def _mounted(folder: Path, size: int) -> Iterator[None]:
    """Mount a file system in memory of so many bytes; root alone may."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "potstill-drill", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


PARTS: dict[str, Callable[[Drill], None]] = {
    "disk-full": disk_full,
    "disk-small": disk_small,
    "disk-read-only": disk_read_only,
    "disk-errors": disk_errors,
    "file-handles": file_handles,
}
