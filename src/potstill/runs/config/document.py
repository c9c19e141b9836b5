"""A typed record that is read from one strict YAML file.

Every mistake of a file is reported at once, unknown keys with the nearest known one.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Tag, ValidationError

from potstill.errors import RecipeError, nearest


class Part(BaseModel):
    """A part of a recipe: unknown keys are mistakes, and nothing changes after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Document(Part):
    """A whole file."""

    @classmethod
    def load(cls, path: str | Path, sets: Iterable[str] = ()) -> Self:
        """Read a YAML file.

        Args:
            path: the file.
            sets: changes as KEY=VALUE, with dots between keys: `train.max_steps=100`, `objective.0.weight=0.5`.

        Raises:
            RecipeError: all that is wrong with it, a line each.
        """
        return cls.parse(read(Path(path)), str(path), sets)

    @classmethod
    def parse(cls, values: Any, origin: str = "recipe", sets: Iterable[str] = ()) -> Self:
        """The same from values that are already read; `origin` is how errors call them."""
        try:
            return cls.model_validate(apply(values, sets, origin))
        except ValidationError as error:
            lines = [line for one in error.errors() for line in _explain(cls, one)]
            count = "1 mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
            raise RecipeError("\n  ".join([f"{origin}: {count}", *lines])) from None

    def dump(self) -> str:
        """The resolved record as YAML."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with two repairs: 1e-3 is a number, and a key that stands twice is a mistake."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read(path: Path) -> Any:
    """The values of a YAML file.

    Raises:
        RecipeError: it is not there or not YAML.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        folder = path.parent
        names = [p.name for p in folder.glob("*.y*ml")] if folder.is_dir() else []
        raise RecipeError(
            f"recipe: expected a file, got {path}, which is not there.{nearest(path.name, names)}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe: expected a readable YAML file, got {path}: {error}.") from None
    try:
        return yaml.load(text, _Loader)  # _Loader is a SafeLoader
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"{path}: expected YAML, got: {reason}") from None


def apply(values: Any, sets: Iterable[str], origin: str = "recipe") -> dict[str, Any]:
    """The values of a file, changed in place as `Document.load` says.

    Raises:
        RecipeError: they are no mapping, or a change is none.
    """
    if not isinstance(values, dict):
        raise RecipeError(f"{origin}: expected a mapping of keys, got {type(values).__name__}.")
    for change in sets:
        _set(values, change)
    return values


def read_list(text: str) -> list[Any]:
    """Values with commas between them, each as YAML reads it.

    >>> read_list("2, 1e-3, {hidden_size: 8, num_hidden_layers: 1}")
    [2, 0.001, {'hidden_size': 8, 'num_hidden_layers': 1}]

    Raises:
        RecipeError: they are not YAML.
    """
    try:
        found: list[Any] = yaml.load(f"[{text}]", _Loader)  # _Loader is a SafeLoader
    except yaml.YAMLError:
        raise RecipeError(
            f"expected values with commas between them, got {text}. Brackets and quotes must close."
        ) from None
    return found


def _set(values: dict[str, Any], change: str) -> None:
    """Apply KEY=VALUE in place; the value is read as YAML."""
    key, equals, text = change.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set: expected KEY=VALUE such as train.max_steps=100, got {change}.")
    *path, last = key.split(".")
    here: Any = values
    for name in path:
        here = here[_index(here, name, change)] if isinstance(here, list) else here.setdefault(name, {})
        if not isinstance(here, dict | list):
            raise RecipeError(f"--set {change}: expected {name} to hold keys, got {here!r}.")
    try:
        value = yaml.load(text, _Loader)  # _Loader is a SafeLoader
    except yaml.YAMLError:
        value = text
    if isinstance(here, list):
        here[_index(here, last, change)] = value
    else:
        here[last] = value


def _index(values: list[Any], name: str, change: str) -> int:
    if not name.isdigit() or int(name) >= len(values):
        raise RecipeError(f"--set {change}: expected an index in 0..{len(values) - 1}, got {name}.")
    return int(name)


def _explain(document: type[Part], error: Any) -> list[str]:
    """One pydantic error as lines `<key>: <what is wrong>`."""
    keys, known = _follow(document, error["loc"])
    key = ".".join(keys)
    if error["type"] == "extra_forbidden":
        return [f"{key}: unknown key.{nearest(keys[-1], known)}"]
    if error["type"] == "missing":
        return [f"{key}: expected a value, got none."]
    if error["type"] in {"union_tag_invalid", "union_tag_not_found"}:
        what = str(error["ctx"]["discriminator"]).strip("'")
        kinds = error["ctx"].get("expected_tags", "").replace("'", "")
        return [f"{key}: expected a {what}{' of ' if kinds else ''}{kinds}, got {error['input']!r}."]
    if error["type"] == "value_error":
        message = str(error["ctx"]["error"])
        lines = message.splitlines()
        # What goes together is said of the whole file, with the keys in it.
        told = not key or all(line.startswith(f"{key}.") for line in lines)
        return lines if told else [f"{key}: {message.removesuffix('.')}."]
    return [f"{key}: {error['msg'].lower()}, got {error['input']!r}."]


def _follow(document: type[Part], place: tuple[str | int, ...]) -> tuple[list[str], list[str]]:
    """The keys of a place without the names by which pydantic tells the members of a union apart, and the keys that
    the part at its end knows.
    """
    keys: list[str] = []
    known: list[str] = []
    here: Any = document
    for step in place:
        members = [*_members(here)]
        chosen = [member for member, tag in members if step == tag]
        if chosen:
            here = chosen[0]
            continue
        keys.append(str(step))
        parts = [member for member, _ in members if isinstance(member, type) and issubclass(member, Part)]
        fields = {name: field for part in parts for name, field in part.model_fields.items()}
        known = list(fields)
        if isinstance(step, int):
            here = next((get_args(member)[0] for member, _ in members if get_origin(member) is list), None)
        else:
            here = fields[step].annotation if step in fields else None
    return keys, known


def _members(kind: Any, tag: Any = None) -> Iterator[tuple[Any, Any]]:
    """The types of a union and by what pydantic calls each: a Tag, or the word in its discriminating field."""
    if get_origin(kind) is Annotated:
        inner, *metadata = get_args(kind)
        tags = [each.tag for each in metadata if isinstance(each, Tag)]
        yield from _members(inner, tags[0] if tags else tag)
    elif get_origin(kind) in (Union, types.UnionType):
        for each in get_args(kind):
            yield from _members(each)
    else:
        yield kind, tag if tag is not None else _word(kind)


def _word(kind: Any) -> str | None:
    """The word of a part's first field, where that can only be one word."""
    if not (isinstance(kind, type) and issubclass(kind, Part) and kind.model_fields):
        return None
    first = next(iter(kind.model_fields.values())).annotation
    words = get_args(first) if get_origin(first) is Literal else ()
    return words[0] if len(words) == 1 else None
