"""What stands in backticks, and whether there is such a thing: a name, a command, a key of a recipe, or a file."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import shlex
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import typer
import yaml
from transformers import TrainingArguments

from potstill.cli import app
from potstill.runs.config.embedding import EmbeddingRecipe
from potstill.runs.config.generate import GenerateRecipe
from potstill.runs.config.run import Recipe

ROOT = Path(__file__).parent.parent
RECIPES = (Recipe, EmbeddingRecipe, GenerateRecipe)


def exists(text: str) -> bool:
    """Whether it is one of these."""
    if text.startswith("potstill "):
        return is_command(text)
    return is_name(text) or is_key(text) or is_fragment(text) or ("/" in text and (ROOT / text).exists())


def is_command(text: str) -> bool:
    """`potstill cache build --codec`: the command is there, and so are its options."""
    here: Any = typer.main.get_command(app)
    for word in shlex.split(text)[1:]:
        if word.startswith("--"):
            if not any(word.partition("=")[0] in option.opts for option in here.params):
                return False
        elif hasattr(here, "commands"):
            if word not in here.commands:
                return False
            here = here.commands[word]
    return True


def is_name(text: str) -> bool:
    """`Logits`, `schedule.linear`, `Logits.temperature`, `Logits(JSD(0.5), weight=w)`, `Distiller(...).step(batch)`.

    Looked for in potstill, and under its full path anywhere else.
    """
    try:
        found = _resolve(ast.parse(text, mode="eval").body)
    except (SyntaxError, LookupError):
        return False
    return not inspect.ismodule(found) or found.__name__.startswith("potstill")


def _resolve(node: ast.expr) -> Any:
    if isinstance(node, ast.Name):
        return _member(import_module("potstill"), node.id, outer=True)
    if isinstance(node, ast.Attribute):
        return _member(_resolve(node.value), node.attr)
    if not isinstance(node, ast.Call):
        raise LookupError(ast.unparse(node))
    called = _resolve(node.func)
    takes = inspect.signature(called).parameters
    for keyword in node.keywords:
        if keyword.arg not in takes and not any(each.kind is each.VAR_KEYWORD for each in takes.values()):
            raise LookupError(keyword.arg)
    for argument in (*node.args, *(keyword.value for keyword in node.keywords)):
        if isinstance(argument, ast.Call):
            _resolve(argument)
    return called


def _member(owner: Any, name: str, outer: bool = False) -> Any:
    if hasattr(owner, name):
        return getattr(owner, name)
    if inspect.isclass(owner):
        for fields in ("__dataclass_fields__", "model_fields", "__annotations__"):
            if name in getattr(owner, fields, {}):
                return owner
        return _of_init(owner, name)
    if inspect.ismodule(owner):
        for module in (f"{owner.__name__}.{name}", *([name] if outer else [])):
            with contextlib.suppress(ImportError):
                return import_module(module)
    raise LookupError(name)


def _of_init(owner: type, name: str) -> type:
    """What a class takes is what its objects have."""
    if name not in inspect.signature(owner).parameters:
        raise LookupError(name)
    return owner


def default_of(text: str) -> Any:
    """The default of `Logits.temperature`, an argument, or of `train.fp16`, a key of a recipe."""
    owner, _, name = text.rpartition(".")
    if owner[:1].isupper() or "_" in owner:
        return inspect.signature(_resolve(ast.parse(owner, mode="eval").body)).parameters[name].default
    (found, *_) = [default for schema in _schemas() for default in _defaults(schema, schema, text.split("."))]
    return found


def _defaults(schema: dict[str, Any], part: dict[str, Any], path: list[str]) -> Iterator[Any]:
    for kind in _kinds(schema, part):
        inner = kind.get("properties", {}).get(path[0], {})
        if path[1:]:
            yield from _defaults(schema, inner, path[1:]) if inner else ()
        elif "default" in inner:
            yield inner["default"]


def is_key(text: str) -> bool:
    """`seed`, `student.adapter.rank`, `objective.temperature` (of any term), `train.fp16`."""
    return any(_has(schema, schema, text.split(".")) for schema in _schemas())


def is_fragment(text: str) -> bool:
    """`temperature: {schedule: linear, start: 4.0, end: 1.0}`: some part of a recipe has such keys and words."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return False
    parts = [(schema, part) for schema in _schemas() for part in (schema, *schema["$defs"].values())]
    return isinstance(value, dict) and any(_takes(schema, part, value) for schema, part in parts)


@cache
def _schemas() -> list[dict[str, Any]]:
    schemas = [recipe.model_json_schema() for recipe in RECIPES]
    arguments = {field.name: {"default": field.default} for field in dataclasses.fields(TrainingArguments)}
    schemas[0]["properties"]["train"] = {"type": "object", "properties": arguments}
    return schemas


def _kinds(schema: dict[str, Any], part: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What a part may be, through references, unions and lists."""
    if "$ref" in part:
        yield from _kinds(schema, schema["$defs"][part["$ref"].rpartition("/")[2]])
    elif "items" in part:
        yield from _kinds(schema, part["items"])
    elif "anyOf" in part or "oneOf" in part:
        for one in part.get("anyOf", part.get("oneOf")):
            yield from _kinds(schema, one)
    else:
        yield part


def _has(schema: dict[str, Any], part: dict[str, Any], path: list[str]) -> bool:
    if not path:
        return True
    kinds = (kind.get("properties", {}) for kind in _kinds(schema, part))
    return any(path[0] in kind and _has(schema, kind[path[0]], path[1:]) for kind in kinds)


def _takes(schema: dict[str, Any], part: dict[str, Any], value: Any) -> bool:
    if isinstance(value, list):
        return all(_takes(schema, part, each) for each in value)
    for kind in _kinds(schema, part):
        keys = kind.get("properties", {})
        if isinstance(value, dict):
            free = kind.get("type") == "object" and not keys
            if free or all(key in keys and _takes(schema, keys[key], each) for key, each in value.items()):
                return True
        elif value in kind.get("enum", [kind.get("const", value)]) and not keys:
            return True
    return False
