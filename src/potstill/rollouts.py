"""From the `rollout` of a recipe to who puts the student's own text in place of data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from potstill.data import Examples
from potstill.engines import Sampling
from potstill.errors import RecipeError
from potstill.recipe import RolloutPart, SchedulePart
from potstill.train.rollout import Adapt, Replay, Rollout, teacher_mix, teacher_top_k


def build(
    part: RolloutPart,
    tokenizer: PreTrainedTokenizerBase,
    teacher: nn.Module | None,
    *,
    steps: int,
    limit: int | None,
    vocabulary: int,
    seed: int,
) -> Rollout:
    """The rollout.

    Args:
        part: the recipe's.
        tokenizer: the student's.
        teacher: its model, for those that read along.
        steps: how long the run is, for the schedules.
        limit: tokens in a row that both models allow.
        vocabulary: tokens that both share.
        seed: of the run.
    """

    def number(value: float | SchedulePart) -> float | Callable[[int], float]:
        return value.build(steps) if isinstance(value, SchedulePart) else value

    guide: Any = None
    if part.guided:
        assert teacher is not None
        if part.teacher_top_k is not None:
            guide = teacher_top_k(teacher, part.teacher_top_k)
        else:
            guide = teacher_mix(teacher, part.teacher_mix)
    replay = part.replay
    return Rollout(
        tokenizer,
        Sampling(
            max_new_tokens=part.max_new_tokens,
            sampling_temperature=part.sampling_temperature,
            top_p=part.top_p,
            top_k=part.top_k,
        ),
        share=number(part.on_policy_fraction),
        prompt_tokens=part.prompt_tokens,
        limit=limit,
        vocabulary=vocabulary,
        guide=guide,
        replay=None if replay is None else Replay(replay.size, number(replay.fresh), replay.age),
        adapt=None if part.adapt is None else Adapt(**part.adapt.model_dump()),
        seed=seed,
        batch_size=part.batch_size,
    )


def look_at_prompts(rollout: Rollout, part: RolloutPart, train: Examples) -> tuple[str, ...]:
    """What a run should say of its prompts.

    Raises:
        RecipeError: none of them leaves room for a token.
    """
    prompts = [rollout.prompt(row) for row in train.dataset]
    usable = [len(prompt) for prompt in prompts if prompt is not None]
    if not usable:
        raise RecipeError(
            f"rollout: expected prompts that the student can go on from, got none in {len(prompts)} rows. "
            "Rows must have two tokens at least, and prompts must leave room among the models' positions."
        )
    notes = []
    if len(usable) < len(prompts):
        notes.append(
            f"rollout: {len(prompts) - len(usable)} of {len(prompts)} rows have no prompt to go on from: data."
        )
    if rollout.limit is not None:
        short = sum(length + part.max_new_tokens > rollout.limit for length in usable)
        if short:
            notes.append(
                f"rollout: {short} of {len(prompts)} prompts leave less room than max_new_tokens {part.max_new_tokens} "
                f"within {rollout.limit} positions: cut there."
            )
    return tuple(notes)
