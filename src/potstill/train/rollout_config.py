"""The `rollout` part of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from potstill.engines.sampling import Sampling, TokenSampling
from potstill.errors import ShapeError
from potstill.losses.declared import Range
from potstill.losses.schedule import Schedule, Share, for_run
from potstill.train.rollout import Adapt, Replay, Rollout, teacher_mix, teacher_top_k
from potstill.train.server_writer import StudentServer


@dataclass(frozen=True)
class RolloutConfig(TokenSampling):
    """The student generates a share of its training rows from their prompts, and the teacher scores them (GKD).

    Args:
        on_policy_fraction: of the rows of a step: 0 is data alone, 1 on-policy samples alone
        max_new_tokens: maximum number of tokens that the student generates after a prompt
        sampling_temperature: divides the logits for sampling; not the objective's temperature
        prompt_tokens: the prompt of plain text: a row's first tokens, at most half
        batch_size: samples that are generated together, without a server
        teacher_mix: the teacher's share in the distribution that is sampled (MiniLLM: 0.2)
        teacher_top_k: the teacher draws again what is not among its likeliest tokens (Speculative KD)
        server: generates the samples; by default the student itself, in this process, between its steps
        replay: train again on samples of earlier steps
        adapt: raise the share when the held-out loss gets worse
    """

    on_policy_fraction: Share = 0.5
    max_new_tokens: Annotated[int, Range(ge=1)] = 128
    sampling_temperature: Annotated[float, Range(gt=0)] = 1.0
    prompt_tokens: Annotated[int, Range(ge=1)] = 32
    batch_size: Annotated[int, Range(ge=1)] = 64
    teacher_mix: Annotated[float, Range(ge=0, lt=1)] = 0.0
    teacher_top_k: Annotated[int | None, Range(ge=1)] = None
    server: StudentServer | None = None
    replay: Replay | None = None
    adapt: Adapt | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher_mix and self.teacher_top_k is not None:
            raise ShapeError("expected teacher_mix or teacher_top_k, got both")
        if self.server is not None and self.guided:
            key = "teacher_mix" if self.teacher_mix else "teacher_top_k"
            raise ShapeError(f"expected {key} without server, got both. It needs the student's logits in this process")
        if self.server is not None and self.batch_size != type(self).batch_size:
            raise ShapeError("expected batch_size without server, got both. Set server.concurrency instead")
        if self.adapt is not None and isinstance(self.on_policy_fraction, Schedule):
            raise ShapeError("expected a number as the on_policy_fraction that adapts, got a schedule")

    @property
    def guided(self) -> bool:
        """Whether the teacher takes part in sampling."""
        return self.teacher_mix > 0 or self.teacher_top_k is not None

    def build(
        self, tokenizer: PreTrainedTokenizerBase, teacher: nn.Module | None, *, steps: int, **options: Any
    ) -> Rollout:
        """Build the rollout of a run; options are limit, vocabulary, seed and server of `Rollout`."""
        guide = None
        if self.guided:
            assert teacher is not None
            top_k, share = self.teacher_top_k, self.teacher_mix
            guide = teacher_mix(teacher, share) if top_k is None else teacher_top_k(teacher, top_k)
        options |= {"guide": guide, "adapt": self.adapt, "batch_size": self.batch_size}
        return Rollout(
            tokenizer,
            Sampling(self.max_new_tokens, self.sampling_temperature, self.top_p, self.top_k),
            share=for_run(self, steps).on_policy_fraction,
            prompt_tokens=self.prompt_tokens,
            replay=None if self.replay is None else for_run(self.replay, steps),
            **options,
        )
