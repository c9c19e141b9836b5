"""Packed rows: models read them side by side, and every number is that of padded rows."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import families
from conftest import make_llama, make_tokenizer, mostly_slow
from potstill.data.batches import PaddingCollator
from potstill.data.packing import PackedRows, best_fit
from potstill.errors import DataError, ModelError, ShapeError, UserError
from potstill.losses.alignment import align
from potstill.losses.divergences import ForwardKL
from potstill.models import split
from potstill.models.adapters import Lora, Prompt, adapt
from potstill.models.capture import Activations, Vectors
from potstill.models.packing import PACKED_LENGTH, PackedLayout, packed
from potstill.models.packing_probe import packing_mistake
from potstill.teachers.crosstok import CrossTokenizerTeacher
from potstill.teachers.model import ModelTeacher
from potstill.teachers.privileged import PrivilegedTeacher
from potstill.teachers.self_taught import BaseModelTeacher
from potstill.train.arguments import DistillationConfig
from potstill.train.distiller import Distiller
from potstill.train.terms.across import Chunks
from potstill.train.terms.layers import Attention, Hidden, Relations, Similarity
from potstill.train.terms.logits import Labels, Logits
from potstill.train.terms.routers import RouterBalance
from potstill.train.terms.supervision import DeepSupervision
from potstill.train.terms.term import Term
from potstill.train.trainer import DistillationTrainer

LENGTH = 12
LENGTHS = (7, 1, 12, 4, 3, 9, 2)  # one token, exactly LENGTH, and what shares a packed row


def make_rows(lengths: tuple[int, ...] = LENGTHS, vocabulary: int = 100) -> list[dict[str, Any]]:
    """Rows whose first third are no targets; the fifth has none at all."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number, length in enumerate(lengths):
        ids = torch.randint(3, vocabulary, (length,), generator=generator).tolist()
        prompt = length if number == 4 else length // 3
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def strong(model: Any) -> Any:
    """A model whose layers change its outputs more than its embeddings do."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4 if weight.ndim > 1 else 1)
    return model


def step(student: Any, teacher: Any, terms: list[Term], length: int | None, rows: list[dict[str, Any]], **options: Any):
    """The loss, the logs and all gradients of one training step without dropout."""
    distiller = Distiller(student, teacher, terms, packed_length=length, **options).train()
    distiller.student.eval()
    distiller.zero_grad()
    output = distiller.step(PaddingCollator(0)(rows))
    output.loss.backward()
    named = distiller.named_parameters()
    return output.loss.item(), output.logs, {n: p.grad.clone() for n, p in named if p.grad is not None}


def compare(student: Any, teacher: Any, terms: list[Term], rows: Any = None, tolerance: float = 1e-6) -> None:
    """Check that packed and padded rows give the same loss, logs and gradients."""
    torch.manual_seed(0)  # of what terms train
    loss, logs, gradients = step(student, teacher, terms, None, rows or make_rows())
    torch.manual_seed(0)
    other, other_logs, other_gradients = step(student, teacher, terms, LENGTH, rows or make_rows())
    assert other == pytest.approx(loss, rel=tolerance, abs=tolerance)
    assert {n: float(v) for n, v in other_logs.items()} == pytest.approx(
        {n: float(v) for n, v in logs.items()}, rel=tolerance, abs=tolerance
    )
    assert other_gradients.keys() == gradients.keys()
    norm = torch.stack([g.double().norm() for g in gradients.values()]).norm()
    difference = torch.stack([(other_gradients[n] - g).double().norm() for n, g in gradients.items()]).norm()
    assert difference <= tolerance * norm


FAST = ("llama", "gpt2", "gemma3_text", "mixtral", "gemma3n_text", "mamba", "gpt_oss", "bloom", "lfm2_moe")


@pytest.mark.parametrize("family", mostly_slow(families.walked("causal"), *FAST))
def test_every_family_reads_packed_rows_as_padded_ones_or_is_refused(family: str) -> None:
    if family == "reformer":
        pytest.skip("its gradient needs dropout")
    student, teacher = strong(families.model(family)), strong(families.model(family, seed=1))
    try:
        Distiller(student, teacher, [Labels()], packed_length=LENGTH)
    except ModelError as error:
        assert type(student).__name__ in str(error)
        assert "\n" not in str(error)
        assert family not in ("llama", "gpt2", "gemma3_text", "mixtral", "gemma3n_text")
        return
    assert family not in ("mamba", "gpt_oss", "bloom", "lfm2_moe")
    compare(student, teacher, [Logits(ForwardKL()), Labels(weight=0.5)])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_packed_rows_have_the_loss_of_each_row_alone(family: str) -> None:
    """In float64, with an independent reference."""
    student, teacher = (strong(families.model(family, seed=seed)).double() for seed in (0, 1))
    rows = make_rows()
    weighted = [{**row, "weights": [0.5 + i % 3 for i in range(len(row["input_ids"]))]} for row in rows]
    total = weight_sum = torch.zeros((), dtype=torch.float64)
    for row in weighted:
        ids, labels = (torch.tensor(row[name]) for name in ("input_ids", "labels"))
        w = torch.tensor(row["weights"]).double()[1:] * (labels[1:] != -100)
        p, q = (m(ids[None]).logits[0, :-1].log_softmax(-1) for m in (teacher, student))
        kl = (p.exp() * (p - q)).sum(-1)
        total = total + (w * (kl - 0.5 * q.gather(1, ids[1:, None])[:, 0])).sum()
        weight_sum = weight_sum + w.sum()
    mean = total / weight_sum
    mean.backward()
    expected = {n: p.grad.clone() for n, p in student.named_parameters()}
    loss, _, gradients = step(student, teacher, [Logits(ForwardKL()), Labels(weight=0.5)], LENGTH, weighted)
    assert loss == pytest.approx(mean.item(), rel=1e-7)  # weights are float32
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient.double(), expected[name.removeprefix("student.")], rtol=1e-6, atol=1e-9)


TERMS: dict[str, Term] = {
    "hidden": Hidden(),
    "attention": Attention(),
    "relations": Relations(heads=2),
    "similarity": Similarity(),
    "deep_supervision": DeepSupervision(layers=(0,)),
}


@pytest.mark.parametrize("name", TERMS)
def test_terms_over_layers_read_the_rows_of_packed_ones(name: str) -> None:
    compare(strong(make_llama()), strong(make_llama(seed=1)), [TERMS[name]])


def test_routers_of_experts_are_balanced_by_row() -> None:
    compare(strong(families.model("mixtral")), None, [Labels(), RouterBalance()])


def test_activations_move_back_to_their_rows() -> None:
    batch = PaddingCollator(0)(make_rows((3, 2, 4))) | {PACKED_LENGTH: torch.tensor(5)}
    layout = PackedLayout.of(batch)
    assert layout is not None
    assert layout.shape == (2, 5)
    values = torch.arange(10.0).view(2, 5, 1)
    maps = torch.arange(50.0).view(2, 1, 5, 5)
    inside = Activations({0: values}, {0: maps}, {0: Vectors(*[values] * 3)}, {0: values}, {0: values.view(1, 10, 1)})
    moved = inside.of_rows(layout, 4)
    by_row = torch.tensor([[0.0, 1, 2, 0], [3, 4, 0, 0], [5, 6, 7, 8]])
    assert torch.equal(moved.hidden[0][..., 0], by_row)
    assert torch.equal(moved.exits[0][..., 0], by_row)
    assert torch.equal(moved.vectors[0].keys[..., 0], by_row)
    assert torch.equal(moved.routers[0], by_row.view(1, 12, 1))
    expected = torch.zeros(3, 1, 4, 4)
    expected[0, :, :3, :3], expected[1, :, :2, :2] = maps[0, :, :3, :3], maps[0, :, 3:, 3:]
    expected[2] = maps[1, :, :4, :4]
    assert torch.equal(moved.attentions[0], expected)


def test_a_row_ends_without_a_target() -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8, 9], "labels": [8, 9]}]
    batch = PaddingCollator(0)(rows) | {PACKED_LENGTH: torch.tensor(5)}
    columns, alignment = packed(batch, align(batch["labels"]))
    assert columns["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert columns["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert (alignment.positions.tolist(), alignment.labels.tolist()) == ([0, 1, 3], [6, 7, 9])


def test_flash_attention_reads_one_row_without_padding() -> None:
    """It finds sequences in a batch of one row alone, whatever its length."""
    model = make_llama()
    model.config._attn_implementation = "flash_attention_2"
    batch = PaddingCollator(0)(make_rows()) | {PACKED_LENGTH: torch.tensor(LENGTH)}
    columns, _ = packed(batch, align(batch["labels"]), flat=split.flattens(model))
    assert columns["input_ids"].shape == (1, sum(LENGTHS))
    assert int((columns["position_ids"] == 0).sum()) == len(LENGTHS)


# Which models


def test_a_teacher_that_does_not_keep_rows_apart_reads_them_padded(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        compare(strong(families.model("llama")), strong(families.model("mamba")), [Logits(ForwardKL())])
    assert "MambaForCausalLM" in caplog.text


def test_adapters_with_virtual_tokens_are_refused() -> None:
    with pytest.raises(ModelError, match="virtual tokens in front of a whole packed row"):
        Distiller(adapt(make_llama(), Prompt(virtual_tokens=2)), None, [Labels()], packed_length=LENGTH)


def test_students_with_lora_read_packed_rows() -> None:
    student = adapt(strong(make_llama()), Lora(rank=2, alpha=4))
    with torch.no_grad():
        for name, weight in student.named_parameters():
            weight.normal_(std=0.3) if "lora" in name else None
    compare(student, BaseModelTeacher(), [Logits(ForwardKL()), Hidden()])


def test_attention_scaled_by_the_place_in_a_row_is_refused_where_it_shows() -> None:
    model = families.model("llama4_text", floor_scale=32)
    assert packing_mistake(model, None, 31) is None
    assert "from 32 tokens on" in str(packing_mistake(model, None, 32))


def test_a_model_that_fails_on_packed_rows_is_refused() -> None:
    class NoPositions(nn.Module):
        config = make_llama().config

        def __init__(self) -> None:
            super().__init__()
            self.inner = make_llama()

        def get_input_embeddings(self) -> nn.Module:
            return self.inner.get_input_embeddings()

        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False) -> Any:
            return self.inner(input_ids, attention_mask)

    assert "fails on packed rows" in str(packing_mistake(NoPositions(), None, LENGTH))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_half_precision_are_packed(dtype: torch.dtype) -> None:
    assert packing_mistake(strong(make_llama(layers=8)).to(dtype), None, LENGTH) is None
    assert packing_mistake(strong(families.model("mamba")).to(dtype), None, LENGTH) is not None


@pytest.mark.parametrize("family", ["bloom", "falcon_h1", "recurrent_gemma", "mixtral"])
def test_in_half_precision_a_row_that_sees_others_is_told_from_rounding(family: str) -> None:
    """Of small random weights these see 0.1% to 15% of the rows beside them, and a unit of bfloat16 is 0.8%."""
    mistake = packing_mistake(families.model(family).bfloat16(), None, LENGTH)
    assert (mistake is None) == (family == "mixtral")
    assert "%" in (mistake or "%")


def test_roundings_of_the_batch_are_no_mistake() -> None:
    """As of experts and int8, where a token's value depends on how many others go the same way."""
    model = strong(make_llama()).bfloat16()
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits * (1 + 0.01 * (inputs[0].sum() % 1)))
    assert packing_mistake(model, None, LENGTH) is None


def test_other_tasks_are_not_packed() -> None:
    with pytest.raises(ShapeError, match="expected the task causal, got masked"):
        Distiller(make_llama(), None, [Labels()], task="masked", packed_length=LENGTH)


# Which teachers


def test_teachers_with_rows_of_their_own_pack_them(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    run = split.run
    teacher = strong(make_llama(seed=1))

    def spy(module: nn.Module, batch: Any) -> Any:
        if module in (teacher, teacher.model):
            shapes.append(tuple(batch["input_ids"].shape))
        return run(module, batch)

    monkeypatch.setattr(split, "run", spy)
    tokenizer = make_tokenizer()
    other = CrossTokenizerTeacher(teacher, tokenizer, tokenizer)
    compare(strong(make_llama()), other, [Chunks()], tolerance=2e-6)
    prompted = [
        {**row, "teacher_input_ids": [9, 8, *row["input_ids"]], "teacher_labels": [-100, -100, *row["labels"]]}
        for row in make_rows((4, 5, 3, 6))
    ]
    teacher.double()
    compare(strong(make_llama()).double(), PrivilegedTeacher(ModelTeacher(teacher)), [Logits(ForwardKL())], prompted)
    assert (4, LENGTH) in shapes  # of seven rows
    assert (3, LENGTH) in shapes  # of four


def test_the_teacher_runs_ahead_on_packed_rows() -> None:
    student, teacher, rows = strong(make_llama()), strong(make_llama(seed=1)), make_rows()
    distiller = Distiller(student, teacher, [Logits(ForwardKL())], prefetch=True, packed_length=LENGTH).train()
    batches = [PaddingCollator(0)(rows), PaddingCollator(0)(rows[:3])]
    distiller.prefetch(batches)
    losses = [distiller.step(batch).loss.item() for batch in batches]
    distiller.prefetch(())
    plain = Distiller(student, teacher, [Logits(ForwardKL())]).train()
    assert losses == pytest.approx([plain.step(batch).loss.item() for batch in batches], rel=1e-5)


# Bins


def test_bins_hold_every_row_once_and_no_more_than_they_may() -> None:
    lengths = np.random.default_rng(0).integers(1, 65, 500)
    rows = [{"input_ids": [i] * int(n), "labels": [i] * int(n)} for i, n in enumerate(lengths)]
    bins = PackedRows(rows, 64, seed=3)
    epochs = []
    for epoch in (0, 1, 0):
        bins.set_epoch(epoch)
        numbers = [bins.numbers(i) for i in range(len(bins))]
        assert sorted(row for bin_ in numbers for row in bin_) == [*range(500)]
        assert max(sum(int(lengths[row]) for row in bin_) for bin_ in numbers) <= 64
        epochs.append(numbers)
    assert epochs[0] == epochs[2]
    assert epochs[0] != epochs[1]
    assert [len(b) for b in epochs[0]] == [len(b) for b in epochs[1]]
    assert len(bins) <= lengths.sum() / 64 * 1.1
    other = PackedRows(rows, 64, seed=4)
    assert [other.numbers(i) for i in range(len(other))] != epochs[0]
    assert [row["input_ids"][0] for row in bins[-1]["packed_rows"]] == bins.numbers(len(bins) - 1)
    with pytest.raises(IndexError):
        bins[len(bins)]


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [([], []), ([5], [0]), ([5, 5], [0, 1]), ([9, 1, 1], [0, 1, 1]), ([4, 3, 2, 1, 1], [0, 1, 1, 0, 2])],
)
def test_best_fit(lengths: list[int], expected: list[int]) -> None:
    assert best_fit(lengths, 5).tolist() == expected


def test_packed_rows_of_a_batch_fit_into_as_many_rows() -> None:
    """Models fill rows in order, and so never need more of them than the batch had."""
    rows = make_rows(tuple(np.random.default_rng(1).integers(1, 30, 200).tolist()))
    bins = PackedRows(rows, 30)
    for first in range(0, len(bins), 4):
        chosen = [bins[i] for i in range(first, min(first + 4, len(bins)))]
        batch = PaddingCollator(0)(chosen) | {PACKED_LENGTH: torch.tensor(30)}
        layout = PackedLayout.of(batch)
        assert layout is not None
        assert layout.shape[0] <= len(chosen)
        assert layout.shape[1] <= 30


def test_the_saving_is_measured() -> None:
    rows = [{"input_ids": [1] * n} for n in [10] * 50 + [30] * 50]
    padded, filled = PackedRows(rows, 40).shares(8)
    assert filled == 1.0
    assert padded == pytest.approx(20 / 30, abs=0.02)


# The trainer


def make_trainer(folder: Any, train: Any, packing: bool = True, **arguments: Any) -> DistillationTrainer:
    values = {"max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1}
    args = DistillationConfig(
        output_dir=str(folder), max_length=24, packing=packing, disable_tqdm=True, save_steps=5, **values | arguments
    )
    return DistillationTrainer(
        make_llama(),
        make_llama(seed=1),
        [Logits(ForwardKL()), Labels()],
        args,
        train,
        processing_class=make_tokenizer(),
    )


TRAINED = make_rows(tuple(np.random.default_rng(2).integers(2, 24, 14).tolist()))


@pytest.mark.slow
def test_a_packed_training_is_resumed_within_an_epoch(tmp_path: Any) -> None:
    constant = {"lr_scheduler_type": "constant", "per_device_train_batch_size": 1}
    reference = make_trainer(tmp_path / "reference", TRAINED, **constant, save_strategy="no", max_steps=12)
    assert 8 <= len(reference.train_dataset) <= 9  # of 14 rows: the second epoch has begun
    reference.train()
    make_trainer(tmp_path / "killed", TRAINED, **constant, max_steps=10).train()
    resumed = make_trainer(tmp_path / "killed", TRAINED, **constant, max_steps=12)
    resumed.train(resume_from_checkpoint=True)
    for a, b in zip(reference.distiller.parameters(), resumed.distiller.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_packed_step_is_the_step_of_its_rows(tmp_path: Any) -> None:
    """Over accumulated batches, against one step on the same rows, padded, in one batch."""
    trainer = make_trainer(tmp_path, TRAINED, max_steps=1, gradient_accumulation_steps=3, per_device_train_batch_size=1)
    seen: list[dict[str, Tensor]] = []
    collate = trainer.data_collator
    trainer.data_collator = lambda examples: seen.append(collate(examples)) or seen[-1]
    trainer.train()
    batches = seen[:3]
    rows = [
        {name: batch[name][i][batch["attention_mask"][i] > 0].tolist() for name in ("input_ids", "labels")}
        for batch in batches
        for i in range(len(batch["input_ids"]))
    ]
    loss = step(make_llama(), make_llama(seed=1), [Logits(ForwardKL()), Labels()], None, rows, vocabulary=300)[0]
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-5)


def test_held_out_rows_are_padded(tmp_path: Any) -> None:
    figures = [make_trainer(tmp_path, TRAINED, packing=p).evaluate(TRAINED) for p in (True, False)]
    assert figures[0]["eval_loss"] == figures[1]["eval_loss"]


@pytest.mark.parametrize("wrong", ["stream", "collator", "sampler"])
def test_what_cannot_be_packed_is_refused(wrong: str, tmp_path: Any) -> None:
    if wrong == "stream":
        with pytest.raises(DataError, match="packing: expected a data set with a length"):
            PackedRows(iter(TRAINED), 8)
    elif wrong == "sampler":
        with pytest.raises(UserError, match="train_sampling_strategy"):
            make_trainer(tmp_path, TRAINED, train_sampling_strategy="group_by_length")
    else:
        args = DistillationConfig(output_dir=str(tmp_path), packing=True)
        with pytest.raises(UserError, match="data_collator: expected none with packing"):
            DistillationTrainer(make_llama(), None, [Labels()], args, TRAINED, data_collator=lambda rows: rows)


def test_gradient_checkpointing_reads_packed_rows() -> None:
    student = strong(make_llama())
    plain = step(student, make_llama(seed=1), [Logits(ForwardKL())], LENGTH, make_rows())
    distiller = Distiller(student, make_llama(seed=1), [Logits(ForwardKL())], packed_length=LENGTH).train()
    distiller.activation_checkpointing_enable()
    distiller.zero_grad()
    output = distiller.step(PaddingCollator(0)(make_rows()))
    output.loss.backward()
    assert output.loss.item() == pytest.approx(plain[0], rel=1e-6)
    for name, parameter in distiller.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[2][name], rtol=1e-4, atol=1e-7)
