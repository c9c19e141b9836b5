"""Who speaks."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from potstill.recipe.document import Part


class TeacherPart(Part):
    """Who speaks: a model that runs beside the student, or a cache of what it said. With both, training reads the cache
    and the report measures the model.
    """

    model: str | None = Field(None, description="a folder with a model and its tokenizer, or a name on the hub")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="its precision; auto is the one it is saved in"
    )
    device: str | None = Field(None, description="such as cuda:1; by default where the student is")
    cache: str | None = Field(None, description="a directory made by `potstill cache build`")

    @model_validator(mode="after")
    def _someone(self) -> Self:
        if self.model is None and self.cache is None:
            raise ValueError("expected model or cache, got neither")
        return self
