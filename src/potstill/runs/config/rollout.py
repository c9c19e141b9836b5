"""What the student writes itself while it learns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Self

from pydantic import Field, model_validator

from potstill.engines.endpoint import ServerEndpoint
from potstill.losses.declared import Range
from potstill.losses.schedule import Schedule, Share
from potstill.runs.config.document import Part


class ReplayPart(Part):
    """Texts of earlier steps are learnt from again (DistiLLM)."""

    size: int = Field(1000, ge=1, description="texts that are kept, the latest")
    fresh: Share = Field(0.5, description="the share of the own rows of a step that is newly written")
    age: int | None = Field(None, ge=1, description="optimiser steps after which a text is not used any more")


class AdaptPart(Part):
    """The share of own text grows when held-out text gets worse (DistiLLM)."""

    by: float = Field(0.1, gt=0, le=1, description="how much it grows")
    margin: float = Field(0.1, ge=0, description="nats above the held-out loss of the evaluation before")


@dataclass(frozen=True)
class StudentServerPart(ServerEndpoint):
    """A vLLM server that writes in the student's place, and takes its weights as it learns.

    Args:
        folder: where the weights are put for it, which it sees under the same path; by default `served` in the run
            directory
        max_staleness: optimiser steps since the weights that write, at most; 0 has new ones taken at each step
    """

    folder: str | None = None
    max_staleness: Annotated[int, Range(ge=0)] = 0


class RolloutPart(Part):
    """The student writes a share of the rows itself, behind their prompts, and the teacher judges (GKD)."""

    on_policy_fraction: Share = Field(0.5, description="of the rows of a step: 0 is data alone, 1 own text alone")
    max_new_tokens: int = Field(128, ge=1, description="that the student writes behind a prompt, at most")
    sampling_temperature: float = Field(1.0, gt=0, description="how tokens are drawn; not the objective's temperature")
    top_p: float = Field(1.0, gt=0, le=1, description="draw among the likeliest tokens with this probability together")
    top_k: int = Field(0, ge=0, description="draw among so many of the likeliest tokens; 0 for all")
    prompt_tokens: int = Field(32, ge=1, description="the prompt of plain text: a row's first tokens, at most half")
    batch_size: int = Field(64, ge=1, description="texts that are written together, here")
    teacher_mix: float = Field(0.0, ge=0, lt=1, description="the teacher's share of what is drawn from (MiniLLM: 0.2)")
    teacher_top_k: int | None = Field(
        None, ge=1, description="the teacher draws anew what is not among its likeliest tokens (Speculative KD)"
    )
    server: StudentServerPart | None = Field(
        None, description="who writes; without it, the student itself, here, between its steps"
    )
    replay: ReplayPart | None = None
    adapt: AdaptPart | None = None

    @property
    def guided(self) -> bool:
        """Whether the teacher has a say in what is written."""
        return self.teacher_mix > 0 or self.teacher_top_k is not None

    @property
    def plain(self) -> bool:
        """Whether tokens are drawn from the very distribution that the student gives."""
        return (self.sampling_temperature, self.top_p, self.top_k) == (1, 1, 0)

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if self.teacher_mix and self.teacher_top_k is not None:
            raise ValueError("expected teacher_mix or teacher_top_k, got both")
        if self.server is not None:
            batch_size = type(self).model_fields["batch_size"].default
            here = [name for name in ("teacher_mix", "teacher_top_k") if getattr(self, name)]
            if here:
                raise ValueError(
                    f"expected {here[0]} without server, got both. The teacher reads along token by token, where the "
                    "student writes here"
                )
            if self.batch_size != batch_size:
                raise ValueError("expected batch_size without server, got both. It takes server.concurrency at once")
        if self.adapt is not None and isinstance(self.on_policy_fraction, Schedule):
            raise ValueError("expected a number as the on_policy_fraction that adapts, got a schedule")
        return self
