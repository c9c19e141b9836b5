"""Initialize a student: at random, or from its teacher's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, set_seed

from potstill.errors import ModelError
from potstill.models.dense import DENSE_FAMILIES
from potstill.models.expert_selection import network_sizes
from potstill.models.feed_forward import Mixture, find_mixture
from potstill.models.fitting import fit_layers
from potstill.models.layer_kinds import keep_kinds, layer_notes, with_layers
from potstill.models.norms import rescale_norms
from potstill.models.pruning import (
    Importance,
    LayerChoice,
    SelectedParts,
    choose_layers,
    measure_importance,
    measure_influence,
    select_parts,
    whole_layers,
)
from potstill.models.shapes import ATTENTION_WIDTHS, DesignShape, count_experts, design_shape, layer_kinds, text_config
from potstill.models.size import build
from potstill.models.structure import LayerList, LayerStructure, find_layer_list, find_structure
from potstill.models.weight_sources import copy_weights, in_block, name_in, source_name, source_of

InitMethod = Literal["copy", "truncate", "prune", "selective"]
WIDTHS = {
    "channels": "hidden",
    "heads": "heads",
    "key and value heads": "kv_heads",
    "numbers of each head": "head_size",
    "feed-forward units": "ffn",
}


def random_student(config: PretrainedConfig, seed: int) -> PreTrainedModel:
    """Build a student in float32 with its architecture's random weights; seeds Python's, NumPy's and torch's too."""
    set_seed(seed)
    return build(config)


@dataclass(frozen=True)
class Initialization:
    """The part of its teacher's weights that a student starts from."""

    config: PretrainedConfig  # the student's; its fields by layer are those of the selected layers
    parts: SelectedParts
    notes: tuple[str, ...]  # what was selected, in words
    changed: Mapping[str, Tensor] = field(default_factory=dict)  # parameters that are not as they were copied

    def student(self, teacher: PreTrainedModel, seed: int) -> PreTrainedModel:
        """Build the student in float32; `seed` is of the weights that the teacher does not have."""
        student = random_student(self.config, seed)
        copy_weights(teacher, student, self.parts)
        student.load_state_dict(dict(self.changed), strict=False)
        return student


def plan_initialization(
    teacher: PreTrainedModel,
    config: PretrainedConfig,
    method: InitMethod,
    *,
    layers: LayerChoice | Sequence[int] | None = None,
    fit: bool = False,
    merge: bool = False,
    calibration: Callable[[], Iterable[Mapping[str, Tensor]]],
    importance: Importance | None = None,
) -> Initialization:
    """Select the part of its teacher's weights that a student starts from.

    The method is copy (complete layers; all widths are the teacher's), truncate (the first heads, units and channels),
    prune (the most important ones, by activations), or selective (all parameters whose shape is the teacher's; the
    others are random). `layers` is a choice of `choose_layers`, by default grouped for copy and prune where half of the
    layers stay, else uniform. With `fit`, the last matrix of each layer is fitted to the teacher's hidden states
    (`fit_layers`). Of a mixture of experts, prune keeps the experts that add most, with `merge` it merges those whose
    outputs are most alike; for a student without experts it makes one network of the units that add most
    (`BlockSource`). `calibration` gives batches of training data, on which layers are fitted, and importance is
    measured unless it is given.

    References:
        Muralidharan et al. 2024 (Minitron), arXiv 2407.14679; Sanh et al. 2019 (DistilBERT), arXiv 1910.01108, for
        copied layers.
    """
    if method not in get_args(InitMethod):
        raise ModelError(f"student.initialize: expected {', '.join(get_args(InitMethod))}, got {method}.")
    of_teacher: Any = text_config(teacher.config)
    _check_family(config, of_teacher, method)
    whole = method in ("copy", "selective")
    mixture = find_mixture(teacher) if method == "prune" else None
    structure: LayerList = mixture or (find_layer_list(teacher) if whole else find_structure(teacher))
    if merge and (mixture is None or not 1 < count_experts(config) < count_experts(of_teacher)):
        raise ModelError(
            "student.initialize.experts: expected a student with at least two and fewer experts than the larger model "
            "for merge, got another. Leave it out, or change the number of experts in student.design."
        )
    shape = design_shape(config)
    changed = _changed_widths(shape, structure)
    _check_sizes(config, of_teacher, structure.shape.head_size, method, changed)
    if method == "prune" and importance is None:
        importance = measure_importance(teacher, calibration())
    influence = None if importance is None else importance.layers
    config, chosen, by = _choose(teacher, structure, config, shape.layers, method, layers, influence, calibration)
    parts = _select(teacher, structure, shape, method, chosen, importance, merge)
    student = build(config, "meta")
    if not parts.matching:
        _check_kinds(teacher, student, structure, parts)
    depth = structure.shape.layers
    of_layers = f"layers {', '.join(map(str, chosen))} of {depth} ({by})" if len(chosen) < depth else f"{depth} layers"
    words = [*_width_words(changed, method)]
    if mixture is not None:
        words += _expert_words(mixture, student, chosen, merge)
    note = f"student: the larger model's {of_layers}, {', '.join(words) or 'complete'}."
    initialization = Initialization(config, parts, (note, *_notes(teacher, student, structure, parts)))
    if "channels" in changed and not parts.matching:
        initialization = _rescaled(initialization, teacher, calibration())
    return _fitted(initialization, teacher, calibration()) if fit and not parts.matching else initialization


def _check_family(config: PretrainedConfig, of_teacher: PretrainedConfig, method: InitMethod) -> None:
    dense = config.model_type in DENSE_FAMILIES.get(of_teacher.model_type, ())
    if type(config) is not type(of_teacher) and not (dense and method == "prune"):
        family, other = type(of_teacher).__name__, type(config).__name__
        hint = " Use prune, which makes one network of experts." if dense else ""
        raise ModelError(f"student.initialize: expected a student of the larger model's {family}, got {other}.{hint}")


def _changed_widths(shape: DesignShape, structure: LayerList) -> dict[str, tuple[int, int]]:
    """The student's widths that are not its teacher's, by their names: the number that it keeps, and that of all."""
    fields = {name: field for name, field in WIDTHS.items() if field != "ffn" or not isinstance(structure, Mixture)}
    sizes = {name: (getattr(shape, field), getattr(structure.shape, field)) for name, field in fields.items()}
    return {name: (kept, total) for name, (kept, total) in sizes.items() if kept != total and kept and total}


def _check_sizes(
    config: PretrainedConfig,
    of_teacher: PretrainedConfig,
    head_size: int,
    method: InitMethod,
    changed: Mapping[str, tuple[int, int]],
) -> None:
    """Check that a method can make the sizes of a student."""
    widths = _in_words(changed)
    if method == "copy" and widths:
        raise ModelError(
            f"student.initialize: expected the larger model's widths to copy layers, got {widths}. Change "
            "num_hidden_layers alone, or use truncate or prune, or selective for the parameters whose shape stays."
        )
    if method == "selective" and "numbers of each head" in changed:  # matrices of one shape would be of other heads
        raise ModelError(
            f"student.initialize: expected heads as wide as the larger model's for selective, got {widths}. Set "
            f"head_dim to {head_size}."
        )
    if config.vocab_size > of_teacher.vocab_size and method != "selective":
        raise ModelError(
            f"student.initialize: expected at most the larger model's {of_teacher.vocab_size} tokens, got "
            f"{config.vocab_size}. Use selective, whose embeddings are random then."
        )


def _in_words(changed: Mapping[str, tuple[int, int]]) -> str:
    return ", ".join(f"{kept} of {total} {name}" for name, (kept, total) in changed.items())


def _width_words(changed: Mapping[str, tuple[int, int]], method: InitMethod) -> Iterator[str]:
    """What becomes of widths, in words."""
    if method == "selective":
        yield "the parameters whose shape matches"
    elif changed:
        yield f"{_in_words(changed)} ({'the most active' if method == 'prune' else 'the first'})"


def _choose(
    teacher: PreTrainedModel,
    structure: LayerList,
    config: PretrainedConfig,
    number: int,
    method: InitMethod,
    layers: LayerChoice | Sequence[int] | None,
    influence: Tensor | None,
    calibration: Callable[[], Iterable[Mapping[str, Tensor]]],
) -> tuple[PretrainedConfig, list[int], str]:
    """Choose a number of the teacher's layers; return the student's config with their fields, these, and how."""
    of_teacher, total = text_config(teacher.config), structure.shape.layers
    choice: LayerChoice | Sequence[int] = "uniform" if layers is None else layers
    if layers is None and method in ("copy", "prune") and 2 * number >= total:
        choice = "grouped"  # with fewer layers each stands for more of them, and evenly spaced ones are fitted better
    if influence is None and choice in ("grouped", "importance") and number < total:
        try:
            influence = measure_influence(teacher, structure.layers, calibration())
        except ModelError:
            if layers is not None:
                raise
            choice = "uniform"
    chosen = choose_layers(choice, total, number, influence)
    if not isinstance(choice, str):
        return with_layers(config, of_teacher, chosen), chosen, "as given"
    chosen = keep_kinds(chosen, layer_kinds(of_teacher))
    try:
        return with_layers(config, of_teacher, chosen), chosen, choice
    except ModelError:
        chosen = [*chosen[:-1], total - 1]  # some families' last layer is of a kind that is fixed
        return with_layers(config, of_teacher, chosen), chosen, choice


def _select(
    teacher: PreTrainedModel,
    structure: LayerList,
    shape: DesignShape,
    method: InitMethod,
    chosen: Sequence[int],
    importance: Importance | None,
    merge: bool,
) -> SelectedParts:
    """Select the parts of the chosen layers."""
    if method in ("copy", "selective"):
        return whole_layers(structure.shape, chosen, matching=method == "selective")
    if isinstance(structure, LayerStructure) and structure.whole_attention:
        _check_whole_attention(structure, shape, type(teacher).__name__)
    if not isinstance(structure, Mixture):
        return select_parts(structure.shape, shape, chosen, importance if method == "prune" else None)
    assert importance is not None, "it is measured"
    parts = _select_around_experts(structure, shape, chosen, importance, type(teacher).__name__)
    return replace(parts, blocks=tuple(importance.blocks[layer] for layer in chosen), merge=merge)


def _select_around_experts(
    mixture: Mixture, shape: DesignShape, layers: Sequence[int], importance: Importance, name: str
) -> SelectedParts:
    """Select channels and heads of a mixture's layers; both stay where heads are not known."""
    of_teacher = replace(mixture.shape, ffn=0)
    if mixture.attention is not None:
        return select_parts(of_teacher, replace(shape, ffn=0), layers, importance)
    _check_whole_attention(mixture, shape, name)
    return whole_layers(of_teacher, layers)


def _check_whole_attention(structure: LayerList, student: DesignShape, name: str) -> None:
    """Check that a student has its larger model's attention, where that cannot be pruned."""
    what = "experts, units" if isinstance(structure, Mixture) else "feed-forward units"
    for width in ATTENTION_WIDTHS:
        if (size := getattr(student, width)) != (own := getattr(structure.shape, width)):
            raise ModelError(
                f"student.initialize: expected {width} {own} as in {name}, whose attention cannot be pruned, got "
                f"{size}. Change {what} and layers alone (keep: attention)."
            )


def _expert_words(mixture: Mixture, student: PreTrainedModel, layers: Sequence[int], merge: bool) -> Iterator[str]:
    """What becomes of experts, in words."""
    counts: dict[tuple[tuple[int, int], tuple[int, int]], None] = {}
    for number, layer in zip(layers, find_layer_list(student).layers, strict=True):
        teacher, own = (network_sizes(x) for x in (mixture.layers[number], layer))
        counts[teacher, own] = None
    for (experts, units), (kept, width) in counts:
        if kept > 1 and kept < experts:
            yield f"{kept} of {experts} experts ({'merged by their outputs' if merge else 'those that add most'})"
        if kept == 1 < experts:
            yield f"one network of the {width} most important units of {experts} experts"
        elif width < units:
            yield f"{width} of {units} feed-forward units (the most active)"


def _rescaled(
    initialization: Initialization, teacher: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]
) -> Initialization:
    """Rescale the student's norms to the channels that it has."""
    student, parts, structure = initialization.student(teacher, 0), initialization.parts, find_layer_list(teacher)
    whole = dict(teacher.named_parameters())
    names = {name: name_in(teacher, student, name) for name, _ in student.named_parameters()}
    sources = {name: source_name(structure, own, parts) for name, own in names.items()}
    taken = {name: source for name, source in sources.items() if source in whole}
    return replace(initialization, changed=rescale_norms(teacher, student, taken, parts.channels, batches))


def _fitted(
    initialization: Initialization, teacher: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]
) -> Initialization:
    """Fit the student's layers to the teacher's hidden states, where they can be fitted."""
    student = initialization.student(teacher, 0).to(teacher.device)  # type: ignore[arg-type]  # their wrapper hides it
    fit = fit_layers(teacher, student, initialization.parts, batches)
    if fit is None:
        note = (
            "student: its layers are not fitted to the larger model's hidden states, which takes layers that end "
            "in a sum, and two batches of calibration rows."
        )
        return replace(initialization, notes=(*initialization.notes, note))
    if not fit.weights:
        return initialization
    (before, after), what = fit.errors, "the squared error of their output"
    figures = f"{before:.1%} to {after:.1%}"
    if fit.kl is not None:
        (before, after), what = fit.kl, "the student's KL to it"
        figures = f"{before:.3f} to {after:.3f} nats"
    if after >= before:  # nearer layer by layer need not be nearer in the end
        note = f"student: its layers are not fitted: on held-out rows {what} would go from {figures}."
        return replace(initialization, notes=(*initialization.notes, note))
    note = "student: its layers are fitted to the larger model's hidden states: on held-out rows"
    note += f" {what} goes from {figures}."
    return replace(
        initialization, notes=(*initialization.notes, note), changed={**initialization.changed, **fit.weights}
    )


def _check_kinds(
    teacher: PreTrainedModel, student: PreTrainedModel, structure: LayerList, parts: SelectedParts
) -> None:
    """Check that each layer of the student has the parts of the teacher's layer that it comes from."""
    for name, parameter in student.named_parameters():
        name = name_in(teacher, student, name)
        place, source = structure.locate(name), source_of(teacher, structure, name, parts, parameter)
        if place and in_block(structure, parts, place):
            continue
        if place and (source is None or (not parts.heads and source.shape != parameter.shape)):
            first = [*range(len(parts.layers))]
            others = (
                "Begin with random weights" if first == [*parts.layers] else f"Choose others, such as layers: {first}"
            )
            raise ModelError(
                "student.initialize: expected layers of the student's kinds, got layer "
                f"{parts.layers[place[0]]} of the larger model, a {type(teacher).__name__}, for layer {place[0]}, "
                f"which differ in {name.rpartition('.')[0]}. {others}."
            )


def _notes(
    teacher: PreTrainedModel, student: PreTrainedModel, structure: LayerList, parts: SelectedParts
) -> Iterator[str]:
    """What becomes of single weights, in words."""
    config, of_teacher = student.config, text_config(teacher.config)
    if parts.kv_heads and parts.kv_heads[0].shape[1] > 1:
        yield f"student: each key and value head is the mean of {parts.kv_heads[0].shape[1]} of the larger model's."
    if not parts.matching:
        yield from layer_notes(of_teacher, structure.layers, parts.layers)
    if config.vocab_size < of_teacher.vocab_size:
        yield f"student: the first {config.vocab_size} of the larger model's {of_teacher.vocab_size} token rows."
    copied: dict[str, int] = {}  # parameters by name, with * for the number of a layer
    random: dict[str, int] = {}
    for own_name, parameter in student.named_parameters():
        name = name_in(teacher, student, own_name)
        place = structure.locate(name)
        of_block = place is not None and in_block(structure, parts, place)
        known = of_block or source_of(teacher, structure, name, parts, parameter) is not None
        names = copied if known else random
        own_name = own_name.replace(f".{place[0]}.", ".*.", 1) if place else own_name
        names[own_name] = names.get(own_name, 0) + parameter.numel()
    if parts.matching:
        if not copied:
            raise ModelError(
                "student.initialize: expected parameters whose shape is the larger model's for selective, got none. "
                "Keep some of the larger model's widths, or use truncate or prune."
            )
        share = sum(copied.values()) / sum([*copied.values(), *random.values()])
        yield f"student: copied, {share:.0%} of its parameters: {', '.join(copied)}."
    if random:
        what = "of another shape than the larger model's" if parts.matching else "not in the larger model"
        yield f"student: {what}, and random: {', '.join(random)}."
    if getattr(config, "tie_word_embeddings", False) and not getattr(of_teacher, "tie_word_embeddings", False):
        yield "student: its head is its embedding (tied); the larger model's own head is not copied."
