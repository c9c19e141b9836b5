"""A frozen model as the teacher."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import torch
from accelerate import PartialState
from torch import Tensor, nn

from potstill.errors import ModelError, ShapeError, one_line
from potstill.losses.alignment import Alignment, Task
from potstill.losses.targets import DenseTargets, HeadTargets
from potstill.models.capture import ActivationCapture, ActivationRequest, Activations
from potstill.models.loading import load_model, load_tokenizer
from potstill.models.packing import PACKED_LENGTH, PackedLayout
from potstill.models.packing_probe import packing_mistake
from potstill.models.placement import is_spread, load_sharded
from potstill.models.shapes import ModelShape
from potstill.models.split import SplitModel, flattens, forward_targets, inputs, split_model
from potstill.teachers.source import LoadedTeacher, MemberSource
from potstill.teachers.teacher import Teacher, TeacherOutput

logger = logging.getLogger(__name__)

Precision = Literal["auto", "float32", "bfloat16", "float16", "int8", "int4"]


class ModelTeacher(Teacher):
    """A Hugging Face model, frozen and switched to evaluation mode in place; without a device, it follows the batch.

    A model that accelerate has spread over several devices or the disk (`device_map="auto"`) stays there. Gives hidden
    states and head where it can be split (`potstill.models.split`) and runs on the batch's device; else logits.
    """

    needs_trial = False
    _model: nn.Module | None = None
    _device: torch.device | None = None
    _needs = ActivationRequest()

    def __init__(
        self, model: nn.Module, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ModelError(f"ModelTeacher: expected a model, got a {type(model).__name__}. Load it.")
        self._use(model.eval().requires_grad_(False))
        if is_spread(model) and (device is not None or dtype is not None):
            hint = "Leave them out, or load the model without device_map."
            raise ModelError(f"ModelTeacher: expected no device or dtype for a model that is spread, got one. {hint}")
        if dtype is not None:  # `to` of a quantized model raises
            model.to(dtype)
        if device is not None:
            try:
                self._device = torch.empty(0, device=device).device
            except (RuntimeError, AssertionError) as error:
                expected = "expected a device of this machine, such as cpu or cuda:0"
                raise ModelError(f"teacher.device: {expected}, got {device}: {one_line(error, 100)}.") from None
            model.to(self._device)

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Tensor], alignment: Alignment) -> TeacherOutput:
        home = batch["input_ids"].device
        device = self._device or home
        if not is_spread(self.model) and next(self.model.parameters()).device != device:
            self.model.to(device)
        with torch.autocast(device.type, enabled=False):  # the student's autocast must not change the targets
            targets, inside = self._run(inputs(batch, device), alignment)
            if isinstance(targets, DenseTargets) or targets.hidden.device != home:
                targets = DenseTargets(targets.dense().to(home))
        return TeacherOutput(targets, inside=inside.to(home))

    @property
    def model(self) -> Any:
        """The model; a teacher that is made from the student has none before `attach`."""
        if self._model is None:
            raise ModelError(f"{type(self).__name__}: expected a student, got none yet. Call attach(student) first.")
        return self._model

    @property
    def shape(self) -> ModelShape:
        return self._capture.shape

    def prepare(self, needs: ActivationRequest) -> None:
        if needs:
            self._capture.prepare(needs)
            self._needs |= needs

    def _use(self, model: nn.Module) -> None:
        """Run a model from now on, prepared for what has been requested before."""
        self._model = model
        for cached in ("_capture", "_split", "_packed_lengths"):
            vars(self).pop(cached, None)
        self.prepare(self._needs)

    def _run(self, batch: Mapping[str, Tensor], alignment: Alignment) -> tuple[DenseTargets | HeadTargets, Activations]:
        if PACKED_LENGTH in batch and not self._keeps_apart(int(batch[PACKED_LENGTH])):
            batch = {name: column for name, column in batch.items() if name != PACKED_LENGTH}
        forward = partial(forward_targets, self.model, self._split, batch, alignment)
        if not self._needs:
            return forward(), Activations()
        targets, inside = self._capture.capture(self._needs, forward)
        layout = PackedLayout.of(batch, flat=flattens(self.model))
        return targets, inside.of_rows(layout, batch["input_ids"].shape[1])

    def _keeps_apart(self, length: int) -> bool:
        """Whether the model keeps the rows apart that are packed into some length, tried at the first batch."""
        if length not in self._packed_lengths:
            mistake = packing_mistake(self.model, self._split, length)
            if mistake is not None:
                logger.warning("teacher: it reads padded rows where the student reads packed ones: it is %s.", mistake)
            self._packed_lengths[length] = mistake is None
        return self._packed_lengths[length]

    @cached_property
    def _packed_lengths(self) -> dict[int, bool]:
        """Lengths of packed rows that were tried, and whether the model keeps the rows within them apart."""
        return {}

    @cached_property
    def _capture(self) -> ActivationCapture:
        return ActivationCapture(self.model)

    @cached_property
    def _split(self) -> SplitModel | None:
        return split_model(self.model)  # at the first batch, on the device where the model runs


@dataclass(frozen=True)
class ModelSource(MemberSource):
    """A model that runs beside the student.

    Args:
        model: a folder with a model and its tokenizer, or a name on the hub
        dtype: its precision; auto is the one it is saved in, int8 and int4 quantize its linear layers
        device: such as cuda:1; by default the student's
        device_map: auto spreads the layers over GPUs, memory and disk; or a device, cpu or disk by module
        max_memory: with device_map auto, by device: {0: 20GiB, cpu: 8GiB}
        offload_folder: with device_map, for weights on the disk that are not read from the model's own files
        shard: under torchrun, split the layers over all processes instead of a copy on each
    """

    model: str
    dtype: Precision = "auto"
    device: str | None = None
    device_map: Literal["auto"] | dict[str, int | str] | None = None
    max_memory: dict[int | str, str] | None = None
    offload_folder: str | None = None
    shard: bool = False
    name = "model"
    other_tokenizer = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.device_map is None and (self.max_memory or self.offload_folder):
            raise ShapeError("expected device_map with max_memory and offload_folder, got none")
        if self.device_map is not None and self.device is not None:
            raise ShapeError("expected device or device_map, got both")
        if isinstance(self.device_map, dict) and self.max_memory:
            raise ShapeError("expected max_memory with device_map: auto, got a device for each module")
        if self.shard and self.dtype in ("int8", "int4"):
            raise ShapeError(f"expected shard with a dtype in full precision, got {self.dtype}, which is not split")
        for key in ("device", "device_map", "prefetch"):
            if self.shard and getattr(self, key):
                raise ShapeError(f"expected shard without {key}, got both: all processes run the layers together")

    @property
    def title(self) -> str:
        return self.model

    def load(self, student: str | None, task: Task = "causal", key: str = "teacher") -> LoadedTeacher:
        bits = {"int8": 8, "int4": 4}.get(self.dtype)
        names = ("device_map", "max_memory", "offload_folder")  # copied, as accelerate changes them in place
        placement = {name: copy.copy(value) for name in names if (value := getattr(self, name)) is not None}
        dtype = "auto" if bits else self.dtype
        load = partial(load_model, self.model, f"{key}.model", dtype, task, bits=bits, placement=placement)
        sharded = self.shard and PartialState().num_processes > 1
        model = load_sharded(load, f"{key}.shard") if sharded else load()
        tokenizer = load_tokenizer(self.model, f"{key}.model")
        config = copy.deepcopy(model.config)
        if hasattr(config, "quantization_config"):  # students derived from the config have full precision
            del config.quantization_config
        alone = None if sharded else model  # what one process can run
        return LoadedTeacher(ModelTeacher(model, device=self.device), tokenizer, alone, config, {key: model})
