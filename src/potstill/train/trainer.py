"""DistillationTrainer: a transformers.Trainer whose loss is an objective."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalLoopOutput

from potstill.data.batches import PaddingCollator, pad_token_id
from potstill.data.packing import PackedRows
from potstill.data.vocabulary import checked_vocabulary
from potstill.errors import PotstillError, RunError, UserError, is_out_of_memory, one_line
from potstill.losses.alignment import IGNORE, SEQUENCE_TASKS, TOKEN_TASKS, Task
from potstill.models.chat import end_token_ids, set_end_tokens
from potstill.models.heads import class_ids, set_pad_id, token_rows
from potstill.models.weight_grid import WeightGrid
from potstill.teachers.teacher import Teacher
from potstill.train.arguments import SMALLER_BATCHES, DistillationConfig, check_arguments, check_sharding
from potstill.train.callbacks import FollowTraining
from potstill.train.checkpoints import check_checkpoint, last_checkpoint, restore_teacher
from potstill.train.columns import columns_not_read, padding_id
from potstill.train.distiller import Distiller, StepOutput
from potstill.train.encoding import RowsEncoder
from potstill.train.hf_trainer import LogSums, StudentTrainer
from potstill.train.latent_weights import LatentWeights
from potstill.train.objective import OF_TEXT, Objective
from potstill.train.rollout import Rollout
from potstill.train.terms.term import Term
from potstill.train.tracking import facts

logger = logging.getLogger(__name__)


class DistillationTrainer(StudentTrainer):
    """Trains a student by an objective, with all features of transformers.Trainer.

    The loss is divided once, by the target tokens of the whole optimiser step over all ranks and accumulation steps;
    with token weights, by their sum. Checkpoints and `save_model` hold the plain student, which `from_pretrained`
    loads; of a PeftModel the adapter alone. What terms train beside it (projections) is in checkpoints alone.

    Args:
        teacher: see `Distiller`, as for objective and task.
        args: plain transformers.TrainingArguments too.
        train_dataset: a data set of torch or `datasets`, streamed too, or a list of dicts. Rows of text, of prompt and
            completion, of messages, or of text and label for classification are encoded as `potstill.encode` does, up
            to `DistillationConfig.max_length` tokens; a longer text is split into windows. Rows with input_ids stay as
            they are; without labels every token of a causal model is a target. Padding by the attention_mask and
            packed rows are taken apart: see `PaddingCollator`.
        eval_dataset: the same, or several held-out sets by name.
        processing_class: the tokenizer.
        vocabulary: see `Distiller`; by default the number of tokens of processing_class.
        rollout: replaces a share of the training rows by on-policy samples; None for data alone.
        prefetch: run the teacher on the next batch while the student trains on this one.
        grids: of the weights that the student computes with rounded, see `LatentWeights`; none by default.
        **kwargs: any other argument of transformers.Trainer (callbacks, optimizers, data_collator, compute_metrics).
            For compute_metrics and `predict` the student gives its logits in a second pass.

    Raises:
        UserError: an argument of transformers.Trainer has no meaning here, or a metric none that can be compared.
        DataError: rows cannot be encoded, or have columns that would be left out and change the training.
        VocabularyError: a model's head has no row for some token of processing_class.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: Teacher | nn.Module | None,
        objective: Objective | Sequence[Term],
        args: TrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        vocabulary: int | None = None,
        task: Task = "causal",
        rollout: Rollout | None = None,
        prefetch: bool = False,
        grids: Mapping[str, WeightGrid] | None = None,
        **kwargs: Any,
    ) -> None:
        args = DistillationConfig.of(args)
        if isinstance(processing_class, str):
            raise UserError(
                f"DistillationTrainer: expected a tokenizer as processing_class, got {processing_class!r}. Load it "
                "with load_tokenizer."
            )
        if kwargs.get("data_collator") is None and processing_class is not None:
            kwargs["data_collator"] = PaddingCollator(pad_token_id(processing_class)[0])
        set_seed(args.seed)  # terms may begin with random weights
        options: dict[str, Any] = {"vocabulary": vocabulary, "task": task, "prefetch": prefetch}
        packed_length = args.max_length if args.packing else None
        distiller = Distiller(student, teacher, objective, **options, packed_length=packed_length)
        check_arguments(args, distiller, kwargs, inspect.signature(DistillationTrainer).parameters)
        if vocabulary is None and task in TOKEN_TASKS and isinstance(processing_class, PreTrainedTokenizerBase):
            distiller.vocabulary = _vocabulary(distiller, processing_class)
        args.facts |= facts(distiller.teacher, distiller.objective.terms)
        self.rows_encoder = RowsEncoder(
            tokenizer=processing_class,
            task=task,
            max_length=args.max_length,
            classes=class_ids(student.config) if task == "classification" else {},
            seed=args.seed,
            collator=kwargs.get("data_collator"),
            pad=padding_id(student) if processing_class is None else pad_token_id(processing_class)[0],
            read=frozenset().union(*map(columns_not_read, distiller.models().values())),
            layers=distiller.objective.reads_layers,
        )
        train_dataset = self.rows_encoder(train_dataset, "train_dataset", training=True)
        eval_dataset = self.rows_encoder(eval_dataset, "eval_dataset")
        if args.packing and train_dataset is not None:
            train_dataset = PackedRows(train_dataset, args.max_length, seed=args.seed)
        if all(term.reads_layers for term in distiller.objective.terms):
            args.ddp_find_unused_parameters = True  # terms over layers do not use the head
        kwargs |= {"train_dataset": train_dataset, "eval_dataset": eval_dataset, "processing_class": processing_class}
        if task == "causal" and processing_class is not None:
            set_end_tokens(student, end_token_ids(processing_class, student), processing_class.eos_token_id)
        if task in SEQUENCE_TASKS and processing_class is not None:
            set_pad_id(distiller.models().values(), pad_token_id(processing_class)[0])
        super().__init__(distiller, args, **kwargs)
        self.rollout = rollout
        if rollout is not None and rollout.vocabulary is None:
            rollout.vocabulary = distiller.vocabulary  # rows of padding are not drawn either
        plugins = self.accelerator.state
        deepspeed = getattr(plugins, "deepspeed_plugin", None)
        check_sharding(
            fsdp=getattr(plugins, "fsdp_plugin", None) is not None,
            zero=None if deepspeed is None else deepspeed.deepspeed_config.get("zero_optimization", {}),
            fsdp_requested=bool(args.fsdp),
            teacher=distiller.teacher,
            rollout=rollout is not None,
        )
        # Under FSDP each rank generates with a copy of its own, so that none waits for the samples of another.
        if rollout is not None and self.is_fsdp_enabled:
            self._generator = nn.Module.to(deepcopy(student), args.device)
        if grids:
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise UserError(
                    "grids: expected a student that is whole on each rank, got one that FSDP or DeepSpeed shards. "
                    "Leave student.quantize out, or train without them."
                )
            self.latent = LatentWeights(student, grids)
            self.add_callback(self.latent)
        self.add_callback(FollowTraining(distiller.teacher, train_dataset))

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the objective's loss, divided by the tokens of the whole step, or raise DivergedError."""
        step = self.state.global_step
        output: StepOutput = model(inputs, normalizer=num_items_in_batch, at=step, attended_normalizer=self._attended)
        self._micro_step += 1
        if not torch.isfinite(output.loss):
            self.raise_diverged(f"loss {output.loss.item()} in batch {self._micro_step} of the step")
        if model.training:
            self._train_sums.add(output.logs)
        # Gradients are averaged over ranks; the division above is by the sum over ranks.
        loss = output.loss * self.args.world_size if model.training else output.loss
        return (loss, output) if return_outputs else loss

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """See transformers.Trainer; with several ranks, rows without targets fill up the last batches.

        Ranks must have equally many batches: accelerate would repeat rows, which would count twice.
        """
        rows: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(rows, str):
            rows = self.eval_dataset[rows]  # type: ignore[index]  # one of several held-out sets, by its name
        elif rows is not self.eval_dataset:
            rows = self.rows_encoder(rows, "eval_dataset")
        if self.args.world_size > 1:
            if not hasattr(rows, "__len__"):
                raise UserError(
                    "eval_dataset: expected a data set with a length on several ranks, which need equally many "
                    "batches, got a stream. Load it whole."
                )
            missing = -len(rows) % (self.args.world_size * self.args.per_device_eval_batch_size)
            columns = rows[0].items()
            padding: Any = {name: _ignored(value) if name.endswith("labels") else value for name, value in columns}
            if "labels" not in padding:  # each token is its own, and the first has none to be predicted from
                padding = {name: value[:1] if hasattr(value, "__len__") else value for name, value in columns}
            rows = ConcatDataset([rows, cast(Any, [padding] * missing)])
        return super().get_eval_dataloader(rows)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """See transformers.Trainer; rows are encoded as those of `train_dataset`."""
        return super().get_test_dataloader(self.rows_encoder(test_dataset, "test_dataset"))

    def evaluation_loop(self, dataloader: DataLoader[Any], *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """See transformers.Trainer; every metric is a mean over all held-out tokens."""
        prefix = kwargs.get("metric_key_prefix", "eval")
        distiller, objective = self.distiller, self.distiller.objective
        teacher, uses_teacher = distiller.teacher, distiller.uses_teacher
        distiller.uses_teacher = uses_teacher and teacher is not None and teacher.covers(dataloader.dataset)
        self._eval_sums = LogSums()
        rows = self.args.per_device_eval_batch_size
        with explain_out_of_memory("evaluation", rows, "Lower train.per_device_eval_batch_size"):
            result = super().evaluation_loop(dataloader, *args, **kwargs)
        distiller.uses_teacher = uses_teacher
        over = {name: term.over for name, term in zip(objective.names, objective.terms, strict=True)}
        means = self._eval_sums.means(self.accelerator, over)
        if means:
            means["loss"] = objective.total(means, self.state.global_step)
            if self.rollout is not None:
                self.rollout.update(means["loss"])
        metrics = {f"{prefix}_{name}": mean for name, mean in means.items()}
        return result._replace(metrics={**(result.metrics or {}), **metrics})

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """See transformers.Trainer; adds every term's mean since the last line."""
        if "loss" in logs:
            totals = self._train_sums.totals(self.accelerator)
            logs |= {name: total / max(self._steps_since_log, 1) for name, total in totals.items()}
            for part, tokens in OF_TEXT.items():  # means over on-policy tokens alone, and over the data's
                for name in [name for name in totals if name.endswith(part)]:
                    logs[name] = totals[name] / totals[tokens] if totals[tokens] else 0.0
                logs.pop(tokens, None)
            self._train_sums, self._steps_since_log = LogSums(), 0
            if self.rollout is not None:
                logs |= self.rollout.stats.take(self.accelerator)
            if self.distiller.teacher is not None:
                logs |= self.distiller.teacher.logs()
            logs |= self.distiller.objective.scheduled(max(self.state.global_step - 1, 0))  # of the last step
        super().log(logs, start_time)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """See transformers.Trainer; `resume_from_checkpoint=True` takes the last complete checkpoint.

        Raises:
            UserError: there is none.
            DataError: the teacher has no output for some of the training data.
        """
        teacher = self.distiller.teacher
        if teacher is not None and self.distiller.uses_teacher:
            rows: Any = self.train_dataset
            teacher.require(rows.rows if isinstance(rows, PackedRows) else rows)
        if resume_from_checkpoint is True:
            checkpoint = last_checkpoint(Path(str(self.args.output_dir)))
            if checkpoint is None:
                raise UserError(f"train: expected a complete checkpoint in {self.args.output_dir}, got none.")
            resume_from_checkpoint = str(checkpoint)
        if resume_from_checkpoint:
            folder = Path(str(resume_from_checkpoint))
            check_checkpoint(folder)
            if self.rollout is not None:
                self.rollout.load(folder, self.args.process_index)
            if teacher is not None and self.is_deepspeed_enabled:  # which loads everything else itself
                restore_teacher(teacher, folder)
        rows = self.args.per_device_train_batch_size
        try:
            with explain_out_of_memory("train", rows, f"{SMALLER_BATCHES}; then go on with --resume"):
                return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.distiller.prefetch(())
            if self.rollout is not None and self.args.should_save:
                self.rollout.close()

    def load_checkpoint(self, folder: str | Path) -> None:
        """Load the student of a checkpoint, or one that `save_model` or a run has saved, into this trainer.

        From a checkpoint also what terms and the teacher trained. Optimiser and step stay: see `train`.

        Raises:
            UserError: the folder holds another student, or a checkpoint of another objective or teacher.
        """
        path = Path(folder)
        if (path / TRAINER_STATE_NAME).exists():
            self._load_from_checkpoint(str(path))
            return
        self.load_student(path)
        if self.distiller.objective.state_dict():
            logger.warning("load_checkpoint: %s has a student alone: what the objective trains stays as it is.", path)


@contextmanager
def explain_out_of_memory(key: str, rows: int, advice: str) -> Iterator[None]:
    """Raise a RunError in place of a failed allocation, with the rows in a batch and what to do."""
    try:
        yield
    except Exception as error:
        if isinstance(error, PotstillError) or not is_out_of_memory(error):
            raise
        raise RunError(
            f"{key}: expected memory for {rows} rows in a batch, got none: {one_line(error, 200)}. {advice}."
        ) from error


def _vocabulary(distiller: Distiller, tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokens that a student and a teacher of the same tokenizer share."""
    other = distiller.teacher is not None and distiller.teacher.other_tokenizer
    models: dict[str, Any] = {"student": distiller.student} if other else distiller.models()
    heads = {name: model for name, model in models.items() if hasattr(model, "get_output_embeddings")}
    return checked_vocabulary(tokenizer, {name: token_rows(model, distiller.task) for name, model in heads.items()})


def _ignored(labels: Any) -> Any:
    """The labels of a row without targets, in the form of the given ones."""
    if getattr(labels, "ndim", int(isinstance(labels, list))):
        return [IGNORE] * len(labels)
    return math.nan if isinstance(labels, float) else IGNORE
