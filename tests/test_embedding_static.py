"""Static students: which tokens they keep, how tokens are weighed and reduced, and the map that texts teach."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from potstill.data.texts import StoredTexts
from potstill.embedding import static, token_fit
from potstill.embedding import vectors as embedding_vectors
from potstill.embedding.encoders import load_embedder
from potstill.embedding.static import (
    COMMON_DIRECTIONS,
    SIF,
    TokenTable,
    reduce_rows,
    spread_tokens,
    static_student,
    text_tokenizer,
    text_tokens,
    token_ids,
    token_table,
)
from potstill.embedding.students import EncoderLayers, StartData, StaticStudent, TokenVectors
from potstill.embedding.token_fit import CHANGE_RIDGE, MAP_RIDGE, WEIGHT_RIDGE, FitTexts, fit_tokens
from potstill.errors import DataError, RecipeError, ShapeError, UserError
from potstill.runs.config.embedding import EmbeddingRecipe
from potstill.runs.embedding_sources import load_data

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
    reduced = reduce_rows(spread_tokens(table(vectors, weights)), 2).double().numpy()
    np.testing.assert_allclose(np.abs(reduced), np.abs(expected), atol=1e-6)


TEXTS = ["the aardvark", "of a aardvarking .", "the the of", "ab a", "[UNK]", "aardvark"]
ROWS = [[3, 6], [4, 1, 6, 5, 0], [3, 3, 4], [1, 2, 1], [], [6]]  # of their tokens
COUNTS = torch.tensor([[float(row.count(token)) for token in range(7)] for row in ROWS])


def test_the_tokens_of_texts_and_the_texts_of_tokens() -> None:
    (block,) = FitTexts(table(torch.zeros(7, 1)), TEXTS, torch.ones(6, 1)).blocks
    torch.testing.assert_close(block.sum_tokens(torch.eye(7)), COUNTS)
    sums = torch.ones(7, 6)
    block.add_texts(sums, torch.eye(6))
    torch.testing.assert_close(sums, 1 + COUNTS.T)


@pytest.mark.parametrize("block_rows", [6, 4, 1])
def test_vectors_of_tokens_are_fitted_by_three_ridge_regressions(
    block_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding_vectors, "BLOCK_ROWS", block_rows)
    generator = torch.Generator().manual_seed(1)
    tokens, vectors = table(torch.randn(7, 6, generator=generator)), torch.randn(6, 6, generator=generator)
    counts = COUNTS.double()
    unit = torch.nn.functional.normalize(vectors.double(), dim=-1)
    target = torch.nn.functional.normalize(unit - unit.mean(0), dim=-1)

    def mapped(x: torch.Tensor) -> torch.Tensor:
        means = torch.nn.functional.normalize(counts @ x, dim=-1)
        gram = means.T @ means
        ridge = MAP_RIDGE * gram.trace() / 6 * torch.eye(6).double()
        return x @ torch.linalg.solve(gram + ridge, means.T @ target + ridge)

    def scaled(x: torch.Tensor) -> torch.Tensor:
        norms = (counts @ x).norm(dim=1, keepdim=True)
        return torch.where(norms > 0, counts / norms, 0.0)

    def diagonal(x: torch.Tensor) -> torch.Tensor:
        norms = (counts @ x).norm(dim=1)
        return counts.T @ torch.where(norms > 0, norms**-2, 0.0)

    x = spread_tokens(tokens).double()
    y = mapped(x)
    # One column for each token: what the texts get of it.
    design = torch.stack([torch.outer(scaled(y)[:, i], y[i]).flatten() for i in range(7)], 1)
    ridge = WEIGHT_RIDGE * (diagonal(y) * y.square().sum(1)).mean() * torch.eye(7).double()
    weights = torch.linalg.solve(design.T @ design + ridge, design.T @ target.flatten() + ridge.sum(1)).clamp_min(0)
    x = mapped(x * weights[:, None])
    bags = scaled(x)
    ridge = CHANGE_RIDGE * diagonal(x).mean() * torch.eye(7).double()
    expected = torch.linalg.solve(bags.T @ bags + ridge, bags.T @ target + ridge @ x)
    torch.testing.assert_close(fit_tokens(tokens, TEXTS, vectors).double(), expected, atol=1e-4, rtol=1e-3)


def test_a_token_that_no_text_has_keeps_its_weight_and_only_follows_the_map() -> None:
    generator = torch.Generator().manual_seed(1)
    tokens, vectors = table(torch.randn(7, 6, generator=generator)), torch.randn(2, 6, generator=generator)
    fitted = fit_tokens(tokens, ["the of", "of of a"], vectors)
    assert torch.isfinite(fitted).all() and (fitted.norm(dim=1) > 0).all()
    assert torch.isfinite(fit_tokens(tokens, ["[UNK]", "[UNK]"], vectors)).all()


def test_the_vocabulary_is_cut_to_a_budget_or_to_the_texts() -> None:
    vectors = torch.arange(22.0).reshape(11, 2)

    def vocabulary(**static: Any) -> dict[str, int]:
        student = StaticStudent(dimensions=2, static=TokenVectors(**static))
        return student.from_table(word_pieces(), vectors, ["aardvark of"]).model.tokenizer.get_vocab()

    always = {"[PAD]", "[UNK]", ".", "a", "##b"}
    assert {*vocabulary(vocabulary="data")} == always | {"aardvark", "of"}
    assert {*vocabulary(max_mb=6 * 8e-6)} == always | {"of"}
    assert {*vocabulary(vocabulary=7)} == always | {"of", "aardvark"}
    assert {*vocabulary(max_mb=1)} == {*NAMES}
    with pytest.raises(UserError, match=r"max_mb: expected at least 4e-05 MB, for special tokens, single characters"):
        vocabulary(max_mb=4 * 8e-6)
    student = StaticStudent(dimensions=2, static=TokenVectors(vocabulary="data"))
    cut = student.from_table(word_pieces(), vectors, ["aardvark of"])
    whole = static_student(word_pieces(), vectors)
    torch.testing.assert_close(cut(["of aardvark a", "."]), whole(["of aardvark a", "."]))
    assert EncoderLayers(vocabulary="data").vocabulary == "data"
    with pytest.raises(ShapeError, match="expected one of data, got 'date'"):
        EncoderLayers(vocabulary="date")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="expected one of vocabulary and max_mb, got both"):
        TokenVectors(vocabulary="data", max_mb=1.0)


def test_words_of_a_file_become_tokens_that_the_teacher_reads_as_text(embedder: Path, tmp_path: Path) -> None:
    teacher = load_embedder(str(embedder), "teacher")
    path, student = (
        tmp_path / "words.txt",
        StaticStudent(dimensions=4, static=TokenVectors(words=str(tmp_path / "words.txt"))),
    )
    with pytest.raises(DataError, match=r"student\.static\.words: expected a text file, got"):
        student.read_tokens(teacher)
    path.write_text("\n\n")
    with pytest.raises(DataError, match="expected a word on each line"):
        student.read_tokens(teacher)
    path.write_text("potstillery\nnew town\npotstillery\n")
    plain, tokens = (made.read_tokens(teacher) for made in (StaticStudent(dimensions=4), student))
    assert plain is not None and tokens is not None and len(tokens.ids) == len(plain.ids) + 2
    torch.testing.assert_close(tokens.vectors[:-2], plain.vectors)
    pieces = teacher.tokenizer("new town", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        ids = torch.tensor([pieces])
        hidden = teacher[0].auto_model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    torch.testing.assert_close(tokens.vectors[-1], hidden[0].mean(0))
    ids, _ = token_ids(text_tokenizer(tokens.tokenizer), ["the new town potstillery", "a potstillerying"])
    assert [int(id) for id in ids].count(len(tokens.tokenizer) - 1) == 1
    assert [int(id) for id in ids].count(len(tokens.tokenizer) - 2) == 1
    assert len(teacher.tokenizer) == len(tokens.tokenizer) - 2


def test_a_static_student_reads_texts_of_any_length() -> None:
    tokenizer = word_pieces()
    tokenizer.backend_tokenizer.enable_truncation(2)
    student = static_student(tokenizer, torch.eye(len(NAMES)))
    counts = student(["the of the of aardvark"])[0] * 5
    assert counts[NAMES.index("the")] == 2 and counts[NAMES.index("aardvark")] == 1
    assert token_ids(text_tokenizer(tokenizer), ["the of the of aardvark", "a"])[1].tolist() == [5, 1]


def test_the_words_of_a_file_are_read_once(embedder: Path, tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("potstillery\n")
    student = StaticStudent(dimensions=2, static=TokenVectors(words=str(path), vocabulary="data"))
    tokens = student.read_tokens(load_embedder(str(embedder), "teacher"))
    path.unlink()
    assert tokens is not None
    made = student.from_table(tokens.tokenizer, torch.ones(tokens.size, 2), ["a + b"]).model.tokenizer
    assert "potstillery" in made.get_vocab()


def test_texts_are_read_from_the_disk_when_they_are_needed(
    embedder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the texts nor their tokens are ever in memory as a whole."""
    rows = [{"text": f"a text of number {i}", "other": f"{i} is another"} for i in range(40)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values: dict[str, Any] = {"kind": "embedding", "name": "x", "teacher": {"embedder": str(embedder)}}
    values |= {"student": {"static": {"vocabulary": "data"}, "dimensions": 4}, "output": str(tmp_path / "run")}
    values["data"] = {"train": {"path": str(tmp_path / "texts.jsonl"), "fields": ["text", "other"]}}
    values["data"]["train"]["prompts"] = {"other": "query: "}
    recipe, largest = EmbeddingRecipe.parse(values), 0
    data = load_data(recipe)
    assert isinstance(data.texts, StoredTexts) and isinstance(data.held_out_texts, StoredTexts)
    expected = [*(row["text"] for row in rows), *(f"query: {row['other']}" for row in rows)]
    assert [*data.texts, *data.held_out_texts] == expected and data.texts[-1] == expected[71]
    assert [*data.texts[30:50][5:15]] == expected[35:45]
    with pytest.raises(IndexError):
        data.texts[len(data.texts)]

    def count(tokenizer: Tokenizer, texts: Any) -> Any:
        nonlocal largest
        largest = max(largest, len(texts))
        return token_ids(tokenizer, texts)

    for module in (static, token_fit):
        monkeypatch.setattr(module, "token_ids", count)
    for module in (static, embedding_vectors):
        monkeypatch.setattr(module, "BLOCK_ROWS", 16)
    fit: Any = recipe.student.build(StartData(data.vectors, data.texts, data.teacher, data.tokens), "balanced", 0)
    means: Any = recipe.student.build(StartData(data.vectors, data.texts, data.teacher), "balanced", 0)
    assert largest == 16
    monkeypatch.undo()
    for student, tokens in ((fit, data.tokens), (means, None)):
        whole: Any = recipe.student.build(StartData(data.vectors, [*data.texts], data.teacher, tokens), "balanced", 0)
        similarities = [(vectors @ vectors.T) for vectors in (student(expected[:9]), whole(expected[:9]))]
        torch.testing.assert_close(*similarities, atol=1e-4, rtol=1e-3)


def test_words_are_kept_whatever_is_cut(embedder: Path, tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("\ufeffpotstillery\n\u6771\u4eac\ndef\n<end>\n", encoding="utf-8")
    plain = load_embedder(str(embedder), "teacher").tokenizer
    for cut in ({"vocabulary": 262}, {"vocabulary": "data"}, {"max_mb": 262 * 8e-6}, {"max_mb": float("inf")}, {}):
        student = StaticStudent(dimensions=2, static=TokenVectors(words=str(path), **cut))
        tokens = student.read_tokens(load_embedder(str(embedder), "teacher"))
        assert tokens is not None and len(tokens.tokenizer) == len(plain) + 2  # "def" and "<end>" are tokens
        made = student.from_table(tokens.tokenizer, torch.ones(tokens.size, 2), ["a + b"]).model.tokenizer
        assert made.encode("a potstillery", add_special_tokens=False).tokens[-1] == "potstillery"
        assert "\u6771\u4eac" in made.encode("\u79c1\u306f\u6771\u4eac\u306b", add_special_tokens=False).tokens
    with pytest.raises(UserError, match=r"^student\.static\.vocabulary: .* and words of your own, got 260"):
        cut_short = StaticStudent(dimensions=2, static=TokenVectors(words=str(path), vocabulary=260))
        cut_short.from_table(tokens.tokenizer, torch.ones(tokens.size, 2))


def test_a_student_without_texts_has_no_tokens_of_texts_and_no_training_rows(embedder: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = {"kind": "embedding", "name": "x", "teacher": {"embedder": str(embedder)}}
    values |= {"student": {"static": {"vocabulary": "data"}, "dimensions": 4}, "output": str(tmp_path / "run")}
    with pytest.raises(RecipeError, match=r"expected data\.train with texts beside static\.vocabulary: data, got none"):
        EmbeddingRecipe.parse(values)
    values["student"]["static"] = {}
    assert not any("held-out rows are training rows" in note for note in load_data(EmbeddingRecipe.parse(values)).notes)


def test_directions_that_are_removed_are_no_dimensions_of_a_student_without_texts() -> None:
    nothing: Any = None
    tokens = TokenTable(nothing, 40, torch.arange(40), torch.randn(40, 8), torch.ones(40))
    with pytest.raises(UserError, match="expected at most 4 without texts to learn from"):
        StaticStudent(dimensions=5).build(StartData(nothing, [], tokens=tokens), nothing, 0)
