"""Toy encoders, their tokenizer and their data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    BertTokenizerFast,
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertForSequenceClassification,
    DistilBertModel,
    ModernBertConfig,
    ModernBertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    RobertaModel,
    set_seed,
)

WORDS = [
    *("the", "a", "red", "green", "small", "large", "cat", "dog", "bird", "tree", "sings"),
    *("runs", "sleeps", "sits", "on", "under", "near", "and", "good", "bad", "fine"),
]
CLASSES = {"calm": 0, "lively": 1, "odd": 2}
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY = len(SPECIAL) + len(WORDS)


def make_bert_tokenizer() -> BertTokenizerFast:
    """A word is a token."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = ("pad", "unk", "cls", "sep", "mask")
    tokens = {f"{name}_token": token for name, token in zip(names, SPECIAL, strict=True)}
    return BertTokenizerFast(tokenizer_object=tokenizer, **tokens)


def sentences(count: int, seed: int = 0) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 12, (count,), generator=generator).tolist()
    return [" ".join(WORDS[int(i)] for i in torch.randint(len(WORDS), (n,), generator=generator)) for n in lengths]


SIZES: dict[str, dict[str, Any]] = {
    "bert": {
        "hidden_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 40,
        "initializer_range": 0.2,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
    "distilbert": {
        "dim": 16,
        "n_layers": 4,
        "n_heads": 2,
        "hidden_dim": 24,
        "max_position_embeddings": 40,
        "initializer_range": 0.2,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "seq_classif_dropout": 0.0,
    },
}
SIZES["roberta"] = SIZES["bert"] | {"type_vocab_size": 1, "pad_token_id": 0}
SIZES["modernbert"] = {
    **{name: SIZES["bert"][name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")},
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    **dict.fromkeys(("bos_token_id", "cls_token_id"), 2),
    **dict.fromkeys(("eos_token_id", "sep_token_id"), 3),
    "initializer_range": 0.2,
}
CLASSES_OF: dict[str, tuple[Any, dict[str, Any]]] = {
    "bert": (
        BertConfig,
        {"masked": BertForMaskedLM, "classification": BertForSequenceClassification, "encoder": BertModel},
    ),
    "distilbert": (
        DistilBertConfig,
        {
            "masked": DistilBertForMaskedLM,
            "classification": DistilBertForSequenceClassification,
            "encoder": DistilBertModel,
        },
    ),
    "roberta": (
        RobertaConfig,
        {"masked": RobertaForMaskedLM, "classification": RobertaForSequenceClassification, "encoder": RobertaModel},
    ),
    "modernbert": (ModernBertConfig, {"masked": ModernBertForMaskedLM}),
}


def make_encoder(kind: str, task: str, seed: int = 0, **changes: Any) -> Any:
    """A toy of a family for a task; classifiers have three classes with names, or one number."""
    set_seed(seed)
    config, classes = CLASSES_OF[kind]
    heads: dict[str, Any] = {}
    if task == "classification":
        heads = {"label2id": CLASSES, "id2label": {i: name for name, i in CLASSES.items()}}
    if task == "regression":
        heads = {"num_labels": 1, "problem_type": "regression"}
    made = config(**{"vocab_size": VOCABULARY, **SIZES[kind], **heads, **changes})
    return classes["classification" if task == "regression" else task](made)


def write_rows(path: Path, count: int, seed: int) -> Path:
    """Texts, pairs, classes by name and numbers."""
    names = list(CLASSES)
    rows = []
    for i, (text, other) in enumerate(zip(sentences(count, seed), sentences(count, seed + 100), strict=True)):
        label = names[("runs" in text) + ("sings" in text)] if i % 2 else ("runs" in text) + ("sings" in text)
        rows.append({"text": text, "text_pair": other, "label": label, "score": len(text) / 10})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def save(model: Any, folder: Path) -> str:
    model.save_pretrained(folder)
    make_bert_tokenizer().save_pretrained(folder)
    return str(folder)
