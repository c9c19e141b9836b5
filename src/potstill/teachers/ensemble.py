"""Several teachers as one: a mixture with fixed or learned weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from torch import Tensor, nn

from potstill.errors import DataError, ShapeError, VocabularyError
from potstill.losses.alignment import DISTRIBUTION_TASKS, TOKEN_TASKS, Alignment, Task
from potstill.losses.target_statistics import token_log_probs
from potstill.losses.targets import FullTargets, MixtureTargets, SparseTargets, Targets
from potstill.losses.token_losses import on_float64_device
from potstill.models.capture import ActivationRequest, Activations
from potstill.models.shapes import ModelShape
from potstill.teachers.model import ModelTeacher
from potstill.teachers.source import LoadedTeacher, MemberSource, TeacherSource
from potstill.teachers.teacher import MISSING_ROWS, Teacher, TeacherOutput

STEP_EXPONENT = 0.6  # of the step size of online EM, as in Cappe and Moulines 2009, section 5

MixtureOf = Literal["probabilities", "log_probs"]


class EnsembleTeacher(Teacher):
    """Several teachers of one vocabulary as one; see `MixtureTargets` and `mix` for their joint targets.

    Learned weights maximise the mixture's likelihood of the training data,

        max over w of mean over tokens of log sum_i w_i p_i(y),

    by online EM, one step after each optimiser step: w_i moves by step^-0.6 to the mean of w_i p_i(y) / sum_j w_j
    p_j(y). They need no gradient, no learning rate and nothing of the student.

    Args:
        members: the teachers; a model becomes a `ModelTeacher`. Layers are those of the first that has any.
        weights: not negative, divided by their sum; None for equal ones. Where they are learned, the first values.
        vocabulary: the number of tokens that all share, where heads have padding rows.

    Raises:
        ShapeError: there are fewer than two members, or weights or names do not match them.

    References:
        Jelinek and Mercer 1980, "Interpolated estimation of Markov source parameters from sparse data", for EM of
        the weights of a mixture; Cappe and Moulines 2009, arXiv 0712.4273, for online EM.
    """

    without_own_prompts = "an ensemble"

    def __init__(
        self,
        members: Sequence[Teacher | nn.Module],
        weights: Sequence[float] | None = None,
        *,
        of: MixtureOf = "probabilities",
        learned: bool = False,
        names: Sequence[str] | None = None,
        vocabulary: int | None = None,
    ) -> None:
        given = torch.tensor(_checked_weights(len(members), weights, of, learned)).double()
        self.weights = given / given.sum()
        self.members: list[Teacher] = [
            ModelTeacher(member) if isinstance(member, nn.Module) else member for member in members
        ]
        if strange := [type(member).__name__ for member in self.members if not isinstance(member, Teacher)]:
            raise ShapeError(f"EnsembleTeacher: expected models or Teachers as members, got a {strange[0]}. Load it.")
        self.names = [str(i) for i in range(len(members))] if names is None else list(names)
        if len(set(self.names)) != len(members):
            raise ShapeError(f"EnsembleTeacher: expected {len(members)} different names, got {self.names}.")
        self.of, self.learned, self.vocabulary = of, learned, vocabulary
        self.of_student = any(member.of_student for member in self.members)
        self.max_length = min((m.max_length for m in self.members if m.max_length is not None), default=None)
        self._counts = torch.zeros(len(members) + 1, dtype=torch.float64)  # tokens of each member's share, and of all

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Tensor], alignment: Alignment) -> TeacherOutput:
        outputs = [member(batch, alignment) for member in self.members]
        targets = [output.targets for output in outputs]
        if self.vocabulary is not None:
            targets = [member.slice(self.vocabulary) for member in targets]
        inside = next((output.inside for output in outputs if output.inside != Activations()), Activations())
        by_member = self._member_log_probs(outputs, targets, alignment.labels) if self.learned else None
        mixture = mix(targets, self.weights, self.of)
        log_probs = None
        if isinstance(mixture, SparseTargets) or (isinstance(mixture, MixtureTargets) and mixture.sampled):
            known = [x for output in outputs if (x := output.log_probs_of(alignment.labels)) is not None]
            if len(known) == len(outputs):
                log_probs = self._joint(torch.stack(known, -1)).logsumexp(-1)
        return TeacherOutput(mixture, log_probs, inside, member_log_probs=by_member)

    def _member_log_probs(self, outputs: Sequence[TeacherOutput], targets: Sequence[Targets], labels: Tensor) -> Tensor:
        columns = []  # [N] of each member
        for name, output, sliced in zip(self.names, outputs, targets, strict=True):
            log_probs = replace(output, targets=sliced).log_probs_of(labels)
            if log_probs is None:
                raise DataError(
                    f"ensemble: expected members with log-probabilities of the labels for learned weights, got {name}, "
                    "which does not give them. Fix the weights."
                )
            columns.append(on_float64_device(log_probs).double())
        return torch.stack(columns, -1)

    def _joint(self, log_probs: Tensor) -> Tensor:
        """[N, M] log-probabilities of each member and of a token."""
        log_weights = self.weights.log().clamp_min(torch.finfo(torch.float64).min)
        log_probs = on_float64_device(log_probs).double()
        return log_probs + log_weights.to(log_probs.device)

    def attach(self, student: nn.Module) -> None:
        for member in self.members:
            member.attach(student)

    def update(self, output: TeacherOutput) -> None:
        if output.member_log_probs is not None:
            self._counts[:-1] += self._joint(output.member_log_probs).softmax(-1).sum(0).cpu()
            self._counts[-1] += len(output.member_log_probs)

    def after_step(self, step: int) -> None:
        for member in self.members:
            member.after_step(step)
        if not self.learned:
            return
        counts = self._counts
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            counts = counts.cuda() if torch.distributed.get_backend() == "nccl" else counts
            torch.distributed.all_reduce(counts)
            counts = counts.cpu()
        if counts[-1]:
            size = step**-STEP_EXPONENT
            self.weights = (1 - size) * self.weights + size * counts[:-1] / counts[-1]
        self._counts = torch.zeros_like(self._counts)

    def state_dict(self) -> dict[str, Tensor]:
        state = {"weights": self.weights.clone()} if self.learned else {}
        for i, member in enumerate(self.members):
            state |= {f"{i}.{name}": value for name, value in member.state_dict().items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if self.learned:
            self.weights = state["weights"].clone()
        for i, member in enumerate(self.members):
            prefix = f"{i}."
            member.load_state_dict({k.removeprefix(prefix): x for k, x in state.items() if k.startswith(prefix)})

    @property
    def member_weights(self) -> dict[str, float]:
        return dict(zip(self.names, self.weights.tolist(), strict=True))

    def logs(self) -> dict[str, float]:
        return {f"teacher_weight/{name}": x for name, x in self.member_weights.items()} if self.learned else {}

    def covers(self, dataset: object) -> bool:
        return all(member.covers(dataset) for member in self.members)

    def require(self, dataset: object) -> None:
        for name, member in zip(self.names, self.members, strict=True):
            if not member.covers(dataset):
                raise DataError(f"teacher.ensemble, {name}: {MISSING_ROWS}")

    @property
    def shape(self) -> ModelShape:
        return self._member_with_layers.shape

    def prepare(self, needs: ActivationRequest) -> None:
        if needs:
            self._member_with_layers.prepare(needs)

    @property
    def _member_with_layers(self) -> Teacher:
        for member in self.members:
            if member.has_layers:
                return member
        raise self._no_layers()


@dataclass(frozen=True)
class EnsembleSource(TeacherSource):
    """Several teachers of one vocabulary.

    Args:
        ensemble: the members, each with its own model, cache or server
        of: what the members are averaged by
        weights: fixed; learned ones maximise the likelihood of the training data
    """

    ensemble: tuple[MemberSource, ...]
    of: MixtureOf = "probabilities"
    weights: Literal["fixed", "learned"] = "fixed"
    name = "ensemble"
    tasks = DISTRIBUTION_TASKS

    def __post_init__(self) -> None:
        super().__post_init__()
        for i, member in enumerate(self.ensemble):
            if member.prefetch:
                raise ShapeError(f"expected prefetch beside the ensemble, got it in member {i}.")
            if member.cache_path is not None and member.model_path is not None:
                raise ShapeError(f"expected model or cache for a member of an ensemble, got both in member {i}.")
        weights = self._member_weights
        if weights and len(weights) < len(self.ensemble):
            raise ShapeError(f"expected a weight for every member of the ensemble or for none, got {len(weights)}.")
        _checked_weights(len(self.ensemble), weights or None, self.of, self.weights == "learned")

    @property
    def _member_weights(self) -> list[float]:
        return [member.weight for member in self.ensemble if member.weight is not None]

    @property
    def title(self) -> str:
        return f"an ensemble of {', '.join(member.title for member in self.ensemble)}"

    def describe(self, teacher: Teacher) -> str:
        if teacher.member_weights is None:
            return self.title
        members = zip(self.ensemble, teacher.member_weights.values(), strict=True)
        described = ", ".join(f"{member.title} ({weight:.3f})" for member, weight in members)
        return f"an ensemble, {self.weights} weights of {self.of.replace('_', '-')}: {described}"

    def sources(self, key: str = "teacher") -> Iterator[tuple[str, TeacherSource]]:
        yield key, self
        for i, member in enumerate(self.ensemble):
            yield from member.sources(f"{key}.ensemble.{i}")

    @property
    def live(self) -> TeacherSource | None:
        return self if all(member.live is not None for member in self.ensemble) else None

    def load(self, student: str | None, task: Task = "causal", key: str = "teacher") -> LoadedTeacher:
        loaded = [member.load(student, task, f"{key}.ensemble.{i}") for i, member in enumerate(self.ensemble)]
        vocabulary = loaded[0].tokenizer.get_vocab()
        for i, member in enumerate(loaded):
            if member.tokenizer.get_vocab() != vocabulary:
                raise VocabularyError(
                    f"{key}.ensemble.{i}: expected the token -> id map of {self.ensemble[0].title}, got another of "
                    f"{self.ensemble[i].title}, whose distributions cannot be averaged with it. Leave one out."
                )
        short = [member.title.rstrip("/").rpartition("/")[2] for member in self.ensemble]
        teacher = EnsembleTeacher(
            [member.teacher for member in loaded],
            self._member_weights or None,
            of=self.of,
            learned=self.weights == "learned",
            names=[name if short.count(name) == 1 else f"{name}_{i}" for i, name in enumerate(short)],
            vocabulary=max(vocabulary.values()) + 1 if task in TOKEN_TASKS else None,
        )
        config = next((member.config for member in loaded if member.config is not None), None)
        models = {key: model for member in loaded for key, model in member.models.items()}
        return LoadedTeacher(teacher, loaded[0].tokenizer, config=config, models=models)


def mix(targets: Sequence[Targets], weights: Tensor, of: MixtureOf) -> Targets:
    """Compute the exact mixture of several teachers' targets, with weights [M] whose sum is 1.

    - Full distributions: `MixtureTargets`.
    - Samples at one temperature, in a mixture of probabilities: one sample, each member's draws with its weight; beside
      full distributions, `MixtureTargets` that are a sample.
    - Top-k with a bucket, in a mixture of probabilities: the tokens that every member kept, with their exact
      probability in the mixture, and one bucket for all others. A member with full distributions keeps every token.

    Raises:
        ShapeError: the mixture is not known.
    """
    sparse = [member for member in targets if isinstance(member, SparseTargets)]
    if sparse and of == "log_probs":
        raise ShapeError(
            f"ensemble: expected full distributions for a mean of log-probabilities, got {sparse[0].kind} targets. "
            "Use of: probabilities, or members that are models, or caches of hidden states or full distributions."
        )
    kinds = {member.kind for member in sparse}
    if "bucket" in kinds and len(kinds) > 1:
        raise ShapeError(
            f"ensemble: expected members that are all samples or all top-k, got {' and '.join(sorted(kinds))}. Build "
            "both caches with one codec."
        )
    temperatures = [member.temperature for member in sparse]
    if len(set(temperatures)) > 1:
        raise ShapeError(
            "ensemble: expected members of one temperature, got "
            f"{' and '.join(f'{temperature:g}' for temperature in temperatures)}. Build the caches at one."
        )
    if "bucket" in kinds:
        return _mix_top_k(targets, weights, sparse)
    if len(sparse) == len(targets):
        return _mix_samples(sparse, weights)
    return MixtureTargets(tuple(cast(Sequence[FullTargets | SparseTargets], targets)), weights, of)


def _mix_samples(targets: Sequence[SparseTargets], weights: Tensor) -> SparseTargets:
    """The union of their tokens, each of them once."""
    kind, temperature = targets[0].kind, targets[0].temperature
    if any(member.kind != kind for member in targets):
        raise ShapeError(
            "ensemble: expected members of one kind, got sampled and renormalized. Build both caches with one codec."
        )
    ids, order = torch.cat([_used_ids(member) for member in targets], -1).sort(-1)
    weighted = zip(targets, weights.tolist(), strict=True)
    probs = torch.cat([member.events(temperature)[..., :-1].exp() * weight for member, weight in weighted], -1)
    first = torch.ones_like(ids, dtype=torch.bool)
    first[..., 1:] = ids[..., 1:] != ids[..., :-1]
    slot = first.cumsum(-1) - 1
    total = torch.zeros_like(probs).scatter_add_(-1, slot, probs.gather(-1, order) * (ids >= 0))
    unique = torch.zeros_like(ids).scatter_(-1, slot, ids.clamp_min(0))
    return SparseTargets(unique, total.log(), kind, temperature)


def _mix_top_k(targets: Sequence[Targets], weights: Tensor, sparse: Sequence[SparseTargets]) -> SparseTargets:
    fewest = min(sparse, key=lambda member: member.ids.shape[-1])
    ids, temperature = _used_ids(fewest, -2), fewest.temperature  # an id that no other target has
    known = torch.ones_like(ids, dtype=torch.bool)
    total = torch.zeros_like(fewest.events(temperature)[..., :-1])
    for member, weight in zip(targets, weights.tolist(), strict=True):
        if isinstance(member, SparseTargets):
            kept, order = _used_ids(member).sort(-1)
            slot = torch.searchsorted(kept, ids).clamp_max(kept.shape[-1] - 1)
            log_probs = member.events(temperature)[..., :-1].gather(-1, order.gather(-1, slot))
            known &= kept.gather(-1, slot) == ids
        else:
            log_probs = token_log_probs(member, ids.clamp_min(0), temperature)
        total += weight * log_probs.exp()
    return SparseTargets(ids * known, total.log().masked_fill(~known, -math.inf), "bucket", temperature)


def _used_ids(targets: SparseTargets, unused: int = -1) -> Tensor:
    return targets.ids.to(torch.int64).masked_fill(~targets.used(), unused)


def _checked_weights(members: int, weights: Sequence[float] | None, of: str, learned: bool) -> list[float]:
    if members < 2:
        raise ShapeError(f"ensemble: expected two members or more, got {members}.")
    weights = [1.0] * members if weights is None else list(weights)
    if len(weights) != members or not all(0 <= weight < math.inf for weight in weights) or not any(weights):
        raise ShapeError(f"ensemble: expected {members} weights that are not negative nor all 0, got {weights}.")
    if learned and of == "log_probs":
        raise ShapeError(
            "ensemble: expected of: probabilities where weights are learned, got log_probs, whose mixture does not "
            "follow from the members' log-probabilities of the labels. Fix the weights."
        )
    return weights
