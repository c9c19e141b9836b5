"""diagnose(run or recipe): why a run went as it did, or what speaks against one; read it from top to bottom."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from potstill.data.batches import in_batches
from potstill.data.files import write_text
from potstill.errors import RecipeError, UserError
from potstill.evaluate import findings as sentences
from potstill.evaluate.diagnosis import (
    TEMPERATURES,
    Softening,
    Teach,
    Tokens,
    distributions,
    gradient_flow,
    irreducible,
    label_noise,
    look,
)
from potstill.evaluate.summary import read_metrics
from potstill.evaluate.versions import versions
from potstill.losses.alignment import IGNORE, Alignment
from potstill.losses.schedule import value_at
from potstill.losses.targets import SparseTargets
from potstill.models.loading import load_model, suppress_warnings
from potstill.models.spacing import evenly_spaced
from potstill.runs.build import Parts, prepare
from potstill.runs.config.run import Recipe
from potstill.train.callbacks import logged_lines
from potstill.train.checkpoints import last_checkpoint
from potstill.train.distiller import Distiller
from potstill.train.terms.logits import Logits

ROWS = 64  # of the sample
FLOW_BATCHES = 4  # of the training data
COUNTED = 20_000  # rows of the training data in which tokens are counted, evenly spread
SAID = 40  # tokens of text before an example


def diagnose(recipe: Recipe, *, run: Path | None = None, rows: int = ROWS) -> dict[str, Any]:
    """Look closely at a run, or at a recipe before it runs.

    Args:
        recipe: of the run, or to be run.
        run: the run's directory; None looks at the recipe with the student's first weights.
        rows: held-out rows that are looked at, evenly spread.

    Returns:
        What diagnose.json holds.

    Raises:
        UserError: the recipe could not run, or there is no run.
    """
    if recipe.task != "causal":
        raise RecipeError(
            f"diagnose: expected a recipe of the task causal, got {recipe.task}. It looks at the next token alone."
        )
    with suppress_warnings():
        parts = prepare(recipe)
        models = _models(parts, run)
        device = PartialState().device
        for model in (*models.values(), *([parts.teacher_model] if parts.teacher_model is not None else [])):
            model.to(device)
        held_out = parts.teacher.covers(parts.eval.dataset)
        dataset = parts.eval.dataset if held_out else parts.train.dataset
        sample = _spread(dataset, rows)
        used = _temperatures(parts, run is not None)
        tokens, softenings = look(
            _teach(parts),
            models,
            _on(device, in_batches(sample, parts.tokenizer, parts.batch_rows)),
            vocabulary=parts.vocabulary,
            temperatures=sorted({*TEMPERATURES, *used}),
        )
        student = models["student"]
        found = {
            "kind": "diagnosis",
            "name": recipe.name,
            "of": "recipe" if run is None else "run",
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "data": {"which": "held out" if held_out else "training", "rows": len(sample), "tokens": len(tokens)},
            "compression": None
            if parts.teacher_model is None
            else parts.teacher_model.num_parameters() / student.num_parameters(),
            "losses": {name: -float(said.double().mean()) for name, said in tokens.label_log_prob.items()},
            "temperature": _described(softenings, used),
            "gradients": asdict(gradient_flow(student, _losses(parts, student, parts.steps if run else 0, device))),
            "training": None if run is None else _training(run, float(recipe.train.get("max_grad_norm", 1.0))),
            **_compared(parts, tokens, sample),
            "versions": versions(),
        }
    said = sentences.findings(found)
    return {**found, "findings": [asdict(one) for one in said], "conclusion": sentences.conclusion(found, said)}


def write_diagnosis(found: Mapping[str, Any], path: Path) -> None:
    """Write diagnose.json."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"--out: expected a file to write to, got {path}: {error.strerror}. Choose another.") from None


def _models(parts: Parts, run: Path | None) -> dict[str, PreTrainedModel]:
    """Student and baseline as they lie in the run; of one that did not finish, the last checkpoint."""
    if run is None:
        return {"student": parts.new_student()}
    found = {}
    for name in ("baseline", "student"):
        folder = run / name if (run / name).exists() else last_checkpoint(run / "checkpoints" / name)
        if folder is not None:
            found[name] = load_model(str(folder), name, "float32", trainable=True)
    if "student" not in found:
        raise RecipeError(
            f"diagnose: expected a student or a checkpoint of one in {run}, got neither. "
            f"Diagnose {run / 'recipe.yaml'} instead, or go on with potstill run --resume."
        )
    return found


def _spread(dataset: Dataset, wanted: int) -> Dataset:
    return dataset.select(evenly_spaced(wanted, len(dataset)))


def _on(device: torch.device, batches: Iterable[Mapping[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    return ({name: value.to(device) for name, value in batch.items()} for batch in batches)


def _teach(parts: Parts) -> Teach:
    """The teacher's whole distributions; None where it tells a part of them, or is one of other tokens."""

    def teach(batch: Mapping[str, Tensor], alignment: Alignment) -> Tensor | None:
        if parts.meeting is not None:
            return None
        targets = parts.teacher(batch, alignment).targets.slice(parts.vocabulary)
        return None if isinstance(targets, SparseTargets) else targets.dense()

    return teach


def _temperatures(parts: Parts, after: bool) -> list[float]:
    """Those of the objective's logits terms: at the beginning, or over a whole run at both ends."""
    steps = (0, parts.steps) if after else (0,)
    terms = [term for term in parts.objective.terms if isinstance(term, Logits)]
    return sorted({value_at(term.temperature, step) for term in terms for step in steps})


def _losses(parts: Parts, student: PreTrainedModel, step: int, device: torch.device) -> Iterator[Tensor]:
    """The objective's loss on batches of the training data, and of own text, as in training at that step."""
    distiller = Distiller(student, parts.teacher, parts.objective, vocabulary=parts.vocabulary).to(device).train()
    chosen = _spread(parts.train.dataset, FLOW_BATCHES * parts.batch_rows)
    rollout = parts.rollout()
    for batch in _on(device, in_batches(chosen, parts.tokenizer, parts.batch_rows)):
        (seen,) = [batch] if rollout is None else rollout([batch], student, step=step)
        yield distiller(seen, at=step).loss


def _described(softenings: list[Softening], used: list[float]) -> dict[str, Any] | None:
    if not softenings:
        return None
    rows = [{**asdict(one), "mass": {str(k): mass for k, mass in one.mass.items()}} for one in softenings]
    # Below 1 no teacher is softened: such a temperature is described, and never recommended.
    recommended, why = sentences.recommended_temperature([row for row in rows if row["temperature"] >= 1])
    return {"rows": rows, "used": used, "recommended": recommended, "why": why}


def _training(run: Path, max_norm: float) -> dict[str, Any]:
    """What the metrics of the student's training tell."""
    curves, _ = read_metrics(run / "metrics.jsonl")
    curve = curves.get("student", [])
    lines = [line for line in logged_lines(run / "metrics.jsonl") if line["run"] == "student"]
    norms = [float(line["grad_norm"]) for line in lines if line.get("grad_norm") is not None]
    best = min(curve, key=lambda point: point[1], default=None)
    before = [loss for step, loss in curve if step <= curve[-1][0] * 5 / 6 + 1] if curve else []
    return {
        "gain_at_end": before[-1] - curve[-1][1] if before and len(curve) > 2 else None,
        "past_best": None if best is None else curve[-1][1] - best[1],
        "best_step": None if best is None else int(best[0]),
        "gradient_norms": {"median": sorted(norms)[len(norms) // 2], "largest": max(norms)} if norms else None,
        "clipped": sum(norm > max_norm for norm in norms) / len(norms) if norms and max_norm > 0 else None,
    }


def _compared(parts: Parts, tokens: Tokens, sample: Dataset) -> dict[str, Any]:
    """What needs the teacher's whole distributions."""
    if tokens.certainty is None:
        return {"distributions": None, "irreducible": None, "noise": None}
    noise = label_noise(tokens)
    return {
        "distributions": distributions(tokens, _frequency(parts)),
        "irreducible": irreducible(tokens),
        "noise": {**noise, "examples": [_example(parts, tokens, sample, place) for place in noise["examples"]]},
    }


def _frequency(parts: Parts) -> Tensor:
    """[V] how often each token is a label in the training data."""
    counts = torch.zeros(parts.vocabulary, dtype=torch.long)
    for row in _spread(parts.train.dataset, COUNTED):
        labels = torch.tensor([label for label in row["labels"][1:] if label != IGNORE], dtype=torch.long)
        counts += torch.bincount(labels, minlength=parts.vocabulary)
    return counts


def _example(parts: Parts, tokens: Tokens, sample: Dataset, place: int) -> dict[str, Any]:
    """A label that the teacher contradicts, with the text before it."""
    assert tokens.certainty is not None
    assert tokens.favourite is not None
    column = int(tokens.column[place])
    ids = sample[int(tokens.row[place])]["input_ids"]

    def decode(some: list[int]) -> str:
        return str(parts.tokenizer.decode(some))

    return {
        "before": decode(ids[max(0, column + 1 - SAID) : column + 1]),
        "label": decode([int(tokens.label[place])]),
        "probability": math.exp(float(tokens.label_log_prob["teacher"][place])),
        "instead": decode([int(tokens.favourite[place])]),
        "certainty": float(tokens.certainty[place]),
    }
