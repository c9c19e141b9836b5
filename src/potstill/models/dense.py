"""Dense families beside those with experts: a design that names one has one network in place of a layer's experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from potstill.errors import ModelError
from potstill.models.shapes import count_experts, experts_per_token, ffn_widths, head_size

# By family with experts, the dense ones whose layers are the same but for the experts.
DENSE_FAMILIES = {
    "ernie4_5_moe": ("ernie4_5",),
    "hunyuan_v1_moe": ("hunyuan_v1_dense",),
    "mixtral": ("mistral", "llama"),
    "qwen2_moe": ("qwen2",),
    "qwen3_5_moe_text": ("qwen3_5_text",),
    "qwen3_moe": ("qwen3",),
}


def dense_config(teacher: PretrainedConfig, family: Any, changes: Mapping[str, Any]) -> PretrainedConfig:
    """Return a config of a dense family with the teacher's other sizes.

    Its feed-forward networks are as wide as all experts that a token passes through together, the shared one included,
    unless `changes` has their width.
    """
    families = DENSE_FAMILIES.get(teacher.model_type, ())
    if family not in families:
        known = f"{', '.join(families)} or {teacher.model_type}" if families else teacher.model_type
        hint = "Leave model_type out"
        if not families and count_experts(teacher):
            hint += f", and ask for one expert: {_one_expert(teacher)}"
        raise ModelError(
            f"student.design.model_type: expected {known} for a teacher of {teacher.model_type}, got {family}. {hint}."
        )
    if any("For" in name and "CausalLM" not in name for name in teacher.architectures or ()):
        raise ModelError(
            f"student.design.model_type: expected a teacher that predicts tokens for {family}, got "
            f"{teacher.architectures[0]}. Leave model_type out."  # type: ignore[index]
        )
    values: dict[str, Any] = teacher.to_dict()
    cls: Any = CONFIG_MAPPING[family]
    own = cls().to_dict().keys() - {"model_type", "architectures", "transformers_version"}
    fields = {name: values[name] for name in own & values.keys()}
    fields |= {"head_dim": head_size(teacher)} if "head_dim" in own else {}  # which some families do not save
    if "intermediate_size" not in changes:
        fields["intermediate_size"] = active_width(teacher)
    config: PretrainedConfig = cls.from_dict(fields)
    return config


def active_width(config: PretrainedConfig) -> int:
    """Return the width of all experts together that a token passes through, the shared ones included."""
    widths = ffn_widths(config)
    of_expert = next(iter(widths.values()))
    shared = next((width for name, width in widths.items() if "shared" in name), 0)
    counts = (
        getattr(config, name, None) for name in ("n_shared_experts", "moe_num_shared_experts", "num_shared_expert")
    )
    number = next((count for count in counts if isinstance(count, int)), 0)
    return experts_per_token(config) * of_expert + (shared or number * of_expert)


def _one_expert(config: PretrainedConfig) -> str:
    """The fields of a design with one expert."""
    known = config.to_dict()
    names = [
        next((name for name in names if name in known), names[0])
        for names in (("num_experts", "num_local_experts", "n_routed_experts"), ("num_experts_per_tok", "moe_top_k"))
    ]
    return ", ".join(f"{name}: 1" for name in names)
