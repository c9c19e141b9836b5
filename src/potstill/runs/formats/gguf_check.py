"""Measure a GGUF file in llama.cpp, and check that it reads and ends texts as the student does."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from potstill.errors import RunError
from potstill.evaluate.exported import ExportedFile
from potstill.models.chat import end_token_ids
from potstill.runs.formats.gguf_file import kind_notes
from potstill.runs.formats.llama_cpp import LlamaCpp, check_survives, model_file
from potstill.runs.formats.measure import NEW_TOKENS, PROBED, PROMPT, TEXTS, Bench, measure_causal, random_ids

_UNQUANTIZED = ("f32", "f16")
_FARTHEST = 1e-3  # KL of such a file to its student, which llama.cpp's activations in half precision leave far below


def measure_gguf(path: Path, kind: str, bench: Bench) -> ExportedFile:
    """Load a file in llama.cpp, check its tokens, and measure it.

    Raises:
        RunError: llama.cpp does not load it, computes something else than the student in 16 bits or more, or reads
            plain text as other tokens.
    """

    def check(loaded: LlamaCpp) -> list[str]:
        if kind in _UNQUANTIZED and bench.student is not None:
            _check_student(loaded, bench.student)
        token_notes = _token_notes(loaded, bench.tokenizer)
        return [*token_notes, *_end_notes(loaded, bench.tokenizer, bench.student), *kind_notes(model_file(path), kind)]

    check_survives(path)
    return measure_causal(partial(LlamaCpp, path, max(bench.longest, PROMPT + NEW_TOKENS)), path, kind, bench, check)


@torch.no_grad()
def _check_student(loaded: LlamaCpp, student: Any) -> None:
    ids = random_ids(loaded.num_tokens, min(PROBED, loaded.context_length))
    log_probs = torch.from_numpy(np.concatenate([*loaded.logits(ids[0].tolist())])).log_softmax(-1)
    expected = student(input_ids=ids).logits[0].float().log_softmax(-1)
    kl = float((expected.exp() * (expected - log_probs)).sum(-1).mean())
    if not kl <= _FARTHEST:  # NaN too
        raise RunError(
            f"export: expected {student.config.model_type} in llama.cpp within {_FARTHEST} nats of the student, got "
            f"{kl:.3g}: it computes something else than this model. Use onnx, or bf16 where weights are large."
        )


def _token_notes(loaded: LlamaCpp, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    texts = [*TEXTS, *(f"text {token} text{token}text" for token in _hard_tokens(tokenizer))]
    differ = [text for text in texts if not _same_tokens(loaded, tokenizer, text)]
    plain = next((text for text in differ if text in TEXTS and text.isascii() and text.isprintable()), None)
    if plain is not None:
        own, mine = loaded.tokenize(plain), tokenizer(plain)["input_ids"]
        raise RunError(
            f"export: expected the tokenizer's tokens {mine} for {plain!r} from llama.cpp, got {own}. Use a tokenizer "
            "of a family that GGUF knows."
        )
    if differ:
        share = f"{len(differ)} of {len(texts)} texts that are hard to split"
        yield f"llama.cpp gives other tokens than the tokenizer for {share}, such as {differ[0]!r}."


def _hard_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The special tokens, and the added ones that are found by what is beside them, or take it along."""
    added = tokenizer.added_tokens_decoder.values()
    taking = [token.content for token in added if token.lstrip or token.rstrip or token.single_word]
    return [*dict.fromkeys([*map(str, tokenizer.all_special_tokens), *taking])]


def _same_tokens(loaded: LlamaCpp, tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    return loaded.tokenize(text) == tokenizer(text, verbose=False)["input_ids"]


def _end_notes(loaded: LlamaCpp, tokenizer: PreTrainedTokenizerBase, student: Any) -> Iterator[str]:
    ends, own = loaded.ends(), end_token_ids(tokenizer, student)
    if missing := sorted(own - ends):
        names = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(missing)))
        yield f"llama.cpp does not end a text at {names}: a file has three end tokens. Give it the others as stops."
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    if plain := sorted(ends - own - special):
        names = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(plain)))
        advice = "It takes that for an end by its name." if own else "Give the student an end token."
        yield f"llama.cpp ends a text at {names}, which does not end the student's. {advice}"
