"""DistillationTrainer: a transformers.Trainer whose loss is an objective."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import EvalLoopOutput

from potstill.data.batches import PaddingCollator, pad_token_id
from potstill.errors import DivergedError, UserError
from potstill.losses.alignment import IGNORE, Task, align, attended_positions, target_positions
from potstill.models.adapted import is_adapted, save_student
from potstill.models.loading import load_adapter
from potstill.teachers.teacher import Teacher
from potstill.train.callbacks import Epochs
from potstill.train.checkpoints import TEACHER, last_checkpoint, restore_teacher
from potstill.train.distiller import Distiller, StepOutput
from potstill.train.objective import OF_TEXT, Objective
from potstill.train.prefetch import Peek
from potstill.train.rollout import Rollout, with_weights_of
from potstill.train.sharding import UNSHARDED, Sharding
from potstill.train.signals import or_one
from potstill.train.sums import Sums
from potstill.train.terms.term import Term

TRAINED = "objective.safetensors"  # in a checkpoint: what the objective trains beside the student


@dataclass
class DistillationConfig(TrainingArguments):
    """transformers.TrainingArguments; only the defaults differ that distillation needs.

    What the loss is, is said by the objective: `label_smoothing_factor` is refused.
    """

    remove_unused_columns: bool = False  # the columns are the batch; the student's signature does not know them
    report_to: str | list[str] | None = "none"

    def __post_init__(self) -> None:
        if self.greater_is_better is None:
            self.greater_is_better = False  # all that is measured here are losses, whatever they are called
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # every step uses all of them; looking for others costs a pass
        if not torch.accelerator.is_available():
            self.use_cpu = True  # transformers allows bf16 on a CPU only where this is said
            self.dataloader_pin_memory = False  # there is nothing to pin for, and torch would warn at every epoch
        super().__post_init__()
        if self.label_smoothing_factor:
            raise UserError(
                f"train.label_smoothing_factor: expected 0, got {self.label_smoothing_factor}. "
                "The objective is the loss: soften the labels with a logits term instead."
            )
        if self.fsdp and self.world_size == 1:
            raise UserError(UNSHARDED)


class DistillationTrainer(Trainer):
    """Trains a student by an objective, with all that transformers.Trainer can do.

    The loss is divided once, by the counting tokens of the whole optimiser step over all ranks and accumulation steps;
    where tokens have weights, by their sum.
    Checkpoints and `save_model` hold the plain student: `from_pretrained` loads it; of a PeftModel the adapter alone.
    What terms train beside it (projections) is kept in checkpoints alone.

    Args:
        student: the model to train.
        teacher: a `Teacher` or a model; None where no term needs one.
        objective: an `Objective` or a list of its terms.
        args: a `DistillationConfig`.
        train_dataset: examples with input_ids and labels; see `potstill.data`.
        eval_dataset: the same, held out.
        processing_class: the tokenizer.
        vocabulary: see `Distiller`.
        task: see `Distiller`.
        rollout: puts the student's own text in place of a share of the training rows; None for data alone.
        prefetch: ask the teacher about the next batch while the student learns from this one.
        **kwargs: any other argument of transformers.Trainer (callbacks, optimizers, data_collator).
    """

    # Read by transformers.Trainer: what `compute_loss` returns needs no division by accumulation steps.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: Teacher | nn.Module | None,
        objective: Objective | Sequence[Term],
        args: DistillationConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        vocabulary: int | None = None,
        task: Task = "causal",
        rollout: Rollout | None = None,
        prefetch: bool = False,
        **kwargs: Any,
    ) -> None:
        args = args or DistillationConfig(output_dir="runs/student")
        if args.n_gpu > 1:
            args._n_gpu = 1  # nn.DataParallel would copy the teacher in every step; several GPUs want torchrun
        if "data_collator" not in kwargs and processing_class is not None:
            kwargs["data_collator"] = PaddingCollator(pad_token_id(processing_class)[0])
        set_seed(args.seed)  # terms may begin with random weights
        self.distiller = Distiller(student, teacher, objective, vocabulary=vocabulary, task=task, prefetch=prefetch)
        if all(term.reads_layers for term in self.distiller.objective.terms):
            args.ddp_find_unused_parameters = True  # terms over layers leave the head alone
        super().__init__(
            model=self.distiller,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self.rollout = rollout
        sharding = Sharding.of(self.accelerator.state)
        sharding.refuse(fsdp_asked=bool(args.fsdp), teacher=self.distiller.teacher, rollout=rollout)
        # Under FSDP each rank writes with a copy of its own, so that none waits for the texts of another.
        self._writer: nn.Module | None = None
        if rollout is not None and self.is_fsdp_enabled:
            self._writer = nn.Module.to(deepcopy(student), args.device)
        if self.distiller.teacher is not None:
            self.add_callback(_Follow(self.distiller.teacher))
        if hasattr(train_dataset, "set_epoch"):
            self.add_callback(Epochs(train_dataset))
        self._train_sums = Sums()
        self._eval_sums = Sums()
        self._attended: Tensor | None = None
        self._peek: Peek[Any] | None = None
        self._micro_step = 0
        self._steps_since_log = 0

    # The loss.

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The batches of one optimiser step, with what the student writes, and their counting tokens. A teacher that is
        asked ahead is told of them, and of the one after.
        """
        prefetches, source = self.distiller.prefetches, epoch_iterator
        if prefetches:
            if self._peek is None or self._peek.source is not epoch_iterator:
                self._peek = Peek(epoch_iterator)
            source = self._peek
        batches = list(islice(source, num_batches))
        if self.rollout is not None and batches:
            with self.accelerator.autocast():
                step, rank = self.state.global_step, self.args.process_index
                student = self.distiller.student
                if self._writer is not None:
                    student = with_weights_of(self._writer, self.model_wrapped)
                batches = self.rollout(batches, student, step=step, rank=rank)
        if prefetches and self._peek is not None:
            # What the student will write in the next step is not known yet.
            ahead = [] if self.rollout is not None else self._peek.ahead()
            self.distiller.prefetch([*batches, *ahead])
        return batches, self._get_num_items_in_batch(batches, device)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | None:
        """The counting tokens of an optimiser step (or their weights), over its batches and all ranks; the attended
        positions are kept.
        """
        self._micro_step = 0
        self._steps_since_log += 1
        if not batch_samples:
            return None
        count = torch.stack([self._counts(batch) for batch in batch_samples]).sum(0).to(device)
        if self.args.world_size > 1:
            count = self.accelerator.reduce(count)
        tokens, self._attended = or_one(count).unbind()
        return tokens

    def _counts(self, batch: Mapping[str, Tensor]) -> Tensor:
        """[2]: the counting tokens of a batch, or the sum of their weights, and its attended positions."""
        task = self.distiller.task
        tokens = target_positions(batch["labels"], task).sum()
        weights = None if "weights" not in batch else align(batch["labels"], task, batch["weights"]).weights
        if weights is not None:
            tokens = weights.sum()
        return torch.stack([tokens, attended_positions(batch, task).sum().to(tokens)])

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The objective's loss of one batch, divided by the tokens of the whole optimiser step.

        Raises:
            DivergedError: it is not a finite number.
        """
        output: StepOutput = model(
            inputs,
            normalizer=num_items_in_batch,
            at=self.state.global_step,
            attended_normalizer=self._attended,
        )
        self._micro_step += 1
        if not torch.isfinite(output.loss):
            self._stop(f"loss {output.loss.item()} in batch {self._micro_step} of the step")
        if model.training:
            self._train_sums.add(output.logs)
        # Gradients are averaged over ranks; the division above is by the sum over ranks.
        loss = output.loss * self.args.world_size if model.training else output.loss
        return (loss, output) if return_outputs else loss

    @property
    def _checkpoints(self) -> Path:
        return Path(str(self.args.output_dir))

    def _stop(self, what: str) -> None:
        kept = last_checkpoint(self._checkpoints)
        raise DivergedError(
            f"training: expected finite numbers, got {what} (optimiser step {self.state.global_step + 1}). "
            f"{f'The last good checkpoint is {kept}. ' if kept else ''}"
            "Lower train.learning_rate, raise train.warmup_steps, or train in bf16 instead of fp16."
        )

    # Evaluation: means over tokens, not over batches.

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """transformers.Trainer's; with several ranks, filled up with rows that do not count.

        Ranks must have equally many batches: accelerate would repeat rows, which would count twice.
        """
        rows: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(rows, str):
            rows = self.eval_dataset[rows]  # type: ignore[index]  # one of several held-out sets, by its name
        if self.args.world_size > 1:
            missing = -len(rows) % (self.args.world_size * self.args.per_device_eval_batch_size)
            columns = rows[0].items()
            blank = {name: _uncounted(value) if name.endswith("labels") else value for name, value in columns}
            filling: Any = [blank] * missing
            rows = ConcatDataset([rows, filling])
        return super().get_eval_dataloader(rows)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """The loss of a held-out batch; its sums are kept for `evaluation_loop`."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            output: StepOutput = model(inputs, normalizer=1.0, at=self.state.global_step, attended_normalizer=1.0)
        counts = self._counts(inputs)
        self._eval_sums.add(output.logs, counts)
        return output.loss.detach() / counts.max().clamp_min(1), None, None

    def evaluation_loop(self, dataloader: DataLoader[Any], *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """transformers.Trainer's, with every number a mean over all held-out tokens."""
        prefix = kwargs.get("metric_key_prefix", "eval")
        teacher, asked = self.distiller.teacher, self.distiller.uses_teacher
        self.distiller.uses_teacher = asked and teacher is not None and teacher.covers(dataloader.dataset)
        self._eval_sums = Sums()
        result = super().evaluation_loop(dataloader, *args, **kwargs)
        self.distiller.uses_teacher = asked
        objective = self.distiller.objective
        over = {name: term.over for name, term in zip(objective.names, objective.terms, strict=True)}
        means = self._eval_sums.means(self.accelerator, over)
        if means:
            means["loss"] = objective.total(means, self.state.global_step)
        if self.rollout is not None and means:
            self.rollout.update(means["loss"])
        exact = {f"{prefix}_{name}": mean for name, mean in means.items()}
        return result._replace(metrics={**(result.metrics or {}), **exact})

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds every term's mean since the last line to what is logged."""
        if "loss" in logs:
            totals = self._train_sums.totals(self.accelerator)
            for name, total in totals.items():
                logs[name] = total / max(self._steps_since_log, 1)
            for part, tokens in OF_TEXT.items():  # means over own tokens, and over the data's, each by themselves
                for name in [name for name in totals if name.endswith(part)]:
                    logs[name] = totals[name] / totals[tokens] if totals[tokens] else 0.0
                logs.pop(tokens, None)
            if self.rollout is not None:
                logs |= self.rollout.sums.take(self.accelerator)
            self._train_sums = Sums()
            self._steps_since_log = 0
            logs |= {} if self.distiller.teacher is None else self.distiller.teacher.logs()
        super().log(logs, start_time)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """See transformers.Trainer; `resume_from_checkpoint=True` takes the last complete checkpoint.

        Raises:
            UserError: there is none.
            DataError: the teacher cannot speak about all of the training data.
        """
        teacher = self.distiller.teacher
        if teacher is not None and self.distiller.uses_teacher:
            teacher.require(self.train_dataset)
        if resume_from_checkpoint is True:
            found = last_checkpoint(self._checkpoints)
            if found is None:
                raise UserError(f"train: expected a complete checkpoint in {self.args.output_dir}, got none.")
            resume_from_checkpoint = str(found)
        if self.rollout is not None and resume_from_checkpoint:
            self.rollout.load(Path(str(resume_from_checkpoint)), self.args.process_index)
        if teacher is not None and resume_from_checkpoint and self.is_deepspeed_enabled:  # which loads all else itself
            restore_teacher(teacher, Path(str(resume_from_checkpoint)))
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.distiller.prefetch(())
            if self.rollout is not None and self.args.should_save:
                self.rollout.close()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """transformers.Trainer's; nothing where all steps are done, as after a kill between the last one's checkpoint
        and the end: it would take one more.
        """
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    # Checkpoints.

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        for name, parameter in self.distiller.named_parameters():
            if parameter.requires_grad and not torch.isfinite(parameter).all():
                self._stop(f"a weight that is not finite in {name} before checkpoint {self.state.global_step}")
        teacher = self.distiller.teacher
        states = {TEACHER: {} if teacher is None else teacher.state_dict()}
        if not self.is_fsdp_enabled and not self.is_deepspeed_enabled:  # whose own files hold all that is trained
            states[TRAINED] = self.distiller.objective.state_dict()
        folder = self._checkpoints / f"checkpoint-{self.state.global_step}"
        for name, state in states.items():
            if state and self.args.should_save:
                folder.mkdir(parents=True, exist_ok=True)
                save_file({key: value.contiguous() for key, value in state.items()}, folder / name)
        if self.rollout is not None:
            self.rollout.save(folder, self.args.process_index)
        super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        target = str(output_dir or self.args.output_dir)
        if not self.args.should_save:
            return
        if state_dict is not None:
            state_dict = {
                name.removeprefix("student."): value
                for name, value in state_dict.items()
                if name.startswith("student.")
            }
        save_student(self.distiller.student, target, state_dict)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(target)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.distiller.teacher is not None:
            restore_teacher(self.distiller.teacher, Path(resume_from_checkpoint))
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        student: Any = self.distiller.student
        if is_adapted(student):
            load_adapter(student, resume_from_checkpoint)
        else:
            saved = type(student).from_pretrained(resume_from_checkpoint, dtype=student.dtype)
            student.load_state_dict(saved.state_dict())
        objective = self.distiller.objective
        if objective.state_dict():
            file = Path(resume_from_checkpoint) / TRAINED
            if not file.exists():
                raise UserError(
                    f"train: expected {TRAINED} in {resume_from_checkpoint}, got none. The objective trains "
                    "projections, which this checkpoint does not have."
                )
            objective.load_state_dict(load_file(file))

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))


class _Follow(TrainerCallback):
    """Tells a teacher of every optimiser step, before checkpoints are written."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.teacher.after_step(state.global_step)


def _uncounted(labels: Any) -> Any:
    """The labels of a row that does not count, in the form of some that do."""
    if isinstance(labels, list):
        return [IGNORE] * len(labels)
    return math.nan if isinstance(labels, float) else IGNORE
