"""What a program computes from a file, beside the student and the teacher in transformers."""

from __future__ import annotations

import tempfile
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from potstill.data.batches import in_batches
from potstill.errors import UserError
from potstill.evaluate.exported import ExportedFile, Exports, ExportTask
from potstill.evaluate.quality import Quality
from potstill.evaluate.sequence import AnyQuality, EncoderQuality, RegressionQuality
from potstill.evaluate.sequence import measure as measure_quality
from potstill.evaluate.speed import extra_bytes
from potstill.files import explain_disk_full
from potstill.losses.alignment import TOKEN_TASKS
from potstill.models.checksums import digest
from potstill.models.heads import token_rows
from potstill.runs.formats.loaded import CHUNK, LoadedFile

PROMPT, NEW_TOKENS = 128, 32  # tokens that are timed
PROBED = 24  # tokens on which a file and its model are compared
# Texts that tokenizers split in different ways.
TEXTS = (
    *("Hello world", "I'm here; you'LL see, don't you?", "def f(x):\n    return x != 3.14\n", "  two  spaces\n\n\ttab"),
    *(
        "12345 and 1,000,000",
        "naïve ÉCOLE straße İstanbul",
        "你好，世界。こんにちは 한국어 ไทย हिन्दी",
        "Привет العربية עברית",
    ),
    *("😀 👩‍💻 🇫🇷 ❤️", "e\u0301 is \u00e9", "\u200b\u00a0\u3000", "a\x00b\x07c\r\n\x7f"),
)


class FileModule(nn.Module):
    """A file as a model of transformers."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)  # says on which device the model is


class CausalFile(FileModule):
    """A language model in a file: it gives the logits of rows that are padded on the right."""

    def __init__(self, loaded: LoadedFile) -> None:
        super().__init__(loaded.num_tokens)
        self.loaded = loaded

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> SimpleNamespace:
        lengths = [input_ids.shape[1]] * len(input_ids) if attention_mask is None else attention_mask.sum(1).tolist()
        logits = torch.zeros(*input_ids.shape, self.loaded.num_tokens)
        for row, length, into in zip(input_ids.tolist(), lengths, logits, strict=True):
            for start, chunk in enumerate(self.loaded.logits(row[:length])):
                into[start * CHUNK :][: len(chunk)] = torch.from_numpy(chunk)
        return SimpleNamespace(logits=logits)


class RecordedModel(nn.Module):
    """A model that runs once on each batch; its output is read from a temporary file after that."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, getattr(model, "config", None)
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  # it lives as long as this
        self._places = dict[Any, tuple[str, int, tuple[int, ...]]]()
        weakref.finalize(self, self._file.close)

    def forward(self, **batch: Any) -> SimpleNamespace:
        tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
        key = tuple((name, value.shape, value.numpy().tobytes()) for name, value in tensors.items())
        if key not in self._places:
            output = self.model(**batch)
            name = "logits" if getattr(output, "logits", None) is not None else "last_hidden_state"
            values = np.ascontiguousarray(getattr(output, name).float().numpy())
            with explain_disk_full(Path(tempfile.gettempdir()), values.nbytes):
                self._places[key] = (name, self._file.seek(0, 2), values.shape)
                self._file.write(values.data)
                self._file.flush()
        name, offset, shape = self._places[key]
        return SimpleNamespace(**{name: torch.from_numpy(np.memmap(self._file, np.float32, "c", offset, shape))})


@dataclass(frozen=True)
class Bench:
    """What files are measured on, and beside: held-out rows, the student in transformers and its teacher."""

    tokenizer: PreTrainedTokenizerBase
    rows: Dataset | None = None
    student: Any = None
    teacher: Any = None
    task: ExportTask = "causal"

    def start(self, student_bytes: int | None) -> Exports:
        """Measure the student and the teacher themselves."""
        exports = Exports(task=self.task, student_bytes=student_bytes)
        if self.rows is None:
            return exports
        figures = self._compare({} if self.student is None else {"student": self._student}, self._teacher)
        student, teacher = figures.get("student", {}), figures.get("teacher", {})
        exports.student_loss, exports.student_teacher_kl = student.get("loss"), student.get("kl")
        exports.teacher_loss = teacher.get("loss")
        exports.tokens = (student or teacher).get("tokens", 0)
        return exports

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return 0 if self.rows is None else max((len(row) for row in self.rows["input_ids"]), default=0)

    def figures(self, file: FileModule) -> dict[str, Any]:
        """The fields of an ExportedFile that compare it with the student and the teacher."""
        if self.rows is None:
            return {}
        recorded = {"file": RecordedModel(file)}
        figures = self._compare(recorded, self._student, file.num_tokens).get("file", {})
        if self.teacher is not None:
            beside_teacher = self._compare(recorded, self._teacher, file.num_tokens)["file"]
            figures = {"tokens": beside_teacher["tokens"], **figures, "teacher_kl": beside_teacher["kl"]}
        return figures

    @cached_property
    def _student(self) -> RecordedModel | None:
        return None if self.student is None else RecordedModel(self.student)

    @cached_property
    def _teacher(self) -> RecordedModel | None:
        return None if self.teacher is None else RecordedModel(self.teacher)

    def _compare(
        self, models: Mapping[str, Any], reference: Any, file_tokens: int | None = None
    ) -> dict[str, dict[str, Any]]:
        """Measure models row by row: the logits of few rows fit into memory."""
        assert self.rows is not None
        if self.task == "embedding" or (reference is None and (not models or self.task == "encoder")):
            # Texts are measured in place of rows, or there is nothing to measure by.
            return {}
        vocabulary = None
        if self.task in TOKEN_TASKS:
            heads = [token_rows(model, self.task) for model in (self.student, self.teacher) if model is not None]
            vocabulary = min([*heads, *([] if file_tokens is None else [file_tokens])])
        batches = in_batches(self.rows, self.tokenizer, 1)
        quality = measure_quality(self.task, reference, models, batches, vocabulary=vocabulary)
        return {name: _figures(of_model) for name, of_model in quality.items()}


def _figures(quality: AnyQuality) -> dict[str, Any]:
    """Loss, agreement and distance from the reference of any task, as fields of an ExportedFile."""
    if isinstance(quality, EncoderQuality):
        return {"tokens": quality.rows, "loss": None, "agreement": None, "kl": quality.loss}
    if isinstance(quality, RegressionQuality):
        return {"tokens": quality.rows, "loss": quality.loss, "agreement": None, "kl": quality.to_teacher}
    targets = quality.tokens if isinstance(quality, Quality) else quality.rows
    return {"tokens": targets, "loss": quality.loss, "agreement": quality.agreement, "kl": quality.kl}


def measured_rows(rows: Dataset, tokens: int) -> Dataset:
    """Choose rows in random order until they have that many tokens, and 3 at least: encoders are compared on pairs."""
    order = np.random.default_rng(0).permutation(len(rows))
    lengths = np.cumsum([len(rows[int(i)]["input_ids"]) for i in order])
    return rows.select(order[: max(int(np.searchsorted(lengths, tokens)) + 1, 3)])


def measure_causal(
    load: Callable[[], LoadedFile], path: Path, kind: str, bench: Bench, check: Callable[[Any], list[str]]
) -> ExportedFile:
    """Load and measure a language model; `check` gives the notes on the loaded file, or raises an error."""
    with ExitStack() as stack:
        loaded, speeds = stack.enter_context(load()), (0.0, 0.0)
        notes = check(loaded)
        check_lengths(bench, path, loaded.context_length)
        figures = bench.figures(CausalFile(loaded))
    with ExitStack() as stack:

        def serve() -> None:
            nonlocal speeds
            speeds = _speeds(stack.enter_context(load()))

        peak = extra_bytes(serve, torch.device("cpu"))
    return exported_file(path, kind, loaded.program, figures, speeds, peak, notes)


def random_ids(tokens: int, length: int) -> Tensor:
    """A row of ids that a file and its model are compared on: [1, length]."""
    return torch.randint(tokens, (1, length), generator=torch.Generator().manual_seed(0))


def check_lengths(bench: Bench, path: Path, positions: int) -> None:
    """Check that the longest row fits into a file."""
    if bench.longest > positions:
        raise UserError(
            f"data: expected rows of at most {positions} tokens, the context of {path.name}, got {bench.longest}. "
            "Lower --max-length."
        )


def exported_file(
    path: Path,
    kind: str,
    program: str,
    figures: Mapping[str, Any],
    speeds: tuple[float, float | None],
    peak_bytes: int | None,
    notes: list[str],
) -> ExportedFile:
    """Describe a measured file; its name is that of its path, its bytes those of the path or of what is in it."""
    files = [path] if path.is_file() else [file for file in path.iterdir() if file.is_file()]
    return ExportedFile(
        file=path.name,
        kind=kind,
        program=program,
        bytes=sum(file.stat().st_size for file in files),
        sha256=digest(path),
        **figures,
        prompt_tokens_per_second=speeds[0],
        tokens_per_second=speeds[1],
        peak_bytes=peak_bytes,
        notes=notes,
    )


def _speeds(loaded: LoadedFile) -> tuple[float, float]:
    """Tokens a second of a prompt and of generation."""
    ids = [i % loaded.num_tokens for i in range(min(PROMPT, loaded.context_length // 2))]
    new = min(NEW_TOKENS, loaded.context_length // 2)

    def read() -> np.ndarray:
        *_, logits = loaded.logits(ids)
        return logits

    prompt = seconds(read)
    # The prompt gives the first token; generation alone is timed, as it may be a small part of both.
    passes = seconds(lambda logits: loaded.proceed(logits, len(ids), new, frozenset()), read)
    return len(ids) / prompt, (new - 1) / max(passes, 1e-9)


def seconds(action: Callable[..., Any], prepare: Callable[[], Any] | None = None) -> float:
    """Time an action once it has run before; on one thread by the processor's time, as others may run there too.

    It is given what `prepare` returns, which is not timed.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    def timed() -> float:
        prepared = () if prepare is None else (prepare(),)
        start = clock()
        action(*prepared)
        return clock() - start

    timed()  # the first run reads the file
    return timed()
