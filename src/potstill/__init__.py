"""Potstill: a small model out of a large one.

The losses need torch alone and are imported here; what needs transformers is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from potstill import schedule
from potstill.divergence import (
    JSD,
    AlphaBeta,
    Divergence,
    ForwardKL,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    SoftCrossEntropy,
    TotalVariation,
)
from potstill.errors import PotstillError
from potstill.layers import LayerMap, Projection
from potstill.losses import (
    FusedLoss,
    chunk_divergence,
    chunk_log_probs,
    embedding_divergence,
    linear_cka,
    linear_cross_entropy,
    linear_divergence,
    matryoshka,
    pair_correlation,
    rank_error,
    reconstruction_error,
    rkd_angle,
    rkd_distance,
    similarity_error,
    sorted_distance,
    token_cross_entropy,
    token_divergence,
    token_mean,
)
from potstill.targets import DenseTargets, HeadTargets, LMHead, MixtureTargets, SparseTargets

if TYPE_CHECKING:
    from potstill.data import Examples, MaskedRows, PaddingCollator, Source, encode
    from potstill.diagnosis import diagnose
    from potstill.embedding import EmbeddingDistiller, PairObjective, VectorHead, open_vectors
    from potstill.embedding.run import run_embedding
    from potstill.engines import Completion, LocalEngine, ModelServer, Sampling
    from potstill.evaluate.tradeoff import pareto_front, recommend
    from potstill.generation import Generated, generate
    from potstill.pipeline import RunResult, run
    from potstill.recipe import EmbeddingRecipe, GenerateRecipe, Recipe
    from potstill.students.budget import Budget
    from potstill.students.capacity import expected_share
    from potstill.students.size import size_of
    from potstill.sweeping import SweepResult, sweep
    from potstill.teachers import (
        AdapterOffTeacher,
        CachedTeacher,
        CrossTokenizerTeacher,
        EMATeacher,
        EnsembleTeacher,
        InformedTeacher,
        ModelTeacher,
        ServedTeacher,
        Teacher,
        TeacherOutput,
        important_dimensions,
    )
    from potstill.train import (
        TAID,
        ULD,
        AdaptiveKL,
        Attention,
        BiLD,
        Chunks,
        DeepSupervision,
        DistillationConfig,
        DistillationTrainer,
        Distiller,
        Hidden,
        Labels,
        Logits,
        MappedLogits,
        Objective,
        PolicyGradient,
        Relations,
        Rollout,
        Similarity,
        Values,
    )

_LATER = {
    "potstill.data": ("Examples", "MaskedRows", "PaddingCollator", "Source", "encode"),
    "potstill.engines": ("Completion", "LocalEngine", "ModelServer", "Sampling"),
    "potstill.diagnosis": ("diagnose",),
    "potstill.evaluate.tradeoff": ("pareto_front", "recommend"),
    "potstill.generation": ("Generated", "generate"),
    "potstill.embedding": ("EmbeddingDistiller", "PairObjective", "VectorHead", "open_vectors"),
    "potstill.embedding.run": ("run_embedding",),
    "potstill.pipeline": ("RunResult", "run"),
    "potstill.recipe": ("EmbeddingRecipe", "GenerateRecipe", "Recipe"),
    "potstill.students.budget": ("Budget",),
    "potstill.students.capacity": ("expected_share",),
    "potstill.students.size": ("size_of",),
    "potstill.sweeping": ("SweepResult", "sweep"),
    "potstill.teachers": (
        "AdapterOffTeacher",
        "CachedTeacher",
        "EMATeacher",
        "EnsembleTeacher",
        "InformedTeacher",
        "CrossTokenizerTeacher",
        "ModelTeacher",
        "ServedTeacher",
        "Teacher",
        "TeacherOutput",
        "important_dimensions",
    ),
    "potstill.train": (
        "TAID",
        "ULD",
        "AdaptiveKL",
        "Attention",
        "BiLD",
        "DeepSupervision",
        "Chunks",
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
        "Rollout",
        "Similarity",
        "Values",
    ),
}

__all__ = [
    "JSD",
    "TAID",
    "ULD",
    "AdapterOffTeacher",
    "AdaptiveKL",
    "AlphaBeta",
    "Attention",
    "BiLD",
    "Budget",
    "CachedTeacher",
    "Chunks",
    "Completion",
    "CrossTokenizerTeacher",
    "DeepSupervision",
    "DenseTargets",
    "DistillationConfig",
    "DistillationTrainer",
    "Distiller",
    "Divergence",
    "EMATeacher",
    "EmbeddingDistiller",
    "EmbeddingRecipe",
    "EnsembleTeacher",
    "Examples",
    "ForwardKL",
    "FusedLoss",
    "GenerateRecipe",
    "Generated",
    "HeadTargets",
    "Hidden",
    "InformedTeacher",
    "LMHead",
    "Labels",
    "LayerMap",
    "LocalEngine",
    "Logits",
    "MappedLogits",
    "MaskedRows",
    "MixtureTargets",
    "ModelServer",
    "ModelTeacher",
    "Objective",
    "PaddingCollator",
    "PairObjective",
    "PolicyGradient",
    "PotstillError",
    "Projection",
    "Recipe",
    "Relations",
    "ReverseKL",
    "Rollout",
    "RunResult",
    "Sampling",
    "ServedTeacher",
    "Similarity",
    "SkewForwardKL",
    "SkewReverseKL",
    "SoftCrossEntropy",
    "Source",
    "SparseTargets",
    "SweepResult",
    "Teacher",
    "TeacherOutput",
    "TotalVariation",
    "Values",
    "VectorHead",
    "chunk_divergence",
    "chunk_log_probs",
    "diagnose",
    "embedding_divergence",
    "encode",
    "expected_share",
    "generate",
    "important_dimensions",
    "linear_cka",
    "linear_cross_entropy",
    "linear_divergence",
    "matryoshka",
    "open_vectors",
    "pair_correlation",
    "pareto_front",
    "rank_error",
    "recommend",
    "reconstruction_error",
    "rkd_angle",
    "rkd_distance",
    "run",
    "run_embedding",
    "schedule",
    "similarity_error",
    "size_of",
    "sorted_distance",
    "sweep",
    "token_cross_entropy",
    "token_divergence",
    "token_mean",
]


def __getattr__(name: str) -> Any:
    for module, names in _LATER.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module 'potstill' has no attribute {name!r}")
