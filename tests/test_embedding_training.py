"""Heads, what is measured of them, and their training."""

from __future__ import annotations

import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import reference_embedding as reference
from potstill.embedding.heads import VectorHead, fit_pca
from potstill.embedding.objective import PairObjective
from potstill.embedding.training import EmbeddingDistiller, Epoch
from potstill.embedding.vectors import open_vectors
from potstill.errors import DataError, DivergedError, ModelError, RunError, ShapeError
from potstill.evaluate.space import SpaceEvaluator
from potstill.losses.embedding import reconstruction_error, similarity_error
from potstill.models.checksums import is_whole


def clustered(rows: int, seed: int = 0) -> torch.Tensor:
    """[rows, 24]: eight groups around directions of unequal strength, and noise."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(8, 24, generator=torch.Generator().manual_seed(9)) + 0.5
    group = torch.randint(8, (rows,), generator=generator)
    return centres[group] + 0.7 * torch.randn(rows, 24, generator=generator)


TRAIN, HELD = clustered(400), clustered(120, seed=1)


def distil(head: VectorHead, focus: str = "balanced", **changes) -> tuple[EmbeddingDistiller, list[Epoch]]:
    plan = EmbeddingDistiller(
        head, PairObjective(focus), **{"epochs": 4, "batch_size": 64, "learning_rate": 1e-2, **changes}
    )
    return plan, plan.fit(TRAIN, HELD)


def test_what_is_measured_is_that_of_loops() -> None:
    teacher, student = clustered(14), clustered(14, seed=3)[:, :3]
    kept = SpaceEvaluator(teacher, ([0, 2, 4], [1, 3, 5], [1.0, 5.0, 3.0]))(student)
    s, t = reference.pairs(student.tolist()), reference.pairs(teacher.tolist())
    assert kept.all_pairs == pytest.approx(reference.spearman(s, t), abs=1e-6)
    cosines = [reference.cosine(student[i].tolist(), student[i + 1].tolist()) for i in (0, 2, 4)]
    assert kept.scores == pytest.approx(reference.spearman(cosines, [1.0, 5.0, 3.0]))
    near = []
    for space in (teacher.tolist(), student.tolist()):
        by = [
            sorted((j for j in range(14) if j != i), key=lambda j, i=i: -reference.cosine(space[i], space[j]))
            for i in range(14)
        ]
        near.append([set(order[:10]) for order in by])
    assert kept.recall == pytest.approx(sum(len(a & b) for a, b in zip(*near, strict=True)) / 140)
    assert SpaceEvaluator(teacher)(teacher).all_pairs == pytest.approx(1)
    with pytest.raises(ShapeError, match="at least 3 rows, got 2"):
        SpaceEvaluator(teacher[:2])


@pytest.mark.parametrize("start", ["centred", "uncentred", "whitened"])
@pytest.mark.parametrize("hidden", [0, 16])
def test_a_head_begins_as_pca(start: str, hidden: int) -> None:
    head = VectorHead.from_pca(TRAIN, 3, hidden=hidden, start=start)
    projected = fit_pca(TRAIN, 3, centred=start != "uncentred").project(HELD, whiten=start == "whitened")
    wanted = projected / projected.norm(dim=1, keepdim=True)
    assert torch.allclose(torch.from_numpy(head.transform(HELD)), wanted, atol=1e-4)


def test_principal_components_are_those_of_numpy() -> None:
    unit = (TRAIN / TRAIN.norm(dim=1, keepdim=True)).numpy()
    _, strength, rows = np.linalg.svd(unit - unit.mean(0), full_matrices=False)
    found = fit_pca(TRAIN, 4)
    assert np.allclose(found.variance, strength[:4] ** 2 / len(TRAIN), rtol=1e-3)
    assert np.allclose(np.abs(np.sum(found.components.numpy() * rows[:4].T, 0)), 1, atol=1e-3)


@pytest.mark.parametrize("hidden", [0, 8])
def test_a_head_is_saved_and_transforms_what_lies_on_disk(tmp_path: Path, hidden: int) -> None:
    head = VectorHead.from_pca(TRAIN, 3, hidden=hidden)
    head.save(tmp_path / "head")
    np.save(tmp_path / "x.npy", HELD.numpy())
    again = VectorHead.load(tmp_path / "head")
    assert np.array_equal(again.transform(open_vectors(tmp_path / "x.npy")), head.transform(HELD))
    assert np.allclose(np.linalg.norm(again.transform(HELD.numpy()), axis=1), 1, atol=1e-5)
    with pytest.raises(ShapeError, match="expected vectors of 24 dimensions, got 5"):
        again.transform(torch.randn(4, 5))
    with pytest.raises(ModelError, match=r"expected head\.safetensors"):
        VectorHead.load(tmp_path)
    (tmp_path / "head.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ModelError, match="expected a head in"):
        VectorHead.load(tmp_path)


def test_the_dial_trades_close_pairs_for_the_map() -> None:
    kept = {}
    for focus in ("local", "global"):
        head = VectorHead.from_pca(TRAIN, 3)
        _, lines = distil(head, focus, epochs=8)
        kept[focus] = SpaceEvaluator(HELD)(torch.from_numpy(head.transform(HELD)))
        best = max(lines, key=lambda line: {"local": line.metrics.recall, "global": line.metrics.all_pairs}[focus])
        assert kept[focus].all_pairs == pytest.approx(
            best.metrics.all_pairs, abs=1e-4
        )  # the best epoch is what is left
        assert best.epoch > 0
    assert kept["global"].all_pairs > SpaceEvaluator(HELD)(fit_pca(TRAIN, 3).project(HELD)).all_pairs
    assert kept["local"].recall > SpaceEvaluator(HELD)(fit_pca(TRAIN, 3).project(HELD)).recall


def test_no_student_ends_worse_than_its_start() -> None:
    head = VectorHead.from_pca(TRAIN, 3)
    _, lines = distil(head, "global", learning_rate=10.0)
    assert SpaceEvaluator(HELD)(torch.from_numpy(head.transform(HELD))).all_pairs >= lines[0].metrics.all_pairs - 1e-4


def test_the_seed_decides_everything() -> None:
    ends = []
    for seed in (1, 1, 2):
        head = VectorHead.from_pca(TRAIN, 3, hidden=4, seed=seed)
        distil(head, seed=seed)
        ends.append(head.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert not torch.equal(ends[0]["map.weight"], ends[2]["map.weight"])


class KilledError(Exception):
    pass


def numbers(path: Path) -> dict[str, bytes]:
    """What torch saved, but for the pickle, which depends on which objects are the same one."""
    with zipfile.ZipFile(path) as archive:
        return {x: archive.read(x) for x in archive.namelist() if not x.endswith(("data.pkl", "serialization_id"))}


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_killed_training_goes_on_to_the_same_end(tmp_path: Path, after: int) -> None:
    settings = {"heats": [4.0, 1.0], "epochs": 2, "batch_size": 64, "reconstruction": 0.3, "patience": 9}

    def plan() -> EmbeddingDistiller:
        torch.manual_seed(5)
        return EmbeddingDistiller(VectorHead.from_pca(TRAIN, 3, hidden=4), **settings)

    def kill(line: Epoch) -> None:
        if line.epoch == after + 1:
            raise KilledError

    whole = plan()
    lines = whole.fit(TRAIN, HELD, checkpoints=tmp_path / "whole")
    assert sorted(path.name for path in (tmp_path / "whole").glob("*.pt")) == ["stage-1.pt", "stage-2.pt"]
    assert [(line.epoch, line.stage, line.heat) for line in lines] == [
        (0, 0, 4.0), (1, 1, 4.0), (2, 1, 4.0), (3, 2, 1.0), (4, 2, 1.0)
    ]  # fmt: skip
    with pytest.raises(KilledError):
        plan().fit(TRAIN, HELD, checkpoints=tmp_path / "killed", on_epoch=kill)
    again = plan()
    seen: list[int] = []
    resumed = again.fit(TRAIN, HELD, checkpoints=tmp_path / "killed", on_epoch=lambda line: seen.append(line.epoch))
    assert seen == list(range(after + 1, 5))
    assert resumed == lines
    for name, value in whole.student.state_dict().items():
        assert torch.equal(value, again.student.state_dict()[name])
    for name in ("stage-1.pt", "stage-2.pt"):
        assert numbers(tmp_path / "whole" / name) == numbers(tmp_path / "killed" / name)


def test_a_checkpoint_that_a_kill_left_without_a_checksum_gets_one(tmp_path: Path) -> None:
    plan, _ = distil(VectorHead.from_pca(TRAIN, 3), epochs=1)
    plan.fit(TRAIN, HELD, checkpoints=tmp_path)
    (tmp_path / "stage-1.pt.sha256").unlink()
    plan.fit(TRAIN, HELD, checkpoints=tmp_path)
    assert is_whole(tmp_path / "stage-1.pt")


def test_a_stage_ends_when_nothing_gets_better() -> None:
    _, lines = distil(VectorHead.from_pca(TRAIN, 3), heats=[1.0, 0.5], epochs=30, patience=2, learning_rate=1e-9)
    assert {line.stage for line in lines} == {0, 1, 2}
    assert len(lines) < 20


def test_an_objective_of_ones_own_is_minimised() -> None:
    heats = set()

    class Error:
        focus = "global"

        def __call__(self, student: torch.Tensor, teacher: torch.Tensor, heat: float = 1.0) -> torch.Tensor:
            heats.add(heat)
            return similarity_error(student, teacher)

    head = VectorHead(24, 3)
    plan = EmbeddingDistiller(head, Error(), heats=[2.0, 1.0], epochs=2, batch_size=64, learning_rate=1e-2)
    history = plan.fit(TRAIN, HELD)
    assert heats == {1.0, 2.0}
    assert history[-1].loss < history[1].loss
    assert max(line.metrics.all_pairs for line in history) > history[0].metrics.all_pairs


class OwnStudent(torch.nn.Module):
    """As a user writes one with torch alone."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = torch.nn.Linear(TRAIN.shape[1], 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(x)


class SimilarityObjective:
    focus = "global"

    def __call__(self, student: torch.Tensor, teacher: torch.Tensor, heat: float = 1.0) -> torch.Tensor:
        return similarity_error(student, teacher)


def test_a_student_of_ones_own_learns_with_reconstruction() -> None:
    torch.manual_seed(0)
    student = OwnStudent()
    first = student.encoder.weight.detach().clone()
    objective = SimilarityObjective()
    distiller = EmbeddingDistiller(student, objective, epochs=4, batch_size=len(TRAIN), reconstruction=0.4)
    history = distiller.fit(TRAIN, HELD)
    assert history[-1].loss < history[1].loss
    torch.manual_seed(0)
    again = OwnStudent()
    assert torch.equal(again.encoder.weight, first)
    torch.manual_seed(0)  # the decoder's, as `fit` seeds it
    decoder = torch.nn.Linear(3, TRAIN.shape[1])
    unit = torch.nn.functional.normalize
    decoded, teacher = decoder(unit(again(TRAIN), dim=-1)), unit(TRAIN, dim=-1)
    expected = 0.6 * similarity_error(again(TRAIN), TRAIN) + 0.4 * reconstruction_error(decoded, teacher)
    assert history[1].loss == pytest.approx(float(expected.detach()), rel=1e-5)  # one batch an epoch, in any order
    with pytest.raises(ShapeError, match=r"expected a student from vectors \[N, H\] to \[N, d\], got \[3\]"):
        EmbeddingDistiller(torch.nn.Sequential(OwnStudent(), FirstColumn())).fit(TRAIN, HELD)


def test_students_that_cannot_be_trained_are_refused() -> None:
    linear = torch.nn.Linear
    for student, message in (
        (linear(10, 3), r"got from \[2, \d+\]: mat1 and mat2 shapes cannot be multiplied"),
        (linear(TRAIN.shape[1], 3).double(), r"Change the student, or its dtype\."),
        (linear(TRAIN.shape[1], 3).requires_grad_(False), "with parameters to train as the student, got Linear"),
        (torch.nn.Identity(), "with parameters to train as the student, got Identity without any"),
        (len, "with parameters to train"),
    ):
        with pytest.raises(ShapeError, match=message):
            EmbeddingDistiller(student).fit(TRAIN, HELD)  # type: ignore[arg-type]
    student = linear(TRAIN.shape[1], 3)
    with pytest.raises(ShapeError, match="expected an objective with a focus"):
        EmbeddingDistiller(student, similarity_error)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"EmbeddingDistiller\.learning_rate: expected a number > 0, got -1"):
        EmbeddingDistiller(student, learning_rate=-1)
    with pytest.raises(DataError, match="expected at least 2 vectors"):
        EmbeddingDistiller(student).fit(TRAIN[:1], HELD)
    assert len(EmbeddingDistiller(student, epochs=1).fit(TRAIN.numpy(), HELD.numpy())) == 2  # type: ignore[arg-type]


class FirstColumn(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sum(0)


def test_a_checkpoint_of_another_student_is_refused(tmp_path: Path) -> None:
    plan, _ = distil(VectorHead.from_pca(TRAIN, 3), epochs=1)
    plan.fit(TRAIN, HELD, checkpoints=tmp_path)
    with pytest.raises(RunError, match=r"expected .*stage-1\.pt to be of this training"):
        replace(plan, student=VectorHead.from_pca(TRAIN, 4)).fit(TRAIN, HELD, checkpoints=tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heats": []}, "expected a heat > 0 for each stage"),
        ({"heats": [0.0]}, "expected a heat > 0"),
        ({"epochs": 0}, r"epochs: expected a number >= 1, got 0"),
        ({"batch_size": 1}, r"batch_size: expected a number >= 2, got 1"),
        ({"reconstruction": 1.5}, r"reconstruction: expected a number in \[0, 1\], got 1.5"),
    ],
)
def test_impossible_settings_are_refused(change, message) -> None:
    with pytest.raises(ShapeError, match=message):
        EmbeddingDistiller(VectorHead(4, 2), **change)


def test_inputs_that_do_not_fit_together_are_refused() -> None:
    plan = EmbeddingDistiller(VectorHead.from_pca(TRAIN, 3), epochs=1)
    with pytest.raises(ShapeError, match="expected vectors of 24 dimensions, got 24 to learn from and 5 held out"):
        plan.fit(TRAIN, torch.randn(9, 5))
    with pytest.raises(DataError, match="expected texts only with a TextStudent"):
        plan.fit(TRAIN, HELD, texts=["a"] * len(TRAIN))
    with pytest.raises(ShapeError, match=r"focus: expected one of local, balanced, global, got glbal\. Did you mean"):
        PairObjective("glbal")
    with pytest.raises(DivergedError, match="the loss is NaN or infinite"):
        replace(plan, learning_rate=float("inf"), epochs=2).fit(TRAIN, HELD)
