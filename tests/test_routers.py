"""The balancing loss of mixtures of experts is that of transformers, without padding and prompts of other rows."""

from __future__ import annotations

import logging
import sys
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import families
from conftest import make_llama
from potstill.errors import ModelError, ShapeError
from potstill.losses.divergences import ForwardKL
from potstill.models.layer_map import LayerMap
from potstill.train.distiller import Distiller
from potstill.train.terms.logits import Labels, Logits
from potstill.train.terms.routers import RouterBalance, RouterMatch

FAMILIES = ["mixtral", "qwen3_moe", "olmoe", "gpt_oss", "qwen3_next", "granitemoe", "phimoe"]
ROWS = [[11, 23, 35, 47, 59, 71, 83], [20, 31, 42]]


def batch() -> dict[str, torch.Tensor]:
    mask = torch.tensor([[1] * 7, [1] * 3 + [0] * 4])
    return {"input_ids": torch.tensor([ROWS[0], [*ROWS[1], 0, 0, 0, 0]]), "attention_mask": mask}


def wanted(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss of transformers on the logits of its routers."""
    output = model(**inputs, output_router_logits=True)
    formula = sys.modules[type(model).__module__].load_balancing_loss_func
    loss = formula(output.router_logits, model.num_experts, model.num_experts_per_tok, inputs["attention_mask"])
    torch.testing.assert_close(loss, output.aux_loss)
    return loss


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_loss_of_transformers(family: str) -> None:
    student = families.model(family)
    output = Distiller(student, None, [RouterBalance(weight=0.5)]).eval().step(batch())
    expected = 0.5 * wanted(student, batch())
    torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(loss, router_weight(student)) for loss in (output.loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def router_weight(model: Any) -> torch.nn.Parameter:
    return next(p for name, p in model.named_parameters() if ("gate." in name or "router." in name) and p.ndim == 2)


def test_it_is_a_term_beside_others() -> None:
    student, teacher = families.model("mixtral"), families.model("mixtral", seed=1)
    output = Distiller(student, teacher, [Logits(ForwardKL()), RouterBalance(weight=3.0)]).step(batch())
    alone = Distiller(student, teacher, [Logits(ForwardKL())]).step(batch())
    torch.testing.assert_close(output.loss, alone.loss + 3 * wanted(student, batch()))


def test_students_without_a_balanced_router_are_refused() -> None:
    for student in (make_llama(), families.model("deepseek_v3"), families.model("deepseek_v2")):
        with pytest.raises(ShapeError, match=r"objective.1: RouterBalance: expected a student of a family"):
            Distiller(student, None, [Labels(), RouterBalance()])
    student = families.model("mixtral")
    for module in student.modules():
        if type(module).__name__ == "MixtralTopKRouter":
            module.__class__ = type("Other", (torch.nn.Module,), {"forward": type(module).forward})
    with pytest.raises(ModelError, match="expected routers that give their logits"):
        Distiller(student, None, [RouterBalance()])


def test_a_loss_that_is_left_out_is_noted(caplog: pytest.LogCaptureFixture) -> None:
    student = families.model("mixtral")
    student.config.output_router_logits = True
    with caplog.at_level(logging.WARNING):
        Distiller(student, None, [Labels(), RouterBalance()])
        assert not caplog.text
        Distiller(student, None, [Labels()])
    assert "balancing loss (output_router_logits) is left out" in caplog.text


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_the_choice_of_experts_is_matched(family: str) -> None:
    student, teacher = families.model(family), families.model(family, seed=1)
    pairs = [(1, 1)]
    inputs = batch()
    output = Distiller(student, teacher, [RouterMatch(LayerMap.explicit(pairs), weight=0.5)]).eval().step(inputs)
    attended, seen = inputs["attention_mask"].bool().flatten(), []
    for model in (student, teacher):
        router = model.get_submodule(f"model.layers.{pairs[0][0]}.mlp.{'router' if family == 'gpt_oss' else 'gate'}")
        with router.register_forward_hook(lambda _, args, output: seen.append(output)), torch.no_grad():
            model.eval()(**inputs)
    logits = [output[0] if isinstance(output, tuple) else output for output in seen]
    q, p = (x.reshape(14, -1)[attended].double().log_softmax(-1) for x in logits)
    torch.testing.assert_close(output.loss.double(), 0.5 * (p.exp() * (p - q)).sum(-1).mean(), rtol=1e-4, atol=1e-7)
    assert torch.autograd.grad(output.loss, router_weight(student), allow_unused=True)[0] is not None


def test_routers_that_cannot_be_matched_are_refused() -> None:
    student = families.model("mixtral")
    for teacher in (make_llama(), families.model("deepseek_v3")):  # transformers does not record DeepSeek's
        with pytest.raises(ModelError, match="expected routers that give their logits for each token, got none"):
            Distiller(student, teacher, [RouterMatch(LayerMap.explicit([(0, 0)]))])
    config = families.model("qwen3_moe").config
    config.mlp_only_layers = [0]
    partly = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ShapeError, match="expected layers with a router, got layer 0 of the student"):
        Distiller(partly, AutoModelForCausalLM.from_config(config), [RouterMatch()]).step(batch())
    config.mlp_only_layers, config.num_experts = [], config.num_experts + 1
    more = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ShapeError, match="expected as many experts in both, got"):
        Distiller(families.model("qwen3_moe"), more, [RouterMatch()]).step(batch())
    with pytest.raises(ShapeError, match="expected layers by their numbers, got embeddings"):
        Distiller(student, families.model("mixtral"), [RouterMatch(LayerMap.explicit([("embeddings", "embeddings")]))])
