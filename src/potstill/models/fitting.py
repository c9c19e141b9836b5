"""Fit the layers of a student that begins with its teacher's weights to the teacher's hidden states."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from potstill.errors import ModelError
from potstill.losses.token_losses import on_float64_device
from potstill.models.pruning import SelectedParts
from potstill.models.split import evaluation_mode, inputs, probe_batch, run, undisturbed
from potstill.models.structure import LayerStructure, find_structure, is_transposed

RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0)  # over the mean squared feature
HELD_OUT = 8  # one batch of so many is held out, to choose the ridge


class LayerFit(NamedTuple):
    """The fit of a student."""

    weights: dict[str, Tensor]  # by parameter of the student
    before: float  # mean over layers of the squared error of their output, over the square of the teacher's
    after: float  # on held-out batches, both


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

    None where a layer does more than add the matrix's output, as with a norm behind it, or with a single batch.

    References:
        Shopkhoev et al. 2025 (ReplaceMe), arXiv 2505.02819, for a matrix that stands for the layers left out.
    """
    batches = list(batches)
    try:
        of_teacher, of_student = find_structure(teacher), find_structure(student)
    except ModelError:  # of another family, whose layers were copied whole
        return None
    if len(batches) < 2 or not _adds_its_output(student, of_student):
        return None
    with evaluation_mode(teacher, student):
        states = _HiddenStates(teacher, of_teacher, batches), _HiddenStates(student, of_student, batches)
        return _fit(*states, of_student, parts, batches)


def _fit(
    of_teacher: _HiddenStates,
    of_student: _HiddenStates,
    structure: LayerStructure,
    parts: SelectedParts,
    batches: Sequence[Mapping[str, Tensor]],
) -> LayerFit:
    weights, errors = {}, []
    for number, end in enumerate([*parts.layers[1:], len(of_teacher.layers)]):
        of_teacher.advance(end)
        matrix: Any = structure.layers[number].get_submodule(structure.matrices.down)
        regressions = _Regression(), _Regression()
        for index, (output, features) in enumerate(of_student.outputs(matrix)):
            attended = batches[index]["attention_mask"].bool().to(output.device)
            target = of_teacher.states[index].to(output.device)[attended][:, parts.channels.to(output.device)]
            held_out = (index + 1) % min(HELD_OUT, len(batches)) == 0
            regressions[held_out].add(features[attended], target - output[attended], target)
        change, *error = _solve(*regressions)
        errors.append(error)
        if change is not None:
            matrix.weight.add_((change if is_transposed(matrix) else change.T).to(matrix.weight))
            weights[f"{structure.path}.{number}.{structure.matrices.down}.weight"] = (
                matrix.weight.detach().cpu().clone()
            )
        of_student.advance(number + 1)
    before, after = torch.tensor(errors).mean(0).tolist()
    return LayerFit(weights, before, after)


class _Regression:
    """Sums over tokens, of errors [H] on features [I]; relative to the size of what they are errors of."""

    def __init__(self) -> None:
        self.features: Any = 0  # [I, I]
        self.products: Any = 0  # [I, H]
        self.error, self.tokens = 0.0, 0

    def add(self, features: Tensor, errors: Tensor, targets: Tensor) -> None:
        targets = targets.float()
        scale = targets.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny).reciprocal()
        features, errors = features.float() * scale, errors.float() * scale
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


def _solve(fitted: _Regression, held_out: _Regression) -> tuple[Tensor | None, float, float]:
    """The change of the matrix, None for none, and the mean held-out error without it and with it."""
    errors = {ridge: held_out.error_after(fitted.solve(ridge)) for ridge in RIDGES}
    ridge = min(errors, key=lambda ridge: errors[ridge])
    if not errors[ridge] < held_out.error:
        return None, held_out.error / held_out.tokens, held_out.error / held_out.tokens
    return fitted.solve(ridge), held_out.error / held_out.tokens, errors[ridge] / held_out.tokens


class _HiddenStates:
    """The hidden states of batches in front of one of a model's layers: those behind it are computed on request."""

    def __init__(self, model: Any, structure: LayerStructure, batches: Sequence[Mapping[str, Tensor]]) -> None:
        self.layers, self.next = structure.layers, 0
        self.calls = [_layer_calls(model, structure, batch) for batch in batches]
        self.states = [calls[0].state for calls in self.calls]

    def advance(self, layer: int) -> None:
        """Run the layers in front of `layer`."""
        for number in range(self.next, layer):
            self.states = [self._run(index, number) for index in range(len(self.states))]
        self.next = max(self.next, layer)

    def outputs(self, matrix: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """For each batch, the output of the next layer [B, T, H] and the input of one of its matrices [B, T, I]."""
        seen: list[Tensor] = []
        with matrix.register_forward_pre_hook(lambda _, args: seen.append(args[0])):
            for index in range(len(self.states)):
                output = self._run(index, self.next)
                yield output, seen.pop()

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


def _layer_calls(model: Any, structure: LayerStructure, batch: Mapping[str, Tensor]) -> list[_LayerCall]:
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


def _adds_its_output(model: Any, structure: LayerStructure) -> bool:
    """Whether a layer adds the output of its last matrix to its own as it is; tried on a few tokens."""
    layer: Any = structure.layers[0]
    with undisturbed(model):
        call = _layer_calls(model, structure, probe_batch(model))[0]
        output = call.run(layer, call.state)
        size = output.abs().max()
        change = (size * torch.linspace(-1, 1, output.numel(), device=output.device)).view_as(output)
        with layer.get_submodule(structure.matrices.down).register_forward_hook(
            lambda _, args, result: result + change
        ):
            changed = call.run(layer, call.state)
    return bool((changed - output - change).abs().max() <= 1e-3 * size)
