"""One process at a time writes a run directory, and whoever is killed leaves no lock behind."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

import processes
from conftest import quiet_run, toy_recipe
from potstill import files
from potstill.cli import app
from potstill.data.sources import Source
from potstill.errors import RecipeError, UserError
from potstill.files import lock_folder, remove
from potstill.runs.cache import CacheRequest, build
from potstill.runs.config.embedding import EmbeddingRecipe
from potstill.runs.config.generate import GenerateRecipe
from potstill.runs.embedding import run_embedding
from potstill.runs.export import export
from potstill.runs.generate import generate
from potstill.runs.push import push
from potstill.runs.ranks import alone_in_process, join_ranks, lock_for_ranks
from potstill.runs.sweep import sweep
from potstill.teachers.model import ModelSource

BUSY = (
    r"{}: expected a directory that no other process writes to, got .*, which another process is writing \(pid {} on "
)
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such locks")


def hold(folder: Path) -> None:
    """Hold a lock until this process is killed, with a child of its own that is not."""
    with lock_folder(folder, "output"):
        if child := os.fork():
            (folder / "child").write_text(str(child))
        time.sleep(60)


def test_a_killed_process_holds_no_lock(tmp_path: Path) -> None:
    owner = processes.start(tmp_path / "printed", hold, tmp_path / "run")
    child = tmp_path / "run" / "child"
    while not (child.exists() and child.read_text()):
        time.sleep(0.01)
    try:
        with pytest.raises(RecipeError, match=BUSY.format("output", owner.pid) + r".*, since \d{4}-\d\d-\d\d"):
            lock_folder(tmp_path / "run", "output").__enter__()
        owner.kill()
        owner.join()
        with lock_folder(tmp_path / "run", "output"):
            assert f"pid {os.getpid()} on" in (tmp_path / "run" / ".potstill.lock").read_text()
    finally:
        owner.kill()
        os.kill(int(child.read_text()), signal.SIGKILL)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["child"]


def test_a_lock_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with lock_folder(folder, "output"):
        assert folder.is_dir()
    assert not [*tmp_path.iterdir()]
    (tmp_path / "file").touch()
    with pytest.raises(RecipeError, match=r"^--out: expected a directory to write to, got .* Choose another --out\.$"):
        lock_folder(tmp_path / "file" / "run", "--out").__enter__()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks_is_written_to(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    with lock_folder(tmp_path, "output"), lock_folder(tmp_path, "output"):
        pass


def refused(lock: Path, key: str, start: Any, *arguments: Any, **options: Any) -> None:
    """Start something while its folder is locked, which changes nothing there."""
    with lock_folder(lock, key, options.pop("name", "potstill")):
        before = sorted(lock.rglob("*"))
        with pytest.raises(RecipeError, match=BUSY.format(key, os.getpid())):
            start(*arguments, **options)
        assert sorted(lock.rglob("*")) == before


def test_commands_refuse_a_directory_that_is_being_written(recipe_values: dict[str, Any], toys: Path) -> None:
    run, console = Path(recipe_values["output"]), Console(quiet=True)
    refused(run, "output", quiet_run, recipe_values)
    refused(run, "output", quiet_run, recipe_values, resume=True)
    refused(run, "--out", sweep, recipe_values, {"seed": [0, 1]}, run, console=console)
    rows = {"path": str(toys / "train.jsonl"), "field": "text"}
    task = {"task": "responses", "prompts": rows}
    values = {"kind": "generate", "name": "x", "teacher": recipe_values["teacher"], "task": task, "output": str(run)}
    refused(run, "output", generate, GenerateRecipe.parse(values), resume=True)
    values = {"kind": "embedding", "name": "x", "teacher": {"vectors": "x.npy"}, "output": str(run)}
    values["student"] = {"head": "linear", "dimensions": 2}
    refused(run, "output", run_embedding, EmbeddingRecipe.parse(values), console=console)
    data = [Source(str(toys / "train.jsonl"))]
    request = CacheRequest(ModelSource(str(toys / "teacher")), data, 16, False, "hidden", {}, run)
    refused(run, "--out", build, request, console=console, name="0-of-1")
    with lock_folder(run, "--out", "0-of-1"):  # the other part is another process's
        assert build(request, part=(1, 2), console=console) is None


def finished_run(toys: Path, folder: Path) -> Path:
    """A run directory with what `push` and `export` look for."""
    shutil.copytree(toys / "student", folder / "student")
    recipe = toy_recipe(toys, folder)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "report.html").touch()
    return folder


def test_what_is_written_beside_a_student_is_written_by_one_process(toys: Path, tmp_path: Path) -> None:
    run, model = finished_run(toys, tmp_path / "run"), Path(shutil.copytree(toys / "student", tmp_path / "model"))
    refused(run, "run", export, run)
    refused(run, "run", push, run, "me/small")
    refused(model / "export", "--out", export, model)
    with lock_folder(run, "output"):
        result = CliRunner().invoke(app, ["report", str(run)])
    assert isinstance(result.exception, RecipeError) and "which another process is writing" in str(result.exception)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_folder_that_cannot_be_written_to_is_read(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files, "_lock", refuse)
    with lock_folder(tmp_path, "run", write=False):
        pass
    with pytest.raises(RecipeError, match="run: expected a directory to write to"), lock_folder(tmp_path, "run"):
        pass


def both_refused(folder: Path) -> None:
    join_ranks({})
    with pytest.raises(RecipeError, match="which another process is writing"), lock_for_ranks(folder):
        pass


def both_allowed(folder: Path) -> None:
    join_ranks({})
    with lock_for_ranks(folder):
        pass


def test_a_path_with_a_null_character_is_one_line(recipe_values: dict[str, Any], toys: Path) -> None:
    for key, write in (
        ("output", lambda path: quiet_run({**recipe_values, "output": path})),
        ("--out", lambda path: export(toys / "student", out=path)),
        ("run", lambda path: push(path, "me/small")),
    ):
        with pytest.raises(RecipeError, match=f"{key}: expected a path without null characters, got a\0b. Leave them"):
            write("a\0b")


def test_ranks_of_one_run_share_a_lock(tmp_path: Path) -> None:
    processes.two_ranks(tmp_path, both_allowed, tmp_path / "run")
    with lock_folder(tmp_path / "run", "output"):
        processes.two_ranks(tmp_path, both_refused, tmp_path / "run")


def test_one_thread_of_a_process_trains(recipe_values: dict[str, Any]) -> None:
    def start() -> None:
        with pytest.raises(UserError, match="run: expected one run at a time in a process, got another in a thread"):
            quiet_run(recipe_values)
        refusals.append(True)

    refusals: list[bool] = []
    with alone_in_process(), alone_in_process():  # a sweep has runs
        thread = threading.Thread(target=start)
        thread.start()
        thread.join()
    assert refusals and not Path(recipe_values["output"]).exists()
    with alone_in_process():
        pass


def test_deep_folders_are_removed_with_few_open_files(tmp_path: Path) -> None:
    deep = tmp_path / "a"
    (deep / "/".join("bcdefghi")).mkdir(parents=True)
    (deep / "b" / "c" / "file").touch()
    (deep / "b" / "link").symlink_to(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(path.name) for path in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 3, limits[1]))
    try:
        remove(deep)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert not [*tmp_path.iterdir()]
