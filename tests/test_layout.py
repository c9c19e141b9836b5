"""The tree of docs/architecture.md: who may import whom, and what a file may not be."""

from __future__ import annotations

import ast
import importlib
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

MIDDLE = {"train", "generation", "embedding", "evaluate"}
LOW = {"teachers", "data", "engines", "models", "losses", "files", "errors"}

# Who may import whom: a package or a module directly under potstill. Arrows go down.
PACKAGES: dict[str, set[str]] = {
    "errors": set(),
    "files": {"errors"},
    "losses": {"errors"},
    "models": {"losses", "files", "errors"},
    "engines": {"models", "losses", "files", "errors"},
    "data": {"engines", "models", "losses", "files", "errors"},
    "teachers": {"data", "engines", "models", "losses", "files", "errors"},
    "evaluate": LOW,
    "generation": LOW,
    "train": LOW,
    "embedding": LOW | {"evaluate", "train"},
    "runs": LOW | MIDDLE,
    "demo": LOW | MIDDLE | {"runs"},
    "cli": LOW | MIDDLE | {"runs", "demo"},
    "__main__": {"cli"},
}

# What works in anyone's training loop, on a machine with torch and nothing else.
PURE = re.compile(
    r"potstill\.(errors|losses(\..+)?|models|models\.(split|packing|shapes|structure|capture|layer_map)|teachers|teachers\.cache(\.codec)?)"
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


def package(module: str) -> str:
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
    assert package(module) in PACKAGES, f"{package(module)} is not in the tree"
    assert "potstill" not in own(module), "import from the module that has the name, not from potstill"
    visited = {package(name) for name in own(module)} - {package(module)}
    assert visited <= PACKAGES[package(module)], f"{module} may not import {visited - PACKAGES[package(module)]}"


def refuse_circles(graph: dict[str, set[str]]) -> None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("circle: " + " <- ".join(error.args[1]))


def test_no_circles_between_modules():
    refuse_circles({module: own(module) for module in INSIDE})


def test_no_circles_between_packages():
    graph: dict[str, set[str]] = {}
    for module in INSIDE:
        graph.setdefault(package(module), set()).update({package(name) for name in own(module)} - {package(module)})
    refuse_circles(graph)


def test_a_circle_is_seen():
    with pytest.raises(pytest.fail.Exception, match=r"circle: (a <- b <- a|b <- a <- b)"):
        refuse_circles({"a": {"b"}, "b": {"a"}, "c": set()})


@pytest.mark.parametrize("module", PURE_MODULES)
def test_the_losses_import_torch_alone(module):
    allowed = {"torch", "numpy", *sys.stdlib_module_names}
    if module == "potstill.losses.kernel_triton":
        allowed.add("triton")  # comes with torch for CUDA
    if module == "potstill.losses.declared":
        allowed.add("pydantic_core")  # in hooks that pydantic alone calls
    foreign = {
        name
        for name in imports(module, typing_too=False)
        if name.split(".")[0] not in allowed and not PURE.fullmatch(name)
    }
    assert not foreign


def test_the_losses_work_where_torch_is_alone():
    importable = [name for name in PURE_MODULES if name != "potstill.losses.kernel_triton"]
    assert {"potstill.losses", "potstill.losses.divergences", "potstill.losses.schedule"} < set(importable)
    script = [
        "import importlib, sys",
        f"sys.modules.update(dict.fromkeys({PACKAGES_OF_THE_REST}))",  # None: importing it is an ImportError
        f"[importlib.import_module(name) for name in {importable}]",
        f"assert not [name for name in {PACKAGES_OF_THE_REST} if sys.modules[name]]",
        "assert 'torch._dynamo' not in sys.modules",  # takes as long as torch itself, and nothing is compiled yet
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_export_imports_no_trainer():
    """transformers.Trainer imports peft and bitsandbytes where they are, which takes seconds."""
    reached, waiting = set(), ["potstill.runs.export"]
    while waiting:
        module = waiting.pop()
        reached.add(module)
        tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
        at_once = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
        names = {f"{node.module}.{alias.name}" for node in at_once for alias in node.names}
        assert not [name for name in names if name.startswith("transformers.Train")], module
        sources = {str(node.module) for node in at_once} | names
        waiting += [name for name in sources if name in MODULES and name not in reached]
    assert {"potstill.runs.progress", "potstill.runs.config.run"} <= reached


def test_the_command_line_answers_without_torch():
    script = "import sys, potstill.cli; assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_public_names_are_sorted_and_exist():
    assert sorted(potstill.__all__) == sorted(set(potstill.__all__))
    assert not [name for name in potstill.__all__ if not hasattr(potstill, name)]


@pytest.mark.parametrize("module", MODULES)
def test_a_file_is_short_finished_and_has_a_name(module):
    lines = MODULES[module].read_text(encoding="utf-8").splitlines()
    assert MODULES[module].name != "utils.py"
    assert len(lines) <= 450
    assert not [line for line in lines if re.search("TODO|FIXME|NotImplementedError", line)]


def test_names_that_benchmarks_and_tests_import_exist() -> None:
    root = SOURCE.parents[1]
    for path in sorted([*(root / "benchmarks").glob("*.py"), *(root / "tests").glob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("potstill"):
                module = importlib.import_module(str(node.module))
                for alias in node.names:
                    file = Path(str(module.__file__)).with_name(f"{alias.name}.py")
                    known = hasattr(module, alias.name) or file.exists() or file.with_suffix("").is_dir()
                    assert known, f"{path.name} imports {alias.name} from {node.module}"
