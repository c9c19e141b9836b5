"""One step, and many of them: objective, distiller, trainer."""

from potstill.train.dense import TAID, AdaptiveKL, BiLD, Values
from potstill.train.distiller import Distiller, StepOutput
from potstill.train.objective import Labels, Logits, Objective
from potstill.train.supervision import DeepSupervision
from potstill.train.terms import Attention, Hidden, Relations, Similarity
from potstill.train.trainer import DistillationConfig, DistillationTrainer

__all__ = [
    "TAID",
    "AdaptiveKL",
    "Attention",
    "BiLD",
    "DeepSupervision",
    "DistillationConfig",
    "DistillationTrainer",
    "Distiller",
    "Hidden",
    "Labels",
    "Logits",
    "Objective",
    "Relations",
    "Similarity",
    "StepOutput",
    "Values",
]
