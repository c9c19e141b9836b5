"""Design a student's config: fields of the teacher's config to change, or the shape that fits a parameter budget."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import RopeParameters

from potstill.errors import ModelError, nearest
from potstill.models.dense import dense_config
from potstill.models.layer_fields import layer_fields
from potstill.models.shapes import (
    DesignShape,
    check_attention,
    config_fields,
    count_experts,
    design_shape,
    experts_per_token,
    layer_kinds,
    text_config,
)
from potstill.models.size import build, config_of, count_parameters, layer_parameters

Keep = Literal["balanced", "depth", "width", "attention"]
KEEP_WORDS = {
    "balanced": "of the teacher's family",
    "depth": "as deep as the teacher",
    "width": "as wide as the teacher",
    "attention": "with the teacher's attention",
}
HEAD_MULTIPLES = {"codegen": 4}  # it splits its heads over four devices
TOLERANCE = 0.05
OF_ANY_CONFIG = PretrainedConfig().to_dict().keys()  # how a model is saved and called, not its shape
UNSCALED = {"rope_theta", "rope_type"}  # parameters of rotary positions that all families read
FFN_RANGE = 1.5  # the feed-forward width may differ by this factor from the teacher's proportion,
LEAST_FFN = 3  # or be so many times smaller where a student is pruned: units are what costs least to cut


def student_config(teacher: PretrainedConfig, changes: Mapping[str, Any], vocabulary: int) -> PretrainedConfig:
    """Change fields of the teacher's config, or of its text part; `vocabulary` is the number of token ids.

    Names may be transformers' common ones, such as num_hidden_layers for GPT-2. Those of `rope_parameters`, such as
    rope_theta, may stand alone; the teacher's others stay. With `model_type`, a teacher with experts has a student of a
    dense family (`dense_config`). Fields by layer are those of the first layers. What the family computes is new.

    >>> from transformers import LlamaConfig
    >>> student_config(LlamaConfig(), {"num_hidden_layers": 2}, 1000).vocab_size
    1000
    """
    teacher, changes = text_config(teacher), dict(changes)
    if (family := changes.pop("model_type", teacher.model_type)) != teacher.model_type:
        teacher = dense_config(teacher, family, changes)
    known = teacher.to_dict()
    own = teacher.attribute_map
    layers, hidden, heads = (
        own.get(name, name) for name in ("num_hidden_layers", "hidden_size", "num_attention_heads")
    )
    changes = _own_fields(teacher, changes, layers)
    for name in {layers, hidden, heads} & changes.keys():
        if type(changes[name]) is not int or changes[name] < 1:
            raise ModelError(f"student.design.{name}: expected a whole number >= 1, got {changes[name]!r}.")
    computed = _computed(teacher) if {hidden, layers} & {*changes} else []
    values = {name: value for name, value in known.items() if name not in computed}
    values |= {"vocab_size": vocabulary} | {name: value for name, value in changes.items() if name in known}
    if heads in changes and "num_key_value_heads" in known and "num_key_value_heads" not in changes:
        values["num_key_value_heads"] = _kv_heads(teacher, changes[heads])
    derived_head = "head_dim" in known and "qk_rope_head_dim" not in known  # latent attention has sizes of its own
    if {hidden, heads} & {*changes} and derived_head and heads in values and "head_dim" not in changes:
        values["head_dim"] = values[hidden] // values[heads]
    if layers in changes:
        by_layer = layer_fields(teacher, range(changes[layers]))
        values |= {name: value for name, value in by_layer.items() if name not in changes}
    student = config_of(teacher, values)
    for name, value in changes.items():
        taken = student.to_dict()[name] if name in known else getattr(student, name)  # of one that differs by layer too
        if not contains(taken, value):
            raise ModelError(
                f"student.design: expected a field that {teacher.model_type} takes, got {name} {value}, in place of "
                f"which the config has {taken}. Leave it out."
            )
    if hasattr(student, "coordinate_size") and 4 * student.coordinate_size + 2 * student.shape_size != values[hidden]:
        raise ModelError(
            f"student.design: expected 4 coordinate_size + 2 shape_size to be hidden_size, {values[hidden]}, in which "
            f"{teacher.model_type} embeds places, got {4 * student.coordinate_size + 2 * student.shape_size}. Set both."
        )
    if 0 < count_experts(student) < experts_per_token(student) and count_experts(student) < count_experts(teacher):
        raise ModelError(
            f"student.design: expected at least the {experts_per_token(student)} experts that a token is sent to, got "
            f"{count_experts(student)}. Change both."
        )
    first = f"the first {student.num_hidden_layers}"
    check_attention(teacher, student, "student.design", first, "Ask for more layers.")
    return student


def _own_fields(teacher: PretrainedConfig, changes: Mapping[str, Any], layers: str) -> dict[str, Any]:
    """Return changes under the names of the teacher's family, with those of rotary positions in `rope_parameters`."""
    known, own = teacher.to_dict(), {"rope_scaling": "rope_parameters"} | teacher.attribute_map
    known = {name: value for name, value in known.items() if name not in OF_ANY_CONFIG}
    of_positions = RopeParameters.__annotations__.keys() - known.keys() if known.get("rope_parameters") else set()
    fields: dict[str, Any] = {}
    rotary: dict[str, Any] = {}
    for given, value in changes.items():
        name = own.get(given, given)
        if name in of_positions:
            rotary[name] = value
        elif name not in known and name != layers:  # Nemotron-H counts its list of kinds
            hint = nearest(given, {*known, *own, *of_positions}) or f" Known: {', '.join(sorted(known))}."
            raise ModelError(f"student.design: expected a field of {type(teacher).__name__}, got {given}.{hint}")
        elif name in fields:
            raise ModelError(f"student.design: expected {name} once, got it as {given} too. Leave one out.")
        else:
            fields[name] = value
    if rotary and "rope_parameters" in fields:
        raise ModelError(
            f"student.design: expected {next(iter(rotary))} in rope_parameters, got it beside them. Move it there."
        )
    fields |= {"rope_parameters": rotary} if rotary else {}
    if fields.get("rope_parameters"):
        fields["rope_parameters"] = _rotary(known.get("rope_parameters") or {}, fields["rope_parameters"])
    return fields


def _kv_heads(teacher: PretrainedConfig, heads: int) -> int:
    """Return the key and value heads for a number of query heads, in the teacher's proportion."""
    shape = design_shape(teacher)
    return _divisor(heads, heads * shape.kv_heads / shape.heads, heads) if shape.heads else heads


def _rotary(teacher: Mapping[str, Any], changes: Any) -> dict[str, Any]:
    """Change parameters of rotary positions, which some families have for each kind of layer."""
    where = "student.design.rope_parameters: expected"
    if not isinstance(changes, Mapping):
        raise ModelError(f"{where} a mapping such as {{rope_theta: 10000.0}}, got {changes!r}.")
    kinds = {kind: values for kind, values in teacher.items() if isinstance(values, Mapping)}
    known = kinds or {**RopeParameters.__annotations__, **teacher}
    for name in changes:
        if name not in known:
            example = f" Such as rope_parameters: {{{next(iter(kinds))}: {{{name}: ...}}}}." if kinds else ""
            raise ModelError(f"{where} {', '.join(known)}, got {name}.{nearest(name, known) or example}")
    if kinds:
        return {kind: _rotary(teacher[kind], changes[kind]) if kind in changes else teacher[kind] for kind in teacher}
    theta, rope_type = changes.get("rope_theta", 1), changes.get("rope_type", teacher.get("rope_type", "default"))
    if not isinstance(theta, int | float) or theta <= 0:
        raise ModelError(f"{where} rope_theta > 0, got {theta!r}.")
    if rope_type != teacher.get("rope_type"):  # another has other parameters
        teacher = {name: value for name, value in teacher.items() if name == "rope_theta"}
    if rope_type == "default" and (unread := changes.keys() - teacher.keys() - UNSCALED):
        read = ", ".join({**teacher, "rope_theta": theta})
        raise ModelError(
            f"{where} what the teacher's positions of rope_type default read ({read}), got {min(unread)}. Leave it "
            "out, or name a rope_type that reads it."
        )
    return {**teacher, **changes}


def contains(value: Any, part: Any) -> bool:
    if isinstance(part, Mapping) and isinstance(value, Mapping):
        return all(contains(value.get(str(key), value.get(key)), item) for key, item in part.items())
    return bool(value == part) or str(value).removeprefix("torch.") == str(part)


def _computes(config: PretrainedConfig) -> bool:
    """Whether the model of a config can be run, tried without numbers: on the meta device."""
    try:
        build(config, "meta")(input_ids=torch.zeros(1, 4, dtype=torch.long, device="meta"), use_cache=False)
    except RuntimeError:  # shapes that do not fit, or an operation that needs numbers
        return False
    return True


def _computed(config: PretrainedConfig) -> list[str]:
    """Fields that a family computes from others where they are not given, as Mamba's rank of the time step is."""
    known, names = config.to_dict(), []
    for name, value in known.items():
        if isinstance(value, int) and getattr(type(config), name, None) in (None, "auto"):
            others = {other: x for other, x in known.items() if other != name}
            with suppress(Exception):
                names += [name] if getattr(type(config).from_dict(others), name) == value else []
    return names


def design(
    teacher: PretrainedConfig, parameters: int, *, keep: Keep = "balanced", vocabulary: int | None = None
) -> PretrainedConfig:
    """Design a student of the teacher's family within 5% of a number of parameters.

    Heads are as wide as the teacher's, so that they can be copied. Widths are multiples of 64, and from 1024 on of 128
    (of 8 for a teacher narrower than 256); no size is larger than the teacher's.

    Args:
        teacher: the teacher's config.
        parameters: the budget.
        keep: the teacher's depth; its width (of hidden states and heads); its attention, so that feed-forward networks
            shrink, down to a third, and only then the number of layers; or nothing: depth and width shrink in
            proportion.
        vocabulary: number of token ids; the teacher's by default.
    """
    if keep not in get_args(Keep):
        raise ModelError(f"design: expected keep {', '.join(get_args(Keep))}, got {keep}.")
    teacher = text_config(teacher)
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
        ffn = f", feed-forward {self.shape.ffn}" if self.shape.ffn else ""
        return f"{layers} of width {self.shape.hidden}{ffn}"


@dataclass(frozen=True)
class WidthCounts:
    """Parameters of a shape by its number of layers: base[n] + unit[n] * ffn."""

    base: list[float]
    unit: list[float]


class ShapeSearch:
    """Search of the shapes that a student of a teacher's family may have.

    It has the teacher's first layers, at least one of each kind, and a repeated pattern of kinds as a whole. Where
    widths cannot be changed, it has fewer layers alone.
    """

    def __init__(self, teacher: PretrainedConfig, keep: Keep, vocabulary: int, *, vary_heads: bool = False) -> None:
        self.teacher, self.keep, self.vocabulary = text_config(teacher), keep, vocabulary
        self.vary_heads = vary_heads  # else a width has the number of heads in the teacher's proportion alone
        self.shape = design_shape(teacher)
        kinds = self._kinds()
        self._first = [kinds.index(kind) for kind in kinds]  # for each layer, the first of its kind
        self._least = max(self._first) + 1  # layers that have each kind
        depth, repeats = self.shape.layers, all(kind == kinds[i % self._least] for i, kind in enumerate(kinds))
        self._depths = [*range(self._least, depth, self._least if repeats else 1), depth]
        self._computes = self._can_run(self.shape)
        self._widths = [*self._counted_widths()]

    def best(self, parameters: int) -> SizedShape:
        """Return the shape nearest to the teacher's proportions within half of the tolerance, else to the budget."""

        def cost(candidate: SizedShape) -> tuple[float, float]:
            error = abs(math.log(candidate.parameters / parameters))
            return (0.0, self._distance(candidate.shape)) if error < TOLERANCE / 2 else (error, 0.0)

        return min(self._candidates(parameters), key=cost)

    def near(self, parameters: int) -> list[SizedShape]:
        """Return all shapes within half of the tolerance of a budget."""
        return [x for x in self._candidates(parameters) if abs(math.log(x.parameters / parameters)) < TOLERANCE / 2]

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
        depths = [self.shape.layers] if self.keep == "depth" else self._depths
        narrowest = LEAST_FFN if self.vary_heads or self.keep == "attention" else FFN_RANGE
        for width, counts in self._widths:
            least, most = width.ffn / narrowest, min(width.ffn * FFN_RANGE, self.shape.ffn)
            for layers in depths:
                base, unit, ffn = counts.base[layers], counts.unit[layers], width.ffn
                if unit:
                    ffn = _rounded(min(max((parameters - base) / unit, least), most), self.shape.ffn)
                if (count := round(base + unit * ffn)) > 0:
                    yield SizedShape(replace(width, layers=layers, ffn=ffn), count)

    def _kinds(self) -> list[tuple[Any, ...]]:
        """Describe the kind of each of the teacher's layers, by its type in the config and its parameters."""
        types = layer_kinds(self.teacher) or [""] * self.shape.layers
        _, *layers = layer_parameters(build(self.teacher, "meta"))
        return [(kind, *sorted(shapes.items())) for kind, shapes in zip(types, layers, strict=True)]

    def _counted_widths(self) -> Iterator[tuple[DesignShape, WidthCounts]]:
        for shape in self._all_widths():
            try:
                if self._computes and not self._can_run(shape):
                    continue  # the family cannot have this width
                yield shape, self._count(shape)
            except ModelError:  # nor this one
                if shape.hidden == self.shape.hidden:
                    raise

    def _all_widths(self) -> Iterator[DesignShape]:
        """The teacher's shape in all widths, its feed-forward network in proportion."""
        teacher = self.shape
        for hidden in [teacher.hidden] if self.keep in ("width", "attention") else range(8, teacher.hidden + 1, 8):
            if hidden != teacher.hidden and hidden % _multiple(hidden, teacher.hidden):
                continue
            ratio = hidden / teacher.hidden
            if not teacher.heads:
                heads = kv_heads = 0
            elif teacher.heads * teacher.head_size == teacher.hidden:
                if hidden % teacher.head_size:
                    continue
                heads = hidden // teacher.head_size
                target = heads * teacher.kv_heads / teacher.heads
                counts = (n for n in range(1, teacher.kv_heads + 1) if heads % n == 0 and self._forms(heads, n))
                kv_heads = min(counts, key=lambda n: abs(math.log(n / target)))
            else:
                kv_heads = max(1, round(teacher.kv_heads * ratio))
                heads = kv_heads * max(1, round(teacher.heads * ratio / kv_heads))
            ffn = _rounded(teacher.ffn * ratio, teacher.ffn) if teacher.ffn else 0
            for queries, keys in self._head_counts(hidden, heads, kv_heads):
                yield replace(teacher, hidden=hidden, heads=queries, kv_heads=keys, ffn=ffn)

    def _head_counts(self, hidden: int, heads: int, kv_heads: int) -> Iterator[tuple[int, int]]:
        """The numbers of query heads, and of key and value heads, that a width may have; first those in proportion."""
        counts = {(heads, kv_heads): None}
        if self.vary_heads and heads:
            groups = {heads // kv_heads, (size := self.shape.heads // self.shape.kv_heads), (size + 1) // 2}
            of_keys = {kv_heads, self.shape.kv_heads, max(1, self.shape.kv_heads // 2)}
            counts |= dict.fromkeys(sorted((keys * group, keys) for keys in of_keys for group in groups))
        fixed = "head_dim" not in self.teacher.to_dict()  # a head is then as wide as the hidden states over the heads
        for queries, keys in counts:
            if queries % HEAD_MULTIPLES.get(self.teacher.model_type, 1) or queries > self.shape.heads:
                continue
            if queries != heads and (fixed or 2 * queries < heads or not self._forms(queries, keys)):
                continue
            if not queries or hidden % queries == 0:  # some families' configs require it
                yield queries, keys

    def _forms(self, heads: int, kv_heads: int) -> bool:
        """Whether the teacher's groups of query heads can be kept or merged into these, see `select_parts`."""
        group = self.shape.heads // self.shape.kv_heads
        return -(-(heads // kv_heads) // group) * kv_heads <= self.shape.kv_heads

    def _count(self, shape: DesignShape) -> WidthCounts:
        """Count the parameters of a width from small models of it: one with each kind of layer, and two variants."""
        small = replace(shape, layers=self._depths[:2][-1])
        counts = self._by_layer(small)
        wide = self._by_layer(replace(small, ffn=2 * shape.ffn)) if shape.ffn else counts
        shallow = self._by_layer(replace(small, layers=self._least)) if small.layers > self._least else counts
        units = [(x - y) / max(shape.ffn, 1) for x, y in zip(wide, counts, strict=True)]
        bases = [count - unit * shape.ffn for count, unit in zip(counts, units, strict=True)]
        # What a layer adds outside of the layers, as to Gemma 3n's embeddings.
        by_layer = (counts[0] - shallow[0]) / max(small.layers - self._least, 1)
        base, unit = [bases[0] - small.layers * by_layer], [units[0]]
        for first in self._first:
            base.append(base[-1] + bases[first + 1] + by_layer)
            unit.append(unit[-1] + units[first + 1])
        return WidthCounts(base, unit)

    def _can_run(self, shape: DesignShape) -> bool:
        return _computes(self.config(replace(shape, layers=self._least)))

    def _by_layer(self, shape: DesignShape) -> list[int]:
        parts = layer_parameters(build(self.config(shape), "meta"))
        return [sum(size.numel() for size in part.values()) for part in parts]

    def _distance(self, shape: DesignShape) -> float:
        """The distance of a shape's proportions from the teacher's.

        Depth over width is one of them: public families (Llama 3, Qwen 2.5) keep it over their sizes.
        """
        proportions = [
            (x.ffn / x.hidden, x.heads / max(x.kv_heads, 1), x.layers / x.hidden) for x in (shape, self.shape)
        ]
        distances = [
            abs(math.log(own / teacher)) if teacher else 0.0 for own, teacher in zip(*proportions, strict=True)
        ]
        if self.keep == "attention":
            return self.shape.layers - shape.layers
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
