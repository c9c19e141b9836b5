"""The recipe's `student.vocabulary`: tokenizer, teacher and student with fewer tokens."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from potstill.data.batches import encode, in_batches
from potstill.data.loading import load
from potstill.data.mixture import encode_mixture
from potstill.data.sources import Source, in_parts
from potstill.errors import RecipeError
from potstill.evaluate.held_out import measure_rows, text_bytes
from potstill.evaluate.quality import logits_in_parts, outputs_at
from potstill.evaluate.sequence import measure
from potstill.evaluate.time_limit import TimeLimit
from potstill.losses.alignment import causal_alignment
from potstill.models.chat import set_chat_template
from potstill.models.heads import class_ids
from potstill.models.placement import is_spread, move
from potstill.models.split import evaluation_mode, split_model
from potstill.models.trimming import KEY, check_rows, choose_tokens, trim_model, trim_tokenizer
from potstill.runs.config.run import Recipe
from potstill.teachers.source import LoadedTeacher

PROBE_ROWS = 16  # held-out rows on which the teacher is measured with all tokens and with the kept ones
PROBE_BATCH = 4  # rows
COUNTED_LENGTH = 2**14  # tokens of a row, longer ones are split: parts of a prompt alone would not be counted


class KeptTokens(NamedTuple):
    """The tokens that a student keeps."""

    ids: tuple[int, ...]  # in the whole tokenizer, in the order of the new ids
    tokenizer: PreTrainedTokenizerBase  # of these tokens alone
    whole: PreTrainedTokenizerBase


def keep_tokens(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig | None
) -> KeptTokens | None:
    """Choose the tokens that the recipe asks for, and make a tokenizer of them; None where it keeps all.

    All are kept where their number is not chosen yet. The config is the teacher's, with a classifier's classes.
    """
    part = recipe.student.vocabulary
    if part is None:
        return None
    for rows in (*in_parts(recipe.data.train), recipe.data.eval):
        if load(rows, recipe.task, has_template=tokenizer.chat_template is not None).kind == "input_ids":
            raise RecipeError(
                f"student.vocabulary: expected texts, which fewer tokens can encode, got ids of all tokens in "
                f"{rows.title}. Give its text, or keep all tokens."
            )
    source, options = recipe.data.train if part.text is None else part.text, _options(recipe)
    if part.text is not None:
        source, options = whole_text(part.text)
    elif recipe.task == "classification" and config is not None:
        options["classes"] = class_ids(config)
    if part.keep == "auto":
        encode_mixture(source, tokenizer, **options)  # it is kept on the disk: mistakes in it are found now
        return None
    kept = tokens_of(source, tokenizer, part.keep, **options)
    return KeptTokens(kept, trim_tokenizer(tokenizer, kept), tokenizer)


def whole_text(text: Source) -> tuple[Source, dict[str, Any]]:
    """Return a text in which tokens are counted, and options of `encode`: no labels, and rows that no training cuts."""
    return replace(text, long_rows=text.long_rows or "split"), {"max_length": COUNTED_LENGTH, "task": "causal"}


def tokens_of(
    source: Source | Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    keep: Literal["data"] | int,
    key: str = KEY,
    **options: Any,
) -> tuple[int, ...]:
    """Choose the tokens to keep by how often a text has them; `options` are those of `encode`."""
    counts: Counter[int] = Counter()
    for row in encode_mixture(source, tokenizer, **options).dataset:
        counts.update(row["input_ids"])
    return tuple(choose_tokens(tokenizer, counts, keep, key=key))


def trim_teacher(recipe: Recipe, loaded: LoadedTeacher, kept: KeptTokens) -> tuple[LoadedTeacher, str]:
    """Cut a teacher of the same tokenizer to the kept tokens, in place, and describe what it loses.

    Its distribution over the kept tokens is then its own, renormalized: the softmax of the logits that are left. A
    teacher with another tokenizer keeps its tokens.
    """
    note = f"student.vocabulary: {len(kept.ids):,} of {len(kept.whole.get_vocab()):,} tokens."
    if loaded.tokenizer.get_vocab() != kept.whole.get_vocab():
        return loaded, note
    if recipe.teacher.name != "model" or loaded.model is None:
        raise RecipeError(
            "student.vocabulary: expected a teacher that is one model beside the student (teacher.model alone), whose "
            f"vocabulary is cut too, got {recipe.teacher.title}. Name one, or keep all tokens."
        )
    if is_spread(loaded.model):
        raise RecipeError(
            "student.vocabulary: expected a teacher on one device, whose vocabulary is cut too, got one with "
            "device_map. Leave it out, or keep all tokens."
        )
    check_rows(loaded.model, kept.ids)
    if recipe.task == "causal":
        rows = _held_out(recipe, kept.whole)
        bits = bits_per_byte(loaded.model, rows, kept.whole)
        share = kept_share(loaded.model, rows, kept)
    parameters = loaded.model.num_parameters()
    trim_model(loaded.model, kept.ids)
    if recipe.task == "causal":
        note += (
            f" The teacher needs {bits_per_byte(loaded.model, _held_out(recipe, kept.tokenizer), kept.tokenizer):.3f} "
            f"bits a byte with them, and {bits:.3f} with all, on the first held-out rows. It gave the others "
            f"{1 - share:.2%} of its probability; its targets are renormalized without them."
        )
    config = copy.deepcopy(loaded.model.config)
    return replace(loaded, tokenizer=kept.tokenizer, config=config, uncut_parameters=parameters), note


def bits_per_byte_of_whole_teacher(
    recipe: Recipe, num_rows: int, max_length: int, limit: TimeLimit, on_rows: Callable[[int, int], None]
) -> float:
    """Measure the teacher as it is on the disk, with all its tokens, on the first held-out rows of max_length tokens.

    A rehearsal has short rows of the kept tokens, but none of all, and prompts do not fit into the length of its own.
    """
    loaded = recipe.teacher.load(None, recipe.task)
    set_chat_template(loaded.tokenizer, recipe.data.chat_template, recipe.data.chat_template_kwargs)
    rows = _held_out(recipe, loaded.tokenizer, num_rows, max_length=max_length)
    assert loaded.model is not None
    model = move(loaded.model, recipe.teacher.model_device or PartialState().device)
    options: dict[str, Any] = {"max_length": max_length, "limit": limit, "on_rows": on_rows}
    quality, rows = measure_rows(recipe.task, None, {"whole": model}, rows, loaded.tokenizer, **options)
    whole: Any = quality["whole"]
    bits: float = whole.loss * whole.tokens / math.log(2)
    return bits / max(1, text_bytes(rows, loaded.tokenizer))


def bits_per_byte(model: PreTrainedModel, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> float:
    """Compute the loss of a causal model on the rows' targets, in bits per byte of their text."""
    quality: Any = measure("causal", None, {"model": model}, in_batches(rows, tokenizer, PROBE_BATCH))["model"]
    bits: float = quality.loss * quality.tokens / math.log(2)
    return bits / max(1, text_bytes(rows, tokenizer))


def kept_share(model: PreTrainedModel, rows: Dataset, kept: KeptTokens) -> float:
    """Compute the mean probability that a causal model gives to the kept tokens, over the rows' targets."""
    ids, total, tokens, split = torch.tensor(kept.ids, device=model.device), 0.0, 0, split_model(model)
    with torch.no_grad(), evaluation_mode(model):
        for batch in in_batches(rows, kept.whole, PROBE_BATCH, model.device):
            alignment = causal_alignment(batch["labels"])
            outputs = {"model": outputs_at(model, split, batch, alignment)}
            for _, parts in logits_in_parts(outputs, None, model.device):
                logits = parts["model"]
                total += float((logits[:, ids].logsumexp(-1) - logits.logsumexp(-1)).exp().sum())
            tokens += len(alignment)
    return total / max(1, tokens)


def _options(recipe: Recipe) -> dict[str, Any]:
    data = recipe.data
    return {"max_length": data.max_length, "packing": data.packing, "task": recipe.task}


def _held_out(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, number: int = PROBE_ROWS, **others: int) -> Dataset:
    rows = encode(recipe.data.eval, tokenizer, **{**_options(recipe), **others}).dataset
    return rows.select(range(min(number, len(rows))))
