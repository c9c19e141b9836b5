"""Which divergence, and its parameters."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, model_validator

from potstill.losses.divergences import Divergence
from potstill.errors import nearest
from potstill.runs.config.document import Part


def _named_divergence(value: Any) -> Any:
    """`forward_kl` is short for `{kind: forward_kl}`."""
    return {"kind": value} if isinstance(value, str) else value


class DivergencePart(Part):
    """Which divergence, and its parameters (beta of jsd, alpha of the skewed ones, both of alpha_beta)."""

    kind: str
    alpha: float | None = None
    beta: float | None = None

    @model_validator(mode="after")
    def _buildable(self) -> Self:
        if self.kind not in Divergence.kinds:
            raise ValueError(f"expected one of {', '.join(Divergence.kinds)}, got {self.kind}.{nearest(self.kind, Divergence.kinds)}")
        self.build()
        return self

    def build(self) -> Divergence:
        """The divergence itself."""
        kind = Divergence.kinds[self.kind]
        fields = dataclasses.fields(kind)  # type: ignore[arg-type]  # every kind is a dataclass
        given = {n: v for n, v in (("alpha", self.alpha), ("beta", self.beta)) if v is not None}
        wrong = set(given) - {f.name for f in fields}
        missing = {f.name for f in fields if f.default is dataclasses.MISSING} - set(given)
        if wrong or missing:
            takes = ", ".join(f.name for f in fields) or "no parameter"
            raise ValueError(f"expected {self.kind} with {takes}, got {', '.join(sorted(given)) or 'none'}")
        return kind(**given)


NamedDivergence = Annotated[DivergencePart, BeforeValidator(_named_divergence)]
