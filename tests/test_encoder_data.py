"""Masked rows and rows that are judged: what is masked, what a label means, what is cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value

from conftest import make_tokenizer
from potstill.data.batches import PaddingCollator, encode
from potstill.data.masking import MaskedRows
from potstill.data.sources import Source
from potstill.errors import DataError
from potstill.losses.alignment import IGNORE
from toy_encoders import CLASSES, SPECIAL, VOCABULARY, WORDS, make_bert_tokenizer, sentences, write_rows

CLS, SEP, MASK = (SPECIAL.index(f"[{name}]") for name in ("CLS", "SEP", "MASK"))


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def plain_rows(count: int, length: int) -> list[dict[str, list[int]]]:
    ids = [CLS, *(5 + i % (VOCABULARY - 5) for i in range(length)), SEP]
    return [{"input_ids": ids, "labels": [IGNORE, *ids[1:-1], IGNORE]} for _ in range(count)]


# Masks


def test_masks_are_berts() -> None:
    rows = MaskedRows(plain_rows(200, 100), make_bert_tokenizer())
    masked = kept = other = 0
    for row, plain in zip(rows, rows.rows, strict=True):
        chosen = [i for i, label in enumerate(row["labels"]) if label != IGNORE]
        assert len(chosen) == 15
        assert 0 not in chosen and len(row["labels"]) - 1 not in chosen, "special tokens are never chosen"
        for i, token in enumerate(row["input_ids"]):
            assert i in chosen or token == plain["input_ids"][i]
        assert all(row["labels"][i] == plain["input_ids"][i] for i in chosen)
        masked += sum(row["input_ids"][i] == MASK for i in chosen)
        kept += sum(row["input_ids"][i] == plain["input_ids"][i] for i in chosen)
        other += len(chosen)
    assert masked / other == pytest.approx(0.8 + 0.1 / VOCABULARY, abs=0.03)
    assert kept / other == pytest.approx(0.1 + 0.1 / VOCABULARY, abs=0.03)


def test_masks_depend_on_seed_epoch_and_row_alone() -> None:
    rows = plain_rows(6, 30)
    first, again = (MaskedRows(rows, make_bert_tokenizer(), seed=3) for _ in range(2))
    one = [first[i] for i in range(6)]
    torch.rand(5)
    assert [again[i] for i in reversed(range(6))][::-1] == one
    assert len({str(row["input_ids"]) for row in one}) == 6
    first.set_epoch(1)
    assert all(first[i] != one[i] for i in range(6))
    first.set_epoch(0)
    assert list(first) == one
    assert list(MaskedRows(rows, make_bert_tokenizer(), seed=4)) != one
    assert [dict(row) for row in first.fixed()] == one


def test_a_short_row_has_one_mask() -> None:
    rows = MaskedRows([{"input_ids": [CLS, 7, SEP], "labels": [IGNORE, 7, IGNORE]}], make_bert_tokenizer())
    assert rows[0]["labels"] == [IGNORE, 7, IGNORE]


def test_workers_see_the_epoch() -> None:
    rows = MaskedRows(plain_rows(4, 30), make_bert_tokenizer())
    loader = torch.utils.data.DataLoader(
        rows, batch_size=2, num_workers=1, persistent_workers=True, collate_fn=PaddingCollator(0)
    )
    epochs = []
    for epoch in range(2):
        rows.set_epoch(epoch)
        epochs.append(torch.cat([batch["labels"] for batch in loader]))
        assert torch.equal(epochs[-1], PaddingCollator(0)(list(rows))["labels"])
    assert not torch.equal(*epochs)


def test_a_tokenizer_without_a_mask_is_refused() -> None:
    with pytest.raises(DataError, match="expected a tokenizer with a mask token"):
        MaskedRows([], make_tokenizer())


def test_windows_of_text_have_special_tokens_around_them(tmp_path: Path) -> None:
    text = " ".join(WORDS)
    file = written(tmp_path / "one.jsonl", [{"text": text}, {"text": ""}])
    found = encode(Source(file), make_bert_tokenizer(), max_length=12, task="masked")
    assert [len(row["input_ids"]) for row in found.dataset] == [12, 12, 3]
    for row in found.dataset:
        ids = row["input_ids"]
        assert (ids[0], ids[-1]) == (CLS, SEP)
        assert row["labels"] == [IGNORE, *ids[1:-1], IGNORE]
    assert [i for row in found.dataset for i in row["input_ids"][1:-1]] == list(range(5, VOCABULARY))
    assert found.tokens == len(WORDS)
    assert found.notes == ("one.jsonl: 1 empty row skipped.",)
    packed = encode(Source(file), make_bert_tokenizer(), max_length=12, task="masked", packing=True)
    assert packed.dataset[0]["labels"][0] == IGNORE


# Labels


def test_labels_are_names_or_numbers_of_classes(tmp_path: Path) -> None:
    rows = [{"text": "the cat", "label": label} for label in ("odd", 1, "0", "calm")]
    file = written(tmp_path / "rows.jsonl", rows)
    found = encode(Source(file), make_bert_tokenizer(), max_length=16, task="classification", classes=CLASSES)
    assert [row["labels"] for row in found.dataset] == [2, 1, 0, 0]
    assert found.tokens == 4
    batch = PaddingCollator(0)(list(found.dataset))
    assert batch["labels"].tolist() == [2, 1, 0, 0] and batch["labels"].dtype == torch.long
    assert "token_type_ids" not in batch


@pytest.mark.parametrize(
    ("task", "labels", "message"),
    [
        (
            "classification",
            ["calm", "calmer"],
            "expected a label of calm, lively, odd, or its number, got 'calmer' in row 2",
        ),
        ("classification", [0, 3], "got '3' in row 2 of rows.jsonl"),
        ("classification", [0, None], r"got nothing \(null\) in row 2"),
        ("regression", [0.5, "half"], "expected a number as the label, got 'half' in row 2"),
        ("regression", [0.5, "nan"], "expected a number as the label, got 'nan' in row 2"),
    ],
)
def test_a_strange_label_is_an_error_with_its_row(tmp_path: Path, task: Any, labels: list[Any], message: str) -> None:
    file = written(tmp_path / "rows.jsonl", [{"text": "the cat", "label": label} for label in labels])
    with pytest.raises(DataError, match=message):
        encode(Source(file), make_bert_tokenizer(), max_length=16, task=task, classes=CLASSES)


def test_a_model_without_names_of_its_classes_is_an_error(tmp_path: Path) -> None:
    file = written(tmp_path / "rows.jsonl", [{"text": "the cat", "label": "calm"}])
    with pytest.raises(DataError, match="expected a class in label2id, which is empty, got 'calm' in row 1"):
        encode(Source(file), make_bert_tokenizer(), max_length=16, task="classification", classes={})


@pytest.mark.parametrize("form", ["parquet", "saved"])
def test_numbers_of_classes_are_read_by_the_names_that_a_data_set_has(form: str, tmp_path: Path) -> None:
    features = Features(text=Value("string"), label=ClassLabel(names=["yes", "maybe", "no"]))
    rows = Dataset.from_list([{"text": "a", "label": 0}, {"text": "b", "label": 2}], features=features)
    path = tmp_path / "rows.parquet"
    rows.to_parquet(path) if form == "parquet" else rows.save_to_disk(path)

    def labels(classes: dict[str, int]) -> Any:
        return encode(Source(path), make_bert_tokenizer(), max_length=9, task="classification", classes=classes)

    assert labels({"NO": 0, "MAYBE": 1, "YES": 2}).dataset["labels"][:] == [2, 0]
    other = labels({"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2})
    assert other.dataset["labels"][:] == [0, 2]
    assert "the model names its classes otherwise (LABEL_0, LABEL_1, LABEL_2): 0 is yes, 1 is maybe" in other.notes[0]
    with pytest.raises(DataError, match=r"the classes of the model \(no, yes\), got maybe in .*rows.parquet"):
        labels({"no": 0, "yes": 1})


def test_pairs_have_types_and_are_cut_together(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", 8, seed=0)
    source = Source(file, label="score")
    whole = encode(source, make_bert_tokenizer(), max_length=40, task="regression")
    row = whole.dataset[0]
    second = row["input_ids"].index(SEP) + 1
    assert row["token_type_ids"] == [0] * second + [1] * (len(row["input_ids"]) - second)
    assert isinstance(row["labels"], float)
    cut = encode(source, make_bert_tokenizer(), max_length=9, task="regression")
    assert {len(row["input_ids"]) for row in cut.dataset} == {9}
    assert all(row["input_ids"].count(SEP) == 2 for row in cut.dataset)
    assert "rows.jsonl: 8 examples truncated to max_length 9." in cut.notes
    batch = PaddingCollator(0)(list(whole.dataset))
    assert batch["labels"].dtype == torch.float32
    assert batch["token_type_ids"].shape == batch["input_ids"].shape


def test_a_csv_gives_labels_as_well(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("sentence,other,value\nthe cat,a dog,2.5\na bird,the tree,-100\n")
    source = Source(file, field="sentence", pair="other", label="value")
    found = encode(source, make_bert_tokenizer(), max_length=16, task="regression")
    assert [row["labels"] for row in found.dataset] == [2.5, -100.0]
    assert found.tokens == 2
    with pytest.raises(DataError, match="expected a column 'label'"):
        encode(Source(file, field="sentence"), make_bert_tokenizer(), max_length=16, task="regression")


def test_an_encoders_rows_are_texts(tmp_path: Path) -> None:
    texts = sentences(3)
    file = written(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    found = encode(Source(file), make_bert_tokenizer(), max_length=6, task="encoder")
    assert [row["labels"] for row in found.dataset] == [0, 0, 0]
    assert all(
        len(row["input_ids"]) == min(6, len(text.split()) + 2) for row, text in zip(found.dataset, texts, strict=True)
    )
    assert all(row["input_ids"][-1] == SEP for row in found.dataset)
    with pytest.raises(DataError, match="expected text for the task encoder, got input_ids"):
        encode(
            Source(written(tmp_path / "ids.jsonl", [{"input_ids": [5]}])),
            make_bert_tokenizer(),
            max_length=6,
            task="encoder",
        )
