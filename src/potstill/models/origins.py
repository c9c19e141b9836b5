"""Which of the teacher's layers, heads, units and channels a student is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from potstill.errors import ModelError
from potstill.models.importance import Importance
from potstill.models.shape import Shape

Spread = Literal["uniform", "skip", "first_last", "importance"]


@dataclass(frozen=True)
class Origins:
    """Where each part of a student comes from: indices into the teacher, rising.

    Args:
        layers: of each of the student's layers.
        channels: [H] of the hidden channels.
        heads: of each student layer, [A] of its query heads.
        kv_heads: of each student layer, [K, m]: a key or value head is the mean of m of the teacher's.
        units: of each student layer, [I] of its feed-forward units.
    """

    layers: tuple[int, ...]
    channels: Tensor
    heads: tuple[Tensor, ...]
    kv_heads: tuple[Tensor, ...]
    units: tuple[Tensor, ...]


def origins(teacher: Shape, student: Shape, layers: Sequence[int], importance: Importance | None) -> Origins:
    """The parts that a student is made of: the most important ones, or without scores the first ones.

    Args:
        teacher: the teacher's shape.
        student: the student's, nowhere larger.
        layers: the teacher's layer for each of the student's.
        importance: the scores.

    Raises:
        ModelError: the student is larger somewhere, its heads have another width, or its groups cannot be formed.
    """
    for name in ("layers", "hidden", "heads", "kv_heads", "ffn"):
        if getattr(student, name) > getattr(teacher, name):
            raise ModelError(
                f"student.initialize: expected a student no larger than its teacher, got {name} "
                f"{getattr(student, name)} above {getattr(teacher, name)}. Change student.design."
            )
    if student.head_size != teacher.head_size:
        raise ModelError(
            f"student.initialize: expected heads as wide as the teacher's, {teacher.head_size}, got "
            f"{student.head_size}. A head cannot be copied in part: its positions are rotated in pairs. Set head_dim, "
            "or the number of heads, so that they are."
        )

    def scores(name: str, layer: int, count: int) -> Tensor:
        return -torch.arange(count) if importance is None else getattr(importance, name)[layer]

    grouped = [_heads(scores("heads", layer, teacher.heads), teacher, student) for layer in layers]
    return Origins(
        layers=tuple(layers),
        channels=_top(-torch.arange(teacher.hidden) if importance is None else importance.channels, student.hidden),
        heads=tuple(heads for heads, _ in grouped),
        kv_heads=tuple(kv_heads for _, kv_heads in grouped),
        units=tuple(_top(scores("units", layer, teacher.ffn), student.ffn) for layer in layers),
    )


def spread(how: Spread | Sequence[int], teacher: int, student: int, importance: Importance | None) -> list[int]:
    """The teacher's layer for each of the student's.

    Args:
        how: uniform (evenly, the first and the last among them), skip (every n-th from the first on), first_last (the
            first half and the last half), importance (those with the most block influence), or the layers themselves.
        teacher: number of layers.
        student: number of layers, no more.
        importance: for `importance`.

    Raises:
        ModelError: the layers given are not as many as the student's, rising, and among the teacher's.

    >>> spread("uniform", 12, 4, None), spread("skip", 12, 4, None), spread("first_last", 12, 4, None)
    ([0, 4, 7, 11], [0, 3, 6, 9], [0, 1, 10, 11])
    """
    if student > teacher:
        raise ModelError(f"student.initialize: expected at most the teacher's {teacher} layers, got {student}.")
    if how == "uniform":
        return [(2 * i * (teacher - 1) + student - 1) // (2 * max(student - 1, 1)) for i in range(student)]
    if how == "skip":
        return [i * teacher // student for i in range(student)]
    if how == "first_last":
        return [*range((student + 1) // 2), *range(teacher - student // 2, teacher)]
    if how == "importance":
        assert importance is not None, "block influence is measured"
        return [int(layer) for layer in _top(importance.layers, student)]
    if isinstance(how, str):
        raise ModelError(f"student.initialize.layers: expected {', '.join(get_args(Spread))} or numbers, got {how}.")
    if len(how) != student or [*how] != sorted({*how}) or not all(0 <= layer < teacher for layer in how):
        raise ModelError(
            f"student.initialize.layers: expected {student} rising numbers in 0..{teacher - 1}, got {[*how]}. One for "
            "each of the student's layers."
        )
    return [*how]


def _top(scores: Tensor, count: int) -> Tensor:
    """The indices of the largest scores, rising."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def _heads(scores: Tensor, teacher: Shape, student: Shape) -> tuple[Tensor, Tensor]:
    """The query heads [A] and the key and value heads [K, m] that each of them keeps with it.

    A key or value head stays with query heads of its own group. Where a student's groups are larger than the
    teacher's, a few of the teacher's become one whose key and value head is their mean.
    """
    whole, group = teacher.heads // teacher.kv_heads, student.heads // student.kv_heads
    merged = -(-group // whole)  # how many of the teacher's groups make one of the student's
    if merged * student.kv_heads > teacher.kv_heads:
        raise ModelError(
            f"student.initialize: expected groups that the teacher's {teacher.heads} heads over {teacher.kv_heads} key "
            f"and value heads can form, got {student.heads} over {student.kv_heads}. Change num_key_value_heads."
        )
    by_group = scores.view(teacher.kv_heads, whole)
    strongest = by_group.sort(1, descending=True).values[:, : min(group, whole)].sum(1)
    kv_heads = _top(strongest, merged * student.kv_heads).view(student.kv_heads, merged)
    heads = []
    for sources in kv_heads:
        members = (sources[:, None] * whole + torch.arange(whole)).flatten()
        heads.append(members[_top(scores[members], group)])
    return torch.cat(heads), kv_heads
