"""Capture hidden states, attention maps, queries, keys and values of chosen layers by hooks for one pass."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from potstill.errors import ModelError
from potstill.models import structure
from potstill.models.layer_map import Layer
from potstill.models.packing import PackedLayout
from potstill.models.shapes import ModelShape, model_shape, text_config
from potstill.models.split import probe_batch, run, undisturbed

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class ActivationRequest:
    """Layers to capture, from 0; see `Activations`."""

    hidden: frozenset[Layer] = frozenset()
    attentions: frozenset[int] = frozenset()
    vectors: frozenset[int] = frozenset()
    exits: frozenset[int] = frozenset()
    routers: frozenset[int] = frozenset()  # of these layers, those that have some

    def __or__(self, other: ActivationRequest) -> ActivationRequest:
        return ActivationRequest(*(getattr(self, x.name) | getattr(other, x.name) for x in fields(self)))

    def __bool__(self) -> bool:
        return any(getattr(self, x.name) for x in fields(self))


class Vectors(NamedTuple):
    """Outputs of a layer's attention projections, heads side by side, before any norm, rotation and repetition."""

    queries: Tensor  # [B, T, Dq]
    keys: Tensor  # [B, T, Dk]
    values: Tensor  # [B, T, Dv]


@dataclass(frozen=True)
class Activations:
    """Captured tensors, by layer."""

    hidden: dict[Layer, Tensor] = field(default_factory=dict)  # [B, T, H] outputs, before the model's last norm
    attentions: dict[int, Tensor] = field(default_factory=dict)  # [B, A, T, T] probabilities of queries over keys
    vectors: dict[int, Vectors] = field(default_factory=dict)
    exits: dict[int, Tensor] = field(default_factory=dict)  # [B, T, H] outputs, behind the model's last norm
    routers: dict[int, Tensor] = field(default_factory=dict)  # [R, B * T, E] logits of a layer's routers

    def last(self, length: int) -> Activations:
        """Drop the positions of virtual tokens, which are in front, from hidden states and vectors."""
        return replace(
            self,
            hidden={i: x[:, -length:] for i, x in self.hidden.items()},
            vectors={i: Vectors(*(x[:, -length:] for x in vectors)) for i, vectors in self.vectors.items()},
        )

    def of_rows(self, layout: PackedLayout | None, length: int) -> Activations:
        """Move what was captured of packed rows back into a batch of some length; of others drop virtual tokens."""
        if layout is None:
            return self.last(length)
        routers = {i: x.movedim(0, 1).unflatten(0, layout.shape) for i, x in self.routers.items()}
        return Activations(
            {i: layout.unpack(x) for i, x in self.hidden.items()},
            {i: layout.unpack_pairs(x) for i, x in self.attentions.items()},
            {i: Vectors(*map(layout.unpack, vectors)) for i, vectors in self.vectors.items()},
            {i: layout.unpack(x) for i, x in self.exits.items()},
            {i: layout.unpack(x).flatten(0, 1).movedim(1, 0) for i, x in routers.items()},
        )

    def to(self, device: torch.device) -> Activations:
        by_layer: tuple[dict[Any, Tensor], ...] = (self.hidden, self.attentions, self.exits, self.routers)
        hidden, attentions, exits, routers = ({i: x.to(device) for i, x in tensors.items()} for tensors in by_layer)
        vectors = {i: Vectors(*(x.to(device) for x in vectors)) for i, vectors in self.vectors.items()}
        return Activations(hidden, attentions, vectors, exits, routers)


class ActivationCapture:
    """Captures activations of a decoder or encoder of transformers.

    Modules are looked up by name at each call, because wrappers (FSDP, activation checkpointing) replace them.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._layers = structure.find_layers(model)
        self._config = text_config(model.config)
        self._final_norm = ""
        self._routers: dict[int, list[tuple[str, int]]] = {}  # of layers that have some: names, and places of logits
        self._name = type(model).__name__

    @property
    def shape(self) -> ModelShape:
        # Models that have a balancing loss of their own have this attribute; others balance their experts otherwise.
        experts = getattr(self.model, "num_experts_per_tok", None) or 0
        return replace(model_shape(self.model.config), experts_per_token=experts)

    def prepare(self, request: ActivationRequest) -> None:
        """Switch the model to eager attention if a request needs attention maps, and check it on a few tokens."""
        if not request:
            return
        if request.attentions and self._config._attn_implementation != "eager":
            effect = "It is slower, and its memory grows with the square of the length."
            logger.warning("%s: switched to eager attention, which gives attention maps. %s", self._name, effect)
            self.model.set_attn_implementation("eager")
            if self._config._attn_implementation != "eager":
                raise ModelError(
                    f"{self._name}: expected a model that can be switched to eager attention, got one that cannot. It "
                    "gives no attention maps: use relations or hidden states."
                )
        lists = [path for path, _ in structure.layer_lists(self.model)]
        if len(lists) > 1 and any(isinstance(layer, int) for layer in request.hidden | request.exits):
            raise ModelError(
                f"{self._name}: expected one list of layers, whose outputs are hidden states, got {', '.join(lists)}, "
                "with parts of layers. Compare embeddings, last_hidden_state or relations."
            )
        if request.exits:
            self._final_norm = structure.find_final_norm(self.model, self._layers)
        if request.routers:
            routers = {i: structure.find_routers(self.model, self.layer(i)) for i in sorted(request.routers)}
            self._routers = {i: names for i, names in routers.items() if names}
        with undisturbed(self.model):
            _, activations = self.capture(request, partial(run, self.model, probe_batch(self.model)))
        # Only an adapter puts virtual tokens in front. What is longer without one has padding of the model's own.
        inside = activations.last(3) if hasattr(self.model, "peft_config") else activations
        vectors = {layer: vectors.queries for layer, vectors in inside.vectors.items()}
        for kind, tensors in (
            ("attention maps", activations.attentions),
            ("hidden states", inside.hidden),
            ("queries", vectors),
        ):
            for layer, tensor in tensors.items():
                expected = {
                    "attention maps": (2, tensor.shape[1], 3, 3),
                    "hidden states": (2, 3, self.shape.width),
                    "queries": (2, 3, tensor.shape[-1]),
                }[kind]
                if tensor.shape != expected:
                    raise ModelError(
                        f"{self._name}: expected {kind} of shape {list(expected)} from layer {layer} for 2 x 3 "
                        f"tokens, got {list(tensor.shape)}. Leave out terms that need them: this architecture, or an "
                        "adapter with virtual tokens, does not give them."
                    )

        rows = [len(logits[0]) for logits in activations.routers.values()]
        if request.routers and rows != [6] * max(len(rows), 1):
            raise ModelError(
                f"{self._name}: expected routers that give their logits for each token, got {rows or 'none'}. Leave "
                "out router_balance and router_match."
            )

    def capture(self, request: ActivationRequest, call: Callable[[], T]) -> tuple[T, Activations]:
        """Capture activations during a call that runs the model once; return its result too."""
        if not request:
            return call(), Activations()
        outputs: dict[tuple[str, Layer], Any] = {}
        with_gradient = torch.is_grad_enabled()

        def hook(key: tuple[str, Layer], _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if with_gradient and not torch.is_grad_enabled():
                raise ModelError(
                    f"{self._name}: expected activation checkpointing with use_reentrant false for terms over layers, "
                    "got reentrant. Set it in the kwargs of the checkpointing."
                )
            if key[1] == "embeddings":
                output = args or kwargs.get("hidden_states")
            elif key[1] == "last_hidden_state":  # the outermost module that has one comes last
                output = getattr(output, "last_hidden_state", outputs.get(key))
            outputs[key] = output

        def tensor(name: str, layer: Layer, place: int = 0) -> Tensor:
            output: Any = outputs.get((name, layer))
            parts = output if isinstance(output, tuple | list) else [output]
            if len(parts) <= place or not isinstance(parts[place], Tensor):
                raise ModelError(
                    f"{self._name}: expected {name} from layer {layer}, got none. Leave out terms that need it: this "
                    "architecture does not give it, or the layer did not run."
                )
            return parts[place]

        with ExitStack() as hooks:
            for key, module in self._modules(request):
                hooks.enter_context(module.register_forward_hook(partial(hook, key), with_kwargs=True))
            result = call()
        routers = [i for i in self._routers if i in request.routers]
        final_norm = self.model.get_submodule(self._final_norm) if self._final_norm else nn.Identity()
        return result, Activations(
            {i: tensor("hidden", i) for i in sorted(request.hidden, key=str)},
            {i: tensor("attention", i, 1) for i in sorted(request.attentions)},
            {i: self._vectors(tensor, i) for i in sorted(request.vectors)},
            {i: final_norm(tensor("hidden", i)) for i in sorted(request.exits)},
            {i: torch.stack([tensor(name, i, place) for name, place in self._routers[i]]) for i in routers},
        )

    def layer(self, i: int) -> nn.Module:
        return self.model.get_submodule(f"{self._layers}.{i}")

    def _modules(self, request: ActivationRequest) -> Iterator[tuple[tuple[str, Layer], nn.Module]]:
        for i in request.hidden | request.exits:
            if i == "last_hidden_state":  # of the model's body, which is around its layers
                paths = accumulate(["", *self._layers.split(".")[:-1]], lambda path, name: f"{path}.{name}".strip("."))
                yield from ((("hidden", i), self.model.get_submodule(path)) for path in paths)
            else:
                yield ("hidden", i), self.layer(0 if i == "embeddings" else i)
        for i in request.attentions:
            yield ("attention", i), self._attention(i)[0]
        for i in request.vectors:
            attention, names = self._attention(i)
            for name in names:
                yield (name, i), attention.get_submodule(name)
        for i, routers in self._routers.items():
            for name, _ in routers if i in request.routers else ():
                yield (name, i), self.layer(i).get_submodule(name)

    def _attention(self, i: int) -> tuple[nn.Module, tuple[str, ...]]:
        attention = structure.find_attention(self.layer(i))
        if attention is None:
            known = ", ".join("/".join(names) for names in structure.SEPARATE)
            raise ModelError(
                f"{self._name}: expected attention with projections called {known} or "
                f"{', '.join((*structure.STACKED, *structure.GROUPED))} in layer {i}, got none. Use hidden states: "
                "attention and relations are not known for this architecture."
            )
        return attention

    def _vectors(self, tensor: Callable[[str, int], Tensor], i: int) -> Vectors:
        _, names = self._attention(i)
        outputs = [tensor(name, i) for name in names]
        if len(outputs) == 3:
            return Vectors(*outputs)
        if self._config.model_type in structure.UNKNOWN_ORDER:
            raise ModelError(
                f"{self._name}: expected queries, keys and values in a known order, got {names[0]} in an order of "
                f"{self._config.model_type}'s own. Use another term than relations."
            )
        return Vectors(*structure.split_projection(outputs[0], self._config, names[0] in structure.GROUPED))
