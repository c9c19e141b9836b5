"""What goes on inside a model: its layers are found by name, and only those that are asked for are listened to.

Forward hooks are set for one call and taken off again, so that nothing is kept that nobody asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from potstill.errors import ModelError
from potstill.models.split import run, split_model, undisturbed

logger = logging.getLogger(__name__)

T = TypeVar("T")

# What models call the projections of their attention: three of them, or one for all.
SEPARATE = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("query_proj", "key_proj", "value_proj"),
    ("q", "k", "v"),
)
STACKED = ("c_attn", "qkv_proj", "Wqkv")  # all queries, all keys, all values
GROUPED = ("query_key_value",)  # by group of heads: its queries, its key, its value
OWN_ORDER = {"codegen", "gpt_bigcode"}  # fused in an order of their own


@dataclass(frozen=True)
class ActivationRequest:
    """What is asked of a model beside its logits, by layer from 0.

    Args:
        hidden: layers whose hidden states are.
        attentions: layers whose attention maps are.
        vectors: layers whose queries, keys and values are.
        exits: layers whose hidden states are, as the model's head would read them.
    """

    hidden: frozenset[int] = frozenset()
    attentions: frozenset[int] = frozenset()
    vectors: frozenset[int] = frozenset()
    exits: frozenset[int] = frozenset()

    def __or__(self, other: ActivationRequest) -> ActivationRequest:
        return ActivationRequest(
            self.hidden | other.hidden,
            self.attentions | other.attentions,
            self.vectors | other.vectors,
            self.exits | other.exits,
        )

    def __bool__(self) -> bool:
        return bool(self.hidden or self.attentions or self.vectors or self.exits)


class Vectors(NamedTuple):
    """What a layer's attention makes of a batch, all heads side by side, as its projections give it.

    That is before any norm and rotary embedding, and before keys and values are repeated for grouped queries.

    Args:
        queries: [B, T, Dq].
        keys: [B, T, Dk].
        values: [B, T, Dv].
    """

    queries: Tensor
    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class Activations:
    """What was heard, by layer.

    Args:
        hidden: [B, T, H] what the layer gives, before the model's last norm.
        attentions: [B, A, T, T] probabilities: how much each token looks at each.
        vectors: see `Vectors`.
        exits: [B, T, H] what the layer gives, behind the model's last norm.
    """

    hidden: dict[int, Tensor] = field(default_factory=dict)
    attentions: dict[int, Tensor] = field(default_factory=dict)
    vectors: dict[int, Vectors] = field(default_factory=dict)
    exits: dict[int, Tensor] = field(default_factory=dict)

    def last(self, length: int) -> Activations:
        """The last positions of each row, without those that prompt tuning puts in front; maps stay as they are."""
        return replace(
            self,
            hidden={i: each[:, -length:] for i, each in self.hidden.items()},
            vectors={i: Vectors(*(one[:, -length:] for one in each)) for i, each in self.vectors.items()},
        )

    def to(self, device: torch.device) -> Activations:
        """The same on a device."""
        return Activations(
            {i: each.to(device) for i, each in self.hidden.items()},
            {i: each.to(device) for i, each in self.attentions.items()},
            {i: Vectors(*(one.to(device) for one in each)) for i, each in self.vectors.items()},
            {i: each.to(device) for i, each in self.exits.items()},
        )


@dataclass(frozen=True)
class Anatomy:
    """The shape of a model, as far as terms must know it.

    Args:
        layers: how many.
        width: of its hidden states.
        heads: of its attention.
        narrowest: the width of its keys and values, all heads together.
        attention_dropout: the share of attention that training drops.
    """

    layers: int
    width: int
    heads: int
    narrowest: int
    attention_dropout: float


class ActivationCapture:
    """A model that can be listened to.

    Modules are found by name at each call, because wrappers (FSDP, activation checkpointing) take their places.

    Args:
        model: a model of transformers, decoder or encoder.

    Raises:
        ModelError: its list of layers is not found.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        config = getattr(model, "config", None)
        if config is None or config.is_encoder_decoder:
            raise ModelError(
                f"{_kind(model)}: expected a decoder or an encoder of transformers to look into, got none."
            )
        self._config = config.get_text_config()
        self._last_norm = ""
        depth = self._config.num_hidden_layers
        lists = [(name, len(each)) for name, each in model.named_modules() if isinstance(each, nn.ModuleList)]
        self._layers = next((name for name, length in lists if length == depth), None)
        if self._layers is None:
            found = ", ".join(f"{name} ({length})" for name, length in lists) or "none"
            raise ModelError(f"{_kind(model)}: expected a list of its {depth} layers, got lists of modules: {found}.")

    @property
    def anatomy(self) -> Anatomy:
        """The model's shape."""
        config = self._config
        heads = config.num_attention_heads
        head_width = getattr(config, "head_dim", None) or config.hidden_size // heads
        names = ("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop", "attn_dropout")
        return Anatomy(
            layers=config.num_hidden_layers,
            width=config.hidden_size,
            heads=heads,
            narrowest=head_width * (getattr(config, "num_key_value_heads", None) or heads),
            attention_dropout=max(float(getattr(config, name, 0.0) or 0.0) for name in names),
        )

    def prepare(self, needs: ActivationRequest) -> None:
        """Make the model fit to be asked, and prove it on a few tokens; it is left as it was otherwise.

        Attention maps exist only where attention is computed the plain way: the model is switched to it.

        Raises:
            ModelError: the model does not give what is asked for.
        """
        if not needs:
            return
        if needs.attentions and self.model.config._attn_implementation != "eager":
            logger.warning(
                "%s: attention is computed the plain way (eager) from now on, because its maps are asked for; "
                "it is slower and its memory grows with the square of the length.",
                _kind(self.model),
            )
            self.model.set_attn_implementation("eager")
            if self.model.config._attn_implementation != "eager":
                raise ModelError(
                    f"{_kind(self.model)}: expected a model whose attention can be switched to the plain way, got one "
                    "whose cannot. Its maps are not to be had; relations and hidden states are."
                )
        rows = self.model.get_input_embeddings().weight
        batch = {
            "input_ids": torch.arange(6, device=rows.device).reshape(2, 3) % len(rows),
            "attention_mask": torch.ones(2, 3, dtype=torch.long, device=rows.device),
        }
        if needs.exits:
            self._last_norm = self._find_last_norm(batch)
        with undisturbed(self.model):
            _, heard = self.capture(needs, partial(run, self.model, batch))
        heard = heard.last(3)
        for kind, found in (("attention maps", heard.attentions), ("hidden states", heard.hidden)):
            for layer, each in found.items():
                expected = (2, each.shape[1], 3, 3) if kind == "attention maps" else (2, 3, self.anatomy.width)
                if each.shape != expected:
                    raise ModelError(
                        f"{_kind(self.model)}: expected {kind} of shape {list(expected)} from layer {layer} for 2 x 3 "
                        f"tokens, got {list(each.shape)}. Terms that need them do not work with this architecture, nor "
                        "do maps with tokens that an adapter puts in front: the teacher has none to look at."
                    )

    def capture(self, needs: ActivationRequest, call: Callable[[], T]) -> tuple[T, Activations]:
        """Run the model and listen.

        Args:
            needs: what to listen to.
            call: what runs the model once.

        Returns:
            What the call returns, and what was heard.

        Raises:
            ModelError: something was not heard.
        """
        if not needs:
            return call(), Activations()
        heard: dict[tuple[str, int], Any] = {}
        graded = torch.is_grad_enabled()

        def hook(key: tuple[str, int], _: nn.Module, inputs: Any, output: Any) -> None:
            if graded and not torch.is_grad_enabled():
                raise ModelError(
                    f"{_kind(self.model)}: expected activation checkpointing that is not reentrant where attention is "
                    "learnt from, got reentrant. Set its use_reentrant to false in the kwargs of the checkpointing."
                )
            heard[key] = output

        handles = [module.register_forward_hook(partial(hook, key)) for key, module in self._modules(needs)]
        try:
            result = call()
        finally:
            for handle in handles:
                handle.remove()
        return result, Activations(
            {i: self._tensor(heard, ("hidden", i), 0) for i in sorted(needs.hidden)},
            {i: self._tensor(heard, ("attention", i), 1) for i in sorted(needs.attentions)},
            {i: self._vectors(heard, i) for i in sorted(needs.vectors)},
            {i: self._behind_last_norm(self._tensor(heard, ("hidden", i), 0)) for i in sorted(needs.exits)},
        )

    def _modules(self, needs: ActivationRequest) -> Iterator[tuple[tuple[str, int], nn.Module]]:
        """Each module to listen to, and what it says."""
        for i in needs.hidden | needs.exits:
            yield ("hidden", i), self.layer(i)
        for i in needs.attentions:
            yield ("attention", i), self._attention(i)[0]
        for i in needs.vectors:
            attention, names = self._attention(i)
            for name in names:
                yield (name, i), attention.get_submodule(name)

    def layer(self, i: int) -> nn.Module:
        """The layer of that number, from 0."""
        found: nn.Module = self.model.get_submodule(f"{self._layers}.{i}")
        return found

    def _behind_last_norm(self, states: Tensor) -> Tensor:
        if not self._last_norm:
            return states
        normed: Tensor = self.model.get_submodule(self._last_norm)(states)
        return normed

    def _find_last_norm(self, batch: Mapping[str, Tensor]) -> str:
        """The name of what stands between the last layer and the head, by what goes in and out; "" for nothing.

        Raises:
            ModelError: it is not one module, or the head is not plain.
        """
        how = split_model(self.model)
        if how is None or how.between:
            raise ModelError(
                f"{_kind(self.model)}: expected a model with a plain head right behind its last norm, got another. Its "
                "earlier layers cannot be read through it. Leave out the term, or the adapter on the head."
            )
        seen: list[tuple[str, Tensor, Tensor]] = []

        def hook(name: str, _: nn.Module, inputs: Any, output: Any) -> None:
            if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
                seen.append((name, inputs[0], output))

        outside = [
            (name, module)
            for name, module in self.model.named_modules()
            if name.startswith(f"{how.body}.") and not name.startswith(f"{self._layers}.")
        ]
        handles = [module.register_forward_hook(partial(hook, name)) for name, module in outside]
        last = ActivationRequest(hidden=frozenset([self.anatomy.layers - 1]))
        try:
            with undisturbed(self.model):
                body = self.model.get_submodule(how.body)
                final, inside = self.capture(last, lambda: run(body, batch).last_hidden_state)
        finally:
            for handle in handles:
                handle.remove()
        (state,) = inside.hidden.values()
        if torch.equal(state, final):
            return ""
        for name, before, after in seen:
            if torch.equal(before, state) and torch.equal(after, final):
                return name
        raise ModelError(
            f"{_kind(self.model)}: expected one norm between its last layer and its head, got something else. Its "
            "earlier layers cannot be read through its head."
        )

    def _attention(self, i: int) -> tuple[nn.Module, tuple[str, ...]]:
        """A layer's attention, and the names of what projects to queries, keys and values."""
        for name, module in self.layer(i).named_modules():
            if "cross" in name.lower():
                continue
            children = dict(module.named_children())
            for names in (*SEPARATE, *((fused,) for fused in (*STACKED, *GROUPED))):
                if all(each in children for each in names):
                    return module, names
        known = ", ".join("/".join(names) for names in SEPARATE)
        raise ModelError(
            f"{_kind(self.model)}: expected attention with projections called {known}, {', '.join(STACKED)} or "
            f"{', '.join(GROUPED)} in layer {i}, got none. Attention and relations are not known for this "
            "architecture; hidden states are."
        )

    def _tensor(self, heard: Mapping[tuple[str, int], Any], key: tuple[str, int], place: int) -> Tensor:
        """What a module gave: a tensor, or one in a tuple of them."""
        said = heard.get(key)
        if isinstance(said, tuple | list):
            said = said[place] if len(said) > place else None
        elif place:
            said = None
        if not isinstance(said, Tensor):
            raise ModelError(
                f"{_kind(self.model)}: expected {key[0]} from layer {key[1]}, got none. "
                "The layer did not run, or this architecture does not give it."
            )
        return said

    def _vectors(self, heard: Mapping[tuple[str, int], Any], i: int) -> Vectors:
        _, names = self._attention(i)
        said = [self._tensor(heard, (name, i), 0) for name in names]
        if len(said) == 3:
            return Vectors(*said)
        if self._config.model_type in OWN_ORDER:
            raise ModelError(
                f"{_kind(self.model)}: expected queries, keys and values in a known order, got {names[0]} in an order "
                f"of {self._config.model_type}'s own. Use another term than relations."
            )
        return _unfused(said[0], self._config, grouped=names[0] in GROUPED)


def _unfused(fused: Tensor, config: Any, grouped: bool) -> Vectors:
    """Queries, keys and values of one projection; how many keys there are follows from its width."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    keys = (fused.shape[-1] // width - heads) // 2
    if grouped:
        by_group = fused.unflatten(-1, (keys, heads // keys + 2, width))
        parts = by_group[..., :-2, :], by_group[..., -2, :], by_group[..., -1, :]
        return Vectors(*(part.flatten(2) for part in parts))
    return Vectors(*fused.split([heads * width, keys * width, keys * width], dim=-1))


def _kind(model: Any) -> str:
    return type(model).__name__
