"""Check that a loaded model is the model that was saved, and that it is causal."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from inspect import signature
from itertools import chain
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig

from potstill.errors import ModelError
from potstill.losses.alignment import SEQUENCE_TASKS, Task
from potstill.losses.token_losses import on_float64_device
from potstill.models.precision import integer_weights
from potstill.models.shapes import finds_padding_by_id, text_config
from potstill.models.split import run, undisturbed

# What wrappers add to the names of weights, and how to save without it.
WRAPPERS = {
    "_orig_mod.": "It was saved compiled: save model._orig_mod",
    "_fsdp_wrapped_module.": "It was saved within FSDP: gather its state dict first",
    "_checkpoint_wrapped_module.": "It was saved with wrapped layers: gather its plain state dict first",
    "base_model.model.": "It was saved within PEFT: save model.merge_and_unload()",
    ".base_layer.": "It was saved within PEFT: save model.merge_and_unload()",
    "pretrained_model.": "It was saved with a value head of TRL: save model.pretrained_model",
    "_forward_module.": "It was saved within Lightning Fabric: save model.module",
    "module.": "It was saved within DataParallel or DeepSpeed: save model.module",
}
# What a layer computes otherwise where these weights of it are left out, and what to do.
PARTS = {
    r"lora_|\.(dora|hada|oft)_": "They are an adapter's: save model.merge_and_unload() instead",
    r"scale|SCB|zero_?point|absmax|packed": "They are of quantized weights: keep quantization_config in the config",
}
# Masks and tables that older versions saved, and newer ones compute.
COMPUTED = re.compile(r"(inv_freq|masked_bias|(attn|attention)\.bias|position_ids|causal_mask|version)$")
MORE_TOKENS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_layers")
HEADS = ("lm_head", "cls.predictions", "embed_out", "score", "classifier")
CAUSAL = "_potstill_causal"  # an attribute of models that were probed already
PROBE_TOKENS = 8
OTHER_SHAPE = 64  # times as much rounding is allowed between rows of two lengths, which are computed otherwise
SHOWN = 3  # names in a message


def check_loaded(
    model: Any,
    info: Mapping[str, Any],
    saved: PretrainedConfig,
    task: Task,
    *,
    key: str,
    name: str,
    kind: str,
    may_miss: bool,
) -> list[str]:
    """Check a loaded model against its checkpoint, and for its task; return notes.

    Args:
        model: the loaded model.
        info: what transformers says of its weights: missing, unexpected, of other shapes.
        saved: its config, as it was saved.
        task: what it is loaded for.
        key: the recipe's key, for messages.
        name: of the checkpoint.
        kind: of the model, in words.
        may_miss: whether weights that are missing may be random.
    """
    names = {"key": key, "name": name}
    check_shapes(info["mismatched_keys"], kind=kind, **names)
    check_stored(model, **names)
    missing, unexpected = info["missing_keys"], info["unexpected_keys"]
    notes = [*check_weights(model, missing, unexpected, kind=kind, may_miss=may_miss, **names)]
    notes += [*check_values(model, **names), *config_notes(model, saved, **names)]
    check_embeddings(model, key)
    if task == "causal":
        check_generates(model, key)
        check_causal(model, key)
    if task in ("masked", *SEQUENCE_TASKS):
        notes += padding_notes(model, key)
    if task == "classification" and model.config.problem_type == "multi_label_classification":
        raise ModelError(
            f"{key}: expected a classifier of one class a text, got {name}, whose problem_type is "
            "multi_label_classification. Name another model: the probabilities of its classes do not sum to 1."
        )
    return notes


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
        ModelError: weights are missing, layers lack a part that was saved, or the names are those of a wrapper.
    """
    missing, unexpected = sorted(missing), sorted(unexpected)
    if not may_miss:
        _check_unread(model, missing, unexpected, key=key, name=name, kind=kind)
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
    layers = {weight for weight, _ in model.named_parameters() if _is_in_layer(weight)}
    if layers and layers <= {*missing}:
        raise ModelError(
            f"{key}: expected {kind} in {name}, got none of the weights of {type(model).__name__}'s layers, but names "
            f"like {next(iter(unexpected), 'none')}. Take config.json and weights from one model."
        )
    if not may_miss:
        only_head = all(weight.startswith(HEADS) for weight in missing)
        hint = "They would be random: name a model that was trained for it."
        own = type(model).__name__
        saved_as = next(iter(model.config.architectures or ()), own)
        if only_head and "For" in saved_as and saved_as != own:
            hint = f"It was saved as {saved_as}: name the task that this is for, or a model with that head."
        elif only_head:
            hint = f"It was saved without its head: save it as {own}, or name a model with one."
        raise ModelError(f"{key}: expected {kind} in {name}, got a model without weights for {_some(missing)}. {hint}")
    note = f"{key}: {name} has no weights for {_some(missing)}: they start at random."
    return (note, _unused(key, name, model, unexpected)) if unexpected else (note,)


def check_stored(model: Any, *, key: str, name: str) -> None:
    """Refuse integers in place of weights, which need a factor that plain models do not read."""
    integers = [] if getattr(model.config, "quantization_config", None) is not None else integer_weights(name)
    if integers:
        raise ModelError(
            f"{key}: expected floating-point weights in {name}, got integers in {_some(integers)}: quantized weights "
            "without quantization_config in config.json. Save the quantized model with save_pretrained, or name the "
            "model that it was made from."
        )


def check_values(model: Any, *, key: str, name: str) -> tuple[str, ...]:
    """Refuse weights that are NaN or infinite, and note matrices whose values are all the same."""
    same = []
    for weight, values in model.named_parameters():
        if not values.is_floating_point() or values.element_size() < 2 or values.is_meta or not values.numel():
            continue  # quantized, or on no device
        lowest, highest = values.detach().aminmax()
        if not bool((highest - lowest).isfinite()):
            raise ModelError(
                f"{key}: expected finite weights in {name}, got NaN or infinity in {weight}. Its training diverged, or "
                "its file is damaged: name an earlier checkpoint, or copy it again."
            )
        if lowest == highest and weight.endswith(".weight") and values.ndim == 2 and len(values) > 1:
            same.append(weight)
    return (f"{key}: {name} has weights whose values are all the same: {_some(same)}.",) if same else ()


def config_notes(model: Any, saved: PretrainedConfig, *, key: str, name: str) -> Iterator[str]:
    """Describe where the saved config says another thing than the weights, which are followed."""
    for architecture in saved.architectures or ():
        named = getattr(getattr(transformers, architecture, None), "config_class", None)
        if named and architecture != type(model).__name__ and not isinstance(saved, named):
            yield (
                f"{key}: the config.json of {name} names {architecture}, but has the model_type {saved.model_type}: it "
                f"was loaded as {type(model).__name__}. Check which of them it is."
            )
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    config = model.config.get_text_config()
    plain = type(head) is nn.Linear and type(embeddings) is nn.Embedding and not head.weight.is_meta
    if (
        plain
        and getattr(config, "tie_word_embeddings", False)
        and head.weight is not embeddings.weight
        and _ties_head(model, head)
    ):
        model.config.tie_word_embeddings = config.tie_word_embeddings = False
        _untie(model)
        yield f"{key}: the config.json of {name} ties head and embeddings, but their weights differ: both are kept."


def _ties_head(model: Any, head: nn.Module) -> bool:
    """Whether the family ties its head, where the config ties embeddings; LUKE ties that of entities alone."""
    targets = getattr(model, "_tied_weights_keys", None) or {}
    paths = [path for path, module in model.named_modules() if module is head]
    return any(re.search(target, f"{path}.weight") for target in targets for path in paths)


def _untie(model: Any) -> None:
    """Give a copy of its own to each weight that is still tied: save_pretrained would leave it out as a tied one."""
    for name in model.all_tied_weights_keys:
        module, _, weight = name.rpartition(".")
        parameter = model.get_parameter(name)
        setattr(model.get_submodule(module), weight, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
    model.all_tied_weights_keys = {}


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
    with suppress(RuntimeError):  # CANINE hashes characters
        embeddings = model.get_input_embeddings()
    if not isinstance(embeddings, torch.nn.Module):
        raise ModelError(
            f"{key}: expected a model with an embedding for each token, got {type(model).__name__}, which has none. "
            "Name a model of another family."
        )


def check_generates(model: Any, key: str) -> None:
    """Refuse a causal model that transformers generates no text with: its cache asks for the number of layers,
    and in models with two kinds of attention for a layer of full attention.
    """
    if not hasattr(text_config(model.config), "num_hidden_layers"):
        raise ModelError(
            f"{key}: expected a model that transformers can generate text with, got {type(model).__name__}, whose "
            "config has no num_hidden_layers. Name a model of another family."
        )
    kinds = set(getattr(text_config(model.config), "layer_types", None) or ())
    if kinds == {"linear_attention"} and "past_key_values" in signature(model.forward).parameters:
        raise ModelError(
            f"{key}: expected a model that transformers can generate text with, got {type(model).__name__} with layers "
            "of linear attention alone. Keep a layer of full attention: name layers in student.initialize.layers."
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
    logits, alone = on_float64_device(logits), on_float64_device(alone)
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
    pad = getattr(text_config(model.config), "pad_token_id", None)
    if pad is None and finds_padding_by_id(model):
        return ()  # it gets the id with its data
    try:
        embeddings = model.get_input_embeddings().weight
        padded = torch.arange(11, 11 + 2 * PROBE_TOKENS, device=embeddings.device)[None] % len(embeddings)
        mask = (torch.arange(2 * PROBE_TOKENS, device=padded.device) <= PROBE_TOKENS).long()[None]
        row = padded[:, : PROBE_TOKENS + 1].clone()
        padded[mask == 0] = pad or 0
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


def _check_unread(
    model: Any, missing: Sequence[str], unexpected: Iterable[str], *, key: str, name: str, kind: str
) -> None:
    """Refuse weights that are not read of layers that are: without them these compute something else."""
    if missing or getattr(model.config, "quantization_config", None) is not None:  # its quantizer has names of its own
        return
    modules = dict(model.named_modules())
    more_tokens = any(getattr(model.config.get_text_config(), count, 0) for count in MORE_TOKENS)
    parts = [weight for weight in unexpected if not COMPUTED.search(weight) and _is_part(weight, modules, more_tokens)]
    if parts:
        hint = next((hint for part, hint in PARTS.items() if re.search(part, parts[0])), None)
        raise ModelError(
            f"{key}: expected {kind} in {name}, got weights that {type(model).__name__} does not read, although they "
            f"change what its layers compute: {_some(parts)}. "
            f"{hint or 'Take config.json and weights from one model'}."
        )


def _is_part(weight: str, modules: dict[str, nn.Module], more_tokens: bool) -> bool:
    """Whether a weight is of a module without others in it, of a layer, or of one more layer, of a model."""
    path = weight.rpartition(".")[0]
    while path and path not in modules:
        path = path.rpartition(".")[0]
    if not path:
        return False
    if isinstance(modules[path], nn.ModuleList):
        return not more_tokens
    return not [*modules[path].children()] or _is_in_layer(path)


def _is_in_layer(name: str) -> bool:
    return any(part.isdecimal() for part in name.split("."))


def _unused(key: str, name: str, model: Any, unexpected: Sequence[str]) -> str:
    return f"{key}: {name} has weights that {type(model).__name__} does not read: {_some(unexpected)}."


def _some(names: Sequence[str]) -> str:
    """The first few names."""
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} others" if more > 0 else "")
