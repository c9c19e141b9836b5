"""What a student whose weights are sharded over ranks cannot do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from potstill.errors import UserError
from potstill.teachers.teacher import Teacher

NOT_SHARDED = (
    "train.fsdp: expected several processes with an accelerator each, got a run that accelerate does not shard. Start "
    "it with torchrun on GPUs, or leave train.fsdp out."
)


def check_sharding(
    *, fsdp: bool, zero: Mapping[str, Any] | None, fsdp_requested: bool, teacher: Teacher | None, rollout: bool
) -> None:
    """Raise UserError where a run does not work with its sharding, by FSDP or by deepspeed's zero_optimization."""
    sharder = "FSDP" if fsdp else "ZeRO-3" if (zero or {}).get("stage") == 3 else None
    if fsdp_requested and not fsdp:
        raise UserError(NOT_SHARDED)
    if sharder and teacher is not None and teacher.of_student:
        raise UserError(
            f"{type(teacher).__name__}: expected a full student on every rank, from whose weights the teacher is made, "
            f"got one that {sharder} shards. Train without {sharder}, or use another teacher."
        )
    if rollout and zero is not None:
        raise UserError(
            "rollout: expected fsdp or a full student on every rank, got deepspeed, under which the student cannot "
            "generate. Use train.fsdp, or leave rollout out."
        )
    if sharder == "ZeRO-3" and zero and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        raise UserError(
            "train.deepspeed: expected stage3_gather_16bit_weights_on_model_save: true, got none. Set it, or "
            "zero3_save_16bit_model in accelerate's file: without it the full student is not saved."
        )
