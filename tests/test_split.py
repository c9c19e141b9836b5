"""Where a model may be cut before its head, and that it gives the same logits in one piece and in two."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from conftest import make_batch, make_llama
from potstill.losses.alignment import causal_alignment
from potstill.losses.divergences import ForwardKL
from potstill.losses.targets import DenseTargets, HeadTargets
from potstill.losses.token_losses import token_divergence
from potstill.models.split import forward_targets, split_model
from potstill.teachers.model import ModelTeacher
from potstill.train.distiller import Distiller
from potstill.train.terms.logits import Labels, Logits

SIZES = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 1,
}
GPT2 = {"vocab_size": 300, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.2}
OPT = {**SIZES, "ffn_dim": 32, "word_embed_proj_dim": 16}

# The kind, its config, and what is expected: the body, the factor and the soft cap.
FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[str, float, float | None]]] = {
    "llama": ("llama", SIZES, ("model", 1.0, None)),
    "llama, bias": ("phi", SIZES, ("model", 1.0, None)),
    "qwen2, tied": ("qwen2", {**SIZES, "tie_word_embeddings": True}, ("model", 1.0, None)),
    "gpt2, dropout": ("gpt2", GPT2, ("transformer", 1.0, None)),
    "opt, body in the body": ("opt", OPT, ("model.decoder", 1.0, None)),
    "gemma2, soft cap": ("gemma2", {**SIZES, "head_dim": 8}, ("model", 1.0, 30.0)),
    "gemma3, no soft cap": ("gemma3_text", {**SIZES, "head_dim": 8}, ("model", 1.0, None)),
    "cohere, factor": ("cohere", {**SIZES, "logit_scale": 0.3}, ("model", 0.3, None)),
    "granite, divides": ("granite", {**SIZES, "logits_scaling": 8.0}, ("model", 0.125, None)),
    "hyperclovax, multiplies": ("hyperclovax", {**SIZES, "logits_scaling": 8.0}, ("model", 8.0, None)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_body_and_head_give_the_models_logits(family: str) -> None:
    kind, sizes, expected = FAMILIES[family]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).eval()
    found = split_model(model)
    assert found is not None
    assert (found.body, found.logit_scale, found.softcap) == expected
    batch = make_batch()
    alignment = causal_alignment(batch["labels"])
    whole, parts = forward_targets(model, None, batch, alignment), forward_targets(model, found, batch, alignment)
    assert isinstance(whole, DenseTargets)
    assert isinstance(parts, HeadTargets)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert torch.equal(whole.dense(), logits[:, :-1][batch["labels"][:, 1:] != -100])
    torch.testing.assert_close(parts.dense(), whole.dense(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_small_weights_hide_nothing(dtype: torch.dtype) -> None:
    sizes = {**SIZES, "head_dim": 8, "initializer_range": 1e-4}  # logits so small that no cap would show
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma2", **sizes)).to(dtype)
    found = split_model(model)
    assert found is not None
    assert found.softcap == 30.0


def test_the_probe_leaves_no_trace() -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **GPT2)).train()
    model.transformer.h[0].eval()
    model.transformer.h[1].register_forward_pre_hook(lambda *_: torch.rand(1) and None)  # a model that draws
    flags = [module.training for module in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert split_model(model) is not None
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


class _OtherHead(nn.Linear):
    pass


class _Louder(LlamaForCausalLM):
    """Scales the hidden states before the head, like MiniCPM."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.model(*args, **kwargs)
        output.logits = self.lm_head(output.last_hidden_state / 2)
        return output


class _Biased(LlamaForCausalLM):
    """Its additional parameter is zero at first."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.favourites = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + self.favourites
        return output


class _Bounded(LlamaForCausalLM):
    """A soft cap that its config does not have."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = 25 * torch.tanh(output.logits / 25)
        return output


def _as(kind: type[LlamaForCausalLM]) -> nn.Module:
    return kind(make_llama().config)


def _with_other_head() -> nn.Module:
    model = make_llama()
    model.lm_head = _OtherHead(16, 300, bias=False)
    return model


def _with_hook() -> nn.Module:
    model = make_llama()
    model.lm_head.register_forward_pre_hook(lambda *_: None)  # one that makes the weight, for all we know
    return model


def _adapted(config: peft.PeftConfig) -> nn.Module:
    return peft.get_peft_model(make_llama(), config)


NOT_PLAIN = {
    "head of another kind": _with_other_head,
    "head with a hook": _with_hook,
    "scaled hidden states": lambda: _as(_Louder),
    "unknown soft cap": lambda: _as(_Bounded),
    "parameters beside": lambda: _as(_Biased),
    "LoRA on the head": lambda: _adapted(peft.LoraConfig(target_modules=["lm_head"])),
    "LoRA and a head of its own": lambda: _adapted(
        peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    ),
    "LoRA behind a token": lambda: _adapted(
        peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[5])
    ),
    "prompt tuning": lambda: _adapted(peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
    "prefix tuning": lambda: _adapted(peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
}
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # read by peft


@pytest.mark.parametrize("case", NOT_PLAIN)
def test_what_is_not_plain_is_not_split_and_is_trained(case: str) -> None:
    student, teacher, batch = NOT_PLAIN[case](), make_llama(seed=1), make_batch()
    distiller = Distiller(student, teacher, [Logits(ForwardKL(), temperature=2.0), Labels(weight=0.5)])
    assert distiller.split is None
    output = distiller.step(batch)
    output.loss.backward()
    assert all(p.grad is not None for p in distiller.parameters() if p.requires_grad)

    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    counts = batch["labels"][:, 1:] != -100
    q, p = (model(**inputs).logits[:, -12:-1][counts] for model in (student, teacher))
    kl = token_divergence(q, DenseTargets(p), ForwardKL(), temperature=2.0).mean()
    entropy = nn.functional.cross_entropy(q, batch["labels"][:, 1:][counts])
    torch.testing.assert_close(output.loss, 4 * kl + 0.5 * entropy)
    torch.testing.assert_close(output.logs["labels"], entropy.detach())


@pytest.mark.parametrize("case", ["prompt tuning", "prefix tuning", "scaled hidden states", "unknown soft cap"])
def test_the_probe_alone_finds_what_is_frozen(case: str) -> None:
    assert split_model(NOT_PLAIN[case]().requires_grad_(False)) is None


def test_a_probe_that_fails_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    model = make_llama()
    model.model.forward = lambda **kwargs: 1 / 0
    assert split_model(model) is None
    assert "probe of its head failed with ZeroDivisionError" in caplog.text


def test_why_a_model_is_not_split_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert split_model(nn.Identity()) is None
        with torch.device("meta"):
            assert split_model(make_llama()) is None
    assert "Identity gives full logits: it is not a language model of transformers." in caplog.text
    assert "has no weight on this rank" in caplog.text


@pytest.mark.filterwarnings("ignore")  # torch's own
def test_a_model_that_is_compiled_by_itself_is_not_split() -> None:
    model = make_llama()
    assert split_model(torch.compile(model)) is None
    assert split_model(model) is not None
    model.compile()
    assert split_model(model) is None


def test_a_model_with_lora_is_split() -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    student, teacher, batch = peft.get_peft_model(make_llama(hidden_size=8), config), make_llama(seed=1), make_batch()
    distiller = Distiller(student, teacher, [Logits(ForwardKL()), Labels()])
    assert distiller.split is not None
    assert distiller.split.body == "base_model.model.model"
    alignment = causal_alignment(batch["labels"])
    whole, parts = (forward_targets(student, how, batch, alignment).dense() for how in (None, distiller.split))
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-6)
    distiller.step(batch).loss.backward()
    assert all((p.grad is not None) == ("lora" in name) for name, p in distiller.named_parameters())


def test_a_head_that_becomes_something_else_gives_full_logits() -> None:
    student, batch = make_llama(hidden_size=8), make_batch()
    distiller = Distiller(student, None, [Labels()])
    config = peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, student)
    assert distiller.split is not None
    assert distiller.split.head() is None
    q = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    torch.testing.assert_close(
        distiller.step(batch).loss, nn.functional.cross_entropy(q.flatten(0, 1), batch["labels"][:, 1:].flatten())
    )


def test_the_head_is_read_anew_each_time() -> None:
    model = make_llama()
    found = split_model(model)
    assert found is not None
    model.lm_head.weight = nn.Parameter(torch.ones(300, 16))
    head = found.head()
    assert head is not None
    assert head.weight is model.lm_head.weight


def test_a_teacher_gives_its_head_and_logits_in_its_own_precision() -> None:
    model, batch = make_llama(seed=1), make_batch()
    alignment = causal_alignment(batch["labels"])
    expected = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        targets = ModelTeacher(model)(batch, alignment).targets
    assert isinstance(targets, HeadTargets)
    assert not targets.hidden.requires_grad
    torch.testing.assert_close(targets.dense(), alignment.select(expected).detach(), rtol=1e-6, atol=1e-6)


def test_autocast_does_not_reach_the_teachers_head_where_the_student_is_not_split() -> None:
    teacher, batch = make_llama(seed=1), make_batch()
    student = _as(_Biased)
    objective = [Logits(ForwardKL())]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = Distiller(student, teacher, objective).step(batch).loss
        q = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    alignment = causal_alignment(batch["labels"])
    p = ModelTeacher(teacher)(batch, alignment).targets
    torch.testing.assert_close(found, token_divergence(alignment.select(q), p, ForwardKL()).mean(), rtol=1e-6, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_teacher_elsewhere_gives_logits_where_the_student_is() -> None:
    batch = {name: value.cuda() for name, value in make_batch().items()}
    alignment = causal_alignment(batch["labels"])
    here, there = (ModelTeacher(make_llama(seed=1), device=d)(batch, alignment).targets for d in ("cuda", "cpu"))
    assert isinstance(here, HeadTargets)
    assert isinstance(there, DenseTargets)
    assert there.logits.device == batch["input_ids"].device
    torch.testing.assert_close(here.dense(), there.dense(), rtol=1e-4, atol=1e-4)


def test_a_teacher_that_is_spread_over_devices_stays_there(tmp_path: Path) -> None:
    make_llama(seed=1).save_pretrained(tmp_path / "teacher")
    batch = make_batch()
    alignment = causal_alignment(batch["labels"])
    parts = ("model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head")
    places = {"device_map": {"": "cpu"}}, {"device_map": dict.fromkeys(parts, "cpu") | {"model.embed_tokens": "disk"}}
    here, spread = (
        ModelTeacher(AutoModelForCausalLM.from_pretrained(tmp_path / "teacher", offload_folder=tmp_path, **place))
        for place in places
    )
    assert next(spread.model.parameters()).is_meta
    torch.testing.assert_close(
        spread(batch, alignment).targets.dense(), here(batch, alignment).targets.dense(), rtol=1e-6, atol=1e-6
    )
