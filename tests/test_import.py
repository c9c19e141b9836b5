"""--import: a user's own Python file is imported before the recipe is read, and only then."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import processes
from potstill.cli import app
from potstill.errors import RecipeError, UserError
from potstill.losses.divergences import Divergence

SQUARED_HELLINGER = '''
from dataclasses import dataclass

from potstill import Divergence


@dataclass(frozen=True)
class SquaredHellinger(Divergence):
    """The squared Hellinger distance."""

    name = "squared_hellinger"

    def pointwise(self, log_q, log_p):
        root_q, root_p = (log_q / 2).exp(), (log_p / 2).exp()
        return (root_p - root_q) ** 2 / 2, -root_q * root_p / 2
'''


@pytest.fixture
def recipe(recipe_values: dict[str, Any], tmp_path: Path) -> Path:
    recipe_values["objective"] = [{"term": "logits", "divergence": "squared_hellinger"}]
    (tmp_path / "mine.py").write_text(SQUARED_HELLINGER)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_values))
    return path


def potstill(folder: Path, *arguments: str | Path, status: int = 0) -> str:
    """Return what a command prints in a process of its own, which ends with the status."""
    output = folder / "output.txt"
    assert processes.finish(processes.potstill(*map(str, arguments), printed=output)) == status, output.read_text()
    return output.read_text()


def test_a_recipe_names_a_divergence_of_an_imported_file(recipe: Path, recipe_values: dict[str, Any]) -> None:
    potstill(recipe.parent, "run", recipe, "--import", recipe.with_name("mine.py"))
    run = Path(recipe_values["output"])
    assert json.loads((run / "summary.json").read_text())["training"]["steps"] > 0
    potstill(recipe.parent, "diagnose", run, "--rows", "4", "--import", recipe.with_name("mine.py"))


@pytest.mark.parametrize("command", ["check", "run", "diagnose", "sweep"])
def test_nothing_is_imported_without_the_flag(command: str, recipe: Path) -> None:
    more = ["--vary", "seed=0"] if command == "sweep" else []
    with pytest.raises(RecipeError, match="squared_hellinger"):
        CliRunner().invoke(app, [command, str(recipe), *more], catch_exceptions=False)
    assert "squared_hellinger" not in Divergence.kinds


@pytest.mark.parametrize("command", ["run", "check", "diagnose", "sweep", "cache build", "schema"])
@pytest.mark.parametrize(
    ("name", "source", "expected"),
    [
        ("mien.py", "", r"expected a Python file, got .*mien\.py\. Did you mean mine\.py\?"),
        ("mine.txt", "", "expected a Python file"),
        (
            "other.py",
            "import nowhere_at_all",
            r"expected .*other\.py to import without an error, got ModuleNotFoundError: No module",
        ),
        (
            "other.py",
            "def f(:\n    pass",
            r"expected .*other\.py to import without an error, got SyntaxError",
        ),
    ],
)
def test_a_file_that_cannot_be_imported_is_one_line(
    command: str, name: str, source: str, expected: str, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(SQUARED_HELLINGER)
    if source:
        (tmp_path / name).write_text(source)
    with pytest.raises(UserError, match=f"^--import: {expected}") as caught:
        CliRunner().invoke(app, [*command.split(), "--import", str(tmp_path / name)], catch_exceptions=False)
    assert "\n" not in str(caught.value)


def test_a_recipe_class_that_is_loaded_already_accepts_the_new_kind(recipe: Path) -> None:
    from potstill.runs.config.imports import import_file
    from potstill.runs.config.run import Recipe

    import_file(recipe.with_name("mine.py"))
    try:
        assert Recipe.load(recipe).objective[0].divergence == Divergence.kinds["squared_hellinger"]()
        assert "squared_hellinger" in json.dumps(Recipe.model_json_schema())
    finally:
        del Divergence.kinds["squared_hellinger"]
        Recipe.model_rebuild(force=True)


def test_a_file_is_executed_once(tmp_path: Path) -> None:
    (tmp_path / "count.py").write_text(
        "from pathlib import Path\nwith Path('log').open('a') as log:\n    log.write('x')"
    )
    from potstill.runs.config.imports import import_file

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        import_file(Path("count.py"))
        import_file(tmp_path / "count.py")
    assert (tmp_path / "log").read_text() == "x"


def test_ray_refuses(recipe: Path) -> None:
    engine = ("--vary", "seed=0", "--engine", "ray")
    output = potstill(recipe.parent, "sweep", recipe, *engine, "--import", recipe.with_name("mine.py"), status=2)
    assert "sweep: expected no --import with --engine ray, got it" in output
