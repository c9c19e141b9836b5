"""Dimensions of a teacher's hidden states that matter for a task, selected by gradient."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from potstill.losses.alignment import Task, align, attended_positions
from potstill.losses.hidden import dimension_importance, select_dimensions
from potstill.losses.token_losses import label_loss
from potstill.models.capture import ActivationCapture, ActivationRequest
from potstill.models.layer_map import Layer, layer_index
from potstill.models.split import forward_targets, undisturbed


def important_dimensions(
    model: Any,
    batches: Iterable[Mapping[str, Tensor]],
    layers: Sequence[Layer],
    count: int,
    task: Task = "causal",
) -> dict[Layer, Tensor]:
    """Select the dimensions of some layers on which the model's own loss depends most; see `dimension_importance`.

    Args:
        model: the teacher, with a head; it is left unchanged.
        batches: input_ids, attention_mask and labels of the task, on the model's device.
        layers: from 0; negative ones from the end; or a `potstill.models.layer_map.State`.
        count: the student's width.

    Returns:
        layer -> [count] int64, ascending: `dimensions` of `potstill.Hidden`.

    Raises:
        ShapeError: a layer does not exist, or has fewer dimensions.

    References:
        Saadi and Wang 2025 (Flex-KD), arXiv 2507.10155.
    """
    capture = ActivationCapture(model)
    indices = [layer_index("teacher", layer, capture.shape.layers) for layer in layers]
    request = ActivationRequest(hidden=frozenset(indices))
    sums = {layer: torch.zeros(capture.shape.width) for layer in indices}

    def begin_graph(_: nn.Module, inputs: Any, output: Tensor) -> Tensor:  # the model's own weights may be frozen
        return output.requires_grad_()

    handle = model.get_input_embeddings().register_forward_hook(begin_graph)
    try:
        with undisturbed(model), torch.enable_grad():
            for batch in batches:
                alignment = align(batch["labels"], task)
                forward = partial(forward_targets, model, None, batch, alignment)
                targets, activations = capture.capture(request, forward)
                loss = label_loss(targets.dense(), alignment.labels).sum()
                gradients = torch.autograd.grad(loss, list(activations.hidden.values()))
                for layer, gradient in zip(activations.hidden, gradients, strict=True):
                    by_token = gradient[attended_positions(batch, task)]
                    sums[layer] += dimension_importance(by_token).cpu() * len(by_token)
    finally:
        handle.remove()
    return {layer: select_dimensions(total, count) for layer, total in sums.items()}
