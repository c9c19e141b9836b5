"""A student's budget, and the largest student within it."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from transformers import PretrainedConfig

from potstill.errors import ModelError, nearest
from potstill.models.design import KEEP_WORDS, TOLERANCE, Keep, ShapeSearch, design
from potstill.models.shapes import text_config
from potstill.models.size import count_parameters, size_of

Measure = Callable[[PretrainedConfig], float]
# The most parameters on each kind of device: rules of thumb for models in 4 to 16 bits.
TARGETS = {"browser": 200_000_000, "edge": 500_000_000, "mobile": 1_000_000_000, "server": 3_000_000_000}


@dataclass(frozen=True)
class Budget:
    """A limit on a student's size or cost; exactly one.

    Args:
        params: number of parameters (within 5%).
        compression: the teacher's parameters over the student's (within 5%).
        memory_gb: at most so many gigabytes (10^9 bytes) to serve one row of `context` tokens in half precision.
        latency_ms: at most so long for one forward pass over a row of `context` tokens.
        target: at most the parameters for a kind of device, see `TARGETS`.
        keep: see `design`.
        context: tokens in a row.

    Raises:
        ModelError: no limit or several, or one that is not positive.
    """

    params: int | None = None
    compression: float | None = None
    memory_gb: float | None = None
    latency_ms: float | None = None
    target: str | None = None
    keep: Keep = "balanced"
    context: int = 2048

    def __post_init__(self) -> None:
        limits = [field.name for field in dataclasses.fields(self)[:5]]
        given = [name for name in limits if getattr(self, name) is not None]
        if len(given) != 1:
            raise ModelError(f"design: expected one of {', '.join(limits)}, got {' and '.join(given) or 'none'}.")
        name, limit = given[0], getattr(self, given[0])
        if name == "target" and limit not in TARGETS:
            raise ModelError(f"design: expected target {', '.join(TARGETS)}, got {limit}.{nearest(limit, TARGETS)}")
        least = 1 if name == "compression" else 0
        if name != "target" and not (limit > least and math.isfinite(limit)):
            raise ModelError(f"design: expected {name} above {least}, got {limit:g}.")

    def student(
        self, teacher: PretrainedConfig, *, vocabulary: int | None = None, seconds: Measure | None = None
    ) -> PretrainedConfig:
        """Design the largest student within the budget.

        `vocabulary` is the number of token ids, the teacher's by default. `seconds` times a forward pass of a config's
        model, for `latency_ms`.
        """
        teacher = text_config(teacher)
        params = self.params if self.target is None else TARGETS[self.target]
        if self.compression is not None:
            params = round(count_parameters(teacher) / self.compression)
        if params is not None:
            return design(teacher, params, keep=self.keep, vocabulary=vocabulary)
        search = ShapeSearch(teacher, self.keep, vocabulary or teacher.vocab_size)
        if self.memory_gb is not None:
            limit = f"at most {self.memory_gb:g} GB"
            return _largest(search, lambda c: size_of(c, self.context).serve_bytes / 1e9, self.memory_gb, limit)
        assert seconds is not None and self.latency_ms is not None, "latency_ms needs a clock"
        return _largest(search, lambda c: 1000 * seconds(c), self.latency_ms, f"at most {self.latency_ms:g} ms")


def _largest(search: ShapeSearch, measure: Measure, most: float, limit: str) -> PretrainedConfig:
    """Bisect for the largest student whose measure, which grows with its parameters, is within the limit."""
    smallest = search.smallest()
    fitting = search.config(smallest.shape)
    if (least := measure(fitting)) > most:
        raise ModelError(
            f"design: expected a limit that a student {KEEP_WORDS[search.keep]} can meet, got {limit}: the smallest "
            f"one takes {least:.3g}. It has {smallest}, {smallest.parameters:,} parameters."
        )
    low, high, everything_fits = smallest.parameters, count_parameters(search.teacher), True
    while high / low > 1 + TOLERANCE / 4:
        middle = round(math.sqrt(low * high))
        config = search.config(search.best(middle).shape)
        if measure(config) <= most:
            low, fitting = middle, config
        else:
            high, everything_fits = middle, False
    if everything_fits:
        raise ModelError(f"design: expected a limit that the teacher does not meet, got {limit}. Take the teacher.")
    return fitting


def parse_count(text: str | float) -> int:
    """Parse a number of parameters.

    >>> parse_count("1.5B"), parse_count("100M"), parse_count("250_000")
    (1500000000, 100000000, 250000)
    """
    match = re.fullmatch(r"\s*([\d_]*\.?\d+(?:[eE]\d+)?)\s*([kKmMbB]?)\s*", str(text))
    if not match or float(match[1]) <= 0:
        raise ModelError(f"params: expected a number such as 100M or 1.5B, got {text}.")
    return round(float(match[1]) * {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}[match[2].lower()])
