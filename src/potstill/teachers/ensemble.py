"""Several teachers that speak as one: mixed by fixed weights, or by weights that are learned."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Literal, cast

import torch
from torch import Tensor, nn

from potstill.errors import DataError, ModelError, ShapeError
from potstill.losses.alignment import Alignment
from potstill.losses.target_statistics import token_log_probs
from potstill.losses.targets import FullTargets, MixtureTargets, SparseTargets, Targets
from potstill.models.capture import ActivationRequest, Activations
from potstill.models.structure import ModelShape
from potstill.teachers.teacher import NOT_COVERED, Teacher, TeacherOutput

FORGETTING = 0.6  # the exponent of the step size of online EM, as in Cappe and Moulines 2009, section 5


class EnsembleTeacher(Teacher):
    """Several teachers that share a vocabulary, as one; see `MixtureTargets` and `mix` for what they say together.

    Learned weights are those under which the mixture makes the training data's own tokens likeliest,

        max over w of mean over tokens of log sum_i w_i p_i(y),

    found by EM, one step of it after each optimiser step: w_i moves by step^-0.6 to the mean of w_i p_i(y) / sum_j w_j
    p_j(y). They need no gradient, no learning rate, and nothing of the student.

    Args:
        members: the teachers. The first that can be looked into is.
        weights: one for each, not negative; they are divided by their sum. None for equal ones. Where they are learned,
            what they begin with.
        of: "probabilities" or "log_probs".
        learned: whether the weights are learned, of probabilities alone.
        names: what the members are called in logs; their numbers where nothing is given.
        vocabulary: the number of tokens that all share, where heads have padding rows behind them.

    Raises:
        ShapeError: there are less than two members, or weights or names do not fit to them.

    References:
        Jelinek and Mercer 1980, "Interpolated estimation of Markov source parameters from sparse data", for EM of
        the weights of a mixture; Cappe and Moulines 2009, arXiv 0712.4273, for EM step by step.
    """

    def __init__(
        self,
        members: Sequence[Teacher],
        weights: Sequence[float] | None = None,
        *,
        of: Literal["probabilities", "log_probs"] = "probabilities",
        learned: bool = False,
        names: Sequence[str] | None = None,
        vocabulary: int | None = None,
    ) -> None:
        if len(members) < 2:
            raise ShapeError(f"EnsembleTeacher: expected two members or more, got {len(members)}.")
        self.members = list(members)
        self.names = [str(i) for i in range(len(members))] if names is None else list(names)
        given = torch.ones(len(members)) if weights is None else torch.tensor(list(weights))
        if len(given) != len(members) or not ((given >= 0) & given.isfinite()).all() or not given.sum():
            raise ShapeError(
                f"EnsembleTeacher: expected {len(members)} weights that are not negative nor all 0, got {weights}."
            )
        if len(set(self.names)) != len(members):
            raise ShapeError(f"EnsembleTeacher: expected {len(members)} different names, got {self.names}.")
        if learned and of == "log_probs":
            raise ShapeError(
                "EnsembleTeacher: expected of probabilities where weights are learned, got log_probs. What each member "
                "gives to the data's own tokens does not tell what their geometric mean gives to them. Fix the weights."
            )
        self.weights = given.double() / given.double().sum()
        self.of, self.learned, self.vocabulary = of, learned, vocabulary
        self.of_student = any(m.of_student for m in members)
        self.max_length = min((m.max_length for m in members if m.max_length is not None), default=None)
        self._shares, self._tokens = torch.zeros(len(members), dtype=torch.float64), 0

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Tensor], alignment: Alignment) -> TeacherOutput:
        answers = [member(batch, alignment) for member in self.members]
        said = [answer.targets for answer in answers]
        if self.vocabulary is not None:
            said = [targets.slice(self.vocabulary) for targets in said]
        inside = next((answer.inside for answer in answers if answer.inside != Activations()), Activations())
        of_members = self._of_members(answers, said, alignment.labels) if self.learned else None
        targets = mix(said, self.weights, self.of)
        told = None
        if isinstance(targets, SparseTargets) or (isinstance(targets, MixtureTargets) and targets.sampled):
            known = [answer.of_labels(alignment.labels) for answer in answers]
            if self.of == "probabilities" and all(one is not None for one in known):
                told = _mixed(torch.stack(cast(list[Tensor], known), -1), self.weights)
        return TeacherOutput(targets, told, inside, of_members=of_members)

    def _of_members(self, answers: Sequence[TeacherOutput], said: Sequence[Targets], labels: Tensor) -> Tensor:
        """[N, M] what each member gives to the data's own tokens."""
        known = []
        for name, answer, targets in zip(self.names, answers, said, strict=True):
            one = TeacherOutput(targets, answer.label_log_probs).of_labels(labels)
            if one is None:
                raise DataError(
                    f"ensemble: expected members that tell the log-probabilities of the data's own tokens, got {name}, "
                    "which does not. Learned weights come from these. Fix the weights."
                )
            known.append(one.double())
        return torch.stack(known, -1)

    def attach(self, student: nn.Module) -> None:
        """See `Teacher`."""
        for member in self.members:
            member.attach(student)

    def learn(self, said: TeacherOutput) -> None:
        """See `Teacher`."""
        if said.of_members is not None:
            joint = said.of_members + _logs(self.weights).to(said.of_members.device)
            self._shares += joint.softmax(-1).sum(0).cpu()
            self._tokens += len(joint)

    def after_step(self, step: int) -> None:
        """See `Teacher`."""
        for member in self.members:
            member.after_step(step)
        if not self.learned:
            return
        counts = torch.cat([self._shares, torch.tensor([self._tokens], dtype=torch.float64)])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            counts = _over_ranks(counts)
        if counts[-1]:
            size = step**-FORGETTING
            self.weights = (1 - size) * self.weights + size * counts[:-1] / counts[-1]
        self._shares, self._tokens = torch.zeros_like(self._shares), 0

    def state_dict(self) -> dict[str, Tensor]:
        """See `Teacher`."""
        own = {"weights": self.weights.clone()} if self.learned else {}
        return own | {
            f"{i}.{key}": value for i, member in enumerate(self.members) for key, value in member.state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """See `Teacher`."""
        if self.learned:
            self.weights = state["weights"].clone()
        for i, member in enumerate(self.members):
            begin = f"{i}."
            member.load_state_dict({key[len(begin) :]: x for key, x in state.items() if key.startswith(begin)})

    def logs(self) -> dict[str, float]:
        """The weights, where they are learned."""
        weights = zip(self.names, self.weights.tolist(), strict=True)
        return {f"teacher_weight/{name}": weight for name, weight in weights} if self.learned else {}

    def covers(self, dataset: object) -> bool:
        """See `Teacher`."""
        return all(member.covers(dataset) for member in self.members)

    def require(self, dataset: object) -> None:
        """See `Teacher`; says which member cannot."""
        for name, member in zip(self.names, self.members, strict=True):
            if not member.covers(dataset):
                raise DataError(NOT_COVERED.replace("teacher:", f"teacher.ensemble, {name}:", 1))

    @property
    def shape(self) -> ModelShape:
        """The shape of the member that is looked into."""
        return self._open.shape

    def prepare(self, needs: ActivationRequest) -> None:
        """See `Teacher`; asked of one member."""
        if needs:
            self._open.prepare(needs)

    @property
    def _open(self) -> Teacher:
        """The first member that can be looked into."""
        for member in self.members:
            try:
                _ = member.shape
            except ModelError:
                continue
            return member
        raise self._closed()


def mix(said: Sequence[Targets], weights: Tensor, of: Literal["probabilities", "log_probs"]) -> Targets:
    """What several teachers say together, exactly; nothing is filled in for what a teacher did not say.

    - Whole distributions: `MixtureTargets`.
    - Samples at one temperature, in a mixture of probabilities: one sample, each member's draws with its weight; beside
      whole distributions, `MixtureTargets` that are a sample.
    - Likeliest tokens with a bucket, in a mixture of probabilities: the events that all of them know. These are the
      tokens that every member kept, with their exact probability in the mixture, and one bucket for all others. A
      member with whole distributions knows every token, and takes no event away.

    Args:
        said: over the same positions and vocabulary.
        weights: [M], whose sum is 1.
        of: "probabilities" or "log_probs".

    Raises:
        ShapeError: what they say together is not known.
    """
    sparse = [one for one in said if isinstance(one, SparseTargets)]
    if sparse and of == "log_probs":
        raise ShapeError(
            f"ensemble: expected whole distributions for a mean of log-probabilities, got {sparse[0].kind} targets. "
            "Their product needs every token of each. Use of: probabilities, or members that are models, or caches of "
            "hidden states or whole distributions."
        )
    kinds = {one.kind for one in sparse}
    if "bucket" in kinds and len(kinds) > 1:
        raise ShapeError(
            f"ensemble: expected members that are samples or likeliest tokens, got {' and '.join(sorted(kinds))}. A "
            "sample is right on average alone, and is no bucket. Build both caches with one codec."
        )
    if len({one.temperature for one in sparse}) > 1:
        raise ShapeError(
            "ensemble: expected members that were taken at one temperature, got "
            f"{' and '.join(f'{one.temperature:g}' for one in sparse)}. Build the caches at one."
        )
    if "bucket" in kinds:
        return _common_events(said, weights, sparse)
    if len(sparse) == len(said):
        return _joint_sample(sparse, weights)
    return MixtureTargets(tuple(cast(Sequence[FullTargets | SparseTargets], said)), weights, of)


def _joint_sample(said: Sequence[SparseTargets], weights: Tensor) -> SparseTargets:
    """The mixture of targets that leave nothing to other tokens: the union of their tokens, each of them once."""
    temperature = said[0].temperature
    if len({one.kind for one in said}) > 1:
        raise ShapeError(
            "ensemble: expected members of one kind, got sampled and renormalized. Build both caches with one codec."
        )
    ids = torch.cat([one.ids.to(torch.int64).masked_fill(~one.used(), -1) for one in said], -1)
    chances = torch.cat(
        [one.events(temperature)[..., :-1].exp() * weight for one, weight in zip(said, weights.tolist(), strict=True)],
        -1,
    )
    ids, order = ids.sort(-1)
    first = torch.ones_like(ids, dtype=torch.bool)
    first[..., 1:] = ids[..., 1:] != ids[..., :-1]
    place = first.cumsum(-1) - 1
    total = torch.zeros_like(chances).scatter_add_(-1, place, chances.gather(-1, order) * (ids >= 0))
    kept = torch.zeros_like(ids).scatter_(-1, place, ids.clamp_min(0))
    return SparseTargets(kept, total.log(), said[0].kind, temperature)


def _common_events(said: Sequence[Targets], weights: Tensor, sparse: Sequence[SparseTargets]) -> SparseTargets:
    """The mixture over the tokens that every bucket target kept, and one bucket."""
    fewest = min(sparse, key=lambda one: one.ids.shape[-1])
    # No other target has the id -2, which slots have here that are not used.
    ids, temperature = fewest.ids.to(torch.int64).masked_fill(~fewest.used(), -2), fewest.temperature
    known = reduce(torch.logical_and, [_find(one, ids)[1] for one in sparse])
    ids = ids * known
    total = torch.zeros_like(fewest.events(temperature)[..., :-1])
    for one, weight in zip(said, weights.tolist(), strict=True):
        log_p = _find(one, ids)[0] if isinstance(one, SparseTargets) else token_log_probs(one, ids, temperature)
        total += weight * log_p.exp()
    return SparseTargets(ids, total.log().masked_fill(~known, -math.inf), "bucket", temperature)


def _find(said: SparseTargets, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The log-probabilities [N, K] that bucket targets give to tokens, and whether they kept them."""
    theirs, order = said.ids.to(torch.int64).masked_fill(~said.used(), -1).sort(-1)
    place = torch.searchsorted(theirs, ids).clamp_max(theirs.shape[-1] - 1)
    return said.events(said.temperature)[..., :-1].gather(-1, order.gather(-1, place)), theirs.gather(-1, place) == ids


def _logs(weights: Tensor) -> Tensor:
    return weights.log().clamp_min(torch.finfo(weights.dtype).min)


def _mixed(log_probs: Tensor, weights: Tensor) -> Tensor:
    """log sum_i w_i p_i over the last dimension."""
    return (log_probs.double() + _logs(weights).to(log_probs.device)).logsumexp(-1)


def _over_ranks(counts: Tensor) -> Tensor:
    """The sum over all processes, on the device with which they speak."""
    speaks = torch.distributed.get_backend() == "nccl"
    moved = counts.cuda() if speaks else counts
    torch.distributed.all_reduce(moved)
    return moved.cpu()
