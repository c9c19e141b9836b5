"""Which layer learns from which, and what brings a width to another."""

from __future__ import annotations

import pytest
import torch

from conftest import make_batch, make_llama
from potstill.errors import ShapeError
from potstill.models.layer_map import LayerMap, Projection
from potstill.train.distiller import Distiller
from potstill.train.terms.layers import Attention, Hidden


@pytest.mark.parametrize(
    ("layers", "student", "teacher", "expected"),
    [
        (LayerMap.uniform(), 3, 6, ((0, 1), (1, 3), (2, 5))),
        (LayerMap.uniform(), 4, 6, ((0, 1), (1, 2), (2, 4), (3, 5))),
        (LayerMap.uniform(), 1, 6, ((0, 5),)),
        (LayerMap.uniform(), 3, 1, ((0, 0), (1, 0), (2, 0))),
        (LayerMap.uniform(), 4, 4, ((0, 0), (1, 1), (2, 2), (3, 3))),
        (LayerMap.uniform(), 6, 4, ((0, 0), (1, 1), (2, 1), (3, 2), (4, 3), (5, 3))),
        (LayerMap.last_k(1), 4, 6, ((3, 5),)),
        (LayerMap.last_k(3), 4, 6, ((1, 3), (2, 4), (3, 5))),
        (LayerMap.skip(2), 3, 6, ((0, 1), (1, 3), (2, 5))),
        (LayerMap.skip(3), 2, 6, ((0, 2), (1, 5))),
        (LayerMap.skip(1), 1, 1, ((0, 0),)),
        (LayerMap.explicit([(0, 2), (-1, -2)]), 4, 6, ((0, 2), (3, 4))),
        (
            LayerMap.explicit([("embeddings", 0), (-1, "last_hidden_state")]),
            4,
            6,
            (("embeddings", 0), (3, "last_hidden_state")),
        ),
    ],
)
def test_maps(layers: LayerMap, student: int, teacher: int, expected: tuple[tuple[int, int], ...]) -> None:
    assert layers.pairs(student, teacher) == expected


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (LayerMap.last_k(3), r"student layers in -2\.\.1, as the student has 2 layers, got -3"),
        (LayerMap.skip(4), r"teacher layers in -6\.\.5, as the teacher has 6 layers, got 7"),
        (LayerMap.explicit([(0, 6)]), r"teacher layers in -6\.\.5, as the teacher has 6 layers, got 6"),
        (LayerMap.explicit([(-3, 0)]), r"student layers in -2\.\.1, as the student has 2 layers, got -3"),
    ],
)
def test_layers_that_are_not_there_name_the_depth(layers: LayerMap, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        layers.pairs(2, 6)


def test_maps_that_cannot_be() -> None:
    with pytest.raises(ShapeError, match=r"Explicit.layers: expected at least one"):
        LayerMap.explicit([])
    with pytest.raises(ShapeError, match=r"Explicit.layers: expected one of embeddings, last_hidden_state, got 'last'"):
        LayerMap.explicit([(0, "last")])
    with pytest.raises(ShapeError, match=r"Skip.every: expected a number >= 1, got 0"):
        LayerMap.skip(0)
    with pytest.raises(ShapeError, match=r"LastK.k: expected a number >= 1, got -1"):
        LayerMap.last_k(-1)


def test_projections() -> None:
    hidden = torch.randn(2, 3, 4)
    assert Projection("linear", 4, 6)(hidden).shape == (2, 3, 6)
    assert Projection("mlp", 4, 6)(hidden.bfloat16()).dtype == torch.float32
    assert len(list(Projection("mlp", 4, 6).parameters())) == 4
    assert torch.equal(Projection("none", 4, 4)(hidden), hidden)
    with pytest.raises(ShapeError, match=r"equal widths without a projection, got 4 \(student\) and 6 \(teacher\)"):
        Projection("none", 4, 6)


def test_states_are_compared_by_name() -> None:
    student, teacher, batch = make_llama(layers=1), make_llama(seed=1), make_batch()
    attended = batch["attention_mask"].bool()
    states = [m(**batch, output_hidden_states=True).hidden_states for m in (student, teacher)]
    for name, place in {"embeddings": 0, "last_hidden_state": -1}.items():
        layers = LayerMap.explicit([(name, name)])
        value = Distiller(student, teacher, [Hidden(layers)]).step(batch).logs["hidden"]
        s, t = (hidden[place][attended].double() for hidden in states)
        torch.testing.assert_close(value.double(), (s - t).square().mean(), rtol=1e-5, atol=1e-7)
        with pytest.raises(ShapeError, match=f"attention: expected layers by their numbers, got {name}"):
            Distiller(student, teacher, [Attention(layers)])
