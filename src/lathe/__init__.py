"""Lathe: a workshop for the structure of neural networks, in PyTorch.

Predict (`lathe.theory`), build (`lathe.nn`, `lathe.operators`), reshape (`lathe.compression`), read
(`lathe.representations`) and train (`lathe.training`) networks, and check every claim behind the methods (`lathe run`).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lathe.core.size import measure as measure
    from lathe.core.surgery import swap as swap
    from lathe.theory.prediction import predict as predict
    from lathe.training import fit as fit

__version__ = "0.1.0"

# The command line and `import lathe` stay quick: torch is imported by the first name that needs it.
_HOME = {
    "swap": "lathe.core.surgery",
    "measure": "lathe.core.size",
    "fit": "lathe.training",
    "predict": "lathe.theory.prediction",
}
_PARTS = (
    "compression",
    "core",
    "data",
    "gallery",
    "nn",
    "operators",
    "representations",
    "studies",
    "theory",
    "training",
)

__all__ = ["__version__", "fit", "measure", "predict", "swap"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in _PARTS:
        return importlib.import_module(f"lathe.{name}")
    raise AttributeError(f"module 'lathe' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_PARTS])
