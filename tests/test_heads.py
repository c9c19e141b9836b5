"""Heads of sequence classifiers: the token that they read, which padding and end tokens decide."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import families
from potstill.data.batches import PaddingCollator
from potstill.errors import DataError
from potstill.evaluate.speed import latency_ms
from potstill.models.heads import check_end_tokens, match_heads
from potstill.models.integrity import padding_notes

END = 2


def classifier(family: str, seed: int = 0, **fields: Any) -> Any:
    return families.model(family, AutoModelForSequenceClassification, seed, **fields)


@pytest.mark.parametrize("pad", [0, 9, None])
def test_decoders_do_not_read_padding(pad: int | None) -> None:
    assert not padding_notes(classifier("llama", pad_token_id=pad), "teacher.model")


@pytest.mark.parametrize("pad", [9, None, -1])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_a_decoder_finds_the_padding_of_the_data(family: str, pad: int | None) -> None:
    model, pad_of_data = classifier(family), 3
    model.config.get_text_config().pad_token_id = pad
    match_heads("classification", {"student": model}, pad_of_data)
    rows = [{"input_ids": [5, 6, 7, 8, 9, 10], "labels": 0}, {"input_ids": [11, 12, 13], "labels": 1}]
    batch = PaddingCollator(pad_of_data)(rows)
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        alone = model(input_ids=torch.tensor([[11, 12, 13]])).logits
    torch.testing.assert_close(logits[1:], alone, rtol=1e-4, atol=1e-5)


def test_an_encoder_keeps_the_id_that_its_positions_are_counted_from() -> None:
    model = classifier("roberta")
    match_heads("classification", {"student": model}, 3)
    assert model.config.pad_token_id == 0
    match_heads("classification", {"student": classifier("modernvbert")}, 3)  # a config of two without the id


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_a_head_that_reads_end_tokens_needs_as_many_in_each_row(family: str) -> None:
    model = classifier(family)
    check_end_tokens(model, [[5, 6, END], [7, END]])
    for rows, counts in (([[5, 6], [7]], "0"), ([[5, END], [7, END, 8, END]], "1, 2")):
        with pytest.raises(DataError, match=rf"id 2\) in each row, .* of {type(model).__name__} reads, got {counts}\."):
            check_end_tokens(model, rows)
    assert latency_ms(model, 8, repeats=1, rows=3) > 0


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_other_heads_need_no_end_token(family: str) -> None:
    check_end_tokens(classifier(family), [[5, 6], [7]])
