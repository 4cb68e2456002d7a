"""How a network is called on an example: `model(x)`, `model(*tuple)` or `model(**dict)`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = ["call"]


def call(model: nn.Module, example: Any) -> Any:
    """What `model` answers to `example`: a tuple or list holds positional arguments, a dict holds keyword arguments.

    Anything else is the single argument.
    """
    if isinstance(example, Mapping):
        return model(**example)
    if isinstance(example, (tuple, list)):
        return model(*example)
    return model(example)
