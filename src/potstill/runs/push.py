"""Push a finished run to the Hub: the student with its card, its exports and the report, in one commit."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from httpx2 import HTTPError
from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from potstill.errors import RunError, UserError, one_line
from potstill.evaluate.exported import FILE, FOLDER, read_exports
from potstill.files import lock_folder
from potstill.models.checksums import check_folder, digest

TOKEN = "HF_TOKEN"


def files_to_push(run: Path) -> dict[str, Path]:
    """The files of a run by their paths in the repository: those of student/ at its top.

    Raises:
        UserError: the run is not finished, or a file of its student has changed.
    """
    student = run / "student"
    for missing in [name for name in ("student/", "report.html") if not (run / name).exists()]:
        raise UserError(f"push: expected a finished run, got {run} without {missing}. Finish it with --resume.")
    check_folder(student, "push")
    files = {path.relative_to(student).as_posix(): path for path in _whole_files(student)}
    files |= {path.relative_to(run).as_posix(): path for path in [run / "report.html", *_exported(run)]}
    return dict(sorted(files.items()))


def _exported(run: Path) -> Iterator[Path]:
    """The records of a run's exported files, and the files that they are of.

    Raises:
        UserError: a file is not the one that its figures are of.
    """
    exports = read_exports(run / FOLDER)
    if exports is not None:
        yield run / FOLDER / FILE
    for file in () if exports is None else exports.files:
        path = run / FOLDER / file.file
        if not path.exists() or (file.sha256 and digest(path) != file.sha256):
            raise UserError(
                f"push: expected {path} as it was measured, got another or none. Export it again, or delete "
                f"{run / FOLDER / FILE} and what it is of, and run potstill report {run}."
            )
        yield from _whole_files(path) if path.is_dir() else [path]


def _whole_files(folder: Path) -> list[Path]:
    """The files of a folder, without what another process has not finished, and without locks."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return [path for path in files if not any(part.endswith(".partial") for part in path.relative_to(folder).parts)]


def push(run: str | Path, to: str, *, public: bool = False) -> str:
    """Push a finished run to the repository `to` of the Hub, and return its address.

    A repository that is not there is made, private unless `public`. The token is that of the environment, HF_TOKEN.

    Raises:
        UserError: the run is not finished, or another process writes its directory; there is no token, or the
            repository is public without being meant to be.
        RunError: the Hub cannot be reached, or refuses.
    """
    directory = Path(run).expanduser()
    with lock_folder(directory, "run", write=False):
        return _push(files_to_push(directory), to, public)


def _push(files: Mapping[str, Path], to: str, public: bool) -> str:
    check_name(to)
    token = os.environ.get(TOKEN)
    if not token:
        raise UserError(
            f"push: expected a token in {TOKEN}, got none. Make one that may write in the settings of your account, "
            "and set that variable."
        )
    api = HfApi(token=token)
    try:
        api.create_repo(to, private=not public, exist_ok=True)
        if not public and not api.repo_info(to).private:
            raise UserError(f"--to: expected a private repository, got {to}, which is public. Add --public for it.")
        commit = api.create_commit(to, _operations(files), commit_message="Push a student distilled with Potstill")
    except (HfHubHTTPError, HTTPError, OfflineModeIsEnabled, RuntimeError) as error:
        # A file that did not arrive is a RuntimeError that hides the reason.
        reason = error.__cause__ or error if isinstance(error, RuntimeError) else error
        raise RunError(
            f"push: expected {constants.ENDPOINT} to take {to}, got {type(reason).__name__}: {one_line(reason, 300)}. "
            f"Check that the token in {TOKEN} may write there."
        ) from None
    return str(commit.repo_url)


def _operations(files: Mapping[str, Path]) -> list[CommitOperationAdd]:
    return [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()]


def check_name(name: str) -> None:
    """Check the name of a repository.

    Raises:
        UserError: it is not owner/name.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--to: expected owner/name, got {name}: {one_line(error)}.") from None
    if "/" not in name:
        raise UserError(f"--to: expected owner/name, got {name}. Put your account or organisation before it.")
