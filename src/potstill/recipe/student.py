"""Who learns."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from potstill.recipe.document import Part


class StudentPart(Part):
    """Who learns: an existing model, or a new one of the teacher's kind."""

    model: str | None = Field(None, description="a folder with a model and its tokenizer, or a name on the hub")
    design: dict[str, bool | int | float | str] | None = Field(
        None,
        description="fields of the teacher's config to change, such as hidden_size; random first weights",
    )

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.model is None) == (self.design is None):
            raise ValueError("expected either model or design, got " + ("both" if self.model else "neither"))
        return self
