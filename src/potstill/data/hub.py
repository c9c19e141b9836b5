"""Read data sets on the hub, which `datasets` downloads or streams."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import datasets
from datasets.fingerprint import Hasher
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError

from potstill.data.disk_cache import BATCH
from potstill.data.location import Batch, DataLocation
from potstill.data.readers import class_names, suppress_output, without_filled_keys
from potstill.data.sources import Source, listed
from potstill.errors import DataError, one_line

HUB_SECONDS = 3.0  # to wait for an answer


@dataclass(frozen=True)
class HubData(DataLocation):
    """A split of a data set on the hub, read by `datasets`."""

    source: Source

    @cached_property
    def _builder(self) -> Any:
        source = self.source
        self._check_reachable()
        with self._reading():
            builder = datasets.load_dataset_builder(str(source.path), source.config, revision=source.revision)
        if builder.config.data_files and re.fullmatch(r"[\w.-]+", str(source.split)):  # no slice, as train[:100] is
            check_split(source, builder.config.data_files)
        return builder

    @cached_property
    def _dataset(self) -> Any:
        with self._reading():
            if self.source.streaming:
                return self._builder.as_streaming_dataset(self.source.split)
            self._builder.download_and_prepare()
            return self._builder.as_dataset(self.source.split)

    def digest(self) -> str:
        """The hash of a builder is the commit of its data set."""
        return Hasher.hash([str(self.source.path), self._builder.hash, self._builder.config_id, self.source.split])

    @property
    def columns(self) -> list[str]:
        dataset = self._dataset
        with self._reading():
            return list((dataset if dataset.column_names is not None else dataset._resolve_features()).column_names)

    @property
    def class_names(self) -> dict[str, list[str]]:
        return class_names(self._dataset.features)

    def _batches(self, names: list[str]) -> Iterator[Batch]:
        row, title = 1, f"{self.source.title} ({self.source.split})"
        rows = self._dataset.with_format(None).select_columns(names).iter(BATCH)
        while True:
            with self._reading():
                columns = next(rows, None)
            if columns is None:
                return
            yield Batch(without_filled_keys(columns), title, row)
            row += len(columns[names[0]])

    def _check_reachable(self) -> None:
        """Ask the hub for the card: `datasets` itself tries for half a minute before it says that there is no hub."""
        if constants.is_offline_mode():
            return
        url = hf_hub_url(str(self.source.path), "README.md", repo_type="dataset")
        try:
            get_hf_file_metadata(url, timeout=HUB_SECONDS)
        except HfHubHTTPError:  # such as a data set without a card: the hub answers
            return
        except Exception as error:
            raise DataError(
                f"data: expected a file, a folder or a data set on the hub, got {self.source.path}, and the hub cannot "
                f"be reached ({type(error).__name__}). Correct the path, or set HF_HUB_OFFLINE=1 to read what was "
                "downloaded before."
            ) from None

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Raise a DataError of one line for whatever `datasets` and the connection raise."""
        try:
            with suppress_output():
                yield
        except DataError:
            raise
        except Exception as error:
            raise DataError(
                f"data: expected the data set {self.source.path} on the hub with the split {self.source.split}, got "
                f"{type(error).__name__} {one_line(error, 300)!r}. Correct path, config and split."
            ) from None


def check_split(source: Source, splits: Iterable[str]) -> None:
    """Check that the source names one of the splits that there are."""
    names = [str(name) for name in splits]
    if source.split not in names:
        raise DataError(
            f"data: expected one split of {source.path}, got {source.split}. It has {listed(names)}: name one, as in "
            f"`split: {names[0]}`."
        )
