"""Adapters: LoRA, IA3, prompt and prefix tuning of a frozen model. Each kind is a recipe's `student.adapter`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from potstill.errors import ModelError, UserError, nearest
from potstill.losses.alignment import Task
from potstill.losses.declared import Declared, NonEmpty, Range
from potstill.models.adapted import is_adapted
from potstill.models.loading import sequence_head_names, suppress_warnings
from potstill.models.locate import require_package
from potstill.models.structure import find_structure, is_linear, is_transposed

Names = Annotated[Sequence[str], NonEmpty()]


@dataclass(frozen=True)
class Adapter(Declared):
    """Parameters that are trained beside or within a frozen model.

    Args:
        dtype: precision of the frozen model, where a recipe loads it; auto is that of the saved weights.
        merge: export the plain model that computes the same, not the adapter.
    """

    tasks: ClassVar[frozenset[Task] | None] = None  # None for all
    checkpointing: ClassVar[bool] = True  # whether it works with activation checkpointing
    _: KW_ONLY
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    merge: bool = False

    @property
    @abstractmethod
    def title(self) -> str:
        """The adapter in words, for reports."""

    @property
    def base_bits(self) -> int | None:
        """Bits to which a recipe quantizes the frozen model."""
        return None

    @abstractmethod
    def peft_config(self, model: PreTrainedModel) -> Any:
        """Make the peft.PeftConfig for a model; a UserError says why the adapter does not go with it."""

    def initialize(self, model: Any, tokenizer: PreTrainedTokenizerBase | None) -> None:  # most need none
        """Set the first weights of a PeftModel, where peft's own are not the best."""


@dataclass(frozen=True)
class Lora(Adapter):
    """A product of two thin matrices beside each linear layer.

        y = W x + alpha / rank * B A x,   A [rank, in] random, B [out, rank] 0 at first

    Args:
        rank: of the product.
        alpha: the product is scaled by alpha / rank; 2 rank by default.
        dropout: of the product's input in training.
        target_modules: names, or ends of names, of linear layers; by default all but the head.
        bias: which biases of the model are trained too; lora_only: those of layers with an adapter. Without the adapter
            the model is then no longer the original.

    References:
        Hu et al. 2021, arXiv 2106.09685; all linear layers: Dettmers et al. 2023 (QLoRA), arXiv 2305.14314, section 4.
    """

    rank: Annotated[int, Range(ge=1)] = 16
    alpha: Annotated[float | None, Range(gt=0)] = None
    dropout: Annotated[float, Range(ge=0, lt=1)] = 0.0
    target_modules: Names | None = None
    bias: Literal["none", "all", "lora_only"] = "none"
    name = "lora"

    @property
    def title(self) -> str:
        return f"LoRA of rank {self.rank}"

    def peft_config(self, model: PreTrainedModel) -> Any:
        layers = linear_layers(model)
        chosen = [*layers] if self.target_modules is None else _choose(layers, self.target_modules, "target_modules")
        smaller_side = {name: _smaller_side(layers[name]) for name in chosen}
        narrowest, most = min(smaller_side.items(), key=itemgetter(1))
        if self.rank > most:
            raise ModelError(
                f"student.adapter.rank: expected 1..{most}, the smaller side of {narrowest}, got {self.rank}. Lower "
                "it, or leave that layer out of target_modules."
            )
        biased = model.modules() if self.bias == "all" else (layers[name] for name in chosen)
        if self.bias != "none" and all(getattr(layer, "bias", None) is None for layer in biased):
            raise ModelError(
                f"student.adapter.bias: expected none for {type(model).__name__}, got {self.bias}. There are no biases "
                "to train: leave it out."
            )
        common, alpha = _common(model, layers, chosen), 2 * self.rank if self.alpha is None else self.alpha
        return _peft().LoraConfig(**common, r=self.rank, bias=self.bias, lora_alpha=alpha, lora_dropout=self.dropout)


@dataclass(frozen=True)
class Qlora(Lora):
    """LoRA over a quantized model.

    Args:
        bits: 4 is nf4 with double quantization; 8 is int8.

    References:
        Dettmers et al. 2023, arXiv 2305.14314.
    """

    bits: Literal[4, 8] = 4
    name = "qlora"

    @property
    def title(self) -> str:
        return f"{super().title} over {self.bits} bits"

    @property
    def base_bits(self) -> int | None:
        return self.bits


@dataclass(frozen=True)
class Ia3(Adapter):
    """A factor, 1 at first, on each key, value and unit of the feed-forward networks.

    Args:
        target_modules: names, or ends of names, of linear layers; by default those that make keys and values, and those
            that read the units. Where one layer makes queries too, they are scaled with keys and values.
        feedforward_modules: those of target_modules whose input is scaled, not their output; by default those that read
            the units, or none where target_modules is given.

    References:
        Liu et al. 2022, arXiv 2205.05638.
    """

    target_modules: Names | None = None
    feedforward_modules: Names | None = None
    name = "ia3"

    @property
    def title(self) -> str:
        return "IA3"

    def peft_config(self, model: PreTrainedModel) -> Any:
        layers = linear_layers(model)
        names, scaled_inputs = (self.target_modules, ()) if self.target_modules else _keys_values_units(model)
        chosen = _choose(layers, names, "target_modules")
        among = {name: layers[name] for name in chosen}
        scaled = _choose(among, self.feedforward_modules or scaled_inputs, "feedforward_modules")
        return _peft().IA3Config(**_common(model, layers, chosen), feedforward_modules=scaled)


@dataclass(frozen=True)
class Prompt(Adapter):
    """Trained embeddings of virtual tokens in front of every row.

    Args:
        virtual_tokens: number of them; each takes a position of the model.
        text: whose embeddings they start from, cut or repeated; random tokens by default.

    References:
        Lester et al. 2021, arXiv 2104.08691.
    """

    tasks = frozenset({"causal"})
    peft_class: ClassVar[str] = "PromptTuningConfig"
    virtual_tokens: Annotated[int, Range(ge=1)] = 20
    text: str | None = None
    name = "prompt"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.merge:
            raise ModelError("expected no merge, got one: virtual tokens are not weights of the model.")

    @property
    def title(self) -> str:
        return f"a {self.name} of {self.virtual_tokens} tokens"

    def peft_config(self, model: PreTrainedModel) -> Any:
        if not model.can_generate():
            raise ModelError(
                f"student.adapter: expected a causal language model for {self.name}, got {type(model).__name__}: "
                "virtual tokens would take the places of its own first ones. Use lora or ia3."
            )
        return getattr(_peft(), self.peft_class)(task_type="CAUSAL_LM", num_virtual_tokens=self.virtual_tokens)

    @torch.no_grad()
    def initialize(self, model: Any, tokenizer: PreTrainedTokenizerBase | None) -> None:
        base = model.get_base_model()
        _prompt_weight(model).copy_(base.get_input_embeddings()(self._first_ids(base, tokenizer)))

    def _first_ids(self, base: Any, tokenizer: PreTrainedTokenizerBase | None) -> Tensor:
        """The ids of the text, or of random tokens: [virtual_tokens]."""
        embeddings, count = base.get_input_embeddings().weight, self.virtual_tokens
        if self.text is None:
            return torch.randint(len(embeddings), (count,)).to(embeddings.device)
        ids = [] if tokenizer is None else tokenizer(self.text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise UserError(f"student.adapter.text: expected words that a tokenizer knows, got {self.text!r}.")
        return torch.tensor((ids * count)[:count], device=embeddings.device)


@dataclass(frozen=True)
class Prefix(Prompt):
    """Trained keys and values, in every layer, of virtual tokens in front of every row.

    They start from the model's own keys and values of a text, or of random tokens; no network makes them.

    References:
        Li and Liang 2021, arXiv 2101.00190; section 7.4 for the start.
    """

    checkpointing = False
    peft_class = "PrefixTuningConfig"
    name = "prefix"

    @torch.no_grad()
    def initialize(self, model: Any, tokenizer: PreTrainedTokenizerBase | None) -> None:
        base, weight = model.get_base_model().eval(), _prompt_weight(model)
        cache = base(input_ids=self._first_ids(base, tokenizer)[None], use_cache=True).past_key_values
        vectors = [x for layer in cache.layers for x in (layer.keys, layer.values)]  # [1, heads, tokens, width] each
        if len({x.shape for x in vectors}) > 1 or sum(x.numel() for x in vectors) != weight.numel():
            raise ModelError(
                f"student.adapter: expected layers with keys and values of one shape for prefix, got "
                f"{type(base).__name__}, whose layers differ. Use prompt or lora."
            )
        weight.copy_(torch.cat(vectors).permute(2, 0, 1, 3).flatten(1))


def adapter_conflicts(adapter: Adapter | None, task: Task, train: Mapping[str, Any]) -> Iterator[str]:
    """Check an adapter against a recipe's task and training arguments: a line for each mistake."""
    if adapter is None:
        return
    fitting = [name for name, kind in Adapter.kinds.items() if kind.tasks is None or task in kind.tasks]
    if adapter.name not in fitting:
        yield f"student.adapter: expected {', '.join(fitting)} for the task {task}, got {adapter.name}."
    if not adapter.checkpointing and any(train.get(f"{name}_checkpointing") for name in ("gradient", "activation")):
        yield (
            f"student.adapter: expected no checkpointing of activations with {adapter.name}, got it in train. Layers "
            "that are recomputed read no cache, and the prefix is one: use prompt or lora, or leave it out."
        )


def adapt(
    model: PreTrainedModel, adapter: Adapter, *, seed: int = 0, tokenizer: PreTrainedTokenizerBase | None = None
) -> Any:
    """Freeze a model and add an adapter, which alone is trained; a sequence-level head is trained too.

    The model is changed in place, `seed` is of the first weights, and the tokenizer reads the text that a prompt or
    prefix starts from. The result is a peft.PeftModel: `disable_adapter()` gives the model as it was.

    Raises:
        UserError: peft is not installed, or the adapter does not go with the model.
    """
    peft = _peft()
    if is_adapted(model) or getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError(
            "student.adapter: expected a plain model to put it on, got one that has an adapter. "
            "Merge that first (student.adapter.merge: true), or leave student.adapter out to train it further."
        )
    training = model.training
    with suppress_warnings(), torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = peft.get_peft_model(model, adapter.peft_config(model))
        adapter.initialize(adapted, tokenizer)
    for config in adapted.peft_config.values():
        folder = model.name_or_path  # absolute, so that the adapter finds its base from anywhere
        config.base_model_name_or_path = str(Path(folder).resolve()) if folder and Path(folder).is_dir() else folder
    return adapted.train(training)


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The linear layers of a model's body, all but its head, by name."""
    body, head = {*model.base_model.modules()}, model.get_output_embeddings()
    for name in sequence_head_names(model):
        body -= {*model.get_submodule(name).modules()}
    body.discard(head)
    return {name: module for name, module in model.named_modules() if module in body and is_linear(module)}


def _common(model: PreTrainedModel, layers: Mapping[str, nn.Module], chosen: Iterable[str]) -> dict[str, Any]:
    """The fields that peft's configs for chosen linear layers share."""
    heads = sequence_head_names(model)
    return {
        "task_type": "CAUSAL_LM" if model.can_generate() else "SEQ_CLS" if heads else None,
        "modules_to_save": heads or None,
        "target_modules": chosen,
        "fan_in_fan_out": any(is_transposed(layers[name]) for name in chosen),
    }


def _keys_values_units(model: PreTrainedModel) -> tuple[Sequence[str], Sequence[str]]:
    """Ends of the names of layers that make keys and values or read units, and of the latter alone."""
    try:
        matrices = find_structure(model).matrices
    except ModelError:
        raise ModelError(
            f"student.adapter: expected a model whose keys, values and feed-forward units are known for ia3, got "
            f"{type(model).__name__}. Name its layers with target_modules and feedforward_modules, or use lora."
        ) from None
    return sorted({matrices.key, matrices.value, matrices.down}), (matrices.down,)


def _choose(layers: Mapping[str, nn.Module], ends: Sequence[str], key: str) -> list[str]:
    """Choose layers by the ends of their names; peft's own matching would match other modules too."""
    chosen: set[str] = set()
    for end in ends:
        matching = {name for name in layers if name == end or name.endswith(f".{end}")}
        if not matching:
            last = sorted({name.rpartition(".")[2] for name in layers})
            raise ModelError(
                f"student.adapter.{key}: expected linear layers of the model's body ({', '.join(last[:12])}), "
                f"got {end}.{nearest(end, {*last, *layers})}"
            )
        chosen |= matching
    return sorted(chosen)


def _smaller_side(layer: Any) -> int:
    """The smaller number of inputs and outputs; the shape of a quantized weight does not give it."""
    return min((layer.nx, layer.nf) if is_transposed(layer) else (layer.in_features, layer.out_features))


def _peft() -> Any:
    return require_package("peft", "adapters", "student.adapter")


def _prompt_weight(model: Any) -> Any:
    return model.prompt_encoder[model.active_adapter].embedding.weight
