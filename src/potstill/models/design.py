"""The shape of a student: fields of the teacher's config, or the shape that fits a budget."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from transformers import PretrainedConfig

from potstill.errors import ModelError, nearest
from potstill.models.shape import Shape, fields_of, shape_of
from potstill.models.size import count_parameters, last_line

Keep = Literal["balanced", "depth", "width"]
TOLERANCE = 0.05
FFN_RANGE = 1.5  # how far the width of the feed-forward network may leave the teacher's proportion


def student_config(teacher: PretrainedConfig, changes: Mapping[str, Any], vocabulary: int) -> PretrainedConfig:
    """The teacher's own kind of model with some fields changed.

    Args:
        teacher: the teacher's config.
        changes: field name -> value, such as hidden_size or num_hidden_layers.
        vocabulary: the number of real tokens: the student has no padding rows.

    Raises:
        ModelError: the teacher's config has no such field, or the fields do not fit together.

    >>> from transformers import LlamaConfig
    >>> student_config(LlamaConfig(), {"num_hidden_layers": 2}, 1000).vocab_size
    1000
    """
    known = teacher.to_dict()
    config = copy.deepcopy(teacher)
    config.vocab_size = vocabulary
    for name, value in changes.items():
        if name not in known:
            hint = nearest(name, known) or f" Known: {', '.join(sorted(known))}."
            raise ModelError(
                f"student.design: expected a field of the teacher's {type(teacher).__name__}, got {name}.{hint}"
            )
        setattr(config, name, value)
    # Derived fields follow what they are derived from, unless they are given.
    if "num_attention_heads" in changes and "num_key_value_heads" in known and "num_key_value_heads" not in changes:
        config.num_key_value_heads = config.num_attention_heads
    if {"hidden_size", "num_attention_heads"} & set(changes) and "head_dim" in known and "head_dim" not in changes:
        config.head_dim = config.hidden_size // config.num_attention_heads
    if "num_hidden_layers" in changes and isinstance(known.get("layer_types"), list):
        config.layer_types = known["layer_types"][: config.num_hidden_layers]
    try:
        # Made anew, because only then a config checks that its fields fit together.
        made: PretrainedConfig = type(teacher).from_dict(config.to_dict())
    except Exception as error:  # each architecture has its own words for a shape that cannot be
        raise ModelError(f"student.design: expected a shape that a model can have, got: {last_line(error)}") from None
    return made


def design(
    teacher: PretrainedConfig, parameters: int, *, keep: Keep = "balanced", vocabulary: int | None = None
) -> PretrainedConfig:
    """The config of a student of the teacher's family within 5% of a number of parameters.

    Heads are as wide as the teacher's, so that they can be copied. Widths are multiples of 64, and from 1024 on of 128
    (of 8 beside a teacher narrower than 256); no size is larger than the teacher's.

    Args:
        teacher: the teacher's config; no weights are needed.
        parameters: the budget.
        keep: the teacher's depth, its width (of the residual stream and the heads), or neither: both shrink alike.
        vocabulary: the student's number of tokens; default: the teacher's.

    Raises:
        ModelError: no such shape comes within 5% of the budget; it says which is the smallest.
    """
    if keep not in get_args(Keep):
        raise ModelError(f"design: expected keep {', '.join(get_args(Keep))}, got {keep}.")
    shape_of(teacher)  # says so where the layers are not all alike
    rows = vocabulary or teacher.vocab_size
    largest = count_parameters(teacher)
    if parameters >= largest:
        raise ModelError(
            f"design: expected a budget below the teacher's {largest:,} parameters, got {parameters:,}. "
            "A student of that size can be the teacher itself."
        )
    search = Search(teacher, keep, rows)
    best = search.best(parameters)
    config = search.config(best.shape)
    found = count_parameters(config)
    if abs(found / parameters - 1) > TOLERANCE:
        smallest = search.smallest()
        if parameters < smallest.parameters:
            raise ModelError(
                f"design: expected a budget of at least {smallest.parameters:,} parameters, got {parameters:,}. "
                f"The smallest student {KEPT[keep]} has {in_words(smallest.shape)}, and embeddings of {rows:,} tokens. "
                + _advice(teacher, keep, rows, parameters)
            )
        raise ModelError(
            f"design: expected a budget that a student {KEPT[keep]} can meet within {TOLERANCE:.0%}, got "
            f"{parameters:,}. The nearest has {found:,} parameters: {in_words(best.shape)}. Ask for that many, or keep "
            "something else."
        )
    return config


KEPT = {
    "balanced": "of the teacher's family",
    "depth": "as deep as the teacher",
    "width": "as wide as the teacher",
}


@dataclass(frozen=True)
class Candidate:
    """A shape and the number of parameters that it gives."""

    shape: Shape
    parameters: int


@dataclass(frozen=True)
class _Counts:
    """Parameters as outside + layers * (layer + unit * ffn): what is the same for all depths of one width."""

    outside: int
    layer: int
    unit: int

    def of(self, shape: Shape) -> int:
        return self.outside + shape.layers * (self.layer + self.unit * shape.ffn)


class Search:
    """The shapes that a student may have, and the best for a budget."""

    def __init__(self, teacher: PretrainedConfig, keep: Keep, rows: int) -> None:
        self.teacher, self.keep, self.rows = teacher, keep, rows
        self.shape = shape_of(teacher)
        self.widths = [(shape, self._count(shape)) for shape in self._widths()]

    def best(self, parameters: int) -> Candidate:
        """The shape that is nearest to the teacher's proportions among those within half of the tolerance, else the
        one that is nearest to the budget.
        """
        candidates = [self._with_ffn(width, counts, layers, parameters) for width, counts, layers in self._frames()]

        def cost(one: Candidate) -> tuple[float, float]:
            missed = abs(math.log(one.parameters / parameters))
            return (0.0, self._distance(one.shape)) if missed < TOLERANCE / 2 else (missed, 0.0)

        return min(candidates, key=cost)

    def config(self, shape: Shape) -> PretrainedConfig:
        """The config of a shape."""
        return student_config(self.teacher, fields_of(shape, self.teacher), self.rows)

    def smallest(self) -> Candidate:
        """The shape with the fewest parameters."""
        return min(
            (self._with_ffn(width, counts, layers, 0) for width, counts, layers in self._frames()),
            key=lambda one: one.parameters,
        )

    def _frames(self) -> Iterator[tuple[Shape, _Counts, int]]:
        depths = [self.shape.layers] if self.keep == "depth" else range(1, self.shape.layers + 1)
        for width, counts in self.widths:
            for layers in depths:
                yield width, counts, layers

    def _widths(self) -> Iterator[Shape]:
        """The teacher's shape in all widths, its feed-forward network in proportion."""
        whole = self.shape
        for hidden in [whole.hidden] if self.keep == "width" else range(8, whole.hidden + 1, 8):
            if hidden != whole.hidden and hidden % _multiple(hidden, whole.hidden):
                continue
            share = hidden / whole.hidden
            if whole.heads_fill_hidden:
                if hidden % whole.head_size:
                    continue
                heads = hidden // whole.head_size
                kv_heads = _divisor(heads, heads * whole.kv_heads / whole.heads, whole.kv_heads)
            else:
                kv_heads = max(1, round(whole.kv_heads * share))
                heads = kv_heads * max(1, round(whole.heads * share / kv_heads))
            if hidden % heads:  # some families' configs refuse it
                continue
            ffn = _rounded(whole.ffn * share, whole.ffn)
            yield replace(whole, hidden=hidden, heads=heads, kv_heads=kv_heads, ffn=ffn)

    def _count(self, shape: Shape) -> _Counts:
        """Counted on three small models, because parameters are linear in layers and in the feed-forward width."""
        ones = [replace(shape, layers=1), replace(shape, layers=2), replace(shape, layers=1, ffn=2 * shape.ffn)]
        one, two, wide = (count_parameters(self.config(each)) for each in ones)
        unit = (wide - one) // shape.ffn
        return _Counts(outside=one - (two - one), layer=(two - one) - unit * shape.ffn, unit=unit)

    def _with_ffn(self, width: Shape, counts: _Counts, layers: int, parameters: int) -> Candidate:
        """A frame with the feed-forward width that brings it nearest to the budget, within its range."""
        wanted = ((parameters - counts.outside) / layers - counts.layer) / counts.unit
        least, most = width.ffn / FFN_RANGE, min(width.ffn * FFN_RANGE, self.shape.ffn)
        shape = replace(width, layers=layers, ffn=_rounded(min(max(wanted, least), most), self.shape.ffn))
        return Candidate(shape, counts.of(shape))

    def _distance(self, shape: Shape) -> float:
        """How far a shape's proportions are from the teacher's; 0 where they are the same.

        Depth over width is one of them: public families (Llama 3, Qwen 2.5) keep it over their sizes.
        """
        whole = self.shape
        distance = abs(math.log((shape.ffn / shape.hidden) / (whole.ffn / whole.hidden)))
        distance += abs(math.log((shape.heads / shape.kv_heads) / (whole.heads / whole.kv_heads)))
        if self.keep == "balanced":
            distance += abs(math.log((shape.layers / shape.hidden) / (whole.layers / whole.hidden)))
        return distance


def _multiple(size: int, teachers: int) -> int:
    """What a width should be a multiple of."""
    return 8 if teachers < 256 else 64 if size < 1024 else 128


def _rounded(size: float, teachers: int) -> int:
    """The nearest width that is a sensible multiple, not above the teacher's."""
    step = _multiple(round(size), teachers)
    return min(max(step, step * round(size / step)), teachers)


def _divisor(whole: int, wanted: float, most: int) -> int:
    """The divisor of a number that is nearest to another, not above a third."""
    divisors = [one for one in range(1, min(whole, most) + 1) if whole % one == 0]
    return min(divisors, key=lambda one: abs(math.log(one / wanted)))


def in_words(shape: Shape) -> str:
    layers = "1 layer" if shape.layers == 1 else f"{shape.layers} layers"
    return f"{layers} of width {shape.hidden}, feed-forward {shape.ffn}"


def _advice(teacher: PretrainedConfig, keep: Keep, rows: int, parameters: int) -> str:
    if keep != "balanced" and (other := Search(teacher, "balanced", rows).smallest()).parameters <= parameters:
        return f"Let both shrink (keep balanced): from {other.parameters:,} on."
    return "Ask for more, or take a teacher with a smaller vocabulary."
