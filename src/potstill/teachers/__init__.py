"""Who speaks: each teacher gives Targets for a batch."""

from potstill.teachers.model import ModelTeacher
from potstill.teachers.teacher import Teacher, TeacherOutput

__all__ = ["ModelTeacher", "Teacher", "TeacherOutput"]
