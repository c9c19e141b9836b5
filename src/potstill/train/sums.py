"""Sums for the log, over batches and ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from potstill.train.signals import or_one


class LogSums:
    """Named sums over batches, kept on the device until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: Tensor | None = None

    def add(self, values: Mapping[str, Tensor], counts: Tensor | None = None) -> None:
        """Add one batch; counts [2] are its target tokens and its attended positions."""
        for name, value in values.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        if counts is not None:
            self._counts = counts if self._counts is None else self._counts + counts

    def totals(self, accelerator: Any) -> dict[str, float]:
        return {name: float(accelerator.reduce(value)) for name, value in self._sums.items()}

    def means(self, accelerator: Any, over: Mapping[str, str]) -> dict[str, float]:
        """The sums over all ranks, each divided by its count over all ranks: tokens, unless `over` says attended."""
        if self._counts is None:
            return {}
        tokens, positions = or_one(accelerator.reduce(self._counts)).tolist()
        totals = self.totals(accelerator)
        return {name: total / (positions if over.get(name) == "attended" else tokens) for name, total in totals.items()}
