"""What llama.cpp computes from a GGUF file, beside the student and the teacher in transformers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from potstill.data.batches import in_batches
from potstill.errors import RunError
from potstill.evaluate.exported import ExportedFile
from potstill.evaluate.quality import Quality, compare
from potstill.runs.formats.llama_cpp import CHUNK, LlamaCpp
from potstill.models.chat import end_token_ids

PROMPT, NEW_TOKENS = 128, 32  # tokens that are timed
# Texts that tokenizers split in different ways.
PROBES = (
    *("Hello world", "I'm here; you'LL see, don't you?", "def f(x):\n    return x != 3.14\n", "  two  spaces\n\n\ttab"),
    *(
        "12345 and 1,000,000",
        "naïve ÉCOLE straße İstanbul",
        "你好，世界。こんにちは 한국어 ไทย हिन्दी",
        "Привет العربية עברית",
    ),
    *("😀 👩‍💻 🇫🇷 ❤️", "e\u0301 is \u00e9", "\u200b\u00a0\u3000", "a\x00b\x07c\r\n\x7f"),
)


class GgufModule(nn.Module):
    """A GGUF file as a model of transformers: it gives the logits of rows that are padded on the right."""

    def __init__(self, loaded: LlamaCpp) -> None:
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


def measured_rows(rows: Dataset, tokens: int) -> Dataset:
    """Choose rows in random order until they have that many tokens."""
    order = np.random.default_rng(0).permutation(len(rows))
    lengths = np.cumsum([len(rows[int(i)]["input_ids"]) for i in order])
    return rows.select(order[: int(np.searchsorted(lengths, tokens)) + 1])


def compare_models(
    models: Mapping[str, nn.Module],
    reference: str | None,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: int | None,
) -> Mapping[str, Quality]:
    """Measure models on rows, beside one of them, row by row: the logits of few rows fit into memory."""
    others = {name: model for name, model in models.items() if name != reference}
    quality = compare(
        None if reference is None else models[reference], others, in_batches(rows, tokenizer, 1), vocabulary=vocabulary
    )
    return {reference if name == "teacher" and reference is not None else name: x for name, x in quality.items()}


def measure_gguf(
    path: Path,
    kind: str,
    student: Any,
    teacher: Any,
    rows: Dataset | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    vocabulary: int | None,
) -> ExportedFile:
    """Load a file in llama.cpp, check its tokens, and measure it.

    Raises:
        RunError: llama.cpp does not load it, or reads plain text as other tokens.
    """
    longest = max((len(row) for row in rows["input_ids"]), default=0) if rows is not None else 0
    with LlamaCpp(path, max(longest, PROMPT + NEW_TOKENS)) as loaded:
        notes = [*_token_notes(loaded, tokenizer), *_end_notes(loaded, tokenizer, student)]
        quality: dict[str, Any] = {}
        if rows is not None:
            file = GgufModule(loaded)
            own = compare_models({"student": student, "file": file}, "student", rows, tokenizer, vocabulary)["file"]
            quality = {"loss": own.loss, "agreement": own.agreement, "kl": own.kl}
            if teacher is not None:
                beside = compare_models({"teacher": teacher, "file": file}, "teacher", rows, tokenizer, vocabulary)
                quality["teacher_kl"] = beside["file"].kl
        prompt, generation = _speeds(loaded)
    speeds = {"prompt_tokens_per_second": prompt, "tokens_per_second": generation}
    size = path.stat().st_size
    return ExportedFile(file=path.name, kind=kind, bytes=size, **quality, **speeds, notes=notes)


def _token_notes(loaded: LlamaCpp, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    special = [str(token) for token in tokenizer.all_special_tokens]
    texts = [*PROBES, *(f"text {token} text" for token in special)]
    differ = [text for text in texts if not _same_tokens(loaded, tokenizer, text)]
    plain = next((text for text in differ if text in PROBES and text.isascii() and text.isprintable()), None)
    if plain is not None:
        own, mine = loaded.tokenize(plain), tokenizer(plain)["input_ids"]
        raise RunError(
            f"export: expected the tokenizer's tokens {mine} for {plain!r} from llama.cpp, got {own}. Use a tokenizer "
            "of a family that GGUF knows."
        )
    if differ:
        share = f"{len(differ)} of {len(texts)} texts that are hard to split"
        yield f"llama.cpp gives other tokens than the tokenizer for {share}, such as {differ[0]!r}."


def _same_tokens(loaded: LlamaCpp, tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    return loaded.tokenize(text) == tokenizer(text, verbose=False)["input_ids"]


def _end_notes(loaded: LlamaCpp, tokenizer: PreTrainedTokenizerBase, student: Any) -> Iterator[str]:
    missing = sorted(end_token_ids(tokenizer, student) - loaded.ends())
    if missing:
        names = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(missing)))
        yield f"llama.cpp does not end a text at {names}: a file has three end tokens. Give it the others as stops."


def _speeds(loaded: LlamaCpp) -> tuple[float, float]:
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
