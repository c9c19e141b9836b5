"""Flipped bits and cut files in all that a later command reads again.

Each is found (one line, exit status 1 or 2), or harmless: the command leaves what it does on sound files, bit for bit.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from drill import Case, Drill
from fault_toys import COMMAND, TRAIN, Command, Done, in_fork, make_toys, potstill, results

RESUMED = Command((*COMMAND["run"].arguments, "--resume"), COMMAND["run"].results)
STUDENT = "finished/student/*.[!m]*"  # but for the card
_BUILD = COMMAND["cache"].arguments
READ_STUDENT = Command(
    (*_BUILD[:3], "finished/student", *_BUILD[4:]), ("signals/shards/*", "signals/teacher/*"), resume=()
)
VERIFY = Command(("cache", "verify", "signals"), ("signals/**/*",))


def caches(drill: Drill) -> None:
    """Flip a bit of a finished cache of teacher signals."""
    sound = _sound(drill, "cache", COMMAND["cache"].arguments)
    assert in_fork(_flip_cache, (drill, sound)) == 0
    drill.read()


def _flip_cache(drill: Drill, sound: Path) -> None:
    from potstill.errors import DataError
    from potstill.teachers.cache.store import Cache

    for case in drill.cases(1000):
        work = case.folder / "signals"
        shutil.copytree(sound / "signals", work)
        facts, line = _flip(case, work.glob("**/*")), ""
        try:
            Cache(work)
        except DataError as error:
            line = str(error)
        drill.note(case.number, bool(line) and "\n" not in line, **facts, line=line[:200])


def encoded_data(drill: Drill) -> None:
    """Flip a bit of the encoded data that the next command reads in place of the text."""
    sound = _sound(drill, "encoded", COMMAND["cache"].arguments)
    shutil.rmtree(sound / "signals", ignore_errors=True)
    _damage(drill, 60, sound, COMMAND["cache"], "datasets/**/*")


def begun_caches(drill: Drill) -> None:
    """Flip a bit of a cache that was being built."""
    sound = _sound(drill, "begun-cache", (*COMMAND["cache"].arguments, "--shard", "0/2"))
    _damage(drill, 60, sound, COMMAND["cache"], "signals/**/*")


def checkpoints(drill: Drill) -> None:
    """Flip a bit of the last checkpoint of a run that was killed."""
    sound = _sound(drill, "checkpoint", RESUMED.arguments, kill_after_checkpoint)
    _damage(drill, 200, sound, RESUMED, "run/checkpoints/student/*/*", _read_checkpoint)


def students(drill: Drill) -> None:
    """Flip a bit of a finished student, which is then a teacher."""
    _damage(drill, 200, make_toys(drill.folder.parent / "toys"), READ_STUDENT, STUDENT, _read_student)


def journals(drill: Drill) -> None:
    """Flip a bit of the texts of a teacher that are not all written yet."""
    sound = _sound(drill, "journal", COMMAND["generate"].arguments)
    command = Command((*COMMAND["generate"].arguments, "--resume"), COMMAND["generate"].results)
    _damage(drill, 200, sound, command, "texts/texts.jsonl", _read_journal)


def embedding_checkpoints(drill: Drill) -> None:
    """Flip a bit of the checkpoint of an embedding student."""
    sound = _sound(drill, "embedding", COMMAND["embedding"].arguments)
    shutil.rmtree(sound / "vectors/student", ignore_errors=True)
    command = Command((*COMMAND["embedding"].arguments, "--resume"), COMMAND["embedding"].results)
    _damage(drill, 60, sound, command, "vectors/checkpoints/*/*")


def truncated(drill: Drill) -> None:
    """Cut a file of each kind at 64 lengths, of every remainder by 64."""
    kinds = {
        "cache": (_sound(drill, "cache", COMMAND["cache"].arguments), "signals/**/*", VERIFY),
        "checkpoint": (
            _sound(drill, "checkpoint", RESUMED.arguments, kill_after_checkpoint),
            "run/checkpoints/student/*/*",
            RESUMED,
        ),
        "student": (make_toys(drill.folder.parent / "toys"), STUDENT, READ_STUDENT),
    }
    for case in drill.cases(3 * 64):
        name = [*kinds][case.number % 3]
        sound, files, command = kinds[name]
        work = case.folder / "work"
        shutil.copytree(sound, work)
        file = _chosen(case, work.glob(files))
        size = file.stat().st_size
        length = min(case.rng.randrange(max(1, size // 64)) * 64 + case.number // 3, size - 1)
        os.truncate(file, length)
        facts = {"what": name, "file": file.relative_to(work), "length": length}
        _note(drill, case, sound, work, command, facts)


def kill_after_checkpoint() -> None:
    """End the process by SIGKILL once the second checkpoint of the student is whole."""
    from potstill.train.hf_trainer import StudentTrainer

    real, saved = StudentTrainer._save_checkpoint, 0

    def save(self: Any, *args: Any) -> None:
        nonlocal saved
        real(self, *args)
        saved += self.state.max_steps == TRAIN["max_steps"]  # not in the rehearsal
        if saved == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    StudentTrainer._save_checkpoint = save


def _sound(drill: Drill, name: str, arguments: tuple[str, ...], before: Callable[[], None] | None = None) -> Path:
    """The folder of toys behind a command."""
    toys, folder = make_toys(drill.folder.parent / "toys"), drill.folder.parent / f"sound-{name}"
    if not folder.exists():
        shutil.copytree(toys, folder)
        done = potstill(*arguments, folder=folder, before=before)
        assert done.status == (0 if before is None else -signal.SIGKILL), done.output
    return folder


def _damage(
    drill: Drill,
    count: int,
    sound: Path,
    command: Command,
    files: str,
    read: Callable[[Path], object] | None = None,
) -> None:
    """Flip one bit of one file in each case, and run the command that reads it.

    With `read`, what the command reads first is tried alone; the command is run in each tenth case, and wherever that
    finds nothing.
    """
    if read is not None:
        assert in_fork(_try_reading, (drill, count, sound, files, read)) == 0
        drill.read()
    for case in drill.cases(count):
        work = case.folder / "work"
        shutil.copytree(sound, work)
        _note(drill, case, sound, work, command, _flip(case, work.glob(files)))


def _try_reading(drill: Drill, count: int, sound: Path, files: str, read: Callable[[Path], object]) -> None:
    from potstill.errors import PotstillError

    for case in drill.cases(count):
        work = case.folder / "work"
        shutil.copytree(sound, work)
        facts = _flip(case, work.glob(files))
        if case.number % 10:
            try:
                read(work)
            except PotstillError as error:
                line = str(error)
                drill.note(case.number, "\n" not in line, **facts, found=True, line=line[:200], alone=True)


def _read_checkpoint(work: Path) -> None:
    from potstill.models.checksums import check_folder
    from potstill.train.checkpoints import last_checkpoint

    checkpoint = last_checkpoint(work / "run/checkpoints/student")
    if checkpoint is not None:
        check_folder(checkpoint, "checkpoint")


def _read_student(work: Path) -> None:
    from potstill.models.loading import load_tokenizer

    load_tokenizer(str(work / "finished/student"), "teacher")


def _read_journal(work: Path) -> None:
    from potstill.generation import journal

    path, header = work / "texts/texts.jsonl", {}
    with suppress(ValueError):  # a damaged header is none that is expected
        header = journal.without_checksum(json.loads(path.read_bytes().partition(b"\n")[0]))
    with path.open("a+b") as file:
        journal._read(file, header, path)


def _flip(case: Case, files: Iterator[Path]) -> dict[str, Any]:
    file = _chosen(case, files)
    content = bytearray(file.read_bytes())
    place, bit = case.rng.randrange(len(content)), case.rng.randrange(8)
    content[place] ^= 1 << bit
    file.write_bytes(content)
    return {"file": file.name, "place": place, "bit": bit}


def _chosen(case: Case, files: Iterator[Path]) -> Path:
    """A file with content: half of the time any of them, else by its size."""
    whole = sorted(path for path in files if path.is_file() and path.stat().st_size)
    if case.rng.random() < 0.5:
        return case.rng.choice(whole)
    return case.rng.choices(whole, [path.stat().st_size for path in whole])[0]


_undisturbed: dict[tuple[Path, tuple[str, ...]], dict[str, bytes]] = {}


def _note(drill: Drill, case: Case, sound: Path, work: Path, command: Command, facts: dict[str, Any]) -> None:
    """Run the command, and compare what it leaves with what it does on sound files."""
    wanted = _wanted(drill, sound, command)
    done: Done = potstill(*command.arguments, folder=work)
    line = (done.output.strip().splitlines() or [""])[-1]
    harmless = done.status == 0 and results(work, command) == wanted
    found = done.one_line
    drill.note(case.number, found or harmless, **facts, status=done.status, found=found, line=line[:200])


def _wanted(drill: Drill, sound: Path, command: Command) -> dict[str, bytes]:
    key = sound, command.arguments
    if key not in _undisturbed:
        folder = drill.folder / "undisturbed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(sound, folder)
        done = potstill(*command.arguments, folder=folder)
        assert done.status == 0, done.output
        _undisturbed[key] = results(folder, command)
    return _undisturbed[key]


PARTS: dict[str, Callable[[Drill], None]] = {
    "corrupt-caches": caches,
    "corrupt-begun-caches": begun_caches,
    "corrupt-encoded-data": encoded_data,
    "corrupt-checkpoints": checkpoints,
    "corrupt-students": students,
    "corrupt-journals": journals,
    "corrupt-embedding-checkpoints": embedding_checkpoints,
    "cut-files": truncated,
}
