from __future__ import annotations

import pytest
import torch

from potstill.errors import ShapeError
from potstill.losses.token_losses import token_mean

VALUES = torch.tensor([1.0, 2.0, 4.0, 8.0])
WEIGHTS = torch.tensor([1.0, 0.5, 0.0, 2.0])


@pytest.mark.parametrize(
    ("weights", "normalizer", "expected"),
    [
        (None, None, 15 / 4),
        (WEIGHTS, None, 18 / 3.5),
        (None, 10, 1.5),
        (None, 10.0, 1.5),
        (None, torch.tensor(10), 1.5),
        (None, torch.tensor(10.0), 1.5),
        (WEIGHTS, 9.0, 2.0),
        (WEIGHTS, torch.tensor(9.0), 2.0),
        (WEIGHTS / 7, None, 18 / 7),  # weights of less than one token do not make the rest louder
        (torch.zeros(4), None, 0.0),
        (torch.tensor([True, False, False, True]), None, 4.5),
    ],
)
def test_the_mean_and_its_gradient(weights, normalizer, expected):
    values = VALUES.clone().requires_grad_()
    mean = token_mean(values, weights, normalizer)
    mean.backward()
    assert mean.shape == () and mean.item() == pytest.approx(expected)
    # The mean is linear: its gradient gives it back, and follows the weights.
    assert (values.grad @ VALUES).item() == pytest.approx(expected)
    if weights is not None:
        assert torch.equal(values.grad == 0, weights == 0)


@pytest.mark.parametrize("weights", [None, torch.zeros(0)], ids=["plain", "weighed"])
@pytest.mark.parametrize("normalizer", [None, 7, torch.tensor(7)], ids=str)
def test_no_tokens_are_a_zero_that_can_be_differentiated(weights, normalizer):
    states = torch.ones(3, requires_grad=True)
    mean = token_mean(states[:0] * 2, weights, normalizer)
    mean.backward()
    assert mean.item() == 0
    assert torch.equal(states.grad, torch.zeros(3))


def test_a_mask_equals_a_slice():
    mask = torch.tensor([1.0, 0.0, 1.0, 0.0])
    torch.testing.assert_close(token_mean(VALUES, mask), token_mean(VALUES[mask.bool()]), rtol=0, atol=0)


def test_parts_of_a_step_sum_to_the_whole():
    parts = [token_mean(part, normalizer=len(VALUES)) for part in VALUES.split([3, 1])]
    torch.testing.assert_close(sum(parts), token_mean(VALUES))


def test_float64_stays_float64():
    mean = token_mean(VALUES.double(), WEIGHTS.double(), torch.tensor(3, dtype=torch.int32))
    assert mean.dtype == torch.float64 and mean.item() == 6.0


def test_weights_are_those_of_the_values():
    with pytest.raises(ShapeError, match=r"expected weights of shape \[2, 2\], got \[2, 1\]"):
        token_mean(VALUES.view(2, 2), torch.ones(2, 1))  # broadcast, their sum would be too small
