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
    token_cross_entropy,
    token_divergence,
    token_mean,
)
from potstill.targets import DenseTargets, HeadTargets, LMHead, SparseTargets

if TYPE_CHECKING:
    from potstill.data import Examples, PaddingCollator, Source, encode
    from potstill.embedding import EmbeddingDistiller, PairObjective, VectorHead, open_vectors
    from potstill.embedding.run import run_embedding
    from potstill.engines import Completion, LocalEngine, ModelServer, Sampling
    from potstill.generation import Generated, generate
    from potstill.pipeline import RunResult, run
    from potstill.recipe import EmbeddingRecipe, GenerateRecipe, Recipe
    from potstill.students.adapted import merged
    from potstill.students.adapters import Ia3, Lora, Prefix, Prompt, adapt
    from potstill.students.budget import Budget
    from potstill.students.capacity import expected_share
    from potstill.students.size import size_of
    from potstill.teachers import (
        CachedTeacher,
        ModelTeacher,
        ServedTeacher,
        Teacher,
        TeacherOutput,
        important_dimensions,
    )
    from potstill.train import (
        TAID,
        AdaptiveKL,
        Attention,
        BiLD,
        DistillationConfig,
        DistillationTrainer,
        Distiller,
        Hidden,
        Labels,
        Logits,
        Objective,
        Relations,
        Similarity,
    )

_LATER = {
    "potstill.data": ("Examples", "PaddingCollator", "Source", "encode"),
    "potstill.engines": ("Completion", "LocalEngine", "ModelServer", "Sampling"),
    "potstill.generation": ("Generated", "generate"),
    "potstill.embedding": ("EmbeddingDistiller", "PairObjective", "VectorHead", "open_vectors"),
    "potstill.embedding.run": ("run_embedding",),
    "potstill.pipeline": ("RunResult", "run"),
    "potstill.recipe": ("EmbeddingRecipe", "GenerateRecipe", "Recipe"),
    "potstill.students.adapted": ("merged",),
    "potstill.students.adapters": ("Ia3", "Lora", "Prefix", "Prompt", "adapt"),
    "potstill.students.budget": ("Budget",),
    "potstill.students.capacity": ("expected_share",),
    "potstill.students.size": ("size_of",),
    "potstill.teachers": (
        "CachedTeacher",
        "ModelTeacher",
        "ServedTeacher",
        "Teacher",
        "TeacherOutput",
        "important_dimensions",
    ),
    "potstill.train": (
        "TAID",
        "AdaptiveKL",
        "Attention",
        "BiLD",
        "DistillationConfig",
        "DistillationTrainer",
        "Distiller",
        "Hidden",
        "Labels",
        "Logits",
        "Objective",
        "Relations",
        "Similarity",
    ),
}

__all__ = [
    "JSD",
    "TAID",
    "AdaptiveKL",
    "AlphaBeta",
    "Attention",
    "BiLD",
    "Budget",
    "CachedTeacher",
    "Completion",
    "DenseTargets",
    "DistillationConfig",
    "DistillationTrainer",
    "Distiller",
    "Divergence",
    "EmbeddingDistiller",
    "EmbeddingRecipe",
    "Examples",
    "ForwardKL",
    "FusedLoss",
    "GenerateRecipe",
    "Generated",
    "HeadTargets",
    "Hidden",
    "Ia3",
    "LMHead",
    "Labels",
    "LayerMap",
    "LocalEngine",
    "Logits",
    "Lora",
    "ModelServer",
    "ModelTeacher",
    "Objective",
    "PaddingCollator",
    "PairObjective",
    "PotstillError",
    "Prefix",
    "Projection",
    "Prompt",
    "Recipe",
    "Relations",
    "ReverseKL",
    "RunResult",
    "Sampling",
    "ServedTeacher",
    "Similarity",
    "SkewForwardKL",
    "SkewReverseKL",
    "SoftCrossEntropy",
    "Source",
    "SparseTargets",
    "Teacher",
    "TeacherOutput",
    "TotalVariation",
    "VectorHead",
    "adapt",
    "embedding_divergence",
    "encode",
    "expected_share",
    "generate",
    "important_dimensions",
    "linear_cka",
    "linear_cross_entropy",
    "linear_divergence",
    "matryoshka",
    "merged",
    "open_vectors",
    "pair_correlation",
    "rank_error",
    "reconstruction_error",
    "rkd_angle",
    "rkd_distance",
    "run",
    "run_embedding",
    "schedule",
    "similarity_error",
    "size_of",
    "token_cross_entropy",
    "token_divergence",
    "token_mean",
]


def __getattr__(name: str) -> Any:
    for module, names in _LATER.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module 'potstill' has no attribute {name!r}")
