"""The typed record of a run: one strict YAML file that says everything.

Every part has a file; `document.py` knows how a file is read and how its mistakes are told.
"""

from potstill.recipe.across import ChunksPart, MappedLogitsPart, ULDPart
from potstill.recipe.data import DataPart, SourcePart
from potstill.recipe.divergence import DivergencePart
from potstill.recipe.embedding import EmbeddingRecipe
from potstill.recipe.generate import GenerateRecipe
from potstill.recipe.inside import (
    AttentionPart,
    DeepSupervisionPart,
    HiddenPart,
    LayersPart,
    RelationsPart,
    SimilarityPart,
)
from potstill.recipe.numbers import Number, SchedulePart, Temperature, Weight
from potstill.recipe.objective import AdaptiveKLPart, BiLDPart, LabelsPart, LogitsPart, TAIDPart, TermPart, ValuesPart
from potstill.recipe.policy import MiniLLMPart, PolicyPart
from potstill.recipe.rollout import RolloutPart
from potstill.recipe.run import EvaluatePart, Recipe
from potstill.recipe.student import BudgetPart, InitializePart, StudentPart
from potstill.recipe.teacher import MemberPart, ServerPart, SpeakerPart, TeacherPart

__all__ = [
    "AdaptiveKLPart",
    "AttentionPart",
    "BiLDPart",
    "BudgetPart",
    "ChunksPart",
    "DataPart",
    "DeepSupervisionPart",
    "DivergencePart",
    "EmbeddingRecipe",
    "EvaluatePart",
    "GenerateRecipe",
    "HiddenPart",
    "InitializePart",
    "LabelsPart",
    "LayersPart",
    "LogitsPart",
    "MappedLogitsPart",
    "MemberPart",
    "MiniLLMPart",
    "Number",
    "PolicyPart",
    "Recipe",
    "RelationsPart",
    "RolloutPart",
    "SchedulePart",
    "ServerPart",
    "SimilarityPart",
    "SourcePart",
    "SpeakerPart",
    "StudentPart",
    "TAIDPart",
    "TeacherPart",
    "Temperature",
    "TermPart",
    "ULDPart",
    "ValuesPart",
    "Weight",
]
