"""The first weights of a student: random, or the teacher's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, set_seed
from transformers.pytorch_utils import Conv1D

from potstill.errors import ModelError
from potstill.models.anatomy import Anatomy, anatomy_of
from potstill.models.importance import importance_of
from potstill.models.origins import Origins, Spread, origins, spread
from potstill.models.shape import shape_of
from potstill.models.size import build

Method = Literal["copy", "truncate", "prune"]
BY_LAYER = ("layer_types", "no_rope_layers")  # what configs list for each layer


def random_student(config: PretrainedConfig, seed: int) -> PreTrainedModel:
    """A student with the random weights of its own initialisation: the same for the same seed.

    Args:
        config: the student's config.
        seed: of all random numbers, Python's, NumPy's and torch's.

    Returns:
        A language model in float32.

    Raises:
        ModelError: no model can be made from the config.
    """
    set_seed(seed)
    return build(config)


@dataclass(frozen=True)
class Start:
    """How a student begins with its teacher's weights.

    Args:
        config: the student's config; what it lists by layer is that of the chosen layers.
        origins: which of the teacher's parts it is made of.
        notes: what was chosen, for the run's notes.
    """

    config: PretrainedConfig
    origins: Origins
    notes: tuple[str, ...]

    def student(self, teacher: PreTrainedModel, seed: int) -> PreTrainedModel:
        """The student, in float32.

        Args:
            teacher: the model that was chosen from.
            seed: of what the teacher does not have.
        """
        student = random_student(self.config, seed)
        _copy(teacher, student, self.origins)
        return student


def start(
    teacher: PreTrainedModel,
    config: PretrainedConfig,
    method: Method,
    *,
    layers: Spread | Sequence[int] | None = None,
    calibration: Callable[[], Iterable[Mapping[str, Tensor]]],
) -> Start:
    """Choose what a student takes over from its teacher.

    A student of the teacher's shape is the teacher; one with fewer layers computes what the teacher computes without
    the others.

    Args:
        teacher: of the same family as the student.
        config: the student's; nowhere larger than the teacher's.
        method: copy (whole layers; all widths are the teacher's), truncate (the first heads, units and channels), or
            prune (the most important ones, by activations).
        layers: see `spread`; default: importance for prune, else uniform.
        calibration: gives batches of training data, where importance is measured.

    Raises:
        ModelError: the student does not fit into the teacher, or the architecture is not known.

    References:
        Muralidharan et al. 2024 (Minitron), arXiv 2407.14679; Sanh et al. 2019 (DistilBERT), arXiv 1910.01108, for
        copied layers.
    """
    if method not in get_args(Method):
        raise ModelError(f"student.initialize: expected {', '.join(get_args(Method))}, got {method}.")
    if type(config) is not type(teacher.config):
        raise ModelError(
            f"student.initialize: expected a student of the teacher's {type(teacher.config).__name__}, got "
            f"{type(config).__name__}."
        )
    anatomy, shape = anatomy_of(teacher), shape_of(config)
    if method == "copy" and shape != (same := replace(anatomy.shape, layers=shape.layers)):
        raise ModelError(
            f"student.initialize: expected the teacher's widths to copy layers, {same}, got {shape}. Change "
            "num_hidden_layers alone, or use truncate or prune."
        )
    how = ("importance" if method == "prune" else "uniform") if layers is None else layers
    measured = importance_of(teacher, calibration()) if method == "prune" or how == "importance" else None
    chosen = spread(how, anatomy.shape.layers, shape.layers, measured)
    made = origins(anatomy.shape, shape, chosen, measured if method == "prune" else None)
    by_layer = copy.deepcopy(config)
    for name in BY_LAYER:
        if isinstance(values := getattr(teacher.config, name, None), list):
            setattr(by_layer, name, [values[layer] for layer in chosen])
    return Start(by_layer, made, _notes(teacher, anatomy, by_layer, method, how, made))


def _notes(
    teacher: PreTrainedModel, anatomy: Anatomy, config: PretrainedConfig, method: str, how: Any, made: Origins
) -> tuple[str, ...]:
    """What was copied, in words."""
    whole, shape = anatomy.shape, shape_of(config)
    by = how if isinstance(how, str) else "as given"
    widths = [
        f"{mine} of {of} {name}"
        for name, mine, of in (
            ("channels", shape.hidden, whole.hidden),
            ("heads", shape.heads, whole.heads),
            ("key and value heads", shape.kv_heads, whole.kv_heads),
            ("feed-forward units", shape.ffn, whole.ffn),
        )
        if mine != of
    ]
    notes = [
        f"student: the teacher's layers {', '.join(map(str, made.layers))} of {whole.layers} ({by}), "
        + (f"{', '.join(widths)} ({'the most active' if method == 'prune' else 'the first'})." if widths else "whole.")
    ]
    if made.kv_heads and made.kv_heads[0].shape[1] > 1:
        notes.append(f"student: each key and value head is the mean of {made.kv_heads[0].shape[1]} of the teacher's.")
    if config.vocab_size != teacher.config.vocab_size:
        notes.append(f"student: the first {config.vocab_size} of the teacher's {teacher.config.vocab_size} token rows.")
    skeleton = build(config, "meta")
    own = [name for name, _ in skeleton.named_parameters() if _source(teacher, anatomy, name, made) is None]
    if own:
        notes.append(f"student: not in the teacher, and random: {', '.join(own)}.")
    if config.tie_word_embeddings and not teacher.config.tie_word_embeddings:
        notes.append("student: its head is its embedding (tied); the teacher's own head is not copied.")
    return tuple(notes)


def _source(teacher: PreTrainedModel, anatomy: Anatomy, name: str, made: Origins) -> Tensor | None:
    """The teacher's parameter that a student's comes from."""
    place = anatomy.locate(name)
    if place is not None:
        rest = name.removeprefix(f"{anatomy.path}.{place[0]}")
        name = f"{anatomy.path}.{made.layers[place[0]]}{rest}"
    try:
        return teacher.get_parameter(name)
    except AttributeError:
        return None


@torch.no_grad()
def _copy(teacher: PreTrainedModel, student: PreTrainedModel, made: Origins) -> None:
    """Fill a student's parameters from the teacher's, in place."""
    anatomy = anatomy_of(teacher)
    for name, parameter in student.named_parameters():
        source = _source(teacher, anatomy, name, made)
        if source is None:
            continue
        value = source.detach().to("cpu", torch.float32)
        module = student.get_submodule(name.rpartition(".")[0])
        place = anatomy.locate(name)
        axes = None if place is None else _axes(anatomy, made, *place)
        if axes is None:
            value = _as_wide(value, parameter, teacher.config, student.config, made, name)
        else:
            turned = isinstance(module, Conv1D) and value.ndim == 2
            value = value.T if turned else value
            value = _rows(value, axes[0])
            value = value if value.ndim == 1 else value.index_select(1, axes[1])
            value = value.T if turned else value
        parameter.copy_(value)


def _axes(anatomy: Anatomy, made: Origins, layer: int, path: str) -> tuple[Tensor, Tensor] | None:
    """The teacher's rows [out, m] (their mean is taken over m) and columns [in] of a matrix; None for other modules."""
    parts, size, channels = anatomy.parts, anatomy.shape.head_size, made.channels
    heads, kv_heads, units = made.heads[layer], made.kv_heads[layer], made.units[layer]
    queries, keys = _wide(heads.unsqueeze(1), size), _wide(kv_heads, size)
    if path == parts.output:
        return channels.unsqueeze(1), queries.squeeze(1)
    if path == parts.down:
        return channels.unsqueeze(1), units
    if path in parts.up:
        return units.unsqueeze(1), channels
    if path == parts.query and parts.fused:
        width = anatomy.shape.heads * size
        return torch.cat([queries, keys + width, keys + 2 * width]), channels
    if path == parts.query:
        return queries, channels
    if path in (parts.key, parts.value):
        return keys, channels
    return None


def _wide(heads: Tensor, size: int) -> Tensor:
    """The rows [n * size, m] of heads [n, m]."""
    return (heads.unsqueeze(1) * size + torch.arange(size)[None, :, None]).flatten(0, 1)


def _rows(value: Tensor, rows: Tensor) -> Tensor:
    """The mean of the rows that each [out, m] names; of one row exactly that row."""
    chosen = value[rows]
    return chosen.squeeze(1) if rows.shape[1] == 1 else chosen.mean(1)


def _as_wide(value: Tensor, like: Tensor, teacher: Any, student: Any, made: Origins, name: str) -> Tensor:
    """What is outside of the matrices of layers: axes that differ are hidden channels, or tokens."""
    for axis, (whole, part) in enumerate(zip(value.shape, like.shape, strict=True)):
        if whole == part:
            continue
        if (whole, part) == (teacher.hidden_size, student.hidden_size):
            value = value.index_select(axis, made.channels)
        elif (whole, part) == (teacher.vocab_size, student.vocab_size):
            value = value.narrow(axis, 0, part)
        else:
            raise ModelError(
                f"student.initialize: expected {name} to differ from the teacher's in hidden channels or tokens alone, "
                f"got {list(like.shape)} beside {list(value.shape)}. Change that field of student.design back."
            )
    return value
