"""The local engine: batches, padding and cache change nothing, and nothing but the sampling decides."""

from __future__ import annotations

import pytest
import torch

from conftest import make_llama, make_tokenizer
from potstill.engines.local import LocalEngine
from potstill.engines.sampling import Completion, Sampling
from potstill.errors import DataError

PROMPTS = ["def f", "class C1:\n    def g(self, x):", "return", "a", "def f2(a, b):\n    return a + b * 2"]
GREEDY = Sampling(sampling_temperature=0, max_new_tokens=12)


@pytest.fixture(scope="module")
def model():
    return make_llama(seed=3)


def greedy_loop(model, ids: list[int], steps: int) -> list[int]:
    """The most likely tokens, one whole forward pass for each: no batch, no padding, no cache."""
    new: list[int] = []
    for _ in range(steps):
        logits = model(input_ids=torch.tensor([ids + new]), use_cache=False).logits[0, -1]
        new.append(int(logits.argmax()))
        if new[-1] == 0:
            break
    return new


@pytest.mark.parametrize("batch_size", [1, 2, 5, 32])
def test_batches_and_left_padding_change_nothing(model, batch_size: int) -> None:
    tokenizer = make_tokenizer()
    got = LocalEngine(model, tokenizer, batch_size).complete(PROMPTS, GREEDY)
    for prompt, (written,) in zip(PROMPTS, got, strict=True):
        new = greedy_loop(model, tokenizer(prompt)["input_ids"], 12)
        assert written.ended == (new[-1] == 0)
        assert written.text == tokenizer.decode([token for token in new if token != 0])


def test_texts_and_their_ids_are_one(model) -> None:
    tokenizer = make_tokenizer()
    engine = LocalEngine(model, tokenizer)
    assert engine.complete([tokenizer(p)["input_ids"] for p in PROMPTS], GREEDY) == engine.complete(PROMPTS, GREEDY)


def test_the_seed_decides_and_nobody_else_notices(model) -> None:
    engine = LocalEngine(model, make_tokenizer(), 3)
    sampling = Sampling(samples=3, max_new_tokens=8, seed=5)
    torch.manual_seed(1)
    first = engine.complete(PROMPTS, sampling)
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.rand(1) == after
    assert engine.complete(PROMPTS, sampling) == first
    assert engine.complete(PROMPTS, Sampling(samples=3, max_new_tokens=8, seed=6)) != first
    assert [len(texts) for texts in first] == [3] * len(PROMPTS)
    assert len({one.text for texts in first for one in texts}) > len(PROMPTS)


def test_the_defaults_that_a_model_brings_are_not_mixed_in() -> None:
    tokenizer = make_tokenizer()
    plain = LocalEngine(make_llama(seed=3), tokenizer).complete(PROMPTS, GREEDY)
    model = make_llama(seed=3)
    model.generation_config.update(do_sample=True, temperature=9.0, top_k=3, repetition_penalty=5.0, max_length=3)
    model.generation_config.update(no_repeat_ngram_size=1, suppress_tokens=[*range(40, 200)], min_p=0.5)
    assert LocalEngine(model, tokenizer).complete(PROMPTS, GREEDY) == plain
    sampling = Sampling(max_new_tokens=8, seed=0)
    drawn = LocalEngine(make_llama(seed=3), tokenizer).complete(PROMPTS, sampling)
    assert LocalEngine(model, tokenizer).complete(PROMPTS, sampling) == drawn
    assert model.generation_config.temperature == 9.0


def test_sampling_follows_the_distribution(model) -> None:
    """First tokens of 4,000 draws against softmax(logits / temperature), and against its most likely tokens."""
    tokenizer = make_tokenizer()
    ids = tokenizer("def f")["input_ids"]
    logits = model(input_ids=torch.tensor([ids])).logits[0, -1].detach().double()
    expected = torch.softmax(logits / 0.5, -1)
    for top_k in (0, 5):
        if top_k:
            kept = expected.topk(top_k)
            expected = torch.zeros_like(expected).scatter(0, kept.indices, kept.values / kept.values.sum())
        sampling = Sampling(sampling_temperature=0.5, top_k=top_k, samples=4000, max_new_tokens=1)
        (texts,) = LocalEngine(model, tokenizer, 4000).complete([ids], sampling)
        best = int(expected[2:].argmax()) + 2  # 0 and 1 are special: their text is empty
        share = sum(text == tokenizer.decode([best]) for text in (one.text for one in texts)) / 4000
        assert abs(share - float(expected[best])) < 4 * (float(expected[best]) / 4000) ** 0.5
        if top_k:
            assert len({one.text for one in texts}) <= top_k


def test_a_stop_text_ends_a_text_and_does_not_belong_to_it(model) -> None:
    engine = LocalEngine(model, make_tokenizer())
    whole = [written.text for (written,) in engine.complete(PROMPTS, GREEDY)]
    stop = whole[1][4:6]
    stopped = engine.complete(PROMPTS, Sampling(sampling_temperature=0, max_new_tokens=12, stop=(stop, "\0")))
    assert stopped[1] == [Completion(whole[1][: whole[1].index(stop)], True)]
    for text, (written,) in zip(whole, stopped, strict=True):
        assert written.text == text.partition(stop)[0]


def test_end_of_text_of_the_model_and_of_the_tokenizer_both_end() -> None:
    tokenizer = make_tokenizer()
    model = make_llama(seed=3)
    ids = tokenizer(PROMPTS[1])["input_ids"]
    new = greedy_loop(model, ids, 4)
    third = new[2]
    model.generation_config.eos_token_id = [0, third]
    ((written,),) = LocalEngine(model, tokenizer).complete([ids], GREEDY)
    assert written.ended
    assert written.text == tokenizer.decode(new[: new.index(third)])


def test_what_does_not_fit_is_told(model) -> None:
    engine = LocalEngine(model, make_tokenizer())
    with pytest.raises(DataError, match=r"expected at most 64 tokens.* prompt 2 and 12 new ones"):
        engine.complete(["a", "def f(a, b):\n" * 10], GREEDY)
    with pytest.raises(DataError, match="expected a prompt with a token, got none in prompt 1"):
        engine.complete([""], GREEDY)
