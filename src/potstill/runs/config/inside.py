"""Terms that look inside of teacher and student."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from potstill.models.layer_map import LayerMap
from potstill.losses.alignment import TASKS, Task
from potstill.runs.config.divergence import DivergencePart, NamedDivergence
from potstill.runs.config.document import Part
from potstill.runs.config.numbers import Temperature, Weight


class LayersPart(Part):
    """Which teacher layer each student layer learns from: uniform, or one of these. Layers count from 0; -1 is last."""

    last_k: int | None = Field(None, ge=1, description="the last k layers from the last k")
    skip: int | None = Field(None, ge=1, description="student layer i from teacher layer (i + 1) * skip - 1")
    pairs: list[tuple[int, int]] | None = Field(None, min_length=1, description="[student layer, teacher layer], ...")

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        given = list(self.model_dump(exclude_none=True))
        if len(given) > 1:
            raise ValueError(f"expected one of last_k, skip, pairs, got {', '.join(given)}")
        return self

    def build(self) -> LayerMap:
        """The map itself."""
        if self.last_k is not None:
            return LayerMap.last_k(self.last_k)
        if self.skip is not None:
            return LayerMap.skip(self.skip)
        return LayerMap.uniform() if self.pairs is None else LayerMap.explicit(self.pairs)


def _named_layers(value: Any) -> Any:
    """`uniform` is a map of its own, and a list is one of pairs."""
    if isinstance(value, list):
        return {"pairs": value}
    return {} if value == "uniform" else value


Layers = Annotated[LayersPart, BeforeValidator(_named_layers)]


class HiddenPart(Part):
    """Match the teacher's hidden states."""

    term: Literal["hidden"]
    tasks: ClassVar[frozenset[Task]] = TASKS
    layers: Layers = Field(LayersPart.model_validate({}), description="uniform, unless said otherwise")
    distance: Literal["mse", "l1", "cosine", "cka"] = "mse"
    projection: Literal["linear", "mlp", "none"] | None = Field(
        None, description="to the teacher's width, trained and not exported; linear where widths differ"
    )
    select_batches: int | None = Field(
        None,
        ge=1,
        description="no projection: compare with the teacher's most important dimensions, picked by so many batches",
    )
    weight: Weight = 1.0

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        projected = self.projection not in (None, "none")
        if projected and (self.distance == "cka" or self.select_batches is not None):
            other = "cka, which takes any widths" if self.distance == "cka" else "select_batches"
            raise ValueError(f"expected no projection with {other}, got {self.projection}")
        return self


class AttentionPart(Part):
    """Match the teacher's attention maps."""

    term: Literal["attention"]
    tasks: ClassVar[frozenset[Task]] = TASKS
    layers: Layers = Field(LayersPart.model_validate({}), description="uniform, unless said otherwise")
    divergence: NamedDivergence | None = Field(None, description="without one, the squared distance of directions")
    heads: (
        Annotated[Literal["overlap", "entropy", "variance", "learned"], Tag("a way")]
        | Annotated[list[tuple[int, int]], Field(min_length=1), Tag("pairs")]
    ) = Field(
        "overlap",
        discriminator=Discriminator(lambda value: "pairs" if isinstance(value, list) else "a way"),
        description="how heads meet; entropy and variance weigh focused ones, learned trains a mixture; "
        "or [student head, teacher head], ...",
    )
    weight: Weight = 1.0


class RelationsPart(Part):
    """Match how tokens relate by their queries, keys and values (MiniLMv2)."""

    term: Literal["relations"]
    tasks: ClassVar[frozenset[Task]] = TASKS
    layers: Layers = LayersPart.model_validate({"last_k": 1})
    of: list[Literal["queries", "keys", "values"]] = Field(["queries", "keys", "values"], min_length=1)
    heads: int | None = Field(None, ge=1, description="relation heads; the teacher's number of heads")
    weight: Weight = 1.0


class SimilarityPart(Part):
    """Match how the examples of a batch relate, by their mean hidden states."""

    term: Literal["similarity"]
    tasks: ClassVar[frozenset[Task]] = TASKS
    layers: Layers = LayersPart.model_validate({"last_k": 1})
    kind: Literal["distance", "angle", "distribution"] = "distance"
    temperature: Temperature = Field(0.1, description="of the distributions")
    divergence: NamedDivergence | None = Field(None, description="between the distributions; forward_kl")
    weight: Weight = 1.0


class DeepSupervisionPart(Part):
    """Earlier layers of the student learn from its own last one, through its norm and head. No teacher speaks."""

    tasks: ClassVar[frozenset[Task]] = frozenset({"causal"})
    term: Literal["deep_supervision"]
    layers: list[int] = Field(min_length=1, description="of the student, before its last; from 0, or -2 and so on")
    divergence: NamedDivergence = DivergencePart(kind="forward_kl")
    weight: Weight = 1.0
    temperature: Temperature = 1.0
