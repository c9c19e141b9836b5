"""Find the checkpoint to resume from, and restore states from it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import load_file
from torch import Tensor, zeros_like
from torch.optim import Optimizer

from potstill.errors import UserError
from potstill.models.checksums import CHECKSUMS, check_folder, missing_files, write_checksums
from potstill.teachers.teacher import Teacher

TEACHER = "teacher.safetensors"  # in a checkpoint: the state of a teacher that changes in training


class Stateful(Protocol):
    """What has a state in checkpoints."""

    def state_dict(self) -> Mapping[str, Tensor]: ...
    def load_state_dict(self, state: Mapping[str, Tensor], /) -> Any: ...


def last_checkpoint(directory: Path, other_than: Path | None = None) -> Path | None:
    """The newest complete checkpoint, or None: the trainer's state, and then checksums, are written last."""
    numbered = {int(path.name[11:]): path for path in directory.glob("checkpoint-*") if path.name[11:].isdigit()}
    newest_first = (path for _, path in sorted(numbered.items(), reverse=True) if path != other_than)
    return next(filter(_is_complete, newest_first), None)


def check_checkpoint(folder: Path) -> None:
    """Check that the files of a checkpoint are as they were written.

    Raises:
        ModelError: a file has changed; the message names the checkpoint that a training goes on from without this one.
    """
    earlier = last_checkpoint(folder.parent, other_than=folder)
    start = "step 0: there is no other" if earlier is None else earlier.name
    check_folder(folder, "checkpoint", f"Delete {folder}: --resume then continues from {start}.")


def remove_incomplete(directory: Path) -> None:
    """Remove what a kill left of a checkpoint: its files would mix with those of the next one of that step.

    A kill may also come between the newest checkpoint and its checksums, which are then written here, or in the midst
    of the removal of an older one.
    """
    newest = last_checkpoint(directory)
    if newest is not None and not (newest / CHECKSUMS).exists():
        write_checksums(newest)
    for path in directory.glob("checkpoint-*"):
        if not _is_complete(path) or (path != newest and missing_files(path)):
            shutil.rmtree(path, ignore_errors=True)


def check_ranks(checkpoint: Path, ranks: int) -> None:
    """Check that a checkpoint was written by as many ranks: of others, a step would have other rows.

    Each rank writes the state of its random numbers; a checkpoint of weights alone has none.
    """
    written = len(list(checkpoint.glob("rng_state*.pth"))) or ranks
    if written != ranks:
        raise UserError(
            f"--resume: expected as many processes as wrote {checkpoint}, which is {written}, got {ranks}. Start as "
            "many, with torchrun --nproc-per-node if they are several, or choose another directory with --set "
            "output=DIR."
        )


def fill_states(optimizer: Optimizer) -> None:
    """Give a state to each trainable parameter that has none: FSDP cannot load a checkpoint without them.

    A parameter without gradients has none: the head, where all terms compare layers. A step of rate 0 makes it, and
    leaves all weights as they are.
    """
    trained = [each for group in optimizer.param_groups for each in group["params"] if each.requires_grad]
    without = [each for each in trained if not optimizer.state.get(each)]
    if not without:
        return
    rates, gradients = [group["lr"] for group in optimizer.param_groups], [each.grad for each in trained]
    for parameter in trained:
        parameter.grad = None
    for parameter in without:
        parameter.grad = zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for parameter, gradient in zip(trained, gradients, strict=True):
        parameter.grad = gradient


def _is_complete(checkpoint: Path) -> bool:
    if (checkpoint / CHECKSUMS).exists():
        return True
    with suppress(OSError, ValueError):
        json.loads((checkpoint / "trainer_state.json").read_text())
        return True
    return False


def restore(owner: Stateful, path: Path, advice: str) -> None:
    """Load a state from a file of a checkpoint, or raise UserError without it; nothing for an owner without state."""
    if not owner.state_dict():
        return
    if not path.exists():
        raise UserError(f"train: expected {path.name} in {path.parent}, got none{advice}")
    check_checkpoint(path.parent)
    owner.load_state_dict(load_file(path))


def restore_teacher(teacher: Teacher, checkpoint: Path) -> None:
    advice = ": the checkpoint was made with another teacher. Start again, or resume with that teacher."
    restore(teacher, checkpoint / TEACHER, advice)
