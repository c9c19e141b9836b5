"""A student's budget, and the largest student within it."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

from transformers import PretrainedConfig

from potstill.errors import ModelError, nearest
from potstill.losses.declared import Record
from potstill.models.capacity import TaskKind, smallest_student
from potstill.models.compression import TARGETS
from potstill.models.design import KEEP_WORDS, TOLERANCE, Keep, ShapeSearch, design
from potstill.models.shapes import count_experts, position_limit, text_config
from potstill.models.size import count_parameters, is_encoder, size_of

CONTEXT = 2048  # tokens in a row, by default

Measure = Callable[[PretrainedConfig], float]
Timer = Callable[[PretrainedConfig, int], float]  # seconds of a forward pass over a row of so many tokens


class CostLimit(NamedTuple):
    """The most that a student may cost; the cost grows with its parameters."""

    measure: Measure
    most: float
    text: str


@dataclass(frozen=True)
class Budget(Record):
    """Limits on a student's size and cost; at least one, and all of them hold.

    Args:
        params: number of parameters, with all experts (within 5%).
        active_params: at most so many parameters that a token passes through, which are fewer in a mixture of experts.
        compression: the teacher's parameters over the student's (within 5%).
        memory_gb: at most so many gigabytes (10^9 bytes) to serve one row of `context` tokens in half precision.
        latency_ms: at most so long for one forward pass over a row of `context` tokens.
        target: at most the parameters for a kind of device, see `TARGETS`.
        min_share: at least the parameters that published students keep this share of the teacher's score with.
        task: of min_share, see `expected_share`.
        keep: see `design`. By default attention for a causal language model without experts, where a student that
            keeps it can meet the limits, else balanced.
        context: tokens in a row; 2048 by default, or as many as the teacher has positions for, if those are fewer.

    Raises:
        ModelError: no limit, or one that is not positive.
        ShapeError: a value of another type, or a word that is not known.
    """

    params: int | None = None
    active_params: int | None = None
    compression: float | None = None
    memory_gb: float | None = None
    latency_ms: float | None = None
    target: str | None = None
    min_share: float | None = None
    task: TaskKind = "general"
    keep: Keep | None = None
    context: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        limits = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)[:7]}
        given = {name: limit for name, limit in limits.items() if limit is not None}
        if not given:
            raise ModelError(f"design: expected at least one of {', '.join(limits)}, got none.")
        if (target := given.pop("target", None)) is not None and target not in TARGETS:
            raise ModelError(f"design: expected target {', '.join(TARGETS)}, got {target}.{nearest(target, TARGETS)}")
        for name, limit in given.items():
            least, most = 1 if name == "compression" else 0, 1 if name == "min_share" else math.inf
            if not least < limit < most:
                between = f"above {least}" if most == math.inf else f"between {least} and {most}"
                raise ModelError(f"design: expected {name} {between}, got {limit:g}.")

    def student(
        self, teacher: PretrainedConfig, *, vocabulary: int | None = None, seconds: Timer | None = None
    ) -> PretrainedConfig:
        """Design the largest student within the budget; with min_share alone, the smallest.

        `vocabulary` is the number of token ids, the teacher's by default. `seconds` times a forward pass of a config's
        model over a row of so many tokens, for `latency_ms`.
        """
        if not isinstance(teacher, PretrainedConfig):
            hint = "Give the config of a model, or AutoConfig.from_pretrained(name)."
            raise ModelError(f"design: expected a config of the teacher, got a {type(teacher).__name__}. {hint}")
        if self.keep is None and loses_least_with_units(teacher):
            with suppress(ModelError):
                return self._student(teacher, "attention", vocabulary, seconds)
        return self._student(teacher, self.keep or "balanced", vocabulary, seconds)

    def allows(self, student: PretrainedConfig, teacher: PretrainedConfig, *, seconds: Timer | None = None) -> bool:
        """Whether a student of the right number of parameters meets the limits on its cost too."""
        return all(cost.measure(student) <= cost.most for cost in self._costs(text_config(teacher), seconds))

    def _student(
        self, teacher: PretrainedConfig, keep: Keep, vocabulary: int | None, seconds: Timer | None
    ) -> PretrainedConfig:
        teacher = text_config(teacher)
        whole, costs = count_parameters(teacher), [*self._costs(teacher, seconds)]
        least = 0 if self.min_share is None else math.ceil(smallest_student(whole, self.min_share, self.task).value)
        sizes = [] if self.params is None else [self.params]
        sizes += [] if self.target is None else [TARGETS[self.target]]
        sizes += [] if self.compression is None else [round(whole / self.compression)]
        if costs:  # which decide where the teacher has fewer parameters than a size allows
            sizes = [size for size in sizes if size < whole]
        elif not sizes:
            sizes = [least]
        student = _largest(teacher, keep, min(sizes, default=None), costs, vocabulary or teacher.vocab_size)
        if (parameters := count_parameters(student)) < least * (1 - TOLERANCE):
            raise ModelError(
                f"design: expected limits that leave {least:,} parameters, with which published students keep "
                f"{self.min_share:.0%} of their teacher's score ({self.task}), got {parameters:,}. Raise a limit, or "
                "lower min_share."
            )
        return student

    def _costs(self, teacher: PretrainedConfig, seconds: Timer | None) -> Iterator[CostLimit]:
        tokens = self.context or min(CONTEXT, position_limit(teacher) or CONTEXT)
        if self.active_params is not None:
            active: Measure = lambda config: size_of(config, tokens).active_parameters  # noqa: E731
            yield CostLimit(active, self.active_params, f"at most {self.active_params:,} active parameters")
        if self.memory_gb is not None:
            memory: Measure = lambda config: size_of(config, tokens).serve_bytes / 1e9  # noqa: E731
            yield CostLimit(memory, self.memory_gb, f"at most {self.memory_gb:g} GB")
        if self.latency_ms is not None:
            if seconds is None:
                raise ModelError(
                    "design: expected seconds for latency_ms, got none. Give a function that times a forward pass of a "
                    "config's model over so many tokens, as potstill design does."
                )
            yield CostLimit(
                lambda config: 1000 * seconds(config, tokens), self.latency_ms, f"at most {self.latency_ms:g} ms"
            )


def _largest(
    teacher: PretrainedConfig, keep: Keep, parameters: int | None, costs: Sequence[CostLimit], vocabulary: int
) -> PretrainedConfig:
    """Find the largest student of at most so many parameters, if given, that no cost is too high for."""
    if parameters is not None:
        student = design(teacher, parameters, keep=keep, vocabulary=vocabulary)
        if all(cost.measure(student) <= cost.most for cost in costs):
            return student
    search = ShapeSearch(teacher, keep, vocabulary)
    smallest = search.smallest()
    fitting = search.config(smallest.shape)
    for cost in costs:
        if (least := cost.measure(fitting)) > cost.most:
            raise ModelError(
                f"design: expected a limit that a student {KEEP_WORDS[keep]} can meet, got {cost.text}: the "
                f"smallest one takes {least:.3g}. It has {smallest}, {smallest.parameters:,} parameters."
            )
    low, high, everything_fits = smallest.parameters, parameters or count_parameters(teacher), parameters is None
    while high / low > 1 + TOLERANCE / 4:
        middle = round(math.sqrt(low * high))
        config = search.config(search.best(middle).shape)
        if all(cost.measure(config) <= cost.most for cost in costs):
            low, fitting = middle, config
        else:
            high, everything_fits = middle, False
    if everything_fits:
        limits = " and ".join(cost.text for cost in costs)
        raise ModelError(f"design: expected a limit that the teacher does not meet, got {limits}. Take the teacher.")
    return fitting


def loses_least_with_units(teacher: PretrainedConfig) -> bool:
    """Whether a teacher is a causal language model without experts.

    Of one that was pruned, fewer feed-forward units cost less than fewer layers or channels (docs/benchmarks.md).
    """
    heads = ("CausalLM", "LMHead", "ConditionalGeneration")
    causal = all(any(head in name for head in heads) for name in teacher.architectures or ())
    return causal and not is_encoder(text_config(teacher)) and not count_experts(text_config(teacher))


def parse_count(text: str | float) -> int:
    """Parse a number of parameters.

    >>> parse_count("1.5B"), parse_count("100M"), parse_count("250_000")
    (1500000000, 100000000, 250000)
    """
    match = re.fullmatch(r"\s*([\d_]*\.?\d+(?:[eE]\d+)?)\s*([kKmMbB]?)\s*", str(text))
    if not match or float(match[1]) <= 0:
        raise ModelError(f"params: expected a number such as 100M or 1.5B, got {text}.")
    return round(float(match[1]) * {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}[match[2].lower()])
