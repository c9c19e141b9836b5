"""Arguments of the trainer: the configuration, and what is refused before the training."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import wraps
from typing import Any, TypeVar

import torch
from transformers import DataCollatorForLanguageModeling, DataCollatorWithFlattening, Trainer, TrainingArguments

from potstill.data.batches import PaddingCollator
from potstill.errors import OTHER_NAMES, UserError, nearest
from potstill.teachers.teacher import Teacher
from potstill.train.distiller import Distiller

logger = logging.getLogger(__name__)

Arguments = TypeVar("Arguments", bound=TrainingArguments)

NOT_SHARDED = (
    "train.fsdp: expected several processes with an accelerator each, got a run that accelerate does not shard. Start "
    "it with torchrun on GPUs, or leave train.fsdp out."
)
SMALLER_BATCHES = (
    "Lower train.per_device_train_batch_size, and raise train.gradient_accumulation_steps by the same factor: the loss "
    "stays as it is"
)
_LOADER = (
    "Give its data set as {0}_dataset, its collate_fn as data_collator, and its batch_size as "
    "per_device_{0}_batch_size of args, or write a loop around Distiller.step."
)
# Hints for arguments that stand elsewhere, by the beginning of their key in a recipe.
ELSEWHERE = {
    "objective.": "It belongs to a term, as in Logits(temperature=2.0, weight=0.5).",
    "rollout.": "It belongs to a Rollout, as in Rollout(on_policy_fraction=0.5, max_new_tokens=128).",
    "student.adapter": "Give the trainer an adapted student: adapt(model, Lora(rank=8, alpha=16)).",
    "student.model": "Give the trainer the model as student.",
    "teacher.model": "Give the trainer the model as teacher.",
}
# Arguments of other trainers that have no meaning here.
NO_ARGUMENTS = {
    "compute_loss_func": "The objective is the loss: write a term.",
    "eval_dataloader": _LOADER.format("eval"),
    "model": "Give student and teacher.",
    "model_init": "Give the student as a model.",
    "tokenizer": "Give it as processing_class.",
    "train_dataloader": _LOADER.format("train"),
}


def _with_hints(config: type[Arguments]) -> type[Arguments]:
    """Let a dataclass refuse an unknown argument with a hint."""
    init: Any = config.__init__
    known = {field.name for field in fields(config) if field.init}

    @wraps(init)
    def checked(self: Any, *args: Any, **values: Any) -> None:
        for name in values.keys() - known:
            key = OTHER_NAMES.get(name, "")
            hints = (f" {hint}" for start, hint in ELSEWHERE.items() if key.startswith(start))
            raise UserError(f"{config.__name__}: unknown argument {name}.{next(hints, nearest(name, known))}")
        init(self, *args, **values)

    config.__init__ = checked  # type: ignore[method-assign]
    return config


@_with_hints
@dataclass
class DistillationConfig(TrainingArguments):
    """transformers.TrainingArguments with the defaults that distillation needs.

    The objective is the loss: `label_smoothing_factor` is refused. A metric of your own in `metric_for_best_model`
    needs `greater_is_better`; those of the trainer are losses.

    Args:
        max_length: tokens of the longest example, where the trainer encodes texts or messages.
        packing: in training, both models read rows side by side in rows of at most max_length tokens, with the same
            numbers and less padding. A batch then has as many of these as per_device_train_batch_size says.
    """

    max_length: int = 1024
    packing: bool = False
    remove_unused_columns: bool = False  # the student's signature does not have all columns of a batch
    report_to: str | list[str] | None = "none"

    def __post_init__(self) -> None:
        self.facts: dict[str, Any] = {}  # for trackers, which show all that to_dict returns
        self.best_is_given = self.greater_is_better is not None
        if self.greater_is_better is None:
            self.greater_is_better = False  # all metrics are losses, whatever their names
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # every step uses all of them; the search costs a pass
        device = torch.accelerator.current_accelerator(check_available=True)
        if device is None:
            self.use_cpu = True  # transformers allows bf16 on a CPU only with this
        if device is None or device.type == "mps":
            self.dataloader_pin_memory = False  # torch would warn at every epoch
        super().__post_init__()
        if self.label_smoothing_factor:
            raise UserError(
                f"train.label_smoothing_factor: expected 0, got {self.label_smoothing_factor}. "
                "The objective is the loss: soften the labels with a logits term instead."
            )
        if self.auto_find_batch_size:
            raise UserError(
                "train.auto_find_batch_size: expected false, got true. Without memory transformers would begin again, "
                f"with the weights as they are by then. {SMALLER_BATCHES}."
            )
        if self.fsdp and self.world_size == 1:
            raise UserError(NOT_SHARDED)

    @classmethod
    def of(cls, args: TrainingArguments | None) -> DistillationConfig:
        """Make one of plain TrainingArguments, with all their values but `remove_unused_columns`."""
        if isinstance(args, cls):
            return args
        if args is None:
            return cls(output_dir="runs/student")
        if type(args) is not TrainingArguments:
            raise UserError(
                f"DistillationTrainer: expected args of the class DistillationConfig or TrainingArguments, got "
                f"{type(args).__name__}. DistillationConfig takes all fields of TrainingArguments."
            )
        values = {field.name: getattr(args, field.name) for field in fields(args) if field.init}
        return cls(**values | {"remove_unused_columns": False})

    def to_dict(self) -> dict[str, Any]:
        """See transformers.TrainingArguments; with teacher and objective, once a trainer has them."""
        return super().to_dict() | self.facts


def check_arguments(
    args: DistillationConfig, distiller: Distiller, options: Mapping[str, Any], own: Iterable[str]
) -> None:
    """Refuse options of transformers.Trainer that would do nothing or something else; `own` are further arguments."""
    for name, hint in NO_ARGUMENTS.items():
        if options.get(name) is not None:
            raise UserError(f"DistillationTrainer: expected no {name}, got one. {hint}")
    known = {*own, *inspect.signature(Trainer).parameters}
    for name in options.keys() - known:
        raise UserError(f"DistillationTrainer: unknown argument {name}.{nearest(name, known - NO_ARGUMENTS.keys())}")
    _check_collator(options.get("data_collator"), args.packing)
    if args.packing and args.train_sampling_strategy not in ("random", "sequential"):
        raise UserError(
            f"train.train_sampling_strategy: expected random or sequential with packing, got "
            f"{args.train_sampling_strategy}. Leave it out: packed rows have no padding to save."
        )
    metrics = options.get("compute_metrics") or options.get("preprocess_logits_for_metrics")
    if metrics is not None and distiller.task == "encoder":
        raise UserError(
            "DistillationTrainer: expected no compute_metrics for the task encoder, got one. A model without a head "
            "predicts nothing: leave it out."
        )
    best = (args.metric_for_best_model or "loss").removeprefix("eval_")
    losses = {"loss", "cross_entropy", "squared_error", *distiller.objective.names}
    is_own = any(map(best.endswith, losses))
    if is_own and args.greater_is_better:
        raise UserError(
            f"DistillationConfig: expected greater_is_better false for metric_for_best_model {best}, a loss, got true, "
            "which keeps the worst student. Leave it out; TrainingArguments set it by the metric's name: use "
            "DistillationConfig."
        )
    if options.get("compute_metrics") is not None and not args.best_is_given and not is_own:
        raise UserError(
            f"DistillationConfig: expected greater_is_better beside metric_for_best_model {best}, a metric of your "
            "own, got none. Set it to true or false."
        )


def _check_collator(collator: Any, packing: bool) -> None:
    """Find collators of transformers that lose where sequences begin, or end, and any that cannot read packed rows."""
    if packing and not isinstance(collator, PaddingCollator | None):
        raise UserError(
            f"data_collator: expected none with packing, got a {type(collator).__name__}. Leave it out, or set packing "
            "to false."
        )
    if isinstance(collator, DataCollatorWithFlattening):
        if not (collator.return_position_ids or collator.return_seq_idx or collator.return_flash_attn_kwargs):
            raise UserError(
                "data_collator: expected DataCollatorWithFlattening that says where sequences begin, got one that does "
                "not. Set return_position_ids."
            )
    elif isinstance(collator, DataCollatorForLanguageModeling) and not collator.mlm:
        tokenizer: Any = collator.tokenizer
        if tokenizer.pad_token_id == tokenizer.eos_token_id:
            logger.warning(
                "data_collator: its pad token is the EOS token %s, which therefore has no labels: the student does not "
                "learn to stop. Leave data_collator out.",
                tokenizer.eos_token,
            )


def check_sharding(
    *, fsdp: bool, zero: Mapping[str, Any] | None, fsdp_requested: bool, teacher: Teacher | None, rollout: bool
) -> None:
    """Raise UserError where a run does not work with its sharding, by FSDP or by deepspeed's zero_optimization."""
    sharder = "FSDP" if fsdp else "ZeRO-3" if (zero or {}).get("stage") == 3 else None
    if fsdp_requested and not fsdp:
        raise UserError(NOT_SHARDED)
    if sharder and teacher is not None and teacher.of_student:
        raise UserError(
            f"{type(teacher).__name__}: expected a full student on every rank, from whose weights the teacher is made, "
            f"got one that {sharder} shards. Train without {sharder}, or use another teacher."
        )
    if rollout and zero is not None:
        raise UserError(
            "rollout: expected fsdp or a full student on every rank, got deepspeed, under which the student cannot "
            "generate. Use train.fsdp, or leave rollout out."
        )
    if sharder == "ZeRO-3" and zero and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        raise UserError(
            "train.deepspeed: expected stage3_gather_16bit_weights_on_model_save: true, got none. Set it, or "
            "zero3_save_16bit_model in accelerate's file: without it the full student is not saved."
        )
