"""The feed-forward networks of mixtures of experts: where they are, and their units, read from and written to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from potstill.errors import ModelError
from potstill.models.placement import weight_in_memory
from potstill.models.structure import FAMILIES, AttentionMatrices, LayerList, find_layer_list, fits, is_linear

# Names of the linear layers of one feed-forward network: those that units read, with a gate first, and their output.
NETWORKS = ((("gate_proj", "up_proj"), "down_proj"), (("w1", "w3"), "w2"), (("up_proj",), "down_proj"))


@dataclass(frozen=True)
class Network:
    """A feed-forward network of linear layers, by its path in a layer."""

    path: str
    inputs: tuple[str, ...]
    output: str


@dataclass(frozen=True)
class ExpertBlock:
    """A router and its experts, by their paths in a layer, with the network that all tokens pass through, if any."""

    path: str
    experts: str
    router: str  # the module with a row of weights for each expert
    of_router: tuple[str, ...]  # parameters and buffers with a number or a row for each expert
    shared: Network | None
    shared_gate: str | None  # whose sigmoid scales the shared network


@dataclass(frozen=True)
class Mixture(LayerList):
    """The layers of a mixture of experts, and their parts."""

    attention: AttentionMatrices | None  # None where heads cannot be pruned
    blocks: tuple[ExpertBlock | Network | None, ...]  # of each layer; None for one that is copied as it is


def find_mixture(model: Any) -> Mixture | None:
    """Find the experts of a model and its other feed-forward networks; None for a model without experts.

    Raises:
        ModelError: experts whose units cannot be told apart.
    """
    if not any(_is_experts(module) for module in model.modules()):
        return None
    layers = find_layer_list(model)
    blocks = [find_feed_forward(layer) for layer in layers.layers]
    for number, (layer, block) in enumerate(zip(layers.layers, blocks, strict=True)):
        if block is None and any(_is_experts(module) for module in layer.modules()):
            raise ModelError(
                f"student.initialize: expected a router with a row for each expert, and the experts, got "
                f"{type(model).__name__}, whose layer {number} has other parts. Copy complete layers (initialize: "
                "copy), or begin with random weights (initialize: random)."
            )
    attention = None
    for matrices in FAMILIES:
        own = AttentionMatrices(matrices.query, matrices.key, matrices.value, matrices.output)
        parts = zip(layers.layers, blocks, strict=True)
        if layers.shape.heads and all(
            fits(layer, own, layers.shape, block.path if block else "") for layer, block in parts
        ):
            attention = own
    return Mixture(layers.shape, layers.path, layers.layers, attention, tuple(blocks))


def find_feed_forward(layer: nn.Module) -> ExpertBlock | Network | None:
    """Find the experts of a layer, or its feed-forward network of linear layers; None for other parts."""
    paths = [path for path, module in layer.named_modules() if _is_experts(module)]
    if paths:
        return _expert_block(layer, paths[0]) if len(paths) == 1 else None
    networks = [network for name, module in layer.named_children() if (network := _network(name, module))]
    return networks[0] if len(networks) == 1 else None


def _is_experts(module: Any) -> bool:
    """Whether a module has the weights of all experts in transformers' common form."""
    down = getattr(module, "down_proj", None)
    common = hasattr(module, "has_gate") and not getattr(module, "has_post_expert_norm", False)
    return common and isinstance(down, nn.Parameter) and down.ndim == 3


def _network(path: str, module: nn.Module) -> Network | None:
    linear = {name for name, child in module.named_children() if is_linear(child)}
    for inputs, output in NETWORKS:
        if linear == {*inputs, output}:
            return Network(path, inputs, output)
    return None


def _expert_block(layer: nn.Module, path: str) -> ExpertBlock | None:
    parent = path.rpartition(".")[0]
    if not parent:
        return None
    block, experts = layer.get_submodule(parent), layer.get_submodule(path)
    number, width = len(experts.down_proj), _width(experts)  # type: ignore[arg-type]
    shared = gate = None
    rest: dict[str, Tensor] = {}
    for name, child in block.named_children():
        place = f"{parent}.{name}"
        if child is experts:
            continue
        if network := _network(place, child):
            if shared is not None:
                return None
            shared = network
        elif type(child) is nn.Linear and tuple(child.weight.shape) == (1, width):
            gate = place
        else:
            rest |= {f"{place}.{n}": x for n, x in (*child.named_parameters(), *child.named_buffers())}
    own = (*block.named_parameters(recurse=False), *block.named_buffers(recurse=False))
    rest |= {f"{parent}.{name}": x for name, x in own}
    rows = [name for name, x in rest.items() if tuple(x.shape) == (number, width)]
    by_expert = {(number, width), (number,), (1, number)}
    if len(rows) != 1 or any(tuple(x.shape) not in by_expert for x in rest.values()) or (gate and not shared):
        return None
    return ExpertBlock(parent, path, rows[0].rpartition(".")[0], tuple(rest), shared, gate)


def _width(experts: Any) -> int:
    """The width of the hidden states that experts read and write."""
    return int(experts.down_proj.shape[2 if experts.is_transposed else 1])


@dataclass(frozen=True)
class Units:
    """Feed-forward units, whose outputs are summed; each reads by G rows, a gate and its product, or one alone."""

    inputs: Tensor  # [I, G, H]
    input_biases: Tensor | None  # [I, G]
    outputs: Tensor  # [I, H]
    output_bias: Tensor | None  # [H]

    def __len__(self) -> int:
        return len(self.outputs)

    def take(self, units: Tensor) -> Units:
        """Select units, in the order of their indices."""
        biases = None if self.input_biases is None else self.input_biases[units]
        return Units(self.inputs[units], biases, self.outputs[units], self.output_bias)

    def scaled(self, factors: Tensor | float, of_bias: float) -> Units:
        """Scale the output of each unit [I, 1], or of all, and their bias."""
        bias = None if self.output_bias is None else self.output_bias * of_bias
        return replace(self, outputs=self.outputs * factors, output_bias=bias)

    def on_channels(self, channels: Tensor) -> Units:
        """Select hidden channels."""
        bias = None if self.output_bias is None else self.output_bias[channels]
        return Units(self.inputs[:, :, channels], self.input_biases, self.outputs[:, channels], bias)


def joined(parts: Sequence[Units]) -> Units:
    """Join networks to one, whose output is the sum of theirs."""
    biases = [part.input_biases for part in parts if part.input_biases is not None]
    of_output = [part.output_bias for part in parts if part.output_bias is not None]
    if biases and len(biases) < len(parts):
        biases = [x.inputs.new_zeros(x.inputs.shape[:2]) if x.input_biases is None else x.input_biases for x in parts]
    return Units(
        torch.cat([part.inputs for part in parts]),
        torch.cat(biases) if biases else None,
        torch.cat([part.outputs for part in parts]),
        torch.stack(of_output).sum(0) if of_output else None,
    )


def averaged(networks: Sequence[Units], shares: Sequence[float]) -> Units:
    """Average networks, unit by unit, with shares whose sum is 1."""

    def mean(values: Sequence[Tensor | None]) -> Tensor | None:
        known = [value for value in values if value is not None]
        return sum(share * value for share, value in zip(shares, known, strict=True)) if known else None  # type: ignore

    parts = zip(*((x.inputs, x.input_biases, x.outputs, x.output_bias) for x in networks), strict=True)
    return Units(*map(mean, parts))  # type: ignore[arg-type]


def read_network(model: nn.Module, path: str, network: Network) -> Units:
    """Read the units of a network of a model's layer, in float32; `path` is that of the layer."""
    names = {name: f"{path}.{network.path}.{name}" for name in (*network.inputs, network.output)}
    weights = {name: _read(model, f"{place}.weight") for name, place in names.items()}
    biases = {name: _read(model, f"{place}.bias") for name, place in names.items()}
    inputs = [weights[name] for name in network.inputs]
    of_inputs = [biases[name] for name in network.inputs]
    output: Any = weights[network.output]
    known = all(x is not None for x in of_inputs)
    return Units(
        torch.stack(inputs, 1),  # type: ignore[arg-type]
        torch.stack(of_inputs, 1) if known else None,  # type: ignore[arg-type]
        output.T,
        biases[network.output],
    )


def read_experts(model: nn.Module, path: str, block: ExpertBlock) -> list[Units]:
    """Read the units of all experts of a model's layer, in float32."""
    place = f"{path}.{block.experts}"
    experts: Any = model.get_submodule(place)
    name = "gate_up_proj" if experts.has_gate else "up_proj"
    weight, output = _read(model, f"{place}.{name}"), _read(model, f"{place}.down_proj")
    bias, of_output = _read(model, f"{place}.{name}_bias"), _read(model, f"{place}.down_proj_bias")
    assert weight is not None
    assert output is not None
    inputs = weight.transpose(1, 2) if experts.is_transposed else weight
    outputs = output if experts.is_transposed else output.transpose(1, 2)
    return [
        Units(
            _by_unit(inputs[i], experts),
            None if bias is None else _by_unit(bias[i], experts),
            outputs[i],
            None if of_output is None else of_output[i],
        )
        for i in range(len(output))
    ]


def _by_unit(rows: Tensor, experts: Any) -> Tensor:
    """Bring the input rows of an expert [G I, ...] into [I, G, ...]."""
    parts = 2 if experts.has_gate else 1
    concatenated = getattr(experts, "is_concatenated", True)
    return rows.unflatten(0, (parts, -1)).transpose(0, 1) if concatenated else rows.unflatten(0, (-1, parts))


def _read(model: nn.Module, name: str) -> Tensor | None:
    module, _, own = name.rpartition(".")
    if getattr(model.get_submodule(module), own, None) is None:
        return None
    with weight_in_memory(model, name) as weight:
        return weight.detach().to("cpu", torch.float32)


@torch.no_grad()
def write_network(layer: nn.Module, network: Network, units: Units) -> None:
    """Fill a network with units; what it has more of adds nothing at first, and can learn to."""
    for place, name in enumerate(network.inputs):
        module: Any = layer.get_submodule(f"{network.path}.{name}")
        module.weight[: len(units)] = units.inputs[:, place]
        if module.bias is not None:
            module.bias[: len(units)] = 0.0 if units.input_biases is None else units.input_biases[:, place]
    output: Any = layer.get_submodule(f"{network.path}.{network.output}")
    output.weight.zero_()[:, : len(units)] = units.outputs.T
    if output.bias is not None:
        output.bias.copy_(torch.zeros(()) if units.output_bias is None else units.output_bias)


@torch.no_grad()
def write_experts(layer: nn.Module, block: ExpertBlock, by_expert: Sequence[Units]) -> None:
    """Fill experts with units."""
    experts: Any = layer.get_submodule(block.experts)
    name = "gate_up_proj" if experts.has_gate else "up_proj"
    weight, bias = getattr(experts, name), getattr(experts, f"{name}_bias", None)
    of_output = getattr(experts, "down_proj_bias", None)
    for number, units in enumerate(by_expert):
        rows = weight[number].T if experts.is_transposed else weight[number]
        _by_unit(rows, experts).copy_(units.inputs)  # a view
        outputs = experts.down_proj[number]
        (outputs if experts.is_transposed else outputs.T).copy_(units.outputs)
        if bias is not None and units.input_biases is not None:
            _by_unit(bias[number], experts).copy_(units.input_biases)
        if of_output is not None and units.output_bias is not None:
            of_output[number].copy_(units.output_bias)
