"""Fit the layers of a student that begins with its teacher's weights to the teacher's hidden states."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from potstill.errors import ModelError
from potstill.losses.divergences import ForwardKL
from potstill.losses.targets import DenseTargets
from potstill.losses.token_losses import on_float64_device, token_divergence
from potstill.models.feed_forward import find_mixture
from potstill.models.norms import norm_kind
from potstill.models.pruning import SelectedParts
from potstill.models.split import INPUTS, evaluation_mode, inputs, probe_batch, run, undisturbed
from potstill.models.structure import LayerList, LayerStructure, find_structure, is_transposed

RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0)  # over the mean squared feature
ROUNDING_ULPS = 4  # an error of this size in a hidden state is rounding, and is left as it is
HELD_OUT = 8  # one batch of so many is held out, to choose the ridge


class LayerFit(NamedTuple):
    """The fit of a student."""

    weights: dict[str, Tensor]  # by parameter of the student
    # On held-out rows, before and after:
    errors: tuple[float, float]  # squared, of the layers' outputs, over the square of the teacher's
    kl: tuple[float, float] | None  # nats a token, or a row; None for models without distributions


@torch.no_grad()
def fit_layers(
    teacher: PreTrainedModel, student: PreTrainedModel, parts: SelectedParts, batches: Iterable[Mapping[str, Tensor]]
) -> LayerFit | None:
    """Fit the last matrix of each of a student's layers in closed form, in place, the first layer first.

    The matrix W of a layer, with features f and output y, becomes W + D, where D [H, I] minimizes

        sum_tokens |t - y - D f|^2 / |t|^2  +  ridge |D|^2.

    t is what the student's next layer would read in the teacher, behind the layers that were left out. Errors of the
    layers before are in y, so that a layer makes up for them. The ridge is the best one on held-out batches; a layer
    that gains nothing there stays, so that a student with its teacher's function keeps it. Hidden states of one layer
    are held at a time, and features are summed up in float64.

    With a norm between the matrix and the sum, as in Gemma 2 and 3, the matrix is fitted to the direction that the norm
    should read, and then each scale of the norm to its channel.

    None for layers that do more than that, and for a single batch.

    References:
        Shopkhoev et al. 2025 (ReplaceMe), arXiv 2505.02819, for a matrix that stands for the layers left out.
    """
    batches = list(batches)
    try:
        of_student = find_structure(student)
        of_teacher: LayerList = find_mixture(teacher) or find_structure(teacher)
    except ModelError:  # of another family, whose layers were copied whole
        return None
    branch = _branch(student, of_student)
    if len(batches) < 2 or branch is None:
        return None
    weights: dict[str, Tensor] = {}
    errors = []
    held_out = [batch for index, batch in enumerate(batches) if _is_held_out(index, len(batches))]
    with evaluation_mode(teacher, student):
        kl = [_kl(teacher, student, held_out)]
        targets = _HiddenStates(teacher, of_teacher, batches)
        states = _HiddenStates(student, of_student, batches)
        for number, end in enumerate([*parts.layers[1:], len(of_teacher.layers)]):
            targets.advance(end)
            layer = _FittedLayer(states, targets, batches, parts.channels, branch)
            errors.append(layer.fit())
            weights |= {f"{of_student.path}.{number}.{name}.weight": weight for name, weight in layer.weights.items()}
            states.advance(number + 1)
        kl.append(_kl(teacher, student, held_out) if weights else kl[0])
    before, after = torch.tensor(errors).mean(0).tolist()
    return LayerFit(weights, (before, after), None if kl[0] is None or kl[1] is None else (kl[0], kl[1]))


def _is_held_out(batch: int, batches: int) -> bool:
    return (batch + 1) % min(HELD_OUT, batches) == 0


def _kl(teacher: Any, student: Any, batches: Iterable[Mapping[str, Tensor]]) -> float | None:
    """The mean KL divergence from the teacher's predictions to the student's, row by row."""
    total, tokens = 0.0, 0
    for batch in batches:
        for row in range(len(batch["input_ids"])):
            kept = {
                name: values[row : row + 1][:, batch["attention_mask"][row].bool()]
                for name, values in batch.items()
                if name in INPUTS
            }
            outputs = [run(model, inputs(kept, model.device)) for model in (teacher, student)]
            size = min(output.logits.shape[-1] if hasattr(output, "logits") else 0 for output in outputs)
            if size < 2:  # an encoder, or a number
                return None
            expected, actual = (output.logits.flatten(0, -2)[:, :size].float() for output in outputs)
            values = token_divergence(actual, DenseTargets(expected.to(actual.device)), ForwardKL())
            total, tokens = total + float(values.sum()), tokens + len(values)
    return total / max(1, tokens)


class _Branch(NamedTuple):
    """What a layer adds to its hidden states last: the output of a matrix, or of a norm behind it."""

    matrix: str
    norm: str | None
    offset: float = 0.0  # the norm's scale is its weight and this


class _Tokens(NamedTuple):
    """The attended tokens of a batch."""

    held_out: bool
    target: Tensor  # [N, H] what the layer should give
    output: Tensor  # [N, H] what it gives
    features: Tensor  # [N, I] input of its last matrix
    product: Tensor  # [N, H] that matrix's output
    added: Tensor  # [N, H] the product, or its norm


class _FittedLayer:
    """The student's next layer, and its target."""

    def __init__(
        self,
        states: _HiddenStates,
        targets: _HiddenStates,
        batches: Sequence[Mapping[str, Tensor]],
        channels: Tensor,
        branch: _Branch,
    ) -> None:
        self.states, self.targets, self.batches, self.channels, self.branch = states, targets, batches, channels, branch
        self.layer = states.layers[states.next]
        self.rounding = _rounding(targets.states[0]) ** 2
        self.weights: dict[str, Tensor] = {}  # that changed

    def fit(self) -> tuple[float, float]:
        """Fit the matrix, and the norm behind it if there is one; return the held-out error before and after."""
        if self.branch.norm is None:
            change, before, after = self._solve(lambda tokens: (tokens.target - tokens.output, tokens.target))
            if change is not None:
                self._change_matrix(change)
            return before, after
        norm: Any = self.layer.get_submodule(self.branch.norm)
        scale = norm.weight.float() + self.branch.offset

        def directions(tokens: _Tokens) -> tuple[Tensor, Tensor]:  # lengths do not pass the norm
            wanted = (tokens.target - tokens.output + tokens.added) / scale
            lengths = [x.norm(dim=-1, keepdim=True) for x in (tokens.product, wanted)]
            return wanted * lengths[0] / lengths[1] - tokens.product, tokens.product

        before = self._scales()[1]
        if before <= self.rounding:
            return before, before
        change, *_ = self._solve(directions)
        if change is not None:
            self._change_matrix(change)
        scales, unscaled, scaled = self._scales()
        if change is not None and min(unscaled, scaled) >= before:
            self._change_matrix(-change)
            self.weights.clear()
            return before, before
        if scaled < unscaled:
            norm.weight.copy_(scale * scales - self.branch.offset)
            self.weights[self.branch.norm] = norm.weight.cpu().clone()
        return before, min(unscaled, scaled)

    def _tokens(self) -> Iterator[_Tokens]:
        modules = [self.layer.get_submodule(name) for name in (self.branch.matrix, self.branch.norm) if name]
        for index, (output, seen) in enumerate(self.states.outputs(modules)):
            attended = self.batches[index]["attention_mask"].bool().to(output.device)
            target = self.targets.states[index].to(output.device)[attended][:, self.channels.to(output.device)].float()
            tensors = (output, seen[0][0], seen[0][1], seen[-1][1])
            yield _Tokens(
                _is_held_out(index, len(self.batches)), target, *(tensor[attended].float() for tensor in tensors)
            )

    def _solve(self, errors: Callable[[_Tokens], tuple[Tensor, Tensor]]) -> tuple[Tensor | None, float, float]:
        """The change of the matrix [I, H] for errors that are relative to something, None for none; held-out errors."""
        fitted, held_out = _Regression(), _Regression()
        for tokens in self._tokens():
            (held_out if tokens.held_out else fitted).add(tokens.features, *errors(tokens))
        before = held_out.error / held_out.tokens
        if before <= self.rounding or not fitted.features.isfinite().all():  # a teacher with NaN is reported later
            return None, before, before
        after = {ridge: held_out.error_after(fitted.solve(ridge)) for ridge in RIDGES}
        ridge = min(after, key=lambda ridge: after[ridge])
        if not after[ridge] < held_out.error:
            return None, before, before
        return fitted.solve(ridge), before, after[ridge] / held_out.tokens

    def _change_matrix(self, change: Tensor) -> None:
        matrix: Any = self.layer.get_submodule(self.branch.matrix)
        matrix.weight.add_((change if is_transposed(matrix) else change.T).to(matrix.weight))
        self.weights[self.branch.matrix] = matrix.weight.cpu().clone()

    def _scales(self) -> tuple[Tensor, float, float]:
        """The factors [H] of what is added, by least squares, and the held-out errors without and with them."""
        sums: dict[bool, list[Any]] = {False: [0, 0, 0, 0], True: [0, 0, 0, 0]}
        for tokens in self._tokens():
            size = tokens.target.square().sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
            wanted, added = tokens.target - tokens.output + tokens.added, tokens.added
            new = [(x * y / size).sum(0) for x, y in ((added, added), (added, wanted), (wanted, wanted))]
            sums[tokens.held_out] = [x + y for x, y in zip(sums[tokens.held_out], [*new, len(size)], strict=True)]
        squares, products, _, _ = sums[False]
        factors = torch.where(squares > 0, products / squares.clamp_min(torch.finfo(torch.float32).tiny), 1.0)
        squares, products, rest, tokens_held_out = sums[True]

        def error(factors: Any) -> float:
            return float((squares * factors**2 - 2 * products * factors + rest).sum()) / tokens_held_out

        return factors, error(torch.ones_like(factors)), error(factors)


def _rounding(state: Tensor) -> float:
    """The relative error of a hidden state that is rounding."""
    device = state.device.type
    products = torch.finfo(torch.get_autocast_dtype(device)).eps if torch.is_autocast_enabled(device) else 0.0
    return max(ROUNDING_ULPS * torch.finfo(state.dtype).eps, products)


class _Regression:
    """Sums over tokens, of errors [H] on features [I]; relative to the size of what they are errors of."""

    def __init__(self) -> None:
        self.features: Any = 0  # [I, I]
        self.products: Any = 0  # [I, H]
        self.error, self.tokens = 0.0, 0

    def add(self, features: Tensor, errors: Tensor, of: Tensor) -> None:
        scale = of.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny).reciprocal()
        features, errors = features * scale, errors * scale
        with torch.autocast(features.device.type, enabled=False):  # forward passes alone may be in half precision
            self.features = self.features + on_float64_device(features.T @ features).double()
            self.products = self.products + on_float64_device(features.T @ errors).double()
        self.error += float(errors.square().sum())
        self.tokens += len(features)

    def solve(self, ridge: float) -> Tensor:
        """The change of the matrix, [I, H]."""
        regular = self.features.clone()
        regular.diagonal().add_(ridge * self.features.diagonal().mean() + torch.finfo(torch.float64).tiny)
        solution: Tensor = torch.cholesky_solve(self.products, torch.linalg.cholesky(regular))
        return solution

    def error_after(self, change: Tensor) -> float:
        """The sum of squared errors with a change of the matrix."""
        return self.error + float(((self.features @ change - 2 * self.products) * change).sum())


class _HiddenStates:
    """The hidden states of batches in front of one of a model's layers: those behind it are computed on request."""

    def __init__(self, model: Any, structure: LayerList, batches: Sequence[Mapping[str, Tensor]]) -> None:
        self.layers, self.next = structure.layers, 0
        self.calls = [_layer_calls(model, structure, batch) for batch in batches]
        self.states = [calls[0].state for calls in self.calls]

    def advance(self, layer: int) -> None:
        """Run the layers in front of `layer`."""
        for number in range(self.next, layer):
            self.states = [self._run(index, number) for index in range(len(self.states))]
        self.next = max(self.next, layer)

    def outputs(self, modules: Sequence[nn.Module]) -> Iterator[tuple[Tensor, list[tuple[Tensor, Tensor]]]]:
        """For each batch, the output of the next layer, and the input and output of modules in it, in their order."""
        seen: list[tuple[Tensor, Tensor]] = []
        with ExitStack() as hooks:
            for module in modules:
                hooks.enter_context(
                    module.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
                )
            for index in range(len(self.states)):
                yield self._run(index, self.next), [*seen]
                seen.clear()

    def _run(self, index: int, number: int) -> Tensor:
        return self.calls[index][number].run(self.layers[number], self.states[index])


class _LayerCall(NamedTuple):
    """The arguments of a layer."""

    args: tuple[Any, ...]
    named: dict[str, Any]

    @property
    def state(self) -> Tensor:
        state: Tensor = self.args[0] if self.args else self.named["hidden_states"]
        return state

    def run(self, layer: nn.Module, state: Tensor) -> Tensor:
        """Run a layer on other hidden states."""
        if self.args:
            output = layer(state, *self.args[1:], **self.named)
        else:
            output = layer(**self.named | {"hidden_states": state})
        changed: Tensor = output if isinstance(output, Tensor) else output[0]
        return changed


def _layer_calls(model: Any, structure: LayerList, batch: Mapping[str, Tensor]) -> list[_LayerCall]:
    """Record the arguments of a model's layers for a batch; of the layers, the first alone is run."""
    calls: list[_LayerCall] = []
    outputs: list[Any] = []
    first = structure.layers[0].forward

    def record(*args: Any, **named: Any) -> Any:
        calls.append(_LayerCall(args, named))
        if not outputs:  # which the others repeat: in the type that the family's layers return
            outputs.append(first(*args, **named))
        return outputs[0]

    for layer in structure.layers:
        layer.forward = record  # of this layer, in front of its class's
    try:
        run(model.base_model, inputs(batch, model.device))
    finally:
        for layer in structure.layers:
            del layer.forward
    return calls


def _branch(model: Any, structure: LayerStructure) -> _Branch | None:
    """Find what a layer adds last, by a probe; None where its output is more than the sum."""
    layer, matrix = structure.layers[0], structure.matrices.down
    with undisturbed(model):
        call = _layer_calls(model, structure, probe_batch(model))[0]
        if _adds(layer, matrix, call):
            return _Branch(matrix, None)
        seen: dict[str, tuple[Any, Any]] = {}  # input and output by module
        with ExitStack() as hooks:
            for name, module in layer.named_modules():
                record = partial(lambda name, _, args, output: seen.update({name: (args[:1], output)}), name)
                hooks.enter_context(module.register_forward_hook(record))
            call.run(layer, call.state)
        product = seen[matrix][1]
        for name, (given, _) in seen.items():
            weight = getattr(layer.get_submodule(name), "weight", None)
            if given and given[0] is product and isinstance(weight, Tensor) and weight.shape == product.shape[-1:]:
                kind = norm_kind(layer.get_submodule(name))
                if kind is not None and not kind.centred and _adds(layer, name, call):
                    return _Branch(matrix, name, kind.offset)
    return None


def _adds(layer: nn.Module, name: str, call: _LayerCall) -> bool:
    """Whether a layer adds the output of one of its modules to its own as it is."""
    output = call.run(layer, call.state)
    size = output.abs().max()
    change = (size * torch.linspace(-1, 1, output.numel(), device=output.device)).view_as(output)
    with layer.get_submodule(name).register_forward_hook(lambda _, args, result: result + change):
        changed = call.run(layer, call.state)
    return bool((changed - output - change).abs().max() <= 1e-3 * size)
