"""potstill evaluate: a student, and its teacher beside it, measured on a file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from potstill.data.batches import Examples, encode, in_batches
from potstill.data.masking import MaskedRows
from potstill.data.sources import Source
from potstill.data.vocabulary import shared_vocabulary
from potstill.errors import UserError
from potstill.evaluate.generations import continuations, text_quality
from potstill.evaluate.harness import harness_scores
from potstill.evaluate.sequence import measure
from potstill.evaluate.speed import speed
from potstill.evaluate.versions import versions
from potstill.losses.alignment import IGNORE, TOKEN_TASKS, Task
from potstill.models.adapted import parameter_count, virtual_tokens
from potstill.models.loading import load_model, load_tokenizer, suppress_warnings
from potstill.models.spacing import evenly_spaced
from potstill.runs.build_task import classes_of, match_heads, token_rows

ROWS = 16  # in a batch
APART = (
    "tokenizers: teacher and student have two, and each reads the file in its own tokens. Bits per byte compare both; "
    "loss and perplexity are by tokens, which differ. Agreement and KL need one tokenizer and are left out."
)


@dataclass(frozen=True)
class Measures:
    """What is measured beside the quality of the next token.

    Args:
        generations: rows that are continued, for ROUGE and BLEU.
        new_tokens: of each continuation, at most.
        lm_eval: tasks, see `harness_scores`.
        lm_eval_limit: examples of each task; None for all.
        batch_sizes: for speed and memory.
        lengths: likewise.
    """

    generations: int = 0
    new_tokens: int = 64
    lm_eval: Sequence[str] = ()
    lm_eval_limit: int | None = None
    batch_sizes: Sequence[int] = (1, 8)
    lengths: Sequence[int] = field(default=(128, 512))


def evaluate(
    student: str,
    teacher: str | None,
    source: Source,
    *,
    max_length: int = 512,
    packing: bool = False,
    measures: Measures = Measures(),  # frozen
    task: Task = "causal",
) -> dict[str, Any]:
    """Measure a student on held-out data, and its teacher too where one is given.

    Args:
        student: a folder or the name of a model on the hub.
        teacher: likewise; None leaves out what compares both. A causal one may have another tokenizer: then each is
            measured by itself, in tokens of its own.
        source: the held-out file and its columns.
        max_length: tokens of a row at most.
        packing: join plain text into rows of exactly `max_length`.
        measures: what else.
        task: what the models are asked for; masks are drawn with seed 0.

    Returns:
        What potstill evaluate writes: models -> {parameters, bytes, quality, speed, ...}, data and versions.

    Raises:
        UserError: a model, the data or an option is not usable, or the vocabularies of what is not causal differ.
    """
    if teacher is not None and task == "causal" and not _one_vocabulary(student, teacher):
        how: dict[str, Any] = {"max_length": max_length, "packing": packing, "measures": measures}
        of_student, of_teacher = (evaluate(model, None, source, **how) for model in (student, teacher))
        models = {"teacher": of_teacher["models"]["student"], **of_student["models"]}
        return {**of_student, "models": models, "notes": [*of_student["notes"], APART]}
    of_tokens = task in TOKEN_TASKS
    if task != "causal" and (measures.generations or measures.lm_eval):
        raise UserError(f"--generations, --lm-eval: expected neither for the task {task}, got some. It writes no text.")
    if task == "encoder" and teacher is None:
        raise UserError("--teacher: expected a model for the task encoder, got none. Spaces are compared with its own.")
    with suppress_warnings():
        tokenizer = load_tokenizer(student, "student")
        models = {"student": load_model(student, "student", task=task)}
        vocabulary = None
        if teacher is not None:
            models = {"teacher": load_model(teacher, "--teacher", task=task), **models}
            rows = {name: token_rows(model, of_tokens) for name, model in models.items()}
            shared = shared_vocabulary(load_tokenizer(teacher, "--teacher"), tokenizer, rows)
            vocabulary = shared if of_tokens else None
        for name, model in models.items():
            model.to(PartialState().device)
            _require_room(name, model, max_length, measures)
        if not of_tokens:
            match_heads(task, models, tokenizer)
        classes = classes_of(models["student"].config) if task == "classification" else None
        examples = encode(source, tokenizer, max_length=max_length, packing=packing, task=task, classes=classes)
        if task == "masked":
            examples = replace(examples, dataset=MaskedRows(examples.dataset, tokenizer).fixed())
        reference = models.get("teacher")
        batches = in_batches(examples.dataset, tokenizer, ROWS)
        others = {name: model for name, model in models.items() if model is not reference}
        found: Mapping[str, Any] = measure(task, reference, others, batches, vocabulary=vocabulary)
        size = text_bytes(examples, tokenizer) if task == "causal" else 0
        return {
            "models": {
                name: {
                    "model": {"student": student, "teacher": teacher}[name],
                    "parameters": parameter_count(model).all,
                    "bytes": model.get_memory_footprint(),
                    "bits_per_byte": found[name].loss * found[name].tokens / math.log(2) / size if size else None,
                    "quality": asdict(found[name]),
                    **_further(model, tokenizer, examples, measures),
                    "speed": [
                        asdict(speed(model, rows, length, writes=task == "causal"))
                        for rows in measures.batch_sizes
                        for length in measures.lengths
                    ],
                }
                for name, model in models.items()
            },
            "data": {"path": source.path, "rows": len(examples.dataset), "tokens": examples.tokens, "bytes": size},
            "notes": list(examples.notes),
            "versions": versions(),
        }


def _one_vocabulary(student: str, teacher: str) -> bool:
    with suppress_warnings():
        return load_tokenizer(student, "student").get_vocab() == load_tokenizer(teacher, "--teacher").get_vocab()


def text_bytes(examples: Examples, tokenizer: PreTrainedTokenizerBase) -> int:
    """The bytes in UTF-8 of the text that counts; special tokens are no text."""
    counted = ([label for label in row["labels"][1:] if label != IGNORE] for row in examples.dataset)
    return sum(len(str(tokenizer.decode(ids, skip_special_tokens=True)).encode()) for ids in counted)


def _further(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Examples, measures: Measures
) -> dict[str, Any]:
    """What was asked for beside quality and speed."""
    further: dict[str, Any] = {}
    if measures.generations:
        rows = [examples.dataset[i] for i in evenly_spaced(measures.generations, len(examples.dataset))]
        further["text"] = asdict(text_quality(*continuations(model, tokenizer, rows, measures.new_tokens)))
    if measures.lm_eval:
        further["lm_eval"] = harness_scores(model, tokenizer, measures.lm_eval, limit=measures.lm_eval_limit)
    return further


def _require_room(name: str, model: PreTrainedModel, max_length: int, measures: Measures) -> None:
    """The model has positions for all that it will read."""
    most = (getattr(model.config, "max_position_embeddings", None) or math.inf) - virtual_tokens(model)
    for option, wanted in (("--max-length", max_length), ("--length", max(measures.lengths, default=0))):
        if wanted > most:
            raise UserError(f"{option}: expected at most {most}, the {name}'s number of positions, got {wanted}.")
