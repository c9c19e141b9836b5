"""A teacher that runs one batch ahead: the same training, and what goes wrong comes up where it matters."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from conftest import make_batch, make_llama
from potstill.errors import ModelError
from potstill.losses.alignment import Alignment, causal_alignment
from potstill.losses.divergences import ForwardKL
from potstill.losses.targets import DenseTargets
from potstill.runs.config.run import Recipe
from potstill.runs.run import run
from potstill.teachers.model import ModelTeacher
from potstill.teachers.teacher import Teacher, TeacherOutput
from potstill.train.distiller import Distiller
from potstill.train.prefetch import tensors_of
from potstill.train.terms.logits import Logits
from test_trainer import losses, trainer, weights


class Watched(Teacher):
    """A live teacher that notes in which thread it runs, and breaks at a call."""

    def __init__(self, breaks_at: int | None = None) -> None:
        self.live, self.breaks_at = ModelTeacher(make_llama(seed=1)), breaks_at
        self.threads: list[str] = []
        self.seen: list[int] = []
        self._alone = threading.Lock()

    def __call__(self, batch: Mapping[str, Tensor], alignment: Alignment) -> TeacherOutput:
        assert self._alone.acquire(blocking=False), "called twice at once"
        try:
            if len(self.threads) == self.breaks_at:
                raise ConnectionError("the teacher went away")
            self.threads.append(threading.current_thread().name)
            self.seen.append(int(batch["input_ids"].sum()))
            return self.live(batch, alignment)
        finally:
            self._alone.release()


def student() -> Any:
    return make_llama(hidden_size=8, layers=1, attention_dropout=0.3)


OPTIONS: dict[str, Any] = {"max_steps": 7, "per_device_train_batch_size": 4}


@pytest.mark.parametrize(
    "changes",
    [
        {},  # nearly two epochs
        {"gradient_accumulation_steps": 3},
        {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True},
    ],
    ids=["plain", "accumulation", "evaluation"],
)
def test_nothing_changes(tmp_path: Path, changes: dict[str, Any]) -> None:
    found = []
    for prefetch in (False, True):
        teacher = Watched()
        one = trainer(tmp_path, student=student(), teacher=teacher, prefetch=prefetch, **OPTIONS, **changes)
        one.train()
        found.append((weights(one), [{k: v for k, v in line.items() if "runtime" not in k and "per_second" not in k}
                                     for line in one.state.log_history]))  # fmt: skip
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    ahead = [name.startswith("teacher") for name in teacher.threads]
    assert not ahead[0] and all(ahead[1:])
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("teacher")]


def test_it_resumes_to_the_same_weights(tmp_path: Path) -> None:
    made = {"student": student(), "prefetch": True, "save_strategy": "steps", "save_steps": 3, **OPTIONS}
    whole = trainer(tmp_path / "whole", **made)
    whole.train()
    first = trainer(tmp_path / "parts", **made | {"student": student(), "max_steps": 3})
    first.train()
    rest = trainer(tmp_path / "parts", **made | {"student": student()})
    rest.train(resume_from_checkpoint=True)
    assert torch.equal(weights(whole), weights(rest))


def test_what_goes_wrong_comes_up_at_the_step_that_needs_it(tmp_path: Path) -> None:
    one = trainer(tmp_path, teacher=Watched(breaks_at=3), prefetch=True, **OPTIONS)
    with pytest.raises(ConnectionError, match="the teacher went away"):
        one.train()
    assert one.state.global_step == 3 and len(losses(one)) == 3
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("teacher")]


def test_the_teacher_runs_while_the_student_trains() -> None:
    teacher, batches = Watched(), [make_batch(seed=seed) for seed in range(3)]
    distiller = Distiller(student(), teacher, [Logits(ForwardKL())], prefetch=True)
    distiller.prefetch(batches)
    distiller.step(batches[0]).loss.backward()
    for _ in range(200):  # nobody asks for the second yet
        if len(teacher.seen) == 2:
            break
        time.sleep(0.05)
    distiller.step(batches[1]).loss.backward()
    distiller.prefetch(())
    assert teacher.seen[:2] == [int(batch["input_ids"].sum()) for batch in batches[:2]]


def test_batches_that_were_not_prefetched_are_computed_when_needed() -> None:
    teacher, plain = Watched(), Watched()
    ahead, alone = (Distiller(make_llama(hidden_size=8), each, [Logits(ForwardKL())], prefetch=each is teacher).eval()
                    for each in (teacher, plain))  # fmt: skip
    first, second, third, other = (make_batch(seed=seed) for seed in range(4))
    ahead.prefetch([first, second, third])
    for batch in (first, other, third, other, second):  # the second is left out, and comes when it is forgotten
        torch.testing.assert_close(ahead.step(batch).loss, alone.step(batch).loss, rtol=0, atol=0)
    ahead.prefetch([other])  # replaced before it is needed
    ahead.prefetch([first])
    torch.testing.assert_close(ahead.step(first).loss, alone.step(first).loss, rtol=0, atol=0)
    ahead.prefetch(())


def test_a_teacher_made_of_the_student_is_refused() -> None:
    teacher = Watched()
    teacher.of_student = True
    with pytest.raises(ModelError, match="a teacher that does not change in training, got Watched"):
        Distiller(student(), teacher, [Logits(ForwardKL())], prefetch=True)


def test_prefetching_in_a_recipe_changes_no_result(recipe_values: dict[str, Any]) -> None:
    results = []
    for prefetch in (False, True):
        recipe_values["teacher"]["prefetch"] = prefetch
        values = recipe_values | {"output": f"{recipe_values['output']}-{prefetch}", "evaluate": {"baseline": False}}
        results.append(run(Recipe.parse(values), console=Console(quiet=True)).summary["rows"]["student"])
    measured = ("loss", "kl", "agreement")
    assert [results[0][name] for name in measured] == [results[1][name] for name in measured]


def test_all_tensors_of_an_output_are_found() -> None:
    batch = make_batch()
    teacher = ModelTeacher(make_llama())
    output = teacher(batch, causal_alignment(batch["labels"]))
    assert [id(x) for x in tensors_of(output)] == [id(output.targets.hidden), id(output.targets.head.weight)]
    with_label_log_probs = TeacherOutput(DenseTargets(torch.zeros(2, 3)), torch.zeros(2))
    assert [list(x.shape) for x in tensors_of(with_label_log_probs)] == [[2, 3], [2]]
