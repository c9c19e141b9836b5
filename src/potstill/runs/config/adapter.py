"""What is trained of the student, where it is not all of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from potstill.losses.alignment import Task
from potstill.runs.config.document import Part

Targets = Annotated[list[str], Field(min_length=1)]


class FrozenPart(Part):
    """What every adapter says of the model under it."""

    kind: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="precision of the frozen model; auto is the one it is saved in"
    )


class LoraPart(FrozenPart):
    """A product of two thin matrices beside each linear layer."""

    kind: Literal["lora"]
    rank: int = Field(16, ge=1, description="of the product")
    alpha: float | None = Field(None, gt=0, description="the product weighs alpha / rank; 2 rank unless said otherwise")
    dropout: float = Field(0.0, ge=0, lt=1, description="of what the product reads")
    target_modules: Targets | None = Field(
        None, description="names, or ends of names, of linear layers; by default all but the head"
    )
    bias: Literal["none", "all", "lora_only"] = Field(
        "none", description="which biases of the model are trained too; lora_only: of the layers with an adapter"
    )
    merge: bool = Field(False, description="export the plain model that computes the same, not the adapter")

    @property
    def title(self) -> str:
        """What people call it; likewise below."""
        return f"LoRA of rank {self.rank}"


class QloraPart(LoraPart):
    """LoRA over a model that is rounded to a few bits."""

    kind: Literal["qlora"]  # type: ignore[assignment]  # each kind is one word
    bits: Literal[4, 8] = Field(4, description="4 is nf4, twice quantised; 8 is int8")

    @property
    def title(self) -> str:
        return f"{super().title} over {self.bits} bits"


class Ia3Part(FrozenPart):
    """A factor on each key, value and unit of the feed-forward networks."""

    kind: Literal["ia3"]
    target_modules: Targets | None = Field(None, description="as for lora; by default found")
    feedforward_modules: Targets | None = Field(
        None, description="those of target_modules that are scaled in what they read; by default found"
    )
    merge: bool = Field(False, description="as for lora")

    @property
    def title(self) -> str:
        return "IA3"


class PromptPart(FrozenPart):
    """Trained embeddings of tokens in front of every row."""

    kind: Literal["prompt"]
    virtual_tokens: int = Field(20, ge=1, description="how many; each takes a position of the model")
    text: str | None = Field(None, min_length=1, description="how they begin; random tokens unless it is given")

    @model_validator(mode="before")
    @classmethod
    def _nothing_to_merge(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("merge"):
            raise ValueError("expected no merge, got one: tokens in front of a row are no weights of the model")
        return values

    @property
    def title(self) -> str:
        return f"a {self.kind} of {self.virtual_tokens} tokens"


class PrefixPart(PromptPart):
    """Trained keys and values, in every layer, of tokens in front of every row."""

    kind: Literal["prefix"]  # type: ignore[assignment]  # as above


def _named_kind(value: Any) -> Any:
    """`lora` is short for `{kind: lora}`."""
    return {"kind": value} if isinstance(value, str) else value


AdapterPart = Annotated[
    LoraPart | QloraPart | Ia3Part | PromptPart | PrefixPart, Field(discriminator="kind"), BeforeValidator(_named_kind)
]


def adapter_misfits(adapter: AdapterPart | None, task: Task, train: Mapping[str, Any]) -> Iterator[str]:
    """What does not go with an adapter, each mistake as a line that begins with its key."""
    if adapter is None:
        return
    if task != "causal" and isinstance(adapter, PromptPart):
        yield (
            f"student.adapter: expected lora, qlora or ia3 for the task {task}, got {adapter.kind}. Tokens in front "
            "would take the places of the model's own first ones."
        )
    if adapter.kind == "prefix" and any(train.get(f"{name}_checkpointing") for name in ("gradient", "activation")):
        yield (
            "student.adapter: expected no checkpointing of activations with prefix, got it in train. Layers that are "
            "computed again read no cache, and the prefix is one. Use prompt or lora, or leave it out."
        )
