"""Who speaks."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from potstill.recipe.document import Part


class TeacherPart(Part):
    """Who speaks."""

    model: str = Field(description="a folder with a model and its tokenizer, or a name on the hub")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="its precision; auto is the one it is saved in"
    )
    device: str | None = Field(None, description="such as cuda:1; by default where the student is")
