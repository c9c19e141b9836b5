"""Fill a student's feed-forward networks from a mixture of experts: fewer experts, or one network in their place."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from potstill.errors import ModelError
from potstill.models.expert_importance import TINY, BlockImportance
from potstill.models.feed_forward import (
    ExpertBlock,
    Network,
    Units,
    averaged,
    find_feed_forward,
    joined,
    read_experts,
    read_network,
    write_experts,
    write_network,
)
from potstill.models.placement import weight_in_memory
from potstill.models.pruning import top
from potstill.models.shapes import text_config

WHERE = "student.initialize: expected"


class BlockSource:
    """A feed-forward network or a block of experts of the teacher's layer, and its importance."""

    def __init__(
        self, teacher: nn.Module, path: str, block: ExpertBlock | Network, importance: BlockImportance, channels: Tensor
    ) -> None:
        self.teacher, self.path, self.block = teacher, path, block
        self.importance, self.channels = importance, channels
        networks = read_experts(teacher, path, block) if isinstance(block, ExpertBlock) else []
        shared = block.shared if isinstance(block, ExpertBlock) else block
        networks += [] if shared is None else [read_network(teacher, path, shared)]
        self.networks = [network.on_channels(channels) for network in networks]
        self.experts = len(importance.experts)

    def fill(self, layer: nn.Module, config: Any, merge: bool) -> None:
        """Fill the student's layer; `config` is its model's."""
        target = find_feed_forward(layer)
        if isinstance(target, Network):
            kept = self.one_of(range(len(self.networks)), _width(layer, target))
            write_network(layer, target, kept)
            return
        if not isinstance(target, ExpertBlock) or not isinstance(self.block, ExpertBlock):
            raise ModelError(
                f"{WHERE} a layer with experts for one with experts, got {self.path} without. Choose others."
            )
        if target.shared is not None and self.block.shared is None:
            raise ModelError(f"{WHERE} a student without a shared expert, got one. The larger model has none.")
        number, width = network_sizes(layer)
        if number > self.experts:
            raise ModelError(f"{WHERE} at most the larger model's {self.experts} experts, got {number}.")
        if number == 1:
            routed = range(self.experts if target.shared is not None else len(self.networks))
            kept = self.one_of(routed, width)
            write_experts(layer, target, [kept.scaled(scale := 1 / _constant_weight(layer, target), scale)])
            rows = torch.zeros(1, self.experts, dtype=torch.float64)
        else:
            rows = self._groups(number, config, merge)
            write_experts(layer, target, [self._merged(rows[i], rows, width) for i in range(number)])
        self._fill_router(layer, target, rows)
        if target.shared is not None and self.block.shared is not None:
            kept = self.networks[self.experts].take(self._most([self.experts], _width(layer, target.shared)))
            write_network(layer, target.shared, kept)

    def one_of(self, networks: Sequence[int], width: int) -> Units:
        """Make one network of the units that add most, whose outputs are scaled by the weight of their network.

        A unit of an expert acts on the tokens alone that are sent to it, w a; in one network it acts on all. The scale
        E w a^2 / E a^2 has the least squared error of a unit by itself. It is w where that is constant, and those of
        an expert and its copies add up to the sum of their weights.
        """
        if isinstance(self.block, Network):  # a layer without experts may be narrower
            return self.networks[0].take(top(self._scores(networks), width))
        units = self._most(networks, width)
        scaled = [self.networks[i].scaled(self._scales(i), float(self.importance.weights[i])) for i in networks]
        return joined(scaled).take(units)

    def _most(self, networks: Sequence[int], width: int) -> Tensor:
        """The indices of the units of some networks, one after the other, that add most."""
        if width > (most := sum(len(self.networks[i]) for i in networks)):
            raise ModelError(f"{WHERE} at most the larger model's {most} feed-forward units, got {width}.")
        return top(self._scores(networks), width)

    def _scales(self, network: int) -> Tensor:
        return self.importance.scales[network].float()[:, None]

    def _scores(self, networks: Sequence[int]) -> Tensor:
        """The scores of the units of some networks, one after the other."""
        return torch.cat([self.importance.units[i] for i in networks])

    def _groups(self, number: int, config: Any, merge: bool) -> Tensor:
        """The shares [E', E] of the teacher's experts in each of the student's.

        A router that chooses groups of experts first (n_group) keeps them: each has as many experts fewer.
        """
        own = text_config(self.teacher.config)
        parts = getattr(own, "n_group", None) or 1
        parts = parts if parts == (getattr(config, "n_group", None) or 1) else 1
        if parts > 1 and (number % parts or number < 2 * parts):
            raise ModelError(
                f"{WHERE} a multiple of the router's {parts} groups of experts, at least 2 in each, got {number}."
            )
        shares = torch.zeros(number, self.experts, dtype=torch.float64)
        for part in range(parts):
            rows = slice(part * number // parts, (part + 1) * number // parts)
            experts = slice(part * self.experts // parts, (part + 1) * self.experts // parts)
            sizes = self.importance.experts[experts]
            if merge:
                weights, products = self.importance.weights[experts], self.importance.products[experts, experts]
                shares[rows, experts] = merged_shares(weights, products, number // parts)
            else:
                shares[rows, experts] = torch.eye(len(sizes)).double()[top(sizes, number // parts)]
        return shares

    def _merged(self, shares: Tensor, all_shares: Tensor, width: int) -> Units:
        """Make one expert of a group: the mean of its members, unit by unit, and of its units those that add most."""
        head, *others = shares.argsort(descending=True, stable=True)[: int((shares > 0).sum())].tolist()
        members, scores = [self.networks[head]], self._scores([head])
        for other in others:
            order = matched_units(self.networks[head], self.networks[other])
            members.append(self.networks[other].take(order))
            scores = scores + self._scores([other])[order]
        merged = averaged(members, shares[[head, *others]].tolist()) if others else members[0]
        if self.importance.together is not None and len(all_shares) < self.experts:
            kept = float(self.importance.together[head, all_shares.argmax(1)].sum())
            merged = merged.scaled(kept, kept)  # the probabilities of those that stay grow by as much
        return merged.take(top(scores, width))

    @torch.no_grad()
    def _fill_router(self, layer: nn.Module, target: ExpertBlock, shares: Tensor) -> None:
        """Fill a router with the means of its teacher's rows, and the gate of the shared network."""
        assert isinstance(self.block, ExpertBlock)
        for name in target.of_router:
            own, source = _tensor(layer, name), f"{self.path}.{self.block.path}{name.removeprefix(target.path)}"
            with weight_in_memory(self.teacher, source) as weight:
                rows = weight.detach().to("cpu", torch.float64)
            if rows.ndim == 2 and len(rows) == 1 and own.shape != (len(shares), len(self.channels)):
                own.copy_(rows @ shares.T)
            else:
                rows = shares @ rows
                own.copy_(rows[:, self.channels] if rows.ndim == 2 else rows)
        if target.shared_gate is not None and self.block.shared_gate is not None:
            with weight_in_memory(self.teacher, f"{self.path}.{self.block.shared_gate}.weight") as weight:
                gate: Any = layer.get_submodule(target.shared_gate)
                gate.weight.copy_(weight.detach().to("cpu", torch.float32)[:, self.channels])


def merged_shares(weights: Tensor, products: Tensor, number: int) -> Tensor:
    """Merge experts until `number` are left, two at a time: those whose mean is nearest to both (Ward's method).

    The cost of two experts of weights v and w is v w / (v + w) times the mean squared distance of their outputs: copies
    and experts that are never chosen go first. `weights` [E] are the router's means, `products` [E, E] the mean inner
    products of outputs. Returns the share of each expert in each group [number, E], in the order of their largest.

    References:
        Ward 1963; Chen et al. 2024 (HC-SMoE), arXiv 2410.08589, for clusters of experts by their outputs.
    """
    shares, weights = torch.eye(len(weights), dtype=torch.float64), weights.clone()
    while len(weights) > number:
        squares = products.diagonal()
        distances = (squares[:, None] + squares - 2 * products).clamp_min(0)
        costs = distances * weights[:, None] * weights / (weights[:, None] + weights).clamp_min(TINY)
        first, second = divmod(int(costs.fill_diagonal_(torch.inf).argmin()), len(costs))
        total = float(weights[first] + weights[second])
        part = float(weights[first]) / total if total else 0.5
        rest = torch.arange(len(weights)) != second
        mean = torch.eye(len(weights), dtype=torch.float64)
        mean[first, first], mean[first, second] = part, 1 - part
        mean = mean[rest]
        shares, products = mean @ shares, mean @ products @ mean.T
        weights[first] = total
        weights = weights[rest]
    return shares[shares.argmax(1).argsort()]


def matched_units(network: Units, other: Units) -> Tensor:
    """Return the units of another network in the order of those they are most like, each once, by their weights.

    References:
        Ainsworth et al. 2022 (Git Re-Basin), arXiv 2209.04836, section 3.2; here each is matched once it is the most
        alike of all that are left.
    """
    rows = []
    for units in (network, other):
        parts = (*units.inputs.unbind(1), units.outputs)
        rows.append(torch.cat([torch.nn.functional.normalize(part, dim=1) for part in parts], 1))
    alike, order = rows[0] @ rows[1].T, torch.full((len(network),), -1)
    while bool((order < 0).any()):
        best, own = alike.max(1).indices, alike.max(0).indices
        pairs = (own[best] == torch.arange(len(order))) & (order < 0)
        order[pairs] = best[pairs]
        alike[pairs], alike[:, best[pairs]] = -torch.inf, -torch.inf
    return order


def _tensor(module: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by its name."""
    path, _, own = name.rpartition(".")
    tensor: Tensor = getattr(module.get_submodule(path), own)
    return tensor


def network_sizes(layer: nn.Module) -> tuple[int, int]:
    """The number of experts of a layer, 1 for a network in their place, and of the units of one; 0 for other parts."""
    block = find_feed_forward(layer)
    if not isinstance(block, ExpertBlock):
        return (0, 0) if block is None else (1, _width(layer, block))
    experts: Any = layer.get_submodule(block.experts)
    number, *sizes = experts.down_proj.shape
    return number, sizes[0 if experts.is_transposed else 1]


def _width(layer: nn.Module, network: Network) -> int:
    module: Any = layer.get_submodule(f"{network.path}.{network.output}")
    return int(module.in_features)


@torch.no_grad()
def _constant_weight(layer: nn.Module, block: ExpertBlock) -> float:
    """The weight that a router gives its only expert."""
    seen: list[Any] = []
    experts, whole = layer.get_submodule(block.experts), layer.get_submodule(block.path)
    hook = experts.register_forward_pre_hook(
        lambda _, args, named: seen.append([*args, *named.values()][2]), with_kwargs=True
    )
    router: Any = _tensor(layer, f"{block.router}.weight")
    states = torch.linspace(-1, 1, 4 * router.shape[1]).view(1, 4, -1).sin()
    with hook, suppress(RuntimeError):  # of a router that first chooses groups of at least two experts
        whole(states)
    weights = seen[0].flatten().float() if seen else torch.zeros(1)
    if not torch.allclose(weights, weights[:1]) or not float(weights[0]):
        raise ModelError(
            f"{WHERE} a router that gives its only expert the same weight for all tokens, got that of "
            f"{type(whole).__name__}, which does not. Keep two experts."
        )
    return float(weights[0])
