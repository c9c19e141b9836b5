"""DistillationTrainer: a transformers.Trainer whose loss is an objective."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import EvalLoopOutput

from potstill.data import PaddingCollator, pad_token_id
from potstill.errors import DivergedError, UserError
from potstill.targets import IGNORE, Task, align, attended, counting
from potstill.teachers import Teacher
from potstill.train.callbacks import Epochs
from potstill.train.distiller import Distiller, StepOutput
from potstill.train.objective import Objective, Term, or_one
from potstill.train.prefetch import Peek

TRAINED = "objective.safetensors"  # in a checkpoint: what the objective trains beside the student
TEACHER = "teacher.safetensors"  # likewise: what has become of a teacher that changes


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


class DistillationTrainer(Trainer):
    """Trains a student by an objective, with all that transformers.Trainer can do.

    The loss is divided once, by the counting tokens of the whole optimiser step over all ranks and accumulation steps;
    where tokens have weights, by their sum.
    Checkpoints and `save_model` hold the plain student: `from_pretrained` loads it. What terms train beside it
    (projections) is kept in checkpoints alone.

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
        if all(term.looks_inside for term in self.distiller.objective.terms):
            args.ddp_find_unused_parameters = True  # terms over layers leave the head alone
        super().__init__(
            model=self.distiller,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        if self.distiller.teacher is not None:
            self.add_callback(_Follow(self.distiller.teacher))
        if hasattr(train_dataset, "set_epoch"):
            self.add_callback(Epochs(train_dataset))
        self._train_sums = _Sums()
        self._eval_sums = _Sums()
        self._attended: Tensor | None = None
        self._peek: Peek[Any] | None = None
        self._micro_step = 0
        self._steps_since_log = 0

    # The loss.

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The batches of one optimiser step; a teacher that is asked ahead is told of them and of the one after."""
        if not self.distiller.prefetches:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._peek is None or self._peek.source is not epoch_iterator:
            self._peek = Peek(epoch_iterator)
        found = super().get_batch_samples(self._peek, num_batches, device)
        self.distiller.foretell([*found[0], *self._peek.ahead()])
        return found

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
        tokens = counting(batch["labels"], task).sum()
        weights = None if "weights" not in batch else align(batch["labels"], task, batch["weights"]).weights
        if weights is not None:
            tokens = weights.sum()
        return torch.stack([tokens, attended(batch, task).sum().to(tokens)])

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
        teacher, asked = self.distiller.teacher, self.distiller.consults
        self.distiller.consults = asked and teacher is not None and teacher.covers(dataloader.dataset)
        self._eval_sums = _Sums()
        result = super().evaluation_loop(dataloader, *args, **kwargs)
        self.distiller.consults = asked
        objective = self.distiller.objective
        over = {name: term.over for name, term in zip(objective.names, objective.terms, strict=True)}
        means = self._eval_sums.means(self.accelerator, over)
        if means:
            means["loss"] = objective.total(means, self.state.global_step)
        exact = {f"{prefix}_{name}": mean for name, mean in means.items()}
        return result._replace(metrics={**(result.metrics or {}), **exact})

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds every term's mean since the last line to what is logged."""
        if "loss" in logs:
            for name, total in self._train_sums.totals(self.accelerator).items():
                logs[name] = total / max(self._steps_since_log, 1)
            self._train_sums = _Sums()
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
        if teacher is not None and teacher.of_student and self.is_fsdp_enabled:
            raise UserError(
                f"{type(teacher).__name__}: expected a student that is whole on every rank, got one that FSDP shards. "
                "Its teacher is made of its weights. Train without FSDP, or name another teacher."
            )
        if teacher is not None and self.distiller.consults:
            teacher.require(self.train_dataset)
        if resume_from_checkpoint is True:
            found = last_checkpoint(self._checkpoints)
            if found is None:
                raise UserError(f"train: expected a complete checkpoint in {self.args.output_dir}, got none.")
            resume_from_checkpoint = str(found)
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.distiller.foretell(())

    # Checkpoints.

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        for name, parameter in self.distiller.named_parameters():
            if not torch.isfinite(parameter).all():
                self._stop(f"a weight that is not finite in {name} before checkpoint {self.state.global_step}")
        teacher = self.distiller.teacher
        states = {TEACHER: {} if teacher is None else teacher.state_dict()}
        if not self.is_fsdp_enabled:  # whose own files hold all that is trained
            states[TRAINED] = self.distiller.objective.state_dict()
        folder = self._checkpoints / f"checkpoint-{self.state.global_step}"
        for name, state in states.items():
            if state and self.args.should_save:
                folder.mkdir(parents=True, exist_ok=True)
                save_file({key: value.contiguous() for key, value in state.items()}, folder / name)
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
        self.distiller.student.save_pretrained(target, state_dict=state_dict)  # type: ignore[operator]
        if self.processing_class is not None:
            self.processing_class.save_pretrained(target)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.distiller.teacher is not None:
            restore_teacher(self.distiller.teacher, Path(resume_from_checkpoint))
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        student = self.distiller.student
        saved = type(student).from_pretrained(resume_from_checkpoint, dtype=student.dtype)  # type: ignore[attr-defined]
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


def restore_teacher(teacher: Teacher, checkpoint: Path) -> None:
    """What has become of a teacher until a checkpoint; nothing, for one that does not change.

    Raises:
        UserError: the checkpoint does not know.
    """
    if not teacher.state_dict():
        return
    file = checkpoint / TEACHER
    if not file.exists():
        raise UserError(
            f"train: expected {TEACHER} in {checkpoint}, got none. The teacher changes in training, and this "
            "checkpoint is of another one. Begin anew, or resume with the teacher that it is of."
        )
    teacher.load_state_dict(load_file(file))


def _uncounted(labels: Any) -> Any:
    """The labels of a row that does not count, in the form of some that do."""
    if isinstance(labels, list):
        return [IGNORE] * len(labels)
    return math.nan if isinstance(labels, float) else IGNORE


class _Sums:
    """Named sums over batches, kept on the device until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: Tensor | None = None

    def add(self, values: Mapping[str, Tensor], counts: Tensor | None = None) -> None:
        for name, value in values.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        if counts is not None:
            self._counts = counts if self._counts is None else self._counts + counts

    def totals(self, accelerator: Any) -> dict[str, float]:
        """The sums over all ranks."""
        return {name: float(accelerator.reduce(value)) for name, value in self._sums.items()}

    def means(self, accelerator: Any, over: Mapping[str, str]) -> dict[str, float]:
        """The sums over all ranks, each divided by the count over all ranks of what it is a mean over."""
        if self._counts is None:
            return {}
        tokens, positions = or_one(accelerator.reduce(self._counts)).tolist()
        return {
            name: total / (positions if over.get(name) == "attended" else tokens)
            for name, total in self.totals(accelerator).items()
        }


def last_checkpoint(directory: Path) -> Path | None:
    """The newest checkpoint that was written to its end, or None.

    The trainer's state is the last file of a checkpoint: where it is whole, so is everything before it.
    """
    numbered = [path for path in directory.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    found = sorted(numbered, key=lambda path: int(path.name.rpartition("-")[2]))
    return next((path for path in reversed(found) if _is_complete(path)), None)


def _is_complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return True
