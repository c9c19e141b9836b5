"""Check that a loaded model is the model that was saved, and that it is causal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import chain
from typing import Any

import torch

from potstill.errors import ModelError
from potstill.models.split import run, undisturbed

# What wrappers add to the names of weights, and how to save without it.
WRAPPERS = {
    "_orig_mod.": "It was saved compiled: save model._orig_mod",
    "_fsdp_wrapped_module.": "It was saved within FSDP: gather its state dict first",
    "_checkpoint_wrapped_module.": "It was saved with wrapped layers: gather its plain state dict first",
    "base_model.model.": "It was saved within PEFT: save model.merge_and_unload()",
    "module.": "It was saved within DataParallel or DeepSpeed: save model.module",
}
HEADS = ("lm_head", "cls.predictions", "embed_out", "score", "classifier")
CAUSAL = "_potstill_causal"  # an attribute of models that were probed already
PROBE_TOKENS = 8
OTHER_SHAPE = 64  # times as much rounding is allowed between rows of two lengths, which are computed otherwise
SHOWN = 3  # names in a message


def check_weights(
    model: Any, missing: Iterable[str], unexpected: Iterable[str], *, key: str, name: str, kind: str, may_miss: bool
) -> tuple[str, ...]:
    """Compare the weights of a checkpoint with those of the model.

    Args:
        model: the loaded model; tied weights are not missing.
        missing: names of weights that the checkpoint does not have, and that are random.
        unexpected: names of weights in the checkpoint that the model does not have.
        key: the recipe's key, for messages.
        name: of the checkpoint.
        kind: of the model, in words.
        may_miss: whether missing weights are a note, not an error.

    Returns:
        Notes for the user.

    Raises:
        ModelError: weights are missing, or have the names of a wrapper.
    """
    missing, unexpected = sorted(missing), sorted(unexpected)
    if not missing:
        return (_unused(key, name, model, unexpected),) if unexpected else ()
    wrapped = ((own, saved) for own in missing for saved in unexpected if saved.endswith(f".{own}"))
    inside = ((missing[0], saved) for saved in unexpected if any(part in saved for part in WRAPPERS))
    if pair := next(chain(wrapped, inside), None):
        hint = next((hint for part, hint in WRAPPERS.items() if part in pair[1]), "Save the model within its wrapper")
        raise ModelError(
            f"{key}: expected weights named like {pair[0]} in {name}, got names like {pair[1]}. {hint}, with "
            "save_pretrained."
        )
    if not may_miss:
        only_head = all(weight.startswith(HEADS) for weight in missing)
        hint = "They would be random: name a model that was trained for it."
        if only_head:
            hint = f"It was saved without its head: save it as {type(model).__name__}, or name a model with one."
        raise ModelError(f"{key}: expected {kind} in {name}, got a model without weights for {_some(missing)}. {hint}")
    note = f"{key}: {name} has no weights for {_some(missing)}: they start at random."
    return (note, _unused(key, name, model, unexpected)) if unexpected else (note,)


def check_shapes(
    mismatched: Iterable[tuple[str, Sequence[int], Sequence[int]]], *, key: str, name: str, kind: str
) -> None:
    """Refuse a checkpoint with weights (name, shape there, shape in the model) of other shapes than the model's."""
    others = [f"{weight} {list(saved)} in place of {list(own)}" for weight, saved, own in sorted(mismatched)]
    if others:
        raise ModelError(
            f"{key}: expected {kind} in {name}, got weights of other shapes than its config.json gives: "
            f"{_some(others)}. Take both from one model."
        )


def check_embeddings(model: Any, key: str) -> None:
    """Refuse a model that does not embed tokens, as Perceiver, whose logits are of all positions that it could read."""
    embeddings = None
    with suppress(NotImplementedError):  # CANINE hashes characters
        embeddings = model.get_input_embeddings()
    if not isinstance(embeddings, torch.nn.Module):
        raise ModelError(
            f"{key}: expected a model with an embedding for each token, got {type(model).__name__}, which has none. "
            "Name a model of another family."
        )


def check_causal(model: Any, key: str) -> None:
    """Check that later tokens do not change earlier logits, on two rows of a few tokens, nor that there are any.

    Raises:
        ModelError: their values do, as in an encoder, or their number, so that padding changes what is trained.
    """
    if getattr(model, CAUSAL, False):
        return
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        return  # it would be compiled for the probe's shapes
    exact = not getattr(model, "is_quantized", False)  # int8 rounds the tokens of a batch together
    rows = torch.arange(11, 11 + 7 * PROBE_TOKENS, 7).repeat(2, 1)
    rows[1, PROBE_TOKENS // 2 :] += 3
    try:
        embeddings = model.get_input_embeddings().weight
        rows = (rows % len(embeddings)).to(embeddings.device)
        with undisturbed(model):
            logits = run(model, {"input_ids": rows, "attention_mask": torch.ones_like(rows)}).logits
            start = rows[:1, : PROBE_TOKENS // 2]
            alone = run(model, {"input_ids": start, "attention_mask": torch.ones_like(start)}).logits
    except Exception:
        return  # what fails on these tokens is reported where the model reads its data
    first, second = logits[:, -PROBE_TOKENS:][:, : PROBE_TOKENS // 2].double()
    allowed = 4 * torch.finfo(logits.dtype).eps * first.abs().max()
    if (first - second).abs().max() > allowed:
        raise ModelError(
            f"{key}: expected a causal language model, got {type(model).__name__}, whose logits depend on later "
            "tokens. Use the task masked for an encoder, or name a decoder."
        )
    if exact and (first - alone[0, -PROBE_TOKENS // 2 :].double()).abs().max() > OTHER_SHAPE * allowed:
        raise ModelError(
            f"{key}: expected logits that do not depend on the length of the row, got {type(model).__name__}, where "
            "padding changes those of the tokens before it. Name a model of another family."
        )
    setattr(model, CAUSAL, True)


def padding_notes(model: Any, key: str) -> tuple[str, ...]:
    """Describe an encoder whose logits depend on the padding behind a row: FNet mixes all tokens, Funnel pools them."""
    try:
        embeddings = model.get_input_embeddings().weight
        padded = torch.arange(11, 11 + 2 * PROBE_TOKENS, device=embeddings.device)[None] % len(embeddings)
        mask = (torch.arange(2 * PROBE_TOKENS, device=padded.device) <= PROBE_TOKENS).long()[None]
        row = padded[:, : PROBE_TOKENS + 1]
        with undisturbed(model):
            alone = run(model, {"input_ids": row, "attention_mask": torch.ones_like(row)}).logits
            logits = run(model, {"input_ids": padded, "attention_mask": mask}).logits[:, : row.shape[1]]
    except Exception:
        return ()  # what fails on these tokens is reported where the model reads its data
    if (alone - logits).abs().max() <= OTHER_SHAPE * torch.finfo(alone.dtype).eps * alone.abs().max():
        return ()
    return (
        f"{key}: {type(model).__name__} reads padding as text, so that a row's loss depends on the longest row of its "
        "batch. Train on rows of one length, or one row at a time.",
    )


def _unused(key: str, name: str, model: Any, unexpected: Sequence[str]) -> str:
    return f"{key}: {name} has weights that {type(model).__name__} does not read: {_some(unexpected)}."


def _some(names: Sequence[str]) -> str:
    """The first few names."""
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} others" if more > 0 else "")
