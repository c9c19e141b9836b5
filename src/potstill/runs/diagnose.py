"""Explain how a run went, or check a recipe before it runs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from potstill.data.batches import encode, in_batches
from potstill.data.sources import Source
from potstill.data.vocabulary import checked_vocabulary
from potstill.errors import RecipeError, UserError
from potstill.evaluate import diagnosis as stats
from potstill.evaluate.diagnosis import Softening, TokenStats
from potstill.evaluate.findings import conclusion, interpret, recommended_temperature
from potstill.evaluate.quality import FullTargets, outputs_at
from potstill.evaluate.summary import read_metrics
from potstill.evaluate.versions import versions
from potstill.files import write_json
from potstill.losses.alignment import IGNORE, Alignment
from potstill.losses.schedule import value_at
from potstill.losses.targets import SparseTargets
from potstill.models.heads import token_rows
from potstill.models.loading import load_model, load_tokenizer, suppress_warnings
from potstill.models.placement import move
from potstill.models.spacing import evenly_spaced
from potstill.models.split import evaluation_mode, split_model
from potstill.runs.build import BuiltRun, build_run
from potstill.runs.config.run import Recipe
from potstill.runs.ranks import alone_in_process
from potstill.runs.start import weak_gradient
from potstill.train.callbacks import logged_lines
from potstill.train.checkpoints import last_checkpoint
from potstill.train.distiller import Distiller
from potstill.train.terms.logits import Logits

ROWS = 64  # of the sample
GRADIENT_BATCHES = 4  # of the training data
COUNTED_ROWS = 20_000  # evenly spaced rows of the training data in which tokens are counted
TEACHER_BATCH = 8  # rows, for a teacher alone
CONTEXT = 40  # tokens of text before an example


@alone_in_process()
@suppress_warnings()
def diagnose(recipe: Recipe, *, run: Path | None = None, rows: int = ROWS) -> dict[str, Any]:
    """Diagnose a run, or a recipe before it runs; the content of diagnose.json.

    Args:
        run: the run's directory; None diagnoses the recipe with the student's initial weights.
        rows: number of evenly spaced held-out rows.

    Raises:
        UserError: the recipe could not run, or there is no run.
    """
    if recipe.task != "causal":
        raise RecipeError(
            f"diagnose: expected a recipe of the task causal, got {recipe.task}. Only next tokens are diagnosed."
        )
    built = build_run(recipe)
    models, teacher, device = _load_models(built, run), built.loaded.model, PartialState().device
    for model in (*models.values(), *([] if teacher is None else [teacher])):
        move(model, device)
    held_out = built.teacher.covers(built.eval.dataset)
    sample = _evenly_spaced(built.eval.dataset if held_out else built.train.dataset, rows)
    used = _temperatures(built, run is not None)
    batches = in_batches(sample, built.tokenizer, built.plan.batch_rows, device)
    options: dict[str, Any] = {"vocabulary": built.vocabulary, "temperatures": sorted({*stats.TEMPERATURES, *used})}
    tokens, softenings = stats.token_stats(partial(_teacher_outputs, built), models, batches, **options)
    student, step = models["student"], built.plan.steps if run else 0
    diagnosis = {
        "kind": "diagnosis",
        "name": recipe.name,
        "of": "recipe" if run is None else "run",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "data": {"which": "held out" if held_out else "training", "rows": len(sample), "tokens": len(tokens)},
        "compression": None if teacher is None else teacher.num_parameters() / student.num_parameters(),
        "losses": {name: -float(x["label_log_prob"].double().mean()) for name, x in tokens.models.items()},
        "temperature": _temperature_table(softenings, used),
        "gradients": asdict(stats.gradient_flow(student, _training_losses(built, student, step, device))),
        "start": None if run else weak_gradient(built, student),
        "training": None if run is None else _training(run, float(recipe.train.get("max_grad_norm", 1.0))),
        **_compare_with_teacher(built, tokens, sample),
        "versions": versions(),
    }
    findings = interpret(diagnosis)
    last = conclusion(diagnosis, findings)
    return {**diagnosis, "findings": [asdict(finding) for finding in findings], "conclusion": last}


@suppress_warnings()
def teacher_temperatures(model: str, data: str | Path, *, rows: int = ROWS, max_length: int = 512) -> dict[str, Any]:
    """Describe a teacher's distributions on a file at each temperature, and recommend one.

    The result is the part `temperature` of diagnose.json: rows, recommended, why.

    Args:
        data: a file as a recipe's `data.train` names it.
        rows: number of evenly spaced rows.
    """
    teacher, tokenizer = load_model(model, "teacher"), load_tokenizer(model, "teacher")
    vocabulary = checked_vocabulary(tokenizer, {"teacher": token_rows(teacher, "causal")})
    sample = _evenly_spaced(encode(Source(data), tokenizer, max_length=max_length).dataset, rows)
    device = PartialState().device
    outputs = partial(outputs_at, teacher.to(device), split_model(teacher))
    batches = in_batches(sample, tokenizer, TEACHER_BATCH, device)
    with evaluation_mode(teacher):
        softenings = stats.token_stats(outputs, {}, batches, vocabulary=vocabulary)[1]
    table = _temperature_table(softenings, [])
    assert table is not None  # encode refuses a file without a target token
    return table


def write_diagnosis(diagnosis: Mapping[str, Any], path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, diagnosis)
    except OSError as error:
        raise UserError(f"--out: expected a file to write to, got {path}: {error.strerror}. Choose another.") from None


def _load_models(built: BuiltRun, run: Path | None) -> dict[str, PreTrainedModel]:
    """Load student and baseline of a run, from their last checkpoints if it did not finish."""
    if run is None:
        return {"student": built.new_student()}
    models = {}
    for name in ("baseline", "student"):
        folder = run / name if (run / name).exists() else last_checkpoint(run / "checkpoints" / name)
        if folder is not None:
            models[name] = load_model(str(folder), name, "float32", trainable=True)
    if "student" not in models:
        raise RecipeError(
            f"diagnose: expected a student or a checkpoint of one in {run}, got neither. "
            f"Diagnose {run / 'recipe.yaml'} instead, or continue with potstill run --resume."
        )
    return models


def _evenly_spaced(dataset: Dataset, number: int) -> Dataset:
    if number < 1:
        raise UserError(f"diagnose: expected rows >= 1, got {number}.")
    return dataset.select(evenly_spaced(number, len(dataset)))


def _teacher_outputs(built: BuiltRun, batch: Mapping[str, Tensor], alignment: Alignment) -> FullTargets | None:
    if built.alignment_stats is not None:  # its vocabulary is another
        return None
    targets = built.teacher(batch, alignment).targets.slice(built.vocabulary)
    return None if isinstance(targets, SparseTargets) else targets


def _temperatures(built: BuiltRun, after_run: bool) -> list[float]:
    """Temperatures of the objective's logits terms: at the start, and after a run at the end too."""
    steps = (0, built.plan.steps) if after_run else (0,)
    terms = (term for term in built.objective.terms if isinstance(term, Logits))
    return sorted({value_at(term.temperature, step) for term in terms for step in steps})


def _training_losses(built: BuiltRun, student: PreTrainedModel, step: int, device: torch.device) -> Iterator[Tensor]:
    """Compute the objective on batches of training data and on-policy samples, as training would at that step."""
    distiller = Distiller(student, built.teacher, built.objective, vocabulary=built.vocabulary).to(device).train()
    rows = _evenly_spaced(built.train.dataset, GRADIENT_BATCHES * built.plan.batch_rows)
    rollout = built.new_rollout()
    for batch in in_batches(rows, built.tokenizer, built.plan.batch_rows, device):
        (sampled,) = [batch] if rollout is None else rollout([batch], student, step=step)
        yield distiller(sampled, at=step).loss


def _temperature_table(softenings: list[Softening], used: list[float]) -> dict[str, Any] | None:
    if not softenings:
        return None
    rows = [{**asdict(row), "mass": {str(k): mass for k, mass in row.mass.items()}} for row in softenings]
    # Temperatures below 1 sharpen the teacher: they are described, and never recommended.
    recommended, why = recommended_temperature([row for row in rows if row["temperature"] >= 1])
    return {"rows": rows, "used": used, "recommended": recommended, "why": why}


def _training(run: Path, max_norm: float) -> dict[str, Any]:
    curve = read_metrics(run / "metrics.jsonl")[0].get("student", [])
    lines = [line for line in logged_lines(run / "metrics.jsonl") if line["run"] == "student"]
    norms = [float(line["grad_norm"]) for line in lines if line.get("grad_norm") is not None]
    best_step, best = min(curve, key=lambda point: point[1], default=(None, None))
    earlier = [loss for step, loss in curve if step <= curve[-1][0] * 5 / 6 + 1]
    return {
        "gain_at_end": earlier[-1] - curve[-1][1] if earlier and len(curve) > 2 else None,
        "past_best": None if best is None else curve[-1][1] - best,
        "best_step": None if best_step is None else int(best_step),
        "gradient_norms": {"median": sorted(norms)[len(norms) // 2], "largest": max(norms)} if norms else None,
        "clipped": sum(norm > max_norm for norm in norms) / len(norms) if norms and max_norm > 0 else None,
    }


def _compare_with_teacher(built: BuiltRun, tokens: TokenStats, sample: Dataset) -> dict[str, Any]:
    if "teacher" not in tokens.models:
        return {"distributions": None, "irreducible": None, "noise": None}
    counts = torch.zeros(built.vocabulary, dtype=torch.long)  # how often each token is a target in the training data
    for row in _evenly_spaced(built.train.dataset, COUNTED_ROWS):
        labels = torch.tensor([label for label in row["labels"][1:] if label != IGNORE], dtype=torch.long)
        counts += torch.bincount(labels, minlength=built.vocabulary)
    noise = stats.label_noise(tokens)
    return {
        "distributions": stats.distributions(tokens, counts),
        "irreducible": stats.irreducible(tokens),
        "noise": {**noise, "examples": [_example(built, tokens, sample, place) for place in noise["examples"]]},
    }


def _example(built: BuiltRun, tokens: TokenStats, sample: Dataset, place: int) -> dict[str, Any]:
    """A label that the teacher contradicts, with the text before it."""
    teacher, end = tokens.models["teacher"], int(tokens.column[place]) + 1
    ids = sample[int(tokens.row[place])]["input_ids"][max(0, end - CONTEXT) : end]
    texts = {"before": ids, "label": [int(tokens.label[place])], "instead": [int(teacher["prediction"][place])]}
    return {
        **{name: str(built.tokenizer.decode(ids)) for name, ids in texts.items()},
        "probability": math.exp(float(teacher["label_log_prob"][place])),
        "certainty": float(teacher["confidence"][place]),
    }
