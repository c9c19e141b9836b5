"""Static students: which tokens they keep, how tokens are weighed and reduced, and the map that texts teach."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from potstill.embedding.encoders import load_embedder
from potstill.embedding.static import (
    COMMON_DIRECTIONS,
    RIDGE,
    SIF,
    TokenTable,
    fit_tokens,
    reduce_tokens,
    static_student,
    text_tokens,
    token_ids,
    token_table,
)

NAMES = ["[PAD]", "[unused1]", "[UNK]", ".", "a", "##b", "the", "of", "##ing", "aardvark", "<extra_id_3>"]


def word_pieces() -> PreTrainedTokenizerFast:
    model = Tokenizer(WordPiece({name: id for id, name in enumerate(NAMES)}, unk_token="[UNK]"))
    model.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="[PAD]", unk_token="[UNK]")


def table(vectors: torch.Tensor, weights: torch.Tensor | None = None) -> TokenTable:
    ids = text_tokens(word_pieces())
    return TokenTable(word_pieces(), len(NAMES), ids, vectors, torch.ones(len(ids)) if weights is None else weights)


def test_single_characters_count_as_the_most_frequent_and_longer_tokens_by_their_order(embedder: Path) -> None:
    from potstill.embedding.static import token_weights

    ids = text_tokens(word_pieces())
    assert [NAMES[id] for id in ids] == [".", "a", "##b", "the", "of", "##ing", "aardvark"]
    total = sum(1 / rank for rank in range(2, 9))
    expected = [SIF / (SIF + 1 / (rank + 2) / total) for rank in (0, 0, 0, 0, 1, 2, 3)]
    assert token_weights(NAMES, ids).tolist() == pytest.approx(expected)


def test_a_token_is_read_without_the_closing_token_of_a_mean(embedder: Path) -> None:
    teacher = load_embedder(str(embedder), "teacher")
    tokens = token_table(teacher, teacher.tokenizer, limit=7)
    assert len(tokens.ids) == 7
    ids = torch.tensor([[int(tokens.ids[3])]])
    with torch.no_grad():
        hidden = teacher[0].auto_model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    torch.testing.assert_close(tokens.vectors[3], hidden[0].mean(0))


def test_the_reduction_is_a_weighted_pca_without_the_strongest_directions() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors, weights = torch.randn(7, 9, generator=generator), torch.rand(7, generator=generator) + 0.1
    x, w = vectors.double().numpy(), weights.double().numpy()[:, None]
    x = (x - (x * w).sum(0) / w.sum()) * w
    u, s, _ = np.linalg.svd(x)
    expected = u[:, COMMON_DIRECTIONS : COMMON_DIRECTIONS + 2] * s[COMMON_DIRECTIONS : COMMON_DIRECTIONS + 2]
    reduced = reduce_tokens(table(vectors, weights), 2).double().numpy()
    np.testing.assert_allclose(np.abs(reduced), np.abs(expected), atol=1e-6)


def test_the_map_of_texts_is_a_ridge_regression_that_is_pulled_to_the_teachers_axes() -> None:
    generator = torch.Generator().manual_seed(1)
    tokens = table(torch.randn(7, 6, generator=generator))
    texts = ["the aardvark", "of a aardvarking .", "the the of", "ab a", "aardvark"]
    start, components = torch.randn(5, 2, generator=generator), torch.randn(6, 2, generator=generator)
    x = tokens.vectors.double().numpy()
    x = x - x.mean(0)
    u, s, v = np.linalg.svd(x, full_matrices=False)
    s[:COMMON_DIRECTIONS] = 0
    x = u * s @ v
    rows = [[3, 6], [4, 1, 6, 5, 0], [3, 3, 4], [1, 2, 1], [6]]
    means = np.stack([x[row].mean(0) for row in rows])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    prior, gram = components.double().numpy(), means.T @ means
    ridge = RIDGE * np.trace(gram) / 6 * np.eye(6)
    mapped = np.linalg.solve(gram + ridge, means.T @ start.double().numpy() + ridge @ prior)
    np.testing.assert_allclose(fit_tokens(tokens, texts, start, components), x @ mapped, atol=1e-5)


def test_a_static_student_reads_texts_of_any_length() -> None:
    tokenizer = word_pieces()
    tokenizer.backend_tokenizer.enable_truncation(2)
    student = static_student(tokenizer, torch.eye(len(NAMES)))
    counts = student(["the of the of aardvark"])[0] * 5
    assert counts[NAMES.index("the")] == 2 and counts[NAMES.index("aardvark")] == 1
    assert token_ids(tokenizer, ["the of the of aardvark", "a"])[1].tolist() == [5, 1]
