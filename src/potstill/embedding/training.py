"""EmbeddingDistiller: trains a student with fewer dimensions on the teacher's vectors."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from potstill.embedding.encoders import TextStudent
from potstill.embedding.heads import VectorHead
from potstill.embedding.objective import EmbeddingObjective, PairObjective
from potstill.embedding.vectors import BLOCK_ROWS, VectorArray, as_vector_array
from potstill.errors import DataError, DivergedError, RunError, ShapeError, one_line
from potstill.evaluate.space import SpaceEvaluator, SpaceScores
from potstill.files import atomic_path
from potstill.losses import schedule
from potstill.losses.declared import Range, Record
from potstill.losses.embedding import reconstruction_error
from potstill.models.checksums import is_changed, remove_checksum, write_checksum


@dataclass(frozen=True)
class Epoch:
    """Held-out metrics after an epoch; epoch 0 is the start, before any step."""

    epoch: int
    stage: int
    heat: float
    loss: float | None
    metrics: SpaceScores

    def as_dict(self) -> dict[str, Any]:
        """One flat line of metrics.jsonl."""
        line = vars(self) | vars(self.metrics)
        del line["metrics"]
        return line

    @classmethod
    def from_dict(cls, line: dict[str, Any]) -> Self:
        metrics = SpaceScores(**{field.name: line.pop(field.name) for field in fields(SpaceScores)})
        return cls(**line, metrics=metrics)


@dataclass
class EmbeddingDistiller(Record):
    """Trains a student so that its similarities match the teacher's.

    A stage has a factor of the temperatures, some epochs, and a checkpoint. The student ends with the weights of the
    best epoch on the held-out vectors, the start included: there it is never worse than the PCA it started as.

    Args:
        student: a `VectorHead`, a `TextStudent`, or any module from the teacher's vectors [N, H] to [N, d], on the
            device that it trains on.
        objective: the loss; its focus also decides which held-out metric is the best. Any `EmbeddingObjective`.
        heats: factor of the temperatures, one for each stage.
        epochs: passes over the vectors in a stage.
        batch_size: rows whose pairs are compared with each other.
        learning_rate: at the start; it falls to 0 by a half cosine over all stages.
        reconstruction: weight, in [0, 1], of the error of a linear decoder from the student's vectors to the teacher's.
        patience: a stage ends after so many epochs without a better held-out metric.
        seed: of the order of rows and of dropout.
    """

    student: nn.Module
    objective: EmbeddingObjective = field(default_factory=PairObjective)
    heats: Sequence[float] = (1.0,)
    epochs: Annotated[int, Range(ge=1)] = 20
    batch_size: Annotated[int, Range(ge=2)] = 512
    learning_rate: Annotated[float, Range(gt=0)] = 3e-3
    reconstruction: Annotated[float, Range(ge=0, le=1)] = 0.0
    patience: Annotated[int, Range(ge=1)] = 5
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.heats or not all(0 < heat < math.inf for heat in self.heats):
            raise ShapeError(f"EmbeddingDistiller: expected a heat > 0 for each stage, got {list(self.heats)}.")
        if not hasattr(self.objective, "focus"):
            raise ShapeError(
                "EmbeddingDistiller: expected an objective with a focus (local, balanced or global), which selects the "
                f"best epoch, got {self.objective!r}. Set it."
            )
        parameters = list(self.student.parameters()) if isinstance(self.student, nn.Module) else []
        if not any(parameter.requires_grad for parameter in parameters):
            raise ShapeError(
                "EmbeddingDistiller: expected a module with parameters to train as the student, got "
                f"{type(self.student).__name__} without any. Set requires_grad, or give another."
            )

    def fit(
        self,
        teacher: VectorArray | Tensor,
        held_out: Tensor,
        *,
        texts: Sequence[str] | None = None,
        held_out_texts: Sequence[str] | None = None,
        evaluator: SpaceEvaluator | None = None,
        checkpoints: Path | None = None,
        on_step: Callable[[int, int, float], None] = lambda done, total, loss: None,
        on_epoch: Callable[[Epoch], None] = lambda epoch: None,
    ) -> list[Epoch]:
        """Train the student in place and return all epochs, the start first.

        The teacher's vectors are [N, H], the held-out ones, [M, H], at least 3; a student that reads text needs the
        texts of both. An evaluator is given to measure human scores too. `checkpoints` is a folder for stage-1.pt, ...;
        training resumes from the last one in it. `on_step` is called with the steps done, all steps, and the loss.
        Raises `DivergedError` if the loss is NaN or infinite.
        """
        vectors, held_out = as_vector_array(teacher), torch.as_tensor(held_out)
        self._check_inputs(vectors, held_out, texts, held_out_texts)
        evaluator = evaluator or SpaceEvaluator(held_out)
        torch.manual_seed(self.seed)
        training = _Training(self, self._dimensions(held_out, held_out_texts), vectors.dimensions)

        def finish_epoch(epoch: int, stage: int, loss: float | None) -> None:
            self.student.eval()
            metrics = evaluator(embed(self.student, held_out, held_out_texts))
            training.add(Epoch(epoch, stage, self.heats[max(stage - 1, 0)], loss, metrics))
            on_epoch(training.history[-1])

        if checkpoints:
            training.load_last(checkpoints)
        if not training.history:
            finish_epoch(0, 0, None)
        steps_per_epoch = vectors.rows // self.batch_size + (vectors.rows % self.batch_size > 1)
        total = steps_per_epoch * self.epochs * len(self.heats)
        learning_rate = schedule.cosine(self.learning_rate, 0.0, steps=max(total, 1))
        for epoch in range(training.history[-1].epoch + 1, self.epochs * len(self.heats) + 1):
            stage = (epoch - 1) // self.epochs + 1
            if training.epochs_without_gain(stage) >= self.patience:
                continue
            seed = self.seed * 1_000_003 + epoch
            torch.manual_seed(seed)
            self.student.train()
            steps, loss_sum = 0, 0.0
            for rows, batch in vectors.batches(self.batch_size, seed):
                done = (epoch - 1) * steps_per_epoch + steps
                inputs = batch if texts is None else [texts[row] for row in rows.tolist()]
                loss = training.step(inputs, batch, self.heats[stage - 1], learning_rate(done))
                steps, loss_sum = steps + 1, loss_sum + loss
                on_step(done + 1, total, loss)
            finish_epoch(epoch, stage, loss_sum / max(steps, 1))
            if checkpoints:
                training.save(checkpoints / f"stage-{stage}.pt")
        self.student.load_state_dict(training.best)
        self.student.eval()
        return training.history

    def _check_inputs(
        self, vectors: VectorArray, held_out: Tensor, texts: Sequence[str] | None, held_out_texts: Sequence[str] | None
    ) -> None:
        reads = reads_text(self.student)
        rule = "with" if reads else "only with"
        for name, given, rows in (("texts", texts, vectors.rows), ("held_out_texts", held_out_texts, len(held_out))):
            if reads != (given is not None):
                raise DataError(f"EmbeddingDistiller: expected {name} {rule} a TextStudent.")
            if given is not None and len(given) != rows:
                got = f"{len(given)} texts and {rows} vectors. Row i of both must be the same text."
                raise DataError(f"EmbeddingDistiller: expected as many {name} as the teacher has vectors, got {got}")
        width = self.student.inputs if isinstance(self.student, VectorHead) else vectors.dimensions
        if vectors.dimensions != width or held_out.shape[1] != width:
            got = f"{vectors.dimensions} to learn from and {held_out.shape[1]} held out"
            raise ShapeError(f"EmbeddingDistiller: expected vectors of {width} dimensions, got {got}.")
        if vectors.rows < 2:
            raise DataError("EmbeddingDistiller: expected at least 2 vectors, whose similarity is learnt, got 1.")

    def _dimensions(self, held_out: Tensor, texts: Sequence[str] | None) -> int:
        """Try the student on two rows, and count the dimensions of its vectors."""
        self.student.eval()
        try:
            vectors = embed(self.student, held_out[:2], None if texts is None else texts[:2])
        except Exception as error:  # a module of the user's own may raise anything
            raise ShapeError(
                f"EmbeddingDistiller: expected a student from {held_out.dtype} vectors [N, H] to a tensor [N, d], got "
                f"from {list(held_out[:2].shape)}: {one_line(error, 200)}. Change the student, or its dtype."
            ) from None
        if vectors.ndim != 2 or len(vectors) != 2:
            raise ShapeError(
                f"EmbeddingDistiller: expected a student from vectors [N, H] to [N, d], got {list(vectors.shape)} from "
                f"{list(held_out[:2].shape)}."
            )
        return vectors.shape[1]


STATEFUL = ("student", "decoder", "optimizer")


class _Training:
    """What changes while a student is trained, and is saved in checkpoints."""

    def __init__(self, plan: EmbeddingDistiller, dimensions: int, teacher_dimensions: int) -> None:
        self.plan, self.student, self.device = plan, plan.student, device_of(plan.student)
        self.decoder: nn.Module = nn.Sequential()
        if plan.reconstruction:
            self.decoder = nn.Linear(dimensions, teacher_dimensions).to(self.device)
        parameters = [*self.student.parameters(), *self.decoder.parameters()]
        self.optimizer = torch.optim.Adam(parameters)
        self.history: list[Epoch] = []
        self.best: dict[str, Tensor] = {}
        self.best_score = -math.inf

    def step(self, inputs: Any, teacher: Tensor, heat: float, learning_rate: float) -> float:
        teacher = teacher.to(self.device)
        student = self.student(inputs.to(self.device) if isinstance(inputs, Tensor) else inputs)
        loss = self.plan.objective(student, teacher, heat)
        if weight := self.plan.reconstruction:
            decoded = self.decoder(normalize(student, dim=-1))
            loss = (1 - weight) * loss + weight * reconstruction_error(decoded, normalize(teacher, dim=-1))
        value = float(loss.detach())
        if not math.isfinite(value):
            raise DivergedError("EmbeddingDistiller: the loss is NaN or infinite. Try a smaller learning_rate.")
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return value

    def add(self, epoch: Epoch) -> None:
        self.history.append(epoch)
        if (score := self._score(epoch)) > self.best_score:
            self.best_score, self.best = score, copy.deepcopy(self.student.state_dict())

    def _score(self, epoch: Epoch) -> float:
        close, all_pairs, focus = epoch.metrics.close, epoch.metrics.all_pairs, self.plan.objective.focus
        return close if focus == "local" else all_pairs if focus == "global" else (close + all_pairs) / 2

    def epochs_without_gain(self, stage: int) -> int:
        scores = [self._score(epoch) for epoch in self.history if epoch.stage == stage]
        return len(scores) - 1 - scores.index(max(scores)) if scores else 0

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        state: dict[str, Any] = {name: getattr(self, name).state_dict() for name in STATEFUL}
        state |= {"best": self.best, "best_score": self.best_score, "history": [x.as_dict() for x in self.history]}
        remove_checksum(path)
        with atomic_path(path) as partial, partial.open("wb") as file:  # torch writes the name of a path into the file
            torch.save(state, file)
        write_checksum(path)

    def load_last(self, folder: Path) -> None:
        path = max(folder.glob("stage-*.pt"), key=lambda path: int(path.stem.partition("-")[2]), default=None)
        if path is None:
            return
        if is_changed(path):
            raise RunError(f"checkpoints: expected {path} as it was written, got another: it is damaged. Delete it.")
        try:
            state = torch.load(path, weights_only=True)
            for name in STATEFUL:
                getattr(self, name).load_state_dict(state[name])
            self.best, self.best_score = state["best"], state["best_score"]
            self.history = [Epoch.from_dict(line) for line in state["history"]]
        except Exception as error:
            wrong = f"expected {path} to be of this training, got: {one_line(error, 200)} Choose another folder."
            raise RunError(f"checkpoints: {wrong}") from None
        write_checksum(path)  # a kill may have come before it


@torch.no_grad()
def embed(student: nn.Module, vectors: Tensor, texts: Sequence[str] | None) -> Tensor:
    """Compute the student's vectors, [N, d] on the CPU, from the teacher's or from the texts, as it reads them."""
    inputs: Any = texts if reads_text(student) else vectors.to(device_of(student))
    starts = range(0, len(vectors), BLOCK_ROWS)
    return torch.cat([student(inputs[start : start + BLOCK_ROWS]).float().cpu() for start in starts])


def reads_text(student: nn.Module) -> bool:
    return isinstance(student, TextStudent)


def device_of(student: nn.Module) -> torch.device:
    return next(student.parameters()).device
