"""Dimensions of a teacher's hidden states that matter for a task, selected by gradient."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from potstill.losses.alignment import Task, align, attended_positions
from potstill.losses.hidden import dimension_importance, select_dimensions
from potstill.losses.token_losses import label_loss
from potstill.models.capture import ActivationCapture
from potstill.models.layer_map import layer_index
from potstill.models.split import forward_targets, undisturbed


def important_dimensions(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    layers: Sequence[int],
    count: int,
    task: Task = "causal",
) -> dict[int, Tensor]:
    """Select the dimensions of some layers on which the model's own loss depends most; see `dimension_importance`.

    Args:
        model: the teacher, with a head; it is left unchanged.
        batches: input_ids, attention_mask and labels of the task, on the model's device.
        layers: from 0; negative ones from the end.
        count: number of dimensions: the student's width.
        task: what the model is trained for.

    Returns:
        layer (from 0) -> [count] int64, ascending: `dimensions` of `potstill.Hidden`.

    Raises:
        ShapeError: a layer does not exist, or has fewer dimensions.

    References:
        Saadi and Wang 2025 (Flex-KD), arXiv 2507.10155.
    """
    capture = ActivationCapture(model)
    indices = [layer_index("teacher", layer, capture.shape.layers) for layer in layers]
    modules = {layer: capture.layer(layer) for layer in indices}
    sums = {layer: torch.zeros(capture.shape.width) for layer in modules}
    states: dict[int, Tensor] = {}

    def watch(layer: int) -> Any:
        def hook(_: nn.Module, inputs: Any, output: Any) -> Any:
            state = output[0] if isinstance(output, tuple) else output
            # The graph begins at the first of them, as the model's own weights may be frozen.
            states[layer] = state if state.requires_grad else state.detach().requires_grad_()
            return (states[layer], *output[1:]) if isinstance(output, tuple) else states[layer]

        return hook

    handles = [module.register_forward_hook(watch(layer)) for layer, module in modules.items()]
    try:
        with undisturbed(model), torch.enable_grad():
            for batch in batches:
                alignment = align(batch["labels"], task)
                loss = label_loss(forward_targets(model, None, batch, alignment).dense(), alignment.labels).sum()
                gradients = torch.autograd.grad(loss, [states[layer] for layer in modules])
                positions = attended_positions(batch, task)
                for layer, gradient in zip(modules, gradients, strict=True):
                    by_token = gradient[positions]
                    sums[layer] += dimension_importance(by_token).cpu() * len(by_token)
    finally:
        for handle in handles:
            handle.remove()
    return {layer: select_dimensions(total, count) for layer, total in sums.items()}
