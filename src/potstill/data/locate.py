"""Find the rows that a source names: in files, in folders and globs of them, in saved data sets, on the hub."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import datasets
from datasets.data_files import FILES_TO_IGNORE

from potstill.data.hub import HubData, check_split
from potstill.data.location import Batch, DataLocation
from potstill.data.readers import SUFFIXES, Table, empty, file_format, open_table, reading, suppress_output
from potstill.data.sources import Source, is_glob, listed
from potstill.errors import DataError, nearest, one_line
from potstill.models.checksums import digest

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class LocalFiles(DataLocation):
    """Files of known formats, and folders of saved data sets, read one after the other."""

    paths: tuple[Path, ...]

    def digest(self) -> str:
        parts = [f"{digest(path)} {file_format(path)}" for path in self.paths]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @cached_property
    def _tables(self) -> dict[Path, Table]:
        tables = {}
        for path in self.paths:
            with reading(path):
                tables[path] = open_table(path, self.limit)
        return tables

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(name for table in self._tables.values() for name in table.columns))

    @property
    def class_names(self) -> dict[str, list[str]]:
        known: dict[str, list[str]] = {}
        for path, table in self._tables.items():
            for column, names in table.class_names.items():
                if known.setdefault(column, names) != names:
                    raise DataError(
                        f"data: expected one list of classes for column {column!r} in all files, got another in "
                        f"{path.name}. Write the names of classes in place of their numbers."
                    )
        return known

    def _batches(self, names: list[str]) -> Iterator[Batch]:
        for path, table in self._tables.items():
            present, row = [name for name in names if name in table.columns], 1
            with reading(path):
                for columns in table.read(present or table.columns[:1]):
                    size = len(next(iter(columns.values())))
                    yield Batch({name: columns.get(name, [None] * size) for name in names}, path.name, row)
                    row += size


def locate(source: Source) -> DataLocation:
    """Find the rows of a source.

    Raises:
        DataError: there are none, or it is not clear which.
    """
    path = Path(source.path).expanduser()
    if not path.exists() and not is_glob(path) and source.split and HUB_NAME.fullmatch(str(source.path)):
        return HubData(source.limit, source)
    if path.is_dir() and not (path / "state.json").exists():
        return LocalFiles(source.limit, _folder(path, source))
    for key in ("split", "config"):
        if getattr(source, key) is not None:
            raise DataError(
                f"data: expected a folder, or the name of a data set on the hub, beside {key}, got {path}. "
                f"Leave out {key}, or correct the path."
            )
    return LocalFiles(source.limit, _glob(path) if is_glob(path) else (_existing(path),))


def _existing(path: Path) -> Path:
    if not path.exists():
        siblings = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        hub = (
            " For a data set on the hub, give a split too." if HUB_NAME.fullmatch(str(path)) and not path.suffix else ""
        )
        raise DataError(
            f"data: expected a file, got {path}, which does not exist.{nearest(path.name, siblings)} Correct the path."
            f"{hub}"
        )
    if path.is_dir():
        return path
    if file_format(path) not in SUFFIXES:
        raise DataError(
            f"data: expected a file that ends in one of {listed(SUFFIXES)}, got {path.name}. "
            "Rename or convert it; JSON Lines hold any text."
        )
    if path.stat().st_size == 0:
        raise empty(path)
    return path


def _glob(pattern: Path) -> tuple[Path, ...]:
    matches = sorted(Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor))))
    files = tuple(_existing(path) for path in matches if path.is_file())
    if not files:
        raise DataError(f"data: expected files of the pattern {pattern}, got none. Correct the pattern.")
    return files


def _folder(path: Path, source: Source) -> tuple[Path, ...]:
    """The files of a folder, or of one split of it, by the rules that datasets has for names of files and the card."""
    if (saved := path / "dataset_dict.json").exists():
        names: list[str] = json.loads(saved.read_text(encoding="utf-8"))["splits"]
        splits: dict[str, tuple[Path, ...]] = {name: (path / name,) for name in names}
    else:
        splits = _splits(path, source)
        others = [] if source.config else _unassigned(path, splits)
        if others:
            raise DataError(
                f"data: expected all data files of the folder {path} to be read, got {others[0].name}, which "
                f"`datasets` leaves out. Name those to read by a pattern, such as {path}/*{others[0].suffix}, or a "
                "configuration of the card as config."
            )
    if source.split or len(splits) > 1:
        check_split(source, splits)
    return tuple(_existing(file) for file in splits[source.split or next(iter(splits))])


def _splits(path: Path, source: Source) -> dict[str, tuple[Path, ...]]:
    try:
        with suppress_output():
            files = datasets.load_dataset_builder(str(path), source.config).config.data_files
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"data: expected data files in the folder {path}, or what save_to_disk wrote, got "
            f"{one_line(error, 300)!r}. Name a file in it."
        ) from None
    return {str(split): tuple(map(Path, names)) for split, names in (files or {}).items()}


def _unassigned(path: Path, splits: dict[str, tuple[Path, ...]]) -> list[Path]:
    """The data files of a folder that are in none of its splits: of another format, or without a split's name."""
    assigned = {file.parent.resolve() / file.name for files in splits.values() for file in files}
    files = [file for file in path.resolve().rglob("*") if file_format(file) in SUFFIXES]
    return [
        file for file in files if file not in assigned and file.name not in FILES_TO_IGNORE and file.name[0] not in "._"
    ]
