"""Norms and embedding scales of students that have fewer hidden channels than their teacher."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import make_batch
from potstill.models.design import student_config
from potstill.models.initialize import plan_initialization
from potstill.models.norms import NormKind, norm_kind
from potstill.models.structure import find_structure

HIDDEN, KEPT = 32, 20
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")


def teacher_of(family: str, tied: bool = True) -> Any:
    """A small model with random norms and biases."""
    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 60, "max_position_embeddings": 64}
    if family == "gpt2":
        sizes = {"n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_inner": 48, "vocab_size": 60, "n_positions": 64}
        sizes |= {"bos_token_id": 0, "eos_token_id": 0}
    config = AutoConfig.for_model(family, **sizes, tie_word_embeddings=tied, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.5 if parameter.ndim == 1 else 0.0, 0.3)
    return model.eval()


def kill_channels(model: Any) -> list[int]:
    """Make hidden channels that are zero for all tokens; return the others."""
    structure, dead = find_structure(model), torch.arange(0, HIDDEN, 2)[: HIDDEN - KEPT]
    with torch.no_grad():
        model.get_input_embeddings().weight[:, dead] = 0
        for layer in structure.layers:
            for name in (structure.matrices.output, structure.matrices.down):
                layer.get_submodule(name).weight[dead] = 0
    return sorted({*range(HIDDEN)} - {*dead.tolist()})


def pruned(teacher: Any, **changes: Any) -> Any:
    config = student_config(teacher.config, changes, teacher.config.vocab_size)
    options: dict[str, Any] = {"layers": "uniform", "calibration": lambda: [make_batch(vocab_size=60)]}
    return plan_initialization(teacher, config, "prune", **options)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_dead_channels_go_without_change(family: str, tied: bool) -> None:
    teacher = teacher_of(family, tied)
    alive = kill_channels(teacher)
    plan = pruned(teacher, hidden_size=KEPT, head_dim=8)
    assert plan.parts.channels.tolist() == alive
    student = plan.student(teacher, 0).eval()
    batch = make_batch(seed=3, vocab_size=60)
    with torch.no_grad():
        expected, actual = (model(batch["input_ids"]).logits for model in (teacher, student))
    assert torch.allclose(actual, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_what_layers_read_keeps_its_size() -> None:
    teacher = teacher_of("gpt2")
    plan = pruned(teacher, n_embd=24, n_head=3)
    student, channels, batch = plan.student(teacher, 0).eval(), plan.parts.channels, make_batch(vocab_size=60)
    read: list[Any] = []
    norm = teacher.transformer.h[1].ln_2
    norm.register_forward_pre_hook(lambda _, args: read.append(args[0].double()))
    with torch.no_grad():
        teacher(**batch)
    kept = read[0][..., channels]
    ratio = (kept.var(-1, correction=0) / read[0].var(-1, correction=0)).sqrt()[batch["attention_mask"].bool()].mean()
    weight = student.transformer.h[1].ln_2.weight.double()
    assert torch.allclose(weight, norm.weight[channels].double() * ratio, rtol=1e-5)
    assert torch.equal(student.transformer.h[1].ln_2.bias, norm.bias[channels])


def test_norms_are_recognised_by_what_they_compute() -> None:
    class Scale(nn.Module):
        def __init__(self, offset: float) -> None:
            super().__init__()
            self.weight, self.offset = nn.Parameter(torch.randn(8)), offset

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * x.square().mean(-1, keepdim=True).rsqrt() * (self.weight + self.offset)

    layer = nn.LayerNorm(8)
    nn.init.normal_(layer.bias)
    nn.init.normal_(layer.weight)
    assert norm_kind(layer) == NormKind(0.0, True)
    assert norm_kind(nn.RMSNorm(8)) == NormKind(0.0, False)
    assert [norm_kind(Scale(offset)) for offset in (0.0, 1.0)] == [NormKind(0.0, False), NormKind(1.0, False)]
    assert norm_kind(nn.PReLU(8)) is None
