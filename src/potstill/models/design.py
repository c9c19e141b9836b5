"""Design a student's config: fields of the teacher's config to change, or the shape that fits a parameter budget."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from transformers import PretrainedConfig

from potstill.errors import ModelError, nearest
from potstill.models.size import count_parameters, invalid_config
from potstill.models.structure import DesignShape, config_fields, design_shape

Keep = Literal["balanced", "depth", "width"]
KEEP_WORDS = {
    "balanced": "of the teacher's family",
    "depth": "as deep as the teacher",
    "width": "as wide as the teacher",
}
TOLERANCE = 0.05
FFN_RANGE = 1.5  # the feed-forward width may differ by this factor from the teacher's proportion


def student_config(teacher: PretrainedConfig, changes: Mapping[str, Any], vocabulary: int) -> PretrainedConfig:
    """Change fields of the teacher's config; `vocabulary` is the number of token ids, without padding rows.

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
    # Derived fields follow those that they are derived from, unless they are given.
    if "num_attention_heads" in changes and "num_key_value_heads" in known and "num_key_value_heads" not in changes:
        config.num_key_value_heads = config.num_attention_heads
    if {"hidden_size", "num_attention_heads"} & set(changes) and "head_dim" in known and "head_dim" not in changes:
        config.head_dim = config.hidden_size // config.num_attention_heads
    if "num_hidden_layers" in changes and isinstance(known.get("layer_types"), list):
        config.layer_types = known["layer_types"][: config.num_hidden_layers]
    try:
        return type(teacher).from_dict(config.to_dict())  # only its constructor checks that fields fit together
    except Exception as error:
        raise invalid_config(error) from None


def design(
    teacher: PretrainedConfig, parameters: int, *, keep: Keep = "balanced", vocabulary: int | None = None
) -> PretrainedConfig:
    """Design a student of the teacher's family within 5% of a number of parameters.

    Heads are as wide as the teacher's, so that they can be copied. Widths are multiples of 64, and from 1024 on of 128
    (of 8 for a teacher narrower than 256); no size is larger than the teacher's.

    Args:
        teacher: the teacher's config.
        parameters: the budget.
        keep: the teacher's depth, its width (of hidden states and heads), or neither: both shrink in proportion.
        vocabulary: number of token ids; the teacher's by default.
    """
    if keep not in get_args(Keep):
        raise ModelError(f"design: expected keep {', '.join(get_args(Keep))}, got {keep}.")
    search = ShapeSearch(teacher, keep, vocabulary or teacher.vocab_size)
    largest = count_parameters(teacher)
    if parameters >= largest:
        raise ModelError(
            f"design: expected a budget below the teacher's {largest:,} parameters, got {parameters:,}. "
            "A student of that size can be the teacher itself."
        )
    best = search.best(parameters)
    config = search.config(best.shape)
    count = count_parameters(config)
    if abs(count / parameters - 1) > TOLERANCE:
        smallest = search.smallest()
        if parameters < smallest.parameters:
            raise ModelError(
                f"design: expected a budget of at least {smallest.parameters:,} parameters, got {parameters:,}. "
                f"The smallest student {KEEP_WORDS[keep]} has {smallest}, and embeddings of {search.vocabulary:,} "
                f"tokens. {search.advice(parameters)}"
            )
        raise ModelError(
            f"design: expected a budget that a student {KEEP_WORDS[keep]} can meet within {TOLERANCE:.0%}, got "
            f"{parameters:,}. The nearest has {count:,} parameters: {best}. Ask for that many, or keep something else."
        )
    return config


@dataclass(frozen=True)
class SizedShape:
    """A shape and its number of parameters."""

    shape: DesignShape
    parameters: int

    def __str__(self) -> str:
        layers = "1 layer" if self.shape.layers == 1 else f"{self.shape.layers} layers"
        return f"{layers} of width {self.shape.hidden}, feed-forward {self.shape.ffn}"


class ShapeSearch:
    """Search of the shapes that a student of a teacher's family may have."""

    def __init__(self, teacher: PretrainedConfig, keep: Keep, vocabulary: int) -> None:
        self.teacher, self.keep, self.vocabulary = teacher, keep, vocabulary
        self.shape = design_shape(teacher)
        self._widths = [(shape, self._count(shape)) for shape in self._all_widths()]

    def best(self, parameters: int) -> SizedShape:
        """Return the shape nearest to the teacher's proportions within half of the tolerance, else to the budget."""

        def cost(candidate: SizedShape) -> tuple[float, float]:
            error = abs(math.log(candidate.parameters / parameters))
            return (0.0, self._distance(candidate.shape)) if error < TOLERANCE / 2 else (error, 0.0)

        return min(self._candidates(parameters), key=cost)

    def smallest(self) -> SizedShape:
        return min(self._candidates(0), key=lambda candidate: candidate.parameters)

    def config(self, shape: DesignShape) -> PretrainedConfig:
        return student_config(self.teacher, config_fields(shape, self.teacher), self.vocabulary)

    def advice(self, parameters: int) -> str:
        """Advice for a budget below the smallest shape."""
        if self.keep != "balanced":
            smallest = ShapeSearch(self.teacher, "balanced", self.vocabulary).smallest().parameters
            if smallest <= parameters:
                return f"Let both shrink (keep balanced): from {smallest:,} on."
        return "Ask for more, or take a teacher with a smaller vocabulary."

    def _candidates(self, parameters: int) -> Iterator[SizedShape]:
        """All widths and depths, each with the feed-forward width that brings it nearest to the budget."""
        depths = [self.shape.layers] if self.keep == "depth" else range(1, self.shape.layers + 1)
        for width, (outside, layer, unit) in self._widths:
            least, most = width.ffn / FFN_RANGE, min(width.ffn * FFN_RANGE, self.shape.ffn)
            for layers in depths:
                ffn = ((parameters - outside) / layers - layer) / unit
                shape = replace(width, layers=layers, ffn=_rounded(min(max(ffn, least), most), self.shape.ffn))
                yield SizedShape(shape, outside + layers * (layer + unit * shape.ffn))

    def _all_widths(self) -> Iterator[DesignShape]:
        """The teacher's shape in all widths, its feed-forward network in proportion."""
        teacher = self.shape
        for hidden in [teacher.hidden] if self.keep == "width" else range(8, teacher.hidden + 1, 8):
            if hidden != teacher.hidden and hidden % _multiple(hidden, teacher.hidden):
                continue
            ratio = hidden / teacher.hidden
            if teacher.heads * teacher.head_size == teacher.hidden:
                if hidden % teacher.head_size:
                    continue
                heads = hidden // teacher.head_size
                kv_heads = _divisor(heads, heads * teacher.kv_heads / teacher.heads, teacher.kv_heads)
            else:
                kv_heads = max(1, round(teacher.kv_heads * ratio))
                heads = kv_heads * max(1, round(teacher.heads * ratio / kv_heads))
            if hidden % heads == 0:  # some families' configs require it
                ffn = _rounded(teacher.ffn * ratio, teacher.ffn)
                yield replace(teacher, hidden=hidden, heads=heads, kv_heads=kv_heads, ffn=ffn)

    def _count(self, shape: DesignShape) -> tuple[int, int, int]:
        """Fit parameters = outside + layers * (layer + unit * ffn) to three small models of a width."""
        variants = [replace(shape, layers=1), replace(shape, layers=2), replace(shape, layers=1, ffn=2 * shape.ffn)]
        one, two, wide = (count_parameters(self.config(variant)) for variant in variants)
        unit = (wide - one) // shape.ffn
        return one - (two - one), (two - one) - unit * shape.ffn, unit

    def _distance(self, shape: DesignShape) -> float:
        """The distance of a shape's proportions from the teacher's.

        Depth over width is one of them: public families (Llama 3, Qwen 2.5) keep it over their sizes.
        """
        proportions = [(x.ffn / x.hidden, x.heads / x.kv_heads, x.layers / x.hidden) for x in (shape, self.shape)]
        distances = [abs(math.log(own / teacher)) for own, teacher in zip(*proportions, strict=True)]
        return sum(distances if self.keep == "balanced" else distances[:2])


def _multiple(width: int, teacher_width: int) -> int:
    return 8 if teacher_width < 256 else 64 if width < 1024 else 128


def _rounded(width: float, teacher_width: int) -> int:
    """The nearest multiple, not above the teacher's width."""
    step = _multiple(round(width), teacher_width)
    return min(max(step, step * round(width / step)), teacher_width)


def _divisor(number: int, target: float, most: int) -> int:
    """The divisor of a number nearest to a target, at most `most`."""
    divisors = [divisor for divisor in range(1, min(number, most) + 1) if number % divisor == 0]
    return min(divisors, key=lambda divisor: abs(math.log(divisor / target)))
