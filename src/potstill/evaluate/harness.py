"""Tasks of the LM Evaluation Harness, by name or from a local file."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from tqdm.std import tqdm

from potstill.errors import UserError, one_line
from potstill.evaluate.time_limit import TimeLimit


class TimeLimitError(Exception):
    """The time of a task was over before its last request."""


class Harness:
    """Tasks of lm-eval by names, which may download their data, or YAML files; the first example of each is read.

    Raises:
        UserError: lm-eval is not installed, does not know a task, or cannot read it.
    """

    def __init__(self, tasks: Sequence[str]) -> None:
        with _silent_harness():
            try:
                from lm_eval import evaluator
                from lm_eval.models.huggingface import HFLM
                from lm_eval.tasks import TaskManager
            except ImportError:
                raise UserError(
                    "evaluate --lm-eval: expected lm-eval to be installed, got none. "
                    "Install it: pip install 'potstill[lm-eval]'."
                ) from None
            files = [Path(task) for task in tasks if task.endswith((".yaml", ".yml"))]
            named = [task for task in tasks if Path(task) not in files]
            local = [_task_name(file) for file in files]
            self._evaluator, self._wrap = evaluator, HFLM
            folders: Any = [file.parent for file in files] or None
            self._manager = TaskManager(include_path=folders, include_defaults=bool(named))
        unknown = [name for name in named if name not in self._manager.all_tasks]
        if unknown:
            raise UserError(
                f"evaluate --lm-eval: expected tasks that lm-eval knows, got {unknown[0]}. "
                "List them with lm-eval ls tasks, or give the YAML file of your own task."
            )
        self.tasks = [*named, *local]
        for task in self.tasks:
            self._read_first_example(task)

    def _read_first_example(self, task: str) -> None:
        try:
            with _silent_harness():
                for single in self._manager.load([task])["tasks"].values():
                    single.build_all_requests(limit=1)
        except Exception as error:
            raise UserError(
                f"evaluate --lm-eval: expected a task whose first example lm-eval reads, got {task}, with "
                f"{type(error).__name__}: {one_line(error, 200)}. Correct its YAML file, or where its data is."
            ) from error

    def scores(
        self,
        model: Any,
        tokenizer: Any,
        task: str,
        *,
        examples: int | None = None,
        limit: TimeLimit | None = None,
        on_pass: Callable[[int], None] = lambda done: None,
    ) -> dict[str, dict[str, float]]:
        """Score a causal model on a task: name -> {metric: score}; a group gives several names.

        Args:
            examples: the first ones of the task; None for all.
            limit: TimeLimitError is raised where it ends before the last forward pass.
            on_pass: called with the number of forward passes so far.
        """
        done = 0

        def before_pass(*arguments: Any) -> None:
            nonlocal done
            if limit is not None and limit.over:
                raise TimeLimitError
            on_pass(done)
            done += 1

        options = {"task_manager": self._manager, "limit": examples, "log_samples": False, "bootstrap_iters": 0}
        hook = model.register_forward_pre_hook(before_pass)
        try:
            # Its search for a git commit complains where there is none.
            with _silent_harness(), _replaced(self._evaluator, "get_git_commit_hash", lambda: None):
                wrapped = self._wrap(pretrained=model, tokenizer=tokenizer, batch_size=1)
                results = self._evaluator.simple_evaluate(model=wrapped, tasks=[task], **options)
        finally:
            hook.remove()
        assert results is not None
        # A metric's name ends in its filter, as in acc,none; other entries are no scores.
        return {
            name: {key: value for key, value in scores.items() if isinstance(value, float | int) and "," in key}
            for name, scores in results["results"].items()
        }


def harness_scores(
    model: Any, tokenizer: Any, tasks: Sequence[str], *, limit: int | None = None
) -> dict[str, dict[str, float]]:
    """Score a causal model on tasks of lm-eval: task -> {metric: score}; `limit` is examples of each."""
    harness, scores = Harness(tasks), dict[str, dict[str, float]]()
    for task in harness.tasks:
        scores |= harness.scores(model, tokenizer, task, examples=limit)
    return scores


def _task_name(file: Path) -> str:
    if not file.is_file():
        raise UserError(f"evaluate --lm-eval: expected a file, got {file}, which does not exist.")
    # Only the one line is parsed: others may have tags that need lm-eval's loader.
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("task:")]
    if not lines:
        raise UserError(f"evaluate --lm-eval: expected a key task in {file}, got none.")
    return str(yaml.safe_load(lines[0])["task"])


@contextmanager
def _silent_harness() -> Iterator[None]:
    """Silence lm-eval's remarks, its progress bars and the warnings of its imports."""
    show = tqdm.__init__

    def hide(bar: Any, *arguments: Any, **options: Any) -> None:
        show(bar, *arguments, **{**options, "disable": True})

    with warnings.catch_warnings(), _replaced(tqdm, "__init__", hide):  # some bars have no switch
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)
