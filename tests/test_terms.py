"""Terms that look inside: the formula over the attended positions, trained, saved, resumed and left behind."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback

from conftest import make_batch, make_llama
from potstill.errors import ModelError, ShapeError, UserError
from potstill.losses.alignment import Alignment, attended_positions
from potstill.losses.attention import (
    attention_divergence,
    attention_mse,
    head_overlap,
    match_heads,
    relation_divergence,
)
from potstill.losses.divergences import ForwardKL
from potstill.losses.hidden import hidden_mse, linear_cka
from potstill.losses.rkd import rkd_distance
from potstill.losses.targets import DenseTargets
from potstill.models.capture import ActivationRequest
from potstill.models.checksums import CHECKSUMS
from potstill.models.layer_map import LayerMap
from potstill.teachers.model import ModelTeacher
from potstill.teachers.teacher import Teacher, TeacherOutput
from potstill.train.distiller import Distiller
from potstill.train.objective import Objective
from potstill.train.terms.layers import Attention, Hidden, Relations, Similarity
from potstill.train.terms.logits import Labels, Logits
from potstill.train.trainer import DistillationTrainer
from processes import two_ranks
from test_trainer import CHECKPOINTING, losses, trainer, weights

STUDENT: dict[str, Any] = {"hidden_size": 8, "layers": 2}
TEACHER: dict[str, Any] = {"seed": 1, "layers": 4, "num_key_value_heads": 1}

# Each with what it is a mean over: positions, whose sums over batches add up, or batches.
BY_POSITION: dict[str, Any] = {
    "hidden": lambda: Hidden(),
    "hidden, mlp, l1": lambda: Hidden(LayerMap.last_k(), "l1", projection="mlp"),
    "hidden, cosine": lambda: Hidden(LayerMap.skip(2), "cosine"),
    "attention": lambda: Attention(),
    "attention, learned": lambda: Attention(LayerMap.last_k(), ForwardKL(), heads="learned"),
    "relations": lambda: Relations(),
    "relations, many": lambda: Relations(LayerMap.uniform(), ("values",), heads=5),
}
OF_BATCHES: dict[str, Any] = {
    "hidden, cka": lambda: Hidden(distance="cka"),
    "attention, entropy": lambda: Attention(heads="entropy"),
    "similarity": lambda: Similarity(),
    "similarity, angle": lambda: Similarity(LayerMap.explicit([(0, -2)]), "angle"),
    "similarity, distribution": lambda: Similarity(kind="distribution", temperature=0.5),
}
ALL = BY_POSITION | OF_BATCHES


def distiller(*terms: Any, student: Any = None) -> Distiller:
    return Distiller(student or make_llama(**STUDENT), make_llama(**TEACHER), list(terms))


def hidden_states(model: Any, batch: Mapping[str, Tensor], layer: int) -> Tensor:
    states = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True
    ).hidden_states
    return states[layer + 1]


@pytest.mark.parametrize("name", ALL)
def test_every_term_trains_the_student_and_its_own_alone(name: str) -> None:
    one = distiller(ALL[name]())
    assert isinstance(one.teacher, ModelTeacher)
    before = {key: value.clone() for key, value in one.teacher.model.state_dict().items()}
    optimizer, batch, seen = torch.optim.Adam(one.parameters(), lr=1e-2), make_batch(), []
    for _ in range(20):
        loss = one.step(batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.item())
    assert seen[-1] < 0.8 * seen[0]
    assert all(torch.equal(value, before[key]) for key, value in one.teacher.model.state_dict().items())


def test_hidden_is_its_formula_over_the_attended_positions() -> None:
    one, batch = distiller(Hidden(LayerMap.explicit([(0, 1)]), weight=0.5)), make_batch()
    assert isinstance(one.teacher, ModelTeacher)
    s = hidden_states(one.student, batch, 0)
    t = hidden_states(one.teacher.model, batch, 1)
    there = attended_positions(batch)
    assert there.sum() < there.numel()
    term = one.objective.trained[0]
    expected = hidden_mse(term.projections[0](s), t)[there].mean()
    output = one.step(batch)
    torch.testing.assert_close(output.loss, 0.5 * expected)
    torch.testing.assert_close(output.logs["hidden"], expected.detach())


def test_the_other_terms_are_their_formulas() -> None:
    batch = make_batch()
    there = attended_positions(batch)
    one = distiller(Attention(LayerMap.last_k()), Relations(), Similarity(), Hidden(LayerMap.last_k(), "cka"))
    found = one.step(batch).logs
    assert isinstance(one.teacher, ModelTeacher)
    _, student_activations = one._capture.capture(one._request, lambda: one.student(**_inputs(batch)))
    _, teacher_activations = one.teacher._capture.capture(
        one.teacher._needs, lambda: one.teacher.model(**_inputs(batch))
    )
    s, t = student_activations.attentions[1], teacher_activations.attentions[3]
    assert s.shape[1] == t.shape[1] == 2
    torch.testing.assert_close(found["attention"], attention_mse(s, t)[there].mean().detach())
    apart = [
        relation_divergence(a, b, there, 2)
        for a, b in zip(student_activations.vectors[1], teacher_activations.vectors[3], strict=True)
    ]
    torch.testing.assert_close(found["relations"], torch.stack(apart).mean(0)[there].mean().detach())
    a, b = student_activations.hidden[1], teacher_activations.hidden[3]
    pooled = [(x * there[..., None]).sum(1) / there.sum(1, keepdim=True) for x in (a, b)]
    kept = there.any(1)
    torch.testing.assert_close(found["similarity"], rkd_distance(*(x[kept] for x in pooled)).detach())
    torch.testing.assert_close(found["hidden"], 1 - linear_cka(a[there], b[there]).detach())


def _inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize(("student_heads", "teacher_heads"), [(2, 4), (4, 2), (2, 8)])
@pytest.mark.parametrize("heads", ["overlap", "entropy", "variance", "learned"])
def test_head_counts_may_differ(student_heads: int, teacher_heads: int, heads: Any) -> None:
    student, teacher = make_llama(**STUDENT), make_llama(**TEACHER)
    student = type(student)(_with_heads(student.config, student_heads))
    teacher = type(teacher)(_with_heads(teacher.config, teacher_heads))
    batch = make_batch()
    one = Distiller(student, teacher, [Attention(LayerMap.last_k(), ForwardKL(), heads=heads)])
    loss = one.step(batch).loss
    loss.backward()
    assert loss.item() > 0
    assert student.model.layers[1].self_attn.q_proj.weight.grad.abs().sum() > 0
    assert Distiller(student, teacher, [Relations(heads=1)]).step(batch).loss.item() > 0
    if heads == "overlap":
        _, a = one._capture.capture(one._request, lambda: student(**_inputs(batch)))
        _, b = one.teacher._capture.capture(one.teacher._needs, lambda: teacher(**_inputs(batch)))
        maps, _ = match_heads(b.attentions[3], head_overlap(student_heads, teacher_heads))
        torch.testing.assert_close(loss, attention_divergence(a.attentions[1], maps)[attended_positions(batch)].mean())


def test_heads_may_be_paired_by_hand() -> None:
    student, teacher = make_llama(**STUDENT), make_llama(**TEACHER)
    batch = make_batch()
    crossed = Distiller(student, teacher, [Attention(LayerMap.last_k(), heads=[(0, 1), (1, 1)])])
    _, a = crossed._capture.capture(crossed._request, lambda: student(**_inputs(batch)))
    _, b = crossed.teacher._capture.capture(crossed.teacher._needs, lambda: teacher(**_inputs(batch)))
    expected = attention_mse(a.attentions[1], b.attentions[3][:, [1, 1]])
    torch.testing.assert_close(crossed.step(batch).loss, expected[attended_positions(batch)].mean())
    raw = Distiller(student, teacher, [Attention(LayerMap.last_k(), normalize=False)])
    squares = (a.attentions[1] - b.attentions[3]).square().sum(-1).mean(1)
    torch.testing.assert_close(raw.step(batch).loss, squares[attended_positions(batch)].mean())
    with pytest.raises(ShapeError, match="expected normalize true with a divergence"):
        Attention(divergence=ForwardKL(), normalize=False)
    straight, overlap = (
        Distiller(student, teacher, [Attention(LayerMap.last_k(), heads=heads)])
        for heads in ([(0, 0), (1, 1)], "overlap")
    )
    torch.testing.assert_close(straight.step(batch).loss, overlap.step(batch).loss)


def _with_heads(config: Any, heads: int) -> Any:
    config.num_attention_heads = config.num_key_value_heads = heads
    config.head_dim = config.hidden_size // heads
    return config


def test_what_is_not_attended_does_not_matter() -> None:
    batch = make_batch()
    wide = {
        name: torch.nn.functional.pad(value, (0, 5), value={"labels": -100}.get(name, 0))
        for name, value in batch.items()
    }
    blank = {name: torch.cat([value, value[:1]]) for name, value in batch.items()}
    blank["labels"][-1] = -100
    for name, make in ALL.items():
        one = distiller(make())
        expected = one.step(batch).loss
        torch.testing.assert_close(one.step(wide).loss, expected, msg=f"{name}, padded")
        torch.testing.assert_close(one.step(blank).loss, expected, msg=f"{name}, with a row that does not count")


@pytest.mark.parametrize("name", ALL)
def test_a_batch_in_which_nothing_counts_gives_zero_and_finite_gradients(name: str) -> None:
    batch = make_batch()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    one = distiller(ALL[name](), Labels())
    loss = one.step(batch).loss
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in one.objective.parameters())
    assert all(p.grad is None or not p.grad.any() for p in one.student.parameters())


def test_only_layers_that_are_asked_for_are_kept_and_the_student_runs_once() -> None:
    one, batch = distiller(Logits(ForwardKL()), Labels(), Hidden(LayerMap.explicit([(0, 2)]))), make_batch()
    runs: list[Any] = []
    one.student.model.register_forward_hook(lambda *_: runs.append(1))
    kept: list[Any] = []
    plain = one.objective.forward
    one.objective.forward = lambda signals: (kept.append(signals), plain(signals))[1]  # type: ignore[method-assign]
    one.step(batch)
    (signals,) = kept
    assert one.split is not None
    assert len(runs) == 1
    assert list(signals.inside.hidden) == [0]
    assert list(signals.teacher.inside.hidden) == [2]
    assert not signals.inside.attentions
    assert not signals.inside.vectors
    assert one.student.config._attn_implementation == "sdpa"


def test_all_terms_together_are_the_sum() -> None:
    torch.manual_seed(3)
    together = distiller(Logits(ForwardKL()), Labels(weight=0.5), *(make() for make in ALL.values()))
    output = together.step(make_batch())
    parts = dict(zip(together.objective.names, together.objective.terms, strict=True))
    total = sum(float(value) * parts[name].weight for name, value in output.logs.items())
    assert output.loss.item() == pytest.approx(total, rel=1e-5)
    assert together.objective.total({k: float(v) for k, v in output.logs.items()}, 0) == pytest.approx(total)


class OnlyTargets(Teacher):
    def __call__(self, batch: Mapping[str, Tensor], alignment: Alignment) -> TeacherOutput:
        return TeacherOutput(DenseTargets(torch.zeros(len(alignment), 300)))


def test_what_a_teacher_cannot_give_is_an_error_before_training() -> None:
    assert Distiller(make_llama(**STUDENT), OnlyTargets(), [Logits(ForwardKL())]).step(make_batch()).loss > 0
    with pytest.raises(ModelError, match="OnlyTargets: expected a teacher with hidden states and attention"):
        Distiller(make_llama(**STUDENT), OnlyTargets(), [Hidden()])
    with pytest.raises(ModelError, match="OnlyTargets"):
        OnlyTargets().prepare(ActivationRequest(hidden=frozenset({0})))
    with pytest.raises(ShapeError, match="expected a teacher for the term hidden"):
        Distiller(make_llama(), None, [Hidden()])


def test_terms_that_do_not_go_with_the_models() -> None:
    with pytest.raises(ShapeError, match=r"teacher layers in -4\.\.3, as the teacher has 4 layers, got 9"):
        distiller(Hidden(LayerMap.explicit([(0, 9)])))
    with pytest.raises(ShapeError, match="equal widths without a projection"):
        distiller(Hidden(projection="none"))
    with pytest.raises(ShapeError, match=r"heads in 1\.\.8, the narrowest keys' width, got 9"):
        distiller(Relations(heads=9))
    with pytest.raises(ModelError, match=r"without attention dropout, got 0\.1"):
        distiller(Attention(divergence=ForwardKL()), student=make_llama(**STUDENT, attention_dropout=0.1))
    with pytest.raises(ShapeError, match=r"8 dimensions .* of teacher layer 1, got layers \[3\]"):
        distiller(Hidden(dimensions={3: torch.arange(8)}))
    for make in (
        lambda: Hidden(distance="l2"),  # type: ignore[arg-type]
        lambda: Hidden(distance="cka", projection="linear"),
        lambda: Attention(heads="best"),  # type: ignore[arg-type]
        lambda: Attention(heads=[]),
        lambda: distiller(Attention(heads=[(0, 0), (2, 0)])),
        lambda: distiller(Attention(heads=[(0, -1)])),
        lambda: Relations(of=("query",)),
        lambda: Relations(of=()),
        lambda: Similarity(kind="volume"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ShapeError, match="expected"):
            make()


def test_selected_dimensions_are_the_teachers() -> None:
    picked = torch.tensor([1, 2, 4, 5, 8, 9, 11, 15])
    one, batch = distiller(Hidden(LayerMap.last_k(), dimensions={3: picked})), make_batch()
    assert not one.objective.state_dict()
    s, t = hidden_states(one.student.model, batch, 1), None
    _, student_activations = one._capture.capture(one._request, lambda: one.student(**_inputs(batch)))
    _, teacher_activations = one.teacher._capture.capture(
        one.teacher._needs, lambda: one.teacher.model(**_inputs(batch))
    )
    s, t = student_activations.hidden[1], teacher_activations.hidden[3][..., picked]
    torch.testing.assert_close(one.step(batch).loss, hidden_mse(s, t)[attended_positions(batch)].mean())


# The trainer.

MANY = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1, "max_steps": 7}


def inside_trainer(folder: Path, *terms: Any, **changes: Any) -> DistillationTrainer:
    terms = terms or (Logits(ForwardKL()), Labels(weight=0.5), Hidden(projection="mlp"), Attention(heads="learned"))
    return trainer(folder, list(terms), make_llama(**TEACHER), make_llama(**STUDENT), **changes)


def trained(one: DistillationTrainer) -> Tensor:
    return torch.cat([p.detach().flatten() for p in one.distiller.parameters()])


@pytest.mark.parametrize("name", BY_POSITION)
def test_accumulation_equals_one_batch(tmp_path: Path, name: str) -> None:
    make = BY_POSITION[name]
    whole = inside_trainer(tmp_path / "a", make(), optim="sgd", learning_rate=0.1)
    parts = inside_trainer(
        tmp_path / "b", make(), optim="sgd", learning_rate=0.1, per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
    )  # fmt: skip
    whole.train()
    parts.train()
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)
    torch.testing.assert_close(trained(parts), trained(whole), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_evaluation_is_a_mean_whatever_the_batches(tmp_path: Path, name: str) -> None:
    sizes = (1, 6) if name in BY_POSITION else (6, 6)
    small, large = (
        inside_trainer(tmp_path / "a", Logits(ForwardKL()), ALL[name](), per_device_eval_batch_size=n).evaluate()
        for n in sizes
    )
    term = next(key for key in large if key.split("_")[1] == name.split(",")[0])
    assert small[term] == pytest.approx(large[term], rel=1e-5)
    assert small["eval_loss"] == pytest.approx(small["eval_logits"] + small[term], rel=1e-5)


def test_resumed_equals_uninterrupted_with_all_that_is_trained(tmp_path: Path) -> None:
    whole = inside_trainer(tmp_path / "a", **MANY)
    whole.train()

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 5

    stopped = inside_trainer(tmp_path / "b", **MANY)
    stopped.add_callback(Stop())
    stopped.train()
    resumed = inside_trainer(tmp_path / "b", **MANY)
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(trained(resumed), trained(whole))
    assert trained(whole).numel() > weights(whole).numel()


def test_projections_are_in_checkpoints_and_not_in_what_is_exported(tmp_path: Path) -> None:
    one = inside_trainer(tmp_path / "run", save_strategy="steps", save_steps=3)
    before = {name: value.clone() for name, value in one.distiller.objective.state_dict().items()}
    one.train()
    kept = load_file(tmp_path / "run/checkpoint-3/objective.safetensors")
    assert set(kept) == set(before)
    for name, value in one.distiller.objective.state_dict().items():
        assert torch.equal(kept[name], value)
        assert not torch.equal(before[name], value)
    one.save_model(str(tmp_path / "student"))
    assert not (tmp_path / "student/objective.safetensors").exists()
    assert set(load_file(tmp_path / "student/model.safetensors")) == set(one.distiller.student.state_dict())
    (tmp_path / "run/checkpoint-3/objective.safetensors").unlink()
    (tmp_path / "run/checkpoint-3" / CHECKSUMS).unlink()  # else that says so first
    with pytest.raises(UserError, match=r"objective\.safetensors in .*checkpoint-3, got none"):
        inside_trainer(tmp_path / "run", max_steps=5).train(resume_from_checkpoint=True)


def test_the_same_seed_makes_the_same_projections(tmp_path: Path) -> None:
    def first(seed: int) -> Tensor:
        torch.manual_seed(99 + seed)
        return trained(inside_trainer(tmp_path, seed=seed))

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


@pytest.mark.parametrize("changes", [{CHECKPOINTING: True}, {"bf16": True}, {"max_grad_norm": 0.01}], ids=str)
def test_training_arguments_work(tmp_path: Path, changes: dict[str, Any]) -> None:
    one, plain = (inside_trainer(tmp_path / "a", *(make() for make in ALL.values()), **more) for more in (changes, {}))
    one.train()
    plain.train()
    assert losses(one) == pytest.approx(losses(plain), rel=1e-5 if CHECKPOINTING in changes else 0.1)


def _on_a_rank(folder: Path, names: tuple[str, ...]) -> None:
    one = inside_trainer(folder, *(BY_POSITION[name]() for name in names), per_device_train_batch_size=4)
    one.train()
    metrics = one.evaluate()
    if one.is_world_process_zero():
        seen = {"weights": trained(one), "losses": losses(one), "eval": metrics["eval_loss"]}
        torch.save(seen, folder / "out.pt")


@pytest.mark.parametrize("names", [(), ("hidden",)], ids=["all", "hidden alone"])
def test_two_ranks_equal_one(tmp_path: Path, names: tuple[str, ...]) -> None:
    two_ranks(tmp_path, _on_a_rank, tmp_path, names)
    two = torch.load(tmp_path / "out.pt", weights_only=True)
    one = inside_trainer(tmp_path / "a", *(BY_POSITION[name]() for name in names))
    one.train()
    assert two["losses"] == pytest.approx(losses(one), rel=1e-5)
    torch.testing.assert_close(two["weights"], trained(one), rtol=1e-4, atol=1e-5)
    assert two["eval"] == pytest.approx(one.evaluate()["eval_loss"], rel=1e-5)


def test_an_objective_can_be_fitted_again() -> None:
    objective = Objective([Hidden()])
    for layers in (1, 2):
        student = make_llama(hidden_size=8, layers=layers)
        Distiller(student, make_llama(**TEACHER), objective).step(make_batch()).loss.backward()
        assert len(objective.state_dict()) == 2 * layers
