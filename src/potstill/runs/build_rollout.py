"""From the `rollout` of a recipe to who puts the student's own text in place of data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from potstill.data.batches import Examples
from potstill.engines.sampling import Sampling
from potstill.errors import RecipeError
from potstill.losses.schedule import Schedule
from potstill.models.adapted import is_adapted
from potstill.runs.config.rollout import RolloutPart
from potstill.runs.config.run import Recipe
from potstill.train.rollout import Adapt, Replay, Rollout, teacher_mix, teacher_top_k
from potstill.train.server_writer import ServedWriter


def find_writer(recipe: Recipe, student: Any, tokenizer: PreTrainedTokenizerBase) -> ServedWriter | None:
    """The server that writes for the student, where a recipe names one.

    Args:
        recipe: the whole.
        student: as it begins, with its adapter.
        tokenizer: the student's.

    Raises:
        RecipeError: the student has an adapter that no server takes.
        UserError: the server does not write for it; see `ServedWriter`.
    """
    part = None if recipe.rollout is None else recipe.rollout.server
    if part is None:
        return None
    adapted = is_adapted(student)
    kind = str(student.active_peft_config.peft_type.value).lower() if adapted else "lora"
    if kind != "lora":
        raise RecipeError(
            f"rollout.server: expected a whole student or a LoRA adapter, got one of {kind}. vLLM takes no other "
            "adapter while it runs. Leave rollout.server out: the student writes here."
        )
    if adapted and student.active_peft_config.bias != "none":
        raise RecipeError(
            f"rollout.server: expected an adapter without biases, got bias: {student.active_peft_config.bias}. vLLM "
            "leaves an adapter's biases out. Leave student.adapter.bias out, or rollout.server."
        )
    server = part.connect()
    folder = Path(part.folder or Path(recipe.output) / "served").expanduser()
    return ServedWriter(server, tokenizer, folder, adapter=adapted, max_staleness=part.max_staleness)


def build(
    part: RolloutPart,
    tokenizer: PreTrainedTokenizerBase,
    teacher: nn.Module | None,
    *,
    steps: int,
    limit: int | None,
    vocabulary: int,
    seed: int,
    server: ServedWriter | None = None,
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
        server: who writes for the student, where it does not itself.
    """

    def number(value: float | Schedule) -> float | Callable[[int], float]:
        return value.over(steps) if isinstance(value, Schedule) else value

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
        server=server,
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
