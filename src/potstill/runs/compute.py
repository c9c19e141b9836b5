"""Compute of a training, in floating-point operations of its models."""

from __future__ import annotations

from transformers import PreTrainedModel

from potstill.models.size import forward_flops
from potstill.models.spacing import evenly_spaced
from potstill.runs.build import BuiltRun

LENGTH_ROWS = 1024  # training rows whose lengths are read


def training_flops(built: BuiltRun, student: PreTrainedModel) -> dict[str, float]:
    """Estimate the floating-point operations of each training of a run.

        tokens (F_student (2 + trained / all) + F_teacher),   F = 2 N + attention

    F is `forward_flops`: a backward pass takes as many for the gradients of the activations, and as many for those of
    the weights that are trained: 6 N for a whole student, 2 N for its teacher, per token. Without embedding lookups,
    padding, the optimiser, what is computed twice to save memory, and text that a model samples. A cached teacher was
    computed before.

    References:
        Kaplan et al. 2020, arXiv 2001.08361, section 2.1; Hoffmann et al. 2022, arXiv 2203.15556, appendix F.
    """
    rows, plan = built.train.dataset, built.plan
    lengths = [len(rows[i]["input_ids"]) for i in evenly_spaced(LENGTH_ROWS, len(rows))]
    context = round(sum(length**2 for length in lengths) / sum(lengths))  # of the average token
    tokens = plan.steps * plan.rows_per_step * sum(lengths) / len(lengths)
    forward = forward_flops(student, context)
    passes = 2 + built.size.trained / built.size.all
    teachers = sum(forward_flops(model, context) for model in built.loaded.models.values())
    teachers += forward if built.teacher.of_student else 0.0
    alone = tokens * forward * passes
    taught = alone + tokens * teachers * built.objective.needs_teacher
    return {name: alone if name == "baseline" else taught for name in built.recipe.evaluate.trained}
