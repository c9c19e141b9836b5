"""Measure a student and its teacher on a file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from accelerate import PartialState
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from potstill.data.batches import Examples, encode, pad_token_id
from potstill.data.masking import MaskedRows
from potstill.data.sources import Source, as_source
from potstill.data.vocabulary import shared_vocabulary
from potstill.errors import UserError
from potstill.evaluate.formatting import duration
from potstill.evaluate.generations import continuations, text_metrics, text_quality
from potstill.evaluate.harness import Harness, TimeLimitError
from potstill.evaluate.held_out import measure_rows, text_bytes
from potstill.evaluate.speed import speed
from potstill.evaluate.time_limit import TimeLimit
from potstill.evaluate.versions import versions
from potstill.losses.alignment import SEQUENCE_TASKS, TOKEN_TASKS, Task
from potstill.models.adapted import parameter_count, virtual_tokens
from potstill.models.heads import check_end_tokens, class_ids, match_heads, max_positions, token_rows
from potstill.models.loading import load_model, load_tokenizer, suppress_warnings
from potstill.models.spacing import evenly_spaced
from potstill.runs.finished_parts import FinishedParts, fingerprint
from potstill.runs.progress import PartProgress, part

OPTION = {"student": "student", "teacher": "--teacher"}  # where a model is named, for errors
TWO_TOKENIZERS = (
    "tokenizers: teacher and student have different ones, and each reads the file in its own tokens. Bits per byte "
    "compare both; loss and perplexity are per token and do not. Agreement and KL need one tokenizer and are left out."
)


@dataclass(frozen=True)
class EvaluationOptions:
    """Optional measurements, the sizes to time, and a limit on the time of all."""

    generations: int = 0  # number of rows to continue, for ROUGE and BLEU
    new_tokens: int = 64  # maximum length of a continuation
    lm_eval: Sequence[str] = ()  # tasks, see `Harness`
    lm_eval_limit: int | None = None  # examples of each task; None for all
    batch_sizes: Sequence[int] = (1,)  # batch sizes for speed and memory
    lengths: Sequence[int] = (128,)  # lengths of rows for speed and memory
    time_limit: float = 600.0  # seconds for all measurements


@dataclass
class _Evaluation:
    """The parts of an evaluation: those that are finished, and what the others share.

    Each of the `remaining` parts may take as much of the time that is left as the others. A part that the time cut is
    not kept as finished.
    """

    finished: FinishedParts
    limit: TimeLimit
    console: Console
    remaining: int
    scope: str = ""  # before the names of parts

    def part(
        self, name: str, measure: Callable[[PartProgress, TimeLimit], tuple[Any, list[str]]]
    ) -> tuple[Any, list[str]]:
        """The result of a part as JSON, and notes of what the time did not suffice for."""
        limit = self.limit.share(1 / max(self.remaining, 1))
        self.remaining -= 1

        def compute() -> list[Any]:
            with PartProgress(self.console, self.scope + name) as progress:
                return [*measure(progress, limit)]

        result, notes = self.finished.get(self.scope + name, compute, keep=lambda part: not part[1])
        return result, notes


@suppress_warnings()
def evaluate(
    student: str,
    teacher: str | None,
    source: Source | str | Path,
    *,
    max_length: int = 512,
    packing: bool = False,
    options: EvaluationOptions = EvaluationOptions(),  # frozen
    task: Task = "causal",
    finished: Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure a student, and its teacher if one is given, for the JSON file of potstill evaluate.

    A causal teacher may have another tokenizer: then each model is measured by itself, in its own tokens.

    Args:
        finished: file that keeps the results of finished parts, and that a repeated evaluation goes on from; it is
            deleted at the end.
        console: where to show progress; by default nowhere.
    """
    source = as_source(source)
    if task != "causal" and (options.generations or options.lm_eval):
        raise UserError(
            f"--generations, --lm-eval: expected neither for the task {task}, got some. Its models do not generate."
        )
    if task == "encoder" and teacher is None:
        raise UserError("--teacher: expected a model for the task encoder, got none. Encoders are compared with it.")
    if options.generations:
        text_metrics()  # before anything is measured
    harness = Harness(options.lm_eval) if options.lm_eval else None
    tokenizer = load_tokenizer(student, "student")
    teacher_tokenizer = None if teacher is None else load_tokenizer(teacher, "--teacher")
    two_tokenizers = (
        teacher_tokenizer is not None and task == "causal" and teacher_tokenizer.get_vocab() != tokenizer.get_vocab()
    )
    files = [fingerprint(name) for name in (student, teacher, str(source.path)) if name is not None]
    settings = [str(source), max_length, packing, replace(options, time_limit=0), task]
    parts = FinishedParts(finished, [files, settings, versions()])
    num_parts = 1 + bool(options.generations) + len(options.lm_eval) + 1
    evaluation = _Evaluation(parts, TimeLimit(options.time_limit), console or Console(quiet=True), num_parts)
    rows: dict[str, Any] = {"max_length": max_length, "packing": packing, "options": options, "task": task}
    read = partial(_Measurements.read, source=source, harness=harness, **rows)
    if teacher is None or not two_tokenizers:
        models = {"student": student} if teacher is None else {"teacher": teacher, "student": student}
        results = _evaluate(evaluation, models, read)
    else:
        alone = replace(evaluation, scope="teacher ", limit=evaluation.limit.share(0.5))
        of_teacher = _evaluate(alone, {"student": teacher}, read)
        results = _evaluate(replace(evaluation, scope="student "), {"student": student}, read)
        notes = [*results["notes"], TWO_TOKENIZERS]
        results |= {"models": {"teacher": of_teacher["models"]["student"], **results["models"]}, "notes": notes}
    parts.remove()
    return results


def _evaluate(
    evaluation: _Evaluation, names: Mapping[str, str], read: Callable[[Mapping[str, str]], _Measurements]
) -> dict[str, Any]:
    """Measure models of one tokenizer, which `read` loads with the data by their names and paths."""
    with part(evaluation.console, f"{evaluation.scope}reading models and data"):
        of = read(names)
    measured, cut = evaluation.part("held-out rows", of.quality)
    results = {name: {"model": path} | of.describe(name, measured) for name, path in names.items()}
    sections = {"text": ("continuations", of.text)} if of.options.generations else {}
    sections["speed"] = ("speed", of.speeds)
    for key, (title, measure_part) in sections.items():
        of_models, cut_here = evaluation.part(title, measure_part)
        cut = [*cut, *cut_here]
        for name in names:
            results[name][key] = of_models[name]
    for name in of.harness.tasks if of.harness else ():
        of_models, cut_here = evaluation.part(f"lm-eval {name}", partial(of.scores, name))
        cut = [*cut, *cut_here]
        for model_name, of_model in of_models.items():
            results[model_name].setdefault("lm_eval", {}).update(of_model)
    limited = f"--time-limit: {duration(of.options.time_limit)} did not suffice"
    rows = {"rows": len(of.examples.dataset), "measured": measured["rows"], "tokens": of.examples.tokens}
    return {
        "models": results,
        "data": {"path": of.path, **rows, "bytes": measured["bytes"]},
        "notes": [*of.examples.notes, *(f"{limited}: {line}" for line in cut)],
        "versions": versions(),
    }


@dataclass(frozen=True)
class _Measurements:
    """Models of one tokenizer and rows, and what can be measured of all of them within a time.

    Each measurement gives its results as JSON, and notes of what the time did not suffice for.
    """

    models: Mapping[str, PreTrainedModel]
    tokenizer: PreTrainedTokenizerBase
    vocabulary: int | None  # the tokens that all heads share; None for one model, or where heads are no tokens
    path: str | Path  # of the rows
    examples: Examples
    harness: Harness | None
    max_length: int
    options: EvaluationOptions
    task: Task

    @classmethod
    def read(
        cls,
        names: Mapping[str, str],
        source: Source,
        harness: Harness | None,
        max_length: int,
        packing: bool,
        options: EvaluationOptions,
        task: Task,
    ) -> _Measurements:
        tokenizer = load_tokenizer(names["student"], "student")
        models = {name: load_model(path, OPTION[name], task=task) for name, path in names.items()}
        vocabulary = None
        if "teacher" in names:
            head_rows = {name: token_rows(model, task) for name, model in models.items()}
            vocabulary = shared_vocabulary(load_tokenizer(names["teacher"], "--teacher"), tokenizer, head_rows)
        _check_lengths(models, {"--max-length": max_length, "--length": max(options.lengths, default=0)})
        if task not in TOKEN_TASKS:
            vocabulary = None
            match_heads(task, models, pad_token_id(tokenizer)[0])
        classes = class_ids(models["student"].config) if task == "classification" else None
        examples = encode(source, tokenizer, max_length=max_length, packing=packing, task=task, classes=classes)
        if task == "masked":
            examples = replace(examples, dataset=MaskedRows(examples.dataset, tokenizer).fixed())
        elif task in SEQUENCE_TASKS:
            for model in models.values():
                check_end_tokens(model, examples.dataset["input_ids"])
        return cls(models, tokenizer, vocabulary, source.path, examples, harness, max_length, options, task)

    def describe(self, name: str, measured: Mapping[str, Any]) -> dict[str, Any]:
        """The size of a model, and its quality on the held-out rows."""
        model, quality = self.models[name], measured[name]
        nats = quality["loss"] * quality["tokens"] if measured["bytes"] else None
        return {
            "parameters": parameter_count(model).all,
            "bytes": model.get_memory_footprint(),
            "bits_per_byte": None if nats is None else nats / math.log(2) / measured["bytes"],
            "quality": quality,
        }

    def quality(self, progress: PartProgress, limit: TimeLimit) -> tuple[Any, list[str]]:
        """Measure held-out rows."""
        students, teacher, dataset = (
            {"student": self.models["student"]},
            self.models.get("teacher"),
            self.examples.dataset,
        )
        shared: dict[str, Any] = {"vocabulary": self.vocabulary, "max_length": self.max_length}
        shared |= {"limit": limit, "on_rows": progress.update}
        measured, rows = measure_rows(self.task, teacher, students, dataset, self.tokenizer, **shared)
        num_bytes = text_bytes(rows, self.tokenizer) if self.task == "causal" else 0
        cut = [] if len(rows) == len(dataset) else [f"{len(rows):,} of {len(dataset):,} rows were measured."]
        return {"bytes": num_bytes, "rows": len(rows), **{name: asdict(x) for name, x in measured.items()}}, cut

    def text(self, progress: PartProgress, limit: TimeLimit) -> tuple[Any, list[str]]:
        """Continue prompts, and compare with the original continuations."""
        dataset, options = self.examples.dataset, self.options
        chosen = [dataset[i] for i in evenly_spaced(options.generations, len(dataset))]
        written: dict[str, tuple[list[str], list[str]]] = {name: ([], []) for name in self.models}
        for number, row in enumerate(limit.within(chosen), 1):
            for name, model in self.models.items():
                new = continuations(model, self.tokenizer, [row], options.new_tokens)
                for texts, more in zip(written[name], new, strict=True):
                    texts += more
            progress.update(number, len(chosen))
        cut = [] if progress.done == len(chosen) else [f"{progress.done} of {len(chosen)} rows were continued."]
        return {name: asdict(text_quality(*texts)) for name, texts in written.items()}, cut

    def scores(self, task_name: str, progress: PartProgress, limit: TimeLimit) -> tuple[Any, list[str]]:
        """Measure a task of lm-eval."""
        assert self.harness is not None
        results = {}
        try:
            for name, model in self.models.items():
                shared: dict[str, Any] = {"examples": self.options.lm_eval_limit, "on_pass": progress.update}
                results[name] = self.harness.scores(model, self.tokenizer, task_name, limit=limit, **shared)
        except TimeLimitError:
            return {}, [f"lm-eval {task_name} was not finished, and is left out. Lower --lm-eval-limit."]
        return results, []

    def speeds(self, progress: PartProgress, limit: TimeLimit) -> tuple[Any, list[str]]:
        """Time all sizes of batches."""
        sizes = [*product(self.options.batch_sizes, self.options.lengths)]
        results: dict[str, list[Any]] = {name: [] for name in self.models}
        for number, (size, name) in enumerate(product(sizes, self.models)):
            share = limit.share(1 / (len(sizes) * len(self.models) - number))
            results[name].append(asdict(speed(self.models[name], *size, generates=self.task == "causal", limit=share)))
            progress.update(number + 1, len(sizes) * len(self.models))
        return results, []


def _check_lengths(models: Mapping[str, PreTrainedModel], longest: Mapping[str, int]) -> None:
    """Put models on the device, and check that they have positions for the lengths of all options."""
    for name, model in models.items():
        model.to(PartialState().device)
        most = (max_positions(model) or math.inf) - virtual_tokens(model)
        for option, length in longest.items():
            if length > most:
                raise UserError(
                    f"{option}: expected at most {most}, the {name}'s number of positions, got {length}. Use "
                    f"{option} {most}."
                )
