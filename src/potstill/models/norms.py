"""Norms and scales of embeddings, which depend on all hidden channels, for a student that has only some of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from potstill.models.split import evaluation_mode, inputs, probe_batch, run, undisturbed
from potstill.models.structure import find_layer_list

TOLERANCE = 1e-2  # relative, of numbers that count as equal


class NormKind(NamedTuple):
    """How a norm scales its input x [..., H]: to (weight + offset) * x / sqrt(mean x^2)."""

    offset: float
    centred: bool  # x without its mean


@torch.no_grad()
def rescale_norms(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    names: Mapping[str, str],
    channels: Tensor,
    batches: Iterable[Mapping[str, Tensor]],
) -> dict[str, Tensor]:
    """Rescale the norms of a student that has only some of its teacher's hidden channels; return the new weights.

    A norm divides by the size of its input, of which the student has the channels C. Its scale s becomes

        s * mean_tokens sqrt(mean_C x^2 / mean x^2),   x without its mean for a norm that subtracts it,

    so that layers read numbers of the teacher's size: exactly the teacher's where the other channels are always zero.
    Where an architecture scales embeddings by the number of channels, as Gemma does, they keep their size, and so do
    the logits of a tied head.

    Args:
        names: the teacher's name of each parameter that the student takes from it
        channels: [C] the teacher's channels that the student has
    """
    kinds: dict[str, NormKind] = {}  # by the student's weight
    for name, of_teacher in names.items():
        parameters = student.get_parameter(name), teacher.get_parameter(of_teacher)
        if parameters[0].ndim == 1 and parameters[0].shape != parameters[1].shape and name.endswith(".weight"):
            kind = norm_kind(student.get_submodule(name.removesuffix(".weight")))
            if kind is not None:
                kinds[name] = kind
    paths = {name: names[name].removesuffix(".weight") for name in kinds}
    ratios = _ratios(teacher, {path: kinds[name].centred for name, path in paths.items()}, channels, batches)
    factors = {name: ratios[path] for name, path in paths.items()}
    weights = dict[str, Tensor]()
    change = _embedding_scale(teacher) / _embedding_scale(student)
    if abs(change - 1) > TOLERANCE:
        embeddings: Any = student.get_input_embeddings().weight
        head: Any = student.get_output_embeddings()
        weights[next(name for name, x in student.named_parameters() if x is embeddings)] = embeddings * change
        if head is not None and head.weight is embeddings:
            layers = find_layer_list(student)
            *_, last = (name for name in kinds if layers.locate(name) is None)
            factors[last] /= change
    for name, kind in kinds.items():
        weights[name] = (student.get_parameter(name) + kind.offset) * factors[name] - kind.offset
    return {name: weight.detach().cpu() for name, weight in weights.items()}


def norm_kind(module: nn.Module) -> NormKind | None:
    """Find out what a module with a weight for each channel does, by a probe; None for one that is no norm."""
    weight: Any = module.weight
    x = torch.arange(3 * len(weight), device=weight.device, dtype=weight.dtype).view(3, -1).sin() + 0.5
    scaled = (module(x) - module(-x)) / 2  # without a bias
    for centred in (False, True):
        part = x - x.mean(-1, keepdim=True) if centred else x
        unscaled = part / part.square().mean(-1, keepdim=True).sqrt()
        for offset in (0.0, 1.0):
            if torch.allclose(scaled, unscaled * (weight + offset), TOLERANCE, TOLERANCE):
                return NormKind(offset, centred)
    return None


def _ratios(
    teacher: PreTrainedModel, norms: Mapping[str, bool], channels: Tensor, batches: Iterable[Mapping[str, Tensor]]
) -> dict[str, float]:
    """The mean over tokens of the size of some channels of each norm's input over that of all.

    `norms` says of each module whether it subtracts the mean.
    """
    sums, tokens, mask = dict.fromkeys(norms, 0.0), 0, torch.ones(0)

    def add(path: str, centred: bool) -> Callable[..., None]:
        def hook(_: Any, args: tuple[Tensor, ...]) -> None:
            x = args[0].float()
            parts = [part - part.mean(-1, keepdim=True) if centred else part for part in (x[..., channels], x)]
            kept, whole = (part.square().mean(-1) for part in parts)
            ratio = (kept / whole.clamp_min(torch.finfo(torch.float32).tiny)).sqrt()
            sums[path] += float((ratio * mask.to(ratio.device)).sum())

        return hook

    with ExitStack() as hooks, evaluation_mode(teacher):
        for path, centred in norms.items():
            hooks.enter_context(teacher.get_submodule(path).register_forward_pre_hook(add(path, centred)))
        for batch in batches if norms else ():
            mask = batch["attention_mask"].float()
            tokens += int(mask.sum())
            run(teacher, inputs(batch, teacher.device))
    return {path: value / max(1, tokens) for path, value in sums.items()}


def _embedding_scale(model: Any) -> float:
    """Find the factor between a token's row and what the first layer reads; 1 where more happens between them."""
    batch, seen = probe_batch(model), []

    def record(_: Any, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        seen.append(args[0] if args else named["hidden_states"])

    with undisturbed(model), find_layer_list(model).layers[0].register_forward_pre_hook(record, with_kwargs=True):
        run(model, batch)
    rows = model.get_input_embeddings().weight[batch["input_ids"]]
    if seen[0].shape != rows.shape:  # a projection is between them, as in ELECTRA
        return 1.0
    scale = float((seen[0] * rows).sum().detach() / rows.square().sum().detach())
    return scale if torch.allclose(seen[0], scale * rows, TOLERANCE, TOLERANCE) else 1.0
