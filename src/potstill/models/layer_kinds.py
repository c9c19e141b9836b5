"""Kinds of layers, such as sliding and full attention, in a student with some of its teacher's layers."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Sequence

from torch import nn
from transformers import PretrainedConfig

from potstill.errors import ModelError
from potstill.models.design import contains, student_config
from potstill.models.layer_fields import layer_fields
from potstill.models.shapes import check_attention
from potstill.models.size import build, config_of
from potstill.models.structure import find_layer_list


def keep_kinds(layers: Sequence[int], kinds: Sequence[str]) -> list[int]:
    """Exchange chosen layers for the nearest of each kind that is missing, so that one of each kind stays.

    Without it a student may have sliding attention alone, and see nothing beyond its windows.

    >>> keep_kinds([0, 2, 4], ["sliding", "sliding", "sliding", "sliding", "sliding", "full"])
    [0, 2, 5]
    """
    chosen = [*layers]
    for kind in dict.fromkeys(kinds):
        counts = Counter(kinds[layer] for layer in chosen)
        others = [layer for layer in chosen if counts[kinds[layer]] > 1]
        missing = [layer for layer in range(len(kinds)) if kinds[layer] == kind and not counts[kind]]
        swaps = [(abs(new - old), old, new) for new in missing for old in others]
        if swaps:
            _, old, new = min(swaps)
            chosen = sorted({*chosen} - {old} | {new})
    return chosen


def with_layers(config: PretrainedConfig, of_teacher: PretrainedConfig, layers: Sequence[int]) -> PretrainedConfig:
    """Give a student's config the fields by layer of these layers of its teacher; those that the design changes stay.

    Raises:
        ModelError: the family makes one another kind, as Gemma 4 its last, or none has attention.
    """
    fields, first = config.to_dict(), layer_fields(of_teacher, range(config.num_hidden_layers))
    taken = type(config).from_dict(copy.deepcopy(fields | first)).to_dict()  # a constructor may change lists in place
    changed = {name: x for name, x in layer_fields(of_teacher, layers).items() if fields.get(name) == taken.get(name)}
    student = config_of(config, copy.deepcopy(fields | changed))
    taken = student.to_dict()
    for name, value in changed.items():
        if name in fields and not contains(taken[name], value):
            raise ModelError(
                f"student.initialize.layers: expected layers of the kinds that {config.model_type} takes, got {name} "
                f"{value}, in place of which the config has {taken[name]}. Choose others."
            )
    hybrid: list[int] = getattr(of_teacher, "hybrid_layer_ids", None) or []  # Zamba2's: the same with adapters in turn
    kept = [layer for layer in hybrid if layer in layers]
    if kept != hybrid[: len(kept)]:
        raise ModelError(
            f"student.initialize.layers: expected the first ones of {of_teacher.model_type}'s layers {hybrid}, which "
            f"share weights, got {kept}. Choose others."
        )
    check_attention(of_teacher, student, "student.initialize.layers", [*layers], "Choose others.")
    return student


def layer_notes(of_teacher: PretrainedConfig, layers: nn.ModuleList, chosen: Sequence[int]) -> Iterator[str]:
    """Say where layers that are copied compute something else: their place or their number is in what they compute.

    Such as the scaling of GPT-2's attention with scale_attn_by_inverse_layer_idx, and of MiniCPM3's layers; the first
    layer of ModernBERT lacks a norm.
    """
    shorter = student_config(of_teacher, {"num_hidden_layers": len(chosen)}, of_teacher.vocab_size)
    kept = find_layer_list(build(with_layers(shorter, of_teacher, chosen), "meta")).layers
    changed: set[str] = set()
    for place, (number, layer) in enumerate(zip(chosen, kept, strict=True)):
        own, other = _settings(layers[number]), _settings(layer)
        changed |= {name for name in own.keys() & other.keys() if own[name] != other[name]}
        if lost := {name for name, _ in layers[number].named_parameters()} - {n for n, _ in layer.named_parameters()}:
            yield f"student: without {', '.join(sorted(lost))} of layer {number}, which layer {place} does not have."
    if changed:
        yield (
            f"student: {', '.join(sorted(changed))} of a layer is by its place or the number of layers in "
            f"{of_teacher.model_type}: until it is trained, it is another function."
        )


def _settings(layer: nn.Module) -> dict[str, float]:
    """The numbers in the modules of a layer by their names, but for those of layers themselves, such as layer_idx."""
    numbers = (
        (f"{path}.{name}".lstrip("."), value)
        for path, module in layer.named_modules()
        for name, value in vars(module).items()
    )
    return {name: x for name, x in numbers if type(x) in (int, float) and "layer" not in name.rpartition(".")[2]}
