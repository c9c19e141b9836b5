"""Every error that Potstill raises on purpose.

    PotstillError
    ├── UserError               a mistake in a recipe, a command or a call; exit status 2
    │   ├── RecipeError         a recipe does not say what it must
    │   ├── DataError           a file, a field or an example is not usable
    │   │   └── EmptyDataError  no token of the data is a target
    │   ├── VocabularyError     teacher and student do not have the same tokens
    │   ├── ModelError          a model cannot be read or built
    │   ├── RefusedError        a server refuses a request
    │   └── ShapeError          tensors that do not fit together
    └── RunError                a run could not go on; exit status 1
        ├── ServerError         a server does not answer
        └── DivergedError       the loss is not a number any more

Each message is one line: `<what was called>: expected <X>, got <Y>. <why>. <what to do>.`
"""

from __future__ import annotations

import difflib
import errno
import os
import re
from collections.abc import Iterable


class PotstillError(Exception):
    """The root of the tree."""


class UserError(PotstillError):
    """A mistake in a recipe, a command or a call."""


class RecipeError(UserError, ValueError):
    """A recipe does not say what it must."""


class DataError(UserError, ValueError):
    """A file, a field or an example is not usable."""


class EmptyDataError(DataError):
    """No token of the data is a target."""


class VocabularyError(UserError, ValueError):
    """Teacher and student do not have the same tokens."""


class ModelError(UserError, ValueError):
    """A model cannot be read or built."""


class RefusedError(UserError, ValueError):
    """A server refuses a request; `status` is its HTTP status, where it has one."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class ShapeError(UserError, ValueError):
    """Tensors that do not fit together, or a number outside its range."""


class RunError(PotstillError, RuntimeError):
    """A run could not go on."""


class ServerError(RunError):
    """A server does not answer, or not as it should."""


class DivergedError(RunError):
    """The loss is not a number any more."""


# Keys of recipes by the names that other tools have for them.
OTHER_NAMES = {
    **dict.fromkeys(("accumulation_steps", "grad_accum", "gradient_accumulation"), "train.gradient_accumulation_steps"),
    **dict.fromkeys(("alpha", "hidden_weight", "kd_loss_weight", "kd_weight", "feature_weight"), "objective.weight"),
    **dict.fromkeys(("batch_size", "micro_batch_size", "train_batch_size"), "train.per_device_train_batch_size"),
    **dict.fromkeys(("block_size", "max_seq_len", "max_seq_length", "seq_len", "seq_length"), "data.max_length"),
    **dict.fromkeys(("clip_grad_norm", "grad_clip", "gradient_clipping"), "train.max_grad_norm"),
    **dict.fromkeys(("epoch", "epochs", "n_epochs", "num_epochs"), "train.num_train_epochs"),
    "eval_batch_size": "train.per_device_eval_batch_size",
    "evaluation_strategy": "train.eval_strategy",
    **dict.fromkeys(("dataset", "train_dataset", "train_file"), "data.train"),
    **dict.fromkeys(("eval_dataset", "eval_file", "validation_file"), "data.eval"),
    **dict.fromkeys(("lambda_gkd", "lmbda", "on_policy"), "rollout.on_policy_fraction"),
    "beta_gkd": "objective.divergence.beta",
    "lora_alpha": "student.adapter.alpha",
    "lora_bias": "student.adapter.bias",
    "lora_dropout": "student.adapter.dropout",
    **dict.fromkeys(("lora_r", "r"), "student.adapter.rank"),
    "lora_target_modules": "student.adapter.target_modules",
    **dict.fromkeys(("loss", "loss_type", "divergence_type"), "objective.divergence"),
    "lr": "train.learning_rate",
    **dict.fromkeys(("lr_scheduler", "scheduler"), "train.lr_scheduler_type"),
    **dict.fromkeys(("mixed_precision", "precision"), "train.bf16"),
    "max_new_tokens": "rollout.max_new_tokens",
    **dict.fromkeys(("num_steps", "steps", "total_steps"), "train.max_steps"),
    **dict.fromkeys(("optimiser", "optimizer"), "train.optim"),
    "output_dir": "output",
    **dict.fromkeys(("peft", "peft_type", "use_peft"), "student.adapter"),
    **dict.fromkeys(("student_model", "student_model_name", "student_model_name_or_path"), "student.model"),
    **dict.fromkeys(("tau", "temp", "temperature"), "objective.temperature"),
    **dict.fromkeys(("teacher_model", "teacher_model_name", "teacher_model_name_or_path"), "teacher.model"),
    **dict.fromkeys(("use_wandb", "wandb"), "train.report_to"),
    "warmup": "train.warmup_steps",
}


def nearest(name: object, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: " Did you mean <known>?" by meaning or by spelling, or nothing."""
    name, known = str(name)[:100], list(known)
    meant = OTHER_NAMES.get(name, "").rpartition(".")[2]
    near = [meant] if meant in known else difflib.get_close_matches(name, known, n=1)
    near = near or [other for other in known if other.lower() == name.lower()]
    return f" Did you mean {near[0]}?" if near else ""


# Characters that move a terminal's cursor, colour, hide or reorder what it shows, or that it cannot be sent. The marks
# of right-to-left scripts are among them: they reorder digits, slashes and brackets beside them, and so paths.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
LINES, LINE_CHARACTERS = 50, 1000  # of a message


def printable(text: str) -> str:
    """Write control characters, such as those of terminal escapes, as Python's `ascii` does."""
    return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)


def shortened(message: str) -> str:
    """Leave out the middle of long lines of a message, whose end says what to do, and lines after the fiftieth."""
    lines = message.splitlines()
    kept = [
        line if len(line) <= LINE_CHARACTERS else f"{line[: LINE_CHARACTERS - 205]} ... {line[-200:]}"
        for line in lines[:LINES]
    ]
    more = len(lines) - LINES
    return "\n".join(kept + [f"  ... and {more} more lines"] * (more > 0))


# What helps when the machine fails, by the error's number or, from a library of its own language, by its words.
_LESS_MEMORY = "Lower the batch size, or the length of rows."
REMEDIES = {
    errno.ENOSPC: "Make room on the disk.",
    errno.EDQUOT: "Make room within the disk quota.",
    errno.EROFS: "Make the disk writable again, or choose a folder on another.",
    errno.EIO: "The disk fails: check it, or choose a folder on another.",
    errno.EMFILE: "Allow more open files: ulimit -n 4096.",
    errno.ENFILE: "Close programs that hold many files open.",
    errno.ENOMEM: _LESS_MEMORY,
}


def remedy(error: BaseException) -> str | None:
    """What helps against a failure of this machine: its disks, file handles or memory; None for any other error."""
    if is_out_of_memory(error):
        return _LESS_MEMORY
    text = str(error) if _is_local(error) else ""
    if "unexpected pos" in text:  # of torch.save, on a disk that takes no more
        return REMEDIES[errno.ENOSPC]
    numbers = (n for n in REMEDIES if getattr(error, "errno", None) == n or os.strerror(n) in text)
    return next((REMEDIES[number] for number in numbers), None)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, of this process's memory or an accelerator's."""
    words = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
    in_text = isinstance(error, RuntimeError) and _is_local(error) and any(word in str(error) for word in words)
    return isinstance(error, MemoryError) or in_text


def _is_local(error: BaseException) -> bool:
    """Whether the words of an error are about this machine: those of a server or of Ray repeat another's."""
    return type(error).__module__.partition(".")[0] in ("builtins", "safetensors", "torch")


def one_line(error: object, limit: int | None = None) -> str:
    """Join the lines of a message, and keep the first `limit` characters."""
    return " ".join(str(error).split())[:limit]
