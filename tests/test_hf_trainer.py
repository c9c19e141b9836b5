"""The private parts of transformers.Trainer that hf_trainer.py overrides or calls are still what they were."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import transformers
from transformers import Trainer, TrainingArguments

from potstill.train.hf_trainer import StudentTrainer
from potstill.train.trainer import DistillationTrainer

TRIED_WITH = ["5.23.0"]

# Every private method of Trainer that is overridden, and the parameters that it had; the override must still fit.
OVERRIDDEN = {
    "get_batch_samples": ["epoch_iterator", "num_batches", "device"],
    "_get_num_items_in_batch": ["batch_samples", "device"],
    "_run_epoch": [
        *("model", "epoch", "train_dataloader", "steps_in_epoch", "num_update_steps_per_epoch", "trial"),
        *("ignore_keys_for_eval", "start_time", "resume_from_checkpoint", "epochs_trained"),
        "steps_trained_in_current_epoch",
    ],
    "_save_checkpoint": ["model", "trial"],
    "_save_rng_state": ["output_dir"],
    "_save": ["output_dir", "state_dict"],
    "_load_from_checkpoint": ["resume_from_checkpoint", "model"],
    "_load_best_model": [],
}
CALLED = {"_prepare_inputs": ["inputs"]}


@pytest.mark.parametrize("name", OVERRIDDEN | CALLED)
def test_a_private_method_of_transformers_is_what_it_was(name: str) -> None:
    place = f"look at {name} in potstill/train/hf_trainer.py: it was tried with transformers {', '.join(TRIED_WITH)}"
    method = getattr(Trainer, name, None)
    assert method is not None, f"transformers {transformers.__version__} has no Trainer.{name}: {place}"
    parameters = [*inspect.signature(method).parameters][1:]
    expected = (OVERRIDDEN | CALLED)[name]
    assert parameters == expected, f"transformers {transformers.__version__} has Trainer.{name}{parameters}: {place}"
    if name in OVERRIDDEN:
        override = inspect.signature(vars(StudentTrainer)[name]).parameters
        passes_on = any(one.kind is one.VAR_KEYWORD for one in override.values())
        assert passes_on or [*override][1:] == expected


def test_attributes_of_transformers_are_what_they_were(tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    args._n_gpu = 2
    assert args.n_gpu == 2
    assert hasattr(Trainer, "loss_is_scaled_for_ga")


def test_every_override_of_a_private_method_is_in_the_table() -> None:
    private = {name for name in vars(StudentTrainer) if name.startswith("_") and hasattr(Trainer, name)}
    private -= {name for name in vars(StudentTrainer) if name.startswith("__")}
    assert private <= set(OVERRIDDEN)
    elsewhere = {name for name in vars(DistillationTrainer) if name.startswith("_") and not name.startswith("__")}
    assert not {name for name in elsewhere if hasattr(Trainer, name)}, "it belongs in hf_trainer.py"
