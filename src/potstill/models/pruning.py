"""Measure how important a teacher's layers, heads, units and channels are, and select those that a student keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from potstill.errors import ModelError
from potstill.losses.token_losses import on_float64_device
from potstill.models.expert_importance import BlockImportance, BlockMeasurement
from potstill.models.feed_forward import Mixture, find_mixture
from potstill.models.shapes import DesignShape
from potstill.models.spacing import evenly_spaced
from potstill.models.split import evaluation_mode
from potstill.models.structure import find_structure

Batches = Iterable[Mapping[str, Tensor]]
LayerChoice = Literal["grouped", "importance", "uniform", "skip", "first_last"]


@dataclass(frozen=True)
class Importance:
    """Importance scores; only those along one tensor's last axis are comparable."""

    layers: Tensor  # [L] block influence, 1 - E cos(x_in, x_out) of the hidden states before and after the layer
    heads: Tensor  # [L, A] the norm of each query head's output
    units: Tensor  # [L, I] the size of each feed-forward unit
    channels: Tensor  # [H] the size of each hidden channel where layers read it, after their norm; over all layers
    blocks: tuple[BlockImportance | None, ...] = ()  # of a mixture of experts, by layer, in place of `units`


class _BlockInfluence:
    """Measures how far each layer turns the hidden states, [L]; see `measure_importance`."""

    def __init__(self, name: str, layers: Iterable[nn.Module], hooks: ExitStack) -> None:
        self.name = name  # of the model, for errors
        self.sums: list[float] = []
        self.tokens, self.mask = 0.0, torch.ones(0)
        for number, layer in enumerate(layers):
            self.sums.append(0.0)
            hooks.enter_context(layer.register_forward_hook(partial(self._add, number), with_kwargs=True))

    def begin(self, mask: Tensor) -> None:
        """Note the positions [B, T] of the next batch that hold tokens, in float64."""
        self.mask = mask
        self.tokens += float(mask.sum())

    def _add(self, layer: int, _: Any, inputs: tuple[Tensor, ...], named: dict[str, Tensor], output: Any) -> None:
        before = inputs[0] if inputs else named["hidden_states"]
        after = output if isinstance(output, Tensor) else output[0]
        before, after = (on_float64_device(states).double() for states in (before, after))
        cosine = torch.cosine_similarity(before, after, dim=-1)
        if cosine.shape != self.mask.shape:
            raise ModelError(
                f"student.initialize: expected one hidden state for each token, got {self.name}, whose layers have "
                "others. Copy evenly spaced layers (method: copy, layers: uniform), or begin with random weights."
            )
        self.sums[layer] += float(((1 - cosine) * self.mask.to(cosine.device)).sum())

    @property
    def scores(self) -> Tensor:
        if not self.tokens:
            raise ModelError(
                "student.initialize: expected text to choose layers by, got none. Give batches of it (calibration), or "
                "copy evenly spaced layers (layers: uniform)."
            )
        return torch.tensor([total / self.tokens for total in self.sums], dtype=torch.float64)


@torch.no_grad()
def measure_influence(model: PreTrainedModel, layers: Iterable[nn.Module], batches: Batches) -> Tensor:
    """Measure the block influence [L] of layers alone; arguments as `measure_importance`."""
    with ExitStack() as hooks, evaluation_mode(model):
        influence = _BlockInfluence(type(model).__name__, layers, hooks)
        for batch in batches:
            influence.begin(batch["attention_mask"].double())
            _run(model, batch)
    return influence.scores


@torch.no_grad()
def measure_importance(model: PreTrainedModel, batches: Batches) -> Importance:
    """Measure importance by activations, in forward passes alone.

    A score is the L2 norm over rows of the mean absolute activation over tokens:

        sqrt(sum_rows (mean_tokens |a|)^2),   for a head |a| is the L2 norm of its output

    `batches` have input_ids and attention_mask, [B, T] each.

    References:
        Muralidharan et al. 2024 (Minitron), arXiv 2407.14679, section 2.2; Men et al. 2024 (ShortGPT), arXiv
        2403.03853, for block influence.
    """
    structure = find_mixture(model) or find_structure(model)
    shape = structure.shape
    squares: dict[Any, Any] = {}  # by activation: the sum over rows of squared means over tokens

    def add_inputs(key: Any, size: Callable[[Tensor], Tensor]) -> Callable[[Any, tuple[Tensor, ...]], None]:
        def hook(_: Any, inputs: tuple[Tensor, ...]) -> None:
            sizes = on_float64_device(size(inputs[0].float())).double()
            row_mask = influence.mask.to(sizes.device).unsqueeze(-1)
            means = (sizes * row_mask).sum(1) / row_mask.sum(1).clamp_min(1)
            squares[key] = squares.get(key, 0) + (means**2).sum(0).cpu()

        return hook

    def head_norms(x: Tensor) -> Tensor:
        return x.unflatten(-1, (shape.heads, shape.head_size)).norm(dim=-1)

    blocks: list[BlockMeasurement | None] = []
    if isinstance(structure, Mixture):
        layers = zip(structure.layers, structure.blocks, strict=True)
        name = type(model).__name__
        blocks = [None if block is None else BlockMeasurement(layer, block, name) for layer, block in layers]

    def sizes(number: int) -> Iterator[tuple[str, Any, Callable[[Tensor], Tensor]]]:
        """The modules of a layer whose inputs are measured, the keys of their sums, and the sizes."""
        if isinstance(structure, Mixture):
            block = structure.blocks[number]
            attention, reads_channels = structure.attention, "" if block is None else block.path
        else:
            attention, reads_channels = structure.matrices, structure.matrices.up[0]
            yield structure.matrices.down, ("units", number), torch.abs
        if attention is not None:
            yield attention.output, ("heads", number), head_norms
            yield attention.query, "channels", torch.abs
        if reads_channels:
            yield reads_channels, "channels", torch.abs

    with ExitStack() as hooks, evaluation_mode(model):
        influence = _BlockInfluence(type(model).__name__, structure.layers, hooks)
        for block in filter(None, blocks):
            hooks.enter_context(block.hooks(lambda: influence.mask))
        for number, layer in enumerate(structure.layers):
            for path, key, size in sizes(number):
                hooks.enter_context(layer.get_submodule(path).register_forward_pre_hook(add_inputs(key, size)))
        for batch in batches:
            influence.begin(batch["attention_mask"].double())
            _run(model, batch)

    def stacked(kind: str) -> Tensor:
        by_layer = [squares[kind, number].sqrt() for number in range(shape.layers) if (kind, number) in squares]
        return torch.stack(by_layer) if by_layer else torch.zeros(shape.layers, 0)

    return Importance(
        layers=influence.scores,
        heads=stacked("heads"),
        units=stacked("units"),
        channels=squares["channels"].sqrt(),
        blocks=tuple(None if block is None else block.result() for block in blocks),
    )


def _run(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> None:
    model.base_model(**{name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")})


@dataclass(frozen=True)
class SelectedParts:
    """The teacher's parts that a student is made of, as rising indices; all but channels by student layer.

    Heads and units are empty where layers are copied as they are.
    """

    layers: tuple[int, ...]
    channels: Tensor  # [H]
    heads: tuple[Tensor, ...]  # [A] query heads
    kv_heads: tuple[Tensor, ...]  # [K, m]: a key or value head is the mean of m of the teacher's
    units: tuple[Tensor, ...]  # [I] feed-forward units
    matching: bool = False  # of these, only parameters of the student's shape
    blocks: tuple[
        BlockImportance | None, ...
    ] = ()  # of a mixture of experts, by which its units and experts are chosen
    merge: bool = False  # experts that are alike into one, in place of leaving the least important out


def whole_layers(teacher: DesignShape, layers: Sequence[int], *, matching: bool = False) -> SelectedParts:
    """Select complete layers, in all the teacher's widths, or their parameters of the student's shape."""
    return SelectedParts(tuple(layers), torch.arange(teacher.hidden), (), (), (), matching)


def select_parts(
    teacher: DesignShape, student: DesignShape, layers: Sequence[int], importance: Importance | None
) -> SelectedParts:
    """Select the parts that a student is made of: the most important ones, or without scores the first ones.

    `layers` is the teacher's layer for each of the student's.
    """
    for name in ("layers", "hidden", "heads", "kv_heads", "ffn"):
        if (size := getattr(student, name)) > (most := getattr(teacher, name)):
            raise ModelError(
                f"student.initialize: expected a student no larger than what it is cut from, got {name} {size} above "
                f"{most}. Change student.design."
            )
    if student.head_size != teacher.head_size:
        raise ModelError(
            f"student.initialize: expected heads as wide as the larger model's, {teacher.head_size}, got "
            f"{student.head_size}. Set head_dim or the number of heads: rotary embeddings rotate a head as a unit."
        )
    if importance is None:
        heads, units = (-torch.arange(x).expand(teacher.layers, -1) for x in (teacher.heads, teacher.ffn))
        importance = Importance(-torch.arange(teacher.layers), heads, units, -torch.arange(teacher.hidden))
    selected = [_select_heads(importance.heads[layer], teacher, student) for layer in layers]
    return SelectedParts(
        layers=tuple(layers),
        channels=top(importance.channels, student.hidden),
        heads=tuple(query for query, _ in selected),
        kv_heads=tuple(kv for _, kv in selected),
        units=tuple(top(importance.units[layer], student.ffn) for layer in layers),
    )


def choose_layers(
    choice: LayerChoice | Sequence[int], teacher: int, student: int, influence: Tensor | None
) -> list[int]:
    """Choose the teacher's layer for each of the student's, of two numbers of layers.

    The choice is grouped (in each group of neighbours those of most influence, so that the cuts are spread), importance
    (those of most influence), uniform (evenly spaced, with the first and the last), skip (every n-th from the first
    on), first_last (the first half and the last half), or the layers themselves. `influence` is the block influence
    [L], which grouped and importance need.

    >>> choose_layers("uniform", 12, 4, None), choose_layers("skip", 12, 4, None)
    ([0, 4, 7, 11], [0, 3, 6, 9])
    >>> choose_layers("first_last", 12, 4, None)
    [0, 1, 10, 11]
    """
    if student > teacher:
        raise ModelError(f"student.initialize: expected at most the larger model's {teacher} layers, got {student}.")
    if student == teacher and isinstance(choice, str):
        return [*range(teacher)]
    if choice == "uniform":
        return [(2 * i * (teacher - 1) + student - 1) // (2 * max(student - 1, 1)) for i in range(student)]
    if choice == "skip":
        return evenly_spaced(student, teacher)
    if choice == "first_last":
        return [*range((student + 1) // 2), *range(teacher - student // 2, teacher)]
    if choice in ("grouped", "importance"):
        assert influence is not None, "it is measured"
        return [int(layer) for layer in (top if choice == "importance" else _top_of_groups)(influence, student)]
    if isinstance(choice, str):
        choices = ", ".join(get_args(LayerChoice))
        raise ModelError(f"student.initialize.layers: expected {choices} or numbers, got {choice}.")
    if len(choice) != student or [*choice] != sorted({*choice}) or not all(0 <= layer < teacher for layer in choice):
        raise ModelError(
            f"student.initialize.layers: expected {student} rising numbers in 0..{teacher - 1}, got {[*choice]}. Give "
            "one for each of the student's layers."
        )
    return [*choice]


def top(scores: Tensor, count: int) -> Tensor:
    """The indices of the largest scores, rising."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def _top_of_groups(scores: Tensor, count: int) -> Tensor:
    """The indices of the largest score of each group of neighbours, or of all but its smallest one; rising."""
    total = len(scores)
    cut = total - count
    if cut < count:  # one of each group goes, and none where there is no group
        groups = torch.arange(total).tensor_split(cut) if cut else ()
        gone = [int(group[scores[group].argmin()]) for group in groups]
        return torch.tensor([index for index in range(total) if index not in gone])
    return torch.stack([group[scores[group].argmax()] for group in torch.arange(total).tensor_split(count)])


def _select_heads(scores: Tensor, teacher: DesignShape, student: DesignShape) -> tuple[Tensor, Tensor]:
    """Select query heads [A], and the key and value heads [K, m] of their groups.

    A key or value head keeps query heads of its own group. Where a student's groups are larger than the teacher's,
    several of the teacher's are merged into one, whose key and value head is their mean.
    """
    teacher_group, group = teacher.heads // teacher.kv_heads, student.heads // student.kv_heads
    merged = -(-group // teacher_group)  # how many of the teacher's groups make one of the student's
    if merged * student.kv_heads > teacher.kv_heads:
        raise ModelError(
            f"student.initialize: expected groups that the larger model's {teacher.heads} heads over "
            f"{teacher.kv_heads} key and value heads can form, got {student.heads} over "
            f"{student.kv_heads}. Change num_key_value_heads."
        )
    by_group = scores.view(teacher.kv_heads, teacher_group)
    strongest = by_group.sort(1, descending=True).values[:, : min(group, teacher_group)].sum(1)
    kv_heads = top(strongest, merged * student.kv_heads).view(student.kv_heads, merged)
    heads = []
    for sources in kv_heads:
        members = (sources[:, None] * teacher_group + torch.arange(teacher_group)).flatten()
        heads.append(members[top(scores[members], group)])
    return torch.cat(heads), kv_heads
