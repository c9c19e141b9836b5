"""How the families of transformers are called, shaped and limited in GGUF files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from potstill.errors import ModelError
from potstill.models.shapes import head_size, kv_heads


@dataclass(frozen=True)
class GgufFamily:
    """A family that llama.cpp computes as transformers does, and what differs in its weights there."""

    arch: str
    activation: str
    interleaved: bool = False  # rows of queries and keys: pairs of one rotation beside each other
    offset_norms: bool = False  # norms that multiply by 1 + weight
    transposed: bool = False  # weights of Conv1D layers
    windows: bool = False  # layers with sliding windows between those with full attention
    rope_tensors: bool = False  # rotary frequencies may be divided by a tensor
    partial_rotary: bool = False  # a part of each head may be rotated; others ignore partial_rotary_factor
    biases: bool = False  # matrices may have biases
    full_width: bool = False  # all heads together are as wide as the hidden states


FAMILIES: Mapping[str, GgufFamily] = {
    "llama": GgufFamily("llama", "silu", interleaved=True, rope_tensors=True, biases=True),
    "mistral": GgufFamily("llama", "silu", interleaved=True, rope_tensors=True, biases=True),
    "qwen2": GgufFamily("qwen2", "silu", full_width=True, biases=True),
    "qwen3": GgufFamily("qwen3", "silu"),
    "phi3": GgufFamily("phi3", "silu", full_width=True, rope_tensors=True, partial_rotary=True),
    "gemma": GgufFamily("gemma", "gelu_pytorch_tanh", offset_norms=True),
    "gemma2": GgufFamily("gemma2", "gelu_pytorch_tanh", offset_norms=True, windows=True),
    "gemma3_text": GgufFamily("gemma3", "gelu_pytorch_tanh", offset_norms=True, windows=True),
    "gpt2": GgufFamily("gpt2", "gelu_new", transposed=True, biases=True),
}
_FREE_WIDTH = {"qwen2": FAMILIES["llama"]}  # what computes the same where the heads are not `full_width`
# llama.cpp's 27B models of Gemma, known by their depth, scale attention by the width of all heads.
_SCALED_BY_WIDTH = {"gemma2": 46, "gemma3": 62}
_YARN = {"beta_fast": 32, "beta_slow": 1, "truncate": True}  # as llama.cpp has it
_GPT2_SWITCHES = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}


def gguf_family(config: Any) -> GgufFamily:
    """Find the family of a config.

    Raises:
        ModelError: llama.cpp does not compute this model.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise _refusal(f"one of {', '.join(FAMILIES)}", config.model_type)
    field = "hidden_activation" if family.windows else "activation_function" if family.arch == "gpt2" else "hidden_act"
    activation = getattr(config, field)
    if activation != family.activation:
        raise _refusal(f"{config.model_type} with the activation {family.activation}", activation)
    width = config.num_attention_heads * head_size(config)
    if family.full_width and width != config.hidden_size and config.model_type in _FREE_WIDTH:
        return _FREE_WIDTH[config.model_type]
    if family.full_width and width != config.hidden_size:
        raise _refusal(
            f"{config.model_type} whose heads are together as wide as its hidden states, {config.hidden_size}", width
        )
    if family.arch == "gpt2" and (
        changed := [key for key, value in _GPT2_SWITCHES.items() if getattr(config, key) != value]
    ):
        raise _refusal(f"gpt2 without {', '.join(changed)}", "a model with it")
    if getattr(config, "use_bidirectional_attention", False):
        raise _refusal("a model with causal attention", "use_bidirectional_attention")
    return family


def _refusal(expected: str, got: Any, advice: str = "Export another student") -> ModelError:
    return ModelError(f"export: expected for GGUF {expected}, got {got}. {advice}.")


def write_parameters(writer: Any, config: Any, family: GgufFamily) -> None:
    """Write the sizes of a model and its rotary embeddings."""
    writer.add_context_length(context_length(config, family))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(
        getattr(config, "intermediate_size", None) or config.n_inner or 4 * config.hidden_size
    )
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(kv_heads(config))
    writer.add_vocab_size(config.vocab_size)
    if family.arch == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    if family.windows:  # others ignore the caps
        if cap := config.attn_logit_softcapping:
            writer.add_attn_logit_softcapping(cap)
        if cap := config.final_logit_softcapping:
            writer.add_final_logit_softcapping(cap)
        elif family.arch == "gemma2":
            raise _refusal("gemma2 with final_logit_softcapping", "none")
        writer.add_sliding_window(config.sliding_window)
        writer.add_uint32(f"{family.arch}.attention.sliding_window_pattern", _window_period(config))
    _write_rope(writer, config, family)


def context_length(config: Any, family: GgufFamily) -> int:
    """The tokens that llama.cpp may read: where it knows no sliding window, as many as fit into it."""
    window = None if family.windows else getattr(config, "sliding_window", None)
    return min(config.max_position_embeddings, window or config.max_position_embeddings)


def _window_period(config: Any) -> int:
    """The period P of layers with sliding windows, where each P-th has full attention; 0 for windows in all."""
    windows = [kind == "sliding_attention" for kind in config.layer_types]
    for period in range(len(windows) + 1):
        if windows == [period == 0 or layer % period < period - 1 for layer in range(len(windows))]:
            return period
    raise _refusal(
        f"{config.model_type} with full attention in each n-th layer",
        f"layer_types {config.layer_types}",
        "Choose the layers of the student so that sliding and full attention alternate evenly",
    )


def _write_rope(writer: Any, config: Any, family: GgufFamily) -> None:
    rope = config.rope_parameters
    full = rope.get("full_attention", rope)
    writer.add_rope_dimension_count(_rotary_width(config, family))
    writer.add_rope_freq_base(full["rope_theta"])
    if family.windows:
        sliding = rope.get("sliding_attention", full)
        if sliding.get("rope_type", "default") != "default":
            raise _refusal("rotary embeddings without scaling in sliding windows", sliding["rope_type"])
        writer.add_float32(f"{family.arch}.rope.freq_base_swa", sliding["rope_theta"])
    kind, factor = full.get("rope_type", "default"), full.get("factor")
    scalings = ("default", "linear", "yarn", *(("longrope", "llama3") if family.rope_tensors else ()))
    if kind not in scalings:
        raise _refusal(f"rotary embeddings of the type {', '.join(scalings)} in {family.arch}", kind)
    if kind == "linear":
        writer.add_rope_scaling_type(_scaling("linear"))
        writer.add_rope_scaling_factor(factor)
    elif kind == "yarn":
        if changed := [key for key, value in _YARN.items() if full.get(key) not in (None, value)]:
            raise _refusal(f"yarn with {changed[0]} {_YARN[changed[0]]}", full[changed[0]])
        layer_type = "full_attention" if full is not rope else None
        _, attention = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"), layer_type=layer_type)
        attention /= 1 + 0.1 * math.log(factor)  # llama.cpp multiplies its own factor by this one, in windows too
        if family.windows and not math.isclose(attention, 1):
            raise _refusal("yarn with its own attention_factor beside sliding windows", "another one")
        writer.add_rope_scaling_attn_factors(attention)
        writer.add_rope_scaling_type(_scaling("yarn"))
        writer.add_rope_scaling_factor(factor)
        writer.add_rope_scaling_orig_ctx_len(
            full.get("original_max_position_embeddings") or config.max_position_embeddings
        )
    elif kind == "longrope":
        original = full["original_max_position_embeddings"]
        stretch = full.get("factor") or config.max_position_embeddings / original
        attention = full.get("attention_factor") or math.sqrt(1 + math.log(max(stretch, 1)) / math.log(original))
        writer.add_rope_scaling_type(_scaling("longrope"))
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(attention)


def _scaling(name: str) -> Any:
    from gguf import RopeScalingType

    return RopeScalingType(name)


def _rotary_width(config: Any, family: GgufFamily) -> int:
    rope = config.rope_parameters
    share = rope.get("full_attention", rope).get("partial_rotary_factor") if family.partial_rotary else None
    return int(head_size(config) * (share or 1.0))


def rope_tensors(config: Any, family: GgufFamily) -> dict[str, Tensor]:
    """Make the tensors of a model's scaled rotary frequencies: what each is divided by."""
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    if rope.get("rope_type") == "longrope":
        return {f"rope_factors_{name}.weight": torch.tensor(rope[f"{name}_factor"]) for name in ("long", "short")}
    if rope.get("rope_type") != "llama3":
        return {}
    width = _rotary_width(config, family)
    frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, width, 2) / width)
    # Between the two wavelengths the factor goes from 1 to `factor`.
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return {"rope_freqs.weight": 1 / ((1 - smooth) / rope["factor"] + smooth)}


def gguf_weight(name: str, weight: Tensor, config: Any, family: GgufFamily) -> Tensor:
    """Change a weight of transformers into that of llama.cpp, in float32."""
    weight = gguf_rows(name, weight.float(), config, family)
    if is_transposed(name, family):
        weight = weight.T
    if family.offset_norms and name.endswith("norm.weight"):
        weight = weight + 1
    return weight * weight_scale(name, config, family)


def gguf_rows(name: str, weight: Tensor, config: Any, family: GgufFamily) -> Tensor:
    """Order the rows of a weight, one for each output, as llama.cpp has them."""
    if not family.interleaved or not (".q_proj." in name or ".k_proj." in name):
        return weight
    heads = config.num_attention_heads if ".q_proj." in name else kv_heads(config)
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def is_transposed(name: str, family: GgufFamily) -> bool:
    """Whether a file has the transposed weight."""
    return family.transposed and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def weight_scale(name: str, config: Any, family: GgufFamily) -> float:
    """How many times larger a file has a weight: that of queries, as llama.cpp divides by another number's root."""
    divisor = getattr(config, "query_pre_attn_scalar", None) if family.windows else None
    if divisor is None or not name.endswith("q_norm.weight" if family.arch == "gemma3" else ".q_proj.weight"):
        return 1.0
    wide = config.num_hidden_layers == _SCALED_BY_WIDTH.get(family.arch)
    return math.sqrt((config.hidden_size // config.num_attention_heads if wide else head_size(config)) / divisor)
