"""Recommend how far to compress a teacher, and how. Rules of thumb: measure with `potstill sweep`."""

from __future__ import annotations

from dataclasses import dataclass

from potstill.errors import ModelError, nearest
from potstill.models.capacity import CAPABILITIES, CapacityEstimate, TaskKind, expected_share, smallest_student

# The most parameters on each kind of device, and the precision to serve them in.
TARGETS = {"browser": 200_000_000, "edge": 500_000_000, "mobile": 1_000_000_000, "server": 3_000_000_000}
PRECISIONS = {"browser": "int4", "edge": "int4", "mobile": "int8", "server": "bfloat16"}
FAR = 5.0  # compression above which a student cannot represent all that its teacher does
DATA = {
    "understanding": "texts of the task, with or without labels",
    "knowledge": "text like that of the use, about 20 tokens for each parameter",
    "generation": "prompts of the use, with samples of the student (rollout)",
    "reasoning": "verified chains of thought or programs (potstill generate)",
}


@dataclass(frozen=True)
class CompressionPlan:
    """A student's size, and a recipe to begin with."""

    compression: float  # the teacher's parameters over the student's
    parameters: int
    share: CapacityEstimate  # of the teacher's score, by published results
    precision: str  # to serve it in
    method: str  # terms of the objective
    temperature: float
    data: tuple[str, ...]


def recommend_compression(
    teacher_parameters: int,
    *,
    target: str | None = None,
    task: TaskKind = "general",
    min_share: float | None = None,
) -> CompressionPlan:
    """Recommend a size for a kind of device, or else the smallest that may keep a share of the teacher's score.

    Where both are given and the device cannot hold enough, the device decides; `share` says what that costs.

    Raises:
        ModelError: neither is given, the device is not known, or holds the teacher itself.
    """
    if target is None and min_share is None:
        raise ModelError("compression: expected target or min_share, got neither.")
    if target is not None and target not in TARGETS:
        raise ModelError(f"compression: expected target {', '.join(TARGETS)}, got {target}.{nearest(target, TARGETS)}")
    most = teacher_parameters if target is None else TARGETS[target]
    least = smallest_student(teacher_parameters, min_share, task).value if min_share is not None else most
    if (parameters := round(min(most, least))) >= teacher_parameters:
        raise ModelError(
            f"compression: expected a teacher of more than the {most:,} parameters of {target}, got "
            f"{teacher_parameters:,}. It needs no smaller student."
        )
    return plan_compression(teacher_parameters, parameters, target=target, task=task)


def plan_compression(
    teacher_parameters: int, parameters: int, *, target: str | None = None, task: TaskKind = "general"
) -> CompressionPlan:
    """Choose objective, temperature, data and precision for a student of a size.

    Temperature 1 for language models and 2 for classifiers; a bounded divergence for a student much smaller than its
    teacher. `potstill diagnose` recommends a temperature from the teacher's distributions.
    """
    compression = teacher_parameters / parameters
    share = expected_share(compression, task)
    capabilities = CAPABILITIES[task]
    temperature = 2.0 if capabilities == ("understanding",) else 1.0
    divergence = "jsd" if compression > FAR else "forward_kl"
    return CompressionPlan(
        compression=compression,
        parameters=parameters,
        share=share,
        precision=PRECISIONS.get(target or "server", "bfloat16"),
        method=f"logits ({divergence}) and labels, from the teacher's weights (initialize: prune)",
        temperature=temperature,
        data=tuple(DATA[capability] for capability in capabilities),
    )
