"""Write docs/recipe.md from the recipe's declarations, and docs/recipes.md from the files of recipes/: make docs"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from potstill.losses.declared import Declared
from potstill.runs.config.run import Recipe

DOCS = Path(__file__).parent


def words(name: str) -> str:
    """LayerMap -> layer map."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()


def families() -> dict[str, str]:
    """The family of each kind of declaration, in plain words, by the kind's class."""
    return {
        kind.__name__: words(family.__name__)
        for family in Declared.__subclasses__()
        if family.__bases__ == (Declared,)
        for kind in family.kinds.values()
    }


def title_of(name: str, definition: dict[str, Any]) -> str:
    """What a section is called: family and name of a kind in recipes, or the name of a part."""
    key, value = next(iter(definition["properties"].items()))
    if name in families():
        return f"{families()[name]}: {value.get('const', key)}"  # teachers have a key of their kind's name instead
    return name.removesuffix("Part").removesuffix("Config").lower()


def kind_of(field: dict[str, Any], definitions: dict[str, Any]) -> str:
    """A field's type in a few words; a family of declarations by the key that names its kinds."""
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return title_of(name, definitions[name]).partition(":")[0]
    if field.get("title") in {family.__name__ for family in Declared.__subclasses__()}:
        return words(field["title"])  # bare names of its kinds
    if "enum" in field:
        return ", ".join(map(str, field["enum"]))
    if "const" in field:
        return str(field["const"])
    if "anyOf" in field or "oneOf" in field:
        arms = [arm for arm in field.get("anyOf", field.get("oneOf")) if arm.get("type") not in ("null", "object")]
        arms += [arm for arm in field.get("anyOf", ()) if isinstance(arm.get("additionalProperties"), dict)]
        return " or ".join(dict.fromkeys(kind_of(arm, definitions) for arm in arms))
    if "prefixItems" in field:
        return "pair of " + kind_of(field["prefixItems"][0], definitions)
    if field.get("type") == "array":
        return "list of " + kind_of(field["items"], definitions)
    return {"object": "mapping"}.get(field.get("type", "any"), str(field.get("type", "any")))


def table(part: dict[str, Any], definitions: dict[str, Any]) -> list[str]:
    """The keys of a part; the key that names its kind stands in the section's title."""
    keys = {name: field for name, field in part["properties"].items() if "const" not in field}
    if not keys:
        return []
    lines = ["| key | type | default | |", "|---|---|---|---|"]
    for name, field in keys.items():
        default = "required" if name in part.get("required", []) else field.get("default")
        if isinstance(default, dict):
            default = " ".join(f"{key} {value}" for key, value in default.items() if value is not None) or None
        text = "" if default is None else f"`{default}`" if default != "required" else default
        lines.append(f"| `{name}` | {kind_of(field, definitions)} | {text} | {field.get('description', '')} |")
    return [*lines, ""]


def page() -> str:
    """The whole page."""
    schema = Recipe.model_json_schema()
    definitions: dict[str, Any] = schema["$defs"]
    lines = [
        "# The keys of a recipe",
        "",
        "`make docs` writes this page from the declarations; `potstill schema` prints their JSON Schema. Unknown keys",
        "are errors. Paths are relative to where the command runs. `--set KEY=VALUE` changes any key. A kind without",
        "required keys may be a bare name: `divergence: jsd` is `divergence: {kind: jsd}`.",
        "",
        *table(schema, definitions),
        "`train` takes any field of `transformers.TrainingArguments` except those that the recipe itself sets.",
        "Unless they are given, a run logs 60 times, and saves and evaluates 6 times.",
        "",
    ]
    # Parts first, then the kinds of each family.
    for name in sorted(definitions, key=lambda name: (name in families(), title_of(name, definitions[name]))):
        part = definitions[name]
        text = " ".join(part.get("description", "").split("\n\n")[0].split())
        lines += [f"## {title_of(name, part)}", "", text, "", *table(part, definitions)]
    return "\n".join(lines).rstrip("\n") + "\n"


def shown() -> str:
    """The page that shows the files of recipes/ and the presets: the purpose of each is its first line."""
    lines = [
        "# Recipes",
        "Complete files to start from. Set their models and data in the file or with `--set`; `potstill check` finds",
        "what does not fit. [recipe.md](recipe.md) has every key. `make docs` writes this page from the files.",
        "",
    ]
    folders = DOCS.parent / "recipes", DOCS.parent / "src/potstill/runs/config/presets"
    paths = [path for folder in folders for path in folder.glob("*.yaml")]
    for path in sorted(paths, key=lambda path: path.name):
        purpose, _, content = path.read_text(encoding="utf-8").partition("\n")
        link = f"[{path.name}](../{path.relative_to(DOCS.parent)})"
        lines += [f"## {path.stem}", f"{link}: {purpose.removeprefix('# ')}", ""]
        lines += ["```yaml", content.rstrip("\n"), "```", ""]
    return "\n".join(lines)


PAGES = {"recipe.md": page, "recipes.md": shown}

if __name__ == "__main__":
    for name, write in PAGES.items():
        (DOCS / name).write_text(write(), encoding="utf-8")
