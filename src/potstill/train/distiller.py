"""Distiller: one step of distillation, from student, teacher and objective."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from potstill.data.right_padding import right_padded
from potstill.errors import ModelError, ShapeError, VocabularyError
from potstill.losses.alignment import SAMPLER_LOG_PROBS, STUDENT_LOG_PROBS, Task, align, attended_positions
from potstill.models.capture import ActivationCapture, ActivationRequest, Activations
from potstill.models.integrity import check_causal
from potstill.models.packing import PACKED_LENGTH, PackedLayout
from potstill.models.packing_probe import packing_mistake
from potstill.models.precision import keep_gradients
from potstill.models.split import flattens, forward_targets, split_model
from potstill.teachers.model import ModelTeacher
from potstill.teachers.teacher import Teacher
from potstill.train.columns import check_columns, check_padding, padding_id
from potstill.train.objective import Objective, task_mistakes
from potstill.train.prefetch import Prefetch
from potstill.train.signals import SampledTokens, Signals
from potstill.train.terms.routers import RouterBalance
from potstill.train.terms.term import Term

logger = logging.getLogger(__name__)

Batch = Mapping[str, Tensor]
Normalizer = Tensor | float | None


class StepOutput(NamedTuple):
    """Result of one step. In evaluation mode the logs also have cross_entropy or squared_error."""

    loss: Tensor  # scalar with gradient
    logs: dict[str, Tensor]  # every term's value without its weight, detached


class Distiller(nn.Module):
    """A student, its teacher and an objective as one module.

    Its parameters are the student's and those that the objective trains, not the teacher's. Where heads are plain
    linear layers no logits are built (`potstill.models.split`). To compile, compile the Distiller: a compiled student
    gives whole logits.

    Args:
        teacher: a `Teacher`, or a model, which becomes a `ModelTeacher`; None where no term needs one.
        vocabulary: number of tokens that teacher and student share. Both heads are sliced to it before the softmax, so
            that rows of padding do not count.
        task: what both models predict, which defines the labels; see `potstill.losses.alignment.Task`.
        prefetch: run the teacher one batch ahead, while the student trains; see `prefetch`.
        packed_length: in training, both models read the rows of a batch side by side in rows of at most so many tokens
            (a longer row stays whole), with the same numbers and less padding. A teacher that does not keep such rows
            apart reads them padded. None pads for both.

    Raises:
        ShapeError: a term needs a teacher and there is none, reads a layer that does not exist, or is not defined for
            the task.
        VocabularyError: a term compares tokens and the teacher has another tokenizer, or the other way round.
        ModelError: student or teacher cannot give what a term reads, or the student does not keep packed rows apart.

    >>> from potstill.losses.divergences import ForwardKL
    >>> from potstill.train.terms.logits import Logits
    >>> Distiller(nn.Identity(), None, [Logits(ForwardKL())])
    Traceback (most recent call last):
    potstill.errors.ShapeError: Distiller: expected a teacher for the term logits, got None.
    """

    accepts_loss_kwargs = True  # tells transformers.Trainer that the loss is normalised over the whole step

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher | nn.Module | None,
        objective: Objective | Sequence[Term],
        *,
        vocabulary: int | None = None,
        task: Task = "causal",
        prefetch: bool = False,
        packed_length: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(student, nn.Module):
            raise ShapeError(f"Distiller: expected a model as the student, got a {type(student).__name__}. Load it.")
        if teacher is student:
            hint = "Load it a second time, or give EMATeacher() for self-distillation."
            raise ShapeError(
                f"Distiller: expected another model as the teacher, which is frozen, got the student. {hint}"
            )
        keep_gradients(student)
        self.student, self.vocabulary, self.task = student, vocabulary, task
        self.objective = objective if isinstance(objective, Objective) else Objective(objective)
        for mistake in task_mistakes(self.objective.terms, task):
            raise ShapeError(mistake)
        self.teacher = ModelTeacher(teacher) if isinstance(teacher, nn.Module) else teacher  # not a submodule
        self._steps, self._step_begins = 0, True  # of optimiser steps, counted by `step`
        # The trainer switches the teacher off for held-out rows that it does not cover.
        self.uses_teacher = self.objective.needs_teacher
        self._check_teacher()
        self._prefetch: Prefetch | None = None
        if self.teacher is not None:
            self.teacher.attach(student)
            self._prefetch = Prefetch(self.teacher) if prefetch else None
        if task == "causal":
            for role, model in self.models().items():
                check_causal(model, f"Distiller {role}")
        if getattr(getattr(student, "config", None), "output_router_logits", False) and not any(
            isinstance(term, RouterBalance) for term in self.objective.terms
        ):
            logger.warning("student: its balancing loss (output_router_logits) is left out. Add router_balance for it.")
        self._request = ActivationRequest()
        if self.objective.reads_layers:
            self._capture = ActivationCapture(student)
            shape = self.teacher.shape if self.teacher is not None and self.objective.reads_teacher_layers else None
            self._request, of_teacher = self.objective.fit(self._capture.shape, shape)
            self._capture.prepare(self._request)
            if self.teacher is not None:
                self.teacher.prepare(of_teacher)
        self.split = split_model(student)  # here, before wrappers of the Distiller shard the weights
        self.packed_length = packed_length
        if packed_length is not None:
            self._check_packing(packed_length)

    def step(
        self,
        batch: Batch,
        *,
        normalizer: Normalizer = None,
        attended_normalizer: Normalizer = None,
        last: bool = True,
    ) -> StepOutput:
        """Compute the loss of a batch in your own training loop: call `loss.backward()` on it.

        Call `train()` on the Distiller before the loop, and `eval()` before measuring: `from_pretrained` gives models
        in evaluation mode, without dropout. The teacher stays in it.

        In training mode each call counts as one optimiser step for schedules and for teachers that follow the student.
        To accumulate gradients over several batches, pass `last=False` for all but the last of them, and the number of
        target tokens of all of them as `normalizer` (terms over layers read `attended_normalizer`): the gradient is
        then that of one large batch.

        Args:
            batch: input_ids, attention_mask and labels, [B, T] each; labels are not shifted, -100 is ignored. For
                sequence-level tasks labels are [B]. `weights`, if present, has the shape of labels and weighs each
                target in every mean over tokens. Rows may be padded on both sides or packed: see
                `potstill.data.right_padding.right_padded`, also for what is missing.
            normalizer, attended_normalizer: see `forward`.
            last: whether the optimiser steps behind this batch.
        """
        if self.training:
            if self._steps and self._step_begins and self.teacher is not None:
                self.teacher.after_step(self._steps)
            self._step_begins = last
        output: StepOutput = self(batch, normalizer, self._steps, attended_normalizer)
        self._steps += self.training and last
        return output

    def forward(
        self, batch: Batch, normalizer: Normalizer = None, at: int = 0, attended_normalizer: Normalizer = None
    ) -> StepOutput:
        """Compute the loss of a batch; see `step`.

        Args:
            normalizer: number of target tokens in the whole optimiser step, or the sum of their weights; by default of
                this batch.
            at: optimiser step, for the schedules.
            attended_normalizer: number of attended positions in the whole optimiser step, for terms over layers.
        """
        for model in self.models().values():
            check_columns(batch, model)
        if self.task == "causal":
            check_padding(batch, padding_id(self.student), layers=bool(self._request))
        batch = self._read_by_models(batch)
        alignment = align(batch["labels"], self.task, batch.get("weights"))
        run = partial(forward_targets, self.student, self.split, batch, alignment)
        student, inside = self._capture.capture(self._request, run) if self._request else (run(), Activations())
        layout = PackedLayout.of(batch, flat=flattens(self.student)) if self._request else None
        inside = inside.of_rows(layout, batch["input_ids"].shape[1])
        teacher = None
        if self.uses_teacher and self.teacher is not None:
            teacher = (self._prefetch or self.teacher)(batch, alignment)
            if self.training:
                self.teacher.update(teacher)
        if self.vocabulary is not None:
            student = student.slice(self.vocabulary)
            if teacher is not None and teacher.chunks is None:
                teacher = replace(teacher, targets=teacher.targets.slice(self.vocabulary))
        positions = attended_positions(batch, self.task) if self._request else None
        sampled = None
        if STUDENT_LOG_PROBS in batch:
            log_probs, of_sampler = (alignment.select_labels(batch[x]) for x in (STUDENT_LOG_PROBS, SAMPLER_LOG_PROBS))
            sampled = SampledTokens(~log_probs.isnan(), log_probs, of_sampler)
        of_layers = (inside, positions, attended_normalizer)
        return StepOutput(*self.objective(Signals(student, alignment, teacher, normalizer, at, *of_layers, sampled)))

    def models(self) -> dict[str, Any]:
        """The student, and the model of a teacher that has one, by their roles."""
        model = getattr(self.teacher, "model", None)
        return {"student": self.student} | ({"teacher": model} if isinstance(model, nn.Module) else {})

    @property
    def prefetches(self) -> bool:
        """Whether the teacher runs one batch ahead."""
        return self._prefetch is not None and self.uses_teacher

    def prefetch(self, batches: Sequence[Batch]) -> None:
        """Announce the next batches in order, so that the teacher runs on them ahead; an empty sequence ends it.

        A batch is recognised by its own input_ids tensor, as `right_padded` returns it. The teacher runs at once on any
        other batch.
        """
        if self._prefetch is not None:
            batches = [self._read_by_models(batch) for batch in batches]
            self._prefetch.prefetch([(batch, align(batch["labels"], self.task)) for batch in batches])

    def _read_by_models(self, batch: Batch) -> dict[str, Tensor]:
        """The form of a batch that models read: in training with the length of packed rows."""
        batch = right_padded(batch, self.task)
        if self.packed_length is None or not self.training:
            return batch
        return {**batch, PACKED_LENGTH: torch.tensor(self.packed_length)}

    def _check_packing(self, length: int) -> None:
        if self.task != "causal":
            raise ShapeError(f"packing: expected the task causal, got {self.task}. Set data.packing to false.")
        if (mistake := packing_mistake(self.student, self.split, length)) is not None:
            raise ModelError(
                f"packing: expected a student that keeps packed rows apart, got {mistake}. Set data.packing to "
                "false: rows are then padded."
            )

    def _check_teacher(self) -> None:
        """Check that each term has its teacher: of the same tokenizer, or of another where it compares bytes."""
        if not isinstance(self.teacher, Teacher | None):
            hint = "Load a model by its name, and make an EnsembleTeacher of several."
            got = f"a {type(self.teacher).__name__}"
            raise ShapeError(f"Distiller: expected a Teacher, a model or None as the teacher, got {got}. {hint}")
        for term in (term for term in self.objective.terms if term.needs_teacher):
            if self.teacher is None:
                raise ShapeError(f"Distiller: expected a teacher for the term {term.name}, got None.")
            kind = type(self.teacher).__name__
            if term.other_tokenizer and not self.teacher.other_tokenizer:
                raise VocabularyError(
                    f"Distiller: expected a CrossTokenizerTeacher for the term {term.name}, got {kind}. "
                    "Wrap the teacher in one; the tokenizers may be the same."
                )
            if self.teacher.other_tokenizer and not term.other_tokenizer:
                raise VocabularyError(
                    f"Distiller: expected terms over bytes with {kind}, got {term.name}. Use chunks, mapped_logits or "
                    "uld, and labels."
                )

    # The interface of models that transformers.Trainer and accelerate use, passed on to the student.

    @property
    def config(self) -> Any:
        return self.student.config

    def get_input_embeddings(self) -> nn.Module:
        return self.student.get_input_embeddings()  # type: ignore[operator]

    def get_output_embeddings(self) -> nn.Module | None:
        """The student's head, for FSDP2, which must know whether its weight is tied to the input embeddings."""
        return self.student.get_output_embeddings()  # type: ignore[operator]

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        self._let_gradients_through()
        self.student.gradient_checkpointing_enable(**kwargs)  # type: ignore[operator]

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:  # the newer name
        self._let_gradients_through()
        self.student.activation_checkpointing_enable(**kwargs)  # type: ignore[operator]

    def _let_gradients_through(self) -> None:
        """Give inputs a gradient: reentrant checkpointing needs one, and under an adapter embeddings have none."""
        if not any(parameter.requires_grad for parameter in self.get_input_embeddings().parameters()):
            self.student.enable_input_require_grads()  # type: ignore[operator]
