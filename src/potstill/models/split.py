"""Split a language model into body and head, verified on a few tokens: where they differ, it gives full logits."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from potstill.losses.alignment import Alignment
from potstill.losses.targets import DenseTargets, HeadTargets, LMHead
from potstill.losses.token_losses import on_float64_device
from potstill.losses.torch_compile import disable_compile
from potstill.models.packing import PACKED_LENGTH, packed

logger = logging.getLogger(__name__)

# Config fields with a factor on the logits. Granite divides by the name that HyperCLOVA X multiplies with, so the probe
# tries both.
SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
SPAN = 60.0  # the probe's logits are in [-SPAN, SPAN]: large enough to bend under every soft cap
INPUTS = ("input_ids", "attention_mask", "token_type_ids")  # the part of a batch that models read
# Token-wise submodules between body and head, in order; the probe finds which of them a model has.
GELU = "gelu"  # a function, not a submodule
BETWEEN = (
    (),  # causal language models
    ("cls.predictions.transform",),  # BERT, DeBERTa
    ("vocab_transform", "activation", "vocab_layer_norm"),  # DistilBERT
    ("lm_head.dense", GELU, "lm_head.layer_norm"),  # RoBERTa, XLM-RoBERTa, CamemBERT
    ("head",),  # ModernBERT
    ("generator_predictions",),  # ELECTRA
    ("predictions.dense", "predictions.activation", "predictions.LayerNorm"),  # ALBERT
)
ROUNDING_ULPS = 8  # differences up to so many units in the last place of the largest number are rounding


@dataclass(frozen=True)
class SplitModel:
    """A model that `split_model` has verified to be a body and a plain head.

    Body and head are looked up by name each time, because wrappers (FSDP, activation checkpointing) replace them.
    """

    model: nn.Module
    body: str  # path of the submodule that gives the last hidden states
    between: tuple[str, ...]  # what is applied to them before the head; see `BETWEEN`
    output: str  # path of the nn.Linear behind it
    logit_scale: float  # see `LMHead`
    softcap: float | None

    def head(self) -> LMHead | None:
        """The head with its present weight; None where it is replaced, under an adapter or sharded on its own."""
        output = self.model.get_submodule(self.output)
        return LMHead(output.weight, output.bias, self.logit_scale, self.softcap) if _is_plain(output) else None

    def hidden(self, batch: Mapping[str, Tensor], alignment: Alignment) -> Tensor:
        """The head's input at the target positions: [N, H]."""
        states: Tensor = run(self.model.get_submodule(self.body), batch).last_hidden_state
        return _through(self.model, self.between, alignment.select(states))


def forward_targets(
    model: nn.Module, split: SplitModel | None, batch: Mapping[str, Tensor], alignment: Alignment
) -> HeadTargets | DenseTargets:
    """Run a model and return its output at the N target positions: hidden states and head if it is split, else logits.

    A model without a head gives logits [N, 0]. The batch is read in packed rows where it says how long they are.
    """
    batch, alignment = packed(batch, alignment, flat=flattens(model))
    head = None if split is None else split.head()
    if split is None or head is None:
        output = run(model, batch)
        logits = getattr(output, "logits", None)
        if logits is None:
            return DenseTargets(output.last_hidden_state.new_zeros(len(alignment), 0))
        # Prompt tuning puts virtual tokens in front: the batch's are the last. Class logits are by row, [B, V].
        logits = logits.unsqueeze(1) if logits.ndim == 2 else logits[:, -batch["input_ids"].shape[1] :]
        return DenseTargets(alignment.select(logits))
    return HeadTargets(split.hidden(batch, alignment).to(head.weight.dtype), head)


@disable_compile  # it runs once, outside of any step
def split_model(model: nn.Module) -> SplitModel | None:
    """Split a model before its head; None where the head is not plain, so that full logits are needed.

    Plain is exactly nn.Linear, followed by at most a factor and a soft cap. A wrapped, hooked or quantized head is not,
    nor is a model with an unknown module between body and head, one that trains parameters beside them, one that is
    compiled by itself (the compiled code would not be run), or one on the meta device.
    """
    try:
        return _verified_split(model)
    except _NotPlainError as reason:
        logger.info("%s gives full logits: %s.", type(model).__name__, reason)
    except Exception as error:  # an unknown architecture that fails here may work without the split
        logger.warning("%s gives full logits: the probe of its head failed with %r.", type(model).__name__, error)
    return None


class _NotPlainError(Exception):
    """Why a model is not split."""


def _verified_split(model: Any) -> SplitModel:
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise _NotPlainError("it is compiled by itself; compile the Distiller instead")
    if not hasattr(model, "get_decoder") or not hasattr(model, "get_output_embeddings"):
        raise _NotPlainError("it is not a language model of transformers")
    body, output = model.get_decoder(), model.get_output_embeddings()
    if not _is_plain(output):
        kind = f"{type(output).__module__}.{type(output).__name__}"
        raise _NotPlainError(f"its head is a {kind}, has hooks, or has no weight on this rank")
    if any(getattr(config, "alora_invocation_tokens", None) for config in getattr(model, "peft_config", {}).values()):
        raise _NotPlainError("its adapters are switched on by tokens, which its body does not look for")
    if body is model or body is output or not isinstance(body, nn.Module):  # an encoder
        body = getattr(model, "base_model", model)
    names = {module: name for name, module in model.named_modules()}
    if body is model or body not in names:
        raise _NotPlainError("its body is not a submodule")
    batch = probe_batch(model)
    span = torch.linspace(-SPAN, SPAN, output.out_features, device=output.weight.device)
    calls: list[tuple[Tensor, Tensor]] = []

    def replace_logits(_: nn.Module, inputs: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        """Record the head's input and output, and return known logits in its place."""
        calls.append((inputs[0], logits))
        return span.to(logits.dtype).expand_as(logits).clone()

    with undisturbed(model):
        states = run(body, batch).last_hidden_state
        with output.register_forward_hook(replace_logits):
            final_logits = run(model, batch).logits
        if len(calls) != 1:
            raise _NotPlainError(f"its head ran {len(calls)} times for one batch")
        hidden, logits = calls[0]
        present = [path for path in BETWEEN if all(name == GELU or name in names.values() for name in path)]
        between = next((path for path in present if _error(hidden, _through(model, path, states)) <= 1), None)
        if between is None:
            raise _NotPlainError("its head does not read the output of the body")
        if not _error(logits, LMHead(output.weight, output.bias).logits(hidden)) <= 1:
            raise _NotPlainError("its head does more than an nn.Linear")
        scale, softcap, error = _scale_and_softcap(model.config, span.to(logits.dtype), final_logits)
    if not error <= 1:
        raise _NotPlainError("its logits are changed by more than a factor and soft cap of its config")
    modules = [body, output, *(model.get_submodule(name) for name in between if name != GELU)]
    used = {parameter for module in modules for parameter in module.parameters()}
    beside = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter not in used]
    if beside and _take_part(model, batch, beside):
        raise _NotPlainError("it trains parameters beside body and head")
    return SplitModel(model, names[body], between, names[output], scale, softcap)


def _take_part(model: nn.Module, batch: Mapping[str, Tensor], parameters: list[nn.Parameter]) -> bool:
    """Whether the logits of text depend on any of these parameters; those of a vision tower do not."""
    with undisturbed(model), torch.enable_grad():
        gradients = torch.autograd.grad(run(model, batch).logits.sum(), parameters, allow_unused=True)
    return any(gradient is not None for gradient in gradients)


def _through(model: nn.Module, between: tuple[str, ...], states: Tensor) -> Tensor:
    for name in between:
        states = nn.functional.gelu(states) if name == GELU else model.get_submodule(name)(states)
    return states


def _scale_and_softcap(config: Any, before: Tensor, after: Tensor) -> tuple[float, float | None, float]:
    """The factor and soft cap of a config that come closest to the model's logits, and their error."""
    scales, softcaps = _positive(config, SCALES), _positive(config, SOFTCAPS)
    candidates = []
    for scale, softcap in product((1.0, *scales, *(1 / scale for scale in scales)), (None, *softcaps)):
        logits = LMHead(before.unsqueeze(-1), None, scale, softcap).logits(before.new_ones(1))
        candidates.append((scale, softcap, _error(after, logits.expand_as(after))))
    return min(candidates, key=lambda candidate: candidate[2])


def _positive(config: Any, names: tuple[str, ...]) -> list[float]:
    values = [getattr(x, name, None) for x in (config, config.get_text_config()) for name in names]
    return [value for value in values if isinstance(value, int | float) and value > 0]


def _is_plain(output: Any) -> TypeGuard[nn.Linear]:
    """Whether a head is exactly an nn.Linear with its full weight and without hooks."""
    if type(output) is not nn.Linear or output._forward_hooks or output._forward_pre_hooks:
        return False
    weight = output.weight
    return type(weight) in (Tensor, nn.Parameter) and weight.ndim == 2 and weight.device.type != "meta"


def _error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference in units of the rounding allowed for the coarser dtype; inf where shapes differ."""
    if actual.shape != expected.shape:
        return float("inf")
    eps = max(torch.finfo(actual.dtype).eps, torch.finfo(expected.dtype).eps)
    actual, expected = on_float64_device(actual), on_float64_device(expected)
    allowed = ROUNDING_ULPS * eps * expected.abs().max().double()
    return float((actual.double() - expected.double()).abs().max() / allowed.clamp_min(torch.finfo().tiny))


def probe_batch(model: Any) -> dict[str, Tensor]:
    """A batch of two rows of three tokens, the last of which is padding."""
    embeddings = model.get_input_embeddings().weight
    return {
        "input_ids": torch.arange(6, device=embeddings.device).reshape(2, 3) % len(embeddings),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]], device=embeddings.device),
    }


def run(module: nn.Module, batch: Mapping[str, Tensor]) -> Any:
    """Run a model or its body on a batch, with token_type_ids only where it has more than one type."""
    read = INPUTS if reads_token_types(module) else INPUTS[:2]
    names = (*read, "position_ids")  # which packed rows alone have
    return module(**{name: batch[name] for name in names if name in batch}, use_cache=False)


def reads_token_types(module: nn.Module) -> bool:
    """Whether a model has embeddings for several types of tokens."""
    return bool(getattr(getattr(module, "config", None), "type_vocab_size", 0) > 1)


def flattens(module: nn.Module) -> bool:
    """Whether a model's attention reads one packed row alone: FlashAttention, whatever its length."""
    return "flash" in str(getattr(getattr(module, "config", None), "_attn_implementation", ""))


def inputs(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Move the part of a batch that models read to a device."""
    return {name: batch[name].to(device) for name in (*INPUTS, PACKED_LENGTH) if name in batch}


@contextmanager
def evaluation_mode(*models: nn.Module) -> Iterator[None]:
    """Put models into evaluation mode, and restore the training flag of every submodule."""
    was_training = {module: module.training for model in models for module in model.modules()}
    try:
        for module in was_training:
            module.training = False  # eval() may be overridden: adapters may merge
        yield
    finally:
        for module, flag in was_training.items():
            module.training = flag


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run a model in evaluation mode and its own precision, without gradients; restore flags and random state."""
    device = next(model.parameters()).device
    with (
        evaluation_mode(model),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.autocast(device.type, enabled=False),
        torch.no_grad(),
    ):
        yield
