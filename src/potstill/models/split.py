"""A language model in two: the body that gives hidden states, and the head that makes logits of them.

What is cut is proven: the model runs once on a few tokens, and where body and head do not say what the model says, it
stays whole and gives whole logits.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from potstill.losses.alignment import Alignment
from potstill.losses.targets import DenseTargets, HeadTargets, LMHead
from potstill.losses.torch_compile import disable_compile

logger = logging.getLogger(__name__)

# What models call the factor around their head. Granite divides by the name that HyperCLOVA X multiplies with: the
# probe finds out.
SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# The logits that the probe puts in, from -SPAN to SPAN: far enough to bend under every soft cap.
SPAN = 60.0
INPUTS = ("input_ids", "attention_mask", "token_type_ids")  # what of a batch models read
# What stands between body and head and works token by token: submodules in turn. The probe finds out which is right.
GELU = "gelu"  # a function, no submodule
BETWEEN = (
    (),  # causal language models
    ("cls.predictions.transform",),  # BERT, DeBERTa
    ("vocab_transform", "activation", "vocab_layer_norm"),  # DistilBERT
    ("lm_head.dense", GELU, "lm_head.layer_norm"),  # RoBERTa, XLM-RoBERTa, CamemBERT
    ("head",),  # ModernBERT
    ("generator_predictions",),  # ELECTRA
    ("predictions.dense", "predictions.activation", "predictions.LayerNorm"),  # ALBERT
)
ROUNDINGS = 8  # how many units in the last place of the largest number count as rounding


@dataclass(frozen=True)
class SplitModel:
    """A model that `split_model` has proven to be a body and a plain head.

    Body and head are found by name each time, because wrappers (FSDP, activation checkpointing) take their places.

    Args:
        model: the whole model.
        body: the name of the submodule that gives the last hidden states.
        between: the names of what works on them before the head does; see `BETWEEN`.
        output: the name of the nn.Linear behind it.
        logit_scale: see `LMHead`.
        softcap: see `LMHead`.
    """

    model: nn.Module
    body: str
    between: tuple[str, ...]
    output: str
    logit_scale: float
    softcap: float | None

    def head(self) -> LMHead | None:
        """The head with its weight of now, to be read within the forward pass.

        None where it has become something else or its weight is not here: sharded on its own, or with an adapter.
        """
        output = self.model.get_submodule(self.output)
        return LMHead(output.weight, output.bias, self.logit_scale, self.softcap) if _is_plain(output) else None

    def hidden(self, batch: Mapping[str, Tensor], alignment: Alignment) -> Tensor:
        """What goes into the head at the counting positions: [N, H]."""
        states: Tensor = run(self.model.get_submodule(self.body), batch).last_hidden_state
        return _through(self.model, self.between, alignment.select(states))


def forward_targets(
    model: nn.Module, split: SplitModel | None, batch: Mapping[str, Tensor], alignment: Alignment
) -> HeadTargets | DenseTargets:
    """What a model says at the counting positions: hidden states and head where it is cut, else its logits.

    A model without a head says nothing: logits [N, 0].

    Args:
        model: a model of transformers.
        split: how to cut it; None to keep it whole.
        batch: input_ids and attention_mask, [B, T] each; token_type_ids where the tokenizer makes them.
        alignment: the N positions; see `potstill.losses.alignment`.
    """
    head = None if split is None else split.head()
    if split is None or head is None:
        said = run(model, batch)
        logits = getattr(said, "logits", None)
        if logits is None:
            return DenseTargets(said.last_hidden_state.new_zeros(len(alignment), 0))
        # Prompt tuning puts tokens of its own in front: the batch's are the last. Classes are of whole rows, [B, V].
        logits = logits.unsqueeze(1) if logits.ndim == 2 else logits[:, -batch["input_ids"].shape[1] :]
        return DenseTargets(alignment.select(logits))
    return HeadTargets(split.hidden(batch, alignment).to(head.weight.dtype), head)


@disable_compile  # done once, and not a part of any step
def split_model(model: nn.Module) -> SplitModel | None:
    """How to cut a model before its head; None where the head is not plain, and the logits must be made whole.

    Plain is exactly nn.Linear, with at most a factor and a soft cap behind it. A wrapped, hooked or quantised head is
    not, nor is a model with anything unknown between body and head, one that trains parameters beside them, one that is
    compiled by itself (the compiled code would not be run), or one on the meta device. The model is left as it was,
    training flags and random state included.

    Args:
        model: a language model of transformers, or one within a PeftModel, where it is to run.
    """
    try:
        return _proven(model)
    except _NotPlainError as reason:
        logger.info("%s gives whole logits: %s.", type(model).__name__, reason)
    except Exception as error:  # models that no one here has seen: what fails here may work in the plain way
        logger.warning("%s gives whole logits: the probe of its head failed with %r.", type(model).__name__, error)
    return None


class _NotPlainError(Exception):
    """Why a model is not cut."""


def _proven(model: Any) -> SplitModel:
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise _NotPlainError("it is compiled by itself; compile the Distiller instead")
    if not hasattr(model, "get_decoder") or not hasattr(model, "get_output_embeddings"):
        raise _NotPlainError("it is not a language model of transformers")
    body, output = model.get_decoder(), model.get_output_embeddings()
    if not _is_plain(output):
        kind = f"{type(output).__module__}.{type(output).__name__}"
        raise _NotPlainError(f"its head is a {kind}, or its weight is not here, or it has hooks")
    if any(getattr(each, "alora_invocation_tokens", None) for each in getattr(model, "peft_config", {}).values()):
        raise _NotPlainError("its adapters are switched on by tokens, which its body does not look for")
    if body is model or body is output or not isinstance(body, nn.Module):  # an encoder
        body = getattr(model, "base_model", model)
    names = {module: name for name, module in model.named_modules()}
    if body is model or body not in names:
        raise _NotPlainError("its body is no module of its own")
    rows = model.get_input_embeddings().weight
    batch = {
        "input_ids": torch.arange(6, device=rows.device).reshape(2, 3) % len(rows),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]], device=rows.device),
    }
    span = torch.linspace(-SPAN, SPAN, output.out_features, device=output.weight.device)
    seen: list[tuple[Tensor, Tensor]] = []

    def exchange(_: nn.Module, inputs: tuple[Tensor, ...], made: Tensor) -> Tensor:
        """Note what went into the head and came out of it, and send known logits on in its place."""
        seen.append((inputs[0], made))
        return span.to(made.dtype).expand_as(made).clone()

    with undisturbed(model):
        alone = run(body, batch).last_hidden_state
        handle = output.register_forward_hook(exchange)
        try:
            logits = run(model, batch).logits
        finally:
            handle.remove()
        if len(seen) != 1:
            raise _NotPlainError(f"its head ran {len(seen)} times for one batch")
        hidden, made = seen[0]
        known = [each for each in BETWEEN if all(name == GELU or name in names.values() for name in each)]
        found = [each for each in known if _off(hidden, _through(model, each, alone)) <= 1]
        if not found:
            raise _NotPlainError("what goes into its head is not what the body gives")
        if not _off(made, LMHead(output.weight, output.bias).logits(hidden)) <= 1:
            raise _NotPlainError("its head does more than an nn.Linear")
        scale, softcap, distance = _around_the_head(model.config, span.to(made.dtype), logits)
    if not distance <= 1:
        raise _NotPlainError("what it does with the logits is no factor and soft cap of its config")
    between = [model.get_submodule(name) for name in found[0] if name != GELU]
    used = {parameter for module in (body, *between, output) for parameter in module.parameters()}
    if any(parameter.requires_grad for parameter in {*model.parameters()} - used):
        raise _NotPlainError("it trains parameters beside body and head")
    return SplitModel(model, names[body], found[0], names[output], scale, softcap)


def _through(model: nn.Module, between: tuple[str, ...], states: Tensor) -> Tensor:
    """Hidden states as the head reads them."""
    for name in between:
        states = nn.functional.gelu(states) if name == GELU else model.get_submodule(name)(states)
    return states


def _around_the_head(config: Any, before: Tensor, after: Tensor) -> tuple[float, float | None, float]:
    """The factor and soft cap of a config that come closest to the model's logits, and how far off they are."""
    scales, softcaps = _numbers(config, SCALES), _numbers(config, SOFTCAPS)
    found = []
    for scale in (1.0, *scales, *(1 / scale for scale in scales)):
        for softcap in (None, *softcaps):
            head = LMHead(before.unsqueeze(-1), None, scale, softcap)
            found.append((scale, softcap, _off(after, head.logits(before.new_ones(1)).expand_as(after))))
    return min(found, key=lambda each: each[2])


def _numbers(config: Any, names: tuple[str, ...]) -> list[float]:
    """The positive numbers that a config, or the config of its text model, has under some names."""
    values = [getattr(each, name, None) for each in (config, config.get_text_config()) for name in names]
    return [value for value in values if isinstance(value, int | float) and value > 0]


def _is_plain(output: Any) -> TypeGuard[nn.Linear]:
    """Exactly an nn.Linear with a whole weight, and no hooks, which may make the weight or want to see the logits."""
    if type(output) is not nn.Linear or output._forward_hooks or output._forward_pre_hooks:
        return False
    weight = output.weight
    return type(weight) in (Tensor, nn.Parameter) and weight.ndim == 2 and weight.device.type != "meta"


def _off(found: Tensor, expected: Tensor) -> float:
    """How far apart two tensors are, in what counts as rounding of the coarser one; inf where shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    coarsest = max(torch.finfo(found.dtype).eps, torch.finfo(expected.dtype).eps)
    allowed = ROUNDINGS * coarsest * expected.abs().max().double()
    return float((found.double() - expected.double()).abs().max() / allowed.clamp_min(torch.finfo().tiny))


def run(module: nn.Module, batch: Mapping[str, Tensor]) -> Any:
    """A model, or its body, over a batch; token_type_ids are for those that know more than one type."""
    typed = getattr(getattr(module, "config", None), "type_vocab_size", 0) > 1
    given = {name: batch[name] for name in (INPUTS if typed else INPUTS[:2]) if name in batch}
    return module(**given, use_cache=False)


def inputs(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """What of a batch models read, on a device."""
    return {name: batch[name].to(device) for name in INPUTS if name in batch}


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode in the model's own precision, and everything as it was afterwards."""
    was_training = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device
    try:
        for module in was_training:
            module.training = False  # and not eval(), which adapters may take as a sign to merge
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            torch.autocast(device.type, enabled=False),
            torch.no_grad(),
        ):
            yield
    finally:
        for module, flag in was_training.items():
            module.training = flag
