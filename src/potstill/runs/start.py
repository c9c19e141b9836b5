"""How strongly the objective pulls at the student that a run begins with."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from potstill.data.batches import in_batches
from potstill.evaluate.quality import outputs_at
from potstill.losses.alignment import TOKEN_TASKS, align
from potstill.losses.divergences import ForwardKL
from potstill.losses.schedule import value_at
from potstill.losses.targets import Targets
from potstill.losses.token_losses import token_divergence
from potstill.models.spacing import evenly_spaced
from potstill.runs.build import BuiltRun, piece
from potstill.train.terms.logits import Labels, Logits

ROWS, TOKENS = 4, 32  # of the training data, cut
WEAK = 0.25  # of the gradient of forward KL


def weak_gradient(built: BuiltRun, student: Any) -> str | None:
    """Describe an objective whose gradient at the start is much smaller than that of forward KL; None for others.

    A bounded divergence is flat where the student gives the teacher's tokens almost no probability, and learns slowly
    there. Compared are gradients with respect to the student's logits, summed over tokens; labels make up for it.
    """
    terms = built.objective.terms
    divergences = [term for term in terms if isinstance(term, Logits) and value_at(term.weight, 0)]
    labels = any(isinstance(term, Labels) and value_at(term.weight, 0) for term in terms)
    if built.recipe.task not in TOKEN_TASKS or not divergences or labels or built.needs_whole_rows:
        return None
    rows = [piece(built.train.dataset[i], TOKENS) for i in evenly_spaced(ROWS, len(built.train.dataset))]
    (batch,) = in_batches(rows, built.tokenizer, ROWS, PartialState().device)
    alignment = align(batch["labels"], built.recipe.task)
    with torch.no_grad():
        targets = built.teacher(batch, alignment).targets
        logits = outputs_at(student.eval(), None, batch, alignment).dense()[:, : built.vocabulary].float()
    full = _pull(logits, targets, Logits(ForwardKL()))
    shares = {term.describe(): _pull(logits, targets, term) / max(full, 1e-12) for term in divergences}
    name, share = max(shares.items(), key=lambda pair: pair[1])
    if share >= WEAK:
        return None
    loss = float(token_divergence(logits, targets, ForwardKL()).mean())
    return (
        f"objective: {name} learns slowly from this start: the student is {loss:.1f} nats from the teacher, where its "
        f"gradient is {share:.0%} of that of forward KL. Add {{term: labels}}, take forward_kl, or begin with it "
        "(a schedule of weights)."
    )


def _pull(logits: Tensor, targets: Targets, term: Logits) -> float:
    """The size of a term's gradient with respect to the logits, summed over tokens, without its weight."""
    temperature = value_at(term.temperature, 0)
    logits = logits.detach().requires_grad_()
    loss = token_divergence(logits, targets, term.divergence, temperature=temperature).sum() * temperature**2
    (gradient,) = torch.autograd.grad(loss, logits)
    return float(gradient.norm(dim=-1).sum())
