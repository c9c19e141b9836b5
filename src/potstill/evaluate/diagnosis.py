"""What is measured to find out why a run went as it did; `findings.py` says it in words.

Everything is kept token by token over a sample of rows, so that the same tokens can be grouped by place, by frequency
and by how sure the teacher is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from potstill.evaluate.quality import TOP, logits_at
from potstill.losses.alignment import Alignment, causal_alignment
from potstill.losses.divergences import JSD, LOG_ZERO, ForwardKL
from potstill.losses.targets import DenseTargets
from potstill.losses.token_losses import token_divergence

TEMPERATURES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
HEADS = (1, 10, 100)  # likeliest tokens whose mass is told
UNLIKELY = 0.001  # a label that the teacher gives less
CERTAIN = 0.9  # a teacher that is sure of another token
ELEMENTS = 2**24  # of logits at a time
EXAMPLES = 5

Teach = Callable[[Mapping[str, Tensor], Alignment], Tensor | None]  # -> logits [N, V], or None where it says less


@dataclass(frozen=True)
class Softening:
    """A teacher's distributions at one temperature, means over tokens.

    Args:
        temperature: of the softmax.
        entropy: nats.
        support: exp(entropy): among how many equally likely tokens it would be as unsure.
        mass: k -> what its k likeliest tokens have together.
    """

    temperature: float
    entropy: float
    support: float
    mass: dict[int, float]


@dataclass
class Tokens:
    """What was said at each counting token, [N] each, on the CPU.

    Args:
        label: the token of the data.
        column: its place in the row.
        row: the row of the sample.
        entropy: who -> nats, teacher and models.
        label_log_prob: who -> what it gives the label.
        certainty: of the teacher's likeliest token.
        favourite: that token.
        kl: model -> KL(teacher || model).
        js: model -> Jensen-Shannon divergence.
        shared: model -> share of the teacher's ten likeliest among its own ten.
        agreed: model -> whether the likeliest is the same.
    """

    label: Tensor
    column: Tensor
    row: Tensor
    entropy: dict[str, Tensor]
    label_log_prob: dict[str, Tensor]
    certainty: Tensor | None
    favourite: Tensor | None
    kl: dict[str, Tensor]
    js: dict[str, Tensor]
    shared: dict[str, Tensor]
    agreed: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.label)


@dataclass
class _Softened:
    """Running sums over tokens at each temperature."""

    sums: dict[float, list[float]] = field(default_factory=dict)
    tokens: int = 0

    def add(self, logits: Tensor, temperatures: Sequence[float]) -> None:
        self.tokens += len(logits)
        for temperature in temperatures:
            log_probs = (logits / temperature).log_softmax(-1).clamp_min(LOG_ZERO)
            top = log_probs.topk(min(max(HEADS), logits.shape[-1]), -1).values.exp().double()
            found = [float(-(log_probs.exp() * log_probs).sum(-1).double().sum())]
            found += [float(top[:, :k].sum()) for k in HEADS]
            before = self.sums.get(temperature, [0.0] * len(found))
            self.sums[temperature] = [a + b for a, b in zip(before, found, strict=True)]

    def finish(self) -> list[Softening]:
        found = []
        for temperature, sums in sorted(self.sums.items()):
            entropy, *mass = (value / max(self.tokens, 1) for value in sums)
            found.append(Softening(temperature, entropy, math.exp(entropy), dict(zip(HEADS, mass, strict=True))))
        return found


def soften(logits: Tensor, temperatures: Sequence[float] = TEMPERATURES) -> list[Softening]:
    """What temperatures make of logits [N, V]: a `Softening` for each, by rising temperature.

    >>> broad = soften(torch.tensor([[2.0, 1.0, 0.0]]), (1.0, 4.0))
    >>> [round(one.support, 2) for one in broad]
    [2.3, 2.94]
    """
    softened = _Softened()
    softened.add(logits.float(), temperatures)
    return softened.finish()


@torch.no_grad()
def look(
    teach: Teach,
    models: Mapping[str, nn.Module],
    batches: Iterable[Mapping[str, Tensor]],
    *,
    vocabulary: int | None = None,
    temperatures: Sequence[float] = TEMPERATURES,
) -> tuple[Tokens, list[Softening]]:
    """Ask the teacher and the models about the same batches.

    Args:
        teach: the teacher's logits at the counting positions.
        models: name -> student.
        batches: input_ids, attention_mask and labels, [B, T] each.
        vocabulary: compare over the first tokens only; see `LMHead.slice`.
        temperatures: at which the teacher is described.

    Returns:
        What was said at each token, and the teacher at each temperature (empty where it tells no whole distributions).
    """
    kept: dict[tuple[str, str], list[Tensor]] = {}
    softened = _Softened()
    rows = 0
    was_training = {name: model.training for name, model in models.items()}
    for model in models.values():
        model.eval()

    def keep(what: str, who: str, values: Tensor) -> None:
        kept.setdefault((what, who), []).append(values.detach().cpu())

    for batch in batches:
        alignment = causal_alignment(batch["labels"])
        expected = teach(batch, alignment)
        said = {name: logits_at(model, batch, alignment, vocabulary) for name, model in models.items()}
        keep("label", "", alignment.labels)
        keep("column", "", alignment.column)
        keep("row", "", rows + alignment.positions // alignment.length)
        rows += len(batch["labels"])
        for part in _pieces(len(alignment), vocabulary or _width(expected, said)):
            labels = alignment.labels[part].cpu()
            theirs = None if expected is None else expected[part].float().cpu()
            if theirs is not None:
                log_probs = _describe(keep, "teacher", theirs, labels)
                best = log_probs.max(-1)
                keep("certainty", "", best.values.exp())
                keep("favourite", "", best.indices)
                softened.add(theirs, temperatures)
            for name, logits in said.items():
                mine = logits[part].cpu()
                _describe(keep, name, mine, labels)
                if theirs is not None:
                    _compare(keep, name, mine, theirs)
    for name, model in models.items():
        model.train(was_training[name])
    return _table(kept, list(models)), softened.finish()


def _width(expected: Tensor | None, said: Mapping[str, Tensor]) -> int:
    return next((logits.shape[-1] for logits in (expected, *said.values()) if logits is not None), 1)


def _pieces(tokens: int, width: int) -> Iterator[slice]:
    step = max(1, ELEMENTS // width)
    return (slice(start, start + step) for start in range(0, tokens, step))


def _describe(keep: Callable[[str, str, Tensor], None], who: str, logits: Tensor, labels: Tensor) -> Tensor:
    log_probs = logits.log_softmax(-1).clamp_min(LOG_ZERO)
    keep("entropy", who, -(log_probs.exp() * log_probs).sum(-1))
    keep("label_log_prob", who, log_probs.gather(-1, labels[:, None])[:, 0])
    return log_probs


def _compare(keep: Callable[[str, str, Tensor], None], name: str, mine: Tensor, theirs: Tensor) -> None:
    targets = DenseTargets(theirs)
    keep("kl", name, token_divergence(mine, targets, ForwardKL()))
    keep("js", name, token_divergence(mine, targets, JSD(0.5)))
    top = min(TOP, mine.shape[-1])
    own, other = (each.topk(top, -1).indices for each in (mine, theirs))
    keep("shared", name, (own[:, :, None] == other[:, None, :]).any(1).double().mean(-1))
    keep("agreed", name, (own[:, 0] == other[:, 0]).double())


def _table(kept: Mapping[tuple[str, str], list[Tensor]], models: Sequence[str]) -> Tokens:
    whole = {key: torch.cat(values) for key, values in kept.items()}

    def of(what: str, names: Sequence[str]) -> dict[str, Tensor]:
        return {name: whole[what, name] for name in names if (what, name) in whole}

    everyone = ["teacher", *models]
    return Tokens(
        label=whole["label", ""],
        column=whole["column", ""],
        row=whole["row", ""],
        entropy=of("entropy", everyone),
        label_log_prob=of("label_log_prob", everyone),
        certainty=whole.get(("certainty", "")),
        favourite=whole.get(("favourite", "")),
        kl=of("kl", models),
        js=of("js", models),
        shared=of("shared", models),
        agreed=of("agreed", models),
    )


def distributions(tokens: Tokens, frequency: Tensor) -> dict[str, dict[str, Any]]:
    """How far each model is from the teacher: in all, by place in the row, and by how often the data has the token.

    Args:
        tokens: with a teacher.
        frequency: [V] how often each token counts in the training data.
    """
    found = {}
    seen = frequency[tokens.label]
    places = int(tokens.column.max()) + 1 if len(tokens) else 1
    edges = [round(i * places / min(8, places)) for i in range(min(8, places) + 1)]
    for name, kl in tokens.kl.items():
        own, theirs = tokens.label_log_prob[name], tokens.label_log_prob["teacher"]
        excess = theirs - own
        groups = []
        for title, least, most in FREQUENCIES:
            inside = (seen >= least) & (seen < most)
            if inside.any():
                groups.append(
                    {
                        "name": title,
                        "tokens": int(inside.sum()),
                        "kl": _mean(kl[inside]),
                        "loss": -_mean(own[inside]),
                        "teacher_loss": -_mean(theirs[inside]),
                        "share_of_excess": float(excess[inside].double().sum() / excess.double().sum()),
                    }
                )
        found[name] = {
            "kl": _mean(kl),
            "js": _mean(tokens.js[name]),
            "agreement": _mean(tokens.agreed[name]),
            "top_k_agreement": _mean(tokens.shared[name]),
            "loss": -_mean(own),
            "entropy": _mean(tokens.entropy[name]),
            "by_position": {
                "edges": edges,
                "kl": [_mean(kl[(tokens.column >= a) & (tokens.column < b)]) for a, b in pairwise(edges)],
            },
            "by_frequency": groups,
        }
    return found


FREQUENCIES = (
    ("never", 0, 1),
    ("1 to 9 times", 1, 10),
    ("10 to 99", 10, 100),
    ("100 to 999", 100, 1000),
    ("1,000 or more", 1000, math.inf),
)


def _mean(values: Tensor) -> float:
    return float(values.double().mean()) if len(values) else math.nan


def irreducible(tokens: Tokens) -> dict[str, Any]:
    """What no student can be without: the teacher's entropy, in the cross-entropy with its distributions.

        -sum p log q = H(p) + KL(p || q)

    Returns:
        teacher_entropy and teacher_loss (with the labels), nats; and for each model the whole and the entropy's share.
    """
    entropy = _mean(tokens.entropy["teacher"])
    return {
        "teacher_entropy": entropy,
        "teacher_loss": -_mean(tokens.label_log_prob["teacher"]),
        "models": {
            name: {"soft_cross_entropy": entropy + _mean(kl), "share": entropy / max(entropy + _mean(kl), 1e-12)}
            for name, kl in tokens.kl.items()
        },
    }


def label_noise(tokens: Tokens) -> dict[str, Any]:
    """Labels that the teacher finds very unlikely.

    Returns:
        unlikely: the share of labels with a probability below `UNLIKELY`; contradicted: those of them where it is sure
        (`CERTAIN`) of another token; examples: the places of the worst, from 0 in the sample.
    """
    assert tokens.certainty is not None
    probability = tokens.label_log_prob["teacher"].exp()
    unlikely = probability < UNLIKELY
    contradicted = unlikely & (tokens.certainty > CERTAIN)
    count = int(contradicted.sum())
    score = torch.where(contradicted, tokens.certainty.double() - probability.double(), -1.0)
    return {
        "unlikely": float(unlikely.double().mean()),
        "contradicted": count / max(len(tokens), 1),
        "examples": score.topk(min(EXAMPLES, count)).indices.tolist(),
    }


# The gradients.


@dataclass(frozen=True)
class Flow:
    """What reaches one part of a student.

    Args:
        part: its layer's number, or the name of what is no layer.
        gradient: its root mean square over the part's weights.
        weight: likewise.
        ratio: the norm of the gradient over that of the weights.
    """

    part: str
    gradient: float
    weight: float
    ratio: float


@dataclass(frozen=True)
class Gradients:
    """Gradients of one student, from input to output.

    Args:
        loss: of the objective on these batches, the mean.
        flow: by part.
        none: weights that no gradient reaches, or only zeros.
        bad: weights whose gradient is not finite.
    """

    loss: float
    flow: list[Flow]
    none: list[str]
    bad: list[str]


def gradient_flow(student: nn.Module, losses: Iterable[Tensor]) -> Gradients:
    """Where gradients go.

    Args:
        student: whose parameters are looked at; its gradients are cleared before and after.
        losses: one for each batch, made as they are asked for.
    """
    student.zero_grad(set_to_none=True)
    values = []
    for loss in losses:
        loss.backward()
        values.append(float(loss.detach()))
    parts: dict[str, list[float]] = {}
    none, bad = [], []
    for name, parameter in student.named_parameters():
        if not parameter.requires_grad:
            continue
        gradient = parameter.grad
        if gradient is None or not gradient.count_nonzero():
            none.append(name)
        elif not gradient.isfinite().all():
            bad.append(name)
        sums = parts.setdefault(_part(name), [0.0, 0.0, 0])
        sums[0] += 0.0 if gradient is None else float(gradient.double().square().sum())
        sums[1] += float(parameter.detach().double().square().sum())
        sums[2] += parameter.numel()
    student.zero_grad(set_to_none=True)
    flow = [
        Flow(part, math.sqrt(g / n), math.sqrt(w / n), math.sqrt(g / w) if w else math.inf)
        for part, (g, w, n) in parts.items()
    ]
    return Gradients(sum(values) / max(len(values), 1), flow, none, bad)


def _part(name: str) -> str:
    """The number of a parameter's layer, or what its module is called."""
    numbers = [piece for piece in name.split(".") if piece.isdigit()]
    return f"layer {numbers[0]}" if numbers else name.split(".")[-2]
