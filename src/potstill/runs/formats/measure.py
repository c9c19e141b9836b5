"""What a program computes from a file, beside the student and the teacher in transformers."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
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
from potstill.evaluate.exported import ExportedFile, Exports
from potstill.evaluate.quality import Quality, compare
from potstill.models.heads import token_rows
from potstill.runs.formats.loaded import CHUNK, LoadedFile

PROMPT, NEW_TOKENS = 128, 32  # tokens that are timed


class FileModule(nn.Module):
    """A file as a model of transformers: it gives the logits of rows that are padded on the right."""

    def __init__(self, loaded: LoadedFile) -> None:
        super().__init__()
        self.loaded = loaded
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)  # says on which device the model is

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> SimpleNamespace:
        lengths = [input_ids.shape[1]] * len(input_ids) if attention_mask is None else attention_mask.sum(1).tolist()
        logits = torch.zeros(*input_ids.shape, self.loaded.num_tokens)
        for row, length, into in zip(input_ids.tolist(), lengths, logits, strict=True):
            for start, chunk in enumerate(self.loaded.logits(row[:length])):
                into[start * CHUNK :][: len(chunk)] = torch.from_numpy(chunk)
        return SimpleNamespace(logits=logits)


@dataclass(frozen=True)
class Bench:
    """What files are measured on, and beside: held-out rows, the student in transformers and its teacher."""

    tokenizer: PreTrainedTokenizerBase
    rows: Dataset | None = None
    student: Any = None
    teacher: Any = None

    def start(self, student_bytes: int | None) -> Exports:
        """Measure the student and the teacher themselves."""
        exports = Exports(student_bytes=student_bytes)
        if self.rows is None:
            return exports
        quality = self._compare({"student": self.student} if self.student is not None else {}, self.teacher)
        if (student := quality.get("student")) is not None:
            exports.student_loss, exports.student_teacher_kl = student.loss, student.kl
        if (teacher := quality.get("teacher")) is not None:
            exports.teacher_loss = teacher.loss
        exports.tokens = next(iter(quality.values())).tokens if quality else 0
        return exports

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return 0 if self.rows is None else max((len(row) for row in self.rows["input_ids"]), default=0)

    def quality(self, file: nn.Module) -> dict[str, Any]:
        """The fields of an ExportedFile that compare it with the student and the teacher."""
        if self.rows is None:
            return {}
        beside_student = self._compare({"file": file}, self.student)["file"]
        names = ("tokens", "loss", "agreement", "kl")
        quality = {name: getattr(beside_student, name) for name in names}
        if self.teacher is not None:
            quality["teacher_kl"] = self._compare({"file": file}, self.teacher)["file"].kl
        return quality

    def _compare(self, models: Mapping[str, nn.Module], reference: Any) -> Mapping[str, Quality]:
        """Measure models row by row: the logits of few rows fit into memory."""
        assert self.rows is not None
        if reference is None and not models:  # files of no known student, and no teacher
            return {}
        heads = [token_rows(model, "causal") for model in (self.student, self.teacher) if model is not None]
        heads += [model.loaded.num_tokens for model in models.values() if isinstance(model, FileModule)]
        vocabulary = min(heads)
        return compare(reference, models, in_batches(self.rows, self.tokenizer, 1), vocabulary=vocabulary)


def measured_rows(rows: Dataset, tokens: int) -> Dataset:
    """Choose rows in random order until they have that many tokens."""
    order = np.random.default_rng(0).permutation(len(rows))
    lengths = np.cumsum([len(rows[int(i)]["input_ids"]) for i in order])
    return rows.select(order[: int(np.searchsorted(lengths, tokens)) + 1])


def measure(loaded: LoadedFile, path: Path, kind: str, bench: Bench) -> ExportedFile:
    """Measure a loaded file; its name is that of its path, its bytes those of the path or of what is in that folder."""
    if bench.longest > loaded.context_length:
        raise UserError(
            f"data: expected rows of at most {loaded.context_length} tokens, the context of {path.name}, got "
            f"{bench.longest}. Lower --max-length."
        )
    quality = bench.quality(FileModule(loaded))
    prompt, generation = _speeds(loaded)
    speeds: dict[str, Any] = {"prompt_tokens_per_second": prompt, "tokens_per_second": generation}
    files = [path] if path.is_file() else [file for file in path.iterdir() if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    return ExportedFile(file=path.name, kind=kind, program=loaded.program, bytes=size, **quality, **speeds)


def _speeds(loaded: LoadedFile) -> tuple[float, float]:
    """Tokens a second of a prompt and of generation."""
    ids = [i % loaded.num_tokens for i in range(min(PROMPT, loaded.context_length // 2))]
    prompt = _seconds(lambda: [None for _ in loaded.logits(ids)])
    new = min(NEW_TOKENS, loaded.context_length // 2)
    together = _seconds(lambda: loaded.generate(ids, new, ends=frozenset()))
    return len(ids) / prompt, new / max(together - prompt, 1e-9)


def _seconds(action: Any) -> float:
    action()  # the first run reads the file
    start = time.perf_counter()
    action()
    return time.perf_counter() - start
