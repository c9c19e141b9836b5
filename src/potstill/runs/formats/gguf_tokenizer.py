"""Tokenizers in GGUF files: the tokens, how text is split, and what begins and ends it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

from potstill.errors import ModelError
from potstill.models.chat import end_token_ids

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_MARKED = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# llama.cpp's names of what splits a text into words before bytes are merged: the expression, whether words that are
# tokens are not merged at all, and the name.
_SPLITS = {
    (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}", True): "llama-bpe",
    (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}", False): "dbrx",
    (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}", False): "qwen2",
    (rf"{_CONTRACTIONS}|{_MARKED}", False): "qwen35",
    (rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_CASED_REST}", True): "tekken",
    (rf"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_CASED_REST}", False): "gpt-4o",
}  # fmt: skip
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE, _NORMAL = 2, 3, 4, 5, 6, 1  # gguf.TokenType


def write_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerBase, rows: int, model: Any) -> None:
    """Write a tokenizer; the model's `rows` of embeddings beyond its tokens become unused ones.

    Raises:
        ModelError: llama.cpp has no tokenizer of this kind.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refusal("a tokenizer with tokenizer.json", type(tokenizer).__name__)
    spec = json.loads(backend.to_str())
    bpe = spec["model"]
    if bpe["type"] != "BPE" or bpe.get("continuing_subword_prefix") or bpe.get("end_of_word_suffix"):
        raise _refusal("a byte-level BPE or a SentencePiece BPE with bytes", bpe["type"])
    vocabulary = tokenizer.get_vocab()
    if max(vocabulary.values()) >= rows:
        raise ModelError(
            f"export: expected embeddings of all {max(vocabulary.values()) + 1:,} tokens, got {rows:,}. Save "
            "the tokenizer that the model was trained with beside it."
        )
    tokens, types = _tokens(spec, vocabulary, rows)
    if _steps(spec["pre_tokenizer"], "ByteLevel"):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_split_name(spec))
        writer.add_token_merges([" ".join(merge) for merge in bpe["merges"]])
    else:
        prefix = _space_prefix(spec)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(prefix)
        writer.add_token_scores(_scores(bpe["merges"], tokens))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    _write_special_tokens(writer, tokenizer, model)


def _refusal(expected: str, got: object) -> ModelError:
    return ModelError(f"export: expected for GGUF {expected}, got {got}. llama.cpp has no such tokenizer.")


def _tokens(spec: dict[str, Any], vocabulary: dict[str, int], rows: int) -> tuple[list[str], list[int]]:
    tokens = [f"[PAD{i}]" for i in range(rows)]
    tokens = [f"{token}*" if token in vocabulary else token for token in tokens]  # llama.cpp wants each once
    types = [_UNUSED] * rows
    for text, i in vocabulary.items():
        tokens[i], types[i] = text, _NORMAL
        if spec["model"].get("byte_fallback") and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            types[i] = _BYTE
    for added in spec["added_tokens"]:
        special = added["content"] == spec["model"].get("unk_token")
        types[added["id"]] = _UNKNOWN if special else _CONTROL if added["special"] else _USER_DEFINED
        tokens[added["id"]] = added["content"]
    return tokens, types


def _scores(merges: list[list[str]], tokens: list[str]) -> list[float]:
    """The scores by which SentencePiece merges in the order of `merges`; single symbols need none."""
    first: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        first.setdefault(left + right, rank)
    return [-float(first.get(token, len(merges))) for token in tokens]


def _steps(part: Any, kind: str) -> list[dict[str, Any]]:
    """The parts of one type in a normalizer or a pre-tokenizer, which may be a sequence of them."""
    return [step for step in _walk(part) if step["type"] == kind]


def _walk(part: Any) -> Iterator[dict[str, Any]]:
    if part is None:
        return
    inner = part.get("pretokenizers") or part.get("normalizers")
    if part["type"] != "Sequence":
        yield part
    for step in inner or ():
        yield from _walk(step)


def _split_name(spec: dict[str, Any]) -> str:
    """llama.cpp's name of what splits text into words, from the rules: any vocabulary may be cut."""
    steps = [*_walk(spec["pre_tokenizer"])]
    byte_level = steps[-1]
    kinds = [step["type"] for step in steps]
    if byte_level["type"] == "ByteLevel" and not byte_level["add_prefix_space"]:
        if byte_level["use_regex"] and kinds == ["ByteLevel"]:
            return "gpt-2"
        if byte_level["use_regex"] and kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
            return "smollm"
        if not byte_level["use_regex"] and kinds == ["Split", "ByteLevel"] and steps[0]["behavior"] == "Isolated":
            split = (steps[0]["pattern"].get("Regex"), bool(spec["model"].get("ignore_merges")))
            if split in _SPLITS:
                return _SPLITS[split]
    raise _refusal(
        f"a split of words as {', '.join(['gpt-2', 'smollm', *_SPLITS.values()])} have", json.dumps(steps)[:200]
    )


def _space_prefix(spec: dict[str, Any]) -> bool:
    """Whether a SentencePiece tokenizer puts a space before a text."""
    replaced = [s for s in _steps(spec["normalizer"], "Replace") if s["content"] == "▁"]
    metaspace = _steps(spec["pre_tokenizer"], "Metaspace")
    if not (spec["model"].get("byte_fallback") and (replaced or metaspace)):
        raise _refusal("a byte-level BPE or a SentencePiece BPE with bytes", "a BPE of characters")
    prepended = _steps(spec["normalizer"], "Prepend")
    return bool(prepended) or any(step["prepend_scheme"] != "never" for step in metaspace)


def _write_special_tokens(writer: Any, tokenizer: PreTrainedTokenizerBase, model: Any) -> None:
    eos = tokenizer.eos_token_id
    ends = [i for i in sorted(end_token_ids(tokenizer, model)) if i != eos]
    ids = {"bos": tokenizer.bos_token_id, "unk": tokenizer.unk_token_id, "pad": tokenizer.pad_token_id}
    ends = ends if eos is None else [eos, *ends]
    # Without one, llama.cpp ends texts at token 11, or 2. The student does not write these, and ends at none.
    ends = ends or [i for i in (ids["pad"], ids["unk"], ids["bos"]) if i is not None][:1]
    ids |= dict(zip(("eos", "eot", "eom"), ends, strict=False))
    for name, i in ids.items():
        if i is not None:
            getattr(writer, f"add_{name}_token_id")(i)
    text = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(bool(text) and text[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(bool(text) and text[-1] == eos)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        writer.add_chat_template([{"name": name, "template": text} for name, text in template.items()])
    elif template:
        writer.add_chat_template(template)
