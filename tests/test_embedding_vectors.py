"""Matrices on disk: every format, bounded reading, and what is refused."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from potstill.embedding import vectors as module
from potstill.embedding.vectors import TensorVectors, VectorSlice, check_vectors, open_vectors
from potstill.errors import DataError

X = torch.randn(100, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_safetensors_are_read_in_every_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"other": torch.ones(3), "embeddings": X.to(dtype)}, tmp_path / "x.safetensors")
    opened = open_vectors(tmp_path / "x.safetensors")
    assert (opened.rows, opened.dimensions) == (100, 6)
    assert torch.equal(opened.read(10, 20), X[10:20].to(dtype).float())


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_npy_is_read(tmp_path: Path, dtype: str) -> None:
    np.save(tmp_path / "x.npy", X.numpy().astype(dtype))
    assert torch.equal(open_vectors(tmp_path / "x.npy").read(0, 100), torch.from_numpy(X.numpy().astype(dtype)).float())


@pytest.mark.parametrize(
    ("content", "key"),
    [
        (X, None),
        ({"embeddings": X, "step": 3}, None),
        ({"model_state": {"table.weight": X, "bias": torch.ones(6)}}, None),
        ({"model_state": {"a": torch.ones(2, 2), "b": X}}, "b"),
        ({"embeddings": X, "model_state": {"a": torch.ones(2, 2)}}, None),
    ],
)
def test_checkpoints_are_read(tmp_path: Path, content: object, key: str | None) -> None:
    torch.save(content, tmp_path / "x.pt")
    assert torch.equal(open_vectors(tmp_path / "x.pt", key).read(0, 100), X)


class Malicious:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.witness,))


@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_a_malicious_checkpoint_is_refused(tmp_path: Path, write) -> None:
    witness = tmp_path / "ran"
    write({"embeddings": Malicious(witness)}, tmp_path / "x.pt")
    with pytest.raises(DataError, match=r"readable as \.pt without running code"):
        open_vectors(tmp_path / "x.pt")
    assert not witness.exists()


def test_a_pickle_inside_npy_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([Malicious(tmp_path / "ran")], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"readable as \.npy without running code"):
        open_vectors(tmp_path / "x.npy")
    assert not (tmp_path / "ran").exists()


def test_files_that_are_no_matrix_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "flat.npy", np.zeros(3, dtype="f4"))
    np.save(tmp_path / "whole.npy", np.zeros((3, 2), dtype="i8"))
    np.save(tmp_path / "columns.npy", np.asfortranarray(np.zeros((3, 2), dtype="f4")))
    (tmp_path / "short.npy").write_bytes((tmp_path / "flat.npy").read_bytes()[:40])
    np.save(tmp_path / "cut.npy", X.numpy())
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:-8])
    (tmp_path / "x.safetensors").write_bytes(b"not a header at all")
    (tmp_path / "x.txt").write_text("1 2 3")
    save_file({"a": X, "b": X.clone()}, tmp_path / "two.safetensors")
    for name, key, message in (
        ("flat.npy", None, r"expected a matrix of floating-point numbers, a row a vector, got shape \[3\] of float32"),
        ("whole.npy", None, "of int64"),
        ("columns.npy", None, "in columns"),
        ("short.npy", None, r"readable as \.npy"),
        ("cut.npy", None, r"readable as \.npy"),
        ("x.safetensors", None, r"readable as \.safetensors"),
        ("x.txt", None, r"ends in \.npy, \.safetensors, \.pt, \.pth, got x.txt"),
        ("x.npz", None, "expected a file, got"),
        ("flat.npyy", None, "Did you mean flat.npy?"),
        ("two.safetensors", None, "Name one with `key`"),
        ("two.safetensors", "c", "expected a matrix c in two.safetensors, got a, b"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            open_vectors(tmp_path / name, key)
        assert "\n" not in str(caught.value)


def test_every_row_comes_once_in_an_order_of_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = TensorVectors(X)
    for pool in (2**26, 6 * 40):  # everything at once; pools of 40 rows, so that pieces are of one
        monkeypatch.setattr(module, "_POOL_NUMBERS", pool)
        monkeypatch.setattr(module, "_PIECES", 8)
        numbers = [rows for rows, _ in whole.batches(16, seed=3)]
        assert [len(rows) for rows in numbers] == [16] * 6 + [4]
        assert torch.cat(numbers).sort().values.tolist() == list(range(100))
        assert torch.cat(numbers).tolist() != list(range(100))
        assert torch.equal(torch.cat(numbers), torch.cat([rows for rows, _ in whole.batches(16, seed=3)]))
        assert not torch.equal(torch.cat(numbers), torch.cat([rows for rows, _ in whole.batches(16, seed=4)]))
        assert all(torch.equal(batch, X[rows]) for rows, batch in whole.batches(16, seed=3))


def test_no_read_is_larger_than_requested(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X.numpy())
    opened = open_vectors(tmp_path / "x.npy")
    sizes = []
    read = opened.read
    monkeypatch.setattr(opened, "read", lambda start, stop: sizes.append(stop - start) or read(start, stop))
    monkeypatch.setattr(module, "_POOL_NUMBERS", 6 * 20)
    monkeypatch.setattr(module, "_PIECES", 4)
    monkeypatch.setattr(module, "BLOCK_ROWS", 7)
    assert len(list(opened.batches(10, seed=0))) == 10
    assert len(opened.sample(12)) == 12
    check_vectors(opened, 3)
    assert max(sizes) == 7


def test_a_part_is_its_rows() -> None:
    part = VectorSlice(TensorVectors(X), 20, 50)
    assert (part.rows, part.dimensions) == (30, 6)
    assert torch.equal(part.read(5, 9), X[25:29])


def spoilt(row: int, value: float) -> torch.Tensor:
    copy = X.clone()
    copy[row] = value
    return copy


@pytest.mark.parametrize(
    ("values", "dimensions", "message"),
    [
        (spoilt(7, float("nan")), 3, "a NaN or infinite value in row 8 of 100"),
        (spoilt(99, float("inf")), 3, "a NaN or infinite value in row 100"),
        (spoilt(7, 0.0), 3, "only zeros in row 8"),
        (X[:1], 3, "expected at least two rows, got 1"),
        (X[:3], 3, "expected more rows than the student's 3 dimensions, got 3"),
        (X, 6, "expected more than the student's 6 dimensions, got 6"),
        (X[:1].expand(9, 6), 3, "expected different rows, got the same 9 times"),
    ],
)
def test_vectors_that_nothing_can_be_made_of_are_refused(values, dimensions, message) -> None:
    with pytest.raises(DataError, match=message) as caught:
        check_vectors(TensorVectors(values), dimensions)
    assert "\n" not in str(caught.value)


def test_what_is_odd_but_usable_is_noted() -> None:
    assert check_vectors(TensorVectors(X), 3) == []
    (repeated,) = check_vectors(TensorVectors(torch.cat([X, X[:2]])), 3)
    assert "2 of 102 rows repeat an earlier one" in repeated
    (few,) = check_vectors(TensorVectors(X[:5]), 3)
    assert "fewer rows (5) than dimensions (6)" in few
