"""Captured activations equal the model's own outputs, in every architecture, and nothing else is kept."""

from __future__ import annotations

import importlib
import logging
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, BertConfig, BertForMaskedLM

import families
from conftest import make_batch, make_llama
from potstill.errors import ModelError
from potstill.models.capture import ActivationCapture, ActivationRequest, Activations
from potstill.models.layer_map import STATES
from potstill.models.split import run

SIZES = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 1,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 4}
OLD = {"vocab_size": 300, "initializer_range": 0.2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, grouped queries": ("llama", GROUPED),
    "gemma2": ("gemma2", {**GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8}),
    "qwen3": ("qwen3", GROUPED),
    "phi3, fused and grouped": ("phi3", GROUPED),
    "opt": ("opt", {**SIZES, "ffn_dim": 32, "word_embed_proj_dim": 16}),
    "gpt2, fused": ("gpt2", {**OLD, "n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 64}),
    "gpt_neox, by head": ("gpt_neox", SIZES),
    "bloom, by head": ("bloom", {**OLD, "hidden_size": 16, "n_layer": 3, "n_head": 4}),
    "falcon, by group": ("falcon", {**SIZES, "num_kv_heads": 2, "new_decoder_architecture": True}),
    "falcon, one key": ("falcon", {**SIZES, "multi_query": True, "new_decoder_architecture": False}),
    "mpt, fused": ("mpt", {**OLD, "d_model": 16, "n_layers": 3, "n_heads": 4}),
    "bert": ("bert", SIZES),
    "distilbert": ("distilbert", {"vocab_size": 300, "dim": 16, "n_layers": 3, "n_heads": 4, "hidden_dim": 32}),
    "modernbert, fused": ("modernbert", {**SIZES, "cls_token_id": 0, "sep_token_id": 0}),
}
EVERYTHING = ActivationRequest(frozenset({0, 2, *STATES}), frozenset({1}), frozenset({1}))
NO_MAPS = replace(EVERYTHING, attentions=frozenset())


def build(family: str) -> Any:
    kind, sizes = FAMILIES[family]
    config = AutoConfig.for_model(kind, **sizes)
    return (AutoModel if "bert" in kind else AutoModelForCausalLM).from_config(config).eval()


def captured(model: Any, needs: ActivationRequest = EVERYTHING, **batch: Any) -> Activations:
    capture = ActivationCapture(model)
    capture.prepare(needs)
    return capture.capture(needs, partial(run, model, batch or make_batch()))[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_captured_activations_are_the_models_own_outputs(family: str) -> None:
    model, batch = build(family), make_batch()
    needs = NO_MAPS if "falcon" in family else EVERYTHING
    inside = captured(model, needs)
    assert not any(module._forward_hooks for module in model.modules())
    output = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True,
        output_attentions=bool(needs.attentions),
    )  # fmt: skip
    assert set(inside.hidden) == {0, 2, *STATES}
    assert set(inside.vectors) == {1}
    there = batch["attention_mask"].bool()
    for layer, place in {"embeddings": 0, 0: 1, "last_hidden_state": -1}.items():
        torch.testing.assert_close(inside.hidden[layer][there], output.hidden_states[place][there])
    if needs.attentions:
        torch.testing.assert_close(inside.attentions[1], output.attentions[1])


@pytest.mark.parametrize("family", [family for family in FAMILIES if family.split(",")[0] not in ("bloom", "mpt")])
def test_queries_keys_and_values_are_what_attention_works_with(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = build(family), make_batch()
    module = importlib.import_module(type(model).__module__)
    if hasattr(module, "apply_rotary_pos_emb"):  # turned vectors would not be those of the projections
        monkeypatch.setattr(module, "apply_rotary_pos_emb", lambda q, k, *_, **__: (q, k))
    for each in model.modules():
        for norm in ("q_norm", "k_norm"):
            if hasattr(each, norm):
                setattr(each, norm, nn.Identity())
    last = {"o_proj", "dense", "out_proj", "c_proj", "Wo", "out_lin"}
    whole = ActivationCapture(model).layer(1)
    behind = next(each for name, each in whole.named_modules() if name.rpartition(".")[2] in last)
    mixed: list[torch.Tensor] = []
    behind.register_forward_pre_hook(lambda _, args: mixed.append(args[0]))
    vectors = captured(model, NO_MAPS).vectors[1]
    heads = model.config.num_attention_heads
    q, k, v = (each.unflatten(-1, (-1, vectors.queries.shape[-1] // heads)).transpose(1, 2) for each in vectors)
    k, v = (each.repeat_interleave(heads // each.shape[1], 1) for each in (k, v))
    there = batch["attention_mask"].bool()
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    cap = getattr(model.config, "attn_logit_softcapping", None)
    scores = cap * torch.tanh(scores / cap) if cap else scores
    seen = there[:, None, None, :] if "bert" in family else torch.ones(12, 12).tril().bool()
    expected = (scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v).transpose(1, 2).flatten(2)
    found = mixed[-1].reshape(expected.shape)
    torch.testing.assert_close(found[there], expected[there], rtol=1e-4, atol=1e-5)


def test_only_what_is_requested_is_captured() -> None:
    model = build("llama, grouped queries")
    assert captured(model, ActivationRequest()) == Activations()
    inside = captured(model, ActivationRequest(hidden=frozenset({1})))
    assert list(inside.hidden) == [1]
    assert not inside.attentions
    assert model.config._attn_implementation == "sdpa"


def test_eager_attention_is_switched_on_once_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    model = make_llama()
    with caplog.at_level(logging.WARNING, "potstill"):
        captured(model, ActivationRequest(attentions=frozenset({0})))
        captured(model, ActivationRequest(attentions=frozenset({1})))
    assert model.config._attn_implementation == "eager"
    assert [record.message for record in caplog.records if "eager" in record.message] == [caplog.records[0].message]


def test_the_check_leaves_no_trace() -> None:
    model = make_llama(attention_dropout=0.1).train()
    state = torch.get_rng_state()
    ActivationCapture(model).prepare(EVERYTHING_OF_TWO)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


EVERYTHING_OF_TWO = ActivationRequest(frozenset({0}), frozenset({1}), frozenset({1}))


class _Odd(nn.Module):
    """An attention whose projections have other names."""

    def __init__(self, whole: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"left": whole.q_proj, "right": whole.o_proj})

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        return self.inner["right"](self.inner["left"](hidden_states)), None


def test_unknown_architectures_are_refused() -> None:
    model = make_llama()
    model.model.layers[1].self_attn = _Odd(model.model.layers[1].self_attn)
    assert list(captured(model, ActivationRequest(hidden=frozenset({1}))).hidden) == [1]
    for needs in (ActivationRequest(attentions=frozenset({1})), ActivationRequest(vectors=frozenset({1}))):
        with pytest.raises(ModelError, match=r"projections called q_proj/k_proj/v_proj.*in layer 1, got none"):
            captured(model, needs)
    with pytest.raises(ModelError, match="expected a decoder or an encoder of transformers"):
        ActivationCapture(nn.Linear(2, 2))
    broken = make_llama()
    broken.model.layers = nn.ModuleList([broken.model.layers[0]])
    with pytest.raises(ModelError, match=r"list of its 2 layers, got model\.layers \(1\)"):
        ActivationCapture(broken)
    with pytest.raises(ModelError, match="gives no attention maps"):
        captured(build("falcon, one key"), EVERYTHING)
    with pytest.raises(ModelError, match="in an order of codegen's own"):
        sizes = {**OLD, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 2}
        captured(
            AutoModelForCausalLM.from_config(AutoConfig.for_model("codegen", **sizes)),
            ActivationRequest(vectors=frozenset({0})),
        )


def test_a_layer_that_did_not_run_is_named() -> None:
    capture = ActivationCapture(make_llama())
    with pytest.raises(ModelError, match="expected hidden from layer 1, got none"):
        capture.capture(ActivationRequest(hidden=frozenset({1})), lambda: None)


def test_reentrant_checkpointing_is_refused_where_it_would_cut_the_gradient() -> None:
    model = BertForMaskedLM(BertConfig(**SIZES)).train()
    capture, needs = ActivationCapture(model), ActivationRequest(vectors=frozenset({0}))
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": True})
    with pytest.raises(ModelError, match="use_reentrant false"):
        capture.capture(needs, partial(run, model, make_batch()))
    enable({"use_reentrant": False})
    inside = capture.capture(needs, partial(run, model, make_batch()))[1]
    inside.vectors[0].queries.square().sum().backward()
    assert model.bert.encoder.layer[0].attention.self.query.weight.grad.abs().sum() > 0


def test_the_shape_is_read_from_the_config() -> None:
    shape = ActivationCapture(build("llama, grouped queries")).shape
    assert (shape.layers, shape.width, shape.heads, shape.narrowest) == (3, 16, 4, 8)
    assert ActivationCapture(build("distilbert")).shape.attention_dropout == 0.1


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("longformer", r"hidden states of shape \[2, 3, 32\] from layer 0 .* got \[2, 512, 32\]"),
        ("xlm", "expected one list of layers, whose outputs are hidden states, got transformer.attentions"),
    ],
)
def test_outputs_that_are_not_the_hidden_states_of_the_tokens_are_refused(family: str, message: str) -> None:
    model = families.model(family, AutoModelForMaskedLM)
    with pytest.raises(ModelError, match=message):
        ActivationCapture(model).prepare(ActivationRequest(hidden=frozenset({0})))
    ActivationCapture(model).prepare(ActivationRequest(hidden=frozenset({"last_hidden_state"})))
