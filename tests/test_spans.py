"""Spans of characters and the tokens that cover them, on tokenizers that cut in different ways."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from conftest import TEXT, make_tokenizer
from potstill.data.token_weights import SpanWeights, span_tokens
from potstill.generation.reasoning import parse

SOLUTIONS = [
    "Step 1: 3 + 4 = 7.\nStep 2: 7 * 2 = 14.\n\nAnswer: 14",
    "  The cafés — naïve ones 😀 — hold 5 people.\nTherefore, the answer is 5 people.",
    r"We have $\frac{1}{2}$ of 三十 apples. $\boxed{\frac{15}{1}}$ 😀",
    "\n\nHalf of 48 is 24.\n48 + 24 = 72\n#### 72",
]


def unigram(metaspace: bool) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator([*TEXT, *SOLUTIONS], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def wordpiece() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=150, special_tokens=["[UNK]"], show_progress=False)
    tokenizer.train_from_iterator([*TEXT, *SOLUTIONS], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


TOKENIZERS = {
    "bytes": make_tokenizer,
    "unigram": lambda: unigram(False),
    "metaspace": lambda: unigram(True),
    "wordpiece": wordpiece,
}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", SOLUTIONS)
def test_the_tokens_of_a_span_are_those_that_hold_its_characters(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]()
    solution = parse(text)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert solution.answer_span is not None
    for span in (solution.reasoning_span, solution.answer_span):
        start, end = span_tokens(tokenizer, text, span)
        for token, (begins, ends) in enumerate(encoded["offset_mapping"]):
            holds = any(span[0] <= character < span[1] for character in range(begins, ends))
            assert holds == (start <= token < end), (token, begins, ends)
    reasoning, answer = (span_tokens(tokenizer, text, s) for s in (solution.reasoning_span, solution.answer_span))
    assert reasoning[1] <= answer[0]


@pytest.mark.parametrize("text", SOLUTIONS)
def test_on_bytes_the_tokens_of_a_span_decode_to_it(text: str) -> None:
    """Up to the space before a word, which belongs to its token."""
    tokenizer = make_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    solution = parse(text)
    assert solution.answer_span is not None
    start, end = span_tokens(tokenizer, text, solution.answer_span)
    assert solution.answer is not None
    assert solution.answer in tokenizer.decode(ids[start:end])
    assert len(tokenizer.decode(ids[start:end]).strip()) <= len(solution.answer) + 2
    assert span_tokens(tokenizer, text, (3, 3)) == (0, 0)


def test_weights_of_spans_leave_out_the_first_token_of_a_row() -> None:
    """It is never predicted: a row without a prompt has one target less than tokens."""
    spans = ["reasoning_span"] * 4 + ["answer_span"] * 2
    weights = SpanWeights(0.3, 0.7, per="span").of_tokens(spans, [*range(6)])
    assert sum(weights[1:4]) / 5 == pytest.approx(0.3)
    assert sum(weights[4:]) / 5 == pytest.approx(0.7)
