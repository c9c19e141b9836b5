"""linear_divergence and the protocol of autograd."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from linear_cases import (
    H,
    N,
    V,
    close,
    doubled,
    error,
    every_backend,
    every_dtype,
    every_fused_backend,
    every_kind,
    every_reduction,
    make_targets,
    plain,
    randn,
    some_labels,
    student,
    wanting,
)
from potstill.errors import UserError
from potstill.losses.divergences import JSD, ForwardKL
from potstill.losses.fused_linear import linear_cross_entropy, linear_divergence
from potstill.losses.targets import LMHead
from potstill.losses.torch_compile import disable_compile


@every_dtype
@every_backend
@every_reduction
def test_the_loss_may_be_scaled_and_added_to_others(dtype, backend, reduction):
    tensors = hidden, weight, bias = student(dtype=dtype)
    exact = wanting(*tensors)
    targets = make_targets("dense", dtype=dtype)
    loss = linear_divergence(hidden, LMHead(weight, bias), targets, JSD(), reduction=reduction, backend=backend).loss
    other = linear_cross_entropy(hidden, LMHead(weight, bias), some_labels(), reduction=reduction, backend=backend).loss
    total = (-3 * loss + loss**2 + other / 7).mean() + hidden.square().sum() + weight.sum()
    total.backward()
    each = plain(LMHead(*exact[1:]), exact[0], doubled(targets), JSD())
    hard = plain(LMHead(*exact[1:]), exact[0], None, None, 1.0, some_labels(), 1.0)
    if reduction == "mean":
        each, hard = each.mean(), hard.mean()
    expected = (-3 * each + each**2 + hard / 7).mean() + exact[0].square().sum() + exact[1].sum()
    expected.backward()
    close([x.grad for x in tensors], [x.grad for x in exact], dtype)


@every_backend
@every_reduction
def test_gradients_add_up_over_two_calls(backend, reduction):
    tensors = hidden, weight, bias = student()
    exact = wanting(*tensors)
    for divergence in (JSD(), ForwardKL()):
        output = linear_divergence(
            hidden, LMHead(weight, bias), make_targets("dense"), divergence, reduction=reduction, backend=backend
        )
        output.loss.mean().backward()
        plain(LMHead(*exact[1:]), exact[0], make_targets("dense"), divergence).mean().backward()
    close([x.grad for x in tensors], [x.grad for x in exact])


@every_backend
@every_reduction
def test_one_backward_pass_may_keep_the_graph(backend, reduction):
    tensors = hidden, weight, bias = student()
    loss = linear_divergence(
        hidden, LMHead(weight, bias), make_targets("dense"), JSD(), reduction=reduction, backend=backend
    ).loss.mean()
    loss.backward(retain_graph=True)
    expected = plain(LMHead(weight, bias), hidden, make_targets("dense"), JSD()).mean()
    close([x.grad for x in tensors], list(torch.autograd.grad(expected, tensors)))


@pytest.mark.parametrize("retain_graph", [True, False])
@every_fused_backend
def test_a_second_backward_pass_is_an_error_that_says_what_to_do(backend, retain_graph):
    hidden, weight, _ = student()
    loss = linear_divergence(hidden, LMHead(weight), make_targets("dense"), JSD(), backend=backend).loss
    loss.backward(retain_graph=retain_graph)
    before = hidden.grad.clone()
    with pytest.raises(UserError, match=r'^linear_divergence: expected one backward pass.*reduction="none"') as caught:
        loss.backward()
    assert "\n" not in str(caught.value) and torch.equal(hidden.grad, before)


@every_backend
def test_without_a_reduction_the_backward_pass_may_happen_twice(backend):
    tensors = hidden, weight, bias = student()
    loss = linear_divergence(
        hidden, LMHead(weight, bias), make_targets("dense"), JSD(), reduction="none", backend=backend
    ).loss
    once = torch.autograd.grad(loss.sum(), tensors, retain_graph=True)
    twice = torch.autograd.grad(2 * loss.sum(), tensors)
    close(twice, [2 * x for x in once])


@every_backend
@every_reduction
def test_a_second_derivative_is_refused(backend, reduction):
    hidden, weight, _ = student()
    loss = linear_divergence(
        hidden, LMHead(weight), make_targets("dense"), JSD(), reduction=reduction, backend=backend
    ).loss
    with pytest.raises(UserError, match=r"^\w+: .* first derivative, got create_graph=True") as caught:
        torch.autograd.grad(loss.sum(), hidden, create_graph=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("which", [0, 1, 2])
@every_backend
@every_reduction
def test_the_gradient_of_one_input_alone(which, backend, reduction):
    tensors = hidden, weight, bias = student()
    loss = linear_divergence(
        hidden, LMHead(weight, bias), make_targets("dense"), JSD(), reduction=reduction, backend=backend
    ).loss.mean()
    (actual,) = torch.autograd.grad(loss, tensors[which])
    expected = plain(LMHead(weight, bias), hidden, make_targets("dense"), JSD()).mean()
    close(actual, torch.autograd.grad(expected, tensors)[which])
    assert all(x.grad is None for x in tensors)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # both are torch's own,
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # about its own code
@pytest.mark.parametrize(("inside", "reduction"), [(True, "mean"), (True, "none"), (False, "mean")])
@every_backend
def test_it_goes_beside_and_into_a_compiled_function(inside, reduction, backend):
    dtype = torch.float32
    layer, head = torch.nn.Linear(5, H, dtype=dtype), torch.nn.Linear(H, V, dtype=dtype)
    inputs, targets = randn(N, 5, seed=12, dtype=dtype), make_targets("dense", dtype=dtype)
    parameters = [*layer.parameters(), *head.parameters()]

    def model(x: Tensor) -> Tensor:
        return torch.tanh(layer(x))

    def loss(states: Callable[[Tensor], Tensor]) -> Tensor:
        return linear_divergence(
            *(states(inputs), LMHead(head.weight, head.bias), targets, JSD()), reduction=reduction, backend=backend
        ).loss.mean()

    expected = loss(model)
    gradients = torch.autograd.grad(expected, parameters)
    torch._dynamo.reset()
    if inside:
        actual = torch.compile(lambda: loss(model), backend="eager")()
    else:
        actual = loss(torch.compile(model, backend="eager"))
    close(actual, expected, dtype)
    close(torch.autograd.grad(actual, parameters), gradients, dtype)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own
def test_what_is_uncompiled_is_no_part_of_a_graph():
    compiling, graphs = [], []

    @disable_compile
    def aside(x: Tensor) -> Tensor:
        compiling.append(torch.compiler.is_compiling())
        return x.sin()

    def note(graph, inputs):
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    torch._dynamo.reset()
    x = torch.ones(3)
    close(torch.compile(lambda x: aside(x * 2) + 1, backend=note)(x), (x * 2).sin() + 1, torch.float32)
    assert compiling == [False]
    assert len(graphs) == 2 and not any(torch.Tensor.sin in graph for graph in graphs)


@every_kind
@every_backend
@every_reduction
def test_autocast_multiplies_in_bfloat16_and_keeps_float32_gradients(kind, backend, reduction, monkeypatch):
    monkeypatch.setattr("potstill.losses.fused_linear.multiplies_bfloat16", lambda: True)
    tensors = hidden, weight, bias = student(24, 16, 50, dtype=torch.float32)
    targets = make_targets(kind, 24, 50, dtype=torch.float32)
    run = partial(linear_divergence, divergence=JSD(0.3), labels=some_labels(24, 50), label_weight=0.5)

    def loss() -> Tensor:
        return run(hidden, LMHead(weight, bias), targets, reduction=reduction, backend=backend).loss.mean()

    expected = loss()
    with torch.autocast("cpu", torch.bfloat16):
        actual = loss()
    assert actual.dtype == torch.float32 and actual != expected
    close(actual, expected, tolerance=0.02)
    gradients, expected_gradients = torch.autograd.grad(actual, tensors), torch.autograd.grad(expected, tensors)
    assert [x.dtype for x in gradients] == [torch.float32] * 3
    for error_norm, gradient in zip(error(gradients, expected_gradients), expected_gradients, strict=True):
        assert 0 < error_norm <= 0.03 * float(gradient.norm())


@every_backend
@every_reduction
def test_autocast_takes_half_states_with_a_float32_head(backend, reduction):
    """As a layer in front of the head gives them."""
    layer, weight = torch.nn.Linear(5, H), student(dtype=torch.float32)[1]
    inputs, targets = randn(N, 5, seed=12, dtype=torch.float32), make_targets("dense", dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = layer(inputs)
        hidden.retain_grad()
        output = linear_divergence(hidden, LMHead(weight), targets, JSD(), reduction=reduction, backend=backend)
    output.loss.mean().backward()
    assert (hidden.dtype, hidden.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    assert output.loss.dtype == weight.grad.dtype == layer.weight.grad.dtype == torch.float32
    exact = wanting(hidden, weight)
    plain(LMHead(exact[1]), exact[0], doubled(targets), JSD()).mean().backward()
    for error_norm, tensor in zip(error((hidden.grad, weight.grad), (x.grad for x in exact)), exact, strict=True):
        assert error_norm <= 0.03 * float(tensor.grad.norm())


@every_backend
def test_autocast_leaves_float64_alone(backend):
    hidden, weight, _ = student()
    expected = linear_divergence(hidden, LMHead(weight), make_targets("dense"), JSD(), backend=backend).loss
    with torch.autocast("cpu", torch.bfloat16):
        actual = linear_divergence(hidden, LMHead(weight), make_targets("dense"), JSD(), backend=backend).loss
    assert torch.equal(actual, expected)
