"""Who speaks: each teacher gives Targets for a batch."""

from potstill.teachers.cached import CachedTeacher
from potstill.teachers.crosstok import CrossTokenizerTeacher
from potstill.teachers.dimensions import important_dimensions
from potstill.teachers.either import EitherTeacher
from potstill.teachers.ensemble import EnsembleTeacher
from potstill.teachers.informed import InformedTeacher
from potstill.teachers.model import ModelTeacher
from potstill.teachers.self_taught import AdapterOffTeacher, EMATeacher
from potstill.teachers.served import ServedTeacher
from potstill.teachers.teacher import Teacher, TeacherOutput

__all__ = [
    "AdapterOffTeacher",
    "CachedTeacher",
    "CrossTokenizerTeacher",
    "EMATeacher",
    "EitherTeacher",
    "EnsembleTeacher",
    "InformedTeacher",
    "ModelTeacher",
    "ServedTeacher",
    "Teacher",
    "TeacherOutput",
    "important_dimensions",
]
