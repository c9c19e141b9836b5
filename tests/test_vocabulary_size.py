"""How many tokens a student keeps, where a run chooses: `student.vocabulary.keep: auto`."""

from __future__ import annotations

import io
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from typer.testing import CliRunner

from conftest import quiet_run
from potstill.cli import app
from potstill.errors import ModelError, RecipeError, UserError
from potstill.runs import vocabulary_size
from potstill.runs.build import build_run
from potstill.runs.config.run import Recipe
from potstill.runs.run import run
from potstill.runs.vocabulary_size import choose_vocabulary_size

SIZES = [300, 284, 268]  # of the toys' 300 tokens; 252 are fewer than the alphabet


@pytest.fixture
def automatic(recipe_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(vocabulary_size, "MULTIPLE", 4)
    monkeypatch.setattr(vocabulary_size, "RATIO", 0.95)
    recipe_values["student"] = {
        "design": {"params": 6000}, "initialize": {"method": "prune", "calibration_rows": 4},
        "vocabulary": {"keep": "auto"},
    }  # fmt: skip
    recipe_values["evaluate"] = {"continuations": 0}
    return recipe_values


def choose(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, bits: dict[int, Any]) -> tuple[Any, str, str]:
    """Choose among students of known quality; None where the family has no model of that size."""

    def design(budget: Any, config: Any, size: int) -> None:
        if bits[size] is None:
            raise ModelError("design: expected a larger model, got 5 parameters.")

    monkeypatch.setattr(vocabulary_size, "budget_config", design)

    def size_of(recipe: Recipe) -> int:
        return 300 if recipe.student.vocabulary is None else int(recipe.student.vocabulary.keep)

    def texts(recipe: Recipe) -> list[str]:
        assert bits[size_of(recipe)] is not None  # they are read beside a model that there is
        return ["text"]

    monkeypatch.setattr(vocabulary_size, "_texts", texts)
    monkeypatch.setattr(vocabulary_size, "_pruned_bits", lambda recipe, texts: float(bits[size_of(recipe)]))
    shown = io.StringIO()
    console = Console(file=shown, width=200)
    recipe, note = choose_vocabulary_size(Recipe.parse(values), Path(values["output"]), console)
    return recipe.student.vocabulary, note, shown.getvalue()


def test_fewer_tokens_are_tried_until_one_is_worse(automatic: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    part, note, _ = choose(automatic, monkeypatch, {300: 3.0, 284: 2.5, 268: 2.75})
    assert part.keep == 284
    assert note == (
        "student.vocabulary: 284 tokens; a student of this size then needs 2.500 bits a byte of training text before "
        "it is trained, and 3.000 with 300, 2.750 with 268."
    )


def test_all_tokens_stay_where_fewer_are_worse(automatic: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    part, note, _ = choose(automatic, monkeypatch, {300: 2.0, 284: 2.5})
    assert part is None
    assert note.startswith("student.vocabulary: 300 tokens;")


def test_numbers_without_a_design_are_left_out(automatic: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    part, _, shown = choose(automatic, monkeypatch, {300: None, 284: 2.5, 268: 2.0})
    assert part.keep == 268
    assert "300 tokens: left out. design: expected a larger model" in shown
    Path(automatic["output"], vocabulary_size.PARTS).unlink()
    part, note, _ = choose(automatic, monkeypatch, {300: 2.5, 284: None, 268: 2.0})
    assert part.keep == 268
    assert "284" not in note


def test_a_budget_that_no_tokens_meet(automatic: dict[str, Any]) -> None:
    automatic["student"]["design"] = {"params": 10}
    with pytest.raises(RecipeError, match=r"vocabulary\.keep: expected a budget .* params 10.*Change it\."):
        choose_vocabulary_size(Recipe.parse(automatic), Path(automatic["output"]), Console(file=io.StringIO()))


def test_a_student_is_measured_as_pruning_leaves_it(automatic: dict[str, Any]) -> None:
    recipe = vocabulary_size._with_tokens(Recipe.parse(automatic), 284)
    texts = vocabulary_size._texts(recipe)
    found = vocabulary_size._pruned_bits(recipe, texts)
    automatic["student"]["vocabulary"] = {"keep": 284}
    built = build_run(Recipe.parse(automatic))
    assert built.vocabulary == 284
    student, nats = built.new_student().eval(), 0.0
    for text in texts:
        ids = torch.tensor([built.tokenizer(text, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            nats += float(student(ids, labels=ids).loss) * (ids.shape[1] - 1)
    size = sum(len(text.encode()) for text in texts)
    assert found == pytest.approx(nats / math.log(2) / size, rel=0.02)  # it is calibrated on other rows


def test_figures_of_other_data_are_not_read(automatic: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(automatic, monkeypatch, {300: 3.0, 284: 2.5, 268: 2.75})[0].keep == 284
    assert choose(automatic, monkeypatch, {300: 3.0, 284: 3.5, 268: 3.0})[0].keep == 284
    path = Path(automatic["data"]["train"]["path"])
    path.write_text(path.read_text() + path.read_text())
    assert choose(automatic, monkeypatch, {300: 3.0, 284: 3.5})[0] is None


@pytest.mark.parametrize(
    ("text", "message"), [("none.jsonl", "none.jsonl"), (None, r"at least 8 rows in data\.train with auto, got [12]\.")]
)
def test_data_that_nothing_can_be_chosen_on(
    automatic: dict[str, Any], tmp_path: Path, text: str | None, message: str
) -> None:
    if text:
        automatic["student"]["vocabulary"]["text"] = {"path": text}
    else:
        automatic["data"]["train"] = {"path": str(tmp_path / "short.jsonl")}
        (tmp_path / "short.jsonl").write_text('{"text": "the cat sat on the mat"}\n')
    with pytest.raises(UserError, match=message):
        choose_vocabulary_size(Recipe.parse(automatic), Path(automatic["output"]), Console(quiet=True))


def test_a_damaged_teacher_is_no_budget(automatic: dict[str, Any], tmp_path: Path, toys: Path) -> None:
    shutil.copytree(toys / "teacher", tmp_path / "damaged")
    file = tmp_path / "damaged" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    automatic["teacher"] = {"model": str(tmp_path / "damaged")}
    with pytest.raises(ModelError, match="cut off or damaged"):
        choose_vocabulary_size(Recipe.parse(automatic), Path(automatic["output"]), Console(quiet=True))


def test_a_run_chooses_and_a_resumed_one_measures_nothing_again(
    automatic: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = quiet_run(automatic)
    saved = yaml.safe_load((result.directory / "recipe.yaml").read_text())["student"].get("vocabulary")
    (note,) = (note for note in result.summary["notes"] if "before it is trained" in note)
    chosen = int(note.split()[1])
    assert chosen in SIZES
    assert saved == (None if chosen == 300 else {"keep": chosen})
    assert result.summary["rows"]["student"]["parameters"] == pytest.approx(6000, rel=0.05)
    measured: list[Any] = []
    monkeypatch.setattr(vocabulary_size, "_pruned_bits", lambda *a: measured.append(a))
    assert choose_vocabulary_size(Recipe.parse(automatic), result.directory, Console(quiet=True))[1] == note
    assert not measured
    figures = (result.directory / vocabulary_size.PARTS).read_bytes()
    with pytest.raises(RecipeError, match="got another seed"):
        run(Recipe.parse(automatic | {"seed": 5}), resume=True, console=Console(quiet=True))
    assert (result.directory / vocabulary_size.PARTS).read_bytes() == figures


def test_figures_without_a_choice_are_those_of_all_tokens(automatic: dict[str, Any]) -> None:
    built = build_run(Recipe.parse(automatic))
    assert built.vocabulary == 300
    assert any("these are figures of all tokens" in note for note in built.notes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"design": {"num_hidden_layers": 1}}, "keep: auto with a budget"),
        ({"initialize": "random"}, "keep: auto with a budget"),
        ({"initialize": {"method": "prune", "rounds": 2}}, "rounds without vocabulary"),
    ],
)
def test_a_choice_needs_a_budget_and_weights(automatic: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    automatic["student"] |= changes
    with pytest.raises(RecipeError, match=message):
        Recipe.parse(automatic)


def test_a_teacher_whose_tokens_cannot_be_cut_is_refused_at_once(automatic: dict[str, Any], toys: Path) -> None:
    automatic["teacher"] = {"ensemble": [{"model": str(toys / "teacher")}, {"model": str(toys / "teacher")}]}
    with pytest.raises(RecipeError, match=r"vocabulary\.keep: expected a teacher that is one model"):
        choose_vocabulary_size(Recipe.parse(automatic), Path(automatic["output"]), Console(quiet=True))


def test_the_command_writes_the_number_into_the_recipe(
    automatic: dict[str, Any], toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bits = {None: 3.0, 284: 2.0}
    monkeypatch.setattr(vocabulary_size, "_texts", lambda recipe: ["text"])
    monkeypatch.setattr(
        vocabulary_size,
        "_pruned_bits",
        lambda recipe, texts: bits.get(recipe.student.vocabulary and recipe.student.vocabulary.keep, 4.0),
    )
    command = ["design", "--teacher", str(toys / "teacher"), "--data", str(toys / "train.jsonl")]
    done = CliRunner().invoke(
        app, [*command, "--vocabulary", "auto", "--params", "6000", "--out", str(tmp_path / "out")]
    )
    assert done.exit_code == 0, done.output
    part = yaml.safe_load(done.output[done.output.index("student:\n") :])["student"]
    assert part["vocabulary"]["keep"] == 284
    assert part["design"]["params"] == 6000
