"""A student that is its own teacher: an average of its weights, or what it was before its adapter."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from potstill.errors import ModelError, ShapeError
from potstill.losses.alignment import Alignment
from potstill.models.capture import ActivationCapture, ActivationRequest
from potstill.models.split import SplitModel, forward_targets, split_model, undisturbed
from potstill.models.structure import ModelShape
from potstill.teachers.model import ModelTeacher
from potstill.teachers.teacher import Teacher, TeacherOutput


class EMATeacher(Teacher):
    """An exponential moving average of the student's weights, after each of its steps.

        teacher = d teacher + (1 - d) student,   d = decay,   or min(decay, 1 - 1 / t) in the t-th of the warm-up's
        steps

    In the warm-up the teacher is the plain mean of what the student has been, so that its first weights do not weigh
    on. Frozen weights are shared with the student and not copied: beside an adapter, only the adapter is there twice.
    The average is kept in float32, in which small steps are not lost.

    Args:
        decay: in [0, 1).
        warmup_steps: how many steps the warm-up takes.

    Raises:
        ShapeError: a number is out of range.

    References:
        Tarvainen and Valpola 2017 (Mean Teacher), arXiv 1703.01780, section 2; the warm-up is that of its code.
    """

    of_student = True

    def __init__(self, decay: float = 0.999, warmup_steps: int = 0) -> None:
        if not 0 <= decay < 1:
            raise ShapeError(f"EMATeacher: expected a decay in [0, 1), got {decay}.")
        if warmup_steps < 0:
            raise ShapeError(f"EMATeacher: expected warmup_steps of at least 0, got {warmup_steps}.")
        self.decay, self.warmup_steps = decay, warmup_steps
        self._needs = ActivationRequest()
        self._student: nn.Module | None = None
        self._teacher: ModelTeacher | None = None
        self._average: dict[str, Tensor] = {}

    def attach(self, student: nn.Module) -> None:
        """See `Teacher`. The average begins with the student as it is."""
        shared: dict[int, Any] = {id(p): p for p in student.parameters() if not p.requires_grad}
        model = copy.deepcopy(student, shared)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trained:
            raise ModelError("EMATeacher: expected a student with weights that are trained, got none.")
        self._average = {name: p.detach().float() for name, p in trained.items()}  # the weights themselves in float32
        self._student, self._teacher = student, ModelTeacher(model)
        self._teacher.prepare(self._needs)

    def __call__(self, batch: Mapping[str, Tensor], alignment: Alignment) -> TeacherOutput:
        return self._met(batch, alignment)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """See `Teacher`."""
        decay = min(self.decay, 1 - 1 / step) if step <= self.warmup_steps else self.decay
        assert self._student is not None
        now = dict(self._student.named_parameters())
        for name, mine in self._weights():
            average = self._average[name] = self._average[name].to(mine.device)
            average.lerp_(now[name].to(average), 1 - decay)
            mine.copy_(average)
        for mine, theirs in zip(self._met.model.buffers(), self._student.buffers(), strict=True):
            mine.copy_(theirs)

    def state_dict(self) -> dict[str, Tensor]:
        """See `Teacher`."""
        return dict(self._average)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """See `Teacher`."""
        for name, mine in self._weights():
            self._average[name].copy_(state[name])
            mine.copy_(state[name])

    def _weights(self) -> list[tuple[str, Tensor]]:
        """The teacher's weights that are averages. Where they are in float32 they are the averages themselves."""
        return [(name, p) for name, p in self._met.model.named_parameters() if name in self._average]

    @property
    def _met(self) -> ModelTeacher:
        if self._teacher is None:
            raise _alone("EMATeacher")
        return self._teacher

    @property
    def shape(self) -> ModelShape:
        """The student's shape."""
        return self._met.shape

    def prepare(self, needs: ActivationRequest) -> None:
        """See `Teacher`."""
        self._needs |= needs
        self._met.prepare(needs)


class BaseModelTeacher(Teacher):
    """The student without its adapter, in evaluation mode: the base model teaches, and there is no second copy of it.

    It costs one more forward pass of the base.

    What is trained beside an adapter (`modules_to_save`) is switched off with it; weights of the base that someone else
    trains would move the teacher.
    """

    of_student = True

    def __init__(self) -> None:
        self._needs = ActivationRequest()
        self._student: Any = None
        self._taps: ActivationCapture | None = None
        self._cut: SplitModel | None = None

    def attach(self, student: nn.Module) -> None:
        """See `Teacher`.

        Raises:
            ModelError: the student has no adapter, or one beside which biases of its base are trained.
        """
        if not hasattr(student, "disable_adapter"):
            raise ModelError(
                f"BaseModelTeacher: expected a student with an adapter that can be switched off, got a "
                f"{type(student).__name__}. Its base is the teacher. Give the student an adapter (a PeftModel), or "
                "name a teacher."
            )
        if any(getattr(config, "bias", "none") != "none" for config in getattr(student, "peft_config", {}).values()):
            raise ModelError(
                "BaseModelTeacher: expected an adapter that leaves its base as it is, got one with which biases are "
                "trained: the teacher would move with the student. Leave student.adapter.bias out."
            )
        self._student, self._taps = student, None
        with _without_adapter(student):
            self._cut = split_model(student)
        self.prepare(self._needs)

    def __call__(self, batch: Mapping[str, Tensor], alignment: Alignment) -> TeacherOutput:
        student = self._met
        with undisturbed(student), _without_adapter(student):
            call = partial(forward_targets, student, self._cut, batch, alignment)
            said, inside = self._open.capture(self._needs, call) if self._needs else (call(), None)
        return TeacherOutput(said) if inside is None else TeacherOutput(said, inside=inside)

    @property
    def _met(self) -> Any:
        if self._student is None:
            raise _alone("BaseModelTeacher")
        return self._student

    @property
    def _open(self) -> ActivationCapture:
        if self._taps is None:
            self._taps = ActivationCapture(self._met)
        return self._taps

    @property
    def shape(self) -> ModelShape:
        """The student's shape."""
        return self._open.shape

    def prepare(self, needs: ActivationRequest) -> None:
        """See `Teacher`."""
        if needs:
            self._open.prepare(needs)
            self._needs |= needs


@contextmanager
def _without_adapter(student: Any) -> Iterator[None]:
    """The adapter switched off; which weights are trained stays as it was, which peft decides anew."""
    trained = [(p, p.requires_grad) for p in student.parameters()]
    try:
        with student.disable_adapter():
            yield
    finally:
        for p, flag in trained:
            p.requires_grad_(flag)


def _alone(name: str) -> ModelError:
    return ModelError(f"{name}: expected a student to be made of, got none yet. Call attach(student) first.")
