"""Where the parts of a transformer's layers are, found in its module tree and checked against its config."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from potstill.errors import ModelError
from potstill.models.shape import Shape, shape_of


@dataclass(frozen=True)
class Parts:
    """The matrices of a layer, as paths within it.

    Args:
        query: makes queries of hidden states; key and value likewise. One module may make all three.
        key: see query.
        value: see query.
        output: makes hidden states of what the heads say.
        up: make the feed-forward network's units of hidden states; with a gate there are two.
        down: makes hidden states of the units.
    """

    query: str
    key: str
    value: str
    output: str
    up: tuple[str, ...]
    down: str

    @property
    def fused(self) -> bool:
        """Whether one module makes queries, keys and values."""
        return self.query == self.key

    def all(self) -> set[str]:
        """Every path."""
        return {self.query, self.key, self.value, self.output, *self.up, self.down}


KNOWN = (
    Parts(  # Llama, Mistral, Qwen 2 and 3, Gemma 1 to 3, SmolLM, and all that are built like them
        query="self_attn.q_proj",
        key="self_attn.k_proj",
        value="self_attn.v_proj",
        output="self_attn.o_proj",
        up=("mlp.gate_proj", "mlp.up_proj"),
        down="mlp.down_proj",
    ),
    Parts(  # GPT-2
        query="attn.c_attn",
        key="attn.c_attn",
        value="attn.c_attn",
        output="attn.c_proj",
        up=("mlp.c_fc",),
        down="mlp.c_proj",
    ),
    Parts(  # BERT, RoBERTa
        query="attention.self.query",
        key="attention.self.key",
        value="attention.self.value",
        output="attention.output.dense",
        up=("intermediate.dense",),
        down="output.dense",
    ),
    Parts(  # DistilBERT
        query="attention.q_lin",
        key="attention.k_lin",
        value="attention.v_lin",
        output="attention.out_lin",
        up=("ffn.lin1",),
        down="ffn.lin2",
    ),
)


@dataclass(frozen=True)
class Anatomy:
    """A model's layers and what is in them.

    Args:
        shape: of the model.
        path: of the list of layers in the model.
        layers: the layers.
        parts: where the matrices of a layer are.
    """

    shape: Shape
    path: str
    layers: nn.ModuleList
    parts: Parts

    def of_layers(self, path: str) -> Iterator[Any]:
        """The module at a path within each layer."""
        return (layer.get_submodule(path) for layer in self.layers)

    def locate(self, parameter: str) -> tuple[int, str] | None:
        """The layer of a parameter and the path of its module there; None where it is outside of the layers."""
        prefix = f"{self.path}."
        if not parameter.startswith(prefix):
            return None
        number, _, rest = parameter.removeprefix(prefix).partition(".")
        return int(number), rest.rpartition(".")[0]


def anatomy_of(model: PreTrainedModel) -> Anatomy:
    """The anatomy of a model.

    Raises:
        ModelError: its layers are not built like those of a known family: mixtures of experts, fused gates.
    """
    shape = shape_of(model.config)
    stacks = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == shape.layers and len({*map(type, module)}) == 1
    ]
    for path, layers in stacks:
        for parts in KNOWN:
            if _fits(layers[0], parts, shape):
                return Anatomy(shape, path, layers, parts)
    raise ModelError(
        f"student.initialize: expected a model built like Llama, Mistral, Qwen, Gemma, GPT-2, BERT or DistilBERT, got "
        f"{type(model).__name__}, whose layers have other parts. Begin with random weights (initialize: random), or "
        "make the student yourself and give it as student.model."
    )


def _fits(layer: nn.Module, parts: Parts, shape: Shape) -> bool:
    """Whether a layer has exactly these matrices, in the sizes that the config says."""
    modules = dict(layer.named_modules())
    if not parts.all() <= set(modules):
        return False
    heads, kv = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    sizes = {
        parts.query: (heads + 2 * kv if parts.fused else heads, shape.hidden),
        parts.output: (shape.hidden, heads),
        parts.down: (shape.hidden, shape.ffn),
        **dict.fromkeys(parts.up, (shape.ffn, shape.hidden)),
        **({} if parts.fused else dict.fromkeys((parts.key, parts.value), (kv, shape.hidden))),
    }
    if any(_is_matrix(modules[path]) and tuple(matrix(modules[path]).shape) != size for path, size in sizes.items()):
        return False
    attention = parts.query.rpartition(".")[0]
    for name, parameter in layer.named_parameters():
        path = name.rpartition(".")[0]
        if path in sizes:
            if not _is_matrix(modules[path]):
                return False
        elif parameter.ndim != 1 or (path.startswith(f"{attention}.") and len(parameter) != shape.head_size):
            return False  # a matrix that is not known, or a vector over all heads at once
    return True


def _is_matrix(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def matrix(module: Any) -> Tensor:
    """The weight of a linear module as [out, in]; GPT-2's Conv1D has it the other way round."""
    weight: Tensor = module.weight
    return weight.T if isinstance(module, Conv1D) else weight
