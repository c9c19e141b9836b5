"""Metal (torch's mps) without a machine that has it: which device is used, and that no float64 goes to it."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import make_batch, make_llama
from potstill import (
    JSD,
    AlphaBeta,
    Attention,
    Distiller,
    ForwardKL,
    Hidden,
    Labels,
    LayerMap,
    Logits,
    Relations,
    ReverseKL,
    Similarity,
    TotalVariation,
)
from potstill.evaluate import speed
from potstill.losses.token_losses import on_float64_device
from potstill.models.loading import accelerator, has_bfloat16
from potstill.train.trainer import DistillationConfig

SOURCE = Path(__file__).parent.parent / "src" / "potstill"
# Modules whose float64 tensors are on the CPU already.
ON_CPU = {
    "data/batches.py",
    "embedding/encoders.py",
    "embedding/heads.py",
    "embedding/token_fit.py",
    "embedding/vectors.py",
    "evaluate/diagnosis.py",
    "evaluate/sequence.py",
    "evaluate/space.py",
    "models/expert_selection.py",
    "runs/diagnose.py",
}
METAL = torch.device("mps")


class WithoutFloat64(TorchDispatchMode):
    """Refuse float64 tensors, which Metal does not have."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            assert not (isinstance(value, torch.Tensor) and value.dtype == torch.float64), f"{func} gives float64"
        return result


LAST = LayerMap.explicit([(-1, -1)])


@pytest.mark.parametrize(
    "terms",
    [
        *(
            [Logits(divergence)]
            for divergence in (ForwardKL(), ReverseKL(), JSD(0.5), TotalVariation(), AlphaBeta(0.5, 0.5))
        ),
        [Labels(), Logits(ForwardKL(), top_k=5)],
        [Hidden(LAST), Hidden(LAST, "cka"), Similarity(LAST), Relations(LAST), Attention(LAST)],
    ],
    ids=lambda terms: type(terms[0]).__name__ + str(getattr(terms[0], "divergence", "")),
)
def test_a_training_step_needs_no_float64(terms: list[Any]) -> None:
    student, teacher = (make_llama(hidden_size=size, attn_implementation="eager") for size in (8, 16))
    distiller = Distiller(student, teacher, terms)
    with WithoutFloat64():
        distiller.step(make_batch()).loss.backward()


def test_float64_is_computed_on_the_cpu_where_the_device_has_none() -> None:
    stub: Any = SimpleNamespace(device=METAL, cpu=lambda: "on the cpu")
    assert on_float64_device(stub) == "on the cpu"
    values = torch.ones(2)
    assert on_float64_device(values) is values
    wide = re.compile(r"\.double\(\)|dtype=torch\.float64")
    moved = re.compile(r"on_float64_device|\.cpu\(\)|torch\.(zeros|tensor|from_numpy|rand)\(")
    for path in SOURCE.rglob("*.py"):
        if path.relative_to(SOURCE).as_posix() in ON_CPU:
            continue
        text = path.read_text(encoding="utf-8")
        for line in text.splitlines():
            if wide.search(line):
                assert moved.search(line) or "on_float64_device" in text, f"{path}: {line.strip()}"


def test_metal_is_the_accelerator_of_its_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    waited = []
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: METAL)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    assert accelerator() == METAL and has_bfloat16()
    speed._awaited(lambda: None, METAL)()
    assert waited == [METAL]
    assert speed.extra_bytes(lambda: None, METAL) is None  # no peak is known, so none is reported
    config = DistillationConfig(output_dir=str(tmp_path), use_cpu=True)
    assert config.dataloader_pin_memory is False
