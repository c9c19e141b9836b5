"""Students over the teacher's own vectors: a linear map, or one with an MLP beside it, that starts as a PCA."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, cast

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import normalize

from potstill.embedding.vectors import as_vector_array
from potstill.errors import ModelError, ShapeError, one_line
from potstill.files import atomic_path
from potstill.models.checksums import check_folder

PCAKind = Literal["centred", "uncentred", "whitened"]
PCA_ROWS = 2**16  # that principal components are computed from


class PCA(NamedTuple):
    mean: Tensor  # [H], zeros without centring
    components: Tensor  # [H, d], orthonormal, by falling variance
    variance: Tensor  # [d]

    @property
    def deviation(self) -> Tensor:
        return self.variance.clamp_min(1e-12).sqrt()

    def project(self, vectors: Tensor, whiten: bool = False) -> Tensor:
        projected = (normalize(vectors, dim=-1) - self.mean) @ self.components
        return projected / self.deviation if whiten else projected


def fit_pca(vectors: Tensor, dimensions: int, *, centred: bool = True) -> PCA:
    """Compute the principal components of vectors [N, H], each scaled to unit length first."""
    x = normalize(vectors, dim=-1)
    mean = x.mean(0) if centred else x.new_zeros(x.shape[1])
    x = x - mean
    variance, components = torch.linalg.eigh((x.T @ x / len(x)).double())
    order = variance.argsort(descending=True)[:dimensions]
    return PCA(mean, components[:, order].float(), variance[order].float())


class VectorHead(nn.Module):
    """A student over the teacher's own vectors, [N, H] to [N, d].

        y = W x / |x| + b                                   linear
        y = W x / |x| + b + W2 gelu(W1 x / |x| + b1) + b2   with hidden > 0

    `inputs` is H, `dimensions` is d, and `hidden` the width of the MLP beside the map; 0 for none.
    """

    def __init__(self, inputs: int, dimensions: int, hidden: int = 0) -> None:
        super().__init__()
        self.inputs, self.dimensions = inputs, dimensions
        self.map = nn.Linear(inputs, dimensions)
        layers = (nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, dimensions)) if hidden else ()
        self.beside = nn.Sequential(*layers) if hidden else None

    @classmethod
    def from_pca(
        cls, sample: Tensor, dimensions: int, *, hidden: int = 0, start: PCAKind = "centred", seed: int = 0
    ) -> Self:
        """Make a head that starts as a PCA of vectors [N, H]; the MLP beside it, by `seed`, adds nothing at first.

        A `centred` and a `whitened` start keep close pairs, `uncentred` the order of all pairs.
        """
        torch.manual_seed(seed)
        head = cls(sample.shape[1], dimensions, hidden)
        pca = fit_pca(sample, dimensions, centred=start != "uncentred")
        weight = pca.components / pca.deviation if start == "whitened" else pca.components
        length = ((normalize(sample, dim=-1) - pca.mean) @ weight).norm(dim=-1).mean()
        weight = weight / length.clamp_min(1e-12)  # outputs of length 1, which the default learning rate is chosen for
        with torch.no_grad():
            head.map.weight.copy_(weight.T)
            head.map.bias.copy_(-(pca.mean @ weight))
            if head.beside is not None:
                first, _, last = cast(Any, head.beside)
                first.weight.mul_(sample.shape[1] ** 0.5)  # the coordinates of unit vectors are small
                nn.init.zeros_(last.weight)
                nn.init.zeros_(last.bias)
        return head

    def forward(self, vectors: Tensor) -> Tensor:
        x = normalize(vectors, dim=-1)
        return self.map(x) if self.beside is None else self.map(x) + self.beside(x)

    @torch.no_grad()
    def transform(self, vectors: Any) -> np.ndarray:
        """Compute unit vectors [N, d] float32 from [N, H]; a `VectorArray` on disk is read in blocks."""
        array = as_vector_array(vectors)
        if array.dimensions != self.inputs:
            raise ShapeError(f"transform: expected vectors of {self.inputs} dimensions, got {array.dimensions}.")
        device = self.map.weight.device
        blocks = [normalize(self(block.to(device)), dim=-1).cpu().numpy() for block in array.blocks()]
        return np.concatenate([np.empty((0, self.dimensions), dtype=np.float32), *blocks])

    def save(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with atomic_path(Path(folder) / "head.safetensors") as partial:
            save_file({name: value.contiguous() for name, value in self.state_dict().items()}, partial)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        path = Path(folder) / "head.safetensors"
        if not path.is_file():
            raise ModelError(f"VectorHead.load: expected head.safetensors in {folder}, got none. Check the path.")
        check_folder(path.parent, "VectorHead.load")
        try:
            state = load_file(path)
            dimensions, inputs = state["map.weight"].shape
            head = cls(inputs, dimensions, len(state.get("beside.0.bias", ())))
            head.load_state_dict(state)
        except Exception as error:
            got = one_line(error, 200)
            raise ModelError(f"VectorHead.load: expected a head in {path}, got: {got}. Save it again.") from None
        return head.eval()


def random_projection(vectors: Tensor, dimensions: int, seed: int = 0) -> Tensor:
    """Project [N, H] to [N, d] by a Gaussian matrix: the baseline without training or data."""
    generator = torch.Generator().manual_seed(seed)
    return normalize(vectors, dim=-1) @ torch.randn(vectors.shape[1], dimensions, generator=generator)
