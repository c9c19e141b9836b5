"""The command `potstill schema`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from potstill.cli.app import Imports, app
from potstill.errors import UserError, nearest

KINDS = ("distillation", "embedding", "generate")


@app.command()
def schema(
    kind: Annotated[str, typer.Argument(help="kind of recipe: distillation, embedding or generate")] = KINDS[0],
    import_: Imports = None,
) -> None:
    """Print the JSON Schema of a kind of recipe, for editors and as a reference."""
    if kind not in KINDS:
        raise UserError(f"schema: expected one of {', '.join(KINDS)}, got {kind}.{nearest(kind, KINDS)}")
    from potstill.runs.config.embedding import EmbeddingRecipe
    from potstill.runs.config.generate import GenerateRecipe
    from potstill.runs.config.run import Recipe

    recipe: Any = dict(zip(KINDS, (Recipe, EmbeddingRecipe, GenerateRecipe), strict=True))[kind]
    recipe.know_all_kinds()
    print(json.dumps(recipe.model_json_schema(), indent=2))
