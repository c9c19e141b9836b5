"""Formulas between models with different tokenizers, as loops in float64, and tokenizers of several kinds."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from conftest import TEXT
from reference import forward_kl, softmax

UNICODE = [
    "naïve café — „Straße“ 12,5 €",
    "日本語のテキスト と 絵文字 🎉👩‍👩‍👧",
    "Привет, мир!\r\n",
    "  zwei   Räume\t\n\n",
]


def alm(log_p: float, log_q: float, temperature: float) -> float:
    """Minixhofer et al. 2025, arXiv 2503.20083: the binary forward KL at a temperature, times the temperature."""
    p, q = math.exp(log_p / temperature), math.exp(log_q / temperature)
    return temperature * forward_kl([p, 1 - p], [q, 1 - q])


def uld(student: list[float], teacher: list[float]) -> float:
    """Boizard et al. 2024, arXiv 2402.12030: sorted probabilities, the shorter list filled up with zeros."""
    q, p = sorted(softmax(student), reverse=True), sorted(softmax(teacher), reverse=True)
    size = max(len(q), len(p))
    return sum(abs(a - b) for a, b in zip(q + [0] * (size - len(q)), p + [0] * (size - len(p)), strict=True))


def byte_level(size: int, texts: Sequence[str] = (*TEXT, *UNICODE)) -> PreTrainedTokenizerFast:
    """Byte-level BPE; with 258 tokens no token is longer than a byte."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<end>", "<pad>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")


def llama_like(size: int = 700) -> PreTrainedTokenizerFast:
    """BPE with a mark for the space, put before every text, and tokens for single bytes, as Llama 2 has it."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>"]
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[*special, *fallback], show_progress=False)
    tokenizer.train_from_iterator(["".join(TEXT[:20]), "zwei Räume"], trainer)
    state = _without_added(tokenizer, keep=special)
    state.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    state.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=state, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


def unigram(size: int = 500) -> PreTrainedTokenizerFast:
    """Unigram with Metaspace and tokens for single bytes, as SentencePiece trains it for T5's kin."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    special = ["<unk>", "</s>", "<pad>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=size, special_tokens=[*special, *fallback], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    state = _without_added(tokenizer, keep=special)
    state.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always"), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=state, eos_token="</s>", unk_token="<unk>", pad_token="<pad>")


def _without_added(tokenizer: Tokenizer, keep: Sequence[str]) -> Tokenizer:
    """The same model, in which tokens for bytes are no longer matched in the text itself."""
    import json

    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in keep]
    if state["model"]["type"] == "Unigram":
        state["model"]["byte_fallback"] = True
    return Tokenizer.from_str(json.dumps(state))


def word_piece() -> PreTrainedTokenizerFast:
    """WordPiece, which forgets spaces."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(TEXT, trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]"]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def lower_case() -> PreTrainedTokenizerFast:
    """Byte-level BPE that makes letters small."""
    made = byte_level(300)
    made.backend_tokenizer.normalizer = normalizers.Lowercase()
    return made


def normalizing() -> PreTrainedTokenizerFast:
    """Byte-level BPE that composes accents, as Qwen's does."""
    made = byte_level(300)
    made.backend_tokenizer.normalizer = normalizers.NFC()
    return made
