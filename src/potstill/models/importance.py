"""How much each layer, head, unit and channel of a model does, measured on a few batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from potstill.models.anatomy import anatomy_of


@dataclass(frozen=True)
class Importance:
    """Scores, larger for what does more. Only those of one tensor's last axis can be compared.

    Args:
        layers: [L] block influence, 1 - E cos(x_in, x_out) of the hidden states before and after the layer.
        heads: [L, A] the norm of what each query head says.
        units: [L, I] the size of each feed-forward unit.
        channels: [H] the size of each hidden channel where layers read it, after their norm; over all layers.
    """

    layers: Tensor
    heads: Tensor
    units: Tensor
    channels: Tensor


@dataclass
class _Sums:
    """Of every row its mean over tokens, squared and added up over rows."""

    squares: dict[Any, Tensor] = field(default_factory=dict)
    distance: dict[int, float] = field(default_factory=dict)
    tokens: float = 0.0
    mask: Tensor = field(default_factory=lambda: torch.ones(0))

    def add(self, key: Any, sizes: Tensor) -> None:
        """Add sizes [B, T, n], all >= 0."""
        mask = self.mask.to(sizes.device).unsqueeze(-1)
        means = (sizes.double() * mask).sum(1) / mask.sum(1).clamp_min(1)
        self.squares[key] = self.squares.get(key, 0) + (means**2).sum(0).cpu()


@torch.no_grad()
def importance_of(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]) -> Importance:
    """Measure importance by activations, in forward passes alone.

    A score is the L2 norm over rows of the mean absolute activation over tokens:

        sqrt(sum_rows (mean_tokens |a|)^2),   for a head |a| is the L2 norm of its output

    Args:
        model: whose parts are scored; left as it was.
        batches: input_ids and attention_mask, [B, T] each.

    References:
        Muralidharan et al. 2024 (Minitron), arXiv 2407.14679, section 2.2; Men et al. 2024 (ShortGPT), arXiv
        2403.03853, for block influence.
    """
    anatomy, sums, handles = anatomy_of(model), _Sums(), []
    shape, parts = anatomy.shape, anatomy.parts

    def before(key: Any, size: Callable[[Tensor], Tensor]) -> Callable[[Any, tuple[Tensor, ...]], None]:
        return lambda _, inputs: sums.add(key, size(inputs[0].float()))

    def by_head(said: Tensor) -> Tensor:
        return said.unflatten(-1, (shape.heads, shape.head_size)).norm(dim=-1)

    def influence(number: int) -> Callable[..., None]:
        def hook(_: Any, inputs: tuple[Tensor, ...], named: dict[str, Tensor], made: Any) -> None:
            x_in = inputs[0] if inputs else named["hidden_states"]
            x_out = made if isinstance(made, Tensor) else made[0]
            cosine = torch.cosine_similarity(x_in.double(), x_out.double(), dim=-1)
            distance = float(((1 - cosine) * sums.mask.to(cosine.device)).sum())
            sums.distance[number] = sums.distance.get(number, 0.0) + distance

        return hook

    for number, layer in enumerate(anatomy.layers):
        handles.append(layer.register_forward_hook(influence(number), with_kwargs=True))
        for path, key, size in (
            (parts.output, ("heads", number), by_head),
            (parts.down, ("units", number), torch.abs),
            (parts.query, "channels", torch.abs),
            (parts.up[0], "channels", torch.abs),
        ):
            handles.append(layer.get_submodule(path).register_forward_pre_hook(before(key, size)))
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        for batch in batches:
            sums.mask = batch["attention_mask"].double()
            sums.tokens += float(sums.mask.sum())
            model(input_ids=batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device))
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
    numbers = range(shape.layers)
    return Importance(
        layers=torch.tensor([sums.distance[number] / sums.tokens for number in numbers], dtype=torch.float64),
        heads=torch.stack([sums.squares["heads", number].sqrt() for number in numbers]),
        units=torch.stack([sums.squares["units", number].sqrt() for number in numbers]),
        channels=sums.squares["channels"].sqrt(),
    )
