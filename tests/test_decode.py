"""Tokens one after another: padding, cache, batches and ended rows change nothing, and log-probabilities are right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from conftest import make_llama
from potstill.engines.decode import GeneratedTokens, Guide, generate_tokens
from potstill.engines.sampling import Sampling

PROMPTS = [[5, 6, 7, 8, 9], [10], [11, 12, 13], [14, 15, 16, 17, 18, 19, 20], [21, 22]]
ENDS = frozenset({0, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49})


def toy(**changes: Any) -> Any:
    return make_llama(seed=3, vocab_size=50, **changes)


def expected_log_probs(
    model: Any, prompt: list[int], text: GeneratedTokens, sampling: Sampling
) -> tuple[list[float], list[float]]:
    """The log-probabilities of a text in one plain forward pass over its row alone, in float64 behind the logits."""
    ids = torch.tensor([prompt + text.ids])
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].double()
    at = torch.tensor(text.ids)[:, None]
    cool = (logits / sampling.sampling_temperature).log_softmax(-1)
    if sampling.top_k:
        cool = cool.masked_fill(cool < cool.topk(sampling.top_k).values[:, -1:], -torch.inf).log_softmax(-1)
    return [one.gather(1, at)[:, 0].tolist() for one in (logits.log_softmax(-1), cool)]  # type: ignore[return-value]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_new_tokens=20, seed=1),
        Sampling(max_new_tokens=9, seed=2, sampling_temperature=0.7),
        Sampling(max_new_tokens=9, seed=3, top_k=7),
    ],
    ids=str,
)
def test_left_padding_and_cache_give_the_log_probs_of_each_row_alone(sampling: Sampling) -> None:
    model = toy()
    written = generate_tokens(model, PROMPTS, sampling, eos_ids=ENDS)
    assert len({len(text.ids) for text in written}) > 1  # rows left while others went on
    for prompt, text in zip(PROMPTS, written, strict=True):
        own, sampler = expected_log_probs(model, prompt, text, sampling)
        assert text.log_probs == pytest.approx(own, abs=1e-5)
        assert text.sampler_log_probs == pytest.approx(sampler, abs=1e-5)
        assert text.ended == (text.ids[-1] in ENDS)
        assert not ENDS & {*text.ids[:-1]}


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_how_many_rows_are_written_together_changes_nothing(batch_size: int) -> None:
    sampling = Sampling(max_new_tokens=20, seed=1)
    several, whole = (generate_tokens(toy(), PROMPTS, sampling, eos_ids=ENDS, batch_size=n) for n in (batch_size, 32))
    assert [text.ids for text in several] == [text.ids for text in whole]


def test_models_without_position_ids_or_without_a_cache_write_the_same() -> None:
    class Forgetful(torch.nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.inner = model

        def forward(self, input_ids: Any, attention_mask: Any, use_cache: bool, past_key_values: Any = None) -> Any:
            made = self.inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
            made.past_key_values = None
            return made

    sampling = Sampling(max_new_tokens=12, seed=4)
    plain = generate_tokens(toy(), PROMPTS, sampling, eos_ids=ENDS)
    assert [text.ids for text in generate_tokens(Forgetful(toy()), PROMPTS, sampling, eos_ids=ENDS)] == [
        t.ids for t in plain
    ]


def test_absolute_positions_are_those_of_each_row() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=40)).eval()
    model.transformer.wpe.weight.data.mul_(50)  # so that a wrong position is seen
    sampling = Sampling(max_new_tokens=10, seed=5)
    for prompt, text in zip(PROMPTS, generate_tokens(model, PROMPTS, sampling, eos_ids=ENDS), strict=True):
        assert text.log_probs == pytest.approx(expected_log_probs(model, prompt, text, sampling)[0], abs=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks by the old name
def test_adapters_write_as_the_adapted_model_does() -> None:
    peft = pytest.importorskip("peft")
    lora = peft.get_peft_model(toy(), peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"]))
    plain = generate_tokens(toy(), PROMPTS, Sampling(max_new_tokens=8, seed=6), eos_ids=ENDS)
    merged = peft.get_peft_model(toy(), peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"]))
    merged.load_state_dict(lora.state_dict())
    written = generate_tokens(lora, PROMPTS, Sampling(max_new_tokens=8, seed=6), eos_ids=ENDS)
    alone = generate_tokens(merged.merge_and_unload(), PROMPTS, Sampling(max_new_tokens=8, seed=6), eos_ids=ENDS)
    assert [text.ids for text in written] == [text.ids for text in alone]
    assert [text.log_probs for text in written] != [text.log_probs for text in plain]
    prompts = peft.get_peft_model(toy(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    for prompt, text in zip(
        PROMPTS, generate_tokens(prompts, PROMPTS, Sampling(max_new_tokens=5, seed=6), eos_ids=ENDS), strict=True
    ):
        ids = torch.tensor([prompt + text.ids])
        logits = prompts(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, 3 + len(prompt) - 1 : -1]
        own = logits.log_softmax(-1).gather(1, torch.tensor(text.ids)[:, None])[:, 0]
        assert text.log_probs == pytest.approx(own.tolist(), abs=1e-5)


def test_everybody_elses_state_is_left_alone() -> None:
    model = toy(attention_dropout=0.5).train()
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first = generate_tokens(model, PROMPTS, Sampling(max_new_tokens=6, seed=7), eos_ids=ENDS)
    assert torch.rand(1) == expected
    assert all(module.training for module in model.modules())
    assert generate_tokens(model, PROMPTS, Sampling(max_new_tokens=6, seed=7), eos_ids=ENDS) == first  # dropout is off
    assert all(p.grad is None for p in model.parameters())
    assert model(input_ids=torch.tensor([[1, 2]])).logits.requires_grad


def test_rooms_and_the_vocabulary_bound_a_text() -> None:
    written = generate_tokens(
        toy(),
        PROMPTS,
        Sampling(max_new_tokens=6, seed=8),
        eos_ids=frozenset(),
        max_tokens=[1, 2, 9, 3, 6],
        vocabulary=20,
    )
    assert [len(text.ids) for text in written] == [1, 2, 6, 3, 6]
    assert not any(text.ended for text in written)
    assert all(token < 20 for text in written for token in text.ids)


def test_draws_follow_the_distribution_and_its_nucleus() -> None:
    model, prompt = toy(), [5, 6, 7]
    chances = model(input_ids=torch.tensor([prompt])).logits[0, -1].double().softmax(-1)
    for top_p in (1.0, 0.6):
        expected = chances
        if top_p < 1:
            order = chances.argsort(descending=True)
            kept = order[: int((chances[order].cumsum(0) < top_p).sum()) + 1]
            expected = torch.zeros_like(chances).scatter(0, kept, chances[kept] / chances[kept].sum())
        sampling = Sampling(max_new_tokens=1, seed=9, top_p=top_p)
        drawn = [t.ids[0] for t in generate_tokens(model, [prompt] * 4000, sampling, eos_ids=ENDS, batch_size=4000)]
        share = torch.bincount(torch.tensor(drawn), minlength=50) / 4000
        assert ((share - expected).abs() < 4.5 * (expected / 4000).sqrt() + 1e-9).all()


def test_a_guide_changes_the_sampler_log_probs_alone() -> None:
    student, teacher = toy(), make_llama(seed=4, vocab_size=50)
    sampling = Sampling(max_new_tokens=8, seed=10)
    mixed = generate_tokens(
        student, PROMPTS, sampling, eos_ids=ENDS, guide=Guide(teacher, lambda q, p: 0.25 * q + 0.75 * p)
    )
    for prompt, text in zip(PROMPTS, mixed, strict=True):
        q, p = (
            torch.tensor(expected_log_probs(model, prompt, text, sampling)[0]).exp() for model in (student, teacher)
        )
        assert text.log_probs == pytest.approx(q.log().tolist(), abs=1e-5)
        assert text.sampler_log_probs == pytest.approx((0.25 * q + 0.75 * p).log().tolist(), abs=1e-5)
