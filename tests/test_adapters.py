"""Adapters over toy models: what they start as, what is trained, saved and merged, and what they refuse."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
)

from conftest import make_batch, make_llama, make_tokenizer
from potstill.errors import ModelError, UserError
from potstill.losses.alignment import causal_alignment
from potstill.losses.divergences import ForwardKL
from potstill.losses.targets import DenseTargets, HeadTargets
from potstill.losses.token_losses import token_divergence
from potstill.models.adapted import is_quantized, merged, parameter_count, save_adapter, virtual_tokens
from potstill.models.adapters import Adapter, Ia3, Lora, Prefix, Prompt, adapt
from potstill.models.layer_map import LayerMap
from potstill.models.loading import load_model, suppress_warnings
from potstill.models.split import forward_targets
from potstill.teachers.self_taught import BaseModelTeacher
from potstill.train.distiller import Distiller
from potstill.train.terms.layers import Attention, Hidden, Relations
from potstill.train.terms.logits import Labels, Logits

WORDS = "def g(self, x): return x"
ADAPTERS: dict[str, Adapter] = {
    "lora": Lora(rank=4),
    "ia3": Ia3(),
    "prompt": Prompt(3, WORDS),
    "prefix": Prefix(3, WORDS),
}
SIZES = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 1,
}
GPT2 = {"vocab_size": 300, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "qwen2": {**SIZES, "tie_word_embeddings": True},
    "gemma2": {**SIZES, "head_dim": 8},
    "gemma3_text": {**SIZES, "head_dim": 8},
    "gpt2": GPT2,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    make_llama(hidden_size=32).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def made(kind: str = "llama") -> Any:
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **FAMILIES[kind])).eval()


def inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def stirred(model: Any) -> Any:
    """The adapter as if it had learnt something."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def behind(words: list[int], batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch whose rows all begin with the same tokens."""
    rows = len(batch["input_ids"])
    front = torch.tensor(words).expand(rows, -1)
    return {
        "input_ids": torch.cat([front, batch["input_ids"]], 1),
        "attention_mask": torch.cat([torch.ones_like(front), batch["attention_mask"]], 1),
        "labels": torch.cat([torch.full_like(front, -100), batch["labels"]], 1),
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_it_starts_as_its_base(family: str, kind: str) -> None:
    model, batch = made(family), make_batch()
    expected = model(**inputs(batch)).logits
    student = adapt(model, ADAPTERS[kind])
    assert torch.equal(student(**inputs(batch)).logits, expected)
    stirred(student)
    assert not torch.allclose(student(**inputs(batch)).logits, expected)
    with student.disable_adapter():
        assert torch.equal(student(**inputs(batch)).logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_virtual_tokens_start_as_a_text_in_front_and_positions_and_labels_line_up(
    family: str, kind: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    model, batch = made(family), make_batch()
    words = tokenizer(WORDS)["input_ids"][:3]
    student = adapt(model, ADAPTERS[kind], tokenizer=tokenizer)
    assert virtual_tokens(student) == 3
    longer = behind(words, batch)
    with student.disable_adapter():
        expected = Distiller(student, None, [Labels()]).step(longer)
        teacher = student(**inputs(batch)).logits
        logits = student(**inputs(longer)).logits[:, 3:]
        counts = batch["labels"][:, 1:] != -100
        apart = token_divergence(logits[:, :-1][counts], DenseTargets(teacher[:, :-1][counts]), ForwardKL()).mean()
    alignment = causal_alignment(batch["labels"])
    torch.testing.assert_close(
        forward_targets(student, None, batch, alignment).dense(), logits[:, :-1][counts], rtol=1e-4, atol=1e-4
    )
    distiller = Distiller(student, made(family), [Logits(ForwardKL()), Labels()])
    output = distiller.step(batch)
    torch.testing.assert_close(output.logs["labels"], expected.logs["labels"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.logs["logits"], apart, rtol=1e-4, atol=1e-4)
    output.loss.backward()
    assert [name for name, p in distiller.named_parameters() if p.grad is not None] == [
        "student.prompt_encoder.default.embedding.weight"
    ]


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_hidden_states_and_relations_line_up_with_the_teachers(kind: str, tokenizer: PreTrainedTokenizerFast) -> None:
    batch, terms = make_batch(), [Hidden(LayerMap.uniform()), Relations(LayerMap.uniform())]
    words = tokenizer(WORDS)["input_ids"][:3]
    student = adapt(made(), ADAPTERS[kind], tokenizer=tokenizer)
    distiller = Distiller(student, made(), terms)
    found = distiller._capture.capture(distiller._request, lambda: student(**inputs(batch)))[1].last(12)
    with student.disable_adapter():
        distiller = Distiller(student, made(), terms)
        read = partial(student, **inputs(behind(words, batch)))
        expected = distiller._capture.capture(distiller._request, read)[1].last(12)
    for layer in expected.hidden:
        torch.testing.assert_close(found.hidden[layer], expected.hidden[layer], rtol=1e-4, atol=1e-4)
    for layer, vectors in expected.vectors.items():
        for one, other in zip(found.vectors[layer], vectors, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    output = Distiller(student, made(), terms).step(batch)
    output.loss.backward()
    assert student.prompt_encoder.default.embedding.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_attention_maps_with_virtual_tokens_are_refused(kind: str, tokenizer: PreTrainedTokenizerFast) -> None:
    student = adapt(made(), ADAPTERS[kind], tokenizer=tokenizer)
    with pytest.raises(ModelError, match="adapter with virtual tokens"):
        Distiller(student, made(), [Attention(LayerMap.uniform())])


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_the_head_is_fused_and_frozen(kind: str) -> None:
    batch = make_batch()
    student = stirred(adapt(made(), ADAPTERS[kind]))
    distiller = Distiller(student, made(), [Logits(ForwardKL()), Labels()])
    assert distiller.split is not None
    targets = forward_targets(student, distiller.split, batch, causal_alignment(batch["labels"]))
    assert isinstance(targets, HeadTargets)
    assert not targets.head.weight.requires_grad
    distiller.step(batch).loss.backward()
    trained = {name for name, p in distiller.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in distiller.named_parameters() if p.grad is not None}
    assert all("lora_" in name or "ia3_" in name for name in trained)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_it_is_saved_small_and_loads_everywhere(
    kind: str, base: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    batch = make_batch()
    student = stirred(adapt(load_model(base, "student"), ADAPTERS[kind], tokenizer=tokenizer)).eval()
    expected = student(**inputs(batch)).logits
    save_adapter(student, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert 4 * parameter_count(student).trained < size < 4 * parameter_count(student).trained + 8000
    loaded = load_model(str(tmp_path), "student")
    assert torch.equal(loaded(**inputs(batch)).logits, expected)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert parameter_count(loaded).all == parameter_count(student).all
    with suppress_warnings():
        other = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(other.eval()(**inputs(batch)).logits, expected)
        if kind in ("lora", "ia3"):
            alone = AutoModelForCausalLM.from_pretrained(tmp_path)
            assert torch.equal(alone.eval()(**inputs(batch)).logits, expected)
    further = load_model(str(tmp_path), "student", trainable=True)
    assert parameter_count(further) == parameter_count(student)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_merged_computes_what_base_and_adapter_compute(family: str, kind: str) -> None:
    batch = make_batch()
    student = stirred(adapt(made(family), ADAPTERS[kind]))
    expected = student(**inputs(batch)).logits
    plain = merged(student)
    assert type(plain) is type(made(family))
    assert not [name for name, _ in plain.named_parameters() if "lora" in name or "ia3" in name]
    torch.testing.assert_close(plain(**inputs(batch)).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("bits", "tolerance"), [(4, 1e-4), (8, 0.1)])
def test_a_quantized_base_is_trained_saved_and_merged(base: str, tmp_path: Path, bits: int, tolerance: float) -> None:
    pytest.importorskip("bitsandbytes")
    batch = make_batch()
    with suppress_warnings():
        student = stirred(adapt(load_model(base, "student", "float32", bits=bits), Lora(rank=4)))
        assert is_quantized(student)
        assert student.get_memory_footprint() < 0.75 * make_llama(hidden_size=32).get_memory_footprint()
        distiller = Distiller(student, make_llama(seed=1), [Logits(ForwardKL()), Labels()])
        assert distiller.split is not None
        distiller.step(batch).loss.backward()
        assert all((p.grad is not None) == p.requires_grad for p in student.parameters())
        expected = student.eval()(**inputs(batch)).logits
        save_adapter(student, tmp_path)
        again = load_model(str(tmp_path), "student")
        assert is_quantized(again)
        assert torch.equal(again(**inputs(batch)).logits, expected)
        assert (
            parameter_count(again).all
            == parameter_count(student).all
            == parameter_count(adapt(load_model(base, "student"), Lora(rank=4))).all
        )
        plain = merged(student)
    assert not is_quantized(plain)
    assert type(plain.model.layers[0].mlp.up_proj) is torch.nn.Linear
    logits = plain(**inputs(batch)).logits
    assert (logits - expected).abs().max() < tolerance * expected.abs().max()


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_merged_into_the_head_or_the_embeddings_alone_the_other_stays(target: str, tmp_path: Path) -> None:
    batch = make_batch()
    config = peft.LoraConfig(r=2, target_modules=[target])
    with suppress_warnings():
        student = stirred(peft.get_peft_model(make_llama(tie_word_embeddings=True).eval(), config))
    expected = student(**inputs(batch)).logits
    merged(student).save_pretrained(tmp_path)
    again = load_model(str(tmp_path), "student")
    torch.testing.assert_close(again(**inputs(batch)).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "virtual tokens"),
        (peft.LoraConfig(r=2, task_type="CAUSAL_LM", alora_invocation_tokens=[2, 3]), "aLoRA"),
    ],
)
def test_what_no_weights_compute_is_not_merged(config: Any, kind: str) -> None:
    with suppress_warnings():
        student = peft.get_peft_model(make_llama(), config)
    with pytest.raises(ModelError, match=f"an adapter that can be merged into the weights of its base, got {kind}"):
        merged(student)


def step_by_step(model: Any, ids: list[int], new: int) -> list[int]:
    for _ in range(new):
        row = torch.tensor([ids])
        logits = model(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False).logits
        ids = [*ids, int(logits[0, -1].argmax())]
    return ids


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ADAPTERS)
def test_generate_agrees_with_the_logits(family: str, kind: str, tokenizer: PreTrainedTokenizerFast) -> None:
    student = stirred(adapt(made(family), ADAPTERS[kind], tokenizer=tokenizer))
    prompt = make_batch()["input_ids"][:1, :4]
    with suppress_warnings(), torch.no_grad():
        found = student.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False, pad_token_id=1,
            eos_token_id=None,
        )  # fmt: skip
        assert found[0].tolist() == step_by_step(student, prompt[0].tolist(), 6)


@pytest.mark.parametrize("family", FAMILIES)
def test_targets_are_found_and_the_head_is_none_of_them(family: str) -> None:
    student = adapt(made(family), Lora(rank=2))
    linear = [n for n, m in made(family).named_modules() if type(m).__name__ in ("Linear", "Conv1D") and n != "lm_head"]
    assert student.active_peft_config.target_modules == set(linear)
    ends = {name.rpartition(".")[2] for name in adapt(made(family), Ia3()).active_peft_config.target_modules}
    assert ends == ({"c_attn", "c_proj"} if family == "gpt2" else {"k_proj", "v_proj", "down_proj"})


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_encoders_have_adapters_too(kind: str) -> None:
    config = AutoConfig.for_model(
        "bert", vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model, batch = AutoModelForMaskedLM.from_config(config).eval(), make_batch()
    expected = model(**inputs(batch)).logits
    student = adapt(model, ADAPTERS[kind])
    assert torch.equal(student(**inputs(batch)).logits, expected)
    assert not [name for name in student.active_peft_config.target_modules if name.startswith("cls.")]
    expected = stirred(student)(**inputs(batch)).logits
    torch.testing.assert_close(merged(student)(**inputs(batch)).logits, expected, rtol=1e-4, atol=1e-4)
    for refused in (Prompt(3), Prefix(3)):
        with pytest.raises(ModelError, match="expected a causal language model"):
            adapt(AutoModelForMaskedLM.from_config(config), refused)


def test_options_do_something() -> None:
    few = adapt(made(), Lora(rank=2, target_modules=["q_proj", "model.layers.1.mlp.up_proj"]))
    assert sum(name.endswith("lora_A.default.weight") for name, _ in few.named_parameters()) == 3
    scaled = adapt(made(), Lora(rank=2, alpha=16, dropout=0.5))
    layer = scaled.get_base_model().model.layers[0].mlp.up_proj
    assert layer.scaling["default"] == 8
    assert layer.lora_dropout["default"].p == 0.5
    assert adapt(made(), Lora(rank=2)).get_base_model().model.layers[0].mlp.up_proj.scaling["default"] == 2
    ia3 = adapt(made(), Ia3(target_modules=["up_proj", "down_proj"], feedforward_modules=["up_proj"]))
    shapes = [tuple(p.shape) for name, p in ia3.named_parameters() if "ia3_l" in name]
    assert shapes[:2] == [(1, 16), (16, 1)]
    first = adapt(made(), Prompt(3), seed=1).prompt_encoder.default.embedding.weight
    assert torch.equal(first, adapt(made(), Prompt(3), seed=1).prompt_encoder.default.embedding.weight)
    assert not torch.equal(first, adapt(made(), Prompt(3), seed=2).prompt_encoder.default.embedding.weight)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_are_trained_saved_and_merged_with_it(
    bias: Any, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    made("gpt2").save_pretrained(tmp_path / "base")
    student = adapt(load_model(str(tmp_path / "base"), "student"), Lora(2, target_modules=["c_fc"], bias=bias))
    trained = {name for name, p in student.named_parameters() if p.requires_grad and name.endswith("bias")}
    assert len(trained) == (13 if bias == "all" else 2)  # two norms and four layers each, and the last norm
    stirred(student).eval()
    batch = make_batch()
    expected = student(**inputs(batch)).logits
    save_adapter(student, tmp_path / "adapter")
    for trainable in (False, True):
        again = load_model(str(tmp_path / "adapter"), "student", trainable=trainable).eval()
        assert torch.equal(again(**inputs(batch)).logits, expected)
        assert not trainable or parameter_count(again) == parameter_count(student)
    torch.testing.assert_close(merged(student)(**inputs(batch)).logits, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ModelError, match=r"BaseModelTeacher: expected an adapter without biases"):
        BaseModelTeacher().attach(again)


def test_random_numbers_outside_are_left_alone() -> None:
    model, state = made(), torch.get_rng_state()
    adapt(model, Lora(rank=2))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (
            Lora(target_modules=["q_prj"]),
            r"student.adapter.target_modules: expected .*got q_prj. Did you mean q_proj\?",
        ),
        (Lora(target_modules=["lm_head"]), "expected linear layers of the model's body"),
        (Lora(rank=17), r"student.adapter.rank: expected 1..8, the smaller side of .*k_proj, got 17"),
        (Ia3(target_modules=["up_proj"], feedforward_modules=["down_proj"]), "feedforward_modules: expected"),
        (Lora(rank=2, bias="all"), r"student.adapter.bias: expected none for LlamaForCausalLM, got all"),
        (Prompt(3, WORDS), "student.adapter.text: expected words that a tokenizer knows"),
    ],
    ids=str,
)
def test_what_does_not_fit_the_model_is_one_clear_line(adapter: Adapter, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        adapt(made(), adapter)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Lora(rank=0), r"Lora\.rank: expected a number >= 1, got 0"),
        (lambda: Lora(bias="some"), r"Lora\.bias: expected one of none, all, lora_only, got 'some'"),
        (lambda: Ia3(target_modules=[]), r"Ia3\.target_modules: expected at least one, got none"),
        (lambda: Prompt(0), r"Prompt\.virtual_tokens: expected a number >= 1, got 0"),
        (lambda: Prefix(3, merge=True), "expected no merge, got one"),
    ],
)
def test_values_are_checked_in_python(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_an_unknown_architecture_needs_named_layers() -> None:
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("bloom", vocab_size=300, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    )
    with pytest.raises(ModelError, match="Name its layers with target_modules"):
        adapt(model, Ia3())
    assert parameter_count(adapt(model, Ia3(["query_key_value", "dense_4h_to_h"], ["dense_4h_to_h"]))).trained == 2 * (
        48 + 64
    )


def test_one_adapter_is_enough() -> None:
    with pytest.raises(ModelError, match="expected a plain model to put it on"):
        adapt(adapt(made(), Lora(rank=2)), Lora(rank=2))


@pytest.mark.parametrize(("package", "extra"), [("peft", "adapters"), ("bitsandbytes", "quantized")])
def test_a_missing_package_is_named(package: str, extra: str, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"expected the package {package}.*pip install 'potstill\[{extra}\]'"):
        adapt(load_model(base, "student.model", bits=4 if package == "bitsandbytes" else None), Lora(rank=2))


def test_pickled_adapters_are_refused(base: str, tmp_path: Path) -> None:
    save_adapter(adapt(load_model(base, "student"), Lora(rank=2)), tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"expected an adapter with adapter_model\.safetensors"):
        load_model(str(tmp_path), "student")


def test_a_base_that_is_gone_is_named(tmp_path: Path) -> None:
    make_llama().save_pretrained(tmp_path / "base")
    save_adapter(adapt(load_model(str(tmp_path / "base"), "student"), Lora(rank=2)), tmp_path / "adapter")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(
        ModelError, match=r"the base of student \(base_model_name_or_path in .*\): expected a folder with a model"
    ):
        load_model(str(tmp_path / "adapter"), "student")


@pytest.mark.parametrize("loads", [load_model, None])
def test_an_evaluation_leaves_the_gradients_of_4_bit_weights(loads: Any, tmp_path: Path) -> None:
    """bitsandbytes packs them for evaluation on some CPUs, and gives no gradient from then on."""
    sizes = SIZES | {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "head_dim": 32}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes)).save_pretrained(tmp_path)
    if loads is None:  # as a user of the Python interface loads it
        quantization = BitsAndBytesConfig(load_in_4bit=True)
        model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization, dtype=torch.float32)
    else:
        model = loads(str(tmp_path), "student", "float32", bits=4)
    with suppress_warnings():
        student = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    distiller, batch = Distiller(student, make_llama(seed=1), [Labels()]), make_batch(2, 8, 300)

    def gradients() -> list[Tensor]:
        student.zero_grad()
        distiller.train()
        distiller.step(batch).loss.backward()
        return [x.grad.clone() for x in student.parameters() if x.requires_grad]

    before = gradients()
    with torch.no_grad():
        student.eval()(batch["input_ids"])
    assert len(before) == 4
    torch.testing.assert_close(gradients(), before)
