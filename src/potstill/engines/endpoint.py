"""The address of a server, as recipes spell it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from potstill.engines.server import ModelServer
from potstill.errors import ShapeError
from potstill.losses.declared import Range
from potstill.losses.record import Record


@dataclass(frozen=True)
class ServerEndpoint(Record):
    """A model behind an OpenAI-compatible server, such as vLLM.

    Args:
        url: such as http://127.0.0.1:8000
        model: the name under which it is served
        key_variable: the environment variable with the API key; by default POTSTILL_API_KEY, then OPENAI_API_KEY
        concurrency: maximum number of concurrent requests
        timeout_s: how long the server may be silent
    """

    url: str
    model: str
    key_variable: str | None = None
    concurrency: Annotated[int, Range(ge=1)] = 16
    timeout_s: Annotated[float, Range(gt=0)] = 120.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.url and self.model):
            raise ShapeError("server: expected a url and a model, got an empty one.")

    def connect(self) -> ModelServer:
        """Make a client of the server; nothing is sent yet."""
        return ModelServer(
            self.url,
            self.model,
            key_variable=self.key_variable,
            concurrency=self.concurrency,
            timeout_s=self.timeout_s,
        )
