"""Sentence-transformers models as functions of padded rows of tokens, as graphs are made of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from potstill.embedding.encoders import TextStudent
from potstill.errors import ModelError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

PROBES = (
    "",
    "a text",
    "Another text, which is longer.\n\N{GRINNING FACE}",
)
_BATCH = 32  # texts that are padded to one length


class SentenceModel(nn.Module):
    """A sentence-transformers model in float32, which reads rows of tokens, `tokenizer`'s, or texts, as it does itself.

    Raises:
        ModelError: its vectors do not follow from the tokens of a text alone.
    """

    def __init__(self, model: SentenceTransformer) -> None:
        from sentence_transformers.sentence_transformer.modules import StaticEmbedding, Transformer

        super().__init__()
        self.text_model = TextStudent(model.cpu().float().eval())
        first, *others = model
        self.first = cast(Any, first)
        self.others = nn.ModuleList(others)
        self.is_static = isinstance(self.first, StaticEmbedding)
        if not self.is_static and (not isinstance(self.first, Transformer) or not self.first.tokenizer):
            raise _refused(f"one that begins with {type(self.first).__name__}")
        if any(getattr(module, "include_prompt", True) is False for module in self.others):
            raise _refused("one whose pooling leaves out the tokens of a prompt")
        self.config = cast(Any, PretrainedConfig()) if self.is_static else self.first.auto_model.config
        if self.is_static:
            self.config.model_type = "a static model"  # for errors
        self.tokenizer = static_tokenizer(self.first.tokenizer) if self.is_static else self.first.tokenizer
        # Of "", for example; a sum over the tokens of a static model is one over none too.
        self.may_read_no_tokens = not self.is_static and self.tokenizer.num_special_tokens_to_add() == 0
        prompt = model.prompts.get(model.default_prompt_name or "")
        self.notes = [f"put {prompt!r} before texts, as sentence-transformers does"] if prompt else []
        self.reads_no_tokens = not self.may_read_no_tokens or self._ignores_padding()
        if not self.reads_no_tokens:
            self.notes.append("leave out texts without a token: their vectors would be those of padding")

    @torch.no_grad()
    def _ignores_padding(self) -> bool:
        """Whether a row without a token has a vector that its padding does not change: one of "cls" has not."""
        first, second = (self(ids, torch.zeros_like(ids)).sentence_embedding for ids in torch.arange(4).view(2, 1, 2))
        return bool(first.isfinite().all()) and torch.allclose(first, second, atol=1e-4)

    def get_input_embeddings(self) -> Any:
        return self.first.embedding if self.is_static else self.first.auto_model.get_input_embeddings()

    def num_parameters(self) -> int:
        return sum(weight.numel() for weight in self.parameters())

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **types: Tensor) -> SimpleNamespace:
        if self.is_static:
            mask = attention_mask.unsqueeze(-1).float()
            rows = nn.functional.embedding(input_ids, self.first.embedding.weight) * mask
            features = {"sentence_embedding": rows.sum(1) / mask.sum(1).clamp_min(1)}
        else:
            features = self.first({"input_ids": input_ids, "attention_mask": attention_mask, **types})
        for module in self.others:
            features = module(features)
        return SimpleNamespace(sentence_embedding=features["sentence_embedding"])

    def probes(self) -> list[str]:
        """The texts that every graph in float32 is checked on: those that have a vector."""
        return [text for text in PROBES if self.reads_no_tokens or self.tokenizer(text)["input_ids"]]

    @torch.no_grad()
    def compare(self, graph: Any, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Compute the vectors of texts, [N, d], by a graph with its tokenizer, and by sentence-transformers."""
        vectors, expected = list[Tensor](), list[Tensor]()
        for start in range(0, len(texts), _BATCH):
            batch = texts[start : start + _BATCH]
            rows = tokenizer(batch, padding=True, truncation=True, return_tensors="pt")
            vectors.append(graph(**{name: tensor.long() for name, tensor in rows.items()}).sentence_embedding)
            expected.append(self.text_model(batch))
        return torch.cat(vectors), torch.cat(expected)


def static_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Make a tokenizer of transformers that puts nothing before and after a text, as a static student reads it."""
    bare = Tokenizer.from_str(tokenizer.to_str())
    bare.post_processor = None
    special = [token for _, token in sorted(bare.get_added_tokens_decoder().items()) if token.special]
    if not special:
        raise _refused("one whose tokenizer has no special token to pad with")
    pad = next((token for token in special if "pad" in token.content.lower()), special[0])
    limit = (bare.truncation or {}).get("max_length")
    return PreTrainedTokenizerFast(tokenizer_object=bare, pad_token=pad, model_max_length=limit)


def _refused(got: str) -> ModelError:
    return ModelError(
        f"export: expected a sentence-transformers model of a transformer or of token vectors, got {got}."
    )
