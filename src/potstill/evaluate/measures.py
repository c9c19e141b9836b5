"""Names, descriptions and formats of the measures of each task, for tables and reports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from potstill.evaluate.formatting import count, milliseconds, nats, percent, perplexity, size
from potstill.losses.alignment import Task

_correlation = "{:z.3f}".format
_percent = partial(percent, digits=1)


@dataclass(frozen=True)
class Measure:
    """A row of a results table; `better` picks the better of two values, None if neither is."""

    key: str
    name: str
    meaning: str
    write: Callable[[Any], str]
    better: Callable[[Any, Any], Any] | None = None


Measures = dict[Task, tuple[Measure, ...]]


def _loss(unit: str) -> Measure:
    return Measure("loss", "Held-out loss", f"Mean cross-entropy per {unit}, in nats; lower is better.", nats, min)


def _agreement(output: str, name: str = "Top-1 agreement") -> Measure:
    meaning = f"How often its most likely {output} is the teacher's; higher is closer."
    return Measure("agreement", name, meaning, _percent, max)


def _kl(unit: str) -> Measure:
    meaning = f"KL(teacher || model) per {unit}, in nats: 0 is the same distribution."
    return Measure("kl", "KL to the teacher", meaning, nats, min)


_ECE = Measure("ece", "Calibration error (ECE)", "Mean gap between its confidence and its accuracy.", _percent, min)
_JS = Measure("js", "Jensen-Shannon divergence", "Between both distributions, at most log 2.", nats, min)
_TOP_10 = Measure("top_k_agreement", "Top-10 agreement", "Share of the teacher's top ten among its own ten.", _percent)

# The main measures of each task; keys are fields of `potstill.evaluate.sequence.AnyQuality`.
QUALITY: Measures = {
    "causal": (
        _loss("held-out token"),
        Measure("perplexity", "Perplexity", "exp(loss): 1 is certainty.", perplexity, min),
        _agreement("next token"),
        _kl("token"),
    ),
    "masked": (
        _loss("masked token"),
        Measure("perplexity", "Pseudo-perplexity", "exp(loss) of masked tokens: 1 is certainty.", perplexity, min),
        _agreement("token for a mask"),
        _kl("token"),
    ),
    "classification": (
        _loss("held-out row"),
        Measure("accuracy", "Accuracy", "How often its most likely class is right.", _percent, max),
        Measure("f1_macro", "Macro F1", "Mean F1 over the classes, so that rare classes count as much.", _percent, max),
        _agreement("class", "Agreement"),
        _kl("row"),
        _ECE,
    ),
    "regression": (
        Measure("loss", "Squared error", "Mean over held-out rows; lower is better.", nats, min),
        Measure("pearson", "Pearson", "Correlation with the data's numbers; higher is better.", _correlation, max),
        Measure("spearman", "Spearman", "Rank correlation with them; higher is better.", _correlation, max),
        Measure("to_teacher", "Distance to the teacher", "Mean squared difference from its numbers.", nats, min),
    ),
    "encoder": (
        Measure("loss", "Difference of similarities", "Mean squared, over cosines of all pairs.", "{:.4f}".format, min),
        Measure("all_pairs", "All pairs", "Rank correlation of cosines with the teacher's.", _correlation, max),
        Measure("recall", "Nearest ten", "Share of the teacher's ten nearest rows among its own.", _percent, max),
    ),
}

# Further measures of `potstill evaluate`, left out of a run's report.
_TOKENS = (_TOP_10, _JS, _ECE)
FURTHER: Measures = {"causal": _TOKENS, "masked": _TOKENS, "classification": (_JS,), "regression": (), "encoder": ()}

COSTS = (
    Measure("parameters", "Parameters", "Number of weights.", count),
    Measure("active_parameters", "Active parameters", "Weights that a token passes through.", count),
    Measure("bytes", "Size", "Bytes of the weights on disk.", size),
    Measure("saved_as", "Precision", "That of the weights on disk.", str),
    Measure(
        "latency_ms",
        "Latency",
        "Median time of a forward pass over one row, on the machine below, in the teacher's precision.",
        milliseconds,
    ),
)
_BITS_PER_BYTE = Measure("bits_per_byte", "Bits per byte", "Loss per byte of text, for any tokenizer.", nats, min)


def of_run(task: Task, by_bytes: bool) -> tuple[Measure, ...]:
    """List the rows of a run's table; with bits per byte where models have different tokens."""
    loss, *others = QUALITY[task]
    return (loss, *([_BITS_PER_BYTE] if by_bytes else []), *others, *COSTS)


@dataclass(frozen=True)
class TaskLabels:
    """Wording of a task in reports and cards."""

    unit: str  # unit of the loss
    loss: str  # name of the loss on labels
    output: str  # name of the output that agreement compares
    pipeline: str  # pipeline tag on the Hugging Face Hub
    auto: str  # transformers class that loads the student


_SEQUENCE = ("text-classification", "AutoModelForSequenceClassification")
TASK_LABELS: dict[Task, TaskLabels] = {
    "causal": TaskLabels("nats per token", "cross-entropy", "next token", "text-generation", "AutoModelForCausalLM"),
    "masked": TaskLabels("nats per masked token", "cross-entropy", "token", "fill-mask", "AutoModelForMaskedLM"),
    "classification": TaskLabels("nats per row", "cross-entropy", "class", *_SEQUENCE),
    "regression": TaskLabels("squared error per row", "squared error", "", *_SEQUENCE),
    "encoder": TaskLabels("squared difference of cosines", "", "", "feature-extraction", "AutoModel"),
}
