"""A teacher that sits beside the student: a frozen model."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from potstill.losses.alignment import Alignment
from potstill.losses.targets import DenseTargets
from potstill.models.capture import ActivationCapture, ActivationRequest, Activations
from potstill.models.split import SplitModel, forward_targets, inputs, split_model
from potstill.models.structure import ModelShape
from potstill.teachers.teacher import Teacher, TeacherOutput


class ModelTeacher(Teacher):
    """A frozen model: evaluation mode, no gradient, its own precision and, if asked, its own device.

    It gives hidden states and head where it can be split (`potstill.models.split`) and runs where the batch is, else
    logits.

    Args:
        model: a model of transformers. It is switched to evaluation mode and frozen in place.
        device: where it runs; None follows the batch.
        dtype: its precision; None leaves it as it is.
    """

    def __init__(
        self, model: nn.Module, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        if dtype is not None:  # a quantised model refuses to be asked at all
            self.model.to(dtype)
        if device is not None:
            self.model.to(device)
        self._device = None if device is None else torch.device(device)
        self._needs = ActivationRequest()

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Tensor], alignment: Alignment) -> TeacherOutput:
        home = batch["input_ids"].device
        device = self._device or home
        if next(self.model.parameters()).device != device:
            self.model.to(device)
        there = inputs(batch, device)
        # The student's autocast must not change what the teacher says.
        with torch.autocast(device.type, enabled=False):
            if self._needs:
                said, inside = self._taps.capture(
                    self._needs, partial(forward_targets, self.model, self._cut, there, alignment)
                )
            else:
                said, inside = forward_targets(self.model, self._cut, there, alignment), Activations()
            if isinstance(said, DenseTargets) or said.hidden.device != home:
                said = DenseTargets(said.dense().to(home))
        return TeacherOutput(said, inside=inside.last(batch["input_ids"].shape[1]).to(home))

    @property
    def shape(self) -> ModelShape:
        """The model's shape."""
        return self._taps.shape

    def prepare(self, needs: ActivationRequest) -> None:
        """See `Teacher`. Only the layers that are asked for are kept."""
        if needs:
            self._taps.prepare(needs)
            self._needs |= needs

    @cached_property
    def _taps(self) -> ActivationCapture:
        return ActivationCapture(self.model)

    @cached_property
    def _cut(self) -> SplitModel | None:
        return split_model(self.model)  # at the first batch, where the model is to run
