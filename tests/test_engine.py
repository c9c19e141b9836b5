"""The local engine: batches, padding and cache change nothing, and nothing but the sampling decides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import decoders, processors

from conftest import make_llama, make_tokenizer
from potstill.engines import local
from potstill.engines.decode import GeneratedTokens
from potstill.engines.local import LocalEngine
from potstill.engines.sampling import Completion, Sampling
from potstill.errors import DataError
from potstill.models.prompts import completion_text, prompt_ids

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


def test_the_seed_decides_and_the_global_generator_stays(model) -> None:
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


def test_prompts_that_do_not_fit_are_refused(model) -> None:
    engine = LocalEngine(model, make_tokenizer())
    with pytest.raises(DataError, match=r"expected at most 64 tokens.* prompt 2 and 12 new ones"):
        engine.complete(["a", "def f(a, b):\n" * 10], GREEDY)
    with pytest.raises(DataError, match="expected a prompt with a token, got none in prompt 1"):
        engine.complete([""], GREEDY)
    with pytest.raises(DataError, match="expected a list of prompts, got one text"):
        engine.complete("def f(a, b):", GREEDY)


def with_specials(*added: str) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [*added]})
    return tokenizer


def scripted(monkeypatch: pytest.MonkeyPatch, ids: list[int], ended: bool = True) -> None:
    written = GeneratedTokens(ids, [0.0] * len(ids), [0.0] * len(ids), ended)
    monkeypatch.setattr(local, "generate_tokens", lambda model, prompts, *_, **__: [written for _ in prompts])


def test_special_tokens_stay_but_for_the_end(model, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = with_specials("<|channel|>", "<|end_turn|>")
    text = "<|channel|>def<pad>f<|channel|><end>"
    ids = tokenizer(text)["input_ids"]
    scripted(monkeypatch, ids)
    ((completion,),) = LocalEngine(model, tokenizer).complete(["a"], GREEDY)
    assert completion == Completion(text.removesuffix("<end>"), True, tuple(ids))
    scripted(monkeypatch, [*ids, 1, 1])  # padding
    assert LocalEngine(model, tokenizer).complete(["a"], GREEDY)[0][0].text == completion.text
    scripted(monkeypatch, [0, *ids[:-1]], ended=False)
    assert LocalEngine(model, tokenizer).complete(["a"], GREEDY)[0][0].text == "<end>" + completion.text
    scripted(monkeypatch, ids)
    stopped = LocalEngine(model, tokenizer).complete(["a"], Sampling(max_new_tokens=9, stop=("f<|channel|>",)))
    assert stopped == [[Completion("<|channel|>def<pad>", True)]]


def add_affixes(tokenizer: Any, single: str) -> None:
    """Put special tokens around each text."""
    tokens = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>", "<end>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=tokens)


@pytest.mark.parametrize(("single", "before"), [("<s> $A </s>", 1), ("$A <end>", 0), ("<s> $A <end> </s>", 1)])
def test_a_prompt_keeps_what_begins_it_and_loses_what_ends_it(model, single: str, before: int) -> None:
    plain, tokenizer = with_specials("<s>", "</s>"), with_specials("<s>", "</s>")
    add_affixes(tokenizer, single)
    for text in ("def f", "a<end>", "</s>"):
        ids = prompt_ids(tokenizer, text)
        assert ids[before:] == plain(text)["input_ids"]
        assert ids[:before] == [tokenizer.convert_tokens_to_ids("<s>")][:before]
    assert LocalEngine(model, tokenizer)._ids("def f") == prompt_ids(tokenizer, "def f")


def test_a_word_keeps_the_space_before_it() -> None:
    """SentencePiece strips the space before the first word of a text."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    prompt, ids = prompt_ids(tokenizer, "def f"), tokenizer(" return x")["input_ids"]
    assert tokenizer.decode(ids) == "return x"
    assert completion_text(tokenizer, prompt, ids, frozenset()) == " return x"
    half = tokenizer("é")["input_ids"][:1]  # a prompt of ids may end within a character
    assert completion_text(tokenizer, half, [*tokenizer("é")["input_ids"][1:], *ids], frozenset()).endswith("return x")
