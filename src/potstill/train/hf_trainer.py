"""Every override of a private part of transformers.Trainer: the batches of a step, and checkpoints.

tests/test_hf_trainer.py compares the overridden methods with those of the installed version.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import Trainer, TrainingArguments

from potstill.data.right_padding import right_padded
from potstill.errors import DivergedError, ModelError, one_line
from potstill.losses.alignment import align, attended_positions, target_positions
from potstill.models.adapted import is_adapted, save_student
from potstill.models.checksums import CHECKSUMS, write_checksums
from potstill.models.loading import load_adapter
from potstill.models.split import run
from potstill.train.checkpoints import TEACHER, check_checkpoint, fill_states, last_checkpoint, restore, restore_teacher
from potstill.train.distiller import Distiller, StepOutput
from potstill.train.latent_weights import LATENT, LatentWeights
from potstill.train.rollout import Rollout
from potstill.train.signals import or_one

logger = logging.getLogger(__name__)

OBJECTIVE = "objective.safetensors"  # in a checkpoint: parameters of the objective


class LogSums:
    """Named sums over batches, kept on the device until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: Any = 0

    def add(self, values: Mapping[str, Tensor], counts: Tensor | int = 0) -> None:
        """Add one batch; counts [2] are its target tokens and its attended positions."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach().float()
        self._counts = self._counts + counts

    def totals(self, accelerator: Any) -> dict[str, float]:
        return {name: float(accelerator.reduce(value)) for name, value in self._sums.items()}

    def means(self, accelerator: Any, over: Mapping[str, str]) -> dict[str, float]:
        """The sums over all ranks, each divided by its count over all ranks: tokens, unless `over` says attended."""
        if not self._sums:
            return {}
        tokens, positions = or_one(accelerator.reduce(self._counts)).tolist()
        totals = self.totals(accelerator)
        return {name: total / (positions if over.get(name) == "attended" else tokens) for name, total in totals.items()}


class StudentTrainer(Trainer):
    """transformers.Trainer whose batches hold on-policy samples and whose checkpoints hold the plain student."""

    rollout: Rollout | None = None
    latent: LatentWeights | None = None
    loss_is_scaled_for_ga = True  # what `compute_loss` returns needs no division by accumulation steps

    _generator: nn.Module | None = None  # a copy of a sharded student, to generate with
    _following: tuple[Iterator[Any] | None, list[Any]] = (None, [])  # the next batch, and the iterator that gave it
    _attended: Tensor | None = None  # attended positions of the optimiser step
    _micro_step = _steps_since_log = 0
    _noted_no_targets = False

    def __init__(self, distiller: Distiller, args: TrainingArguments, **kwargs: Any) -> None:
        self.distiller = distiller
        self._train_sums, self._eval_sums = LogSums(), LogSums()
        if args.n_gpu > 1:  # several GPUs need torchrun: nn.DataParallel would copy the teacher in every step
            args._n_gpu = 1
        cached = getattr(distiller.config, "use_cache", None)
        super().__init__(model=distiller, args=args, **kwargs)
        if cached is not None:  # transformers sets it to that of a training; a saved student would generate without
            distiller.config.use_cache = cached

    # The batches of one optimiser step, and what their loss is divided by.

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """Take the batches of one optimiser step, mix in on-policy samples, announce them for prefetching, count."""
        source, following = self._following
        batches = following if source is epoch_iterator else []
        batches, following = [*batches, *self._take(epoch_iterator, num_batches - len(batches))], []
        if self.rollout is None and self.distiller.prefetches:  # on-policy samples of the next step are not known yet
            following = self._take(epoch_iterator, 1)
        self._following = epoch_iterator, following
        if self.rollout is not None and batches:
            with self.accelerator.autocast():
                student = self.distiller.student
                if self._generator is not None:
                    student, options = self._generator, StateDictOptions(full_state_dict=True)
                    student.load_state_dict(_of_student(get_model_state_dict(self.model_wrapped, options=options)))
                batches = self.rollout(batches, student, step=self.state.global_step, rank=self.args.process_index)
        if self.distiller.prefetches:
            self.distiller.prefetch([*batches, *following])
        return batches, self._get_num_items_in_batch(batches, device)

    def _take(self, batches: Iterator[Any], number: int) -> list[dict[str, Tensor]]:
        """Take batches from a loader, whatever its collator, in the one form that everything reads."""
        return [right_padded(batch, self.distiller.task) for batch in islice(batches, number)]

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | None:
        """The target tokens of an optimiser step over all ranks, or the sum of their weights."""
        self._micro_step = 0
        self._steps_since_log += 1
        if not batch_samples:
            return None
        count = torch.stack([self.counts(batch) for batch in batch_samples]).sum(0)
        if not count[0] and self.distiller.task != "encoder" and not self._noted_no_targets:
            self._noted_no_targets = True
            logger.warning(
                "data: no token of the batches of step %d is a target: nothing is learnt from them. Check labels.",
                self.state.global_step + 1,
            )
        count = count.to(device)
        if self.args.world_size > 1:
            count = self.accelerator.reduce(count)
        tokens, self._attended = or_one(count).unbind()
        return tokens

    def counts(self, batch: Mapping[str, Tensor]) -> Tensor:
        """[2]: the target tokens of a batch, or the sum of their weights, and its attended positions."""
        task = self.distiller.task
        weights = align(batch["labels"], task, batch["weights"]).weights if "weights" in batch else None
        tokens = target_positions(batch["labels"], task).sum() if weights is None else weights.sum()
        return torch.stack([tokens, attended_positions(batch, task).sum().to(tokens)])

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """Compute the loss of a held-out batch, whose sums are kept for `evaluation_loop`, and the student's logits."""
        inputs = right_padded(self._prepare_inputs(inputs), self.distiller.task)
        logits = None
        with torch.no_grad(), self.compute_loss_context_manager():
            output: StepOutput = model(inputs, normalizer=1.0, at=self.state.global_step, attended_normalizer=1.0)
            if not prediction_loss_only:  # a second pass, because the loss is computed without logits
                logits = run(self.distiller.student, inputs).logits
        counts = self.counts(inputs)
        self._eval_sums.add(output.logs, counts)
        return output.loss.detach() / counts.max().clamp_min(1), logits, None if logits is None else inputs["labels"]

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # A run that was killed between its last checkpoint and its end would take one step more.
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def raise_diverged(self, problem: str) -> NoReturn:
        """Stop the training with the last good checkpoint and advice."""
        checkpoint = last_checkpoint(Path(str(self.args.output_dir)))
        raise DivergedError(
            f"training: expected finite numbers, got {problem} (optimiser step {self.state.global_step + 1}). "
            f"{f'The last good checkpoint is {checkpoint}. ' if checkpoint else ''}"
            "Lower train.learning_rate, raise train.warmup_steps, or train in bf16 instead of fp16."
        )

    # Checkpoints.

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        for name, parameter in self.distiller.named_parameters():
            if parameter.requires_grad and not torch.isfinite(parameter).all():
                self.raise_diverged(f"a NaN or infinite weight in {name} before checkpoint {self.state.global_step}")
        states = {} if self.distiller.teacher is None else {TEACHER: self.distiller.teacher.state_dict()}
        if not self.is_fsdp_enabled and not self.is_deepspeed_enabled:  # whose own files hold all that is trained
            states[OBJECTIVE] = self.distiller.objective.state_dict()
        if self.latent is not None:
            states[LATENT] = self.latent.state_dict()
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            (folder / CHECKSUMS).unlink(missing_ok=True)  # of a run that was resumed from an earlier checkpoint
        for name, state in states.items():
            if state and self.args.should_save:
                folder.mkdir(parents=True, exist_ok=True)
                save_file({key: value.contiguous() for key, value in state.items()}, folder / name)
        if self.is_fsdp_enabled:
            wrapper: Any = self.optimizer
            fill_states(wrapper.optimizer)
        if self.rollout is not None:
            self.rollout.save(folder, self.args.process_index)
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # each rank has files of its own
        if self.args.should_save and folder.exists():  # unless the newest is not among those that are kept
            write_checksums(folder)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # the main rank's next file marks the checkpoint of all as complete

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        folder = str(output_dir or self.args.output_dir)
        if not self.args.should_save:
            return
        save_student(self.distiller.student, folder, None if state_dict is None else _of_student(state_dict))
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        check_checkpoint(folder)
        if self.distiller.teacher is not None:
            restore_teacher(self.distiller.teacher, folder)
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        self.load_student(folder)
        advice = ". The objective trains projections, which this checkpoint does not have."
        restore(self.distiller.objective, folder / OBJECTIVE, advice)
        if self.latent is not None:
            restore(self.latent, folder / LATENT, ": it is of a training without grids. Start again.")

    def load_student(self, folder: Path) -> None:
        """Load saved weights into the student."""
        if not folder.is_dir():
            raise ModelError(f"checkpoint: expected a folder, got {folder}, which is not one. Check the path.")
        student: Any = self.distiller.student
        if is_adapted(student):
            load_adapter(student, folder)
            return
        options = {"dtype": student.dtype, "use_safetensors": True, "output_loading_info": True}
        try:
            saved, info = type(student).from_pretrained(folder, **options)
            if info["missing_keys"]:
                raise RuntimeError(f"none for {min(info['missing_keys'])}")
            student.load_state_dict(saved.state_dict())
        except (OSError, RuntimeError) as error:
            raise ModelError(
                f"checkpoint: expected this student's weights in {folder}, got others: {one_line(error, 200)}. Name "
                "the folder of a student of the same shape."
            ) from None

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))


def _of_student(state: Mapping[str, Any]) -> dict[str, Any]:
    """The student's part of a Distiller's state."""
    return {name.removeprefix("student."): value for name, value in state.items() if name.startswith("student.")}
