"""Measure how much the experts of a layer and their units add, in forward passes alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from potstill.errors import ModelError
from potstill.losses.token_losses import on_float64_device
from potstill.models.feed_forward import ExpertBlock, Network

SAMPLE = 256  # tokens of a batch on which all experts are computed, also those that are not chosen
TOLERANCE = 5e-2  # relative, of the output of a block of experts in bfloat16
TINY = 1e-30


@dataclass(frozen=True)
class BlockImportance:
    """Scores of a layer's feed-forward networks: its experts and then the shared network, or its only one.

    The weight w of a network for a token is its router's, 0 where it is not chosen; that of a shared network is its
    gate, or 1. a is the activation of a unit.
    """

    units: tuple[Tensor, ...]  # by network [I]: sqrt(sum_rows (mean_tokens w |a|)^2)
    scales: tuple[
        Tensor, ...
    ]  # by network [I]: E w a^2 / E a^2, the constant nearest to w for a unit that is always on
    weights: Tensor  # by network: E w
    experts: Tensor = field(default_factory=lambda: torch.zeros(0))  # [E] E w |output|, the size of what each adds
    products: Tensor = field(default_factory=lambda: torch.zeros(0))  # [E, E] mean inner products of outputs
    # [E, E] where weights are probabilities among all experts: the mean of the second's, where the first is chosen.
    together: Tensor | None = None


@dataclass
class _Sums:
    """Sums over tokens, by network."""

    units: dict[int, Tensor] = field(default_factory=dict)
    products: dict[int, Tensor] = field(default_factory=dict)  # of w a^2
    squares: dict[int, Tensor] = field(default_factory=dict)  # of a^2
    weights: dict[int, float] = field(default_factory=dict)
    sizes: dict[int, float] = field(default_factory=dict)
    of_outputs: Tensor | float = 0.0
    probabilities: Tensor | float = 0.0  # [E, E], of the second where the first is chosen
    chosen: Tensor | float = 0.0  # [E] tokens
    tokens: int = 0
    sampled: int = 0
    of_all: bool = True  # whether weights are so far probabilities among all experts

    def add(self, sums: dict[int, Any], network: int, value: Any) -> None:
        sums[network] = sums[network] + value if network in sums else value


class BlockMeasurement:
    """Collects the scores of one layer's feed-forward networks over batches."""

    def __init__(self, layer: nn.Module, block: ExpertBlock | Network, name: str) -> None:
        self.layer, self.block, self.name = layer, block, name
        self.sums, self.seen = _Sums(), dict[str, Any]()

    @contextmanager
    def hooks(self, mask: Callable[[], Tensor]) -> Iterator[None]:
        """Measure the batches that the model reads meanwhile; `mask` gives the attention mask [B, T] of each."""
        with ExitStack() as hooks:

            def watch(path: str, key: str) -> None:
                def hook(_: Any, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
                    self.seen[key] = ([*args, *named.values()], output)

                module = self.layer.get_submodule(path)
                hooks.enter_context(module.register_forward_hook(hook, with_kwargs=True))

            network = self.block.shared if isinstance(self.block, ExpertBlock) else self.block
            if network is not None:
                watch(f"{network.path}.{network.output}", "shared units")
                watch(network.path, "shared")
            if isinstance(self.block, ExpertBlock):
                watch(self.block.experts, "experts")
                watch(self.block.router, "router")
                if self.block.shared_gate is not None:
                    watch(self.block.shared_gate, "gate")

            def measure(_: Any, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
                rows = _Rows(mask())
                if isinstance(self.block, ExpertBlock):
                    self._check(output)
                    self._add_experts(rows)
                if network is not None:
                    self._add_network(rows)
                self.sums.tokens += len(rows.attended)
                self.sums.sampled += len(rows.sample)
                self.seen.clear()

            whole = self.layer.get_submodule(self.block.path)
            hooks.enter_context(whole.register_forward_hook(measure, with_kwargs=True))
            yield

    def _check(self, output: Any) -> None:
        """Check that a block's output is the sum of its experts and the shared network."""
        given = (output if isinstance(output, Tensor) else output[0]).flatten(0, -2).float()
        expected = self.seen["experts"][1].flatten(0, -2).float()
        if "shared" in self.seen:
            expected = expected + self.seen["shared"][1].flatten(0, -2).float() * self._shared_weight()
        if not (given - expected).norm() <= TOLERANCE * given.norm() + TINY and given.isfinite().all():
            raise ModelError(
                f"student.initialize: expected experts whose weighted sum is a layer's output, got {self.name}, which "
                "does more with it. Copy complete layers (initialize: copy), or begin with random weights."
            )

    def _shared_weight(self) -> Tensor | float:
        """The weight of the shared network, [N, 1]."""
        if "gate" not in self.seen:
            return 1.0
        gate: Tensor = self.seen["gate"][1].flatten(0, -2).float().sigmoid()
        return gate

    def _add_experts(self, rows: _Rows) -> None:
        experts: Any = self.layer.get_submodule(self.block.experts)  # type: ignore[union-attr]
        states, chosen, weights = (x.flatten(0, -2) for x in self.seen["experts"][0][:3])
        number = len(experts.down_proj)
        table = weights.new_zeros(len(states), number, dtype=torch.float32).scatter_(1, chosen, weights.float())
        rows = rows.to(states.device)
        self._add_choice(table, chosen, rows)
        outputs = []
        with align_module_device(experts):
            for expert in range(number):
                weight = table[:, expert]
                used = rows.attended[weight[rows.attended] != 0]
                activations = _activations(experts, expert, states[used])
                added = _output(experts, expert, activations).norm(dim=-1) * weight[used]
                self.sums.add(self.sums.sizes, expert, float(added.sum()))
                self._add_units(expert, activations, weight[used], rows.of_row[used], rows.lengths)
                everywhere = _activations(experts, expert, states[rows.sample])
                self._add_scales(expert, everywhere, weight[rows.sample])
                self.sums.add(self.sums.weights, expert, float(weight[rows.attended].sum()))
                outputs.append(_output(experts, expert, everywhere))
        stacked = on_float64_device(torch.stack(outputs).flatten(1)).double()
        self.sums.of_outputs = self.sums.of_outputs + (stacked @ stacked.T).cpu()

    def _add_choice(self, table: Tensor, chosen: Tensor, rows: _Rows) -> None:
        """Add which experts are chosen, and find out whether their weights are probabilities among all."""
        given = self.seen["router"][1]
        logits = (given if isinstance(given, Tensor) else given[0]).flatten(0, -2).float()
        probabilities = logits.softmax(-1)[rows.attended]
        taken = torch.zeros_like(table).scatter_(1, chosen, 1.0)[rows.attended]
        totals, ratios = table[rows.attended].sum(1), (table[rows.attended] / probabilities)[taken.bool()]
        self.sums.of_all &= _spread(ratios) < TOLERANCE <= _spread(totals)  # not normalized among the chosen ones
        self.sums.probabilities = self.sums.probabilities + (taken.T @ probabilities).cpu().double()
        self.sums.chosen = self.sums.chosen + taken.sum(0).cpu().double()

    def _add_network(self, rows: _Rows) -> None:
        activations = self.seen["shared units"][0][0].flatten(0, -2).float()
        rows, network = rows.to(activations.device), len(self.sums.sizes)
        weight = self._shared_weight()
        weights = weight.flatten() if isinstance(weight, Tensor) else activations.new_ones(len(activations))
        used = rows.attended
        self._add_units(network, activations[used], weights[used], rows.of_row[used], rows.lengths)
        self._add_scales(network, activations[rows.sample], weights[rows.sample])
        self.sums.add(self.sums.weights, network, float(weights[used].sum()))

    def _add_units(self, network: int, activations: Tensor, weights: Tensor, of_row: Tensor, lengths: Tensor) -> None:
        sizes = on_float64_device(activations.abs() * weights[:, None]).double()
        by_row = sizes.new_zeros(len(lengths), sizes.shape[1]).index_add_(0, of_row.to(sizes.device), sizes)
        means = by_row / lengths.to(sizes)[:, None].clamp_min(1)
        self.sums.add(self.sums.units, network, means.square().sum(0).cpu())

    def _add_scales(self, network: int, activations: Tensor, weights: Tensor) -> None:
        squares = on_float64_device(activations.square()).double()
        self.sums.add(self.sums.squares, network, squares.sum(0).cpu())
        self.sums.add(self.sums.products, network, (squares * weights.to(squares)[:, None]).sum(0).cpu())

    def result(self) -> BlockImportance:
        """Return the scores of the batches so far."""
        sums, together = self.sums, None
        networks, experts = range(len(sums.units)), len(sums.sizes)
        if experts and sums.of_all:
            assert isinstance(sums.chosen, Tensor) and isinstance(sums.probabilities, Tensor)
            mean = sums.probabilities.sum(0) / sums.chosen.sum().clamp_min(1)  # for one that is never chosen
            together = torch.where(sums.chosen[:, None] > 0, sums.probabilities / sums.chosen[:, None], mean)
        return BlockImportance(
            tuple(sums.units[i].sqrt() for i in networks),
            tuple(sums.products[i] / sums.squares[i].clamp_min(TINY) for i in networks),
            torch.tensor([sums.weights[i] / max(sums.tokens, 1) for i in networks], dtype=torch.float64),
            torch.tensor([sums.sizes[i] / max(sums.tokens, 1) for i in range(experts)], dtype=torch.float64),
            sums.of_outputs / max(sums.sampled, 1) if isinstance(sums.of_outputs, Tensor) else torch.zeros(0),
            together,
        )


class _Rows:
    """The attended tokens of a batch, among all tokens of its rows one after the other."""

    def __init__(self, mask: Tensor) -> None:
        self.attended = mask.flatten().nonzero().flatten()
        self.sample = self.attended[:: max(1, -(-len(self.attended) // SAMPLE))]
        self.of_row = torch.arange(len(mask)).repeat_interleave(mask.shape[1])
        self.lengths = mask.sum(1)

    def to(self, device: torch.device) -> _Rows:
        for name, value in vars(self).items():
            setattr(self, name, value.to(device))
        return self


def _spread(values: Tensor) -> float:
    """The relative distance of the largest value from the smallest."""
    return float((values.max() - values.min()) / values.max().clamp_min(TINY)) if len(values) else 0.0


def _activations(experts: Any, expert: int, states: Tensor) -> Tensor:
    """The activations of an expert's units, [N, I]."""
    name = "gate_up_proj" if experts.has_gate else "up_proj"
    weight, bias = getattr(experts, name)[expert], getattr(experts, f"{name}_bias", None)
    product = states.to(weight.dtype) @ (weight if experts.is_transposed else weight.T)
    product = product if bias is None else product + bias[expert]
    activated: Tensor = experts._apply_gate(product) if experts.has_gate else experts.act_fn(product)
    return activated.float()


def _output(experts: Any, expert: int, activations: Tensor) -> Tensor:
    """What an expert gives for the activations of its units, [N, H]."""
    weight, bias = experts.down_proj[expert], getattr(experts, "down_proj_bias", None)
    output = activations.to(weight.dtype) @ (weight if experts.is_transposed else weight.T)
    return (output if bias is None else output + bias[expert]).float()
