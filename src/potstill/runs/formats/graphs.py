"""Graphs of models, as programs load them: checked against their model, and measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from potstill.errors import RunError, UserError
from potstill.evaluate.exported import ExportedFile
from potstill.evaluate.speed import extra_bytes
from potstill.losses.embedding import similarity_error
from potstill.models.chat import end_token_ids
from potstill.models.loading import load_config, load_tokenizer
from potstill.models.shapes import position_limit
from potstill.runs.formats.loaded import LoadedFile
from potstill.runs.formats.measure import (
    PROBED,
    PROMPT,
    TEXTS,
    Bench,
    FileModule,
    check_lengths,
    exported_file,
    measure_causal,
    random_ids,
    seconds,
)

_UNLIMITED = 1 << 20  # positions of a model without a limit
_SPLIT = 9  # of the tokens that a graph reads in two passes, those of the first
_FARTHEST = 1e-3  # distance of a graph in float32 from its model: of log-probabilities, or of other outputs


@dataclass(frozen=True)
class Graph:
    """A function of arrays in the folder of an exported model, loaded by a program.

    Args:
        inputs: name -> shape; what is free in it is not a number.
        outputs: the same.
        run: computes all outputs, by their names, of all inputs, by theirs.
        kind: what its weights are quantized to; "" where that is not known.
        program: what runs it, with its version.
    """

    inputs: Mapping[str, Sequence[Any]]
    outputs: Mapping[str, Sequence[Any]]
    run: Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]
    kind: str
    program: str


OpenGraph = Callable[[Path], Graph]


class CausalGraph(LoadedFile):
    """A causal model with a cache as a graph.

    Raises:
        RunError: the program does not load the graph.
        UserError: the graph is not of a causal model with a cache.
    """

    def __init__(self, open_graph: OpenGraph, folder: Path) -> None:
        self._graph = graph = open_graph(folder)
        self._folder, self.program = folder, graph.program
        self._past = {name: shape for name, shape in graph.inputs.items() if name.startswith("past_key_values.")}
        self._reads_positions = "position_ids" in graph.inputs
        if not {"input_ids", "attention_mask"} <= {*graph.inputs} or not self._past or "logits" not in graph.outputs:
            raise UserError(
                f"student: expected in {folder} a causal model with past_key_values, got one that reads "
                f"{', '.join([*graph.inputs][:3])}. Other models are measured by potstill export alone."
            )
        self.num_tokens = int(graph.outputs["logits"][-1])
        self.context_length = position_limit(load_config(str(folder), "student")) or _UNLIMITED
        self._cache: dict[str, Any] = {}

    def close(self) -> None:
        """Free the memory of the program."""
        del self._graph
        self._cache = {}

    def ends(self) -> frozenset[int]:
        """The tokens that end a generated text."""
        generation = GenerationConfig.from_pretrained(self._folder)
        return end_token_ids(
            load_tokenizer(str(self._folder), "student"), SimpleNamespace(generation_config=generation)
        )

    def _clear(self) -> None:
        self._cache = {
            name: np.zeros((1, heads, 0, width), np.float32) for name, (_, heads, _, width) in self._past.items()
        }

    def logits_in_passes(self, ids: Sequence[int], first: int) -> np.ndarray:
        """Read some tokens, then the others with their cache, and give the logits of all."""
        self._clear()
        return np.concatenate([self._decode(ids[:first], 0), self._decode(ids[first:], first)])

    def _decode(self, ids: Sequence[int], start: int) -> np.ndarray:
        positions = {"position_ids": np.arange(start, start + len(ids))[None]} if self._reads_positions else {}
        results = self._graph.run(
            {
                "input_ids": np.array([ids]),
                "attention_mask": np.ones((1, start + len(ids)), np.int64),
                **positions,
                **self._cache,
            }
        )
        self._cache = {name: results[name.replace("past_key_values", "present", 1)] for name in self._past}
        return np.asarray(results["logits"][0])


class GraphRows(FileModule):
    """A graph without a cache, as a model of transformers with the configuration of its model."""

    def __init__(self, graph: Graph, config: PretrainedConfig) -> None:
        ((self.output, shape),) = graph.outputs.items()
        super().__init__(int(shape[-1]))
        self.graph, self.config = graph, config  # which says whether it reads token types

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None, **_: Any
    ) -> SimpleNamespace:
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        values = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": types}
        results = self.graph.run({name: values[name].numpy() for name in self.graph.inputs})
        return SimpleNamespace(**{self.output: torch.from_numpy(results[self.output])})


def measure_graph(open_graph: OpenGraph, folder: Path, kind: str, bench: Bench) -> ExportedFile:
    """Load a graph in its program, compare it with its model, and measure it.

    Raises:
        RunError: the program does not load it, or computes something else than the model in float32.
    """
    compared = bench.student if kind == "f32" else None
    if bench.task == "causal":

        def check(loaded: CausalGraph) -> list[str]:
            if compared is not None:
                _check_causal(loaded, compared)
            _check_tokenizer(folder, bench.tokenizer)
            return []

        return measure_causal(partial(CausalGraph, open_graph, folder), folder, kind, bench, check)
    config, tokens = bench.student.config, bench.student.get_input_embeddings().weight.shape[0]
    rows, limit = GraphRows(open_graph(folder), config), position_limit(config) or _UNLIMITED
    program = rows.graph.program
    check_lengths(bench, folder, limit)
    if bench.task == "embedding":
        figures = _compare_sentences(rows, folder, compared, bench)
    else:
        if compared is not None:
            _check_rows(rows, compared, tokens)
        figures = bench.figures(rows)
    ids, time = random_ids(tokens, min(PROMPT, limit // 2)), 0.0
    del rows

    def serve() -> None:
        nonlocal time
        again = GraphRows(open_graph(folder), config)
        time = seconds(lambda: again(ids, torch.ones_like(ids)))

    peak = extra_bytes(serve, torch.device("cpu"))
    return exported_file(
        folder, kind, program, figures, (ids.shape[1] / time, None), peak, getattr(bench.student, "notes", [])
    )


@torch.no_grad()
def _check_causal(loaded: CausalGraph, model: Any) -> None:
    """Check log-probabilities that are computed in two passes, the second with the cache of the first."""
    ids = random_ids(loaded.num_tokens, min(PROBED, loaded.context_length))
    passes = loaded.logits_in_passes(ids[0].tolist(), _SPLIT)
    logits, expected = torch.from_numpy(passes), model(input_ids=ids).logits[0]
    _check_close(logits.log_softmax(-1), expected.log_softmax(-1), model)


def _check_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that the tokenizer in the folder gives the tokens that the rows are read with."""
    own = load_tokenizer(str(folder), "student")
    for text in TEXTS:
        ids, expected = (each(text, verbose=False)["input_ids"] for each in (own, tokenizer))
        if ids != expected:
            raise UserError(
                f"student: expected in {folder} a tokenizer that reads {text!r} as the tokens {expected} of the rows, "
                f"got {ids}. Measure files of other tokenizers one by one, away from another student."
            )


@torch.no_grad()
def _check_rows(rows: GraphRows, model: Any, tokens: int) -> None:
    """Check the output for a row and a shorter one, which is padded."""
    limit = position_limit(rows.config) or _UNLIMITED
    ids = random_ids(tokens, 2 * min(PROBED, limit // 2)).view(2, -1)
    mask = torch.ones_like(ids)
    mask[1, _SPLIT:] = 0
    output, expected = (getattr(module(input_ids=ids, attention_mask=mask), rows.output) for module in (rows, model))
    if output.ndim == 3:
        output, expected = output[mask.bool()], expected[mask.bool()]
    _check_close(output, expected, model)


def _compare_sentences(rows: GraphRows, folder: Path, compared: Any, bench: Bench) -> dict[str, Any]:
    """Compare vectors of texts with those of sentence-transformers, and check those of the model `compared`."""
    texts = [] if bench.rows is None else [*bench.rows["text"]]
    tokenizer = load_tokenizer(str(folder), "student")
    probes = bench.student.probes()
    vectors, expected = bench.student.compare(rows, tokenizer, [*probes, *texts])
    if compared is not None:
        _check_close(vectors, expected, compared)
    if len(texts) < 2:  # no pair
        return {"tokens": len(texts)}
    measured = (vectors[len(probes) :], expected[len(probes) :])
    return {"tokens": len(texts), "kl": float(similarity_error(*measured))}


def _check_close(output: Tensor, expected: Tensor, model: Any) -> None:
    distance = float((output - expected).abs().max())
    if not distance <= _FARTHEST:  # NaN too
        raise RunError(
            f"export: expected {model.config.model_type} as a graph within {_FARTHEST} of the student, got "
            f"{distance:.3g}: torch does not export what this model computes. Use another format."
        )
