"""Small configs of every model family in transformers."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, set_seed
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from potstill.losses.alignment import Task

CLASSES: dict[Task, dict[str, str]] = {  # task -> family -> class
    "causal": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked": MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "classification": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "regression": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
}
LAYERS, HEADS, WIDTH, VOCABULARY = 2, 4, 32, 128

# Families that are not walked.
NOT_SMALL = {
    "blt": "refused when it is loaded: transformers cannot generate text with it",
    "canine": "refused when it is loaded: it has no embedding for each token",
    "gemma3n": "needs timm",
    "gemma4_assistant": "drafts for another model",
    "gemma4_unified_assistant": "drafts for another model",
    "layoutlmv2": "needs detectron2",
    "musicgen": "makes audio",
    "musicgen_melody": "makes audio",
    "perceiver": "refused when it is loaded: it has no embedding for each token",
    "t5gemma": "transformers cannot run its classifier without a cache",
    "t5gemma2": "transformers cannot run its classifier without a cache",
}

# Values of small configs, by the name of the key; a key that a family does not have is skipped.
SMALL: dict[str, Any] = {
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), LAYERS
    ),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), HEADS),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "num_decoder_attention_heads"), HEADS),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size", "emb_dim", "dim_model"), WIDTH),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner", "dff", "dim_ff"), 64
    ),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "mlp_intermediate_size"), 32),
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts_total"), 4
    ),
    **dict.fromkeys(("num_experts_per_tok", "moe_top_k", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"), 128),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("index_head_dim", "index_n_heads", "index_topk", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_d_head", "mamba_d_state", "linear_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "n_mamba_heads", "mamba_headdim"), 8),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "num_shared_experts", "n_shared_experts"), 1),
    "linear_num_heads": 4,
    "vocab_size_per_layer_input": VOCABULARY,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def walked(task: Task) -> list[str]:
    """List the families of a task that have a small config."""
    return sorted({*CLASSES[task]} - {*NOT_SMALL})


def small(family: str) -> PretrainedConfig:
    """Make a small config of a family."""
    return _small(CONFIG_MAPPING[family], OWN.get(family, {}))


def _small(cls: Any, own: dict[str, Any]) -> Any:
    values = cls().to_dict()
    parts = getattr(cls, "sub_configs", None) or {}
    changed = {key: value for key, value in SMALL.items() if key in values}
    for key, sub in parts.items():
        if isinstance(values.get(key), dict):
            kind = CONFIG_MAPPING[values[key]["model_type"]] if values[key].get("model_type") in CONFIG_MAPPING else sub
            changed[key] = _small(kind, own.get(key, {})).to_dict()
    if "kv_lora_rank" in values:
        changed["num_key_value_heads"] = HEADS  # latent attention has a key for each head
    return cls(**changed | {key: value for key, value in own.items() if key not in parts})


# What a family needs besides.
HYBRID = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
QWEN4 = {
    "layer_types": ["linear_attention", "indexed_attention"],
    "hc_lowrank": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "ngram_vocab_size_base": 64,
    "ple_embed_dim": 8,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 1,
}
OWN: dict[str, dict[str, Any]] = {
    "bailing_hybrid": HYBRID,
    "qwen3_next": HYBRID,
    "qwen3_5_text": HYBRID,
    "qwen3_5": {"text_config": HYBRID},
    "qwen3_5_moe_text": HYBRID,
    "qwen3_5_moe": {"text_config": HYBRID},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": WIDTH},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "reformer": {"is_decoder": True, "attn_layers": ["local", "local"], "axial_pos_embds": False},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "kimi_linear": HYBRID | {"num_experts_per_token": 2},
    "xmod": {"default_language": "en_XX"},
    "roc_bert": {
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
        "pronunciation_vocab_size": 8,
        "shape_vocab_size": 8,
    },
    "longcat_flash": {"ffn_hidden_size": 64, "expert_ffn_hidden_size": 32, "moe_topk": 2, "zero_expert_num": 2},
    "qwen4_exp_text": QWEN4,
    "qwen4_exp": {"text_config": QWEN4},
    "dots3_note_text": {"per_layer_config": None},
    "dots3_note": {
        "text_config": {"per_layer_config": {}, "layer_types": ["indexed_attention"] * LAYERS},
        "vision_config": {
            "per_layer_config": {},
            "mlp_layer_types": ["dense"] * LAYERS,
            "adapter_in_dim": WIDTH,
            "adapter_out_dim": WIDTH,
        },
        "audio_config": {"adapter_input_size": WIDTH, "adapter_out_dim": WIDTH},
    },
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "num_blocks": LAYERS},  # heads of multiples of 16
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "intermediate_size": 64,
        "activation_sparsity_pattern": [0.0, 0.0],
        "laurel_rank": 8,
    },
    "zamba": {
        "num_hidden_layers": 5,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid", "linear_attention"],
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "zaya": {"num_experts_per_tok": 1},
    "cohere_compass_text": {
        "layer_types": ["full_attention", "sliding_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")
        },
    },
    "emu3": {
        "vocabulary_map": {"<image>": 125, "<|extra_200|>": 126, "<|visual token 000000|>": 127},
        "vq_config": {"base_channels": 32, "channel_multiplier": [1, 1], "codebook_size": 8},
    },
    "mistral4": {"head_dim": 16},
    "t5": {"decoder_start_token_id": 0},
    "umt5": {"decoder_start_token_id": 0},
    "lilt": {"hidden_size": 48},
    "layoutlmv3": {"coordinate_size": 4, "shape_size": 8},
    "esmc": {"num_key_value_heads": HEADS},
    "neomme": {"head_dim": 16},
    "distilbert": {"dim": WIDTH, "hidden_dim": 64},
    "luke": {"entity_vocab_size": 16, "entity_emb_size": WIDTH},
    "funnel": {"block_sizes": [LAYERS, LAYERS], "d_head": 8, "d_inner": 64},
    "perceiver": {"d_latents": WIDTH, "num_latents": 8, "qk_channels": WIDTH, "v_channels": WIDTH},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"hidden_size": WIDTH, "ffn_hidden_size": 32},
    },
    "phi4_multimodal": {
        "vision_config": {"image_size": 28, "crop_size": 28, "image_token_id": 126},
        "audio_config": {
            "hidden_size": WIDTH,
            "ext_pw_out_channel": WIDTH,
            "depthwise_separable_out_channel": WIDTH,
            "nemo_conv_channels": 8,
            "nemo_final_size": 2,
            "num_blocks": 1,
            "input_size": 16,
            "audio_token_id": 127,
        },
    },
}


def model(family: str, auto: Any = AutoModelForCausalLM, seed: int = 0, **fields: Any) -> Any:
    """Make a model of a family with random weights."""
    set_seed(seed)
    config = small(family)
    for name, value in fields.items():
        setattr(config, name, value)
    return auto.from_config(config, dtype=torch.float32).eval()
