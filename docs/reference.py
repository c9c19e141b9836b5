"""Write docs/recipe.md from the recipe's own types, and docs/recipes.md from the files of recipes/: make docs"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from potstill.losses.divergences import Divergence
from potstill.runs.config.run import Recipe

DOCS = Path(__file__).parent


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
    lines += [f"| `{kind}` | {(which.__doc__ or '').splitlines()[0]} |" for kind, which in Divergence.kinds.items()]
    return "\n".join(lines) + "\n"


def shown() -> str:
    """The page that shows the files of recipes/: what each is for is its first line."""
    lines = [
        "# Recipes",
        "Complete files to begin from. The models and the data that they name are yours to set, in the file or with",
        "`--set`; `potstill check` says whether all fits together. [recipe.md](recipe.md) has every key.",
        "This page is made of the files by `make docs`.",
        "",
    ]
    for path in sorted((DOCS.parent / "recipes").glob("*.yaml")):
        purpose, _, content = path.read_text(encoding="utf-8").partition("\n")
        lines += [f"## {path.stem}", f"[{path.name}](../recipes/{path.name}): {purpose.removeprefix('# ')}", ""]
        lines += ["```yaml", content.rstrip("\n"), "```", ""]
    return "\n".join(lines)


PAGES = {"recipe.md": page, "recipes.md": shown}

if __name__ == "__main__":
    for name, write in PAGES.items():
        (DOCS / name).write_text(write(), encoding="utf-8")
