"""Who speaks."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from potstill.recipe.document import Part


class ServedPart(Part):
    """A model behind a server that writes text, as vLLM does, and OpenAI's."""

    url: str = Field(min_length=1, description="such as http://127.0.0.1:8000")
    model: str = Field(min_length=1, description="the name under which it is served")
    key_variable: str | None = Field(
        None,
        description="the environment variable with the API key; by default POTSTILL_API_KEY, then OPENAI_API_KEY",
    )
    concurrency: int = Field(16, ge=1, description="requests under way at once, at most")
    timeout_s: float = Field(120.0, gt=0, description="how long the server may be silent")


class ServerPart(ServedPart):
    """A model behind a server that tells the log-probabilities of given tokens, as vLLM does."""

    top_k: int = Field(20, ge=1, description="likeliest tokens to ask for at each position; the others share a bucket")


class TeacherPart(Part):
    """Who speaks: a model that runs beside the student, a cache of what it said, or a model behind a server. With model
    and cache, training reads the cache and the report measures the model.
    """

    model: str | None = Field(None, description="a folder with a model and its tokenizer, or a name on the hub")
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8", "int4"] = Field(
        "auto", description="its precision; auto is the one it is saved in, int8 and int4 round its linear layers"
    )
    device: str | None = Field(None, description="such as cuda:1; by default where the student is")
    cache: str | None = Field(None, description="a directory made by `potstill cache build`")
    server: ServerPart | None = None
    prefetch: bool = Field(False, description="ask about the next batch while the student learns from this one")

    @property
    def title(self) -> str:
        """What people call it."""
        if self.server is not None:
            return f"{self.server.model} behind {self.server.url}"
        return self.model or f"the cache {self.cache}"

    @model_validator(mode="after")
    def _someone(self) -> Self:
        given = set(self.model_dump(exclude_defaults=True)) - {"prefetch"}
        if not given & {"model", "cache", "server"}:
            raise ValueError("expected model, cache or server, got none of them")
        if "server" in given and len(given) > 1:
            raise ValueError(f"expected server alone, got it with {', '.join(sorted(given - {'server'}))}")
        return self
