"""One step, and many of them: objective, distiller, trainer."""

from potstill.train.distiller import Distiller, StepOutput
from potstill.train.objective import Labels, Logits, Objective
from potstill.train.trainer import DistillationConfig, DistillationTrainer

__all__ = [
    "DistillationConfig",
    "DistillationTrainer",
    "Distiller",
    "Labels",
    "Logits",
    "Objective",
    "StepOutput",
]
