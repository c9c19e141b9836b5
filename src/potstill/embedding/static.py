"""Static students: a vector for each token, which starts as what the teacher makes of the token alone."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from tokenizers import AddedToken, Tokenizer
from torch import Tensor

from potstill.embedding.encoders import TextStudent
from potstill.embedding.vectors import BLOCK_ROWS
from potstill.errors import DataError, one_line
from potstill.losses.token_losses import on_float64_device
from potstill.models.locate import require_package
from potstill.models.spacing import evenly_spaced

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

OnProgress = Callable[[int, int], None]  # (done, total)

BATCH_TOKENS = 512
_BLOCK = 2**16  # tokens of texts whose vectors are in memory at a time
# Chosen on dev data, as docs/benchmarks.md says: STS-B, BoolQ and Wikipedia titles, all-MiniLM-L6-v2.
SIF = 1e-3  # smooth inverse frequency: a token of this frequency counts half (Arora et al. 2017, section 3)
COMMON_DIRECTIONS = 4  # strongest directions that are removed from all tokens (Mu and Viswanath 2018)
_UNUSED = re.compile(r"[\[<]\|?/?(unused|extra_id_|reserved)[\w ]*\|?[\]>]", re.IGNORECASE)
# Thai, Lao, Burmese, Khmer, Japanese and Chinese, which put no spaces between words.
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
_MARKERS = ("##", "▁", "Ġ", "</w>")  # which say that a token continues a word, starts or ends one


def no_progress(done: int, total: int) -> None:
    """Ignore the progress."""


class TokenTable(NamedTuple):
    """What a teacher makes of the tokens of a tokenizer, except for special and unused ones."""

    tokenizer: Any
    size: int  # V, of the whole vocabulary
    ids: Tensor  # [N]
    vectors: Tensor  # [N, H], the teacher's
    weights: Tensor  # [N], smaller for frequent tokens

    def table(self, rows: Tensor) -> Tensor:
        """Put rows of the tokens, [N, d], into a table of the whole vocabulary, [V, d]; the others are 0."""
        table = rows.new_zeros(self.size, rows.shape[1])
        table[self.ids] = rows
        return table

    def sample(self, limit: int) -> TokenTable:
        """Take at most `limit` evenly spaced tokens."""
        chosen = evenly_spaced(limit, len(self.ids))
        return self._replace(ids=self.ids[chosen], vectors=self.vectors[chosen], weights=self.weights[chosen])


def token_table(
    model: SentenceTransformer, tokenizer: Any, limit: int | None = None, on_progress: OnProgress = no_progress
) -> TokenTable:
    """Compute a teacher's vectors of the tokens of a tokenizer: of all, or of `limit` evenly spaced ones."""
    names, ids = token_names(tokenizer), text_tokens(tokenizer)
    weights = token_weights(names, ids)
    if limit is not None:
        chosen = evenly_spaced(limit, len(ids))
        ids, weights = ids[chosen], weights[chosen]
    return TokenTable(tokenizer, len(names), ids, token_vectors(model, tokenizer, ids.tolist(), on_progress), weights)


def token_names(tokenizer: Any) -> list[str]:
    """The names of a tokenizer's tokens by id; "" for an id without one."""
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    names = [""] * (max(vocabulary.values()) + 1)
    for name, id in vocabulary.items():
        names[id] = name
    return names


def read_words(path: str) -> list[str]:
    """Read the words of a text file, one on a line, without blank lines and repeated words."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"student.static.words: expected a text file, got {path}: {one_line(error, 200)}") from None
    words = [*dict.fromkeys(filter(None, map(str.strip, lines)))]
    if not words:
        raise DataError(f"student.static.words: expected a word on each line of {path}, got none. Add some.")
    return words


def add_words(tokenizer: Any, words: Sequence[str]) -> Any:
    """Copy a tokenizer, and add words as whole tokens, except for those that are tokens already."""
    tokenizer, known = copy.deepcopy(tokenizer), tokenizer.get_vocab()
    added = [AddedToken(word, single_word=not _UNSPACED.search(word), normalized=True) for word in words]
    tokenizer.add_tokens([token for token in added if token.content not in known])
    return tokenizer


def text_tokens(tokenizer: Any) -> Tensor:
    """The ids of the tokens that texts are made of: no special and no unused ones. Sorted."""
    special = {*tokenizer.all_special_ids}
    names = enumerate(token_names(tokenizer))
    return torch.tensor([id for id, name in names if name and id not in special and not _UNUSED.fullmatch(name)])


def vocabulary_words(tokenizer: Any, limit: int) -> list[str]:
    """At most `limit` evenly spaced tokens that are whole words, as texts."""
    texts = dict.fromkeys(tokenizer.decode([id]).strip() for id in text_tokens(tokenizer).tolist())
    words = [text for text in texts if text.isalpha()]
    return [words[row] for row in evenly_spaced(limit, len(words))]


def token_weights(names: Sequence[str], ids: Tensor) -> Tensor:
    """Compute weights of tokens by smooth inverse frequency, of frequencies that follow Zipf's law.

    Vocabularies are in the order of frequency, except that letters and punctuation come first in some. So the rank of a
    token is the number of longer tokens before it, and single characters count as the most frequent.
    """
    longer = torch.tensor([not _is_single(names[id]) for id in ids.tolist()])
    ranks = longer.cumsum(0) - longer.long()
    frequencies = 1 / (ranks + 2) / (1 / torch.arange(2, len(ids) + 2)).sum()
    return SIF / (SIF + frequencies)


def _is_single(name: str) -> bool:
    for marker in _MARKERS:
        name = name.replace(marker, "")
    return len(name) <= 1


@torch.no_grad()
def token_vectors(
    model: SentenceTransformer,
    tokenizer: Any,
    ids: Sequence[int],
    on_progress: OnProgress,
) -> Tensor:
    """Compute the teacher's vectors of single tokens, [len(ids), H]: each as a text, by its own pooling.

    A mean leaves out the closing special tokens, which say little about a text of one token. Tokens that the teacher's
    own tokenizer lacks are read as text.
    """
    own: Any = model.tokenizer
    opening, closing = _special_tokens(own)
    own_names, names = token_names(own), token_names(tokenizer)
    others_ids = [id for id in ids if id >= len(own_names) or own_names[id] != names[id]]
    texts = [tokenizer.decode([id]).strip() or tokenizer.decode([id]) for id in others_ids]
    read = own(texts, add_special_tokens=False)["input_ids"] if texts else []
    as_text = dict(zip(others_ids, read, strict=True))
    pieces = [as_text.get(id, [id]) for id in ids]
    first, *others = model
    pools_mean = any(getattr(module, "pooling_mode", None) == "mean" for module in others)
    order = sorted(range(len(pieces)), key=lambda i: len(pieces[i]))
    vectors: list[Tensor] = []
    model.eval()
    for start in range(0, len(order), BATCH_TOKENS):
        rows = [[*opening, *pieces[i], *closing] for i in order[start : start + BATCH_TOKENS]]
        features = own.pad({"input_ids": rows}, padding_side="right", return_tensors="pt").to(model.device)
        features = first({"input_ids": features["input_ids"], "attention_mask": features["attention_mask"]})
        if pools_mean and closing:
            lengths = features["attention_mask"].sum(1, keepdim=True) - len(closing)
            positions = torch.arange(features["attention_mask"].shape[1], device=lengths.device)
            features["attention_mask"] = (positions < lengths).long()
        for module in others:
            features = module(features)
        vectors.append(features["sentence_embedding"].float().cpu())
        on_progress(min(start + BATCH_TOKENS, len(order)), len(order))
    return torch.cat(vectors)[torch.tensor(order).argsort()]


def _special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What a tokenizer puts before and after a text."""
    bare: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole: list[int] = tokenizer("a")["input_ids"]
    start = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    return whole[:start], whole[start + len(bare) :]


def spread_tokens(tokens: TokenTable) -> Tensor:
    """Centre the vectors of tokens, remove their common directions, and multiply them by their weights: [N, H].

    All statistics count a token by its weight, so that the many rare tokens do not decide alone.
    """
    weights = on_float64_device(tokens.weights).double()[:, None]
    x = on_float64_device(tokens.vectors).double()
    x = (x - (x * weights).sum(0) / weights.sum()) * weights
    _, directions = torch.linalg.eigh(x.T @ x)  # by rising variance
    common = directions[:, -COMMON_DIRECTIONS:]
    return x - x @ common @ common.T


def reduce_rows(rows: Tensor, dimensions: int) -> Tensor:
    """Reduce vectors of tokens, [N, H], to [N, d], by a PCA that does not centre them."""
    x = on_float64_device(rows).double()
    _, directions = torch.linalg.eigh(x.T @ x)
    return (x @ directions.flip(1)[:, :dimensions]).float()


def mean_of_texts(tokenizer: Any, texts: Sequence[str], blocks: Iterable[Tensor], dimensions: int) -> Tensor:
    """Make vectors of tokens, [V, d]: the mean of texts' vectors over those with a token, smaller if frequent.

    `blocks` has the vectors of all texts in order, [m, d] at a time. A token that no text has is 0.
    """
    whole, size, first = text_tokenizer(tokenizer), len(token_names(tokenizer)), 0
    sums, counts = torch.zeros(size, dimensions), torch.zeros(size, dtype=torch.long)
    for block in blocks:
        ids, lengths = token_ids(whole, texts[first : first + len(block)])
        rows, first = torch.arange(len(block)).repeat_interleave(lengths), first + len(block)
        for part, of_rows in zip(ids.split(_BLOCK), rows.split(_BLOCK), strict=True):
            sums.index_add_(0, part, block[of_rows])
        counts += torch.bincount(ids, minlength=size)
    frequencies = counts / counts.sum().clamp_min(1)
    return sums * (SIF / (SIF + frequencies) / counts.clamp_min(1))[:, None]


def count_tokens(tokenizer: Any, texts: Sequence[str]) -> Counter[int]:
    """Count the ids of the tokens of texts."""
    whole, counts = text_tokenizer(tokenizer), Counter[int]()
    for start in range(0, len(texts), BLOCK_ROWS):
        counts.update(token_ids(whole, texts[start : start + BLOCK_ROWS])[0].tolist())
    return counts


def token_ids(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Split few texts into tokens: the ids of all texts, one after the other, and the number of each text."""
    encoded = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    ids = torch.tensor([id for text in encoded for id in text.ids], dtype=torch.long)
    return ids, torch.tensor([len(text.ids) for text in encoded])


def text_tokenizer(tokenizer: Any) -> Tokenizer:
    """Copy a tokenizer for whole texts: a mean of token vectors has no maximum length."""
    whole = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    whole.no_truncation()
    whole.no_padding()
    return whole


def static_student(tokenizer: Any, vectors: Tensor) -> TextStudent:
    """Make the fastest student: a vector for each token, [V, d], whose mean is the vector of a text."""
    require_package("sentence_transformers", "embeddings", "student.static")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    static = StaticEmbedding(text_tokenizer(tokenizer), embedding_weights=vectors.clone())
    return TextStudent(SentenceTransformer(modules=[static], device="cpu"))
