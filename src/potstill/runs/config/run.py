"""Recipe of a distillation run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, model_validator

from potstill.data.masking import MASKED_SHARE
from potstill.data.sources import Source, in_parts
from potstill.losses.alignment import SEQUENCE_TASKS, TOKEN_TASKS, Task
from potstill.losses.declared import Either
from potstill.models.adapters import Lora, adapter_conflicts
from potstill.models.loading import is_adapter
from potstill.runs.config.document import Document, Folder, Part
from potstill.runs.config.export import ExportPart, export_mistakes
from potstill.runs.config.inputs import digests
from potstill.runs.config.student import StudentPart
from potstill.runs.config.training import TrainPart, argument_names
from potstill.runs.formats.table import FORMATS
from potstill.teachers import cached, ensemble, model, self_taught, served  # noqa: F401  # kinds of teachers
from potstill.teachers.source import TeacherSource
from potstill.train.objective import task_mistakes
from potstill.train.rollout import RolloutConfig
from potstill.train.terms import across, dense, layers, logits, policy, routers, supervision  # noqa: F401  # all terms
from potstill.train.terms.term import Term


class DataPart(Part):
    """Training and held-out data."""

    train: Annotated[
        Source | tuple[Source, ...],
        Either(lambda value: not isinstance(value, list | tuple)),
        Field(description="one source, or a list of several with a share each, or all of them once"),
    ]
    eval: Source
    max_length: int = Field(512, ge=2, description="tokens in a row at most")
    packing: bool = Field(
        False,
        description="fill rows of max_length instead of padding: plain text is joined, all other rows stand side by "
        "side without seeing one another",
    )
    chat_template: str | None = Field(None, description="a Jinja file, in place of the tokenizer's chat template")
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="arguments of the chat template, such as enable_thinking; saved with the student's tokenizer",
    )
    near_duplicates: bool = Field(
        False, description="also report held-out rows most of whose runs of 8 words are in the training data"
    )
    masked_share: float = Field(MASKED_SHARE, gt=0, lt=1, description="of the tokens, for the task masked")


def _without_weight(source: TeacherSource) -> TeacherSource:
    if getattr(source, "weight", None) is not None:
        raise ValueError(f"expected weight for members of an ensemble alone, got it with {source.name}")
    return source


class EvaluatePart(Part):
    """What the report shows besides the student's own metrics."""

    baseline: bool = Field(False, description="train the same student on labels alone, and compare")
    random_start: bool = Field(
        False, description="train the same design with the same objective from random weights, and compare"
    )
    continuations: int = Field(3, ge=0, description="held-out prompts that each causal model continues")
    curve_rows: int = Field(128, ge=1, description="held-out rows, evenly spaced, for the learning curves")
    time_limit: float = Field(
        600, gt=0, description="seconds for measuring after training; the report says what they did not suffice for"
    )

    @property
    def trained(self) -> tuple[str, ...]:
        """The names of all models that a run trains."""
        compared = {"baseline": self.baseline, "random": self.random_start}
        return ("student", *(name for name, wanted in compared.items() if wanted))


class Recipe(Document):
    """A distillation run."""

    name: str = Field(min_length=1)
    seed: int = Field(0, ge=0)
    task: Task = Field(
        "causal",
        description="what both models predict: the next token, a masked token, a class, a number; or nothing, for an "
        "encoder without a head, whose layers are compared",
    )
    teacher: Annotated[TeacherSource, AfterValidator(_without_weight)]
    student: StudentPart
    data: DataPart
    objective: list[Term] = Field(min_length=1)
    rollout: RolloutConfig | None = Field(None, description="train on samples of the student; by default on data alone")
    train: TrainPart = Field(default_factory=dict, description="any field of transformers.TrainingArguments")
    evaluate: EvaluatePart = Field(default_factory=lambda: EvaluatePart.model_validate({}))
    export: list[ExportPart] = Field(default_factory=list, description="files of the student, in export/")
    output: Folder = Field(description="the run directory")

    @classmethod
    def mapping_keys(cls) -> Iterator[str]:
        """See Document."""
        return (f"train.{name}" for name in argument_names())

    @model_validator(mode="after")
    def _parts_go_together(self) -> Self:
        mistakes = [
            *task_mistakes(self.objective, self.task),
            *self._task_mistakes(),
            *self._rollout_mistakes(),
            *self._random_start_mistakes(),
            *self._export_mistakes(),
            *adapter_conflicts(self.student.adapter, self.task, self.train),
        ]
        if mistakes:
            raise ValueError("\n".join(mistakes))
        return self

    def changes(self, earlier: Self) -> list[str]:
        """See Document; smaller batches, and more of them in a step, make the same steps."""
        same = _with_rows_of_step(self.train) == _with_rows_of_step(earlier.train)
        return [key for key in super().changes(earlier) if key != "train" or not same]

    def measured_request(self, directory: Path) -> dict[str, Any]:
        """All that decides what a run measures before it trains: what it cannot go on without, and what its files hold.

        It is JSON, and the same on another machine.
        """
        values = self.model_dump(mode="json", exclude={"name", "output", "evaluate"}, exclude_none=True)
        values["train"] = _with_rows_of_step(values["train"])
        return {"recipe": values, "inputs": digests(values, directory)}

    def _export_mistakes(self) -> Iterator[str]:
        if self.student.quantize is not None and self.task != "causal":
            yield f"student.quantize: expected the task causal, got {self.task}."
        yield from export_mistakes(self.export, self.task)
        adapter, name = self.student.adapter, self.student.model
        is_lora = isinstance(adapter, Lora) and not adapter.merge
        saved = adapter is None and name is not None and is_adapter(name)
        if any(FORMATS[part.to].adapter for part in self.export) and not (is_lora or saved):
            yield "export: expected student.adapter lora or qlora, not merged, for gguf-adapter, got another. Use gguf."

    def _task_mistakes(self) -> Iterator[str]:
        """Find what is not defined for the task, each mistake as a line that begins with its key."""
        task = self.task
        for key, source in self.teacher.sources():
            if task not in source.tasks:
                tasks = ", ".join(sorted(source.tasks))
                yield f"{key}.{source.name}: expected {key}.model for the task {task}, got a teacher for {tasks} alone."
        yield from self._column_mistakes()
        yield from self._label_mistakes()
        if self.data.packing and task not in TOKEN_TASKS:
            yield f"data.packing: expected false for the task {task}, got true. Each row is one example."
        if task != "masked" and self.data.masked_share != MASKED_SHARE:
            yield f"data.masked_share: expected the task masked with it, got {task}."
        if task == "encoder" and self.evaluate.baseline:
            yield "evaluate.baseline: expected false for the task encoder, got true. There are no labels to train on."
        if task != "causal" and self.rollout is not None:
            yield f"rollout: expected the task causal with it, got {task}. Other models generate no text."

    def _column_mistakes(self) -> Iterator[str]:
        """Find columns that the rows of the task do not have."""
        task = self.task
        parts = [("train", part) for part in in_parts(self.data.train)]
        for name, part in [*parts, ("eval", self.data.eval)]:
            given = [key for key, value in vars(part).items() if value is not None]
            for key in ("pair", "label"):
                if task not in SEQUENCE_TASKS and key in given:
                    yield f"data.{name}.{key}: expected the task classification or regression with it, got {task}."
            if task != "causal" and "teacher_prompt" in given:
                yield f"data.{name}.teacher_prompt: expected the task causal with it, got {task}."
            for key in ("prompt", "completion", "messages", "input_ids"):
                if task not in TOKEN_TASKS and key in given:
                    yield f"data.{name}.{key}: expected field for the texts of the task {task}, got {key}."

    def _label_mistakes(self) -> Iterator[str]:
        """Find what needs the labels of rows that have none."""
        if self.data.eval.label is False:
            yield "data.eval.label: expected the column of labels, by which models are measured, got false."
        if any(part.label is False for part in in_parts(self.data.train)):
            for place, term in enumerate(self.objective):
                if term.needs_labels:
                    yield f"objective.{place}: expected labels in data.train for {term.name}, got label: false."
            if self.evaluate.baseline:
                yield "evaluate.baseline: expected labels in data.train to train it on, got label: false."

    def _random_start_mistakes(self) -> Iterator[str]:
        """Find a student whose start is not its teacher's weights, and samples of one that has learnt nothing."""
        if not self.evaluate.random_start:
            return
        student, key = self.student, "evaluate.random_start"
        if student.design is None or student.initialize.method == "random" or student.adapter is not None:
            yield (
                f"{key}: expected a design, without an adapter, that starts from the weights of a larger model "
                "(student.initialize), got another student. Leave it out."
            )
        if self.rollout is not None:
            yield f"{key}: expected no rollout with it, got one. Leave it out: random weights write nothing of use."

    def _rollout_mistakes(self) -> Iterator[str]:
        """Find terms without the samples that they need, and teachers that cannot score or guide them."""
        if self.rollout is None:
            add = "Add rollout: {on_policy_fraction: 0.5}."
            for place, term in enumerate(self.objective):
                if term.needs_samples:
                    yield f"objective.{place}: expected a rollout for a term on on-policy samples, got none. {add}"
            return
        if self.teacher.live is None:
            yield (
                "teacher: expected a teacher that can score samples, got a cache alone, which holds the data. Name "
                "teacher.model beside it: batches of data are still read from the cache."
            )
        resampled = self.rollout.server is not None and not self.rollout.plain
        for place, term in enumerate(self.objective):
            if resampled and term.needs_sampler:
                yield (
                    f"objective.{place}: expected sampling_temperature 1, top_p 1 and top_k 0 in the rollout, or "
                    "importance: false, got neither. A server does not return the sampler's log-probabilities."
                )
        if self.rollout.guided and not self.teacher.guides:
            yield (
                "rollout: expected a teacher that is a local model for teacher_mix and teacher_top_k, got none. Name "
                "it with teacher.model, without shard."
            )


def _with_rows_of_step(train: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a training with the rows of an optimiser step in place of the batches that they come in."""
    values = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, **train}  # transformers' defaults
    rows = values.pop("per_device_train_batch_size") * values.pop("gradient_accumulation_steps")
    values.pop("per_device_eval_batch_size", None)
    return {**values, "rows": rows}
