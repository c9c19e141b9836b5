"""Padding on either side, and several sequences in a row: the loss is that of each sequence alone."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    DataCollatorWithPadding,
)

import families
from conftest import make_llama, make_tokenizer
from potstill.data.batches import PaddingCollator
from potstill.data.right_padding import right_padded
from potstill.errors import DataError, ShapeError
from potstill.losses.divergences import ForwardKL
from potstill.models.layer_map import LayerMap
from potstill.train.distiller import Distiller
from potstill.train.terms.layers import Hidden
from potstill.train.terms.logits import Labels, Logits

# Learned positions, positions from the mask, ALiBi, rotary, sliding windows, states, and layers of both kinds.
FAMILIES = ["gpt2", "opt", "bloom", "llama", "qwen2", "mistral", "gemma2", "gpt_neox", "mamba", "recurrent_gemma"]
A, B, C = [11, 23, 35, 47, 59, 71, 83], [20, 31, 42], [90, 17, 64, 5, 33]
PAD = 0


def rows(*parts: list[int]) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor(parts)}


def padded(left: int) -> dict[str, torch.Tensor]:
    """Three rows with so many of their pad tokens on the left, others on the right."""
    filled, masks = [], []
    for ids in (A, B, C):
        before = min(left, len(A) - len(ids))
        after = len(A) - len(ids) - before
        filled.append([PAD] * before + ids + [PAD] * after)
        masks.append([0] * before + [1] * len(ids) + [0] * after)
    return rows(*filled) | {"attention_mask": torch.tensor(masks)}


def with_labels(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    return batch | {"labels": batch["input_ids"].masked_fill(batch.get("attention_mask", torch.ones(1)) == 0, -100)}


PACKED = rows([*A, *B, *C])
NUMBERS = torch.tensor([[0] * len(A) + [1] * len(B) + [2] * len(C)])
POSITIONS = torch.tensor([[*range(len(A)), *range(len(B)), *range(len(C))]])
ENDS = torch.tensor([0, len(A), len(A) + len(B), len(A) + len(B) + len(C)], dtype=torch.int32)
FORMS: dict[str, dict[str, Any]] = {
    "right": padded(0),
    "left": padded(9),
    "both": padded(1),
    "left, boolean": padded(9) | {"attention_mask": padded(9)["attention_mask"].bool()},
    "packed, positions": PACKED | {"position_ids": POSITIONS},
    "packed, positions and labels": with_labels(PACKED) | {"position_ids": POSITIONS},
    "packed, numbers": PACKED | {"seq_idx": NUMBERS.int()},
    "packed, numbers in the mask": PACKED | {"attention_mask": NUMBERS + 1},
    "packed, boundaries": PACKED | {"cu_seq_lens_q": ENDS, "cu_seq_lens_k": ENDS, "max_length_q": 7, "max_length_k": 7},
    "packed and padded": {
        "input_ids": torch.tensor([[PAD, *A, *B], [*C, *[PAD] * 6]]),
        "attention_mask": torch.tensor([[0] + [1] * 10, [1] * 5 + [0] * 6]),
        "position_ids": torch.tensor([[0, *range(7), *range(3)], [*range(5), *[0] * 6]]),
    },
}


def expected(student: Any, teacher: Any) -> float:
    """The mean over tokens of KL and of 0.5 cross-entropy, each sequence by itself."""
    total, tokens = 0.0, 0
    for ids in (A, B, C):
        with torch.no_grad():
            p, q = (m(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1) for m in (teacher, student))
        total += float((p.exp() * (p - q)).sum() - 0.5 * q.gather(1, torch.tensor(ids[1:])[:, None]).sum())
        tokens += len(ids) - 1
    return total / tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_every_form_of_a_batch_has_the_loss_of_its_sequences(family: str) -> None:
    student, teacher = (families.model(family, seed=seed) for seed in (0, 1))
    distiller = Distiller(student, teacher, [Logits(ForwardKL()), Labels(weight=0.5)]).eval()
    losses = {name: distiller.step(form).loss.item() for name, form in FORMS.items()}
    assert losses == pytest.approx(dict.fromkeys(FORMS, expected(student, teacher)), rel=2e-5)


def test_terms_over_layers_read_the_same_tokens() -> None:
    distiller = Distiller(make_llama(), make_llama(seed=1), [Hidden(LayerMap.last_k(1))]).eval()
    losses = {name: distiller.step(form).loss.item() for name, form in FORMS.items()}
    assert losses == pytest.approx(dict.fromkeys(FORMS, losses["right"]), rel=1e-5)


@pytest.mark.parametrize("family", ["bert", "modernbert", "gpt2", "llama"])
def test_classes_do_not_depend_on_the_side_of_the_padding(family: str) -> None:
    student, teacher = (families.model(family, AutoModelForSequenceClassification, seed) for seed in (0, 1))
    distiller = Distiller(student, teacher, [Logits(ForwardKL()), Labels()], task="classification").eval()
    labels = torch.tensor([1, 0, 1])
    examples = [rows(ids) | {"labels": labels[i : i + 1]} for i, ids in enumerate((A, B, C))]
    alone = [distiller(example, normalizer=3.0).loss.item() for example in examples]
    losses = [distiller.step(padded(left) | {"labels": labels}).loss.item() for left in (0, 1, 9)]
    assert losses == pytest.approx([sum(alone)] * 3, rel=1e-5)


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert"])
def test_masked_models_read_each_sequence_alone(family: str) -> None:
    student, teacher = (families.model(family, AutoModelForMaskedLM, seed) for seed in (0, 1))
    distiller = Distiller(student, teacher, [Logits(ForwardKL()), Labels()], task="masked").eval()
    examples = [with_labels(rows(ids)) for ids in (A, B, C)]
    alone = [distiller(example, normalizer=15.0).loss.item() for example in examples]
    losses = {name: distiller.step(with_labels(form)).loss.item() for name, form in FORMS.items()}
    assert losses == pytest.approx(dict.fromkeys(FORMS, sum(alone)), rel=1e-5)


def test_a_plain_batch_is_left_as_it_is() -> None:
    batch = with_labels(padded(0))
    assert right_padded(batch, "causal")["input_ids"] is batch["input_ids"]
    again = right_padded(right_padded(FORMS["packed and padded"], "causal"), "causal")
    assert torch.equal(again["input_ids"], torch.tensor([A, [*B, 0, 0, 0, 0], [*C, 0, 0]]))


def test_values_of_tokens_move_with_them() -> None:
    weights = torch.arange(15.0)[None]
    moved = right_padded(with_labels(PACKED) | {"position_ids": POSITIONS, "weights": weights}, "causal")
    assert moved["weights"].tolist() == [[*range(7)], [7, 8, 9, 0, 0, 0, 0], [10, 11, 12, 13, 14, 0, 0]]
    assert moved["labels"][1].tolist() == [*B, *[-100] * 4]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (padded(0) | {"labels": padded(0)["input_ids"]}, "target on padding in row 2"),
        (rows(A) | {"attention_mask": torch.tensor([[1, 1, 0, 1, 1, 1, 1]])}, "got 0 between tokens in row 1"),
        (rows(A, A) | {"position_ids": torch.tensor([[*range(7)], [*range(3, 10)]])}, "got 3 at one in row 2"),
        (rows(A) | {"attention_mask": torch.ones(1, 1, 7, 7)}, r"attention_mask of shape \[1, 7\]"),
        (rows(A) | {"position_ids": torch.zeros(3, 1, 7).long()}, r"position_ids of shape \[1, 7\]"),
        (rows(A) | {"attention_mask": torch.tensor([[-1, 0, 0, 0, 0, 0, 0]])}, "a number below 0"),
        (rows(A, A) | {"cu_seq_lens_q": ENDS}, "cu_seq_lens_q for a batch of one row"),
        (rows(A) | {"labels": torch.tensor([1])}, r"labels of shape \[1, 7\]"),
        ({"labels": torch.tensor([1])}, "expected input_ids in a batch, got labels"),
        ({"input_ids": [A], "labels": [A]}, "expected input_ids as a tensor .* got a list"),
        (with_labels(rows(A)) | {"weights": torch.full((1, 7), -1.0)}, "expected weights >= 0, got a negative number"),
    ],
)
def test_what_has_no_plain_meaning_is_refused(batch: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Distiller(make_llama(), None, [Labels()]).step(batch)


def test_padding_that_only_a_mask_would_mark_is_refused() -> None:
    """Labels of -100 keep it out of means over tokens alone."""
    ids = torch.tensor([[*A, 1, 1, 1, 1], [1, 1, 1, 1, *A]])
    batch = {"input_ids": ids, "labels": ids.masked_fill(ids == 1, -100)}
    behind, in_front = ({name: values[row][None] for name, values in batch.items()} for row in (0, 1))
    plain, layers = [Labels()], [Labels(), Hidden(LayerMap.explicit([(-1, -1)]))]
    assert Distiller(make_llama(), None, plain).step(behind).loss.isfinite()
    for terms, refused in ((plain, in_front), (layers, behind)):
        with pytest.raises(DataError, match="expected an attention_mask, got none in a batch"):
            Distiller(make_llama(), make_llama(seed=1), terms).step(refused)


def test_rows_with_one_label_are_not_packed() -> None:
    packed = {"input_ids": torch.tensor([[*B, *B]]), "position_ids": torch.tensor([[0, 1, 2] * 2])}
    with pytest.raises(DataError, match="one sequence in each of 1 rows, got 2"):
        right_padded(packed | {"labels": torch.tensor([1])}, "classification")
    with pytest.raises(DataError, match="expected labels for the task masked, got none"):
        right_padded(packed, "masked")


def test_columns_that_are_not_read_are_refused_or_named(caplog: pytest.LogCaptureFixture) -> None:
    distiller = Distiller(make_llama(), None, [Labels()])
    with pytest.raises(ShapeError, match="without inputs_embeds"):
        distiller.step(padded(0) | {"inputs_embeds": torch.zeros(3, 7, 16)})
    with pytest.raises(ShapeError, match="without loss_mask"):
        distiller.step(padded(0) | {"loss_mask": torch.ones(3, 7)})
    with caplog.at_level(logging.WARNING):
        distiller.step(padded(0) | {"source": torch.zeros(3)})
    assert "columns of a batch that models and terms do not read: source" in caplog.text
    gpt2 = Distiller(families.model("gpt2"), None, [Labels()])
    types = torch.zeros(3, 7).long()
    gpt2.step(padded(0) | {"token_type_ids": types})
    with pytest.raises(ShapeError, match="without token_type_ids"):
        gpt2.step(padded(0) | {"token_type_ids": types + 1})


EXAMPLES = [{"input_ids": ids} for ids in (A, B, C)]
TOKENIZER = make_tokenizer()
COLLATORS = {
    "own": PaddingCollator(TOKENIZER.pad_token_id),
    "language modeling": DataCollatorForLanguageModeling(TOKENIZER, mlm=False),
    "padding": DataCollatorWithPadding(TOKENIZER),
    "flattening": DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True),
    "sequence to sequence": DataCollatorForSeq2Seq(TOKENIZER),
}


@pytest.mark.parametrize("name", COLLATORS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.filterwarnings("ignore:.*fast tokenizer.*")
def test_collators_of_transformers(name: str, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TOKENIZER, "padding_side", side)
    student, teacher = make_llama(hidden_size=8), make_llama(seed=1)
    examples = [dict(example) for example in EXAMPLES]
    if name == "sequence to sequence":
        examples = [example | {"labels": example["input_ids"]} for example in examples]
    distiller = Distiller(student, teacher, [Logits(ForwardKL()), Labels(weight=0.5)]).eval()
    assert distiller.step(COLLATORS[name](examples)).loss.item() == pytest.approx(expected(student, teacher), rel=1e-5)


def test_examples_with_padding_and_packed_ones() -> None:
    collate = PaddingCollator(1)
    padding = {"input_ids": [1, 1, *B], "attention_mask": [0, 0, 1, 1, 1], "labels": [-100, -100, *B]}
    plain = {"input_ids": C, "attention_mask": [1] * 5, "labels": C}
    batch = collate([padding, plain])
    assert batch["input_ids"].tolist() == [[*B, 1, 1], C]
    assert batch["labels"].tolist() == [[*B, -100, -100], C]
    packed = {"input_ids": [*A, *B], "seq_lengths": [7, 3]}
    assert collate([packed])["input_ids"].tolist() == [A, [*B, 0, 0, 0, 0]]
    assert collate([{"input_ids": torch.tensor(A), "labels": torch.tensor(A)}])["labels"].tolist() == [A]


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([{"input_ids": A, "labels": A}, {"input_ids": B}], "the column labels in every example of a batch or in none"),
        ([{"input_ids": A, "labels": A}, {"input_ids": B, "labels": None}], "the column labels in every example"),
        ([{"input_ids": A}, {"text": "a"}], "expected input_ids in every example of a batch, got text"),
        ([{"input_ids": A, "labels": B}], "expected labels for each of the 7 input_ids, got 3"),
        ([{"input_ids": A, "seq_lengths": [3, 3]}], "expected seq_lengths for each of the 7 input_ids, got 6"),
        ([{"input_ids": [*A, 1, 1]}], "several pad tokens"),
    ],
)
def test_examples_that_do_not_fit_are_refused(examples: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        PaddingCollator(1)(examples)
