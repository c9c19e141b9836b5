"""The house keeps its plan: who may import whom, and what a file may not be. See docs/architecture.md."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import potstill

SOURCE = Path(__file__).parents[1] / "src" / "potstill"

BASE = {"errors", "atomic", "uncompiled", "divergence", "positions", "targets", "schedule", "layers", "heads", "taps"}
TRAIN = {"teachers", "students", "losses", "data", "engines"}
PIPELINE = BASE | TRAIN | {"cache", "train", "evaluate", "recipe", "loading"}

# A room is a folder or a module directly under potstill. Inside a room everyone may import everyone.
ROOMS: dict[str, set[str]] = {
    **dict.fromkeys(BASE, BASE),
    "losses": BASE,
    "engines": BASE,
    "students": BASE,
    "cache": BASE,
    "data": BASE | {"engines"},
    "teachers": BASE | {"cache", "losses", "engines"},
    "train": BASE | TRAIN,
    "evaluate": BASE | {"losses", "data", "engines", "students"},
    "embedding": BASE | {"losses", "data", "engines", "evaluate", "recipe", "loading"},
    "recipe": {"errors", "divergence", "schedule", "layers", "positions"},
    "loading": BASE | {"losses", "students"},
    "machines": {"errors"},
    "objectives": PIPELINE,
    "rollouts": PIPELINE,
    "speaker": PIPELINE,
    "prepare_student": PIPELINE,
    "prepare_task": PIPELINE,
    "prepare_across": PIPELINE | {"objectives", "speaker"},
    "prepare": PIPELINE | {"objectives", "rollouts", "speaker", "prepare_student", "prepare_task", "prepare_across"},
    "preflight": PIPELINE | {"speaker", "prepare"},
    "pipeline": PIPELINE | {"speaker", "prepare"},
    "evaluation": PIPELINE | {"prepare_task"},
    "sweeping": PIPELINE | {"pipeline", "machines"},
    "diagnosis": PIPELINE | {"prepare"},
    "caching": PIPELINE | {"speaker", "machines"},
    "generation": PIPELINE | {"speaker", "machines"},
    "demo": PIPELINE | {"prepare", "preflight", "pipeline", "cli"},
    "cli": PIPELINE
    | {"prepare", "preflight", "evaluation", "pipeline", "sweeping", "diagnosis", "generation", "caching"}
    | {"demo", "embedding"},
    "__main__": {"cli"},
}

# What works in anyone's training loop, on a machine with torch and nothing else.
PURE = re.compile(
    r"potstill\.(errors|uncompiled|divergence|positions|targets|heads|taps|layers|schedule|losses(\..+)?|cache\.(codec|planes))"
)
PACKAGES_OF_THE_REST = [
    *("accelerate", "datasets", "jinja2", "matplotlib", "peft", "pydantic", "rich", "safetensors"),
    *("sentence_transformers", "tokenizers", "transformers", "triton", "typer", "vllm", "yaml"),
]


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(SOURCE.rglob("*.py"))}
PURE_MODULES = [name for name in MODULES if PURE.fullmatch(name)]


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def statements(tree: ast.AST, typing_too: bool) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        only_typing = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        if only_typing and not typing_too:
            continue
        yield node
        yield from statements(node, typing_too)


def imports(module: str, typing_too: bool = True) -> set[str]:
    """Every module that `module` imports, at the top or in a function; potstill's own down to the file."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in statements(ast.parse(path.read_text(encoding="utf-8")), typing_too):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            deeper = {f"{base}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else base for name in deeper}
    return found


def own(module: str) -> set[str]:
    return {name for name in imports(module) if name.split(".")[0] == "potstill"}


# The front door hands names to users and may import everything; nobody inside goes through it.
INSIDE = [name for name in MODULES if name != "potstill"]


@pytest.mark.parametrize("module", INSIDE)
def test_who_imports_whom(module):
    assert room(module) in ROOMS, f"{room(module)} is not in the plan"
    assert "potstill" not in own(module), "import from the module that has the name, not from potstill"
    visited = {room(name) for name in own(module)} - {room(module)}
    assert visited <= ROOMS[room(module)], f"{module} may not import {visited - ROOMS[room(module)]}"


def refuse_circles(graph: dict[str, set[str]]) -> None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("circle: " + " <- ".join(error.args[1]))


def test_no_circles_between_modules():
    refuse_circles({module: own(module) for module in INSIDE})


def test_no_circles_between_rooms():
    graph: dict[str, set[str]] = {}
    for module in INSIDE:
        graph.setdefault(room(module), set()).update({room(name) for name in own(module)} - {room(module)})
    refuse_circles(graph)


def test_a_circle_is_seen():
    with pytest.raises(pytest.fail.Exception, match=r"circle: (a <- b <- a|b <- a <- b)"):
        refuse_circles({"a": {"b"}, "b": {"a"}, "c": set()})


@pytest.mark.parametrize("module", PURE_MODULES)
def test_the_losses_import_torch_alone(module):
    allowed = {"torch", "numpy", *sys.stdlib_module_names}
    if module == "potstill.losses.triton":
        allowed.add("triton")  # comes with torch for CUDA
    foreign = {
        name
        for name in imports(module, typing_too=False)
        if name.split(".")[0] not in allowed and not PURE.fullmatch(name)
    }
    assert not foreign


def test_the_losses_work_where_torch_is_alone():
    importable = [name for name in PURE_MODULES if name != "potstill.losses.triton"]
    assert {"potstill.losses", "potstill.divergence", "potstill.targets", "potstill.schedule"} < set(importable)
    script = [
        "import importlib, sys",
        f"sys.modules.update(dict.fromkeys({PACKAGES_OF_THE_REST}))",  # None: importing it is an ImportError
        f"[importlib.import_module(name) for name in {importable}]",
        f"assert not [name for name in {PACKAGES_OF_THE_REST} if sys.modules[name]]",
        "assert 'torch._dynamo' not in sys.modules",  # takes as long as torch itself, and nothing is compiled yet
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_command_line_answers_without_torch():
    script = "import sys, potstill.cli; assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_public_names_are_sorted_and_exist():
    constants_classes_functions = [(not n.isupper(), not n[0].isupper(), n) for n in potstill.__all__]  # as ruff sorts
    assert constants_classes_functions == sorted(set(constants_classes_functions))
    assert not [name for name in potstill.__all__ if not hasattr(potstill, name)]


@pytest.mark.parametrize("module", MODULES)
def test_a_file_is_short_finished_and_has_a_name(module):
    lines = MODULES[module].read_text(encoding="utf-8").splitlines()
    assert MODULES[module].name != "utils.py"
    assert len(lines) <= 450
    assert not [line for line in lines if re.search("TODO|FIXME|NotImplementedError", line)]
