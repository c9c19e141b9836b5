"""Tasks of the LM Evaluation Harness, by name or from a local file."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from potstill.errors import UserError


def harness_scores(
    model: Any, tokenizer: Any, tasks: Sequence[str], *, limit: int | None = None
) -> dict[str, dict[str, float]]:
    """Score a causal model on tasks of lm-eval: task -> {metric: score}.

    Tasks are names that lm-eval knows, which may download their data, or YAML files; `limit` is examples of each.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings of its own imports
            import lm_eval
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError(
            "evaluate --lm-eval: expected lm-eval to be installed, got none. "
            "Install it: pip install 'potstill[lm-eval]'."
        ) from None
    files = [Path(task) for task in tasks if task.endswith((".yaml", ".yml"))]
    named, local = [task for task in tasks if Path(task) not in files], []
    for file in files:
        if not file.is_file():
            raise UserError(f"evaluate --lm-eval: expected a file, got {file}, which does not exist.")
        # Only the one line is parsed: others may have tags that need lm-eval's loader.
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("task:")]
        if not lines:
            raise UserError(f"evaluate --lm-eval: expected a key task in {file}, got none.")
        local.append(str(yaml.safe_load(lines[0])["task"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        manager = TaskManager(include_path=[file.parent for file in files] or None, include_defaults=bool(named))
        unknown = [name for name in named if name not in manager.all_tasks]
        if unknown:
            raise UserError(
                f"evaluate --lm-eval: expected tasks that lm-eval knows, got {unknown[0]}. "
                "List them with lm-eval ls tasks, or give the YAML file of your own task."
            )
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
        options = {"task_manager": manager, "limit": limit, "log_samples": False, "bootstrap_iters": 0}
        results = lm_eval.simple_evaluate(model=wrapped, tasks=[*named, *local], **options)
    assert results is not None
    # A metric's name ends in its filter, as in acc,none; other entries are no scores.
    return {
        task: {metric: value for metric, value in scores.items() if isinstance(value, float | int) and "," in metric}
        for task, scores in results["results"].items()
    }
