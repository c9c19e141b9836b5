"""Students over given vectors: a linear map, or one with a small network beside it, that begins as PCA."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import normalize

from potstill.data.files import atomic_path
from potstill.embedding.vectors import CHECK, Matrix, Vectors
from potstill.errors import ModelError, ShapeError, one_line

Start = Literal["centred", "uncentred", "whitened"]
SAMPLE = 2**16  # rows that principal components are read from


class Principal(NamedTuple):
    """Principal components of unit vectors.

    Args:
        mean: [H], zeros where not centred.
        components: [H, d], orthonormal, the strongest first.
        variance: [d].
    """

    mean: Tensor
    components: Tensor
    variance: Tensor

    def project(self, vectors: Tensor, whiten: bool = False) -> Tensor:
        """[N, H] to [N, d]."""
        projected = (normalize(vectors, dim=-1) - self.mean) @ self.components
        return projected / self.variance.clamp_min(1e-12).sqrt() if whiten else projected


def principal(vectors: Tensor, dimensions: int, *, centred: bool = True) -> Principal:
    """The principal components of vectors [N, H], each first divided by its length: only angles count."""
    x = normalize(vectors, dim=-1)
    mean = x.mean(0) if centred else x.new_zeros(x.shape[1])
    x = x - mean
    variance, components = torch.linalg.eigh((x.T @ x / len(x)).double())
    order = variance.argsort(descending=True)[:dimensions]
    return Principal(mean, components[:, order].float(), variance[order].float())


class VectorHead(nn.Module):
    """A student over the teacher's own vectors.

        y = W x / |x| + b                                   linear
        y = W x / |x| + b + W2 gelu(W1 x / |x| + b1) + b2   with hidden > 0

    Args:
        inputs: H, the teacher's dimensions.
        dimensions: the student's.
        hidden: width of the network beside the map; 0 for none.
    """

    def __init__(self, inputs: int, dimensions: int, hidden: int = 0) -> None:
        super().__init__()
        self.inputs, self.dimensions = inputs, dimensions
        self.map = nn.Linear(inputs, dimensions)
        self.beside = (
            nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, dimensions)) if hidden else None
        )

    @classmethod
    def from_pca(
        cls, sample: Tensor, dimensions: int, *, hidden: int = 0, start: Start = "centred", seed: int = 0
    ) -> Self:
        """A head that begins as a PCA of some vectors [N, H]; the network beside it adds nothing at first.

        Args:
            sample: [N, H].
            dimensions: d.
            hidden: width of the network beside the map.
            start: `centred` and `whitened` serve close pairs, `uncentred` the order of all pairs.
            seed: of the network's first layer.
        """
        torch.manual_seed(seed)
        head = cls(sample.shape[1], dimensions, hidden)
        whiten = start == "whitened"
        found = principal(sample, dimensions, centred=start != "uncentred")
        weight = found.components / found.variance.clamp_min(1e-12).sqrt() if whiten else found.components
        length = ((normalize(sample, dim=-1) - found.mean) @ weight).norm(dim=-1).mean()
        weight = weight / length.clamp_min(1e-12)  # lengths around 1, where the learning rate is at home
        with torch.no_grad():
            head.map.weight.copy_(weight.T)
            head.map.bias.copy_(-(found.mean @ weight))
            if head.beside is not None:
                first, last = head.beside[0], head.beside[2]
                assert isinstance(first, nn.Linear)
                assert isinstance(last, nn.Linear)
                first.weight.mul_(sample.shape[1] ** 0.5)  # the coordinates of unit vectors are small
                nn.init.zeros_(last.weight)
                nn.init.zeros_(last.bias)
        return head

    def forward(self, vectors: Tensor) -> Tensor:
        """[N, H] to [N, d], of any length."""
        x = normalize(vectors, dim=-1)
        return self.map(x) if self.beside is None else self.map(x) + self.beside(x)

    @torch.no_grad()
    def transform(self, vectors: Any) -> np.ndarray:
        """The student's unit vectors, [N, d] float32.

        Args:
            vectors: [N, H], a matrix in memory or `Vectors` on disk, read in blocks.

        Raises:
            ShapeError: they have another number of dimensions.
        """
        given = vectors if isinstance(vectors, Vectors) else Matrix(vectors)
        if given.dimensions != self.inputs:
            raise ShapeError(f"transform: expected vectors of {self.inputs} dimensions, got {given.dimensions}.")
        done = np.empty((given.rows, self.dimensions), dtype=np.float32)
        device = self.map.weight.device
        for number, block in enumerate(given.blocks()):
            done[number * CHECK : number * CHECK + len(block)] = normalize(self(block.to(device)), dim=-1).cpu().numpy()
        return done

    def save(self, folder: str | Path) -> None:
        """Write head.safetensors."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        with atomic_path(Path(folder) / "head.safetensors") as partial:
            save_file({name: value.contiguous() for name, value in self.state_dict().items()}, partial)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            ModelError: there is no such head.
        """
        path = Path(folder) / "head.safetensors"
        if not path.is_file():
            raise ModelError(f"VectorHead.load: expected head.safetensors in {folder}, got none. Check the path.")
        try:
            state = load_file(path)
            dimensions, inputs = state["map.weight"].shape
            hidden = len(state["beside.0.bias"]) if "beside.0.bias" in state else 0
            head = cls(inputs, dimensions, hidden)
            head.load_state_dict(state)
        except Exception as error:
            said = one_line(error, 200)
            raise ModelError(f"VectorHead.load: expected a head in {path}, got: {said}. Save it again.") from None
        return head.eval()


def random_projection(vectors: Tensor, dimensions: int, seed: int = 0) -> Tensor:
    """[N, H] to [N, d] by a matrix of Gaussian numbers: what costs nothing."""
    generator = torch.Generator().manual_seed(seed)
    return normalize(vectors, dim=-1) @ torch.randn(vectors.shape[1], dimensions, generator=generator)
