"""The typed record of a run: one strict YAML file that says everything.

Every part has a file; `document.py` knows how a file is read and how its mistakes are told.
"""

from potstill.recipe.data import DataPart, SourcePart
from potstill.recipe.generate import GenerateRecipe
from potstill.recipe.numbers import Number, SchedulePart, Temperature, Weight
from potstill.recipe.objective import DivergencePart, LabelsPart, LogitsPart, TermPart
from potstill.recipe.run import EvaluatePart, Recipe
from potstill.recipe.student import BudgetPart, InitializePart, StudentPart
from potstill.recipe.teacher import ServerPart, TeacherPart

__all__ = [
    "BudgetPart",
    "DataPart",
    "DivergencePart",
    "EvaluatePart",
    "GenerateRecipe",
    "InitializePart",
    "LabelsPart",
    "LogitsPart",
    "Number",
    "Recipe",
    "SchedulePart",
    "ServerPart",
    "SourcePart",
    "StudentPart",
    "TeacherPart",
    "Temperature",
    "TermPart",
    "Weight",
]
