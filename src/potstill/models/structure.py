"""Find the layers, attention and norms of a transformers model, by names checked against its config."""

from __future__ import annotations

import re
from contextlib import ExitStack
from dataclasses import KW_ONLY, dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from potstill.errors import ModelError
from potstill.models.shapes import DesignShape, design_shape, head_size, num_layers, text_config
from potstill.models.split import probe_batch, run, split_model, undisturbed

# Names of the attention projections: three modules, or one for all.
SEPARATE = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("query_proj", "key_proj", "value_proj"),
    ("q", "k", "v"),
)
STACKED = ("c_attn", "qkv_proj", "Wqkv")  # all queries, all keys, all values
GROUPED = ("query_key_value",)  # by group of heads: its queries, its key, its value
OF_IMAGES = re.compile("vision|visual|image|audio")  # paths of towers
UNKNOWN_ORDER = {"codegen", "gpt_bigcode"}  # families that fuse them in an order of their own


def layer_lists(model: Any) -> list[tuple[str, nn.ModuleList]]:
    """Find the lists of modules as long as the model's text part is deep, with their paths; most models have one."""
    config: Any = getattr(model, "config", None)
    if config is None:
        return []
    text = text_config(config)
    body = model if text is config else model.get_decoder()
    depth, paths = num_layers(text), {module: path for path, module in model.named_modules()}
    lists = [(paths[x], x) for x in body.modules() if isinstance(x, nn.ModuleList) and len(x) == depth]
    within = tuple(f"{path}." for path, _ in lists)  # experts, which are no layers
    return [(path, x) for path, x in lists if not path.startswith(within) and not OF_IMAGES.search(path)]


def find_layers(model: nn.Module) -> str:
    """Find the path of the list of layers of a decoder or encoder of transformers."""
    name, config = type(model).__name__, getattr(model, "config", None)
    if config is None or config.is_encoder_decoder:
        raise ModelError(
            f"{name}: expected a decoder or an encoder of transformers, whose layers can be compared, got another "
            "model. Leave out terms over layers."
        )
    lists = layer_lists(model)
    if not lists:
        depth = num_layers(text_config(config))
        lengths = [f"{path} ({len(x)})" for path, x in model.named_modules() if isinstance(x, nn.ModuleList)]
        raise ModelError(
            f"{name}: expected a list of its {depth} layers, got {', '.join(lengths[:4]) or 'none'}. Leave out terms "
            "over layers: they are not known for this architecture."
        )
    return lists[0][0]


def find_routers(model: nn.Module, layer: nn.Module) -> list[tuple[str, int]]:
    """Find the routers of a layer, as transformers records them: names, and where in their output the logits are."""
    recorders = [getattr(module, "_can_record_outputs", None) or {} for module in model.modules()]
    kinds = [record["router_logits"] for record in recorders if "router_logits" in record]
    places = {getattr(kind, "target_class", kind): getattr(kind, "index", 0) for kind in kinds}
    return [(name, places[type(module)]) for name, module in layer.named_modules() if type(module) in places]


def find_attention(layer: nn.Module) -> tuple[nn.Module, tuple[str, ...]] | None:
    """Find a layer's attention module, and the names of its projections to queries, keys and values."""
    for path, module in layer.named_modules():
        children = dict(module.named_children())
        for names in (*SEPARATE, *((fused,) for fused in (*STACKED, *GROUPED))):
            if "cross" not in path.lower() and all(name in children for name in names):
                return module, names
    return None


def split_projection(fused: Tensor, config: Any, grouped: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Split the output of a fused projection into queries, keys and values; its width gives the number of keys."""
    heads, width = config.num_attention_heads, head_size(config)
    keys = (fused.shape[-1] // width - heads) // 2
    if keys < 1:
        raise ModelError(
            f"{config.model_type}: expected queries, keys and values from one projection, got {fused.shape[-1]} "
            f"numbers for {heads} queries of {width}. Use another term than relations."
        )
    if grouped:
        by_group = fused.unflatten(-1, (keys, heads // keys + 2, width))
        queries, key, value = by_group[..., :-2, :], by_group[..., -2, :], by_group[..., -1, :]
        return queries.flatten(2), key.flatten(2), value.flatten(2)
    queries, key, value = fused.split([heads * width, keys * width, keys * width], dim=-1)
    return queries, key, value


def find_final_norm(model: Any, layers: str) -> str:
    """Find the path of the one module between the last of `layers` and a plain head by a probe; "" for none."""
    name, split = type(model).__name__, split_model(model)
    if split is None or split.between:
        raise ModelError(
            f"{name}: expected a model with a plain head right behind its last norm, got another. Its earlier layers "
            "cannot be read through it. Leave out the term, or the adapter on the head."
        )
    calls: list[tuple[str, Any, Tensor]] = []

    def hook(path: str, _: nn.Module, inputs: Any, output: Any) -> None:
        calls.append((path, inputs[0] if inputs else None, output[0] if isinstance(output, tuple | list) else output))

    last = f"{layers}.{len(model.get_submodule(layers)) - 1}"
    with ExitStack() as hooks, undisturbed(model):
        for path, module in model.named_modules():
            if path == last or (path.startswith(f"{split.body}.") and not path.startswith(f"{layers}.")):
                hooks.enter_context(module.register_forward_hook(partial(hook, path)))
        final = run(model.get_submodule(split.body), probe_batch(model)).last_hidden_state
    state = next((output for path, _, output in calls if path == last), None)
    if state is not None and torch.equal(state, final):
        return ""
    for path, *tensors in calls:
        known = state is not None and all(isinstance(x, Tensor) for x in tensors)
        if known and all(map(torch.equal, tensors, (state, final))):
            return path
    raise ModelError(
        f"{name}: expected one norm between its last layer and its head, got more. Its earlier layers cannot be read "
        "through its head: leave out the term."
    )


@dataclass(frozen=True)
class AttentionMatrices:
    """Paths of the weight matrices of the attention within a layer."""

    query: str  # the same as key and value where one module makes all three
    key: str
    value: str
    output: str

    @property
    def fused(self) -> bool:
        """Whether one module projects to queries, keys and values."""
        return self.query == self.key

    @property
    def grouped(self) -> bool:
        """Whether a fused module has queries, key and value by group of heads, rather than all queries first."""
        return self.query.endswith(GROUPED)


@dataclass(frozen=True)
class LayerMatrices(AttentionMatrices):
    """Paths of the weight matrices within a layer."""

    _: KW_ONLY
    up: tuple[str, ...]  # two where the feed-forward network has a gate of its own
    down: str

    @property
    def fused_gate(self) -> bool:
        """Whether one module makes the gates of all units, and then what they let through."""
        return self.up[0].endswith("gate_up_proj")


_Q, _K, _V, _O = (f"self_attn.{name}_proj" for name in "qkvo")
FAMILIES = (
    # Llama, Mistral, Qwen 2 and 3, Gemma 1 to 3, SmolLM
    LayerMatrices(_Q, _K, _V, _O, up=("mlp.gate_proj", "mlp.up_proj"), down="mlp.down_proj"),
    # GLM
    LayerMatrices(_Q, _K, _V, _O, up=("mlp.gate_up_proj",), down="mlp.down_proj"),
    # Nemotron, Arcee
    LayerMatrices(_Q, _K, _V, _O, up=("mlp.up_proj",), down="mlp.down_proj"),
    # StarCoder2
    LayerMatrices(_Q, _K, _V, _O, up=("mlp.c_fc",), down="mlp.c_proj"),
    # Phi-1 and 2
    LayerMatrices(_Q, _K, _V, "self_attn.dense", up=("mlp.fc1",), down="mlp.fc2"),
    # GPT-J
    LayerMatrices("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj", up=("mlp.fc_in",), down="mlp.fc_out"),
    # Phi-3 and 4
    LayerMatrices(*("self_attn.qkv_proj",) * 3, _O, up=("mlp.gate_up_proj",), down="mlp.down_proj"),
    # GPT-NeoX, Pythia
    LayerMatrices(
        *("attention.query_key_value",) * 3, "attention.dense", up=("mlp.dense_h_to_4h",), down="mlp.dense_4h_to_h"
    ),
    # GPT-2
    LayerMatrices(*("attn.c_attn",) * 3, "attn.c_proj", up=("mlp.c_fc",), down="mlp.c_proj"),
    # BERT, RoBERTa
    LayerMatrices(
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        up=("intermediate.dense",),
        down="output.dense",
    ),
    # DistilBERT
    LayerMatrices(
        "attention.q_lin",
        "attention.k_lin",
        "attention.v_lin",
        "attention.out_lin",
        up=("ffn.lin1",),
        down="ffn.lin2",
    ),
)


@dataclass(frozen=True)
class LayerList:
    """The layers of a model of any family."""

    shape: DesignShape
    path: str  # of the layers in the model
    layers: nn.ModuleList

    def locate(self, parameter: str) -> tuple[int, str] | None:
        """Return the layer of a parameter and the path of its module there; None outside of the layers."""
        if not parameter.startswith(f"{self.path}."):
            return None
        number, _, rest = parameter.removeprefix(f"{self.path}.").partition(".")
        return int(number), rest.rpartition(".")[0]


@dataclass(frozen=True)
class LayerStructure(LayerList):
    """The layers of a model of a known family, and where their weight matrices are."""

    matrices: LayerMatrices
    whole_attention: bool = False  # heads cannot be pruned, as of OLMo 2, which normalizes all heads at once


def find_layer_list(model: Any) -> LayerList:
    """Find the layers of a model of any family."""
    lists = layer_lists(model)
    if len(lists) != 1:
        paths = ", ".join(path for path, _ in lists)
        raise ModelError(
            f"student.initialize: expected a model with one list of its layers, got {type(model).__name__} with "
            f"{paths or 'none'}. Begin with random weights (initialize: random), or name a student with student.model."
        )
    return LayerList(design_shape(model.config), *lists[0])


def find_structure(model: Any) -> LayerStructure:
    """Find where the weight matrices of a model's layers are.

    `find_mixture` is for layers with experts.
    """
    shape = design_shape(model.config)
    for path, layers in layer_lists(model):
        alike = len({*map(type, layers)}) == 1
        for matrices, whole in product(FAMILIES if alike else (), (False, True)):
            if fits(layers[0], matrices, shape, whole_attention=whole):
                return LayerStructure(shape, path, layers, matrices, whole)
    raise ModelError(
        f"student.initialize: expected a model built like Llama, Mistral, Qwen, Gemma, Phi, GLM, GPT-2, GPT-NeoX, "
        f"BERT or DistilBERT, got {type(model).__name__}, whose layers have other parts. Copy complete layers "
        "(initialize: copy), begin with random weights (initialize: random), or make the student yourself and give it "
        "as student.model."
    )


def fits(
    layer: nn.Module,
    matrices: AttentionMatrices,
    shape: DesignShape,
    besides: str = "",
    *,
    whole_attention: bool = False,
) -> bool:
    """Whether a layer has exactly these matrices, in the sizes of the config; `besides` is the path of another part.

    With `whole_attention` the attention may have norms over all heads, which cannot be pruned.
    """
    modules: dict[str, Any] = dict(layer.named_modules())
    heads, kv = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    sizes = {
        **({} if matrices.fused else dict.fromkeys((matrices.key, matrices.value), (kv, shape.hidden))),
        matrices.query: (heads + 2 * kv if matrices.fused else heads, shape.hidden),
        matrices.output: (shape.hidden, heads),
    }
    if isinstance(matrices, LayerMatrices):
        units = 2 * shape.ffn if matrices.fused_gate else shape.ffn
        sizes |= {matrices.down: (shape.hidden, shape.ffn), **dict.fromkeys(matrices.up, (units, shape.hidden))}
    for path, size in sizes.items():
        module: Any = modules.get(path)
        if not is_linear(module) or tuple(module.weight.shape) != (size[::-1] if is_transposed(module) else size):
            return False
    attention = matrices.query.rpartition(".")[0]
    lengths = {shape.head_size, heads, kv} if whole_attention else {shape.head_size}
    for name, parameter in layer.named_parameters():
        path = name.rpartition(".")[0]
        if besides and name.startswith(f"{besides}."):
            continue
        if path == attention:  # a number for each head, as attention sinks are
            return False
        if path in sizes:
            continue
        of_heads, of_units = path.startswith(f"{attention}."), len(parameter) == shape.ffn != shape.hidden
        if parameter.ndim != 1 or (len(parameter) not in lengths if of_heads else of_units):
            return False
    return True


def is_linear(module: Any) -> bool:
    """Whether a module is nn.Linear, also a quantized one, or GPT-2's Conv1D."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def is_transposed(module: Any) -> bool:
    """Whether a module is transformers' Conv1D, whose weight is [in, out]; known by name, so as not to import it."""
    return type(module).__name__ == "Conv1D"
