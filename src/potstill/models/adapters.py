"""Adapters: a few parameters are trained beside or within a frozen model. LoRA, IA3, prefix and prompt tuning."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from potstill.errors import ModelError, UserError, nearest
from potstill.models.adapted import is_adapted, judging, require_peft, suppress_peft_warnings
from potstill.models.anatomy import anatomy_of


class Adapter(ABC):
    """What is trained beside or within a frozen model."""

    @abstractmethod
    def config(self, model: PreTrainedModel) -> Any:
        """Its peft.PeftConfig for a model.

        Raises:
            UserError: it does not go with the model.
        """

    def begin(self, model: Any, tokenizer: PreTrainedTokenizerBase | None) -> None:  # noqa: B027  # most need nothing
        """Change the first weights of a PeftModel, where peft's own are not the best."""


@dataclass(frozen=True)
class Lora(Adapter):
    """A product of two thin matrices beside each linear layer.

        y = W x + alpha / rank * B A x,   A [rank, in] random, B [out, rank] 0 at first

    Args:
        rank: >= 1.
        alpha: None for 2 * rank.
        dropout: of x, in training.
        target_modules: names or ends of names of linear layers; None for all of the model's body.
        bias: which biases of the model are trained too: none, those of the layers that have an adapter (lora_only), or
            all. The model without the adapter is then no longer what it was.

    References:
        Hu et al. 2021, arXiv 2106.09685; all linear layers: Dettmers et al. 2023 (QLoRA), arXiv 2305.14314, section 4.
    """

    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: Sequence[str] | None = None
    bias: Literal["none", "all", "lora_only"] = "none"

    def config(self, model: PreTrainedModel) -> Any:
        """See `Adapter`."""
        layers = linear_layers(model)
        chosen = [*layers] if self.target_modules is None else _chosen(layers, self.target_modules, "target_modules")
        sides = {name: min(_sides(layers[name])) for name in chosen}
        narrowest = min(sides, key=lambda name: sides[name])
        if not 1 <= self.rank <= sides[narrowest]:
            raise ModelError(
                f"student.adapter.rank: expected 1..{sides[narrowest]}, the smaller side of {narrowest}, got "
                f"{self.rank}. No such matrix has a higher rank. Lower it, or leave that layer out of target_modules."
            )
        biased = model.modules() if self.bias == "all" else (layers[name] for name in chosen)
        if self.bias != "none" and all(getattr(layer, "bias", None) is None for layer in biased):
            raise ModelError(
                f"student.adapter.bias: expected none for {type(model).__name__}, got {self.bias}. There are no biases "
                "to train. Leave it out."
            )
        return require_peft("student.adapter").LoraConfig(
            task_type=_task(model),
            modules_to_save=judging(model) or None,
            r=self.rank,
            bias=self.bias,
            lora_alpha=2 * self.rank if self.alpha is None else self.alpha,
            lora_dropout=self.dropout,
            target_modules=chosen,
            fan_in_fan_out=_is_turned(layers, chosen),
        )


@dataclass(frozen=True)
class Ia3(Adapter):
    """A factor, 1 at first, on each key, value and unit of the feed-forward networks.

    Args:
        target_modules: names or ends of names of linear layers; None for those that make keys and values, and for those
            that read the units. Where one layer makes queries too, they are scaled with keys and values.
        feedforward_modules: which of them are scaled in what they read, not in what they make; None for those that read
            the units, where target_modules is None, and none of them elsewhere.

    References:
        Liu et al. 2022, arXiv 2205.05638.
    """

    target_modules: Sequence[str] | None = None
    feedforward_modules: Sequence[str] | None = None

    def config(self, model: PreTrainedModel) -> Any:
        """See `Adapter`."""
        layers = linear_layers(model)
        names, read = (self.target_modules, ()) if self.target_modules is not None else _keys_values_units(model)
        read = self.feedforward_modules if self.feedforward_modules is not None else read
        chosen = _chosen(layers, names, "target_modules")
        return require_peft("student.adapter").IA3Config(
            task_type=_task(model),
            modules_to_save=judging(model) or None,
            target_modules=chosen,
            feedforward_modules=_chosen({name: layers[name] for name in chosen}, read, "feedforward_modules"),
            fan_in_fan_out=_is_turned(layers, chosen),
        )


@dataclass(frozen=True)
class Prompt(Adapter):
    """Embeddings of tokens that stand in front of every row.

    They begin as those of a text, or of random tokens.

    Args:
        virtual_tokens: how many; each takes a position.
        text: how they begin: cut, or repeated.

    References:
        Lester et al. 2021, arXiv 2104.08691.
    """

    virtual_tokens: int = 20
    text: str | None = None

    def config(self, model: PreTrainedModel) -> Any:
        """See `Adapter`."""
        peft = require_peft("student.adapter")
        return peft.PromptTuningConfig(task_type=_task(model, "prompt"), num_virtual_tokens=self.virtual_tokens)

    @torch.no_grad()
    def begin(self, model: Any, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """See `Adapter`."""
        base = model.get_base_model()
        weight = _encoder(model).embedding.weight
        weight.copy_(base.get_input_embeddings()(_first_ids(base, self.virtual_tokens, self.text, tokenizer)))


@dataclass(frozen=True)
class Prefix(Adapter):
    """Keys and values, in every layer, of tokens that stand in front of every row.

    They begin as what the model makes of a text, or of random tokens, and are trained themselves: there is no network
    that makes them.

    Args:
        virtual_tokens: see `Prompt`.
        text: see `Prompt`.

    References:
        Li and Liang 2021, arXiv 2101.00190; section 7.4 for the beginning.
    """

    virtual_tokens: int = 20
    text: str | None = None

    def config(self, model: PreTrainedModel) -> Any:
        """See `Adapter`."""
        peft = require_peft("student.adapter")
        return peft.PrefixTuningConfig(task_type=_task(model, "prefix"), num_virtual_tokens=self.virtual_tokens)

    @torch.no_grad()
    def begin(self, model: Any, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """See `Adapter`."""
        base, weight = model.get_base_model().eval(), _encoder(model).embedding.weight
        ids = _first_ids(base, self.virtual_tokens, self.text, tokenizer)
        cache = base(input_ids=ids[None], use_cache=True).past_key_values
        made = [x for layer in cache.layers for x in (layer.keys, layer.values)]  # [1, heads, tokens, width] each
        if len({x.shape for x in made}) > 1 or sum(x.numel() for x in made) != weight.numel():
            raise ModelError(
                f"student.adapter: expected layers with keys and values of one shape for prefix, got "
                f"{type(base).__name__}, whose layers differ. Use prompt or lora."
            )
        weight.copy_(torch.cat(made).permute(2, 0, 1, 3).flatten(1))


def adapt(
    model: PreTrainedModel, adapter: Adapter, *, seed: int = 0, tokenizer: PreTrainedTokenizerBase | None = None
) -> Any:
    """Freeze a model and put an adapter on it, which alone is trained, with the head that judges rows if there is one.

    Args:
        model: a model of transformers; it is changed in place.
        adapter: `Lora`, `Ia3`, `Prompt` or `Prefix`.
        seed: of its first weights.
        tokenizer: reads the text that a prompt or prefix begins with.

    Returns:
        A peft.PeftModel: `disable_adapter()` gives the model as it was.

    Raises:
        UserError: peft is not there, or the adapter does not go with the model.
    """
    peft = require_peft("student.adapter")
    if is_adapted(model) or getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError(
            "student.adapter: expected a plain model to put it on, got one that has an adapter. "
            "Merge that first (student.adapter.merge: true), or go on training it: leave student.adapter out."
        )
    training = model.training
    with suppress_peft_warnings(), torch.random.fork_rng():
        torch.manual_seed(seed)
        made = peft.get_peft_model(model, adapter.config(model))
        adapter.begin(made, tokenizer)
    for config in made.peft_config.values():
        config.base_model_name_or_path = _lasting(model.name_or_path)
    return made.train(training)


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The linear layers of a model's body, by name: all but its head."""
    body, head = {*model.base_model.modules()}, model.get_output_embeddings()
    for name in judging(model):
        body -= {*model.get_submodule(name).modules()}
    named = {name: module for name, module in model.named_modules() if module in body and module is not head}
    return {name: module for name, module in named.items() if isinstance(module, nn.Linear | Conv1D)}


def _task(model: PreTrainedModel, causal: str | None = None) -> str | None:
    """What peft calls the model's task, None where it has no word; `causal` is a kind for causal language models."""
    if model.can_generate():
        return "CAUSAL_LM"
    if causal is not None:
        raise ModelError(
            f"student.adapter: expected a causal language model for {causal}, got {type(model).__name__}: tokens in "
            "front would take the places of its own first ones. Use lora or ia3."
        )
    return "SEQ_CLS" if judging(model) else None


def _keys_values_units(model: PreTrainedModel) -> tuple[Sequence[str], Sequence[str]]:
    """The ends of the names of what makes keys and values and reads units, and of the last alone."""
    try:
        parts = anatomy_of(model).parts
    except ModelError:
        raise ModelError(
            f"student.adapter: expected a model whose keys, values and feed-forward units are known for ia3, got "
            f"{type(model).__name__}. Name its layers with target_modules and feedforward_modules, or use lora."
        ) from None
    return sorted({parts.key, parts.value, parts.down}), (parts.down,)


def _chosen(layers: Mapping[str, nn.Module], ends: Sequence[str], key: str) -> list[str]:
    """The layers whose names end in one of some words; peft is given whole names, because ends may fit others too."""
    chosen: set[str] = set()
    for end in ends:
        found = {name for name in layers if name == end or name.endswith(f".{end}")}
        if not found:
            last = sorted({name.rpartition(".")[2] for name in layers})
            raise ModelError(
                f"student.adapter.{key}: expected linear layers of the model's body ({', '.join(last[:12])}), "
                f"got {end}.{nearest(end, {*last, *layers})}"
            )
        chosen |= found
    return sorted(chosen)


def _sides(layer: Any) -> tuple[int, int]:
    """In and out; a quantised weight has another shape, and Conv1D no name for it."""
    return (layer.nx, layer.nf) if isinstance(layer, Conv1D) else (layer.in_features, layer.out_features)


def _is_turned(layers: Mapping[str, nn.Module], chosen: Iterable[str]) -> bool:
    return any(isinstance(layers[name], Conv1D) for name in chosen)


def _encoder(model: Any) -> Any:
    return model.prompt_encoder[model.active_adapter]


def _first_ids(base: Any, wanted: int, text: str | None, tokenizer: PreTrainedTokenizerBase | None) -> Tensor:
    """[wanted] ids of a text, or of random tokens."""
    rows = base.get_input_embeddings().weight
    if text is None:
        return torch.randint(len(rows), (wanted,)).to(rows.device)
    ids = [] if tokenizer is None else tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise UserError(f"student.adapter.text: expected words that a tokenizer knows, got {text!r}.")
    return torch.tensor((ids * wanted)[:wanted], device=rows.device)


def _lasting(where: str | None) -> str | None:
    """A folder's path from the root, so that the adapter finds its base from anywhere; a name on the hub as it is."""
    return str(Path(where).resolve()) if where and Path(where).is_dir() else where
