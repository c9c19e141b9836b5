"""A student that is its own teacher: a moving average of its weights, or its base model without the adapter."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from potstill.errors import ModelError, RecipeError
from potstill.losses.alignment import Alignment, Task
from potstill.losses.declared import Range, Record
from potstill.models.loading import load_tokenizer
from potstill.models.split import split_model, undisturbed
from potstill.teachers.model import ModelTeacher
from potstill.teachers.source import LoadedTeacher, TeacherSource
from potstill.teachers.teacher import Teacher, TeacherOutput


@dataclass(frozen=True)
class EMASettings(Record):
    """Settings of the moving average.

    Args:
        decay: of the average, per step
        warmup_steps: first steps, whose average is a plain mean
    """

    decay: Annotated[float, Range(ge=0, lt=1)] = 0.999
    warmup_steps: Annotated[int, Range(ge=0)] = 0


class EMATeacher(ModelTeacher):
    """An exponential moving average of the student's weights, updated after each of its steps.

        teacher = d teacher + (1 - d) student,   d = decay,   or min(decay, 1 - 1 / t) in the t-th warm-up step

    In the warm-up the teacher is the plain mean of all students so far, so that the first weights have no lasting
    influence. Frozen weights are shared with the student: beside an adapter, only the adapter is there twice. The
    average is kept in float32, in which small steps are not lost.

    References:
        Tarvainen and Valpola 2017 (Mean Teacher), arXiv 1703.01780, section 2; the warm-up is that of its code.
    """

    of_student = True
    needs_trial = True

    def __init__(self, decay: float = 0.999, warmup_steps: int = 0) -> None:
        settings = EMASettings(decay, warmup_steps)  # which checks them
        self.decay, self.warmup_steps = settings.decay, settings.warmup_steps
        self._average: dict[str, Tensor] = {}

    def attach(self, student: nn.Module) -> None:
        """Start the average at the student's weights."""
        shared: dict[int, Any] = {id(p): p for p in student.parameters() if not p.requires_grad}
        model = copy.deepcopy(student, shared)
        self._average = {name: p.detach().float() for name, p in model.named_parameters() if p.requires_grad}
        if not self._average:
            raise ModelError("EMATeacher: expected a student with weights that are trained, got none.")
        self._student = student
        self._use(model.eval().requires_grad_(False))

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        decay = min(self.decay, 1 - 1 / step) if step <= self.warmup_steps else self.decay
        current = dict(self._student.named_parameters())
        for name, weight in self._weights():
            average = self._average[name] = self._average[name].to(weight.device)
            average.lerp_(current[name].to(average), 1 - decay)
            weight.copy_(average)
        for buffer, of_student in zip(self.model.buffers(), self._student.buffers(), strict=True):
            buffer.copy_(of_student)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self._average)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for name, weight in self._weights():
            self._average[name].copy_(state[name])
            weight.copy_(state[name])

    def _weights(self) -> list[tuple[str, Tensor]]:  # in float32 they are the averages themselves
        return [(name, p) for name, p in self.model.named_parameters() if name in self._average]


class BaseModelTeacher(ModelTeacher):
    """The student's base model, without its adapter, in evaluation mode; there is no second copy of it.

    It costs one more forward pass of the base. What is trained beside an adapter (`modules_to_save`) is switched off
    with it; base weights that someone else trains would change the teacher.
    """

    of_student = True
    needs_trial = True

    def __init__(self) -> None:
        """Wait for `attach`."""

    def attach(self, student: nn.Module) -> None:
        """See `Teacher`. A ModelError where the student has no adapter, or one that trains biases of the base."""
        if not hasattr(student, "disable_adapter"):
            raise ModelError(
                f"BaseModelTeacher: expected a student with an adapter that can be switched off, got a "
                f"{type(student).__name__}. Give the student an adapter (a PeftModel), or name a teacher."
            )
        if any(getattr(config, "bias", "none") != "none" for config in getattr(student, "peft_config", {}).values()):
            raise ModelError(
                "BaseModelTeacher: expected an adapter without biases, got one with which biases of the base are "
                "trained: the teacher would change. Leave student.adapter.bias out."
            )
        with _without_adapter(student):
            split = split_model(student)
        self._use(student)
        self._split = split

    def __call__(self, batch: Mapping[str, Tensor], alignment: Alignment) -> TeacherOutput:
        with undisturbed(self.model), _without_adapter(self.model):
            targets, inside = self._run(batch, alignment)
        return TeacherOutput(targets, inside=inside)


@contextmanager
def _without_adapter(student: Any) -> Iterator[None]:
    """Switch the adapter off, and restore which weights are trained, which peft sets anew."""
    trained = [(p, p.requires_grad) for p in student.parameters()]
    try:
        with student.disable_adapter():
            yield
    finally:
        for p, flag in trained:
            p.requires_grad_(flag)


@dataclass(frozen=True)
class EMASource(TeacherSource):
    """A moving average of the student's own weights.

    Args:
        ema: its settings; {} for the defaults
    """

    ema: EMASettings
    name = "ema"
    copies_student = True
    title = "the average of the student's weights"

    def load(self, student: str | None, task: Task = "causal", key: str = "teacher") -> LoadedTeacher:
        return _load(EMATeacher(self.ema.decay, self.ema.warmup_steps), student, f"{key}.{self.name}")


@dataclass(frozen=True)
class BaseModelSource(TeacherSource):
    """The student without its adapter.

    Args:
        adapter_off: true
    """

    adapter_off: bool = True
    name = "adapter_off"
    title = "the student without its adapter"

    def load(self, student: str | None, task: Task = "causal", key: str = "teacher") -> LoadedTeacher:
        return _load(BaseModelTeacher(), student, f"{key}.{self.name}")


def _load(teacher: Teacher, student: str | None, key: str) -> LoadedTeacher:
    if student is None:
        raise RecipeError(
            f"{key}: expected student.model, got a design, whose config is derived from another teacher's. Name a "
            "student with student.model instead."
        )
    return LoadedTeacher(teacher, load_tokenizer(student, "student.model"))
