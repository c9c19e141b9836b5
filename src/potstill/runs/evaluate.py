"""Measure a student and its teacher on a file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedTokenizerBase

from potstill.data.batches import Examples, encode, in_batches, pad_token_id
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
from potstill.models.heads import class_ids, match_heads, token_rows
from potstill.models.loading import load_model, load_tokenizer, suppress_warnings
from potstill.models.spacing import evenly_spaced

ROWS = 16  # batch size
TWO_TOKENIZERS = (
    "tokenizers: teacher and student have different ones, and each reads the file in its own tokens. Bits per byte "
    "compare both; loss and perplexity are per token and do not. Agreement and KL need one tokenizer and are left out."
)


@dataclass(frozen=True)
class EvaluationOptions:
    """Optional measurements, and the sizes to time."""

    generations: int = 0  # number of rows to continue, for ROUGE and BLEU
    new_tokens: int = 64  # maximum length of a continuation
    lm_eval: Sequence[str] = ()  # tasks, see `harness_scores`
    lm_eval_limit: int | None = None  # examples of each task; None for all
    batch_sizes: Sequence[int] = (1, 8)  # batch sizes for speed and memory
    lengths: Sequence[int] = (128, 512)  # lengths of rows for speed and memory


@suppress_warnings()
def evaluate(
    student: str,
    teacher: str | None,
    source: Source,
    *,
    max_length: int = 512,
    packing: bool = False,
    options: EvaluationOptions = EvaluationOptions(),  # frozen
    task: Task = "causal",
) -> dict[str, Any]:
    """Measure a student, and its teacher if one is given, for the JSON file of potstill evaluate.

    A causal teacher may have another tokenizer: then each model is measured by itself, in its own tokens.
    """
    if task != "causal" and (options.generations or options.lm_eval):
        raise UserError(
            f"--generations, --lm-eval: expected neither for the task {task}, got some. Its models do not generate."
        )
    if task == "encoder" and teacher is None:
        raise UserError("--teacher: expected a model for the task encoder, got none. Encoders are compared with it.")
    tokenizer, of_tokens = load_tokenizer(student, "student"), task in TOKEN_TASKS
    teacher_tokenizer = None if teacher is None else load_tokenizer(teacher, "--teacher")
    if teacher and teacher_tokenizer and task == "causal" and teacher_tokenizer.get_vocab() != tokenizer.get_vocab():
        shared: dict[str, Any] = {"max_length": max_length, "packing": packing, "options": options}
        of_student, of_teacher = (evaluate(model, None, source, **shared) for model in (student, teacher))
        models = {"teacher": of_teacher["models"]["student"], **of_student["models"]}
        return {**of_student, "models": models, "notes": [*of_student["notes"], TWO_TOKENIZERS]}
    models = {"student": load_model(student, "student", task=task)}
    vocabulary = None
    if teacher is not None and teacher_tokenizer is not None:
        models = {"teacher": load_model(teacher, "--teacher", task=task), **models}
        head_rows = {name: token_rows(model, task) for name, model in models.items()}
        common = shared_vocabulary(teacher_tokenizer, tokenizer, head_rows)
        vocabulary = common if of_tokens else None
    longest = {"--max-length": max_length, "--length": max(options.lengths, default=0)}
    for name, model in models.items():
        model.to(PartialState().device)
        most = (getattr(model.config, "max_position_embeddings", None) or math.inf) - virtual_tokens(model)
        for option, length in longest.items():
            if length > most:
                raise UserError(f"{option}: expected at most {most}, the {name}'s number of positions, got {length}.")
    if not of_tokens:
        match_heads(task, models, pad_token_id(tokenizer)[0])
    classes = class_ids(models["student"].config) if task == "classification" else None
    examples = encode(source, tokenizer, max_length=max_length, packing=packing, task=task, classes=classes)
    if task == "masked":
        examples = replace(examples, dataset=MaskedRows(examples.dataset, tokenizer).fixed())
    batches = in_batches(examples.dataset, tokenizer, ROWS)
    students = {"student": models["student"]}
    quality: Mapping[str, Any] = measure(task, models.get("teacher"), students, batches, vocabulary=vocabulary)
    num_bytes = text_bytes(examples, tokenizer) if task == "causal" else 0
    sizes = [*product(options.batch_sizes, options.lengths)]
    rows = [examples.dataset[i] for i in evenly_spaced(options.generations, len(examples.dataset))]
    results = {}
    for name, model in models.items():
        nats = quality[name].loss * quality[name].tokens if num_bytes else None
        results[name] = result = {
            "model": {"student": student, "teacher": teacher}[name],
            "parameters": parameter_count(model).all,
            "bytes": model.get_memory_footprint(),
            "bits_per_byte": None if nats is None else nats / math.log(2) / num_bytes,
            "quality": asdict(quality[name]),
        }
        if options.generations:
            result["text"] = asdict(text_quality(*continuations(model, tokenizer, rows, options.new_tokens)))
        if options.lm_eval:
            result["lm_eval"] = harness_scores(model, tokenizer, options.lm_eval, limit=options.lm_eval_limit)
        result["speed"] = [asdict(speed(model, *size, generates=task == "causal")) for size in sizes]
    return {
        "models": results,
        "data": {"path": source.path, "rows": len(examples.dataset), "tokens": examples.tokens, "bytes": num_bytes},
        "notes": list(examples.notes),
        "versions": versions(),
    }


def text_bytes(examples: Examples, tokenizer: PreTrainedTokenizerBase) -> int:
    """Count the UTF-8 bytes of the target tokens' text, without special tokens."""
    targets = ([label for label in row["labels"][1:] if label != IGNORE] for row in examples.dataset)
    return sum(len(str(tokenizer.decode(ids, skip_special_tokens=True)).encode()) for ids in targets)
