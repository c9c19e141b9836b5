"""Measurements of a sample's tokens and of gradients that explain how a run went; `findings.py` interprets them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from potstill.errors import ShapeError
from potstill.evaluate.quality import FullTargets, logits_in_parts, outputs_at, teacher_distances
from potstill.losses.alignment import Alignment, causal_alignment
from potstill.losses.divergences import LOG_ZERO
from potstill.losses.token_losses import on_float64_device
from potstill.models.split import evaluation_mode, split_model

TEMPERATURES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
TOP_COUNTS = (1, 5, 10, 100)  # numbers of most likely tokens whose total probability is reported
UNLIKELY = 0.001  # label probability under the teacher
CONFIDENT = 0.9  # probability of the teacher's top token
EXAMPLES = 5
# Groups of tokens, and how often each occurs at least in the training data.
FREQUENCIES = {"never": 0, "1 to 9 times": 1, "10 to 99": 10, "100 to 999": 100, "1,000 or more": 1000}

# The teacher's distributions at the N target positions, or None if it has no full ones.
TeacherOutputs = Callable[[Mapping[str, Tensor], Alignment], FullTargets | None]
Stats = dict[str, Tensor]  # quantity -> [N], on the CPU


@dataclass(frozen=True)
class Softening:
    """The teacher's distributions at one temperature, means over tokens."""

    temperature: float
    entropy: float  # nats
    support: float  # exp(entropy), the effective number of tokens
    counted: float  # tokens with a probability above 1 / vocabulary
    mass: dict[int, float]  # k -> total probability of the k most likely tokens


@dataclass(frozen=True)
class TokenStats:
    """Statistics of each target token."""

    label: Tensor  # [N] token ids of the data
    column: Tensor  # [N] positions in the row
    row: Tensor  # [N] rows of the sample
    # name -> entropy and label_log_prob; for students also those of `teacher_distances`, for "teacher" also confidence
    # (probability of its top token) and prediction (its id). Without full distributions there is no teacher, and
    # nothing that compares with it
    models: dict[str, Stats]

    def __len__(self) -> int:
        return len(self.label)

    @property
    def students(self) -> dict[str, Stats]:
        """The models that were compared with the teacher."""
        return {name: stats for name, stats in self.models.items() if "kl" in stats}


def _softening_sums(logits: Tensor, temperatures: Sequence[float]) -> Tensor:
    """[temperatures, 2 + TOP_COUNTS] sums over tokens: entropy, counted, and probability of the most likely tokens."""
    sums = []
    for temperature in temperatures:
        log_probs = (logits / temperature).log_softmax(-1).clamp_min(LOG_ZERO)
        top = log_probs.topk(min(max(TOP_COUNTS), logits.shape[-1]), -1).values.exp().double()
        entropy = -(log_probs.exp() * log_probs).sum(-1).double().sum()
        counted = (log_probs > -math.log(logits.shape[-1])).sum().double()
        sums.append(torch.stack([entropy, counted, *(top[:, :k].sum() for k in TOP_COUNTS)]))
    return torch.stack(sums)


def _softenings(sums: Tensor, temperatures: Sequence[float], tokens: int) -> list[Softening]:
    rows = zip(temperatures, (sums / tokens).tolist(), strict=True) if tokens else ()
    return [
        Softening(temperature, entropy, math.exp(entropy), counted, dict(zip(TOP_COUNTS, mass, strict=True)))
        for temperature, (entropy, counted, *mass) in rows
    ]


def soften(logits: Tensor, temperatures: Sequence[float] = TEMPERATURES) -> list[Softening]:
    """Describe the distributions of logits [..., V] at each temperature, in rising order.

    >>> broad = soften(torch.tensor([[2.0, 1.0, 0.0]]), (1.0, 4.0))
    >>> [round(at.support, 2) for at in broad], [at.counted for at in broad]
    ([2.3, 2.94], [1.0, 1.0])
    """
    temperatures = sorted(temperatures)
    if not temperatures or not temperatures[0] > 0:
        raise ShapeError(f"soften: expected temperatures > 0, got {temperatures or 'none'}.")
    rows = logits.float().cpu().reshape(-1, logits.shape[-1])
    return _softenings(_softening_sums(rows, temperatures), temperatures, len(rows))


@torch.no_grad()
def token_stats(
    teacher_outputs: TeacherOutputs,
    models: Mapping[str, nn.Module],
    batches: Iterable[Mapping[str, Tensor]],
    *,
    vocabulary: int | None = None,
    temperatures: Sequence[float] = TEMPERATURES,
) -> tuple[TokenStats, list[Softening]]:
    """Describe teacher and models on the same batches, the teacher at each temperature; see `compare`."""
    temperatures = sorted(temperatures)
    sums, softened, rows = torch.zeros(len(temperatures), 2 + len(TOP_COUNTS), dtype=torch.float64), 0, 0
    collected: dict[str, list[Stats]] = defaultdict(list)
    splits = {name: split_model(model) for name, model in models.items()}
    with evaluation_mode(*models.values()):
        for batch in batches:
            alignment = causal_alignment(batch["labels"])
            expected = teacher_outputs(batch, alignment)
            outputs = {name: outputs_at(model, splits[name], batch, alignment) for name, model in models.items()}
            measured: dict[str, FullTargets] = {**outputs} if expected is None else {**outputs, "teacher": expected}
            row = rows + alignment.positions // alignment.length
            rows += len(batch["labels"])
            collected[""].append({"label": alignment.labels.cpu(), "column": alignment.column.cpu(), "row": row.cpu()})
            for part, logits in logits_in_parts(measured, vocabulary, torch.device("cpu")):
                labels, teacher = alignment.labels[part].cpu(), logits.pop("teacher", None)
                if teacher is not None:
                    best = teacher.log_softmax(-1).clamp_min(LOG_ZERO).max(-1)
                    top = {"confidence": best.values.exp(), "prediction": best.indices}
                    collected["teacher"].append(_own_stats(teacher, labels) | top)
                    sums += _softening_sums(teacher, temperatures)
                    softened += len(teacher)
                for name, student in logits.items():
                    distances = {} if teacher is None else teacher_distances(student, teacher)
                    collected[name].append(_own_stats(student, labels) | distances)
    tables = {name: {key: torch.cat([p[key] for p in parts]) for key in parts[0]} for name, parts in collected.items()}
    return TokenStats(**tables.pop(""), models=tables), _softenings(sums, temperatures, softened)


def _own_stats(logits: Tensor, labels: Tensor) -> Stats:
    log_probs = logits.log_softmax(-1).clamp_min(LOG_ZERO)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return {"entropy": entropy, "label_log_prob": log_probs.gather(-1, labels[:, None])[:, 0]}


def distributions(tokens: TokenStats, frequency: Tensor) -> dict[str, dict[str, Any]]:
    """Summarize each model's distance from the teacher: overall, by position, and by `frequency` [V] in training."""
    positions = int(tokens.column.max()) + 1 if len(tokens) else 1
    bins = min(8, positions)
    edges = [round(i * positions / bins) for i in range(bins + 1)]
    group_of = torch.bucketize(frequency[tokens.label], torch.tensor(list(FREQUENCIES.values())), right=True) - 1
    groups = {title: group_of == i for i, title in enumerate(FREQUENCIES)}
    expected = tokens.models["teacher"]["label_log_prob"]
    by_model = {}
    for name, stats in tokens.students.items():
        kl, log_prob = stats["kl"], stats["label_log_prob"]
        excess = (expected - log_prob).double()
        by_position = [_mean(kl[(tokens.column >= a) & (tokens.column < b)]) for a, b in pairwise(edges)]
        by_model[name] = {
            **{key: _mean(stats[key]) for key in ("kl", "js", "agreement")},
            "top_k_agreement": _mean(stats["overlap"]),
            "loss": -_mean(log_prob),
            "entropy": _mean(stats["entropy"]),
            "by_position": {"edges": edges, "kl": by_position},
            "by_frequency": [
                {
                    "name": title,
                    "tokens": int(group.sum()),
                    "kl": _mean(kl[group]),
                    "loss": -_mean(log_prob[group]),
                    "teacher_loss": -_mean(expected[group]),
                    "share_of_excess": float(excess[group].sum() / excess.sum()),
                }
                for title, group in groups.items()
                if group.any()
            ],
        }
    return by_model


def _mean(values: Tensor) -> float:
    return float(values.double().mean()) if len(values) else math.nan


def irreducible(tokens: TokenStats) -> dict[str, Any]:
    """Split each student's cross-entropy with the teacher in nats: -sum p log q = H(p) + KL(p || q)."""
    entropy = _mean(tokens.models["teacher"]["entropy"])
    soft = {name: entropy + _mean(stats["kl"]) for name, stats in tokens.students.items()}
    return {
        "teacher_entropy": entropy,
        "teacher_loss": -_mean(tokens.models["teacher"]["label_log_prob"]),
        "models": {name: {"soft_cross_entropy": x, "share": entropy / max(x, 1e-12)} for name, x in soft.items()},
    }


def label_noise(tokens: TokenStats) -> dict[str, Any]:
    """Compute the shares of labels `UNLIKELY` to the teacher, and of those where it is `CONFIDENT` in another token."""
    teacher = tokens.models["teacher"]
    probability, confidence = teacher["label_log_prob"].exp(), teacher["confidence"]
    unlikely = probability < UNLIKELY
    contradicted = unlikely & (confidence > CONFIDENT)
    count = int(contradicted.sum())
    score = torch.where(contradicted, confidence.double() - probability.double(), -1.0)
    return {
        "unlikely": float(unlikely.double().mean()),
        "contradicted": count / max(len(tokens), 1),
        "examples": score.topk(min(EXAMPLES, count)).indices.tolist(),
    }


@dataclass(frozen=True)
class GradientStats:
    """The gradient of one parameter, over its numbers."""

    mean: float
    std: float  # of a sample; NaN for a single number
    max: float
    min: float
    has_nan: bool


def gradient_stats(model: nn.Module) -> dict[str, GradientStats]:
    """Describe the gradients that parameters have now, by name, and leave them as they are; others are left out."""
    gradients = {name: x.grad.float() for name, x in model.named_parameters() if x.grad is not None}
    return {
        name: GradientStats(
            float(x.mean()),
            float(x.std()) if x.numel() > 1 else math.nan,
            float(x.max()),
            float(x.min()),
            bool(x.isnan().any()),
        )
        for name, x in gradients.items()
    }


@dataclass(frozen=True)
class PartGradient:
    """The gradient of one part of a student."""

    part: str  # "layer N", or the name of another module
    gradient: float  # root mean square of the gradient over the part's weights
    weight: float  # root mean square of the weights
    ratio: float  # norm of the gradient over norm of the weights


@dataclass(frozen=True)
class GradientFlow:
    """Gradients of one student, from input to output."""

    loss: float  # mean of the objective on these batches
    flow: list[PartGradient]
    none: list[str]  # weights with no gradient, or only zeros
    bad: list[str]  # weights with a NaN or infinite gradient


def gradient_flow(student: nn.Module, losses: Iterable[Tensor]) -> GradientFlow:
    """Measure the gradients of each part of a student, summed over lazily computed losses of batches."""
    student.zero_grad(set_to_none=True)
    values = []
    for loss in losses:
        loss.backward()
        values.append(float(loss.detach()))
    parts: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0])
    none, bad = [], []
    for name, parameter in student.named_parameters():
        if not parameter.requires_grad:
            continue
        gradient = torch.zeros(()) if parameter.grad is None else parameter.grad
        if not gradient.count_nonzero():
            none.append(name)
        elif not gradient.isfinite().all():
            bad.append(name)
        numbers = [piece for piece in name.split(".") if piece.isdigit()]
        sums = parts[f"layer {numbers[0]}" if numbers else name.split(".")[-2]]
        sums[0] += float(on_float64_device(gradient).double().square().sum())
        sums[1] += float(on_float64_device(parameter.detach()).double().square().sum())
        sums[2] += parameter.numel()
    student.zero_grad(set_to_none=True)
    flow = [
        PartGradient(part, math.sqrt(g / n), math.sqrt(w / n), math.sqrt(g / w) if w else math.inf)
        for part, (g, w, n) in parts.items()
    ]
    return GradientFlow(sum(values) / max(len(values), 1), flow, none, bad)
