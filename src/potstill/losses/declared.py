"""Declarations: everything that a recipe can name is one frozen dataclass; docs/architecture.md says how.

    class Divergence(Declared): ...  # a family

    @dataclass(frozen=True)
    class JSD(Divergence):  # one of its kinds, which needs no other entry anywhere
        beta: Annotated[float, Range(gt=0, lt=1)] = 0.5
        name = "jsd"

    TypeAdapter(Divergence).validate_python({"kind": "jsd", "beta": 0.3})  # JSD(0.3); "jsd" is JSD()

pydantic finds the hooks below by their names. It is not imported here, so that the losses need torch alone.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import operator
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from potstill.errors import ShapeError


class Record:
    """Base of a plain dataclass that a recipe holds: its annotations are checked, its docstring is its JSON Schema."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "arbitrary_types_allowed": True}

    def __post_init__(self) -> None:
        """Check each field against its annotation, in Python as in a recipe."""
        for name, rules in _rules(type(self)).items():  # type: ignore[arg-type]  # a class is hashable
            value = getattr(self, name)
            words = [word for rule in rules if isinstance(rule, OneOf) for word in rule.words]
            is_word = isinstance(value, str) and value in words  # the other rules are of another arm of a union
            for rule in rules if value is not None and not is_word else ():
                if (wrong := rule.wrong(value)) is not None:
                    raise ShapeError(f"{type(self).__name__}.{name}: expected {rule}, got {wrong}.")

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: Any) -> Any:
        made = handler(core_schema)
        schema = handler.resolve_ref_schema(made)
        properties = schema.get("properties")
        if properties is None:
            return made
        schema["title"] = cls.__name__
        schema["description"] = re.split(r"\n(?:Args|Raises|References):\n", inspect.getdoc(cls) or "")[0].strip()
        for name, line in field_descriptions(cls).items():
            if name in properties:
                properties[name].setdefault("description", line)
        for field in dataclasses.fields(cls):  # type: ignore[arg-type]  # its subclasses are dataclasses
            if isinstance(field.default, Declared):
                properties[field.name]["default"] = in_words(field.default)
        for name in [name for name, field in properties.items() if field.get("type") == "null"]:
            del properties[name]  # `PythonOnly`
        return made


class Declared(Record, ABC):
    """Base of everything that a recipe can name: by its bare name, or as {key: name, field: value, ...}."""

    key: ClassVar[str] = "kind"  # what a recipe calls the choice among the kinds of a family
    name: ClassVar[str]  # of a kind, in recipes
    kinds: ClassVar[dict[str, type[Any]]]  # of the family, by name
    count: ClassVar[int] = 0  # of the kinds of all families, by which a schema knows that it is out of date

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if Declared in cls.__bases__:
            cls.kinds = {}
        elif "name" in cls.__dict__:
            Declared.count += 1
            # Not cls.kinds: a kind may have a field of this name.
            kinds = next(base.__dict__["kinds"] for base in cls.__mro__[1:] if Declared in base.__bases__)
            taken = kinds.get(cls.name)
            if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
                raise TypeError(f"{cls.__qualname__}: expected a name of its own, got {cls.name}, which {taken} has.")
            kinds[cls.name] = cls

    def changed(self, but: tuple[str, ...] = ()) -> list[str]:
        """Return each field that differs from its default, as `field value`."""
        fields = [field for field in dataclasses.fields(self) if field.name not in but]  # type: ignore[arg-type]
        changed = [field.name for field in fields if getattr(self, field.name) != field.default]
        return [f"{name} {in_words(getattr(self, name))}" for name in changed]

    @classmethod
    def read(cls, value: Any) -> Any:
        """Turn a family's shorthand of a recipe into a bare name or a mapping with `key`; most have none."""
        return value

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        if Declared not in cls.__bases__:
            return handler(source)
        from pydantic_core import core_schema as cs

        def fields(value: Any) -> Any:
            value = {} if isinstance(value, str) else value
            return {k: v for k, v in value.items() if k != cls.key} if isinstance(value, Mapping) else value

        def tag(value: Any) -> Any:
            name = value if isinstance(value, str) else getattr(value, "name", None)
            name = value.get(cls.key) if isinstance(value, Mapping) else name
            return name if name is None else in_tag(name)

        tag.__name__ = cls.key
        before, kinds = cs.no_info_before_validator_function, cls.kinds.items()
        choices: dict[Any, Any] = {in_tag(name): before(fields, handler.generate_schema(kind)) for name, kind in kinds}
        union = cs.tagged_union_schema(choices, tag)
        return before(cls.read, union, serialization=cs.wrap_serializer_function_ser_schema(cls._plain, schema=union))

    @classmethod
    def shorthands(cls) -> list[dict[str, Any]]:
        """JSON Schemas of what `read` and bare names add to the mappings of a family."""
        bare = [name for name, kind in cls.kinds.items() if not _has_required(kind)]
        return [{"enum": bare, "title": cls.__name__}] if bare else []

    @classmethod
    def _plain(cls, value: Any, handler: Callable[[Any], Any]) -> Any:
        return {cls.key: value.name, **handler(value)}

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: Any) -> Any:
        made = super().__get_pydantic_json_schema__(core_schema, handler)
        schema = handler.resolve_ref_schema(made)
        if Declared in cls.__bases__:
            shorthands = cls.shorthands()
            return {"anyOf": [*shorthands, made]} if shorthands else made
        if "properties" in schema:
            schema["properties"] = {cls.key: {"const": cls.name}, **schema["properties"]}
            schema["required"] = [cls.key, *schema.get("required", [])]
        return made


def in_words(value: Any) -> str:
    """Write a value of a field as in a sentence: "jsd (beta 0.3)"."""
    if isinstance(value, Declared):
        changed = value.changed()
        return value.name + (f" ({', '.join(changed)})" if changed else "")
    if isinstance(value, tuple | list):
        return ", ".join(map(in_words, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def in_tag(name: str) -> str:
    """Mark the name of a kind in the place of an error, where it is no key of the recipe."""
    return f"<{name}>"


def is_tag(step: object) -> bool:
    """Whether a step of an error's place is the arm of a union, and no key."""
    return isinstance(step, str) and step.startswith("<") and step.endswith(">")


def field_descriptions(kind: type) -> dict[str, str]:
    """What the `Args:` of a class's docstring, or of its bases', say of each field, in one line each."""
    descriptions: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        arguments = re.search(r"\nArgs:\n((?: {4}.*\n?|\n)+)", inspect.cleandoc(base.__doc__ or "") + "\n")
        for match in re.finditer(r"^ {4}(\w+): (.*(?:\n {8,}.*)*)", arguments[1] if arguments else "", re.MULTILINE):
            descriptions[match[1]] = " ".join(match[2].split())
    return descriptions


class Rule(ABC):
    """What a field must be, in its annotation: `Annotated[int, Range(ge=1)]`. It holds in Python and in recipes."""

    @abstractmethod
    def wrong(self, value: Any) -> str | None:
        """What breaks the rule, for an error; None where nothing does."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema as cs

        return cs.no_info_after_validator_function(self._checked, handler(source))

    def _checked(self, value: Any) -> Any:
        if value is not None and (wrong := self.wrong(value)) is not None:
            raise ValueError(f"expected {self}, got {wrong}")
        return value


@dataclasses.dataclass(frozen=True)
class Range(Rule):
    """Bounds of a number, or of all values that a schedule takes."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def __str__(self) -> str:
        low, high = (self.ge if self.gt is None else self.gt), (self.le if self.lt is None else self.lt)
        if low is not None and high is not None:
            return f"a number in {'[' if self.gt is None else '('}{low:g}, {high:g}{']' if self.lt is None else ')'}"
        if low is not None:
            return f"a number >{'=' if self.gt is None else ''} {low:g}"
        return f"a number <{'=' if self.lt is None else ''} {high:g}"

    def wrong(self, value: Any) -> str | None:
        """A schedule names its `extremes`; what another function of the step returns is not known."""
        if isinstance(value, str):
            return repr(value)
        if isinstance(value, int | float):
            return None if self._holds(value) else f"{value}"
        extremes = getattr(value, "extremes", {})
        return next((f"{number}{where}" for where, number in extremes.items() if not self._holds(number)), None)

    def _holds(self, number: float) -> bool:  # a NaN is within no bounds
        return all(bound is None or getattr(operator, name)(number, bound) for name, bound in vars(self).items())

    def __get_pydantic_json_schema__(self, core_schema: Any, handler: Any) -> Any:
        schema = handler(core_schema)
        names = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
        bounds = {names[name]: bound for name, bound in vars(self).items() if bound not in (None, math.inf)}
        for part in schema.get("anyOf", schema.get("oneOf", [schema])):
            if part.get("type") in ("number", "integer"):
                part.update(bounds)
        return schema


class NonEmpty(Rule):
    """A sequence with an entry."""

    def __str__(self) -> str:
        return "at least one"

    def wrong(self, value: Any) -> str | None:
        return None if len(value) else "none"


@dataclasses.dataclass(frozen=True)
class OfFamily(Rule):
    """One of a family's kinds. pydantic knows these by itself."""

    family: type[Declared]

    def __str__(self) -> str:
        return f"a {self.family.__name__} such as {next(iter(self.family.kinds.values())).__name__}(...)"

    def wrong(self, value: Any) -> str | None:
        return None if isinstance(value, self.family) else repr(value)


@dataclasses.dataclass(frozen=True)
class OneOf(Rule):
    """One of the words of a Literal. pydantic knows these by itself."""

    words: tuple[Any, ...]

    def __str__(self) -> str:
        return f"one of {', '.join(map(str, self.words))}"

    def wrong(self, value: Any) -> str | None:
        """What is no text is another arm of a union; of a sequence, each entry is checked."""
        if isinstance(value, tuple | list):
            return next(filter(None, map(self.wrong, value)), None)
        return repr(value) if isinstance(value, str) and value not in self.words else None


@dataclasses.dataclass(frozen=True)
class OfType(Rule):
    """A plain number or truth value. pydantic knows these by itself."""

    kind: type

    def __str__(self) -> str:
        return {bool: "true or false", int: "a whole number", float: "a number"}[self.kind]

    def wrong(self, value: Any) -> str | None:
        if isinstance(value, {bool: bool, int: Integral, float: Real}[self.kind]):
            return None
        return repr(value) if isinstance(value, str | Real) else f"a {type(value).__name__}"


class InPairs(Rule):
    """A sequence of pairs. A text is another arm of a union."""

    def __str__(self) -> str:
        return "pairs such as [(0, 1), (1, 3)]"

    def wrong(self, value: Any) -> str | None:
        entries = () if isinstance(value, str) else value
        return next((repr(entry) for entry in entries if not isinstance(entry, tuple | list) or len(entry) != 2), None)


class PythonOnly:
    """Marks a field that can be set in Python alone: no recipe has it."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema as cs

        return cs.none_schema()


class Either:
    """`Annotated[A | B, Either(test)]` reads A where the test holds, so that only that arm reports a mistake."""

    def __init__(self, first: Callable[[Any], bool]) -> None:
        self._first = first

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema as cs

        arms = {in_tag(str(i)): handler.generate_schema(arm) for i, arm in enumerate(get_args(source))}
        return cs.tagged_union_schema(arms, lambda value: in_tag("0" if self._first(value) else "1"))


def _has_required(kind: type) -> bool:
    missing = dataclasses.MISSING
    return any(field.default is field.default_factory is missing for field in dataclasses.fields(kind))


@cache
def _rules(kind: type) -> dict[str, list[Rule]]:
    """The rules of each field of a dataclass, from its annotations."""
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: [*_rules_in(hints[field.name])] for field in dataclasses.fields(kind)}


def _rules_in(annotation: Any) -> Iterator[Rule]:
    if get_origin(annotation) is Literal:
        words = tuple(word for word in get_args(annotation) if isinstance(word, str))
        yield from [OneOf(words)] if words else []
        return
    for part in get_args(annotation):
        if isinstance(part, Rule):
            yield part
        elif not isinstance(part, str | type):
            yield from _rules_in(part)
    if get_origin(annotation) in (None, Annotated, Union, UnionType):
        arms = [
            arm for arm in get_args(annotation) or (annotation,) if not isinstance(arm, Rule) and arm is not NoneType
        ]
        if len(arms) == 1 and isinstance(kind := arms[0], type):
            yield from [OfFamily(kind)] if Declared in kind.__bases__ else []
            yield from [OfType(kind)] if kind in (bool, int, float) else []
