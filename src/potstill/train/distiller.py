"""One step of distillation: student, teacher and objective put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from potstill.errors import ShapeError, VocabularyError
from potstill.losses.alignment import SAMPLER_LOG_PROBS, STUDENT_LOG_PROBS, Alignment, Task, align, attended_positions
from potstill.models.capture import ActivationCapture, ActivationRequest, Activations
from potstill.models.split import forward_targets, split_model
from potstill.teachers.model import ModelTeacher
from potstill.teachers.teacher import Teacher, TeacherOutput
from potstill.train.objective import Objective, task_mistakes
from potstill.train.prefetch import Prefetch
from potstill.train.signals import SampledTokens, Signals
from potstill.train.terms.term import Term


class StepOutput(NamedTuple):
    """What one step gives.

    Args:
        loss: a scalar with gradient.
        logs: every term's value without its weight, detached; in evaluation mode also cross_entropy, or squared_error.
    """

    loss: Tensor
    logs: dict[str, Tensor]


class Distiller(nn.Module):
    """A student that learns from a teacher.

    The student and what the objective trains are parameters of this module; the teacher is not. Where heads are plain
    no logits are built (`potstill.models.split`). To compile, compile the Distiller: a compiled student gives whole
    logits.

    Args:
        student: a model of transformers for the task.
        teacher: a `Teacher`, or a model, which becomes a `ModelTeacher`; None where no term needs one.
        objective: an `Objective`, or a list of its terms.
        vocabulary: the number of tokens that teacher and student share, where a head has padding rows behind them:
            both are sliced to it before the normaliser.
        task: what both are asked for, and so what labels mean; see `potstill.losses.alignment.Task`.
        prefetch: ask the teacher one batch ahead, while the student learns; see `prefetch`.

    Raises:
        ShapeError: a term needs a teacher and there is none, asks for a layer that is not there, or makes no sense for
            the task.
        VocabularyError: a term compares tokens and the teacher has another tokenizer, or the other way round.
        ModelError: a term asks for something that the student or the teacher does not give.

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
    ) -> None:
        super().__init__()
        self.student = student
        self.task = task
        self.objective = objective if isinstance(objective, Objective) else Objective(objective)
        for mistake in task_mistakes(self.objective.terms, task):
            raise ShapeError(mistake)
        self.vocabulary = vocabulary
        # In a tuple, so that torch does not take the teacher for a part of what is trained and saved.
        self._teacher = (ModelTeacher(teacher) if isinstance(teacher, nn.Module) else teacher,)
        self._steps = 0
        # Whether the teacher is asked: the trainer evaluates by labels alone on rows that it cannot speak about.
        self.consults = self.objective.needs_teacher
        if self.objective.needs_teacher and self.teacher is None:
            asking = next(term.name for term in self.objective.terms if term.needs_teacher)
            raise ShapeError(f"Distiller: expected a teacher for the term {asking}, got None.")
        self._must_speak_alike()
        if self.teacher is not None:
            self.teacher.attach(student)
        self._prefetch = Prefetch(self.teacher) if prefetch and self.teacher is not None else None
        self._needs = ActivationRequest()
        if self.objective.reads_layers:
            self._taps = ActivationCapture(student)
            theirs = None
            if self.objective.reads_teacher_layers:
                assert self.teacher is not None
                theirs = self.teacher.anatomy
            self._needs, asked = self.objective.fit(self._taps.anatomy, theirs)
            self._taps.prepare(self._needs)
            if self.teacher is not None:
                self.teacher.prepare(asked)
        self.cut = split_model(student)  # here, before wrappers of the Distiller shard the weights

    @property
    def teacher(self) -> Teacher | None:
        """The teacher, if there is one."""
        return self._teacher[0]

    def step(self, batch: Mapping[str, Tensor], *, normalizer: Tensor | float | None = None) -> StepOutput:
        """The loss of a batch, for a loop of one's own: call `loss.backward()` on it.

        In training mode each call counts as one optimiser step for the schedules, and a teacher that follows the
        student does so before the next one. To accumulate gradients over
        several batches call the module itself: `distiller(batch, normalizer=counting tokens of all, at=step)`, with
        `attended_normalizer` for terms over layers, and `teacher.after_step(step)` after each optimiser step.

        Args:
            batch: input_ids, attention_mask and labels, [B, T] each; labels are not shifted, -100 does not count. Where
                rows are judged labels are [B]. Weights of the labels' shape, where there are any, say how much each
                counts in every mean over tokens.
            normalizer: see `forward`.
        """
        if self.training and self._steps and self.teacher is not None:
            self.teacher.after_step(self._steps)
        output: StepOutput = self(batch, normalizer=normalizer, at=self._steps)
        self._steps += self.training
        return output

    def forward(
        self,
        batch: Mapping[str, Tensor],
        normalizer: Tensor | float | None = None,
        at: int = 0,
        attended_normalizer: Tensor | float | None = None,
    ) -> StepOutput:
        """The loss of a batch.

        Args:
            batch: see `step`.
            normalizer: the number of counting tokens in the whole optimiser step, or the sum of their weights; default:
                of this batch.
            at: the optimiser step, for the schedules.
            attended_normalizer: the number of attended positions in the whole optimiser step, for terms over layers.
        """
        alignment = align(batch["labels"], self.task, batch.get("weights"))
        student, inside = self._listen(partial(forward_targets, self.student, self.cut, batch, alignment))
        inside = inside.last(batch["input_ids"].shape[1])
        teacher = self._ask(batch, alignment) if self.consults else None
        if self.vocabulary is not None:
            student = student.slice(self.vocabulary)
        positions = attended_positions(batch, self.task) if self._needs else None
        signals = Signals(
            *(student, alignment.labels, teacher, normalizer, at, inside, positions, attended_normalizer, alignment),
            sampled=_sampled(batch, alignment),
        )
        return StepOutput(*self.objective(signals))

    @property
    def prefetches(self) -> bool:
        """Whether the teacher is asked one batch ahead."""
        return self._prefetch is not None and self.consults

    def prefetch(self, batches: Sequence[Mapping[str, Tensor]]) -> None:
        """Say which batches the module will be called with, in order, for `prefetch`; none ends it.

        A batch is known again by its very tensor of input_ids. Others may come between, and are asked on the spot.
        """
        if self._prefetch is None:
            return
        if batches:
            self._prefetch.prefetch([(batch, align(batch["labels"], self.task)) for batch in batches])
        else:
            self._prefetch.close()

    def _listen(self, call: Callable[[], Any]) -> tuple[Any, Activations]:
        return self._taps.capture(self._needs, call) if self._needs else (call(), Activations())

    def _ask(self, batch: Mapping[str, Tensor], alignment: Alignment) -> TeacherOutput:
        assert self.teacher is not None
        said = (self._prefetch or self.teacher)(batch, alignment)
        if self.training:
            self.teacher.learn(said)
        if self.vocabulary is None or said.across is not None:
            return said
        return replace(said, targets=said.targets.slice(self.vocabulary))

    def _must_speak_alike(self) -> None:
        """Every term compares tokens with a teacher of the student's tokens, or bytes with one that has others."""
        if self.teacher is None:
            return
        for term in self.objective.terms:
            if term.needs_teacher and term.other_tokenizer != self.teacher.other_tokenizer:
                kind = type(self.teacher).__name__
                if term.other_tokenizer:
                    raise VocabularyError(
                        f"Distiller: expected a CrossTokenizerTeacher for the term {term.name}, got {kind}. "
                        "It compares chunks of bytes. Wrap the teacher in it; the tokenizers may be the same."
                    )
                raise VocabularyError(
                    f"Distiller: expected terms that compare bytes with {kind}, got {term.name}. Its teacher has other "
                    "tokens. Use chunks, mapped_logits or uld, and labels."
                )

    # What transformers.Trainer and accelerate ask of a model, passed on to the student.

    @property
    def config(self) -> Any:
        """The student's config."""
        return self.student.config

    def get_input_embeddings(self) -> nn.Module:
        """The student's input embeddings."""
        return self.student.get_input_embeddings()  # type: ignore[operator]

    def get_output_embeddings(self) -> nn.Module | None:
        """The student's head: FSDP2 must know whether its weight is that of the input embeddings."""
        return self.student.get_output_embeddings()  # type: ignore[operator]

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        """Recompute the student's activations in the backward pass."""
        self._let_gradients_through()
        self.student.gradient_checkpointing_enable(**kwargs)  # type: ignore[operator]

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        """The newer name of `gradient_checkpointing_enable`."""
        self._let_gradients_through()
        self.student.activation_checkpointing_enable(**kwargs)  # type: ignore[operator]

    def _let_gradients_through(self) -> None:
        """Reentrant checkpointing computes no gradient where what goes in has none, as under an adapter."""
        if not any(parameter.requires_grad for parameter in self.get_input_embeddings().parameters()):
            self.student.enable_input_require_grads()  # type: ignore[operator]


def _sampled(batch: Mapping[str, Tensor], alignment: Alignment) -> SampledTokens | None:
    """Find the target tokens that a `Rollout` sampled."""
    if STUDENT_LOG_PROBS not in batch:
        return None
    log_probs, sampler = (alignment.select_labels(batch[name]) for name in (STUDENT_LOG_PROBS, SAMPLER_LOG_PROBS))
    return SampledTokens(~log_probs.isnan(), alignment.row, log_probs, sampler)
