"""Who speaks: each teacher gives Targets for a batch."""

from potstill.teachers.cached import CachedTeacher
from potstill.teachers.model import ModelTeacher
from potstill.teachers.teacher import Teacher, TeacherOutput

__all__ = ["CachedTeacher", "ModelTeacher", "Teacher", "TeacherOutput"]
