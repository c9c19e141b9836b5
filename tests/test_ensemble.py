"""Several teachers as one: the mixture at every temperature, of every form of targets; learned weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from conftest import make_batch, make_llama
from potstill.errors import DataError, ModelError, ShapeError, VocabularyError
from potstill.losses.alignment import causal_alignment
from potstill.losses.divergences import JSD, Divergence, ForwardKL, ReverseKL
from potstill.losses.fused_linear import linear_divergence
from potstill.losses.target_statistics import teacher_entropy, token_log_probs, top_tokens
from potstill.losses.targets import DenseTargets, HeadTargets, LMHead, MixtureTargets, SparseTargets, Targets
from potstill.losses.token_losses import token_divergence
from potstill.teachers.cache.codec import Sampled
from potstill.teachers.ensemble import EnsembleTeacher, mix
from potstill.teachers.model import ModelTeacher
from potstill.teachers.teacher import Teacher, TeacherOutput
from potstill.train.distiller import Distiller
from potstill.train.terms.dense import TAID
from potstill.train.terms.layers import Hidden
from potstill.train.terms.logits import Labels, Logits
from test_trainer import losses, trainer, weights

N, V, H = 7, 23, 5


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


def reference(logits: list[torch.Tensor], weights: list[float], of: str, temperature: float) -> torch.Tensor:
    """log p [N, V] in float64, token by token, straight from the definitions."""
    result = torch.zeros(N, V, dtype=torch.float64)
    for n in range(N):
        each = [[math.exp(float(x)) for x in z[n].double() / temperature] for z in logits]
        each = [[x / sum(row) for x in row] for row in each]
        if of == "probabilities":
            p = [sum(w * row[v] for w, row in zip(weights, each, strict=True)) for v in range(V)]
        else:
            p = [math.prod(row[v] ** w for w, row in zip(weights, each, strict=True)) for v in range(V)]
        result[n] = torch.tensor([x / sum(p) for x in p], dtype=torch.float64).log()
    return result


WEIGHTS = [0.5, 0.2, 0.3]


def members(dtype: torch.dtype = torch.float64) -> tuple[list[Any], list[torch.Tensor]]:
    """A dense one, one with a head and one with a soft cap, and their logits."""
    heads = [LMHead(numbers(V, H, seed=i).to(dtype), softcap=cap) for i, cap in ((1, None), (2, 3.0))]
    hidden = [numbers(N, H, seed=3).to(dtype), numbers(N, H, seed=4).to(dtype)]
    member_targets = [
        DenseTargets(numbers(N, V).to(dtype)),
        *(HeadTargets(h, head) for h, head in zip(hidden, heads, strict=True)),
    ]
    return member_targets, [one.dense() for one in member_targets]


@pytest.mark.parametrize("of", ["probabilities", "log_probs"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_a_mixture_is_its_definition_at_every_temperature(of: Any, temperature: float) -> None:
    member_targets, logits = members()
    mixed = MixtureTargets(tuple(member_targets), torch.tensor(WEIGHTS), of)
    expected = reference(logits, WEIGHTS, of, temperature)
    torch.testing.assert_close(torch.log_softmax(mixed.dense(temperature) / temperature, -1), expected)
    torch.testing.assert_close(teacher_entropy(mixed, temperature), -(expected.exp() * expected).sum(-1))
    ids = torch.arange(N * 2).reshape(N, 2) % V
    torch.testing.assert_close(token_log_probs(mixed, ids, temperature), expected.gather(-1, ids))


@pytest.mark.parametrize("of", ["probabilities", "log_probs"])
@pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL(), JSD(0.3)], ids=lambda d: type(d).__name__)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_fused_loss_and_its_gradient_are_those_of_the_mixed_distribution(
    of: Any, divergence: Divergence, dtype: torch.dtype
) -> None:
    member_targets, logits = members(dtype)
    mixed = MixtureTargets(tuple(member_targets), torch.tensor(WEIGHTS), of)
    target = DenseTargets(2.0 * reference(logits, WEIGHTS, of, 2.0).to(dtype))
    found = []
    for targets, options in ((target, {"backend": "eager"}), (mixed, {}), (mixed, {"chunk_tokens": 2})):
        hidden = numbers(N, H, seed=8).to(dtype).requires_grad_()
        head = LMHead(numbers(V, H, seed=9).to(dtype).requires_grad_())
        loss = linear_divergence(hidden, head, targets, divergence, temperature=2.0, **options)
        loss.loss.backward()
        found.append((loss.loss, loss.divergence, hidden.grad, head.weight.grad))
    for one in found[1:]:
        torch.testing.assert_close(one, found[0])
    torch.testing.assert_close(token_divergence(head.logits(hidden), mixed, divergence, temperature=2.0), found[0][1])


def test_equal_members_are_one_and_a_weight_of_zero_is_none() -> None:
    member_targets, _ = members()
    student = numbers(N, V, seed=5)
    for of in ("probabilities", "log_probs"):
        for one in (
            MixtureTargets((member_targets[1], member_targets[1]), torch.tensor([0.3, 0.7]), of),
            MixtureTargets((member_targets[1], member_targets[0]), torch.tensor([1.0, 0.0]), of),
        ):
            torch.testing.assert_close(
                token_divergence(student, one, ReverseKL(), temperature=3.0),
                token_divergence(student, member_targets[1], ReverseKL(), temperature=3.0),
            )


def test_tokens_that_are_ruled_out_by_one_member() -> None:
    logits = numbers(N, V).float()
    other = logits.clone()
    other[:, :5] = -math.inf
    student = numbers(N, V, seed=5).float().requires_grad_()
    halves = torch.tensor([0.5, 0.5])
    p = (logits.softmax(-1) + other.softmax(-1)) / 2
    mixed = MixtureTargets((DenseTargets(logits), DenseTargets(other)), halves)
    found = token_divergence(student, mixed, ForwardKL())
    torch.testing.assert_close(found, (p * (p.log() - student.log_softmax(-1))).sum(-1))
    product = MixtureTargets((DenseTargets(logits), DenseTargets(other)), halves, "log_probs")
    assert (product.dense().softmax(-1)[:, :5] == 0).all()
    token_divergence(student, product, ForwardKL(), temperature=0.01).sum().backward()
    assert torch.isfinite(student.grad).all()


def test_padding_is_sliced_off_before_members_are_normalised() -> None:
    wide, narrow = numbers(N, V + 4), numbers(N, V, seed=1)
    sliced = mix([DenseTargets(wide).slice(V), DenseTargets(narrow)], torch.tensor([0.5, 0.5]), "probabilities")
    both = MixtureTargets((DenseTargets(wide), DenseTargets(numbers(N, V + 4, seed=2))), torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(both.slice(V).dense(), both.slice(V).rows(slice(0, N)).dense())
    p = (wide[:, :V].softmax(-1) + narrow.softmax(-1)) / 2
    assert isinstance(sliced, MixtureTargets)
    torch.testing.assert_close(sliced.dense(), p.log())
    with pytest.raises(VocabularyError, match=r"expected members of one vocabulary, got \[27, 23\]"):
        MixtureTargets((DenseTargets(wide), DenseTargets(narrow)), torch.tensor([0.5, 0.5]))


# A few tokens of each distribution.


def sample(logits: torch.Tensor, draws: int, seed: int, temperature: float = 1.0) -> SparseTargets:
    codec = Sampled(V, draws, temperature)
    targets = codec.decode([codec.encode(DenseTargets(logits), seed)], [len(logits)])[0]
    assert isinstance(targets, SparseTargets)
    return targets


def top(logits: torch.Tensor, k: int, temperature: float = 1.0) -> SparseTargets:
    targets = top_tokens(DenseTargets(logits), k, temperature)
    assert isinstance(targets, SparseTargets)
    return targets


def whole(targets: SparseTargets) -> torch.Tensor:
    """[N, V] the probabilities of targets that leave nothing to others, by a loop."""
    result = torch.zeros(N, V, dtype=torch.float64)
    for n in range(N):
        for token, log_p in zip(targets.ids[n].tolist(), targets.log_probs[n].tolist(), strict=True):
            result[n, token] += math.exp(log_p)
    return result


def test_a_mixture_of_samples_is_the_union_of_their_draws() -> None:
    parts = [sample(numbers(N, V, seed=i), draws, i, 2.0) for i, draws in ((0, 30), (1, 5), (2, 12))]
    mixed = mix(parts, torch.tensor(WEIGHTS), "probabilities")
    assert isinstance(mixed, SparseTargets) and mixed.kind == "sampled" and mixed.temperature == 2.0
    expected = sum(w * whole(one) for w, one in zip(WEIGHTS, parts, strict=True))
    torch.testing.assert_close(whole(mixed), expected, rtol=1e-6, atol=1e-7)
    for n in range(N):  # each token once
        used = mixed.ids[n][mixed.used()[n]].tolist()
        assert len(used) == len(set(used))
    student = numbers(N, V, seed=5).requires_grad_()
    token_divergence(student, mixed, ForwardKL(), temperature=2.0).sum().backward()
    torch.testing.assert_close(
        student.grad,
        ((student / 2).softmax(-1) - expected) / 2,
        rtol=1e-5,
        atol=1e-6,
    )
    with pytest.raises(ShapeError, match="for which a sample is biased"):
        token_divergence(student, mixed, JSD(), temperature=2.0)


def test_a_sample_beside_whole_distributions() -> None:
    logits, drawn = numbers(N, V), sample(numbers(N, V, seed=1), 20, 1, 2.0)
    mixed = mix([drawn, DenseTargets(logits)], torch.tensor([0.25, 0.75]), "probabilities")
    p = 0.25 * whole(drawn) + 0.75 * (logits / 2).softmax(-1)
    hidden, head = numbers(N, H, seed=8).requires_grad_(), LMHead(numbers(V, H, seed=9))
    q = (head.logits(hidden) / 2).log_softmax(-1)
    expected = torch.where(p > 0, p * (p.log() - q), 0.0).sum(-1)
    torch.testing.assert_close(
        linear_divergence(hidden, head, mixed, ForwardKL(), temperature=2.0).divergence,
        expected.detach(),
        rtol=1e-6,
        atol=1e-6,
    )
    for refused in (
        lambda: linear_divergence(hidden, head, mixed, ReverseKL(), temperature=2.0),
        lambda: linear_divergence(hidden, head, mixed, ForwardKL(), temperature=1.0),
        lambda: top_tokens(mixed, 4, 2.0),
        lambda: TAID(0.5).teacher_logits(mixed, 2.0),
    ):
        with pytest.raises(ShapeError):
            refused()


def test_a_mixture_of_likeliest_tokens_is_exact_over_the_events_that_all_have() -> None:
    logits = [numbers(N, V, seed=i) for i in range(3)]
    parts: list[Targets] = [top(logits[0], 8, 2.0), DenseTargets(logits[1]), top(logits[2], 12, 2.0)]
    mixed = mix(parts, torch.tensor(WEIGHTS), "probabilities")
    assert isinstance(mixed, SparseTargets) and mixed.kind == "bucket"
    p = reference(logits, WEIGHTS, "probabilities", 2.0).exp()
    for n in range(N):
        common = set(parts[0].ids[n].tolist()) & set(parts[2].ids[n].tolist())
        used = mixed.used()[n]
        assert set(mixed.ids[n][used].tolist()) == common
        torch.testing.assert_close(
            mixed.log_probs[n][used].double(), p[n, mixed.ids[n][used]].log(), rtol=1e-6, atol=1e-6
        )
    student = numbers(N, V, seed=5)
    known = token_divergence(student, mixed, ForwardKL(), temperature=2.0)
    assert (known <= token_divergence(student, DenseTargets(2 * p.log()), ForwardKL(), temperature=2.0) + 1e-9).all()


def test_likeliest_tokens_of_the_whole_vocabulary_are_the_dense_mixture() -> None:
    logits = [numbers(N, V, seed=i) for i in range(2)]
    halves = torch.tensor([0.5, 0.5])
    student = numbers(N, V, seed=5)
    dense = mix([DenseTargets(z) for z in logits], halves, "probabilities")
    for divergence in (ForwardKL(), ReverseKL(), JSD()):
        torch.testing.assert_close(
            token_divergence(student, mix([top(z, V) for z in logits], halves, "probabilities"), divergence),
            token_divergence(student, dense, divergence),
            rtol=1e-6,
            atol=1e-6,
        )


def test_slots_that_are_not_used_take_no_part() -> None:
    log_probs = torch.tensor([[0.5, 0.25, 0.0]]).log()
    one = SparseTargets(torch.tensor([[3, 4, 3]]), log_probs)
    other = SparseTargets(torch.tensor([[0, 3, 7]]), torch.tensor([[0.0, 0.3, 0.2]]).log())
    mixed = mix([one, other], torch.tensor([0.5, 0.5]), "probabilities")
    assert isinstance(mixed, SparseTargets)
    assert mixed.ids[mixed.used()].tolist() == [3]
    torch.testing.assert_close(mixed.log_probs[mixed.used()].exp(), torch.tensor([0.4]))


REFUSED: dict[str, tuple[Callable[[], list[Targets]], str, str]] = {
    "log_probs of a sample": (
        lambda: [sample(numbers(N, V), 5, 0), DenseTargets(numbers(N, V))],
        "log_probs",
        "expected full distributions for a mean of log-probabilities, got sampled",
    ),
    "a sample and a bucket": (
        lambda: [sample(numbers(N, V), 5, 0), top(numbers(N, V), 5)],
        "probabilities",
        "got bucket and sampled",
    ),
    "two temperatures": (
        lambda: [top(numbers(N, V), 5, 1.0), top(numbers(N, V), 5, 2.0)],
        "probabilities",
        "of one temperature, got 1 and 2",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_known_is_refused(name: str) -> None:
    make, of, message = REFUSED[name]
    with pytest.raises(ShapeError, match=message):
        mix(make(), torch.tensor([0.5, 0.5]), of)
    with pytest.raises(ShapeError, match="expected members with full distributions"):
        MixtureTargets((top(numbers(N, V), 5), DenseTargets(numbers(N, V))), torch.tensor([0.5, 0.5]))


# The teacher.


class ConstantTeacher(Teacher):
    """The same logits [V] everywhere, whole or only the three likeliest tokens of them."""

    def __init__(self, logits: torch.Tensor, whole: bool = True) -> None:
        self.logits, self.whole = logits, whole

    def __call__(self, batch: Any, alignment: Any) -> TeacherOutput:
        targets = DenseTargets(self.logits.expand(len(alignment), -1))
        return TeacherOutput(targets if self.whole else top(targets.logits, 3))


def test_an_ensemble_trains_as_one_teacher(tmp_path: Path) -> None:
    models = [make_llama(seed=1), make_llama(seed=2, vocab_size=310)]
    ensemble = EnsembleTeacher([ModelTeacher(models[0]), models[1]], [3, 1], vocabulary=300)
    batch = make_batch()
    student = make_llama(hidden_size=8)
    found = Distiller(student, ensemble, [Logits(JSD(), temperature=2.0), Labels()], vocabulary=300).step(batch)
    alignment = causal_alignment(batch["labels"])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    each = [alignment.select(m(**inputs).logits)[:, :300] / 2 for m in models]
    p = 0.75 * each[0].softmax(-1) + 0.25 * each[1].softmax(-1)
    expected = token_divergence(
        alignment.select(student(**inputs).logits), DenseTargets(2 * p.log()), JSD(), temperature=2.0
    )
    torch.testing.assert_close(found.logs["logits"], 4 * expected.mean().detach())
    one = trainer(tmp_path, teacher=ensemble, vocabulary=300)
    one.train()
    assert losses(one)[-1] < losses(one)[0]


def test_one_member_is_looked_into() -> None:
    ensemble = EnsembleTeacher([ConstantTeacher(torch.zeros(300)), ModelTeacher(make_llama(seed=1))])
    alone = Distiller(make_llama(hidden_size=8), make_llama(seed=1), [Hidden(distance="cka")])
    found = Distiller(make_llama(hidden_size=8), ensemble, [Hidden(distance="cka")])
    torch.testing.assert_close(found.step(make_batch()).loss, alone.step(make_batch()).loss)


def test_learned_weights_make_the_data_likeliest() -> None:
    """Tokens are drawn from 0.7 a + 0.2 b + 0.1 c: no other weights make many of them likelier."""
    logits = [numbers(300, seed=i).float() for i in range(3)]
    truth = torch.tensor([0.7, 0.2, 0.1])
    p = sum(w * z.softmax(-1) for w, z in zip(truth, logits, strict=True))
    assert isinstance(p, torch.Tensor)
    ensemble = EnsembleTeacher([ConstantTeacher(z) for z in logits], learned=True)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 200):
        for _ in range(2):
            ids = torch.multinomial(p, 128, replacement=True, generator=generator).reshape(2, 64)
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
            ensemble.update(ensemble(batch, causal_alignment(ids)))
        ensemble.after_step(step)
    assert ensemble.weights.sum() == pytest.approx(1)
    assert ensemble.weights.tolist() == pytest.approx(truth.tolist(), abs=0.04)
    assert ensemble.logs() == {f"teacher_weight/{i}": w for i, w in enumerate(ensemble.weights.tolist())}


def test_a_step_of_em_is_its_formula_whatever_the_batches() -> None:
    logits = [numbers(300, seed=i).float() for i in range(2)]
    batch = make_batch()
    alignment = causal_alignment(batch["labels"])
    whole_batch, parts = (
        EnsembleTeacher([ConstantTeacher(z) for z in logits], [0.9, 0.1], learned=True) for _ in range(2)
    )
    whole_batch.update(whole_batch(batch, alignment))
    for row in range(len(batch["input_ids"])):
        some = {name: value[row : row + 1] for name, value in batch.items()}
        parts.update(parts(some, causal_alignment(some["labels"])))
    joint = [w * z.double().softmax(-1)[alignment.labels] for w, z in zip((0.9, 0.1), logits, strict=True)]
    expected = [float((one / sum(joint)).mean()) for one in joint]
    size = 2**-0.6
    for one in (whole_batch, parts):
        one.after_step(2)
        assert one.weights.tolist() == pytest.approx(
            [(1 - size) * old + size * new for old, new in zip((0.9, 0.1), expected, strict=True)], rel=1e-6
        )


def test_learned_weights_are_resumed_and_logged(tmp_path: Path) -> None:
    def new(folder: str) -> tuple[Any, EnsembleTeacher]:
        members = [ModelTeacher(make_llama(seed=i)) for i in (1, 2)]
        ensemble = EnsembleTeacher(members, learned=True, names=["a", "b"])
        arguments: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
        return trainer(tmp_path / folder, teacher=ensemble, per_device_train_batch_size=4, **arguments), ensemble

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 3

    straight, one = new("straight")
    straight.train()
    stopped, _ = new("stopped")
    stopped.add_callback(Stop())
    stopped.train()
    resumed, other = new("stopped")
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(one.weights, other.weights) and not torch.equal(one.weights, one.weights.flip(0))
    assert torch.equal(weights(straight), weights(resumed))
    logged = [line for line in straight.state.log_history if "loss" in line]
    assert [line["teacher_weight/a"] for line in logged][-1] == float(one.weights[0])
    held_out = one.weights.clone()
    straight.evaluate()
    assert torch.equal(one.weights, held_out)  # held-out rows teach it nothing


def test_an_ensemble_with_learned_weights_is_not_prefetched() -> None:
    members = [ModelTeacher(make_llama(seed=i)) for i in (1, 2)]
    with pytest.raises(ModelError, match="does not change in training, got EnsembleTeacher"):
        Distiller(make_llama(), EnsembleTeacher(members, learned=True), [Logits(ForwardKL())], prefetch=True)
    Distiller(make_llama(), EnsembleTeacher(members), [Logits(ForwardKL())], prefetch=True)


def test_ensembles_that_cannot_be() -> None:
    two: list[Teacher] = [ConstantTeacher(torch.zeros(300)), ConstantTeacher(torch.zeros(300), whole=False)]
    with pytest.raises(ShapeError, match="two members or more"):
        EnsembleTeacher(two[:1])
    with pytest.raises(ShapeError, match="expected models or Teachers as members, got a str"):
        EnsembleTeacher(["large", "small"])
    for wrong in ([1], [1, -1], [0, 0], [1, math.nan]):
        with pytest.raises(ShapeError, match="expected 2 weights"):
            EnsembleTeacher(two, wrong)
    with pytest.raises(ShapeError, match="2 different names"):
        EnsembleTeacher(two, names=["a", "a"])
    with pytest.raises(ShapeError, match="of: probabilities where weights are learned"):
        EnsembleTeacher(two, of="log_probs", learned=True)
    batch = make_batch()
    with pytest.raises(DataError, match="got 1, which does not"):
        EnsembleTeacher(two, learned=True)(batch, causal_alignment(batch["labels"]))
