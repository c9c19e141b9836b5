"""The recipe's `teacher`: each kind is a dataclass beside its teacher class, and is known by the key that names it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field, fields
from typing import Annotated, Any, ClassVar

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from potstill.errors import nearest
from potstill.losses.alignment import TASKS, Task
from potstill.losses.declared import Declared, Range
from potstill.teachers.teacher import Teacher


@dataclass(frozen=True)
class LoadedTeacher:
    """A teacher and what belongs to it."""

    teacher: Teacher
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel | None = None  # where one process can run and measure it
    config: PretrainedConfig | None = None  # where known: a designed student's is derived from it
    models: Mapping[str, PreTrainedModel] = field(default_factory=dict)  # all that run here, by their key in the recipe
    uncut_parameters: int | None = None  # before its vocabulary was cut, where it was
    live: Teacher | None = None  # beside a cache, the teacher for what the cache does not hold


@dataclass(frozen=True)
class TeacherSource(Declared):
    """A kind of teacher in a recipe. There is no `kind:` key: a source has a field with its own name.

    Args:
        prefetch: run the teacher on the next batch while the student learns from this one
    """

    key = "<kind>"  # never written in a recipe
    _: KW_ONLY
    prefetch: bool = False

    tasks: ClassVar[frozenset[Task]] = TASKS  # that this kind of teacher can be used for
    other_tokenizer: ClassVar[bool] = False  # whether it can read text in tokens of its own
    copies_student: ClassVar[bool] = False  # whether it keeps a copy of the student's trained weights in memory

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "name" in cls.__dict__:
            for kinds in (cls.kinds, TeacherSource.kinds):  # kinds of MemberSource belong to both families
                ordered = sorted({**kinds, cls.name: cls}.items())  # whatever the order of imports
                kinds.clear()
                kinds.update(ordered)

    @property
    @abstractmethod
    def title(self) -> str:
        """The teacher's name in reports and errors."""

    @abstractmethod
    def load(self, student: str | None, task: Task = "causal", key: str = "teacher") -> LoadedTeacher:
        """Load the teacher; errors name the source by its key in the recipe.

        A server is queried with the tokenizer of the student's model, which is None for a designed student.
        """

    def describe(self, teacher: Teacher) -> str:
        """The title, with what the teacher has learned in training."""
        return self.title

    def sources(self, key: str = "teacher") -> Iterator[tuple[str, TeacherSource]]:
        """The source and those within it, by their keys."""
        yield key, self

    @property
    def model_path(self) -> str | None:
        return vars(self).get("model")

    @property
    def guides(self) -> bool:
        """Whether it is a model that can generate beside the student."""
        return self.model_path is not None and not vars(self).get("shard")

    @property
    def model_device(self) -> str | None:
        return vars(self).get("device")

    @property
    def cache_path(self) -> str | None:
        return vars(self).get("cache")

    @property
    def max_top_k(self) -> int | None:
        return None  # it gives all tokens

    @property
    def live(self) -> TeacherSource | None:
        """The source of a teacher for any text; None for a cache alone."""
        return self

    @classmethod
    def read(cls, value: Any) -> Any:
        """Find the kind by its key; keys of other kinds may stand there with their default."""
        if isinstance(value, TeacherSource):
            return value
        if not isinstance(value, Mapping):
            raise ValueError(f"expected a mapping such as {{model: FOLDER}}, got {value!r}")
        given = [name for name in cls.kinds if value.get(name) not in (None, False)]
        own = {name: {f.name for f in fields(kind)} for name, kind in cls.kinds.items()}
        name = next((name for name in given if own[name].issuperset(given)), None)
        if name is None:
            near = "" if given else "".join(nearest(key, cls.kinds) for key in value if key not in cls.kinds)
            keys = [f"{key} without a value" if key in cls.kinds else key for key in value]
            got = " and ".join(given) or ", ".join(map(str, keys)) or "none"
            raise ValueError(f"expected one of {', '.join(cls.kinds)}, got {got}.{near}")
        others = {f.name: f.default for kind in cls.kinds.values() for f in fields(kind) if f.name not in own[name]}
        for key in others.keys() & value.keys():
            if value[key] not in (None, False, others[key]):
                kinds = " or ".join(kind for kind in cls.kinds if key in own[kind])
                raise ValueError(f"expected {key} with {kinds} alone, got it with {name}")
        return {k: v for k, v in value.items() if k not in others} | {cls.key: name}

    @classmethod
    def shorthands(cls) -> list[dict[str, Any]]:
        return []

    @classmethod
    def _plain(cls, value: Any, handler: Callable[[Any], Any]) -> Any:
        return _own_keys_first(handler(value))

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: Any) -> Any:
        made = super().__get_pydantic_json_schema__(core_schema, handler)
        schema = handler.resolve_ref_schema(made)
        if cls.key in schema.get("properties", ()):
            del schema["properties"][cls.key]
            schema["required"] = [cls.name]
            schema["properties"] = _own_keys_first(schema["properties"])
        return made


@dataclass(frozen=True)
class MemberSource(TeacherSource, Declared):  # a family of its own, for the members of an ensemble
    """A teacher that can be a member of an ensemble.

    Args:
        weight: in an ensemble, relative to the other members, by default equal; the first value if weights are learned
    """

    _: KW_ONLY
    weight: Annotated[float | None, Range(ge=0)] = None


def _own_keys_first(values: dict[str, Any]) -> dict[str, Any]:
    return values | {name: values.pop(name) for name in ("weight", "prefetch") if name in values}
