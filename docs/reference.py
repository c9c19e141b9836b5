"""Write docs/recipe.md from the recipe's own types: make docs"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from potstill.divergence import KINDS
from potstill.recipe import Recipe


def kind_of(field: dict[str, Any]) -> str:
    """A field's type in a few words."""
    if "$ref" in field:
        return field["$ref"].rpartition("/")[2].removesuffix("Part").lower()
    if "enum" in field:
        return ", ".join(map(str, field["enum"]))
    if "const" in field:
        return str(field["const"])
    if "anyOf" in field or "oneOf" in field:
        return " or ".join(kind_of(one) for one in field.get("anyOf", field.get("oneOf")) if one.get("type") != "null")
    if "prefixItems" in field:
        return "pair of " + kind_of(field["prefixItems"][0])
    if field.get("type") == "array":
        return "list of " + kind_of(field["items"])
    return str(field.get("type", "any"))


def table(part: dict[str, Any]) -> list[str]:
    lines = ["| key | type | default | |", "|---|---|---|---|"]
    for name, field in part["properties"].items():
        default = "required" if name in part.get("required", []) else field.get("default")
        if isinstance(default, dict):
            given = {key: value for key, value in default.items() if value is not None}
            default = given.get("kind") or " ".join(f"{key} {value}" for key, value in given.items()) or None
        text = "" if default is None else f"`{default}`" if default != "required" else default
        lines.append(f"| `{name}` | {kind_of(field)} | {text} | {field.get('description', '')} |")
    return lines


def page() -> str:
    """The whole page."""
    schema = Recipe.model_json_schema()
    lines = [
        "# The keys of a recipe",
        "",
        "Made from the types in `src/potstill/recipe/` by `make docs`; `potstill schema` prints them as JSON Schema.",
        "Unknown keys are mistakes. Paths are relative to where the command runs. `--set KEY=VALUE` changes any.",
        "",
        *table(schema),
        "",
        "`train` takes any field of `transformers.TrainingArguments` but those that the recipe itself decides.",
        "Unless they are given, a run logs 60 times, and saves and evaluates 6 times.",
        "",
    ]
    for name, part in schema["$defs"].items():
        lines += [f"## {name.removesuffix('Part').lower()}", "", " ".join(part.get("description", "").split()), ""]
        lines += [*table(part), ""]
    lines += ["## Kinds of divergence", "", "| kind | |", "|---|---|"]
    lines += [f"| `{kind}` | {(which.__doc__ or '').splitlines()[0]} |" for kind, which in KINDS.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (Path(__file__).parent / "recipe.md").write_text(page(), encoding="utf-8")
