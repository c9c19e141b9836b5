"""What shards a student's weights over ranks, and what that rules out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from potstill.errors import UserError
from potstill.teachers.teacher import Teacher
from potstill.train.rollout import Rollout

UNSHARDED = (
    "train.fsdp: expected several processes with an accelerator each, got a run that accelerate does not shard. Start "
    "it with torchrun on GPUs, or leave train.fsdp out."
)


@dataclass(frozen=True)
class Sharding:
    """How a student lies on its ranks.

    Args:
        fsdp: whether FSDP shards it.
        zero: what deepspeed was told under zero_optimization; None without deepspeed.
    """

    fsdp: bool
    zero: Mapping[str, Any] | None

    @classmethod
    def of(cls, state: Any) -> Sharding:
        """What accelerate's state says."""
        deepspeed = getattr(state, "deepspeed_plugin", None)
        zero = None if deepspeed is None else deepspeed.deepspeed_config.get("zero_optimization", {})
        return cls(getattr(state, "fsdp_plugin", None) is not None, zero)

    def refuse(self, *, fsdp_asked: bool, teacher: Teacher | None, rollout: Rollout | None) -> None:
        """See that a training can do what is asked of it.

        Raises:
            UserError: it cannot.
        """
        by = "FSDP" if self.fsdp else "ZeRO-3" if (self.zero or {}).get("stage") == 3 else None
        if fsdp_asked and not self.fsdp:
            raise UserError(UNSHARDED)
        if by and teacher is not None and teacher.of_student:
            raise UserError(
                f"{type(teacher).__name__}: expected a student that is whole on every rank, got one that {by} shards. "
                f"Its teacher is made of its weights. Train without {by}, or name another teacher."
            )
        if rollout is not None and self.zero is not None:
            raise UserError(
                "rollout: expected fsdp or whole students on each rank, got deepspeed, under which the student cannot "
                "write. Use train.fsdp, or learn from data alone."
            )
        if by == "ZeRO-3" and self.zero and not self.zero.get("stage3_gather_16bit_weights_on_model_save"):
            raise UserError(
                "train.deepspeed: expected stage3_gather_16bit_weights_on_model_save: true, got none. Without it no "
                "whole student is saved. Set it, or zero3_save_16bit_model in accelerate's file."
            )
