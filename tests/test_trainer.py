"""The step and the trainer: normalised once, whatever the batches, the padding and the ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from conftest import make_batch, make_llama
from potstill.data.batches import PaddingCollator
from potstill.errors import DivergedError, ShapeError, UserError
from potstill.losses.divergences import ForwardKL, ReverseKL
from potstill.losses.schedule import linear
from potstill.losses.targets import DenseTargets
from potstill.losses.token_losses import token_divergence
from potstill.train.arguments import DistillationConfig
from potstill.train.checkpoints import fill_states, last_checkpoint
from potstill.train.distiller import Distiller
from potstill.train.objective import Objective
from potstill.train.terms.logits import Labels, Logits
from potstill.train.trainer import DistillationTrainer
from processes import shard_on_cpu, two_ranks

# transformers renamed it.
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in DistillationConfig.__dataclass_fields__
)


def dataset(rows: int = 16) -> Dataset:
    """Rows of unequal length, the beginning of each not counting."""
    generator = torch.Generator().manual_seed(7)
    examples = []
    for _ in range(rows):
        ids = torch.randint(2, 300, (int(torch.randint(4, 14, (), generator=generator)),), generator=generator).tolist()
        examples.append({"input_ids": ids, "labels": [-100, *ids[1:]]})
    return Dataset.from_list(examples)


def trainer(
    folder: Path,
    objective: Any = None,
    teacher: Any = "toy",
    student: Any = None,
    vocabulary: int | None = None,
    rollout: Any = None,
    prefetch: bool = False,
    **changes: Any,
) -> DistillationTrainer:
    arguments = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        **changes,
    }
    return DistillationTrainer(
        student=student or make_llama(hidden_size=8, layers=1),
        teacher=make_llama(seed=1) if teacher == "toy" else teacher,
        vocabulary=vocabulary,
        rollout=rollout,
        prefetch=prefetch,
        objective=objective or [Logits(ForwardKL(), temperature=2.0), Labels(weight=0.5)],
        args=DistillationConfig(**arguments),
        train_dataset=dataset(),
        eval_dataset=dataset(6),
        data_collator=PaddingCollator(1),
    )


def weights(one: DistillationTrainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in one.distiller.student.parameters()])


def losses(one: DistillationTrainer) -> list[float]:
    return [line["loss"] for line in one.state.log_history if "loss" in line]


def test_step_is_the_formula() -> None:
    student, teacher, batch = make_llama(hidden_size=8), make_llama(seed=1), make_batch()
    output = Distiller(student, teacher, [Logits(ReverseKL(), weight=0.7, temperature=2.0), Labels(weight=0.3)]).step(
        batch
    )
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    q, p = student(**inputs).logits[:, :-1], teacher(**inputs).logits[:, :-1]
    counts = batch["labels"][:, 1:] != -100
    kl = token_divergence(q[counts], DenseTargets(p[counts]), ReverseKL(), temperature=2.0).mean()
    ce = torch.nn.functional.cross_entropy(q[counts], batch["labels"][:, 1:][counts])
    torch.testing.assert_close(output.loss, 0.7 * 4 * kl + 0.3 * ce)
    torch.testing.assert_close(output.logs["logits"], 4 * kl.detach())
    torch.testing.assert_close(output.logs["labels"], ce.detach())


def test_only_the_student_is_trained_and_saved() -> None:
    distiller = Distiller(make_llama(hidden_size=8), make_llama(seed=1), [Logits(ForwardKL())])
    assert all(name.startswith("student.") for name in distiller.state_dict())
    distiller.step(make_batch()).loss.backward()
    assert all(p.grad is not None for p in distiller.parameters())
    assert all(p.grad is None and not p.requires_grad for p in distiller.teacher.model.parameters())
    assert not distiller.teacher.model.training


def test_training_lowers_the_loss_in_a_loop_of_ones_own() -> None:
    distiller = Distiller(make_llama(hidden_size=8), make_llama(seed=1), [Logits(ForwardKL())])
    optimizer, batch = torch.optim.Adam(distiller.parameters(), lr=1e-2), make_batch()
    seen = []
    for _ in range(20):
        loss = distiller.step(batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.item())
    assert seen[-1] < 0.7 * seen[0]


def test_schedules_follow_the_steps() -> None:
    student, teacher, batch = make_llama(hidden_size=8), make_llama(seed=1), make_batch()
    distiller = Distiller(student, teacher, [Logits(ForwardKL(), weight=linear(1.0, 0.0, 2))])
    seen = [distiller.step(batch).loss.item() for _ in range(3)]
    assert seen == pytest.approx([seen[0], seen[0] / 2, 0.0])
    assert distiller(batch, at=1).loss.item() == pytest.approx(seen[1])
    distiller.eval()
    assert "cross_entropy" in distiller.step(batch).logs


def test_terms_of_one_kind_have_their_own_logs() -> None:
    objective = [Logits(ForwardKL()), Logits(ReverseKL()), Labels()]
    distiller = Distiller(make_llama(hidden_size=8), make_llama(seed=1), objective)
    assert set(distiller.step(make_batch()).logs) == {"logits_0", "logits_1", "labels"}


def test_a_padded_head_is_sliced_before_the_normaliser() -> None:
    student, teacher, batch = make_llama(hidden_size=8), make_llama(seed=1), make_batch()
    padded = make_llama(seed=1, vocab_size=320)
    with torch.no_grad():
        for key, value in teacher.state_dict().items():
            target = padded.state_dict()[key]
            target[: value.shape[0]] = value
    expected = Distiller(student, teacher, [Logits(ForwardKL())]).step(batch).loss
    found = Distiller(student, padded, [Logits(ForwardKL())], vocabulary=300).step(batch).loss
    torch.testing.assert_close(found, expected)


def test_a_batch_without_a_counting_token_gives_zero() -> None:
    batch = make_batch()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    distiller = Distiller(make_llama(hidden_size=8), make_llama(seed=1), [Logits(ForwardKL()), Labels()])
    loss = distiller.step(batch).loss
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in distiller.parameters())


def test_objectives_that_cannot_be() -> None:
    with pytest.raises(ShapeError, match="at least one term"):
        Objective([])
    with pytest.raises(ShapeError, match="expected a teacher"):
        Distiller(make_llama(), None, [Logits(ForwardKL())])
    with pytest.raises(UserError, match="label_smoothing_factor"):
        DistillationConfig(output_dir="x", label_smoothing_factor=0.1)


def test_accumulation_equals_one_batch(tmp_path: Path) -> None:
    whole, parts = (
        trainer(tmp_path / "a"),
        trainer(tmp_path / "b", per_device_train_batch_size=2, gradient_accumulation_steps=4),
    )
    whole.train()
    parts.train()
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)
    torch.testing.assert_close(weights(parts), weights(whole), rtol=1e-4, atol=1e-5)


def test_padding_does_not_matter(tmp_path: Path) -> None:
    class WideCollator:
        def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
            batch = PaddingCollator(1)(rows)
            wide = {"input_ids": 1, "attention_mask": 0, "labels": -100}
            return {name: torch.nn.functional.pad(value, (0, 9), value=wide[name]) for name, value in batch.items()}

    plain, padded = trainer(tmp_path / "a"), trainer(tmp_path / "b")
    padded.data_collator = WideCollator()
    plain.train()
    padded.train()
    assert losses(padded) == pytest.approx(losses(plain), rel=1e-5)
    torch.testing.assert_close(weights(padded), weights(plain), rtol=1e-4, atol=1e-5)


def _on_a_rank(folder: Path) -> None:
    one = trainer(folder, per_device_train_batch_size=4)
    one.train()
    metrics, unlabelled = one.evaluate(), one.evaluate(dataset(6).remove_columns("labels"))
    if one.is_world_process_zero():
        seen = {"weights": weights(one), "losses": losses(one), "eval": metrics["eval_loss"]}
        seen["unlabelled"] = unlabelled["eval_loss"]
        torch.save(seen, folder / "out.pt")


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    two_ranks(tmp_path, _on_a_rank, tmp_path)
    one = trainer(tmp_path / "a")
    one.train()
    two = torch.load(tmp_path / "out.pt", weights_only=True)
    assert two["losses"] == pytest.approx(losses(one), rel=1e-5)
    torch.testing.assert_close(two["weights"], weights(one), rtol=1e-4, atol=1e-5)
    assert two["eval"] == pytest.approx(one.evaluate()["eval_loss"], rel=1e-5)
    assert two["unlabelled"] == pytest.approx(two["eval"], rel=1e-5)  # each of their tokens is a target, too


TIED: dict[str, Any] = {"hidden_size": 8, "layers": 2, "tie_word_embeddings": True}


def _sharded(folder: Path) -> None:
    shard_on_cpu()
    config = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    one = trainer(
        folder, student=make_llama(**TIED), per_device_train_batch_size=4, fsdp=True, fsdp_config=config
    )  # fmt: skip
    one.train()
    assert isinstance(next(one.distiller.parameters()), DTensor)
    metrics = one.evaluate()
    one.save_model(str(folder / "student"))
    if one.is_world_process_zero():
        torch.save({"losses": losses(one), "eval": metrics["eval_loss"]}, folder / "out.pt")


def test_a_sharded_student_with_tied_embeddings_equals_a_whole_one(tmp_path: Path) -> None:
    """FSDP2."""
    two_ranks(tmp_path, _sharded, tmp_path)
    two = torch.load(tmp_path / "out.pt", weights_only=True)
    one = trainer(tmp_path / "a", student=make_llama(**TIED))
    one.train()
    assert two["losses"] == pytest.approx(losses(one), rel=1e-5)
    assert two["eval"] == pytest.approx(one.evaluate()["eval_loss"], rel=1e-5)
    exported = type(one.distiller.student).from_pretrained(tmp_path / "student")
    for name, parameter in one.distiller.student.named_parameters():
        torch.testing.assert_close(exported.get_parameter(name), parameter, rtol=1e-4, atol=1e-5)


def test_evaluation_is_a_mean_over_tokens(tmp_path: Path) -> None:
    small, large = (trainer(tmp_path / "a", per_device_eval_batch_size=n).evaluate() for n in (1, 6))
    assert small["eval_loss"] == pytest.approx(large["eval_loss"], rel=1e-5)
    assert small["eval_cross_entropy"] == pytest.approx(large["eval_labels"], rel=1e-5)
    assert small["eval_loss"] == pytest.approx(small["eval_logits"] + 0.5 * small["eval_labels"], rel=1e-5)


def test_logged_terms_add_up_to_the_loss(tmp_path: Path) -> None:
    one = trainer(tmp_path, logging_steps=2, max_steps=4, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    one.train()
    lines = [line for line in one.state.log_history if "loss" in line]
    assert len(lines) == 2
    for line in lines:
        assert line["loss"] == pytest.approx(line["logits"] + 0.5 * line["labels"], rel=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"bf16": True},
        {CHECKPOINTING: True},
        {"torch_compile": False, "optim": "sgd"},
        {"weight_decay": 0.1, "max_grad_norm": 0.1, "neftune_noise_alpha": 1.0},
        {"lr_scheduler_type": "cosine", "warmup_steps": 1},
    ],
    ids=str,
)
def test_training_arguments_work(tmp_path: Path, changes: dict[str, Any]) -> None:
    one = trainer(tmp_path, **changes)
    before = weights(one).clone()
    one.train()
    assert all(torch.isfinite(torch.tensor(losses(one))))
    assert not torch.equal(weights(one), before)


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    arguments = {
        "max_steps": 7,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 1,
        "bf16": True,
    }
    whole = trainer(tmp_path / "a", per_device_train_batch_size=4, **arguments)
    whole.train()

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 5

    stopped = trainer(tmp_path / "b", per_device_train_batch_size=4, **arguments)
    stopped.add_callback(Stop())
    stopped.train()
    (tmp_path / "b" / "checkpoint-6").mkdir(exist_ok=True)  # what a kill in the middle of saving leaves
    (tmp_path / "b" / "checkpoint-6" / "trainer_state.json").write_text('{"epoch": 1')
    (tmp_path / "b" / "checkpoint-mine").mkdir()
    assert last_checkpoint(tmp_path / "b") is not None
    resumed = trainer(tmp_path / "b", per_device_train_batch_size=4, **arguments)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 7
    assert torch.equal(weights(resumed), weights(whole))


def test_resume_without_a_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="complete checkpoint"):
        trainer(tmp_path).train(resume_from_checkpoint=True)


def test_a_checkpoint_is_a_plain_student(tmp_path: Path) -> None:
    one = trainer(tmp_path, save_strategy="steps", save_steps=3)
    one.train()
    saved = type(one.distiller.student).from_pretrained(tmp_path / "checkpoint-3")
    assert torch.equal(torch.cat([p.detach().flatten() for p in saved.parameters()]), weights(one))
    assert not (tmp_path / "checkpoint-3" / "training_args.bin").exists()


def test_a_training_leaves_the_config_as_it_is(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.save_model(str(tmp_path / "saved"))
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["use_cache"] is True


def test_the_best_model_is_loaded(tmp_path: Path) -> None:
    one = trainer(
        tmp_path, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1,
        load_best_model_at_end=True, metric_for_best_model="eval_cross_entropy", learning_rate=0.5,
    )  # fmt: skip
    one.train()
    lines = [line for line in one.state.log_history if "eval_cross_entropy" in line]
    best = min(line["eval_cross_entropy"] for line in lines)
    assert one.evaluate()["eval_cross_entropy"] == pytest.approx(best, rel=1e-5)


def test_nan_stops_with_step_and_batch_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    class Poison(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 2:
                next(model.parameters()).data.fill_(float("nan"))

    one = trainer(tmp_path, save_strategy="steps", save_steps=1, save_total_limit=1)
    one.add_callback(Poison())
    with pytest.raises(DivergedError, match=r"loss nan in batch 1 of the step \(optimiser step 3\).*checkpoint-2"):
        one.train()
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2


def test_no_checkpoint_with_nan_weights(tmp_path: Path) -> None:
    class Poison(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 2:
                next(model.parameters()).data.fill_(float("nan"))

    one = trainer(tmp_path, save_strategy="steps", save_steps=1, save_total_limit=1)
    one.add_callback(Poison())
    with pytest.raises(DivergedError, match="a NaN or infinite weight in student"):
        one.train()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-1"


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.RMSprop])
def test_each_trained_weight_gets_a_state_and_none_changes(kind: Any) -> None:
    used, unused, frozen = (torch.nn.Parameter(torch.ones(3)) for _ in range(3))
    frozen.requires_grad_(False)
    optimizer = kind([{"params": [used, frozen]}, {"params": [unused], "weight_decay": 0.5}], lr=0.1)
    used.grad = torch.ones(3)
    optimizer.step()
    expected, state = used.detach().clone(), {key: value.clone() for key, value in optimizer.state[used].items()}
    fill_states(optimizer)
    assert optimizer.state[unused].keys() == state.keys()
    assert frozen not in optimizer.state
    torch.testing.assert_close(used.detach(), expected, rtol=0, atol=0)
    torch.testing.assert_close(unused.detach(), torch.ones(3), rtol=0, atol=0)
    torch.testing.assert_close(dict(optimizer.state[used]), state, rtol=0, atol=0)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.1]
    assert used.grad is not None
    assert unused.grad is None
