"""Versions of the software and hardware behind a measurement."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch
import transformers


def versions() -> dict[str, str]:
    """Return versions of the main libraries, and a description of the machine."""
    return {
        "potstill": importlib.metadata.version("potstill"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
        + (f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""),
    }
