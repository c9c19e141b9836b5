"""Allocations that fail at any call of a training, an evaluation or a teacher: one line of advice, and `--resume`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

from drill import Drill
from fault_toys import COMMAND, make_toys, potstill, results

# Where an allocation fails, with how many calls there are at least in each command.
PLACES = {
    "run": {"forward": 60, "backward": 12, "step": 12, "evaluation": 12},
    "cache": {"forward": 20},
    "generate": {"forward": 20},
    "embedding": {"backward": 20, "embedding step": 20},
}
ERRORS = (
    ("OutOfMemoryError", "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 80 GiB."),
    ("RuntimeError", "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to "
     "allocate 68719476736 bytes. Error code 12 (Cannot allocate memory)"),
    ("MemoryError", "Unable to allocate 64.0 GiB for an array"),
)  # fmt: skip


def memory(drill: Drill) -> None:
    """Let one allocation fail; then go on, to what an undisturbed command leaves."""
    toys = make_toys(drill.folder.parent / "toys")
    undisturbed: dict[str, dict[str, bytes]] = {}
    for case in drill.cases(60):
        name = case.rng.choice(["run", "run", "run", "cache", "generate", "embedding"])
        place, calls = case.rng.choice([*PLACES[name].items()])
        number, error = case.rng.randint(1, calls), case.rng.randrange(len(ERRORS))
        command, work = COMMAND[name], case.folder / "work"
        if name not in undisturbed:
            shutil.copytree(toys, work)
            assert potstill(*command.arguments, folder=work).status == 0
            undisturbed[name] = results(work, command)
            shutil.rmtree(work)
        shutil.copytree(toys, work)
        first = potstill(*command.arguments, folder=work, before=fail_allocation, given=(place, number, error))
        second = potstill(*command.arguments, *command.resume, folder=work)
        line = (first.output.strip().splitlines() or [""])[-1]
        advised = "atch" in line and "ower" in line and first.one_line and first.status == 1
        facts: dict[str, Any] = {"command": name, "place": place, "number": number, "status": first.status}
        same = second.status == 0 and results(work, command) == undisturbed[name]
        held = same and (advised or first.status == 0)
        drill.note(case.number, held, **facts, line=line, same=same, again=None if same else second.output[-300:])


def fail_allocation(place: str, number: int, error: int) -> None:
    """Let the number-th call of a place raise one of ERRORS."""
    import builtins

    import torch
    from transformers import LlamaModel

    from potstill.train.trainer import DistillationTrainer

    places: dict[str, tuple[Any, str]] = {
        "forward": (LlamaModel, "forward"),
        "backward": (torch.Tensor, "backward"),
        "step": (torch.optim.AdamW, "step"),
        "embedding step": (torch.optim.Adam, "step"),
        "evaluation": (DistillationTrainer, "prediction_step"),
    }
    owner, name = places[place]
    calls, real = 0, getattr(owner, name)
    name_of_error, words = ERRORS[error]
    kind = getattr(builtins, name_of_error, None) or getattr(torch, name_of_error)

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            raise kind(words)
        return real(*args, **kwargs)

    setattr(owner, name, failing)


PARTS: dict[str, Callable[[Drill], None]] = {
    "memory": memory,
}
