"""Policy gradients against loops written from the papers, and against the exact gradient over all texts of a toy."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import make_llama, make_tokenizer
from potstill.engines.sampling import Sampling
from potstill.errors import ShapeError
from potstill.losses.alignment import Alignment
from potstill.losses.targets import DenseTargets, HeadTargets, LMHead, SparseTargets
from potstill.teachers.teacher import TeacherOutput
from potstill.train.distiller import Distiller
from potstill.train.rollout import Rollout
from potstill.train.signals import SampledTokens, Signals
from potstill.train.terms.logits import Labels
from potstill.train.terms.policy import PolicyGradient
from test_rollout import make_batch, student

MINILLM = {"discount": 1.0, "single_step": True, "length_normalization": True}


def signals(
    student: Any, teacher: Any, labels: Tensor, rows: Tensor, own: Tensor, then: Tensor, sampler: Tensor, **options: Any
) -> Signals:
    missing = torch.full_like(then, math.nan)
    sampled = SampledTokens(own, then.where(own, missing), sampler.where(own, missing))
    alignment = Alignment(rows * len(rows) + torch.arange(len(rows)), labels, len(rows))
    return Signals(student, alignment, teacher, options.get("normalizer"), 0, sampled=sampled)


def log_probs_of(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0]


def case(seed: int = 0, N: int = 11, V: int = 7) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    return {
        "hidden": normal(N, 5).requires_grad_(),
        "weight": normal(V, 5).requires_grad_(),
        "p": normal(N, V),
        "labels": torch.randint(V, (N,), generator=generator),
        "rows": torch.tensor([0] * 4 + [2] * 3 + [3] * (N - 7)),
        "own": torch.tensor([True] * 4 + [False] * 3 + [True] * (N - 7)),
        "apart": 0.3 * normal(2, N),  # of the student of today from that of then, and of the sampler from both
    }


def reference(term: PolicyGradient, one: dict[str, Any]) -> list[float]:
    """The coefficient c_t of each token's -c_t grad log q(y_t), by loops over equations 3, 5, 6 and 7 of MiniLLM."""
    q = log_probs_of((one["hidden"] @ one["weight"].T).detach(), one["labels"]).tolist()
    p = log_probs_of(one["p"], one["labels"]).tolist()
    N, returns = len(q), [0.0] * len(q)
    for t in range(N):
        if not one["own"][t]:
            continue
        rest = [s for s in range(t, N) if one["rows"][s] == one["rows"][t]]
        used = rest[1:] if term.single_step else rest
        shares = [term.discount ** (s - t) for s in used]
        returns[t] = sum(share * (p[s] - q[s]) for share, s in zip(shares, used, strict=True))
        if term.length_normalization:
            returns[t] = returns[t] / sum(shares) if sum(shares) else 0.0
    own = [t for t in range(N) if one["own"][t]]
    if term.whiten:
        mean = sum(returns[t] for t in own) / len(own)
        deviation = math.sqrt(sum((returns[t] - mean) ** 2 for t in own) / (len(own) - 1))
        returns = [(r - mean) / deviation for r in returns]
    found = [0.0] * N
    for t in own:
        ratio = math.exp(-float(one["apart"][0, t]))  # log_probs then = log_probs now + apart
        weight = math.exp(-float(one["apart"][1, t])) if term.importance else 1.0
        outside = term.clip is not None and (
            (returns[t] > 0 and ratio > 1 + term.clip) or (returns[t] < 0 and ratio < 1 - term.clip)
        )
        found[t] = 0.0 if outside else weight * ratio * returns[t]
    return found


TERMS = [
    PolicyGradient(),
    PolicyGradient(discount=1.0),
    PolicyGradient(discount=0.5, whiten=True, importance=False),
    PolicyGradient(discount=0.9, length_normalization=True),
    PolicyGradient(discount=1.0, clip=0.1),
    PolicyGradient(**MINILLM),
    PolicyGradient(**MINILLM, whiten=True, clip=0.2),
    PolicyGradient(single_step=True),
]


@pytest.mark.parametrize("head", [True, False], ids=["head", "logits"])
@pytest.mark.parametrize("term", TERMS, ids=str)
def test_the_gradient_is_the_papers(term: PolicyGradient, head: bool) -> None:
    one = case()
    logits = one["hidden"] @ one["weight"].T
    q = log_probs_of(logits, one["labels"])
    then = q.detach() + one["apart"][0]
    student_targets = HeadTargets(one["hidden"], LMHead(one["weight"])) if head else DenseTargets(logits)
    teacher = TeacherOutput(DenseTargets(one["p"]))
    term_signals = signals(
        student_targets, teacher, one["labels"], one["rows"], one["own"], then, then + one["apart"][1]
    )
    found = torch.autograd.grad(term(term_signals), (one["hidden"], one["weight"]), retain_graph=True)
    coefficients = torch.tensor(reference(term, one), dtype=torch.float64)
    expected = -(coefficients * q).sum() / len(q)
    if term.single_step:
        weights = (-one["apart"][1]).exp() if term.importance else torch.ones(len(q))
        log_q, log_p = logits.log_softmax(-1), one["p"].log_softmax(-1)
        kl = (log_q.exp() * (log_q - log_p)).sum(-1)
        expected = expected + (weights * one["own"] * kl).sum() / len(q)
    for actual, gradient in zip(found, torch.autograd.grad(expected, (one["hidden"], one["weight"])), strict=True):
        torch.testing.assert_close(actual, gradient)


# An environment in which all texts can be listed: three tokens, of which 0 ends, and at most three of them.


class Listed:
    """Student and teacher as a table of logits for each beginning."""

    def __init__(self, longest: int = 3, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.longest = longest
        begins = [b for n in range(longest) for b in itertools.product((1, 2), repeat=n)]
        self.place = {begin: i for i, begin in enumerate(begins)}
        self.q = torch.randn(len(begins), 3, dtype=torch.float64, generator=generator).requires_grad_()
        self.p = torch.randn(len(begins), 3, dtype=torch.float64, generator=generator)

    def texts(self) -> list[tuple[int, ...]]:
        whole = list(itertools.product((1, 2), repeat=self.longest))
        return whole + [(*begin, 0) for begin in self.place]

    def states(self, text: tuple[int, ...]) -> list[int]:
        return [self.place[text[:t]] for t in range(len(text))]

    def log_prob(self, table: Tensor, text: tuple[int, ...]) -> Tensor:
        return log_probs_of(table[self.states(text)], torch.tensor(text)).sum()

    def expected_gradient(self, term: PolicyGradient, sampler: Any = None) -> Tensor:
        """Of the term, summed over tokens, over all texts by their probability under the sampler."""
        sampler = sampler or (lambda q, p: q)
        total = torch.zeros((), dtype=torch.float64)
        mixed = sampler(self.q.softmax(-1), self.p.softmax(-1)).log().detach()
        for text in self.texts():
            at, labels = self.states(text), torch.tensor(text)
            then, drawn = (log_probs_of(x[at], labels) for x in (self.q.detach(), mixed))
            term_signals = signals(
                DenseTargets(self.q[at]), TeacherOutput(DenseTargets(self.p[at])), labels,
                torch.zeros(len(text)).long(), torch.ones(len(text)).bool(), then, drawn, normalizer=1.0,
            )  # fmt: skip
            total = total + drawn.sum().exp() * term(term_signals)
        return torch.autograd.grad(total, self.q)[0]

    def exact_gradient(self) -> Tensor:
        """Of KL(q || p) over texts."""
        kl = sum((q := self.log_prob(self.q, text)).exp() * (q - self.log_prob(self.p, text)) for text in self.texts())
        return torch.autograd.grad(torch.as_tensor(kl), self.q)[0]

    def visited_gradient(self) -> Tensor:
        """Of the mean KL at each position, over the positions that the student of now comes to."""
        total = torch.zeros((), dtype=torch.float64)
        log_q, log_p = self.q.log_softmax(-1), self.p.log_softmax(-1)
        kl = (log_q.exp() * (log_q - log_p)).sum(-1)
        for text in self.texts():
            total = total + self.log_prob(self.q, text).detach().exp() * kl[self.states(text)].sum()
        return torch.autograd.grad(total, self.q)[0]


def test_all_texts_are_listed() -> None:
    one = Listed()
    assert sum(float(one.log_prob(one.q, text).detach().exp()) for text in one.texts()) == pytest.approx(1.0)


@pytest.mark.parametrize("single_step", [False, True])
def test_the_expectation_is_the_exact_gradient_of_the_kl_of_texts(single_step: bool) -> None:
    one = Listed()
    term = PolicyGradient(discount=1.0, single_step=single_step, clip=0.2)
    torch.testing.assert_close(one.expected_gradient(term), one.exact_gradient())


@pytest.mark.parametrize("single_step", [False, True])
def test_with_discount_0_it_is_the_kl_where_the_student_comes(single_step: bool) -> None:
    one = Listed()
    found = one.expected_gradient(PolicyGradient(discount=0.0, single_step=single_step))
    torch.testing.assert_close(found, one.visited_gradient())
    assert not torch.allclose(found, one.exact_gradient())


def test_importance_weights_undo_the_teachers_share() -> None:
    one = Listed(longest=1)  # weights of single tokens are exact where texts are single tokens

    def mix(q: Tensor, p: Tensor) -> Tensor:
        return 0.2 * p + 0.8 * q

    torch.testing.assert_close(one.expected_gradient(PolicyGradient(), mix), one.exact_gradient())
    biased = one.expected_gradient(PolicyGradient(importance=False), mix)
    assert not torch.allclose(biased, one.exact_gradient())


# What it is given.


def test_log_probs_of_the_sampled_tokens_are_enough() -> None:
    one = case()
    q = log_probs_of((one["hidden"] @ one["weight"].T).detach(), one["labels"])
    label_log_probs = log_probs_of(one["p"], one["labels"])
    sparse = SparseTargets(torch.zeros(11, 1).long(), torch.full((11, 1), -1.0, dtype=torch.float64))
    student_targets = HeadTargets(one["hidden"], LMHead(one["weight"]))
    args = (one["labels"], one["rows"], one["own"], q, q)
    whole = PolicyGradient()(signals(student_targets, TeacherOutput(DenseTargets(one["p"])), *args))
    torch.testing.assert_close(
        PolicyGradient()(signals(student_targets, TeacherOutput(sparse, label_log_probs), *args)), whole
    )
    with pytest.raises(ShapeError, match="expected a teacher that gives the log-probability of every sampled token"):
        PolicyGradient()(signals(student_targets, TeacherOutput(sparse), *args))


def test_it_learns_from_own_rows_alone() -> None:
    model, teacher = student(), make_llama(seed=1)
    rollout = Rollout(make_tokenizer(), Sampling(max_new_tokens=6), share=0.5)
    (batch,) = rollout([make_batch()], model, step=0)
    distiller = Distiller(model, teacher, [PolicyGradient(**MINILLM, whiten=True), Labels(weight=0.5)])
    distiller.step(batch).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    plain = Distiller(model, teacher, [PolicyGradient()]).step(make_batch()).loss
    plain.backward()
    assert plain == 0


def test_a_token_that_the_teacher_rules_out_stays_a_number() -> None:
    one = case()
    one["p"][0, one["labels"][0]] = -math.inf
    q = log_probs_of((one["hidden"] @ one["weight"].T).detach(), one["labels"])
    student_targets = HeadTargets(one["hidden"], LMHead(one["weight"]))
    args = (one["labels"], one["rows"], one["own"], q, q)
    assert torch.isfinite(PolicyGradient()(signals(student_targets, TeacherOutput(DenseTargets(one["p"])), *args)))


def test_what_cannot_be() -> None:
    with pytest.raises(ShapeError, match=r"PolicyGradient.discount: expected a number in \[0, 1\], got 2"):
        PolicyGradient(discount=2.0)
    with pytest.raises(ShapeError, match=r"PolicyGradient.clip: expected a number > 0, got 0"):
        PolicyGradient(clip=0.0)
