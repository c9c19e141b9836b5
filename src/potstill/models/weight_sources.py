"""Where a student's weights come from: the parts of its teacher that were selected for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from potstill.errors import ModelError
from potstill.models.expert_selection import BlockSource
from potstill.models.feed_forward import Mixture, find_mixture
from potstill.models.matrix_axes import matrix_axes
from potstill.models.placement import weight_in_memory
from potstill.models.pruning import SelectedParts
from potstill.models.shapes import text_config
from potstill.models.structure import (
    LayerList,
    LayerStructure,
    find_layer_list,
    find_structure,
    is_transposed,
)


@torch.no_grad()
def copy_weights(teacher: PreTrainedModel, student: PreTrainedModel, parts: SelectedParts) -> None:
    """Fill a student's parameters and saved buffers from the teacher's, in place."""
    mixture = find_mixture(teacher) if parts.blocks else None
    structure: LayerList = mixture or (find_structure(teacher) if parts.heads else find_layer_list(teacher))
    configs, parameters = (text_config(teacher.config), student.config), dict(student.named_parameters())
    saved = student.state_dict().keys()
    buffers = {name: buffer for name, buffer in student.named_buffers() if name in saved}
    for own_name, parameter in (parameters | buffers).items():
        name = name_in(teacher, student, own_name)
        place, source = structure.locate(name), source_of(teacher, structure, name, parts, parameter)
        of_block = place is not None and in_block(structure, parts, place)
        if source is None or of_block or (own_name in buffers and source.shape != parameter.shape):
            continue
        with weight_in_memory(teacher, source_name(structure, name, parts)) as weight:
            value = weight.detach().to("cpu", parameter.dtype)
        axes = None
        if place is not None and isinstance(structure, LayerStructure | Mixture) and parts.heads:
            axes = matrix_axes(structure, parts, place[0]).get(place[1])
        if axes is None:
            value = _select_outside(value, parameter, *configs, parts, name)
        else:
            transposed = value.ndim == 2 and is_transposed(student.get_submodule(own_name.rpartition(".")[0]))
            value = value.T if transposed else value
            rows = value[axes[0]]
            value = rows.squeeze(1) if rows.shape[1] == 1 else rows.mean(1)
            value = value if value.ndim == 1 else value.index_select(1, axes[1])
            value = value.T if transposed else value
        parameter.copy_(value)
    if mixture is not None:
        for number, layer in enumerate(find_layer_list(student).layers):
            of_teacher = parts.layers[number]
            block, importance = mixture.blocks[of_teacher], parts.blocks[number]
            if block is not None and importance is not None:
                path = f"{mixture.path}.{of_teacher}"
                filled = BlockSource(teacher, path, block, importance, parts.channels)
                filled.fill(layer, student.config, parts.merge)


def in_block(structure: LayerList, parts: SelectedParts, place: tuple[int, str]) -> bool:
    """Whether a place in the student's layers is in a feed-forward network of a mixture, which `BlockSource` fills."""
    if not isinstance(structure, Mixture):
        return False
    block = structure.blocks[parts.layers[place[0]]]
    return block is not None and f"{place[1]}.".startswith(f"{block.path}.")


def name_in(teacher: PreTrainedModel, student: PreTrainedModel, name: str) -> str:
    """Return the teacher's name of a student's parameter; a teacher may have its text part within another model."""
    if text_config(teacher.config) is teacher.config:
        return name
    of_teacher, of_student = (
        next(path for path, module in model.named_modules() if module is model.get_decoder())
        for model in (teacher, student)
    )
    return name.replace(f"{of_student}.", f"{of_teacher}.", 1) if name.startswith(f"{of_student}.") else name


def source_name(structure: LayerList, name: str, parts: SelectedParts) -> str:
    """The teacher's name of the parameter that a student's comes from; its own is that of the student's layer."""
    if place := structure.locate(name):
        rest = name.removeprefix(f"{structure.path}.{place[0]}")
        name = f"{structure.path}.{parts.layers[place[0]]}{rest}"
    return name


def source_of(
    teacher: PreTrainedModel, structure: LayerList, name: str, parts: SelectedParts, parameter: Tensor
) -> Tensor | None:
    """The teacher's parameter or buffer that a student's comes from."""
    path, _, own = source_name(structure, name, parts).rpartition(".")
    try:
        source: Any = getattr(teacher.get_submodule(path), own, None)
    except AttributeError:
        return None
    if not isinstance(source, Tensor):
        return None
    if source.shape == parameter.shape or not parts.matching:
        return source
    sizes = [*source.shape[:1], *parameter.shape[:1]]
    fewer_tokens = len(sizes) == 2 and sizes[0] == text_config(teacher.config).vocab_size > sizes[1]
    return source if fewer_tokens and source.shape[1:] == parameter.shape[1:] else None


def _select_outside(
    value: Tensor, target: Tensor, teacher: Any, student: Any, parts: SelectedParts, name: str
) -> Tensor:
    """Select from a parameter that is not a layer's matrix: axes that differ are hidden channels or tokens."""
    for axis, (full, kept) in enumerate(zip(value.shape, target.shape, strict=True)):
        if full == kept:
            continue
        if (full, kept) == (teacher.hidden_size, student.hidden_size):
            value = value.index_select(axis, parts.channels)
        elif (full, kept) == (teacher.vocab_size, student.vocab_size):
            value = value.narrow(axis, 0, kept)
        elif full * student.num_hidden_layers == kept * teacher.num_hidden_layers:  # embeddings for each layer
            by_layer = value.unflatten(axis, (teacher.num_hidden_layers, -1))
            value = by_layer.index_select(axis, torch.tensor(parts.layers)).flatten(axis, axis + 1)
        else:
            raise ModelError(
                f"student.initialize: expected {name} of {student.model_type} to differ from the larger model's in "
                f"hidden channels or tokens alone, got {list(target.shape)} beside {list(value.shape)}. Change that "
                "field of student.design back."
            )
    return value
