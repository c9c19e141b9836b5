"""Who speaks."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from potstill.runs.config.document import Part


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


class SpeakerPart(Part):
    """One who speaks: a model that runs beside the student, a cache of what it said, or a model behind a server."""

    model: str | None = Field(None, description="a folder with a model and its tokenizer, or a name on the hub")
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8", "int4"] = Field(
        "auto", description="its precision; auto is the one it is saved in, int8 and int4 round its linear layers"
    )
    device: str | None = Field(None, description="such as cuda:1; by default where the student is")
    cache: str | None = Field(None, description="a directory made by `potstill cache build`")
    server: ServerPart | None = None

    @property
    def title(self) -> str:
        """What people call it."""
        if self.server is not None:
            return f"{self.server.model} behind {self.server.url}"
        return self.model or f"the cache {self.cache}"

    @model_validator(mode="after")
    def _someone(self) -> Self:
        given = set(self.model_dump(exclude_defaults=True, include={*SpeakerPart.model_fields}))
        others = self._others()
        if not given & {"model", "cache", "server"} and not others:
            raise ValueError(f"expected {self._expected()}, got none of them")
        alone = others or given & {"server"}
        if alone and len(given | others) > 1:
            first, *rest = sorted(alone)
            raise ValueError(f"expected {first} alone, got it with {', '.join(sorted((given - {first}) | {*rest}))}")
        return self

    def _others(self) -> set[str]:
        """What else speaks."""
        return set()

    def _expected(self) -> str:
        return "model, cache or server"


class MemberPart(SpeakerPart):
    """One of several teachers, with its own model, cache or server."""

    weight: float | None = Field(
        None, ge=0, description="relative to the others', by default equal ones; where weights are learned, the first"
    )

    @model_validator(mode="after")
    def _one_voice(self) -> Self:
        if self.model is not None and self.cache is not None:
            raise ValueError("expected model or cache for a member of an ensemble, got both")
        return self


class EMAPart(Part):
    """The student's own weights, averaged over training."""

    decay: float = Field(0.999, ge=0, lt=1, description="of the average, in one step")
    warmup_steps: int = Field(0, ge=0, description="first steps whose average is a plain mean")


class TeacherPart(SpeakerPart):
    """Who speaks: a model that runs beside the student, a cache of what it said, or a model behind a server; several of
    them; or the student itself. With model and cache, training reads the cache and the report measures the model.
    """

    ensemble: list[MemberPart] | None = Field(None, min_length=2, description="several teachers of one vocabulary")
    of: Literal["probabilities", "log_probs"] = Field(
        "probabilities", description="what the members of an ensemble are averaged by"
    )
    weights: Literal["fixed", "learned"] = Field(
        "fixed", description="of an ensemble; learned ones make the training data likeliest"
    )
    ema: EMAPart | None = Field(None, description="the average of the student's own weights")
    adapter_off: bool = Field(False, description="the student without its adapter")
    prefetch: bool = Field(False, description="ask about the next batch while the student learns from this one")

    @property
    def title(self) -> str:
        """What people call it."""
        if self.ensemble is not None:
            return f"an ensemble of {', '.join(member.title for member in self.ensemble)}"
        if self.ema is not None:
            return "the average of the student's weights"
        return "the student without its adapter" if self.adapter_off else super().title

    def _others(self) -> set[str]:
        return {name for name in ("ensemble", "ema", "adapter_off") if getattr(self, name)}

    def _expected(self) -> str:
        return "model, cache, server, ensemble, ema or adapter_off"

    @model_validator(mode="after")
    def _of_an_ensemble(self) -> Self:
        members = self.ensemble or []
        own = {name for name in ("of", "weights") if getattr(self, name) != type(self).model_fields[name].default}
        if own and not members:
            raise ValueError(f"expected {' and '.join(sorted(own))} beside an ensemble alone, got no ensemble")
        if len(own) == 2:
            raise ValueError(
                "expected of: probabilities where weights are learned, got log_probs. What each member gives to the "
                "data's own tokens does not tell what their geometric mean gives to them"
            )
        weighed = [member.weight is not None for member in members]
        if any(weighed) and not all(weighed):
            raise ValueError(f"expected a weight for every member of the ensemble or for none, got {sum(weighed)}")
        if weighed and all(weighed) and not any(member.weight for member in members):
            raise ValueError("expected weights of the ensemble that are not all 0")
        return self
