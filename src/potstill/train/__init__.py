"""One step, and many of them: objective, distiller, trainer."""

from potstill.train.across import ULD, Chunks, MappedLogits
from potstill.train.dense import TAID, AdaptiveKL, BiLD, Values
from potstill.train.distiller import Distiller, StepOutput
from potstill.train.objective import Labels, Logits, Objective
from potstill.train.policy import PolicyGradient
from potstill.train.rollout import Adapt, Replay, Rollout, teacher_mix, teacher_top_k
from potstill.train.served import ServedWriter
from potstill.train.supervision import DeepSupervision
from potstill.train.terms import Attention, Hidden, Relations, Similarity
from potstill.train.trainer import DistillationConfig, DistillationTrainer

__all__ = [
    "TAID",
    "ULD",
    "Adapt",
    "AdaptiveKL",
    "Attention",
    "BiLD",
    "Chunks",
    "DeepSupervision",
    "DistillationConfig",
    "DistillationTrainer",
    "Distiller",
    "Hidden",
    "Labels",
    "Logits",
    "MappedLogits",
    "Objective",
    "PolicyGradient",
    "Relations",
    "Replay",
    "Rollout",
    "ServedWriter",
    "Similarity",
    "StepOutput",
    "Values",
    "teacher_mix",
    "teacher_top_k",
]
