"""EmbeddingDistiller: from the teacher's vectors to a student in fewer dimensions."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from potstill.data.files import atomic_path
from potstill.embedding.encoders import TextStudent
from potstill.embedding.heads import VectorHead
from potstill.embedding.objective import EmbeddingObjective, PairObjective
from potstill.embedding.vectors import CHECK, Matrix, Vectors
from potstill.errors import DataError, DivergedError, RunError, ShapeError
from potstill.evaluate.space import SpaceEvaluator, SpaceScores
from potstill.losses.embedding import reconstruction_error

Student = VectorHead | TextStudent


@dataclass(frozen=True)
class Epoch:
    """One line of a training: `epoch` 0 is the start, before any step."""

    epoch: int
    stage: int
    heat: float
    loss: float | None
    kept: SpaceScores

    def line(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "stage": self.stage, "heat": self.heat, "loss": self.loss, **self.kept.as_dict()}


@dataclass
class EmbeddingDistiller:
    """Trains a student so that its similarities are the teacher's.

    Each stage has a heat that multiplies the temperatures, some epochs, and a checkpoint at its end. The student that
    is left is the best one seen on the held-out vectors, the start included: it is never worse there than PCA.

    Args:
        student: a `VectorHead`, or a `TextStudent`. It learns on the device that it is on.
        objective: what is minimised; its focus also says which held-out correlation decides. Any `EmbeddingObjective`.
        heats: one for each stage.
        epochs: passes over the vectors, a stage.
        batch_size: rows whose pairs are compared with each other.
        learning_rate: at its highest; a half cosine down to 0 over the whole training.
        reconstruction: share of a linear decoder's error, from the student's vectors to the teacher's; 0 for none.
        patience: epochs of a stage without a better held-out correlation after which the next stage begins.
        seed: of the order and of dropout.
    """

    student: Student
    objective: EmbeddingObjective = field(default_factory=PairObjective)
    heats: Sequence[float] = (1.0,)
    epochs: int = 20
    batch_size: int = 512
    learning_rate: float = 3e-3
    reconstruction: float = 0.0
    patience: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.heats or not all(0 < heat < math.inf for heat in self.heats):
            raise ShapeError(f"EmbeddingDistiller: expected a heat > 0 for each stage, got {list(self.heats)}.")
        for name, least in (("epochs", 1), ("batch_size", 2), ("patience", 1)):
            if getattr(self, name) < least:
                raise ShapeError(f"EmbeddingDistiller: expected {name} >= {least}, got {getattr(self, name)}.")
        if not 0 <= self.reconstruction <= 1:
            raise ShapeError(
                f"EmbeddingDistiller: expected a share of 0 to 1 for reconstruction, got {self.reconstruction}."
            )

    def fit(
        self,
        teacher: Vectors | Tensor,
        held_out: Tensor,
        *,
        texts: Sequence[str] | None = None,
        held_out_texts: Sequence[str] | None = None,
        judge: SpaceEvaluator | None = None,
        checkpoints: Path | None = None,
        on_step: Callable[[int, int, float], None] = lambda done, total, loss: None,
        on_epoch: Callable[[Epoch], None] = lambda epoch: None,
    ) -> list[Epoch]:
        """Train the student in place.

        Args:
            teacher: [N, H], in memory or on disk.
            held_out: [M, H], at least 3 rows, which decide when to stop.
            texts: the N texts, for a student that reads text.
            held_out_texts: the M held-out ones.
            judge: of the held-out vectors, where people's scores are to be measured too.
            checkpoints: a folder for stage-1.pt, stage-2.pt, ...; a training that finds one there goes on with it.
            on_step: told the steps done, the steps in all, and the last loss.
            on_epoch: told each epoch as it ends.

        Returns:
            A line for each epoch, the start first.

        Raises:
            DataError: texts and vectors are not equally many.
            DivergedError: the loss is not a number any more.
        """
        vectors = teacher if isinstance(teacher, Vectors) else Matrix(teacher)
        self._must_fit(vectors, held_out, texts, held_out_texts)
        judge = judge or SpaceEvaluator(held_out)
        torch.manual_seed(self.seed)
        decoder = nn.Linear(self.student.dimensions, vectors.dimensions) if self.reconstruction else None
        run = _Run(self, decoder, judge, held_out, held_out_texts)
        history = run.resume(checkpoints) if checkpoints else []
        if not history:
            history = [Epoch(0, 0, self.heats[0], None, run.measure())]
            run.note(history[0])
            on_epoch(history[0])
        per_epoch = vectors.rows // self.batch_size + (vectors.rows % self.batch_size > 1)
        total = per_epoch * self.epochs * len(self.heats)
        for stage, heat in enumerate(self.heats, 1):
            for within in range(1, self.epochs + 1):
                number = (stage - 1) * self.epochs + within
                if number <= history[-1].epoch or run.waited(history, stage) >= self.patience:
                    continue
                torch.manual_seed(self.seed * 1_000_003 + number)
                seen, loss = 0, 0.0
                self.student.train()
                for rows, batch in vectors.batches(self.batch_size, self.seed * 1_000_003 + number):
                    done = (number - 1) * per_epoch + seen
                    inputs = batch if texts is None else [texts[row] for row in rows.tolist()]
                    step = run.step(inputs, batch, heat, self.learning_rate * _half_cosine(done / total))
                    seen, loss = seen + 1, loss + step
                    on_step(done + 1, total, step)
                history.append(Epoch(number, stage, heat, loss / max(seen, 1), run.measure()))
                run.note(history[-1])
                on_epoch(history[-1])
                if checkpoints:
                    run.save(checkpoints / f"stage-{stage}.pt", history)
        self.student.load_state_dict(run.best)
        self.student.eval()
        return history

    def _must_fit(
        self, vectors: Vectors, held_out: Tensor, texts: Sequence[str] | None, held_out_texts: Sequence[str] | None
    ) -> None:
        reads = isinstance(self.student, TextStudent)
        for what, given, rows in (("texts", texts, vectors.rows), ("held_out_texts", held_out_texts, len(held_out))):
            if reads != (given is not None):
                raise DataError(
                    f"EmbeddingDistiller: expected {what} {'with' if reads else 'only with'} a TextStudent."
                )
            if given is not None and len(given) != rows:
                raise DataError(
                    f"EmbeddingDistiller: expected as many {what} as the teacher has vectors, got {len(given)} texts "
                    f"and {rows} vectors. Row i of both must be the same text."
                )
        width = self.student.inputs if isinstance(self.student, VectorHead) else vectors.dimensions
        if vectors.dimensions != width or held_out.shape[1] != width:
            raise ShapeError(
                f"EmbeddingDistiller: expected vectors of {width} dimensions, got {vectors.dimensions} to learn from "
                f"and {held_out.shape[1]} held out."
            )


class _Run:
    """What changes while a student learns, and how it is kept."""

    def __init__(
        self,
        plan: EmbeddingDistiller,
        decoder: nn.Linear | None,
        judge: SpaceEvaluator,
        held_out: Tensor,
        held_out_texts: Sequence[str] | None,
    ) -> None:
        self.device = device_of(plan.student)
        self.plan, self.decoder, self.judge = plan, decoder.to(self.device) if decoder else None, judge
        self.held_out, self.held_out_texts = held_out, held_out_texts
        learns = [*plan.student.parameters(), *(self.decoder.parameters() if self.decoder else ())]
        self.optimizer = torch.optim.Adam(learns, lr=plan.learning_rate)
        self.best: dict[str, Tensor] = {}
        self.best_score = -math.inf

    def step(self, inputs: Any, teacher: Tensor, heat: float, learning_rate: float) -> float:
        teacher = teacher.to(self.device)
        student = self.plan.student(inputs.to(self.device) if isinstance(inputs, Tensor) else inputs)
        loss = self.plan.objective(student, teacher, heat)
        if self.decoder is not None:
            share = self.plan.reconstruction
            back = self.decoder(normalize(student, dim=-1))
            loss = (1 - share) * loss + share * reconstruction_error(back, normalize(teacher, dim=-1))
        value = float(loss.detach())
        if not math.isfinite(value):
            raise DivergedError("EmbeddingDistiller: the loss is not a number any more. Try a smaller learning_rate.")
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return value

    def measure(self) -> SpaceScores:
        self.plan.student.eval()
        return self.judge(vectors_of(self.plan.student, self.held_out, self.held_out_texts))

    def note(self, epoch: Epoch) -> None:
        """Keep the student where it is the best so far."""
        score = self.score(epoch.kept)
        if score > self.best_score:
            self.best_score, self.best = score, copy.deepcopy(self.plan.student.state_dict())

    def score(self, kept: SpaceScores) -> float:
        """What the focus asks for, held out."""
        both = (kept.close + kept.all_pairs) / 2
        return {"local": kept.close, "global": kept.all_pairs, "balanced": both}[self.plan.objective.focus]

    def waited(self, history: list[Epoch], stage: int) -> int:
        """Epochs of a stage since the last one in it that was better than all before it in the stage."""
        scores = [self.score(line.kept) for line in history if line.stage == stage]
        return len(scores) - 1 - scores.index(max(scores)) if scores else 0

    def save(self, path: Path, history: list[Epoch]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "student": self.plan.student.state_dict(),
            "decoder": self.decoder.state_dict() if self.decoder else {},
            "optimizer": self.optimizer.state_dict(),
            "best": self.best,
            "best_score": self.best_score,
            "history": [line.line() for line in history],
        }
        with atomic_path(path) as partial:
            torch.save(state, partial)

    def resume(self, folder: Path) -> list[Epoch]:
        """Go on with the last stage's checkpoint; nothing where there is none."""
        found = sorted(folder.glob("stage-*.pt"), key=lambda path: int(path.stem.partition("-")[2]))
        if not found:
            return []
        try:
            state = torch.load(found[-1], weights_only=True)
            self.plan.student.load_state_dict(state["student"])
            if self.decoder:
                self.decoder.load_state_dict(state["decoder"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.best, self.best_score = state["best"], state["best_score"]
            return [_epoch(line) for line in state["history"]]
        except Exception as error:
            said = " ".join(str(error).split())[:200]
            raise RunError(
                f"checkpoints: expected {found[-1]} to be of this training, got: {said} Choose another folder."
            ) from None


def _epoch(line: dict[str, Any]) -> Epoch:
    kept = SpaceScores(**{name: line[name] for name in ("all_pairs", "recall", "scores")})
    return Epoch(line["epoch"], line["stage"], line["heat"], line["loss"], kept)


def _half_cosine(share: float) -> float:
    return (1 + math.cos(math.pi * share)) / 2


@torch.no_grad()
def vectors_of(student: Student, vectors: Tensor, texts: Sequence[str] | None) -> Tensor:
    """[N, d] on the CPU: what a student makes of vectors, or of their texts."""
    given: Any = vectors.to(device_of(student)) if texts is None else texts
    blocks = [student(given[start : start + CHECK]).float().cpu() for start in range(0, len(given), CHECK)]
    return torch.cat(blocks)


def device_of(student: Student) -> torch.device:
    """Where a student is."""
    return next(student.parameters()).device
