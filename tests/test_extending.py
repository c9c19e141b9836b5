"""Extending the code base: each kind of extension is one class or function, and at most one line elsewhere.

The extensions are written into a copy of the code base. They must then work in Python, in recipes, in `check`, `run`
and `diagnose`, in the schema and on the page of recipe keys.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

ROOT = Path(__file__).parents[1]


class Extension(NamedTuple):
    """New code in a file, old or new, and at most one line in another."""

    file: str
    code: str
    replaces: str = ""  # what the code takes the place of, in an old file
    elsewhere: tuple[str, str] | None = None  # (file, line)


REGISTER = "runs/config/run.py"
EXTENSIONS = {
    "divergence": Extension(
        "losses/squared_hellinger.py",
        '''
from dataclasses import dataclass
from potstill.losses.divergences import Divergence

@dataclass(frozen=True)
class SquaredHellinger(Divergence):
    """Squared Hellinger distance."""
    name = "squared_hellinger"

    def pointwise(self, log_q, log_p):
        p, q = log_p.exp(), log_q.exp()
        return 0.5 * (p.sqrt() - q.sqrt()) ** 2, 0.5 * (q - (p * q).sqrt())
''',
        elsewhere=(REGISTER, "import potstill.losses.squared_hellinger"),
    ),
    "term": Extension(
        "train/terms/hidden_norm.py",
        '''
from dataclasses import dataclass
from potstill.train.terms.layers import LayerTerm

@dataclass(frozen=True)
class HiddenNorm(LayerTerm):
    """Match the norms of hidden states.

    Args:
        power: of the distance between two norms.
    """
    power: float = 2.0
    name = "hidden_norm"

    def compare(self, signals, student, teacher, trained):
        ours = signals.inside.hidden[student].float().norm(dim=-1)
        other = signals.teacher.inside.hidden[teacher].float().norm(dim=-1)
        return signals.attended_mean((ours - other).abs().pow(self.power)[signals.attended])
''',
        elsewhere=(REGISTER, "import potstill.train.terms.hidden_norm"),
    ),
    "teacher": Extension(
        "teachers/sharpened.py",
        '''
from dataclasses import dataclass, replace
from potstill.losses.targets import DenseTargets
from potstill.teachers.model import ModelSource, ModelTeacher
from potstill.teachers.source import TeacherSource

class SharpenedTeacher(ModelTeacher):
    factor = 1.0
    def __call__(self, batch, alignment):
        output = super().__call__(batch, alignment)
        return replace(output, targets=DenseTargets(output.targets.dense() * self.factor))

@dataclass(frozen=True)
class SharpenedSource(TeacherSource):
    """A model with its logits times a factor."""
    sharpened: str
    factor: float = 2.0
    name = "sharpened"
    title = property(lambda self: f"{self.sharpened}, sharpened {self.factor:g} times")

    def load(self, student, task="causal", key="teacher"):
        loaded = ModelSource(self.sharpened).load(student, task, key)
        teacher = SharpenedTeacher(loaded.model)
        teacher.factor = self.factor
        return replace(loaded, teacher=teacher)
''',
        elsewhere=(REGISTER, "import potstill.teachers.sharpened"),
    ),
    "adapter": Extension(
        "models/rslora.py",
        '''
from dataclasses import dataclass
from potstill.models.adapters import Lora

@dataclass(frozen=True)
class RsLora(Lora):
    """LoRA that is scaled by the square root of its rank."""
    name = "rslora"
    title = property(lambda self: f"rank-stabilized LoRA of rank {self.rank}")

    def peft_config(self, model):
        config = super().peft_config(model)
        config.use_rslora = True
        return config
''',
        elsewhere=(REGISTER, "import potstill.models.rslora"),
    ),
    "recipe key": Extension(
        "train/terms/logits.py",
        '''
        weight: >= 0.
        smoothing: >= 0, added to the loss.
    """

    weight: Weight = 1.0
    smoothing: Annotated[float, Range(ge=0)] = 0.0
    name = "labels"
    needs_labels = True
    needs_teacher = False
    tasks = HEAD_TASKS

    def __call__(self, signals: Signals) -> Tensor:
        return signals.compare(None, label_weight=1.0).loss + self.smoothing
''',
        replaces='''
        weight: >= 0.
    """

    weight: Weight = 1.0
    name = "labels"
    needs_labels = True
    needs_teacher = False
    tasks = HEAD_TASKS

    def __call__(self, signals: Signals) -> Tensor:
        return signals.compare(None, label_weight=1.0).loss
''',
    ),
    "command": Extension(
        "cli/families.py",
        '''
from potstill.cli.app import app

@app.command()
def families() -> None:
    """Print the families of declarations."""
    import potstill.runs.config.run
    from potstill.losses.declared import Declared

    for family in Declared.__subclasses__():
        print(family.__name__, *family.kinds)
''',
        elsewhere=("cli/__init__.py", "from potstill.cli import families"),
    ),
}

# Run in the copy: what fails raises.
SCRIPT = """
import json, sys
from typer.testing import CliRunner

recipe, run = sys.argv[1:]
from potstill.cli import app

def command(*words):
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output

command("check", recipe)
command("run", recipe)
command("diagnose", run)
schema = json.loads(command("schema"))
families = command("families")

from potstill.losses.declared import Declared
from potstill.losses.squared_hellinger import SquaredHellinger
from potstill.models.rslora import RsLora
from potstill.teachers.sharpened import SharpenedSource
from potstill.train.terms.hidden_norm import HiddenNorm
from potstill.train.terms.logits import Labels, Logits
from potstill.runs.config.run import Recipe
import reference

loaded = Recipe.load(recipe)
assert loaded.objective == [Logits(SquaredHellinger()), HiddenNorm(power=1.0), Labels(weight=0.5, smoothing=0.25)]
assert loaded.student.adapter == RsLora(rank=2, merge=True)
assert loaded.teacher == SharpenedSource(loaded.teacher.sharpened, 3.0)
page = reference.page()
for name in ("SquaredHellinger", "HiddenNorm", "SharpenedSource", "RsLora"):
    assert name in schema["$defs"], name
for words in ("divergence: squared_hellinger", "term: hidden_norm", "of the distance between two norms.", "sharpened",
              "adapter: rslora", "`smoothing`"):
    assert words in page, words
assert "squared_hellinger" in families and "rslora" in families
print("done")
"""


@pytest.mark.parametrize("kind", EXTENSIONS)
def test_each_is_under_30_lines_and_one_line_elsewhere(kind: str) -> None:
    extension = EXTENSIONS[kind]
    assert len(extension.code.strip().splitlines()) < 30
    assert extension.elsewhere is None or "\n" not in extension.elsewhere[1]


@pytest.mark.slow
def test_they_work_everywhere(toys: Path, recipe_values: dict[str, Any], tmp_path: Path) -> None:
    source = tmp_path / "src" / "potstill"
    shutil.copytree(ROOT / "src" / "potstill", source, ignore=shutil.ignore_patterns("__pycache__"))
    for file, code, replaces, elsewhere in EXTENSIONS.values():
        path = source / file
        text = path.read_text() if replaces else ""
        assert text.count(replaces) == 1 or not replaces
        path.write_text(text.replace(replaces, code) if replaces else code)
        if elsewhere is not None:
            with (source / elsewhere[0]).open("a") as other:
                other.write(f"\n{elsewhere[1]}\n")
    recipe_values |= {
        "teacher": {"sharpened": str(toys / "teacher"), "factor": 3.0},
        "student": {"model": str(toys / "teacher"), "adapter": {"kind": "rslora", "rank": 2, "merge": True}},
        "objective": [
            {"term": "logits", "divergence": "squared_hellinger"},
            {"term": "hidden_norm", "power": 1.0},
            {"term": "labels", "weight": 0.5, "smoothing": 0.25},
        ],
        "evaluate": {"continuations": 0},
    }
    recipe_values["train"]["max_steps"] = 2
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_values))
    paths = f"{source.parent}:{ROOT / 'docs'}"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "recipe.yaml"), recipe_values["output"]],
        env={"PYTHONPATH": paths, "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and done.stdout.endswith("done\n"), done.stderr[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"logits", "hidden_norm", "labels"} <= set(lines[0])
