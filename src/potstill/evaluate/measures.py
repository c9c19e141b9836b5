"""What is told of a model, by what it is asked for: lines of tables, and the words around them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from potstill.evaluate.report.words import count, milliseconds, nats, percent, perplexity, size
from potstill.losses.alignment import Task


@dataclass(frozen=True)
class Measure:
    """A line of the table: what is measured, what that means, and how it is written."""

    key: str
    name: str
    meaning: str
    write: Callable[[Any], str]
    better: Callable[[Any, Any], Any] | None = None


def _percent(share: float) -> str:
    return percent(share, 1)


def _correlation(value: float) -> str:
    return f"{value:.3f}"


_CALIBRATION = Measure(
    "ece", "Calibration error (ECE)", "How far its confidence is from how often it is right.", _percent, min
)


def _of_tokens(loss: Measure, perplexity_of: Measure, token: str) -> tuple[Measure, ...]:
    return (
        loss,
        perplexity_of,
        Measure(
            "agreement",
            "Top-1 agreement",
            f"How often its likeliest {token} is the teacher's; higher is nearer.",
            _percent,
            max,
        ),
        Measure(
            "kl", "KL to the teacher", "KL(teacher || model) per token, in nats: 0 is the same distribution.", nats, min
        ),
    )


# What each task's quality is told by: keys of `potstill.evaluate.sequence.Measured`.
QUALITY: dict[Task, tuple[Measure, ...]] = {
    "causal": _of_tokens(
        Measure("loss", "Held-out loss", "Mean cross-entropy per held-out token, in nats; lower is better.", nats, min),
        Measure("perplexity", "Perplexity", "The same as exp(loss): 1 would be certainty.", perplexity, min),
        "next token",
    ),
    "masked": _of_tokens(
        Measure("loss", "Held-out loss", "Mean cross-entropy per masked token, in nats; lower is better.", nats, min),
        Measure(
            "perplexity",
            "Pseudo-perplexity",
            "The same as exp(loss), of masked tokens alone: 1 would be certainty.",
            perplexity,
            min,
        ),
        "token behind a mask",
    ),
    "classification": (
        Measure("loss", "Held-out loss", "Mean cross-entropy per held-out row, in nats; lower is better.", nats, min),
        Measure("accuracy", "Accuracy", "How often its likeliest class is the right one.", _percent, max),
        Measure("f1_macro", "Macro F1", "The mean of the classes' F1: rare ones count as much.", _percent, max),
        Measure(
            "agreement", "Agreement", "How often its likeliest class is the teacher's; higher is nearer.", _percent, max
        ),
        Measure(
            "kl", "KL to the teacher", "KL(teacher || model) per row, in nats: 0 is the same distribution.", nats, min
        ),
        _CALIBRATION,
    ),
    "regression": (
        Measure("loss", "Squared error", "Mean over held-out rows; lower is better.", nats, min),
        Measure("pearson", "Pearson", "Correlation with the data's numbers; higher is better.", _correlation, max),
        Measure("spearman", "Spearman", "Correlation of the ranks of both; higher is better.", _correlation, max),
        Measure(
            "to_teacher", "Distance to the teacher", "Mean squared distance from the teacher's numbers.", nats, min
        ),
    ),
    "encoder": (
        Measure(
            "loss",
            "Difference of similarities",
            "Mean square of what the cosines of all pairs of held-out rows differ by from the teacher's.",
            lambda value: f"{value:.4f}",
            min,
        ),
        Measure(
            "all_pairs",
            "All pairs",
            "Spearman's correlation of these cosines with the teacher's; higher is nearer.",
            _correlation,
            max,
        ),
        Measure("recall", "Nearest ten", "How many of the teacher's ten nearest rows are its own.", _percent, max),
    ),
}

_TOKENS_FURTHER = (
    Measure(
        "top_k_agreement", "Top-10 agreement", "Of the ten likeliest tokens, those that are the teacher's.", _percent
    ),
    Measure("js", "Jensen-Shannon divergence", "Between both distributions, at most log 2.", nats, min),
    _CALIBRATION,
)
# What is measured too, and left out of a run's report.
FURTHER: dict[Task, tuple[Measure, ...]] = {
    **dict.fromkeys(QUALITY, ()),
    "causal": _TOKENS_FURTHER,
    "masked": _TOKENS_FURTHER,
    "classification": (_TOKENS_FURTHER[1],),
}

COSTS = (
    Measure("parameters", "Parameters", "How many weights it has.", count),
    Measure("bytes", "Size", "What they take on disk.", size),
    Measure(
        "latency_ms",
        "Latency",
        "Median time of one forward pass over one row, on the machine named below.",
        milliseconds,
    ),
)


_BY_BYTE = Measure(
    "bits_per_byte",
    "Bits per byte",
    "The loss over the bytes of the text, whatever the tokenizer; lower is better.",
    nats,
    min,
)


def of_run(task: Task, by_bytes: bool) -> tuple[Measure, ...]:
    """What a run's tables show; bits per byte where teacher and student have tokens of their own."""
    loss, *others = QUALITY[task]
    return (loss, *([_BY_BYTE] if by_bytes else []), *others, *COSTS)


@dataclass(frozen=True)
class Words:
    """How a report speaks of a task.

    Args:
        unit: of the loss.
        loss: what the distance from the labels is called.
        likeliest: what agreement is about.
        pipeline: what the Hugging Face hub calls it.
        auto: the class that loads the student.
    """

    unit: str
    loss: str
    likeliest: str
    pipeline: str
    auto: str


WORDS: dict[Task, Words] = {
    "causal": Words(
        "nats per token", "cross-entropy", "the likeliest next token", "text-generation", "AutoModelForCausalLM"
    ),
    "masked": Words(
        "nats per masked token", "cross-entropy", "the likeliest token", "fill-mask", "AutoModelForMaskedLM"
    ),
    "classification": Words(
        "nats per row",
        "cross-entropy",
        "the likeliest class",
        "text-classification",
        "AutoModelForSequenceClassification",
    ),
    "regression": Words(
        "squared error per row", "squared error", "", "text-classification", "AutoModelForSequenceClassification"
    ),
    "encoder": Words("squared difference of cosines", "", "", "feature-extraction", "AutoModel"),
}
