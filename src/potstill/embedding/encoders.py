"""Students that read text: plain sentence-transformers models, made from a tokenizer or from a model's layers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from potstill.errors import ModelError, UserError, one_line

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

RARE = 1e-3  # tokens more frequent than this count less at the start (Arora et al. 2017, section 3)
_TEXTS = 256


def require_sentence_transformers(what: str) -> None:
    """Raise the pip command where the package is missing."""
    try:
        import sentence_transformers  # noqa: F401
    except ImportError:
        raise UserError(
            f"{what}: expected the package sentence-transformers, got none. Install it with "
            "pip install 'potstill[embeddings]'."
        ) from None


def load_embedder(where: str, key: str) -> SentenceTransformer:
    """A sentence-transformers model: safetensors only, no remote code.

    Raises:
        UserError: the package is missing.
        ModelError: there is no such model.
    """
    require_sentence_transformers(key)
    from sentence_transformers import SentenceTransformer

    if where.startswith((".", "/", "~")) and not Path(where).expanduser().is_dir():
        raise ModelError(f"{key}: expected a folder with a sentence-transformers model, got {where}. Check the path.")
    try:
        return SentenceTransformer(
            str(Path(where).expanduser()) if where.startswith("~") else where,
            trust_remote_code=False,
            model_kwargs={"use_safetensors": True},
        )
    except Exception as error:
        said = one_line(error, 200)
        raise ModelError(f"{key}: expected a sentence-transformers model in {where}, got: {said}") from None


class TextStudent(nn.Module):
    """A sentence-transformers model as a student: texts to vectors, with a gradient.

    Args:
        model: saved as it is, `SentenceTransformer(folder)` loads it alone.
    """

    def __init__(self, model: SentenceTransformer) -> None:
        super().__init__()
        self.model = model
        dimensions = model.get_embedding_dimension()
        assert dimensions is not None
        self.dimensions = dimensions

    def forward(self, texts: Sequence[str]) -> Tensor:
        """[N, d]."""
        features = self.model.preprocess(list(texts))
        device = self.model.device
        features = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in features.items()}
        vectors: Tensor = self.model(features)["sentence_embedding"]
        return vectors

    def save(self, folder: str | Path) -> None:
        """Write a sentence-transformers folder with modules.json."""
        self.model.save_pretrained(str(folder), create_model_card=False)


def static_student(tokenizer: Any, texts: Sequence[str], start: Tensor) -> TextStudent:
    """A vector for each token, and a text's is their mean: the fastest student.

    A token begins as the mean of the vectors of the texts that it stands in, smaller where it is frequent. A token that
    stands in none begins, and stays, at 0.

    Args:
        tokenizer: a fast tokenizer, of transformers or tokenizers.
        texts: N of them.
        start: [N, d] what the student should say of them at first, such as a PCA of the teacher's vectors.
    """
    require_sentence_transformers("static_student")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    static = StaticEmbedding(tokenizer, embedding_dim=start.shape[1])
    sums, seen = torch.zeros(static.num_embeddings, start.shape[1]), torch.zeros(static.num_embeddings)
    for first in range(0, len(texts), _TEXTS):
        encoded = static.tokenizer.encode_batch(list(texts[first : first + _TEXTS]), add_special_tokens=False)
        for row, text in enumerate(encoded, first):
            ids = torch.tensor(text.ids, dtype=torch.long)
            sums.index_add_(0, ids, start[row].expand(len(ids), -1))
            seen.index_add_(0, ids, torch.ones(len(ids)))
    weight = RARE / (RARE + seen / seen.sum().clamp_min(1)) / seen.clamp_min(1)
    with torch.no_grad():
        static.embedding.weight.copy_(sums * weight[:, None])
    return TextStudent(SentenceTransformer(modules=[static], device="cpu"))


def encoder_student(model: SentenceTransformer, layers: int, texts: Sequence[str], start: Tensor) -> TextStudent:
    """Some layers of a transformer, mean pooling, and a linear map that begins at the least squares fit of `start`.

    Args:
        model: a sentence-transformers model; its embeddings and evenly spread layers are copied.
        layers: how many.
        texts: N of them.
        start: [N, d] what the student should say of them at first.

    Raises:
        ModelError: the model has no such list of layers.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Pooling

    transformer = copy.deepcopy(model[0])
    body: Any = getattr(transformer, "auto_model", transformer)
    whole = getattr(getattr(body, "config", None), "num_hidden_layers", 0)
    lists = [(n, m) for n, m in body.named_modules() if isinstance(m, nn.ModuleList) and len(m) == whole]
    if len(lists) != 1 or not 1 <= layers <= whole:
        raise ModelError(
            f"student.encoder.layers: expected 1 to {whole} layers of a transformer, got {layers}. "
            "Start from a sentence-transformers model whose first module is a transformer."
        )
    name, found = lists[0]
    kept = torch.linspace(0, whole - 1, layers).round().long().tolist() if layers > 1 else [0]
    parent = body.get_submodule(name.rpartition(".")[0])
    setattr(parent, name.rpartition(".")[2], nn.ModuleList(found[i] for i in kept))
    body.config.num_hidden_layers = layers
    pooling = Pooling(body.config.hidden_size, pooling_mode="mean")
    pooled = SentenceTransformer(modules=[transformer, pooling], device="cpu")
    hidden = torch.from_numpy(pooled.encode(list(texts), batch_size=64, show_progress_bar=False)).double()
    target = start.double()
    centre, level = hidden.mean(0), target.mean(0)
    x = hidden - centre
    ridge = 1e-3 * x.square().sum() / x.shape[1] * torch.eye(x.shape[1], dtype=x.dtype)
    weight = torch.linalg.solve(x.T @ x + ridge, x.T @ (target - level))
    dense = Dense(
        x.shape[1],
        start.shape[1],
        activation_function=nn.Identity(),
        init_weight=weight.T.float(),
        init_bias=(level - centre @ weight).float(),
    )
    return TextStudent(SentenceTransformer(modules=[transformer, pooling, dense], device="cpu"))
