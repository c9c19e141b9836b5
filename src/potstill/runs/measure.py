"""Measure the models of a finished run as they are on disk, and summarize the run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from rich.console import Console
from torch import Tensor, nn
from transformers import PreTrainedModel

from potstill.data.batches import in_batches
from potstill.data.sources import in_parts
from potstill.evaluate import summary as records
from potstill.evaluate.formatting import duration
from potstill.evaluate.held_out import measure_rows, text_bytes
from potstill.evaluate.measures import QUALITY
from potstill.evaluate.quality import continuation, gap_closed
from potstill.evaluate.speed import PASSES, Latency, bytes_on_disk, latencies, weight_bytes
from potstill.evaluate.time_limit import TimeLimit
from potstill.evaluate.versions import versions
from potstill.losses.alignment import TOKEN_TASKS, causal_alignment
from potstill.models.adapted import is_adapted, is_quantized, parameter_count
from potstill.models.chat import end_token_ids
from potstill.models.loading import load_model
from potstill.models.placement import is_sharded, move
from potstill.models.precision import describe_precision, saved_dtype
from potstill.runs.build import BuiltRun
from potstill.runs.compute import training_flops
from potstill.runs.progress import PartProgress, part
from potstill.runs.vocabulary import bits_per_byte_of_whole_teacher
from potstill.train.callbacks import logged_lines, seconds_of
from potstill.train.checkpoints import last_checkpoint, restore_teacher
from potstill.train.samples import collapse_warning

EVAL_ROWS = 16  # batch size of evaluations
SAMPLES = 4  # on-policy samples in the report
Models = Mapping[str, PreTrainedModel]  # by teacher, baseline and student


@dataclass(frozen=True)
class _Measured:
    """What was measured of the models of a run."""

    models: Models
    rows: Dataset  # held-out ones
    bytes: int  # of their text, where tokens are learned
    quality: Mapping[str, Any]
    teacher_loss: float | None  # of a teacher without a model here too, where it is known
    whole_bits: float | None  # a byte, of a causal teacher with all its tokens, where some are cut
    curve: records.CurveFacts
    continuations: list[records.Continuation]
    latency: Mapping[str, Latency]
    bounded: Mapping[str, tuple[int, int]]  # numbers of what was measured, and of all


def summarize(
    built: BuiltRun, students: Mapping[str, Path], directory: Path, console: Console | None = None
) -> records.Summary:
    """Measure teacher, baseline and student on held-out data; `students` maps their names to their folders.

    The recipe's evaluate.time_limit bounds it: a part whose time is over measures fewer rows, passes or prompts, and a
    note of the summary says so.
    """
    recipe = built.recipe
    checkpoint = last_checkpoint(directory / "checkpoints" / "student")
    if checkpoint is not None and not built.teacher.of_student:
        restore_teacher(built.teacher, checkpoint)
    of = _measure_all(built, students, console or Console(quiet=True))
    metrics = logged_lines(directory / "metrics.jsonl")
    stats = next((line for line in reversed(metrics) if "own_length" in line), None)
    return records.Summary(
        name=recipe.name,
        seed=recipe.seed,
        task=recipe.task,
        created=datetime.now(UTC).replace(microsecond=0),
        rows=_scores(built, students, of),
        **_gain(built, of),
        curve=of.curve,
        kl_by_position=_kl_by_position(built, students, of),
        continuations=of.continuations,
        latency={name: records.LatencyFacts(**asdict(times)) for name, times in of.latency.items()},
        own_texts=[records.Sample(**sample) for sample in _spread(logged_lines(directory / "own_texts.jsonl"))],
        own_text=None if stats is None else records.SampleFacts(**stats),
        data=_data_facts(built, of),
        training=_training_facts(built, {name: seconds_of(metrics, name) for name in students}, of),
        objective="; ".join(term.describe() for term in recipe.objective),
        models={"teacher": recipe.teacher.describe(built.teacher), "student": recipe.student.describe()},
        adapter=_adapter_facts(built, students["student"], of.models["student"]),
        teacher_weights=built.teacher.member_weights,
        notes=[
            *built.duplicates.warnings,
            *built.notes,
            *collapse_notes(metrics),
            *_limit_notes(of.bounded, recipe.evaluate.time_limit),
        ],
        versions=versions(),
    )


def _measure_all(built: BuiltRun, students: Mapping[str, Path], console: Console) -> _Measured:
    recipe, held_out = built.recipe, built.eval
    limit = TimeLimit(recipe.evaluate.time_limit)
    with part(console, "reading the saved models"):
        models = _load_models(built, students)
    teacher, trained = models.get("teacher"), {name: models[name] for name in students}
    with PartProgress(console, "held-out rows") as progress:
        quality, rows = _measure(built, teacher, trained, held_out.dataset, limit.share(0.5), progress)
    size = text_bytes(rows, built.tokenizer) if recipe.task in TOKEN_TASKS else 0
    teacher_loss = _teacher_loss(built, rows) if teacher is None else quality["teacher"].loss
    whole_bits = None
    if built.loaded.uncut_parameters is not None and teacher is not None and recipe.task == "causal":
        with PartProgress(console, "held-out rows of the whole teacher") as progress:
            most: tuple[int, int] = (len(rows), held_out.max_length)
            whole_bits = bits_per_byte_of_whole_teacher(recipe, *most, limit.share(0.5), progress.update)
    curve_loss, curve_rows = teacher_loss, rows
    if len(built.curve) < len(rows) or len(rows) < len(held_out.dataset):
        with PartProgress(console, "rows of the curves") as progress:
            curve_loss, curve_rows = _curve_loss(built, teacher, limit.share(0.5), progress)
    number = min(recipe.evaluate.continuations, len(held_out.dataset)) if recipe.task == "causal" else 0
    with PartProgress(console, "continuations").start(total=number) as progress:
        continuations = _continuations(built, models, limit.share(0.5), progress) if number else []
    with part(console, "latency"):
        latency = latencies(_in_teachers_precision(models), recipe.data.max_length, limit=limit)
    bounded = {
        "held-out rows": (len(rows), len(held_out.dataset)),
        "rows for the teacher's line in the curves": (len(curve_rows), len(built.curve)),
        "passes for the latency": (min(times.passes for times in latency.values()), PASSES),
        "continuations": (progress.done, number),
    }
    curve = records.CurveFacts(rows=len(built.curve), teacher_loss=curve_loss)
    return _Measured(models, rows, size, quality, teacher_loss, whole_bits, curve, continuations, latency, bounded)


def _gain(built: BuiltRun, of: _Measured) -> dict[str, Any]:
    """How far the student is ahead of its baseline, on the way to the teacher, with the standard error."""
    baseline, closed, error = of.quality.get("baseline"), None, None
    if baseline is not None and of.teacher_loss is not None:
        closed = gap_closed(of.teacher_loss, baseline.loss, of.quality["student"].loss)
    if baseline is not None and built.recipe.task in TOKEN_TASKS:
        error = baseline.difference_errors.get("student")
    return {"gap_closed": closed, "gain_error": error}


def _kl_by_position(built: BuiltRun, students: Mapping[str, Path], of: _Measured) -> records.PositionKL | None:
    if "teacher" not in of.models or built.recipe.task != "causal":  # masks let models see both sides of a position
        return None
    kl = {name: of.quality[name].kl_by_position for name in students}
    return records.PositionKL(edges=of.quality["student"].position_edges, **kl)


def _training_facts(built: BuiltRun, seconds: dict[str, float], of: _Measured) -> records.TrainingFacts:
    step_tokens = None
    if built.recipe.task in TOKEN_TASKS:
        step_tokens = round(built.train.tokens / len(built.train.dataset) * built.plan.rows_per_step)
    flops = training_flops(built, of.models["student"])
    return records.TrainingFacts(steps=built.plan.steps, tokens_per_step=step_tokens, seconds=seconds, flops=flops)


def _data_facts(built: BuiltRun, of: _Measured) -> records.DataFacts:
    data, of_tokens = built.recipe.data, built.recipe.task in TOKEN_TASKS
    facts: dict[str, Any] = {"eval_in_train": built.duplicates.share, "eval_measured": len(of.rows)}
    facts["eval_bytes_per_token"] = of.bytes / max(1, of.quality["student"].tokens) if of.bytes else None
    for name, sources, examples in (("train", data.train, built.train), ("eval", data.eval, built.eval)):
        facts[name] = ", ".join(str(source.path) for source in in_parts(sources))
        facts[f"{name}_examples"] = len(examples.dataset)
        facts[f"{name}_tokens"] = examples.tokens if of_tokens else None
    return records.DataFacts(**facts)


def _limit_notes(bounded: Mapping[str, tuple[int, int]], seconds: float) -> list[str]:
    """A note of what was measured in part; for each name the number that was measured, and that of all."""
    cut = [f"{number:,} of {total:,} {name}" for name, (number, total) in bounded.items() if number < total]
    enough = f"{duration(seconds)} were enough for {', '.join(cut)}"
    return [f"evaluate.time_limit: {enough}. Raise it to measure all."] if cut else []


def _curve_loss(
    built: BuiltRun, teacher: Any, limit: TimeLimit, progress: PartProgress
) -> tuple[float | None, Dataset]:
    """The teacher's loss on the rows of the learning curves, and those that it was measured on."""
    if teacher is None:
        return _teacher_loss(built, built.curve), built.curve
    quality, rows = _measure(built, teacher, {}, built.curve, limit, progress)
    return quality["teacher"].loss, rows


def _load_models(built: BuiltRun, students: Mapping[str, Path]) -> dict[str, PreTrainedModel]:
    """Load the saved students, after the teacher if it can be measured here: with the student's own tokens."""
    recipe, device = built.recipe, PartialState().device
    models = {}
    if built.loaded.model is not None and built.alignment_stats is None:
        models["teacher"] = move(built.loaded.model, recipe.teacher.model_device or device)
    dtype = "auto" if recipe.student.adapter is None else recipe.student.adapter.dtype
    for name in sorted(students):
        models[name] = load_model(str(students[name]), name, dtype, recipe.task).to(device)
    return models


def _in_teachers_precision(models: Models) -> Models:
    """Put students into the teacher's precision, so that times compare the models alone; quantized ones stay."""
    teacher = models.get("teacher")
    if teacher is None or is_quantized(teacher):
        return models
    for model in models.values():
        if model.dtype != teacher.dtype and not is_quantized(model):
            nn.Module.to(model, teacher.dtype)
    return models


def _measure(
    built: BuiltRun, teacher: Any, models: Models, rows: Dataset, limit: TimeLimit, progress: PartProgress
) -> tuple[Mapping[str, Any], Dataset]:
    options: dict[str, Any] = {"max_length": built.recipe.data.max_length, "vocabulary": built.vocabulary or None}
    shown: dict[str, Any] = {"limit": limit, "on_rows": progress.update}
    return measure_rows(built.recipe.task, teacher, models, rows, built.tokenizer, **options, **shown)


def _teacher_loss(built: BuiltRun, dataset: Dataset) -> float | None:
    """Compute the cross-entropy of a teacher without a model here, from its log-probabilities of the data's tokens.

    A teacher with another tokenizer is measured on the same text, per token of the student. None if the teacher does
    not know the rows or their probabilities, is made of the student, or is sharded: one process measures.
    """
    sharded = any(map(is_sharded, built.loaded.models.values()))
    if sharded or built.teacher.of_student or not built.teacher.covers(dataset):
        return None
    total, tokens = 0.0, 0
    for batch in in_batches(dataset, built.tokenizer, EVAL_ROWS, PartialState().device):
        alignment = causal_alignment(batch["labels"])
        output = built.teacher(batch, alignment)
        log_probs: Tensor | None
        if output.chunks is not None:
            log_probs, num_tokens = output.chunks.log_probs, int((output.chunks.student >= 0).sum())
        else:
            shared = replace(output, targets=output.targets.slice(built.vocabulary))
            log_probs, num_tokens = shared.log_probs_of(alignment.labels), len(alignment)
        if log_probs is None:
            return None
        total -= float(log_probs.cpu().double().sum())
        tokens += num_tokens
    return total / max(tokens, 1)


def _scores(built: BuiltRun, students: Mapping[str, Path], of: _Measured) -> records.ScoresByModel:
    models, quality = of.models, of.quality
    folders = {"teacher": Path(str(built.recipe.teacher.model_path)), **students}
    rows: dict[str, dict[str, Any]] = {}
    counts = {name: parameter_count(model) for name, model in models.items()}
    has_experts = any(count.active < count.all for count in counts.values())
    for name, model in models.items():
        rows[name] = {row.key: getattr(quality[name], row.key) for row in QUALITY[built.recipe.task]}
        rows[name] |= {"parameters": counts[name].all, "bytes": bytes_on_disk(folders[name], model)}
        rows[name] |= {"active_parameters": counts[name].active} if has_experts else {}
        rows[name]["saved_as"] = describe_precision(folders[name])
        rows[name]["latency_ms"] = of.latency[name].median_ms
    if (uncut := built.loaded.uncut_parameters) is not None and "teacher" in models:  # it is smaller than on the disk
        of_disk = {name: rows["teacher"][name] for name in ("bytes", "saved_as")}
        rows["whole_teacher"] = dict.fromkeys(rows["student"]) | of_disk | {"parameters": uncut}
        saved = None if is_adapted(models["teacher"]) else saved_dtype(folders["teacher"])  # an adapter has its own
        dtype = saved or models["teacher"].dtype
        rows["teacher"]["bytes"] = rows["teacher"]["parameters"] * dtype.itemsize
    if "teacher" not in models and of.teacher_loss is not None:
        rows["teacher"] = dict.fromkeys(rows["student"]) | {"loss": of.teacher_loss}
        if (teacher := built.loaded.model) is not None:  # its tokenizer differs, its size is known
            rows["teacher"]["parameters"] = teacher.num_parameters()
            rows["teacher"]["bytes"] = weight_bytes(folders["teacher"]) or teacher.get_memory_footprint()
    if (text := built.teacher.alignment_stats(of.rows)) is not None:
        for row in rows.values():
            row["bits_per_byte"] = row["loss"] * text.tokens / max(1, text.bytes) / math.log(2)
    if of.whole_bits is not None:  # the text is the same: its loss is divided by the tokens of the others
        # Rows of a rehearsal may be the end token alone.
        nats = math.log(2) * max(1, of.bytes) / max(1, quality["student"].tokens)
        rows["whole_teacher"]["loss"] = of.whole_bits * nats
        for row in rows.values():
            row["bits_per_byte"] = row["loss"] / nats
    return records.ScoresByModel(**{name: records.ModelScores(**row) for name, row in rows.items()})


def _continuations(
    built: BuiltRun, models: Models, limit: TimeLimit, progress: PartProgress
) -> list[records.Continuation]:
    """Let each model continue held-out prompts until the time is over."""
    dataset, continuations = built.eval.dataset, []
    number = min(built.recipe.evaluate.continuations, len(dataset))
    for i in limit.within(range(number)):
        progress.update(i + 1, number)
        row = dataset[int((i + 0.5) * len(dataset) / number)]
        ids = row["input_ids"]
        prompt = next((position for position, label in enumerate(row["labels"]) if label != -100), 0)
        prompt = prompt or min(64, len(ids) // 2)
        new = min(64, built.recipe.data.max_length - prompt)
        if prompt == 0 or new <= 0:
            continue
        ends = {name: end_token_ids(built.tokenizer, model) for name, model in models.items()}
        tokens = {name: continuation(model, ids[:prompt], new, ends[name]) for name, model in models.items()}
        tokens |= {"prompt": ids[:prompt], "truth": ids[prompt : prompt + new]}
        texts = {name: str(built.tokenizer.decode(ids)) for name, ids in tokens.items()}
        continuations.append(records.Continuation(**texts))
    return continuations


def _spread(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most SAMPLES of them, with the first and the last."""
    number = min(SAMPLES, len(samples))
    return [samples[round(i * (len(samples) - 1) / max(number - 1, 1))] for i in range(number)]


def collapse_notes(metrics: list[dict[str, Any]]) -> list[str]:
    """Say when the student's on-policy samples collapsed first, and whether they still did at the end."""
    collapsed = [(line["step"], reason) for line in metrics if (reason := collapse_warning(line))]
    if not collapsed:
        return []
    last = max(line["step"] for line in metrics if "own_share" in line)
    until = "to the end" if collapsed[-1][0] == last else f"to step {collapsed[-1][0]}"
    return [f"From step {collapsed[0][0]} {until}: {collapsed[-1][1]}"]


def _adapter_facts(built: BuiltRun, folder: Path, student: Any) -> records.AdapterFacts | None:
    adapter, separate = built.recipe.student.adapter, is_adapted(student)
    if adapter is None and not separate:
        return None
    return records.AdapterFacts(
        title="its existing adapter" if adapter is None else adapter.title,
        trained=built.size.trained,
        share=built.size.trained / built.size.all,
        bytes=weight_bytes(folder) if separate else None,
        base=student.active_peft_config.base_model_name_or_path if separate else None,
        quantized=getattr(adapter, "bits", None) is not None,
    )
